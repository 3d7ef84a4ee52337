"""Generation: what happens at which step, against HuggingFace's `generate` under hooks that count steps by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, LanguageModel, NNsight, RunError, intervene

StepHook = tuple[str, str, Callable[[int, Any], Any]]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
PROMPT = torch.tensor([[5, 17, 42, 3, 88, 9]])


def generated(module: nn.Module, prompt: torch.Tensor, *hooks: StepHook, **options: Any) -> Any:
    """The plain `generate`, under hooks `(path, "output" | "input", function)` that are given the step and the value;
    what they return replaces it, unless it is `None`. A step is a forward of the whole module."""
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    handles = [module.register_forward_pre_hook(count)]
    for path, port, function in hooks:
        target = module.get_submodule(path)
        if port == "output":
            handles.append(target.register_forward_hook(lambda _m, _a, out, f=function: f(step, out)))
        else:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], f: Any = function) -> Any:
                new = f(step, args[0])
                return None if new is None else ((new, *args[1:]), kwargs)

            handles.append(target.register_forward_pre_hook(before, with_kwargs=True))
    try:
        return module.generate(prompt, attention_mask=torch.ones_like(prompt), **{**GREEDY, **options})
    finally:
        for handle in handles:
            handle.remove()


def values(module: nn.Module, path: str, *hooks: StepHook, **options: Any) -> list[torch.Tensor]:
    """What a module returns at each step."""
    found: list[torch.Tensor] = []

    def keep(step: int, out: Any) -> None:
        found.append((out if isinstance(out, torch.Tensor) else out[0]).clone())

    generated(module, PROMPT, *hooks, (path, "output", keep), **options)
    return found


def experiment(body: str, header: str = "model, x") -> Any:
    """An experiment of this body, in a generation of five tokens."""
    lines = "\n".join(f"        {line}" for line in body.strip("\n").split("\n"))
    start = "with model.generate(x, max_new_tokens=5, min_new_tokens=5, do_sample=False) as tracer:"
    return intervene.from_source(f"import torch\n\ndef use({header}):\n    {start}\n{lines}\n    return out\n")


def equal(found: Any, wanted: Any) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# --- without intervention ---


@pytest.mark.parametrize("options", [GREEDY, {"max_new_tokens": 5, "do_sample": True}])
def test_tokens_are_those_of_the_plain_model(either: Any, options: dict[str, Any]) -> None:
    model, plain, _ = either
    torch.manual_seed(3)
    wanted = plain.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    torch.manual_seed(3)
    with model.generate(PROMPT, **options) as tracer:
        found = tracer.result.save()
    assert torch.equal(found, wanted)
    if options["do_sample"]:
        assert torch.random.get_rng_state().equal(_state_after(plain, options))


def _state_after(plain: Any, options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(3)
    plain.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    return torch.random.get_rng_state()


def test_a_seed_of_its_own(model: LanguageModel, plain_gpt2: nn.Module) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    torch.manual_seed(11)
    wanted = plain_gpt2.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    before = torch.random.get_rng_state()
    with model.generate(PROMPT, seed=11, **options) as tracer:
        found = tracer.result.save()
    assert torch.equal(found, wanted)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_result_with_more_than_ids(model: LanguageModel, plain_gpt2: nn.Module) -> None:
    wanted = generated(plain_gpt2, PROMPT, return_dict_in_generate=True, output_scores=True)
    with model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, output_scores=True) as tracer:
        result = tracer.result.save()
    assert torch.equal(result.sequences, wanted.sequences)
    assert equal(result.scores, wanted.scores)


def test_several_prompts_in_one_generation(tiny: LanguageModel) -> None:
    texts = ["The Eiffel Tower is in the city of", "Paris"]
    encoded = tiny._prepare((texts,), {})[1]
    given = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    wanted = tiny._module.generate(**given, max_new_tokens=4, do_sample=False)
    with tiny.generate(texts, max_new_tokens=4, do_sample=False) as tracer:
        widths = [].save()
        for _ in tracer.iter[:]:
            widths.append(tiny.layers[0].output.shape)
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)
    assert widths[0][:2] == given["input_ids"].shape
    assert set(widths[1:]) == {(2, 1, 128)}


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


# --- loops over steps ---


def test_a_value_of_every_step(either: Any) -> None:
    model, plain, layers = either
    acts = experiment("out = []\nfor step in tracer.iter[:]:\n    out.append(model.layers[1].output)")(model, PROMPT)
    wanted = values(plain, f"{layers}.1")
    assert equal(acts, wanted)
    assert [each.shape[1] for each in acts] == [6, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ("iter[:]", [0, 1, 2, 3, 4]), ("iter[1:]", [1, 2, 3, 4]), ("iter[:2]", [0, 1]), ("iter[1:3]", [1, 2]),
        ("iter[2]", [2]), ("iter[[0, 3]]", [0, 3]), ("all()", [0, 1, 2, 3, 4]), ("iter[2:3]", [2]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["for step in", "with"])
def test_which_steps(model: Any, plain_gpt2: Any, steps: str, wanted: list[int], form: str) -> None:
    head = f"for step in tracer.{steps}:" if form != "with" else f"with tracer.{steps} as step:"
    text = f"out = []\n{head}\n    out.append((step, model.lm_head.output[:, -1]))"
    found = experiment(text)(model, PROMPT)
    assert [step for step, _ in found] == wanted
    held = values(plain_gpt2, "lm_head")
    assert equal([value for _, value in found], [held[step][:, -1] for step in wanted])


def test_steps_given_as_arguments(model: Any) -> None:
    use = experiment("out = []\nfor step in tracer.iter[a:b]:\n    out.append(step)", "model, x, a, b")
    assert use(model, PROMPT, 1, 4) == [1, 2, 3]
    assert use(model, PROMPT, 0, None) == [0, 1, 2, 3, 4]
    listed = experiment("out = []\nfor step in tracer.iter[steps]:\n    out.append(step)", "model, x, steps")
    assert listed(model, PROMPT, [0, 2]) == [0, 2]
    assert listed(model, PROMPT, [1]) == [1]


def test_writes_in_a_loop(either: Any) -> None:
    model, plain, layers = either
    vector = torch.linspace(-1, 1, 32)
    text = "for step in tracer.iter[1:4]:\n    model.layers[1].output[:, -1] += v * step\nout = tracer.result"
    found = experiment(text, "model, x, v")(model, PROMPT, vector)

    def steer(step: int, out: torch.Tensor) -> None:
        if 1 <= step < 4:
            out[:, -1] += vector * step

    assert torch.equal(found, generated(plain, PROMPT, (f"{layers}.1", "output", steer)))


def test_a_later_module_read_before_an_earlier_one_is_written(model: Any, plain_gpt2: Any) -> None:
    text = """
