"""The training tower: works on callables over any pytree; knows nothing of networks."""
