"""Circuits with features as nodes, against hooks that know no dictionary, in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dictionary_cases import ACTIVATIONS, PLACES, plain_encode, random_dictionary
from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis.baselines import random_baseline
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.compare import compare_circuits, cross_task_scores, jaccard_matrix
from subcircuit.analysis.curves import ablation_curve, node_ranking
from subcircuit.analysis.discover import discover
from subcircuit.analysis.edges import prune_edges
from subcircuit.analysis.evaluation import evaluate_circuit
from subcircuit.analysis.faithfulness import Ablation, node_drops, score
from subcircuit.analysis.figures import overlay_figure
from subcircuit.analysis.masks import gated
from subcircuit.analysis.nodes import all_nodes, candidate_nodes, candidates_of, random_nodes
from subcircuit.analysis.sensitivity import sensitivity
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, Patch, Site
from subcircuit.engine.patching.sources import Sources

SEED = random.randrange(10**6)
HEADS = [f"a{layer}.h{head}" for layer in (0, 2) for head in range(4)]


class Case:
    """A model with a dictionary at each place of layer 1, and its metric by hooks on the model without."""

    def __init__(self, config, activation, source):
        print(f"seed {SEED}")
        self.plain = random_model(config, SEED).double()
        self.task = task_for(self.plain, SEED + 1)
        self.dictionaries = {
            letter: random_dictionary(hook, config, SEED + i, activation, d_sae=12)
            for i, (letter, hook) in enumerate(PLACES.items())
        }
        self.model = self.plain.with_dictionaries(*self.dictionaries.values())
        self.source = source
        self.sources = {hook: self._source(value) for hook, value in self._cache(self.task.corrupted).items()}
        self.source_acts = {
            letter: self._source(plain_encode(each, self._cache(self.task.corrupted)[each.hook_name]))
            for letter, each in self.dictionaries.items()
        }

    def _cache(self, tokens):
        cache = self.plain.run_with_cache(tokens)[1]
        names = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("attn.hook_z", "hook_mlp_out")]
        return {name: cache[name] for name in {*names, *PLACES.values()}}

    def _source(self, value):
        if self.source == "zero":
            return torch.zeros_like(value)
        return value.mean(0, keepdim=True).expand_as(value) if self.source == "mean" else value

    def nodes(self):
        """Names in the order of computation, by the definitions."""
        clean = self._cache(self.task.clean)
        features = {}
        for letter, dictionary in self.dictionaries.items():
            change = self.source_acts[letter] - plain_encode(dictionary, clean[dictionary.hook_name])
            features[letter] = [f"{letter}1.f{f}" for f in range(12) if bool((change[..., f] != 0).any())]
        between = [name for letter in PLACES for name in features[letter]]
        return [*HEADS[:4], "m0", *between, *HEADS[4:], "m2"]

    def metric(self, removed):
        """Mean logit difference without the removed nodes."""
        parts = [Component.parse(name) for name in removed]

        def hook(value, name):
            value, layer = value.clone(), int(name.split(".")[1])
            for part in parts:
                if part.layer == layer and part.kind == "mlp" and name.endswith("mlp_out"):
                    value[:] = self.sources[name]
                if part.layer == layer and part.kind == "z" and name.endswith("hook_z"):
                    value[:, :, part.index] = self.sources[name][:, :, part.index]
            letter = next((letter for letter, hook in PLACES.items() if hook == name), None)
            mine = [part.index for part in parts if part.is_feature and str(part).startswith(f"{letter}1.")]
            if not mine:
                return value
            change = self.source_acts[letter] - plain_encode(self.dictionaries[letter], value)
            change = change[..., mine] @ self.dictionaries[letter].W_dec[mine].double()
            return value + change.view_as(value)

        logits = self.plain.run_with_hooks(self.task.clean, [(name, hook) for name in self.sources])[:, -1]
        rows = torch.arange(self.task.n)
        return float((logits[rows, self.task.answer] - logits[rows, self.task.wrong]).mean())

    def score(self, kept):
        return 100 * self.metric([name for name in self.nodes() if name not in kept]) / self.metric([])


@pytest.fixture(params=CONFIGS)
def make(request):
    return lambda activation="relu", source="mean": Case(CONFIGS[request.param], activation, source)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("source", ["mean", "corrupted", "zero"])
def test_scores_of_keep_sets_are_those_of_plain_hooks(make, activation, source):
    case = make(activation, source)
    nodes = candidate_nodes(case.model, case.task, source)
    assert list(map(str, nodes)) == case.nodes()
    rng = random.Random(SEED)
    for share in (0.0, 0.5, 0.9):
        circuit = Circuit.of_nodes(node for node in nodes if rng.random() < share)
        expected = case.score(set(map(str, circuit.nodes)))
        for executor in ("torch", "reference"):
            found = score(case.model, case.task, circuit, source=source, precision="fp64", executor=executor)
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def sequential_pruning(case, threshold, both_sides):
    """The rule as plainly as it can be said: from the last heads, MLP or features to the first, and back."""
    full, removed, trace, backward = case.metric([]), [], [], True
    while True:
        n_before = len(removed)
        left = [name for name in case.nodes() if name not in removed]
        groups = [list(group) for _, group in itertools.groupby(left, lambda name: name[:2])]
        for name in itertools.chain(*(reversed(groups) if backward else groups)):
            without = 100 * case.metric([*removed, name]) / full
            gone = 100 - without < threshold and (not both_sides or without - 100 < threshold)
            trace.append((name, without, gone))
            removed += [name] if gone else []
        if len(removed) == n_before:
            return removed, trace
        backward = not backward


@pytest.mark.parametrize(("both_sides", "at_once"), [(False, None), (True, None), (False, 1), (True, 3)])
def test_pruning_takes_the_decisions_of_the_sequential_rule(make, both_sides, at_once):
    case = make("topk" if both_sides else "jumprelu")
    options = {"threshold": 30, "both_sides": both_sides, "candidates_per_batch": at_once, "precision": "fp64"}
    circuit = discover(case.model, case.task, **options)
    removed, trace = sequential_pruning(case, 30, both_sides)
    assert [(step.node, step.removed) for step in circuit.trace] == [(name, gone) for name, _, gone in trace]
    torch.testing.assert_close([step.score_without for step in circuit.trace], [without for _, without, _ in trace])
    assert {*map(str, circuit.nodes)} == {*case.nodes()} - {*removed}
    assert any(".f" in name for name in removed)
    assert circuit.score == pytest.approx(score(case.model, case.task, circuit, precision="fp64"))
    assert Circuit.from_json(circuit.to_json()) == circuit
    assert circuit.settings["dictionaries"] == dict.fromkeys(PLACES.values(), 12)


def test_nodes_may_be_chosen_and_the_rest_is_kept(make):
    case = make()
    chosen = [Component.parse(name) for name in case.nodes() if name[0] == "m" and name != "m0"]
    ablation = Ablation(case.model, case.task, nodes=chosen, precision="fp64")
    expected = 100 * case.metric(list(map(str, chosen))) / case.metric([])
    assert ablation.score_of(set()) == pytest.approx(expected)
    assert ablation.score_of({Component.parse("a0.h1")}) == pytest.approx(expected)
    circuit = discover(case.model, case.task, nodes=chosen, threshold=30, precision="fp64")
    assert set(circuit.nodes) < set(chosen)
    plain = discover(case.model, case.task, nodes=all_nodes(case.model.config), threshold=30, precision="fp64")
    assert plain.nodes == discover(case.plain, case.task, threshold=30, precision="fp64").nodes


def test_drops_evaluation_and_curve_are_those_of_plain_hooks(make):
    case = make()
    names = case.nodes()
    circuit = Circuit.of_nodes(name for i, name in enumerate(names) if i % 3)
    kept = {*map(str, circuit.nodes)}
    ablation = Ablation(case.model, case.task, precision="fp64")
    whole = case.score(kept)
    full, nothing = case.metric([]), case.metric(names)
    drops = node_drops(ablation, circuit)
    found = evaluate_circuit(ablation, circuit, n_knockouts=3, greedy=1, seed=SEED)
    assert list(drops) == list(found.items) == [name for name in names if name in kept]
    for i, name in enumerate(found.items):
        assert drops[name][0] == pytest.approx(whole - case.score(kept - {name}), abs=1e-8)
        assert float(found.drops.mean[i]) == pytest.approx(drops[name][0] * full / (full - nothing), abs=1e-8)
    assert found.score.at()[0] == pytest.approx(whole)
    assert found.destroyed.at()[0] == pytest.approx(100 * (full - case.metric(kept)) / (full - nothing))
    ranking = node_ranking(sweep(case.model, case.task, ablation.nodes, source="mean", precision="fp64"))
    curve = ablation_curve(ablation, ranking, shares=(0.0, 0.5, 1.0))
    half = case.metric([str(node) for node in ranking[len(ranking) // 2 :]])
    assert curve.recovered.at(1)[0] == pytest.approx((half - nothing) / (full - nothing))


def test_random_circuits_have_as_many_of_each_kind(make):
    case = make()
    nodes = candidate_nodes(case.model, case.task)
    circuit = Circuit.of_nodes(["a0.h1", "a2.h0", "m2", *[str(n) for n in nodes if n.is_feature][::2]])

    def counted(chosen, by_layer):
        return sorted((node.kind, node.layer * by_layer) for node in chosen)

    for match, by_layer in (("size", False), ("layers", True)):
        drawn = random_nodes(nodes, circuit, random.Random(SEED), match)
        assert counted(drawn, by_layer) == counted(circuit.nodes, by_layer)
        assert drawn <= set(nodes)
    ablation = Ablation(case.model, case.task, precision="fp64")
    assert random_baseline(ablation, circuit, 5, seed=SEED).scores.unique().numel() > 1


def test_gates_that_are_open_or_shut_keep_and_ablate_features(make):
    case = make()
    nodes = candidate_nodes(case.model, case.task)
    gates = torch.randint(2, (len(nodes),), generator=torch.Generator().manual_seed(SEED)).double()
    sources = Sources(case.model, case.task, [tuple(Patch(Site(node)) for node in nodes)], "mean", 4)
    hooks = gated(nodes, gates, sources, torch.arange(case.task.n))
    logits = case.model.run_with_hooks(case.task.clean, hooks)[:, -1]
    rows = torch.arange(case.task.n)
    found = float((logits[rows, case.task.answer] - logits[rows, case.task.wrong]).mean())
    assert found == pytest.approx(case.metric([str(n) for n, gate in zip(nodes, gates, strict=True) if not gate]))
    circuit = discover(case.model, case.task, method="masks", steps=5, threshold=30)
    assert circuit.score == pytest.approx(case.score({*map(str, circuit.nodes)}), rel=1e-3, abs=0.01)


def test_sensitivity_takes_features(make):
    case = make()
    circuit = Circuit.of_nodes(case.nodes()[::2])
    options = {"sources": ("mean", "zero"), "metrics": ("logit_difference",), "scopes": ("all",), "n_random": 2}
    found = sensitivity(case.model, {"a": case.task}, circuit, n_resamples=10, **options)
    first, second = found.outcomes
    assert first.score == pytest.approx(case.score({*map(str, circuit.nodes)}), rel=1e-3, abs=0.01)
    assert second.convention.source == "zero"


def test_circuits_with_features_are_compared(make):
    """Their overlap among the candidates of both tasks, and each circuit's score on the other's task."""
    case = make()
    other = task_for(case.plain, SEED + 5)
    nodes = candidates_of(case.model, [case.task, other], ["mean"])
    assert set(nodes) == {node for task in (case.task, other) for node in candidate_nodes(case.model, task)}
    a, b = Circuit.of_nodes(case.nodes()[::2]), Circuit.of_nodes(case.nodes()[1::3])
    config = case.model.config
    found = compare_circuits({"a": (a, config), "b": (b, config)}, {config: nodes})
    of_kind = {each.kind: each for each in found.pairs[0].overlaps}
    assert of_kind["features"].n_all == sum(node.is_feature for node in nodes)
    assert of_kind["features"].n_both == len(set(a.features) & set(b.features))
    assert (of_kind["heads"].n_all, of_kind["mlps"].n_all) == (8, 2)
    assert found.shared[config.name].features == (a & b).features
    assert found.to_dict()["union"][config.name]["features"] == list(map(str, (a | b).features))
    assert jaccard_matrix([a, b], "features")[0, 1].item() == pytest.approx(a.jaccard(b, "features"))
    table = cross_task_scores([Ablation(case.model, case.task, precision="fp64")], [a, b]).mean
    expected = [case.score({*map(str, circuit.nodes)}) for circuit in (a, b)]
    assert table[0].tolist() == pytest.approx(expected)
    svg = overlay_figure({"one": a, "two": b}, config.n_layers, config.n_heads, "overlay")
    assert f"{len(a.features)} features (not drawn)" in svg


def test_a_fingerprint_tells_dictionaries_apart_in_any_dtype(make):
    case = make("jumprelu")
    settings = Ablation(case.model, case.task).settings["dictionary_fingerprints"]
    assert settings == {each.hook_name: each.fingerprint() for each in case.dictionaries.values()}
    assert len(set(settings.values())) == len(PLACES)
    one = case.dictionaries["m"]
    for dtype in (torch.float64, torch.bfloat16):
        assert one.map(lambda tensor, dtype=dtype: tensor.to(dtype)).fingerprint() == one.fingerprint()
    other = random_dictionary(one.hook_name, case.plain.config, SEED + 9, "jumprelu", d_sae=12)
    assert other.fingerprint() != one.fingerprint()


def test_what_is_kept_but_no_candidate_changes_nothing(make):
    case = make("topk")
    candidates = case.nodes()
    dull = [f"{letter}1.f{f}" for letter in PLACES for f in range(12) if f"{letter}1.f{f}" not in candidates]
    kept = candidates[::2]
    more = Circuit.of_nodes([*kept, *dull])
    assert score(case.model, case.task, more, precision="fp64") == pytest.approx(case.score(kept))


def test_what_does_not_go_together_is_refused(make):
    case = make()
    circuit = Circuit.of_nodes(["a0.h1", "m1.f3"])
    with pytest.raises(PatchError, match=r"'m1\.f3' does not exist: no dictionary is known at 'blocks\.1\.hook_mlp"):
        score(case.plain, case.task, circuit)
    for name, words in (("m1", "the MLP of layer 1"), ("a1.h2", "heads of layer 1")):
        with pytest.raises(PatchError, match=f"{words} and features in place of"):
            score(case.model, case.task, Circuit.of_nodes([name]))
    with pytest.raises(PatchError, match="the MLP of layer 1 and features in place of"):
        Ablation(case.model, case.task, nodes=circuit.nodes + all_nodes(case.model.config))
    with pytest.raises(PatchError, match=r"'r1' cannot be a circuit's node"):
        Ablation(case.model, case.task, nodes=[Component(1, "resid")])
    with pytest.raises(PatchError, match="features 0 to 11"):
        score(case.model, case.task, Circuit.of_nodes(["m1.f12"]))
    with pytest.raises(PatchError, match="method 'acdc' finds edges between heads and MLPs"):
        discover(case.model, case.task, method="acdc")
    with pytest.raises(PatchError, match=r"has features \(such as m1\.f3\); a search of edges"):
        prune_edges(case.model, case.task, circuit)
