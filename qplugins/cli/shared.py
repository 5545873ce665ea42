"""What the commands share: how they fail, and how they print.

With `--json` stdout carries one JSON object and nothing else. Progress bars and errors go to stderr.
Exit codes: 0; 1 where what was looked at has problems; 2 where the command could not do its work; 130 after Ctrl-C, 143 and 129 after SIGTERM and SIGHUP.
"""

from __future__ import annotations

import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option `--debug`, without which an error is one line on stderr."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        try:
            with _tidy_end():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            print("qplugins: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as e:
            if debug:
                raise
            print(f"qplugins: {sentence(e)}", file=sys.stderr)
            raise typer.Exit(2) from None

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}
    return run


@contextmanager
def _tidy_end() -> Iterator[None]:
    """Has the signals of schedulers and closing terminals end a command as an exception does, so that what it was writing is removed."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    # what is ignored, as under nohup, stays so
    before = {number: h for number in (signal.SIGTERM, signal.SIGHUP) if (h := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sentence(e: Exception) -> str:
    """An error in a line. What this project raises says all that there is to say; anything else also needs its type."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    if isinstance(e, (ValueError, OSError, ImportError)):
        return " ".join(str(e).split())
    return f"{type(e).__name__}: {' '.join(str(e).split())} (--debug shows where)"


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout. Columns whose name starts with a space are numbers, set flush right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for c in columns:
        table.add_column(c.strip(), justify="right" if c.startswith(" ") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    # a file or a pipe has no width to keep to
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.2f} MB"


@contextmanager
def progress_bar(what: str, shown: bool = True, unit: str = "bytes") -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback (done, total, name) that moves a bar on stderr; it does nothing unless `shown`, and where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda done, total, name: None
        return
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn(), TextColumn("{task.fields[name]}", style="dim"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, name="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name)
