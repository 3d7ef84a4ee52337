"""What an index takes of a tensor whose last dimension is features: which positions, and which entries of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import regions
from nnsight_compiler.ir.types import Dimension, TensorType, Type
from nnsight_compiler.ir.values import NONE, Literal, Operand, Slice, Tuple, Value
from nnsight_compiler.passes.memory import Memory

EVERYTHING = Slice()

_ARITHMETIC = ("+", "-", "*", "//", "%")


@final
@dataclass(frozen=True, slots=True)
class Selection:
    """An index of a tensor of known rank, in two parts.

    lead: one operand for each dimension but the last: a whole number or a slice.
    entry: what it takes of the last dimension.
    """

    lead: tuple[Operand, ...]
    entry: Operand

    @property
    def takes_all(self) -> bool:
        """Whether all positions are taken."""
        return all(part == EVERYTHING for part in self.lead)

    @property
    def index(self) -> Operand:
        """The index of the positions alone, as short as can be."""
        parts = list(self.lead)
        while parts and parts[-1] == EVERYTHING:
            parts.pop()
        return parts[0] if len(parts) == 1 else Tuple(tuple(parts))

    @property
    def rest(self) -> Operand | None:
        """The index of the entries in what the positions are; `None` where all are taken."""
        if self.entry == EVERYTHING:
            return None
        left = sum(isinstance(part, Slice) for part in self.lead)
        return Tuple((*((EVERYTHING,) * left), self.entry))

    def __str__(self) -> str:
        parts = [shown(part) for part in self.lead]
        if self.entry != EVERYTHING:
            parts.append(shown(self.entry))
        return f"[{', '.join(parts)}]"

    def of(self, whole: Type, width: int, dtype: str | None) -> Type:
        """The type of what the positions are, as vectors of this width."""
        if not isinstance(whole, TensorType) or whole.shape is None:
            return TensorType(dtype)
        kept: list[Dimension] = []
        for part, dimension in zip(self.lead, whole.shape, strict=False):
            if isinstance(part, Slice):
                kept.append(dimension if part == EVERYTHING else Dimension())
        return TensorType(dtype, (*kept, Dimension(width)))


def shown(part: Operand) -> str:
    """A part of an index as the source writes it."""
    match part:
        case Slice(lower=lower, upper=upper, step=step):
            first, second, third = ("" if each == NONE else shown(each) for each in (lower, upper, step))
            return f"{first}:{second}" + (f":{third}" if third else "")
        case Literal(value=value):
            return repr(value)
        case Value(name=name):
            return name
        case Tuple(parts=parts):
            return f"({', '.join(map(shown, parts))}{',' * (len(parts) == 1)})"
        case _:
            return "…"


class Numbers:
    """Which values are whole numbers, so that as an index each takes one position.

    relied: the expressions over the arguments whose values this rests on, with these.
    """

    def __init__(self, program: Program, memory: Memory, arguments: Mapping[str, Any]) -> None:
        self.memory = memory
        self.arguments = arguments
        self.program = program
        self.parameters = {parameter.value.name for parameter in program.parameters}
        self.items = {op.body.parameters[0].name: op.iterable for op in program.walk() if isinstance(op, ops.For)}
        self.relied: dict[str, object] = {}

    def is_number(self, operand: Operand) -> bool:
        """Whether an operand is a whole number in every call that what is relied on holds for."""
        match operand:
            case Literal(value=value):
                return type(value) is int
            case Value(name=name) if name in self.parameters:
                return self._argument(name)
            case Value():
                iterable = self._iterated(operand)
                return self._item(iterable) if iterable is not None else self._computed(operand)
            case _:
                return False

    def _argument(self, name: str) -> bool:
        if type(self.arguments.get(name)) is not int:
            return False
        self.relied[f"{name}.__class__"] = int
        return True

    def _item(self, iterable: Operand) -> bool:
        match self.memory.origins.definition(iterable):
            case ops.Call(target="builtins.range"):
                return True
            case None if isinstance(iterable, Value) and iterable.name in self.parameters:
                return self._sequence(iterable)
            case _:
                return False

    def _sequence(self, parameter: Value) -> bool:
        held = self.arguments.get(parameter.name)
        if type(held) is range:
            self.relied[f"{parameter.name}.__class__"] = range
            return True
        if not isinstance(held, (list, tuple)) or type(held) not in (list, tuple):
            return False
        if any(type(each) is not int for each in held):
            return False
        if self._is_changed(parameter):
            return False
        kind = type(held).__name__
        text = f"{parameter.name}.__class__ is {kind} and all(each.__class__ is int for each in {parameter.name})"
        self.relied[text] = True
        return True

    def _computed(self, value: Value) -> bool:
        match self.memory.origins.definition(value):
            case ops.Operator(operator=sign, operands=parts) if sign in _ARITHMETIC:
                return all(map(self.is_number, parts))
            case ops.Call(target="builtins.len" | "builtins.int"):
                return True
            case ops.Bound(value=inner):
                return self.is_number(inner)
            case ops.Unpack(results=(first, *_), value=Value(name=name)) if name in self.items and first == value:
                return self._enumerated(self.items[name]) is not None
            case ops.Unpack(results=parts, value=Value() as item, star=-1):
                iterable = self._iterated(item)
                return iterable is not None and self._part_of_items(iterable, parts.index(value), len(parts))
            case ops.Item(object=Value() as item, index=Literal(value=int() as place)):
                iterable = self._iterated(item)
                return iterable is not None and self._part_of_items(iterable, place)
            case _:
                return False

    def _iterated(self, value: Value) -> Operand | None:
        """The iterable of which a loop takes a value, by itself or beside others; `None` where there is none."""
        if value.name in self.items:
            return self.items[value.name]
        match self.memory.origins.definition(value):
            case ops.Unpack(results=parts, value=Value(name=name), star=-1) if name in self.items:
                place = parts.index(value)
            case _:
                return None
        match self.memory.origins.definition(self.items[name]):
            case ops.Call(target="builtins.enumerate") if len(parts) == 2 and place == 1:
                return self._enumerated(self.items[name])
            case ops.Call(target="builtins.zip", arguments=arguments) if not any(each.star for each in arguments):
                given = [each.value for each in arguments if each.keyword is None]
                return given[place] if len(given) == len(parts) else None
            case _:
                return None

    def _part_of_items(self, iterable: Operand, place: int, count: int | None = None) -> bool:
        """Whether an argument is a list of tuples, of `count` parts where that is told, with a whole number at one
        place of each."""
        if not isinstance(iterable, Value) or self.memory.origins.definition(iterable) is not None:
            return False
        name = iterable.name
        held = self.arguments.get(name) if name in self.parameters else None
        kind = type(held)
        if kind not in (list, tuple) or self._is_changed(iterable):
            return False
        assert isinstance(held, (list, tuple))
        for each in held:
            if type(each) is not tuple or (count is not None and len(each) != count):
                return False
            if not -len(each) <= place < len(each) or type(each[place]) is not int:
                return False
        sized = f"len(each) == {count}" if count is not None else f"-len(each) <= {place} < len(each)"
        of_each = f"each.__class__ is tuple and {sized} and each[{place}].__class__ is int"
        self.relied[f"{name}.__class__ is {kind.__name__} and all({of_each} for each in {name})"] = True
        return True

    def has_items(self, iterable: Operand) -> bool:
        """Whether an iterable has an item in every call that what is relied on holds for."""
        match self.memory.origins.definition(iterable):
            case ops.Call(target="builtins.range", arguments=(Argument(value=Literal(value=int() as count)),)):
                return count > 0
            case ops.Call(target="builtins.enumerate", arguments=(Argument(value=counted, keyword=None, star=""),)):
                return self.has_items(counted)
            case None if isinstance(iterable, Value) and iterable.name in self.parameters:
                pass
            case _:
                return False
        held = self.arguments.get(iterable.name)
        kind = type(held)
        if kind not in (list, tuple, range) or not held or self._is_changed(iterable):
            return False
        self.relied[f"{iterable.name}.__class__ is {kind.__name__} and len({iterable.name}) > 0"] = True
        return True

    def _is_changed(self, parameter: Value) -> bool:
        """Whether something may write to an argument. A backward pass itself writes gradients alone, which are no
        items; what stands in it counts like all that stands in something."""
        roots = self.memory.roots(parameter)
        return any(
            self.memory.overlap(self.memory.writes(op), roots)
            for op in self.program.walk()
            if isinstance(op, ops.With) or not any(regions(op))
        )

    def _enumerated(self, iterable: Operand) -> Operand | None:
        """What `enumerate` counts; `None` where the iterable is not that, or counts from elsewhere."""
        match self.memory.origins.definition(iterable):
            case ops.Call(target="builtins.enumerate", arguments=(Argument(value=held, keyword=None, star=""),)):
                return held
            case _:
                return None


def selection(index: Operand, rank: int, numbers: Numbers) -> Selection | str:
    """An index of a tensor of this rank in its two parts, or why it has none."""
    parts = index.parts if isinstance(index, Tuple) else (index,)
    ellipses = [place for place, part in enumerate(parts) if part == Literal(...)]
    if len(ellipses) == 1:
        (place,) = ellipses
        fill = (EVERYTHING,) * (rank - len(parts) + 1)
        parts = (*parts[:place], *fill, *parts[place + 1 :])
    if len(parts) > rank:
        return "the index has more parts than the tensor dimensions"
    full = (*parts, *((EVERYTHING,) * (rank - len(parts))))
    for part in full[:-1]:
        if not isinstance(part, Slice) and not numbers.is_number(part):
            return f"`{part}` is not known to be a whole number"
    if full[-1] == NONE or full[-1] == Literal(...):
        return "the index makes a dimension"
    return Selection(full[:-1], full[-1])
