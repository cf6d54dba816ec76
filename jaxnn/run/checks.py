"""The border: bad input is refused here, by name, before anything is compiled.

Every function takes the argument's name and value, and returns the value in the one form
that the code behind the border uses. Messages say the name, what was wanted and what came.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.run.programs import program
from jaxnn.typing import Device, Function, PyTree, traits_of

KEY_IMPLEMENTATIONS = ("threefry2x32", "philox4x32")
NO_AUX = (
    ": return the loss alone, without has_aux; what else is computed, such as the statistics of "
    "a batch norm, is a function of params and batch to call afterwards"
)
CLASSES_OF_TEXT = "`classes, y = np.unique(labels, return_inverse=True)`"
Record = TypeVar("Record", bound=type)
_RECORDS: set[type] = set()


def array_record(record: Record) -> Record:
    """Mark a NamedTuple whose fields are arrays, so that `as_arrays` takes a list there as one."""
    _RECORDS.add(record)
    return record


def is_traced(value: object) -> TypeGuard[Tracer]:
    """Whether `value` is a stand-in inside `jit`, `vmap` or `grad`, without a value yet."""
    return isinstance(value, Tracer)


def as_key(name: str, key: object, *, traced: bool = False) -> jax.Array:
    """A single typed key, `jax.random.key(seed)`, of an implementation that maps under `vmap`.

    A tracer passes only where `traced` says so; it is checked in the same way.
    """
    wanted = "a single typed key, as jax.random.key(seed) returns it"
    if is_traced(key) and not traced:
        raise TypeError(f"{name} must be concrete; got a tracer: call this outside jit and vmap")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name} must be {wanted}; got {_describe(key)}")
    if key.shape:
        raise ValueError(f"{name} must be {wanted}; got keys of shape {key.shape}")
    implementation = str(jax.random.key_impl(key))
    if implementation not in KEY_IMPLEMENTATIONS:
        raise ValueError(
            f"{name} must be of implementation {' or '.join(KEY_IMPLEMENTATIONS)}; "
            f"got {implementation}, whose draws are not independent under vmap"
        )
    return key


def as_count(name: str, value: object, minimum: int = 0, maximum: int = 2**63) -> int:
    """A Python int in `[minimum, maximum]`; whole floats such as 1e5 pass, bools do not."""
    wanted = f"an integer of at least {minimum}"
    if is_traced(value) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be {wanted}; got {_describe(value)}")
    try:
        count = operator.index(_whole(value))
    except TypeError:
        raise TypeError(f"{name} must be {wanted}; got {_describe(value)}") from None
    if not minimum <= count <= maximum:
        bound = wanted if count < minimum else f"at most {maximum}"
        raise ValueError(f"{name} must be {bound}; got {count}")
    return count


def _whole(value: object) -> Any:
    """Return a whole float as an int, unless it is so large that rounding may have changed it."""
    if not isinstance(value, (float, np.floating, np.ndarray, jax.Array)):
        return value
    number = np.asarray(value)
    if number.ndim or number.dtype.kind != "f":
        return value
    is_exact = abs(number) <= 2.0 ** (np.finfo(number.dtype).nmant + 1)
    return int(number) if is_exact and number == np.trunc(number) else value


def as_real(
    name: str, value: Any, *, minimum: float = 0.0, inclusive: bool = False
) -> np.float32 | jax.Array:
    """A finite float32 above `minimum`; a traced number passes, so that sweeps compile once."""
    wanted = f"a finite number {'of at least' if inclusive else 'above'} {minimum:g}"
    if is_traced(value):
        if value.shape:
            raise TypeError(f"{name} must be {wanted}; got a tracer of shape {value.shape}")
        return jnp.asarray(value, jnp.float32)
    if isinstance(value, (bool, np.bool_, str, bytes)) or np.ndim(value) != 0:
        raise TypeError(f"{name} must be {wanted}; got {_describe(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {wanted}; got {_describe(value)}") from None
    except OverflowError:
        number = math.inf
    with np.errstate(over="ignore", under="ignore"):
        as_float32 = np.float32(number)
    inside = as_float32 >= minimum if inclusive else as_float32 > minimum
    if not (inside and np.isfinite(as_float32)):
        raise ValueError(f"{name} must be {wanted} that fits float32; got {number!r}")
    return as_float32


def as_devices(devices: Sequence[Device] | None) -> Sequence[Device]:
    """Where to work: all local devices, unless told otherwise."""
    chosen = jax.local_devices() if devices is None else list(devices)
    if not chosen:
        raise ValueError("devices must hold at least one device; got none")
    for device in chosen:
        if not hasattr(device, "platform"):
            raise TypeError(f"devices must hold devices of jax.devices(); got {device!r}")
    return chosen


def as_flag(name: str, value: object) -> bool:
    """A bool, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def as_choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of the given words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {_words(options)}; got {_describe(value)}")
    if value not in options:
        raise ValueError(f"{name} must be one of {_words(options)}; got {value!r}")
    return value


