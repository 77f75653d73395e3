"""Cross-entropy that never holds all logits: only tokens that carry loss, a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

#: Rows of logits held at once; 512 x 152,064 in bf16 is 0.16 GB.
CHUNK_ROWS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The head is frozen, so the gradient to `hidden` is all there is to keep, and it is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for start in range(0, targets.shape[0], CHUNK_ROWS):
            span = slice(start, start + CHUNK_ROWS)
            losses[span], share = _loss_and_share(hidden[span] @ head.t(), targets[span], weights[span])
            grad[span] = share @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None


def _loss_and_share(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [n] fp32, gradient of sum(weights * loss) to the logits, in their dtype); may overwrite the logits."""
    if logits.is_cuda and logits.dtype != torch.float32:  # fp32 is for checking: torch's own operations
        from fastconv.engine.kernels.elementwise import cross_entropy_in_place

        return cross_entropy_in_place(logits, targets, weights), logits
    exact = logits.float()
    share = torch.softmax(exact, dim=-1)
    share[torch.arange(len(targets), device=share.device), targets] -= 1.0
    return F.cross_entropy(exact, targets, reduction="none"), (share * weights[:, None]).to(logits.dtype)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights * loss, with gradient to `hidden`; losses [n] fp32, without one).

    hidden [n, d], head [vocab, d] (frozen), targets [n] int64, weights [n] fp32. With weights 1/N over all N supervised
    tokens of an optimizer step, the sums over its micro-batches add up to the token mean, however it was split.
    """
    total, losses = _ChunkedCrossEntropy.apply(hidden, head, targets, weights)  # pyright: ignore[reportGeneralTypeIssues]
    return total, losses
