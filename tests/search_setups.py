"""Random searches that tests share: one small problem, and set-ups to be cut in every way.

Run as `python -m search_setups PROCESS NUMBER...`, it is one of two processes, on a port given
by the environment, and prints the digests of these set-ups, whole and resumed.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnn
from jaxnn.search import engine

if __name__ == "__main__":  # before any array is made
    address = f"localhost:{os.environ['PORT']}"
    jax.distributed.initialize(address, num_processes=2, process_id=int(sys.argv[1]))

KEY = jax.random.key(11)
BATCH = jnp.array([0.3, -1.2])
COUNT, TILE = 5_000, 256
BUDGET = 4 * 2 * 2 * TILE
"""The budget at which this loss has tiles of 256."""
OPTIONS = {
    "num_candidates": COUNT,
    "memory_budget": BUDGET,
    "top_k": 40,
    "thresholds": [-4.5, -1.0, 0.25],
    "collect": jaxnn.Collect(-1.0, 30),
}
"""The same shapes wherever a test allows it, so that little is compiled."""


def loss_fn(params, batch):
    """Negative, not finite and tied losses are all among these, and rounding is not."""
    loss = jnp.sum(params * batch) + jnp.abs(params[0])
    loss = jnp.where(params[1] > 2.0, jnp.nan, jnp.where(params[1] < -2.2, -jnp.inf, loss))
    return jnp.round(loss * 64) / 64


def sample_fn(key):
    return jax.random.normal(key, (2,), jnp.float32)


OWN = (KEY, loss_fn, sample_fn, BATCH)


def search(**options) -> Any:
    return jaxnn.random_search(*OWN, **{**OPTIONS, **options})


def stop_after(chunks, seen):
    """A callback that lists what it sees, and ends a run with its chunk of this number."""

    def callback(progress):
        seen.append(progress)
        if len(seen) == chunks:
            raise StopIteration

    return callback


NETWORKS = [jaxnn.mlp((2, 3, 3)), jaxnn.mlp((3, 12, 8, 2)), jaxnn.mlp((2, 4, 1), output="sigmoid",
            loss="binary_crossentropy")]  # fmt: skip
BUDGETS = (2**15, 2**18)
STARTS = (0, 2**31 - 700, 2**32 - 300, 2**53 - 1_000, 2**62)


def set_up(number):
    """Arguments and options of set-up `number`; few shapes, so that little is compiled."""
    rng = np.random.default_rng(number)
    model = NETWORKS[number % len(NETWORKS)]
    features, classes = model.settings.sizes[0], model.settings.sizes[-1]
    y = rng.integers(0, 2, (24, 1)) if classes == 1 else rng.integers(0, classes, 24)
    batch = jaxnn.Batch(rng.normal(size=(24, features)).astype(np.float32), y)
    sampler = model.sampler(scale=float(rng.uniform(0.1, 8)))
    given = jax.random.key(int(rng.integers(2**32))), model.loss, sampler, batch
    options = {
        "num_candidates": int(rng.integers(2, 6_000)),
        "start": int(rng.choice(STARTS)),
        "memory_budget": BUDGETS[number // len(NETWORKS) % len(BUDGETS)],
        "top_k": 5,
        "thresholds": np.sort(rng.uniform(0.1, 2, 2)).tolist(),
        "collect": jaxnn.Collect(float(rng.uniform(0.2, 1)), 7),
    }
    return given, options


def whole(number, **more):
    """The digest of a set-up's result."""
    given, options = set_up(number)
    return digest(jaxnn.random_search(*given, **{**options, **more}))


def digest(result):
    """A checksum of every bit of a result."""
    words = hashlib.sha256()
    for leaf in jax.tree.leaves(result):
        words.update(leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes())
    return words.hexdigest()


def main(*numbers):
    assert jax.process_count() == 2
    engine.LARGEST_CHUNK = 1  # a tile a chunk, so that stopping after the first leaves some
    with tempfile.TemporaryDirectory() as folder:
        for number in map(int, numbers):
            given, options = set_up(number)
            options["checkpoint"] = Path(folder) / f"{number}.npz"
            jaxnn.random_search(*given, **options, callback=stop_after(1, []))
            gone_on = digest(jaxnn.random_search(*given, **options))
            sys.stdout.write(f"{number} {whole(number)} {gone_on}\n")


if __name__ == "__main__":
    main(*sys.argv[2:])
