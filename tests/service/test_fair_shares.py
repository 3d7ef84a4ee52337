"""Fair shares: whoever waits gets its part, by weight, whatever the others bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import pytest
from queues import unsynced

from nnsight_compiler.service.store import Store
from nnsight_compiler.service.tenants import Limits, Tenant

MANY = Limits(max_queued=10_000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with unsynced():  # what is tested here is the order
        store = Store(tmp_path / "state")
        yield store
        store.close()


def tenant(name: str, weight: float = 1.0) -> Tenant:
    return Tenant(name, weight, MANY)


def submit(store: Store, who: Tenant, share: float = 1.0, group: str = "g") -> str:
    return store.submit(who, b"", model="m", group=group, cost={}, share=share).id


def serve(store: Store, most: int = 1, max_batch: int = 1) -> Iterator[str]:
    """Runs up to so many leases, and gives the tenants whose jobs ran, in order."""
    for _ in range(most):
        for lease in store.lease(1, max_batch):
            for job in lease.jobs:
                yield job.tenant.name
                assert store.fail(job.id, job.fence, {})


def jain(parts: Mapping[str, float]) -> float:
    """Jain's index of fairness: 1 where all have the same, 1/n where one of n has all (Jain, Chiu and Hawe 1984)."""
    return sum(parts.values()) ** 2 / (len(parts) * sum(part**2 for part in parts.values()))


def test_one_job_need_not_wait_for_a_thousand_of_another(store: Store) -> None:
    greedy, modest = tenant("greedy"), tenant("modest")
    for _ in range(150):
        submit(store, greedy)
    list(serve(store, 10))
    first = submit(store, modest)
    assert store.place(first) in (1, 2)
    assert "modest" in list(serve(store, 2))
    for _ in range(5):
        submit(store, modest)
    assert Counter(serve(store, 10))["modest"] == 5


def test_those_that_wait_get_as_much_whatever_they_bring_at_once(store: Store) -> None:
    numbers = {"a": 130, "b": 30, "c": 25, "d": 40}
    for name, number in numbers.items():
        for _ in range(number):
            submit(store, tenant(name))
    served = Counter(serve(store, 80))
    assert jain(served) >= 0.99, served
    assert set(served) == set(numbers)


def test_large_jobs_count_for_more(store: Store) -> None:
    random = Random(0)
    sizes = {"small": 1.0, "middle": 4.0, "large": 16.0}
    shares = {}
    for name, size in sizes.items():
        for _ in range(int(240 / size)):
            share = size * random.uniform(0.5, 1.5)
            shares[submit(store, tenant(name), share)] = share
    work: Counter[str] = Counter()
    while sum(work.values()) < 350:
        ((job,),) = (lease.jobs for lease in store.lease(1, 1))
        work[job.tenant.name] += shares[job.id]  # type: ignore[assignment]
        store.fail(job.id, job.fence, {})
    assert jain(work) >= 0.98, work


def test_weights_divide_the_service(store: Store) -> None:
    weights = {"one": 1.0, "two": 2.0, "five": 5.0}
    for name, weight in weights.items():
        for _ in range(65):
            submit(store, tenant(name, weight))
    served = Counter(serve(store, 80))
    assert jain({name: served[name] / weight for name, weight in weights.items()}) >= 0.99, served
    assert served["five"] == pytest.approx(50, abs=2)


def test_those_that_come_and_go_get_their_part_while_they_wait(store: Store) -> None:
    random = Random(1)
    busy, guests = tenant("busy"), [tenant(f"guest{number}") for number in range(3)]
    for _ in range(120):
        submit(store, busy)
    longest = 0
    for _ in range(12):
        list(serve(store, random.randrange(8)))
        submitted = submit(store, random.choice(guests))
        waited = 0
        while store.place(submitted):
            list(serve(store))
            waited += 1
        longest = max(longest, waited)
    assert longest <= 3


def test_a_rest_saves_nothing_up(store: Store) -> None:
    early, late = tenant("early"), tenant("late")
    submit(store, late)
    list(serve(store))
    for _ in range(60):
        submit(store, early)
    list(serve(store, 20))
    for _ in range(60):
        submit(store, late)
    assert Counter(serve(store, 40)) == {"early": 20, "late": 20}


def test_jobs_that_ride_along_are_charged_to_their_own_tenants(store: Store) -> None:
    riders, other = tenant("riders"), tenant("other")
    for _ in range(40):
        submit(store, other, group="alone")
        submit(store, riders, group="together")
        submit(store, tenant("mate"), group="together")
    served = Counter(serve(store, 24, max_batch=4))
    assert jain(served) >= 0.9, served


def test_a_job_that_is_withdrawn_costs_nothing(store: Store) -> None:
    hasty, calm = tenant("hasty"), tenant("calm")
    for id in [submit(store, hasty) for _ in range(60)]:
        store.cancel(id, hasty)
    middle = [submit(store, hasty) for _ in range(20)]
    for _ in range(20):
        submit(store, calm)
    for id in middle[:10]:
        store.cancel(id, hasty)
    assert Counter(serve(store, 20)) == {"hasty": 10, "calm": 10}


def test_places_are_the_order_in_which_jobs_are_begun(store: Store) -> None:
    random = Random(2)
    ids = [
        submit(store, tenant(random.choice("abc"), random.choice([1.0, 3.0])), random.uniform(0.1, 5.0))
        for _ in range(60)
    ]
    expected = sorted(ids, key=lambda id: store.place(id) or 0)
    assert [store.place(id) for id in expected] == list(range(1, 61))
    begun = [job.id for lease in store.lease(60, 1) for job in lease.jobs]
    assert begun == expected
    assert {store.place(id) for id in ids} == {0}


def test_shares_outlive_the_service(store: Store, tmp_path: Path) -> None:
    greedy, modest = tenant("greedy"), tenant("modest")
    for _ in range(30):
        submit(store, greedy)
    list(serve(store, 10))
    store.close()
    again = Store(tmp_path / "state")
    for _ in range(10):
        submit(again, modest)
    assert Counter(serve(again, 20)) == {"greedy": 10, "modest": 10}
    again.close()
