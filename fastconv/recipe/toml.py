"""TOML text as a table, with one kind of error for all that cannot be read."""

from __future__ import annotations

import tomllib
from typing import Any

#: Levels of tables and lists that a file may have: ours have five. Whoever walks a deeper one ends in a RecursionError, and a
#: dotted key of thousands of parts is read without one.
DEEPEST = 32


def toml_table(text: str) -> dict[str, Any]:
    """TOML text as a table. Raises TOMLDecodeError for all that cannot be read; tomllib itself lets other errors out."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise tomllib.TOMLDecodeError(str(error).partition(";")[0]) from None
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one) if _holds(part)]
    if level:
        raise tomllib.TOMLDecodeError("nested too deeply")
    return table


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)
