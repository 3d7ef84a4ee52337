"""Experiments through the whole wire format, in this process: what comes back is what a plain run gives."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import nnsight_compiler
from nnsight_compiler import CompileError, ExperimentError, LanguageModel, NNsight, UnsavedValueError, intervene
from nnsight_compiler.figures import in_bytes
from nnsight_compiler.ir.errors import FileError, RunError
from nnsight_compiler.remote import routing
from nnsight_compiler.remote.backends import LocalBackend
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import pack, unpack
from nnsight_compiler.remote.outside import sent
from nnsight_compiler.remote.results import read_result

CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny", dispatch=True)


def stream(model: LanguageModel, prompt: str, layer: int, change: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's output, and the logits, by plain hooks; `change` replaces the output."""
    plain, kept = model._wrapped, []

    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        held = out if isinstance(out, torch.Tensor) else out[0]
        new = held if change is None else change(held.clone())
        kept.append(held.clone())
        return new if isinstance(out, torch.Tensor) else (new, *out[1:])

    handle = plain.transformer.h[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = plain(**model.tokenizer(prompt, return_tensors="pt")).logits
    finally:
        handle.remove()
    return kept[0], logits


@intervene
def patch(model, clean, corrupt, layer, position):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


def test_an_experiment(tiny: LanguageModel) -> None:
    source = stream(tiny, CLEAN, 1)[0]

    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1] = source[:, -1]
        return hidden

    wanted = stream(tiny, CORRUPT, 1, change)[1][:, -1].softmax(-1)
    found = patch(tiny, CLEAN, CORRUPT, layer=1, position=-1, remote="local")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_block(tiny: LanguageModel) -> None:
    with tiny.trace(CLEAN, remote="local"):
        hidden = tiny.layers[1].output.save()
        lost = tiny.layers[0].output
        width = hidden.shape[-1]
        logits = tiny.output.logits.save()
    wanted = stream(tiny, CLEAN, 1)
    torch.testing.assert_close(hidden, wanted[0])
    torch.testing.assert_close(logits, wanted[1])
    assert width == wanted[0].shape[-1]
    with pytest.raises(UnsavedValueError, match=r"test_local.py:\d+:\d+: `lost` is a value of the model"):
        lost + 1


@intervene
def says_so(model, prompt, where):
    with model.session(remote=where):
        with model.trace(prompt):
            hidden = model.layers[0].output
        with model.trace(prompt):
            model.layers[1].output = hidden
            logits = model.lm_head.output
    return logits


def test_where_the_source_says(tiny: LanguageModel) -> None:
    first = stream(tiny, CLEAN, 0)[0]
    wanted = stream(tiny, CLEAN, 1, lambda _: first)[1]
    torch.testing.assert_close(says_so(tiny, CLEAN, "local"), wanted)
    torch.testing.assert_close(says_so(tiny, CLEAN, None), wanted)
    with pytest.raises(CompileError, match=re.escape('`remote=` is True, a URL such as "http://localhost:8473"')):
        says_so(tiny, CLEAN, "elsewhere")


# --- what a run is given, and what it changes ---

VECTOR = torch.zeros(128)
FOUND: list[Any] = []
SEEN: dict[str, Any] = {"count": 0}


@intervene
def changes(model, prompt, own, rows):
    with model.trace(prompt):
        model.layers[1].output += VECTOR
        top = model.lm_head.output[0, -1].max()
        FOUND.append(top)
    VECTOR.add_(1)
    own[0] = own
    rows[1].mul_(2)
    SEEN["count"] = SEEN["count"] + 1
    SEEN["last"] = rows[1]
    return VECTOR, rows, top


