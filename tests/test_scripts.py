"""Proves that the scripts do together what the README says, run as a user runs them, at tiny sizes, and that a mistake
costs the user one clear line."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

import data
import sample
from autoencoder import load_autoencoder
from content_diffusion import load_content
from data import EncodedClips, MovingShapes, VideoFolder, read_clip, to_uint8, write_video
from motion_diffusion import load_motion

TINY = ("--width 16 --heads 2 --depth 1 --size 16 --frames 6 --steps 4 --batch-size 4 --log-every 2 --save-every 2 "
        "--preview-every 2 --clips 40 --shard-size 16").split()
# v: after four steps a model that predicts x answers almost 0 whatever the noise, so every seed would look alike.
TINY_DIFFUSION = "--predict v --steps 4 --batch-size 4 --log-every 2 --save-every 2 --preview-every 4".split()


@pytest.fixture(scope="module")
def shapes_run(script, tmp_path_factory):
    """The four scripts, one after the other, on the shapes."""
    folder = str(tmp_path_factory.mktemp("shapes") / "run")
    for command in (["autoencoder.py", *TINY], ["content_diffusion.py", *TINY_DIFFUSION],
                    ["motion_diffusion.py", *TINY_DIFFUSION],
                    "sample.py --num 3 --steps 3 --motion-steps 3 --batch-size 2".split()):
        done = script(*command, "--run-dir", folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    """Class folders of real files, not square, in two formats, and one file that is no video."""
    root = tmp_path_factory.mktemp("videos")
    shapes = MovingShapes(30, (40, 64), seed=5)
    for i in range(8):
        os.makedirs(root / f"class{i % 2}", exist_ok=True)
        write_video(str(root / f"class{i % 2}" / f"{i}.{'mp4' if i % 3 else 'gif'}"), shapes[i]["video"], 10)
    (root / "class0" / "broken.mp4").write_bytes(b"not a video")
    return str(root)


def test_the_run_folder_holds_what_the_design_says(shapes_run):
    for name in ("autoencoder.pt", "content.pt", "motion.pt", "autoencoder.csv", "content.csv", "motion.csv",
                 "encodings/shard-00000.safetensors", "previews/autoencoder-000004.png", "previews/content-000004.png",
                 "previews/motion-000004.png", "samples/samples.gif", "samples/samples.png", "samples/00002.mp4"):
        assert os.path.getsize(os.path.join(shapes_run, name)) > 0, name
    with open(os.path.join(shapes_run, "content.csv")) as file:
        assert [line.split(",")[0] for line in file] == ["step", "2", "4"]
    assert read_clip(os.path.join(shapes_run, "samples/00000.mp4"), 6).shape == (6, 16, 16, 3)


def test_checkpoints_hold_plain_values_only(shapes_run):
    for name in ("autoencoder", "content", "motion"):
        state = torch.load(os.path.join(shapes_run, f"{name}.pt"), weights_only=True)
        assert {"stage", "step", "args", "config", "model", "optimizer"} <= state.keys()
        assert ("ema" in state) == (name != "autoencoder")


def test_encodings_are_what_the_model_gives(shapes_run):
    model, _, state = load_autoencoder(shapes_run, torch.device("cpu"))
    clips, videos = EncodedClips(shapes_run), MovingShapes(6, 16, 0)
    assert len(clips) == 40
    for i in (0, 17, 39):
        content, motion = model.encode(videos[i]["video"][None])
        assert torch.allclose(clips[i]["content"], content[0], atol=1e-3)  # half precision
        assert torch.allclose(clips[i]["motion"], motion[0], atol=1e-3)
        assert (clips[i]["label"], clips[i]["caption"]) == (videos[i]["label"], videos[i]["caption"])
    motions = torch.stack([clips[i]["motion"] for i in range(40)])
    assert torch.allclose(model.motion_mean.flatten(), motions.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model.motion_std.flatten(), motions.std((0, 2, 3), unbiased=False), rtol=1e-3)


def clips_in(folder):
    return np.stack([read_clip(os.path.join(folder, name), 6)
                     for name in sorted(os.listdir(folder)) if name.endswith(".mp4")])


def test_clips_come_from_the_models_beside_the_code_until_ones_own_are_trained(tmp_path, script, shapes_run):
    few = "-n", 12, "--steps", 4, "--motion-steps", 4
    done = script("sample.py", *few, "--out", "clips", folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "clips" / "samples.gif").exists(), done.stderr
    clip = read_clip(tmp_path / "clips" / "00000.mp4", 16).astype(float)
    assert abs(clip[-1] - clip[0]).max() > 60  # something moves
    os.makedirs(tmp_path / "runs")
    os.symlink(shapes_run, tmp_path / "runs" / "shapes")
    done = script("sample.py", "-n", 1, "--steps", 2, "--motion-steps", 2, folder=tmp_path)
    assert done.returncode == 0 and "in runs/shapes/samples" in done.stdout, done.stderr


def test_a_seed_gives_the_same_clips_whatever_the_batch_size(script, shapes_run, tmp_path):
    for out, size, seed in (("a", 3, 0), ("b", 1, 0), ("c", 3, 1)):
        done = script("sample.py", "--run-dir", shapes_run, "--num", 3, "--steps", 3, "--motion-steps", 3,
                      "--batch-size", size, "--seed", seed, "--eta", 0.5, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    a, b, c = (clips_in(tmp_path / out).astype(int) for out in "abc")
    assert abs(a - b).max() <= 2  # rounding, and the video codec's answer to it
    assert abs(a - c).max() > 5


def test_ranks_share_the_sampling(script, shapes_run, tmp_path):
    flags = ["--run-dir", shapes_run, "-n", 5, "--steps", 2, "--motion-steps", 2, "--batch-size", 2]
    one = script("sample.py", *flags, "--out", tmp_path / "one")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          os.path.join(ROOT, "sample.py"), *map(str, flags), "--out", tmp_path / "two"],
                         capture_output=True, text=True, timeout=200)
    assert one.returncode == two.returncode == 0, two.stderr
    assert abs(clips_in(tmp_path / "one").astype(int) - clips_in(tmp_path / "two")).max() <= 2
    assert (tmp_path / "one/captions.txt").read_text() == (tmp_path / "two/captions.txt").read_text()
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))


def test_real_clips_through_a_part_of_the_model(script, shapes_run, tmp_path):
    for flag in ("--reconstruct", "--predict-motion"):
        done = script("sample.py", "--run-dir", shapes_run, flag, "--num", 3, "--motion-steps", 2,
                      "--out", tmp_path / flag)
        assert done.returncode == 0, done.stderr
        real = clips_in(tmp_path / flag / "real")
        assert real.shape == clips_in(tmp_path / flag / "fake").shape == (3, 6, 16, 16, 3)
        expected = MovingShapes(6, 16, 0, split="test")[1]["video"].permute(1, 2, 3, 0).numpy() * 127.5 + 127.5
        assert abs(real[1].mean() - expected.mean()) < 4


def test_all_of_an_explicit_data_set_or_split_is_used_and_lossless_files_hold_its_very_frames(
        script, shapes_run, video_folder, tmp_path):
    lists = {"all": None, "some": ["class0/0.gif", "class1/1.avi 2", "class1/5.avi 2"]}
    for name, lines in lists.items():
        split = ["--split", tmp_path / "list.txt"] if lines else []
        (tmp_path / "list.txt").write_text("\n".join(lines or []))
        done = script("sample.py", "--run-dir", shapes_run, "--reconstruct", "--data", video_folder, *split,
                      "--num", 200, "--lossless", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert f"{3 if lines else 9} clips, not 200: the data set has no more" in done.stdout
    assert len(os.listdir(tmp_path / "all" / "real")) == 9  # of nine files, one is broken and replaced by another
    written = [read_clip(str(tmp_path / "some" / "real" / f"0000{i}.mkv"), 6) for i in range(3)]
    assert rate_of(tmp_path / "some" / "real" / "00000.mkv") == 10  # theirs, not the 8 of the run's shapes
    dataset = VideoFolder(video_folder, 6, 16, tmp_path / "list.txt")
    expected = [dataset[int(i)]["video"] for i in np.random.default_rng(0).permutation(3)]
    assert all(np.array_equal(clip, to_uint8(video)) for clip, video in zip(written, expected))


def test_the_clips_kept_out_of_training_do_not_depend_on_the_seed_of_sampling(script, shapes_run, tmp_path):
    for seed in (0, 1):
        done = script("sample.py", "--run-dir", shapes_run, "--reconstruct", "--num", 2, "--seed", seed, "--out",
                      tmp_path / str(seed))
        assert done.returncode == 0, done.stderr
    assert np.array_equal(*(clips_in(tmp_path / seed / "real") for seed in "01"))


def test_an_autoencoder_in_training_can_be_looked_at_and_stages_of_another_one_not(script, shapes_run, tmp_path):
    shutil.copytree(shapes_run, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "autoencoder.pt", weights_only=True)
    state |= dict(fingerprint=None, encodings=None, step=2)
    torch.save(state, tmp_path / "run" / "autoencoder.pt")
    done = script("sample.py", "--run-dir", tmp_path / "run", "--reconstruct", "--num", 1)
    assert done.returncode == 0 and "autoencoder.pt is unfinished: step 2 of 4" in done.stdout, done.stderr
    done = script("sample.py", "--run-dir", tmp_path / "run", "--num", 1)
    assert done.returncode == 1 and "has no complete encodings: finish autoencoder.py first" in done.stderr


def test_few_clips_of_a_large_folder_are_of_all_its_classes(script, tmp_path):
    shapes = MovingShapes(6, 16)
    for i in range(12):
        os.makedirs(tmp_path / "videos" / f"class{i // 4}", exist_ok=True)
        write_video(str(tmp_path / "videos" / f"class{i // 4}" / f"{i}.mp4"), shapes[i]["video"], 10)
    done = script("autoencoder.py", "--data", tmp_path / "videos", *TINY, "--clips", 6, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    clips = EncodedClips(tmp_path / "run")
    assert len(clips) == 6 and {clips[i]["label"] for i in range(6)} == {0, 1, 2}


def test_a_folder_of_videos_goes_through_all_four_scripts(script, video_folder, tmp_path):
    run = tmp_path / "run"
    sizes = ["--size", 40, 64, "--frames", 9, "--patch", 4, "--content-patch", 8]
    done = script("autoencoder.py", "--preset", "ucf101", "--data", video_folder, *TINY, *sizes[:7], "--clips", 0,
                  "--clips-per-video", 2, "--workers", 1, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "broken.mp4" in done.stderr + done.stdout
    clips = EncodedClips(run)
    assert clips.classes == ["class0", "class1"] and clips.motion_shape == (8, 9, 10 + 16)
    assert len(clips) == 14  # of nine files, one is kept out of training and one is broken
    for stage, patch in (("content_diffusion.py", ["--patch", 8]), ("motion_diffusion.py", sizes[7:])):
        done = script(stage, "--run-dir", run, "--model", "mini", *patch, *TINY_DIFFUSION, "--workers", 0)
        assert done.returncode == 0, done.stderr
    done = script("sample.py", "--run-dir", run, "--label", "class1", "--num", 2, "--steps", 2, "--motion-steps", 2,
                  "--sampler", "dpm++", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert read_clip(str(tmp_path / "out" / "00001.mp4"), 9).shape == (9, 40, 64, 3)
    assert rate_of(tmp_path / "out" / "00001.mp4") == 10  # as the training videos
    assert VideoFolder(video_folder, 9, 16, stride=2).frame_rate() == 5
    assert (tmp_path / "out" / "captions.txt").read_text() == "class1\nclass1\n"


def rate_of(path):
    with av.open(str(path)) as file:
        return file.streams.video[0].average_rate


def test_every_preview_logs_the_loss_of_test_clips_by_averaged_weights_and_fixed_noise(shapes_run):
    autoencoder, _, _ = load_autoencoder(shapes_run, torch.device("cpu"))
    test, clips = EncodedClips(shapes_run).test_clips(), MovingShapes(6, 16, 0, "test")
    assert len(test["label"]) == len(test["caption"]) == 64 and test["caption"][5] == clips[5]["caption"]
    content, _ = autoencoder.encode(clips[5]["video"][None])
    assert torch.allclose(test["content"][5], content[0], atol=1e-3)
    for stage, load in (("content", load_content), ("motion", load_motion)):
        model, _, diffusion, _ = load(shapes_run)
        x = test["content"] if stage == "content" else autoencoder.normalise(test["motion"])
        eps, losses = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), []
        for i in range(64):
            given = [test["content"][i, None]] * (stage == "motion")
            t = torch.tensor([int(i * 999 / 63)])
            abar = diffusion.abar[t]
            x_t = abar.sqrt() * x[i] + (1 - abar).sqrt() * eps[i]
            v = abar.sqrt() * eps[i] - (1 - abar).sqrt() * x[i]
            losses.append((model(x_t[None], t, *given, test["label"][i, None])[0] - v).square().mean().item())
        with open(os.path.join(shapes_run, f"{stage}.csv")) as file:
            logged = [row["test_loss"] for row in csv.DictReader(file)]
        assert logged[0] == "" and float(logged[1]) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("flags", [["--content", "mean"], ["--content", "frame"], ["--motion-channels", "16"],
                                   ["--no-smooth", "--loss", "l1"], ["--accumulate", "2", "--checkpointing"]])
def test_each_ablation_is_a_flag(script, tmp_path, flags):
    done = script("autoencoder.py", *TINY, "--run-dir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert "encoded 40 clips" in done.stdout


def test_bfloat16_is_nearly_float32(script, shapes_run, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        for stage in ("content", "motion"):
            os.makedirs(tmp_path / dtype, exist_ok=True)
            for name in ("autoencoder.pt", "encodings"):  # one set of encodings serves many runs
                if not (tmp_path / dtype / name).exists():
                    os.symlink(os.path.join(shapes_run, name), tmp_path / dtype / name)
            done = script(f"{stage}_diffusion.py", "--run-dir", tmp_path / dtype, "--model", "mini", *TINY_DIFFUSION,
                          "--workers", 0, "--dtype", dtype)
            assert done.returncode == 0, done.stderr
            with open(tmp_path / dtype / f"{stage}.csv") as file:
                losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    exact, rough = losses[:2], losses[2:]
    assert exact != rough and np.allclose(exact, rough, rtol=0.02)


def test_prompts_of_any_kind_are_read_and_written(tmp_path):
    """With a byte order mark, empty, or with a letter that UTF-8 has not (a surrogate, from a Latin-1 command line)."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa caf\xe9\r\n\r\n a dog \n".encode())
    args = dict(run_dir="run", label=None, num=None, prompt=None, prompts=str(tmp_path / "prompts.txt"))
    assert sample.read_wishes(SimpleNamespace(**args), True, [])[0] == ["a caf\xe9", "a dog"]
    args |= dict(prompt="", prompts=None)
    assert sample.read_wishes(SimpleNamespace(**args), True, [])[0] == [""] * 4
    data.write_lines(str(tmp_path / "captions.txt"), ["\udce9", "a \U0001f600"])
    assert (tmp_path / "captions.txt").read_bytes() == "?\na \U0001f600\n".encode()


