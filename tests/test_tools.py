"""Proves that the tools behind the pages' tables use clips that no run sees, go on where they stopped, and call a
difference shown only where it is larger than the spread."""

import ablations
import judge
import pytest
import torch

from autoencoder import psnr
from data import HELD_OUT, MovingShapes


def test_the_judge_s_real_clips_are_in_no_run_and_its_prompts_name_what_they_say():
    seeds = [(judge.TRAINING, "train"), (judge.REFERENCE, "train"), (0, "train"), (0, "test"), (1, "train")]
    clips = torch.stack([MovingShapes(16, 32, *seed)[599]["video"].flatten() for seed in seeds])
    assert torch.cdist(clips, clips).add(1e9 * torch.eye(len(seeds))).min() > 1
    kinds = {kind: judge.prompts_of(kind) for kind in ("seen", "held-out", "star", "pink")}
    assert [len(set(prompts)) for prompts in kinds.values()] == [80, 16, 32, 12]
    assert {" ".join(prompt.split()[1:3]) for prompt in kinds["held-out"]} == HELD_OUT


def test_the_ablations_go_on_where_they_stopped_and_show_no_difference_that_the_spread_could_be(
        script, tmp_path, monkeypatch):
    def run(command):
        commands.append(command)
        tiny = "--steps 2 --batch-size 2 --width 16 --depth 1 --clips 4" if "auto" in command else ""
        assert len(commands) == 3 or script(*command.split(), *tiny.split()).returncode == 0
        assert len(commands) != 3, "stopped"

    commands, rows = [], {"16": ({}, "--reconstruct", "-"), "24": (dict(autoencoder="--frames 24"), "--reconstruct", "-")}
    for name, value in dict(run=run, TABLES=dict(L=rows), draw_real=lambda _, *more: judge.draw_classes(range(24), *more),
                            sys=type("", (), dict(argv=["", str(tmp_path)]))).items():
        monkeypatch.setattr(ablations, name, value)
    monkeypatch.setattr(judge, "train", lambda: judge.classifier().eval())
    monkeypatch.setattr("sys.argv", ["ablations.py", str(tmp_path), "--seeds", "1", "--num", "24"])
    with pytest.raises(AssertionError, match="stopped"):
        ablations.main()
