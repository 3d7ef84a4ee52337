"""The ops without regions in a run without data: names, attributes, items, calls, and what stands at sites.

A host call may change every container that it is given or that it can reach from outside; what those hold is not known
any more. Where the program itself changes the shape of a tensor in place (`unsqueeze_`), nothing after it is.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.ir.values import Literal, Module, Unbound, Value
from nnsight_compiler.passes.assignments import cannot_stand_for, misfit
from nnsight_compiler.passes.behaviour import Behaviour, KnownCall
from nnsight_compiler.passes.bounded import length_of
from nnsight_compiler.passes.meta_calls import RESHAPING, call_known
from nnsight_compiler.passes.meta_items import attribute, check_item_assignment, item, out_of_range
from nnsight_compiler.passes.meta_modules import call_module, weight_of
from nnsight_compiler.passes.meta_operators import apply_operator
from nnsight_compiler.passes.meta_torch import Mistake
from nnsight_compiler.passes.meta_values import MetaValues, Restart, Site, Size
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
)

_TRANSPARENT = ("tqdm.tqdm", "tqdm.auto.tqdm", "tqdm.std.tqdm", "tqdm.asyncio.tqdm_asyncio", "tqdm.notebook.tqdm")


def _can_hold(held: Any, index: Any) -> bool:
    """Whether a container of the program's takes an item there."""
    if type(held) is list:
        return type(index) is int and -len(held) <= index < len(held)
    return type(held) is dict and type(index) in PLAIN


