"""The reference trainer: TRL's SFTTrainer and PEFT on a plain transformers model, for the same jobs as `engine.train`.

Rows, order and initial weights are the same; it is slower. Our loss curve is checked against it, `fastconv bench`
measures against it, and the recipe setting model.trainer can choose it (`train_reference`). It shares only the job's
description with our loop.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from fastconv.chat import Rendered
from fastconv.engine.locate import locate
from fastconv.engine.lora import Adapter
from fastconv.engine.model import load_model
from fastconv.engine.stack import Stack
from fastconv.engine.trainee import Job, Trainee, start
from fastconv.recipe import LoraSettings, ModelSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAINABLE = "trainable"


@dataclass(frozen=True)
class TrlOptions:
    """Options of a TRL run that do not change its result (beyond rounding)."""

    gradient_checkpointing: bool = False
    #: Stop after this many optimizer steps of the schedule; None runs all.
    until_step: int | None = None
    #: Called with the seconds of every finished step, data loading included; its own time is not counted.
    on_step: Callable[[float], None] = field(default=lambda seconds: None)


@dataclass(frozen=True)
class TrlRun:
    """The result of a TRL run: loss and gradient norm before clipping by step, final weights [n] fp32 on the CPU."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: torch.Tensor


def plain_model(settings: ModelSettings) -> PreTrainedModel:
    """The recipe's base as transformers loads it, with SDPA attention for padded batches."""
    return load_model(settings, locate(settings), "sdpa")


def add_peft_adapters(model: PreTrainedModel, adapters: Mapping[str, Adapter], dropout: float = 0.0) -> PeftModel:
    """A PeftModel of `model` with all these adapters active (by name); only the last one has gradients and dropout.

    PEFT enables gradients for every active adapter, so the others are frozen again afterwards. Raises ValueError
    without an adapter.
    """
    from peft import LoraConfig, get_peft_model

    last = list(adapters)[-1]
    peft: PeftModel | None = None
    for name, adapter in adapters.items():
        config = LoraConfig(**_peft_arguments(adapter.shape), lora_dropout=dropout if name == last else 0.0)
        if peft is None:
            peft = cast("PeftModel", get_peft_model(model, config, adapter_name=name))
        else:
            peft.add_adapter(name, config)
        for module, (a, b) in adapter.weights.items():
            layer = cast(Any, model.get_submodule(module))
            layer.lora_A[name].weight.data.copy_(a.data)
            layer.lora_B[name].weight.data.copy_(b.data)
    if peft is None:
        raise ValueError("no adapter to put on the model")
    peft.base_model.set_adapter(list(adapters))  # pyright: ignore[reportCallIssue]
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(f".{last}." in name)
    return peft


def train_with_trl(model: PreTrainedModel, job: Job, first: Adapter, options: TrlOptions | None = None) -> TrlRun:
    """Train a copy of `first` on the job's rows in the job's order with SFTTrainer on padded batches, as published.

    `model` is a `plain_model`, which has the adapters afterwards. With `first` = `Stack.new_adapter(*job.seed_parts)`
    the run starts from the same weights as ours. Dropout masks are PEFT's.
    """
    options = options or TrlOptions()
    frozen = {f"frozen_{place}": adapter for place, adapter in enumerate(job.frozen)}
    peft = add_peft_adapters(model, {**frozen, TRAINABLE: first}, job.settings.dropout)
    n_steps = min(job.n_steps, options.until_step or job.n_steps)
    batches = [job.batch(step) for step in range(n_steps)]
    with tempfile.TemporaryDirectory(prefix="fastconv-trl-") as folder:
        trainer = _trainer(peft, job, batches, options, folder)
        trainer.train()
    losses = tuple(float(loss) for loss in trainer.step_losses)
    norms = tuple(float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry)
    return TrlRun(losses, norms, _trained_weights(model, first))


