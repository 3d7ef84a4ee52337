"""The pages on control and on sessions: every example runs, and where an error follows, raises it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nnsight_compiler import ExperimentError

DOCS = Path(__file__).parents[2] / "docs"
PRELUDE = re.compile(r"^```python prelude\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLE = re.compile(r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)\n```$)?", re.DOTALL | re.MULTILINE)


def examples() -> list[tuple[str, str, str]]:
    found = []
    for name in ("control.md", "sessions.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        (prelude,) = PRELUDE.findall(text)
        pairs = EXAMPLE.findall(text)
        assert len(pairs) == text.count("```python\n")
        assert sum(bool(error) for _, error in pairs) == text.count("\n```\n\n```\n") >= 1
        found += [(name, prelude + code, error) for code, error in pairs]
    return found


@pytest.mark.parametrize(("page", "code", "error"), examples())
def test_the_examples_of_a_page_do_what_it_says(page: str, code: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / page.replace(".md", ".py")
    path.write_text(code, encoding="utf-8")
    if not error:
        runpy.run_path(str(path))
        return
    with pytest.raises(ExperimentError) as caught:
        runpy.run_path(str(path))
    assert error in str(caught.value)
    assert f"{path}:" in str(caught.value)