def test_what_is_changed_is_changed_here(tiny: LanguageModel) -> None:
    VECTOR.zero_()
    FOUND.clear()
    SEEN.clear()
    SEEN.update(count=0)
    base, own = torch.arange(6.0).reshape(2, 3), {0: None}
    rows = [base[0], base[1]]
    vector, held, top = changes(tiny, CLEAN, own, rows, remote="local")
    assert vector is VECTOR
    assert held is rows
    assert own[0] is own
    assert rows[1].tolist() == [6.0, 8.0, 10.0]
    assert base[1].tolist() == [6.0, 8.0, 10.0]
    assert [top] == FOUND
    assert SEEN["count"] == 1
    assert SEEN["last"] is rows[1]
    assert VECTOR.tolist() == [1.0] * 128
    torch.testing.assert_close(top, stream(tiny, CLEAN, 1)[1][0, -1].max())


LOG: list[str] = []


def noted(value):
    LOG.append("seen")
    return value * 2


@intervene
def by_a_helper(model, prompt):
    with model.trace(prompt):
        hidden = noted(model.layers[0].output)
    return hidden


def test_what_a_helper_changes(tiny: LanguageModel) -> None:
    LOG.clear()
    wanted = stream(tiny, CLEAN, 0)[0] * 2
    for count in (1, 2, 3):
        torch.testing.assert_close(by_a_helper(tiny, CLEAN, remote="local"), wanted)
        assert ["seen"] * count == LOG


@intervene
def learns(model, prompt, delta):
    for _ in range(3):
        with model.trace(prompt):
            model.layers[1].output += delta
            loss = model.lm_head.output[0, -1].logsumexp(-1)
            loss.backward()
        with torch.no_grad():
            delta -= 0.1 * delta.grad
            delta.grad.mul_(0.5)
    return loss.detach()


def test_gradients_stay_with_what_has_them(tiny: LanguageModel) -> None:
    plain = tiny._wrapped
    wanted = torch.zeros(128, requires_grad=True)

    def steered(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        return out + wanted if isinstance(out, torch.Tensor) else (out[0] + wanted, *out[1:])

    for _ in range(3):
        handle = plain.transformer.h[1].register_forward_hook(steered)
        loss = plain(**tiny.tokenizer(CLEAN, return_tensors="pt")).logits[0, -1].logsumexp(-1)
        handle.remove()
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        loss.backward()
        with torch.no_grad():
            wanted.sub_(0.1 * wanted.grad)
            wanted.grad.mul_(0.5)
    delta = torch.zeros(128, requires_grad=True)
    found = learns(tiny, CLEAN, delta, remote="local")
    torch.testing.assert_close(found, loss.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(delta.grad, wanted.grad, atol=1e-5, rtol=1e-4)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)


@intervene
def attached(model, prompt, delta):
    with model.trace(prompt):
        model.layers[1].output += delta
        logits = model.lm_head.output
    return logits


def test_no_gradient_goes_through_a_service(tiny: LanguageModel) -> None:
    logits = attached(tiny, CLEAN, torch.zeros(128, requires_grad=True), remote="local")
    assert logits.requires_grad
    with pytest.raises(RunError, match="this value was computed by a service, and its graph stayed there"):
        logits.sum().backward()
    with torch.no_grad():
        assert not attached(tiny, CLEAN, torch.zeros(128, requires_grad=True), remote="local").requires_grad


# --- modules and functions ---


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(128, 8), nn.Linear(8, 128)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.down(hidden)))


@intervene
def through(model, prompt, coder, score):
    with model.trace(prompt):
        model.layers[1].output = coder(model.layers[1].output)
        logits = model.lm_head.output[0, -1]
    return score(logits)


def test_modules_and_functions_are_given(tiny: LanguageModel) -> None:
    torch.manual_seed(0)
    coder = Coder()
    with torch.no_grad():
        wanted = stream(tiny, CLEAN, 1, coder)[1][0, -1]
    found = through(tiny, CLEAN, coder, lambda logits: logits.topk(2).indices, remote="local")
    assert found.tolist() == wanted.topk(2).indices.tolist()


# --- errors ---


