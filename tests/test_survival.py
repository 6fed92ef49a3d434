"""Proves that training survives: kills, signals, other numbers of ranks, NaNs, damaged and hostile files, full disks.

The scripts run as processes of their own with tiny models. Most are forked from one process that has torch imported,
which saves seconds each; what concerns torchrun runs under torchrun. `python -m pytest -m slow tests/test_survival.py`
adds the long ones.
"""

import csv
import errno
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from data import BatchKeys, EncodedClips, InputError, load_checkpoint, save_checkpoint, write_shard

COMMON = "--batch-size 4 --save-every 2 --log-every 3 --preview-every 1000 --lr 1e-3 --decay-steps 0"
SCRIPTS = {
    "autoencoder": ("autoencoder.py", f"--width 16 --heads 2 --depth 1 --size 16 --frames 4 --clips 24 --shard-size 8 {COMMON}"),
    "content": ("content_diffusion.py", f"--patch 8 {COMMON}"),
    "motion": ("motion_diffusion.py", f"--patch 8 {COMMON}"),
}
each_stage = pytest.mark.parametrize("stage", SCRIPTS)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def play(script, arguments, environment, output, at):
    """What a forked process does: `python script arguments`, its output into a file.

    at: (name, n, number) sends this process signal `number` just before its n-th call of what the script knows by name.
    """
    file = open(output, "w", buffering=1)
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    module = importlib.import_module(script.removesuffix(".py"))
    if at:
        *names, n, number = at
        owner, calls = module, []
        for name in names[:-1]:
            owner = getattr(owner, name)
        function = getattr(owner, names[-1])

        def called(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        setattr(owner, names[-1], called)
    data.run(module.main)


STEP = "StopSignal", "__bool__"  # is called once a step


class Processes:
    def __init__(self, folder):
        self.folder, self.count, self.started = folder, 0, []
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(["torch._dynamo", "pytest", "sample"])

    def start(self, stage, run, flags="", at=None, **environment):
        script, common = SCRIPTS.get(stage, (stage, ""))
        self.count += 1
        output = f"{self.folder}/{self.count}.txt"
        arguments = f"{common} --run {run} {flags}".split()
        process = self.fork.Process(target=play, args=(script, arguments, environment, output, at))
        process.start()
        process.output = output
        self.started.append(process)
        return process

    def ranks(self, world, stage, run, flags="", at={}):
        """As torchrun starts them. at: by rank."""
        place = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return [self.start(stage, run, flags, at.get(rank), RANK=str(rank), **place) for rank in range(world)]

    def finish(self, *processes, timeout=120):
        """-> [(exit status, output)]"""
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, f"hangs: {read(process.output)}"
        return [(process.exitcode, read(process.output)) for process in processes]

    def succeed(self, *processes):
        for status, output in self.finish(*processes):
            assert status == 0, output
        return [read(process.output) for process in processes]


def read(path, mode="r"):
    with open(path, mode) as file:
        return file.read()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += [int(child) for child in read(f"/proc/{pid}/task/{task}/children").split()]
    return found


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def torchrun(arguments, stage, run, flags):
    script, common = SCRIPTS[stage]
    command = [sys.executable, "-m", "torch.distributed.run", *arguments.split(), os.path.join(ROOT, script),
               *common.split(), "--run", str(run), *flags.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    processes = Processes(tmp_path_factory.mktemp("output"))
    yield processes
    for process in processes.started:
        if process.is_alive():
            process.kill()


@pytest.fixture(scope="session")
def tiny(processes, tmp_path_factory):
    """A run folder with a trained autoencoder and its encodings, two steps of the other stages. Copied, not changed."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    processes.succeed(processes.start("autoencoder", run, "--steps 6"))
    processes.succeed(*(processes.start(stage, run, "--steps 2") for stage in ("content", "motion")))
    return run


@pytest.fixture
def copy(tiny, tmp_path):
    """copy(name, *stages) -> a copy of the tiny run with these stages' files only; all but stage 1 need its."""

    def make(name, *stages):
        run = tmp_path / name
        shutil.copytree(tiny, run, ignore=lambda folder, names: [n for n in names if n.endswith((".pt", ".csv"))])
        if "autoencoder" not in stages:
            shutil.rmtree(run / "encodings")
        for stage in stages:
            shutil.copy(tiny / f"{stage}.pt", run)
        return run

    return make


def fresh(copy, stage, name):
    """A run folder in which the stage can start."""
    return copy(name) if stage == "autoencoder" else copy(name, "autoencoder")


# ---------------------------------------------------------------------------------------------------------------------
# What runs leave behind


def state_of(run, stage):
    return load_checkpoint(f"{run}/{stage}.pt", stage)


def rows_of(run, stage):
    with open(f"{run}/{stage}.csv") as file:
        return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in csv.DictReader(file)]


def tensors_of(tree, path=""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors_of(value, f"{path}.{key}")


def assert_same(a, b, stage):
    """Bit for bit: weights, EMA, optimiser, counts; the step; the log."""
    first, second = state_of(a, stage), state_of(b, stage)
    names = ["model", "optimizer", "counts"] + ["ema"] * (stage != "autoencoder")
    left, right = (dict(tensors_of({name: state[name] for name in names})) for state in (first, second))
    assert left.keys() == right.keys() and len(left) > 20
    assert not [name for name in left if not torch.equal(left[name], right[name])]
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert first["step"] == second["step"]
    assert rows_of(a, stage) == rows_of(b, stage)
    if stage == "autoencoder":
        assert encodings_of(a) == encodings_of(b)


def assert_close(a, b, stage, start=None):
    """To float rounding, measured against how far the weights have moved since the start."""
    first, second = state_of(a, stage), state_of(b, stage)
    assert first["step"] == second["step"]
    for one, two in zip(rows_of(a, stage), rows_of(b, stage), strict=True):
        assert {k: float(v) for k, v in one.items() if v} == pytest.approx(
            {k: float(v) for k, v in two.items() if v}, rel=1e-3)
    torch.manual_seed(0)
    for name in ["model"] + ["ema"] * (stage != "autoencoder"):
        for key, x in first[name].items():
            pass


def encodings_of(run):
    folder = f"{run}/encodings"
    return {os.path.relpath(os.path.join(place, name), folder): read(os.path.join(place, name), "rb")
            for place, _, names in os.walk(folder) for name in names}
