"""Train tiny-gpt2, the model that ships with the package, and write it in Hugging Face's GPT-2 form.

    python -m subcircuit.weights.train_tiny --out DIR

Text, vocabulary, weights and figures all follow from the seed; nothing is read or downloaded. The figures of the
shipped weights are in docs/tiny-gpt2.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.model import HookedTransformer
from subcircuit.weights import tiny_text
from subcircuit.weights.bpe_training import LearnedBPE, learn_bpe

N_CTX = 128


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were made with; lengths in steps, sizes in rows of `N_CTX` tokens."""

    seed: int = 0
    n_steps: int = 1600
    n_rows: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    n_warmup_steps: int = 200
    n_vocab_documents: int = 20_000


def tiny_config(d_vocab: int) -> ModelConfig:
    """GPT-2's architecture at 0.8 million parameters: 32 heads to look for a circuit in."""
    return ModelConfig(
        n_layers=4,
        d_model=128,
        n_heads=8,
        d_head=16,
        d_mlp=384,
        d_vocab=d_vocab,
        n_ctx=N_CTX,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tied_unembed=True,
        name="tiny-gpt2",
    )


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """GPT-2's initialisation: normal(0, 0.02), what writes to the residual stream scaled by 1/√(2·n_layers)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in HookedTransformer.parameter_shapes(config).items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape)
        else:
            writes = name.endswith(("w_o.weight", "w_out.weight"))
            std = 0.02 / math.sqrt(2 * config.n_layers) if writes else 0.02
            tensors[name] = torch.randn(shape, generator=generator) * std
    return tensors


def learn_vocabulary(settings: Settings) -> LearnedBPE:
    """A vocabulary in which every word of the made text is one token."""
    random = Random(settings.seed + 1)
    texts = (tiny_text.document(random) for _ in range(settings.n_vocab_documents))
    return learn_bpe(texts, tiny_text.END_OF_TEXT)


def batches(bpe: LearnedBPE, settings: Settings, random: Random) -> Iterator[Int[Tensor, "row pos"]]:
    """Rows of `N_CTX + 1` tokens; each begins with a whole document, as a prompt does, and goes on with others."""
    end = bpe.vocab[tiny_text.END_OF_TEXT]
    while True:
        rows = []
        for _ in range(settings.n_rows):
            row = bpe.encode(tiny_text.document(random))
            while len(row) <= N_CTX:
                row += [end, *bpe.encode(tiny_text.document(random))]
            rows.append(row[: N_CTX + 1])
        yield torch.tensor(rows)


def train(bpe: LearnedBPE, settings: Settings) -> tuple[HookedTransformer, list[float]]:
    """The trained model and its loss at every step (mean cross-entropy per token, nats)."""
    config = tiny_config(len(bpe.vocab))
    model = HookedTransformer(config, initial_tensors(config, settings.seed)).requires_grad_()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step, rows in enumerate(batches(bpe, settings, Random(settings.seed))):
        if step == settings.n_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            elapsed_s = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {mean(losses[-100:]):.4f}  {elapsed_s:.0f} s", flush=True)
    return model.requires_grad_(False), losses


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < settings.n_warmup_steps:
        return (step + 1) / settings.n_warmup_steps
    share = (step - settings.n_warmup_steps) / (settings.n_steps - settings.n_warmup_steps)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Figure:
    """How well held-out prompts of one sequence and template are continued.

    `top1` is the share answered right; `window_top1` the same for the members that this template never showed together
    (they are also among those of `top1`); `logit_difference` is answer minus last member, in nats, and
    `disordered` the same where the members shown are in no order.
    """

    sequence: str
    template: str
    top1: float
    window_top1: float
    logit_difference: float
    disordered: float


def evaluate(model: HookedTransformer, bpe: LearnedBPE, seed: int, n_prompts: int = 160) -> list[Figure]:
    """Figures over prompts of four members whose words were never in a template; every start value equally often."""
    return [
        _figure(model, bpe, sequence, template, Random(seed), n_prompts)
        for sequence in tiny_text.SEQUENCES
        for template in tiny_text.TASK_TEMPLATES
    ]


def _figure(
    model: HookedTransformer,
    bpe: LearnedBPE,
    sequence: tiny_text.OrderedSequence,
    template: tiny_text.Template,
    random: Random,
    n_prompts: int,
) -> Figure:
    n_shown = tiny_text.WINDOW - 1
    held_out_words = tiny_text.held_out_words(template)
    windows, prompts, disordered = [], [], []
    for index in range(n_prompts):
        start = index % (len(sequence.members) - n_shown)
        windows.append(sequence.members[start : start + tiny_text.WINDOW])
        words = random.sample(held_out_words, tiny_text.WINDOW) if held_out_words else []
        prompts.append(template.render(windows[-1][:-1], words, ask=True))
        # The last member stays, so that only the order says whether its successor follows.
        others = [member for member in sequence.members if member not in windows[-1][-3:]]
        disordered.append(template.render([*random.sample(others, n_shown - 1), windows[-1][-2]], words, ask=True))
    answer, last = (_member_ids([window[at] for window in windows], bpe) for at in (-1, -2))
    logits = _last_logits(model, bpe, prompts)
    right = logits.argmax(-1) == answer
    held_out = tiny_text.held_out_window(sequence, template)
    return Figure(
        sequence=sequence.name,
        template=template.name,
        top1=right.double().mean().item(),
        window_top1=right[torch.tensor([window == held_out for window in windows])].double().mean().item(),
        logit_difference=_difference(logits, answer, last),
        disordered=_difference(_last_logits(model, bpe, disordered), answer, last),
    )


def _member_ids(members: list[str], bpe: LearnedBPE) -> Int[Tensor, " prompt"]:
    return torch.tensor([bpe.encode(f" {member}")[0] for member in members])


def _last_logits(model: HookedTransformer, bpe: LearnedBPE, prompts: list[str]) -> Float[Tensor, "prompt d_vocab"]:
    logits: Tensor = model(torch.tensor([bpe.encode(prompt) for prompt in prompts]))
    return logits[:, -1]


def _difference(logits: Tensor, answer: Tensor, wrong: Tensor) -> float:
    rows = torch.arange(len(logits))
    return (logits[rows, answer] - logits[rows, wrong]).mean().item()


def write_huggingface(model: HookedTransformer, bpe: LearnedBPE, directory: Path) -> None:
    """config.json, model.safetensors, vocab.json and merges.txt, as `transformers` writes and reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    config, end = model.config, bpe.vocab[bpe.special]
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": config.activation,
        "vocab_size": config.d_vocab,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_unembed,
        "bos_token_id": end,
        "eos_token_id": end,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (directory / "vocab.json").write_text(json.dumps(bpe.vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in bpe.merges)
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    save_file(_gpt2_tensors(model.state_dict(), config), directory / "model.safetensors", metadata={"format": "pt"})


def _gpt2_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT-2's names; its linear weights are [in, out], and q, k and v are one matrix."""
    named = {
        "transformer.wte.weight": tensors["embed.weight"],
        "transformer.wpe.weight": tensors["pos_embed.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"transformer.ln_f.{kind}"] = tensors[f"ln_final.{kind}"]
        for layer in range(config.n_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            named[f"{theirs}.ln_1.{kind}"] = tensors[f"{ours}.ln1.{kind}"]
            named[f"{theirs}.ln_2.{kind}"] = tensors[f"{ours}.ln2.{kind}"]
            qkv = torch.cat([tensors[f"{ours}.attn.w_{x}.{kind}"] for x in "qkv"])
            named[f"{theirs}.attn.c_attn.{kind}"] = qkv.t()
            named[f"{theirs}.attn.c_proj.{kind}"] = tensors[f"{ours}.attn.w_o.{kind}"].t()
            named[f"{theirs}.mlp.c_fc.{kind}"] = tensors[f"{ours}.mlp.w_in.{kind}"].t()
            named[f"{theirs}.mlp.c_proj.{kind}"] = tensors[f"{ours}.mlp.w_out.{kind}"].t()
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=Settings.n_steps, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; sums depend on it (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(seed=arguments.seed, n_steps=arguments.steps)

    bpe = learn_vocabulary(settings)
    model, losses = train(bpe, settings)
    write_huggingface(model, bpe, arguments.out)
    print(f"{model.config.n_params:,} parameters, {len(bpe.vocab)} tokens, last loss {mean(losses[-100:]):.4f}")
    print("| sequence | template | top-1 | top-1, held-out order | logit difference | no order |")
    print("| --- | --- | --- | --- | --- | --- |")
    for figure in evaluate(model, bpe, settings.seed):
        print(
            f"| {figure.sequence} | {figure.template} | {figure.top1:.1%} | {figure.window_top1:.1%} "
            f"| {figure.logit_difference:.2f} | {figure.disordered:.2f} |"
        )


if __name__ == "__main__":
    main()
