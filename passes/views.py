"""Which values are parts of what stands at a site: views of a tensor, items of a tuple."""

from __future__ import annotations

from nnsight_compiler.ir import ops
from nnsight_compiler.ir.values import Value
from nnsight_compiler.passes.behaviour import words
from nnsight_compiler.passes.origins import Origins

VIEWS = frozenset(
    f"torch.Tensor.{name}"
    for name in words(
        "view narrow select transpose swapaxes swapdims permute movedim moveaxis t squeeze unsqueeze unflatten diagonal"
        " chunk split tensor_split unbind hsplit vsplit dsplit as_strided view_as unfold"
    )
)
"""Methods whose results are views of their receiver, always."""
ITSELF = frozenset({"torch.Tensor.requires_grad_", "torch.Tensor.retain_grad"})
"""Methods that give their receiver back."""


def source_of(value: Value, origins: Origins) -> Value | None:
    """The read of which a value is a part, or which it is; `None` for what was computed, or comes from outside."""
    seen: Value = value
    while True:
        op = origins.definition(seen)
        match op:
            case ops.Read(result=result):
                return result
            case ops.Item(object=Value() as base) | ops.Unpack(value=Value() as base):
                seen = base
            case ops.Attribute(object=Value() as base):
                seen = base
            case ops.Bound(value=Value() as base):
                seen = base
            case ops.Call(target=str() as target) if target in VIEWS | ITSELF:
                receiver = origins.arguments(op)[0].value
                if not isinstance(receiver, Value):
                    return None
                seen = receiver
            case _:
                return None
