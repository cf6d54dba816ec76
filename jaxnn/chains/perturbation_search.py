"""Perturbation search: nudge the weights at random, keep what lowers the loss, else revert.

Step `t` of chain `c` proposes `params + scale * noise`, the noise standard normal on every
number, drawn from a key that depends on the search's key, `c` and `t` alone. A proposal is
accepted if its loss is strictly lower. From these pieces a family is made:

    hill climbing, the chapter's       the default; Juels and Wattenberg 1995
    (1+1) evolution strategy           `adapt_scale`: the one-fifth rule, Rechenberg 1973
    (1+lambda)                         `num_proposals`: the best of several stands for the step
    simulated annealing                `temperature`: Kirkpatrick, Gelatt and Vecchi 1983
    restarts, one-coordinate moves     `patience` with `restart_fn`, `propose_fn`

The chains are exact and evaluated ahead; see `jaxnn.chains.lookahead`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnn.chains.history import AcceptedSteps, ChainHistory, as_history
from jaxnn.chains.kernel import Layout, Problem
from jaxnn.chains.lookahead import ChainRules, Climbed, walk_chains
from jaxnn.optim.schedules import Schedule, as_schedule, values_at
from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.checks import (
    as_batch,
    as_count,
    as_flag,
    as_key,
    as_optional,
    as_params,
    as_partial,
    check_scalar,
    shapes_of,
)
from jaxnn.run.fingerprint import fingerprint, function_metadata, key_metadata
from jaxnn.run.loop import Progress, as_limits, as_target, summary, told, watch_interrupts
from jaxnn.run.programs import own_settings
from jaxnn.typing import LossFn, MetricFn, SampleFn, Status, traits_of

TAG = 0x50455254
"""Folded into the key, so that no other trainer draws the same from it."""

MOST_AT_ONCE = 2**12


class PerturbationSearchResult(NamedTuple):
    """What a perturbation search found; printed, it is a summary of a few lines.

    Attributes:
        params: the best params that any chain has been at; the start, if no loss was finite.
        loss: their loss; inf if none was finite.
        num_evaluations: losses evaluated, the start's included:
            `num_chains * (num_proposals * steps + 1)`.
        num_accepted: steps accepted, over all chains.
        status: "completed", "converged", "interrupted", "reached", "stopped" or "nonfinite".
        history: the steps of every chain.
        accepted_steps: every accepted step with its loss.
        chain_params: every chain's best params, with a leading axis of `num_chains`, or of 1.
        chain_loss: their losses, `(num_chains,)`, or `(1,)`.
        chain_num_accepted: steps that each chain accepted, `(num_chains,)`, or `(1,)`, int64.
    """

    params: Any
    loss: float
    num_evaluations: int
    num_accepted: int
    status: Status
    history: ChainHistory
    accepted_steps: AcceptedSteps
    chain_params: Any
    chain_loss: np.ndarray
    chain_num_accepted: np.ndarray

    def __str__(self) -> str:
        """The summary."""
        chains = len(self.chain_loss)
        details = {"accepted": f"{self.num_accepted:,} steps"}
        if chains > 1:
            details["chains"] = f"{chains:,}, median loss {np.median(self.chain_loss):.6g}"
        return summary(
            "perturbation search", self.status, self.loss, self.num_evaluations, details=details
        )


def perturbation_search(
    key: jax.Array,
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    *,
    num_steps: int,
    scale: float | Schedule,
    num_chains: int | None = None,
    num_proposals: int = 1,
    propose_fn: ProposeFn | None = None,
    adapt_scale: bool = False,
    accept_ties: bool = False,
    temperature: float | Schedule | None = None,
    patience: int | None = None,
    restart_fn: SampleFn | None = None,
    metric_fn: MetricFn | None = None,
    state_metric_fn: MetricFn | None = None,
    record_every: int | None = None,
    target_loss: float | None = None,
    max_seconds: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    look_ahead: int | None = None,
    progress: bool = False,
) -> PerturbationSearchResult:
    """Climbs down from `params` by random steps, one chain or several side by side.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        params: where every chain starts, any pytree of floats.
        batch: any pytree that the loss takes.
        num_steps: steps of each chain; 0 returns the start.
        scale: standard deviation of the noise on every number, above 0; or a schedule of it,
            such as `jaxnn.schedules.exponential_decay(0.5, 0.01, num_steps)`.
        num_chains: how many independent chains; each is the same however many there are. By
            default one, without a leading axis in the history.
        num_proposals: proposals of each step; the best of them is judged.
        propose_fn: `propose_fn(key, params, scale)` -> params, in place of the normal noise.
        adapt_scale: whether the scale is multiplied by 2 with each step that lowers the loss and
            divided by 2^(1/4) with each that does not, which holds one in five successful; it
            stays within a factor of 2^50 of what it was.
        accept_ties: whether a proposal with the same loss is accepted.
        temperature: accepts a worse proposal with probability `exp(-rise / temperature)` too; a
            number above 0 or a schedule.
        patience: steps without a lower loss after which a chain starts anew from `restart_fn`;
            without one, the search ends when all chains have gone so long, status "converged".
        restart_fn: `restart_fn(key)` -> params; as `model.sampler(scale=...)`.
        metric_fn: `metric_fn(params, batch)` -> a scalar, recorded for every proposal, as the
            chapter records the accuracy; `model.accuracy` for instance.
        state_metric_fn: the same, recorded for what is accepted only, which costs next to
            nothing: the loss on a validation batch that the function holds itself, for instance.
        record_every: which steps to keep in the history: every one, every second and so on. By
            default every one, or of long runs every second, fourth and so on, so that the history
            takes at most 768 MiB.
        target_loss: the search ends with the first step at or below, status "reached".
        max_seconds: the search ends when these are over, status "stopped".
        callback: called with a `Progress` after every chunk, some four times a second; a
            `StopIteration` that it raises ends the search, status "stopped".
        checkpoint: a file to save to every half minute and at the end; the history is saved
            beside it (`run.history.npz`). If it is there already, the search goes on from it, and
            refuses one whose functions, data or settings compute anything else.
        look_ahead: steps to score at once from one parent; by default it follows from how rare
            acceptance is. It changes the pace and nothing else.
        progress: whether to show a progress bar.

    Returns:
        A `PerturbationSearchResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the loss not a float scalar.
        ValueError: if a number is out of range, or the checkpoint of another search or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> start, batch = jnp.zeros(2), jnp.ones(2)
        >>> key = jax.random.key(0)
        >>> climbed = perturbation_search(key, loss_fn, start, batch, num_steps=2_000, scale=0.05)
        >>> climbed.loss < 0.001
        True
    """
    key = as_key("key", key)
    num_steps = as_count("num_steps", num_steps, maximum=2**32 - 1)
    width = 1 if num_chains is None else as_count("num_chains", num_chains, 1, 2**31 - 1)
    if record_every is not None:
        record_every = as_count("record_every", record_every, 1, 2**32 - 1)
    if look_ahead is not None:
        look_ahead = as_count("look_ahead", look_ahead, 1, MOST_AT_ONCE)
    start = as_params(params)
    functions = [f for f in (loss_fn, metric_fn, state_metric_fn) if f is not None]
    problem = Problem(
        loss=as_partial("loss_fn", loss_fn),
        batch=as_batch(batch, params, *functions),
        template=start,
        scale=as_schedule("scale", scale),
        temperature=None if temperature is None else as_schedule("temperature", temperature),
        propose=as_optional("propose_fn", propose_fn),
        restart=as_optional("restart_fn", restart_fn),
        patience=None if patience is None else as_count("patience", patience, 1, 2**32 - 1),
        metric=as_optional("metric_fn", metric_fn),
        state_metric=as_optional("state_metric_fn", state_metric_fn),
    )
    layout = Layout(
        depth=1,
        num_proposals=as_count("num_proposals", num_proposals, 1, MOST_AT_ONCE),
        ties=as_flag("accept_ties", accept_ties),
        adapts=as_flag("adapt_scale", adapt_scale),
        block=block_of(
            loss_fn,
            start,
            problem.batch,
            draws=propose_fn is not None or restart_fn is not None,
        ),
        capacity=1,
    )
    dtypes = check_problem(problem, key)
    rules = ChainRules(
        as_target(target_loss, dtypes["loss_fn"]),
        problem.patience if restart_fn is None else None,
    )
    limits = as_limits(max_seconds, callback, progress)
    if problem.patience is not None:
        problem = problem._replace(patience=np.uint32(problem.patience))
    with own_settings(), watch_interrupts() as is_interrupted:
        stream = jax.random.fold_in(key, TAG)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, jnp.arange(width, dtype=jnp.uint32))
        saved = None
        if checkpoint is not None:
            metadata = facts_of(key, problem, layout, width, dtypes)
            saved = Checkpoint(Path(checkpoint), metadata)
        climbed = walk_chains(
            problem,
            keys,
            num_steps,
            layout,
            rules,
            limits._replace(is_interrupted=is_interrupted),
            saved,
            depth=look_ahead,
            record_every=record_every,
        )
        result = _result(problem, climbed, layout, one_chain=num_chains is None)
        return told(result, is_interrupted)


def _result(
    problem: Problem, climbed: Climbed, layout: Layout, *, one_chain: bool
) -> PerturbationSearchResult:
    state, temperature = climbed.state, problem.temperature
    history = as_history(
        climbed.pieces,
        layout.num_proposals,
        partial(values_at, problem.scale),
        None if temperature is None else partial(values_at, temperature),
        one_chain=one_chain,
    )
    best = int(np.argmin(state.best_loss))
    chain_params = jax.vmap(ravel_pytree(problem.template)[1])(jnp.asarray(state.best_flat))
    is_lost = climbed.status in ("completed", "converged") and not np.isfinite(
        state.best_loss[best]
    )
    return PerturbationSearchResult(
        params=jax.tree.map(lambda leaf: leaf[best], chain_params),
        loss=float(state.best_loss[best]),
        num_evaluations=len(state.loss) * (layout.num_proposals * climbed.num_steps + 1),
        num_accepted=int(np.sum(state.num_accepted, dtype=np.int64)),
        status="nonfinite" if is_lost else climbed.status,
        history=history,
        accepted_steps=climbed.pieces.listed,
        chain_params=chain_params,
        chain_loss=state.best_loss,
        chain_num_accepted=state.num_accepted.astype(np.int64),
    )


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
