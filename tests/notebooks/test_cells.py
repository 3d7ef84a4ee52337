"""Undecorated traces and experiments in the cells of a real kernel. The oracle is plain torch, in the same kernel."""

from __future__ import annotations

import pytest

READ = """
with model.trace(X):
    hidden = model[0].output.save()
assert torch.equal(hidden, plain[0](X))
"""


def test_what_a_cell_assigns_is_in_the_next(kernel) -> None:
    kernel(READ)
    kernel("assert torch.equal(hidden, plain[0](X)); assert 'hidden' in globals(); del hidden")


def test_a_cell_run_again_compiles_once(kernel) -> None:
    kernel("import nnsight_compiler.block as block; before = len(block._sites)")
    for _ in range(5):
        kernel(READ + "# again")
    kernel("assert len(block._sites) == before + 1, (before, len(block._sites))")
    kernel("(site,) = list(block._sites.values())[before:]; assert site.cache.misses == 1, site.cache.misses")


def test_an_edited_cell_runs_its_new_text_where_only_a_number_changed(kernel) -> None:
    text = "with model.trace(X):\n    model[0].output = {}\n    out = model[2].output.save()\nassert {}"
    for number in (0, 1, 7, 0):
        kernel(text.format(number, f"torch.equal(out, plain[2](torch.tanh(torch.full((2, 4), {number}.))))"))


def test_cells_that_compile_to_equal_code_are_told_apart_by_name(kernel) -> None:
    text = "with model.trace(X):\n    a = model[0].output.save()\n    b = model.nothing.output.save()  # {}\n"
    for comment in ("first", "other"):
        failed = kernel.run(text.format(comment))
        assert f"In[{failed.number}]:3:9" in failed.traceback
        assert f"# {comment}" in failed.traceback.partition("CompileError: ")[2]


def test_an_experiment_defined_anew_replaces_the_old(kernel) -> None:
    text = """
    @intervene
    def scaled(model, x):
        with model.trace(x):
            model[0].output *= {0}
            out = model[2].output
        return out
    assert torch.allclose(scaled(model, X), plain[2](torch.tanh(plain[0](X) * {0})))
    """
    kernel(text.format(2))
    kernel("old = scaled")
    kernel(text.format(3))
    kernel("assert torch.allclose(scaled(model, X), plain[2](torch.tanh(plain[0](X) * 3)))")
    kernel("assert torch.allclose(old(model, X), plain[2](torch.tanh(plain[0](X) * 2)))")


def test_a_helper_defined_anew_is_used_by_experiments_and_blocks_of_other_cells(kernel) -> None:
    kernel("""
    @intervene
    def helped(model, x):
        with model.trace(x):
            out = helper(model[0])
        return out

    def traced():
        with model.trace(X):
            out = helper(model[0]).save()
        return out
    """)
    for number in (2, 3):
        kernel(f"def helper(module): return module.output * {number}")
        kernel(f"assert torch.equal(helped(model, X), plain[0](X) * {number})")
        kernel(f"assert torch.equal(traced(), plain[0](X) * {number})")


def test_a_function_with_a_trace_is_called_from_a_later_cell(kernel) -> None:
    kernel("""
    # a comment first
    def first(index):
        scale = 2
        with model.trace(X):
            out = (model[index].output * scale).save()
        return out
    """)
    kernel("# the lines of this cell say nothing of it\nvalues = [first(index) for index in (0, 2)]")
    kernel("assert torch.equal(values[0], plain[0](X) * 2); assert torch.equal(values[1], plain(X) * 2)")


def test_traces_inside_of_statements_of_a_cell(kernel) -> None:
    kernel("""
    found = []
    try:
        for index in range(3):
            if index != 1:
                with model.trace(X) as tracer:
                    out = model[index].output.save()
                    last = index
                found.append(out)
    finally:
        pass
    assert torch.equal(found[0], plain[0](X)) and torch.equal(found[1], plain(X)) and last == 2
    """)


