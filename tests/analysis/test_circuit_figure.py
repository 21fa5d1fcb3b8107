from __future__ import annotations

import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from patching_cases import CONFIGS
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.circuit_figure import COLOURS, circuit_figure, overlay_diagram
from subcircuit.analysis.drawing import INK, task_colour
from subcircuit.analysis.edges import edges_between

NODES = Circuit(heads=[(0, 1), (1, 0), (1, 3), (2, 2)], mlps=[0, 2])


def circuit_with_edges(config, seed=0):
    rng = random.Random(seed)
    edges = edges_between(NODES, config, from_input=True, same_layer=True)
    return replace(NODES, edges=tuple(edges), edge_scores={edge: rng.uniform(-1, 9) for edge in edges})


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def lines(svg):
    """Colour and width of every curve."""
    curves = re.findall(r'<path d="M [^"]*C [^"]*" [^>]*style="fill: none;([^"]*)"', svg)
    styles = [dict(part.split(": ") for part in style.strip("; ").split("; ")) for style in curves]
    return [(style["stroke"].upper(), float(style["stroke-width"]), "stroke-dasharray" in style) for style in styles]


def test_the_diagram_shows_every_node_and_edge(config):
    circuit = circuit_with_edges(config)
    svg = circuit_figure(circuit, "$cost$ & more", config.group_size)
    ElementTree.fromstring(svg)
    for text in ("0.1", "1.0", "1.3", "2.2", "MLP 0", "MLP 2", "input", "logits", "$cost$ &amp; more", "layer 1"):
        assert f">{text}<" in svg
    n_readers = {
        edge: len(circuit.readers(edge[1], config.group_size)) or 1 for edge in circuit.edges if edge[1][0] == "a"
    }
    drawn = lines(svg)
    assert len(drawn) == sum(n_readers.get(edge, 1) for edge in circuit.edges)
    assert {colour for colour, _, _ in drawn} == {colour.upper() for colour in COLOURS.values()}


def test_features_of_a_dictionary_are_one_box():
    features = ["r1.f3", "r1.f5", "a1.f0", "m1.f10", "m1.f20", "m1.f3"]
    svg = circuit_figure(Circuit([(0, 1)], [0], features=features), "t")
    assert all(f">{text}<" in svg for text in ("2 × r1.f", "1 × a1.f", "3 × m1.f", "0.1", "MLP 0"))


def test_width_follows_the_score_and_dashes_its_sign():
    edges = (("a0.h1", "a2.q2"), ("a0.h1", "logits"), ("m0", "m2"))
    circuit = replace(NODES, edges=edges, edge_scores=dict(zip(edges, (8.0, -4.0, 1.0), strict=True)))
    drawn = {colour: (width, dashed) for colour, width, dashed in lines(circuit_figure(circuit, "t"))}
    assert drawn[COLOURS["q"]] == (3.5, False)
    found = sorted(line[1:] for line in lines(circuit_figure(circuit, "t")))
    assert found == [(0.875, False), (2.0, True), (3.5, False)]


def test_the_same_circuit_is_the_same_file_and_no_edges_are_needed():
    assert circuit_figure(NODES, "t") == circuit_figure(NODES, "t")
    svg = circuit_figure(NODES, "t")
    assert ">2.2<" in svg
    assert ">logits<" not in svg
    assert circuit_figure(Circuit([], []), "nothing").startswith("<svg")


def test_the_graph_leads_through_queries_keys_and_values():
    edges = (("m0", "a1.k0"), ("a0.h1", "a1.q3"), ("a0.h1", "logits"))
    circuit = replace(NODES, edges=edges, edge_scores={edges[0]: 2.0, edges[1]: -1.0})
    dot = circuit.to_dot()
    assert '"m0" -> "a1.k0" [penwidth=4.00];' in dot
    assert '"a0.h1" -> "a1.q3" [penwidth=2.25];' in dot
    assert '"a0.h1" -> "logits";' in dot
    assert '"a1.k0" -> "a1.h0" [style=dotted, arrowhead=none];' in dot
    assert '"a1.k0" -> "a1.h3"' not in dot
    assert '"a1.k0" -> "a1.h3" [style=dotted, arrowhead=none];' in circuit.to_dot(group_size=4)


def test_the_overlay_shows_whose_nodes_and_edges_are(config):
    whole = circuit_with_edges(config)
    few = replace(whole, edges=whole.edges[:5], mlps=[0])
    svg = overlay_diagram({"months": whole, "number_words": few}, "both", config.group_size, n_edges=10**6)
    ElementTree.fromstring(svg)
    assert "number words: 4 heads, 1 MLP, 5 edges" in svg
    assert f"in every circuit: 5 edges; of {len(whole.edges)} in any, {len(whole.edges)} are drawn" in svg
    colours = [colour for colour, _, _ in lines(svg)]
    n_curves = {
        edge: len(whole.readers(edge[1], config.group_size)) if edge[1][0] == "a" else 1 for edge in whole.edges
    }
    assert colours.count(INK.upper()) == sum(n_curves[edge] for edge in few.edges)
    assert colours.count(task_colour(0)) == sum(n_curves[edge] for edge in whole.edges[5:])
    fewer = overlay_diagram({"months": whole, "number_words": few}, "both", config.group_size, n_edges=8)
    assert "8 are drawn" in fewer
    assert 8 <= len(lines(fewer)) < len(colours)
