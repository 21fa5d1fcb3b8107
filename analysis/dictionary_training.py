"""A small trainer of sparse dictionaries, and the figures that say how good one is.

The loss of a batch of activations x, scaled to a mean square of 1 per entry and centred, is

    |x − f W_dec − b_dec|² / d_in + l1 Σ f + AUX_WEIGHT |error − f_dead W_dec|² / d_in

with decoder rows held at norm 1; `topk` has no need of the l1 term. In the last term the `d_in / 2` strongest of the
features that have not fired lately explain what the others leave over, which brings them back (Gao et al. 2024,
arXiv 2406.04093, appendix A.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subcircuit.engine.dictionary import SparseDictionary
from subcircuit.engine.errors import ConfigError, TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.sources import activations
from subcircuit.weights import tiny_text

AUX_WEIGHT = 1 / 32
ROWS_AT_ONCE = 16
HELD_OUT = 0.1
"""Share of the text's rows that is measured on and not trained on."""


@dataclass(frozen=True)
class TrainingSettings:
    """size: features. activation: `topk` with k active features per position, or `relu` with weight `l1` on their sum.
    steps, tokens_per_step, learning_rate: of Adam, whose rate falls to 0 over the last fifth. dead_after: steps without
    firing after which a feature counts as dead. seed: of initial weights and batches.
    """

    size: int = 512
    activation: Literal["topk", "relu"] = "topk"
    k: int = 16
    l1: float = 0.1
    steps: int = 1000
    tokens_per_step: int = 512
    learning_rate: float = 2e-3
    dead_after: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "k", "steps", "tokens_per_step", "learning_rate", "dead_after"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive number")
        if self.activation not in ("topk", "relu"):
            raise ConfigError(f"activation {self.activation!r} cannot be trained; expected 'topk' or 'relu'")
        if self.activation == "topk" and self.k > self.size:
            raise ConfigError(f"k is {self.k}; expected 1 to the {self.size} features of the dictionary")


@dataclass(frozen=True)
class DictionaryQuality:
    """How well a dictionary stands for the activations at its hook point, on text it was not trained on."""

    explained_variance: float
    """1 − Σ|error|² / Σ|x − mean|²."""
    l0: float
    """Mean number of features active per position."""
    dead_share: float
    """Features that never fire on this text."""
    loss: float
    """Mean cross-entropy of the next token, in nats, of the model as it is."""
    reconstructed_loss: float
    """… with the dictionary's output in place of the activations."""
    zeroed_loss: float
    """… with 0 in their place."""
    n_tokens: int

    @property
    def loss_recovered(self) -> float:
        """(zeroed − reconstructed) / (zeroed − loss): 1 where the dictionary loses nothing."""
        return (self.zeroed_loss - self.reconstructed_loss) / (self.zeroed_loss - self.loss)


def tiny_text_rows(model: HookedTransformer, n_rows: int, *, n_pos: int = 128, seed: int = 0) -> Int[Tensor, "row pos"]:
    """Rows of documents of the text that tiny-gpt2 is trained on, one after the other, as token ids.

    Raises TaskError for a model without tokenizer.
    """
    if model.tokenizer is None:
        raise TaskError("the text needs a tokenizer, and this model has none")
    random, n_pos = Random(seed), min(n_pos, model.config.n_ctx)
    end = model.tokenizer.eos_id
    rows = []
    for _ in range(n_rows):
        row: list[int] = []
        while len(row) < n_pos:
            row += model.tokenizer.encode(tiny_text.document(random)) + ([] if end is None else [end])
        rows.append(row[:n_pos])
    return torch.tensor(rows)


