"""What can be known of a judge before any GPU work: key, budget, model, price, network. One clear line each."""

from __future__ import annotations

import asyncio
import datetime
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from fastconv.errors import JudgeError, RecipeError
from fastconv.judge.budget import Price, PriceTable
from fastconv.judge.claude import (
    CLAUDE_KEY,
    CLAUDE_URL,
    LOCAL_KEY,
    ApiKey,
    Outage,
    explained,
    explained_status,
    make_client,
)
from fastconv.judge.identity import PAID
from fastconv.recipe import JudgeSettings

#: The API's version, as the SDK sends it.
API_VERSION = "2023-06-01"


@dataclass(frozen=True)
class JudgeAccess:
    """What a paid judge is asked with."""

    price: Price
    batch_factor: float
    key: ApiKey


def check_settings(
    settings: JudgeSettings, prices: PriceTable, environ: Mapping[str, str], today: datetime.date | None = None
) -> JudgeAccess | None:
    """Check a recipe's judge without a network; None for a judge that costs nothing.

    Raises RecipeError for a model without a price or past its end, or without a budget; JudgeError without a key.
    """
    if settings.mode not in PAID:
        return None
    price = prices.price(settings.model, today)
    if settings.budget_usd is None:
        raise RecipeError(
            f"judge.mode {settings.mode} spends money and no budget is set",
            where="judge.budget_usd",
            fix="set judge.budget_usd, the most that judging in this workspace may ever cost",
        )
    return JudgeAccess(price, prices.batch_factor, ApiKey.from_environment(environ, CLAUDE_KEY))


def check_reachable(settings: JudgeSettings, access: JudgeAccess, within_s: float | None = None) -> None:
    """Ask for the model's card, which costs nothing; `within_s` asks once and without the SDK, which is slow to import.

    Raises JudgeError for a refused key, an unknown model, or a judge that cannot be reached.
    """
    try:
        if within_s is None:
            asyncio.run(_ask_for_card(settings, access.key))
        else:
            _ask_at_once(settings, access.key, within_s)
    except Outage as outage:
        raise JudgeError(
            str(outage), where="judge", fix="check the network and judge.base_url, or take judge.mode = substring"
        ) from None


def check_endpoint(settings: JudgeSettings, key: ApiKey | None, within_s: float = 30.0) -> None:
    """Ask an OpenAI-compatible server for its models, which costs nothing.

    Raises JudgeError for a refused key, an unknown model, or a server that cannot be reached. A server without such a
    list passes.
    """
    url = f"{settings.base_url.rstrip('/')}/models"
    headers = {"authorization": f"Bearer {key.reveal()}"} if key is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=within_s) as response:
            listed = json.loads(response.read())
        listed = listed if key is None else key.cleaned(listed)
        models = [str(one["id"]) for one in listed["data"]]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise JudgeError("the local judge refused the key", where=url, fix=f"check {LOCAL_KEY}") from None
        return
    except OSError as error:
        why = getattr(error, "reason", error)
        raise JudgeError(
            f"the local judge cannot be reached: {why}", where=url, fix="start the server, or check judge.base_url"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if settings.model not in models:
        raise JudgeError(
            f"the local judge does not know model {settings.model!r}",
            where=url,
            fix=f"use one of {', '.join(models[:5]) or 'its models'}",
        )


def local_key(environ: Mapping[str, str]) -> ApiKey | None:
    """The key of a local endpoint, if it wants one."""
    return ApiKey.from_environment(environ, LOCAL_KEY) if environ.get(LOCAL_KEY) else None


async def _ask_for_card(settings: JudgeSettings, key: ApiKey) -> None:
    from anthropic import APIError

    client = make_client(settings, key).with_options(max_retries=1)
    try:
        await client.models.retrieve(settings.model)
    except APIError as error:
        raise explained(error, settings, key) from None
    finally:
        await client.close()


def _ask_at_once(settings: JudgeSettings, key: ApiKey, within_s: float) -> None:
    where = settings.base_url or CLAUDE_URL
    url = f"{where.rstrip('/')}/v1/models/{urllib.parse.quote(settings.model, safe='')}"
    try:
        ask = urllib.request.Request(url, headers={"x-api-key": key.reveal(), "anthropic-version": API_VERSION})
        with urllib.request.urlopen(ask, timeout=within_s) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise explained_status(error.code, _json_of(error), settings, key) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        if isinstance(why, ssl.SSLCertVerificationError):
            return  # the SDK brings certificates of its own, so that these fail says nothing
        if isinstance(why, TimeoutError):
            raise Outage(f"no answer within {within_s:g} s from {where}") from None
        raise Outage(f"{where} cannot be reached") from None


def _json_of(error: urllib.error.HTTPError) -> object:
    try:
        return json.loads(error.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
