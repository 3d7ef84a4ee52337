"""Who is asking: each path but the two that a load balancer reads wants a key, unknown paths too. And how much at once:
no tenant has all of the connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nnsight_compiler.service.refusals import Refusal, retry
from nnsight_compiler.service.tenants import Tenant

OPEN_PATHS = frozenset({"/healthz", "/readyz"})

Authenticate = Callable[[str], Awaitable[Tenant | None]]


class Authentication:
    """Puts the tenant of the request's key into `request.state.tenant`, or answers 401; and 429 where keys are wanted
    and `most` requests of the tenant are being answered already."""

    def __init__(self, app: ASGIApp, authenticate: Authenticate, wants_key: bool, most: int) -> None:
        self._app, self._authenticate, self._wants_key, self._most = app, authenticate, wants_key, most
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            key = bearer(Headers(scope=scope)) if self._wants_key else ""
            tenant = None if key is None else await self._authenticate(key)
            if tenant is None:
                await _refuse()(scope, receive, send)
                return
            if self._wants_key and self._open[tenant.name] >= self._most:
                await _too_many(tenant, self._most)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
            self._open[tenant.name] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._open[tenant.name] -= 1
                if not self._open[tenant.name]:
                    del self._open[tenant.name]
        else:
            await self._app(scope, receive, send)


def bearer(headers: Headers) -> str | None:
    """The key of an `Authorization: Bearer <key>` header; None where there is none or more than one."""
    given = headers.getlist("authorization")
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _too_many(tenant: Tenant, most: int) -> ASGIApp:
    message = f"{most} requests of {tenant.name} are being answered, as many as may be at once; try again later"
    return Refusal(429, "too_many_requests", message, headers=retry(1)).response()


def _refuse() -> ASGIApp:
    message = "this service wants a key that it knows: send the header 'Authorization: Bearer <key>'"
    headers = {"WWW-Authenticate": "Bearer"}
    return Refusal(401, "unauthorized", message, headers=headers).response()
