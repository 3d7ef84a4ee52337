"""The page on generation is true, and its example runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nnsight_compiler import ExperimentError, LanguageModel, intervene

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
(PRELUDE,) = re.findall(r"^```python prelude\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = re.findall(r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)\n```$)?", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("code", "error"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_do_what_the_page_says(code: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(PRELUDE + code, encoding="utf-8")
    if not error:
        runpy.run_path(str(path))
        return
    with pytest.raises(ExperimentError) as caught:
        runpy.run_path(str(path))
    assert error in str(caught.value)
    assert f"{path}:" in str(caught.value)


def test_explain_tells_what_happens_at_which_step() -> None:
    use = intervene.from_source("""
def use(model, x):
    with model.generate(x, max_new_tokens=4) as tracer:
        model.layers[1].output[:, -1] *= 2
        for step in tracer.iter[1:3]:
            h = model.layers[0].output
        for step in tracer.iter[:]:
            print(step)
        out = tracer.result
    return out, h
""")
    text = str(use.explain(LanguageModel("tiny"), "The Eiffel Tower"))
    assert "reads transformer.h.0 output at steps 1 to 2" in text
    assert "writes transformer.h.1 output at step 0; writes transformer.h.1 output at every step from 1" in text
    assert "generates to its end; gives what it returns" in text