MISTAKES = [  # command, words of the one line
    ("autoencoder.py --data /nowhere", "/nowhere does not exist"),
    ("autoencoder.py --data {empty}/gone", "; if it moved since training, give its new place"),
    ("autoencoder.py --data {run}/autoencoder.csv/clip.mkv", "is not a folder of videos, a .csv or a .tar"),
    ("autoencoder.py --preset ucf101", "needs --data"),
    ("autoencoder.py --size 18", "divisible by 4"),
    ("autoencoder.py --data {empty}", "no "),
    ("autoencoder.py --batch-size 0", "--batch-size"),
    ("autoencoder.py --shard-size 0", "--shard-size: 0 must be a whole number from 1"),
    ("autoencoder.py --lr nan", "--lr: nan must be a number from 0"),
    ("autoencoder.py --seed -1", "--seed: -1 must be a whole number from 0"),
    ("content_diffusion.py --preview-every 0", "--preview-every: 0 must be a whole number from 1"),
    ("motion_diffusion.py --drop 2", "--drop: 2 must be a number from 0 to 1"),
    ("autoencoder.py --steeps 3", "unrecognized arguments: --steeps 3"),
    ("autoencoder.py --preset nonsense", "invalid choice"),
    ("autoencoder.py --run-dir {run}", "exists: --resume goes on"),
    ("autoencoder.py --run-dir {run} --resume --width 32", "trained with --width 16, not 32"),
    ("autoencoder.py --encode --run-dir {empty}", "no {empty}/autoencoder.pt"),
    ("autoencoder.py --run-dir {run} --resume --data {videos}", "trained, on shapes: add --encode to encode {videos}"),
    ("autoencoder.py --encode --run-dir {half}", "stopped after step 2 of 4: finish it with --resume"),
    ("content_diffusion.py --run-dir {empty}", "no {empty}/autoencoder.pt"),
    ("content_diffusion.py --run-dir {run}", "exists: --resume goes on"),
    ("content_diffusion.py --run-dir {run} --preset ucf101 --resume", "trained with --preset shapes, not ucf101"),
    ("content_diffusion.py --run-dir {other} --dit DiT-XL-2-256x256.pt --model sd", "--dit for the other models"),
    ("motion_diffusion.py --run-dir {empty}", "no {empty}/autoencoder.pt"),
    ("motion_diffusion.py --run-dir {other} --content-patch 5", "patches of 5"),
    ("motion_diffusion.py --run-dir {bare}", "{bare} has no complete encodings"),
    ("sample.py --run-dir {empty}", "no {empty}/autoencoder.pt"),
    ("sample.py --run-dir {swapped}", "was written by content_diffusion.py, not by motion_diffusion.py"),
    ("sample.py --run-dir {run} --label hexagon", "--label hexagon is not one of the 12 classes: circle moving left"),
    ("sample.py --run-dir {run} --prompt hello", "conditioned on classes"),
    ("sample.py --run-dir {run} --out {run}", "not an empty folder"),
    ("sample.py --run-dir {run} --image {run}/motion.csv", "cannot be read as a picture"),
    ("sample.py --run-dir {run} --steps 0", "--steps: 0 must be a whole number from 1"),
    ("sample.py --run-dir {run} --guidance nan", "nan must be a number from 0"),
    ("sample.py --run-dir {run} --steps 1001", "--steps and --motion-steps are at most 1000"),
    ("sample.py --run-dir {run} --fps 0", "0 must be a whole number from 1"),
    ("sample.py --run-dir {run} --sampler dpm++ --eta 0.5", "deterministic"),
    ("sample.py --run-dir {run} --reconstruct --label square", "--label does not go with real clips: drop it"),
    ("sample.py --run-dir {run} --reconstruct --split list.txt", "--data shapes is not one: drop it"),
    ("autoencoder.py --split list.txt", "--split is for a folder of videos without captions"),
    ("sample.py --run-dir {run} --reconstruct --predict-motion", "give only one of --reconstruct and --predict-motion"),
    ("sample.py --run-dir {run} --out {run}/motion.csv/out", "Not a directory: '{run}/motion.csv/out'"),
]


