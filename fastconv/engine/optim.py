"""Optimizers (AdamW, with fp32 or 8-bit moments) and 4-bit base layers; the 8-bit and 4-bit parts use bitsandbytes.

NF4 with double quantization (Dettmers et al. 2023) takes 4 bits for each weight and one 8-bit scale for 64 weights;
products are computed in bfloat16. Adapters stay fp32 beside the quantized layers and are never merged into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastconv.engine.locate import BITSANDBYTES, require_versions
from fastconv.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: bitsandbytes' state of a parameter: two moments in blocks of 256, the scales of the blocks, the code books.
_STATE_8BIT = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")


def load_four_bit(folder: Path, device: torch.device, attention_name: str) -> PreTrainedModel:
    """The transformers model in `folder` with NF4 layers; embedding, norms and head stay bfloat16.

    Raises ModelError if bitsandbytes is missing or not a tested version.
    """
    require_versions(BITSANDBYTES, "model.weights", "set model.weights = 'full'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation=attention_name,
        local_files_only=True,
        use_safetensors=True,
    )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On some CPUs the first inference would repack the weights permanently, after which training fails.
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model


def is_four_bit(layer: nn.Linear) -> bool:
    """True for a layer with a 4-bit weight."""
    return getattr(layer.weight, "quant_state", None) is not None


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """The layer's weight [out, in], dequantized if needed, in fp32."""
    if not is_four_bit(layer):
        return layer.weight.float()
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


class AdamW8bit:
    """bitsandbytes' AdamW with 8-bit moments, with the part of torch's optimizer interface that a trainee uses.

    bitsandbytes' kernel ignores `found_inf` (a scalar on the device), so the host reads it before each step: a step
    that is not finite changes nothing, and every step waits for the device once. Raises ModelError if bitsandbytes is
    missing or not a tested version.
    """

    def __init__(self, weights: nn.Parameter, lr: float) -> None:
        require_versions(BITSANDBYTES, "optimizer", "set optimizer = 'adamw'")
        from bitsandbytes.optim import AdamW8bit as BnbAdamW8bit  # pyright: ignore[reportMissingImports]

        self._optimizer = BnbAdamW8bit([weights], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.found_inf: torch.Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of torch's optimizers."""
        return self._optimizer.param_groups

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """As of torch's optimizers."""
        return self._optimizer.state

    def step(self) -> None:
        """Take a step, unless a loss or gradient was not finite."""
        if self.found_inf is None or not bool(self.found_inf):
            self._optimizer.step()


Optimizer = torch.optim.AdamW | AdamW8bit


def make_optimizer(kind: str, weights: nn.Parameter, lr: float) -> Optimizer:
    """The optimizer of a recipe (`adamw` or `adamw8bit`). Raises ModelError if its package is missing."""
    if kind == "adamw8bit":
        return AdamW8bit(weights, lr)
    return torch.optim.AdamW([weights], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def moment_names(kind: str) -> tuple[str, ...]:
    """Names of the optimizer state's tensors that resuming needs, beside the step."""
    return _STATE_8BIT if kind == "adamw8bit" else ("exp_avg", "exp_avg_sq")


def optimizer_state(kind: str, tensors: Mapping[str, torch.Tensor], step: int, device: torch.device) -> dict[str, Any]:
    """The optimizer's state of one parameter from its saved tensors, on `device`."""
    moments = {name: tensors[name].to(device) for name in moment_names(kind)}
    if kind == "adamw8bit":
        return {"step": step, **moments}
    return {"step": torch.tensor(float(step), device=device if device.type == "cuda" else "cpu"), **moments}


def assert_foldable(layers: Mapping[str, nn.Linear]) -> None:
    """Raise ModelError if any of these layers has a 4-bit weight, to which a delta cannot be added."""
    if any(is_four_bit(layer) for layer in layers.values()):
        raise ModelError(
            "a 4-bit base cannot be folded into", where="fold", fix="keep the stack live, or set model.weights = 'full'"
        )
