"""Attention by name in experiments: read and written, against an eager copy of the model and sums in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5ForConditionalGeneration,
)

from nnsight_compiler import LanguageModel, NNsight, intervene
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.models.view import OutsideTraceError, UnknownModuleError

IDS = torch.tensor([[5, 17, 42, 3, 8, 9], [7, 7, 12, 30, 2, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def gpt2(implementation: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation=implementation).eval()


def llama(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.fixture(scope="module")
def plain() -> GPT2LMHeadModel:
    return gpt2("sdpa")


@pytest.fixture(scope="module")
def model(plain: GPT2LMHeadModel) -> LanguageModel:
    return LanguageModel(plain)


@pytest.fixture(scope="module")
def eager() -> GPT2LMHeadModel:
    return gpt2("eager")


def test_the_pattern_is_causal_though_the_kernel_is_given_no_mask(model, eager, plain):
    given: list[Any] = []
    handle = plain.transformer.h[1].attn.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    with model.trace(IDS):
        pattern = model.layers[1].attn.pattern.save()
        logits = model.lm_head.output.save()
    handle.remove()
    assert given == [None]
    with torch.no_grad():
        wanted = eager(IDS, output_attentions=True)
    assert torch.allclose(pattern, wanted.attentions[1], atol=1e-6)
    assert pattern.triu(1).abs().max() == 0
    assert torch.allclose(logits, wanted.logits, atol=1e-5)
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("make", "implementation", "by"), [(gpt2, "eager", "z"), (llama, "sdpa", "pattern")])
def test_a_head_is_ablated_by_its_pattern_as_by_its_values(make, implementation, by):
    """Zeros in a head's pattern are zeros in its part of what the output projection gets."""

    @intervene
    def by_pattern(model, ids, mask, layer, head):
        with model.trace(ids, attention_mask=mask):
            model.layers[layer].attn.pattern[:, head] = 0
            logits = model.lm_head.output
        return logits

    @intervene
    def by_z(model, ids, mask, layer, head):
        with model.trace(ids, attention_mask=mask):
            z = model.layers[layer].attn.z
            model.layers[layer].attn.z = z * (torch.arange(4) != head)[None, None, :, None]
            logits = model.lm_head.output
        return logits

    net = make(implementation)
    model = LanguageModel(net)
    path = "transformer.h.1.attn.c_proj" if make is gpt2 else "model.layers.1.self_attn.o_proj"

    def without_head(_, args):
        (value,) = args
        value = value.clone()
        value[..., 2 * 8 : 3 * 8] = 0
        return (value,)

    handle = net.get_submodule(path).register_forward_pre_hook(without_head)
    with torch.no_grad():
        wanted = net(IDS, attention_mask=MASK).logits
    handle.remove()
    real = MASK.bool()[..., None]
    found = (by_z if by == "z" else by_pattern)(model, IDS, MASK, layer=1, head=2)
    assert ((found - wanted) * real).abs().max() < 1e-5
    with torch.no_grad():
        assert ((wanted - net(IDS, attention_mask=MASK).logits) * real).abs().max() > 1e-2


def test_an_edge_is_knocked_out(model, plain):
    """One query that cannot see one key, as by hand: the module's own sums with that entry of the mask."""
    with model.trace(IDS):
        model.layers[2].attn.scores[:, :, 5, 3] = -torch.inf
        logits = model.lm_head.output.save()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[5, 3] = False

    def masked(_, args, kwargs):
        return args, {**kwargs, "attention_mask": mask[None, None]}

    handle = plain.transformer.h[2].attn.register_forward_pre_hook(masked, with_kwargs=True)
    with torch.no_grad():
        wanted = plain(IDS).logits
    handle.remove()
    assert torch.allclose(logits, wanted, atol=1e-5)


