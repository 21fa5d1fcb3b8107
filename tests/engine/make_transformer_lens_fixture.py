"""Make data/transformer_lens.safetensors: what TransformerLens shows at every hook point of two small random models.

TransformerLens is no dependency of the tests; they compare with what this script stored. To make the file anew, in an
environment that has it:

    pip install torch==2.13.0 transformer_lens==3.9.0 safetensors
    python tests/engine/make_transformer_lens_fixture.py

Keys are `{model}/weights/{our parameter name}`, `{model}/tokens`, `{model}/logits` and `{model}/hooks/{hook name}`.
Weights are large enough that every term matters, and every bias and norm weight is random.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

FILE = Path(__file__).parent / "data" / "transformer_lens.safetensors"
SIZES = {"n_layers": 2, "d_model": 12, "n_heads": 4, "d_head": 4, "d_mlp": 20, "d_vocab": 17, "n_ctx": 16}
MODELS = {
    "gpt2": HookedTransformerConfig(
        **SIZES,
        act_fn="gelu_new",
        normalization_type="LN",
        positional_embedding_type="standard",
        eps=1e-5,
        device="cpu",
    ),
    "llama": HookedTransformerConfig(
        **SIZES,
        n_key_value_heads=2,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=4,
        rotary_base=10_000,
        rotary_adjacent_pairs=False,
        use_NTK_by_parts_rope=True,
        NTK_by_parts_factor=8.0,
        NTK_by_parts_low_freq_factor=1.0,
        NTK_by_parts_high_freq_factor=4.0,
        NTK_original_ctx_len=24,
        eps=1e-5,
        device="cpu",
    ),
}


def randomise(model: HookedTransformer, generator: torch.Generator) -> None:
    """Random parameters; without the biases that a Llama does not have."""
    is_llama = model.cfg.positional_embedding_type == "rotary"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rpartition(".")[2]
            if last == "w":
                parameter.copy_(1 + 0.3 * noise)
            elif last == "b_U" or (is_llama and last.lstrip("_").startswith("b_")):
                parameter.zero_()
            else:
                parameter.copy_(0.4 * noise)


def our_weights(model: HookedTransformer) -> dict[str, Tensor]:
    """The model's parameters by our names, as `torch.nn.Linear` stores them."""
    cfg = model.cfg
    ours = {"embed.weight": model.embed.W_E, "unembed.weight": model.unembed.W_U.T, "ln_final.weight": model.ln_final.w}
    has_biases = cfg.normalization_type == "LN"
    if has_biases:
        ours |= {"pos_embed.weight": model.pos_embed.W_pos, "ln_final.bias": model.ln_final.b}
    for layer, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        w_k, w_v = (attn.W_K, attn.W_V) if cfg.n_key_value_heads is None else (attn._W_K, attn._W_V)
        parts = {
            "ln1.weight": block.ln1.w,
            "ln2.weight": block.ln2.w,
            **{
                f"attn.w_{x}.weight": w.transpose(1, 2).flatten(0, 1)
                for x, w in zip("qkv", (attn.W_Q, w_k, w_v), strict=True)
            },
            "attn.w_o.weight": attn.W_O.flatten(0, 1).T,
            "mlp.w_in.weight": mlp.W_in.T,
            "mlp.w_out.weight": mlp.W_out.T,
        }
        if cfg.gated_mlp:
            parts["mlp.w_gate.weight"] = mlp.W_gate.T
        if has_biases:
            parts |= {
                f"attn.w_{x}.bias": b.flatten() for x, b in zip("qkv", (attn.b_Q, attn.b_K, attn.b_V), strict=True)
            }
            parts |= {"ln1.bias": block.ln1.b, "ln2.bias": block.ln2.b, "attn.w_o.bias": attn.b_O}
            parts |= {"mlp.w_in.bias": mlp.b_in, "mlp.w_out.bias": mlp.b_out}
        ours |= {f"blocks.{layer}.{name}": value for name, value in parts.items()}
    return {name: value.detach().clone().contiguous() for name, value in ours.items()}


def activations(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every hook point's value; those computed on request from passes of their own."""
    logits, cache = model.run_with_cache(tokens)
    values = dict(cache.items())
    is_grouped = model.cfg.n_key_value_heads is not None
    flags = ["use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"] + ([] if is_grouped else ["use_attn_in"])
    for flag in flags:
        getattr(model, f"set_{flag}")(True)
        again, extra = model.run_with_cache(tokens)
        getattr(model, f"set_{flag}")(False)
        torch.testing.assert_close(again, logits)
        values |= {name: value for name, value in extra.items() if name not in values}
    silent = {name for name in model.hook_dict if name not in values}
    expected = {f"blocks.{layer}.hook_attn_in" for layer in range(model.cfg.n_layers)} if is_grouped else set()
    assert silent == expected, silent
    return logits, values


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, cfg in MODELS.items():
        model = HookedTransformer(cfg)
        randomise(model, generator)
        tokens = torch.randint(0, cfg.d_vocab, (2, 7), generator=generator)
        with torch.no_grad():
            logits, values = activations(model, tokens)
        tensors |= {f"{name}/weights/{key}": value for key, value in our_weights(model).items()}
        tensors |= {f"{name}/hooks/{key}": value for key, value in values.items()}
        tensors |= {f"{name}/tokens": tokens, f"{name}/logits": logits}
    versions = {package: importlib.metadata.version(package) for package in ("transformer_lens", "torch")}
    FILE.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, FILE, metadata=versions)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(tensors)} tensors, {versions}")


if __name__ == "__main__":
    main()
