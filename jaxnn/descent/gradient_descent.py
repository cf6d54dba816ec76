"""Gradient descent: follow the gradient down, on all rows or on shuffled batches of them.

Each epoch shuffles the rows and cuts them into batches. For each batch: the loss and its
gradient, a look at the stop rules, then one step of the optimizer. After it, if there is a
validation batch, the loss on that. The whole loop is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.descent.history import Walked, walk
from jaxnn.descent.kernel import (
    CONVERGED,
    DIVERGED,
    REACHED,
    Cut,
    Rules,
    begin,
    descend,
    settle,
    update_of,
)
from jaxnn.descent.replicas import (
    Networks,
    begin_blocks,
    descend_blocks,
    in_blocks,
    per_network,
    placed,
    settle_blocks,
)
from jaxnn.optim.optimizers import (
    EXTRA_ARGUMENTS,
    Each,
    Optimizer,
    check_optimizer,
    each,
    sgd,
)
from jaxnn.run.checkpoint import Checkpoint, check_saveable
from jaxnn.run.checks import (
    as_batch,
    as_choice,
    as_count,
    as_devices,
    as_flag,
    as_key,
    as_params,
    as_partial,
    as_real,
    check_concrete,
    check_like_params,
    check_value_and_grad,
    shapes_of,
)
from jaxnn.run.fingerprint import (
    as_metadata,
    fingerprint,
    function_metadata,
    key_metadata,
    settings_of,
)
from jaxnn.run.loop import Progress, as_limits, as_target, summary, told, watch_interrupts
from jaxnn.run.programs import own_settings
from jaxnn.typing import Status, ValueAndGradFn, traits_of

TAG = 0x47524144
"""Folded into the key, so that no other trainer draws the same from it."""


def gradient_descent(
    key: jax.Array,
    value_and_grad_fn: ValueAndGradFn,
    params: Any,
    batch: Any,
    *,
    num_epochs: int,
    learning_rate: Any = None,
    optimizer: Optimizer | Each | None = None,
    num_networks: int | None = None,
    batch_size: int | None = None,
    drop_remainder: bool = True,
    tolerance: float = 0.0,
    tolerance_unit: Literal["epoch", "step"] = "epoch",
    gradient_tolerance: float | None = None,
    target_loss: float | None = None,
    validation_batch: Any = None,
    patience: int | None = None,
    record_every: int | None = None,
    max_seconds: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = False,
) -> GradientDescentResult:
    """Descends from `params`, full batch or mini-batch, with one network or with many.

    Args:
        key: a typed key, `jax.random.key(seed)`; it shuffles the rows.
        value_and_grad_fn: `value_and_grad_fn(params, batch)` -> the loss, a float scalar, and
            its gradient, a tree like `params`; as `model.value_and_grad`. Where its traits tell the
            loss of the best constant answer, the result notes a loss that is no better.
        params: where to start, any pytree of floats.
        batch: any pytree that the function takes; for mini-batches, rows first in every leaf.
        num_epochs: passes over the rows; 0 returns the start.
        learning_rate: short for `optimizer=sgd(learning_rate)`; for several networks a number,
            or one for each.
        optimizer: as in `jaxnn.optimizers`, or an optax transformation; one for all networks, or
            with `jaxnn.optimizers.each(adam, rates)` one for each. Losses that it evaluates
            itself, as a line search does, are not counted.
        num_networks: how many networks descend side by side, each from its own params in a first
            axis of every leaf, and each stopping by itself. Network `i` comes to what it comes to
            alone with the key `jax.random.fold_in(key, i)`, up to rounding; to the same bits
            however many there are.
        batch_size: rows a step; None, or more than there are, means all rows.
        drop_remainder: whether the rows that are left after the last full batch of an epoch are
            dropped; otherwise they make a smaller batch.
        tolerance: stop when the loss changes by less than this an epoch, status "converged"; 0
            never stops. On all rows at once, two consecutive losses are compared. The losses of
            batches differ by chance, so with batches the mean loss over five epochs is compared
            with that over the five epochs before, and the difference with five tolerances.
        tolerance_unit: "epoch" for that rule; "step" compares the losses of two consecutive steps
            with batches too, whatever rows they are.
        gradient_tolerance: stop where the gradient, of all leaves together, is shorter than
            this: somewhere flat. Status "converged".
        target_loss: stop at the first step whose batch has a loss at or below, status "reached".
        validation_batch: like `batch`; its loss is taken after every epoch, and the params of
            the lowest one are returned.
        patience: stop after this many epochs without a lower loss on the validation batch, status
            "converged".
        record_every: which steps to keep in the history: every one, every second and so on. By
            default every one, or of long descents every second, fourth and so on, so that the
            history takes at most 768 MiB.
        max_seconds: stop when these are over, status "stopped".
        callback: called with a `Progress` some four times a second, or once a second with
            a thousand networks; a `StopIteration` that it raises ends the descent, "stopped".
        checkpoint: a file to save to every half minute and at the end; the history is saved
            beside it (`run.history.npz`). If it is there already,
            the descent goes on from it, to the same bits as one that was never interrupted; it
            refuses one whose functions, data or settings compute anything else.
        devices: where several networks descend; by default all local devices.
        progress: whether to show a progress bar.

    Returns:
        A `GradientDescentResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the gradients are not like `params`.
        ValueError: if a number is out of range, if not exactly one of `learning_rate` and
            `optimizer` is given, if the leaves of `batch` differ in rows, if those of `params`
            lack an axis of networks, or if the checkpoint is of another descent or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> import jax.numpy as jnp
        >>> value_and_grad_fn = jax.value_and_grad(lambda p, batch: jnp.sum((p - batch) ** 2))
        >>> start, batch = jnp.zeros(2), jnp.ones(2)
        >>> trained = gradient_descent(
        ...     jax.random.key(0), value_and_grad_fn, start, batch,
        ...     learning_rate=0.1, num_epochs=100,
        ... )
        >>> trained.params.round(4)
        Array([1., 1.], dtype=float32)
    """
    key = as_key("key", key)
    num_epochs = as_count("num_epochs", num_epochs, maximum=2**32 - 1)
    limits = as_limits(max_seconds, callback, progress)
    keeps = not as_flag("drop_remainder", drop_remainder)
    tolerance = as_tolerance("tolerance", tolerance)
    as_choice("tolerance_unit", tolerance_unit, ("epoch", "step"))
    if gradient_tolerance is not None:
        gradient_tolerance = as_tolerance("gradient_tolerance", gradient_tolerance)
    if record_every is not None:
        record_every = as_count("record_every", record_every, 1, 2**32 - 1)
    params = as_params(params)
    networks = as_networks(num_networks, devices, params)
    one = one_of(params, networks)
    chosen = as_optimizer(learning_rate, optimizer, networks)
    batch = as_batch(batch, one, value_and_grad_fn)
    function = as_partial("value_and_grad_fn", value_and_grad_fn)
    loss_dtype = check_value_and_grad(function, one, batch)
    check_update(one_of(chosen, networks), function, one, batch, loss_dtype)
    constant_loss = constant_loss_of(value_and_grad_fn, batch)
    cut, seen = as_cut(batch, batch_size, keeps)
    by_step = tolerance_unit == "step" or cut.rows_a_step is None
    rules = Rules(
        tolerance=tolerance if by_step else None,
        epoch_tolerance=None if by_step else tolerance,
        gradient_tolerance=gradient_tolerance,
        target_loss=None if target_loss is None else np.asarray(as_target(target_loss, loss_dtype)),
        validation=as_validation(validation_batch, one, value_and_grad_fn, function),
        patience=as_patience(patience, validation_batch),
    )
    with own_settings(), watch_interrupts() as is_interrupted:
        shared = (function, batch, rules)
        start = partial(
            begin,
            loss_dtype=loss_dtype,
            validates=rules.validation is not None,
            compares_epochs=rules.epoch_tolerance is not None,
        )
        if networks is None:
            state = start(chosen, params)
            run = partial(descend, *shared, chosen, jax.random.fold_in(key, TAG), cut=cut)
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(networks.count))
            streams = jax.vmap(jax.random.fold_in, (0, None))(keys, TAG)
            state = begin_blocks(start, chosen, params, networks)
            blocks = placed(shared, in_blocks((chosen, streams), networks), networks)
            run = partial(descend_blocks, blocks, networks, cut=cut)
        saved = None
        if checkpoint is not None:
            check_saveable(state)
            facts = facts_of(key, function, chosen, params, batch, rules, cut, networks)
            saved = Checkpoint(Path(checkpoint), facts)
        work = EVALUATIONS_PER_GRADIENT * sum(seen.rows_of_steps) / seen.rows / cut.steps
        limits = limits._replace(is_interrupted=is_interrupted)
        walked, status = walk(run, state, num_epochs, cut.steps, work, limits, saved, record_every)
        end = settle if networks is None else partial(settle_blocks, networks)
        settled = end(function, batch, walked.state)
        result = report(walked, status, settled, seen, rules.validation is not None)
        result = result._replace(notes=notes_on(result, params, constant_loss))
        return told(result, is_interrupted)


EVALUATIONS_PER_GRADIENT = 3
"""A forward pass, and a backward pass that costs twice as much."""
CONSTANT_MARGIN = 1e-3
"""Losses that are lower than that of the best constant answer by a smaller share are no better."""


class DescentHistory(NamedTuple):
    """The loss at every step, or at every `record_every`-th; ready to plot.

    Of several networks `loss` and `validation_loss` have a first axis of networks, with nan from
    where a network had stopped.

    Attributes:
        evaluations: evaluations made by a network up to and with each step, in units of one loss
            on the whole batch, `(records,)`, float64.
        loss: loss of the step's batch *before* the step, `(records,)`.
        validation_loss: loss on the validation batch after every epoch, `(validations,)`; None
            without one.
        validation_evaluations: evaluations made up to and with each of these epochs, float64.
    """

    evaluations: np.ndarray
    loss: np.ndarray
    validation_loss: np.ndarray | None
    validation_evaluations: np.ndarray | None


class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended; of several networks, arrays with a first axis of networks.

    Printed, it is a summary of a few lines.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite; with a
            validation batch, those at the end of the epoch with the lowest loss on it.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up. Losses
            on a validation batch, and those that an optimizer evaluates itself, are not counted.
        num_steps: gradients evaluated; the last is that at which it converged or diverged.
        status: "completed", "converged", "diverged", "interrupted", "reached", "stopped", or
            "nonfinite" if no loss was ever finite; a `Status`.
        history: the loss at every step.
        notes: what else the summary says: that nothing changed the params, or that the loss is
            that of the best constant answer.
    """

    params: Any
    loss: Any
    num_evaluations: Any
    num_steps: Any
    status: Any
    history: DescentHistory
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The summary."""
        networks = f" of {len(self.loss):,} networks" if np.ndim(self.loss) else ""
        steps = {"steps": f"{np.sum(self.num_steps):,}"}
        numbers = self.status, self.loss, self.num_evaluations
        return summary(f"gradient descent{networks}", *numbers, details=steps, notes=self.notes)


def report(
    walked: Walked, unstopped: Status, settled: tuple[Any, Any, Any], seen: Seen, validates: bool
) -> GradientDescentResult:
    """What to return, of one network or of several: surplus networks at the end are left out.

    Args:
        walked: how far the descent came.
        unstopped: the status of a network that no rule has stopped.
        settled: params, losses and verdicts, as of `settle`.
        seen: rows that the steps of an epoch see.
        validates: whether there is a validation batch.

    Returns:
        A `GradientDescentResult`.
    """
    params, loss, verdict = settled
    loss, verdict = np.asarray(loss), np.asarray(verdict)
    here = np.s_[..., : len(verdict)] if verdict.ndim else ...
    kept, num_steps = walked.kept, walked.num_steps[here]
    has_finite = np.isfinite(loss) | np.isfinite(walked.lowest[here])
    endings = "diverged", "converged", "reached"
    result = GradientDescentResult(
        params=jax.tree.map(jnp.asarray, params),
        loss=np.where(np.isfinite(loss), loss, np.inf).astype(np.float64),
        num_evaluations=1 - (-_work(seen, num_steps) // seen.rows),
        num_steps=num_steps,
        status=np.select(
            [
                (verdict == DIVERGED) & ~has_finite,
                *(verdict == ending for ending in (DIVERGED, CONVERGED, REACHED)),
            ],
            ["nonfinite", *endings],
            unstopped,
        ),
        history=DescentHistory(
            _work(seen, kept.step + 1) / seen.rows,
            np.ascontiguousarray(kept.loss[here].T),
            np.ascontiguousarray(kept.validation[here].T) if validates else None,
            _work(seen, (kept.epoch + 1) * len(seen.rows_of_steps)) / seen.rows
            if validates
            else None,
        ),
    )
    return result if verdict.ndim else _of_one(result)


def _work(seen: Seen, num_steps: np.ndarray) -> np.ndarray:
    """Count the work of a number of steps in losses of one row, int64."""
    rows = np.append(0, np.cumsum(seen.rows_of_steps, dtype=np.int64))
    epochs, steps = np.divmod(num_steps, len(seen.rows_of_steps))
    return EVALUATIONS_PER_GRADIENT * (epochs * rows[-1] + rows[steps])


def constant_loss_of(value_and_grad_fn: Any, batch: Any) -> float | None:
    """The loss of the best constant answer on the batch, where the function can tell it."""
    loss = traits_of(value_and_grad_fn).constant_loss(batch)
    return None if loss is None else float(loss)


def notes_on(
    result: GradientDescentResult, start: Any, constant_loss: float | None
) -> tuple[str, ...]:
    """What a status leaves out: that a descent did not move, or learnt no more than a constant."""
    loss, has_stepped = np.asarray(result.loss), np.asarray(result.num_steps) > 0
    is_still = has_stepped & ~np.isin(result.status, ["diverged", "nonfinite", "reached"])
    for leaf, first in zip(jax.tree.leaves(result.params), jax.tree.leaves(start), strict=True):
        axes = tuple(range(loss.ndim, np.ndim(leaf)))
        is_still &= np.all(np.asarray(leaf) == np.asarray(first), axis=axes)
    notes = _note(is_still, "no step changed the params (is the gradient 0, as of a dead network?)")
    if constant_loss:
        limit = constant_loss - CONSTANT_MARGIN * abs(constant_loss)
        is_constant = has_stepped & np.isfinite(loss) & (loss >= limit)
        notes += _note(
            is_constant, f"no better than the best constant answer, of loss {constant_loss:.6g}"
        )
    return notes


def _note(concerns: np.ndarray, text: str) -> tuple[str, ...]:
    """The note, with the number of networks that it concerns where there are several."""
    if not np.any(concerns):
        return ()
    return (f"{np.sum(concerns):,} networks: {text}" if np.ndim(concerns) else text,)


def _of_one(result: GradientDescentResult) -> GradientDescentResult:
    """The numbers of a single network as plain ones."""
    return result._replace(
        loss=float(result.loss),
        num_evaluations=int(result.num_evaluations),
        num_steps=int(result.num_steps),
        status=str(result.status),
    )


def as_networks(
    num_networks: int | None, devices: Sequence[Any] | None, params: Any
) -> Networks | None:
    """How many networks, once all leaves of the params have that axis; None for one alone."""
    if num_networks is None:
        if devices is not None:
            raise ValueError("num_networks must be given with devices; got None")
        return None
    count = as_count("num_networks", num_networks, 1, 2**31 - 1)
    for path, leaf in tree_leaves_with_path(params):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"params must have a first axis of num_networks = {count} in every leaf; "
                f"got shape {leaf.shape} at params{keystr(path)}"
            )
    return Networks(count, tuple(as_devices(devices)))


def one_of(params: Any, networks: Networks | None) -> Any:
    """The params of one network: of the first, where there are several."""
    return params if networks is None else jax.tree.map(lambda leaf: leaf[0], params)


def as_optimizer(
    learning_rate: Any, optimizer: Optimizer | Each | None, networks: Networks | None
) -> Optimizer:
    """The optimizer, of `Partial`s; with a first axis of networks where there are several."""
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise ValueError(f"give either learning_rate or optimizer; got {given}")
    if optimizer is None:
        check_concrete("learning_rate", learning_rate)
        if networks is None or np.ndim(learning_rate) == 0:
            optimizer = sgd(learning_rate)
        else:
            optimizer = each(sgd, _as_rates(learning_rate, networks.count))
    if isinstance(optimizer, Each):
        return per_network(optimizer, _count_of(optimizer, networks))
    check_optimizer(optimizer)
    init = as_partial("optimizer.init", optimizer.init)
    chosen = Optimizer(init, as_partial("optimizer.update", optimizer.update))
    return chosen if networks is None else per_network(chosen, networks.count)


def _count_of(optimizer: Each, networks: Networks | None) -> int:
    """How many networks have an optimizer of their own: all that there are."""
    length = jax.tree.leaves(optimizer.values)[0].shape[0]
    if networks is None:
        raise ValueError(
            f"num_networks must be given with optimizer=each(...), as num_networks={length}, with "
            "params that have a first axis of networks; got None"
        )
    if length != networks.count:
        raise ValueError(
            f"optimizer must have values for each of the {networks.count} networks; "
            f"got each(...) of {length}"
        )
    return length


def _as_rates(learning_rate: Any, count: int) -> jax.Array:
    """A learning rate for each network."""
    if np.shape(learning_rate) != (count,):
        raise ValueError(
            f"learning_rate must be a number, or one for each of the {count} networks; "
            f"got shape {np.shape(learning_rate)}"
        )
    return jnp.asarray([as_real("learning_rate", rate) for rate in np.asarray(learning_rate)])


def check_update(
    optimizer: Optimizer, function: Partial, params: Any, batch: Any, loss_dtype: Any
) -> None:
    """Refuses an optimizer, of one network, whose updates or state are not like those it got."""
    state = shapes_of("optimizer.init", cast(Partial, optimizer.init), params)
    loss = jax.ShapeDtypeStruct((), loss_dtype)
    given = optimizer, function, batch, loss, params, state, params
    try:
        results = shapes_of("optimizer.update", Partial(update_of), *given)
    except Exception as error:
        error.add_note(f"Its extra arguments can be {', '.join(EXTRA_ARGUMENTS)}.")
        raise
    if not (isinstance(results, tuple) and len(results) == 2):
        raise TypeError(
            f"optimizer.update must return (updates, state); got a {type(results).__name__}"
        )
    check_like_params("optimizer.update", "updates", results[0], params)
    _check_like_state(results[1], state)


def _check_like_state(got: Any, state: Any) -> None:
    """Refuses a state that cannot take the place of the one before."""
    wanted = "optimizer.update must return a state like that of optimizer.init"
    if jax.tree.structure(got) != jax.tree.structure(state):
        raise TypeError(f"{wanted}, {jax.tree.structure(state)}; got {jax.tree.structure(got)}")
    for (path, new), old in zip(tree_leaves_with_path(got), jax.tree.leaves(state), strict=True):
        if new.shape != old.shape or not _fits(new.dtype, old.dtype):
            raise TypeError(
                f"{wanted}; got {new.dtype} of shape {new.shape} for state{keystr(path)}, "
                f"{old.dtype} of shape {old.shape}"
            )


def _fits(dtype: Any, wanted: Any) -> bool:
    """Whether numbers of a dtype become the one wanted where both stand side by side."""
    if dtype == wanted or not (isinstance(dtype, np.dtype) and isinstance(wanted, np.dtype)):
        return dtype == wanted  # keys are of no NumPy dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, wanted) == wanted


def as_tolerance(name: str, value: float) -> Any:
    """A number of at least 0 that the host knows."""
    check_concrete(name, value)
    return as_real(name, value, inclusive=True)


def as_validation(
    validation_batch: Any, params: Any, value_and_grad_fn: Any, function: Partial
) -> Any:
    """The validation batch as arrays, once the function has taken it."""
    if validation_batch is None:
        return None
    try:
        arrays = as_batch(validation_batch, params, value_and_grad_fn)
        check_value_and_grad(function, params, arrays)
    except Exception as error:
        error.add_note("This came from validation_batch.")
        raise
    return arrays


def as_patience(patience: int | None, validation_batch: Any) -> np.uint32 | None:
    """Epochs to wait for a better loss on the validation batch."""
    if patience is None:
        return None
    if validation_batch is None:
        raise ValueError("validation_batch must be given with patience; got None")
    return np.uint32(as_count("patience", patience, 1, 2**32 - 1))


class Seen(NamedTuple):
    """Rows that each step of an epoch sees, of how many."""

    rows_of_steps: list[int]
    rows: int


def as_cut(batch: Any, batch_size: int | None, keeps: bool) -> tuple[Cut, Seen]:
    """How an epoch is cut; `batch` need have no rows if it is taken whole."""
    if batch_size is None:
        if keeps:
            raise ValueError("batch_size must be given with drop_remainder=False; got None")
        return Cut(None, 0, 1), Seen([1], 1)
    batch_size = as_count("batch_size", batch_size, minimum=1)
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "batch must have the same number of rows, at least 1, in every leaf to be cut by "
            f"batch_size; got shapes {shapes}"
        )
    rows = shapes[0][0]
    if batch_size >= rows:
        return Cut(None, 0, 1), Seen([1], 1)
    steps, rest = divmod(rows, batch_size)
    remainder = rest if keeps else 0
    sizes = [batch_size] * steps + [remainder] * (remainder > 0)
    return Cut(batch_size, remainder, len(sizes)), Seen(sizes, rows)


def facts_of(
    key: jax.Array,
    function: Partial,
    optimizer: Optimizer,
    params: Any,
    batch: Any,
    rules: Rules,
    cut: Cut,
    networks: Networks | None,
) -> dict[str, Any]:
    """What whoever goes on with this descent has to share."""
    one, chosen = one_of(params, networks), one_of(optimizer, networks)
    init, update = cast(Partial, chosen.init), cast(Partial, chosen.update)
    loss, _ = shapes_of("value_and_grad_fn", function, one, batch)
    state = shapes_of("optimizer.init", init, one)
    step = Partial(update_of), chosen, function, batch, loss, one, state, one
    steps = function_metadata("optimizer", *step)
    return {
        "trainer": "gradient_descent",
        **key_metadata(key),
        "num_networks": None if networks is None else networks.count,
        "networks a block": None if networks is None else networks.width,
        "batch_size": cut.rows_a_step,
        "drop_remainder": cut.remainder == 0,
        **{name: as_metadata(rule) for name, rule in rules._asdict().items() if name != "validation"},
        "params": fingerprint(params),
        "batch": fingerprint(batch),
        "validation_batch": fingerprint(rules.validation),
        "value_and_grad_fn": function_metadata(
            "value_and_grad_fn", function, one, batch, axes=None if networks is None else (0, None)
        ),
        "start of the optimizer": function_metadata("optimizer", init, one),
        "optimizer": {**steps, "settings": settings_of(update)},
        "numbers of the optimizer": fingerprint(optimizer),
    }
