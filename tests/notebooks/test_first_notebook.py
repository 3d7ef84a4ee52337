"""The notebook of the examples gives what is stored in it.

`python tests/notebooks/test_first_notebook.py` runs it and stores what it gives.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

PATH = Path(__file__).parents[2] / "examples" / "first_notebook.ipynb"


def read() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


def run(notebook: NotebookNode) -> NotebookNode:
    """Runs every cell. What goes to the standard error is left out: progress of loading, which differs by terminal.
    What a cell prints is one output, in however many messages a busy kernel sent it."""
    settings = {"timeout": 120, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, kernel_name="python3", **settings).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def outputs(notebook: NotebookNode) -> list[tuple[int, dict[str, str]]]:
    """The text and the HTML of each output, with the number of its cell. Numbers are rounded: they depend a little on
    the processor; of images only the kind is kept."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            held = {"text/plain": output.text} if output.output_type == "stream" else dict(output.data)
            held = {kind: "an image" if kind.startswith("image/") else text for kind, text in held.items()}
            if "image/png" in held:
                del held["text/plain"]  # every number of the image
            found.append((number, {kind: re.sub(r"(\d\.\d\d)\d+", r"\1", text) for kind, text in held.items()}))
    return found


def test_the_notebook_gives_what_is_stored_in_it() -> None:
    stored = read()
    made = run(read())
    assert outputs(made) == outputs(stored)
    assert [cell.execution_count for cell in stored.cells if cell.cell_type == "code"] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_stored_notebook_is_small_and_finds_what_it_says() -> None:
    stored = read()
    assert PATH.stat().st_size < 200_000
    kinds = [kind for _, each in outputs(stored) for kind in each]
    assert kinds.count("text/html") == 3
    assert kinds.count("image/png") == 1
    texts = "".join(each.get("text/plain", "") for _, each in outputs(stored))
    assert "' Paris'" in texts
    assert "misses=3" in texts
    assert "ipykernel" not in PATH.read_text()


if __name__ == "__main__":
    nbformat.write(run(read()), PATH)
