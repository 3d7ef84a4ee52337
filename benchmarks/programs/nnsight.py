"""The workloads in nnsight 0.8.1: as its documentation writes them, and as somebody who knows it well does.

Sites are asked for in the order in which the model runs, and gradients in the reverse, as nnsight wants it.
"""

from __future__ import annotations

import torch
from gpt2 import make_tokenizer
from nnsight import TransformersModel, save
from transformers import GPT2LMHeadModel
from workloads.workload import Program


def sweep_positions(model, clean, corrupt, io, s):
    with model.trace(clean):
        streams = save([block.output for block in model.transformer.h])
    effects = []
    for layer, stream in enumerate(streams):
        for position in range(clean.shape[1]):
            with model.trace(corrupt):
                model.transformer.h[layer].output[:, position] = stream[:, position]
                logits = model.lm_head.output.save()
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(streams), -1)


def sweep_positions_invokes(model, clean, corrupt, io, s):
    with model.trace(clean):
        streams = save([block.output for block in model.transformer.h])
    effects = []
    for layer, stream in enumerate(streams):
        with model.trace() as tracer:
            logits = save([])
            for position in range(clean.shape[1]):
                with tracer.invoke(corrupt):
                    model.transformer.h[layer].output[:, position] = stream[:, position]
                    logits.append(model.lm_head.output[0, -1])
        effects += [each[io] - each[s] for each in logits]
    return torch.stack(effects).view(len(streams), -1)


def sweep_positions_batched(model, clean, corrupt, io, s):
    with model.trace(clean):
        streams = save([block.output for block in model.transformer.h])
    rows = corrupt.expand(clean.shape[1], -1)
    effects = []
    for layer, stream in enumerate(streams):
        with model.trace(rows) as tracer:
            model.transformer.h[layer].output.diagonal(dim1=0, dim2=1)[:] = stream[0].T
            last = model.transformer.ln_f.output[:, -1].save()
            tracer.stop()
        effects.append(last @ (model.lm_head.weight[io] - model.lm_head.weight[s]))
    return torch.stack(effects)


def sweep_heads(model, clean, corrupt, io, s):
    heads = model.config.n_head
    with model.trace(clean):
        kept = save([block.attn.c_proj.input for block in model.transformer.h])
    effects = []
    for layer, z in enumerate(kept):
        for head in range(heads):
            with model.trace(corrupt):
                patched = model.transformer.h[layer].attn.c_proj.input.clone()
                patched.unflatten(-1, (heads, -1))[:, :, head] = z.unflatten(-1, (heads, -1))[:, :, head]
                model.transformer.h[layer].attn.c_proj.input = patched
                logits = model.lm_head.output.save()
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(kept), -1)


def sweep_heads_batched(model, clean, corrupt, io, s):
    heads = model.config.n_head
    with model.trace(clean):
        kept = save([block.attn.c_proj.input for block in model.transformer.h])
    rows = corrupt.expand(heads, -1)
    effects = []
    for layer, z in enumerate(kept):
        with model.trace(rows) as tracer:
            patched = model.transformer.h[layer].attn.c_proj.input.clone()
            by_head = z[0].unflatten(-1, (heads, -1)).permute(0, 2, 1)
            patched.unflatten(-1, (heads, -1)).diagonal(dim1=0, dim2=2)[:] = by_head
            model.transformer.h[layer].attn.c_proj.input = patched
            last = model.transformer.ln_f.output[:, -1].save()
            tracer.stop()
        effects.append(last @ (model.lm_head.weight[io] - model.lm_head.weight[s]))
    return torch.stack(effects)


def logit_lens(model, prompt):
    with model.trace(prompt):
        logits = save([model.lm_head(model.transformer.ln_f(block.output))[0, -1] for block in model.transformer.h])
    return torch.stack(logits)


def logit_lens_stopped(model, prompt):
    with model.trace(prompt) as tracer:
        kept = torch.stack([block.output[0, -1] for block in model.transformer.h])
        logits = model.lm_head(model.transformer.ln_f(kept)).save()
        tracer.stop()
    return logits


def save_everything(model, texts):
    with model.trace(texts):
        values = save([])
        for block in model.transformer.h:
            values.append(block.attn.output[0])
            values.append(block.mlp.output)
            values.append(block.output)
    return values


def save_everything_stopped(model, texts):
    with model.trace(texts) as tracer:
        values = save([])
        for block in model.transformer.h:
            values.append(block.attn.output[0])
            values.append(block.mlp.output)
            values.append(block.output)
        tracer.stop()
    return values


def harvest(model, batches, layer):
    kept = []
    for batch in batches:
        with model.trace(batch):
            hidden = model.transformer.h[layer].output.save()
        kept.append(hidden)
    return kept


