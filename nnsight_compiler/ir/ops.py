"""The ops of the IR: a closed set of final, frozen classes, each with one meaning, documented in `docs/ir.md`.

Fields have roles, told by name and annotation: `result` and `results` are defined by the op, fields annotated with
`Operand` (or with a structure made of operands) are used by it, `Region` fields are nested code, the rest are plain
attributes. `nnsight_compiler.ir.traverse` works on any op through these roles.

Regions of `forward`, `session`, `invoke`, `with`, `backward`, `applied`, `at` and `at_gradient` run exactly once, in
place: what they define is visible after them. So is what `steps` defines, as it was at the last step. Regions of `if`,
`for`, `while`, `try`, `edit` and `closure` are closed: values leave them through terminators (`yield`, `continue`,
`break`) or cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Flag, auto
from typing import TYPE_CHECKING, ClassVar, final, get_args
from typing import Literal as OneOf

from nnsight_compiler.ir.span import NOWHERE, Span
from nnsight_compiler.ir.values import Module, Operand, Value

if TYPE_CHECKING:
    from nnsight_compiler.ir.program import Program


class Effect(Flag):
    """What running an op may do besides computing its results."""

    NONE = 0
    READS = auto()
    """Its results depend on memory that can change: a cell, an attribute, a tensor's storage."""
    WRITES = auto()
    """It changes memory: a cell, a container, a tensor."""
    CALLS = auto()
    """It runs code that the compiler may not know."""
    CONTROL = auto()
    """It leaves its region: `return`, `raise`, `break`, …"""
    MODEL = auto()
    """It runs a model, or takes part in its forward."""


Port = OneOf["output", "input", "inputs", "result"]
ParameterKind = OneOf["positional_only", "positional_or_keyword", "var_positional", "keyword_only", "var_keyword"]


