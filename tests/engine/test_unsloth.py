"""How the base goes through Unsloth, seen by a fake of it: imported first, tested versions only, loaded in full."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastconv.engine import locate
from fastconv.engine.locate import BITSANDBYTES, UNSLOTH, engine_identity, require_versions
from fastconv.errors import ModelError, RecipeError
from fastconv.experiment.graph import _training
from fastconv.recipe import ConvergenceSettings, ModelSettings, parse_recipe
from tests import ROOT

#: As the real one: refuses nothing, patches what it imports, and quantizes unless told not to.
FAKE = """
import gc
import sys
COLLECTED = gc.isenabled()
print("fake banner")
from unsloth import first_part
LATE = [name for name in ("transformers", "peft", "trl") if name in sys.modules]
import transformers

class FastLanguageModel:
    calls = []
    @classmethod
    def from_pretrained(cls, name, **options):
        cls.calls.append(options)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=options["dtype"], local_files_only=True)
        return model, None

class FastModel:
    def __getattr__(self, name):
        raise AssertionError("FastModel drops a second adapter")
"""
KERNELS = """
def get_lora_parameters(proj): return "theirs"
def get_lora_parameters_bias(proj): return "theirs"
def _has_multiple_active_adapters(proj): return True
def _has_activation_fake_quantizer(proj): return True
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the fakes and their metadata."""
    files = {
        "unsloth/__init__.py": FAKE,
        "unsloth/first_part.py": "",
        "unsloth/kernels/__init__.py": "",
        "unsloth/kernels/fast_lora.py": KERNELS,
        "unsloth_zoo/__init__.py": "",
        "bitsandbytes/__init__.py": "",
    }
    for name, version in (("unsloth", "2026.10.7"), ("unsloth_zoo", "2026.10.7"), ("bitsandbytes", "0.50.2")):
        files[f"{name}-{version}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "site"


def run(site: Path, script: str, *words: str) -> str:
    """What a fresh process with the fakes prints."""
    prelude = "import torch\nfrom pathlib import Path\nfrom fastconv.engine import model, unsloth as unsloth_path\n"
    prelude += "from fastconv.recipe import ModelSettings\nimport sys\n"
    path = os.pathsep.join([str(site), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script), *words],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_base_comes_through_unsloth_before_anything_it_patches(site: Path, tiny_qwen: Path) -> None:
    said = run(
        site,
        """
        unsloth_path.require_usable = lambda device, dtype: None  # there is no GPU here
        adopted = []
        unsloth_path.adopt = adopted.append  # needs Triton: tests/engine/test_fused.py
        settings = ModelSettings(id=sys.argv[1], engine="unsloth", device="cpu", dtype="bfloat16")
        loaded = model.load_base(settings)
        import unsloth
        unsloth_path.assert_imported_first()
        options = unsloth.FastLanguageModel.calls[0]
        print(unsloth.LATE, options["load_in_4bit"], options["max_seq_length"], adopted == [loaded.model])
        print(loaded.device, loaded.dtype)
        """,
        str(tiny_qwen),
    )
    assert said == "[] False 4096 True\ncpu torch.bfloat16\n"  # and the banner did not come through


@pytest.mark.slow
def test_the_start_is_told_by_parts_and_the_import_is_not_slowed_by_collections(site: Path, tiny_qwen: Path) -> None:
    said = run(
        site,
        """
        import contextlib, gc
        unsloth_path.require_usable = lambda device, dtype: None
        unsloth_path.adopt = lambda model: None
        ahead = []

        @contextlib.contextmanager
        def reading_ahead(files):
            ahead.append((files, "unsloth" in sys.modules))
            yield
            ahead.append("unsloth" in sys.modules)

        model.reading_ahead, model.downloaded_weights = reading_ahead, lambda source, settings: ["weights"]
        from fastconv.startup import StartTimes
        times = StartTimes()
        model.load_base(ModelSettings(id=sys.argv[1], engine="unsloth", device="cpu", dtype="bfloat16"), None, times)
        import unsloth
        print(unsloth.COLLECTED, gc.isenabled(), ahead)
        print([name for name, seconds in times.facts().items() if seconds > 0])
        """,
        str(tiny_qwen),
    )
    assert said == "False True [(['weights'], False), True]\n['import_s', 'load_s', 'proof_s']\n"


@pytest.mark.parametrize("early", ["transformers", pytest.param("peft", marks=pytest.mark.slow)])
def test_too_late_is_refused_with_the_mend(early: str, site: Path, tiny_qwen: Path) -> None:
    said = run(
        site,
        f"""
        import {early}
        from fastconv.errors import ModelError
        try:
            unsloth_path.load(Path(sys.argv[1]), torch.bfloat16, torch.device("cpu"))
        except ModelError as error:
            print(error)
        print("unsloth" in sys.modules)
        """,
        str(tiny_qwen),
    )
    assert "was imported before unsloth" in said
    assert "engine = 'torch'" in said
    assert said.endswith("False\n")


@pytest.mark.parametrize(
    ("package", "version"), [("unsloth", "2026.9.1"), ("unsloth_zoo", "2026.11.1"), ("unsloth", "")]
)
def test_untested_versions_are_refused_with_the_mend(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = {"unsloth": "2026.10.7", "unsloth_zoo": "2026.10.7"} | {package: version or None}
    monkeypatch.setattr(locate, "version_of", have.get)
    with pytest.raises(ModelError, match=r"pip install 'unsloth>=2026.10.4,<2026.11'") as raised:
        require_versions(UNSLOTH, "model.engine", "set model.engine = 'torch'")
    assert (version or "not installed") in str(raised.value)


def test_tested_versions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"unsloth": "2026.10.4", "unsloth_zoo": "2026.10.11.post1", "bitsandbytes": "0.50.2"}
    monkeypatch.setattr(locate, "version_of", have.get)
    require_versions((*UNSLOTH, *BITSANDBYTES), "model.engine", "")


@pytest.mark.parametrize(
    ("settings", "there", "engine"),
    [
        ({"device": "cuda"}, True, "unsloth"),
        ({"device": "cuda"}, False, "torch"),
        ({"device": "cuda", "dtype": "float32"}, True, "torch"),
        ({"device": "cuda", "trainer": "trl"}, True, "torch"),
        ({"device": "cuda", "engine": "torch"}, True, "torch"),
        ({"device": "cpu"}, True, "torch"),
    ],
)
def test_what_auto_means_is_known_without_loading(
    settings: dict[str, str], there: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "is_installed", lambda packages: there)
    assert engine_identity(ModelSettings.model_validate(settings))["engine"] == engine


def test_keys_name_what_differs_from_the_default_and_nothing_else() -> None:
    assert engine_identity(ModelSettings(device="cpu")) == {"engine": "torch", "device": "cpu", "dtype": "float32"}
    assert engine_identity(ModelSettings(device="cpu", weights="4bit"))["weights"] == "4bit"
    assert "optimizer" not in _training(ConvergenceSettings())
    assert _training(ConvergenceSettings(optimizer="adamw8bit"))["optimizer"] == "adamw8bit"


@pytest.mark.parametrize(
    "model",
    [
        {"weights": "4bit", "semantics": "published"},
        {"weights": "4bit", "dtype": "float32"},
        {"trainer": "trl", "engine": "unsloth"},
        {"trainer": "trl", "weights": "4bit"},
    ],
)
def test_settings_that_exclude_one_another_are_refused(model: dict[str, str]) -> None:
    with pytest.raises(RecipeError):
        parse_recipe({"name": "x", "model": model})


def test_unsloth_without_a_gpu_is_refused_in_one_line(tiny_qwen: Path) -> None:
    from fastconv.engine.model import load_base

    with pytest.raises(ModelError, match="needs a GPU and a base in 16 bits, not cpu in float32"):
        load_base(ModelSettings(id=str(tiny_qwen), engine="unsloth", device="cpu"))
