"""Work through the course on optimization, exercise by exercise.

The exercises are those of the chapter that introduces optimization in "Neural Networks from
Scratch in Python" (Kinsley and Kukieła, 2020), and of the usual first lessons on gradient descent.
Each takes a few lines, and prints what it finds beside the figure that is known.

As a script it writes its pictures to the folder `output`. `course.ipynb` holds the same cells as a
notebook, with what they print and draw.

    python scripts/examples/course.py
"""

import sys

if "--help" in sys.argv:
    sys.exit(print(__doc__))

# %% [markdown]
# # The course, exercise by exercise
#
# A neural network is a function with many numbers in it. Training looks for numbers that make its
# answers good. This course tries three ways: draw them at random, change them at random, and follow
# the slope of the loss downhill.
#
# Every exercise prints what it finds beside the figure that is known. Two helpers come first: one
# prints the two figures, the other shows a picture.

# %%
import base64
import builtins
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter

import jaxnn

plt.rcParams |= {"figure.constrained_layout.use": True, "legend.frameon": False, "font.size": 11}


def compare(what, found, known, digits=6):
    """Print a figure beside the one that is known."""
    rounded = (np.round(np.asarray(found, float), digits) + 0.0).tolist()
    print(f"{what:<26} {rounded!s:<32} known: {known}")


def show(figure, name, film=None):
    """Write a picture, or a film of it, to the folder output; show it if this is a notebook."""
    kind = "gif" if film else "png"
    path = Path("output", f"{name}.{kind}")
    path.parent.mkdir(exist_ok=True)
    film.save(path, PillowWriter(fps=3), dpi=80) if film else figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)
    if show_here := getattr(builtins, "display", None):
        show_here({f"image/{kind}": base64.b64encode(path.read_bytes()).decode()}, raw=True)


# %% [markdown]
# ## 1. A forward pass
#
# A **layer** multiplies its inputs by **weights** and adds **biases**. Here two rows of two inputs
# go through a layer with one output: 2 x 1 - 1 x 2 + 1 = 1, and 2 x 3 - 1 x (-1) + 1 = 8.

# %%
x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
layer = jaxnn.Dense(weights=jnp.array([[2.0], [-1.0]]), biases=jnp.array([1.0]))
z = jaxnn.forward((layer,), x)
compare("one layer", z, "1 and 8")

# %% [markdown]
# An **activation** bends the output of a layer. Without one, many layers could do no more than a
# single one. **relu** cuts off what is negative, **sigmoid** squeezes a number between 0 and 1,
# **tanh** between -1 and 1.
#
# **softmax** turns a row into shares that sum to 1. A row of a single number gets all of it: 1.

# %%
relu, sigmoid, tanh, softmax = (
    getattr(jaxnn.activations, name)(z) for name in ("relu", "sigmoid", "tanh", "softmax")
)
compare("relu", relu, "1 and 8")
compare("sigmoid", sigmoid, "0.731059 and 0.999665")
compare("tanh", tanh, "0.761594 and 1.000000")
compare("softmax", softmax, "1 and 1")

# %% [markdown]
# Two layers make a network: the outputs of the **hidden** layer are the inputs of the next. This
# one answers "yes" or "no", and softmax says how sure it is.

# %%
hidden = jaxnn.Dense(jnp.array([[0.3, 0.6], [0.8, 0.4], [0.1, 0.5]]), jnp.array([1.0, 1.0]))
output = jaxnn.Dense(jnp.array([[0.1, 0.5], [0.7, 0.2]]), jnp.array([1.0, 1.0]))
answer_row = jnp.array([[0.29, 0.11, 0.80]])
hidden_values = jaxnn.activations.sigmoid(jaxnn.forward((hidden,), answer_row))
answer = jaxnn.forward((hidden, output), answer_row, hidden="sigmoid", output="softmax")
compare("hidden layer", hidden_values, "0.778164 and 0.834519")
compare("output", answer, "0.526474 and 0.473526")
print(
    f"{('yes', 'no')[int(answer.argmax())]}, {100 * float(answer.max()):.2f} % sure; known: 52.65 %"
)

# %% [markdown]
# Weights often come in a **dictionary**, a list for each node. The weights of a node are a column
# of its layer. This network has no biases and no activations. The **error** is the prediction
# minus the target, which is 3 here.


