"""Whether this process lives, and whether it should be sent work."""

from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.responses import JSONResponse


@dataclass
class Health:
    """Readiness of one process; the model is loaded and has run before it listens."""

    stopping: bool = False


def routes(health: Health) -> APIRouter:
    """`/healthz` answers while the process lives; `/readyz` turns to 503 as soon as it is told to stop.

    HEAD is for load balancers that ask so.
    """
    router = APIRouter(tags=["operation"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz", summary="May it be sent work?", responses={503: {"description": "It is stopping."}}
    )
    async def readyz() -> JSONResponse:
        return (
            JSONResponse({"status": "stopping"}, 503)
            if health.stopping
            else JSONResponse({"status": "ready"})
        )

    return router
