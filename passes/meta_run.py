"""One run of a specialised program on stand-ins, which follows its control flow as far as that is known.

What surely runs is told from what may not: a branch under an unknown condition, the body of a `try`, a loop that may
have no rounds, and what stands after a conditional `return`. Mistakes are found in the former alone.

A host call may change every container that it is given or that it can reach from outside; what those hold is not known
any more. Where the program itself changes the shape of a tensor in place (`unsqueeze_`), nothing after it is.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, final
from typing import Literal as OneOf

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.errors import Diagnostic
from nnsight_compiler.ir.ops import Op, Region
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined, regions, used, walk
from nnsight_compiler.ir.values import Literal, Module, Operand, Slice, Tuple, Unbound, Value
from nnsight_compiler.passes.assignments import misfit
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall
from nnsight_compiler.passes.known_calls import ALL, behaviour_of
from nnsight_compiler.passes.meta_calls import (
    RESHAPING,
    Mistake,
    apply_operator,
    attribute,
    call_known,
    check_item_assignment,
    item,
    truth,
)
from nnsight_compiler.passes.meta_modules import call_module, weight_of
from nnsight_compiler.passes.shapes import Sites, Surroundings
from nnsight_compiler.passes.stand_ins import (
    INTEGER,
    PLAIN,
    UNKNOWN,
    Items,
    Method,
    copied,
    inside,
    is_container,
    parts,
    same,
    stand_in,
)

GRAD_MODES = ("torch.no_grad", "torch.enable_grad", "torch.inference_mode", "torch.set_grad_enabled")
_TRANSPARENT = ("tqdm.tqdm", "tqdm.auto.tqdm", "tqdm.std.tqdm", "tqdm.asyncio.tqdm_asyncio", "tqdm.notebook.tqdm")
_ROUNDS = 4

Shape = tuple[torch.dtype, tuple[int, ...]]
"""What is kept of a tensor."""

Site = tuple[str, str, str, int]


@final
@dataclass(frozen=True, slots=True)
class Size:
    """The size of one forward in a run."""

    sites: Sites
    rows: int
    tokens: int
    varies: frozenset[str]


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A mistake of the program's, and the value and dimension whose axis its text names."""

    diagnostic: Diagnostic
    value: str | None
    dimension: int | None


@dataclass(slots=True)
class _Loop:
    """A loop that is being run: the values with which rounds ended, and whether the rest of a round may be left out."""

    continued: list[tuple[Any, ...]] = field(default_factory=list)
    broken: list[tuple[Any, ...]] = field(default_factory=list)
    left: bool = False


Leaving = OneOf["yield", "leave", "end"]
"""How a region ended: by a `yield`, by leaving it, or at its end."""


def _parameters(region: Region) -> Iterator[str]:
    """The names of the parameters of a region, and of those inside it."""
    yield from (value.name for value in region.parameters)
    for op in region.ops:
        for inner in regions(op):
            yield from _parameters(inner)


def _can_hold(held: Any, index: Any) -> bool:
    """Whether a container of the program's takes an item there."""
    if type(held) is list:
        return type(index) is int and -len(held) <= index < len(held)
    return type(held) is dict and type(index) in PLAIN


class Restart(Exception):  # noqa: N818  # control flow, not an error
    """What a forward's sites hold is not known after all."""


