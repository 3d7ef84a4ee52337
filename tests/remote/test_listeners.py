"""Functions that are called with tokens stay with the caller, and are given what a plain generation gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_compiler import ExperimentError, FileError, LanguageModel, RunError, intervene
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.printer import print_program
from nnsight_compiler.remote.backends import LocalBackend
from nnsight_compiler.remote.listeners import keep_listeners
from nnsight_compiler.runtime.tokens import Listener, hearing

PROMPT = "The Eiffel Tower is in the city of"
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture(scope="module")
def plain(model: LanguageModel) -> torch.Tensor:
    """The tokens that HuggingFace's own `generate` adds, with the first block's output doubled."""
    handle = model._module.transformer.h[0].register_forward_hook(
        lambda _, __, out: out * 2 if isinstance(out, torch.Tensor) else (out[0] * 2, *out[1:])
    )
    ids = model.tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = model._module.generate(**ids, **GREEDY, pad_token_id=0)
    handle.remove()
    return made[:, ids["input_ids"].shape[1] :]


class Shown:
    """Keeps what it is given, and can be sent nowhere."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.lock = open(__file__)  # noqa: SIM115  what no file can hold

    def feed(self, ids: torch.Tensor) -> None:
        self.seen.append(ids)


@pytest.fixture
def shown() -> Any:
    made = Shown()
    yield made
    made.lock.close()


def test_a_function_that_is_given_as_an_argument(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    @intervene
    def doubled(model, prompt, note):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=note) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        return ids

    ids = doubled(model, PROMPT, shown.feed, remote="local")
    assert torch.equal(torch.stack(shown.seen, 1), plain)
    assert torch.equal(ids[:, -4:], plain)


def test_a_method_of_an_object_from_around(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    @intervene
    def doubled(model, prompt):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=shown.feed) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        return ids

    doubled(model, PROMPT, remote="local")
    assert torch.equal(torch.stack(shown.seen, 1), plain)


def test_a_block(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    with model.generate(PROMPT, **GREEDY, on_token=shown.feed, remote="local") as tracer:
        model.layers[0].output[:] *= 2
        ids = tracer.result.save()
    assert torch.equal(torch.stack(shown.seen, 1), plain)
    assert torch.equal(ids[:, -4:], plain)


def test_a_method_of_a_list_that_is_not_sent_itself(model: LanguageModel, plain: torch.Tensor) -> None:
    @intervene
    def doubled(model, prompt, note):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=note) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        return ids

    seen, more = [], []
    doubled(model, PROMPT, seen.append, remote="local")
    with model.generate(PROMPT, **GREEDY, on_token=more.append, remote="local"):
        model.layers[0].output[:] *= 2
    assert torch.equal(torch.stack(seen, 1), plain)
    assert torch.equal(torch.stack(more, 1), plain)


def test_two_generations_with_a_function_each(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    other: list[int] = []

    @intervene
    def both(model, prompt, first, second):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=first) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        with model.generate(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False, on_token=second):
            pass
        return ids

    both(model, PROMPT, shown.feed, lambda ids: other.append(ids.item()), remote="local")
    assert torch.equal(torch.stack(shown.seen, 1), plain)
    prompt = model.tokenizer(PROMPT, return_tensors="pt")
    alone = model._module.generate(**prompt, **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}, pad_token_id=0)
    assert other == alone[0, -2:].tolist()


def test_what_the_program_makes_itself_is_sent_with_it(model: LanguageModel, plain: torch.Tensor) -> None:
    seen: list[Any] = []

    @intervene
    def doubled(model, prompt, kept):
        own = []
        with model.generate(
            prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=kept.append
        ) as tracer:
            model.layers[0].output[:] *= 2
            tracer.result.save()
        with model.generate(
            prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=lambda ids: own.append(ids + 1)
        ):
            model.layers[0].output[:] *= 2
        return torch.stack(kept, 1), own

    stacked, own = doubled(model, PROMPT, seen, remote="local")
    assert torch.equal(stacked, plain)
    assert torch.equal(torch.stack(own, 1), plain + 1)
    assert torch.equal(torch.stack(seen, 1), plain)  # the caller's own list


class FullError(Exception):
    pass


def test_what_it_raises_ends_the_job(model: LanguageModel) -> None:
    seen: list[int] = []

    def note(ids: torch.Tensor) -> None:
        seen.append(ids.item())
        if len(seen) == 2:
            raise FullError("enough")

    with (
        pytest.raises(FullError, match="enough"),
        model.generate(PROMPT, **GREEDY, on_token=note, remote="local") as tracer,
    ):
        tracer.result.save()
    assert len(seen) == 2


def test_code_of_the_callers_between_generations(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    @intervene
    def parts(model, prompt, note, count):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=note) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        shown.feed(ids)
        strength = count(ids)
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=shown.feed):
            model.layers[0].output[:] *= strength

    own: list[torch.Tensor] = []
    for _ in range(2):
        own.clear()
        shown.seen.clear()
        parts(model, PROMPT, lambda ids: own.append(ids), lambda ids: 2, remote="local")
        assert torch.equal(torch.stack(own, 1), plain)
        assert torch.equal(shown.seen[0][:, -4:], plain)
        assert torch.equal(torch.stack(shown.seen[1:], 1), plain)


