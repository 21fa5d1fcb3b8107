"""Activation patching: rows, sites and sources as values, and the executors that run them."""

from subcircuit.engine.patching.data_session import Effects
from subcircuit.engine.patching.session import DeltaSession, patch_effects
from subcircuit.engine.patching.sites import Component, Patch, PatchSet, Site, Source

__all__ = ["Component", "DeltaSession", "Effects", "Patch", "PatchSet", "Site", "Source", "patch_effects"]
