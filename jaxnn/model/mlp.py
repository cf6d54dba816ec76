"""`mlp(...)` -> `Model`: a multi-layer perceptron as an immutable bundle of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnn import metrics
from jaxnn.batch import Batch, check_batch, check_inputs
from jaxnn.model import backprop
from jaxnn.model.activations import ACTIVATIONS, HIDDEN_ACTIVATIONS
from jaxnn.model.heads import HEADS, Head
from jaxnn.model.init import Distribution, sampler
from jaxnn.model.layers import LayerShapes, Params, check_params, forward, layer_shapes, logits_of
from jaxnn.model.losses import LOSSES
from jaxnn.model.vmapped_loss import (
    bytes_per_set,
    loss_by_rows,
    loss_by_scalars,
    many_at_once,
    rounds_alike,
)
from jaxnn.run.checks import as_choice, as_count, as_key

__all__ = ["Model", "mlp"]


class Settings(NamedTuple):
    """What a network is; the same settings share one `Model`."""

    sizes: tuple[int, ...]
    hidden: str
    output: str
    loss: str
    hidden_biases: bool

    @property
    def shapes(self) -> LayerShapes:
        """For each layer the shape of its weights, and of its biases or None."""
        return layer_shapes(self.sizes, self.hidden_biases)

    @property
    def head(self) -> Head:
        """Output activation and loss as one function of the logits."""
        return HEADS[self.output, self.loss]


class BatchFunction(Protocol):
    """A pure function of params and a batch that can refuse both before compilation."""

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Evaluates the function."""
        ...

    def validate(self, params: Params, batch: Batch) -> None:
        """Raises `TypeError` or `ValueError` for params or a batch of another network."""
        ...


class Model(NamedTuple):
    """A network as pure functions of its params, a tuple of `Dense`.

    Attributes:
        settings: sizes, activations, loss and biases, as given to `mlp`.
        init: `init(key, *, scale=0.01, distribution="normal")` -> params with zero biases.
        apply: `apply(params, x)` -> outputs of the output activation, `(rows, outputs)`.
        loss: `loss(params, batch)` -> mean loss, a scalar, exact for logits of +-1e4. Its
            `jax.grad` is the hand-written gradient; its `jax.vmap` over params is fast.
        value_and_grad: `value_and_grad(params, batch)` -> the loss and its gradient by hand.
            Categorical targets are classes or one-hot rows; soft ones are refused where values
            are known, so not under a `jit` of your own, where they would give another loss.
        loss_reference: the same loss as a plain composition of JAX functions, the witness that
            autodiff differentiates, to any order.
        accuracy: `accuracy(params, batch)` -> share of right answers; classes only. Its
            `jax.vmap` over params is fast.
        sampler: `sampler(*, scale=1.0, distribution="normal", bias_scale=None)` ->
            `sample_fn(key)`, which draws whole weight sets.
    """

    settings: Settings
    init: Callable[..., Params]
    apply: Callable[[Params, ArrayLike], jax.Array]
    loss: BatchFunction
    value_and_grad: BatchFunction
    loss_reference: BatchFunction
    accuracy: BatchFunction
    sampler: Callable[..., jax.tree_util.Partial]

    def __repr__(self) -> str:
        """The call that builds this network."""
        return _call(self.settings)


def mlp(
    sizes: Sequence[int],
    *,
    hidden: str = "relu",
    output: str = "softmax",
    loss: str = "categorical_crossentropy",
    hidden_biases: bool = True,
) -> Model:
    """A fully connected network; the same settings return the same object.

    Args:
        sizes: features, units of each hidden layer, outputs; at least two entries.
        hidden: activation of the hidden layers: `"identity"`, `"relu"`, `"sigmoid"`, `"tanh"`.
        output: activation of the last layer: one of these or `"softmax"`.
        loss: `"mean_squared_error"` with any output, `"binary_crossentropy"` with sigmoid,
            `"categorical_crossentropy"` with softmax.
        hidden_biases: False leaves the biases of the hidden layers out.

    Returns:
        A `Model`.

    Raises:
        TypeError: if a size is not an integer or a name not a word.
        ValueError: if a size or a name is out of range, or output and loss do not fit.

    Example:
        >>> model = mlp((2, 3, 3), hidden="relu")
        >>> model.apply(model.init(jax.random.key(0)), jnp.zeros((4, 2))).shape
        (4, 3)
    """
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(f"sizes must be a sequence of integers; got a {type(sizes).__name__}")
    if len(sizes) < 2:
        raise ValueError(f"sizes must have at least 2 entries, features and outputs; got {sizes}")
    counts = tuple(as_count(f"sizes[{i}]", size, minimum=1) for i, size in enumerate(sizes))
    as_choice("hidden", hidden, HIDDEN_ACTIVATIONS)
    as_choice("output", output, tuple(ACTIVATIONS))
    as_choice("loss", loss, LOSSES)
    if (output, loss) not in HEADS:
        fitting = [pair[0] for pair in HEADS if pair[1] == loss]
        raise ValueError(f"output must be {' or '.join(fitting)} for loss {loss!r}; got {output!r}")
    if output == "softmax" and counts[-1] < 2:
        raise ValueError(f"sizes must end in at least 2 for output 'softmax'; got {sizes}")
    if not isinstance(hidden_biases, bool):
        raise TypeError(f"hidden_biases must be True or False; got {hidden_biases!r}")
    return _model(Settings(counts, hidden, output, loss, hidden_biases))


