"""Who judges and what it costs: the identity that a judgement depends on, a dated price table, the worst case of a request
before it is sent, and the bill afterwards. Needs no key and no network."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastconv.datasets.files import assets
from fastconv.errors import DataError, RecipeError
from fastconv.judge.local import LOCAL_FORM, LocalRequest, build_local_request
from fastconv.judge.request import JudgeItem, JudgeParams, JudgeRequest, build_request
from fastconv.judge.rubric import Rubric
from fastconv.recipe import JudgeSettings, file_bytes, toml_table
from fastconv.store.ledger import Sample

#: Bytes of English text per token, for expected costs only. Upper bounds count one token per byte.
BYTES_PER_TOK = 3.5
#: A price of a million tokens: what a sending may cost at worst is booked in whole billionths.
Usd = Annotated[float, Field(gt=0, le=1e6)]
#: Typical reply to a shipped rubric: one sentence and the verdict. For expected costs only.
EXPECTED_REPLY_TOK = 80


class Price(BaseModel):
    """One model's prices in US dollars per million tokens, its end date, and the `thinking` and `effort` request parameters.

    `provider` names who is asked for it (`judge.desk.PROVIDERS`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_usd: Usd
    output_usd: Usd
    cache_write_usd: Usd
    cache_read_usd: Usd
    #: Longer prompts cost more than the table says and are refused. 0: no such limit.
    max_prompt_tok: int = 0
    ends: datetime.date | None = None
    provider: str = "claude"
    thinking: str = ""
    effort: str = ""


@dataclass(frozen=True)
class PriceTable:
    """Prices by model id. `checked` is the date of the last comparison with the published prices, `where` the file's path.

    `batch_factor` multiplies the price of requests sent as a batch.
    """

    checked: datetime.date
    batch_factor: float
    models: Mapping[str, Price]
    where: str

    def listed(self, model: str) -> Price:
        """A model's price, even past its end date. Raises RecipeError for a model without one."""
        price = self.models.get(model)
        if price is None:
            raise RecipeError(
                f"model {model!r} has no price",
                where="judge.model",
                fix=f"use one of {', '.join(self.models)}, or give judge.prices a file that lists it",
            )
        return price

    def price(self, model: str, today: datetime.date | None = None) -> Price:
        """A model's price. Raises RecipeError for a model without one, or past its end date (UTC)."""
        today = today or datetime.datetime.now(datetime.UTC).date()
        price = self.listed(model)
        if price.ends is not None and today > price.ends:
            current = [name for name, price in self.models.items() if price.ends is None or today <= price.ends]
            raise RecipeError(
                f"model {model!r} ended on {price.ends}", where="judge.model", fix=f"use one of {', '.join(current)}"
            )
        return price


@dataclass(frozen=True)
class Estimate:
    """Expected cost and upper bound of `n` judgements, in US dollars."""

    n: int
    expected_usd: float
    worst_usd: float


def load_prices(*paths: Path) -> PriceTable:
    """Read price tables (TOML); a later table replaces models of an earlier one. Raises DataError."""
    models: dict[str, Price] = {}
    checked, factor = datetime.date.min, 0.5
    for path in paths:
        try:
            table = toml_table(file_bytes(path).decode())
            models |= {name: Price.model_validate(row) for name, row in table["models"].items()}
            checked, factor = table["checked"], float(table.get("batch_factor", factor))
            if not 0 < factor <= 1:
                raise ValueError(f"batch_factor = {factor:g} is no share of the price")
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror}", where=str(path), fix="check judge.prices in the recipe"
            ) from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DataError(f"not valid TOML: {error}", where=str(path), fix="mend the syntax there") from None
        except KeyError as error:
            raise DataError(f"key {error} is missing", where=str(path), fix="see data/prices.toml") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}", where=str(path), fix="see data/prices.toml"
            ) from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"not a price table: {error}", where=str(path), fix="see data/prices.toml") from None
    return PriceTable(checked, factor, models, str(paths[-1]) if paths else "")


def worst_usd(request: JudgeRequest, price: Price, factor: float = 1.0) -> float:
    """Upper bound of one request's cost in US dollars: one token per byte, written to the cache, the reply at its limit.

    `factor` is the batch discount, if any. Raises DataError for a prompt over the price's `max_prompt_tok`.
    """
    if price.max_prompt_tok and request.max_prompt_tok > price.max_prompt_tok:
        raise DataError(
            f"a prompt may have {request.max_prompt_tok:,} tokens, the price holds up to {price.max_prompt_tok:,}",
            where=request.params.model,
            fix="lower judge.max_judged_chars",
        )
    tokens_usd = request.max_prompt_tok * max(price.input_usd, price.cache_write_usd)
    return factor * (tokens_usd + request.params.max_reply_tok * price.output_usd) / 1e6


def cost_usd(usage: Mapping[str, Any], price: Price, factor: float = 1.0) -> float:
    """Cost of a reply in US dollars, from the API's `usage` counts (tokens). `factor` is the batch discount, if any."""

    def n_tok(name: str) -> int:
        return int(usage.get(name) or 0)

    total = n_tok("input_tokens") * price.input_usd
    total += n_tok("cache_creation_input_tokens") * price.cache_write_usd
    total += n_tok("cache_read_input_tokens") * price.cache_read_usd
    total += n_tok("output_tokens") * price.output_usd
    return factor * total / 1e6


def estimate(requests: Sequence[JudgeRequest], n: int, price: Price, factor: float = 1.0) -> Estimate:
    """Cost of `n` judgements whose requests are like the given ones; used by `plan` before anything is sampled."""
    if not requests or n <= 0:
        return Estimate(max(n, 0), 0.0, 0.0)
    n_bytes = sum(request.max_prompt_tok - 1000 for request in requests) / len(requests)
    prompt_usd = n_bytes / BYTES_PER_TOK * price.input_usd
    each_usd = factor * (prompt_usd + EXPECTED_REPLY_TOK * price.output_usd) / 1e6
    worst = max(worst_usd(request, price, factor) for request in requests)
    return Estimate(n, n * each_usd, n * worst)


def recipe_prices(settings: JudgeSettings) -> PriceTable:
    """The shipped price table, with the entries of `judge.prices` replacing its own. Raises DataError."""
    own = [Path(settings.prices)] if settings.prices else []
    return load_prices(assets("data") / "prices.toml", *own)


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

    def requests(
        self, rubric: Rubric, samples: Sequence[Sample], *, reverse: bool = False
    ) -> Sequence[JudgeRequest | LocalRequest]:
        """One request per sample, in their order; `reverse` shows the rubric's options in reverse order."""
        if self.family == "paid":
            return build_requests(rubric, judge_params(self.settings, self.price, reverse=reverse), samples)
        max_chars = self.settings.max_judged_chars
        items = [JudgeItem(sample.prompt, sample.completion, sample.sample) for sample in samples]
        return [build_local_request(rubric, self.name, item, max_chars, reverse=reverse) for item in items]


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
