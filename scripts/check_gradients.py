"""Checks every hand-written gradient against `jax.grad` and against finite differences.

For every hidden activation, output and loss, and depth, in float64. Exits with status 1 if any
gradient is wrong.

    python scripts/check_gradients.py
    python scripts/check_gradients.py --depths 1 2 3 4 5 --samples 100 --json gradients.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import jaxnn
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.heads import HEADS

FEATURES, OUTPUTS, ROWS = 3, 2, 7
WIDTHS = (5, 4, 6, 3)


def networks(depths: Sequence[int]) -> Iterator[jaxnn.Model]:
    """Every network of the product; a single layer has no hidden activation to vary."""
    for output, loss in HEADS:
        for depth in depths:
            sizes = (FEATURES, *WIDTHS[: depth - 1], OUTPUTS)
            for hidden in HIDDEN_ACTIVATIONS if depth > 1 else HIDDEN_ACTIVATIONS[:1]:
                yield jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)


def random_batch(loss: str, seed: int) -> jaxnn.Batch:
    """Rows with targets that the loss can mean."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    if loss == "categorical_crossentropy":
        return jaxnn.Batch(x, generator.integers(0, OUTPUTS, ROWS))
    if loss == "binary_crossentropy":
        return jaxnn.Batch(x, generator.integers(0, 2, (ROWS, OUTPUTS)))
    return jaxnn.Batch(x, generator.normal(size=(ROWS, OUTPUTS)).astype(np.float32))


def check(model: jaxnn.Model, seed: int, samples: int) -> jaxnn.GradientReport:
    """The report of one network."""
    return jaxnn.check_gradients(
        jax.random.key(seed),
        model.loss_reference,
        model.value_and_grad,
        model.sampler(scale=1.0),
        random_batch(model.settings.loss, seed),
        num_samples=samples,
    )


def facts(model: jaxnn.Model, report: jaxnn.GradientReport) -> dict:
    """What the JSON file says of one network."""
    return {
        "network": model.settings._asdict(),
        "passed": report.passed,
        "value_error": report.value_error,
        "leaves": [leaf._asdict() for leaf in report.leaves],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    most = len(WIDTHS) + 1
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[1, 2, 3], choices=range(1, most + 1),
        help="numbers of layers (default: 1 2 3)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=20, help="parameter sets a network")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the parameter sets")
    parser.add_argument("--verbose", action="store_true", help="print every network's table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    arguments = parse(argv)
    models = list(networks(arguments.depths))
    reports = []
    for model in tqdm(models, unit=" networks"):
        reports.append(check(model, arguments.seed, arguments.samples))
        if arguments.verbose or not reports[-1].passed:
            tqdm.write(f"\n{model}\n{reports[-1]}")
    if arguments.json:
        rows = [facts(*pair) for pair in zip(models, reports, strict=True)]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1))
    failed = sum(not report.passed for report in reports)
    leaves = [leaf for report in reports for leaf in report.leaves]
    print(
        f"{len(models) - failed} of {len(models)} networks passed; largest relative error "
        f"{max(leaf.error for leaf in leaves):.1e} against jax.grad, "
        f"{max(leaf.difference_error for leaf in leaves):.1e} against finite differences"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
