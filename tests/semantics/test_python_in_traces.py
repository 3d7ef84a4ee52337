"""Python stays Python in a trace. The oracle: the same Python on tensors that hooks written by hand collected."""

import contextlib
import dataclasses
import math
import random

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, NNsight, intervene

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


torch.manual_seed(0)
NET = Net().eval()
X = torch.randn(3, 4)
model = NNsight(NET)


def outputs(writes=None, x=X):
    """Every layer's output and the result, with writes to some."""
    seen, handles = {}, []
    for number, part in enumerate(NET.layers):

        def hook(part, args, out, number=number):
            if writes and number in writes:
                out = writes[number](out.clone())
            seen[number] = out.detach().clone()
            return out

        handles.append(part.register_forward_hook(hook))
    with torch.no_grad():
        seen["result"] = NET(x)
    for handle in handles:
        handle.remove()
    return seen


PLAIN = outputs()


# --- control flow on values of the model ---


def test_if_on_a_value():
    @intervene
    def run(model, x, bound):
        with model.trace(x):
            h = model.layers[1].output
            if h.norm() > bound:
                model.layers[2].output = 0
                label = "big"
            else:
                label = "small"
            result = model.output
        return label, result

    norm = PLAIN[1].norm().item()
    assert run(model, X, norm + 1)[0] == "small"
    assert torch.equal(run(model, X, norm + 1)[1], PLAIN["result"])
    assert run(model, X, norm - 1)[0] == "big"
    assert torch.equal(run(model, X, norm - 1)[1], outputs({2: torch.zero_})["result"])


def test_if_elif_else_and_conditional_expressions():
    @intervene
    def run(model, x, low, high):
        with model.trace(x):
            norm = model.layers[1].output.norm().item()
            if norm < low:
                scale = 0.5
            elif norm < high:
                scale = 2.0
            else:
                scale = 3.0
            model.layers[2].output *= scale
            sign = "more" if norm > 1 and not norm < 0.5 else "less"
            result = model.output
        return scale, sign, result

    norm = PLAIN[1].norm().item()
    for low, high, scale in ((norm + 1, norm + 2, 0.5), (norm - 1, norm + 1, 2.0), (norm - 2, norm - 1, 3.0)):
        found = run(model, X, low, high)
        assert found[0] == scale
        assert found[1] == ("more" if norm > 1 else "less")
        assert torch.equal(found[2], outputs({2: lambda out, s=scale: out * s})["result"])


def test_while_on_a_value():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            rounds = 0
            while h.norm() > 0.1:
                h = h / 2
                rounds += 1
            model.layers[1].output = h
            result = model.output
        return rounds, result

    h, rounds = PLAIN[0], 0
    while h.norm() > 0.1:
        h, rounds = h / 2, rounds + 1
    found, result = run(model, X)
    assert found == rounds
    assert torch.equal(result, outputs({1: lambda out: h})["result"])


def test_for_over_rows_of_a_value():
    @intervene
    def run(model, x):
        norms = []
        with model.trace(x):
            h = model.layers[0].output
            for number, row in enumerate(h):
                if number == 1:
                    continue
                norms.append(row.norm().item())
            for position in range(h.shape[1]):
                h[:, position] *= position
            result = model.output
        return norms, result

    norms, result = run(model, X)
    assert norms == [PLAIN[0][n].norm().item() for n in (0, 2)]
    assert torch.equal(result, outputs({0: lambda out: out * torch.arange(4)})["result"])


def test_loops_over_layers_with_continue_and_break():
    @intervene
    def run(model, x, skip, last):
        states = {}
        with model.trace(x):
            for number, layer in enumerate(model.layers):
                if number == skip:
                    continue
                if number > last:
                    break
                states[number] = layer.output
            else:
                states["all"] = True
        return states

    for skip, last, keys in ((1, 2, [0, 2]), (9, 9, [0, 1, 2, 3, "all"]), (0, 0, [])):
        states = run(model, X, skip, last)
        assert list(states) == keys
        assert all(torch.equal(states[key], PLAIN[key]) for key in keys if key != "all")


