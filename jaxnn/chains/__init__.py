"""Perturbation search, step by step: a chain as pure functions, for loops of one's own."""

from __future__ import annotations

from jaxnn.chains.history import AcceptedSteps, ChainHistory
from jaxnn.chains.kernel import Info, Kernel, State, chain_key, perturbation_kernel
from jaxnn.run.programs import COMPILER_OPTIONS

__all__ = [
    "COMPILER_OPTIONS",
    "AcceptedSteps",
    "ChainHistory",
    "Info",
    "Kernel",
    "State",
    "chain_key",
    "perturbation_kernel",
]
