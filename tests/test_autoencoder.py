"""Proves that the video autoencoder is the paper's: equations 3 to 6, positions, any size, and its published cost."""

import pytest
import torch
from macs import count_macs

from autoencoder import Autoencoder
from data import InputError


def small(**options):
    torch.manual_seed(0)
    sizes = dict(channels=3, frames=5, size=(8, 12), patch=2, width=16, motion_channels=3, depth=1, heads=2)
    return Autoencoder(**sizes | options).eval()


def clip(model, batch=2):
    return torch.rand(batch, model.channels, model.frames, *model.size) * 2 - 1


@pytest.mark.parametrize("smooth", [False, True])
def test_the_content_frame_lies_between_the_frames(smooth):
    model = small(smooth=smooth)
    video = clip(model)
    content, _ = model.encode(video)
    assert content.shape == (2, 3, 8, 12)
    assert (content >= video.amin(2) - 1e-6).all() and (content <= video.amax(2) + 1e-6).all()
    assert (content - video.mean(2)).abs().max() > 1e-3  # its weights are not all equal


@pytest.mark.parametrize("content", ["weights", "mean", "frame"])
def test_the_content_frame_of_a_still_clip_is_its_frame(content):
    model = small(content=content)
    frame = clip(model)[:, :, :1]
    assert torch.allclose(model.encode(frame.expand(-1, -1, 5, -1, -1))[0], frame[:, :, 0], atol=1e-6)


def test_the_content_frame_is_what_the_flag_says():
    video = clip(small())
    assert torch.equal(small(content="mean").encode(video)[0], video.mean(2))
    assert torch.equal(small(content="frame").encode(video)[0], video[:, :, 0])


@pytest.mark.parametrize("axis", [2, 3, 4], ids=["frames", "rows", "columns"])
def test_order_matters_to_encoder_and_decoder(axis):
    """Without positions, flipping the clip along an axis would only flip the outputs along it."""
    model = small(frames=6, size=(12, 12))
    video = clip(model)
    content, motion = model.encode(video)
    flipped_content, flipped_motion = model.encode(video.flip(axis))
    if axis == 2:
        merely = content, motion.flip(2)
        again = model.decode(content, motion.flip(2))
    else:
        rows, columns = motion.split(6, 3)
        if axis == 3:
            merely = content.flip(2), torch.cat([rows.flip(3), columns], 3)
        else:
            merely = content.flip(3), torch.cat([rows, columns.flip(3)], 3)
        # Patches are flipped inside as well: only a model with a patch of 1 could be compared pixel by pixel.
        again = None
    assert (flipped_motion - merely[1]).abs().max() > 1e-3
    assert (flipped_content - merely[0]).abs().max() > 1e-3
    if again is not None:
        assert (again - model.decode(content, motion).flip(2)).abs().max() > 1e-3


@pytest.mark.parametrize("axis", [1, 2, 3], ids=["frames", "rows", "columns"])
def test_both_transformers_know_where_and_when_a_token_is(axis):
    model = small()
    for transformer in (model.encoder, model.decoder):
        x = torch.randn(1, 5, 4, 6, 16)
        assert (transformer(x.flip(axis)) - transformer(x).flip(axis)).abs().max() > 1e-3


@pytest.mark.parametrize("frames, size, patch", [(1, 8, 2), (7, (12, 20), 4), (16, (6, 10), 1), (3, (48, 80), 4)])
def test_any_size_can_be_encoded_and_decoded(frames, size, patch):
    model = small(frames=frames, size=size, patch=patch)
    video = clip(model)
    content, motion = model.encode(video)
    assert content.shape == video[:, :, 0].shape
    assert motion.shape == (2, 3, frames, model.size[0] // patch + model.size[1] // patch)
    assert motion.abs().max() <= 1
    assert model.decode(content, motion).shape == video.shape


def test_each_part_of_the_motion_latent_belongs_to_one_axis():
    """Equation 5: z_x reaches the decoder's input at its row alone, z_y at its column alone."""
    model = small()
    content, motion = model.encode(clip(model, 1))
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.decode(content, motion)
    for column, where in ((1, (slice(None), 2, 1, slice(None))), (4 + 3, (slice(None), 2, slice(None), 3))):
        other = motion.clone()
        other[:, :, 2, column] += 1
        model.decode(content, other)
        changed = (seen[-1] - seen[0]).abs().amax(-1) > 0
        expected = torch.zeros_like(changed)
        expected[where] = True
        assert torch.equal(changed, expected)


def test_normalise_and_denormalise_are_inverse():
    model = small()
    model.motion_mean.copy_(torch.randn(3, 1, 1))
    model.motion_std.copy_(torch.rand(3, 1, 1) + 0.5)
    motion = torch.randn(2, 3, 5, 10)
    assert torch.allclose(model.denormalise(model.normalise(motion)), motion, atol=1e-6)


def test_parameters_and_cost_are_the_papers():
    with torch.device("meta"):
        model = Autoencoder(channels=4, frames=16, size=64)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(47.4, rel=0.005)
        assert count_macs(model, torch.empty(1, 4, 16, 64, 64)) / 1e12 == pytest.approx(0.773, rel=0.02)


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match="divisible by 3"):
        Autoencoder(size=(8, 9), patch=3)
    with pytest.raises(InputError, match=r"\(3, 5, 8, 12\), not \(3, 4, 8, 12\)"):
        small().encode(torch.zeros(1, 3, 4, 8, 12))
