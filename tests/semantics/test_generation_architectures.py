"""Generation on several architectures, and random programs of steps, against hooks written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from random_examples import examples
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, RunError, intervene

PROMPT = torch.tensor([[5, 17, 42, 3, 88, 9, 11]])
SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "bos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def _made(name: str) -> Any:
    torch.manual_seed(0)
    t = transformers
    match name:
        case "gpt2":
            config: Any = t.GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=101, n_positions=64)
        case "llama":
            config = t.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
        case "mistral":
            config = t.MistralConfig(**SIZES, **HEADS, sliding_window=4)
        case "gemma3":
            config = t.Gemma3TextConfig(**SIZES, **HEADS, sliding_window=4)
        case "mamba":
            config = t.MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=3, state_size=8)
        case _:
            config = t.T5Config(
                vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
            return t.T5ForConditionalGeneration(config).eval()
    return t.AutoModelForCausalLM.from_config(config).eval()


LAYERS = {"gpt2": "transformer.h", "mamba": "backbone.layers"}


def hooked(module: nn.Module, prompt: torch.Tensor, hooks: list[tuple[str, Callable[[int, Any], Any]]], **options: Any):
    """`generate` of the plain module, under hooks on what modules return that are given the step."""
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    handles = [module.register_forward_pre_hook(count)]
    for path, function in hooks:
        target = module.get_submodule(path)
        handles.append(target.register_forward_hook(lambda _m, _a, out, f=function: f(max(step, 0), out)))
    try:
        return module.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    finally:
        for handle in handles:
            handle.remove()


def first(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


@pytest.mark.filterwarnings("ignore:.*mamba")
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "mamba"])
def test_steps_on_architectures(name: str) -> None:
    plain = _made(name)
    layers = LAYERS.get(name, "model.layers")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    @intervene
    def use(model: Any, prompt: Any, vector: Any) -> Any:
        with model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False) as tracer:
            model.layers[1].output[:, -1] += vector
            acts = []
            for step in tracer.iter[:]:
                acts.append(model.layers[2].output)
                if step == 3:
                    model.layers[0].output[:] *= 0.5
            ids = tracer.result
        return ids, acts

    vector = torch.linspace(-1, 1, 32)
    ids, acts = use(LanguageModel(plain), PROMPT, vector)
    held: list[torch.Tensor] = []

    def steer(step: int, value: Any) -> None:
        first(value)[:, -1] += vector

    def scale(step: int, value: Any) -> None:
        if step == 3:
            first(value).mul_(0.5)

    hooks = [(f"{layers}.1", steer), (f"{layers}.0", scale)]
    hooks.append((f"{layers}.2", lambda step, value: held.append(first(value).clone())))
    assert torch.equal(ids, hooked(plain, PROMPT, hooks, **options))
    assert len(acts) == 6
    assert all(map(torch.equal, acts, held))


def test_an_encoder_runs_at_step_0_and_its_decoder_at_each() -> None:
    plain = _made("t5")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model = NNsight(plain)
    with model.generate(PROMPT, **options) as tracer:
        memory = model.encoder.output[0].save()
        model.encoder.block[0].output[0][:] *= 2
        states = list().save()
        for _ in tracer.iter[:]:
            states.append(model.decoder.block[1].output[0])
        ids = tracer.result.save()
    held: list[torch.Tensor] = []
    encoded: list[torch.Tensor] = []
    hooks: list[tuple[str, Callable[[int, Any], Any]]] = [
        ("encoder.block.0", lambda step, value: (first(value).mul_(2), None)[1]),
        ("encoder", lambda step, value: encoded.append(value[0].clone())),
        ("decoder.block.1", lambda step, value: held.append(first(value).clone())),
    ]
    assert torch.equal(ids, hooked(plain, PROMPT, hooks, **options))
    assert torch.equal(memory, encoded[0])
    assert all(map(torch.equal, states, held))
    assert len(states) == 4


SHARED = Path(__file__).parents[3] / "shared" / "models"


@pytest.mark.parametrize("path", sorted(SHARED.glob("*")) if SHARED.is_dir() else [])
def test_models_that_were_trained(path: Path) -> None:
    if not (path / "config.json").is_file():
        pytest.skip("no folder of a transformers model")
    try:
        model = LanguageModel(path, dispatch=True)
    except Exception as error:  # other kinds of models lie there too
        pytest.skip(f"no causal language model: {error}")
    if not hasattr(model._module, "generate"):
        pytest.skip("it does not generate")
    prompt = torch.tensor([[5, 17, 42, 3]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    held: list[torch.Tensor] = []
    layer = model.layers[1]._path
    hooks = [(layer, lambda step, value: held.append(first(value).clone()))]
    wanted = hooked(model._module, prompt, hooks, **options)
    with model.generate(prompt, attention_mask=torch.ones_like(prompt), **options) as tracer:
        acts = list().save()
        for _ in tracer.iter[:]:
            acts.append(model.layers[1].output)
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)
    assert all(map(torch.equal, map(first, acts), held))


# --- random programs ---


class Program:
    """A random body of steps, as source and as what hooks do. Writes scale a layer or shift its last position."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[str] = []
        self.hooks: list[tuple[int, Callable[[int, torch.Tensor, dict[str, Any]], None]]] = []
        self.names: list[str] = []
        self.most = 0
        for _ in range(self.random.randint(1, 5)):
            self.part()

    def part(self) -> None:
        kind = self.random.choice(["outside", "loop", "loop", "one", "listed"])
        if kind == "outside":
            self.access("        ", lambda step: True, lambda step: step == 0, None)
            return
        start = self.random.randint(0, 2)
        stop = self.random.choice([None, start + 1, start + 2])
        numbers: list[int] | None = None
        if kind == "one":
            numbers = [start]
        elif kind == "listed":
            numbers = sorted(self.random.sample(range(4), 2))
        if numbers is not None:
            text = f"[{numbers[0]}]" if kind == "one" else f"[{numbers}]"
            self.most = max(self.most, numbers[-1] + 1)
            runs: Callable[[int], bool] = lambda step, numbers=numbers: step in numbers  # noqa: E731
        else:
            text = f"[{start}:{'' if stop is None else stop}]"
            self.most = max(self.most, start + 1 if stop is None else stop)
            runs = lambda step: start <= step and (stop is None or step < stop)  # noqa: E731
        self.lines.append(f"        for s in tracer.iter{text}:\n            model.layers[2].output[:, -1] += 0.5")
        self.hooks.append((2, lambda step, value, _: value[:, -1].add_(0.5) if runs(step) else None))
        for _ in range(self.random.randint(1, 3)):
            if self.random.random() < 0.3:
                at = self.random.randint(0, 3)
                self.lines.append(f"            if s >= {at}:")
                inner: Callable[[int], bool] = lambda step, at=at, runs=runs: runs(step) and step >= at  # noqa: E731
                self.access("                ", inner, inner, "s")
            else:
                self.access("            ", runs, runs, "s")

    def access(
        self, indent: str, writes: Callable[[int], bool], reads: Callable[[int], bool], number: str | None
    ) -> None:
        layer = self.random.randint(0, 2)
        match self.random.choice(["read", "scale", "shift", "replace", "prompt"]):
            case "read":
                name = f"r{len(self.names)}"
                self.names.append(name)
                self.lines.append(f"{indent}{name}.append(model.layers[{layer}].output)")

                def read(step: int, value: torch.Tensor, found: dict[str, Any], name: str = name) -> None:
                    if reads(step):
                        found.setdefault(name, []).append(value.clone())

                self.hooks.append((layer, read))
            case "scale":
                self.lines.append(f"{indent}model.layers[{layer}].output[:] *= 1.25")
                self.hooks.append((layer, lambda step, value, _: value.mul_(1.25) if writes(step) else None))
            case "shift":
                by = number or "1"
                self.lines.append(f"{indent}model.layers[{layer}].output[:, -1] += {by}")

                def shift(step: int, value: torch.Tensor, _: dict[str, Any]) -> None:
                    if writes(step):
                        value[:, -1] += step if number else 1

                self.hooks.append((layer, shift))
            case "replace":
                line = f"model.layers[{layer}].output = model.layers[{layer}].output.clamp(-1, 1)"
                self.lines.append(f"{indent}{line}")
                self.hooks.append((layer, lambda step, value, _: value.clamp_(-1, 1) if writes(step) else None))
            case "prompt":
                if number is not None:
                    self.lines.append(f"{indent}pass")
                else:
                    self.lines.append(f"{indent}model.layers[{layer}].output[:, 2] = 0")

                    def clear(step: int, value: torch.Tensor, _: dict[str, Any]) -> None:
                        if step == 0:
                            value[:, 2] = 0

                    self.hooks.append((layer, clear))

    @property
    def source(self) -> str:
        lists = "".join(f"        {name} = []\n" for name in self.names)
        head = "    with model.generate(x, **options) as tracer:\n"
        names = ", ".join(self.names)
        body = "\n".join(self.lines) + "\n"
        return (
            f"def use(model, x, options):\n{head}{lists}{body}        ids = tracer.result\n    return ids, [{names}]\n"
        )


