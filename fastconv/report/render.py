"""The report: one self-contained HTML page and its Markdown twin, both made from the same `ReportData`.

No script, nothing from outside, every text escaped. The templates print what the blocks hold and nothing else.
"""

from __future__ import annotations

import base64
import json
import re
from importlib import resources

import jinja2

from fastconv.report.blocks import Claim, Figure, ReportData

#: Control characters, and those that turn the direction of text: shown as their code, so that none acts.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def render_html(data: ReportData) -> str:
    """The page."""
    return _environment(autoescape=True).get_template("report.html.j2").render(data=data)


def render_markdown(data: ReportData) -> str:
    """The same in Markdown, without the drawings."""
    text = _environment(autoescape=False).get_template("report.md.j2").render(data=data)
    return re.sub(r"\n{3,}", "\n\n", text)


def visible(text: object) -> str:
    """The text with characters that cannot be seen, or that turn what follows, written as their codes."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def svg_data_uri(figure: Figure) -> str:
    """The drawing as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg).decode()


def claim_attributes(claim: Claim) -> dict[str, str]:
    """What the page says of a claim for `verify`: query, arguments, how many rows, and their sha256."""
    return {
        "query": claim.query,
        "arguments": json.dumps(dict(claim.arguments), sort_keys=True),
        "rows": str(len(claim.rows)),
        "sha": claim.rows_sha256[:16],
    }


def _quoted(text: object) -> str:
    """A model's text as a Markdown block that it cannot leave: every line indented as code."""
    return "\n".join(f"    {line}" for line in visible(text).splitlines() or [""])


def _in_cell(text: object) -> str:
    """A text inside a Markdown table: no line end, no bar, no HTML."""
    escaped = visible(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())


def _environment(*, autoescape: bool) -> jinja2.Environment:
    loader = jinja2.FunctionLoader(
        lambda name: (resources.files("fastconv.report") / "templates" / name).read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": _in_cell, "seen": visible, "quoted": _quoted, "address": svg_data_uri, "marks": claim_attributes,
    }  # fmt: skip
    return environment
