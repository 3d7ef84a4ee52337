"""Standard names on small models of many architectures: each is checked by what its module does.

The oracle is transformers: its hidden states, its logits, its embedding tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import FAMILIES, IDS, random_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nnsight_compiler.models import NNsight, UnknownModuleError
from nnsight_compiler.models.names import OF_A_LAYER, OF_A_MODEL

torch.set_num_threads(1)

LEARNED_POSITIONS = ("gpt2", "gpt_neo", "opt")
NO_MLP = ("opt",)
PARALLEL_BLOCKS = ("phi", "gptj", "falcon")
POST_NORM_ONLY = ("olmo2",)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, NNsight]:
    return request.param, NNsight(random_model(request.param))


class Watch:
    """Torch's own hooks: what each module was given and what it returned, in one plain forward."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[nn.Module, list[Any]] = {}
        self.outputs: dict[nn.Module, list[Any]] = {}
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._given, with_kwargs=True))
            handles.append(module.register_forward_hook(self._returned))
        with torch.no_grad():
            self.result = model(IDS, output_hidden_states=True)
        for handle in handles:
            handle.remove()

    def _given(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        self.inputs.setdefault(module, []).append(first.clone() if isinstance(first, torch.Tensor) else first)

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        self.outputs.setdefault(module, []).append(first.clone() if isinstance(first, torch.Tensor) else first)

    def given(self, view: Any) -> torch.Tensor:
        [value] = self.inputs[view._module]
        return value

    def returned(self, view: Any) -> torch.Tensor:
        [value] = self.outputs[view._module]
        return value


def head_applied(watch: Watch, model: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model.lm_head._module(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def test_the_head_and_the_final_norm_give_the_logits(family: tuple[str, Any]):
    _, model = family
    watch = Watch(model._module)
    hidden = watch.returned(model.ln_final)
    torch.testing.assert_close(head_applied(watch, model, hidden), watch.result.logits)
    torch.testing.assert_close(hidden, watch.result.hidden_states[-1])
    torch.testing.assert_close(watch.given(model.lm_head), hidden)


def test_layers_carry_the_hidden_states(family: tuple[str, Any]):
    name, model = family
    watch = Watch(model._module)
    assert len(model.layers) == 2
    for i, layer in enumerate(model.layers):
        torch.testing.assert_close(watch.given(layer), watch.result.hidden_states[i], msg=f"{name} layer {i} input")
    torch.testing.assert_close(watch.returned(model.layers[0]), watch.result.hidden_states[1])
    torch.testing.assert_close(watch.returned(model.layers[-1]), watch.given(model.ln_final))


def test_the_embedding_is_the_table_of_tokens(family: tuple[str, Any]):
    _, model = family
    assert model.embed._module is model._module.get_input_embeddings()
    assert torch.equal(Watch(model._module).given(model.embed), IDS)


def test_position_tables_where_positions_are_learned(family: tuple[str, Any]):
    name, model = family
    if name not in LEARNED_POSITIONS:
        with pytest.raises(UnknownModuleError, match="pos_embed"):
            model.pos_embed  # noqa: B018
        return
    watch = Watch(model._module)
    assert isinstance(model.pos_embed._module, nn.Embedding)
    total = watch.outputs[model.embed._module][0] + watch.outputs[model.pos_embed._module][0]
    torch.testing.assert_close(total, watch.result.hidden_states[0])


def test_attention_is_what_mixes_positions(family: tuple[str, Any]):
    """Exactly the attention lets a later position see an earlier token; the feed-forward part does not."""
    name, model = family
    for i, layer in enumerate(model.layers):
        for part, mixes in (("attn", True), ("mlp", False)):
            if part == "mlp" and name in NO_MLP:
                continue
            module = getattr(layer, part)._module
            calls: list[tuple[Any, Any]] = []
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
            )
            with torch.no_grad():
                model._module(IDS, use_cache=False)
                handle.remove()
                args, kwargs = calls[0]
                hidden = args[0] if args else kwargs["hidden_states"]
                outputs = []
                for changed in (hidden, torch.cat([hidden[:, :1] + 1, hidden[:, 1:]], 1)):
                    if args:
                        output = module(changed, *args[1:], **kwargs)
                    else:
                        output = module(**{**kwargs, "hidden_states": changed})
                    outputs.append(output[0] if isinstance(output, tuple) else output)
            later = (outputs[0] - outputs[1]).abs().reshape(*IDS.shape, -1)[:, 1:].max()
            assert (later > 1e-6) == mixes, f"{name} layer {i} {part}"
            assert (outputs[0] - outputs[1]).abs().max() > 1e-6


def test_norms_stand_before_what_they_are_named_for(family: tuple[str, Any]):
    name, model = family
    watch = Watch(model._module)
    for layer in model.layers:
        if name in POST_NORM_ONLY:
            for norm in ("ln1", "ln2"):
                with pytest.raises(UnknownModuleError, match=norm):
                    getattr(layer, norm)
            continue
        torch.testing.assert_close(watch.given(layer.ln1), watch.given(layer))
        torch.testing.assert_close(watch.returned(layer.ln1), watch.given(layer.attn))
        if name in PARALLEL_BLOCKS:
            with pytest.raises(UnknownModuleError, match="ln2"):
                layer.ln2  # noqa: B018
            continue
        after = layer.fc1 if name in NO_MLP else layer.mlp
        torch.testing.assert_close(watch.returned(layer.ln2), watch.given(after))


def test_the_bare_model_has_the_same_names(family: tuple[str, Any]):
    _, model = family
    bare = NNsight(AutoModel.from_config(model.config))
    for name in OF_A_MODEL:
        if name in ("lm_head",):
            with pytest.raises(UnknownModuleError, match="lm_head"):
                bare.lm_head  # noqa: B018
            continue
        try:
            expected = getattr(model, name)._path
        except UnknownModuleError:
            continue
        assert expected.endswith(getattr(bare, name)._path)
    for name in OF_A_LAYER:
        if hasattr(model.layers[0], name):
            assert type(getattr(bare.layers[0], name)._module) is type(getattr(model.layers[0], name)._module)


def test_opt_has_no_mlp_and_says_what_to_use():
    config = AutoConfig.for_model("opt", **FAMILIES["opt"])
    model = NNsight(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnknownModuleError, match=r"`mlp`.*fc1.*fc2"):
        model.layers[0].mlp  # noqa: B018


def test_an_encoder_and_a_decoder_are_not_guessed_between():
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0
    )
    model = NNsight(AutoModel.from_config(config))
    with pytest.raises(UnknownModuleError, match=r"decoder\.block or encoder\.block"):
        model.layers  # noqa: B018
    assert model.decoder.layers._path == "decoder.block"


def test_own_names_win():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList([nn.Linear(2, 2)])
            self.layers = nn.Linear(2, 3)
            self.embed = "mine"

    model = NNsight(Odd())
    assert model.layers._path == "layers"
    assert model.embed == "mine"
