"""Patched edges by hooks alone: one full forward in which each receiver reads some senders from the corrupted run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from subcircuit.analysis.tasks import Task
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching.graph import INPUT, LOGITS, Edge, receivers, senders


@torch.no_grad()
def metric_without(model: HookedTransformer, task: Task, cut: Sequence[Collection[Edge]]) -> Tensor:
    """Mean logit difference for each set of cut edges.

    Their receivers read the sender's value in the corrupted run; all that comes after is computed anew. The model must
    have no output biases, which belong to no sender.
    """
    config = model.config
    names = {name: i for i, name in enumerate(senders(config))}
    inputs = {name: i for i, name in enumerate(receivers(config))}
    n_sets, n_prompts = len(cut), task.n
    is_cut = torch.zeros(n_sets, len(inputs), len(names), dtype=torch.bool)
    for i, edges in enumerate(cut):
        for sender, receiver in edges:
            is_cut[i, inputs[receiver], names[sender]] = True
    corrupted: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def keep(value: Tensor, name: str) -> None:
        """Sender by sender, as the model comes to them."""
        layer = name.split(".")[1] if name.startswith("blocks") else ""
        if name == "hook_embed" or name == "hook_pos_embed":
            written[INPUT] = written.get(INPUT, 0) + value
        elif name.endswith("hook_result"):
            written.update({f"a{layer}.h{head}": value[:, :, head] for head in range(config.n_heads)})
        else:
            written[f"m{layer}"] = value

    def change(value: Tensor, receiver: str) -> Tensor:
        """What a receiver reads: its input, less what cut senders wrote, plus what they wrote in the corrupted run."""
        if not is_cut[:, inputs[receiver]].any():
            return value
        value = value.unflatten(0, (n_sets, n_prompts)).clone()
        for sender, now in written.items():
            rows = is_cut[:, inputs[receiver], names[sender]]
            if rows.any():
                value[rows] += (corrupted[sender] - now.unflatten(0, (n_sets, n_prompts)))[rows]
        return value.flatten(0, 1)

    def read(value: Tensor, name: str) -> Tensor:
        if name == "resid_final":
            return change(value, LOGITS)
        layer, way = name.split(".")[1], name.split("hook_")[1]
        if way == "mlp_in":
            return change(value, f"m{layer}")
        return torch.stack(
            [change(value[:, :, head], f"a{layer}.{way[0]}{head}") for head in range(value.shape[2])], dim=2
        )

    writers = [(name, keep) for name in ("hook_embed", "hook_pos_embed") if name in model.hook_names()]
    writers += [(f"blocks.*.{name}", keep) for name in ("attn.hook_result", "hook_mlp_out")]
    model.run_with_hooks(task.corrupted, writers)
    corrupted.update(written)
    written.clear()
    readers = [(f"blocks.*.hook_{way}", read) for way in ("q_input", "k_input", "v_input", "mlp_in")]
    last = f"blocks.{config.n_layers - 1}.hook_resid_post"
    final = [(last, lambda value, name: read(value, "resid_final"))]
    logits = model.run_with_hooks(task.clean.repeat(n_sets, 1), [*writers, *readers, *final])[:, -1]
    rows = torch.arange(n_sets * n_prompts)
    difference = logits[rows, task.answer.repeat(n_sets)] - logits[rows, task.wrong.repeat(n_sets)]
    return difference.unflatten(0, (n_sets, n_prompts)).mean(1)
