"""Judges clips of moving shapes: a classifier, trained on real clips, says what they show, and how varied they are.

    python sample.py --num 240 --lossless --out judged && python tools/judge.py judged        # two minutes, on one core
    python tools/judge.py --list seen > seen.txt                      # prompts; likewise held-out, star, pink
    python sample.py --run-dir runs/shapes_text --prompts seen.txt --num 240 --lossless --out out/seen
    python tools/judge.py --prompts out/seen                                                  # three minutes
    python tools/judge.py --videos path/to/videos out/clips           # any class folders, and what sample.py drew

Prints the share of clips whose shape and motion (with --prompts also colour) are as captions.txt says; without
--prompts the Frechet distance of the classifier's features from those of 2,400 other real clips, an FVD for shapes; how
far colours and places vary within a class or prompt (real clips: 1); and how often each word was found.
The classifier is always the same; its real clips are in no run. Of --reconstruct, name the `fake` folder.
"""

import argparse
import os
import sys

import numpy as np
import torch
from tiny_sd import COLOURS, SHAPES
from torch import nn
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from fvd import frechet_distance

FRAMES, SIZE = 16, 32
TRAINING, REFERENCE = 123_456_789, 987_654_321  # seeds of the judge's two sets: no run has them as its --seed
CLASSES, MOVES = len(data.MovingShapes.classes), list(data.MOVES)
WORDS = {"colour": list(COLOURS), "shape": list(SHAPES), "motion": MOVES}  # also what no video of training has
KINDS = [len(words) for words in WORDS.values()]


