"""The process of one part: `python -m tests.card.part JOB`, where JOB is a `Job` as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from tests.card.sheet import Job, Sheet

#: Every part, and where its function is; imported when the part begins, since some import torch.
PARTS = {
    "pilot": "grid", "ungated": "grid", "killed": "grid", "engine": "grid", "four_bit": "grid", "seven": "seven",
    "vllm": "vllm", "drawing": "drawing", "steps": "drawing", "attention": "speed", "bench": "speed", "ray": "grid",
    "gpu_tests": "speed",
}  # fmt: skip


def function_of(part: str) -> Callable[[Job, Sheet], None]:
    """The function of a part."""
    return getattr(import_module(f"tests.card.{PARTS[part]}"), part)


def main(text: str) -> None:
    """Run the part."""
    job = Job.from_json(text)
    function_of(job.part)(job, Sheet(job.out / f"{job.part}.json"))


if __name__ == "__main__":
    main(sys.argv[1])
