"""The model as a graph of senders and receivers."""

import pytest

from engine_models import CONFIGS
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.patching.graph import INPUT, LOGITS, check_edge, edges, receivers, senders, senders_to

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


@pytest.mark.parametrize("edge", [("m1", "a1.q0"), ("a2.h0", "m1"), ("a0.h9", "m1"), ("a0.h0", "a1.h0"), ("m0", "r1")])
def test_an_edge_that_does_not_exist_is_named(edge):
    with pytest.raises(PatchError, match=edge[1]):
        check_edge(edge, CONFIGS["gpt2"])
