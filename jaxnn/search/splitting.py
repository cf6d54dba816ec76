"""One level of multilevel splitting: choose it, copy the particles below it, and move all.

Particles are vectors of coordinates whose distribution, the prior, is known. A level is a loss;
those particles at or below it are copied over the others, and each then moves so that its loss
stays at or below the level and the prior there stays what it was.

The move is a slice along a path through the particle that keeps the prior, with a shrinking
bracket: it has no step size, so it works over any number of decades. For normal coordinates the
path is the ellipse through the particle and a fresh draw (elliptical slice sampling); for uniform
ones a straight line through the cube, whose opposite faces are one. Both change a random share of
the coordinates. Nothing but the draw itself is known of another sampler: its coordinates can only
be drawn anew, and the move is not made where the loss would rise above the level.

On the loss (a b)^2 of two normals steps of one tuned size, in place of slices, gave ln P wrong by
up to 36: a good particle may lie anywhere from 1e-30 to 1 from zero.

References: Au and Beck, "Estimation of small failure probabilities in high dimensions by subset
simulation", 2001; Murray, Adams and MacKay, "Elliptical slice sampling", 2010; Walter, "Rare event
simulation and splitting for discontinuous random variables", arXiv:1507.00919; Brehier et al.,
"Unbiasedness of some generalized adaptive multilevel splitting algorithms", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.run.programs import COMPILER_OPTIONS, program
from jaxnn.run.random import normals, uniforms
from jaxnn.typing import PyTree

REDRAWS = 10
"""Tries of a move that only draws coordinates anew: about what a slice takes."""
MOST_SHRINKS = 200
"""A slice that has not found a lower loss by then is given up: its particle stays."""


class Problem(NamedTuple):
    """What a particle is, and its loss: an argument of the compiled programs."""

    loss: Partial  # loss(params, batch)
    sample: Partial  # sample(key) -> params
    to_params: Partial | None  # to_params(coordinates) -> params; None where no draws are named
    batch: PyTree


class Form(NamedTuple):
    """What of the particles is known before compilation."""

    distribution: str | None  # of the coordinates: "normal", "uniform", or unknown
    size: int  # coordinates
    tile: int  # particles that are moved side by side


class Particles(NamedTuple):
    """Particles and their losses."""

    coordinates: PyTree  # (particles, size)
    loss: PyTree  # (particles,); inf for those that are not finite


class Moves(NamedTuple):
    """What the moves of a level came to."""

    num_evaluations: PyTree
    acceptance: PyTree  # share of the tries that changed a particle


class Kernel(NamedTuple):
    """How a particle moves: along a path that starts at angle 0 and keeps the prior."""

    path: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    most_tries: int  # points of a path
    num_paths: int  # paths of a move


def rotate(here: jax.Array, fresh: jax.Array, angle: jax.Array) -> jax.Array:
    """Return a point of the ellipse through two draws of N(0, 1); at each it is such a draw."""
    return here * jnp.cos(angle) + fresh * jnp.sin(angle)


def translate(here: jax.Array, fresh: jax.Array, angle: jax.Array) -> jax.Array:
    """Return a point of a line through the cube from -1 to 1, which comes in again opposite."""
    ahead = here + fresh * (angle / math.pi)
    return ahead - 2 * jnp.floor((ahead + 1) / 2)


def redraw(here: jax.Array, fresh: jax.Array, angle: jax.Array) -> jax.Array:
    """Return the fresh draw."""
    del here, angle
    return fresh


KERNELS = {
    "normal": Kernel(rotate, MOST_SHRINKS, 1),
    "uniform": Kernel(translate, MOST_SHRINKS, 1),
    None: Kernel(redraw, 1, REDRAWS),
}


def next_level(losses: np.ndarray, lowest_asked: float) -> float:
    """Return a level that half of the losses reach, or the one asked for where that is higher.

    It is the largest number below the median: a particle at the level itself would not be a draw
    from below it, and where losses are tied there may be any number of them (Walter 2015).
    """
    middle = np.partition(losses, len(losses) // 2)[len(losses) // 2]
    below = np.nextafter(middle, losses.dtype.type(-np.inf))
    return float(max(below, losses.dtype.type(lowest_asked)))


@program(static_argnames=("form", "num_particles"), compiler_options=COMPILER_OPTIONS)
def draw_particles(
    problem: Problem, key: jax.Array, *, form: Form, num_particles: int
) -> Particles:
    """Return particles from the prior."""
    coordinates = jax.vmap(partial(draw, problem, form))(jax.random.split(key, num_particles))
    losses = jax.lax.map(partial(loss_at, problem), coordinates, batch_size=form.tile)
    return Particles(coordinates, losses)


@program(static_argnames="form", compiler_options=COMPILER_OPTIONS)
def move_to_level(
    problem: Problem,
    key: jax.Array,
    particles: Particles,
    level: jax.Array,
    num_moves: jax.Array,
    *,
    form: Form,
) -> tuple[Particles, Moves]:
    """Return particles from the prior below the level, which at least one has to reach already."""
    copy_key, move_key = jax.random.split(key)
    reaches, count = particles.loss <= level, len(particles.loss)
    # Every particle that reaches the level is copied equally often, but for one.
    order = jnp.argsort(jnp.where(reaches, jax.random.uniform(copy_key, (count,)), jnp.inf))
    place = order[jnp.arange(count) % jnp.sum(reaches, dtype=jnp.int32)]
    starts = jax.random.split(move_key, count), jax.tree.map(lambda leaf: leaf[place], particles)
    moved, tried, changed = jax.lax.map(
        lambda start: move_particle(problem, form, start[0], start[1], level, num_moves),
        starts,
        batch_size=form.tile,
    )
    tries = num_moves * KERNELS[form.distribution].num_paths
    share = jnp.mean(changed.astype(jnp.float32)) / tries.astype(jnp.float32)
    return moved, Moves(jnp.sum(tried, dtype=jnp.uint32), share)


def move_particle(
    problem: Problem,
    form: Form,
    key: jax.Array,
    particle: Particles,
    level: jax.Array,
    num_moves: jax.Array,
) -> tuple[Particles, jax.Array, jax.Array]:
    """Return one particle after its moves, the losses evaluated, and how many moves changed it."""
    path, most_tries, num_paths = KERNELS[form.distribution]

    def move(number: jax.Array, carry: tuple[Particles, jax.Array, jax.Array]):
        (here, loss), num_tried, num_changed = carry
        fresh_key, share_key, angle_key = jax.random.split(jax.random.fold_in(key, number), 3)
        fresh = draw(problem, form, fresh_key)
        numbers = 0.5 + 0.5 * uniforms(share_key, form.size + 2)
        chance, share, angle = numbers[:-2], numbers[-2], numbers[-1]
        # Some losses fall by few coordinates, others by all: the share is of any size, at least 1.
        moves = (chance < jnp.exp(-math.log(form.size) * share)) | (chance == jnp.min(chance))
        high = 2 * math.pi * angle

        def is_going(carry):
            tries, *_, loss = carry
            return (tries < most_tries) & ~(loss <= level)

        def try_point(carry):
            # The bracket reaches from `low` below 0 to `high` above it. A point that is too high
            # becomes its end, so that it closes in on 0, where the particle is now.
            tries, low, high, *_ = carry
            place = 0.5 + 0.5 * uniforms(jax.random.fold_in(angle_key, tries), 1)[0]
            angle = low + (high - low) * place
            there = jnp.where(moves, path(here, fresh, angle), here)
            ends = jnp.where(angle < 0, angle, low), jnp.where(angle < 0, high, angle)
            return tries + 1, *ends, there, loss_at(problem, there)

        start = jnp.int32(0), high - 2 * math.pi, high, here, jnp.full_like(loss, jnp.inf)
        tries, *_, there, found = jax.lax.while_loop(is_going, try_point, start)
        is_found = found <= level
        chosen = Particles(jnp.where(is_found, there, here), jnp.where(is_found, found, loss))
        is_changed = is_found & jnp.any(there != here)
        return chosen, num_tried + tries, num_changed + is_changed.astype(jnp.int32)

    none = jnp.int32(0)
    return jax.lax.fori_loop(0, num_moves * num_paths, move, (particle, none, none))


def draw(problem: Problem, form: Form, key: jax.Array) -> jax.Array:
    """Return the coordinates of a particle from the prior."""
    if form.distribution is None:
        return ravel_pytree(problem.sample(key))[0]
    return (normals if form.distribution == "normal" else uniforms)(key, form.size)


def params_at(problem: Problem, coordinates: jax.Array) -> PyTree:
    """Return the params of a particle."""
    if problem.to_params is not None:
        return problem.to_params(coordinates)
    shapes = jax.eval_shape(problem.sample, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return ravel_pytree(zeros)[1](coordinates)


def loss_at(problem: Problem, coordinates: jax.Array) -> jax.Array:
    """Return the loss of a particle; a loss that is not finite is above every level."""
    loss = problem.loss(params_at(problem, coordinates), problem.batch)
    return jnp.where(jnp.isfinite(loss), loss, jnp.inf)
