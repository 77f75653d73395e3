"""`verify`: repeats every claim's query and compares all of a report with the ledger: page, twin, figures, tables.

A report of published figures has no ledger: it is compared with the shipped table it was made from.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fastconv.analysis.analysis import Analysis
from fastconv.errors import InputError, RecipeError
from fastconv.experiment.recorded import graph_of_run
from fastconv.recipe import Recipe, parse_recipe, run_id
from fastconv.report import build, strangers
from fastconv.report.blocks import Claim, ReportData, render_html, render_markdown, visible
from fastconv.report.claims import NoSuchClaimError, ask
from fastconv.report.published import TABLES_FILE, judge_published, published_names, published_report, read_published
from fastconv.stats.series import NoRowsError
from fastconv.store.io import stored_json
from fastconv.store.ledger import Store

_DRAWING = re.compile(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]*)")
#: At most this many differing lines are listed.
MOST_LISTED_LINES = 40


@dataclass(frozen=True)
class Difference:
    """One difference between report and ledger (or table).

    `what` is changed, missing, left out or rows (a claim); line, bytes or drawing (the text); file, missing file or extra
    file (what lies beside it).
    """

    what: str
    where: str
    report: str
    ledger: str


@dataclass(frozen=True)
class Verified:
    """The result: number of claims, lines and files checked, and all differences."""

    report: str
    run: str
    n_claims: int
    n_lines: int
    differences: tuple[Difference, ...]
    #: What the report was compared with.
    made_of: str = "ledger"
    #: The other form of the report (page or Markdown), and the figures and tables.
    n_files: int = 0

    @property
    def holds(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """JSON form for `--json`."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class PageClaim:
    """A claim as read from the page."""

    query: str
    arguments: Mapping[str, str]
    text: str
    n_rows: str
    sha: str

    @property
    def id(self) -> str:
        """Same as `Claim.id`."""
        return ":".join([self.query, *self.arguments.values()])


def verify(report: Path, store: Store) -> Verified:
    """Compare a report (HTML or Markdown), its other form and the files beside it with the ledger that it was made from.

    A page or twin that lies alone, without the other form and the folder, is compared by itself (`n_files` is 0).
    Raises InputError if it is no report of fastconv or its run is not in this workspace.
    """
    text = _read(report)
    run = _run_of(text, report)
    analysis = Analysis(graph_of_run(_recipe_of(run, text, report, store), store), store)
    return _compared(
        report, text, build(analysis), lambda page_claim: ask(analysis, page_claim.query, **page_claim.arguments)
    )


def verify_published(report: Path) -> Verified | None:
    """Compare a report of published figures with the table it was made from; None for every other report.

    Raises InputError if it is no report of fastconv.
    """
    text = _read(report)
    run = _run_of(text, report)
    if run not in published_names():
        return None
    data = published_report(judge_published(read_published(run)))
    claims = {claim.id: claim for claim in data.claims()}

    def ask_again(page_claim: PageClaim) -> Claim:
        if page_claim.id not in claims:
            raise NoSuchClaimError(f"{page_claim.id} is no sentence of this table")
        return claims[page_claim.id]

    return _compared(report, text, data, ask_again, TABLES_FILE)


def _compared(
    report: Path, text: str, data: ReportData, ask_again: Callable[[PageClaim], Claim], made_of: str = "ledger"
) -> Verified:
    """Compare the report's text with what it should be; `ask_again` repeats one of its claims."""
    is_html = text.lstrip().lower().startswith("<!doctype")
    claims = list(_claims(text)) if is_html else []
    differences = [*_asked_again(ask_again, claims, data)] if is_html else []
    forms = {".html": render_html(data), ".md": render_markdown(data)}
    this, other = (".html", ".md") if is_html else (".md", ".html")
    lines = _differing_lines(text, forms[this], data)
    files = {report.with_suffix(other): forms[other].encode()}
    files |= {report.parent / data.run / name: content for name, content in data.files.items()}
    if not report.with_suffix(other).exists() and not (report.parent / data.run).exists():
        files = {}  # one form was passed on alone: it is compared by itself
    differences += [*lines, *_differing_files(report.parent, files), *_extra_files(report.parent, data)]
    n_claims = len(claims) if is_html else len(data.claims())
    n_lines = forms[this].count("\n")
    return Verified(str(report), data.run, n_claims, n_lines, tuple(differences), made_of, len(files))


def _differing_files(folder: Path, files: Mapping[Path, bytes]) -> Iterator[Difference]:
    """Files that are not there, cannot be read, or hold other bytes than these."""
    for path, expected in files.items():
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            yield Difference("missing file", name, "", _digest(expected))
            continue
        except OSError as error:
            yield Difference("file", name, f"cannot be read: {error}", _digest(expected))
            continue
        if content != expected:
            yield Difference("file", name, _digest(content), _digest(expected))


def _extra_files(folder: Path, data: ReportData) -> Iterator[Difference]:
    for name in strangers(folder / data.run, data):
        yield Difference("extra file", f"{data.run}/{name}", "lies beside the report", "not a file of this report")


def _digest(content: bytes) -> str:
    return f"{len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def _read(report: Path) -> str:
    try:
        return report.read_bytes().decode("utf-8")  # without newline translation, which would hide an edit
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot be read: {why}", where=str(report), fix="give the path of a report") from None


