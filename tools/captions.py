"""Writes a file of prompts, one a line, for sample.py --prompts, from a data set's captions.

    python tools/captions.py test_videodatainfo.json msrvtt.txt --num 2000      # MSR-VTT: one of each video's captions
    python tools/captions.py webvid_val.csv webvid_val.txt --num 5000           # any CSV that autoencoder.py takes

The videos, and of MSR-VTT's twenty captions a video the one, are drawn at random by --seed.
"""

import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data


def read_captions(path):
    """A list with the captions of each video, a list."""
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as file:
            sentences, captions = json.load(file)["sentences"], {}
        for sentence in sentences:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
        return list(captions.values())
    videos = data.CaptionedVideos(path, None, 1, 1)
    return [[videos.locate(index)[2]] for index in range(len(videos))]


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("source", help="MSR-VTT's .json, or a CSV of captions")
    parser.add_argument("prompts", help="file to write")
    parser.add_argument("--num", type="count", help="number of videos (default: all)")
    parser.add_argument("--seed", type="whole", default=0, help="of the choice")
    args = parser.parse_args()
    rng, captions = np.random.default_rng(args.seed), read_captions(args.source)
    chosen = [captions[i] for i in rng.permutation(len(captions))[: args.num]]
    lines = [" ".join(of_video[rng.integers(len(of_video))].split()) for of_video in chosen]
    data.write_lines(args.prompts, lines)
    print(f"{len(lines)} prompts in {args.prompts}")


if __name__ == "__main__":
    data.launch(main)
