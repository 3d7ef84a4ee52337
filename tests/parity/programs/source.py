"""Operations inside of a forward."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def an_operation_changed(mixed):
    with mixed.trace(torch.ones(2, 6)):
        mixed.source.torch_tanh_0.output *= 2
        out = mixed.output.save()
    return out


def attention_probabilities(eager):
    with eager.trace(PROMPT):
        attended = eager.transformer.h[0].attn.source.attention_interface_1.output[0].save()
    return attended


def an_operations_input(mixed):
    with mixed.trace(torch.ones(2, 6)):
        value = save(mixed.source.torch_tanh_0.input)
    return value


def an_assignment_in_a_forward(mixed):
    with mixed.trace(torch.ones(2, 6)):
        hidden = mixed.named.source.hidden_0.output.save()
    return hidden


def an_operation_skipped(mixed):
    with mixed.trace(torch.ones(2, 6)):
        mixed.source.torch_tanh_0.skip(mixed.source.torch_tanh_0.input * 2)
        out = mixed.output.save()
    return out


def attention_probabilities_changed(eager):
    with eager.trace(PROMPT):
        probabilities = eager.transformer.h[1].attn.source.attention_interface_1.output[1]
        first = probabilities[:, :, -1].save()
        eager.transformer.h[1].attn.source.attention_interface_1.output[0][:] = 0
        logits = eager.lm_head.output.save()
    return first, logits


def inside_of_an_operation(eager):
    with eager.trace(PROMPT):
        inner = eager.transformer.h[0].attn.source.attention_interface_1.source
        weights = inner.nn_functional_softmax_0.output.save()
    return weights
