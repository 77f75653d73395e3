"""The base model: loading it (once per process, frozen), and packing token rows for its forward pass."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastconv.chat import ChatTokenizer
from fastconv.engine import attention, unsloth
from fastconv.engine.attention import OTHER_BASE, to_device
from fastconv.engine.attention_backends import SDPA, Backend, pick_attention
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.family import NO_RULES, Head, Rules, refuse_beyond, rules_of
from fastconv.engine.locate import (
    TINY,
    ModelSource,
    downloaded_weights,
    engine_identity,
    locate,
    model_folder,
    require_rows_for_tokens,
)
from fastconv.engine.optim import load_four_bit
from fastconv.engine.shapes import shape_of
from fastconv.errors import ModelError, shown
from fastconv.recipe import ModelSettings, sha256_of
from fastconv.startup import StartTimes, reading_ahead, uncollected

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)
#: What transformers raises for a config or weights that are not what they should be.
_BROKEN_CONFIG = (
    OSError, ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError, AssertionError,
)  # fmt: skip
#: Characters of a library's own message that are told.
_LONGEST_REASON = 240


@dataclass
class Base:
    """A frozen causal language model with its tokenizer. `name` is the sha256 of its identity; weights are never
    changed."""

    model: PreTrainedModel
    tokenizer: ChatTokenizer
    name: str
    device: torch.device
    dtype: torch.dtype
    #: The attention implementation for packed rows on this device.
    attention: Backend = SDPA
    #: What its family computes beyond a plain decoder.
    rules: Rules = NO_RULES
    #: What is kept on the device from one stage to the next for speed alone, by name; its length is 0 where it holds no
    #: memory.
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def drop_kept(self) -> bool:
        """Free what is kept for speed alone, where memory ran out; whether it held any."""
        had = any(len(held) for held in self.kept.values())
        self.kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return had

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; in some families `get_decoder` is the head itself."""
        decoder = self.model.get_decoder()
        return self.model.base_model if isinstance(decoder, nn.Linear) else decoder

    @property
    def head(self) -> nn.Linear:
        """The output projection, weight [vocab, hidden]; in tied models it is the embedding's tensor."""
        return self.model.get_output_embeddings()  # pyright: ignore[reportReturnType]

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, layout: attention.Layout) -> torch.Tensor:
        """Final hidden states [T, hidden] of tokens `ids` [T] int64 at `positions` [T] int64 under a layout."""
        out = self.backbone(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
        return out.last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] fp32 of hidden states [n, hidden]."""
        return self.readout.logits(hidden).float()

    @property
    def readout(self) -> Head:
        """The head with its bias, scale and cap, as logits and losses need it."""
        return Head(self.head.weight, self.head.bias, self.rules.scale, self.rules.cap)

    def require_length(self, n_tok: int) -> None:
        """Raise ModelError if a row of `n_tok` tokens cannot be packed on this base without changing its numbers."""
        if 0 < self.rules.longest_tok < n_tok:
            raise ModelError(
                f"a row of {n_tok} tokens is longer than {self.rules.longest_tok}, where {self.rules.longest_because}",
                where="model.id",
                fix=f"lower max_length_tok and max_new_tok until no row has over {self.rules.longest_tok} tokens, or use "
                "another base",
            )


def resolve_device(settings: ModelSettings) -> torch.device:
    """The device named in stage keys. Raises ModelError if torch cannot use it."""
    device = engine_identity(settings)["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "no GPU can be used",
            where="model.device",
            fix="check the driver with nvidia-smi, or set model.device = 'cpu'",
        )
    return torch.device(device)


def resolve_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype named in stage keys."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[engine_identity(settings)["dtype"]]


def load_base(settings: ModelSettings, source: ModelSource | None = None, times: StartTimes | None = None) -> Base:
    """Load the recipe's base model, frozen and in evaluation mode, proven against transformers (`engine.proof`).

    The seconds of it are added to `times`. Raises ModelError if it cannot be loaded, or if what fastconv computes with it is
    not what transformers computes. Raises TrainingError if its logits are not finite.
    """
    from fastconv.engine.proof import require_proof

    source, times = source or locate(settings), times or StartTimes()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if source.id == TINY:
        torch.set_num_threads(1)  # two threads would mostly wait for each other on so small a model
    with times.part("import_s"), reading_ahead(downloaded_weights(source, settings)), uncollected():
        _import_libraries(settings)
    with times.part("load_s"):
        model = _load_for_engine(settings, source)
        tokenizer = ChatTokenizer(model_folder(source, settings), settings)
        n_rows = next(model.get_input_embeddings().parameters()).shape[0]
        require_rows_for_tokens(tokenizer.vocab_size, n_rows, source.id)
        _set_pad_token(model, tokenizer, source.id)
        base = make_base(model, tokenizer, sha256_of(dict(source.identity)))
    with times.part("proof_s"):
        require_proof(base, engine_identity(settings))
    return base


def _import_libraries(settings: ModelSettings) -> None:
    """Import what the recipe's engine loads a base with: Unsloth before transformers, which it patches."""
    if engine_identity(settings)["engine"] == "unsloth":
        unsloth.require_usable(resolve_device(settings), resolve_dtype(settings))
        unsloth.import_unsloth()
    import transformers

    _ = transformers.AutoModelForCausalLM  # imported when it is first asked for