# %%
def predict(weights, inputs=(0.0, 3.0)):
    """Return what a network of two hidden nodes and an output node predicts."""
    nodes = jnp.array([weights["node_0"], weights["node_1"]]).T
    layers = jaxnn.Dense(nodes, None), jaxnn.Dense(jnp.array(weights["output"])[:, None], None)
    return float(jaxnn.forward(layers, jnp.array([inputs]), hidden="identity")[0, 0])


first = predict({"node_0": [2.0, 1.0], "node_1": [1.0, 2.0], "output": [1.0, 1.0]})
second = predict({"node_0": [2.0, 1.0], "node_1": [1.0, 1.0], "output": [0.5, 0.5]})
compare("prediction, error", [first, first - 3], "9 and 6")
compare("with better weights", [second, second - 3], "3 and 0")

# %% [markdown]
# ## 2. How wrong is a network?
#
# A **loss** is one number that says how wrong the answers are. For numbers it is the **mean
# squared error**: errors of 6 and 0 give (36 + 0) / 2 = 18.
#
# For classes it is the **cross-entropy**: minus the logarithm of the share that the network gave
# to the right class, averaged over the rows. Shares are kept between 1e-7 and 1 - 1e-7, because a
# share of 0 would cost infinitely much.

# %%
squared_error = jaxnn.losses.mean_squared_error(
    jnp.array([[9.0], [3.0]]), jnp.array([[3.0], [3.0]])
)
labels = jnp.array([0, 1, 2])
uniform = jnp.full((3, 3), 1 / 3)
crossentropy = jaxnn.losses.categorical_crossentropy(uniform, labels)
one_hot = jaxnn.losses.categorical_crossentropy(uniform, jnp.eye(3))
worst = jaxnn.losses.categorical_crossentropy(jnp.array([[0.0, 1.0]]), jnp.array([0]))
compare("mean squared error", squared_error, 18)
compare("knowing nothing", crossentropy, "ln 3 = 1.098612")
compare("the same, one-hot labels", one_hot, "ln 3 = 1.098612")
compare("surely wrong", worst, "-ln 1e-7 = 16.118096", digits=4)

# %% [markdown]
# **Accuracy** is the share of rows whose largest output is at the right class. It moves in jumps,
# so training looks at the loss.

# %%
guessing = jaxnn.metrics.accuracy(uniform, labels)
compare("accuracy of guessing", guessing, "1/3 = 0.333333")

# %% [markdown]
# ## 3. Random search
#
# The data are points of three classes. On **vertical** data the classes lie side by side; on the
# **spiral** they wind around each other. These are the points that the package `nnfs` draws.

# %%
vertical, spiral = jaxnn.datasets.nnfs_vertical(), jaxnn.datasets.nnfs_spiral()
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
for ax, batch, name in zip(axes, (vertical, spiral), ("Vertical", "Spiral"), strict=True):
    jaxnn.plotting.data(batch, ax)
    ax.set_title(f"{name} data: {ax.get_title()}")
jaxnn.plotting.shared_legend(figure)
show(figure, "course-data")

# %% [markdown]
# The network has 2 inputs, 3 hidden nodes and 3 outputs, one a class. **Random search** draws all
# weights and biases anew, 10,000 times, and keeps the best. Each draw is a **candidate**. The
# course draws normal numbers times 0.05.
#
# The `sampler` draws one candidate, and the `key` says which numbers are drawn: the same key gives
# the same candidates again. A line stands for each candidate that is better than all before it: how
# many losses it took, the loss, and the accuracy, which is the `metric_fn`.

# %%
model = jaxnn.mlp((2, 3, 3), hidden="relu", output="softmax", loss="categorical_crossentropy")
key = jax.random.key(1)
sample_fn = model.sampler(scale=0.05)
found = jaxnn.random_search(
    key, model.loss, sample_fn, vertical, num_candidates=10_000, metric_fn=model.accuracy
)
print(*found.improvements(), sep="\n")
compare("best loss", found.loss, "1.0945 to 1.0970", digits=4)

# %% [markdown]
# The loss falls, though not by much: guessing costs 1.0986. With weights that small all outputs are
# nearly the same, and more candidates do not help. Larger weights do: here the scale of 0.05
# becomes 1, 2, 4 and 8.

