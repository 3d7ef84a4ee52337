"""A process that works on a queue ends without a farewell; what it was told is there, and no job ends twice.

`tests/support/store_crashes.py` does it, in processes of its own: at writes, syncs, removals and commits, and at random
moments.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from chosen import KILLS

PROGRAM = Path(__file__).parent.parent / "support" / "store_crashes.py"


def run(*arguments: object) -> int:
    done = subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return int(done.stdout)


def test_an_end_at_any_point_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert run("points", tmp_path, 1 if KILLS else 13) >= 100


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert run("kills", tmp_path, KILLS or 20) >= 20


# A disk that is full


FULL_DISK = """
import resource, sys
sys.path.insert(0, {support!r})
import store_crashes
from store_crashes import ADA, Path, Store, payload_of, read
from nnsight_compiler.service.records import NoSpaceError

folder = Path({folder!r})
store = Store(folder)
keys = []

def submit():
    key = f"job-{{len(keys)}}"
    done = store.submit(ADA, payload_of(key), model="m", group="g", cost={{}}, idempotency_key=key)
    keys.append((key, done.id))

for _ in range(5):
    submit()
size = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
refusals = 0
for _ in range(30):
    try:
        submit()
    except NoSpaceError as error:
        refusals += 1
        assert "no space for" in str(error), error
assert refusals, "no write was refused"
assert store.counts()["queued"] == len(keys) == store._database.number("SELECT count(*) FROM contents")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
submit()
store.close()
store = Store(folder)
assert store.recover().orphans == 0
for key, id in keys:
    assert store.job(id, ADA).status == "queued"
    again = store.submit(ADA, payload_of(key), model="m", group="g", cost={{}}, idempotency_key=key)
    assert (again.id, again.created) == (id, False)
leased = [job for lease in store.lease(1, 100) for job in lease.jobs]
assert [read(job.payload) for job in leased] == [payload_of(key) for key, _ in keys]
print(refusals)
"""


def test_nothing_is_acknowledged_where_the_database_may_not_grow(tmp_path: Path) -> None:
    program = FULL_DISK.format(support=str(PROGRAM.parent), folder=str(tmp_path / "state"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
