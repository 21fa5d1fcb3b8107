"""Gates between 0 and 1 on the parts of a model, learned by gradient descent on a task and on how many are open.

Each gate is a hard concrete variable (Louizos et al. 2018, arXiv 1712.01312, section 2.2): its logit log α and noise
decide a value in (γ, ζ), clipped to 0…1, so that it is exactly 0 or 1 most of the time and yet has a gradient. What is
minimised is how far the gated model's answers are from the full model's, plus the expected share of open gates.

Gates are on nodes (`masks`) or on edges (`edge_masks`), and give an order of them. How many of them a circuit needs is
then decided by exact scores, not by the gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypedDict, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.metrics import kl_divergence, logit_difference
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import PatchSet, Source
from subcircuit.engine.patching.reference import last_logits
from subcircuit.engine.patching.sources import PromptChunk, Sources

Loss = Literal["kl", "logit_difference"]
Item = TypeVar("Item")
"""What a gate is on."""

# The constants of Louizos et al.: a gate's range before it is clipped, and the temperature of its noise.
GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3

PROMPTS_PER_FORWARD = 32
"""Of the forwards without gates, which measure what the gated ones are held against."""


class Learning(TypedDict, total=False):
    """How gates are learned: the options of `learn_gates`."""

    loss: Loss
    size_weight: float
    steps: int
    learning_rate: float
    prompts_per_step: int
    seed: int


@dataclass(frozen=True, eq=False)
class Masks(Generic[Item]):
    """What gates were learned: a logit per item, large where it is needed, and the loss at every step."""

    items: tuple[Item, ...]
    log_alpha: Float[Tensor, " item"]
    losses: tuple[float, ...]

    @property
    def gates(self) -> Float[Tensor, " item"]:
        """Each gate without noise, 0 to 1."""
        return _stretched(self.log_alpha.sigmoid())

    def ranking(self) -> list[Item]:
        """The items, those that are needed most first."""
        order = self.log_alpha.argsort(descending=True, stable=True)
        return [self.items[i] for i in order.tolist()]

    def strengths(self) -> dict[Item, float]:
        """Each item's sigmoid(log α): in the order of the ranking, and apart where gates are open or shut alike."""
        return dict(zip(self.items, self.log_alpha.double().sigmoid().tolist(), strict=True))


def learn_gates(
    model: HookedTransformer,
    task: Task,
    items: Sequence[Item],
    patches: PatchSet,
    gated: Callable[[Float[Tensor, " item"], Sources, PromptChunk], list[Hook]],
    *,
    source: Source,
    loss: Loss = "kl",
    size_weight: float = 1.0,
    steps: int = 200,
    learning_rate: float = 0.1,
    prompts_per_step: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Masks[Item]:
    """Gates for items, learned on a task's prompts.

    gated: hooks that put gates in a forward of some prompts, with the values of the `source` at what `patches` patch.
    loss: `kl`, KL(full model ‖ gated model) at the last position in nats, or `logit_difference`, the squared change of
    each prompt's logit difference in units of the full model's mean.
    size_weight: what all gates open cost, in units of that loss; it grows to this over the first third of the steps.
    steps, learning_rate: of Adam. prompts_per_step: drawn for each step. seed: of prompts and noise.

    Raises PatchError for an unknown loss or source, or a number that must be positive and is not.
    """
    if loss not in ("kl", "logit_difference"):
        raise PatchError(f"loss {loss!r} is not known; expected 'kl' or 'logit_difference'")
    for name, value in (("steps", steps), ("learning_rate", learning_rate), ("prompts_per_step", prompts_per_step)):
        if value <= 0:
            raise PatchError(f"{name} is {value}; expected a positive number")
    generator = torch.Generator().manual_seed(seed)
    sources = Sources(model, task, [patches], source, min(PROMPTS_PER_FORWARD, task.n))
    with torch.no_grad():
        chunks = torch.arange(task.n).split(PROMPTS_PER_FORWARD)
        full = torch.cat([last_logits(model, task, chunk) for chunk in chunks])
    # All start open, so that the first steps see the model as it is.
    log_alpha = torch.full((len(items),), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=learning_rate)
    losses = []
    for step in range(steps):
        chosen = torch.randperm(task.n, generator=generator)[:prompts_per_step].sort().values
        gates = sampled(log_alpha, generator).to(model.device, model.dtype)
        logits = last_logits(model, task, chosen, gated(gates, sources, chosen))
        difference = _distance(logits, full[chosen], task.subset(chosen.tolist()), loss)
        size = size_weight * min(1.0, 3 * (step + 1) / steps) * open_probability(log_alpha).mean()
        total = difference.cpu() + size
        # Of the gates alone: the model's parameters, which may ask for gradients, are not learned here.
        (log_alpha.grad,) = torch.autograd.grad(total, [log_alpha])
        optimizer.step()
        sources.forget()
        losses.append(float(total.detach()))
        if progress is not None:
            progress(step + 1, steps)
    return Masks(tuple(items), log_alpha.detach(), tuple(losses))


def smallest_prefix(
    scores_of: Callable[[Sequence[int]], Sequence[float]], n_items: int, at_once: int, enough: Callable[[float], bool]
) -> tuple[int, float]:
    """How many items of a ranking, from its first, have a score that is enough, and that score.

    scores_of: scores of the first so many items, for several sizes in one call; that of all `n_items` must be enough.

    Sizes are tried from coarse to fine, `at_once` of them (at least two), evenly spread: the first that is enough is
    the end of the next, finer spread, which begins behind the last one that was not. With `at_once` > `n_items` this
    tries every size. With less it finds a size that is enough while one less is not; where scores rise and fall along
    the ranking, there may be smaller ones.
    """
    too_few, found = -1, (n_items, float("nan"))
    while found[0] - too_few > 1 or math.isnan(found[1]):
        n_left = found[0] - too_few
        n_tried = min(n_left, max(2, at_once))
        sizes = [too_few + n_left * (i + 1) // n_tried for i in range(n_tried)]
        for size, score in zip(sizes, scores_of(sizes), strict=True):
            if enough(score) or size == found[0]:
                found = size, score
                break
            too_few = size
    return found


def near_enough(threshold: float, both_sides: bool) -> Callable[[float], bool]:
    """Whether a score has lost at most `threshold` points of the 100; with `both_sides`, nor gained more."""
    return lambda score: 100 - threshold <= score <= (100 + threshold if both_sides else math.inf)


def _distance(logits: Tensor, full: Tensor, task: Task, loss: Loss) -> Float[Tensor, ""]:
    if loss == "kl":
        return kl_divergence(logits, full).mean()
    gated, whole = (logit_difference(rows, *task.answer_sets) for rows in (logits, full))
    return ((gated - whole) / whole.mean()).square().mean()


def sampled(log_alpha: Float[Tensor, " item"], generator: torch.Generator) -> Float[Tensor, " item"]:
    """Gates with noise: Louizos et al., equations 10 and 11."""
    uniform = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return _stretched(((uniform.logit() + log_alpha) / TEMPERATURE).sigmoid())


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    """Probability that a gate is not 0: Louizos et al., equation 12."""
    return (log_alpha - TEMPERATURE * math.log(-GAMMA / ZETA)).sigmoid()
