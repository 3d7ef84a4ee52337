"""`nnsightc compile`, and `run` and `dump` on what it wrote."""

from __future__ import annotations

import json
import linecache
import sys
from pathlib import Path

import pytest

from nnsight_compiler import LanguageModel
from nnsight_compiler.cli import main

SOURCE = """
import some_library
import torch
from nnsight_compiler import LanguageModel, intervene

vector, settings = torch.ones(128), iter("abc")
tiny = LanguageModel("tiny")


def scaled(x, by=2.0):
    return x * by


@intervene
def steer(model, prompt, layer=1):
    with model.trace(prompt):
        model.layers[layer].output += scaled(vector)
        best = model.lm_head.output[0, -1].argmax()
    return int(best)


@intervene
def around(prompt):
    with tiny.trace(prompt):
        best = tiny.lm_head.output[0, -1].argmax()
    return int(best)


@intervene
def counted(x):
    return some_library.count(x) + some_library.count(x[:0])


@intervene
def broken():
    return settings
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "some_library.py").write_text("def count(x):\n    return len(x)\n")
    (tmp_path / "demo.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nnsightc", *arguments])
        with pytest.raises(SystemExit) as finished:
            main()
        code = finished.value.code
        shown = capsys.readouterr()
        return int(code or 0), shown.out, shown.err

    yield call
    for name in ("demo", "some_library"):
        sys.modules.pop(name, None)


def test_compile_says_what_was_captured_and_run_needs_no_source(run, tmp_path: Path) -> None:
    code, out, _ = run("compile", "demo.py:steer", "-o", "steer.safetensors")
    assert code == 0
    size = (tmp_path / "steer.safetensors").stat().st_size
    assert out == (
        f"steer.safetensors: {size} bytes\n"
        "  scaled: function, with its program\n"
        "  vector: float32[128]\n"
        "  layer: int 1\n"
    )
    expected = run("run", "demo.py:steer", "--model", "tiny", "--arg", "prompt=The city of", "--json")[1]
    (tmp_path / "demo.py").unlink()
    code, out, _ = run("run", "steer.safetensors", "--model", "tiny", "--arg", "prompt=The city of", "--json")
    assert (code, json.loads(out)) == (0, json.loads(expected))


def test_dump_shows_the_program_in_a_file(run, tmp_path: Path) -> None:
    run("compile", "demo.py:steer", "-o", "steer.safetensors")
    expected = run("dump", "demo.py:steer")[1]
    (tmp_path / "steer.safetensors").rename(tmp_path / "steer.experiment")
    (tmp_path / "demo.py").unlink()
    code, out, _ = run("dump", "steer.experiment")  # known by how it begins
    assert (code, out.replace(str(tmp_path) + "/", "")) == (0, expected)
    code, out, _ = run(
        "dump", "steer.experiment", "--model", "tiny", "--arg", "prompt=a", "--print-after", "specialise"
    )
    assert code == 0
    assert "for GPT2LMHeadModel  given layer=1" in out


def test_the_model_that_a_file_reads_as_a_global(run) -> None:
    run("compile", "demo.py:around", "-o", "around.safetensors")
    code, out, _ = run("run", "around.safetensors", "--model", "tiny", "--arg", "prompt=The city of")
    tiny = LanguageModel("tiny")
    assert (code, int(out)) == (0, int(tiny("The city of").logits[0, -1].argmax()))
    code, _, err = run("run", "around.safetensors", "--arg", "prompt=The city of")
    assert code == 2
    assert err.endswith("error: around needs a model\n  way out: add --model tiny, or the name or folder of another\n")


def test_check_and_explain_take_a_file(run, tmp_path: Path) -> None:
    run("compile", "demo.py:steer", "-o", "steer.safetensors")
    run("compile", "demo.py:around", "-o", "around.safetensors")
    (tmp_path / "demo.py").unlink()
    linecache.clearcache()
    assert run("check", "steer.safetensors", "--model", "tiny", "--arg", "prompt=a")[:2] == (
        0,
        "no mistakes found in 1 experiment\n",
    )
    assert run("check", "around.safetensors", "--model", "tiny")[0] == 0
    code, out, _ = run("check", "steer.safetensors", "--model", "tiny", "--arg", "layer=7", "--json")
    [mistake] = json.loads(out)["mistakes"]
    assert code == 1
    assert (mistake["line"], mistake["column"]) == (17, 9)
    assert mistake["reason"] == "transformer.h (ModuleList) holds 3 modules: no index 7 (0 to 2)"
    code, _, err = run("check", "steer.safetensors", "--model", "tiny", "--arg", "lyaer=7")
    assert (code, err) == (
        2,
        "error: there is no parameter called 'lyaer'\n  way out: choose one of: layer, model, prompt\n",
    )
    code, out, _ = run("explain", "steer.safetensors", "--model", "tiny", "--arg", "prompt=a")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["experiment steer", "stage 1, given layer=1"]
    assert lines[2].startswith("  demo.py:16  forward of GPT2LMHeadModel ")
    assert lines[2].endswith(
        " reads transformer.ln_f input; writes transformer.h.1 output; ends after transformer.ln_f input"
    )
    assert lines[3] == "      estimate  1 row of 1 token; 3 of 3 layers; 1.18 MFLOP; 14 KiB at the peak; 8 B kept"
    assert "optimisations" in lines
    assert any("  narrow  `transformer.ln_f`, `lm_head` for [0, -1] alone" in line for line in lines)
    code, out, _ = run("explain", "steer.safetensors", "--model", "tiny", "--arg", "prompt=a", "--run", "--json")
    step, *_ = json.loads(out)["stages"][0]["variants"][0]["steps"]
    assert (code, step["line"], step["last_run"]["rows"], step["last_run"]["runs"]) == (0, 16, 1, 1)
    assert step["last_run"]["flops"] >= step["estimate"]["flops"] > 10**6
    assert step["last_run"]["seconds"] > 0


def test_a_local_only_file(run, tmp_path: Path) -> None:
    code, out, err = run("compile", "demo.py:counted", "-o", "counted.safetensors")
    assert (code, err) == (0, "")
    assert "local-only, since it calls what is not in the table of known calls:\n" in out
    assert out.endswith(f"demo.py:31:12: some_library.count\n  {tmp_path}/demo.py:31:36: some_library.count\n")
    code, _, err = run("run", "counted.safetensors", "--arg", "x='abc'")
    assert code == 1
    assert "demo.py:31:12: some_library.count: it is not in the table of known calls" in err
    assert "demo.py:31:36: some_library.count: it is not in the table of known calls" in err
    assert err.count("nnsightc run --allow-host-calls") == 1
    assert run("run", "counted.safetensors", "--arg", "x='abc'", "--allow-host-calls") == (0, "3\n", "")


def test_refusals(run, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_text("nothing")
    run("compile", "demo.py:steer", "-o", "steer.safetensors")
    for arguments, expected in {
        ("run", "bad.safetensors"): (1, "error: bad.safetensors is no safetensors file, or it is cut off\n"),
        ("compile", "demo.py:broken", "-o", "x.safetensors"): (1, "error: broken cannot be put into a file:\n"),
        ("dump", "steer.safetensors:steer"): (2, "error: steer.safetensors is an experiment file, and holds one exper"),
        ("run", "steer.safetensors"): (2, "error: steer needs a model\n"),
        ("run", "nothing.safetensors"): (2, "error: the file nothing.safetensors does not exist\n"),
    }.items():
        code, _, err = run(*arguments)
        assert (code, err[: len(expected[1])]) == expected
    assert not (tmp_path / "x.safetensors").exists()
