"""What one tenant's jobs show of the service and of other tenants' jobs, and leave for these: nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from admitting import job_of

from nnsight_compiler import LanguageModel, intervene
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.serial import to_json
from nnsight_compiler.remote.job import Job, pack, unpack
from nnsight_compiler.service.engine import JobLimits, RefusedError
from nnsight_compiler.service.execution import ModelRunner
from nnsight_compiler.service.runner import ChangedModelError, Task


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny")


@pytest.fixture(scope="module")
def runner(model: LanguageModel) -> ModelRunner:
    return ModelRunner(model)


@intervene
def probe(model, x):
    with model.trace("a b"):
        logits = model.output.logits.save()
    return logits[0, -1, :4]


GLOBALS: dict[str, Any] = {"torch": {"namespace": "torch"}, "operator": {"namespace": "operator"},
                           "numpy": {"namespace": "numpy"}}  # fmt: skip


def hostile(model: LanguageModel, text: str, x: object = 1, sources: dict[str, Any] | None = None) -> Job:
    """A job whose program someone wrote by hand, in the text form of the IR."""
    job = job_of(probe, {"model": model, "x": x})
    document = json.loads(json.dumps(job.code))
    program = parse_program("experiment f(%x)\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    names = {op.name for op in program.walk() if type(op).__name__ == "Global"}
    (named,) = document["globals"].values()
    document["globals"] = {name: node for name, node in {"model": named, **GLOBALS}.items() if name in names}
    document["program"], document["sources"] = to_json(program), sources or {}
    return unpack(pack(replace(job, code=document)))


def placed(job: Job, file: str, line: int) -> Job:
    """The same, said to be written in this file and line."""

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: [0, line, 0, line, 1] if key == "span" else moved(value) for key, value in node.items()}
        return [moved(each) for each in node] if isinstance(node, list) else node

    program = {**moved(job.code["program"]), "files": [file]}
    return replace(job, code={**job.code, "program": program})


LIMITS = JobLimits(wall_seconds=60, memory_bytes=500 * 2**20, forwards=100, max_result_bytes=2**20)


def ran(runner: ModelRunner, job: Job) -> bytes | Exception:
    """What a worker's run of a job gives."""

    def nothing(*_: object) -> None:
        return None

    task = Task("a", lambda: pack(job), lambda sha: b"", LIMITS, lambda: None, lambda: None, nothing)
    ((_, answer),) = runner.run([task])
    return answer


def told(runner: ModelRunner, job: Job) -> str:
    """All that a tenant is told of a job: of the check, and of the run."""
    try:
        runner.admit(pack(job), lambda sha: b"", LIMITS)
        checked: Any = None
    except RefusedError as error:
        checked = error.record
    answer = ran(runner, job)
    return json.dumps([checked, runner.record(answer) if isinstance(answer, Exception) else answer.decode("latin-1")])


