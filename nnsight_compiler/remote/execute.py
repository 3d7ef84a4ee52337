"""Runs jobs, where the model is."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch

from nnsight_compiler.block import exported
from nnsight_compiler.cache import Cache
from nnsight_compiler.compilation import Compiled
from nnsight_compiler.files.document import refuse
from nnsight_compiler.files.edits import edits_for
from nnsight_compiler.files.kinds import COMPUTED, is_instance
from nnsight_compiler.files.loading import Code, code_from
from nnsight_compiler.files.namespace import Namespace
from nnsight_compiler.files.restore import check_attribute
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import FileError
from nnsight_compiler.ir.program import Program
from nnsight_compiler.models import NNsight
from nnsight_compiler.passes.bounded import MOST_OPS_OF_JOBS
from nnsight_compiler.remote.batch import constant, guarded, looped, shows
from nnsight_compiler.remote.data import DataReader, Seen
from nnsight_compiler.remote.errors import leave
from nnsight_compiler.remote.job import Job
from nnsight_compiler.remote.random_state import KEY as RANDOM
from nnsight_compiler.remote.random_state import checked
from nnsight_compiler.remote.results import write_result
from nnsight_compiler.runtime.support import UNBOUND

_UNCOUNTED = frozenset({"data", "numpy"})
"""Attributes of tensors by which they can be changed without torch's counting it."""
MOST = 64
"""How many jobs' code is kept, with what it was compiled to."""


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """The code of a job, read, with what it was compiled to.

    seen: the objects of the code, as they were when it was read.
    loops: by the parameters that jobs have in common, the program of a loop over jobs; `None` where there is none.
    """

    code: Code
    cache: Cache
    seen: Seen
    loops: dict[frozenset[str], Cache | None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The parameters of the program."""
        return [parameter.value.name for parameter in self.code.program.parameters]


@final
class Executor:
    """Runs jobs on one model. Jobs with the same code are compiled once."""

    def __init__(self, model: NNsight) -> None:
        self.model = model
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._views: OrderedDict[str, NNsight] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, job: Job) -> bytes:
        """Runs a job. Returns the file of its result.

        Raises:
            ExperimentError: it is damaged, or cannot be compiled, or its result cannot be sent back.
            Exception: whatever its code raised as it ran.
        """
        digest = job.digest
        loaded = self.load(job, digest)
        given = Given(job, loaded)
        try:
            with undisturbed(job), _random(job.tensors.get(RANDOM)), given.attributes():
                given.give_gradients()
                compiled = loaded.cache.find(given.values) or loaded.cache.get(given.values)
                try:
                    value = compiled.plan.run(*given.values)
                except Exception as error:
                    given.leave_changes(error, job.tensors.get(RANDOM))
                    raise
                return given.result(compiled, value, RANDOM in job.tensors)
        finally:
            if loaded.seen.changed():  # the next job is to find it as it was sent
                with self._lock:
                    self._loaded.pop(digest, None)

    def run_together(self, jobs: Sequence[Job]) -> list[bytes] | None:
        """Runs jobs that have their code in common as rounds of one loop, whose forwards are rows of one. Returns the
        files of their results; `None` where they cannot be, or one of them failed: each is then to run by itself, and
        nothing of it is done yet.
        """
        first = jobs[0]
        digest = first.digest
        assert all(job.digest == digest for job in jobs), "jobs of one group have one code"
        loaded = self.load(first, digest)
        with undisturbed(first):
            try:
                given = [Given(job, loaded) for job in jobs]
                if any(each.alone for each in given):
                    return None
                compiled = loaded.cache.get(given[0].values)
                common = guarded(loaded.code.program, compiled.guards)
                told = {repr([constant(each.named[name]) for name in sorted(common)]) for each in given}
                draws = any(RANDOM in job.tensors for job in jobs)
                if shows(compiled.program) or len(told) > 1 or draws:
                    return None
                cache = self._loop(loaded, common, compiled)
                if cache is None:
                    return None
                own = [name for name in loaded.names if name not in common]
                rows = [tuple(each.named[name] for name in own) for each in given]
                results = cache.run(rows, *(given[0].named[name] for name in loaded.names if name in common))
                if loaded.seen.changed():  # by which of them cannot be told
                    return None
                return [each.result(compiled, result) for each, result in zip(given, results, strict=True)]
            except Exception:  # whose it is shows where each runs by itself
                return None
            finally:
                if loaded.seen.changed():
                    with self._lock:
                        self._loaded.pop(digest, None)

    def _loop(self, loaded: Loaded, common: frozenset[str], compiled: Compiled) -> Cache | None:
        if common not in loaded.loops:
            program = looped(loaded.code.program, common, compiled.program)
            namespace = loaded.code.namespace
            made = None if program is None else Cache(program, namespace, namespace.cells, loaded.cache.options)
            loaded.loops[common] = made
        return loaded.loops[common]

    @staticmethod
    def group(job: Job, given: Given, compiled: Compiled) -> str:
        """What jobs have in common that may run together: their code, and what they were specialised on. A job that
        prints or draws runs by itself: nobody could tell whose text it is, or give each its own numbers."""
        if shows(compiled.program) or RANDOM in job.tensors or given.alone:
            return ""
        common = sorted(guarded(given.loaded.code.program, compiled.guards))
        told = repr([(name, constant(given.named[name])) for name in common])
        return hashlib.sha256(f"{job.digest} {told}".encode()).hexdigest()

    def load(self, job: Job, digest: str) -> Loaded:
        """The code of a job, read.

        Raises:
            FileError: it is damaged, or makes calls that no job may make.
        """
        with self._lock:
            held = self._loaded.get(digest)
            if held is not None:
                self._loaded.move_to_end(digest)
                return held
        namespace = Namespace(self.view(job), False, COMPUTED)
        namespace.most_ops = MOST_OPS_OF_JOBS
        code = code_from(job.code, job.of("code"), namespace, block=True)
        namespace.link()
        if code.defaults:
            refuse("code.defaults", "a job gives each parameter its value")
        cache = Cache(code.program, namespace, namespace.cells, job.options)
        programs = (code.program, *namespace.programs)
        weights = any(
            isinstance(op, ops.Attribute) and op.name in _UNCOUNTED for each in programs for op in each.walk()
        )
        made = Loaded(code, cache, Seen(code.objects, weights))
        with self._lock:
            self._loaded[digest] = made
            while len(self._loaded) > MOST:
                self._loaded.popitem(last=False)
        return made

    def programs(self, job: Job) -> list[Program]:
        """The programs of a job whose code is kept; none where it is not."""
        with self._lock:
            held = self._loaded.get(job.digest)
        return [] if held is None else held.code.namespace.programs

    def view(self, job: Job) -> NNsight:
        """The model as a job names and edits it.

        Raises:
            ExperimentError: its names or its edits do not fit the model.
        """
        model = self.model
        if job.rename == model._rename and job.edits is None:
            return model
        key = job.view
        with self._lock:
            held = self._views.get(key)
        if held is None:
            held = model if job.rename == model._rename else model._renamed(dict(job.rename.items()))
            if job.edits is not None:
                held = held._with_edits(edits_for(held, job.edits, job.of("edits")))
            with self._lock:
                self._views[key] = held
                while len(self._views) > MOST:
                    self._views.popitem(last=False)
        return held


@final
class Given:
    """The values of a program's parameters, of one job. Each call makes new objects.

    Raises:
        FileError: they are no plain data, or not those of the program.
    """

    def __init__(self, job: Job, loaded: Loaded) -> None:
        self.loaded = loaded
        model = loaded.code.namespace.model
        reader, names = DataReader(job.objects, job.of("data"), model), loaded.names
        for name in job.arguments:
            if name not in names:
                refuse(f"arguments.{name}", "the program has no such parameter")
        if loaded.code.program.kind != "block" and len(job.arguments) != len(names):
            refuse("arguments", "a parameter has no value")
        self.named = {
            name: reader.value(job.arguments[name], f"arguments.{name}") if name in job.arguments else UNBOUND
            for name in names
        }
        self.values = tuple(self.named.values())
        self.counts = first, _ = len(reader.entries), len(loaded.code.objects)
        self.of_code: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, node in job.gradients.items():
            gradient = reader.value(node, "gradients")
            tensor = (
                loaded.code.objects.get(number - first) if number >= first else reader.numbered(number, "gradients")
            )
            if not (isinstance(tensor, torch.Tensor) and isinstance(gradient, torch.Tensor)):
                refuse("gradients", "only tensors have gradients, which are tensors")
            if tensor.shape != gradient.shape or tensor.dtype != gradient.dtype or tensor is gradient:
                refuse("gradients", "a gradient is like its tensor")
            if number < first:
                tensor.grad = gradient
            else:
                self.of_code.append((tensor, gradient))
        self._objects = {number: self._attributes(number, held, reader) for number, held in job.attributes.items()}
        reader.finish()
        self.seen = Seen(reader.made)
        self.code_seen = loaded.seen

    def _attributes(self, number: int, held: dict[str, Any], reader: DataReader) -> dict[str, Any]:
        """What a job says of the attributes of an object of its code."""
        where = f"attributes of {number}"
        own = self.loaded.code.objects.get(number)
        if own is None or not is_instance(own):
            refuse(where, "only objects of the code's classes have attributes that are data")
        made = {}
        for name, node in held.items():
            check_attribute(own, name, f"{where}.{name}")
            if name in vars(own):
                refuse(f"{where}.{name}", "the code says what this is")
            made[name] = reader.value(node, f"{where}.{name}")
        return made

    @property
    def alone(self) -> bool:
        """Whether the job changes, for its time, what the code holds, so that it shares no run with another."""
        return bool(self.of_code or self._objects)

    @contextmanager
    def attributes(self) -> Iterator[None]:
        """Gives the objects of the code the attributes that the job has for them, and takes them back afterwards."""
        own = [(vars(self.loaded.code.objects[number]), made) for number, made in self._objects.items()]
        before = [dict(held) for held, _ in own]
        for held, made in own:
            held.update(made)
        self.code_seen = self.loaded.seen.anew(self._objects)
        try:
            yield
        finally:
            for (held, _), kept in zip(own, before, strict=True):
                held.clear()
                held.update(kept)

    def give_gradients(self) -> None:
        """Gives the tensors of the code the gradients that the job has for them. The code is then for no other job."""
        for tensor, gradient in self.of_code:
            tensor.grad = gradient
        if self.of_code:
            self.code_seen = Seen(self.loaded.code.objects)

    def result(self, compiled: Compiled, value: Any, draws: bool = False) -> bytes:
        """The file of what the program gave, and of the state of the generator where it may have drawn."""
        if self.loaded.code.program.kind == "block":
            value = exported(self.loaded.code.program, compiled, value)
        random = torch.get_rng_state() if draws else None
        return write_result(value, self.seen, self.code_seen, self.counts, random)

    def leave_changes(self, error: Exception, drawn_from: torch.Tensor | None) -> None:
        """Has an error take along what the program had changed before: of its objects, and of torch's generator."""
        random = torch.get_rng_state()
        drew = drawn_from is not None and not torch.equal(random, drawn_from)
        if not (drew or self.seen.changed() or self.code_seen.changed()):
            return
        try:
            leave(error, write_result(None, self.seen, self.code_seen, self.counts, random if drew else None))
        except FileError as unwritten:
            error.add_note(f"what it had changed before is not carried back: {unwritten}")


@contextmanager
def _random(state: torch.Tensor | None) -> Iterator[None]:
    """Has a job draw what it would draw where it was called, and leaves the generator as it is here."""
    if state is None:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(checked(state, RANDOM))
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def undisturbed(job: Job) -> Iterator[None]:
    """Runs a job in torch's modes as they are where it was called, and leaves them as they are here."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(job.default_dtype)
    try:
        with torch.set_grad_enabled(job.grad_enabled):
            yield
    finally:
        torch.set_default_dtype(dtype)
