"""Modules called in a body: the model's own, the user's, attached ones."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def the_logit_lens(model):
    with model.trace(PROMPT):
        tokens = save([])
        for layer in model.transformer.h:
            logits = model.lm_head(model.transformer.ln_f(layer.output))
            tokens.append(logits[0, -1].argmax())
    return tokens


def a_module_of_the_model_on_another_value(net):
    with net.trace(torch.ones(2, 6)):
        again = net.layers[2](net.layers[0].output).save()
        out = net.output.save()
    return again, out


def an_autoencoder(model):
    torch.manual_seed(3)
    encoder, decoder = torch.nn.Linear(128, 16), torch.nn.Linear(16, 128)
    with model.trace(PROMPT):
        features = torch.relu(encoder(model.transformer.h[1].output))
        model.transformer.h[1].output = decoder(features)
        features = features.save()
        logits = model.lm_head.output.save()
    return features, logits


def an_attached_module(own_net):
    torch.manual_seed(3)
    own_net.layers[1].adapter = torch.nn.Linear(6, 6)
    with own_net.trace(torch.ones(2, 6)):
        own_net.layers[1].output = own_net.layers[1].adapter(own_net.layers[1].output, hook=True)
        out = own_net.output.save()
    return out


def a_torch_function(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        normed = torch.nn.functional.layer_norm(hidden, (128,)).save()
    return normed
