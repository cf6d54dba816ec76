"""Sixty wrong gradients: five typical faults in each of twelve gradients written by hand.

A gradient is written once. Where a fault is planted it says `fault(right, name=wrong, ...)`, which
is `right` unless that name is asked for. `FAULTS` says which leaves a fault reaches, and what its
diagnosis has to say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.typing import LossFn

Params = dict[str, Any]
ROWS, CLASSES, PENALTY = 6, 3, 0.1


class Fault(NamedTuple):
    """The leaves that a fault reaches, and a pattern that the suggestions must match."""

    leaves: str
    said: str


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss, `gradient(fault, params, batch)` by hand with planted faults, params and a batch."""

    loss: LossFn
    gradient: Callable[[Callable[..., Any], Params, Any], Params]
    shapes: Mapping[str, tuple[int, ...]]
    batch: tuple[np.ndarray, ...]
    faults: Mapping[str, Fault]

    def _value_and_grad(self, number: Any, params: Params, batch: Any) -> tuple[Any, Params]:
        names = list(self.faults)

        def fault(right: Any, **wrong: Any) -> Any:
            for name, value in wrong.items():
                right = jnp.where(number == names.index(name), value, right)
            return right

        return self.loss(params, batch), self.gradient(fault, params, batch)

    def value_and_grad(self, name: str | None = None) -> Partial:
        """Return the gradient with the fault of a name, or the right one; all compile once."""
        number = -1 if name is None else list(self.faults).index(name)
        return Partial(self._value_and_grad, np.int32(number))

    def sample(self, key: jax.Array) -> Params:
        """Draw params."""
        keys = jax.random.split(key, len(self.shapes))
        pairs = zip(keys, self.shapes.items(), strict=True)
        return {name: jax.random.normal(one, shape) for one, (name, shape) in pairs}


def _rounded(seed: int, *shape: int) -> np.ndarray:
    """Normals rounded to halves, so that params of whole numbers meet kinks exactly."""
    return (np.round(2 * np.random.default_rng(seed).normal(size=shape)) / 2).astype(np.float32)


# Inputs of one sign: units at 0 then go on in the same direction, in every row, and a slope of 0
# for all of them lies between the slopes of the loss on both sides.
X, WIDE = np.abs(_rounded(1, ROWS, 3)), np.abs(_rounded(2, ROWS, 7))
SERIES = _rounded(3, ROWS, 4, 2)
NUMBERS, TWO_LABELS = _rounded(7, ROWS), np.array([0, 1, 1, 0, 1, 0], np.float32)
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[[0, 1, 2, 2, 1, 2]]

SIGN, LEFT_OUT, OUTPUTS = "of the wrong sign", "left out", "derivative of the loss by the outputs"
NO_MEAN, MEAN_TWICE = r"1/6 is missing \(6 rows\)", r"1/6 is there twice \(6 rows"
ROW, RELU, TANH = (
    "(first|last) row",
    "relu's derivative is not 0",
    "an activation's derivative is left out, or",
)
NOT_TRANSPOSED, COEFFICIENT = "is symmetric: that is transposed, or not", "times the params: a pen"


# --- regressions


def predict(params: Params, x: Any) -> Any:
    """Return `x w + b`, of one output or of several."""
    bias = params["b"] if params["w"].ndim == 1 else params["b"][None, :]
    return x @ params["w"] + bias


def linear(params: Params, batch: Any) -> Any:
    """Return the mean squared error of a line."""
    return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)


def linear_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    d = 2 * (predict(params, x) - y) / len(y)
    d = fault(d, sign=-d, no_2=d / 2, no_mean=len(y) * d, last_row_left_out=d.at[-1].set(0))
    b = jnp.sum(d)
    return {"w": x.T @ d, "b": fault(b, bias_forgotten=0 * b)}


LINEAR = {
    "sign": Fault("b w", SIGN),
    "no_2": Fault("b w", r"the 2 of 2x, .* is missing"),
    "no_mean": Fault("b w", NO_MEAN),
    "last_row_left_out": Fault("b w", ROW),
    "bias_forgotten": Fault("b", LEFT_OUT),
}


def logistic(params: Params, batch: Any) -> Any:
    """Return the mean binary cross-entropy of logits."""
    z = predict(params, batch[0])
    return jnp.mean(jnp.logaddexp(z, 0) - batch[1] * z)


