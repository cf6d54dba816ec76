"""Numbers that change with the step: scales, temperatures and learning rates.

A schedule is a function `schedule(step)` -> a float scalar; steps count from 0 and come as
float32, so that `2 - step` is no surprise. Those below are `Partial`s whose
numbers are leaves, so that other numbers compile nothing. Where a schedule is taken, a plain
number stands for one that never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

__all__ = [
    "Schedule",
    "as_rate",
    "as_schedule",
    "constant",
    "cosine_decay",
    "exponential_decay",
    "inverse_time_decay",
    "linear",
    "linear_warmup",
    "values_at",
]

Schedule = Callable[[jax.Array], jax.Array]


def constant(value: float) -> Partial:
    """Always `value`, above 0.

    Example:
        >>> float(constant(0.5)(3))
        0.5
    """
    return Partial(_constant, as_real("value", value))


def linear(start: float, end: float, num_steps: int) -> Partial:
    """From `start` to `end` in a straight line over `num_steps` steps, then `end`.

    Example:
        >>> float(linear(1.0, 0.5, 10)(5))
        0.75
    """
    return _between(_linear, start, end, num_steps)


def exponential_decay(start: float, end: float, num_steps: int) -> Partial:
    """From `start` to `end` by the same factor each step, `num_steps` times, then `end`.

    Example:
        >>> round(float(exponential_decay(1.0, 0.01, 10)(5)), 6)
        0.1
    """
    return _between(_exponential, start, end, num_steps)


def cosine_decay(start: float, end: float, num_steps: int) -> Partial:
    """From `start` to `end` along half a cosine over `num_steps` steps, then `end`.

    Reference: Loshchilov and Hutter, "SGDR", ICLR 2017, without its restarts.

    Example:
        >>> float(cosine_decay(1.0, 0.5, 10)(5))
        0.75
    """
    return _between(_cosine, start, end, num_steps)


def inverse_time_decay(start: float, decay: float) -> Partial:
    """`start / (1 + decay * step)`: the chapter's decay of a learning rate.

    Example:
        >>> float(inverse_time_decay(1.0, 0.5)(2))
        0.5
    """
    return Partial(_inverse_time, as_real("start", start), as_real("decay", decay, inclusive=True))


def linear_warmup(schedule: float | Schedule, num_steps: int) -> Partial:
    """A schedule whose first steps rise in a straight line: times `(step + 1) / num_steps`.

    Reference: Goyal et al., "Accurate, large minibatch SGD", 2017, section 2.2.

    Example:
        >>> [float(linear_warmup(0.5, 4)(step)) for step in (0, 1, 3, 4)]
        [0.125, 0.25, 0.5, 0.5]
    """
    count = as_count("num_steps", num_steps, minimum=1)
    return Partial(_warm_up, as_rate("schedule", schedule), jnp.float32(count))


def as_rate(name: str, value: Any) -> Partial:
    """The same as `as_schedule`, where numbers may be traced: under `vmap`, a sweep of them."""
    if not any(is_traced(leaf) for leaf in jax.tree.leaves(value)):
        return as_schedule(name, value)
    return value if isinstance(value, Partial) else Partial(_constant, as_real(name, value))


def as_schedule(name: str, value: Any) -> Partial:
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


def _between(shape: Callable[..., jax.Array], start: float, end: float, num_steps: int) -> Partial:
    count = as_count("num_steps", num_steps, minimum=1)
    return Partial(shape, as_real("start", start), as_real("end", end), jnp.float32(count))


def _share(num_steps: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.asarray(step, jnp.float32) / num_steps, 1)


def _constant(value: jax.Array, step: jax.Array) -> jax.Array:
    del step
    return value


def _inverse_time(start: jax.Array, decay: jax.Array, step: jax.Array) -> jax.Array:
    return start / (1 + decay * jnp.asarray(step, jnp.float32))


def _warm_up(schedule: Partial, num_steps: jax.Array, step: jax.Array) -> jax.Array:
    return schedule(step) * _share(num_steps, jnp.asarray(step, jnp.float32) + 1)


def _linear(start: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return start + (end - start) * _share(num_steps, step)


def _exponential(start: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return start * (end / start) ** _share(num_steps, step)


def _cosine(start: jax.Array, end: jax.Array, num_steps: jax.Array, step: jax.Array):
    return end + (start - end) * (1 + jnp.cos(jnp.pi * _share(num_steps, step))) / 2
