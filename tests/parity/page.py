"""Writes `docs/differences.md` from the programs of `differences/`:

python tests/parity/page.py > docs/differences.md
"""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent

HEADING = """\
# Where programs mean something else than in nnsight

The same source gives the same values under nnsight 0.8.1 and here, but for what this page lists. Each entry is a
program that the tests run under both (`tests/parity/differences`; the import names either library). The reasons refer
to these rules:

"""

PARTS = {
    "silent": "## What fails without a word there\n",
    "loud": "## What is refused there, or done otherwise\n",
}

RULES = {
    "D1": "between sites the order is the model's, not that of the lines",
    "D3": "a saved value is the value at its line",
    "D4": "what leaves a trace, leaves it because it was saved, used or returned",
    "D5": "Python in a body means what it means outside",
    "D6": "calls and steps are named, never implied",
    "D7": "batches are exact: rows and tokens are inferred, not guessed",
    "D8": "nothing fails silently, and nothing of ours stays on the model",
    "D9": "runs are values: threads do not disturb each other",
    "D10": "`.output` is exactly what the module returned",
    "D12": "gradients are recorded where something asks for them",
}


def page() -> str:
    """The text of the page."""
    rules = "".join(f"- {name}: {meaning}.\n" for name, meaning in RULES.items())
    parts = [f"{title}\n" + "\n".join(entries(part)) for part, title in PARTS.items()]
    return "\n".join([HEADING + rules, *parts])


def entries(part: str) -> list[str]:
    """One entry for each program of a file."""
    text = (HERE / "differences" / f"{part}.py").read_text()
    lines = text.splitlines()
    found = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
        said = dict(line.split(": ", 1) for line in rest.splitlines())
        body = lines[node.body[1].lineno - 1 : node.end_lineno]
        code = "\n".join(line.split("  # fmt")[0] for line in [lines[node.lineno - 1], *body])
        found.append(
            f"### {node.name.replace('_', ' ').capitalize()}\n\n{summary}\n\n```python\n{code}\n```\n\n"
            f"- In nnsight: {said['nnsight']}\n- Here: {said['here']}\n- Why: {said['why']}\n"
        )
    return found


if __name__ == "__main__":
    print(page(), end="")
