"""What is changed: in place and by replacement, outputs and inputs, tuples and dicts."""

import torch
from nnsight import save

CLEAN = "The Eiffel Tower is in the city of"
CORRUPT = "The Space Needle is in the city of"


def zero_in_place(model):
    with model.trace(CLEAN):
        model.transformer.h[1].mlp.output[:] = 0
        logits = model.lm_head.output.save()
    return logits


def replace(model):
    with model.trace(CLEAN):
        model.transformer.h[1].mlp.output = model.transformer.h[1].mlp.output * 0.5
        logits = model.lm_head.output.save()
    return logits


def add_in_place(model):
    with model.trace(CLEAN):
        model.transformer.h[1].output += 0.25
        logits = model.lm_head.output.save()
    return logits


def add_a_vector_at_a_position(model):
    vector = torch.linspace(-1, 1, 128)
    with model.trace(CLEAN):
        model.transformer.h[0].output[:, -1] += vector
        logits = model.lm_head.output[:, -1].save()
    return logits


def by_a_method_in_place(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[0].output
        hidden.mul_(0.5)
        hidden[:, 2].add_(1)
        logits = model.lm_head.output.save()
    return logits


def through_a_view(model):
    with model.trace(CLEAN):
        heads = model.transformer.h[1].attn.c_proj.input.view(1, -1, 4, 32)
        heads[:, :, 2] = 0
        logits = model.lm_head.output.save()
    return logits


def before_and_after(model):
    with model.trace(CLEAN):
        before = model.transformer.h[0].output.clone().save()
        model.transformer.h[0].output[:, 1] = 0
        after = model.transformer.h[0].output.save()
        logits = model.lm_head.output.save()
    return before, after, logits


def write_then_read_later(model):
    with model.trace(CLEAN):
        model.transformer.h[0].output = model.transformer.h[0].output + 1
        changed = model.transformer.h[0].output.save()
        downstream = model.transformer.h[1].input.save()
    return changed, downstream


def replace_twice(model):
    with model.trace(CLEAN):
        model.transformer.h[0].output = model.transformer.h[0].output * 2
        model.transformer.h[0].output = model.transformer.h[0].output + 1
        logits = model.lm_head.output.save()
    return logits


def every_layer(model):
    with model.trace(CLEAN):
        for number, layer in enumerate(model.transformer.h):
            layer.mlp.output *= 1 / (number + 1)
        logits = model.lm_head.output.save()
    return logits


def an_input(model):
    with model.trace(CLEAN):
        model.transformer.h[1].mlp.input = model.transformer.h[1].mlp.input.flip(-1)
        logits = model.lm_head.output.save()
    return logits


def an_input_in_place(model):
    with model.trace(CLEAN):
        model.transformer.h[1].mlp.input[:, -1] = 0
        logits = model.lm_head.output.save()
    return logits


def all_inputs(net):
    with net.trace(torch.ones(2, 6)):
        args, kwargs = net.layers[1].inputs
        net.layers[1].inputs = ((args[0] * 3,), kwargs)
        out = net.output.save()
    return out


def a_tuple_replaced(mixed):
    with mixed.trace(torch.ones(2, 6)):
        stream, mean = mixed.pairs[0].output
        mixed.pairs[0].output = (stream * 2, mean)
        out = mixed.output.save()
    return out


def an_item_of_a_tuple_in_place(mixed):
    with mixed.trace(torch.ones(2, 6)):
        mixed.pairs[0].output[0][:] = 0.5
        out = mixed.output.save()
    return out


def attention_output(model):
    with model.trace(CLEAN):
        model.transformer.h[1].attn.output[0][:] = 0
        logits = model.lm_head.output.save()
    return logits


def an_item_of_a_dict(mixed):
    with mixed.trace(torch.ones(2, 6)):
        mixed.named.output["norm"] = mixed.named.output["norm"] * 2
        out = mixed.output.save()
    return out


def masked(net):
    with net.trace(torch.linspace(-1, 1, 12).reshape(2, 6)):
        hidden = net.layers[1].output
        hidden[hidden < 0] = 0
        out = net.output.save()
    return out


def under_a_condition_on_elements(net):
    with net.trace(torch.linspace(-1, 1, 12).reshape(2, 6)):
        hidden = net.layers[0].output
        net.layers[0].output = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
        out = net.output.save()
    return out


def the_logits(model):
    with model.trace(CLEAN):
        model.lm_head.output[:, -1, 7] = 100
        token = model.lm_head.output[0, -1].argmax().save()
    return token


def projected_out(model):
    direction = torch.nn.functional.normalize(torch.linspace(-1, 1, 128), dim=0)
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        model.transformer.h[1].output = hidden - (hidden @ direction).unsqueeze(-1) * direction
        logits = model.lm_head.output.save()
    return logits


def noise(model):
    torch.manual_seed(5)
    with model.trace(CLEAN):
        embedded = model.transformer.wte.output
        embedded += torch.randn_like(embedded) * 0.1
        logits = model.lm_head.output.save()
    return logits


def patched_from_another_trace(model):
    with model.trace(CLEAN):
        clean = model.transformer.h[1].output[:, -1].save()
    with model.trace(CORRUPT):
        model.transformer.h[1].output[:, -1] = clean
        logits = model.lm_head.output[:, -1].save()
    return logits.softmax(-1)


def a_sweep_over_layers_and_positions(model):
    with model.trace(CLEAN):
        clean = save([layer.output.clone() for layer in model.transformer.h])
    grid = []
    for layer in range(3):
        for position in (2, -1):
            with model.trace(CORRUPT):
                model.transformer.h[layer].output[:, position] = clean[layer][:, position]
                logits = model.lm_head.output[0, -1].save()
            grid.append(logits.max())
    return grid


def from_an_earlier_site_of_the_same_forward(model):
    with model.trace(CLEAN):
        early = model.transformer.h[0].output
        model.transformer.h[2].output = model.transformer.h[2].output + early * 0.1
        logits = model.lm_head.output.save()
    return logits


def positions_exchanged(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        first = hidden[:, 1].clone()
        hidden[:, 1] = hidden[:, 2]
        hidden[:, 2] = first
        logits = model.lm_head.output.save()
    return logits


def means_ablated(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].mlp.output
        hidden[:] = hidden.mean(dim=1, keepdim=True)
        logits = model.lm_head.output.save()
    return logits


def a_batch_norm(picture):
    with picture.trace(torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)):
        picture.body[1].output[:, 2] = 0
        out = picture.output.save()
    return out


def recurrent_states(reader):
    with reader.trace(torch.tensor([[1, 2, 3], [4, 5, 6]])):
        reader.rnn.output[0][:, 0] = 0
        out = reader.output.save()
    return out
