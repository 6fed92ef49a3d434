"""Proves that training survives: a run that is stopped by a signal, killed at any moment, or goes on with other ranks
ends with the weights of an unbroken one; NaNs do no harm; and what would go wrong in silence ends with one line.

The scripts run as processes with tiny models; ranks get the variables that torchrun sets, and once torchrun itself.
`python -m pytest -n 0 -m slow tests/test_survival.py` kills forty times instead of four.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, load, rows_of

import data

SCRIPTS = dict(autoencoder="autoencoder.py", content="content_diffusion.py", motion="motion_diffusion.py")
FRESH = dict(  # flags of a fresh run, which --resume and --encode keep
    autoencoder="--width 16 --heads 2 --depth 1 --size 16 --frames 4 --clips 24 --shard-size 8 --lr 1e-3 --no-decay",
    content="--patch 8 --lr 1e-3 --no-decay", motion="--patch 8 --lr 1e-3 --no-decay")
STEP = "torch.nn.utils.clip_grad_norm_"  # is called once a step
each_stage = pytest.mark.parametrize("stage", SCRIPTS)


def words(stage, run, flags):
    """A stage's command on a run folder."""
    fresh = "" if "--resume" in flags or "--encode" in flags else FRESH[stage]
    often = "--batch-size 4 --save-every 2 --log-every 3 --preview-every 1000"
    return [SCRIPTS[stage], "--run-dir", str(run), *f"{fresh} {often} {flags}".split()]


@pytest.fixture
def start(processes):
    """start("content", run, "--steps 8", ...) starts a stage."""
    return lambda stage, run, flags, **settings: processes.start(*words(stage, run, flags), **settings)


@pytest.fixture
def ends(processes):
    """ends(status, process or processes): waits until they end with this status, and returns their results."""

    def call(status, *started):
        results = processes.finish(*started)
        assert [result.returncode for result in results] == [status] * len(started), results
        return results[0]

    return call


def wait_for(condition, process):
    """As long as the process lives, however slow the machine is."""
    while not condition():
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None, "ended too early"
        time.sleep(0.001)


def step_of(run, stage):
    return data.load_checkpoint(f"{run}/{stage}.pt")["step"]


def tensors_of(tree, path=""):
    """{name: tensor} at any depth."""
    if isinstance(tree, dict):
        return {name: tensor for key in tree for name, tensor in tensors_of(tree[key], f"{path}.{key}").items()}
    return {path: tree} if isinstance(tree, torch.Tensor) else {}


def trained(run, stage, *names):
    state = load(run, stage)
    return tensors_of({name: state[name] for name in names or {"model", "ema", "optimizer"} & state.keys()})


def shards_of(run):
    """{name: its time of change} of the encodings."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "encodings").glob("*.safetensors")}


def clips_of(run):
    """[labels, captions], [content frames, motion latents] of a run folder's encodings, also of its test clips."""
    clips = data.EncodedClips(str(run), load(run, "autoencoder"))
    batch, test = torch.utils.data.default_collate([*clips]), clips.test_clips()
    return ([[*batch[name], *test[name]] for name in ("label", "caption")],
            [torch.cat([batch[name], test[name]]) for name in ("content", "motion")])


@pytest.fixture(scope="module")
def tiny(processes, tmp_path_factory):
    """Six steps of stage 1 with its encodings, two of the others."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    for stage, steps in (("autoencoder", 6), ("content", 2), ("motion", 2)):
        result = processes.finish(processes.start(*words(stage, run, f"--steps {steps}")))[0]
        assert result.returncode == 0, result.stderr
    return run


@pytest.fixture
def copy(tiny, tmp_path):
    """copy(name, *stages): a copy of the tiny run with these stages' checkpoints; encodings come with stage 1's. By
    hard links: a file that a script writes takes the old one's place and leaves the original as it was."""

    def make(name, *stages):
        run = tmp_path / name
        run.mkdir()
        for stage in {*stages}:
            os.link(tiny / f"{stage}.pt", run / f"{stage}.pt")
        if "autoencoder" in stages:
            shutil.copytree(tiny / "encodings", run / "encodings", copy_function=os.link)
        return run

    return make


def before(stage):
    """The stages that a fresh run of this one needs."""
    return [] if stage == "autoencoder" else ["autoencoder"]


