"""The report in a real browser: nothing overflows, nothing is logged as an error, no request leaves the page.

Needs Debian's chromium (`.ci/run` installs it); skips where there is none.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fastconv.report import collect
from fastconv.report.blocks import Answer, ReportData, Section, Table, TableCell, render_html
from tests.loop_kit import DoneRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")
NASTY = "</style><script>document.title='owned'</script><img src='http://127.0.0.1:{port}/x.png'> and an answer"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-extensions", "--mute-audio",
    # The browser's own errands stay at home, so that every request in its log is the page's.
    "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@dataclass
class Listening:
    """A server on loopback that writes down what it is asked for."""

    port: int
    asked: list[str]


@pytest.fixture(scope="module")
def listening() -> Iterator[Listening]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Listening(server.server_address[1], asked)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(done_run: DoneRun, listening: Listening, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = collect(done_run.graph, done_run.store)
    text = NASTY.format(port=listening.port)
    answers = Section("hostile", "Hostile", (Answer("villain", "eval/x", text, text),))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(replace(data, sections=(*data.sections, answers))))
    return path


def chromium(folder: Path, address: str, *words: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    log = folder / "net.json"
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
    ]
    return subprocess.run([*command, *words, address], capture_output=True, text=True, timeout=120, check=True)


def frame_of(page: Path, folder: Path, width: int) -> str:
    """The page in a frame of this width (a headless window cannot be narrower than 500), measured by a script outside."""
    holder = folder / f"holder-{width}.html"
    holder.write_text(
        f"<!doctype html><body style='margin:0'><iframe id=f src='{page.as_uri()}' style='width:{width}px;height:900px;border:0'>"
        "</iframe><pre id=out></pre><script>f.onload=()=>{const d=f.contentDocument,r=d.documentElement,wide=[];"
        "for(const e of d.querySelectorAll('body *')){const b=e.getBoundingClientRect();"
        "if(b.right>r.clientWidth+1&&!e.closest('.wide')&&!e.classList.contains('skip'))wide.push(e.tagName+'.'+e.className)}"
        "const s=d.querySelector('.skip');s.focus();const c=f.contentWindow.getComputedStyle(s),at=s.getBoundingClientRect();"
        "const focus=[c.outlineStyle,at.left>=0&&at.top>=0];const boxes=[...d.querySelectorAll('main .wide')];"
        "const stuck=boxes.filter(b=>b.scrollWidth>b.clientWidth+1&&b.tabIndex<0).length;"
        "const counts=d.querySelector('table.tight#kinds').getBoundingClientRect().width;"
        "out.textContent='JSON'+JSON.stringify({counts,focus,stuck,scroll:r.scrollWidth,client:r.clientWidth,wide:wide.slice(0,5),title:d.title,"
        "scripts:d.scripts.length,tall:r.scrollHeight})+'END'}</script>"
    )
    found = chromium(
        folder, holder.as_uri(), "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    )
    measured = re.search(r"JSON(\{.*?\})END", found.stdout)
    assert measured is not None, found.stderr[-2000:]
    return measured[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows_and_no_text_acts(page: Path, tmp_path: Path, width: int) -> None:
    found = json.loads(frame_of(page, tmp_path, width))
    assert found["client"] == width
    assert found["scroll"] <= found["client"], found
    assert found["wide"] == []
    assert found["scripts"] == 0
    assert found["focus"] == ["solid", True]  # what the keyboard is on is seen, also the link that jumps over the list
    assert found["stuck"] == 0  # every box that scrolls can be reached and scrolled by keyboard
    assert found["counts"] < 700  # a table of counts is as wide as they are, and does not drift apart over the page
    assert found["title"].startswith("fastconv: tiny")
    assert found["tall"] > 2000


def test_no_console_error_and_no_request_leaves_the_page(page: Path, listening: Listening, tmp_path: Path) -> None:
    found = chromium(tmp_path, page.as_uri(), "--window-size=1280,900", "--dump-dom")
    assert not re.findall(r"CONSOLE[^\n]*", found.stderr)
    assert "&lt;script&gt;document.title" in found.stdout
    assert requests_of_pages(tmp_path / "net.json") == []
    assert listening.asked == []
    # The log does show a request of a page that makes one: an image that the policy is not there to stop.
    open_page = tmp_path / "open.html"
    open_page.write_text(f"<!doctype html><img src='http://127.0.0.1:{listening.port}/x.png'>")
    chromium(tmp_path, open_page.as_uri(), "--dump-dom")
    assert requests_of_pages(tmp_path / "net.json") == [f"http://127.0.0.1:{listening.port}/x.png"]
    assert listening.asked == ["/x.png"]


def requests_of_pages(log: Path) -> list[str]:
    """Addresses on a network that a page asked for; the browser's own errands have no origin that asks."""
    events = [(event["source"]["id"], event.get("params", {})) for event in json.loads(log.read_text())["events"]]
    ours = {source for source, about in events if about.get("initiator", "not an origin") != "not an origin"}
    return sorted(
        {about["url"] for source, about in events if source in ours and about.get("url", "").startswith("http")}
    )


@pytest.mark.parametrize(("width", "height"), [(1280, 2000), (500, 2000)])
def test_a_screenshot_is_a_full_picture(page: Path, tmp_path: Path, width: int, height: int) -> None:
    picture = tmp_path / "page.png"
    chromium(tmp_path, page.as_uri(), f"--window-size={width},{height}", f"--screenshot={picture}")
    assert picture.stat().st_size > 30_000  # a blank page of this size is a tenth of that


def test_what_is_folded_on_a_screen_is_on_paper(tmp_path: Path) -> None:
    rows = tuple((TableCell(f"contrast {i}"), TableCell(str(i), ("a row",) * 60, list_rows=True)) for i in range(300))
    pages = {}
    for name, folded in (("folded", "300 contrasts"), ("open", "")):
        table = Table("t", ("what", "n"), rows, folded=folded)
        path, paper = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        path.write_text(render_html(ReportData("run", "about", (Section("s", "S", (table,)),))))
        chromium(tmp_path, path.as_uri(), "--no-pdf-header-footer", f"--print-to-pdf={paper}")
        pages[name] = len(re.findall(rb"/Type /Page\b", paper.read_bytes()))
    # As long as when it is open; and not three times as long, as it were with every row's ids printed in full.
    assert pages["open"] <= pages["folded"] <= pages["open"] + 1
    assert 4 <= pages["open"] <= 12
