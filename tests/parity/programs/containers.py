"""Values of the model in lists, tuples and dicts, as researchers collect and look them up."""

from collections import OrderedDict, defaultdict

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def dict_by_name(model):
    acts = {}
    with model.trace(PROMPT):
        for number, layer in enumerate(model.transformer.h):
            acts[f"mlp_{number}"] = layer.mlp.output
            acts[f"resid_{number}"] = layer.output
        norms = save({name: value.norm() for name, value in acts.items()})
    return norms


def dict_comprehension(model):
    with model.trace(PROMPT):
        acts = save({number: layer.output[0, -1] for number, layer in enumerate(model.transformer.h)})
    return acts


def dict_of_lists(model):
    with model.trace(PROMPT):
        acts = {"attn": [], "mlp": []}
        for layer in model.transformer.h:
            acts["attn"].append(layer.attn.output[0].sum())
            acts["mlp"].append(layer.mlp.output.sum())
        found = save([torch.stack(values) for values in acts.values()])
    return found


def a_default_dict(model):
    with model.trace(PROMPT):
        acts = defaultdict(list)
        for number, layer in enumerate(model.transformer.h):
            acts[number % 2].append(layer.output.sum())
        found = save({key: torch.stack(values) for key, values in acts.items()})
    return found


def an_ordered_dict(model):
    with model.trace(PROMPT):
        acts = OrderedDict()
        for number, layer in enumerate(model.transformer.h):
            acts[number] = layer.output.sum()
        acts.move_to_end(0)
        found = save(list(acts.items()))
    return found


def a_list_that_grows_by_sums(model):
    with model.trace(PROMPT):
        acts = []
        for layer in model.transformer.h:
            acts += [layer.attn.output[0].sum(), layer.mlp.output.sum()]
        acts = acts + [model.lm_head.output.sum()]  # noqa: RUF005
        found = save(torch.stack(acts))
    return found


def a_tuple_that_grows(model):
    with model.trace(PROMPT):
        acts = ()
        for layer in model.transformer.h:
            acts += (layer.output.sum(),)
        first, *rest = acts
        found = save((first, torch.stack(rest)))
    return found


def written_through_a_dict(model):
    with model.trace(PROMPT):
        acts = {}
        acts["h"] = model.transformer.h[1].output
        acts["h"][:, -1] = 0
        logits = save(model.lm_head.output)
    return logits


def written_through_a_list(model):
    with model.trace(PROMPT):
        acts = []
        acts += [model.transformer.h[1].output]
        acts[0][:, 2:4] *= 2
        logits = save(model.lm_head.output)
    return logits


def written_after_it_was_kept(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        acts = {"before": hidden, "copy": hidden.clone()}
        hidden[:, -1] = 0
        found = save([acts["before"][0, -1], acts["copy"][0, -1]])
    return found


def entries_that_are_replaced(model):
    with model.trace(PROMPT):
        acts = {"h": model.transformer.h[0].output.sum()}
        acts["h"] = acts["h"] + model.transformer.h[1].output.sum()
        acts.update(h=acts["h"] * 2, other=1)
        found = save((acts["h"], acts["other"], len(acts)))
    return found


def entries_that_are_taken_out(model):
    with model.trace(PROMPT):
        acts = {number: layer.output.sum() for number, layer in enumerate(model.transformer.h)}
        first = acts.pop(0)
        del acts[1]
        missing = acts.get(1, "none")
        found = save((first, missing, list(acts), 2 in acts))
    return found


def sorted_by_value(model):
    with model.trace(PROMPT):
        acts = [(number, layer.output.sum().item()) for number, layer in enumerate(model.transformer.h)]
        acts.sort(key=lambda pair: -pair[1])
        found = save([number for number, _ in acts])
    return found


def lists_that_are_sliced_and_reversed(model):
    with model.trace(PROMPT):
        acts = [layer.output.sum() for layer in model.transformer.h]
        found = save([acts[-1], *acts[:2], acts[::-1][0], max(acts), sum(acts)])
    return found


def patched_from_a_dict(model):
    acts = {}
    with model.session():
        with model.trace(PROMPT):
            for number, layer in enumerate(model.transformer.h):
                acts[number] = layer.output[:, -1]
        found = save([])
        for number in range(len(model.transformer.h)):
            with model.trace("The Space Needle is in the city of"):
                model.transformer.h[number].output[:, -1] = acts[number]
                found.append(model.lm_head.output[0, -1].max())
    return found


def gradients_in_a_dict(model):
    with model.trace(PROMPT):
        acts = {}
        for number, layer in enumerate(model.transformer.h):
            acts[f"resid {number}"] = layer.output
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            found = save({name: acts[name].grad for name in reversed(acts)})
    return found


def gradients_in_a_list(model):
    with model.trace(PROMPT):
        acts = []
        for layer in model.transformer.h:
            acts += [layer.mlp.output, layer.output]
        loss = model.lm_head.output[0, -1, 3]
        with loss.backward():
            found = save([(value * value.grad).sum() for value in reversed(acts)])
    return found


def nested_dicts(model):
    with model.trace(PROMPT):
        acts = {}
        for number, layer in enumerate(model.transformer.h):
            acts[number] = {}
            acts[number]["attn"] = layer.attn.output[0].sum()
            acts[number]["mlp"] = layer.mlp.output.sum()
        found = save([acts[number][name] for number in acts for name in ("attn", "mlp")])
    return found


def zipped_with_names(model):
    names = ["a", "b", "c"]
    with model.trace(PROMPT):
        acts = dict(zip(names, [layer.output.sum() for layer in model.transformer.h], strict=True))
        found = save([acts[name] for name in reversed(names)])
    return found


def a_set_of_numbers(model):
    with model.trace(PROMPT):
        tops = [layer.output[0, -1].argmax().item() for layer in model.transformer.h]
        found = save((sorted(set(tops)), tops))
    return found


def a_key_of_two(model):
    with model.trace(PROMPT):
        acts = {}
        for number, layer in enumerate(model.transformer.h):
            acts[number, "mlp"] = layer.mlp.output.sum()
        found = save([acts[2, "mlp"], acts[(0, "mlp")], list(acts)])
    return found


def by_walrus(model):
    with model.trace(PROMPT):
        acts = []
        for layer in model.transformer.h:
            if (total := layer.output.sum()) > 0:
                acts.append(total)
        found = save(acts)
    return found
