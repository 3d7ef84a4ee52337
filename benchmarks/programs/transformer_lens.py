"""The workloads in TransformerLens 3.9: with its own functions where it has one, and as one who knows it well does.

3.9 is the last version with `HookedTransformer`, whose `start_at_layer` starts a forward in the middle.
"""

from __future__ import annotations

import warnings

import torch
from gpt2 import make_tokenizer
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.patching import (
    generic_activation_patch,
    get_act_patch_attn_head_out_all_pos,
    layer_pos_patch_setter,
)
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel
from workloads.workload import Program

ENDS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")


def is_post(name):
    return name.endswith("hook_resid_post")


def post(layer):
    return f"blocks.{layer}.hook_resid_post"


def difference(model, stream, io, s):
    """The difference of two logits at the last position, of the residual stream after the last block."""
    return model.ln_final(stream[:, -1:])[:, 0] @ (model.W_U[:, io] - model.W_U[:, s])


def sweep_positions(model, clean, corrupt, io, s):
    _, cache = model.run_with_cache(clean)

    def metric(logits):
        return logits[0, -1, io] - logits[0, -1, s]

    return generic_activation_patch(
        model, corrupt, cache, metric, layer_pos_patch_setter, "resid_post", ("layer", "pos")
    )


def sweep_positions_resumed(model, clean, corrupt, io, s):
    end = model.cfg.n_layers
    _, cache = model.run_with_cache(torch.cat([clean, corrupt]), names_filter=is_post, stop_at_layer=end)
    effects = []
    for layer in range(end):
        of_clean, of_corrupt = cache[post(layer)]
        rows = of_corrupt.repeat(clean.shape[1], 1, 1)
        rows.diagonal(dim1=0, dim2=1)[:] = of_clean.T
        if layer + 1 < end:
            rows = model(rows, start_at_layer=layer + 1, stop_at_layer=end)
        effects.append(difference(model, rows, io, s))
    return torch.stack(effects)


def sweep_heads(model, clean, corrupt, io, s):
    _, cache = model.run_with_cache(clean)
    return get_act_patch_attn_head_out_all_pos(
        model, corrupt, cache, lambda logits: logits[0, -1, io] - logits[0, -1, s]
    )


def sweep_heads_resumed(model, clean, corrupt, io, s):
    end, heads = model.cfg.n_layers, model.cfg.n_heads
    _, cache = model.run_with_cache(
        torch.cat([clean, corrupt]),
        names_filter=lambda name: name.endswith(("hook_z", "hook_resid_pre")),
        stop_at_layer=end,
    )
    effects = []
    for layer in range(end):
        z = cache[f"blocks.{layer}.attn.hook_z"][0]

        def patch(value, hook, z=z):
            value.diagonal(dim1=0, dim2=2)[:] = z.permute(0, 2, 1)
            return value

        rows = cache[f"blocks.{layer}.hook_resid_pre"][1:].repeat(heads, 1, 1)
        stream = model.run_with_hooks(
            rows, start_at_layer=layer, stop_at_layer=end, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)]
        )
        effects.append(difference(model, stream, io, s))
    return torch.stack(effects)


def logit_lens(model, prompt):
    _, cache = model.run_with_cache(prompt)
    streams = [cache["resid_post", layer] for layer in range(model.cfg.n_layers)]
    return torch.stack([model.unembed(model.ln_final(stream))[0, -1] for stream in streams])


def logit_lens_stopped(model, prompt):
    end = model.cfg.n_layers
    _, cache = model.run_with_cache(prompt, names_filter=is_post, stop_at_layer=end)
    last = torch.stack([cache[post(layer)][0, -1:] for layer in range(end)])
    return model.unembed(model.ln_final(last))[:, 0]


def save_everything(model, texts):
    _, cache = model.run_with_cache(texts, names_filter=lambda name: name.endswith(ENDS))
    return [cache[f"blocks.{layer}.{end}"] for layer in range(model.cfg.n_layers) for end in ENDS]


def save_everything_stopped(model, texts):
    layers = model.cfg.n_layers
    _, cache = model.run_with_cache(texts, names_filter=lambda name: name.endswith(ENDS), stop_at_layer=layers)
    return [cache[f"blocks.{layer}.{end}"] for layer in range(layers) for end in ENDS]


def harvest(model, batches, layer):
    kept = []
    for batch in batches:
        _, cache = model.run_with_cache(batch, names_filter=post(layer))
        kept.append(cache[post(layer)])
    return kept


def harvest_stopped(model, batches, layer):
    return [model(batch, stop_at_layer=layer + 1) for batch in batches]


def with_gradients(model, tokens, metric, stop=None):
    """What every attention, MLP and block gives, and its gradient."""
    values, gradients = {}, {}

    def keep(value, hook):
        values[hook.name] = value.detach()

    def keep_gradient(gradient, hook):
        gradients[hook.name] = gradient

    def chosen(name):
        return name.endswith(ENDS)

    with model.hooks(fwd_hooks=[(chosen, keep)], bwd_hooks=[(chosen, keep_gradient)]):
        metric(model(tokens, stop_at_layer=stop)).backward()
    return values, gradients


