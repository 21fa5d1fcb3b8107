"""Scores of what methods find against known models."""

from __future__ import annotations

import random

import pytest

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.discover import METHODS as METHODS_OF_DISCOVERY
from subcircuit.analysis.discover import discover
from subcircuit.analysis.edge_ablation import EdgeAblation
from subcircuit.analysis.sweep import sweep
from subcircuit.analysis.truth import (
    EXACT,
    FAMILIES,
    METHODS,
    ONE_SIDED,
    Found,
    truth,
    truth_names,
    truth_report,
    truth_table,
)
from subcircuit.analysis.truth.recovery import auroc, average_precision
from subcircuit.engine.errors import PatchError, TaskError
from subcircuit.engine.patching.graph import edges

SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def known():
    print(f"seed {SEED}")
    return truth("inhibition", "llama", seed=SEED)


def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_as_half():
    rng = random.Random(SEED)
    for _ in range(50):
        scores = {str(i): float(rng.randint(-4, 4)) for i in range(12)}
        true = set(rng.sample(sorted(scores), rng.randint(1, 11)))
        pairs = [(abs(scores[a]), abs(scores[b])) for a in true for b in scores.keys() - true]
        by_hand = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert auroc(scores, true) == pytest.approx(by_hand)


def test_average_precision_is_the_mean_precision_down_to_the_true_items():
    scores = {"a": 4.0, "b": -3.0, "c": 2.0, "d": 1.0}
    assert average_precision(scores, {"a", "c"}) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(scores, {"b"}) == pytest.approx(1 / 2)
    assert average_precision({"a": 1.0, "b": 1.0, "c": 0.0}, {"a"}) == pytest.approx(1 / 2)
    with pytest.raises(TaskError, match="0 of 4 ranked items are true"):
        auroc(scores, set())


def test_a_set_is_scored_by_what_it_hits_misses_and_adds(known):
    nodes = [str(node) for node in known.circuit.nodes]
    extra = known.distractors[0]
    report = truth_report(Circuit.of_nodes([*nodes[1:], extra]), known)["nodes"]
    assert report.precision == report.recall == report.f1 == pytest.approx((len(nodes) - 1) / len(nodes))
    assert (report.missed, report.extra) == ((nodes[0],), (extra,))
    assert known.role(nodes[0]) == "duplicate token"
    assert report.auroc is report.average_precision is None
    nothing = truth_report(Found(nodes=set()), known)["nodes"]
    assert nothing.precision == nothing.recall == nothing.f1 == 0


def test_the_truth_itself_is_perfect_in_nodes_and_edges(known):
    report = truth_report(known.circuit, known)
    assert set(report) == {"nodes", "edges"}
    for recovery in report.values():
        assert recovery.precision == recovery.recall == recovery.f1 == 1
        assert recovery.missed == recovery.extra == ()


def test_edges_are_ranked_over_all_edges_of_the_model(known):
    every = edges(known.model.config)
    lost = known.circuit.edges[0]
    scores = {edge: -1.0 if edge in known.circuit.edges and edge != lost else 0.0 for edge in every}
    report = truth_report(Found(edge_scores=scores), known)["edges"]
    n_true = len(known.circuit.edges)
    assert report.auroc == pytest.approx((n_true - 1 + 0.5) / n_true)
    assert known.role(lost) == "input -> duplicate token.q"