out = []
for step in tracer.iter[1:3]:
    out.append(model.layers[3].output)
    model.layers[0].output[:] *= -2
"""
    found = experiment(text)(model, PROMPT)

    def change(step: int, value: torch.Tensor) -> torch.Tensor | None:
        return value * -2 if step in (1, 2) else None

    assert equal(found, values(plain_gpt2, "transformer.h.3", ("transformer.h.0", "output", change))[1:3])


def test_what_a_step_hands_to_the_next(model: Any, plain_gpt2: Any) -> None:
    text = """
last, total, seen = None, 0, []
for step in tracer.iter[:]:
    h = model.layers[2].output[:, -1]
    if last is not None:
        model.layers[3].output[:, -1] = model.layers[3].output[:, -1] + last
    last = h
    total = total + step
    seen.append(h.norm())
out = (torch.stack(seen), total, last, tracer.result)
"""
    norms, total, last, ids = experiment(text)(model, PROMPT)
    held: list[torch.Tensor] = []

    def keep(step: int, value: torch.Tensor) -> None:
        held.append(value[:, -1].clone())

    def add(step: int, value: torch.Tensor) -> None:
        if step:
            value[:, -1] += held[step - 1]

    wanted = generated(plain_gpt2, PROMPT, ("transformer.h.2", "output", keep), ("transformer.h.3", "output", add))
    assert torch.equal(ids, wanted)
    assert torch.equal(norms, torch.stack([each.norm() for each in held]))
    assert total == 10
    assert torch.equal(last, held[-1])


def test_conditions_on_the_step(model: Any, plain_gpt2: Any) -> None:
    text = """
for step in tracer.iter[:]:
    if step == 2:
        model.layers[1].output[:] = 0
    elif step > 2:
        model.layers[0].output[:, -1] *= 3
