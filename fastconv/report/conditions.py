"""Under what two runs were made: where versions, engine, machine, checkout and the stages' own versions differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastconv.analysis.analysis import Decided

#: What of a run's facts is compared. The command is no condition, and the self-tests' figure is another in every process.
FACTS = ("python", "versions", "engine", "machine", "git", "template")
_LEFT_OUT = ("engine self_tests",)
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def changed_conditions(first: Decided, second: Decided) -> tuple[str, ...]:
    """What differs, as `name: first -> second`; that a run noted nothing is one line of its own."""
    silent = [one for one in (first, second) if not one.facts]
    if silent:
        runs = " and ".join(dict.fromkeys(one.run for one in silent))
        return (f"versions, engine and machine: not recorded for {runs}, which never began in its workspace",)
    ours, theirs = _conditions(first), _conditions(second)
    return tuple(
        f"{name}: {ours.get(name, 'none')} -> {theirs.get(name, 'none')}"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    )


def _conditions(decided: Decided) -> dict[str, str]:
    """Every condition of a run by name."""
    found = {}
    for name in FACTS:
        noted = decided.facts.get(name)
        table = noted if isinstance(noted, Mapping) else {"": noted} if noted is not None else {}
        found |= {f"{name} {part}".rstrip(): _shown(value) for part, value in table.items()}
    return {**{name: value for name, value in found.items() if name not in _LEFT_OUT}, **dict(_stage_versions(decided))}


def _stage_versions(decided: Decided) -> Iterator[tuple[str, str]]:
    """The versions of the stages that the run rests on, kind by kind, as they were when they were computed."""
    versions: dict[str, set[int]] = {}
    for key in decided.reused:
        record = decided.store.record(key)
        if record is not None:
            versions.setdefault(record.kind, set()).add(record.version)
    for kind, seen in sorted(versions.items()):
        yield f"stage version of {kind}", ", ".join(map(str, sorted(seen)))


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if _SHA.fullmatch(text) else text
