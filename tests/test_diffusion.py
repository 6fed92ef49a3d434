"""Proves the diffusion arithmetic against closed forms and diffusers' schedulers, that DiT is diffusers' DiT, and that
DiT, the motion model and sampling have the published parameters and costs."""

import pytest
import torch
from bench import macs

from autoencoder import Autoencoder
from content_diffusion import DIT_SIZES, Diffusion, DiT, UNet, ddim
from motion_diffusion import MotionDiT

MEAN, STD = 0.7, 0.4
BETAS = dict(linear=dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
             scaled_linear=dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def randomised(model):
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def gaussian(diffusion):
    """The best possible denoiser of data from N(MEAN, STD^2): it returns the mean of eps, given x_t."""

    def denoise(x_t, t):
        signal, noise = diffusion.scales(t, x_t)
        return noise * (x_t - signal * MEAN) / (signal**2 * STD**2 + noise**2)

    return denoise


@pytest.mark.parametrize("steps, interval", [(28, 27), (1000, 1000)])  # diffusers steps back by 1000 // interval
@pytest.mark.parametrize("kind, eta, bounds", [("epsilon", 0.0, None), ("epsilon", 0.7, None),
                                               ("v_prediction", 1.0, (-0.5, 0.5)), ("sample", 0.0, (-0.5, 0.5))])
def test_ddim_takes_the_steps_of_diffusers(kind, eta, bounds, steps, interval):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDIMScheduler(**BETAS["linear"], timestep_spacing="linspace", prediction_type=kind,
                                        clip_sample=bounds is not None, clip_sample_range=0.5)
    reference.set_timesteps(steps)
    reference.num_inference_steps = interval
    diffusion = Diffusion("linear", dict(epsilon="eps", v_prediction="v", sample="x")[kind])
    torch.manual_seed(0)
    weight, x = torch.randn(3, 3) / 3, torch.randn(2, 3)

    def denoise(x, t):
        return (x @ weight + t[:, None] / 1000).tanh()

    generators, again = ([torch.Generator().manual_seed(n) for n in (2, 3)] for _ in range(2))
    ours = ddim(denoise, x, diffusion, steps, eta, generators, bounds)
    for t in reference.timesteps.tolist():
        noise = torch.stack([torch.randn(3, generator=generator) for generator in again])
        x = reference.step(denoise(x, torch.tensor([t, t])), t, x, eta, bounds is not None, variance_noise=noise)[0]
    torch.testing.assert_close(ours, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("predict", ["eps", "v", "x"])
def test_a_model_that_is_right_has_no_loss_and_its_estimates_are_right(predict):
    diffusion, (x, eps), t = Diffusion("linear", predict), torch.randn(2, 4, 3, 2, 2), torch.tensor([0, 10, 500, 900])
    signal, noise = diffusion.scales(t, x)
    right = dict(eps=eps, v=signal * eps - noise * x, x=x)[predict]
    assert diffusion.loss(lambda x_t, t: right, x, t, eps) < 1e-10
    for ours, exact in zip(diffusion.estimates(right, signal * x + noise * eps, t), (x, eps)):
        assert torch.allclose(ours, exact, atol=1e-3)


@pytest.mark.parametrize("schedule", BETAS)
def test_schedules_are_the_published_ones(schedule):
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(1000, **BETAS[schedule]).alphas_cumprod
    assert torch.allclose(Diffusion(schedule).abar, expected, rtol=1e-4)


@pytest.mark.parametrize("clips", [1, 3, 70])
def test_the_test_loss_is_the_mean_over_all_noise_levels_however_few_clips_there_are(clips):
    torch.manual_seed(1)
    diffusion, seen, x = Diffusion("linear"), [], MEAN + STD * torch.randn(clips, 1000)

    def model(x_t, t, row):
        seen.append((t.item(), row.item()))
        return gaussian(diffusion)(x_t, t)

    loss = diffusion.test_loss(model, x, torch.arange(clips))
    times, rows = zip(*seen)
    assert len(seen) == max(64, clips) and max(map(rows.count, rows)) - min(map(rows.count, range(clips))) <= 1
    assert torch.allclose(torch.tensor(times).float(), torch.linspace(0, 999, len(seen)), atol=1)
    signal2 = diffusion.abar[list(times)]  # eps is known up to the part of x_t's variance that is the data's
    assert loss == pytest.approx((signal2 * STD**2 / (signal2 * STD**2 + 1 - signal2)).mean().item(), rel=0.1)
    assert diffusion.test_loss(model, x, torch.arange(clips)) == loss


def test_dit_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = randomised(DiT(channels=3, size=16, patch=2, width=32, depth=2, heads=4, classes=5))
    reference = diffusers.DiTTransformer2DModel(4, 8, 3, num_layers=2, sample_size=16, num_embeds_ada_norm=5,
                                                attention_bias=True, norm_eps=1e-6).eval()
    embedder = reference.transformer_blocks[0].norm1.emb  # of which each block there has one
    embedder.time_proj.downscale_freq_shift = 0  # as in DiT's own code; diffusers says 1
    reference.transformer_blocks[1].norm1.emb = embedder
    emb, renames = "blocks.0.norm1.emb.", [("x_embedder", "pos_embed")]
    renames += [(f"t_embedder.mlp.{n}", f"{emb}timestep_embedder.linear_{m}") for n, m in ((0, 1), (2, 2))]
    renames += [("y_embedder", f"{emb}class_embedder"), ("blocks", "transformer_blocks"), ("attn.", "attn1."),
                ("adaLN_modulation.1", "norm1.linear"), ("attn1.proj", "attn1.to_out.0"), ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"), ("final_layer.norm1", "proj_out_1"), ("proj_out_1.linear", "proj_out_1"),
                ("final_layer.linear", "proj_out_2")]
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        parts = zip("qkv", tensor.chunk(3)) if "qkv" in name else [("", tensor)]
        state |= {name.replace("qkv", f"to_{part}"): third for part, third in parts}
    assert reference.load_state_dict(state, strict=False).unexpected_keys == []
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([1, 5])
    expected = reference(x, t, labels).sample
    assert (model(x, t, labels) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_sizes_of_dit_and_the_costs_of_the_motion_model_and_of_sampling_are_the_papers():
    """Table 1 of DiT's paper, whose models learn sigma too (0.1 M); CMD's table 8: 0.14 TFLOPs for one pass of DiT-XL/2
    at 16x512x512; table 10: a clip of 16x512x1024, as many steps of both models, one branch, no image decoder."""
    t, text = torch.empty(1, device="meta"), torch.empty(1, 1024, device="meta")
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in DiT(patch=2, **DIT_SIZES[name]).parameters()) / 1e6 for name in DIT_SIZES][:4]
        model, wide = MotionDiT(text=1024), MotionDiT(columns=96, size=(64, 128), text=1024)
        small = macs(lambda: model(torch.empty(1, 8, 16, 64), t, torch.empty(1, 4, 64, 64), text))[0]
        step = macs(lambda: wide(torch.empty(1, 8, 16, 96), t, torch.empty(1, 4, 64, 128), text))[0]
        unet, autoencoder = UNet(context=1024, head_width=64), Autoencoder(size=(64, 128))
        step += macs(lambda: unet(torch.empty(1, 4, 64, 128), t, torch.empty(1, 77, 1024)))[0]
        once = macs(lambda: autoencoder(torch.empty(1, 4, 16, 64, 128)))[0]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(676, rel=0.005)
    assert sizes == pytest.approx([675, 458, 130, 33], rel=0.01)
    assert small / 1e12 == pytest.approx(0.143, rel=0.005)
    assert (50 * step + once) / 1e12 == pytest.approx(46.8, rel=0.002)
    assert (100 * step + once) / 1e12 == pytest.approx(92.1, rel=0.002)
