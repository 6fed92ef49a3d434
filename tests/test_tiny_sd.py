"""Proves that the tiny Stable Diffusion that the repository ships is what its script writes, and that it draws what is
named; that the preset shapes_text goes from that file to clips of prompts; and that its judge counts what it should."""

import csv
import functools
import hashlib
import os
import re
import shutil
import sys
import warnings

import claim
import judge_prompts as judge
import numpy as np
import pytest
import tiny_sd
import torch
from PIL import Image
from safetensors import safe_open
from tiny_sd import COLOURS, PAIRS, SHAPES, stills

from autoencoder import ImageAutoencoder, load_image_autoencoder, psnr, to_pixels
from content_diffusion import TextEncoder, UNet, load_content, load_stable_diffusion
from data import HELD_OUT, TINY_SD, MovingShapes, draw_clip, read_clip
from sample import Sampler, flags

# ---------------------------------------------------------------------------------------------------------------------
# The shipped file


def test_the_shipped_file_has_the_names_shapes_and_type_that_its_script_writes():
    parts = ImageAutoencoder(**tiny_sd.IMAGE), UNet(**tiny_sd.UNET), TextEncoder(**tiny_sd.TEXT)
    expected = tiny_sd.raw_file(*parts)
    with safe_open(TINY_SD, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = file.metadata()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
        name: (tensor.shape, torch.float16) for name, tensor in expected.items()}
    assert {re.match(r"[a-z_]+\.", name)[0] for name in tensors} == {
        "first_stage_model.", "model.", "cond_stage_model."}
    assert tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].shape[0] == 49_408
    assert os.path.getsize(TINY_SD) < 16e6 and about["made_by"].startswith("python tools/tiny_sd.py")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture(scope="module")
def models():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*cosine")  # it does not predict the noise
        return load_image_autoencoder(TINY_SD), *load_stable_diffusion(TINY_SD)


def test_its_latents_have_unit_variance_and_come_back_as_the_picture(models):
    pictures = stills(0, 200, seed=77)[0]
    latents = models[0].encode(pictures)
    assert latents.shape == (200, 4, 8, 8)
    assert latents.mean((0, 2, 3)).abs().max() < 0.15 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.15
    assert psnr(models[0].decode(latents), pictures) > 27


def name_of(picture):
    """The (colour, shape) of a picture (3, 32, 32) by measuring it: what differs from the border's colours is the
    shape; its mean colour is compared with the colours, its outline with each shape's at the same place."""
    picture = picture.numpy()
    y, x = np.mgrid[:32, :32]
    border = (x < 2) | (x > 29) | (y < 2) | (y > 29)
    terms = np.stack([np.ones_like(x), x, y]).astype(float)  # a background that changes evenly
    plane = np.linalg.lstsq(terms[:, border].T, picture[:, border].T, rcond=None)[0]
    away = np.abs(picture - np.einsum("kc,khw->chw", plane, terms)).sum(0)
    inside = away > 0.5 * np.percentile(away, 95)
    colour = picture[:, inside & (away > 0.9 * np.percentile(away, 90))].mean(1) / 2 + 0.5
    overlap = {}
    for shape in SHAPES:
        for seed in range(14):
            mask = outline(shape, seed)
            rows, columns = (round(np.nonzero(inside)[axis].mean() - np.nonzero(mask)[axis].mean()) for axis in (0, 1))
            mask = np.roll(mask, (rows, columns), (0, 1))
            overlap[shape] = max(overlap.get(shape, 0), (mask & inside).sum() / (mask | inside).sum())
    return min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).sum()), max(overlap, key=overlap.get)


@functools.cache
def outline(shape, seed):
    """Where a shape is, (32, 32), at a place and of a size that the seed chooses."""
    black, white = (draw_clip(np.random.default_rng(seed), shape, np.full(3, grey), "left", 1, (32, 32))
                    for grey in (0, 1))
    return ((white - black)[:, 0].sum(0) > 2).numpy()


def share_right(pictures, captions):
    return np.mean([name_of(picture) == tuple(caption.split()[1:3]) for picture, caption in zip(pictures, captions)])


