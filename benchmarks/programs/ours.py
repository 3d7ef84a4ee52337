"""The eight workloads as a researcher writes them first: loops around traces, nothing batched, stopped or sliced."""

from __future__ import annotations

import torch
from transformers import GPT2LMHeadModel
from workloads.workload import Program

from nnsight_compiler import LanguageModel, intervene


@intervene
def sweep_positions(model, clean, corrupt, io, s):
    with model.trace(clean):
        streams = [layer.output for layer in model.layers]
    effects = []
    for layer in range(len(model.layers)):
        for position in range(clean.shape[1]):
            with model.trace(corrupt):
                model.layers[layer].output[:, position] = streams[layer][:, position]
                logits = model.lm_head.output
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(model.layers), -1)


@intervene
def sweep_heads(model, clean, corrupt, io, s):
    with model.trace(clean):
        z = [layer.attn.z for layer in model.layers]
    effects = []
    for layer in range(len(model.layers)):
        for head in range(model.config.n_head):
            with model.trace(corrupt):
                model.layers[layer].attn.z[:, :, head] = z[layer][:, :, head]
                logits = model.lm_head.output
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(model.layers), -1)


@intervene
def logit_lens(model, prompt):
    with model.trace(prompt):
        logits = [model.lm_head(model.ln_final(layer.output))[0, -1] for layer in model.layers]
    return torch.stack(logits)


def everything(model):
    values = []
    for layer in model.layers:
        values.append(layer.attn.output[0])
        values.append(layer.mlp.output)
        values.append(layer.output)
    return values


@intervene
def save_everything(model, texts):
    with model.trace(texts):
        values = everything(model)
    return values


@intervene
def harvest(model, batches, layer):
    kept = []
    for batch in batches:
        with model.trace(batch):
            kept.append(model.layers[layer].output)
    return kept


@intervene
def attribute(model, pairs):
    scores = []
    for clean, corrupt, io, s in pairs:
        with model.trace(clean):
            of_clean = everything(model)
        with model.trace(corrupt):
            values = everything(model)
            logits = model.lm_head.output
            difference = logits[0, -1, io] - logits[0, -1, s]
            with difference.backward():
                score = [((a - b) * b.grad).sum(-1)[0] for a, b in zip(of_clean, values, strict=True)]
        scores.append(torch.stack(score))
    return torch.stack(scores)


@intervene
def patchscope(model, source, target, io, s):
    with model.trace(source):
        sources = [layer.output[:, -1] for layer in model.layers]
    effects = []
    for i in range(len(model.layers)):
        for j in range(len(model.layers)):
            with model.trace(target):
                model.layers[j].output[:, -1] = sources[i]
                logits = model.lm_head.output
            effects.append(logits[0, -1, io] - logits[0, -1, s])
    return torch.stack(effects).view(len(model.layers), -1)


@intervene
def steer(model, prompt, vector, strengths, layer, count):
    texts = []
    for strength in strengths:
        with model.generate(prompt, max_new_tokens=count, do_sample=False) as tracer:
            model.layers[layer].output += strength * vector
            texts.append(tracer.result[0])
    return torch.stack(texts)


def wrap(model: GPT2LMHeadModel) -> LanguageModel:
    """The model that the programs are given."""
    return LanguageModel(model)


PROGRAMS: dict[str, dict[str, Program]] = {
    "S1": {"ours": sweep_positions},
    "S2": {"ours": sweep_heads},
    "S3": {"ours": logit_lens},
    "S4": {"ours": save_everything},
    "S5": {"ours": harvest},
    "S6": {"ours": attribute},
    "S7": {"ours": patchscope},
    "S8": {"ours": steer},
}
