"""Where personas lie in the model's hidden space, under whatever stack is live.

A persona's place at a layer is the mean, over questions, of the hidden state at the last prompt token: where the first
token of the answer is about to be chosen. Packed batches, nothing is padded, only those states are kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastconv.engine.model import Base, length_batches
from fastconv.engine.score import pack_prompts


@dataclass(frozen=True, slots=True)
class PersonaPosition:
    """One persona at one layer; a value is None where it is not defined (a persona at the very centre)."""

    persona: str
    layer: int
    cosine: float | None
    distinctiveness: float


def layers_at(n_layers: int, depths: Sequence[float]) -> tuple[int, ...]:
    """Layers (counted from 1) at these depths, a share of all of them; each once."""
    return tuple(dict.fromkeys(math.ceil(depth * n_layers) for depth in depths))


def n_layers(base: Base) -> int:
    """How many decoder layers the base has."""
    return len(_decoder_layers(base))


@torch.no_grad()
def last_token_states(
    base: Base, prompts: Sequence[Sequence[int]], layers: Sequence[int], batch_tok: int
) -> torch.Tensor:
    """Hidden states [prompts, layers, hidden] (fp32, CPU) at each prompt's last token.

    Layer l is `hidden_states[l]` of transformers: what layer l gives, and after the final norm for the last one.
    """
    rows = [tuple(prompt) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}
    for batch in length_batches([len(row) for row in rows], batch_tok):
        order, tokens, positions, layout, take = pack_prompts(base, {i: rows[i] for i in batch})
        with _kept(base, [layer for layer in layers if layer < n_layers(base)], take) as kept:
            final = base.hidden(tokens, positions, layout)[take]
        states = torch.stack([kept.get(layer, final).float() for layer in layers], dim=1).cpu()
        found.update(zip(order, states, strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def persona_positions(means: Mapping[str, torch.Tensor], layers: Sequence[int], anchor: str) -> list[PersonaPosition]:
    """Where each persona lies, from its mean states [layers, hidden] by persona.

    With m_p the mean state of persona p and m the mean over personas: cosine is cos(m_p - m, m_anchor - m), the
    similarity to the anchor once what all personas share is taken away; distinctiveness is the distance of m_p from the
    mean of the *other* personas, ||m_p - mean_{q != p} m_q|| / ||m||, so that layers and stacks can be compared.
    """
    names = list(means)
    table = torch.stack([means[name].double() for name in names])  # [personas, layers, hidden]
    centre = table.mean(dim=0)
    centred = table - centre
    others = len(names) / (len(names) - 1)  # m_p - mean of the others = (m_p - m) n / (n - 1)
    norms = centred.norm(dim=-1)
    anchor_at = names.index(anchor)
    products = (centred * centred[anchor_at]).sum(dim=-1)
    found = []
    for p, name in enumerate(names):
        for i, layer in enumerate(layers):
            scale = float(norms[p, i] * norms[anchor_at, i])
            cosine = float(products[p, i]) / scale if scale > 0 else None
            found.append(PersonaPosition(name, layer, cosine, float(others * norms[p, i] / centre[i].norm())))
    return found


@contextlib.contextmanager
def _kept(base: Base, layers: Sequence[int], take: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, the rows `take` of what these layers give are kept, by layer."""
    kept: dict[int, torch.Tensor] = {}
    modules = _decoder_layers(base)

    def keeping(layer: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output if isinstance(output, torch.Tensor) else output[0]
            kept[layer] = states.reshape(-1, states.shape[-1])[take]

        return keep

    hooks = [modules[layer - 1].register_forward_hook(keeping(layer)) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _decoder_layers(base: Base) -> nn.ModuleList:
    (layers,) = [child for child in base.backbone.children() if isinstance(child, nn.ModuleList)]
    return layers
