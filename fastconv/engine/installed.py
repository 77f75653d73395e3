"""Optional packages of the GPU path: which are there, and whether in a version that was tested. Imports none of them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata

from fastconv.errors import ModelError


@dataclass(frozen=True)
class Tested:
    """A package and its tested versions: from `first`, below `end`."""

    package: str
    first: str
    end: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}>={self.first},<{self.end}"


UNSLOTH = (Tested("unsloth", "2026.10.4", "2026.11"), Tested("unsloth_zoo", "2026.10.4", "2026.11"))
BITSANDBYTES = (Tested("bitsandbytes", "0.50", "0.51"),)


def version_of(package: str) -> str | None:
    """The installed version, or None. A module without metadata (on PYTHONPATH, say) has no version to trust."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_installed(packages: tuple[Tested, ...]) -> bool:
    """True if all of them are there, in whatever version."""
    return all(version_of(one.package) is not None for one in packages)


def require(packages: tuple[Tested, ...], where: str, otherwise: str) -> None:
    """Raise ModelError unless all of them are there in tested versions; `otherwise` is what to do without them."""
    for one in packages:
        have = version_of(one.package)
        mend = f"pip install {' '.join(repr(other.requirement) for other in packages)}, or {otherwise}"
        if have is None:
            raise ModelError(f"{one.package} is not installed", where=where, fix=mend)
        if not _numbers(one.first) <= _numbers(have) < _numbers(one.end):
            raise ModelError(
                f"{one.package} {have} is outside the tested versions ({one.first} to below {one.end})",
                where=where,
                fix=mend,
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, for comparing: 2026.10.7.post1 -> (2026, 10, 7)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
