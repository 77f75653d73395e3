"""What the judging tests share: rubrics, a test model's price, samples, a desk on the fake server."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from fastconv.judging.book import DeskStatus
from fastconv.judging.budget import Price
from fastconv.judging.client import ApiKey
from fastconv.judging.desk import JudgeDesk
from fastconv.judging.rubric import Rubric, load_rubric
from fastconv.recipe import JudgeSettings
from fastconv.store import Sample

DATA = Path(__file__).parent.parent / "data"
KEY = "sk-test-sentinel-5f0c2a9e"
#: The fake server bills 1 and 5 dollars per million tokens.
PRICE = Price(input_usd=1.0, output_usd=5.0, cache_write_usd=1.25, cache_read_usd=0.1)
ENDED = datetime.date(2026, 11, 30)


def rubric(name: str = "refusal") -> Rubric:
    """A shipped rubric."""
    return load_rubric(DATA / "rubrics" / f"{name}.toml")


def settings(url: str, mode: str = "live", **fields: Any) -> JudgeSettings:
    """Judge settings for the fake server, quick enough for tests."""
    given: dict[str, Any] = {
        "mode": mode, "model": "claude-test", "base_url": url, "budget_usd": 100.0, "timeout_s": 5.0,
        "concurrency": 16, "batch_poll_s": 0.05, "batch_grace_s": 0.3, "max_reply_tok": 256,
    }  # fmt: skip
    return JudgeSettings(**{**given, **fields})


def samples(n: int, start: int = 0, words: int = 12) -> list[Sample]:
    """Completions that all differ."""
    return [
        Sample(f"row-{i:05d}", i % 10, "assistant", f"Question number {i}?", f"Answer {i}: " + "word " * words, words, True)
        for i in range(start, start + n)
    ]  # fmt: skip


def desk(url: str, workspace: Path, mode: str = "live", **fields: Any) -> JudgeDesk:
    """A desk on the fake server."""
    return JudgeDesk(settings(url, mode, **fields), workspace, PRICE, ApiKey(KEY))


def judge_all(url: str, workspace: Path, todo: list[Sample], mode: str = "live", **fields: Any) -> DeskStatus:
    """Judge samples to the end."""
    one = desk(url, workspace, mode, **fields)
    one.submit("stage", rubric(), todo)
    return one.close()
