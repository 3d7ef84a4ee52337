"""Names of the user's for modules: where they stand, what they mean, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from nnsight_compiler import LanguageModel, NNsight, intervene
from nnsight_compiler.models.aliases import RenameError

RENAME = {"transformer.h": "layers", "mlp": "ff", "transformer.h.*.attn": "a", "*.c_fc": "up"}
PROMPT = torch.tensor([[5, 17, 42, 3]])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tiny", rename=RENAME)


def test_aliases_own_names_and_standard_names_mean_one_module(model: LanguageModel):
    block = model.transformer.h[1]
    assert model.layers[1].ff is not block.mlp
    assert model.layers[1].ff == block.mlp == model.layers[1].mlp == model["layers.1.ff"]
    assert model.layers[1].a == block.attn
    assert block.ff.up == block.up == block.mlp.c_fc
    assert block.ff._module is block._module.mlp


def test_aliases_are_shown_and_listed(model: LanguageModel):
    text = str(model)
    for label in ("(h | layers): ", "(mlp | ff): ", "(attn | a): ", "(c_fc | up): "):
        assert label in text
        assert label.strip(": ") in model._repr_html_()
    assert {"ff", "a", "up", "ln1"} <= set(dir(model.layers[0]))
    assert "ff" in str(model.layers[0])


def test_a_module_of_a_list_with_a_name_of_its_own_is_shown_apart():
    text = str(LanguageModel("tiny", rename={"transformer.h.1.mlp": "middle"}))
    assert text.count("(mlp | middle): ") == 1
    assert "(1): GPT2Block" in text


def test_experiments_and_blocks_use_them_and_name_the_module_itself(model: LanguageModel):
    @intervene
    def ablate(model, prompt, layer):
        with model.trace(prompt):
            model.layers[layer].ff.output = 0
            hidden = model.layers[layer].a.input
            logits = model.lm_head.output
        return hidden, logits

    hidden, logits = ablate(model, PROMPT, layer=1)
    assert "transformer.h.1.mlp" in str(ablate.lower(model, PROMPT, layer=1))
    plain = LanguageModel("tiny", dispatch=True)._wrapped
    kept: list[torch.Tensor] = []
    handles = [
        plain.transformer.h[1].mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)),
        plain.transformer.h[1].attn.register_forward_pre_hook(
            lambda _m, args, kwargs: kept.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        expected = plain(PROMPT).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(logits, expected)
    assert torch.equal(hidden, kept[0])
    with model.trace(PROMPT):
        model.layers[1].ff.output = 0
        again = model.output.logits.save()
    assert torch.equal(again, expected)


def test_two_models_with_other_names_share_an_experiment(model: LanguageModel):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=50,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    llama = LanguageModel(plain, rename={"mlp": "ff", "self_attn": "a"})

    @intervene
    def read(model, prompt):
        with model.trace(prompt):
            found = model.layers[0].ff.output
        return found

    assert read(model, PROMPT).shape[-1] == 128
    kept: list[torch.Tensor] = []
    plain.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        plain(PROMPT)
    assert torch.equal(read(llama, PROMPT), kept[0])


def test_a_class_names_the_only_child_of_it():
    model = LanguageModel("tiny", rename={GPT2MLP: "ff"})
    assert model.layers[2].ff == model.transformer.h[2].mlp
    with pytest.raises(RenameError, match=r"`b` on transformer.h would mean each of 3 GPT2Block: 0, 1, 2"):
        LanguageModel("tiny", rename={GPT2Block: "b"})


def test_a_star_stands_for_one_name():
    model = LanguageModel("tiny", rename={"*.h": "blocks"})
    assert model.blocks[0] == model.transformer.blocks[0] == model.transformer.h[0]


def test_an_alias_with_dots_stands_deeper():
    model = LanguageModel("tiny", rename={"attn.c_proj": "attn.out", "mlp.c_proj": "mlp.out"})
    assert model.layers[0].attn.out == model.transformer.h[0].attn.c_proj
    assert model.layers[0].mlp.out == model.transformer.h[0].mlp.c_proj


def test_several_aliases_of_one_module():
    model = LanguageModel("tiny", rename={"mlp": ["ff", "feed"]})
    assert model.layers[0].ff == model.layers[0].feed


def test_an_alias_may_become_a_standard_name_that_is_missing():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for each in self.stack:
                x = each(x)
            return x

    model = NNsight(Model(), rename={"stack": "layers"})
    assert len(model.layers) == 2


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"transformer.hh": "x"}, "rename: 'transformer.hh' means no module of this model; did you mean transformer.h"),
        ({"mpl": "x"}, "rename: 'mpl' means no module of this model; did you mean mlp?"),
        ({"zzzz": "x"}, "rename: 'zzzz' means no module of this model; `print(model)` shows the tree of its modules"),
        ({"transformer.h.7.mlp": "x"}, "rename: 'transformer.h.7.mlp' means no module of this model; did you mean"),
        ({nn.Conv2d: "x"}, "rename: Conv2d means no module of this model; did you mean Conv1D?"),
        ({"mlp": "attn"}, "rename: transformer.h.0 has a `attn` of its own, which the alias of 'mlp' would hide"),
        ({"ln_1": "ln2"}, "rename: `ln2` is the standard name of `ln_2` on transformer.h.0, which the alias of 'ln_1'"),
        ({"mlp": "output"}, "rename: `output` has a meaning of its own on every module; choose another name"),
        ({"mlp": "resid_mid"}, "rename: `resid_mid` has a meaning of its own on every module; choose another name"),
        ({"mlp": "trace"}, "rename: `trace` has a meaning of its own on every module; choose another name"),
        (
            {"mlp": "a b"},
            "rename: the alias 'a b' of 'mlp' is neither a name nor a name below the beginning of its key",
        ),
        ({"mlp": "x.ff"}, "rename: the alias 'x.ff' of 'mlp' is neither a name nor a name below the beginning"),
        (
            {"transformer.h.*": "x"},
            "rename: in 'transformer.h.*' a `*` stands for one whole name, and not for the last",
        ),
        ({"ln_*": "x"}, "rename: in 'ln_*' a `*` stands for one whole name, and not for the last: end in a name"),
        (
            {"attn": "x", "mlp": "x"},
            "rename: `x` on transformer.h.0 would mean both `attn` and `mlp`; give each a name",
        ),
    ],
)
def test_refused(rename, message: str):
    with pytest.raises(RenameError) as caught:
        LanguageModel("tiny", rename=rename)
    assert str(caught.value).startswith(message)


def test_an_unknown_name_is_told_the_aliases(model: LanguageModel):
    with pytest.raises(AttributeError, match=r"did you mean .*ff"):
        model.layers[0].fff  # noqa: B018