@pytest.fixture(scope="module")
def both() -> tuple[LanguageModel, nn.Module]:
    plain = _made("gpt2")
    return LanguageModel(plain), plain


@examples(15)
@given(st.integers(0, 2**32), st.integers(1, 5), st.booleans())
def test_random_programs_of_steps(both: Any, seed: int, tokens: int, ends: bool) -> None:
    model, plain = both
    program = Program(seed)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": 100, "pad_token_id": 0}
    if ends:
        options["eos_token_id"] = [token for token in range(101) if token % 3 == seed % 3]
    found: dict[str, Any] = {name: [] for name in program.names}
    hooks = [
        (f"transformer.h.{layer}", lambda step, value, run=run: (run(step, value, found), None)[1])
        for layer, run in program.hooks
    ]
    wanted = hooked(plain, PROMPT, hooks, **options)
    steps = wanted.shape[1] - PROMPT.shape[1]
    use = intervene.from_source(program.source)
    if steps < program.most:
        with pytest.raises(RunError, match=r"the generation ended|ends the generation before"):
            use(model, PROMPT, options)
        return
    ids, lists = use(model, PROMPT, options)
    assert torch.equal(ids, wanted), program.source
    for name, held in zip(program.names, lists, strict=True):
        assert len(held) == len(found[name]), program.source
        assert all(map(torch.equal, held, found[name])), program.source


