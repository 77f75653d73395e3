"""The README: short, with links that lead somewhere, costs that are those of `plan`, and an example that works.

After a change of plan or recipes, `python -m tests.test_readme` writes the table of costs anew.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastconv.cli import app
from fastconv.datasets.files import find_recipe, shipped_recipes
from fastconv.experiment.graph import Graph
from fastconv.planning.plan import costs_table
from fastconv.recipe import load_recipe
from tests import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_it_is_two_screens_long() -> None:
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    found = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert all((page.parent / link).exists() for link in found if "://" not in link), found


def test_commands_that_pages_show_are_commands() -> None:
    """Every `fastconv VERB` in the pages, with the options it shows, is one that the command line has."""
    runner, known = CliRunner(), {}
    for page in PAGES:
        for line in re.findall(r"^fastconv (.+)$", page.read_text(), re.MULTILINE):
            words = line.partition("  ")[0].partition(" #")[0].split()
            path = (words[0],)
            if words[0] == "recipe":
                path = ("recipe", words[1])
            elif words[0] == "judge":
                path = ("judge", words[1] if words[1] == "calibrate" else "finish")
            if path[0].startswith("-"):
                continue
            if path not in known:
                known[path] = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
            assert known[path].exit_code == 0, f"{page.name}: {line}"
            options = [word for word in words if re.match(r"--?[a-z]", word)]
            assert all(option in known[path].output for option in options), f"{page.name}: {line}"
    assert len(known) > 12


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
