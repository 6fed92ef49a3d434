"""Proves that no run sees the clips of the judge, and that the ablations go on where they stopped, and know spread."""

import ablations
import judge
import pytest
import torch


def test_the_judge_s_real_clips_are_in_no_run_and_its_prompts_name_what_they_say():
    seeds = [(judge.TRAINING, "train"), (judge.REFERENCE, "train"), (0, "train"), (0, "test"), (1, "train")]
    clips = torch.stack([judge.draw_classes([599], seed, split=split)[0].flatten() for seed, split in seeds])
    assert torch.cdist(clips, clips).add(1e9 * torch.eye(len(seeds))).min() > 1
    kinds = {kind: judge.prompts_of(kind) for kind in ("seen", "held-out", "star", "pink")}
    assert [len(set(prompts)) for prompts in kinds.values()] == [80, 16, 32, 12]
    assert {" ".join(prompt.split()[1:3]) for prompt in kinds["held-out"]} == judge.data.HELD_OUT


def test_the_judge_counts_only_words_that_it_knows_and_spread_only_of_what_moves():
    right = judge.shares(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[-1, 2], [1, 1]]))
    assert right == "shape 0.0%, motion 50.0%, all 50.0%"
    (clips, labels), expected = judge.draw_classes(range(48)), judge.spread(*judge.draw_classes(range(1, 48)))
    clips[0] = clips[0, :, :1]
    assert judge.spread(clips, labels) == pytest.approx(expected)


def test_the_ablations_go_on_where_they_stopped(script, tmp_path, monkeypatch):
    def run(command):
        commands.append(command)
        assert len(commands) != 3, "stopped"
        tiny = "--steps 2 --batch-size 2 --width 16 --depth 1 --clips 4" if command.startswith("auto") else ""
        assert script(*command.split(), *tiny.split()).returncode == 0

    commands, rows = [], [("16", {}), ("24", dict(autoencoder="--frames 24"))]
    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "TABLES", dict(length={row: (flags, "--reconstruct", "") for row, flags in rows}))
    monkeypatch.setattr(ablations, "draw_real", lambda _, *more: judge.draw_classes(range(24), *more))
    monkeypatch.setattr(judge, "train", lambda: judge.classifier().eval())
    monkeypatch.setattr("sys.argv", ["ablations.py", str(tmp_path), "--seeds", "1", "--num", "12"])
    with pytest.raises(AssertionError, match="stopped"):
        ablations.main()
    before = (tmp_path / "scores.csv").read_text()
    ablations.main()
    assert before.count("\n") == 2 and (tmp_path / "scores.csv").read_text().startswith(before)
    assert [command[0] for command in commands] == list("asaas")  # autoencoder, sample
    clips, real = (judge.read_clips(f"{tmp_path}/seed0/clips/{part}", 24)[0] for part in ("fake", "real"))
    assert f"| {ablations.psnr(clips, real):.2f}, not shown |" in (tmp_path / "table.md").read_text()
    for values, verdict in (([1.0, 1.1, 1.2], "not shown"), ([1.2, 1.3, 1.4], "worse"), ([0.6, 0.7], "better")):
        assert ablations.cell(values, [0.9, 1.0, 1.1], -1, ".2f").endswith(verdict)
