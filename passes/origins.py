"""Where the values of a program come from, as far as one look at each op tells: definitions, tensors, callees."""

from __future__ import annotations

from collections.abc import Iterator

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Argument, Op
from nnsight_compiler.ir.program import Program
from nnsight_compiler.ir.traverse import defined
from nnsight_compiler.ir.types import TensorType
from nnsight_compiler.ir.values import Literal, Operand, Slice, Tuple, Value
from nnsight_compiler.passes.behaviour import EVERY, Behaviour, KnownCall, Place
from nnsight_compiler.passes.known_calls import ALL, METHODS, behaviour_of, names_class
from nnsight_compiler.passes.roots import Fresh, Root


class Origins:
    """What is known of each value without following storage.

    definitions: the op that defines each value, by name.
    closures, iterators: the roots that are closures, with their ops, and those that change when they are read.
    """

    def __init__(self, program: Program) -> None:
        self.definitions: dict[str, Op] = {}
        self.closures: dict[Root, ops.Closure] = {}
        self.iterators: set[Root] = set()
        self._tensors: set[str] = set()
        self._from_model: set[str] = set()
        for op in program.walk():
            self._classify(op)

    def definition(self, operand: Operand) -> Op | None:
        """The op that defines a value."""
        return self.definitions.get(operand.name) if isinstance(operand, Value) else None

    def is_tensor(self, operand: Operand) -> bool:
        """Whether the value is for certain a tensor or a plain value: it holds no other values."""
        return isinstance(operand, Value) and operand.name in self._tensors

    def is_from_model(self, operand: Operand) -> bool:
        """Whether the value is a site's, or a part of it: a tensor, or the tuples and dicts that modules return."""
        return isinstance(operand, Value) and operand.name in self._from_model

    def known(self, call: ops.Call) -> KnownCall | None:
        """What is known of a call with these arguments; `None` for a host call or a call of a module."""
        row = ALL.get(call.target) if call.target is not None else None
        return None if row is None else behaviour_of(row, self.arguments(call))

    def writes_tensors(self, op: Op) -> bool:
        """Whether an op may write to a tensor in place."""
        match op:
            case ops.SetItem() | ops.Delete() | ops.SetAttribute():
                return True
            case ops.Operator(in_place=changes):
                return changes
            case ops.Call():
                known = self.known(op)
                return known is None or (bool(known.mutates) and known.behaviour is not Behaviour.CONTAINER)
        return False

    def arguments(self, call: ops.Call) -> tuple[Argument, ...]:
        """The arguments of a call with the receiver of a method first, as `KnownCall` counts them."""
        if call.target is None or not call.target.startswith(METHODS):
            return call.arguments
        function = self.definition(call.function)
        if not isinstance(function, ops.Attribute):
            # A bound method that came through a variable: its parts take in the receiver's.
            return (Argument(call.function), *call.arguments)
        match self.definition(function.object):
            case ops.Attribute(name=name) | ops.Global(name=name) if names_class(
                call.target, f"{name}.{function.name}"
            ):
                # `torch.Tensor.method(receiver, …)`
                return call.arguments
            case _:
                return (Argument(function.object), *call.arguments)

    def at(self, call: ops.Call, places: tuple[Place, ...]) -> Iterator[Argument]:
        """The arguments at these places; all of them where a place cannot be told."""
        arguments = self.arguments(call)
        if places == EVERY:
            yield from arguments
            return
        if any(argument.star for argument in arguments):
            if places:
                yield from arguments
            return
        positional = [argument for argument in arguments if argument.keyword is None]
        for place in places:
            if isinstance(place, int):
                yield from positional[place : place + 1]
            else:
                yield from (argument for argument in arguments if argument.keyword == place)

    def _classify(self, op: Op) -> None:
        """Records definitions, closures, and which values are tensors for certain or come from the model."""
        for value in defined(op):
            self.definitions[value.name] = op
        match op:
            case ops.Read(result=result) | ops.Grad(result=result):
                self._from_model.add(result.name)
                # What stands at a site is the model's; the types of other values may rest on arguments of one call.
                if isinstance(result.type, TensorType):
                    self._tensors.add(result.name)
            case ops.Gradients(result=result):
                self._from_model.add(result.name)
            case ops.Closure(result=result):
                self.closures[Fresh(result.name)] = op
            case ops.Item(result=result, object=base, index=index):
                if self.is_from_model(base):
                    self._from_model.add(result.name)
                if self.is_tensor(base) or (self.is_from_model(base) and is_tensor_index(index, several=True)):
                    self._tensors.add(result.name)
            case ops.Attribute(result=result, object=base):
                if self.is_from_model(base):
                    self._from_model.add(result.name)
            case ops.Save() | ops.Bound():
                if self.is_from_model(op.value):
                    self._from_model.add(op.result.name)
                if self.is_tensor(op.value):
                    self._tensors.add(op.result.name)
            case ops.Operator(result=result):
                if self.makes_tensor(op):
                    self._tensors.add(result.name)
            case ops.Call(result=result):
                known = self.known(op)
                if known is not None and known.leaf:
                    self._tensors.add(result.name)
                if known is not None and known.iterator:
                    self.iterators.add(Fresh(result.name))
                function = self.definition(op.function)
                if isinstance(function, ops.Closure) and function.generator:
                    self.iterators.add(Fresh(result.name))
            case _:
                pass

    def makes_tensor(self, op: ops.Operator) -> bool:
        """Whether the result holds nothing: it is no tuple, list, set or dict made of the operands."""
        kinds = [part.value for part in op.operands if isinstance(part, Literal)]
        if len(op.operands) == 1 or op.operator not in ("+", "*", "-", "|", "&", "^"):
            return True
        if any(map(self._is_number_or_tensor, op.operands)):
            return True
        if any(isinstance(kind, (float, complex)) for kind in kinds):
            return True
        if op.operator != "*" and any(isinstance(kind, int) for kind in kinds):
            return True
        # A model returns tensors, tuples and dicts, but no sets.
        return op.operator == "-" and any(map(self.is_from_model, op.operands))

    def _is_number_or_tensor(self, operand: Operand) -> bool:
        """Whether the value is a tensor for certain, or a number that no sequence can be multiplied by."""
        if not self.is_tensor(operand):
            return False
        definition = self.definition(operand)
        known = self.known(definition) if isinstance(definition, ops.Call) else None
        return known is None or not known.scalar


def is_tensor_index(index: Operand, *, several: bool = False) -> bool:
    """Whether only a tensor, among what a model returns, takes this index; with `several`, also to be read from."""
    match index:
        case Tuple():
            return True
        case Literal(value=value):
            return value is Ellipsis
        case Slice():
            return not several
        case _:
            return False
