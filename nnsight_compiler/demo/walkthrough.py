"""`nnsightc demo`: shows each experiment's code, runs it, and says what came out."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table

from nnsight_compiler import LanguageModel
from nnsight_compiler.demo import experiments
from nnsight_compiler.demo.assets import CorruptDownloadError, UnreachableError, quiet_transformers, smollm2
from nnsight_compiler.demo.heat_map import HeatMap


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """What differs between the models: the layers that they have, and prompts of equal length in their tokens."""

    name: str
    first_example: Callable[[Any], tuple[Any, Any]]
    first_prompt: str
    zeroed_layer: int
    clean: str
    corrupt: str
    answers: tuple[str, str]
    patches: tuple[tuple[int, int], ...]


FACT = "The Eiffel Tower is in the city of"
GIVER = "When Mary and John went to the store, John gave a drink to"
OTHER_GIVER = "When Mary and John went to the store, Mary gave a drink to"

SMOLLM2 = Setting(
    name="SmolLM2-135M-Instruct (30 layers, width 576)",
    first_example=experiments.first_example,
    first_prompt="The Eiffel Tower is in the city of ",
    zeroed_layer=11,
    clean=FACT,
    corrupt="The Colosseum is in the city of",
    answers=(" Paris", " Rome"),
    patches=((3, -1), (3, 2), (27, 2), (27, -1)),
)
TINY = Setting(
    name="the embedded GPT-2 (3 layers, width 128), trained on a few facts",
    first_example=experiments.first_example_tiny,
    first_prompt=FACT,
    zeroed_layer=2,
    clean=FACT,
    corrupt="The Space Needle is in the city of",
    answers=(" Paris", " Seattle"),
    patches=((0, -1), (0, 2), (2, 2), (2, -1)),
)


def show(choice: str, output: Path) -> None:
    """Runs the demo on `tiny` or `smollm2`; the heat map goes into the folder `output`."""
    console = Console(soft_wrap=False)
    # A prompt of 14 tokens keeps few cores busy. On a machine that others use too, threads that wait for one another
    # make it ten times slower.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    start = perf_counter()
    with quiet_transformers():
        model, setting = prepare(choice, console)
        show_first_example(console, model, setting)
        show_patch(console, model, setting)
        show_logit_lens(console, model)
        picture = output / "activation-patching.png"
        show_sweep(console, model, picture)
        show_programs(console, model, setting)
    console.print(
        f"\nThe heat map is in [bold]{picture}[/]. {perf_counter() - start:.0f} seconds in all.", highlight=False
    )


def prepare(choice: str, console: Console) -> tuple[LanguageModel, Setting]:
    """The model, and what to show on it. Where the download does not come about, the embedded model, and why."""
    source, setting = "tiny", TINY
    if choice == "smollm2":
        try:
            source, setting = str(smollm2(console)), SMOLLM2
        except (UnreachableError, CorruptDownloadError) as error:
            console.print(
                f"[yellow]{error}[/]\nThe demo goes on with the small model inside this package.", highlight=False
            )
    with console.status("loading the model"):
        model = LanguageModel(source, dispatch=True)
    console.print(f"Model: [bold]{setting.name}[/]", highlight=False)
    return model, setting


def show_first_example(console: Console, model: LanguageModel, setting: Setting) -> None:
    """DESIGN's first lines: save a hidden state, zero an MLP, save the output."""
    heading(console, "1", "Read and change a model's internals")
    code(console, setting.first_example)
    hidden_state, output = setting.first_example(model)
    plain = model(setting.first_prompt)
    console.print(
        f"hidden_state: {described(hidden_state)}    output.logits: {described(output.logits)}\n", highlight=False
    )
    table = Table("", "most likely next tokens", box=None, padding=(0, 2))
    table.add_row("untouched", likely(model, plain.logits[0, -1].softmax(-1)))
    table.add_row(f"without the MLP of layer {setting.zeroed_layer}", likely(model, output.logits[0, -1].softmax(-1)))
    console.print(table)


def show_patch(console: Console, model: LanguageModel, setting: Setting) -> None:
    """One decorated experiment, called at several places."""
    heading(console, "2", "Activation patching: one experiment, many calls")
    code(console, experiments.patch)
    clean, corrupt, answers = setting.clean, setting.corrupt, setting.answers
    console.print(f"clean   = {clean!r}\ncorrupt = {corrupt!r}\n", highlight=False)
    ids = [token_id(model, answer) for answer in answers]
    table = Table("", "layer", "position", *(f"P({answer!r})" for answer in answers), box=None, padding=(0, 2))
    for label, prompt in (("clean, untouched", clean), ("corrupt, untouched", corrupt)):
        probabilities = model(prompt).logits[0, -1].softmax(-1)
        table.add_row(label, "", "", *(f"{probabilities[i]:.3f}" for i in ids))
    labels = tokens(model, corrupt)
    for layer, position in setting.patches:
        probabilities = experiments.patch(model, clean, corrupt, layer=layer, position=position)[0]
        place = f"{position} ({labels[position]})"
        table.add_row("corrupt, patched", str(layer), place, *(f"{probabilities[i]:.3f}" for i in ids))
    console.print(table)
    console.print(f"\npatch.cache_info(): {experiments.patch.cache_info()}", highlight=False)


