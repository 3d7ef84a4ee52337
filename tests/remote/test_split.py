"""Experiments with code of the client's equal the same experiments that are not split."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from two_sides import TwoSides

from nnsight_compiler import Experiment, LanguageModel, intervene
from nnsight_compiler.ir.errors import CompileError
from nnsight_compiler.ir.verifier import verify

PROMPTS = ["The tower stands", "a b"]


@pytest.fixture(scope="module")
def worker() -> LanguageModel:
    model = LanguageModel("tiny")
    with model.trace("a"):
        pass
    return model


@pytest.fixture
def sides(worker: LanguageModel) -> TwoSides:
    return TwoSides(LanguageModel("tiny"), worker)


class Log:
    """Something that no job can hold."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.stream = io.StringIO()

    def add(self, line: Any) -> int:
        self.lines.append(line if not isinstance(line, torch.Tensor) else line.detach().clone())
        return len(self.lines)


metric = eval("lambda x: round(float(x.detach().sum()), 3)")  # a function without source

settings = SimpleNamespace(layer=2, scale=3.0)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.allclose(one.detach(), other.detach(), rtol=1e-4, atol=1e-5)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def same(sides: TwoSides, function: Callable[..., Any] | Experiment, *args: Callable[[], Any]) -> Any:
    """The result of the split experiment, which equals that of the whole one. Arguments are made twice."""
    whole_args = [make() for make in args]
    whole = (function if isinstance(function, Experiment) else intervene(function))(sides.worker, *whole_args)
    split_args = [make() for make in args]
    result = sides.call(function, *split_args)
    assert equal(result, whole)
    for one, other in zip(split_args, whole_args, strict=True):
        assert equal(getattr(one, "lines", one), getattr(other, "lines", other))
    return result


def prompts() -> list[str]:
    return list(PROMPTS)


# --- what is one job ---


def test_an_experiment_without_code_of_the_clients_is_whole(sides: TwoSides) -> None:
    def whole(model: Any, texts: list[str]) -> Any:
        found = []
        for number, text in enumerate(texts):
            with model.trace(text):
                found.append(model.transformer.h[number].output.save())
        print("done", len(model.transformer.h))
        return torch.stack([each[0, -1] for each in found]).mean(0)

    assert sides.split(whole, sides.client, prompts()) is None


def test_a_tokenizer_of_the_models_is_no_reason_to_split(sides: TwoSides) -> None:
    def whole(model: Any, text: str) -> Any:
        with model.trace(text):
            logits = model.lm_head.output.save()
        return model.tokenizer.decode(logits[0, -1].argmax())

    assert sides.split(whole, sides.client, "a b") is None


# --- before, after and between ---


def test_code_stands_before_after_and_between_forwards(sides: TwoSides) -> None:
    def between(model: Any, log: Any) -> Any:
        log.add("first")
        with model.trace("a b"):
            h = model.transformer.h[1].output.save()
        log.add(h)
        with model.trace("c"):
            model.transformer.h[1].output[:] = h[:, :1] * metric(h)
            logits = model.lm_head.output.save()
        p = logits[0, -1].softmax(-1)
        return log.add(p), p.max()

    same(sides, between, Log)
    assert len(sides.given) == 2


def test_what_is_downloaded_is_what_is_used(sides: TwoSides) -> None:
    def narrow(model: Any, text: str) -> Any:
        with model.trace(text):
            logits = model.lm_head.output.save()
        p = logits[0, -1].softmax(-1)[5]
        return metric(p)

    same(sides, narrow, lambda: "a b")
    ((given,),) = sides.given
    assert given.shape == ()


def test_settings_are_read_ahead_of_the_forward(sides: TwoSides) -> None:
    def ahead(model: Any, text: str) -> Any:
        with model.trace(text):
            h = model.transformer.h[settings.layer].output
            model.lm_head.output[:] = h.mean() * settings.scale
            logits = model.lm_head.output.save()
        return metric(logits)

    same(sides, ahead, lambda: "a b")
    assert sorted(value for value in sides.sent[0] if not isinstance(value, str)) == [2, 3.0]


def test_loops_break_and_go_on(sides: TwoSides) -> None:
    def loops(model: Any, texts: list[str], log: Any) -> Any:
        scores = []
        for number, text in enumerate([*texts, *texts, "never"]):
            if number == 1:
                continue
            with model.trace(text):
                h = model.transformer.h[number % 2].output.save()
            score = metric(h)
            log.add(score)
            if number > 2:
                break
            scores.append((score, h))
        else:
            scores.append("no break")
        count = 0
        while count < 2:
            with model.trace("w"):
                last = model.lm_head.output.norm().save()
            count += log.add(last) > 0
        else:
            scores.append(last)
        return scores, number, h, score

    same(sides, loops, prompts, Log)


