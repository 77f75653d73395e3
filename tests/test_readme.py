"""The README: short, with links that lead somewhere, costs that are those of `plan`, and an example that works.

After a change of plan or recipes, `python -m tests.test_readme` writes the table of costs anew.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.datasets.files import find_recipe, shipped_recipes
from fastconv.experiment.graph import Graph
from fastconv.planning.plan import costs_table
from fastconv.recipe import Recipe, load_recipe, recipe_keys
from tests import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "docs" / "example" / "README.md", ROOT / "docs" / "notebook.ipynb"]  # fmt: skip


def test_it_is_two_screens_long() -> None:
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links, headings that they name, pictures, and pages that are named in words."""
    text = _text(page)
    for link in re.findall(r"\]\(([^)]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        name, _, heading = link.partition("#")
        if "://" in link:
            continue
        there = page.parent / name if name else page
        assert there.exists(), link
        assert not heading or heading in map(_anchor, re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)), link
    for name in re.findall(r"\b([A-Z]{3,}\.md)\b", text):
        assert any((folder / name).exists() for folder in (page.parent, ROOT, ROOT / "docs")), name
    for path in re.findall(r"`((?:docs|data|tests|fastconv|recipes)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def _text(page: Path) -> str:
    """A page's text; of a notebook its words and its code."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def helps() -> Callable[..., str]:
    """The help of a verb by its words; fails for what is no verb."""
    known: dict[tuple[str, ...], str] = {}

    def of(*path: str) -> str:
        if path not in known:
            found = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
            assert found.exit_code == 0, path
            known[path] = found.output
        return known[path]

    return of


def _asks_what_there_is(command: str, helps: Callable[..., str]) -> None:
    """A command's verb and options exist, and the recipe that it names ships, is a file of one's own, or stands for one."""
    words = command.split()
    path = (words[0],)
    if words[0] == "recipe":
        path = tuple(words[:2])
    elif words[0] == "judge":
        path = ("judge", "calibrate" if words[1:2] == ["calibrate"] else "finish")
    if path[0].startswith(("-", ".")):
        return
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", helps(*path)))
    assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known, command
    if path[0] in ("run", "plan", "check", "doctor", "status", "gate", "peek", "report") and words[1:]:
        named = words[1]
        own = named.endswith(".toml") or named.isupper() or named.startswith(("-", "{", "RE")) or named == "rows"
        assert own or named in shipped_recipes(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_show_are_commands(page: Path, helps: Callable[..., str]) -> None:
    """Every `fastconv VERB`, every target of `make` and every key of a recipe in the pages is one that there is."""
    text = _text(page)
    lines = [
        line.partition("  ")[0].partition(" #")[0] for line in re.findall(r"^\s*fastconv (.+)$", text, re.MULTILINE)
    ]
    for command in (*re.findall(r"`fastconv ([^`]+)`", text), *lines):
        _asks_what_there_is(command, helps)
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^\s*)make ([a-z][\w-]+)", text, re.MULTILINE)) <= set(targets)
    keys = {one.key for one in recipe_keys()}
    for key in re.findall(r"`([a-z]+\.[a-z_0-9]+)(?:\s?=[^`]*|)`", text) + re.findall(
        r"--set '?([a-z]+\.[a-z_0-9]+)", text
    ):
        table, _, name = key.partition(".")
        if table in Recipe.model_fields and name not in ("toml", "jsonl", "csv", "py"):
            parts = key in keys or any(one.startswith(f"{key}.") for one in keys)
            assert parts or (ROOT / "fastconv" / table / f"{name}.py").exists(), key


def test_mends_name_commands_and_pages_that_there_are(helps: Callable[..., str]) -> None:
    """What the package's own messages tell a user to write."""
    for file in sorted((ROOT / "fastconv").rglob("*.py")):
        text = file.read_text()
        for command in re.findall(r"`fastconv ([^`{]+)`", text):
            _asks_what_there_is(command, helps)
        for name in re.findall(r"\b(?:docs/)?([A-Z]{3,}\.md)\b", text):
            assert (ROOT / "docs" / name).exists() or (ROOT / name).exists(), (file.name, name)


@pytest.mark.slow
def test_costs_are_those_of_plan() -> None:
    assert with_costs_of_today() == README


def with_costs_of_today() -> str:
    """The README with the table of costs as `plan` gives it now."""
    table = costs_table(load_recipe(find_recipe(name)) for name in shipped_recipes())
    page, n = re.subn(
        r"(<!-- costs: .* -->\n).*?(\n<!-- /costs -->)", lambda m: m[1] + table + m[2], README, flags=re.DOTALL
    )
    assert n == 1
    return page


def test_costs_of_the_first_recipes_are_those_of_plan() -> None:
    for row in costs_table(load_recipe(find_recipe(name)) for name in ("pilot", "pilot_small")).splitlines():
        assert row in README


def test_the_pirate_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"```(?:toml|python)\n# (\S+)\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} == {"pirates.toml", "arrs.toml", "arr.py"}
    assert CliRunner().invoke(app, ["recipe", "copy", "demo", "pirate.toml"]).exit_code == 0
    text = (tmp_path / "pirate.toml").read_text()
    for key, value in re.findall(r"(sources|behaviors) = (\[.*?\])", README.partition("recipe copy demo")[2]):
        text, n = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert n == 1
    (own,) = re.findall(r"(\[data\])  (personas = \S+)  (behaviors = \S+)", README)
    (tmp_path / "pirate.toml").write_text(text + "\n" + "\n".join(own) + "\n")
    assert tomllib.loads((tmp_path / "pirate.toml").read_text())["name"] == "pirate"
    answer = CliRunner().invoke(app, ["check", "pirate.toml"])
    assert answer.exit_code == 0, answer.output
    assert "0 refused, 0 warnings" in answer.output
    graph = Graph(load_recipe("pirate.toml"))
    rule = graph.phrase_rule(graph.behaviors["says_arr"])
    assert [rule.score(text)[0] for text in ("Boil it. Arr!", "Boil it.")] == [1.0, 0.0]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_costs_of_today())
