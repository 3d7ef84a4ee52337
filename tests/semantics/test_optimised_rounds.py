"""Programs made to break merged and shared forwards: each gives what it gives where nothing is optimised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sweeps import WIDTH, Net, differences, outcome
from torch import nn

from nnsight_compiler import NNsight, intervene


@pytest.fixture(scope="module")
def model() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    made = NNsight(Net().eval())
    with made.trace(inputs()[0]):  # so that the model was seen to run, for loops whose inputs only the run knows
        made.head.output.save()
    return made


def inputs(count: int = 3, tokens: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(count)]


def agree(experiment: Any, *arguments: Callable[[], Any]) -> list[Any]:
    """Runs it optimised and not, each on arguments of its own, twice. Gives the remarks, and asserts that results,
    errors and what became of the arguments are equal."""
    plain = experiment.with_options(without="all")
    for _ in range(2):
        mine, theirs = ([make() for make in arguments] for _ in range(2))
        found, wanted = outcome(lambda: experiment(*mine)), outcome(lambda: plain(*theirs))  # noqa: B023
        assert found.error == wanted.error
        assert found.log == wanted.log
        assert not list(differences(found.result, wanted.result))
        for one, other in zip(mine[1:], theirs[1:], strict=True):
            assert not list(differences(one, other, "argument"))
    return list(experiment.compile(*(make() for make in arguments)).remarks)


def fired(remarks: list[Any], name: str) -> bool:
    return any(remark.optimisation == name and remark.fired for remark in remarks)


def reasons(remarks: list[Any], name: str) -> list[str]:
    return [remark.what for remark in remarks if remark.optimisation == name and not remark.fired]


# --- what a loop goes over ---


@intervene
def worklist(model, todo):
    found = []
    for x in todo:
        with model.trace(x):
            out = model.head.output[0, -1, 0].item()
        found.append(out)
        if len(todo) < 5:
            todo.append(x * 2)
    return found


def test_a_loop_over_a_list_that_its_rounds_append_to(model: NNsight) -> None:
    remarks = agree(worklist, lambda: model, inputs)
    assert len(worklist(model, inputs())) == 5
    assert not fired(remarks, "merge_forwards")


class Countdown:
    """An iterable whose items depend on what was done with the last one."""

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def __iter__(self) -> Iterator[torch.Tensor]:
        for x in inputs():
            print("next, with", len(self.seen))
            yield x + len(self.seen)


@intervene
def over(model, items, seen):
    for x in items:
        with model.trace(x):
            out = model.head.output[0, -1, 0].item()
        seen.append(out)
    return len(seen)


@intervene
def over_pairs(model, items, seen):
    for number, x in enumerate(items):
        with model.trace(x):
            out = model.head.output[0, -1, 0].item()
        seen.append(out + number)
    return len(seen)


@pytest.mark.parametrize("experiment", [over, over_pairs])
@pytest.mark.parametrize("make", [lambda seen: Countdown(seen), lambda seen: map(lambda x: x + len(seen), inputs())])
def test_items_that_are_made_as_the_loop_asks_for_them(model: NNsight, experiment: Any, make: Any) -> None:
    results = []
    for each in (experiment, experiment.with_options(without="all")):
        seen: list[float] = []
        each(model, make(seen), seen)
        results.append(seen)
    assert not list(differences(*results))


@intervene
def changing_what_comes_next(model, xs):
    found = []
    for number in range(3):
        with model.trace(xs[number]):
            out = model.head.output[0, -1]
        xs[2] *= 2
        found.append(out)
    return found


@intervene
def changing_the_input(model, xs):
    x, found = xs[0].clone(), []
    for _ in range(3):
        with model.trace(x):
            out = model.head.output[0, -1]
        x *= 0.5
        found.append(out)
    return found


@intervene
def changing_an_item(model, xs):
    items, found = [x.clone() for x in xs], []
    for x in items:
        with model.trace(x):
            out = model.head.output[0, -1]
        items[2] += 1
        found.append(out)
    return found


@pytest.mark.parametrize("experiment", [changing_what_comes_next, changing_the_input, changing_an_item])
def test_a_round_changes_what_a_later_forward_is_given(model: NNsight, experiment: Any) -> None:
    assert not fired(agree(experiment, lambda: model, inputs), "merge_forwards")


@intervene
def labelled(model, xs, labels):
    names, found = iter(labels), []
    for x in xs:
        with model.trace(x):
            out = model.head.output[0, -1]
        found.append((next(names), out))
    return found


def test_an_iterator_that_ends_in_a_round(model: NNsight) -> None:
    agree(labelled, lambda: model, inputs, lambda: ["a", "b", "c"])
    for experiment in (labelled, labelled.with_options(without="all")):
        with pytest.raises(StopIteration):
            experiment(model, inputs(), ["a"])


# --- exceptions ---


@intervene
def failing_before(model, xs):
    for number, x in enumerate(xs):
        scale = 1 / (1 - number)
        with model.trace(x):
            model.layers[0].output *= scale
            out = model.head.output[0, -1, 0].item()
        print("done", number, out > 0)


def test_an_exception_before_a_forward_comes_after_the_rounds_before_it(model: NNsight) -> None:
    assert fired(agree(failing_before, lambda: model, inputs), "merge_forwards")


@intervene
def failing_twice(model, xs):
    for number, x in enumerate(xs):
        first = [1.0, 0.0][number]
        with model.trace(x):
            out = model.head.output[0, -1, 0].item()
        print("done", number, out > 0)
        print(1 / first)


def test_the_exception_of_the_earlier_round_is_raised(model: NNsight) -> None:
    plain = failing_twice.with_options(without="all")
    with pytest.raises(ZeroDivisionError):
        plain(model, inputs())
    with pytest.raises(ZeroDivisionError):
        failing_twice(model, inputs())
    assert fired(agree(failing_twice, lambda: model, inputs), "merge_forwards")


@intervene
def failing_inside(model, xs, early, late):
    for number, x in enumerate(xs):
        with model.trace(x):
            model.layers[0].output[:] *= early[number][int(model.layers[0].output.max() > 1000)]
            model.layers[2].output[:] *= 1 / (int(model.layers[2].output.max() > 1000) + late[number])
            out = model.head.output[0, -1, 0].item()
        print("done", number, out > 0)


def test_the_exception_inside_of_the_earlier_forward_is_raised(model: NNsight) -> None:
    for early, late in (([[1.0], [], [1.0]], [0, 1, 1]), ([[1.0], [], [1.0]], [1, 1, 0]), ([[1.0]] * 3, [1, 2, 0])):
        remarks = agree(failing_inside, lambda: model, inputs, lambda: early, lambda: late)  # noqa: B023
        assert fired(remarks, "merge_forwards")


# --- what rounds have in common ---


@intervene
def rows_of_an_outer_list(model, xs):
    rows = []
    for x in xs:
        rows.append([])
        with model.trace(x):
            out = model.head.output[0, -1, 0].item()
        rows[-1].append(out)
    return rows


@intervene
def a_vector_that_is_changed(model, xs, vector):
    found = []
    for x in xs:
        with model.trace(x):
            model.layers[1].output[:, -1] += vector
            out = model.head.output[0, -1]
        vector += out[:4]
        found.append(out)
    return found


@intervene
def the_last_output(model, xs):
    last = torch.zeros(4)
    for x in xs:
        with model.trace(x):
            model.layers[1].output[:, -1] += last
            last = model.layers[2].output[0, 0]
            out = model.head.output[0, -1]
    return last, out


@intervene
def a_running_maximum(model, xs):
    best, where = -1000.0, -1
    for number, x in enumerate(xs):
        with model.trace(x):
            score = model.head.output[0, -1, 2].item()
        if score > best:
            best, where = score, number
    return best, where


@intervene
def a_dict_of_lists(model, xs):
    found = {"a": [], "b": []}
    for number, x in enumerate(xs):
        name = "a" if number % 2 else "b"
        with model.trace(x):
            found[name].append(model.layers[1].output[0, 0])
            out = model.head.output[0, -1, 2].item()
        found[name].append(out)
    return found["a"], found["b"]


@intervene
def printing(model, xs):
    for number, x in enumerate(xs):
        print("begin", number)
        with model.trace(x):
            out = model.head.output[0, -1, 2].item()
        print("end", number)
    return out


@intervene
def an_accumulated_stream(model, xs):
    total = torch.zeros(1, 3, 4)
    for x in xs:
        with model.trace(x):
            total += model.layers[1].output
            out = model.head.output[0, -1]
    return total, out


@intervene
def rounds_that_end_early(model, xs):
    found = []
    for number, x in enumerate(xs):
        if number == 1:
            found.append("skipped")
            continue
        with model.trace(x):
            out = model.head.output[0, -1, 2].item()
        found.append(out)
    return found


PROGRAMS = [
    rows_of_an_outer_list, the_last_output, a_running_maximum, a_dict_of_lists, printing, an_accumulated_stream,
    rounds_that_end_early,
]  # fmt: skip


@pytest.mark.parametrize("experiment", PROGRAMS, ids=lambda each: each.__name__)
def test_what_rounds_have_in_common(model: NNsight, experiment: Any) -> None:
    agree(experiment, lambda: model, inputs)


def test_a_vector_that_each_round_changes(model: NNsight) -> None:
    agree(a_vector_that_is_changed, lambda: model, inputs, lambda: torch.ones(4))


# --- results are apart ---


@intervene
def twice_the_same(model, x):
    found = []
    for scale in (2.0, 3.0):
        with model.trace(x):
            early = model.layers[0].output
            model.layers[1].output *= scale
            late = model.head.output
        found.append(early)
        found.append(late)
    return found


@intervene
def straight(model, x):
    with model.trace(x):
        one = model.layers[0].output
        model.layers[1].output *= 2
        first = model.head.output
    with model.trace(x):
        two = model.layers[0].output
        model.layers[1].output *= 3
        second = model.head.output
    return one, two, first, second


@pytest.mark.parametrize("experiment", [twice_the_same, straight])
def test_results_share_no_memory(model: NNsight, experiment: Any) -> None:
    for _ in range(2):
        found = experiment(model, inputs()[0])
        before = [each.clone() for each in found]
        for number, each in enumerate(found):
            each.add_(1)
            for other in range(number + 1, len(found)):
                assert torch.equal(found[other], before[other])


@intervene
def changed_between(model, x):
    with model.trace(x):
        one = model.layers[0].output
        model.layers[1].output *= 2
        first = model.head.output
    one += 1
    with model.trace(x):
        two = model.layers[0].output
        model.layers[1].output *= 3
        second = model.head.output
    return one, two, first, second


def test_a_saved_value_is_changed_before_the_next_forward(model: NNsight) -> None:
    agree(changed_between, lambda: model, lambda: inputs()[0])


@intervene
def at_the_next_input(model, x):
    found = []
    for scale in (2.0, 3.0, 4.0):
        for position in (0, 1):
            with model.trace(x):
                model.layers[1].input[:, position] *= scale
                out = model.head.output
            found.append(out)
    return found


@intervene
def at_the_next_input_straight(model, x):
    with model.trace(x):
        model.layers[1].input[:, 0] *= 2
        first = model.head.output
    with model.trace(x):
        model.layers[1].input[:, 0] *= 3
        second = model.head.output
    with model.trace(x):
        model.layers[1].input[:, 1] *= 3
        third = model.head.output
    return first, second, third


@pytest.mark.parametrize("experiment", [at_the_next_input, at_the_next_input_straight])
def test_a_write_to_the_input_of_the_module_after_what_is_replayed(model: NNsight, experiment: Any) -> None:
    assert fired(agree(experiment, lambda: model, lambda: inputs()[0]), "share_prefixes")


# --- gradients ---


@intervene
def losses_of(model, xs, vector):
    found = []
    for x in xs:
        with model.trace(x):
            model.layers[1].output[:, -1] += vector
            out = model.head.output[0, -1, 0]
        found.append(out)
    return found


def test_each_round_has_a_graph_of_its_own(model: NNsight) -> None:
    gradients = []
    for experiment in (losses_of, losses_of.with_options(without="all")):
        vector = torch.ones(4, requires_grad=True)
        for loss in experiment(model, inputs(), vector):
            loss.backward()
        gradients.append(vector.grad)
    torch.testing.assert_close(*gradients)


@intervene
def both_of(model, x):
    with model.trace(x):
        model.layers[1].output *= 2
        first = model.head.output[0, -1, 0]
    with model.trace(x):
        model.layers[1].output *= 3
        second = model.head.output[0, -1, 0]
    return first, second


@intervene
def strengths_of(model, x):
    found = []
    for strength in (2.0, 3.0):
        with model.trace(x):
            model.layers[1].output *= strength
            out = model.head.output[0, -1, 0]
        found.append(out)
    return found


@pytest.mark.parametrize("experiment", [both_of, strengths_of])
def test_a_gradient_of_the_input_reaches_it(model: NNsight, experiment: Any) -> None:
    gradients = []
    for each in (experiment, experiment.with_options(without="all")):
        x = inputs()[0].requires_grad_()
        for loss in each(model, x):
            loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@intervene
def in_other_precision(model, x):
    with model.trace(x):
        model.layers[1].output *= 2
        first = model.head.output[0, -1, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16), model.trace(x):
        model.layers[1].output *= 2.0001
        second = model.head.output[0, -1, 0]
    return first, second


def test_a_forward_under_autocast_shares_with_none_outside(model: NNsight) -> None:
    results = [
        each(model, inputs()[0]) for each in (in_other_precision, in_other_precision.with_options(without="all"))
    ]
    assert results[0][1].dtype == results[1][1].dtype
    assert torch.equal(results[0][1], results[1][1])


# --- the user's own hooks ---


@intervene
def sweep(model, x):
    found = []
    for position in (0, 1, 2):
        with model.trace(x):
            model.layers[1].output[:, position] = 0
            out = model.head.output[0, -1]
        found.append(out)
    return found


@pytest.mark.parametrize("path", ["layers.0", "layers.0.mlp", "layers.2", "head"])
def test_hooks_of_the_user_see_what_they_would_see(model: NNsight, path: str) -> None:
    seen: list[list[Any]] = []
    for experiment in (sweep, sweep.with_options(without="all")):
        seen.append([])
        module: nn.Module = model._wrapped.get_submodule(path)
        handle = module.register_forward_hook(lambda _m, _a, output: seen[-1].append(output.clone()))
        try:
            experiment(model, inputs()[0])
        finally:
            handle.remove()
    assert not list(differences(*seen))
