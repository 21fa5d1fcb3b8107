"""Effects on every metric: the definitions, and the delta form against full forwards."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_prompts, relative_error
from subcircuit.analysis import metrics
from subcircuit.analysis.nodes import all_nodes
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import DeltaSession, Patch, Site, patch_effects
from subcircuit.engine.patching.delta import DeltaRun
from subcircuit.engine.patching.metric import METRICS, MetricReadout, measure
from subcircuit.engine.patching.sites import as_patch_set
from subcircuit.kernels.backend import triton_runs_on

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = random.randrange(10**6)
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 3e-2}
"""A KL is of the square of δ's size, and so has twice its relative error."""
SITES = ["a0.h0", "a0.h3", "a1.h2", "a2.h1", "a2.q0", "a1.k1", "a0.v1", "m0", "m1", "m2", "m1.n3", "r1"]
SETS = [*SITES, ("a0.h1", "m1", "a2.h3"), ("a1.h0", "a1.h1"), ()]
every_metric = pytest.mark.parametrize("metric", METRICS)
new_metrics = pytest.mark.parametrize("metric", METRICS[1:])


@pytest.fixture(params=CONFIGS)
def case(request):
    """Prompts with one to three answers, of which the model gives some."""
    print(f"seed {SEED}")
    model, prompts = random_model(CONFIGS[request.param], SEED), random_prompts(SEED + 1)
    top = model(prompts.clean)[:, -1].argmax(-1)
    answers = torch.stack((top, prompts.answer, prompts.answer), 1)
    answers[3:, 0] = prompts.answer[3:]
    answers[:, 2] = (answers[:, 2] + 5) % 50
    answers[::2, 2] = -1
    return model, SimpleNamespace(**vars(prompts), answers=answers, wrongs=prompts.wrong[:, None])


def test_the_definitions_are_those_of_the_metrics_of_logits(case):
    _, prompts = case
    clean, logits = torch.randn(2, 5, 50, dtype=torch.float64)
    inputs = logits, clean, prompts.answers, prompts.wrongs
    expected = {
        "logit_difference": metrics.logit_difference(logits, prompts.answers, prompts.wrongs),
        "log_probability": metrics.log_probability(logits, prompts.answers),
        "kl": metrics.kl_divergence(logits, clean),
        "accuracy": metrics.is_top(logits, prompts.answers).double(),
    }
    for metric in METRICS:
        torch.testing.assert_close(measure(*inputs, metric), expected[metric])


@new_metrics
@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_effects_equal_full_forwards(case, source, precision, metric):
    model, prompts = case
    given = {"source": source, "metric": metric}
    reference = patch_effects(model, prompts, SETS, executor="reference", precision="fp64", **given)
    result = patch_effects(model, prompts, SETS, precision=precision, **given)
    if metric == "accuracy":
        # Zeros for the whole residual stream of a model without biases: all logits are 0, and no token is likeliest.
        rows = [i for i, patched in enumerate(SETS) if patched != "r1"]
        differ = (result.effects[rows] != reference.effects[rows]).double().mean()
        assert differ <= (0.05 if precision == "bf16" else 0)  # of two tokens nearly alike, δ's rounding decides
    else:
        assert relative_error(result.effects, reference.effects) < TOLERANCE[precision]
    torch.testing.assert_close(result.clean_metric.double(), reference.clean_metric, rtol=1e-5, atol=1e-6)


