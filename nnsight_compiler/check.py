"""Checking experiments without weights and without running them: every mistake that can be found from the model's
configuration, each at its line, and what could not be checked.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from linecache import getlines
from pathlib import Path
from types import CellType
from typing import Any, TypeVar, final

import torch
from torch import nn

from nnsight_compiler.compilation import lower_program
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.models import LanguageModel, NNsight
from nnsight_compiler.models.language import weights_withheld
from nnsight_compiler.observations import observed
from nnsight_compiler.passes.check_names import bound_names, check_names
from nnsight_compiler.passes.check_unused_values import UnusedValueWarning
from nnsight_compiler.passes.manager import PassResult
from nnsight_compiler.passes.shapes import Extent
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.passes.subject import Inputs, Subject
from nnsight_compiler.passes.survey import Unchecked, UncheckedError, survey
from nnsight_compiler.runtime.observation import Observation
from nnsight_compiler.shapes import extent_of

Placed = TypeVar("Placed", Diagnostic, Unchecked)
MODEL = "model"
"""The parameter that takes the model, where it is not the first."""


@final
@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. It is true where no mistake was found.

    diagnostics: the mistakes, by their lines.
    unchecked: the places that could not be checked, and why.
    warnings: what is allowed, and probably not meant.
    """

    diagnostics: tuple[Diagnostic, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.diagnostics

    def __bool__(self) -> bool:
        return self.ok

    def raise_mistakes(self) -> None:
        """Raises the mistakes as the `CompileError` that a call would raise. Does nothing where there are none."""
        if self.diagnostics:
            raise CompileError(self.diagnostics)

    def __str__(self) -> str:
        parts = [str(each) for each in self.diagnostics]
        parts += [f"warning: {each}" for each in self.warnings]
        parts += [f"not checked: {each}" for each in self.unchecked]
        return "\n\n".join([*parts, self.summary])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what IPython asks for
        printer.text(str(self))

    @property
    def summary(self) -> str:
        """One line: how many mistakes, and how many places that could not be checked."""
        found = [_count(len(self.diagnostics), "mistake") if self.diagnostics else "no mistakes found"]
        if self.warnings:
            found.append(_count(len(self.warnings), "warning"))
        if self.unchecked:
            found.append(f"{_count(len(self.unchecked), 'place')} not checked")
        return ", ".join(found)

    @classmethod
    def of(
        cls,
        diagnostics: Iterable[Diagnostic] = (),
        unchecked: Iterable[Unchecked] = (),
        warnings: Iterable[Diagnostic] = (),
    ) -> Report:
        """A report in the order of the lines, each place once."""
        return cls(_in_order(diagnostics), _in_order(unchecked), _in_order(warnings))

    def __add__(self, other: Report) -> Report:
        return Report.of(
            (*self.diagnostics, *other.diagnostics),
            (*self.unchecked, *other.unchecked),
            (*self.warnings, *other.warnings),
        )


@final
@dataclass(slots=True)
class Checker:
    """Takes the place of what `lower_program` does on a mistake: notes it, and lets the passes go on."""

    diagnostics: list[Diagnostic] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)

    def specialise(self, program: Program, subject: Subject) -> Specialised:
        """The program as far as it can be specialised."""
        found = survey(program, subject)
        self.diagnostics += found.diagnostics
        self.unchecked += found.unchecked
        models, inputs = found.specialised.models, found.specialised.inputs
        known = {
            name: None if given is None or models[name]._is_untold(*given) else given for name, given in inputs.items()
        }
        return replace(found.specialised, inputs=known)

    def refused(self, error: CompileError) -> None:
        """Notes what a pass refused."""
        if isinstance(error, UncheckedError):
            self.unchecked += error.unchecked
        self.diagnostics += error.diagnostics

    def extent(
        self,
        model: Any,
        inputs: Inputs | None,
        example: Inputs | None = None,
        operations: Collection[str] = (),
    ) -> Extent | None:
        """The shapes in a forward; `None` where the model cannot be observed, which `order` says why, or where the
        input is not known: no mistake of shape is then sure."""
        if inputs is None:
            return None
        try:
            return extent_of(model, inputs, example, operations)
        except Exception:  # the model's own code, the tokenizer's, torch's
            return None

    def order(
        self, forward: ops.Forward, model: Any, inputs: Inputs | None, operations: Collection[str] = ()
    ) -> Observation:
        """The order of a forward's sites, observed without weights.

        Raises:
            CompileError: the model refuses the input.
            UncheckedError: the order cannot be observed.
        """
        example = model._example()
        if inputs is None and example is None:
            reason = "in which order modules run here depends on the input, which is not known"
            raise UncheckedError(Unchecked(forward.span, reason))
        try:
            return observed(model, example if inputs is None else inputs, operations=operations)
        except Exception as error:  # the model's own code, the tokenizer's, torch's
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            wrong = inputs is not None and (isinstance(error, TypeError) or _runs(model, example))
        if wrong:
            raise CompileError([Diagnostic(forward.span, f"the model cannot run on this input: {reason}")])
        raise UncheckedError(Unchecked(forward.span, f"in which order modules run here: {reason}"))


