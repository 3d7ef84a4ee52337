"""The residual stream on small models of many architectures.

The oracles are transformers' hidden states and plain hooks: `resid_mid` is `resid_pre` and what attention adds, and a
block whose stream is replaced there goes on from the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import FAMILIES, IDS, random_model
from chosen import some
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene

torch.set_num_threads(1)

PARALLEL = {"phi": {}, "gptj": {}, "falcon": {}, "gpt_neox": {}, "falcon new": {"new_decoder_architecture": True}}
SEQUENTIAL: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in FAMILIES if kind not in PARALLEL},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "falcon sequential": {"parallel_attn": False},
    "opt with norms after": {"do_layer_norm_before": False},
}
ALL = {**PARALLEL, **SEQUENTIAL}


@dataclass
class Model:
    kind: str
    plain: Any
    wrapped: Any


def made(name: str) -> Model:
    plain = random_model(name.partition(" ")[0], **ALL[name])
    return Model(name, plain, NNsight(plain))


@pytest.fixture(
    scope="module", params=some(SEQUENTIAL, "gpt2", "llama", "gemma2", "opt with norms after", "falcon sequential")
)
def sequential(request: pytest.FixtureRequest) -> Model:
    return made(request.param)


@pytest.fixture(scope="module", params=some(PARALLEL, "gptj", "falcon new"))
def parallel(request: pytest.FixtureRequest) -> Model:
    return made(request.param)


@intervene
def read_ends(model, ids, layer):
    with model.trace(ids):
        pre = model.layers[layer].resid_pre
        post = model.layers[layer].resid_post
    return pre, post


@intervene
def read_middle(model, ids, layer):
    with model.trace(ids):
        middle = model.layers[layer].resid_mid
    return middle


@intervene
def write_middle(model, ids, layer, value):
    with model.trace(ids):
        model.layers[layer].resid_mid = value
        logits = model.output.logits
    return logits


@intervene
def write_ends(model, ids, value):
    with model.trace(ids):
        model.layers[0].resid_post = value
        model.layers[1].resid_pre[:, -1] += 1
        logits = model.output.logits
    return logits


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def grabbed(module: nn.Module, plain: nn.Module) -> torch.Tensor:
    """What a module returns in a plain forward."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: kept.append(first(output).clone()))
    with torch.no_grad():
        plain(IDS)
    handle.remove()
    return kept[0]


def check_ends(model: Model) -> None:
    with torch.no_grad():
        hidden = model.plain(IDS, output_hidden_states=True).hidden_states
    pre, post = read_ends(model.wrapped, IDS, layer=0)
    assert torch.equal(pre, hidden[0])
    assert torch.equal(post, hidden[1])
    assert torch.equal(read_ends(model.wrapped, IDS, layer=1)[0], hidden[1])

    value = torch.randn(*IDS.shape, pre.shape[-1], generator=torch.Generator().manual_seed(1))
    changed = value.clone()
    changed[:, -1] += 1
    handle = model.wrapped.layers[0]._module.register_forward_hook(
        lambda _m, _a, output: (changed, *output[1:]) if isinstance(output, tuple) else changed
    )
    with torch.no_grad():
        expected = model.plain(IDS).logits
    handle.remove()
    torch.testing.assert_close(write_ends(model.wrapped, IDS, value), expected)


def test_the_ends_of_a_block_with_parts_in_sequence(sequential: Model):
    check_ends(sequential)


def test_the_ends_of_a_block_with_parts_side_by_side(parallel: Model):
    check_ends(parallel)


def test_between_the_parts_is_what_the_block_was_given_and_what_attention_adds(sequential: Model):
    for layer in (0, 1):
        block = sequential.wrapped.layers[layer]
        pre, _ = read_ends(sequential.wrapped, IDS, layer=layer)
        middle = read_middle(sequential.wrapped, IDS, layer=layer)
        if sequential.kind in ("gemma2", "gemma3_text", "olmo2"):  # a norm follows attention
            expected = pre + grabbed(block._module.post_attention_layernorm, sequential.plain)
        elif sequential.kind == "bloom":  # its attention adds the stream itself
            expected = grabbed(block.attn._module, sequential.plain)
        else:
            expected = pre + grabbed(block.attn._module, sequential.plain)
        assert middle.shape == pre.shape
        torch.testing.assert_close(middle, expected)


