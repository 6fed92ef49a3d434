"""Proves that the scripts do together what the README says, at tiny sizes: from moving shapes, folders of videos, or a
Stable Diffusion file and captions to clips; what does not belong together is refused; a mistake costs one line."""

import argparse
import importlib
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, rows_of
from PIL import Image

import data
import sample
from autoencoder import load_autoencoder
from content_diffusion import load_content
from data import MovingShapes, read_clip, write_video
from motion_diffusion import load_motion

SD = f"{ROOT}/tools/tiny-sd.safetensors"
STAGES = ("autoencoder", "content_diffusion", "motion_diffusion")
STEPS = "--steps 4 --batch-size 4 --log-every 2 --save-every 2 --preview-every 4 --workers 0"
SMALL = "--width 16 --heads 2 --depth 1"
FEW = "--steps 3 --motion-steps 2"
LONG = "a very " + "long " * 72 + "ship purple giraffe"  # 77 tokens are START, 75 words and END


@pytest.fixture(scope="session")
def run(script):
    """run("sample.py --num 3", "--prompt", "two words") runs a command, which must succeed, and returns its result."""

    def call(command, *more, **settings):
        done = script(*command.split(), *more, **settings)
        assert done.returncode == 0, done.stderr
        return done

    return call


def encoded(folder):
    data.open_shard.cache_clear()
    return data.EncodedClips(str(folder), load(folder, "autoencoder"))


def clips_in(folder, ending="mp4", frames=6):
    return np.stack([read_clip(path, frames) for path in sorted(folder.glob(f"*.{ending}"))]).astype(int)


def copy(folder, to, *names):
    """A run folder with these files of another, or all, by hard links: scripts replace files, they never change one."""
    return shutil.copytree(folder, to, copy_function=os.link, ignore=lambda _, found: [
        name for name in found if names and name not in names and not name.startswith("shard-")])


@pytest.fixture(scope="module")
def shapes(run, tmp_path_factory):
    """The four scripts, one after the other, on the shapes. v: after four steps a model that predicts x answers 0."""
    folder = tmp_path_factory.mktemp("shapes") / "run"
    run(f"autoencoder.py {SMALL} --size 16 --frames 6 --clips 40 --shard-size 16 {STEPS} --run-dir {folder}")
    for stage in STAGES[1:]:
        run(f"{stage}.py --predict v {STEPS} --run-dir {folder}")
    run(f"sample.py {FEW} --num 3 --run-dir {folder}")
    return folder


def test_the_run_folder_holds_what_the_design_says(shapes):
    assert (shapes / "samples" / "samples.gif").stat().st_size and (shapes / "samples" / "samples.png").stat().st_size
    assert clips_in(shapes / "samples").shape == (3, 6, 16, 16, 3)
    for stage, rate in (("autoencoder", 2e-3), ("content", 3e-3), ("motion", 2e-3)):
        state, rows = load(shapes, stage), rows_of(shapes, stage)
        assert {"step", "args", "config", "model", "optimizer"} <= state.keys() and state["step"] == 4
        assert [row["step"] for row in rows] == ["2", "4"]
        assert (shapes / "previews" / f"{stage}-000004.png").stat().st_size > 0
        assert float(rows[1]["lr"]) == pytest.approx(rate * (0.5 + 0.5 * math.cos(math.pi * 3 / 4)))  # of 4 --steps


def test_ranks_share_the_sampling_and_bfloat16_is_nearly_float32(run, processes, shapes, tmp_path):
    flags = f"sample.py {FEW} --num 5 --batch-size 2 --run-dir {shapes} --out {tmp_path}/"
    done = processes.finish(*processes.ranks(*[f"{flags}two".split()] * 2))
    assert [rank.returncode for rank in done] == [0, 0], done
    run(f"{flags}one")
    run(f"{flags}rough --dtype bfloat16")
    one, two, rough = (tmp_path / out for out in ("one", "two", "rough"))
    assert abs(clips_in(one) - clips_in(two)).max() <= 2  # of rounding, and the video codec's answer to it
    assert 0 < abs(clips_in(one) - clips_in(rough)).mean() < 5
    assert (one / "captions.txt").read_text() == (two / "captions.txt").read_text()


