"""Keys of tenants: what is kept of them, whom they stand for, and `nnsightc keys`."""

from __future__ import annotations

import json
import re
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nnsight_compiler.cli import main
from nnsight_compiler.cli.keys import bytes_of
from nnsight_compiler.service.keys import Keys, KeysError
from nnsight_compiler.service.tenants import Limits, Tenant, TenantError

ADA = Tenant("ada", weight=2.0, limits=Limits(max_queued=7))


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    keys = Keys(tmp_path / "keys.sqlite")
    yield keys
    keys.close()


def test_a_key_stands_for_its_tenant(keys: Keys) -> None:
    key = keys.add(ADA)
    assert keys.authenticate(key) == ADA
    other = Keys(keys.path)
    assert other.authenticate(key) == ADA
    other.close()


def test_no_other_key_is_taken(keys: Keys) -> None:
    key, second = keys.add(ADA), keys.add(Tenant("ben"))
    prefix, id, secret = key.split("_", 2)
    mixed = f"{prefix}_{id}_{second.split('_', 2)[2]}"
    changed = [key[:place] + ("A" if key[place] != "A" else "B") + key[place + 1 :] for place in range(len(key))]
    unknown = f"{prefix}_{'0' * 12}_{secret}"
    for wrong in ["", " ", key + "x", key[:-1], key + "\n", "é" * 60, mixed, unknown, "x" * 10**6, *changed]:
        assert keys.authenticate(wrong) is None, wrong
    assert keys.authenticate(second) == Tenant("ben")


def test_nothing_secret_is_in_the_file(keys: Keys) -> None:
    key = keys.add(ADA)
    secret = key.split("_", 2)[2]
    keys.close()
    for path in keys.path.parent.iterdir():
        assert secret.encode() not in path.read_bytes()
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600


def test_each_key_is_another_one(keys: Keys) -> None:
    made = {keys.add(ADA) for _ in range(20)}
    assert len(made) == 20
    assert len({record.id for record in keys.records()}) == 20
    assert all(re.fullmatch(r"nnc_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", key) for key in made)


def test_a_revoked_key_is_taken_no_more_by_anyone_who_has_the_file_open(keys: Keys) -> None:
    first, second = keys.add(ADA), keys.add(ADA)
    service = Keys(keys.path)
    id = first.split("_")[1]
    assert keys.revoke(id) == [id]
    assert service.authenticate(first) is None
    assert service.authenticate(second) == ADA
    with pytest.raises(KeysError, match=f"no valid key has the id or the tenant '{id}'; `nnsightc keys list` shows"):
        keys.revoke(id)
    third = keys.add(ADA)
    assert keys.revoke("ada") == sorted(key.split("_")[1] for key in (second, third))
    assert service.authenticate(second) is None
    assert [record.revoked is None for record in keys.records()] == [False] * 3
    service.close()


def test_a_new_weight_counts_for_all_keys_of_the_tenant(keys: Keys) -> None:
    first = keys.add(ADA)
    keys.add(replace(ADA, weight=5.0))
    assert keys.authenticate(first) == replace(ADA, weight=5.0)
    assert keys.tenant("ada") == replace(ADA, weight=5.0)
    assert keys.tenant("ben") is None


@pytest.mark.parametrize("name", ["", "-x", "a b", "../etc", "é", "a" * 65, "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(TenantError, match="is no name of a tenant; use up to 64 letters, digits"):
        Tenant(name)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), 1001.0])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(TenantError, match=r"the weight of ada is .*; a weight is a number from 0.001 to 1000"):
        Tenant("ada", weight)


def test_a_limit_that_allows_nothing_is_refused() -> None:
    with pytest.raises(TenantError, match="forwards is 0; a limit is a number above 0"):
        Limits(forwards=0)


def test_a_file_of_something_else_or_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    with pytest.raises(KeysError, match=r"recipes.sqlite is a database of something else; give another path"):
        Keys(path)
    connection.execute("DROP TABLE recipes")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(KeysError, match=r"is of a newer release \(its schema is 9, this release reads 1\); use that"):
        Keys(path)
    path.write_text("no database" * 1000)
    with pytest.raises(KeysError, match="is no file of keys: file is not a database; give the path of one"):
        Keys(path)


# The command line


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def nnsightc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nnsightc", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        code = exit_.value.code or 0
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return call


