"""The tree of a model in HTML: well formed, escaped, the same modules as the text form, with their weights."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_compiler import LanguageModel, NNsight
from nnsight_compiler.html import modules_html

VOID = {"br", "hr", "img"}


class Page(HTMLParser):
    """The elements of a page, and its lines of text: one for each summary and each `div` without elements of that kind.

    Raises where elements are not closed in the order in which they were opened.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in VOID
        given = dict(attrs)
        self.tags.append((tag, given))
        self.stack.append(tag if "class" not in given else f"{tag}.{given['class']}")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop().partition(".")[0] == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.texts.append((self.stack[-1], data))

    def lines(self) -> list[str]:
        """The names and classes of the modules, in order."""
        lines: list[str] = []
        open_name = False
        for place, data in self.texts:
            if place == "span.names":
                lines.append(data)
                open_name = True
            elif place in ("summary", "div.leaf") and data.strip():
                if open_name:
                    lines[-1] += data
                else:
                    lines.append(data)
                open_name = False
        return [line.strip() for line in lines]


def text_lines(view: NNsight) -> list[str]:
    """The same of the text form."""
    lines = [line.strip() for line in repr(view).splitlines()]
    return [line for line in lines if line != ")"]


def plain(line: str) -> str:
    """A line without the parentheses that only the text form leaves open."""
    closed = line + ")" if line.count("(") > line.count(")") else line
    return closed.removesuffix("()")


class Odd(nn.Module):
    """Names and descriptions that HTML has a meaning for."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(3, 2))
        self._modules["<b>&"] = nn.ReLU()

    def extra_repr(self) -> str:
        return "kind='<lambda>' & more"


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=6))


@pytest.mark.parametrize(
    "module",
    [
        gpt2,
        Odd,
        lambda: nn.Linear(2, 3),
        lambda: nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"x": nn.ReLU()}), nn.Dropout(0.5), nn.Dropout(0.5)),
        lambda: nn.Sequential(),
    ],
)
def test_the_page_is_well_formed_and_has_the_modules_of_the_text(module) -> None:
    view = NNsight(module())
    page = Page(view._repr_html_())
    assert list(map(plain, page.lines())) == list(map(plain, text_lines(view)))


def test_what_html_has_a_meaning_for_is_escaped() -> None:
    text = NNsight(Odd())._repr_html_()
    assert "<b>" not in text
    assert "(&lt;b&gt;&amp;): " in text
    assert "kind=&#x27;&lt;lambda&gt;&#x27; &amp; more" in text


def test_the_shapes_and_numbers_are_those_of_the_parameters() -> None:
    module = gpt2()
    text = NNsight(module)._repr_html_()
    total = sum(parameter.numel() for parameter in module.parameters())
    assert f'title="{total:,} parameters"' in text
    layers = sum(parameter.numel() for parameter in module.transformer.h.parameters())
    assert re.search(rf'<span class="names">\(0-2\): 3 x </span>GPT2Block<span class="count" title="{layers:,} p', text)
    assert "weight [8, 24]  bias [24]" in text  # c_attn, which transformers keeps transposed
    assert "scale [3, 2]" in NNsight(Odd())._repr_html_()


def test_the_upper_levels_are_open() -> None:
    opened = [given for tag, given in Page(NNsight(gpt2())._repr_html_()).tags if tag == "details"]
    assert ["open" in each for each in opened][:3] == [True, True, False]
    assert sum("open" in each for each in opened) == 2


def test_a_model_without_weights_is_drawn_and_not_loaded() -> None:
    with torch.device("meta"):
        module = gpt2()
    assert "weight [11, 8]" in NNsight(module)._repr_html_()
    tiny = LanguageModel("tiny")
    assert Page(tiny._repr_html_()).lines()
    assert all(parameter.is_meta for parameter in tiny._wrapped.parameters())


def test_a_part_of_a_model_shows_itself() -> None:
    view = NNsight(gpt2())
    assert list(map(plain, Page(view.transformer.h[0]._repr_html_()).lines())) == list(
        map(plain, text_lines(view.transformer.h[0]))
    )


def test_a_very_large_model_is_cut_off_and_says_so() -> None:
    big = nn.ModuleDict({f"part{number}": nn.Sequential(nn.Linear(1, number % 3 + 1)) for number in range(1500)})
    text = modules_html(big, {})
    page = Page(text)
    assert len(page.lines()) < 1100
    left = re.findall(r"… and ([\d,]+) more", text)
    shown = sum("part" in line for line in page.lines())
    assert shown + int(left[-1].replace(",", "")) == 1500


@pytest.mark.parametrize("name", ["_repr_mimebundle_", "_repr_png_", "_ipython_display_", "_repr_svg_", "_repr_latex_"])
def test_other_ways_of_showing_are_not_there(name) -> None:
    view = NNsight(gpt2())
    assert not hasattr(view, name)
    assert not hasattr(view.transformer.h[0], name)
