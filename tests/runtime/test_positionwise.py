"""Which modules treat every position by itself: proofs, and what refutes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import FAMILIES, random_model
from chosen import some
from torch import nn

from nnsight_compiler.runtime.positionwise import why_not_positionwise

WIDTH = 32


class Applied(nn.Module):
    """A module with this forward, a parameter for one vector and one for five positions, and a buffer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.vector, self.table = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(5, WIDTH))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def count(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.calls += 1
    return x * 2


APART = {
    "linear": nn.Linear(WIDTH, 7),
    "linear without a bias": nn.Linear(WIDTH, 7, bias=False),
    "layer norm": nn.LayerNorm(WIDTH),
    "root mean square": nn.RMSNorm(WIDTH),
    "activation": nn.GELU(),
    "dropout in evaluation": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout()).eval(),
    "softmax": nn.Softmax(-1),
    "several": nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(inplace=True), nn.Linear(64, WIDTH)),
    "gated": Applied(lambda m, x: x[..., :16] * torch.sigmoid(x[..., 16:])),
    "chunks": Applied(lambda m, x: torch.cat(list(reversed(x.chunk(2, -1))), -1)),
    "a vector for all": Applied(lambda m, x: x * m.vector + 1),
    "positions in one dimension": Applied(lambda m, x: (x.reshape(-1, WIDTH) @ m.table.T).view(*x.shape[:-1], 5)),
}
TOGETHER = {
    "identity": (nn.Identity(), "gives back"),
    "a view": (Applied(lambda m, x: x[..., :16]), "gives back"),
    "dropout in training": (nn.Dropout(), "positions"),
    "softmax over positions": (nn.Softmax(1), "`_softmax`"),
    "convolution": (nn.Conv1d(WIDTH, WIDTH, 1), "cannot be followed"),
    "batch norm": (nn.BatchNorm1d(WIDTH), ""),
    "norm of several positions": (nn.LayerNorm((5, WIDTH)), "`native_layer_norm`"),
    "attention": (nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True).eval(), ""),
    "recurrence": (nn.LSTM(WIDTH, WIDTH), ""),
    "a mean over positions": (Applied(lambda m, x: x - x.mean(1, keepdim=True)), "`mean`"),
    "a mean of everything": (Applied(lambda m, x: x - x.mean()), "`mean`"),
    "another order": (Applied(lambda m, x: x.flip(1)), "`flip`"),
    "the position before": (Applied(lambda m, x: x.roll(1, 1)), "`roll`"),
    "sums": (Applied(lambda m, x: x.cumsum(-2)), "`cumsum`"),
    "a vector for each position": (Applied(lambda m, x: x + m.table), "`add`"),
    "rows and tokens exchanged": (Applied(lambda m, x: x.transpose(0, 1).transpose(0, 1) * 1), "`transpose`"),
    "positions of features": (Applied(lambda m, x: x.reshape(-1)[: x.numel()].view(x.shape) * 1), "positions"),
    "the dimensions decide": (Applied(lambda m, x: x * 2 if x.dim() == 3 else x * 2 + 1), "how many dimensions"),
    "in place": (Applied(lambda m, x: x.mul_(2)), "in place"),
    "in place of a view": (Applied(lambda m, x: x.view(x.shape).mul_(2)), "in place"),
    "a buffer that is written": (Applied(lambda m, x: x + m.seen.add_(1)), "in place"),
    "a count": (Applied(count), "changes what it holds"),
    "random": (Applied(lambda m, x: x + torch.randn(WIDTH)), "at random"),
    "numbers": (Applied(lambda m, x: x if float(x.sum()) > 0 else -x), "`sum`"),
    "two results": (Applied(lambda m, x: (x, x)), "does not return a tensor"),
    "one result for all": (Applied(lambda m, x: m.vector * 2), "one vector for each position"),
}


@pytest.mark.parametrize("name", APART)
def test_modules_that_treat_positions_apart(name: str) -> None:
    module = APART[name]
    assert why_not_positionwise(module, WIDTH, torch.float32) is None
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        whole = module(x.clone())
        for part in ((slice(None), -1), (0, 2), (1, slice(2, None)), (2,)):
            torch.testing.assert_close(module(x[part].clone()), whole[part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TOGETHER)
def test_modules_that_do_not(name: str) -> None:
    module, why = TOGETHER[name]
    reason = why_not_positionwise(module, WIDTH, torch.float32)
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize("kind", some(FAMILIES, "gpt2", "llama", "gemma2", "opt", "phi"))
def test_norms_and_heads_of_all_architectures(kind: str) -> None:
    model = random_model(kind)
    found = 0
    for path, module in model.named_modules():
        leaf = next(module.children(), None) is None
        named = "norm" in type(module).__name__.lower() or path == "lm_head"
        if leaf and named and module.weight.shape[-1] == WIDTH:  # not a norm of the parts of attention
            found += 1
            assert why_not_positionwise(module, WIDTH, torch.float32) is None, path
        if not leaf and path.endswith(("attn", "attention")):
            assert why_not_positionwise(module, WIDTH, torch.float32) is not None
    assert found > 3


def test_hooks_and_modes_count() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout()).eval()
    assert why_not_positionwise(module, WIDTH, torch.float32) is None
    module[1].train()
    assert why_not_positionwise(module, WIDTH, torch.float32) is not None
    module[1].eval()
    assert why_not_positionwise(module, WIDTH, torch.float32) is None
    handle = module[0].register_forward_hook(lambda *_: None)
    assert why_not_positionwise(module, WIDTH, torch.float32) == "it has hooks, or a forward of its own"
    handle.remove()
    module[0].forward = lambda x: x.flip(0)
    assert why_not_positionwise(module, WIDTH, torch.float32) == "it has hooks, or a forward of its own"


def test_nothing_is_left_on_the_module() -> None:
    module = Applied(count)
    state = torch.random.get_rng_state()
    why_not_positionwise(module, WIDTH, torch.float32)
    assert module.calls == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_that_are_not_loaded() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))
    assert why_not_positionwise(module, WIDTH, torch.float32) is None
