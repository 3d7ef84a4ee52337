"""Fakes of floating-point tensors beside real whole numbers: each operation gives the shapes that torch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from nnsight_compiler.runtime import shadow
from nnsight_compiler.runtime.shadow import Fakes

ATEN = torch.ops.aten
X, Y, MATRIX, COLUMN = torch.rand(2, 3, 4), torch.rand(2, 1, 4), torch.rand(3, 4), torch.rand(4, 1)
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (ATEN.mm.default, (MATRIX, COLUMN)),
    (ATEN.addmm.default, (torch.rand(3), MATRIX, MATRIX.T)),
    (ATEN.bmm.default, (X, X.transpose(1, 2))),
    *((op, (X, Y)) for op in (ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor)),
    *((op, (X.transpose(0, 1), 2)) for op in (ATEN.add.Tensor, ATEN.mul.Tensor, ATEN.mul.Scalar)),
    (ATEN.mul.Tensor, (X.bfloat16(), torch.tensor(2.0))),
    (ATEN.add.Tensor, (X.bfloat16(), MATRIX)),
    (ATEN.pow.Tensor_Scalar, (X.permute(2, 0, 1), 2)),
    *(
        (op, (given,))
        for op in (
            ATEN.neg.default, ATEN.rsqrt.default, ATEN.cos.default, ATEN.sin.default, ATEN.tanh.default,
            ATEN.sigmoid.default, ATEN.relu.default, ATEN.gelu.default, ATEN.silu.default, ATEN.clone.default,
            ATEN.detach.default, ATEN.alias.default,
        )
        for given in (X, X.transpose(1, 2), X[:, ::2], Y.expand(2, 3, 4).half())
    ),
    (ATEN._softmax.default, (X.transpose(1, 2), -1, False)),
    (ATEN.native_layer_norm.default, (X, [4], torch.rand(4), torch.rand(4), 1e-5)),
    (ATEN.native_layer_norm.default, (X.transpose(0, 1), [4], None, None, 1e-5)),
    (ATEN.mean.dim, (X, [-1], True)),
    (ATEN.where.self, (X.transpose(1, 2) > 0.5, X.transpose(1, 2), torch.tensor(0.0))),
    (ATEN.masked_fill.Scalar, (X, Y > 0.5, -1.0)),
    (ATEN.cat.default, ([X, Y], 1)),
    (ATEN.cat.default, ([torch.rand(0), X],)),
    (ATEN.t.default, (MATRIX,)),
    (ATEN.transpose.int, (X, 0, -1)),
    (ATEN.permute.default, (X, [2, 0, 1])),
    (ATEN.view.default, (X, [6, -1])),
    (ATEN.view.default, (X.transpose(0, 1), [3, 2, 2, 2])),
    (ATEN._unsafe_view.default, (X, [2, 12])),
    (ATEN._reshape_alias.default, (X, [6, 4], [4, 1])),
    (ATEN.as_strided.default, (X, [2, 2], [3, 1], 1)),
    (ATEN.expand.default, (Y, [2, 3, 4])),
    (ATEN.unsqueeze.default, (X.transpose(0, 1), -1)),
    (ATEN.squeeze.dim, (Y, 1)),
    (ATEN.slice.Tensor, (X, 1, 0, 3, 2)),
    (ATEN.select.int, (X, 1, -1)),
    (ATEN.split.Tensor, (X, 2, 1)),
]  # fmt: skip


def metadata(value: Any) -> list[Any]:
    return [
        (leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device)
        for leaf in pytree.tree_leaves(value)
    ]


def run(function: Any, arguments: Any) -> Any:
    """A call on fakes, as a model's forward makes it."""
    fakes = Fakes(nn.Module(), (), {})
    given = pytree.tree_map_only(torch.Tensor, fakes, arguments)
    with torch.no_grad(), fakes.running_on_numbers():
        return function(*given)


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[f"{op}-{number}" for number, (op, _) in enumerate(CALLS)])
def test_operations_on_fakes_give_what_torch_gives(op: Any, arguments: tuple[Any, ...]) -> None:
    found, wanted = run(op, arguments), op(*arguments)
    assert all(type(leaf) is FakeTensor for leaf in pytree.tree_leaves(found))
    assert type(found) is type(wanted) or isinstance(wanted, torch.Tensor)
    assert metadata(found) == metadata(wanted)


def test_every_operation_that_goes_the_short_way_is_tested() -> None:
    assert {op for op, _ in CALLS} == shadow._SHAPES_ALONE


def test_fakes_meet_real_whole_numbers() -> None:
    fakes = Fakes(nn.Module(), (), {})
    hidden, mask = fakes(X), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad(), fakes.running_on_numbers():
        hidden_of_some = hidden * mask[..., None]
        assert type(mask * 2) is torch.Tensor
        assert int((mask * 2).sum()) == 6
    assert type(hidden_of_some) is FakeTensor
    assert metadata(hidden_of_some) == metadata(X * mask[..., None])


def test_what_no_shapes_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="broadcast"):
        run(ATEN.add.Tensor, (X, torch.rand(5)))
    with pytest.raises(RuntimeError, match="reduction dim"):
        run(ATEN.mm.default, (MATRIX, MATRIX))


def test_views_of_fakes_are_views() -> None:
    fakes = Fakes(nn.Module(), (), {})
    hidden = fakes(X)
    with torch.no_grad(), fakes.running_on_numbers():
        view = hidden.transpose(0, 1)[1:]
        assert view.untyped_storage()._cdata == hidden.untyped_storage()._cdata
        assert hidden.mul(2).untyped_storage()._cdata != hidden.untyped_storage()._cdata
