"""Undecorated `with model.trace(…)`, wherever Python allows a `with`. The oracle: torch hooks written by hand."""

# ruff: noqa: F821, PT012, PT031, SIM117

import contextlib
import linecache
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from nnsight_compiler import CompileError, ExperimentError, NNsight, intervene, save

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Three layers, each a residual block."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def hooked(module, x, reads=(), writes=None):
    """The outputs of submodules in one plain forward, with writes by name, and the model's result under ''."""
    seen = {}
    handles = []
    for name, part in module.named_modules():
        if name and (name in reads or name in (writes or {})):

            def hook(part, args, out, name=name):
                if writes and name in writes:
                    out = writes[name](out)
                seen[name] = out.detach().clone()
                return out

            handles.append(part.register_forward_hook(hook))
    with torch.no_grad():
        seen[""] = module(x)
    for handle in handles:
        handle.remove()
    return seen


torch.manual_seed(0)
NET = Net().eval()
X = torch.randn(2, 4)
model = NNsight(NET)

# --- at the level of a module ---

with model.trace(X):
    top_hidden = model.layers[1].output.save()
    top_untouched = model.layers[0].output
    top_result = model.output.save()


def test_at_module_level():
    want = hooked(NET, X, ["layers.1"])
    assert torch.equal(top_hidden, want["layers.1"])
    assert torch.equal(top_result, want[""])
    with pytest.raises(ExperimentError, match=r"test_blocks_run\.py:\d+.*`top_untouched`"):
        top_untouched + 1


class InBody:
    """A class body is a scope of its own."""

    with model.trace(X):
        hidden = model.layers[2].output.save()
        answer = 42

    doubled = hidden * 2


def test_in_a_class_body():
    want = hooked(NET, X, ["layers.2"])["layers.2"]
    assert torch.equal(InBody.hidden, want)
    assert torch.equal(InBody.doubled, want * 2)
    assert InBody.answer == 42


def test_in_a_function():
    with model.trace(X):
        hidden = model.layers[1].output.save()
        model.layers[1].output = hidden * 0
        result = model.output.save()
    want = hooked(NET, X, ["layers.1"])["layers.1"]
    assert torch.equal(hidden, want)
    assert torch.equal(result, hooked(NET, X, writes={"layers.1": lambda out: out * 0})[""])


class Researcher:
    def __init__(self, model, scale):
        self.model, self.scale = model, scale

    def run(self, x):
        with self.model.trace(x):
            self.model.layers[0].output *= self.scale
            result = self.model.output.save()
        return result

    @staticmethod
    def static(x):
        with model.trace(x):
            result = model.output.save()
        return result

    @classmethod
    def of_class(cls, x):
        with model.trace(x):
            name = cls.__name__
            result = model.output.save()
        return name, result


def test_in_methods():
    found = Researcher(model, 3.0).run(X)
    assert torch.equal(found, hooked(NET, X, writes={"layers.0": lambda out: out * 3.0})[""])
    assert torch.equal(Researcher.static(X), NET(X))
    name, result = Researcher.of_class(X)
    assert name == "Researcher"
    assert torch.equal(result, NET(X))


def test_body_on_the_line_of_the_with():
    with model.trace(X): result = model.output.save()  # noqa: E701  # fmt: skip
    assert torch.equal(result, NET(X))


def test_several_statements_on_the_line_of_the_with():
    with model.trace(X): hidden = model.layers[0].output.save(); result = model.output.save()  # noqa: E701, E702  # fmt: skip
    assert torch.equal(hidden, hooked(NET, X, ["layers.0"])["layers.0"])
    assert torch.equal(result, NET(X))


def test_with_items_after_the_trace():
    log = []

    @contextlib.contextmanager
    def noted(name):
        log.append(f"in {name}")
        yield name
        log.append(f"out {name}")

    with model.trace(X), noted("a") as a:
        result = a * 2
    assert result == "aa"
    assert log == ["in a", "out a"]
    assert a == "a"


def test_a_context_inside_the_trace_over_several_sites_is_refused():
    """It could not be entered once: `a` is known before the model runs, the output when it ends."""

    @contextlib.contextmanager
    def noted(name):
        log.append(name)
        yield name

    log = []
    with pytest.raises(CompileError, match=r"test_blocks_run\.py:\d+:\d+: this context[\s\S]*way out"):
        with model.trace(X), noted("a"):
            first = model.layers[0].output.save()  # noqa: F841
            result = model.output.save()  # noqa: F841
    assert log == []


