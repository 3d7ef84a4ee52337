"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nnsight_compiler.service.authentication import Authentication
from nnsight_compiler.service.engine import Engine
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.keys import Keys
from nnsight_compiler.service.metering import Metering
from nnsight_compiler.service.openapi import description
from nnsight_compiler.service.operations import OPERATIONS, Endpoint
from nnsight_compiler.service.records import NoSpaceError, StoreError
from nnsight_compiler.service.refusals import (
    Refusal,
    answer_http_exception,
    answer_no_space,
    answer_refusal,
    answer_store_failure,
    answer_unforeseen,
)
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.tenants import Tenant


def app(store: Store, keys: Keys | Tenant, engine: Engine, settings: Settings, thread: StoreThread) -> Starlette:
    """The application. Its front end is `app.state.front`.

    Args:
        store: the queue, made in `thread`, as the keys.
        keys: who may ask; or one tenant, for whom no key is wanted.
        engine: what admits and runs jobs; started and stopped with the application.
    """
    front = FrontEnd(store, engine, settings, thread)

    async def authenticate(key: str) -> Tenant | None:
        return await thread.call(keys.authenticate, key) if isinstance(keys, Keys) else keys

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await front.start()
        try:
            yield
        finally:
            await front.stop()

    routes = _routes()
    found = Starlette(
        routes=routes,
        middleware=[
            Middleware(Metering, front.metrics, {each.endpoint: each.path.replace(":path", "") for each in routes}),
            Middleware(Authentication, authenticate, wants_key=isinstance(keys, Keys), most=settings.requests),
        ],
        exception_handlers={
            Refusal: answer_refusal,
            HTTPException: answer_http_exception,
            NoSpaceError: answer_no_space,
            StoreError: answer_store_failure,
            Exception: answer_unforeseen,
        },
        lifespan=lifespan,
    )
    found.router.redirect_slashes = False
    found.state.front = front
    found.state.description = description(OPERATIONS, version("nnsight-compiler"))
    return found


def _routes() -> list[Route]:
    """A route for each path, so that an answer to a wrong method knows all the right ones."""
    found: dict[str, dict[str, Endpoint]] = {}
    for each in OPERATIONS:
        path = each.path.replace("{name}", "{name:path}")  # names of models hold slashes
        found.setdefault(path, {})[each.method] = each.endpoint
    return [Route(path, _by_method(endpoints), methods=list(endpoints)) for path, endpoints in found.items()]


def _by_method(endpoints: Mapping[str, Endpoint]) -> Endpoint:
    async def answer(request: Request) -> Response:
        endpoint = endpoints.get(request.method) or endpoints["GET"]  # HEAD is asked of what GET answers
        return await endpoint(request)

    return answer
