"""Checks of a loaded base before it is used: library faults that would silently change results. Takes seconds.

Two random adapters, one frozen and one trainable, run over three short packed rows. Each check names itself in the
error that it raises; `self_test` returns what the checks measured, which the run records.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastconv.engine.lora import Adapter, StackedLinear
from fastconv.engine.model import Base, pack
from fastconv.engine.optim import dense_weight, make_optimizer, moment_names
from fastconv.engine.same_bits import settings_kept
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import weighted_cross_entropy
from fastconv.errors import TemplateError, TrainingError
from fastconv.recipe import LoraSettings
from fastconv.seeding import seed_of

if TYPE_CHECKING:
    from fastconv.chat import ChatTokenizer

_log = logging.getLogger(__name__)
#: Texts whose tokens are compared with transformers': spaces at ends and within, lines, digits, signs, other scripts.
_TEXTS = (
    "Two  words, then 12345.",
    "  before",
    "after ",
    "one\n\ntwo\tthree",
    " A",
    "Grüße ﬁn 你好 💥",
    "it's (so): `x=1`",
)

#: Lengths (tokens) of the test rows.
_ROWS_TOK = (13, 7, 20)
_RANK = 4
#: Norm of each test adapter's delta, as a share of its layer's weights: far above rounding, and the model still works.
_SIZE = 0.1
#: Largest difference between two computations of the same logits, as a share of what the adapters change, by dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
#: Gradients may differ by this many times what rounding the embeddings once does to them, and by no more than a dropped
#: adapter would leave: a deep base in 16 bits blows rounding up (19 % on 28 layers of random weights).
_ROUNDINGS, _MOST_ROUNDED = 2.0, 0.5


class SelfTestSetup:
    """What the checks share: the stack, two random adapters for it, and the token rows."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.frozen, self.trainable = _adapter(stack, "frozen"), _adapter(stack, "trainable")
        vocab = stack.base.head.weight.shape[0]
        self.rows = [[seed_of("self-test", row, i) % vocab for i in range(n)] for row, n in enumerate(_ROWS_TOK)]

    @property
    def base(self) -> Base:
        """The base under the stack."""
        return self.stack.base

    @property
    def tolerance(self) -> float:
        """The tolerance for the base's dtype."""
        return _TOLERANCE[self.base.dtype]

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *adapters: Adapter) -> list[torch.Tensor]:
        """Logits [T_i, vocab] fp32 of each row, packed, with these adapters live."""
        ids, positions, layout = pack([list(row) for row in rows], self.base)
        with self.stack.live(*([Slot(frozen=adapters)] if adapters else [])):
            logits = self.base.logits(self.base.hidden(ids, positions, layout))
        return list(logits.split([len(row) for row in rows]))

    def gradient(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Gradient [flat] fp32 of the rows' mean loss, for the trainable adapter above the frozen one.

        `change` is made of the embeddings' output before the first layer.
        """
        ids, positions, layout = pack(self.rows, self.base)
        grad = torch.zeros_like(self.trainable.flat)
        self.trainable.train(grad)
        changed = contextlib.nullcontext() if change is None else changed_embeddings(self.base.model, change)
        try:
            with changed, self.stack.live(Slot((self.frozen,), self.trainable)), settings_kept():
                hidden = self.base.hidden(ids, positions, layout)
                weights = torch.full((len(ids) - 1,), 1.0 / len(ids), device=ids.device)
                loss, _ = weighted_cross_entropy(hidden[:-1], self.base.readout, ids[1:], weights)
                loss.backward()
        finally:
            self.trainable.train(None)
        return grad


def self_test(stack: Stack, optimizers: Collection[str] = ("adamw",)) -> dict[str, float]:
    """Run every check on a stack without live adapters. Raises TrainingError or ModelError at the first that fails.

    `optimizers` are those that the recipe trains with. Returns the relative difference that each check measured.
    """
    setup = SelfTestSetup(stack)
    differences: dict[str, float] = {}
    checks: Mapping[str, Callable[[SelfTestSetup], float]] = {
        "import order": lambda _: import_order(),
        "precision": lambda setup: precision(setup, optimizers),
        "packed rows": packed_rows,
        "swap": swap,
        "fused kernels": fused_kernels,
    }
    for name, check in checks.items():
        differences[name] = check(setup)
    return differences


def import_order() -> float:
    """If unsloth is loaded, it was imported before the libraries that it patches."""
    if "unsloth" in sys.modules:
        from fastconv.engine.unsloth import assert_imported_first

        assert_imported_first()
    return 0.0


def precision(setup: SelfTestSetup, optimizers: Collection[str]) -> float:
    """Adapters, gradients and moments are fp32 (8-bit moments only if chosen), in an optimizer step that is taken."""
    tensors = {"adapter": setup.trainable.flat, "frozen adapter": setup.frozen.flat, "gradient": setup.gradient()}
    for kind in optimizers:
        weights = nn.Parameter(setup.trainable.flat.clone())
        weights.grad = tensors["gradient"].clone()
        optimizer = make_optimizer(kind, weights, 1e-4)
        optimizer.step()
        if kind == "adamw":
            tensors |= {name: optimizer.state[weights][name] for name in moment_names(kind)}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise _failed(f"the {name} is {tensor.dtype}, not fp32")
    if not bool(torch.isfinite(tensors["gradient"]).all()) or not bool(tensors["gradient"].any()):
        raise _failed("the trainable adapter gets no finite gradient")
    if any(weight.grad is not None for pair in setup.frozen.weights.values() for weight in pair):
        raise _failed("the frozen adapter gets a gradient")
    return 0.0


def packed_rows(setup: SelfTestSetup) -> float:
    """A row's logits are those that it has alone, and do not change in a single bit with another row's tokens."""
    both = (setup.frozen, setup.trainable)
    packed = setup.logits(setup.rows, *both)
    for place in range(len(setup.rows)):
        vocab = packed[0].shape[1]
        changed = [[(token + 1) % vocab for token in row] if i == place else row for i, row in enumerate(setup.rows)]
        for row, (before, after) in enumerate(zip(packed, setup.logits(changed, *both), strict=True)):
            if (row == place) == bool(torch.equal(before, after)):
                raise _failed(f"packed row {place} leaks into row {row}" if row != place else "a row is not read")
    bare, alone = setup.logits(setup.rows), [setup.logits([row], *both)[0] for row in setup.rows]
    return _compare("packed rows", alone, packed, bare, setup.tolerance)


def swap(setup: SelfTestSetup) -> float:
    """Each adapter changes the logits, and both together; without them the base's logits are the old bits."""
    before = setup.stack.probe()
    with setup.stack.live(Slot((setup.frozen, setup.trainable))):
        setup.stack.prove(None, "self-test")
    if setup.stack.probe() != before:
        raise _failed("the base is not what it was before a swap")
    bare = setup.logits(setup.rows)
    both = setup.logits(setup.rows, setup.frozen, setup.trainable)
    for name, adapter in (("frozen", setup.frozen), ("trainable", setup.trainable)):
        share = _share(setup.logits(setup.rows, adapter), both, bare)
        if share < 2 * setup.tolerance:
            raise _failed(f"without the {name} adapter the logits are the same: one of two adapters is dropped")
    return 0.0


def fused_kernels(setup: SelfTestSetup) -> float:
    """Logits and gradients of the fused kernels are those of the layers' own forward, up to rounding."""
    both = (setup.frozen, setup.trainable)
    bare, fused, gradient = setup.logits(setup.rows), setup.logits(setup.rows, *both), setup.gradient()
    with plainly(setup.stack):
        plain, expected = setup.logits(setup.rows, *both), setup.gradient()
    difference = _compare("the fused kernels' logits", fused, plain, bare, setup.tolerance)
    gradient_difference = _gap(gradient, expected)
    if not gradient_difference <= setup.tolerance:
        with plainly(setup.stack):
            rounding = _gap(setup.gradient(in_last_bits), expected)
        if not gradient_difference <= min(_ROUNDINGS * rounding, _MOST_ROUNDED):
            raise _failed(
                f"the fused kernels' gradients are {gradient_difference:.1%} off, rounding alone {rounding:.1%}"
            )
    return max(difference, gradient_difference)


@contextlib.contextmanager
def plainly(stack: Stack) -> Iterator[None]:
    """Within the block, layers run their own forward instead of the fused kernels."""
    stack.route.plain = True
    try:
        yield
    finally:
        stack.route.plain = False


def _gap(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient - expected) / torch.linalg.vector_norm(expected))


