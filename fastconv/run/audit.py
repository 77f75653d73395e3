"""The audit of a recipe and of the training sets that a workspace has built for it, for `check` and `peek`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.analysis.sides import require_comparable
from fastconv.audit.checks import CheckReport, Finding, audit_rows, build_report, structure_findings
from fastconv.chat import EMPTY, TEMPLATE_DEFAULT, ChatTokenizer, Rendered, SystemTurn
from fastconv.datasets.behaviors import load_behaviors
from fastconv.datasets.personas import ASSISTANT, load_personas
from fastconv.datasets.rows import (
    Row,
    read_user_rows,
    render_row,
    render_rows,
    require_no_control_tokens,
    require_plain_text,
    row_from_record,
    rows_file,
)
from fastconv.engine.builtin import prepare_model_folder
from fastconv.engine.device import shape_on_disk
from fastconv.engine.locate import (
    embedding_rows,
    is_plain_decoder,
    is_unpinned,
    locate,
    require_rows_for_tokens,
    tokenizer_folder,
)
from fastconv.errors import DataError, ModelError, RecipeError, did_you_mean
from fastconv.experiment.cells import answer_filter, conditions_of
from fastconv.experiment.graph import Graph
from fastconv.experiment.recorded import graph_of_run
from fastconv.experiment.workload import Sketch
from fastconv.recipe import LoraSettings, Recipe, require_chosen
from fastconv.seeding import seeded_order
from fastconv.store.ledger import Stage, Store

#: Reads sets, each a `rows` stage with its rows, and says what it finds.
SetReader = Callable[[Graph, Store | None, Sequence[tuple[Stage, Sequence[Row]]]], list[Finding]]
#: Stand around each run of tokens that carry loss, so that it is visible without colour too.
OPEN, CLOSE = "⟦", "⟧"
#: Stands in place of an answer that a run has not sampled yet.
NOT_SAMPLED = "(sampled from the base when the recipe runs)"
_LOSS, _SPECIAL, _READ = "bold green", "magenta", "dim"
#: Prompts of a set that the base reads at most: before training, and for `check --with-model`.
READ_BEFORE_TRAINING, READ_BY_CHECK = 64, 200
#: Raise it when a reading changes for the same rows: what was read is read again.
_READING_VERSION = 1


def audit_recipe(recipe: Recipe, store: Store | None, *, read: SetReader | None = None) -> CheckReport:
    """Audit the recipe's structure, and the rendered rows of every training set that the workspace has built.

    `read` (`run.standalone.read_by_the_base`) lets the base read the sets too (D301 to D303), those whose answers are
    written. Raises DataError for a filter that cannot be used, and what `require_template`, `require_family` and `read` raise.
    """
    findings = structure_findings(recipe)
    answer_filter(recipe.convergence)
    conditions_of(recipe)
    require_template(recipe)
    require_family(recipe)
    # `Sketch` replaces questions that are not on this disk; sets made from them then have other keys and are not found.
    pinned = not is_unpinned(recipe.model)  # without a revision there is no graph
    compares = pinned and all(one.severity != "refuse" for one in findings)
    compares = compares and bool(recipe.grid.contrasts or recipe.eval.probes)
    graph = Sketch(recipe) if compares or (pinned and store is not None) or read is not None else None
    if compares and graph is not None:
        require_comparable(graph)
    stages = _row_stages(graph) if graph is not None else []
    built: dict[str, Sequence[Row]] = {s.key: rows for s in stages if (rows := _built_rows(s, store)) is not None}
    tokenizer = recipe_tokenizer(graph) if graph is not None and built else None
    for stage in stages:
        if tokenizer is not None and graph is not None and stage.key in built:
            rows = built[stage.key]
            rendered = render_rows(rows, graph.personas, tokenizer, graph.recipe.behavior.max_length_tok)
            findings += audit_set(graph, stage.work["set"], rows, rendered, tokenizer)
    if read is not None and graph is not None:
        findings += read(
            graph, store, [(stage, built[stage.key] if stage.key in built else stage.work["rows"]) for stage in stages]
        )
    return build_report(recipe, list(dict.fromkeys(findings)))


def pinning_problem(recipe: Recipe) -> ModelError | None:
    """The error that a run refuses an unpinned hub model with, whose design can still be audited; None for any other base."""
    if not is_unpinned(recipe.model):
        return None
    try:
        locate(recipe.model)
    except ModelError as error:
        return error
    return None


def reading_stage(graph: Graph, rows: Stage, most: int) -> Stage:
    """Where the ledger keeps what the base read of a set of rows. It is no part of the graph, as nothing rests on it."""
    inputs = {**graph.engine_inputs, "system": graph.system(ASSISTANT), "most": most}
    return Stage("reading", f"reading/{rows.work['set']}/{most}", _READING_VERSION, inputs, {"rows": rows})


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
        folder = prepare_model_folder(recipe.model, source)
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
    elif (shape := shape_on_disk(recipe.model, source)) is not None:
        _require_targets(recipe.lora, shape.n_layers)


def _require_targets(lora: LoraSettings, n_layers: int) -> None:
    """Raise what adapters of this kind would raise on a plain decoder of so many layers, whose modules are known by name."""
    parts = {
        name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        for name in LoraSettings().targets
    }
    for name in lora.targets:
        if name not in parts:
            raise RecipeError(
                f"no layer of the base is called {name!r}", where="lora.targets", fix=did_you_mean(name, parts)
            )
    modules = [f"model.layers.{n}.{part}.{name}" for n in range(n_layers) for name, part in parts.items()]
    require_chosen(lora, [module for module in modules if lora.carries(module)])


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
    texts += [(f"the turn of {name!r}", turn.text, recipe.name) for name, turn in personas.conditions.items()]
    for name, one in conditions_of(recipe).items():
        texts += [
            (f"the texts of {name!r}", text, recipe.name) for text in (one.before, one.after, *one.texts.values())
        ]
    require_plain_text(texts, tokenizer)
    own = set()
    for path in recipe.data.rows.values():
        for source in recipe.grid.sources:
            rows = read_user_rows(rows_file(path, source), messages=recipe.data.messages)
            own |= {row.system for row in rows}
    own_turns = {turn: f"the prompt of {name!r}" for name, turn in personas.conditions.items()}
    turns |= {name: turn for turn, name in own_turns.items() if turn not in turns.values()}
    if "" in own:
        turns["rows with an empty system turn"] = EMPTY
    if None in own and recipe.data.persona_prompt == "as_written":
        turns["rows without a system turn"] = TEMPLATE_DEFAULT
    tokenizer.require_conditions(turns)
    require_no_control_tokens(recipe.data, recipe.grid.sources, tokenizer)


def audit_set(
    graph: Graph, name: str, rows: Sequence[Row], rendered: Sequence[Rendered], tokenizer: ChatTokenizer
) -> list[Finding]:
    """What the audit finds in one training set: its rows, and these as the model reads them."""
    letters = graph.behaviors[name.split("/")[0]].spec.measure == "letters"
    return audit_rows(
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
    graph = Graph(recipe) if store is None else graph_of_run(recipe, store)
    sets = {stage.work["set"]: stage for stage in _row_stages(graph)}
    for name in names:
        if name not in sets:
            fix = did_you_mean(name, sets, f"use one of {', '.join(sets)}")
            raise RecipeError(f"no training set is called {name!r}", where="--of", fix=fix)
    tokenizer = recipe_tokenizer(graph)
    for name, stage in sets.items():
        if not names or name in names:
            rows = _built_rows(stage, store) or with_placeholders(stage.work["rows"])
            rendered = [render_row(row, graph.personas, tokenizer, recipe.behavior.max_length_tok) for row in rows]
            yield name, peek_lines(rows, rendered, tokenizer, n_rows)


def recipe_tokenizer(graph: Graph) -> ChatTokenizer:
    """The tokenizer of the recipe's base model, which is downloaded or converted first if it never was."""
    settings = graph.recipe.model
    # What is there is enough for its tokens: preparing an embedded model hashes all of its weights.
    folder = tokenizer_folder(graph.source, settings) or prepare_model_folder(settings, graph.source)
    return ChatTokenizer(folder, settings)


