"""Money: a dated price for every model, and a cap that holds in both transports and over processes."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

from fastconv.errors import DataError, JudgeError, RecipeError
from fastconv.judge.access import check_settings
from fastconv.judge.budget import Price, build_requests, cost_usd, estimate, judge_params, load_prices, worst_usd
from fastconv.judge.claude import ApiKey
from fastconv.judge.desk import JudgeDesk
from fastconv.recipe import JudgeSettings, parse_recipe
from fastconv.store.judge_ledger import JudgeLedger
from fastconv.store.ledger import Store
from tests.fake_claude import Script, fake_claude
from tests.judging_kit import DATA, KEY, PRICE, rubric, samples, settings

TODAY = datetime.date(2026, 11, 23)
#: Twenty times what the fake server bills, so that a dollar is soon spent.
DEAR = Price(input_usd=20.0, output_usd=100.0, cache_write_usd=25.0, cache_read_usd=2.0)


def paid(model: str = "claude-haiku-5-5", budget_usd: float | None = 5.0) -> JudgeSettings:
    return JudgeSettings(mode="live", model=model, budget_usd=budget_usd)


def test_every_shipped_price_is_whole_and_dated() -> None:
    table = load_prices(DATA / "prices.toml")
    assert table.checked <= datetime.date.today()
    assert {"claude-haiku-5-5", "claude-sonnet-5-5", "claude-sonnet-4-5"} <= set(table.models)
    assert all(price.cache_read_usd < price.input_usd < price.output_usd for price in table.models.values())


def test_a_model_without_a_price_or_past_its_end_is_refused() -> None:
    table = load_prices(DATA / "prices.toml")
    with pytest.raises(RecipeError, match="no price"):
        table.price("claude-unknown", TODAY)
    assert table.price("claude-sonnet-4-5", datetime.date(2026, 11, 30)).output_usd == 15.0
    with pytest.raises(RecipeError, match="ended on 2026-11-30"):
        table.price("claude-sonnet-4-5", datetime.date(2026, 12, 1))


def test_a_users_table_stands_over_the_shipped_one(tmp_path: Path) -> None:
    row = "input_usd = 9.0\noutput_usd = 10.0\ncache_write_usd = 9.5\ncache_read_usd = 1.0\n"
    (tmp_path / "mine.toml").write_text(f"checked = 2026-11-01\n[models.claude-haiku-5-5]\n{row}")
    table = load_prices(DATA / "prices.toml", tmp_path / "mine.toml")
    assert table.price("claude-haiku-5-5", TODAY).input_usd == 9.0
    assert "claude-sonnet-5-5" in table.models
    (tmp_path / "mine.toml").write_text("checked = 2026-11-01\n[models.x]\ninput_usd = 0\n")
    with pytest.raises(DataError, match="input_usd"):
        load_prices(tmp_path / "mine.toml")


def test_what_is_missing_is_said_before_anything_runs() -> None:
    table = load_prices(DATA / "prices.toml")
    environ = {"ANTHROPIC_API_KEY": KEY}
    assert check_settings(JudgeSettings(), table, {}) is None
    assert check_settings(paid(), table, environ, TODAY) is not None
    with pytest.raises(RecipeError, match="no budget"):
        check_settings(paid(budget_usd=None), table, environ, TODAY)
    with pytest.raises(JudgeError, match="no API key"):
        check_settings(paid(), table, {}, TODAY)
    with pytest.raises(RecipeError, match=r"needs judge\.model"):
        parse_recipe({"name": "x", "judge": {"mode": "live"}})


def test_costs_are_what_the_price_list_says() -> None:
    usage = {"input_tokens": 1_000_000, "output_tokens": 100_000, "cache_read_input_tokens": 1_000_000}
    assert cost_usd(usage, PRICE) == pytest.approx(1.0 + 0.5 + 0.1)
    assert cost_usd(usage, PRICE, 0.5) == pytest.approx(0.8)


def test_no_request_costs_more_than_its_worst_case() -> None:
    request = build_requests(rubric(), judge_params(settings("x"), PRICE), samples(1))[0]
    usage = {"cache_creation_input_tokens": request.max_prompt_tok, "output_tokens": request.params.max_reply_tok}
    assert cost_usd(usage, PRICE) <= worst_usd(request, PRICE)


def test_a_prompt_beyond_its_price_is_refused() -> None:
    request = build_requests(rubric(), judge_params(settings("x"), PRICE), samples(1))[0]
    with pytest.raises(DataError, match="the price holds up to 100"):
        worst_usd(request, PRICE.model_copy(update={"max_prompt_tok": 100}))


def test_an_estimate_lies_below_its_upper_bound_and_a_batch_costs_half() -> None:
    requests = build_requests(rubric(), judge_params(settings("x"), PRICE), samples(1))
    live, batch = (estimate(requests, 1000, PRICE, factor) for factor in (1.0, 0.5))
    assert 0 < live.expected_usd < live.worst_usd
    assert batch.expected_usd == pytest.approx(live.expected_usd / 2)


def spend(url: str, workspace: Path, mode: str, n: int, start: int = 0) -> JudgeDesk:
    judge_desk = JudgeDesk(settings(url, mode, budget_usd=1.0, concurrency=8), workspace, DEAR, ApiKey(KEY))
    judge_desk.submit("stage", rubric(), samples(n, start=start))
    return judge_desk


def capped(workspace: Path, mode: str, n: int) -> None:
    with fake_claude(own_process=True) as server:
        status = spend(server.url, workspace, mode, n).close()
        billed_usd = 20 * server.bill()["usd"]
        assert 0.6 < billed_usd <= 1.0
        assert status.n_pending > n / 2
        assert "judge.budget_usd" in status.problem
        money = status.money
        assert money.spent_usd + money.reserved_usd + money.lost_usd <= 1.0
        n_calls = server.bill()["n_calls"]
        again = spend(server.url, workspace, mode, 50, start=n).close()  # a resumed process has no budget of its own
        assert again.n_scored <= 20
        assert 20 * server.bill()["usd"] <= 1.0
        assert server.bill()["n_calls"] - n_calls <= 30


@pytest.mark.parametrize("mode", ["live", "batch"])
def test_spending_stops_under_the_cap(tmp_path: Path, mode: str) -> None:
    capped(tmp_path, mode, 500)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["live", "batch"])
def test_spending_stops_under_the_cap_with_ten_thousand_to_go(tmp_path: Path, mode: str) -> None:
    capped(tmp_path, mode, 10_000)


@pytest.mark.parametrize("modes", [("live", "live"), ("batch", "batch"), ("live", "batch")], ids="+".join)
def test_two_processes_cannot_exceed_the_cap_together(tmp_path: Path, modes: tuple[str, str]) -> None:
    Store.open(tmp_path).close()
    with fake_claude(own_process=True) as server:
        children = []
        for number, mode in enumerate(modes):
            child = os.fork()
            if child == 0:
                spend(server.url, tmp_path, mode, 200, start=1000 * number).close()
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        assert 0.6 < 20 * server.bill()["usd"] <= 1.0
        money = JudgeLedger(Store.open(tmp_path)).money()
        assert money.spent_usd == pytest.approx(20 * server.bill()["usd"], abs=1e-6)


def test_two_processes_on_the_same_samples_pay_each_once(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with fake_claude(Script(latency_s=0.02), own_process=True) as server:
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                judge_desk = JudgeDesk(settings(server.url), tmp_path, PRICE, ApiKey(KEY))
                judge_desk.submit("stage", rubric(), samples(60))
                status = judge_desk.close()
                os._exit(0 if status.n_scored == 60 else 1)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        bill = server.bill()
        assert max(bill["billed"].values()) == 1
        assert len(bill["billed"]) == 60