@intervene
def out_of_range(model, prompt, items, index):
    with model.trace(prompt):
        hidden = model.layers[0].output
    return hidden, items[index]


def test_errors_are_those_of_a_plain_run(tiny: LanguageModel) -> None:
    with pytest.raises(IndexError, match="list index out of range") as found:
        out_of_range(tiny, CLEAN, [1, 2], 5, remote="local")
    (note,) = found.value.__notes__
    assert re.search(r"at the service, .*test_local.py:\d+: return hidden, items\[index\]", note)
    with pytest.raises(KeyError, match="'absent'"):
        out_of_range(tiny, CLEAN, {}, "absent", remote="local")
    with pytest.raises(CompileError, match=r"test_local.py:\d+:\d+: .*GPT2LMHeadModel has no `layer`"):
        misspelt(tiny, CLEAN, remote="local")


@intervene
def misspelt(model, prompt):
    with model.trace(prompt):
        hidden = model.layer[0].output
    return hidden


class Unknown:
    def __repr__(self) -> str:
        return "unknown"

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2


UNKNOWN = (
    r"`\.scaled` of an object that the client alone has \(its class `Unknown` defines `__repr__`, which a file cannot"
    r" hold\) needs a live value inside a remote forward"
)


@intervene
def of_an_object(model, prompt, settings):
    with model.trace(prompt):
        hidden = settings.scaled(model.layers[0].output)
    return hidden


COUNT = 0


@intervene
def counts(model, prompt):
    global COUNT
    with model.trace(prompt):
        hidden = model.layers[0].output
    COUNT = 1
    return hidden


def test_what_cannot_be_sent(tiny: LanguageModel) -> None:
    with pytest.raises(CompileError, match=UNKNOWN):
        of_an_object(tiny, CLEAN, Unknown(), remote="local")
    settings = Unknown()
    refused = pytest.raises(CompileError, match=UNKNOWN)
    with refused, tiny.trace(CLEAN, remote="local"):
        settings.scaled(tiny.layers[0].output).save()
    counts(tiny, CLEAN, remote="local")
    assert COUNT == 1
    with pytest.raises(TypeError, match="`blocking=` goes with `remote=`"):
        counts(tiny, CLEAN, blocking=False)
    with pytest.raises(ExperimentError, match='remote="local" runs a job in this process'):
        patch(tiny, CLEAN, CORRUPT, 0, 0, remote="local", blocking=False)


def test_a_block_in_a_function_reads_what_is_around_it(tiny: LanguageModel) -> None:
    import torch.nn.functional as functional
    from torch import relu

    from nnsight_compiler import save

    def twice(value):
        return value * 2

    probe, layer = nn.Linear(128, 2), tiny.layers[1]
    with tiny.trace(CLEAN, remote="local"):
        hidden = layer.output
        found = probe(functional.relu(twice(hidden))).save()
        same = save(probe(relu(hidden * 2)))
    wanted = probe(functional.relu(stream(tiny, CLEAN, 1)[0] * 2))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(same, wanted)


def test_a_session_of_blocks_is_sent_whole(tiny: LanguageModel) -> None:
    refused = pytest.raises(
        FileError, match=r"test_local\.py:\d+:\d+: this is sent whole, and uses code or an object that only this"
    )
    with refused, tiny.session(remote="local"):
        with tiny.trace(CLEAN):
            hidden = tiny.layers[0].output.norm()
        re.escape(str(hidden.item()))
        with tiny.trace(CLEAN):
            tiny.output.save()


def test_any_module_runs_through_the_wire() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model, given = NNsight(plain), torch.randn(2, 4)
    with model.trace(given, remote="local"):
        hidden = model[1].output.save()
        model[1].output = hidden + 1
        out = model.output.save()
    wanted = plain[1](plain[0](given))
    torch.testing.assert_close(hidden, wanted.detach())
    torch.testing.assert_close(out, plain[2](wanted + 1).detach())


