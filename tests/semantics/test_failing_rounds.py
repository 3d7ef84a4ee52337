"""Rounds that fail: what was done by then, and the exception, are what they are where nothing is optimised."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sweeps import WIDTH, Net, differences

from nnsight_compiler import NNsight, intervene

ROUNDS = [(0, 3), (3, 6), (1, 5), (2, 4)]
"""Where rounds start and stop. Number 3 fails: none, the first, the third of four, the last."""


@pytest.fixture(scope="module")
def model() -> NNsight:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    made = NNsight(Net().eval())
    with made.trace(torch.zeros(1, 3, WIDTH)):  # so that the model was seen to run, for inputs that only the run knows
        made.head.output.save()
    return made


class Seen:
    """What of a caller's a program may change."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.vector = torch.zeros(6, WIDTH)
        self.leaf = torch.ones(WIDTH, requires_grad=True)

    def all(self) -> list[Any]:
        grad = self.leaf.grad
        return [self.log, self.vector, self.leaf.detach(), [] if grad is None else [grad]]


def ended(run: Callable[[], Any]) -> tuple[Any, str, str, str]:
    """The result of a run, what it printed, its exception, and the line of the test at which that was raised."""
    shown, result, error, line = io.StringIO(), None, "", ""
    with contextlib.redirect_stdout(shown):
        try:
            result = run()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            frames = [each for each in traceback.extract_tb(raised.__traceback__) if "test_failing" in each.filename]
            line = f"{frames[-1].lineno}: {frames[-1].line}"
    return result, shown.getvalue(), error, line


def agree(experiment: Any, model: NNsight, start: int, stop: int) -> None:
    """Asserts that a program gives and does the same optimised and not, where round 3 fails."""
    plain = experiment.with_options(without="all")
    for _ in range(2):
        mine, theirs = Seen(), Seen()
        found, wanted = (
            ended(lambda: each(model, start, stop, seen.log, seen.vector, seen.leaf))  # noqa: B023
            for each, seen in ((experiment, mine), (plain, theirs))
        )
        own = wanted[2].startswith("RunError")  # it names its line
        assert found[1:3] == wanted[1:3]
        assert own or found[3] == wanted[3]
        assert (wanted[2] != "") == (stop > 3), wanted[2]
        assert not list(differences(found[0], wanted[0]))
        assert not list(differences(mine.all(), theirs.all(), "seen"))


# --- in the body of a trace of a loop ---


