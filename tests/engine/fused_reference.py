"""What PEFT makes of two adapters at once, computed by a process that never saw Unsloth: `FOLDER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import torch

from fastconv.engine.lora import Adapter
from fastconv.engine.stack import Stack
from tests.engine_kit import BEHAVIOR, peft_model, plain_logits, ragged_rows, random_adapter, tiny_stack

#: Short rows: Triton's interpreter takes seconds for a hundred tokens.
ROWS = tuple(row.ids for row in ragged_rows(3, longest=14))
SIZE = 0.1


def adapters(stack: Stack) -> tuple[Adapter, Adapter]:
    """(frozen, trainable), the same in both processes; rank and scale differ between them."""
    return random_adapter(stack, 1, size=SIZE), random_adapter(stack, 2, BEHAVIOR, size=SIZE)


def main(folder: Path, out: Path) -> None:
    """Write logits of each row alone under both adapters, and the gradient of the rows' mean loss for the second."""
    frozen, trainable = adapters(tiny_stack(folder))
    model = peft_model(folder, {"frozen": frozen, "trainable": trainable})
    tensors = {f"logits_{i}": plain_logits(model, row) for i, row in enumerate(ROWS)}
    for row in ROWS:
        ids = torch.tensor([list(row)])
        (model(input_ids=ids, labels=ids).loss / len(ROWS)).backward()
    grads = []
    for module in trainable.sizes:
        layer = model.base_model.model.get_submodule(module)
        grads += [layer.lora_A["trainable"].weight.grad.reshape(-1), layer.lora_B["trainable"].weight.grad.reshape(-1)]
    tensors["gradient"] = torch.cat(grads)
    safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