def test_a_loop_with_a_way_out_can_be_in_a_segment(sides: TwoSides) -> None:
    def ways(model: Any, texts: list[str], log: Any) -> Any:
        for text in texts:
            log.add(text)
            for layer in range(3):
                with model.trace(text):
                    mean = model.transformer.h[layer].output.mean().save()
                if layer == 1 and len(text) < 5:
                    return "returned", mean
                if layer == 1:
                    break
        return mean

    assert same(sides, ways, prompts, Log)[0] == "returned"
    assert same(sides, ways, lambda: ["a long prompt"], Log).shape == ()


# --- errors ---


def test_variables_survive_an_error(sides: TwoSides) -> None:
    def trying(model: Any, log: Any) -> Any:
        best = None
        for number in range(4):
            try:
                with model.trace("a"):
                    h = model.transformer.h[number % 2].output.save()
                    best = h.sum()
                if log.add(h) == 2:
                    raise ValueError(number)
                found = number
            except ValueError as error:
                log.add(str(error))
                continue
            finally:
                log.add(best)
        return best, found, h

    same(sides, trying, Log)


def test_an_error_has_the_users_line(sides: TwoSides) -> None:
    def failing(model: Any, log: Any) -> Any:
        with model.trace("a"):
            h = model.lm_head.output.save()
        log.add(h)
        return {}["no such key"]

    with pytest.raises(KeyError, match="no such key") as caught:
        sides.call(failing, Log())
    line = failing.__code__.co_firstlineno + 4
    assert [entry.lineno + 1 for entry in caught.traceback if entry.name == "failing"] == [line]


def test_a_variable_without_a_value_is_unbound(sides: TwoSides) -> None:
    def unbound(model: Any, texts: list[str], log: Any) -> Any:
        log.add("begins")
        for text in texts:
            with model.trace(text):
                h = model.lm_head.output.save()
            log.add(h)
        with model.trace("b"):
            model.lm_head.output[:] = h[:, -1:]
            out = model.lm_head.output.save()
        return log.add(out)

    same(sides, unbound, prompts, Log)
    with pytest.raises(UnboundLocalError, match="'h'"):
        sides.call(unbound, [], Log())


# --- functions ---


def plain_helper(model: Any, text: str) -> Any:
    with model.trace(text):
        h = model.lm_head.output.save()
    return h[0, -1]


def mixed_helper(model: Any, text: str, depth: int = 0, log: Any = None) -> Any:
    with model.trace(text):
        h = model.lm_head.output.save()
    found = [metric(h)]
    if log is not None:
        log.add(depth)
    if depth:
        return found + mixed_helper(model, text, depth - 1, log=log)
    return [*found, model.lm_head(model.transformer.ln_f(torch.ones(128))).sum()]


@intervene
def other_experiment(model: Any, text: str, scale: float = 2.0) -> Any:
    with model.trace(text):
        norm = model.lm_head.output.norm().save()
    return norm * scale


def test_helpers_run_where_they_must(sides: TwoSides) -> None:
    def calling(model: Any, texts: list[str], log: Any) -> Any:
        a = [metric(plain_helper(model, text)) for text in texts if log.add(text)]
        b = sum(plain_helper(model, text).sum() for text in texts)
        c = mixed_helper(model, "a", 2, log), mixed_helper(text="b", model=model)
        return a, b, c, other_experiment(model, "c")

    same(sides, calling, prompts, Log)


def test_closures_run_where_they_must(sides: TwoSides) -> None:
    def closing(model: Any, log: Any) -> Any:
        best = 0

        def only_model(text: str) -> Any:
            with model.trace(text):
                h = model.transformer.h[0].output.save()
            return h.sum()

        def both(text: str, *, scale: Any = 2) -> Any:
            nonlocal best
            best += 1
            h = only_model(text)
            log.add(h)
            return h * scale

        first = only_model("a")
        return first, both("b"), both("c", scale=metric(first)), best

    same(sides, closing, Log)


# --- modules of the model ---


def test_modules_cross_by_their_paths(sides: TwoSides) -> None:
    def modules(model: Any, log: Any) -> Any:
        found = []
        head = model.lm_head
        for layer in model.transformer.h:
            log.add(len(found))
            with model.trace("a"):
                h = layer.mlp.output.save()
                logits = head.output.norm().save()
            found.append((h, logits))
        for number, layer in list(enumerate(model.transformer.h))[:2]:
            found.append(metric(layer.ln_1.weight) + number)
        return found

    same(sides, modules, Log)
    assert {path for sent in sides.sent for path in sent if path.startswith("transformer.h.")} == {
        f"transformer.h.{number}" for number in range(len(sides.worker.transformer.h))
    }


