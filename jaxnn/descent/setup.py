"""What a gradient descent is asked for: checked before it is compiled, named when saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.descent.kernel import Cut, Rules, update_of
from jaxnn.descent.replicas import Networks, per_network
from jaxnn.optim.optimizers import (
    EXTRA_ARGUMENTS,
    Each,
    Optimizer,
    check_optimizer,
    each,
    sgd,
)
from jaxnn.run.checks import (
    as_batch,
    as_count,
    as_devices,
    as_partial,
    as_real,
    check_concrete,
    check_like_params,
    check_value_and_grad,
    shapes_of,
)
from jaxnn.run.fingerprint import (
    as_metadata,
    fingerprint,
    function_metadata,
    key_metadata,
    settings_of,
)


def as_networks(
    num_networks: int | None, devices: Sequence[Any] | None, params: Any
) -> Networks | None:
    """How many networks, once all leaves of the params have that axis; None for one alone."""
    if num_networks is None:
        if devices is not None:
            raise ValueError("num_networks must be given with devices; got None")
        return None
    count = as_count("num_networks", num_networks, 1, 2**31 - 1)
    for path, leaf in tree_leaves_with_path(params):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"params must have a first axis of num_networks = {count} in every leaf; "
                f"got shape {leaf.shape} at params{keystr(path)}"
            )
    return Networks(count, tuple(as_devices(devices)))


def one_of(params: Any, networks: Networks | None) -> Any:
    """The params of one network: of the first, where there are several."""
    return params if networks is None else jax.tree.map(lambda leaf: leaf[0], params)


def as_optimizer(
    learning_rate: Any, optimizer: Optimizer | Each | None, networks: Networks | None
) -> Optimizer:
    """The optimizer, of `Partial`s; with a first axis of networks where there are several."""
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise ValueError(f"give either learning_rate or optimizer; got {given}")
    if optimizer is None:
        check_concrete("learning_rate", learning_rate)
        if networks is None or np.ndim(learning_rate) == 0:
            optimizer = sgd(learning_rate)
        else:
            optimizer = each(sgd, _as_rates(learning_rate, networks.count))
    if isinstance(optimizer, Each):
        return per_network(optimizer, _count_of(optimizer, networks))
    check_optimizer(optimizer)
    init = as_partial("optimizer.init", optimizer.init)
    chosen = Optimizer(init, as_partial("optimizer.update", optimizer.update))
    return chosen if networks is None else per_network(chosen, networks.count)


def _count_of(optimizer: Each, networks: Networks | None) -> int:
    """How many networks have an optimizer of their own: all that there are."""
    length = jax.tree.leaves(optimizer.values)[0].shape[0]
    if networks is None:
        raise ValueError(
            f"num_networks must be given with optimizer=each(...), as num_networks={length}, with "
            "params that have a first axis of networks; got None"
        )
    if length != networks.count:
        raise ValueError(
            f"optimizer must have values for each of the {networks.count} networks; "
            f"got each(...) of {length}"
        )
    return length


def _as_rates(learning_rate: Any, count: int) -> jax.Array:
    """A learning rate for each network."""
    if np.shape(learning_rate) != (count,):
        raise ValueError(
            f"learning_rate must be a number, or one for each of the {count} networks; "
            f"got shape {np.shape(learning_rate)}"
        )
    return jnp.asarray([as_real("learning_rate", rate) for rate in np.asarray(learning_rate)])


def check_update(
    optimizer: Optimizer, function: Partial, params: Any, batch: Any, loss_dtype: Any
) -> None:
    """Refuses an optimizer, of one network, whose updates or state are not like those it got."""
    state = shapes_of("optimizer.init", cast(Partial, optimizer.init), params)
    loss = jax.ShapeDtypeStruct((), loss_dtype)
    given = optimizer, function, batch, loss, params, state, params
    try:
        results = shapes_of("optimizer.update", Partial(update_of), *given)
    except Exception as error:
        error.add_note(f"Its extra arguments can be {', '.join(EXTRA_ARGUMENTS)}.")
        raise
    if not (isinstance(results, tuple) and len(results) == 2):
        raise TypeError(
            f"optimizer.update must return (updates, state); got a {type(results).__name__}"
        )
    check_like_params("optimizer.update", "updates", results[0], params)
    _check_like_state(results[1], state)


def _check_like_state(got: Any, state: Any) -> None:
    """Refuses a state that cannot take the place of the one before."""
    wanted = "optimizer.update must return a state like that of optimizer.init"
    if jax.tree.structure(got) != jax.tree.structure(state):
        raise TypeError(f"{wanted}, {jax.tree.structure(state)}; got {jax.tree.structure(got)}")
    for (path, new), old in zip(tree_leaves_with_path(got), jax.tree.leaves(state), strict=True):
        if new.shape != old.shape or not _fits(new.dtype, old.dtype):
            raise TypeError(
                f"{wanted}; got {new.dtype} of shape {new.shape} for state{keystr(path)}, "
                f"{old.dtype} of shape {old.shape}"
            )


def _fits(dtype: Any, wanted: Any) -> bool:
    """Whether numbers of a dtype become the one wanted where both stand side by side."""
    if dtype == wanted or not (isinstance(dtype, np.dtype) and isinstance(wanted, np.dtype)):
        return dtype == wanted  # keys are of no NumPy dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, wanted) == wanted


def as_tolerance(name: str, value: float) -> Any:
    """A number of at least 0 that the host knows."""
    check_concrete(name, value)
    return as_real(name, value, inclusive=True)


def as_validation(
    validation_batch: Any, params: Any, value_and_grad_fn: Any, function: Partial
) -> Any:
    """The validation batch as arrays, once the function has taken it."""
    if validation_batch is None:
        return None
    try:
        arrays = as_batch(validation_batch, params, value_and_grad_fn)
        check_value_and_grad(function, params, arrays)
    except Exception as error:
        error.add_note("This came from validation_batch.")
        raise
    return arrays


def as_patience(patience: int | None, validation_batch: Any) -> np.uint32 | None:
    """Epochs to wait for a better loss on the validation batch."""
    if patience is None:
        return None
    if validation_batch is None:
        raise ValueError("validation_batch must be given with patience; got None")
    return np.uint32(as_count("patience", patience, 1, 2**32 - 1))


class Seen(NamedTuple):
    """Rows that each step of an epoch sees, of how many."""

    rows_of_steps: list[int]
    rows: int


def as_cut(batch: Any, batch_size: int | None, keeps: bool) -> tuple[Cut, Seen]:
    """How an epoch is cut; `batch` need have no rows if it is taken whole."""
    if batch_size is None:
        if keeps:
            raise ValueError("batch_size must be given with drop_remainder=False; got None")
        return Cut(None, 0, 1), Seen([1], 1)
    batch_size = as_count("batch_size", batch_size, minimum=1)
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "batch must have the same number of rows, at least 1, in every leaf to be cut by "
            f"batch_size; got shapes {shapes}"
        )
    rows = shapes[0][0]
    if batch_size >= rows:
        return Cut(None, 0, 1), Seen([1], 1)
    steps, rest = divmod(rows, batch_size)
    remainder = rest if keeps else 0
    sizes = [batch_size] * steps + [remainder] * (remainder > 0)
    return Cut(batch_size, remainder, len(sizes)), Seen(sizes, rows)


def facts_of(
    key: jax.Array,
    function: Partial,
    optimizer: Optimizer,
    params: Any,
    batch: Any,
    rules: Rules,
    cut: Cut,
    networks: Networks | None,
) -> dict[str, Any]:
    """What whoever goes on with this descent has to share."""
    one, chosen = one_of(params, networks), one_of(optimizer, networks)
    init, update = cast(Partial, chosen.init), cast(Partial, chosen.update)
    loss, _ = shapes_of("value_and_grad_fn", function, one, batch)
    state = shapes_of("optimizer.init", init, one)
    step = Partial(update_of), chosen, function, batch, loss, one, state, one
    steps = function_metadata("optimizer", *step)
    return {
        "trainer": "gradient_descent",
        **key_metadata(key),
        "num_networks": None if networks is None else networks.count,
        "networks a block": None if networks is None else networks.width,
        "batch_size": cut.rows_a_step,
        "drop_remainder": cut.remainder == 0,
        **{
            name: as_metadata(rule)
            for name, rule in rules._asdict().items()
            if name != "validation"
        },
        "params": fingerprint(params),
        "batch": fingerprint(batch),
        "validation_batch": fingerprint(rules.validation),
        "value_and_grad_fn": function_metadata(
            "value_and_grad_fn", function, one, batch, axes=None if networks is None else (0, None)
        ),
        "start of the optimizer": function_metadata("optimizer", init, one),
        "optimizer": {**steps, "settings": settings_of(update)},
        "numbers of the optimizer": fingerprint(optimizer),
    }