def test_magics_and_shell_lines_around_a_trace(kernel) -> None:
    cell = kernel("""
    %precision 3
    !echo from a shell
    len?
    with model.trace(X):
        hidden = model[0].output.save()
    names = !echo one
    assert torch.equal(hidden, plain[0](X)) and names == ["one"]
    hidden.shape;
    """)
    assert "from a shell" in cell.printed
    assert cell.shown == {}


@pytest.mark.parametrize("magic", ["%%time", "%%timeit -n1 -r1", "%%timeit -n 2 -r 1 y = 1", "%%prun -q", "%%capture"])
def test_cell_magics_around_a_trace(kernel, magic) -> None:
    kernel(f"""
    {magic}
    # a comment
    with model.trace(X):
        hidden = model[0].output.save()
    assert torch.equal(hidden, plain[0](X))
    hidden.sum()
    """)


def test_time_gives_the_cells_names_to_the_notebook(kernel) -> None:
    cell = kernel("%%time\nwith model.trace(X):\n    timed = model[0].output.save()\ntimed.shape")
    assert cell.shown["text/plain"] == "torch.Size([2, 4])"
    assert "Wall time" in cell.printed
    kernel("assert torch.equal(timed, plain[0](X))")


def test_line_magics_around_a_trace(kernel) -> None:
    kernel("x = 1\n%time with model.trace(X): line = model[0].output.save()\nassert torch.equal(line, plain[0](X))")
    kernel("%timeit -n1 -r1 -q with model.trace(X): hidden = model[0].output.save()")


def test_functions_defined_under_a_magic_are_found_later(kernel) -> None:
    kernel("""
    %%time
    def under(k=2):
        with model.trace(X):
            out = (model[0].output * k).save()
        return out

    @intervene
    def experiment(model, x):
        with model.trace(x):
            out = model[0].output * 5
        return out
    """)
    kernel("assert torch.equal(under(), plain[0](X) * 2)")
    kernel("%timeit -n1 -r1 -q under(3)")
    kernel("assert torch.equal(experiment(model, X), plain[0](X) * 5)")


def test_a_mistake_under_a_magic_is_shown_at_the_cells_own_line(kernel) -> None:
    failed = kernel.run("%%time\nwith model.trace(X):\n    a = model[0].output.save()\n    b = model[7].output.save()")
    assert failed.error == "CompileError"
    assert (
        f"CompileError: In[{failed.number}]:4:9: Sequential holds 3 modules: no index 7 (0 to 2)\n" in failed.traceback
    )
    assert "        b = model[7].output.save()\n            ^^^^^^^^\n" in failed.traceback


def test_await_at_the_top_of_a_cell(kernel) -> None:
    kernel("""
    import asyncio
    await asyncio.sleep(0)
    with model.trace(X):
        hidden = model[0].output.save()
    await asyncio.sleep(0)
    assert torch.equal(hidden, plain[0](X))
    """)
    kernel("""
    async def later(index):
        await asyncio.sleep(0)
        with model.trace(X):
            hidden = model[index].output.save()
        await asyncio.sleep(0)
        return hidden
    first, last = await asyncio.gather(later(0), later(2))
    assert torch.equal(first, plain[0](X)) and torch.equal(last, plain(X))
    """)


def test_await_inside_of_a_trace_is_refused(kernel) -> None:
    failed = kernel.run("with model.trace(X):\n    await asyncio.sleep(0)\n    h = model[0].output.save()")
    assert failed.error == "CompileError"
    assert f"In[{failed.number}]:2:5" in failed.traceback


def test_a_file_that_is_run(kernel) -> None:
    (kernel.folder / "script.py").write_text(
        "def traced(model, x):\n    with model.trace(x):\n        out = model[0].output.save()\n    return out\n\n"
        "with model.trace(X):\n    script_value = model[2].output.save()\n"
    )
    kernel("%run -i script.py\nassert torch.equal(script_value, plain(X))")
    kernel("assert torch.equal(traced(model, X), plain[0](X))")


