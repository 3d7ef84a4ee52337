"""Which run's hooks act in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final


@final
class Active(threading.local):
    """The run whose hooks act in this thread, while the model runs and no site function does."""

    run: object = None

    @contextmanager
    def running(self, run: object) -> Iterator[None]:
        """While the model runs in that run."""
        before, self.run = self.run, run
        try:
            yield
        finally:
            self.run = before


ACTIVE = Active()
