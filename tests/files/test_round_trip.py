"""Every example, and the demo's experiments, through a file and into a process that has no source of them."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import nnsight_compiler
from nnsight_compiler import CompileError, Experiment, LanguageModel, NNsight

ROOT = Path(__file__).parent.parent.parent
SOURCES = (
    "examples/activation_patching.py", "examples/any_module.py", "examples/first_example.py", "examples/logit_lens.py",
    "examples/steering.py", "nnsight_compiler/demo/experiments.py",
)  # fmt: skip
CLEAN, CORRUPT = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
VECTOR = torch.linspace(-1, 1, 2 * 128).reshape(2, 128)
INPUT = torch.linspace(-1, 1, 4).reshape(1, 4)
TINY, NETWORK = "the model: tiny", "the model: network"

CALLS: dict[tuple[str, str], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    ("activation_patching", "logit_difference"): [((TINY, CLEAN, 5, 9), {})],
    ("activation_patching", "patched_difference"): [
        ((TINY, CLEAN, CORRUPT, layer, position, 5, 9), {}) for layer in (0, 2) for position in (1, -1)
    ],
    ("any_module", "ablate"): [((NETWORK, INPUT, unit), {}) for unit in (0, 5)],
    ("first_example", "patch"): [((TINY, CLEAN, CORRUPT), {"layer": layer, "position": -1}) for layer in (0, 1)],
    ("logit_lens", "logit_lens"): [((TINY, CLEAN), {})],
    ("steering", "steering_vector"): [((TINY, CLEAN, CORRUPT, 1), {})],
    ("steering", "steer"): [((TINY, CLEAN, 0, VECTOR, strength), {}) for strength in (0.0, 0.5)],
    ("experiments", "patch"): [((TINY, CLEAN, CORRUPT), {"layer": 1, "position": 2})],
    ("experiments", "logit_lens"): [((TINY, CLEAN), {})],
    ("experiments", "patching_sweep"): [((TINY, CLEAN, CORRUPT, [1, -1], 5, 9, int), {})],
}
"""The calls of each experiment, by the module that it stands in. `int` is a callback that does nothing."""

CHILD = """
import sys
import torch
folder, package = sys.argv[1:]
sys.path.insert(0, package)
torch.set_num_threads(1)
from nnsight_compiler import CompileError, Experiment, LanguageModel, NNsight

models = {"the model: tiny": LanguageModel("tiny")}
cases, network, mistake = torch.load(folder + "/cases.pt", weights_only=False)
models["the model: network"] = NNsight(network)
results = []
for file, calls in cases:
    before = set(sys.modules)
    experiment = Experiment.load(folder + "/" + file)
    assert set(sys.modules) == before, "loading imports nothing"
    for args, kwargs in calls:
        args = [models.get(each, each) if isinstance(each, str) else each for each in args]
        results.append(experiment(*args, **kwargs))
try:
    Experiment.load(folder + "/" + mistake)(models["the model: tiny"], "a", "b", layer=99, position=0)
except CompileError as error:
    results.append(str(error))
torch.save(results, folder + "/results.pt")
"""


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each call gave here, and in a process that has files only. The sources are gone by then."""
    folder = tmp_path_factory.mktemp("files")
    sources = folder / "sources"
    sources.mkdir()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    models = {TINY: LanguageModel("tiny"), NETWORK: NNsight(network)}
    found: dict[tuple[str, str], Experiment] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["example"])
        patch.setenv("HF_HUB_OFFLINE", "1")
        for source in SOURCES:
            copied = sources / Path(source).name
            shutil.copy(ROOT / source, copied)
            for name, held in runpy.run_path(str(copied), run_name=copied.stem).items():
                if isinstance(held, Experiment):
                    found[copied.stem, name] = held
    cases, names, expected = [], [], []
    for (module, name), experiment in found.items():
        file = f"{module}.{name}.safetensors"
        experiment.save(folder / file)
        cases.append((file, CALLS[module, name]))
        for args, kwargs in CALLS[module, name]:
            names.append((module, name))
            given = [models.get(each, each) if isinstance(each, str) else each for each in args]
            expected.append(experiment(*given, **kwargs))
    with pytest.raises(CompileError) as caught:
        found["first_example", "patch"](models[TINY], "a", "b", layer=99, position=0)
    torch.save((cases, network, "first_example.patch.safetensors"), folder / "cases.pt")
    shutil.rmtree(sources)
    package = str(Path(nnsight_compiler.__file__).parent.parent)
    child = [sys.executable, "-I", "-c", CHILD, str(folder), package]
    finished = subprocess.run(child, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    results = torch.load(folder / "results.pt", weights_only=False)
    return folder, found, names, expected, results, str(caught.value)


def test_every_experiment_of_the_examples_is_called(ran) -> None:
    _, found, names, _, _, _ = ran
    assert set(found) == set(CALLS) == set(names)


def test_a_process_without_the_source_gets_the_same_results_bit_for_bit(ran) -> None:
    _, _, names, expected, results, _ = ran
    assert len(results) == len(expected) + 1
    wrong = [name for name, left, right in zip(names, expected, results, strict=False) if not equal(left, right)]
    assert wrong == []


def test_its_mistakes_are_shown_with_the_line_that_is_not_there(ran) -> None:
    _, _, _, _, results, text = ran
    assert results[-1] == text
    assert "source = model.layers[layer].output[:, position]\n" in text
    assert "^^^" in text


def test_a_file_is_plain_safetensors_with_json_in_it(ran) -> None:
    folder = ran[0]
    with safe_open(str(folder / "steering.steer.safetensors"), framework="pt") as opened:
        text = opened.metadata()["nnsight-compiler"]
        assert list(opened.keys()) == []
    assert text.startswith('{"format":"nnsight-compiler-experiment","version":1,')


def test_a_loaded_experiment_has_the_program_the_name_and_the_signature(ran) -> None:
    folder, found, *_ = ran
    for (module, name), experiment in found.items():
        loaded = Experiment.load(folder / f"{module}.{name}.safetensors")
        assert loaded.ir == experiment.ir
        assert repr(loaded) == repr(experiment)
        assert loaded.__name__ == experiment.__name__
        assert loaded.host_ops == ()
        assert loaded.cache_info() == (0, 0, 0)