def show_logit_lens(console: Console, model: LanguageModel) -> None:
    """What each layer's residual stream would say if it were the last."""
    heading(console, "3", "Logit lens: when does the model know?")
    code(console, experiments.logit_lens)
    console.print(f"prompt = {FACT!r}\n", highlight=False)
    probabilities = experiments.logit_lens(model, FACT)
    answer = token_id(model, " Paris")
    table = Table("layer", "most likely", "P", "P(' Paris')", "", box=None, padding=(0, 2))
    for layer, row in enumerate(probabilities):
        top = int(row.argmax())
        bar = "█" * round(24 * float(row[answer]))
        word = repr(model.tokenizer.decode([top]))
        table.add_row(str(layer), word, f"{row[top]:.3f}", f"{row[answer]:.4f}", f"[green]{bar}[/]")
    console.print(table)
    first = next((layer for layer, row in enumerate(probabilities) if int(row.argmax()) == answer), None)
    if first is not None:
        console.print(f"\n' Paris' is the most likely token from layer {first} on.", highlight=False)


def show_sweep(console: Console, model: LanguageModel, picture: Path) -> None:
    """Every layer and position of the indirect-object pair, as a heat map."""
    heading(console, "4", "Activation patching at every layer and position")
    code(console, experiments.patching_sweep)
    console.print(f"clean   = {GIVER!r}\ncorrupt = {OTHER_GIVER!r}\n", highlight=False)
    labels, rows = tokens(model, OTHER_GIVER), len(model.layers)
    # Before the first token that differs, both runs hold the same values: patching there changes nothing.
    pairs = zip(tokens(model, GIVER), labels, strict=True)
    positions = range(next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(labels))
    answer, other = token_id(model, " Mary"), token_id(model, " John")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("patching", total=rows * len(positions))
        advance = partial(progress.advance, task)
        restored = experiments.patching_sweep(model, GIVER, OTHER_GIVER, positions, answer, other, advance).tolist()
    heat_map = HeatMap(
        title="Activation patching: share of the logit difference restored",
        row_title="layer",
        column_title="position (token of the corrupted prompt)",
        scale_title="share restored",
        rows=tuple(map(str, range(rows))),
        columns=tuple(labels),
        values=tuple(map(tuple, restored)),
    )
    console.print(
        "What goes into a layer at one position, taken from the clean run and put into\nthe corrupted one: percent of"
        f" the logit difference Mary − John that it restores.\nBefore position {positions[0]} the prompts are equal.\n",
        highlight=False,
    )
    console.print(heat_map.text(console.width))
    console.print(f"\n{reading(restored, labels)}", highlight=False, markup=False)
    heat_map.write_png(picture)


def reading(restored: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """What the sweep says, in words: where the answer sits at first, and from which layer it sits at the last token."""
    position = max(range(len(labels)), key=lambda column: restored[0][column])
    lasting = [layer for layer, row in enumerate(restored) if row[position] > 0.5]
    arrived = [layer for layer, row in enumerate(restored) if row[-1] > 0.5]
    if not lasting or not arrived:
        return f"No single position carries the answer; the most that one restores is {max(map(max, restored)):.0%}."
    share = max(row[position] for row in restored)
    return (
        f"Going into the layers up to {lasting[-1]}, what decides is at '{labels[position]}' (position {position}),"
        f" which\nalone restores {share:.0%}. Going into layer {arrived[0]} and later, it is at the last token,\n"
        f"'{labels[-1]}': attention has moved it there."
    )


def show_programs(console: Console, model: LanguageModel, setting: Setting) -> None:
    """The IR of `patch`, before and after it is specialised."""
    heading(console, "5", "What is behind it: patch as a program")
    console.print("print(patch.ir): before any model or argument is known\n", style="bold", highlight=False)
    listing(console, str(experiments.patch.ir))
    layer, position = setting.patches[0]
    call = f"patch.lower(model, clean, corrupt, layer={layer}, position={position})"
    console.print(f"\nprint({call}): specialised to this model, after all passes\n", style="bold", highlight=False)
    lowered = experiments.patch.lower(model, setting.clean, setting.corrupt, layer=layer, position=position)
    listing(console, str(lowered))


def heading(console: Console, number: str, title: str) -> None:
    console.print()
    console.rule(f"[bold]{number}. {title}[/]", align="left")
    console.print()


def code(console: Console, function: Callable[..., Any]) -> None:
    """The source of a function or experiment, in colour."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function))).rstrip()
    syntax = Syntax(source, "python", theme="ansi_dark", background_color="default", word_wrap=False)
    console.print(Group(Padding(syntax, (0, 0, 1, 2))))


def listing(console: Console, text: str) -> None:
    """A program as it is, wide lines and all, but for the folder of the file that its comments name."""
    folder = f"{Path(experiments.__file__).parent}{os.sep}"
    console.print(text.rstrip().replace(folder, ""), markup=False, highlight=False, soft_wrap=True)


def described(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def likely(model: LanguageModel, probabilities: Any, count: int = 3) -> str:
    """The most likely tokens with their probabilities."""
    values, indices = probabilities.topk(count)
    pairs = zip(values.tolist(), indices.tolist(), strict=True)
    return "   ".join(f"{model.tokenizer.decode([index])!r} {value:.3f}" for value, index in pairs)


def tokens(model: LanguageModel, prompt: str) -> list[str]:
    """The prompt's tokens as text, without the spaces that they begin with."""
    return [model.tokenizer.decode([index]).strip() or "·" for index in model.tokenizer(prompt)["input_ids"]]


def token_id(model: LanguageModel, word: str) -> int:
    """The one token that spells the word."""
    (index,) = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    return int(index)
