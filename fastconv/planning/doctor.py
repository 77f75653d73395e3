"""`doctor`: checks versions, device, workspace, model, sampler, recipe and judge; one line each. `check rows`: a file alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastconv import __version__
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, SystemTurn
from fastconv.datasets.files import file_sha256, find_recipe, rows_file
from fastconv.datasets.personas import NO_PERSONA, Personas, load_personas
from fastconv.datasets.rows import UserRow, read_user_rows, require_plain_text
from fastconv.engine.builtin import ensure_builtin
from fastconv.engine.device import query_gpu, require_fit, require_ram, shape_on_disk
from fastconv.engine.locate import BUILTIN, builtin_gguf, engine_identity, locate, tokenizer_folder
from fastconv.errors import DataError, FastconvError, ModelError, StoreError, shown
from fastconv.experiment.graph import Graph
from fastconv.experiment.measures import Demand
from fastconv.judge.access import check_judge
from fastconv.planning.hardware import KNOWN_GPUS
from fastconv.planning.plan import known_shape
from fastconv.recipe import ModelSettings, Recipe, load_recipe, model_settings
from fastconv.run.audit import require_template
from fastconv.stats.units import counted, duration_text, first_few
from fastconv.store.gc import drop_dead_leases, find_damage, stray_files, sweep
from fastconv.store.io import storage_errors
from fastconv.store.ledger import Store

#: With less free space a run would likely fail with "no space left".
LOW_DISK_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Diagnosis:
    """The result of one check; `exit_code` is 0 if it passed."""

    subject: str
    text: str
    exit_code: int = 0


def diagnose(recipe: Recipe | None, workspace: Path, *, deep: bool = False, fix: bool = False) -> list[Diagnosis]:
    """Run every check that a run depends on. Failed checks are returned, not raised.

    `deep` reads every artefact and page of the ledger; `fix` mends what is safe before it looks.
    """
    findings = [_versions(), _device(recipe), _workspace(workspace), *_ledger(workspace, deep=deep, fix=fix)]
    try:
        if recipe is not None:
            findings += [_tracker(name) for name in recipe.run.track]
            findings.append(_template(recipe))
        findings.append(_model(recipe.model if recipe else ModelSettings(id="builtin:smollm2")))
        if recipe is not None:
            if recipe.model.sampler == "vllm":
                findings.append(_sampler(recipe))
            graph = Graph(recipe)
            findings.append(
                Diagnosis("recipe", f"{recipe.name}: {len(graph.cells)} cells, {len(graph.stages())} stages")
            )
            findings.append(_judge(graph, workspace))
    except FastconvError as error:
        findings.append(Diagnosis("recipe" if recipe else "model", str(error), error.exit_code))
    return findings


def _versions() -> Diagnosis:
    names = ("torch", "transformers", "tokenizers", "polars")
    versions = [f"fastconv {__version__}"]  # its own: a checkout on PYTHONPATH has no metadata
    versions += [f"{name} {metadata.version(name)}" for name in names if importlib.util.find_spec(name)]
    return Diagnosis("versions", ", ".join(versions))


def _tracker(name: str) -> Diagnosis:
    """Whether a tracker can be used; a run goes on without it, so nothing fails here."""
    if importlib.util.find_spec(name) is None:
        return Diagnosis("track", f"{name} is not installed, and the run goes on without it: pip install {name}")
    return Diagnosis("track", f"{name} {metadata.version(name)}")


def _device(recipe: Recipe | None) -> Diagnosis:
    settings = recipe.model if recipe else ModelSettings()
    identity = engine_identity(settings)
    text = f"{identity['device']} in {identity['dtype']}, {os.cpu_count()} cores"
    if identity["device"] == "cuda":
        try:
            text += f", {gpu_line(recipe or Recipe(name='doctor'))}"
        except ModelError as error:
            return Diagnosis("device", str(error), error.exit_code)
        text += f", engine {identity['engine']}"
    elif recipe is not None:
        if settings.device == "auto":
            text += f" (no GPU is visible; `fastconv plan {recipe.name}` says how long that takes)"
        try:
            text = ", ".join(filter(None, (text, require_ram(recipe, shape_on_disk(recipe.model)))))
        except ModelError as error:
            return Diagnosis("device", str(error), error.exit_code)
    return Diagnosis("device", text)


def gpu_line(recipe: Recipe) -> str:
    """The GPU as one line. Raises ModelError if it cannot be used, or is too small for the recipe."""
    import torch

    device = query_gpu(torch.cuda, torch.version.cuda)
    return require_fit(device, recipe, shape_on_disk(recipe.model))


def _workspace(folder: Path) -> Diagnosis:
    existing = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        return Diagnosis(
            "workspace",
            f"{folder} cannot be written. Fix: make it writable or give another --workspace",
            StoreError.exit_code,
        )
    free = shutil.disk_usage(existing).free
    if free < LOW_DISK_BYTES:
        return Diagnosis(
            "workspace", f"only {free / 2**30:.1f} GiB free at {folder}. Fix: free some space", StoreError.exit_code
        )
    return Diagnosis("workspace", f"{folder}, {free / 2**30:.0f} GiB free")


def _ledger(folder: Path, *, deep: bool, fix: bool) -> list[Diagnosis]:
    """Whether the ledger is whole, its artefacts are there, and what lies about; nothing where there is no ledger."""
    if not (folder / "ledger.sqlite").exists():
        return []
    try:
        with storage_errors(folder):
            store = Store.open(folder, create=False)
            try:
                return [_ledger_line(store, deep=deep, fix=fix)]
            finally:
                store.close()
    except StoreError as error:
        return [Diagnosis("ledger", str(error), error.exit_code)]


def _ledger_line(store: Store, *, deep: bool, fix: bool) -> Diagnosis:
    mended = ""
    if fix and not find_damage(store):
        mended = f"; {counted(drop_dead_leases(store), 'dead lease')} and {sweep(store):,} bytes of stray files removed"
    if damage := find_damage(store, deep=deep):
        text = f"{first_few(damage, 3)}. Fix: `fastconv forget` the stages concerned, or restore it from a backup"
        return Diagnosis("ledger", shown(text), StoreError.exit_code)
    n_stages, n_dead = store.rows("SELECT COUNT(*) FROM stages")[0][0], store.rows("SELECT COUNT(*) FROM leases")[0][0]
    n_dead -= len(store.live_leases())
    stray = stray_files(store)
    text = f"{counted(n_stages, 'stage')}, whole" + (" to the last byte" if deep else "")
    if n_dead or stray:
        text += f"; {counted(n_dead, 'dead lease')}, {counted(len(stray), 'stray file')} (--fix removes them)"
    return Diagnosis("ledger", text + mended)


def _template(recipe: Recipe) -> Diagnosis:
    """Whether the base's template takes every persona, found without weights; with the date that it is given, if any."""
    try:
        tokenizer = require_template(recipe)
    except FastconvError as error:
        return Diagnosis("template", str(error), error.exit_code)
    if tokenizer is None:
        return Diagnosis("template", "not on this disk yet; it is tried when the model is loaded")
    facts = tokenizer.template.facts
    settings = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "sha256")
    return Diagnosis("template", f"every persona reaches the model{f' ({settings})' if settings else ''}")


