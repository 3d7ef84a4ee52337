"""Interventions that stay on a model."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def in_place(own_model):
    with own_model.edit(inplace=True):
        own_model.transformer.h[1].mlp.output = own_model.transformer.h[1].mlp.output * 0
    with own_model.trace(PROMPT):
        edited = own_model.lm_head.output.save()
    return edited


def cleared(own_model):
    with own_model.edit(inplace=True):
        own_model.transformer.h[1].output[:] = 0
    with own_model.trace(PROMPT):
        edited = own_model.lm_head.output[:, -1].save()
    own_model.clear_edits()
    with own_model.trace(PROMPT):
        plain = own_model.lm_head.output[:, -1].save()
    return edited, plain


def an_edit_and_a_write(own_model):
    with own_model.edit(inplace=True):
        own_model.transformer.h[0].output += 0.5
    with own_model.trace(PROMPT):
        own_model.transformer.h[2].output = own_model.transformer.h[2].output * 2
        logits = own_model.lm_head.output.save()
    return logits


def an_edit_and_a_read_of_it(own_model):
    with own_model.edit(inplace=True):
        own_model.transformer.h[0].output = own_model.transformer.h[0].output * 3
    with own_model.trace(PROMPT):
        hidden = own_model.transformer.h[0].output.save()
    return hidden


def two_edits(own_net):
    with own_net.edit(inplace=True):
        own_net.layers[0].output = own_net.layers[0].output + 1
    with own_net.edit(inplace=True):
        own_net.layers[0].output = own_net.layers[0].output * 2
    with own_net.trace(torch.ones(2, 6)):
        out = save(own_net.output)
    return out


def a_vector_captured(own_net):
    vector = torch.linspace(0, 1, 6)
    with own_net.edit(inplace=True):
        own_net.layers[1].output = own_net.layers[1].output + vector
    with own_net.trace(torch.ones(2, 6)):
        out = own_net.output.save()
    return out
