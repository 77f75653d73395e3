"""Gates while a run is going on: a failed one ends the run before its next cost, unless the user ignores it aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import get_args

from fastconv.analysis.contrasts import Gathering
from fastconv.analysis.scores import Reading
from fastconv.analysis.gates import gates_after, ignored_gates, marked
from fastconv.errors import GateStop, InputError
from fastconv.stats.gates import GateVerdict
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import IgnorableGate
from fastconv.store.ledger import Store

#: Gates that a user may ignore.
IGNORABLE = get_args(IgnorableGate)


def ignoring(codes: list[str], because: str) -> dict[str, str]:
    """Gates to ignore, each with the reason. Raises InputError for one that cannot be, or without a reason."""
    unknown = [code for code in codes if code not in IGNORABLE]
    if unknown:
        why = "the audit's refusals cannot be ignored" if unknown == ["G1"] else f"{unknown[0]!r} ends no run"
        raise InputError(why, where="--ignore-gate", fix=f"use one of {', '.join(IGNORABLE)}")
    if codes and len(because.split()) < 2:
        raise InputError(
            "an ignored gate needs its reason in words", where="--because", fix='write --because "why it may fail"'
        )
    if because and not codes:
        raise InputError("a reason without a gate", where="--because", fix="add --ignore-gate CODE")
    return dict.fromkeys(codes, because)


class GateKeeper:
    """Asks the gates after each cell, and records what they said."""

    def __init__(
        self, graph: Graph, store: Store, run: str, tell: Callable[[GateVerdict], None], ignored: Mapping[str, str]
    ) -> None:
        """`ignored` is recorded in the run's facts, beside what earlier calls ignored."""
        self._graph, self._store, self._run, self._tell = graph, store, run, tell
        self._ignored = {**ignored_gates(store, graph.recipe), **ignored}
        self._said: set[tuple[str, str]] = set()
        if ignored:
            store.add_run_facts(run, {"ignored_gates": self._ignored, "ignored_at": time.time()})

    def after(self, plan: CellPlan) -> None:
        """Ask the gates about a finished cell. Raises GateStop if one that stops the run failed and is not ignored."""
        verdicts = gates_after(Gathering(Reading(self._graph, self._store)), plan)
        for verdict in marked(verdicts, self._ignored):
            self._record(verdict)
            if verdict.failed and not verdict.ignored and verdict.gate in self._graph.recipe.gates.stop:
                raise GateStop(
                    f"{verdict.gate} failed: {verdict.reason} (rule: {verdict.threshold})",
                    where=verdict.subject,
                    fix=f'mend the cause, or go on with --ignore-gate {verdict.gate} --because "..."',
                )

    def _record(self, verdict: GateVerdict) -> None:
        self._store.put_verdict(self._run, verdict.gate, verdict.subject, verdict.verdict, verdict.body())
        if verdict.failed and (verdict.gate, verdict.subject) not in self._said:
            self._said.add((verdict.gate, verdict.subject))
            self._tell(verdict)
