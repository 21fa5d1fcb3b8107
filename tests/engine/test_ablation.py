"""Rows that each go without components of their own, against one run per row with an ordinary hook."""

from __future__ import annotations

import random

import pytest
import torch

from engine_models import CONFIGS, ToyTokenizer, random_model
from subcircuit.engine.ablation import RowAblations
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching import Component

SEED = random.randrange(10**6)
TEXTS = ["abcdefg", "k", "xyzh", "abcdefg", "pqrs", "hhh"]
"""Of unequal lengths; the first is there twice, with and without an ablation."""
ROWS = [["a0.h1", "m1", "a2.h2"], ["a1.h0", "m0"], ["a0.q1", "a1.k0", "a2.v1"], [], ["m2.n5", "m2.n6", "r1"], ["a2.g1"]]


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param], SEED, tokenizer=ToyTokenizer())


def random_values(config):
    generator = torch.Generator().manual_seed(SEED + 1)
    tails = {"hook_z": (config.n_heads, config.d_head), "hook_q": (config.n_heads, config.d_head)}
    tails |= {f"hook_{name}": (config.kv_heads, config.d_head) for name in "kv"} | {"hook_post": (config.d_mlp,)}
    values = {}
    for name in {Component.parse(part).hook_name for row in ROWS for part in row}:
        tail = tails.get(name.split(".")[-1], (config.d_model,))
        values[name] = torch.randn(1, 1, *tail, generator=generator, dtype=torch.float64)
    return values


def plain_hooks(config, row, values):
    """What one row's ablation is, a component at a time."""

    def hook(part):
        def replace(value, name):
            value = value.clone()
            stand_in = torch.zeros_like(value) if values is None else values[name].expand_as(value)
            if part.kind in ("mlp", "resid"):
                return stand_in
            for index in part.indices(config):
                value[:, :, index] = stand_in[:, :, index]
            return value

        return part.hook_name, replace

    return [hook(Component.parse(name)) for name in row]


@pytest.mark.parametrize("with_values", [False, True], ids=["zero", "values"])
def test_every_row_generates_what_it_does_alone_with_a_hook(model, with_values):
    values = random_values(model.config) if with_values else None
    together = model.generate(TEXTS, 9, hooks=RowAblations(ROWS, values).hooks(model.config))
    whole = model.generate(TEXTS, 9)
    for text, row, ids in zip(TEXTS, ROWS, together.tokens, strict=True):
        assert model.generate(text, 9, hooks=plain_hooks(model.config, row, values)).tokens == [ids]
    assert together.tokens[3] == whole.tokens[3]
    changed = [ours != theirs for ours, theirs in zip(together.tokens, whole.tokens, strict=True)]
    assert sum(changed) >= 3, "ablations are strong enough to be told from none"


def test_logits_of_every_row_equal_those_of_its_own_run(model):
    tokens = torch.randint(0, 40, (len(ROWS), 8), generator=torch.Generator().manual_seed(SEED))
    values = random_values(model.config)
    together = model.run_with_hooks(tokens, RowAblations(ROWS, values).hooks(model.config))
    for i, row in enumerate(ROWS):
        alone = model.run_with_hooks(tokens[i : i + 1], plain_hooks(model.config, row, values))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_a_bad_ablation_is_one_clear_line(model):
    with pytest.raises(PatchError, match="component 'a9.h0' does not exist"):
        RowAblations([["a9.h0"]]).hooks(model.config)
    with pytest.raises(PatchError, match="'head 3' is not understood"):
        RowAblations([["head 3"]])
    with pytest.raises(PatchError, match="no value to stand in at 'blocks.1.hook_mlp_out'"):
        RowAblations([["m1"]], {})
    with pytest.raises(PatchError, match="1 rows of ablations for a batch of 2"):
        model.generate(["ab", "c"], 2, hooks=RowAblations([["m1"]]).hooks(model.config))
