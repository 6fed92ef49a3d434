"""Proves that the scripts do what the paper says. Three steps of each training script are three steps that are written
here from the equations, in plain PyTorch, and the clips that sample.py draws are those that algorithm 1, written here,
draws from the same weights. Each is shown on classes in pixels, by two presets, and on captions in latents."""

import glob
import json
import math
from types import SimpleNamespace

import av
import pytest
import torch
from conftest import ROOT, rows_of
from safetensors import safe_open

import data
from autoencoder import LPIPS, Autoencoder, load_image_autoencoder
from content_diffusion import DiT, load_stable_diffusion
from motion_diffusion import MotionDiT

SD = f"{ROOT}/tools/tiny-sd.safetensors"
SCRIPTS = dict(autoencoder="autoencoder.py", content="content_diffusion.py", motion="motion_diffusion.py")
SEED, B, STEPS, LR, CLIP, EMA, DROP, CLIPS = 3, 8, 3, 1e-2, 0.05, 0.15, 0.5, 20
DECAY, CONSTANT = "--decay", "--no-decay"
TRAINING = f"--batch-size {B} --lr {LR} --clip {CLIP} --seed {SEED} --log-every 1 --workers 0"
DIFFUSION = f"--model {{}} --drop {DROP} --ema {EMA} --predict {{}} --schedule {{}}"
STAGE_1 = "--width 16 --heads 2 --depth 1 --size 16 --motion-channels 5 --shard-size 9"
KINDS = {  # by preset: flags of stage 1 and of the rate, those of DIFFUSION, sizes; betas and guidance are the preset's
    "shapes": dict(flags="--loss mse --noise 0.3 --clips 20 --accumulate 2", lr=DECAY, frames=4, patch=4, guidance=2,
        content=("mini", "v", "scaled_linear"), motion=("mini --accumulate 2", "eps", "linear"), betas=(0.9, 0.99)),
    "ucf101": dict(flags="--loss l1 --data shapes --clips 10 --clips-per-video 2 --lpips {0}/vgg.pth {0}/lpips.pth",
        lr=CONSTANT, content=("mini", "x", "linear"), motion=("mini", "v", "scaled_linear"), betas=(0.5, 0.9),
        guidance=5, patch=2, frames=4),
    "shapes_text": dict(flags="--loss mse --noise 0 --clips 20", lr=DECAY, frames=2, patch=1, guidance=3,
        content=("sd", "eps", "linear"), motion=("mini", "x", "scaled_linear"), betas=(0.9, 0.99))}


def read_log(run, stage, *columns):
    return [[float(row[name]) for name in columns] for row in rows_of(run, stage)]


def read_shards(run):
    """[content, motion, labels, captions] of the clips to train on, and of the test clips, which the last shard has."""
    parts = []
    for path in sorted(glob.glob(f"{run}/encodings/shard-*.safetensors")):
        with safe_open(path, "pt") as shard:
            parts.append([shard.get_tensor(name).float() for name in ("content", "motion")])
            parts[-1] += [shard.get_tensor("label").tolist(), json.loads(shard.metadata()["captions"])]
    content, motion, labels, captions = zip(*parts[:-1])
    return [torch.cat(content), torch.cat(motion), sum(labels, []), sum(captions, [])], parts[-1]