def test_a_session_of_blocks(model: LanguageModel, plain: torch.Tensor, shown: Shown) -> None:
    with model.session(remote="local"):
        with model.trace(PROMPT):
            factor = 1 + (model.layers[0].output * 0 + 1).mean()
        with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False, on_token=shown.feed) as tracer:
            model.layers[0].output[:] *= factor
            ids = tracer.result.save()
    assert torch.equal(torch.stack(shown.seen, 1), plain)
    assert torch.equal(ids[:, -4:], plain)


def test_nobody_waits_for_tokens_of_what_does_not_block(model: LanguageModel) -> None:
    @intervene
    def told(model, prompt, note):
        with model.generate(prompt, max_new_tokens=1, on_token=note) as tracer:
            ids = tracer.result
        return ids

    with pytest.raises(ExperimentError, match=r"with `blocking=False` nobody waits for them\n  way out: leave one"):
        told(model, PROMPT, Shown.feed, remote="local", blocking=False)


def test_tokens_for_no_function_of_the_job_are_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, job: Any, on_token: Any = None) -> bytes:
        on_token(1, torch.tensor([5]))
        return b""

    monkeypatch.setattr(LocalBackend, "run", run)
    with (
        pytest.raises(FileError, match="tokens came for function 1 of a job that has 1"),
        model.generate(PROMPT, **GREEDY, on_token=print_no, remote="local") as tracer,
    ):
        tracer.result.save()


def print_no(ids: torch.Tensor) -> None:
    raise AssertionError


def test_a_listener_that_nobody_hears() -> None:
    with pytest.raises(RunError, match="nobody listens\n  way out: leave `on_token=` out"):
        Listener(0)(torch.tensor([1]))
    told: list[Any] = []
    with hearing(lambda number, ids: told.append((number, ids))):
        Listener(3)(torch.tensor([1, 2]))
        for wrong in (torch.ones(2, 2, dtype=torch.long), torch.ones(2), [1]):
            with pytest.raises(RunError, match="takes the id of one for each row"):
                Listener(0)(wrong)
    assert told == [(3, [1, 2])]


# --- text in, text out ---


class Holder:
    feed = staticmethod(print_no)


def kept(text: str, **names: Any) -> tuple[str, tuple[Any, ...]]:
    program = parse_program(text)
    values = {parameter.value.name: names.get(parameter.value.name) for parameter in program.parameters}
    found = keep_listeners(program, values, names, {})
    return print_program(found.program).replace("  # ", "").strip(), found.functions


GENERATE = """  forward %f = generate %m('a', on_token=ARGUMENT)
    stop %f
  return """

REPLACED = {
    "a function": (
        "experiment e(%m)\n  %g = global note\n" + GENERATE.replace("ARGUMENT", "%g") + "None",
        "experiment e(%m)\n  %on_token = free _listener_0\n" + GENERATE.replace("ARGUMENT", "%on_token") + "None",
    ),
    "a method, of what has other uses": (
        "experiment e(%m)\n  %g = global holder\n  %0 = attr %g.feed\n  %1 = attr %g.other\n"
        + GENERATE.replace("ARGUMENT", "%0")
        + "%1",
        "experiment e(%m)\n  %g = global holder\n  %1 = attr %g.other\n  %on_token = free _listener_0\n"
        + GENERATE.replace("ARGUMENT", "%on_token")
        + "%1",
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_number_stands_for_a_function(name: str) -> None:
    before, after = REPLACED[name]
    assert kept(before, note=print_no, holder=Holder()) == (after, (print_no,))


LEFT = {
    "of a list": "experiment e(%m)\n  %g = global seen\n  %0 = attr %g.append\n" + GENERATE.replace("ARGUMENT", "%0"),
    "of a name that is assigned": "experiment e(%m)\n  %g = global note\n  set_global note = None\n"
    + GENERATE.replace("ARGUMENT", "%g"),
    "nothing": "experiment e(%m)\n" + GENERATE.replace("ARGUMENT", "None"),
    "a builtin": "experiment e(%m)\n  %g = global print\n" + GENERATE.replace("ARGUMENT", "%g"),
    "of a trace": "experiment e(%m)\n  %g = global note\n"
    + GENERATE.replace("ARGUMENT", "%g").replace("generate", "trace"),
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_in_the_program(name: str) -> None:
    text = LEFT[name] + "None"
    assert kept(text, note=print_no, seen=[]) == (text, ())


def test_what_a_generation_returns_goes_on_to_code_of_the_callers(model: LanguageModel, plain: torch.Tensor) -> None:
    @intervene
    def counted(model, prompt, count):
        with model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
            model.layers[0].output[:] *= 2
            ids = tracer.result
        return count(ids)

    assert counted(model, PROMPT, lambda ids: ids[:, -4:].tolist(), remote="local") == plain.tolist()
