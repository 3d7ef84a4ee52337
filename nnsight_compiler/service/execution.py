"""What a service does with jobs, in its processes: checks them, and runs them on its model."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch

from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.models import LanguageModel
from nnsight_compiler.remote.errors import error_record
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import Job, tensor_of, unpack
from nnsight_compiler.runtime.runs import Effort, counted
from nnsight_compiler.runtime.tokens import hearing
from nnsight_compiler.service.admission import Admitter, NotAdmittedError
from nnsight_compiler.service.engine import Admission, Data, JobLimits, RefusedError
from nnsight_compiler.service.lines import Lines
from nnsight_compiler.service.model_card import model_card, tokenizer_files
from nnsight_compiler.service.runner import Blobs, ChangedModelError, Task
from nnsight_compiler.service.untouched import Untouched

PROGRESS_SECONDS = 0.1
"""Between two events that tell how far a job is; one that is over sooner tells nothing."""


def load(source: str, options: Mapping[str, Any], weights: bool) -> ModelRunner:
    """A language model of a name or a folder, loaded without leaving a thread.

    Args:
        options: as `LanguageModel` takes them; a dtype by torch's name.
        weights: whether they are loaded; without them jobs are only checked.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a thread watches it
    torch.set_num_threads(1)
    model = LanguageModel(source, **options, dispatch=weights)
    if weights:
        _first(model)
    return ModelRunner(model, weights)


def _first(model: LanguageModel) -> None:
    """Runs an experiment as jobs are run: what is done once for a model or a process is then done before the forks."""
    prompt = torch.zeros((1, 4), dtype=torch.long)
    with model.trace(prompt, attention_mask=torch.ones_like(prompt), remote="local"):
        logits = model.output.save()
    del logits


@final
class ModelRunner:
    """A model, and jobs on it."""

    def __init__(self, model: LanguageModel, weights: bool = True) -> None:
        self.model = model
        self.executor = Executor(model)
        self.admitter = Admitter(self.executor)
        self.lines = Lines()
        self.untouched = Untouched(model) if weights else None

    def describe(self) -> tuple[Data, Mapping[str, bytes]]:
        return model_card(self.model), tokenizer_files(self.model)

    def begin(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.ones(threads, 2**16).sum(-1)  # the threads begin before the memory of a job is limited

    def admit(self, payload: bytes, blobs: Blobs, limits: JobLimits) -> Admission:
        try:
            job = self._job(payload, blobs)
            with self.lines.of([job]):
                admitted = self.admitter.admit(job, limits)
                return Admission(admitted.group, admitted.cost.as_data())
        except NotAdmittedError as error:
            with self.lines.shown():
                raise RefusedError(error.status, error.record()) from error
        except FileError as error:
            raise RefusedError(400, self.record(error)) from error

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes | Exception]]:
        if len(tasks) > 1:
            results = self._together(tasks)
            if results is not None:
                yield from zip(tasks, results, strict=True)
                return
            for task in tasks:
                task.wait()
        for task in tasks:
            yield task, self._alone(task)

    def record(self, error: BaseException) -> Data:
        with self.lines.shown():
            return error_record(error)

    def _alone(self, task: Task) -> bytes | Exception:
        """The result of a task, or what was raised."""
        task.begin()
        _draw_anew()
        try:
            job = self._job(task.payload(), task.blobs)
            with self.lines.of([job]), self._unchanged(job), self._counted([task]), hearing(_heard(task)):
                return self.executor.run(job)
        except Exception as error:  # whatever the experiment raises
            return error

    def _together(self, tasks: Sequence[Task]) -> list[bytes] | None:
        """The results of tasks that run as one; `None` where they cannot, or where one of them fails."""
        for task in tasks:
            task.begin()
        _draw_anew()
        try:
            jobs = [self._job(task.payload(), task.blobs) for task in tasks]
            with self.lines.of(jobs), self._unchanged(jobs[0]), self._counted(tasks):
                return self.executor.run_together(jobs)
        except FileError:  # whose it is shows where each runs by itself
            return None

    @contextmanager
    def _unchanged(self, job: Job) -> Iterator[None]:
        """Leaves the model as it was.

        Raises:
            ChangedModelError: the job, or several of the same code, changed what cannot be undone.
        """
        assert self.untouched is not None, "where jobs run, there are weights"
        try:
            yield
        finally:
            self.untouched.restore()
            changed = self.untouched.change(self.executor.programs(job))
            if changed is not None:
                raise ChangedModelError(
                    f"this job changed {changed}, which jobs of others would see: its result is withheld\n"
                    "  way out: work on copies (`weight.clone()`), or write to outputs, for one forward or by an edit"
                )

    def _counted(self, tasks: Sequence[Task]) -> Any:
        """Counts the runs of the model, against the limit of the one that may have the fewest. Tells of them now and
        then."""
        most = min(task.limits.forwards for task in tasks)
        due = time.monotonic() + PROGRESS_SECONDS

        def report(count: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due:
                due = now + PROGRESS_SECONDS
                for task in tasks:
                    task.send("progress", {"forwards": count})

        return counted(Effort(most, report))

    @staticmethod
    def _job(payload: bytes, blobs: Blobs) -> Job:
        def uploaded(sha: str) -> torch.Tensor:
            try:
                content = blobs(sha)
            except KeyError:
                raise FileError(f"no tensor {sha!r:.80} was uploaded") from None
            return tensor_of(content)

        return unpack(payload, uploaded)


def _draw_anew() -> None:
    """What a job draws depends on no other job, nor on the process that it comes to: all were forked from one."""
    torch.default_generator.seed()  # `torch.seed` looks for other devices, and takes a millisecond to do so
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _heard(task: Task) -> Callable[[int, list[int]], object]:
    """Sends tokens on to the function, by its number, that wants them."""
    return lambda number, ids: task.send("token", {"function": number, "ids": ids})


__all__ = ["ModelRunner", "load"]