def test_with_items_before_the_trace():
    log = []

    @contextlib.contextmanager
    def noted(name):
        log.append(f"in {name}")
        yield name
        log.append(f"out {name}")

    with noted("a") as a, model.trace(X):
        result = model.output.save()
    assert torch.equal(result, NET(X))
    assert log == ["in a", "out a"]
    assert a == "a"


def test_no_grad_around_and_beside():
    with torch.no_grad(), model.trace(X):
        result = model.output.save()
    assert torch.equal(result, NET(X))
    with torch.no_grad():
        with model.trace(X):
            other = model.output.save()
    assert torch.equal(other, NET(X))


def test_as_tracer():
    with model.trace(X) as tracer:
        result = model.output.save()
    assert torch.equal(result, NET(X))
    assert tracer is not None


def test_parenthesised_with():
    with (
        model.trace(
            X,
        ) as tracer,
    ):
        result = model.output.save()
    assert tracer is not None
    assert torch.equal(result, NET(X))


def test_in_nested_loops():
    found = {}
    for layer in range(3):
        for scale in (0.0, 2.0):
            with model.trace(X):
                model.layers[layer].output = model.layers[layer].output * scale
                result = model.output.save()
            found[layer, scale] = result
    for (layer, scale), result in found.items():
        want = hooked(NET, X, writes={f"layers.{layer}": lambda out, s=scale: out * s})[""]
        assert torch.equal(result, want)


def test_continue_break_and_else_around_a_trace():
    seen = []
    for layer in range(5):
        if layer == 1:
            continue
        if layer == 3:
            break
        with model.trace(X):
            hidden = model.layers[layer].output.save()
        seen.append(hidden)
    want = hooked(NET, X, ["layers.0", "layers.2"])
    assert [torch.equal(a, b) for a, b in zip(seen, (want["layers.0"], want["layers.2"]), strict=True)] == [True] * 2


def test_in_a_loop_with_different_models():
    results = []
    nets = [Net(width).eval() for width in (3, 4)]
    for net in nets:
        x = torch.ones(1, net.head.in_features)
        wrapped = NNsight(net)
        with wrapped.trace(x):
            results.append(wrapped.layers[-1].output.save())
    for net, found in zip(nets, results, strict=True):
        assert torch.equal(found, hooked(net, torch.ones(1, net.head.in_features), ["layers.2"])["layers.2"])


def test_two_traces_on_two_lines_and_one_value():
    with model.trace(X):
        source = model.layers[0].output.save()
    with model.trace(X * 2):
        model.layers[0].output = source
        result = model.output.save()
    kept = hooked(NET, X, ["layers.0"])["layers.0"]
    assert torch.equal(result, hooked(NET, X * 2, writes={"layers.0": lambda _: kept})[""])


def test_an_empty_body_runs_and_leaves_nothing():
    with model.trace(X):
        pass
    assert "result" not in locals()


def test_return_right_after_and_inside_try_finally():
    def work():
        try:
            with model.trace(X):
                result = model.output.save()
            return result
        finally:
            log.append("finally")

    log = []
    assert torch.equal(work(), NET(X))
    assert log == ["finally"]


def test_reads_of_outer_functions():
    def outer(scale):
        def inner():
            with model.trace(X):
                model.layers[1].output = model.layers[1].output * scale
                result = model.output.save()
            return result

        return inner

    for scale in (2.0, 3.0):
        want = hooked(NET, X, writes={"layers.1": lambda out, s=scale: out * s})[""]
        assert torch.equal(outer(scale)(), want)


def test_assigns_a_nonlocal_and_a_global():
    count = 0

    def step():
        nonlocal count
        global _made
        with model.trace(X):
            count = count + 1
            _made = model.output.save()

    step()
    step()
    assert count == 2
    assert torch.equal(_made, NET(X))


def test_a_variable_that_inner_functions_see():
    with model.trace(X):
        result = model.output.save()
    shown = lambda: result  # noqa: E731
    assert torch.equal(shown(), NET(X))


def test_in_a_generator():
    def each():
        for layer in range(3):
            with model.trace(X):
                hidden = model.layers[layer].output.save()
            yield hidden

    want = hooked(NET, X, ["layers.0", "layers.1", "layers.2"])
    for layer, hidden in enumerate(each()):
        assert torch.equal(hidden, want[f"layers.{layer}"])


