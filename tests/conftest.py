"""Puts the scripts and the tools on the path, so that the tests import them, and keeps the tests off the network."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each of pytest's workers, and for the scripts that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def script():
    """script("sample.py", "--run-dir", path, ...) runs a script as a user would and returns the finished process."""

    def call(*arguments, **options):
        command = [sys.executable, *map(str, arguments)]
        command[1] = os.path.join(ROOT, command[1])
        options = dict(capture_output=True, text=True, timeout=300) | options
        return subprocess.run(command, **options)

    return call
