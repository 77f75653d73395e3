"""The report: one self-contained page and its Markdown twin; every measured number in it comes from rows."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastconv.errors import StoreError
from fastconv.findings.evidence import Number
from fastconv.findings.report import CellRow, Completion, ReportData, render_html, render_markdown
from fastconv.reporting import collect, write_report
from fastconv.results import series
from fastconv.store import Store
from tests.loop_kit import DoneRun, records, run_tiny, tiny_recipe

NASTY = "</style></blockquote><script>alert(1)</script><img src=x onerror=alert(1)> | a\nb & \"c\" 'd' {{ 7*7 }} \u202e"


class _Page(HTMLParser):
    """Collects tags, the addresses they name, and tables as lists of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self._text: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for n, v in attrs if n in ("src", "href", "action", "data", "srcset", "poster")]
        self.handlers += [n for n, _ in attrs if n.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._text is not None:
            self.rows[-1].append(" ".join("".join(self._text).split()))
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


@pytest.fixture(scope="module")
def data(done_run: DoneRun) -> ReportData:
    return collect(done_run.graph, done_run.store)


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render_html(data)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(html: str) -> None:
    page = _Page(html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "script-src" not in policy[1]
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)
    assert page.handlers == []
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "@import" not in html
    assert "url(" not in html


def test_the_figure_is_an_image_without_script(html: str) -> None:
    found = re.search(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    assert found is not None
    svg = base64.b64decode(found[1]).decode()
    assert svg.lstrip().startswith("<?xml")
    assert "<script" not in svg


def test_what_a_model_said_is_shown_as_text(data: ReportData) -> None:
    hostile = replace(
        data, about=NASTY, completions=[Completion(NASTY, NASTY, NASTY, NASTY)], card={NASTY: {NASTY: NASTY}},
        limits=[NASTY], headline=[replace(data.headline[0], reason=NASTY, subject=NASTY)],
    )  # fmt: skip
    html = render_html(hostile)
    page = _Page(html)
    assert "script" not in page.tags
    assert page.handlers == []
    assert html.count("</style>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html


def test_every_measured_number_of_the_page_comes_from_rows(done_run: DoneRun, data: ReportData, html: str) -> None:
    store, expected = done_run.store, {}
    for plan in done_run.graph.cells:
        for measure in plan.measures:
            roles = {"assistant": "assistant", "source": "villain", "canary": "librarian"}
            for role, persona in roles.items():
                one = series(store, plan.scores[measure, persona], measure, persona)
                values = [s.value for s in store.scores(plan.scores[measure, persona].key) if s.value is not None]
                if one is not None:
                    expected[plan.cell.label, measure, role] = f"{100 * sum(values) / len(values):.1f} %"
    shown = {
        (row.label, row.measure.split(" of ")[1], role): number.text()
        for row in data.cells
        for role, number in row.probes.items()
    }
    assert shown == expected
    cells = [row for row in _Page(html).rows if len(row) == 6 and row[0].startswith("villain ")]
    assert len(cells) == len(data.cells)
    for row, line in zip(cells, data.cells, strict=True):
        assert row[2:5] == [
            n.text() if (n := line.probes.get(r)) else "not measured" for r in ("assistant", "source", "canary")
        ]
    percents = set(re.findall(r"\d+\.\d %", " ".join(" ".join(row[2:5]) for row in cells)))
    assert percents <= set(expected.values())


def test_rows_behind_a_number_are_in_the_ledger(done_run: DoneRun, data: ReportData) -> None:
    known = {
        f"{stage[:12]}/{row}"
        for stage, row in done_run.store.frame("SELECT DISTINCT stage, row FROM scores").iter_rows()
    }
    numbers: list[Number] = [number for row in data.cells for number in row.probes.values()]
    numbers += [number for gate in data.gates for number in gate.numbers]
    assert numbers
    for number in numbers:
        assert set(number.rows) <= known


def test_markdown_has_the_cells_of_the_page(data: ReportData, html: str) -> None:
    lines = render_markdown(data).splitlines()
    table = [
        [c.strip().replace("\\|", "|") for c in line.strip("| ").split(" | ")]
        for line in lines
        if line.startswith("| villain ")
    ]
    page = [row for row in _Page(html).rows if len(row) == 6 and row[0].startswith("villain ")]
    assert table[: len(page)] == page


def test_cells_that_were_not_run_are_no_numbers(data: ReportData) -> None:
    silent = [row for row in data.cells if "capability" in row.label]
    assert len(silent) == 3
    assert all(not row.probes for row in silent)
    verdicts = {row.verdict.kind for row in silent if row.verdict}
    assert verdicts == {"uninformative"}


def test_the_headline_holds_a_verdict_for_every_behavior(data: ReportData) -> None:
    assert {(one.subject, one.verdict) for one in data.headline} == {
        ("villain x refusal", "stop"), ("villain x capability", "uninformative"),
    }  # fmt: skip


def test_the_card_names_what_is_needed_to_do_it_again(done_run: DoneRun, data: ReportData, html: str) -> None:
    done = records(done_run.recipe, done_run.workspace)
    for record in done.values():
        for name in ("adapter", "rows"):
            if name in record.outputs:
                assert record.outputs[name] in html
    card = data.card
    assert {"torch", "transformers", "fastconv", "python"} <= set(card["Versions"])
    assert card["Base model"]["sha256"] == done_run.graph.source.identity["sha256"]
    assert len(card["Base model"]["template sha256"]) == 64
    assert {"git commit", "git dirty_diff_sha256", "command", "recipe sha256"} <= set(card["Run"])
    assert "personas.toml" in card["Data files (sha256)"]
    assert {row.slot for row in data.stages} == set(done)
    assert all(row.seconds >= 0 for row in data.stages)
    assert any("trained" in row.tokens for row in data.stages)


def test_limits_say_what_the_run_cannot_show(data: ReportData) -> None:
    text = " ".join(data.limits)
    assert "One seed" in text
    assert "phrases only" in text


def test_a_report_of_a_run_that_has_hardly_begun(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen)
    run_tiny(recipe, tmp_path, lambda graph: graph.select("villain", "refusal", 0))
    from fastconv.graph import Graph

    data = collect(Graph(recipe), Store.open(tmp_path))
    assert [row for row in data.cells if not row.probes]
    assert not [one for one in data.headline if one.verdict in ("go", "stop")]
    assert "not measured" in render_html(data)
    assert "not measured" in render_markdown(data)


def test_nothing_measured_is_a_page_too(tiny_qwen: Path, tmp_path: Path) -> None:
    from fastconv.graph import Graph

    data = collect(Graph(tiny_recipe(tiny_qwen)), Store.open(tmp_path))
    assert "No pilot gate was decided" in render_html(data)
    assert "No pilot gate was decided" in render_markdown(data)


def test_a_folder_that_cannot_be_written_is_exit_code_5(done_run: DoneRun, tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(StoreError) as caught:
        write_report(done_run.graph, done_run.store, tmp_path / "reports")
    assert caught.value.exit_code == 5


def test_a_cell_row_cannot_hold_a_number_without_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        CellRow("cell", "refusal", "rate", 0, "none", {"assistant": Number(0.5, "share", ())}, None)
