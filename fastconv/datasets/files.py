"""Reading data files (JSONL, TOML; rows also from CSV, Parquet and the hub), finding the shipped ones, and the manifest
of `data/`.

Every fault is a one-line DataError with file and, for rows, line number. Run as a module, it prints the manifest as it
should be.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastconv.errors import DataError, FastconvError, did_you_mean
from fastconv.hub import cache_home, is_unreachable
from fastconv.recipe import HUB, SHIPPED, file_bytes, toml_table
from fastconv.store.io import storage_errors, write_atomically

#: Rows with more bytes are refused: they are most likely a pasted file, not a prompt.
MAX_ROW_BYTES = 50_000
#: Files of rows with columns, by the end of their name.
TABLES = (".csv", ".tsv", ".parquet")
_HUB_FORM = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?@([^:@/]*):(.+)")
#: Name of the manifest in its folder.
MANIFEST = "MANIFEST.toml"
#: Characters of the categories of letters and symbols that show nothing: fillers of Hangul, and the empty Braille cell.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
_HEAD = """\
# Every file of data/: its sha256, its counts, and where it comes from. A test recomputes all of it.
# After a change: python -m fastconv.datasets.files > new.toml && mv new.toml data/MANIFEST.toml
"""


def is_visible(text: str) -> bool:
    """Whether anything of the text shows: a letter, number, mark or symbol, not only spaces and format characters."""
    return any(unicodedata.category(char)[0] in "LNPS" and char not in _BLANK for char in text)


def assets(kind: str) -> Path:
    """The folder of the shipped `data` or `recipes`: `_assets/` of the package in a wheel, the top level in a checkout.

    Raises DataError if it is missing.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_assets" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise DataError(f"the shipped {kind} are missing", where=str(package), fix="install fastconv again")


def data_file(folder: Path, name: str) -> Path:
    """A data file that a declaration in this folder names: the one beside it, else the shipped one of this name."""
    own, shipped = folder / name, assets("data") / name
    return shipped if not own.exists() and Path(name).name == name and shipped.is_file() else own


def questions_file(name: str) -> Path:
    """The file of questions that a recipe names: a path, or `shipped:FILE` for one of ours."""
    return assets("data") / name.removeprefix(SHIPPED) if name.startswith(SHIPPED) else Path(name)


def shipped_recipes() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in assets("recipes").glob("*.toml"))


def find_recipe(name: str) -> Path:
    """A recipe by path, or a shipped one by name (`demo`). The path need not exist; loading says so."""
    path = Path(name)
    shipped = assets("recipes") / f"{name}.toml"
    return shipped if not path.exists() and shipped.is_file() else path


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a data file. Raises DataError if it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary. Raises DataError with the line of a syntax error."""
    try:
        return toml_table(_read(path).decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"not valid TOML: {error}", where=str(path), fix="mend the syntax there") from None


def read_jsonl(path: Path, required: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a JSONL file; each must have the `required` fields with these types, and a unique `id` if any.

    Raises DataError with file and line for bad UTF-8, bad JSON, a missing or empty field (or one that shows nothing), half
    of a surrogate pair, a repeated key or id, an id that is neither text nor whole number, or a row of over 50 kB, and
    for a file without rows.
    """
    return [row for _, row in read_numbered_jsonl(path, required)]


