"""What an experiment takes, told before it runs: held against runs, and refused where it is more than it may be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from admitting import Limits, job_of
from torch.utils import _pytree as pytree

from nnsight_compiler import Experiment, LanguageModel, intervene
from nnsight_compiler.ir import errors
from nnsight_compiler.passes.bounded import MOST_OPS_OF_JOBS
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.service.admission import Admitter, Cost, NotAdmittedError

PROMPT = "The Eiffel Tower is in"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tiny")


def admit(experiment: Experiment, given: dict[str, Any], limits: Limits) -> Cost:
    return Admitter(Executor(given["model"])).admit(job_of(experiment, given), limits).cost


# --- experiments as they are meant to be: what is told before is what the run then takes ---


def patch(model, prompt, layer=1):
    with model.trace(prompt):
        source = model.layers[layer].output[:, -1]
    with model.trace("The Colosseum is in"):
        model.layers[layer].output[:, -1] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


def lens(model, prompt):
    with model.trace(prompt):
        streams = [layer.output for layer in model.layers]
    return torch.stack(streams), streams[0]


def each_layer(model, prompt):
    found = {}
    for number in range(3):
        with model.trace(prompt):
            model.layers[number].mlp.output = 0
            found[number] = model.lm_head.output[:, -1]
    return found


def positions(model, prompt):
    kept = []
    for position in range(100):
        with model.trace(prompt):
            model.layers[0].output[:, position % 2] = 0
            last = model.layers[2].output[:, -1]
        kept.append(last)
    return kept


def nested(model, prompt):
    rows = []
    for scale in (0.5, 1.0):
        row = []
        for number in range(70):
            with model.trace(prompt):
                model.layers[1].output[:] *= scale + number
                row.append(model.lm_head.output[0, -1, :10])
        rows.append(row)
    return rows


def sums(model, prompt):
    total = torch.zeros(128)
    for _ in range(80):
        with model.trace(prompt):
            total = total + model.layers[1].output[0, -1]
    return total


def grows(model, prompt):
    rows = torch.zeros(0, 128)
    for _ in range(10):
        rows = torch.cat([rows, torch.zeros(3, 128)])
    return rows


def of_no_model(model, prompt):
    return [(number, "ab" * 3, None) for number in range(200)], torch.arange(12).expand(5, 12)


def generated(model, prompt):
    with model.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
        ids = tracer.result
    return ids


def written(found: Any) -> int:
    """The bytes of all tensors of a result, by the run itself."""
    tensors = {id(each): each for each in pytree.tree_leaves(found) if isinstance(each, torch.Tensor)}
    return sum(each.untyped_storage().nbytes() for each in tensors.values())


@pytest.mark.parametrize("function", [patch, lens, each_layer, positions, nested, sums, grows, of_no_model])
def test_what_is_told_is_what_the_run_takes(model: LanguageModel, function: Callable[..., Any]) -> None:
    experiment = intervene(function, without="all")
    told = admit(experiment, {"model": model, "prompt": PROMPT, **extra(function)}, Limits())
    found = experiment(model, PROMPT)
    assert experiment.last_run is not None
    assert told.forwards == len(experiment.last_run.forwards)
    assert told.open == ()
    tensors = written(found)
    entries = sum(1 for _ in leaves(found))
    assert tensors <= told.result_bytes <= tensors + 80 * entries
    if told.forwards:
        assert told.flops is not None
        assert told.flops > 0
        assert told.rows == told.forwards
        assert told.peak_bytes > 0


def extra(function: Callable[..., Any]) -> dict[str, Any]:
    return {"layer": 1} if function is patch else {}


def leaves(found: Any) -> Iterator[Any]:
    yield found
    if isinstance(found, (list, tuple, dict)):
        for each in found.values() if isinstance(found, dict) else found:
            yield from leaves(each)


def test_a_peak_is_that_of_the_run(model: LanguageModel) -> None:
    experiment = intervene(patch, without="all")
    told = admit(experiment, {"model": model, "prompt": PROMPT, "layer": 1}, Limits())
    experiment.measure(model, PROMPT)
    assert experiment.last_run is not None
    peaks = [each.measured.peak for each in experiment.last_run.forwards if each.measured is not None]
    assert told.peak_bytes == pytest.approx(max(peaks), rel=0.1)
    flops = [each.measured.flops for each in experiment.last_run.forwards if each.measured is not None]
    assert told.flops == pytest.approx(sum(flops), rel=0.02)


def test_a_generation_counts_for_the_steps_that_it_may_take(model: LanguageModel) -> None:
    told = admit(intervene(generated), {"model": model, "prompt": PROMPT}, Limits())
    assert told.forwards == 4
    assert told.flops is None
    assert re.search(r"how many steps a generation takes is known only when it runs \(.*\.py:\d+:\d+\)", told.open[0])


def test_what_only_a_run_can_tell_is_named(model: LanguageModel) -> None:
    @intervene
    def until(model, prompt):
        best = 0.0
        while best < 3:
            with model.trace(prompt):
                best = best + model.layers[0].output.abs().mean() + 1
        return best

    told = admit(until, {"model": model, "prompt": PROMPT}, Limits())
    assert told.open[0].startswith("how often a loop runs is known only when it does (")


def test_rounds_that_may_end_early_are_not_counted(model: LanguageModel) -> None:
    @intervene
    def search(model, prompt):
        for _ in range(10**6):
            with model.trace(prompt):
                norm = model.layers[0].output.norm()
            if norm > 0:
                break
        return norm

    told = admit(search, {"model": model, "prompt": PROMPT}, Limits())
    assert told.forwards <= 1
    assert told.open


def test_a_branch_that_is_not_taken_takes_nothing(model: LanguageModel) -> None:
    @intervene
    def rarely(model, prompt):
        found = []
        for number in range(10**5):
            if number % 50000 == 0:
                with model.trace(prompt):
                    found.append(model.layers[0].output[0, -1, 0])
        return found

    told = admit(rarely, {"model": model, "prompt": PROMPT}, Limits())
    assert told.forwards <= 2


# --- bombs ---


def empty(model, prompt):
    return torch.empty(10**12)  # memory


def expanded(model, prompt):
    wide = torch.zeros(1).expand(10**12)
    return (wide + 1).sum()  # memory


def outer(model, prompt):
    line = torch.zeros(10**6)
    return torch.outer(line, line).sum()  # memory


def outer_by_hand(model, prompt):
    line = torch.zeros(10**6)
    return (line[:, None] * line).sum()  # memory


def of_the_model(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[0].output
        large = hidden.repeat(1, 10**7, 1).sum()  # memory
    return large


def arange(model, prompt):
    return torch.arange(10**12).sum()  # memory


def repeated(model, prompt):
    return torch.zeros(10).repeat_interleave(10**12).sum()  # memory


def one_hot(model, prompt):
    return torch.nn.functional.one_hot(torch.zeros(100, dtype=torch.long), 10**10).sum()  # memory


def listed(model, prompt):
    return [0] * 10**12  # memory


def numbers(model, prompt):
    return list(range(10**12))  # memory


def spread(model, prompt):
    return [*range(10**12)]  # memory


def text(model, prompt):
    return "a" * 10**10  # memory


def padded(model, prompt):
    return "a".zfill(10**11)  # memory


def zeros(model, prompt):
    return bytes(10**11)  # memory


def power(model, prompt):
    return 2**10**9  # number


def shifted(model, prompt):
    return 1 << 10**11  # number


def rounds(model, prompt):
    total = 0
    for number in range(10**12):  # seconds
        total = total + number
    return total


def rounds_of_rounds(model, prompt):
    total = 0
    for _ in range(10**6):
        for number in range(10**6):  # seconds
            total = total + number
    return total


def doubled(model, prompt):
    line = torch.zeros(10)
    for _ in range(50):
        line = torch.cat([line, line])  # memory
    return line.sum()


def appended(model, prompt):
    line = torch.zeros(10)
    for _ in range(10**9):  # memory
        line = torch.cat([line, torch.zeros(10)])
    return line.sum()


def nested_lists(model, prompt):
    held = [[[torch.zeros(100) for _ in range(1000)] for _ in range(1000)] for _ in range(1000)]  # memory
    return len(held)


def many_saves(model, prompt):
    kept = []
    for _ in range(10**6):
        with model.trace(prompt):  # forwards
            for layer in model.layers:
                kept.append(layer.output)
    return len(kept)


def many_tokens(model, prompt):
    with model.generate(prompt, max_new_tokens=10**9) as tracer:  # forwards
        ids = tracer.result
    return ids


def too_much_back(model, prompt):
    kept = []
    for number in range(900):
        with model.trace(prompt):
            hidden = model.layers[1].output
        kept.append(hidden.repeat(100, 2, 1) + number)
    return kept  # result


def a_branch_that_may_run(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[0].output
        if hidden.sum() > 0:
            hidden = torch.empty(10**12)  # memory
    return hidden.sum()


BOMBS = [
    empty, expanded, outer, outer_by_hand, of_the_model, arange, repeated, one_hot, listed, numbers, spread, text,
    padded, zeros, power, shifted, rounds, rounds_of_rounds, doubled, appended, nested_lists, many_saves, many_tokens,
    too_much_back, a_branch_that_may_run,
]  # fmt: skip
SAYS = {
    "memory": r"this takes .* of memory, and 4 GiB are allowed",
    "number": r"this takes 1.* of memory, and 1 MiB are allowed",
    "seconds": r"the rounds of this loop take 20,00[01] s at least, and 600 s are allowed",
    "forwards": r"this runs the model 1,000,000(,000)? times, and 1,000 are allowed",
    "result": r"this gives back \d+ MiB, and 256 MiB are allowed",
}


@pytest.mark.parametrize("function", BOMBS)
def test_bombs_are_refused_by_their_lines(model: LanguageModel, function: Callable[..., Any]) -> None:
    source = lines_of(function)
    (number, kind) = next((n, line.rpartition("# ")[2]) for n, line in source if "  # " in line)
    begun = time.process_time()
    with pytest.raises(NotAdmittedError) as caught:
        admit(intervene(function), {"model": model, "prompt": PROMPT}, Limits())
    assert time.process_time() - begun < 3
    error = caught.value
    told = [each for each in error.diagnostics if each.span.line == number]
    assert told, str(error)
    assert re.fullmatch(SAYS[kind], told[0].reason)
    assert error.status == (413 if kind == "result" else 422)
    assert error.op
    record = error.record()
    assert record["op"] == error.op
    assert record["kind"] == "ExperimentError"
    assert {"file": __file__, "line": number, "text": dict(source)[number].strip()} in record["where"]


def lines_of(function: Callable[..., Any]) -> list[tuple[int, str]]:
    code = function.__code__
    with open(__file__, encoding="utf-8") as stream:
        held = stream.read().splitlines()
    first = code.co_firstlineno
    last = max(line for _, _, line in code.co_lines() if line is not None)
    return [(number, held[number - 1]) for number in range(first, last + 1)]


def a_text(model, prompt):
    with model.trace(prompt):
        for letter in "abcde" * 1000:  # unrolled
            hidden = model.layers[ord(letter) % 3].output
    return hidden


def a_range(model, prompt):
    found = []
    for number in range(5000):  # unrolled
        with model.trace(prompt):
            found.append(model.layers[number % 3].output[0, -1, 0])
    return found


def numbers_of_numbers(model, prompt):
    found = []
    for layer in range(3):  # unrolled
        for number in range(1000):
            with model.trace(prompt):
                model.layers[(layer + number) % 3].output[:, -1] = 0
                found.append(model.lm_head.output[0, -1, 0])
    return found


@pytest.mark.parametrize("function", [a_text, a_range, numbers_of_numbers])
def test_what_is_unrolled_too_far_is_refused_at_once(model: LanguageModel, function: Callable[..., Any]) -> None:
    (line,) = (number for number, text in lines_of(function) if text.endswith("  # unrolled"))
    begun = time.process_time()
    with pytest.raises(NotAdmittedError) as caught:
        admit(intervene(function), {"model": model, "prompt": PROMPT}, Limits(forwards=10**6))
    assert time.process_time() - begun < 3
    (told,) = caught.value.diagnostics
    assert (told.span.file, told.span.line) == (__file__, line)
    assert told.reason == (
        f"this loop names modules, so that it is unrolled round by round, and comes to more than {MOST_OPS_OF_JOBS:,}"
        " ops"
    )
    assert told.way_out.startswith("go over fewer modules at once, in several calls, and keep what names no module")


def patchscope(model, prompt):
    found = []
    for source in range(12):
        for target in range(12):
            with model.trace(prompt):
                held = model.layers[source % 3].output[:, -1]
            with model.trace("The Colosseum is in"):
                model.layers[target % 3].output[:, -1] = held
                found.append(model.lm_head.output[0, -1, 7])
    return found


def test_a_sweep_over_pairs_of_layers_is_admitted(model: LanguageModel) -> None:
    assert admit(intervene(patchscope), {"model": model, "prompt": PROMPT}, Limits()).forwards > 144


def test_limits_are_those_of_the_tenant(model: LanguageModel) -> None:
    given = {"model": model, "prompt": PROMPT}
    told = admit(intervene(lens), given, Limits())
    admit(intervene(lens), given, Limits(max_result_bytes=told.result_bytes, memory_bytes=told.peak_bytes, forwards=1))
    with pytest.raises(NotAdmittedError) as caught:
        admit(intervene(lens), given, Limits(max_result_bytes=told.result_bytes - 1))
    assert caught.value.status == 413
    with pytest.raises(NotAdmittedError, match=r"this takes .* of memory") as caught:
        admit(intervene(lens), given, Limits(memory_bytes=told.peak_bytes - 1))
    assert caught.value.status == 422
    with pytest.raises(NotAdmittedError, match="this runs the model 3 times, and 2 are allowed"):
        admit(intervene(each_layer), given, replace(Limits(), forwards=2))


# --- mistakes ---


def test_mistakes_have_their_lines(model: LanguageModel) -> None:
    @intervene
    def wrong(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[7].output
        return hidden

    with pytest.raises(NotAdmittedError, match="the experiment does not compile:") as caught:
        admit(wrong, {"model": model, "prompt": PROMPT}, Limits())
    assert caught.value.status == 422
    record = caught.value.record()
    assert record["kind"] == "CompileError"
    assert record["module"] == errors.__name__
    (where,) = record["where"]
    assert where["line"] == wrong._function.__code__.co_firstlineno + 3
    assert where["text"] == "hidden = model.layers[7].output"
    assert f"{__file__}:{where['line']}:22: " in record["message"]


def test_shapes_are_checked(model: LanguageModel) -> None:
    @intervene
    def wrong(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[1].output + torch.zeros(127)
        return hidden

    with pytest.raises(NotAdmittedError, match="128") as caught:
        admit(wrong, {"model": model, "prompt": PROMPT}, Limits())
    assert caught.value.status == 422


def test_nothing_runs(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[int] = []

    def note(*_: object) -> None:
        ran.append(1)

    handle = model._module.register_forward_hook(note)
    held: list[int] = []

    @intervene
    def loud(model, prompt, held):
        print("here")
        held.append(1)
        with model.trace(prompt):
            hidden = model.layers[1].output
        return hidden

    try:
        admit(loud, {"model": model, "prompt": PROMPT, "held": held}, Limits())
    finally:
        handle.remove()
    assert (held, capsys.readouterr().out) == ([], "")


def test_what_is_added_to_an_argument_counts(model: LanguageModel) -> None:
    @intervene
    def collect(model, prompt, kept):
        for _ in range(900):
            with model.trace(prompt):
                kept.append(model.layers[1].output.repeat(100, 2, 1))

    with pytest.raises(NotAdmittedError, match=r"this gives back \d+ MiB"):
        admit(collect, {"model": model, "prompt": PROMPT, "kept": []}, Limits())


def test_calls_that_are_not_admitted(model: LanguageModel) -> None:
    @intervene
    def reads(model, prompt):
        with model.trace(prompt):
            hidden = model.layers[0].output
        return hidden, len

    job = job_of(reads, {"model": model, "prompt": PROMPT})
    job.code["globals"]["len"] = {"host": "os:system"}
    with pytest.raises(NotAdmittedError, match="this file makes calls that are not admitted") as caught:
        Admitter(Executor(model)).admit(job, Limits())
    assert caught.value.status == 422
    assert caught.value.record()["kind"] == "FileError"
    assert caught.value.record()["where"][0]["text"] == "return hidden, len"


def test_what_a_later_stage_takes_is_left_to_the_run(model: LanguageModel) -> None:
    @intervene
    def chosen(model, prompt):
        with model.trace(prompt):
            which = model.layers[0].output.abs().sum()
        with model.trace(prompt):
            hidden = model.layers[int(which) % 3].output
        return hidden

    told = admit(chosen, {"model": model, "prompt": PROMPT}, Limits())
    assert any(
        each.startswith("what follows is known only when the run tells which module this is (") for each in told.open
    )
    assert told.forwards == 1