def as_numpy(name: str, value: object) -> np.ndarray:
    """Return a real NumPy array in the machine's byte order; refuse text, objects and complex.

    Lists, JAX arrays and pandas frames pass. A long double becomes a float64, if it fits.
    """
    if np.ma.is_masked(value):
        raise ValueError(f"{name} must have no masked entries; got {np.ma.count_masked(value)}")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array of numbers; got ragged rows") from None
    except TypeError:
        raise TypeError(
            f"{name} must be an array of real numbers; got {_describe(value)}"
        ) from None
    if array.dtype.kind not in "biuf":
        is_text = any(isinstance(entry, (str, bytes)) for entry in array.ravel().tolist())
        is_mixed = array.dtype == object and array.ndim == 2
        if not is_text:
            hint = ": .astype(float) converts a frame of mixed columns" if is_mixed else ""
        elif name.startswith("params"):
            hint = ": settings belong in the loss, for example by functools.partial"
        elif array.ndim == 2 and not name.endswith(".y"):
            hint = ": leave out columns of text, or give them numbers"
        else:
            hint = f": {CLASSES_OF_TEXT} turns labels into classes"
        raise TypeError(f"{name} must be an array of real numbers; got dtype {array.dtype}{hint}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return _narrowed(name, array, np.dtype(np.float64))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def as_values(name: str, value: object) -> np.ndarray | jax.Array:
    """Return a real array that JAX can hold: a JAX array itself, or NumPy data that fit."""
    if not isinstance(value, jax.Array):
        array = as_numpy(name, value)
        _fit(name, array)
        return array
    if getattr(value.dtype, "kind", "O") not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers; got dtype {value.dtype}")
    return value


def as_arrays(name: str, tree: PyTree) -> PyTree:
    """A copy of a pytree, as JAX arrays of the default widths, refusing what does not fit.

    NumPy float64 becomes float32 and int64 becomes int32 unless JAX's x64 mode is on. Values
    that would overflow are an error that names the leaf. The copy shares no memory with the
    caller's arrays, so changing those later changes nothing here.

    Lists are containers, as in every pytree. Only in the fields of an `array_record`, such as
    `Batch`, a list or a tuple of numbers is an array.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, node: _as_node(name + keystr(path), node),
        tree,
        is_leaf=_is_record,
    )


def _is_record(node: object) -> bool:
    return type(node) in _RECORDS


def _as_node(name: str, node: PyTree) -> PyTree:
    if not _is_record(node):
        return _as_array(name, node)
    fields = node._asdict().items()
    return type(node)(
        **{
            field: (_as_array if _is_array(value) else as_arrays)(f"{name}.{field}", value)
            for field, value in fields
        }
    )


def _is_array(value: PyTree) -> bool:
    """Whether the value of a record's field is an array, although JAX sees a container."""
    if type(value) is not tuple:
        return isinstance(value, list)
    leaves = jax.tree.leaves(value)
    return bool(leaves) and not any(np.ndim(leaf) for leaf in leaves)


def _as_array(name: str, leaf: PyTree) -> jax.Array:
    if is_traced(leaf):
        raise TypeError(f"{name} must be concrete; got a tracer: call this outside jit and vmap")
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        copy = jnp.array(leaf, dtype=leaf.dtype, copy=True)
    else:
        copy = jnp.array(_fit(name, as_numpy(name, leaf)), copy=True)
    if is_traced(copy):  # Under jit every operation is traced, also of values that are known.
        raise TypeError(f"{name} must be given outside jit: a trainer compiles its own programs")
    return copy


def _fit(name: str, array: np.ndarray) -> np.ndarray:
    """The array in the width that JAX gives it; values that do not fit are an error."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    if array.dtype.kind == "f":
        return _narrowed(name, array, dtype)
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name} must fit {dtype}; got {array.min()} to {array.max()}")
    return array.astype(dtype)


def _narrowed(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the floats in a smaller width; magnitudes beyond it are an error."""
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(converted)
    if np.any(lost):
        raise ValueError(
            f"{name} must fit {dtype}; got magnitudes up to {abs(array[lost]).max()!s}"
        )
    return converted


def _words(options: Sequence[str]) -> str:
    return ", ".join(repr(option) for option in options)


def _describe(value: PyTree) -> str:
    if is_traced(value):
        return "a tracer: call this outside jit and vmap"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of dtype {value.dtype} and shape {value.shape}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r} ({type(value).__name__})"
    return f"a {type(value).__name__}"


