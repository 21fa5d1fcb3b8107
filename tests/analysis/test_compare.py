"""Circuits of several tasks beside each other."""

from __future__ import annotations

import pytest
import torch

from patching_cases import CONFIGS, random_model, random_prompts
from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.compare import cross_task_scores, jaccard_matrix
from subcircuit.analysis.faithfulness import Ablation, score
from subcircuit.analysis.statistics import bootstrap_ratio
from subcircuit.analysis.tasks import task_from_tokens
from subcircuit.engine.errors import PatchError

SEED = 3
CIRCUITS = [
    Circuit([(0, 1), (1, 2), (2, 0)], [0, 2]),
    Circuit([(0, 1), (2, 3)], [1, 2]),
    Circuit([], []),
]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIGS["llama-gqa"], SEED)


@pytest.fixture(scope="module")
def tasks(model):
    """Two tasks that the model does: it is asked for what it says anyway."""
    made = []
    for seed in (SEED, SEED + 1):
        prompts = random_prompts(seed)
        logits = model(prompts.clean)[:, -1]
        best, worst = logits.argmax(-1), logits.argmin(-1)
        made.append(task_from_tokens(clean=prompts.clean, corrupted=prompts.corrupted, answer=best, wrong=worst))
    return made


def test_a_row_is_a_task_and_a_column_a_circuit(model, tasks):
    seen = []
    ablations = [Ablation(model, task) for task in tasks]
    table, low, high = cross_task_scores(ablations, CIRCUITS, lambda *done: seen.append(done), seed=5)
    assert table.shape == low.shape == high.shape == (2, 3)
    expected = [[score(model, task, circuit) for circuit in CIRCUITS] for task in tasks]
    assert torch.allclose(table, torch.tensor(expected, dtype=table.dtype), atol=1e-3)
    of_ratio = bootstrap_ratio(100 * ablations[1].kept_values([CIRCUITS[2].nodes])[0], ablations[1].clean, seed=5)
    assert [table[1, 2], low[1, 2], high[1, 2]] == pytest.approx(of_ratio.at(), rel=1e-4)
    assert seen == [(1, 2), (2, 2)]


def test_a_circuit_of_another_model_is_refused(model, tasks):
    with pytest.raises(PatchError, match=r"'a5\.h0' does not exist: the model has layers 0 to 2"):
        cross_task_scores([Ablation(model, tasks[0])], [Circuit([(5, 0)], [])])


def test_overlap_counts_heads_alone_or_all_nodes():
    heads, nodes = jaccard_matrix(CIRCUITS, "heads"), jaccard_matrix(CIRCUITS)
    assert torch.equal(heads, heads.T)
    assert torch.equal(heads.diagonal(), torch.ones(3))
    assert heads[0, 1].item() == pytest.approx(1 / 4)
    assert nodes[0, 1].item() == pytest.approx(2 / 7)
    assert nodes[0, 2].item() == 0
