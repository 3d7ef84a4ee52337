"""Logging in to a service, so that `remote=True` finds it, and out of it."""

from __future__ import annotations

import getpass
import os
import sys
from typing import Annotated

import typer

from nnsight_compiler.cli.refusal import RefusalError

UrlArgument = Annotated[
    str | None, typer.Argument(metavar="[URL]", help="Where the service is; NNSIGHT_HOST where it is left out.")
]


def login(url: UrlArgument = None) -> None:
    """Keep the address of a service and your API key for it.

    The key is asked for, and does not appear; or it is read from the standard input. The service is asked whether it
    accepts it, and both are kept in a file that only you can read:

        nnsightc login https://models.example.org
        nnsightc login http://localhost:8473 < key.txt

    Experiments with remote=True then run there.
    """
    from nnsight_compiler.remote.connection import Connection
    from nnsight_compiler.remote.credentials import HOST, Logins, address, checked_key
    from nnsight_compiler.remote.served_models import listed

    named = url or os.environ.get(HOST)
    if not named:
        raise RefusalError("it is not said which service is meant", f"write nnsightc login URL, or set {HOST}")
    host = address(named)
    given = _asked(host)
    key = checked_key(given, "what was given") if given else None
    names = [model.name for model in listed(Connection(host, key))]
    logins = Logins.read()
    logins.keys[host], logins.latest = key, host
    logins.write()
    print(f"logged in to {host}, which serves {', '.join(names) or 'no model yet'}")
    print(f"kept in {logins.file()}")
    if os.environ.get(HOST) and address(os.environ[HOST]) != host:
        print(f"note: {HOST} is set, and names another service: remote=True runs there", file=sys.stderr)


def logout(url: UrlArgument = None) -> None:
    """Forget the API key for a service, by default the one that was logged in to last."""
    from nnsight_compiler.remote.credentials import Logins, address

    logins = Logins.read()
    host = address(url) if url else logins.latest
    if host is None or host not in logins.keys:
        known = ", ".join(logins.keys)
        way_out = f"name one of: {known}" if known else "there is nothing to forget"
        raise RefusalError(f"you are not logged in to {host or 'any service'}", way_out)
    del logins.keys[host]
    if logins.latest == host:
        logins.latest = next(reversed(logins.keys), None)
    logins.write()
    print(f"logged out of {host}; the key itself stays valid until whoever runs the service revokes it")
    if logins.latest is not None:
        print(f"remote=True runs at {logins.latest} now")


def _asked(host: str) -> str:
    """The key that the user types, or that comes through a pipe."""
    if sys.stdin is not None and sys.stdin.isatty():
        return getpass.getpass(f"API key for {host} (empty where it wants none): ").strip()
    return (sys.stdin.readline(4096) if sys.stdin is not None else "").strip()