def train_reference(
    settings: ModelSettings, stack: Stack, job: Job, stops: Sequence[int], keep: Callable[[Trainee, float], None]
) -> Trainee:
    """Train a job with TRL up to each of `stops` (optimizer steps, ascending); the counterpart of `engine.train.train`.

    Every stop is a run of its own from the first step, since TRL saves no state that `engine.trainee` could go on from:
    slow, and only for checking our trainer. `keep` is called at each stop with the trainee as it is then and the
    seconds spent so far. Returns the trainee at the last stop.
    """
    began = time.monotonic()
    trainee = start(stack, job)
    first = trainee.adapter.flat.clone()
    for stop in stops:
        trainee.adapter.flat.copy_(first)
        run = train_with_trl(plain_model(settings), job, trainee.adapter, TrlOptions(until_step=stop))
        trainee.adapter.flat.copy_(run.weights)
        trainee.losses[:stop] = torch.tensor(run.losses)
        trainee.step = stop
        keep(trainee, time.monotonic() - began)
    return trainee


def _trainer(peft: PeftModel, job: Job, batches: Sequence[list[int]], options: TrlOptions, folder: str) -> Any:
    """An SFTTrainer on pre-tokenised rows with exactly these batches; its `step_losses` has every step's loss."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class ReferenceTrainer(SFTTrainer):
        """SFTTrainer with our order of rows. It logs rounded losses, so the exact ones are collected."""

        step_losses: list[torch.Tensor]

        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)  # pyright: ignore[reportArgumentType]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.step_losses.append(loss.detach())
            return loss

    ReferenceTrainer.step_losses = []
    settings = job.settings
    config = SFTConfig(
        output_dir=folder, max_steps=len(batches), per_device_train_batch_size=settings.batch_rows,
        gradient_accumulation_steps=1, learning_rate=settings.lr, lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup_share * job.n_steps), max_grad_norm=settings.clip_norm,
        optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
        gradient_checkpointing=options.gradient_checkpointing, bf16=False, use_cpu=peft.device.type == "cpu",
        max_length=None, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": list(row.ids), "labels": _labels(row)} for row in job.rows]
    trainer = ReferenceTrainer(
        model=peft, args=config, train_dataset=Dataset.from_list(rows), processing_class=_placeholder_tokenizer(peft)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_stopwatch(options.on_step))
    trainer.create_optimizer()
    trainer.create_scheduler(job.n_steps)  # of the whole schedule, even if the run stops early
    return trainer


def _stopwatch(on_step: Callable[[float], None]) -> Any:
    """A trainer callback that calls `on_step` with the seconds of each step."""
    from transformers.trainer_callback import TrainerCallback

    class Stopwatch(TrainerCallback):
        """Times from the end of one step (or of the hook after it) to the end of the next."""

        def __init__(self) -> None:
            self.began = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            on_step(time.perf_counter() - self.began)
            self.began = time.perf_counter()

    return Stopwatch()


def _placeholder_tokenizer(peft: PeftModel) -> Any:
    """A tokenizer for SFTTrainer, which needs one even for pre-tokenised rows and takes only the pad token from it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"token-{i}": i for i in range(int(cast(Any, peft.config).vocab_size))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="token-0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="token-0", pad_token="token-0")


def _trained_weights(model: PreTrainedModel, like: Adapter) -> torch.Tensor:
    """The trained adapter's weights in the order of `like.flat`, on the CPU."""
    parts = []
    for module in like.sizes:
        layer = cast(Any, model.get_submodule(module))
        parts += [
            layer.lora_A[TRAINABLE].weight.detach().reshape(-1),
            layer.lora_B[TRAINABLE].weight.detach().reshape(-1),
        ]
    return torch.cat(parts).float().cpu()


def _labels(row: Rendered) -> list[int]:
    """The ids of the tokens that carry loss, -100 in the place of the others."""
    labels = [-100] * len(row.ids)
    for span in row.loss_spans:
        labels[slice(*span)] = row.ids[slice(*span)]
    return labels


def _peft_arguments(shape: LoraSettings) -> dict[str, Any]:
    return {
        "r": shape.r,
        "lora_alpha": shape.alpha,
        "use_rslora": shape.rslora,
        "target_modules": list(shape.targets),
        "layers_to_transform": list(shape.layer_numbers) or None,
        "rank_pattern": dict(shape.rank_pattern),
        "alpha_pattern": dict(shape.alpha_pattern),
        "task_type": "CAUSAL_LM",
    }
