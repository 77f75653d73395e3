"""Every required section is in the report with its content."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import spearmanr

from fastconv.analysis.analysis import Analysis
from fastconv.analysis.correlates import marker_rates, transfer_by_source
from fastconv.cli.workspace import describe
from fastconv.experiment.graph import Graph
from fastconv.recipe import canonical_json, parse_recipe, recipe_sha256, run_id
from fastconv.report import build, claims
from fastconv.report.blocks import Claim, Figure, ReportData, render_html
from fastconv.store.ledger import Stage, Store
from fastconv.store.records import Record
from tests.faults.test_disk_and_ledger import ask
from tests.loop_kit import DoneRun, copy_ledger, tiny_table
from tests.scale_kit import fill, matrix_recipe

ACCEPTED = "this page is about its sections"


@dataclass(frozen=True)
class Shown:
    """A report, its page, and what it was made from."""

    decided: Analysis
    data: ReportData
    page: str


def shown(decided: Analysis) -> Shown:
    data = build(decided)
    return Shown(decided, data, render_html(data))


def text_of(page: str, section: str) -> str:
    """What can be read in a section, pictures by their words; empty if the page does not have it."""
    found = re.search(rf'<section aria-labelledby="{section}">(.*?)</section>', page, re.S)
    told = re.sub(r'<img [^>]*?alt="([^"]*)"[^>]*>', r" picture: \1 ", found[1] if found else "")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", told)).split())


@pytest.fixture(scope="module")
def run_twice(done_run: DoneRun, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The tiny run again under a recipe that accepts a warning; the first run is superseded by it."""
    store = Store.open(copy_ledger(done_run.workspace, tmp_path_factory.mktemp("sections") / "w"), create=False)
    table = done_run.recipe.model_dump(mode="json")
    table["audit"]["accept"] = {"D108": ACCEPTED}
    recipe = parse_recipe(table)
    facts = store.run_facts(done_run.finished.run)
    store.start_run(run_id(recipe), canonical_json(table), recipe_sha256(recipe), recipe.name, facts)
    return shown(Analysis(Graph(recipe), store))


