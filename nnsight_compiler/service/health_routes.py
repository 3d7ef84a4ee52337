"""How the service is: for load balancers, for Prometheus, and for whoever writes a client."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.metrics import CONTENT_TYPE


async def show_health(request: Request) -> Response:
    """GET /healthz: it answers."""
    return JSONResponse({"status": "ok"})


async def show_readiness(request: Request) -> Response:
    """GET /readyz: whether jobs are taken."""
    front: FrontEnd = request.app.state.front
    front.check_ready()
    return JSONResponse({"status": "ready"})


async def show_metrics(request: Request) -> Response:
    """GET /metrics: counters, for Prometheus."""
    front: FrontEnd = request.app.state.front
    counts = await front.call(front.store.counts)
    return Response(front.metrics.text(counts, front.unready() is None), headers={"Content-Type": CONTENT_TYPE})


async def show_description(request: Request) -> Response:
    """GET /openapi.json: this protocol."""
    return JSONResponse(request.app.state.description)
