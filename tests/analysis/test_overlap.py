"""Overlap of circuits with its chance level against circuits drawn at random, and alignment by depth."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from patching_cases import CONFIGS
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.compare import compare_circuits
from subcircuit.analysis.curves import faithfulness_curve
from subcircuit.analysis.depth import align_depths, depth, earth_movers_distance, head_depths, role_depths
from subcircuit.analysis.figures import curve_figure, overlap_figure
from subcircuit.analysis.overlap import n_edges, overlap, overlap_matrix, overlaps
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import edges

CONFIG = CONFIGS["gpt2"]
GQA = CONFIGS["llama-gqa"]
DEEP = ModelConfig(**(vars(CONFIG) | {"n_layers": 9, "name": "deep"}))


def test_chance_of_all_nodes_is_what_every_circuit_of_that_size_gives():
    """Every circuit of 2 of 4 heads and 1 of 2 MLPs, in a model of 2 layers with 2 heads."""
    config = ModelConfig(**(vars(CONFIG) | {"n_layers": 2, "n_heads": 2, "n_kv_heads": 2}))
    a, b = Circuit([(0, 0), (1, 1)], [0]), Circuit([(0, 0), (1, 0)], [0])
    heads = list(itertools.product(range(2), repeat=2))
    drawn = [Circuit(list(two), [mlp]) for two in itertools.combinations(heads, 2) for mlp in range(2)]
    both = [len(set(a.nodes) & set(other.nodes)) for other in drawn]
    found = overlap(a, b, config, "nodes")
    assert (found.n_all, found.n_a, found.n_b, found.n_both) == (6, 3, 3, 2)
    assert found.jaccard == 2 / 4
    assert found.expected_both == pytest.approx(sum(both) / len(both))
    assert found.expected_jaccard == pytest.approx(sum(a.jaccard(other) for other in drawn) / len(drawn))
    assert found.p == pytest.approx(sum(k >= 2 for k in both) / len(both))
    assert overlap(a, b, config, "mlps").p == pytest.approx(1 / 2)


def test_features_have_the_chance_of_circuits_drawn_kind_by_kind():
    """Every circuit of as many heads, MLPs and features of each kind, from a few candidates."""
    names = ["a0.h0", "a0.h1", "m0", "m2", "r1.f2", "r1.f5", "r1.f7", "m1.f0", "m1.f3"]
    nodes = [Component.parse(name) for name in names]
    print(f"seed {(seed := random.randrange(10**6))}")
    rng = random.Random(seed)
    a, b = (Circuit.of_nodes(rng.sample(names, rng.randint(3, 7))) for _ in range(2))

    def every(circuit):
        kinds = [[node for node in nodes if node.kind == kind] for kind in dict.fromkeys(node.kind for node in nodes)]
        sizes = [len([node for node in circuit.nodes if node in kind]) for kind in kinds]
        draws = [itertools.combinations(kind, size) for kind, size in zip(kinds, sizes, strict=True)]
        return [Circuit.of_nodes(itertools.chain(*parts)) for parts in itertools.product(*draws)]

    for kind, chosen in (("features", lambda c: set(c.features)), ("nodes", lambda c: set(c.nodes))):
        both = [len(chosen(a) & chosen(other)) for other in every(b)]
        found = overlap(a, b, CONFIG, kind, nodes)
        n_both = len(chosen(a) & chosen(b))
        n_all = {"features": 5, "nodes": 9}[kind]
        assert (found.n_all, found.n_a, found.n_b, found.n_both) == (n_all, len(chosen(a)), len(chosen(b)), n_both)
        assert found.expected_both == pytest.approx(sum(both) / len(both))
        assert found.p == pytest.approx(sum(k >= n_both for k in both) / len(both))
    assert overlap(a, b, CONFIG, "heads", nodes).n_all == 2
    kinds = [each.kind for each in overlaps(a, b, CONFIG, nodes)]
    assert kinds == ["nodes", "heads", "mlps", *(["features"] if a.features and b.features else [])]
    with pytest.raises(PatchError, match=r"'r1\.f2', which is none of the 8 nodes that circuits may consist of"):
        overlap(Circuit.of_nodes(["r1.f2"]), b, CONFIG, "nodes", [node for node in nodes if str(node) != "r1.f2"])
    with pytest.raises(PatchError, match=r"'m1\.f3', which is none of the 15 nodes"):
        compare_circuits({"a": (Circuit([], [], features=["m1.f3"]), CONFIG), "b": (Circuit([], []), CONFIG)})


def test_edges_are_drawn_from_all_or_from_those_between_shared_nodes():
    every = edges(CONFIG)
    assert n_edges(CONFIG) == len(every)
    assert n_edges(GQA) == len(edges(GQA))
    a = Circuit([(0, 1), (1, 2)], [0], edges=(("a0.h1", "a1.q2"), ("m0", "a1.v2"), ("input", "m0")))
    b = Circuit([(0, 1), (1, 2)], [], edges=(("a0.h1", "a1.q2"), ("a0.h1", "logits")))
    found = {each.kind: each for each in overlaps(a, b, CONFIG)}
    assert (found["edges"].n_all, found["edges"].n_a, found["edges"].n_b, found["edges"].n_both) == (
        len(every),
        3,
        2,
        1,
    )
    # input → q, k, v of both heads; 0.1 → q, k, v of 1.2; both, and the input, → logits
    between = found["edges between shared nodes"]
    assert (between.n_all, between.n_a, between.n_b, between.n_both) == (6 + 3 + 3, 1, 2, 1)
    assert between.p == pytest.approx(2 / 12)
    assert [each.kind for each in overlaps(Circuit([(0, 1)], []), b, CONFIG)] == ["nodes", "heads", "mlps"]


def test_what_does_not_exist_is_refused():
    some = Circuit([(0, 1)], [])
    with pytest.raises(PatchError, match="overlap of 'layers' is not known"):
        overlap(some, some, CONFIG, "layers")
    with pytest.raises(PatchError, match="'a7.h0' does not exist"):
        overlap(some, Circuit([(7, 0)], []), CONFIG)
    with pytest.raises(PatchError, match="edge 'm2' -> 'a0.q1' does not exist"):
        overlap(some, Circuit([], [], edges=(("m2", "a0.q1"),)), CONFIG)
    with pytest.raises(PatchError, match="circuits to compare: .*; expected at least two"):
        compare_circuits({"a": (some, CONFIG)})


def test_distance_in_depth_is_the_area_between_distributions():
    print(f"seed {(seed := random.randrange(10**6))}")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(1, n, generator=generator, dtype=torch.float64) for n in (5, 8))
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    below = [(part[0][:, None] <= grid).double().mean(0) for part in (a, b)]
    area = float(torch.trapezoid((below[0] - below[1]).abs(), grid))
    assert float(earth_movers_distance(a, b)[0]) == pytest.approx(area, abs=1e-4)
    assert earth_movers_distance(a, a).item() == 0
    assert earth_movers_distance(a, a + 0.25).item() == pytest.approx(0.25)


def test_circuits_at_the_same_depths_are_aligned_across_models():
    shallow = Circuit([(1, 0), (1, 1), (1, 2), (1, 3)], [0])
    middle = Circuit([(4, head) for head in range(4)], [])
    first = Circuit([(0, head) for head in range(4)], [])
    same = align_depths(shallow, CONFIG, middle, DEEP, n_random=500)
    assert same.distance == pytest.approx(0)
    assert same.p == pytest.approx(1 / 501, abs=0.01)
    apart = align_depths(shallow, CONFIG, first, DEEP, n_random=500)
    assert apart.distance == pytest.approx(0.5 - 1 / 18)
    assert apart.p > 0.9
    assert same.shares[0] == same.shares[1]
    assert sum(apart.shares[1]) == pytest.approx(1)
    assert 0 < same.expected_distance < 0.5
    with pytest.raises(PatchError, match="without heads has no depths"):
        align_depths(shallow, CONFIG, Circuit([], [1]), DEEP)


def test_layers_and_roles_have_depths():
    assert head_depths(Circuit([(0, 0), (2, 3)], []), CONFIG).tolist() == pytest.approx([1 / 6, 5 / 6])
    assert depth(1, 3) == 0.5
    found = role_depths({"previous token": [(0, 1), (2, 0)], "induction": []}, 4)
    assert found == {"previous token": (0.375, 0.125, 0.625)}


def test_a_comparison_groups_circuits_by_model():
    a, b, c = Circuit([(0, 1), (1, 1)], [0, 1]), Circuit([(0, 1)], [1]), Circuit([(8, 0)], [3])
    found = compare_circuits({"a": (a, CONFIG), "b": (b, CONFIG), "c": (c, DEEP)})
    assert [(pair.a, pair.b, len(pair.overlaps)) for pair in found.pairs] == [
        ("a", "b", 3),
        ("a", "c", 0),
        ("b", "c", 0),
    ]
    assert found.shared[CONFIG.name].nodes == (a & b).nodes
    assert found.union[CONFIG.name].nodes == (a | b).nodes
    assert list(found.shared) == [CONFIG.name]
    assert found.to_dict()["pairs"][0]["overlaps"][1]["n_both"] == 1
    assert found.pairs[1].depths.distance == pytest.approx(17 / 18 - (1 / 6 + 1 / 2) / 2)


def test_figures_say_what_chance_gives():
    circuits = [Circuit([(0, 1), (1, 1), (2, 0)], [0]), Circuit([(0, 1), (1, 1), (2, 1)], [1])]
    matrix = overlap_matrix(circuits, CONFIG)
    assert matrix[0][1] == overlap(*circuits, CONFIG, "heads")
    svg = overlap_figure(matrix, ["one", "two"], "Heads")
    assert svg.count(f"chance {matrix[0][1].expected_jaccard:.2f}") == 2
    assert svg.count("0.50") == 2

    def evaluate(kept):
        return torch.tensor([[float(len(items))] * 3 for items in kept])

    curve = faithfulness_curve(evaluate, list(range(10)))
    svg = curve_figure({"numerals": curve}, "Curve")
    assert f"CPR {float(curve.cpr.mean):.2f}, CMD {float(curve.cmd.mean):.2f}" in svg
    assert svg == curve_figure({"numerals": curve}, "Curve")