def _runs(model: Any, example: Inputs | None) -> bool:
    """Whether a model can be observed on its own example; where it has none, whether it has all that a run needs."""
    if example is None:
        return not any(parameter.is_meta for parameter in model._module.parameters())
    try:
        observed(model, example)
    except Exception:  # as above: whatever the model's code raises
        return False
    return True


def check_call(
    signature: inspect.Signature,
    program: Program,
    globals_: Mapping[str, Any],
    closure: Mapping[str, CellType],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Report:
    """Checks an experiment for a call with these arguments, of which any may be missing."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.default is not parameter.empty:
            bound.setdefault(name, parameter.default)
    first = next(iter(signature.parameters), "")
    for name in {first, MODEL} & bound.keys():
        bound[name] = as_model(bound[name])
    return check_program(program, bound, globals_, closure)


def check_program(
    program: Program, arguments: Mapping[str, Any], globals_: Mapping[str, Any], closure: Mapping[str, CellType]
) -> Report:
    """Checks a program for these arguments. No weights are loaded, and nothing of it is run."""
    checker = Checker()
    left: dict[str, Program] = {}

    def observe(result: PassResult) -> None:
        left[result.name] = result.program

    with warnings.catch_warnings(record=True) as caught, weights_withheld(), _quiet_torch():
        warnings.simplefilter("always", UnusedValueWarning)
        lower_program(program, arguments, globals_, closure, observe, checker)
    try:
        check_names(left.get("infer", left["specialise"]), globals_, bound_names("".join(getlines(program.span.file))))
    except CompileError as error:
        checker.refused(error)
    warned = []
    for each in caught:
        if not issubclass(each.category, UnusedValueWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif not checker.diagnostics and not checker.unchecked:  # else what could not be looked at may use the value
            warned.append(Diagnostic(Span(each.filename, each.lineno), str(each.message)))
    return Report.of(checker.diagnostics, checker.unchecked, warned)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keeps torch from printing a traceback for what does not fit on tensors without data: it is raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def as_model(value: Any) -> Any:
    """A model for a check from its name, its folder, or its configuration, without weights. Anything else as it is."""
    if isinstance(value, (str, Path)):
        return LanguageModel(value)
    if not hasattr(value, "model_type") or isinstance(value, (nn.Module, NNsight)):
        return value
    from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

    if not isinstance(value, PretrainedConfig):
        return value
    causal = type(value) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        kind: Any = AutoModelForCausalLM if causal else AutoModel  # their methods are not typed
        module = kind.from_config(value).eval()
    return Configured(module) if causal else NNsight(module)


@final
class Configured(LanguageModel):
    """A language model of which only the configuration is known: how text becomes tokens is not told."""

    def _is_untold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        prompt = args[0] if args else kwargs.get("input_ids")
        return isinstance(prompt, str) or (isinstance(prompt, list) and any(isinstance(each, str) for each in prompt))


def _in_order(found: Iterable[Placed]) -> tuple[Placed, ...]:
    """By their lines, and only the first of each place: the rounds of an unrolled loop repeat themselves."""
    first: dict[Span, Placed] = {}
    for each in found:
        first.setdefault(each.span, each)
    return tuple(sorted(first.values(), key=lambda each: (each.span.file, each.span.line, each.span.column)))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
