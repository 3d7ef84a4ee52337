"""Activations of many modules at once."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def some_modules(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[layer for layer in model.transformer.h])
    return [cache[f"model.transformer.h.{number}"].output for number in range(3)]


def modules_by_name(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=["model.transformer.h.1.mlp"])
    return cache["model.transformer.h.1.mlp"].output


def by_attributes(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[1]])
    return cache.model.transformer.h[1].output


def every_module(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache()
    names = ["model.transformer.wte", "model.transformer.h.0.ln_1", "model.transformer.h.2.mlp.c_fc", "model.lm_head"]
    return [cache[name].output for name in names]


def with_inputs(net):
    with net.trace(torch.ones(2, 6)) as tracer:
        cache = tracer.cache(modules=[net.layers[1]], include_inputs=True)
    entry = cache["model.layers.1"]
    return entry.output, entry.inputs[0][0], entry.input


def after_interventions(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0], model.transformer.h[1]])
        model.transformer.h[0].output = model.transformer.h[0].output * 0
    return cache["model.transformer.h.0"].output, cache["model.transformer.h.1"].output


def with_a_dtype(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[1]], dtype=torch.float64)
    output = cache["model.transformer.h.1"].output
    return output, str(output.dtype)


def beside_a_save(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[1]])
        norm = save(model.transformer.h[2].output.norm())
    return cache["model.transformer.h.1"].output, norm
