"""The grammar of the text form as a table: for each op a template, which the printer fills and the parser reads.

A template is literal text with holes `{fields:kind}`. The kind says how the fields are written; a hole that may be
empty brings its own leading space. The first word of a template is the op's keyword and tells the parser which op it
reads; where one class has several keywords, the fixed fields tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.ops import Op


@final
@dataclass(frozen=True, slots=True)
class Hole:
    """A place in a template: the fields written there, and how."""

    fields: tuple[str, ...]
    kind: str


@final
@dataclass(frozen=True, slots=True)
class Form:
    """One way to write ops of a class."""

    op: type[Op]
    parts: tuple[str | Hole, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keyword(self) -> str:
        """The first word."""
        return str(self.parts[0]).split()[0]

    @property
    def names_results(self) -> bool:
        """Whether the template itself says where the result stands; otherwise `%x = ` leads."""
        return any(isinstance(part, Hole) and part.kind == "define" for part in self.parts)


def _form(op: type[Op], template: str, **fixed: Any) -> Form:
    parts: list[str | Hole] = []
    for text, names, kind in re.findall(r"((?:[^{}]|\{\{|\}\})+)|\{([\w+]+):(\w+)\}", template):
        parts.append(text.replace("{{", "{").replace("}}", "}") if text else Hole(tuple(names.split("+")), kind))
    return Form(op, tuple(parts), fixed)


FORMS: tuple[Form, ...] = (
    _form(ops.Global, "global {name:name}", scope="global"),
    _form(ops.Global, "free {name:name}", scope="free"),
    _form(ops.SetGlobal, "set_global {name:name} = {value:operand}", scope="global"),
    _form(ops.SetGlobal, "set_free {name:name} = {value:operand}", scope="free"),
    _form(ops.Cell, "cell {name:name} = {initial:operand}"),
    _form(ops.Load, "load {cell:operand}{name:as}"),
    _form(ops.Store, "store {cell:operand} = {value:operand}"),
    _form(ops.Bound, "bound {value:operand} as {name:name}"),
    _form(ops.Import, "import {module:text}", name=None, level=0, leaf=False),
    _form(ops.Import, "import_leaf {module:text}", name=None, level=0, leaf=True),
    _form(ops.Import, "from {level+module:relative} import {name:name}", leaf=False),
    _form(ops.Attribute, "attr {object:owner}.{name:name}"),
    _form(ops.SetAttribute, "set_attr {object:owner}.{name:name} = {value:operand}"),
    _form(ops.Item, "item {object:operand}[{index:index}]"),
    _form(ops.SetItem, "set_item {object:operand}[{index:index}] = {value:operand}"),
    _form(ops.Delete, "delete_item {object:operand}[{index:index}]", name=None),
    _form(ops.Delete, "delete_attr {object:owner}.{name:name}", index=None),
    _form(ops.Build, "tuple ({elements:elements})", kind="tuple"),
    _form(ops.Build, "list [{elements:elements}]", kind="list"),
    _form(ops.Build, "set {{{elements:elements}}}", kind="set"),
    _form(ops.Build, "dict {{{elements:entries}}}", kind="dict"),
    _form(ops.Format, "format{parts:parts}"),
    _form(ops.Unpack, "unpack {value:operand}"),
    _form(ops.Call, "call {function:operand}{arguments:arguments}{target:as}"),
    _form(ops.Closure, "closure {name:name}{parameters+defaults:signature}", generator=False),
    _form(ops.Closure, "generator {name:name}{parameters+defaults:signature}", generator=True),
    _form(ops.Stage, "stage {needs:text}"),
    _form(ops.If, "if {condition:operand}"),
    _form(ops.For, "for {body+iterable+initial:loop}", together=False),
    _form(ops.For, "together {body+iterable+initial:loop}", together=True),
    _form(ops.While, "while{condition+initial:carry}"),
    _form(ops.Try, "try"),
    _form(ops.With, "with {result:define} = {context:operand}"),
    _form(ops.Yield, "yield{values:operands}"),
    _form(ops.Emit, "emit {value:operand}"),
    _form(ops.Break, "break{values:operands}"),
    _form(ops.Continue, "continue{values:operands}"),
    _form(ops.Return, "return {value:operand}"),
    _form(ops.Raise, "raise{exception:maybe}{cause:cause}"),
    _form(
        ops.Forward,
        "forward {result:define} = {method:word} {model:operand}{arguments:arguments}"
        "{base+replays:base}{stops+body:stops}",
    ),
    _form(ops.Prefix, "prefix {model:operand}{arguments:arguments} holds {modules:operand}"),
    _form(ops.Release, "release {prefix:operand}"),
    _form(ops.Postponed, "postponed {reached:operand}"),
    _form(ops.Strands, "strands"),
    _form(ops.Strand, "strand{after:after}"),
    _form(ops.Session, "session {result:define} = {model:operand}{arguments:arguments}"),
    _form(ops.Invoke, "invoke {result:define} = {tracer:operand}{arguments:arguments}"),
    _form(ops.Steps, "steps {body:item} in {tracer:operand}[{start+stop:bounds}]{rows:rows}", asked=True),
    _form(ops.Steps, "repeat {body:item} in {tracer:operand}[{start+stop:bounds}]{rows:rows}", asked=False),
    _form(ops.FromEnd, "from_end {index:operand}"),
    _form(ops.Read, "read {module:operand} {port:word}{call:call}{rows:rows}"),
    _form(ops.Write, "write {module:operand} {port:word}{call:call}{rows:rows} = {value:operand}"),
    _form(ops.Skip, "skip {module:operand}{call:call}{rows:rows} = {value:operand}"),
    _form(ops.Save, "save {value:operand}", copy=True),
    _form(ops.Save, "keep {value:operand}", copy=False),
    _form(
        ops.Cache,
        "cache {model:operand} named {named:operand} others {others:operand} ports {ports:operand}"
        " device {device:operand} dtype {dtype:operand} detach {detach:operand}{rows:rows}",
    ),
    _form(ops.Record, "record {cache:operand}[{path:operand}] {port:word}{call:call}{step:step} = {value:operand}"),
    _form(ops.Stop, "stop {tracer:operand}"),
    _form(ops.Backward, "backward {loss:operand}{arguments:arguments}{sparing:sparing}"),
    _form(ops.Grad, "grad {value:operand}"),
    _form(ops.SetGrad, "set_grad {value:operand} = {gradient:operand}"),
    _form(ops.Gradients, "gradients {outputs:operand} by {inputs:operand}{arguments:arguments}"),
    _form(ops.Require, "require {value:operand}{leaf:leaf}"),
    _form(ops.Track, "track {value:operand}{source:in}"),
    _form(ops.AtGradient, "at_gradient {value:operand}"),
    _form(ops.Edit, "edit {model:operand}{arguments:arguments}"),
    _form(ops.Applied, "applied {title:text}"),
    _form(ops.Captured, "captured {model:operand}[{edit:operand}].{name:name}"),
    _form(ops.At, "at {module:operand} {port:word}{call:call}"),
)
"""How each op is written, all but `Operator`, which is written infix: `%0 = %a + %b`, `%1 = not %a`, `%2 = %a += 1`."""

KEYWORDS = {form.keyword: form for form in FORMS}

BLOCKS: dict[type[Op], tuple[tuple[str, str], ...]] = {
    ops.Closure: (("", "body"),),
    ops.If: (("then", "then"), ("else", "orelse")),
    ops.For: (("", "body"), ("else", "orelse")),
    ops.While: (("", "condition"), ("do", "body"), ("else", "orelse")),
    ops.Try: (("", "body"), ("handle", "handlers"), ("else", "orelse"), ("finally", "finalizer")),
    ops.With: (("", "body"),),
    ops.Forward: (("", "body"),),
    ops.Postponed: (("", "body"),),
    ops.Strands: (("", "body"),),
    ops.Strand: (("", "body"),),
    ops.Session: (("", "body"),),
    ops.Invoke: (("", "body"),),
    ops.Steps: (("", "body"),),
    ops.Backward: (("", "body"),),
    ops.Edit: (("", "body"),),
    ops.Applied: (("", "body"),),
    ops.At: (("", "body"),),
    ops.AtGradient: (("", "body"),),
}
"""The regions of each op: the label of the line that opens it, and its field. Without a label it opens the op."""

UNARY = frozenset({"+", "-", "~", "not"})
ARITHMETIC = frozenset({"+", "-", "*", "/", "//", "%", "**", "@", "<<", ">>", "&", "|", "^"})
"""The binary operators that have an augmented assignment."""
BINARY = ARITHMETIC | {"==", "!=", "<", "<=", ">", ">=", "is", "is not", "in", "not in"}

SHORT_DTYPES = {
    "bool": "bool",
    "bfloat16": "bf16",
    **{f"float{bits}": f"f{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    **{f"complex{bits}": f"c{bits}" for bits in (32, 64, 128)},
}
LONG_DTYPES = {short: long for long, short in SHORT_DTYPES.items()}
RESERVED_TYPES = frozenset({"any", "tensor", "module", *LONG_DTYPES})
"""Words with a meaning of their own where a type is expected."""
