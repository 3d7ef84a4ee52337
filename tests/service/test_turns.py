"""Whose job is checked next."""

from __future__ import annotations

import asyncio

import pytest

from nnsight_compiler.service.turns import Turns


def test_who_sends_many_jobs_keeps_others_from_no_check() -> None:
    async def checked() -> list[str]:
        turns, engine, order = Turns(), asyncio.Lock(), []

        async def check(tenant: str, job: str) -> None:
            async with turns.of(tenant), engine:
                await asyncio.sleep(0)
                order.append(job)

        jobs = [("ada", f"ada {number}") for number in range(50)] + [("bob", "bob 0"), ("bob", "bob 1")]
        await asyncio.gather(*(check(*job) for job in jobs))
        assert not turns._lines, "nothing is kept of tenants that have sent nothing"
        return order

    order = asyncio.run(checked())
    assert order.index("bob 0") <= 2
    assert order.index("bob 1") <= 4
    assert [job for job in order if job.startswith("ada")] == [f"ada {number}" for number in range(50)]


def test_a_turn_ends_with_an_error_and_with_a_client_that_leaves() -> None:
    async def ended() -> None:
        turns = Turns()
        with pytest.raises(ValueError, match="refused"):
            async with turns.of("ada"):
                raise ValueError("refused")

        async def wait() -> None:
            async with turns.of("ada"):
                await asyncio.sleep(60)

        holds, waits = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
        waits.cancel()
        holds.cancel()
        await asyncio.gather(holds, waits, return_exceptions=True)
        async with asyncio.timeout(5), turns.of("ada"):
            pass
        assert not turns._lines

    asyncio.run(ended())
