"""Timing programs in turns, and the machine that they ran on."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

MISSING = "not installed"
PACKAGES = (
    "numpy", "jax", "jaxlib", "torch", "evosax", "nevergrad", "pyperch", "mlrose-ky", "optax",
    "scikit-learn",
)  # fmt: skip

Search = Callable[[int], Any]
"""Does as much work as asked; returns its loss, or a tuple that begins with the loss."""


def seconds_of(search: Search, count: int) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    search(count)
    return time.perf_counter() - started


def timed_call(search: Search, count: int) -> tuple[float, float]:
    """Return the seconds of one call, and how many of them JAX traced, lowered or compiled."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        seconds = seconds_of(search, count)
    finally:
        monitoring.unregister_event_duration_listener(listen)
    compiling, end = 0.0, 0.0
    for begin, finish in sorted(spans):  # they nest, and overlap between threads
        compiling += max(finish - max(begin, end), 0)
        end = max(end, finish)
    return seconds, compiling


def matrix_product(side: int, precision: str = "highest") -> Search:
    """Return what multiplies a square float32 matrix with itself, as often as asked."""
    square = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
    multiply = jax.jit(lambda matrix: jnp.matmul(matrix, matrix, precision=precision))

    def search(count: int) -> None:
        for _ in range(count):  # one at a time: all at once would not fit an accelerator's memory
            jax.block_until_ready(multiply(square))

    return search


def take_turns(searches: Mapping[Any, tuple[Search, int]], repeats: int) -> dict[Any, np.ndarray]:
    """Return the units of work a second of every search in every round."""
    pairs = searches.values()
    rounds = [[n / seconds_of(search, n) for search, n in pairs] for _ in range(repeats)]
    return dict(zip(searches, np.array(rounds).T, strict=True))


def machine() -> dict[str, Any]:
    """Return what figures depend on: date, processor, cores, device and versions."""
    versions = {package.name: package.version for package in metadata.distributions()}
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: versions.get(name, MISSING) for name in PACKAGES},
    }
