"""Whether an experiment runs elsewhere, and having it run there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import CellType
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import CompileError, Diagnostic, ExperimentError, FileError
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import rewrite, walk
from nnsight_compiler.ir.values import Literal, Value
from nnsight_compiler.models import NNsight
from nnsight_compiler.options import DEFAULT, Options
from nnsight_compiler.remote.backends import Remote, backend_for
from nnsight_compiler.remote.data import is_data
from nnsight_compiler.remote.errors import left
from nnsight_compiler.remote.listeners import OnToken, keep_listeners
from nnsight_compiler.remote.outside import ELSEWHERE, sent
from nnsight_compiler.remote.results import read_result
from nnsight_compiler.runtime.support import UNBOUND

if TYPE_CHECKING:
    from nnsight_compiler.remote.segments import Segment
    from nnsight_compiler.remote.split import Split


class Route(NamedTuple):
    """Where an experiment runs, and whether its caller waits for it."""

    remote: Remote
    blocking: bool = True


def checked(remote: object, blocking: object = True) -> Route | None:
    """The route that `remote=` and `blocking=` ask for; `None` where the experiment runs here.

    Raises:
        TypeError: they are neither.
    """
    if remote is None or remote is False:
        if blocking is not True:
            raise TypeError("`blocking=` goes with `remote=`: what runs in this process is waited for")
        return None
    if remote is not True and not (isinstance(remote, str) and (remote == "local" or "://" in remote)):
        raise TypeError(f'`remote=` is True, a URL such as "http://localhost:8473", or "local", not {remote!r:.80}')
    return Route(remote, bool(blocking))


def asked(program: Program) -> tuple[ops.Forward | ops.Session, ...]:
    """The traces and sessions of a program that say where they run."""
    return tuple(
        op
        for op in walk(program.body)
        if isinstance(op, (ops.Forward, ops.Session)) and any(a.keyword in ELSEWHERE for a in op.arguments)
    )


def stays(program: Program) -> Program:
    """The program without what its traces say about where they run."""

    def change(op: Op) -> Op:
        op = rewrite(op, region=lambda region: Region(region.parameters, tuple(map(change, region.ops))))
        if isinstance(op, (ops.Forward, ops.Session)) and any(a.keyword in ELSEWHERE for a in op.arguments):
            return replace(op, arguments=tuple(a for a in op.arguments if a.keyword not in ELSEWHERE))
        return op

    if not asked(program):
        return program
    return replace(program, body=Region(program.body.parameters, tuple(map(change, program.body.ops))))


def route_of(
    program: Program, values: Mapping[str, Any], globals_: Mapping[str, Any], closure: Mapping[str, CellType]
) -> Route | None:
    """Where a program runs on these values of its parameters: where its traces say, or else where its model is.

    Raises:
        CompileError: they say different things, or what only a run can give.
    """
    home = home_of(program, values, globals_, closure)
    if home is not None and not asked(program):
        return Route(home)
    found: dict[Route | None, ops.Forward | ops.Session] = {}
    made = {op.result: op for op in walk(program.body) if isinstance(op, ops.Global)}
    for op in asked(program):
        told = {}
        for argument in op.arguments:
            if argument.keyword in ELSEWHERE:
                match argument.value:
                    case Literal(value=value):
                        told[argument.keyword] = value
                    case Value(name=name) if name in values:
                        told[argument.keyword] = values[name]
                    case Value() as value if value in made and made[value].name in globals_:
                        told[argument.keyword] = globals_[made[value].name]
                    case Value() as value if value in made and made[value].name in closure:
                        told[argument.keyword] = closure[made[value].name].cell_contents
                    case _:
                        reason = f"`{argument.keyword}=` must be known when the experiment is called"
                        way_out = "write True, a URL, or a parameter of the experiment"
                        raise CompileError([Diagnostic(op.span, reason, way_out)])
        try:
            found.setdefault(checked(told.get("remote", home), told.get("blocking", True)), op)
        except TypeError as error:
            raise CompileError([Diagnostic(op.span, str(error))]) from None
    if len(found) > 1:
        first, second = list(found.values())[:2]
        reason = "traces of one experiment run in one place, and these say two"
        raise CompileError(
            [Diagnostic(second.span, reason, "say it at the call: `experiment(…, remote=…)`", ((first.span, "here"),))]
        )
    return next(iter(found), None)


def home_of(
    program: Program, values: Mapping[str, Any], globals_: Mapping[str, Any], closure: Mapping[str, CellType]
) -> str | None:
    """The service that holds the weights of a model which a program is given or reads; `None` where they are here."""
    held = list(values.values())
    for op in walk(program.body):
        if isinstance(op, ops.Global) and op.name in globals_:
            held.append(globals_[op.name])
        elif isinstance(op, ops.Global) and (cell := closure.get(op.name)) is not None and _is_set(cell):
            held.append(cell.cell_contents)
    return next((each._host for each in held if isinstance(each, NNsight) and each._host), None)


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One call of a program that runs elsewhere.

    values: of its parameters; those without one are left out. args, kwargs: how it was called.
    """

    program: Program
    globals: dict[str, Any]
    closure: Mapping[str, CellType]
    values: Mapping[str, Any]
    options: Options = DEFAULT
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)