def test_layers_zipped_sliced_and_reversed():
    @intervene
    def run(model, x, scales):
        with model.trace(x):
            for layer, scale in zip(model.layers[1:3], scales, strict=True):
                layer.output = layer.output * scale
            last = [layer.output.sum() for layer in reversed(model.layers)]
            result = model.output
        return last, result

    want = outputs({1: lambda out: out * 2.0, 2: lambda out: out * 3.0})
    last, result = run(model, X, [2.0, 3.0])
    assert torch.equal(result, want["result"])
    for number in range(4):
        assert torch.equal(last[3 - number], want[number].sum())


# --- functions, closures, containers ---


def scale_by(h, factor=2.0):
    """A helper of the module."""
    return h * factor


def ablate(model, layer):
    model.layers[layer].output = 0


def recursive(h, depth):
    return h if depth == 0 else recursive(h + 1, depth - 1)


def test_helpers():
    @intervene
    def run(model, x):
        def local(h):
            return scale_by(h, factor=3.0) + offset

        with model.trace(x):
            offset = model.layers[0].output.mean()
            model.layers[1].output = local(model.layers[1].output)
            ablate(model, 2)
            deep = recursive(model.layers[1].output, 3)
            result = model.output
        return deep, result

    offset = PLAIN[0].mean()
    want = outputs({1: lambda out: out * 3.0 + offset, 2: torch.zero_})
    deep, result = run(model, X)
    assert torch.equal(result, want["result"])
    assert torch.equal(deep, want[1] + 1 + 1 + 1)


def test_lambdas_comprehensions_and_builtins():
    @intervene
    def run(model, x):
        with model.trace(x):
            double = lambda h: h * 2  # noqa: E731
            norms = [double(layer.output).norm().item() for layer in model.layers]
            best = max(range(4), key=lambda n: norms[n])
            pairs = sorted(((norm, n) for n, norm in enumerate(norms)), reverse=True)
            total = sum(norms)
            some = any(norm > 1 for norm in norms)
            text = f"{best}: {norms[0]:.2f} {total!r:>5}"
        return norms, best, pairs, total, some, text

    norms = [(PLAIN[n] * 2).norm().item() for n in range(4)]
    best = max(range(4), key=lambda n: norms[n])
    assert run(model, X) == (
        norms,
        best,
        sorted(((norm, n) for n, norm in enumerate(norms)), reverse=True),
        sum(norms),
        any(norm > 1 for norm in norms),
        f"{best}: {norms[0]:.2f} {sum(norms)!r:>5}",
    )


def test_unpacking_walrus_star_and_augmented_assignment():
    @intervene
    def run(model, x):
        with model.trace(x):
            first, *rest = model.layers[0].output
            (a, b), c = (first, rest[0]), rest[1]
            if (total := a.sum().item()) > 1000:
                total = 0
            items = [a, *rest]
            items[0] = items[0] + 1
            count = 0
            count += len(items)
            mapping = {**{"a": a}, "b": b}
        return a, b, c, total, items, count, mapping

    a, b, c, total, items, count, mapping = run(model, X)
    h = PLAIN[0]
    assert torch.equal(torch.stack([a, b, c]), h)
    assert total == h[0].sum().item()
    assert torch.equal(items[0], h[0] + 1)
    assert count == 3
    assert torch.equal(mapping["b"], h[1])