def test_a_notebook_file_that_is_run_shares_a_number_but_not_its_texts(kernel) -> None:
    (kernel.folder / "cells.ipy").write_text(
        "%time with model.trace(X): inner = model[0].output.save()\n"
        "def traced_there():\n    with model.trace(X):\n        out = model[2].output.save()\n    return out\n"
    )
    kernel("%run -i cells.ipy\nassert torch.equal(inner, plain[0](X))")
    kernel("assert torch.equal(traced_there(), plain(X))")


def test_code_that_has_no_source_says_so_with_the_way_out(kernel) -> None:
    failed = kernel.run("exec('with model.trace(X):\\n    a = model[0].output.save()')")
    assert failed.error == "SourceNotFoundError"
    assert "it comes from '<string>', such as exec()" in failed.traceback
    assert "Write it in a file or a notebook" in failed.traceback


# --- what is shown ---


def test_saved_values_are_displayed(kernel) -> None:
    cell = kernel("with model.trace(X):\n    shape = model[0].output.save()\nshape.shape, X[0, 0] == X[0, 0]")
    assert cell.shown["text/plain"] == "(torch.Size([2, 4]), tensor(True))"


def test_an_unsaved_value_is_displayed_by_its_name_and_line(kernel) -> None:
    cell = kernel("with model.trace(X):\n    kept = model[0].output.save()\n    lost = model[0].output\nlost")
    assert cell.shown == {"text/plain": f"<unsaved value `lost` of In[{cell.number}]:3:12>"}


def test_the_use_of_an_unsaved_value_points_at_both_lines(kernel) -> None:
    failed = kernel.run(
        "with model.trace(X):\n    kept = model[0].output.save()\n    lost = model[0].output\n\nlost + 1"
    )
    assert failed.error == "UnsavedValueError"
    assert "----> 5 lost + 1" in failed.traceback
    assert f"Error: In[{failed.number}]:3:12: `lost` is a value of the model that was not saved" in failed.traceback
    assert "nnsight_compiler" not in failed.traceback


# --- errors ---


def test_a_compile_error_of_a_block_is_short_and_names_the_cell(kernel) -> None:
    failed = kernel.run("with model.trace(X):\n    a = model[0].output.save()\n    b = model.missing.output.save()")
    number = failed.number
    assert failed.traceback.splitlines()[1:] == [
        "CompileError                              Traceback (most recent call last)",
        f"Cell In[{number}], line 1",
        "----> 1 with model.trace(X):",
        "      2     a = model[0].output.save()",
        "      3     b = model.missing.output.save()",
        "",
        f"CompileError: In[{number}]:3:9: Sequential has no `missing`; it has: 0, 1, 2",
        "        b = model.missing.output.save()",
        "            ^^^^^^^^^^^^^",
        "  way out: `print(model)` shows the tree of its modules",
    ]


def test_a_compile_error_of_an_experiment_is_short_and_names_the_cell(kernel) -> None:
    kernel("@intervene\ndef wrong(model, x):\n    with model.trace(x):\n        return model.missing.output")
    defined = kernel("pass").number - 1
    failed = kernel.run("y = 1\nwrong(model, X)")
    assert f"Cell In[{failed.number}], line 2" in failed.traceback
    assert f"CompileError: In[{defined}]:4:16: Sequential has no `missing`" in failed.traceback
    assert "        return model.missing.output\n" in failed.traceback
    assert "nnsight_compiler" not in failed.traceback
    assert len(failed.traceback.splitlines()) < 15


@pytest.mark.parametrize("decorated", [False, True])
def test_an_error_at_run_time_shows_its_own_line_of_the_cell(kernel, decorated) -> None:
    body = "    with model.trace(X):\n        a = model[0].output\n        b = a[:, [99]]\n        b = b.save()\n"
    head = "@intervene\ndef f(model, X):\n" if decorated else "if True:\n"
    failed = kernel.run(head + body + ("    return b\nf(model, X)" if decorated else ""))
    line = 5 if decorated else 4
    assert failed.error == "IndexError"
    assert f"In[{failed.number}]:{line}" in failed.traceback
    assert f"----> {line}" in failed.traceback
    assert failed.traceback.rpartition("----> ")[2].startswith(f"{line}     ")
    assert "b = a[:, [99]]" in failed.traceback.rpartition("----> ")[2].splitlines()[0]
    assert "nnsight_compiler" not in failed.traceback
    assert "torch/nn/modules" not in failed.traceback
    kernel(READ)


