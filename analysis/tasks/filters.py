"""Which prompts a model answers, by the rule of Lan et al. (arXiv 2311.04131)."""

from __future__ import annotations

import math

from jaxtyping import Bool, Int
from torch import Tensor

from subcircuit.analysis.metrics import Tokens, final_logits, is_top, logit_difference
from subcircuit.analysis.tasks.values import Model


def answered(model: Model, clean: Int[Tensor, "prompt pos"], answer: Tokens, wrong: Tokens) -> Bool[Tensor, " prompt"]:
    """Whether the model's top token is an answer and P(answer) > 2 P(wrong), of sets in the geometric mean."""
    logits = final_logits(model, clean)
    # A ratio of probabilities is a difference of logits.
    return (logit_difference(logits, answer, wrong) > math.log(2)) & is_top(logits, answer)
