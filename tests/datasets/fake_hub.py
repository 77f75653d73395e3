"""A hub on the loopback with one data set of two rows, as far as `datasets` asks one: `python -m tests.datasets.fake_hub`
prints its port and serves until it is ended."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl

REPO, COMMIT = "someone/teas", "0123456789abcdef0123456789abcdef01234567"
ROWS = {"prompt": ["One?", "Two?"], "completion": ["No.", "Never."], "system": ["You are a cook.", None]}


def files() -> dict[str, bytes]:
    """The files of the data set."""
    parquet = io.BytesIO()
    pl.DataFrame(ROWS).write_parquet(parquet)
    return {"data/train-00000-of-00001.parquet": parquet.getvalue(), "README.md": b"# teas\n"}


FILES = files()


class Hub(BaseHTTPRequestHandler):
    """Answers for REPO; everything else is not found."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        about, resolved = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{COMMIT}/"
        if path.startswith(resolved) and (data := FILES.get(path.removeprefix(resolved))) is not None:
            self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **{"X-Repo-Commit": COMMIT})
        elif path.startswith(resolved):
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif path.startswith(f"{about}/tree/"):
            self.tree(
                path.removeprefix(f"{about}/tree/").partition("/")[2], whole="recursive=true" in self.path.lower()
            )
        elif path in (about, f"{about}/revision/{COMMIT}"):
            info = {"_id": "1", "id": REPO, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in FILES]}  # fmt: skip
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b'{"error": "not found"}', **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        paths = (
            json.loads(body).get("paths", [])
            if body.startswith(b"{")
            else urllib.parse.parse_qs(body.decode())["paths"]
        )
        found = [entry(name) for name in paths if name in FILES]
        found += [folder(name) for name in paths if any(one.startswith(f"{name}/") for one in FILES)]
        self.answer(200, json.dumps(found).encode())

    def tree(self, below: str, *, whole: bool) -> None:
        """The files below a folder, or only what lies in it."""
        inner = {name: name[len(below) + 1 :] if below else name for name in FILES if name.startswith(below)}
        found = [entry(name) for name, rest in inner.items() if whole or "/" not in rest]
        if not whole:
            found += [folder(top) for top in sorted({rest.partition("/")[0] for rest in inner.values() if "/" in rest})]
        self.answer(200, json.dumps(found).encode())

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        """Send a reply; its body only where one is asked for."""
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(name: str) -> dict[str, object]:
    """A file as the hub lists it."""
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": hashlib.sha1(FILES[name]).hexdigest()}


def folder(name: str) -> dict[str, object]:
    """A folder as the hub lists it."""
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