@pytest.fixture(scope="module")
def places(shapes_run, video_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for name in ("empty", "swapped", "other", "bare", "half"):
        os.makedirs(root / name)
    for name in ("autoencoder.pt", "content.pt"):
        os.symlink(os.path.join(shapes_run, name), root / "swapped" / name)
    os.symlink(os.path.join(shapes_run, "content.pt"), root / "swapped" / "motion.pt")
    for name in ("autoencoder.pt", "encodings"):
        os.symlink(os.path.join(shapes_run, name), root / "other" / name)
    state = torch.load(os.path.join(shapes_run, "autoencoder.pt"), weights_only=True)
    torch.save(state | dict(encodings=None), root / "bare" / "autoencoder.pt")
    torch.save(state | dict(encodings=None, step=2), root / "half" / "autoencoder.pt")
    return dict(run=shapes_run, videos=video_folder,
                **{name: root / name for name in ("empty", "swapped", "other", "bare", "half")})


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_costs_one_clear_line(script, places, tmp_path, command, words):
    arguments = command.format(**places).split()
    if "--run-dir" not in arguments:
        arguments += ["--run-dir", str(tmp_path / "new")]
    done = script(*arguments)
    assert done.returncode in (1, 2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 or "left out" in done.stderr, done.stderr
    assert lines[-1].startswith(arguments[0]) and words.format(**places) in lines[-1], lines[-1]
    assert not (tmp_path / "new").exists()


def test_a_folder_of_unusable_videos_is_one_clear_line(script, video_folder, tmp_path):
    done = script("autoencoder.py", "--data", video_folder, "--frames", 31, "--run-dir", tmp_path / "new")
    lines = [line for line in done.stderr.splitlines() if "left out: " not in line and "it/s" not in line]
    assert done.returncode == 1 and "20 videos in a row cannot be used; the last is" in lines[-1]
    assert "has 30 frames, 31 needed" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "new").glob("*.pt"))


