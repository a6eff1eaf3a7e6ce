"""What a caller may choose for one file."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from percepnet.errors import ParameterError
from percepnet.synthesis import MAX_ATTENUATION_LIMIT_DB, Controls

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Parameters(BaseModel):
    """What a caller may choose for one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["wav", "flac", "ogg", "opus"] = Field("wav", description="Format of the enhanced file.")
    attenuation_limit_db: float = Field(
        Controls.attenuation_limit_db,
        ge=0,
        le=MAX_ATTENUATION_LIMIT_DB,
        allow_inf_nan=False,
        description="Lower the noise by at most this many dB; the maximum is as good as no limit.",
    )
    mix: Share = Field(
        Controls.mix, description="Share of the enhanced signal: 0 is the input, 1 all enhanced."
    )
    postfilter: Share = Field(
        Controls.postfilter,
        description="Strength of the postfilter, which lowers residual noise: 0 is off, 1 full.",
    )

    @classmethod
    def parse(cls, given: list[tuple[str, str]]) -> Self:
        """Check names and texts as they came in a query and a form; raises ParameterError."""
        names = [name for name, _ in given]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ParameterError(f"given more than once: {', '.join(twice)}")
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ParameterError("; ".join(map(_complaint, error.errors()))) from error

    @property
    def controls(self) -> Controls:
        """What of it concerns the signal path."""
        return Controls(self.attenuation_limit_db, self.mix, self.postfilter)

    @classmethod
    def documentation(cls) -> list[dict[str, Any]]:
        """OpenAPI's `parameters`, one a field."""
        properties = cls.model_json_schema()["properties"]
        return [
            {"name": name, "in": "query", "description": schema.pop("description"), "schema": schema}
            for name, schema in properties.items()
        ]


def _complaint(detail: Any) -> str:
    name = str(detail["loc"][0])[:64]
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such parameter; there are {', '.join(Parameters.model_fields)}"
    return f"{name}={str(detail['input'])[:64]!r}: {detail['msg']}"
