"""From a blueprint to a model: where its parts sit, what sits in all other places, and its task."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subcircuit.analysis.circuit import Circuit
from subcircuit.analysis.tasks import Task, task_from_tokens
from subcircuit.analysis.truth.blueprint import ONE, OUT, POSITION, Blueprint, Conjunctions, Head
from subcircuit.analysis.truth.weights import BASE, Family, Space, config_for, conjunction_weights, head_weights
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import TaskError
from subcircuit.engine.model import HookedTransformer
from subcircuit.engine.patching import Component
from subcircuit.engine.patching.graph import LOGITS, Edge

NOISE = "noise"
"""Family of features that distractors write and no part of the circuit reads."""
N_NOISE = 8
LOGIT = 10.0
"""Logit of a token whose OUT feature is there."""


@dataclass(frozen=True)
class Truth:
    """A model whose circuit is known by construction, and the task that the circuit does.

    `circuit` has the nodes and edges that carry what differs between clean and corrupted prompts to the answer; `roles`
    say which node is what, and `edge_roles` say it of the edges. `distractors` write noise, `inert` nodes write exactly
    nothing.
    """

    name: str
    family: Family
    model: HookedTransformer
    task: Task
    circuit: Circuit
    roles: dict[str, str]
    edge_roles: dict[str, Edge]
    distractors: tuple[str, ...]
    inert: tuple[str, ...]
    description: str

    def role(self, item: str | Edge) -> str:
        """What a node or edge of the circuit is: `induction`, `previous token -> induction.k`.

        Raises TaskError for one that does not belong to it.
        """
        known: dict[str, str | Edge] = {**self.roles, **self.edge_roles}
        for role, which in known.items():
            if which == item:
                return role
        raise TaskError(f"{item!r} does not belong to the circuit of known model '{self.name}'")


def build(
    blueprint: Blueprint,
    family: Family,
    *,
    n_prompts: int,
    n_layers: int | None,
    n_heads: int,
    n_distractors: int | None,
    noise: float,
    sharpness: float,
    seed: int,
    dtype: torch.dtype,
) -> Truth:
    """A model of a blueprint; `truth` explains the options. Raises TaskError for sizes into which it does not fit."""
    depth = len(blueprint.stages)
    n_layers = depth + 2 if n_layers is None else n_layers
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    sizes = {ONE: 1, **blueprint.sizes, NOISE: N_NOISE}
    if family == "gpt2":
        sizes[POSITION] = blueprint.n_pos
    # The louder the noise, the larger the constant that keeps norms from noticing it.
    space = Space(sizes, BASE * max(1.0, noise), generator)
    config = config_for(
        family,
        f"{blueprint.name}-{family}-{seed}",
        space,
        n_layers=n_layers,
        n_heads=n_heads,
        n_match=max(_width(part, blueprint) for part in blueprint.parts.values()),
        d_vocab=len(blueprint.embedding),
        n_pos=blueprint.n_pos,
    )
    places = _place(blueprint, config, rng)
    free = [node for node in _nodes(config) if node not in places.values()]
    n_noisy = len(free) // 2 if n_distractors is None else n_distractors
    if not 0 <= n_noisy <= len(free):
        raise TaskError(f"{n_noisy} distractors do not fit: {len(free)} of {len(_nodes(config))} places are free")
    noisy = set(rng.sample(free, n_noisy))

    task = _task(blueprint, n_prompts, rng)
    tensors = _frame(blueprint, config, space)
    for role, part in blueprint.parts.items():
        _install(part, places[role], config, space, sharpness, tensors)
    _fill(tensors, free, noisy, config, space, generator)
    _scale(tensors, noisy, noise, config, task.clean)
    model = HookedTransformer(config, {name: value.to(dtype) for name, value in tensors.items()})
    roles = {role: str(node) for role, node in places.items()}
    edge_roles = {
        f"{sender} -> {receiver}": (roles.get(sender, sender), _receiver(receiver, places, config))
        for sender, receiver in blueprint.edges
    }
    circuit = Circuit.of_nodes(
        places.values(),
        edges=tuple(edge_roles.values()),
        model=config.name,
        task=blueprint.name,
        method="known by construction",
        settings={"family": family, "noise": noise, "n_distractors": n_noisy, "sharpness": sharpness, "seed": seed},
    )
    distractors = tuple(str(node) for node in free if node in noisy)
    inert = tuple(str(node) for node in free if node not in noisy)
    return Truth(
        blueprint.name, family, model, task, circuit, roles, edge_roles, distractors, inert, blueprint.description
    )


def _width(part: Head | Conjunctions, blueprint: Blueprint) -> int:
    """Dimensions that a part needs of a head: its matches', and its moves'."""
    if isinstance(part, Conjunctions):
        return 0
    matched = sum(blueprint.sizes[match.key] for match in part.matches)
    return max(matched, sum(blueprint.sizes[family] for family, _, _ in part.moves))


def _nodes(config: ModelConfig) -> list[Component]:
    heads = [Component(layer, "z", head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    return sorted([*heads, *(Component(layer, "mlp") for layer in range(config.n_layers))])


def _place(blueprint: Blueprint, config: ModelConfig, rng: random.Random) -> dict[str, Component]:
    """A random place for every part: stages in rising layers, heads of a layer in KV groups of their own."""
    depth = len(blueprint.stages)
    if config.n_layers < depth:
        raise TaskError(f"known model '{blueprint.name}' needs {depth} layers, got {config.n_layers}")
    places = {}
    for layer, stage in zip(sorted(rng.sample(range(config.n_layers), depth)), blueprint.stages, strict=True):
        heads = [role for role, part in stage.items() if isinstance(part, Head)]
        if len(heads) > config.kv_heads:
            raise TaskError(
                f"known model '{blueprint.name}' needs {len(heads)} key-value heads in a layer, got {config.kv_heads}"
            )
        groups = rng.sample(range(config.kv_heads), len(heads))
        for role, group in zip(heads, groups, strict=True):
            places[role] = Component(layer, "z", group * config.group_size + rng.randrange(config.group_size))
        places |= {role: Component(layer, "mlp") for role in stage if role not in heads}
    return places


def _receiver(name: str, places: dict[str, Component], config: ModelConfig) -> str:
    """The receiver that a role's input is: `next.v` -> `a3.v1`."""
    role, _, way = name.partition(".")
    if role == LOGITS or not way:
        return str(places[role]) if role in places else LOGITS
    node = places[role]
    if way == "q":
        return str(Component(node.layer, "q", node.index))
    return str(Component(node.layer, "k" if way == "k" else "v", node.index // config.group_size))


def _frame(blueprint: Blueprint, config: ModelConfig, space: Space) -> dict[str, Tensor]:
    """All tensors of a model whose layers do nothing: embedding, unembedding, norms."""
    tensors = {
        name: torch.zeros(shape, dtype=torch.float64)
        for name, shape in HookedTransformer.parameter_shapes(config).items()
    }
    for name, value in tensors.items():
        if name.endswith(("ln1.weight", "ln2.weight", "ln_final.weight")):
            value.fill_(space.base / space.d_model**0.5)
    for token, features in enumerate(blueprint.embedding):
        tensors["embed.weight"][token] = space.base * space[ONE][:, 0] + sum(
            space.vector(feature) for feature in features
        )
    if POSITION in space:
        tensors["pos_embed.weight"] = space[POSITION].T.clone()
    tensors["unembed.weight"][list(blueprint.predicts)] = LOGIT * space[OUT].T
    return tensors


def _install(
    part: Head | Conjunctions,
    node: Component,
    config: ModelConfig,
    space: Space,
    sharpness: float,
    tensors: dict[str, Tensor],
) -> None:
    if isinstance(part, Conjunctions):
        for name, value in conjunction_weights(part, config, space).items():
            tensors[f"blocks.{node.layer}.mlp.{name}"].copy_(value)
        return
    w_q, w_k, w_v, w_o = head_weights(part, config, space, sharpness)
    group = node.index // config.group_size
    for name, index, value in (("w_q", node.index, w_q), ("w_k", group, w_k), ("w_v", group, w_v)):
        _rows(tensors, node.layer, name, index, config).copy_(value.T)
    _rows(tensors, node.layer, "w_o", node.index, config).copy_(w_o)


def _rows(tensors: dict[str, Tensor], layer: int, name: str, head: int, config: ModelConfig) -> Tensor:
    """A head's part of a projection, `[d_head, d_model]`, to write to."""
    weight = tensors[f"blocks.{layer}.attn.{name}.weight"]
    return (weight.T if name == "w_o" else weight)[head * config.d_head : (head + 1) * config.d_head]


def _fill(
    tensors: dict[str, Tensor],
    free: list[Component],
    noisy: set[Component],
    config: ModelConfig,
    space: Space,
    generator: torch.Generator,
) -> None:
    """Random weights in every place that is free; distractors write along NOISE, the others nothing.

    They read every feature but ONE, those of the circuit included, so that what they attend to and write differs from
    prompt to prompt; a KV head that a part of the circuit uses stays that part's.
    """
    one = space[ONE]

    def reading(n: int) -> Tensor:
        weight = torch.randn(n, config.d_model, dtype=torch.float64, generator=generator)
        return weight - weight @ one @ one.T

    def writing(n: int, node: Component) -> Tensor:
        weight = torch.randn(n, N_NOISE, dtype=torch.float64, generator=generator) @ space[NOISE].T
        return weight if node in noisy else torch.zeros_like(weight)

    for node in free:
        if node.kind == "mlp":
            for name in ("w_in", "w_gate") if config.gated_mlp else ("w_in",):
                tensors[f"blocks.{node.layer}.mlp.{name}.weight"].copy_(reading(config.d_mlp))
        else:
            _rows(tensors, node.layer, "w_q", node.index, config).copy_(reading(config.d_head))
            for name in ("w_k", "w_v"):
                rows = _rows(tensors, node.layer, name, node.index // config.group_size, config)
                if not rows.any():
                    rows.copy_(reading(config.d_head))
        out = _writes(tensors, node, config)
        out.copy_(writing(len(out), node))


def _writes(tensors: dict[str, Tensor], node: Component, config: ModelConfig) -> Tensor:
    """What a head or MLP writes with, `[d_head or d_mlp, d_model]`, to change in place."""
    if node.kind == "mlp":
        return tensors[f"blocks.{node.layer}.mlp.w_out.weight"].T
    return _rows(tensors, node.layer, "w_o", node.index, config)


@torch.no_grad()
def _scale(
    tensors: dict[str, Tensor], noisy: set[Component], noise: float, config: ModelConfig, tokens: Tensor
) -> None:
    """Scale the distractors, from the first to the last: the root mean square norm of what each writes is `noise`."""
    model = HookedTransformer(config, tensors)  # shares memory with the tensors
    for node in sorted(noisy, key=lambda node: (node.layer, node.stage)):
        name = f"blocks.{node.layer}." + ("hook_mlp_out" if node.kind == "mlp" else "attn.hook_result")
        written = model.run_with_cache(tokens, [name], stop_at_layer=node.layer + 1)[1][name]
        written = written if node.kind == "mlp" else written[:, :, node.index]
        size = written.pow(2).sum(-1).mean().sqrt()
        _writes(tensors, node, config).mul_(noise / size if size > 0 else 0.0)


def _task(blueprint: Blueprint, n_prompts: int, rng: random.Random) -> Task:
    prompts = [blueprint.draw(rng) for _ in range(n_prompts)]
    task = task_from_tokens(
        clean=[prompt.clean for prompt in prompts],
        corrupted=[prompt.corrupted for prompt in prompts],
        answer=[prompt.answer for prompt in prompts],
        wrong=[prompt.wrong for prompt in prompts],
        name=blueprint.name,
        d_vocab=len(blueprint.embedding),
    )
    return replace(task, positions=blueprint.positions)
