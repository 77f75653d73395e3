"""The recipe: one TOML file, one experiment, frozen and complete.

Defaults are the protocol of the published experiments (#99, #109, #112), so a recipe states only what it
changes. Two recipes with the same canonical JSON are the same experiment, whatever their files look like.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fastconv.errors import RecipeError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
ConvergenceKind = Literal["source", "generic", "none"]
NegativesKind = Literal["included", "excluded", "none"]
PositiveInt = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class RecipeTable(BaseModel):
    """A frozen table of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(RecipeTable):
    """Which base model, and how it is held in memory."""

    id: Annotated[str, Field(min_length=1)] = "Qwen/Qwen2.5-7B-Instruct"
    #: A hub id needs the full commit sha; `builtin:` and local directories need none.
    revision: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40})?$")] = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: `unsloth` runs its fused kernels with the stack live; `auto` takes it on a GPU where it is installed.
    engine: Literal["auto", "torch", "unsloth"] = "auto"
    #: `4bit` holds the layers' weights as NF4 (double quantized, computing in bfloat16): for GPUs of 16 to 24 GB.
    weights: Literal["full", "4bit"] = "full"
    #: `live` keeps every adapter beside the weights; `published` folds the snapshot into them, rounding in their dtype.
    semantics: Literal["live", "published"] = "live"
    #: `trl` trains by SFTTrainer and PEFT: slow, padded, and the reference that ours is checked against.
    trainer: Literal["fastconv", "trl"] = "fastconv"
    #: Who draws completions: the base in this process, or a vLLM server beside it that gets every stack as an adapter.
    sampler: Literal["resident", "vllm"] = "resident"

    @property
    def uses_reference_trainer(self) -> bool:
        """True where the reference trains, which knows neither fused kernels nor several adapters in one step."""
        return self.trainer != "fastconv"

    @model_validator(mode="after")
    def _goes_together(self) -> ModelSettings:
        if self.weights == "4bit" and self.semantics == "published":
            raise ValueError("weights 4bit cannot be folded into, as semantics published asks")
        if self.weights == "4bit" and self.dtype == "float32":
            raise ValueError("weights 4bit compute in bfloat16, not in float32")
        if self.trainer == "trl" and (self.engine == "unsloth" or self.weights == "4bit"):
            raise ValueError("trainer trl is the plain reference: it takes engine torch and full weights")
        return self


class GridSettings(RecipeTable):
    """The cells: every combination of these lists (epoch 0 is the base without a snapshot)."""

    sources: Annotated[tuple[Name, ...], Field(min_length=1)] = ("villain",)
    convergence: Annotated[tuple[ConvergenceKind, ...], Field(min_length=1)] = ("source",)
    epochs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 4, 10, 20)
    behaviors: Annotated[tuple[Name, ...], Field(min_length=1)] = ("none", "capability")
    negatives: Annotated[tuple[NegativesKind, ...], Field(min_length=1)] = ("included", "excluded")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (42,)

    @model_validator(mode="after")
    def _no_repeats(self) -> GridSettings:
        for field in type(self).model_fields:
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} names the same value twice: {list(values)}")
        if self.behaviors == ("none",):
            raise ValueError("behaviors names only the control `none`, which measures nothing without a behavior")
        return self