def classifier(outputs=CLASSES, size=(SIZE, SIZE)):
    """A model: clips (N, 3, 16, H, W) -> logits (N, outputs)."""
    def layer(inputs, outputs, stride):
        return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1), nn.BatchNorm3d(outputs), nn.ReLU())

    places = 2 * -(-size[0] // 16) * -(-size[1] // 16)
    return nn.Sequential(layer(3, 16, (1, 2, 2)), layer(16, 32, 2), layer(32, 64, 2), layer(64, 64, 2), nn.Flatten(),
                         nn.Linear(64 * places, outputs))


def draw_classes(indices, seed=TRAINING, frames=FRAMES, split="train"):
    """(clips (N, 3, L, H, W), labels (N, 2) of shape and motion)"""
    clips = data.MovingShapes(frames, SIZE, seed, split)
    items = [clips[i] for i in indices]
    labels = torch.tensor([divmod(item["label"], len(MOVES)) for item in items])
    return torch.stack([item["video"] for item in items]), labels


def real_clips(labels, seed):
    """Clips of labels (N, 3) of colour, shape and motion, drawn as the data set draws them."""
    named = [[words[number] for words, number in zip(WORDS.values(), label)] for label in labels]
    rngs = [np.random.default_rng([seed, i]) for i in range(len(labels))]
    return torch.stack([data.draw_clip(rng, shape, COLOURS[colour], move, FRAMES, (SIZE, SIZE))
                        for rng, (colour, shape, move) in zip(rngs, named)])


def draw_words(indices, seed=1):
    """(clips, labels (N, 3)) of all colours, shapes and motions; of another seed than the generator's."""
    labels = np.random.default_rng([seed, indices[0]]).integers(KINDS, size=(len(indices), 3))
    return real_clips(labels, (seed, indices[0])), torch.tensor(labels)


def train(steps=700, batch=48, kinds=(CLASSES,), draw=draw_classes, **options):
    """A classifier, trained on what draw(indices) gives. kinds: how many logits there are for each label, side by side;
    of shape and motion for both together."""
    torch.set_num_threads(1)  # another number of threads rounds differently, and gives another classifier
    torch.manual_seed(0)
    model = classifier(sum(kinds), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in tqdm(range(steps), desc="training the classifier"):
        video, labels = draw(range(step * batch, (step + 1) * batch))
        logits = model(video + 0.05 * torch.randn_like(video)).split(kinds, 1)
        targets = labels.T if len(kinds) == labels.shape[1] else [len(MOVES) * labels[:, 0] + labels[:, 1]]
        sum(nn.functional.cross_entropy(*pair) for pair in zip(logits, targets)).backward()
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
def classify(model, videos):
    """Labels (N, 2) of shape and motion, or (N, 3) of colour, shape and motion, as the classifier was trained."""
    logits = torch.cat([model(part) for part in videos.split(60)])
    if logits.shape[1] == CLASSES:
        return torch.stack(torch.unravel_index(logits.argmax(1), (len(data.SHAPES), len(MOVES))), 1)
    return torch.stack([part.argmax(1) for part in logits.split(KINDS, 1)], 1)


def spread(videos, labels):
    """(3,): how far the colour and the position of what moves and the colour of the background deviate among clips of
    one label, averaged over labels (N, K) and components."""
    background = videos.median(2, keepdim=True).values
    weight = (videos - background).square().sum(1, keepdim=True)
    weight = weight / weight.sum((2, 3, 4), keepdim=True)
    position = torch.stack([weight.sum(axes) @ torch.linspace(0, 1, SIZE) for axes in ((1, 2, 3), (1, 2, 4))], 1)
    traits = (videos * weight).sum((2, 3, 4)), position, background.mean((2, 3, 4))
    group = labels.unique(dim=0, return_inverse=True)[1]
    moves = position.isfinite().all(1)  # a clip that stands still shows neither place nor colour
    return np.array([np.nanmean([trait[(group == i) & moves].std(0).mean().item() for i in group.unique()])
                     for trait in traits])


def read_clips(folder, frames=FRAMES):
    """(clips (N, 3, L, H, W), labels (N, 3) of what their captions name, else -1) of a folder that sample.py wrote."""
    files = [name for name in data.find_videos(folder) if not name.endswith(".gif")]
    beside = folder if os.path.isfile(f"{folder}/captions.txt") else f"{folder}/.."  # of --reconstruct
    captions = [line.split() for line in data.read_text(f"{beside}/captions.txt").splitlines() if line.strip()]
    if not files or len(files) != len(captions):
        raise SystemExit(f"{folder} has {len(files)} clips for {len(captions)} captions: name one that sample.py wrote")
    clips = np.stack([data.read_clip(os.path.join(folder, name), frames) for name in files])  # (N, L, H, W, 3)
    labels = [[next((words.index(w) for w in line if w in words), -1) for words in WORDS.values()] for line in captions]
    return data.to_floats(torch.from_numpy(clips)), torch.tensor(labels)


def prompts_of(kind):
    """Prompts of pairs of colour and shape 'seen' in training videos, or 'held-out'; of the 'star' and of 'pink'."""
    pairs = [(colour, shape) for colour in (["pink"] if kind == "pink" else data.COLOURS)
             for shape in (["star"] if kind == "star" else data.SHAPES)]
    if kind in ("seen", "held-out"):
        pairs = [pair for pair in pairs if (" ".join(pair) in data.HELD_OUT) == (kind == "held-out")]
    return [data.caption_of(*pair, move) for move in MOVES for pair in pairs]


def shares(found, labels):
    """Says how many are right in each column of labels (N, K), and in all."""
    right, known = found == labels, labels >= 0  # nan%: no caption names one
    columns = *(right & known).sum(0) / known.sum(0), (right | ~known).all(1).float().mean()
    return ", ".join(f"{name} {share:.1%}" for name, share in zip([*list(WORDS)[-labels.shape[1]:], "all"], columns))


def judge_folders(root, folder, stride):
    """Prints how many clips of `folder` show their class, by two classifiers trained on five of six videos in `root`,
    on whole clips and on what moves (clips minus their median frame), and the change from frame to frame (real: 1)."""
    rows, classes, _ = data.folder_rows(root)
    label_of = {caption: label for _, label, caption in rows} | {name: label for label, name in enumerate(classes)}
    beside = folder if os.path.isfile(f"{folder}/captions.txt") else f"{folder}/.."  # of --reconstruct
    drawn, captions = read_clips(folder)[0], data.read_text(f"{beside}/captions.txt").splitlines()
    if other := {*captions} - {*label_of}:
        raise SystemExit(f"{beside}/captions.txt names {min(other)!r}, but no class folder in {root} is called so")
    labels, wanted = torch.tensor([[row[1]] for row in rows]), torch.tensor([[label_of[line]] for line in captions])
    rng, known = np.random.default_rng(0), torch.arange(len(rows)) % 6 > 0
    real = np.stack([data.read_clip(f"{root}/{name}", FRAMES, drawn.shape[3:], stride, rng) for name, _, _ in rows])
    real = data.to_floats(torch.from_numpy(real))
    for what, of in ("whole clips", lambda x: x), ("what moves", lambda x: x - x.median(2, keepdim=True).values):
        def draw(indices):
            chosen = torch.randint(known.sum(), (len(indices),))
            return of(real[known])[chosen], labels[known][chosen]

        model = train(300, 32, [len(classes)], draw, size=drawn.shape[3:])
        for name, clips, right in ("other real clips", real[~known], labels[~known]), (folder, drawn, wanted):
            hit = torch.cat([model(of(part)) for part in clips.split(60)]).argmax(1, keepdim=True) == right
            change = clips.diff(dim=2).abs().mean() / real.diff(dim=2).abs().mean()
            print(f"{name}: of {len(clips)} clips {hit.sum()} right by {what}; change {change:.2f}. By class:",
                  ", ".join(f"{kind} {hit[right == i].sum()}/{(right == i).sum()}" for i, kind in enumerate(classes)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", help="folders that sample.py wrote from a run on the shapes")
    parser.add_argument("--prompts", action="store_true", help="they are clips of prompts, from a shapes_text run")
    parser.add_argument("--videos", help="they are clips of the classes of these folders of videos")
    parser.add_argument("--stride", type=int, default=1, help="that of the run, with --videos")
    parser.add_argument("--list", choices=["seen", "held-out", "star", "pink"], help="only print prompts of this kind")
    args = parser.parse_args()
    if args.list:
        return print(*prompts_of(args.list), sep="\n")
    if args.videos:
        return [judge_folders(args.videos, folder, args.stride) for folder in args.folders]
    folders = {folder: read_clips(folder) for folder in args.folders}
    if not args.prompts and any((labels[:, 1:] < 0).any() for _, labels in folders.values()):
        raise SystemExit("a caption names no shape or no motion: clips of prompts are judged with --prompts")
    model = train(1000, 32, KINDS, draw_words) if args.prompts else train()
    real, real_labels = draw_words(range(1200), seed=3) if args.prompts else draw_classes(range(2400), REFERENCE)
    print(f"classifier on {len(real):,} other real clips, right: {shares(classify(model, real), real_labels)}")
    for folder, (videos, labels) in folders.items():
        labels, found = labels[:, -real_labels.shape[1]:], classify(model, videos)
        print(f"{folder}: {len(videos)} clips, right: {shares(found, labels)}")
        if not args.prompts:
            print(f"    Frechet distance {frechet_distance(features(model, real), features(model, videos)):.2f}")
        if (labels >= 0).all() and len(labels.unique(dim=0)) < len(labels):
            same = [(real_clips(labels, (2, i)), labels) for i in range(3)] if args.prompts else [(real, real_labels)]
            ratios = spread(videos, labels) / np.mean([spread(*clips) for clips in same], 0)
            print("    spread, real: 1: colour {:.2f}, place {:.2f}, background {:.2f}".format(*ratios))
        for words, column in zip(list(WORDS.values())[-labels.shape[1]:], found.T.tolist()):
            print("    found: " + ", ".join(f"{word} {column.count(i)}" for i, word in enumerate(words) if i in column))


if __name__ == "__main__":
    main()