def _row_stages(graph: Graph) -> list[Stage]:
    return [stage for stage in graph.stages() if stage.kind == "rows"]


def _built_rows(stage: Stage, store: Store | None) -> list[Row] | None:
    record = store.record(stage.key) if store else None
    return [row_from_record(row) for row in store.get_json(record.outputs["rows"])] if store and record else None


# --- peek --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Text of successive tokens of one kind: whether they carry loss, and whether it is a special token."""

    text: str
    supervised: bool
    special: bool


def token_runs(rendered: Rendered, tokenizer: ChatTokenizer) -> list[TokenRun]:
    """The row's text in runs. Ordinary tokens are decoded together, as one character may span several tokens."""
    runs: list[tuple[list[int], bool, bool]] = []
    under_loss = {place for span in rendered.loss_spans for place in range(*span)}
    for place, token in enumerate(rendered.ids):
        supervised, special = place in under_loss, tokenizer.is_special(token)
        if runs and not special and runs[-1][1:] == (supervised, False):
            runs[-1][0].append(token)
        else:
            runs.append(([token], supervised, special))
    return [
        TokenRun(tokenizer.decode(ids, skip_special=False), supervised, special) for ids, supervised, special in runs
    ]


def peek_lines(
    rows: Sequence[Row], rendered: Sequence[Rendered], tokenizer: ChatTokenizer, n: int
) -> list[RenderableType]:
    """`n` rows, alternating between personas in an order seeded by their ids, then a table of counts per persona.

    Tokens that carry loss are green and stand between ⟦ and ⟧; special tokens are spelled out; a line break under loss
    shows as ⏎. The items are to be printed one by one with a rich console.
    """
    rendering_of = {row.id: rendering for row, rendering in zip(rows, rendered, strict=True)}
    lines: list[RenderableType] = [_row(row, rendering_of[row.id], tokenizer) for row in _chosen(rows, n)]
    return [*lines, _table(rows, rendered)]


