"""Proof that a loaded base computes what transformers computes: run on every load, kept in the user's cache.

The reference is a second model of transformers' own class on the same weights, with eager attention, on rows alone.
Against it stand packed rows, rows with a common prefix, the chunked loss and its gradient, prefill and decoding, and a
row beside one at a far position. Sliding windows are made short for the comparison, so that short rows are longer than
them. A base that is not fp32 is held against its reference loosely, and a small fp32 copy of its family tightly.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fastconv.engine.attention import ATTENTION, OTHER_BASE, PrefixGroup, PrefixTrees, register, to_device
from fastconv.engine.decode import Cache, Decode, Prefill
from fastconv.engine.family import rope_tables, rules_of, small_config
from fastconv.engine.model import Base, pack
from fastconv.engine.optim import dense_weight, is_four_bit
from fastconv.engine.same_bits import settings_kept
from fastconv.engine.selftest import changed_embeddings, in_last_bits, require_tokens
from fastconv.engine.train import weighted_cross_entropy
from fastconv.errors import FastconvError, ModelError, TrainingError
from fastconv.hub import cache_home
from fastconv.seeding import seed_of
from fastconv.store.io import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastconv.chat import ChatTokenizer

#: Lengths (tokens) of the rows that are compared; all but the shortest are longer than `_WINDOW`.
_ROWS_TOK = (4, 16, 9, 20)
#: Sliding windows (tokens) during the comparison.
_WINDOW = 6
#: Largest difference in log-probabilities (nats), and of the gradient as a share of its norm, in fp32.
_NEAR_NATS, _NEAR_SHARE = 1e-3, 2e-3
#: Where the reference itself rounds by more than that: times its own rounding (`_Comparison._rounding`).
_ROUNDINGS = 4.0
#: In 16 bits, where kernels round differently: root mean square as a share of the reference's. The small copy is exact.
_ROUGH_SHARE, _ROUGH_GRADIENT = 0.25, 0.75
#: What running a family on layouts that it does not know may raise.
_FAULTS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError)


def require_proof(base: Base, engine: Mapping[str, str]) -> None:
    """Prove the base, unless it was proven before by this code on this kind of machine.

    `engine` is its engine identity. Raises ModelError, naming the family and what differs, if it computes another model,
    and TrainingError if its own logits are not finite.
    """
    file = cache_home() / "proofs" / f"{_key(base, engine)}.json"
    if file.is_file():
        return
    require_tokens(base.tokenizer)
    measured = prove(base)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not results
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(measured, indent=1).encode())


def prove(base: Base) -> dict[str, float]:
    """The difference that each comparison measured. Raises ModelError at the first that is too large."""
    measured = _compared(base)
    if base.dtype != torch.float32:
        with _faults_named(base.model.config):
            small = _small(base.model.config, type(base.model), base.tokenizer, base.device)
        measured |= {f"fp32 {name}": value for name, value in _compared(small).items()}
    return measured


def prove_family(config: Any, tokenizer: ChatTokenizer) -> None:
    """Prove a small random copy of the family of a transformers config, on the CPU: what needs no weights to be known.

    Raises ModelError as `prove` does.
    """
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(small_config(config)))
    _compared(_small(config, kind, tokenizer, torch.device("cpu")))


def _key(base: Base, engine: Mapping[str, str]) -> str:
    """Of all that decides the comparison: weights, engine, device, this package's engine, and the libraries."""
    digest = hashlib.sha256(f"{base.name}\x1f{json.dumps(dict(engine), sort_keys=True)}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    names = ("torch", "transformers", *(name for name in ("unsloth", "bitsandbytes") if name in sys.modules))
    digest.update(" ".join(f"{name} {metadata.version(name)}" for name in names).encode())
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    digest.update(f"{device} {base.attention.name} {json.dumps(dict(base.tokenizer.template.kwargs))}".encode())
    return digest.hexdigest()


def _compared(base: Base) -> dict[str, float]:
    with _faults_named(base.model.config), _short_windows(base):
        return _Comparison(base, plain_twin(base.model)).run()


@contextlib.contextmanager
def _faults_named(config: Any) -> Iterator[None]:
    """Turn what a family raises on layouts that it does not know into a ModelError that names it."""
    try:
        yield
    except (torch.OutOfMemoryError, FastconvError):
        raise
    except _FAULTS as error:
        raise ModelError(
            f"the family {config.model_type} cannot be run on packed rows: {type(error).__name__}: {str(error)[:160]}",
            where="model.id",
            fix=OTHER_BASE,
        ) from error


@dataclass(frozen=True)
class _Comparison:
    """A base and its reference, and the same rows through both."""

    base: Base
    twin: PreTrainedModel

    @cached_property
    def rows(self) -> list[list[int]]:
        vocab = self.base.model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        longest = self.base.rules.longest_tok or max(_ROWS_TOK)
        return [
            [seed_of("proof", row, i) % int(vocab) for i in range(max(2, min(n, longest)))]
            for row, n in enumerate(_ROWS_TOK)
        ]

    def run(self) -> dict[str, float]:
        logits, gradient = self._reference()
        if not all(bool(part.isfinite().all()) for part in logits):
            raise TrainingError(
                "the base gives logits that are not finite",
                where="model.id",
                fix="its files are damaged or its dtype is too narrow: fetch it again, or set model.dtype = 'float32'",
            )
        packed, loss, mine = self._trained()
        try:
            measured = {"packed rows": self._gap("logits of packed rows", packed, logits)}
        except ModelError as error:
            raise self._explained(error, logits[1]) from None
        measured["common prefix"] = self._gap("logits after a common prefix", *self._tree(logits[3]))
        measured["sampling"] = self._gap("logits in sampling", *self._decoded([logits[3], logits[1]]))
        measured["far position"] = self._gap("logits of a row beside a far position", *self._beside_far(logits[1]))
        expected = float(_mean_loss(logits, self.rows))
        near = _NEAR_NATS * max(1.0, expected) if self._exact else _ROUGH_SHARE * expected
        if not abs(loss - expected) <= near:
            raise self._differs(f"the loss is {loss:.4g} nats per token, not {expected:.4g}")
        share = self._share(mine, gradient)
        if not share <= (_NEAR_SHARE if self._exact else _ROUGH_GRADIENT):
            raise self._differs(f"the loss's gradient is {share:.1%} off")
        return measured | {"loss": abs(loss - expected), "gradient": share}

    @property
    def _exact(self) -> bool:
        return self.base.dtype == torch.float32

    def _ids(self, row: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(row)], device=self.base.device)

    def _reference(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(logits [T_i, vocab] fp32 of each row alone, gradient [T, hidden] of their mean loss to the embeddings)."""
        kept: list[torch.Tensor] = []
        with changed_embeddings(self.twin, _keep_in(kept)):
            logits = [self.twin(input_ids=self._ids(row), use_cache=False).logits[0].float() for row in self.rows]
        gradient = torch.autograd.grad(_mean_loss(logits, self.rows), kept)
        return [part.detach() for part in logits], torch.cat([part[0] for part in gradient]).float()

    def _explained(self, error: ModelError, alone: torch.Tensor) -> ModelError:
        """The error with the kind of the difference: a row alone is right where packed rows feel one another."""
        try:
            self._gap("", self._packed(self.rows[1:2]), [alone])
        except ModelError:
            return error
        what = f"{error.what}, those of a row alone are right: it does not tell packed rows apart"
        return ModelError(what, where=error.where, fix=error.fix)

    @torch.no_grad()
    def _packed(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Our logits [T_i, vocab] of these rows, packed in one pass."""
        lengths = [len(row) for row in rows]
        ids, positions, layout = pack(rows, self.base)
        hidden = self.base.hidden(ids, positions, layout)
        return list(self.base.logits(hidden)[: sum(lengths)].split(lengths))

    def _trained(self) -> tuple[list[torch.Tensor], float, torch.Tensor]:
        """Our logits [T_i, vocab] of the packed rows, their chunked loss (nats), its gradient [T, hidden] to the embeddings."""
        ids, positions, layout = pack(self.rows, self.base)
        lengths = [len(row) for row in self.rows]
        take = [i for a, n in zip(layout.starts, lengths, strict=False) for i in range(a, a + n - 1)]
        at = to_device(torch.tensor(take), self.base.device)
        weights = torch.full((len(take),), 1.0 / len(take), device=self.base.device)
        kept: list[torch.Tensor] = []
        with changed_embeddings(self.base.model, _keep_in(kept)):
            hidden = self.base.hidden(ids, positions, layout)
        loss, _ = weighted_cross_entropy(hidden[at], self.base.readout, ids[at + 1], weights)
        with settings_kept():
            (gradient,) = torch.autograd.grad(loss, kept)
        logits = self.base.logits(hidden.detach())[: sum(lengths)].split(lengths)
        return list(logits), float(loss.detach()), gradient[0, : sum(lengths)].float()

    @torch.no_grad()
    def _tree(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(ours, the reference's) logits of a row's first part, and of two rests after it; `whole` are those of the row."""
        first, second = self.rows[3], self.rows[1]
        n = max(1, len(first) // 2)
        rests = [first[n:], second[: max(1, len(first) - n - 1)]]
        layout, positions = PrefixTrees.of([PrefixGroup(n, (len(rests[0]), len(rests[1])))], self.base.device)
        ids = torch.tensor([*first[:n], *rests[0], *rests[1]], device=self.base.device)
        ours = self.base.logits(self.base.hidden(ids, positions, layout)).split([n, *map(len, rests)])
        other = self.twin(input_ids=self._ids([*first[:n], *rests[1]])).logits[0].float()
        return [torch.cat([ours[0], ours[1]]), ours[2]], [whole, other[n:]]

    @torch.no_grad()
    def _decoded(self, full: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(ours, the reference's) logits at the last prompt tokens and at two decoded tokens after each prompt.

        `full` are the reference's logits of the two rows that are drawn from."""
        prompts = [row[: max(1, len(row) - 2)] for row in (self.rows[3], self.rows[1])]
        cache = Cache(2, max(map(len, self.rows)))
        ids, positions, rows = pack(prompts, self.base)
        places = [(a + i, slot, i) for slot, a in enumerate(rows.starts[:2]) for i in range(len(prompts[slot]))]
        tokens, slots, at = to_device(torch.tensor(places).t().contiguous(), self.base.device)
        hidden = self.base.hidden(ids, positions, Prefill(rows, cache, tokens, slots, at))
        last = torch.tensor(rows.starts[1:3], device=self.base.device) - 1
        ours = [self.base.logits(hidden[last])]
        for step in range(min(2, len(self.rows[1]) - len(prompts[1]))):
            lengths = [len(prompt) + step for prompt in prompts]
            new = [row[n] for row, n in zip((self.rows[3], self.rows[1]), lengths, strict=True)]
            where = torch.tensor(lengths, device=self.base.device)
            layout = Decode(cache, where, max(lengths))
            ours.append(self.base.logits(self.base.hidden(torch.tensor(new, device=self.base.device), where, layout)))
        ends = [len(prompt) - 1 for prompt in prompts]
        theirs = [torch.stack([row[n + step] for row, n in zip(full, ends, strict=True)]) for step in range(len(ours))]
        return ours, theirs

    @torch.no_grad()
    def _beside_far(self, alone: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(ours, the reference's) logits of a row packed with a token at a far position, which it must not feel."""
        config: Any = self.base.model.config.get_text_config()
        original = [int(table.get("original_max_position_embeddings") or 0) for table in rope_tables(config)]
        far = max([int(getattr(config, "max_position_embeddings", None) or 4096), *original])
        far = min(4 * far, 2**20) if not self.base.rules.longest_tok else self.base.rules.longest_tok - 1
        ids, positions, layout = pack([self.rows[1], self.rows[0][:1]], self.base)
        positions = positions.clone()
        positions[len(self.rows[1])] = far
        hidden = self.base.hidden(ids, positions, layout)
        return [self.base.logits(hidden)[: len(self.rows[1])]], [alone]

    def _gap(self, what: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
        """The difference of two lists of logits [n, vocab]. Raises ModelError if it is too large."""
        mine, right = (torch.log_softmax(torch.cat(list(part)), -1) for part in (ours, theirs))
        if self._exact:
            gap = float((mine - right).abs().max())
            if not gap <= _NEAR_NATS and not gap <= _ROUNDINGS * self._rounding:
                raise self._differs(f"{what} are up to {gap:.2g} nats off")
            return gap
        share = self._share(mine, right, right - right.mean(-1, keepdim=True))
        if not share <= _ROUGH_SHARE:
            raise self._differs(f"{what} are {share:.0%} off")
        return share

    @cached_property
    @torch.no_grad()
    def _rounding(self) -> float:
        """How far (nats) the reference is from itself where nothing but rounding differs: in a batch of two, and with
        embeddings moved in their last bits. Trained weights blow up single tokens: 0.01 nats was seen on a real 1.5B.
        """
        gap = 0.0
        for row in self.rows:
            ids = self._ids(row)
            alone = torch.log_softmax(self.twin(input_ids=ids, use_cache=False).logits[0].float(), -1)
            with changed_embeddings(self.twin, in_last_bits):
                moved = self.twin(input_ids=ids, use_cache=False).logits[0].float()
            in_two = self.twin(input_ids=torch.cat([ids, ids]), use_cache=False).logits[0].float()
            gap = max(gap, *(float((torch.log_softmax(other, -1) - alone).abs().max()) for other in (moved, in_two)))
        return gap

    def _share(self, mine: torch.Tensor, right: torch.Tensor, spread: torch.Tensor | None = None) -> float:
        """Norm of the difference of two [n, width] as a share of the norm of `spread` (default: of `right`).

        In 16 bits it is the median over tokens: after random tokens, rounding alone puts single rows of trained weights
        far off in either model (transformers' own by 47 % of its fp32), while what a family computes otherwise shows in most.
        """
        dim = None if self._exact else -1
        whole = torch.linalg.vector_norm(right if spread is None else spread, dim=dim)
        off = torch.linalg.vector_norm(mine - right, dim=dim)
        return float((off / whole)[whole > 0].median())  # the last token of a row has no gradient in either

    def _differs(self, what: str) -> ModelError:
        return ModelError(
            f"on the family {self.base.model.config.model_type} fastconv would compute another model than transformers: "
            f"{what}",
            where="model.id",
            fix=OTHER_BASE,
        )


def _mean_loss(logits: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token mean of the next-token losses (nats) of rows from their logits [T_i, vocab]."""
    parts = [
        F.cross_entropy(part[:-1], torch.tensor(list(row[1:]), device=part.device), reduction="sum")
        for part, row in zip(logits, rows, strict=True)
    ]
    return torch.stack(parts).sum() / sum(len(row) - 1 for row in rows)


def _keep_in(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Embeddings that ask for a gradient and are appended to `kept`."""

    def keep(output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    return keep


@contextlib.contextmanager
def _short_windows(base: Base) -> Iterator[None]:
    """Within the block, the base's sliding windows are at most `_WINDOW` tokens, in its config and in its layers."""
    config: Any = base.model.config.get_text_config()
    owners: list[Any] = [
        m for m in (config, *base.model.modules()) if isinstance(getattr(m, "sliding_window", None), int)
    ]
    before, rules = [owner.sliding_window for owner in owners], base.rules
    try:
        for owner, window in zip(owners, before, strict=True):
            if window > 0:
                owner.sliding_window = min(window, _WINDOW)
        base.rules = replace(rules, windows=tuple(min(window, _WINDOW) for window in rules.windows))
        yield
    finally:
        for owner, window in zip(owners, before, strict=True):
            owner.sliding_window = window
        base.rules = rules


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers' own class on the same weights (4-bit ones dequantized), with eager attention.

    The weights are shared, not copied. Raises ModelError if the class has a weight that the model lacks.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    for name in ("quantization_config",):
        if hasattr(config, name):
            delattr(config, name)
    with init_empty_weights(include_buffers=False):  # buffers, such as RoPE's frequencies, are computed by the class
        twin: Any = _untouched(type(model))(config)
    weights = dict(model.state_dict(keep_vars=False))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and is_four_bit(module):
            dense = dense_weight(module).to(torch.bfloat16)
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.weight")}
            weights[f"{name}.weight"] = dense
    twin.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name, weight in twin.named_parameters() if weight.is_meta]
    if missing:
        raise ModelError(f"the loaded model lacks {missing[0]}", where="model.id", fix=OTHER_BASE)
    device = next(model.parameters()).device
    return twin.to(device).requires_grad_(False).eval()


def _untouched(kind: type) -> type:
    """The class as transformers wrote it: where Unsloth has replaced methods of classes, from its source once more."""
    if "unsloth" not in sys.modules:
        return kind
    written = sys.modules[kind.__module__]
    name = f"{kind.__module__}_as_written"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, str(written.__file__))
        assert spec is not None, "a module of transformers has a source file"
        assert spec.loader is not None, "a source file has a loader"
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[name], kind.__name__)


def _small(config: Any, kind: type, tokenizer: ChatTokenizer, device: torch.device) -> Base:
    """A small random copy of the family of a config in fp32 on a device, with every rule of the config."""
    config = small_config(config)
    generator = torch.Generator().manual_seed(seed_of("proof"))
    config._attn_implementation = ATTENTION
    model: Any = _untouched(kind)(config).float()
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.1 * noise)
    if config.tie_word_embeddings:
        model.tie_weights()
    model = model.to(device).requires_grad_(False).eval()
    return Base(model, tokenizer, "a small copy", device, torch.float32, rules=rules_of(model))
