"""The kinds of keys that jaxnn takes and that the JAX at hand has: 0.10.1 has no philox."""

import jax

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