def test_what_does_not_belong_to_the_model_is_refused(known):
    with pytest.raises(TaskError, match="a99.h0 was found"):
        truth_report(Circuit.of_nodes(["a99.h0"]), known)
    with pytest.raises(TaskError, match="m0 -> a0.q0 was found"):
        truth_report(Found(edges={("m0", "a0.q0")}), known)
    with pytest.raises(TaskError, match="a ranking has 6 of 30; .* is left out"):
        truth_report(sweep(known.model, known.task, "mlps"), known)
    with pytest.raises(TaskError, match="'m0' does not belong"):
        known.role("m0")


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
@pytest.mark.parametrize("name", truth_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_methods_recover_everything_as_a_set_and_as_a_ranking(name, family, seed):
    print(f"seed {seed}")
    known = truth(name, family, seed=seed)
    for method in EXACT - ONE_SIDED if name == "inhibition" else EXACT:
        for what, recovery in truth_report(METHODS[method](known.model, known.task), known).items():
            of = (method, what)
            assert (*of, recovery.missed, recovery.extra) == (*of, (), ())
            assert (*of, recovery.auroc, recovery.average_precision) == (*of, 1, pytest.approx(1))


def test_every_method_gives_a_set_and_a_ranking_and_no_method_of_discovery_is_left_out(monkeypatch):
    print(f"seed {SEED}")
    known = truth("induction", seed=SEED, n=4)
    made, of_nodes = set(), Circuit.of_nodes

    def noted(nodes, **provenance):
        made.add(provenance["method"])
        return of_nodes(nodes, **provenance)

    monkeypatch.setattr(Circuit, "of_nodes", noted)
    for name, method in METHODS.items():
        report = truth_report(method(known.model, known.task), known)
        assert "nodes" in report, name
        assert all(None not in (recovery.precision, recovery.auroc) for recovery in report.values()), name
    assert made == set(METHODS_OF_DISCOVERY)


def test_circuits_of_edges_are_ranked_by_what_each_edge_cost_when_it_was_evaluated():
    print(f"seed {SEED}")
    known = truth("induction", "llama", seed=SEED, n=4)
    circuit = discover(known.model, known.task, "acdc", source="corrupted", both_sides=True)
    ablation, removed, costs = EdgeAblation(known.model, known.task, source="corrupted"), [], {}
    for edge in reversed(edges(known.model.config)):
        before, after = ablation.scores([removed, [*removed, edge]])
        costs[edge] = before - after
        if edge not in circuit.edges:
            removed.append(edge)
    found = Found.of_circuit(circuit, known.model.config)
    assert found.edge_scores == pytest.approx(costs, abs=1e-2)
    out_of = {node: [abs(cost) for (sender, _), cost in costs.items() if sender == node] for node in found.node_scores}
    assert found.node_scores == pytest.approx({node: max(each) for node, each in out_of.items()}, abs=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_side_what_works_against_the_answer_ranks_last(family):
    known = truth("inhibition", family, seed=SEED)
    circuit = discover(known.model, known.task)
    scores = Found.of_circuit(circuit, known.model.config).node_scores
    assert min(scores, key=scores.__getitem__) == known.roles["negative name mover"]
    assert circuit.costs()[known.roles["negative name mover"]] < -20
    assert truth_report(circuit, known)["nodes"].auroc == pytest.approx(0.8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_pruning_loses_the_negative_head_and_nothing_else(family):
    known = truth("inhibition", family, seed=SEED)
    report = truth_report(discover(known.model, known.task), known)["nodes"]
    assert report.precision == 1
    assert [known.role(node) for node in report.missed] == ["negative name mover"]


@pytest.mark.parametrize("family", FAMILIES)
def test_acdc_on_one_side_loses_the_edges_of_the_negative_head_and_nothing_else(family):
    print(f"seed {SEED}")
    known = truth("inhibition", family, seed=SEED)
    report = truth_report(METHODS["ACDC"](known.model, known.task), known)
    assert report["edges"].extra == ()
    assert {known.role(edge) for edge in report["edges"].missed} == {
        "S-inhibition -> negative name mover.q",
        "input -> negative name mover.k",
        "input -> negative name mover.v",
        "negative name mover -> logits",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_through_an_mlp_counts_as_an_edge_unless_mlps_are_frozen(family):
    print(f"seed {SEED}")
    known = truth("successor", family, seed=SEED)
    report = truth_report(METHODS["pruning, then paths"](known.model, known.task), known)["edges"]
    assert report.missed == ()
    assert report.extra == ((known.roles["next member"], "logits"),)


@pytest.mark.parametrize("method", ["attribution patching", "integrated gradients", "AtP*", "EAP", "EAP-IG"])
def test_gradients_find_what_enters_the_logits(method):
    """No attention lies behind it whose sharpness could hide its gradient."""
    print(f"seed {SEED}")
    known = truth("induction", "gpt2", seed=SEED)
    found = METHODS[method](known.model, known.task)
    scores = found.node_scores or found.edge_scores
    last = known.roles["induction"] if found.node_scores else (known.roles["induction"], "logits")
    assert abs(scores[last]) == max(map(abs, scores.values()))
    assert last in (found.nodes or found.edges)


def test_the_table_has_a_row_per_model_form_and_method():
    calls = []
    rows = truth_table(
        ["induction"], methods=["exact sweep, mean", "pruning, mean"], n_seeds=2, progress=lambda *at: calls.append(at)
    )
    assert [(row.family, row.method, row.what) for row in rows] == [
        (family, method, "nodes") for family in FAMILIES for method in ("exact sweep, mean", "pruning, mean")
    ]
    assert all(row.precision == row.recall == 1 and row.n_seeds == 2 and row.missed == () for row in rows)
    assert [row.auroc for row in rows] == [1, 1, 1, 1]
    assert all(row.exact for row in rows)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_method_is_added_as_one_row(monkeypatch):
    def nothing_but_mlp_0(model, task):
        scores = {edge: float(edge[0] == "m0") for edge in edges(model.config)}
        return Found(edges={("m0", "logits")}, edge_scores=scores)

    monkeypatch.setitem(METHODS, "MLP 0", nothing_but_mlp_0)
    (row,) = truth_table(["induction"], families=["gpt2"], methods=["MLP 0"], n_seeds=1)
    assert (row.what, row.exact, row.recall) == ("edges", False, 0)
    assert row.auroc < 0.5
    assert "previous token -> induction.k" in row.missed


def test_unknown_methods_are_named():
    with pytest.raises(PatchError, match="method 'magic' is not known; expected one of: exact sweep, corrupted;"):
        truth_table(methods=["magic"])
