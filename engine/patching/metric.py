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

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import PatchError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.answers import TokenSet, answer_directions, mean_at, mean_unembed
from subcircuit.kernels.backend import Backend
from subcircuit.kernels.norm_delta import norm_delta
from subcircuit.kernels.readout import readout
from subcircuit.kernels.vocabulary import kl_readout, top_readout

Metric = Literal["logit_difference", "log_probability", "kl", "accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Metrics = Metric | tuple[Metric, ...]
"""One metric of every row, or several read from the same rows, which then stand in a last dimension."""


def each_metric(metric: Metrics) -> tuple[Metric, ...]:
    """The metrics one by one."""
    return metric if isinstance(metric, tuple) else (metric,)


def metric_shape(n_prompts: int, metric: Metrics) -> tuple[int, ...]:
    """[prompt], or [prompt, metric] for several."""
    return (n_prompts, len(metric)) if isinstance(metric, tuple) else (n_prompts,)


def check_metric(metric: str | tuple[str, ...]) -> None:
    """Raises PatchError for a metric that does not exist."""
    for name in metric if isinstance(metric, tuple) else (metric,):
        if name not in METRICS:
            raise PatchError(f"metric {name!r} is not known; expected one of {', '.join(METRICS)}")


def clean_readout_bytes(config: ModelConfig, metric: Metrics, element_size: int) -> int:
    """Bytes of the clean probabilities of one prompt, for every metric that needs them."""
    return sum(config.d_vocab * element_size for each in each_metric(metric) if each != "logit_difference")


def measure(
    logits: Float[Tensor, "prompt d_vocab"],
    clean_logits: Float[Tensor, "prompt d_vocab"] | None,
    answers: TokenSet,
    wrongs: TokenSet,
    metric: Metrics,
) -> Float[Tensor, "prompt *metric"]:
    """A metric by its definition, from logits; at least in float32, but for a difference of the logits themselves.

    `clean_logits` are those of the clean run, or its log-probabilities; only `kl` needs them.
    """
    if isinstance(metric, tuple):
        return torch.stack([measure(logits, clean_logits, answers, wrongs, each) for each in metric], -1)
    if metric == "logit_difference":
        return mean_at(logits, answers) - mean_at(logits, wrongs)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if metric == "accuracy":
        return _among(logits.argmax(-1), answers).to(dtype)
    log_q = logits.to(dtype).log_softmax(-1)
    if metric == "log_probability":
        return mean_at(log_q, answers)
    assert clean_logits is not None
    log_p = clean_logits.to(dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _among(tokens: Int[Tensor, "*set prompt"], answers: TokenSet) -> Bool[Tensor, "*set prompt"]:
    return (tokens[..., None] == answers.to(tokens.device)).any(-1)


class MetricReadout:
    """A metric read from the final residual stream of rows, given as δ to that of the clean run.

    What it needs of the clean run is computed once: a direction, and for all but the logit difference every prompt's
    log-probabilities and their mean unembedding ū. The product with W_U is in the precision of the clean run, whatever
    that of the others: it is made for one position of a row only, and a KL is of the size of δ².
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
        self._norm, self._unembed = model.ln_final, model.unembed_weight
        self._metric, self._backend, self._answers = metric, backend, answers
        self._final, self._normed = final, self._norm(final)
        self.log_p: Float[Tensor, "prompt d_vocab"] | None = None
        if metric == "logit_difference":
            self._direction = answer_directions(self._unembed, answers, wrongs)
            self.clean: Float[Tensor, "prompt"] = (self._normed * self._direction).sum(-1)
            return
        self.log_p = log_p = F.linear(self._normed, self._unembed).log_softmax(-1)
        self.clean = measure(log_p, log_p, answers, wrongs, metric)
        self._mean_unembed = log_p.exp() @ self._unembed
        self._direction = mean_unembed(self._unembed, answers) - self._mean_unembed

    def effects(self, delta: Float[Tensor, "#set prompt d_model"]) -> Float[Tensor, "#set prompt"]:
        """metric(row) − metric(clean run)."""
        if self.log_p is None:
            return self._along_direction(delta)
        normed = self._delta_normed(delta)
        if self._metric == "accuracy":
            top = top_readout(normed, self.log_p, self._unembed, backend=self._backend)
            return _among(top, self._answers).to(self.clean.dtype) - self.clean
        kl = kl_readout(normed, self.log_p, self._mean_unembed, self._unembed, backend=self._backend)
        return kl if self._metric == "kl" else self._along_direction(delta) - kl

    def _along_direction(self, delta: Tensor) -> Float[Tensor, "#set prompt"]:
        norm = self._norm
        inputs = self._final, self._normed, delta, norm.weight, norm.bias, norm.eps, self._direction
        return readout(*inputs, backend=self._backend)

    def _delta_normed(self, delta: Tensor) -> Float[Tensor, "#set prompt d_model"]:
        norm, (clean, normed, delta) = self._norm, (x[..., None, :] for x in (self._final, self._normed, delta))
        inputs = clean, normed, delta, norm.weight, norm.bias, norm.eps, clean.dtype
        return norm_delta(*inputs, backend=self._backend)[1].squeeze(2)


class SeveralReadouts:
    """Several metrics of the same rows, in the last dimension: a `MetricReadout` each."""

    def __init__(self, readouts: Sequence[MetricReadout]) -> None:
        self._readouts = readouts
        self.clean: Float[Tensor, "prompt metric"] = torch.stack([each.clean for each in readouts], -1)
        self.log_p = next((each.log_p for each in readouts if each.log_p is not None), None)

    def effects(self, delta: Float[Tensor, "#set prompt d_model"]) -> Float[Tensor, "#set prompt metric"]:
        """metric(row) − metric(clean run)."""
        return torch.stack([each.effects(delta) for each in self._readouts], -1)


def readout_of(
    model: HookedTransformer,
    final: Float[Tensor, "prompt d_model"],
    answers: TokenSet,
    wrongs: TokenSet,
    metric: Metrics,
    backend: Backend,
) -> MetricReadout | SeveralReadouts:
    """What reads one metric, or several, from the final residual stream of rows."""
    readouts = [MetricReadout(model, final, answers, wrongs, each, backend) for each in each_metric(metric)]
    return SeveralReadouts(readouts) if isinstance(metric, tuple) else readouts[0]