def test_in_a_coroutine():
    import asyncio

    async def work():
        await asyncio.sleep(0)
        with model.trace(X):
            hidden = model.layers[1].output.save()
        await asyncio.sleep(0)
        return hidden

    assert torch.equal(asyncio.run(work()), hooked(NET, X, ["layers.1"])["layers.1"])


def test_after_an_earlier_error_the_block_works():
    for bad in (True, False):
        try:
            with model.trace(X[:, :3] if bad else X):
                result = model.output.save()
        except Exception:
            assert bad
    assert torch.equal(result, NET(X))


# --- saves ---


def test_saves_of_every_kind():
    with model.trace(X):
        hidden = model.layers[0].output
        tensor = hidden.save()
        through_function = save(hidden)
        number = hidden.sum().item()
        saved_number = save(hidden.sum().item())
        pair = save((hidden, [hidden * 2, {"deep": hidden * 3}]))
        mapping = save({"a": hidden, "b": 2})
        text = f"{number:.3f}"
    want = hooked(NET, X, ["layers.0"])["layers.0"]
    assert torch.equal(tensor, want)
    assert torch.equal(through_function, want)
    assert number == want.sum().item()
    assert saved_number == want.sum().item()
    assert torch.equal(pair[0], want)
    assert torch.equal(pair[1][0], want * 2)
    assert torch.equal(pair[1][1]["deep"], want * 3)
    assert torch.equal(mapping["a"], want)
    assert mapping["b"] == 2
    assert text == f"{want.sum().item():.3f}"


def test_saved_containers_filled_inside():
    with model.trace(X):
        states = list().save()
        named = dict().save()
        for index, layer in enumerate(model.layers):
            states.append(layer.output)
            named[index] = layer.output.norm()
    want = hooked(NET, X, ["layers.0", "layers.1", "layers.2"])
    assert len(states) == 3
    for index in range(3):
        assert torch.equal(states[index], want[f"layers.{index}"])
        assert torch.equal(named[index], want[f"layers.{index}"].norm())


def test_a_tensor_in_a_saved_container_is_as_it_was_when_put_in():
    with model.trace(X):
        states = [].save()
        hidden = model.layers[0].output
        states.append(hidden)
        hidden[:] = 0
        states.append(hidden)
        result = model.output.save()
    want = hooked(NET, X, ["layers.0"])["layers.0"]
    assert torch.equal(states[0], want)
    assert torch.equal(states[1], torch.zeros_like(want))
    assert torch.equal(result, hooked(NET, X, writes={"layers.0": lambda out: out * 0})[""])


def test_containers_from_outside():
    states, box = [], {}

    class Holder:
        pass

    holder = Holder()
    with model.trace(X):
        hidden = model.layers[0].output
        states.append(hidden)
        box["h"] = hidden
        holder.h = hidden
        hidden[:] = 0
        result = model.output.save()
    want = hooked(NET, X, ["layers.0"])["layers.0"]
    assert torch.equal(states[0], want)
    assert torch.equal(box["h"], want)
    assert torch.equal(holder.h, want)
    assert torch.equal(result, hooked(NET, X, writes={"layers.0": lambda out: out * 0})[""])


def test_a_saved_container_that_is_aliased_is_one_object():
    with model.trace(X):
        states = list().save()
        again = states
        again.append(model.layers[0].output)
    assert len(states) == 1
    assert torch.equal(states[0], hooked(NET, X, ["layers.0"])["layers.0"])


def test_a_save_is_the_value_at_that_line():
    with model.trace(X):
        hidden = model.layers[0].output
        before = hidden.save()
        hidden[0] = 7.0
        after = hidden.save()
        result = model.output.save()

    def write(out):
        out = out.clone()
        out[0] = 7.0
        return out

    want = hooked(NET, X, ["layers.0"])["layers.0"]
    assert torch.equal(before, want)
    assert torch.equal(after, write(want))
    assert torch.equal(result, hooked(NET, X, writes={"layers.0": write})[""])


def test_plain_values_come_back_as_in_python():
    with model.trace(X):
        number = 3
        text = "a" + "b"
        items = [1, 2, number]
        for each in items:  # noqa: B007
            pass
        if number > 2:
            chosen = "yes"
        else:
            missing = 1
        result = model.output.save()

        def local(y): return y + number  # fmt: skip

    assert (number, text, items, each, chosen) == (3, "ab", [1, 2, 3], 3, "yes")
    assert "missing" not in locals()
    assert local(1) == 4
    assert torch.equal(result, NET(X))


