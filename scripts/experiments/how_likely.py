"""Ask how likely a good network is: probabilities that no count reaches, beside those known.

Four questions, each with a table and a figure; intervals are of 95 %.

truths          Are probabilities down to 1e-30 right? Sums of squares, a product, a ball, coins.
vertical        How rare are low losses at each scale? Beside the count of plain random search.
spiral          How unlikely is a network that descent finds in a second?
generalisation  Networks from the prior, given a training loss, against descended ones of the same
                loss: which get more fresh rows right? The question of Chiang et al., "Loss
                Landscapes are All You Need", ICLR 2023, and of Pakman et al., arXiv:2606.31282.

    python scripts/experiments/how_likely.py
    python scripts/experiments/how_likely.py --questions spiral --particles 2000
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special, stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import BLUE, GREEN, ORANGE, Figure, colors_of, error_bars, plt, save, slide
from shared.intervals import of_mean
from shared.problems import kink
from shared.resuming import run_pieces
from shared.runs import finished

import jaxnn
from jaxnn.typing import Traits, UnitDraws

LN_10 = math.log(10)
NOWHERE = -9_999.0
"""Stands for a power of ten that is not known to be finite."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
LOSSES = (0.5, 0.3, 0.2, 0.15)
"""Of vertical data; the population's Bayes value is 0.163."""
SPIRALS = {"2-16-3": 16, "2-64-3": 64}
SPIRAL_SCALE, SPIRAL_LOSSES = 2.0, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SPIRAL_SHARE = 0.1
"""Particles at the spiral, as a share of those elsewhere: at equal work runs agree by more moves,
not by more particles, for a particle has to get from one solution to another."""
ROWS = (11, 30, 100, 300)
WIDTH, GOOD_LOSS, FRESH = 16, 0.1, 1_000
"""Of the networks 2-u-2 whose fresh accuracy is asked for, at this loss on the kink data."""
NETWORKS, MOST_EPOCHS = 200, 20_000
KINDS = ("random", "descended from the prior", "descended from he")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(2)
    add("--questions", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS),
        help="Ask these.")  # fmt: skip
    add("--particles", type=some, default=1_000, help="Give each of the runs this many particles.")
    add("--runs", type=some, default=4, help="Make this many independent runs.")
    add("--candidates", type=cli.at_least(1_000), default=10**8,
        help="Count this many candidates at each scale.")  # fmt: skip
    add("--moves", type=cli.at_least(1), default=40,
        help="Move each particle this often a level at the spiral.")  # fmt: skip
    add("--max-seconds", type=float, default=180.0, help="Follow each spiral for this long.")
    cli.add_seed(parser)
    cli.add_output(parser, json_file=False)
    return parser.parse_args(argv)


def search(arguments: argparse.Namespace, *given: Any, **options: Any) -> Any:
    """Run a rare-event search of a loss, a sampler and a batch."""
    key = jax.random.key(arguments.seed)
    settings = {"num_particles": arguments.particles, "num_runs": arguments.runs, **options}
    return finished(jaxnn.rare_event_search(key, *given, **settings))


def curve_of(found: Any, losses: Sequence[float]) -> dict[str, Any]:
    """Return what a search tells of these losses: powers of ten, None where it did not get."""
    curve, rows = found.curve, {}
    for loss in losses:
        at = np.flatnonzero(curve.loss == np.float32(loss))
        rows[f"{loss:g}"] = powers([each[at[0]] for each in curve[1:]]) if len(at) else None
    return {
        "at": rows,
        "status": found.status,
        "level": found.level,
        "power": powers(found[5:8]),
        "evaluations": found.num_evaluations,
        "notes": list(found.notes),
        "loss": curve.loss.tolist(),
        "curve": powers(curve[1:]),
    }


def powers(logarithms: Any) -> list[Any]:
    """Return log10 of what natural logarithms are given of; JSON has no infinity."""
    return (np.array(logarithms) / LN_10).clip(NOWHERE).tolist()


