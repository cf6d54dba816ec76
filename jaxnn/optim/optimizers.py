"""Optimizers as pairs of pure functions, in the protocol that the field shares.

    state = optimizer.init(params)
    updates, state = optimizer.update(gradients, state, params)
    params = params + updates

Both functions are `jax.tree_util.Partial`s whose numbers are leaves: another learning rate
compiles nothing, and `jax.vmap(adam)(rates)` is a whole sweep of optimizers. A learning rate may
be a schedule of `jaxnn.schedules`, or any function of the step, which counts from 0. A ready
optax transformation fits the same protocol and works as it is.

`clipped` and `with_l2_penalty` change the gradients that any optimizer sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.optim import directions
from jaxnn.optim.schedules import Schedule, as_rate
from jaxnn.run.checks import as_flag, as_real

__all__ = [
    "Optimizer",
    "StepState",
    "adam",
    "check_optimizer",
    "clipped",
    "length",
    "rmsprop",
    "sgd",
    "with_l2_penalty",
]


class Optimizer(NamedTuple):
    """How gradients become steps.

    Attributes:
        init: `init(params)` -> state, any pytree of arrays.
        update: `update(gradients, state, params)` -> `(updates, state)`; the updates, a tree
            like `params`, are added to them. Ours want params of one dtype.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


class StepState(NamedTuple):
    """What the optimizers below remember.

    Attributes:
        count: steps made, int32; it stops at the largest one.
        moments: running means of the gradient, each a flat vector; `()` if there are none.
    """

    count: jax.Array
    moments: Any


def sgd(
    learning_rate: float | Schedule, *, momentum: float | None = None, nesterov: bool = False
) -> Optimizer:
    """Stochastic gradient descent, plain or with momentum.

    With gradient `g`, learning rate `r` and momentum `m`:

        velocity <- m velocity + g
        update   =  -r velocity             heavy ball (Polyak 1964)
        update   =  -r (g + m velocity)     Nesterov's, as Sutskever et al. (2013) write it

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        momentum: `m`, at least 0; None keeps no velocity.
        nesterov: whether the update looks ahead; it needs a momentum.

    Returns:
        An `Optimizer`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range.

    Example:
        >>> optimizer = sgd(0.1)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.2], dtype=float32)
    """
    rate = as_rate("learning_rate", learning_rate)
    as_flag("nesterov", nesterov)
    if momentum is None:
        if nesterov:
            raise ValueError("momentum must be given with nesterov; got None")
        return _optimizer(directions.no_moments, Partial(directions.plain), rate)
    decay = as_real("momentum", momentum, inclusive=True)
    return _optimizer(
        jnp.zeros_like,
        Partial(directions.nesterov if nesterov else directions.heavy_ball, decay),
        rate,
    )


def rmsprop(
    learning_rate: float | Schedule, *, decay: float = 0.9, epsilon: float = 1e-8
) -> Optimizer:
    """Steps scaled by the running size of the gradient.

    With gradient `g` and learning rate `r`:

        square <- decay square + (1 - decay) g^2
        update =  -r g / (sqrt(square) + epsilon)     (Tieleman and Hinton 2012, lecture 6.5)

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        decay: at least 0 and below 1.
        epsilon: above 0, outside the root.

    Returns:
        An `Optimizer`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range.

    Example:
        >>> optimizer = rmsprop(0.1, decay=0.75)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.2], dtype=float32)
    """
    rate = as_rate("learning_rate", learning_rate)
    numbers = _decay("decay", decay), as_real("epsilon", epsilon)
    return _optimizer(jnp.zeros_like, Partial(directions.by_size, *numbers), rate)


