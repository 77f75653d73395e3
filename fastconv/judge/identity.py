"""Identity of a judge: everything that a judgement depends on, known before any request and without an API key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastconv.judge.budget import Price, PriceTable
from fastconv.judge.request import LOCAL_FORM, JudgeItem, JudgeParams, JudgeRequest, build_local_request, build_request
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.ledger import Sample

#: Judge modes that cost money.
PAID = ("auto", "live", "batch")


@dataclass(frozen=True)
class JudgeIdentity:
    """A recipe's judge. `family`: `endpoint` is an OpenAI-compatible server, `resident` the base model itself.

    `name` is the model's name in judgements of a local judge; `price` is set for a paid one. How a judge is reached
    (live or batch, concurrency, budget) is not part of its identity.
    """

    family: Literal["paid", "endpoint", "resident"]
    name: str
    settings: JudgeSettings
    price: Price | None = None

    @property
    def weak(self) -> bool:
        """Whether it answers with a single character and was not made for judging; the report says so."""
        return self.family != "paid"

    def inputs(self, rubric: Rubric) -> dict[str, Any]:
        """The part of a judge stage's inputs, and so of its key, that describes judge and rubric."""
        params: Mapping[str, Any] = {
            "model": self.name,
            "max_judged_chars": self.settings.max_judged_chars,
            "form": LOCAL_FORM,
        }
        if self.family == "paid":
            params = judge_params(self.settings, self.price).identity()
        return {"judge": {"family": "paid" if self.family == "paid" else "local", **params}, "rubric": rubric.sha256}

    def keys(self, rubric: Rubric, samples: Sequence[Sample]) -> list[str]:
        """Judgement keys of samples, in their order."""
        if self.family == "paid":
            return [request.key for request in build_requests(rubric, judge_params(self.settings, self.price), samples)]
        max_chars = self.settings.max_judged_chars
        items = [JudgeItem(sample.prompt, sample.completion, sample.sample) for sample in samples]
        return [build_local_request(rubric, self.name, item, max_chars).key for item in items]


def judge_identity(settings: JudgeSettings, prices: PriceTable, resident: str) -> JudgeIdentity | None:
    """The judge of a recipe, or None if phrase rules score instead. `resident` names the base model and how it computes.

    Raises RecipeError for a paid model without a price: it cannot be asked, so no ledger holds judgements of it.
    """
    if settings.mode == "substring":
        return None
    if settings.mode in PAID:
        return JudgeIdentity("paid", settings.model, settings, prices.listed(settings.model))
    if settings.base_url:
        return JudgeIdentity("endpoint", f"local:{settings.model}", settings)
    return JudgeIdentity("resident", f"resident:{resident}", settings)


def judge_params(settings: JudgeSettings, price: Price | None, *, reverse: bool = False) -> JudgeParams:
    """Request parameters of a recipe's paid judge; `thinking` and `effort` come from its price table entry."""
    return JudgeParams(
        settings.model, settings.max_reply_tok, settings.max_judged_chars,
        price.thinking if price else "", price.effort if price else "", reverse,
    )  # fmt: skip


def build_requests(rubric: Rubric, params: JudgeParams, samples: Sequence[Sample]) -> list[JudgeRequest]:
    """One request per sample, in their order."""
    return [
        build_request(rubric, params, JudgeItem(sample.prompt, sample.completion, sample.sample)) for sample in samples
    ]