# %%
KNOWN = {1: "0.54 to 0.72", 2: "0.32 to 0.52", 4: "0.20 to 0.46", 8: "0.24 to 0.65"}
searches = {
    scale: jaxnn.random_search(
        key, model.loss, model.sampler(scale=scale), vertical, num_candidates=20_000
    )
    for scale in KNOWN
}
for scale, search in searches.items():
    compare(f"best loss, scale {scale}", search.loss, KNOWN[scale], digits=2)

# %% [markdown]
# The best loss so far goes down in steps, one at each improvement. Candidates with large weights
# begin worse than guessing, because they are sure of wrong answers. The best of them end well.

# %%
figure, ax = plt.subplots(figsize=(8.5, 4))
curves = {f"scale {scale}": search for scale, search in ({0.05: found} | searches).items()}
look = {"log_x": True, "steps": True, "reference": np.log(3), "reference_label": "guessing"}
jaxnn.plotting.loss_curves(curves, ax, xlabel="candidates", **look)
ax.set(title="Vertical data: random search", ylabel="best loss so far", ylim=(0, 3))
ax.legend()
show(figure, "course-random-search")

# %% [markdown]
# The plane takes the colour of the class that the network answers there. The best candidate of
# scale 0.05 misses a class. That of scale 4 has found the three stripes.


