"""What passes ask about the forwards of a program: when modules run, what stands where, what may be left out or shared.

A question about forwards of one model on the very same inputs is asked once, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.traverse import walk
from nnsight_compiler.ir.values import Literal, Module, Value
from nnsight_compiler.models.language import LanguageModel
from nnsight_compiler.observations import observed
from nnsight_compiler.passes.facts import Guard
from nnsight_compiler.passes.parts import Positionwise
from nnsight_compiler.passes.shapes import Extent
from nnsight_compiler.passes.sites import operations
from nnsight_compiler.passes.specialise import Specialised
from nnsight_compiler.passes.subject import Inputs
from nnsight_compiler.positions_apart import positionwise_of
from nnsight_compiler.runtime.autograd_recording import adapters
from nnsight_compiler.runtime.observation import Observation
from nnsight_compiler.shapes import extent_of, why_undivided

if TYPE_CHECKING:
    from nnsight_compiler.check import Checker

T = TypeVar("T")


def example_of(lowered: Specialised, forward: str) -> Inputs | None:
    """The inputs of a forward, or such as it is given: of as many invokes as are needed to make a batch."""
    inputs, model = lowered.inputs[forward], lowered.models[forward]
    if inputs is not None or forward not in lowered.invoked:
        return inputs
    example = model._example()
    if example is None:
        return None
    batch = model._batch((example, example), {})
    return batch.args, batch.kwargs


@final
@dataclass(eq=False)
class Answers:
    """The answers for one lowering.

    arguments: those of the call. checker: what a check notes mistakes with.
    exact: whether the order of sites is asked for the very sizes of the inputs.
    orders: how the model of each forward runs, as far as it was asked for, by the name of its result.
    lowered: the specialised program, once there is one.
    trust: guards that rest on what forwards were taken for. proved: the models of modules that are proved to treat
        positions apart, by the model's token and the module's path.
    """

    arguments: Mapping[str, Any]
    checker: Checker | None = None
    exact: bool = False
    lowered: Specialised = field(init=False)
    orders: dict[str, Observation] = field(default_factory=dict)
    trust: dict[str, Guard] = field(default_factory=dict)
    proved: dict[tuple[int, str], Any] = field(default_factory=dict)
    _answered: dict[Any, Any] = field(default_factory=dict)

    def at(self, forward: ops.Forward) -> tuple[Any, Inputs | None]:
        name = forward.result.name
        return self.lowered.models[name], self.lowered.inputs[name]

    @cached_property
    def inside(self) -> frozenset[str]:
        return operations(self.lowered.program.body)

    def same(self, name: str) -> Any:
        """What is equal for forwards of one model on the very same inputs, of which all questions have one answer."""
        model, inputs, invoked = self.lowered.models[name], self.lowered.inputs[name], self.lowered.invoked.get(name)
        args, kwargs = inputs or ((), {})
        given = tuple(map(id, args)), tuple((keyword, id(value)) for keyword, value in kwargs.items())
        return id(model), inputs is None, given, name if invoked is not None else None

    def once(self, question: Any, ask: Callable[[], T]) -> T:
        """The answer to a question, asked for the first time."""
        if question not in self._answered:
            self._answered[question] = ask()
        found: T = self._answered[question]
        return found

    def order(self, forward: ops.Forward) -> Observation:
        name = forward.result.name
        if name not in self.orders:
            model, inputs = self.at(forward)
            if self.checker is None:
                self.orders[name] = self.once(
                    ("order", self.same(name)), lambda: observed(model, inputs, self.exact, self.inside)
                )
            else:
                self.orders[name] = self.checker.order(forward, model, inputs, self.inside)
        return self.orders[name]

    def extent(self, op: ops.Forward | ops.Invoke) -> Extent | None:
        name = op.result.name
        if isinstance(op, ops.Invoke):
            name = next(forward for forward, invokes in self.lowered.invoked.items() if name in invokes)
        found = extent_of if self.checker is None else self.checker.extent
        model, inputs = self.lowered.models[name], self.lowered.inputs[name]
        whole = self.once(
            ("extent", self.same(name)), lambda: found(model, inputs, example_of(self.lowered, name), self.inside)
        )
        if whole is None or isinstance(op, ops.Forward):
            return whole
        part = self.lowered.parts.get(op.result.name)
        return replace(whole, rows=part and part.rows, tokens=part and part.tokens)

    def lengths(self, forward: ops.Forward, rows: Value | None) -> tuple[int, ...]:
        name = forward.result.name
        invokes = self.lowered.invoked.get(name, ())
        if rows is not None or len(invokes) == 1:
            part = self.lowered.parts.get(invokes[0] if rows is None else rows.name)
            return part.lengths if part else ()
        inputs = self.lowered.inputs[name]
        return () if inputs is None or invokes else self.lowered.models[name]._lengths(*inputs)

    def undivided(self, forward: ops.Forward, op: ops.Read | ops.Write) -> str | None:
        name, model = forward.result.name, self.lowered.models[forward.result.name]
        return self.once(
            ("undivided", self.same(name), op.module, op.port, op.call),
            lambda: why_undivided(model, example_of(self.lowered, name), op, self.inside),
        )

    def why_not_merged(self, forward: ops.Forward) -> str | None:
        model = self.lowered.models[forward.result.name]
        if model._module.training:
            return "the model is in training mode, in which rows may depend on one another"
        seen = self.order(forward)
        if seen.how == "registered":
            return "how the model runs was not observed, since no input is known before the run"
        if seen.draws:
            return f"`{seen.draws}` draws random numbers, or changes a buffer, in the order of the program"
        if seen.keeps:
            return f"`{seen.keeps}` keeps something of its own from one forward to the next"
        if seen.is_changed_later("", "input"):
            return "the model writes in place to what it is given"
        for op in walk(forward.body):
            if isinstance(op, (ops.Read, ops.Write)):
                reason = self.undivided(forward, op)
                if reason is not None:
                    assert isinstance(op.module, Module)
                    return f"the rows of `{op.module.path}` cannot be told: {reason}"
        return None

    def why_not_resumed(self, forward: ops.Forward) -> str | None:
        model, seen = self.lowered.models[forward.result.name], self.order(forward)
        if model._module.training:
            return "the model is in training mode"
        if seen.how == "registered":
            return "how the model runs its modules was not observed"
        if seen.keeps:
            return f"`{seen.keeps}` keeps something of its own from one forward to the next"
        if seen.is_changed_later("", "input"):
            return "the model writes in place to what it is given"
        return f"`{seen.draws}` draws random numbers" if seen.draws else None

    def modules(self, forward: ops.Forward) -> dict[str, torch.nn.Module]:
        return dict(self.lowered.models[forward.result.name]._module.named_modules())

    def training(self, forward: ops.Forward) -> bool:
        return bool(self.lowered.models[forward.result.name]._module.training)

    def trusted(self, forward: ops.Forward) -> str | None:
        model = self.lowered.models[forward.result.name]
        if self.training(forward):
            return "the model is in training mode"
        if self.once(("adapters", id(model)), lambda: adapters(model._module)):
            return "adapters of the model are trained"
        if self.order(forward).draws:
            return "the model draws at random, or is not known to draw nothing"
        for argument in forward.arguments:
            guard = _without_gradient(argument, model, self.arguments)
            if isinstance(guard, str):
                return guard
            self.trust.update((each.text, each) for each in guard)
        return None

    def kind_of(self, name: str) -> type | None:
        if name not in self.arguments:
            return None
        text, kind = f"{name}.__class__", type(self.arguments[name])
        self.trust[text] = Guard(text, "identity", kind)
        return kind

    def positionwise(self, forward: ops.Forward, path: str) -> Positionwise | str:
        model, _ = self.at(forward)
        seen = self.order(forward)
        found = self.once(("positionwise", id(model), path, id(seen)), lambda: positionwise_of(model, path, seen))
        if isinstance(found, Positionwise):
            self.proved[model._token, path] = model
        return found


def _without_gradient(argument: ops.Argument, model: Any, given: Mapping[str, Any]) -> str | tuple[Guard, ...]:
    """What an argument of a forward is guarded on for no gradient to flow through it; or why one may."""
    value = argument.value
    if isinstance(value, Literal):
        return ()
    held = given.get(value.name) if isinstance(value, Value) else None
    if isinstance(held, torch.Tensor):
        guard = Guard(f"{value}.requires_grad".removeprefix("%"), "value", False)
        return "what it is given requires a gradient" if held.requires_grad else (guard,)
    if isinstance(held, (str, int, float)):
        return (Guard(f"{value}.__class__".removeprefix("%"), "identity", type(held)),)
    if isinstance(model, LanguageModel) and argument.keyword is None and not isinstance(held, Mapping):
        return ()  # text, or token ids
    return "whether gradients flow through what it is given is known to the run only"
