"""The workloads in pyvene 0.1.8: as its tutorials write them, and with locations batched.

It has no words for gradients (S6), and in a generation intervenes on the prompt alone (S8).
"""

from __future__ import annotations

import pyvene
import torch
from transformers import GPT2LMHeadModel
from workloads.workload import Program


def intervening(model, layer, component, intervention=pyvene.VanillaIntervention, **options):
    """A model with one intervention, as the tutorials make one for each."""
    config = pyvene.IntervenableConfig(
        {"layer": layer, "component": component, **options}, intervention_types=intervention
    )
    return pyvene.IntervenableModel(config, model)


def sweep_positions(model, clean, corrupt, io, s):
    effects = []
    for layer in range(model.config.n_layer):
        for position in range(clean.shape[1]):
            intervenable = intervening(model, layer, "block_output")
            _, patched = intervenable(
                {"input_ids": corrupt}, [{"input_ids": clean}], unit_locations={"sources->base": position}
            )
            effects.append(patched.logits[0, -1, io] - patched.logits[0, -1, s])
    return torch.stack(effects).view(model.config.n_layer, -1)


def sweep_positions_batched(model, clean, corrupt, io, s):
    positions = clean.shape[1]
    rows = {"input_ids": corrupt.repeat(positions, 1)}
    sources = [{"input_ids": clean.repeat(positions, 1)}]
    places = [[[position] for position in range(positions)]]
    effects = []
    for layer in range(model.config.n_layer):
        intervenable = intervening(model, layer, "block_output")
        _, patched = intervenable(rows, sources, unit_locations={"sources->base": (places, places)})
        effects.append(patched.logits[:, -1, io] - patched.logits[:, -1, s])
    return torch.stack(effects)


def head_places(heads, positions):
    """For each row its head, at all positions: pyvene's units of `h.pos`."""
    return [[[[head] for head in heads], [list(range(positions))] * len(heads)]]


def sweep_heads(model, clean, corrupt, io, s):
    effects = []
    for layer in range(model.config.n_layer):
        for head in range(model.config.n_head):
            places = head_places([head], clean.shape[1])
            intervenable = intervening(
                model, layer, "head_attention_value_output", unit="h.pos", max_number_of_units=clean.shape[1]
            )
            _, patched = intervenable(
                {"input_ids": corrupt}, [{"input_ids": clean}], unit_locations={"sources->base": (places, places)}
            )
            effects.append(patched.logits[0, -1, io] - patched.logits[0, -1, s])
    return torch.stack(effects).view(model.config.n_layer, -1)


def collected(model, ids, places, *sites):
    """What several components gave at these positions, `[rows, positions, width]` each."""
    config = pyvene.IntervenableConfig(
        [{"layer": layer, "component": component, "max_number_of_units": len(places)} for layer, component in sites],
        intervention_types=pyvene.CollectIntervention,
    )
    intervenable = pyvene.IntervenableModel(config, model)
    (_, values), _ = intervenable({"input_ids": ids}, unit_locations={"base": places})
    return values


def logit_lens(model, prompt):
    sites = [(layer, "block_output") for layer in range(model.config.n_layer)]
    streams = collected(model, prompt, [prompt.shape[1] - 1], *sites)
    return torch.stack([model.lm_head(model.transformer.ln_f(stream))[0, -1] for stream in streams])


def save_everything(model, texts):
    components = ("attention_output", "mlp_output", "block_output")
    sites = [(layer, component) for layer in range(model.config.n_layer) for component in components]
    return collected(model, texts, list(range(texts.shape[1])), *sites)


def harvest(model, batches, layer):
    kept = []
    for batch in batches:
        (stream,) = collected(model, batch, list(range(batch.shape[1])), (layer, "block_output"))
        kept.append(stream)
    return kept


def patchscope(model, source, target, io, s):
    last = source.shape[1] - 1, target.shape[1] - 1
    effects = torch.empty(model.config.n_layer, model.config.n_layer)
    sites = [(layer, "block_output") for layer in range(model.config.n_layer)]
    sources = collected(model, source, [last[0]], *sites)
    for i, value in enumerate(sources):
        for j in range(model.config.n_layer):
            intervenable = intervening(model, j, "block_output")
            _, patched = intervenable(
                {"input_ids": target},
                source_representations={intervenable.sorted_keys[0]: value},
                unit_locations={"base": last[1]},
            )
            effects[i, j] = patched.logits[0, -1, io] - patched.logits[0, -1, s]
    return effects


def wrap(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model that the programs are given: they wrap it anew for each configuration."""
    return model


PROGRAMS: dict[str, dict[str, Program]] = {
    "S1": {"pyvene": sweep_positions, "pyvene, batched": sweep_positions_batched},
    "S2": {"pyvene": sweep_heads},
    "S3": {"pyvene": logit_lens},
    "S4": {"pyvene": save_everything},
    "S5": {"pyvene": harvest},
    "S7": {"pyvene": patchscope},
}
