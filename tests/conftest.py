"""Hostile settings for every test: CPU, strict dtype promotion, no rank promotion."""

import functools
import gc
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jax import monitoring
from xdist.scheduler import LoadFileScheduling

# Traces and programs make many objects that live long: at Python's own threshold, looking for
# cycles among them takes a tenth of the time of all tests.
gc.set_threshold(200_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """Keep compiled programs in pytest's cache, so that the next run does not compile them."""
    if cache := getattr(config, "cache", None):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def _no_figures_left():
    """Leave no figure of matplotlib to the next file of the same process."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


class BySetups(LoadFileScheduling):
    """Give files that share set-ups to one process, which compiles their programs once."""

    def _split_scope(self, nodeid):
        return self._setups_of(nodeid.split("::")[0])

    @functools.cache  # noqa: B019
    def _setups_of(self, file):
        text = Path(self.config.rootpath, file).read_text()
        found = re.search(r"^from (\w+_setups) import", text, re.MULTILINE)
        return found[1] if found else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return BySetups(config, log)


@pytest.fixture
def compilations():
    """A list that grows with whatever JAX traces, lowers or compiles."""
    events = []

    def listen(event, duration_secs, **_):
        if event.startswith("/jax/core/compile"):
            events.append((event, duration_secs))

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.unregister_event_duration_listener(listen)
