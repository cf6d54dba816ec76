"""Check that JAX computes right numbers on this machine: losses, sums, loops and repeats.

NumPy and SciPy in float64 are the witness. It takes about a minute on two cores. The exit status is
0 if every check passes, 1 if one fails, and 2 if nothing could be checked.

    python scripts/check_machine.py
    python scripts/check_machine.py --json machine.json
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import special
from shared import cli
from shared.timing import machine
from tqdm.auto import tqdm

import jaxnn

KNOWN_FAULTS = {
    "0.10.2": "computes wrong numbers on CPUs: jax-ml/jax issue 39103",
    "0.11.1": "copies an array for each small write in a loop: jax-ml/jax issue 40101",
}
"""The versions of jax and jaxlib that `pyproject.toml` excludes, and why."""
LENGTHS = (2**14, 2**14 + 1, 2**15 + 1, 2**16 + 1)
"""XLA splits long loops between cores, and the remainder has been wrong before."""
NETWORKS: tuple[cli.Sizes, ...] = ((2, 3, 3), (2, 16, 16, 3), (2, 64, 64, 3))
FEW, MANY = 3, 16
"""Networks side by side; from 16 on, `model.loss` uses the layouts made for many."""
STEPS, FACTOR = 10_000, 4
"""The steps of the shorter loop, and how many times as many the longer one has."""

Tree = Any


class Check(NamedTuple):
    """One line of the table: what was measured, and the largest value that passes."""

    name: str
    measured: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is at most the one allowed; NaN is not."""
        return self.measured <= self.allowed


def check_versions(versions: Sequence[str]) -> Check:
    """Look the versions of jax and jaxlib up among those with known faults."""
    faults = [f"{v} {KNOWN_FAULTS[v]}" for v in dict.fromkeys(versions) if v in KNOWN_FAULTS]
    return Check("known faults of this version", len(faults), 0, "; ".join(faults))


def check_network(kind: str, sizes: cli.Sizes, networks: int, lengths: Sequence[int]) -> Check:
    """Compare the loss, or loss and gradient, of one network or of several at once."""
    hidden, _ = WITNESSES[kind]
    model = jaxnn.mlp(sizes, hidden=hidden)
    function = model.loss if kind == "loss" else model.value_and_grad
    params = [draw_params(sizes, seed) for seed in range(networks)]
    join = stack if networks > 1 else lambda trees: trees[0]
    if networks > 1:
        function = jax.jit(jax.vmap(function, in_axes=(0, None)))
    errors = {}
    for rows in lengths:
        expected = join([expected_of(kind, sizes, seed, rows) for seed in range(networks)])
        got = function(join(params), draw_batch(rows, sizes, hidden))
        errors[rows] = relative_error(got, expected)
    return worst(f"{kind}, {cli.join_sizes(sizes)}, {networks} at once", errors, "rows")


def check_lanes(sizes: cli.Sizes, lengths: Sequence[int]) -> Check:
    """Compare the losses of very many networks on a few rows."""
    losses_of = jax.jit(jax.vmap(jaxnn.mlp(sizes).loss, in_axes=(0, None)))
    batch, errors = draw_batch(20, sizes), {}
    for networks in lengths:
        params = draw_params(sizes, 0, networks)
        errors[networks] = relative_error(losses_of(params, batch), loss_of(params, batch))
    return worst(f"loss, {cli.join_sizes(sizes)}, very many at once", errors, "networks")


