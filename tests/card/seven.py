"""Part seven: the pilot on a random base of 7B's shape, and from it how long a matrix would take."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastconv.engine.shapes import ModelShape, named_shape, weight_bytes
from tests.card.grid import Grid, ended, ignore_gates, run_grid
from tests.card.process import run_child
from tests.card.sheet import Job, Sheet, write_json

SHAPE = "qwen2.5-7b"
#: Written last to a base's folder.
DONE = "random.json"
_SHARD_BYTES, _SPARE_BYTES = 4 * 10**9, 2 * 10**9
#: Files of a model's folder that are about its weights, and so are not copied.
_OF_WEIGHTS = (".safetensors", ".bin", ".index.json")
#: A random head gives nearly uniform distributions, unlike a trained one (as in fastconv/bench).
_HEAD_SCALE = 8.0
_STD = 0.02


def seven(job: Job, sheet: Sheet) -> None:
    """Write the base once, run the pilot on it, and estimate the matrix."""
    folder = job.scratch / "random-7b"
    shape = tiny_shape(Path(job.model)) if job.rehearse else named_shape(SHAPE)
    needed = weight_bytes(shape) + _SPARE_BYTES
    job.scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(job.scratch).free
    if not (folder / DONE).is_file() and free < needed and not job.rehearse:
        sheet.end("skipped", f"the scratch folder has {free / 1e9:.1f} GB free, the base takes {needed / 1e9:.1f}")
        return
    command = [sys.executable, "-m", "tests.card.seven", str(folder), job.model, json.dumps(asdict(shape))]
    wrote = run_child(command, job.path("run.log"), deadline=job.deadline)
    if not wrote.ok:
        sheet.end("stopped" if wrote.killed else "failed", f"the base was not written: {wrote.killed or wrote.last}")
        return
    sheet.note(written_s=round(wrote.seconds, 1), weights_gb=round(weight_bytes(shape) / 1e9, 2))
    grid, matrix = (Grid(name, model=str(folder)) for name in ("pilot", "matrix"))
    plans = {"plan": grid, "matrix_plan": replace(matrix, workspace="matrix")}
    ran = run_grid(job, sheet, replace(grid, arguments=ignore_gates(job)), plans=plans)
    sheet.note(matrix=estimate(sheet.found["matrix_plan"], sheet.found["against_plan"], sheet.found["wall"]))
    ended(ran, sheet)


def estimate(planned: Mapping[str, Any], against: Mapping[str, Any], wall: Mapping[str, Any]) -> dict[str, Any]:
    """Hours of a recipe: its plan by kind, times what the pilot's stages of this kind took of their plan, and the pilot's seconds
    between two stages for each of its stages."""
    if "kinds" not in planned:
        return {"missing": planned.get("problem", "it was not planned")}
    taken: dict[str, list[float]] = {}
    for work, kind in against.get("kinds", {}).items():
        name = "eval" if work in ("letters", "completions") else work
        sums = taken.setdefault(name, [0.0, 0.0, 0.0])
        for place, value in enumerate((kind["planned_s"], kind["taken_s"], kind["n"])):
            sums[place] += value
    rows = []
    for kind in planned["kinds"]:
        planned_s, taken_s, n = taken.get(kind["kind"], (0.0, 0.0, 0))
        ratio = taken_s / planned_s if planned_s else None
        rows.append({
            "kind": kind["kind"], "n": kind["n"], "planned_s": round(kind["seconds"], 1),
            "ratio": None if ratio is None else round(ratio, 3),
            "from": f"{taken_s:.1f} s taken / {planned_s:.1f} s planned over {n:.0f} stages" if planned_s else "taken as planned",
            "seconds": round(kind["seconds"] * (1.0 if ratio is None else ratio), 1),
        })  # fmt: skip
    n_stages = sum(kind["n"] for kind in planned["kinds"])
    per_stage_s = wall.get("between_stages_s", 0.0) / max(1, wall.get("stages", 0))
    start_s = against.get("start", {}).get("taken_s") or 0.0
    seconds = sum(row["seconds"] for row in rows) + n_stages * per_stage_s + start_s
    return {
        "kinds": rows, "start_s": start_s, "stages": n_stages, "between_a_stage_s": round(per_stage_s, 4),
        "hours": round(seconds / 3600, 3), "planned_hours": round(planned["hours"], 3),
        "arithmetic": "sum of planned_s x ratio over kinds + stages x between_a_stage_s + start_s, over 3600",
    }  # fmt: skip


def tiny_shape(model: Path) -> ModelShape:
    """A small shape with the vocabulary of a folder, for rehearsals."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    return ModelShape("rehearsal", 2, 64, 128, 4, 2, 16, vocab, False, True)


def write_base(folder: Path, model: Path, shape: ModelShape) -> None:
    """Write random bf16 weights of a Qwen2 shape in shards, with the tokenizer of `model`, which must be a Qwen2 too."""
    import torch
    from safetensors.torch import save_file

    if (folder / DONE).is_file() and json.loads((folder / DONE).read_text()) == asdict(shape):
        return
    config = json.loads((model / "config.json").read_text())
    if config.get("model_type") != "qwen2":
        raise SystemExit(f"{model} is no Qwen2, whose configuration this base takes over")
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_OF_WEIGHTS):
            shutil.copy(path, folder / path.name)
    for name in ("layer_types", "head_dim", "quantization_config", "_name_or_path"):
        config.pop(name, None)
    config |= {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads, "num_key_value_heads": shape.n_kv_heads, "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied, "max_window_layers": shape.n_layers, "dtype": "bfloat16",
    }  # fmt: skip
    config.pop("torch_dtype", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    n_shards = size = total = 0

    def close() -> None:
        nonlocal n_shards, size
        n_shards += 1
        name = f"model-{n_shards:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, sizes, std in tensors(shape):
        if std is None:
            drawn = torch.ones(sizes, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator).cpu()
        shard[name] = drawn
        size, total = size + drawn.nbytes, total + drawn.nbytes
        if size > _SHARD_BYTES:
            close()
    if shard:
        close()
    write_json(folder / "config.json", config)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / DONE, asdict(shape))


def tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, sizes and standard deviation (None: ones) of every tensor of a Qwen2."""
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden), _STD
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    for layer in range(shape.n_layers):
        at = f"model.layers.{layer}"
        for part, (n_in, n_out) in zip(parts, shape.modules, strict=True):
            yield f"{at}.{part}.weight", (n_out, n_in), _STD
            if part[10:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{at}.{part}.bias", (n_out,), _STD
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", (shape.hidden,), None
    yield "model.norm.weight", (shape.hidden,), None
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden), _STD * _HEAD_SCALE


if __name__ == "__main__":
    write_base(Path(sys.argv[1]), Path(sys.argv[2]), ModelShape(**json.loads(sys.argv[3])))
