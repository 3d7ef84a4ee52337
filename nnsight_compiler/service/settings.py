"""How a service is set up: its limits in bytes, counts and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The front end's own limits; those of a tenant lie in its `Limits` and can only be narrower."""

    state: Path
    """The folder of everything that is kept. Bodies arrive in `incoming` under it."""

    max_batch: int = 16
    """How many jobs may share a forward."""

    max_body: int = 256 * MEBIBYTE
    """Bytes of a request's body, for every tenant."""

    requests: int = 256
    """How many requests of one tenant are answered at once, streams of events and waiting ones among them."""

    max_wait: float = 60.0
    """The longest that a request may ask to wait for a result; a longer wish is cut to this."""

    heartbeat: float = 10.0
    """Seconds after which a silent event stream sends a comment."""

    body_patience: float = 10.0
    """Seconds that a body may take, besides what it takes at `body_rate`."""

    body_rate: int = 64 * 1024
    """Bytes a second below which a body is too slow."""

    free_disk: int = 256 * MEBIBYTE
    """Free bytes under `state` below which the service is not ready for more jobs."""

    drain: float = 10.0
    """Seconds that running jobs have to end when the service stops; then they go back to the queue."""

    sweep: float = 60.0
    """Seconds between two looks for what has expired."""

    @property
    def incoming(self) -> Path:
        """Where bodies are held until they are queued or refused."""
        return self.state / "incoming"
