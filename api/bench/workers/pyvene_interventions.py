"""pyvene: for every patch an intervention on one head's value output.

Its usual call runs the corrupted prompts anew for every patch; handing it their activations, kept from one run, halves
its time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pyvene import IntervenableConfig, IntervenableModel, RepresentationConfig, VanillaIntervention

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> Interventions:
    return Interventions(job)


class Interventions:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.transformers_model()
        self.n_heads = self.model.config.num_attention_heads
        self.projections = job.output_projections(self.model)
        self.corrupted_z: dict[int, Any] = {}
        self.intervenable = cache(self.new_intervenable)

    def start(self) -> Any:
        handles = [
            projection.register_forward_pre_hook(lambda _, args, layer=layer: self.keep(layer, args[0]))
            for layer, projection in enumerate(self.projections)
        ]
        self.model(input_ids=self.job.corrupted, use_cache=False)
        for handle in handles:
            handle.remove()
        return self.job.metric(self.model(input_ids=self.job.clean, use_cache=False).logits)

    def keep(self, layer: int, z: Any) -> None:
        self.corrupted_z[layer] = z.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def patched(self, patch: Patch) -> Any:
        n_prompts, n_pos = self.job.clean.shape
        positions = list(range(n_pos)) if patch.position is None else [patch.position]
        intervenable = self.intervenable(patch.layer, len(positions))
        places = [[[[patch.head]] * n_prompts, [positions] * n_prompts]]
        source = self.corrupted_z[patch.layer][:, patch.head : patch.head + 1, positions]
        _, patched = intervenable(
            {"input_ids": self.job.clean},
            unit_locations={"sources->base": (places, places)},
            source_representations={intervenable.sorted_keys[0]: source},
            use_cache=False,
        )
        return self.job.metric(patched.logits)

    def new_intervenable(self, layer: int, n_positions: int) -> Any:
        where = RepresentationConfig(layer, "head_attention_value_output", "h.pos", n_positions)
        config = IntervenableConfig([where], intervention_types=VanillaIntervention)
        return IntervenableModel(config, self.model)
