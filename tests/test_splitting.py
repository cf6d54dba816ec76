"""One level of splitting: which level, which copies, and moves that leave the prior as it was."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from jaxnn.search import splitting
from jaxnn.search.splitting import Form, Particles, Problem, move_to_level, next_level

SIZE, COUNT, MOVES = 3, 6_000, np.int32(4)
KINDS: dict[str | None, Any] = {
    "normal": stats.norm(),
    "uniform": stats.uniform(-1, 2),
    None: stats.norm(),
}


def moved_below(kind):
    """Particles from the prior below a level, by rejection, before and after their moves."""
    rng = np.random.default_rng(5)
    drawn = KINDS[kind].rvs((10 * COUNT, SIZE), random_state=rng).astype(np.float32)
    losses = np.sum((drawn - 0.5) ** 2, axis=1)
    level = np.quantile(losses, 0.3).astype(np.float32)
    here = Particles(drawn[losses <= level][:COUNT], losses[losses <= level][:COUNT])
    problem = Problem(
        Partial(lambda params, batch: jnp.sum((params - batch) ** 2)),
        Partial(lambda key: jax.random.normal(key, (SIZE,))),
        None if kind is None else Partial(lambda draws: draws),
        jnp.float32(0.5),
    )
    form = Form(kind, SIZE, COUNT)
    there, moves = move_to_level(problem, jax.random.key(3), here, level, MOVES, form=form)
    return here, Particles(*map(np.asarray, there)), moves, level


def likelihood(before, after):
    """How likely two samples of one distribution differ by as much."""
    test: Any = stats.ks_2samp(before, after)
    return test.pvalue


def check_prior(kind):
    """Particles from the prior below a level move far, and are such particles afterwards."""
    here, there, moves, level = moved_below(kind)
    assert np.all(there.loss <= level)
    np.testing.assert_allclose(there.loss, np.sum((there.coordinates - 0.5) ** 2, 1), rtol=1e-5)
    known = {tuple(each) for each in here.coordinates.tolist()}
    kept = np.mean([tuple(each) in known for each in there.coordinates.tolist()])
    assert kept < (0.05 if kind else 0.5)
    for before, after in zip(here.coordinates.T, there.coordinates.T, strict=True):
        assert likelihood(before, after) > 1e-4
    assert likelihood(here.loss, there.loss) > 1e-4
    if kind:
        # Each move of a slice finds a point, after few tries.
        assert moves.acceptance > 0.999
        assert 4 * COUNT < moves.num_evaluations < 40 * COUNT
    else:
        assert 0.1 < moves.acceptance < 0.9
        assert moves.num_evaluations == 4 * splitting.REDRAWS * COUNT


@pytest.mark.parametrize("kind", [pytest.param("normal", marks=pytest.mark.slow), "uniform", None])
def test_moves_leave_the_prior_below_the_level_as_it_was(kind):
    check_prior(kind)


def off_the_ellipse(here, fresh, angle):
    return here * (1 - jnp.abs(jnp.sin(angle))) + fresh * jnp.sin(angle)


def into_the_walls(here, fresh, angle):
    return jnp.clip(here + fresh * angle, -1, 1)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        pytest.param("normal", off_the_ellipse, marks=pytest.mark.slow),
        ("uniform", into_the_walls),
    ],
)
def test_a_path_that_does_not_keep_the_prior_is_found(kind, path, monkeypatch):
    wrong = splitting.KERNELS[kind]._replace(path=path)
    monkeypatch.setitem(splitting.KERNELS, kind, wrong)
    with pytest.raises(AssertionError):
        check_prior(kind)


def test_copies_are_of_particles_that_reach_the_level_and_of_all_equally():
    problem = Problem(Partial(lambda p, _: p[0]), Partial(jax.random.normal), Partial(jnp.abs), 0)
    here = Particles(np.arange(10, dtype=np.float32)[:, None], np.arange(10, dtype=np.float32))
    key, form = jax.random.key(0), Form("normal", 1, 10)
    there, moves = move_to_level(problem, key, here, np.float32(3), np.int32(0), form=form)
    counts = Counter(np.asarray(there.loss).tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert sorted(counts.values()) == [2, 2, 3, 3]
    assert moves.num_evaluations == 0


@pytest.mark.parametrize(
    ("losses", "asked", "level"),
    [
        ([4, 1, 3, 2], 0, np.nextafter(np.float32(3), np.float32(0))),
        ([4, 1, 3, 2], 3.5, 3.5),
        ([4, 1, 3, 2], 3, 3),
        ([2, 2, 2, 1], 0, np.nextafter(np.float32(2), np.float32(0))),
        ([2, 2, 2, 2], -1, np.nextafter(np.float32(2), np.float32(0))),
        ([1, 2, np.inf, np.inf], 0, np.finfo(np.float32).max),
    ],
)
def test_a_level_lies_below_the_median_or_is_the_one_asked_for(losses, asked, level):
    assert next_level(np.array(losses, np.float32), asked) == level
