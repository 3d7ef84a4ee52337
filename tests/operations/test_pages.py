"""The pages on operations and on attention: every example runs, and what follows it is what it prints or raises."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import pytest

from nnsight_compiler.ir.errors import ExperimentError

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)\n```$)?", re.DOTALL | re.MULTILINE)
PRELUDE = re.compile(r"^```python prelude\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["source.md", "attention.md"])
def test_the_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    scope = {"__name__": "page"}

    def run(code: str, line: int) -> None:
        file = f"<{page}:{line}>"
        linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
        exec(compile(code, file, "exec"), scope)

    (prelude,) = PRELUDE.findall(text)
    run(prelude, 0)
    found = list(BLOCK.finditer(text))
    assert len(found) == text.count("```python\n")
    for match in found:
        code, told = match.groups()
        line = text.count("\n", 0, match.start())
        if told is None or "print(" in code:
            run(code, line)
            printed = capsys.readouterr().out
            assert told is None or told.strip() in printed
        else:
            with pytest.raises(ExperimentError) as caught:
                run(code, line)
            assert told in str(caught.value)