out = tracer.result
"""
    found = experiment(text)(model, PROMPT)

    def clear(step: int, value: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(value) if step == 2 else None

    def scale(step: int, value: torch.Tensor) -> torch.Tensor | None:
        return value * 3 if step > 2 else None

    hooks = ("transformer.h.1", "output", clear), ("transformer.h.0", "output", scale)
    assert torch.equal(found, generated(plain_gpt2, PROMPT, *hooks))


@pytest.mark.parametrize("word", ["break", "continue"])
@pytest.mark.parametrize("before", [True, False])
def test_jumps(model: Any, plain_gpt2: Any, word: str, before: bool) -> None:
    append = "    out.append((step, model.layers[1].output))"
    jump = f"    if step == 2:\n        {word}"
    lines = [jump, append] if before else [append, jump + "\n    model.layers[0].output[:] *= -1"]
    text = "\n".join(["out = []", "for step in tracer.iter[:]:", *lines, "out.append((9, tracer.result))"])
    found = experiment(text)(model, PROMPT)

    def gone(step: int) -> bool:
        return step >= 2 if word == "break" else step == 2

    def change(step: int, value: torch.Tensor) -> torch.Tensor | None:
        return value * -1 if not before and not gone(step) else None

    hook: StepHook = ("transformer.h.0", "output", change)
    held = values(plain_gpt2, "transformer.h.1", hook)
    if before:
        steps = [step for step in range(5) if not gone(step)]
    else:
        steps = [0, 1, 2] if word == "break" else [0, 1, 2, 3, 4]
    assert [step for step, _ in found] == [*steps, 9]
    assert equal([value for _, value in found[:-1]], [held[step] for step in steps])
    assert torch.equal(found[-1][1], generated(plain_gpt2, PROMPT, hook))


def test_a_jump_that_a_value_decides(model: Any, plain_gpt2: Any) -> None:
    text = """
out, token = [], None
for step in tracer.iter[:]:
    token = int(model.lm_head.output[0, -1].argmax())
    if token == stop:
        break
    out.append(token)
out.append(token)
"""
    ids = generated(plain_gpt2, PROMPT)[0, 6:].tolist()
    stop = ids[2]
    found = experiment(text, "model, x, stop")(model, PROMPT, stop)
    assert found == ids[: ids.index(stop) + 1]


def test_a_layer_that_the_step_chooses(model: Any, plain_gpt2: Any) -> None:
    text = "out = []\nfor step in tracer.iter[:4]:\n    out.append(model.layers[step].output)"
    found = experiment(text)(model, PROMPT)
    assert equal(found, [values(plain_gpt2, f"transformer.h.{step}")[step] for step in range(4)])


def test_layers_inside_and_loops_beside(model: Any, plain_gpt2: Any) -> None:
    text = """
out, sums = [], []
for step in tracer.iter[:3]:
    for layer in model.layers[:2]:
        out.append(layer.output)
for step in tracer.iter[:]:
    sums.append(model.layers[3].output.sum())
for layer in model.layers[2:]:
    for step in tracer.iter[1:2]:
        out.append(layer.output)
out = (out, sums)
"""
    first, sums = experiment(text)(model, PROMPT)
    held = [values(plain_gpt2, f"transformer.h.{number}") for number in range(4)]
    wanted = [held[layer][step] for step in range(3) for layer in (0, 1)] + [held[2][1], held[3][1]]
    assert len(first) == len(wanted)
    assert sorted(each.sum().item() for each in first) == sorted(each.sum().item() for each in wanted)
    assert equal(sums, [each.sum() for each in held[3]])


def test_a_loop_inside_a_loop(model: Any, plain_gpt2: Any) -> None:
    text = """
out = []
for outer in tracer.iter[0:2]:
    for inner in tracer.iter[2:4]:
        out.append((outer, inner, model.layers[0].output))
"""
    with pytest.raises(CompileError, match="this happens at"):
        experiment(text)(model, PROMPT)  # the second round of the outer loop would append at step 2 again
    text = """
out, again = [], []
for outer in tracer.iter[0:2]:
    out.append(model.layers[1].output)
    for inner in tracer.iter[outer + 2]:
        again.append(model.layers[0].output)
