"""Arguments and helpers that all commands share: recipes, workspaces, and errors as one line with an exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from fastconv.errors import FastconvError, InputError, RecipeError, StoreError
from fastconv.store.io import STORAGE_FAULTS, damaged, storage_errors

#: Exit code of a program whose output nobody reads any more, as the shell reports it (128 + SIGPIPE).
READER_GONE = 141
#: Exit code of a command line that cannot be read: nothing of ours has run, and the words are on standard error.
UNREADABLE = InputError.exit_code
#: What a row with a value of another kind makes the code raise that reads it.
_ROW_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
DEFAULT_WORKSPACE = Path("checkpoints")
DEFAULT_REPORTS = Path("reports")
_RECIPE_HELP = "A recipe's path, a shipped one's name (`recipe list`), or a run's id (`status`)"


def _recipes_and_runs(incomplete: str) -> list[str]:
    """What a shell completes a recipe from: shipped names, TOML files of this folder, runs of the default workspace."""
    from fastconv.datasets.files import shipped_recipes

    names = [*shipped_recipes(), *map(str, Path().glob("*.toml")), *map(str, Path().glob("recipes/*.toml"))]
    try:
        store = open_existing(DEFAULT_WORKSPACE)
        names += [row["id"] for row in store.runs()] if store else []
    except FastconvError:
        pass  # a key press is no place to tell of a damaged ledger
    return [name for name in names if name.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    from fastconv.recipe import recipe_keys

    return [f"{one.key}=" for one in recipe_keys() if one.key.startswith(incomplete)]


RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE|RUN", help=_RECIPE_HELP, autocompletion=_recipes_and_runs, show_default=False)
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="RECIPE|RUN", help=_RECIPE_HELP, autocompletion=_recipes_and_runs)
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: --set lora.r=16 (repeatable; `recipe explain`)",
        autocompletion=_keys,
    ),
]  # fmt: skip
Scale = Annotated[
    str, typer.Option("--scale", help="A smaller one: tiny (random weights, every stage) or demo (the embedded model)")
]
Workspace = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the ledger and the adapters")]
Reports = Annotated[Path, typer.Option("--reports", help="Folder for the reports")]
WithModel = Annotated[bool, typer.Option("--with-model", help="Let the base read the rows too (a run does)")]
AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only the end")]


def with_exit_codes(verb: Callable[..., None]) -> Callable[..., None]:
    """Turn fastconv's errors into one line and an exit code. Another exception is a defect and keeps its traceback."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _storage_faults(kwargs.get("workspace")):
                verb(*args, **kwargs)
        except FastconvError as error:
            error = _naming_its_file(error, str(kwargs.get("recipe") or ""))
            _say(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("fastconv: stopped at once; the same command goes on from the last kept state", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(READER_GONE) from None

    return run


def _say(error: FastconvError, *, as_json: bool) -> None:
    """Print an error: as JSON on standard output if asked for, unless that is what cannot be written."""
    if as_json:
        body = {"error": error.what, "where": error.where, "fix": error.fix, "exit_code": error.exit_code}
        try:
            print(json.dumps(body), flush=True)
            return
        except BrokenPipeError:
            raise
        except OSError:
            pass
    with contextlib.suppress(OSError):  # nobody can be told; the exit code still says it
        typer.echo(f"fastconv: {error}", err=True)


@contextlib.contextmanager
def _storage_faults(workspace: Path | None) -> Iterator[None]:
    """A fault of disk or ledger that nobody has put into words yet is a StoreError too; `workspace` is named as the place."""
    try:
        yield
    except BrokenPipeError:
        raise
    except STORAGE_FAULTS as error:
        if fault := _output_fault(error):
            raise fault from error
        with storage_errors(Path(getattr(error, "filename", None) or workspace or "output")):
            raise
    except _ROW_FAULTS as error:
        if workspace is not None and (found := _unsound_rows(workspace)):
            raise damaged(found[0], str(workspace)) from error
        raise  # a defect: its traceback says where


def _unsound_rows(workspace: Path) -> list[str]:
    """What the rows of a workspace's ledger hold that no fastconv writes; nothing if it cannot be read, or is not there."""
    with contextlib.suppress(FastconvError, *STORAGE_FAULTS):
        if (store := open_existing(workspace)) is not None:
            return store.unsound_rows()
    return []


def exit_code_of(app: Callable[[], object]) -> int:
    """Run the command line and return its exit code. A reader that goes away (`| head`) is no fault."""
    _open_closed_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _Output(stream))
    code: object = 0
    out = _same_output()  # rich points its own at nowhere when it finds nobody reading
    try:
        app()
    except SystemExit as end:
        code = end.code
    except BrokenPipeError:
        code = READER_GONE
    except OSError as error:  # in `--help` and `--version`, which are no verbs
        if _output_fault(error) is None:
            raise
    if code == UNREADABLE and "--json" in sys.argv[1:] and not getattr(sys.stdout, "wrote", True):
        fix = "see standard error, or the verb's --help"
        _say(InputError("the command line cannot be read", where="command line", fix=fix), as_json=True)
    return _settled(code if isinstance(code, int) else int(code is not None), out)


def _open_closed_streams() -> None:
    """Open what a caller closed of input, output and errors (`>&-`) on nowhere: else a file of ours would get its number,
    and what a library prints would be written into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for name, handle in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(handle, "w", closefd=False))


def _same_output() -> int:
    """A second handle on standard output; -1 if it has none."""
    try:
        return os.dup(sys.stdout.fileno())
    except (OSError, ValueError):
        return -1


def _settled(code: int, out: int) -> int:
    """Write out what is left of the output and return the exit code: a reader that is gone, or a full disk, changes it."""
    broken = _reader_is_gone(out)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            broken = broken or stream is sys.stdout
            _drop_output(stream)
        except OSError:
            _drop_output(stream)
    if broken:
        _drop_output(sys.stdout)
        return READER_GONE if code in (0, 1) else code  # 1: what rich and click make of a closed pipe
    if code == 0 and (fault := _output_fault()):
        print(f"fastconv: {fault}", file=sys.stderr)
        return fault.exit_code
    return code


class _Output(io.TextIOWrapper):
    """A standard stream that remembers whether anything was written, and the last fault of it: what is held back may be
    gone after it."""

    fault: OSError | None = None
    wrote = False

    def __init__(self, stream: io.TextIOWrapper) -> None:
        """The same stream; a locale without a character shows its code."""
        self._under = stream  # kept, as it closes the buffer of both when it goes
        super().__init__(
            stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip

    def write(self, text: str) -> int:
        self.wrote = self.wrote or bool(text)
        try:
            return super().write(text)
        except OSError as error:
            self.fault = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.fault = error
            raise


def _output_fault(error: Exception | None = None) -> StoreError | None:
    """What is wrong if the output could not be written; given an error, only if it is that one."""
    fault = getattr(sys.stdout, "fault", None)
    if fault is None or isinstance(fault, BrokenPipeError) or (error is not None and error is not fault):
        return None
    fix = "free some space, or write it elsewhere"
    return StoreError(f"the output cannot be written: {fault.strerror}", where="output", fix=fix)


def _reader_is_gone(out: int) -> bool:
    """Whether this handle is a pipe that nobody reads any more."""
    if out < 0 or not stat.S_ISFIFO(os.fstat(out).st_mode):
        return False
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_output(stream: TextIO) -> None:
    """Send what is still held back of a stream nowhere, so that the end of the process does not stumble over it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _naming_its_file(error: FastconvError, recipe: str) -> FastconvError:
    """A fault of a recipe that only its key names ("grid.sources") names the recipe too."""
    if type(error) is not RecipeError or not recipe or recipe in error.where or error.where.startswith(("--", "/")):
        return error
    return RecipeError(error.what, where=f"{recipe}: {error.where}" if error.where else recipe, fix=error.fix)


def load_recipe_or_run(name: str, overrides: Sequence[str], store: Any, scale: str = "") -> Any:
    """As `load`, from an open store (or None)."""
    from fastconv.experiment.scale import named_recipe

    return named_recipe(name, overrides, store, scale)


def load(name: str, overrides: Sequence[str], scale: str = "", workspace: Path | None = None) -> Any:
    """A recipe by path, by shipped name, or as a run of the workspace has it; with overrides, scaled down if requested.

    Overrides apply last. Raises RecipeError for an unknown name, with the nearest recipe or run.
    """
    from fastconv.datasets.files import find_recipe

    is_recipe = find_recipe(name).exists() or Path(name).suffix or len(Path(name).parts) > 1
    store = None if is_recipe or workspace is None else open_existing(workspace)
    try:
        return load_recipe_or_run(name, overrides, store, scale)
    finally:
        if store is not None:
            store.close()


def open_existing(workspace: Path) -> Any:
    """The workspace's store, or None if it has no ledger."""
    from fastconv.store.ledger import Store

    if workspace.exists() and not workspace.is_dir():
        raise StoreError("this is a file", where=str(workspace), fix="give the workspace's folder as --workspace")
    return Store.open(workspace, create=False) if (workspace / "ledger.sqlite").is_file() else None
