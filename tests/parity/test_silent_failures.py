"""What fails without a word in nnsight is right here, or refused: oracles are torch and the plain model.

Each test asserts both what nnsight does, so that a version in which it is mended is noticed, and what happens here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awaited import mark
from running import Outcome, names, parameters, run
from subjects import plain, tokenizer

import nnsight_compiler

FILE = Path(__file__).parent / "differences" / "silent.py"
Checks = Callable[[Outcome, Outcome], None]
CHECKS: dict[str, Checks] = {}


def check(function: Checks) -> Checks:
    """Registers what is asserted of the program of the same name: of nnsight's outcome and of ours."""
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark(f"silent.{name}")) for name in names(FILE)])
def test_silent_failure(name: str, theirs: Callable[[str], Outcome], modules: Callable[[Path], Any]) -> None:
    peer = theirs(f"silent.{name}")
    assert "error" not in peer, "nnsight no longer is silent about this"
    program = getattr(modules(FILE), name)
    CHECKS[name](peer, run(program, parameters(program), nnsight_compiler))


def test_every_program_is_checked() -> None:
    assert CHECKS.keys() == set(names(FILE))


def logits(prompt: str, text: str = "model") -> torch.Tensor:
    with torch.no_grad():
        return plain(text)(**tokenizer()(prompt, return_tensors="pt")).logits


def refused(outcome: Outcome, kind: str, line_of: str | None, *texts: str) -> None:
    """Ours raised an error of this kind, at the line that contains `line_of`, with these texts."""
    assert outcome.get("error") == kind, outcome
    for text in texts:
        assert text in outcome["message"]
    if line_of is not None:
        lines = FILE.read_text().splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if line.strip() == line_of]
        assert any(f"silent.py:{number}:" in outcome["message"] for number in numbers), outcome["message"]


PROMPT = "The Eiffel Tower is in the city of"


@check
def a_local_name_is_assigned(peer: Outcome, found: Outcome) -> None:
    torch.testing.assert_close(peer["value"], logits(PROMPT))
    assert not peer["warnings"]
    torch.testing.assert_close(found["value"], logits(PROMPT))
    (warning,) = found["warnings"]
    assert warning.startswith("`hidden` is made from a value of the model and used by nothing")


@check
def a_trace_without_with(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == "nothing"
    refused(found, "ExperimentError", None, "`.trace(…)` without `with` runs nothing", "way out: write `with")


@check
def an_argument_of_generate_given_to_trace(peer: Outcome, found: Outcome) -> None:
    torch.testing.assert_close(peer["value"], logits(PROMPT))
    refused(found, "TraceArgumentError", None, "takes no max_new_tokens", "arguments of `generate`")


@check
def a_number_is_saved(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == [4, 4], "`other` did not come back"
    assert found["value"] == [4, 4, 5]


@check
def a_saved_value_is_written_later(peer: Outcome, found: Outcome) -> None:
    assert not peer["value"].any()
    with torch.no_grad():
        assert torch.equal(found["value"], plain("net").layers[0](torch.ones(2, 6)))


@check
def the_model_writes_over_a_saved_value(peer: Outcome, found: Outcome) -> None:
    with torch.no_grad():
        value = plain("mixed").pairs[0].linear(torch.linspace(-1, 1, 12).reshape(2, 6))
    assert (value < 0).any()
    assert torch.equal(peer["value"], value.relu())
    assert torch.equal(found["value"], value)


@check
def a_write_outside_of_the_steps(peer: Outcome, found: Outcome) -> None:
    assert peer["value"][0] == 9
    assert not (peer["value"][1:] == 9).any()
    assert (found["value"] == 9).all()


@check
def an_edit_in_a_generation(peer: Outcome, found: Outcome) -> None:
    assert not (peer["value"][1:] == 9).any()
    assert (found["value"] == 9).all()


@check
def a_later_module_first_in_a_step(peer: Outcome, found: Outcome) -> None:
    model = copy.deepcopy(plain("model"))
    steps = iter(range(5))
    seen = []

    def zero(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * 0 if next(steps) in (1, 2) else None

    model.transformer.h[0].register_forward_hook(zero)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, -1].argmax(-1)))
    inputs = tokenizer()(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)[0, -5:]
    assert found["value"][0] == [seen[1], seen[2]]
    assert torch.equal(found["value"][1], ids)
    assert not torch.equal(peer["value"][1], ids), "nnsight's write no longer lands a step late"


@check
def code_after_an_open_loop(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] is None
    assert found["value"] == 3


@check
def a_table_with_as_many_rows_as_invokes(peer: Outcome, found: Outcome) -> None:
    table = plain("tabled").table.values * 0.5
    assert table.shape == (2, 3)
    assert torch.equal(torch.cat(peer["value"]), table), "nnsight no longer cuts it into rows"
    assert all(torch.equal(each, table) for each in found["value"])


@check
def the_first_token_under_padding(peer: Outcome, found: Outcome) -> None:
    embed = plain("model").transformer.wte.weight.detach()
    first = tokenizer()("The Space Needle")["input_ids"][0]
    assert torch.equal(peer["value"][0], embed[tokenizer().pad_token_id])
    assert torch.equal(found["value"][0], embed[first])


@check
def a_module_that_runs_twice(peer: Outcome, found: Outcome) -> None:
    assert peer["value"].shape == (2, 6)
    line = "hidden = mixed.shared.output.save()"
    refused(found, "CompileError", line, "`shared` is called 2 times in one forward", "`.calls[0].output`")


@check
def an_operation_that_runs_several_times(peer: Outcome, found: Outcome) -> None:
    with torch.no_grad():
        assert torch.equal(peer["value"], plain("net").layers[0](torch.ones(2, 6)).tanh())
    line = "value = net.source.torch_tanh_0.output.save()"
    refused(found, "CompileError", line, "is called 3 times in one forward", "`.calls[0].output` to `.calls[2].output`")


@check
def an_input_of_the_users_is_written(peer: Outcome, found: Outcome) -> None:
    assert not peer["value"].any()
    assert torch.equal(found["value"], torch.ones(2, 6))


@check
def a_gradient_outside_of_a_backward(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] is None
    refused(found, "CompileError", "gradient = save(hidden.grad)", "way out", "backward")


@check
def a_typo_in_a_new_name(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == [1, 8, 1007]
    refused(found, "RenameError", None, "'transformer.hh' means no module", "did you mean transformer.h")


@check
def a_global_is_assigned(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == 0
    assert found["value"] == 1


@check
def a_name_is_deleted(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == 5
    assert found["value"] == "UnboundLocalError"


@check
def a_cached_value_is_written_later(peer: Outcome, found: Outcome) -> None:
    with torch.no_grad():
        value = plain("mixed").pairs[0].linear(torch.linspace(-1, 1, 12).reshape(2, 6))
    assert torch.equal(peer["value"], value.relu())
    assert torch.equal(found["value"], value)


@check
def row_zero_of_a_tensor(peer: Outcome, found: Outcome) -> None:
    assert peer["value"] == found["value"] == [8, 128]


@check
def a_child_is_edited(peer: Outcome, found: Outcome) -> None:
    assert peer["value"].any()
    assert found.get("error") in ("CompileError", "ModelError", "UnknownModuleError", "OutsideTraceError"), found
