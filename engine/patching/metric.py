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

from collections.abc import Mapping
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
from subcircuit.kernels.vocabulary import kl_and_top_readout, kl_readout, top_readout

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


def needs_vocabulary(metric: Metrics) -> bool:
    """Whether reading it takes more of W_U than a few columns."""
    return any(each != "logit_difference" for each in each_metric(metric))


def clean_readout_bytes(config: ModelConfig, metric: Metrics, element_size: int) -> int:
    """Bytes of the clean probabilities of one prompt, where a metric needs them."""
    return config.d_vocab * element_size if needs_vocabulary(metric) else 0


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
    """One metric, or several, read from the final residual stream of rows, given as δ to that of the clean run.

    What it needs of the clean run is computed once: the answers' directions, and for all but the logit difference every
    prompt's log-probabilities and their mean unembedding ū. However many metrics need the vocabulary, rows read it
    once. The product with W_U is in the precision of the clean run, whatever that of the others: it is made for one
    position of a row only, and a KL is of the size of δ².
    """

    def __init__(
        self,
        model: HookedTransformer,
        final: Float[Tensor, "prompt d_model"],
        answers: TokenSet,
        wrongs: TokenSet,
        metric: Metrics,
        backend: Backend,
    ) -> None:
        self._norm, self._unembed = model.ln_final, model.unembed_weight
        self._metric, self._metrics, self._backend, self._answers = metric, each_metric(metric), backend, answers
        self._final, self._normed = final, self._norm(final)
        self.log_p: Float[Tensor, "prompt d_vocab"] | None = None
        self._directions: dict[Metric, Float[Tensor, "prompt d_model"]] = {}
        if "logit_difference" in self._metrics:
            self._directions["logit_difference"] = answer_directions(self._unembed, answers, wrongs)
        if needs_vocabulary(metric):
            self.log_p = F.linear(self._normed, self._unembed).log_softmax(-1)
            self._mean_unembed = self.log_p.exp() @ self._unembed
            self._directions["log_probability"] = mean_unembed(self._unembed, answers) - self._mean_unembed
        self._clean = {each: self._clean_metric(each, wrongs) for each in self._metrics}
        self.clean: Float[Tensor, "prompt *metric"] = self._in_order(self._clean)

    def effects(self, delta: Float[Tensor, "#set prompt d_model"]) -> Float[Tensor, "#set prompt *metric"]:
        """metric(row) − metric(clean run)."""
        found = self._from_vocabulary(delta)
        for each in self._metrics:
            if each in self._directions:
                along = self._along(self._directions[each], delta)
                found[each] = along - found["kl"] if each == "log_probability" else along
        return self._in_order(found)

    def _clean_metric(self, metric: Metric, wrongs: TokenSet) -> Float[Tensor, "prompt"]:
        if metric == "logit_difference":
            along: Tensor = (self._normed * self._directions[metric]).sum(-1)
            return along
        assert self.log_p is not None
        return measure(self.log_p, self.log_p, self._answers, wrongs, metric)

    def _in_order(self, values: Mapping[Metric, Float[Tensor, "*any"]]) -> Float[Tensor, "*any"]:
        """Several metrics in a last dimension, or the one."""
        chosen = [values[each] for each in self._metrics]
        return torch.stack(chosen, -1) if isinstance(self._metric, tuple) else chosen[0]

    def _from_vocabulary(self, delta: Tensor) -> dict[Metric, Float[Tensor, "#set prompt"]]:
        """What needs all tokens: the KL, which a log-probability needs too, and the effect on accuracy."""
        found: dict[Metric, Tensor] = {}
        if self.log_p is None:
            return found
        inputs = self._delta_normed(delta), self.log_p, self._mean_unembed, self._unembed
        if "accuracy" not in self._metrics:
            return {"kl": kl_readout(*inputs, backend=self._backend)}
        if {"kl", "log_probability"}.isdisjoint(self._metrics):
            top = top_readout(inputs[0], self.log_p, self._unembed, backend=self._backend)
        else:
            found["kl"], top = kl_and_top_readout(*inputs, backend=self._backend)
        found["accuracy"] = _among(top, self._answers).to(self._normed.dtype) - self._clean["accuracy"]
        return found

    def _along(self, direction: Tensor, delta: Tensor) -> Float[Tensor, "#set prompt"]:
        norm = self._norm
        inputs = self._final, self._normed, delta, norm.weight, norm.bias, norm.eps, direction
        return readout(*inputs, backend=self._backend)

    def _delta_normed(self, delta: Tensor) -> Float[Tensor, "#set prompt d_model"]:
        norm, (clean, normed, delta) = self._norm, (x[..., None, :] for x in (self._final, self._normed, delta))
        inputs = clean, normed, delta, norm.weight, norm.bias, norm.eps, clean.dtype
        return norm_delta(*inputs, backend=self._backend)[1].squeeze(2)