@pytest.fixture(scope="module", params=KINDS)
def run(request, script, tmp_path_factory):
    """A run folder, three steps of each stage. Of the preset ucf101 the third is done after a resume."""
    folder, run = tmp_path_factory.mktemp(request.param), SimpleNamespace(name=request.param, **KINDS[request.param])
    torch.manual_seed(9)
    run.lpips, run.folder, run.text = LPIPS(), folder / "run", run.name == "shapes_text"
    run.images, encoder = load_image_autoencoder(SD), load_stable_diffusion(SD)[1]
    run.encode_text = dict(content=encoder.encode, motion=lambda captions: encoder.encode(captions).mean(1))
    weights = run.lpips.state_dict()
    torch.save({name: w for name, w in weights.items() if name.startswith("features.")}, folder / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": weights[f"lin.{i}.weight"] for i in range(5)}, folder / "lpips.pth")
    for stage, name in SCRIPTS.items():
        words = f"--preset {run.name} {STAGE_1} --frames {run.frames} {run.flags.format(folder)}"
        words = f"{TRAINING} {run.lr} " + (words if stage == "autoencoder" else DIFFUSION.format(*getattr(run, stage)))
        for end in ("--steps 2", "--steps 3 --resume") if run.lr == CONSTANT else ("--steps 3",):
            done = script(name, *words.split(), *end.split(), "--run-dir", run.folder)
            assert done.returncode == 0, done.stderr
    state = torch.load(run.folder / "autoencoder.pt", weights_only=True)["model"]
    (run.train, run.test), run.moments = read_shards(run.folder), (state["motion_mean"], state["motion_std"])
    return run


def new_models(run):
    """The three models as they are before training."""
    size, channels, classes = (4, 4, 1) if run.text else (16, 3, 12)
    mini, text = dict(width=128, depth=4, heads=4, classes=classes), 64 if run.text else None
    torch.manual_seed(SEED)
    autoencoder = Autoencoder(channels, run.frames, size, run.patch, 16, 5, 1, 2, smooth=run.name != "ucf101",
                              squash=not run.text)
    torch.manual_seed(SEED)
    content = load_stable_diffusion(SD)[0] if run.text else DiT(channels, size, run.patch, **mini)
    torch.manual_seed(SEED)
    motion = MotionDiT(5, run.frames, 2 * size // run.patch, channels, size, 2, 2 * run.patch, **mini, text=text)
    return dict(autoencoder=autoencoder, content=content, motion=motion)


def rate(step, steps):
    return LR * min(1, (step + 1) / (0.05 * steps)) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def compare(run, stage, model, loss_of, betas, ema=None):
    """A stage's checkpoint and log against Adam with clipped gradients, and a moving average of the weights."""
    weights, rows = dict(model.named_parameters()), []
    start, one, two, average = ({name: (w * k).detach().clone() for name, w in weights.items()} for k in (1, 0, 0, 1))
    for step in range(STEPS):
        model.zero_grad()
        loss = loss_of(step, torch.Generator().manual_seed(SEED * 1_000_003 + step))
        loss.backward()
        norm = math.sqrt(sum(w.grad.double().square().sum().item() for w in weights.values()))
        lr = LR if run.lr == CONSTANT else rate(step, STEPS)
        decay = min(ema or 0, (1 + step) / (10 + step))
        for name, w in weights.items():
            g = w.grad * min(1, CLIP / norm)
            one[name] = betas[0] * one[name] + (1 - betas[0]) * g
            two[name] = betas[1] * two[name] + (1 - betas[1]) * g * g
            a, b = (m[name] / (1 - beta ** (step + 1)) for m, beta in zip((one, two), betas))
            w.data -= lr * a / (b.sqrt() + 1e-8)
            average[name] = decay * average[name] + (1 - decay) * w.data
        rows.append([step + 1, loss.item(), lr, norm])
    assert max(row[3] for row in rows) > 2 * CLIP
    log = read_log(run.folder, stage, "step", "loss", "lr", "grad_norm")
    assert log == [pytest.approx(row, rel=2e-4) for row in rows]
    state = torch.load(f"{run.folder}/{stage}.pt", weights_only=True)
    for expected, found in ((weights, state["model"]), (average, state["ema"] if ema else state["model"])):
        wrong, moved = (torch.cat([(expected[name] - other[name]).flatten() for name in start])
                        for other in (found, start))
        assert wrong.norm() < 2e-4 * moved.norm() and wrong.abs().max() < 0.005 * moved.abs().max()


def shapes_of(run, keys, split="train"):
    """[clips as the autoencoder takes them, labels, captions] of the moving shapes with these keys."""
    shapes = data.MovingShapes(run.frames, 16, SEED, split, captioned=run.text)
    videos, labels, captions = zip(*([shapes[key][name] for name in ("video", "label", "caption")] for key in keys))
    videos = torch.stack(videos)
    if run.text:
        moments = run.images.quant_conv(run.images.encoder(videos.transpose(1, 2).flatten(0, 1)))
        videos = 0.18215 * moments[:, :4].unflatten(0, (len(videos), -1)).transpose(1, 2)
    return videos, [*labels], [*captions]


def test_stage_1_is_equations_3_to_6_and_their_loss_and_encodes_with_what_it_learned(run):
    model = new_models(run)["autoencoder"]

    def loss_of(step, generator):
        video, *_ = shapes_of(run, range(step * B, step * B + B))
        noise = torch.randn(B, *model.motion_shape, generator=generator) * (0.3 if run.name == "shapes" else 0)
        chosen = torch.randint(run.frames, (B,), generator=generator)
        content, motion = model.encode(video)
        output = model.decode(content, motion + noise)
        if run.name != "ucf101":
            return (output - video).square().mean()
        frames = (torch.stack([clip[:, i] for clip, i in zip(clips, chosen)]) for clips in (output, video))
        return (output - video).abs().mean() + run.lpips(*frames).mean()
    compare(run, "autoencoder", model, loss_of, run.betas)
    keys = [divmod(i, 2) if run.name == "ucf101" else i for i in range(CLIPS)]
    for found, keys, split in ((run.train, keys, "train"), (run.test, range(64), "test")):
        video, *about = shapes_of(run, keys, split)
        assert found[2:] == about
        assert all((a - b).abs().max() < 2e-3 for a, b in zip(found, model.encode(video)))  # half precision
    values, (mean, std) = run.train[1].transpose(0, 1).flatten(1), run.moments
    assert torch.allclose(mean.flatten(), values.mean(1), atol=1e-5)
    assert torch.allclose(std.flatten(), values.std(1, unbiased=False), rtol=1e-4)


def abars_of(schedule):
    start, end, power = (1e-4, 0.02, 1) if schedule == "linear" else (0.00085**0.5, 0.012**0.5, 2)
    return (1 - torch.linspace(start, end, 1000, dtype=torch.float64) ** power).cumprod(0).float()


@pytest.mark.parametrize("stage", ["content", "motion"])
def test_stages_2_and_3_are_equations_7_and_8(run, stage):
    (_, predict, schedule), model = getattr(run, stage), new_models(run)[stage]
    abars, (mean, std) = abars_of(schedule), run.moments
    order = [i for epoch in range(2) for i in torch.randperm(
        CLIPS, generator=torch.Generator().manual_seed(SEED * 1_000_003 + epoch)).tolist()]

    def loss_of(step, generator):
        rows = order[step * B : step * B + B]
        content, motion = (part[rows] for part in run.train[:2])
        x = content if stage == "content" else (motion - mean) / std
        t = torch.randint(1000, (B,), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        dropped = (torch.rand(B, generator=generator) < DROP).tolist()
        labels, captions = ([nothing if drop else part[i] for drop, i in zip(dropped, rows)]
                            for nothing, part in zip((12, ""), run.train[2:]))
        condition = run.encode_text[stage](captions) if run.text else torch.tensor(labels)
        signal, noise = (part.sqrt().view(-1, 1, 1, 1) for part in (abars[t], 1 - abars[t]))
        out = model(signal * x + noise * eps, t, *[content] * (stage == "motion"), condition)
        target = dict(eps=eps, x=x, v=signal * eps - noise * x)[predict]
        return ((out - target) / (noise.clamp_min(0.5) if predict == "x" else 1)).square().mean()
    compare(run, stage, model, loss_of, (0.9, 0.999), EMA)


@pytest.mark.parametrize("clip", [0, -1])  # no limit
def test_the_rate_rises_for_a_twentieth_of_the_steps_and_falls_on_a_cosine_to_a_hundredth(script, tmp_path, clip):
    words = f"--steps 40 {DECAY} --clip {clip} --lr {LR} --batch-size 1 --log-every 1 --run-dir {tmp_path}".split()
    for stage, name in SCRIPTS.items():
        done = script(name, *words, *f"{STAGE_1} --frames 2 --clips 4".split() * (stage == "autoencoder"))
        assert done.returncode == 0, done.stderr
        state = torch.load(tmp_path / f"{stage}.pt", weights_only=True)["optimizer"]
        beta, norms = state["param_groups"][0]["betas"][1], read_log(tmp_path, stage, "grad_norm")
        expected = sum((1 - beta) * beta ** (39 - i) * norm**2 for i, [norm] in enumerate(norms))
        assert sum(one["exp_avg_sq"].sum().item() for one in state["state"].values()) == pytest.approx(expected, 1e-4)
        assert read_log(tmp_path, stage, "lr") == [pytest.approx([rate(i, 40)], rel=1e-4) for i in range(40)]


def algorithm_1(settings, model, shape, seeds, conditions, scale, steps, eta, bounds, *frame):
    """DDIM with guidance. conditions: of all clips, and of nothing. seeds: of the noise, one for each clip."""
    (_, predict, schedule), generators = settings, [torch.Generator().manual_seed(seed) for seed in seeds]
    abars, times = abars_of(schedule), torch.linspace(999, 0, steps).round().long().tolist()
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    for time, abar, after in zip(times, abars[times], [*abars[times[1:]], torch.tensor(1.0)]):
        with_, without = (model(x, torch.full((len(x),), time), *frame, condition) for condition in conditions)
        out, signal, noise = without + scale * (with_ - without), abar.sqrt(), (1 - abar).sqrt()
        x0 = dict(x=out, eps=(x - noise * out) / signal, v=signal * x - noise * out)[predict]
        x0 = x0 if bounds is None else x0.clamp(*bounds)
        sigma = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp_min(0).sqrt() * (x - signal * x0) / noise
        if eta:
            x = x + sigma * torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return x


@pytest.mark.parametrize("flagged", [False, True])
def test_samples_are_those_of_algorithm_1(run, script, tmp_path, flagged):
    models, prompts, n, latents = new_models(run), ["a red circle moving left", "a blue square"], 3, []
    for (stage, model), key in zip(models.items(), ("model", "ema", "ema")):
        state = torch.load(f"{run.folder}/{stage}.pt", weights_only=True)
        for name, w in state[key].items():  # large weights, so that all that sampling does shows
            if not (run.text and stage == "content"):
                state[key][name] = torch.randn(w.shape) * (0.3 if stage == "autoencoder" else 0.1)
                state[key][name] = state[key][name].abs() + 0.2 if name == "motion_std" else state[key][name]
        model.eval().load_state_dict(state[key])
        state |= {name: getattr(models["autoencoder"], name) for name in state if name in ("motion_mean", "motion_std")}
        torch.save(state, tmp_path / f"{stage}.pt")
    (tmp_path / "encodings").symlink_to(run.folder / "encodings")
    (tmp_path / "prompts").write_text("\n".join(prompts))
    scale, motion_scale, eta, seed, fps = (2.4, 1.6, 0.7, 5, 7) if flagged else (run.guidance, 1, 0, 0, 8)
    steps, motion_steps = (50, 100) if run.name == "shapes" and not flagged else (4, 5 if flagged else 1)
    words = f"--eta {eta} --guidance {scale} --motion-guidance {motion_scale} --seed {seed} --fps {fps}" * flagged
    words += f" --steps {steps} --motion-steps {motion_steps}" * (steps < 50) + f" --num {n} --batch-size 2 --lossless"
    words += f" --prompts {tmp_path}/prompts" * run.text + " --negative-prompt star" * (run.text and flagged)
    done = script("sample.py", "--run-dir", tmp_path, "--out", tmp_path / "out", *words.split())
    assert done.returncode == 0, done.stderr
    autoencoder = models["autoencoder"]
    mean, std = autoencoder.motion_mean, autoencoder.motion_std
    bounds = None if run.text else (-1, 1), ((-1 - mean) / std, (1 - mean) / std)
    for stage, shape, *how in (("content", autoencoder.content_shape, scale, steps, eta, bounds[0]),
            ("motion", autoencoder.motion_shape, motion_scale, motion_steps, eta, bounds[1])):
        conditions, nothing = (torch.arange(n), torch.tensor([12] * n)), "star" if flagged else ""
        if run.text:
            conditions = [*map(run.encode_text[stage], ([*prompts, prompts[0]], [nothing] * n))]
        seeds = [2 * (seed * 1_000_003 + number) + (stage == "motion") for number in range(n)]
        with torch.no_grad():
            latents.append(algorithm_1(getattr(run, stage), models[stage], shape, seeds, conditions, *how, *latents))
    clips = autoencoder.decode(latents[0], latents[1] * std + mean)
    if run.text:
        frames = run.images.post_quant_conv(clips.transpose(1, 2).flatten(0, 1) / 0.18215)
        clips = run.images.decoder(frames).unflatten(0, (n, -1)).transpose(1, 2)
    for clip, path in zip(clips.movedim(1, 4), sorted(glob.glob(f"{tmp_path}/out/*.mkv")), strict=True):
        found = torch.from_numpy(data.read_clip(path, run.frames)).float()
        wrong = (found - ((clip + 1) * 127.5).round().clamp(0, 255)).abs()
        assert wrong.max() <= 1 and wrong.mean() < 0.01 and found.std() > 10
        with av.open(path) as file:
            assert file.streams.video[0].average_rate == fps
