"""The counts of operations against what torch counts while the sweep runs, and the bounds against their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from patching_cases import CONFIGS, random_model, random_prompts
from subcircuit.engine.patching import DeltaSession
from subcircuit.kernels.roofline import CHIPS, GPT2_SMALL, LLAMA2_7B, Cost, Model, sweep_costs, vocabulary

N_PROMPTS, N_POS = 2, 7


def sizes_of(config):
    return Model(
        "random",
        config.n_layers,
        config.d_model,
        config.n_heads,
        config.kv_heads,
        config.d_head,
        config.d_mlp,
        config.d_vocab,
        config.gated_mlp,
    )


def counted_operations(model, prompts, metric="logit_difference"):
    """Of all products of a sweep over heads, less those of the clean run, of the sources and of their readout."""
    session = DeltaSession(model, prompts, source="zero", metric=metric)
    session._backend = "torch"  # torch does not see the products in C
    sites = [f"a{layer}.h{head}" for layer in range(model.config.n_layers) for head in range(model.config.n_heads)]
    session.effects(sites)  # makes the clean run
    with FlopCounterMode(display=False) as counter:
        session.effects(sites)
    return counter.get_total_flops()


@pytest.fixture(params=CONFIGS)
def case(request, monkeypatch):
    # Zeros change a random model much: rows would be run once more as full forwards.
    monkeypatch.setattr(DeltaSession, "_to_repeat", lambda self, departures: ([], []))
    model = random_model(replace(CONFIGS[request.param], n_layers=4), 0)
    return model, random_prompts(1, n_prompts=N_PROMPTS, n_pos=N_POS)


def test_products_are_those_that_a_sweep_makes(case):
    model, prompts = case
    costs = sweep_costs(sizes_of(model.config), N_PROMPTS, N_POS).values()
    assert sum(cost.bfloat16 + cost.float32_dot for cost in costs) == counted_operations(model, prompts)


def test_a_kl_adds_the_product_with_the_unembedding(case):
    model, prompts = case
    per_row = vocabulary(sizes_of(model.config)).float32_dot
    more = counted_operations(model, prompts, "kl") - counted_operations(model, prompts)
    mean = 2 * model.config.d_model  # of the mean change of the logits
    assert more == 4 * 4 * N_PROMPTS * (per_row + mean)


def test_the_bound_is_the_unit_that_is_busy_longest():
    chip = CHIPS[0]
    assert Cost(bytes=chip.bandwidth).seconds(chip) == 1
    assert Cost(bytes=chip.bandwidth, bfloat16=chip.bfloat16 * 3).seconds(chip) == pytest.approx(3)
    assert Cost(bytes=chip.bandwidth, float32=chip.float32 * 3).bound(chip) == "float32 units"


@pytest.mark.parametrize(("model", "millions"), [(GPT2_SMALL, 85), (LLAMA2_7B, 6476)])
def test_a_token_in_all_layers_costs_two_operations_per_weight(model, millions):
    from subcircuit.kernels.roofline import attention_steps, mlp_steps

    steps = [*attention_steps(model, 1, 1), *mlp_steps(model, 1)]
    operations = model.n_layers * sum(n * cost.bfloat16 for _, n, cost in steps)
    assert operations / 2e6 == pytest.approx(millions, rel=0.01)
