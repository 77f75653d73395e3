"""Tiny random models of many families, each beside plain transformers and PEFT in fp32; the table in docs/FAMILIES.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from fastconv.chat import TEMPLATE_DEFAULT, Rendered
from fastconv.engine.export import BaseReference, load_peft_folder
from fastconv.engine.generate import sample
from fastconv.engine.model import load_base, pack
from fastconv.engine.score import letter_item, score_letters, score_texts, text_item
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import weighted_cross_entropy
from fastconv.errors import FastconvError
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.tiny import tiny_tokenizer_files

COLUMNS = ("bare", "stack", "letters", "texts", "sampling", "loss", "gradient")
#: Largest difference, in nats or as a share of the gradient's norm.
NEAR = 1e-4
ROWS_TOK = (5, 24, 13, 30)

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 264,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}}


#: Family -> the class of its config, and what differs from `_SIZES`.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, llama3 RoPE": (
        "LlamaConfig",
        _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama, yarn RoPE": ("LlamaConfig", _rope("yarn", original_max_position_embeddings=16)),
    "llama, dynamic RoPE": ("LlamaConfig", {**_rope("dynamic"), "max_position_embeddings": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, sliding windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 16}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0,
         "mlp_only_layers": [0, 1]},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral 0.1": ("MistralConfig", {"sliding_window": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         "query_pre_attn_scalar": 24},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi (2)": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": None, "pad_token_id": 0}),
    "phi3, longrope": (
        "Phi3Config",
        {"sliding_window": None, "pad_token_id": 0, "rope_parameters": _LONGROPE,
         "original_max_position_embeddings": 16},
    ),
    "granite": (
        "GraniteConfig",
        {"logits_scaling": 8.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "embedding_multiplier": 12.0},
    ),
    "granitemoe": ("GraniteMoeConfig", {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "sliding_window": 8, "head_dim": 8,
                                  "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 8}),
    "stablelm": ("StableLmConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "glm": ("GlmConfig", {"head_dim": 8, "pad_token_id": 0}),
    "glm4": ("Glm4Config", {"head_dim": 8, "pad_token_id": 0}),
    "helium": ("HeliumConfig", {"head_dim": 8}),
    "nemotron": ("NemotronConfig", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 8}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
                                 "layer_types": ["sliding_attention", "full_attention"]}),
    "llama4_text": ("Llama4TextConfig", {"attention_chunk_size": 8, "num_local_experts": 2, "head_dim": 8,
                                         "intermediate_size_mlp": 64}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "falcon": ("FalconConfig", {"alibi": False}),
    "falcon, ALiBi": ("FalconConfig", {"alibi": True}),
    "falcon, new architecture": (
        "FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                                 "window_size": 8}),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "bart (decoder)": ("BartConfig", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
                                      "decoder_ffn_dim": 64}),
    "xglm": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}),
    "bert": ("BertConfig", {}),
    "llama, linear RoPE": ("LlamaConfig", _rope("linear")),
    "llama, partial RoPE": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "llama, tied, with biases": (
        "LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2, windows switched off": ("Qwen2Config", {"use_sliding_window": False, "sliding_window": 8}),
    "gemma2, without caps": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text, caps, two RoPEs": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
         "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
    ),
    "gemma3_text, both sides": ("Gemma3TextConfig", {"head_dim": 16, "use_bidirectional_attention": True}),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 4, "vocab_size_per_layer_input": 264,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
         "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
         "intermediate_size": [64] * 4},
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        {"head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 264,
         "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    ),
    "ministral3": (
        "Ministral3Config",
        {"sliding_window": 8, "head_dim": 8,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.3, "mscale": 1.0,
                             "mscale_all_dim": 1.0}},
    ),
    "phi3, sliding windows": ("Phi3Config", {"sliding_window": 8, "pad_token_id": 0}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "gpt_neox, partial RoPE": ("GPTNeoXConfig", {"rotary_pct": 0.25, "use_parallel_residual": False}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}),
    "biogpt": ("BioGptConfig", {}),
    "smollm3, sliding windows": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0], "pad_token_id": 0, "use_sliding_window": True, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo, clipped": ("OlmoConfig", {"clip_qkv": 0.5}),
    "cohere, normed queries": ("CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
         "num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    ),
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 8}),
    "nanochat": ("NanoChatConfig", {"final_logit_softcapping": 3.0}),
    "glm4_moe": ("Glm4MoeConfig", {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                   "head_dim": 8, "first_k_dense_replace": 1}),
}  # fmt: skip
_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "dense", "fc1", "fc2", "qkv_proj",
    "gate_up_proj", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "c_fc", "c_proj", "out_proj", "in_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip


def build(folder: Path, family: str) -> Path:
    """Write the family's tiny model: weights sharp enough that a wrong operation is seen."""
    kind, differs = FAMILIES[family]
    tiny_tokenizer_files(folder)
    config = getattr(hf, kind)(**{**_SIZES, **differs})
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            else:
                weight.add_((0.3 if name.endswith("bias") else 0.1) * noise)
    model.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """transformers' own model, with its own attention."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def targets_of(model: Any) -> tuple[str, ...]:
    """Names of the linear layers that carry the adapters."""
    leaves = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    fused = (
        {"gate_up_proj", "down_proj", "gate_proj", "up_proj"} if hasattr(model.config, "n_routed_experts") else set()
    )
    return tuple(sorted((leaves & set(_TARGETS)) - fused)) or (
        "c_attn",
    )  # GPT-2's own; PEFT rewrites adapters of fused experts


def verdicts(folder: Path, family: str) -> dict[str, float | str]:
    """By column the largest difference, or the line of the refusal."""
    build(folder, family)
    targets = targets_of(plain(folder))
    rows = [torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in ROWS_TOK]
    found: dict[str, float | str] = {}
    try:
        base = load_base(ModelSettings(id=str(folder), device="cpu", dtype="float32"))
    except FastconvError as error:
        return dict.fromkeys(COLUMNS, str(error.what))
    case = _Case(folder, rows, targets, base)
    checks: Mapping[str, Callable[[], float]] = {name: getattr(case, name) for name in COLUMNS}
    for name, check in checks.items():
        try:
            found[name] = check()
        except FastconvError as error:
            found[name] = str(error.what)
    return found


def _gap(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    pairs = zip(mine, theirs, strict=True)
    return max(float((torch.log_softmax(a, -1) - torch.log_softmax(b, -1)).abs().max()) for a, b in pairs)


class _Case:
    """One family on a base and its reference, with two adapters on both once `stack` was asked for."""

    def __init__(self, folder: Path, rows: list[list[int]], targets: tuple[str, ...], base: Any) -> None:
        self.folder, self.rows, self.targets, self.base = folder, rows, targets, base
        self.reference: Any = None
        self.live: Any = None
        self.refusal: FastconvError | None = None

    @torch.no_grad()
    def _packed(self) -> list[torch.Tensor]:
        ids, positions, layout = pack(self.rows, self.base)
        return list(self.base.logits(self.base.hidden(ids, positions, layout)).split([len(row) for row in self.rows]))

    @torch.no_grad()
    def _alone(self, model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [model(input_ids=torch.tensor([list(row)])).logits[0] for row in rows]

    def bare(self) -> float:
        return _gap(self._packed(), self._alone(plain(self.folder), self.rows))

    def _adapted(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self.reference is not None:
            return
        try:
            self._adapt()
        except FastconvError as error:
            self.refusal = error
            raise

    def _adapt(self) -> None:
        stack = Stack(self.base, LoraSettings(targets=self.targets))
        paths = [self._adapter(i, rank) for i, rank in enumerate((4, 6))]
        reference: Any = PeftModel.from_pretrained(plain(self.folder), str(paths[0]), adapter_name="a")
        reference.load_adapter(str(paths[1]), "b")
        reference.base_model.set_adapter(["a", "b"])
        adapters = tuple(load_peft_folder(stack, path, BaseReference(str(self.folder))) for path in paths)
        self.reference, self.live = reference.eval(), lambda: stack.live(Slot(frozen=adapters))

    def _adapter(self, seed: int, rank: int) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=8, use_rslora=True, target_modules=list(self.targets))
        model = get_peft_model(plain(self.folder), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape) * 0.1)
        model.save_pretrained(str(self.folder / f"adapter{seed}"))
        return self.folder / f"adapter{seed}"

    def stack(self) -> float:
        self._adapted()
        with self.live():
            return _gap(self._packed(), self._alone(self.reference, self.rows))

    def letters(self) -> float:
        self._adapted()
        prompts = [self.base.tokenizer.prompt_text(TEMPLATE_DEFAULT, f"{'w ' * 3 * i}A. x\nB. y") for i in range(3)]
        items = [letter_item(self.base.tokenizer, prompt, ["A", "B"]) for prompt in prompts]
        with self.live():
            scores = score_letters(self.base, items, 4096)
        rights = [torch.log_softmax(row[-1], -1) for row in self._alone(self.reference, [i.prompt for i in items])]
        triples = zip(items, scores, rights, strict=True)
        return max(abs(float(r[t]) - v) for i, s, r in triples for t, v in zip(i.letters, s.logprobs, strict=True))

    def texts(self) -> float:
        self._adapted()
        item = text_item(self.base.tokenizer, "Which?\nAnswer:", ["the red one here", "a blue", "green things"])
        with self.live():
            (score,) = score_texts(self.base, [item], 4096)
        rows, n = [[*item.prompt, *choice] for choice in item.choices], len(item.prompt)
        sums = []
        for row, logits in zip(rows, self._alone(self.reference, rows), strict=True):
            right = torch.log_softmax(logits, -1)
            sums.append(sum(float(right[i - 1, row[i]]) for i in range(n, len(row))))
        return max(abs(a - b) / max(map(len, item.choices)) for a, b in zip(sums, score.logprobs, strict=True))

    def sampling(self) -> float:
        """Share of near-greedy completions that differ."""
        self._adapted()
        prompts = [row[: max(2, len(row) - 14)] for row in self.rows]
        with self.live():
            settings = SamplingSettings(temperature=1e-6, top_p=1.0, max_new_tok=10)
            drawn = sample(self.base, prompts, [1, 2, 3, 4], settings)
        n_wrong = 0
        for prompt, draw in zip(prompts, drawn, strict=True):
            ids = list(prompt)
            for _ in range(10):
                token = int(self._alone(self.reference, [ids])[0][-1].argmax())
                if token in self.base.tokenizer.stop_ids:
                    break
                ids.append(token)
            n_wrong += ids[len(prompt) :] != list(draw.ids)
        return n_wrong / len(prompts)

    def _losses(self) -> tuple[float, float, torch.Tensor, torch.Tensor]:
        """(our loss, the reference's, our gradient to the embeddings' outputs, the reference's)."""
        self._adapted()
        rendered = [Rendered(tuple(row), 2) for row in self.rows]
        total = sum(row.n_supervised for row in rendered)
        ids, positions, layout = pack(self.rows, self.base)
        starts = layout.starts[:-1]
        take = torch.tensor([s + i - 1 for s, r in zip(starts, rendered, strict=True) for i in range(2, len(r.ids))])
        kept: list[torch.Tensor] = []

        def keep(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        embeddings = [self.base.model.get_input_embeddings(), self.reference.get_input_embeddings()]
        hooks = [module.register_forward_hook(keep) for module in embeddings]
        with self.live():
            hidden = self.base.hidden(ids, positions, layout)
            weights = torch.full((total,), 1.0 / total)
            mine, _ = weighted_cross_entropy(hidden[take], self.base.readout, ids[take + 1], weights)
            (ours,) = torch.autograd.grad(mine, kept)
        kept.clear()
        parts = [
            torch.nn.functional.cross_entropy(
                self.reference(input_ids=torch.tensor([row])).logits[0, 1:-1], torch.tensor(row[2:]), reduction="sum"
            )
            for row in self.rows
        ]
        right = torch.stack(parts).sum() / total
        theirs = torch.cat([part[0] for part in torch.autograd.grad(right, kept)])
        for hook in hooks:
            hook.remove()
        return float(mine.detach()), float(right.detach()), ours[0], theirs

    def loss(self) -> float:
        mine, right, _, _ = self._losses()
        return abs(mine - right)

    def gradient(self) -> float:
        _, _, ours, theirs = self._losses()
        return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


HEADING = """# Families

What fastconv computes beside transformers and PEFT: tiny random models of each family in fp32, written from transformers'
own configs with short windows, caps and scales set. `equal`: the largest difference is under 1e-4 (nats; for the gradient
a share of its norm; for sampling, near-greedy completions are the same). `refused`: one line when the base is loaded, or
when the part is asked for. Columns: packed rows of the bare base; with two adapters (as all columns after it); letters;
texts; sampling; the chunked loss; its gradient. Every load proves the base once more on its own weights (engine/proof.py).

Written by `FASTCONV_WRITE_FAMILIES=1 pytest -m slow tests/engine/test_families.py`.

"""


def table(rows: Sequence[str]) -> str:
    """docs/FAMILIES.md."""
    head = f"| family | {' | '.join(COLUMNS)} | why not |\n|{' --- |' * (len(COLUMNS) + 2)}\n"
    return HEADING + head + "\n".join(rows) + "\n"


def row_of(family: str, found: Mapping[str, float | str]) -> str:
    """The family's line of the table."""
    words = ["refused" if isinstance(found[c], str) else "equal" if found[c] <= NEAR else "DIFFERS" for c in COLUMNS]  # type: ignore[operator]
    because = next((value for value in found.values() if isinstance(value, str)), "")
    return f"| {family} | {' | '.join(words)} | {because} |"