def train_dictionary(
    model: HookedTransformer,
    hook: str,
    tokens: Int[Tensor, "row pos"],
    settings: TrainingSettings | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SparseDictionary:
    """Train a dictionary on a model's activations at a hook point over a text, in float32.

    The last tenth of the rows is left for `dictionary_quality` (`held_out_rows`). The same seed and threads give the
    same dictionary.

    Raises HookError for a hook point at which no dictionary can sit, ConfigError for settings that make no sense,
    TaskError for a text of fewer than two rows.
    """
    settings = settings or TrainingSettings()
    if len(tokens) < 2:
        raise TaskError(f"a dictionary is trained on {len(tokens)} rows of text; expected at least 2")
    n_held_out = len(held_out_rows(tokens))
    x = _activations(model, hook, tokens[: len(tokens) - n_held_out])
    centre = x.mean(0)
    scale = float((x - centre).square().mean().sqrt().clamp_min(1e-12))
    trainer = _Trainer(x.shape[1], settings)
    trainer.dictionary(hook, centre, scale).check(model.config)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    for step in range(settings.steps):
        batch = x[torch.randint(len(x), (settings.tokens_per_step,), generator=generator)]
        trainer.step((batch - centre) / scale, step)
        if progress is not None:
            progress(step + 1, settings.steps)
    return trainer.dictionary(hook, centre, scale)


def held_out_rows(tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """The rows of a text that `train_dictionary` does not train on."""
    return tokens[-max(1, round(HELD_OUT * len(tokens))) :]


@torch.no_grad()
def dictionary_quality(
    model: HookedTransformer, dictionary: SparseDictionary, tokens: Int[Tensor, "row pos"]
) -> DictionaryQuality:
    """Explained variance, L0, dead share and losses on a text. Raises HookError for one that does not fit the model."""
    dictionary.check(model.config)
    hook, x = dictionary.hook_name, _activations(model, dictionary.hook_name, tokens)
    own = dictionary.map(lambda each: each.to(x))
    acts = torch.cat([own.encode(part) for part in x.split(4096)])
    error = x - own.decode(acts)
    placed = dictionary.map(lambda each: each.to(model.embed.weight))

    def reconstruct(value: Tensor, name: str) -> Tensor:
        return placed.decode(placed.encode(value.flatten(2))).view_as(value)

    return DictionaryQuality(
        explained_variance=1 - float(error.square().sum() / (x - x.mean(0)).square().sum()),
        l0=float((acts > 0).sum(1).double().mean()),
        dead_share=float((acts == 0).all(0).double().mean()),
        loss=_loss(model, tokens),
        reconstructed_loss=_loss(model, tokens, hook, reconstruct),
        zeroed_loss=_loss(model, tokens, hook, lambda value, name: torch.zeros_like(value)),
        n_tokens=tokens.numel(),
    )


def _activations(model: HookedTransformer, hook: str, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "token d_in"]:
    parts = [activations(model, rows, [hook])[hook] for rows in tokens.split(ROWS_AT_ONCE)]
    return torch.cat([part.flatten(2).flatten(0, 1).float().cpu() for part in parts])


def _loss(
    model: HookedTransformer,
    tokens: Int[Tensor, "row pos"],
    hook: str = "",
    function: Callable[[Tensor, str], Tensor] | None = None,
) -> float:
    hooks = [] if function is None else [(hook, function)]
    total = 0.0
    for rows in tokens.split(ROWS_AT_ONCE):
        logits = model.run_with_hooks(rows, hooks)[:, :-1].flatten(0, 1).float()
        mean = F.cross_entropy(logits, rows[:, 1:].flatten().to(logits.device))
        total += float(mean) * len(rows)
    return total / len(tokens)


class _Trainer:
    """Weights, optimiser and what has fired when, for activations that are scaled and centred."""

    def __init__(self, d_in: int, settings: TrainingSettings) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        decoder = F.normalize(torch.randn(settings.size, d_in, generator=generator), dim=1)
        # An encoder that starts as the decoder's transpose leaves few features dead (Gao et al., appendix A.1).
        self.W_dec, self.W_enc = decoder, decoder.T.clone()
        self.b_enc, self.b_dec = torch.zeros(settings.size), torch.zeros(d_in)
        self.parameters = [each.requires_grad_() for each in (self.W_enc, self.W_dec, self.b_enc, self.b_dec)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate, betas=(0.9, 0.999))
        self.silent_steps = torch.zeros(settings.size, dtype=torch.int64)

    def step(self, x: Float[Tensor, "token d_in"], step: int) -> None:
        left = (self.settings.steps - step) / self.settings.steps
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * min(1.0, 5 * left)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        acts = _largest(pre, self.settings.k).relu() if self.settings.activation == "topk" else pre.relu()
        error = x - (acts @ self.W_dec + self.b_dec)
        loss = error.square().mean() + self._auxiliary(pre, error.detach())
        if self.settings.activation == "relu":
            loss = loss + self.settings.l1 * acts.sum(1).mean() / x.shape[1] ** 0.5
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))
            self.silent_steps += 1
            self.silent_steps[(acts > 0).any(0)] = 0

    def _auxiliary(self, pre: Float[Tensor, "token d_sae"], error: Float[Tensor, "token d_in"]) -> Float[Tensor, ""]:
        dead: Bool[Tensor, " d_sae"] = self.silent_steps >= self.settings.dead_after
        n_dead = int(dead.sum())
        if not n_dead:
            return error.new_zeros(())
        # Without a ReLU: below zero it would pass no gradient to what should come back.
        acts = _largest(pre[:, dead], min(n_dead, error.shape[1] // 2 or 1))
        return AUX_WEIGHT * (error - acts @ self.W_dec[dead]).square().mean()

    def dictionary(self, hook: str, centre: Float[Tensor, " d_in"], scale: float) -> SparseDictionary:
        """The dictionary for activations as they are: centre and scale go into its weights.

        Features fire as strongly as before the scaling, in units of the activations: decoder rows keep norm 1.
        """
        W_enc, W_dec, b_enc, b_dec = (each.detach().clone() for each in self.parameters)
        k = self.settings.k if self.settings.activation == "topk" else None
        return SparseDictionary(hook, W_enc, W_dec, b_enc * scale, centre + b_dec * scale, self.settings.activation, k)


def _largest(pre: Float[Tensor, "token feature"], k: int) -> Float[Tensor, "token feature"]:
    """The k largest of each row; 0 elsewhere."""
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)
