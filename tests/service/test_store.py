"""The durable queue: submitting, leasing, fences, events, results, uploads, and what is refused."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from nnsight_compiler.service import durable, event_log, retention
from nnsight_compiler.service.records import (
    ConflictError,
    Event,
    MissingBlobsError,
    QueueFullError,
    Recovered,
    StoredBytesError,
    StoreError,
    Submitted,
    Swept,
    WrongHashError,
)
from nnsight_compiler.service.retention import Periods
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.tenants import Limits, Tenant

ADA, BEN = Tenant("ada"), Tenant("ben")


@dataclass
class Queue:
    """A store under test, its folder, and its clock, which stands still until it is set."""

    folder: Path
    now: float = 1000.0
    stores: list[Store] = field(default_factory=list)

    def open(self, **settings: object) -> Store:
        store = Store(self.folder, clock=lambda: self.now, **{"small": -1, **settings})  # type: ignore[arg-type]
        self.stores.append(store)
        return store

    def close(self) -> None:
        while self.stores:
            self.stores.pop().close()

    def reopen(self, **settings: object) -> Store:
        """As after the end of the service: nothing is kept but what is on the disk."""
        self.close()
        store = self.open(**settings)
        store.recover()
        return store

    def files(self) -> list[bytes]:
        """The contents of all files that are kept, in order of size."""
        assert list((self.folder / "incoming").iterdir()) == []
        return sorted(
            (path.read_bytes() for path in (self.folder / "files").iterdir()),
            key=lambda content: (len(content), content),
        )

    def file(self, content: bytes) -> Path:
        (path,) = (path for path in (self.folder / "files").iterdir() if path.read_bytes() == content)
        return path


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path / "state")
    yield queue
    queue.close()


@pytest.fixture
def store(queue: Queue) -> Store:
    return queue.open()


Submit = Callable[..., Submitted]


def submit(store: Store, tenant: Tenant = ADA, payload: bytes | Path = b"a job", **changes: object) -> Submitted:
    settings: dict[str, object] = {"model": "tiny", "group": "g", "cost": {"forwards": 1}, **changes}
    return store.submit(tenant, payload, **settings)  # type: ignore[arg-type]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(store: Store, id: str) -> list[str]:
    return [event.name for event in store.events(id)]


def test_a_job_from_submission_to_result(queue: Queue, store: Store) -> None:
    submitted = submit(store)
    assert submitted.created
    assert submitted.place == 1
    queue.now = 1002.5
    ((leased,),) = (lease.jobs for lease in store.lease(free=1, max_batch=4))
    assert leased.id == submitted.id
    assert leased.payload.read_bytes() == b"a job"
    assert (leased.tenant, leased.cost, leased.fence, leased.waited) == (ADA, {"forwards": 1}, 1, 2.5)
    assert store.append_events(leased.id, leased.fence, [("printed", {"text": "hello\n"})])
    queue.now = 1003.0
    assert store.finish(leased.id, leased.fence, b"the result")

    record = store.job(leased.id, ADA)
    assert record is not None
    assert (record.status, record.created, record.started, record.ended) == ("completed", 1000.0, 1002.5, 1003.0)
    assert record.result is not None
    assert record.result.as_data() == {"bytes": 10, "sha256": sha(b"the result"), "expires": 1003.0 + 86_400}
    path = store.result(leased.id, ADA)
    assert path is not None
    assert path.read_bytes() == b"the result"
    assert queue.files() == [b"the result"]
    assert store.events(leased.id) == [
        Event(1, "queued", {"place": 1}),
        Event(2, "running", {"attempt": 1}),
        Event(3, "printed", {"text": "hello\n"}),
        Event(4, "done", {"status": "completed", "error": None, "result": record.result.as_data()}),
    ]
    assert store.events(leased.id, after=3) == store.events(leased.id)[3:]
    assert store.events(leased.id, after=1, most=1) == store.events(leased.id)[1:2]


def test_what_was_acknowledged_is_there_after_the_end_of_the_service(queue: Queue, store: Store) -> None:
    ids = [submit(store, payload=b"job %d" % number).id for number in range(3)]
    store = queue.reopen()
    (lease,) = store.lease(1, max_batch=3)
    assert [job.id for job in lease.jobs] == ids
    assert [job.payload.read_bytes() for job in lease.jobs] == [b"job 0", b"job 1", b"job 2"]


def test_a_file_that_is_given_is_moved(queue: Queue, store: Store, tmp_path: Path) -> None:
    given = tmp_path / "upload"
    given.write_bytes(b"from a file")
    submit(store, payload=given)
    assert not given.exists()
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert job.payload.read_bytes() == b"from a file"
    result = tmp_path / "result"
    result.write_bytes(b"R")
    assert store.finish(job.id, job.fence, result)
    assert not result.exists()
    assert store.result(job.id, ADA).read_bytes() == b"R"  # type: ignore[union-attr]
    assert queue.files() == [b"R"]


def test_what_is_small_stands_in_the_database(queue: Queue) -> None:
    store = queue.open(small=3)
    ids = [submit(store, payload=payload).id for payload in (b"", b"abc", b"abcd")]
    assert queue.files() == [b"abcd"]
    store = queue.reopen(small=3)
    (lease,) = store.lease(1, 3)
    assert [each.payload for each in lease.jobs[:2]] == [b"", b"abc"]
    assert isinstance(lease.jobs[2].payload, Path)
    for job, result in zip(lease.jobs, (b"RRR", b"RRRR", b"R"), strict=True):
        assert store.finish(job.id, job.fence, result)
    assert queue.files() == [b"RRRR"]
    assert store._database.number("SELECT count(*) FROM contents") == 2
    assert (store.result(ids[0], ADA), store.result(ids[2], ADA)) == (b"RRR", b"R")
    assert store.result(ids[0], BEN) is None
    store.put_blob(ADA, sha(b"x"), b"x")
    assert queue.files() == [b"x", b"RRRR"]
    queue.now += 4 * 86_400
    store.sweep()
    assert queue.files() == []
    assert store._database.number("SELECT count(*) FROM contents") == 0


def test_a_small_payload_that_was_damaged_fails_its_job(queue: Queue) -> None:
    store = queue.open(small=100)
    id = submit(store).id
    store._database.execute("UPDATE contents SET data = ?", b"a jab")
    (lease,) = store.lease(1, 1)
    assert (lease.jobs, lease.damaged) == ((), (id,))
    record = store.job(id, ADA)
    assert record is not None
    assert record.error is not None
    assert record.error["message"] == "the job's file was damaged on the service's disk; send it again"


def test_a_disk_that_failed_once_is_not_believed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    submit(store)
    store.sync()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync", fails)
        with pytest.raises(StoreError, match=r"queue\.sqlite cannot be synced: Input/output error; start the service"):
            store.sync()
    with pytest.raises(StoreError, match=r"failed before \(Input/output error\); start the service anew"):
        store.sync()


def test_a_file_goes_only_after_what_named_it_is_gone_for_good(
    queue: Queue, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(store, payload=b"large")
    (job,) = (job for lease in store.lease(1, 1) for job in lease.jobs)
    held: list[list[bytes]] = []
    sync = store.sync

    def synced() -> None:
        held.append(queue.files())
        sync()

    monkeypatch.setattr(store, "sync", synced)
    store.fail(job.id, job.fence, {"kind": "no"})
    assert held == [[b"large"]]
    assert queue.files() == []


def test_a_file_may_be_staged_in_another_thread(store: Store) -> None:
    staged = []
    thread = threading.Thread(target=lambda: staged.append(store.stage(b"large")))
    thread.start()
    thread.join()
    submit(store, payload=staged[0])
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert job.payload.read_bytes() == b"large"


def test_jobs_of_others_are_not_there(store: Store) -> None:
    id = submit(store, ADA).id
    assert store.job(id, BEN) is None
    assert store.cancel(id, BEN) is None
    assert store.result(id, BEN) is None
    assert store.place("nothing") is None
    assert store.events("nothing") == []
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    store.finish(id, job.fence, b"R")
    assert store.result(id, BEN) is None


# Fences


def test_a_stale_fence_changes_nothing(queue: Queue, store: Store, tmp_path: Path) -> None:
    id = submit(store).id
    ((first,),) = (lease.jobs for lease in store.lease(1, 1))
    assert store.give_back(id, first.fence)
    ((second,),) = (lease.jobs for lease in store.lease(1, 1))
    assert second.fence != first.fence
    late = tmp_path / "late"
    late.write_bytes(b"of the first")
    before = store.events(id)
    assert not store.finish(id, first.fence, late)
    assert not store.fail(id, first.fence, {"message": "late"})
    assert not store.give_back(id, first.fence)
    assert not store.append_events(id, first.fence, [("printed", {"text": "late"})])
    assert store.events(id) == before
    assert store.job(id, ADA).status == "running"  # type: ignore[union-attr]
    assert store.finish(id, second.fence, b"of the second")
    assert not store.finish(id, second.fence, b"again")
    assert store.result(id, ADA).read_bytes() == b"of the second"  # type: ignore[union-attr]
    assert names(store, id).count("done") == 1
    assert not late.exists()


def test_a_second_worker_that_dies_on_a_job_is_the_last(store: Store) -> None:
    id = submit(store).id
    for _ in range(2):
        ((job,),) = (lease.jobs for lease in store.lease(1, 1))
        assert store.give_back(id, job.fence)
    record = store.job(id, ADA)
    assert record is not None
    assert (record.status, record.attempts) == ("failed", 2)
    assert record.error is not None
    assert record.error["kind"] == "interrupted"
    assert record.error["message"] == "2 workers died while the job ran; it is not tried again"
    assert names(store, id) == ["queued", "running", "queued", "running", "done"]
    assert store.lease(1, 1) == []


def test_a_service_that_stops_counts_against_no_job(store: Store) -> None:
    id = submit(store).id
    for _ in range(10):
        ((job,),) = (lease.jobs for lease in store.lease(1, 1))
        assert store.give_back(id, job.fence, died=False)
    assert store.job(id, ADA).status == "queued"  # type: ignore[union-attr]


def test_what_ran_when_the_service_ended_runs_again_but_not_for_ever(queue: Queue, store: Store) -> None:
    id = submit(store).id
    for restart in range(1, 6):
        ((job,),) = (lease.jobs for lease in store.lease(1, 1))
        assert job.fence == restart
        queue.close()
        store = queue.open()
        assert store.recover() == (Recovered(1, 0, 0) if restart < 5 else Recovered(0, 1, 1))
    record = store.job(id, ADA)
    assert record is not None
    assert record.error is not None
    assert record.error["message"] == "the service ended 5 times while the job ran; it is not tried again"


def test_what_was_begun_before_runs_alone(store: Store) -> None:
    ids = [submit(store).id for _ in range(4)]
    (lease,) = store.lease(1, max_batch=3)
    assert [job.id for job in lease.jobs] == ids[:3]
    for job in lease.jobs:
        store.give_back(job.id, job.fence)
    alone = store.lease(9, max_batch=4)
    assert [[job.id for job in lease.jobs] for lease in alone] == [[id] for id in ids]


# Batches


def test_a_lease_holds_jobs_of_one_group_and_model_of_any_tenants(store: Store) -> None:
    first = submit(store, ADA, group="g").id
    submit(store, ADA, group="other")
    submit(store, BEN, group="g", model="large")
    second = submit(store, BEN, group="g").id
    third = submit(store, ADA, group="g").id
    (lease,) = store.lease(1, max_batch=8)
    assert (lease.model, lease.group) == ("tiny", "g")
    assert [job.id for job in lease.jobs] == [first, second, third]
    assert {(lease.model, lease.group) for lease in store.lease(9, 8)} == {("tiny", "other"), ("large", "g")}


def test_a_lease_holds_no_more_than_its_most(store: Store) -> None:
    for _ in range(5):
        submit(store)
    assert [len(lease.jobs) for lease in store.lease(2, max_batch=2)] == [2, 2]
    assert [len(lease.jobs) for lease in store.lease(2, max_batch=1)] == [1]
    assert store.lease(2, 1) == []


# Cancelling


def test_a_job_that_waits_is_cancelled(queue: Queue, store: Store) -> None:
    id = submit(store).id
    assert store.cancel(id, ADA) == "queued"
    assert store.job(id, ADA).status == "cancelled"  # type: ignore[union-attr]
    assert store.lease(1, 1) == []
    assert store.cancel(id, ADA) == "cancelled"
    assert names(store, id) == ["queued", "done"]
    assert queue.files() == []


def test_a_job_that_runs_is_cancelled_whatever_its_worker_brings(store: Store) -> None:
    id = submit(store).id
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert store.cancel(id, ADA) == "running"
    assert not store.finish(id, job.fence, b"too late")
    assert store.job(id, ADA).status == "cancelled"  # type: ignore[union-attr]
    assert store.result(id, ADA) is None


# Idempotency keys


def test_a_job_is_queued_once_by_its_key(queue: Queue, store: Store) -> None:
    first = submit(store, idempotency_key="k-1")
    assert submit(store, idempotency_key="k-1") == Submitted(first.id, False, 1)
    store = queue.reopen()
    assert submit(store, idempotency_key="k-1") == Submitted(first.id, False, 1)
    assert store.counts()["queued"] == 1
    assert submit(store, BEN, idempotency_key="k-1").created
    with pytest.raises(ConflictError, match="the idempotency key k-1 stands for another job; take a new key"):
        submit(store, payload=b"another job", idempotency_key="k-1")
    assert queue.files() == [b"a job", b"a job"]


def test_a_key_that_ended_is_known_still(store: Store) -> None:
    first = submit(store, idempotency_key="k")
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    store.finish(first.id, job.fence, b"R")
    assert submit(store, idempotency_key="k") == Submitted(first.id, False, 0)


@pytest.mark.parametrize("key", ["", "a" * 129, "a b", "é", "a\n"])
def test_a_key_of_another_form_is_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="an idempotency key is 1 to 128 letters"):
        submit(store, idempotency_key=key)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(store: Store, share: float) -> None:
    with pytest.raises(StoreError, match="the share of a job is"):
        submit(store, share=share)


# Bounds


def test_the_jobs_of_a_tenant_that_wait_fit_what_it_may_store(queue: Queue, store: Store) -> None:
    small = Tenant("small", limits=Limits(stored_bytes=10))
    first = submit(store, small, b"x" * 11)
    with pytest.raises(QueueFullError, match="would be more than the 10 bytes that it may store; try again when some"):
        submit(store, small, b"y")
    assert queue.files() == [b"x" * 11]
    submit(store, BEN, b"z" * 100)
    store.lease(free=1, max_batch=1)
    assert store.job(first.id, small).status == "running"  # type: ignore[union-attr]
    submit(store, small, b"y" * 5)
    submit(store, small, b"z" * 5)
    with pytest.raises(QueueFullError):
        submit(store, small, b"w")


def test_the_queue_is_bounded_for_each_tenant_and_for_all(queue: Queue) -> None:
    store = queue.open(max_queued=3)
    small = replace(ADA, limits=Limits(max_queued=2))
    submit(store, small, idempotency_key="k")
    submit(store, small)
    with pytest.raises(QueueFullError, match="2 jobs of ada wait, as many as may; try again when some have run"):
        submit(store, small)
    assert not submit(store, small, idempotency_key="k").created
    submit(store, BEN)
    with pytest.raises(QueueFullError, match="3 jobs wait, as many as may; try again later") as refused:
        submit(store, BEN)
    assert refused.value.retry_after == 5
    store.lease(1, 1)
    assert submit(store, BEN).created
    assert len(queue.files()) == 4


def test_when_to_try_again_follows_how_fast_it_goes(queue: Queue) -> None:
    store = queue.open(max_queued=40)
    for _ in range(40):
        submit(store)
    for _ in range(10):
        queue.now += 2.0
        store.lease(1, 1)
        submit(store)
    queue.now += 2.0
    with pytest.raises(QueueFullError) as refused:
        submit(store)
    assert refused.value.retry_after == 8  # a tenth of 40, at 2 seconds each


def test_hours_in_which_nothing_waited_do_not_say_how_fast_it_goes(queue: Queue) -> None:
    store = queue.open(max_queued=40)
    for _ in range(20):
        queue.now += 600.0
        submit(store)
        store.lease(1, 1)
    queue.now += 36_000.0
    for _ in range(40):
        submit(store)
    with pytest.raises(QueueFullError) as refused:
        submit(store)
    assert refused.value.retry_after == 5


def test_events_of_a_flood_are_cut_with_one_that_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    id = submit(store).id
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    flood = [("printed", {"text": "x" * 1000})] * 3000
    assert store.append_events(id, job.fence, flood)
    assert store.append_events(id, job.fence, flood)
    store.finish(id, job.fence, b"R")
    events = store.events(id, most=10_000)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.name for event in events if event.name != "printed"] == ["queued", "running", "truncated", "done"]
    assert 1_000_000 < sum(len(event.data["text"]) for event in events if event.name == "printed") <= 2**20  # type: ignore[arg-type]
    truncated = next(event for event in events if event.name == "truncated")
    assert truncated.data == {"events": event_log.MAX_EVENTS, "bytes": event_log.MAX_BYTES}


def test_events_may_hold_any_text(store: Store) -> None:
    id = submit(store).id
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    text = "\x00 \ud800 \U0001f600 \n"
    store.append_events(id, job.fence, [("printed", {"text": text})])
    assert store.events(id)[-1].data == {"text": text}


# What is kept, and for how long


def complete(store: Store, tenant: Tenant, result: bytes) -> str:
    id = submit(store, tenant).id
    (job,) = (job for lease in store.lease(1, 1) for job in lease.jobs)
    assert job.id == id
    assert store.finish(id, job.fence, result)
    return id


def test_the_oldest_results_of_a_tenant_expire_first_and_never_the_newest(queue: Queue, store: Store) -> None:
    small = replace(ADA, limits=Limits(stored_bytes=100))
    complete(store, BEN, bytes(90))
    ids = []
    for size in (40, 60, 40, 500):
        queue.now += 1
        ids.append(complete(store, small, bytes(size)))
        states = [store.job(id, small).status for id in ids]  # type: ignore[union-attr]
        expected = {1: ["completed"], 2: ["completed"] * 2, 3: ["expired", "completed", "completed"]}
        assert states == expected.get(len(ids), ["expired", "expired", "expired", "completed"])
    assert queue.files() == [bytes(90), bytes(500)]
    assert store.result(ids[0], small) is None
    assert names(store, ids[0]) == ["done"]


def test_a_sweep_takes_away_what_is_over(queue: Queue) -> None:
    store = queue.open(periods=Periods(results=100, records=300, blobs=200))
    id = complete(store, ADA, b"R")
    failed = submit(store, idempotency_key="k").id
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    store.fail(failed, job.fence, {"kind": "ValueError", "message": "no"})
    store.put_blob(ADA, sha(b"blob"), b"blob")
    assert store.sweep() == Swept(0, 0, 0)
    queue.now = 1100.0
    assert store.sweep() == Swept(2, 0, 0)
    assert store.job(id, ADA).status == "expired"  # type: ignore[union-attr]
    assert store.job(failed, ADA).status == "failed"  # type: ignore[union-attr]
    assert queue.files() == [b"blob"]
    queue.now = 1200.0
    assert store.sweep() == Swept(0, 0, 1)
    assert queue.files() == []
    queue.now = 1300.0
    assert store.sweep() == Swept(0, 2, 0)
    assert store.job(id, ADA) is None
    assert store.events(id) == []
    assert submit(store, idempotency_key="k").created


def test_records_are_bounded_in_number(queue: Queue, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_RECORDS", 3)
    waiting = submit(store, BEN, payload=b"waiting", group="alone").id
    submit(store, BEN, payload=b"blocks", group="alone")
    (first, second) = (job for lease in store.lease(1, 2) for job in lease.jobs)
    store.give_back(first.id, first.fence)
    store.finish(second.id, second.fence, b"R")
    ids = []
    for _ in range(5):
        store.cancel(submit(store, ADA).id, ADA)
        ids.append(submit(store, ADA).id)
        store.cancel(ids[-1], ADA)
    assert sum(store.counts().values()) == 4
    assert store.job(waiting, BEN).status == "queued"  # type: ignore[union-attr]
    assert store.job(ids[-1], ADA) is not None
    assert queue.files() == [b"waiting"]


def test_a_sweep_leaves_the_rest_to_the_next(queue: Queue, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "AT_ONCE", 2)
    for _ in range(3):
        complete(store, ADA, b"R")
    queue.now += 5 * 86_400
    assert [store.sweep() for _ in range(3)] == [Swept(2, 2, 0), Swept(1, 1, 0), Swept(0, 0, 0)]
    assert queue.files() == []


# Uploads


def test_an_upload_is_kept_by_its_hash_for_its_tenant_alone(queue: Queue, store: Store) -> None:
    name = sha(b"vector")
    assert store.blob_path(ADA, name) is None
    assert store.put_blob(ADA, name, b"vector")
    assert not store.put_blob(ADA, name, b"vector")
    path = store.blob_path(ADA, name)
    assert path is not None
    assert path.read_bytes() == b"vector"
    assert store.blob_path(BEN, name) is None
    with pytest.raises(MissingBlobsError, match=f"not uploaded, or no longer kept: {name}") as missing:
        submit(store, BEN, blobs=[name])
    assert missing.value.missing == (name,)
    submit(store, ADA, blobs=[name, name])
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert {key: path.read_bytes() for key, path in job.blobs.items()} == {name: b"vector"}


def test_an_upload_under_another_name_is_refused(queue: Queue, store: Store) -> None:
    with pytest.raises(WrongHashError, match=f"the upload {'0' * 64} has the hash {sha(b'x')}"):
        store.put_blob(ADA, "0" * 64, b"x")
    assert queue.files() == []


def test_an_upload_that_a_job_needs_stays_until_it_has_ended(queue: Queue) -> None:
    store = queue.open(periods=Periods(blobs=10))
    small = replace(ADA, limits=Limits(stored_bytes=100))
    first, second = bytes(60), bytes([1]) * 60
    store.put_blob(small, sha(first), first)
    id = submit(store, small, blobs=[sha(first)]).id
    with pytest.raises(StoredBytesError, match="an upload of 60 bytes does not fit the 100 bytes that ada may store"):
        store.put_blob(small, sha(second), second)
    queue.now += 1000
    assert store.sweep() == Swept(0, 0, 0)
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert store.finish(id, job.fence, b"R")
    assert store.put_blob(small, sha(second), second)
    assert store.blob_path(small, sha(first)) is None
    assert queue.files() == [b"R", second]
    assert store.job(id, small).status == "completed"  # type: ignore[union-attr]


# Damage


def test_a_damaged_payload_fails_its_job_alone(queue: Queue, store: Store) -> None:
    ids = [submit(store, payload=b"job %d" % number).id for number in range(3)]
    queue.file(b"job 1").write_bytes(b"jab 1")
    store = queue.reopen()
    (lease,) = store.lease(1, max_batch=3)
    assert [job.id for job in lease.jobs] == [ids[0], ids[2]]
    assert lease.damaged == (ids[1],)
    record = store.job(ids[1], ADA)
    assert record is not None
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["message"] == "the job's file was damaged on the service's disk; send it again"
    assert queue.files() == [b"job 0", b"job 2"]


def test_a_job_whose_files_are_gone_fails_alone(queue: Queue, store: Store) -> None:
    store.put_blob(ADA, sha(b"v"), b"v")
    submit(store, payload=b"gone")
    without = submit(store, blobs=[sha(b"v")]).id
    queue.file(b"gone").unlink()
    queue.file(b"v").unlink()
    last = submit(store).id
    (lease,) = store.lease(1, 4)
    assert [job.id for job in lease.jobs] == [last]
    assert store.counts()["failed"] == 2
    assert store.job(without, ADA).status == "failed"  # type: ignore[union-attr]


def test_an_upload_whose_file_was_lost_is_asked_for_again(queue: Queue, store: Store) -> None:
    name = sha(b"vector")
    store.put_blob(ADA, name, b"vector")
    queue.file(b"vector").unlink()
    assert store.blob_path(ADA, name) is None
    with pytest.raises(MissingBlobsError):
        submit(store, blobs=[name])
    assert store.put_blob(ADA, name, b"vector")
    submit(store, blobs=[name])
    ((job,),) = (lease.jobs for lease in store.lease(1, 1))
    assert job.blobs[name].read_bytes() == b"vector"
    assert store._database.number("SELECT stored FROM tenants WHERE name = 'ada'") == 6


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_result_that_is_no_ordinary_file_is_refused(queue: Queue, store: Store, tmp_path: Path, kind: str) -> None:
    secret, given = tmp_path / "secret", tmp_path / "result"
    secret.write_bytes(b"a key")
    if kind == "link":
        given.symlink_to(secret)
    else:
        given.mkdir()
    with pytest.raises(StoreError, match="result is no ordinary file"):
        store.stage(given)
    assert secret.read_bytes() == b"a key"
    assert queue.files() == []


def test_files_that_belong_to_nothing_are_taken_away_at_the_start(queue: Queue, store: Store) -> None:
    submit(store, payload=b"waiting")
    store.put_blob(ADA, sha(b"v"), b"v")
    store.cancel(submit(store).id, ADA)
    queue.close()
    for folder in ("files", "incoming"):
        (queue.folder / folder / "stray").write_bytes(b"x")
    store = queue.open()
    assert store.recover() == Recovered(0, 0, 2)
    assert queue.files() == [b"v", b"waiting"]
    ended = complete_next(store)
    queue.file(b"R").unlink()
    store = queue.reopen()
    assert store.job(ended, ADA).status == "expired"  # type: ignore[union-attr]


def complete_next(store: Store) -> str:
    (job,) = (job for lease in store.lease(1, 1) for job in lease.jobs)
    assert store.finish(job.id, job.fence, b"R")
    return job.id


def test_a_damaged_database_is_refused_with_what_to_do(queue: Queue, store: Store) -> None:
    for _ in range(50):
        submit(store)
    queue.close()
    path = queue.folder / "queue.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    path.write_bytes(data)
    with pytest.raises(StoreError) as refused:
        queue.open()
    assert "queue.sqlite is damaged: " in str(refused.value)
    assert f"move {queue.folder} away and start with an empty one" in str(refused.value)
    path.write_bytes(b"no database at all, but something else that is long enough to be read" * 100)
    with pytest.raises(StoreError, match="is damaged: file is not a database; put a copy of the folder back"):
        queue.open()


def test_a_database_of_a_newer_release_or_of_something_else_is_refused(queue: Queue, store: Store) -> None:
    queue.close()
    path = queue.folder / "queue.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(
        StoreError, match=r"a newer release \(its schema is 7, this release reads 1\); use that release"
    ):
        queue.open()
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    connection.close()
    with pytest.raises(StoreError, match="is a database of something else; use another --state folder"):
        queue.open()


def test_a_folder_belongs_to_one_service_and_a_store_to_one_thread(queue: Queue, store: Store) -> None:
    with pytest.raises(StoreError, match=r"belongs to a service that runs \(process \d+\); stop it, or use another"):
        queue.open()
    raised: list[BaseException] = []

    def count() -> None:
        try:
            store.counts()
        except StoreError as error:
            raised.append(error)

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    (error,) = raised
    assert "the queue is used from another thread than the one that opened it" in str(error)


def test_a_database_that_is_damaged_meanwhile_is_reported(queue: Queue, store: Store) -> None:
    id = submit(store).id
    store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._database.execute("PRAGMA cache_size = 0")
    path = queue.folder / "queue.sqlite"
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(StoreError, match=r"queue\.sqlite is damaged: .*; put a copy of the folder back, or move"):
        store.job(id, ADA)