def run(route: Route, call: Call) -> Any:
    """Runs a program elsewhere. What needs its caller's objects and functions runs here, before, between and after the
    jobs that need the model.

    Returns what it returns; of a block, a dict of the names that go back to the frame. Not blocking, a handle.

    Raises:
        CompileError: code that only this process has needs a live value inside a forward.
        FileError: it cannot be sent, each reason with its line; or what came back is damaged.
        Exception: whatever it raised there.
    """
    kept = keep_listeners(call.program, call.values, call.globals, call.closure)
    if kept.functions:
        if not route.blocking:
            raise ExperimentError(
                "`on_token=` is called as tokens come, and with `blocking=False` nobody waits for them\n"
                "  way out: leave one of the two out"
            )
        call = replace(call, program=kept.program, values=kept.values, closure=kept.closure)

    def tell(number: int, ids: torch.Tensor) -> None:
        if number >= len(kept.functions):
            raise FileError(f"tokens came for function {number} of a job that has {len(kept.functions)}")
        kept.functions[number](ids)

    on_token = tell if kept.functions else None
    split = split_of(call)
    if split is None:
        return _job(route, call, on_token)
    if call.program.kind == "block":
        raise FileError(
            f"{call.program.span}: this is sent whole, and uses code or an object that only this process has\n"
            "  way out: write it as a function with `@intervene`, which is sent in parts"
        )
    if not route.blocking:
        raise ExperimentError(
            f"{call.program.name} is no single job, since some of it runs in this process\n"
            "  way out: leave `blocking=False` out, or send what has no such code"
        )

    def segment(part: Segment, values: tuple[Any, ...]) -> Any:
        named = dict(zip((each.value.name for each in part.program.parameters), values, strict=True))
        return _job(route, Call(part.program, part.globals, part.closure, named, call.options), on_token)

    return split.function(segment)(*call.args, **call.kwargs)


def _job(route: Route, call: Call, on_token: OnToken | None) -> Any:
    job, data, code, model = sent(call.program, call.globals, call.closure, call.values, model_name, call.options)
    if model._base._attached and route.remote != "local":
        held = ", ".join(sorted(model._base._attached))
        raise ExperimentError(
            f"a service does not have the modules that were attached to the model here: {held}\n"
            "  way out: give them to the experiment as arguments, and call them in the trace"
        )
    backend = backend_for(route.remote, model)
    given, exports = (*data, *code), call.program.kind == "block"

    def carry_back(error: BaseException) -> None:
        """Changes here what the job had changed before it raised, as a run here would have left it."""
        changes = left(error)
        if changes is not None:
            try:
                read_result(changes, given, model)
            except FileError as damaged:
                error.add_note(f"what it had changed before cannot be read: {damaged}")

    if not route.blocking:

        def read(result: bytes) -> Any:
            value = read_result(result, given, model, exports)
            return {name: held for name, held in value.items() if held is not UNBOUND} if exports else value

        return backend.submit(job).reading(read, carry_back)
    try:
        result = backend.run(job, on_token)
    except Exception as error:
        carry_back(error)
        raise
    return read_result(result, given, model, exports)


class _Splits:
    """How programs were split, by what their parameters and names were then."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], tuple[Split | None, list[Any]]] = OrderedDict()

    def of(self, call: Call) -> Split | None:
        """The split of a program for one call; `None` where all of it can be sent."""
        outside = [call.values.get(parameter.value.name) for parameter in call.program.parameters]
        for name, scope in _names(call.program):
            held = call.globals.get(name) if scope == "global" else call.closure.get(name)
            outside.append(held.cell_contents if isinstance(held, CellType) and _is_set(held) else held)
        key = (id(call.program.body), *("" if is_data(each) else id(each) for each in outside))
        found = self._held.get(key)
        if found is None:
            from nnsight_compiler.remote.split import split_program  # it is built on experiments

            split = split_program(call.program, call.globals, call.closure, call.values, call.defaults)
            # What is told by its identity is kept alive.
            found = self._held[key] = split, [call.program.body, *(each for each in outside if not is_data(each))]
            while len(self._held) > _MOST_SPLITS:
                self._held.popitem(last=False)
        return found[0]


_MOST_SPLITS = 256
_splits = _Splits()


def split_of(call: Call) -> Split | None:
    """The parts of a program that has code of the caller's; `None` where all of it can be sent.

    Raises:
        CompileError: such code needs a live value inside a forward.
    """
    return _splits.of(call)


def _names(program: Program) -> tuple[tuple[str, str], ...]:
    """The names that a program reads from around it, each with its scope."""
    return tuple(dict.fromkeys((op.name, op.scope) for op in walk(program.body) if isinstance(op, ops.Global)))


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def model_name(model: Any) -> str:
    """The name of a model at a service.

    Raises:
        ExperimentError: this one was never loaded by a name.
    """
    name = getattr(model._base, "_source", "")
    if not isinstance(name, str):
        raise ExperimentError("a model is known to a service by its name, and this one has none")
    return name