@pytest.mark.parametrize("name", ["autoencoder", "content_diffusion", "motion_diffusion", "sample", "fvd"])
def test_help_is_grouped_and_names_the_flags_that_must_hold(script, name):
    done = script(f"{name}.py", "--help")
    assert done.returncode == 0
    training = "--preset --data --run-dir --steps --batch-size --lr --seed --resume --compile --workers"
    flags = {"sample": "--run-dir --label --prompt --prompts --num --guidance --steps --motion-steps --seed --out "
                       "--image", "fvd": "--i3d --num --frames"}.get(name, training)
    for flag in flags.split():
        assert flag in done.stdout
    assert "(default: None)" not in done.stdout


@pytest.mark.parametrize("name", ["autoencoder", "content_diffusion", "motion_diffusion", "sample", "fvd"])
def test_torchrun_takes_no_flag_of_ours_for_its_own(name):
    """Python's argparse looks for torchrun's flags behind the script's name too, and takes a prefix for the whole."""
    theirs = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for action in importlib.import_module(name).flags()._actions:
        taken = [own for own in action.option_strings if own != "-h" and any(
            other.startswith(own) and (own.startswith("--") or other == own) for other in theirs)]
        assert len(taken) < len(action.option_strings) or taken in ([], ["--help"]), f"{name}.py {taken}"
