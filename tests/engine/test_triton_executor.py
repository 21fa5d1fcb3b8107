"""The triton executor, end to end, against full forwards in float64: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import subcircuit as sc
from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, DeltaSession, Patch, Site, options, patch_effects
from subcircuit.kernels.backend import triton_runs_on

SEED = random.randrange(10**6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""In bfloat16 wider than the 1e-2 that hold over many rows (test_patching.py): here a few effects make up the whole
norm, and one that nearly cancels has a larger error."""

pytestmark = pytest.mark.skipif(
    not triton_runs_on(DEVICE), reason="Triton is not installed, or has neither a GPU nor its interpreter"
)


def at(name, *positions):
    return Site(Component.parse(name), positions)


@pytest.fixture(params=CONFIGS)
def case(request):
    """Two layers, two prompts: the interpreter takes milliseconds for each program of a kernel."""
    print(f"seed {SEED}")
    config = replace(CONFIGS[request.param], n_layers=2)
    return random_model(config, SEED).to(DEVICE), random_prompts(SEED + 1, n_prompts=2, n_pos=7)


def compare(model, prompts, sets, source, precision):
    reference = patch_effects(model, prompts, sets, source=source, executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sets, source=source, executor="triton", precision=precision)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[precision]
    assert relative_error(result.clean_metric, reference.clean_metric) < 1e-5


@pytest.mark.parametrize(
    ("source", "precision"), [("corrupted", "fp32"), ("corrupted", "bf16"), ("mean", "fp32"), ("zero", "bf16")]
)
def test_heads_mlps_and_what_they_read(case, source, precision):
    model, prompts = case
    compare(model, prompts, ["a0.h0", "a0.h3", "a1.h2", "m0", "m1", "a0.q2", "a1.k1", "a0.v0"], source, precision)


def test_single_positions(case):
    model, prompts = case
    compare(model, prompts, [at(name, p) for name in ("a0.h1", "m0") for p in (4, -1)], "corrupted", "fp32")


@pytest.mark.parametrize("precision", TOLERANCE)
def test_rows_of_several_patches_and_sources(case, precision):
    model, prompts = case
    sets = [
        ("a0.k0", "a0.v1", at("a1.h0", -1)),
        (Patch(Site.of("a0.h1"), "zero"), Patch(Site.of("a1.g0"), "mean"), Patch(at("a1.h1", 5), "corrupted"), "m1"),
        (),
    ]
    compare(model, prompts, sets, "corrupted", precision)


def test_rows_on_top_of_a_base(case):
    model, prompts = case
    base = (Patch(Site.of("a0.h2")), Patch(Site.of("m0")))
    sets = [("a1.h1",), ("a0.h0", "m1")]
    whole = [(*base, *map(Patch.of, patch_set)) for patch_set in sets]
    reference = patch_effects(model, prompts, whole, source="mean", executor="reference", precision="fp64").effects
    result = DeltaSession(model, prompts, source="mean", executor="triton").effects(sets, base=base).effects
    assert relative_error(result, reference) < TOLERANCE["fp32"]


def test_a_head_and_an_mlp_of_tiny_gpt2():
    model = sc.load("tiny-gpt2", device=DEVICE)
    task = sc.task("months", model, n=1, seed=SEED)
    last = model.config.n_layers - 1
    compare(model, task, [f"a{last}.h1", f"m{last - 1}"], "corrupted", "fp32")


def test_where_triton_cannot_run_the_error_says_what_can(case, monkeypatch):
    model, prompts = case
    monkeypatch.setattr(options, "triton_runs_on", lambda device: False)
    with pytest.raises(PatchError, match="executor 'torch' runs everywhere"):
        patch_effects(model, prompts, ["a0.h0"], executor="triton")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_removed_edges_and_paths(case, precision):
    model, prompts = case
    edges = [("a0.h0", "a1.q1"), ("input", "a1.k1"), ("m0", "a1.v0"), ("a0.h3", "m0"), ("m1", "logits")]
    sets = [*edges, edges]
    reference = sc.edge_effects(model, prompts, sets, executor="reference", precision="fp64")
    result = sc.edge_effects(model, prompts, sets, executor="triton", precision=precision)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[precision]
    reference = sc.path_effects(model, prompts, edges, executor="reference", precision="fp64")
    result = sc.path_effects(model, prompts, edges, executor="triton", precision=precision)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[precision]