def test_a_deleted_variable():
    gone = 1
    with model.trace(X):
        result = model.output.save()
        del gone
    assert torch.equal(result, NET(X))
    with pytest.raises(UnboundLocalError, match="'gone'"):
        gone + 1


def test_a_deleted_variable_of_a_module():
    scope = {}
    path = Path(__file__).with_name("no_such_file.py")
    text = "with model.trace(X):\n    result = model.output.save()\n    del gone\n"
    linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)
    try:
        scope.update(model=model, X=X, gone=1)
        exec(compile(text, str(path), "exec"), scope)
    finally:
        del linecache.cache[str(path)]
    assert torch.equal(scope["result"], NET(X))
    assert "gone" not in scope


UNSAVED_USES = {
    "add": lambda v: v + 1,
    "radd": lambda v: 1 + v,
    "tensor on the left": lambda v: torch.ones(1) + v,
    "call": lambda v: v(),
    "len": lambda v: len(v),
    "iterate": lambda v: list(v),
    "attribute": lambda v: v.shape,
    "item": lambda v: v[0],
    "truth": lambda v: bool(v),
    "float": lambda v: float(v),
    "format": lambda v: f"{v:.2f}",
    "compare": lambda v: v == 1,
    "torch function": lambda v: torch.nn.functional.relu(v),
    "torch stack": lambda v: torch.stack([v, v]),
    "hash": lambda v: {v},
    "print": lambda v: print(v),
    "str": lambda v: str(v),
    "matmul": lambda v: v @ v,
    "setitem": lambda v: v.__setitem__(0, 1),
    "rsub": lambda v: 1 - v,
    "rfloordiv": lambda v: 1 // v,
    "rpow": lambda v: 2**v,
    "pos": lambda v: +v,
    "divmod": lambda v: divmod(v, 2),
    "in": lambda v: 1 in v,
    "next": lambda v: next(v),
    "reversed": lambda v: list(reversed(v)),
    "with": lambda v: v.__enter__(),
    "round": lambda v: round(v),
    "complex": lambda v: complex(v),
}


@pytest.mark.parametrize("use", UNSAVED_USES.values(), ids=UNSAVED_USES)
def test_use_of_an_unsaved_value_names_its_line(use):
    with model.trace(X):
        hidden = model.layers[0].output
        result = model.output.save()
    line = test_use_of_an_unsaved_value_names_its_line.__wrapped_line__
    with pytest.raises(ExperimentError) as caught:
        use(hidden)
    assert f"test_blocks_run.py:{line}:" in str(caught.value)
    assert "`hidden`" in str(caught.value)
    assert ".save()" in str(caught.value)
    assert torch.equal(result, NET(X))


test_use_of_an_unsaved_value_names_its_line.__wrapped_line__ = (
    test_use_of_an_unsaved_value_names_its_line.__code__.co_firstlineno + 3
)


def test_an_unsaved_value_that_is_not_used_is_fine():
    with pytest.warns(UserWarning, match="`hidden`"), model.trace(X):
        hidden = model.layers[0].output
        hidden = hidden * 2
        result = model.output.save()
    assert torch.equal(result, NET(X))


def test_unsaved_in_a_container_made_inside():
    with model.trace(X):
        states = []
        for layer in model.layers:
            states.append(layer.output)
        result = model.output.save()
    with pytest.raises(ExperimentError, match="states"):
        states[0] + 1
    assert torch.equal(result, NET(X))


def test_unsaved_value_overwrites_an_older_variable():
    hidden = "old"
    with model.trace(X):
        hidden = model.layers[0].output
        result = model.output.save()
    with pytest.raises(ExperimentError, match="hidden"):
        hidden + 1
    assert torch.equal(result, NET(X))


# --- misuse ---


def test_without_with_is_an_error():
    with pytest.raises(ExperimentError, match=r"without `with`") as caught:
        model.trace(X)
    assert "test_blocks_run.py" in str(caught.value)
    with pytest.raises(ExperimentError, match=r"without `with`"):
        tracer = model.trace(X)  # noqa: F841
    with pytest.raises(ExperimentError, match=r"without `with`"):
        print(model.trace(X))
    with pytest.raises(ExperimentError, match=r"without `with`"):
        [model.trace(X)]
    with pytest.raises(ExperimentError, match=r"without `with`"):
        a = b = model.trace(X)  # noqa: F841