out = (out, again)
"""
    out, again = experiment(text)(model, PROMPT)
    assert equal(out, values(plain_gpt2, "transformer.h.1")[:2])
    assert equal(again, values(plain_gpt2, "transformer.h.0")[2:4])


def test_next(model: Any, plain_gpt2: Any) -> None:
    text = """
first = model.layers[0].output
tracer.next()
second = model.layers[0].output
model.layers[1].output[:] = 0
tracer.next()
third = model.layers[0].output
out = (first, second, third, tracer.result)
"""
    *found, ids = experiment(text)(model, PROMPT)

    def clear(step: int, value: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(value) if step == 1 else None

    hook: StepHook = ("transformer.h.1", "output", clear)
    assert equal(found, values(plain_gpt2, "transformer.h.0", hook)[:3])
    assert torch.equal(ids, generated(plain_gpt2, PROMPT, hook))
    text = "out = [model.layers[0].output]\nfor _ in range(2):\n    out.append(model.layers[0].next().output)"
    assert equal(experiment(text)(model, PROMPT), values(plain_gpt2, "transformer.h.0")[:3])


def test_code_after_every_loop_runs(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
out = 0
for step in tracer.iter[:]:
    out = out + model.layers[0].output.sum()
print("after", step)
for step in tracer.iter[1:3]:
    pass
print("end")
"""
    experiment(text)(model, PROMPT)
    assert capsys.readouterr().out == "after 4\nend\n"


def test_undecorated_blocks(model: Any, plain_gpt2: Any) -> None:
    seen = []
    with model.generate(PROMPT, **GREEDY) as tracer:
        acts = list().save()
        count = 0
        for step in tracer.iter[:]:
            acts.append(model.layers[1].output)
            seen.append(step)
            unsaved = model.layers[0].output
            count += 1
        stacked = torch.stack([each[:, -1] for each in acts]).save()
        ids = tracer.result.save()
    held = values(plain_gpt2, "transformer.h.1")
    assert equal(acts, held)
    assert seen == [0, 1, 2, 3, 4]
    assert count == 5
    assert torch.equal(stacked, torch.stack([each[:, -1] for each in held]))
    assert torch.equal(ids, generated(plain_gpt2, PROMPT))
    with pytest.raises(ExperimentError, match="`unsaved` is a value of the model that was not saved"):
        unsaved + 1


# --- outside of loops ---