def test_user_classes():
    @dataclasses.dataclass
    class Stats:
        mean: float
        std: float

        def z(self, h):
            return (h - self.mean) / self.std

    class Recorder:
        def __init__(self):
            self.seen = []

        def note(self, h):
            self.seen.append(h.clone())
            return len(self.seen)

    recorder = Recorder()

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            stats = Stats(h.mean().item(), h.std().item())
            model.layers[0].output = stats.z(h)
            recorder.note(model.layers[2].output)
            count = recorder.note(model.layers[3].output)
            result = model.output
        return stats, count, result

    stats, count, result = run(model, X)
    h = PLAIN[0]
    mean, std = h.mean().item(), h.std().item()
    assert (stats.mean, stats.std) == (mean, std)
    want = outputs({0: lambda out: (out - mean) / std})
    assert torch.equal(result, want["result"])
    assert count == 2
    assert torch.equal(recorder.seen[0], want[2])
    assert torch.equal(recorder.seen[1], want[3])


def test_libraries():
    numpy = pytest.importorskip("numpy")

    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            array = numpy.asarray(h)
            _u, s, _ = torch.linalg.svd(h)
            back = torch.from_numpy(numpy.tanh(array))
            model.layers[0].output = back
            number = math.sqrt(abs(h.sum().item()))
            result = model.output
        return s, number, result

    s, number, result = run(model, X)
    h = PLAIN[0]
    assert torch.equal(s, torch.linalg.svd(h)[1])
    assert number == math.sqrt(abs(h.sum().item()))
    assert torch.equal(result, outputs({0: lambda out: torch.from_numpy(numpy.tanh(out.numpy()))})["result"])


def test_einsum_topk_functional_and_torch_functions():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            gram = torch.einsum("ab,cb->ac", h, h)
            values, indices = h.topk(2, dim=-1)
            probs = nn.functional.softmax(model.output, dim=-1)
            token = probs.argmax(-1)
            picked = probs[torch.arange(3), token]
            masked = torch.where(h > 0, h, torch.zeros_like(h))
        return gram, values, indices, picked, masked

    h = PLAIN[1]
    probs = nn.functional.softmax(PLAIN["result"], dim=-1)
    gram, values, indices, picked, masked = run(model, X)
    assert torch.equal(gram, torch.einsum("ab,cb->ac", h, h))
    assert torch.equal(values, h.topk(2, dim=-1).values)
    assert torch.equal(indices, h.topk(2, dim=-1).indices)
    assert torch.equal(picked, probs.max(-1).values)
    assert torch.equal(masked, h.relu())


# --- effects ---


def test_prints_keep_their_order(capsys):
    @intervene
    def run(model, x):
        print("before")
        with model.trace(x):
            print("first", model.layers[0].output.shape)
            print("second", f"{model.layers[2].output.sum():.4f}")
            print("third", model.layers[1].output.sum().item())
            h = model.layers[3].output
        print("after")
        return h

    run(model, X)
    assert capsys.readouterr().out.splitlines() == [
        "before",
        f"first {PLAIN[0].shape}",
        f"second {PLAIN[2].sum():.4f}",
        f"third {PLAIN[1].sum().item()}",
        "after",
    ]


def test_effects_happen_once_and_nothing_at_compile_time():
    log = []

    def note(what):
        log.append(what)
        return what

    @intervene
    def run(model, x):
        note("start")
        with model.trace(x):
            note("in")
            h = model.layers[note(1)].output if False else model.layers[1].output
            note(h.shape)
        note("end")
        return h

    run.lower(model, X)
    run.compile(model, X)
    assert log == []
    run(model, X)
    assert log == ["start", "in", PLAIN[1].shape, "end"]
    run(model, X)
    assert len(log) == 8


def test_a_layer_from_an_unknown_call_in_the_body():
    choose = {0: 2}.get

    @intervene
    def run(model, x):
        with model.trace(x):
            layer = choose(0)
            h = model.layers[layer].output
        return h

    assert torch.equal(run(model, X), PLAIN[2])


def test_a_layer_from_an_unknown_call_on_a_value_of_the_forward_is_refused():
    choose = {0: 2}.get

    @intervene
    def run(model, x):
        with model.trace(x):
            layer = choose(int(model.layers[0].output.sum() * 0))
            h = model.layers[layer].output
        return h

    with pytest.raises(
        CompileError, match=r"test_python_in_traces\.py:\d+:\d+: [\s\S]*only a run can give[\s\S]*way out"
    ):
        run(model, X)