def as_partial(name: str, function: object) -> Partial:
    """The callable as a `Partial`, a pytree that can be an argument of a compiled function."""
    if not callable(function):
        raise TypeError(f"{name} must be callable; got a {type(function).__name__}")
    check_concrete(name, function)
    return function if isinstance(function, Partial) else Partial(function)


def as_optional(name: str, function: object) -> Partial | None:
    """The same, of a callable that may be left out."""
    return None if function is None else as_partial(name, function)


def check_concrete(name: str, value: PyTree) -> None:
    """Refuses a number, or a `Partial` with a number, that has no value yet: the host needs it."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be concrete; got a tracer: call this outside jit and vmap")


def shapes_of(name: str, function: Partial, *arguments: PyTree) -> PyTree:
    """Shapes and dtypes of a function's result; traced once for the same function and shapes.

    An error of the function's own goes through, with a note that says which function it was.
    """
    try:
        return call.eval_shape(function, *arguments)
    except Exception as error:
        given = ", ".join(_describe(argument) for argument in arguments)
        error.add_note(f"This came from tracing {name}, which was given {given}.")
        raise


def drawn_shapes(sample: Partial, key: jax.Array) -> PyTree:
    """What a sampler draws, as shapes; at least one array."""
    shapes = shapes_of("sample_fn", sample, key)
    if not jax.tree.leaves(shapes):
        raise TypeError(f"sample_fn must return params, a tree of arrays; got {shapes}")
    return shapes


@program(keep_unused=True)
def call(function: Partial, *arguments: PyTree) -> PyTree:
    """Calls a function, under `jit`."""
    return function(*arguments)


def as_batch(batch: PyTree, params: PyTree, *functions: Function | None) -> PyTree:
    """The batch as fresh JAX arrays, once each function's own `validate` has let it pass.

    Lists are containers, as in every pytree; only in the fields of a `Batch` they are arrays.
    """
    for function in functions:
        traits_of(function).validate(params, batch)
    return as_arrays("batch", batch)


def as_params(params: PyTree) -> PyTree:
    """Params as fresh JAX arrays; every leaf a float of one dtype.

    NumPy's float64 is rounded to float32 unless JAX's x64 mode is on. Lists are containers, as in
    every pytree; only in the fields of a `Dense` they are arrays.
    """
    arrays = as_arrays("params", params)
    check_floats(arrays)
    return arrays


def check_floats(params: PyTree) -> None:
    """Refuses params, which may be traced, that are not floats of one dtype."""
    leaves = tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params must hold at least one array; got an empty tree")
    for path, leaf in leaves:
        if leaf.dtype != leaves[0][1].dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floats of one dtype; got {leaf.dtype} at params{keystr(path)}: "
                "jax.tree.map(jnp.float32, params) converts them; or are params and batch in the "
                "wrong order?"
            )


def check_scalar(name: str, value: PyTree) -> None:
    """Refuses a function's result, as `jax.eval_shape` tells it, that is not a float scalar."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        hint = NO_AUX if isinstance(value, tuple) else ""
        raise TypeError(f"{name} must return a float scalar; got a {type(value).__name__}{hint}")
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a float scalar; got {value.dtype} of shape {value.shape}"
        )


def check_value_and_grad(function: Partial, params: PyTree, batch: PyTree) -> np.dtype:
    """Refuses results that are no loss and gradient like the params; returns the loss's dtype."""
    return check_loss_and_gradients(shapes_of("value_and_grad_fn", function, params, batch), params)


def check_loss_and_gradients(results: PyTree, params: PyTree) -> np.dtype:
    """The same of what the function returned, or of its shapes."""
    wanted = "(loss, gradients), as jax.value_and_grad(loss_fn) does"
    if jax.tree.structure(results) == jax.tree.structure(params):
        came = "one number" if getattr(results, "shape", None) == () else "gradients alone"
        raise TypeError(f"value_and_grad_fn must return {wanted}; got {came}")
    if not (isinstance(results, tuple) and len(results) == 2):
        raise TypeError(f"value_and_grad_fn must return {wanted}; got {_describe(results)}")
    check_scalar("value_and_grad_fn", results[0])
    check_like("value_and_grad_fn", "gradients", results[1], params)
    return results[0].dtype


def check_like(name: str, what: str, got: PyTree, wanted: PyTree, like: str = "params") -> None:
    """Refuses a result whose tree, shapes or dtypes are not those wanted, which `like` names."""
    if jax.tree.structure(got) != jax.tree.structure(wanted):
        raise TypeError(
            f"{name} must return {what} with the tree of {like}, "
            f"{jax.tree.structure(wanted)}; got {jax.tree.structure(got)}"
        )
    pairs = zip(tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, found), leaf in pairs:
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise TypeError(
                f"{name} must return {what} like {like}; got {found.dtype} of shape "
                f"{found.shape} where {like}{keystr(path)} is {leaf.dtype} of shape {leaf.shape}"
            )
