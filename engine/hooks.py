"""Hook points: their names, and the table of functions that are set on them.

A hook point is a name in the forward pass. Setting a function on it lets the function read the value there, or replace
it by what it returns. Names, shapes and values are those of TransformerLens 3.9.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.dictionary import SparseDictionary, acts_name
from subcircuit.engine.errors import HookError

HookFunction = Callable[[Tensor, str], Tensor | None]
"""Takes (value, hook name); returns the value to go on with, or None to leave it as it is."""

NamePredicate = Callable[[str], bool]

Hook = tuple[str | NamePredicate, HookFunction]
"""Where (a hook name, a shell-style pattern of names, or a predicate), and what to do there."""

NamedHook = tuple[str, HookFunction]
"""A hook on one point, by its name."""

NameFilter = str | Sequence[str] | NamePredicate | None
"""Hook names, shell-style patterns of them (`blocks.*.attn.hook_z`), a predicate, or None for every standard one."""

# Computed only for whoever names them: most cost a copy of the residual stream (per head), and the unembedding's output
# is as large as the logits because it is the logits.
ON_REQUEST = (
    "attn.hook_result",
    "hook_attn_in",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "hook_mlp_in",
    "unembed.hook_in",
    "unembed.hook_out",
)


def hook_names(config: ModelConfig) -> tuple[str, ...]:
    """Every hook point of a model, in the order in which a forward pass reaches them."""
    names = ["hook_embed"] + (["hook_pos_embed"] if config.positions == "learned" else [])
    for layer in range(config.n_layers):
        names += [f"blocks.{layer}.{name}" for name in _block_hook_names(config)]
    return (*names, "ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out")


def _block_hook_names(config: ModelConfig) -> list[str]:
    names = ["hook_resid_pre", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]
    names += ["ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v"]
    names += ["attn.hook_rot_q", "attn.hook_rot_k"] if config.positions == "rope" else []
    names += ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result"]
    names += ["hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized"]
    names += ["mlp.hook_pre"] + (["mlp.hook_pre_linear"] if config.gated_mlp else [])
    return [*names, "mlp.hook_post", "hook_mlp_out", "hook_resid_post"]


def select_names(names: NameFilter, available: Sequence[str], where: str = "in this model") -> list[str]:
    """The available hook names that a filter means, in forward order.

    A pattern that matches standard points means these alone: `blocks.0.*` leaves out what is computed on request, and
    `blocks.*.attn.hook_result` names it.

    Raises HookError for a name or pattern that no hook point has, with the closest one.
    """
    if names is None:
        return _standard(available)
    if callable(names):
        chosen = {name for name in available if names(name)}
        if not chosen:
            raise HookError("the names filter accepts none of the model's hook points; see model.hook_names()")
    else:
        chosen = set()
        for pattern in [names] if isinstance(names, str) else names:
            found = [pattern] if pattern in available else fnmatch.filter(available, pattern)
            if not found:
                raise HookError(f"no hook point {pattern!r} {where}{_closest(pattern, available)}")
            chosen |= set(_standard(found) or found)
    return [name for name in available if name in chosen]


def _standard(names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.endswith(ON_REQUEST)]


def _closest(name: str, available: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, available, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "; see model.hook_names()"


class HookTable:
    """The functions set on a model's hook points right now. The forward pass calls it with each name and value.

    A dictionary that sits at a hook point gives it another one, for its features: while that has a function, the value
    is taken apart into features and error, and put together again.
    """

    def __init__(self, dictionaries: Mapping[str, SparseDictionary] | None = None) -> None:
        self.dictionaries = dict(dictionaries or {})
        self._forward: dict[str, list[HookFunction]] = {}
        self._backward: dict[str, list[HookFunction]] = {}
        self._fired: set[str] = set()

    def __deepcopy__(self, memo: dict[int, object]) -> HookTable:
        """A copied model starts without the hooks that happen to be set on the original."""
        return HookTable(self.dictionaries)

    def wants(self, *names: str) -> bool:
        """Whether any of these hook points has a function, so that the forward pass must form its value."""
        return any(name in self._forward or name in self._backward or self._wants_features(name) for name in names)

    def _wants_features(self, name: str) -> bool:
        return name in self.dictionaries and self.wants(acts_name(name))

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if not self.wants(name):
            return value
        self._fired.add(name)
        for function in tuple(self._forward.get(name, ())):
            value = _replaced(name, value, function(value, name))
        if self._wants_features(name):
            value = self.dictionaries[name].spliced(value, partial(self, acts_name(name)))
        backward = tuple(self._backward.get(name, ()))
        if backward and not torch.is_grad_enabled():
            raise HookError(f"backward hook on {name!r} cannot fire: gradients are off here (torch.no_grad)")
        if backward:
            # The same memory under another tensor: hook points that share a value get the gradient one after the other,
            # and a tensor that a hook returned stays the user's own.
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        for function in backward:
            value.register_hook(lambda grad, function=function: _replaced(name, grad, function(grad, name)))
        return value

    def observe(self, name: str, value: Tensor) -> Tensor:
        """Show a value that nothing downstream reads. Raises HookError when a hook would act on it in vain."""
        version = None if value.is_inference() else value._version
        acts = name in self._backward or self(name, value) is not value
        if acts or (version is not None and value._version != version):
            raise HookError(f"hook on {name!r} can only read while split inputs are hooked: each head has its own norm")
        return value

    @contextmanager
    def set(self, hooks: Iterable[NamedHook], backward_hooks: Iterable[NamedHook] = ()) -> Iterator[None]:
        """Set functions for the duration of a block.

        Raises HookError at its end for a hook point that no forward pass in the block reached.
        """
        forward, backward = list(hooks), list(backward_hooks)
        fired_before, self._fired = self._fired, set()
        try:
            for table, pairs in ((self._forward, forward), (self._backward, backward)):
                for name, function in pairs:
                    table.setdefault(name, []).append(function)
            yield
            silent = [name for name, _ in forward + backward if name not in self._fired]
            if silent:
                raise HookError(f"hook on {silent[0]!r} never fired: no forward pass reached it")
        finally:
            for table, pairs in ((self._forward, forward), (self._backward, backward)):
                for name, function in pairs:
                    _remove(table, name, function)
            self._fired |= fired_before


def _remove(table: dict[str, list[HookFunction]], name: str, function: HookFunction) -> None:
    functions = table.get(name, [])
    if function in functions:
        # The last one set goes first: a nested block may have set the same function again.
        del functions[len(functions) - 1 - functions[::-1].index(function)]
    if not functions:
        table.pop(name, None)


def _replaced(name: str, value: Tensor, result: Tensor | None) -> Tensor:
    if result is None:
        return value
    if not isinstance(result, Tensor):
        raise HookError(f"hook on {name!r} returned {type(result).__name__}; expected a tensor or None")
    if result.shape != value.shape:
        raise HookError(f"hook on {name!r} returned shape {tuple(result.shape)}; expected {tuple(value.shape)}")
    return result
