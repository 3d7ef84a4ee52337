"""`nnsightc serve`: a service that runs experiments of others, sent as data, on the models of this machine."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from nnsight_compiler.cli.arguments import demo_model
from nnsight_compiler.cli.keys import bytes_of
from nnsight_compiler.cli.refusal import RefusalError

PORT = 8473


def _size(name: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(name, metavar="BYTES", parser=bytes_of, help=help)
    return option


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="tiny, smollm2, a hub name, a folder, a .gguf file; or NAME=MODEL for clients."
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")] = PORT,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="Whose keys are accepted; see nnsightc keys.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="What is kept: the queue, results, uploads.", show_default=False),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Jobs that may share a forward.")] = 16,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Of each model: what may run at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each worker; all share the machine otherwise.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:1, auto; the CPU otherwise.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights, as bfloat16; as stored otherwise.")
    ] = None,
    max_queued: Annotated[int, typer.Option("--max-queued", min=1, help="Jobs that may wait at once.")] = 4096,
    max_body: Annotated[int | None, _size("--max-body", "Of one request, as 64M.")] = None,
    max_result: Annotated[int | None, _size("--max-result", "Of one result. Without --api-keys.")] = None,
    stored_bytes: Annotated[int | None, _size("--stored-bytes", "Of results and uploads. Without --api-keys.")] = None,
    wall: Annotated[
        float | None, typer.Option("--wall", metavar="SECONDS", help="That a job may run. Without --api-keys.")
    ] = None,
    memory: Annotated[int | None, _size("--memory", "That a job may take. Without --api-keys.")] = None,
    forwards: Annotated[
        int | None, typer.Option("--forwards", help="Runs of the model by a job. Without --api-keys.")
    ] = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox/--no-sandbox", help="Whether workers give up the network and the disk.")
    ] = True,
) -> None:
    """Run experiments of others on models of this machine. They are sent as data; nobody's code is executed.

    On this machine alone, for whoever is logged in here:

        nnsightc serve tiny

    Their experiments then say where they run: `with model.trace("…", remote="http://127.0.0.1:8473"):`

    For others, with keys, behind a proxy that speaks TLS:

        nnsightc keys add ada --api-keys keys.sqlite
        nnsightc serve openai-community/gpt2 --api-keys keys.sqlite --host 0.0.0.0

    Limits for each tenant then stand in the file of keys. Jobs that were acknowledged survive a restart.
    """
    limits = {
        "max_body": max_body,
        "max_result_bytes": max_result,
        "stored_bytes": stored_bytes,
        "wall_seconds": wall,
        "memory_bytes": memory,
        "forwards": forwards,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if api_keys is None and not is_loopback(host):
        raise RefusalError(
            f"other machines can reach {host}, and without keys anybody there could use the service",
            "make a key with nnsightc keys add NAME --api-keys FILE, and add --api-keys FILE; or leave --host out",
        )
    if api_keys is not None:
        if not api_keys.is_file():
            raise RefusalError(
                f"there is no file {api_keys}", f"nnsightc keys add NAME --api-keys {api_keys} makes one"
            )
        if set(given) - {"max_body"}:
            raise RefusalError(
                "with --api-keys, the limits of a job are those of its tenant",
                "give them to nnsightc keys add, as --wall and --memory; they count for all keys of the tenant",
            )
    try:
        from nnsight_compiler.service.running import Serving
    except ModuleNotFoundError as error:
        raise RefusalError(f"a service needs {error.name}", "pip install 'nnsight-compiler[serve]'") from None
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else whoever sends no HTTP fills the log
    named = [named_model(model) for model in models]
    listener = listen(host, port)
    url = address_of(host, listener)
    serving = Serving(
        models=named,
        state=state or state_folder(),
        api_keys=api_keys,
        limits=given,
        max_batch=max_batch,
        workers=workers,
        threads=threads,
        device=device,
        dtype=dtype,
        max_queued=max_queued,
        sandbox=sandbox,
    )
    names = ", ".join(name for name, _ in named)
    print(f"loading {names} …", flush=True)
    gc.enable()  # `main` turned it off, and this goes on for long
    serving.run(listener, lambda: print(_ready(names, url, api_keys), flush=True))


def _ready(names: str, url: str, api_keys: Path | None) -> str:
    key = "" if api_keys is None else f"\nclients log in with: nnsightc login {url}"
    return f'serving {names} at {url}{key}\nuse it with: model.trace("…", remote="{url}")\nstop it with Ctrl-C'


def named_model(text: str) -> tuple[str, str]:
    """What clients call a model, and what it is loaded from. A folder or file is called as itself."""
    name, equals, source = text.partition("=")
    if not equals:
        source = text
        path = Path(text)
        name = path.stem if path.is_file() else path.resolve().name if path.is_dir() else text
    if not name or not source:
        raise RefusalError(f"{text!r} names no model", "write tiny, a folder, a hub name, or NAME=MODEL")
    return name, str(demo_model()) if source == "smollm2" else source


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        code = error.errno or 0
        reason = os.strerror(code) if code > 0 else str(error.strerror or error)
        way_out = "choose another --port, or 0 for any that is free; --host is an address of this machine"
        raise RefusalError(f"nothing can listen at {host}:{port}: {reason}", way_out) from None


def address_of(host: str, listener: socket.socket) -> str:
    """Where clients find the service."""
    bare = host.strip("[]")
    return f"http://{f'[{bare}]' if ':' in bare else bare}:{listener.getsockname()[1]}"


def state_folder() -> Path:
    """Where the state is kept if it is not said."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "nnsight-compiler"
