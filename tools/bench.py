"""Measures this machine: each training stage, sampling, the loader; and plans the paper's runs from that.

    python tools/bench.py                                # the shapes preset on the CPU, minutes
    python tools/bench.py --preset ucf101 --against      # compared with a plain version of the same steps: ratios
    python tools/bench.py --device cuda                  # a GPU's whole report at published sizes; --only takes parts
    python tools/bench.py --plan --rate 660 --mfu 0.45   # the plan for a GPU that is not here
    python tools/bench.py --memory                       # what training needs of a GPU's memory, computed without one

Weights and data are random: speed depends on neither. The versions of a step take turns, so that other load on the
machine slows all of them alike; the first call of each turn warms up and is not timed, and figures are medians. MFU is
the share of the machine's own best rate in large matrix products, measured at the start: 2 x multiply-accumulates of
the forward pass (with attention products), x 3 in training, divided by the seconds and by that rate. Memory is that of
the tensors on a GPU, of the whole process on a CPU.

`plain` is what one writes first: float32, attention by its formula, in the autoencoder on rearranged copies, guidance
by two calls, Adam and the average of weights by loops over tensors, glibc's own memory policy, files written one by
one, videos decoded from their start. It has the same weights and gives the same results (test_speed.py).
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import math
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
import weakref
from types import SimpleNamespace

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from macs import macs, sampling_macs
from PIL import ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import autoencoder
import content_diffusion
import data
import motion_diffusion
import sample

CLASSES = dict(shapes=12, ucf101=101)
UNETS = dict(webvid_sd15=dict(), webvid_sd21=dict(context=1024, head_width=64))
TEXT = dict(webvid_sd15=dict(), webvid_sd21=dict(width=1024, layers=23, heads=16, quick_gelu=False, pad=0))
STAGES = ("encoding", "autoencoder", "content", "motion")

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(call):
    """(result of call(), seconds until the device has finished it)"""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


def keep_memory(keep):
    """glibc keeps what tensors free, as data.start() sets it, or returns it to the kernel by its own policy."""
    if keep:
        data.keep_freed_memory()
    elif sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, where the policy ends up by itself
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets VmHWM back to what is in use now


def peak_memory(device):
    """Bytes: of the tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else read_proc("self/status", "VmHWM")


def read_proc(file, name):
    """Bytes that Linux states under this name; nan on other systems."""
    with contextlib.suppress(OSError), open(f"/proc/{file}") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    return float("nan")


def take_turns(versions, rounds, device):
    """{name: (median seconds, peak bytes)}. versions: {name: a function that returns the step to time}."""
    seconds, peaks = {name: [] for name in versions}, {}
    for _ in range(rounds):
        for name, make in versions.items():
            with plain() if name == "plain" else contextlib.nullcontext():
                keep_memory(name != "plain")
                step = make()
                step()
                reset_peak(device)
                first = timed(step)[1]
                seconds[name] += [first] + [timed(step)[1] for _ in range(min(10, int(1 / first)))]
                peaks[name] = peak_memory(device)
                del step
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in versions}


def matrix_rate(device):
    """Operations a second (two a multiply-accumulate) of large matrix products: float32 on a CPU, bfloat16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ b)[1] for _ in range(20))


# ---------------------------------------------------------------------------------------------------------------------
# The plain version


def formula(q, k, v, is_causal=False):
    """Attention, in place of F.scaled_dot_product_attention."""
    weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        weights = weights + torch.full(weights.shape[-2:], -torch.inf, device=q.device).triu(1)
    return weights.softmax(-1) @ v


def plain_attention(self, x):
    """In place of autoencoder.Attention.forward."""
    B, L = x.shape[:2]
    if self.over == "time":
        one, other, sizes = "b l n c -> (b n) l c", "(b n) l c -> b l n c", dict(b=B)
    else:
        one, other, sizes = "b l n c -> (b l) n c", "(b l) n c -> b l n c", dict(l=L)
    x = rearrange(x, one)
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads)
               for layer in (self.query, self.key, self.value))
    return rearrange(self.out(rearrange(formula(q, k, v), "b h n d -> b n (h d)")), other, **sizes)


def plain_guided(predict, condition, nothing, scale):
    """In place of content_diffusion.guided."""
    def denoise(x, t):
        with_ = predict(x, t, condition)
        return with_ if scale == 1 else with_ + (scale - 1) * (with_ - predict(x, t, nothing))

    return denoise


@contextlib.contextmanager
def plain():
    precision = torch.get_float32_matmul_precision()
    with (unittest.mock.patch.object(F, "scaled_dot_product_attention", formula),
          unittest.mock.patch.object(autoencoder.Attention, "forward", plain_attention),
          unittest.mock.patch.object(sample, "guided", plain_guided)):
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(precision)


def plain_read(path, frames, size, rng):
    """A clip as data.read_clip gives it, but decoded from the file's start, and resized by Pillow."""
    pictures = []
    with av.open(path) as container:
        begin = rng.integers(container.streams.video[0].frames - frames + 1)
        for i, frame in enumerate(container.decode(video=0)):
            if i >= begin:
                pictures.append(np.asarray(ImageOps.fit(frame.to_image(), data.pair(size)[::-1])))
            if len(pictures) == frames:
                return np.stack(pictures)


