"""Where a program means something else here than in nnsight 0.8.1, on purpose: what each does, and the page on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awaited import mark
from page import page
from running import Outcome, names, parameters, run
from subjects import plain, tokenizer

import nnsight_compiler

FILE = Path(__file__).parent / "differences" / "loud.py"
PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
Checks = Callable[[Outcome, Outcome], None]
CHECKS: dict[str, Checks] = {}
ONES = torch.ones(2, 6)


def check(function: Checks) -> Checks:
    """Registers what is asserted of the program of the same name: of nnsight's outcome and of ours."""
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark(f"loud.{name}")) for name in names(FILE)])
def test_difference(name: str, theirs: Callable[[str], Outcome], modules: Callable[[Path], Any]) -> None:
    program = getattr(modules(FILE), name)
    CHECKS[name](theirs(f"loud.{name}"), run(program, parameters(program), nnsight_compiler))


def test_every_program_is_checked() -> None:
    assert CHECKS.keys() == set(names(FILE))


def test_the_page_says_what_the_programs_say() -> None:
    assert PAGE.read_text() == page(), "write it again: python tests/parity/page.py > docs/differences.md"


def raised(outcome: Outcome, kind: str, *texts: str) -> None:
    assert outcome.get("error") == kind, outcome
    for text in texts:
        assert text in outcome["message"]


def refused(outcome: Outcome, line_of: str, *texts: str, kind: str = "CompileError") -> None:
    """Ours raised an error at the line that contains `line_of`, with these texts."""
    raised(outcome, kind, *texts)
    lines = FILE.read_text().splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if line.strip() == line_of]
    assert any(f"loud.py:{number}:" in outcome["message"] for number in numbers), outcome["message"]


def states(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the three layers of the plain net return."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach().clone()))
        for layer in module.layers
    ]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return found


@check
def reads_in_any_order(peer: Outcome, found: Outcome) -> None:
    raised(peer, "OutOfOrderError")
    early, _, late = states(plain("net"), ONES)
    assert torch.equal(found["value"][0], early)
    assert torch.equal(found["value"][1], late)


@check
def an_input_after_its_output(peer: Outcome, found: Outcome) -> None:
    raised(peer, "OutOfOrderError")
    early, middle, _ = states(plain("net"), ONES)
    assert torch.equal(found["value"], middle - early.tanh())


@check
def a_write_above_the_read_that_it_needs(peer: Outcome, found: Outcome) -> None:
    raised(peer, "OutOfOrderError")
    net = plain("net")
    with torch.no_grad():
        assert torch.equal(found["value"], net.head(torch.tanh(net.layers[0](ONES) * 2)))


@check
def a_number_for_a_whole_output(peer: Outcome, found: Outcome) -> None:
    raised(peer, "TypeError", "not int")
    assert found["value"].shape == (1, 8, 128)
    assert not found["value"].any()


@check
def an_item_of_a_tuple_is_assigned(peer: Outcome, found: Outcome) -> None:
    raised(peer, "TypeError", "does not support item assignment")
    assert found["value"].shape == (2, 6)
    assert not found["value"].any()


