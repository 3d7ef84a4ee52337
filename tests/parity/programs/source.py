"""Operations inside of a forward."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def an_operation_of_a_plain_module(net):
    with net.trace(torch.ones(2, 6)):
        first = net.source.torch_tanh_0.output.save()
    return first


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