def _sampler(recipe: Recipe) -> Diagnosis:
    from fastconv.engine.vllm.memory import lora_rank, stacked_rank
    from fastconv.engine.vllm.server import server_command

    command = server_command(engine_identity(recipe.model)["device"])
    return Diagnosis("sampler", f"{' '.join(command)}, stacks of rank {lora_rank(stacked_rank(recipe))}")


def _judge(graph: Graph, workspace: Path) -> Diagnosis:
    """Whether the judge is reachable: key, price, end date, budget, network, model. The check itself costs nothing."""
    judge = graph.judge
    if judge is None:
        return Diagnosis("judge", "phrases alone; no judge reads the answers")
    store = Store.open(workspace, create=False) if (workspace / "ledger.sqlite").is_file() else None
    try:
        check_judge(judge, store)
    except FastconvError as error:
        return Diagnosis("judge", str(error), error.exit_code)
    finally:
        if store is not None:
            store.close()
    if judge.family == "paid":
        budget = f"at most ${judge.settings.budget_usd:g} in {workspace}"
        return Diagnosis("judge", f"{judge.name} ({judge.settings.mode}) answers; {budget}")
    return Diagnosis("judge", f"{judge.name}, a weak judge: it answers by one character")


def _model(settings: ModelSettings) -> Diagnosis:
    source = locate(settings)
    if source.kind == "builtin":
        builtin_gguf()
        return Diagnosis("model", f"{source.id} is installed")
    if source.folder is not None:
        from fastconv.engine.model import check_base

        check_base(source.folder, settings)
        return Diagnosis("model", f"{source.folder}, sha256 {source.identity['sha256'][:12]}")
    return Diagnosis("model", f"{source.id}@{settings.revision[:12]} from the hub (downloaded on first use)")


