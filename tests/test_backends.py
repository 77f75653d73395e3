"""Attention backends: picked by trying them, in order, and thrown out when they compute something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import backends
from fastconv.engine.attention import Packed
from fastconv.engine.backends import pick_attention, sdpa

STARTS = (0, 3, 4, 11)


def pick(monkeypatch: pytest.MonkeyPatch, **candidates: Any) -> backends.Backend:
    made = tuple((name, make) for name, make in candidates.items())
    monkeypatch.setattr(backends, "_CANDIDATES", made)
    real = backends._distance
    monkeypatch.setattr(backends, "_distance", lambda attend, device, *rest: real(attend, torch.device("cpu"), *rest))
    return pick_attention(torch.device("cuda"), torch.float32)


def missing() -> Any:
    raise ImportError("No module named 'flash_attn'")


def leaking() -> Any:
    return lambda q, k, v, starts, scale: sdpa(q, k, v, (0, starts[-1]), scale)


def other_scale() -> Any:
    return lambda q, k, v, starts, scale: sdpa(q, k, v, starts, q.shape[-1] ** -0.5)


def right() -> Any:
    return lambda q, k, v, starts, scale: sdpa(q, k, v, starts, scale)


def test_the_first_that_works_is_taken_and_the_others_reasons_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pick(monkeypatch, flash=missing, varlen=leaking, xformers=right, never=missing)
    assert found.name == "xformers"
    assert dict(found.passed_over)["flash"] == "No module named 'flash_attn'"
    assert dict(found.passed_over)["varlen"].endswith("away from SDPA")


def test_one_that_ignores_the_scale_or_drops_gradients_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gradient() -> Any:
        return lambda q, k, v, starts, scale: sdpa(q, k.detach(), v, starts, scale)

    found = pick(monkeypatch, one=other_scale, two=no_gradient)
    assert found.name == "sdpa"
    assert [name for name, _ in found.passed_over] == ["one", "two"]


def test_a_cpu_takes_sdpa_which_is_what_packed_rows_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_attention(torch.device("cpu"), torch.float32).attend is sdpa
    q, k, v = torch.randn(4, 11, 8), torch.randn(2, 11, 8), torch.randn(2, 11, 8)
    assert torch.equal(sdpa(q, k, v, STARTS, 0.3), Packed(STARTS).attend(0, q, k, v, 0.3))


def test_torchs_varlen_is_called_as_this_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        seen.update(is_causal=is_causal, shapes=(query.shape, key.shape), bounds=cu_seq_q.tolist(), longest=max_q)
        rows = (part.transpose(0, 1) for part in (query, key, value))
        return sdpa(*rows, cu_seq_q.tolist(), query.shape[-1] ** -0.5)

    module = SimpleNamespace(varlen_attn=old)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: module)
    q, k, v = torch.randn(4, 11, 8), torch.randn(2, 11, 8), torch.randn(2, 11, 8)
    out = backends._torch_varlen()(q, k, v, STARTS, 0.3)
    assert torch.allclose(out, sdpa(q, k, v, STARTS, 0.3), atol=1e-5)
    assert seen == {"is_causal": True, "shapes": ((11, 4, 8), (11, 4, 8)), "bounds": list(STARTS), "longest": 7}
