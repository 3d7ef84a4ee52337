"""What the service counts, for Prometheus: no label holds a key, an id or a tenant, so that there are few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nnsight_compiler.service.records import LeasedJob, Status
from nnsight_compiler.service.store import STATES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "nnsight_requests",
            "Requests by route, method and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "nnsight_request_seconds",
            "Seconds until an answer was complete, waits included.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._bytes_in = Counter("nnsight_received_bytes", "Bytes of bodies received.", registry=registry)
        self._bytes_out = Counter("nnsight_sent_bytes", "Bytes of bodies sent.", registry=registry)
        self._jobs = Gauge("nnsight_jobs", "Jobs that are kept, by state.", ["state"], registry=registry)
        self._submitted = Counter("nnsight_submitted_jobs", "Jobs that were put into the queue.", registry=registry)
        self._refused = Counter(
            "nnsight_refused_jobs", "Jobs that were refused, by status.", ["status"], registry=registry
        )
        self._ended = Counter("nnsight_ended_runs", "Runs by how they ended.", ["how"], registry=registry)
        self._queued = Histogram(
            "nnsight_queued_seconds", "Seconds that a job waited.", registry=registry, buckets=_SECONDS
        )
        self._running = Histogram(
            "nnsight_running_seconds", "Seconds that a job ran.", registry=registry, buckets=_SECONDS
        )
        self._batches = Histogram("nnsight_batch_jobs", "Jobs of a batch.", registry=registry, buckets=_SIZES)
        self._restarts = Counter("nnsight_worker_restarts", "Workers that died at work.", registry=registry)
        self._ready = Gauge("nnsight_ready", "1 where jobs are taken.", registry=registry)

    def request(self, route: str, method: str, status: int, seconds: float, received: int, sent: int) -> None:
        """A request was answered. `status` 0 is a client that went away before."""
        self._requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        self._bytes_in.inc(received)
        self._bytes_out.inc(sent)

    def submitted(self) -> None:
        """A job was acknowledged."""
        self._submitted.inc()

    def refused(self, status: int) -> None:
        """A job was not admitted."""
        self._refused.labels(str(status)).inc()

    def batch(self, jobs: Sequence[LeasedJob]) -> None:
        """A batch begins to run."""
        self._batches.observe(len(jobs))
        for job in jobs:
            self._queued.observe(job.waited)

    def ended(self, how: str, seconds: float) -> None:
        """A run ended: `completed`, `failed`, `given back`, or `stale` where it counted for nothing."""
        self._ended.labels(how).inc()
        self._running.observe(seconds)

    def worker_died(self) -> None:
        """A worker died while a job ran; another takes its place."""
        self._restarts.inc()

    def text(self, counts: Mapping[Status, int], ready: bool) -> bytes:
        """All of it, as Prometheus reads it."""
        for state in STATES:
            self._jobs.labels(state).set(counts.get(state, 0))
        self._ready.set(ready)
        return generate_latest(self._registry)
