"""Processes of their own, for tests that kill them or let them meet."""

import os
import subprocess
import sys


def start_program(*arguments, **environment):
    """A Python process that finds the modules of the tests."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
