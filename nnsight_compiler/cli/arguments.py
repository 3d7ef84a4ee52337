"""The arguments of an experiment, from `--arg name=value` and `--model`."""

from __future__ import annotations

import ast
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_compiler.cli.refusal import RefusalError, unknown
from nnsight_compiler.ir.errors import ModelError
from nnsight_compiler.ir.ops import Parameter
from nnsight_compiler.ir.program import Program

if TYPE_CHECKING:
    from nnsight_compiler import Experiment

MODEL = "model"
"""The parameter that receives the model."""


def parse_arguments(texts: Sequence[str]) -> dict[str, object]:
    """`name=value` each; a value is a Python literal where it reads as one, else the text itself."""
    arguments: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RefusalError(f"--arg {text} is not of the form name=value", f"write --arg {name or 'layer'}=3")
        if name in arguments:
            raise RefusalError(f"--arg {name} is given twice", "give it once")
        arguments[name] = parse_value(value)
    return arguments


def parse_value(text: str) -> object:
    """A Python literal, or the text as it stands."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def bind_arguments(
    program: Program, given: dict[str, object], model: str | None, weights: bool
) -> tuple[list[object], dict[str, object]]:
    """Positional and keyword arguments for the experiment, its `model` loaded by name, at once with `weights`.

    Refuses names that the experiment does not have and parameters that are left without a value.
    """
    parameters = {parameter.value.name: parameter for parameter in program.parameters}
    takes_any = any(parameter.kind == "var_keyword" for parameter in parameters.values())
    named = {name: parameter for name, parameter in parameters.items() if not parameter.kind.startswith("var_")}
    for name in given:
        if name not in named and not takes_any:
            raise unknown(f"parameter of {program.name} called", name, named, f"{program.name} takes no arguments")
    if MODEL in given:
        raise RefusalError("--arg model=… cannot name a model", "use --model NAME")
    if model is not None and MODEL not in named:
        raise RefusalError(f"{program.name} has no parameter called model", "leave --model out, or add the parameter")
    missing = [name for name, parameter in named.items() if name not in given and not parameter.optional]
    if MODEL in missing:
        if model is None:
            raise RefusalError(f"{program.name} needs a model", "add --model tiny, or the name or folder of another")
        missing.remove(MODEL)
    if missing:
        way_out = "add " + " ".join(f"--arg {name}=VALUE" for name in missing)
        raise RefusalError(f"{program.name} needs a value for {', '.join(missing)}", way_out)
    values = dict(given)
    if model is not None:
        values[MODEL] = load_model(model, weights)
    return _split(list(named.values()), values)


def optimised(experiment: Experiment, without: str | None, memory_budget: str | None, padding: bool) -> Experiment:
    """The experiment with the options that are given; itself, with its own, where none is."""
    if without is None and memory_budget is None and not padding:
        return experiment
    names = [name for each in (without or "").split(",") if (name := each.strip())]
    budget = int(memory_budget) if memory_budget is not None and memory_budget.isdecimal() else memory_budget
    try:
        return experiment.with_options("all" if names == ["all"] else names, budget, padding)
    except ValueError as error:
        said, _, way_out = str(error).partition("; ")
        raise RefusalError(said, way_out or "write bytes, or text such as '2 GiB'") from None


def bind_model(experiment: Experiment, model: str | None, weights: bool) -> str | None:
    """Gives the model to an experiment from a file that reads it as a global; the name is then used up."""
    namespace = experiment._namespace
    parameters = (parameter.value.name for parameter in experiment.ir.parameters)
    if namespace is None or not namespace.needs_model or MODEL in parameters:
        return model
    if model is None:
        raise RefusalError(f"{experiment.ir.name} needs a model", "add --model tiny, or the name or folder of another")
    namespace.model = load_model(model, weights)
    return None


def load_model(name: str, weights: bool) -> object:
    """A model by name: `tiny`, `smollm2` (the demo's), a folder, a GGUF file, a hub name. Its weights may wait."""
    from nnsight_compiler import LanguageModel

    try:
        source = demo_model() if name == "smollm2" else name
        model = LanguageModel(source, dispatch=weights)
    except ModelError as error:
        way_out = "try --model tiny, which needs no download, --model smollm2, or a folder that holds a model"
        raise RefusalError(f"the model {name} cannot be loaded: {error}", way_out) from error
    gc.freeze()  # what has been imported stays
    gc.enable()  # `main` turned it off
    return model


def demo_model() -> Path:
    """The file of the demo's model, fetched once."""
    from rich.console import Console

    from nnsight_compiler.demo.assets import smollm2

    return smollm2(Console(stderr=True))


def _split(parameters: Sequence[Parameter], values: dict[str, object]) -> tuple[list[object], dict[str, object]]:
    positional: list[object] = []
    rest = dict(values)
    for parameter in parameters:
        if parameter.kind == "positional_only" and parameter.value.name in rest:
            positional.append(rest.pop(parameter.value.name))
    return positional, rest
