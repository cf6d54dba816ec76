"""Many networks side by side, in tiles of one width, in blocks on threads and devices.

A tile is one compiled loop over networks that share a leading axis: 16 on a CPU, so that their
small matrix products fill vectors and their data stay in the caches. A thread for each core takes
block after block, since the work is too small for XLA to gain from splitting it among cores. A
block is a tile, or of more than 1,000 networks several: a call takes longer than a few epochs do.
Every tile has the same width, so the bits of a network do not depend on the number of networks
or of devices. A single network is a tile without an axis.

Measured on 2 cores with AVX-512 (jax 0.10.2, 300 rows, full batch, thousand gradients a second,
2-3-3 and 2-64-3): blocks of 16 on two threads 1,000 and 105, of 64 910 and 75; one `vmap` over
1,024 on XLA's threads 120 and 22; one network after the other on two threads 360 and 87. With
all that a step does, 1,000 networks of 2-3-3 make 730,000 steps a second, in blocks of 32 800,000,
but 20 networks would then be one block, on one core. As one flat vector the params take fewer
kernels a step, and no less time.

On an H200 (jax 0.11.2), 40 steps of 100,000 networks of 2-3-3 in tiles of 1,024 take 1.83 s if each
tile is a block, and 0.63 s in blocks of 64 tiles, though the last block is filled up to 131,072
networks. Tiles of 8,192 would take 0.33 s, but 1,000 networks would be an eighth of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.optim.optimizers import Each, Optimizer, made_by
from jaxnn.typing import Device, PyTree

ON_CPUS, ELSEWHERE = (16, 64), (1024, 1)
"""Networks of a tile, and the fewest blocks to share out."""
MOST_TILES = 64
"""A block holds 1, 2, 4 ... 64 tiles, as many as leave enough blocks."""


class Networks(NamedTuple):
    """How many networks, and where they descend."""

    count: int | None = None  # None for a single one, a block of its own without an axis
    devices: Sequence[Device] = ()  # blocks go to one after the other

    @property
    def tile(self) -> int | None:
        """Networks of a tile."""
        return None if self.count is None else self._tile_and_blocks[0]

    @property
    def width(self) -> int | None:
        """Networks of a block: whole tiles, as many as a power of 2."""
        if self.count is None:
            return None
        tile, blocks = self._tile_and_blocks
        tiles = self.count // (tile * blocks)
        return tile * min(2 ** max(tiles.bit_length() - 1, 0), MOST_TILES)

    @property
    def _tile_and_blocks(self) -> tuple[int, int]:
        return ON_CPUS if self.devices[0].platform == "cpu" else ELSEWHERE

    def first(self, tree: PyTree) -> PyTree:
        """What belongs to the first network."""
        return tree if self.count is None else jax.tree.map(lambda leaf: leaf[0], tree)


def per_network(optimizer: Optimizer | Each, networks: Networks) -> Optimizer:
    """The optimizer with the axis of networks, if any, on all that it holds."""
    axes = () if networks.count is None else (networks.count,)

    def spread(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*axes, *np.shape(leaf))), tree)

    if isinstance(optimizer, Each):
        return made_by(spread(optimizer.make), optimizer.values)
    return spread(optimizer) if axes else optimizer


def split(tree: PyTree, networks: Networks) -> list[PyTree]:
    """A tree with an axis of networks, in blocks; the last network fills the last block up."""
    if networks.count is None or networks.width is None:
        return [tree]
    places = np.arange(-(-networks.count // networks.width) * networks.width)
    places = np.minimum(places, networks.count - 1).reshape(-1, networks.width)
    leaves, structure = jax.tree.flatten(tree)
    blocks = zip(*(_rows(leaf, places) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, block) for block in blocks]


def _rows(leaf: jax.Array, places: np.ndarray) -> list[jax.Array]:
    """The leaf at each row of places, on the host: XLA would compile an output for each."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(leaf))
        return [wrap(words) for words in _rows(jax.random.key_data(leaf), places)]
    return list(map(jnp.asarray, np.asarray(leaf)[places]))


def join(blocks: Sequence[PyTree], networks: Networks) -> PyTree:
    """The blocks as one tree again, without what filled the last block up."""

    def concatenated(*parts: jax.Array) -> jax.Array:
        if jnp.issubdtype(parts[0].dtype, jax.dtypes.prng_key):
            data = concatenated(*map(jax.random.key_data, parts))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(parts[0]))
        return jnp.asarray(np.concatenate([np.asarray(part) for part in parts])[: networks.count])

    return blocks[0] if networks.count is None else jax.tree.map(concatenated, *blocks)


def numbers(parts: Sequence[PyTree], networks: Networks) -> np.ndarray:
    """A number of each network, of all blocks: `(networks,)`, one too where there is one."""
    return np.concatenate([np.atleast_1d(part) for part in parts])[: networks.count]


def place(shared: tuple[PyTree, ...], own: PyTree, networks: Networks) -> list[tuple[PyTree, ...]]:
    """The arguments of every block on its device: what all share, then its part of a tuple."""
    blocks = split(own, networks)
    if networks.count is None:
        return [(*shared, *block) for block in blocks]
    devices = networks.devices[: len(blocks)]
    copies = [jax.device_put(shared, device) for device in devices]
    return [
        (*copies[number % len(devices)], *jax.device_put(block, devices[number % len(devices)]))
        for number, block in enumerate(blocks)
    ]
