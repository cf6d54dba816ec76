"""Perturbation search: change the params at random, keep what lowers the loss, else revert.

Step `t` of chain `c` proposes `params + scale * noise`, the noise standard normal on every
number, drawn from a key that depends on the search's key, `c` and `t` alone. The chain accepts a
proposal whose loss is strictly lower. The options make a family of methods from these pieces:

    hill climbing                      the default; Juels and Wattenberg 1995
    (1+1) evolution strategy           `scale=moves.one_fifth(...)`; Rechenberg 1973
    (1+lambda)                         `num_proposals`: the best of several stands for the step
    simulated annealing                `temperature`: Kirkpatrick, Gelatt and Vecchi 1983
    restarts, one-coordinate moves     `patience=moves.restart(...)`, `propose_fn`

`jaxnn.chains.kernel` writes one step out, `jaxnn.chains.lookahead` is the same chain, faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.chains.history import AcceptedSteps, ChainHistory, finalize
from jaxnn.chains.kernel import (
    OneFifth,
    Problem,
    Restart,
    State,
    as_problem,
    chain_key,
    initial_scale,
    unravel_state,
)
from jaxnn.chains.lookahead import best_params, run_chains
from jaxnn.optim.schedules import Schedule
from jaxnn.run.checkpoint import Checkpoint, check_saveable
from jaxnn.run.checks import (
    as_batch,
    as_count,
    as_devices,
    as_key,
    as_params,
    check_concrete,
    shapes_of,
)
from jaxnn.run.fingerprint import run_metadata
from jaxnn.run.loop import (
    Callback,
    Improvement,
    as_limits,
    as_target,
    improvements_of,
    metric_of,
    told,
    watch_interrupts,
)
from jaxnn.run.programs import own_settings
from jaxnn.run.show import Table, readable, summary
from jaxnn.typing import Device, LossFn, MetricFn, ProposeFn, PyTree, Status


@readable
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
        state: the last state of every chain, with a leading axis of `num_chains`, or of 1:
            `state.best_params`, `state.best_loss` and so on, see `jaxnn.chains.State`. The step
            of `jaxnn.chains.perturbation_kernel` goes on from the state of a chain.
    """

    params: PyTree
    loss: float
    num_evaluations: int
    num_accepted: int
    status: Status
    history: ChainHistory
    accepted_steps: AcceptedSteps
    state: State

    def improvements(self) -> list[Improvement]:
        """Return the improvements of the chain that found the best; `print` each for a line.

        They are as many as `accepted_steps` and the history keep; a metric that the history
        left out is nan.
        """
        losses, history = np.asarray(self.state.best_loss), self.history
        chain, steps = np.argmin(losses), int(self.state.step[0])
        proposals = (self.num_evaluations // len(losses) - 1) // max(steps, 1)
        own = self.accepted_steps.chain == chain
        evaluations = 1 + proposals * (self.accepted_steps.step[own] + 1)
        metrics = None
        if history.proposed_metric is not None:
            recorded = np.atleast_2d(history.proposed_metric)[chain]
            here = np.isin(evaluations, history.evaluations)
            metrics = np.full(len(evaluations), np.nan)
            metrics[here] = recorded[np.searchsorted(history.evaluations, evaluations[here])]
        return improvements_of(evaluations, self.accepted_steps.loss[own], metrics)

    def _table(self) -> Table:
        """The summary."""
        losses, steps = np.asarray(self.state.best_loss), int(np.sum(self.state.step))
        details, notes = {"steps": f"{steps:,}, accepted {self.num_accepted:,}"}, []
        if (metric := self.history.current_metric) is not None and metric.size:
            best = np.atleast_2d(metric)[np.argmin(losses), -1]
            details["metric"] = f"{best:.6g} where the best chain ended"
        if steps and not self.num_accepted:
            notes = ["no step was accepted: the params are the start; try a smaller scale"]
        several = f" of {len(losses):,} chains" * (len(losses) > 1)
        measured = self.status, losses if several else self.loss, self.num_evaluations
        hint = "result.params, result.history, result.accepted_steps"
        return summary(
            f"perturbation search{several}", *measured, details=details, notes=notes, hint=hint
        )


def perturbation_search(
    key: jax.Array,
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_steps: int,
    scale: float | Schedule | OneFifth,
    num_chains: int | None = None,
    num_proposals: int = 1,
    propose_fn: ProposeFn | None = None,
    temperature: float | Schedule | None = None,
    patience: int | Restart | None = None,
    metric_fn: MetricFn | None = None,
    target_loss: float | None = None,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Device] | None = None,
    progress: bool | Literal["lines"] = False,
) -> PerturbationSearchResult:
    """Lower the loss from `params` by random steps, in one chain or in several side by side.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        params: where every chain starts, any pytree of floats.
        batch: any pytree that the loss takes.
        num_steps: steps of each chain; 0 returns the start.
        scale: standard deviation of the noise on every number, above 0; a schedule of it, such
            as `jaxnn.schedules.exponential_decay(0.5, 0.01, num_steps)`; or
            `jaxnn.moves.one_fifth(initial)`, which follows the success of the steps.
        num_chains: how many independent chains; each is the same however many there are. By
            default one, without a leading axis in the history.
        num_proposals: proposals of each step; the best one stands for the step.
        propose_fn: `propose_fn(key, params, scale)` -> params, in place of the normal noise.
        temperature: by default only a strictly lower loss is accepted. With 0.0 an equal loss is
            accepted too. With a number above 0, or a schedule, a loss that is higher by `rise` is
            accepted with probability `exp(-rise / temperature)`: Metropolis' rule.
        patience: the search ends, status "converged", when all chains have gone this many steps
            without a lower loss; or `jaxnn.moves.restart(sample_fn, patience)`: a chain that has
            starts anew from other params.
        metric_fn: `metric_fn(params, batch)` -> a float scalar, recorded for every proposal and
            for the chain after every step; `model.accuracy` for instance.
        target_loss: the search ends with the first step at or below, status "reached".
        max_seconds: the search ends when these are over, status "stopped".
        callback: called with a `Progress` some four times a second, or as `jaxnn.Every` says; a
            `StopIteration` that it raises ends the search, status "stopped".
        checkpoint: a file to save to every half minute and at the end; the history is saved
            beside it (`run.history.npz`). If it is there already, the search goes on from it, and
            refuses one whose functions, data or settings compute anything else.
        devices: the devices that share the chains, all local ones by default. The result is the
            same, bit for bit, however many there are.
        progress: whether to show a progress bar; "lines" prints a line when the loss has fallen,
            some four times a second at most.

    Returns:
        A `PerturbationSearchResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or a function returns the wrong kind.
        ValueError: if a number is out of range, or the checkpoint of another search or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> start, batch = jnp.zeros(2), jnp.ones(2)
        >>> key = jax.random.key(0)
        >>> found = perturbation_search(key, loss_fn, start, batch, num_steps=2_000, scale=0.05)
        >>> found.loss < 0.001
        True
    """
    key = as_key("key", key)
    num_steps = as_count("num_steps", num_steps, maximum=2**32 - 1)
    width = 1 if num_chains is None else as_count("num_chains", num_chains, 1, 2**31 - 1)
    check_concrete("scale", scale)
    check_concrete("temperature", temperature)
    restart = patience if isinstance(patience, Restart) else None
    if patience is not None and restart is None:
        patience = as_count("patience", patience, 1, 2**32 - 1)
    start = as_params(params)
    batch = as_batch(batch, params, *(f for f in (loss_fn, metric_fn) if f is not None))
    options = scale, num_proposals, propose_fn, temperature, restart, metric_fn
    problem = as_problem(loss_fn, start, batch, *options)
    loss = shapes_of("loss_fn", problem.loss, start, batch)
    target_loss = as_target(target_loss, loss.dtype)
    limits = as_limits(max_seconds, callback, progress, metric_of(metric_fn, batch))
    devices = as_devices(devices)
    with own_settings(), watch_interrupts() as is_interrupted:
        saved = None
        if checkpoint is not None:
            check_saveable((start, loss))
            saved = Checkpoint(Path(checkpoint), _metadata(key, problem, width, patience))
        last, status, (history, accepted_steps) = run_chains(
            problem,
            jax.vmap(chain_key, (None, 0))(key, jnp.arange(width, dtype=jnp.uint32)),
            num_steps,
            devices,
            target_loss,
            None if isinstance(patience, Restart) else patience,
            limits._replace(is_interrupted=is_interrupted),
            saved,
        )
        chains, best = last.chains, best_params(start, last.chains)
        if status in ("completed", "converged") and best is None:
            status = "nonfinite"
        result = PerturbationSearchResult(
            params=start if best is None else best,
            loss=float(np.min(chains.best_loss)),
            num_evaluations=width * (problem.num_proposals * last.num_steps + 1),
            num_accepted=int(np.sum(chains.num_accepted, dtype=np.int64)),
            status=status,
            history=finalize(history, problem, one_chain=num_chains is None),
            accepted_steps=accepted_steps,
            state=jax.vmap(lambda state: unravel_state(start, state))(chains),
        )
        return told(result, is_interrupted)


def _metadata(
    key: jax.Array, problem: Problem, num_chains: int, patience: int | Restart | None
) -> dict[str, object]:
    """What a search that goes on from a checkpoint has to share with the one that saved it."""
    rows, step = (problem.params, problem.batch), jax.ShapeDtypeStruct((), jnp.float32)
    restart = problem.restart
    functions = {
        "scale": (initial_scale(problem), (step,), None),
        "temperature": (problem.temperature, (step,), None),
        "propose_fn": (problem.propose, (key, problem.params, step), (0, 0, 0)),
        "sample_fn": (restart and restart.sample, (key,), (0,)),
        "metric_fn": (problem.metric, rows, (0, None)),
        "loss_fn": (problem.loss, rows, (0, None)),
    }
    data = {"params": problem.params, "batch": problem.batch}
    return run_metadata("perturbation_search", key, data, functions) | {
        "num_chains": num_chains,
        "num_proposals": problem.num_proposals,
        "accepts_ties": problem.accepts_ties,
        "one_fifth": isinstance(problem.scale, OneFifth),
        "patience": int(restart.patience) if restart else patience,
    }
