"""Measure what gradient checkers find: 60 planted faults in 12 gradients, and 500 right gradients.

Every checker gets the same functions and the same points, in float64, with its own defaults: jaxnn,
`jax.test_util.check_grads` (the gradient by hand is that of a `jax.custom_vjp`), `gradcheck` of
torch (of a `torch.autograd.Function`), full and fast, and `check_grad` of SciPy, which returns a
distance and has no threshold: here 1e-5. They check one point a call; a fault is caught if any of
the points is refused. Some of the 500 points are at kinks: zeros and small whole numbers.

    python scripts/benchmarks/gradient_checkers.py
    python scripts/benchmarks/gradient_checkers.py --points 20 --right 60 --json checkers.json
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads
from scipy.optimize import check_grad

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted_faults import FAULTS, PROBLEMS, Params, Problem
from shared import cli
from shared.timing import MISSING, machine

import jaxnn

KEY = jax.random.key(18)
SCIPY_THRESHOLD = 1e-5


class Refusal(NamedTuple):
    """Why a gradient was refused: the leaves that are named, and what may be wrong."""

    leaves: list[str]
    said: str = ""


Checker = Callable[[Problem, str | None, int | Params], Refusal | None]
"""Takes a problem, the name of a fault, and how many points to draw, or one point."""


def points_of(problem: Problem, where: int | Params) -> Iterator[Params]:
    """Return points in float64, drawn or given."""
    keys = jax.random.split(KEY, where) if isinstance(where, int) else []
    drawn = map(problem.sample, keys) if isinstance(where, int) else [where]
    return (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params) for params in drawn)


@cache
def compiled(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the loss and the gradient, compiled once for all faults."""
    batch = tuple(np.asarray(part, np.float64) for part in problem.batch)
    loss = jax.jit(problem.loss)
    gradient = jax.jit(lambda function, params, batch: function(params, batch)[1])
    return partial(loss, batch=batch), partial(gradient, batch=batch)