def test_what_writes_to_every_position_does_not_bring_back_what_wrote_to_the_prompt(both: Any) -> None:
    model, plain = both

    @intervene
    def use(model, x):
        with model.generate(x, max_new_tokens=4, do_sample=False) as tracer:
            model.layers[1].output[:, 2] = 0
            for _ in tracer.iter[2:]:
                pass
            model.layers[1].output[:] *= 1.25
            for s in tracer.iter[2]:
                model.layers[2].output = model.layers[2].output.clamp(-1, 1)
                if s >= 2:
                    pass
            ids = tracer.result
        return ids

    def write(step: int, value: torch.Tensor) -> None:
        if step == 0:
            value[:, 2] = 0
        value.mul_(1.25)

    def clamp(step: int, value: torch.Tensor) -> None:
        if step == 2:
            value.clamp_(-1, 1)

    hooks = [("transformer.h.1", write), ("transformer.h.2", clamp)]
    assert torch.equal(use(model, PROMPT), hooked(plain, PROMPT, hooks, max_new_tokens=4, do_sample=False))


@intervene
def by_operator(model, x, vector, asked):
    with model.generate(x, max_new_tokens=4, do_sample=False) as tracer:
        new = model.layers[1].output.clone()
        if asked:
            new[:, 3] += vector
        new[:, -1] += vector
        model.layers[1].output = new
        ids = tracer.result
    return ids


@intervene
def by_method(model, x, vector, asked):
    with model.generate(x, max_new_tokens=4, do_sample=False) as tracer:
        new = model.layers[1].output.clone()
        if asked:
            new[:, 3].add_(vector)
        new[:, -1] += vector
        model.layers[1].output = new
        ids = tracer.result
    return ids


@intervene
def in_a_loop(model, x, vector, asked):
    with model.generate(x, max_new_tokens=4, do_sample=False) as tracer:
        new = model.layers[1].output.clone()
        for _ in range(int(asked)):
            new[:, 3].add_(vector)
        new[:, -1] += vector
        model.layers[1].output = new
        ids = tracer.result
    return ids


@pytest.mark.parametrize("experiment", [by_operator, by_method, in_a_loop])
def test_what_changes_the_prompt_in_place_under_a_condition_is_not_brought_back(both: Any, experiment: Any) -> None:
    model, plain = both
    vector = 40 * torch.randn(plain.config.n_embd, generator=torch.Generator().manual_seed(4))

    def write(step: int, value: torch.Tensor) -> None:
        if step == 0:
            value[:, 3] += vector
        value[:, -1] += vector

    wanted = hooked(plain, PROMPT, [("transformer.h.1", write)], max_new_tokens=4, do_sample=False)
    assert torch.equal(experiment(model, PROMPT, vector, True), wanted)