@pytest.fixture(scope="module")
def unbroken(tiny, processes, tmp_path_factory):
    """unbroken(stage): a run folder with eight steps of the stage, made once."""
    made = {}

    def make(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(stage) / "run"
            shutil.copytree(tiny, made[stage], ignore=lambda *_: ["autoencoder.pt"] * (stage == "autoencoder") + [
                "content.pt", "motion.pt"])
            result = processes.finish(processes.start(*words(stage, made[stage], "--steps 8")))[0]
            assert result.returncode == 0, result.stderr
        return made[stage]

    return make


@each_stage
def test_a_run_that_is_broken_off_again_and_again_equals_an_unbroken_one(stage, start, ends, copy, unbroken):
    """Steps are logged every 3 and saved every 2: so the first break leaves a row that the next run writes again."""
    run = copy("run", *before(stage))
    done = ends(1, start(stage, run, "--steps 8", at=[(STEP, signal.SIGINT, 4)] * 2))  # a second Ctrl-C ends at once
    assert "KeyboardInterrupt" in done.stderr and step_of(run, stage) == 2
    for step, number in ((3, signal.SIGINT), (4, signal.SIGTERM), (5, signal.SIGHUP)):
        done = ends(130, start(stage, run, "--resume", at=[(STEP, number, 1)]))
        assert f"step {step}" in done.stdout and step_of(run, stage) == step
    ends(-signal.SIGKILL, start(stage, run, "--resume", at=[(STEP, signal.SIGKILL, 2)]))
    assert step_of(run, stage) == 6
    ends(0, start(stage, run, "--resume", at=[(STEP, signal.SIGHUP, 1)], ignored=[signal.SIGHUP]))  # as under nohup
    found, expected = (trained(folder, stage) for folder in (run, unbroken(stage)))
    assert found.keys() == expected.keys() and len(found) > 40
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert [row["step"] for row in rows_of(run, stage)] == ["3", "6", "8"] and step_of(run, stage) == 8
    assert rows_of(run, stage)[-1]["loss"] == rows_of(unbroken(stage), stage)[-1]["loss"]
    assert load(run, stage)["identity"] == load(unbroken(stage), stage)["identity"]


def test_an_error_or_a_second_ctrl_c_also_ends_a_run_that_has_loader_processes(start, ends, copy):
    """They ignore the signal by which Python ends them, so as to live until a stopped run has saved."""
    run = copy("run", "autoencoder")
    for what in (signal.SIGINT, "fail"):
        ends(1, start("motion", run, "--steps 8 --workers 1", at=[(STEP, what, 1)] * 2))


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_every_file_whole(start, ends, copy, rounds):
    """Every other one strikes while a checkpoint is being written."""
    rng, runs = random.Random(rounds), {stage: copy(stage, "autoencoder", stage) for stage in SCRIPTS}
    for n in range(rounds):
        stage = [*SCRIPTS][n % 3]
        run, step = runs[stage], step_of(runs[stage], stage)
        process = start(stage, run, f"--resume --steps {step + 5000} --save-every 1")
        wait_for(lambda: step_of(run, stage) > step, process)
        if n % 2:
            wait_for((run / f"{stage}.pt.tmp").exists, process)
        else:
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        ends(-signal.SIGKILL, process)
        assert load(run, stage)["step"] > step
        assert not (run / f"{stage}.csv").exists() or rows_of(run, stage)[-1]["loss"]
    for stage, run in runs.items():
        step = step_of(run, stage)
        ends(0, start(stage, run, f"--resume --steps {step + 1}"))
        assert step_of(run, stage) == step + 1


def test_torchrun_hands_on_a_signal_and_all_of_its_processes_stop_when_they_have_saved(copy):
    """The signal also reaches the loader's workers, which the ranks still need."""
    run = copy("run", "autoencoder")
    agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *words("motion", run, "--steps 5000 --workers 1 --save-every 5000")], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    wait_for((run / "motion.csv").exists, agent)
    agent.send_signal(signal.SIGTERM)
    output = agent.communicate()[0]
    assert "saved" in output and "exited unexpectedly" not in output, output
    assert 3 <= load(run, "motion")["step"] < 5000