def flags_of(module, *words):
    """What a script makes of a command line, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module, *map(str, words)])
        flags = importlib.import_module(module.removesuffix(".py")).read_flags()
    return flags if module == "sample.py" else flags[0]


def test_clips_come_from_the_models_beside_the_code_until_all_three_of_ones_own_are_trained(
        run, shapes, tmp_path, monkeypatch):
    assert "pretrained/shapes" in run(f"sample.py -n 2 {FEW} --out clips", folder=tmp_path).stdout
    for clip in clips_in(tmp_path / "clips", frames=16):
        assert abs(clip[-1] - clip[0]).max() > 60  # something moves
    monkeypatch.chdir(tmp_path)
    for names in (["autoencoder.pt"], ["autoencoder.pt", "motion.pt"], ["autoencoder.pt", "motion.pt", "content.pt"]):
        copy(shapes, tmp_path / "runs" / "shapes", *names)
        assert (os.path.relpath(flags_of("sample.py").run_dir) == "runs/shapes") == (len(names) == 3)
        shutil.rmtree("runs")


def test_another_seed_reconstructs_other_clips(run, shapes, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"sample.py --reconstruct --num 2 --seed {seed} --lossless --run-dir {shapes} --out {tmp_path}/{out}")
    a, b, c = (clips_in(tmp_path / out / "real", "mkv") for out in "abc")
    assert np.array_equal(a, b) and all(abs(one - two).max() > 5 for one, two in zip(a, c))
    first = MovingShapes(6, 16, 0, "test")[0]["video"].permute(1, 2, 3, 0)
    assert np.array_equal(a[0], first.add(1).mul(127.5).round())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes, 1 and b, of videos that are not square, in two formats; one is broken, two have captions."""
    root, clips = tmp_path_factory.mktemp("videos"), MovingShapes(30, (40, 64), seed=5)
    for i in range(8):
        os.makedirs(root / "1b"[i % 2], exist_ok=True)
        write_video(str(root / "1b"[i % 2] / f"{i}.{'mp4' if i % 3 else 'gif'}"), clips[i]["video"], 10)
    (root / "1" / "broken.mp4").write_bytes(b"not a video")
    for i in (4, 6):
        (root / "1" / f"{i}.txt").write_text(f"the caption of {i}\n")
    return root


@pytest.fixture(scope="module")
def filmed(run, videos, tmp_path_factory):
    """The chain on that folder, and what stage 1 says."""
    folder = tmp_path_factory.mktemp("filmed") / "run"
    done = run(f"autoencoder.py --preset ucf101 --data {videos} {SMALL} {STEPS} --size 40 64 --frames 9 --patch 4 "
               f"--clips-per-video 2 --workers 1 --shard-size 8 --run-dir {folder}")
    for stage, patch in zip(STAGES[1:], ("--patch 8", "--content-patch 8")):
        run(f"{stage}.py {STEPS} --model mini {patch} --run-dir {folder}")
    return SimpleNamespace(folder=folder, said=done.stdout, named=done.stderr)


def rate_of(path):
    with data.open_video(str(path)) as (_, stream):
        return stream.average_rate


def test_a_folder_of_videos_goes_through_all_four_scripts(run, filmed, tmp_path):
    assert "9 videos" in filmed.said and "2 classes" in filmed.said and filmed.named.count("broken.mp4") == 1
    clips, state = encoded(filmed.folder), load(filmed.folder, "autoencoder")
    assert state["classes"] == ["1", "b"] and clips.motion_shape == (8, 9, 10 + 16)
    assert flags_of("autoencoder", "--data", "x").clips == 0  # with the small preset too, all videos are encoded
    assert len(clips) == 14 and "2 left out" in filmed.said  # two of each file; one is kept for testing, one is broken
    assert {"the caption of 4", "the caption of 6", "1", "b"} == {clips[i]["caption"] for i in range(14)}
    run(f"sample.py --label 1 --num 2 {FEW} --run-dir {filmed.folder} --out {tmp_path}/out")
    assert clips_in(tmp_path / "out", frames=9).shape == (2, 9, 40, 64, 3)
    assert rate_of(tmp_path / "out" / "00001.mp4") == 10  # as the training videos
    assert (tmp_path / "out" / "captions.txt").read_text() == "1\n1\n"


def test_a_label_is_a_name_and_a_number_only_where_no_class_has_that_name():
    for label, expected in (("1", [0, 0, 0]), ("0", [0, 0, 0]), ("b", [1, 1, 1]), ("2", [2, 2, 2]), (None, [0, 1, 2])):
        args = flags_of("sample.py", "--num", 3, *(["--label", label] if label else []))
        assert sample.read_wishes(args, False, ["1", "b", "c"])[0] == expected


