"""Proves the diffusion arithmetic against closed forms, and that both DiTs are the published ones and agree."""

import pytest
import torch
from macs import count_macs

import content_diffusion
import motion_diffusion
from autoencoder import Autoencoder
from content_diffusion import (
    DIT_SIZES,
    Diffusion,
    DiT,
    DiTBlock,
    UNet,
    ddim,
    dpm,
    gaussian,
    guided,
    sincos_positions,
    timesteps,
)
from data import InputError
from motion_diffusion import MotionDiT

MEAN, STD = 0.7, 0.4


def gaussian_denoiser(diffusion):
    """The exact optimal denoiser of data from N(MEAN, STD^2): the posterior mean of eps, or of v, given x_t."""

    def denoise(x, t):
        signal, noise = diffusion.scales(t, x)
        eps = noise * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2)
        x0 = (x - noise * eps) / signal
        return eps if diffusion.predict == "eps" else signal * eps - noise * x0

    return denoise


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_samples_a_gaussian_exactly(predict, schedule, eta):
    diffusion = Diffusion(schedule, predict)
    generators = [torch.Generator().manual_seed(0)]
    # From the exact marginal at t = 999: Stable Diffusion's schedule leaves a trace of the data there.
    signal2 = diffusion.abar[-1]
    x = signal2.sqrt() * MEAN + (signal2 * STD**2 + 1 - signal2).sqrt() * gaussian(generators, torch.empty(1, 20000))
    x = ddim(gaussian_denoiser(diffusion), x, diffusion, steps=1000, eta=eta, generators=generators)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.02)


def test_ddim_with_eta_0_follows_the_closed_form_path():
    """For Gaussian data the exact flow is affine: x_0 = MEAN + STD (x_T - s MEAN) / sqrt(s^2 STD^2 + 1 - s^2)."""
    diffusion = Diffusion("linear")
    x = torch.randn(1, 1000, dtype=torch.float64)
    diffusion.abar = diffusion.abar.double()
    signal2 = diffusion.abar[-1]
    exact = MEAN + STD * (x - signal2.sqrt() * MEAN) / (signal2 * STD**2 + 1 - signal2).sqrt()
    errors = []
    for steps in (10, 100, 1000):
        errors.append((ddim(gaussian_denoiser(diffusion), x, diffusion, steps) - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01
    # DPM-Solver++ 2M is of second order: at the same number of calls it is closer.
    for steps, error in zip((10, 100), errors):
        assert (dpm(gaussian_denoiser(diffusion), x, diffusion, steps) - exact).abs().max().item() < error


def test_timesteps_go_from_pure_noise_to_none():
    assert timesteps(1) == [999] and timesteps(1000) == list(range(999, -1, -1))
    assert timesteps(50)[0] == 999 and timesteps(50)[-1] == 0
    with pytest.raises(InputError):
        timesteps(0)


@pytest.mark.parametrize("predict", ["eps", "v", "x"])
def test_estimates_undo_the_noising(predict):
    diffusion = Diffusion("linear", predict)
    x, eps, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 10, 500, 900])
    target = {}

    def model(x_t, t):
        signal, noise = diffusion.scales(t, x_t)
        target["output"] = {"eps": eps, "v": signal * eps - noise * x, "x": x}[predict]
        target["x_t"] = x_t
        return target["output"]

    assert diffusion.loss(model, x, t, eps) < 1e-10  # a model that is right has no loss
    x0, e = diffusion.estimates(target["output"], target["x_t"], t)
    assert torch.allclose(x0, x, atol=1e-3) and torch.allclose(e, eps, atol=1e-4)


def test_schedules_are_the_published_ones():
    from diffusers import DDPMScheduler

    for ours, theirs in (("linear", dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")),
                         ("scaled_linear", dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))):
        assert torch.allclose(Diffusion(ours).abar, DDPMScheduler(1000, **theirs).alphas_cumprod, rtol=1e-4)


