"""The command line: what it prints, what it refuses and with which way out, and its exit codes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nnsight_compiler.cli import main
from nnsight_compiler.cli.arguments import parse_arguments
from nnsight_compiler.cli.display import as_json, readable

EXPERIMENTS = """
from pathlib import Path

from nnsight_compiler import intervene

(Path(__file__).parent / "ran").touch()


@intervene
def patch(model, clean, corrupt, layer, position=-1):
    with model.trace(clean):
        source = model.layers[layer].output[:, position]
    with model.trace(corrupt):
        model.layers[layer].output[:, position] = source
        logits = model.lm_head.output[:, -1]
    return logits.softmax(-1)


@intervene
def double(x):
    return x * 2


@intervene
def shout(model, prompt):
    print("about to run")
    with model.trace(prompt):
        logits = model.lm_head.output[0, -1]
    raise ValueError("a mistake of mine")


@intervene
def misnamed(model, prompt):
    with model.trace(prompt):
        hidden = model.layerz[0].output
    return hidden


def plain(x):
    return x
"""

CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A file of experiments; what importing it does to the interpreter is undone."""
    path = tmp_path / "some_experiments.py"
    path.write_text(EXPERIMENTS)
    modules, search = dict(sys.modules), list(sys.path)
    yield path
    sys.path[:] = search
    for name in set(sys.modules) - set(modules):
        if getattr(sys.modules[name], "__file__", None) == str(path):
            del sys.modules[name]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def nnsightc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nnsightc", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    return call


def refused(outcome: Outcome) -> str:
    """The two lines of a refusal."""
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 2, outcome.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  way out: ")
    return outcome.err


# --- dump ---


def test_dump_prints_everything_in_a_file_without_running_it(nnsightc, file: Path) -> None:
    outcome = nnsightc("dump", file)
    assert (outcome.code, outcome.err) == (0, "")
    for name in ("patch", "double", "shout", "misnamed"):
        assert f"experiment {name}(" in outcome.out
    assert not (file.parent / "ran").exists()


def test_dump_prints_one_experiment_by_name(nnsightc, file: Path) -> None:
    outcome = nnsightc("dump", f"{file}:double")
    assert outcome.code == 0
    assert "experiment double(" in outcome.out
    assert "patch" not in outcome.out
    assert not (file.parent / "ran").exists()


