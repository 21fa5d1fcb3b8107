"""Circuits in MIB's JSON: what EAP-IG writes, and back."""

from __future__ import annotations

import json
import random

import pytest
import torch

from engine_models import CONFIGS as SMALL
from patching_cases import CONFIGS
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.circuit_formats import from_mib, load_mib, save_mib, to_mib
from subcircuit.analysis.eap import EdgeScores
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError, StoreError
from subcircuit.engine.patching.graph import edges, n_senders_to, receivers, senders

SEED = random.randrange(10**6)
GPT2_SMALL = ModelConfig(n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024)
TINY = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, d_vocab=10, n_ctx=8)


def random_scores(config):
    print(f"seed {SEED}")
    effects = torch.randn(len(senders(config)), len(receivers(config)), generator=torch.Generator().manual_seed(SEED))
    for column, receiver in enumerate(receivers(config)):
        effects[n_senders_to(receiver, config) :, column] = float("nan")
    names = tuple(senders(config)), tuple(receivers(config))
    return EdgeScores(*names, effects, torch.zeros(1), config, {"method": "eap", "task": "t", "model": config.name})


def test_the_layout_is_the_one_that_eap_ig_writes():
    """Written down from EAP-IG's `Graph.to_json`, for a model of one layer and two heads."""
    circuit = Circuit([(0, 1)], [], edges=(("input", "a0.q1"), ("input", "a0.v1"), ("a0.h1", "logits")))
    made = to_mib(circuit, TINY)
    assert made["cfg"] == {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert made["nodes"] == {
        "input": {"in_graph": True},
        "a0.h0": {"in_graph": False},
        "a0.h1": {"in_graph": True},
        "m0": {"in_graph": False},
        "logits": {"in_graph": True},
    }
    inside, outside = {"score": 1.0, "in_graph": True}, {"score": 0.0, "in_graph": False}
    assert made["edges"] == {
        "input->a0.h0<q>": outside,
        "input->a0.h0<k>": outside,
        "input->a0.h0<v>": outside,
        "input->a0.h1<q>": inside,
        "input->a0.h1<k>": outside,
        "input->a0.h1<v>": inside,
        "input->m0": outside,
        "a0.h0->m0": outside,
        "a0.h1->m0": outside,
        "input->logits": outside,
        "a0.h0->logits": outside,
        "a0.h1->logits": inside,
        "m0->logits": outside,
    }


def test_gpt2_small_has_as_many_nodes_and_edges_as_with_eap_ig():
    made = to_mib(Circuit([], []), GPT2_SMALL)
    assert (len(made["nodes"]), len(made["edges"])) == (158, 32_491)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_circuit_and_its_scores_come_back_from_a_file(config, tmp_path):
    scores = random_scores(config)
    circuit = scores.circuit(120)
    assert circuit.edges
    save_mib(tmp_path / "c.json", circuit, config, scores)
    again, read = load_mib(tmp_path / "c.json", config, task="t", method="eap")
    assert (again.heads, again.mlps, again.task, again.method) == (circuit.heads, circuit.mlps, "t", "eap")
    assert again.edges == circuit.edges
    torch.testing.assert_close(read.effects, scores.effects.double(), equal_nan=True)
    assert read.circuit(120).edges == circuit.edges


def test_the_edge_into_a_shared_key_is_one_edge_per_head_of_its_group():
    config = SMALL["llama-gqa"]
    circuit = Circuit([(0, 2)], [], edges=(("input", "a0.k1"), ("a0.h2", "logits")))
    made = to_mib(circuit, config)
    per_layer = 3 * config.n_heads + 1
    assert len(made["edges"]) > len(edges(config))
    assert len({name.split("->")[1] for name in made["edges"]}) == config.n_layers * per_layer + 1
    assert made["edges"]["input->a0.h2<k>"] == made["edges"]["input->a0.h3<k>"] == {"score": 0.5, "in_graph": True}
    assert made["edges"]["input->a0.h1<k>"] == {"score": 0.0, "in_graph": False}
    made["edges"]["input->a0.h3<k>"]["in_graph"] = False
    assert from_mib(made, config)[0].edges == circuit.edges


def test_an_edge_that_is_not_listed_is_not_in_the_circuit():
    made = to_mib(Circuit([(0, 1)], [], edges=(("input", "a0.q1"), ("a0.h1", "logits"))), TINY)
    del made["edges"]["input->a0.h1<q>"]
    circuit, scores = from_mib(made, TINY)
    assert circuit.edges == (("a0.h1", "logits"),)
    assert (scores.of(("input", "a0.q1")), scores.n_edges) == (0, 13)


def test_what_is_not_in_the_format_is_named(tmp_path):
    good = to_mib(Circuit([], []), TINY)
    with pytest.raises(StoreError, match="missing or malformed 'cfg'"):
        from_mib({"edges": {}, "nodes": {}}, TINY)
    with pytest.raises(StoreError, match="missing or malformed 'score'"):
        from_mib({**good, "edges": {"input->m0": {"in_graph": True}}}, TINY)
    with pytest.raises(StoreError, match="'n_layers': 12.*this one has"):
        from_mib(to_mib(Circuit([], []), GPT2_SMALL), TINY)
    with pytest.raises(StoreError, match="has 'm7->logits', which this model does not"):
        from_mib({**good, "edges": {"m7->logits": {"score": 1, "in_graph": True}}}, TINY)
    with pytest.raises(StoreError, match="not a finite number"):
        from_mib({**good, "edges": {"input->m0": {"score": float("nan"), "in_graph": True}}}, TINY)
    with pytest.raises(PatchError, match="nodes but no edges"):
        to_mib(Circuit([(0, 1)], []), TINY)
    with pytest.raises(PatchError, match="'m3' -> 'logits'"):
        to_mib(Circuit([], [], edges=(("m3", "logits"),)), TINY)
    for text in ("{", json.dumps([1]), json.dumps({"cfg": 1})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(StoreError, match="bad.json: "):
            load_mib(tmp_path / "bad.json", TINY)
    with pytest.raises(StoreError, match="none.json"):
        load_mib(tmp_path / "none.json", TINY)