def test_ddim_equals_diffusers_at_the_same_timesteps():
    from diffusers import DDIMScheduler

    reference = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="linspace")
    reference.set_timesteps(21)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    weight = torch.randn(3, 3) / 3

    def denoise(x, t):
        return torch.einsum("bchw,cd->bdhw", x, weight).tanh()

    ours = ddim(denoise, x, Diffusion("linear"), steps=21)
    # Its previous timestep is a fixed 47 back where ours is the next of the list: compare with its formula on our list.
    times, y = timesteps(21), x
    for time, after in zip(times, times[1:] + [-1]):
        a, b = reference.alphas_cumprod[time], reference.alphas_cumprod[after] if after >= 0 else torch.tensor(1.0)
        eps = denoise(y, None)
        y = b.sqrt() * (y - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert torch.allclose(ours, y, atol=1e-3)
    assert [int(t) for t in reference.timesteps] == times


def test_guidance_1_is_no_guidance_and_others_extrapolate():
    def predict(x, t, c):
        return x * c[:, None]

    x, t = torch.randn(2, 3), torch.zeros(2)
    c, nothing = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(guided(predict, c, nothing, 1)(x, t), predict(x, t, c))
    w = 4.0  # the paper's: (1 + w) eps(c) - w eps(nothing)
    expected = (1 + w) * predict(x, t, c) - w * predict(x, t, nothing)
    assert torch.allclose(guided(predict, c, nothing, 1 + w)(x, t), expected)


def small_dit(**options):
    torch.manual_seed(0)
    return DiT(**dict(channels=3, size=(8, 12), patch=2, width=32, depth=2, heads=2, classes=5) | options)


def small_motion(**options):
    torch.manual_seed(0)
    sizes = dict(motion_channels=3, frames=5, columns=10, channels=3, size=(8, 12), content_patch=4, width=32, depth=2,
                 heads=2, classes=5)
    return MotionDiT(**sizes | options)


def test_adaln_zero_starts_as_the_identity():
    model = small_dit()
    x, c = torch.randn(2, 24, 32), torch.randn(2, 32)
    for block in [*model.blocks, *small_motion().blocks]:
        assert torch.equal(block(x, c), x)
    labels = torch.tensor([0, 1])
    assert (model(torch.randn(2, 3, 8, 12), torch.tensor([1, 2]), labels) == 0).all()


def randomised(model):
    """Random weights in the place of the zeros that AdaLN-zero starts from."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_the_motion_model_s_own_copy_of_the_dit_agrees_with_the_content_model_s():
    theirs, ours = randomised(DiTBlock(32, 4)), motion_diffusion.Block(32, 4)
    weights = theirs.state_dict().values()
    assert [tensor.shape for tensor in weights] == [tensor.shape for tensor in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), weights)))  # in the same order, under other names
    x, c = torch.randn(2, 7, 32), torch.randn(2, 32)
    torch.testing.assert_close(ours(x, c), theirs(x, c))
    assert torch.equal(motion_diffusion.sincos_positions(3, 5, 32), sincos_positions(3, 5, 32))
    t = torch.tensor([0, 1, 500, 999])
    assert torch.equal(motion_diffusion.timestep_embedding(t), content_diffusion.timestep_embedding(t, 256))
    assert motion_diffusion.SIZES == DIT_SIZES


@pytest.mark.parametrize("frames, columns", [(1, 10), (2, 7), (5, 10), (24, 32)])
def test_the_motion_model_takes_any_grid(frames, columns):
    model = randomised(small_motion(frames=frames, columns=columns))
    motion = torch.randn(2, 3, frames, columns)
    content = torch.randn(2, 3, 8, 12)
    out = model(motion, torch.tensor([3, 900]), content, torch.tensor([0, 5]))
    assert out.shape == motion.shape


def test_every_input_of_the_motion_model_matters():
    model = randomised(small_motion())
    motion, content, t, c = torch.randn(1, 3, 5, 10), torch.randn(1, 3, 8, 12), torch.tensor([3]), torch.tensor([0])
    out = model(motion, t, content, c)
    for other in (model(motion + 1, t, content, c), model(motion, t + 1, content, c), model(motion, t, content + 1, c),
                  model(motion, t, content, c + 1)):
        assert (other - out).abs().max() > 1e-4
    with_text = randomised(small_motion(text=6))
    features = torch.randn(1, 6)
    assert (with_text(motion, t, content, features) - with_text(motion, t, content, -features)).abs().max() > 1e-4


def test_positions_tell_every_token_of_a_grid_that_is_not_square():
    table = sincos_positions(8, 32, 64)
    assert table.shape == (256, 64)
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.1  # no two alike
    rows = table.view(8, 32, 64)
    assert torch.equal(rows[3, :, 32:], rows[3, :1, 32:].expand(32, -1))  # the second half tells the row alone
    assert torch.equal(rows[:, 3, :32], rows[:1, 3, :32].expand(8, -1))  # the first half the column


@pytest.mark.parametrize("name, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_dit_has_its_published_sizes(name, millions):
    """Peebles & Xie, table 1; theirs learns sigma too, which costs under 0.1 M."""
    with torch.device("meta"):
        model = DiT(patch=2, **DIT_SIZES[name])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_cost_of_the_motion_model_is_the_papers():
    """Table 8: 0.14 TFLOPs, one forward of DiT-XL/2 at 16x512x512 with content patch 8."""
    with torch.device("meta"):
        model = MotionDiT(text=1024)
        inputs = torch.empty(1, 8, 16, 64), torch.zeros(1), torch.empty(1, 4, 64, 64), torch.empty(1, 1024)
        assert count_macs(model, *inputs) / 1e12 == pytest.approx(0.143, rel=0.02)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(676, rel=0.02)


@pytest.mark.parametrize("steps, tera", [(50, 46.8), (100, 92.0)])
def test_the_cost_of_sampling_is_the_papers(steps, tera):
    """Table 9: one clip of 16x512x1024, both models by the same number of steps, one branch, the whole autoencoder once
    and Stable Diffusion's image decoder not at all."""
    with torch.device("meta"):
        t, context = torch.zeros(1), torch.empty(1, 77, 1024)
        content = count_macs(UNet(context=1024, head_width=64), torch.empty(1, 4, 64, 128), t, context)
        motion = count_macs(MotionDiT(columns=32 + 64, size=(64, 128), text=1024), torch.empty(1, 8, 16, 96), t,
                            torch.empty(1, 4, 64, 128), torch.empty(1, 1024))
        autoencoder = count_macs(Autoencoder(size=(64, 128)), torch.empty(1, 4, 16, 64, 128))
    assert (steps * (content + motion) + autoencoder) / 1e12 == pytest.approx(tera, rel=0.02)