def test_a_parameter_of_that_name_is_the_experiments_own(tiny: LanguageModel) -> None:
    @intervene
    def named(model, prompt, remote):
        with model.trace(prompt):
            hidden = model.layers[0].output
        return hidden, remote

    assert named(tiny, CLEAN, remote=3)[1] == 3
    assert nnsight_compiler.intervene is intervene


@intervene
def structured(model, prompt, point):
    with model.trace(prompt) as tracer:
        cache = tracer.cache(modules=[model.layers[0]])
        output = model.output
        best = model.lm_head.output[0, -1].topk(2)
    return output, best, cache, point


class Point(NamedTuple):
    x: float
    y: torch.Tensor


def test_objects_of_known_classes(tiny: LanguageModel) -> None:
    hidden, logits = stream(tiny, CLEAN, 0)
    output, best, cache, point = structured(tiny, CLEAN, Point(1.5, torch.ones(2)), remote="local")
    torch.testing.assert_close(output.logits, logits)
    assert type(output).__name__ == "CausalLMOutputWithCrossAttentions"
    assert best.indices.tolist() == logits[0, -1].topk(2).indices.tolist()
    torch.testing.assert_close(cache["model.transformer.h.0"].output, hidden)
    assert point.x == 1.5
    assert type(point)._fields == ("x", "y")


@intervene
def logits_of(model, prompt):
    with model.trace(prompt):
        logits = model.lm_head.output
    return logits


def test_an_edited_model(tiny: LanguageModel) -> None:
    vector = torch.linspace(-1, 1, 128)
    with tiny.edit() as edited:
        edited.layers[1].output += vector
    for factor in (1, -2):
        vector.mul_(factor)
        wanted = stream(tiny, CLEAN, 1, lambda hidden: hidden + vector)[1]
        torch.testing.assert_close(logits_of(edited, CLEAN, remote="local"), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(tiny, CLEAN, remote="local"), stream(tiny, CLEAN, 1)[1])


def test_a_vector_that_an_edit_and_the_experiment_both_mention(tiny: LanguageModel) -> None:
    vector = torch.linspace(-1, 1, 128)

    def shifted(hidden):
        return hidden + vector

    @intervene
    def twice(model, prompt):
        with model.trace(prompt):
            model.layers[1].output[:] = shifted(model.layers[1].output)
            logits = model.lm_head.output
        return logits

    with tiny.edit() as edited:
        edited.layers[1].output += vector
    wanted = stream(tiny, CLEAN, 1, lambda hidden: hidden + 2 * vector)[1]
    torch.testing.assert_close(twice(edited, CLEAN, remote="local"), wanted, atol=1e-5, rtol=1e-5)


@intervene
def by_own_names(model, prompt):
    with model.trace(prompt):
        hidden = model.blocks[1].output
    return hidden


def test_a_model_with_names_of_ones_own(tiny: LanguageModel) -> None:
    mine = LanguageModel(tiny._wrapped, tokenizer=tiny.tokenizer, rename={"transformer.h": "blocks"})
    executor = Executor(tiny)
    job = sent(by_own_names.ir, {}, {}, {"model": mine, "prompt": CLEAN}, lambda _: "").job
    result = read_result(executor.run(unpack(pack(job))), [None] * len(job.objects + job.code["objects"]))
    torch.testing.assert_close(result, stream(tiny, CLEAN, 1)[0])
    torch.testing.assert_close(by_own_names(mine, CLEAN, remote="local"), stream(tiny, CLEAN, 1)[0])


@intervene
def noisy(model, prompt):
    noise = torch.randn(128)
    with model.trace(prompt):
        model.layers[1].output += noise
        model.layers[2].output += torch.rand_like(model.layers[2].output)
        logits = model.lm_head.output[0, -1]
    return logits, torch.rand(3)


