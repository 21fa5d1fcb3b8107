"""Tasks: token-aligned pairs of clean and corrupted prompts, with the token to predict and a wrong one.

Sequence tasks (`sequences`) show members of a sequence and ask for the next, in the templates of Lan et al. (arXiv
2311.04131):

    done   Ring done in May. Van done in June. Box done in July. Card done in August. Key done in
    lost   the same with `lost in`
    born   the same with `born in` and first names
    bare   May June July August

All others are made of frames, texts with slots (`frames`), one file per family. `task_from_file` reads a user's own.

Everything is fitted to a tokenizer, and every row is checked against the tokenizer's encoding of prompt and answer
together: all prompts of a task have one length, and what a position holds in one it holds in all.
"""

from __future__ import annotations

from subcircuit.analysis.tasks.files import file_fingerprint, is_file_name, task_from_file
from subcircuit.analysis.tasks.from_tokens import task_from_tokens
from subcircuit.analysis.tasks.registry import about, check_known, task, task_names
from subcircuit.analysis.tasks.sequences import FILTERED_TOGETHER, MIXED, N_MEMBERS, SEQUENCES, TEMPLATES, Template
from subcircuit.analysis.tasks.transfer import TransferPrompt, transfer_kinds, transfer_prompts
from subcircuit.analysis.tasks.values import About, Model, Task

__all__ = [
    "FILTERED_TOGETHER",
    "MIXED",
    "N_MEMBERS",
    "SEQUENCES",
    "TEMPLATES",
    "About",
    "Model",
    "Task",
    "Template",
    "TransferPrompt",
    "about",
    "check_known",
    "file_fingerprint",
    "is_file_name",
    "task",
    "task_from_file",
    "task_from_tokens",
    "task_names",
    "transfer_kinds",
    "transfer_prompts",
]
