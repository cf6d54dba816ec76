"""Perturbation search over a small network's weights: the chapter's chain and its family.

python scripts/perturbation_search.py --steps 100000 --plot
python scripts/perturbation_search.py --data spiral --hidden 64 --adapt-scale --plot
python scripts/perturbation_search.py --data spiral --temperature 0.01 --animate climb.gif
python scripts/perturbation_search.py --chains 1024 --steps 1e6 --checkpoint chains.npz
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import (
    add_limits,
    add_output,
    add_problem,
    command,
    count,
    film_file,
    parser_for,
    write_json,
)
from films import film_regions
from problems import DATA
from resuming import finished

import jaxnn
from jaxnn.run import checkpoint as checkpoints

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--steps", type=count, default=10_000, help="proposals of each chain, as 1e5")
    add("--scale", type=float, default=0.05, help="of the noise on every weight")
    add("--final-scale", type=float, help="lower the scale to this, by the same factor a step")
    add("--adapt-scale", action="store_true", help="the one-fifth rule")
    add("--temperature", type=float, help="accept worse proposals; cools to a thousandth")
    add("--accept-ties", action="store_true")
    add("--proposals", type=int, default=1, help="of each step, of which the best is judged")
    add(
        "--patience",
        type=count,
        help="start a chain anew after this many steps without a lower loss",
    )
    add("--one-coordinate", action="store_true", help="move one weight a step, as mlrose does")
    add("--chains", type=int, default=1, help="chains side by side")
    add("--record-every", type=count, default=1, help="which steps to keep in the history")
    add_limits(parser, "step")
    add("--verbose", action="store_true", help="print every improvement")
    add("--plot", action="store_true", help="draw loss, accuracy and acceptance rate")
    add("--animate", type=film_file, metavar="FILE.gif", help="draw the regions while it climbs")
    add_output(parser)
    return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace, model: jaxnn.Model) -> dict[str, Any]:
    """The options that make a member of the family."""
    steps = max(arguments.steps, 1)
    options: dict[str, Any] = {
        "scale": arguments.scale,
        "adapt_scale": arguments.adapt_scale,
        "accept_ties": arguments.accept_ties,
        "num_proposals": arguments.proposals,
    }
    if arguments.final_scale is not None:
        scales = arguments.scale, arguments.final_scale
        options["scale"] = jaxnn.schedules.exponential_decay(*scales, steps)
    if arguments.temperature is not None:
        heat = arguments.temperature
        options["temperature"] = jaxnn.schedules.exponential_decay(heat, heat / 1_000, steps)
    if arguments.patience is not None:
        options |= {"patience": arguments.patience, "restart_fn": model.sampler(distribution="he")}
    if arguments.one_coordinate:
        options["propose_fn"] = jaxnn.moves.one_coordinate
    return options


def draw(history: Any, title: str, path: Path) -> None:
    """Loss, smoothed accuracy and acceptance rate of the first chain over its steps."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(19, 4.6), layout="constrained")
    evaluations, proposed = history.evaluations, history.proposed_loss[0]
    left.plot(evaluations, proposed, ".", color="0.75", markersize=2, rasterized=True)
    losses = {"current": history.current_loss[0], "best": history.best_loss[0]}
    curves = {name: (evaluations, loss) for name, loss in losses.items()}
    jaxnn.plotting.loss_curves(curves, left, log_x=True, log_y=True, steps=True).set_title(
        f"{title}: proposals grey"
    )
    window = max(len(evaluations) // 50, 1) | 1
    accuracy = history.proposed_metric[0]
    jaxnn.plotting.smoothed(accuracy, middle, window=window, ylabel="accuracy of proposals")
    accepted = np.diff(history.num_accepted[0][::window])
    proposals = np.diff(evaluations[::window])
    right.step(evaluations[::window][1:], 100 * accepted / proposals, color="#0072B2")
    right.set(xlabel="loss evaluations", ylabel="accepted, % of evaluations", ylim=(0, None))
    right.set_title(f"Acceptance rate, {window * (evaluations[0] - 1)} evaluations at a time")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def timed(
    climb: Callable[..., Any], arguments: argparse.Namespace
) -> tuple[Any, dict[str, float | int]]:
    """Runs the search; returns its result, its steps and its pace."""
    saved: Path | None = arguments.checkpoint
    before = checkpoints.load(saved)[1].get("next", 0) if saved and saved.exists() else 0
    finished(
        climb(num_steps=1)
    )  # compiles most of it, so that the seconds below are the search's own
    started = time.perf_counter()
    result = climb(
        num_steps=arguments.steps,
        target_loss=arguments.target_loss,
        max_seconds=arguments.max_seconds,
        checkpoint=arguments.checkpoint,
        progress=True,
    )
    seconds = time.perf_counter() - started
    steps = (result.num_evaluations // arguments.chains - 1) // arguments.proposals
    rate = (steps - before) * arguments.chains / seconds
    return result, {"num_steps": steps, "seconds": seconds, "steps_per_second": rate}


def show_improvements(result: Any, is_whole: bool) -> None:
    """The chapter's line for every improvement of the first chain; the accuracy if all are kept."""
    chain, steps, losses = result.accepted_steps
    metrics, lowest = result.history.proposed_metric[0], np.inf
    for step, loss in zip(steps[chain == 0], losses[chain == 0], strict=True):
        if loss < lowest:
            lowest = loss
            accuracy = f"  accuracy {metrics[step]:.3f}" if is_whole else ""
            print(f"iteration {step:>9,}  loss {loss:.6f}{accuracy}")


def facts(result: Any, accuracy: float) -> dict[str, Any]:
    """What the JSON file says of the result."""
    return {
        "best_loss": result.loss if np.isfinite(result.loss) else None,
        "accuracy": accuracy,
        "num_evaluations": result.num_evaluations,
        "num_accepted": result.num_accepted,
        "status": result.status,
        "chain_loss": [loss if np.isfinite(loss) else None for loss in result.chain_loss.tolist()],
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one search and reports; returns the exit status."""
    arguments = parse(argv)
    data_key, init_key, key = jax.random.split(jax.random.key(arguments.seed), 3)
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    climb = partial(
        jaxnn.perturbation_search,
        key,
        model.loss,
        model.init(init_key),
        batch,
        num_chains=arguments.chains,
        record_every=arguments.record_every,
        metric_fn=model.accuracy if arguments.plot or arguments.verbose else None,
        **options_of(arguments, model),
    )
    result, pace = timed(climb, arguments)
    accuracy = float(model.accuracy(result.params, batch))
    if arguments.verbose:
        show_improvements(result, arguments.record_every == 1)
    print(
        f"{result.status}: loss {result.loss:.4f}, accuracy {accuracy:.3f}; "
        f"{pace['num_steps']:,} steps of {arguments.chains:,} chains, "
        f"{result.num_accepted:,} accepted, {pace['steps_per_second']:,.0f} steps a second"
    )
    sizes = "-".join(map(str, model.settings.sizes))
    if arguments.plot and len(result.history.evaluations) > 1:
        path = arguments.output / f"perturbation-search-{arguments.data}-{sizes}.png"
        draw(result.history, f"{arguments.data}, {sizes}", path)
        print(path)
    write_json(arguments.json, facts(result, accuracy) | {"num_chains": arguments.chains} | pace)
    finished(result)
    if arguments.animate:
        done = int(pace["num_steps"])
        film_regions(lambda steps: climb(num_steps=steps), model, batch, done, arguments.animate)
        print(arguments.animate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
