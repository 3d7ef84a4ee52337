"""Objects of the user's plain classes in a job: their methods are code, their attributes data; and what no job may make
of them. The oracle is Python: the same experiment in this process calls the methods themselves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from admitting import job_of
from torch import nn

from nnsight_compiler import CompileError, FileError, LanguageModel, intervene
from nnsight_compiler.ir.parser import parse_program
from nnsight_compiler.ir.serial import to_json
from nnsight_compiler.remote.backends import LocalBackend
from nnsight_compiler.remote.execute import Executor
from nnsight_compiler.remote.job import Job, pack, unpack

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    torch.set_num_threads(1)
    return LanguageModel("tiny", dispatch=True)


class Base:
    times = 1

    def count(self) -> None:
        self.calls += self.times


class Scaler(Base):
    def __init__(self, factor: float) -> None:
        self.factor, self.calls, self.__hidden = factor, 0, 1.0
        self.norms: list[torch.Tensor] = []
        self.shift = torch.ones(128)
        self.unneeded = "x"

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scaled(hidden) + self.shift

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        self.count()
        self.norms.append(hidden.norm())
        self.last = self.half(hidden[0, -1, :3]) * self.__hidden
        return hidden * self.factor

    @staticmethod
    def half(hidden: torch.Tensor) -> torch.Tensor:
        return hidden / 2


class Adapter:
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        torch.manual_seed(3)
        self.down, self.up, self.act = nn.Linear(128, 4), nn.Linear(4, 128), act
        self.scaler = Scaler(0.5)
        self.trained = [self.down.weight, self.up.weight]

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scaler.scaled(self.up(self.act(self.down(hidden))))


@intervene
def scale(model, prompt, scaler):
    with model.trace(prompt):
        model.layers[0].output = scaler(model.layers[0].output)
        logits = model.lm_head.output[0, -1]
    return logits, scaler


@intervene
def train(model, prompt, adapter, rounds):
    optimizer = torch.optim.SGD(adapter.trained, lr=0.1)
    for _ in range(rounds):
        with model.trace(prompt):
            hidden = model.layers[1].output
            model.layers[1].output = hidden + adapter.apply(hidden)
            loss = -model.lm_head.output[0, -1].log_softmax(-1)[7]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_an_object_is_sent_and_what_changed_of_it_comes_back(tiny: LanguageModel) -> None:
    here, there = Scaler(3.0), Scaler(3.0)
    norms, shift = there.norms, there.shift
    wanted, _ = scale(tiny, PROMPT, here)
    found, returned = scale(tiny, PROMPT, there, remote="local")
    close(found, wanted)
    assert returned is there
    assert there.norms is norms
    assert there.shift is shift
    assert there.calls == here.calls == 1
    assert list(vars(there)) == list(vars(here))
    assert there._Scaler__hidden == 1.0  # type: ignore[attr-defined]
    close(there.norms, here.norms)
    close(there.last, here.last)


def test_another_objects_data_is_data_for_known_code(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    run = Executor.run
    monkeypatch.setattr(Executor, "run", lambda self, job: digests.append(job.digest) or run(self, job))
    found = [scale(tiny, PROMPT, Scaler(factor), remote="local")[0] for factor in (2.0, 5.0, 2.0)]
    assert len(digests) == 3
    assert len(set(digests)) == 1
    close(found[2], found[0])
    close(found[1], scale(tiny, PROMPT, Scaler(5.0))[0])
    assert not torch.equal(found[0], found[1])


def test_an_object_that_holds_modules_is_trained_there(tiny: LanguageModel) -> None:
    for act in (torch.relu, nn.Tanh()):
        here, there = Adapter(act), Adapter(act)
        before = there.up.weight.detach().clone()
        assert train(tiny, PROMPT, there, 3, remote="local") == pytest.approx(train(tiny, PROMPT, here, 3), abs=1e-4)
        close(there.up.weight, here.up.weight)
        assert not torch.equal(there.up.weight, before)
        assert there.trained[1] is there.up.weight
        assert there.scaler.calls == 3


def test_two_names_for_one_tensor_stay_one(tiny: LanguageModel) -> None:
    @intervene
    def shifted(model, prompt, adapter, weight):
        with model.trace(prompt):
            norm = adapter.down(model.layers[0].output)[0, -1].norm()
        with torch.no_grad():
            adapter.down.weight.mul_(2)
        return norm, weight.sum()

    here, there = Adapter(torch.relu), Adapter(torch.relu)
    wanted = shifted(tiny, PROMPT, here, here.down.weight)
    found = shifted(tiny, PROMPT, there, there.down.weight, remote="local")
    close(found, wanted)
    close(there.down.weight, here.down.weight)


def test_an_object_that_is_made_in_the_function(tiny: LanguageModel) -> None:
    @intervene
    def made(model, prompt):
        scaler = Scaler(2.0)
        with model.trace(prompt):
            model.layers[0].output = scaler.scaled(model.layers[0].output)
            logits = model.lm_head.output[0, -1]
        return logits, scaler.calls

    close(made(tiny, PROMPT, remote="local"), made(tiny, PROMPT))


def test_a_block_has_one_too(tiny: LanguageModel) -> None:
    scaler = Scaler(2.0)
    with tiny.trace(PROMPT, remote="local"):
        tiny.layers[0].output = scaler(tiny.layers[0].output)
        logits = tiny.lm_head.output[0, -1].save()
    close(logits, scale(tiny, PROMPT, Scaler(2.0))[0])
    assert scaler.calls == 1


def test_attributes_are_set_and_deleted_outside_of_methods(tiny: LanguageModel) -> None:
    @intervene
    def counts(model, prompt, scaler):
        with model.trace(prompt):
            scaler.seen = model.layers[0].output[0, -1].norm()
        scaler.factor += 1
        del scaler.unneeded
        return scaler.factor

    here, there = Scaler(1.0), Scaler(1.0)
    assert counts(tiny, PROMPT, there, remote="local") == counts(tiny, PROMPT, here) == 2.0
    close(there.seen, here.seen)  # type: ignore[attr-defined]
    assert not hasattr(there, "unneeded")


# --- what is no plain class ---


class Represented(Scaler):
    def __repr__(self) -> str:
        return "scaler"


class Slotted:
    __slots__ = ("factor",)

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.factor


class Looked(Scaler):
    def __getattr__(self, name: str) -> Any:
        return 2.0


class Subclassed(Scaler):
    def __init_subclass__(cls) -> None:
        pass


class Meta(type):
    pass


class OfMeta(Scaler, metaclass=Meta):
    pass


class OfDict(dict):  # type: ignore[type-arg]
    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclasses.dataclass
class Data:
    factor: float = 2.0

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.factor


class Replaced(Scaler):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.scaled = lambda hidden: hidden  # type: ignore[method-assign]


def slotted() -> Slotted:
    made = Slotted()
    made.factor = 2.0
    return made


REFUSED = {
    "a representation": (lambda: Represented(1.0), "its class `Represented` defines `__repr__`"),
    "slots": (slotted, "its class `Slotted` defines `__slots__`"),
    "attributes that are made up": (lambda: Looked(1.0), "its class `Looked` defines `__getattr__`"),
    "a hook for subclasses": (lambda: Subclassed(1.0), "its class `Subclassed` defines `__init_subclass__`"),
    "a metaclass": (lambda: OfMeta(1.0), "its class `OfMeta` has the metaclass `Meta`"),
    "a class of Python's": (OfDict, "its class `OfDict` inherits from `builtins.dict`"),
    "a class that a decorator has changed": (Data, "its class `Data` defines `__"),
    "a method of its own": (Replaced, "its method `scaled` was replaced on the object itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_objects_that_are_not_sent(tiny: LanguageModel, name: str) -> None:
    make, reason = REFUSED[name]

    @intervene
    def use(model, prompt, scaler):
        with model.trace(prompt):
            hidden = scaler.scaled(model.layers[0].output)
        return hidden

    with pytest.raises(CompileError) as caught:
        use(tiny, PROMPT, make(), remote="local")
    (found,) = caught.value.diagnostics
    assert found.span.line == use._function.__code__.co_firstlineno + 3
    assert found.reason.startswith(f"the call of `.scaled` of an object that the client alone has ({reason}")


class Odd(Scaler):
    table = [1]  # noqa: RUF012

    @property
    def doubled(self) -> float:
        return self.factor * 2

    @classmethod
    def made(cls, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def on_disk(self, hidden: torch.Tensor) -> torch.Tensor:
        numpy.save("/tmp/nowhere", hidden)
        return hidden


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda scaler, hidden: hidden * scaler.doubled, "`Odd.doubled`, which is neither a method nor a constant"),
        (lambda scaler, hidden: hidden * scaler.table[0], "`Odd.table`, which is neither a method nor a constant"),
        (lambda scaler, hidden: scaler.made(hidden), "`Odd.made`, which is neither a method nor a constant"),
        (lambda scaler, hidden: scaler.on_disk(hidden), "the call of `numpy.save`, which is not in the table of known"),
    ],
)
def test_members_that_are_not_sent(tiny: LanguageModel, use: Callable[[Any, Any], Any], reason: str) -> None:
    @intervene
    def used(model, prompt, scaler):
        with model.trace(prompt):
            hidden = use(scaler, model.layers[0].output)
        return hidden

    with pytest.raises((CompileError, FileError)) as caught:
        used(tiny, PROMPT, Odd(1.0), remote="local")
    assert "tests/remote/test_instances.py" in str(caught.value).replace("\\", "/")
    assert caught.value.diagnostics


# --- what strangers write into a job ---


@intervene
def plain(model, prompt, scaler, value):
    with model.trace(prompt):
        hidden = scaler.scaled(model.layers[0].output)
    return hidden, value


def sound(scaler: Any, value: Any = 1) -> Job:
    return job_of(plain, {"model": MODEL, "prompt": PROMPT, "scaler": scaler, "value": value})


MODEL: Any = None


@pytest.fixture(autouse=True)
def _model(tiny: LanguageModel) -> None:
    global MODEL
    MODEL = tiny


def changed(job: Job, change: Callable[[Any], None]) -> Job:
    """The job with a document that was changed."""
    from nnsight_compiler.remote.job import packed, unpacked

    document, tensors = unpacked(pack(job))
    document = json.loads(json.dumps(document))
    change(document)
    return unpack(packed(document, tensors))


def entry(document: Any, kind: str) -> Any:
    return next(each for each in document["code"]["objects"] if each["kind"] == kind)


def of_class(**members: Any) -> Callable[[Any], None]:
    return lambda document: entry(document, "class")["members"].update(members)


def method(document: Any) -> Any:
    return next(iter(entry(document, "class")["members"].values()))["method"]


def member(name: str, kind: str = "method") -> Callable[[Any], None]:
    return lambda document: entry(document, "class")["members"].update({name: {kind: method(document)}})


def base(name: str) -> Callable[[Any], None]:
    return lambda document: entry(document, "class").update(base=name)


def attribute(name: str, node: Any) -> Callable[[Any], None]:
    return lambda document: entry(document, "instance")["attributes"].update({name: node})


def data(name: str, node: Any, number: int | None = None) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        found = document["code"]["objects"].index(entry(document, "instance")) if number is None else number
        document["attributes"] = [[found, {name: node}]]

    return change


WRITTEN = {
    "a method that Python calls": (member("__del__"), "'__del__' is no name of a method"),
    "attributes that are made up": (member("__getattr__"), "'__getattr__' is no name of a method"),
    "a way to be copied": (member("__reduce__"), "'__reduce__' is no name of a method"),
    "a class that is told of its subclasses": (member("__init_subclass__"), "'__init_subclass__' is no name of a meth"),
    "a property": (member("factor2", "property"), "'property' is no kind of member"),
    "a static `__call__`": (member("__len__", "static"), "'static' is no kind of member"),
    "a descriptor": (of_class(other={"value": {"known": "builtins.print"}}), "a plain class has methods and constants"),
    "functions in a constant": (
        of_class(other={"value": {"tuple": [{"known": "builtins.print"}]}}), "a plain class has methods and constants",
    ),
    "a list of the class": (
        lambda document: entry(document, "class")["members"].update(
            other={"value": {"object": document["code"]["objects"].index(entry(document, "class"))}}
        ),
        "contains itself",
    ),
    "a method that is none": (of_class(other={"method": {"known": "builtins.print"}}), "a method is a function of the"),
    "a class of Python's": (base("builtins.dict"), "'builtins.dict' is no module of torch's"),
    "a metaclass": (base("builtins.type"), "'builtins.type' is no module of torch's"),
    "an object of a torch class": (base("torch.nn.Module"), "'__call__' is no name of a method"),
    "an attribute of Python's": (attribute("__class__", {"int": 1}), "'__class__' is no name for an attribute"),
    "an attribute that hides a method": (attribute("scaled", {"int": 1}), "'scaled' is no name for an attribute"),
    "data that hides a method": (data("scaled", {"int": 1}), "'scaled' is no name for an attribute"),
    "data of Python's": (data("__dict__", {"int": 1}), "'__dict__' is no name for an attribute"),
    "data that is code": (data("f", {"known": "builtins.print"}), "'known' does not hold 'builtins.print'"),
    "data for no object": (data("f", {"int": 1}, 99), "only objects of the code's classes have attributes"),
    "data for a class": (
        lambda document: data("f", {"int": 1}, document["code"]["objects"].index(entry(document, "class")))(document),
        "only objects of the code's classes have attributes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_job_that_someone_wrote_is_refused(tiny: LanguageModel, name: str) -> None:
    change, reason = WRITTEN[name]
    with pytest.raises(FileError) as caught:
        Executor(tiny).run(changed(sound(Scaler(2.0)), change))
    assert reason in str(caught.value)


def test_the_job_that_they_begin_with_runs(tiny: LanguageModel) -> None:
    assert Executor(tiny).run(changed(sound(Scaler(2.0)), lambda document: None))


class Disguise:
    """Has a module under a name by which something else is asked for what a module of this class may be."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        self.inner.tofile("/tmp/written-by-a-job")
        return hidden


