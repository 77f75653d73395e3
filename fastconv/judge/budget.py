"""What judging costs: a dated price table, the worst case of a request before it is sent, the bill afterwards."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastconv.datasets.files import assets
from fastconv.errors import DataError, RecipeError
from fastconv.judge.request import JudgeRequest
from fastconv.recipe import JudgeSettings

#: Bytes of English text per token, for expected costs only. Worst cases take one byte for a token.
BYTES_PER_TOK = 3.5
#: What a judge writes in answer to the shipped rubrics: one sentence and the verdict. For expected costs only.
EXPECTED_REPLY_TOK = 80


class Price(BaseModel):
    """One model's prices, in US dollars per million tokens, and how it is spoken to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_usd: float = Field(gt=0)
    output_usd: float = Field(gt=0)
    cache_write_usd: float = Field(gt=0)
    cache_read_usd: float = Field(gt=0)
    #: Prompts over this many tokens cost more than the table says and are refused. 0: no such limit.
    max_prompt_tok: int = 0
    ends: datetime.date | None = None
    thinking: str = ""
    effort: str = ""


@dataclass(frozen=True)
class PriceTable:
    """Prices by model id; `checked` is when somebody last compared them with the price list."""

    checked: datetime.date
    batch_factor: float
    models: Mapping[str, Price]
    where: str

    def listed(self, model: str) -> Price:
        """A model's price, whether or not it can still be asked. Raises RecipeError for a model without one."""
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
            current = [name for name, other in self.models.items() if other.ends is None or today <= other.ends]
            raise RecipeError(
                f"model {model!r} ended on {price.ends}", where="judge.model", fix=f"use one of {', '.join(current)}"
            )
        return price


@dataclass(frozen=True)
class Estimate:
    """What a number of judgements is expected to cost, and what it cannot exceed, in US dollars."""

    n: int
    expected_usd: float
    worst_usd: float


def load_prices(*paths: Path) -> PriceTable:
    """Read price tables; a later one's models stand over an earlier one's. Raises DataError."""
    models: dict[str, Price] = {}
    checked, factor = datetime.date.min, 0.5
    for path in paths:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            models |= {name: Price.model_validate(row) for name, row in table["models"].items()}
            checked, factor = table["checked"], float(table.get("batch_factor", factor))
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
    return PriceTable(checked, factor, models, str(paths[-1]) if paths else "")


def worst_usd(request: JudgeRequest, price: Price, factor: float = 1.0) -> float:
    """What one sending of a request cannot exceed: every byte a token, written to the cache, the reply at its cap.

    `factor` is the batch discount where it applies. Raises DataError for a prompt beyond the price's limit.
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
    """What a reply costs by its usage counts (tokens)."""

    def n_tok(name: str) -> int:
        return int(usage.get(name) or 0)

    total = n_tok("input_tokens") * price.input_usd
    total += n_tok("cache_creation_input_tokens") * price.cache_write_usd
    total += n_tok("cache_read_input_tokens") * price.cache_read_usd
    total += n_tok("output_tokens") * price.output_usd
    return factor * total / 1e6


def estimate(requests: Sequence[JudgeRequest], n: int, price: Price, factor: float = 1.0) -> Estimate:
    """What `n` judgements like the given ones cost; for `plan`, before anything is sampled."""
    if not requests or n <= 0:
        return Estimate(max(n, 0), 0.0, 0.0)
    n_bytes = sum(request.max_prompt_tok - 1000 for request in requests) / len(requests)
    prompt_usd = n_bytes / BYTES_PER_TOK * price.input_usd
    each_usd = factor * (prompt_usd + EXPECTED_REPLY_TOK * price.output_usd) / 1e6
    worst = max(worst_usd(request, price, factor) for request in requests)
    return Estimate(n, n * each_usd, n * worst)


def prices_of(settings: JudgeSettings) -> PriceTable:
    """The shipped price table with the recipe's own over it. Raises DataError."""
    own = [Path(settings.prices)] if settings.prices else []
    return load_prices(assets("data") / "prices.toml", *own)
