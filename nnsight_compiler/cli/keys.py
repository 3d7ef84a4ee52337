"""`nnsightc keys`: who may use a service, and how much of it."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from nnsight_compiler.cli.refusal import RefusalError
from nnsight_compiler.service.keys import KeyRecord, Keys, KeysError
from nnsight_compiler.service.tenants import Tenant, TenantError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

app = typer.Typer(
    help="Who may use a service, and how much of it: a file of keys for `nnsightc serve --api-keys`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

FileOption = Annotated[Path, typer.Option("--api-keys", metavar="FILE", help="The file of keys.", show_default=False)]


def bytes_of(text: str) -> int:
    """A number of bytes, as in 4096, 512K, 64M, 2G."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    if not number.isascii() or not number.isdecimal():
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 4096, 512K, 64M or 2G")
    return int(number) * unit


def _size(name: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(name, metavar="BYTES", parser=bytes_of, help=help)
    return option


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tenant: a person or a group.")],
    api_keys: FileOption,
    weight: Annotated[
        float | None, typer.Option("--weight", help="Its share of the service beside the others'; 1 at first.")
    ] = None,
    max_queued: Annotated[int | None, typer.Option("--max-queued", help="Jobs that may wait at once.")] = None,
    max_body: Annotated[int | None, _size("--max-body", "Of one request.")] = None,
    max_result: Annotated[int | None, _size("--max-result", "Of one result.")] = None,
    stored_bytes: Annotated[int | None, _size("--stored-bytes", "Of its results and uploads together.")] = None,
    wall: Annotated[float | None, typer.Option("--wall", metavar="SECONDS", help="That one job may run.")] = None,
    memory: Annotated[int | None, _size("--memory", "That one job may take.")] = None,
    forwards: Annotated[int | None, typer.Option("--forwards", help="Runs of the model by one job.")] = None,
) -> None:
    """Make a key, and print it: this once, since only a hash of it is kept.

    The file is made where there is none yet:

        nnsightc keys add ada --api-keys keys.sqlite

    Limits of the tenant are given with it:

        nnsightc keys add class-of-2026 --api-keys keys.sqlite --weight 3 --stored-bytes 20G

    A tenant may have several keys. What is not given stays as it was; what is given counts for all keys of the tenant.
    """
    given: dict[str, Any] = {
        "max_queued": max_queued,
        "max_body": max_body,
        "max_result_bytes": max_result,
        "stored_bytes": stored_bytes,
        "wall_seconds": wall,
        "memory_bytes": memory,
        "forwards": forwards,
    }
    with _opened(api_keys, new=True) as keys:
        tenant = keys.tenant(name) or Tenant(name)
        limits = replace(tenant.limits, **{key: value for key, value in given.items() if value is not None})
        key = keys.add(replace(tenant, weight=tenant.weight if weight is None else weight, limits=limits))
    print(key)
    print(f"A key of {name}, shown this once. It goes to `nnsightc login`, or into NNSIGHT_API_KEY.", file=sys.stderr)


@app.command(name="list")
def list_keys(
    api_keys: FileOption,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the keys that there are, without what is secret of them.

    With --json, what each tenant may ask for too:

    nnsightc keys list --api-keys keys.sqlite
    """
    with _opened(api_keys) as keys:
        records = keys.records()
    if json:
        print(json_format.dumps([asdict(record) for record in records], indent=2))
        return
    rows = [("id", "tenant", "weight", "made", "revoked"), *map(_row, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="ID|NAME", help="A key's id, or a tenant: then all of its keys.")],
    api_keys: FileOption,
) -> None:
    """Make a key invalid.

    It counts from the next request on, also for a service that runs:

        nnsightc keys revoke 5f0c9d21ab34 --api-keys keys.sqlite

    A tenant's name stands for all of its keys:

        nnsightc keys revoke ada --api-keys keys.sqlite
    """
    with _opened(api_keys) as keys:
        for id in keys.revoke(name):
            print(f"revoked {id}")


@contextmanager
def _opened(path: Path, new: bool = False) -> Iterator[Keys]:
    """The keys in a file, which is made where it may be new."""
    folder = path.absolute().parent
    if not new and not path.is_file():
        raise RefusalError(f"there is no file {path}", "nnsightc keys add NAME --api-keys FILE makes one")
    if not folder.is_dir():
        raise RefusalError(f"there is no folder {folder}", "make it, or give another path")
    try:
        keys = Keys(path)
        try:
            yield keys
        finally:
            keys.close()
    except (KeysError, TenantError) as error:
        raise RefusalError(error.reason, error.way_out) from None


def _row(record: KeyRecord) -> tuple[str, ...]:
    revoked = "" if record.revoked is None else _day(record.revoked)
    return record.id, record.tenant.name, f"{record.tenant.weight:g}", _day(record.created), revoked


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
