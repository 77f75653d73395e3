"""Checks that run before any GPU work and tell whether the recipe's judge can be asked: key, budget, model, price, network.

`check_judge` raises on the first problem and is what a run calls. `JudgePreflight` does the same check in a thread
within one second and returns the problem as text; `plan` shows it. Nothing here costs money.
"""

from __future__ import annotations

import asyncio
import datetime
import http.client
import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from fastconv.errors import FastconvError, JudgeError, RecipeError
from fastconv.judge.budget import PAID, JudgeIdentity, Price, PriceTable, recipe_prices
from fastconv.judge.claude import (
    CLAUDE_KEY,
    CLAUDE_URL,
    LOCAL_KEY,
    ApiKey,
    Outage,
    api_error,
    make_client,
    status_error,
)
from fastconv.judge.local import CompleteMany, concurrent_complete, endpoint_complete
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store

#: Value of the `anthropic-version` header, as the SDK sends it.
API_VERSION = "2023-06-01"
#: Seconds that a judge has to answer a preflight request, and the least that `JudgePreflight.problem` waits for it.
PREFLIGHT_S, MIN_WAIT_S = 1.0, 0.1


@dataclass(frozen=True)
class PaidAccess:
    """What is needed to ask a paid judge. `batch_factor` multiplies the price of requests sent as a batch."""

    price: Price
    batch_factor: float
    key: ApiKey


@dataclass(frozen=True)
class JudgeAccess:
    """A judge that passed `check_judge`. Both fields are None when there is no judge or the resident base judges."""

    paid: PaidAccess | None = None
    endpoint: CompleteMany | None = None


def check_judge(judge: JudgeIdentity | None, store: Store | None = None) -> JudgeAccess:
    """Check that a judge can be asked and return the access to it. `store` holds what was spent already.

    Raises RecipeError (no price, model past its end date, no budget) or JudgeError (no key, refused key, unknown model,
    no network, budget spent), each with a one-line message. The resident base is not checked.
    """
    if judge is None or judge.family == "resident":
        return JudgeAccess()
    settings = judge.settings
    if judge.family == "endpoint":
        key = local_key(os.environ)
        check_endpoint(settings, key)
        return JudgeAccess(endpoint=concurrent_complete(endpoint_complete(settings, key), settings.concurrency))
    access = check_paid_judge(settings, store)
    check_reachable(settings, access)
    return JudgeAccess(paid=access)


def check_paid_judge(settings: JudgeSettings, store: Store | None) -> PaidAccess:
    """Check all that is known of a paid judge without a network. Raises RecipeError or JudgeError as `check_judge` does."""
    access = check_settings(settings, recipe_prices(settings), os.environ)
    assert access is not None, "a paid judge has a price and a key"
    if store is not None:
        money = JudgeLedger(store, settings.budget_usd).money()
        if money.left_usd is not None and money.left_usd <= 0:
            raise JudgeError(
                f"judge.budget_usd = {settings.budget_usd:g} is spent (${money.spent_usd:.2f}, and ${money.lost_usd:.2f} "
                "for replies that never arrived)",
                where=str(store.root),
                fix="raise judge.budget_usd, the most that judging in this workspace may ever cost",
            )
    return access