def test_real_clips_are_of_all_that_is_named_and_of_the_run_s_own_classes(run, filmed, videos, tmp_path):
    """The data set's class b has number 0, the run's number 1."""
    shutil.copytree(videos / "b", tmp_path / "some" / "b")
    command = f"sample.py --predict-motion --data {tmp_path}/some --run-dir {filmed.folder}"
    assert "4 clips, not 200" in run(f"{command} --num 200 {FEW} --out {tmp_path}/out").stdout
    assert clips_in(tmp_path / "out" / "real", frames=9).shape[0] == 4
    state, folder = load(filmed.folder, "autoencoder"), copy(filmed.folder, tmp_path / "run", "content.pt", "motion.pt")
    assert sample.open_real(flags_of(*command.split()), state, False)[3] == {0: 1}
    torch.save(state | dict(args=state["args"] | dict(data=f"{tmp_path}/some"), step=3), folder / "autoencoder.pt")
    for where, told in (folder, True), (filmed.folder, False):
        said = run(f"sample.py --reconstruct --run-dir {where} --out {where}/out").stdout
        assert ("step 3 of 4" in said) == ("not all videos" in said) == told, said


def test_the_logged_test_loss_is_that_of_the_averaged_weights_on_the_test_clips(filmed):
    model, test = load_autoencoder(filmed.folder, torch.device("cpu"))[0], encoded(filmed.folder).test_clips()
    for stage, load_stage in (("content", load_content), ("motion", load_motion)):
        averaged, _, diffusion, _ = load_stage(filmed.folder)
        x = test["content"] if stage == "content" else (test["motion"] - model.motion_mean) / model.motion_std
        given = [test["content"]] * (stage == "motion") + [test["label"]]
        expected = diffusion.test_loss(averaged.eval(), x, *given)
        logged = [row["test_loss"] for row in rows_of(filmed.folder, stage)]
        assert len(x) == 1 and logged[0] == "" and float(logged[1]) == pytest.approx(expected, rel=1e-4)


def test_captioned_shapes_go_from_the_shipped_file_to_clips_of_prompts(run, tmp_path):
    stage_1 = f"autoencoder.py --preset shapes_text --size 16 --frames 2 --clips 8 {SMALL}"
    for command in (stage_1, "content_diffusion.py", "motion_diffusion.py"):
        run(f"{command} {STEPS} --run-dir run", folder=tmp_path)  # from any working directory
    run(f"sample.py {FEW} -n 2 --run-dir run --out out --prompt", "a red circle moving left", folder=tmp_path)
    assert clips_in(tmp_path / "out", frames=2).shape == (2, 2, 16, 16, 3)


@pytest.fixture(scope="module")
def captioned(run, tmp_path_factory):
    """The chain on a CSV, one of whose videos has vanished, and a Stable Diffusion file, gone when training goes on."""
    root, clips, rows = tmp_path_factory.mktemp("captioned"), MovingShapes(10, (18, 40), seed=3), ["path,caption"]
    folder, sd = root / "run", shutil.copy(SD, root / "tiny-sd.safetensors")
    for i in range(8):
        rows.append(f"{i}.mp4,{clips[i]['caption']}")
        write_video(str(root / f"{i}.mp4"), clips[i]["video"], 10)
    os.remove(root / "3.mp4")
    (root / "list.csv").write_text("\n".join(rows))
    done = run(f"autoencoder.py --preset webvid_sd21 --data {root}/list.csv --sd {sd} --size 16 32 --frames 2 {SMALL} "
               f"{STEPS} --steps 2 --run-dir {folder}")
    assert "3.mp4" in done.stderr and "1 left out" in done.stdout
    steps = f"{STEPS} --steps 2 --batch-size 2 --run-dir {folder}"
    run(f"content_diffusion.py --sd {sd} {steps}")  # the preset is now the run's
    run(f"motion_diffusion.py --text {sd} --model mini --content-patch 4 {steps}")
    os.remove(sd)
    for stage in STAGES[1:]:
        run(f"{stage}.py --resume --steps 3 --run-dir {folder}")
    return root