def _load_for_engine(settings: ModelSettings, source: ModelSource) -> PreTrainedModel:
    """The transformers model, loaded by the recipe's engine in its precision."""
    dtype, device = resolve_dtype(settings), resolve_device(settings)
    four_bit = settings.weights == "4bit"
    through_unsloth = engine_identity(settings)["engine"] == "unsloth"
    folder = prepare_model_folder(settings, source)
    if not (through_unsloth or four_bit):
        return load_model(settings, source, attention.ATTENTION)
    _require_every_weight(folder, check_folder(folder, four_bit=four_bit))
    with _loading_errors(folder):
        if through_unsloth:
            return unsloth.load(folder, dtype, device, four_bit=four_bit)
        attention.register()
        return load_four_bit(folder, device, attention.ATTENTION)


def _set_pad_token(model: PreTrainedModel, tokenizer: ChatTokenizer, where: str) -> None:
    """Set a pad token, with a warning, if the model has none: packed batches need none, but `generate` does."""
    pad_id = tokenizer.pad_id
    if pad_id is None:
        pad_id = tokenizer.stop_ids[-1]  # <|endoftext|> where there is one: never the end of a turn that is trained on
        _log.warning("%s: no pad token is named; %s is used", where, tokenizer.token_text(pad_id))
    model.config.pad_token_id = pad_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = pad_id


def check_folder(folder: Path, *, four_bit: bool = False) -> PretrainedConfig:
    """The config of a model folder. Raises ModelError if it already says that the model would be refused when it is loaded.

    Weights that are stored quantized are taken in bitsandbytes' 4 bits alone, where the recipe asks for 4 bits.
    """
    from transformers import AutoConfig

    _require_base_alone(folder)
    with _loading_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        refuse_beyond(config)
    given = getattr(config, "quantization_config", None)
    stored = given if isinstance(given, Mapping) else {}
    if given is not None and not (four_bit and stored.get("load_in_4bit")):
        raise ModelError(
            f"its weights are stored quantized ({stored.get('quant_method', 'by an unnamed method')}), which is not computed here",
            where=str(folder),
            fix="use the same model's weights in 16 or 32 bits; model.weights = '4bit' quantizes them when they are loaded",
        )
    return config


def check_base(folder: Path, settings: ModelSettings) -> None:
    """Raise what loading a model folder would raise, as far as it is known without reading weights: takes seconds.

    Its config, the names of its weights where they are on this disk, its tokens, and a small random copy of its family
    against transformers.
    """
    from fastconv.engine.proof import prove_family, require_tokens

    config = check_folder(folder, four_bit=settings.weights == "4bit")
    if any(folder.glob("*.safetensors")):
        _require_every_weight(folder, config)
    tokenizer = ChatTokenizer(folder, settings)
    require_tokens(tokenizer)
    with _loading_errors(folder):
        prove_family(config, tokenizer)


def load_model(settings: ModelSettings, source: ModelSource, attention_name: str) -> PreTrainedModel:
    """The transformers model on its device, with the attention of this name. Raises ModelError if it cannot be
    loaded."""
    return _load_model(
        prepare_model_folder(settings, source), resolve_dtype(settings), resolve_device(settings), attention_name
    )


def make_base(model: PreTrainedModel, tokenizer: ChatTokenizer, name: str) -> Base:
    """A Base of a loaded transformers model: freezes it, and installs fastconv's attention and fused forwards.

    Raises ModelError for a family with something that fastconv does not compute.
    """
    attention.register()
    model.config._attn_implementation = attention.ATTENTION
    rules = rules_of(model)
    model.requires_grad_(False).eval()
    first = next(model.parameters())
    if first.is_cuda and first.dtype != torch.float32:
        from fastconv.engine.kernels import layers  # imports Triton, which is not installed without a GPU

        (layers.use_fused_forwards if layers.why_not_whole(model.config) else layers.use_fused_decoder)(model)
    shape = shape_of(model.config.to_dict(), name)
    picked = pick_attention(first.device, first.dtype, shape.n_heads, shape.n_kv_heads, shape.head_dim)
    return Base(model, tokenizer, name, first.device, first.dtype, picked, rules)


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device, attention_name: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    attention.register()
    check_folder(folder)
    with _loading_errors(folder), _without_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention_name,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, found = loaded
        _require_whole(folder, found)
        nn.Module.to(model, device)  # in place, like transformers' own `to`, whose type annotation hides that
    return model


