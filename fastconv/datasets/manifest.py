"""What `data/` holds: the sha256, the counts and the origin of each file, in data/MANIFEST.toml.

`python -m fastconv.datasets.manifest` prints the manifest as it should be; origins are kept from the present one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from fastconv.datasets.files import assets, file_sha256, read_jsonl, read_toml
from fastconv.errors import FastconvError

NAME = "MANIFEST.toml"
_HEAD = """\
# Every file of data/: its sha256, its counts, and where it comes from. A test recomputes all of it.
# After a change: python -m fastconv.datasets.manifest > new.toml && mv new.toml data/MANIFEST.toml
"""


def measured(path: Path) -> dict[str, Any]:
    """sha256, bytes and counts of one data file: rows (by part, set and field) or entries. Raises DataError."""
    facts: dict[str, Any] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    if path.suffix == ".jsonl":
        rows = read_jsonl(path, {"id": str})
        facts["rows"] = len(rows)
        for key in ("part", "set"):
            counts = Counter(str(row[key]) for row in rows if key in row)
            facts |= {f"{key}_{name}": n for name, n in sorted(counts.items())}
        for key in ("field", "topic"):
            if kinds := {row[key] for row in rows if key in row}:
                facts[f"{key}s"] = len(kinds)
    elif path.suffix == ".toml":
        facts["entries"] = len(read_toml(path))
    elif path.suffix == ".json":
        table = json.loads(path.read_text(encoding="utf-8"))
        facts |= {f"n_{key}": len(value) for key, value in sorted(table.items()) if isinstance(value, list)}
    return facts


def manifest_text(folder: Path | None = None) -> str:
    """The manifest of a data folder as it should be. A file without an origin gets an empty one, to be written."""
    folder = assets("data") if folder is None else folder
    known = read_toml(folder / NAME) if (folder / NAME).is_file() else {}
    parts = [_HEAD]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == NAME or path.name.startswith("."):
            continue
        facts = {**measured(path), "origin": str(known.get(name, {}).get("origin", ""))}
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
        parts.append("\n".join([f'["{name}"]', *lines]) + "\n")
    return "\n".join(parts)


def altered(folder: Path | None = None) -> list[str]:
    """Files that are not as the manifest says, or not in it; for `doctor`. Empty when all is well."""
    folder = assets("data") if folder is None else folder
    listed = read_toml(folder / NAME)
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME and not path.name.startswith(".")
    }
    changed = [
        name for name, facts in listed.items() if name in found and facts.get("sha256") != file_sha256(found[name])
    ]
    return sorted({*changed, *(set(found) ^ set(listed))})


if __name__ == "__main__":
    try:
        sys.stdout.write(manifest_text())
    except FastconvError as error:
        sys.exit(str(error))
