"""Several processes that search together, each on its own devices, under `jax.distributed`.

They work apart and meet once, at the end, so JAX's runtime is all that is needed: one gather.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["gather", "own_path"]


def own_path(path: Path) -> Path:
    """This process's own file beside those of the others; `path` itself if it is alone."""
    if jax.process_count() == 1:
        return path
    part = f"{jax.process_index()}-of-{jax.process_count()}"
    return path.with_name(f"{path.stem}.{part}{path.suffix}")


def gather(message: bytes) -> list[bytes]:
    """Every process's message, in the order of the processes; all have to call this."""
    sizes = _exchange(np.array([len(message)], np.int32))[:, 0]
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = _exchange(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _exchange(row: np.ndarray) -> np.ndarray:
    """A row from each process, `(processes, length)`; all of one length and dtype."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh([first[process] for process in sorted(first)], "process")
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("process", None))
    rows = jax.make_array_from_process_local_data(split, row[None])
    return np.asarray(jax.jit(lambda rows: rows, out_shardings=whole)(rows))
