"""The built-in oracle passes what is right and catches what is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_task
from subcircuit.analysis import sweep as sweep_module
from subcircuit.analysis.check import check_effects
from subcircuit.analysis.plan import plan
from subcircuit.analysis.sweep import sweep
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, Patch, Site, patch_effects
from subcircuit.engine.patching.planner import plan_effects

SEED = random.randrange(10**6)

SETS = [
    *(f"a{layer}.h{head}" for layer in range(3) for head in range(4)),
    *("m0", "m1", "m2", "r1", "a1.q2", "a1.k1", "a2.v0", "a0.g1", "m1.n3"),
    *(Site(Component.parse(name), (-1,)) for name in ("a0.h0", "m1", "a2.k0")),
    Site(Component.parse("a0.h0"), (0, 1)),  # before the first difference: no effect at all
    ("a0.h1", "m1", "a2.h3"),
    (Patch(Site.of("a0.h1"), "zero"), Patch(Site.of("a1.h1"), "mean"), "m2"),
]


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_task(SEED + 1)


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_right_effects_of_every_kind_of_row_pass(case, source, precision):
    model, task = case
    effects = patch_effects(model, task, SETS, source=source, precision=precision).effects
    options = {"source": source, "precision": precision}
    everything = check_effects(model, task, SETS, effects, k=1000, **options)
    assert everything.passed
    assert everything.rows == effects.numel()
    for k in (1, 4):
        assert check_effects(model, task, SETS, effects, k=k, seed=SEED, **options).passed


def test_tensors_as_source_are_checked_too(case):
    model, task = case
    source = {"blocks.1.attn.hook_z": torch.randn(1, 1, 4, 8)}
    effects = patch_effects(model, task, ["a1.h2"], source=source).effects
    assert check_effects(model, task, ["a1.h2"], effects, k=5, source=source).passed
    assert not check_effects(model, task, ["a1.h2"], effects, k=5, source="zero").passed


def test_rows_without_effect_pass_and_fail_like_others(case):
    model, task = case
    sites = [Site(Component.parse("a0.h0"), (0, 1))]
    effects = torch.zeros(1, 5)
    assert check_effects(model, task, sites, effects, k=5).passed
    assert not check_effects(model, task, sites, effects + 1e-4, k=5).passed


@pytest.mark.parametrize(
    "tampered",
    [lambda effects: effects * 1.001, lambda effects: effects + 0.01, lambda effects: effects * float("nan")],
    ids=["scaled", "shifted", "not a number"],
)
def test_a_wrong_executor_is_caught(case, monkeypatch, tampered):
    model, task = case
    assert sweep(model, task, "heads", check=3).settings["check"]["passed"]

    def wrong(*arguments, **options):
        result = patch_effects(*arguments, **options)
        return replace(result, effects=tampered(result.effects))

    monkeypatch.setattr(sweep_module, "patch_effects", wrong)
    check = sweep(model, task, "heads", check=3).settings["check"]
    assert not check["passed"]
    assert check["rows"] == 3
    assert not check["relative_error"] <= check["tolerance"]
    assert "check" not in sweep(model, task, "heads").settings


def test_one_tampered_effect_is_named(case):
    model, task = case
    effects = patch_effects(model, task, SETS).effects
    effects[7, 3] += 0.5
    check = check_effects(model, task, SETS, effects, k=effects.numel())
    assert not check.passed
    assert (check.worst_site, check.worst_prompt) == ("a1.h3", 3)
    assert check.max_absolute_error == pytest.approx(0.5, abs=1e-3)


def test_the_model_stays_as_it_was(case):
    model, task = case
    before = {name: value.clone() for name, value in model.named_parameters()}
    sweep(model, task, "mlps", check=2, source="mean")
    assert model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_check_of_nothing_is_an_error(case):
    model, task = case
    with pytest.raises(PatchError, match="a check of 0 rows"):
        check_effects(model, task, ["m0"], torch.zeros(1, 5), k=0)
    with pytest.raises(PatchError, match="a check of 1 rows of effects"):
        check_effects(model, task, ["m0"], torch.zeros(1, 4), k=1)


def test_a_plan_takes_the_options_of_a_sweep(case):
    model, task = case
    planned = plan(model, task, "heads+mlps", source="zero", positions="each", budget_bytes=10**6, calibrate=False)
    sites = [Site(site.component, (p,)) for site in sweep(model, task, "heads+mlps").sites for p in range(9)]
    assert planned == plan_effects(model, task, sites, source="zero", budget_bytes=10**6, calibrate=False)
    with pytest.raises(PatchError, match="executor 'reference' has no plan"):
        plan(model, task, executor="reference")