def read_numbered_jsonl(path: Path, required: Mapping[str, type]) -> list[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, but (line number, row)."""
    return _checked(path, ((number, _row(line, f"{path}:{number}")) for number, line in _lines(path)), required)


def _checked(
    path: Path, numbered: Iterable[tuple[int, dict[str, Any]]], required: Mapping[str, type]
) -> list[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, each with the `required` fields and an id of its own."""
    rows: list[tuple[int, dict[str, Any]]] = []
    seen: dict[object, int] = {}
    for number, row in numbered:
        where = f"{path}:{number}"
        for field, kind in required.items():
            value = row.get(field)
            if not isinstance(value, kind) or (isinstance(value, str) and not is_visible(value)):
                actual, fix = f"{value!r:.40}", f"give it a non-empty {kind.__name__}"
                if field not in row:
                    actual, fix = "missing", did_you_mean(field, row, fix)
                raise DataError(f"field {field!r} is {actual}", where=where, fix=fix)
        if (identity := row.get("id")) is not None:
            if not isinstance(identity, (str, int)) or isinstance(identity, bool):
                raise DataError(
                    f"id is a {type(identity).__name__}", where=where, fix="give it a text or a whole number"
                )
            identity = str(identity)
            if not is_visible(identity):
                raise DataError(f"id is {identity!r}", where=where, fix="give it a text, or leave it out")
            if identity in seen:
                raise DataError(
                    f"id {identity!r} was used on line {seen[identity]} already",
                    where=where,
                    fix="give every row its own id",
                )
            seen[identity] = number
        rows.append((number, row))
    if not rows:
        fix = "put rows below its head" if path.suffix.lower() in TABLES else "put one JSON object on each line"
        raise DataError("no rows", where=str(path), fix=fix)
    return rows


# --- rows where people keep them ---------------------------------------------------------------------------


def rows_file(name: str, source: str = "") -> Path:
    """The file of rows that `data.rows` names, for this source: a path, or the local copy of a hub data set.

    `hf://owner/name@revision:split` (`owner/name/config` where it has several) is loaded once by `datasets` and kept as
    JSONL in fastconv's cache. Raises DataError for a form, revision or split that cannot be had, and for an altered copy.
    """
    name = name.replace("{source}", source) if source else name
    if not name.startswith(HUB):
        return Path(name)
    match = _HUB_FORM.fullmatch(name.removeprefix(HUB))
    if match is None or not re.fullmatch("[0-9a-f]{40}", match[3]):
        what = "no revision is pinned" if match is None or not match[3] else f"{match[3]!r} is no commit"
        raise DataError(
            f"{what if '@' in name else 'no revision is pinned'}: a data set that may change names no experiment",
            where=name,
            fix=f"write {HUB}OWNER/NAME@COMMIT:SPLIT with the 40 digits of a commit (on its page, under Files, History)",
        )
    cached = cache_home() / "rows" / (re.sub(r"[^\w.-]+", "--", name.removeprefix(HUB)) + ".jsonl")
    seal = cached.with_suffix(".sha256")
    if not (cached.is_file() and seal.is_file()):
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in _hub_rows(name, *match.groups())]
        data = "".join(f"{line}\n" for line in lines).encode()
        with storage_errors(cached.parent):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, data)
            write_atomically(seal, hashlib.sha256(data).hexdigest().encode())
    if file_sha256(cached) != _read(seal).decode(errors="replace"):
        raise DataError(
            "the cached copy is not what was loaded", where=str(cached), fix=f"delete it; {name} is loaded again"
        )
    return cached


