"""Optimizers as pairs of pure functions, in the protocol of optax.

    state = optimizer.init(params)
    updates, state = optimizer.update(gradients, state, params)
    params = params + updates

Both functions are `jax.tree_util.Partial`s whose numbers are leaves: another learning rate
compiles nothing. A learning rate may be a schedule of `jaxnn.schedules`, or any function of the
step, which counts from 0. An optax transformation has the same protocol and works as it is.

`clip_by_global_norm` and `add_l2` change the gradients that an optimizer sees. `each` gives every
network of a descent an optimizer of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.optim.schedules import Schedule, as_rate
from jaxnn.run.checks import as_arrays, as_flag, as_partial, as_real, check_like, shapes_of
from jaxnn.typing import Function, PyTree

__all__ = [
    "Each",
    "Optimizer",
    "StepState",
    "adam",
    "add_l2",
    "clip_by_global_norm",
    "each",
    "global_norm",
    "rmsprop",
    "sgd",
]

EXTRA_ARGUMENTS = ("value", "grad", "value_fn")
"""Of optax's transformations with extra arguments, those that a descent can give."""


class Optimizer(NamedTuple):
    """How gradients become steps.

    Attributes:
        init: `init(params)` -> state, any pytree of arrays.
        update: `update(gradients, state, params)` -> `(updates, state)`; the updates, a tree
            like `params`, are added to them. Ours want params of one dtype. Where it takes them
            by name, a descent gives it optax's extra arguments: `value`, the loss on the rows of
            the step; `grad`, its gradient; and `value_fn(params)`, the loss on these rows, for a
            line search.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class Each(NamedTuple):
    """An optimizer of its own for each network of a descent, as `each` returns it.

    Attributes:
        make: `make(*values)`, with the values of one network -> its optimizer.
        values: pytrees of arrays with a first axis of networks.
    """

    make: Partial
    values: tuple[PyTree, ...]


class StepState(NamedTuple):
    """What the optimizers below remember.

    Attributes:
        step: steps made, int32; it stops at the largest one.
        moments: running means of the gradient, each a flat vector; `()` if there are none.
    """

    step: jax.Array
    moments: PyTree


def sgd(
    learning_rate: float | Schedule, *, momentum: float | None = None, nesterov: bool = False
) -> Optimizer:
    """Return stochastic gradient descent, plain or with momentum.

    With gradient `g`, learning rate `r` and momentum `m`:

        velocity <- m velocity + g
        update   =  -r velocity             heavy ball (Polyak 1964)
        update   =  -r (g + m velocity)     Nesterov's, as Sutskever et al. (2013) write it

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        momentum: `m`, at least 0; None keeps no velocity.
        nesterov: whether the update looks ahead; it needs a momentum.

    Raises:
        TypeError: if a number is of another kind.
        ValueError: if a number is out of range, or `nesterov` comes without a momentum.

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
        return _optimizer(_no_moments, Partial(_plain), rate)
    decay = as_real("momentum", momentum, inclusive=True)
    return _optimizer(jnp.zeros_like, Partial(_nesterov if nesterov else _heavy_ball, decay), rate)


def rmsprop(learning_rate: float | Schedule, *, decay: float = 0.9, eps: float = 1e-8) -> Optimizer:
    """Return an optimizer whose steps are scaled by the running size of the gradient.

    With gradient `g` and learning rate `r`:

        square <- decay square + (1 - decay) g^2
        update =  -r g / (sqrt(square) + eps)     (Tieleman and Hinton 2012, lecture 6.5)

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        decay: at least 0 and below 1.
        eps: above 0, outside the root.

    Raises:
        TypeError: if a number is of another kind.
        ValueError: if a number is out of range.

    Example:
        >>> optimizer = rmsprop(0.1, decay=0.75)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.2], dtype=float32)
    """
    rate = as_rate("learning_rate", learning_rate)
    numbers = _decay("decay", decay), as_real("eps", eps)
    return _optimizer(jnp.zeros_like, Partial(_scaled, *numbers), rate)


