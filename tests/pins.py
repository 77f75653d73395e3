"""Known faults of the pinned packages, as pip-audit finds them: `python -m tests.pins`, part of `make check`.

Without a network, or where the index knows nothing of faults, one line says that nobody could be asked; that is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import ROOT

PIP_AUDIT = ROOT / ".venv-audit" / "bin" / "pip-audit"
#: For each file. Whoever cannot be asked about one is not asked about the next, so that `make check` never hangs on a network.
LIMIT_S = 90
#: Faults that are known and accepted: their id, and why they do no harm here.
ACCEPTED: Mapping[str, str] = {}


def ask(file: Path, command: Path = PIP_AUDIT) -> Any:
    """pip-audit's report on a constraint file, or a line that says why there is none."""
    words = [
        str(command),
        "--no-deps",
        "--disable-pip",
        "--progress-spinner",
        "off",
        "--format",
        "json",
        "-r",
        str(file),
    ]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        report = json.loads(ended.stdout)
        return report if isinstance(report, dict) and "dependencies" in report else "its answer is no report"
    except OSError as error:
        return f"pip-audit is not there ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"no answer within {LIMIT_S} s"
    except ValueError:
        return (ended.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]


def faults(report: Any, accepted: Mapping[str, str] = ACCEPTED) -> tuple[list[str], list[str]]:
    """(lines of faults that are not accepted, names of packages that nothing could be found out about) of a report."""
    found, unknown = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for fault in package.get("vulns", ()):
            if not accepted.keys() & {fault["id"], *fault.get("aliases", ())}:
                fixed = ", ".join(fault.get("fix_versions", ())) or "no version yet"
                found.append(f"{package['name']} {package['version']}: {fault['id']} (mended in {fixed})")
    return found, unknown


def told(name: str, report: Any) -> tuple[list[str], int]:
    """(what is said of a file and pip-audit's report on it, how many faults are not accepted)."""
    found, unknown = faults(report)
    lines = [f"{name}: {line}: raise the pin, or accept it in tests/pins.py with the reason" for line in found]
    n = len(report["dependencies"])
    if len(unknown) == n:
        return [*lines, f"{name}: NOT CHECKED: the index keeps no record of faults for any of its {n} pins"], 0
    rest = f"; NOT CHECKED, unknown to the index: {', '.join(unknown)}" if unknown else ""
    return [
        *lines,
        f"{name}: {n - len(unknown)} pins checked, {len(found)} with a fault that is not accepted{rest}",
    ], len(found)


def main() -> int:
    """Print what is known of the pins, and which nobody could be asked about; exit code 1 if a fault is neither mended nor
    accepted."""
    n_faults = 0
    files = sorted(path.name for path in ROOT.glob("constraints*.txt"))
    for place, name in enumerate(files):
        report = ask(ROOT / name)
        if isinstance(report, str):
            print(f"NOT CHECKED for known faults, as pip-audit could not ask ({report}): {', '.join(files[place:])}")
            break
        lines, n = told(name, report)
        print("\n".join(lines))
        n_faults += n
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
