"""What has arrived is looked at before anything else is done with it: its header alone, strictly, and without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.remote.container import JobHeader, job_header, read_header
from nnsight_compiler.service.engine import Content
from nnsight_compiler.service.refusals import Refusal

TENSOR = "tensor"
"""The one tensor of an upload."""


@contextmanager
def expected_job() -> Iterator[None]:
    """Inside, what is damaged is refused as a body that is no job."""
    try:
        yield
    except FileError as error:
        raise Refusal(400, "not_a_job", f"the body is no job: {error}") from None


def header_of_job(content: Content) -> JobHeader:
    """What a job says of itself: its model, and the uploads that it names."""
    with expected_job():
        return job_header(read_header(content))


def check_blob(content: Content) -> None:
    """Refuses an upload that is no safetensors file with one tensor of the agreed name."""
    try:
        names = list(read_header(content).tensors)
    except FileError as error:
        raise Refusal(400, "not_a_tensor", f"the body is no upload: {error}") from None
    if names != [TENSOR]:
        text = f"the body is no upload: it holds {len(names)} tensors, and not one that is called {TENSOR!r}"
        raise Refusal(400, "not_a_tensor", text)