def test_an_error_of_the_model_keeps_the_models_lines(kernel) -> None:
    failed = kernel.run("with model.trace(torch.zeros(2, 9)):\n    a = model[2].output.save()")
    assert failed.error == "RuntimeError"
    assert "return F.linear(input, self.weight, self.bias)" in failed.traceback
    assert "nnsight_compiler" not in failed.traceback


def test_a_failing_helper_of_another_cell_is_in_the_traceback(kernel) -> None:
    defined = kernel("def explode(value):\n    return 1 / 0 * value").number
    failed = kernel.run("with model.trace(X):\n    a = explode(model[0].output).save()")
    assert failed.error == "ZeroDivisionError"
    assert f"In[{defined}]" in failed.traceback or "explode(model[0].output)" in failed.traceback
    assert "nnsight_compiler" not in failed.traceback


def test_an_error_after_a_run_that_went_well_names_the_cell_that_runs_then(kernel) -> None:
    text = "with model.trace(X if good else torch.zeros(2, 9)):\n    a = model[2].output.save()"
    kernel("good = True")
    kernel(text)
    kernel("good = False")
    kernel.run(text)
    again = kernel.run(text)
    assert f"File In[{again.number}]:1" in again.traceback


# --- interruption and debugging ---

SLOW = """
import signal, time

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.wait, self.last = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)
    def forward(self, x):
        x = self.wait(self.first(x))
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        return self.last(x)

interrupted = False
slow_plain = Slow()
slow_model = NNsight(slow_plain)
"""


def test_an_interrupted_trace_leaves_model_and_frame_clean(kernel) -> None:
    kernel(SLOW)
    kernel("with slow_model.trace(X):\n    reached = slow_model.last.output.save()\ndel reached")
    kernel("traced_before = sys.gettrace()\ninterrupted = True")
    failed = kernel.run("""
    with slow_model.trace(X):
        slow_model.first.output = 0
        reached = slow_model.last.output.save()
    """)
    assert failed.error == "KeyboardInterrupt"
    kernel("""
    assert sys.gettrace() is traced_before and "reached" not in globals()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in slow_plain.modules())
    interrupted = False
    expected = slow_plain.last(slow_plain.first(X))
    assert torch.equal(slow_plain(X), expected)
    with slow_model.trace(X):
        reached = slow_model.last.output.save()
    assert torch.equal(reached, expected)
    """)


def test_debugging_and_tracing_go_on_as_before(kernel) -> None:
    kernel("""
    seen = []
    def follow(frame, event, argument):
        if frame.f_code.co_name == "watched":
            seen.append((event, frame.f_lineno - frame.f_code.co_firstlineno))
        return follow
    def watched():
        with model.trace(X):
            out = model[0].output.save()
        done = 1
        return out
    held = sys.gettrace()
    sys.settrace(follow)
    value = watched()
    after = sys.gettrace()
    sys.settrace(held)
    assert after is follow
    assert ("line", 3) in seen and ("line", 4) in seen and ("line", 2) not in seen, seen
    assert torch.equal(value, plain[0](X))
    """)


def test_post_mortem_sees_the_frame_of_the_cell(kernel) -> None:
    kernel.run(
        "def failing():\n    before = 41\n    with model.trace(X):\n        a = model.missing.output.save()\nfailing()"
    )
    cell = kernel("""
    import pdb, io
    class Debugger(pdb.Pdb):
        pass
    out = io.StringIO()
    debugger = Debugger(stdin=io.StringIO("p before + 1\\nq\\n"), stdout=out)
    debugger.reset()
    debugger.interaction(None, sys.last_traceback)
    print(out.getvalue())
    """)
    assert "42" in cell.printed
    assert "failing()" in cell.printed


# --- autoreload ---