@each_stage
def test_two_ranks_with_accumulated_gradients_equal_one_process_and_stop_together(
        stage, processes, start, ends, copy, unbroken):
    """A signal to one rank stops both after the same step, and one process goes on where they were."""
    run = copy("run", *before(stage))
    rank = words(stage, run, "--steps 8 --accumulate 2 --checkpointing")
    done = ends(130, *processes.ranks(rank, rank, at={1: [(STEP, signal.SIGTERM, 4)]}))
    assert "step 4" in done.stdout and step_of(run, stage) == 4
    ends(0, start(stage, run, "--resume --workers 1"))
    for part in {"model", "ema"} & load(run, stage).keys():
        found, expected = (trained(folder, stage, part) for folder in (run, unbroken(stage)))
        apart = torch.cat([(found[name] - expected[name]).abs().flatten() for name in found if "motion_" not in name])
        assert apart.max() < 1e-4 and apart.mean() < 1e-6  # of rounding: a step is 1e-3 everywhere
    losses = [float(rows_of(folder, stage)[0]["loss"]) for folder in (run, unbroken(stage))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@each_stage
def test_ranks_that_find_different_checkpoints_stop_with_one_line(stage, processes, start, ends, copy):
    """As two machines have them whose run folder is not on a disk that they share."""
    runs = [copy("one", "autoencoder", stage), copy("other", *before(stage))]
    started = processes.ranks(*(words(stage, run, "--resume --preset shapes --steps 9") for run in runs))
    ends(1, *started)
    for process, run in zip(started, runs):
        lines = process.outputs[1].read_text().splitlines()
        assert "different" in lines[-1] and str(run) in lines[-1] and "Traceback" not in "".join(lines), lines
    assert step_of(runs[0], stage) < 9 and not (runs[1] / f"{stage}.pt.tmp").exists()
    if stage != "autoencoder":  # nor encodings of another autoencoder
        runs = [copy(name, "autoencoder") for name in ("third", "fourth")]
        ends(0, start("autoencoder", runs[1], "--encode --clips 5"))
        assert "different" in ends(1, *processes.ranks(*(words(stage, run, "--steps 2") for run in runs))).stderr


def test_there_may_be_more_ranks_than_clips_and_shards(processes, ends, copy):
    run = copy("run", "autoencoder")
    shutil.rmtree(run / "encodings")
    for stage, flags in (("autoencoder", "--encode --clips 1"), ("motion", "--steps 2")):
        ends(0, *processes.ranks(*[words(stage, run, flags)] * 2))
    assert len(clips_of(run)[0][0]) == 65 and step_of(run, "motion") == 2


def test_an_interrupted_encoding_goes_on_after_the_shards_that_are_written(processes, start, ends, copy, tiny, refused):
    run, kill = copy("run", "autoencoder"), signal.SIGKILL
    shutil.rmtree(run / "encodings")
    ends(-kill, start("autoencoder", run, "--encode", at=[("data.write_shard", kill, 2)]))
    written = shards_of(run)
    assert len(written) == 1
    rank = words("autoencoder", run, "--encode")
    done = ends(130, *processes.ranks(rank, rank, at={1: [("data.write_shard", signal.SIGTERM, 1)]}))
    assert "--resume" in done.stdout and len(shards_of(run)) == 2
    ends(-kill, start("autoencoder", run, "--encode", at=[("torch.save", kill, 2)]))  # all is written, but not so said
    assert written.items() < shards_of(run).items() and len(shards_of(run)) == 4
    refused(f"content_diffusion.py --run-dir {run}", run, "encodings", "--encode")
    written = shards_of(run)
    ends(0, start("autoencoder", run, "--resume"))
    assert shards_of(run) == written
    (about, encoded), (expected_about, expected) = clips_of(run), clips_of(tiny)
    assert about == expected_about
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(encoded, expected))
    shard, captions, identity = data.open_shard(run, 0)
    content, motion, label = (shard.get_tensor(name) for name in ("content", "motion", "label"))
    data.write_shard(run, 0, identity, content, motion * torch.nan, label.tolist(), captions)
    assert "NaN" in ends(1, start("autoencoder", run, "--resume")).stderr


