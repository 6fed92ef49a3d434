"""Says how many generated clips a classifier names right that was trained on real clips, for any class folders.

    python sample.py --run-dir runs/atari --num 200 --lossless --out judged
    python tools/judge_folders.py out/atari judged                    # the real videos, and what sample.py drew

Two classifiers learn from five of six videos: one sees clips, the other only what moves in them (clips minus their
median frame). It prints how many of the other real clips and of the drawn ones each names right, and the mean change
from frame to frame, over that of the real clips.
"""

import glob
import os
import re
import sys

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data


def read(paths, size=None):
    """float (N, 3, 16, H, W) in [-1, 1]: a clip of each video, from a random start."""
    rng = np.random.default_rng(0)
    clips = np.stack([data.read_clip(path, 16, size, rng=rng) for path in paths])
    return torch.from_numpy(clips).movedim(-1, 1) / 127.5 - 1


def moving(videos):
    return videos - videos.median(2, keepdim=True).values


def train(videos, labels, steps=300):
    torch.manual_seed(0)
    sizes = [(3, 16), (16, 32), (32, 64), (64, 64)]
    layers = [nn.Sequential(nn.Conv3d(a, b, 3, 2, 1), nn.BatchNorm3d(b), nn.ReLU()) for a, b in sizes]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(64, len(classes)))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        chosen = torch.randint(len(videos), (32,))
        clips = videos[chosen] + 0.05 * torch.randn(32, *videos.shape[1:])
        nn.functional.cross_entropy(model(clips), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def number(name):
    """A class by its folder's name, or by that in words, as captions.txt has it."""
    return classes.index(re.sub(r"[\W_]+", "", name).lower())


root, folder = sys.argv[1:]
torch.set_num_threads(1)
files, classes = sorted(glob.glob(f"{root}/*/*")), sorted(re.sub(r"[\W_]+", "", n).lower() for n in os.listdir(root))
labels, other = torch.tensor([number(file.split(os.sep)[-2]) for file in files]), torch.arange(len(files)) % 6 == 0
with open(f"{folder}/captions.txt") as file:
    wanted = torch.tensor([number(line) for line in file])
drawn = read(sorted(glob.glob(f"{folder}/*.m[kp][v4]")))
real = read(files, drawn.shape[3:])
whole, part = train(real[~other], labels[~other]), train(moving(real[~other]), labels[~other])
for what, videos, right in [("other real clips", real[other], labels[other]), (folder, drawn, wanted)]:
    found = (whole(videos).argmax(1) == right).sum(), (part(moving(videos)).argmax(1) == right).sum()
    change = videos.diff(dim=2).abs().mean() / real.diff(dim=2).abs().mean()
    print(f"{what}: of {len(videos)} {found[0]} named right, {found[1]} by what moves; change {change:.2f}")
