"""What a row of the ledger may hold. SQLite keeps any value in any column; what no fastconv writes is damage, and told as that.

A workspace may come from anybody: its rows are believed where they are of their kind, and what is read of them then can be
computed with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from fastconv.errors import StoreError, shown
from fastconv.recipe import sha256_of
from fastconv.startup import StartTimes
from fastconv.store.io import damaged, stored_json

if TYPE_CHECKING:
    import sqlite3

#: What artefacts are.
SUFFIXES = ("safetensors", "json")
#: Columns that hold a JSON object; `judge_rubrics.body` is the rubric's own text.
_OBJECTS = frozenset({"inputs", "outputs", "facts", "recipe", "body", "detail", "note", "usage", "answer", "values"})
#: What a value of each declared type is; `{x}` is the column.
_SOUND = {
    "TEXT": "typeof({x})='text'",
    "INTEGER": "typeof({x})='integer'",
    "REAL": "typeof({x}) IN ('real','integer') AND ABS({x}) < 1e300",
}
_SOUND_OBJECT = "CASE WHEN typeof({x})='text' AND json_valid({x}) THEN json_type({x})='object' ELSE 0 END"
#: Seconds since the epoch that a calendar of four digits has a date for.
_SOUND_TIME = "typeof({x}) IN ('real','integer') AND {x} BETWEEN 0 AND 253402214400"


def unsound_rows(db: sqlite3.Connection, tables: Iterable[str] | None = None) -> list[str]:
    """What the rows of these tables (all without any) hold that no fastconv writes, one line for each table."""
    found = []
    for table in [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]:
        if table.startswith("sqlite_") or (tables is not None and table not in tables):
            continue
        n = _n_of_other_types(db, table) or _n_of_other_content(db, table)
        if n:
            found.append(f"{n} rows of {table} hold what no fastconv writes")
    return found


def _n_of_other_types(db: sqlite3.Connection, table: str) -> int:
    """Rows of which a column holds no value of its declared type."""
    conditions = []
    for _, column, declared, is_required, _, place_in_key in db.execute(f'PRAGMA table_info("{table}")').fetchall():
        sound = _SOUND.get(declared, "0")
        if column in _OBJECTS and table != "judge_rubrics":
            sound = _SOUND_OBJECT
        elif column.endswith("_at") or column == "heartbeat":
            sound = _SOUND_TIME
        name = f'"{column}"'
        # SQLite takes NULL in a primary key that is no integer.
        known = f"{name} IS {'NOT NULL AND' if is_required or place_in_key else 'NULL OR'}"
        conditions.append(f"({known} ({sound.format(x=name)}))")
    return db.execute(f'SELECT COUNT(*) FROM "{table}" WHERE NOT ({" AND ".join(conditions)})').fetchone()[0]


def _n_of_other_content(db: sqlite3.Connection, table: str) -> int:
    """Rows of which every column is of its type, and a JSON object holds what cannot be computed with."""
    if table not in _CONTENT:
        return 0
    columns, is_sound = _CONTENT[table]
    held = {row[1] for row in db.execute(f'PRAGMA table_info("{table}")')}
    if not held.issuperset(columns.replace('"', "").split(", ")):
        return 0  # `doctor` names the column that is not there
    return sum(not _read_soundly(is_sound, row) for row in db.execute(f"SELECT {columns} FROM {table}"))


def _read_soundly(is_sound: Callable[..., bool], row: Iterable[Any]) -> bool:
    """Whether a row whose JSON objects are read is sound; Python reads fewer than SQLite does (none with 5000 digits)."""
    try:
        return is_sound(*(stored_json(one) if isinstance(one, str) and one.startswith("{") else one for one in row))
    except StoreError:
        return False


# --- what JSON objects hold ------------------------------------------------------------------------------------


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that can be computed with: no infinite one, and none that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_object_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


_Kinds = Mapping[str, Callable[[object], bool]]
#: What stages give, by name, whatever gives it.
_OUTPUTS: _Kinds = {
    **dict.fromkeys(("n", "n_unscored", "answers_kept", "answers_drawn"), _is_count),
    **dict.fromkeys(("from_base", "from_recorded", "last_epoch_loss", "speedup"), is_number),
    **dict.fromkeys(("adapter", "rows", "weights_sha256"), _is_text),
    **dict.fromkeys(("probe", "losses"), _is_list_of(is_number)),
    "layers": _is_list_of(_is_count),
    "rho": _is_object_of(is_number),
}
#: What stages of a kind have always given, without which nothing can be read of them.
_TRAINED = ("adapter", "probe", "from_base", "losses", "last_epoch_loss")
_GIVEN = {
    **dict.fromkeys(("eval", "score", "judge", "answers", "reading", "geometry"), ("n",)),
    **dict.fromkeys(("snapshot", "behavior"), _TRAINED),
    "rows": ("rows", "n"),
}
_STAGE_FACTS: _Kinds = {
    **dict.fromkeys(
        ("trained_tok", "sampled_tok", "scored_tok", "prompt_tok", "read_tok", "halved", "steps"), _is_count
    ),
    "means": _is_list_of(_is_list_of(is_number)),
}
_RUN_FACTS: _Kinds = {
    **dict.fromkeys(
        ("git", "template", "machine", "engine", "versions", "judging", "workers", "ignored_gates"), _is_object
    ),
    **dict.fromkeys(("start_s", *StartTimes().facts()), is_number),
    "approved": lambda value: isinstance(value, dict) and _is_text(value.get("beyond")),
    "plan": lambda value: isinstance(value, dict) and _holds(value, _PLAN) and _PLAN.keys() <= value.keys(),
}
_PLAN: _Kinds = {"machine": _is_text, "origin": _is_text, "stages": _is_object_of(is_number)}


def _holds(held: Mapping[str, Any], kinds: _Kinds) -> bool:
    """Whether those of the names in `kinds` that an object has are of their kind."""
    return all(kinds[name](value) for name, value in held.items() if name in kinds)


def require_artefact(sha256: object, suffix: object, where: str) -> None:
    """Raise StoreError for what can be no artefact: a name in a ledger of somebody must not lead elsewhere on the disk."""
    if not is_artefact(sha256, suffix):
        raise damaged(f"an artefact is called {shown(f'{sha256}.{suffix}', 80)}", where)


def key_of(kind: str, version: int, inputs: Any) -> str:
    """The key of a stage with these inputs; "" where they are none of a stage."""
    try:
        return sha256_of({"kind": kind, "version": version, "inputs": inputs})
    except ValueError:  # a number that is not finite
        return ""


def is_artefact(sha256: object, suffix: object) -> bool:
    """Whether an artefact can be called so."""
    return isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None and suffix in SUFFIXES


def _is_stage(key: str, kind: str, version: int, inputs: Any, outputs: Any, facts: Any) -> bool:
    given = all(name in outputs for name in _GIVEN.get(kind, ()))
    return key_of(kind, version, inputs) == key and given and _holds(outputs, _OUTPUTS) and _holds(facts, _STAGE_FACTS)


def _is_detail(detail: Any) -> bool:
    """The letters' share of the probability and a judge's grade are computed with."""
    return is_number(detail.get("mass", 0)) and is_number(detail.get("coherent", 0))


def _is_run(recipe: Any, facts: Any) -> bool:
    """A recipe of any version names its sources: which thresholds were the first is read off the recipes of other runs."""
    grid = recipe.get("grid", {})
    sources = _is_object(grid) and _is_list_of(_is_text)(grid.get("sources", []))
    return sources and _is_object(recipe.get("gates", {})) and _holds(facts, _RUN_FACTS)


def _is_local_reply(transport: str, text: Any) -> bool:
    """A local judge's replies are kept as objects: one for each measure that was asked."""
    if transport != "local":
        return True
    probabilities = text.get("logprobs") if isinstance(text, dict) else 0
    kept = probabilities is None or _is_object_of(is_number)(probabilities)
    return kept and all(_is_text(text.get(name)) for name in ("measure", "text"))


def _is_note(note: Any) -> bool:
    return "done" not in note or {"done", "total", "unit"} <= note.keys()


#: Table -> the columns that are looked into, and whether they are sound.
_CONTENT: Mapping[str, tuple[str, Callable[..., bool]]] = {
    "stages": ("key, kind, version, inputs, outputs, facts", _is_stage),
    "scores": ("detail", _is_detail),
    "runs": ("recipe, facts", _is_run),
    "judgements": ('"values"', lambda values: values is None or _is_object_of(is_number)(values)),
    "judge_replies": ("transport, text", _is_local_reply),
    "leases": ("note", _is_note),
    "artefacts": ("sha256, suffix", is_artefact),
}