def of(problem: Problem, name: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the loss and the gradient with a fault, of params alone."""
    loss, gradient = compiled(problem)
    return loss, partial(gradient, problem.value_and_grad(name))


def by_jaxnn(problem: Problem, name: str | None, where: int | Params) -> Refusal | None:
    """Check by `jaxnn.check_gradients`."""
    functions = problem.loss, problem.value_and_grad(name)
    start, count = (problem.sample, where) if isinstance(where, int) else (where, 1)
    report = jaxnn.check_gradients(KEY, *functions, start, problem.batch, num_samples=count)
    wrong = [leaf.name for leaf in report.leaves if not leaf.passed]
    return None if report.passed else Refusal(wrong, " ".join(report.suggestions))


def by_jax(problem: Problem, name: str | None, where: int | Params) -> Refusal | None:
    """Check by `jax.test_util.check_grads`, which says how far off it is and not where."""
    loss, gradient = of(problem, name)
    by_hand = jax.custom_vjp(loss)
    by_hand.defvjp(
        lambda params: (loss(params), gradient(params)),
        lambda slopes, d: (jax.tree.map(lambda slope: d * slope, slopes),),
    )
    for params in points_of(problem, where):
        try:
            check_grads(by_hand, (params,), order=1, modes=["rev"])
        except AssertionError:
            return Refusal([])
    return None


def by_torch(
    problem: Problem, name: str | None, where: int | Params, *, fast: bool
) -> Refusal | None:
    """Check by `torch.autograd.gradcheck`, which names the first input that is off."""
    torch: Any = import_module("torch")
    torch_check: Any = import_module("torch.autograd.gradcheck")
    loss, gradient = of(problem, name)
    leaves = sorted(problem.shapes)

    def params_of(tensors: Sequence[Any]) -> Params:
        arrays = (tensor.detach().numpy() for tensor in tensors)
        return dict(zip(leaves, arrays, strict=True))

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            ctx.save_for_backward(*tensors)
            return torch.tensor(float(loss(params_of(tensors))), dtype=torch.float64)

        @staticmethod
        def backward(ctx: Any, d: Any) -> Any:
            slopes = gradient(params_of(ctx.saved_tensors))
            return tuple(d * torch.from_numpy(np.array(slopes[leaf])) for leaf in leaves)

    for params in points_of(problem, where):
        inputs = [torch.from_numpy(params[leaf].copy()).requires_grad_() for leaf in leaves]
        try:
            torch_check.gradcheck(ByHand.apply, inputs, fast_mode=fast)
        except torch_check.GradcheckError as error:
            named = re.findall(r"respect to input (\d+)", str(error))
            return Refusal([f"params['{leaves[int(number)]}']" for number in named])
    return None


def by_scipy(problem: Problem, name: str | None, where: int | Params) -> Refusal | None:
    """Check by `scipy.optimize.check_grad`, which returns the distance of the whole gradient."""
    loss, gradient = of(problem, name)
    for params in points_of(problem, where):
        flat, unravel = ravel_pytree(params)
        distance = check_grad(
            lambda x, unravel=unravel: float(loss(unravel(jnp.asarray(x)))),
            lambda x, unravel=unravel: np.asarray(
                ravel_pytree(gradient(unravel(jnp.asarray(x))))[0]
            ),
            np.asarray(flat),
        )
        if not distance <= SCIPY_THRESHOLD:
            return Refusal([])
    return None


CHECKERS: dict[str, Checker] = {
    "jaxnn check_gradients": by_jaxnn,
    "jax check_grads": by_jax,
    "torch gradcheck": partial(by_torch, fast=False),
    "torch gradcheck, fast mode": partial(by_torch, fast=True),
    "SciPy check_grad": by_scipy,
}


def right_cases(count: int) -> Iterator[tuple[Problem, Params]]:
    """Return points for right gradients, of each problem in turn.

    First zeros; then, two times of three, whole numbers in the leaves that lead to the first kinks.
    Where kinks of several layers meet, 0 for relu's slope at 0 may be no slope of the loss.
    """
    problems = list(PROBLEMS.values())
    for number in range(count):
        turn, place = divmod(number, len(problems))
        params = problems[place].sample(jax.random.fold_in(KEY, number))
        if turn == 0:
            params = jax.tree.map(jnp.zeros_like, params)
        elif turn % 3:
            first = params.keys() & {"w", "b", "w0", "b0", "kernel", "bias"}
            params |= {name: jnp.round(params[name]) for name in first}
        yield problems[place], params


def measured(checker: Checker, points: int, right: int) -> dict[str, Any]:
    """Return a row of the table."""
    row, started = {}, time.process_time()
    cases = [(PROBLEMS[problem], name) for problem, name in FAULTS]
    at_one = [checker(problem, name, 1) for problem, name in cases]
    found = [checker(problem, name, points) for problem, name in cases]
    row["caught at 1 point"] = sum(refusal is not None for refusal in at_one)
    row[f"at {points}"] = sum(refusal is not None for refusal in found)
    leaves = kinds = 0
    for (problem, name), refusal in zip(cases, found, strict=True):
        fault = problem.faults[name]
        wrong = {f"params['{leaf}']" for leaf in fault.leaves.split()}
        if refusal is not None:
            leaves += bool(refusal.leaves) and set(refusal.leaves) <= wrong
            kinds += re.search(fault.said, refusal.said) is not None
    row |= {"leaf named": leaves, "kind named": kinds}
    alarms = [checker(problem, None, params) for problem, params in right_cases(right)]
    row[f"false alarms of {right}"] = sum(refusal is not None for refusal in alarms)
    return row | {"CPU seconds": time.process_time() - started}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1)
    add("--points", type=some, default=100, help="The points at which a fault may be caught.")
    add("--right", type=some, default=500, help="The right gradients.")
    add("--markdown", action="store_true", help="Print the table in Markdown.")
    add("--json", type=cli.new_file, metavar="FILE", help="Write the results to this file.")
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments, rows = parse(argv), []
    with jax.enable_x64(True):
        for name, checker in CHECKERS.items():
            is_missing = "torch" in name and find_spec("torch") is None
            found = {"caught at 1 point": MISSING} if is_missing else None
            found = found or measured(checker, arguments.points, arguments.right)
            rows.append({f"of {len(FAULTS)} faults": name, **found})
    cli.print_table(rows, arguments.markdown)
    cli.write_json(arguments.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
