"""What a prompt's logits are worth: one number per prompt, from the logits after the prompt's last token.

Every function takes logits `[prompt, d_vocab]`, or `[prompt, pos, d_vocab]` of aligned prompts, of which the
last position is read. Values are float32 (float64 for float64 logits), whatever the model's dtype.

Where several tokens count as right or wrong (`Task.answer_sets`), they come as `[prompt, token]`, rows filled up
with −1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.patching.answers import mean_at

LOGIT_BYTES = 2**28
"""Prompts are run so many at a time that their logits, at all positions, take no more than this."""

Tokens = Int[Tensor, " prompt"] | Int[Tensor, "prompt token"]
Logits = Float[Tensor, "prompt d_vocab"] | Float[Tensor, "prompt pos d_vocab"]


def logit_difference(logits: Logits, answer: Tokens, wrong: Tokens) -> Float[Tensor, " prompt"]:
    """logit(answer) − logit(wrong): the log of how many times likelier the answer is.

    Of sets, mean logit(answers) − mean logit(wrongs): how many times likelier in the geometric mean.
    """
    last = last_logits(logits)
    return mean_at(last, _columns(answer)) - mean_at(last, _columns(wrong))


def probability_difference(logits: Logits, answers: Tokens, wrongs: Tokens) -> Float[Tensor, " prompt"]:
    """Σ P(answers) − Σ P(wrongs), −1 to 1 (Hanna et al. 2023, arXiv 2305.00586, section 2)."""
    probabilities = last_logits(logits).softmax(-1)
    return sum_at(probabilities, answers) - sum_at(probabilities, wrongs)


def log_probability(logits: Logits, answer: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """log P(answer), in nats."""
    return mean_at(last_logits(logits).log_softmax(-1), _columns(answer))


def kl_divergence(logits: Logits, reference: Logits) -> Float[Tensor, " prompt"]:
    """KL(reference ‖ logits) in nats: what is lost by predicting with `logits` in place of `reference`."""
    log_p, log_q = last_logits(reference).log_softmax(-1), last_logits(logits).log_softmax(-1)
    # xlogy's rule 0 · log 0 = 0: a token that neither predicts (logit −inf) adds nothing.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1)


def is_top(logits: Logits, answer: Tokens) -> Bool[Tensor, " prompt"]:
    """Whether the likeliest token is the answer, or one of the answers."""
    top = last_logits(logits).argmax(-1)
    return (top[:, None] == _columns(answer).to(logits.device)).any(-1)


def accuracy(logits: Logits, answer: Tokens) -> float:
    """Share of prompts whose likeliest token is the answer, 0 to 1."""
    return float(is_top(logits, answer).float().mean())


def recovered_share(
    patched: Float[Tensor, "*any"], clean: Float[Tensor, "*any"], corrupted: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """(patched − corrupted) / (clean − corrupted) of any metric: 0 as bad as corrupted, 1 as good as clean.

    Not bounded to 0…1; NaN or infinite where clean and corrupted are equal: there is nothing to recover.
    """
    return (patched - corrupted) / (clean - corrupted)


def last_logits(logits: Logits) -> Float[Tensor, "prompt d_vocab"]:
    """The logits after each prompt's last token, at least in float32."""
    last = logits[:, -1] if logits.ndim == 3 else logits
    return last if last.dtype == torch.float64 else last.float()


def final_logits(
    model: Callable[[Tensor], Tensor], tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt d_vocab"]:
    """What a model says after each prompt, in float32 on the CPU."""
    return logits_at(model, tokens, [-1])[:, 0]


@torch.no_grad()
def logits_at(
    model: Callable[[Tensor], Tensor], tokens: Int[Tensor, "prompt pos"], positions: Sequence[int]
) -> Float[Tensor, "prompt at d_vocab"]:
    """What a model says at some positions, in float32 on the CPU. The first prompt, run alone, tells how many fit
    together."""
    first = model(tokens[:1])
    n_rows = max(1, LOGIT_BYTES // (4 * first.numel()))
    at = list(positions)
    rest = [model(rows)[:, at].float().cpu() for rows in tokens[1:].split(n_rows) if len(rows)]
    return torch.cat([first[:, at].float().cpu(), *rest])


def sum_at(values: Float[Tensor, "prompt d_vocab"], tokens: Tokens) -> Float[Tensor, " prompt"]:
    """Sum of each prompt's values at its tokens."""
    columns = _columns(tokens).to(values.device)
    return values.gather(-1, columns.clamp(min=0)).where(columns >= 0, 0.0).sum(-1)


def _columns(tokens: Tensor) -> Tensor:
    return tokens[:, None] if tokens.ndim == 1 else tokens
