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
        return json.loads(ended.stdout)
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


def main() -> int:
    """Print what is known of the pins; exit code 1 if a fault is neither mended nor accepted."""
    n_faults = 0
    for file in sorted(ROOT.glob("constraints*.txt")):
        report = ask(file)
        if isinstance(report, str):
            print(f"{file.name}: pip-audit could not ask: {report}; the other files were not tried")
            break
        found, unknown = faults(report)
        for line in found:
            print(f"{file.name}: {line}: raise the pin, or accept it in tests/pins.py with the reason")
        n, n_faults = len(report["dependencies"]), n_faults + len(found)
        not_asked = f"; nothing is known here of {len(unknown)}" if unknown else ""
        print(f"{file.name}: {n} pins, {len(found)} with a known fault that is not accepted{not_asked}")
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