def sums_by_row(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Return a sum of squares for each row, in the form that jax 0.10.2 computes wrongly."""
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x)


def sums_at_once(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Return the same sums from one product of matrices."""
    return jnp.sum((x @ matrix.T) ** 2, axis=1)


def mean_of_sums(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Return their mean, a loss as users write it."""
    return jnp.mean(sums_by_row(matrix, x))


SUMS: dict[str, Callable[..., Any]] = {
    "by row": sums_by_row,
    "at once": sums_at_once,
    "mean": mean_of_sums,
    "mean and gradient": jax.value_and_grad(mean_of_sums),
}


def check_sums(name: str, dtype: str, lengths: Sequence[int]) -> Check:
    """Compare sums of squares, or their mean, as a loss of a user's own has them."""
    function, errors = jax.jit(SUMS[name]), {}
    for rows in lengths:
        generator = np.random.default_rng(rows)
        matrix, x = (generator.normal(size=(n, 3)).astype(dtype) for n in (3, rows))
        products = x.astype(float) @ matrix.astype(float).T
        sums = np.sum(products**2, axis=1)
        mean, gradient = np.mean(sums), 2 * products.T @ x.astype(float) / rows
        expected = {"mean": mean, "mean and gradient": (mean, gradient)}.get(name, sums)
        with jax.enable_x64(dtype == "float64"):
            errors[rows] = relative_error(function(matrix, x), expected)
    return worst(f"sums of squares, {name}, {dtype}", errors, "rows", dtype)


def check_scan(steps: int) -> Check:
    """Compare the time of a `lax.scan` with small stacked outputs at two lengths."""

    def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        carry = 0.999 * carry + 0.1
        return carry, carry

    def run(length: int) -> Any:
        scan = jax.jit(lambda start: jax.lax.scan(step, start, None, length=length))
        return lambda: scan(jnp.float32(1))

    short, long = seconds_of(run(steps)), seconds_of(run(FACTOR * steps))
    note = f"{1e3 * short:.2f} ms for {steps:,} steps"
    return Check(f"time of a scan of {FACTOR} times the steps", long / short, 2 * FACTOR, note)


def seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """Return the shortest time of some calls; the first one compiles and does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def check_repeats(sizes: cli.Sizes, repeats: int) -> Check:
    """Count the calls of loss and gradient whose bits differ from those of the first call."""
    model = jaxnn.mlp(sizes)
    arguments = jax.device_put((draw_params(sizes, 0), draw_batch(300, sizes)))

    def bits() -> list[bytes]:
        leaves = jax.tree.leaves((model.loss(*arguments), model.value_and_grad(*arguments)))
        return [np.asarray(leaf).tobytes() for leaf in leaves]

    first = bits()
    differing = sum(bits() != first for _ in range(repeats))
    return Check(f"calls that differ, {cli.join_sizes(sizes)}", differing, 0, f"of {repeats:,}")


@cache
def draw_batch(rows: int, sizes: cli.Sizes, hidden: str = "relu") -> jaxnn.Batch:
    """Return rows of two features and a class, the last 16 of them with losses far above the mean.

    They are the ones where the logits of the first network differ most, made 32 times as long, and
    of the least likely class. A mean over 65,537 rows that misses one of them is wrong by more than
    rounding.
    """
    generator = np.random.default_rng(rows)
    x = generator.normal(size=(rows, 2)).astype(np.float32)
    y = generator.integers(0, 3, rows, np.int32)
    params = draw_params(sizes, 0)
    x = x[np.argsort(np.ptp(layer_values(params, x, hidden)[-1], axis=1))]
    x[-16:] *= 32
    y[-16:] = np.argmin(layer_values(params, x[-16:], hidden)[-1], axis=1)
    return jaxnn.Batch(x, y)


def draw_params(sizes: cli.Sizes, seed: int, *networks: int) -> Tree:
    """Return the params of a network, or of several along a first axis, as NumPy arrays."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> np.ndarray:
        values = generator.normal(size=(*networks, *leaf.shape)) * np.sqrt(2 / leaf.shape[0])
        return values.astype(np.float32)

    return jax.tree.map(draw, jaxnn.mlp(sizes).init(jax.random.key(0)))


def loss_of(params: Tree, batch: jaxnn.Batch, hidden: str = "relu") -> np.ndarray:
    """Return the mean cross-entropy in float64, of a network or of several along a first axis."""
    logs = special.log_softmax(layer_values(params, batch.x, hidden)[-1], axis=-1)
    return -np.mean(logs[..., np.arange(len(batch.y)), batch.y], axis=-1)


def loss_and_gradient_of(params: Tree, batch: jaxnn.Batch) -> tuple[np.ndarray, Tree]:
    """Return the loss of one tanh network in float64, and its gradient by the chain rule."""
    *inputs, logits = layer_values(params, batch.x, "tanh")
    slopes = special.softmax(logits, axis=1)
    slopes[np.arange(len(batch.y)), batch.y] -= 1
    slopes /= len(batch.y)
    gradient = []
    for values, (weights, _) in zip(inputs[::-1], params[::-1], strict=True):
        gradient.append((values.T @ slopes, np.sum(slopes, axis=0)))
        slopes = (slopes @ weights.astype(float).T) * (1 - values**2)
    return loss_of(params, batch, "tanh"), gradient[::-1]


WITNESSES: dict[str, tuple[str, Callable[..., Any]]] = {
    "loss": ("relu", loss_of),
    "loss and gradient": ("tanh", loss_and_gradient_of),
}
"""Hidden activation and witness; not relu for gradients, which has two right ones at its kink."""


@cache
def expected_of(kind: str, sizes: cli.Sizes, seed: int, rows: int) -> Tree:
    """Return what the witness says of a network and a batch that are drawn here."""
    hidden, witness = WITNESSES[kind]
    return witness(draw_params(sizes, seed), draw_batch(rows, sizes, hidden))


def layer_values(params: Tree, x: ArrayLike, hidden: str) -> list[np.ndarray]:
    """Return the inputs of every layer and the logits, in float64."""
    values = [np.asarray(x, float)]
    for layer, (weights, biases) in enumerate(params, start=1):
        z = values[-1] @ weights.astype(float) + biases.astype(float)[..., None, :]
        is_last = layer == len(params)
        values.append(z if is_last else np.tanh(z) if hidden == "tanh" else np.maximum(z, 0))
    return values


def stack(trees: Sequence[Tree]) -> Tree:
    """Return one tree whose leaves have a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def relative_error(got: Tree, expected: Tree) -> float:
    """Return the largest difference of any leaf, relative to its largest entry or to 1e-6."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    errors = [np.max(np.abs(np.asarray(a) - b)) / max(np.max(np.abs(b)), 1e-6) for a, b in pairs]
    return float(np.max(errors))


def worst(name: str, errors: dict[int, float], unit: str, dtype: str = "float32") -> Check:
    """Return the check of the largest error; NaN counts as the largest of all."""
    length = max(errors, key=lambda n: (np.isnan(errors[n]), errors[n]))
    # Unless told otherwise, a GPU multiplies float32 matrices in TF32, whose numbers have 10 bits.
    allowed = {"float32": 3e-5 if jax.default_backend() == "cpu" else 5e-3, "float64": 1e-11}
    return Check(name, errors[length], allowed[dtype], f"at {length:,} {unit}")


def plan(lengths: Sequence[int], repeats: int) -> list[partial[Check]]:
    """Return every check, ready to be called."""
    ways = [("loss", 1), ("loss", FEW), ("loss", MANY)]
    ways += [("loss and gradient", 1), ("loss and gradient", FEW)]
    dtypes = ("float32", "float64")
    return [
        partial(check_versions, (version("jax"), version("jaxlib"))),
        *(partial(check_network, way[0], s, way[1], lengths) for s in NETWORKS for way in ways),
        *(partial(check_lanes, sizes, lengths) for sizes in NETWORKS[:2]),
        *(partial(check_sums, name, dtype, lengths) for dtype in dtypes for name in SUMS),
        partial(check_scan, STEPS),
        *(partial(check_repeats, sizes, repeats) for sizes in NETWORKS[::2]),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1)
    add("--lengths", type=some, nargs="+", default=LENGTHS,
        help="Check these numbers of rows, and of networks.")  # fmt: skip
    add("--repeats", type=some, default=10_000, help="Compare the bits of this many calls.")
    add("--json", type=cli.new_file, metavar="FILE", help="Write the results to this file.")
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    arguments = parse(argv)
    began = time.perf_counter()
    checks = [run() for run in tqdm(plan(arguments.lengths, arguments.repeats), unit=" checks")]
    seconds = time.perf_counter() - began
    here = machine()
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    cli.print_table([
        {
            "check": check.name,
            "measured": f"{check.measured:.2g}",
            "allowed": f"{check.allowed:.2g}",
            "": "ok" if check.passed else "WRONG",
            "note": check.note,
        }
        for check in checks
    ])  # fmt: skip
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed, {seconds:.0f} seconds")
    results = [check._asdict() | {"passed": check.passed} for check in checks]
    outcome = {"machine": here, "passed": not failed, "seconds": seconds, "checks": results}
    cli.write_json(arguments.json, outcome)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
