"""A fault run: 100 rounds, in each a random fault in a random stage, then what the message advises, then a comparison.

    python -m pytest -n 0 -m slow tests/test_faults.py              all rounds; -k "[17]" repeats one

Faults: kill -9 at a random moment of training, saving, encoding and sampling; SIGTERM to one of two ranks; a flipped
bit in a file of the run folder, or a file cut off; a disk that fills; a video that is replaced while its data set is
trained on. After each, the next command goes on to the weights of an unbroken run, or one line says what is damaged,
and following it leads there.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from test_survival import (  # noqa: F401  (fixtures)
    SCRIPTS,
    STEP,
    copy,
    encodings_of,
    fresh,
    lines_of,
    processes,
    read,
    small_disk,
    state_of,
    tensors_of,
    tiny,
    wait_for,
)

import data

STAGES = list(SCRIPTS)
SAMPLE = "--num 6 --steps 3 --motion-steps 3 --batch-size 2"


@pytest.fixture(scope="session")
def unbroken(processes, tiny, tmp_path_factory):  # noqa: F811
    """A run folder in which every stage went on from the tiny run to step 8, and its samples."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(tiny, run)
    for stage in STAGES[1:]:
        processes.succeed(processes.start(stage, run, "--resume --steps 8"))
    processes.succeed(processes.start("sample.py", run, f"{SAMPLE} --out {run}/samples"))
    longer = run.parent / "longer"
    shutil.copytree(tiny, longer)
    processes.succeed(processes.start("autoencoder", longer, "--resume --steps 8"))
    return run, longer


def follow(processes, run, stage, flags):  # noqa: F811
    """Runs a command, and follows the advice of the one line in which it may end, up to three times."""
    for _ in range(3):
        [(status, output)] = processes.finish(processes.start(stage, run, flags))
        if status == 0:
            return
        assert status == 1 and "Traceback" not in output, output
        line = lines_of(output)[-1]
        print(line.split(str(run))[-1])
        damaged = re.search(rf"({re.escape(str(run))}\S+?) is (?:missing or )?damaged", line)
        assert damaged and "delete it and" in line, output
        path = damaged[1]
        os.remove(path)
        if path.endswith(".safetensors"):
            processes.succeed(processes.start("autoencoder", run, "--encode"))
        elif path.endswith("autoencoder.pt") and stage != "autoencoder":  # all would be trained again
            return "again"
        else:
            flags = flags.replace("--encode", "--resume --steps 6")
    raise AssertionError(output)


def check(processes, run, stage, flags, reference, atol=0):  # noqa: F811
    """The same weights, averages, optimiser and encodings as in the unbroken run; atol: of two ranks."""
    if follow(processes, run, stage, flags) == "again":
        return
    names = ["model", "optimizer"] + ["ema"] * (stage != "autoencoder")
    ours, theirs = (dict(tensors_of({name: state_of(folder, stage)[name] for name in names}))
                    for folder in (run, reference))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=atol), name
    assert atol or stage != "autoencoder" or encodings_of(run) == encodings_of(reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100))
def test_round(number, processes, copy, tiny, unbroken, tmp_path, request):  # noqa: F811
    rng = random.Random(number)
    fault = ["kill training", "kill saving", "kill encoding", "kill sampling", "one rank", "flip", "cut", "disk",
             "video", "flip"][number % 10]
    stage = rng.choice(STAGES)
    done, longer = unbroken
    reference = longer if stage == "autoencoder" else done
    run = copy("run", "autoencoder", *{stage} - {"autoencoder"})
    go_on = "--resume --steps 8"
    print(number, fault, stage)
    if fault == "kill training":
        process = processes.start(stage, run, go_on)
        time.sleep(rng.uniform(0.2, 6))
        process.kill()
        processes.finish(process)
        check(processes, run, stage, go_on, reference)
    elif fault == "kill saving":
        process = processes.start(stage, run, f"{go_on} --save-every 1")
        wait_for(lambda: (run / f"{stage}.pt.tmp").exists() or not process.is_alive())
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        processes.finish(process)
        check(processes, run, stage, go_on, reference)
    elif fault == "kill encoding":
        shutil.rmtree(run / "encodings")
        process = processes.start("autoencoder", run, "--encode")
        wait_for(lambda: (run / "encodings").exists() or not process.is_alive())
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        processes.finish(process)
        follow(processes, run, "autoencoder", "--encode")
        assert encodings_of(run) == encodings_of(tiny)
    elif fault == "kill sampling":
        out = tmp_path / "samples"
        process = processes.start("sample.py", done, f"{SAMPLE} --out {out}")
        time.sleep(rng.uniform(0.5, 5))
        process.kill()
        processes.finish(process)
        [(status, output)] = processes.finish(processes.start("sample.py", done, f"{SAMPLE} --out {out}"))
        if status:  # something was written already
            assert f"--out {out} is not an empty folder: choose another" in lines_of(output)[-1], output
            out = tmp_path / "another"
            processes.succeed(processes.start("sample.py", done, f"{SAMPLE} --out {out}"))
        for path in (done / "samples").iterdir():
            assert read(path, "rb") == read(out / path.name, "rb"), path
    elif fault == "one rank":
        first = state_of(run, stage)["step"]
        at = {rng.randrange(2): (*STEP, rng.randint(1, 8 - first), signal.SIGTERM)}
        for status, output in processes.finish(*processes.ranks(2, stage, run, go_on, at)):
            assert status == 130, output
        check(processes, run, stage, go_on, reference, atol=2e-4)
    elif fault in ("flip", "cut"):
        files = [path for path in sorted(run.rglob("*")) if path.suffix in (".pt", ".safetensors", ".csv")]
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        if fault == "cut":
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        print(path.name, "at", place, "of", len(content))
        check(processes, run, stage, go_on, reference)
    elif fault == "disk":
        disk = request.getfixturevalue("small_disk")
        moved = disk / "run"
        shutil.copytree(run, moved)
        (disk / "fill").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - rng.randrange(100_000, 5_000_000))))
        process = processes.start(stage, moved, go_on)
        [(status, output)] = processes.finish(process)
        if status:
            assert status == 1 and re.search("cannot write .* MB are free", lines_of(output)[-1]), output
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        check(processes, moved, stage, go_on, reference)
    elif fault == "video":
        videos, run = tmp_path / "videos", tmp_path / "on_videos"
        videos.mkdir()
        for i in range(6):
            data.write_video(str(videos / f"{i}.mp4"), data.MovingShapes(8, 16, 0, "test")[i]["video"], 8)
        victim = videos / f"{rng.randrange(6)}.mp4"
        process = processes.start("autoencoder", run, f"--data {videos} --steps 200 --save-every 1000 --workers 1")
        wait_for((run / "autoencoder.csv").exists)
        time.sleep(rng.uniform(0, 1))
        other = tmp_path / "other.mp4"
        other.write_bytes(rng.choice([b"", b"<html>", victim.read_bytes()[:400]]))
        os.replace(other, victim)
        [(status, output)] = processes.finish(process)
        assert status == 0 and f"left out: {victim}: " in output, output