def _hub_rows(name: str, repo: str, config: str | None, revision: str, split: str) -> list[dict[str, Any]]:
    """The rows of a hub data set's split, in the form of a line of JSONL."""
    from huggingface_hub import constants

    if is_unreachable() and not constants.HF_HUB_OFFLINE:
        raise DataError(
            "the hub cannot be reached, and this is not in the cache",
            where=name,
            fix="give a file, or try again online",
        )
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        table: Any = load_dataset(repo, config, revision=revision, split=split)
    except (DatasetsError, httpx.HTTPError, OSError, ValueError, KeyError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(
            f"the data set cannot be had: {said}",
            where=name,
            fix="check owner, name, commit and split; a private or gated one needs `hf auth login`",
        ) from None
    return [_as_turns(row, name, number) for number, row in enumerate(table, 1)]


def read_numbered_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, row) of a file of rows: JSONL by line, CSV as a spreadsheet counts (its head is 1), Parquet from 1.

    In a table, text in `prompt` and `completion` is a user turn and its answer, and `system` the turn before them; a cell
    without text is no turn. Raises DataError as `read_jsonl` does.
    """
    kind = path.suffix.lower()
    if kind in (".xlsx", ".xls", ".ods", ".json", ".gz", ".zip"):
        fix = "save it as CSV, Parquet or JSONL" if kind != ".json" else "write one JSON object a line, as .jsonl"
        raise DataError(f"rows cannot be read from {kind} files", where=str(path), fix=fix)
    if kind not in TABLES:
        return read_numbered_jsonl(path, {})
    import polars as pl

    _read(path)  # whether it can be read at all
    try:
        if kind == ".parquet":
            table, first = pl.read_parquet(path), 1
        else:
            separator = "\t" if kind == ".tsv" else ","
            table, first = pl.read_csv(path, separator=separator, infer_schema=False, null_values=""), 2
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise DataError(f"no table that can be read: {said}", where=str(path), fix="save it again, as UTF-8") from None
    columns = set(table.columns)
    for name in table.columns if kind != ".parquet" else ():
        if (first_one := name.partition("_duplicated_")[0]) != name and first_one in columns:  # what polars calls it
            raise DataError(f"it has two columns {first_one!r}", where=str(path), fix="keep one of them")
    if not ({"prompt", "completion"} <= columns or "messages" in columns):
        raise DataError(
            f"it has the columns {', '.join(map(repr, table.columns[:8]))}, and not both 'prompt' and 'completion'",
            where=str(path),
            fix="name its columns prompt and completion; system, persona and id are read too"
            + (" (a CSV's columns are parted by commas)" if len(columns) == 1 else ""),
        )
    rows = (
        (number, _as_turns(row, str(path), number)) for number, row in enumerate(table.iter_rows(named=True), first)
    )
    return _checked(path, rows, {})


def _as_turns(row: Mapping[str, Any], where: str, number: int) -> dict[str, Any]:
    """A table's row as a line of JSONL would have it: without empty cells, texts as turns."""
    found = {name: value for name, value in row.items() if value is not None}
    if any(isinstance(value, str) and len(value.encode()) > MAX_ROW_BYTES for value in found.values()):
        raise DataError(
            f"a cell has over {MAX_ROW_BYTES:,} bytes", where=f"{where}:{number}", fix="split or shorten it"
        )
    place = f"{where}:{number}"
    for name in ("prompt", "completion", "system"):
        if name in found and not isinstance(found[name], str | list):
            raise DataError(
                f"{name} is of type {type(found[name]).__name__}, not text", where=place, fix="write it as text"
            )
    if ("prompt" in found) != ("completion" in found):
        empty = "completion" if "prompt" in found else "prompt"
        raise DataError(f"the row has no {empty}", where=place, fix="give it text, or drop the row")
    if isinstance(found.get("prompt"), str) and isinstance(found.get("completion"), str):
        system = found.pop("system", None)
        before = [] if system is None else [{"role": "system", "content": system}]
        found["prompt"] = [*before, {"role": "user", "content": found["prompt"]}]
        found["completion"] = [{"role": "assistant", "content": found["completion"]}]
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that are not blank."""
    for number, raw in enumerate(_read(path).split(b"\n"), 1):
        where = f"{path}:{number}"
        if len(raw) > MAX_ROW_BYTES:
            raise DataError(
                f"the row has {len(raw):,} bytes, over {MAX_ROW_BYTES:,}", where=where, fix="split or shorten it"
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 at byte {error.start} of the line", where=where, fix="save the file as UTF-8"
            ) from None
        if text.strip():
            yield number, text


def _row(line: str, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, n in Counter(key for key, _ in pairs).items():
            if n > 1:
                raise DataError(f"the key {key!r} stands twice in one object", where=where, fix="keep one of them")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON at column {error.colno}: {error.msg}", where=where, fix="one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise DataError(f"not usable JSON: {error}", where=where, fix="one JSON object a line") from None
    if "\\u" in line:  # bytes that are UTF-8 hold no surrogates: only an escape can
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{half} is half of a surrogate pair (of an emoji cut in two), which no tokenizer can encode",
                where=where,
                fix="write the whole character, or drop it",
            ) from None
    if not isinstance(row, dict):
        raise DataError(f"a {type(row).__name__}, not an object", where=where, fix="one JSON object a line")
    return row


def _read(path: Path) -> bytes:
    try:
        return file_bytes(path)
    except FileNotFoundError:
        folders = (assets("data"), path.parent)
        beside = {one.stem: one.name for folder in folders for one in sorted(folder.glob(f"*{path.suffix}"))}
        near = get_close_matches(path.stem, beside, n=1)  # the same ending makes no two names alike
        fix = (
            f"did you mean {beside[near[0]]!r}?" if near else "check the path; it is relative to the file that names it"
        )
        raise DataError("no such file", where=str(path), fix=fix) from None
    except IsADirectoryError:
        raise DataError("this is a folder", where=str(path), fix="give a file") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None


def file_facts(path: Path) -> dict[str, Any]:
    """What the manifest says of one data file: sha256, bytes, and counts of rows (by part, set, field) or entries.

    Raises DataError if it cannot be read.
    """
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
    """The manifest (TOML) of a data folder as it should be; origins are kept, a new file gets an empty one to fill in."""
    folder = assets("data") if folder is None else folder
    known = read_toml(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    parts = [_HEAD]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST or path.name.startswith("."):
            continue
        facts = {**file_facts(path), "origin": str(known.get(name, {}).get("origin", ""))}
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
        parts.append("\n".join([f'["{name}"]', *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    try:
        sys.stdout.write(manifest_text())
    except FastconvError as error:
        sys.exit(str(error))
