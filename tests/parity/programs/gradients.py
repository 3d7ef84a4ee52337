"""Gradients: read, written, of several losses, and of what training needs."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def of_one_layer(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        hidden.requires_grad_(True)
        loss = model.lm_head.output[0, -1, 7]
        with loss.backward():
            gradient = hidden.grad.save()
    return gradient


def of_two_layers(model):
    with model.trace(PROMPT):
        early = model.transformer.h[0].output
        late = model.transformer.h[2].output
        loss = model.lm_head.output.sum()
        with loss.backward():
            late_gradient = late.grad.save()
            early_gradient = early.grad.save()
    return early_gradient, late_gradient


def times_activation(model):
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        loss = model.lm_head.output[0, -1].max()
        with loss.backward():
            attribution = (hidden.grad * hidden).sum(-1).save()
    return attribution


def written(net):
    with net.trace(torch.ones(2, 6)):
        early = net.layers[0].output
        late = net.layers[1].output
        loss = net.output.sum()
        with loss.backward():
            late.grad = late.grad * 3
            gradient = early.grad.save()
    return gradient


def of_two_losses(net):
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        out = net.output
        with out[0].sum().backward(retain_graph=True):
            first = hidden.grad.clone().save()
        with out[1, 0].backward():
            second = hidden.grad.clone().save()
    return first, second


def through_a_write(net):
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        net.layers[1].output = net.layers[1].output * 2
        loss = net.output.sum()
        with loss.backward():
            gradient = hidden.grad.save()
    return gradient


def of_parameters(own_net):
    with own_net.trace(torch.ones(2, 6)):
        loss = own_net.output.sum()
        loss.backward()
        gradient = own_net.head.weight.grad.clone().save()
    return gradient


def by_autograd(net):
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        loss = net.output.sum()
        gradient = torch.autograd.grad(loss, hidden)[0].save()
    return gradient


def of_an_input(net):
    x = torch.ones(2, 6, requires_grad=True)
    with net.trace(x):
        out = net.output.save()
    out.sum().backward()
    return x.grad


def a_steering_vector_learns(net):
    vector = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.SGD([vector], lr=0.5)
    losses = []
    for _ in range(4):
        with net.trace(torch.ones(2, 6)):
            net.layers[1].output = net.layers[1].output + vector
            loss = (net.output - 1).square().sum().save()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, vector


class _LowRank:
    def __init__(self, width, rank):
        self.down = torch.nn.Linear(width, rank, bias=False)
        self.up = torch.nn.Linear(rank, width, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def parameters(self):
        return [self.down.weight, self.up.weight]

    def __call__(self, x):
        return self.up(self.down(x))


def a_low_rank_adapter_learns(model):
    torch.manual_seed(2)
    adapter = _LowRank(128, 4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        with model.trace(PROMPT):
            mlp = model.transformer.h[1].mlp
            correction = adapter(mlp.input)
            mlp.output = mlp.output + correction
            logits = model.lm_head.output[:, -1].save()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([7]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, adapter.up.weight


def an_adapter_that_is_a_module_learns(model):
    torch.manual_seed(2)
    adapter = torch.nn.Sequential(torch.nn.Linear(128, 4, bias=False), torch.nn.Linear(4, 128, bias=False))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        with model.trace(PROMPT):
            model.transformer.h[1].output = model.transformer.h[1].output + adapter(model.transformer.h[1].output)
            loss = torch.nn.functional.cross_entropy(model.lm_head.output[:, -1], torch.tensor([7])).save()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def a_loss_backward_in_the_body(net):
    probe = torch.nn.Linear(6, 1)
    torch.nn.init.ones_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    with net.trace(torch.ones(2, 6)):
        loss = probe(net.layers[1].output).square().mean()
        loss.backward()
        value = save(loss.item())
    return value, probe.weight.grad
