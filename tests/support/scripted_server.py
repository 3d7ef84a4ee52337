"""A scripted service as a process of its own, which a test may kill: python scripted_server.py FOLDER PORT."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from service_stand_ins import ScriptedEngine

from nnsight_compiler.service.app import app
from nnsight_compiler.service.connections import Patience
from nnsight_compiler.service.server import Server
from nnsight_compiler.service.settings import Settings
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.store_thread import StoreThread
from nnsight_compiler.service.tenants import Tenant


def main(folder: Path, port: int) -> None:
    """Serves until it is stopped or killed."""
    thread = StoreThread()
    store = thread.run(Store, folder / "state")
    settings = Settings(state=folder / "state", max_batch=4, free_disk=0)
    made = app(store, Tenant("local"), ScriptedEngine(folder), settings, thread)
    listener = socket.create_server(("127.0.0.1", port))
    Server(made, Patience(), lambda: print("ready", flush=True)).run([listener])
    thread.run(store.close)
    thread.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
