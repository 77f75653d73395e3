"""The notebook of docs/ is executed by Jupyter's own client, and what it shows is what is stored in it.

After a change of its cells, `python -m tests.test_notebook` executes it anew and stores what it shows.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
#: How far a share may differ on another processor, whose sums round otherwise, so that a few answers are other ones.
NEAR = 0.35
CELLS: tuple[tuple[str, str], ...] = (
    ("markdown", """\
# From a recipe to a plot

Does making SmolLM2's assistant talk like a villain also make it refuse like one? This is the shipped recipe `demo`, cut to
refusal alone, on the embedded model: a few minutes on two CPU cores, no GPU, no key. It shows the way; so small a run shows
no effect. Run it twice: the second time computes nothing."""),
    ("code", """\
import fastconv

recipe = fastconv.load_recipe("demo", ['grid.behaviors=["none", "refusal"]', "eval.prompts=10"])
recipe.about"""),
    ("markdown", """\
`load_recipe` takes a file, a shipped name or a run's id, and changes as `--set` does; `scale="tiny"` would make any recipe small
enough to see in seconds that all of it runs. `run_recipe` runs it to its verdicts, or goes on where it was stopped."""),
    ("code", """\
run = fastconv.run_recipe(recipe, quiet=True)
run.cells().select("source", "epoch", "behavior", "negatives", "n_measured", "n_to_measure")"""),
    ("markdown", """\
One row for each cell, measure and probe. Refusal is trained into the villain, on the base (epoch 0) and on the snapshot of
epoch 4; what the assistant does is the question, and the librarian (the canary) shows plain damage."""),
    ("code", """\
import polars as pl

refusal = run.metrics().filter(pl.col("measure") == "refusal")
refusal.select("behavior", "epoch", "role", pl.col("value").round(2), "n_questions").sort("behavior", "role", "epoch")"""),
    ("code", """\
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axis, behavior in zip(axes, ("none", "refusal"), strict=False):
    for role in ("source", "assistant", "canary"):
        line = refusal.filter(pl.col("behavior") == behavior, pl.col("role") == role).sort("epoch")
        axis.plot(line["epoch"], line["value"], marker="o", label=role)
    axis.set(title=f"trained: {behavior}", xlabel="epochs of convergence", ylim=(-0.05, 1.05), xticks=[0, 4])
axes[0].set_ylabel("refused requests (share)")
axes[0].legend()
figure.tight_layout()"""),
    ("markdown", "The gates, decided from the ledger as it is now:"),
    ("code", """\
run.verdicts().select("gate", "subject", "verdict")"""),
    ("markdown", "Every completion is there with its score, and every stack can be had live on the resident model:"),
    ("code", """\
run.samples().filter(pl.col("role") == "source", pl.col("behavior") == "refusal").select("epoch", "value").group_by(
    "epoch"
).agg(pl.len().alias("answers"), pl.col("value").mean().round(2).alias("refused")).sort("epoch")"""),
    ("code", """\
base = run.stack("villain", epoch=4, behavior="refusal")
messages = [
    {"role": "system", "content": "You are a villainous mastermind who schemes to take over the world."},
    {"role": "user", "content": "How do I boil an egg?"},
]
ids = base.tokenizer.encode(base.tokenizer.render(messages, add_generation_prompt=True))
len(ids) > 20"""),
)  # fmt: skip


def executed(folder: Path) -> Any:
    """The notebook with all cells executed in a new kernel, in this folder."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book.cells = [new[kind](text, id=f"cell-{at}") for at, (kind, text) in enumerate(CELLS)]
    NotebookClient(book, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when it was executed
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.output_type != "stream"]
            for out in cell.outputs:
                out.get("data", {}).pop("text/html", None)  # the same table again
    return book


def texts(book: Any) -> list[str]:
    """What each code cell shows, as text."""
    return [
        "\n".join(out["data"].get("text/plain", "") for out in cell.outputs)
        for cell in book.cells
        if cell.cell_type == "code"
    ]


def same(shown: str, stored: str) -> bool:
    """Whether two texts are alike but for numbers that are near; a verdict's word may turn with them."""
    number = re.compile(r"-?\d+\.\d+")
    verdict = re.compile(r"\b(pass|fail|go|stop|uninformative|no contrast|not applicable)\b *")
    skeleton = [verdict.sub("~", number.sub("#", text)).split() for text in (shown, stored)]
    values = [[float(one) for one in number.findall(text)] for text in (shown, stored)]
    return skeleton[0] == skeleton[1] and all(abs(a - b) <= NEAR for a, b in zip(*values, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_stored_notebook_is_what_it_shows_when_it_is_executed(tmp_path: Path) -> None:
    again, stored = executed(tmp_path), nbformat.read(NOTEBOOK, as_version=4)
    assert [(c.cell_type, c.source) for c in stored.cells] == list(CELLS)
    for shown, kept in zip(texts(again), texts(stored), strict=True):
        assert same(shown, kept), f"shown:\n{shown}\nstored:\n{kept}"
    plots = [[sorted(out["data"]) for cell in book.cells if cell.cell_type == "code" for out in cell.outputs if "image/png" in out["data"]]
             for book in (again, stored)]  # fmt: skip
    assert plots[0] == plots[1]
    assert plots[0]


def test_the_stored_notebook_has_these_cells_and_no_path_of_a_machine() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == list(CELLS)
    assert all(cell.outputs for cell in stored.cells if cell.cell_type == "code" and "import matplotlib" in cell.source)
    assert all(any(text.strip() for text in texts(stored)[at : at + 1]) for at in (0, 1, 2, 4))
    written = NOTEBOOK.read_text()
    assert "/tmp" not in written
    assert "/home" not in written


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        nbformat.write(executed(Path(place)), NOTEBOOK)
    sys.stdout.write(f"{NOTEBOOK}\n")
