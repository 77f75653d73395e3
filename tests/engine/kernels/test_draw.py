"""The kernel that draws tokens, in Triton's interpreter, against the nucleus by definition; see `make test-fused`."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from tests.engine.draw_reference import Nucleus, nucleus

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: make test-fused"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: make test-fused"),
]

NEAREST_TO_1 = 1 - 2**-24


def noise(vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def _peaked() -> torch.Tensor:
    return noise(5000) * 6


def _one_token() -> torch.Tensor:
    row = noise(3000)
    row[1234] = 40.0
    return row


def _few_tied() -> torch.Tensor:
    """Six equal tokens on both sides of a block's border, and one likelier than they."""
    row = torch.full((9000,), -30.0)
    row[[7, 100, 4095, 4096, 8000, 8999]] = 2.0
    row[4500] = 3.0
    return row


def _masked() -> torch.Tensor:
    """Tokens that cannot come."""
    row = noise(4500) * 2
    row[::3] = -float("inf")
    return row


def _long_tail() -> torch.Tensor:
    """A half in one token, the rest in tokens below one part in 8,192: copied aside at the second attempt."""
    row = noise(7000) * 0.3
    row[6000] = float(torch.logsumexp(row, 0))
    return row


#: Rows by what they are; of those with too many tokens the nucleus does not fit in the copy.
ROWS = {
    "random": noise(700) * 2,
    "peaked": _peaked(),
    "one token": _one_token(),
    "few tied": _few_tied(),
    "masked": _masked(),
    "long tail": _long_tail(),
    "all equal": torch.zeros(4100),
    "too many": noise(9500) * 0.1,
    "too many, equal": torch.zeros(9500),
}
TOP_P = 0.9471


def clear_nucleus(row: torch.Tensor) -> Nucleus:
    """At temperature 1 and TOP_P; no rounding decides on its last token."""
    found = nucleus(row, 1.0, TOP_P)
    assert found.margin > 2e-7, "take another row"
    return found


