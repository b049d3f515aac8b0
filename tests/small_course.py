"""A course of two or three tiny notebooks in a folder of its own, run by the real papermill."""

from pathlib import Path

import nbformat

OPENING = "from s1book.config import Run, append_jsonl, read_jsonl\nrun = Run.open(preset, overrides)"


def write_chapter(root: Path, name: str, body: str, prose: str = "# Title\n\n> Promise.") -> Path:
    """Write one chapter whose last cell is `body`."""
    cells = [
        nbformat.v4.new_markdown_cell(prose),
        nbformat.v4.new_code_cell('preset = "tiny"\noverrides = []', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(OPENING),
        nbformat.v4.new_code_cell(body),
    ]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell{i}"
    (root / "nbs").mkdir(exist_ok=True)
    (root / "settings.ini").touch()
    path = root / "nbs" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path
