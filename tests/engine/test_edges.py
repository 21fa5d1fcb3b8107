"""Removed edges and paths in delta form against full forwards with hooks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from patching_cases import CONFIGS, RandomPrompts, random_model, random_prompts, relative_error
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Patch, Site, data_session, patch_effects
from subcircuit.engine.patching.edge_delta import EdgeRun, EdgeSet
from subcircuit.engine.patching.edge_session import EdgeSession
from subcircuit.engine.patching.edges import edge_effects, path_effects
from subcircuit.engine.patching.graph import INPUT, LOGITS, edges, receivers, senders_to
from subcircuit.engine.patching.sites import as_patch_set

SEED = random.randrange(10**6)
ROUNDING_SEED = 0
"""What bfloat16 loses differs from model to model: the tests of it have the same ones each time."""
SOURCES = ["corrupted", "mean", "zero"]
TOLERANCE = {"corrupted": 1e-10, "mean": 1e-10, "zero": 1e-9}
"""With zeros little may be left of a residual stream, and its sum has lost a digit then."""
FREEZES = ["heads", "heads+mlps", "none"]
NODES = as_patch_set(["a0.h1", "m0", "a1.h0", "a1.h3", "a2.h2"])


@pytest.fixture(params=CONFIGS)
def case(request):
    print(f"seed {SEED}")
    return random_model(CONFIGS[request.param], SEED), random_prompts(SEED + 1)


@pytest.fixture(params=CONFIGS)
def rounding_case(request):
    return random_model(CONFIGS[request.param], ROUNDING_SEED), random_prompts(ROUNDING_SEED + 1)


@pytest.fixture
def rng():
    return random.Random(SEED)


def edges_of_every_kind(config, rng, n=2):
    """Some edges of every receiver of every layer, the embeddings' always among them."""
    return [
        (sender, receiver)
        for receiver in receivers(config)
        for sender in {INPUT, *rng.sample(senders_to(receiver, config), min(n, len(senders_to(receiver, config))))}
    ]


