"""Make a notebook of a script that is written in cells, with what they print and draw.

A line `# %%` begins a cell of code, `# %% [markdown]` a cell of prose in comments. What stands
before the first cell is left out. The notebook is written beside the script. It keeps what cells
give to `print(...)` and, as pictures, to `display({"image/png": ...}, raw=True)`, and nothing else:
the value of a last line is not shown. To open it, `pip install jupyterlab` and
`jupyter lab my_lesson.ipynb`.

    python scripts/examples/make_notebook.py scripts/examples/course.py
    python scripts/examples/make_notebook.py my_lesson.py
"""

import argparse
import base64
import builtins
import contextlib
import io
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from PIL import Image, ImageSequence

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli

COLORS = 64
"""Colours of a picture in a notebook, which make it a third as large as all colours do."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class Cell(NamedTuple):
    """A cell: its kind, "code" or "markdown", and its text."""

    kind: str
    source: str


class Outputs(NamedTuple):
    """What a cell printed, and the pictures that it showed, by kind and in base64."""

    text: str
    pictures: list[dict[str, str]]


def cells_of(script: str) -> list[Cell]:
    """Cut a script into its cells."""
    cells = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if kind == "markdown" else body
        cells.append(Cell(kind, text.strip("\n")))
    return cells


def run_cells(cells: Sequence[Cell], namespace: dict[str, Any]) -> Iterator[Outputs]:
    """Run the cells of code one after the other, and yield what each puts out."""
    for number, cell in enumerate(cells, 1):
        printed, pictures = io.StringIO(), []

        def display(picture: dict[str, str], raw: bool, pictures: list = pictures) -> None:
            pictures.append(picture)

        if cell.kind == "code":
            shown = mock.patch.object(builtins, "display", display, create=True)
            with shown, contextlib.redirect_stdout(printed), blamed(cells):
                exec(compile(cell.source, f"cell {number}", "exec"), namespace)
        yield Outputs(printed.getvalue(), pictures)


@contextlib.contextmanager
def blamed(cells: Sequence[Cell]) -> Iterator[None]:
    """Turn an error into a `ValueError` that names the cell, of code or prose, and its line."""
    try:
        yield
    except Exception as error:
        lines = traceback.extract_tb(error.__traceback__)
        places: list[Any] = [(line.filename, line.lineno) for line in lines]
        if isinstance(error, SyntaxError):
            places.append((str(error.filename), error.lineno))
        name, line = [place for place in places if place[0].startswith("cell ")][-1]
        text = cells[int(name[5:]) - 1].source.split("\n")[line - 1].strip()
        raise ValueError(f"{name}, line {line}, {text}: {type(error).__name__}: {error}") from error


def notebook_of(cells: Sequence[Cell], outputs: Sequence[Outputs]) -> dict[str, Any]:
    """Return a notebook of format 4.5, as JSON holds it."""
    written, count = [], 0
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True)):
        entry = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
        entry["source"] = cell.source.splitlines(keepends=True)
        if cell.kind == "code":
            count += 1
            text = output.text.splitlines(keepends=True)
            shown = [{"output_type": "stream", "name": "stdout", "text": text}] * bool(text)
            shown += [
                {"output_type": "display_data", "data": smaller(picture), "metadata": {}}
                for picture in output.pictures
            ]
            entry |= {"execution_count": count, "outputs": shown}
        written.append(entry)
    return {"cells": written, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def smaller(picture: dict[str, str]) -> dict[str, str]:
    """Return a picture or a film with few colours, the same ones in all frames."""
    ((kind, data),) = picture.items()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    palette = frames[-1].quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options: dict[str, Any] = {"optimize": True}
    if few[1:]:
        options |= {"save_all": True, "append_images": few[1:], "loop": 0}
        options |= {"duration": [frame.info["duration"] for frame in frames]}
    few[0].save(written := io.BytesIO(), kind.removeprefix("image/"), **options)
    return {kind: base64.b64encode(written.getvalue()).decode()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    parser.add_argument("script", type=Path, help="Make a notebook of this script.")
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run a script's cells and write the notebook."""
    script = parse(argv).script
    cells = cells_of(script.read_text())
    notebook = notebook_of(cells, list(run_cells(cells, {"__name__": "__main__"})))
    path = script.with_suffix(".ipynb")
    path.write_text(json.dumps(notebook, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