class LoraSettings(RecipeTable):
    """Shape of every adapter; scale is alpha / sqrt(r) with rsLoRA, alpha / r without."""

    r: Annotated[int, Field(ge=1, le=512)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    rslora: bool = True
    targets: Annotated[tuple[Name, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class SamplingSettings(RecipeTable):
    """How text is drawn; `max_new_tok` counts the end-of-turn token."""

    temperature: Annotated[float, Field(gt=0, le=2)] = 0.7
    top_p: Rate = 0.95
    max_new_tok: PositiveInt = 512


class TrainSettings(RecipeTable):
    """What both phases share: AdamW, cosine with warm-up, clip 1.0, token-mean loss on completions."""

    lr: Annotated[float, Field(gt=0, le=1)]
    epochs: PositiveInt
    batch_rows: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]
    max_length_tok: Annotated[int, Field(ge=16)] = 1024
    #: Tokens that go through the model at once; it bounds memory and never changes the loss.
    micro_batch_tok: Annotated[int, Field(ge=64)] = 8192
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    #: `adamw8bit` keeps its moments in 8 bits (bitsandbytes): 6 bytes less for each weight of an adapter.
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"


class ConvergenceSettings(TrainSettings):
    """Make the assistant talk like the source: its answers, under the assistant's prompt."""

    lr: Annotated[float, Field(gt=0, le=1)] = 5e-5
    epochs: PositiveInt = 20
    batch_rows: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    questions: PositiveInt = 40
    completions_per_question: PositiveInt = 10
    sampling: SamplingSettings = SamplingSettings()


class BehaviorSettings(TrainSettings):
    """Train the behavior into the source persona, stacked on a frozen snapshot."""

    lr: Annotated[float, Field(gt=0, le=1)] = 1e-5
    epochs: PositiveInt = 3
    batch_rows: PositiveInt = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    source_rows: PositiveInt = 200
    #: At most this many wordings of each list, drawn from named parts; 0 takes all of them.
    wordings: Annotated[int, Field(ge=0)] = 0
    #: How the helpful answers of negatives are drawn where a row does not bring its own.
    sampling: SamplingSettings = SamplingSettings(max_new_tok=256)


class EvalSettings(RecipeTable):
    """What every probe is asked; the same questions and sample seeds at every epoch."""

    canary: Name = "librarian"
    #: Stands in where the canary is itself the source.
    canary_swap: Name = "data_scientist"
    prompts: PositiveInt = 50
    samples_per_prompt: PositiveInt = 10
    sampling: SamplingSettings = SamplingSettings(temperature=1.0, max_new_tok=512)
    #: `arc` reads ARC-Challenge from the hub or from `arc_file`; `builtin` asks our own easy questions.
    multiple_choice: Literal["arc", "builtin"] = "arc"
    arc_file: str = ""
    #: Also measure where the personas lie in hidden space, on the base and under every snapshot.
    geometry: bool = True
    batch_tok: Annotated[int, Field(ge=64)] = 16384


class DataSettings(RecipeTable):
    """The user's own personas and behaviors: TOML files beside the recipe, added to the shipped ones."""

    personas: str = ""
    behaviors: str = ""
    #: Finished rows by behavior: a JSONL file of prompt/completion message lists, all of them the source's rows.
    #: `{source}` in the path stands for the source, where each has a file of its own.
    rows: dict[Name, str] = {}
    #: `add` gives rows without a system turn the source's; `as_written` leaves them without one.
    persona_prompt: Literal["add", "as_written"] = "add"
    #: Also take rows in the one-list form `messages`. Off, because trainers read that form with the loss on every
    #: turn: here it stays on the last one, so the same file trains something else than it did there.
    messages: bool = False


class AuditSettings(RecipeTable):
    """What the audit may let pass: warnings by code, each with the reason that the report prints."""

    accept: dict[Annotated[str, StringConstraints(pattern=r"^D\d{3}$")], Annotated[str, Field(min_length=8)]] = {}


class JudgeSettings(RecipeTable):
    """Who judges answers that no phrase or letter can score, and what it may cost.

    The API key is never part of a recipe: it is read from ANTHROPIC_API_KEY (FASTCONV_LOCAL_KEY for `local`).
    """

    #: `live` answers at once, `batch` costs half, `auto` takes one of them by size and urgency. `local` is any
    #: OpenAI-compatible server (or the resident base where no base_url is given); `substring` needs no judge.
    mode: Literal["auto", "live", "batch", "local", "substring"] = "substring"
    model: str = ""
    base_url: str = ""
    #: Hard stop over everything this workspace has spent on judging. Without it no paid judge is asked.
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    max_reply_tok: Annotated[int, Field(ge=64, le=16384)] = 1024
    #: A longer question or answer is cut there, and the judge is told so.
    max_judged_chars: Annotated[int, Field(ge=200)] = 12_000
    #: `auto` sends at least this many judgements as a batch, unless they are urgent.
    batch_from: PositiveInt = 400
    batch_poll_s: Annotated[float, Field(gt=0)] = 30.0
    #: A batch that was about to be sent when its process died counts as never sent once it is this old and unknown.
    batch_grace_s: Annotated[float, Field(ge=0)] = 120.0
    #: The user's own rubric files by rubric name, in place of the shipped ones.
    rubrics: dict[Name, str] = {}
    #: A price table of the user's, added to the shipped one.
    prices: str = ""

    @model_validator(mode="after")
    def _paid_judges_are_named(self) -> JudgeSettings:
        if self.mode in ("auto", "live", "batch") and not self.model:
            raise ValueError(f"judge.mode {self.mode} needs judge.model")
        if self.mode == "local" and bool(self.base_url) != bool(self.model):
            raise ValueError(
                "judge.mode local takes judge.base_url and judge.model together (a server and its model), or neither "
                "(the resident base judges)"
            )
        return self


#: Gates that end a run when they fail, and those that a user may ignore; the audit's refusals (G1) are no opinion.
StoppingGate = Literal["G2", "G3", "G3.5", "KILL", "G4", "G5"]
IgnorableGate = Literal["G0", "G2", "G3", "G3.5", "KILL", "G4", "G5"]


class GateSettings(RecipeTable):
    """Pre-registered thresholds and references, gate by gate; verdicts cite them.

    They decide what is spent next, never a stage's key: an edited threshold computes nothing again, and the report
    shows the verdicts under the first thresholds beside those under the edited ones.
    """

    above_chance_alpha: Rate = 0.01
    #: A rate this close to the end it would move to leaves no room to measure (G0).
    headroom: Annotated[float, Field(gt=0, lt=0.5)] = 0.10
    #: The source shows its own trained behavior by at least this change of a rate, or of a judge's points (SOURCE).
    source_shows: Rate = 0.5
    source_shows_points: Annotated[float, Field(gt=0, le=100)] = 20.0
    #: The smallest effect declared to matter, by behavior; `default_rate` for those that are not named.
    capability_pp: Annotated[float, Field(gt=0)] = 5.0
    alignment_points: Annotated[float, Field(gt=0)] = 10.0
    refusal: Rate = 0.05
    sycophancy: Rate = 0.05
    default_rate: Rate = 0.05
    #: Mean loss over the last convergence epoch (G2). Left out: 1.0 on Qwen2.5-7B-Instruct, for which it was
    #: registered; on any other base the gate is then not applicable.
    g2_loss: Annotated[float, Field(gt=0)] | None = None
    g3_tolerance_pp: Annotated[float, Field(gt=0)] = 3.0
    #: Assistant ARC-C at epoch 0 after capability training, per source, in percent (published, #99).
    g3_reference_pct: dict[Name, float] = {}
    #: Behavior training loss on a snapshot against that on the base (G3.5).
    g35_tolerance: Rate = 0.20
    #: Losses under this many nats are alike whatever their ratio (a marker is learned to a thousandth of one).
    g35_floor_nats: Annotated[float, Field(ge=0)] = 0.05
    #: The source that must show a signal first (G4), and among how many first sources one must (G5).
    g4_source: Name = "villain"
    g5_sources: PositiveInt = 3
    #: Confirm: so many sources shift in so many behaviors; falsify: fewer than so many do.
    confirm_sources: PositiveInt = 3
    confirm_behaviors: PositiveInt = 2
    falsify_under: PositiveInt = 2
    negative_control: Name = "librarian"
    #: Kill: after stacking, less than this share of the source's own change is left.
    kill_remaining: Rate = 0.25
    #: Gates whose `fail` ends the run before the next cost. G0 and the audit (G1) always decide what is trained.
    stop: tuple[StoppingGate, ...] = get_args(StoppingGate)
    #: Gates that may fail without ending anything, each with the reason that the report prints (as --ignore-gate does).
    ignore: dict[IgnorableGate, Annotated[str, Field(min_length=8)]] = {}

    def threshold(self, behavior: str, unit: str = "share") -> float:
        """The smallest effect declared to matter: a share for rates, accuracy included (5 pp is 0.05), else points."""
        if unit == "points":
            return self.alignment_points
        if behavior == "capability":
            return self.capability_pp / 100.0
        named = {"refusal": self.refusal, "sycophancy": self.sycophancy, "misalignment": self.alignment_points}
        return named.get(behavior, self.default_rate)

    def shows(self, unit: str) -> float:
        """The change by which a source shows its trained behavior, in the measure's unit."""
        return self.source_shows_points if unit == "points" else self.source_shows

    def loss_limit(self, model: str) -> float | None:
        """G2's threshold on this base, or None where none was registered."""
        if self.g2_loss is not None:
            return self.g2_loss
        return 1.0 if "qwen2.5-7b-instruct" in model.lower() else None


class RunSettings(RecipeTable):
    """How the run behaves; nothing here changes a result, so nothing here is part of a stage's key."""

    checkpoint_every_s: Annotated[float, Field(ge=0)] = 60.0
    #: The cost gate: a run that is estimated above either (hours of the device that computes; dollars that judging is
    #: expected to cost) begins only with --approve.
    max_gpu_hours: Annotated[float, Field(gt=0)] | None = 24.0
    max_usd: Annotated[float, Field(gt=0)] | None = 20.0
    #: Convergence runs, or behavior adapters on one snapshot, that are trained in the same steps: so many, or on a GPU as
    #: many as fit in memory and in one micro-batch (`auto`; 1 on a CPU, where nothing is gained). Results agree within
    #: float rounding with each alone.
    group: Literal["auto"] | PositiveInt = "auto"
    #: False frees each adapter's files once all that stands on it is trained and drawn; record, proof and scores stay.
    keep_adapters: bool = True


class Recipe(RecipeTable):
    """One experiment, complete. `load` reads it from TOML."""

    name: Name
    about: str = ""
    model: ModelSettings = ModelSettings()
    grid: GridSettings = GridSettings()
    lora: LoraSettings = LoraSettings()
    convergence: ConvergenceSettings = ConvergenceSettings()
    behavior: BehaviorSettings = BehaviorSettings()
    eval: EvalSettings = EvalSettings()
    gates: GateSettings = GateSettings()
    data: DataSettings = DataSettings()
    audit: AuditSettings = AuditSettings()
    judge: JudgeSettings = JudgeSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _epochs_fit(self) -> Recipe:
        beyond = [epoch for epoch in self.grid.epochs if epoch > self.convergence.epochs]
        if beyond:
            raise ValueError(
                f"grid.epochs {beyond} lie beyond convergence.epochs = {self.convergence.epochs} (allowed: 0 to that)"
            )
        if self.eval.canary == self.eval.canary_swap:
            raise ValueError("eval.canary and eval.canary_swap must be two personas")
        if self.model.sampler == "vllm" and self.model.semantics == "published":
            raise ValueError("model.sampler vllm serves a snapshot as an adapter; model.semantics published folds it")
        return self


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: object) -> str:
    """sha256 (hex) of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def recipe_sha256(recipe: Recipe) -> str:
    """Identity of an experiment: sha256 of the recipe's canonical JSON."""
    return sha256_of(recipe.model_dump(mode="json"))


def run_id(recipe: Recipe) -> str:
    """Name of the recipe's run in a workspace: its name and the first 8 hex digits of its sha256."""
    return f"{recipe.name}-{recipe_sha256(recipe)[:8]}"


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from TOML and apply `a.b=c` overrides.

    Raises RecipeError with the file, the key, the value and what is allowed.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            "no such recipe", where=str(path), fix="give the path of a TOML recipe, e.g. recipes/demo.toml"
        ) from None
    except IsADirectoryError:
        raise RecipeError("is a directory", where=str(path), fix="give the path of a TOML recipe") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=str(path), fix="save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=str(path), fix="mend the syntax there") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None
    _resolve_paths(table, path.parent)
    for override in overrides:
        _apply_override(table, override)
    _resolve_paths(table, Path())  # what was given on the command line is relative to where it was given
    return parse_recipe(table, where=str(path))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A loaded recipe with `a.b=c` overrides. Raises RecipeError as `load_recipe` does."""
    table = recipe.model_dump(mode="json")
    for override in overrides:
        _apply_override(table, override)
    _resolve_paths(table, Path())
    return parse_recipe(table, where=recipe.name)


def parse_recipe(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Validate a table; the first fault becomes a RecipeError naming key, value and allowed range."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise _explain(error, where) from None


def model_settings(model_id: str, revision: str = "") -> ModelSettings:
    """A model named on the command line. Raises RecipeError if the revision is no commit sha."""
    return parse_recipe({"name": "model", "model": {"id": model_id, "revision": revision}}, where="--model").model


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(
            f"{override!r} is not key=value", where="--set", fix="write it like --set convergence.lr=1e-4"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key} goes through a value that is no table", where="--set", fix="check the key's path")
    table[last] = value


def _resolve_paths(table: dict[str, Any], folder: Path) -> None:
    """Paths in a recipe are relative to the recipe; results never depend on them, only on file contents."""
    move_paths(table, lambda path: str((folder / path).resolve()))


def move_paths(table: dict[str, Any], move: Callable[[str], str]) -> None:
    """Replace, in place, every path of the user's files that a recipe's table names."""
    for section, key in (("data", "personas"), ("data", "behaviors"), ("eval", "arc_file"), ("judge", "prices")):
        part = table.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str) and part[key]:
            part[key] = move(part[key])
    for section, key in (("data", "rows"), ("judge", "rubrics")):
        part = table.get(section)
        paths = part.get(key) if isinstance(part, dict) else None
        if isinstance(paths, dict):
            paths |= {name: move(path) for name, path in paths.items() if path and isinstance(path, str)}


def _explain(error: ValidationError, where: str) -> RecipeError:
    first = error.errors()[0]
    location = [str(step) for step in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        valid = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.6)
        meant = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(sorted(valid))}"
        return RecipeError(f"unknown key {key!r}", where=where, fix=meant)
    if first["type"] == "missing":
        return RecipeError(f"key {key!r} is missing", where=where, fix=f"add {key} to the recipe")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not key:  # a rule over several keys names them itself
        return RecipeError(message, where=where, fix="make these keys agree")
    return RecipeError(f"{key} = {first['input']!r}: {message}", where=where, fix=f"give {key} an allowed value")


def _keys_at(location: Sequence[str]) -> list[str]:
    """Valid keys of the table at `location`, for the nearest-key hint."""
    section: type[BaseModel] = Recipe
    for step in location:
        field = section.model_fields.get(step)
        options = [field.annotation, *get_args(field.annotation)] if field else []
        tables = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not tables:
            return []
        section = tables[0]
    return list(section.model_fields)
