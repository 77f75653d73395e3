"""Benchmark results, instruments (clock, peak memory, matmul ceiling), and the models and rows that are measured."""

from __future__ import annotations

import contextlib
import ctypes
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastconv.chat import ChatTokenizer, Rendered
from fastconv.engine.attention import ATTENTION, register
from fastconv.engine.locate import engine_identity
from fastconv.engine.model import Base, load_base, make_base, resolve_device, resolve_dtype
from fastconv.engine.shapes import (
    ModelShape,
    named_shape,
    shape_of,
)
from fastconv.engine.trl_reference import plain_model
from fastconv.recipe import LoraSettings, ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Prefix of a model id that names a shape, for random weights.
RANDOM = "random:"
#: Scale of a random head, so that next-token distributions are about as peaked as a trained model's.
_HEAD_SCALE = 8.0


@dataclass(frozen=True)
class Measured:
    """One way's measurement. `per_s` is `BenchResult.unit` per second.

    `peak_bytes` is the peak memory above what was resident before (None where the system does not report it),
    `written_bytes` what was written to disk, `ceiling_share` the FLOP/s as a share of a large matrix product's here.
    """

    name: str
    seconds: float
    per_s: float
    peak_bytes: int | None = None
    written_bytes: int = 0
    ceiling_share: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """Our way against one or more usual ways, measured in one call on the same work.

    `ratio` is the first usual way's seconds over ours; `ratios` has it for every usual way by name.
    """

    kind: str
    model: str
    device: str
    dtype: str
    threads: int
    work: str
    unit: str
    ours: Measured
    usual: tuple[Measured, ...]
    ratio: float
    ratios: Mapping[str, float]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of work on a device by block; waits for the device at both ends of each block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        _wait(self.device)
        began = time.perf_counter()
        yield
        _wait(self.device)
        self.blocks.append(time.perf_counter() - began)

    @property
    def seconds(self) -> float:
        """Sum over all blocks."""
        return sum(self.blocks)


def paired_ratio(usual: Sequence[float], ours: Sequence[float]) -> float:
    """Median over blocks of usual / ours. Both did the same work right after one another, so other programs on the
    machine slow both alike, and the median ignores a disturbed block."""
    return statistics.median(usual_s / ours_s for usual_s, ours_s in zip(usual, ours, strict=True))


class Peak:
    """Peak memory of a block above what is resident at its start: GPU memory, or the resident set size on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the block; `bytes` stays None where the system does not report it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - before
            return
        before = _reset_peak_rss()
        yield
        after = _status_bytes("VmHWM")
        if before is not None and after is not None:
            self.bytes = max(0, after - before)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        clock = Clock(device)
        with clock.running():
            torch.mm(a, b)
        best = max(best, 2 * n**3 / clock.seconds)
    return best


def measured(name: str, seconds: float, count: float, flops: float = 0.0, ceiling: float = 0.0,
             peak_bytes: int | None = None, written_bytes: int = 0) -> Measured:  # fmt: skip
    """A `Measured` from raw figures; `flops` is the work of all `count` units, `ceiling` in FLOP/s."""
    share = flops / seconds / ceiling if flops and ceiling else None
    return Measured(name, seconds, count / seconds, peak_bytes, written_bytes, share)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak_rss() -> int | None:
    """Reset Linux's peak of the resident set; returns the resident set size (bytes), or None if that is not possible.

    Free memory that the C library holds is released first, else it would hide the memory of the block.
    """
    with contextlib.suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


@dataclass(frozen=True)
class BenchModel:
    """The model that is measured, loadable as our `Base` and as a plain model for the usual way.

    `random` is the shape if it has random weights.
    """

    settings: ModelSettings
    random: ModelShape | None
    lora: LoraSettings = field(default_factory=LoraSettings)

    @property
    def device(self) -> torch.device:
        """The device that it runs on."""
        return resolve_device(self.settings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base."""
        return resolve_dtype(self.settings)

    def base(self) -> Base:
        """The model as our frozen base."""
        if self.random is None:
            return load_base(self.settings)
        if engine_identity(self.settings)["engine"] == "unsloth":
            return make_base(_random_unsloth(self.random, self), cast(ChatTokenizer, NoTokenizer()), self.settings.id)
        return make_base(
            _random_model(self.random, ATTENTION, self), cast(ChatTokenizer, NoTokenizer()), self.settings.id
        )

    def plain(self) -> PreTrainedModel:
        """The transformers model with SDPA attention."""
        if self.random is None:
            return plain_model(self.settings).requires_grad_(False).eval()
        return _random_model(self.random, "sdpa", self)


@dataclass(frozen=True)
class NoTokenizer:
    """Placeholder for the tokenizer of a model with random weights: no token stops a completion."""

    stop_ids: tuple[int, ...] = ()


def bench_model(settings: ModelSettings) -> BenchModel:
    """The model of `settings.id`; `random:NAME` is random weights of a shape in `fastconv.engine.shapes`."""
    if settings.id.startswith(RANDOM):
        return BenchModel(settings, named_shape(settings.id.removeprefix(RANDOM)))
    return BenchModel(settings, None)


def base_shape(base: Base) -> ModelShape:
    """The shape of a loaded base."""
    return shape_of(base.model.config.to_dict())


def ragged_rows(n: int, vocab: int, shortest: int, longest: int, seed: int = 0) -> tuple[Rendered, ...]:
    """n rows of random tokens with lengths uniform in [shortest, longest]; about 60 % of each row is supervised."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        length = rng.randint(shortest, longest)
        rows.append(Rendered(tuple(rng.randrange(vocab) for _ in range(length)), max(1, round(0.4 * length))))
    return tuple(rows)


def _random_unsloth(shape: ModelShape, model: BenchModel) -> PreTrainedModel:
    """A model with random weights, patched as if Unsloth had loaded it."""
    from fastconv.engine import unsloth

    unsloth.patch_classes("qwen2" if shape.qkv_bias else "llama")
    loaded = _random_model(shape, "sdpa", model)
    unsloth.adopt(loaded)
    return loaded


def _random_model(shape: ModelShape, attention: str, model: BenchModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    register()
    kind = Qwen2Config if shape.qkv_bias else LlamaConfig
    config = kind(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.head_dim = shape.head_dim
    with model.device:
        created = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
        # A random head gives nearly uniform distributions, unlike a trained one; sampling would be from the whole
        # vocabulary.
        if not shape.tied:
            created.get_output_embeddings().weight.data.mul_(_HEAD_SCALE)
    return created.requires_grad_(False).eval()