def test_what_is_drawn_is_what_a_plain_run_draws(tiny: LanguageModel) -> None:
    torch.manual_seed(5)
    wanted, after = noisy(tiny, CLEAN), torch.rand(2)
    torch.manual_seed(5)
    found = noisy(tiny, CLEAN, remote="local")
    torch.testing.assert_close(found, wanted)
    assert torch.equal(torch.rand(2), after)


@intervene
def with_pythons_numbers(model, prompt):
    layer = random.randrange(2)
    with model.trace(prompt):
        hidden = model.layers[layer].output
    return layer, hidden


def test_pythons_own_generator_stays_here(tiny: LanguageModel) -> None:
    for seed in (0, 1, 2):
        random.seed(seed)
        layer, hidden = with_pythons_numbers(tiny, CLEAN, remote="local")
        random.seed(seed)
        assert layer == random.randrange(2)
        torch.testing.assert_close(hidden, stream(tiny, CLEAN, layer)[0])


@intervene
def last_position(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[1].output.save()
    return hidden[:, -1]


def test_explain_says_what_crosses_before_anything_is_sent(tiny: LanguageModel) -> None:
    told = last_position.explain(tiny, CLEAN, remote="local")
    (crossing,) = told.crossings
    job = sent(last_position.ir, {}, {}, {"model": tiny, "prompt": CLEAN}, lambda _: "tiny").job
    assert crossing.sends == len(pack(job))
    assert crossing.receives == 128 * 4
    assert f"sends {in_bytes(crossing.sends)}; receives 512 B" in str(told)
    assert told.as_data()["crossings"][0]["receives"] == 512
    assert last_position.explain(tiny, CLEAN).crossings == ()


@intervene
def in_parts(model, prompt, settings):
    with model.trace(prompt):
        hidden = model.layers[1].output[0, -1]
    scaled = settings.scaled(hidden)
    with model.trace(prompt):
        model.layers[1].output[0, -1] = scaled
        logits = model.lm_head.output[0, -1]
    return logits


def test_code_of_the_callers_between_traces(tiny: LanguageModel) -> None:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, -1] *= 2
        return hidden

    wanted = stream(tiny, CLEAN, 1, change)[1][0, -1]
    torch.testing.assert_close(in_parts(tiny, CLEAN, Unknown(), remote="local"), wanted, atol=1e-5, rtol=1e-5)
    first, second = in_parts.explain(tiny, CLEAN, Unknown(), remote="local").crossings
    assert (len(first.gives), second.takes[-1:]) == (1, ("scaled",))
    assert max(first.lines) < min(second.lines)
    with pytest.raises(ExperimentError, match="in_parts is no single job, since some of it runs in this process"):
        in_parts(tiny, CLEAN, Unknown(), remote="local", blocking=False)


class Study:
    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def norm(self, prompt: str) -> Any:
        with self.model.trace(prompt):
            hidden = self.model.layers[1].output.save()
        return hidden.norm()


@intervene
def by_a_method(model, prompt, study):
    return study.norm(prompt)


def test_what_a_method_traces_is_a_job(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = stream(tiny, CLEAN, 1)[0].norm()
    sent_names = []

    class Noting(LocalBackend):
        def run(self, job: Any, on_token: Any = None) -> bytes:
            sent_names.append(job.code["qualified_name"])
            return super().run(job)

    monkeypatch.setattr(routing, "backend_for", lambda remote, model: Noting(tiny))
    torch.testing.assert_close(by_a_method(tiny, CLEAN, Study(tiny)), wanted)
    assert sent_names == []
    torch.testing.assert_close(by_a_method(tiny, CLEAN, Study(tiny), remote="local"), wanted)
    assert sent_names == ["norm"]
    away = LanguageModel("tiny")  # its weights are at a service
    monkeypatch.setattr(away, "_host", "http://localhost:1")
    torch.testing.assert_close(by_a_method(away, CLEAN, Study(away)), wanted)
    assert sent_names == ["norm", "norm"]
