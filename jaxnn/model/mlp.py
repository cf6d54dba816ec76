"""`mlp(...)` -> `Model`: a multi-layer perceptron as an immutable bundle of pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxnn import metrics
from jaxnn.batch import CROSSENTROPIES, Batch, as_weights, check_batch, check_inputs, valid_rows
from jaxnn.model import backprop
from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.init import sampler
from jaxnn.model.layers import (
    Hidden,
    LayerShapes,
    Params,
    as_hidden,
    check_params,
    forward,
    layer_shapes,
    logits_of,
)
from jaxnn.model.losses import LOSSES, OUTPUT_LOSSES, Units, constant_loss
from jaxnn.model.vmapped_loss import (
    BINARY_ACCURACY,
    CATEGORICAL_ACCURACY,
    MAX_OUTPUTS,
    batch_invariant,
    candidate_bytes,
    loss_by_rows,
    with_fast_vmap,
)
from jaxnn.run.checks import as_choice, as_count, as_flag, as_key
from jaxnn.typing import Function, LossFn, MetricFn, Traits, ValueAndGradFn


class Settings(NamedTuple):
    """What a network is. The same settings share one `Model`."""

    sizes: tuple[int, ...]
    hidden: Hidden
    output: str
    loss: str
    hidden_biases: bool

    @property
    def shapes(self) -> LayerShapes:
        """For each layer the shape of its weights, and of its biases or None."""
        return layer_shapes(self.sizes, self.hidden_biases)

    def __repr__(self) -> str:
        """The call of `mlp` with these settings."""
        biases = "" if self.hidden_biases else ", hidden_biases=False"
        return (
            f"mlp({self.sizes}, hidden={self.hidden!r}, output={self.output!r}, "
            f"loss={self.loss!r}{biases})"
        )


class Model(NamedTuple):
    """A network as pure functions of its params, a tuple of `Dense`.

    Categorical targets are classes or rows of weights, such as one-hot rows and soft labels.
    Targets without a meaning, such as a class out of range, are refused by name where their
    values are known. Elsewhere, as under a `jit` of your own or in a function around `loss`, they
    make the loss and its gradient nan. So do inputs that are not finite.

    Attributes:
        settings: sizes, activations, loss and biases, as given to `mlp`.
        init: `init(key, *, scale=0.01, distribution="normal")` -> params with zero biases.
        apply: `apply(params, x)` -> outputs of the output activation, `(rows, outputs)`.
        predict: `predict(params, x)` -> predictions in the form of the targets: the most probable
            class `(rows,)` int32, ties to the lowest; of binary cross-entropy 1 where the
            probability is above 1/2 and else 0, `(rows, outputs)` int32; of other losses numbers
            `(rows, outputs)`.
        predict_proba: `predict_proba(params, x)` -> the probabilities of the classes
            `(rows, classes)`, or of a 1 `(rows, outputs)`; cross-entropies only.
        loss: `loss(params, batch)` -> mean loss, a scalar, exact for logits of +-1e4. Its
            `jax.grad` is the hand-written gradient; its `jax.vmap` over params is fast.
        value_and_grad: `value_and_grad(params, batch)` -> the loss and its gradient by hand.
        loss_reference: the same loss as a plain composition of JAX functions, the witness that
            autodiff differentiates, to any order.
        accuracy: `accuracy(params, batch)` -> share of right answers; classes only. The largest
            weight of a row is its class. Its `jax.vmap` over params is fast.
        sampler: `sampler(*, scale=1.0, distribution="normal", bias_scale=None)` ->
            `sample_fn(key)`, which draws params, as random search takes it.
    """

    settings: Settings
    init: Callable[..., Params]
    apply: Callable[[Params, ArrayLike], jax.Array]
    predict: Callable[[Params, ArrayLike], jax.Array]
    predict_proba: Callable[[Params, ArrayLike], jax.Array]
    loss: LossFn
    value_and_grad: ValueAndGradFn
    loss_reference: LossFn
    accuracy: MetricFn
    sampler: Callable[..., Partial]

    def __repr__(self) -> str:
        """The call that builds this network."""
        return repr(self.settings)

    def __reduce__(self):
        """Unpickle as the one `Model` of these settings, unless a function was replaced."""
        is_cached = self == _model(self.settings)
        return (_model, (self.settings,)) if is_cached else (Model, tuple(self))


def mlp(
    sizes: Sequence[int],
    *,
    hidden: str | Sequence[str] = "relu",
    output: str = "softmax",
    loss: str = "categorical_crossentropy",
    hidden_biases: bool = True,
) -> Model:
    """Return a fully connected network; the same settings return the same object.

    Args:
        sizes: features, units of each hidden layer, outputs; at least two entries.
        hidden: activation of the hidden layers: `"identity"`, `"relu"`, `"leaky_relu"`, `"elu"`,
            `"gelu"`, `"sigmoid"`, `"tanh"`; or one a hidden layer, as `("relu", "tanh")`.
        output: activation of the last layer: one of these or `"softmax"`.
        loss: `"mean_squared_error"`, `"mean_absolute_error"` or `"huber"` with any output,
            `"binary_crossentropy"` with sigmoid, `"categorical_crossentropy"` with softmax.
        hidden_biases: False leaves the biases of the hidden layers out.

    Raises:
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
    hidden = as_hidden(hidden, len(counts) - 2)
    as_choice("output", output, tuple(ACTIVATIONS))
    as_choice("loss", loss, LOSSES)
    if (output, loss) not in OUTPUT_LOSSES:
        fitting = [pair[0] for pair in OUTPUT_LOSSES if pair[1] == loss]
        raise ValueError(f"output must be {' or '.join(fitting)} for loss {loss!r}; got {output!r}")
    if output == "softmax" and counts[-1] < 2:
        raise ValueError(f"sizes must end in at least 2 for output 'softmax'; got {sizes}")
    return _model(Settings(counts, hidden, output, loss, as_flag("hidden_biases", hidden_biases)))


