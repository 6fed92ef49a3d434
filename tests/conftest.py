"""Puts the scripts and the tools on the path, so that the tests import them, and keeps the tests off the network."""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import socket
import sys
import threading
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each of pytest's workers, and for the scripts that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port():
    """A port of this machine for torchrun. From 32768 on the system hands them out to any connection, in the moment
    between this call and torchrun's too."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def play(arguments, environment, outputs, folder):
    """What a forked process does, in which torch is imported already: `python arguments` in a folder, or here, its
    output into two files."""
    import data
    os.chdir(folder or ".")
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    sys.argv = arguments
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of its own
    data.launch(importlib.import_module(os.path.basename(arguments[0]).removesuffix(".py")).main)


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("sample.py", "--run-dir", path, ...) runs a script in a process of its own, as a user would, but without
    the seconds of importing torch, and returns its returncode, stdout and stderr."""
    outcomes, count, alone = tmp_path_factory.mktemp("outputs"), itertools.count(), threading.Lock()
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch._dynamo", "sample", "fvd"])

    def call(*arguments, folder=None):
        number = next(count)
        outputs = [outcomes / f"{number}-{name}.txt" for name in ("out", "err")]
        process = fork.Process(target=play, args=([*map(str, arguments)], dict(os.environ), outputs, folder))
        with alone:  # start() and join() read the exit codes of other threads' processes too; who comes second gets 255
            process.start()
        assert wait([process.sentinel], 300), f"hangs: {outputs[1].read_text()}"
        with alone:
            returncode = process.exitcode
        return SimpleNamespace(returncode=returncode, **{
            name: path.read_text() for name, path in zip(("stdout", "stderr"), outputs)})

    return call