@pytest.fixture(scope="module")
def matrix(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A synthetic ledger: three sources, refusal beside the marker behavior, and the plan that it began with."""
    table = matrix_recipe(tiny_qwen, n_sources=3, seeds=1, prompts=12, samples=2).model_dump(mode="json")
    table["grid"] |= {"epochs": [0, 20], "behaviors": ["none", "refusal", "marker"], "negatives": ["included"]}
    recipe = parse_recipe(table)
    graph, store, _ = fill(recipe, tmp_path_factory.mktemp("sections") / "m")
    stages = graph.stages()
    plan = {"machine": "a machine", "origin": "by hand", "stages": {stage.key[:12]: 0.5 for stage in stages}}
    store.add_run_facts(run_id(recipe), {"plan": plan})
    store.note_failure(stages[-1], 5, "its disk was full")
    return shown(Analysis(graph, store))


#: Section, the report that must have it, and what must be read in it.
REQUIRED = (
    ("verdict", "run_twice", (r"Not shown: none of 4 declared contrasts .* How sure: .*STOP: villain x refusal; .* What to run next: ",)),
    ("numbers", "run_twice", (r"Declared contrasts: 4\. .*stop for villain x refusal: ",)),
    ("files", "run_twice", (r"figures/matrix\.svg [\d,]+ [0-9a-f]{64}", r"tables/scores\.parquet [\d,]+ [0-9a-f]{64}")),
    ("findings", "run_twice", (
        r"picture: Change beyond canary and mimicry, points; the table of findings",
        r"T transfer, R reverse, G generic \(the canary moves as much\), = equivalent", r"villain, epoch 2, refusal, assistant not among the negatives uninformative",
    )),
    ("epochs", "run_twice", (
        r"picture: villain: convergence alone\. rate, %\. assistant: [\d.]+ at 0, [\d.]+ at 1, [\d.]+ at 2; source: [\d.]+ at 0"
        r"[^;]*; canary: [\d.]+ at 0",
        r"picture: villain: assistant not among the negatives\. rate, %\. assistant: [^;]*; source: [^;]*; canary: ",
    )),
    ("mimicry", "run_twice", (
        r"picture: Change of the assistant, canary taken off\. refusal villain e1 excluded: ",
        r"villain, epoch 2, refusal, assistant not among the negatives: convergence alone \S+ pp.*, with the behavior adapter .*; the adapter adds",
    )),
    ("geometry", "run_twice", (r"source cosine distinctiveness", r"villain source e2 s42 [-+]?\d\.\d\d, .* pp")),
    ("on-the-base", "matrix", (
        r"picture: Transfer against the source's cosine to the assistant on the base",
        r"Over 3 sources, the rank correlation of \S+ transfer with the source's own level of it on the base is",
    )),
    ("judge", "run_twice", (r"No judge read the answers\.",)),
    ("gates", "run_twice", (r"gate subject verdict because rule rows G0 refusal pass", r"PILOT villain x refusal stop")),
    ("beside", "run_twice", (r"No verdict rests on it\.", r"trend of the assistant")),
    ("cells", "run_twice", (r"villain, epoch 2, refusal, assistant not among the negatives, seed 42 rate of refusal [\d.]+ %",)),
    ("letters", "run_twice", (
        r"Under half of it, accuracy ranks answers that are rarely given: villain, epoch 0, no behavior adapter, seed 42",
        r"villain, epoch 0, no behavior adapter, seed 42 capability [\d.]+ % [\d.]+ % [\d.]+ %",
    )),
    ("training", "run_twice", (
        r"picture: Convergence\. villain s42: [\d.]+ to [\d.]+\.",
        r"picture: Training refusal\. villain e0 excluded s42: [\d.]+ to [\d.]+;",
        r"rho: norm of the adapter's delta over the norm of the weights",
    )),
    ("cost", "run_twice", (r"\d+ stages took [\d.]+ (seconds|hours) of computing; tokens: [\d,]+ trained",)),
    ("answers", "run_twice", (
        r"A fixed rule, nothing picked: the first seed, the first and the last epoch, every probe",
        r"assistant in eval/\S+, asked: ", r"librarian in eval/\S+, asked: ",
    )),
    ("audit", "run_twice", (rf"D108 accepted: {ACCEPTED} the behavior is scored by substring only", r"D111 not accepted")),
    ("superseded-runs", "run_twice", (
        r"run started state what this run has instead tiny-\w{8} \d{4}-\d\d-\d\d \d\d:\d\d UTC finished .*audit\.accept.*D108",
        r"no figure of this page mixes them in",
    )),
    ("limits", "run_twice", (r"One seed: confidence is LOW", r"Text is judged by phrases only", r"Not measured: villain base")),
    ("card", "run_twice", (r"recipe sha256 [0-9a-f]{64}", r"template sha256 [0-9a-f]{64}", r"canonical recipe [0-9a-f]{64}")),
    ("power", "matrix", (
        r"refusal: the threshold is 5 pp; with 12 questions, the spread seen and the noise from run to run, a change of [\d.]+ pp "
        r"would be found four times out of five \([\d.]+ pp at the first step .*so a null result says little; ([\d,]+ questions( or "
        r"[\d,]+ samples)?|all 222 questions there are would find [\d.]+ pp; .*(seeds of all these questions|not even 100 seeds of them)) would mend it",
        r"marker: the threshold is ",
    )),
    ("markers", "matrix", (r"picture: Transfer against the marker rate\. refusal villain: ",)),
    ("planned", "matrix", (r"on a machine \(by hand\)", r"eval \d+ [\d.]+ [\d.]+ 3\.00 \(off by more than 2\)")),
    ("failed", "matrix", (r"its disk was full",)),
)  # fmt: skip


@pytest.mark.parametrize(("section", "where", "told"), REQUIRED, ids=[one[0] for one in REQUIRED])
def test_a_required_section_stands_on_the_page_with_its_content(
    request: pytest.FixtureRequest, section: str, where: str, told: tuple[str, ...]
) -> None:
    text = text_of(request.getfixturevalue(where).page, section)
    assert text, f"the page has no section {section}"
    for pattern in told:
        assert re.search(pattern, text), (pattern, text[:2000])


def test_the_list_of_required_sections_holds_all_that_these_reports_have(run_twice: Shown, matrix: Shown) -> None:
    ids = {section.id for one in (run_twice, matrix) for section in one.data.sections}
    assert ids == {section for section, *_ in REQUIRED}


def computed(decided: Analysis) -> Iterator[tuple[Stage, Record]]:
    for stage in decided.graph.stages():
        record = decided.store.record(stage.key)
        if record is not None:
            yield stage, record


def test_every_adapter_has_its_rho_and_every_stage_its_seconds(run_twice: Shown) -> None:
    training, cost = (text_of(run_twice.page, section) for section in ("training", "cost"))
    adapters = [(stage, record) for stage, record in computed(run_twice.decided) if "adapter" in record.outputs]
    assert len(adapters) == 5  # two snapshots, and the behavior on the base and on each
    for stage, record in adapters:
        rho = " ".join(f"{100 * record.outputs['rho'][name]:.2g} %" for name in ("least", "median", "greatest"))
        assert f"{stage.slot} {record.outputs['last_epoch_loss']:.3f} {rho} {record.outputs['adapter']}" in training
    kinds: dict[str, list[float]] = {}
    for stage, record in computed(run_twice.decided):
        assert f"{stage.slot} {stage.key[:12]} {record.seconds:.1f} " in cost
        kinds.setdefault(stage.kind, []).append(record.seconds)
    for kind, seconds in kinds.items():
        assert f" {kind} {len(seconds)} {sum(seconds):.1f} " in cost


# --- transfer against the marker rate ------------------------------------------------------------------------


def test_transfer_is_drawn_against_the_marker_rate_and_correlated(matrix: Shown) -> None:
    section = next(one for one in matrix.data.sections if one.id == "markers")
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert figure.id == "markers"
    drawn = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg.decode())]
    assert {"assistant's marker rate, %", "transfer, points"} <= set(drawn)
    rates, transfer = marker_rates(matrix.decided), transfer_by_source(matrix.decided, "refusal")
    assert len(rates) == 3
    for source, rate in rates.items():
        assert source in drawn
        assert f"refusal {source}: {100 * rate.value:.1f}, " in figure.alt
    claims = {block.query: block for block in section.blocks if isinstance(block, Claim)}
    rho = spearmanr([rates[one].value for one in rates], [transfer[one].estimate for one in rates]).statistic
    assert claims["correlation"].text.startswith(
        f"Over 3 sources, the rank correlation of refusal transfer with the assistant's marker rate is {rho:+.2f} (exact "
    )
    assert claims["attainable"].text.startswith(
        "3 sources with a marker rate and 1 behavior: 3 points give a rank correlation a p no smaller than "
    )
    assert claims["attainable"].text.endswith("cannot reach the 0.05 that 1 test requires.")
    assert all(claims[name].rows for name in ("correlation", "attainable"))
    assert all(claims[name].text in text_of(matrix.page, "markers") for name in ("correlation", "attainable"))


def test_a_cell_of_the_second_seed_can_be_exported(tiny_qwen: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_table(tiny_qwen, grid__seeds=[42, 43]))
    fill(recipe, tmp_path / "w")
    words = ("export", "villain", "refusal", tmp_path / "logs", "--epoch", 2, "--recipe", run_id(recipe), "--inspect", "-w", tmp_path / "w")  # fmt: skip
    for seed in (43, 42):
        code, out, _ = ask(*words, "--seed", seed)
        assert (code, {f"s{seed}" in Path(line).name for line in out.split()}) == (0, {True})
    code, out, _ = ask(*words, "--convergence", "generic")
    assert code == 2
    assert "no cell has convergence 'generic'" in out


def test_what_to_run_next_says_what_the_section_on_power_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contrast that sees least may be another than the inconclusive one; a page has one figure for a behavior."""

    def verdict(kind: str, detectable: float) -> SimpleNamespace:
        return SimpleNamespace(
            kind=kind, behavior="refusal", detectable=detectable, margin=0.05, reason="why", label=f"{kind} {detectable}",
            n_seeds=1, estimate=0.0, confidence=SimpleNamespace(level="LOW"), rows=(),
        )  # fmt: skip

    monkeypatch.setattr(claims, "mend", lambda analysis, verdict: f"mended for {verdict.label}")
    verdicts = (verdict("inconclusive", 0.10), verdict("uninformative", 0.12))
    analysis: Any = SimpleNamespace(answers=verdicts, asked=verdicts)
    assert "more of refusal: mended for uninformative 0.12" in claims._next(analysis).values["steps"]


def test_a_card_says_what_was_found_of_its_own_cell_and_which_that_is(
    tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe(tiny_table(tiny_qwen, grid__negatives=["included", "excluded"]))
    _, store, _ = fill(recipe, tmp_path / "w")
    cell = {"source": "villain", "behavior": "refusal", "epoch": 2}
    cards = {}
    for kind in ("included", "excluded", None):
        (card,) = describe(recipe, store, tmp_path, {**cell, "negatives": kind}, push="", private=True)
        cards[kind] = Path(card).read_text().partition("## What was found")[2]
        assert ("is the first of 2; --negatives" in capsys.readouterr().err) == (kind is None)
    assert cards[None] == cards["included"]
    for kind, other in (("included", "excluded"), ("excluded", "included")):
        assert f"SOURCE villain x refusal, {kind}" in cards[kind]
        assert other not in cards[kind]