# --- known probabilities


def squares(params: jax.Array, batch: None) -> jax.Array:
    """Return the sum of squares."""
    return jnp.sum(params**2)


def product(params: jax.Array, batch: None) -> jax.Array:
    """Return the square of a product of two numbers."""
    return (params[0] * params[1]) ** 2


def share_positive(params: jax.Array, batch: None) -> jax.Array:
    """Return the share of the numbers that are positive: ties."""
    return jnp.mean(params > 0, dtype=jnp.float32)


def sampler(distribution: Any, size: int) -> Callable[..., Any]:
    """Return a sampler of independent numbers, which names its draws."""
    draw = (
        jax.random.normal if distribution == "normal" else partial(jax.random.uniform, minval=-1.0)
    )

    def sample_fn(key: jax.Array) -> jax.Array:
        return draw(key, (size,))

    unit: Any = UnitDraws(distribution, size, lambda draws: draws)
    vars(sample_fn)["traits"] = Traits(unit_draws=unit)
    return sample_fn


def log_ball(size: int, radius: float) -> float:
    """Return ln of the share that a ball has of the cube from -1 to 1."""
    unit = size / 2 * math.log(math.pi) - special.gammaln(size / 2 + 1)
    return unit + size * math.log(radius / 2)


def log_product(loss: float) -> float:
    """Return ln P((a b)^2 <= loss) of two normals: an integral of the Bessel function K0."""
    return math.log(2 / math.pi * special.iti0k0(math.sqrt(loss))[1])


TRUTHS: dict[str, tuple[Callable[..., Any], str, int, tuple[float, ...], Callable[[float], float]]]
TRUTHS = {
    "sum of 21 squares": (
        squares, "normal", 21, (2.86612, 0.700226, 0.118129, 0.0131218),
        lambda loss: stats.chi2(21).logcdf(loss),
    ),
    "square of a product": (product, "normal", 2, (1e-10, 1e-20, 1e-30), log_product),
    "ball in 21 dimensions": (
        squares, "uniform", 21, (0.25, 0.01), lambda loss: log_ball(21, math.sqrt(loss))
    ),
    "heads of 21 coins": (
        share_positive, "normal", 21, (3 / 21, 0.0),
        lambda loss: stats.binom(21, 0.5).logcdf(round(21 * loss)),
    ),
}  # fmt: skip


