"""The options of an experiment: which there are, and that wrong ones are refused."""

import pytest

from nnsight_compiler import CompileError, LanguageModel, intervene
from nnsight_compiler.models.nnsight import TraceArgumentError
from nnsight_compiler.options import OPTIMISATIONS, Options
from nnsight_compiler.remote.backends import LocalBackend


def test_an_experiment_takes_options_in_the_decorator_and_later():
    @intervene(memory_budget="2 GiB", padding=True)
    def plain(a):
        return a + 1

    assert plain(1) == 2
    assert plain._options == Options(frozenset(), 2 * 2**30, True)
    other = plain.with_options(without="narrow")
    assert other(1) == 2
    assert not other._options.does("narrow")
    assert other._options.does("merge_forwards")
    again = intervene(without="narrow")(plain)
    assert again is not plain
    assert not again._options.does("narrow")
    assert intervene(plain) is plain
    assert Options.of("all").without == frozenset(OPTIMISATIONS)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"without": "narow"}, "there is no optimisation 'narow'; did you mean 'narrow'?"),
        ({"without": ["place"]}, "there is no optimisation 'place'; "),
        (
            {"memory_budget": "much"},
            "memory_budget='much' is no amount of memory; write bytes, or text such as '2 GiB'",
        ),
        ({"memory_budget": 0}, "memory_budget=0 is no amount of memory"),
        ({"memory_budget": "1..5 GB"}, "memory_budget='1..5 GB' is no amount of memory"),
    ],
)
def test_what_there_is_not_is_refused(given, text):
    with pytest.raises(ValueError) as caught:
        intervene(**given)
    assert str(caught.value).startswith(text)


def test_where_an_experiment_runs_is_an_option_that_the_call_overrides(monkeypatch):
    model, went = LanguageModel("tiny"), []
    run = LocalBackend.run
    monkeypatch.setattr(LocalBackend, "run", lambda self, *given: went.append("there") or run(self, *given))

    def places(experiment, **said):
        went.clear()
        experiment(model, "a tower", **said)
        return list(went)

    @intervene(remote="local", padding=True)
    def there(model, prompt):
        with model.trace(prompt):
            logits = model.lm_head.output[0, -1]
        return logits

    @intervene
    def written(model, prompt):
        with model.trace(prompt, remote="local"):
            logits = model.lm_head.output[0, -1]
        return logits

    assert places(there) == ["there"]
    assert places(there, remote=False) == places(there, remote=None) == []
    assert places(there.with_options(without="narrow")) == ["there"]
    assert places(there.with_options(remote=None)) == places(there.with_options(remote=False)) == []
    assert places(there.with_options(remote=False), remote="local") == ["there"]
    assert places(written) == ["there"]
    assert places(written.with_options(remote=False)) == []
    assert places(intervene(remote="local")(written.with_options(remote=False))) == ["there"]
    assert there.explain(model, "a tower").crossings
    assert not there.explain(model, "a tower", remote=False).crossings


def test_places_that_there_are_not():
    for make in (lambda: intervene(remote="nowhere"), lambda: intervene(lambda x: x).with_options(remote=3)):
        with pytest.raises(
            TypeError, match=r'`remote=` is True, a URL such as "http://localhost:8473", or "local", not'
        ):
            make()


def test_an_edit_says_nothing_of_where_it_runs():
    model = LanguageModel("tiny")
    with pytest.raises(TraceArgumentError) as caught:
        model.edit(remote=True)
    assert str(caught.value) == (
        "`edit` takes no argument but `inplace` (remote): an edit runs wherever the traces of the edited model do\n"
        "  way out: say `remote=` in these traces, as in `edited.trace(…, remote=True)`; the edit goes along"
    )
    with pytest.raises(TraceArgumentError, match=r"`edit` takes no argument but `inplace` \(other\)$"):
        model.edit(other=True)

    @intervene
    def edits(model):
        with model.edit(remote=True) as edited:
            edited.layers[0].output[:] = 0
        with edited.trace("a"):
            logits = edited.lm_head.output
        return logits

    with pytest.raises(CompileError) as refused:
        edits(model)
    (found,) = refused.value.diagnostics
    assert found.span.line == edits._function.__code__.co_firstlineno + 2
    assert found.reason == "`edit` takes no `remote=`: an edit runs wherever the traces of the edited model do"
    assert found.way_out == "say it where the experiment is called, `experiment(…, remote=True)`; the edit goes along"
