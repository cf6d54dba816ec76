"""Losses that differ in one number, which each kind of callable holds in a place of its own."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def scaled(params, batch, c):
    return jnp.sum((params - c * batch) ** 2)


def by_keyword(params, batch, *, c):
    return scaled(params, batch, c)


def default(c):
    return lambda params, batch, c=c: scaled(params, batch, c)


def keyword_default(c):
    return lambda params, batch, *, c=c: scaled(params, batch, c)


class OfItsNumber:
    __slots__ = ()
    c: Any

    def __call__(self, params, batch):
        return scaled(params, batch, self.c)

    def method(self, params, batch):
        return self(params, batch)


class Plain(OfItsNumber):
    def __init__(self, c):
        self.c = c


class Slots(OfItsNumber):
    __slots__ = ("__weakref__", "c")

    def __init__(self, c):
        self.c = c


@dataclasses.dataclass
class Data(OfItsNumber):
    c: float


@dataclasses.dataclass(frozen=True)
class Frozen(OfItsNumber):
    c: float


def closure(value, number_of=lambda value: value):
    """A closure over a value of any type, from which the number is taken inside."""
    return lambda params, batch: scaled(params, batch, number_of(value))


def inner_default(c):
    return closure(lambda c=c: c, lambda inner: inner())


def attribute(c):
    def loss(params, batch):
        return scaled(params, batch, vars(loss)["c"])

    vars(loss)["c"] = c
    return loss


def body(c):
    return global_constant(1, f"{c} * SCALE")


def global_constant(c, expression="SCALE"):
    names = {"jnp": jnp, "SCALE": c}
    exec(f"def loss(params, batch): return jnp.sum((params - {expression} * batch) ** 2)", names)
    return names["loss"]


def custom_jvp(c):
    loss = jax.custom_jvp(closure(c))
    loss.defjvps(None, None)
    return loss


def own_vmap_rule(c):
    loss = jax.custom_batching.custom_vmap(lambda params, batch: jnp.sum(params))
    loss.def_vmap(lambda size, mapped, params, batch: (c * jnp.sum(params, axis=1), True))
    return loss


def calls_itself(c):
    def loss(params, batch):
        return jnp.sum(params) if c < 1 else c * calls_itself(c - 1)(params, batch)

    return loss


def vmapped(c):
    mapped = jax.vmap(lambda p, b: (p - c * b) ** 2)
    return lambda params, batch: jnp.sum(mapped(params, batch))


OBJECTS = {
    "default argument": default,
    "keyword default": keyword_default,
    "bound method": lambda c: Plain(c).method,
    "object": Plain,
    "object with slots": Slots,
    "dataclass": Data,
    "frozen dataclass": Frozen,
}
KINDS = {
    **OBJECTS,
    **{f"jit of {name}": lambda c, make=make: jax.jit(make(c)) for name, make in OBJECTS.items()
       if name != "dataclass"},  # which has no hash, and jit takes none such
    "jit of a partial, by place": lambda c: jax.jit(functools.partial(_c_first, c)),
    "jit of a partial, by keyword": lambda c: jax.jit(functools.partial(by_keyword, c=c)),
    "jit of a Partial": lambda c: jax.jit(Partial(by_keyword, c=c)),
    "attribute of an object": lambda c: closure(SimpleNamespace(c=c), lambda held: held.c),
    "object that is called": lambda c: closure(lambda: c, lambda held: held()),
    "range": lambda c: closure(range(c), len),
    "inner function with a default": inner_default,
    "attribute of a function": attribute,
    "module global": global_constant,
    "another body": body,
    "float": lambda c: closure(float(c)),
    "NumPy array": lambda c: closure(np.full(3, c, np.float32)),
    "JAX array": lambda c: closure(jnp.full(3, float(c))),
    "text": lambda c: closure(str(c), float),
    "key": lambda c: closure(jax.random.key(c), jax.random.uniform),
    "list": lambda c: closure([c], sum),
    "dict": lambda c: closure({"c": c}, lambda held: held["c"]),
    "partial": lambda c: functools.partial(by_keyword, c=c),
    "Partial": lambda c: Partial(by_keyword, c=float(c)),
    "jit": lambda c: jax.jit(closure(c)),
    "checkpoint": lambda c: jax.checkpoint(closure(c)),
    "custom_jvp": custom_jvp,
    "vmap": vmapped,
    "own vmap rule": own_vmap_rule,
    "calls itself": calls_itself,
    "value_and_grad": lambda c: lambda p, b: jax.value_and_grad(closure(c))(p, b)[0],
    "wraps": lambda c: functools.wraps(scaled)(closure(c)),
}  # fmt: skip


def _c_first(c, params, batch):
    return scaled(params, batch, c)
