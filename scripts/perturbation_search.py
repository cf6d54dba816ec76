"""Search by perturbations for the weights of a small network: one chain or many, of any kind.

Prints how it ended, the loss, the accuracy and how many steps were accepted.

    python scripts/perturbation_search.py --steps 100000 --plot
    python scripts/perturbation_search.py --data spiral --hidden 64 --one-fifth --plot
    python scripts/perturbation_search.py --data spiral --temperature 0.01 --animate climb.gif
    python scripts/perturbation_search.py --chains 1024 --steps 1e6 --checkpoint chains.npz
    python scripts/perturbation_search.py --data iris.csv --target species --standardise
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from shared import cli
from shared.figures import BLUE, Figure, dots, film_regions, panels, save, slide
from shared.problems import has_regions, problem_of, score_of
from shared.runs import done_before, finished, improvement_lines, timed

import jaxnn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    cli.add_problem(parser)
    add = parser.add_argument
    add("--steps", type=cli.at_least(0), default=10_000, help="The steps of each chain.")
    add("--scale", type=float, default=0.05, help="Move every weight by this times a normal.")
    add("--final-scale", type=float, help="Lower the scale to this, by one factor a step.")
    add("--one-fifth", action="store_true", help="Adapt the scale by the one-fifth rule.")
    add("--temperature", type=float, help="Accept worse proposals at this temperature, which "
        "cools to a thousandth; 0 accepts equal losses only.")  # fmt: skip
    add("--proposals", type=int, default=1, help="Judge the best of this many proposals a step.")
    add("--patience", type=cli.at_least(0), help="End after this many steps without a lower loss.")
    add("--restart", action="store_true", help="Start a chain anew after --patience instead.")
    add("--one-coordinate", action="store_true", help="Move one weight a step, as mlrose does.")
    add("--chains", type=int, default=1, help="Run this many chains side by side.")
    cli.add_limits(parser)
    cli.add_save(parser)
    cli.add_verbose(parser)
    add("--plot", action="store_true", help="Draw the loss, the accuracy and the acceptance rate.")
    add("--animate", type=cli.film_file, metavar="FILE.gif",
        help="Film the decision regions; FILE.mp4 needs ffmpeg.")  # fmt: skip
    cli.add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.restart and arguments.patience is None:
        parser.error("--restart needs --patience")
    if arguments.one_fifth and arguments.final_scale is not None:
        parser.error("--one-fifth and --final-scale exclude each other")
    return arguments


def options_of(arguments: argparse.Namespace, model: jaxnn.Model) -> dict[str, Any]:
    """Return the trainer's options that make this kind of chain."""
    moves, scale, heat = jaxnn.moves, arguments.scale, arguments.temperature
    decay = partial(jaxnn.schedules.exponential_decay, transition_steps=max(arguments.steps, 1))
    patience = arguments.patience
    if arguments.final_scale is not None:
        scale = decay(scale, arguments.final_scale)
    if arguments.one_fifth:
        scale = moves.one_fifth(scale)
    if arguments.restart:
        patience = moves.restart(model.sampler(distribution="he"), patience)
    return {
        "scale": scale,
        "temperature": decay(heat, heat / 1_000) if heat else heat,
        "num_proposals": arguments.proposals,
        "patience": patience,
        "propose_fn": moves.one_coordinate if arguments.one_coordinate else None,
        "num_chains": arguments.chains,
        "metric_fn": score_of(model)[1] if arguments.plot or arguments.verbose else None,
    }


@slide
def draw(history: Any, title: str, score: str) -> Figure:
    """Draw loss, smoothed score and acceptance rate of the first chain over its steps."""
    figure, (left, middle, right) = panels(3, 5.6)
    evaluations = history.evaluations
    losses = {"current": history.current_loss[0], "best": history.best_loss[0]}
    curves = {name: (evaluations, loss) for name, loss in losses.items()}
    jaxnn.plotting.loss_curves(curves, left, log_x=True, log_y=True, steps=True)
    dots(left, evaluations, history.proposed_loss[0], "proposals, some")
    window = max(len(evaluations) // 50, 1) | 1
    metric = history.proposed_metric[0]
    jaxnn.plotting.smoothed(metric, middle, window=window, ylabel=score)
    accepted = np.diff(history.num_accepted[0][::window])
    proposals = np.diff(evaluations[::window])
    right.step(evaluations[::window][1:], 100 * accepted / proposals, color=BLUE)
    right.set(xlabel="loss evaluations", ylabel="accepted, % of evaluations", ylim=(0, None))
    right.set_title(f"acceptance rate,\n{window * (evaluations[0] - 1)} evaluations at a time")
    middle.set_title(f"{score} of proposals (pale)\nand mean of {window}")
    middle.set_xlabel("recorded step")
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(title)
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one search and report."""
    arguments = parse(argv)
    problem = problem_of(arguments, 2)
    model, batch, (init_key, key), _ = problem
    if arguments.animate and not has_regions(model):
        raise ValueError("--animate films the regions of classes of two features")
    name, metric_fn = score_of(model)
    given = key, model.loss, model.init(init_key), batch
    climb = partial(jaxnn.perturbation_search, *given, **options_of(arguments, model))
    before = done_before(arguments.checkpoint)
    result, seconds = timed(climb, "num_steps", arguments.steps, **cli.limits_of(arguments))
    steps = (result.num_evaluations // arguments.chains - 1) // arguments.proposals
    score = float(metric_fn(result.params, batch))
    if arguments.verbose:
        print(*improvement_lines(result, name), sep="\n")
    print(
        f"{result.status}: loss {result.loss:.4f}, {name} {score:.3f}; {steps:,} steps of "
        f"{arguments.chains:,} chain{'s' * (arguments.chains > 1)}, "
        f"{result.num_accepted:,} accepted, {seconds:.2f} seconds"
    )
    title = cli.title_of(arguments.data, model.settings.sizes)
    heat = arguments.temperature
    heated = "" if heat is None else f", temperature {heat:g}"
    kind = f"perturbation search, scale {arguments.scale:g}{heated}"
    if arguments.plot and len(result.history.evaluations) > 1:
        figure = draw(result.history, f"{title}, {kind}", name)
        save(figure, arguments, f"perturbation-search-{title.replace(', ', '-')}")
    report = {
        "best_loss": result.loss,
        name: score,
        "num_evaluations": result.num_evaluations,
        "num_accepted": result.num_accepted,
        "status": result.status,
        "loss_of_each_chain": np.asarray(result.state.best_loss, float).tolist(),
        "num_chains": arguments.chains,
        "num_steps": steps,
        "seconds": seconds,
        "steps_per_second": (steps - before) * arguments.chains / seconds,
    }
    problem.save(arguments.save, result.params)
    cli.write_json(arguments.json, report)
    finished(result)
    if arguments.animate:
        given = model, batch, steps, arguments.animate, f"{title}, {kind}", arguments.dpi
        film_regions(lambda count: climb(num_steps=count), *given)


if __name__ == "__main__":
    sys.exit(main())