def _places(found: Nucleus) -> list[int]:
    """The first and the last token of a nucleus and some between."""
    last = len(found.tokens) - 1
    return sorted({0, min(1, last), last // 7, last // 3, last // 2, max(0, last - 1), last})


def drawn(row: torch.Tensor, uniforms: list[float], temperature: float = 1.0, top_p: float = TOP_P) -> list[int]:
    from fastconv.engine.kernels.draw import draw

    return draw(row.expand(len(uniforms), -1), torch.tensor(uniforms), temperature, top_p).tolist()


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the blocks in which tokens are looked for: those of the copy, or those of the row itself."""
    from fastconv.engine.kernels import draw as module

    seen: list[int] = []
    plain = module._find

    def watched(*arguments: Any) -> Any:
        seen.append(int(arguments[-1]))
        return plain(*arguments)

    monkeypatch.setattr(module, "_find", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_a_token_is_drawn_in_the_middle_of_its_part_of_the_cdf(name: str, dtype: torch.dtype) -> None:
    """No rounding decides there: the very token of the sorted nucleus, of equal ones the one in its order."""
    row = ROWS[name].to(dtype)
    found = clear_nucleus(row)
    places = _places(found)
    assert drawn(row, [found.middle(place) for place in places]) == [found.tokens[place] for place in places]


@pytest.mark.parametrize("name", ROWS)
def test_at_the_borders_of_the_cdf_a_neighbour_is_the_worst(name: str) -> None:
    """And never a token that is not in the nucleus, however near to 1 the number is."""
    row = ROWS[name].to(torch.bfloat16)
    found = clear_nucleus(row)
    borders = [found.before[place] / found.mass for place in _places(found)]
    uniforms = [0.0, 1e-7, 1e-30, NEAREST_TO_1, 1 - 2**-23, 0.999, *borders]
    given = torch.tensor(uniforms).tolist()
    tokens = drawn(row, uniforms)
    assert tokens[0] == found.tokens[0]
    assert [token for token, uniform in zip(tokens, given, strict=True) if not found.takes(token, uniform)] == []


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.3])
@pytest.mark.parametrize("top_p", [0.0301, 0.5003, 1.0])
def test_temperatures_and_nuclei_of_other_sizes(temperature: float, top_p: float) -> None:
    for row in (noise(700, seed=3) * 2, (noise(700, seed=4) * 2).to(torch.bfloat16)):
        found = nucleus(row, temperature, top_p)
        uniforms = torch.rand(8, generator=torch.Generator().manual_seed(5)).tolist()
        tokens = drawn(row, uniforms, temperature, top_p)
        assert all(found.takes(token, uniform) for token, uniform in zip(tokens, uniforms, strict=True))


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_the_copy_and_the_row_itself_give_the_same(monkeypatch: pytest.MonkeyPatch, sharpness: float) -> None:
    """With room for 16 tokens nearly no row fits; the middles of tokens of some probability are beyond rounding."""
    from fastconv.engine.kernels import draw as module

    row = (noise(6000, seed=6) * sharpness).to(torch.bfloat16)
    found = clear_nucleus(row)
    uniforms = [found.middle(place) for place in range(0, len(found.tokens), 1 + len(found.tokens) // 20)]
    copied = drawn(row, uniforms)
    monkeypatch.setattr(module, "_CAPACITY", 16)
    assert drawn(row, uniforms) == copied


@pytest.mark.parametrize("name", ROWS)
def test_only_rows_with_too_many_tokens_are_read_again_and_again(name: str, finds: list[int]) -> None:
    from fastconv.engine.kernels import draw as module

    drawn(ROWS[name], [0.5])
    assert finds == [module._BLOCK if name.startswith("too many") else module._CHUNK]


def test_as_many_equal_tokens_as_the_copy_holds() -> None:
    """Each has 1/8,192 of the probability, exactly: the first, the last and those between, without any rounding."""
    from fastconv.engine.kernels import draw as module

    row = torch.full((20_000,), -1e4)
    where = torch.randperm(20_000, generator=torch.Generator().manual_seed(7))[: module._CAPACITY].sort().values
    row[where] = 5.0
    uniforms = [0.0, 0.25, 0.5, 1 - 2**-13, NEAREST_TO_1]
    assert drawn(row, uniforms, top_p=1.0) == [int(where[int(one * module._CAPACITY)]) for one in uniforms]
    assert drawn(row, uniforms, top_p=0.5) == [int(where[int(one * module._CAPACITY / 2)]) for one in uniforms]


def test_the_likeliest_token_comes_after_all_that_fit_in_the_copy() -> None:
    """The first 8,192 tokens reach top_p without it."""
    row = torch.zeros(9500)
    row[9000:] = -10.0
    row[9400] = 6.0
    found = nucleus(row, 1.0, 0.80003)
    places = [0, 1, len(found.tokens) // 2]
    assert drawn(row, [found.middle(place) for place in places], top_p=0.80003) == [9400, 0, found.tokens[places[2]]]


def test_a_nucleus_that_ends_in_tokens_too_unlikely_to_be_copied() -> None:
    row = torch.zeros(40_000)
    row[20_000] = float(torch.logsumexp(row, 0)) + 2.82
    found = clear_nucleus(row)
    places = [0, 1, len(found.tokens) // 2]
    assert float(torch.softmax(row, 0)[0]) < 1.9e-6
    assert len(found.tokens) > 100
    tokens = drawn(row, [found.middle(place) for place in places])
    assert tokens[0] == 20_000
    assert all(abs(token - found.tokens[place]) < 3 for token, place in zip(tokens, places, strict=True))


def test_of_equal_tokens_none_beyond_the_nucleus_is_drawn() -> None:
    """With a number so near to 1 that rounding asks for one more."""
    for vocab, n_tokens in ((7, 3), (13, 3), (14, 3), (19, 9), (4100, 1000)):
        assert drawn(torch.zeros(vocab), [NEAREST_TO_1], top_p=(n_tokens - 0.5) / vocab) == [n_tokens - 1]


def test_a_row_is_drawn_from_alone() -> None:
    """Its neighbours, and how many they are, change nothing."""
    from fastconv.engine.kernels.draw import draw

    rows = torch.stack([noise(9500, seed=seed) * size for seed, size in enumerate((0.1, 1.0, 4.0, 8.0))])
    uniforms = torch.tensor([0.3, 0.6, 0.9, 0.1])
    together = draw(rows, uniforms, 1.0, TOP_P)
    alone = [draw(rows[i : i + 1], uniforms[i : i + 1], 1.0, TOP_P) for i in range(4)]
    assert together.tolist() == [int(one) for one in alone]
    assert draw(rows.flip(0), uniforms.flip(0), 1.0, TOP_P).flip(0).tolist() == together.tolist()


def test_a_row_without_numbers_ends_in_some_token() -> None:
    row = noise(5000)
    row[17] = float("nan")
    assert 0 <= drawn(row, [0.5])[0] < 5000
