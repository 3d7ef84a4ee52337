"""Several traces in a session."""

import torch
from nnsight import save

CLEAN = "The Eiffel Tower is in the city of"
CORRUPT = "The Space Needle is in the city of"


def a_value_from_trace_to_trace(model):
    with model.session():
        with model.trace(CLEAN):
            clean = model.transformer.h[1].output[:, -1]
        with model.trace(CORRUPT):
            model.transformer.h[1].output[:, -1] = clean
            logits = model.lm_head.output[:, -1].save()
    return logits


def a_loop_around_traces(model):
    with model.session():
        found = save([])
        for prompt in (CLEAN, CORRUPT):
            with model.trace(prompt):
                found.append(model.lm_head.output[0, -1].argmax())
    return found


def a_sweep(model):
    with model.session():
        scores = save({})
        with model.trace(CLEAN):
            clean = [layer.output[:, -1] for layer in model.transformer.h]
        for number in range(3):
            with model.trace(CORRUPT):
                model.transformer.h[number].output[:, -1] = clean[number]
                logits = model.lm_head.output[0, -1]
            scores[number] = float(logits.max())
    return scores


def python_between_traces(net):
    with net.session():
        x = torch.ones(1, 6)
        with net.trace(x):
            hidden = net.layers[1].output
        x = hidden * 2
        with net.trace(x):
            out = net.output.save()
    return out