def test_queries_keys_and_values_are_those_that_the_kernel_gets(model, plain, monkeypatch):
    kernel = torch.nn.functional.scaled_dot_product_attention
    got: list[Any] = []

    def spy(query, key, value, **kwargs):
        got.append((query, key, value))
        return kernel(query, key, value, **kwargs)

    with model.trace(IDS):
        q = model.layers[1].attn.q.save()
        k = model.layers[1].attn.k.save()
        v = model.layers[1].attn.v.save()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        plain(IDS)
    for mine, theirs in zip((q, k, v), got[1], strict=True):
        assert torch.equal(mine, theirs.transpose(1, 2))


def test_written_values_are_what_attention_uses(model, plain):
    with model.trace(IDS):
        model.layers[1].attn.q = 0
        v = model.layers[1].attn.v.save()
        z = model.layers[1].attn.z.save()
    means = torch.stack([v[:, : n + 1].mean(1) for n in range(6)], 1)
    assert torch.allclose(z, means, atol=1e-5)
    with model.trace(IDS):
        model.layers[1].attn.k[:] = 0
        model.layers[1].attn.v[:, :, 0] = 1
        z = model.layers[1].attn.z.save()
        c_attn = model.layers[1].attn.c_attn.output.save()
    assert torch.allclose(z[:, :, 0], torch.ones(2, 6, 8), atol=1e-5)
    assert torch.allclose(z[:, :, 1:], means[:, :, 1:], atol=1e-5)
    assert c_attn[..., 32:64].abs().min() > 0, "keys that are written are attention's alone"


