"""The pages on caches and edits, and their examples: what they show runs, and what they say is refused is refused."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nnsight_compiler import ExperimentError

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("cache", "edits")}
EXAMPLES = [
    (name, code, error)
    for name, page in PAGES.items()
    for code, error in re.findall(r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)\n```$)?", page, re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("name", "least"), [("cache", 3), ("edits", 6)])
def test_a_page_is_read_whole(name: str, least: int) -> None:
    found = [code for page, code, _ in EXAMPLES if page == name]
    assert len(found) == PAGES[name].count("```python\n") >= least


@pytest.mark.parametrize(("name", "code", "error"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_a_page_do_what_it_says(
    name: str, code: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prelude,) = re.findall(r"^```python prelude\n(.*?)^```$", PAGES[name], re.DOTALL | re.MULTILINE)
    path = tmp_path / "example.py"
    path.write_text(prelude + code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if not error:
        runpy.run_path(str(path))
        return
    with pytest.raises(ExperimentError) as caught:
        runpy.run_path(str(path))
    assert error in str(caught.value)
    assert f"{path}:" in str(caught.value)


@pytest.mark.parametrize(("name", "says"), [("cache", "<cache of 4 modules: "), ("edits", "of another copy with the")])
def test_an_example_runs(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert says in capsys.readouterr().out