def adam(
    learning_rate: float | Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adam: steps scaled by running moments of the gradient; AdamW with a weight decay.

    With gradient `g` at step `t = 1, 2, ...` and weight decay `w`:

        mean     <- beta1 mean     + (1 - beta1) g
        variance <- beta2 variance + (1 - beta2) g^2
        update   =  -r (mean / (1 - beta1^t)) / (sqrt(variance / (1 - beta2^t)) + epsilon)
                    -r w params

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        beta1: decay of the mean, at least 0 and below 1.
        beta2: decay of the variance, at least 0 and below 1.
        epsilon: above 0, outside the root.
        weight_decay: `w`, at least 0, decoupled from the gradient.

    Returns:
        An `Optimizer`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range.

    References:
        Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
        Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    Example:
        >>> optimizer = adam(0.1)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.1], dtype=float32)
    """
    rate = as_rate("learning_rate", learning_rate)
    betas = _decay("beta1", beta1), _decay("beta2", beta2)
    others = as_real("epsilon", epsilon), as_real("weight_decay", weight_decay, inclusive=True)
    return _optimizer(directions.two_moments, Partial(directions.by_moments, *betas, *others), rate)


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """The optimizer on gradients no longer than `max_norm`, of all leaves together.

        g <- g min(1, max_norm / |g|)     (Pascanu, Mikolov and Bengio 2013)

    Args:
        optimizer: any.
        max_norm: above 0.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the number is out of range.

    Example:
        >>> optimizer = clipped(sgd(1.0), 1.0)
        >>> optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)), jnp.zeros(2))[0]
        Array([-0.6, -0.8], dtype=float32)
    """
    return _behind(Partial(_clip, as_real("max_norm", max_norm)), optimizer)


def with_l2_penalty(optimizer: Optimizer, strength: float) -> Optimizer:
    """The optimizer on the gradient of `loss + strength |params|^2`.

    The losses that a training reports leave the penalty out.

    Args:
        optimizer: any.
        strength: at least 0.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the number is out of range.

    Example:
        >>> optimizer = with_l2_penalty(sgd(1.0), 0.5)
        >>> optimizer.update(jnp.zeros(1), optimizer.init(jnp.ones(1)), jnp.ones(1))[0]
        Array([-1.], dtype=float32)
    """
    penalty = as_real("strength", strength, inclusive=True)
    return _behind(Partial(_add_penalty, penalty), optimizer)


def _optimizer(init: Callable[[Any], Any], direction: Partial, rate: Partial) -> Optimizer:
    """`direction(gradients, moments, params, step)` -> where to go, and the moments after it."""
    return Optimizer(Partial(_start, Partial(init)), Partial(_advance, rate, direction))


def _start(init: Partial, params: Any) -> StepState:
    return StepState(jnp.zeros((), jnp.int32), init(_flat(params)))


def _advance(rate: Partial, direction: Partial, gradients: Any, state: StepState, params: Any):
    """On flat vectors: one loop over all numbers takes less than a loop for each leaf."""
    unravel = ravel_pytree(params)[1]
    step = jnp.minimum(state.count, jnp.iinfo(jnp.int32).max - 1) + 1
    time = step.astype(jnp.float32)
    gradient, here = _flat(gradients), _flat(params)
    ahead, moments = direction(gradient, state.moments, here, time)
    updates = -jnp.asarray(rate(time - 1)).astype(ahead.dtype) * ahead
    return unravel(updates.astype(ravel_pytree(params)[0].dtype)), StepState(step, moments)


def _flat(tree: Any) -> jax.Array:
    """All numbers as one vector, in float32 at least: half precision has no 1e-8."""
    flat = ravel_pytree(tree)[0]
    return flat if flat.dtype.itemsize >= 4 else flat.astype(jnp.float32)


def check_optimizer(optimizer: Any) -> None:
    """Refuses what has no `init` and `update`."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must have init and update, as jaxnn.optimizers.adam(0.05) has; "
            f"got a {type(optimizer).__name__}"
        )


def _behind(change: Partial, optimizer: Optimizer) -> Optimizer:
    """The optimizer, its gradients changed by `change(gradients, params)` first."""
    check_optimizer(optimizer)
    init, update = (
        function if isinstance(function, Partial) else Partial(function)
        for function in (optimizer.init, optimizer.update)
    )
    return Optimizer(init, Partial(_update_changed, change, update))


def _update_changed(change: Partial, update: Partial, gradients: Any, state: Any, params: Any):
    return update(change(gradients, params), state, params)


def length(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together; no square over- or underflows."""
    flat = jnp.abs(_flat(tree))
    largest = jnp.max(flat, initial=0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(flat / jnp.where(largest > 0, largest, 1))))


def _clip(max_norm: jax.Array, gradients: Any, params: Any) -> Any:
    del params
    norm = length(gradients)
    limit = max_norm.astype(norm.dtype)
    factor = jnp.where(norm > limit, limit / norm, 1)
    return jax.tree.map(
        lambda leaf: (factor * leaf.astype(factor.dtype)).astype(leaf.dtype), gradients
    )


def _add_penalty(strength: jax.Array, gradients: Any, params: Any) -> Any:
    def add(gradient: jax.Array, leaf: jax.Array) -> jax.Array:
        return gradient + (2 * strength).astype(leaf.dtype) * leaf

    return jax.tree.map(add, gradients, params)


def _decay(name: str, value: float) -> Any:
    number = as_real(name, value, inclusive=True)
    if not isinstance(number, jax.Array) and number >= 1:
        raise ValueError(f"{name} must be below 1; got {value!r}")
    return number