def test_random_numbers_in_the_body():
    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[1].output += torch.randn(4)
            chosen = random.random()
            result = model.output
        return chosen, result

    run.compile(model, X)
    torch.manual_seed(7)
    random.seed(7)
    chosen, result = run(model, X)
    torch.manual_seed(7)
    random.seed(7)
    noise = torch.randn(4)
    assert chosen == random.random()
    assert torch.equal(result, outputs({1: lambda out: out + noise})["result"])


def test_random_order_is_the_order_of_execution():
    @intervene
    def run(model, x):
        with model.trace(x):
            first = torch.rand(1)
            model.layers[0].output = model.layers[0].output + torch.rand(1)
            model.layers[1].output = model.layers[1].output + torch.rand(1)
            result = model.output
        return first, result

    run.compile(model, X)
    torch.manual_seed(7)
    first, result = run(model, X)
    torch.manual_seed(7)
    draws = [torch.rand(1) for _ in range(3)]
    assert torch.equal(first, draws[0])
    want = outputs({0: lambda out: out + draws[1], 1: lambda out: out + draws[2]})["result"]
    assert torch.equal(result, want)


# --- contexts and exceptions ---


def test_try_in_a_trace_is_refused_and_works_in_a_helper():
    log = []

    @intervene
    def refused(model, x):
        with model.trace(x):
            try:
                h = model.layers[1].output
            except IndexError:
                h = 0
        return h

    with pytest.raises(CompileError, match=r"test_python_in_traces\.py:\d+:\d+: try/except[\s\S]*way out: .*helper"):
        refused(model, X)

    def pick(h, position):
        try:
            picked = h[:, position]
        except IndexError:
            picked = h[:, 0]
            log.append("caught")
        else:
            log.append("else")
        finally:
            log.append("finally")
        return picked

    @intervene
    def run(model, x, position):
        with model.trace(x):
            picked = pick(model.layers[1].output, position)
            result = model.output
        return picked, result

    assert torch.equal(run(model, X, 2)[0], PLAIN[1][:, 2])
    assert torch.equal(run(model, X, 99)[0], PLAIN[1][:, 0])
    assert torch.equal(run(model, X, 99)[1], PLAIN["result"])
    assert log == ["else", "finally", "caught", "finally", "caught", "finally"]


def test_raise_and_assert():
    @intervene
    def run(model, x, bound):
        with model.trace(x):
            h = model.layers[1].output
            assert h.shape[0] == 3, "three rows"
            if h.norm() > bound:
                raise ValueError(f"too big: {bound}")
            result = model.output
        return result

    assert torch.equal(run(model, X, 1e9), PLAIN["result"])
    with pytest.raises(ValueError, match="too big: 0"):
        run(model, X, 0)
    with pytest.raises(AssertionError, match="three rows"):
        run(model, X[:2], 0)


def test_a_context_manager_around_ops_of_one_site():
    log = []

    @contextlib.contextmanager
    def noted():
        log.append("in")
        yield 5
        log.append("out")

    @intervene
    def run(model, x):
        with model.trace(x):
            with noted() as five:
                h = model.layers[1].output * five
            result = model.output
        return h, result

    h, result = run(model, X)
    assert torch.equal(h, PLAIN[1] * 5)
    assert torch.equal(result, PLAIN["result"])
    assert log == ["in", "out"]


def test_a_context_manager_around_ops_of_several_sites_is_refused():
    log = []

    @contextlib.contextmanager
    def noted():
        log.append("in")
        yield 5
        log.append("out")

    @intervene
    def run(model, x):
        with model.trace(x):
            with noted() as five:
                a = model.layers[1].output * five
                b = model.layers[2].output * five
            result = model.output
        return a, b, result

    with pytest.raises(CompileError, match=r"test_python_in_traces\.py:\d+:\d+: this context[\s\S]*way out"):
        run(model, X)
    assert log == []


