"""The pages of the documentation: what they show runs, gives what stands below it, and what they say is refused is."""

from __future__ import annotations

import functools
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from executing_service import executing_service

from nnsight_compiler import ExperimentError, LanguageModel

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
RUN = [name for name, text in PAGES.items() if "```python prelude\n" in text]

BLOCK = re.compile(r"^```python( prelude)?\n(.*?)^```$(?:\n\n```\n(.*?)\n```$)?", re.DOTALL | re.MULTILINE)
"""A block of code, whether the blocks after it see its names, and what it prints or raises."""

UNTESTED = ["axes", "differences", "files", "getting-started", "ir", "models", "notebooks", "passes", "service"]
"""Pages without a prelude: their code needs what is not here, or has a test of another kind."""

ELSEWHERE = ["remote"]
"""Pages whose code runs on a service."""

IDIOM = re.compile(r"\| `([^`]*)` \|$", re.MULTILINE)
SECTIONS = ("In a trace", "Around a trace", "Whole experiments")

torch.set_num_threads(1)


def run(code: str, page: str, line: int, scope: dict[str, Any]) -> str:
    """Runs a block of a page under a file name of its own, and gives that name."""
    file = f"<{page}.md:{line}>"
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
    exec(compile(code, file, "exec"), scope)
    return file


def line_of(match: re.Match[str]) -> int:
    return match.string.count("\n", 0, match.start()) + 1


@functools.cache
def common(page: str, before: int) -> dict[str, Any]:
    """The names that a block sees: those of the preludes above it, each of which is run once."""
    preludes = [match for match in BLOCK.finditer(PAGES[page]) if match[1] and match.start() < before]
    if not preludes:
        return {"__name__": page}
    scope = dict(common(page, preludes[-1].start()))
    run(preludes[-1][2], page, line_of(preludes[-1]), scope)
    return scope


def blocks() -> list[Any]:
    return [
        pytest.param(page, match, id=f"{page}-{line_of(match)}")
        for page in RUN
        for match in BLOCK.finditer(PAGES[page])
        if not match[1] or match[3]
    ]


def test_the_pages_are_read_whole() -> None:
    assert [name for name in PAGES if name not in RUN] == UNTESTED
    for page in RUN:
        text = PAGES[page]
        matches = [*BLOCK.finditer(text)]
        assert len(matches) == text.count("```python"), page
        assert sum(bool(match[3]) for match in matches) == text.count("\n```\n\n```\n"), page


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with executing_service(tmp_path_factory.mktemp("service") / "state") as (url, _):
        yield url


@pytest.mark.parametrize(("page", "block"), blocks())
def test_what_the_pages_show(
    page: str,
    block: re.Match[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if page in ELSEWHERE:
        monkeypatch.setenv("NNSIGHT_HOST", request.getfixturevalue("service"))
    scope = dict(common(page, block.start()))
    line, told = line_of(block), block[3]
    capsys.readouterr()
    try:
        run(block[2], page, line, scope)
    except ExperimentError as error:
        if told is None:
            raise
        said, expected = str(error), [told, f"<{page}.md:{line}>:"]
    else:
        said, expected = capsys.readouterr().out, [told or ""]
    assert all(each in said for each in expected), said


# --- the tables of idioms ---

MIGRATION = PAGES["migration"]
TABLES = {
    section: IDIOM.findall(MIGRATION.partition(f"## {section}\n")[2].partition("\n## ")[0]) for section in SECTIONS
}


@pytest.mark.parametrize("idiom", TABLES["In a trace"])
def test_the_idioms_of_a_trace_run(idiom: str) -> None:
    scope = dict(common("migration", len(MIGRATION)))
    body = f"with model.trace(prompt) as tracer:\n    logits = model.output.logits.save()\n    {idiom}\n"
    run(body, "migration", MIGRATION.count("\n", 0, MIGRATION.index(f"`{idiom}` |\n")) + 1, scope)
    assert scope["logits"].shape == (1, 8, 1007)


def test_the_idioms_around_a_trace_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = dict(common("migration", len(MIGRATION)))
    scope["model"] = LanguageModel("tiny")
    run("\n".join(TABLES["Around a trace"]) + "\n", "migration", 0, scope)
    assert len(TABLES["Around a trace"]) >= 10


def test_the_idioms_with_a_body_stand_in_a_block_that_runs() -> None:
    shown = "".join(match[2] for match in BLOCK.finditer(MIGRATION))
    assert len(TABLES["Whole experiments"]) >= 9
    assert [idiom for idiom in TABLES["Whole experiments"] if idiom not in shown] == []
