"""Python in a body: control flow, helpers, closures, classes, other libraries."""

import numpy
import torch
from einops import rearrange
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def a_condition_on_a_value(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output
        if hidden.norm() > 1.0:
            model.transformer.h[0].output = hidden / hidden.norm()
        logits = model.lm_head.output.save()
    return logits


def a_condition_that_does_not_hold(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output
        if hidden.norm() > 1e9:
            hidden[:] = 0
        else:
            hidden[:, 0] = 0
        logits = model.lm_head.output.save()
    return logits


def an_expression_with_if(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output
        scale = 2.0 if hidden.sum() > 0 else 0.5
        model.transformer.h[1].output *= scale
        logits = model.lm_head.output.save()
    return logits


def a_while_loop(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        rounds = 0
        while hidden.norm() > 1.0:
            hidden = hidden / 2
            rounds += 1
        small = hidden.save()
        rounds = save(rounds)
    return small, rounds


def a_loop_over_positions(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        for position in range(0, 6, 2):
            hidden[:, position] *= position
        logits = model.lm_head.output.save()
    return logits


def a_loop_with_break(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output[0]
        found = -1
        for position in range(hidden.shape[0]):
            if hidden[position].max() > hidden[0].max():
                found = position
                break
        found = save(found)
    return found


def zip_and_enumerate(model):
    strengths = [0.5, 1.5, 2.5]
    with model.trace(PROMPT):
        for number, (layer, strength) in enumerate(zip(model.transformer.h, strengths, strict=True)):
            layer.mlp.output *= strength + number
        logits = model.lm_head.output.save()
    return logits


def _centred(hidden, amount=1.0):
    return hidden - amount * hidden.mean(-1, keepdim=True)


def a_helper(model):
    with model.trace(PROMPT):
        model.transformer.h[1].output = _centred(model.transformer.h[1].output, amount=0.5)
        logits = model.lm_head.output.save()
    return logits


def _silence(layer, positions):
    for position in positions:
        layer.mlp.output[:, position] = 0


def a_helper_given_a_module(model):
    with model.trace(PROMPT):
        _silence(model.transformer.h[0], [1, 2])
        _silence(model.transformer.h[2], [-1])
        logits = model.lm_head.output.save()
    return logits


def a_helper_that_reads(model):
    def stream(layer):
        return layer.output[0, -1]

    with model.trace(PROMPT):
        states = save([stream(layer) for layer in model.transformer.h])
    return states


def a_closure_over_a_vector(net):
    vector = torch.linspace(0, 1, 6)

    def steer(hidden):
        return hidden + vector

    with net.trace(torch.ones(2, 6)):
        net.layers[1].output = steer(net.layers[1].output)
        out = net.output.save()
    return out


def a_lambda(net):
    double = lambda hidden: hidden * 2  # noqa: E731
    with net.trace(torch.ones(2, 6)):
        net.layers[1].output = double(net.layers[1].output)
        out = net.output.save()
    return out


def a_function_defined_in_the_body(net):
    with net.trace(torch.ones(2, 6)):

        def clip(hidden):
            return hidden.clamp(-0.1, 0.1)

        net.layers[1].output = clip(net.layers[1].output)
        out = net.output.save()
    return out


def comprehensions(model):
    with model.trace(PROMPT):
        norms = {number: float(layer.output.norm()) for number, layer in enumerate(model.transformer.h)}
        total = save(sum(norm for norm in norms.values()))
        largest = save(max(norms, key=lambda number: norms[number]))
    return total, largest


def a_walrus(model):
    with model.trace(PROMPT):
        if (norm := model.transformer.h[0].output.norm()) > 0:
            scaled = (norm * 2).save()
    return scaled


def a_formatted_string(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].output
        text = save(f"{hidden.shape[-1]} numbers, the first {hidden[0, 0, 0].item():.4f}")
    return text


class _Scaler:
    def __init__(self, factor):
        self.factor = factor

    def apply(self, hidden):
        return hidden * self.factor


def a_class(net):
    scaler = _Scaler(3.0)
    with net.trace(torch.ones(2, 6)):
        net.layers[0].output = scaler.apply(net.layers[0].output)
        out = net.output.save()
    return out


def numpy_and_back(net):
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output.detach().numpy()
        order = numpy.argsort(hidden, axis=-1)
        net.layers[1].output = torch.gather(net.layers[1].output, -1, torch.from_numpy(order))
        out = net.output.save()
    return out


def einops(model):
    with model.trace(PROMPT):
        heads = rearrange(model.transformer.h[1].attn.c_proj.input, "b t (h d) -> b h t d", h=4)
        norms = heads.norm(dim=(2, 3)).save()
    return norms


def an_outside_list(model):
    kept = []
    with model.trace(PROMPT):
        for layer in model.transformer.h:
            kept.append(layer.output[0, -1].norm().item())
        save(kept)
    return kept


def a_dict_of_functions(net):
    edits = {0: torch.relu, 2: torch.sigmoid}
    with net.trace(torch.ones(2, 6)):
        for number, layer in enumerate(net.layers):
            if number in edits:
                layer.output = edits[number](layer.output)
        out = net.output.save()
    return out


def a_star_call(net):
    options = {"min": -0.1, "max": 0.1}
    with net.trace(*[torch.ones(2, 6)], **{"scale": 2.0}):
        net.layers[0].output = torch.clamp(net.layers[0].output, **options)
        out = net.output.save()
    return out


def under_no_grad(net):
    with torch.no_grad(), net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output.save()
        out = net.output.save()
    return hidden, out, hidden.requires_grad, out.requires_grad