def test_prompts_and_pictures_become_clips(run, captioned, tmp_path):
    """A picture is the content frame: it needs no content model."""
    (tmp_path / "prompts.txt").write_bytes(f"\ufeffa caf\xe9\r\n\r\n{LONG}\n a dog \n".encode())
    done = run(f"sample.py --prompts {tmp_path}/prompts.txt {FEW} --run-dir {captioned}/run --out {tmp_path}/out")
    assert (tmp_path / "out" / "captions.txt").read_text() == f"a caf\xe9\n{LONG}\na dog\n"
    assert clips_in(tmp_path / "out", frames=2).shape == (3, 2, 16, 32, 3) and done.stderr.count("77 tokens") == 1
    copy(captioned / "run", tmp_path / "part", "autoencoder.pt", "motion.pt")
    for name in ("0", "1", "2", "3"):  # the classes of folders do not matter to a run on captions
        os.makedirs(tmp_path / "all" / name)
        write_video(f"{tmp_path}/all/{name}/x.mp4", MovingShapes(2, 32)[0]["video"], 10)
    run(f"sample.py --predict-motion --data {tmp_path}/all {FEW} -n 1 --run-dir {tmp_path}/part --out {tmp_path}/real")
    for colour in ((200, 30, 30), (30, 30, 200)):
        Image.new("RGB", (100, 70), colour).save(tmp_path / "photo.png")
        run(f"sample.py --image {tmp_path}/photo.png --prompt waves -n 2 {FEW} --run-dir {tmp_path}/part --out "
            f"{tmp_path}/{colour[0]}")
    red, blue = (clips_in(tmp_path / out, frames=2) for out in ("200", "30"))
    assert abs(red - blue).max() > 2 and abs(red[0] - red[1]).max() > 2


def times_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_shards_are_kept_while_all_is_the_same_and_models_of_other_encodings_are_refused(
        run, refused, shapes, videos, tmp_path):
    folder = copy(shapes, tmp_path / "run", "autoencoder.pt", "encodings")
    before, identity = times_in(folder / "encodings"), load(folder, "autoencoder")["identity"]
    run(f"autoencoder.py --encode --run-dir {folder}")
    assert times_in(folder / "encodings") == before and load(folder, "autoencoder")["identity"] == identity
    for flags, count, tests in ("--clips 56", 56, 64), ("--clips 24", 24, 64), (f"--data {videos} --clips 4", 4, 1):
        run(f"autoencoder.py --encode {flags} --run-dir {folder}")
        clips, before, identity = encoded(folder), identity, load(folder, "autoencoder")["identity"]
        assert count - ("data" in flags) <= len(clips) <= count and identity != before, flags  # one video is broken
        assert len(clips.test_clips()["label"]) == tests
        for name in ("content.pt", "motion.pt"):
            shutil.copy(shapes / name, folder)
        for command in (*(f"{stage}.py --resume" for stage in STAGES[1:]), "sample.py", "sample.py --predict-motion",
                        *(f"autoencoder.py {how}" for how in ("--encode", "--resume --steps 9"))):
            refused(f"{command} --run-dir {folder}", folder, "encodings")
        for name in ("content.pt", "motion.pt"):
            os.remove(folder / name)
    assert {clips[i]["label"] for i in range(len(clips))} == {0, 1}  # a few clips of a folder are of all its classes
    run(f"sample.py --reconstruct -n 1 --run-dir {folder} --out {tmp_path}/out")  # needs no other model
    refused(f"fvd.py {tmp_path}/out {tmp_path}/out/fake --i3d random", "out/real or")
    state = load(folder, "autoencoder")
    torch.save(state | dict(args=state["args"] | dict(lpips=["/gone", "/gone"])), folder / "autoencoder.pt")
    run(f"autoencoder.py --encode {folder} --seed 1 --run-dir {tmp_path}/new")  # needs no LPIPS
    assert load(tmp_path / "new", "autoencoder")["identity"] != identity


def test_a_model_that_does_not_know_no_class_is_drawn_without_guidance(run, refused, shapes, tmp_path):
    folder, state = shutil.copytree(shapes, tmp_path / "run"), load(shapes, "autoencoder")
    for classes, scale in (["a"], 1.0), ([], 1.0), (["a", "b"], 2.0):  # nor by default where all clips are of one class
        torch.save(state | dict(classes=classes), folder / "autoencoder.pt")
        args = flags_of("sample.py", "--run-dir", folder)
        assert sample.Sampler(args, torch.device("cpu"), torch.float32).args.guidance == scale
    for stage in ("motion", "content"):
        state = load(folder, stage)
        torch.save(state | dict(args=state["args"] | dict(drop=0.0)), folder / f"{stage}.pt")
        refused(f"sample.py --motion-guidance 2 --run-dir {folder}", "motion.pt", "--drop 0")
    refused(f"sample.py --run-dir {folder}", "content.pt", "--drop 0")
    run(f"sample.py {FEW} -n 1 --guidance 1 --run-dir {folder} --out {tmp_path}/out")


