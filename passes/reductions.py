"""What is computed of one value alone, down to less than it: `h[:, -1]`, `h.float().mean(dim=(0, 1))`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import EllipsisType
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.builder import Builder
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.traverse import defined, rewrite, used
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import NONE, Literal, Operand, Slice, Tuple, Value, values_in
from nnsight_compiler.passes.behaviour import Behaviour, words
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.memory import Memory
from nnsight_compiler.passes.selections import EVERYTHING, Numbers, shown

_METHOD = "torch.Tensor."

_REDUCING = frozenset(
    words(
        "all amax amin any argmax argmin count_nonzero logsumexp max mean median min mode nanmean nanmedian nansum"
        " norm prod std std_mean sum var var_mean vector_norm narrow select numel size dim"
    )
)
"""Names of torch's calls that give less than they are given."""

_BY_PLACE = frozenset(words("narrow select"))
"""Those that fail where a dimension is too short."""

_ABOUT = frozenset(words("shape ndim dtype device itemsize nbytes"))
"""What a copy of a tensor has in common with it, and holds nothing of it."""

_PARTS = frozenset(words("T mT values indices"))

_SIGNS = frozenset(words("+ - * / // % ** == != < <= > >="))


@final
@dataclass(frozen=True, slots=True)
class Reduction:
    """Ops of a program that compute less of a value, from that alone and what is fixed.

    ops: the first to the last, of which each uses the one before; methods are looked up among them.
    result: what the last gives. takes: the numbers that go into it.
    key: equal for two of the same computation, whatever they are of.
    view: whether the result may share memory with the value.
    fragile: whether it may fail where the value is smaller than another.
    """

    base: Value
    ops: tuple[Op, ...]
    result: Value
    takes: tuple[Value, ...]
    key: Hashable
    text: str
    view: bool
    fragile: bool

    def of(
        self, base: Operand, builder: Builder, looked_up: Callable[[Value], Value], result: Value | None = None
    ) -> list[Op]:
        """The same computation of another value; what the last op gives is named by the caller, or anew.

        Args:
            looked_up: gives what stands for a function or a constant of torch's.
        """
        names: dict[str, Operand] = {self.base.name: base}
        if result is not None:
            names[self.result.name] = result

        def renamed(value: Value) -> Operand:
            return names.get(value.name) or (value if value in self.takes else looked_up(value))

        def given(value: Value) -> Value:
            held = names.setdefault(value.name, builder.fresh(type=value.type))
            assert isinstance(held, Value)
            return held

        return [rewrite(op, operand=renamed, result=given) for op in self.ops]


@final
@dataclass(frozen=True, slots=True)
class _Step:
    """One computation on the way: a method and its call are one."""

    ops: tuple[Op, ...]
    result: Value
    text: str
    reduces: bool = False
    view: bool = True
    fragile: bool = False


