"""The audit of a recipe and of the training sets that a workspace has built for it, for `check` and `peek`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import RenderableType

from fastconv.audit.checks import CheckReport, Finding, audit_rows, build_report, structure_findings
from fastconv.audit.rendered import peek_lines, with_placeholders
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.personas import load_personas
from fastconv.datasets.rows import (
    Row,
    read_user_rows,
    render_row,
    require_no_control_tokens,
    require_plain_text,
    row_from_record,
)
from fastconv.engine.locate import (
    embedding_rows,
    is_plain_decoder,
    is_unpinned,
    locate,
    model_folder,
    require_rows_for_tokens,
    tokenizer_folder,
)
from fastconv.errors import DataError, RecipeError
from fastconv.experiment.graph import Graph
from fastconv.experiment.workload import Sketch
from fastconv.recipe import Recipe
from fastconv.store.ledger import Stage, Store


def audit_recipe(recipe: Recipe, store: Store | None) -> CheckReport:
    """Audit the recipe's structure, and the rendered rows of every training set that the workspace has built.

    Raises what `require_template` and `require_family` raise.
    """
    findings = structure_findings(recipe)
    require_template(recipe)
    require_family(recipe)
    if store is not None:
        # `Sketch` replaces questions that are not on this disk; sets made from them then have other keys and are not found.
        graph = Sketch(recipe)
        built = {
            stage.work["set"]: rows for stage in _row_stages(graph) if (rows := _built_rows(stage, store)) is not None
        }
        tokenizer = recipe_tokenizer(graph) if built else None
        for name, rows in built.items():
            if tokenizer is not None:
                findings += audit_set(graph, name, rows, tokenizer)[1]
    return build_report(recipe, list(dict.fromkeys(findings)))


def require_template(recipe: Recipe) -> ChatTokenizer | None:
    """Try the base's chat template under every persona, and the user's rows against its tokenizer, without weights.

    Returns the tokenizer, or None where it is not on this disk (a run tries it when the base is loaded), which without a
    revision cannot be told (a run refuses that). Raises TemplateError if the conditions do not reach the model, ModelError
    if tokenizer and embedding do not fit, DataError for a row that spells a control token.
    """
    if is_unpinned(recipe.model):
        return None
    source = locate(recipe.model)
    folder = tokenizer_folder(source, recipe.model)
    if folder is None and source.kind == "builtin" and recipe.data.rows:
        from fastconv.engine.builtin import ensure_builtin

        folder = model_folder(source, recipe.model)
        ensure_builtin(folder, source.id)
    if folder is None:
        return None
    tokenizer = ChatTokenizer(folder, recipe.model)
    require_rows_for_tokens(tokenizer.vocab_size, embedding_rows(folder), str(folder))
    require_conditions(recipe, tokenizer)
    return tokenizer


def require_family(recipe: Recipe) -> None:
    """Raise what loading the base would raise, as far as a small copy of its family shows it. Plain decoders are computed,
    and a model that is not on this disk is tried when it is loaded."""
    if is_unpinned(recipe.model):
        return
    source = locate(recipe.model)
    folder = None if source.kind == "builtin" else tokenizer_folder(source, recipe.model)
    if folder is not None and not is_plain_decoder(folder):
        from fastconv.engine.model import check_base

        check_base(folder, recipe.model)


def require_conditions(recipe: Recipe, tokenizer: ChatTokenizer) -> None:
    """Raise TemplateError unless every persona's prompt reaches the model as a condition of its own.

    Raises DataError for a persona, a behavior's prompt or a user's row whose text spells a control token.
    """
    personas = load_personas(recipe)
    turns = {name: SystemTurn("text", text) for name, text in personas.prompts.items()}
    where = recipe.data.personas or "personas.toml"
    texts = [(f"the text of {name!r}", turn.text, where) for name, turn in turns.items()]
    for behavior in load_behaviors(recipe).values():
        where = str(behavior.folder / behavior.spec.prompts)
        rows = (*behavior.train, *behavior.eval)
        texts += [
            (f"the text of {row['id']!r}", text, where)
            for row in rows
            for text in row.values()
            if isinstance(text, str)
        ]
    require_plain_text(texts, tokenizer)
    own = set()
    for path in recipe.data.rows.values():
        for source in recipe.grid.sources:
            rows = read_user_rows(Path(path.replace("{source}", source)), messages=recipe.data.messages)
            own |= {row.system for row in rows}
    if "" in own:
        turns["rows with an empty system turn"] = EMPTY
    if None in own and recipe.data.persona_prompt == "as_written":
        turns["rows without a system turn"] = TEMPLATE_DEFAULT
    tokenizer.require_conditions(turns)
    require_no_control_tokens(recipe.data, recipe.grid.sources, tokenizer)


def audit_set(
    graph: Graph, name: str, rows: Sequence[Row], tokenizer: ChatTokenizer
) -> tuple[tuple[Rendered, ...], list[Finding]]:
    """Render the rows of one training set and audit them; returns the rendered rows and the findings."""
    rendered = tuple(render_row(row, graph.personas, tokenizer, graph.recipe.behavior.max_length_tok) for row in rows)
    letters = graph.behaviors[name.split("/")[0]].spec.measure == "letters"
    return rendered, audit_rows(
        graph.recipe,
        name,
        rows,
        rendered,
        tokenizer,
        personas=graph.personas,
        behaviors=graph.behaviors,
        questions=graph.questions if letters else None,
    )


def require_passed(report: CheckReport, where: str) -> None:
    """Raise DataError for the first finding that refuses the recipe, naming up to three rows."""
    for finding in report.refusals:
        rows = f" ({', '.join(finding.rows[:3])}{' ...' if len(finding.rows) > 3 else ''})" if finding.rows else ""
        raise DataError(f"{finding.code} {finding.subject}: {finding.why}{rows}", where=where, fix=finding.mend)


def peek_recipe(
    recipe: Recipe, store: Store | None, names: Sequence[str], n_rows: int
) -> Iterator[tuple[str, Sequence[RenderableType]]]:
    """Yield each training set (or those in `names`) with `n_rows` rendered rows; a placeholder replaces unsampled answers."""
    graph = Graph(recipe)
    sets = {stage.work["set"]: stage for stage in _row_stages(graph)}
    for name in names:
        if name not in sets:
            raise RecipeError(f"no training set is called {name!r}", where="--set", fix=f"use one of {', '.join(sets)}")
    tokenizer = recipe_tokenizer(graph)
    for name, stage in sets.items():
        if not names or name in names:
            rows = _built_rows(stage, store) or with_placeholders(stage.work["rows"])
            rendered = [render_row(row, graph.personas, tokenizer, recipe.behavior.max_length_tok) for row in rows]
            yield name, peek_lines(rows, rendered, tokenizer, n_rows)


def recipe_tokenizer(graph: Graph) -> ChatTokenizer:
    """The tokenizer of the recipe's base model. The built-in model is converted first if it never was."""
    folder = model_folder(graph.source, graph.recipe.model)
    if graph.source.kind == "builtin" and not folder.is_dir():
        from fastconv.engine.builtin import ensure_builtin

        ensure_builtin(folder, graph.source.id)
    return ChatTokenizer(folder, graph.recipe.model)


def _row_stages(graph: Graph) -> list[Stage]:
    return [stage for stage in graph.stages() if stage.kind == "rows"]


def _built_rows(stage: Stage, store: Store | None) -> list[Row] | None:
    record = store.record(stage.key) if store else None
    return [row_from_record(row) for row in store.get_json(record.outputs["rows"])] if store and record else None