def test_motion_is_scaled_by_the_mean_and_deviation_that_its_model_learned(shapes, tmp_path):
    drawn = []
    for changed in ("nothing", "autoencoder", "motion"):
        folder = shutil.copytree(shapes, tmp_path / changed)
        if changed != "nothing":
            state = load(folder, changed)
            for numbers in (state, state["model"]):
                numbers |= dict(motion_mean=torch.full((8, 1, 1), 0.1), motion_std=torch.full((8, 1, 1), 0.7))
            torch.save(state, folder / f"{changed}.pt")
        args = flags_of("sample.py", "--run-dir", folder, *FEW.split())
        sampler = sample.Sampler(args, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            drawn.append(sampler.draw_motion(torch.zeros(2, 3, 16, 16), [3, 5], [0, 1]))
            pytest.raises(SystemExit, sampler.decode, torch.full((1, 3, 16, 16), torch.nan), drawn[0][:1]).match("NaN")
    assert torch.equal(drawn[0], drawn[1]) and (drawn[0] - drawn[2]).abs().max() > 0.05


def test_the_models_that_come_with_the_code_encode_into_a_folder_of_ones_own(run, refused, shapes, tmp_path):
    """Stages 2 and 3 can start there without stage 1's training; what comes without its optimizer is not trained on."""
    shipped, mine = shutil.copytree(f"{ROOT}/pretrained/shapes", tmp_path / "shipped"), tmp_path / "mine"
    before = times_in(shipped)
    run(f"autoencoder.py --encode {shipped} --clips 8 --run-dir {mine}")
    weights = [load(folder, "autoencoder")["model"] for folder in (shipped, mine)]
    assert all(torch.equal(weights[0][name].float(), weights[1][name]) for name in weights[0] if "motion_" not in name)
    shutil.copy(shipped / "motion.pt", mine)
    refused(f"motion_diffusion.py --resume --steps 1 --run-dir {mine}", "optimizer")
    for flags in ("--encode", "--resume --steps 9000"):
        refused(f"autoencoder.py {flags} --run-dir {shipped}", shipped, "--encode")
    for more in ("", "--resume"):  # would take the place of a trained autoencoder
        refused(f"autoencoder.py --encode {shapes} {more} --run-dir {mine}", "mine/autoencoder.pt exists")
    assert len(encoded(mine)) == 8 and times_in(shipped) == before


MISTAKES = """command | words of the line
autoencoder.py --steeps 3 --run-dir {new} | --steeps
content_diffusion.py --run-dir {shapes} --step 3 | --step 3
autoencoder.py --preset ucf101 --run-dir {new} | --data
autoencoder.py --preset webvid_sd15 --data {csv} --run-dir {new} | --sd
autoencoder.py --preset webvid_sd15 --data {csv} --sd /nowhere.ckpt --workers 0 --run-dir {new} | /nowhere.ckpt
autoencoder.py --preset webvid_sd15 --data {csv} --sd {sd} --size 16 18 --workers 0 --run-dir {new} | --size 16 18
autoencoder.py --size 18 --run-dir {new} | --size 18 18
autoencoder.py --size 64 48 32 --run-dir {new} | --size
autoencoder.py --data /nowhere --run-dir {new} | /nowhere
autoencoder.py --split list.txt --run-dir {new} | --split
autoencoder.py --stride 2 --run-dir {new} | --stride
autoencoder.py --batch-size 6 --accumulate 4 --run-dir {new} | --batch-size 6 | --accumulate 4
content_diffusion.py --run-dir {begun} --batch-size 6 --accumulate 4 | --batch-size 6 | --accumulate 4
motion_diffusion.py --run-dir {begun} --batch-size 6 --accumulate 4 | --batch-size 6 | --accumulate 4
autoencoder.py --run-dir {shapes} | {shapes}/autoencoder.pt exists | --resume
content_diffusion.py --run-dir {shapes} | {shapes}/content.pt exists | --resume
motion_diffusion.py --run-dir {shapes} | {shapes}/motion.pt exists | --resume
autoencoder.py --encode --run-dir {new} | no {new}/autoencoder.pt
autoencoder.py --resume --run-dir {new} | no {new}/autoencoder.pt
content_diffusion.py --run-dir {begun} --drop 10 | --drop
motion_diffusion.py --run-dir {begun} --ema 9 | --ema
content_diffusion.py --run-dir {latents} --preset shapes_text | tiny-sd.safetensors | --sd
motion_diffusion.py --run-dir {latents} --preset shapes_text | --text
sample.py --run-dir {text} --predict-motion --data {videos}/b | caption
autoencoder.py --encode --run-dir {shapes} --width 32 | --width 16 | 32
autoencoder.py --encode --run-dir {begun} --steps 9 | step 4 of 9
autoencoder.py --encode --run-dir {begun} --seed 1 | --seed 0
motion_diffusion.py --run-dir {bare} | {bare} has no encodings | --encode
content_diffusion.py --run-dir {begun} --patch 5 | 16x16 | 5x5
content_diffusion.py --run-dir {begun} --model sd | --sd
motion_diffusion.py --run-dir {begun} --content-patch 5 | --content-patch
motion_diffusion.py --run-dir {begun} --preset webvid_sd15 | --text
motion_diffusion.py --run-dir {begun} --preset shapes_text --steps 1 | --text
sample.py --run-dir {new} | no {new}/autoencoder.pt
sample.py --run-dir {shapes} --label hexagon | --label hexagon | circle moving left
sample.py --run-dir {shapes} --prompt hello | {shapes} | --label
sample.py --run-dir {text} | --prompt
sample.py --run-dir {shapes} --out {shapes} | --out {shapes}
sample.py --run-dir {shapes} --image {shapes}/motion.csv | --image {shapes}/motion.csv
sample.py --run-dir {shapes} --reconstruct --predict-motion | --reconstruct | --predict-motion
sample.py --run-dir {shapes} --predict-motion --data {videos} | classes 1, b
content_diffusion.py --run-dir {begun} --preset shapes_text | pixels | --sd
content_diffusion.py --run-dir {begun} --preset webvid_sd15 --model mini --steps 1 --workers 0 | webvid | --sd
sample.py --run-dir {shapes} --predict-motion --guidance 2 | --guidance
sample.py --run-dir {text} --prompt x --guidance 1 --negative-prompt y | --negative-prompt
""".splitlines()[1:]


def test_a_mistake_costs_one_line_and_leaves_nothing_behind(refused, shapes, videos, captioned, tmp_path):
    places = dict(shapes=shapes, videos=videos, text=captioned / "run", csv=captioned / "list.csv", sd=SD,
                  new=tmp_path / "new", bare=copy(shapes, tmp_path / "bare", "autoencoder.pt"),
                  begun=copy(shapes, tmp_path / "begun", "autoencoder.pt", "encodings"),
                  latents=copy(captioned / "run", tmp_path / "latents", "autoencoder.pt", "encodings"))
    for line in MISTAKES:
        refused(*line.format(**places).split(" | "))


def options_of(module):
    """The flags of a script, as argparse knows them."""
    def show(parser, *_):
        raise LookupError(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", show)
        flags_of(module)
    return caught.value.args[0]._actions[1:]


@pytest.mark.parametrize("module", STAGES)
def test_a_resumed_run_takes_what_changes_no_result_and_refuses_every_other_flag(refused, shapes, module, tmp_path):
    folder = copy(shapes, tmp_path / "run", "autoencoder.pt", *("content.pt", "motion.pt") * (module != "autoencoder"))
    allowed = {"steps", "workers", "batch_size", "save_every", "log_every", "preview_every", "dtype", "compile",
               "checkpointing", "accumulate"}
    saved, taken = load(shapes, module.split("_")[0])["args"], set()
    for action in options_of(module):
        before, flag = saved.get(action.dest), action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            words = [action.option_strings[int(bool(before))]]
        elif action.choices:
            words = [flag, next(choice for choice in action.choices if choice != before)]
        else:  # a switch, a number or some, or text
            other = "99" if action.type is int else "0.77" if action.type is float else "/nowhere"
            words = [flag, *[other] * (action.nargs if isinstance(action.nargs, int) else 1)]
        command = ["--run-dir", str(folder), "--resume", *words]
        if action.dest in allowed:
            assert getattr(flags_of(module, *command), action.dest) != before
            taken.add(action.dest)
        elif action.dest not in ("run_dir", "resume", "encode", "data"):  # of --data, the list of videos is compared
            refused(" ".join([f"{module}.py", *command]), words[0].replace("--no-", "--"))
    assert taken == allowed
