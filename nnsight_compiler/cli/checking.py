"""Checking the experiments and the undecorated traces of a file. Of the file, only its declarations are executed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.check import Report, check_call, check_program
from nnsight_compiler.cli.arguments import MODEL
from nnsight_compiler.cli.declarations import Declarations, declared
from nnsight_compiler.cli.refusal import RefusalError, unknown
from nnsight_compiler.cli.target import NO_EXPERIMENTS, Target
from nnsight_compiler.experiment import Experiment
from nnsight_compiler.files.edits import import_edits, is_edits
from nnsight_compiler.frontend import Lowered, lower_each
from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.span import Span
from nnsight_compiler.ir.values import Value
from nnsight_compiler.models.language import weights_withheld
from nnsight_compiler.passes.survey import Unchecked


@final
@dataclass(frozen=True, slots=True)
class Checked:
    """What was checked of a file, and what was found.

    experiments, blocks, edits: how many of each.
    """

    report: Report
    experiments: int
    blocks: int
    edits: int = 0

    def __str__(self) -> str:
        counted = [(self.experiments, "experiment"), (self.blocks, "trace"), (self.edits, "edit")]
        what = " and ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counted if number)
        return f"{self.report} in {what}"

    def as_json(self) -> str:
        """One JSON document."""
        report = self.report
        return json.dumps(
            {
                "ok": report.ok,
                "experiments": self.experiments,
                "traces": self.blocks,
                "mistakes": list(map(_diagnostic, report.diagnostics)),
                "warnings": list(map(_diagnostic, report.warnings)),
                "not_checked": list(map(_unchecked, report.unchecked)),
            },
            ensure_ascii=False,
            indent=2,
        )


def check_file(target: Target, model: Any, arguments: Mapping[str, object]) -> Checked:
    """Checks what a target names: an experiment, or everything in the file."""
    if target.saved and is_edits(target.file):
        _refuse_unknown(arguments, [])
        return _edits(target, model)
    if target.saved:
        return _saved(target.experiment(), model, arguments)
    found = lower_each(target.file)
    chosen = [each for each in found if _is_chosen(each, target.function)]
    if not chosen:
        if target.function is None:
            raise RefusalError(f"{target.file} holds no experiment and no trace", NO_EXPERIMENTS)
        names = [each.program.name for each in found if isinstance(each, Lowered) and each.program.kind != "block"]
        raise unknown(f"experiment in {target.file} called", target.function, names, NO_EXPERIMENTS)
    programs = [each for each in chosen if isinstance(each, Lowered)]
    experiments = [each.program for each in programs if each.program.kind != "block"]
    _refuse_unknown(arguments, [parameter.value.name for each in experiments for parameter in each.parameters])
    report = Report.of(
        [each for error in chosen if isinstance(error, CompileError) for each in error.diagnostics], (), ()
    )
    file = declared(target.file)
    report += Report.of(file.mistakes, (), ())
    for each in programs:
        for name in _traced_globals(each.program):
            file.names.setdefault(name, model)
    for each in programs:
        report += _checked(each, file, model, arguments)
    blocks = sum(each.program.kind == "block" for each in programs)
    return Checked(report, len(chosen) - blocks, blocks)


def _edits(target: Target, model: Any) -> Checked:
    """Checks the edits of a file."""
    mistakes: tuple[Diagnostic, ...] = ()
    with weights_withheld():
        try:
            edits = import_edits(model, target.file)
        except CompileError as error:
            mistakes, edits = error.diagnostics, ()
    return Checked(Report.of(mistakes, (), ()), 0, 0, len(edits) or 1)


def _saved(experiment: Experiment, model: Any, arguments: Mapping[str, object]) -> Checked:
    """Checks the experiment of an experiment file."""
    names = [parameter.value.name for parameter in experiment.ir.parameters]
    _refuse_unknown(arguments, names)
    given = dict(arguments)
    if MODEL in names:
        given[MODEL] = model
    elif experiment._namespace is not None and experiment._namespace.needs_model:
        experiment._namespace.model = model
    return Checked(experiment.check(**given), 1, 0)


def _checked(each: Lowered, file: Declarations, model: Any, arguments: Mapping[str, object]) -> Report:
    program = each.program
    if program.kind == "block":
        first, *_ = (parameter.value.name for parameter in program.parameters)
        given = {first: model}
        if not each.local:
            reads = (parameter.value.name for parameter in program.parameters[3:])
            given.update((name, file.names[name]) for name in reads if name in file.names)
        return check_program(program, given, file.names, {})
    names = [parameter.value.name for parameter in program.parameters]
    given = {name: value for name, value in arguments.items() if name in names}
    if MODEL in names:
        given[MODEL] = model
    held = file.names.get(program.name)
    if isinstance(held, Experiment) and list(held._signature.parameters) == names:
        return check_call(held._signature, program, file.names, {}, (), given)
    return check_program(program, given, file.names, {})


def _is_chosen(each: Lowered | CompileError, function: str | None) -> bool:
    if function is None:
        return True
    return isinstance(each, Lowered) and each.program.name == function and each.program.kind != "block"


def _refuse_unknown(arguments: Mapping[str, object], known: list[str]) -> None:
    if MODEL in arguments:
        raise RefusalError("--arg model=… cannot name a model", "use --model NAME")
    for name in arguments:
        if name not in known:
            raise unknown("parameter called", name, known, "the traces of a file take no arguments")


def _traced_globals(program: Program) -> Iterator[str]:
    """The globals whose forwards a program runs."""
    read = {op.result: op.name for op in program.walk() if isinstance(op, ops.Global) and op.scope == "global"}
    for op in program.walk():
        if isinstance(op, ops.Forward) and isinstance(op.model, Value) and op.model in read:
            yield read[op.model]


def _diagnostic(each: Diagnostic) -> dict[str, object]:
    related = [{**_place(span), "remark": remark} for span, remark in each.related]
    return {**_place(each.span), "reason": each.reason, "way_out": each.way_out, "related": related}


def _unchecked(each: Unchecked) -> dict[str, object]:
    return {**_place(each.span), "reason": each.reason}


def _place(span: Span) -> dict[str, object]:
    """Lines and columns from 1; the end is exclusive."""
    return {
        "file": span.file,
        "line": span.line,
        "column": span.column + 1,
        "end_line": span.end_line,
        "end_column": span.end_column + 1,
    }
