"""What commands write: the two consoles, tables, CSV files, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Where no terminal says how wide it is, tables are as wide as they need to be.
out = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)


_NUMBERS = (
    *("effect", "95 %", "share", "top-1", "heads", "MLPs", "score", "random, mean", "random, best"),
    *("sites", "products", "attention", "q"),
)


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(columns), padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=column == "name")
    return table


def interval(ends: Sequence[float] | None, form: str = "+.3f") -> str:
    """An interval as `[+0.10, +0.15]`; a dash for none."""
    return "–" if ends is None else f"[{', '.join(format(end, form) for end in ends)}]"


def interval_of(row: dict[str, Any], prefix: str = "", form: str = "+.3f") -> str:
    """The same of a row of a table, from its columns `low` and `high` after a prefix."""
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    return interval(None if low is None else (low, high), form)


def warn(message: str) -> None:
    """A line on standard error, on which what follows does not hang."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def say_written(what: Path | str, silent: bool) -> None:
    """The line on standard error with which every command says what it has written: a file, or what in a folder."""
    if not silent:
        print(f"wrote {what}", file=sys.stderr, flush=True)


def write_text(file: Path, text: str, silent: bool) -> None:
    """Write a file whole, and say so unless `silent`."""
    from subcircuit.analysis.store import write_whole

    write_whole(file, text.encode("utf-8"))
    say_written(file, silent)


def write_figures(folder: Path, figures: Mapping[str, str], silent: bool) -> None:
    """Write SVG texts by name to a folder, and say so unless `silent`."""
    for name, svg in figures.items():
        write_text(folder / f"{name}.svg", svg, silent=True)
    say_written(f"{len(figures)} figures in {folder}", silent)


Update = Callable[[str, int, int], None]
"""Takes what is being done, units done, units in all."""


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Update]:
    """Progress on standard error: bars with rate and time left on a terminal, else a line per finished stage."""
    if quiet:
        yield lambda stage, done, total: None
    elif err.is_terminal:
        with _bars() as update:
            yield update
    else:
        lines = _Lines()
        yield lines.update
        lines.finish()


class _Lines:
    """A line for each stage when the next one begins."""

    def __init__(self) -> None:
        self.stage, self.start = "", time.perf_counter()

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.finish()
            self.stage, self.start = stage, time.perf_counter()

    def finish(self) -> None:
        if self.stage:
            print(f"{self.stage} ({time.perf_counter() - self.start:.1f} s)", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Update]:
    """A bar per stage; pruning fills its bar once per sweep."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Task as Bar
    from rich.text import Text

    class RateAndTimeLeft(ProgressColumn):
        def render(self, task: Bar) -> Text:
            if task.finished or not task.speed:
                return Text("")
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            rate = f"{task.speed:,.0f}" if task.speed >= 10 else f"{task.speed:.1f}"
            return Text(f"{rate} {_unit(task.description)}/s{left}", style="dim")

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), RateAndTimeLeft(), console=err) as bars:
        current: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            bar = current.get(stage)
            if bar is None:
                bar = current[stage] = bars.add_task(stage, total=total)
            elif done < bars.tasks[bar].completed:
                bars.reset(bar, total=total)
            bars.update(bar, completed=done, total=total)

        yield update


def _unit(stage: str) -> str:
    """What a stage counts."""
    units = {"sweep": "rows", "pruning": "candidates", "random": "circuits"}
    return next((unit for word, unit in units.items() if word in stage), "")
