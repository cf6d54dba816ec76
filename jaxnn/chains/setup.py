"""What a perturbation search is asked for: checked before it is compiled, named when saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.chains.lookahead import Layout
from jaxnn.chains.proposals import Problem
from jaxnn.run.checks import check_scalar, shapes_of
from jaxnn.run.fingerprint import fingerprint, function_metadata, key_metadata
from jaxnn.typing import LossFn, traits_of

BLOCK_BYTES, MOST_IN_A_BLOCK = 2**22, 32


class ProposeFn(Protocol):
    """A move of one's own."""

    def __call__(self, key: jax.Array, params: Any, scale: jax.Array) -> Any:
        """Returns params like `params`, all randomness from `key`, the step size `scale`."""
        ...


def check_problem(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """Refuses functions that return what they should not; returns the dtypes, by name."""
    if problem.restart is not None and problem.patience is None:
        raise ValueError("patience must be given with restart_fn; got None")
    scalars = {
        "loss_fn": problem.loss,
        "metric_fn": problem.metric,
        "state_metric_fn": problem.state_metric,
    }
    dtypes = {"params": jax.tree.leaves(problem.template)[0].dtype}
    for name, function in scalars.items():
        if function is not None:
            result = shapes_of(name, function, problem.template, problem.batch)
            check_scalar(name, result)
            dtypes[name] = result.dtype
    if problem.propose is not None:
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        moved = shapes_of("propose_fn", problem.propose, key, problem.template, scale)
        _check_params("propose_fn", moved, problem.template)
    if problem.restart is not None:
        _check_params("restart_fn", shapes_of("restart_fn", problem.restart, key), problem.template)
    return dtypes


def _check_params(name: str, got: Any, wanted: Any) -> None:
    """Refuses params that are not like those of the start."""
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (got, wanted))
    if shapes[0] != shapes[1]:
        raise TypeError(f"{name} must return params like the start's, {shapes[1]}; got {shapes[0]}")


def block_of(loss_fn: LossFn, params: Any, batch: Any, *, draws: bool) -> int | None:
    """Losses to score side by side: as many as fit the caches; None for a loss that says any.

    Where functions of the user's own draw what is scored, they too must meet one width only.
    """
    traits = traits_of(loss_fn)
    if not draws and traits.batch_invariant(params, batch):
        return None
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    told = traits.candidate_bytes
    needed = 16 * size if told is None else told(params, batch)
    fitting = min(max(BLOCK_BYTES // max(needed, 1), 1), MOST_IN_A_BLOCK)
    return 2 ** (fitting.bit_length() - 1)


def facts_of(
    key: jax.Array,
    problem: Problem,
    layout: Layout,
    num_chains: int,
    dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """What whoever goes on with this search has to share."""
    for name, dtype in dtypes.items():
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"{name} must be of a NumPy float to be saved; got {dtype}: cast it")
    rows, step = (problem.template, problem.batch), jax.ShapeDtypeStruct((), jnp.float32)
    functions: dict[str, tuple[Any, tuple[Any, ...], tuple[int | None, ...] | None]] = {
        "scale": (problem.scale, (step,), None),
        "temperature": (problem.temperature, (step,), None),
        "propose_fn": (problem.propose, (key, problem.template, step), (0, 0, 0)),
        "restart_fn": (problem.restart, (key,), (0,)),
        "metric_fn": (problem.metric, rows, (0, None)),
        "state_metric_fn": (problem.state_metric, rows, (0, None)),
        "loss_fn": (problem.loss, rows, (0, None)),
    }
    return {
        "trainer": "perturbation_search",
        **key_metadata(key),
        "params": fingerprint(problem.template),
        "batch": fingerprint(problem.batch),
        "num_chains": num_chains,
        "num_proposals": layout.num_proposals,
        "accept_ties": layout.ties,
        "adapt_scale": layout.adapts,
        "patience": None if problem.patience is None else int(problem.patience),
        **{
            name: None if function is None else function_metadata(name, function, *args, axes=axes)
            for name, (function, args, axes) in functions.items()
        },
    }