@every_metric
def test_effects_are_what_the_metrics_of_logits_change_by(case, metric):
    model, prompts = case
    double = model.double()

    def without_head(value, name):
        value = value.clone()
        value[:, :, 1] = 0
        return value

    clean = double(prompts.clean)[:, -1]
    patched = double.run_with_hooks(prompts.clean, [("blocks.1.attn.hook_z", without_head)])[:, -1]
    before, after = (measure(x, clean, prompts.answers, prompts.wrongs, metric) for x in (clean, patched))
    for executor in ("torch", "reference"):
        options = {"source": "zero", "executor": executor, "precision": "fp64", "metric": metric}
        result = patch_effects(double, prompts, ["a1.h1"], **options)
        torch.testing.assert_close(result.effects[0], after - before, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(result.clean_metric, before, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("executor", ["torch", "reference"])
@pytest.mark.parametrize("source", ["corrupted", "zero"])
def test_several_metrics_of_the_same_rows_are_each_as_if_alone(case, executor, source):
    model, prompts = case
    options = {"source": source, "executor": executor}
    together = patch_effects(model, prompts, SETS, metric=METRICS, **options)
    assert together.effects.shape == (len(SETS), len(prompts.clean), len(METRICS))
    for i, metric in enumerate(METRICS):
        alone = patch_effects(model, prompts, SETS, metric=metric, **options)
        torch.testing.assert_close(together.effects[..., i], alone.effects)
        torch.testing.assert_close(together.clean_metric[..., i], alone.clean_metric)
    with pytest.raises(PatchError, match="metric 'bleu' is not known"):
        patch_effects(model, prompts, SETS, metric=("kl", "bleu"), **options)


def test_what_effects_can_be(case):
    model, prompts = case
    kl, accuracy = (patch_effects(model, prompts, SETS, source="zero", metric=name) for name in ("kl", "accuracy"))
    assert (kl.effects[:-1] > 0).any()
    assert (kl.effects >= 0).all()
    assert not kl.clean_metric.any()
    assert set(accuracy.effects.unique().tolist()) <= {-1, 0, 1}
    assert (accuracy.clean_metric[:3] == 1).all()
    # The residual stream turned round: the likeliest token becomes an unlikely one.
    turned = {"blocks.2.hook_resid_pre": -20 * model.run_with_cache(prompts.clean)[1]["blocks.2.hook_resid_pre"]}
    assert (patch_effects(model, prompts, ["r2"], source=turned, metric="accuracy").effects < 0).any()
    assert not kl.effects[-1].any()  # nothing patched
    assert not accuracy.effects[-1].any()


@new_metrics
def test_chunks_and_a_base_change_nothing(case, metric):
    model, prompts = case
    base = (Patch(Site.of("a0.h2")), Patch(Site.of("m1")))
    sets = [("a1.h1",), ("a0.h0", "m2"), ()]
    whole = [(*base, *map(Patch.of, patch_set)) for patch_set in sets]
    given = {"source": "mean", "precision": "fp64", "metric": metric}
    reference = patch_effects(model, prompts, whole, executor="reference", **given)
    for budget in (None, 60_000):
        session = DeltaSession(model, prompts, budget_bytes=budget, **given)
        effects = session.effects(sets, base=base).effects
        torch.testing.assert_close(effects, reference.effects, rtol=1e-9, atol=1e-12)


@new_metrics
def test_rows_that_are_run_as_full_forwards_have_the_same_metric(case, metric):
    model, prompts = case
    name = "blocks.1.hook_resid_pre"
    tiny = {name: 1e-3 * model.run_with_cache(prompts.clean)[1][name]}
    result = patch_effects(model, prompts, ["r1"], source=tiny, metric=metric)
    assert result.n_full == len(prompts.clean)
    given = {"source": tiny, "executor": "reference", "precision": "fp64", "metric": metric}
    expected = patch_effects(model, prompts, ["r1"], **given).effects
    torch.testing.assert_close(result.effects.double(), expected, rtol=1e-4, atol=1e-5)


@new_metrics
@pytest.mark.parametrize(("variant", "precision"), [("gpt2", "fp32"), ("llama-gqa", "bf16")])
@pytest.mark.skipif(
    not triton_runs_on(DEVICE), reason="Triton is not installed, or has neither a GPU nor its interpreter"
)
def test_the_triton_executor_equals_full_forwards(variant, precision, metric):
    model = random_model(replace(CONFIGS[variant], n_layers=2), SEED).to(DEVICE)
    prompts, sets = random_prompts(SEED + 1, n_prompts=2, n_pos=7), ["a1.h2", "m0", ("a1.h1", "m1")]
    reference = patch_effects(model, prompts, sets, executor="reference", precision="fp64", metric=metric)
    result = patch_effects(model, prompts, sets, executor="triton", precision=precision, metric=metric)
    if metric == "accuracy":
        assert (result.effects != reference.effects).sum() <= (1 if precision == "bf16" else 0)
    else:
        assert relative_error(result.effects, reference.effects) < 2 * TOLERANCE[precision]


@pytest.mark.parametrize("executor", ["torch", "reference"])
def test_a_metric_that_does_not_exist_is_named(case, executor):
    model, prompts = case
    with pytest.raises(PatchError, match="metric 'loss' is not known; expected one of logit_difference, log_prob"):
        patch_effects(model, prompts, ["a0.h0"], executor=executor, metric="loss")


@pytest.mark.parametrize("budget_bytes", [None, 60_000])
@pytest.mark.parametrize("source", ["corrupted", "mean", "zero"])
def test_rows_on_a_base_join_and_are_read_together(case, source, budget_bytes, monkeypatch):
    """Rows from every layer on, on a random base: each layer's weights and the vocabulary are fetched once for all."""
    model, prompts = case
    rng = random.Random(SEED)
    names = rng.sample([str(node) for node in all_nodes(model.config)], k=15)
    base, rest = as_patch_set(names[:5]), names[5:]
    sets = [as_patch_set(rng.sample(rest, rng.randint(1, 3))) for _ in names]
    sets += [(), as_patch_set("a0.h0")]
    passes, readings = [], []
    block, read = DeltaRun._block, MetricReadout.effects
    monkeypatch.setattr(DeltaRun, "_block", lambda run, layer, *rest: passes.append(layer) or block(run, layer, *rest))
    monkeypatch.setattr(MetricReadout, "effects", lambda *args: readings.append(1) or read(*args))
    options = {"source": source, "precision": "fp64", "metric": METRICS}
    session = DeltaSession(model, prompts, budget_bytes=budget_bytes, **options)
    found = session.effects(sets, base=base).effects
    whole = [(*base, *extra) for extra in sets]
    expected = patch_effects(model, prompts, whole, executor="reference", **options).effects
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    if budget_bytes is None:
        n_prompt_chunks, last = len(session._layout.prompt_chunks), model.config.n_layers - 1
        assert len(readings) == n_prompt_chunks
        # the base's own pass, rows that start in the last layer, two sorts of them, and all that come from below
        assert passes.count(last) <= 4 * n_prompt_chunks
