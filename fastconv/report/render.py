"""Renders `ReportData` as one self-contained HTML page and as Markdown.

No script and no external resource; all text is escaped. The templates print only what the blocks hold.
"""

from __future__ import annotations

import base64
import json
import re
from importlib import resources

import jinja2

from fastconv.report.blocks import Claim, Figure, ReportData

#: Control and bidirectional formatting characters: shown as escape codes, so that they have no effect.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def render_html(data: ReportData) -> str:
    """The report as an HTML page."""
    return _environment(autoescape=True).get_template("report.html.j2").render(data=data)


def render_markdown(data: ReportData) -> str:
    """The report as Markdown, without figures."""
    text = _environment(autoescape=False).get_template("report.md.j2").render(data=data)
    return re.sub(r"\n{3,}", "\n\n", text)


def visible(text: object) -> str:
    """The text with invisible and direction-changing characters replaced by their escape codes."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def svg_data_uri(figure: Figure) -> str:
    """The figure's SVG as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg).decode()


def claim_attributes(claim: Claim) -> dict[str, str]:
    """The attributes of a claim in the page that `verify` reads: query, arguments, number of rows, and their sha256."""
    return {
        "query": claim.query,
        "arguments": json.dumps(dict(claim.arguments), sort_keys=True),
        "rows": str(len(claim.rows)),
        "sha": claim.rows_sha256[:16],
    }


def _quoted(text: object) -> str:
    """Model text as an indented Markdown code block, which it cannot leave."""
    return "\n".join(f"    {line}" for line in visible(text).splitlines() or [""])


def _in_cell(text: object) -> str:
    """Text for a Markdown table cell: without line breaks, bars or HTML."""
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
