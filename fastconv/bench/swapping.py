"""Changing what is stacked on the base: ours against merge, save and load."""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path

import torch

from fastconv.bench.measure import Clock, Comparison, Peak, folder_bytes, measured
from fastconv.bench.subject import Subject
from fastconv.engine.trl_reference import with_adapters
from fastconv.engine.stack import Adapter, Slot, Stack


def bench_stack(model: Subject, n_swaps: int) -> Comparison:
    """Put a snapshot on the base `n_swaps` times: bare, and with the proof by logits; against merge + save + load.

    `ours` is the bare swap and `ratio` compares it; `ratios` also holds the one with the proof.
    """
    stack = Stack(model.base(), model.lora)
    adapters = [stack.new_adapter("bench", place) for place in range(2)]
    for adapter in adapters:
        for _, b in adapter.weights.values():
            b.data.normal_(std=0.01)
    bare, proven, loading = (Clock(model.device) for _ in range(3))
    peak = Peak(model.device)
    _swap(stack, adapters[0], proof=True)
    for place in range(max(n_swaps, 3)):
        adapter = adapters[place % 2]
        data = adapter.to_bytes()
        with loading.running():
            stack.load_adapter(data, "bench")
        with peak.watching(), proven.running():
            _swap(stack, adapter, proof=True)
        with bare.running():
            _swap(stack, adapter, proof=False)
    usual, written, their_peak = _merge_save_load(model, adapters[0], n_swaps)
    theirs = statistics.median(usual.blocks)
    mine, checked = statistics.median(bare.blocks), statistics.median(proven.blocks)
    return Comparison(
        kind="stack", model=model.settings.id, device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(), unit="swaps",
        work=f"one adapter of rank {model.lora.r} onto the base, median of {n_swaps}",
        ours=measured("fastconv, live swap", mine, 1, peak_bytes=0),
        usual=(measured("merge + save + load", theirs, 1, peak_bytes=their_peak, written_bytes=written),),
        ratio=theirs / mine,
        ratios={"merge + save + load": theirs / mine, "merge + save + load, ours with proof": theirs / checked},
        extra={
            "ours_with_proof_seconds": checked, "ours_with_proof_peak_bytes": peak.bytes,
            "ours_from_bytes_seconds": statistics.median(loading.blocks),
        },
    )  # fmt: skip


def _swap(stack: Stack, adapter: Adapter, *, proof: bool) -> None:
    with stack.live(Slot((adapter,))):
        if proof:
            stack.prove(None, "bench")


def _merge_save_load(model: Subject, adapter: Adapter, n_swaps: int) -> tuple[Clock, int, int | None]:
    """As published: PEFT's merge_and_unload, a merged model on disk, and loaded from there."""
    from transformers import AutoModelForCausalLM

    clock, peak, written = Clock(model.device), Peak(model.device), 0
    for _ in range(n_swaps):
        peft = with_adapters(model.plain(), {"snapshot": adapter})
        with tempfile.TemporaryDirectory(prefix="fastconv-merged-") as folder:
            with peak.watching(), clock.running():
                merged = peft.merge_and_unload()  # pyright: ignore[reportCallIssue]
                merged.save_pretrained(folder)
                again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
                torch.nn.Module.to(again, model.device)
            written = folder_bytes(Path(folder))
        del peft, merged, again
        gc.collect()
    return clock, written, peak.bytes