@check
def a_value_of_another_invoke_without_a_barrier(peer: Outcome, found: Outcome) -> None:
    raised(peer, "NameError")
    model, clean = plain("model"), []
    layer, first, second = (
        model.transformer.h[1],
        *(
            tokenizer()(f"The {name} is in the city of", return_tensors="pt")
            for name in ("Eiffel Tower", "Space Needle")
        ),
    )

    def patch(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = clean[0]
        return output

    with torch.no_grad():
        handle = layer.register_forward_hook(lambda _module, _inputs, output: clean.append(output[:, -1]))
        model(**first)
        handle.remove()
        handle = layer.register_forward_hook(patch)
        wanted = model(**second).logits[:, -1]
        handle.remove()
    torch.testing.assert_close(found["value"], wanted, atol=1e-4, rtol=1e-4)


@check
def a_trace_and_an_invoke_in_one_with(peer: Outcome, found: Outcome) -> None:
    raised(peer, "AttributeError")
    found_there: list[torch.Tensor] = []
    layer = plain("model").transformer.h[1]
    handle = layer.register_forward_hook(lambda _module, _inputs, output: found_there.append(output))
    with torch.no_grad():
        plain("model")(**tokenizer()("The Eiffel Tower is in the city of", return_tensors="pt"))
    handle.remove()
    torch.testing.assert_close(found["value"], found_there[0], atol=1e-4, rtol=1e-4)


@check
def gradients_in_the_order_of_the_forward(peer: Outcome, found: Outcome) -> None:
    raised(peer, "OutOfOrderError", ".grad.i0")
    net = plain("net")
    early = net.layers[0](ONES)
    late = net.layers[1](early.tanh())
    wanted = torch.autograd.grad(net.head(net.layers[2](late.tanh()).tanh()).sum(), (early, late))
    torch.testing.assert_close(tuple(found["value"]), wanted)


@check
def a_value_that_was_not_saved(peer: Outcome, found: Outcome) -> None:
    raised(peer, "UnboundLocalError")
    line = "hidden = net.layers[0].output"
    refused(found, line, "`hidden` is a value of the model that was not saved", "way out", kind="UnsavedValueError")


@check
def an_old_value_of_an_unsaved_name(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == 0
    line = "hidden = net.layers[0].output"
    refused(found, line, "`hidden` is a value of the model that was not saved", "way out", kind="UnsavedValueError")


@check
def a_child_of_a_skipped_module(peer: Outcome, found: Outcome) -> None:
    raised(peer, "OutOfOrderError")
    refused(found, "hidden = model.transformer.h[1].mlp.output.save()", "skip", "way out")


@check
def values_are_attached(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] is True
    assert found["value"] is False


@check
def a_cache_after_a_read(peer: Outcome, found: Outcome) -> None:
    raised(peer, "ValueError", "must be declared before")
    assert torch.equal(found["value"], states(plain("net"), ONES)[1])


@check
def a_value_of_a_wrong_shape(peer: Outcome, found: Outcome) -> None:
    raised(peer, "RuntimeError", "mat1 and mat2 shapes")
    refused(found, "net.layers[1].output = torch.zeros(2, 5)", "shape [2, 5]", "gives [2, 6]", "way out")


@check
def a_value_of_another_dtype(peer: Outcome, found: Outcome) -> None:
    raised(peer, "RuntimeError", "same dtype")
    net = plain("net")
    with torch.no_grad():
        assert torch.equal(found["value"], net.head(net.layers[2](torch.zeros(2, 6)).tanh()))


@check
def an_edited_view(peer: Outcome, found: Outcome) -> None:
    raised(peer, "AttributeError", "tuple")
    assert found["value"].shape == (2, 6)
    assert not found["value"].any()


@check
def a_try_in_a_body(peer: Outcome, found: Outcome) -> None:
    net = plain("net")
    with torch.no_grad():
        wanted = net.head(net.layers[2]((net.layers[0](ONES) * 2).tanh()).tanh())
    assert torch.equal(peer["value"], wanted)
    refused(found, "try:", "cannot surround part of a forward", "way out")


@check
def a_body_on_the_line_of_the_with(peer: Outcome, found: Outcome) -> None:
    raised(peer, "ValueError", "must start on its own line")
    with torch.no_grad():
        assert torch.equal(found["value"], plain("net")(ONES))


@check
def more_steps_than_tokens(peer: Outcome, found: Outcome) -> None:
    raised(peer, "UnboundLocalError", "counted")
    assert any("cut short" in text for text in peer["warnings"])
    reason = "steps 0 to 3, but max_new_tokens=2 ends the generation before"
    refused(found, "for _ in tracer.iter[:4]:", reason, "way out", kind="RunError")


@check
def an_end_before_the_asked_for_step(peer: Outcome, found: Outcome) -> None:
    raised(peer, "UnboundLocalError", "counted")
    assert any("cut short" in text for text in peer["warnings"])
    raised(found, "RunError", "loud.py:", "min_new_tokens")


@check
def the_next_step(peer: Outcome, found: Outcome) -> None:
    raised(peer, "AttributeError", "next")
    inputs = tokenizer()("The Eiffel Tower is in the city of", return_tensors="pt")
    ids = plain("model").generate(**inputs, max_new_tokens=3, min_new_tokens=3)[0, -3:]
    assert found["value"] == list(ids[:2])


@check
def a_plain_call_after_a_trace(peer: Outcome, found: Outcome) -> None:
    assert peer["value"][0] == [True, True, True]
    assert found["value"] == [[False, False, False], [2, 6]]


@check
def four_threads(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] is True
    assert found["value"] is False


@check
def an_unknown_keyword(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == [1, 8, 1007]
    raised(found, "TraceArgumentError", "takes no `ouput_attentions`", "did you mean `output_attentions`")


@check
def an_unknown_module(peer: Outcome, found: Outcome) -> None:
    raised(peer, "AttributeError")
    refused(found, "hidden = net.layer[0].output.save()", "Net has no `layer`; did you mean layers?")


@check
def a_return_in_a_body(peer: Outcome, found: Outcome) -> None:
    raised(peer, "SyntaxError")
    refused(found, "return net.output", "return cannot leave an undecorated block", "way out")
    found = run(nnsight_compiler.intervene(_returning), ["net"], nnsight_compiler)
    with torch.no_grad():
        assert torch.equal(found["value"], plain("net")(ONES))


def _returning(net):
    with net.trace(ONES):
        return net.output


@check
def a_write_that_nothing_can_notice(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == [2, 6]
    refused(found, "net.layers[2].output[:] = 0", "this write can reach nothing", "way out")
