"""Puts the scripts and the tools on the path, so that the tests import them, and keeps the tests off the network."""

import atexit
import contextlib
import csv
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import socket
import sys
import threading
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tools")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each of pytest's workers, and for the scripts that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def load(run, stage):
    return torch.load(f"{run}/{stage}.pt", weights_only=True)


def rows_of(run, stage):
    with open(f"{run}/{stage}.csv") as file:
        return [*csv.DictReader(file)]


def free_port():
    """A port of this machine for torchrun. From 32768 on the system hands them out to any connection, in the moment
    between this call and torchrun's too."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def strike(name, what, *numbers):
    """At these calls, counted from 1, of the function of that dotted name this process gets signal `what`, or an error
    with "fail", or a result that is NaN with "nan"."""
    (owner, _, name), calls = name.rpartition("."), itertools.count(1)
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, name)

    def called(*args, **kwargs):
        now = next(calls) in numbers
        if now and what == "fail":
            raise RuntimeError("broken on purpose")
        if now and what != "nan":
            os.kill(os.getpid(), what)
        result = function(*args, **kwargs)
        return result * float("nan") if now and what == "nan" else result

    setattr(owner, name, called)


def play(arguments, environment, outputs, folder, at, ignored):
    """What a forked process does, in which torch is imported already: `python arguments` in a folder, or here, its
    output into two files."""
    os.chdir(folder or ".")
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    sys.argv = arguments
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of its own
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, signal.SIG_IGN if number in ignored else usual)  # also where the tests run under nohup
    for moment in at:
        strike(*moment)
    try:
        importlib.import_module(os.path.basename(arguments[0]).removesuffix(".py")).main()
    finally:
        atexit._run_exitfuncs()  # as at the end of a process of its own


class Processes:
    """Runs scripts in processes of their own, as a user would, but without the seconds of importing torch."""

    def __init__(self, folder):
        self.folder, self.count, self.started, self.alone = folder, itertools.count(), [], threading.Lock()
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(["torch._dynamo", "sample"])

    def start(self, *arguments, folder=None, at=(), ignored=(), **environment):
        """Starts `python arguments`. at: see strike. ignored: signals that it ignores, as nohup makes it do."""
        number = next(self.count)
        outputs = [self.folder / f"{number}-{name}.txt" for name in ("out", "err")]
        process = self.fork.Process(
            target=play, args=([*map(str, arguments)], os.environ | environment, outputs, folder, at, ignored))
        with self.alone:  # start() and join() read the exit codes of other threads' processes too; the second gets 255
            process.start()
        process.outputs = outputs
        self.started.append(process)
        return process

    def ranks(self, *commands, at={}):
        """Starts commands as torchrun would, one for each rank. at: by rank."""
        place = dict(WORLD_SIZE=str(len(commands)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return [self.start(*command, at=at.get(rank, ()), RANK=str(rank), LOCAL_RANK=str(rank), **place)
                for rank, command in enumerate(commands)]

    def finish(self, *processes):
        """Waits for them: a list of returncode, stdout and stderr of each."""
        results, outputs = [], [path for process in processes for path in process.outputs]
        for process in processes:
            seen, waits = None, 0  # on a busy machine a script is slow: as long as it writes anything, wait
            while not wait([process.sentinel], 60):
                before, seen = seen, [path.stat().st_size for path in outputs if path.exists()]
                waits = waits + 1 if before == seen else 0
                assert waits < 5, f"hangs: {process.outputs[1].read_text()}"
            with self.alone:
                returncode = process.exitcode
            results.append(SimpleNamespace(returncode=returncode, **{
                name: path.read_text() for name, path in zip(("stdout", "stderr"), process.outputs)}))
        return results


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    made = Processes(tmp_path_factory.mktemp("outputs"))
    yield made
    for process in made.started:
        if process.is_alive():
            process.kill()


@pytest.fixture(scope="session")
def script(processes):
    """script("sample.py", "--run-dir", path, ...) runs a script in a process of its own, and returns its returncode,
    stdout and stderr."""
    return lambda *arguments, **settings: processes.finish(processes.start(*arguments, **settings))[0]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path_factory):
    """refused("sample.py --run-dir runs/x", "runs/x") calls a script in this process: it must end with one line that
    holds these words, and leave every file and folder of the tests as it was."""

    def listing():
        return {path: path.lstat().st_mtime_ns for path in tmp_path_factory.getbasetemp().rglob("*")}

    def call(command, *words):
        before, arguments = listing(), command.split()
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(arguments[0].removesuffix(".py")).main()
        line, printed = caught.value.code, capsys.readouterr().err
        if line == 2:  # argparse's: the usage, then the line
            line, printed = printed.strip().splitlines()[-1], ""
        assert isinstance(line, str) and "\n" not in line and not printed, (line, printed)
        assert all(str(word) in line for word in words), line
        assert listing() == before, line

    return call
