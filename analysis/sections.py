"""What a stage of a study is given and what it gives back: a subject, and a section of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.measures import Measure
from subcircuit.analysis.sweep import Scores
from subcircuit.analysis.tasks import Task
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.options import Executor, Precision

Progress = Callable[[int, int], None]
Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """A table of the report; numbers are shown with `digits` decimals."""

    caption: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    digits: int = 2


@dataclass(frozen=True)
class Section:
    """What a stage found."""

    title: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """SVG texts by name."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Everything, as plain values for JSON."""
    circuit: Circuit | None = None
    """The subject's circuit with what the stage added to it; it is saved in place of the other."""
    left_out: bool = False
    """Whether it only says why the stage was not run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the figures by name alone."""
        tables = [asdict(table) for table in self.tables]
        shown = {"title": self.title, "sentences": list(self.sentences), "tables": tables}
        return {**shown, "figures": list(self.figures), "data": dict(self.data), "left_out": self.left_out}


@dataclass(frozen=True)
class Subject:
    """What a study knows of one task when its circuit is found."""

    model: HookedTransformer
    task: Task
    scores: Scores | None
    circuit: Circuit
    source: str
    """Of the sweep."""
    seed: int
    precision: Precision
    executor: Executor
    n_random: int
    n_random_edges: int
    n_edge_prompts: int
    n_sensitivity_prompts: int
    repeated: Callable[[], Mapping[str, Measure]]
    """`heads.repeated_measures` of the model, the same for all tasks."""
