"""Who judges: everything about a judge that a judgement depends on. Known before anything is asked; needs no key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastconv.judge.budget import Price, PriceTable
from fastconv.judge.request import FORM, JudgeItem, JudgeParams, JudgeRequest, build_local, build_request
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings
from fastconv.store.ledger import Sample

PAID = ("auto", "live", "batch")


@dataclass(frozen=True)
class JudgeIdentity:
    """A recipe's judge. `name` is the model as it stands in a local judge's judgements; `price` is a paid one's.

    `endpoint` is an OpenAI-compatible server, `resident` the base model itself. How a judge is reached (live or batch,
    how many at once, with what budget) is no part of it.
    """

    family: Literal["paid", "endpoint", "resident"]
    name: str
    settings: JudgeSettings
    price: Price | None = None

    @property
    def weak(self) -> bool:
        """Whether it answers by one character and was not made for judging; the report says so."""
        return self.family != "paid"

    def inputs(self, rubric: Rubric) -> dict[str, Any]:
        """What a judge stage's key holds of judge and rubric."""
        params: Mapping[str, Any] = {
            "model": self.name,
            "max_judged_chars": self.settings.max_judged_chars,
            "form": FORM,
        }
        if self.family == "paid":
            params = params_of(self.settings, self.price).identity()
        return {"judge": {"family": "paid" if self.family == "paid" else "local", **params}, "rubric": rubric.sha256}

    def keys(self, rubric: Rubric, samples: Sequence[Sample]) -> list[str]:
        """The keys of the judgements of samples, in their order."""
        if self.family == "paid":
            return [one.key for one in requests_of(rubric, params_of(self.settings, self.price), samples)]
        cut = self.settings.max_judged_chars
        items = [JudgeItem(one.prompt, one.completion, one.sample) for one in samples]
        return [build_local(rubric, self.name, item, cut).key for item in items]


def judge_identity(settings: JudgeSettings, prices: PriceTable, resident: str) -> JudgeIdentity | None:
    """The judge of a recipe, or None where phrases do without one. `resident` names the base model and how it computes.

    Raises RecipeError for a paid model that has no price: it could not be asked, so nothing of it can be in a ledger.
    """
    if settings.mode == "substring":
        return None
    if settings.mode in PAID:
        return JudgeIdentity("paid", settings.model, settings, prices.listed(settings.model))
    if settings.base_url:
        return JudgeIdentity("endpoint", f"local:{settings.model}", settings)
    return JudgeIdentity("resident", f"resident:{resident}", settings)


def params_of(settings: JudgeSettings, price: Price | None, *, reverse: bool = False) -> JudgeParams:
    """The parameters of a recipe's requests; how the model is spoken to stands in its price table."""
    return JudgeParams(
        settings.model, settings.max_reply_tok, settings.max_judged_chars,
        price.thinking if price else "", price.effort if price else "", reverse,
    )  # fmt: skip


def requests_of(rubric: Rubric, params: JudgeParams, samples: Sequence[Sample]) -> list[JudgeRequest]:
    """The requests that judge a stage's completions, in their order."""
    return [build_request(rubric, params, JudgeItem(one.prompt, one.completion, one.sample)) for one in samples]