# --- a file of rows alone --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsPlan:
    """What a file of rows holds and what one behavior adapter trained on it costs.

    `systems` counts rows by their system turn's text ("": an empty one), None those without; `personas` by the one named.
    Tokens are those of `tokenizer`; `seconds` are of the base `model`, by machine.
    """

    file: str
    sha256: str
    n_rows: int
    n_repeated: int
    systems: Mapping[str | None, int]
    personas: Mapping[str, int]
    tokenizer: str
    n_tok: int
    n_supervised_tok: int
    longest_tok: int
    n_cut: int
    max_length_tok: int
    steps: int
    epochs: int
    model: str
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON; rows without a system turn stand under "(none)"."""
        systems = {"(none)" if text is None else text: n for text, n in self.systems.items()}
        return {**asdict(self), "systems": systems}

    def lines(self) -> list[str]:
        """The same in words."""
        repeated = f", {self.n_repeated} of them again" if self.n_repeated else ""
        cut = f"; {self.n_cut} are cut at behavior.max_length_tok = {self.max_length_tok}" if self.n_cut else ""
        named = ", ".join(f"{name} {n}" for name, n in self.personas.items()) or "none"
        found = [f"{self.file}: {self.n_rows} rows{repeated} (sha256 {self.sha256[:12]})"]
        for text, n in sorted(self.systems.items(), key=lambda one: -one[1])[:6]:
            kind = "no system turn: a recipe gives them a persona's" if text is None else f"{text!r:.80}"
            found.append(f"  {n} with {'an empty system turn' if text == '' else kind}")
        if len(self.systems) > 6:
            found.append(f"  and {len(self.systems) - 6} more system turns")
        price = ", ".join(f"{duration_text(seconds)} on {name}" for name, seconds in self.seconds.items())
        return [
            *found,
            f"  personas named: {named}",
            f"tokens ({self.tokenizer}): {self.n_tok:,} in all, {self.n_supervised_tok:,} of them trained; the longest row "
            f"has {self.longest_tok:,}{cut}",
            f"price: one adapter of {self.model} in {self.steps:,} steps ({self.epochs} epochs): about {price}; no judge is "
            "asked for it",
        ]


def plan_rows(name: str, overrides: Sequence[str] = ()) -> RowsPlan:
    """Read a file of rows (or a pinned hub data set) alone. `overrides` are of the recipe `pilot`.

    Tokens are counted by the base's tokenizer, or by the embedded model's where that is not on this disk. Raises DataError
    for a row that cannot be read or that spells a control token.
    """
    recipe = load_recipe(find_recipe("pilot"), overrides)
    path = rows_file(name)
    rows = read_user_rows(path, messages=recipe.data.messages)
    source = locate(recipe.model)
    folder, tokenizer = tokenizer_folder(source, recipe.model), f"{source.id}'s tokenizer"
    settings = recipe.model
    if folder is None:
        settings = model_settings(BUILTIN)
        folder, tokenizer = ensure_builtin(BUILTIN), f"{BUILTIN}'s tokenizer; {source.id} is not on this disk"
    chat, limit = ChatTokenizer(folder, settings), recipe.behavior.max_length_tok
    texts = ((f"the {kind} turn's text", text, f"{path}:{row.line}") for row in rows for kind, text in row.said)
    require_plain_text(texts, chat, "take it out of the text, or split the row into turns")
    personas = load_personas(recipe)
    rendered = [
        chat.training_ids(_system_of(row, personas, path), row.user, row.completion, limit, history=row.history)
        for row in rows
    ]
    n_tok, supervised = sum(len(one.ids) for one in rendered), sum(one.n_supervised for one in rendered)
    epochs, per_epoch = recipe.behavior.epochs, -(-len(rows) // recipe.behavior.batch_rows)
    demand = Demand(n_tok * epochs, per_epoch * epochs, length_tok=n_tok / len(rows), share=supervised / n_tok)
    shape = known_shape(recipe)
    cards = (KNOWN_GPUS[card] for card in ("4090", "h100", "h200"))
    return RowsPlan(
        str(name), file_sha256(path), len(rows), len(rows) - len({row.said for row in rows}),
        dict(Counter(row.system for row in rows)), dict(Counter(row.persona for row in rows if row.persona)), tokenizer, n_tok,
        supervised, max(len(one.ids) for one in rendered), sum(one.truncated for one in rendered), limit, demand.steps,
        epochs, recipe.model.id, {card.name: card.seconds(demand, shape, recipe) for card in cards},
    )  # fmt: skip


def _system_of(row: UserRow, personas: Personas, path: Path) -> SystemTurn:
    """The system turn by which a row's tokens are counted: its own, else that of the persona it names."""
    if row.system is not None:
        return SystemTurn("text", row.system) if row.system else EMPTY
    if row.persona and row.persona != NO_PERSONA and row.persona not in personas.prompts:
        raise DataError(
            f"row {row.id} names the unknown persona {row.persona!r}",
            where=f"{path}:{row.line}",
            fix=personas.how_to_name(row.persona),
        )
    return personas.system(row.persona) if row.persona in personas.prompts else TEMPLATE_DEFAULT
