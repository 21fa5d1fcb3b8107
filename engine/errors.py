"""The errors subcircuit raises for bad input.

Each message is one line that says what is wrong, where, and what was expected; the command line prints it and exits
with status 2.
"""

from __future__ import annotations


class SubcircuitError(Exception):
    """Base of every error that a user's input can cause."""


class ConfigError(SubcircuitError):
    """A model configuration that contradicts itself or asks for a variant the engine does not have."""


class HookError(SubcircuitError):
    """A hook name that does not exist, never fired, or a hook that returned the wrong shape."""


class NotCachedError(HookError, KeyError):
    """An activation that a cache does not hold. A KeyError too, so that `in` and `get` of a mapping work."""

    __str__ = Exception.__str__


class WeightsError(SubcircuitError):
    """A file or tensor that is missing, corrupted, wrongly shaped or not finite, or a model that is not known."""


class TokenizerError(SubcircuitError):
    """A tokenizer that cannot be built, or text or ids that it cannot take."""


class PromptError(SubcircuitError):
    """A prompt that is empty, too long for the model's context, not aligned, or holds an id outside the vocabulary."""


class TaskError(SubcircuitError):
    """A task that cannot be built for this tokenizer, or prompts that are not aligned."""


class PatchError(SubcircuitError):
    """A component, position or source that does not exist in this model or data set."""


class StoreError(SubcircuitError):
    """A run directory that cannot be read, or that belongs to another run."""


class BenchError(SubcircuitError):
    """A benchmark that cannot be run: an unknown contestant or scenario, or a process of our own that failed."""
