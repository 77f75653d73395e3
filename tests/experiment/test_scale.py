"""The report of a whole matrix: 96 cells with 3 seeds and 200,000 judgements, under a gigabyte, and linear in its size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.report import build
from fastconv.report.claims import ask
from fastconv.report.export import frames_of
from tests.scale_kit import fill, matrix_recipe

_SCRIPT = """
import json, re, sys
from pathlib import Path
from fastconv.experiment.graph import Graph
from fastconv.recipe import parse_recipe
from fastconv.report import write_report
from fastconv.store.ledger import Store
table, workspace, folder = sys.argv[1:]
recipe = parse_recipe(json.loads(Path(table).read_text()))
write_report(Graph(recipe), Store.open(workspace, create=False), Path(folder))
# Not ru_maxrss: a child begins with its parent's, so it would tell how large pytest has grown.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(peak)
"""


def reported(tiny_qwen: Path, folder: Path, **size: int) -> tuple[int, int]:
    """Peak memory (bytes) of writing the report in a process of its own, and how many scores there are."""
    recipe = matrix_recipe(tiny_qwen, **size)
    _, store, n_scores = fill(recipe, folder / "w")
    store.close()
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    words = [sys.executable, "-c", _SCRIPT, str(folder / "recipe.json"), str(folder / "w"), str(folder / "r")]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(found.stdout), n_scores


@pytest.mark.slow
def test_a_matrix_of_three_seeds_is_reported_in_under_a_gigabyte(tiny_qwen: Path, tmp_path: Path) -> None:
    peak_bytes, n_scores = reported(tiny_qwen, tmp_path, n_sources=4, seeds=3, samples=5)
    assert n_scores > 200_000
    assert peak_bytes < 1_000_000_000


@pytest.mark.slow
def test_ten_times_the_rows_take_at_most_twelve_times_as_long(tiny_qwen: Path, tmp_path: Path) -> None:
    times = []
    for samples in (2, 20):
        recipe = matrix_recipe(tiny_qwen, n_sources=4, seeds=1, samples=samples)
        graph, store, _ = fill(recipe, tmp_path / str(samples))
        began = time.process_time()
        decided = Analysis(graph, store)
        assert decided.verdicts
        assert decided.gates
        assert decided.secondary
        assert frames_of(decided)["scores"].height > 10_000 * samples
        times.append(time.process_time() - began)
    assert times[1] <= 12 * times[0]


@pytest.mark.slow
def test_ten_times_the_cells_take_at_most_twelve_times_as_long(tiny_qwen: Path, tmp_path: Path) -> None:
    times = []
    for seeds in (1, 10):
        recipe = matrix_recipe(tiny_qwen, n_sources=1, seeds=seeds, prompts=20, samples=2)
        graph, store, _ = fill(recipe, tmp_path / str(seeds))
        began = time.process_time()
        data = build(Analysis(graph, store))
        assert len(data.claims()) > 20
        times.append(time.process_time() - began)
    assert times[1] <= 12 * times[0]


@pytest.mark.slow
def test_a_small_matrix_finds_what_was_put_in(tiny_qwen: Path, tmp_path: Path) -> None:
    # The tests over seeds are corrected over 72 contrasts, and three seeds have two degrees of freedom: five reach it.
    recipe = matrix_recipe(tiny_qwen, n_sources=4, seeds=5, prompts=50, samples=3)
    graph, store, _ = fill(recipe, tmp_path)
    decided = Analysis(graph, store)
    kinds = {one.label: one for one in decided.verdicts}
    last = kinds["villain source e20 refusal included"]
    assert (last.kind, last.confidence.level, last.n_seeds) == ("transfer", "HIGH", 5)
    assert last.estimate == pytest.approx(0.4, abs=0.15)
    quiet = [one for one in decided.verdicts if not one.label.startswith("villain")]
    assert not [one for one in quiet if one.kind in ("transfer", "reverse")]
    assert len(decided.verdicts) == 72
    assert (
        "Over 4 sources, the rank correlation of refusal transfer"
        in ask(decided, "correlation", behavior="refusal").text
    )
    few = "4 points give a rank correlation a p no smaller than 0.083, so it cannot reach"
    assert few in ask(decided, "attainable").text
    slopes = [one for one in decided.secondary if one.what == "trend of the assistant"]
    assert any((one.p_corrected or 1) < 0.05 and one.label.startswith("villain") for one in slopes)
    confirm = next(one for one in decided.gates if one.gate == "CONFIRM")
    assert "1 of 4 sources do: villain" in confirm.reason
