"""Plain `transformers` and torch hooks: one full forward per patch, a pre-hook on each layer's output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> HookedForwards:
    return HookedForwards(job)


class HookedForwards:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.transformers_model()
        self.projections = job.output_projections(self.model)
        self.n_heads = self.model.config.num_attention_heads
        self.corrupted_z: dict[int, Any] = {}

    def start(self) -> Any:
        handles = [
            projection.register_forward_pre_hook(lambda _, args, layer=layer: self.keep(layer, args[0]))
            for layer, projection in enumerate(self.projections)
        ]
        self.model(input_ids=self.job.corrupted, use_cache=False)
        for handle in handles:
            handle.remove()
        return self.metric()

    def keep(self, layer: int, z: Any) -> None:
        self.corrupted_z[layer] = z.unflatten(-1, (self.n_heads, -1))

    def patched(self, patch: Patch) -> Any:
        where = slice(None) if patch.position is None else patch.position

        def replace(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            z = args[0].unflatten(-1, (self.n_heads, -1)).clone()
            z[:, where, patch.head] = self.corrupted_z[patch.layer][:, where, patch.head]
            return (z.flatten(-2),)

        handle = self.projections[patch.layer].register_forward_pre_hook(replace)
        metric = self.metric()
        handle.remove()
        return metric

    def metric(self) -> Any:
        return self.job.metric(self.model(input_ids=self.job.clean, use_cache=False).logits)
