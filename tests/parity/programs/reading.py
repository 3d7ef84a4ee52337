"""What is read and saved: sites, kinds of values, containers."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def one_hidden_state(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output.save()
    return hidden


def the_first_example(model):
    with model.trace("The Eiffel Tower is in the city of "):
        hidden_state = model.transformer.h[1].input[0].save()
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 0
        output = model.output.save()
    return hidden_state, output.logits


def the_whole_output(model):
    with model.trace(PROMPT):
        output = model.output.save()
    return output.logits


def logits_and_a_token(model):
    with model.trace(PROMPT):
        logits = model.lm_head.output.save()
        token = model.lm_head.output[0, -1].argmax(dim=-1).save()
    return logits, token


def every_layer_in_a_list(model):
    with model.trace(PROMPT):
        states = list().save()
        for layer in model.transformer.h:
            states.append(layer.output)
    return states


def every_layer_by_a_comprehension(model):
    with model.trace(PROMPT):
        states = [layer.output.save() for layer in model.transformer.h]
        save(states)
    return states


def a_dict_of_layers(model):
    with model.trace(PROMPT):
        states = save({})
        for number, layer in enumerate(model.transformer.h):
            states[number] = layer.mlp.output[0, -1]
    return states


def nested_containers(net):
    with net.trace(torch.ones(2, 6)):
        first = net.layers[0].output
        second = net.layers[1].output
        found = save({"pair": (first, second), "sums": [first.sum(), second.sum()], "width": first.shape[-1]})
    return found


def an_input(model):
    with model.trace(PROMPT):
        value = model.transformer.h[1].mlp.input.save()
    return value


def all_inputs(net):
    with net.trace(torch.ones(2, 6), scale=2.0):
        args, kwargs = net.inputs
        x = args[0].save()
        scale = save(kwargs["scale"])
    return x, scale


def a_keyword_input(mixed):
    with mixed.trace(torch.ones(2, 6)):
        first = mixed.named.input.save()
        kwargs = mixed.named.inputs[1]
        bias = save(kwargs["bias"])
    return first, bias


def an_item_of_a_tuple(mixed):
    with mixed.trace(torch.ones(2, 6)):
        mean = mixed.pairs[0].output[1].save()
        both = mixed.pairs[1].output
        stream = both[0].save()
    return mean, stream


def a_tuple_unpacked(mixed):
    with mixed.trace(torch.ones(2, 6)):
        stream, mean = mixed.pairs[0].output
        total = (stream.sum() + mean.sum()).save()
    return total


def an_item_of_a_dict(mixed):
    with mixed.trace(torch.ones(2, 6)):
        norm = mixed.named.output["norm"].save()
    return norm


def attention_output(model):
    with model.trace(PROMPT):
        mixed = model.transformer.h[0].attn.output[0].save()
    return mixed


def numbers_and_shapes(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[2].output
        norm = save(hidden.norm().item())
        shape = save(tuple(hidden.shape))
        kind = save(str(hidden.dtype))
    return norm, shape, kind


def a_slice(model):
    with model.trace(PROMPT):
        last = model.transformer.h[2].output[:, -1, 5:9].save()
    return last


def computed_from_two_layers(model):
    with model.trace(PROMPT):
        early = model.transformer.h[0].output
        late = model.transformer.h[2].output
        change = (late - early).norm(dim=-1).save()
    return change


def the_same_site_twice(model):
    with model.trace(PROMPT):
        first = model.transformer.h[1].output.sum().save()
        second = model.transformer.h[1].output.mean().save()
    return first, second


def saved_without_the_method(model):
    with model.trace(PROMPT):
        hidden = save(model.transformer.h[1].output)
    return hidden


def token_ids_as_input(llama):
    with llama.trace(torch.tensor([[5, 17, 42, 3]])):
        hidden = llama.model.layers[1].output.save()
        logits = llama.lm_head.output[:, -1].save()
    return hidden, logits


def a_list_of_ids(llama):
    with llama.trace([5, 17, 42, 3]):
        hidden = llama.model.layers[1].output.save()
    return hidden


def a_convolution(picture):
    with picture.trace(torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)):
        maps = picture.body[0].output.save()
        pooled = picture.body[3].output.save()
        out = picture.output.save()
    return maps, pooled, out


def a_recurrent_network(reader):
    with reader.trace(torch.tensor([[1, 2, 3], [4, 5, 6]])):
        states = reader.rnn.output[0].save()
        final = reader.rnn.output[1].save()
    return states, final


def weights_as_values(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[2].output
        direction = model.lm_head.weight[7]
        along = (hidden @ direction).save()
    return along


def two_traces(model):
    with model.trace(PROMPT):
        first = model.transformer.h[1].output.save()
    with model.trace("The Space Needle is in the city of"):
        second = model.transformer.h[1].output.save()
    return (first[:, -1] - second[:, -1]).norm()
