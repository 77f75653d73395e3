"""What the README has people install is what was measured: extras, constraint files and tested versions name one set."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fastconv.engine import locate
from tests import ROOT
from tests.pins import ask, faults, told

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What the figures of the README on a GPU were measured with.
MEASURED = {
    "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "peft": "0.21.2", "trl": "1.14.2",
    "unsloth": "2026.10.7", "unsloth-zoo": "2026.10.7", "bitsandbytes": "0.50.2",
}  # fmt: skip
#: Pins that may differ: torch's builds for a CPU and for CUDA 13, what each of them asks for, and what vLLM asks for.
APART = {
    ("constraints.txt", "constraints-cuda.txt"): {"torch"},
    ("constraints-fused.txt", "constraints-cuda.txt"): {"torch", "triton"},
    ("constraints-vllm-cpu.txt", "constraints-vllm.txt"): set(),
}


def pins(name: str) -> dict[str, str]:
    """The pinned version of every package in a constraint file. Fails on a line that pins nothing exactly."""
    found: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9a-z.]*)", line)
            assert match, f"{name}: {line!r} pins no version that an index has"
            package = canonicalize_name(match[1])
            assert package not in found, f"{name} has {package} twice"
            found[package] = match[2]
    return found


def required(*extras: str) -> list[Requirement]:
    """What the project requires, alone and with these extras."""
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for lines in (PROJECT["dependencies"], *(optional[e] for e in extras)) for line in lines]


@pytest.mark.parametrize(
    ("name", "extras"),
    [("constraints.txt", ()), ("constraints-cuda.txt", ("cuda",))],
)
def test_a_constraint_file_pins_all_that_is_required_in_a_version_that_is_allowed(
    name: str, extras: tuple[str, ...]
) -> None:
    pinned = pins(name)
    for requirement in required(*extras):
        package = canonicalize_name(requirement.name)
        assert package in pinned, f"{name} does not pin {package}"
        assert requirement.specifier.contains(pinned[package]), f"{name}: {package} {pinned[package]} {requirement}"


def test_the_gpu_set_is_the_measured_one() -> None:
    pinned = pins("constraints-cuda.txt")
    assert {package: pinned[package] for package in MEASURED} == MEASURED


def test_the_tested_versions_are_those_of_the_extra_and_hold_the_pins() -> None:
    """`engine.locate` refuses other versions at run time, so that the extra must not bring them."""
    extra = {canonicalize_name(r.name): r for r in required("cuda")}
    pinned = pins("constraints-cuda.txt")
    for tested in (*locate.UNSLOTH, *locate.BITSANDBYTES):
        package = canonicalize_name(tested.package)
        assert extra[package].specifier == Requirement(tested.requirement).specifier
        assert SpecifierSet(f">={tested.first},<{tested.end}").contains(pinned[package])


def test_xformers_gets_the_runtime_that_its_wheel_links() -> None:
    """xformers 0.0.35 links libcudart.so.12; a torch for CUDA 13 brings libcudart.so.13 alone."""
    pinned = pins("constraints-cuda.txt")
    assert pinned["xformers"] == "0.0.35"
    assert pinned["nvidia-cuda-runtime"].startswith("13.")
    assert pinned["nvidia-cuda-runtime-cu12"].startswith("12.")
    assert "nvidia-cuda-runtime-cu12" in {requirement.name for requirement in required("cuda")}


def test_vllm_is_pinned_beside_the_torch_that_it_pins() -> None:
    (extra,) = (Requirement(line) for line in PROJECT["optional-dependencies"]["vllm"])
    served, on_cpu = pins("constraints-vllm.txt"), pins("constraints-vllm-cpu.txt")
    assert extra.specifier.contains(served["vllm"])
    assert served["vllm"] == on_cpu["vllm-cpu"]
    assert served["torch"] == on_cpu["torch"] == pins("constraints.txt")["torch"]
    assert served["transformers"] == pins("constraints-cuda.txt")["transformers"]
    assert f"vllm-{on_cpu['vllm-cpu']}+cpu.dist-info" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("files", list(APART))
def test_files_that_share_a_package_share_its_version(files: tuple[str, str]) -> None:
    first, second = map(pins, files)
    unequal = {package for package in first.keys() & second.keys() if first[package] != second[package]}
    assert unequal <= APART[files]


def test_the_readme_installs_from_a_checkout_with_these_files() -> None:
    """The package is on no index."""
    readme = (ROOT / "README.md").read_text() + (ROOT / "docs" / "RUNNING.md").read_text()
    assert "pip install --constraint constraints-cuda.txt '.[cuda]'" in readme
    assert "pip install --constraint constraints-vllm.txt vllm" in readme
    assert not re.search(r"pip install '?fastconv", readme)
    for name in set(re.findall(r"constraints[a-z-]*\.txt", readme)):
        assert (ROOT / name).is_file()


def test_no_message_tells_to_install_the_package_from_an_index() -> None:
    told = [
        path for path in (ROOT / "fastconv").rglob("*.py") if re.search(r"pip install '?fastconv", path.read_text())
    ]
    assert not told


KNOWN = {"dependencies": [
    {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3.1.6"]}]},
    {"name": "torch", "version": "2.13.0", "vulns": [{"id": "PYSEC-2", "aliases": ["CVE-2"], "fix_versions": []}]},
    {"name": "pip", "skip_reason": "not found"}, {"name": "attrs", "version": "26.1.0", "vulns": []},
]}  # fmt: skip


def test_a_known_fault_of_a_pin_is_told_unless_it_is_accepted() -> None:
    found, unknown = faults(KNOWN, {})
    assert found == ["jinja2 3.1.5: PYSEC-1 (mended in 3.1.6)", "torch 2.13.0: PYSEC-2 (mended in no version yet)"]
    assert unknown == ["pip"]
    assert faults(KNOWN, {"CVE-2": "its function is never called"})[0] == found[:1]
    assert faults(KNOWN, {"PYSEC-1": "", "PYSEC-2": ""})[0] == []


def test_pins_that_nobody_could_be_asked_about_are_not_said_to_be_without_fault() -> None:
    lines, n_faults = told("constraints.txt", KNOWN)
    assert n_faults == 2
    assert lines[2] == (
        "constraints.txt: 3 pins checked, 2 with a fault that is not accepted; NOT CHECKED, unknown to the index: pip"
    )
    unknown = {"dependencies": [{"name": name, "skip_reason": "not found"} for name in ("torch", "numpy")]}
    assert told("constraints.txt", unknown) == (
        ["constraints.txt: NOT CHECKED: the index keeps no record of faults for any of its 2 pins"],
        0,
    )


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo oops >&2; exit 1", "oops"),
        ("exit 0", "it said nothing"),
        ("echo '[]'", "is no report"),
        (None, "is not there"),
    ],
)
def test_an_audit_that_cannot_ask_is_one_line(tmp_path: Path, script: str | None, says: str) -> None:
    command = tmp_path / "pip-audit"
    if script is not None:
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
    line = ask(tmp_path / "constraints.txt", command)
    assert says in line
    assert len(line.splitlines()) == 1