def check_settings(
    settings: JudgeSettings, prices: PriceTable, environ: Mapping[str, str], today: datetime.date | None = None
) -> PaidAccess | None:
    """Check the recipe's judge settings without a network; returns None for a judge that costs nothing.

    `today` is the UTC date by default. Raises RecipeError for a model without a price or past its end date, or if no
    budget is set; JudgeError without an API key.
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
    return PaidAccess(price, prices.batch_factor, ApiKey.from_environment(environ, CLAUDE_KEY))


def check_reachable(settings: JudgeSettings, access: PaidAccess, within_s: float | None = None) -> None:
    """Request the model's entry from the API, which costs nothing.

    With `within_s` (seconds) the request is sent once, and without the SDK because importing it is slow. Raises JudgeError for a refused key, an unknown model, or a judge that cannot be reached.
    """
    try:
        if within_s is None:
            asyncio.run(_retrieve_model(settings, access.key))
        else:
            _retrieve_model_within(settings, access.key, within_s)
    except Outage as outage:
        raise JudgeError(
            str(outage), where="judge", fix="check the network and judge.base_url, or take judge.mode = substring"
        ) from None


def check_endpoint(settings: JudgeSettings, key: ApiKey | None, within_s: float = 30.0) -> None:
    """Request the model list of an OpenAI-compatible server, which costs nothing. `within_s` is the timeout in seconds.

    Raises JudgeError for a refused key, an unknown model, or a server that cannot be reached. A server that offers no
    model list passes.
    """
    url = f"{settings.base_url.rstrip('/')}/models"
    headers = {"authorization": f"Bearer {key.reveal()}"} if key is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=within_s) as response:
            listed = json.loads(response.read())
        listed = listed if key is None else key.scrub_json(listed)
        models = [str(entry["id"]) for entry in listed["data"]]
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
    """The API key of a local endpoint from the environment, or None if it is not set."""
    return ApiKey.from_environment(environ, LOCAL_KEY) if environ.get(LOCAL_KEY) else None


async def _retrieve_model(settings: JudgeSettings, key: ApiKey) -> None:
    from anthropic import APIError

    client = make_client(settings, key).with_options(max_retries=1)
    try:
        await client.models.retrieve(settings.model)
    except APIError as error:
        raise api_error(error, settings, key) from None
    finally:
        await client.close()


def _retrieve_model_within(settings: JudgeSettings, key: ApiKey, within_s: float) -> None:
    where = settings.base_url or CLAUDE_URL
    url = f"{where.rstrip('/')}/v1/models/{urllib.parse.quote(settings.model, safe='')}"
    try:
        request = urllib.request.Request(url, headers={"x-api-key": key.reveal(), "anthropic-version": API_VERSION})
        with urllib.request.urlopen(request, timeout=within_s) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise status_error(error.code, _json_of(error), settings, key) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        if isinstance(why, ssl.SSLCertVerificationError):
            return  # the SDK ships its own certificates, so a failure with the system's proves nothing
        if isinstance(why, TimeoutError):
            raise Outage(f"no answer within {within_s:g} s from {where}") from None
        raise Outage(f"{where} cannot be reached") from None


def _json_of(error: urllib.error.HTTPError) -> object:
    try:
        return json.loads(error.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None


class JudgePreflight:
    """Checks a judge in a daemon thread that starts on creation; `problem` returns the error line that `run` would raise.

    No request is sent if the settings or the environment already show a problem, or if the resident base judges.
    """

    def __init__(self, settings: JudgeSettings, store: Store | None) -> None:
        self._settings = settings
        self._deadline_s = time.monotonic() + PREFLIGHT_S
        self._thread: threading.Thread | None = None
        self._problem = ""
        paid = settings.mode in PAID
        if not paid and not (settings.mode == "local" and settings.base_url):
            return
        try:
            access = check_paid_judge(settings, store) if paid else None
        except FastconvError as error:
            self._problem = str(error)
            return
        where = settings.base_url or CLAUDE_URL
        timeout_text = f"no answer within {PREFLIGHT_S:g} s from {where}"
        self._problem = str(JudgeError(timeout_text, where="judge", fix="check the network and judge.base_url"))
        # A daemon thread: a DNS lookup cannot be interrupted and must not delay the end of the process.
        self._thread = threading.Thread(target=self._check, args=(access,), name="judge-preflight", daemon=True)
        self._thread.start()

    def problem(self) -> str:
        """Wait for the check and return one line on why the judge cannot be asked; empty if it can, or need not be."""
        if self._thread is not None:
            self._thread.join(max(MIN_WAIT_S, self._deadline_s - time.monotonic()))
        return self._problem

    def _check(self, access: PaidAccess | None) -> None:
        try:
            if access is not None:
                check_reachable(self._settings, access, PREFLIGHT_S)
            else:
                check_endpoint(self._settings, local_key(os.environ), PREFLIGHT_S)
        except FastconvError as error:
            self._problem = str(error)
        else:
            self._problem = ""
