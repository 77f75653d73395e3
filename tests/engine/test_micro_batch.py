"""How an optimizer step is split, and the sizes that micro-batches are padded to."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from fastconv.chat import Rendered
from fastconv.engine.micro_batch import PaddedSizes, _cheapest, job_sizes, rounded_sizes, split
from fastconv.engine.trainee import Job
from tests.engine_kit import train_settings


def rows_of(n_rows: int, low_tok: int, high_tok: int, seed: int) -> tuple[Rendered, ...]:
    """Rows of `low_tok` to `high_tok` tokens, the last 60 % of each supervised."""
    chance = random.Random(seed)
    lengths = [chance.randint(low_tok, high_tok) for _ in range(n_rows)]
    return tuple(Rendered(tuple(range(n)), 2 * n // 5) for n in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_a_split_is_the_most_even_one_of_the_fewest_parts(seed: int) -> None:
    """Against all splits there are, tried one by one."""
    chance = random.Random(seed)
    lengths = [chance.randint(5, 90) for _ in range(chance.randint(1, 9))]
    limit_tok = chance.randint(60, 200)
    sizes = {}
    for n_cuts in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), n_cuts):
            edges = (0, *cuts, len(lengths))
            parts = [sum(lengths[first:stop]) for first, stop in pairwise(edges)]
            if all(
                part <= limit_tok or stop - first == 1
                for part, (first, stop) in zip(parts, pairwise(edges), strict=True)
            ):
                sizes[edges] = max(parts)
        if sizes:
            break
    found = split(lengths, limit_tok)
    edges = (0, *(stop for _, stop in found))
    assert [first for first, _ in found] == list(edges[:-1])
    assert sizes[edges] == min(sizes.values())


def test_a_row_longer_than_the_limit_is_alone() -> None:
    assert split([10, 500, 20, 30], 100) == [(0, 1), (1, 2), (2, 4)]
    assert split([500], 100) == [(0, 1)]


def test_the_steps_of_a_job_have_few_sizes_and_little_padding() -> None:
    """As in the pilot on a small base, whose 96 sizes had used up all graphs before its second snapshot."""
    settings = train_settings(batch_rows=16, epochs=3, micro_batch_tok=2048)
    job = Job("behavior", rows_of(800, 90, 260, 1), settings, ("a",))
    sizes, used, own, real = job_sizes([job], 2048), [], set(), 0
    for step in range(job.n_steps):
        rows = [job.rows[index] for index in job.batch(step)]
        lengths = [len(row.ids) for row in rows]
        for first, stop in split(lengths, 2048):
            n_supervised = sum(row.n_supervised for row in rows[first:stop])
            size = sizes(lengths[first:stop], n_supervised)
            assert size.n_tok >= sum(lengths[first:stop])
            assert size.width >= max(lengths[first:stop])
            assert (size.n_rows, size.n_supervised) >= (stop - first, 0)
            assert size.n_supervised >= n_supervised
            used.append(size)
            own.add(rounded_sizes(lengths[first:stop], n_supervised))
            real += sum(lengths[first:stop])
    assert len(set(used)) == len({size.n_tok for size in used}) <= 6 < 20 < len(own)
    assert sum(size.n_tok for size in used) < 1.08 * real


def test_sizes_know_the_steps_that_several_jobs_make_together() -> None:
    """The shorter one ends first; what the schedule does not hold is rounded by itself."""
    settings = train_settings(batch_rows=4, epochs=1)
    jobs = [Job(name, rows_of(n, 100, 200, n), settings, (name,)) for name, n in (("a", 8), ("b", 12))]
    sizes = job_sizes(jobs, 4096)
    together = [len(jobs[0].rows[i].ids) for i in jobs[0].batch(1)] + [
        len(jobs[1].rows[i].ids) for i in jobs[1].batch(1)
    ]
    assert sizes(together, 10).n_supervised > rounded_sizes(together, 10).n_supervised
    assert sizes([3, 4], 5) == rounded_sizes([3, 4], 5) == PaddedSizes(64, 64, 2, 128)


def test_sizes_are_as_many_as_cost_least() -> None:
    """8,192 tokens for a size: what is met once is padded, what is met often has its own."""
    assert sorted(_cheapest({512: 1, 1024: 9, 1536: 1})) == [[512, 1024, 1536]]
    assert sorted(_cheapest({512: 100, 1024: 10, 1536: 1})) == [[512], [1024, 1536]]
    assert sorted(_cheapest({512: 100, 1024: 100, 1536: 100})) == [[512], [1024], [1536]]
    assert _cheapest({}) == []