# ---------------------------------------------------------------------------------------------------------------------
# The three stages with random weights, and their steps


def pixels_of(preset, size):
    return data.pair(size or autoencoder.PRESETS[preset]["size"])


def make_model(stage, preset, size=None):
    """A stage's model by its preset, on the default device. size: pixels, in place of the preset's."""
    p = autoencoder.PRESETS[preset]
    text, size = preset in UNETS, pixels_of(preset, size)
    frame = tuple(n // 8 for n in size) if text else size
    if stage in ("autoencoder", "encoding"):
        names = "channels", "frames", "patch", "width", "motion_channels", "depth", "heads", "smooth"
        return autoencoder.Autoencoder(size=frame, squash=not text, **{name: p[name] for name in names})
    if stage == "content" and text:
        return content_diffusion.UNet(**UNETS[preset]).to(memory_format=torch.channels_last)
    if stage == "content":
        own = content_diffusion.PRESETS[preset]
        return content_diffusion.DiT(p["channels"], frame, own["patch"], classes=CLASSES[preset],
                                     **content_diffusion.DIT_SIZES[own["model"]])
    own = motion_diffusion.PRESETS[preset]
    return motion_diffusion.MotionDiT(
        p["motion_channels"], p["frames"], sum(frame) // p["patch"], p["channels"], frame, own["patch"],
        own["content_patch"], classes=CLASSES.get(preset, 1), text=TEXT["webvid_sd21"]["width"] if text else None,
        **motion_diffusion.SIZES[own["model"]])


def randomise(model):
    """Makes all weights random, since a new DiT has zeros, with which it computes nothing."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model


def image_autoencoder(device, half=False):
    return autoencoder.ImageAutoencoder().requires_grad_(False).eval().to(
        device, torch.float16 if half else torch.float32, memory_format=torch.channels_last)


def make_inputs(stage, model, preset, batch, size=None):
    """Random inputs of a stage's model for `batch` clips, on the default device."""
    if stage == "autoencoder":
        return [torch.randn(batch, model.channels, model.frames, *model.size)]
    if stage == "encoding":
        return [torch.rand(batch, 3, model.frames, *pixels_of(preset, size)) * 2 - 1]
    frame = [n // (8 if preset in UNETS else 1) for n in pixels_of(preset, size)]
    t = torch.arange(batch) * 37 % 1000
    if preset in UNETS:
        condition = torch.randn(batch, *((77, model.context) if stage == "content" else (model.text,)))
    else:
        condition = torch.arange(batch) % model.classes
    content = torch.randn(batch, autoencoder.PRESETS[preset]["channels"], *frame)
    if stage == "content":
        return [content, t, condition]
    return [torch.randn(batch, model.motion_channels, model.frames, model.columns), t, content, condition]


def forward_macs(stage, preset, size=None):
    """Multiply-accumulates of one clip's forward pass: (as the paper counts, with attention). "encoding": of the image
    encoder, if there is one, and of the autoencoder's encoder."""
    with torch.device("meta"), torch.no_grad():
        model = make_model(stage, preset, size)
        inputs = make_inputs(stage, model, preset, 1, size)
        image = image_autoencoder("meta") if stage == "encoding" and preset in UNETS else None
        call = (lambda video: model.encode(autoencoder.to_frames(video, image))) if stage == "encoding" else model
        layers, attention = macs(lambda: call(*inputs))
    return layers, layers + attention


def training_step(stage, model, call, inputs, version):
    """A function without arguments: one step as the stage's script does it, or (`plain`) as one writes it first."""
    device, ours = inputs[0].device, version != "plain"
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True if ours else None)
    averages = [weight.detach().clone() for weight in weights] if stage != "autoencoder" else []
    diffusion = content_diffusion.Diffusion("linear").to(device)

    def loss_of():
        if stage == "autoencoder":
            return autoencoder.reconstruction_loss(call(*inputs), inputs[0], "mse")
        x, t, *rest = inputs
        return diffusion.loss(lambda x, t: call(x, t, *rest), x, t, torch.randn_like(x))

    def step():
        with torch.autocast(device.type, torch.bfloat16, ours and device.type == "cuda" or version == "bfloat16"):
            loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if norm.isfinite().item():
            optimizer.step()
            with torch.no_grad():
                if averages and ours:
                    torch._foreach_lerp_(averages, weights, 0.001)
                for average, weight in zip(averages, () if ours else weights):
                    average.mul_(0.999).add_(weight, alpha=0.001)
        optimizer.zero_grad()

    return step


def packed(flex, heads, frames):
    """A function that attends as F.scaled_dot_product_attention does on q, k, v (B, N*heads, L, d), but by flex
    attention: all places of a head lie in one long sequence, in which each attends to its own frames."""
    def attend(q, k, v):
        q, k, v = (rearrange(x, "b (n h) l d -> b h (n l) d", h=heads).contiguous() for x in (q, k, v))
        if q.shape[2] not in masks:
            masks[q.shape[2]] = create_block_mask(
                lambda b, h, i, j: i // frames == j // frames, None, None, q.shape[2], q.shape[2], device=str(q.device))
        return rearrange(flex(q, k, v, block_mask=masks[q.shape[2]]), "b h (n l) d -> b (n h) l d", l=frames)

    masks = {}
    return attend


def bench_time_attention(device, preset, batch):
    """Prints milliseconds of attention over time, forward and backward, in each way that this machine has."""
    p = autoencoder.PRESETS[preset]
    N = math.prod(pixels_of(preset, None)) // (p["patch"] * (8 if preset in UNETS else 1)) ** 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # (B, N*heads, L, d) as in autoencoder.Attention
    qkv = [torch.randn(batch, p["frames"], N * p["heads"], p["width"] // p["heads"], device=device, dtype=dtype)
           .transpose(1, 2).requires_grad_() for _ in range(3)]

    def by(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    ways = dict(ours=lambda q, k, v: autoencoder.attention_in_parts(q, k, v, axis=1), formula=formula)
    if device.type == "cuda":
        ways |= {name: functools.partial(by, getattr(SDPBackend, f"{name.upper()}_ATTENTION"))
                 for name in ("flash", "efficient", "cudnn")}
        ways["flex"] = packed(torch.compile(flex_attention), p["heads"], p["frames"])
    line = []
    for name, way in ways.items():
        try:
            seconds = [timed(lambda: way(*qkv).sum().backward())[1] for _ in range(6)]
            line.append(f"{name} {1e3 * min(seconds):.1f}")
        except Exception as e:  # a kernel that does not take these shapes
            line.append(f"{name} none ({type(e).__name__})")
    print(f"attention over time, ms of one layer, {batch} clip{'s' * (batch > 1)}: {', '.join(line)}")


def encoding_step(model, image, video):
    """A function without arguments: encodes one batch as autoencoder.encode_dataset does."""
    @torch.no_grad()
    def step():
        frames = autoencoder.to_frames(video, image)
        with torch.autocast(frames.device.type, torch.bfloat16, frames.device.type == "cuda"):
            return [part.half().cpu() for part in model.encode(frames)]

    return step


def bench_training(args, stage, preset, batch, size=None):
    """Prints a row for each version of a stage's step. Returns the best MFU of those that are not plain, or None."""
    device = args.device
    with torch.device("meta"):
        count = sum(p.numel() for p in make_model(stage, preset, size).parameters())
    needed = 20 * count  # weights, gradients, Adam's two moments, average
    if device.type == "cpu" and needed > read_proc("meminfo", "MemAvailable"):
        print(f"{stage:<14} left out: {count / 1e6:.0f} M parameters need more than the free memory")
        return None
    torch.manual_seed(0)
    with torch.device(device):
        model = randomise(make_model(stage, preset, size))
        inputs = make_inputs(stage, model, preset, batch, size)
        if stage == "encoding":
            image = image_autoencoder(device, half=device.type == "cuda") if preset in UNETS else None
    if stage == "encoding":
        versions = dict(ours=functools.partial(encoding_step, model, image, *inputs))
    else:
        # A CPU computes in float32 by default, and in bfloat16 with --dtype bfloat16; a GPU in bfloat16.
        names = (["ours"] + ["compiled"] * args.compile + ["bfloat16"] * (device.type == "cpu")
                 + ["plain"] * args.against)
        calls = {name: torch.compile(model) if name == "compiled" else model for name in names}
        versions = {name: functools.partial(training_step, stage, model, calls[name], inputs, name) for name in names}
    paper, full = forward_macs(stage, preset, size)
    passes, best = 1 if stage == "encoding" else 3, 0
    try:
        results = take_turns(versions, args.rounds, device)
    except torch.cuda.OutOfMemoryError:
        print(f"{stage:<14} left out: out of memory at batch {batch}")
        return None
    for name, (seconds, peak) in results.items():
        mfu = passes * 2 * full * batch / seconds / args.machine_rate
        best = max(best, mfu) if name != "plain" else best
        ratio = f"{seconds / results['plain'][0]:8.2f}" if "plain" in results else ""
        print(f"{stage:<14} {name:<9} {batch:>5} {seconds:>9.4f} {batch / seconds:>9.2f} {peak / 1e9:>8.2f} "
              f"{paper / 1e12:>8.4f} {full / 1e12:>8.4f} {mfu:>6.1%}{ratio}", flush=True)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def make_sampler(preset, device, dtype=None, size=None, compiled=False, **flags):
    """sample.Sampler with random weights in place of a run folder's."""
    args = sample.flags().parse_args(["--compile" if compiled else "--no-compile"])
    vars(args).update(dict(guidance=sample.GUIDANCE[preset]) | flags)
    sampler = sample.Sampler.__new__(sample.Sampler)
    sampler.args, sampler.device = args, device
    sampler.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device(device):
        sampler.autoencoder, sampler.image = make_model("autoencoder", preset, size).requires_grad_(False).eval(), None
        if preset in UNETS:
            sampler.image = image_autoencoder(device, half=device.type == "cuda" and sampler.dtype != torch.float32)
        for stage in ("content", "motion"):
            model = randomise(make_model(stage, preset, size))
            shape = make_inputs(stage, model, preset, 1, size)[0].shape[1:]
            text = None
            if preset in UNETS:
                text = content_diffusion.TextEncoder(**TEXT[preset if stage == "content" else "webvid_sd21"])
            diffusion = content_diffusion.Diffusion("linear")
            setattr(sampler, stage, sampler.prepare(model, text, diffusion, shape))
    sampler.compile(preset)
    return sampler


@torch.inference_mode()
def draw(sampler, wishes, ours=True):
    """({part: seconds}, peak bytes without and with the image decoder) of drawing a clip for each prompt or label."""
    # The files are of other clips: random weights draw noise, which no codec compresses as it does videos.
    size = [n * (8 if sampler.image else 1) for n in sampler.autoencoder.size]
    shapes = data.MovingShapes(sampler.autoencoder.frames, size)
    videos = [shapes[n]["video"] for n in range(min(len(wishes), 12))]
    reset_peak(sampler.device)
    seconds, numbers = {}, range(len(wishes))
    content, seconds["content"] = timed(lambda: sampler.draw_content(wishes, numbers))
    motion, seconds["motion"] = timed(lambda: sampler.draw_motion(content, wishes, numbers))
    half = ours and sampler.device.type == "cuda" and sampler.dtype == torch.bfloat16
    with torch.autocast(sampler.device.type, torch.bfloat16, half):  # as in sampler.decode
        frames, seconds["autoencoder"] = timed(lambda: sampler.autoencoder.decode(content, motion))
    peaks = [peak_memory(sampler.device)]
    _, seconds["image decoder"] = timed(lambda: autoencoder.to_pixels(frames, sampler.image).cpu())
    peaks.append(peak_memory(sampler.device))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2 if ours else 1) as writers:
        _, seconds["files"] = timed(lambda: list(writers.map(
            lambda n: data.write_video(f"{folder}/{n}.mp4", videos[n % 12], 8), numbers)))
    return seconds, peaks


def warm_up_and_draw(sampler, wishes, ours=True):
    """draw(), after 3 steps that compile and allocate everything."""
    steps = sampler.args.steps, sampler.args.motion_steps
    sampler.args.steps = sampler.args.motion_steps = 3
    draw(sampler, wishes, ours)
    sampler.args.steps, sampler.args.motion_steps = steps
    return draw(sampler, wishes, ours)


SAMPLING_COLUMNS = (f"{'sampling':<17} {'clips':>5}{'content':>9}{'motion':>9}{'decode':>9}{'images':>9}{'files':>9}"
                    f"{'seconds':>9}{'MFU c.':>7}{'MFU m.':>7}{'GB':>7}{'+image':>7}")


def bench_sampling(args, preset, clips, versions, size=None, **flags):
    """Prints a row for each version: seconds of each part, MFU of the diffusion models, memory. Returns the
    multiply-accumulates of one clip, as the paper counts."""
    results = {version: [] for version in versions}
    for _ in range(args.rounds):
        for version in versions:
            ours = version != "plain"
            with contextlib.nullcontext() if ours else plain():
                keep_memory(ours)
                dtype = torch.float32 if not ours else torch.bfloat16 if "bfloat16" in version else None
                sampler = make_sampler(preset, args.device, dtype, size, "compiled" in version, **flags)
                wishes = [f"video number {n}" if sampler.content.text else n % CLASSES[preset] for n in range(clips)]
                results[version].append(warm_up_and_draw(sampler, wishes, ours))
                del sampler
    counts = sampling_macs(make_sampler(preset, torch.device("meta"), size=size, **flags))
    totals = {version: statistics.median(sum(times.values()) for times, _ in turns)
              for version, turns in results.items()}
    for version, turns in results.items():
        parts = {part: statistics.median(times[part] for times, _ in turns) for part in turns[0][0]}
        times = "".join(f"{seconds:>9.3f}" for seconds in parts.values())
        mfu = "".join(f"{2 * counts[part][1] * clips / parts[part] / args.machine_rate:>7.1%}"
                      for part in ("content", "motion"))
        memory = "".join(f"{peak / 1e9:>7.2f}" for peak in turns[0][1])
        ratio = f"{totals[version] / totals['plain']:7.2f}" if "plain" in totals else ""
        print(f"{version:<17} {clips:>5}{times}{totals[version]:>9.3f}{mfu}{memory}{ratio}", flush=True)
    return sum(paper for paper, _ in counts.values())


@torch.no_grad()
def compare_samplers(run_dir, device, clips=12):
    """Prints how far what each sampler draws in few steps is from what DDIM draws in 1000, from the same noise and with
    the preset's guidance: the root mean square, in the latents' deviations. A step costs each of them one call."""
    args = sample.flags().parse_args(["--run-dir", run_dir, "--num", str(clips)])
    sampler = sample.Sampler(args, device, torch.float32)
    wishes, _ = sample.read_wishes(args, bool(sampler.content.text), sampler.state["classes"])

    def latents(name, steps):
        args.sampler, args.steps, args.motion_steps = name, steps, steps
        content = sampler.draw_content(wishes, range(clips))
        truth.setdefault("content", content)  # the motion of the same content frames
        return dict(content=content, motion=sampler.draw_motion(truth["content"], wishes, range(clips)))

    truth = {}
    truth = latents("ddim", 1000)
    names = content_diffusion.SAMPLERS
    print(f"{run_dir}: distance of {clips} clips from 1000 steps of DDIM, in deviations\nsteps"
          + "".join(f"{f'{part}, {name}':>16}" for part in truth for name in names))
    for steps in (5, 10, 20, 50, 100):
        drawn = {name: latents(name, steps) for name in names}
        row = [((drawn[name][part] - truth[part]).square().mean().sqrt() / truth[part].std()).item()
               for part in truth for name in names]
        print(f"{steps:>5}" + "".join(f"{distance:>16.4f}" for distance in row))


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def bench_loader(args, preset):
    """Prints clips a second in one process, frames decoded for each frame used, and how decoding each file from its
    start compares."""
    frames, size, rng = autoencoder.PRESETS[preset]["frames"], pixels_of(preset, None), np.random.default_rng(0)
    if preset == "shapes" and not args.data:
        dataset = data.MovingShapes(frames, size)
        seconds = statistics.median(timed(lambda: dataset[i])[1] for i in range(50))
        print(f"loader: {1 / seconds:.0f} clips/s a core, drawn, not decoded")
        return

    decoded = []  # frames, of each packet

    def counted(file, read_packets=data.read_packets):
        for shown, packet, stream in read_packets(file):
            def decode(packet=packet):
                decoded.append(len(images := packet.decode()))
                return images

            yield shown, SimpleNamespace(size=packet.size, is_keyframe=packet.is_keyframe, decode=decode), stream

    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(data, "read_packets", counted):
        if not args.data:
            make_videos(folder, preset)
        dataset = data.VideoFolder(args.data or folder, frames, size)
        paths = [os.path.join(dataset.root, name) for name in dataset.files]
        clips, turns = 4 if args.data else 2 * len(paths), []
        for _ in range(args.rounds + 1):  # the first warms up
            picks = [paths[i] for i in rng.integers(len(paths), size=clips)]
            turns.append([timed(lambda: [read(path, frames, size, rng=rng) for path in picks])[1] / clips
                          for read in (data.read_clip, plain_read)])
        loaded = data.load(dataset, [[(i % len(dataset), i)] for i in range(9)], 1)
        batch = next(loaded)["video"]  # starts the process
        seconds = timed(lambda: [data.to_floats(batch["video"].to(args.device)) for batch in loaded])[1] / 8
    ours, own = (statistics.median(seconds) for seconds in zip(*turns[1:]))
    print(f"loader: {1 / ours:.1f} clips/s a core of {frames} frames at {size[0]}x{size[1]}, "
          f"{sum(decoded) / (len(turns) * clips * frames):.2f} frames decoded for each used; decoding from each "
          f"file's start {1 / own:.1f}, so {ours / own:.2f}x its time, {own / ours:.2f}x its clips")
    print(f"loader: {1 / seconds:.1f} clips/s from one process to the device, {batch.nbytes / 1e6:.2f} MB a clip")


def make_videos(folder, preset):
    """Files such as UCF-101's (320x240, 25 a second, 7 s, MPEG-4) or WebVid's (596x336, 30 a second, 18 s, H.264), with
    the encoders' default distance between key frames."""
    (width, height, rate, length, codec, name, gop) = (
        (320, 240, 25, 186, "mpeg4", "avi", 12) if preset == "ucf101" else (596, 336, 30, 540, "libx264", "mp4", 250))
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 9, width // 8 + 80, 3), np.uint8)
    for number in range(3):
        with av.open(os.path.join(folder, f"{number}.{name}"), "w") as file:
            stream = file.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", gop
            for i in range(length):  # a texture that moves
                x = (i + 17 * number) % 512
                picture = noise.repeat(8, 0).repeat(8, 1)[i % 64:][:height, x:x + width]
                file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
            file.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Memory of training, computed on fake tensors, which have shapes but no values


def flash(q, k, v, is_causal=False):
    """A GPU's kernel in place of F.scaled_dot_product_attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*(x.bfloat16() for x in (q, k, v)), 0.0, is_causal)[0]


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made within it: `now` alive, and most alive at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return results

    def freed(self, key, size):
        self.alive.remove(key)
        self.now -= size


def activation_bytes(stage, preset, batch, size=None, checkpointing=False):
    """(bytes that a forward pass of `batch` clips, under autocast to bfloat16, keeps for the backward pass; the most
    that both take at any time), beside the weights and their gradients. The tensors say that they are on the CPU, since
    a backward pass asks for a real GPU; in the forward pass, fake ones on a GPU take the same."""
    with torch.device("meta"):
        model = make_model(stage, preset, size)
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    with FakeTensorMode(), unittest.mock.patch.object(F, "scaled_dot_product_attention", flash):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = torch.empty_strided(tensor.shape, tensor.stride())
                        table[name].requires_grad_(tensor.requires_grad)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        inputs = make_inputs(stage, model, preset, batch, size)
        with Memory() as memory:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(*inputs)
            kept = memory.now
            output.float().square().mean().backward()
    return kept, memory.peak


def state_bytes(stage, preset, size=None):
    """Bytes of weights, gradients, Adam's two moments and (stages 2, 3) the average, and of frozen models in half."""
    with torch.device("meta"):
        count = sum(p.numel() for p in make_model(stage, preset, size).parameters())
        frozen = []
        if preset in UNETS:
            frozen = list((image_autoencoder("meta") if stage == "autoencoder" else content_diffusion.TextEncoder(
                **TEXT[preset if stage == "content" else "webvid_sd21"])).parameters())
    return (16 if stage == "autoencoder" else 20) * count + 2 * sum(p.numel() for p in frozen)


def print_memory(presets, stages, batch=None, size=None):
    """For each preset and stage, without and with --checkpointing: what its batch on eight GPUs needs of each, in one
    pass; and how many clips a pass fit GPUs of 24, 48 and 80 GB, of which a tenth is left free."""
    print(f"{'preset':<12}{'stage':<12}{'states':>7} GiB{'clips a GPU':>13}{'saved':>7} GiB{'peak':>7} GiB"
          f"{'clips a pass in 24 GB':>24}{'48 GB':>7}{'80 GB':>7}")
    for preset, stage in ((preset, stage) for preset in presets for stage in stages):
        module = dict(autoencoder=autoencoder, content=content_diffusion, motion=motion_diffusion)[stage]
        clips = batch or max(1, module.PRESETS[preset]["batch_size"] // 8)
        states = state_bytes(stage, preset, size)
        for checkpointing in (False, True):
            some, twice = (np.array(activation_bytes(stage, preset, n, size, checkpointing))
                           for n in (clips, 2 * clips))
            each, fixed = (twice[1] - some[1]) / clips, 2 * some[1] - twice[1]
            saved, peak = some / 2**30
            fits = [max(0, int((0.9 * card * 1e9 - states - fixed) // each)) for card in (24, 48, 80)]
            print(f"{preset:<12}{stage:<12}{states / 2**30:>7.1f}    {clips:>13}{saved:>7.1f}    {peak:>7.1f}    "
                  f"{fits[0]:>24}{fits[1]:>7}{fits[2]:>7}{'  --checkpointing' * checkpointing}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def plan(rate, mfu, preset="webvid_sd21"):
    """Prints what the paper's WebVid-10M run (10.7 M clips), or that on UCF-101, takes: each stage's operations divided
    by those that a GPU does. rate: one GPU's operations a second; mfu: {stage: MFU} for all STAGES."""
    p, name = autoencoder.PRESETS[preset], "UCF-101" if preset == "ucf101" else "WebVid-10M"
    encoded = (9_537 if preset == "ucf101" else 10_700_000) * p["clips_per_video"]
    one = {stage: 2 * forward_macs(stage, preset)[1] * (1 if stage == "encoding" else 3) / (rate * mfu[stage])
           for stage in STAGES}  # seconds a clip on one GPU
    latents = 0
    if preset in UNETS:
        images = torch.empty(p["frames"], 3, *data.pair(p["size"]), device="meta")
        latents = 2 * sum(macs(lambda: image_autoencoder("meta").encode(images))) / (rate * mfu["encoding"])
    stage_1, trained = (of["steps"] * of["batch_size"] for of in (p, content_diffusion.PRESETS[preset]))  # clips
    height, width = (side // (8 if preset in UNETS else 1) for side in data.pair(p["size"]))
    motion = p["motion_channels"] * p["frames"] * (height + width) // p["patch"]
    stored = 2 * (p["channels"] * height * width + motion)  # bytes a clip, in half
    # The paper gives a week on 8 A100 for stage 1, and seconds a step at batch 1 (16x512x512, A100) for the others.
    rows = [("1 autoencoder", stage_1 * (one["autoencoder"] + latents), None, 8 * 168),
            ("  encoding, once", encoded * one["encoding"], encoded * stored, None),
            ("2 content", trained * one["content"], None, trained * 0.151 / 3600),
            ("3 motion", trained * one["motion"], None, trained * 0.100 / 3600)]
    rows.append(("all", sum(row[1] for row in rows), encoded * stored, None))
    rows.append(("all, encodings not stored", rows[-1][1] + (2 * trained - encoded) * one["encoding"], 0, None))
    reached = ", ".join(f"{stage} {mfu[stage]:.0%}" for stage in STAGES)
    print(f"\nplan: {name} at 16x{'x'.join(map(str, data.pair(p['size'])))}, {encoded / 1e6:.1f} M clips stored, "
          f"stage 1 {stage_1 / 1e6:.0f} M clips, stages 2 and 3 {trained / 1e6:.1f} M, at {rate / 1e12:.0f} TFLOPS and "
          f"MFU {reached}")
    print(f"{'':<26}{'GPU hours':>10}{'on 8, h':>10}{'on 64, h':>10}{'bytes':>10}"
          + f"{'paper, A100 hours':>19}" * (preset in UNETS))
    for name, seconds, size, paper in rows:
        hours = seconds / 3600
        print(f"{name:<26}{hours:>10,.0f}{hours / 8:>10,.0f}{hours / 64:>10,.0f}"
              f"{'' if size is None else f'{size / 1e12:.2f} TB' if size > 1e11 else f'{size / 1e9:.1f} GB':>10}"
              f"{'' if paper is None or preset not in UNETS else f'{paper:,.0f}':>19}")
    if preset in UNETS:
        print("paper: stage 1 about a week on 8 A100; stages 2 and 3 from its seconds a step at batch 1, 16x512x512")


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = data.Flags(__doc__)
    add = parser.add_argument
    add("--preset", choices=autoencoder.PRESETS, help="default: shapes; on a GPU, the whole report")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--only", nargs="+", choices=[*STAGES, "sampling", "loader"], help="default: all")
    add("--against", action="store_true", help="time a plain version too, and print ratios")
    add("--compile", action="store_true", help="time a compiled version as well")
    add("--batch-size", type="count", help="clips a training step (default: 8 for shapes, else 1)")
    add("--clips", type="count", nargs="+", help="clips drawn at once (default: 1 24; of webvid 1 4)")
    add("--size", type="count", nargs="+", help="pixels, in place of the preset's")
    add("--depth", type="count", help="blocks in the autoencoder's encoder and decoder, if all do not fit")
    add("--rounds", type="count", help="turns of each version (default: 3; 1 in a GPU's report)")
    add("--data", help="folder of videos for the loader (default: made up)")
    add("--samplers", metavar="RUN_DIR", help="compare few steps of each sampler with 1000 of DDIM")
    add("--plan", action="store_true", help="print the plan alone, from --rate and --mfu")
    add("--memory", action="store_true", help="print what training needs of a GPU's memory, computed without one")
    add("--rate", type="number", help="TFLOPS of one GPU, for --plan")
    add("--mfu", type="share", default=0.4, help="share of --rate that is reached, for --plan")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise data.InputError("--device cuda: PyTorch finds no GPU here")
    if args.plan:
        for preset in ("webvid_sd21", "webvid_sd15", "ucf101"):
            plan((args.rate or 312) * 1e12, dict.fromkeys(STAGES, args.mfu), preset)
        return
    if args.memory:
        stages = [stage for stage in ("autoencoder", "content", "motion") if stage in (args.only or STAGES)]
        large = [name for name in autoencoder.PRESETS if not name.startswith("shapes")]
        presets = [args.preset] if args.preset else large
        return print_memory(presets, stages, args.batch_size, args.size)
    if args.samplers:
        return compare_samplers(args.samplers, args.device)
    report = args.device.type == "cuda" and not args.preset
    args.preset = args.preset or ("webvid_sd21" if report else "shapes")
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.depth:
        autoencoder.PRESETS[args.preset]["depth"] = args.depth
    args.machine_rate = matrix_rate(args.device)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}: {args.machine_rate / 1e12:.3g} TFLOPS in "
          f"matrix products; preset {args.preset}")
    wanted = args.only or [*STAGES, "sampling", "loader"]
    args.compile, args.rounds = args.compile or report, args.rounds or (1 if report else 3)

    # A GPU's report trains at 16x512x512, as the paper's cost table does, and samples at the preset's size.
    size = args.size or ([512, 512] if report else None)
    print(f"{'step':<14} {'version':<9} {'batch':>5} {'seconds':>9} {'clips/s':>9} {'GB':>8} {'T paper':>8} "
          f"{'T full':>8} {'MFU':>6}{'   ratio' if args.against else ''}")
    mfu = {}
    for stage in (stage for stage in STAGES if stage in wanted):
        batches = [args.batch_size or (8 if args.preset == "shapes" else 1)] + [8] * (report and stage == "content")
        mfu[stage] = max(bench_training(args, stage, args.preset, batch, size) or 0 for batch in batches)
    if "autoencoder" in wanted:
        bench_time_attention(args.device, args.preset, args.batch_size or 1)
    if "sampling" in wanted:
        print("\n" + SAMPLING_COLUMNS + ("  ratio" if args.against else ""))
        versions = ["ours"] + ["compiled"] * args.compile
        if args.device.type == "cpu":  # a GPU computes in bfloat16 by default
            versions += ["bfloat16"] + ["compiled bfloat16"] * args.compile
        versions += ["plain"] * args.against
        fifty = dict(steps=50, motion_steps=50) if args.preset in UNETS else {}
        for clips in args.clips or ([1, 4] if fifty else [1, 24]):
            bench_sampling(args, args.preset, clips, versions, args.size, **fifty)
        if fifty:
            print("as the paper times it, without guidance:")
            count = bench_sampling(args, args.preset, 1, versions, args.size, guidance=1, motion_guidance=1, **fifty)
            print(f"by its count {count / 1e12:.1f} TFLOPs")
    if "loader" in wanted:
        print()
        bench_loader(args, args.preset)
    if args.device.type == "cuda" and args.preset in UNETS and all(mfu.get(stage) for stage in STAGES):
        plan(args.machine_rate, mfu)


if __name__ == "__main__":
    data.launch(main)
