"""Benchmarks of patching: the same sweep by subcircuit and by other libraries, each in a process of its own."""

from subcircuit.bench.benchmark import Report, ScenarioResult, run_benchmark
from subcircuit.bench.contestants import OWN, PEERS, Contestant
from subcircuit.bench.measurement import Measurement
from subcircuit.bench.problem import SCENARIOS, Problem, Settings

__all__ = [
    "OWN",
    "PEERS",
    "SCENARIOS",
    "Contestant",
    "Measurement",
    "Problem",
    "Report",
    "ScenarioResult",
    "Settings",
    "run_benchmark",
]
