"""Proves that the tools that the README's tables come from measure what they say."""

import judge
import torch

from data import MovingShapes


def test_the_judge_s_real_clips_are_in_no_run():
    seeds = [judge.TRAINING, judge.REFERENCE]
    sets = [MovingShapes(16, 32, seed, split) for seed, split in
            [(0, "train"), (0, "test"), (1, "train"), (2, "test"), *((seed, "train") for seed in seeds)]]
    for i in (0, 1, 599):
        clips = torch.stack([clips[i]["video"] for clips in sets])
        assert torch.cdist(clips.flatten(1), clips.flatten(1)).add(1e9 * torch.eye(len(sets))).min() > 1
