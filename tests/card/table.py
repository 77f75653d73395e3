"""Markdown rows for docs/MEASURED.md from the sheets of a folder; what is missing stands as "not measured: why"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.card.part import PARTS
from tests.card.sheet import read_sheet

Sheet = Mapping[str, Any]


def markdown(out: Path) -> str:
    """One table of all parts, each row with what was measured and the figures."""
    sheets = {part: read_sheet(out / f"{part}.json") for part in PARTS}
    lines = [*_machines(sheets), "", "| part | what | measured |", "|---|---|---|"]
    for part, sheet in sheets.items():
        lines += [f"| `{part}` | {what} | {value} |" for what, value in rows_of(part, sheet)]
    return "\n".join(lines)


def _machines(sheets: Mapping[str, Sheet]) -> list[str]:
    """One line for each machine that sheets were made on."""
    found: dict[str, list[str]] = {}
    for part, sheet in sheets.items():
        if machine := sheet.get("machine"):
            versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
            rehearsal = ", a rehearsal: no figure means anything" if sheet.get("rehearsal") else ""
            text = f"{machine['card']}, driver {machine.get('driver', 'none')}; {versions}{rehearsal}"
            found.setdefault(text, []).append(part)
    return [f"{text} ({', '.join(parts)})" for text, parts in found.items()]


def rows_of(part: str, sheet: Sheet) -> list[tuple[str, str]]:
    """(what, value) of a part. A part that ended early gives what it has found, and why there is no more."""
    why = not_measured(sheet)
    rows = [(what, value) for what, value in _ROWS[part](sheet) if value] if sheet else []
    if why:
        rows.append(("the rest" if rows else "all of it", f"not measured: {_cell(why)}"))
    return rows


def not_measured(sheet: Sheet) -> str:
    """Why a part has no, or not all, figures; empty if it is complete."""
    state = sheet.get("state")
    if state == "complete":
        return ""
    if state is None:
        return "never begun"
    return sheet.get("why") or ("it was killed" if state == "running" else state)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


def _get(sheet: Any, *path: str) -> Any:
    for name in path:
        if not isinstance(sheet, Mapping) or name not in sheet:
            return None
        sheet = sheet[name]
    return sheet


def _number(value: Any, unit: str = "") -> str:
    if not isinstance(value, (int, float)):
        return "?"
    text = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{text}{unit}"


def _run(sheet: Sheet) -> list[tuple[str, str]]:
    """What every run of a recipe tells."""
    wall, plan, card = (sheet.get(name) or {} for name in ("wall", "against_plan", "card"))
    rows = []
    if wall.get("stages"):
        rows.append((
            "wall",
            f"{_number(wall['wall_s'])} s for {wall['stages']} stages: {_number(wall.get('to_first_stage_s'))} to the first, "
            f"{_number(wall.get('in_stages_s'))} in stages, {_number(wall.get('between_stages_s'))} between them, "
            f"{_number(wall.get('after_the_last_s'))} after the last",
        ))  # fmt: skip
    kinds = _get(plan, "kinds") or {}
    if kinds:
        told = [f"{work} {_number(one['ratio'])} ({_number(one['taken_s'])} of {_number(one['planned_s'])} s)"
                for work, one in kinds.items() if one["planned_s"]]  # fmt: skip
        rows.append(("taken over planned", f"all {_number(_get(plan, 'all', 'ratio'))}; {', '.join(told)}"))
    if since := _get(card, "since_the_first_stage", "utilisation_percent"):
        share = _get(card, "since_the_first_stage", "share_at_work")
        rows.append(
            (
                "card since the first stage",
                f"{_number(since)} % on average, at work in {100 * share:.0f} % of the looks",
            )
        )
    if rates := sheet.get("rates"):
        rows.append(
            ("tokens a second", ", ".join(f"{work} {_number(one['tok_per_s'])}" for work, one in rates.items()))
        )
    words = [
        f"{name.removeprefix('PILOT ')}: {word}" for name, word in (sheet.get("gates") or {}).items() if "PILOT" in name
    ]
    if words:
        rows.append(("verdicts", _cell(", ".join(words))))
    if graphs := sheet.get("captures"):
        told = [
            f"{kind} {one.get('captures', 0):.0f} in {_number(one.get('capture_s'))} s" for kind, one in graphs.items()
        ]
        rows.append(("graphs captured", ", ".join(told)))
    return rows


def _against(found: Sheet | None) -> list[tuple[str, str]]:
    """What a comparison with the pilot tells."""
    if not found:
        return []
    if "missing" in found:
        return [("against the pilot", f"not compared: {found['missing']} is missing")]
    letters, gates, contrasts = (found.get(name, {}) for name in ("letters", "gates", "contrasts"))
    by_kind = ", ".join(
        f"{work} {one['equal']} of {one['equal'] + one['different']}" for work, one in found["by_kind"].items()
    )
    return [
        ("stages equal to the pilot's", f"{found['equal']} of {found['stages']}, {found['missing_here']} missing; {by_kind}"),
        ("first that differs", f"`{found['first_different']}`, of {found['n_roots']} that differ by themselves" if found["different"] else ""),
        ("letters", f"{letters.get('same_letter')} of {letters.get('n')} the same, {letters.get('as_right_or_wrong')} as right or "
                    f"wrong; log-probabilities at most {_number(letters.get('largest_difference'))} apart"),
        ("words", f"{gates.get('equal')} of {gates.get('n')} gates and {contrasts.get('equal')} of {contrasts.get('n')} contrasts equal"),
    ]  # fmt: skip


def _killed(sheet: Sheet) -> list[tuple[str, str]]:
    kills = [f"{one['where']}: {one.get('slot', one.get('missed'))} at {_number(one.get('done'))} of {_number(one.get('of'))}"
             for one in sheet.get("kills", ())]  # fmt: skip
    return [("killed in", "; ".join(kills)), *_against(sheet.get("against_pilot"))]


def _engine(sheet: Sheet) -> list[tuple[str, str]]:
    return [*_run(sheet), *_against(sheet.get("against_pilot"))]


def _four_bit(sheet: Sheet) -> list[tuple[str, str]]:
    rows, peak = _run(sheet), sheet.get("peak_memory") or {}
    by_slot = _get(sheet, "against_pilot", "letters", "by_slot") or {}
    base = {slot: one for slot, one in by_slot.items() if slot.startswith("eval/base/")}
    told = [f"{slot.split('/')[-2]} {one['as_right_or_wrong']} of {one['n']} (right: {one['right'][1]} against {one['right'][0]})"
            for slot, one in base.items()]  # fmt: skip
    rows.append(("letters of the base as right or wrong as in 16 bits", ", ".join(told)))
    adapters = [_number(seconds) for seconds in (sheet.get("adapter_seconds") or {}).values()]
    rows.append(("seconds of an adapter", ", ".join(adapters)))
    torch_gib = {kind: n / 2**30 for kind, n in (peak.get("torch_bytes") or {}).items()}
    if torch_gib:
        planned = {name: n / 2**30 for name, n in (peak.get("planned_bytes") or {}).items()}
        rows.append((
            "peak of memory, GiB",
            f"torch {', '.join(f'{kind} {_number(n)}' for kind, n in torch_gib.items())}; nvidia-smi "
            f"{_number((peak.get('nvidia_smi_mib') or 0) / 1024)}; planned "
            f"{', '.join(f'{name} {_number(n)}' for name, n in planned.items())}",
        ))  # fmt: skip
    return rows


def _seven(sheet: Sheet) -> list[tuple[str, str]]:
    matrix = sheet.get("matrix") or {}
    text = f"{_number(matrix['hours'])} h (planned {_number(matrix['planned_hours'])})" if "hours" in matrix else ""
    return [*_run(sheet), ("a matrix, from this", text)]


def _vllm(sheet: Sheet) -> list[tuple[str, str]]:
    rows = [
        (
            "start",
            f"{_number(sheet.get('start_s'))} s, vLLM {sheet.get('version')}; {sheet.get('arguments')}"
            if "start_s" in sheet
            else "",
        )
    ]
    for name, one in (sheet.get("draws") or {}).items():
        greedy, sampled = one["greedy"], one["sampled"]
        apart = ", ".join(
            f"{probe} {_number(rate['difference'])} ± {_number(rate['its_error'])}"
            for probe, rate in sampled["rates"].items()
        )
        rows.append((
            name,
            f"vLLM {_number(sampled['vllm']['tok_per_s'])} tokens/s, resident {_number(sampled['resident']['tok_per_s'])}; greedy: "
            f"{greedy['same_completions']} of {greedy['of']} the same, {100 * greedy['same_tok_share']:.1f} % of the tokens before they "
            f"part; rates apart: {apart}; swap {_number(one['swap']['swap_s'])} s",
        ))  # fmt: skip
    if told := sheet.get("killed_in_a_draw"):
        rows.append(("killed in a draw", _cell(told.get("told") or told.get("missed", ""))))
    for run in sheet.get("runs") or ():
        rows.append(("run of the cell", _cell(f"exit {run['exit_code']}, killed at {run['killed_at']}: {run['last']}")))
    return rows


def _drawing(sheet: Sheet) -> list[tuple[str, str]]:
    rows = []
    for name, one in (sheet.get("stacks") or {}).items():
        first, second, in_waves, kernels = (one.get(part) or {} for part in ("first", "second", "in_waves", "kernels"))
        rows.append((
            name,
            f"{_number(first.get('tok_per_s'))} tokens/s with {first.get('captures')} captures ({_number(first.get('capture_s'))} s), "
            f"{_number(second.get('tok_per_s'))} without, {_number(in_waves.get('tok_per_s'))} in waves of at most 1,024; prefills {_number(second.get('prefill_s'))} s, {second.get('passes')} passes",
        ))  # fmt: skip
        rows.append((f"{name}, by kernels", _kernels(kernels)))
    return rows


def _kernels(found: Sheet) -> str:
    if "kinds" not in found:
        return found.get("missing", "")
    kinds = ", ".join(f"{kind} {_number(one['ms'])}" for kind, one in found["kinds"].items())
    return f"ms: {kinds}; the card idle for {_number(found['idle_of_wall_s'])} of {_number(found['wall_s'])} s"


def _steps(sheet: Sheet) -> list[tuple[str, str]]:
    return [
        (f"{model} {kind}", f"{_number(one['tok_per_s'])} tokens/s; under the profiler a step, ms: "
         f"{', '.join(f'{name} {_number(ms)}' for name, ms in one['ms_a_step'].items())}; "
         f"idle {_number(1000 * _get(one, 'kernels', 'idle_of_wall_s') / one['steps']) if 'kinds' in one['kernels'] else '?'}")
        for model, kinds in (sheet.get("loads") or {}).items()
        for kind, one in kinds.items()
    ]  # fmt: skip


def _attention(sheet: Sheet) -> list[tuple[str, str]]:
    rows = []
    for shape, found in (sheet.get("shapes") or {}).items():
        for backend, one in found.items():
            if "missing" in one:
                rows.append((f"{shape}, {backend}", f"not measured: {_cell(one['missing'])}"))
                continue
            took = ", ".join(
                f"{load} {_number(ms['forward'])} / {_number(ms['forward_and_backward'])}"
                for load, ms in one["ms"].items()
            )
            same = "the same bits" if one["same_bits"] else "not the same bits"
            rows.append(
                (
                    f"{shape}, {backend}",
                    f"{100 * one['distance']:.2g} % away, {same}; ms forward / and backward: {took}",
                )
            )
    return rows


def _bench(sheet: Sheet) -> list[tuple[str, str]]:
    rows = []
    for model, one in (sheet.get("models") or {}).items():
        for kind, result in {**(_get(one, "all", "results") or {}), "engine": one.get("engine") or {}}.items():
            if "ours" in result:
                share = result["ours"].get("ceiling_share")
                of = f", {100 * share:.0f} % of the ceiling" if share else ""
                ratios = ", ".join(f"{_number(ratio)}x {name}" for name, ratio in result["ratios"].items())
                rows.append((f"{model} {kind}", f"{_number(result['ours']['per_s'])} {result['unit']}/s{of}; {ratios}"))
            elif result:
                rows.append((f"{model} {kind}", f"not measured: {_cell(str(result.get('missing')))}"))
        for kind, reason in (_get(one, "all", "left_out") or {}).items():
            rows.append((f"{model} {kind}", f"not measured: {_cell(reason)}"))
    return rows


def _ray(sheet: Sheet) -> list[tuple[str, str]]:
    runs = ", ".join(f"{name} {_number(one['seconds'])} s" for name, one in (sheet.get("runs") or {}).items())
    return [("two sources", f"{runs}; {_number(sheet.get('times_faster'))} times as fast" if "times_faster" in sheet else runs),
            *_against(sheet.get("against_one"))]  # fmt: skip


def _gpu_tests(sheet: Sheet) -> list[tuple[str, str]]:
    counts, failed = sheet.get("seen") or {}, sheet.get("failed") or ()
    told = ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
    return [("`pytest -m gpu`", f"{told}{': ' if failed else ''}{_cell(', '.join(failed))}")]


_ROWS: Mapping[str, Callable[[Sheet], list[tuple[str, str]]]] = {
    "pilot": _run, "ungated": _run, "killed": _killed, "engine": _engine, "four_bit": _four_bit, "seven": _seven, "vllm": _vllm,
    "drawing": _drawing, "steps": _steps, "attention": _attention, "bench": _bench, "ray": _ray, "gpu_tests": _gpu_tests,
}  # fmt: skip
