"""The command line: which commands there are, and how bad input ends. Each command is a function in `commands`."""

from __future__ import annotations

import os
import shlex
import sys
from itertools import pairwise
from typing import Annotated

import typer

import subcircuit as sc
from subcircuit.commands import (
    bench,
    compare,
    convert,
    discover,
    faithfulness,
    features,
    generate,
    heads,
    lengths,
    lens,
    models,
    paths,
    sensitivity,
    study,
    sweep,
    tasks,
    transfer,
    truth,
    vector,
)
from subcircuit.engine.errors import SubcircuitError

app = typer.Typer(
    name="subcircuit",
    help="Which heads and MLPs of a GPT-2 or Llama do a task: exact activation patching, circuits, what they share.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    study.study,
    study.report,
    sweep.sweep,
    discover.discover,
    paths.paths,
    faithfulness.faithfulness,
    sensitivity.sensitivity,
    compare.compare,
    convert.convert,
    heads.heads,
    lens.lens,
    lengths.lengths,
    features.features,
    features.train_dictionary,
    transfer.transfer,
    generate.generate,
    vector.vector,
    tasks.tasks,
    models.models,
    models.info,
    truth.truth,
    bench.bench,
):
    app.command()(command)


# typer may bring a click of its own; what it raises for bad options derives from that one's ClickException.
BadUsage: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"subcircuit {sc.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Console entry point: bad input is one line on standard error and exit status 2, without a traceback."""
    try:
        if app(prog_name="subcircuit", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt  # typer has caught it and made a status of it
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except SubcircuitError as error:
        _fail(str(error), 2)
    except BadUsage as error:
        _fail(" ".join(error.format_message().split()), 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted{_how_to_resume(sys.argv[1:])}", INTERRUPTED)
    except OSError as error:
        _fail(str(error), 2)


def _how_to_resume(arguments: list[str]) -> str:
    if arguments[:1] != ["study"] and not (arguments[:1] == ["sweep"] and _writes_a_run(arguments)):
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return f"; to go on: {shlex.join(['subcircuit', *again, '--resume'])}"


def _writes_a_run(arguments: list[str]) -> bool:
    """Whether a sweep's --out is a run directory: anything but a CSV file."""
    words = [
        word
        for argument in arguments
        for word in (argument.split("=", 1) if argument.startswith("--out=") else [argument])
    ]
    targets = [after for word, after in pairwise(words) if word in ("--out", "-o")]
    return bool(targets) and not targets[-1].endswith(".csv")


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