def test_no_grad_around_ops_of_several_sites():
    @intervene
    def run(model, x):
        with model.trace(x):
            with torch.no_grad():
                a = model.layers[1].output * 2
                b = model.layers[2].output * 2
            result = model.output
        return a, b, result

    a, b, result = run(model, X)
    assert torch.equal(a, PLAIN[1] * 2)
    assert torch.equal(b, PLAIN[2] * 2)
    assert torch.equal(result, PLAIN["result"])


# --- several forwards ---


def test_a_loop_over_inputs():
    @intervene
    def run(model, inputs):
        states = []
        for x in inputs:
            with model.trace(x):
                states.append(model.layers[1].output)
        return states, len(states)

    inputs = [X, X * 2, X[:1]]
    states, count = run(model, inputs)
    assert count == 3
    for x, h in zip(inputs, states, strict=True):
        assert torch.equal(h, outputs(x=x)[1])


def test_a_sweep_over_layers_and_scales():
    @intervene
    def sweep(model, x, scales):
        results = torch.zeros(len(model.layers), len(scales))
        for layer in range(len(model.layers)):
            for number, scale in enumerate(scales):
                with model.trace(x):
                    model.layers[layer].output *= scale
                    results[layer, number] = model.output.sum()
        return results

    scales = [0.0, 1.0, 2.5]
    found = sweep(model, X, scales)
    for layer in range(4):
        for number, scale in enumerate(scales):
            want = outputs({layer: lambda out, s=scale: out * s})["result"].sum()
            assert torch.equal(found[layer, number], want)


def test_a_loop_that_ends_on_a_value_of_a_forward():
    @intervene
    def run(model, x):
        scale = 1.0
        rounds = 0
        while True:
            with model.trace(x):
                model.layers[1].output *= scale
                norm = model.layers[1].output.norm()
            rounds += 1
            if norm < 0.5:
                break
            scale = scale / 2
        return rounds, norm

    rounds, scale = 0, 1.0
    while True:
        norm = outputs({1: lambda out, s=scale: out * s})[1].norm()
        rounds += 1
        if norm < 0.5:
            break
        scale /= 2
    found, last = run(model, X)
    assert found == rounds
    assert torch.equal(last, norm)


def test_early_return_between_forwards():
    @intervene
    def run(model, x, bound):
        with model.trace(x):
            h = model.layers[0].output
        if h.norm() < bound:
            return "small"
        with model.trace(x):
            model.layers[0].output = h * 0
            result = model.output
        return result

    assert run(model, X, 1e9) == "small"
    assert torch.equal(run(model, X, 0), outputs({0: torch.zero_})["result"])


def test_reads_in_any_order():
    @intervene
    def run(model, x):
        with model.trace(x):
            result = model.output
            late = model.layers[3].output
            early = model.layers[0].output
            model.layers[2].output = early
        return result, late, early

    want = outputs({2: lambda out: PLAIN[0]})
    result, late, early = run(model, X)
    assert torch.equal(result, want["result"])
    assert torch.equal(late, want[3])
    assert torch.equal(early, PLAIN[0])


def test_the_models_attributes_and_weights():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
            own = h @ model.head.weight.T + model.head.bias
            count = len(model.layers)
            size = model.layers[0].in_features
        return own, count, size

    own, count, size = run(model, X)
    with torch.no_grad():
        assert torch.equal(own, PLAIN[1] @ NET.head.weight.T + NET.head.bias)
    assert (count, size) == (4, 4)


def test_numbers_that_are_constant_do_not_leak_between_calls():
    @intervene
    def run(model, x, position):
        states = {}
        with model.trace(x):
            states[position] = model.layers[0].output[:, position]
        return states

    for position in (0, 3, -1):
        states = run(model, X, position)
        assert list(states) == [position]
        torch.testing.assert_close(states[position], PLAIN[0][:, position])
