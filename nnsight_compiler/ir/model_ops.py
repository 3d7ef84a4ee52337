"""Ops of models: forwards and what takes part in them, gradients, edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal as OneOf
from typing import final

from nnsight_compiler.ir.op import Argument, Effect, Op, Port, Region
from nnsight_compiler.ir.values import Module, Operand, Value


@final
@dataclass(frozen=True, slots=True)
class Forward(Op):
    """One run of a model, with the body that takes part in it. `result` is the tracer. `arguments` are those of
    `model.trace(…)`, or of the method named.

    stops: made by `stop_early`: whether it ends at the last site of its placed body.
    base, replays: made by `share_prefixes`: the modules with these paths do not run; they give what the prefix `base`
        holds of them."""

    effects = Effect.MODEL
    result: Value
    model: Operand
    method: OneOf["trace", "generate", "scan"]
    arguments: tuple[Argument, ...]
    body: Region
    stops: bool = False
    base: Operand | None = None
    replays: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Prefix(Op):
    """Made by `share_prefixes`: what the modules with the paths in `modules`, a tuple, give in a forward on these
    arguments in which nothing is changed. It runs when something is first taken from it, up to the last of them."""

    effects = Effect.MODEL
    result: Value
    model: Operand
    arguments: tuple[Argument, ...]
    modules: Operand


@final
@dataclass(frozen=True, slots=True)
class Release(Op):
    """Made by `share_prefixes`: frees what a prefix holds, after the last forward that takes from it."""

    effects = Effect.WRITES
    prefix: Operand


@final
@dataclass(frozen=True, slots=True)
class Postponed(Op):
    """Made by `merge_forwards`: what a round does to other things, behind its last forward. Where the round fails
    before that, this runs nevertheless if the round had come to where `reached` is made, which is where it stood; then
    the exception goes on."""

    effects = Effect.CONTROL
    reached: Operand
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Strands(Op):
    """Made by `merge_straight_forwards`: the strands in its region advance side by side, each to its next forward, and
    these forwards run as rows of one."""

    effects = Effect.MODEL
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Strand(Op):
    """A part of the code of `strands`, in its order. It begins when those before it have waited `after` times."""

    effects = Effect.MODEL
    after: int
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Session(Op):
    """Several forwards as one: values flow from one to the next without being saved. Its region runs once, in place."""

    effects = Effect.MODEL
    result: Value
    model: Operand
    arguments: tuple[Argument, ...]
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Invoke(Op):
    """Rows of a forward, given by their own input; reads and writes in the body see these rows alone."""

    effects = Effect.MODEL
    result: Value
    tracer: Operand
    arguments: tuple[Argument, ...]
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Steps(Op):
    """Runs its body at each of these steps of a generation; the parameter is the step's number. Open-ended where
    `stop` is `Literal(None)`. What the body defines is, after it, as it was at the last step. `asked`: whether the
    program names these steps, so that they must come; `repeat_writes` makes others. `rows`: the result of the `invoke`
    whose steps are meant, which are over when all its rows have ended."""

    effects = Effect.MODEL
    tracer: Operand
    start: Operand
    stop: Operand
    body: Region
    asked: bool = True
    rows: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class FromEnd(Op):
    """Made by `repeat_writes`: whether an index counts from the end, so that it means a position of each step of a
    generation, and not one of the prompt."""

    result: Value
    index: Operand


@final
@dataclass(frozen=True, slots=True)
class Read(Op):
    """The live value at a site: what `module` returned (`output`), its first argument (`input`), or all its arguments
    (`inputs`: a tuple and a dict), at its call number `call` (`None`: it is called once). `rows` is the result of the
    `invoke` whose rows are meant; `None` means all rows. `result` of the model is what the whole run gives: the ids of
    a generation."""

    effects = Effect.READS | Effect.MODEL
    result: Value
    module: Operand
    port: Port
    call: int | None = None
    rows: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Write(Op):
    """Replaces the value at a site, in the rows of an `invoke` where `rows` names one; a scalar replaces every element
    of a tensor."""

    effects = Effect.WRITES | Effect.MODEL
    module: Operand
    port: Port
    value: Operand
    call: int | None = None
    rows: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Skip(Op):
    """The module's forward is not run; `value` becomes its output."""

    effects = Effect.WRITES | Effect.MODEL
    module: Operand
    value: Operand
    call: int | None = None
    rows: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Save(Op):
    """The value as it is here, kept. With `copy`, tensors in it are copied, since something may write to them later;
    without, the value itself is kept."""

    effects = Effect.READS
    result: Value
    value: Operand
    copy: bool = True


