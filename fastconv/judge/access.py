"""What can be known of a judge before any GPU work: key, budget, model, price, network. One clear line each."""

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
from fastconv.judge.budget import Price, PriceTable, prices_of
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
from fastconv.judge.identity import PAID, JudgeIdentity
from fastconv.judge.local import Ask, at_once, endpoint_complete
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store

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


#: How long a judge has to answer since it was asked, and the least that is waited once the plan is made.
GLANCE_S, LEAST_S = 1.0, 0.1


class JudgePreflight:
    """Asks on creation, in a thread that nobody waits for at the end; `problem` is the line that `run` would stop with.

    Nothing is sent where the recipe or the environment tells already, or where the base itself judges.
    """

    def __init__(self, settings: JudgeSettings, store: Store | None) -> None:
        self._settings = settings
        self._until_s = time.monotonic() + GLANCE_S
        self._thread: threading.Thread | None = None
        self._problem = ""
        paid = settings.mode in PAID
        if not paid and not (settings.mode == "local" and settings.base_url):
            return
        try:
            access = admitted(settings, store) if paid else None
        except FastconvError as error:
            self._problem = str(error)
            return
        where = settings.base_url or CLAUDE_URL
        late = f"no answer within {GLANCE_S:g} s from {where}"
        self._problem = str(JudgeError(late, where="judge", fix="check the network and judge.base_url"))
        # A daemon: looking a name up cannot be cut short, and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._ask, args=(access,), name="judge-glance", daemon=True)
        self._thread.start()

    def problem(self) -> str:
        """Why the judge cannot be asked now, in one line; empty if it can be, or need not be."""
        if self._thread is not None:
            self._thread.join(max(LEAST_S, self._until_s - time.monotonic()))
        return self._problem

    def _ask(self, access: JudgeAccess | None) -> None:
        try:
            if access is not None:
                check_reachable(self._settings, access, GLANCE_S)
            else:
                check_endpoint(self._settings, local_key(os.environ), GLANCE_S)
        except FastconvError as error:
            self._problem = str(error)
        else:
            self._problem = ""


@dataclass(frozen=True)
class Access:
    """A judge that was found ready: what a paid one is asked with, or the way to ask an endpoint."""

    paid: JudgeAccess | None = None
    endpoint: Ask | None = None


def check_judge(judge: JudgeIdentity | None, store: Store | None = None) -> Access:
    """Find out before any GPU work whether a judge can be asked; costs nothing. `store` tells what is spent already.

    Raises RecipeError (no price, past its end, no budget) or JudgeError (no key, refused key, unknown model, no
    network, budget spent), one clear line each. The resident base needs no asking.
    """
    if judge is None or judge.family == "resident":
        return Access()
    settings = judge.settings
    if judge.family == "endpoint":
        key = local_key(os.environ)
        check_endpoint(settings, key)
        return Access(endpoint=at_once(endpoint_complete(settings, key), settings.concurrency))
    access = admitted(settings, store)
    check_reachable(settings, access)
    return Access(paid=access)


def admitted(settings: JudgeSettings, store: Store | None) -> JudgeAccess:
    """What a paid judge is asked with; raises as `check_judge` does for all that is known without a network."""
    access = check_settings(settings, prices_of(settings), os.environ)
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