def test_dump_reads_files_that_import_what_is_not_installed(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.py"
    file.write_text(
        "import a_package_that_does_not_exist\nfrom nnsight_compiler import intervene\n\n"
        "@intervene\ndef lens(model):\n    return 1\n"
    )
    assert "experiment lens(" in nnsightc("dump", file).out


def specialised(file: Path) -> tuple[object, ...]:
    given = ("--model", "tiny", "--arg", f"clean={CLEAN}", "--arg", f"corrupt={CORRUPT}", "--arg", "layer=1")
    return ("dump", f"{file}:patch", *given)


def test_dump_with_a_model_prints_the_specialised_program(nnsightc, file: Path) -> None:
    outcome = nnsightc(*specialised(file))
    assert outcome.code == 0, outcome.err
    assert "GPT2LMHeadModel" in outcome.out
    assert "transformer.h.1" in outcome.out


def test_print_after_all_prints_every_pass_and_print_after_one_of_them(nnsightc, file: Path) -> None:
    all_of_them = nnsightc(*specialised(file), "--print-after-all").out
    one = nnsightc(*specialised(file), "--print-after", "specialise").out
    assert "# after specialise\n" in all_of_them
    assert one.strip() in all_of_them


def test_an_unknown_pass_lists_the_passes(nnsightc, file: Path) -> None:
    message = refused(nnsightc(*specialised(file), "--print-after", "specialize"))
    assert "no pass called 'specialize'" in message
    assert "choose one of: specialise" in message


# --- run ---


def by_hand(layer: int) -> torch.Tensor:
    """`patch` with torch hooks on the plain transformers model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nnsight_compiler.demo.assets import quiet_transformers
    from nnsight_compiler.models.checkpoint import tiny_folder

    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder()).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
        clean, corrupt = (tokenizer(text, return_tensors="pt").input_ids for text in (CLEAN, CORRUPT))
        source = model(clean, output_hidden_states=True).hidden_states[layer + 1][:, -1]

        def write(module: object, arguments: object, output: torch.Tensor) -> None:
            output[:, -1] = source

        model.transformer.h[layer].register_forward_hook(write)
        return model(corrupt).logits[:, -1].softmax(-1)


def test_run_returns_what_hooks_by_hand_return(nnsightc, file: Path) -> None:
    given = ("--arg", f"clean={CLEAN}", "--arg", f"corrupt={CORRUPT}", "--arg", "layer=1")
    outcome = nnsightc("run", f"{file}:patch", "--model", "tiny", *given, "--json")
    assert outcome.code == 0, outcome.err
    tensor = json.loads(outcome.out)
    expected = by_hand(layer=1)
    assert tensor["dtype"] == "float32"
    assert tensor["shape"] == list(expected.shape)
    assert torch.allclose(torch.tensor(tensor["values"]), expected, atol=1e-5)


def test_run_and_explain_take_the_options_of_with_options(nnsightc, file: Path) -> None:
    given = ("--arg", f"clean={CLEAN}", "--arg", f"corrupt={CORRUPT}", "--arg", "layer=1")
    arguments = [f"{file}:patch", "--model", "tiny", *given, "--json"]
    plain = json.loads(nnsightc("explain", *arguments).out)
    left = json.loads(nnsightc("explain", *arguments, "--without", "narrow,stop_early", "--padding").out)
    assert plain != left
    assert json.loads(nnsightc("explain", *arguments, "--without", "share_prefixes").out) == plain
    for options in (["--without", "all"], ["--memory-budget", "2 GiB", "--padding"], ["--memory-budget", "100000"]):
        other = nnsightc("run", *arguments, *options)
        assert other.code == 0, other.err
        assert torch.allclose(torch.tensor(json.loads(other.out)["values"]), by_hand(layer=1), atol=1e-5)


@pytest.mark.parametrize("command", ["run", "explain"])
def test_options_that_there_are_not(nnsightc, file: Path, command: str) -> None:
    arguments = [command, f"{file}:shout", "--model", "tiny", "--arg", "prompt=a"]
    text = refused(nnsightc(*arguments, "--without", "stop_early,narow"))
    assert "there is no optimisation 'narow'" in text
    assert "did you mean 'narrow'?" in text
    text = refused(nnsightc(*arguments, "--memory-budget", "much"))
    assert "memory_budget='much' is no amount of memory" in text
    assert "write bytes, or text such as '2 GiB'" in text
    assert "memory_budget=0 is no amount of memory" in refused(nnsightc(*arguments, "--memory-budget", "0"))


def test_run_passes_literals_and_strings(nnsightc, file: Path) -> None:
    assert nnsightc("run", f"{file}:double", "--arg", "x=21").out == "42\n"
    assert nnsightc("run", f"{file}:double", "--arg", "x=hello").out == "'hellohello'\n"
    assert nnsightc("run", f"{file}:double", "--arg", "x=[1, 2]").out == "[1, 2, 1, 2]\n"


def test_an_exception_of_the_users_shows_the_users_line_and_no_other(nnsightc, file: Path) -> None:
    outcome = nnsightc("run", f"{file}:shout", "--model", "tiny", "--arg", f"prompt={CLEAN}", "--json")
    assert outcome.code == 1
    assert outcome.out == ""
    assert "about to run" in outcome.err
    line = 1 + EXPERIMENTS.splitlines().index('    raise ValueError("a mistake of mine")')
    assert f'File "{file}", line {line}' in outcome.err
    assert outcome.err.endswith("ValueError: a mistake of mine\n")
    assert outcome.err.count('File "') == 1


def test_an_exception_at_import_shows_its_line(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "fails_at_import.py"
    file.write_text("x = 1\n1 / 0\n")
    outcome = nnsightc("run", file)
    assert outcome.code == 1
    assert f'File "{file}", line 2' in outcome.err
    assert outcome.err.endswith("ZeroDivisionError: division by zero\n")
    assert outcome.err.count('File "') == 1


def test_a_compile_error_names_its_line_and_exits_with_1(nnsightc, file: Path) -> None:
    outcome = nnsightc("run", f"{file}:misnamed", "--model", "tiny", "--arg", f"prompt={CLEAN}")
    assert outcome.code == 1
    line = 1 + EXPERIMENTS.splitlines().index("        hidden = model.layerz[0].output")
    assert f"some_experiments.py:{line}:" in outcome.err
    assert "layerz" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_file_does_not_see_the_command_line(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "looks_at_argv.py"
    file.write_text(
        "import sys\nfrom nnsight_compiler import intervene\nseen = list(sys.argv)\n\n"
        "@intervene\ndef arguments():\n    return seen\n"
    )
    assert nnsightc("run", file).out == f"[{str(file)!r}]\n"


# --- refusals ---


def test_a_missing_file(nnsightc, tmp_path: Path) -> None:
    assert "nowhere.py does not exist" in refused(nnsightc("dump", tmp_path / "nowhere.py"))


def test_a_folder(nnsightc, tmp_path: Path) -> None:
    assert "is a folder" in refused(nnsightc("dump", tmp_path))


def test_a_file_that_does_not_parse(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("x = 1\ndef f(:\n")
    assert "bad.py:2: not Python: " in refused(nnsightc("run", f"{file}:f"))


@pytest.mark.parametrize("command", ["dump", "run"])
def test_an_unknown_function_lists_those_that_exist(nnsightc, file: Path, command: str) -> None:
    message = refused(nnsightc(command, f"{file}:pach"))
    assert "called 'pach'" in message
    assert "choose one of: patch, double" in message


def test_a_function_that_is_not_an_experiment(nnsightc, file: Path) -> None:
    assert "plain in" in refused(nnsightc("run", f"{file}:plain", "--arg", "x=1"))


def test_run_without_a_name_where_there_are_several(nnsightc, file: Path) -> None:
    message = refused(nnsightc("run", file))
    assert "holds 4 experiments" in message
    assert f"{file}:double" in message


def test_a_missing_argument_says_how_to_give_it(nnsightc, file: Path) -> None:
    assert "add --arg x=VALUE" in refused(nnsightc("run", f"{file}:double"))


def test_an_unknown_argument_lists_the_parameters(nnsightc, file: Path) -> None:
    message = refused(nnsightc("run", f"{file}:patch", "--model", "tiny", "--arg", "layr=1"))
    assert "no parameter of patch called 'layr'" in message
    assert "choose one of: layer, model, clean, corrupt, position" in message


def test_a_model_that_is_needed_and_not_given(nnsightc, file: Path) -> None:
    given = ("--arg", "clean=a", "--arg", "corrupt=b", "--arg", "layer=1")
    assert "add --model tiny" in refused(nnsightc("run", f"{file}:patch", *given))


def test_a_model_that_is_given_and_not_taken(nnsightc, file: Path) -> None:
    message = refused(nnsightc("run", f"{file}:double", "--model", "tiny", "--arg", "x=1"))
    assert "double has no parameter called model" in message


def test_a_model_that_cannot_be_loaded(nnsightc, file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(nnsightc("run", f"{file}:shout", "--model", empty, "--arg", "prompt=a"))
    assert f"the model {empty} cannot be loaded" in message
    assert "--model tiny" in message


def test_an_argument_without_a_value(nnsightc, file: Path) -> None:
    assert "not of the form name=value" in refused(nnsightc("run", f"{file}:double", "--arg", "x"))
    assert "given twice" in refused(nnsightc("run", f"{file}:double", "--arg", "x=1", "--arg", "x=2"))


def test_usage_errors_exit_with_2(nnsightc) -> None:
    assert nnsightc("dump").code == 2
    assert nnsightc("no-such-command").code == 2


@pytest.mark.parametrize("command", ["dump", "run", "demo"])
def test_help_shows_examples(nnsightc, command: str) -> None:
    outcome = nnsightc(command, "--help")
    assert outcome.code == 0
    assert f"  nnsightc {command}" in outcome.out.split("Options")[0].replace(f"Usage: nnsightc {command}", "")


# --- values ---


def test_arguments_are_literals_where_they_read_as_such() -> None:
    given = parse_arguments(["a=3", "b=-1.5", "c=None", "d=(1, 'x')", "e=The Eiffel Tower", "f='3'", "g=x=y", "h="])
    assert given == {
        "a": 3,
        "b": -1.5,
        "c": None,
        "d": (1, "x"),
        "e": "The Eiffel Tower",
        "f": "3",
        "g": "x=y",
        "h": "",
    }


def test_small_tensors_are_shown_in_full_and_large_ones_by_range() -> None:
    assert readable(torch.tensor([1.0, 2.5])) == "float32[2] [1.0000, 2.5000]"
    assert readable(torch.tensor(3)) == "int64[] 3"
    large = torch.arange(100.0)
    large[0] = math.nan
    assert readable(large) == "float32[100], mean 50, from 1 to 99, 1 not finite"


def test_containers_are_shown_an_item_a_line() -> None:
    value = {"scores": [torch.zeros(2, 2), torch.ones(1)], "name": "x", "plain": [1, 2]}
    assert readable(value).splitlines() == [
        "dict of 3:",
        "  'scores': list of 2:",
        "    [0] float32[2, 2]",
        "      [[0., 0.],",
        "       [0., 0.]]",
        "    [1] float32[1] [1.]",
        "  'name': 'x'",
        "  'plain': [1, 2]",
    ]


def test_json_holds_every_element_and_stays_valid() -> None:
    value = {"h": torch.tensor([[1.0, math.inf]]), "t": (1, None), "o": object}
    assert json.loads(as_json(value)) == {
        "h": {"dtype": "float32", "shape": [1, 2], "values": [[1.0, "inf"]]},
        "t": [1, None],
        "o": {"repr": "<class 'object'>"},
    }


# --- check ---

SCRIPT = """
import torch
from pathlib import Path

from nnsight_compiler import LanguageModel, intervene

(Path(__file__).parent / "ran").touch()
LAYERS = list(range(3))
model = LanguageModel("no/such-model")

with model.trace("a b c"):
    hidden = model.layers[5].output.save()
    other = model.layers[unknown_layer].output.save()


@intervene
def lens(prompt):
    with model.trace(prompt):
        outputs = [model.layers[layer].output for layer in LAYERS]
        model.layers[0].mlpp.output = 0
    return outputs


@intervene
def broken(model, prompt):
    with model.trace(prompt):
        hidden = model.layers[0].output
        match hidden:
            case _:
                pass
    return hidden


unknown_layer = int(input())
"""


def test_check_finds_the_mistakes_of_experiments_and_traces_and_runs_nothing(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "script_to_check.py"
    file.write_text(SCRIPT)
    outcome = nnsightc("check", file, "--model", "tiny")
    assert outcome.code == 1
    assert not (tmp_path / "ran").exists()
    lines = SCRIPT.splitlines()
    for piece, reason in (("layers[5]", "no index 5"), ("mlpp", "did you mean mlp?"), ("match hidden", "match")):
        number = next(n for n, line in enumerate(lines, 1) if piece in line)
        block = next(each for each in outcome.out.split("\n\n") if each.startswith(f"{file}:{number}:"))
        assert reason in block
        assert "^" in block
        assert "  way out: " in block
    assert f"not checked: {file}:13:" in outcome.out
    assert "`unknown_layer`, which has no value yet" in outcome.out
    assert outcome.out.endswith("3 mistakes, 1 place not checked in 2 experiments and 1 trace\n")


def test_check_of_one_experiment_with_its_arguments(nnsightc, file: Path) -> None:
    command = ("check", f"{file}:patch", "--model", "tiny", "--arg", f"clean={CLEAN}", "--arg", f"corrupt={CORRUPT}")
    right = nnsightc(*command, "--arg", "layer=2")
    assert (right.code, right.out) == (0, "no mistakes found in 1 experiment\n")
    assert not (file.parent / "ran").exists()
    wrong = nnsightc(*command, "--arg", "layer=3", "--json")
    assert wrong.code == 1
    found = json.loads(wrong.out)
    assert found["ok"] is False
    line = next(n for n, text in enumerate(EXPERIMENTS.splitlines(), 1) if "source = model" in text)
    first = found["mistakes"][0]
    assert (first["file"], first["line"], first["column"], first["end_column"]) == (str(file), line, 18, 37)
    assert "no index 3" in first["reason"]
    assert first["way_out"]
    assert found["not_checked"] == []


def test_check_says_what_a_missing_package_is(nnsightc, tmp_path: Path) -> None:
    file = tmp_path / "needs_a_package.py"
    file.write_text(
        "import a_package_that_does_not_exist\nfrom nnsight_compiler import intervene\n\n\n"
        "@intervene\ndef read(model):\n    with model.trace('a'):\n        h = model.layers[0].output\n    return h\n"
    )
    outcome = nnsightc("check", file, "--model", "tiny")
    assert outcome.code == 1
    assert f"{file}:1:1: this cannot be executed: ModuleNotFoundError" in outcome.out
    assert outcome.out.count("way out: ") == 1


def test_check_refuses_what_cannot_be_checked(nnsightc, file: Path, tmp_path: Path) -> None:
    assert "a check needs a model" in refused(nnsightc("check", file))
    assert "no parameter called 'layr'" in refused(nnsightc("check", file, "--model", "tiny", "--arg", "layr=1"))
    assert "did not" not in refused(nnsightc("check", f"{file}:patsch", "--model", "tiny"))
    assert "no/such-model" in refused(nnsightc("check", file, "--model", "./no/such-model"))
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    assert "holds no experiment and no trace" in refused(nnsightc("check", empty, "--model", "tiny"))
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    assert f"{broken}:1: not Python" in refused(nnsightc("check", broken, "--model", "tiny"))