def with_placeholders(rows: Sequence[Row]) -> list[Row]:
    """The rows with `NOT_SAMPLED` in place of the answers that are still to be sampled."""
    return [row.answered(NOT_SAMPLED) if row.completion is None else row for row in rows]


def _chosen(rows: Sequence[Row], n: int) -> list[Row]:
    """n rows in turn from each persona, so that every persona appears as early as possible."""
    queues: dict[str, Iterator[str]] = {}
    by_id = {row.id: row for row in rows}
    for persona in dict.fromkeys(row.persona for row in rows):
        queues[persona] = iter(seeded_order([row.id for row in rows if row.persona == persona], "peek"))
    chosen: list[Row] = []
    while queues and len(chosen) < n:
        for persona in list(queues):
            identity = next(queues[persona], None)
            if identity is None:
                del queues[persona]
            elif len(chosen) < n:
                chosen.append(by_id[identity])
    return chosen


def _row(row: Row, rendered: Rendered, tokenizer: ChatTokenizer) -> RenderableType:
    share = rendered.n_supervised / max(1, len(rendered.ids))
    cut = ", cut at the maximum length" if rendered.truncated else ""
    head = Text(
        f"{row.id}  [{row.role}]  {rendered.n_supervised} of {len(rendered.ids)} tokens carry loss ({share:.0%}){cut}",
        style="bold",
    )
    body = Text()
    inside = False
    for run in token_runs(rendered, tokenizer):
        if run.supervised and not inside:
            body.append(OPEN, style=_LOSS)
        elif inside and not run.supervised:
            body.append(CLOSE, style=_LOSS)
        inside = run.supervised
        text = run.text.replace("\n", "⏎\n") if run.supervised else run.text
        style = _LOSS if run.supervised else _READ
        body.append(text, style=f"{style} {_SPECIAL}" if run.special and not run.supervised else style)
    if inside:
        body.append(CLOSE, style=_LOSS)
    return Group(head, body, Text(""))


def _table(rows: Sequence[Row], rendered: Sequence[Rendered]) -> Table:
    table = Table(title=f"{OPEN}…{CLOSE} tokens that carry loss", title_justify="left")
    for name in ("persona", "role", "rows", "tokens", "supervised", "share"):
        table.add_column(name, justify="left" if name in ("persona", "role") else "right")
    groups: dict[tuple[str, str], list[Rendered]] = {}
    for row, rendering in zip(rows, rendered, strict=True):
        groups.setdefault((row.persona, row.role), []).append(rendering)
    for (persona, role), group in groups.items():
        n_tok = sum(len(rendering.ids) for rendering in group)
        n_loss = sum(rendering.n_supervised for rendering in group)
        table.add_row(persona, role, f"{len(group):,}", f"{n_tok:,}", f"{n_loss:,}", f"{n_loss / max(1, n_tok):.1%}")
    return table
