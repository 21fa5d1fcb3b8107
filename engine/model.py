"""The whole model: GPT-2 and Llama as settings of one class, from token ids to logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Self, Unpack, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from subcircuit.engine.blocks import MLP, Attention, Block, Norm, Pass, Residual
from subcircuit.engine.cache import ActivationCache
from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import SparseDictionary, acts_name
from subcircuit.engine.errors import ConfigError, HookError, PromptError
from subcircuit.engine.generate import GenerateOptions, Generation, generate
from subcircuit.engine.hooks import Hook, HookTable, NamedHook, NameFilter, hook_names, select_names
from subcircuit.engine.inputs import KVCache, PaddingSide, PromptBatch, Prompts, batch_prompts
from subcircuit.engine.rope import rope_frequencies, rope_tables
from subcircuit.engine.tokenizer import Tokenizer


class HookedTransformer(nn.Module):
    """A GPT-2 or Llama with a hook point on every component.

    `tensors` holds exactly the parameters named by `parameter_shapes(config)`, all of one dtype; they are used as they
    are, without a copy, so memory-mapped weights stay on disk until they are read. Parameters do not require gradients
    until `model.requires_grad_()` is called.

    Raises ConfigError for a missing, extra or wrongly shaped tensor, or one of another dtype.
    """

    embed: nn.Embedding
    pos_embed: nn.Embedding | None
    blocks: nn.ModuleList
    ln_final: Norm
    unembed: nn.Linear | None

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._hooks = HookTable()
        self._frequencies = rope_frequencies(config) if config.positions == "rope" else None
        _check_tensors(tensors, self.parameter_shapes(config))
        for name, module in _modules(config).items():
            self.add_module(name, module)
        self.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
        self.requires_grad_(False)

    @staticmethod
    def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a model of this configuration is made of."""
        parts = nn.ModuleDict({name: part for name, part in _modules(config).items() if part is not None})
        return {name: tuple(value.shape) for name, value in parts.state_dict().items()}

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    # Stacked over layers. Keys and values have one matrix per KV head, as their hook points do.

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return torch.stack([attn.W_Q for attn in self._attentions()])

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return torch.stack([attn.W_K for attn in self._attentions()])

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return torch.stack([attn.W_V for attn in self._attentions()])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return torch.stack([attn.W_O for attn in self._attentions()])

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return torch.stack([mlp.w_in.weight.T for mlp in self._mlps()])

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """None without a gate."""
        gates = [mlp.w_gate.weight.T for mlp in self._mlps() if mlp.w_gate is not None]
        return torch.stack(gates) if gates else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return torch.stack([mlp.w_out.weight.T for mlp in self._mlps()])

    def _attentions(self) -> list[Attention]:
        return [cast(Block, block).attn for block in self.blocks]

    def _mlps(self) -> list[MLP]:
        return [cast(Block, block).mlp for block in self.blocks]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed_weight.T

    @property
    def unembed_weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The unembedding as a linear weight: the embedding itself where the two are tied."""
        return self.embed.weight if self.unembed is None else self.unembed.weight

    def hook_names(self) -> tuple[str, ...]:
        """Every hook point of this model, in forward order."""
        names = hook_names(self.config)
        if not self.dictionaries:
            return names
        return tuple(
            each for name in names for each in (name, acts_name(name)) if each is name or name in self.dictionaries
        )

    @property
    def dictionaries(self) -> Mapping[str, SparseDictionary]:
        """The sparse dictionaries at this model's hook points, by hook name."""
        return self._hooks.dictionaries

    def with_dictionaries(self, *dictionaries: SparseDictionary) -> Self:
        """This model, sharing its weights, with sparse dictionaries at hook points (one at each).

        It computes what it did before. The features of the dictionary at `blocks.2.hook_resid_pre` are the hook point
        `blocks.2.hook_resid_pre.hook_sae_acts_post`, `[batch, pos, d_sae]`: what a hook changes there is decoded into
        the value, whose error is kept.

        Raises HookError for a dictionary that does not fit the model, or two at one hook point.
        """
        at = {dictionary.hook_name: dictionary for dictionary in dictionaries}
        if len(at) != len(dictionaries):
            raise HookError(f"{len(dictionaries)} dictionaries for {len(at)} hook points; expected one at each")
        for dictionary in dictionaries:
            dictionary.check(self.config)
        other = copy.copy(self)
        weight = self.embed.weight
        other._hooks = HookTable({name: each.map(lambda x: x.detach().to(weight)) for name, each in at.items()})
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()` calls: dictionaries go where the weights go."""
        self._hooks.dictionaries = {name: each.map(fn) for name, each in self._hooks.dictionaries.items()}
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def to_tokens(self, text: str | Sequence[str], *, bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids of one or several texts that have equally many tokens.

        `bos=None` follows the tokenizer's own rule (`model.tokenizer.adds_bos`); True or False overrides it.

        Raises PromptError for unequal lengths: token ids alone could not say which of them are padding.
        """
        batch = self.prompt_batch(text, bos=bos)
        if batch.mask is not None:
            lengths = ", ".join(str(n) for n in sorted(set(batch.mask.sum(1).tolist())))
            raise PromptError(f"texts have {lengths} tokens; expected equally many, or model.prompt_batch to pad them")
        return batch.tokens

    def prompt_batch(
        self,
        prompts: Prompts,
        *,
        bos: bool | None = None,
        padding_side: PaddingSide = "left",
        attention_mask: Tensor | None = None,
    ) -> PromptBatch:
        """Prompts as `.tokens` `[batch, pos]` and `.mask`, which is True at real tokens, or None without padding.

        `model(batch.tokens, attention_mask=batch.mask)` is `model(prompts)`.
        """
        return batch_prompts(
            prompts,
            self.tokenizer,
            bos=bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            d_vocab=self.config.d_vocab,
            device=self.device,
        )

    def forward(
        self,
        prompts: Prompts,
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        padding_side: PaddingSide = "left",
        bos: bool | None = None,
        kv_cache: KVCache | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at every position.

        `prompts` is a text, a list of texts, or token ids `[batch, pos]` (or `[pos]`). Texts of unequal length are
        padded on `padding_side` and masked, so each gives the logits it gives alone; with the default, left, the last
        position is every prompt's last token. Padded token ids need their `attention_mask` (True at real tokens).
        With `kv_cache`, `prompts` continue what the cache holds. `stop_at_layer=l` returns the residual stream that
        enters layer l instead.

        Raises PromptError for an empty or too long prompt, an id outside the vocabulary, or a text without tokenizer.
        """
        batch = self.prompt_batch(prompts, bos=bos, padding_side=padding_side, attention_mask=attention_mask)
        n_layers = self._n_layers_until(stop_at_layer)
        resid, run = self._enter(batch, kv_cache)
        for layer in range(n_layers):
            resid = self.blocks[layer](resid, layer, run)
        if stop_at_layer is not None:
            return resid
        normed = self._hooks("unembed.hook_in", self.ln_final.hooked(resid, "ln_final", self._hooks))
        return self._hooks("unembed.hook_out", F.linear(normed, self.unembed_weight))

    def _n_layers_until(self, stop_at_layer: int | None) -> int:
        n_layers = self.config.n_layers
        if stop_at_layer is None:
            return n_layers
        if not -n_layers <= stop_at_layer <= n_layers:
            raise ConfigError(f"stop_at_layer {stop_at_layer} is out of range for a model of {n_layers} layers")
        return stop_at_layer % n_layers if stop_at_layer < 0 else stop_at_layer

    def _enter(self, batch: PromptBatch, kv_cache: KVCache | None) -> tuple[Residual, Pass]:
        """The embedded prompts, and what their forward pass shares."""
        positions, mask = batch.positions_and_mask(kv_cache, self.config.n_ctx)
        resid = self._hooks("hook_embed", self.embed(batch.tokens))
        if self.pos_embed is not None:
            pos_embed = self.pos_embed(positions)
            if self._hooks.wants("hook_pos_embed"):
                pos_embed = self._hooks("hook_pos_embed", pos_embed.expand_as(resid).clone())
            resid = resid + pos_embed
        rope = None if self._frequencies is None else rope_tables(self._frequencies, positions, resid.dtype)
        return resid, Pass(self._hooks, rope, mask, kv_cache)

    def hooks(self, hooks: Iterable[Hook] = (), backward_hooks: Iterable[Hook] = ()) -> AbstractContextManager[None]:
        """Set hooks for the duration of a `with` block; a name may be a shell-style pattern or a predicate.

        A hook is `(name, function)`; `function(value, name)` returns a replacement of the same shape, or None to leave
        the value. A backward hook gets the gradient with respect to the value instead, when `backward` runs, and may
        replace that.

        Raises HookError for a name that does not exist, at the end of the block for one that no forward pass reached,
        and in a forward pass without gradients for a backward hook.
        """
        return self._hooks.set(self._named(hooks), self._named(backward_hooks))

    def _named(self, hooks: Iterable[Hook]) -> list[NamedHook]:
        names = self.hook_names()
        return [(name, function) for where, function in hooks for name in select_names(where, names)]

    def run_with_hooks(
        self,
        prompts: Prompts,
        hooks: Iterable[Hook] = (),
        backward_hooks: Iterable[Hook] = (),
        **forward: object,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """`model(prompts, **forward)` with hooks set for this one pass."""
        with self.hooks(hooks, backward_hooks):
            return cast(Tensor, self(prompts, **forward))

    def run_with_cache(
        self,
        prompts: Prompts,
        names: NameFilter = None,
        *,
        stop_at_layer: int | None = None,
        **forward: object,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], ActivationCache]:
        """Logits, and the activations at the named hook points (every standard one by default).

        Per-head results, split inputs and the unembedding's (`hooks.ON_REQUEST`) are kept only when named.
        With `stop_at_layer=l` the layers from l on are not run and the first value is the residual stream entering l.
        """
        n_layers = self._n_layers_until(stop_at_layer)
        reached = self._reached_names(n_layers, stop_at_layer is None)
        where = "in this model" if stop_at_layer is None else f"below layer {n_layers}"
        values: dict[str, Tensor] = {}

        def keep(value: Tensor, name: str) -> None:
            values[name] = value

        with self.hooks([(name, keep) for name in select_names(names, reached, where)]):
            output = cast(Tensor, self(prompts, stop_at_layer=stop_at_layer, **forward))
        return output, ActivationCache(values, self)

    def _reached_names(self, n_layers: int, to_the_end: bool) -> list[str]:
        unreached = {f"blocks.{layer}" for layer in range(n_layers, self.config.n_layers)}
        names = [name for name in self.hook_names() if ".".join(name.split(".")[:2]) not in unreached]
        return names if to_the_end else [name for name in names if not name.startswith(("ln_final", "unembed"))]

    def generate(self, prompts: Prompts, max_new_tokens: int = 20, **options: Unpack[GenerateOptions]) -> Generation:
        """Continue one or several prompts; see `subcircuit.engine.generate.generate`."""
        return generate(self, prompts, max_new_tokens, **options)

    def unembed_normed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of a residual stream: final norm, then unembedding."""
        return F.linear(self.ln_final(resid), self.unembed_weight)


def _modules(config: ModelConfig) -> dict[str, nn.Module | None]:
    """The model's parts by name, with parameters that have a shape but no memory yet."""
    with torch.device("meta"):
        return {
            "embed": nn.Embedding(config.d_vocab, config.d_model),
            "pos_embed": nn.Embedding(config.n_ctx, config.d_model) if config.positions == "learned" else None,
            "blocks": nn.ModuleList([Block(config) for _ in range(config.n_layers)]),
            "ln_final": Norm(config),
            "unembed": None if config.tied_unembed else nn.Linear(config.d_model, config.d_vocab, bias=False),
        }


def _check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise ConfigError(f"tensor {name!r} is missing; expected shape {shape}")
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(f"tensor {name!r} has shape {tuple(tensors[name].shape)}; expected {shape}")
    extra = sorted(set(tensors) - set(shapes))
    if extra:
        raise ConfigError(f"tensor {extra[0]!r} is not a parameter of this model")
    dtype = tensors["embed.weight"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ConfigError(f"tensor {name!r} is {tensor.dtype}; expected one floating-point dtype for all tensors")