def test_pictures_can_be_named_by_measuring_them():
    assert share_right(*stills(0, 60, seed=5)) == 1


def test_the_file_alone_draws_the_colour_and_shape_that_are_named_also_those_that_no_video_has(models):
    captions = [f"a{'n' * (colour == 'orange')} {colour} {shape}" for colour, shape in PAIRS]
    pictures = tiny_sd.draw(*models, captions, steps=20)
    assert share_right(pictures, captions) > 0.9
    rare = [i for i, (colour, shape) in enumerate(PAIRS) if colour == "pink" or shape == "star"]
    assert share_right(pictures[rare], [captions[i] for i in rare]) > 0.7


# ---------------------------------------------------------------------------------------------------------------------
# The preset shapes_text


def test_captioned_shapes_leave_pairs_out_and_in_training_a_third_of_the_motions():
    train, test = MovingShapes(2, 16, captioned=True), MovingShapes(2, 16, split="test", captioned=True)
    captions = [train[i]["caption"] for i in range(1200)]
    assert {" ".join(caption.split()[1:3]) for caption in captions}.isdisjoint(HELD_OUT)
    assert len({tuple(caption.split()[1:3]) for caption in captions}) == 24 - len(HELD_OUT) == 20
    silent = sum("moving" not in caption for caption in captions)
    assert 0.29 < silent / len(captions) < 0.38
    assert all(re.fullmatch(r"an? \w+ \w+ moving \w+", test[i]["caption"]) for i in range(200))
    labels = {train[i]["label"] for i in range(50)}
    assert labels == {0} and train.classes == [] and len(MovingShapes.classes) == 12


