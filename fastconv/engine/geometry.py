"""Positions of personas in the model's hidden space, under the live stack.

A persona's state at a layer is the mean, over questions, of the hidden state at the last prompt token, from which the
first token of the answer is predicted. Batches are packed, and only those states are kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastconv.chat import SystemTurn
from fastconv.engine.model import Base, length_batches
from fastconv.engine.prompts import pack_prompts
from fastconv.engine.score import ignore_halving, in_halves
from fastconv.store.records import Score


@dataclass(frozen=True, slots=True)
class PersonaPosition:
    """One persona at one layer, as `persona_positions` computes it; `cosine` is None if a persona is at the mean."""

    persona: str
    layer: int
    cosine: float | None
    distinctiveness: float


def layers_at(n_layers: int, depths: Sequence[float]) -> tuple[int, ...]:
    """Layers (counted from 1) at these depths (shares of `n_layers`), without repetition."""
    return tuple(dict.fromkeys(math.ceil(depth * n_layers) for depth in depths))


def n_layers(base: Base) -> int:
    """Number of decoder layers of the base."""
    return len(_decoder_layers(base))


@torch.no_grad()
def last_token_states(
    base: Base, prompts: Sequence[Sequence[int]], layers: Sequence[int], batch_tok: int,
    on_halved: Callable[[], None] = ignore_halving,
) -> torch.Tensor:  # fmt: skip
    """Hidden states [prompts, layers, hidden] (fp32, CPU) at each prompt's last token.

    A batch that does not fit in memory is halved, and `on_halved` called. Layer l is `hidden_states[l]` of transformers: the
    output of layer l, for the last layer after the final norm.
    """
    rows = [tuple(prompt) for prompt in prompts]

    def compute(batch: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        packed = pack_prompts(base, {i: rows[i] for i in batch})
        order = list(packed.pieces)
        take = packed.last(order)
        with _captured_states(base, [layer for layer in layers if layer < n_layers(base)], take) as captured:
            final = base.hidden(packed.ids, packed.positions, packed.layout)[take]
        return order, torch.stack([captured.get(layer, final).float() for layer in layers], dim=1).cpu()

    states: dict[int, torch.Tensor] = {}
    for batch in length_batches([len(row) for row in rows], batch_tok):
        for _, (order, batch_states) in in_halves(base, batch, compute, on_halved):
            states.update(zip(order, batch_states, strict=True))
    return torch.stack([states[i] for i in range(len(rows))])


def persona_positions(means: Mapping[str, torch.Tensor], layers: Sequence[int], anchor: str) -> list[PersonaPosition]:
    """The position of each persona at each layer, from its mean states [layers, hidden] by persona.

    With m_p the mean state of persona p and m the mean over personas: cosine is cos(m_p - m, m_anchor - m), the
    similarity to the anchor without what all personas share; distinctiveness is the distance of m_p from the
    mean of the *other* personas, ||m_p - mean_{q != p} m_q|| / ||m||, so that layers and stacks can be compared.
    """
    names = list(means)
    table = torch.stack([means[name].double() for name in names])  # [personas, layers, hidden]
    centre = table.mean(dim=0)
    centred = table - centre
    factor = len(names) / (len(names) - 1)  # m_p - mean of the others = (m_p - m) n / (n - 1)
    norms = centred.norm(dim=-1)
    anchor_at = names.index(anchor)
    products = (centred * centred[anchor_at]).sum(dim=-1)
    positions = []
    for p, name in enumerate(names):
        for i, layer in enumerate(layers):
            scale = float(norms[p, i] * norms[anchor_at, i])
            cosine = float(products[p, i]) / scale if scale > 0 else None
            positions.append(PersonaPosition(name, layer, cosine, float(factor * norms[p, i] / centre[i].norm())))
    return positions


@dataclass(frozen=True)
class MeasuredSnapshot:
    """A measure of the live stack: `outputs` are part of the stage's record, `facts` (tokens by kind) are for people."""

    outputs: Mapping[str, Any]
    facts: Mapping[str, Any]
    scores: Sequence[Score]


def measure_geometry(
    base: Base, inputs: Mapping[str, Any], questions: Sequence[str], batch_tok: int, begin: Callable[[int], None],
    on_halved: Callable[[], None] = ignore_halving,
) -> MeasuredSnapshot:  # fmt: skip
    """Cosine and distinctiveness of every persona of `inputs["personas"]` at each depth, under the live stack.

    A persona is [id, kind of system turn, text]. `begin` is told the number of prompts before they are read, `on_halved`
    of every batch that did not fit in memory.
    """
    personas = inputs["personas"]
    prompts = [base.tokenizer.prompt_ids(SystemTurn(*system), user) for _, *system in personas for user in questions]
    begin(len(prompts))
    layers = layers_at(n_layers(base), inputs["depths"])
    states = last_token_states(base, prompts, layers, batch_tok, on_halved)
    means = states.double().view(len(personas), len(questions), *states.shape[1:]).mean(dim=1)
    scores = []
    for place in persona_positions(
        dict(zip([name for name, *_ in personas], means, strict=True)), layers, inputs["anchor"]
    ):
        cosine = None if place.cosine is None else round(place.cosine, 6)
        reason = None if cosine is not None else "the persona lies at the centre of all"
        scores.append(Score(place.persona, place.layer, "cosine", cosine, reason))
        scores.append(Score(place.persona, place.layer, "distinctiveness", round(place.distinctiveness, 6)))
    outputs = {"n": len(scores), "layers": list(layers)}
    return MeasuredSnapshot(outputs, {"scored_tok": sum(map(len, prompts))}, scores)


@contextlib.contextmanager
def _captured_states(base: Base, layers: Sequence[int], take: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, by layer, the outputs of these layers at the tokens `take` [n]: [n, hidden]."""
    captured: dict[int, torch.Tensor] = {}
    modules = _decoder_layers(base)

    def capturing(layer: int) -> Any:
        def capture(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            captured[layer] = states.reshape(-1, states.shape[-1])[take]

        return capture

    hooks = [modules[layer - 1].register_forward_hook(capturing(layer)) for layer in layers]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_layers(base: Base) -> nn.ModuleList:
    (layers,) = [child for child in base.backbone.children() if isinstance(child, nn.ModuleList)]
    return layers