@final
@dataclass(frozen=True, slots=True)
class Region:
    """A block of ops with parameters. The last op may be a terminator; without one, control falls off the end."""

    parameters: tuple[Value, ...] = ()
    ops: tuple[Op, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an experiment or a closure, as in Python's signature."""

    value: Value
    kind: ParameterKind = "positional_or_keyword"
    optional: bool = False


@final
@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a call: positional, `keyword=value`, `*value` (`star="*"`) or `**value` (`star="**"`)."""

    value: Operand
    keyword: str | None = None
    star: OneOf["", "*", "**"] = ""


@final
@dataclass(frozen=True, slots=True)
class Element:
    """One element of a display: a value, `*value`; in a dict `key: value`, or `**value` with `starred`."""

    value: Operand
    key: Operand | None = None
    starred: bool = False


@final
@dataclass(frozen=True, slots=True)
class FormatPart:
    """One replacement field of an f-string: `{value!conversion:specification}`."""

    value: Operand
    conversion: OneOf["", "r", "s", "a"] = ""
    specification: Operand | None = None


@final
@dataclass(frozen=True, slots=True)
class Handler:
    """One `except` clause. `types` computes the exception types and yields one operand (`None`: catches all). The
    parameter of `body` is the exception."""

    types: Region | None
    body: Region


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. Equality ignores `span`, so that equal programs written in different places are equal."""

    effects: ClassVar[Effect] = Effect.NONE
    span: Span = field(default=NOWHERE, compare=False, kw_only=True)


# --- names and cells ---


@final
@dataclass(frozen=True, slots=True)
class Global(Op):
    """Reads a name as Python does: `scope="global"` from the module's globals, then the builtins; `scope="free"` from
    the closure of the decorated function. Read anew at each run."""

    effects = Effect.READS
    result: Value
    name: str
    scope: OneOf["global", "free"] = "global"


@final
@dataclass(frozen=True, slots=True)
class SetGlobal(Op):
    """Assigns a name that the function declares `global`, or `nonlocal` of a function outside the program."""

    effects = Effect.WRITES
    name: str
    value: Operand
    scope: OneOf["global", "free"] = "global"


@final
@dataclass(frozen=True, slots=True)
class Cell(Op):
    """A fresh box for a variable that needs memory: captured by a closure, or assigned where an exception may pass.
    `initial` may be `Unbound`."""

    effects = Effect.WRITES
    result: Value
    name: str
    initial: Operand


@final
@dataclass(frozen=True, slots=True)
class Load(Op):
    """Reads a cell. An empty cell raises Python's `UnboundLocalError` with the cell's `name`; without a name, what it
    holds may be `Unbound`."""

    effects = Effect.READS
    result: Value
    cell: Operand
    name: str | None


@final
@dataclass(frozen=True, slots=True)
class Store(Op):
    """Puts a value into a cell; `Unbound` empties it (`del`)."""

    effects = Effect.WRITES
    cell: Operand
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Bound(Op):
    """The value of a variable that some path may have left unassigned; raises `UnboundLocalError` if it did."""

    result: Value
    value: Operand
    name: str


@final
@dataclass(frozen=True, slots=True)
class Import(Op):
    """`import module` (`name=None`: the top package, or the module itself with `leaf`), `from module import name`.
    `level` counts the dots of a relative import."""

    effects = Effect.CALLS
    result: Value
    module: str
    name: str | None = None
    level: int = 0
    leaf: bool = False


# --- objects ---


@final
@dataclass(frozen=True, slots=True)
class Attribute(Op):
    """`object.name`."""

    effects = Effect.READS
    result: Value
    object: Operand
    name: str


@final
@dataclass(frozen=True, slots=True)
class SetAttribute(Op):
    """`object.name = value`."""

    effects = Effect.WRITES
    object: Operand
    name: str
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Item(Op):
    """`object[index]`. On a tensor that is plain indexing, often a view."""

    effects = Effect.READS
    result: Value
    object: Operand
    index: Operand


@final
@dataclass(frozen=True, slots=True)
class SetItem(Op):
    """`object[index] = value`. On a value read from a site and found to be a tuple or a `ModelOutput`, replaces that
    item at the site."""

    effects = Effect.WRITES
    object: Operand
    index: Operand
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Delete(Op):
    """`del object[index]`, or `del object.name` where `index` is `None`."""

    effects = Effect.WRITES
    object: Operand
    index: Operand | None
    name: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Build(Op):
    """A display: a new list, set or dict, or a tuple with starred parts."""

    result: Value
    kind: OneOf["tuple", "list", "set", "dict"]
    elements: tuple[Element, ...]


@final
@dataclass(frozen=True, slots=True)
class Format(Op):
    """An f-string: literal text and replacement fields, joined."""

    result: Value
    parts: tuple[str | FormatPart, ...]


@final
@dataclass(frozen=True, slots=True)
class Unpack(Op):
    """`a, *b, c = value`. `star` is the place of the starred result, -1 where there is none."""

    effects = Effect.CALLS
    results: tuple[Value, ...]
    value: Operand
    star: int = -1


@final
@dataclass(frozen=True, slots=True)
class Operator(Op):
    """A unary, binary or comparison operator, by Python's own sign: `+`, `-`, `not`, `<=`, `is not`, `in`, …
    With `in_place`, the augmented assignment (`+=`), which may change its first operand and returns it."""

    effects = Effect.READS
    result: Value
    operator: str
    operands: tuple[Operand, ...]
    in_place: bool = False


@final
@dataclass(frozen=True, slots=True)
class Call(Op):
    """`function(arguments)`. `target` is the name of the callee in the table of known calls (`torch.Tensor.softmax`),
    set by `specialise`; after that pass a call without a target is a host op."""

    effects = Effect.CALLS
    result: Value
    function: Operand
    arguments: tuple[Argument, ...] = ()
    target: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Closure(Op):
    """A lambda, a nested function, or (`generator`) a generator expression, which is called once with its first
    iterable. `defaults` has one operand for each optional parameter, in order."""

    result: Value
    name: str
    parameters: tuple[Parameter, ...]
    defaults: tuple[Operand, ...]
    body: Region
    generator: bool = False


@final
@dataclass(frozen=True, slots=True)
class Stage(Op):
    """A function that specialises `program` to its arguments when it is called, and then runs it: what depends on
    `needs`, which only a run can give. The program is as the user wrote it, so that no pass looks into it."""

    result: Value
    program: Program
    needs: str


# --- control flow ---


@final
@dataclass(frozen=True, slots=True)
class If(Op):
    """Runs one of two regions; each ends in a `yield` of as many operands as there are results, or leaves."""

    results: tuple[Value, ...]
    condition: Operand
    then: Region
    orelse: Region


@final
@dataclass(frozen=True, slots=True)
class For(Op):
    """`for`. `body` takes the item and the carried values; it ends in `continue` (also at its natural end) or `break`
    with the new carried values. `orelse` takes the carried values, runs where no `break` did, and yields the
    results."""

    results: tuple[Value, ...]
    iterable: Operand
    initial: tuple[Operand, ...]
    body: Region
    orelse: Region | None = None


@final
@dataclass(frozen=True, slots=True)
class While(Op):
    """`while`. `condition` takes the carried values and yields the condition, then the carried values; `body` and
    `orelse` are as in `for`, without an item."""

    results: tuple[Value, ...]
    initial: tuple[Operand, ...]
    condition: Region
    body: Region
    orelse: Region | None = None


@final
@dataclass(frozen=True, slots=True)
class Try(Op):
    """`try`/`except`/`else`/`finally`. Variables assigned inside and used outside are cells."""

    body: Region
    handlers: tuple[Handler, ...]
    orelse: Region | None = None
    finalizer: Region | None = None


@final
@dataclass(frozen=True, slots=True)
class With(Op):
    """`with context as result:` on a context manager of Python's (`torch.no_grad()`)."""

    effects = Effect.CALLS
    result: Value
    context: Operand
    body: Region


@final
@dataclass(frozen=True, slots=True)
class Yield(Op):
    """Ends a region normally and hands its values to the op that owns it."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Emit(Op):
    """Hands one value to the consumer of a generator expression and goes on when asked for the next."""

    effects = Effect.CONTROL
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Break(Op):
    """Leaves the nearest loop with these carried values."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Continue(Op):
    """Begins the next round of the nearest loop with these carried values."""

    effects = Effect.CONTROL
    values: tuple[Operand, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Return(Op):
    """Leaves the program or the closure. Inside a `forward` it ends the body; the forward itself still finishes."""

    effects = Effect.CONTROL
    value: Operand


@final
@dataclass(frozen=True, slots=True)
class Raise(Op):
    """`raise exception from cause`; both absent: re-raises the exception being handled."""

    effects = Effect.CONTROL
    exception: Operand | None = None
    cause: Operand | None = None


# --- models ---


@final
@dataclass(frozen=True, slots=True)
class Forward(Op):
    """One run of a model, with the body that takes part in it. `result` is the tracer. `arguments` are those of
    `model.trace(…)`, or of the method named."""

    effects = Effect.MODEL
    result: Value
    model: Operand
    method: OneOf["trace", "generate", "scan"]
    arguments: tuple[Argument, ...]
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


Terminator = Yield | Break | Continue | Return | Raise
AnyOp = (
    Global | SetGlobal | Cell | Load | Store | Bound | Import
    | Attribute | SetAttribute | Item | SetItem | Delete | Build | Format | Unpack | Operator | Call | Closure | Stage
    | If | For | While | Try | With | Yield | Emit | Break | Continue | Return | Raise
    | Forward | Session | Invoke | Steps | FromEnd | Read | Write | Skip | Save | Cache | Record | Stop
    | Backward | Grad | SetGrad | Edit | Applied | Captured | At | Gradients | Require | Track | AtGradient
)  # fmt: skip
"""Every op there is. `match` over it ends in `assert_never`."""

ALL_OPS: tuple[type[Op], ...] = get_args(AnyOp)
TERMINATORS = (Yield, Break, Continue, Return, Raise)
TRANSPARENT = (Forward, Session, Invoke, Steps, With, Backward, Applied, At, AtGradient)
"""Ops whose region runs in place, so that its values stay visible after it."""
