"""Processes of their own, for tests that kill them or let them meet."""

import os
import signal
import subprocess
import sys
import time

import numpy as np

from jaxnn.run import checkpoint as checkpoints


def start_program(*arguments, **environment):
    """A Python process that finds the modules of the tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_at_random_moments(program, path, seconds, signum=signal.SIGKILL, times=20):
    """Runs a program so often, sends it a signal up to `seconds` after it says "ready", and
    returns how far its checkpoint had come each time."""
    rng, reached = np.random.default_rng(0), []
    for _ in range(times):
        running = start_program("-c", program)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, seconds))
        running.send_signal(signum)
        running.communicate()
        reached.append(checkpoints.load(path)[1]["next"] if path.exists() else 0)
    assert reached == sorted(reached)
    assert len(set(reached)) > 10
    return reached
