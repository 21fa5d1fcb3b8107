"""One circuit under many conventions, each against forwards one at a time."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from circuit_cases import random_circuit, reference_ablation
from patching_cases import CONFIGS, random_model, task_for
from subcircuit.analysis import sensitivity as conventions
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.evaluation import leave_out
from subcircuit.analysis.nodes import all_nodes, random_nodes
from subcircuit.analysis.sensitivity import CONCLUSIONS, RANK_AGREES, scope_positions, sensitivity
from subcircuit.analysis.statistics import rank_correlation
from subcircuit.engine.errors import PatchError

SEED = random.randrange(10**6)


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    model = random_model(CONFIGS[request.param], SEED).double()
    task = replace(task_for(model, SEED + 1), positions={"members": (3, 4, 6)})
    return model, task, random_circuit(model.config, SEED + 2)


def test_every_convention_is_what_single_forwards_give(case):
    model, task, circuit = case
    options = {"threshold": 30, "n_random": 3, "n_resamples": 40, "seed": SEED}
    found = sensitivity(model, {"a": task}, circuit, scopes=("all", "members"), **options)
    answers_some = bool((model(task.clean)[:, -1].argmax(-1) == task.answer).any())
    assert len(found.outcomes) == 3 * 2 * (4 if answers_some else 3)
    assert len(found.notes) == (not answers_some)
    everything, nodes = all_nodes(model.config), circuit.nodes
    rng = random.Random(SEED)
    draws = [random_nodes(all_nodes(model.config), circuit, rng, "size") for _ in range(3)]
    first = None
    for outcome in found.outcomes:
        convention = outcome.convention
        where = {"all": None, "members": (3, 4, 6)}
        slow = reference_ablation(
            model, task, source=convention.source, metric=convention.metric, positions=where[convention.scope]
        )

        def mean(kept, slow=slow):
            return float(slow.kept_values([kept])[0].mean())

        full, nothing, alone = mean(everything), mean([]), mean(nodes)
        assert outcome.at_stake == pytest.approx(full - nothing, abs=1e-5)
        share = {"kl": -math.expm1(-nothing), "log_probability": -math.expm1(nothing - full)}
        taken = share[convention.metric] if convention.metric in share else 1 - nothing / full
        assert outcome.share_at_stake == pytest.approx(taken, rel=1e-3, abs=1e-4)
        if outcome.recovered is None:
            assert set(outcome.holds.values()) == {None}
            continue
        assert outcome.share_at_stake >= 0.1
        width = (full - nothing) / 100
        assert width < 0 if convention.metric == "kl" else width > 0
        recovered = (alone - nothing) / width
        drops = torch.tensor([(alone - mean(leave_out(nodes, [node]))) / width for node in nodes])
        others = [(mean(draw) - nothing) / width for draw in draws]
        first = drops if first is None else first
        # the fast executor computes in float32
        assert outcome.recovered[0] == pytest.approx(recovered, rel=1e-3, abs=0.01)
        assert outcome.random_most == pytest.approx(max(others), rel=1e-3, abs=0.01)
        assert outcome.least_drop[1] == pytest.approx(float(drops.min()), rel=1e-3, abs=0.01)
        if abs(recovered - 70) > 0.1:
            assert outcome.holds["recovers"] == (recovered >= 70)
        if min(abs(recovered - other) for other in others) > 0.1 or convention.metric == "accuracy":
            assert outcome.holds["beats random"] == (recovered > max(others) + 1e-9)
        if float(drops.abs().min()) > 0.1:
            assert outcome.holds["all matter"] == bool((drops > 0).all())
        rho = float(rank_correlation(drops, first))
        if convention.metric != "accuracy" and abs(rho - RANK_AGREES) > 0.05:
            assert outcome.holds["same ranking"] == (rho >= RANK_AGREES)


@pytest.fixture
def anything_at_stake(monkeypatch):
    """Random models may lose little of their predictions."""
    monkeypatch.setattr(conventions, "LEAST_AT_STAKE", 0.0)


@pytest.mark.usefixtures("anything_at_stake")
def test_the_whole_model_recovers_all_under_every_convention(case):
    model, task, _ = case
    everything = Circuit.of_nodes(all_nodes(model.config))
    found = sensitivity(model, {"a": task}, everything, metrics=("kl", "log_probability"), n_random=0, n_resamples=20)
    concluded = [outcome for outcome in found.outcomes if outcome.recovered is not None]
    assert concluded
    for outcome in concluded:
        assert outcome.recovered == pytest.approx((100, 100, 100))
        assert outcome.holds["recovers"] is True
        assert outcome.resamples["recovers"] == 1
        assert outcome.holds["beats random"] is None
    assert found.survival()["recovers"] == (len(concluded), len(concluded))
    assert "recovers" in found.surviving()
    assert "beats random" not in found.surviving()


@pytest.mark.parametrize(
    ("metric", "full", "nothing", "concludes"),
    [
        ("logit_difference", 4.0, 3.8, False),  # sure, as all prompts lose the same, but a twentieth
        ("logit_difference", 4.0, 3.2, True),
        ("logit_difference", 4.0, 4.5, False),
        ("accuracy", 1.0, 0.95, False),
        ("accuracy", 1.0, 0.5, True),
        ("log_probability", -1.0, -1.05, False),
        ("log_probability", -1.0, -1.3, True),
        ("kl", 0.0, 0.02, False),
        ("kl", 0.0, 0.2, True),
    ],
)
def test_nothing_is_concluded_from_less_than_a_tenth_of_the_score(metric, full, nothing, concludes):
    values = torch.tensor([[full], [nothing], [(full + nothing) / 2]], dtype=torch.float64).expand(3, 6)
    measured = conventions._Measured.of(values, metric, 0, 50, SEED)
    assert measured.concludes is concludes


def test_what_only_some_resamples_have_at_stake_is_unsure():
    full = torch.full((8,), 2.0, dtype=torch.float64)
    nothing = full - torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0])  # an eighth on average, all of it from one prompt
    measured = conventions._Measured.of(torch.stack([full, nothing, full]), "logit_difference", 0, 400, SEED)
    assert measured.share_at_stake == pytest.approx(1 / 8)
    assert not measured.concludes


@pytest.mark.usefixtures("anything_at_stake")
def test_survival_is_counted_by_every_choice(case):
    model, task, circuit = case
    tasks = {"a": task, "b": task.subset([0, 2, 3, 5])}
    found = sensitivity(model, tasks, circuit, sources=("mean", "zero"), metrics=("kl",), scopes=("all",), n_random=2)
    assert [outcome.convention.prompts for outcome in found.outcomes] == ["a", "a", "b", "b"]
    for conclusion in CONCLUSIONS:
        for choice in ("source", "prompts", "scope", "metric"):
            groups = [counts[conclusion] for counts in found.survival_by(choice).values()]
            assert tuple(map(sum, zip(*groups, strict=True))) == found.survival()[conclusion]
    first = next(outcome for outcome in found.outcomes if outcome.recovered is not None)
    assert first.rank_correlation == pytest.approx(1)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["survival"]["recovers"] == list(found.survival()["recovers"])


def test_the_weakest_choice_is_that_with_the_least_share(case):
    model, task, circuit = case
    found = sensitivity(model, {"a": task}, circuit, scopes=("all", "last"), n_random=3, n_resamples=20, seed=SEED)
    for conclusion in CONCLUSIONS:
        n_held, n_all = found.survival()[conclusion]
        weakest = found.weakest(conclusion)
        assert (weakest is None) == (n_held in (0, n_all))
        if weakest is not None:
            choice, value, n_there, n_asked = weakest
            assert found.survival_by(choice)[value][conclusion] == (n_there, n_asked)
            assert n_there / n_asked <= n_held / n_all


def test_the_executor_and_precision_asked_for_measure_the_same(case):
    model, task, circuit = case
    options = {"scopes": ("all",), "metrics": ("kl",), "n_random": 2, "n_resamples": 20, "seed": SEED}
    fast = sensitivity(model, {"a": task}, circuit, precision="fp64", **options)
    slow = sensitivity(model, {"a": task}, circuit, executor="reference", precision="fp64", **options)
    for one, other in zip(fast.outcomes, slow.outcomes, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-9)
        assert (one.recovered is None) == (other.recovered is None)
    with pytest.raises(PatchError, match="precision 'fp8'"):
        sensitivity(model, {"a": task}, circuit, precision="fp8", **options)


def test_what_a_task_lacks_is_left_out_with_a_note(case):
    model, task, circuit = case
    bare = replace(task, corrupted=None, positions={})
    found = sensitivity(model, {"a": bare}, circuit, metrics=("kl",), n_random=0, n_resamples=20)
    kept = {(outcome.convention.source, outcome.convention.scope) for outcome in found.outcomes}
    assert kept == {(source, scope) for source in ("mean", "zero") for scope in ("all", "last")}
    assert any("'corrupted'" in note for note in found.notes)
    assert any("scope 'members' is none of task" in note for note in found.notes)
    with pytest.raises(PatchError, match="no convention is left"):
        sensitivity(model, {"a": bare}, circuit, sources=("corrupted",))
    with pytest.raises(PatchError, match="scope 'words' is none of task"):
        sensitivity(model, {"a": task, "b": bare}, circuit, scopes=("all", "words"))
    with pytest.raises(PatchError, match="threshold nan must be positive"):
        sensitivity(model, {"a": task}, circuit, threshold=float("nan"))
    with pytest.raises(PatchError, match="metric 'bleu'"):
        sensitivity(model, {"a": bare}, circuit, metrics=("bleu",))
    with pytest.raises(PatchError, match="source 'noise' is not known"):
        sensitivity(model, {"a": bare}, circuit, sources=("noise",))
    with pytest.raises(PatchError, match="a circuit without nodes"):
        sensitivity(model, {"a": bare}, Circuit([], []))


def test_scopes_are_positions(case):
    _, task, _ = case
    assert scope_positions(task, "all") is None
    assert scope_positions(task, "from_difference") == tuple(range(task.first_difference, task.pos))
    assert scope_positions(task, "last") == (8,)
    assert scope_positions(task, "members") == (3, 4, 6)
    with pytest.raises(PatchError, match="it has all, from_difference, last, members"):
        scope_positions(task, "words")
