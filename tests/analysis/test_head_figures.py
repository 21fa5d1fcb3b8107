"""Profiles of heads against plain sums over a cache, and the figures of heads and lens as SVG."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_sequence_task
from subcircuit.analysis.attribution import attribution
from subcircuit.analysis.head_figures import attention_figure, ov_figure, roles_figure, token_texts
from subcircuit.analysis.head_lookups import UNNAMED, head_lookups, lookup_tables
from subcircuit.analysis.head_profile import head_profiles, mean_profile, ov_shares
from subcircuit.analysis.heads import head_roles
from subcircuit.analysis.lens import lens
from subcircuit.analysis.lens_figures import attribution_figure, lens_figure, top_tokens_figure
from subcircuit.analysis.statistics import bootstrap_mean
from subcircuit.analysis.tasks import Task

SEED = random.randrange(10**6)
MEMBERS = (2, 4, 6)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """A model in float64, a task, and what its heads do in it."""
    print(f"seed {SEED}")
    model, task = random_model(CONFIGS[request.param], SEED).double(), random_sequence_task(SEED + 1)
    return model, task, head_roles(model, task, seed=SEED)


def texts_of(svg: str) -> list[str]:
    """What a figure says; that it can be parsed comes with it."""
    return [text for node in ElementTree.fromstring(svg).iter() if (text := (node.text or "").strip())]


def test_a_profile_is_what_a_plain_loop_over_prompts_finds(case):
    model, task, found = case
    _, cache = model.run_with_cache(task.clean)
    config = model.config
    resid = model(task.clean, stop_at_layer=1)
    for row in head_profiles(found, [(0, 1), (2, 3)]):
        layer, head = row["layer"], row["index"]
        pattern = cache["pattern", layer][:, head].mean(0)
        assert row["to_previous_members"] == pytest.approx([float(pattern[4, 2]), float(pattern[6, 4])])
        assert row["to_previous_member"] == pytest.approx(float(pattern[4, 2] + pattern[6, 4]) / 2)
        assert row["last_to_newest"] == pytest.approx(float(pattern[8, 6]))
        assert row["last_to_members"] == pytest.approx(float(pattern[8, 2] + pattern[8, 4] + pattern[8, 6]))
        attn, x = model.blocks[layer].attn, model.blocks[1].ln1(resid)
        logits = model.unembed_normed(x @ attn.W_V[head // config.group_size] @ attn.W_O[head])
        chain = [[*(int(task.clean[i, at]) for at in MEMBERS), int(task.answer[i])] for i in range(task.n)]
        for name, shift in (("previous", -1), ("copy", 0), ("next", 1), ("+2", 2), ("+3", 3)):
            hits = [
                chain[i][j + shift] in logits[i, at].topk(5).indices.tolist()
                for i in range(task.n)
                for j, at in enumerate(MEMBERS)
                if 0 <= j + shift < 4
            ]
            assert row["ov"][name] == pytest.approx(sum(hits) / len(hits))
        bottom = (-logits).topk(5).indices.tolist()
        lowest = [chain[i][j] in bottom[i][at] for i in range(task.n) for j, at in enumerate(MEMBERS)]
        assert row["ov_anti_copy"] == pytest.approx(sum(lowest) / len(lowest))
        terms, labels = cache.logit_attribution(task.answer, task.wrong, by_head=True)
        assert row["direct"] == pytest.approx(float(terms[labels.index(f"a{layer}.h{head}")].mean()))


def test_the_mean_of_all_heads_is_that_of_their_profiles(case):
    _, _, found = case
    config = found.config
    every = head_profiles(found, [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)])
    mean = mean_profile(found)
    assert mean["n_heads"] == len(every)
    for name in ("to_previous_member", "last_to_newest", "last_to_members", "ov_anti_copy", "qk_similar", "direct"):
        assert mean[name] == pytest.approx(sum(row[name] for row in every) / len(every))
    for name, share in mean["ov"].items():
        assert share == pytest.approx(sum(row["ov"][name] for row in every) / len(every))
    assert mean["direct_low"] < mean["direct"] < mean["direct_high"]


def test_look_ups_are_means_over_prompts_with_their_intervals(case):
    model, task, found = case
    _, cache = model.run_with_cache(task.clean)
    heads = [(2, 3), (0, 1)]
    rows = {(row["head"], row["from"], row["to"]): row for row in head_lookups(model, task, heads, seed=SEED)}
    names = list(found.lookups.classes)
    for layer, head in heads:
        name, pattern = f"a{layer}.h{head}", cache["pattern", layer][:, head]
        others = [[sum(float(row[q, k]) for k in MEMBERS if k != q) for q in MEMBERS] for row in pattern]
        expected = {
            ("members", "members"): torch.tensor(others).double().mean(1),
            ("member 3", "member 2"): pattern[:, 6, 4],
            ("last token", "newest member"): pattern[:, 8, 6],
        }
        for (query, key), values in expected.items():
            row = rows[name, query, key]
            wanted = bootstrap_mean(values, seed=SEED).at()
            assert [row["attention"], row["low"], row["high"]] == pytest.approx(wanted, abs=1e-6)
        for query in names:
            found_mass = [rows[name, query, key]["attention"] for key in found.lookups.columns]
            assert found_mass == pytest.approx(found.lookups.mass[layer, head, names.index(query)].tolist())
    by_class, by_member = lookup_tables(list(rows.values()))
    assert by_class[0] == ["head", "from", *(f"→ {key}" for key in found.lookups.columns)]
    assert by_class[1][0][:2] == ["a2.h3", next(name for name in names if name not in UNNAMED)]
    assert by_member[0][1:] == ["member 2 → member 1", "member 3 → member 2", "last token → newest member"]
    assert [row[0] for row in by_member[1]] == ["a2.h3", "a0.h1"]
    row = rows["a0.h1", "last token", "newest member"]
    assert by_member[1][1][-1] == f"{row['attention']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    assert head_lookups(model, task, []) == []
    assert lookup_tables([]) == []


def test_a_task_without_members_has_a_profile_without_them(case):
    model, task, _ = case
    bare = Task("bare", task.clean, None, task.answer, task.wrong, positions={"last": (8,)})
    found = head_roles(model, bare, seed=SEED)
    (row,) = head_profiles(found, [(1, 2)])
    assert row["to_previous_members"] == []
    assert (row["to_previous_member"], row["last_to_newest"], row["qk_last"], row["ov"]) == (None, None, None, {})
    assert ov_shares(found) == {}
    assert "bare" in texts_of(ov_figure(found, "bare"))


def test_attention_is_drawn_with_the_first_prompts_tokens(case):
    _, task, found = case
    tokens = token_texts(task.clean[0].tolist(), None)
    svg = attention_figure(found.lookups.pattern[1, 2], tokens, "attention of 1.2")
    said = texts_of(svg)
    assert "attention of 1.2" in said
    for token in set(tokens):
        assert said.count(token) >= 2, "beside the queries and below the keys"
    assert svg == attention_figure(found.lookups.pattern[1, 2], tokens, "attention of 1.2")


def test_labels_of_tokens_show_their_spaces():
    class Letters:
        def decode(self, ids):
            return {0: " May", 1: "\n", 2: ""}[ids[0]]

    assert token_texts([0, 1, 2], Letters()) == ["·May", "↵", "∅"]


def test_roles_are_drawn_for_the_heads_that_have_one(case):
    _, _, found = case
    heads = found.with_roles()
    said = texts_of(roles_figure({"one": found, "two_words": found}, {"one": heads, "two_words": heads}, "roles"))
    assert {"roles", "one", "two words"} <= set(said)
    for head in heads[:40]:
        assert f"{head[0]}.{head[1]}" in said
        assert set(found.of(head)) <= set(said)
    few = texts_of(roles_figure({"one": found}, {"one": []}, "roles"))
    assert not [text for text in few if "." in text]


def test_ov_bars_are_the_best_heads_first(case):
    _, _, found = case
    shares = ov_shares(found)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    written = [at for at in every if max(float(shares[name][at]) for name in ("next", "copy")) > 0]
    best = sorted(written, key=lambda at: (-float(shares["next"][at]), at))[:5]
    assert best
    said = texts_of(ov_figure(found, "writes", n_most=5, marked=[(0, 0)]))
    names = [f"{layer}.{head}" for layer, head in best]
    assert any(said[i : i + len(names)] == names for i in range(len(said)))


def test_the_lens_is_drawn_with_answer_and_rival(case):
    model, task, _ = case
    read = lens(model, task, positions="each")
    assert {"by layer", "answer", "last member", "probability", "rank"} <= set(texts_of(lens_figure(read, "by layer")))
    without = Task("bare", task.clean, None, task.answer, task.wrong)
    assert "wrong answer" in texts_of(lens_figure(lens(model, without), "by layer"))
    said = texts_of(top_tokens_figure(read, "likeliest"))
    for layer in range(3):
        assert f"layer {layer}" in said
        assert all(str(int(token)) in said for token in read.top_tokens[2 * layer + 2, 0, :, 0])


def test_direct_terms_are_drawn_the_largest_first(case):
    model, task, _ = case
    rows = attribution(model, task).table(top_neurons=3)
    said = texts_of(attribution_figure(rows, "direct", n_most=6))
    largest = sorted(rows, key=lambda row: -abs(row["direct"]))[:6]
    names = {row["component"] for row in rows}
    assert [text for text in said if text in names] == [row["component"] for row in largest]


def test_a_head_that_always_attends_to_itself_is_all_diagonal():
    svg = attention_figure(torch.eye(3, dtype=torch.float64), ["x", "y", "z"], "diagonal")
    assert texts_of(svg).count("1.00") == 3