def logistic_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    z = predict(params, x)
    p = jax.nn.sigmoid(z)
    d = p - y
    d = fault(d, sigmoid_forgotten=z - y, labels_forgotten=p, slope_twice=d * p * (1 - p)) / len(y)
    d = fault(d, mean_twice=d / len(y))
    return {"w": x.T @ d, "b": fault(jnp.sum(d), bias_of_first_row=d[0])}


LOGISTIC = {
    "sigmoid_forgotten": Fault("b w", OUTPUTS),
    "labels_forgotten": Fault("b w", OUTPUTS),
    "slope_twice": Fault("b w", OUTPUTS),
    "mean_twice": Fault("b w", MEAN_TWICE),
    "bias_of_first_row": Fault("b", ROW),
}


def cross_entropy(z: Any, one_hot: Any) -> Any:
    """Return the mean cross-entropy of logits."""
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - jnp.sum(z * one_hot, axis=1))


def softmax(params: Params, batch: Any) -> Any:
    """Return the mean cross-entropy of a linear classifier."""
    return cross_entropy(predict(params, batch[0]), batch[1])


def softmax_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    z = predict(params, x)
    p, over_rows, shifted = jax.nn.softmax(z, axis=1), jax.nn.softmax(z, axis=0), jnp.roll(y, 1, 1)
    d = fault(p - y, softmax_over_rows=over_rows - y, class_off_by_one=p - shifted) / len(y)
    w = x.T @ d
    return {
        "w": fault(w, transposed=w.T, no_mean_of_weights=len(y) * w, sign_of_weights=-w),
        "b": jnp.sum(d, axis=0),
    }


SOFTMAX = {
    "softmax_over_rows": Fault("b w", OUTPUTS),
    "class_off_by_one": Fault("b w", OUTPUTS),
    "transposed": Fault("w", "transposed$"),
    "no_mean_of_weights": Fault("w", NO_MEAN),
    "sign_of_weights": Fault("w", SIGN),
}


def huber(params: Params, batch: Any) -> Any:
    """Return the mean of squares that turn into lines beyond 1."""
    r = predict(params, batch[0]) - batch[1]
    size = jnp.abs(r)
    return jnp.mean(jnp.where(size <= 1, r * r / 2, size - 0.5))


def huber_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    r = predict(params, x) - y
    d = fault(
        jnp.clip(r, -1, 1),
        bound_moved=jnp.clip(r, -1.1, 1.1),
        not_clipped=r,
        sign_of_lines_lost=jnp.where(jnp.abs(r) <= 1, r, 1),
        factor_2=2 * jnp.clip(r, -1, 1),
    ) / len(y)
    w = x.T @ d
    return {"w": fault(w, one_coordinate=w.at[1].multiply(1.001)), "b": jnp.sum(d)}


HUBER = {
    "bound_moved": Fault("b w", "bound"),
    "not_clipped": Fault("b w", "bound"),
    "sign_of_lines_lost": Fault("b w", "sign"),
    "factor_2": Fault("b w", "2 times too large"),
    "one_coordinate": Fault("w", "wrong in 1 of 3 coordinates"),
}


def absolute(params: Params, batch: Any) -> Any:
    """Return the mean absolute error of a line."""
    return jnp.mean(jnp.abs(predict(params, batch[0]) - batch[1]))


def absolute_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    r = predict(params, x) - y
    d = fault(jnp.sign(r), of_squares=2 * r, sign_lost=jnp.abs(jnp.sign(r))) / len(y)
    d = fault(d, targets_minus_outputs=-d)
    w, b = x.T @ d, jnp.sum(d)
    return {"w": fault(w, reversed_weights=w[::-1]), "b": fault(b, sum_in_bias=len(y) * b)}


ABSOLUTE = {
    "of_squares": Fault("b w", OUTPUTS),
    "sign_lost": Fault("b w", OUTPUTS),
    "targets_minus_outputs": Fault("b w", SIGN),
    "reversed_weights": Fault("w", "another order"),
    "sum_in_bias": Fault("b", NO_MEAN),
}


def ridge(params: Params, batch: Any) -> Any:
    """Return the mean squared error of a line, with a penalty on its slopes."""
    return linear(params, batch) + PENALTY * jnp.sum(params["w"] ** 2)


def ridge_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    d = 2 * (predict(params, x) - y) / len(y)
    strength = 2 * PENALTY * fault(1.0, no_penalty=0.0, no_2=0.5, penalty_over_rows=1 / len(y))
    w = x.T @ d + strength * params["w"]
    return {
        "w": fault(w, in_float32=w.astype(jnp.float32).astype(w.dtype)),
        "b": jnp.sum(d) + fault(0.0, penalty_on_bias=2 * PENALTY) * params["b"],
    }


