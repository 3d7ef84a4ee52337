"""What all tests share."""

from __future__ import annotations

import gc

gc.disable()  # until all is imported and collected: what comes to be until then stays

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_finish(session: pytest.Session) -> None:
    """The collector need not go through what is imported again and again: that was a tenth of the suite's time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Nor through what a file leaves behind, which stays to the end: tests that count what is alive do so quickly."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
