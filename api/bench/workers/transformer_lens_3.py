"""TransformerLens 3.9, the last with its own engine: `run_with_hooks` for every patch, as its patching functions do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

if TYPE_CHECKING:
    from subcircuit.bench.workers.harness import Job, Patch


def prepare(job: Job) -> HookedRuns:
    return HookedRuns(job)


class HookedRuns:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = gpt2(job).to(job.device)
        self.corrupted: Any = None

    def start(self) -> Any:
        self.corrupted = self.model.run_with_cache(self.job.corrupted, names_filter=lambda name: name.endswith("_z"))[1]
        return self.job.metric(self.model(self.job.clean))

    def patched(self, patch: Patch) -> Any:
        name = f"blocks.{patch.layer}.attn.hook_z"
        where = slice(None) if patch.position is None else patch.position

        def replace(z: Any, hook: Any) -> Any:
            z[:, where, patch.head] = self.corrupted[name][:, where, patch.head]
            return z

        return self.job.metric(self.model.run_with_hooks(self.job.clean, fwd_hooks=[(name, replace)]))


def gpt2(job: Job) -> Any:
    """A HookedTransformer with the weights as they are: nothing folded, nothing centred."""
    source = job.transformers_model()
    values = source.config
    if values.model_type != "gpt2":
        raise NotImplementedError(f"written for GPT-2, and the model is a {values.model_type}")
    config = HookedTransformerConfig(
        n_layers=values.n_layer,
        d_model=values.n_embd,
        n_ctx=values.n_positions,
        d_head=values.n_embd // values.n_head,
        n_heads=values.n_head,
        d_mlp=values.n_inner or 4 * values.n_embd,
        d_vocab=values.vocab_size,
        act_fn=values.activation_function,
        eps=values.layer_norm_epsilon,
        normalization_type="LN",
        device=job.device,
    )
    model = HookedTransformer(config)
    processing = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_gpt2_weights(source, config), **processing)
    return model.eval()
