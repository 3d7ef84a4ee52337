"""The queue against a model of it in memory: random calls, ends of the service, full disks.

The model is plain dictionaries. It does not know the order in which jobs are begun, which is the subject of
`test_fair_shares.py`: it takes from a lease which jobs were begun, and checks that they may have been.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from chosen import PROGRAMS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from queues import unsynced

from nnsight_compiler.service import durable
from nnsight_compiler.service.database import Database
from nnsight_compiler.service.records import ConflictError, NoSpaceError, QueueFullError
from nnsight_compiler.service.store import STATES, Store
from nnsight_compiler.service.tenants import Limits, Tenant

MOST_OF_ALL = 7
MOST_OF_ONE = 4
STORED = 60
SMALL = 10
PAYLOADS = [b"", b"x", bytes(SMALL), bytes(2 * SMALL)]
LIMITS = Limits(max_queued=MOST_OF_ONE, stored_bytes=STORED)
TENANTS = [Tenant("ada", 1.0, LIMITS), Tenant("ben", 3.0, LIMITS)]
KEYS = [None, None, "k1", "k2"]
PRINTED = ("printed", {"text": ""})
PRINTED_BYTES = len('printed{"text":""}')
DAY = 86_400
WORK = ["lease"] * 4 + ["finish"] * 4 + ["give back"] * 2 + ["send"] * 2 + ["fail", "restart", "sweep"]
SELDOM = st.sampled_from([False, False, False, True])


@dataclass
class Job:
    """What the model knows of a job. `kept`: the bytes that it counts for once it has ended."""

    tenant: Tenant
    payload: bytes
    group: str
    key: str | None
    state: str = "queued"
    attempts: int = 0
    deaths: int = 0
    restarts: int = 0
    result: bytes | None = None
    ended: float | None = None
    kept: int = 0
    events: list[str] = field(default_factory=lambda: ["queued"])


@dataclass
class Held:
    """A fence that was given out. It is stale once the job has changed hands or ended."""

    id: str
    fence: int
    valid: bool = True


class Queue(RuleBasedStateMachine):
    """The queue beside its model; each rule does the same to both."""

    def __init__(self) -> None:
        super().__init__()
        self.open = ExitStack()
        self.open.enter_context(unsynced())
        self.folder = Path(self.open.enter_context(tempfile.TemporaryDirectory()))
        self.jobs: dict[str, Job] = {}
        self.held: list[Held] = []
        self.time = 1000.0
        self.store = self.opened()

    def opened(self) -> Store:
        return Store(self.folder / "state", max_queued=MOST_OF_ALL, small=SMALL, clock=lambda: self.time)

    def teardown(self) -> None:
        self.store.close()
        self.open.close()

    # What happens

    # Two rules alone, since any may be left out of an example: who asks, and what becomes of it.

    @rule(data=st.data(), asks=st.sampled_from(["submit", "submit", "submit", "cancel"]))
    def a_tenant_asks(self, data: st.DataObject, asks: str) -> None:
        self.time += 1
        tenant, full = data.draw(st.sampled_from(TENANTS)), data.draw(SELDOM)
        if asks == "submit":
            payload, key = data.draw(st.sampled_from(PAYLOADS)), data.draw(st.sampled_from(KEYS))
            self.submit(tenant, payload, data.draw(st.sampled_from("gh")), key, full, data.draw(st.floats(0.1, 10)))
        elif self.jobs:
            self.cancel(data.draw(st.sampled_from(list(self.jobs))), tenant)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), does=st.sampled_from(WORK))
    def a_service_works(self, data: st.DataObject, does: str) -> None:
        self.time += 1
        if does == "restart":
            self.restart(orderly=data.draw(SELDOM))
        elif does == "sweep":
            self.sweep(data.draw(st.sampled_from([0, 1, 3])))
        elif does == "lease" or not self.held:
            self.lease(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
        else:
            held, full = self.some_held(data), data.draw(SELDOM)
            match does:
                case "finish":
                    self.finish(held, data.draw(st.integers(1, 40)), full)
                case "fail":
                    self.fail(held, full)
                case "give back":
                    self.give_back(held, data.draw(st.booleans()))
                case _:
                    self.send(held)

    def submit(self, tenant: Tenant, payload: bytes, group: str, key: str | None, full: bool, share: float) -> None:
        mine = [(id, job) for id, job in self.jobs.items() if job.tenant == tenant]
        known = next(((id, job) for id, job in mine if key is not None and job.key == key), None)

        def call() -> tuple[str, bool]:
            settings = {"model": "m", "group": group, "cost": {"n": 1}, "share": share, "idempotency_key": key}
            done = self.store.submit(tenant, payload, **settings)  # type: ignore[arg-type]
            return done.id, done.created

        if known is not None and known[1].payload == payload:
            assert call() == (known[0], False)
        elif known is not None:
            with pytest.raises(ConflictError):
                call()
        elif self.waiting() >= MOST_OF_ALL or sum(job.state == "queued" for _, job in mine) >= MOST_OF_ONE:
            with pytest.raises(QueueFullError):
                call()
        elif full:
            self.without_space(call, writes_a_file=len(payload) > SMALL)
        elif len(payload) > SMALL and 0 < self.bytes_waiting(mine) > STORED - len(payload):
            with pytest.raises(QueueFullError, match="more than the"):
                call()
        else:
            id, created = call()
            assert created
            assert id not in self.jobs
            self.jobs[id] = Job(tenant, payload, group, key)

    @staticmethod
    def bytes_waiting(jobs: list[tuple[str, Job]]) -> int:
        return sum(len(job.payload) for _, job in jobs if job.state == "queued")

    def lease(self, free: int, most: int) -> None:
        leases = self.store.lease(free, most)
        assert min(free, self.waiting()) <= sum(len(lease.jobs) for lease in leases)
        assert len(leases) <= free
        for lease in leases:
            assert 1 <= len(lease.jobs) <= most
            assert len(lease.jobs) == 1 or not any(self.jobs[job.id].attempts for job in lease.jobs)
            for leased in lease.jobs:
                job = self.jobs[leased.id]
                assert (job.state, job.group, job.tenant) == ("queued", lease.group, leased.tenant)
                held = leased.payload
                assert (held if isinstance(held, bytes) else held.read_bytes()) == job.payload
                assert all((held.id, held.fence) != (leased.id, leased.fence) for held in self.held)
                job.state = "running"
                job.attempts += 1
                job.events.append("running")
                self.held.append(Held(leased.id, leased.fence))

    def finish(self, held: Held, size: int, full: bool) -> None:
        result = bytes([len(self.held) % 256]) * size
        if held.valid and full:
            self.without_space(lambda: self.store.finish(held.id, held.fence, result), writes_a_file=size > SMALL)
            return
        assert self.store.finish(held.id, held.fence, result) == held.valid
        if held.valid:
            self.jobs[held.id].result = result
            self.end(held.id, "completed")
            self.make_room(self.jobs[held.id].tenant)

    def fail(self, held: Held, full: bool) -> None:
        if held.valid and full:
            self.without_space(lambda: self.store.fail(held.id, held.fence, {"message": "no"}), writes_a_file=False)
            return
        assert self.store.fail(held.id, held.fence, {"message": "no"}) == held.valid
        if held.valid:
            self.end(held.id, "failed")

    def give_back(self, held: Held, died: bool) -> None:
        assert self.store.give_back(held.id, held.fence, died=died) == held.valid
        if held.valid:
            self.jobs[held.id].deaths += died
            self.again(held.id)

    def send(self, held: Held) -> None:
        assert self.store.append_events(held.id, held.fence, [PRINTED]) == held.valid
        if held.valid:
            self.jobs[held.id].events.append("printed")

    def cancel(self, id: str, tenant: Tenant) -> None:
        job = self.jobs[id]
        assert self.store.cancel(id, tenant) == (job.state if job.tenant == tenant else None)
        if job.tenant == tenant and job.ended is None:
            self.end(id, "cancelled")

    def restart(self, orderly: bool) -> None:
        """The service ends, with or without a farewell, and starts again."""
        if orderly:
            self.store.close()
        else:
            shutil.copytree(self.folder / "state", self.folder / "as it was")
            self.store.close()
            shutil.rmtree(self.folder / "state")
            (self.folder / "as it was").rename(self.folder / "state")
        self.store = self.opened()
        recovered = self.store.recover()
        running = [id for id, job in self.jobs.items() if job.state == "running"]
        for id in running:
            self.jobs[id].restarts += 1
            self.again(id)
        assert recovered.queued == sum(self.jobs[id].state == "queued" for id in running)
        assert (recovered.queued + recovered.failed, recovered.orphans) == (len(running), 0)

    def sweep(self, days: int) -> None:
        self.time += days * DAY
        self.store.sweep()
        for id, job in list(self.jobs.items()):
            if job.ended is not None and job.ended + DAY <= self.time:
                self.shed(job)
            if job.ended is not None and job.ended + 3 * DAY <= self.time:
                del self.jobs[id]
                self.held = [held for held in self.held if held.id != id]

    # What must hold

    @invariant()
    def jobs_are_as_they_should_be(self) -> None:
        for id, job in self.jobs.items():
            record = self.store.job(id, job.tenant)
            assert record is not None
            assert (record.status, record.attempts) == (job.state, job.attempts)
            assert all(self.store.job(id, other) is None for other in TENANTS if other != job.tenant)
            assert [event.name for event in self.store.events(id)] == job.events
            content = self.store.result(id, job.tenant)
            assert isinstance(content, Path) == (job.result is not None and len(job.result) > SMALL)
            assert (content.read_bytes() if isinstance(content, Path) else content) == job.result
        places = sorted(self.store.place(id) or 0 for id in self.jobs)
        assert places[len(places) - self.waiting() :] == list(range(1, self.waiting() + 1))
        states = [job.state for job in self.jobs.values()]
        assert self.store.counts() == {state: states.count(state) for state in STATES}

    @invariant()
    def files_are_those_of_jobs(self) -> None:
        payloads = [job.payload for job in self.jobs.values() if job.ended is None]
        results = [job.result for job in self.jobs.values() if job.result is not None]
        assert sorted(self.files().values()) == sorted(each for each in [*payloads, *results] if len(each) > SMALL)
        small = sorted(each for each in [*payloads, *results] if len(each) <= SMALL)
        assert sorted(row["data"] for row in self.store._database.rows("SELECT data FROM contents")) == small

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        for tenant in TENANTS:
            kept = [job.kept for job in self.jobs.values() if job.tenant == tenant]
            counted = self.store._database.number("SELECT stored FROM tenants WHERE name = ?", tenant.name)
            assert counted == sum(kept)

    # The model

    def waiting(self) -> int:
        return sum(job.state == "queued" for job in self.jobs.values())

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "state" / "files").iterdir()}

    def some_held(self, data: st.DataObject) -> Held:
        return data.draw(st.sampled_from(self.fences(data.draw(st.integers(0, 1)))))

    def fences(self, valid_first: int) -> list[Held]:
        """Those that count, where there are any, or those that do not."""
        valid = [held for held in self.held if held.valid]
        stale = [held for held in self.held if not held.valid]
        # Of the stale ones, the most likely to be taken for another is one of a job that runs again.
        again = [held for held in stale if self.jobs[held.id].state == "running"]
        return valid or stale if valid_first else again or stale or valid

    def end(self, id: str, state: str) -> None:
        job = self.jobs[id]
        job.state, job.ended = state, self.time
        job.kept = len(job.result or b"") + PRINTED_BYTES * job.events.count("printed")
        job.events.append("done")
        self.let_go(id)

    def again(self, id: str) -> None:
        job = self.jobs[id]
        if job.deaths >= 2 or job.restarts >= 5:
            self.end(id, "failed")
            return
        job.state = "queued"
        job.events.append("queued")
        self.let_go(id)

    def let_go(self, id: str) -> None:
        for held in self.held:
            held.valid = held.valid and held.id != id

    def shed(self, job: Job) -> None:
        job.state = "expired" if job.state == "completed" else job.state
        job.result, job.kept, job.events = None, 0, ["done"]

    def make_room(self, tenant: Tenant) -> None:
        """The newest result stays; the rest goes from the oldest on."""
        ended = sorted(
            (job for job in self.jobs.values() if job.tenant == tenant and job.kept), key=lambda job: job.ended or 0
        )
        newest = [job for job in ended if job.state == "completed"][-1]
        for job in ended:
            if job is not newest and sum(other.kept for other in ended) > STORED:
                self.shed(job)

    def without_space(self, call: Callable[[], object], writes_a_file: bool) -> None:
        """The call is refused and changes nothing, whether the disk is full for its file or for the database."""
        before = self.files()
        with pytest.MonkeyPatch.context() as patch:
            if writes_a_file:
                patch.setattr(durable, "write_all", no_space)
                with pytest.raises(NoSpaceError):
                    call()
        execute = Database.execute

        def full(database: Database, statement: str, *arguments: object) -> object:
            if statement == "COMMIT":
                raise NoSpaceError("no space for the database")
            return execute(database, statement, *arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "execute", full)
            with pytest.raises(NoSpaceError):
                call()
        assert self.files() == before


def no_space(file: object, data: bytes) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("seed", range(int(PROGRAMS or 3)))
def test_the_queue_is_its_model_in_long_runs(seed: int) -> None:
    """The same, without what hypothesis spends on small examples: a queue that is never empty."""
    random = Random(seed if PROGRAMS is None else None)
    queue = Queue()
    try:
        for _ in range(120):
            queue.time += 1
            full = random.random() < 0.2
            held = random.choice(queue.fences(random.randrange(3)) or [None])  # type: ignore[list-item]
            tenant = random.choice(TENANTS)
            match random.choice(["submit", "submit", "submit", "cancel", *WORK]):
                case "submit":
                    payload, key = random.choice(PAYLOADS), random.choice(KEYS)
                    queue.submit(tenant, payload, random.choice("gh"), key, full, random.uniform(0.1, 10))
                case "cancel" if queue.jobs and random.random() < 0.3:
                    queue.cancel(random.choice(list(queue.jobs)), tenant)
                case "lease":
                    queue.lease(random.randint(1, 3), random.randint(1, 3))
                case "restart":
                    queue.restart(orderly=full)
                case "sweep":
                    queue.sweep(random.choice([0, 0, 1, 3]))
                case "finish" if held:
                    queue.finish(held, random.randint(1, 40), full)
                case "fail" if held:
                    queue.fail(held, full)
                case "give back" if held:
                    queue.give_back(held, died=full)
                case "send" if held:
                    queue.send(held)
            queue.jobs_are_as_they_should_be()
            queue.files_are_those_of_jobs()
            queue.bytes_are_counted_and_bounded()
    finally:
        queue.teardown()


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=int(PROGRAMS or 6), stateful_step_count=40, deadline=None, derandomize=PROGRAMS is None
)