# %%
def show_regions(name, *panels):
    """Show what networks answer; a panel is a title, a network, its params and the rows."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10.5, 4.2))
    for ax, (title, network, params, batch) in zip(axes, panels, strict=True):
        jaxnn.plotting.decision_regions(partial(network.apply, params), batch, ax)
        ax.set_title(f"{title}: {100 * network.accuracy(params, batch):.0f} % of rows right")
    jaxnn.plotting.shared_legend(figure)
    show(figure, name)


small_scale = "Scale 0.05", model, found.params, vertical
large_scale = "Scale 4", model, searches[4].params, vertical
show_regions("course-random-regions", small_scale, large_scale)

# %% [markdown]
# On the spiral no scale works.

# %%
lost = [
    jaxnn.random_search(key, model.loss, model.sampler(scale=s), spiral, num_candidates=20_000).loss
    for s in (0.05, 1, 4)
]
compare("spiral, scale 0.05, 1, 4", lost, "all above 1.04", digits=2)

# %% [markdown]
# ## 4. Perturbation search
#
# Random search forgets. **Perturbation search** starts from one set of weights and changes all of
# them a little, by 0.05 times a normal number. If the loss is lower, the change stays. If not, it
# is undone.
#
# Each change that stays is an improvement and has its line. The first and the last ones are shown.

# %%
start = model.init(key)
climb = partial(
    jaxnn.perturbation_search, key, model.loss, start, scale=0.05, metric_fn=model.accuracy
)
climbed = climb(vertical, num_steps=10_000)
lines = climbed.improvements()
print(*lines[:6], f"... {len(lines) - 12} lines ...", *lines[-6:], sep="\n")
compare("loss", climbed.loss, "0.170 to 0.175", digits=2)
compare("accuracy", model.accuracy(climbed.params, vertical), "0.927 to 0.933", digits=2)

# %% [markdown]
# More is hardly possible, since the classes overlap. Even a classifier that knows how the points
# were drawn gets only 93.6 % of new points right.

# %%
compare("the best possible", jaxnn.datasets.vertical_bayes(3).accuracy, 0.9363, digits=4)

# %% [markdown]
# The course looks at every proposal of the first 1,000 steps, accepted or not; `history` remembers
# them. The accuracy jumps, so its **moving average** is drawn on top: the mean of the 51 steps
# around each step. Random candidates, which start anew each time, do not improve.

# %%
guesses = jaxnn.search.evaluate(key, model.loss, sample_fn, vertical, count=1_000)
guessed = jaxnn.search.evaluate(key, model.accuracy, sample_fn, vertical, count=1_000)
history = climbed.history
iterations = np.arange(1_000)
curves = {
    "random candidate": (iterations, guesses),
    "proposal": (iterations, history.proposed_loss[:1_000]),
    "best so far": (iterations, history.best_loss[:1_000]),
}
figure, (left, right) = plt.subplots(2, 1, figsize=(8.5, 6.5), sharex=True)
jaxnn.plotting.loss_curves(curves, left, xlabel="")
jaxnn.plotting.smoothed(guessed, right, window=51, label="random candidate", xlabel="iteration")
accuracies = np.asarray(history.proposed_metric)[:1_000]
jaxnn.plotting.smoothed(accuracies, right, window=51, label="proposal", xlabel="iteration")
left.set_title("Vertical data: loss")
right.set_title("Accuracy: moving average of 51, raw values pale")
jaxnn.plotting.shared_legend(figure)
show(figure, "course-proposals")

# %% [markdown]
# On the spiral the same search gets stuck.

# %%
stuck = climb(spiral, num_steps=10_000)
compare("loss on the spiral", stuck.loss, "1.02 to 1.08", digits=2)
compare("accuracy", model.accuracy(stuck.params, spiral), "0.35 to 0.46", digits=2)
on_vertical = "Vertical data", model, climbed.params, vertical
on_spiral = "Spiral", model, stuck.params, spiral
show_regions("course-perturbation-regions", on_vertical, on_spiral)

# %% [markdown]
# Is this a **local minimum**, a place with no lower loss nearby? No: the step size is what is
# stuck. Of 10,000 changes of scale 0.05 hardly any lowers the loss. Smaller changes often do,
# though by little: the best of them by less than 0.001.


# %%
def near(scale, key):
    """Return the weights where the search is stuck, with a change of this scale."""
    return jax.tree.map(jnp.add, stuck.params, model.sampler(scale=scale)(key))


SHARES = {0.05: "below 0.01", 0.01: "0.1 to 0.2", 0.005: "0.2 to 0.4", 0.001: "0.3 to 0.5"}
tries = {
    scale: jaxnn.search.evaluate(key, model.loss, partial(near, scale), spiral, count=10_000)
    for scale in SHARES
}
for scale, losses in tries.items():
    compare(f"scale {scale}: share lower", np.mean(losses < stuck.loss), SHARES[scale], digits=2)

# %% [markdown]
# ## 5. Slopes
#
# Instead of trying, one can calculate which way is down. The **slope** of the loss by a weight says
# how fast the loss rises with it. All slopes together are the **gradient**.
#
# One node without a bias predicts weight x input. With weight 2 and input 3 it predicts 6. For a
# target of 10 the error is -4. The slope is 2 x error x input = 2 x (-4) x 3 = -24. A `Batch` holds
# the inputs x and the targets y, an example a row.


# %%
def value_and_grad(params, batch):
    """Return the mean squared error of one node, and its slopes, by hand."""
    errors = batch.x @ params - batch.y
    return jnp.mean(errors**2), 2 * batch.x.T @ errors / len(errors)


one_weight, one_row = jnp.array([2.0]), jaxnn.Batch(jnp.array([[3.0]]), jnp.array([10.0]))
_, one_slope = value_and_grad(one_weight, one_row)
compare("slope of one weight", one_slope, -24)

# %% [markdown]
# A step against the slope lowers the loss. The **learning rate** says how far: 2 - 0.01 x (-24) =
# 2.24.

# %%
step = partial(
    jaxnn.gradient_descent, jax.random.key(0), value_and_grad, learning_rate=0.01, num_epochs=1
)
stepped = step(one_weight, one_row)
compare("weight after a step", stepped.params, 2.24)

# %% [markdown]
# With three inputs there are three slopes. The error of 7 falls to 5.04 in one step.

# %%
three_weights = jnp.array([0.0, 2.0, 1.0])
three_inputs = jaxnn.Batch(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([0.0]))
_, three_slopes = value_and_grad(three_weights, three_inputs)
error_before, error_after = (
    three_inputs.x @ weights
    for weights in (three_weights, step(three_weights, three_inputs).params)
)
compare("error before", error_before, 7)
compare("three slopes", three_slopes, "14, 28 and 42")
compare("error after", error_after, 5.04)

# %% [markdown]
# Is a gradient that was derived by hand right? `check_gradients` compares it with the one that JAX
# derives by itself, and with differences of the loss, at random weights.


# %%
def plain_loss(params, batch):
    """Return the mean squared error of one node."""
    return jnp.mean((batch.x @ params - batch.y) ** 2)


report = jaxnn.check_gradients(
    key, plain_loss, value_and_grad, lambda key: jax.random.normal(key, (3,)), three_inputs
)
print("the gradient by hand is", "right" if report.passed else "wrong")

# %% [markdown]
# **The chain rule** carries slopes backwards through a network. The slope of the loss by a weight
# is a product: the value that enters the weight, times the slope of what comes after it.
#
# Here one hidden node with relu leads to one output. The error is 3. The value that enters the
# output's weight is 1, so its slope is 2 x 3 x 1 = 6. With an input of 3 the value is 3, and the
# slope 18. The slope of the hidden weight goes through the output's weight and through relu as
# well, both of which multiply it by 1 here.

# %%
chain = jaxnn.mlp((1, 1, 1), output="identity", loss="mean_squared_error", hidden_biases=False)
ones = (
    jaxnn.Dense(jnp.array([[1.0]]), None),
    jaxnn.Dense(jnp.array([[1.0]]), jnp.array([0.0])),
)


def slopes(value, target):
    """Return the slopes of the loss by the hidden weight and by the output's weight."""
    _, gradient = chain.value_and_grad(ones, jaxnn.Batch([[value]], [[target]]))
    return [float(layer.weights[0, 0]) for layer in gradient]


