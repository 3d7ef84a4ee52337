"""A scripted service, asked without sockets: every answer is compared with what the description declares."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
from service_stand_ins import ScriptedEngine, WatchedStore, job
from starlette.applications import Starlette

from nnsight_compiler.service.app import app
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.keys import Keys
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.tenants import Limits, Tenant

ALICE = Tenant("alice", limits=Limits(max_body=1 << 20))
BOB = Tenant("bob")
SMALL = Tenant("small", limits=Limits(stored_bytes=1))


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test in an event loop; one that takes longer than 20 seconds has come to a halt."""

    @wraps(test)
    def run(*args: Any, **keywords: Any) -> None:
        async def within() -> None:
            async with asyncio.timeout(20):
                await test(*args, **keywords)

        asyncio.run(within())

    return run


@dataclass
class Service:
    """A service that runs, and a client of it, who is alice. There are keys of two tenants more."""

    app: Starlette
    store: WatchedStore
    engine: ScriptedEngine
    keys: Keys
    key: str
    other_key: str
    small_key: str
    client: httpx.AsyncClient

    @property
    def front(self) -> FrontEnd:
        front: FrontEnd = self.app.state.front
        return front

    async def jobs(self) -> int:
        """How many jobs were ever queued."""
        return sum((await self.front.call(self.store.counts)).values())

    async def send(self, *steps: list[Any], **fields: Any) -> str:
        """Sends a job, and gives its id."""
        answer = await self.client.post("/v1/jobs", content=job(*steps, **fields))
        assert answer.status_code == 202, answer.text
        id: str = answer.json()["id"]
        return id

    async def status(self, id: str, wait: float = 0) -> str:
        """How a job stands, after so many seconds at most."""
        answer = await self.client.get(f"/v1/jobs/{id}", params={"wait": wait})
        status: str = answer.json()["status"]
        return status

    async def reaches(self, id: str, status: str) -> None:
        """Returns once the job stands so."""
        while await self.status(id) != status:
            await asyncio.sleep(0.005)


_made: list[tuple[bytes, list[str]]] = []


def keys_in(path: Path) -> list[str]:
    """The keys of alice, bob and small, in a file: the same in each test, since to make them takes the disk's time."""
    if not _made:
        keys = Keys(path)
        made = [keys.add(tenant) for tenant in (ALICE, BOB, SMALL)]
        keys.close()
        _made.append((path.read_bytes(), made))
    data, found = _made[0]
    path.write_bytes(data)
    return list(found)


@asynccontextmanager
async def service(
    folder: Path,
    *,
    local: bool = False,
    ready: bool = True,
    max_queued: int = 100,
    state: Path | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    """A service in a folder, and the client of the tenant alice; or of anybody, where it is `local`."""
    thread = StoreThread()
    state = state or folder / "state"
    folder.mkdir(exist_ok=True)
    made_keys = keys_in(folder / "keys")
    store, keys = thread.run(WatchedStore, state, max_queued), thread.run(Keys, folder / "keys")
    engine = ScriptedEngine(folder, starts=ready)
    chosen = Settings(state=state, **{"free_disk": 0, "drain": 0.2, **settings})
    made = app(store, Tenant("local") if local else keys, engine, chosen, thread)
    async with made.router.lifespan_context(made), client(made, made_keys[0]) as asked:
        found = Service(made, store, engine, keys, *made_keys, asked)
        while ready and found.front.unready():
            await asyncio.sleep(0)
        yield found
    thread.run(store.close)
    thread.run(keys.close)
    thread.close()


def client(made: Starlette, key: str | None) -> httpx.AsyncClient:
    """A client that checks every answer's status against the description."""
    declared = {
        (
            method.upper(),
            re.compile(re.sub(r"\{(\w+)\}", lambda found: ".+" if found[1] == "name" else "[^/]+", path)),
        ): {int(status) for status in operation["responses"]}
        for path, operations in made.state.description["paths"].items()
        for method, operation in operations.items()
    }

    async def check(answer: httpx.Response) -> None:
        request = answer.request
        method = "GET" if request.method == "HEAD" and "/blobs/" not in request.url.path else request.method
        for (known, path), statuses in declared.items():
            if known == method and path.fullmatch(request.url.path):
                assert answer.status_code in statuses, f"{method} {path.pattern} answers {answer.status_code}"
                return
        assert answer.status_code in (401, 404, 405), f"{method} {request.url.path} is not described"

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(made, raise_app_exceptions=False),
        base_url="http://service",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        event_hooks={"response": [check]},
    )


def events(text: str) -> list[tuple[int, str, Any]]:
    """The events of a stream: number, name, data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found