def _require_every_weight(folder: Path, config: PretrainedConfig) -> None:
    """Raise ModelError unless the files hold every weight of the model, for loaders that do not say so. Reads headers only.

    `config` is the folder's, as `check_folder` gives it.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        return  # names of quantized weights are the quantizer's, which checks them
    with _loading_errors(folder), _without_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    _require_whole(folder, loaded[1])


def _require_whole(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that the files lack: transformers draws them at random. Warns of those without a place."""
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the files lack {len(missing)} of the model's weights, which would be random numbers (the first is {missing[0]})",
            where=str(folder),
            fix="fetch it again, or check that config.json belongs to these weights",
        )
    if extra := sorted(found["unexpected_keys"]):
        _log.warning("%s: %d weights of the files have no place in the model, e.g. %s", folder, len(extra), extra[0])


def _require_base_alone(folder: Path) -> None:
    """Raise ModelError for a folder with an adapter beside the weights: transformers would load another base under it."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            "the folder holds a PEFT adapter, which transformers loads into the base without a word",
            where=str(folder),
            fix="move adapter_config.json and adapter_model.safetensors into a folder of their own; `fastconv score --adapter` "
            "takes it",
        )


@contextlib.contextmanager
def _loading_errors(folder: Path) -> Iterator[None]:
    """Turn what loading raises into a ModelError that says what to do."""
    from huggingface_hub.errors import StrictDataclassError

    where, fix = str(folder), "fetch it again, or check that it is a causal language model"
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        fix = "set model.weights = '4bit', use a smaller model, or free the GPU"
        raise ModelError("the model does not fit on this GPU", where=where, fix=fix) from None
    except ImportError as error:
        raise ModelError(
            f"it cannot be loaded without a package that is not installed: {shown(str(error), _LONGEST_REASON)}",
            where=where,
            fix="use weights in 16 or 32 bits of a family that transformers loads by itself",
        ) from error
    except KeyError as error:
        named = error.args[0] if error.args else ""
        if named == attention.ATTENTION:
            what, fix = (
                "its family chooses attention from a list of its own, where packed rows have no place",
                OTHER_BASE,
            )
            raise ModelError(what, where=where, fix=fix) from None
        raise ModelError(f"its config names {named!r}, which transformers lacks", where=where, fix=fix) from error
    except (*_BROKEN_CONFIG, StrictDataclassError) as error:
        what = shown(str(error), _LONGEST_REASON)
        if "custom code" in what:
            what = "it brings code of its own, which is never run here"
        elif "ignore_mismatched_sizes" in what:
            what = "the shapes of its weights are not those that its config.json states"
        raise ModelError(f"it cannot be loaded: {what}", where=where, fix=fix) from error


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Within the block transformers prints no report of many lines: what it found is said by `_require_whole`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def pack(
    rows: list[list[int]], base: Base, *, n_tok: int = 0, width: int = 0, n_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor, attention.Rows]:
    """Pack rows of token ids end to end: (ids [T] int64, positions [T] int64, layout), all on the base's device.

    On a GPU the layout is that of the base's attention implementation; `n_tok`, `width` and `n_rows` are lower bounds of
    its sizes (see `attention.Padded.of`).
    """
    lengths = [len(row) for row in rows]
    base.require_length(max(lengths, default=0))
    packed = attention.Packed.of(lengths)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    positions = packed.positions()
    if base.device.type != "cuda":
        return ids, positions, packed
    if base.attention.kernel is None or base.rules.pads(max(n_tok - sum(lengths), width, *lengths)):
        layout = attention.Padded.of(lengths, n_tok=n_tok, width=width, n_rows=n_rows)
    else:
        layout = attention.Ragged.of(lengths, base.attention.kernel, n_tok=n_tok, width=width, n_rows=n_rows)
    missing = layout.n_tok - ids.shape[0]
    ids, positions = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (ids, positions))
    layout = layout.with_inputs([to_device(tensor, base.device) for tensor in layout.inputs])
    return to_device(ids, base.device), to_device(positions, base.device), layout


def length_batches(lengths: list[int], batch_tok: int) -> list[list[int]]:
    """Row indices in batches of at most `batch_tok` tokens, longest rows first; a longer row is a batch of its own."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or room < lengths[index]:
            batches.append([])
            room = max(batch_tok, lengths[index])
        batches[-1].append(index)
        room -= lengths[index]
    return batches
