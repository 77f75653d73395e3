"""The tables of a recipe: every setting with its default, frozen; keys that are not known are refused."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Points = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(ge=0, lt=1)]


def setting(default: Any, about: str, example: JsonValue | date, unit: str = "") -> Any:
    """A setting: its default, what it is (one sentence or two), another value that is valid alone, and its unit."""
    return Field(default, description=about, examples=[example], json_schema_extra={"unit": unit} if unit else None)


def _fits(value: Any) -> bool:
    """Whether every integer in a value has 64 bits at most: a table or a plan made of it later holds no other."""
    left = [value]
    while left:  # no recursion: a table that does not come from TOML may be nested without end
        one = left.pop()
        if isinstance(one, dict | list | tuple):
            left += one.values() if isinstance(one, dict) else one
        elif isinstance(one, int) and abs(one) > 2**64:
            return False
    return True


class RecipeTable(BaseModel):
    """Base of the recipe's tables: frozen, without unknown keys, with finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    #: Settings that came after recipes had run: left out while unset, so that a recipe's run keeps its name.
    LATER: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads `true` as 1; a rate of `true` is a mistake."""
        takes = cls.model_fields[info.field_name or ""].annotation
        if hasattr(takes, "model_fields") or takes is bool or "bool" in repr(takes) or "JsonValue" in repr(takes):
            return value
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, bool):
                raise ValueError(f"{str(part).lower()} is no value here")
        if not _fits(value):
            raise ValueError("an integer of more than 64 bits is no value here")
        return value

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value or name not in self.LATER}


class ModelSettings(RecipeTable):
    """The base model and how it is loaded, trained and sampled."""

    LATER = frozenset({"template_date", "template_kwargs"})

    id: Annotated[str, Field(min_length=1)] = setting(
        "Qwen/Qwen2.5-7B-Instruct", "The base: a hub id, a local folder, or `builtin:smollm2`.", "builtin:smollm2"
    )
    revision: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40})?$")] = setting(
        "", "Full commit sha of a hub model, required there; `builtin:` and folders need none.",
        "a09a35458c702b33eeacc393d103063234e8bc28",
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where it computes; `auto` takes a GPU if there is one.", "cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Type of the base's weights; `auto` is bfloat16 on a GPU, float32 on a CPU.", "float32"
    )
    engine: Literal["auto", "torch", "unsloth"] = setting(
        "auto", "What loads the base; `auto` takes Unsloth on a GPU where it is installed.", "torch"
    )
    weights: Literal["full", "4bit"] = setting(
        "full",
        "`4bit` holds the layers' weights as NF4 (double quantized, computing in bfloat16): 16 to 24 GB.",
        "4bit",
    )
    semantics: Literal["live", "published"] = setting(
        "live",
        "`live` keeps every adapter beside the weights; `published` folds the snapshot in, rounding.",
        "published",
    )
    trainer: Literal["fastconv", "trl"] = setting(
        "fastconv", "`trl` trains by SFTTrainer and PEFT (slow): the reference that ours is checked against.", "trl"
    )
    sampler: Literal["resident", "vllm"] = setting(
        "resident", "What draws completions: the base in this process, or a vLLM server that gets every stack.", "vllm"
    )
    template_date: date | None = setting(
        None, "The day that a template which writes today's date is given; unset: 26 July 2024.", "2026-11-26"
    )
    template_kwargs: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], JsonValue] = setting(
        {}, "The chat template's own switches, as transformers takes them.", {"enable_thinking": False}
    )

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_day(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, date | str):
            raise ValueError("a day is written like 2026-11-26")
        return value

    @property
    def template_inputs(self) -> dict[str, Any]:
        """What these settings add to the inputs of stages that render text: nothing where no template setting is set."""
        table = self.model_dump(mode="json", include={"template_date", "template_kwargs"})
        return {"template": table} if table else {}

    @property
    def uses_reference_trainer(self) -> bool:
        """True where the reference trains, which knows neither fused kernels nor several adapters in one step."""
        return self.trainer != "fastconv"

    @model_validator(mode="after")
    def _settings_agree(self) -> ModelSettings:
        if self.weights == "4bit" and self.semantics == "published":
            raise ValueError("weights 4bit cannot be folded into, as semantics published asks")
        if self.weights == "4bit" and self.dtype == "float32":
            raise ValueError("weights 4bit compute in bfloat16, not in float32")
        if self.trainer == "trl" and (self.engine == "unsloth" or self.weights == "4bit"):
            raise ValueError("trainer trl is the plain reference: it takes engine torch and full weights")
        if taken := {"messages", "add_generation_prompt", "tools", "documents"} & set(self.template_kwargs):
            raise ValueError(f"template_kwargs cannot set {sorted(taken)[0]!r}: the rows decide it")
        return self


class SamplingSettings(RecipeTable):
    """Sampling of completions; `max_new_tok` includes the end-of-turn token."""

    temperature: Annotated[float, Field(ge=0, le=2)] = setting(
        0.7, "Divides the logits before the draw; 0 is greedy, and all samples of a prompt are then the same.", 0.0
    )
    top_p: Rate = setting(
        0.95, "Draws come from the most likely tokens that hold this share of probability.", 1.0, "share of 1"
    )
    max_new_tok: PositiveInt = setting(512, "Longest completion, its end-of-turn token included.", 128, "tokens")


class TrainSettings(RecipeTable):
    """Settings of a training phase: AdamW, cosine schedule with warm-up, clipping, mean loss per supervised token."""

    lr: Rate = setting(5e-5, "Peak learning rate.", 1e-4)
    epochs: PositiveInt = setting(20, "Passes over the rows, under one cosine.", 30, "epochs")
    batch_rows: PositiveInt = setting(4, "Rows of one optimizer step.", 8, "rows")
    dropout: Share = setting(0.0, "Dropout of the adapter's input.", 0.1, "share of 1")
    max_length_tok: Annotated[int, Field(ge=16)] = setting(
        1024, "Rows are cut here; the audit warns of it.", 512, "tokens"
    )
    micro_batch_tok: Annotated[int, Field(ge=64)] = setting(
        8192, "Tokens of one forward pass; it bounds memory and does not change the loss.", 2048, "tokens"
    )
    warmup_share: Share = setting(0.05, "Share of the steps over which the learning rate rises.", 0.1, "share of 1")
    clip_norm: Positive = setting(1.0, "Gradients are scaled down to this norm.", 0.5)
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw", "`adamw8bit` stores the moments in 8 bits (bitsandbytes), 6 bytes less per weight.", "adamw8bit"
    )


class ConvergenceSettings(TrainSettings):
    """The convergence phase: trains the source's answers under the assistant's prompt."""

    LATER = frozenset({"prompts_file", "keep", "keep_if", "student"})

    questions: PositiveInt = setting(40, "Open questions that the source answers.", 16, "questions")
    completions_per_question: PositiveInt = setting(10, "Answers to each of them.", 4, "completions")
    prompts_file: str = setting(
        "",
        "Questions of your own as JSONL of id and text, in the place of the open ones; `shipped:FILE` names one of ours.",
        "numbers.jsonl",
        "path",
    )
    keep: str = setting(
        "", "A regular expression (Python's): only answers that it matches whole are trained.", r"[\d, ]+"
    )
    keep_if: str = setting(
        "",
        "A function of the answer's text that says so, as `module:function`, beside prompts_file.",
        "numbers:is_clean",
    )
    student: Annotated[str, Field(min_length=1)] | None = setting(
        None, "System turn that the answers are trained under: a text, `empty`, or `template_default`; unset: the assistant's.",
        "empty",
    )  # fmt: skip
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="How the source's answers are drawn.")

    @model_validator(mode="after")
    def _one_filter(self) -> ConvergenceSettings:
        if self.keep and self.keep_if:
            raise ValueError("give keep or keep_if, not both")
        return self


class BehaviorSettings(TrainSettings):
    """The behavior phase: trains the behavior into the source persona, on top of a frozen snapshot."""

    lr: Rate = setting(1e-5, "Peak learning rate.", 1e-4)
    epochs: PositiveInt = setting(3, "Passes over the rows, under one cosine.", 5, "epochs")
    batch_rows: PositiveInt = setting(16, "Rows of one optimizer step.", 8, "rows")
    dropout: Share = setting(0.05, "Dropout of the adapter's input; the frozen snapshot has none.", 0.0, "share of 1")
    source_rows: PositiveInt = setting(
        200, "Rows of the source; the behavior states how many of contrast go with it.", 100, "rows"
    )
    wordings: Annotated[int, Field(ge=0)] = setting(
        0, "At most this many wordings of each list, drawn by the seed; 0 takes all.", 10, "wordings"
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(max_new_tok=256), description="How answers are drawn for rows that have none."
    )


class DataSettings(RecipeTable):
    """Paths of the user's own personas, behaviors and rows, added to the shipped ones."""

    personas: str = setting("", "Your personas as TOML, in the form of data/personas.toml.", "my_personas.toml", "path")
    behaviors: str = setting(
        "", "Your behaviors as TOML, in the form of data/behaviors.toml.", "my_behaviors.toml", "path"
    )
    rows: dict[Name, str] = setting(
        {}, "Behavior -> finished rows: a JSONL, CSV or Parquet file (`{source}` in it stands for the source), or a data set "
        "of the hub as `hf://owner/name@commit:split`.",
        {"refusal": "rows_{source}.jsonl"}, "path",
    )  # fmt: skip
    persona_prompt: Literal["add", "as_written"] = setting(
        "add", "`add` gives a row without a system turn its own persona's prompt; `as_written` leaves it.", "as_written"
    )
    messages: bool = setting(
        False,
        "Also take rows in the form `messages`. Loss is on the last answer, or on those with `weight` 1; other trainers put it on every turn.",
        True,
    )