def _call(settings: Settings) -> str:
    """The call of `mlp` with these settings."""
    sizes, hidden, output, loss, hidden_biases = settings
    biases = "" if hidden_biases else ", hidden_biases=False"
    return f"mlp({sizes}, hidden={hidden!r}, output={output!r}, loss={loss!r}{biases})"


@cache
def _model(settings: Settings) -> Model:
    shapes = settings.shapes
    return Model(
        settings=settings,
        init=partial(_init, shapes),
        apply=_apply(settings),
        loss=_checked(
            settings,
            "loss",
            _loss(settings),
            bytes_per_set=bytes_per_set,
            rounds_alike=rounds_alike,
        ),
        value_and_grad=_checked(settings, "value_and_grad", partial(_value_and_grad, settings)),
        loss_reference=_checked(settings, "loss_reference", partial(_reference, settings)),
        accuracy=_checked(settings, "accuracy", _accuracy(settings)),
        sampler=partial(sampler, shapes),
    )


def _init(
    shapes: LayerShapes,
    key: jax.Array,
    *,
    scale: float = 0.01,
    distribution: Distribution = "normal",
) -> Params:
    """Params to start from: weights `scale` times unit draws, biases 0."""
    draw = sampler(shapes, scale=scale, distribution=distribution, bias_scale=0.0)
    return draw(as_key("key", key, traced=True))


def _apply(settings: Settings) -> Callable[[Params, ArrayLike], jax.Array]:
    @jax.jit
    def compiled(params: Params, x: jax.Array) -> jax.Array:
        x = x.astype(params[0].weights.dtype)
        return forward(params, x, hidden=settings.hidden, output=settings.output)

    def apply(params: Params, x: ArrayLike) -> jax.Array:
        check_params("params", params, settings.shapes)
        check_inputs("x", x, settings.sizes[0])
        return compiled(params, jnp.asarray(x))

    return apply


def _checked(
    settings: Settings, name: str, function: Callable[[Params, Batch], Any], **attributes: Any
) -> BatchFunction:
    """The compiled function behind its border check, which it carries as `validate`."""
    compiled = jax.jit(lambda params, batch: function(params, _cast(params, batch)))

    def validate(params: Params, batch: Batch) -> None:
        check_params("params", params, settings.shapes)
        check_batch("batch", batch, settings.loss, settings.sizes[0], settings.sizes[-1])
        if name == "accuracy" and settings.loss == "mean_squared_error":
            raise ValueError(
                "accuracy must be of classes; got a network of loss 'mean_squared_error': "
                "use jaxnn.metrics.r2(model.apply(params, batch.x), batch.y)"
            )

    def checked(params: Params, batch: Batch) -> Any:
        validate(params, batch)
        return compiled(params, batch)

    checked.__name__, checked.__qualname__ = name, f"{_call(settings)}.{name}"
    vars(checked).update(validate=validate, **attributes)
    return cast(BatchFunction, checked)


def _cast(params: Params, batch: Batch) -> Batch:
    """The batch with inputs, and targets if they are floats, of the params' dtype."""
    dtype = params[0].weights.dtype
    y = jnp.asarray(batch.y)
    if jnp.issubdtype(y.dtype, jnp.floating):
        y = y.astype(dtype)
    return Batch(jnp.asarray(batch.x).astype(dtype), y)


def _reference(settings: Settings, params: Params, batch: Batch) -> jax.Array:
    logits = logits_of(params, jnp.asarray(batch.x), settings.hidden)
    return settings.head.loss(logits, jnp.asarray(batch.y))


def _value_and_grad(settings: Settings, params: Params, batch: Batch):
    return backprop.value_and_grad(params, batch, settings.hidden, settings.head)


def _loss(settings: Settings) -> Callable[[Params, Batch], jax.Array]:
    """The loss with a fast `vmap` and with the hand-written gradient as its `jax.grad`."""
    reference = partial(_reference, settings)
    names = {"hidden": settings.hidden, "output": settings.output, "loss": settings.loss}
    layouts = partial(loss_by_scalars, **names), partial(loss_by_rows, **names)
    loss = jax.custom_vjp(many_at_once(reference, *layouts))

    def forward_pass(params: Params, batch: Batch):
        value, gradient = _value_and_grad(settings, params, batch)
        return value, (gradient, params, batch)

    def backward_pass(residuals: Any, upstream: jax.Array):
        gradient, params, batch = residuals
        _, pull_back = jax.vjp(lambda rows: reference(params, rows), batch)
        return jax.tree.map(lambda leaf: upstream * leaf, gradient), *pull_back(upstream)

    loss.defvjp(forward_pass, backward_pass)
    return loss


def _accuracy(settings: Settings) -> Callable[[Params, Batch], jax.Array]:
    """The share of right answers, with a fast `vmap`."""
    is_binary = settings.loss == "binary_crossentropy"
    score = "binary_accuracy" if is_binary else "categorical_accuracy"
    names = {"hidden": settings.hidden, "output": settings.output, "loss": score}

    def of_one_set(params: Params, batch: Batch) -> jax.Array:
        logits = logits_of(params, jnp.asarray(batch.x), settings.hidden)
        if is_binary:
            return metrics.binary_accuracy(jax.nn.sigmoid(logits), batch.y)
        return metrics.accuracy(logits, batch.y)

    def in_layout(layout: Callable[..., jax.Array], params: Params, batch: Batch) -> jax.Array:
        return layout(params, batch, **names).astype(jnp.float32)

    return many_at_once(
        of_one_set, partial(in_layout, loss_by_scalars), partial(in_layout, loss_by_rows)
    )