def harvest_stopped(model, batches, layer):
    kept = []
    for batch in batches:
        with model.trace(batch) as tracer:
            hidden = model.transformer.h[layer].output.save()
            tracer.stop()
        kept.append(hidden)
    return kept


def attribute(model, pairs):
    scores = []
    for clean, corrupt, io, s in pairs:
        with model.trace(clean):
            of_clean = save([])
            for block in model.transformer.h:
                of_clean.append(block.attn.output[0].detach())
                of_clean.append(block.mlp.output.detach())
                of_clean.append(block.output.detach())
        with model.trace(corrupt):
            values = []
            for block in model.transformer.h:
                values.append(block.attn.output[0])
                values.append(block.mlp.output)
                values.append(block.output)
            logits = model.lm_head.output
            score = save([])
            with (logits[0, -1, io] - logits[0, -1, s]).backward():
                for a, b in zip(reversed(of_clean), reversed(values), strict=True):
                    score.append(((a - b) * b.grad).sum(-1)[0].detach())
        scores.append(torch.stack(score[::-1]))
        model.zero_grad()
    return torch.stack(scores)


def attribute_batched(model, pairs):
    cleans, corrupts, ios, others = zip(*pairs, strict=True)
    cleans, corrupts = torch.cat(cleans), torch.cat(corrupts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    with torch.no_grad(), model.trace(cleans) as tracer:
        of_clean = save([])
        for block in model.transformer.h:
            of_clean.append(block.attn.output[0])
            of_clean.append(block.mlp.output)
            of_clean.append(block.output)
        tracer.stop()
    with model.trace(corrupts) as tracer:
        values = []
        for block in model.transformer.h:
            value = block.attn.output[0]
            values.append(value if values else value.requires_grad_())
            values.append(block.mlp.output)
            values.append(block.output)
        weight = model.lm_head.weight
        direction = weight[list(ios)] - weight[list(others)]
        score = save([])
        with (model.transformer.ln_f.output[:, -1] * direction).sum().backward():
            for a, b in zip(reversed(of_clean), reversed(values), strict=True):
                score.append(((a - b) * b.grad).sum(-1).detach())
        tracer.stop()
    for parameter in trained:
        parameter.requires_grad_(True)
    return torch.stack(score[::-1], 1)


def patchscope(model, source, target, io, s):
    with model.trace(source):
        sources = save([block.output[:, -1] for block in model.transformer.h])
    effects = []
    for value in sources:
        for block in model.transformer.h:
            with model.trace(target):
                block.output[:, -1] = value
                logits = model.lm_head.output.save()
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(sources), -1)


def patchscope_batched(model, source, target, io, s):
    with model.trace(source):
        sources = save([block.output[0, -1] for block in model.transformer.h])
    sources = torch.stack(sources)
    rows = target.expand(len(sources), -1)
    effects = []
    for block in model.transformer.h:
        with model.trace(rows) as tracer:
            block.output[:, -1] = sources
            last = model.transformer.ln_f.output[:, -1].save()
            tracer.stop()
        effects.append(last @ (model.lm_head.weight[io] - model.lm_head.weight[s]))
    return torch.stack(effects, 1)


def steer(model, prompt, vector, strengths, layer, count):
    texts = []
    for strength in strengths:
        with model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
        ) as tracer:
            for _ in tracer.iter[:count]:
                model.transformer.h[layer].output += strength * vector
            ids = tracer.result.save()
        texts.append(ids[0])
    return torch.stack(texts)


def steer_batched(model, prompt, vector, strengths, layer, count):
    rows = prompt.expand(len(strengths), -1)
    shift = torch.tensor(strengths)[:, None, None] * vector
    with model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False) as tracer:
        for _ in tracer.iter[:count]:
            model.transformer.h[layer].output += shift
        ids = tracer.result.save()
    return ids


def wrap(model: GPT2LMHeadModel) -> TransformersModel:
    """The model that the programs are given."""
    return TransformersModel(model, tokenizer=make_tokenizer(model), task="text-generation")


PROGRAMS: dict[str, dict[str, Program]] = {
    "S1": {
        "nnsight": sweep_positions,
        "nnsight, invokes": sweep_positions_invokes,
        "nnsight, expert": sweep_positions_batched,
    },
    "S2": {"nnsight": sweep_heads, "nnsight, expert": sweep_heads_batched},
    "S3": {"nnsight": logit_lens, "nnsight, expert": logit_lens_stopped},
    "S4": {"nnsight": save_everything, "nnsight, expert": save_everything_stopped},
    "S5": {"nnsight": harvest, "nnsight, expert": harvest_stopped},
    "S6": {"nnsight": attribute, "nnsight, expert": attribute_batched},
    "S7": {"nnsight": patchscope, "nnsight, expert": patchscope_batched},
    "S8": {"nnsight": steer, "nnsight, expert": steer_batched},
}