class MetaRun:
    """One run. `shapes` has, for each value that was a tensor whenever it was made, its dtype and sizes."""

    def __init__(
        self, program: Program, surroundings: Surroundings, sizes: Mapping[str, Size], opaque: set[str]
    ) -> None:
        self.program = program
        self.surroundings = surroundings
        self.sizes = sizes
        self.opaque = opaque
        self.shapes: dict[str, Shape | None] = {}
        self.mistakes: list[Found] = []
        self._values: dict[str, Any] = {}
        self._cells: dict[str, Any] = {}
        self._memo: dict[int, Any] = {}
        self._lost: dict[int, Any] = {}
        self._peers: dict[int, list[Any]] = {}
        self._kept: list[Any] = []
        self._merged: list[torch.Tensor] = []  # what some value that is not known may be
        self._assigned = {op.name for op in program.walk() if isinstance(op, ops.SetGlobal)}
        self._sites: dict[Site, Any] = {}
        self._live: dict[int, tuple[Any, Site]] = {}
        self._forward: tuple[str, Size | None] | None = None
        self._loops: list[_Loop] = []
        self._harmless: set[str] = set()
        self._unsure = 0
        self._left = False
        self._blind = False
        self._hosted = False
        self._version = 0

    def run(self) -> None:
        for parameter in self.program.parameters:
            name = parameter.value.name
            known = name in self.surroundings.arguments
            self._values[name] = self._outside(self.surroundings.arguments[name]) if known else UNKNOWN
            self._record(parameter.value)
        self._region(self.program.body)

    # --- values ---

    def value(self, operand: Operand) -> Any:
        """The stand-in of an operand; what was lost is not known."""
        match operand:
            case Value(name=name):
                held = self._values.get(name, UNKNOWN)
                return UNKNOWN if id(held) in self._lost else held
            case Literal(value=value):
                return value
            case Tuple(parts=operands):
                return tuple(map(self.value, operands))
            case Slice(lower=lower, upper=upper, step=step):
                return slice(self.value(lower), self.value(upper), self.value(step))
            case Module() | Unbound():
                return UNKNOWN

    def _define(self, value: Value, held: Any) -> None:
        self._values[value.name] = UNKNOWN if self._blind or id(held) in self._lost else held
        self._record(value)

    def _record(self, value: Value) -> None:
        held = self._values[value.name]
        shape = (held.dtype, tuple(held.shape)) if isinstance(held, torch.Tensor) else None
        known = self.shapes.setdefault(value.name, shape)
        if known != shape:
            self.shapes[value.name] = None

    def _outside(self, value: Any) -> Any:
        return stand_in(value, self._memo)

    def _lose(self, *values: Any) -> None:
        """Has these values, what they hold, and what they may be the same as, not known any more."""
        self._forget([each for value in values for each in inside(value)])

    def _lose_containers(self, *values: Any) -> None:
        """The same for containers alone: which tensors they hold is not known any more, but what those are is."""
        self._forget([each for value in values for each in inside(value) if is_container(each)])

    def _forget(self, waiting: list[Any]) -> None:
        while waiting:
            held = waiting.pop()
            if (is_container(held) or isinstance(held, torch.Tensor)) and id(held) not in self._lost:
                self._lost[id(held)] = held
                self._version += 1
                waiting.extend(self._peers.get(id(held), ()))

    def _join(self, first: Any, second: Any) -> Any:
        """What is known of a value that is the one or the other."""
        if first is second:
            return first
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and same(first, second):
            joined = first.detach()
            for each in (first, second):
                self._peers.setdefault(id(joined), []).append(each)
                self._peers.setdefault(id(each), []).append(joined)
            self._kept.extend((first, second, joined))  # lest others take their identities
            return joined
        if type(first) is tuple and type(second) is tuple and len(first) == len(second):
            return tuple(map(self._join, first, second))
        if same(first, second):
            return first
        if all(each is INTEGER or type(each) is int for each in (first, second)):
            return INTEGER
        self._lose_containers(first, second)
        self._merged.extend(each for each in inside((first, second)) if isinstance(each, torch.Tensor))
        return UNKNOWN

    def _join_all(self, values: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        joined = values[0]
        for each in values[1:]:
            joined = tuple(map(self._join, joined, each))
        return joined

    # --- what surely runs ---

    @property
    def sure(self) -> bool:
        return not (self._unsure or self._left or self._blind or any(loop.left for loop in self._loops))

    @contextmanager
    def _maybe(self, maybe: bool = True) -> Iterator[None]:
        """A part of the program that may not run."""
        self._unsure += maybe
        try:
            yield
        finally:
            self._unsure -= maybe

    def _report(self, op: Op, mistake: Mistake, operand: Operand | None = None) -> None:
        if self.sure and not any(found.diagnostic.span == op.span for found in self.mistakes):
            name = operand.name if isinstance(operand, Value) else None
            diagnostic = Diagnostic(op.span, mistake.reason, mistake.way_out)
            self.mistakes.append(Found(diagnostic, name, mistake.dimension))

    def _try(self, op: Op, compute: Callable[[], Any], operand: Operand | None = None) -> Any:
        if self._blind:
            return UNKNOWN
        try:
            return compute()
        except Mistake as mistake:
            self._report(op, mistake, operand)
            return UNKNOWN

    # --- regions ---

    def _region(self, region: Region) -> tuple[Leaving, tuple[Any, ...]]:
        for op in region.ops:
            found = self._op(op)
            if found is not None:
                return found
        return "end", ()

    def _op(self, op: Op) -> tuple[Leaving, tuple[Any, ...]] | None:
        """Runs one op; says how control leaves the region, where it does."""
        match op:
            case ops.Yield(values=values):
                return "yield", tuple(map(self.value, values))
            case ops.Continue(values=values) if self._loops:
                self._loops[-1].continued.append(tuple(map(self.value, values)))
                return "leave", ()
            case ops.Break(values=values) if self._loops:
                self._loops[-1].broken.append(tuple(map(self.value, values)))
                return "leave", ()
            case ops.Return() | ops.Raise() | ops.Continue() | ops.Break():
                return "leave", ()
            case ops.If():
                return self._if(op)
            case ops.For() | ops.While():
                self._loop(op)
            case ops.Try():
                self._try_statement(op)
            case ops.With():
                return self._with(op)
            case ops.Forward():
                return self._forward_body(op)
            case ops.Closure():
                self._closure(op)
            case _:
                self._simple(op)
        return None

    def _if(self, op: ops.If) -> tuple[Leaving, tuple[Any, ...]] | None:
        known = truth(self.value(op.condition))
        if known is not None and not self._blind:
            how, values = self._region(op.then if known else op.orelse)
            if how == "leave":
                return how, values
            self._define_all(op.results, values)
            return None
        self._lose_changed(op)
        with self._maybe():
            ended = [self._region(op.then), self._region(op.orelse)]
        going_on = [values for how, values in ended if how != "leave"]
        if len(going_on) < 2:
            # Whether what follows still runs is not known: it may have been left for good, or for this round.
            if self._loops:
                self._loops[-1].left = True
            if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
                self._left = True
        if not going_on:
            return "leave", ()
        self._define_all(op.results, self._join_all(going_on))
        return None

    def _define_all(self, results: tuple[Value, ...], values: tuple[Any, ...]) -> None:
        for number, result in enumerate(results):
            self._define(result, values[number] if number < len(values) else UNKNOWN)

    def _try_statement(self, op: ops.Try) -> None:
        self._lose_changed(op)
        with self._maybe():
            for part in regions(op):
                self._region(part)
        if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
            self._left = True

    def _with(self, op: ops.With) -> tuple[Leaving, tuple[Any, ...]] | None:
        known = self._definition_target(op.context) in GRAD_MODES
        if not known:
            self._host(self.value(op.context))
        self._define(op.result, UNKNOWN)
        before = self._blind
        self._blind |= not known  # such as autocast, under which results have other dtypes
        how, values = self._region(op.body)
        self._blind = before
        return (how, values) if how == "leave" else None

    def _definition_target(self, operand: Operand) -> str | None:
        if isinstance(operand, Value):
            for op in self.program.walk():
                if isinstance(op, ops.Call) and op.result.name == operand.name:
                    return op.target
        return None

    def _forward_body(self, op: ops.Forward) -> tuple[Leaving, tuple[Any, ...]] | None:
        outer, name = self._forward, op.result.name
        self._define(op.result, UNKNOWN)
        self._forward = name, None if name in self.opaque else self.sizes.get(name)
        how, values = self._region(op.body)
        self._forward = outer
        return (how, values) if how == "leave" else None

    # --- loops ---

    def _loop(self, op: ops.For | ops.While) -> None:
        self._lose_changed(op)
        initial = tuple(map(self.value, op.initial))
        runs, each = self._entries(self.value(op.iterable)) if isinstance(op, ops.For) else (False, ())
        carried, loop = initial, _Loop()
        for number in range(_ROUNDS):
            before, loop = self._version, _Loop()
            last = number == _ROUNDS - 1
            if last:
                self._lose_containers(*carried)
                carried = tuple(UNKNOWN for _ in carried)
            self._loops.append(loop)
            with self._maybe(number > 0 or not runs):
                if isinstance(op, ops.While):
                    self._bind(op.condition.parameters, carried)
                    how, tested = self._region(op.condition)
                    carried_in = tested[1:] if how == "yield" else carried
                    self._bind(op.body.parameters, carried_in)
                else:
                    self._bind(op.body.parameters, (each, *carried))
                self._region(op.body)
            self._loops.pop()
            after = [carried, *loop.continued]
            joined = self._join_all([values for values in after if len(values) == len(carried)])
            if all(map(same, joined, carried)) and self._version == before:
                break
            carried = joined
        self._finish(op, runs, initial, carried, loop)

    def _finish(
        self, op: ops.For | ops.While, runs: bool, initial: tuple[Any, ...], carried: tuple[Any, ...], loop: _Loop
    ) -> None:
        ends = [values for values in (*loop.continued, *loop.broken) if len(values) == len(carried)]
        if isinstance(op, ops.While) or not runs or not ends:
            ends.insert(0, carried)
        joined = self._join_all(ends)
        if op.orelse is not None:
            with self._maybe():
                self._bind(op.orelse.parameters, joined)
                _, values = self._region(op.orelse)
            given = [values, *(each for each in loop.broken if len(each) == len(op.results))]
            joined = self._join_all([each for each in given if len(each) == len(op.results)] or [()])
        self._define_all(op.results, joined)
        if any(isinstance(inner, (ops.Return, ops.Raise)) for part in regions(op) for inner in walk(part)):
            self._left = True

    def _bind(self, parameters: tuple[Value, ...], values: tuple[Any, ...]) -> None:
        for number, parameter in enumerate(parameters):
            self._define(parameter, values[number] if number < len(values) else UNKNOWN)

    def _entries(self, iterable: Any) -> tuple[bool, Any]:
        """Whether a loop over a value has a round for sure, and what is known of all its entries at once."""
        match iterable:
            case torch.Tensor():
                sure = iterable.ndim > 0 and iterable.shape[0] > 0
                return sure, iterable[0] if sure else UNKNOWN
            case range():
                return len(iterable) > 0, iterable[0] if len(iterable) == 1 else INTEGER
            case list() | tuple() | Items():
                held = parts(iterable) if not isinstance(iterable, torch.Size) else list(iterable)
            case dict():
                held = list(iterable)
            case _:
                if type(iterable) in (type({}.items()), type({}.values()), type({}.keys())):
                    held = list(iterable)
                else:
                    return False, UNKNOWN
        if not held:
            return False, UNKNOWN
        held = [UNKNOWN if id(each) in self._lost else each for each in held]
        return True, self._join_all([(each,) for each in held])[0]

    # --- what may have been changed ---

    def _lose_changed(self, op: Op) -> None:
        """Before a part of the program of which it is not known whether, or how often, it runs: containers that it may
        change are not followed any further."""
        inner = [each for region in regions(op) for each in walk(region)]
        changing = [each for each in inner if self._changes_containers(each)]
        made = {value.name: each for each in inner for value in defined(each)}
        own = {name for region in regions(op) for name in _parameters(region)} | made.keys()
        for each in changing:
            target = self._changed(each, made)
            if target is None or target in own:
                # It may be any that is reached from what the part uses.
                names = {value.name for each in (op, *inner) for value in used(each)}
                self._lose_containers(*(self._values[name] for name in names if name in self._values))
                self._lose_containers(*self._cells.values())
                return
            self._forget([self._values.get(target)])

    @staticmethod
    def _changed(op: Op, made: Mapping[str, Op]) -> str | None:
        """The name of the container that an op changes; `None` where it may be any."""
        match op:
            case ops.SetItem(object=Value(name=name)) | ops.Operator(operands=(Value(name=name), *_)):
                return name
            case ops.Call(function=Value(name=function), target=str() as target) if target.startswith("method."):
                method = made.get(function)
                if isinstance(method, ops.Attribute) and isinstance(method.object, Value):
                    receiver = made.get(method.object.name)
                    if isinstance(receiver, ops.Build) and not receiver.elements:
                        return ""  # it is made here
                    return method.object.name
        return None

    def _changes_containers(self, op: Op) -> bool:
        match op:
            case ops.SetItem() | ops.Delete() | ops.SetAttribute():
                return True
            case ops.Operator(in_place=in_place):
                return in_place
            case ops.Call():
                known = self._known(op)
                return known is None or known.behaviour is Behaviour.CONTAINER
        return False

    def _closure(self, op: ops.Closure) -> None:
        """A closure may run at any time from here on, and change what it sees."""
        inner = list(walk(op.body))
        own = {value.name for each in inner for value in defined(each)}
        seen = {value.name for each in inner for value in used(each)} - own
        for name in seen & self._cells.keys():
            self._store(name, UNKNOWN, always=True)
        if any(map(self._changes_containers, inner)) or any(map(self._reshapes, inner)):
            self._lose(*(self._values[name] for name in seen if name in self._values))
        else:
            self._harmless.add(op.result.name)
        self._define(op.result, UNKNOWN)
        for each in inner:
            for value in defined(each):
                self.shapes[value.name] = None

    @staticmethod
    def _reshapes(op: Op) -> bool:
        return isinstance(op, ops.Call) and op.target is not None and op.target.rpartition(".")[2] in RESHAPING

    def _host(self, *given: Any) -> None:
        """Code that is not known runs, with these values."""
        self._lose(*given)
        if any(each is UNKNOWN for value in given for each in inside(value)):
            self._lose(*self._merged)
        for _, made in list(self._memo.values()):
            if is_container(made):
                self._lose(made)
        self._lose_containers(*self._cells.values())
        for site in [site for held, site in self._live.values() if any(held is each for each in given)]:
            self._open(site[0])
        if not self._hosted:
            self._hosted = True
            self._version += 1

    def _open(self, forward: str) -> None:
        """What the sites of a forward hold may be anything from now on."""
        if forward not in self.opaque:
            self.opaque.add(forward)
            raise Restart

    # --- ops without regions ---

    def _simple(self, op: Op) -> None:
        match op:
            case ops.Global():
                self._define(op.result, self._name(op))
            case ops.Cell():
                self._values[op.result.name] = UNKNOWN
                self._store(op.result.name, UNKNOWN if isinstance(op.initial, Unbound) else self.value(op.initial))
            case ops.Store():
                if isinstance(op.cell, Value):
                    self._store(op.cell.name, self.value(op.value))
            case ops.Load():
                held = self._cells.get(op.cell.name, UNKNOWN) if isinstance(op.cell, Value) else UNKNOWN
                self._define(op.result, held)
            case ops.Bound() | ops.Save():
                self._define(op.result, self.value(op.value))
            case ops.Attribute():
                self._define(op.result, self._attribute(op))
            case ops.Item():
                held, index = self.value(op.object), self.value(op.index)
                self._define(op.result, self._try(op, lambda: self._item(held, index), op.object))
            case ops.Operator():
                self._operator(op)
            case ops.Call():
                self._define(op.result, self._call(op))
            case ops.Build():
                self._define(op.result, self._build(op))
            case ops.Unpack():
                self._unpack(op)
            case ops.SetItem():
                self._set_item(op)
            case ops.Read():
                self._define(op.result, self._read(op))
            case ops.Write():
                self._write(op)
            case ops.Delete() | ops.SetAttribute():
                self._lose_containers(self.value(op.object))
            case ops.SetGlobal():
                self._lose_containers(self.value(op.value))
            case ops.Import():
                self._host()
                self._define(op.result, UNKNOWN)
            case ops.Format(result=result):
                self._define(result, UNKNOWN)
            case _:
                self._lose_changed(op)
                for value in defined(op):
                    self._define(value, UNKNOWN)

    def _name(self, op: ops.Global) -> Any:
        """A name from outside, as it is at this call; a host call may assign it."""
        if op.name in self._assigned:
            return UNKNOWN
        if op.scope == "free":
            cell = self.surroundings.closure.get(op.name)
            try:
                found = UNKNOWN if cell is None else cell.cell_contents
            except ValueError:
                return UNKNOWN
        else:
            found = self.surroundings.globals.get(op.name, vars(builtins).get(op.name, UNKNOWN))
        if isinstance(found, (ModuleType, type)) or callable(found):
            return found
        return UNKNOWN if self._hosted else self._outside(found)

    def _store(self, name: str, held: Any, always: bool = False) -> None:
        before = self._cells.get(name, UNKNOWN)
        if name in self._cells and (always or not self.sure):
            held = self._join(before, held)
        if name in self._cells and not same(before, held):
            self._version += 1
        self._cells[name] = held

    def _attribute(self, op: ops.Attribute) -> Any:
        if isinstance(op.object, Module):
            return weight_of(self._outside_model(op.object), op.object.path, op.name)
        held = self.value(op.object)
        return self._try(op, lambda: attribute(held, op.name))

    def _outside_model(self, module: Module) -> Any:
        """The wrapped model that a resolved module belongs to."""
        name = module.model.name
        if name in self.surroundings.arguments:
            return self.surroundings.arguments[name]
        for op in self.program.walk():
            if isinstance(op, ops.Global) and op.result.name == name:
                cell = self.surroundings.closure.get(op.name)
                return self.surroundings.globals.get(op.name) if cell is None else cell.cell_contents
        return None

    def _item(self, held: Any, index: Any) -> Any:
        if isinstance(held, (list, tuple)) and index is INTEGER and held:
            return self._join_all([(each,) for each in held])[0]
        found = item(held, index)
        if found is UNKNOWN and not isinstance(held, torch.Tensor):
            self._lose(*(each for each in inside(held) if each is not held and is_container(each)))
        return found

    def _operator(self, op: ops.Operator) -> None:
        operands = tuple(map(self.value, op.operands))
        if op.in_place and is_container(operands[0]):
            self._lose(operands[0])
        result = self._try(op, lambda: apply_operator(op.operator, operands, op.in_place))
        if result is UNKNOWN:
            self._lose_containers(*operands)
        self._define(op.result, result)

    def _build(self, op: ops.Build) -> Any:
        if any(element.starred for element in op.elements) or op.kind == "set":
            self._lose_containers(*(self.value(element.value) for element in op.elements))
            return UNKNOWN
        held = [self.value(element.value) for element in op.elements]
        if op.kind != "dict":
            return held if op.kind == "list" else tuple(held)
        keys = [None if element.key is None else self.value(element.key) for element in op.elements]
        if all(type(key) in PLAIN for key in keys):
            return dict(zip(keys, held, strict=True))
        self._lose_containers(*held)
        return UNKNOWN

    def _unpack(self, op: ops.Unpack) -> None:
        held = self.value(op.value)
        if isinstance(held, torch.Tensor) and held.ndim and op.star < 0 and held.shape[0] == len(op.results):
            self._define_all(op.results, tuple(held[number] for number in range(held.shape[0])))
        elif isinstance(held, (tuple, list)) and op.star < 0 and len(held) == len(op.results):
            self._define_all(op.results, tuple(held))
        else:
            length = held.shape[0] if isinstance(held, torch.Tensor) and held.ndim else None
            length = len(held) if isinstance(held, tuple) else length
            names = len(op.results) - (op.star >= 0)
            if length is not None and (length < names if op.star >= 0 else length != names):
                least = "at least " if op.star >= 0 else ""
                self._report(op, Mistake(f"{length} values are unpacked into {least}{names} names"), op.value)
            self._lose_containers(held)
            self._define_all(op.results, ())

    def _set_item(self, op: ops.SetItem) -> None:
        held, index, new = self.value(op.object), self.value(op.index), self.value(op.value)
        if isinstance(held, torch.Tensor):
            self._try(op, lambda: check_item_assignment(held, index, new), op.object)
        elif id(held) in self._live:
            old = self._try(op, lambda: item(held, index))
            if old is UNKNOWN or not same(old, new):
                self._open(self._live[id(held)][1][0])
        elif _can_hold(held, index):
            held[index] = new
        else:
            self._lose_containers(held, new)

    # --- sites ---

    def _site(self, op: ops.Read | ops.Write) -> tuple[Site, Any]:
        """A site, and what it holds."""
        assert self._forward is not None
        assert isinstance(op.module, Module)
        name, size = self._forward
        site = name, op.module.path, op.port, op.call or 0
        if site not in self._sites:
            self._sites[site] = self._held(size, site, op)
        return site, self._sites[site]

    def _held(self, size: Size | None, site: Site, op: ops.Read | ops.Write) -> Any:
        if size is None:
            return UNKNOWN
        held = copied(size.sites.value(site[1], op.port, site[3], size.rows, size.tokens))
        for each in inside(held):
            if not isinstance(each, torch.Tensor):
                self._live[id(each)] = each, site
        return held

    def _read(self, op: ops.Read) -> Any:
        return self._site(op)[1] if self._forward is not None else UNKNOWN

    def _write(self, op: ops.Write) -> None:
        if self._forward is None:
            return
        new = self.value(op.value)
        site, held = self._site(op)
        if op.port == "inputs":
            self._open(site[0])
            return
        if held is UNKNOWN or self._blind:
            return
        if new is not UNKNOWN and not isinstance(new, Method):
            wrong = misfit(held, new if new is not INTEGER else 0)
            if wrong is not None:
                self._report(op, Mistake(*wrong))
                return
        if not isinstance(held, torch.Tensor) and not same(held, new):
            self._open(site[0])
        self._sites[site] = copied(held)

    # --- calls ---

    def _known(self, op: ops.Call) -> KnownCall | None:
        row = ALL.get(op.target) if op.target is not None else None
        if row is None:
            return None
        return behaviour_of(row, {argument.keyword for argument in op.arguments if argument.keyword is not None})

    def _call(self, op: ops.Call) -> Any:
        function = self.value(op.function)
        given = self._arguments(op)
        if isinstance(op.function, Module):
            if given is None:
                return UNKNOWN
            model = self._outside_model(op.function)
            path = op.function.path
            return self._try(op, lambda: call_module(model, path, *given))
        known = self._known(op)
        if isinstance(op.function, Value) and op.function.name in self._harmless:
            return UNKNOWN
        if known is None:
            self._host(function, *(self.value(argument.value) for argument in op.arguments))
            return UNKNOWN
        if self._reshapes(op):
            self._blind = True
            self._version += 1
            for forward in {site[0] for site in self._sites}:
                self._open(forward)
            return UNKNOWN
        result = UNKNOWN if given is None else self._try(op, lambda: self._known_call(op, known, function, *given))
        if result is UNKNOWN:
            held = [function, *(self.value(argument.value) for argument in op.arguments)]
            if known.behaviour is not Behaviour.HARMLESS and not known.scalar:
                self._lose_containers(*held)
            if known.behaviour is Behaviour.MUTATES and "out" in {argument.keyword for argument in op.arguments}:
                self._lose(*held)
        return result

    def _known_call(
        self, op: ops.Call, known: KnownCall, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if known.target in _TRANSPARENT and args:
            return args[0]
        if known.target in ("builtins.enumerate", "builtins.zip", "builtins.reversed"):
            return self._iterator(known.target, args, kwargs)
        mutable = [each for each in (*args, *kwargs.values()) if is_container(each)]
        if known.behaviour is Behaviour.CONTAINER and mutable and not isinstance(function, Method):
            self._lose_containers(*mutable)
        lost = any(id(each) in self._lost for value in (*args, *kwargs.values()) for each in inside(value))
        if lost and known.behaviour is not Behaviour.CONTAINER:
            return UNKNOWN
        return call_known(known, function, args, dict(kwargs))

    def _iterator(self, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        held = [self._entries(each) for each in args]
        if kwargs or not args or (target != "builtins.zip" and len(args) > 1):
            return UNKNOWN
        if not all(sure for sure, _ in held):
            return UNKNOWN
        entries = tuple(each for _, each in held)
        match target:
            case "builtins.enumerate":
                return Items([(INTEGER, entries[0])])
            case "builtins.zip":
                return Items([entries])
            case _:
                return Items([entries[0]])

    def _arguments(self, op: ops.Call) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a call, starred ones spread out; `None` where they are not known."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument in op.arguments:
            held = self.value(argument.value)
            if argument.star == "*":
                if not isinstance(held, (tuple, list)):
                    return None
                args.extend(held)
            elif argument.star == "**":
                if type(held) is not dict or not all(isinstance(key, str) for key in held):
                    return None
                kwargs.update(held)
            elif argument.keyword is not None:
                kwargs[argument.keyword] = held
            else:
                args.append(held)
        return tuple(args), kwargs