def truth(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search where the probability is known."""
    loss_fn, distribution, size, losses, log_of = TRUTHS[name]
    given = loss_fn, sampler(distribution, size), None
    found = search(arguments, *given, target_loss=losses[-1], levels=losses[:-1])
    return {**curve_of(found, losses), "known": [log_of(loss) / LN_10 for loss in losses]}


def rows_of_truths(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a loss."""
    return [
        {
            "case": name,
            "loss <=": loss,
            "known": f"10^{known:.3f}",
            "found": said(power),
            "covered": "yes" if power and power[1] <= known <= power[2] else "no",
            "evaluations": found["evaluations"],
        }
        for (loss, power), known in zip(found["at"].items(), found["known"], strict=True)
    ]


def draw_truths(found: dict[str, Any]) -> Figure:
    """Draw how far each probability is from what is known, in factors of e."""
    figure, ax = plt.subplots()
    labels = []
    for (name, piece), color in zip(found.items(), colors_of(len(found)), strict=True):
        for (loss, power), known in zip(piece["at"].items(), piece["known"], strict=True):
            if power is not None:
                off = (np.array(power) - known) * LN_10
                ends = np.abs(off[1:, None] - off[0])
                ax.errorbar(off[0], len(labels), xerr=ends, fmt="o", color=color)
            labels.append(f"{name}, loss <= {loss}: $10^{{{known:.1f}}}$")
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(visible=True)
    ax.set(xlabel="ln P found, less the known one", title="Known probabilities; 95 % intervals")
    return figure


# --- vertical data at several scales


def vertical(scale: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search vertical data at one scale, by levels and by counting."""
    batch = jaxnn.datasets.vertical(jax.random.split(jax.random.key(0), 3)[0], samples=100)
    model = jaxnn.mlp((2, 3, 3))
    given = model.loss, model.sampler(scale=float(scale)), batch
    started = time.perf_counter()
    options = {"target_loss": LOSSES[-1], "levels": LOSSES[:-1], "num_moves": 5}
    found = search(arguments, *given, max_seconds=arguments.max_seconds / 6, **options)
    seconds = time.perf_counter() - started
    counted = finished(jaxnn.random_search(
        jax.random.key(arguments.seed), *given, num_candidates=arguments.candidates,
        thresholds=sorted(LOSSES), progress=True,
    ))  # fmt: skip
    below = np.cumsum(counted.histogram.counts) / counted.num_evaluations
    seen = below > 10 / counted.num_evaluations
    return {
        **curve_of(found, LOSSES),
        "search_seconds": seconds,
        "counts": {
            f"{t:g}": [int(n), float(low), float(high)]
            for t, n, _, low, high in zip(*counted.counts, strict=True)
        },
        "counted_loss": counted.histogram.edges[1:][seen].clip(max=99.0).tolist(),
        "counted": np.log10(below[seen]).tolist(),
    }  # fmt: skip


def rows_of_vertical(scale: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a loss."""
    rows = []
    for loss, power in found["at"].items():
        count, low, high = found["counts"][loss]
        rows.append({
            "scale": scale,
            "loss <=": loss,
            "counted": count,
            "share": f"{low:.3g} to {high:.3g}" if count else f"below {high:.2g}",
            "found": said(power),
            "agree": "" if not count else agreement(power, low, high),
            "evaluations": found["evaluations"],
            "seconds": f"{found['search_seconds']:.0f}",
        })  # fmt: skip
    return rows


def agreement(power: list[float] | None, low: float, high: float) -> str:
    """Tell whether two intervals have a number in common."""
    common = power and power[1] <= math.log10(high) and math.log10(low) <= power[2]
    return "yes" if common else "no"


def draw_vertical(found: dict[str, Any]) -> Figure:
    """Draw the curve of each scale, with the counts as dots."""
    figure, ax = plt.subplots()
    for (scale, piece), color in zip(found.items(), colors_of(len(found)), strict=True):
        draw_curve(ax, piece, color, f"scale {scale}")
        every = slice(None, None, max(len(piece["counted"]) // 40, 1))
        style = {"color": color, "markersize": 5, "markerfacecolor": "none"}
        ax.plot(piece["counted_loss"][every], piece["counted"][every], "o", **style)
    bayes = jaxnn.datasets.vertical_bayes(3).crossentropy
    ax.axvline(bayes, color="black", linestyle=":", label="population Bayes value")
    ax.set(
        xlim=(0.13, 3.0), ylim=(-30, 1), title="Vertical data, networks 2-3-3; circles are counts"
    )
    return figure


# --- the spiral


def spiral(sizes: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Follow the spiral down, and let descent find such a network."""
    data_key, start_key, key = jax.random.split(jax.random.key(0), 3)
    batch = jaxnn.datasets.spiral(data_key, samples=100)
    model = jaxnn.mlp((2, SPIRALS[sizes], 3))
    found = search(
        arguments, model.loss, model.sampler(scale=SPIRAL_SCALE), batch,
        target_loss=SPIRAL_LOSSES[-1], levels=SPIRAL_LOSSES[:-1], max_levels=10_000,
        num_particles=max(round(SPIRAL_SHARE * arguments.particles), 2),
        num_moves=arguments.moves, max_seconds=arguments.max_seconds, progress=True,
    )  # fmt: skip
    start = model.init(start_key, scale=1.0, distribution="he")
    adam = {"num_epochs": 20_000, "optimizer": jaxnn.optimizers.adam(0.02)}
    descend = partial(jaxnn.gradient_descent, key, model.value_and_grad, start, batch, **adam)
    finished(descend(target_loss=SPIRAL_LOSSES[-1]))  # compiles
    started = time.perf_counter()
    descended = finished(descend(target_loss=SPIRAL_LOSSES[-1]))
    seconds = time.perf_counter() - started
    return {
        **curve_of(found, SPIRAL_LOSSES),
        "by_run": [power_of_run(found, run) for run in range(arguments.runs)],
        "descent": {
            "loss": descended.loss, "evaluations": descended.num_evaluations, "seconds": seconds,
        },
    }  # fmt: skip


def power_of_run(found: Any, run: int) -> list[float | None]:
    """Return log10 P of each of the spiral's losses by one run: shares of the prior add up."""
    own = found.samples.run == run
    losses, weights = found.samples.loss[own], found.samples.log_weight[own]
    lowest = found.history.level[run, -1]
    return [
        float(np.logaddexp.reduce(weights[losses <= loss])) / LN_10 if loss >= lowest else None
        for loss in SPIRAL_LOSSES
    ]


def rows_of_spiral(sizes: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a loss, and what descent needs."""
    by_run = zip(*found["by_run"], strict=True)
    return [
        {
            "network": sizes,
            "loss <=": loss,
            "found": said(power),
            "powers of ten by run": " ".join(
                "-" if each is None else f"{each:.0f}" for each in runs
            ),
        }
        for (loss, power), runs in zip(found["at"].items(), by_run, strict=True)
    ]


def draw_spiral(found: dict[str, Any]) -> Figure:
    """Draw the curve of each network."""
    figure, ax = plt.subplots()
    for (sizes, piece), color, dash in zip(
        found.items(), (BLUE, ORANGE), ("-", "--"), strict=False
    ):
        draw_curve(ax, piece, color, sizes, dash)
        for run in np.array(piece["by_run"], float):  # None becomes nan, which is not drawn
            ax.plot(SPIRAL_LOSSES, run, "x", color=color)
    ax.set(xlim=(0.45, 3.0), title=f"Spiral, scale {SPIRAL_SCALE:g}; crosses are single runs")
    return figure


# --- random and descended networks at the same loss


def generalisation(rows: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare networks from the prior, given a training loss, with descended ones of that loss."""
    train = kink(math.ceil(int(rows) / 0.7))[0]
    fresh = kink(math.ceil(FRESH / 0.3))[1]
    model = jaxnn.mlp((2, WIDTH, 2))
    prior = model.sampler(scale=1.0)

    def right(params: Any, batch: Any) -> jax.Array:
        del batch
        return model.accuracy(params, fresh)

    found = search(arguments, model.loss, prior, train, target_loss=GOOD_LOSS, metric_fn=right)
    drawn = found.particles
    by_run = [float(np.mean(drawn.metric[drawn.run == run])) for run in range(arguments.runs)]
    keys = jax.random.split(jax.random.key(arguments.seed + 1), NETWORKS)
    small = partial(model.init, scale=1.0, distribution="he")
    descend = partial(
        jaxnn.gradient_descent, jax.random.key(0), model.value_and_grad, learning_rate=0.1,
        num_networks=NETWORKS, num_epochs=MOST_EPOCHS, target_loss=GOOD_LOSS,
    )  # fmt: skip
    results = {"random": share_of(drawn.metric, by_run), "power": powers(found[5:8])}
    for name, start_fn in zip(KINDS[1:], (prior, small), strict=True):
        trained = finished(descend(jax.vmap(start_fn)(keys), train))
        shares = np.asarray(jax.vmap(right, (0, None))(trained.params, None))
        shares = shares[trained.loss <= GOOD_LOSS]
        results[name] = share_of(shares, shares)
    return {"rows": len(train.x), **results}


def share_of(shares: np.ndarray, independent: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return the mean, its interval by independent means, and how many there are."""
    if len(shares) < 2:
        return {"number": len(shares), "mean": None, "interval": None}
    ends = np.clip(of_mean(independent), 0, 1).tolist()
    return {"number": len(shares), "mean": float(np.mean(shares)), "interval": ends}


def rows_of_generalisation(rows: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row."""

    def share(name: str) -> str:
        piece = found[name]
        if piece["mean"] is None:
            return "none"
        low, high = piece["interval"]
        return f"{piece['mean']:.4f} ({low:.4f} to {high:.4f}), {piece['number']:,}"

    shares = {name: share(name) for name in KINDS}
    return [{"rows": found["rows"], "probability": said(found["power"]), **shares}]


def draw_generalisation(found: dict[str, Any]) -> Figure:
    """Draw the accuracy on fresh rows against the rows trained on."""
    figure, ax = plt.subplots()
    for name, color, marker in zip(KINDS, (BLUE, ORANGE, GREEN), "os^", strict=True):
        known = [p for p in found.values() if p[name]["mean"] is not None]
        x = [piece["rows"] for piece in known]
        middle = [piece[name]["mean"] for piece in known]
        ends = [piece[name]["interval"] for piece in known]
        error_bars(ax, x, middle, ends, color=color, marker=marker, label=name)
    jaxnn.plotting.log_scale(ax, "x")
    ax.set(xlabel="rows to train on", ylabel="mean accuracy on 1,000 fresh rows")
    ax.set_title(f"Kink data, networks 2-{WIDTH}-2 at training loss <= {GOOD_LOSS:g}")
    return figure


# --- tables and figures


def said(power: Sequence[float] | None) -> str:
    """Return a probability as a power of ten, with its interval."""
    if power is None:
        return "not reached"
    return "10^{:.2f} ({:.2f} to {:.2f})".format(*power)


def draw_curve(ax: Any, piece: dict[str, Any], color: Any, label: str, dash: str = "-") -> None:
    """Draw log10 P against the loss, with a band for its interval."""
    middle, low, high = np.array(piece["curve"])
    is_known = low > NOWHERE
    loss, ends = np.array(piece["loss"])[is_known], (low[is_known], high[is_known])
    ax.plot(loss, middle[is_known], dash, color=color, label=label)
    ax.fill_between(loss, *ends, color=color, alpha=0.2, linewidth=0)
    ax.set(xlabel="loss", ylabel="log10 P(loss or less)")
    jaxnn.plotting.log_scale(ax, "x")
    ax.grid(visible=True)


QUESTIONS: dict[str, tuple[Any, Sequence[str], Any, Any]] = {
    "truths": (truth, tuple(TRUTHS), rows_of_truths, draw_truths),
    "vertical": (vertical, tuple(map(str, SCALES)), rows_of_vertical, draw_vertical),
    "spiral": (spiral, tuple(SPIRALS), rows_of_spiral, draw_spiral),
    "generalisation": (
        generalisation, tuple(map(str, ROWS)), rows_of_generalisation, draw_generalisation
    ),
}  # fmt: skip
"""What answers each question, its parts, and what tells the answers."""


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Answer what is not answered yet; print the tables and draw the figures."""
    arguments = parse(argv)
    names = ("particles", "runs", "candidates", "moves", "max_seconds", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    for question in arguments.questions:
        answer, parts, rows_of, draw = QUESTIONS[question]
        pieces = {part: partial(answer, part, arguments) for part in parts}
        path = arguments.output / f"how-likely-{question}.json"
        found = run_pieces(path, settings, pieces)
        print(f"\n{question}")
        cli.print_table([row for part, piece in found.items() for row in rows_of(part, piece)])
        for part, piece in found.items():
            for note in piece.get("notes", ()):
                print(f"{part}: {note}")
            if "descent" in piece:
                print("{}: descent has a loss of {loss:.3f} after {evaluations:,} evaluations, "
                      "{seconds:.2g} s".format(part, **piece["descent"]))  # fmt: skip
        figure = slide(draw)(found)
        jaxnn.plotting.shared_legend(figure)
        save(figure, arguments, path.stem)


if __name__ == "__main__":
    sys.exit(main())
