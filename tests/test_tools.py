"""Proves that the tools that the README's tables come from measure what they say."""

import re
import sys

import ablations
import draw
import judge
import numpy as np
import pytest
import test_fvd
import torch
import variations
from PIL import Image

import fvd
from autoencoder import psnr
from data import MovingShapes, read_clip, to_uint8, write_video


def test_the_judge_s_real_clips_are_in_no_run():
    seeds = [judge.TRAINING, judge.REFERENCE]
    sets = [MovingShapes(16, 32, seed, split) for seed, split in
            [(0, "train"), (0, "test"), (1, "train"), (2, "test"), *((seed, "train") for seed in seeds)]]
    for i in (0, 1, 599):
        clips = torch.stack([clips[i]["video"] for clips in sets])
        assert torch.cdist(clips.flatten(1), clips.flatten(1)).add(1e9 * torch.eye(len(sets))).min() > 1


def test_each_variation_of_fvd_is_what_fvd_py_gives_for_data_changed_in_that_way(tmp_path, capsys):
    clips = {"real": MovingShapes(14, (24, 40)), "fake": MovingShapes(9, 16, seed=1)}
    for name, ending in (("real", "mkv"), ("fake", "mkv"), ("first", "mkv"), ("recoded", "mp4")):
        (tmp_path / name).mkdir()
        for i in range(8):
            clip = to_uint8(clips["fake" if name == "recoded" else "real" if name == "first" else name][i]["video"])
            write_video(str(tmp_path / name / f"{i}.{ending}"), clip[: 9 if name == "first" else None], 8)
    tiny, i3d = test_fvd.save_script(test_fvd.Tiny(), tmp_path / "tiny.pt"), str(tmp_path / "i3d_pretrained_400.pt")
    torch.save(fvd.load_detector("random").network.state_dict(), i3d)  # the published layout

    def figure(real, fake, detector, *flags):
        fvd.main([str(tmp_path / real), str(tmp_path / fake), "--i3d", detector, "--frames", "9", "-n", "6", *flags])
        return float(re.match(r"FVD ([\d.]+)", capsys.readouterr().out)[1])

    expected = {
        "as fvd.py does it": figure("real", "fake", tiny),
        "another seed: other clips": figure("real", "fake", tiny, "--seed", "1"),
        "first frames of REAL's videos, not random ones": figure("first", "fake", tiny),
        "codec: FAKE through .mp4 (H.264)": figure("real", "recoded", tiny, "--size", "16"),
        "detector: I3D as VideoGPT, TATS and PVDM use it": figure("real", "fake", i3d),
    }
    variations.main([str(tmp_path / "real"), str(tmp_path / "fake"), "--i3d", tiny, i3d, "--frames", "9", "-n", "6"])
    lines = capsys.readouterr().out.splitlines()
    found = {line[:52].strip(): [float(x) for x in re.findall(r"[-+]?[\d.]+", line[52:])] for line in lines[1:]}
    assert "codecs ffv1 and ffv1" in lines[0] and len(found) == 12
    for what, value in expected.items():
        assert found[what][1] == pytest.approx(value, abs=0.011), what
        assert found[what][2] == pytest.approx(value - expected["as fvd.py does it"], abs=0.021), what
    assert found["N: 50% of the clips of both"][0] == 3 and found["N: 25% of the clips of both"][0] == 2
    # The rest against features that are computed here
    detector, size = fvd.load_detector(tiny), [16, 16]
    order = np.random.default_rng(0).permutation(8)[:6]

    def read(name, i, size=None):
        seed = [0, fvd.zlib.crc32(str(i).encode())]
        return read_clip(str(tmp_path / name / f"{i}.mkv"), 9, size, rng=np.random.default_rng(seed))

    def squash(clip):
        frames = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
        frames = torch.nn.functional.interpolate(frames, (16, 16), mode="bilinear", antialias=True)
        return frames.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    fake = np.concatenate([detector([read("fake", i)]) for i in order])
    for what, clips in (("size: REAL as it is, the detector alone resizes", [read("real", i) for i in order]),
                        ("size: REAL squashed to FAKE's shape, not cropped", [squash(read("real", i)) for i in order])):
        real = np.concatenate([detector([clip]) for clip in clips])
        assert found[what][1] == pytest.approx(fvd.frechet_distance(real, fake), abs=0.011), what
    real = np.concatenate([detector([read("real", i, size)]) for i in order])
    real, fake = (rows.mean(0) + (rows - rows.mean(0)) * (6 / 5) ** 0.5 for rows in (real, fake))
    assert found["covariance over N - 1"][1] == pytest.approx(fvd.frechet_distance(real, fake), abs=0.011)