class Reductions:
    """Finds reductions in one program."""

    def __init__(self, memory: Memory, layout: Layout, numbers: Numbers) -> None:
        self.memory = memory
        self.layout = layout
        self.numbers = numbers

    def of(self, value: Value, use: Op) -> Reduction | None:
        """What a use of a value computes of it, as far as it becomes less; `None` where it is used otherwise."""
        steps: list[_Step] = []
        length = 0
        current, op = value, use
        while True:
            if sum(each == current for each in used(op)) != 1:
                break
            step = self._step(current, op)
            if step is None:
                break
            steps.append(step)
            if step.reduces:
                length = len(steps)
            uses = self.layout.uses.get(step.result.name, [])
            if len(uses) != 1:
                break
            current, op = step.result, uses[0]
        return self._reduction(value, steps[:length]) if length else None

    def _reduction(self, value: Value, steps: list[_Step]) -> Reduction:
        chain = tuple(op for step in steps for op in step.ops)
        inner = {value.name, *(each.name for op in chain for each in defined(op))}
        takes = dict.fromkeys(
            each for op in chain for each in used(op) if each.name not in inner and not self.path(each)
        )
        key = self._key(value, chain)
        view, fragile = all(step.view for step in steps), any(step.fragile for step in steps)
        text = "".join(step.text for step in steps)
        return Reduction(value, chain, steps[-1].result, tuple(takes), key, text, view, fragile)

    def _key(self, value: Value, chain: tuple[Op, ...]) -> Hashable:
        """The ops with their own values by number, functions by name, and without their places in the source."""
        numbered = {value.name: Value("0")}

        def named(each: Value) -> Operand:
            path = self.path(each)
            return Value(path) if path else numbered.get(each.name, Value(f"%{each.name}"))

        def counted(each: Value) -> Value:
            return numbered.setdefault(each.name, Value(str(len(numbered))))

        return tuple(rewrite(op, operand=named, result=counted) for op in chain)

    def path(self, operand: Operand) -> str:
        """The dotted name of what is looked up in the module's globals; empty for other values."""
        match self.memory.origins.definition(operand):
            case ops.Global(name=name, scope=scope):
                return f"{scope} {name}"
            case ops.Attribute(object=Value() as base, name=name) if path := self.path(base):
                return f"{path}.{name}"
            case _:
                return ""

    # --- one step ---

    def _step(self, value: Value, op: Op) -> _Step | None:
        match op:
            case ops.Item(object=base, index=index, result=result) if base == value:
                return self._item(op, index, result)
            case ops.Attribute(object=base, name=name, result=result) if base == value:
                if name in _ABOUT:
                    return _Step((op,), result, f".{name}", reduces=True, view=False)
                if name in _PARTS:
                    return _Step((op,), result, f".{name}")
                uses = self.layout.uses.get(result.name, [])
                call = uses[0] if len(uses) == 1 else None
                if isinstance(call, ops.Call) and call.function == result and value not in used(call):
                    return self._call(value, call, (op, call), name)
                return None
            case ops.Call(function=Value() as function) if self.path(function):
                path = self.path(function).partition(" ")[2]
                return self._call(value, op, (op,), path)
            case ops.Operator(operator=sign, operands=parts, in_place=False, result=result) if (
                sign in _SIGNS and (sign == "-" or len(parts) == 2) and self.memory.origins.is_tensor(result)
            ):
                if all(part == value or self._is_fixed(part) for part in parts):
                    texts = ["…" if part == value else shown(part) for part in parts]
                    text = f"({texts[0]} {sign} {texts[1]})" if len(texts) == 2 else f"({sign}{texts[0]})"
                    return _Step((op,), result, text, view=False)
                return None
            case _:
                return None

    def _item(self, op: Op, index: Operand, result: Value) -> _Step | None:
        parts = index.parts if isinstance(index, Tuple) else (index,)
        takes = reaches = False
        for part in parts:
            match part:
                case Slice(lower=lower, upper=upper, step=step):
                    if not all(each == NONE or self.numbers.is_number(each) for each in (lower, upper, step)):
                        return None
                    takes |= part != EVERYTHING
                    reaches |= step != NONE and not isinstance(step, Literal)
                case Literal(value=None) | Literal(value=EllipsisType()):
                    pass
                case Literal(value=str()):
                    takes = reaches = True
                case _ if self.numbers.is_number(part):
                    takes = True
                    reaches |= part not in (Literal(0), Literal(-1))
                case _:
                    return None
        text = f"[{', '.join(map(shown, parts))}]"
        return _Step((op,), result, text, reduces=takes, fragile=reaches)

    def _call(self, value: Value, call: ops.Call, chain: tuple[Op, ...], name: str) -> _Step | None:
        known = self.memory.origins.known(call)
        target = call.target or ""
        if known is None or not target.startswith("torch.") or known.random or known.mode or known.iterator:
            return None
        if known.behaviour not in (Behaviour.PURE, Behaviour.VIEW):
            return None
        given = [argument for argument in call.arguments if argument.value != value]
        if any(argument.star or not self._is_fixed(argument.value) for argument in given):
            return None
        method = target.startswith(_METHOD) and len(chain) == 2
        if not method and len(given) != len(call.arguments) - 1:
            return None
        last = target.rpartition(".")[2]
        parts = (
            "…" if each.value == value else f"{each.keyword}={self._shown(each.value)}" if each.keyword
            else self._shown(each.value) for each in call.arguments
        )  # fmt: skip
        text = f"{'.' if method else ' '}{name}({', '.join(parts)})"
        moving = any(True for each in given for _ in values_in(each.value) if not self.path(each.value))
        typed = isinstance(call.result.type, TensorType) or known.scalar
        return _Step(
            chain,
            call.result,
            text,
            reduces=last in _REDUCING,
            view=known.behaviour is Behaviour.VIEW,
            fragile=last in _BY_PLACE or moving or not typed,
        )

    def _shown(self, operand: Operand) -> str:
        path = self.path(operand).partition(" ")[2]
        return path or shown(operand)

    def _is_fixed(self, operand: Operand) -> bool:
        """Whether an operand is a constant, a whole number, or a name of torch's such as a dtype."""
        match operand:
            case Literal():
                return True
            case Tuple(parts=parts):
                return all(map(self._is_fixed, parts))
            case Slice(lower=lower, upper=upper, step=step):
                return all(map(self._is_fixed, (lower, upper, step)))
            case _:
                return self.numbers.is_number(operand) or self.path(operand).startswith("global torch.")
