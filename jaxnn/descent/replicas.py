"""Many networks side by side: in blocks of one width, dealt to threads and devices.

A block is one compiled loop over networks that share a leading axis: 16 on a CPU, so that their
small matrix products fill vectors while all they work on stays in the caches. A thread for each
core takes block after block, since what XLA itself could split among cores is too small to gain
from it. Because every block has the same width, a network comes to the same bits however many
stand beside it, and on however many devices.

Measured on 2 cores with AVX-512 (jax 0.10.2, 300 rows, full batch, thousand gradients a second,
2-3-3 and 2-64-3): blocks of 16 on two threads 1,000 and 105, of 64 910 and 75; one `vmap` over
1,024 on XLA's threads 120 and 22; one network after the other on two threads 360 and 87. With
all that a step does, 1,000 networks of 2-3-3 make 730,000 steps a second, in blocks of 32 800,000,
but 20 networks would then be one block, on one core. As one flat vector the params take fewer
kernels a step, and no less time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.descent.kernel import CONVERGED, Cut, Records, State, descend, settle
from jaxnn.optim.optimizers import Each, Optimizer, made_by

WIDTH, CPU_WIDTH = 1024, 16


class Networks(NamedTuple):
    """How many networks, and where they descend.

    Attributes:
        count: their number.
        devices: block after block goes to one after the other.
    """

    count: int
    devices: tuple[Any, ...]

    @property
    def width(self) -> int:
        """Networks of a block."""
        return CPU_WIDTH if self.devices[0].platform == "cpu" else WIDTH


def per_network(optimizer: Optimizer | Each, count: int) -> Optimizer:
    """The optimizer with a first axis of networks on all that it holds."""

    def spread(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *np.shape(leaf))), tree)

    if isinstance(optimizer, Each):
        return made_by(spread(optimizer.make), optimizer.values)
    return spread(optimizer)


def in_blocks(tree: Any, networks: Networks) -> list[Any]:
    """A tree with an axis of networks, cut; the last network fills the last block up."""
    num_blocks, width = -(-networks.count // networks.width), networks.width
    places = np.minimum(np.arange(num_blocks * width), networks.count - 1).reshape(
        num_blocks, width
    )
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf[places], tree))
    blocks = zip(*map(list, leaves), strict=True) if leaves else [()] * num_blocks
    return [jax.tree.unflatten(structure, block) for block in blocks]


def placed(shared: tuple[Any, ...], own: Sequence[tuple[Any, ...]], networks: Networks):
    """The arguments of every block on its device: what all share, then what is its own."""
    devices = networks.devices[: len(own)]
    copies = [jax.device_put(shared, device) for device in devices]
    return [
        (*copies[number % len(devices)], *jax.device_put(block, devices[number % len(devices)]))
        for number, block in enumerate(own)
    ]


def each_block(
    function: Any, blocks: Sequence[tuple[Any, ...]], networks: Networks, **options: Any
) -> list[Any]:
    """`function(*block, **options)` of every block, as many at once as there are cores.

    Args:
        function: a `Program`. It is compiled here, in the caller's settings of JAX, which its
            threads would not know.
        blocks: their arguments, on devices in turn.
        networks: how many, and where.
        **options: static arguments.

    Returns:
        The results, in the order of the blocks.
    """
    first_on_each = blocks[: len(networks.devices)]
    programs = [function.compile(*block, **options) for block in first_on_each]

    def run(number: int) -> Any:
        return jax.block_until_ready(programs[number % len(programs)](*blocks[number]))

    with ThreadPoolExecutor(_num_threads(networks.devices)) as threads:
        return list(threads.map(run, range(len(blocks))))


def _num_threads(devices: Sequence[Any]) -> int:
    if devices[0].platform != "cpu":
        return len(devices)
    affinity: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def begin_blocks(
    start: Callable[..., State], optimizer: Any, params: Any, networks: Networks
) -> tuple[State, ...]:
    """The states before the first step; what fills the last block up has stopped already."""
    states = in_blocks(jax.vmap(start)(optimizer, params), networks)
    left = networks.count - (len(states) - 1) * networks.width
    verdict = states[-1].verdict.at[left:].set(CONVERGED)
    return (*states[:-1], states[-1]._replace(verdict=verdict))


def descend_blocks(
    blocks: Sequence[tuple[Any, ...]],
    networks: Networks,
    states: Sequence[State],
    first_epoch: np.uint32,
    num_epochs: np.uint32,
    *,
    cut: Cut,
    capacity: int,
) -> tuple[tuple[State, ...], Records]:
    """One chunk of every block: as `descend`, with a state a block."""
    arguments = [
        (*block, state, first_epoch, num_epochs)
        for block, state in zip(blocks, states, strict=True)
    ]
    results = each_block(descend, arguments, networks, cut=cut, capacity=capacity)
    stepped, records = zip(*results, strict=True)
    on_host = [jax.tree.map(np.asarray, record) for record in records]
    return stepped, _side_by_side(on_host, cut.steps)


def settle_blocks(
    networks: Networks, function: Partial, batch: Any, states: Any
) -> tuple[Any, Any, Any]:
    """Params, losses and verdicts of all networks: as `settle`, of a state a block."""
    blocks = placed((function, batch), [(state,) for state in states], networks)
    return _joined(each_block(settle, blocks, networks), networks.count)


def _joined(blocks: Sequence[Any], count: int) -> Any:
    """The blocks as one tree again, of NumPy arrays, without what filled the last block up."""
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *blocks)


def _side_by_side(records: Sequence[Records], steps_per_epoch: int) -> Records:
    """Those of all blocks: networks in the second axis, nan from where one had stopped."""
    num_steps = np.concatenate([record.num_steps for record in records])

    def stacked(parts: Sequence[Any], lengths: np.ndarray) -> np.ndarray:
        numbers = np.concatenate([part[: np.max(lengths)] for part in parts], axis=1)
        numbers[np.arange(len(numbers))[:, None] >= lengths] = np.nan
        return numbers

    validation = None
    if records[0].validation is not None:
        num_epochs = -(-num_steps // steps_per_epoch)
        validation = stacked([record.validation for record in records], num_epochs)
    return Records(stacked([record.loss for record in records], num_steps), num_steps, validation)