STUDY = """
from nnsight_compiler import intervene

def unrelated(model, x):
    with model.trace(x):
        out = (model[0].output * 1000).save()
    return out


def helper(module, factor={factor}):
    # a comment that is not in a syntax tree
    return module.output * factor * {number}


def traced(model, x):
    # a comment

    with model.trace(x):
        first = model[2].output.save()
    with model.trace(x):
        out = (model[0].output * {number}).save()
    return out


class Study:
    def scaled(self, module):
        return module.output * {number}


@intervene
def experiment(model, x):
    with model.trace(x):
        out = helper(model[0])
    return out


@intervene
def changed(model, x):
    with model.trace(x):
        out = model[0].output * {experiment}
    return out
"""


def test_autoreload(kernel) -> None:
    path = kernel.folder / "study.py"

    def write(seconds: int, **given: int) -> None:
        path.write_text(STUDY.format(**{"number": 2, "experiment": 1, "factor": 1, **given}))
        kernel(f"os.utime('study.py', ({seconds}, {seconds}))")

    check = """
    assert torch.equal(helped(model, X), plain[0](X) * {number} * {factor})
    assert torch.equal(study.experiment(model, X), plain[0](X) * {number} * {factor})
    assert torch.equal(experiment(model, X), plain[0](X) * {number} * {factor})
    assert torch.equal(traced(model, X), plain[0](X) * {number})
    assert torch.equal(unrelated(model, X), plain[0](X) * 1000)
    assert torch.equal(scaled(model, X), plain[0](X) * {number})
    assert torch.equal(study.changed(model, X), plain[0](X) * {experiment})
    assert torch.equal(changed(model, X), plain[0](X) * {experiment})
    with model.trace(X):
        out = helper(model[0]).save()
    assert torch.equal(out, plain[0](X) * {number} * {factor})
    """
    write(1_000_000_000)
    kernel("%load_ext autoreload\n%autoreload 2\nsys.path.insert(0, '')")
    kernel("import study\nfrom study import changed, experiment, helper, traced, unrelated, Study")
    kernel("""
    own = Study()
    @intervene
    def helped(model, x):
        with model.trace(x):
            out = helper(model[0])
        return out
    @intervene
    def scaled(model, x):
        with model.trace(x):
            out = own.scaled(model[0])
        return out
    """)
    kernel(check.format(number=2, factor=1, experiment=1))
    for step, given in enumerate(
        [{"number": 3}, {"number": 3, "factor": 2}, {"number": 3, "factor": 2, "experiment": 7}, {"number": 5}], start=1
    ):
        write(1_000_000_000 + 10 * step, **given)
        kernel("pass")
        kernel(check.format(**{"number": 2, "experiment": 1, "factor": 1, **given}))


# --- memory ---


def test_cells_run_many_times_keep_nothing_that_grows_without_bound(kernel) -> None:
    kernel("""
    import gc, linecache, weakref
    import nnsight_compiler.block as block
    import nnsight_compiler.frontend.cells as cells
    limits = block._MOST_SITES, cells._RECENT
    block._MOST_SITES = cells._RECENT = 20
    ours = lambda: sum(name.startswith("In[") for name in linecache.cache)
    """)
    for number in range(30):
        kernel.run(f"with model.trace(X):\n    out = (model[0].output * {number}).save()")
    kernel("assert torch.equal(out, plain[0](X) * 29)")
    kernel("assert len(block._sites) <= 20 and ours() <= 20, (len(block._sites), ours())")
    kernel("block._MOST_SITES, cells._RECENT = limits")


def test_a_model_that_was_replaced_is_freed(kernel) -> None:
    make = "big = NNsight(nn.Sequential(nn.Linear(4, 4)))\nwatched_model = weakref.ref(big._wrapped)"
    use = "with big.trace(X):\n    out = big[0].output.save()"
    kernel(make)
    kernel(use)
    kernel("first_model = watched_model")
    kernel(make)
    kernel(use)
    kernel("gc.collect()\nassert first_model() is None and watched_model() is not None")