@cache
def _model(settings: Settings) -> Model:
    functions = {name: ModelFunction(settings, name) for name in Model._fields[1:]}
    return Model(settings, **functions)


@dataclass(frozen=True, repr=False)
class ModelFunction:
    """A function of a network. Its settings and name say all, so it is hashable and pickles."""

    settings: Settings
    name: str

    def __post_init__(self):
        # `jax.jit` and other wrappers copy this dictionary to the function that they return.
        vars(self).update(__name__=self.name, __qualname__=repr(self))
        if self.name in BATCH_FUNCTIONS:
            vars(self).update(traits=_traits(self.settings, self.name))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Check the arguments, and call the function."""
        given = self.__signature__.bind(*args, **options)
        if self.name in BATCH_FUNCTIONS:
            checked = _border(self.settings, self.name, *given.args)
            return _compiled(self.settings, self.name, *checked)
        return FUNCTIONS[self.name](self.settings, *given.args, **given.kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return _signature(self.name)

    def __repr__(self) -> str:
        return f"{self.settings}.{self.name}"

    def __reduce__(self):
        return getattr, (_model(self.settings), self.name)


@cache
def _signature(name: str) -> inspect.Signature:
    """Of a function behind its settings."""
    return inspect.signature(partial(FUNCTIONS[name], None))


def _traits(settings: Settings, name: str) -> Traits:
    sizes, _, output, loss, _ = settings

    def validate(params: Params, batch: Batch) -> None:
        _border(settings, name, params, batch)

    def lowest(batch: Batch) -> float | None:
        checked = check_batch("batch", batch, loss, sizes[0], sizes[-1])
        _, targets, weights = jax.tree.map(np.asarray, checked)
        return constant_loss(output, loss, targets, weights, sizes[-1])

    if name == "loss":
        bound = _bound_of(settings) if sizes[-1] <= MAX_OUTPUTS else None
        return Traits(validate, candidate_bytes, batch_invariant, lowest, bound, _of_mean_weight_1)
    return Traits(validate, constant_loss=lowest)


@cache
def _bound_of(settings: Settings) -> ModelFunction:
    """Return what a loss is at least, one object for the same settings."""
    return ModelFunction(settings, "lower_bound")


def _of_mean_weight_1(batch: Batch) -> Batch:
    """Return the batch with weights that have a mean of 1, if it has weights."""
    if batch.weights is None:
        return batch
    return batch._replace(weights=batch.weights / np.mean(batch.weights))


def _border(settings: Settings, name: str, params: Params, batch: Batch) -> tuple[Params, Batch]:
    """Refuse params or a batch of another network; return them as arrays."""
    params = check_params("params", params, settings.shapes)
    batch = check_batch("batch", batch, settings.loss, settings.sizes[0], settings.sizes[-1])
    if name == "accuracy" and settings.loss not in CROSSENTROPIES:
        raise ValueError(
            f"accuracy must be of classes; got a network of loss {settings.loss!r}: "
            "use jaxnn.metrics.r2(model.apply(params, batch.x), batch.y)"
        )
    return params, batch


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(settings: Settings, name: str, params: Params, batch: Batch) -> Any:
    # The batch gets the params' dtype; classes stay integers. A row whose targets have no meaning
    # gets nan as its inputs, which reaches loss and gradient at no cost to the inner loops.
    dtype = params[0].weights.dtype
    x, y = jnp.asarray(batch.x).astype(dtype), jnp.asarray(batch.y)
    y = y.astype(dtype) if y.ndim == 2 else y
    valid = valid_rows(y, settings.loss, settings.sizes[-1])[:, None] & jnp.isfinite(x)
    batch = Batch(jnp.where(valid, x, jnp.nan), y, as_weights(batch.weights, dtype))
    return FUNCTIONS[name](settings, params, batch)


def _init(settings: Settings, key: jax.Array, *, scale=0.01, distribution="normal") -> Params:
    draw = _sampler(settings, scale=scale, distribution=distribution, bias_scale=0.0)
    return draw(as_key("key", key, traced=True))


def _sampler(settings: Settings, *unexpected, scale=1.0, distribution="normal", bias_scale=None):
    if unexpected:
        raise TypeError(
            "sample_fn must be what model.sampler(scale=1.0) returns, a function of a key; "
            "got model.sampler itself, without its call"
        )
    options: Any = {"scale": scale, "distribution": distribution, "bias_scale": bias_scale}
    return sampler(settings.shapes, **options)


def _apply(settings: Settings, params: Params, x: ArrayLike) -> jax.Array:
    params = check_params("params", params, settings.shapes)
    return _compiled_apply(settings, params, check_inputs("x", x, settings.sizes[0]))


@partial(jax.jit, static_argnums=0)
def _compiled_apply(settings: Settings, params: Params, x: jax.Array) -> jax.Array:
    x = x.astype(params[0].weights.dtype)
    return forward(params, x, hidden=settings.hidden, output=settings.output)


def _predict(settings: Settings, params: Params, x: ArrayLike) -> jax.Array:
    if settings.loss == "categorical_crossentropy":
        # Of the logits, as in `accuracy`: softmax rounds the largest two to one number.
        scores = _apply(settings._replace(output="identity"), params, x)
        return jnp.argmax(scores, axis=1).astype(jnp.int32)
    outputs = _apply(settings, params, x)
    is_binary = settings.loss == "binary_crossentropy"
    return (outputs > 0.5).astype(jnp.int32) if is_binary else outputs


def _predict_proba(settings: Settings, params: Params, x: ArrayLike) -> jax.Array:
    if settings.loss not in CROSSENTROPIES:
        raise ValueError(
            f"predict_proba must be of classes; got a network of loss {settings.loss!r}: "
            "model.predict(params, x) returns its numbers"
        )
    return _apply(settings, params, x)


def _loss_reference(settings: Settings, params: Params, batch: Batch) -> jax.Array:
    logits = logits_of(params, batch.x, settings.hidden)
    mean_loss = OUTPUT_LOSSES[settings.output, settings.loss].mean_loss
    return mean_loss(logits, batch.y, batch.weights)


def _value_and_grad(settings: Settings, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    output_loss = OUTPUT_LOSSES[settings.output, settings.loss]
    return backprop.value_and_grad(params, batch, settings.hidden, output_loss)


def _loss(settings: Settings, params: Params, batch: Batch) -> jax.Array:
    """The loss with a fast `vmap`, and with the hand-written gradient as its `jax.grad`."""
    reference = partial(_loss_reference, settings)
    per_example = OUTPUT_LOSSES[settings.output, settings.loss].per_example_loss
    loss = jax.custom_vjp(with_fast_vmap(reference, settings.hidden, per_example))

    def forward_pass(params: Params, batch: Batch):
        value, gradient = _value_and_grad(settings, params, batch)
        return value, (gradient, params, batch)

    def backward_pass(residuals: Any, upstream: jax.Array):
        gradient, params, batch = residuals
        _, pull_back = jax.vjp(lambda rows: reference(params, rows), batch)
        return jax.tree.map(lambda leaf: upstream * leaf, gradient), *pull_back(upstream)

    loss.defvjp(forward_pass, backward_pass)
    return loss(params, batch)


def _lower_bound(settings: Settings, params: Params, batch: Batch) -> jax.Array:
    """What the loss is at least, without its factors of 1 or more: no exp, and no log.

    It is the mean over rows of weights times losses: the weights have a mean of 1 in all.
    """
    per_example = OUTPUT_LOSSES[settings.output, settings.loss].per_example_loss

    def score(logits: Units, target: jax.Array) -> tuple[None, jax.Array]:
        return None, per_example.score(logits, target)[1]

    options = {"hidden": settings.hidden, "per_example": per_example._replace(score=score)}
    bound = with_fast_vmap(partial(loss_by_rows, **options), **options)(params, batch)
    return bound if batch.weights is None else bound * jnp.mean(batch.weights)


def _accuracy(settings: Settings, params: Params, batch: Batch) -> jax.Array:
    """The share of right answers, with a fast `vmap`."""
    is_binary = settings.loss == "binary_crossentropy"
    per_example = BINARY_ACCURACY if is_binary else CATEGORICAL_ACCURACY
    if not is_binary and batch.y.ndim == 2:
        batch = batch._replace(y=jnp.argmax(batch.y, axis=1))

    def plain(params: Params, batch: Batch) -> jax.Array:
        logits = logits_of(params, batch.x, settings.hidden)
        if is_binary:
            share = metrics.binary_accuracy(jax.nn.sigmoid(logits), batch.y, batch.weights)
        else:
            share = metrics.accuracy(logits, batch.y, batch.weights)
        return share.astype(logits.dtype)

    return with_fast_vmap(plain, settings.hidden, per_example)(params, batch).astype(jnp.float32)


FUNCTIONS: dict[str, Function] = {
    "init": _init,
    "apply": _apply,
    "predict": _predict,
    "predict_proba": _predict_proba,
    "loss": _loss,
    "value_and_grad": _value_and_grad,
    "loss_reference": _loss_reference,
    "lower_bound": _lower_bound,
    "accuracy": _accuracy,
    "sampler": _sampler,
}
"""The functions of a `Model`, with its settings in front."""

BATCH_FUNCTIONS = ("loss", "value_and_grad", "loss_reference", "accuracy", "lower_bound")
"""Those of params and a batch, which run compiled and have traits."""
