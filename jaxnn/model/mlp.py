"""`mlp(...)` -> `Model`: a multi-layer perceptron as an immutable bundle of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn import metrics
from jaxnn.batch import Batch, check_batch, check_inputs, valid_rows
from jaxnn.model import backprop
from jaxnn.model.activations import ACTIVATIONS, HIDDEN_ACTIVATIONS
from jaxnn.model.heads import OUTPUT_LOSSES, Head, constant_loss
from jaxnn.model.init import Distribution, sampler
from jaxnn.model.layers import LayerShapes, Params, check_params, forward, layer_shapes, logits_of
from jaxnn.model.losses import LOSSES
from jaxnn.model.vmapped_loss import (
    batch_invariant,
    candidate_bytes,
    loss_by_rows,
    loss_by_scalars,
    with_fast_vmap,
)
from jaxnn.run.checks import as_choice, as_count, as_key
from jaxnn.typing import Traits


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
        return OUTPUT_LOSSES[self.output, self.loss]


@dataclass(frozen=True, repr=False)
class ModelFunction:
    """A function of a network; its settings and name say all, so it is hashable and pickles."""

    settings: Settings
    name: str

    def __post_init__(self):
        # `jax.jit` and other wrappers copy this dictionary to the function that they return.
        vars(self).update(__name__=self.name, __qualname__=f"{_call(self.settings)}.{self.name}")

    def __repr__(self) -> str:
        return f"{_call(self.settings)}.{self.name}"

    def __reduce__(self):
        return _function_of, (self.settings, self.name)


class InitFunction(ModelFunction):
    """Draws params to start from."""

    def __call__(
        self, key: jax.Array, *, scale: float = 0.01, distribution: Distribution = "normal"
    ) -> Params:
        """Return weights of `scale` times unit draws, and biases of 0."""
        shapes = self.settings.shapes
        draw = sampler(shapes, scale=scale, distribution=distribution, bias_scale=0.0)
        return draw(as_key("key", key, traced=True))


class SamplerFunction(ModelFunction):
    """Makes the function that draws whole weight sets."""

    def __call__(
        self,
        *unexpected: Any,
        scale: float | Sequence[float] = 1.0,
        distribution: Distribution = "normal",
        bias_scale: float | Sequence[float] | None = None,
    ) -> jax.tree_util.Partial:
        """Return a `sample_fn(key)`, as `jaxnn.model.init.sampler` describes it."""
        if unexpected:
            raise TypeError(
                "sample_fn must be what model.sampler(scale=1.0) returns, a function of a key; "
                "got model.sampler itself, without its call"
            )
        options = {"scale": scale, "distribution": distribution, "bias_scale": bias_scale}
        return sampler(self.settings.shapes, **options)


class ApplyFunction(ModelFunction):
    """The forward pass."""

    def __call__(self, params: Params, x: Any) -> jax.Array:
        """Return the outputs `(rows, outputs)` of inputs `(rows, features)`."""
        params = check_params("params", params, self.settings.shapes)
        x = check_inputs("x", x, self.settings.sizes[0])
        return _compiled(self.settings, self.name)(params, x)


class BatchFunction(ModelFunction):
    """A function of params and a batch, which a trainer can ask a few things beforehand."""

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(traits=self._traits())

    def __call__(self, params: Params, batch: Batch) -> Any:
        """Evaluate the function."""
        return _compiled(self.settings, self.name)(*self._border(params, batch))

    def validate(self, params: Params, batch: Batch) -> None:
        """Raise `TypeError` or `ValueError` for params or a batch of another network."""
        self._border(params, batch)

    def _traits(self) -> Traits:
        told = Traits(validate=self.validate, constant_loss=self.constant_loss)
        if self.name != "loss":
            return told
        return told._replace(candidate_bytes=candidate_bytes, batch_invariant=batch_invariant)

    def constant_loss(self, batch: Batch) -> float | None:
        """Return the lowest loss of an answer that is the same for every row, or None.

        A network whose loss is no lower has learnt nothing from its inputs. None means that the
        lowest is not known.
        """
        sizes, _, output, loss, _ = self.settings
        targets = check_batch("batch", batch, loss, sizes[0], sizes[-1]).y
        return constant_loss(output, loss, np.asarray(targets), sizes[-1])

    def _border(self, params: Params, batch: Batch) -> tuple[Params, Batch]:
        sizes, _, _, loss, _ = self.settings
        params = check_params("params", params, self.settings.shapes)
        batch = check_batch("batch", batch, loss, sizes[0], sizes[-1])
        if self.name == "accuracy" and loss == "mean_squared_error":
            raise ValueError(
                "accuracy must be of classes; got a network of loss 'mean_squared_error': "
                "use jaxnn.metrics.r2(model.apply(params, batch.x), batch.y)"
            )
        return params, batch


class Model(NamedTuple):
    """A network as pure functions of its params, a tuple of `Dense`.

    Categorical targets are classes or rows of weights, such as one-hot rows and soft labels.
    Targets that make no sense, such as a class out of range, are refused by name where their
    values are known. Elsewhere, as under a `jit` of your own or in a function around `loss`, they
    make the loss and its gradient nan. So do inputs that are not finite.

    Attributes:
        settings: sizes, activations, loss and biases, as given to `mlp`.
        init: `init(key, *, scale=0.01, distribution="normal")` -> params with zero biases.
        apply: `apply(params, x)` -> outputs of the output activation, `(rows, outputs)`.
        loss: `loss(params, batch)` -> mean loss, a scalar, exact for logits of +-1e4. Its
            `jax.grad` is the hand-written gradient; its `jax.vmap` over params is fast.
        value_and_grad: `value_and_grad(params, batch)` -> the loss and its gradient by hand.
        loss_reference: the same loss as a plain composition of JAX functions, the witness that
            autodiff differentiates, to any order.
        accuracy: `accuracy(params, batch)` -> share of right answers; classes only. The largest
            weight of a row is its class. Its `jax.vmap` over params is fast.
        sampler: `sampler(*, scale=1.0, distribution="normal", bias_scale=None)` ->
            `sample_fn(key)`, which draws whole weight sets.
    """

    settings: Settings
    init: InitFunction
    apply: ApplyFunction
    loss: BatchFunction
    value_and_grad: BatchFunction
    loss_reference: BatchFunction
    accuracy: BatchFunction
    sampler: SamplerFunction

    def __repr__(self) -> str:
        """The call that builds this network."""
        return _call(self.settings)

    def __reduce__(self):
        """Unpickle as the one `Model` of these settings, unless a function was replaced."""
        is_cached = self == _model(self.settings)
        return (_model, (self.settings,)) if is_cached else (Model, tuple(self))


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
    if (output, loss) not in OUTPUT_LOSSES:
        fitting = [pair[0] for pair in OUTPUT_LOSSES if pair[1] == loss]
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
    return Model(
        settings=settings,
        init=InitFunction(settings, "init"),
        apply=ApplyFunction(settings, "apply"),
        loss=BatchFunction(settings, "loss"),
        value_and_grad=BatchFunction(settings, "value_and_grad"),
        loss_reference=BatchFunction(settings, "loss_reference"),
        accuracy=BatchFunction(settings, "accuracy"),
        sampler=SamplerFunction(settings, "sampler"),
    )


def _function_of(settings: Settings, name: str) -> ModelFunction:
    return getattr(_model(settings), name)


@cache
def _compiled(settings: Settings, name: str) -> Callable[..., Any]:
    """Return the compiled function behind the border."""
    if name == "apply":
        return jax.jit(partial(_apply, settings))
    function = {
        "loss": _loss,
        "value_and_grad": lambda settings: partial(_value_and_grad, settings),
        "loss_reference": lambda settings: partial(_reference, settings),
        "accuracy": _accuracy,
    }[name](settings)
    return jax.jit(lambda params, batch: function(params, _cast(settings, params, batch)))


def _cast(settings: Settings, params: Params, batch: Batch) -> Batch:
    """Return the batch in the params' dtype; classes stay integers.

    A row whose targets make no sense gets nan as its inputs: from there nan reaches the loss and
    the gradient in every layout, and the inner loops cost no more.
    """
    dtype = params[0].weights.dtype
    x, y = jnp.asarray(batch.x).astype(dtype), jnp.asarray(batch.y)
    y = y.astype(dtype) if y.ndim == 2 else y
    makes_sense = valid_rows(y, settings.loss, settings.sizes[-1])[:, None] & jnp.isfinite(x)
    return Batch(jnp.where(makes_sense, x, jnp.nan), y)


def _apply(settings: Settings, params: Params, x: jax.Array) -> jax.Array:
    x = x.astype(params[0].weights.dtype)
    return forward(params, x, hidden=settings.hidden, output=settings.output)


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
    loss = jax.custom_vjp(with_fast_vmap(reference, *layouts))

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

    return with_fast_vmap(
        of_one_set, partial(in_layout, loss_by_scalars), partial(in_layout, loss_by_rows)
    )