def test_gradients_are_one_segment(sides: TwoSides) -> None:
    def gradients(model: Any, log: Any) -> Any:
        log.add("begins")
        with model.trace("a b"):
            h = model.transformer.h[1].output
            loss = model.lm_head.output.sum()
            with loss.backward():
                grad = h.grad.save()
        return metric(grad), grad

    same(sides, gradients, Log)


def test_contexts_hold_on_both_sides(sides: TwoSides) -> None:
    def contexts(model: Any, log: Any) -> Any:
        found = []
        with torch.no_grad():
            log.add(torch.is_grad_enabled())
            with model.trace("a"):
                found.append(torch.is_grad_enabled())
                h = model.lm_head.output.save()
            log.add(h)
        return found, h

    same(sides, contexts, Log)


def test_sessions_and_generations(sides: TwoSides) -> None:
    def session(model: Any, log: Any) -> Any:
        with model.session():
            with model.generate("a b", max_new_tokens=2) as tracer:
                out = tracer.result.save()
            log.add(out)
            with model.trace("c"):
                h = model.transformer.h[0].output.mean().save()
        return log.add(h), h

    same(sides, session, Log)


# --- what is changed in place ---


def test_objects_that_a_segment_changes_stay_the_same_objects(sides: TwoSides) -> None:
    def changing(model: Any, acts: list[Any], log: Any) -> Any:
        log.add(len(acts))
        for text in ("a", "b"):
            with model.trace(text):
                acts.append(model.lm_head.output.norm().save())
        log.add(len(acts))
        return acts

    acts: list[Any] = []
    assert sides.call(changing, acts, Log()) is acts
    same(sides, changing, list, Log)


# --- what is refused ---


def test_a_call_that_needs_a_live_value_is_refused(sides: TwoSides) -> None:
    def live(model: Any, log: Any) -> Any:
        with model.trace("a"):
            h = model.lm_head.output
            model.lm_head.output[:] = metric(h)
        return log.add(1)

    with pytest.raises(CompileError) as caught:
        sides.call(live, Log())
    (found,) = caught.value.diagnostics
    assert (found.span.line, found.span.column) == (live.__code__.co_firstlineno + 3, 38)
    assert found.reason == (
        "the call of `<lambda>`, which is not in the table of known calls, needs a live value inside a remote forward,"
        " but runs on the client"
    )
    assert found.way_out == "move it after the `with`, where its values are there, or use known calls"
    assert sides.given == []


def test_code_that_would_have_to_change_its_order_is_refused(sides: TwoSides) -> None:
    def ordered(model: Any, log: Any) -> Any:
        found = []
        with model.trace("a"):
            found.append(model.lm_head.output.norm().save())
            log.add("within")
        return found

    with pytest.raises(CompileError) as caught:
        sides.call(ordered, Log())
    (found,) = caught.value.diagnostics
    line = ordered.__code__.co_firstlineno
    assert (found.span.line, found.span.column) == (line + 4, 12)
    assert found.reason == (
        "the call of `.add` of an object that the client alone has (in its `.stream`: it is an object of class"
        " `StringIO`, and a file holds tensors, numbers, strings, tuples, lists, dicts, sets, torch modules, functions,"
        " and objects of classes that are plain) stands inside a remote forward, behind what must come before it, but"
        " runs on the client"
    )
    assert [(span.line, text) for span, text in found.related] == [
        (line + 2, "the forward"),
        (line + 3, "this comes before it"),
    ]


def test_a_gradient_of_what_another_part_computed_is_refused(sides: TwoSides) -> None:
    def apart(model: Any, log: Any) -> Any:
        with model.trace("a"):
            loss = model.lm_head.output.sum().save()
        log.add(loss)
        with loss.backward():
            pass

    def called(model: Any, log: Any) -> Any:
        with model.trace("a"):
            loss = model.lm_head.output.sum().save()
        log.add(1)
        loss.backward()

    for function in (apart, called):
        with pytest.raises(CompileError) as caught:
            sides.call(function, Log())
        (found,) = caught.value.diagnostics
        assert found.span.line == function.__code__.co_firstlineno + 4
        assert found.reason == (
            "this is a gradient of what another part of the experiment computes, and values are handed over without"
            " their graph"
        )
        assert found.way_out.startswith("write `with loss.backward():` where the loss is computed")
    assert sides.given == []


def test_gradients_of_the_clients_own_tensors_stay_there(sides: TwoSides) -> None:
    def own(model: Any, log: Any) -> Any:
        vector = torch.ones(3, requires_grad=True)
        log.add(1)
        (vector * vector).sum().backward()
        with model.trace("a"):
            model.lm_head.output[:] = vector.grad.sum()
            h = model.lm_head.output.norm().save()
        return vector.grad, h

    same(sides, own, Log)


# --- more of the language ---


