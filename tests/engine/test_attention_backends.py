"""Attention backends: picked by trying them, in order, and thrown out when they compute something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.engine import attention_backends as backends
from fastconv.engine.attention import Packed, Padded, Ragged, attend_by_row
from fastconv.engine.attention_backends import SDPA, pick_attention

LENGTHS = (3, 1, 7)


def pick(monkeypatch: pytest.MonkeyPatch, *, uncaptured: tuple[str, ...] = (), **candidates: Any) -> backends.Backend:
    """What is picked among these on a GPU that is not there: the trial itself runs on the CPU, in 16 bits."""
    made = {name: (make, name not in uncaptured) for name, make in candidates.items()}
    monkeypatch.setattr(backends, "_CANDIDATES", made)
    real = backends._distance
    monkeypatch.setattr(backends, "_distance", lambda kernel, device, *rest: real(kernel, torch.device("cpu"), *rest))
    again = backends._repeats
    monkeypatch.setattr(backends, "_repeats", lambda kernel, device, *rest: again(kernel, torch.device("cpu"), *rest))
    return pick_attention(torch.device("cuda"), torch.bfloat16)


def missing() -> Any:
    raise ImportError("No module named 'flash_attn'")


def right() -> Any:
    return lambda q, k, v, rows, scale: attend_by_row(q, k, v, rows.bounds.tolist(), scale)


def leaking() -> Any:
    return lambda q, k, v, rows, scale: attend_by_row(q, k, v, (0, q.shape[1]), scale)


def other_scale() -> Any:
    return lambda q, k, v, rows, scale: attend_by_row(q, k, v, rows.bounds.tolist(), q.shape[-1] ** -0.5)


def no_gradient() -> Any:
    return lambda q, k, v, rows, scale: attend_by_row(q, k.detach(), v, rows.bounds.tolist(), scale)


def test_the_first_that_works_is_taken_and_the_others_reasons_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pick(monkeypatch, flash=missing, varlen=leaking, xformers=right, never=missing)
    assert found.name == "xformers"
    assert dict(found.passed_over)["flash"] == "No module named 'flash_attn'"
    assert dict(found.passed_over)["varlen"].endswith("away from SDPA")


def test_one_that_computes_something_else_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pick(monkeypatch, scale=other_scale, gradient=no_gradient)
    assert found.kernel is None
    assert found.name == "sdpa"
    assert [name for name, _ in found.passed_over] == ["scale", "gradient"]


def test_one_that_gives_other_bits_the_second_time_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed would go on to other weights."""
    calls = []

    def drifting() -> Any:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Ragged, scale: float) -> torch.Tensor:
            calls.append(1)
            return attend_by_row(q, k, v * (1 + len(calls) * 2**-7), rows.bounds.tolist(), scale)

        return attend

    found = pick(monkeypatch, drifting=drifting, steady=right)
    assert found.name == "steady"
    assert dict(found.passed_over) == {"drifting": "the same rows give other bits the second time"}


def test_one_that_no_graph_can_hold_is_not_taken_where_sdpa_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pick(monkeypatch, flash=missing, xformers=right, uncaptured=("xformers",))
    assert (found.name, found.kernel, found.captures) == ("sdpa", None, True)
    assert dict(found.passed_over)["xformers"] == "no CUDA graph can hold it, and SDPA is right here"


def test_one_that_a_graph_can_hold_is_taken_before_sdpa_whatever_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pick(monkeypatch, xformers=right, late=right, uncaptured=("xformers",))
    assert (found.name, found.captures, found.passed_over) == ("late", True, ())


def test_one_that_no_graph_can_hold_is_taken_where_sdpa_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_padded_sdpa", leaking)
    found = pick(monkeypatch, xformers=right, uncaptured=("xformers",))
    assert (found.name, found.captures) == ("xformers", False)
    assert [name for name, _ in found.passed_over] == ["sdpa"]


def test_where_none_is_right_it_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_padded_sdpa", leaking)
    found = pick(monkeypatch, xformers=leaking, uncaptured=("xformers",))
    assert (found.name, found.kernel) == ("sdpa", None)
    assert [name for name, _ in found.passed_over] == ["sdpa", "xformers"]


def test_only_xformers_is_one_that_no_graph_can_hold() -> None:
    assert [name for name, (_, captures) in backends._CANDIDATES.items() if not captures] == ["xformers"]


def test_a_cpu_and_fp32_take_sdpa() -> None:
    assert pick_attention(torch.device("cpu"), torch.bfloat16) is SDPA
    assert pick_attention(torch.device("cuda"), torch.float32) is SDPA


@pytest.mark.parametrize("n_tok", [0, 11, 16])
def test_every_layout_attends_alike(n_tok: int) -> None:
    whole = max(n_tok, sum(LENGTHS))
    q, k, v = torch.randn(4, whole, 8), torch.randn(2, whole, 8), torch.randn(2, whole, 8)
    rows = slice(0, sum(LENGTHS))
    expected = Packed.of(list(LENGTHS)).attend(0, q[:, rows], k[:, rows], v[:, rows], 0.3)
    ragged = Ragged.of(LENGTHS, right(), n_tok=n_tok, width=8)
    assert torch.equal(ragged.attend(0, q, k, v, 0.3)[rows], expected)  # fp32: row by row
    half = ragged.attend(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.3)
    assert torch.allclose(half[rows].float(), expected, atol=0.03)
    padded = Padded.of(LENGTHS, n_tok=n_tok, width=8)
    assert torch.allclose(padded.attend(0, q, k, v, 0.3)[rows], expected, atol=1e-5)
    assert (ragged.n_tok, ragged.longest) == (whole, 8)
    assert (padded.n_tok, padded.longest) == (whole, 64)


