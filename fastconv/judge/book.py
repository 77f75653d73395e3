"""The desk's book: what was asked for, what is finished, and what the ledger already knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastconv.store.judgements import Judgement, Money
from fastconv.judge.budget import Price
from fastconv.judge.claude import concluded
from fastconv.judge.request import JudgeItem, JudgeParams, JudgeRequest, build_request
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.ledger import Sample
from fastconv.store.judge_ledger import JudgeLedger


@dataclass(frozen=True)
class DeskStatus:
    """Where judging stands. `problem` is one line, or "" when all is well."""

    n_asked: int = 0
    n_scored: int = 0
    n_unscored: int = 0
    n_stages: int = 0
    #: Stages whose every sample has a judgement.
    finished: frozenset[str] = frozenset()
    money: Money = field(default_factory=lambda: Money(0.0, 0.0, 0.0, None))
    problem: str = ""
    #: The judge is out for now (it is tried again), or done with for good (key refused, budget spent).
    out: bool = False
    stopped: bool = False

    @property
    def n_pending(self) -> int:
        """Judgements asked for and not finished."""
        return self.n_asked - self.n_scored - self.n_unscored


@dataclass
class Book:
    """What the desk was asked, inside its thread."""

    requests: dict[str, JudgeRequest] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    n_scored: int = 0
    #: Keys that a stage still waits for, and the stages that wait for a key.
    waits_for: dict[str, set[str]] = field(default_factory=dict)
    wanted_by: dict[str, set[str]] = field(default_factory=dict)
    #: Unreadable replies by key, where there are any.
    n_unread: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    n_outages: int = 0
    stopped: bool = False
    #: How often a stage's last judgement came in.
    n_finished: int = 0

    def want(self, stage: str, request: JudgeRequest) -> bool:
        """Enter one request of a stage; True if its key is new."""
        waits = self.waits_for.setdefault(stage, set())
        if request.key not in self.done:
            waits.add(request.key)
            self.wanted_by.setdefault(request.key, set()).add(stage)
        is_new = request.key not in self.requests
        self.requests.setdefault(request.key, request)
        return is_new

    def finish(self, judgement: Judgement) -> None:
        """Cross a judgement off, once."""
        if judgement.key not in self.done:
            self.done.add(judgement.key)
            self.n_scored += judgement.reason is None
            for stage in self.wanted_by.pop(judgement.key, ()):
                self.waits_for[stage].discard(judgement.key)
                self.n_finished += not self.waits_for[stage]

    def pending(self) -> bool:
        """Whether anything asked for is not finished."""
        return len(self.done) < len(self.requests)


def params_of(settings: JudgeSettings, price: Price | None, *, reverse: bool = False) -> JudgeParams:
    """The parameters of a recipe's requests; how the model is spoken to stands in its price table."""
    return JudgeParams(
        settings.model, settings.max_reply_tok, settings.max_judged_chars,
        price.thinking if price else "", price.effort if price else "", reverse,
    )  # fmt: skip


def requests_of(rubric: Rubric, params: JudgeParams, samples: Sequence[Sample]) -> list[JudgeRequest]:
    """The requests that judge a stage's completions, in their order."""
    return [build_request(rubric, params, JudgeItem(one.prompt, one.completion, one.sample)) for one in samples]


def look_up(ledger: JudgeLedger, requests: Sequence[JudgeRequest]) -> tuple[dict[str, Judgement], dict[str, int]]:
    """What the ledger knows of requests: finished judgements, and the number of unreadable replies of the others.

    A reply that came when nobody was waiting for it (its process had died) is read now.
    """
    known = ledger.judgements(request.key for request in requests)
    tried = ledger.tried(request.key for request in requests if request.key not in known)
    unread: dict[str, int] = {}
    for request in requests:
        if request.key not in tried:
            continue
        for reply in ledger.replies(request.key):
            if reply.fault is not None or request.key in known:
                continue
            reply, final = concluded(request, reply, ledger.history(request.key).n_unread)
            if reply.fault is not None:
                ledger.set_fault(request.key, reply.fault)
            if final is not None:
                ledger.finish([final])
                known[request.key] = final
        unread[request.key] = ledger.history(request.key).n_unread
    return known, unread