def test_the_pixels_of_the_shapes_are_what_they_were():
    """Runs of the preset shapes repeat bit for bit only while this holds; the figure was taken from version 0.2.0."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for i in range(24):
            digest.update(MovingShapes(5, (24, 32), 3, split)[i]["video"].mul(2**20).round().int().numpy().tobytes())
    assert digest.hexdigest()[:16] == "57b3859da7e03f56"


TINY = "--steps 2 --batch-size 2 --log-every 1 --save-every 2 --preview-every 2 --workers 0".split()


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """A run folder of the preset, two steps of each stage, as a user makes it."""
    folder = tmp_path_factory.mktemp("runs") / "shapes_text"
    for command in ("autoencoder.py --preset shapes_text --frames 2 --clips 8 --width 16 --depth 1 --heads 2".split(),
                    ["content_diffusion.py"], ["motion_diffusion.py"]):
        done = script(*command, *TINY, "--run-dir", folder, folder=folder.parent)  # from any working directory
        assert done.returncode == 0, done.stderr
    return folder


def test_the_chain_runs_from_the_shipped_file_to_clips_of_prompts_and_of_a_picture(script, run, tmp_path):
    Image.new("RGB", (40, 32), (200, 30, 30)).save(tmp_path / "red.png")
    for number, flags_ in enumerate((["--prompt", "a red circle moving left"],
                                     ["--prompt", "a star moving up", "--image", tmp_path / "red.png"])):
        out = tmp_path / f"out{number}"
        done = script("sample.py", "--run-dir", run, *flags_, *"-n 2 --steps 2 --motion-steps 2 --out".split(), out)
        assert done.returncode == 0, done.stderr
        assert read_clip(str(out / "00001.mp4"), 2).shape == (2, 32, 32, 3)


def content_of(folder, prompts):
    """Pictures (N, 3, 32, 32) of the content frames that a run draws."""
    args = flags().parse_args(["--run-dir", str(folder), "--steps", "20"])
    args.guidance = 3.0
    with torch.inference_mode():
        sampler = Sampler(args, torch.device("cpu"), torch.float32)
        return to_pixels(sampler.draw_content(prompts, range(len(prompts)))[:, :, None], sampler.image)[:, :, 0]


def test_training_starts_from_what_the_file_knows_or_with_a_flag_from_nothing(script, run, tmp_path):
    prompts = [f"a {colour} {shape}" for colour in ("red", "green", "pink") for shape in SHAPES]
    assert share_right(content_of(run, prompts), prompts) > 0.75  # pairs, a shape and a colour that no video has
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("content.*"))
    done = script("content_diffusion.py", "--from-scratch", *TINY, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert share_right(content_of(tmp_path / "run", prompts), prompts) < 0.3
    known, new = (load_content(folder)[0].state_dict() for folder in (run, tmp_path / "run"))
    assert {name: tensor.shape for name, tensor in known.items()} == {name: t.shape for name, t in new.items()}
    apart = [(known[name] - new[name]).norm() / known[name].norm() for name in known if known[name].ndim == 4]
    assert min(apart) > 0.3


# ---------------------------------------------------------------------------------------------------------------------
# The judge, and the claim's table


def test_the_judge_s_prompts_are_all_pairs_seen_held_out_and_known_from_pictures_alone():
    seen, held_out, star, pink = (judge.prompts_of(kind) for kind in ("seen", "held-out", "star", "pink"))
    assert [len(set(prompts)) for prompts in (seen, held_out, star, pink)] == [80, 16, 32, 12]
    clips = {MovingShapes(1, 8, captioned=True)[i]["caption"] for i in range(2400)}
    assert {caption for caption in clips if "moving" in caption} == set(seen) and clips.isdisjoint(held_out)
    for caption in seen + held_out + star + pink:
        assert judge.caption_of(judge.label_of(caption)) == caption
    assert judge.label_of("an orange star") == [1, 3, -1]


def test_the_judge_counts_what_is_as_named_and_a_silent_prompt_s_motion_as_right(monkeypatch):
    found = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 3, 2], [0, 0, 1]])
    monkeypatch.setattr(judge, "classify", lambda *_: found)
    scores = judge.score_prompts(None, None, ["a red circle moving left", "a red circle moving left", "a red star",
                                              "a red square moving left"])
    assert scores == dict(colour=0.75, shape=0.75, motion=0.75, all=0.5)


def test_the_spread_of_real_clips_is_that_of_real_clips(monkeypatch):
    captions = judge.prompts_of("pink")[:4] * 12
    labels = torch.tensor([judge.label_of(caption) for caption in captions])
    monkeypatch.setattr(judge, "classify", lambda *_: labels)
    scores = judge.score_prompts(None, judge.real_clips(labels, seed=9), captions)
    assert all(0.8 < value < 1.25 for name, value in scores.items() if "spread" in name)
    still = judge.real_clips(labels, seed=9)[:4].repeat(12, 1, 1, 1, 1)  # always the same
    assert judge.score_prompts(None, still, captions)["spread of position"] < 0.01


def test_the_claim_goes_on_where_it_was_stopped_and_is_drawn(monkeypatch, tmp_path):
    done, most = [], [5]

    def call(script, *arguments):
        if len(done) == most[0]:
            raise RuntimeError("stopped")
        done.append([script, *map(str, arguments)])

    scores = dict(colour=1.0, shape=0.9, motion=0.8, all=0.7)
    for name, stand_in in (("call", call), ("train_reader", lambda: "reader"), ("read_clips", lambda folder: ((), ())),
                           ("score_prompts", lambda *_: scores), ("ASSETS", str(tmp_path))):
        monkeypatch.setattr(claim, name, stand_in)
    folders = [str(tmp_path), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["claim.py", *folders, *"--seeds 1 --at 1 2".split()])
    with pytest.raises(RuntimeError, match="stopped"):
        claim.main()
    trained = [words for words in done if words[0] == "content_diffusion.py"]
    assert [words[words.index("--steps") + 1] for words in trained] == ["1", "2"]
    most[0] = 99
    claim.main()
    assert len(done) == 13  # what was measured is not measured again: 4 trainings, 8 samplings, and one that was cut
    with open(tmp_path / "claim.csv") as file:
        rows = [(row["start"], row["steps"], row["prompts"], row["all"]) for row in csv.DictReader(file)]
    assert rows == [(start, steps, kind, "0.7") for start in ("pretrained", "random") for steps in ("1", "2")
                    for kind in ("seen", "held-out")]
    assert (tmp_path / "claim.png").stat().st_size > 1000