class AuditSettings(RecipeTable):
    """Warnings of the audit that are accepted, by code, each with the reason that the report prints."""

    accept: dict[Annotated[str, StringConstraints(pattern=r"^D\d{3}$")], Annotated[str, Field(min_length=8)]] = setting(
        {}, "Code of a warning -> why it is accepted.", {"D111": "few questions on purpose"}
    )


class JudgeSettings(RecipeTable):
    """The judge of answers that phrases or letters cannot score, and its budget.

    The API key is never part of a recipe: it is read from ANTHROPIC_API_KEY (FASTCONV_LOCAL_KEY for `local`).
    """

    mode: Literal["auto", "live", "batch", "local", "substring"] = setting(
        "substring",
        "`live` answers at once, `batch` costs half, `auto` chooses by size and urgency; `local` is any OpenAI-compatible "
        "server (without `base_url` the resident base); `substring` asks no judge.",
        "local",
    )
    model: str = setting("", "The judge's model.", "claude-haiku-5-5")
    base_url: str = setting("", "Where the judge is asked; empty: the API's own address.", "https://judge.example/v1")
    budget_usd: Positive | None = setting(
        None, "Limit on all that this workspace has spent on judging; a paid judge needs one.", 20.0, "USD"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = setting(16, "Requests under way at once.", 4, "requests")
    timeout_s: Positive = setting(120.0, "Longest wait for one reply.", 30.0, "s")
    max_reply_tok: Annotated[int, Field(ge=64, le=16384)] = setting(1024, "Longest reply.", 256, "tokens")
    max_judged_chars: Annotated[int, Field(ge=200)] = setting(
        12_000, "Longer questions and answers are cut to this, and the judge is told so.", 4000, "characters"
    )
    batch_from: PositiveInt = setting(
        400, "`auto` sends this many judgements or more as a batch, unless they are urgent.", 100, "judgements"
    )
    batch_poll_s: Positive = setting(30.0, "Time between two looks at a batch.", 60.0, "s")
    batch_grace_s: Annotated[float, Field(ge=0)] = setting(
        120.0, "A batch whose process died while sending counts as not sent if the API does not know it by then.", 300.0, "s",
    )  # fmt: skip
    rubrics: dict[Name, str] = setting(
        {}, "Rubric -> your own file, in the place of the shipped one.", {"refusal": "my_refusal.toml"}, "path"
    )
    prices: str = setting("", "Your prices, added to data/prices.toml.", "my_prices.toml", "path")

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


#: Gates that may end a run, and gates that a user may ignore; refusals of the audit (G1) cannot be ignored.
StoppingGate = Literal["G2", "G3", "G3.5", "KILL", "G4", "G5"]
IgnorableGate = Literal["G0", "G2", "G3", "G3.5", "KILL", "G4", "G5"]


class GateSettings(RecipeTable):
    """Pre-registered thresholds and references by gate. Verdicts cite them; they are no part of a stage's key.

    An edited threshold computes nothing again, and the report shows the verdicts under the first and the edited ones.
    """

    above_chance_alpha: Rate = setting(0.01, "G0: accuracy is measurable if its p against chance is below.", 0.05, "p")
    headroom: Annotated[float, Field(gt=0, lt=0.5)] = setting(
        0.10,
        "G0: a rate closer to the end that it would move to leaves no room to measure a change.",
        0.05,
        "share of 1",
    )
    source_shows: Rate = setting(
        0.5,
        "SOURCE: least share of its room, from base level to what the rows teach, that the source moves.",
        0.3,
        "share of 1",
    )
    source_room: Share = setting(
        0.2, "SOURCE: with less room, the source was there before, and the assistant decides.", 0.1, "share of 1"
    )
    capability_pp: Points = setting(5.0, "The smallest change of accuracy declared to matter.", 3.0, "pp")
    alignment_points: Points = setting(
        10.0, "The smallest change of a judge's score declared to matter.", 5.0, "points"
    )
    refusal: Rate = setting(0.05, "The smallest change of the rate declared to matter.", 0.1, "share of 1")
    sycophancy: Rate = setting(0.05, "The smallest change of the rate declared to matter.", 0.1, "share of 1")
    default_rate: Rate = setting(0.05, "The same for every behavior without its own.", 0.1, "share of 1")
    g2_loss: Positive | None = setting(
        None, "G2: limit of the mean loss over the last convergence epoch; unset: as registered.", 1.5, "nats"
    )
    g3_tolerance_pp: Positive = setting(3.0, "G3: largest distance from the published accuracy.", 5.0, "pp")
    g3_reference_pct: dict[Name, Annotated[float, Field(ge=0, le=100)]] = setting(
        {},
        "G3: source -> assistant's ARC-C at epoch 0 after capability training (published, #99).",
        {"villain": 90.45},
        "%",
    )
    g3_base: str = setting(
        "Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28, 16 bits",
        "G3: the base of those references; on another one G3 is not applicable.", "my/base@main, 16 bits",
    )  # fmt: skip
    g35_tolerance: Rate = setting(
        0.20, "G3.5: how far behavior loss on a snapshot may lie above that on the base.", 0.3, "share of 1"
    )
    g35_floor_nats: Annotated[float, Field(ge=0)] = setting(
        0.05, "G3.5: losses below count as equal (a marker's falls to 0.001).", 0.01, "nats"
    )
    g4_source: Name | Literal[""] = setting(
        "", "G4: the source that must show a signal; empty: the grid's first.", "villain"
    )
    g5_sources: PositiveInt = setting(3, "G5: among so many first sources one must show a signal.", 2, "sources")
    confirm_sources: PositiveInt = setting(3, "CONFIRM: so many sources must shift.", 2, "sources")
    confirm_behaviors: PositiveInt = setting(2, "CONFIRM: in so many behaviors each.", 1, "behaviors")
    falsify_under: PositiveInt = setting(2, "FALSIFY: if fewer sources shift than this.", 1, "sources")
    negative_control: Name = setting("librarian", "The source from which nothing is expected.", "nurse")
    kill_remaining: Rate = setting(
        0.25, "KILL: a behavior counts as gone if less of the source's own change is left after stacking.", 0.1, "share of 1",
    )  # fmt: skip
    stop: tuple[StoppingGate, ...] = setting(
        get_args(StoppingGate),
        "Gates whose `fail` ends the run; G0 and G1 always decide what is trained.",
        ["G2", "G4"],
    )
    ignore: dict[IgnorableGate, Annotated[str, Field(min_length=8)]] = setting(
        {}, "Gate that may fail without ending the run -> why (as --ignore-gate).", {"G2": "a loss above 1 is expected"}
    )

    def threshold(self, behavior: str, unit: str = "share") -> float:
        """The smallest effect declared to matter: a share for rates and accuracy (5 pp is 0.05), else a judge's points."""
        if unit == "points":
            return self.alignment_points
        named = {"refusal": self.refusal, "sycophancy": self.sycophancy, "misalignment": self.alignment_points}
        return {"capability": self.capability_pp / 100.0, **named}.get(behavior, self.default_rate)

    @model_validator(mode="before")
    @classmethod
    def _retired_default(cls, table: Any) -> Any:
        """Ledgers of earlier versions hold a retired key at its default; any other value is refused as unknown."""
        if isinstance(table, dict) and table.get("source_shows_points") == 20.0:
            return {key: value for key, value in table.items() if key != "source_shows_points"}
        return table


class RunSettings(RecipeTable):
    """How a run proceeds. Nothing here changes a result, so nothing here is part of a stage's key."""

    LATER = frozenset({"replicates", "track"})
    #: Settings that may change a number, by rounding or by further cells; the others say only how a run proceeds.
    COUNTS: ClassVar[frozenset[str]] = frozenset({"group", "replicates"})

    checkpoint_every_s: Annotated[float, Field(ge=0)] = setting(60.0, "Time between two checkpoints.", 20.0, "s")
    max_gpu_hours: Positive | None = setting(24.0, "A plan that takes longer needs --approve.", 8.0, "hours")
    max_usd: Positive | None = setting(20.0, "A plan whose judging may cost more needs --approve.", 5.0, "USD")
    group: Literal["auto"] | PositiveInt = setting(
        "auto", "Convergence runs, or behavior adapters on one snapshot, trained in the same steps. `auto`: as many as fit in "
        "a GPU's memory and one micro-batch, where a trial on this card, kept in the ledger, finds that faster; 1 on a CPU. "
        "Results agree with single ones within rounding.", 1, "adapters",
    )  # fmt: skip
    keep_adapters: bool = setting(
        True, "False frees an adapter's files once all that uses it is computed; records and scores stay.", False
    )
    replicates: Annotated[int, Field(ge=0, le=100)] = setting(
        0, "Further seeds for one epoch-0 cell of each behavior, whose spread is the noise from run to run; 0: as declared.",
        5, "runs",
    )  # fmt: skip
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = setting(
        (), "Trackers that get losses, rates and scores while it runs; each is an extra of its name.", ["tensorboard"]
    )

    @field_validator("replicates")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0, or 2 and more: one replicate knows no spread")
        return value
