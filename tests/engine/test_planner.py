"""Plans against what the executor then does: FLOPs counted by torch as they happen, chunks as they are run, bytes."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patching_cases import CONFIGS, random_model, random_prompts
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, DeltaSession, Patch, Site, delta
from subcircuit.engine.patching.delta import DeltaRun
from subcircuit.engine.patching.planner import plan_effects
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm}


@pytest.fixture(params=CONFIGS)
def case(request, monkeypatch):
    """The C kernels multiply out of torch's sight."""
    monkeypatch.setattr("subcircuit.kernels.native.library", lambda: None)
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_prompts(SEED + 1, n_prompts=8)


def at(name, *positions):
    return Site(Component.parse(name), positions)


def heads(config):
    return [f"a{layer}.h{head}" for layer in range(config.n_layers) for head in range(config.n_heads)]


SETS = {
    "heads": heads,
    "MLPs": lambda config: [f"m{layer}" for layer in range(config.n_layers)],
    "head inputs": lambda config: ["a0.q1", "a0.k0", "a1.v1", "a1.q3", "a2.k1", "a2.q0", "a2.v0"],
    "groups and neurons": lambda config: ["a0.g0", "a2.g1", "m0.n3", "m2.n5", "m2.n6"],
    "the residual stream": lambda config: ["r0", "r1", "r2"],
    "single positions": lambda config: [at(name, *p) for name in heads(config) for p in [(-1,), (0,), (4, 6), (1, 2)]],
    "a whole layer of heads": lambda config: [tuple(f"a1.h{head}" for head in range(config.n_heads)), "a1.h0"],
    "several patches": lambda config: [
        ("a0.h1", "m1", "a2.h3"),
        ("a0.h1", "a0.h2", "m2"),
        ("a1.q1", "a1.h1", "r1"),
        ("a1.k0", at("a1.h0", -1)),
        (Patch(Site.of("a0.h1"), "zero"), Patch(Site.of("a1.h1"), "mean"), "m2"),
        (),
    ],
    "all MLPs at once": lambda config: [("a0.h1", "m0", "m1", "m2"), ("a0.h2", "m0", "m1", "m2")],
}


def executed(session, sets):
    """FLOPs by layer, all and those of attention, and rows by chunk, while a session runs patch sets."""
    n_layers = session.model.config.n_layers
    everything, attention, chunks = [0] * n_layers, [0] * n_layers, []
    block, enter, query_delta = DeltaRun._block, DeltaRun.enter, delta.query_delta

    def counted_block(run, layer, *args):
        with FlopCounterMode(display=False) as counter:
            result = block(run, layer, *args)
        flops = counter.get_flop_counts().get("Global", {})
        everything[layer] += sum(flops.values())
        attention[layer] += 2 * flops.get(torch.ops.aten.baddbmm, 0)  # the scores; the values cost as much
        return result

    def counted_query_delta(*args, **options):
        with FlopCounterMode(display=False) as counter:
            result = query_delta(*args, **options)
        attention[n_layers - 1] += counter.get_total_flops()
        return result

    def counted_enter(run, patch_sets, *args):
        chunks.append(len(patch_sets) * run.n_prompts)
        return enter(run, patch_sets, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DeltaRun, "_block", counted_block)
        patched.setattr(DeltaRun, "enter", counted_enter)
        patched.setattr(delta, "query_delta", counted_query_delta)
        session.effects(sets)
    return tuple(everything), tuple(attention), chunks


@pytest.mark.parametrize(
    ("source", "budget_bytes"), [("corrupted", None), ("mean", 60_000), ("corrupted", 500_000), ("zero", None)]
)
@pytest.mark.parametrize("family", SETS)
def test_flops_and_chunks_are_those_of_the_executor(case, family, source, budget_bytes):
    model, prompts = case
    sets = [as_patch_set(what) for what in SETS[family](model.config)]
    options = {"source": source, "precision": "fp64", "budget_bytes": budget_bytes}
    plan = plan_effects(model, prompts, sets, **options, calibrate=False)
    everything, attention, chunks = executed(DeltaSession(model, prompts, **options), sets)
    assert tuple(map(sum, zip(plan.product_flops, plan.attention_flops, strict=True))) == everything
    assert plan.attention_flops == attention
    assert (plan.n_chunks, plan.n_rows) == (len(chunks), sum(chunks))
    assert budget_bytes is None or plan.n_prompt_chunks > 1


