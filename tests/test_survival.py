"""Proves that training survives: kills, signals, other numbers of ranks, NaNs, damaged and hostile files, full disks.

The scripts run as processes of their own with tiny models. Most are forked from one process that has torch imported,
which saves seconds each; what concerns torchrun runs under torchrun. `python -m pytest -m slow tests/test_survival.py`
adds the long ones.
"""

import csv
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, free_port

import content_diffusion
import data
from data import EncodedClips, InputError, batch_keys, load_checkpoint, open_shard, save_checkpoint, write_shard

COMMON = "--batch-size 4 --save-every 2 --log-every 3 --preview-every 1000 --lr 1e-3 --decay-steps 0"
SCRIPTS = {
    "autoencoder": ("autoencoder.py",
                    f"--width 16 --heads 2 --depth 1 --size 16 --frames 4 --clips 24 --shard-size 8 {COMMON}"),
    "content": ("content_diffusion.py", f"--patch 8 {COMMON}"),
    "motion": ("motion_diffusion.py", f"--patch 8 {COMMON}"),
}
each_stage = pytest.mark.parametrize("stage", SCRIPTS)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def play(script, arguments, environment, output, at, own_group):
    """What a forked process does: `python script arguments`, its output into a file.

    at: (name, n, number) sends this process signal `number` just before its n-th call of what the script knows by name.
    """
    if own_group:
        os.setpgrp()
    file = open(output, "w", buffering=1)
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    os.environ.update(environment)
    data.RANK, data.WORLD = (int(environment.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    sys.argv = [script, *arguments]
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process of its own
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
    data.launch(module.main)


STEP = "data", "Progress", "stopping"  # is called once a step


class Processes:
    def __init__(self, folder):
        self.folder, self.count, self.started = folder, 0, []
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(["torch._dynamo", "pytest", "sample"])

    def start(self, stage, run, flags="", at=None, own_group=False, **environment):
        script, common = SCRIPTS.get(stage, (stage, ""))
        self.count += 1
        output = f"{self.folder}/{self.count}.txt"
        arguments = f"{common} --run-dir {run} {flags}".split()
        process = self.fork.Process(target=play, args=(script, arguments, environment, output, at, own_group))
        process.start()
        process.output = output
        self.started.append(process)
        return process

    def ranks(self, world, stage, run, flags="", at={}):
        """As torchrun starts them. at: by rank. run: of all, or a list with one for each."""
        place = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        runs = run if isinstance(run, list) else [run] * world
        return [self.start(stage, runs[rank], flags, at.get(rank), RANK=str(rank), **place) for rank in range(world)]

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
               *common.split(), "--run-dir", str(run), *flags.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def outputs_of(*agents):
    try:
        return [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            for pid in [agent.pid, *children(agent.pid)] if agent.poll() is None else ():
                os.kill(pid, signal.SIGKILL)


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
    """Bit for bit: weights, EMA, optimiser; the step; the log."""
    first, second = state_of(a, stage), state_of(b, stage)
    names = ["model", "optimizer"] + ["ema"] * (stage != "autoencoder")
    left, right = (dict(tensors_of({name: state[name] for name in names})) for state in (first, second))
    assert left.keys() == right.keys() and len(left) > 20
    assert not [name for name in left if not torch.equal(left[name], right[name])]
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert first["step"] == second["step"]
    assert rows_of(a, stage) == rows_of(b, stage)
    assert [state["progress"]["loss_sum"] for state in (first, second)] == [first["progress"]["loss_sum"]] * 2
    if stage == "autoencoder":
        assert encodings_of(a) == encodings_of(b)


def assert_close(a, b, stage):
    """To float rounding: far less than one step's lr of 1e-3 everywhere. Adam makes of rounding a little more where the
    gradient is zero in theory (a bias before a softmax)."""
    first, second = state_of(a, stage), state_of(b, stage)
    assert first["step"] == second["step"]
    for name in ["model"] + ["ema"] * (stage != "autoencoder"):
        apart = torch.cat([(first[name][key] - second[name][key]).abs().flatten() for key in first[name]
                           if key not in ("motion_mean", "motion_std")])
        assert apart.max() < 1e-4 and apart.mean() < 1e-6, (apart.max(), apart.mean())
    for one, two in zip(rows_of(a, stage), rows_of(b, stage), strict=True):
        one, two = ({k: float(v) for k, v in row.items() if v} for row in (one, two))
        assert one == pytest.approx(two, rel=1e-3)


def encodings_of(run):
    folder = f"{run}/encodings"
    return {os.path.relpath(os.path.join(place, name), folder): read(os.path.join(place, name), "rb")
            for place, _, names in os.walk(folder) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Exact resume


@pytest.fixture(scope="session")
def stories(processes, tiny, tmp_path_factory):
    """stories(stage) -> eight steps unbroken, and broken off in several ways. Log rows are every 3 steps, checkpoints
    every 2, so that a break leaves a row too many, or the row of a part of an interval."""
    known = {}

    def tell(stage):
        if stage in known:
            return known[stage]
        folder = tmp_path_factory.mktemp(stage)
        breaks = {
            "unbroken": ("--steps 8", None), "lengthened": ("--steps 4", None),
            "killed": ("--steps 8", (*STEP, 4, signal.SIGKILL)),  # checkpoint 2, log row 3
            "SIGINT": ("--steps 8", (*STEP, 5, signal.SIGINT)), "SIGTERM": ("--steps 8", (*STEP, 5, signal.SIGTERM)),
        }
        for name in breaks:
            if stage != "autoencoder":
                shutil.copytree(tiny / "encodings", folder / name / "encodings")
                shutil.copy(tiny / "autoencoder.pt", folder / name)
        begun = {name: processes.start(stage, folder / name, flags, at) for name, (flags, at) in breaks.items()}
        ends = dict(zip(begun, processes.finish(*begun.values())))
        steps = {name: state_of(folder / name, stage)["step"] for name in breaks}
        processes.succeed(*(processes.start(stage, folder / name, "--resume --steps 8") for name in breaks
                            if name != "unbroken"))
        known[stage] = SimpleNamespace(folder=folder, ends=ends, steps=steps)
        return known[stage]

    return tell


@each_stage
def test_a_run_that_was_killed_and_resumed_equals_an_unbroken_one_bit_for_bit(stories, stage):
    story = stories(stage)
    assert story.ends["killed"][0] == -signal.SIGKILL and story.steps["killed"] == 2
    assert_same(story.folder / "unbroken", story.folder / "killed", stage)
    assert [row["step"] for row in rows_of(story.folder / "killed", stage)] == ["3", "6", "8"]


@each_stage
def test_half_the_steps_then_as_many_again_equal_all_of_them(stories, stage):
    assert_same(stories(stage).folder / "unbroken", stories(stage).folder / "lengthened", stage)


@each_stage
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_ends_with_130_and_the_run_goes_on_exactly(stories, stage, name):
    story = stories(stage)
    status, output = story.ends[name]
    assert status == 130 and "stopped after step 5, saved: --resume goes on" in output
    assert story.steps[name] == 5
    assert_same(story.folder / "unbroken", story.folder / name, stage)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_times_leave_a_whole_checkpoint_and_change_nothing(processes, copy, kills):
    """Every other one strikes while a checkpoint is being written, the others at any time."""
    killed, unbroken = copy("killed", "autoencoder"), copy("unbroken", "autoencoder")
    path, rng = killed / "content.pt", random.Random(0)
    aside, during, step = killed / "content.pt.tmp", 0, 0
    for n in range(kills):
        process = processes.start("content", killed, "--resume --steps 1000000 --save-every 1 --workers 0")
        wait_for(lambda: path.exists() and state_of(killed, "content")["step"] > step)
        if n % 2:
            time.sleep(rng.uniform(0, 0.2))
        else:
            wait_for(aside.exists)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(process.pid, signal.SIGSTOP)  # a fast disk has written it by now: then let it go on to the next one
            while not aside.exists():
                os.kill(process.pid, signal.SIGCONT)
                wait_for(aside.exists)
                os.kill(process.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        assert processes.finish(process)[0][0] == -signal.SIGKILL
        during += aside.exists()
        state = load_checkpoint(path, "content")
        assert state["step"] > step
        step = state["step"]
    assert during >= kills // 4
    print(f"{kills} kills survived, {during} of them while saving; {step} steps")
    flags = f"--steps {step + 2} --save-every 1000000"
    processes.succeed(processes.start("content", killed, "--resume " + flags),
                      processes.start("content", unbroken, flags))
    assert_same(killed, unbroken, "content")


def test_a_signal_to_the_whole_group_leaves_the_loaders_workers_at_work(processes, copy):
    """As a scheduler sends it: to every process."""
    run = copy("run", "autoencoder")
    process = processes.start("content", run, "--steps 1000000 --workers 2 --save-every 1000000", own_group=True)
    wait_for(lambda: (run / "content.csv").exists() and rows_of(run, "content"))
    workers = children(process.pid)
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    time.sleep(1)
    assert len(workers) == 2 and children(process.pid) == workers
    os.killpg(process.pid, signal.SIGTERM)
    [(status, output)] = processes.finish(process)
    assert status == 130 and "saved: --resume goes on" in output, output
    assert state_of(run, "content")["step"] >= 3


def test_a_signal_to_one_rank_alone_stops_all_after_the_same_step_or_shard(processes, copy):
    train, encode = copy("train", "autoencoder"), copy("encode", "autoencoder")
    shutil.rmtree(encode / "encodings")
    ends = processes.finish(
        *processes.ranks(2, "content", train, "--steps 1000", at={1: (*STEP, 5, signal.SIGTERM)}),
        *processes.ranks(2, "autoencoder", encode, "--encode", at={1: ("data", "write_shard", 1, signal.SIGTERM)}))
    assert [status for status, _ in ends] == [130] * 4, ends
    assert "stopped after step 5, saved" in ends[0][1] and state_of(train, "content")["step"] == 5
    assert "stopped while encoding" in ends[2][1] and len(list((encode / "encodings").glob("shard-*"))) == 2


@each_stage
def test_two_processes_cannot_train_the_same_stage_and_the_dead_do_not_count(processes, copy, stage):
    """Other stages can train at the same time, and sample.py can sample. Ranks of one torchrun are one process here."""
    run = fresh(copy, stage, "run")
    running = processes.start(stage, run, "--steps 1000000 --workers 1 --save-every 1000000")
    wait_for(lambda: (run / f"{stage}.csv").exists())
    other = "motion" if stage == "content" else "content"
    seconds = [processes.start(stage, run, "--resume --steps 2")]
    if stage != "autoencoder":
        processes.succeed(processes.start(other, run, "--steps 2"))
    for status, output in processes.finish(*seconds):
        assert status == 1 and lines_of(output) == [
            f"{SCRIPTS[stage][0]}: another process (pid {running.pid} on {os.uname().nodename}) is using "
            f"{run}/{stage}.pt: wait until it ends, or choose another --run-dir"]
    workers = children(running.pid)
    running.kill()  # its loader's workers live on for a while
    processes.finish(running)
    assert stage == "autoencoder" or workers
    processes.succeed(processes.start(stage, run, "--resume --steps 2"))


def test_a_signal_while_stage_1_evaluates_does_not_wait_for_the_end_of_that(processes, copy):
    run = copy("run")
    [(status, output)] = processes.finish(processes.start(
        "autoencoder", run, "--steps 100 --preview-every 2", ("psnr", 5, signal.SIGTERM)))
    assert status == 130 and "stopped after step 3, saved" in output and "PSNR" not in output, output
    assert state_of(run, "autoencoder")["step"] == 3


def test_fewer_steps_than_the_checkpoint_has_leave_it_as_it_is(processes, copy, tiny):
    run = copy("run", "autoencoder")
    processes.succeed(processes.start("autoencoder", run, "--resume --steps 4"))
    assert state_of(run, "autoencoder")["step"] == 6 and encodings_of(run) == encodings_of(tiny)


def test_ranks_that_are_started_again_do_not_take_the_dead_for_the_living(processes, copy):
    """torchrun's store outlives the ranks: here with what two that trained and one that was killed have left in it."""
    run, store = copy("run", "autoencoder"), torch.distributed.TCPStore("localhost", 0, is_master=True)

    def rank(number, steps):
        return processes.start(
            "content", run, f"--resume --steps {steps}", RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost",
            MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(start))

    start = 0  # torchrun counts its restarts
    processes.succeed(rank(0, 2), rank(1, 2))
    for first in (0, 1):
        start += 1
        early = rank(first, 4)
        time.sleep(1)
        assert early.is_alive()
        early.kill()
    for first in (0, 1):
        start += 1
        early = rank(first, 4 + 2 * first)
        time.sleep(1)
        processes.succeed(early, rank(1 - first, 4 + 2 * first))
    assert state_of(run, "content")["step"] == 6


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(processes, copy):
    run, alone = copy("run", "autoencoder"), copy("alone", "autoencoder")
    agent = torchrun("--standalone --nproc-per-node 2 --max-restarts 2", "content", run, "--resume --steps 40")
    wait_for((run / "content.pt").exists)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    processes.succeed(processes.start("content", alone, "--steps 40"))
    output = outputs_of(agent)[0]
    assert agent.returncode == 0, output
    begun = [int(line.split("steps ")[1].split(" to")[0]) for line in output.splitlines() if "parameters, " in line]
    assert len(begun) == 2 and begun[0] == 0 and begun[1] >= 2, output
    assert_close(run, alone, "content")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_and_says_so(copy, number):
    run = copy("run", "autoencoder")
    agent = torchrun("--standalone --nproc-per-node 2", "content", run,
                     "--steps 1000000 --workers 1 --save-every 1000000")
    wait_for(lambda: (run / "content.csv").exists() and rows_of(run, "content"))
    agent.send_signal(number)
    output = outputs_of(agent)[0]
    assert "saved: --resume goes on" in output and "killed" not in output, output
    assert state_of(run, "content")["step"] >= 3


# ---------------------------------------------------------------------------------------------------------------------
# 2. Many ranks


@each_stage
def test_two_ranks_and_accumulated_gradients_give_the_weights_of_one(processes, copy, stage):
    names = ["one", "two", "accumulated", "both"]
    one, two, accumulated, both = (fresh(copy, stage, name) for name in names)
    processes.succeed(
        processes.start(stage, one, "--steps 6"), *processes.ranks(2, stage, two, "--steps 6"),
        processes.start(stage, accumulated, "--steps 6 --accumulate 2"),
        *processes.ranks(2, stage, both, "--steps 6 --accumulate 2"))
    for run in (two, accumulated, both):
        assert_close(one, run, stage)


def test_two_ranks_write_the_shards_of_one(processes, copy):
    one, two = copy("one", "autoencoder"), copy("two", "autoencoder")
    for run in (one, two):
        shutil.rmtree(run / "encodings")
    processes.succeed(processes.start("autoencoder", one, "--encode"),
                      *processes.ranks(2, "autoencoder", two, "--encode"))
    assert encodings_of(one) == encodings_of(two)


def test_a_batch_that_cannot_be_divided_is_one_clear_line_on_every_rank(processes, copy):
    run = copy("run", "autoencoder")
    for status, output in processes.finish(*processes.ranks(2, "content", run, "--batch-size 3")):
        assert status == 1 and lines_of(output) == [
            "content_diffusion.py: --batch-size 3 is over all ranks: make it a multiple of 2 rank(s) times "
            "--accumulate 1"]


def lines_of(output):
    """Without progress bars, torch's own warnings, and what a script says when it starts."""
    return [line.split("\r")[-1] for line in output.splitlines()
            if line.strip() and not line.startswith(("[W", "[Gloo]")) and "parameters," not in line]


@pytest.mark.parametrize("stage, flags", [(stage, "--resume") for stage in SCRIPTS] + [("autoencoder", "--encode")])
def test_ranks_with_run_folders_on_disks_of_their_own_all_end_with_one_line(processes, copy, stage, flags):
    """As two nodes with local disks have them: without this, the second would train without Adam's moments."""
    folders = [copy(name, "autoencoder", *[stage] * (name == "one" or "encode" in flags)) for name in ("one", "other")]
    for run, (status, output) in zip(folders, processes.finish(*processes.ranks(2, stage, folders, flags))):
        assert status == 1 and lines_of(output) == [
            f"{SCRIPTS[stage][0]}: the ranks do not see the same files in {run}: --run-dir must be on a disk that they "
            "share"]
        assert not list(run.glob("shared-*"))


def test_a_rank_that_did_not_see_the_checkpoint_yet_is_noticed(processes, copy, tiny):
    """As a network disk may show it, for a minute or so. The second rank looks, and waits until it is there."""
    run = copy("run", "autoencoder")
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    late = processes.start("content", run, "--resume", ("data", "start", 1, signal.SIGSTOP), RANK="1", **place)
    wait_for(lambda: read(f"/proc/{late.pid}/stat").split()[2] == "T")
    shutil.copy(tiny / "content.pt", run)
    first = processes.start("content", run, "--resume", RANK="0", **place)
    os.kill(late.pid, signal.SIGCONT)
    for status, output in processes.finish(first, late):
        assert status == 1 and "the ranks do not see the same files" in lines_of(output)[-1], output


def test_there_may_be_fewer_clips_and_shards_than_ranks(processes, copy):
    run = copy("run", "autoencoder")
    processes.succeed(*processes.ranks(2, "autoencoder", run, "--encode --clips 1"))
    processes.succeed(*processes.ranks(2, "motion", run, "--steps 2"))
    assert len(EncodedClips(run)) == 1 and state_of(run, "motion")["step"] == 2


@pytest.mark.parametrize("victim", ["loader's worker", "rank"])
def test_when_a_worker_or_a_rank_is_killed_every_rank_ends_with_one_clear_line(processes, copy, victim):
    run = copy("run", "autoencoder")
    ranks = processes.ranks(2, "content", run, "--steps 1000000 --workers 1")
    wait_for((run / "content.pt").exists)
    os.kill(children(ranks[1].pid)[0] if victim == "loader's worker" else ranks[1].pid, signal.SIGKILL)
    (status, output), (other, others_output) = processes.finish(*ranks, timeout=60)
    assert status == 1 and "lost the other ranks" in lines_of(output)[-1], output
    assert "Traceback" not in output + others_output
    if victim == "rank":
        assert other == -signal.SIGKILL
    else:
        line = lines_of(others_output)[-1]
        # PyTorch says the one, or the other where it sees the worker's end before its signal.
        assert "is killed by signal" in line or "exited unexpectedly" in line, others_output
        assert other == 1 and "Memory may have run out: use fewer --workers" in line, others_output


@pytest.mark.slow
def test_two_nodes_train_together(processes, copy):
    run, alone = copy("run", "autoencoder"), copy("alone", "autoencoder")
    place = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id 1"
    agents = [torchrun(place, "content", run, "--steps 6") for _ in range(2)]
    processes.succeed(processes.start("content", alone, "--steps 6"))
    outputs = outputs_of(*agents)
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert_close(run, alone, "content")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The data position


def test_the_order_of_the_clips_does_not_depend_on_ranks_nor_on_where_the_run_was_broken_off():
    def read_keys(step, steps, world):
        iterators = [batch_keys(range(100, 110), 12, 5, step, rank, world) for rank in range(world)]
        return [key for _ in range(steps) for keys in iterators for key in next(keys)]

    whole = read_keys(0, 10, 1)
    for parts in ([(0, 10, 3)], [(0, 4, 1), (4, 3, 4), (7, 3, 6)], [(0, 1, 12), (1, 9, 2)]):
        assert sum((read_keys(*part) for part in parts), []) == whole
    for epoch in range(12):  # every clip once an epoch, though batches lie across epochs
        assert sorted(whole[epoch * 10 : epoch * 10 + 10]) == [(index, epoch) for index in range(100, 110)]
    assert [key[0] for key in whole[:10]] != [key[0] for key in whole[10:20]]


def test_a_run_goes_on_with_other_numbers_of_ranks_and_workers(processes, copy):
    one, more, fewer = (copy(name, "autoencoder") for name in ("one", "more", "fewer"))
    processes.succeed(processes.start("motion", one, "--steps 8"), processes.start("motion", more, "--steps 4"),
                      *processes.ranks(2, "motion", fewer, "--steps 4 --workers 1"))
    processes.succeed(*processes.ranks(2, "motion", more, "--resume --steps 8 --workers 1"),
                      processes.start("motion", fewer, "--resume --steps 8 --workers 0"))
    for run in (more, fewer):
        assert_close(one, run, "motion")


# ---------------------------------------------------------------------------------------------------------------------
# 4. NaN losses


def poison(run, clips):
    """Makes the motion latents and content frames of some stored clips NaN, with the right checksums."""
    for number in range(3):
        shard, captions, settings = open_shard(str(run), number)
        content, motion, labels = (shard.get_tensor(name).clone() for name in ("content", "motion", "label"))
        for clip in clips:
            if clip // 8 == number:
                content[clip % 8] = motion[clip % 8] = torch.nan
        write_shard(str(run), number, settings, content, motion, labels.tolist(), captions)


@pytest.mark.parametrize("stage, ranks", [("content", 1), ("motion", 1), ("motion", 2)])
def test_a_nan_loss_is_skipped_and_counted_and_leaves_weights_and_optimiser_untouched(processes, copy, stage, ranks):
    before, after = copy("before", "autoencoder"), copy("after", "autoencoder")
    keys = batch_keys(range(24), 4, 0, 0, 0, 1)
    clip = [next(keys) for _ in range(4)][3][1][0]  # a clip of the fourth step, on the first rank
    for run in (before, after):
        poison(run, [clip])
    processes.succeed(*processes.ranks(ranks, stage, before, "--steps 3"),
                      *processes.ranks(ranks, stage, after, "--steps 4"))
    states = [dict(tensors_of({name: state_of(run, stage)[name] for name in ("model", "optimizer")}))
              for run in (before, after)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [row["skipped"] for row in rows_of(after, stage)] == ["0", "1"]
    processes.succeed(*processes.ranks(ranks, stage, after, "--resume --steps 6"))
    state = state_of(after, stage)
    assert all(tensor.isfinite().all() for name in ("model", "ema") for tensor in state[name].values())
    assert rows_of(after, stage)[-1]["skipped"] == "1" and float(rows_of(after, stage)[-1]["loss"]) > 0


def test_a_nan_loss_in_stage_1_is_skipped_and_too_many_stop_the_run(processes, copy):
    """Its clips are drawn, so the poison is a noise that is infinite in float32, from the resumed step on."""
    run = copy("run", "autoencoder")
    [(status, output)] = processes.finish(processes.start("autoencoder", run, "--resume --steps 100 --noise 1e39"))
    assert status == 1 and "autoencoder.py: the last 5 steps had a NaN" in lines_of(output)[-1], output
    assert rows_of(run, "autoencoder")[-1]["step"] == "9" and rows_of(run, "autoencoder")[-1]["skipped"] == "3"


@pytest.mark.parametrize("stage", ["content", "motion"])
def test_a_few_nan_losses_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(processes, copy, tiny, stage):
    run, new = copy("run", "autoencoder", stage), copy("new", "autoencoder")
    for folder in (run, new):
        poison(folder, range(24))
    (status, output), (other, others_output) = processes.finish(
        processes.start(stage, run, "--resume --steps 100"),
        processes.start(stage, new, "--steps 100 --save-every 100"))
    name = SCRIPTS[stage][0]
    assert status == 1 and lines_of(output)[-1] == (
        f"{name}: the last 5 steps had a NaN or infinite loss and were skipped: lower --lr, or look at the data; the "
        "last checkpoint, if there is one, holds good weights")
    good, now = state_of(tiny, stage), state_of(run, stage)
    assert all(torch.equal(good["model"][key], now["model"][key]) for key in good["model"])
    assert other == 1 and "the last 5 steps had a NaN" in lines_of(others_output)[-1]
    assert not (new / f"{stage}.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# 6. Encodings


@pytest.mark.parametrize("at", [
    ("data", "write_shard", 2, signal.SIGKILL), ("data", "save_file", 3, signal.SIGKILL),
    ("data", "save_checkpoint", 2, signal.SIGKILL), ("data", "write_shard", 2, signal.SIGINT),
    ("data", "write_shard", 1, signal.SIGTERM)], ids=str)
def test_encoding_that_was_broken_off_goes_on_and_writes_the_same_bytes(processes, copy, tiny, at):
    run = copy("run", "autoencoder")
    shutil.rmtree(run / "encodings")
    [(status, output)] = processes.finish(processes.start("autoencoder", run, "--encode", at))
    if at[-1] == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130 and "stopped while encoding: --encode goes on" in output
    with pytest.raises(InputError, match="has no complete encodings: finish stage 1 with"):
        EncodedClips(str(run))
    done = sorted((run / "encodings").glob("shard-*.safetensors"))
    assert len(done) < 3 or at[1] == "save_checkpoint"
    times = [path.stat().st_mtime_ns for path in done]
    processes.succeed(processes.start("autoencoder", run, "--encode"))
    assert times == [path.stat().st_mtime_ns for path in done]  # kept, not written again
    assert encodings_of(run) == encodings_of(tiny)


def test_an_interrupted_encoding_goes_on_with_the_flags_that_it_began_with(processes, copy):
    run = copy("run", "autoencoder")
    shutil.rmtree(run / "encodings")
    killed = "data", "write_shard", 4, signal.SIGKILL
    [(status, _)] = processes.finish(processes.start("autoencoder", run, "--encode --clips 32", killed))
    assert status == -signal.SIGKILL
    processes.succeed(processes.start("autoencoder.py", run, "--encode"))  # without the flags that SCRIPTS adds
    assert len(EncodedClips(str(run))) == 32


def test_encoding_fewer_clips_anew_does_not_take_a_shard_of_training_clips_for_that_of_test_clips(processes, copy):
    """Both have 64 clips, and the number 2 in turn."""
    run = copy("run", "autoencoder")
    processes.succeed(processes.start("autoencoder", run, "--encode --shard-size 64 --clips 192"))
    old = read(run / "encodings" / "shard-00002.safetensors", "rb")
    processes.succeed(processes.start("autoencoder", run, "--encode --shard-size 64 --clips 128"))
    clips = EncodedClips(str(run))
    assert len(clips) == 128 and len(clips.test_clips()["label"]) == 64
    assert read(run / "encodings" / "shard-00002.safetensors", "rb") != old


def test_a_shard_that_was_cut_off_or_changed_is_noticed_named_and_made_again(processes, copy):
    run = copy("run", "autoencoder")
    assert len(EncodedClips(str(run))) == 24
    path = run / "encodings" / "shard-00001.safetensors"
    whole = read(path, "rb")
    flipped = whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:]
    other_type = whole.replace(b'"I64"', b'"F64"')  # the labels' bytes, read as other numbers
    for damage in (whole[:-1], flipped, other_type, whole + b"x", whole[:50], b""):
        assert damage != whole
        path.write_bytes(damage)
        open_shard.cache_clear()
        with pytest.raises(InputError, match="shard-00001.safetensors is missing or damaged .*: delete it and run"):
            EncodedClips(str(run))
    path.unlink()
    open_shard.cache_clear()
    with pytest.raises(InputError, match="shard-00001.safetensors is missing or damaged"):
        EncodedClips(str(run))
    path.write_bytes(flipped)
    processes.succeed(processes.start("autoencoder", run, "--encode"))  # keeps the other shards
    open_shard.cache_clear()
    assert len(EncodedClips(str(run))) == 24 and read(path, "rb") == whole


def test_what_belongs_to_another_autoencoder_is_refused_with_the_reason(processes, copy, tiny, tmp_path):
    other = tmp_path / "other"
    processes.succeed(processes.start("autoencoder", other, "--steps 2 --seed 1"))
    mixed = copy("mixed", "autoencoder", "content", "motion")  # its encodings are of the tiny run's autoencoder
    shutil.copy(other / "autoencoder.pt", mixed)
    for stage in ("content", "motion"):
        shutil.copy(tiny / f"{stage}.pt", other)  # here the encodings and the autoencoder agree, the model is foreign
    starts = [processes.start("content", mixed, "--resume"), processes.start("motion", mixed, "--resume"),
              processes.start("sample.py", mixed, "--num 1"), processes.start("content", other, "--resume"),
              processes.start("motion", other, "--resume"), processes.start("sample.py", other, "--num 1")]
    for n, (status, output) in enumerate(processes.finish(*starts)):
        assert status == 1 and len(lines_of(output)) == 1, output
        assert ("were made by another autoencoder" if n < 2 else "on the encodings of another autoencoder") in output


# ---------------------------------------------------------------------------------------------------------------------
# 7. Checkpoints from elsewhere


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_payload_is_refused_and_does_not_run(processes, copy, tmp_path, legacy):
    ran, run = tmp_path / "ran", copy("run", "autoencoder")
    for stage in SCRIPTS:
        state = state_of(run, "autoencoder") | dict(stage=stage, extra=Payload(ran))
        torch.save(state, tmp_path / f"{stage}.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError) as caught:
            load_checkpoint(str(tmp_path / f"{stage}.pt"), stage)
        assert str(caught.value) == (f"{tmp_path}/{stage}.pt is damaged, or not a checkpoint: delete it and train "
                                     f"again with {SCRIPTS[stage][0]}")
    assert not ran.exists()
    torch.load(tmp_path / "content.pt", weights_only=False)
    assert ran.exists()  # the payload works: it was not merely dead
    ran.unlink()
    shutil.copy(tmp_path / "autoencoder.pt", run)
    shutil.copy(tmp_path / "content.pt", run)
    for status, output in processes.finish(processes.start("autoencoder", run, "--resume"),
                                           processes.start("content", run, "--resume"),
                                           processes.start("sample.py", run, "--num 1")):
        assert status == 1 and len(lines_of(output)) == 1, output
    assert not ran.exists()


def test_a_file_that_is_no_checkpoint_or_of_another_stage_says_so(copy, tmp_path):
    run = copy("run", "content", "motion")
    shutil.copy(run / "content.pt", run / "autoencoder.pt")
    with pytest.raises(InputError, match="autoencoder.pt was written by content_diffusion.py, not by autoencoder.py"):
        state_of(run, "autoencoder")
    whole = read(run / "motion.pt", "rb")
    for damage in (whole[: len(whole) // 2], b"", b"text", whole[len(whole) // 2 :]):
        (run / "motion.pt").write_bytes(damage)
        with pytest.raises(InputError, match="motion.pt is damaged, or not a checkpoint") as caught:
            state_of(run, "motion")
        assert "\n" not in str(caught.value)
    torch.save(dict(weights=torch.zeros(3)), run / "motion.pt")
    with pytest.raises(InputError, match="motion.pt is damaged, or not a checkpoint"):
        state_of(run, "motion")
    with pytest.raises(InputError, match="train it first with `python motion_diffusion.py"):
        state_of(tmp_path, "motion")


def test_another_preset_or_model_than_the_checkpoints_is_an_error(processes, copy):
    run = copy("run", "autoencoder", "content", "motion")
    for stage, flags, message in (
            ("autoencoder", "--resume --preset ucf101", "was trained with --preset shapes, not ucf101"),
            ("motion", "--resume --preset ucf101", "was trained with --preset shapes, not ucf101"),
            ("autoencoder", "--resume --width 32", "was trained with --width 16, not 32: drop that"),
            ("content", "--resume --model S", "was trained with --model mini, not S: drop that flag"),
            ("motion", "--resume --content-patch 4", "was trained with --content-patch 8, not 4"),
            ("content", "--resume --predict eps", "was trained with --predict x, not eps: drop that"),
            ("content", "", "content.pt exists: --resume goes on with it, another --run-dir starts a new")):
        [(status, output)] = processes.finish(processes.start(stage, run, flags))
        assert status == 1 and len(lines_of(output)) == 1 and message in output, output


# ---------------------------------------------------------------------------------------------------------------------
# 8. A full disk


def test_a_checkpoint_that_does_not_fit_is_a_clear_error_and_the_earlier_one_stays(tmp_path):
    path, state = str(tmp_path / "content.pt"), dict(stage="content", weights=torch.arange(1000))
    save_checkpoint(path, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # of one file; stands for the disk's size
    try:
        with pytest.raises(InputError, match="cannot write .*content.pt .*MB are free on its disk, and an earlier file "
                                             "is as it was"):
            save_checkpoint(path, state | dict(weights=torch.zeros(1_000_000)))
        with pytest.raises(InputError, match="cannot write .*motion.pt"):
            save_checkpoint(str(tmp_path / "motion.pt"), dict(weights=torch.zeros(1_000_000)))
        with pytest.raises(SystemExit, match="cannot write .*shard-00000.safetensors .*File too large.*MB are free"):
            data.launch(lambda: write_shard(str(tmp_path / "run"), 0, {}, torch.zeros(9, 3, 100, 100),
                                            torch.zeros(9, 1, 1, 1), [0] * 9, [""] * 9))
        assert not os.listdir(tmp_path / "run" / "encodings")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["content.pt", "run"]
    assert torch.equal(load_checkpoint(path, "content")["weights"], torch.arange(1000))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_runs_full_ends_the_run_with_one_line_and_the_earlier_checkpoint_stays(processes, copy, small_disk):
    """The first checkpoint of 21 MB fits, the second beside it does not."""
    run = small_disk / "run"
    shutil.copytree(copy("run", "autoencoder"), run)
    [(status, output)] = processes.finish(processes.start("content", run, "--steps 100"))
    assert status == 1 and "cannot write" in lines_of(output)[-1] and "MB are free" in lines_of(output)[-1], output
    assert "Traceback" not in output
    assert state_of(run, "content")["step"] == 2
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("content.pt")) == ["content.pt"]


def test_encoding_and_sampling_on_a_full_or_read_only_disk_end_with_one_line(processes, copy, tiny, small_disk):
    """What no checkpoint holds is not said to go on with --resume."""
    run, out = copy("run", "autoencoder"), small_disk / "out"
    shutil.rmtree(run / "encodings")
    (run / "encodings").symlink_to(small_disk, target_is_directory=True)
    (small_disk / "fill").write_bytes(bytes(shutil.disk_usage(small_disk).free - 10_000))
    encode, sample = processes.finish(
        processes.start("autoencoder", run, "--encode --clips 4000 --shard-size 1000"),
        processes.start("sample.py", tiny, f"--num 24 --out {out} --steps 2 --motion-steps 2"))
    for status, output in (encode, sample):
        assert status == 1 and re.search("cannot write .*(No space left|os error 28|fail).*; 0 MB are free",
                                         lines_of(output)[-1]), output
        assert "Traceback" not in output and "--resume" not in output
    (small_disk / "empty").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    [(status, output)] = processes.finish(processes.start("sample.py", tiny, f"--num 24 --out {small_disk}/empty"))
    assert status == 1 and len(lines_of(output)) == 1 and "Read-only file system" in output, output


def test_a_full_disk_elsewhere_than_in_saving_is_one_line_too(tmp_path):
    def fill():
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit, match="No space left on device"):
        data.launch(fill)
    with pytest.raises(SystemExit, match="No such file or directory: .*none"):
        data.launch(lambda: open(tmp_path / "none"))
    with pytest.raises(OSError):  # others keep their traceback
        data.launch(lambda: os.read(-1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# 9. GPUs (none is needed here)


def test_a_gpu_without_enough_memory_is_one_line_that_says_what_to_do():
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 1.")

    with pytest.raises(SystemExit, match="memory is too small: use a larger --accumulate, --checkpointing .*9.00 GiB"):
        data.launch(fill)


def test_a_small_dev_shm_is_one_line_that_names_it(tmp_path):
    """As a container has it by default: 64 MB; here 1 MB."""
    folder = tmp_path / "videos"
    folder.mkdir()
    data.write_video(str(folder / "one.mp4"), torch.zeros(3, 16, 256, 256), 8)
    command = (f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {sys.executable} {ROOT}/autoencoder.py --preset ucf101 "
               f"--data {folder} --width 16 --heads 2 --depth 1 --size 256 --batch-size 1 --workers 1 "
               f"--run-dir {folder}")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs of its own")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
    line = lines_of(done.stderr)[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Memory may have run out: use fewer --workers, a larger /dev/shm" in line, done.stderr


@pytest.mark.parametrize("flags, parts", [("--preset webvid_sd21", 2), ("--preset webvid_sd15", 1), ("", 1),
                                          ("--preset webvid_sd21 --accumulate 4", 4)])
def test_a_preset_that_needs_two_passes_on_eight_gpus_of_80_gb_makes_them(monkeypatch, tmp_path, flags, parts):
    monkeypatch.setattr(sys, "argv", ["content_diffusion.py", "--run-dir", str(tmp_path), *flags.split()])
    args, _ = content_diffusion.flags().parse(content_diffusion.PRESETS, "content")
    assert args.accumulate == parts


@pytest.mark.parametrize("visible, refused", [(None, True), ("0", True), ("", False)])
def test_a_gpu_on_which_cuda_does_not_start_is_an_error_and_not_a_run_on_the_cpu(monkeypatch, visible, refused):
    """As a driver that is older than PyTorch leaves it. An empty CUDA_VISIBLE_DEVICES asks for the CPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data.glob, "glob", lambda pattern: ["/dev/nvidia0"] if pattern == "/dev/nvidia[0-9]*" else [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = SimpleNamespace(seed=0)
    if refused:
        with pytest.raises(InputError, match="CUDA does not start.*set CUDA_VISIBLE_DEVICES= to run on the CPU"):
            data.start(args)
    else:
        assert data.start(args)[2] == torch.device("cpu")