through_1, through_3, through_negative = slopes(1.0, -2.0), slopes(3.0, 0.0), slopes(-1.0, -3.0)
compare("input 1: both slopes", through_1, "6 and 6")
compare("input 3: both slopes", through_3, "18 and 18")

# %% [markdown]
# relu's own slope is 1 for a positive input and 0 for a negative one. A negative input therefore
# stops the slope: the hidden weight gets 0 and does not learn from this row.

# %%
at = jnp.array([-1.0, 2.0])
relu_slopes = jaxnn.activations.relu_backward(jaxnn.activations.relu(at), jnp.ones(2))
compare("relu's slope at -1, 2", relu_slopes, "0 and 1")
compare("input -1: both slopes", through_negative, "0 and 0")

# %% [markdown]
# ## 6. Linear regression
#
# Twelve rows lie on the plane y = 1.5 x1 + 1.5 x2 + 0.1. A layer without an activation can find
# these numbers. First one step by hand, on three rows, from weights 1 and bias 0, with learning
# rate 0.1.

# %%
rows = jaxnn.datasets.linear_rows()
regression = jaxnn.mlp((2, 1), output="identity", loss="mean_squared_error")


def line_params(weight_1, weight_2, bias):
    """Return the params of a layer with two inputs and one output."""
    return (jaxnn.Dense(jnp.array([[weight_1], [weight_2]]), jnp.array([bias])),)


plain_start = line_params(1.0, 1.0, 0.0)
three_rows = jaxnn.Batch(rows.x[:3], rows.y[:3])
_, gradient = regression.value_and_grad(plain_start, three_rows)
by_hand = jax.tree.map(lambda value, slope: value - 0.1 * slope, plain_start, gradient)
compare("slopes of the weights", gradient[0].weights[:, 0], "-6 and -4.26667", digits=5)
compare("slope of the bias", gradient[0].biases, -3.2)
compare("weights after the step", by_hand[0].weights[:, 0], "1.6 and 1.42667", digits=5)
compare("bias after the step", by_hand[0].biases, 0.32)

# %% [markdown]
# `gradient_descent` does this again and again. A pass over all rows is an **epoch**. Here all
# twelve rows make one step, so 100 epochs are 100 steps.

# %%
descend = partial(
    jaxnn.gradient_descent, jax.random.key(0), regression.value_and_grad, tolerance=1e-8
)
whole = descend(plain_start, rows, learning_rate=0.1, num_epochs=100)
compare("weights", whole.params[0].weights[:, 0], "1.49967 and 1.49862", digits=5)
compare("bias", whole.params[0].biases, 0.10270, digits=5)

# %% [markdown]
# More often the rows are shuffled and cut into small **batches**, and each batch makes a step: here
# 3 rows. A descent **converges** when the loss no longer changes. With too large a learning rate
# each step overshoots, and the loss grows: the descent **diverges**. The params returned are then
# the last ones with a finite loss.
#
# The known figures say how far the weights end from 1.5 and the bias from 0.1, at most.