def test_keys_are_made_shown_and_revoked(nnsightc: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "keys.sqlite"
    added = nnsightc("keys", "add", "ada", "--api-keys", file, "--weight", 3, "--stored-bytes", "20G", "--wall", "1.5")
    assert added.code == 0
    assert added.err == "A key of ada, shown this once. It goes to `nnsightc login`, or into NNSIGHT_API_KEY.\n"
    key = added.out.removesuffix("\n")
    expected = Tenant("ada", 3.0, Limits(stored_bytes=20 * 2**30, wall_seconds=1.5))
    keys = Keys(file)
    assert keys.authenticate(key) == expected
    second = nnsightc("keys", "add", "ada", "--api-keys", file, "--max-queued", 9, "--memory", "512M").out.strip()
    changed = replace(expected, limits=replace(expected.limits, max_queued=9, memory_bytes=512 * 2**20))
    assert keys.authenticate(key) == keys.authenticate(second) == changed

    id = key.split("_")[1]
    assert nnsightc("keys", "revoke", id, "--api-keys", file).out == f"revoked {id}\n"
    assert keys.authenticate(key) is None
    keys.close()

    listed = nnsightc("keys", "list", "--api-keys", file)
    heading, *lines = listed.out.splitlines()
    assert heading.split() == ["id", "tenant", "weight", "made", "revoked"]
    assert [line.split()[:3] for line in lines] == [[made.split("_")[1], "ada", "3"] for made in (key, second)]
    assert [len(line.split()) for line in lines] == [7, 5]
    data = json.loads(nnsightc("keys", "list", "--api-keys", file, "--json").out)
    assert [each["id"] for each in data] == [line.split()[0] for line in lines]
    assert data[0]["tenant"]["limits"]["max_queued"] == 9
    assert all(made.split("_", 2)[2] not in listed.out + json.dumps(data) for made in (key, second))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["add", "a b"], "error: 'a b' is no name of a tenant\n  way out: use up to 64 letters, digits, '_', '.' and"),
        (["add", "a", "--weight", "0"], "error: the weight of a is 0.0\n  way out: a weight is a number from 0.001 to"),
        (["add", "a", "--wall", "-1"], "error: wall_seconds is -1.0\n  way out: a limit is a number above 0"),
        (["add", "a", "--memory", "3x"], "'3x' is no number of bytes; write 4096, 512K"),
        (
            ["revoke", "a"],
            "error: there is no file {file}\n  way out: nnsightc keys add NAME --api-keys FILE makes one",
        ),
        (["list"], "error: there is no file {file}\n  way out: nnsightc keys add NAME --api-keys FILE makes one"),
    ],
)
def test_what_cannot_be_is_refused(
    nnsightc: Callable[..., Outcome], tmp_path: Path, arguments: list[str], text: str
) -> None:
    file = tmp_path / "keys.sqlite"
    outcome = nnsightc("keys", *arguments, "--api-keys", file)
    assert outcome.code == 2
    assert outcome.out == ""
    assert text.format(file=file) in outcome.err
    if arguments[0] == "add":
        return
    nnsightc("keys", "add", "ben", "--api-keys", file)
    outcome = nnsightc("keys", "revoke", "a", "--api-keys", file)
    assert outcome.err.startswith("error: no valid key has the id or the tenant 'a'\n  way out: `nnsightc keys list`")


def test_a_file_in_no_folder_is_refused(nnsightc: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = nnsightc("keys", "add", "a", "--api-keys", tmp_path / "none" / "keys.sqlite")
    assert outcome.code == 2
    assert outcome.err == f"error: there is no folder {tmp_path / 'none'}\n  way out: make it, or give another path\n"


@pytest.mark.parametrize("command", ["add", "list", "revoke"])
def test_help_shows_an_example_on_a_line_of_its_own(nnsightc: Callable[..., Outcome], command: str) -> None:
    shown = nnsightc("keys", command, "--help").out
    assert re.search(rf"^\W*nnsightc keys {command} [^\n]*--api-keys keys\.sqlite\W*$", shown, re.MULTILINE), shown


def test_numbers_of_bytes() -> None:
    assert [bytes_of(text) for text in ("0", "17", "2K", "3M", "4G", "1T")] == [
        0,
        17,
        2 * 2**10,
        3 * 2**20,
        4 * 2**30,
        2**40,
    ]
