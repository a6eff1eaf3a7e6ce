"""What a caller may choose for one file."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema

from percepnet.errors import ParameterError
from percepnet.synthesis import Controls


class Parameters(BaseModel):
    """What a caller may choose for one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["wav", "flac", "ogg", "opus"] = Field("wav", description="Format of the enhanced file.")
    attenuation_limit_db: Annotated[float, Field(ge=0, allow_inf_nan=False)] | SkipJsonSchema[None] = Field(
        None, description="Lower the noise by at most this many dB; no limit by default."
    )
    mix: float = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the enhanced signal: 0 is the input, 1 all enhanced.",
    )
    postfilter: bool = Field(True, description="Remove more of the residual noise.")

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
            # That a text is not None either tells the caller nothing.
            details = [detail for detail in error.errors() if detail["type"] != "none_required"]
            raise ParameterError("; ".join(map(_complaint, details))) from error

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
