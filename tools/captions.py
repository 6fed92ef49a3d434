"""Writes a file of prompts, one a line, for sample.py --prompts: captions of a data set, drawn at random by --seed.

    python tools/captions.py test_videodatainfo.json msrvtt.txt --num 2000      # MSR-VTT: one of a video's twenty
    python tools/captions.py webvid_val.csv webvid_val.txt --num 5000           # any CSV that autoencoder.py takes
"""

import argparse
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="MSR-VTT's .json, or a CSV of captions")
    parser.add_argument("prompts", help="file to write")
    parser.add_argument("--num", type=int, help="number of videos (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    args = parser.parse_args()
    if args.source.endswith(".json"):
        videos, left_out = {}, ""
        for sentence in json.loads(data.read_text(args.source))["sentences"]:
            videos.setdefault(sentence["video_id"], []).append(sentence["caption"])
    else:
        rows, _, left_out = data.csv_rows(args.source)
        videos = {number: [caption] for number, (_, _, caption) in enumerate(rows)}
    rng, videos = np.random.default_rng(args.seed), list(videos.values())  # a list of captions each
    chosen = [videos[i] for i in rng.permutation(len(videos))[: args.num]]
    with open(args.prompts, "w", encoding="utf-8") as file:
        file.writelines(" ".join(own[rng.integers(len(own))].split()) + "\n" for own in chosen)
    print(f"{len(chosen)} prompts in {args.prompts}{left_out}")


if __name__ == "__main__":
    main()