class Filing(nn.Module):
    def tofile(self, path: str) -> str:
        return path

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_an_array_is_no_module_because_another_objects_attribute_is_one(tiny: LanguageModel) -> None:
    """Both objects are of one class; of one of them `inner` is a module of the file, whose `tofile` is its own."""
    job = sound(Disguise(Filing()), Disguise(numpy.ones(2)))
    with pytest.raises(FileError, match=r"the method `\.tofile\(…\)`: it is not in the table of known calls"):
        Executor(tiny).run(job)


ATTEMPTS = {
    "a class that is called": ("%c = attr %scaler.__class__\n  %r = call %c()", "the method `.__class__"),
    "a method with another object": (
        "%c = attr %scaler.__class__\n  %f = attr %c.scaled\n  %r = call %f(%value, %value)",
        "the method `.scaled(…)`",
    ),
    "a method that is replaced": ("set_attr %scaler.scaled = 1\n  %r = 1 + 1", "`.scaled`, a method that is replaced"),
    "a method of something else with the name of one": (
        "%v = 1 + %value\n  %f = attr %v.scaled\n  %r = call %f(1)", "the method `.scaled(…)`",
    ),
    "an attribute of what is data": ("set_attr %value.factor = 1\n  %r = 1 + 1", "`.factor` of what only the run can"),
    "the insides": ("%r = attr %scaler.__dict__", "no file may ask for the attribute '__dict__'"),
    "the functions behind": ("%f = attr %scaler.scaled\n  %r = attr %f.__func__", "no file may ask for the attribute"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTEMPTS)
def test_programs_that_reach_for_more(tiny: LanguageModel, name: str) -> None:
    text, reason = ATTEMPTS[name]

    def change(document: Any) -> None:
        (named,) = [key for key, node in document["code"]["globals"].items() if node == instance(document)]
        (model,) = [key for key, node in document["code"]["globals"].items() if "model" in node]
        program = (
            f"experiment plain(%prompt, %value)\n  %model = global {model}\n  %scaler = global {named}\n"
            f"  forward %0 = trace %model(%prompt)\n    %h = read %model@lm_head output\n    %k = save %h\n"
            f"  {text}\n  return %r\n"
        )
        document["code"]["program"] = to_json(parse_program(program.replace("    %h = read", "    %h = read")))

    def instance(document: Any) -> Any:
        return {"object": document["code"]["objects"].index(entry(document, "instance"))}

    with pytest.raises(FileError) as caught:
        Executor(tiny).run(changed(sound(Scaler(2.0)), change))
    assert reason in str(caught.value)


def test_a_result_changes_no_method(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight_compiler.remote.job import packed, unpacked

    run = LocalBackend.run

    def damaged(name: str) -> Callable[..., bytes]:
        def change(self: LocalBackend, job: Job, on_token: Any = None) -> bytes:
            document: Any
            document, tensors = unpacked(run(self, job, on_token))
            (held,) = [entry for _, entry, _ in document["changed"] if entry["kind"] == "attributes"]
            held["set"].append([name, {"int": 1}])
            return packed(document, tensors)

        return change

    for name in ("scaled", "__class__"):
        monkeypatch.setattr(LocalBackend, "run", damaged(name))
        scaler = Scaler(2.0)
        with pytest.raises(FileError, match=f"'{name}' is no name for an attribute"):
            scale(tiny, PROMPT, scaler, remote="local")
        assert scaler.calls == 0
