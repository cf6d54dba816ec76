"""Random searches to be cut in every way, in this process and in others; results as digests.

Run as `python -m search_setups PROCESS NUMBER...`, it is one of two processes, on a port given
by the environment, and prints the digests of these set-ups, whole and resumed.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import jaxnn
from jaxnn.search import engine as searching

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
    sample_fn = model.sampler(scale=float(rng.uniform(0.1, 8)))
    given = jax.random.key(int(rng.integers(2**32))), model.loss, sample_fn, batch
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


def resumed(number, folder, **more):
    """The same, stopped somewhere and gone on with."""
    given, options = set_up(number)
    path = Path(folder) / f"{number}.npz"
    first = int(np.random.default_rng(number).integers(1, options["num_candidates"]))
    jaxnn.random_search(*given, **{**options, "num_candidates": first}, checkpoint=path, **more)
    return digest(jaxnn.random_search(*given, **options, checkpoint=path, **more))


def stopped(number, folder):
    """The same, each process stopped after its first chunk and gone on with."""
    given, options = set_up(number)
    path = Path(folder) / f"{number}.npz"

    def stop(_):
        raise StopIteration

    jaxnn.random_search(*given, **options, checkpoint=path, callback=stop)
    return digest(jaxnn.random_search(*given, **options, checkpoint=path))


def digest(result):
    """A checksum of every bit of a result."""
    words = hashlib.sha256()
    for leaf in jax.tree.leaves(result):
        words.update(leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes())
    return words.hexdigest()


def main(process, *numbers):
    address = f"localhost:{os.environ['PORT']}"
    jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    assert jax.process_count() == 2
    searching.LARGEST_CHUNK = 1  # a tile a chunk, so that stopping after the first leaves some
    with tempfile.TemporaryDirectory() as folder:
        for number in map(int, numbers):
            sys.stdout.write(f"{number} {whole(number)} {stopped(number, folder)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
