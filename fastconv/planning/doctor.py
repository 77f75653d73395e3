"""`doctor`: checks versions, device, workspace, model, sampler, recipe and judge; one line each."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fastconv import __version__
from fastconv.engine.device import query_gpu, require_fit, require_ram, shape_on_disk
from fastconv.engine.locate import builtin_gguf, engine_identity, locate
from fastconv.errors import FastconvError, ModelError, StoreError, shown
from fastconv.experiment.graph import Graph
from fastconv.judge.access import check_judge
from fastconv.recipe import ModelSettings, Recipe
from fastconv.run.audit import require_template
from fastconv.stats.units import counted, first_few
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
