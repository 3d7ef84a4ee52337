"""A program beside its source: every line of both, once and in order, escaped, each beside what it comes from."""

from __future__ import annotations

import inspect
from html.parser import HTMLParser

import torch
from torch import nn

from nnsight_compiler import NNsight, intervene

plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
model = NNsight(plain)
X = torch.ones(1, 4)


class Table(HTMLParser):
    """The cells of a table, row by row: their class and their text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[tuple[str, str]]] = []
        self.stack: list[str] = []
        self.folded: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append((dict(attrs).get("class") or "", ""))
        elif tag in ("summary", "pre"):
            self.folded.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1] in ("td", "th"):
            kind, held = self.rows[-1][-1]
            self.rows[-1][-1] = (kind, held + data)
        elif self.stack[-1] in ("summary", "pre"):
            self.folded[-1] += data

    def column(self, kind: str) -> list[str]:
        found = (text for row in self.rows[1:] for each, text in row if each == kind and (text or kind != "ir"))
        return [line for text in found for line in text.split("\n")]


def scaled(module, factor):
    return module.output * factor


@intervene
def shown(model, x, factor):
    """Of <b>some</b> & more."""
    with model.trace(x):
        first = scaled(model[0], factor)

        # between
        last = model[2].output[:, -1]
    pick = lambda t: t < 0  # noqa: E731
    return first, last, pick


def uncommented(text: str) -> list[str]:
    """The lines of a program's text, without the comments that name its source."""
    return [line.partition("  # ")[0].rstrip() for line in text.splitlines()]


def test_every_line_of_source_and_ir_is_there_in_order() -> None:
    table = Table(shown._repr_html_())
    lines, first = inspect.getsourcelines(shown.__wrapped__)
    assert table.column("source") == [line.rstrip() for line in lines]
    assert table.column("line") == [str(first + number) for number in range(len(lines))]
    assert table.column("ir") == uncommented(str(shown.ir))
    assert [text for _, text in table.rows[0]] == ["", "test_programs_html.py", "IR"]


def test_each_row_has_the_ops_of_its_line() -> None:
    rows = {row[1][1].split("\n")[0].strip(): row[2][1] for row in Table(shown._repr_html_()).rows[1:]}
    assert rows["with model.trace(x):"] == "  forward %0 = trace %model(%x)"
    assert "call %scaled(" in rows["first = scaled(model[0], factor)"]
    assert "closure '<lambda>'(%t)" in rows["pick = lambda t: t < 0  # noqa: E731"]
    assert rows["return first, last, pick"].strip() == "return (%first, %last, %pick)"


def test_what_html_has_a_meaning_for_is_escaped() -> None:
    text = shown._repr_html_()
    assert "<b>" not in text
    assert "<lambda>" not in text
    assert "Of &lt;b&gt;some&lt;/b&gt; &amp; more." in text


def test_a_lowered_program_repeats_lines_in_grey() -> None:
    lowered = shown.lower(model, X, 2)
    table = Table(lowered._repr_html_())
    lines, _ = inspect.getsourcelines(shown.__wrapped__)
    assert table.column("source") == [line.rstrip() for line in lines]
    assert "    return module.output * factor" in table.column("again")
    header, *body = uncommented(str(lowered))
    assert table.column("ir") == [header.partition("  for ")[0], *body]
    title = table.rows[0][2][1]
    assert title.startswith("IR for Sequential")
    assert title.endswith("merge_straight_forwards")


def test_a_lowered_program_has_what_each_pass_made() -> None:
    lowered = shown.lower(model, X, 2)
    folded = Table(lowered._repr_html_()).folded
    named = dict(zip(folded[::2], folded[1::2], strict=True))
    assert next(iter(named)) == "after specialise"
    stages = {f"after {name}": uncommented(str(program))[1:] for name, program in lowered.stages}
    assert all(text.split("\n") == stages[name] for name, text in named.items())
    bodies = [body for _, body in stages.items()]
    changed = [name for (name, body), before in zip(stages.items(), [[], *bodies], strict=False) if body != before]
    assert list(named) == changed


def test_a_text_that_is_no_file_and_one_line_of_it() -> None:
    text = "@intervene\ndef f(model, x):\n    with model.trace(x):\n        return model[0].output\n"
    made = intervene.from_source(text)
    table = Table(made._repr_html_())
    assert table.column("source")[1:3] == ["def f(model, x):", "    with model.trace(x):"]
    assert table.column("ir") == uncommented(str(made.ir))


def test_a_program_whose_source_is_gone_shows_its_ir(monkeypatch) -> None:
    import linecache

    made = intervene.from_source("def f(model, x):\n    with model.trace(x):\n        return model[0].output\n")
    text = uncommented(str(made.ir))
    monkeypatch.delitem(linecache.cache, made.ir.span.file)
    table = Table(made._repr_html_())
    assert table.column("ir") == text
    assert table.column("source") == []


def test_the_page_is_small_and_without_scripts() -> None:
    text = shown._repr_html_()
    assert len(text) < 6000
    assert "<script" not in text
    assert "http" not in text
