"""Skipping modules, stopping early."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def stop(model):
    with model.trace(PROMPT) as tracer:
        hidden = model.transformer.h[1].output.save()
        tracer.stop()
    return hidden


def stop_after_a_write(net):
    with net.trace(torch.ones(2, 6)) as tracer:
        net.layers[0].output[:] = 0.5
        hidden = net.layers[1].output.save()
        tracer.stop()
    return hidden


def skip_a_layer(model):
    with model.trace(PROMPT):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        logits = model.lm_head.output.save()
    return logits


def skip_with_a_computed_value(net):
    with net.trace(torch.ones(2, 6)):
        net.layers[1].skip(net.layers[1].input * 2)
        out = net.output.save()
    return out


def skip_several(model):
    with model.trace(PROMPT):
        for layer in model.transformer.h[1:]:
            layer.skip(layer.input)
        logits = model.lm_head.output.save()
    return logits


def skip_and_read_the_output(net):
    with net.trace(torch.ones(2, 6)):
        net.layers[1].skip(net.layers[1].input + 1)
        value = net.layers[1].output.save()
    return value


def skip_with_an_earlier_value(model):
    with model.trace(PROMPT):
        early = model.transformer.h[0].output
        model.transformer.h[2].skip(early)
        logits = model.lm_head.output.save()
    return logits


def skip_a_module_that_returns_a_tuple(mixed):
    with mixed.trace(torch.ones(2, 6)):
        value = mixed.pairs[0].input
        mixed.pairs[0].skip((value, value.mean(-1)))
        out = save(mixed.output)
    return out