class MetaOps(MetaValues):
    """Runs ops that have no regions."""

    def simple(self, op: Op) -> None:
        match op:
            case ops.Global():
                self.define(op.result, self._name(op))
            case ops.Cell():
                self.values[op.result.name] = UNKNOWN
                self.store(op.result.name, UNKNOWN if isinstance(op.initial, Unbound) else self.value(op.initial))
            case ops.Store():
                if isinstance(op.cell, Value):
                    self.store(op.cell.name, self.value(op.value))
            case ops.Load():
                held = self.cells.get(op.cell.name, UNKNOWN) if isinstance(op.cell, Value) else UNKNOWN
                self.define(op.result, held)
            case ops.Bound() | ops.Save():
                self.define(op.result, self.value(op.value))
            case ops.Attribute():
                self.define(op.result, self._attribute(op))
            case ops.Captured(model=Value() as model, edit=Literal(value=int() as number)):
                edited = self._outside_model(Module(model, ""))
                held = UNKNOWN if edited is None else self.outside(edited._edits[number].values[op.name])
                self.define(op.result, held)
            case ops.Item():
                held, index = self.value(op.object), self.value(op.index)
                self.define(op.result, self.attempt(op, lambda: self._item(held, index), op.object))
            case ops.Operator():
                self._operator(op)
            case ops.Call():
                self.define(op.result, self._call(op))
            case ops.Build():
                self.define(op.result, self._build(op))
            case ops.Unpack():
                self._unpack(op)
            case ops.SetItem():
                self._set_item(op)
            case ops.Read():
                self.define(op.result, self._read(op))
            case ops.Write():
                self._write(op)
            case ops.Skip():
                self._skip(op)
            case ops.Grad():
                held = self.value(op.value)
                self.define(op.result, copied(held) if isinstance(held, torch.Tensor) else UNKNOWN)
            case ops.SetGrad():
                self._set_grad(op)
            case ops.Delete() | ops.SetAttribute():
                self.lose_containers(self.value(op.object))
            case ops.SetGlobal():
                self.lose_containers(self.value(op.value))
            case ops.Import():
                self.host()
                self.define(op.result, UNKNOWN)
            case ops.Format(result=result):
                self.define(result, UNKNOWN)
            case _:
                for value in defined(op):
                    self.define(value, UNKNOWN)

    def _name(self, op: ops.Global) -> Any:
        """A name from outside, as it is at this call; a host call may assign it."""
        if op.name in self.source.assigned:
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
        return UNKNOWN if self.hosted else self.outside(found)

    def _attribute(self, op: ops.Attribute) -> Any:
        if isinstance(op.object, Module):
            return weight_of(self._outside_model(op.object), op.object.path, op.name)
        held = self.value(op.object)
        return self.attempt(op, lambda: attribute(held, op.name))

    def _outside_model(self, module: Module) -> Any:
        """The wrapped model that a resolved module belongs to."""
        name = module.model.name
        if name in self.surroundings.arguments:
            return self.surroundings.arguments[name]
        read = self.source.names.get(name)
        if read is not None:
            cell = self.surroundings.closure.get(read.name)
            return self.surroundings.globals.get(read.name) if cell is None else cell.cell_contents
        return None

    def is_site_tuple(self, held: Any) -> bool:
        """Whether a value is a tuple that a module of the model gives or takes."""
        return isinstance(held, tuple) and id(held) in self.live

    def _item(self, held: Any, index: Any) -> Any:
        if isinstance(held, (list, tuple)) and index is INTEGER and held:
            return self.join_all([(each,) for each in held])[0]
        if self.is_site_tuple(held) and type(index) is int and not -len(held) <= index < len(held):
            raise Mistake(*out_of_range(index, len(held), "this tuple"))
        found = item(held, index)
        if found is UNKNOWN and not isinstance(held, torch.Tensor):
            self.lose(*(each for each in inside(held) if each is not held and is_container(each)))
        return found

    def _operator(self, op: ops.Operator) -> None:
        operands = tuple(map(self.value, op.operands))
        if op.in_place and is_container(operands[0]):
            self.lose(operands[0])
        result = self.attempt(op, lambda: apply_operator(op.operator, operands, op.in_place))
        if result is UNKNOWN:
            self.lose_containers(*operands)
        self.define(op.result, result)

    def _build(self, op: ops.Build) -> Any:
        if any(element.starred for element in op.elements) or op.kind == "set":
            self.lose_containers(*(self.value(element.value) for element in op.elements))
            return UNKNOWN
        held = [self.value(element.value) for element in op.elements]
        if op.kind != "dict":
            return held if op.kind == "list" else tuple(held)
        keys = [None if element.key is None else self.value(element.key) for element in op.elements]
        if all(type(key) in PLAIN for key in keys):
            return dict(zip(keys, held, strict=True))
        self.lose_containers(*held)
        return UNKNOWN

    def _unpack(self, op: ops.Unpack) -> None:
        held = self.value(op.value)
        if isinstance(held, torch.Tensor) and held.ndim and op.star < 0 and held.shape[0] == len(op.results):
            self.define_all(op.results, tuple(held[number] for number in range(held.shape[0])))
        elif isinstance(held, (tuple, list)) and op.star < 0 and len(held) == len(op.results):
            self.define_all(op.results, tuple(held))
        else:
            length = held.shape[0] if isinstance(held, torch.Tensor) and held.ndim else None
            length = len(held) if self.is_site_tuple(held) else length
            names = len(op.results) - (op.star >= 0)
            if length is not None and (length < names if op.star >= 0 else length != names):
                least = "at least " if op.star >= 0 else ""
                self.report(op, Mistake(f"{length} values are unpacked into {least}{names} names"), op.value)
            self.lose_containers(held)
            self.define_all(op.results, ())

    def _set_item(self, op: ops.SetItem) -> None:
        held, index, new = self.value(op.object), self.value(op.index), self.value(op.value)
        if isinstance(held, torch.Tensor):
            self.attempt(op, lambda: check_item_assignment(held, index, new), op.object)
        elif id(held) in self.live:
            old = self.attempt(op, lambda: item(held, index))
            if old is UNKNOWN or not same(old, new):
                self.open_sites(self.live[id(held)][1][0])
        elif _can_hold(held, index):
            held[index] = new
        else:
            self.lose_containers(held, new)

    def _site(self, op: ops.Read | ops.Write) -> tuple[Site, Any]:
        """A site, and what it holds."""
        assert self.forward is not None
        assert isinstance(op.module, Module)
        name, size = self.forward
        rows = op.rows.name if isinstance(op.rows, Value) else ""
        if rows and size is not None:
            size = self.sizes.get(rows)
        site = name, op.module.path, op.port, op.call or 0, rows
        if site not in self.sites:
            self.sites[site] = self._held(size, site, op)
        return site, self.sites[site]

    def _held(self, size: Size | None, site: Site, op: ops.Read | ops.Write) -> Any:
        if size is None or op.port == "result":
            return UNKNOWN
        held = copied(size.sites.value(site[1], op.port, site[3], size.rows, size.tokens))
        for each in inside(held):
            if isinstance(each, (list, tuple, Mapping)):
                self.live[id(each)] = each, site
        return held

    def _read(self, op: ops.Read) -> Any:
        return self._site(op)[1] if self.forward is not None else UNKNOWN

    def _write(self, op: ops.Write) -> None:
        if self.forward is None:
            return
        new = self.value(op.value)
        site, held = self._site(op)
        if op.port == "inputs":
            self.open_sites(site[0])
            return
        self._replace(op, site, held, new, misfit)

    def _skip(self, op: ops.Skip) -> None:
        """What is given must be as what the module would have returned: it takes its place."""
        if self.forward is None:
            return
        new = self.value(op.value)
        output = ops.Write(op.module, "output", op.value, op.call, span=op.span)
        site, held = self._site(output)
        self._replace(op, site, held, new, cannot_stand_for)

    def _replace(
        self, op: Op, site: tuple[Any, ...], held: Any, new: Any, why_not: Callable[[Any, Any], tuple[str, str] | None]
    ) -> None:
        """A value takes the place of what a site holds, unless it cannot."""
        if held is UNKNOWN or self.blind:
            return
        if new is not UNKNOWN and not isinstance(new, Method):
            wrong = why_not(held, new if new is not INTEGER else 0)
            if wrong is not None:
                self.report(op, Mistake(*wrong))
                return
        if not isinstance(held, torch.Tensor) and not same(held, new):
            self.open_sites(site[0])
        self.sites[site] = copied(held)

    def _set_grad(self, op: ops.SetGrad) -> None:
        held, new = self.value(op.value), self.value(op.gradient)
        if isinstance(held, torch.Tensor) and new is not UNKNOWN and not isinstance(new, Method) and not self.blind:
            wrong = misfit(held, new if new is not INTEGER else 0)
            if wrong is not None:
                self.report(op, Mistake(*wrong))

    def open_sites(self, forward: str) -> None:
        """What the sites of a forward hold may be anything from now on."""
        if forward not in self.opaque:
            self.opaque.add(forward)
            raise Restart

    def host(self, *given: Any) -> None:
        """Code that is not known runs, with these values."""
        self.lose(*given)
        if any(each is UNKNOWN for value in given for each in inside(value)):
            self.lose(*self.merged)
        for _, made in list(self.memo.values()):
            if is_container(made):
                self.lose(made)
        self.lose_containers(*self.cells.values())
        for each in [each for value in given for each in inside(value) if is_container(each)]:
            if id(each) in self.live:
                self.open_sites(self.live[id(each)][1][0])
        if not self.hosted:
            self.hosted = True
            self.version += 1

    def known(self, op: ops.Call) -> KnownCall | None:
        return self.source.origins.known(op)

    @staticmethod
    def reshapes(op: Op) -> bool:
        return isinstance(op, ops.Call) and op.target is not None and op.target.rpartition(".")[2] in RESHAPING

    def _call(self, op: ops.Call) -> Any:
        function = self.value(op.function)
        given = self._arguments(op)
        if isinstance(op.function, Module) and any(argument.keyword == "hook" for argument in op.arguments):
            return UNKNOWN  # a pair of what it returns and what was seen inside
        if isinstance(op.function, Module):
            if given is None:
                return UNKNOWN
            model = self._outside_model(op.function)
            path = op.function.path
            return self.attempt(op, lambda: call_module(model, path, *given))
        known = self.known(op)
        if isinstance(op.function, Value) and op.function.name in self.harmless:
            return UNKNOWN
        if known is None:
            self.host(function, *(self.value(argument.value) for argument in op.arguments))
            return UNKNOWN
        if self.reshapes(op):
            self.blind = True
            self.version += 1
            for forward in {site[0] for site in self.sites}:
                self.open_sites(forward)
            return UNKNOWN
        result = UNKNOWN if given is None else self.attempt(op, lambda: self._known_call(op, known, function, *given))
        if result is UNKNOWN:
            held = [function, *(self.value(argument.value) for argument in op.arguments)]
            if known.behaviour is not Behaviour.HARMLESS and not known.scalar:
                self.lose_containers(*held)
            if known.behaviour is Behaviour.MUTATES and "out" in {argument.keyword for argument in op.arguments}:
                self.lose(*held)
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
            self.lose_containers(*mutable)
        lost = any(id(each) in self.lost for value in (*args, *kwargs.values()) for each in inside(value))
        if lost and known.behaviour is not Behaviour.CONTAINER:
            return UNKNOWN
        return call_known(known, function, args, dict(kwargs))

    def _iterator(self, target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        held = [self.entries(each) for each in args]
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

    def entries(self, iterable: Any) -> tuple[bool, Any]:
        """Whether a loop over a value has a round for sure, and what is known of all its entries at once."""
        match iterable:
            case torch.Tensor():
                sure = iterable.ndim > 0 and iterable.shape[0] > 0
                return sure, iterable[0] if sure else UNKNOWN
            case range():
                return bool(iterable), iterable[0] if length_of(iterable) == 1 else INTEGER
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
        held = [UNKNOWN if id(each) in self.lost else each for each in held]
        return True, self.join_all([(each,) for each in held])[0]

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
