"""fastconv: does making an assistant talk like a persona also give it that persona's behaviors?

    import fastconv

    run = fastconv.run_recipe("demo")   # or a recipe of your own: load_recipe("tea.toml", ["convergence.lr=1e-4"])
    run.metrics()                       # a polars frame: one row for each cell, measure and probe
    run.stack("villain", epoch=4, behavior="refusal")   # a ready model with that stack live

Importing the package loads neither torch nor polars; torch is loaded when something has to be computed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastconv.api import Run, base_folder, load_recipe, open_run, run_recipe

__all__ = ["Run", "base_folder", "load_recipe", "open_run", "run_recipe"]
__version__ = "0.1.0"
# torch's CPU threads wait for one another by spinning, which takes the cores from whatever else runs there: beside other
# work every step then takes several times as long. Read once, when torch is loaded; a value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastconv import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastconv' has no attribute {name!r}")
