"""The kinds of keys that the JAX at hand has, 0.10.1 no philox; and random numbers of a key."""

import jax
import numpy as np

from jaxnn.run import checks


def _is_known(implementation):
    try:
        jax.random.key(0, impl=implementation)
    except ValueError as error:
        if "unrecognized PRNG implementation" in str(error):
            return False
        raise
    return True


KEY_IMPLEMENTATIONS = [name for name in checks.KEY_IMPLEMENTATIONS if _is_known(name)]


def rng_of(key):
    """NumPy's random numbers of a key: JAX would compile every other way to draw some."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