def test_rows_of_a_forward_take_the_clients_settings(sides: TwoSides) -> None:
    def rows(model: Any, log: Any) -> Any:
        log.add(1)
        with model.trace() as tracer:
            with tracer.invoke("a b"):
                h = model.transformer.h[0].output.save()
            with tracer.invoke("c d"):
                for layer in range(2):
                    model.transformer.h[layer].output[:] = settings.scale
                z = model.lm_head.output.norm().save()
        return log.add(h), z

    same(sides, rows, Log)
    assert len(sides.given) == 1


def test_what_the_tokenizer_tells_is_known_before_a_segment(sides: TwoSides) -> None:
    def tokens(model: Any, log: Any) -> Any:
        ids = model.tokenizer("a b c", return_tensors="pt")["input_ids"]
        log.add(ids)
        with model.trace(ids):
            logits = model.lm_head.output.save()
        target = model.tokenizer.encode("b")[0]
        p = logits[0, -1].softmax(-1)[target]
        return log.add(p), len(model.transformer.h), model.config.n_layer

    same(sides, tokens, Log)
    ((given,),) = sides.given
    assert given.shape == ()


def test_edits_are_made_where_they_are_used(sides: TwoSides) -> None:
    def edits(model: Any, log: Any) -> Any:
        with model.edit() as edited:
            edited.transformer.h[0].output[:] = 0
        log.add(1)
        with edited.trace("a"):
            h = edited.lm_head.output.norm().save()
        log.add(h)
        with edited.trace("b"):
            z = edited.lm_head.output.norm().save()
        with model.trace("b"):
            plain = model.lm_head.output.norm().save()
        return h, z, plain

    same(sides, edits, Log)


count = 0


def test_globals_are_set_on_the_client(sides: TwoSides) -> None:
    def counting(model: Any, log: Any) -> Any:
        global count
        count = 1
        with model.trace("a"):
            h = model.lm_head.output.norm().save()
        count += log.add(h)
        with model.trace("b"):
            model.lm_head.output[:] = count
            z = model.lm_head.output.mean().save()
        return count, z

    assert same(sides, counting, Log) == (2, torch.tensor(2.0))
    assert count == 2


def test_conditions_and_loops_on_the_model(sides: TwoSides) -> None:
    def conditions(model: Any, log: Any) -> Any:
        def norm(text: str) -> Any:
            with model.trace(text):
                return model.lm_head.output.norm().save()

        texts = ["a", "b", "c"]
        found = {}
        while norm("a") > 0 and (text := texts.pop()) != "a":
            found[text] = norm(text) if log.add(text) > 1 else None
        print("shown", *found)
        return found["b"], text, [norm(each) for each in "ab" if log.add(each)]

    same(sides, conditions, Log)


# --- what crosses ---


def test_what_crosses_is_told(sides: TwoSides) -> None:
    def crossing(model: Any, texts: list[str], log: Any) -> Any:
        for text in texts:
            with model.trace(text):
                h = model.lm_head.output.save()
            log.add(h)
        return h

    made = sides.split(crossing, sides.client, prompts(), Log())
    assert made is not None
    verify(made.program)
    (found,) = made.describe()
    line = crossing.__code__.co_firstlineno
    assert found.lines == (line + 2, line + 3)
    assert (found.function, found.takes, found.gives) == ("crossing", ("model", "text"), ("h",))


def test_functions_of_its_own_that_read_modules(sides: TwoSides) -> None:
    def reading(model: Any, log: Any) -> Any:
        def last(layer: Any) -> Any:
            return layer.output[0, -1]

        def scaled(vector: Any, factor: float = 2.0) -> Any:
            return vector * factor

        with model.trace("a b"):
            states = [scaled(last(layer)) for layer in model.transformer.h]
        log.add(len(states))
        return states

    same(sides, reading, Log)


class Study:
    """A class with methods that run the model."""

    layer = 1

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.scale = 2.0

    def norm(self, model: Any, text: str, by: float = 1.0) -> Any:
        with model.trace(text):
            hidden = model.transformer.h[self.layer].output
        self.lines.append(text)
        return hidden.norm() * self.scale / by

    def twice(self, model: Any) -> Any:
        with model.session():
            with model.trace("a"):
                hidden = model.transformer.h[0].output[:, -1]
            with model.trace("b c"):
                model.transformer.h[0].output[:, -1] = hidden
                out = model.lm_head.output
        return out, self.norm(model, "d", by=2)

    @staticmethod
    def plain(model: Any, text: str) -> Any:
        with model.trace(text):
            return model.lm_head.output


def test_methods_that_run_the_model(sides: TwoSides) -> None:
    def studying(model: Any, study: Study) -> Any:
        found = [study.norm(model, text) for text in ("a", "b c")]
        return found, study.twice(model), Study.plain(model, "a"), study.lines

    found = same(sides, studying, Study)
    assert found[-1] == ["a", "b c", "d"]