# %%
RUNS = {
    "rate 0.1": (plain_start, 0.1, "within 0.01 and 0.02"),
    "rate 0.3": (plain_start, 0.3, "diverged"),
    "good start, rate 0.05": (line_params(1.4, 1.6, 0.15), 0.05, "within 0.01 and 0.02"),
    "bad start, rate 0.05": (line_params(-10.0, -10.0, 5.0), 0.05, "within 0.015 and 0.03"),
}
batched = {"num_epochs": 1_000, "batch_size": 3, "tolerance_unit": "step"}
runs = {
    name: descend(begin, rows, learning_rate=rate, **batched)
    for name, (begin, rate, _) in RUNS.items()
}
for name, run in runs.items():
    weights, bias = run.params[0].weights[:, 0], float(run.params[0].biases[0])
    where = "" if run.status == "diverged" else f"{weights.round(2).tolist()} {bias:.2f}"
    print(f"{name:<22} {run.status:<10} {where:<18} known: {RUNS[name][2]}")

# %%
curves = {
    f"{name}: {run.status}": (np.arange(1, len(run.history.loss) + 1), run.history.loss)
    for name, run in runs.items()
}
figure, ax = plt.subplots(figsize=(8.5, 4))
jaxnn.plotting.loss_curves(curves, ax, xlabel="step", log_x=True, log_y=True)
ax.set(title="Linear regression: loss of each batch of 3 rows", ylim=(1e-12, 1e6))
ax.legend(loc="lower left")
show(figure, "course-regression")

# %% [markdown]
# What a learning rate does is best seen with one weight, as a film. The loss is a valley with its
# floor at 1.5. A rate of 0.2 walks down. At 0.9 each step crosses to the other side, and still
# comes down. At 1.05 it climbs out.

# %%
valley = jaxnn.Batch(jnp.array([[-1.0], [1.0]]), jnp.array([-1.5, 1.5]))
rates = np.array([0.2, 0.9, 1.05], np.float32)
roll = partial(
    jaxnn.gradient_descent, jax.random.key(0), value_and_grad, jnp.full((3, 1), -1.0), valley,
    learning_rate=rates, num_networks=3,
)  # fmt: skip
path = np.stack([roll(num_epochs=number).params[:, 0] for number in range(10)])
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
span = np.linspace(-6, 9, 100)
trails = []
for ax, rate in zip(axes, rates, strict=True):
    ax.plot(span, (span - 1.5) ** 2, color="0.6")
    trails += ax.plot([], [], "o-", color="#D55E00", markersize=5, linewidth=1)
    ax.set(title=f"learning rate {rate:g}", xlabel="weight", ylim=(-1, 40))
axes[0].set_ylabel("loss")


def frame(number):
    """Draw the steps up to one of them; the last frames stand still."""
    figure.suptitle(f"step {min(number, len(path) - 1)}")
    for trail, weights in zip(trails, path[: number + 1].T, strict=True):
        trail.set_data(weights, (weights - 1.5) ** 2)
    return trails


film = FuncAnimation(figure, frame, frames=len(path) + 4)
show(figure, "course-descent", film)

# %% [markdown]
# ## 7. Back to the spiral
#
# A gradient gives the direction in all weights at once, so a larger network can learn. With 64
# hidden nodes and 10,000 epochs plain gradient descent gets most rows right. **Adam**, which adapts
# the step of each weight, solves the spiral.

# %%
wide = jaxnn.mlp((2, 64, 3))
solve = partial(
    jaxnn.gradient_descent, key, wide.value_and_grad, wide.init(key), spiral, num_epochs=10_000
)
plain, adam = solve(learning_rate=1.0), solve(optimizer=jaxnn.optimizers.adam(0.05))
plain_accuracy, adam_accuracy = (wide.accuracy(run.params, spiral) for run in (plain, adam))
print("plain descent gets 56 to 85 % of rows right, as most runs do:", 0.56 < plain_accuracy < 0.85)
print("Adam gets more than 88 % right, as nine runs of ten do:", adam_accuracy > 0.88)

# %%
by_plain = "Plain descent", wide, plain.params, spiral
by_adam = "Adam", wide, adam.params, spiral
show_regions("course-spiral", by_plain, by_adam)