def adam(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return Adam, whose steps are scaled by running moments of the gradient; or AdamW.

    With gradient `g` at step `t = 1, 2, ...` and weight decay `w`:

        mean     <- b1 mean     + (1 - b1) g
        variance <- b2 variance + (1 - b2) g^2
        update   =  -r (mean / (1 - b1^t)) / (sqrt(variance / (1 - b2^t)) + eps)
                    -r w params

    Args:
        learning_rate: `r`, above 0, or a schedule of it.
        b1: decay of the mean, at least 0 and below 1.
        b2: decay of the variance, at least 0 and below 1.
        eps: above 0, outside the root.
        weight_decay: `w`, at least 0, decoupled from the gradient; above 0 it makes AdamW.

    Raises:
        TypeError: if a number is of another kind.
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
    betas = _decay("b1", b1), _decay("b2", b2)
    others = as_real("eps", eps), as_real("weight_decay", weight_decay, inclusive=True)
    return _optimizer(_two_moments, Partial(_adam, *betas, *others), rate)


def each(make: Function, *values: PyTree) -> Each:
    """Return an optimizer of its own for each network of `jaxnn.gradient_descent`.

    Network `i` descends by `make(*values_i)`, where `values_i` is entry `i` of each value. Other
    values compile nothing.

    Args:
        make: any function that returns an optimizer, such as `adam`, `optax.adam` or
            `lambda rate, norm: clip_by_global_norm(sgd(rate), norm)`. The values are traced.
        *values: arrays, or pytrees of arrays, with a first axis of networks.

    Returns:
        An `Each`, for the argument `optimizer` of `jaxnn.gradient_descent`.

    Raises:
        TypeError: if `make` is not callable or returns no optimizer, or a value holds no numbers.
        ValueError: if the values differ in their first axis, or `make` refuses a number.

    Example:
        >>> rates, momenta = jnp.array([0.1, 0.2, 0.3]), jnp.array([0.0, 0.5, 0.9])
        >>> optimizer = each(lambda rate, m: sgd(rate, momentum=m), rates, momenta)
        >>> [value.shape for value in optimizer.values]
        [(3,), (3,)]
    """
    make = as_partial("make", make)
    values = as_arrays("values", tuple(_as_array(value) for value in values))
    shapes = [leaf.shape for leaf in jax.tree.leaves(values)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "values must be arrays with a first axis of networks, the same in all of them; "
            f"got shapes {shapes}"
        )
    for network in _extremes(values):
        try:
            made = make(*jax.tree.map(lambda leaf, at=network: leaf[at], values))
            check_optimizer(made, "what make returns")
        except Exception as error:
            error.add_note(f"This came from make(*values) of network {network}.")
            raise
    return Each(make, values)


def clip_by_global_norm(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """Return the optimizer on gradients no longer than `max_norm`, of all leaves together.

        g <- g min(1, max_norm / |g|)     (Pascanu, Mikolov and Bengio 2013)

    Args:
        optimizer: any.
        max_norm: above 0.

    Raises:
        TypeError: if the optimizer has no `init` and `update`, or is one of `each`.
        ValueError: if the number is out of range.

    Example:
        >>> optimizer = clip_by_global_norm(sgd(1.0), 1.0)
        >>> optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)), jnp.zeros(2))[0]
        Array([-0.6, -0.8], dtype=float32)
    """
    return _behind(Partial(_clip, as_real("max_norm", max_norm)), optimizer)


def add_l2(optimizer: Optimizer, strength: float) -> Optimizer:
    """Return the optimizer on the gradient of `loss + strength |params|^2`.

    The losses that a descent reports leave the penalty out.

    Args:
        optimizer: any.
        strength: at least 0.

    Raises:
        TypeError: if the optimizer has no `init` and `update`, or is one of `each`.
        ValueError: if the number is out of range.

    Example:
        >>> optimizer = add_l2(sgd(1.0), 0.5)
        >>> optimizer.update(jnp.zeros(1), optimizer.init(jnp.ones(1)), jnp.ones(1))[0]
        Array([-1.], dtype=float32)
    """
    penalty = as_real("strength", strength, inclusive=True)
    return _behind(Partial(_add_penalty, penalty), optimizer)


def global_norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of all leaves together; no square over- or underflows.

    Args:
        tree: any pytree of floats.

    Returns:
        A scalar, in float32 at least.

    Example:
        >>> global_norm({"weights": jnp.array([3.0]), "biases": jnp.array([4.0])})
        Array(5., dtype=float32)
    """
    flat = jnp.abs(_flat(tree))
    largest = jnp.max(flat, initial=0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(flat / jnp.where(largest > 0, largest, 1))))


# A direction, `direction(*numbers, gradient, moments, params, step)` on flat vectors, returns the
# vector to step against, before the learning rate, and the moments after it. Steps count from 1.


def _no_moments(flat: jax.Array) -> tuple[()]:
    del flat
    return ()


def _two_moments(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(flat), jnp.zeros_like(flat)


def _running(decay: jax.Array, mean: jax.Array, new: jax.Array) -> jax.Array:
    return decay.astype(new.dtype) * mean + (1 - decay).astype(new.dtype) * new


def _plain(gradient: jax.Array, moments: PyTree, params: jax.Array, step: jax.Array):
    del params, step
    return gradient, moments


def _heavy_ball(decay: jax.Array, gradient: jax.Array, velocity: jax.Array, *_: jax.Array):
    velocity = decay.astype(gradient.dtype) * velocity + gradient
    return velocity, velocity


def _nesterov(decay: jax.Array, gradient: jax.Array, velocity: jax.Array, *_: jax.Array):
    velocity = decay.astype(gradient.dtype) * velocity + gradient
    return gradient + decay.astype(gradient.dtype) * velocity, velocity


def _scaled(
    decay: jax.Array, eps: jax.Array, gradient: jax.Array, square: jax.Array, *_: jax.Array
):
    square = _running(decay, square, jnp.square(gradient))
    return gradient / (jnp.sqrt(square) + eps.astype(gradient.dtype)), square


def _adam(
    b1: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    weight_decay: jax.Array,
    gradient: jax.Array,
    moments: tuple[jax.Array, jax.Array],
    params: jax.Array,
    step: jax.Array,
):
    dtype = gradient.dtype
    mean = _running(b1, moments[0], gradient)
    variance = _running(b2, moments[1], jnp.square(gradient))
    m_hat = mean / (1 - b1**step).astype(dtype)
    v_hat = variance / (1 - b2**step).astype(dtype)
    ahead = m_hat / (jnp.sqrt(v_hat) + eps.astype(dtype))
    return ahead + weight_decay.astype(dtype) * params, (mean, variance)


def _optimizer(init: Callable[[jax.Array], PyTree], direction: Partial, rate: Partial) -> Optimizer:
    return Optimizer(Partial(_start, Partial(init)), Partial(_advance, rate, direction))


def _start(init: Partial, params: PyTree) -> StepState:
    return StepState(jnp.zeros((), jnp.int32), init(_flat(params)))


def _advance(
    learning_rate: Partial, direction: Partial, gradients: PyTree, state: StepState, params: PyTree
):
    """On flat vectors: one loop over all numbers takes less than a loop for each leaf."""
    whole, unravel = ravel_pytree(params)
    step = jnp.minimum(state.step, jnp.iinfo(jnp.int32).max - 1) + 1
    time = step.astype(jnp.float32)
    rate = jnp.asarray(learning_rate(time - 1))
    _check_single(rate, direction)
    ahead, moments = direction(_flat(gradients), state.moments, _flat(params), time)
    updates = -rate.astype(ahead.dtype) * ahead
    return unravel(updates.astype(whole.dtype)), StepState(step, moments)


def _flat(tree: PyTree) -> jax.Array:
    """All numbers as one vector, in float32 at least: half precision has no 1e-8."""
    flat = ravel_pytree(tree)[0]
    return flat if flat.dtype.itemsize >= 4 else flat.astype(jnp.float32)


def _behind(change: Partial, optimizer: Optimizer) -> Optimizer:
    """The optimizer, its gradients changed by `change(gradients, params)` first."""
    check_optimizer(optimizer)
    init, update = (
        function if isinstance(function, Partial) else Partial(function)
        for function in (optimizer.init, optimizer.update)
    )
    return Optimizer(init, Partial(_update_changed, change, update))


def _update_changed(
    change: Partial,
    update: Partial,
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
    **extra: PyTree,
):
    return call_update(update, change(gradients, params), state, params, **extra)


def _clip(max_norm: jax.Array, gradients: PyTree, params: PyTree) -> PyTree:
    del params
    _check_single(max_norm)
    norm = global_norm(gradients)
    limit = max_norm.astype(norm.dtype)
    factor = jnp.where(norm > limit, limit / norm, 1)
    return jax.tree.map(
        lambda leaf: (factor * leaf.astype(factor.dtype)).astype(leaf.dtype), gradients
    )


def _add_penalty(strength: jax.Array, gradients: PyTree, params: PyTree) -> PyTree:
    _check_single(strength)

    def add(gradient: jax.Array, leaf: jax.Array) -> jax.Array:
        return gradient + (2 * strength).astype(leaf.dtype) * leaf

    return jax.tree.map(add, gradients, params)


def made_by(make: Partial, values: tuple[PyTree, ...]) -> Optimizer:
    """The optimizer `make(*values)`, of which numbers alone cross into compiled code."""
    return Optimizer(Partial(_init_made, make, values), Partial(_update_made, make, values))


def _init_made(make: Partial, values: tuple[PyTree, ...], params: PyTree) -> PyTree:
    return make(*values).init(params)


def _update_made(make: Partial, values: tuple[PyTree, ...], *arguments: PyTree, **extra: PyTree):
    return call_update(make(*values).update, *arguments, **extra)


def call_update(
    update: Function, gradients: PyTree, state: PyTree, params: PyTree, **extra: PyTree
) -> tuple[PyTree, PyTree]:
    """`update(gradients, state, params)`, with those of the extra arguments that it takes."""
    try:
        parameters = inspect.signature(update).parameters.values()
    except ValueError:  # compiled code may have no signature
        parameters = ()
    bound = getattr(update, "keywords", {})  # of a functools.partial
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = {*bound, *(p.name for p in positional[:3])}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {*extra} if takes_any else {p.name for p in parameters}
    return update(gradients, state, params, **{n: extra[n] for n in extra if n in names - given})


def _as_array(value: PyTree) -> PyTree:
    """A plain list of numbers would be a tree of scalars."""
    is_numbers = isinstance(value, (list, tuple)) and not any(map(np.ndim, value))
    return np.asarray(value) if is_numbers else value


def _extremes(values: PyTree) -> Collection[int]:
    """The networks with the least and the largest numbers: one of them is out of range, if any."""
    numbers = [leaf for leaf in jax.tree.leaves(values) if leaf.ndim == 1]
    real = [np.asarray(leaf) for leaf in numbers if getattr(leaf.dtype, "kind", "O") in "iuf"]
    return {0, *(int(find(leaf)) for leaf in real for find in (np.argmin, np.argmax))}


def check_optimizer(optimizer: object, name: str = "optimizer") -> None:
    """Refuses what has no `init` and `update`."""
    if isinstance(optimizer, Each):
        raise TypeError(
            f"{name} must be an optimizer of one network; got jaxnn.optimizers.each(...): put "
            "each around the whole: each(lambda rate: clip_by_global_norm(sgd(rate), 1.0), rates)"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{name} must have init and update, as jaxnn.optimizers.adam(0.05) has; "
            f"got a {type(optimizer).__name__}"
        )


def check_update(
    optimizer: Optimizer, update: Partial, params: PyTree, told: tuple[PyTree, ...]
) -> None:
    """Refuses `update(*told, gradients, state, params)` whose results are not like the last two."""
    state = shapes_of("optimizer.init", Partial(optimizer.init), params)
    try:
        results = shapes_of("optimizer.update", update, *told, params, state, params)
    except Exception as error:
        error.add_note(f"Its extra arguments can be {', '.join(EXTRA_ARGUMENTS)}.")
        raise
    if not (isinstance(results, tuple) and len(results) == 2):
        raise TypeError(
            f"optimizer.update must return (updates, state); got a {type(results).__name__}"
        )
    check_like("optimizer.update", "updates", results[0], params)
    types = [
        (jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)])
        for tree in (results[1], state)
    ]
    if types[0] != types[1]:
        raise TypeError(
            f"optimizer.update must return a state like that of optimizer.init, {state}; "
            f"got {results[1]}"
        )


def _check_single(*numbers: PyTree) -> None:
    """Refuses numbers with an axis, which `jax.vmap(adam)(rates)` gives an optimizer."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(numbers) if np.ndim(leaf)]
    if shapes:
        raise ValueError(
            f"optimizer must hold single numbers; got one of shape {shapes[0]}: an optimizer for "
            "each network is jaxnn.optimizers.each(jaxnn.optimizers.adam, rates)"
        )


def _decay(name: str, value: float) -> np.float32 | jax.Array:
    number = as_real(name, value, inclusive=True)
    if not isinstance(number, jax.Array) and number >= 1:
        raise ValueError(f"{name} must be below 1; got {float(value)}")
    return number
