from __future__ import annotations

import re

import pytest
import torch

from subcircuit.analysis.circuit import Circuit, TraceStep, intersection, union
from subcircuit.analysis.compare import jaccard_matrix
from subcircuit.engine.errors import PatchError, StoreError

A = Circuit(heads=[(4, 4), (0, 1), (4, 4)], mlps=[2, 0], edges=(("a0.h1", "a4.q4"),), model="m", task="numerals")
B = Circuit(heads=[(4, 4), (5, 0)], mlps=[2], model="m", task="months")


def test_nodes_are_sorted_without_repetition_and_named_in_the_order_of_computation():
    assert A.heads == [(0, 1), (4, 4)]
    assert A.mlps == [0, 2]
    assert [str(node) for node in A.nodes] == ["a0.h1", "m0", "m2", "a4.h4"]
    assert len(A) == 4
    assert str(A) == "2 heads (0.1 4.4), 2 MLPs (0 2), 1 edge"
    assert str(B) == "2 heads (4.4 5.0), 1 MLP (2)"
    assert Circuit.of_nodes(["m2", "a4.h4"]).heads == [(4, 4)]


def test_set_operations_act_on_nodes_and_edges():
    both, either, left = A & B, A | B, A - B
    assert (both.heads, both.mlps, both.edges) == ([(4, 4)], [2], ())
    assert (either.heads, either.mlps) == ([(0, 1), (4, 4), (5, 0)], [0, 2])
    assert either.edges == A.edges
    assert (left.heads, left.mlps) == ([(0, 1)], [0])
    assert (both.task, both.model) == ("numerals & months", "m")
    assert intersection([A, B, A]).nodes == both.nodes
    assert union([A, B]).nodes == either.nodes


def test_jaccard_is_shared_over_all():
    assert A.jaccard(B) == 2 / 5
    assert A.jaccard(B, "heads") == 1 / 3
    assert Circuit([], []).jaccard(Circuit([], [])) == 1
    assert torch.allclose(jaccard_matrix([A, B], "heads"), torch.tensor([[1, 1 / 3], [1 / 3, 1]]))


def test_json_reads_back_whole(tmp_path):
    step = TraceStep(1, "backward", "m11", 99.5, True)
    circuit = Circuit(A.heads, A.mlps, A.edges, "m", "numerals", "prune", 81.01, (step,), {"threshold": 20})
    assert Circuit.from_json(circuit.to_json()) == circuit
    circuit.save(tmp_path / "c.json")
    assert Circuit.load(tmp_path / "c.json") == circuit


def test_features_are_nodes_like_heads_and_mlps():
    circuit = Circuit.of_nodes(["m3.f17", "a4.h4", "r4.f2", "a4.f5", "m3.f17", "m2"], task="months")
    assert [str(node) for node in circuit.nodes] == ["m2", "m3.f17", "r4.f2", "a4.h4", "a4.f5"]
    assert len(circuit) == 5
    assert str(circuit) == "1 head (4.4), 1 MLP (2), 3 features (m3.f17 r4.f2 a4.f5)"
    assert str(Circuit([], [2], score=80.44)).endswith("MLP (2), score 80.4")
    assert str(Circuit([], [2], score=80.44, settings={"metric": "kl"})).endswith("MLP (2), score 80.4 by kl")
    other = Circuit(heads=[(4, 4)], mlps=[], features=["m3.f17", "m3.f1"])
    assert (circuit & other).nodes == Circuit.of_nodes(["m3.f17", "a4.h4"]).nodes
    assert len(circuit | other) == 6
    assert [str(part) for part in (circuit - other).features] == ["r4.f2", "a4.f5"]
    assert circuit.jaccard(other) == 2 / 6
    assert circuit.jaccard(other, "features") == 1 / 4
    assert all(f'"{part}";' in circuit.to_dot() for part in circuit.features)
    for bad in ("m3", "a4.h4", 17):
        with pytest.raises(PatchError, match="is not understood; expected components such as m3.f17"):
            Circuit([], [], features=[bad])


def test_files_with_features_are_of_the_second_schema_and_others_of_the_first():
    circuit = Circuit.of_nodes(["m3.f17", "a4.h4", "r4.f2"])
    assert Circuit.from_json(circuit.to_json()) == circuit
    assert circuit.to_dict()["schema"] == 2
    assert circuit.to_dict()["features"] == ["m3.f17", "r4.f2"]
    old = A.to_dict()
    assert old.pop("features") == []
    assert old["schema"] == 1
    assert Circuit.from_dict(old) == A
    with pytest.raises(StoreError, match="malformed field: feature"):
        Circuit.from_dict(circuit.to_dict() | {"features": ["m3"]})


@pytest.mark.parametrize(
    ("heads", "mlps", "words"),
    [
        ([(0, 1, 2)], [], "head (0, 1, 2) is not understood; expected (layer, head)"),
        ([3], [], "head 3 is not understood"),
        ([(0, -1)], [], "head -1 is negative"),
        ([(0.5, 1)], [], "head 0.5 is not understood"),
        ([], ["m3"], "MLP 'm3' is not understood"),
        ([], [-2], "MLP -2 is negative"),
    ],
)
def test_nodes_that_no_model_has_are_refused(heads, mlps, words):
    with pytest.raises(PatchError, match=re.escape(words)):
        Circuit(heads, mlps)


def test_finer_parts_than_heads_and_mlps_are_no_nodes():
    with pytest.raises(PatchError, match=r"'a1\.q0' cannot be a circuit's node"):
        Circuit.of_nodes(["a1.h0", "a1.q0"])


def test_combining_no_circuits_is_refused():
    for combine in (intersection, union):
        with pytest.raises(PatchError, match="no circuits to combine"):
            combine([])


BAD_FILES = [
    "",
    "[]",
    "{}",
    '{"schema": 99}',
    '{"schema": 1, "heads": 3}',
    A.to_json().replace("[\n   4,\n   4\n  ]", "[4.5, 4]"),
]


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_file_that_is_no_circuit_is_named(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(StoreError, match=r"c\.json") as caught:
        Circuit.load(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=r"missing\.json"):
        Circuit.load(tmp_path / "missing.json")


def test_the_graph_names_every_node_and_edge():
    dot = A.to_dot()
    assert '"a0.h1" -> "a4.q4";' in dot
    assert all(f'"{node}"' in dot for node in A.nodes)
