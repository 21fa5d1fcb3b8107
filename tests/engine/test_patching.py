"""The delta form against full forwards with hooks, on fresh random models."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component, DeltaSession, Patch, Site, patch_effects
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
TOLERANCE = {"fp64": 1e-12, "fp32": 3e-5, "bf16": 1e-2}


def components_of(config):
    """Every component of every kind but neurons, of which some."""
    names = [f"r{layer}" for layer in range(config.n_layers)]
    for layer in range(config.n_layers):
        names += [f"a{layer}.h{head}" for head in range(config.n_heads)]
        names += [f"a{layer}.q{head}" for head in range(config.n_heads)]
        names += [f"a{layer}.{kind}{head}" for kind in "kvg" for head in range(config.kv_heads)]
        names += [f"m{layer}", f"m{layer}.n0", f"m{layer}.n{config.d_mlp - 1}"]
    return names


def at(name, *positions):
    return Site(Component.parse(name), positions)


def positions_of_norms(monkeypatch):
    """At how many positions each norm of rows is computed, from now on."""
    from subcircuit.engine.patching import delta

    seen, original = [], delta.norm_delta

    def spy(clean, clean_normed, change, *rest, **options):
        seen.append(change.shape[2])
        return original(clean, clean_normed, change, *rest, **options)

    monkeypatch.setattr(delta, "norm_delta", spy)
    return seen


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_prompts(SEED + 1)


@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_effects_of_every_component_equal_full_forwards(case, source, precision):
    model, prompts = case
    sites = components_of(model.config)
    reference = patch_effects(model, prompts, sites, source=source, executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sites, source=source, precision=precision)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[precision]
    assert relative_error(result.clean_metric, reference.clean_metric) < 1e-5


def test_bf16_products_are_far_more_accurate_than_a_bf16_model(case):
    model, prompts = case
    sites = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    reference = patch_effects(model, prompts, sites, executor="reference", precision="fp64").effects
    ordinary = patch_effects(model, prompts, sites, executor="reference", precision="bf16").effects
    delta = patch_effects(model, prompts, sites, precision="bf16").effects
    assert relative_error(delta, reference) < relative_error(ordinary, reference) / 3


def test_effects_at_single_and_several_positions_equal_full_forwards(case):
    model, prompts = case
    sites = [at(name, *where) for name in components_of(model.config) for where in [(-1,), (0,), (4, 6)]]
    reference = patch_effects(model, prompts, sites, source="mean", executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sites, source="mean", precision="fp64")
    assert relative_error(result.effects, reference.effects) < 1e-12


def test_a_difference_at_one_position_meets_every_kind_of_patch_above(case):
    model, prompts = case
    heads = tuple(f"a1.h{head}" for head in range(model.config.n_heads))
    above = [("r1",), (at("r1", 4),), ("a1.q1",), ("a1.k0", "a1.v1"), heads, (at("a1.h2", -1),), ("m1",), ("a2.h0",)]
    below = [at("a0.h1", 4), at("m0", 3, 5), at("m0.n3", 6), at("a0.g1", 0), at("m0", -1)]
    sets = [(site, *more) for site in below for more in above]
    reference = patch_effects(model, prompts, sets, source="mean", executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sets, source="mean", precision="fp64")
    assert relative_error(result.effects, reference.effects) < 1e-12


def test_rows_with_several_patches_and_sources_equal_full_forwards(case):
    model, prompts = case
    sets = [
        ("a0.h1", "m1", "a2.h3"),
        ("a0.h1", "a0.h2", "m2"),
        ("a1.q1", "a1.h1", "r1"),
        ("a1.k0", "a1.v1", at("a1.h0", -1)),
        (Patch(Site.of("a0.h1"), "zero"), Patch(Site.of("a1.h1"), "mean"), "m2"),
        (Patch(Site.of("a0.h1"), "zero"), Patch(Site.of("a0.g0"), "mean"), Patch(at("a0.h1", 5), "corrupted")),
        tuple(components_of(model.config)),
        (),
    ]
    reference = patch_effects(model, prompts, sets, executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sets, precision="fp64")
    assert relative_error(result.effects, reference.effects) < 1e-12
    assert (result.effects[-1] == 0).all()


def test_a_source_of_tensors_equals_full_forwards(case):
    model, prompts = case
    other = torch.randint(0, 50, (1, 9))
    cache = model.double().run_with_cache(other, ["*.hook_z", "*.hook_mlp_out", "*.hook_k"])[1]
    sites = ["a0.h3", "a2.h0", "m1", "a1.k1", "a1.g1"]
    reference = patch_effects(model, prompts, sites, source=cache, executor="reference", precision="fp64")
    result = patch_effects(model, prompts, sites, source=cache, precision="fp64")
    assert relative_error(result.effects, reference.effects) < 1e-12


def test_chunks_of_prompts_and_rows_change_nothing(case):
    model, prompts = case
    sites = components_of(model.config)
    for source in ("corrupted", "mean"):
        whole = patch_effects(model, prompts, sites, source=source, precision="fp64")
        # Too small for two prompts at once, and for more than a few rows.
        pieces = patch_effects(model, prompts, sites, source=source, precision="fp64", budget_bytes=60_000)
        assert relative_error(pieces.effects, whole.effects) < 1e-12
        assert relative_error(pieces.clean_metric, whole.clean_metric) < 1e-12


@pytest.mark.parametrize("source", ["corrupted", "mean"])
def test_a_base_that_changes_from_call_to_call_equals_full_forwards(case, source):
    model, prompts = case
    session = DeltaSession(model, prompts, source=source, precision="fp64")
    parts = as_patch_set(["a0.h3", "m0", "a1.h0", "a2.h2", "m2"])
    extras = [*(as_patch_set(name) for name in components_of(model.config)), as_patch_set(["m1", "a2.h1"]), ()]
    for base in (parts, parts[:2], parts[:4], (), parts[1:]):
        whole = [(*base, *extra) for extra in extras]
        reference = patch_effects(model, prompts, whole, source=source, executor="reference", precision="fp64")
        assert relative_error(session.effects(extras, base=base).effects, reference.effects) < 1e-12


def test_rows_on_a_large_base_are_computed_in_float32(case):
    model, prompts = case
    base = tuple(Patch(Site.of(f"a{layer}.h{head}")) for layer in (0, 1) for head in range(4))
    base = (*base, Patch(Site.of("m0")), Patch(Site.of("m1")))
    sets = [(), (Patch(Site.of("a2.h0")),), (Patch(Site.of("m2")),)]
    reference = patch_effects(
        model, prompts, [(*base, *each) for each in sets], source="zero", executor="reference", precision="fp64"
    ).effects
    result = DeltaSession(model, prompts, source="zero", precision="bf16").effects(sets, base=base)
    assert (result.n_precise, result.n_full) == (result.effects.numel(), 0)
    assert relative_error(result.effects, reference) < TOLERANCE["fp32"]
    clean = model.run_with_cache(prompts.clean)[1]
    near = {name: 0.98 * clean[name] for name in ("blocks.0.attn.hook_z", "blocks.0.hook_mlp_out")}
    small = tuple(Patch(Site.of(name), near) for name in ("a0.h1", "m0"))
    assert DeltaSession(model, prompts, precision="bf16").effects(sets, base=small).n_precise == 0


def test_a_base_may_start_at_a_later_position_than_its_rows(case):
    model, prompts = case
    session = DeltaSession(model, prompts, precision="fp64")
    sites = ["a1.h0", at("m1", 0, 2), at("a2.k1", 1), at("r0", 4)]
    extras = [as_patch_set(Patch(Site.of(site), "mean")) for site in sites]
    extras += [as_patch_set("a2.h1"), ()]
    for base in (as_patch_set(at("a0.h3", -1)), as_patch_set(["a0.h3", "m0"]), as_patch_set(at("r1", 5, -1))):
        whole = [(*base, *extra) for extra in extras]
        reference = patch_effects(model, prompts, whole, executor="reference", precision="fp64")
        assert relative_error(session.effects(extras, base=base).effects, reference.effects) < 1e-12


def test_one_clean_run_serves_every_call_that_was_prepared_for(case, monkeypatch):
    model, prompts = case
    runs = []
    original = DeltaSession._run_class
    monkeypatch.setattr(DeltaSession, "_run_class", lambda self, *args: runs.append(1) or original(*args))
    prepared = DeltaSession(model, prompts, source="mean")
    prepared.prepare([as_patch_set(components_of(model.config))])
    for name in components_of(model.config):
        prepared.effects([name])
    assert len(runs) == 1


@pytest.mark.parametrize("budget_bytes", [None, 60_000])
def test_the_parts_of_a_session_may_be_asked_for_one_by_one(case, budget_bytes):
    model, prompts = case
    sites, n = ["a0.h1", "a1.k0", "m2"], len(prompts.clean)
    whole = patch_effects(model, prompts, sites, precision="fp64")
    parts = [torch.tensor([n - 1, 0]), torch.arange(1, n - 1)]
    session = DeltaSession(model, prompts, precision="fp64", parts=parts, budget_bytes=budget_bytes)
    told = []
    for i, part in enumerate(parts):
        result = session.effects(sites, part=i, progress=lambda *counts: told.append(counts))
        torch.testing.assert_close(result.effects[:, part], whole.effects[:, part])
        torch.testing.assert_close(result.clean_metric[part], whole.clean_metric[part])
        assert result.effects[:, parts[1 - i]].count_nonzero() == 0
        assert told[-1] == (len(sites) * len(part),) * 2
    torch.testing.assert_close(session.effects(sites).effects, whole.effects)


def test_one_prompt_one_position_and_one_layer_work():
    model = random_model(replace(CONFIGS["llama-gqa"], n_layers=1), SEED)
    for n_prompts, n_pos in ((1, 9), (3, 1), (1, 1)):
        prompts = random_prompts(SEED, n_prompts, 9)
        prompts = replace(prompts, clean=prompts.clean[:, :n_pos], corrupted=prompts.clean[:, :n_pos].flip(0) * 0 + 1)
        sites = ["a0.h0", "a0.k1", "m0", "r0"]
        reference = patch_effects(model, prompts, sites, executor="reference", precision="fp64")
        result = patch_effects(model, prompts, sites, precision="fp64")
        torch.testing.assert_close(result.effects, reference.effects, rtol=1e-10, atol=1e-12)


def test_positions_before_the_first_difference_are_not_computed(case, monkeypatch):
    model, prompts = case
    seen = positions_of_norms(monkeypatch)
    patch_effects(model, prompts, ["a0.h0"])
    assert max(seen) == 9 - 3
    assert seen[-1] == 1  # the last layer's MLP: only the position that is read


@pytest.mark.parametrize("executor", ["torch", "reference"])
def test_prompts_with_several_answers_compare_mean_logits(case, executor):
    model, prompts = case
    answers = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1], [7, 8, 9], [10, 11, -1]])
    wrongs = torch.tensor([[12, -1], [13, 14], [15, -1], [16, 17], [18, 19]])
    sets = SimpleNamespace(**vars(prompts), answers=answers, wrongs=wrongs)
    result = patch_effects(model, sets, ["a1.h1"], source="zero", executor=executor, precision="fp64")

    def metric(logits):
        rows = zip(logits[:, -1], answers, wrongs, strict=True)
        return torch.stack([row[a[a >= 0]].mean() - row[w[w >= 0]].mean() for row, a, w in rows])

    def without_head(value, name):
        value = value.clone()
        value[:, :, 1] = 0
        return value

    double = model.double()
    clean = metric(double(prompts.clean))
    patched = metric(double.run_with_hooks(prompts.clean, [("blocks.1.attn.hook_z", without_head)]))
    assert relative_error(result.clean_metric, clean) < 1e-12
    assert relative_error(result.effects[0], patched - clean) < 1e-11


def test_progress_counts_every_row(case):
    model, prompts = case
    calls = []
    patch_effects(model, prompts, components_of(model.config), progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(components_of(model.config)) * 5,) * 2
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("name", ["a5.h1", "m3", "a5.q1", "a5.k0", "a5.v0", "a5.g0", "m3.n17", "r4"])
def test_component_names_read_back(name):
    assert str(Component.parse(name)) == name


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (["a99.h0"], "'a99.h0' does not exist: the model has layers 0 to 2"),
        (["a0.h9"], "'a0.h9' does not exist: layer 0 has heads 0 to 3"),
        (["m1.n999"], "neurons 0 to"),
        (["head 3"], "'head 3' is not understood"),
        ([at("a0.h0")], "'a0.h0' is to be patched at no position"),
        ([at("a0.h0", 9)], "position 9 of 'a0.h0' is outside prompts of 9 tokens"),
    ],
)
@pytest.mark.parametrize("executor", ["torch", "reference"])
def test_a_site_that_does_not_exist_is_named(case, sites, words, executor):
    model, prompts = case
    with pytest.raises(PatchError, match=words) as caught:
        patch_effects(model, prompts, sites, executor=executor)
    assert "\n" not in str(caught.value)


def test_bad_options_and_unaligned_prompts_are_named(case):
    model, prompts = case
    with pytest.raises(PatchError, match="source 'median' is not known"):
        patch_effects(model, prompts, ["a0.h0"], source="median")
    with pytest.raises(PatchError, match="executor 'cuda' is not known"):
        patch_effects(model, prompts, ["a0.h0"], executor="cuda")
    with pytest.raises(PatchError, match="executor 'cuda' is not known"):
        DeltaSession(model, prompts, executor="cuda")
    with pytest.raises(PatchError, match="precision 'fp8' is not known"):
        patch_effects(model, prompts, ["a0.h0"], precision="fp8")
    with pytest.raises(PatchError, match="must be aligned"):
        patch_effects(model, replace(prompts, corrupted=prompts.corrupted[:, :-1]), ["a0.h0"])
    with pytest.raises(PatchError, match="needs corrupted prompts"):
        patch_effects(model, replace(prompts, corrupted=None), ["a0.h0"])
    with pytest.raises(PatchError, match=r"no value for 'blocks.0.attn.hook_z'"):
        patch_effects(model, prompts, ["a0.h0"], source={})
    with pytest.raises(PatchError, match="longer than the model's context"):
        patch_effects(model, random_prompts(SEED, n_pos=40), ["a0.h0"])


def test_the_last_layer_needs_no_keys_and_values_of_its_own(case, monkeypatch):
    """But where they are patched, or where there are few."""
    from subcircuit.engine.patching import delta

    model, prompts = case
    seen, original = [], delta.query_delta
    monkeypatch.setattr(delta, "query_delta", lambda *args, **options: seen.append(1) or original(*args, **options))
    for above in [(), ("a2.h1", "a2.q0", "m2"), (at("a2.h0", -1), at("a2.h3", 0)), ("r2",)]:
        for source in ("mean", "zero"):
            sets, seen[:] = [("a0.h1", *above), ("m0", *above)], []
            reference = patch_effects(model, prompts, sets, source=source, executor="reference", precision="fp64")
            result = patch_effects(model, prompts, sets, source=source, precision="fp64")
            assert relative_error(result.effects, reference.effects) < 1e-12
            assert seen
    seen.clear()
    patch_effects(model, prompts, [("a0.h1", "a2.k0"), ("a0.h1", "a2.v1"), at("a1.h0", -1)], source="mean")
    assert not seen


def test_the_mlp_behind_a_patched_head_reads_the_head(case, monkeypatch):
    """But where something else differs too, or where a head has few tokens."""
    from subcircuit.engine.patching import delta

    model, prompts = case
    seen, original = [], delta.head_pre
    monkeypatch.setattr(delta, "head_pre", lambda *args: seen.append(1) or original(*args))
    for above in [(), ("m0",), ("m0.n3",), ("r1",), ("a1.q0", "a1.h2", "a2.k1")]:
        for source in ("mean", "zero"):
            sets, seen[:] = [(f"a0.h{head}", *above) for head in (0, 2, 3, 2)], []
            reference = patch_effects(model, prompts, sets, source=source, executor="reference", precision="fp64")
            result = patch_effects(model, prompts, sets, source=source, precision="fp64")
            assert relative_error(result.effects, reference.effects) < 1e-12
            assert seen or above == ("m0",)
    seen.clear()
    for sets in ([("a0.h1", "a0.q1")], [("a0.h1", "r0")], [("a0.h1", "a0.h2")], [at("a0.h1", 1)], ["a2.h0"]):
        patch_effects(model, prompts, sets, source="mean")
    session = DeltaSession(model, prompts, source="mean")
    session.effects(["a1.h1"], base=as_patch_set("a0.h0"))
    assert len(seen) == 1 + model.config.gated_mlp  # for the base itself


def test_positions_that_attention_has_not_reached_are_not_computed(case, monkeypatch):
    model, prompts = case
    seen = positions_of_norms(monkeypatch)
    patch_effects(model, prompts, [at("a0.h0", 5)])
    # The MLP of the head's own layer, queries, keys and values of the next, and its MLP, at which all may differ.
    assert seen[:3] == [1, 1, 9 - 5]


def test_corrupted_patches_before_the_first_difference_cost_nothing_and_change_nothing(case, monkeypatch):
    from subcircuit.engine.patching.delta import DeltaRun

    model, prompts = case
    monkeypatch.setattr(DeltaRun, "_block", lambda *_: pytest.fail("a layer was computed"))
    effects = patch_effects(model, prompts, [at("a0.h0", 0, 2)]).effects
    assert torch.equal(effects, torch.zeros_like(effects))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_that_take_away_nearly_all_of_a_residual_stream_are_full_forwards(case, precision):
    model, prompts = case
    clean = model.run_with_cache(prompts.clean)[1]
    name = "blocks.1.hook_resid_pre"
    tiny, near = ({name: factor * clean[name]} for factor in (1e-3, 0.9))
    result = patch_effects(model, prompts, ["r1"], source=tiny, precision=precision)
    assert (result.n_full, result.n_precise) == (len(prompts.clean), 0)
    reference = patch_effects(model, prompts, ["r1"], source=tiny, executor="reference", precision="fp64").effects
    assert relative_error(result.effects, reference) < TOLERANCE["fp32"]
    assert patch_effects(model, prompts, ["r1"], source=near, precision=precision).n_full == 0


def test_rows_with_a_large_difference_are_computed_in_float32(case):
    model, prompts = case
    clean = model.run_with_cache(prompts.clean)[1]
    name = "blocks.1.hook_mlp_out"
    # As large as the stream that the layer leaves, in another direction; and small beside it.
    far = {name: clean[name] + clean["blocks.1.hook_resid_post"].roll(1, -1)}
    near = {name: clean[name] + 0.01 * clean["blocks.1.hook_resid_post"].roll(1, -1)}
    result = patch_effects(model, prompts, ["m1"], source=far, precision="bf16")
    assert (result.n_precise, result.n_full) == (len(prompts.clean), 0)
    reference = patch_effects(model, prompts, ["m1"], source=far, executor="reference", precision="fp64").effects
    assert relative_error(result.effects, reference) < TOLERANCE["fp32"]
    assert patch_effects(model, prompts, ["m1"], source=near, precision="bf16").n_precise == 0
    assert patch_effects(model, prompts, ["m1"], source=far, precision="fp32").n_precise == 0
