"""The model as a graph of senders and receivers."""

import random

import pytest

from engine_models import CONFIGS
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.graph import (
    INPUT,
    LOGITS,
    check_edge,
    edges,
    edges_among,
    readers,
    receivers,
    senders,
    senders_to,
)
from subcircuit.engine.patching.sites import Component

GPT2_SMALL = ModelConfig(n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024)


def test_gpt2_small_has_the_graph_that_others_report():
    assert len(senders(GPT2_SMALL)) + 1 == 158  # and logits
    assert len(edges(GPT2_SMALL)) == 32_491


def test_grouped_keys_and_values_are_one_receiver_per_kv_head():
    config = CONFIGS["llama-gqa"]
    in_layer = [name for name in receivers(config) if name.startswith("a1.")]
    assert in_layer == ["a1.q0", "a1.q1", "a1.q2", "a1.q3", "a1.k0", "a1.k1", "a1.v0", "a1.v1"]


def test_an_mlp_reads_the_heads_of_its_own_layer_and_heads_do_not():
    config = CONFIGS["gpt2"]
    assert senders_to("a1.q0", config) == [INPUT, "a0.h0", "a0.h1", "a0.h2", "m0"]
    assert senders_to("m1", config)[-3:] == ["a1.h0", "a1.h1", "a1.h2"]
    assert senders_to(LOGITS, config) == senders(config)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_edges_among_nodes_are_those_whose_ends_are_there(name):
    print(f"seed {(seed := random.randrange(10**6))}")
    rng, config = random.Random(seed), CONFIGS[name]
    names = {*rng.sample([sender for sender in senders(config) if sender.startswith("a")], 5), "m1"}

    def reads(receiver):
        if receiver == LOGITS or receiver in names:
            return True
        part = Component.parse(receiver)
        group = config.n_heads // config.kv_heads if part.kind in ("k", "v") else 1
        heads = [head for head in range(config.n_heads) if head // group == part.index]
        return part.kind != "mlp" and any(f"a{part.layer}.h{head}" in names for head in heads)

    expected = [(s, r) for s, r in edges(config) if (s in names or s == INPUT) and reads(r)]
    assert edges_among(names, config) == expected


def test_a_kv_head_is_read_by_its_whole_group():
    config = CONFIGS["llama-gqa"]
    assert readers("a1.k1", config) == ["a1.h2", "a1.h3"]
    assert readers("a1.q1", config) == ["a1.h1"]
    assert readers("m2", config) == ["m2"]
    assert readers(LOGITS, config) == [LOGITS]


@pytest.mark.parametrize("edge", [("m1", "a1.q0"), ("a2.h0", "m1"), ("a0.h9", "m1"), ("a0.h0", "a1.h0"), ("m0", "r1")])
def test_an_edge_that_does_not_exist_is_named(edge):
    with pytest.raises(PatchError, match=edge[1]):
        check_edge(edge, CONFIGS["gpt2"])
