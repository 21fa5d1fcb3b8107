"""The stages of a study that ask about edges: which of a circuit's matter, and how good these are."""

from __future__ import annotations

from typing import Any

from subcircuit.analysis.baselines import random_baseline
from subcircuit.analysis.circuit_figure import circuit_figure
from subcircuit.analysis.curves import ablation_curve
from subcircuit.analysis.drawing import words
from subcircuit.analysis.eap import edge_scores
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.edges import prune_edges
from subcircuit.analysis.evaluation import evaluate_circuit
from subcircuit.analysis.figures import curve_figure
from subcircuit.analysis.judgement import judgement
from subcircuit.analysis.sections import Progress, Section, Subject, Table
from subcircuit.engine.threads import is_small

N_ROWS = 25
"""Rows of the table of edges; of a large model these are the edges whose loss is measured one by one."""
N_KNOCKOUTS, N_KNOCKOUTS_OF_LARGE = 10, 4
THRESHOLD = 80.0
"""What an edge's patch has to bring a circuit's score under (Lan et al., arXiv 2311.04131)."""


def edges_stage(subject: Subject, progress: Progress) -> Section:
    """The edges of the circuit that path patching keeps, on the first `n_edge_prompts` prompts.

    An edge is kept if its patch brings the circuit's score under 80, as in the paper. On fewer prompts than the circuit
    was found on, its score is another, and may be under 80 without any patch. So the rule is held against the circuit:
    an edge is kept if it takes the share that the circuit of all prompts may lose before it is at 80.
    """
    n = min(subject.task.n, subject.n_edge_prompts)
    threshold = min(1.0, THRESHOLD / (subject.circuit.score or THRESHOLD))
    found = prune_edges(
        subject.model,
        subject.task.subset(range(n)),
        subject.circuit,
        threshold,
        relative_to="circuit",
        executor=subject.executor,
        precision=subject.precision,
        progress=progress,
    )
    how = found.settings["edges"]
    sentences = (
        f"{len(found.edges)} of {how['n_candidates']} edges between the circuit's nodes matter: patched alone, each "
        f"leaves less than {100 * threshold:.1f} % of what the circuit has ({n} prompts), which is what brings its "
        f"score under {THRESHOLD:.0f}.",
        f"The circuit scores {how['score_of_nodes']:.0f} on these prompts, and without its other edges "
        f"{how['score']:.0f}.",
    )
    table = Table(
        "The edges that cost most when patched.",
        ("from", "to", "points"),
        [[*edge, found.edge_scores[edge]] for edge in found.strongest_edges()[:N_ROWS]],
        digits=1,
    )
    title = f"{words(subject.task.name)}: edges of the circuit"
    figure = circuit_figure(found, title, subject.model.config.group_size)
    data = {"n_prompts": n, "n_edges": len(found.edges), **how}
    return Section("Edges", sentences, (table,), {"circuit": figure}, data, found)


def edge_faithfulness_stage(subject: Subject, progress: Progress) -> Section:
    """How faithful, complete and minimal the circuit's edges are, by themselves, beside random ones; CPR and CMD of
    all edges of the model by EAP-IG."""
    circuit = subject.circuit
    task = subject.task.subset(range(min(subject.task.n, subject.n_edge_prompts)))
    small = is_small(subject.model)
    options: dict[str, Any] = {"executor": subject.executor, "precision": subject.precision}
    ablation = EdgeAblation(subject.model, task, **options)
    strongest = circuit.strongest_edges()
    found = evaluate_circuit(
        ablation,
        circuit,
        n_knockouts=N_KNOCKOUTS if small else N_KNOCKOUTS_OF_LARGE,
        asked=strongest if small else strongest[:N_ROWS],
        seed=subject.seed,
    )
    progress(1, 3)
    baseline = random_baseline(ablation, circuit, subject.n_random_edges, match="nodes", seed=subject.seed)
    progress(2, 3)
    gradients = edge_scores(subject.model, task, "eap-ig", source=circuit.settings["edges"]["source"])
    curve = ablation_curve(ablation, gradients.ranking(), seed=subject.seed)
    progress(3, 3)
    sentences, tables, data = judgement(found, baseline, curve, "edge", f"edges by EAP-IG, {task.n} prompts")
    title = "Recovered by the edges with the largest scores (EAP-IG)"
    figure = curve_figure({words(subject.task.name): curve}, title)
    return Section("Edges alone", sentences, tables, {"curve": figure}, data)
