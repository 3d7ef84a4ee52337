"""The demo's experiments, as anyone would write them: the demo shows this code and runs it."""

import torch

from nnsight_compiler import intervene


def first_example(model):
    with model.trace("The Eiffel Tower is in the city of "):  # undecorated
        hidden_state = model.layers[10].input[0].save()  # save a hidden state
        model.layers[11].mlp.output = 0  # change one MLP module output
        output = model.output.save()  # save the model's output
    return hidden_state, output


def first_example_tiny(model):
    with model.trace("The Eiffel Tower is in the city of"):
        hidden_state = model.layers[1].input[0].save()
        model.layers[2].mlp.output = 0
        output = model.output.save()
    return hidden_state, output


@intervene  # decorated: compiled once, called many times
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


@intervene
def logit_lens(model, prompt):
    logits = []
    with model.trace(prompt):
        for layer in model.layers:
            hidden = model.ln_final(layer.output[0, -1])
            logits.append(model.lm_head(hidden))
    return torch.stack(logits).softmax(-1)


@intervene
def patching_sweep(model, clean, corrupt, positions, answer, other, advance):
    with model.trace(clean):
        streams = [layer.input for layer in model.layers]
        logits = model.lm_head.output[0, -1]
    best = logits[answer] - logits[other]
    with model.trace(corrupt):
        logits = model.lm_head.output[0, -1]
    worst = logits[answer] - logits[other]

    restored = torch.zeros(len(model.layers), streams[0].shape[1])
    for layer in range(len(model.layers)):
        for position in positions:
            with model.trace(corrupt):
                stream = streams[layer][:, position]
                model.layers[layer].input[:, position] = stream
                logits = model.lm_head.output[0, -1]
            patched = logits[answer] - logits[other]
            restored[layer, position] = (patched - worst) / (best - worst)
            advance()
    return restored
