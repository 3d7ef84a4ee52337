"""Lists and dicts of a program of which all is known: what is put into them, and where it is taken out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument, Op
from nnsight_compiler.ir.values import Literal, Slice, Value, values_in
from nnsight_compiler.passes.layout import Layout
from nnsight_compiler.passes.origins import Origins

_SEQUENCES = ("enumerate", "zip", "reversed")
_IN_PLACE = (ops.Forward, ops.Invoke, ops.Session)


@final
@dataclass(frozen=True, slots=True)
class Put:
    """An op that puts a value into a container; `key` is a literal under which that alone is found again."""

    op: Op
    value: Value
    key: Literal | None = None


@final
@dataclass(frozen=True, slots=True)
class Element:
    """A value that is an element of a container.

    key: a literal that it is found under: that of its `Put`; `None` for others, and in a loop.
    loop: the loop whose item it is, if that takes one after the other.
    whole: whether the loop, unless it ends early, comes by all of them.
    """

    value: Value
    op: Op
    key: Literal | None = None
    loop: ops.For | None = None
    whole: bool = False


@final
@dataclass(frozen=True, slots=True)
class Container:
    """A list or dict: what makes it, what is put into it, and its elements where they are used."""

    maker: Op
    puts: tuple[Put, ...]
    elements: tuple[Element, ...]


@final
@dataclass(slots=True)
class _Found:
    puts: list[Put] = field(default_factory=list)
    elements: list[Element] = field(default_factory=list)


class Containers:
    """Finds the containers of one program that are filled, and whose elements are taken out, and no more."""

    def __init__(self, origins: Origins, layout: Layout) -> None:
        self.origins = origins
        self.layout = layout

    def of(self, maker: Op) -> Container | None:
        """The container that an op makes; `None` where something else may be done with it, or it is no container."""
        found = _Found()
        match maker:
            case ops.Build(result=result, kind="list" | "dict" as made, elements=elements):
                kind: str = made
                for element in elements:
                    key = element.key if isinstance(element.key, Literal) else None
                    if element.starred or not isinstance(element.value, Value):
                        return None
                    found.puts.append(Put(maker, element.value, key))
            case ops.Call(result=result, target="builtins.list" | "builtins.dict" as target, arguments=()):
                kind = target.rpartition(".")[2]
            case _:
                return None
        if not all(self._use(result, op, kind, found) for op in self.layout.uses.get(result.name, [])):
            return None
        puts = tuple(self._keyed(maker, kind, found.puts))
        return Container(maker, puts, tuple(self._counted(each, kind, puts) for each in found.elements))

    def _use(self, held: Value, op: Op, kind: str, found: _Found) -> bool:
        match op:
            case ops.Save(value=value, result=result) if value == held:
                return all(self._use(result, each, kind, found) for each in self.layout.uses.get(result.name, []))
            case ops.Attribute(object=base, name=name, result=method) if base == held:
                return all(self._method(held, name, method, each, kind, found) for each in self._uses(method))
            case ops.SetItem(object=base, index=index, value=Value() as value) if base == held and value != held:
                if held in values_in(index):
                    return False
                found.puts.append(Put(op, value, index if kind == "dict" and isinstance(index, Literal) else None))
                return True
            case ops.Item(object=base, index=index, result=result) if base == held and held not in values_in(index):
                if isinstance(index, Slice):
                    return False
                found.elements.append(Element(result, op, index if isinstance(index, Literal) else None))
                return True
            case ops.For(iterable=iterable) if iterable == held:
                if kind == "list":
                    found.elements.append(Element(op.body.parameters[0], op, loop=op, whole=True))
                return True
            case ops.Call(target="builtins.len"):
                return True
            case ops.Call(target=str() as target, result=result):
                space, _, name = target.partition(".")
                if space != "builtins" or name not in _SEQUENCES or kind != "list":
                    return False
                return self._sequence(held, op, name, found)
            case _:
                return False

    def _uses(self, value: Value) -> list[Op]:
        return self.layout.uses.get(value.name, [])

    def _method(self, held: Value, name: str, method: Value, op: Op, kind: str, found: _Found) -> bool:
        match op:
            case ops.Call(function=function, arguments=given, result=result) if function == method:
                if held in (value for argument in given for value in values_in(argument.value)):
                    return False
            case _:
                return False
        match kind, name, given:
            case "list", "append", (Argument(Value() as value, None, ""),):
                found.puts.append(Put(op, value))
                return not self._uses(result)
            case "dict", "keys", ():
                return all(isinstance(each, ops.For) for each in self._uses(result))
            case "dict", "values" | "items", ():
                return all(self._loop(result, each, 1 if name == "items" else None, True, found)
                           for each in self._uses(result))  # fmt: skip
            case _:
                return False

    def _sequence(self, held: Value, call: ops.Call, name: str, found: _Found) -> bool:
        places = [place for place, argument in enumerate(call.arguments) if held in values_in(argument.value)]
        if len(places) != 1 or any(argument.star or (argument.value == held and argument.keyword)
                                   for argument in call.arguments):  # fmt: skip
            return False
        if call.arguments[places[0]].value != held:
            return False
        part = {"enumerate": 1, "zip": places[0], "reversed": None}[name]
        return all(self._loop(call.result, each, part, name != "zip", found) for each in self._uses(call.result))

    def _loop(self, iterable: Value, op: Op, part: int | None, whole: bool, found: _Found) -> bool:
        """Whether a use is a loop; the elements are its items, or that part of each."""
        if not isinstance(op, ops.For) or op.iterable != iterable or iterable in op.initial:
            return False
        item = op.body.parameters[0]
        if part is None:
            found.elements.append(Element(item, op, loop=op, whole=whole))
            return True
        for each in self._uses(item):
            match each:
                case ops.Unpack(results=results, value=value, star=-1) if value == item and len(results) > part:
                    found.elements.append(Element(results[part], each, loop=op, whole=whole))
                case ops.Item(index=Literal(value=int() as index), result=result) if index >= 0:
                    if index == part:
                        found.elements.append(Element(result, each, loop=op, whole=whole))
                case _:
                    return False
        return True

    def _keyed(self, maker: Op, kind: str, puts: list[Put]) -> Iterator[Put]:
        """The puts with the keys under which each is found, where all have one."""
        lined = all(put.op is maker or self._follows(maker, put.op) for put in puts)
        keys = [put.key for put in puts]
        if kind == "list":
            appended = all(put.op is maker or isinstance(put.op, ops.Call) for put in puts)
            order = sorted(puts, key=lambda put: (put.op is not maker, self.layout.place(put.op)))
            for number, put in enumerate(order):
                yield Put(put.op, put.value, Literal(number) if lined and appended else None)
        else:
            apart = lined and len({key.value for key in keys if key is not None}) == len(keys)
            yield from (put if apart else Put(put.op, put.value) for put in puts)

    def _counted(self, element: Element, kind: str, puts: tuple[Put, ...]) -> Element:
        """An element of a list with its number from the start: from the end it is another as long as the list grows."""
        number = element.key.value if element.key is not None else None
        if kind == "dict" or type(number) is not int or number >= 0:
            return element
        full = all(self.layout.before(put.op, element.op) for put in puts)
        return replace(element, key=Literal(number + len(puts)) if full else None)

    def _follows(self, maker: Op, op: Op) -> bool:
        """Whether an op runs once for each time that another does, and after it."""
        outer = self.layout.around(maker)
        inner = self.layout.around(op)
        return inner[: len(outer)] == outer and all(isinstance(each, _IN_PLACE) for each, _ in inner[len(outer) :])
