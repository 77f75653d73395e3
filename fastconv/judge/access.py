"""Checks that run before any GPU work and tell whether the recipe's judge can be asked: key, budget, model, price, network.

`check_judge` raises on the first problem and is what a run calls; `open_desk` opens the desk of a judge that passed.
`JudgePreflight` does the same check in a thread
within one second and returns the problem as text; `plan` shows it. Nothing here costs money.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastconv.errors import FastconvError, JudgeError, RecipeError
from fastconv.judge.budget import PAID, JudgeIdentity, Price, PriceTable, recipe_prices
from fastconv.judge.desk import PROVIDERS, JudgeDesk
from fastconv.judge.http import CLAUDE_URL, LOCAL_KEY, ApiKey, Outage, ask, judge_url, safe_name, sync_client
from fastconv.judge.local import Complete, CompleteMany, EndpointJudge, ResidentJudge, endpoint_complete
from fastconv.recipe import JudgeSettings
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store

#: Seconds that a judge has to answer before a run begins.
CHECK_S = 30.0
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
    endpoint: Complete | None = None


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
        return JudgeAccess(endpoint=endpoint_complete(settings, key))
    access = check_paid_judge(settings, store)
    check_reachable(settings, access)
    return JudgeAccess(paid=access)


def open_desk(
    judge: JudgeIdentity, access: JudgeAccess, workspace: Path, resident: Callable[[], CompleteMany], *, reverse: bool = False
) -> JudgeDesk:  # fmt: skip
    """Open the desk of a judge that passed `check_judge`; `resident` gives the base's answers where it judges itself.

    `reverse` shows the rubric's options in reverse order.
    """
    settings, paid = judge.settings, access.paid
    if paid is not None:
        factor = paid.batch_factor
        return JudgeDesk(settings, workspace, paid.price, paid.key, batch_factor=factor, reverse=reverse)
    if access.endpoint is not None:
        provider = EndpointJudge(access.endpoint, settings.concurrency)
    else:
        provider = ResidentJudge(resident())
    return JudgeDesk(settings, workspace, reverse=reverse, judge=judge, provider=provider)


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
    budget is set; JudgeError without an API key, or for a host that gets none.
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
    provider = PROVIDERS[price.provider]
    key = ApiKey.from_environment(environ, provider.key_name)
    judge_url(settings.base_url, has_key=True, environ=environ, own=provider.url)
    return PaidAccess(price, prices.batch_factor, key)


def check_reachable(settings: JudgeSettings, access: PaidAccess, within_s: float = CHECK_S) -> None:
    """Ask a paid judge for what costs nothing; `within_s` is the timeout in seconds.

    Raises JudgeError for a refused key, an unknown model, or a judge that cannot be reached.
    """
    try:
        PROVIDERS[access.price.provider].check(settings, access.key, within_s)
    except Outage as outage:
        raise JudgeError(
            str(outage), where="judge", fix="check the network and judge.base_url, or take judge.mode = substring"
        ) from None


def check_endpoint(settings: JudgeSettings, key: ApiKey | None, within_s: float = CHECK_S) -> None:
    """Request the model list of an OpenAI-compatible server, which costs nothing. `within_s` is the timeout in seconds.

    Raises JudgeError for a refused key, an unknown model, or a server that cannot be reached. A server that offers no
    model list passes.
    """
    base = judge_url(settings.base_url, has_key=key is not None)
    url = f"{str(base).rstrip('/')}/models"
    headers = {"authorization": f"Bearer {key.reveal()}"} if key is not None else {}
    try:
        with sync_client(base, within_s) as client:
            status, body, _ = ask(client, "GET", url, headers, within_s=within_s, key=key)
    except Outage as outage:
        raise JudgeError(
            f"the local judge cannot be reached: {outage}", where=url, fix="start the server, or check judge.base_url"
        ) from None
    if status in (401, 403):
        raise JudgeError("the local judge refused the key", where=url, fix=f"check {LOCAL_KEY}")
    if 300 <= status < 400:
        raise JudgeError("the local judge sends to another place", where=url, fix="name that place in judge.base_url")
    listed = body.get("data") if body is not None and 200 <= status < 300 else None
    if not isinstance(listed, list):
        return
    models = [safe_name(entry.get("id")) for entry in listed if isinstance(entry, dict)]
    if settings.model not in models:
        raise JudgeError(
            f"the local judge does not know model {settings.model!r}",
            where=url,
            fix=f"use one of {', '.join(models[:5]) or 'its models'}",
        )


def local_key(environ: Mapping[str, str]) -> ApiKey | None:
    """The API key of a local endpoint from the environment, or None if it is not set."""
    return ApiKey.from_environment(environ, LOCAL_KEY) if environ.get(LOCAL_KEY) else None


class JudgePreflight:
    """Checks a judge in a daemon thread that starts on creation; `problem` returns the error line that `run` would raise.

    No request is sent if the settings or the environment already show a problem, or if the resident base judges.
    """

    def __init__(self, settings: JudgeSettings, store: Store | None) -> None:
        self._settings = settings
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
        import httpx2  # noqa: F401 (slow, so before the second begins)

        self._deadline_s = time.monotonic() + PREFLIGHT_S
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