def random_sets(config, rng, n):
    """Sets from a single edge to all of them, and some that patch nodes as well."""
    everything = edges(config)
    sizes = [rng.choice([1, 5, 40, len(everything) // 2, len(everything)]) for _ in range(n)]
    nodes = [(), (), as_patch_set(["a1.h2", "m1"]), as_patch_set(["a0.k1", "a2.q0", "r1"])]
    return [EdgeSet(tuple(rng.sample(everything, size)), rng.choice(nodes)) for size in sizes]


@pytest.mark.parametrize("source", SOURCES)
def test_single_edges_equal_full_forwards(case, source, rng):
    model, prompts = case
    single = edges_of_every_kind(model.config, rng)
    reference = edge_effects(model, prompts, single, source=source, executor="reference", precision="fp64")
    result = edge_effects(model, prompts, single, source=source, precision="fp64")
    assert relative_error(result.effects, reference.effects) < TOLERANCE[source]
    assert relative_error(result.clean_metric, reference.clean_metric) < 1e-12
    assert (reference.effects.abs().sum(1) > 0).sum() > len(single) / 2


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("base", [EdgeSet(), EdgeSet((), NODES), EdgeSet((("a0.h0", "a1.k1"), (INPUT, LOGITS)), NODES)])
def test_many_edges_at_once_equal_full_forwards(case, source, base, rng):
    model, prompts = case
    sets = [*random_sets(model.config, rng, 12), EdgeSet()]
    options = {"source": source, "base": base, "precision": "fp64"}
    reference = edge_effects(model, prompts, sets, executor="reference", **options)
    result = edge_effects(model, prompts, sets, **options)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[source]


@pytest.mark.parametrize("metric", ["log_probability", "kl"])
@pytest.mark.parametrize("source", ["corrupted", "mean"])
def test_edges_and_paths_on_other_metrics_equal_full_forwards(case, source, metric, rng):
    model, prompts = case
    single = edges_of_every_kind(model.config, rng, 1)
    options = {"source": source, "metric": metric, "precision": "fp64"}
    sets = [*single, *random_sets(model.config, rng, 6), EdgeSet()]
    base = EdgeSet((("a0.h0", "a1.k1"), (INPUT, LOGITS)), NODES)
    for run, what, more in (
        (edge_effects, sets, {"base": base}),
        (path_effects, single, {"base": NODES, "freeze": "heads"}),
    ):
        reference = run(model, prompts, what, executor="reference", **options, **more)
        result = run(model, prompts, what, **options, **more)
        assert relative_error(result.effects, reference.effects) < 1e-9
        torch.testing.assert_close(result.clean_metric, reference.clean_metric, rtol=1e-10, atol=1e-12)


def test_an_effect_on_the_kl_is_what_the_logits_say(case):
    """One edge into the logits, by hand: the head's corrupted output in place of its own."""
    model, prompts = case
    model = model.double()
    name = "blocks.1.attn.hook_z"
    clean, corrupted = (
        model.run_with_cache(tokens, [name])[1][name][:, -1, 2] @ model.W_O[1, 2]
        for tokens in (prompts.clean, prompts.corrupted)
    )
    resid = model(prompts.clean, stop_at_layer=model.config.n_layers)[:, -1]
    log_p, log_q = (model.unembed_normed(stream).log_softmax(-1) for stream in (resid, resid + corrupted - clean))
    result = edge_effects(model, prompts, [("a1.h2", LOGITS)], metric="kl", precision="fp64")
    torch.testing.assert_close(result.effects[0], (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-8, atol=1e-12)
    assert result.effects.min() > 0


def test_removing_all_edges_of_a_head_is_patching_it(case):
    model, prompts = case
    heads = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    nodes = [*heads, "m0", "m1", "m2"]
    sets = [[edge for edge in edges(model.config) if edge[0] == node] for node in nodes]
    for source in SOURCES:
        patched = patch_effects(model, prompts, nodes, source=source, executor="reference", precision="fp64")
        result = edge_effects(model, prompts, sets, source=source, precision="fp64")
        assert relative_error(result.effects, patched.effects) < TOLERANCE[source]


def test_removing_all_edges_to_corrupted_senders_leaves_the_corrupted_run(case):
    model, prompts = case
    corrupted = RandomPrompts(prompts.corrupted, prompts.corrupted, prompts.answer, prompts.wrong)
    there = patch_effects(model, corrupted, [()], precision="fp64").clean_metric
    result = edge_effects(model, prompts, [edges(model.config)], precision="fp64")
    assert relative_error(result.effects[0] + result.clean_metric, there) < 1e-10


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("base", [(), NODES])
def test_paths_equal_full_forwards(case, source, freeze, base, rng):
    model, prompts = case
    paths = edges_of_every_kind(model.config, rng, 1)
    rng.shuffle(paths)
    options = {"source": source, "freeze": freeze, "base": base, "precision": "fp64"}
    reference = path_effects(model, prompts, paths, executor="reference", **options)
    result = path_effects(model, prompts, paths, **options)
    assert relative_error(result.effects, reference.effects) < TOLERANCE[source]


def test_a_path_of_the_direct_edge_alone_is_the_edge_removed(case):
    model, prompts = case
    everything = edges(model.config)
    removed = edge_effects(model, prompts, everything, base=EdgeSet((), NODES), precision="fp64")
    direct = path_effects(model, prompts, everything, freeze="heads+mlps", base=NODES, precision="fp64")
    assert relative_error(direct.effects, removed.effects) < 1e-10


def test_what_is_frozen_on_the_way_makes_a_difference(case):
    model, prompts = case
    path = [("a0.h0", "a2.q1")]
    found = [path_effects(model, prompts, path, source="zero", freeze=f, precision="fp64").effects for f in FREEZES]
    for one, other in itertools.combinations(found, 2):
        assert relative_error(one, other) > 1e-3


def test_every_path_from_a_sender_to_the_logits_is_patching_it(case):
    model, prompts = case
    nodes = ["a0.h0", "a1.h3", "a2.h1", "m0", "m2"]
    patched = patch_effects(model, prompts, nodes, source="mean", precision="fp64")
    paths = path_effects(
        model, prompts, [(node, LOGITS) for node in nodes], source="mean", freeze="none", precision="fp64"
    )
    assert relative_error(paths.effects, patched.effects) < 1e-10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_precision_stays_close(case, precision, rng):
    model, prompts = case
    single, sets = edges_of_every_kind(model.config, rng), random_sets(model.config, rng, 8)
    tolerance = {"fp32": 1e-4, "bf16": 1e-2}[precision]
    for chosen in (single, sets):
        exact = edge_effects(model, prompts, chosen, precision="fp64").effects
        assert relative_error(edge_effects(model, prompts, chosen, precision=precision).effects, exact) < tolerance
    exact = path_effects(model, prompts, single, precision="fp64").effects
    assert relative_error(path_effects(model, prompts, single, precision=precision).effects, exact) < tolerance


CALLS = {
    "edges": edge_effects,
    "paths": partial(path_effects, freeze="heads"),
    "all paths": partial(path_effects, freeze="none"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_rows_with_a_large_difference_are_computed_in_float32(rounding_case, source, call, monkeypatch):
    model, prompts = rounding_case
    single = edges_of_every_kind(model.config, random.Random(ROUNDING_SEED))
    exact = call(model, prompts, single, source=source, executor="reference", precision="fp64").effects
    now = call(model, prompts, single, source=source, precision="bf16")
    monkeypatch.setattr(data_session, "LARGE_DELTA", float("inf"))
    before = call(model, prompts, single, source=source, precision="bf16")
    assert (before.n_precise, before.n_full) == (0, now.n_full)
    repeated = (now.effects != before.effects).any(1)
    assert 0 < len(prompts.clean) * repeated.sum() <= now.n_precise < exact.numel()
    assert relative_error(now.effects, exact) < 1e-2
    of_some_size = repeated & (exact.norm(dim=1) > 0.01 * exact.norm() / len(single) ** 0.5)
    errors = [((found.effects - exact).norm(dim=1) / exact.norm(dim=1))[of_some_size].max() for found in (now, before)]
    assert errors[0] < min(1e-3, errors[1] / 10)


@pytest.mark.parametrize("call", [edge_effects, path_effects])
def test_bfloat16_stays_below_one_percent_where_large_differences_would_not(call, monkeypatch):
    """Weights so large that little is linear in models of eight layers."""
    early = [(INPUT, "a0.v0"), (INPUT, "a0.q1"), (INPUT, "m0"), ("m0", "m1"), ("m0", "a1.v0"), ("m0", "m3")]
    errors = {"now": [], "before": []}
    for seed in range(ROUNDING_SEED, ROUNDING_SEED + 3):
        model = random_model(replace(CONFIGS["llama-gqa"], n_layers=8), seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 2
        prompts = random_prompts(seed + 1)
        exact = call(model, prompts, early, source="zero", executor="reference", precision="fp64").effects
        for name, limit in (("now", data_session.LARGE_DELTA), ("before", float("inf"))):
            with monkeypatch.context() as patched:
                patched.setattr(data_session, "LARGE_DELTA", limit)
                result = call(model, prompts, early, source="zero", precision="bf16")
            assert (result.n_precise > 0) == (name == "now")
            errors[name].append(relative_error(result.effects, exact))
    assert max(errors["now"]) < 1e-2 < max(errors["before"])


def test_rows_on_a_base_are_computed_in_float32(rounding_case):
    """They differ by less than the base changes, of which bfloat16 would round away a part of that size."""
    model, prompts = rounding_case
    single = [(INPUT, "m1"), ("m0", "m2"), ("a1.h0", LOGITS), ("a0.h3", "a1.v1")]
    cut = EdgeSet((("a0.h0", "a1.k1"), ("m1", LOGITS)), NODES)
    for call, base in ((edge_effects, cut), (path_effects, NODES)):
        exact = call(model, prompts, single, base=base, executor="reference", precision="fp64").effects
        result = call(model, prompts, single, base=base, precision="bf16")
        assert (result.n_precise, result.n_full) == (exact.numel(), 0)
        assert relative_error(result.effects, exact) < 1e-4
        assert relative_error(result.effects.diff(dim=0), exact.diff(dim=0)) < 1e-3


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_paths_that_leave_nothing_of_a_residual_stream_are_full_forwards(precision):
    """Without its embeddings the stream is 0, and the rounding error that a sum leaves of it grows layer by layer."""
    print(f"seed {SEED}")
    model = random_model(replace(CONFIGS["llama-gqa"], n_layers=8), SEED)
    prompts, paths = random_prompts(SEED + 1), [(INPUT, "m4"), (INPUT, LOGITS)]
    options = {"source": "zero", "freeze": "none"}
    exact = path_effects(model, prompts, paths, executor="reference", precision="fp64", **options).effects
    result = path_effects(model, prompts, [*paths, ("a7.h0", LOGITS)], precision=precision, **options)
    assert (result.n_full, result.n_precise) == (2 * len(prompts.clean), 0)
    assert relative_error(result.effects[:2], exact) < {"fp64": 1e-12}.get(precision, 1e-4)


def test_chunks_of_prompts_and_rows_change_nothing(case, rng):
    model, prompts = case
    sets = [*random_sets(model.config, rng, 5), *rng.sample(edges(model.config), 20)]
    for source in ("corrupted", "mean"):
        options = {"source": source, "base": EdgeSet((("a0.h0", "a1.v1"),), NODES), "precision": "fp64"}
        whole, pieces = (edge_effects(model, prompts, sets, budget_bytes=n, **options) for n in (None, 60_000))
        assert relative_error(pieces.effects, whole.effects) < 1e-12
    paths = rng.sample(edges(model.config), 30)
    whole, pieces = (path_effects(model, prompts, paths, precision="fp64", budget_bytes=n) for n in (None, 60_000))
    assert relative_error(pieces.effects, whole.effects) < 1e-12


def test_a_session_serves_changing_bases(case, rng):
    model, prompts = case
    session = EdgeSession(model, prompts, source="mean", precision="fp64")
    for removed, nodes in ([("a0.h0", "m1")], NODES), ([], NODES[:2]), ([("m1", LOGITS), (INPUT, "a1.q0")], ()):
        base = EdgeSet(tuple(removed), nodes)
        sets = random_sets(model.config, rng, 4)
        reference = edge_effects(model, prompts, sets, source="mean", base=base, executor="reference", precision="fp64")
        assert relative_error(session.edge_effects(sets, base).effects, reference.effects) < 1e-10


@pytest.mark.parametrize("effects", [edge_effects, path_effects])
def test_effects_of_full_forwards_in_bfloat16_are_float32_as_those_of_patches_are(case, effects):
    model, prompts = case
    result = effects(model, prompts, [("a0.h0", "m1")], executor="reference", precision="bf16")
    assert result.effects.dtype == result.clean_metric.dtype == torch.float32


def test_bases_may_hold_tensors(case, rng):
    model, prompts = case
    session = EdgeSession(model, prompts, precision="fp64")
    removed = [("a0.h0", "a1.v1"), ("m0", LOGITS)]
    for _ in range(2):
        tokens = torch.randint(0, model.config.d_vocab, (1, prompts.clean.shape[1]))
        values = model.double().run_with_cache(tokens, ["*.hook_z"])[1]
        base = EdgeSet((), (Patch(Site.of("a0.h1"), values), Patch(Site.of("a2.h3"), values)))
        reference = edge_effects(model, prompts, removed, base=base, executor="reference", precision="fp64")
        assert relative_error(session.edge_effects(removed, base).effects, reference.effects) < 1e-10


def test_rows_start_at_their_first_receiver(case, monkeypatch):
    model, prompts = case
    layers = []
    original = EdgeRun._layer
    monkeypatch.setattr(
        EdgeRun, "_layer", lambda self, layer, *rest: layers.append(layer) or original(self, layer, *rest)
    )
    session = EdgeSession(model, prompts)
    session.edge_effects([("a0.h0", "a2.q0")])
    assert layers == [0, 1, 2, 2]  # the base alone, kept from now on, and the row
    session.edge_effects([("a0.h0", "m1"), ("a0.h0", LOGITS)])
    assert layers[4:] == [1, 2]


def test_what_does_not_exist_is_named(case):
    model, prompts = case
    for executor in ("torch", "reference"):
        for edge, words in [
            (("a2.h0", "a1.q0"), "edge 'a2.h0' -> 'a1.q0' does not exist"),
            (("a0.h9", "m1"), "edge 'a0.h9' -> 'm1' does not exist"),
            (("a0.h0", "a9.q0"), "'a9.q0' does not exist: the model has layers 0 to 2"),
            (("a0.h0", "a1.h0"), "'a1.h0' reads nothing"),
            (("a0.h0", "foo"), "'foo' reads nothing; expected a7.q1, a7.k1, a7.v1, m7 or logits"),
        ]:
            for effects in (edge_effects, path_effects):
                with pytest.raises(PatchError, match=words) as caught:
                    effects(model, prompts, [edge], executor=executor)
                assert "\n" not in str(caught.value)
        with pytest.raises(PatchError, match="freeze 'mlps' is not known"):
            path_effects(model, prompts, [(INPUT, "m0")], freeze="mlps", executor=executor)
        with pytest.raises(PatchError, match="source 'median' is not known"):
            edge_effects(model, prompts, [(INPUT, "m0")], source="median", executor=executor)
        base = EdgeSet((), as_patch_set("a7.h0"))
        with pytest.raises(PatchError, match=r"'a7\.h0' does not exist"):
            edge_effects(model, prompts, [(INPUT, "m0")], base=base, executor=executor)
    with pytest.raises(PatchError, match="executor 'cuda' is not known"):
        edge_effects(model, prompts, [(INPUT, "m0")], executor="cuda")
