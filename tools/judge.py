"""Scores clips of the shapes preset: how many a classifier recognises, and how varied they are next to real ones.

    python sample.py --num 240 --lossless --out judged && python tools/judge.py judged

Two minutes, on one core. Trains a classifier on real clips and prints its accuracy on others. Both sets are of seeds
of their own, so that no run trains on, reconstructs or is given one of these clips. For each folder of generated clips
it prints the share of clips whose shape and motion, and whose motion alone, it classifies as captions.txt says; the
Frechet distance of its features from those of the other real clips (an FVD for shapes, comparable between runs because
the classifier is always the same); and the standard deviation of colours and positions within a class, divided by that
of real clips, which takes two clips or more of each class. For --reconstruct and --predict-motion, name the `fake`
folder.
"""

import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from data import InputError, MovingShapes
from fvd import frechet_distance

FRAMES, SIZE = 16, 32
TRAINING, REFERENCE = 123_456_789, 987_654_321  # seeds of the judge's two sets: no run has them as its --seed


class Classifier(nn.Sequential):
    """Clips (N, 3, 16, 32, 32) -> logits (N, outputs)."""

    def __init__(self, outputs=len(MovingShapes.classes)):
        def layer(inputs, outputs, stride):
            return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1), nn.BatchNorm3d(outputs), nn.ReLU())

        super().__init__(layer(3, 16, (1, 2, 2)), layer(16, 32, 2), layer(32, 64, 2), layer(64, 64, 2), nn.Flatten(),
                         nn.Linear(64 * 2 * 2 * 2, outputs))


def batch_of(dataset, indices):
    items = [dataset[i] for i in indices]
    return torch.stack([item["video"] for item in items]), torch.tensor([item["label"] for item in items])


def draw_real(indices):
    return batch_of(MovingShapes(FRAMES, SIZE, TRAINING), indices)


def train(steps=700, batch=48, kinds=(len(MovingShapes.classes),), draw=draw_real):
    """A Classifier, trained on real clips. draw(indices) -> clips, labels (N,) or (N, K); kinds: K numbers of classes,
    such as those of colours and of shapes, whose logits stand side by side."""
    torch.set_num_threads(1)  # another number of threads rounds differently, and gives another classifier
    torch.manual_seed(0)
    model = Classifier(sum(kinds))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(steps):
        video, labels = draw(range(step * batch, (step + 1) * batch))
        logits = model(video + 0.05 * torch.randn_like(video)).split(kinds, 1)
        sum(F.cross_entropy(part, label) for part, label in zip(logits, labels.view(batch, -1).T)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def features(model, videos):
    """(N, 352): mean and deviation over time and space of every feature map of the classifier. The last layers' tell
    shape and motion, the first ones' how sharp a clip is and its colours, which the class alone would not ask for."""
    rows = []
    for maps in videos.split(60):
        found = []
        for layer in list(model)[:4]:
            maps = layer(maps)
            found += [maps.mean((2, 3, 4)), maps.std((2, 3, 4))]
        rows.append(torch.cat(found, 1))
    return torch.cat(rows)


@torch.no_grad()
def accuracy(model, videos, labels):
    """(share of clips whose label is right, share whose motion is right)"""
    found = torch.cat([model(part).argmax(1) for part in videos.split(60)])
    moves = len(data.MOVES)
    return (found == labels).float().mean().item(), (found % moves == labels % moves).float().mean().item()


def traits(videos):
    """Of videos (N, 3, L, H, W): colour (N, 3) and mean position (N, 2) of what moves, and the background's colour."""
    background = videos.median(2, keepdim=True).values
    weight = (videos - background).square().sum(1, keepdim=True)
    weight = weight / weight.sum((2, 3, 4), keepdim=True)
    colour = (videos * weight).sum((2, 3, 4))
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    position = torch.stack([(weight[:, 0] * axis).sum((1, 2, 3)) for axis in (x, y)], 1)
    return dict(colour=colour, position=position, background=background.mean((2, 3, 4)))


def spread(videos, labels):
    """{trait: its standard deviation within a class}, averaged over classes and components."""
    return {name: np.mean([value[labels == label].std(0).mean().item() for label in labels.unique()])
            for name, value in traits(videos).items()}


def read_clips(folder, frames=FRAMES):
    """(videos (N, 3, L, H, W), N captions) of a folder that sample.py wrote."""
    captions = os.path.join(folder, "captions.txt")
    if not os.path.isfile(captions):  # sample.py writes them beside `real` and `fake`
        captions = os.path.join(folder, "..", "captions.txt")
    names = sorted(name for name in data.find_videos(folder) if not name.endswith(".gif"))
    captions = data.read_lines(captions) if os.path.isfile(captions) else []
    if not names or len(names) != len(captions):
        raise InputError(f"{folder} has {len(names)} clips and {len(captions)} captions: name a folder that sample.py "
                         "wrote from a shapes run, or of --reconstruct its fake folder")
    clips = np.stack([data.read_clip(os.path.join(folder, name), frames) for name in names])  # (N, L, H, W, 3)
    return data.to_floats(torch.from_numpy(clips)), captions


def read_folder(folder, frames=FRAMES):
    """(videos (N, 3, L, H, W), labels (N,)) of a folder that sample.py wrote from a shapes run."""
    videos, captions = read_clips(folder, frames)
    try:
        labels = [MovingShapes.classes.index(" ".join(caption.split()[-3:])) for caption in captions]
    except ValueError:
        raise InputError(f"{folder}: not all of its captions are classes of the preset shapes") from None
    return videos, torch.tensor(labels)


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("folders", nargs="+", help="folders that sample.py wrote from a shapes run")
    folders = {folder: read_folder(folder) for folder in parser.parse_args().folders}
    model, (real, real_labels) = train(), batch_of(MovingShapes(FRAMES, SIZE, REFERENCE), range(2400))
    print(f"classifier on {len(real)} other real clips: {accuracy(model, real, real_labels)[0]:.1%} right")
    of_real = spread(real, real_labels)
    for folder, (videos, labels) in folders.items():
        both, motion = accuracy(model, videos, labels)
        distance = frechet_distance(features(model, real), features(model, videos))
        spreads = ", ".join(f"{name} {value / of_real[name]:.2f}" for name, value in spread(videos, labels).items())
        print(f"{folder}: {len(videos)} clips, shape and motion right {both:.1%}, motion right {motion:.1%}, "
              f"Frechet distance {distance:.2f}; deviation within a class, where that of real clips is 1: {spreads}")


if __name__ == "__main__":
    data.launch(main)
