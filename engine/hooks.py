"""Hook points: their names, and the table of functions that are set on them.

A hook point is a name in the forward pass. Setting a function on it lets the function read the value there, or replace
it by what it returns. Names, shapes and values are those of TransformerLens 3.9.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from subcircuit.engine.config import ModelConfig
from subcircuit.engine.errors import HookError

HookFunction = Callable[[Tensor, str], Tensor | None]
"""Takes (value, hook name); returns the value to go on with, or None to leave it as it is."""

Hook = tuple[str, HookFunction]

NameFilter = str | Sequence[str] | Callable[[str], bool] | None
"""Hook names, shell-style patterns of them (`blocks.*.attn.hook_z`), a predicate, or None for every standard one."""

# Computed only for whoever names them: they cost a copy of the residual stream per head, or nothing else reads them.
ON_REQUEST = ("hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")


def hook_names(config: ModelConfig) -> tuple[str, ...]:
    """Every hook point of a model, in the order in which a forward pass reaches them."""
    names = ["hook_embed"] + (["hook_pos_embed"] if config.positions == "learned" else [])
    for layer in range(config.n_layers):
        names += [f"blocks.{layer}.{name}" for name in _block_hook_names(config)]
    return (*names, "ln_final.hook_scale", "ln_final.hook_normalized")


def _block_hook_names(config: ModelConfig) -> list[str]:
    names = ["hook_resid_pre", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]
    names += ["ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v"]
    names += ["attn.hook_rot_q", "attn.hook_rot_k"] if config.positions == "rope" else []
    names += ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result"]
    names += ["hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized"]
    names += ["mlp.hook_pre"] + (["mlp.hook_pre_linear"] if config.gated_mlp else [])
    return [*names, "mlp.hook_post", "hook_mlp_out", "hook_resid_post"]


def select_names(names: NameFilter, available: Sequence[str]) -> list[str]:
    """The available hook names that a filter means, in forward order.

    Raises HookError for a name or pattern that no hook point has, with the closest one.
    """
    if names is None:
        return [name for name in available if not name.endswith(ON_REQUEST)]
    if callable(names):
        chosen = {name for name in available if names(name)}
        if not chosen:
            raise HookError("the names filter accepts none of the model's hook points; see model.hook_names()")
    else:
        chosen = set()
        for pattern in [names] if isinstance(names, str) else names:
            found = {pattern} & set(available) or set(fnmatch.filter(available, pattern))
            if not found:
                raise HookError(f"no hook point {pattern!r} in this model{_closest(pattern, available)}")
            chosen |= found
    return [name for name in available if name in chosen]


def _closest(name: str, available: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, available, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "; see model.hook_names()"


class HookTable:
    """The functions set on a model's hook points right now. The forward pass calls it with each name and value."""

    def __init__(self) -> None:
        self._forward: dict[str, list[HookFunction]] = {}
        self._backward: dict[str, list[HookFunction]] = {}
        self._fired: set[str] = set()

    def wants(self, *names: str) -> bool:
        """Whether any of these hook points has a function, so that the forward pass must form its value."""
        return any(name in self._forward or name in self._backward for name in names)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self._forward:
            self._fired.add(name)
            for function in self._forward[name]:
                value = _replaced(name, value, function(value, name))
        if name in self._backward:
            self._fired.add(name)
            if not value.requires_grad:
                value.requires_grad_()
            for function in self._backward[name]:
                value.register_hook(lambda grad, function=function: function(grad, name))
        return value

    def observe(self, name: str, value: Tensor) -> Tensor:
        """Show a value that nothing downstream reads. Raises HookError when a hook would replace it in vain."""
        if self(name, value) is not value:
            raise HookError(f"hook on {name!r} replaces a value that nothing reads while split inputs are hooked")
        return value

    @contextmanager
    def set(self, hooks: Iterable[Hook], backward_hooks: Iterable[Hook] = ()) -> Iterator[None]:
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
