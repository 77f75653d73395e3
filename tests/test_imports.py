"""The blueprint's rule: imports run downward only. Read from the source, so that it holds for lazy imports too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.loop_kit import DoneRun

PACKAGE = ROOT / "fastconv"
#: Modules that may import torch: the engine, the bench, and what computes on the resident base: stages, and served answers.
TORCH_MODULES = ("engine", "bench", "run.executor", "run.stacks", "run.training", "run.standalone", "serve")
#: Every folder and every module of the root, the lowest first. A module imports from lower levels and from its own folder.
LEVELS = (
    ("errors",),
    ("recipe", "seeding", "hub", "startup"),
    ("store", "chat"),
    ("datasets", "engine", "stats"),
    ("judge", "audit"),
    ("experiment",),
    ("analysis",),
    ("run",),
    ("planning", "report"),
    ("bench", "show"),
    ("cluster", "api", "serve"),
    ("cli",),
    ("", "__main__"),  # what `import fastconv` and `python -m fastconv` offer
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return "" if name == "__init__" else name.removesuffix(".__init__")


def _imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Every module imported anywhere in a file, by full name; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _ours(path: Path) -> set[str]:
    """Modules of fastconv that a file imports, without the package's own name."""
    known = {_name(module) for module in MODULES}
    imported = {name.removeprefix("fastconv.") for name in _imports(path) if name.startswith("fastconv.")}
    return {name for name in imported if name in known}


def _may_import_torch(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in TORCH_MODULES)


def test_every_module_stands_on_a_level() -> None:
    assert {_name(path).split(".")[0] for path in MODULES} == set(LEVEL_OF)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_run_downward_only(path: Path) -> None:
    folder = _name(path).split(".")[0]
    for imported in _ours(path):
        below = imported.split(".")[0]
        assert below == folder or LEVEL_OF[below] < LEVEL_OF[folder], f"{_name(path)} imports {imported}"


def test_nothing_imports_in_circles() -> None:
    wanted = {_name(path): _ours(path) for path in MODULES}
    # The one import that points back: a base is proven where it is loaded, and the proof packs, trains and samples with it.
    wanted["engine.model"].discard("engine.proof")
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for imported in wanted.get(name, ()):
                visit(imported, (*above, name))
            done.add(name)

    for name in wanted:
        visit(name, ())


def _importers(*roots: str, lazy: bool = True) -> set[str]:
    return {_name(p) for p in MODULES if any(n.split(".")[0] in roots for n in _imports(p, lazy=lazy))}


def test_only_the_engine_and_the_executor_know_torch() -> None:
    allowed = {name for name in map(_name, MODULES) if _may_import_torch(name)} | {"planning.doctor"}
    assert _importers("torch", "transformers", "safetensors", "accelerate") <= allowed
    assert "planning.doctor" not in _importers("torch", lazy=False)  # only where a GPU is asked after


def test_only_the_cluster_knows_ray() -> None:
    assert {name.split(".")[0] for name in _importers("ray")} == {"cluster"}
    assert not _importers("ray", lazy=False)


def test_the_classifier_of_the_audit_is_imported_where_it_is_used() -> None:
    assert _importers("sklearn") == {"audit.shortcuts"}
    assert not _importers("sklearn", lazy=False)  # `check` without answers, `plan` and `status` start without it


def test_a_run_and_a_check_begin_without_scipys_distributions() -> None:
    """Their import took longer than the audit of a recipe."""
    begun = "import sys, fastconv.run.run, fastconv.cli.planning; print('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", begun], capture_output=True, text=True, check=True).stdout == "False\n"


def test_peft_and_trl_are_touched_by_the_engine_and_the_bench_only() -> None:
    assert all(name.startswith(("engine", "bench")) for name in _importers("peft", "trl"))


def test_the_upper_levels_import_only_the_torch_free_part_of_the_engine() -> None:
    free = {
        "engine",
        "engine.builtin",
        "engine.folder",
        "engine.locate",
        "engine.device",
        "engine.shapes",
        "engine.vllm",
        "engine.vllm.memory",
    }
    for name in free:
        path = next(path for path in MODULES if _name(path) == name)
        assert not any(n.split(".")[0] in ("torch", "transformers") for n in _imports(path, lazy=False)), name
    for path in MODULES:
        name = _name(path)
        if not name or _may_import_torch(name):
            continue
        eager = {n.removeprefix("fastconv.") for n in _imports(path, lazy=False) if n.startswith("fastconv.engine")}
        assert {n for n in eager if n in {_name(p) for p in MODULES}} <= free, name


def test_only_chat_calls_a_chat_template() -> None:
    assert _importers("jinja2") <= {"chat.template", "report.blocks"}
    callers = {_name(p) for p in MODULES if "apply_chat_template" in p.read_text()}
    references = {"engine.trl_reference", "engine.selftest"}  # ours is compared with these
    assert callers <= references | {name for name in callers if name.startswith("bench")}


def test_only_the_store_opens_sqlite_and_writes() -> None:
    assert _importers("sqlite3") <= {
        "store.ledger",
        "store.judge_ledger",
        "store.io",
    }  # io connects, and names the faults of both
    writes = ("write_text(", "write_bytes(", ".save_pretrained(", "save_file(", '.open("w', 'open("w')
    for path in MODULES:
        name = _name(path)
        if name in ("store.ledger", "store.io", "engine.builtin", "engine.export") or name.startswith("bench"):
            continue  # the converted model's cache and PEFT exports are the user's folders, no artefacts
        source = path.read_text().replace("from fastconv.store.ledger import Store, write_text", "")
        reports = name in (
            "report",
            "report.export",
            "report.published",
            "cli.planning",
        )  # the user's folders too, by the store's safe writing
        used = [word for word in writes if word in source and not (word == "write_text(" and reports)]
        assert not used, f"{name}: {used}"


def test_pickle_is_never_used() -> None:
    for path in MODULES:
        used = set(_imports(path))
        assert not used & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, _name(path)
        assert "torch.save(" not in path.read_text().replace("safetensors.torch.save(", ""), _name(path)
        assert "torch.load(" not in path.read_text().replace("safetensors.torch.load(", ""), _name(path)


def test_verbs_that_compute_nothing_start_without_torch(done_run: DoneRun, tmp_path: Path) -> None:
    """One after another in one process: the first that imports it is the last one told."""
    run, workspace = done_run.finished.run, ["-w", str(done_run.workspace)]
    verbs = [
        ["--help"],
        ["recipe", "show", "demo"],
        ["status", run, *workspace],
        ["gate", run, *workspace],
        ["report", run, *workspace, "--reports", str(tmp_path)],
        ["doctor", "-w", str(tmp_path)],
        ["verify", str(tmp_path / "none.html"), *workspace],
        ["compare", run, run, *workspace],
        ["published"],
    ]
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fastconv.cli import app\n"
        f"for words in {verbs!r}:\n"
        "    answer = CliRunner().invoke(app, words)\n"
        "    heavy = sorted({'torch', 'transformers'} & set(sys.modules))\n"
        "    print(words[0], heavy, answer.exception)\n"
        "    assert answer.output and not heavy\n"
        "    ended = answer.exception\n"
        "    assert ended is None or isinstance(ended, SystemExit) or type(ended).__module__ == 'fastconv.errors'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == len(verbs)


def test_importing_fastconv_loads_neither_torch_nor_polars() -> None:
    script = "import sys, fastconv; print({'torch', 'transformers', 'polars', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"
