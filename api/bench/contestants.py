"""Who is measured: subcircuit's executors, and the peers with what they need."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from subcircuit.engine.errors import BenchError

WORKERS = Path(__file__).with_name("workers")
HARNESS = WORKERS / "harness.py"


@dataclass(frozen=True)
class Contestant:
    """One row of the table: `name` in options and JSON, `title` for people, `worker` a file in workers/.

    It needs `distribution` installed, of the version `major` if that is given.
    """

    name: str
    title: str
    worker: str
    distribution: str
    major: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """For subcircuit: executor and precision."""

    @property
    def own(self) -> bool:
        return self.worker == "subcircuit_sweep"

    @property
    def worker_file(self) -> Path:
        return WORKERS / f"{self.worker}.py"

    @property
    def needs_gpu(self) -> bool:
        return self.options.get("executor") == "triton"

    @property
    def tolerance(self) -> float:
        """Largest difference of an effect, beside the largest effect, that is still the same result."""
        return 5e-2 if self.options.get("precision") == "bf16" else 5e-3


def _own(name: str, title: str, executor: str, precision: str) -> Contestant:
    return Contestant(
        name, title, "subcircuit_sweep", "subcircuit", options={"executor": executor, "precision": precision}
    )


OWN = (
    _own("subcircuit-fp32", "subcircuit, float32", "torch", "fp32"),
    _own("subcircuit-bf16", "subcircuit, bfloat16", "torch", "bf16"),
    _own("subcircuit-triton-fp32", "subcircuit on Triton, float32", "triton", "fp32"),
    _own("subcircuit-triton-bf16", "subcircuit on Triton, bfloat16", "triton", "bf16"),
)
PEERS = (
    Contestant("plain_torch", "plain torch, cached prefix", "plain_torch", "torch"),
    Contestant("transformers", "transformers + hooks", "transformers_hooks", "transformers"),
    Contestant("nnsight", "nnsight", "nnsight_traces", "nnsight"),
    Contestant("transformer_lens3", "TransformerLens 3", "transformer_lens_3", "transformer-lens", 3),
    Contestant("transformer_lens4", "TransformerLens 4", "transformer_lens_4", "transformer-lens", 4),
    Contestant("pyvene", "pyvene", "pyvene_interventions", "pyvene"),
)
REFERENCE = _own("reference", "subcircuit reference, float64", "reference", "fp64")


def chosen(names: Sequence[str]) -> list[Contestant]:
    """Contestants by name; `subcircuit` is all of its executors, nothing at all is everybody.

    Raises BenchError for a name that is not known.
    """
    known = {contestant.name: [contestant] for contestant in (*OWN, *PEERS)} | {"subcircuit": list(OWN)}
    for name in names:
        if name not in known:
            raise BenchError(f"contestant {name!r} is not known; expected one of {', '.join(known)}")
    wanted = [contestant for name in names for contestant in known[name]]
    return [contestant for contestant in (*OWN, *PEERS) if contestant in wanted or not names]


def interpreters(pairs: Sequence[str], environments: Path | None) -> dict[str, str]:
    """The Python of each contestant: `NAME=PATH` first, then `environments/NAME/bin/python` if it is there, then ours.

    Raises BenchError for a pair of another form, an unknown name or a path that is no file.
    """
    names = [contestant.name for contestant in (*OWN, *PEERS)]
    found = {}
    for name in names:
        python = None if environments is None else environments / name / "bin" / "python"
        found[name] = str(python.absolute()) if python is not None and python.is_file() else sys.executable
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or name not in names:
            raise BenchError(f"interpreter {pair!r} is not understood; expected NAME=PATH, NAME of {', '.join(names)}")
        if not Path(path).is_file():
            raise BenchError(f"interpreter of {name}: {path} is not a file")
        found[name] = path
    return found