def rest(model: Model, block: Any, stream: torch.Tensor) -> torch.Tensor:
    """What a block makes of the stream between its parts, by its modules called one by one."""
    match model.kind:
        case "gemma2" | "gemma3_text":
            return stream + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(stream)))
        case "olmo2":
            return stream + block.post_feedforward_layernorm(block.mlp(stream))
        case "opt":
            return stream + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(stream))))
        case "opt with norms after":
            normed = block.self_attn_layer_norm(stream)
            return block.final_layer_norm(normed + block.fc2(block.activation_fn(block.fc1(normed))))
        case "bloom":
            return block.mlp(block.post_attention_layernorm(stream), stream)
        case "mpt":
            return block.ffn(block.norm_2(stream), stream)
        case "gpt2" | "gpt_neo":
            return stream + block.mlp(block.ln_2(stream))
        case _:
            return stream + first(block.mlp(block.post_attention_layernorm(stream)))


def test_a_stream_replaced_between_the_parts_is_what_the_block_goes_on_with(sequential: Model):
    block = sequential.wrapped.layers[0]._module
    width = read_middle(sequential.wrapped, IDS, layer=0).shape[-1]
    value = torch.randn(*IDS.shape, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        after = rest(sequential, block, value.clone())
    handle = block.register_forward_hook(
        lambda _m, _a, output: (after, *output[1:]) if isinstance(output, tuple) else after
    )
    with torch.no_grad():
        expected = sequential.plain(IDS).logits
    handle.remove()
    torch.testing.assert_close(write_middle(sequential.wrapped, IDS, 0, value), expected)
    with torch.no_grad():
        assert not torch.allclose(expected, sequential.plain(IDS).logits, atol=1e-3)


def test_in_place_writes_reach_it(sequential: Model):
    model = sequential.wrapped
    with model.trace(IDS):
        model.layers[0].resid_mid[:, -1] = 0
        kept = model.layers[0].resid_mid.save()
        post = model.layers[0].resid_post.save()
    assert not kept[:, -1].any()
    with torch.no_grad():
        expected = rest(sequential, model.layers[0]._module, kept.clone())
    torch.testing.assert_close(post, expected)


def test_nothing_lies_between_parts_side_by_side(parallel: Model):
    with pytest.raises(CompileError) as caught:
        read_middle(parallel.wrapped, IDS, layer=0)
    reason = str(caught.value)
    assert "has no `resid_mid`" in reason
    assert "side by side and are given the same stream" in reason
    assert f"{__file__}:{read_middle._function.__code__.co_firstlineno + 3}:" in reason


def test_bloom_with_norms_in_the_stream_has_none():
    model = NNsight(random_model("bloom", apply_residual_connection_post_layernorm=True))
    with pytest.raises(CompileError, match="it adds each part to what its norm returns"):
        read_middle(model, IDS, layer=0)


def test_a_module_that_is_no_block_has_no_stream():
    model = NNsight(random_model("gpt2"))
    with (
        pytest.raises(CompileError, match=r"`\.resid_post` belongs to a block, one of `model\.layers`"),
        model.trace(IDS),
    ):
        found = model.layers[0].mlp.resid_post.save()  # noqa: F841


def test_outside_a_trace_it_is_refused():
    model = NNsight(random_model("gpt2"))
    with pytest.raises(AttributeError, match=r"exists inside `with model\.trace"):
        model.layers[0].resid_mid  # noqa: B018


class Twice(nn.Module):
    """Layers that run twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


def test_of_one_call_of_a_block():
    torch.manual_seed(0)
    plain = Twice()
    model, x = NNsight(plain), torch.ones(1, 4)
    with model.trace(x):
        given = model.layers[1].calls[1].resid_pre.save()
        model.layers[0].calls[1].resid_post = 0
        out = model.output.save()
    with torch.no_grad():
        assert torch.equal(given, torch.zeros(1, 4))
        assert torch.equal(out, plain.layers[1](torch.zeros(1, 4)))
    with pytest.raises(CompileError, match="is called 2 times in one forward"), model.trace(x):
        model.layers[1].resid_pre.save()


def test_a_call_of_a_module_has_ports_only():
    model, x = NNsight(Twice()), torch.ones(1, 4)
    with pytest.raises(CompileError, match=r"a call of a module has no `\.weight`"), model.trace(x):
        model.layers[1].calls[0].weight.save()