def attribute(model, pairs):
    scores = []
    for clean, corrupt, io, s in pairs:
        _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith(ENDS))
        values, gradients = with_gradients(
            model, corrupt, lambda logits, io=io, s=s: logits[0, -1, io] - logits[0, -1, s]
        )
        names = [f"blocks.{layer}.{end}" for layer in range(model.cfg.n_layers) for end in ENDS]
        scores.append(
            torch.stack([((cache[name] - values[name]) * gradients[name]).sum(-1)[0].detach() for name in names])
        )
        model.zero_grad()
    return torch.stack(scores)


def attribute_batched(model, pairs):
    cleans, corrupts, ios, others = zip(*pairs, strict=True)
    end = model.cfg.n_layers
    direction = (model.W_U[:, list(ios)] - model.W_U[:, list(others)]).T.detach()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.embed.W_E.requires_grad_(True)  # without any gradient below them, the hooks are given none
    with torch.no_grad():
        _, cache = model.run_with_cache(
            torch.cat(cleans), names_filter=lambda name: name.endswith(ENDS), stop_at_layer=end
        )
    values, gradients = with_gradients(
        model, torch.cat(corrupts), lambda x: (model.ln_final(x[:, -1:])[:, 0] * direction).sum(), stop=end
    )
    model.embed.W_E.grad = None
    for parameter in trained:
        parameter.requires_grad_(True)
    names = [f"blocks.{layer}.{part}" for layer in range(end) for part in ENDS]
    return torch.stack([((cache[name] - values[name]) * gradients[name]).sum(-1) for name in names], 1)


def patchscope(model, source, target, io, s):
    _, cache = model.run_with_cache(source, names_filter=is_post)
    layers = range(model.cfg.n_layers)
    effects = torch.empty(len(layers), len(layers))
    for i in layers:
        for j in layers:

            def patch(value, hook, i=i):
                value[:, -1] = cache[post(i)][:, -1]
                return value

            logits = model.run_with_hooks(target, fwd_hooks=[(post(j), patch)])
            effects[i, j] = logits[0, -1, io] - logits[0, -1, s]
    return effects


def patchscope_resumed(model, source, target, io, s):
    end = model.cfg.n_layers
    _, cache = model.run_with_cache(torch.cat([source, target]), names_filter=is_post, stop_at_layer=end)
    sources = torch.stack([cache[post(layer)][0, -1] for layer in range(end)])
    effects = []
    for layer in range(end):
        rows = cache[post(layer)][1:].repeat(end, 1, 1)
        rows[:, -1] = sources
        if layer + 1 < end:
            rows = model(rows, start_at_layer=layer + 1, stop_at_layer=end)
        effects.append(difference(model, rows, io, s))
    return torch.stack(effects, 1)


def steer(model, prompt, vector, strengths, layer, count):
    texts = []
    for strength in strengths:

        def add(value, hook, strength=strength):
            return value + strength * vector

        with model.hooks(fwd_hooks=[(post(layer), add)]):
            ids = model.generate(prompt, max_new_tokens=count, do_sample=False, stop_at_eos=False, verbose=False)
        texts.append(ids[0])
    return torch.stack(texts)


def steer_batched(model, prompt, vector, strengths, layer, count):
    shift = torch.tensor(strengths)[:, None, None] * vector
    with model.hooks(fwd_hooks=[(post(layer), lambda value, hook: value + shift)]):
        return model.generate(
            prompt.expand(len(strengths), -1), max_new_tokens=count, do_sample=False, stop_at_eos=False, verbose=False
        )


def wrap(model: GPT2LMHeadModel) -> HookedTransformer:
    """The model that the programs are given: its own implementation of GPT-2, with the same weights."""
    config = HookedTransformerConfig(
        n_layers=model.config.n_layer,
        d_model=model.config.n_embd,
        n_heads=model.config.n_head,
        d_head=model.config.n_embd // model.config.n_head,
        d_mlp=4 * model.config.n_embd,
        d_vocab=model.config.vocab_size,
        n_ctx=model.config.n_positions,
        act_fn="gelu_new",
        eps=model.config.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the class itself, which 4 no longer has
        hooked = HookedTransformer(config)
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    hooked.tokenizer = make_tokenizer(model)  # without one, `generate` with a cache counts positions wrongly
    return hooked.eval()


PROGRAMS: dict[str, dict[str, Program]] = {
    "S1": {"TransformerLens": sweep_positions, "TransformerLens, expert": sweep_positions_resumed},
    "S2": {"TransformerLens": sweep_heads, "TransformerLens, expert": sweep_heads_resumed},
    "S3": {"TransformerLens": logit_lens, "TransformerLens, expert": logit_lens_stopped},
    "S4": {"TransformerLens": save_everything, "TransformerLens, expert": save_everything_stopped},
    "S5": {"TransformerLens": harvest, "TransformerLens, expert": harvest_stopped},
    "S6": {"TransformerLens": attribute, "TransformerLens, expert": attribute_batched},
    "S7": {"TransformerLens": patchscope, "TransformerLens, expert": patchscope_resumed},
    "S8": {"TransformerLens": steer, "TransformerLens, expert": steer_batched},
}
