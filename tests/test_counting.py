"""Proves which frames of which videos reach the models, by videos that count: red shows the number of the frame, green
that of the video. For folders of classes, lists, captions in a CSV, strides and several clips of a video, through the
commands that a user types. No test clip is ever trained on, or among the encodings that are."""

import glob

import av
import numpy as np
import pytest
import torch
from test_method import read_log, read_shards

import data
from autoencoder import Autoencoder

VIDEOS, LENGTH, FRAMES, FPS = 12, 24, 4, 12
NAMES = [f"{('Jump', 'ThrowBall/deep')[v % 2]}/v{v:02d}" for v in range(VIDEOS)]
LISTS = {"train": {0, 3, 4, 5, 8, 9, 10}, "test": {1, 2, 7}}  # without 6 and 11


def picture(v, i):
    """Frame i of video v, uint8 (16, 16, 3): 64 blocks of 2x2, of which red lights number i, green the binary v."""
    blocks = np.zeros((64, 3), np.uint8)
    blocks[i, 0] = 255
    blocks[[bit for bit in range(6) if v >> bit & 1], 1] = 255
    blocks[:, 2] = np.random.default_rng([v, i]).integers(0, 256)  # so that clips differ in their loss
    return torch.from_numpy(blocks.reshape(8, 8, 3).repeat(2, 0).repeat(2, 1))


def read(lit):
    """(number of the video, numbers of the frames) in the mean of some frames, (16, 16, 3) in 0..1."""
    red, green = (np.asarray(lit)[::2, ::2, channel].flatten() for channel in (0, 1))
    return int((green.round() * 2.0 ** np.arange(64)).sum()), tuple(np.flatnonzero((red * FRAMES).round()).tolist())


def trained(run, stride):
    """[(number of the video, first frame)] of the training steps: with a rate of 0, the loss and the gradient's norm in
    the log tell which clip a step saw."""
    model = Autoencoder(3, FRAMES, 16, 2, 16, 8, 1, 2, content="mean", squash=True)
    model.load_state_dict(torch.load(run / "autoencoder.pt", weights_only=True)["model"])
    keys, seen = [(v, start) for v in range(VIDEOS) for start in range(LENGTH - (FRAMES - 1) * stride)], []

    def error(v, start):
        clip = torch.stack([picture(v, start + stride * k) for k in range(FRAMES)])[None].movedim(4, 1) / 127.5 - 1
        return (model(clip) - clip).square().mean()
    def norm(key):
        return sum(g.square().sum() for g in torch.autograd.grad(error(*key), [*model.parameters()])) ** 0.5
    with torch.no_grad():
        losses = torch.stack([error(*key) for key in keys])
    for loss, size in read_log(run, "autoencoder", "loss", "grad_norm"):
        near = [keys[i] for i in ((losses - loss).abs() < 1e-5 * losses).nonzero()[:, 0]]
        seen.append(min(near, key=lambda key: (norm(key) - size).abs()))
        assert norm(seen[-1]).item() == pytest.approx(size, rel=1e-4)
    return seen


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("counting")
    for v, name in enumerate(NAMES):
        (root / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        data.write_video(f"{root}/classes/{name}.mkv", torch.stack([picture(v, i) for i in range(LENGTH)]), FPS)
    for part, numbers in LISTS.items():
        (root / f"{part}list01.txt").write_text("".join(f"{NAMES[v]}.avi {v}\n" for v in numbers))
    rows = [f'classes/{name}.mkv,"video {v}, counting"' for v, name in enumerate(NAMES)]
    (root / "videos.csv").write_text("\n".join(["path,caption", *rows]))
    return root


@pytest.mark.parametrize("case, several, stride", [("classes", 3, 1), ("trainlist01.txt", 1, 2), ("videos.csv", 2, 3)])
def test_each_clip_is_of_the_frames_and_the_video_it_should_be(script, videos, tmp_path, case, several, stride):
    words = f"--data {videos / ('classes' if 'list' in case else case)} --stride {stride} --frames {FRAMES} --size 16 "
    words += f"--preset ucf101 --width 16 --depth 1 --heads 2 --content mean --loss mse --lr 0 --steps {2 * VIDEOS} "
    words += f"--batch-size 1 --log-every 1 --workers 0 --seed 2 --shard-size 5 --clips-per-video {several}"
    words += f" --split {videos / case}" * ("list" in case)
    for line in ("autoencoder.py " + words, f"sample.py --reconstruct --seed 2 --lossless -n99 --out {tmp_path}/out"):
        done = script(*line.split(), "--run-dir", tmp_path / "run")
        assert done.returncode == 0, done.stderr
    train, test = ([(*read(frame.permute(1, 2, 0) / 2 + 0.5), *about) for frame, *about in zip(content, *more)]
                   for content, _, *more in read_shards(tmp_path / "run"))
    for v, frames, *about in train + test:
        assert frames == tuple(range(frames[0], frames[0] + FRAMES * stride, stride))
        assert about == ([0, f"video {v}, counting"] if "csv" in case else [v % 2, ("jump", "throw ball")[v % 2]])
    of_train, of_test = ({v for v, *_ in part} for part in (train, test))
    assert of_test and not of_train & of_test
    assert [of_train, of_test] == [*LISTS.values()] if "list" in case else of_train | of_test == {*range(VIDEOS)}
    # Several clips of a video are different ones; a test video has one.
    n, different = len(of_train), len({one[:2] for one in train})
    assert len(train) == several * n and len(test) == len(of_test) and different > (several - 0.5) * n
    # Training takes each of its videos once an epoch, in another order and from another frame each time.
    steps = trained(tmp_path / "run", stride)
    order = [v for v, _ in steps]
    assert sorted(order[:n]) == sorted(order[n : 2 * n]) == sorted({*order}) == sorted(of_train)
    assert order[:n] != order[n : 2 * n] and len({*steps[: 2 * n]}) > 1.5 * n and len({at for _, at in steps}) > n / 2
    # sample.py reconstructs the test clips, frame by frame, at the speed of the video.
    shown = set()
    for path in glob.glob(f"{tmp_path}/out/real/*.mkv"):
        numbers, frames = zip(*(read(frame / 255) for frame in data.read_clip(path, FRAMES)))
        assert len({*numbers}) == 1
        shown.add((numbers[0], sum(frames, ())))
        with av.open(path) as file:
            assert file.streams.video[0].average_rate == FPS / stride
    assert shown == {one[:2] for one in test}
