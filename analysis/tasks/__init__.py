"""Tasks: token-aligned pairs of clean and corrupted prompts, with the token to predict and a wrong one.

A prompt shows four members of a sequence and asks for the next. Templates, as in Lan et al. (arXiv 2311.04131):

    done   Ring done in May. Van done in June. Box done in July. Card done in August. Key done in
    lost   the same with `lost in`
    born   the same with `born in` and first names
    bare   May June July August

The answer is the next member, the wrong answer the last one seen. The corrupted prompt has the same words and
four other members, at random, so that no rule leads from them to the clean answer.

Everything is fitted to a tokenizer (`sequences`, `fitting`), and every row is checked against the tokenizer's encoding
of prompt and answer together.
"""

from __future__ import annotations

from subcircuit.analysis.tasks.from_tokens import task_from_tokens
from subcircuit.analysis.tasks.registry import task, task_names
from subcircuit.analysis.tasks.sequences import FILTERED_TOGETHER, MIXED, N_MEMBERS, SEQUENCES, TEMPLATES, Template
from subcircuit.analysis.tasks.values import Model, Task

__all__ = [
    "FILTERED_TOGETHER",
    "MIXED",
    "N_MEMBERS",
    "SEQUENCES",
    "TEMPLATES",
    "Model",
    "Task",
    "Template",
    "task",
    "task_from_tokens",
    "task_names",
]
