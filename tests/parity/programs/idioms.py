"""What notebooks of researchers are full of: helpers, classes, masks, running sums, topk and decode."""

import itertools

import torch
from nnsight import save

CLEAN = "The Eiffel Tower is in the city of"
CORRUPT = "The Space Needle is in the city of"


def a_lambda_for_each_layer(model):
    changes = {0: lambda hidden: hidden * 2, 2: lambda hidden: hidden - 1}
    with model.trace(CLEAN):
        for number, layer in enumerate(model.transformer.h):
            if number in changes:
                layer.output = changes[number](layer.output)
        logits = save(model.lm_head.output)
    return logits


class Steering:
    def __init__(self, size, strength):
        self.direction = torch.linspace(-1, 1, size)
        self.strength = strength

    def __call__(self, hidden):
        return hidden + self.strength * self.direction


def an_object_that_is_called(model):
    steer = Steering(128, 3.0)
    with model.trace(CLEAN):
        model.transformer.h[0].output = steer(model.transformer.h[0].output)
        logits = save(model.lm_head.output[0, -1])
    return logits


def pairs_of_layers(model):
    found = []
    for early, late in itertools.combinations(range(3), 2):
        with model.trace(CLEAN):
            held = model.transformer.h[early].output
            model.transformer.h[late].output = model.transformer.h[late].output + held
            top = save(model.lm_head.output[0, -1].argmax())
        found.append(top.item())
    return found


def a_mask(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        small = hidden.abs() < hidden.abs().mean()
        hidden[small] = 0
        kept = save((~small).sum())
        logits = save(model.lm_head.output[0, -1])
    return kept, logits


def where(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        model.transformer.h[1].output = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
        logits = save(model.lm_head.output[0, -1])
    return logits


def neurons_by_number(model):
    with model.trace(CLEAN):
        act = model.transformer.h[1].mlp.act.output
        top = act[0, -1].topk(5).indices
        act[:, :, top] = 0
        found = save((top, model.lm_head.output[0, -1]))
    return found


def a_running_mean(model):
    total, count = 0, 0
    for prompt in (CLEAN, CORRUPT):
        with model.trace(prompt):
            hidden = save(model.transformer.h[1].output[0].mean(0))
        total = total + hidden
        count += 1
    return total / count


def the_best_layer(model):
    best, which = None, None
    for number in range(3):
        with model.trace(CLEAN):
            model.transformer.h[number].output[:, -1] = 0
            logit = save(model.lm_head.output[0, -1, 5])
        if best is None or logit > best:
            best, which = logit, number
    return which, best


def until_it_changes(model):
    factor = 1.0
    with model.trace(CLEAN):
        wanted = save(model.lm_head.output[0, -1].argmax())
    while factor < 100:
        factor *= 3
        with model.trace(CLEAN):
            model.transformer.h[1].output = model.transformer.h[1].output * factor
            top = save(model.lm_head.output[0, -1].argmax())
        if top != wanted:
            break
    else:
        factor = None
    return factor


def decoded(model):
    with model.trace(CLEAN):
        tops = [layer.output[0, -1] @ model.lm_head.weight.T for layer in model.transformer.h]
        words = save([model.tokenizer.decode(top.argmax()) for top in tops])
    return words


def directions(model):
    sides = []
    for prompt in (CLEAN, CORRUPT):
        with model.trace(prompt):
            sides.append(save(model.transformer.h[1].output[0, -1]))
    direction = (sides[0] - sides[1]) / (sides[0] - sides[1]).norm()
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        along = (hidden @ direction)[..., None] * direction
        model.transformer.h[1].output = hidden - along
        logits = save(model.lm_head.output[0, -1])
    return direction, logits


def an_ablation_with_the_mean(model):
    means = {}
    with model.trace([CLEAN, CORRUPT]):
        for number, layer in enumerate(model.transformer.h):
            means[number] = save(layer.mlp.output.mean((0, 1)))
    found = {}
    for number, mean in means.items():
        with model.trace(CLEAN):
            model.transformer.h[number].mlp.output[:] = mean
            found[number] = save(model.lm_head.output[0, -1].logsumexp(0))
    return found


def kl_of_each_layer(model):
    with model.trace(CLEAN):
        base = save(model.lm_head.output[0, -1].log_softmax(-1))
    found = []
    for layer in model.transformer.h:
        with model.trace(CLEAN):
            layer.attn.output[0][:] = 0
            changed = model.lm_head.output[0, -1].log_softmax(-1)
            found.append(save((base.exp() * (base - changed)).sum()))
    return torch.stack(found)


def no_grad_around(model):
    with torch.no_grad():  # noqa: SIM117
        with model.trace(CLEAN):
            hidden = save(model.transformer.h[1].output)
    return hidden, hidden.requires_grad


def caught(model):
    found = []
    for position in (0, 3, 50):
        try:
            with model.trace(CLEAN):
                found.append(save(model.transformer.h[1].output[0, position].sum()))
        except Exception:
            found.append(position)
    return found


def a_batch(model):
    with model.trace([CLEAN, CORRUPT]):
        hidden = model.transformer.h[1].output
        hidden[0], hidden[1] = hidden[1].clone(), hidden[0].clone()
        logits = save(model.lm_head.output[:, -1])
    return logits


def einsum(model):
    with model.trace(CLEAN):
        hidden = model.transformer.h[1].output
        scores = torch.einsum("bih,bjh->bij", hidden, hidden)
        found = save(scores.tril().softmax(-1))
    return found


def numbers_of_python(model):
    with model.trace(CLEAN):
        norm = model.transformer.h[1].output.norm().item()
        rounded = round(norm, 2)
        text = f"{rounded:>10.2f}|{int(norm)}"
        found = save((rounded, text, min(norm, 3), bool(norm)))
    return found


def some_layers(model):
    with model.trace(CLEAN):
        for number, layer in enumerate(model.transformer.h):
            if number in (0, 2):
                layer.mlp.output[:] = 0
            if number not in [0, 1]:
                layer.output[:, -1] += 1
        logits = save(model.lm_head.output[0, -1])
    return logits


def numpy_of_it(model):
    with model.trace(CLEAN):
        array = model.transformer.h[1].output.detach().cpu().numpy()
        found = save((array.shape, float(array.mean()), array.argmax()))
    return found
