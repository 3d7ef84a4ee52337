"""The ops of the IR: a closed set of final, frozen classes, each with one meaning, documented in `docs/ir.md`.

Fields have roles, told by name and annotation: `result` and `results` are defined by the op, fields annotated with
`Operand` (or with a structure made of operands) are used by it, `Region` fields are nested code, the rest are plain
attributes. `nnsight_compiler.ir.traverse` works on any op through these roles.

Regions of `forward`, `strands`, `strand`, `session`, `invoke`, `with`, `backward`, `applied`, `at` and `at_gradient`
run exactly once, in place: what they define is visible after them. So is what `steps` defines, as it was at the last
step. Regions of `if`, `for`, `while`, `try`, `edit` and `closure` are closed: values leave them through terminators
(`yield`, `continue`, `break`) or cells.
"""

from __future__ import annotations

from typing import get_args

from nnsight_compiler.ir.control_ops import Break, Continue, Emit, For, If, Raise, Return, Try, While, With, Yield
from nnsight_compiler.ir.model_ops import (
    Applied,
    At,
    AtGradient,
    Backward,
    Cache,
    Captured,
    Edit,
    Forward,
    FromEnd,
    Grad,
    Gradients,
    Invoke,
    Postponed,
    Prefix,
    Read,
    Record,
    Release,
    Require,
    Save,
    Session,
    SetGrad,
    Skip,
    Steps,
    Stop,
    Strand,
    Strands,
    Track,
    Write,
    last_site,
)
from nnsight_compiler.ir.name_ops import Bound, Cell, Global, Import, Load, SetGlobal, Store
from nnsight_compiler.ir.object_ops import (
    Attribute,
    Build,
    Call,
    Closure,
    Delete,
    Format,
    Item,
    Operator,
    SetAttribute,
    SetItem,
    Stage,
    Unpack,
)
from nnsight_compiler.ir.op import (
    Argument,
    Effect,
    Element,
    FormatPart,
    Handler,
    Op,
    Parameter,
    ParameterKind,
    Port,
    Region,
)

Terminator = Yield | Break | Continue | Return | Raise
AnyOp = (
    Global | SetGlobal | Cell | Load | Store | Bound | Import
    | Attribute | SetAttribute | Item | SetItem | Delete | Build | Format | Unpack | Operator | Call | Closure | Stage
    | If | For | While | Try | With | Yield | Emit | Break | Continue | Return | Raise
    | Forward | Prefix | Release | Postponed | Strands | Strand | Session | Invoke | Steps | FromEnd | Read | Write
    | Skip | Save | Cache | Record | Stop
    | Backward | Grad | SetGrad | Edit | Applied | Captured | At | Gradients | Require | Track | AtGradient
)  # fmt: skip
"""Every op there is. `match` over it ends in `assert_never`."""

ALL_OPS: tuple[type[Op], ...] = get_args(AnyOp)
TERMINATORS = (Yield, Break, Continue, Return, Raise)
TRANSPARENT = (Forward, Postponed, Strands, Strand, Session, Invoke, Steps, With, Backward, Applied, At, AtGradient)
"""Ops whose region runs in place, so that its values stay visible after it."""

__all__ = [
    "ALL_OPS",
    "AnyOp",
    "Applied",
    "Argument",
    "At",
    "AtGradient",
    "Attribute",
    "Backward",
    "Bound",
    "Break",
    "Build",
    "Cache",
    "Call",
    "Captured",
    "Cell",
    "Closure",
    "Continue",
    "Delete",
    "Edit",
    "Effect",
    "Element",
    "Emit",
    "For",
    "Format",
    "FormatPart",
    "Forward",
    "FromEnd",
    "Global",
    "Grad",
    "Gradients",
    "Handler",
    "If",
    "Import",
    "Invoke",
    "Item",
    "Load",
    "Op",
    "Operator",
    "Parameter",
    "ParameterKind",
    "Port",
    "Postponed",
    "Prefix",
    "Raise",
    "Read",
    "Record",
    "Region",
    "Release",
    "Require",
    "Return",
    "Save",
    "Session",
    "SetAttribute",
    "SetGlobal",
    "SetGrad",
    "SetItem",
    "Skip",
    "Stage",
    "Steps",
    "Stop",
    "Store",
    "Strand",
    "Strands",
    "TERMINATORS",
    "TRANSPARENT",
    "Terminator",
    "Track",
    "Try",
    "Unpack",
    "While",
    "With",
    "Write",
    "Yield",
    "last_site",
]
