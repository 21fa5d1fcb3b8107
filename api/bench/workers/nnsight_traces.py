"""nnsight: one trace per patch around the `transformers` model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight import NNsight, save

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> Traces:
    return Traces(job)


class Traces:
    def __init__(self, job: Job) -> None:
        self.job = job
        source = job.transformers_model()
        self.n_heads = source.config.num_attention_heads
        self.model = NNsight(source)
        self.projections = job.output_projections(self.model)
        self.corrupted_z: list[Any] = []

    def start(self) -> Any:
        projections = self.projections
        with self.model.trace(input_ids=self.job.corrupted, use_cache=False):
            kept = save([projection.input for projection in projections])
        self.corrupted_z = [z.unflatten(-1, (self.n_heads, -1)) for z in kept]
        with self.model.trace(input_ids=self.job.clean, use_cache=False):
            logits = save(self.model.output.logits)
        return self.job.metric(logits)

    def patched(self, patch: Patch) -> Any:
        where = slice(None) if patch.position is None else patch.position
        source, projection = self.corrupted_z[patch.layer], self.projections[patch.layer]
        with self.model.trace(input_ids=self.job.clean, use_cache=False):
            z = projection.input.unflatten(-1, (self.n_heads, -1)).clone()
            z[:, where, patch.head] = source[:, where, patch.head]
            projection.input = z.flatten(-2)
            logits = save(self.model.output.logits)
        return self.job.metric(logits)
