"""Small neural networks trained by random search, perturbation search and gradient descent.

Networks and trainers meet through callables. `jaxnn.model` is pure functions of params and knows
no trainer; `jaxnn.search`, `jaxnn.chains` and `jaxnn.descent` train any params pytree by any loss.

    model = jaxnn.mlp((2, 3, 3))
    found = jaxnn.random_search(key, model.loss, model.sampler(scale=4.0), batch, ...)
    climbed = jaxnn.perturbation_search(key, model.loss, params, batch, ...)
    trained = jaxnn.gradient_descent(key, model.value_and_grad, params, batch, ...)
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from jaxnn import chains, datasets, descent, metrics, search, typing
from jaxnn.batch import Batch
from jaxnn.chains import moves
from jaxnn.chains.moves import calibrated_temperature
from jaxnn.chains.perturbation_search import PerturbationSearchResult, perturbation_search
from jaxnn.descent.gradient_descent import GradientDescentResult, gradient_descent
from jaxnn.gradients.check import GradientReport, check_gradients
from jaxnn.gradients.counterexample import Counterexample
from jaxnn.gradients.coverage import Branch, Coverage
from jaxnn.gradients.differences import DifferenceErrors, difference_errors
from jaxnn.gradients.estimate import perturbation_gradient
from jaxnn.gradients.invariants import Invariant
from jaxnn.gradients.leaves import LeafReport
from jaxnn.gradients.power import PlantedFault, Power
from jaxnn.gradients.second_order import check_hvp, check_jacobian
from jaxnn.model import activations, losses
from jaxnn.model.layers import Dense, forward
from jaxnn.model.mlp import Model, mlp
from jaxnn.model.saving import SavedModel, load, save
from jaxnn.optim import optimizers, schedules
from jaxnn.run.checkpoint import SavedProgress, saved_progress
from jaxnn.run.loop import Every, Improvement, Progress
from jaxnn.search.engine import candidate_params
from jaxnn.search.merge import merge_searches
from jaxnn.search.outcomes import OutcomeCounts, count_outcomes
from jaxnn.search.random_search import random_search
from jaxnn.search.rare_event_result import RareEventSearchResult
from jaxnn.search.rare_event_search import log_evidence, rare_event_search
from jaxnn.search.result import RandomSearchResult, expected_best
from jaxnn.search.statistics import Collect
from jaxnn.tables import Columns

if TYPE_CHECKING:
    from jaxnn import plotting

__all__ = [
    "Batch",
    "Branch",
    "Collect",
    "Columns",
    "Counterexample",
    "Coverage",
    "Dense",
    "DifferenceErrors",
    "Every",
    "GradientDescentResult",
    "GradientReport",
    "Improvement",
    "Invariant",
    "LeafReport",
    "Model",
    "OutcomeCounts",
    "PerturbationSearchResult",
    "PlantedFault",
    "Power",
    "Progress",
    "RandomSearchResult",
    "RareEventSearchResult",
    "SavedModel",
    "SavedProgress",
    "activations",
    "calibrated_temperature",
    "candidate_params",
    "chains",
    "check_gradients",
    "check_hvp",
    "check_jacobian",
    "count_outcomes",
    "datasets",
    "descent",
    "difference_errors",
    "expected_best",
    "forward",
    "gradient_descent",
    "load",
    "log_evidence",
    "losses",
    "merge_searches",
    "metrics",
    "mlp",
    "moves",
    "optimizers",
    "perturbation_gradient",
    "perturbation_search",
    "plotting",
    "random_search",
    "rare_event_search",
    "save",
    "saved_progress",
    "schedules",
    "search",
    "typing",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `jaxnn.plotting`, and with it matplotlib, when it is first asked for."""
    if name == "plotting":
        return import_module("jaxnn.plotting")
    raise AttributeError(f"module 'jaxnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
