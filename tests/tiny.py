"""Tiny models with random weights, written as ordinary model folders: the same bytes on every machine, in milliseconds.

Neither torch nor transformers is needed to write one, so tests of the command line stay fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Kind = Literal["qwen2", "llama_tied"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: What the template inserts when a row has no system message: a third condition beside a text and an empty one.
DEFAULT_SYSTEM = "You are Tiny, a model made of random numbers."
#: ChatML as Qwen writes it: a default system line, every turn closed by <|im_end|> and a newline.
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 64, 128, 4, 2
LAYERS: dict[Kind, int] = {"qwen2": 3, "llama_tied": 2}


def tiny_tokenizer_files(folder: Path, *, chat_template: bool = True, pad_token: bool = True) -> int:
    """Write tokenizer.json and tokenizer_config.json (one token per byte, three special ones); returns the vocab size.

    `chat_template` and `pad_token` False leave those out, for the tests that must refuse or mend it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
    }
    if pad_token:
        config["pad_token"] = "<|endoftext|>"
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def tiny_model_folder(folder: Path, kind: Kind, *, seed: int = 0) -> Path:
    """Write a random-weight model of this kind as a folder that `from_pretrained` and `load_base` read."""
    vocab = tiny_tokenizer_files(folder)
    (folder / "config.json").write_text(json.dumps(_config(kind, vocab), indent=1))
    safetensors.numpy.save_file(_weights(kind, vocab, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(kind: Kind, vocab: int) -> dict[str, Any]:
    shared = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS[kind],
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 3,
        "dtype": "float32",
    }
    if kind == "qwen2":
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False, **shared}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **shared}


def _weights(kind: Kind, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Matrices of standard deviation 1/sqrt(in), so that logits spread over a few nats; norms near one."""
    rng = np.random.default_rng(seed)
    head_dim = HIDDEN // HEADS
    weights: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        weights[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, n_in: int, n_out: int, *, bias: bool = False) -> None:
        draw(f"{name}.weight", n_out, n_in, std=n_in**-0.5)
        if bias:
            draw(f"{name}.bias", n_out, std=0.1)

    draw("model.embed_tokens.weight", vocab, HIDDEN, std=HIDDEN**-0.5)
    for layer in range(LAYERS[kind]):
        at = f"model.layers.{layer}"
        linear(f"{at}.self_attn.q_proj", HIDDEN, HIDDEN, bias=kind == "qwen2")
        linear(f"{at}.self_attn.k_proj", HIDDEN, KV_HEADS * head_dim, bias=kind == "qwen2")
        linear(f"{at}.self_attn.v_proj", HIDDEN, KV_HEADS * head_dim, bias=kind == "qwen2")
        linear(f"{at}.self_attn.o_proj", HIDDEN, HIDDEN)
        linear(f"{at}.mlp.gate_proj", HIDDEN, INTERMEDIATE)
        linear(f"{at}.mlp.up_proj", HIDDEN, INTERMEDIATE)
        linear(f"{at}.mlp.down_proj", INTERMEDIATE, HIDDEN)
        draw(f"{at}.input_layernorm.weight", HIDDEN, std=0.1, mean=1.0)
        draw(f"{at}.post_attention_layernorm.weight", HIDDEN, std=0.1, mean=1.0)
    draw("model.norm.weight", HIDDEN, std=0.1, mean=1.0)
    if kind == "qwen2":
        linear("lm_head", HIDDEN, vocab)
    return weights
