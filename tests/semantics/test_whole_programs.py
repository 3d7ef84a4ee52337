"""Programs that random ones were shrunk to: each is run by us and by the statement oracle."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from statement_oracle import StandIn, keep
from torch import nn

from nnsight_compiler import NNsight, intervene, save


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) + 0.5 * x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


torch.set_num_threads(1)
torch.manual_seed(0)
NET = Net().eval()


LOG: list[Any] = []
FACTOR = 2


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def both(*arguments: Any) -> Callable[[Callable[..., Any]], None]:
    """Runs a function by us and by the oracle, on an empty log each: equal results, logs and inputs."""

    def check(function: Callable[..., Any]) -> None:
        shown = []
        for run, model in ((intervene(function), NNsight(NET)), (function, StandIn(NET))):
            LOG.clear()
            x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
            random.seed(0)
            raised = ""
            result = None
            try:
                result = run(model, x, *arguments)
            except (ArithmeticError, LookupError, NameError, ValueError) as error:
                raised = type(error).__name__
            shown.append((plain(result), raised, list(LOG), plain(x)))
        assert shown[0] == shown[1]

    return check


def test_an_except_names_the_exceptions_of_python() -> None:
    @both([1, 2])
    def run(model, x, numbers):
        try:
            LOG.append(numbers[5])
        except IndexError:
            LOG.append("none")
        return "end"


def test_a_value_that_is_logged_late_is_that_of_its_site() -> None:
    @both(0.5)
    def run(model, x, scale):
        for _ in range(2):
            scale -= 0.5
        scale += FACTOR
        with model.trace(x):
            LOG.append(("late", float(model.layers[3].linear.output.sum())))
            LOG.append(("early", float(model.layers[0].linear.output.sum())))  # the model then changes it in place
            LOG.append(("early", float(model.layers[0].linear.output.sum())))


def test_a_log_is_no_part_of_the_input() -> None:
    @both()
    def run(model, x):
        with model.trace(x):
            LOG.append(f"{len(LOG)}")
        layer = random.randrange(4)
        with model.trace(x):
            h = model.layers[layer].output
        return h


def test_a_log_is_no_part_of_what_was_assigned() -> None:
    @both()
    def run(model, x):
        def inner(n):
            with model.trace(x):
                for layer in (1, 3):
                    model.layers[layer].act.output += FACTOR
                for block in model.layers:
                    LOG.append(float(block.output.sum()))
                out = model.output
            return out

        first = inner(1)
        layer = random.randrange(4)
        with model.trace(x):
            h = model.layers[layer].output
        return first, h


class State:
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.count = 0


def test_an_object_that_was_given_values_of_several_sites_is_none_of_them() -> None:
    @both()
    def run(model, x):
        state = State()
        with model.trace(x):
            state.seen.append(model.layers[0].linear.output)
            state.seen.append(model.layers[1].output)
            state.count += 1
            state.last = model.layers[2].output
            state.count += 1
            model.layers[3].output *= 2
            state.out = model.output
        return state.seen, state.last, state.out, state.count

    @both()
    def globally(model, x):
        with model.trace(x):
            LOG.append(0)
            LOG[-1] = model.layers[0].linear.output
            LOG.append(model.layers[1].output)
            LOG.append(float(model.output.sum()))
        kept = list(LOG)
        LOG.clear()
        return kept


def test_a_condition_on_a_counter_of_a_loop_of_the_run() -> None:
    @both()
    def run(model, x):
        count = 0
        while count < 3 and random.random() < 0.9:
            count += 1
        with model.trace(x):
            if count % 2:
                model.layers[1].output = 0
            out = model.output
        return count, out


def test_a_condition_on_the_variable_of_a_loop_of_the_run() -> None:
    @both()
    def run(model, x):
        for n in range(random.randint(2, 3)):
            with model.trace(x):
                if n % 2:
                    model.layers[1].output = 0
                LOG.append(float(model.output.sum()))


def test_a_break_in_a_try_in_a_loop_over_layers() -> None:
    @both((0, 2), {2: "two"})
    def run(model, x, layers, table):
        for n in layers:
            try:
                with model.trace(x):
                    LOG.append(float(model.layers[n].output.sum()))
                LOG.append(table[n])
                if n:
                    break
            except KeyError:
                LOG.append("none")


def test_a_nested_function_that_sees_the_loop_over_layers() -> None:
    @both()
    def run(model, x):
        for n in (2, 0):

            def inner():
                with model.trace(x):
                    h = model.layers[n].output  # noqa: B023
                return h

            LOG.append(float(inner().sum()))


@pytest.mark.parametrize("kind", ["helper", "comprehension"])
def test_an_undefined_name_is_an_error_where_nothing_uses_it(kind: str) -> None:
    def undefined(model, x):
        return nothing_at_all  # noqa: F821

    def called(model, x):
        undefined(model, x)

    def comprehended(model, x):
        values = [undefined(model, x) for n in range(2)]  # noqa: F841

    both()(called if kind == "helper" else comprehended)


def test_an_in_place_write_to_the_first_input_leaves_the_callers_tensor() -> None:
    @both()
    def run(model, x):
        with model.trace(x):
            model.layers[0].input[:, 0] = 5
            out = model.output
        return out


HELD: Any = None


def hold(value: Any) -> None:
    global HELD
    HELD = value


def test_the_model_has_what_it_was_given_before_the_body_changes_it() -> None:
    @both()
    def run(model, x):
        hold(x)
        with model.trace(x):
            HELD[:, 0] = 5  # only the run can tell that this is `x`
            LOG.append(float(x.sum()))
            first = model.layers[0].input
        with model.trace(x):
            second = model.layers[0].input
        return first, second


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, pair: list[torch.Tensor], named: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.part(pair[0]) + 2 * pair[1] + 3 * named["x"]


def test_an_in_place_write_to_an_input_in_a_container_leaves_the_callers_tensors() -> None:
    @intervene
    def run(model, pair, named):
        with model.trace(pair, named=named):
            model.part.output[0] = 5
            out = model.output
        return out

    x, y = torch.ones(2), torch.zeros(2)
    pair, named = [x, y], {"x": x}
    out = run(NNsight(Pairs()), pair, named)
    assert out.tolist() == [5 + 3 * 5, 1 + 3 * 1]  # the model was given one tensor twice
    assert x.tolist() == [1, 1]
    assert pair[0] is x
    assert named["x"] is x


def test_a_gradient_passes_through_an_input_that_is_written_to() -> None:
    @intervene
    def run(model, x):
        with model.trace(x):
            model.layers[0].input[:, 0] = 5
            out = model.output
        return out

    x = torch.ones(2, 3, 4, requires_grad=True)
    run(NNsight(NET), x).sum().backward()
    assert x.grad is not None
    assert not x.grad[:, 0].any()
    assert x.grad[:, 1].any()


@pytest.mark.parametrize("scaled", [False, True])
def test_loops_over_sites_that_use_what_the_forward_was_given(scaled: bool) -> None:
    @intervene
    def run(model, x, scale):
        given = x * 2 if scaled else x
        with model.trace(given):
            for n in range(3):
                model.layers[n].act.output += float(given.mean())
            for n in (0, 2):
                model.layers[n].output[:, 0] += scale * given[:, 1]
            out = model.output
        return given, out

    def ordered(model, x, scale):
        given = x * 2 if scaled else x
        with model.trace(given):
            for n in range(3):
                model.layers[n].act.output += float(given.mean())
                if n != 1:
                    model.layers[n].output[:, 0] += scale * given[:, 1]
            out = model.output
        return given, out

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert plain(run(NNsight(NET), x, 0.5)) == plain(ordered(StandIn(NET), x, 0.5))


def test_what_was_a_tensor_in_the_first_call_is_a_list_or_a_number_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that rest on an argument hold for one call; who shares storage is asked for all."""

    def program(model, x, value):
        with model.trace(x):
            h = model.layers[0].linear.output
            both = value + value  # new where it is a tensor; of a list, the same tensors again
            part = both[0]
            before, total = save(part), part.sum()
            value[0] *= 3
            again = part.sum()
            out = model.output
        return before, total, again, both, h, out

    def scaled(model, x, value):
        with model.trace(x):
            site = model.layers[0].linear.output
            other = value
            other += site.mean()
            before = save(value)
            other += 1
            out = model.output
        return before, value, other, out

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    tensors = [lambda: torch.ones(2, 4), lambda: [torch.ones(3), torch.ones(4)], lambda: torch.zeros(2, 4)]
    numbers = [lambda: torch.ones(2), lambda: 1.5, lambda: torch.zeros(1)]
    for function, values in ((program, tensors), (scaled, numbers)):
        experiment = intervene(function)
        for make in values:
            given, wanted = make(), make()
            found = experiment(NNsight(NET), x, given)
            with monkeypatch.context() as patch:
                patch.setitem(globals(), "save", keep)
                expected = function(StandIn(NET), x, wanted)
            assert plain(found) == plain(expected)
            assert plain(given) == plain(wanted)


def test_a_continue_on_a_layer_of_the_run() -> None:
    @both()
    def run(model, x):
        layer = random.randrange(4)
        with model.trace(x):
            for number, block in enumerate(model.layers):
                if number % 2 == layer % 2:
                    continue
                LOG.append((number, float(block.output.sum())))