def test_layouts_of_one_shape_differ_in_tensors_alone() -> None:
    one, other = (Ragged.of(lengths, right(), n_tok=16, width=8) for lengths in ((3, 1, 7), (8, 8, 0)))
    assert one.bounds.tolist() == [0, 3, 4, 11, 16]
    assert other.bounds.tolist() == [0, 8, 16, 16, 16]
    assert one.with_inputs(other.inputs).bounds is other.bounds
    assert one.longest == other.longest


def test_torchs_varlen_is_called_as_this_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def now(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        seen.update(window=window_size, gqa=enable_gqa, shapes=(q.shape, k.shape), longest=(max_q, max_k))
        return attend_by_row(*(part.transpose(0, 1) for part in (q, k, v)), cu_q.tolist(), scale)

    monkeypatch.setattr(backends.importlib, "import_module", lambda name: SimpleNamespace(varlen_attn=now))
    q, k, v = (torch.randn(heads, 11, 8).bfloat16() for heads in (4, 2, 2))
    rows = Ragged.of(LENGTHS, backends._torch_varlen())
    assert torch.equal(rows.attend(0, q, k, v, 0.3), attend_by_row(q, k, v, (0, 3, 4, 11), 0.3))
    assert seen == {"window": (-1, 0), "gqa": True, "shapes": ((11, 4, 8), (11, 2, 8)), "longest": (7, 7)}


#: The keywords of `flash_attn.cute.flash_attn_varlen_func` 4.0.0b36 that matter here; it returns sums of the softmax too.
def flash_attn_4(seen: dict[str, Any]) -> Any:
    def varlen(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *,
               softmax_scale=None, causal=False, deterministic=False):  # type: ignore[no-untyped-def] # fmt: skip
        assert qv is None
        seen.update(
            causal=causal, deterministic=deterministic, shapes=(q.shape, k.shape), longest=(max_seqlen_q, max_seqlen_k)
        )
        assert cu_seqlens_q is cu_seqlens_k
        return attend_by_row(*(p.transpose(0, 1) for p in (q, k, v)), cu_seqlens_q.tolist(), softmax_scale), None

    return varlen


class CompilerError(Exception):
    """As the DSL's own: no RuntimeError."""


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    def find(name: str) -> Any:
        if (found := modules.get(name.replace(".", "_"))) is None:
            raise ImportError(f"No module named {name!r}")
        return found

    monkeypatch.setattr(backends.importlib, "import_module", find)


def test_flash_attention_4_is_found_and_called_for_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    dsl = SimpleNamespace(DSLBaseError=CompilerError)
    cute = SimpleNamespace(flash_attn_varlen_func=flash_attn_4(seen))
    installed(monkeypatch, flash_attn=SimpleNamespace(), flash_attn_cute=cute, cutlass_base_dsl_common=dsl)
    found = pick(monkeypatch, **{name: make for name, (make, _) in backends._CANDIDATES.items()})
    assert found.name == "flash-attn 4"
    assert found.captures
    q, k, v = (torch.randn(heads, 11, 8).bfloat16() for heads in (4, 2, 2))
    rows = Ragged.of(LENGTHS, backends._flash_attn_4())
    assert torch.equal(rows.attend(0, q, k, v, 0.3), attend_by_row(q, k, v, (0, 3, 4, 11), 0.3))
    shapes = ((11, 4, 8), (11, 2, 8))
    assert seen == {"causal": True, "deterministic": True, "shapes": shapes, "longest": (7, 7)}


def test_flash_attention_4_that_cannot_be_compiled_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise CompilerError("expects an arch of sm_90a")

    dsl = SimpleNamespace(DSLBaseError=CompilerError)
    cute = SimpleNamespace(flash_attn_varlen_func=refuses)
    installed(monkeypatch, flash_attn_cute=cute, cutlass_base_dsl_common=dsl)
    found = pick(monkeypatch, cute=backends._flash_attn_4, plain=right)
    assert found.name == "plain"
    assert dict(found.passed_over) == {"cute": "expects an arch of sm_90a"}


def test_flash_attention_2_is_called_for_the_same_bits_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def now(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, deterministic=False):  # type: ignore[no-untyped-def]
        seen.update(causal=causal, deterministic=deterministic)
        return attend_by_row(*(part.transpose(0, 1) for part in (q, k, v)), cu_q.tolist(), softmax_scale)

    installed(monkeypatch, flash_attn=SimpleNamespace(flash_attn_varlen_func=now))
    assert pick(monkeypatch, flash=backends._flash_attn).name == "flash"
    assert seen == {"causal": True, "deterministic": True}
    installed(monkeypatch, flash_attn=SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: q))
    with pytest.raises(NotImplementedError, match="no fixed order"):
        backends._flash_attn()


def test_a_torch_whose_varlen_knows_no_grouped_queries_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        raise AssertionError("never called")

    monkeypatch.setattr(backends.importlib, "import_module", lambda name: SimpleNamespace(varlen_attn=old))
    with pytest.raises(NotImplementedError, match="without enable_gqa, scale, window_size"):
        backends._torch_varlen()


def test_the_real_torch_has_what_is_called() -> None:
    backends._torch_varlen()
