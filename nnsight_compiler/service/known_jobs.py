"""Jobs that were admitted before: one that differs from such a job only in the numbers of its data needs no check.

    steer(model, "The Eiffel Tower is in", vector)     is checked
    steer(model, "The Eiffel Tower is in", other)      is not: it is admitted as the first was

What a check rests on is the job's header (its whole document, and the shapes of its tensors), the content of tensors
that belong to its code or to edits, or whose numbers may be the index of a layer, uploads by their hash, and the limits
of its tenant; a model stays what it is while the service runs. Fractions that are data are looked at by no check.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from nnsight_compiler.remote.container import Entry, JobHeader, header_bytes, job_header, read_header
from nnsight_compiler.service.arrived import expected_job
from nnsight_compiler.service.engine import Admission, Content
from nnsight_compiler.service.tenants import Tenant

MOST = 1024
"""How many headers are kept, and how many admissions."""
LONGEST = 2**16
"""Bytes of a header that is kept."""
STATE = "state."
"""What the names of tensors begin with whose content no check looks at, whatever they are."""
DATA = "data."
"""What those begin with of which none looks at fractions."""
FRACTIONS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@final
@dataclass(frozen=True, slots=True)
class Arrived:
    """A job that has come: its header, and what its check rests on; `None` where that is not kept."""

    header: JobHeader
    kind: Hashable | None


@final
class KnownJobs:
    """Headers that were found sound, and jobs that were admitted: the latest of both."""

    def __init__(self) -> None:
        self._headers: OrderedDict[bytes, tuple[JobHeader, Sequence[tuple[int, int]]]] = OrderedDict()
        self._admissions: OrderedDict[Hashable, Admission] = OrderedDict()

    def arrived(self, content: Content, tenant: Tenant) -> Arrived:
        """A job of a tenant, its header looked at before anything else, strictly, and without torch.

        Raises:
            Refusal: it is no job.
        """
        with expected_job():
            head, size = header_bytes(content)
            digest = hashlib.sha256(head + size.to_bytes(8, "little")).digest()
            held = _recent(self._headers, digest)
            if held is None:
                header = read_header(content)
                relied = [each for name, each in header.tensors.items() if _may_rest_on(name, each)]
                held = job_header(header), [(len(head) + each.start, len(head) + each.end) for each in relied]
        if not isinstance(content, bytes) or len(head) > LONGEST:
            return Arrived(held[0], None)
        _keep(self._headers, digest, held)
        made = hashlib.sha256(digest)
        for start, stop in held[1]:
            made.update(content[start:stop])
        return Arrived(held[0], (made.digest(), tenant.name, tenant.limits))

    def admission(self, job: Arrived) -> Admission | None:
        """How a job was admitted that is like this one."""
        return None if job.kind is None else _recent(self._admissions, job.kind)

    def admitted(self, job: Arrived, admission: Admission) -> None:
        """Notes how a job was admitted."""
        if job.kind is not None:
            _keep(self._admissions, job.kind, admission)


def _may_rest_on(name: str, tensor: Entry) -> bool:
    """Whether a check may look at the content of a tensor: `model.layers[index]` is another layer for another index."""
    return not (name.startswith(STATE) or (name.startswith(DATA) and tensor.dtype in FRACTIONS))


def _recent(held: OrderedDict[K, V], key: K) -> V | None:
    found = held.get(key)
    if found is not None:
        held.move_to_end(key)
    return found


def _keep(held: OrderedDict[K, V], key: K, value: V) -> None:
    held[key] = value
    if len(held) > MOST:
        held.popitem(last=False)


__all__ = ["Arrived", "KnownJobs"]