def test_the_ablations_go_on_where_they_stopped_and_show_no_difference_that_the_spread_could_be(
        script, tmp_path, monkeypatch, capsys):
    def run(*words):
        commands.append(words)
        done = script(*words)
        assert done.returncode == 0, done.stderr
        if len(commands) == 5:
            raise KeyboardInterrupt

    commands, folder = [], tmp_path / "out"
    monkeypatch.setattr(ablations, "run_script", run)
    monkeypatch.setattr(ablations, "SAMPLES", {name: ablations.SAMPLES[name] for name in (
        "real", "reconstruction", "frames24")})
    monkeypatch.setattr(sys, "argv", ["ablations.py", str(folder), "--seeds", "1", "--num", "24", "--tiny"])
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    done = ablations.read_scores(f"{folder}/scores.csv")
    assert set(done) == {(0, "real"), (0, "reconstruction")} and len(commands) == 5
    ablations.main()
    assert [words[0] for words in commands[:3]] == ["autoencoder.py", "content_diffusion.py", "motion_diffusion.py"]
    assert commands[4] == commands[5] and len(commands) == 7 and "--resume" in commands[4]
    again = ablations.read_scores(f"{folder}/scores.csv")
    assert len(again) == 3 and all(again[key] == done[key] for key in done)
    samples = f"{folder}/seed0/samples/frames24"
    clips, originals = (judge.read_folder(f"{samples}/{part}", 24)[0] for part in ("fake", "real"))
    assert again[0, "frames24"]["PSNR"] == pytest.approx(psnr(clips, originals), abs=1e-3)
    assert "motion" not in again[0, "frames24"]
    assert again[0, "real"]["distance"] < again[0, "reconstruction"]["distance"]
    # Verdicts: over three seeds, the difference of the means against the two deviations together
    scores = {(seed, name): {"distance": mean + spread * (seed - 1)} for seed in range(3) for name, mean, spread in (
        ("first", 1.0, 0.1), ("same", 1.15, 0.1), ("worse", 1.25, 0.1), ("better", 0.5, 0.2))}
    assert ablations.summary(scores, "same", "distance") == pytest.approx((1.15, 0.1, 3))
    for name, words in (("first", ""), ("same", "not shown"), ("worse", "worse"), ("better", "better")):
        assert ablations.verdict(scores, name, "first", "distance") == words
    one = {key: value for key, value in scores.items() if key[0] == 0}
    assert ablations.verdict(one, "better", "first", "distance") == "one seed: not shown"
    (folder / "table.md").unlink()
    ablations.main()  # a finished folder: everything is written again, nothing drawn
    assert len(commands) == 7 and "| L = 24 | " in (folder / "table.md").read_text()
    assert (folder / "ablations.png").stat().st_size > 1000


def test_the_loss_picture_shows_the_losses_of_test_clips_where_a_run_logged_them(tmp_path, monkeypatch):
    red = []
    monkeypatch.setattr(draw, "ASSETS", str(tmp_path))
    for row in ("1,0.5,\n2,0.2,\n", "1,0.5,\n2,0.2,0.3\n"):
        for stage in ("autoencoder", "content", "motion"):
            (tmp_path / f"{stage}.csv").write_text("step,loss,test_loss\n" + row)
        draw.losses(str(tmp_path))
        with Image.open(tmp_path / "losses.png") as picture:
            red.append((np.asarray(picture.convert("RGB")) == draw.RED).all(2).sum())
    assert red[0] == 0 and red[1] > 3 * 30  # three dots and their legend
