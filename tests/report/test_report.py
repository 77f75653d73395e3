"""The report: one self-contained HTML page and its Markdown version; every measured number comes from rows."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.contrasts import in_words
from fastconv.analysis.gates import stage_series
from fastconv.errors import StoreError
from fastconv.experiment.graph import Graph
from fastconv.report import SECTIONS, build, collect, write_report
from fastconv.report.blocks import (
    Answer,
    Claim,
    Note,
    ReportData,
    Section,
    Table,
    TableCell,
    render_html,
    render_markdown,
)
from fastconv.report.claims import CLAIMS, NoSuchClaimError, ask
from fastconv.stats.series import NoRowsError
from fastconv.store.ledger import Store
from tests.loop_kit import DoneRun, records, run_tiny, tiny_recipe

NASTY = "</style></blockquote><script>alert(1)</script><img src=x onerror=alert(1)> | a\nb & \"c\" 'd' {{ 7*7 }} \u202e"


class Page(HTMLParser):
    """Collects tags, the addresses they name, and tables as lists of cells by the table's id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._text: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v or "" for n, v in attrs if n in ("src", "href", "action", "data", "srcset", "poster")]
        self.handlers += [n for n, _ in attrs if n.startswith("on")]
        if tag == "table":
            self._rows = self.tables.setdefault(about.get("id") or "", [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._text is not None:
            self._rows[-1].append(" ".join("".join(self._text).split()))
            self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


@pytest.fixture(scope="module")
def decided(done_run: DoneRun) -> Analysis:
    return Analysis(done_run.graph, done_run.store)


@pytest.fixture(scope="module")
def data(decided: Analysis) -> ReportData:
    return build(decided)


@pytest.fixture(scope="module")
def html(data: ReportData) -> str:
    return render_html(data)


def section(data: ReportData, place: str) -> Section:
    return next(one for one in data.sections if one.id == place)


def table(data: ReportData, place: str) -> Table:
    blocks = [block for one in data.sections for block in one.blocks]
    return next(block for block in blocks if isinstance(block, Table) and block.id == place)


def words(data: ReportData, place: str) -> str:
    return " ".join(block.text for block in section(data, place).blocks if isinstance(block, Claim | Note))


# --- the page ----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside_and_runs_nothing(html: str) -> None:
    page = Page(html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "script-src" not in policy[1]
    assert not {"script", "iframe", "object", "embed", "link", "form"} & set(page.tags)
    assert page.handlers == []
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in page.addresses)
    assert any(address.startswith("data:") for address in page.addresses)
    assert "@import" not in html
    assert "url(" not in html


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(mark * 2 for mark in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_colour_stands_out_in_light_dark_and_print(html: str) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    themes = re.findall(r":root \{([^}]*)\}", style)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for text in ("ink", "quiet", "link", "good", "bad", "mild"):
            for back in ("back", "soft"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, back, theme)


def test_every_link_of_the_page_leads_somewhere(html: str) -> None:
    inner = {address[1:] for address in Page(html).addresses if address.startswith("#")}
    assert len(inner) > 8
    assert inner <= set(re.findall(r'id="([^"]+)"', html))


def test_drawings_are_images_without_script_that_name_the_run(data: ReportData, html: str) -> None:
    drawn = [
        base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", html)
    ]
    assert len(drawn) == len(data.figures()) >= 4
    for svg in drawn:
        assert svg.lstrip().startswith("<?xml")
        assert "<script" not in svg
        assert data.run in svg
    assert all(data.run.encode() in figure.png for figure in data.figures())
    assert all(len(figure.alt) > 30 for figure in data.figures())


def test_what_a_model_said_is_shown_as_text(data: ReportData) -> None:
    cell = TableCell(NASTY, (NASTY,), list_rows=True)
    hostile = replace(
        data, about=NASTY, banners=(Note(NASTY, "edited"),),
        sections=(
            Section("x", NASTY, (
                Answer(NASTY, NASTY, NASTY, NASTY), Note(NASTY), Claim("finding", {"label": NASTY}, NASTY, (NASTY,)),
                Table("t", (NASTY,), ((cell, TableCell(NASTY, code=True)),), caption=NASTY, folded=NASTY),
            ), NASTY),
        ),
    )  # fmt: skip
    html = render_html(hostile)
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.handlers == []
    assert html.count("</style>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert "\u202e" not in html
    assert "\\u202e" in html
    markdown = render_markdown(hostile)
    # Outside of indented code nothing can be read as HTML or leave its table.
    assert not [line for line in markdown.splitlines() if "<script" in line and not line.startswith("    ")]
    assert "\u202e" not in markdown


def test_markdown_has_the_tables_of_the_page(data: ReportData, html: str) -> None:
    def bare(text: str) -> str:
        return "".join(text.replace("&lt;", "<").split())

    page, lines = Page(html).tables, {bare(line) for line in render_markdown(data).splitlines() if line.startswith("|")}
    assert len(page["contrasts"]) == 5
    for row in (*page["contrasts"], *page["mimicry-table"], *page["cells"]):
        assert bare("|" + "|".join(row) + "|") in lines


# --- numbers and claims ------------------------------------------------------------------------------------


def test_every_measured_number_of_the_page_comes_from_rows(done_run: DoneRun, data: ReportData, html: str) -> None:
    store, expected = done_run.store, set()
    for plan in done_run.graph.cells:
        for measure in plan.measures:
            for place, persona in ((2, "assistant"), (4, "villain"), (5, "librarian")):
                one = stage_series(store, plan.scores[measure, persona], measure, persona)
                values = [s.value for s in store.scores(plan.scores[measure, persona].key) if s.value is not None]
                if one is not None:
                    expected.add((in_words(plan.cell), measure, place, f"{100 * sum(values) / len(values):.1f} %"))
    rows = Page(html).tables["cells"][1:]
    shown = {
        (row[0], row[1].split(" of ")[1], place, row[place])
        for row in rows
        for place in (2, 4, 5)
        if "not" not in row[place]
    }
    assert shown == expected


def test_rows_behind_a_number_are_in_the_ledger(done_run: DoneRun, data: ReportData) -> None:
    known = {f"{s[:12]}/{row}" for s, row in done_run.store.frame("SELECT DISTINCT stage, row FROM scores").iter_rows()}
    cells = [cell for row in table(data, "cells").rows for cell in row if cell.rows]
    assert cells
    for cell in cells:
        assert set(cell.rows) <= known
    for claim in data.claims():
        if claim.query in ("finding", "largest", "mimicry"):
            assert set(claim.rows) <= known


def test_numbers_in_cells_have_rows_behind_them(data: ReportData) -> None:
    for place, columns in (("cells", range(2, 9)), ("contrasts", (2, 3)), ("secondary", (2,))):
        for row in table(data, place).rows:
            for column in columns:
                cell = row[column]
                assert cell.rows or not any(mark.isdigit() for mark in cell.text), (place, cell)


def test_a_claims_template_holds_no_digit_and_no_claim_stands_without_rows(data: ReportData) -> None:
    for name, bound in CLAIMS.items():
        assert not any(mark.isdigit() for mark in bound.template), name
    assert len(data.claims()) >= 5
    with pytest.raises(NoRowsError):
        Claim("counts", {}, "Declared contrasts: 3.", ())


def test_a_claim_that_nothing_supports_cannot_be_made(decided: Analysis) -> None:
    for query, arguments in (
        ("finding", {"label": "villain source e2 sycophancy excluded"}), ("correlation", {"behavior": "refusal"}),
        ("largest", {"behavior": "sycophancy"}), ("nothing", {}), ("finding", {"other": "x"}), ("agreement", {"measure": "refusal"}),
    ):  # fmt: skip
        with pytest.raises(NoSuchClaimError):
            ask(decided, query, **arguments)


# --- what stands in it -------------------------------------------------------------------------------------


def test_cells_that_were_not_run_are_no_numbers(data: ReportData) -> None:
    rows = {row[0].text: row for row in table(data, "cells").rows if "capability" in row[0].text}
    assert len(rows) == 3
    assert all(row[2].text == "not run" and not row[2].rows for row in rows.values())
    contrasts = {row[0].text: row for row in table(data, "contrasts").rows}
    silent = [row for label, row in contrasts.items() if "capability" in label]
    assert {row[1].text for row in silent} == {"uninformative"}
    assert {row[2].text for row in silent} == {""}


def test_the_headline_holds_a_verdict_for_every_behavior(data: ReportData) -> None:
    text = words(data, "numbers")
    assert "stop for villain x refusal" in text
    assert "uninformative for villain x capability" in text
    first = words(data, "verdict")
    assert first.startswith("Not shown: none of 4 declared contrasts is transfer (4 uninformative), and none shows")
    assert "STOP: villain x refusal; nothing can be said of villain x capability. What to run next: " in first
    # Each behavior has a reason of its own, and a largest change says if it is of contrasts that say nothing.
    assert "refusal where it can be seen (2 of 2 contrasts: both epochs are at the floor" in first
    assert "capability where it can be seen (2 of 2 contrasts: not measurable at base)" in first
    assert "The largest change of refusal, though none of its contrasts can be read, is 0.0 pp" in text


def test_the_card_names_what_is_needed_to_do_it_again(done_run: DoneRun, data: ReportData, html: str) -> None:
    done = records(done_run.recipe, done_run.workspace)
    for record in done.values():
        for name in ("adapter", "rows"):
            if name in record.outputs:
                assert record.outputs[name] in html
    card = {
        row[0].text: row[1].text
        for block in section(data, "card").blocks
        if isinstance(block, Table)
        for row in block.rows
    }
    assert {"torch", "transformers", "fastconv", "python", "git commit", "command", "recipe sha256"} <= set(card)
    assert card["sha256"] == done_run.graph.source.identity["sha256"]
    assert (card["id"], card["folder"], card["engine"]) == ("local", done_run.recipe.model.id, "torch")
    assert len(card["template sha256"]) == 64
    assert "personas.toml" in card
    assert {row[0].text for row in table(data, "stages").rows} == set(done)
    assert any("trained" in row[3].text for row in table(data, "stages").rows)


def test_limits_say_what_the_run_cannot_show(data: ReportData) -> None:
    assert "One seed" in words(data, "limits")
    assert "phrases only" in words(data, "limits")
    assert "marker behavior was not measured" in words(data, "markers")
    assert "No judge read the answers" in words(data, "judge")


def test_answers_are_chosen_by_a_fixed_rule(done_run: DoneRun, data: ReportData) -> None:
    shown = [block for block in section(data, "answers").blocks if isinstance(block, Answer)]
    assert {block.who for block in shown} == {"assistant", "villain", "librarian"}
    assert not [block for block in shown if "/e1" in block.where]
    for block in shown:
        stage = next(stage for stage in done_run.graph.stages() if stage.slot == block.where)
        first = done_run.store.samples(stage.key)[0]
        assert (block.prompt, block.text) == (first.prompt, first.completion)


def test_a_new_section_needs_one_function(decided: Analysis, data: ReportData) -> None:
    assert len(data.sections) == len([1 for make in SECTIONS if make(decided) is not None]) + 1  # and its files
    assert len({one.id for one in data.sections}) == len(data.sections)


# --- files -------------------------------------------------------------------------------------------------


def test_figures_and_tables_lie_beside_the_report(done_run: DoneRun, data: ReportData, tmp_path: Path) -> None:
    paths = write_report(done_run.graph, done_run.store, tmp_path)
    assert paths.html.is_file()
    for figure in data.figures():
        assert (paths.folder / "figures" / f"{figure.id}.svg").read_bytes() == figure.svg
        assert (paths.folder / "figures" / f"{figure.id}.png").read_bytes().startswith(b"\x89PNG")
    scores = pl.read_parquet(paths.folder / "tables" / "scores.parquet")
    n = sum(len(done_run.store.scores(key)) for key in scores["stage"].unique())
    assert scores.height == n
    measured = pl.read_parquet(paths.folder / "tables" / "measurements.parquet")
    assert {"assistant", "source", "canary"} == set(measured["role"])
    gates = pl.read_parquet(paths.folder / "tables" / "gates.parquet")
    assert {"G0", "G1", "G2", "G3.5", "SOURCE", "KILL", "CHANGE", "PILOT", "G4", "CONFIRM"} <= set(gates["gate"])
    again = write_report(done_run.graph, done_run.store, tmp_path / "again")
    assert again.html.read_bytes() == paths.html.read_bytes()  # the same ledger gives the same bytes


def test_a_report_of_a_run_that_has_hardly_begun(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_qwen)
    run_tiny(recipe, tmp_path, lambda graph: graph.select("villain", "refusal", 0))
    data = collect(Graph(recipe), Store.open(tmp_path))
    assert "not run" in render_html(data)
    assert "not run" in render_markdown(data)
    pilots = [claim for claim in data.claims() if claim.query == "pilot"]
    assert {claim.word for claim in pilots} == {"not applicable"}
    assert [claim.text for claim in data.claims() if claim.query == "gate"] == [
        "OPEN: not decided yet for villain x refusal."
    ]
    assert words(data, "verdict").startswith("No declared contrast was measured yet.")
    assert words(data, "verdict").endswith("What to run next: the same recipe on, to its end.")


def test_nothing_measured_is_a_page_too(tiny_qwen: Path, tmp_path: Path) -> None:
    data = collect(Graph(tiny_recipe(tiny_qwen)), Store.open(tmp_path))
    assert "No pilot gate was decided" in render_html(data)
    assert "No pilot gate was decided" in render_markdown(data)
    assert data.claims() == []


def test_a_folder_that_cannot_be_written_is_exit_code_5(done_run: DoneRun, tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(StoreError) as caught:
        write_report(done_run.graph, done_run.store, tmp_path / "reports")
    assert caught.value.exit_code == 5