@pytest.mark.parametrize("metric", ["logit_difference", "log_probability", "kl", "accuracy"])
@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_flops_of_the_clean_side_and_of_the_readout_are_those_of_their_products(case, source, metric):
    """torch counts no FLOPs of its fused attention on a CPU, which the plan does."""
    model, prompts = case
    sites = ["m0", "m1", ()]  # these rows have plain products only, which are counted as well, or nothing to read
    options = {"source": source, "precision": "fp64", "metric": metric}
    plan = plan_effects(model, prompts, sites, calibrate=False, **options)
    with FlopCounterMode(display=False) as counter:
        DeltaSession(model, prompts, **options).effects(sites)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flops for operation, flops in counts.items() if operation in LINEAR)
    n_passes = model.config.n_layers if source == "zero" else model.config.n_layers + 2
    attention = 4 * 8 * n_passes * model.config.n_heads * model.config.d_head * 9**2
    assert plan.clean_flops - attention + sum(plan.product_flops) + plan.readout_flops == counted
    assert (plan.readout_flops == 0) == (metric == "logit_difference")


def test_one_row_alone_costs_a_single_head_and_then_the_layers_above(case):
    """By hand, from the shapes."""
    model, prompts = case
    config = model.config
    d, d_heads, d_kv = config.d_model, config.n_heads * config.d_head, config.kv_heads * config.d_head
    n_mlp = (3 if config.gated_mlp else 2) * config.d_mlp
    one = replace(prompts, **{k: getattr(prompts, k)[:1] for k in ("clean", "corrupted", "answer", "wrong")})
    plan = plan_effects(model, one, ["a1.h0"], calibrate=False)  # the first difference is at 3 of 9
    layer_1 = 2 * 6 * d * (config.d_head + n_mlp)
    layer_2, attention_2 = 2 * d * (d_heads + d_heads + n_mlp), 4 * 9 * d_heads
    if config.kv_heads == config.n_heads:  # with two heads to a key, 6 positions are too few
        attention_2 += 2 * 2 * d * (d_heads + config.n_heads * 6)
    else:
        layer_2 += 2 * d * 6 * 2 * d_kv
    assert plan.product_flops == (0, layer_1, layer_2)
    assert plan.attention_flops == (0, 0, attention_2)


def test_the_prediction_says_seconds_and_the_plan_is_plain_data(case):
    model, prompts = case
    plan = plan_effects(model, prompts, heads(model.config))
    assert plan.seconds > 0
    assert plan_effects(model, prompts, heads(model.config), calibrate=False).seconds is None
    assert json.loads(json.dumps(plan.as_dict()))["peak_bytes"] == plan.peak_bytes
    assert plan.sites_by_layer == (4, 4, 4)
    for family in SETS:
        assert plan_effects(model, prompts, SETS[family](model.config), precision="bf16").seconds > 0
    one_layer = random_model(replace(model.config, n_layers=1), SEED)
    assert plan_effects(one_layer, prompts, ["a0.h0", "m0"], metric="kl").seconds > 0
    assert plan_effects(model, prompts, []).seconds is None


def test_a_plan_runs_nothing_of_the_sweep(case, monkeypatch):
    model, prompts = case
    monkeypatch.setattr(DeltaRun, "__init__", lambda *_: pytest.fail("a clean run was made"))
    plan_effects(model, prompts, heads(model.config), source="mean", calibrate=False)


def test_what_a_sweep_refuses_its_plan_refuses(case):
    model, prompts = case
    with pytest.raises(PatchError, match="'a9.h0' does not exist"):
        plan_effects(model, prompts, ["a9.h0"])
    with pytest.raises(PatchError, match="position 9 of 'a0.h0' is outside"):
        plan_effects(model, prompts, [at("a0.h0", 9)])
    with pytest.raises(PatchError, match="source 'median' is not known"):
        plan_effects(model, prompts, ["a0.h0"], source="median")
    with pytest.raises(PatchError, match="metric 'loss' is not known"):
        plan_effects(model, prompts, ["a0.h0"], metric="loss")
    with pytest.raises(PatchError, match="needs corrupted prompts"):
        plan_effects(model, replace(prompts, corrupted=None), ["a0.h0"])
