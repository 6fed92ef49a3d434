"""Proves that the video autoencoder has the paper's size and cost, takes clips of any size, trains all of its weights,
and keeps its precision where the rest is computed in bfloat16. That it is the paper's equations: test_models.py."""

import math

import pytest
import torch
from bench import macs

from autoencoder import Autoencoder, evaluate, psnr
from data import MovingShapes


def small(**options):
    torch.manual_seed(0)
    sizes = dict(channels=3, frames=5, size=(8, 12), patch=2, width=16, motion_channels=3, depth=1, heads=2)
    return Autoencoder(**sizes | options)


def clip(model, batch=2):
    return torch.rand(batch, model.channels, model.frames, *model.size) * 2 - 1


@pytest.mark.parametrize("content", ["weights", "mean", "frame"])
def test_training_reaches_every_weight(content):
    """DistributedDataParallel, as the script uses it, hangs where a weight has no gradient."""
    model = small(content=content)
    model(clip(model)).square().mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_in_bfloat16_the_content_frame_and_the_squashed_output_are_rounded_to_float32_only():
    model = small(squash=True)
    still = clip(model)[:, :, :1].expand(-1, -1, 5, -1, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        content, motion = model.encode(still)
        video = model.decode(content, motion)
    assert (content - still[:, :, 0]).abs().max() < 1e-6  # its weights add up to 1
    assert not torch.equal(video, video.bfloat16().float())


def test_psnr_is_the_mean_of_each_clip_s():
    a = torch.zeros(2, 3, 4, 5, 6)
    b = torch.stack([a[0] + 0.1, a[0] - 0.4])
    assert psnr(a, b) == pytest.approx((20 * math.log10(2 / 0.1) + 20 * math.log10(2 / 0.4)) / 2, rel=1e-4)


def test_an_evaluation_that_a_signal_ends_early_has_no_score(monkeypatch, tmp_path):
    rest = MovingShapes(5, (8, 12), split="test"), 2, tmp_path / "a.png", torch.device("cpu"), (stop := torch.zeros(1))
    assert len(evaluate(small(squash=True), None, *rest)) == 2
    monkeypatch.setattr("autoencoder.psnr", lambda *_: stop.fill_(1).item())  # while the first clip is evaluated
    assert evaluate(small(squash=True), None, *rest) == {}


def test_parameters_and_cost_are_the_papers():
    """Table 8: 0.77 TFLOPs at 16x512x512."""
    with torch.device("meta"):
        model = Autoencoder(channels=4, frames=16, size=64)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(47.4, rel=0.005)
        assert macs(lambda: model(torch.empty(1, 4, 16, 64, 64)))[0] / 1e12 == pytest.approx(0.773, rel=0.005)


def test_wrong_sizes_are_named():
    with pytest.raises(SystemExit, match="8x9 cannot be cut into patches of 3x3"):
        small(size=(8, 9), patch=3)
    with pytest.raises(SystemExit, match=r"\(3, 5, 8, 12\), not \(3, 4, 8, 12\)"):
        small().encode(torch.zeros(1, 3, 4, 8, 12))