def test_exec_names_from_source_which_works():
    text = "with model.trace(X):\n    hidden = model.layers[0].output.save()\n"
    with pytest.raises(ExperimentError, match=r"intervene\.from_source"):
        exec(text, {"model": model, "X": X})
    text = (
        "@intervene\ndef read(model, x):\n    with model.trace(x):\n        h = model.layers[0].output\n    return h\n"
    )
    scope = {"intervene": intervene}
    with pytest.raises(ExperimentError, match=r"intervene\.from_source"):
        exec(text + "read(model, X)\n", {**scope, "model": model, "X": X})
    experiment = intervene.from_source(text)
    assert torch.equal(experiment(model, X), hooked(NET, X, ["layers.0"])["layers.0"])


def test_from_source_indented_with_globals_and_an_error_line():
    text = """
    def read(model, x):
        with model.trace(x):
            h = model.layers[0].output * FACTOR
        return h
    """
    assert torch.equal(
        intervene.from_source(text, {"FACTOR": 2})(model, X), hooked(NET, X, ["layers.0"])["layers.0"] * 2
    )


# --- trace and profile functions ---


def test_trace_and_profile_functions_are_set_again():
    events = []

    def tracing(frame, event, argument):
        events.append(event)
        return tracing

    def profiling(frame, event, argument):
        pass

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(tracing)
    sys.setprofile(profiling)
    try:
        with model.trace(X):
            result = model.output.save()
        found = sys.gettrace(), sys.getprofile()
        local = sys._getframe().f_trace
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    assert found == (tracing, profiling)
    assert local is None or local is tracing
    assert torch.equal(result, NET(X))


def test_a_local_trace_function_keeps_working_after_the_block():
    lines = []

    def traced():
        with model.trace(X):
            result = model.output.save()
        a = 1
        b = a + 1
        return result, b

    def tracing(frame, event, argument):
        if frame.f_code is traced.__code__:
            if event == "line":
                lines.append(frame.f_lineno - traced.__code__.co_firstlineno)
            return tracing
        return None

    before = sys.gettrace()
    sys.settrace(tracing)
    try:
        result, _ = traced()
    finally:
        sys.settrace(before)
    assert lines[0] == 1
    assert lines[-3:] == [3, 4, 5]
    assert torch.equal(result, NET(X))


def test_no_trace_function_is_left_where_there_was_none():
    before = sys.gettrace()
    sys.settrace(None)
    try:
        with model.trace(X):
            result = model.output.save()
        assert sys.gettrace() is None
        assert sys._getframe().f_trace is None
        assert sys._getframe().f_trace_opcodes is False
        with pytest.raises(ZeroDivisionError), model.trace(X):
            model.layers[0].output = model.layers[0].output * (1 / 0)
            never = model.output.save()  # noqa: F841
        assert sys.gettrace() is None
    finally:
        sys.settrace(before)
    assert torch.equal(result, NET(X))


def run_python(*arguments, text=None, cwd=None):
    return subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=120, cwd=cwd, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SCRIPT = textwrap.dedent(
    """\
    import torch
    from torch import nn
    from nnsight_compiler import NNsight
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    seen = []
    handle = net[0].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    plain = net(torch.ones(1, 2))
    handle.remove()
    model = NNsight(net)
    with model.trace(torch.ones(1, 2)):
        hidden = model[0].output.save()
        result = model.output.save()
    assert torch.equal(hidden, seen[0])
    assert torch.equal(result, plain)
    print('fine')
    """
)


def test_as_a_script_and_with_minus_c(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    found = run_python(str(path))
    assert found.stdout == "fine\n", found.stderr
    found = run_python("-c", SCRIPT)
    if sys.version_info >= (3, 13):
        assert found.stdout == "fine\n", found.stderr
    else:
        assert found.stdout == "fine\n" or "intervene.from_source" in found.stderr, found.stderr


def test_under_a_coverage_style_tracer_in_a_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "main.py").write_text(
        textwrap.dedent(
            """\
            import runpy, sys
            lines = set()
            def tracing(frame, event, argument):
                if frame.f_code.co_filename.endswith("script.py"):
                    if event == "line":
                        lines.add(frame.f_lineno)
                    return tracing
            sys.settrace(tracing)
            runpy.run_path("script.py")
            assert sys.gettrace() is tracing
            sys.settrace(None)
            assert 10 in lines and {13, 14, 15} <= lines, lines
            """
        )
    )
    found = run_python("main.py", cwd=tmp_path)
    assert found.stdout == "fine\n", found.stderr
    assert found.returncode == 0, found.stderr