@intervene
def prints_then_index(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("round", number, model.layers[0].output[0, 0, 0] > 9)
            out = model.layers[1].output[0, number]
        print("after", out.shape)


@intervene
def appends_then_index(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            log.append(model.layers[0].output[0, 0])
            log.append(model.layers[1].output[0, number])


@intervene
def writes_then_index(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            vector[number] = model.layers[0].output[0, 0]
            model.layers[1].output[:, number] = 0
            vector[number] += model.layers[2].output[0, -1]


@intervene
def writes_out_of_range(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("begun", number, model.layers[0].output[0, 0, 0] > 9)
            ids = [number]
            model.layers[1].output[:, ids] = 0
            print("written", number)
            log.append(model.head.output[0, -1])


@intervene
def counts_then_divides(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            vector[0, 0] += 1
            model.layers[1].output[:] *= 1 / (3 - number)
            log.append(model.head.output[0, -1])
        vector[0, 0] += 10


@intervene
def prints_without_values(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("in", number)
            out = model.layers[1].output[0, number]
            print("out", number)
        log.append(out)


def scaled(value, part):
    print("scaling")
    return value * (1 / part)


@intervene
def fails_in_a_function(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number)
            model.layers[1].output = scaled(model.layers[1].output, (3 - number))
            log.append(model.head.output[0, -1])


@intervene
def fails_in_a_nested_function(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)

    def last(value, number):
        log.append(number)
        return value[0, number]

    for number in range(start, stop):
        with model.trace(x):
            low = last(model.layers[0].output, number)
            log.append(low + model.layers[2].output[0, 0])


@intervene
def fails_in_a_call(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number, model.layers[0].output.shape)
            rows = model.layers[1].output[0].unbind()
            row = torch.stack(rows[number:])
            print("after", number)
            log.append(row)


@intervene
def raises(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number)
            hidden = model.layers[1].output
            if number == 3:
                raise ValueError(f"no part for {number}")
            log.append(hidden[0, 0])


@intervene
def asserts(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number)
            hidden = model.layers[1].output
            assert hidden.abs().sum() > (0 if number != 3 else 1e9), "too small"
            log.append(hidden[0, 0])


@intervene
def looks_up(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    names = {number: number for number in (0, 1, 2, 4, 5)}
    for number in range(start, stop):
        with model.trace(x):
            log.append(model.layers[0].output[0, 0])
            model.layers[1].output[:] *= names[number]
            log.append(model.head.output[0, -1])


# --- around the traces of a loop ---


@intervene
def before_the_forward(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        print("before", number)
        scale = 1 / (3 - number)
        with model.trace(x):
            model.layers[0].output *= scale
            log.append(model.head.output[0, -1])


@intervene
def counts_before_the_forward(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        log.append(number)
        scale = len(log)
        with model.trace(x):
            model.layers[0].output *= scale
            out = model.layers[1].output[0, number]
        print(out.shape)


@intervene
def after_the_forward(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            out = model.head.output[0, -1]
        log.append(out)
        print("after", number, 1 / (3 - number))
        vector[number] = 1.0


@intervene
def between_two_forwards(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            low = model.layers[0].output[0, 0].save()
        print("between", number)
        vector[number] = low
        with model.trace(x):
            model.layers[0].output[0, -1] = low
            out = model.layers[1].output[0, number].save()
        log.append(out)


@intervene
def between_two_forwards_fails(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            log.append(model.layers[0].output[0, 0])
            low = model.layers[1].output[0, 0].save()
        vector[number] = low
        scale = 1 / (3 - number)
        with model.trace(x):
            model.layers[0].output[0, -1] = low * scale
            out = model.layers[1].output[0, 1].save()
        log.append(out)


@intervene
def made_in_place(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        total = torch.zeros(WIDTH)
        with model.trace(x):
            total += model.layers[0].output[0, 0]
            total += model.layers[1].output[0, number]
        log.append(total)
        print("total", number)


@intervene
def held_by_the_caller(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        kept = []
        log.append(kept)
        with model.trace(x):
            kept.append(model.layers[0].output[0, 0])
            kept.append(model.layers[1].output[0, number])


@intervene
def held_by_the_caller_from_the_start(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    kept = []
    log.append(kept)
    for number in range(start, stop):
        with model.trace(x):
            kept.append(model.layers[0].output[0, 0])
            model.layers[1].output[:, number] = 0
            kept.append(model.head.output[0, -1])


@intervene
def calls_the_head(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            log.append(model.head(model.layers[0].output)[0, 0])
            print("looked", number)
            log.append(model.layers[1].output[0, number])


# --- exceptions that the program handles ---


@intervene
def handled_around_the_loop(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    number = -1
    try:
        for number in range(start, stop):
            with model.trace(x):
                print("in", number)
                log.append(model.layers[1].output[0, number])
    except IndexError:
        print("caught in", number)
        raise
    finally:
        print("ends", number, len(log))


@intervene
def handled_around_the_trace(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        try:
            with model.trace(x):
                print("in", number)
                out = model.layers[1].output[0, number].save()
        except IndexError:
            print("caught in", number)
            continue
        finally:
            log.append(number)
        log.append(out)
    if stop > 3:
        raise ValueError("one was caught")


@intervene
def broken_off(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        try:
            with model.trace(x):
                print("in", number)
                out = model.layers[1].output[0, number].save()
        except IndexError:
            break
        log.append(out)
    if stop > 3:
        raise ValueError("one was caught")


@intervene
def finally_after_the_trace(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("in", number)
            out = model.layers[1].output[0, 0]
        try:
            log.append(out * number)
            print(1 / (3 - number))
        finally:
            print("finally", number)


# --- gradients ---


@intervene
def gradients_then_index(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                grad = hidden.grad[0, number].clone()
                print("grad", number)
        log.append(grad)


@intervene
def gradients_changed(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[1].output
            loss = model.head.output[0, -1, 0]
            print("loss", number)
            with loss.backward():
                late.grad[:, number] = 0
                grad = early.grad.clone()
        log.append(grad)


@intervene
def gradients_printed(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                print("late", number, late.grad.shape)
                late.grad[:, 0] = 1 / (3 - number)
                print("early", number, early.grad.shape)
                log.append(early.grad[0, 0])


@intervene
def gradients_of_a_leaf(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            model.layers[0].output[:, -1] += leaf
            late = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                late.grad[:, number] = 0
        print("done", number)


@intervene
def fails_after_a_leaf_has_its_gradient(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            model.layers[0].output[:, -1] += leaf
            late = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                grad = late.grad.clone()
        log.append(grad)
        print("done", 1 / (3 - number))


@intervene
def wanted_then_index(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
        print("loss", number)
        (grad,) = torch.autograd.grad(loss * (1 / (3 - number)), [hidden])
        log.append(grad)


@intervene
def losses_of_no_value(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            if number == 3:
                loss = loss.detach()
            with loss.backward():
                grad = hidden.grad.clone()
            print("grad", number)
        log.append(grad)


# --- what is shown alone ---


@intervene
def shows_around_forwards(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        print("begins", number)
        scale = 1 / (3 - number) if number > 1 else 1
        with model.trace(x):
            model.layers[0].output *= scale
            low = model.layers[0].output[0, 0].save()
            print("low", number)
        print("between", number, low.shape)
        with model.trace(x):
            model.layers[0].output[0, -1] = low
            print("inside", number)
            out = model.layers[1].output[0, 0].save()
        print("ends", out.shape)


@intervene
def shows_between_forwards(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            low = model.layers[0].output[0, 0].save()
        print("between", number, low.shape)
        with model.trace(x):
            model.layers[0].output[0, -1] = low
            out = model.layers[1].output[0, number].save()
        print("ends", out.shape)


@intervene
def shows_in_the_first_forward(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("first", number, model.layers[0].output.shape)
            low = model.layers[1].output[0, number].save()
        print("between", number)
        with model.trace(x):
            model.layers[0].output[0, -1] = low
            out = model.layers[1].output[0, 0].save()
        print("ends", out.shape)


@intervene
def shows_what_is_made_in_place(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        total = x[0, 0].clone()
        with model.trace(x):
            total += model.layers[0].output[0, 0]
            print("half", number, float(total.sum()) > 1e9)
            total += model.layers[1].output[0, number]
        print("total", number, float(total.sum()) > 1e9)


@intervene
def shows_what_a_function_does(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number)
            model.layers[1].output = scaled(model.layers[1].output, 3 - number)
            out = model.head.output[0, -1]
        print("after", number, out.shape)


@intervene
def shows_what_the_head_gives(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("looked", number, model.head(model.layers[0].output)[0, 0].shape)
            out = model.layers[1].output[0, number]
        print("after", number, out.shape)


@intervene
def shows_a_bad_call(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            print("before", number, model.layers[0].output.shape)
            row = torch.stack(model.layers[1].output[0].unbind()[number:])
            print("after", number, row.shape)


@intervene
def shows_gradients(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                print("grad", number, hidden.grad.shape)
                print("at", hidden.grad[0, number].shape)


@intervene
def shows_changed_gradients(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[1].output
            loss = model.head.output[0, -1, 0]
            print("loss", number)
            with loss.backward():
                late.grad[:, number] = 0
                grad = early.grad.clone()
        print("grad", number, grad.shape)


@intervene
def shows_as_gradients_arrive(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            early, late = model.layers[0].output, model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                print("late", number, late.grad.shape)
                late.grad[:, number] = 0
                print("early", number, early.grad.shape)


@intervene
def shows_after_a_gradient_of_a_leaf(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            model.layers[0].output[:, -1] += leaf
            late = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            with loss.backward():
                grad = late.grad.clone()
        print("done", grad.shape, 1 / (3 - number))


@intervene
def shows_after_what_a_leaf_is_in(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            model.layers[0].output[:, -1] += leaf
            loss = model.head.output[0, -1, 0]
        loss.backward()
        print("done", loss.shape, 1 / (3 - number))


@intervene
def shows_wanted_gradients(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
        print("loss", number)
        (grad,) = torch.autograd.grad(loss * (1 / (3 - number)), [hidden])
        print("grad", grad.shape)


@intervene
def shows_losses_of_no_value(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    for number in range(start, stop):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.head.output[0, -1, 0]
            if number == 3:
                loss = loss.detach()
            with loss.backward():
                grad = hidden.grad.clone()
            print("grad", number, grad.shape)


SHOWN = [
    shows_around_forwards, shows_between_forwards, shows_in_the_first_forward, shows_what_is_made_in_place,
    shows_what_a_function_does, shows_what_the_head_gives, shows_a_bad_call, shows_gradients, shows_changed_gradients,
    shows_as_gradients_arrive, shows_after_a_gradient_of_a_leaf, shows_after_what_a_leaf_is_in, shows_wanted_gradients,
    shows_losses_of_no_value,
]  # fmt: skip

PROGRAMS = [
    prints_then_index, appends_then_index, writes_then_index, writes_out_of_range, counts_then_divides,
    prints_without_values, fails_in_a_function, fails_in_a_nested_function, fails_in_a_call, raises, asserts, looks_up,
    before_the_forward, counts_before_the_forward, after_the_forward, between_two_forwards, between_two_forwards_fails,
    made_in_place, held_by_the_caller, held_by_the_caller_from_the_start, calls_the_head, handled_around_the_loop,
    handled_around_the_trace, broken_off, finally_after_the_trace, gradients_then_index, gradients_changed,
    gradients_printed, gradients_of_a_leaf, fails_after_a_leaf_has_its_gradient, wanted_then_index, losses_of_no_value,
    *SHOWN,
]  # fmt: skip


@pytest.mark.parametrize(("start", "stop"), ROUNDS)
@pytest.mark.parametrize("experiment", PROGRAMS, ids=lambda each: each.__name__)
def test_what_a_round_did_before_it_failed(model: NNsight, experiment: Any, start: int, stop: int) -> None:
    agree(experiment, model, start, stop)


# --- lines that follow one another ---


@intervene
def straight_shows(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    with model.trace(x):
        print("one", model.layers[0].output.shape)
        one = model.layers[1].output[0, 0]
    print("first", one.shape)
    with model.trace(x):
        print("two", model.layers[0].output.shape)
        two = model.layers[1].output[0, stop - 1]
        print("found", two.shape)
    print("second", two.shape)


@intervene
def straight_calls(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    with model.trace(x):
        print("one", model.layers[0].output.shape)
        one = model.layers[1].output[0, 0]
    with model.trace(x):
        print("two", model.layers[0].output.shape)
        two = torch.stack(model.layers[1].output[0].unbind()[stop - 1 :])
    print("second", one.shape, two.shape)


@intervene
def straight_lists(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    kept = []
    log.append(kept)
    with model.trace(x):
        kept.append(model.layers[0].output[0, 0])
        kept.append(model.layers[1].output[0, 0])
    with model.trace(x):
        kept.append(model.layers[0].output[0, 0])
        model.layers[1].output[:, stop - 1] = 0
        kept.append(model.layers[2].output[0, 0])


@intervene
def straight_writes(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    with model.trace(x):
        one = model.layers[0].output[0, 0]
    vector[0] = one
    with model.trace(x):
        model.layers[0].output[:, stop - 1] = 0
        vector[1] = model.layers[2].output[0, 0]
    vector[2] = 1.0


@intervene
def straight_gradients(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    with model.trace(x):
        model.layers[0].output[:, -1] += leaf
        first = model.layers[1].output
        loss = model.head.output[0, -1, 0]
        with loss.backward():
            one = first.grad.clone()
    print("one", one.shape)
    with model.trace(x):
        model.layers[0].output[:, -1] += leaf
        second = model.layers[1].output
        loss = model.head.output[0, -1, 1]
        print("loss")
        with loss.backward():
            second.grad[:, stop - 1] = 0
            two = second.grad.clone()
    print("two", two.shape)


@intervene
def straight_fails_between(model, start, stop, log, vector, leaf):
    x = torch.ones(1, 3, 4)
    with model.trace(x):
        model.layers[0].output[:, -1] += leaf
        loss = model.head.output[0, -1, 0]
    loss.backward()
    print("one", 1 / max(4 - stop, 0))
    with model.trace(x):
        model.layers[0].output[:, -1] += leaf
        loss = model.head.output[0, -1, 1]
    loss.backward()
    print("two")


STRAIGHT = [straight_shows, straight_calls, straight_lists, straight_writes, straight_gradients, straight_fails_between]


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("experiment", STRAIGHT, ids=lambda each: each.__name__)
def test_what_lines_did_before_one_failed(model: NNsight, experiment: Any, stop: int) -> None:
    agree(experiment, model, 0, stop)


@intervene
def over_items(model, items):
    x = torch.ones(1, 3, 4)
    found = []
    for number in items:
        with model.trace(x):
            found.append(model.layers[0].output[0, number])
    return found


@intervene
def over_pairs(model, items):
    x = torch.ones(1, 3, 4)
    found = []
    for number, _ in items:
        with model.trace(x):
            found.append(model.layers[0].output[0, number])
    return found


def test_an_iterator_is_taken_from_as_far_as_rounds_come(model: NNsight) -> None:
    numbers = [0, 2, 3, 1, 2]
    for experiment, make in (
        (over_items, lambda: iter(numbers)),
        (over_pairs, lambda: zip(numbers, "abcde", strict=True)),
    ):
        items = make()
        with pytest.raises(IndexError, match="index 3 is out of bounds"):
            experiment(model, items)
        assert len(list(items)) == 2
    over_items(model, numbers[:2])
    over_items(model, numbers[:2])
    assert [each.forwards for each in over_items.last_run.forwards if each.forwards > 1] == [2]
