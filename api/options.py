"""Options that several commands share."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import subcircuit as sc


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Executor(StrEnum):
    torch = "torch"
    triton = "triton"
    reference = "reference"


class Metric(StrEnum):
    logit_difference = "logit_difference"
    log_probability = "log_probability"
    kl = "kl"
    accuracy = "accuracy"


class Direction(StrEnum):
    backward = "backward"
    forward = "forward"


class SweepMethod(StrEnum):
    exact = "exact"
    atp = "atp"
    ig = "ig"
    atp_star = "atp*"


TASKS = "numerals, months, ioi, … (`subcircuit tasks` lists them)"

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A short name, a directory, a .gguf file or a hub id.")]
TaskOption = Annotated[str, typer.Option("--task", "--tasks", "-t", help=f"{TASKS} or a .csv or .json file.")]
CircuitOption = Annotated[
    Path | None, typer.Option("--circuit", help="A circuit as JSON; else one is found by pruning first.")
]
DictionariesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--dictionary",
        "-d",
        help="A sparse dictionary: its features are nodes, in place of the MLP or heads that it reads. Several may be "
        "given.",
    ),
]
HooksOption = Annotated[
    list[str] | None,
    typer.Option("--hook", help="Where each dictionary sits, in the same order, for files that do not say."),
]
NOption = Annotated[int, typer.Option("--n", "-n", min=1, help="Prompts per task.")]
SeedOption = Annotated[int, typer.Option(help="Of the prompts, and of everything drawn at random.")]
TemplateOption = Annotated[str, typer.Option(help="done, lost, born, bare, several joined by +, or all that fit.")]
MembersOption = Annotated[
    int | None, typer.Option(min=1, help="Members that a sequence shows before the next is asked for; 4 if left out.")
]
FilterOption = Annotated[bool, typer.Option("--filter", help="Only prompts that the model answers, as in the paper.")]
SourceOption = Annotated[str, typer.Option(help="What a patch puts in place: corrupted, mean or zero.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the products of differences.")]
ExecutorOption = Annotated[
    Executor, typer.Option(help="torch, triton (on a GPU): differences only; reference: full forwards.")
]
MetricOption = Annotated[
    Metric,
    typer.Option(help="What effects are measured on; kl: of the patched prediction from the clean one, in nats."),
]
BudgetOption = Annotated[
    str | None, typer.Option(help="Memory beside the weights, such as 4GB or 512MiB; 2GiB on a CPU if left out.")
]
StepsOption = Annotated[int, typer.Option(min=1, help="Runs along the way, for integrated gradients.")]
DtypeOption = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16, float16 or float64.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no names of written files on standard error.")
]
ThresholdOption = Annotated[float, typer.Option(help="Points of score that the circuit may lose.")]
FirstOption = Annotated[Direction, typer.Option(help="Direction of the first pruning sweep.")]
MaxSweepsOption = Annotated[int | None, typer.Option(min=1, help="At most so many pruning sweeps.")]


def with_dictionaries(
    model: sc.HookedTransformer, files: list[Path] | None, hooks: list[str] | None
) -> sc.HookedTransformer:
    """The model with the dictionaries of these files, and without any the model itself."""
    if hooks and len(hooks) != len(files or ()):
        raise typer.BadParameter(
            f"--hook is given {len(hooks)} times and --dictionary {len(files or ())} times; expected as often, or never"
        )
    read = [sc.load_dictionary(file, hook=hooks[i] if hooks else None) for i, file in enumerate(files or ())]
    return model.with_dictionaries(*read) if read else model


def names_in(text: str) -> list[str]:
    """The names of an option that takes several, joined by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def circuit_of_heads(text: str) -> sc.Circuit:
    """The heads of an option that takes several, joined by commas."""
    names = names_in(text)
    if not names or not all(re.fullmatch(r"a\d+\.h\d+", name) for name in names):
        raise typer.BadParameter(f"heads {text!r}: expected heads joined by commas, such as a1.h0,a3.h2")
    return sc.Circuit.of_nodes(names)


def check_suffix(file: Path | None, *known: str) -> None:
    """Refuse a file to write, before any work, whose name does not say which of the known formats it should have."""
    if file is not None and file.suffix not in known:
        ending = known[0] if len(known) == 1 else f"one of {', '.join(known)}"
        raise typer.BadParameter(f"{file}: expected a file name that ends in {ending}")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bytes_of(text: str | None) -> int | None:
    """Bytes of a size such as `4GB`, `1.5GiB` or `2000000`; None of None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]i?)?b?", text.strip().lower())
    n_bytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if n_bytes < 1:
        raise typer.BadParameter(f"memory {text!r}: expected a size such as 4GB or 512MiB")
    return n_bytes


def positions_of(text: str | None) -> str | list[int] | None:
    """Positions such as `-1` or `4,6`; `each` and None as they are."""
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"positions {text!r}: expected integers joined by commas, or 'each'") from None