@final
@dataclass(frozen=True, slots=True)
class Cache(Op):
    """A container for what modules of `model` give in the surrounding forward, after all that is written there. The
    pass `fill_caches` makes the reads, and the `record`s that fill it.

    named: a tuple of paths of modules that must run. others: one of modules that are recorded if they run, or
        `Literal(None)` for every module.
    ports: a tuple of what is recorded of each: `output`, `inputs`.
    device, dtype: where the tensors go, and what dtype those of floating point get; `None` leaves them as they are.
    detach: whether they are cut off from what gradients flow through.
    """

    effects = Effect.WRITES
    result: Value
    model: Operand
    named: Operand
    others: Operand
    ports: Operand
    device: Operand
    dtype: Operand
    detach: Operand
    rows: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Record(Op):
    """Puts a copy of what a module gave into a cache, under the module's `path`. `call` and `step` tell several values
    of one module apart."""

    effects = Effect.WRITES
    cache: Operand
    path: Operand
    port: Port
    value: Operand
    call: int | None = None
    step: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Stop(Op):
    """The forward ends here; what follows in the model does not run."""

    effects = Effect.MODEL
    tracer: Operand


@final
@dataclass(frozen=True, slots=True)
class Backward(Op):
    """`with loss.backward(…):` runs a backward pass; gradients are read and written in the body. `record_gradients`
    makes the body a sequence of `at_gradient`; `sparing` are the models whose weights then accumulate nothing."""

    effects = Effect.MODEL
    loss: Operand
    arguments: tuple[Argument, ...]
    body: Region
    sparing: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Grad(Op):
    """The gradient of the loss of the surrounding `backward` with respect to `value`."""

    effects = Effect.READS | Effect.MODEL
    result: Value
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class SetGrad(Op):
    """Replaces the gradient with respect to `value` in the surrounding `backward`."""

    effects = Effect.WRITES | Effect.MODEL
    value: Operand
    gradient: Operand


@final
@dataclass(frozen=True, slots=True)
class Gradients(Op):
    """`torch.autograd.grad(outputs, inputs, …)`: a tuple of the gradients with respect to each of `inputs`. Nothing
    accumulates."""

    effects = Effect.MODEL
    result: Value
    outputs: Operand
    inputs: Operand
    arguments: tuple[Argument, ...]


@final
@dataclass(frozen=True, slots=True)
class Require(Op):
    """Made by `record_gradients`: what is computed from a value is recorded from here on, so that it has a gradient.
    `leaf` says which tensor in the value is meant, counted as torch's pytrees do; `None` means all."""

    effects = Effect.MODEL
    value: Operand
    leaf: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Track(Op):
    """Made by `record_gradients`: where the gradient with respect to a value, as it is here, arrives. With a `source`,
    the value is a view of what was read there, and its gradient is that part of the gradient of the whole."""

    effects = Effect.READS
    result: Value
    value: Operand
    source: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class AtGradient(Op):
    """Made by `record_gradients`: the ops that run in the backward pass when the gradient of a value has arrived."""

    effects = Effect.MODEL
    value: Operand
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Edit(Op):
    """Makes an edited model: `model`, in each of whose forwards `body` runs before anything else. Nothing runs here,
    and what the body defines is not visible outside. results: the tracer of such a forward, which only the body may
    use, and the edited model."""

    results: tuple[Value, ...]
    model: Operand
    arguments: tuple[Argument, ...]
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Applied(Op):
    """What an edit does in the forward around it. Made by `specialise`; `title` says where the edit stands."""

    effects = Effect.MODEL
    title: str
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Captured(Op):
    """A value that an edit of the model, by its number, took from around it where it was made."""

    effects = Effect.READS
    result: Value
    model: Operand
    edit: Operand
    name: str


@final
@dataclass(frozen=True, slots=True)
class At(Op):
    """Made by `place`: the ops that run at one site of the surrounding `forward`, in order. The site `skip` is just
    after the module's input: what is given there becomes its output, and it does not run."""

    effects = Effect.MODEL
    module: Module
    port: OneOf["input", "skip", "output", "result"]
    call: int | None
    body: Region


def last_site(forward: Forward) -> At | None:
    """The last site of a placed forward; `None` where it has none."""
    last = forward.body.ops[-1] if forward.body.ops else None
    return last if isinstance(last, At) else None