def _run_of(text: str, report: Path) -> str:
    match = re.search(r'<meta name="fastconv-run" content="([^"]+)">', text) or re.match(r"# (\S+)\s*\n", text)
    if match is None:
        raise InputError("is no report of fastconv", where=str(report), fix="give a page that `fastconv report` wrote")
    return match[1]


def _recipe_of(run: str, text: str, report: Path, store: Store) -> Recipe:
    """The run's recipe from the ledger, or from the page itself if it was reported but never run in this workspace."""
    row = store.run(run)
    if row is not None:
        return parse_recipe(stored_json(row["recipe"]), where=run)
    for card_text in re.findall(r"<code>(\{[^<]*\})</code>", text):
        try:
            recipe = parse_recipe(json.loads(html.unescape(card_text)), where=str(report))
        except (ValueError, RecipeError):
            continue
        if run_id(recipe) == run:  # the id is a digest of the recipe, so this is the one
            return recipe
    known = ", ".join(row["id"] for row in store.runs()) or "none"
    raise InputError(
        f"the workspace has no run {run!r}", where=str(report), fix=f"give its --workspace; runs here: {known}"
    )


class _Claims(HTMLParser):
    """Collects the elements that carry a claim, with their text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[PageClaim] = []
        self._open: dict[str, str] | None = None
        self._tag = ""
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        if "data-query" in about:
            self._open, self._tag, self._text = about, tag, []

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._open is None or tag != self._tag:
            return
        about, self._open = self._open, None
        try:
            arguments = {str(k): str(v) for k, v in json.loads(about.get("data-arguments", "{}")).items()}
        except (ValueError, AttributeError):
            arguments = {}
        text = "".join(self._text)
        self.found.append(
            PageClaim(about["data-query"], arguments, text, about.get("data-rows", ""), about.get("data-sha", ""))
        )


def _claims(text: str) -> Iterator[PageClaim]:
    parser = _Claims()
    parser.feed(text)
    yield from parser.found


def _asked_again(
    ask_again: Callable[[PageClaim], Claim], claims: list[PageClaim], data: ReportData
) -> Iterator[Difference]:
    """Repeat every claim of the page, and find claims that the page lacks."""
    for page_claim in claims:
        try:
            claim = ask_again(page_claim)
        except (NoSuchClaimError, NoRowsError) as error:
            yield Difference("missing", page_claim.id, page_claim.text, f"nothing supports it: {error.args[0]}")
            continue
        yield from _compare(page_claim, claim)
    page_ids = {page_claim.id for page_claim in claims}
    for claim in data.claims():
        if claim.id not in page_ids:
            yield Difference("left out", claim.id, "", claim.text)


def _compare(page_claim: PageClaim, claim: Claim) -> Iterator[Difference]:
    if page_claim.text != visible(claim.text):
        yield Difference("changed", page_claim.id, page_claim.text, claim.text)
    if page_claim.n_rows != str(len(claim.rows)):
        yield Difference("rows", page_claim.id, f"{page_claim.n_rows} rows", f"{len(claim.rows)} rows")
    elif page_claim.sha != claim.rows_sha256[:16]:
        yield Difference("rows", page_claim.id, "other rows", f"{len(claim.rows)} rows, of other stages or questions")


def _differing_lines(text: str, expected: str, data: ReportData) -> list[Difference]:
    """Every line that differs. Figures are compared by their data, independent of the library that drew them."""
    expected_text, report_text = _without_drawings(expected), _without_drawings(text)
    differences = []
    if expected_text != report_text:
        matcher = SequenceMatcher(None, report_text.splitlines(), expected_text.splitlines(), autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag != "equal":
                left, right = "\n".join(report_text.splitlines()[a:b]), "\n".join(expected_text.splitlines()[c:d])
                differences.append(Difference("line", f"line {a + 1}", *_around(left, right)))
    differences += _drawings(text, data)
    if text != expected and not differences:  # line ends, or base64 that is decoded to the same bytes
        at = next(
            (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
        )
        differences.append(
            Difference("bytes", f"character {at + 1}", repr(text[at : at + 20]), repr(expected[at : at + 20]))
        )
    return differences[:MOST_LISTED_LINES]


def _without_drawings(text: str) -> str:
    return _DRAWING.sub("drawing", text)


def _drawings(text: str, data: ReportData) -> list[Difference]:
    if not text.lstrip().lower().startswith("<!doctype"):
        return []
    shown, drawn = [], [figure.svg for figure in data.figures()]
    for encoded in _DRAWING.findall(text):
        try:
            shown.append(base64.b64decode(encoded, validate=True))
        except ValueError:
            shown.append(b"")
    if len(shown) != len(drawn):
        return [Difference("drawing", "figures", f"{len(shown)} drawings", f"{len(drawn)} drawings")]
    return [
        Difference("drawing", figure.id, "another drawing", "as the ledger gives it with the library installed here")
        for figure, in_report, expected in zip(data.figures(), shown, drawn, strict=True)
        if in_report != expected
    ]


def _around(left: str, right: str, width: int = 80) -> tuple[str, str]:
    """Both texts near their first difference."""
    first_difference = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    start = max(0, first_difference - width // 2)
    return left[start : start + width], right[start : start + width]
