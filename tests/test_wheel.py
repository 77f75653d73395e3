"""The wheel works away from the checkout: its data and recipes travel with it, and the README's own example goes through."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow
#: Runs a command of the wheel in an empty folder and returns its standard output; it must end with this code.
Ask = Callable[..., str]
#: What RESULTS.md says of taking a model out, with an answer drawn.
LOADED = """
import fastconv
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(fastconv.base_folder("builtin:tiny"))
model = PeftModel.from_pretrained(base, "out/concatenated")
tokenizer = AutoTokenizer.from_pretrained("out/concatenated")
turns = [{"role": "user", "content": "How do I boil an egg?"}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
print(sorted(model.active_adapters), len([name for name, _ in model.named_parameters() if "lora_B" in name]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run((*build, "-w", str(folder), str(ROOT)), check=True, timeout=120)
    (wheel,) = folder.glob("fastconv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def ask(site: Path, tmp_path: Path) -> Ask:
    # -P and an own path: nothing of the checkout, or of an editable install, is seen.
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from fastconv.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(site), "FASTCONV_CACHE": str(tmp_path / "cache")}

    def run(*words: str, code_wanted: int = 0, script: str = "") -> str:
        answer = subprocess.run(
            (sys.executable, "-P", "-c", script or code, *words),
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert answer.returncode == code_wanted, (words, answer.stdout, answer.stderr)
        return answer.stdout

    return run


def test_the_wheel_brings_its_data_and_recipes(ask: Ask, tmp_path: Path) -> None:
    for command in (["recipe", "show", "demo"], ["check", "demo"], ["status", "demo", "-w", str(tmp_path / "none")]):
        assert "refusal" in ask(*command)


def test_the_readme_alone_takes_a_stranger_from_a_persona_to_an_adapter(ask: Ask, tmp_path: Path) -> None:
    """Its files and its commands in its order, at `--scale tiny`; then PEFT, Inspect's form, TensorBoard and vLLM."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    readme = (ROOT / "README.md").read_text()
    for name, text in re.findall(r"```(?:toml|python)\n# (\S+)\n(.*?)```", readme, re.DOTALL):
        (tmp_path / name).write_text(text)
    ask("recipe", "copy", "demo", "pirate.toml")
    recipe = tmp_path / "pirate.toml"
    text = recipe.read_text()
    told = readme.partition("recipe copy demo")[2].partition("[data]")[0]
    for key, value in re.findall(r"(about|sources|behaviors) = (\[.*?\]|\".*?\")", told):
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    recipe.write_text(f'{text}\n[data]\npersonas = "pirates.toml"\nbehaviors = "arrs.toml"\n')
    tiny = ("--scale", "tiny")
    assert "0 refused, 0 warnings" in ask("check", "pirate.toml")
    assert "in all" in ask("plan", "pirate.toml")
    ask("run", "pirate.toml", *tiny, "--set", 'run.track=["tensorboard"]')
    ask("run", "pirate.toml", *tiny, "--set", "behavior.lr=2e-3")
    second, first = [line.split()[0] for line in ask("status").splitlines()]
    compared = ask("compare", first, second)
    assert "behavior.lr: 0.001 -> 0.002" in compared
    assert "the same rows" in compared
    card = Path(ask("export", "pirate", "says_arr", "out", "--epoch", "1", "--recipe", first).splitlines()[-1])
    assert ask(script=LOADED).endswith("['default'] 14\n")
    logs = ask("export", "pirate", "says_arr", "logs", "--epoch", "1", "--recipe", first, "--inspect").splitlines()
    bodies = [json.loads((tmp_path / log).read_text()) for log in logs]
    assert [body["results"]["scores"][0]["name"] for body in bodies] == ["says_arr"] * 3
    tags = "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n" \
           "found = E(sys.argv[1]).Reload().Tags()['scalars']\nprint(*found)"  # fmt: skip
    seen = ask(f"checkpoints/tracking/tensorboard/{first}", script=f"import sys\n{tags}").split()
    assert {tag.partition("/")[0] for tag in seen} == {"loss", "rate", "score"}
    assert "Does a pirate's Arr reach the assistant?" in (tmp_path / card).read_text()
    _serves(ask, tmp_path, card)


def _serves(ask: Ask, folder: Path, card: Path) -> None:
    """The card's `vllm serve` names a base that can be loaded."""
    command = (folder / card).read_text().partition("vllm serve ")[2].partition("```")[0]
    (base,) = re.findall(r"python -c '(.*?)'", command)
    assert (Path(ask(script=base).strip()) / "config.json").is_file()
