"""Ends a process that works on a queue at a chosen moment, and checks what the disk then holds: run as a program.

    python store_crashes.py points FOLDER STEP     ends one at each write, sync, removal and commit of a scenario, or at
                                                   each so-manyth
    python store_crashes.py kills FOLDER NUMBER    kills so many at random moments, all on one queue

It imports the queue alone, without what the package imports for experiments, so that it starts at once. What the
process knows to be acknowledged it writes down itself, after the call returned.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

package = types.ModuleType("nnsight_compiler")
package.__path__ = [str(ROOT / "nnsight_compiler")]
sys.modules["nnsight_compiler"] = package

from queues import unsynced  # noqa: E402

from nnsight_compiler.service import durable  # noqa: E402
from nnsight_compiler.service.database import Database  # noqa: E402
from nnsight_compiler.service.store import Store  # noqa: E402
from nnsight_compiler.service.tenants import Limits, Tenant  # noqa: E402

ADA = Tenant("ada", limits=Limits(max_queued=100_000, stored_bytes=10**9))
SMALL = Tenant("small", limits=Limits(stored_bytes=50))


class Acknowledged:
    """What was acknowledged, in a file, which outlives the process that writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *words: str) -> None:
        with open(self.path, "ab", buffering=0) as file:
            file.write((" ".join(words) + "\n").encode())

    def read(self) -> list[list[str]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [line.split() for line in lines]


def payload_of(key: str) -> bytes:
    return f"payload of {key}".encode()


def result_of(id: str) -> bytes:
    return f"result of {id}".encode()


def read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def submit(store: Store, acknowledged: Acknowledged, key: str, tenant: Tenant = ADA, **more: object) -> str:
    data = payload_of(key)
    done = store.submit(tenant, data, model="m", group="g", cost={}, idempotency_key=key, **more)  # type: ignore[arg-type]
    acknowledged.write("queued", done.id, key, tenant.name)
    return done.id


def scenario(folder: Path, acknowledged: Acknowledged) -> None:
    """Every call that writes."""
    store = Store(folder)
    store.recover()
    store.put_blob(ADA, sha256(b"blob").hexdigest(), b"blob")
    acknowledged.write("blob")
    first = submit(store, acknowledged, "first", blobs=[sha256(b"blob").hexdigest()])
    second, third = (submit(store, acknowledged, key) for key in ("second", "third"))
    for name in ("small-1", "small-2"):
        submit(store, acknowledged, name, SMALL)
    store.cancel(third, ADA)
    acknowledged.write("cancelled", third)
    for lease in store.lease(9, 1):
        (job,) = lease.jobs
        store.append_events(job.id, job.fence, [("printed", {"text": "x"})])
        if job.id == second:
            store.fail(job.id, job.fence, {"kind": "no"})
            acknowledged.write("failed", job.id)
        elif job.id == first and job.fence == 1:
            store.give_back(job.id, job.fence)
        elif store.finish(job.id, job.fence, result_of(job.id)):
            acknowledged.write("completed", job.id)
    acknowledged.write("sweeping")
    store.sweep(time.time() + 10**9)
    store.close()


def check(store: Store, acknowledged: Acknowledged) -> None:
    """What was acknowledged is there, as often as it was acknowledged."""
    lines = acknowledged.read()
    if ["sweeping"] in lines:
        return
    assert ["blob"] not in lines or store.blob_path(ADA, sha256(b"blob").hexdigest()) is not None
    states: dict[str, str] = {}
    for state, id, *_ in (line for line in lines if line[0] in ("completed", "failed", "cancelled")):
        assert id not in states, f"{id} ended twice: {states[id]} and {state}"
        states[id] = state
    for _, id, key, name in (line for line in lines if line[0] == "queued"):
        tenant = ADA if name == ADA.name else SMALL
        record = store.job(id, tenant)
        assert record is not None, f"{id} ({key}) was acknowledged and is lost"
        if id in states and (states[id], record.status) != ("completed", "expired"):
            assert record.status == states[id], (key, record.status, states[id])
        assert record.error is None or record.error["kind"] != "damaged", f"the payload of {key} went before its job"
        names = [event.name for event in store.events(id)]
        assert names[0] == "queued" or record.status == "expired", names
        assert names.count("done") == (0 if record.status in ("queued", "running") else 1), (key, names)
        content = store.result(id, tenant)
        assert (content is not None) == (record.status == "completed")
        assert content is None or read(content) == result_of(id)


def finish_all(store: Store, acknowledged: Acknowledged) -> None:
    """Runs what waits still: its payloads are whole."""
    keys = {line[1]: line[2] for line in acknowledged.read() if line[0] == "queued"}
    while leases := store.lease(1, 1):
        ((job,),) = (lease.jobs for lease in leases)
        if job.id in keys:
            assert read(job.payload) == payload_of(keys[job.id])
        assert store.finish(job.id, job.fence, result_of(job.id))
        acknowledged.write("completed", job.id)


def begun(work: Callable[[], None]) -> int:
    """A new process that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"in the process: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """By which signal a process ended; 0 where it did all of its work."""
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "the process failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def end_at(point: int) -> None:
    """Kills this process at the so-manyth point at which what is on the disk changes."""
    passed = 0

    def at_points(function, changes=lambda *arguments: True):  # type: ignore[no-untyped-def]
        def wrapped(*arguments, **named):  # type: ignore[no-untyped-def]
            nonlocal passed
            if changes(*arguments):
                passed += 1
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **named)
            if changes(*arguments):
                passed += 1
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    durable.write_all = at_points(durable.write_all)
    durable.sync = at_points(durable.sync)
    Path.unlink = at_points(Path.unlink)  # type: ignore[method-assign]
    Database.execute = at_points(  # type: ignore[method-assign]
        Database.execute, lambda database, statement, *arguments: statement.split()[0] not in ("SELECT", "PRAGMA")
    )


def points(folder: Path, step: int) -> int:
    """Ends the scenario at each point in turn, on a new queue each time; returns the last point."""
    for point in itertools.count(1, step):
        state = folder / f"state-{point}"
        acknowledged = Acknowledged(folder / f"acknowledged-{point}")

        def work(state: Path = state, acknowledged: Acknowledged = acknowledged, point: int = point) -> None:
            end_at(point)
            scenario(state, acknowledged)

        if not ended(begun(work)):
            return point - step
        store = Store(state)
        store.recover()
        check(store, acknowledged)
        finish_all(store, acknowledged)
        check(store, acknowledged)
        known = {line[2]: line[1] for line in acknowledged.read() if line[0] == "queued"}
        if ["sweeping"] not in acknowledged.read() and "first" in known:
            assert submit(store, acknowledged, "first") == known["first"], "a key stands for one job"
        kept = len(list((state / "files").iterdir()))
        store.close()
        store = Store(state)
        assert store.recover().orphans == 0, "a queue that was closed leaves nothing behind"
        assert len(list((state / "files").iterdir())) == kept
        store.close()
    raise AssertionError("unreachable")


def kills(folder: Path, number: int) -> int:
    """Kills a process that submits and finishes jobs, so many times at random moments; returns how many jobs ended."""
    chance = random.Random(0)
    state, acknowledged = folder / "state", Acknowledged(folder / "acknowledged")
    for round in range(number):

        def work(round: int = round) -> None:
            store = Store(state)
            store.recover()
            for index in range(10**6):
                for half in ("a", "b"):
                    submit(store, acknowledged, f"{round}-{index}-{half}")
                for lease in store.lease(1, 2):
                    for job in lease.jobs:
                        store.append_events(job.id, job.fence, [("printed", {"text": "x"})])
                        if index % 2 and store.finish(job.id, job.fence, result_of(job.id)):
                            acknowledged.write("completed", job.id)

        before = len(acknowledged.read())
        child = begun(work)
        while len(acknowledged.read()) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == signal.SIGKILL
        store = Store(state)
        store.recover()
        check(store, acknowledged)
        store.close()
    store = Store(state)
    finish_all(store, acknowledged)
    check(store, acknowledged)
    queued = [line[1] for line in acknowledged.read() if line[0] == "queued"]
    for id in queued:
        record = store.job(id, ADA)
        # A job is given up when five services ended while it ran.
        assert record is not None
        assert (record.status, record.attempts) == ("failed", 5) or record.status == "completed", record
    counts = store.counts()
    store.close()
    assert counts["completed"] + counts["failed"] == sum(counts.values()) >= len(queued), counts
    return counts["completed"]


if __name__ == "__main__":
    what, folder, number = sys.argv[1:]
    with unsynced():  # what a process wrote outlives it, synced or not
        print({"points": points, "kills": kills}[what](Path(folder), int(number)))
