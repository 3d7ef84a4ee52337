"""What leaves a trace, and with which value. The oracle: the same code as torch hooks written by hand."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn

from nnsight_compiler import NNsight, intervene, save

torch.set_num_threads(1)
Both = namedtuple("Both", ["first", "second"])


@dataclasses.dataclass
class Record:
    h: torch.Tensor
    name: str = "none"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        return x


torch.manual_seed(0)
NET = Net().eval()
X = torch.randn(3, 4)
model = NNsight(NET)


def output(layer, x=X, writes=None):
    """What a layer returned, before anything writes to it; and the result, with `writes` to some layers."""
    seen, handles = {}, []
    for number, part in enumerate(NET.layers):

        def hook(part, args, out, number=number):
            if writes and number in writes:
                out = writes[number](out.clone())
            seen[number] = out.detach().clone()
            return out

        handles.append(part.register_forward_hook(hook))
    with torch.no_grad():
        result = NET(x)
    for handle in handles:
        handle.remove()
    return seen[layer], result


def test_what_is_returned_leaves():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            doubled = h * 2
        return h, doubled

    h, doubled = run(model, X)
    assert torch.equal(h, output(0)[0])
    assert torch.equal(doubled, output(0)[0] * 2)


def test_what_is_used_after_the_trace_leaves():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[1].output
        total = h.sum() + 1
        with model.trace(x * 2):
            other = model.layers[1].output
        return total, (h - other).abs().max()

    total, difference = run(model, X)
    assert torch.equal(total, output(1)[0].sum() + 1)
    assert torch.equal(difference, (output(1)[0] - output(1, X * 2)[0]).abs().max())


def test_the_models_own_in_place_write_changes_nothing_that_left():
    @intervene
    def run(model, x):
        with model.trace(x):
            before = model.layers[0].output
            after = model.relu.calls[0].output
            result = model.output
        return before, after, result

    before, after, result = run(model, X)
    want, plain = output(0)
    assert (want < 0).any()
    assert torch.equal(before, want)
    assert torch.equal(after, want.relu())
    assert torch.equal(result, plain)


def test_a_value_leaves_as_it_is_after_the_last_access():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            h[:, 0] = 9
            result = model.output
        return h, result

    def write(out):
        out[:, 0] = 9
        return out

    want, plain = output(0, writes={0: write})
    h, result = run(model, X)
    assert torch.equal(h, want)
    assert torch.equal(result, plain)


def test_save_fixes_the_value_at_its_line():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            before = h.save()
            h[:, 0] = 9
            between = save(h)
            h[:] = 0
            result = model.output
        return before, between, h, result

    def first(out):
        out[:, 0] = 9
        return out

    before, between, h, result = run(model, X)
    assert torch.equal(before, output(0)[0])
    assert torch.equal(between, output(0, writes={0: first})[0])
    assert torch.equal(h, torch.zeros_like(h))
    assert torch.equal(result, output(0, writes={0: torch.zero_})[1])


def test_views_leave_with_later_writes_and_saved_views_without():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            view = h[:, 1:3]
            kept = h[:, 1:3].save()
            h[:] = 5
            result = model.output
        return view, kept, result

    view, kept, result = run(model, X)
    assert torch.equal(view, torch.full((3, 2), 5.0))
    assert torch.equal(kept, output(0)[0][:, 1:3])
    assert torch.equal(result, output(0, writes={0: lambda out: out.fill_(5)})[1])


def test_a_saved_slice_does_not_keep_its_base():
    @intervene
    def run(model, x):
        with model.trace(x):
            part = model.layers[0].output[:1].save()
        return part

    assert run(model, X).untyped_storage().nbytes() == 4 * 4


def test_a_write_after_the_trace_does_not_touch_the_save():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            kept = h.save()
        h += 1
        return h, kept

    h, kept = run(model, X)
    assert torch.equal(kept, output(0)[0])
    assert torch.equal(h, output(0)[0] + 1)


def test_results_are_fresh_at_each_call():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[2].output
            result = model.output
        return h, result

    first, _ = run(model, X)
    first.zero_()
    second, result = run(model, X)
    result.zero_()
    assert torch.equal(second, output(2)[0])
    assert torch.equal(run(model, X)[1], NET(X))


def test_an_input_of_the_model_is_not_shared():
    @intervene
    def run(model, x):
        with model.trace(x):
            given = model.layers[0].input
            kept = model.layers[0].input.save()
        return given, kept

    x = X.clone()
    _, kept = run(model, x)
    kept.zero_()
    assert torch.equal(x, X)


def test_a_save_that_nothing_uses_changes_nothing():
    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[0].output.save()
            unused = model.layers[1].output.sum().save()  # noqa: F841
            h = model.layers[0].output
        return h

    assert torch.equal(run(model, X), output(0)[0])
    assert "sum" not in run.compile(model, X).source


def test_every_kind_of_value():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            number = h.sum().item()
            shape = h.shape
            pair = (h, number)
            named = {"h": h, "deep": [h, {"deeper": (h * 2,)}]}
            both = Both(h, h + 1)
            record = Record(h, name="first")
            text = f"{number:.4f}"
            boolean = bool((h > 0).any())
            array = h.tolist()
            nothing = None
            module_list = len(model.layers)
        return number, shape, pair, named, both, record, text, boolean, array, nothing, module_list

    want = output(0)[0]
    number, shape, pair, named, both, record, text, boolean, array, nothing, count = run(model, X)
    assert number == want.sum().item()
    assert shape == want.shape
    assert torch.equal(pair[0], want)
    assert pair[1] == number
    assert torch.equal(named["h"], want)
    assert torch.equal(named["deep"][0], want)
    assert torch.equal(named["deep"][1]["deeper"][0], want * 2)
    assert type(both) is Both
    assert torch.equal(both.second, want + 1)
    assert type(record) is Record
    assert torch.equal(record.h, want)
    assert record.name == "first"
    assert (text, boolean, array, nothing, count) == (f"{number:.4f}", True, want.tolist(), None, 3)


def test_containers_hold_values_as_when_put_in():
    @intervene
    def run(model, x):
        with model.trace(x):
            acts = list().save()
            h = model.layers[0].output
            acts.append(h)
            h[:] = 0
            acts.append(h.sum())
            result = model.output
        return acts, result

    acts, result = run(model, X)
    assert torch.equal(acts[0], output(0)[0])
    assert acts[1] == 0
    assert torch.equal(result, output(0, writes={0: torch.zero_})[1])


def test_a_list_made_outside_of_the_trace_in_the_function():
    @intervene
    def run(model, x):
        acts = []
        named = {}
        with model.trace(x):
            for number, layer in enumerate(model.layers):
                acts.append(layer.output)
                named[f"layer {number}"] = layer.output[0]
        return acts, named

    acts, named = run(model, X)
    for number in range(3):
        want = output(number)[0]
        assert torch.equal(acts[number], want)
        assert torch.equal(named[f"layer {number}"], want[0])


def test_a_list_comprehension_over_the_layers():
    @intervene
    def run(model, x):
        with model.trace(x):
            acts = [layer.output for layer in model.layers]
            norms = {n: layer.output.norm() for n, layer in enumerate(model.layers)}
        return acts, norms, torch.stack(acts)

    acts, norms, stacked = run(model, X)
    for number in range(3):
        assert torch.equal(acts[number], output(number)[0])
        assert torch.equal(norms[number], output(number)[0].norm())
        assert torch.equal(stacked[number], output(number)[0])


def test_a_list_given_by_the_caller():
    @intervene
    def run(model, x, acts):
        with model.trace(x):
            h = model.layers[0].output
            acts.append(h)
            h[:] = 0
            result = model.output
        return result

    acts = []
    result = run(model, X, acts)
    assert torch.equal(acts[0], output(0)[0])
    assert torch.equal(result, output(0, writes={0: torch.zero_})[1])


def test_the_models_in_place_write_and_a_list_given_by_the_caller():
    @intervene
    def run(model, x, acts, box):
        with model.trace(x):
            acts.append(model.layers[0].output)
            acts.extend([model.layers[1].output])
            acts += [model.layers[2].output]
            box.h = model.layers[0].output

    class Box:
        pass

    acts, box = [], Box()
    run(model, X, acts, box)
    for number in range(3):
        assert torch.equal(acts[number], output(number)[0]), number
    assert torch.equal(box.h, output(0)[0])


def test_a_dictionary_given_by_the_caller():
    @intervene
    def run(model, x, box):
        with model.trace(x):
            box["first"] = model.layers[0].output
            box.update(second=model.layers[1].output)
            box.setdefault("third", model.layers[2].output)
            box["inside"] = {"list": [model.layers[0].output]}

    box = {}
    run(model, X, box)
    assert torch.equal(box["first"], output(0)[0])
    assert torch.equal(box["second"], output(1)[0])
    assert torch.equal(box["third"], output(2)[0])
    assert torch.equal(box["inside"]["list"][0], output(0)[0])


def test_early_return_inside_a_trace_ends_the_body():
    @intervene
    def run(model, x):
        with model.trace(x):
            h = model.layers[0].output
            return h * 2

    assert torch.equal(run(model, X), output(0)[0] * 2)


def test_return_in_a_trace_under_a_known_condition():
    @intervene
    def run(model, x, early):
        with model.trace(x):
            h = model.layers[0].output
            if early:
                return h
            model.layers[0].output = 0
            result = model.output
        return result

    assert torch.equal(run(model, X, True), output(0)[0])
    assert torch.equal(run(model, X, False), output(0, writes={0: torch.zero_})[1])


def test_a_value_only_bound_under_a_condition():
    @intervene
    def run(model, x, bind):
        with model.trace(x):
            if bind:
                h = model.layers[0].output
            result = model.output
        if bind:
            return h
        return result

    assert torch.equal(run(model, X, True), output(0)[0])
    assert torch.equal(run(model, X, False), NET(X))


def test_an_unbound_variable_raises_as_in_python():
    @intervene
    def run(model, x, bind):
        with model.trace(x):
            if bind:
                h = model.layers[0].output
        return h

    assert torch.equal(run(model, X, True), output(0)[0])
    with pytest.raises(UnboundLocalError, match="'h'"):
        run(model, X, False)


def test_a_module_leaves_a_block():
    with model.trace(X):
        layer = model.layers[1]
        h = layer.output.save()
    assert torch.equal(h, output(1)[0])
    assert torch.equal(layer.weight, NET.layers[1].weight)
    with model.trace(X):
        again = layer.output.save()
    assert torch.equal(again, h)


def test_a_loop_variable_that_is_a_module_leaves_a_block():
    with model.trace(X):
        states = list().save()
        for layer in model.layers:
            states.append(layer.output)
    assert torch.equal(layer.weight, NET.layers[2].weight)
    assert len(states) == 3
