"""Taking turns at the same work, and telling of it: what the benchmarks share."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

MISSING = "not installed"
WORDS = ("net", "library", "data", "member", "method")
"""Columns of a table that hold words."""
PACKAGES = (
    "numpy", "jax", "torch", "evosax", "nevergrad", "pyperch", "mlrose-ky", "optax", "scikit-learn",
)  # fmt: skip

Search = Callable[[int], Any]
"""Does as much work as asked; returns the loss it came to, or a tuple that begins with it."""


def timed(search: Search, count: int) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    search(count)
    return time.perf_counter() - started


def take_turns(searches: Mapping[Any, tuple[Search, int]], repeats: int) -> dict[Any, np.ndarray]:
    """Units of work a second of every search in every round."""
    pairs = searches.values()
    rounds = [[count / timed(search, count) for search, count in pairs] for _ in range(repeats)]
    return dict(zip(searches, np.array(rounds).T, strict=True))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {package.name: package.version for package in metadata.distributions()}
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "jax backend": jax.default_backend(),
        "python": platform.python_version(),
        **{name: versions.get(name, MISSING) for name in PACKAGES},
    }


def table(rows: Sequence[dict[str, Any]], markdown: bool) -> str:
    """Rows under the header of the longest; words flushed left, numbers right."""
    header = list(max(rows, key=len))

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, int) or value >= 100:
            return f"{value:,.0f}"
        return f"{value:.{2 if value >= 10 else 3}f}"

    lines = [header, *([cell(row.get(name, "")) for name in header] for row in rows)]
    if markdown:
        lines.insert(1, ["---" if name in WORDS else "---:" for name in header])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust if name in WORDS else str.rjust for name in header]
    lines = [[p(c, w) for p, c, w in zip(pads, line, widths, strict=True)] for line in lines]
    return "\n".join(
        f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines
    )