def test_other_videos_or_another_seed_are_refused_when_training_goes_on(start, ends, tmp_path, refused):
    run, videos = tmp_path / "run", tmp_path / "videos"
    videos.mkdir()
    for i in range(6):
        data.write_video(str(videos / f"{i}.mp4"), data.MovingShapes(5, 16)[i]["video"], 8)
    (videos / "list").write_text("\n".join(f"{new}{i}.mp4" for new in ("", "new") for i in range(6)))
    ends(0, start("autoencoder", run, f"--data {videos} --split {videos}/list --steps 2"))
    again = f"autoencoder.py --run-dir {run} --resume --steps 4"
    refused(f"{again} --seed 1", "--seed 0, not 1")
    shutil.move(videos, tmp_path / "moved")
    ends(0, start("autoencoder", run, f"--resume --steps 3 --data {tmp_path}/moved --split {tmp_path}/moved/list"))
    for i in range(6):
        os.rename(tmp_path / "moved" / f"{i}.mp4", tmp_path / "moved" / f"new{i}.mp4")
    refused(f"{again} --data {tmp_path}/moved", "videos", f"{tmp_path}/moved")
    ends(0, start("autoencoder", run, f"--encode --data {tmp_path}/moved"))  # these may be encoded, not trained on
    refused(again.replace("steps 4", "steps 3"), "videos", f"{tmp_path}/moved")


def test_ranks_may_read_copies_of_the_videos_with_other_dates_but_not_other_videos(processes, ends, tmp_path):
    for name in "ab":
        os.makedirs(tmp_path / name)
        for i in range(6):
            data.write_video(f"{tmp_path}/{name}/{i}.mp4", data.MovingShapes(5, 16)[i]["video"], 8)
            os.utime(f"{tmp_path}/{name}/{i}.mp4", (0, ord(name)))
    flags = f"--data {tmp_path}/%s --steps 2 --shard-size 2"
    both = [words("autoencoder", tmp_path / "run", flags % name) for name in "ab"]
    ends(0, *processes.ranks(*both))
    ends(0, processes.start(*words("content", tmp_path / "run", "--steps 2")))
    os.utime(f"{tmp_path}/a/0.mp4", (0, 1))  # other encodings, which content.pt has not learned
    assert "content.pt has learned" in ends(1, *processes.ranks(*(row + ["--resume"] for row in both))).stderr
    os.remove(tmp_path / "run" / "content.pt")
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("0.mp4", "1.mp4"))
    assert "different videos" in ends(1, *processes.ranks(*(row + ["--resume"] for row in both))).stderr


def test_a_test_video_that_cannot_be_read_does_not_end_the_run(start, ends, tmp_path):
    for i in range(6):
        data.write_video(f"{tmp_path}/{i}.mp4", data.MovingShapes(5, 16)[i]["video"], 8)
    [chosen] = data.open_dataset(str(tmp_path), 4, 16)[2].paths
    (tmp_path / chosen).write_bytes(b"not a video")
    ends(0, start("autoencoder", tmp_path / "run", f"--data {tmp_path} --steps 2"))
    ends(0, start("content", tmp_path / "run", "--steps 2"))


@each_stage
def test_a_nan_step_leaves_the_weights_and_is_counted_and_five_in_a_row_end_the_run(stage, start, ends, copy, tiny):
    run, step = copy("run", "autoencoder", stage), step_of(tiny, stage)
    loss = "autoencoder.reconstruction_loss" if stage == "autoencoder" else "content_diffusion.Diffusion.loss"
    ends(0, start(stage, run, f"--resume --steps {step + 1} --log-every 1", at=[(loss, "nan", 1)]))
    found, expected = trained(run, stage), trained(tiny, stage)
    assert all(torch.equal(found[name], expected[name]) for name in found if "motion_" not in name)
    assert rows_of(run, stage)[-1]["skipped"] == "1" and step_of(run, stage) == step + 1
    nans = [(loss, "nan", 3, 5, 6, 7, 8, 9)]
    process = start(stage, run, f"--resume --steps {step + 20} --save-every 1 --log-every 1", at=nans)
    ends(1, process)
    lines = process.outputs[1].read_text().splitlines()
    assert "NaN" in lines[-1] and "--lr" in lines[-1] and "Traceback" not in "".join(lines)
    assert [row["skipped"] for row in rows_of(run, stage)[-8:]] == ["0", "0", "1", "1", "2", "3", "4", "5"]
    assert step_of(run, stage) == step + 9 and all(tensor.isfinite().all() for tensor in trained(run, stage).values())
