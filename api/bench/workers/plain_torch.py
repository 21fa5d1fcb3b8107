"""The algorithmic baseline: what a careful user writes in plain torch for GPT-2, without a library.

The clean residual stream in front of every block is kept, so that a patch costs only the blocks from its own on; the
head's change of z is multiplied by its rows of the output projection and added; of the logits only the two that are
compared are computed, at the last position.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> CachedPrefix:
    return CachedPrefix(job)


class CachedPrefix:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
        if self.config["model_type"] != "gpt2":
            raise NotImplementedError(f"written for GPT-2, and the model is a {self.config['model_type']}")
        stored = load_file(Path(job.model) / "model.safetensors", device=job.device)
        self.weights = {name.removeprefix("transformer."): value for name, value in stored.items()}
        self.n_layers, self.n_heads = self.config["n_layer"], self.config["n_head"]
        unembed = self.weights.get("lm_head.weight", self.weights["wte.weight"])
        self.direction = unembed[job.answer] - unembed[job.wrong]

    def start(self) -> Any:
        _, self.corrupted_z, _ = self.run(self.embedded(self.job.corrupted), 0)
        self.resid, self.clean_z, metric = self.run(self.embedded(self.job.clean), 0)
        return metric

    def patched(self, patch: Patch) -> Any:
        layer, head, position = patch
        where = slice(None) if position is None else slice(position, position + 1)
        delta_z = torch.zeros_like(self.clean_z[layer])
        delta_z[:, where, head] = (self.corrupted_z[layer] - self.clean_z[layer])[:, where, head]
        d_head = delta_z.shape[-1]
        rows = self.weights[f"h.{layer}.attn.c_proj.weight"][head * d_head : (head + 1) * d_head]
        delta = delta_z[:, :, head] @ rows
        return self.run(self.resid[layer], layer, delta)[2]

    def embedded(self, tokens: Any) -> Any:
        return self.weights["wte.weight"][tokens] + self.weights["wpe.weight"][: tokens.shape[1]]

    def run(self, resid: Any, first: int, delta: Any = 0.0) -> tuple[list[Any], list[Any], Any]:
        """The blocks from `first` on, with `delta` added after that one's attention: residual streams, z, metric."""
        resids, zs = [], []
        for layer in range(first, self.n_layers):
            resids.append(resid)
            q, k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in self.qkv(resid, layer))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            zs.append(z)
            resid = resid + self.linear(z.flatten(2), f"h.{layer}.attn.c_proj") + delta
            hidden = self.linear(self.norm(resid, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            resid = resid + self.linear(F.gelu(hidden, approximate="tanh"), f"h.{layer}.mlp.c_proj")
            delta = 0.0
        return resids, zs, (self.norm(resid[:, -1], "ln_f") * self.direction).sum(-1)

    def qkv(self, resid: Any, layer: int) -> Any:
        return self.linear(self.norm(resid, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").chunk(3, dim=-1)

    def linear(self, x: Any, name: str) -> Any:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], -1)

    def norm(self, x: Any, name: str) -> Any:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config["layer_norm_epsilon"])