def test_a_job_is_shown_no_line_of_a_file_of_the_service(
    model: LanguageModel, runner: ModelRunner, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nthe-secret\nthird\n")
    for text in (
        "%y = %x / 0\nreturn %y",  # fails when it runs, and its traceback has the line
        "%m = global model\n%a = attr %m.layers\n%b = attr %a.nowhere\nreturn %b",  # does not compile
        "%f = global eval\n%r = call %f('1')\nreturn %r",  # is not admitted
    ):
        job = placed(hostile(model, text), str(file), 2)
        said = told(runner, job)
        assert str(file) in said
        assert "the-secret" not in said


def test_a_job_is_shown_its_own_lines_and_nobody_elses(
    model: LanguageModel, runner: ModelRunner, tmp_path: Path
) -> None:
    text = "%y = %x / 0\nreturn %y"
    own = {"demo.py": {"2": "my_secret = 1 / 0"}}
    for _ in range(2):  # read, and then known
        assert "my_secret" in told(runner, placed(hostile(model, text, sources=own), "demo.py", 2))
    assert "my_secret" not in told(runner, placed(hostile(model, text), "demo.py", 2))
    there = tmp_path / "demo.py"
    there.write_text("")
    own = {str(there): {"2": "my_secret = 1 / 0"}}
    said = told(runner, placed(hostile(model, text, sources=own), str(there), 2))
    assert "my_secret" in said, "it does not show whether the service has such a file"


def test_lines_without_end_are_refused(model: LanguageModel, runner: ModelRunner) -> None:
    many = {f"{number}.py": {"1000000": "x"} for number in range(100)}
    with pytest.raises(RefusedError) as refused:
        runner.admit(pack(hostile(model, "return %x", sources=many)), lambda sha: b"", LIMITS)
    assert "they are of more than 1,048,576 lines" in refused.value.record["message"]


HIDDEN = "%l = list [%w]\n%v = item %l[0]\n"
"""A weight through a list: nothing can be seen of what is done with it."""
WEIGHT = "%m = global model\n%i = attr %m._wrapped\n%h = attr %i.lm_head\n%w = attr %h.weight\n" + HIDDEN
CHANGES = {
    "a weight": (
        WEIGHT + "%d = attr %v.data\n%f = attr %d.zero_\n%r = call %f()\nreturn 1",
        "`transformer.wte.weight` of the model",
    ),
    "the memory of a weight": (
        WEIGHT + "%d = attr %v.detach\n%e = call %d()\n%n = attr %e.numpy\n%a = call %n()\nset_item %a[0] = 3.0\n"
        "return 1",
        "`transformer.wte.weight` of the model",
    ),
    "a dtype": (
        "%m = global model\n%h = attr %m._wrapped\n%f = attr %h.half\n%r = call %f()\nreturn 1",
        "of the model",
    ),
    "the configuration": (
        "%m = global model\n%h = attr %m.config\n%f = attr %h.update\n%d = dict {'vocab_size': 5}\n%r = call %f(%d)\n"
        "return 1",
        "`model.config.vocab_size`",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_job_that_changes_the_model_fails_and_ends_its_process(name: str) -> None:
    text, what = CHANGES[name]
    model = LanguageModel("tiny")
    runner = ModelRunner(model)
    sound = job_of(probe, {"model": model, "x": 1})
    assert isinstance(ran(runner, sound), bytes)
    answer = ran(runner, hostile(model, text))
    assert isinstance(answer, ChangedModelError)
    assert what in str(answer)
    assert "which jobs of others would see: its result is withheld" in str(answer)


def test_gradients_and_flags_are_left_for_nobody(model: LanguageModel, runner: ModelRunner) -> None:
    weight = model._wrapped.lm_head.weight
    wanted = weight.requires_grad
    text = "%m = global model\n%h = attr %m._wrapped\n%f = attr %h.requires_grad_\n%r = call %f(False)\nreturn 1"
    ran(runner, hostile(model, text))
    assert weight.requires_grad == wanted
    weight.grad = torch.ones_like(weight)
    model._wrapped.train()
    assert isinstance(ran(runner, job_of(probe, {"model": model, "x": 1})), bytes)
    assert weight.grad is None
    assert not model._wrapped.training


@pytest.mark.parametrize(
    "call",
    ["set_num_threads(3)", "set_flush_denormal(True)", "set_default_device('meta')", "set_printoptions(precision=1)",
     "use_deterministic_algorithms(True)", "set_float32_matmul_precision('medium')", "set_anomaly_enabled(True)"],
)  # fmt: skip
def test_settings_that_would_outlive_a_job_are_refused(model: LanguageModel, runner: ModelRunner, call: str) -> None:
    name, _, given = call.partition("(")
    text = f"%t = global torch\n%f = attr %t.{name}\n%r = call %f({given}\nreturn 1"
    assert f"torch.{name}: it is not in the table of known calls" in told(runner, hostile(model, text))