def test_patching_a_pattern_from_another_prompt(model, eager):
    @intervene
    def patched(model, clean, corrupt):
        with model.trace(clean):
            source = model.layers[0].attn.pattern
        with model.trace(corrupt):
            model.layers[0].attn.pattern = source
            z = model.layers[0].attn.z
            v = model.layers[0].attn.v
        return source, z, v

    source, z, v = patched(model, IDS[:1], IDS[1:])
    assert torch.allclose(z, torch.einsum("rhqk,rkhd->rqhd", source, v), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(source, eager(IDS[:1], output_attentions=True).attentions[0], atol=1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(model, eager, mode):
    with mode(), model.trace(IDS):
        model.layers[1].attn.pattern[:, 0] *= 1
        pattern = model.layers[1].attn.pattern.save()
        model.lm_head.output.save()
    with torch.no_grad():
        assert torch.allclose(pattern, eager(IDS, output_attentions=True).attentions[1], atol=1e-6)


def test_gradients_reach_through_a_pattern(model):
    scale = torch.ones(4, requires_grad=True)

    @intervene
    def scaled(model, ids, scale):
        with model.trace(ids):
            model.layers[1].attn.pattern *= scale[:, None, None]
            logits = model.lm_head.output
        return logits

    scaled(model, IDS, scale).sum().backward()
    assert (scale.grad.abs() > 0).all()


# --- any module ---


class Nano(nn.Module):
    """Attention that calls torch's kernel itself, as in many small models."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def test_a_module_of_ones_own():
    torch.manual_seed(0)
    net = Nano()
    model, x = NNsight(net), torch.randn(2, 5, 8)
    with model.trace(x):
        pattern = model.pattern.save()
        z = model.z.save()
        out = model.output.save()
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    assert torch.allclose(pattern, scores.softmax(-1), atol=1e-6)
    assert torch.allclose(z, (scores.softmax(-1) @ v).transpose(1, 2), atol=1e-6)
    assert torch.allclose(out, net(x), atol=1e-6)


# --- names and mistakes ---


def mistake(run) -> str:
    with pytest.raises(CompileError) as caught:
        run()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span.file == __file__
    return f"{diagnostic.reason} / {diagnostic.way_out}"


def test_outside_of_a_trace(model):
    for name in ("pattern", "scores", "q", "k", "v", "z"):
        with pytest.raises(OutsideTraceError, match=rf"`\.{name}` of transformer\.h\.0\.attn .* inside `with model"):
            getattr(model.layers[0].attn, name)
    with pytest.raises(UnknownModuleError, match=r"mlp \(GPT2MLP\) has no `pattern`: `GPT2MLP` is no attention module"):
        model.layers[0].mlp.pattern  # noqa: B018


def test_on_what_is_no_attention_module(model):
    def run():
        with model.trace(IDS):
            model.layers[0].pattern.save()

    assert mistake(run) == (
        "transformer.h.0 (GPT2Block) has no `pattern`: `GPT2Block` is no attention module; `pattern` is a value of"
        " `attn` / `print(model)` shows the tree of its modules"
    )


def test_a_model_that_is_not_served_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = NNsight(MPNetModel(MPNetConfig(**sizes, vocab_size=50)).eval())

    def run():
        with model.trace(IDS):
            model.encoder.layer[0].attention.pattern.save()

    told = mistake(run)
    assert "how `MPNetAttention` computes attention is not known here: `print(….source)` shows the operations" in told


def test_a_module_that_runs_for_several_layers_has_calls():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AlbertConfig(**sizes, vocab_size=50, embedding_size=16)
    net = AlbertModel._from_config(config, attn_implementation="sdpa").eval()
    eager = AlbertModel._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(net.state_dict())
    model = NNsight(net)
    attention = model.encoder.albert_layer_groups[0].albert_layers[0].attention

    def run():
        with model.trace(IDS):
            attention.pattern.save()

    assert mistake(run).endswith("say which call is meant: `.calls[0].pattern` to `.calls[1].pattern`")
    with model.trace(IDS):
        second = attention.calls[1].pattern.save()
    with torch.no_grad():
        assert torch.allclose(second, eager(IDS, output_attentions=True).attentions[1], atol=1e-6)


def test_names_of_the_model_come_first():
    """T5 has modules `q`, `k` and `v`: these are what the names mean there."""
    torch.manual_seed(0)
    config = T5Config(
        num_layers=1, num_heads=4, d_model=16, d_kv=4, d_ff=24, vocab_size=50, decoder_start_token_id=0,
    )  # fmt: skip
    net = T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    eager = T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(net.state_dict())
    model = NNsight(net)
    attention = model.encoder.block[0].layer[0].SelfAttention
    with model.trace(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :3]):
        q = attention.q.output.save()
        pattern = attention.pattern.save()
        model.output.save()
    with torch.no_grad():
        wanted = eager(IDS, MASK, decoder_input_ids=IDS[:, :3], output_attentions=True).encoder_attentions[0]
    assert q.shape == (2, 6, 16)
    assert ((pattern - wanted) * MASK[:, None, :, None]).abs().max() < 1e-6


def test_explain_says_what_is_computed_anew(model, eager):
    @intervene
    def read(model, ids):
        with model.trace(ids):
            pattern = model.layers[1].attn.pattern
        return pattern

    lines = str(read.explain(model, IDS)).splitlines()
    (line,) = (each for each in lines if "attention of transformer.h.1.attn" in each)
    assert line.endswith("computed from q, k and the mask, in this run: torch's kernel gives no pattern")
    assert "computed from q" not in str(read.explain(LanguageModel(eager), IDS))


def test_an_invoke_has_its_own_attention_without_its_padding(model, plain):
    long, short = IDS[:1], IDS[1:, :4]

    def ablate(tokens):
        with model.trace(tokens):
            model.layers[1].attn.pattern[:, 1, -1, 0] = 0
            z = model.layers[1].attn.z.save()
            logits = model.lm_head.output.save()
        return z, logits

    with model.trace() as tracer:
        with tracer.invoke(long):
            untouched = model.lm_head.output.save()
        with tracer.invoke(short):
            model.layers[1].attn.pattern[:, 1, -1, 0] = 0
            pattern = model.layers[1].attn.pattern.save()
            z = model.layers[1].attn.z.save()
            logits = model.lm_head.output.save()
    assert pattern.shape == (1, 4, 4, 4)
    assert torch.allclose(untouched, plain(long).logits, atol=1e-5)
    for ours, alone in zip((z, logits), ablate(short), strict=True):
        assert torch.allclose(ours, alone, atol=1e-5)
    with model.trace(short):
        v = model.layers[1].attn.v.save()
    assert torch.allclose(torch.einsum("rhqk,rkhd->rqhd", pattern, v), z, atol=1e-5)