def test_reads_happen_once_and_writes_at_every_step(either: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain, layers = either
    text = """
h = model.layers[0].output
print("norm", h.shape[1])
model.layers[1].output = model.layers[1].output * 1.5 + h.mean()
model.layers[2].output[:, -1] += v
out = (h, model.layers[2].output, tracer.result)
"""
    vector = torch.linspace(-3, 3, 32)
    first, last, ids = experiment(text, "model, x, v")(model, PROMPT, vector)
    assert capsys.readouterr().out == "norm 6\n"
    mean = torch.tensor(0.0)

    def note(step: int, value: torch.Tensor) -> None:
        nonlocal mean
        mean = value.mean()

    def scale(step: int, value: torch.Tensor) -> torch.Tensor:
        return value * 1.5 + mean

    def steer(step: int, value: torch.Tensor) -> None:
        value[:, -1] += vector

    hooks = [(f"{layers}.{n}", "output", hook) for n, hook in enumerate((note, scale, steer))]
    assert torch.equal(ids, generated(plain, PROMPT, *hooks))
    assert torch.equal(first, values(plain, f"{layers}.0", *hooks)[0])
    assert torch.equal(last, values(plain, f"{layers}.2", *hooks)[0])


@pytest.mark.parametrize(
    ("index", "given", "where"),
    [
        (":, 2", None, "prompt"), (":, -1", None, "each"), (":", None, "each"), ("..., -1, :", None, "each"),
        (":, 1:", None, "prompt"), (":, :3", None, "prompt"), (":, -2:", None, "each"), (":, [0, 2]", None, "prompt"),
        (":, i", 2, "prompt"), (":, i", -1, "each"), (":, i", [0, 3], "prompt"), (":, i", torch.tensor([-1]), "each"),
        (":, i:", 3, "prompt"), (":, i", torch.arange(6) > 3, "prompt"), ("0, i", -1, "each"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["assign", "augment", "method"])
def test_positions_of_the_prompt_and_of_each_step(
    model: Any, plain_gpt2: Any, index: str, given: Any, where: str, form: str
) -> None:
    if form == "method" and not re.fullmatch(r"[:0.]+, (-?\d|i:|1:|:3|-2:|i)(, :)?|:", index):
        pytest.skip("an item by a list is a copy")
    if form == "method" and isinstance(given, (list, torch.Tensor)):
        pytest.skip("an item by a list is a copy")
    line = {"assign": f"h[{index}] = v", "augment": f"h[{index}] += v", "method": f"h[{index}].mul_(v)"}[form]
    vector = torch.linspace(-2, 2, 32)
    found = experiment(f"h = model.layers[1].output\n{line}\nout = tracer.result", "model, x, v, i")(
        model, PROMPT, vector, given
    )

    def write(step: int, h: torch.Tensor) -> None:
        if step == 0 or where == "each":
            exec(line, {"h": h, "v": vector, "i": given})

    assert torch.equal(found, generated(plain_gpt2, PROMPT, ("transformer.h.1", "output", write)))


@pytest.mark.parametrize("index", ["2", "i"])
def test_what_was_read_at_a_prompt_position_is_written_at_every_step(model: Any, plain_gpt2: Any, index: str) -> None:
    text = (
        f"source = model.layers[0].output[:, {index}] * 2\nmodel.layers[2].output[:, -1] = source\nout = tracer.result"
    )
    for given in (2, -1) if index == "i" else (2,):
        found = experiment(text, "model, x, i")(model, PROMPT, given)
        held: list[torch.Tensor] = []

        def keep(step: int, value: torch.Tensor, held: Any = held, given: int = given) -> None:
            if step == 0 or given < 0:
                held.append(value[:, given] * 2)

        def put(step: int, value: torch.Tensor, held: Any = held) -> None:
            value[:, -1] = held[-1]

        hooks = ("transformer.h.0", "output", keep), ("transformer.h.2", "output", put)
        assert torch.equal(found, generated(plain_gpt2, PROMPT, *hooks))


def test_writes_under_conditions_and_in_loops(model: Any, plain_gpt2: Any) -> None:
    text = """
h = model.layers[0].output
if h[:, -1].sum() > limit:
    h[:, -1] *= -1
    print("above")
for k in range(2):
    model.layers[2].output[:, -1] += k + 1
noise = torch.randn(32)
model.layers[3].output[:, -1] += noise
out = tracer.result
"""
    held = [each[:, -1].sum() for each in values(plain_gpt2, "transformer.h.0")]
    limit = torch.stack(held).median().item()
    torch.manual_seed(0)
    found = experiment(text, "model, x, limit")(model, PROMPT, limit)

    def turn(step: int, value: torch.Tensor) -> None:
        if value[:, -1].sum() > limit:
            value[:, -1] *= -1

    def count(step: int, value: torch.Tensor) -> None:
        value[:, -1] += 1
        value[:, -1] += 2

    def noise(step: int, value: torch.Tensor) -> None:
        value[:, -1] += torch.randn(32)

    torch.manual_seed(0)
    hooks = [(f"transformer.h.{n}", "output", hook) for n, hook in ((0, turn), (2, count), (3, noise))]
    assert torch.equal(found, generated(plain_gpt2, PROMPT, *hooks))


# --- the end of a generation ---


def test_an_end_of_sequence_before_the_asked_for_step(model: Any, plain_gpt2: Any) -> None:
    ids = generated(plain_gpt2, PROMPT)[0, 6:].tolist()
    ending = ids[1]
    length = ids.index(ending) + 1
    options = {"max_new_tokens": 5, "eos_token_id": ending, "pad_token_id": 0, "do_sample": False}
    with model.generate(PROMPT, **options) as tracer:
        seen = list().save()
        for step in tracer.iter[:]:
            seen.append(step)
        out = tracer.result.save()
    assert seen == list(range(length))
    assert out.shape[1] == 6 + length
    use = intervene.from_source(
        "def use(model, x, options):\n    with model.generate(x, **options) as tracer:\n"
        "        for step in tracer.iter[0:5]:\n            out = model.layers[0].output\n    return out\n"
    )
    with pytest.raises(RunError) as found:
        use(model, PROMPT, options)
    text = str(found.value)
    assert re.match(r"<from_source \w+>:3:\d+: ", text)
    assert (
        f"this is meant for steps 0 to 4, but the generation ended at an end of sequence after step {length - 1}"
        in text
    )
    assert "`min_new_tokens=5` makes it go on" in text
    assert not plain_gpt2.transformer.h[0]._forward_hooks


def test_steps_that_cannot_come_are_refused_before_the_model_runs(model: Any) -> None:
    ran = []
    handle = model._module.register_forward_pre_hook(lambda *_: ran.append(1))
    use = intervene.from_source(
        "def use(model, x):\n    with model.generate(x, max_new_tokens=2) as tracer:\n"
        "        for step in tracer.iter[1:4]:\n            out = model.layers[0].output\n    return out\n"
    )
    with pytest.raises(RunError, match="steps 1 to 3, but max_new_tokens=2 ends the generation before"):
        use(model, PROMPT)
    handle.remove()
    assert not ran


# --- tokens as they come ---


def test_tokens_are_handed_to_a_function(model: Any, plain_gpt2: Any) -> None:
    seen: list[torch.Tensor] = []

    def note(ids: torch.Tensor) -> None:
        seen.append(ids)
        model(PROMPT)  # the plain model: what the experiment writes is not seen there

    with model.generate(PROMPT, **GREEDY, on_token=note) as tracer:
        model.layers[0].output[:] *= 2
        out = tracer.result.save()
    assert torch.equal(torch.stack(seen, 1), out[:, 6:])

    def twice(step: int, value: torch.Tensor) -> torch.Tensor:
        return value * 2

    assert torch.equal(out, generated(plain_gpt2, PROMPT, ("transformer.h.0", "output", twice)))


def test_tokens_alone_are_reason_to_generate_and_to_write(model: Any, plain_gpt2: Any) -> None:
    def told(model, x, note, streamer, strength):
        with model.generate(x, max_new_tokens=4, do_sample=False, on_token=note, streamer=streamer):
            model.layers[0].output[:] *= strength

    class Pieces(list[int]):
        def put(self, ids: torch.Tensor) -> None:
            self.extend(ids.flatten().tolist())

        def end(self) -> None:
            pass

    def twice(step: int, value: torch.Tensor) -> torch.Tensor:
        return value * 2

    truth = generated(plain_gpt2, PROMPT, ("transformer.h.0", "output", twice))[0, 6:10].tolist()
    seen: list[int] = []
    pieces = Pieces()
    told = intervene(told)
    told(model, PROMPT, lambda ids: seen.append(ids.item()), None, 2)
    told(model, PROMPT, None, pieces, 2)
    assert seen == pieces[6:] == truth


def test_a_streamer_is_passed_on(model: Any) -> None:
    class Kept:
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.over = False

        def put(self, ids: torch.Tensor) -> None:
            self.pieces.append(ids.flatten().tolist())

        def end(self) -> None:
            self.over = True

    streamer = Kept()
    with model.generate(PROMPT, **GREEDY, streamer=streamer) as tracer:
        out = tracer.result.save()
    assert streamer.pieces == [PROMPT[0].tolist(), *([int(each)] for each in out[0, 6:])]
    assert streamer.over


# --- mistakes ---


@pytest.mark.parametrize(
    ("body", "reason", "way_out"),
    [
        ("for s in tracer.iter[-1]: out = 1", "there is no step -1", "count from 0"),
        ("for s in tracer.iter[0:-1]: out = 1", "there is no step -1", "count from 0"),
        ("for s in tracer.iter[::2]: out = 1", "steps go one by one, not by 2", "tracer.iter[[0, 2, 4]]"),
        ("for s in tracer.iter[2:2]: out = 1", "`tracer.iter[2:2]` is over no step", "tracer.iter[:]"),
        ("for s in tracer.iter[[]]: out = 1", "`tracer.iter[[]]` is over no step", "tracer.iter[:]"),
        ("for s in tracer.iter['a']: out = 1", "a step is a whole number, not 'a'", "tracer.iter[:]"),
        ("for s in tracer.iter: out = 1", "which steps are meant is not said", "tracer.iter[:]"),
        ("for i, s in enumerate(tracer.iter[:]): out = 1", "not through `enumerate`", "for step in tracer.iter"),
        ("out = list(tracer.iter[:])", "steps of a generation are looped over", "for step in tracer.iter"),
        ("for s in tracer.iter[:]: out = model.layers[s].output", "this loop has no end", "`tracer.iter[0:5]`"),
        (
            "model.layers[0].output[:] = model.layers[1].next().output", "this happens at step 0, but needs what"
            " happens at step 1", "use it after the loop",
        ),
        (
            "h = model.layers[0].output\nfor s in tracer.iter[:]: h[:] = 0\nout = tracer.result", "was read at another",
            "at the step",
        ),
        ("if model.layers[0].output.sum() > 0: tracer.next()\nout = 1", "a value that only the run gives", "iter[1]"),
        ("for s in tracer.iter[:]: tracer.next()\nout = 1", "would mean two steps at once", "name the step"),
        ("model.layers[0].output[:, [0, -1]] = 0\nout = tracer.result", "with negative numbers", "two lines"),
    ],
)  # fmt: skip
def test_mistakes_in_the_body(model: Any, body: str, reason: str, way_out: str) -> None:
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        experiment(body)(model, PROMPT)
    assert "way out" in str(found.value)
    assert way_out in str(found.value)
    assert found.value.diagnostics[0].span.line >= 5


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("max_new_token=3", "`generate` of GPT2LMHeadModel takes no `max_new_token`; did you mean `max_new_tokens`?"),
        ("assistant_model=model", "`assistant_model` is refused: in assisted decoding a forward checks several tokens"),
        ("prefill_chunk_size=2", "`prefill_chunk_size` is refused: the prompt would run in several forwards"),
        ("guidance_scale=2.0", "`guidance_scale` is refused: the model would run more than once for a token"),
        ("grad=True", "`grad` is refused: a generation records no gradients"),
        ("backend=1", "`generate` takes no backend here"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(model: Any, argument: str, reason: str) -> None:
    header = f"    with model.generate(x, {argument}) as tracer:\n"
    text = f"def use(model, x):\n{header}        out = tracer.result\n    return out\n"
    with pytest.raises(CompileError, match=re.escape(reason)) as found:
        intervene.from_source(text)(model, PROMPT)
    assert found.value.diagnostics[0].span.line == 2
    with pytest.raises(ExperimentError, match=re.escape(reason)):
        eval(f"model.generate(x, {argument})", {"model": model, "x": PROMPT})


def test_a_generation_config_is_looked_into(model: Any, plain_gpt2: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=3, guidance_scale=3.0, eos_token_id=0)
    with pytest.raises(ExperimentError, match="of the generation config is refused"):  # noqa: SIM117
        with model.generate(PROMPT, generation_config=config) as tracer:
            tracer.result.save()


def test_a_generation_without_with(model: Any) -> None:
    with pytest.raises(ExperimentError, match=re.escape("`.generate(…)` without `with` runs nothing")) as found:
        model.generate(PROMPT, max_new_tokens=2)
    assert "save `tracer.result`" in str(found.value)


def test_a_module_that_does_not_generate() -> None:
    with pytest.raises(ExperimentError, match="Linear has no `generate`"):
        NNsight(nn.Linear(2, 2)).generate(torch.ones(1, 2))


def test_a_failing_body_leaves_the_model_as_it_was(model: Any, plain_gpt2: Any) -> None:
    def check(step: int) -> None:
        if step == 2:
            raise ValueError("stop here")

    use = experiment(
        "for step in tracer.iter[:]:\n    check(step)\n    model.layers[0].output[:] = 0\nout = 1", "model, x, check"
    )
    with pytest.raises(ValueError, match="stop here"):
        use(model, PROMPT, check)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in plain_gpt2.modules())


def test_explain_tells_what_happens_at_which_step() -> None:
    use = intervene.from_source("""
def use(model, x):
    with model.generate(x, max_new_tokens=4) as tracer:
        model.layers[1].output[:, -1] *= 2
        for step in tracer.iter[1:3]:
            h = model.layers[0].output
        for step in tracer.iter[:]:
            print(step)
        out = tracer.result
    return out, h
""")
    text = str(use.explain(LanguageModel("tiny"), "The Eiffel Tower"))
    assert "reads transformer.h.0 output at steps 1 to 2" in text
    assert "writes transformer.h.1 output at step 0; writes transformer.h.1 output at every step from 1" in text
    assert "generates to its end; gives what it returns" in text
