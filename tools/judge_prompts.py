"""Scores clips of prompts of the preset shapes_text, such as "a red circle moving left".

    python tools/judge_prompts.py --prompts seen > seen.txt
    python sample.py --run-dir runs/shapes_text --prompts seen.txt --num 240 --lossless --out out/seen
    python tools/judge_prompts.py out/seen

Three minutes, on one core. A classifier, trained on real clips of all colours, shapes and motions, reads all three. For
each folder it prints the share of clips whose colour, shape, motion and all three are as named (what a prompt does not
name counts as right), the deviation of colours and places within a prompt, divided by that of real clips, and how often
it found each.
"""

import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from judge import FRAMES, SIZE, read_clips, spread, train
from tiny_sd import COLOURS, SHAPES

import data
from data import HELD_OUT

WORDS = [list(COLOURS), list(SHAPES), list(data.MOVES)]  # also the colour and the shape that no video of training has
KINDS = [len(words) for words in WORDS]


def caption_of(label):
    return data.caption_of(*(words[number] for words, number in zip(WORDS, label)))


def label_of(caption):
    """[colour, shape, motion], numbers, of a caption such as "a red circle moving left"; -1 where it names none."""
    found = [[words.index(word) for word in caption.split() if word in words] for words in WORDS]
    return [numbers[0] if numbers else -1 for numbers in found]


def prompts_of(kind):
    """The prompts whose pair of colour and shape is 'seen' in training videos or 'held-out'; of the shape and of the
    colour that the pictures alone have: 'star', 'pink'."""
    videos = [(colour, shape) for colour in data.COLOURS for shape in data.SHAPES]
    pairs = {"seen": [pair for pair in videos if " ".join(pair) not in HELD_OUT],
             "held-out": [pair for pair in videos if " ".join(pair) in HELD_OUT],
             "star": [(colour, "star") for colour in data.COLOURS], "pink": [("pink", shape) for shape in data.SHAPES]}
    labels = [(WORDS[0].index(colour), WORDS[1].index(shape), move)
              for move in range(len(data.MOVES)) for colour, shape in pairs[kind]]
    return [caption_of(label) for label in labels]


def real_clips(labels, seed):
    """Clips (N, 3, L, H, W) of labels (N, 3), drawn as the data set draws them."""
    videos = []
    for i, label in enumerate(labels):
        colour, shape, move = (words[number] for words, number in zip(WORDS, label))
        rng = np.random.default_rng([seed, i])
        videos.append(data.draw_clip(rng, shape, COLOURS[colour], move, FRAMES, (SIZE, SIZE)))
    return torch.stack(videos)


def draw_real(indices, seed=1):
    """(clips, labels (N, 3)) of all colours, shapes and motions; of another seed than the generator's."""
    labels = np.random.default_rng([seed, indices[0]]).integers(KINDS, size=(len(indices), 3))
    return real_clips(labels, (seed, indices[0])), torch.tensor(labels)


@torch.no_grad()
def classify(model, videos):
    """Labels (N, 3): colour, shape, motion."""
    logits = torch.cat([model(part) for part in videos.split(60)])
    return torch.stack([part.argmax(1) for part in logits.split(KINDS, 1)], 1)


def score_prompts(model, videos, captions):
    """{what: share or ratio} of clips of prompts, judged by a Classifier of KINDS."""
    labels = torch.tensor([label_of(caption) for caption in captions])
    right = (classify(model, videos) == labels) | (labels < 0)
    scores = dict(zip(("colour", "shape", "motion"), right.float().mean(0).tolist()))
    scores["all"] = right.all(1).float().mean().item()
    if (labels >= 0).all() and len(labels.unique(dim=0)) < len(labels):
        groups = labels.unique(dim=0, return_inverse=True)[1]
        of_real = [spread(real_clips(labels, (2, seed)), groups) for seed in range(3)]  # as many of each prompt
        for name, value in spread(videos, groups).items():
            scores[f"spread of {name}"] = value / np.mean([real[name] for real in of_real])
    return scores


def train_reader():
    """The Classifier that reads colour, shape and motion; prints its accuracy on other real clips."""
    model = train(1000, 32, KINDS, draw_real)
    videos, labels = draw_real(range(1200), seed=3)
    right = (classify(model, videos) == labels).float()
    print("classifier on 1,200 other real clips: colour {:.1%}, shape {:.1%}, motion {:.1%} right, "
          "all {:.1%}".format(*right.mean(0), right.prod(1).mean()))
    return model


def judge_prompts(folders):
    model = train_reader()
    for folder, (videos, captions) in folders.items():
        shares = ", ".join(f"{name} {value:.2f}" if "spread" in name else f"{name} {value:.1%}"
                           for name, value in score_prompts(model, videos, captions).items())
        print(f"{folder}: {len(videos)} clips as named: {shares}")
        counts = [column.bincount(minlength=len(words)).tolist()
                  for column, words in zip(classify(model, videos).T, WORDS)]
        print("    found: " + "; ".join(", ".join(f"{word} {count}" for word, count in zip(words, column) if count)
                                        for words, column in zip(WORDS, counts)))


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("folders", nargs="*", help="folders that sample.py wrote from a shapes_text run")
    parser.add_argument("--prompts", choices=["seen", "held-out", "star", "pink"], help="only print prompts")
    args = parser.parse_args()
    if args.prompts:
        print("\n".join(prompts_of(args.prompts)))
    else:
        judge_prompts({folder: read_clips(folder) for folder in args.folders})


if __name__ == "__main__":
    data.launch(main)
