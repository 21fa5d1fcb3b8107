"""What an effect is an effect on: the metrics of a prompt's prediction, from its logits and in delta form.

| metric              | of a row                                              | effect: less that of the clean run |
| ------------------- | ----------------------------------------------------- | ---------------------------------- |
| `logit_difference`  | mean logit(answers) − mean logit(wrongs)              | any sign                           |
| `log_probability`   | mean log P(answers), in nats                          | any sign                           |
| `kl`                | KL(clean run ‖ row), in nats; 0 in the clean run      | 0 or more                          |
| `accuracy`          | 1 where the likeliest token is an answer, else 0      | −1, 0 or 1                         |

In delta form a logit difference is a direction in the normed residual stream. With p the clean probabilities,
ū = Σ p W_U and δn the change of the normed stream, a change of log P(answers) is (W_U[answers] − ū) · δn − KL, so that
only the KL and the likeliest token need the whole vocabulary.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import TokenSet, answer_directions, mean_at
from subcircuit.kernels.backend import Backend
from subcircuit.kernels.norm_delta import norm_delta
from subcircuit.kernels.readout import readout
from subcircuit.kernels.vocabulary import kl_readout, top_readout

Metric = Literal["logit_difference", "log_probability", "kl", "accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def check_metric(metric: str) -> None:
    """Raises PatchError for a metric that does not exist."""
    if metric not in METRICS:
        raise PatchError(f"metric {metric!r} is not known; expected one of {', '.join(METRICS)}")


def clean_readout_bytes(config: ModelConfig, metric: Metric, element_size: int) -> int:
    """Bytes of the clean probabilities of one prompt, where the metric needs them."""
    return 0 if metric == "logit_difference" else config.d_vocab * element_size


def measure(
    logits: Float[Tensor, "prompt d_vocab"],
    clean_logits: Float[Tensor, "prompt d_vocab"],
    answers: TokenSet,
    wrongs: TokenSet,
    metric: Metric,
) -> Float[Tensor, "prompt"]:
    """A metric by its definition, from logits; at least in float32, but for a difference of the logits themselves.

    `clean_logits` are those of the clean run, or its log-probabilities.
    """
    if metric == "logit_difference":
        return mean_at(logits, answers) - mean_at(logits, wrongs)
    logits, clean_logits = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, clean_logits))
    if metric == "log_probability":
        return mean_at(logits.log_softmax(-1), answers)
    if metric == "accuracy":
        return _among(logits.argmax(-1), answers).to(logits.dtype)
    log_p, log_q = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _among(tokens: Int[Tensor, "*set prompt"], answers: TokenSet) -> Bool[Tensor, "*set prompt"]:
    return (tokens[..., None] == answers.to(tokens.device)).any(-1)


class MetricReadout:
    """A metric read from the final residual stream of rows, given as δ to that of the clean run.

    What the metric needs of the clean run is measured once: a direction, and but for a logit difference the
    log-probabilities of each prompt and their mean unembedding. All of it, the product with W_U too, is in the
    precision of the model: one position of a row is read, so that little is lost by it, and an effect on a KL is of
    the square of δ's size.
    """

    def __init__(
        self,
        model: HookedTransformer,
        final: Float[Tensor, "prompt d_model"],
        answers: TokenSet,
        wrongs: TokenSet,
        metric: Metric,
        backend: Backend,
    ) -> None:
        self._norm, self._unembed, self._backend, self.metric = model.ln_final, model.unembed_weight, backend, metric
        self.final, self.normed = final, self._norm(final)
        self._answers = answers
        if metric == "logit_difference":
            self._direction = answer_directions(self._unembed, answers, wrongs)
            self.clean = (self.normed * self._direction).sum(-1)
            return
        logits = F.linear(self.normed, self._unembed)
        self.clean = measure(logits, logits, answers, wrongs, metric)
        self.log_p = logits.log_softmax(-1)
        self._mean_unembed = self.log_p.exp() @ self._unembed
        self._direction = answer_directions(self._unembed, answers, answers) + 0  # replaced below
        if metric == "log_probability":
            self._direction = _means(self._unembed, answers) - self._mean_unembed

    def effects(self, delta: Float[Tensor, "#set prompt d_model"]) -> Float[Tensor, "#set prompt"]:
        """metric(row) − metric(clean run)."""
        if self.metric == "logit_difference":
            return self._along_direction(delta)
        normed = self._norm_delta(delta)
        if self.metric == "accuracy":
            top = top_readout(normed, self.log_p, self._unembed, backend=self._backend)
            return _among(top, self._answers).to(self.clean.dtype) - self.clean
        kl = kl_readout(normed, self.log_p, self._mean_unembed, self._unembed, backend=self._backend)
        return kl if self.metric == "kl" else self._along_direction(delta) - kl
