"""Subnetwork search: a gate between 0 and 1 on every node, learned by gradient descent on the task and on the size.

Each gate is a hard concrete variable (Louizos et al. 2018, arXiv 1712.01312, section 2.2): its logit log α and noise
decide a value in (γ, ζ), clipped to 0…1, so that it is exactly 0 or 1 most of the time and yet has a gradient. A node
of gate m has the value m · its own + (1 − m) · its source's; what is minimised is how far the gated model's answers are
from the full model's, plus the expected share of open gates. Such masks have found subnetworks since Cao et al. 2021
(arXiv 2104.03514); circuit probing (Lepori et al. 2023, arXiv 2311.04354) and edge pruning (Bhaskar et al. 2024, arXiv
2406.16778) do it for circuits.

The gates give an order of the nodes. Which of them a circuit needs is then decided by exact scores, not by the gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.faithfulness import Ablation, all_nodes
from subcircuit.analysis.metrics import kl_divergence, logit_difference
from subcircuit.analysis.tasks import Task
from subcircuit.engine.errors import PatchError
from subcircuit.engine.hooks import Hook
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component, Patch, Site, Source
from subcircuit.engine.patching.sources import Sources

Loss = Literal["kl", "logit_difference"]

# The paper's constants: a gate's range before it is clipped, and the temperature of its noise.
GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3


@dataclass(frozen=True, eq=False)
class Masks:
    """What gates were learned: a logit per node, large where the node is needed, and the loss at every step."""

    nodes: tuple[Component, ...]
    log_alpha: Float[Tensor, " node"]
    losses: tuple[float, ...]

    @property
    def gates(self) -> Float[Tensor, " node"]:
        """Each gate without noise, 0 to 1."""
        return _stretched(self.log_alpha.sigmoid())

    def ranking(self) -> list[Component]:
        """The nodes, those that are needed most first."""
        order = self.log_alpha.argsort(descending=True, stable=True)
        return [self.nodes[i] for i in order.tolist()]


def learn_masks(
    model: HookedTransformer,
    task: Task,
    nodes: Sequence[Component],
    *,
    source: Source = "mean",
    loss: Loss = "kl",
    size_weight: float = 1.0,
    steps: int = 200,
    learning_rate: float = 0.1,
    prompts_per_step: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Gates for nodes (heads and MLPs), learned on a task's prompts.

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
    patch_sets = [tuple(Patch(Site(node)) for node in nodes)]
    sources = Sources(model, task, patch_sets, source, min(prompts_per_step, task.n))
    full = _final_logits(model, task, prompts_per_step)
    # All start open, so that the first steps see the model as it is.
    log_alpha = torch.full((len(nodes),), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=learning_rate)
    losses = []
    for step in range(steps):
        chosen = torch.randperm(task.n, generator=generator)[:prompts_per_step].sort().values
        gates = _sampled(log_alpha, generator).to(model.device, model.dtype)
        hooks = _gated(model, nodes, gates, sources, chosen)
        logits = model.run_with_hooks(task.clean[chosen], hooks)[:, -1]
        difference = _distance(logits, full[chosen], task.subset(chosen.tolist()), loss)
        size = size_weight * min(1.0, 3 * (step + 1) / steps) * _open_probability(log_alpha).mean()
        total = difference.cpu() + size
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        sources.forget()
        losses.append(float(total.detach()))
        if progress is not None:
            progress(step + 1, steps)
    return Masks(tuple(nodes), log_alpha.detach(), tuple(losses))


def mask_circuit(
    model: HookedTransformer,
    task: Task,
    *,
    threshold: float = 20.0,
    source: Source = "mean",
    ablation: Ablation | None = None,
    steps: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **learning: Any,
) -> Circuit:
    """The circuit that learned gates lead to: the fewest nodes, in the gates' order, that score 100 − `threshold`.

    Scores are exact (`faithfulness.Ablation`). `learning` is passed on to `learn_masks`; the other arguments are as in
    `discover`.

    Raises PatchError as `learn_masks` does, TaskError when the model does not do the task.
    """
    ablation = ablation or Ablation(model, task, source=source)
    nodes = all_nodes(model.config)
    masks = learn_masks(model, task, nodes, source=source, steps=steps, seed=seed, progress=progress, **learning)
    ranking = masks.ranking()
    scores = ablation.scores([ranking[size:] for size in range(len(ranking) + 1)])
    size = next(size for size, score in enumerate(scores) if score >= 100 - threshold)
    about = {"threshold": threshold, "steps": steps, "seed": seed, **learning}
    return Circuit.of_nodes(
        ranking[:size],
        model=model.config.name,
        task=task.name,
        method="masks",
        score=scores[size],
        settings={**ablation.settings, **about},
    )


@torch.no_grad()
def _final_logits(model: HookedTransformer, task: Task, n_rows: int) -> Float[Tensor, "prompt d_vocab"]:
    return torch.cat([model(rows)[:, -1] for rows in task.clean.split(n_rows)])


def _distance(logits: Tensor, full: Tensor, task: Task, loss: Loss) -> Float[Tensor, ""]:
    if loss == "kl":
        return kl_divergence(logits, full).mean()
    gated, whole = (logit_difference(rows, *task.answer_sets) for rows in (logits, full))
    return ((gated - whole) / whole.mean()).square().mean()


def _gated(
    model: HookedTransformer,
    nodes: Sequence[Component],
    gates: Float[Tensor, " node"],
    sources: Sources,
    prompts: Tensor,
) -> list[Hook]:
    """Hooks that put each node between its own value and its source's."""
    at_hook: dict[str, dict[int, int]] = {}
    for i, node in enumerate(nodes):
        at_hook.setdefault(node.hook_name, {})[node.index] = i
    return [
        (name, _mixer(model, gates, indices, sources.value(sources.key(None), name, prompts)))
        for name, indices in at_hook.items()
    ]


def _mixer(
    model: HookedTransformer, gates: Tensor, indices: Mapping[int, int], source: Tensor
) -> Callable[[Tensor, str], Tensor]:
    def mix(value: Tensor, name: str) -> Tensor:
        if name.endswith("hook_mlp_out"):
            gate = gates[indices[0]]
        else:
            per_head = gates.new_ones(model.config.n_heads)
            at = torch.tensor(list(indices), device=gates.device)
            gate = per_head.index_put((at,), gates[list(indices.values())])[:, None]
        return source + gate * (value - source)

    return mix


def _sampled(log_alpha: Float[Tensor, " node"], generator: torch.Generator) -> Float[Tensor, " node"]:
    """Gates with noise: the paper's equation 10 and 11."""
    uniform = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return _stretched(((uniform.logit() + log_alpha) / TEMPERATURE).sigmoid())


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a gate is not 0: the paper's equation 12."""
    return (log_alpha - TEMPERATURE * math.log(-GAMMA / ZETA)).sigmoid()
