"""The roles that `head_roles` reads from attention, weights and effects are those that known models were given."""

from __future__ import annotations

import random

import pytest
import torch

from subcircuit.analysis.attention import N_RANDOM_PROMPTS, mean_attention, random_tokens
from subcircuit.analysis.heads import ROLES, head_roles
from subcircuit.analysis.truth import FAMILIES, truth, truth_names
from subcircuit.engine.patching import Component

SEED = random.randrange(10**6)
READ_AS = {
    "previous token": {"previous token"},
    "duplicate token": {"duplicate token"},
    # The answer's mention is what followed the last token before.
    "induction": {"induction", "answer mover"},
    "similar member": {"similar member"},
    # It brings the newest member to an MLP, which makes the next one of it: its own OV writes no member.
    "next member": {"sequence detection"},
    "S-inhibition": {"S-inhibition-like"},
    "name mover 1": {"answer mover"},
    "name mover 2": {"answer mover"},
    "negative name mover": {"negative answer mover"},
}
"""What a head of a known model is called by its measures."""
BY_EFFECT = ("answer mover", "negative answer mover")
"""Roles that need a direct effect on the answer, which no head has that is not in the circuit."""


@pytest.fixture(scope="module", params=[(name, family) for name in truth_names() for family in FAMILIES], ids="-".join)
def cases(request):
    """Two known models with what is found in each, and who should hold each role."""
    print(f"seeds {SEED}, {SEED + 1}")
    found = []
    for known in (truth(*request.param, seed=seed) for seed in (SEED, SEED + 1)):
        found.append((known, head_roles(known.model, known.task, seed=SEED), _expected(known)))
    return found


def _expected(known):
    expected = {role.name: set() for role in ROLES}
    for part, node in known.roles.items():
        for role in READ_AS.get(part, ()):
            expected[role].add(_place(node))
    return expected


def _place(node):
    component = Component.parse(node)
    return component.layer, component.index


def test_every_head_has_the_role_that_it_was_given(cases):
    for _, roles, expected in cases:
        for role, heads in expected.items():
            assert heads <= set(roles.holders(role)), role


def test_no_head_outside_the_circuit_moves_the_answer(cases):
    for _, roles, expected in cases:
        for role in BY_EFFECT:
            assert set(roles.holders(role)) == expected[role]


def test_heads_outside_the_circuit_that_attend_alike_do_so_less(cases):
    """Random weights may attend as a role says, more than chance explains, but not as much as what was built for it."""
    for known, roles, expected in cases:
        free = [_place(node) for node in (*known.distractors, *known.inert) if not node.startswith("m")]
        for role in (role for role in ROLES if expected[role.name]):
            score = roles.measures[role.needs[0][0]].score
            least = min(float(score[head]) for head in expected[role.name])
            assert max(float(score[head]) for head in free) < least, role.name


def test_a_baseline_keeps_the_token_that_begins_every_prompt():
    known = truth("successor", seed=SEED)
    task, model = known.task, known.model
    tokens = random_tokens(model, N_RANDOM_PROMPTS, task.pos, SEED, bos=int(task.clean[0, 0]))
    assert not bool((random_tokens(model, N_RANDOM_PROMPTS, task.pos, SEED)[:, 0] == tokens[:, 0]).all())
    expected = mean_attention(model, tokens)[0][:, :, -1, list(task.member_positions)].sum(-1)
    found = head_roles(model, task, seed=SEED).measures["sequence detection"].baseline
    assert torch.allclose(found, expected)
