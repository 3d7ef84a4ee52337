"""Gradients inside of experiments, against plain torch: hooks with `retain_grad`, and `torch.autograd.grad`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, LanguageModel, NNsight, RunError, intervene

torch.set_num_threads(1)


class Block(nn.Module):
    """A residual block whose inner layers are given one tensor, as attention gives to its projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.pair = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        inner, scale = self.pair(self.down(torch.tanh(self.gate(normed)) * self.up(normed)))
        return x + inner * scale


class Pair(nn.Module):
    """Returns a tuple."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 1.5, x.mean(-1, keepdim=True)


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def model(_net: Net) -> NNsight:
    return NNsight(_net)


@pytest.fixture
def net(_net: Net) -> Net:
    """The plain module of the model, without gradients of its weights."""
    for parameter in _net.parameters():
        parameter.grad = None
    return _net


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 6)


Sites = dict[str, torch.Tensor]


def plain(net: nn.Module, x: torch.Tensor, *sites: str) -> tuple[torch.Tensor, Sites]:
    """The output of a plain forward, and the tensors at these sites (`path.output`, `path.input`)."""
    found: Sites = {}
    handles = []
    for site in sites:
        path, _, port = site.rpartition(".")

        def keep(value: Any, site: str = site) -> None:
            found[site] = value[0] if isinstance(value, tuple) else value
            if not found[site].requires_grad:
                found[site].requires_grad_()
            found[site].retain_grad()

        module = net.get_submodule(path)
        if port == "output":
            handles.append(module.register_forward_hook(lambda _, __, output, keep=keep: keep(output)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: keep(args)))
    try:
        return net(x), found
    finally:
        for handle in handles:
            handle.remove()


def untouched(net: nn.Module) -> bool:
    """Whether the weights of a model have no gradients."""
    return all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def expected(net: nn.Module, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], *sites: str) -> Sites:
    """The gradients at these sites, as torch has them."""
    output, found = plain(net, x, *sites)
    values = list(found.values())
    gradients = torch.autograd.grad(loss(output), values)
    return dict(zip(found, gradients, strict=True))


def squares(output: torch.Tensor) -> torch.Tensor:
    return output.square().sum()


# --- reading ---


def test_gradients_are_read_in_the_order_of_the_forward(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            hs = [layer.output for layer in model.layers]
            loss = model.head.output.square().sum()
            with loss.backward():
                first, second, third = (hs[0].grad, hs[1].grad, hs[2].grad)
        return first, second, third

    truth = expected(net, x, squares, "layers.0.output", "layers.1.output", "layers.2.output")
    for found, wanted in zip(run(model, x), truth.values(), strict=True):
        assert torch.equal(found, wanted)
    assert untouched(net)


def test_gradients_are_read_in_the_opposite_order_and_twice(model, net, x) -> None:
    @intervene
    def run(model, x):
        found = {}
        with model.trace(x):
            hs = [layer.output for layer in model.layers]
            loss = model.head.output.square().sum()
            with loss.backward():
                for i in (2, 1, 0):
                    found[i] = hs[i].grad
                again = hs[2].grad.save()
        return found, again

    truth = expected(net, x, squares, "layers.0.output", "layers.1.output", "layers.2.output")
    found, again = run(model, x)
    assert all(torch.equal(found[i], truth[f"layers.{i}.output"]) for i in range(3))
    assert torch.equal(again, truth["layers.2.output"])


def test_a_loop_over_values_is_unrolled_for_their_gradients(model, net, x) -> None:
    @intervene
    def run(model, x):
        norms = []
        with model.trace(x):
            hs = []
            for layer in model.layers:
                hs.append(layer.output)
            loss = model.head.output.square().sum()
            with loss.backward():
                for h in hs:
                    norms.append(h.grad.norm())
                squares = [(h * h.grad).sum() for h in hs]
        return norms, squares

    output, found = plain(net, x, "layers.0.output", "layers.1.output", "layers.2.output")
    gradients = torch.autograd.grad(squares(output), list(found.values()))
    norms, products = run(model, x)
    for norm, product, h, g in zip(norms, products, found.values(), gradients, strict=True):
        assert torch.allclose(norm, g.norm())
        assert torch.allclose(product, (h * g).sum())


def test_an_undecorated_block(model, net, x) -> None:
    with model.trace(x):
        h = model.layers[1].output
        loss = squares(model.head.output)
        with loss.backward():
            g = h.grad.save()
    assert torch.equal(g, expected(net, x, squares, "layers.1.output")["layers.1.output"])
    assert untouched(net)


def test_after_the_trace_in_the_function(model, net, x) -> None:
    @intervene
    def run(model, x, target):
        with model.trace(x):
            h = model.layers[0].output
            out = model.output
        loss = (out - target).square().mean()
        with loss.backward():
            g = h.grad
        return g

    target = torch.ones(2, 4, 3)
    truth = expected(net, x, lambda out: (out - target).square().mean(), "layers.0.output")
    assert torch.equal(run(model, x, target), truth["layers.0.output"])
    assert untouched(net)


def test_the_gradient_of_a_saved_value(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output.save()
            loss = model.output.square().sum()
            with loss.backward():
                g = h.grad.save()
        return h, g

    _, g = run(model, x)
    assert torch.equal(g, expected(net, x, squares, "layers.1.output")["layers.1.output"])


@pytest.mark.parametrize("site", ["layers.1.up.input", "layers.1.gate.input", "layers.0.norm.output", "head.input"])
def test_a_tensor_that_several_modules_are_given_has_the_gradient_of_all_its_uses(model, net, x, site) -> None:
    path, _, port = site.rpartition(".")

    @intervene
    def run(model, x, path, port):
        with model.trace(x):
            module = model[path]
            h = getattr(module, port)
            loss = model.output.square().sum()
            with loss.backward():
                g = h.grad
        return g

    found = run(model, x, path=path, port=port)
    assert torch.allclose(found, expected(net, x, squares, site)[site], rtol=1e-6, atol=1e-7)


def test_several_losses(model, net, x) -> None:
    @intervene
    def run(model, x):
        found = []
        with model.trace(x):
            h = model.layers[1].output
            out = model.output
            for i in range(3):
                with out[..., i].sum().backward(retain_graph=True):
                    found.append(h.grad)
        return found

    output, sites = plain(net, x, "layers.1.output")
    for i, found in enumerate(run(model, x)):
        (truth,) = torch.autograd.grad(output[..., i].sum(), list(sites.values()), retain_graph=True)
        assert torch.equal(found, truth)


def test_a_second_pass_without_retain_graph_is_refused_at_its_line(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            loss = model.output.square().sum()
            with loss.backward():
                first = h.grad
            with loss.backward():
                second = h.grad
        return first, second

    with pytest.raises(RunError, match=r"test_gradients\.py:\d+:\d+: an earlier backward.*\n.*retain_graph=True"):
        run(model, x)


# --- parts of values ---


def test_the_gradient_of_a_slice_is_that_part_of_the_whole(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            last = model.layers[0].output[:, -1]
            some = model.layers[1].output[0, 1:3].T
            loss = model.output.square().sum()
            with loss.backward():
                a, b = last.grad.save(), some.grad.save()
        return a, b

    truth = expected(net, x, squares, "layers.0.output", "layers.1.output")
    a, b = run(model, x)
    assert torch.equal(a, truth["layers.0.output"][:, -1])
    assert torch.equal(b, truth["layers.1.output"][0, 1:3].T)


def test_the_gradient_of_an_item_of_a_tuple(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            inner = model.layers[1].pair.output[0]
            part = model.layers[2].pair.output[0][:, 0]
            loss = model.output.square().sum()
            with loss.backward():
                a, b = inner.grad, part.grad
        return a, b

    truth = expected(net, x, squares, "layers.1.pair.output", "layers.2.pair.output")
    a, b = run(model, x)
    assert torch.equal(a, truth["layers.1.pair.output"])
    assert torch.equal(b, truth["layers.2.pair.output"][:, 0])


def test_the_gradient_of_what_the_program_wrote(model, net, x) -> None:
    @intervene
    def run(model, x, scale):
        with model.trace(x):
            new = model.layers[1].output * scale
            model.layers[1].output = new
            delta = torch.zeros(6)
            model.layers[0].output += delta
            loss = model.output.square().sum()
            with loss.backward():
                a, b = new.grad, delta.grad
        return a, b

    sites: Sites = {}

    def scaled(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        sites["new"] = output * 0.5
        return sites["new"]

    def moved(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        sites["delta"] = torch.zeros(6, requires_grad=True)
        return output + sites["delta"]

    handles = [net.layers[1].register_forward_hook(scaled), net.layers[0].register_forward_hook(moved)]
    output = net(x)
    for handle in handles:
        handle.remove()
    truth = torch.autograd.grad(squares(output), [sites["new"], sites["delta"]])
    a, b = run(model, x, 0.5)
    assert torch.allclose(a, truth[0], rtol=1e-6)
    assert torch.allclose(b, truth[1], rtol=1e-5)


def test_the_gradient_after_a_write_in_place_is_that_of_what_the_model_goes_on_with(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            h[:, 0] = 0
            loss = model.output.square().sum()
            with loss.backward():
                a, b = model.layers[0].output.grad, h.grad
        return a, b

    kept: list[torch.Tensor] = []

    def cleared(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0] = 0
        kept.append(output)
        return output

    handle = net.layers[1].register_forward_hook(cleared)
    output, sites = plain(net, x, "layers.0.output")
    handle.remove()
    truth = torch.autograd.grad(squares(output), [sites["layers.0.output"], kept[0]])
    a, b = run(model, x)
    assert torch.equal(a, truth[0])
    assert torch.equal(b, truth[1])


# --- writing ---


def hooked(net: nn.Module, x: torch.Tensor, path: str, change: Callable[[torch.Tensor], torch.Tensor], *sites: str):
    """The gradients at these sites where that of `path`'s output is changed on the way."""
    handle = net.get_submodule(path).register_forward_hook(lambda _, __, output: output.register_hook(change) and None)
    output, found = plain(net, x, *sites)
    handle.remove()
    squares(output).backward()
    for parameter in net.parameters():
        parameter.grad = None
    return [value.grad for value in found.values()]


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "h.grad = h.grad * 2": lambda g: g * 2,
    "h.grad *= 2": lambda g: g * 2,
    "h.grad[:] = 0": torch.zeros_like,
    "h.grad[:, 0] = 1": lambda g: torch.cat([torch.ones_like(g[:, :1]), g[:, 1:]], 1),
    "h.grad = 3": lambda g: torch.full_like(g, 3.0),
    "h.grad = torch.ones_like(h)": torch.ones_like,
    "h.grad.clamp_(-1, 1)": lambda g: g.clamp(-1, 1),
    "g = h.grad\n                g.mul_(0.5)": lambda g: g * 0.5,
    "if h.grad.norm() > 0.1:\n                    h.grad = h.grad / h.grad.norm()": lambda g: g / g.norm(),
    "model.layers[1].output[:, -1].grad = 0": lambda g: torch.cat([g[:, :-1], torch.zeros_like(g[:, -1:])], 1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_written_gradient_flows_on(model, net, x, write, tmp_path) -> None:
    source = f"""
import torch
from nnsight_compiler import intervene

@intervene
def run(model, x):
    with model.trace(x):
        h = model.layers[1].output
        first = model.layers[0].output
        loss = model.output.square().sum()
        with loss.backward():
            before = h.grad.clone()
            {write.replace("                ", "            ") if chr(10) in write else write}
            after = first.grad
    return before, after
"""
    path = tmp_path / "writes.py"
    path.write_text(source)
    space: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), space)
    before, after = space["run"](model, x)
    (truth,) = hooked(net, x, "layers.1", WRITES[write], "layers.0.output")
    assert torch.equal(before, expected(net, x, squares, "layers.1.output")["layers.1.output"])
    assert torch.allclose(after, truth, rtol=1e-6, atol=1e-7)
    assert untouched(net)


