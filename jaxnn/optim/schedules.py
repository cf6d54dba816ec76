"""Numbers that change with the step: scales, temperatures and learning rates.

A schedule is a function `schedule(step)` -> a float scalar; steps count from 0 and come as
float32. Those below are `Partial`s whose numbers are leaves: other numbers compile nothing. Where
a schedule is taken, a plain number means one that never changes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.checks import (
    as_count,
    as_partial,
    as_real,
    check_concrete,
    check_scalar,
    is_traced,
    shapes_of,
)
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

__all__ = [
    "Schedule",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "inverse_time_decay",
    "linear",
    "linear_warmup",
]

Schedule = Callable[[jax.Array], jax.Array]


def constant(value: float) -> Partial:
    """Return a schedule that is always `value`, above 0.

    Args:
        value: finite, above 0.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> float(constant(0.5)(3))
        0.5
    """
    return Partial(_constant, as_real("value", value))


def linear(init_value: float, end_value: float, transition_steps: int) -> Partial:
    """Return a straight line from `init_value` to `end_value`, which it then keeps.

    Args:
        init_value: at step 0, above 0.
        end_value: at step `transition_steps` and after it, above 0.
        transition_steps: at least 1.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> float(linear(1.0, 0.5, 10)(5))
        0.75
    """
    return _between(_linear, init_value, end_value, transition_steps)


def exponential_decay(init_value: float, end_value: float, transition_steps: int) -> Partial:
    """Return a change by the same factor each step, until `end_value` is reached.

    Args:
        init_value: at step 0, above 0.
        end_value: at step `transition_steps` and after it, above 0.
        transition_steps: at least 1.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> round(float(exponential_decay(1.0, 0.01, 10)(5)), 6)
        0.1
    """
    return _between(_exponential, init_value, end_value, transition_steps)


def cosine_decay(init_value: float, end_value: float, transition_steps: int) -> Partial:
    """Return half a cosine from `init_value` to `end_value`, which it then keeps.

    Args:
        init_value: at step 0, above 0.
        end_value: at step `transition_steps` and after it, above 0.
        transition_steps: at least 1.

    Raises:
        ValueError: if a number is out of range.

    Reference: Loshchilov and Hutter, "SGDR", ICLR 2017, without its restarts.

    Example:
        >>> float(cosine_decay(1.0, 0.5, 10)(5))
        0.75
    """
    return _between(_cosine, init_value, end_value, transition_steps)


def inverse_time_decay(init_value: float, decay_rate: float) -> Partial:
    """Return `init_value / (1 + decay_rate * step)`, the decay of the course's optimizers.

    Args:
        init_value: at step 0, above 0.
        decay_rate: at least 0.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> float(inverse_time_decay(1.0, 0.5)(2))
        0.5
    """
    rate = as_real("decay_rate", decay_rate, inclusive=True)
    return Partial(_inverse_time, as_real("init_value", init_value), rate)


def linear_warmup(schedule: float | Schedule, warmup_steps: int) -> Partial:
    """Return a schedule times `(step + 1) / warmup_steps` during the first steps.

    Args:
        schedule: a schedule, or a number above 0.
        warmup_steps: at least 1; from step `warmup_steps - 1` on the schedule is as it was.

    Raises:
        ValueError: if a number is out of range.

    Reference: Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.2.

    Example:
        >>> [float(linear_warmup(0.5, 4)(step)) for step in (0, 1, 3, 4)]
        [0.125, 0.25, 0.5, 0.5]
    """
    count = as_count("warmup_steps", warmup_steps, minimum=1)
    return Partial(_warm_up, as_rate("schedule", schedule), jnp.float32(count))


def as_rate(name: str, value: PyTree) -> Partial:
    """The same as `as_schedule`, where numbers may be traced: under `vmap`, a sweep of them."""
    if not any(is_traced(leaf) for leaf in jax.tree.leaves(value)):
        return as_schedule(name, value)
    return value if isinstance(value, Partial) else Partial(_constant, as_real(name, value))


def as_schedule(name: str, value: PyTree) -> Partial:
    """A number, or a function of the step, as a checked schedule."""
    if not callable(value):
        check_concrete(name, value)
        return Partial(_constant, as_real(name, value))
    schedule = as_partial(name, value)
    check_scalar(name, shapes_of(name, schedule, jax.ShapeDtypeStruct((), jnp.float32)))
    return schedule


def values_at(schedule: Partial, steps: np.ndarray) -> np.ndarray:
    """The schedule at each step, `(steps,)`; few lengths are compiled, and constants none."""
    if schedule.func is _constant:
        return np.full(len(steps), schedule.args[0], np.float32)
    padded = np.zeros(1 << max(len(steps) - 1, 0).bit_length(), np.float32)
    padded[: len(steps)] = steps
    return np.asarray(_evaluate(schedule, padded))[: len(steps)]


@program()
def _evaluate(schedule: Partial, steps: jax.Array) -> jax.Array:
    return jax.vmap(schedule)(steps)


def _between(shape: Callable[..., jax.Array], init: float, end: float, num_steps: int) -> Partial:
    count = as_count("transition_steps", num_steps, minimum=1)
    ends = as_real("init_value", init), as_real("end_value", end)
    return Partial(shape, *ends, jnp.float32(count))


def _share(num_steps: jax.Array, step: jax.Array) -> jax.Array:
    # XLA may turn a division into a product in one program and not in another. This is a product
    # in every program, so that a scan of steps has the bits of the trainer.
    step = jnp.asarray(step, jnp.float32)
    return jnp.where(step >= num_steps, 1, step * (1 / num_steps))


def _constant(value: jax.Array, step: jax.Array) -> jax.Array:
    del step
    return value


def _linear(init: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return init + (end - init) * _share(num_steps, step)


def _exponential(init: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return init * (end / init) ** _share(num_steps, step)


def _cosine(init: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return end + (init - end) * (1 + jnp.cos(jnp.pi * _share(num_steps, step))) / 2


def _inverse_time(init: jax.Array, decay_rate: jax.Array, step: jax.Array) -> jax.Array:
    return init / (1 + decay_rate * jnp.asarray(step, jnp.float32))


def _warm_up(schedule: Partial, num_steps: jax.Array, step: jax.Array) -> jax.Array:
    return schedule(step) * _share(num_steps, jnp.asarray(step, jnp.float32) + 1)