RIDGE = {
    "no_penalty": Fault("w", COEFFICIENT),
    "no_2": Fault("w", COEFFICIENT),
    "penalty_over_rows": Fault("w", COEFFICIENT),
    "in_float32": Fault("w", "in float32"),
    "penalty_on_bias": Fault("b", COEFFICIENT),
}

# --- networks


def layers(params: Params, x: Any, activation: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """Return the inputs and the sums of every layer; the activation follows all but the last."""
    inputs, sums, depth = [x], [], len(params) // 2
    for layer in range(depth):
        sums.append(inputs[-1] @ params[f"w{layer}"] + params[f"b{layer}"][None, :])
        inputs += [activation(sums[-1])] * (layer < depth - 1)
    return inputs, sums


def slopes(inputs: Sequence[Any], by_sums: Sequence[Any]) -> Params:
    """Return the gradient of every layer, by its inputs and the gradient by its sums."""
    found = {}
    for layer, (values, d) in enumerate(zip(inputs, by_sums, strict=True)):
        found |= {f"w{layer}": values.T @ d, f"b{layer}": jnp.sum(d, axis=0)}
    return found


def tanh_network(params: Params, batch: Any) -> Any:
    """Return the mean squared error of a network with tanh."""
    return jnp.mean((layers(params, batch[0], jnp.tanh)[1][-1][:, 0] - batch[1]) ** 2)


def tanh_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    inputs, sums = layers(params, x, jnp.tanh)
    _, h1, h2 = inputs
    d2 = 2 * (sums[-1] - y[:, None]) / len(y)
    slope = fault(1 - h2**2, tanh_at_output=1 - jnp.tanh(h2) ** 2, tanh_left_out=1.0)
    d1 = (d2 @ params["w2"].T) * slope
    d0 = (d1 @ fault(params["w1"].T, not_transposed=params["w1"])) * (1 - h1**2)
    right = slopes(inputs, (d0, d1, d2))
    w0 = fault(right["w0"], one_leaf_slightly=1.0001 * right["w0"])
    return right | {"w0": w0, "b1": fault(right["b1"], mean_in_bias=right["b1"] / len(y))}


TANH_NETWORK = {
    "tanh_at_output": Fault("b0 b1 w0 w1", TANH),
    "tanh_left_out": Fault("b0 b1 w0 w1", TANH),
    "not_transposed": Fault("b0 w0", NOT_TRANSPOSED),
    "one_leaf_slightly": Fault("w0", r"factor 1\.0001"),
    "mean_in_bias": Fault("b1", MEAN_TWICE),
}


def relu_network(params: Params, batch: Any) -> Any:
    """Return the mean cross-entropy of a network with relu."""
    return cross_entropy(layers(params, batch[0], jax.nn.relu)[1][-1], batch[1])


def relu_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient; `as_of_relu6` cuts units off above 6, which few ever reach."""
    x, y = batch
    inputs, (z0, z1, z2) = layers(params, x, jax.nn.relu)
    d2 = (jax.nn.softmax(z2) - y) / len(y)
    on0, on1 = (jnp.where(z > 0, 1.0, 0.0) for z in (z0, z1))
    d1 = (d2 @ params["w2"].T) * fault(on1, as_of_relu6=jnp.where(z1 < 6, on1, 0))
    on = fault(on0, relu_left_out=1.0, mask_of_next=on1, leak=jnp.maximum(on0, 0.01))
    d0 = (d1 @ params["w1"].T) * on
    right = slopes(inputs, (d0, d1, d2))
    return right | {"b2": fault(right["b2"], bias_of_last_row=d2[-1])}


RELU_NETWORK = {
    "as_of_relu6": Fault("b0 b1 w0 w1", "rare case"),
    "relu_left_out": Fault("b0 w0", RELU),
    "mask_of_next": Fault("b0 w0", RELU),
    "leak": Fault("b0 w0", RELU),
    "bias_of_last_row": Fault("b2", ROW),
}


def sigmoid_network(params: Params, batch: Any) -> Any:
    """Return the mean binary cross-entropy of a network with sigmoids."""
    z = layers(params, batch[0], jax.nn.sigmoid)[1][-1][:, 0]
    return jnp.mean(jnp.logaddexp(z, 0) - batch[1] * z)


def sigmoid_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    (_, h), (z0, z1) = layers(params, x, jax.nn.sigmoid)
    p = jax.nn.sigmoid(z1)
    d1 = (p - y[:, None]) / len(y)
    d1 = fault(d1, output_slope_twice=d1 * p * (1 - p))
    twice = jax.nn.sigmoid(h)
    slope = fault(
        h * (1 - h),
        at_input=z0 * (1 - z0),
        at_output=twice * (1 - twice),
        left_out=jnp.ones_like(h),
    )
    d0 = (d1 @ params["w1"].T) * slope
    d0 = fault(d0, sign_of_hidden=-d0)
    return slopes((x, h), (d0, d1))


SIGMOID_NETWORK = {
    "output_slope_twice": Fault("b0 b1 w0 w1", OUTPUTS),
    "at_input": Fault("b0 w0", "with the input z in place of the output a"),
    "at_output": Fault("b0 w0", "is taken at its output instead of its input"),
    "left_out": Fault("b0 w0", r"a \(1 - a\) is left out"),
    "sign_of_hidden": Fault("b0 w0", SIGN),
}

# --- other layers


def normalised(params: Params, x: Any) -> tuple[Any, Any]:
    """Return the sums of a layer with mean 0 and deviation 1 in each row, and the deviations."""
    z = x @ params["w"]
    z = z - jnp.mean(z, axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True) + 1e-2)
    return z / deviation, deviation


def layer_norm(params: Params, batch: Any) -> Any:
    """Return the mean squared error after a layer norm."""
    outputs = normalised(params, batch[0])[0] * params["gain"][None, :] + params["shift"][None, :]
    return jnp.mean((outputs - batch[1]) ** 2)


def layer_norm_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    n, deviation = normalised(params, x)
    d = 2 * (n * params["gain"][None, :] + params["shift"][None, :] - y) / y.size
    dn = d * fault(params["gain"], gain_forgotten=jnp.ones_like(params["gain"]))[None, :]
    mean = fault(jnp.mean(dn, axis=1, keepdims=True), mean_taken_as_constant=0.0)
    spread = n * jnp.mean(dn * n, axis=1, keepdims=True)
    spread = fault(spread, deviation_taken_as_constant=0 * spread)
    gain = jnp.sum(d * n, axis=0)
    return {
        "w": x.T @ ((dn - mean - spread) / deviation),
        "gain": fault(gain, sign_of_gain=-gain),
        "shift": fault(jnp.sum(d, axis=0), shift_of_first_row=d[0]),
    }


LAYER_NORM = {
    "gain_forgotten": Fault("w", "gain"),
    "mean_taken_as_constant": Fault("w", "mean"),
    "deviation_taken_as_constant": Fault("w", "deviation"),
    "sign_of_gain": Fault("gain", SIGN),
    "shift_of_first_row": Fault("shift", ROW),
}


def convolved(params: Params, x: Any) -> Any:
    """Return what a kernel of 3 makes of rows of 7: rows of 5."""
    return sum(params["kernel"][k] * x[:, k : k + 5] for k in range(3)) + params["bias"]


def convolution(params: Params, batch: Any) -> Any:
    """Return the mean squared error of a convolution with relu and a linear output."""
    return jnp.mean((jax.nn.relu(convolved(params, batch[0])) @ params["out"] - batch[1]) ** 2)


def convolution_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient."""
    x, y = batch
    z = convolved(params, x)
    h = jax.nn.relu(z)
    d = 2 * (h @ params["out"] - y) / len(y)
    dz = d[:, None] * params["out"][None, :] * fault(jnp.where(z > 0, 1.0, 0.0), relu_left_out=1.0)
    x = fault(x, input_shifted=jnp.roll(x, 1, axis=1))
    kernel = jnp.stack([jnp.sum(dz * x[:, k : k + 5]) for k in range(3)])
    last = jnp.stack([jnp.sum(dz[:, :-1] * x[:, k : k + 4]) for k in range(3)])
    bias = jnp.sum(dz)
    return {
        "kernel": fault(kernel, kernel_flipped=kernel[::-1], last_place_left_out=last),
        "bias": fault(bias, mean_over_places=bias / 5),
        "out": h.T @ d,
    }


CONVOLUTION = {
    "relu_left_out": Fault("bias kernel", RELU),
    "input_shifted": Fault("kernel", "shifted"),
    "kernel_flipped": Fault("kernel", "another order"),
    "last_place_left_out": Fault("kernel", "place"),
    "mean_over_places": Fault("bias", "5 times too small"),
}


def states(params: Params, x: Any) -> list[Any]:
    """Return the states before and after each step of a recurrent network."""
    found = [jnp.zeros((len(x), 3), x.dtype)]
    for step in range(x.shape[1]):
        sums = x[:, step] @ params["u"] + found[-1] @ params["w"] + params["b"][None, :]
        found.append(jnp.tanh(sums))
    return found


def recurrent(params: Params, batch: Any) -> Any:
    """Return the mean squared error of its last state."""
    return jnp.mean((states(params, batch[0])[-1] @ params["v"] - batch[1]) ** 2)


def recurrent_gradient(fault: Any, params: Params, batch: Any) -> Params:
    """Return its gradient, through time."""
    x, y = batch
    h = states(params, x)
    d = 2 * (h[-1] @ params["v"] - y) / len(y)
    back, last = d[:, None] * params["v"][None, :], x.shape[1] - 1
    u, w, b, b_last = (jnp.zeros_like(params[name]) for name in ("u", "w", "b", "b"))
    for step in range(last, -1, -1):
        at_output = 1 - jnp.tanh(h[step + 1]) ** 2
        dz = back * fault(1 - h[step + 1] ** 2, tanh_at_output=at_output)
        u += x[:, step].T @ dz
        w += fault(h[step], state_off_by_one=h[step + 1]).T @ dz
        b += jnp.sum(dz, axis=0)
        b_last = b if step == last else b_last
        back = dz @ fault(params["w"].T, not_transposed=params["w"], last_step_alone=0.0)
    return {"u": u, "w": w, "b": fault(b, bias_of_last_step=b_last), "v": h[-1].T @ d}


RECURRENT = {
    "tanh_at_output": Fault("b u w", TANH),
    "state_off_by_one": Fault("w", "layer before"),
    "not_transposed": Fault("b u w", NOT_TRANSPOSED),
    "last_step_alone": Fault("b u w", "way back"),
    "bias_of_last_step": Fault("b", "way back"),
}

LINE = {"w": (3,), "b": ()}
NETWORK = {"w0": (3, 4), "b0": (4,), "w1": (4, 4), "b1": (4,)}
PROBLEMS = {
    "linear": Problem(linear, linear_gradient, LINE, (X, NUMBERS), LINEAR),
    "logistic": Problem(logistic, logistic_gradient, LINE, (X, TWO_LABELS), LOGISTIC),
    "softmax": Problem(
        softmax, softmax_gradient, {"w": (3, CLASSES), "b": (CLASSES,)}, (X, ONE_HOT), SOFTMAX
    ),
    "huber": Problem(huber, huber_gradient, LINE, (X, NUMBERS), HUBER),
    "absolute": Problem(absolute, absolute_gradient, LINE, (X, NUMBERS), ABSOLUTE),
    "ridge": Problem(ridge, ridge_gradient, LINE, (X, NUMBERS), RIDGE),
    "tanh network": Problem(
        tanh_network, tanh_gradient, {**NETWORK, "w2": (4, 1), "b2": (1,)}, (X, NUMBERS),
        TANH_NETWORK,
    ),
    "relu network": Problem(
        relu_network, relu_gradient, {**NETWORK, "w2": (4, 3), "b2": (3,)}, (X, ONE_HOT),
        RELU_NETWORK,
    ),
    "sigmoid network": Problem(
        sigmoid_network, sigmoid_gradient,
        {"w0": (3, 4), "b0": (4,), "w1": (4, 1), "b1": (1,)}, (X, TWO_LABELS), SIGMOID_NETWORK,
    ),
    "layer norm": Problem(
        layer_norm, layer_norm_gradient, {"w": (3, 4), "gain": (4,), "shift": (4,)},
        (X, _rounded(5, ROWS, 4)), LAYER_NORM,
    ),
    "convolution": Problem(
        convolution, convolution_gradient, {"kernel": (3,), "bias": (), "out": (5,)},
        (WIDE, NUMBERS), CONVOLUTION,
    ),
    "recurrent": Problem(
        recurrent, recurrent_gradient, {"u": (2, 3), "w": (3, 3), "b": (3,), "v": (3,)},
        (SERIES, NUMBERS), RECURRENT,
    ),
}  # fmt: skip
FAULTS = [(name, fault) for name, problem in PROBLEMS.items() for fault in problem.faults]