def test_a_written_gradient_may_need_one_that_arrives_before(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[2].output
            loss = model.output.square().sum()
            with loss.backward():
                early.grad = late.grad + early.grad
                g = model.embed.output.grad
        return g

    late: list[torch.Tensor] = []
    handle = net.layers[2].register_forward_hook(lambda _, __, o: o.register_hook(late.append) and None)
    (truth,) = hooked(net, x, "layers.0", lambda g: late[0] + g, "embed.output")
    handle.remove()
    assert torch.allclose(run(model, x), truth)


def test_a_written_gradient_that_needs_a_later_one_is_refused_with_both_lines(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[2].output
            loss = model.output.square().sum()
            with loss.backward():
                wanted = early.grad
                late.grad = wanted * 2
                g = model.embed.output.grad
        return g

    with pytest.raises(CompileError) as caught:
        run(model, x)
    (diagnostic,) = caught.value.diagnostics
    line = run.__wrapped__.__code__.co_firstlineno + 6 if hasattr(run, "__wrapped__") else None
    assert "arrives only later" in diagnostic.reason
    assert "retain_graph=True" in diagnostic.way_out
    ((span, note),) = diagnostic.related
    assert note == "this gradient arrives later"
    assert span.line == diagnostic.span.line - 1
    assert f"that of line {span.line}" in diagnostic.reason
    assert line is None or span.line == line


# --- what has no gradient ---


def test_a_loss_that_does_not_depend_on_the_value(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[2].output
            loss = model.layers[1].output.sum()
            with loss.backward():
                g = h.grad
        return g

    with pytest.raises(RunError) as caught:
        run(model, x)
    assert "does not depend on this value, so it has no gradient" in str(caught.value)
    assert "test_gradients.py:" in str(caught.value)


def test_grad_outside_of_a_backward_pass(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[2].output
            model.output.sum().backward()
            g = h.grad
        return g

    with pytest.raises(CompileError, match="exists only inside of a backward pass") as caught:
        run(model, x)
    assert "with loss.backward(): g = h.grad" in str(caught.value)

    @intervene
    def write(model, x):
        with model.trace(x):
            h = model.layers[2].output
            h.grad = 0
            out = model.output
        return out

    with pytest.raises(CompileError, match="exists only inside of a backward pass"):
        write(model, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_they_are_off(model, net, x, mode) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[2].output
            loss = model.output.sum()
            with loss.backward():
                g = h.grad
        return g

    with mode(), pytest.raises(RunError, match=f"is run under `torch.{mode.__name__}") as caught:
        run(model, x)
    assert "way out: call it outside" in str(caught.value)
    assert run(model, x).shape == x.shape


def test_integers_have_none(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            out = model.output
            best = out.argmax(-1)
            with out.sum().backward():
                g = best.grad
        return g

    with pytest.raises(RunError, match="only a tensor of real numbers has a gradient"):
        run(model, x)


def test_a_loss_without_a_gradient(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            with torch.no_grad():
                loss = model.output.sum()
            with loss.backward():
                g = model.layers[0].output.grad
        return g

    with pytest.raises(RunError, match="does not depend on this value, so it has no gradient"):
        run(model, x)


def test_a_write_in_place_that_breaks_the_pass_is_named(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            squared = h * h
            h[:] = 0
            loss = squared.sum() + model.output.sum()
            with loss.backward():
                g = model.embed.output.grad
        return g

    with pytest.raises(RunError, match="written over in place") as caught:
        run(model, x)
    assert "module.output = new" in str(caught.value)


# --- weights, and tensors of the user's ---


def test_weights_have_gradients_where_they_are_named(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            loss = model.output.square().sum()
            with loss.backward():
                g = model.layers[1].gate.weight.grad
                h = model.layers[0].output.grad
        return g, h

    g, _ = run(model, x)
    assert torch.equal(net.layers[1].gate.weight.grad, g)
    others = [p for name, p in net.named_parameters() if name != "layers.1.gate.weight"]
    assert all(p.grad is None for p in others)
    net.layers[1].gate.weight.grad = None
    squares(net(x)).backward()
    assert torch.allclose(g, net.layers[1].gate.weight.grad, rtol=1e-6, atol=1e-7)


def test_all_weights_count_with_grad_true(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x, grad=True):
            h = model.layers[1].output
            loss = model.output.square().sum()
            with loss.backward():
                g = h.grad
        return g

    g = run(model, x)
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    output, sites = plain(net, x, "layers.1.output")
    squares(output).backward()
    assert torch.equal(g, sites["layers.1.output"].grad)
    assert all(torch.equal(a, p.grad) for a, p in zip(found, net.parameters(), strict=True))


def test_a_frozen_model_has_gradients_of_its_values_and_stays_frozen(x) -> None:
    net = Net().eval().requires_grad_(False)
    model = NNsight(net)

    @intervene
    def run(model, x):
        with model.trace(x):
            a, b = model.layers[0].output, model.layers[2].up.input
            loss = model.output.square().sum()
            with loss.backward():
                found = a.grad, b.grad
        return found

    a, b = run(model, x)
    assert not any(p.requires_grad for p in net.parameters())
    net.requires_grad_(True)
    truth = expected(net, x, squares, "layers.0.output", "layers.2.up.input")
    assert torch.allclose(a, truth["layers.0.output"])
    assert torch.allclose(b, truth["layers.2.up.input"])
    assert not x.requires_grad


def test_a_tensor_of_the_users_accumulates_and_the_model_does_not(model, net, x) -> None:
    @intervene
    def run(model, x, vector):
        with model.trace(x):
            model.layers[0].output += vector
            loss = model.output.square().sum()
            loss.backward()
        return loss

    vector = torch.zeros(6, requires_grad=True)
    run(model, x, vector)
    once = vector.grad.clone()
    run(model, x, vector)
    assert torch.equal(vector.grad, once + once)
    assert untouched(net)

    probe = torch.zeros(6, requires_grad=True)
    handle = net.layers[0].register_forward_hook(lambda _, __, output: output + probe)
    (truth,) = torch.autograd.grad(squares(net(x)), [probe])
    handle.remove()
    assert torch.allclose(once, truth)


def test_a_backward_pass_of_the_users_own_after_the_call_leaves_the_model_alone(model, net, x) -> None:
    @intervene
    def run(model, x, vector):
        with model.trace(x):
            model.layers[0].output += vector
            out = model.output
        return out

    vector = torch.zeros(6, requires_grad=True)
    squares(run(model, x, vector)).backward()
    assert vector.grad is not None
    assert untouched(net)


def test_a_weight_that_the_program_uses_itself_accumulates_nothing(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
        logits = model.head(h) @ model.head.weight
        loss = logits.square().sum()
        with loss.backward():
            g = h.grad
        return g

    _, sites = plain(net, x, "layers.1.output")
    h = sites["layers.1.output"].detach().requires_grad_()
    (truth,) = torch.autograd.grad((net.head(h) @ net.head.weight).square().sum(), [h])
    assert torch.equal(run(model, x), truth)
    assert untouched(net)


# --- torch's functions ---


def test_torch_autograd_grad_in_the_body(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            hs = [layer.output for layer in model.layers]
            loss = model.output.square().sum()
            a, b = torch.autograd.grad(loss, [hs[0], hs[2]], retain_graph=True)
            (c,) = torch.autograd.grad(loss, hs[1][:, 0])
        return a, b, c

    truth = expected(net, x, squares, "layers.0.output", "layers.1.output", "layers.2.output")
    a, b, c = run(model, x)
    assert torch.equal(a, truth["layers.0.output"])
    assert torch.equal(b, truth["layers.2.output"])
    assert torch.equal(c, truth["layers.1.output"][:, 0])
    assert untouched(net)


def test_second_derivatives(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            loss = model.output.square().sum()
            (g,) = torch.autograd.grad(loss, h, create_graph=True)
            with g.square().sum().backward():
                second = h.grad
        return second

    output, sites = plain(net, x, "layers.1.output")
    h = sites["layers.1.output"]
    (g,) = torch.autograd.grad(squares(output), h, create_graph=True)
    (truth,) = torch.autograd.grad(g.square().sum(), h)
    assert torch.allclose(run(model, x), truth, rtol=1e-5)


def test_the_user_requires_a_gradient(model, net, x) -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            h.requires_grad_()
            out = model.output
        return h, out

    _, out = run(model, x)
    assert out.requires_grad
    squares(out).backward()
    assert untouched(net)


# --- experiments ---


def test_attribution_patching_is_what_torch_gives(model, net, x) -> None:
    @intervene
    def attribute(model, clean, corrupt):
        with model.trace(clean):
            clean_values = [layer.output for layer in model.layers]
        with model.trace(corrupt):
            values = [layer.output for layer in model.layers]
            metric = model.output[:, -1, 0].sum()
            with metric.backward():
                gradients = [h.grad for h in values]
        return [((c - h) * g).sum(-1) for c, h, g in zip(clean_values, values, gradients, strict=True)]

    other = torch.randn(2, 4, 6)
    sites = [f"layers.{i}.output" for i in range(3)]
    _, clean = plain(net, x, *sites)
    output, corrupt = plain(net, other, *sites)
    gradients = torch.autograd.grad(output[:, -1, 0].sum(), list(corrupt.values()))
    found = attribute(model, x, other)
    for name, score, gradient in zip(sites, found, gradients, strict=True):
        assert torch.allclose(score, ((clean[name] - corrupt[name]) * gradient).sum(-1), atol=1e-6)


def test_integrated_gradients_are_what_torch_gives(model, net, x) -> None:
    @intervene
    def integrate(model, x, steps):
        with model.trace(x):
            hidden = model.layers[0].output
        total = torch.zeros_like(hidden)
        for step in range(1, steps + 1):
            with model.trace(x):
                point = hidden.detach() * (step / steps)
                model.layers[0].output = point
                metric = model.output[:, -1, 0].sum()
                with metric.backward():
                    total = total + point.grad
        return hidden * total / steps

    _, sites = plain(net, x, "layers.0.output")
    hidden = sites["layers.0.output"].detach()
    total = torch.zeros_like(hidden)
    for step in range(1, 5):
        point = (hidden * (step / 4)).requires_grad_()
        handle = net.layers[0].register_forward_hook(lambda *_, point=point: point)
        total += torch.autograd.grad(net(x)[:, -1, 0].sum(), point)[0]
        handle.remove()
    assert torch.allclose(integrate(model, x, 4), hidden * total / 4, atol=1e-6)


class Lora(nn.Module):
    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.down(x))


def trained_by_torch(net: Net, x: torch.Tensor, target: torch.Tensor, rounds: int) -> tuple[list[float], Lora]:
    lora = Lora(6)
    optimizer = torch.optim.Adam(lora.parameters(), lr=0.05)
    losses = []
    for _ in range(rounds):
        handle = net.layers[1].register_forward_hook(lambda _, __, output: lora(output))
        loss = (net(x) - target).square().mean()
        handle.remove()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.zero_grad()
    return losses, lora


def test_training_with_the_optimizer_outside(model, net, x) -> None:
    target = torch.zeros(2, 4, 3)

    @intervene
    def run(model, x, target, lora):
        with model.trace(x):
            model.layers[1].output = lora(model.layers[1].output)
            loss = (model.output - target).square().mean()
        return loss

    truth, trained = trained_by_torch(net, x, target, 6)
    lora = Lora(6)
    optimizer = torch.optim.Adam(lora.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = run(model, x, target, lora)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == truth
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), trained.parameters(), strict=True))
    assert untouched(net)
    assert run.cache_info().misses == 1


def test_training_with_the_optimizer_inside(model, net, x) -> None:
    target = torch.zeros(2, 4, 3)

    @intervene
    def train(model, x, target, lora, optimizer, rounds):
        losses = []
        for _ in range(rounds):
            with model.trace(x):
                model.layers[1].output = lora(model.layers[1].output)
                loss = (model.output - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    truth, trained = trained_by_torch(net, x, target, 6)
    lora = Lora(6)
    losses = train(model, x, target, lora, torch.optim.Adam(lora.parameters(), lr=0.05), 6)
    assert losses == truth
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), trained.parameters(), strict=True))
    assert untouched(net)


def test_training_within_the_forward(model, net, x) -> None:
    target = torch.zeros(2, 4, 3)

    @intervene
    def train(model, x, target, lora, optimizer, rounds):
        losses = []
        for _ in range(rounds):
            with model.trace(x):
                model.layers[1].output = lora(model.layers[1].output)
                loss = (model.output - target).square().mean()
                optimizer.zero_grad()
                with loss.backward():
                    norm = lora.up.weight.grad.norm()
                optimizer.step()
                losses.append(loss.item())
        return losses, norm

    truth, trained = trained_by_torch(net, x, target, 6)
    lora = Lora(6)
    losses, norm = train(model, x, target, lora, torch.optim.Adam(lora.parameters(), lr=0.05), 6)
    assert losses == truth
    assert norm > 0
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), trained.parameters(), strict=True))


# --- invokes ---


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny")


PROMPTS = ("The Eiffel Tower is in", "The Space Needle is in the city of")


def alone(tiny: LanguageModel, prompt: str, site: str) -> torch.Tensor:
    """The gradient of the square of the last logits, for a prompt alone."""
    net = tiny._module
    ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
    found: list[torch.Tensor] = []
    handle = net.get_submodule(site).register_forward_hook(lambda _, __, o: found.append(o))
    logits = net(ids).logits
    handle.remove()
    return torch.autograd.grad(logits[0, -1].square().mean(), found)[0]


def test_the_gradients_of_invokes_are_those_of_their_rows_and_tokens(tiny) -> None:
    @intervene
    def run(model, first, second):
        with model.trace() as tracer:
            with tracer.invoke(first):
                h = model.layers[1].output
                loss = model.lm_head.output[0, -1].square().mean()
            with tracer.invoke(second):
                last = model.layers[0].output[:, -1]
                other = model.lm_head.output[0, -1].square().mean()
                with (loss + other).backward():
                    a, b = h.grad, last.grad
        return a, b

    a, b = run(tiny, *PROMPTS)
    assert torch.allclose(a, alone(tiny, PROMPTS[0], "transformer.h.1"), rtol=1e-3, atol=1e-4)
    assert torch.allclose(b, alone(tiny, PROMPTS[1], "transformer.h.0")[:, -1], rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in tiny._module.parameters())


def test_each_invoke_has_a_backward_pass_of_its_own_and_writes_its_rows_alone(tiny) -> None:
    @intervene
    def run(model, first, second):
        with model.trace() as tracer:
            with tracer.invoke(first):
                h, early = model.layers[1].output, model.layers[0].output
                loss = model.lm_head.output[0, -1].square().mean()
                with loss.backward(retain_graph=True):
                    h.grad *= 2
                    a = early.grad
            with tracer.invoke(second):
                early = model.layers[0].output
                loss = model.lm_head.output[0, -1].square().mean()
                with loss.backward():
                    b = early.grad
        return a, b

    a, b = run(tiny, *PROMPTS)
    assert torch.allclose(a, 2 * alone(tiny, PROMPTS[0], "transformer.h.0"), rtol=1e-3, atol=1e-4)
    assert torch.allclose(b, alone(tiny, PROMPTS[1], "transformer.h.0"), rtol=1e-3, atol=1e-4)


def test_a_second_backward_pass_of_one_forward_asks_for_the_graph_to_be_kept(model, x) -> None:
    @intervene
    def run(model, x):
        with model.trace() as tracer:
            with tracer.invoke(x), model.output.sum().backward():
                a = model.layers[0].output.grad
            with tracer.invoke(x), model.output.sum().backward():
                b = model.layers[0].output.grad
        return a, b

    with pytest.raises(RunError, match=r"test_gradients\.py:\d+:\d+: an earlier backward.*\n.*retain_graph=True"):
        run(model, x)


# --- what is left behind ---


def test_the_graph_is_freed_after_the_run(model, net, x) -> None:
    graphs: list[weakref.ref[Any]] = []

    @intervene
    def run(model, x, watch):
        with model.trace(x):
            h = model.layers[0].output
            loss = model.output.square().sum()
            watch(loss)
            with loss.backward():
                g = h.grad
        return g

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            g = run(model, x, lambda loss: graphs.append(weakref.ref(loss)))
        assert not g.requires_grad
        assert not any(graph() is not None for graph in graphs)
    finally:
        gc.enable()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert untouched(net)


def test_bfloat16(x) -> None:
    net = Net().eval().to(torch.bfloat16)
    model, x = NNsight(net), x.to(torch.bfloat16)

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            loss = model.output.float().square().sum()
            with loss.backward():
                h.grad *= 2.0
                g = model.embed.output.grad
        return g

    (truth,) = hooked(net, x, "layers.0", lambda g: g * 2.0, "embed.output")
    found = run(model, x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), truth.float(), rtol=0.05, atol=0.05)


class LowRank(nn.Module):
    """What is put in the place of a linear layer, to be trained while the layer stays as it is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> Net:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    net.layers[1].up = LowRank(net.layers[1].up)
    return net


@pytest.mark.parametrize("inside", [True, False])
def test_adapters_inside_of_a_frozen_model_are_trained(inside: bool) -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    plain, net = adapted(), adapted()
    (plain(x) * 2).square().sum().backward()
    model = NNsight(net)

    @intervene
    def loss_of(model: Any, x: torch.Tensor) -> Any:
        with model.trace(x):
            loss = (model.output * 2).square().sum()
            h = model.layers[2].output
            with loss.backward(retain_graph=True):
                gradient = h.grad
        return loss, gradient

    if inside:
        loss_of(model, x)
    else:
        with model.trace(x):
            out = (model.output * 2).save()
        out.square().sum().backward()
    trained = {"layers.1.up.down.weight", "layers.1.up.up.weight"}
    for name, parameter in net.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert (wanted is not None) == (parameter.grad is not None) == (name in trained)
        assert wanted is None or torch.allclose(parameter.grad, wanted, rtol=1e-5, atol=1e-7)


def test_a_model_with_few_frozen_weights_has_no_adapters() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    net.embed.weight.requires_grad_(False)
    model = NNsight(net)
    with model.trace(torch.ones(2, 6)):
        out = model.output.save()
    assert not out.requires_grad
