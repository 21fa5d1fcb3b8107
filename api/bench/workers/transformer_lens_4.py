"""TransformerLens 4: its TransformerBridge around the `transformers` model, `run_with_hooks` for every patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens.model_bridge import TransformerBridge

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> BridgedRuns:
    return BridgedRuns(job)


class BridgedRuns:
    def __init__(self, job: Job) -> None:
        self.job = job
        source = job.transformers_model(attn_implementation="eager")
        self.model = TransformerBridge.boot_transformers(job.model, hf_model=source, device=job.device)
        self.corrupted: Any = None

    def start(self) -> Any:
        self.corrupted = self.model.run_with_cache(self.job.corrupted, names_filter=lambda name: name.endswith("_z"))[1]
        return self.job.metric(self.model(self.job.clean))

    def patched(self, patch: Patch) -> Any:
        name = f"blocks.{patch.layer}.attn.hook_z"
        where = slice(None) if patch.position is None else patch.position

        def replace(z: Any, hook: Any) -> Any:
            z = z.clone()
            z[:, where, patch.head] = self.corrupted[name][:, where, patch.head]
            return z

        return self.job.metric(self.model.run_with_hooks(self.job.clean, fwd_hooks=[(name, replace)]))