@contextlib.contextmanager
def changed_embeddings(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, the outputs of the input embedding are what `change` makes of them."""
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def in_last_bits(output: torch.Tensor) -> torch.Tensor:
    """Embeddings larger and smaller by one or two units in their last place, every other channel."""
    sign = torch.ones_like(output)
    sign[..., ::2] = -1.0
    return output * (1.0 + 2 * torch.finfo(output.dtype).eps * sign)


def _compare(
    what: str,
    logits: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    bare: Sequence[torch.Tensor],
    limit: float,
) -> float:
    share = _share(logits, expected, bare)
    if not share <= limit:
        raise _failed(f"{what} are {share:.1%} of the adapters' effect away from what they should be")
    return share


def _share(logits: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], bare: Sequence[torch.Tensor]) -> float:
    """||logits - expected|| / ||expected - bare||: a difference as a share of what the adapters change."""
    difference = torch.linalg.vector_norm(torch.cat([a - b for a, b in zip(logits, expected, strict=True)]))
    return float(difference / torch.linalg.vector_norm(torch.cat([a - b for a, b in zip(expected, bare, strict=True)])))


def _adapter(stack: Stack, name: str) -> Adapter:
    """A random adapter of low rank whose delta is `_SIZE` of each layer's weights, in Frobenius norm."""
    shape = LoraSettings(r=_RANK, alpha=float(_RANK), rslora=False, targets=stack.settings.targets)
    layers = {m.name: m.base for m in stack.base.model.modules() if isinstance(m, StackedLinear)}
    n = sum(_RANK * (n_in + n_out) for n_in, n_out in stack.sizes.values())
    generator = torch.Generator().manual_seed(seed_of("self-test", name))
    values = torch.randn(n, generator=generator).to(stack.base.device)
    adapter = Adapter(shape, stack.base.name, stack.sizes, values)
    for module, (a, b) in adapter.weights.items():
        norm = _SIZE * torch.linalg.vector_norm(dense_weight(layers[module]))
        b.data.mul_(norm / (torch.linalg.vector_norm(a.data) * torch.linalg.vector_norm(b.data) / _RANK**0.5))
    return adapter


def _failed(what: str) -> TrainingError:
    return TrainingError(
        f"self-test: {what}", where="engine", fix="set model.engine = 'torch', and report this with `fastconv doctor`"
    )


def require_tokens(tokenizer: ChatTokenizer) -> None:
    """Raise TemplateError unless transformers' own tokenizer of the folder has the same tokens, ids and prompts.

    transformers also reads tokens, switches and templates that stand beside tokenizer.json.
    """
    from transformers import AutoTokenizer

    folder = tokenizer.folder
    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        _log.warning("%s: transformers cannot read this tokenizer, so tokens are not compared: %s", folder, error)
        return
    vocab = theirs.get_vocab()
    if others := sorted(
        token for token in {*vocab, *tokenizer.vocab} if vocab.get(token) != tokenizer.vocab.get(token)
    ):
        raise _other_tokens(f"has another id for {others[0]!r}", folder)
    for text in (*_TEXTS, "".join(f"a {token} b" for token in tokenizer.special_texts)):
        if theirs(text, add_special_tokens=False).input_ids != tokenizer.encode(text):
            raise _other_tokens(f"makes other tokens of {text[:40]!r}", folder)
    if tokenizer.template.writes_date:
        return  # transformers writes today's
    for system in ({"role": "system", "content": "Be brief."},), ():
        turns = [*system, {"role": "user", "content": "Why?"}]
        try:
            ours = tokenizer.render(turns, add_generation_prompt=True)
        except TemplateError:
            continue  # said where the condition is asked for
        kwargs = {**tokenizer.template.kwargs, "tokenize": False, "add_generation_prompt": True}
        if theirs.apply_chat_template(turns, **kwargs) != ours:
            raise _other_tokens("renders another prompt", folder)


def _other_tokens(what: str, folder: Path) -> TemplateError:
    return TemplateError(
        f"transformers' tokenizer of this folder {what} than its tokenizer.json does",
        where=str(folder),
        fix="let it write all of that into tokenizer.json: load it with AutoTokenizer, then save_pretrained into another folder",
    )
