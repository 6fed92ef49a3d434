"""Measures this machine: each training stage, sampling, the loader; and plans the paper's WebVid-10M run from that.

    python tests/bench.py                                # the shapes preset on the CPU, minutes
    python tests/bench.py --preset ucf101 --against      # in turns with a plain version of the same steps: ratios
    python tests/bench.py --device cuda                  # a GPU's whole report at published sizes; --only takes parts
    python tests/bench.py --plan --rate 660 --mfu 0.45   # the plan for a GPU that is not here

Weights are random and data made up: speed depends on neither. Versions of a step take turns, each turn a call to warm
up and then timed ones, and figures are medians, so that noise falls on all alike. MFU is the share of the machine's own
best rate in large matrix products, measured at the same time: 2 x multiply-accumulates of the forward pass (attention
products with them), x 3 in training, over seconds and that rate. Memory: on a GPU tensors, on a CPU the whole process.

`plain` is what one writes first: float32, attention by its formula on rearranged copies, guidance by two calls, Adam
and the average of weights by loops over tensors, the loss read at every step, glibc's own memory policy, files written
one by one, videos decoded from their start. It has the same weights and gives the same results (test_speed.py).
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import os
import resource
import statistics
import sys
import tempfile
import unittest.mock

import av
import numpy as np
import torch
from einops import rearrange
from PIL import ImageOps

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import autoencoder
import content_diffusion
import data
import motion_diffusion
import sample
from autoencoder import Autoencoder, ImageAutoencoder
from content_diffusion import DIT_SIZES, Diffusion, DiT, TextEncoder, UNet
from motion_diffusion import MotionDiT

CLASSES = dict(shapes=12, ucf101=101)
UNETS = dict(webvid_sd15=dict(), webvid_sd21=dict(context=1024, head_width=64))
TEXT = dict(webvid_sd15=dict(), webvid_sd21=dict(width=1024, layers=23, heads=16, quick_gelu=False, pad=0))
STAGES = ("encoding", "autoencoder", "content", "motion")

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def keep_memory(keep):
    """glibc keeps what tensors free (as data.start() has it), or gives it back as it does of its own."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30 if keep else 32 << 20)  # M_MMAP_THRESHOLD; 32 MiB is where its own policy ends up
        libc.mallopt(-1, 1 << 30 if keep else 64 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew


def peak_memory(device):
    """Bytes: what tensors took on a GPU, what the whole process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds_of(call):
    clock = sample.Clock(True)  # waits for the device
    clock("before")
    call()
    clock("call")
    return clock.seconds["call"]


def take_turns(versions, rounds, device):
    """{name: (median seconds, peak bytes)}. versions: {name: a function that makes the step, a function of nothing}."""
    seconds, peaks = {name: [] for name in versions}, {}
    for _ in range(rounds):
        for name, make in versions.items():
            with plain() if name == "plain" else contextlib.nullcontext():
                keep_memory(name != "plain")
                step = make()
                step()
                reset_peak(device)
                first = seconds_of(step)
                seconds[name] += [first] + [seconds_of(step) for _ in range(min(10, int(1 / first)))]
                peaks[name] = peak_memory(device)
                del step
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in versions}


def matrix_rate(device):
    """Operations a second (two a multiply-accumulate) of large matrix products: float32 on a CPU, bfloat16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ b) for _ in range(20))


# ---------------------------------------------------------------------------------------------------------------------
# The plain version


def formula(q, k, v, causal=False):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def plain_divided(self, x):  # autoencoder.Attention
    B, L = x.shape[:2]
    one, other = ("b l n c -> (b n) l c", "(b n) l c -> b l n c") if self.over == "time" else (
        "b l n c -> (b l) n c", "(b l) n c -> b l n c")
    x = rearrange(x, one)
    q, k, v = (rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads)
               for layer in (self.query, self.key, self.value))
    return rearrange(self.out(rearrange(formula(q, k, v), "b h n d -> b n (h d)")), other,
                     **(dict(b=B) if self.over == "time" else dict(l=L)))


def plain_dit(self, x):  # content_diffusion.DiTAttention
    q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
    return self.proj(rearrange(formula(q, k, v), "b h n d -> b n (h d)"))


def plain_cross(self, x, context):  # content_diffusion.CrossAttention
    q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads)
               for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
    return self.to_out(rearrange(formula(q, k, v), "b h n d -> b n (h d)"))


def plain_image(self, x):  # autoencoder.ImageAttention
    h = self.norm(x)
    q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
    return x + self.proj_out(rearrange(formula(q, k, v), "b (h w) c -> b c h w", h=x.shape[2]))


def plain_guided(predict, condition, nothing, scale):
    def denoise(x, t):
        with_ = predict(x, t, condition)
        return with_ if scale == 1 else with_ + (scale - 1) * (with_ - predict(x, t, nothing))

    return denoise


@contextlib.contextmanager
def plain():
    patches = ((autoencoder.Attention, "forward", plain_divided), (autoencoder.ImageAttention, "forward", plain_image),
               (content_diffusion.DiTAttention, "forward", plain_dit), (sample, "guided", plain_guided),
               (content_diffusion.CrossAttention, "forward", plain_cross))
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        for owner, name, own in patches:
            stack.enter_context(unittest.mock.patch.object(owner, name, own))
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(precision)


def plain_read(path, frames, size, rng):
    """A clip as data.read_clip gives it, decoded from the file's start, each frame resized by Pillow."""
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
    size = size or autoencoder.PRESETS[preset]["size"]
    return tuple(size) if len(size) == 2 else (size[0], size[0])


def make_model(stage, preset, size=None):
    """A stage's model by its preset, on the default device. size: pixels, in place of the preset's."""
    p = autoencoder.PRESETS[preset]
    text, size = preset in UNETS, pixels_of(preset, size)
    frame = tuple(n // 8 for n in size) if text else size
    if stage in ("autoencoder", "encoding"):
        sizes = {name: p[name] for name in ("channels", "frames", "patch", "width", "motion_channels", "depth", "heads",
                                            "smooth")}
        return Autoencoder(size=frame, squash=not text, **sizes)
    if stage == "content":
        own = content_diffusion.PRESETS[preset]
        return UNet(**UNETS[preset]).to(memory_format=torch.channels_last) if text else DiT(
            p["channels"], frame, own["patch"], classes=CLASSES[preset], **DIT_SIZES[own["model"]])
    own = motion_diffusion.PRESETS[preset]
    return MotionDiT(p["motion_channels"], p["frames"], sum(frame) // p["patch"], p["channels"], frame, own["patch"],
                     own["content_patch"], classes=CLASSES.get(preset, 1),
                     text=TEXT["webvid_sd21"]["width"] if text else None, **DIT_SIZES[own["model"]])


def awake(model):
    """The model with no weight at the zeros that a DiT starts from."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model


def image_autoencoder(device, half):
    return ImageAutoencoder().requires_grad_(False).eval().to(
        device, torch.float16 if half else torch.float32, memory_format=torch.channels_last)


def make_inputs(stage, model, preset, batch, size=None):
    """What the model is called with, `batch` random clips, on the default device."""
    if stage in ("autoencoder", "encoding"):
        return [torch.randn(batch, model.channels, model.frames, *model.size)]
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
    """(as the paper counts, with attention too) of a clip's forward pass. encoding: the image encoder, if any, and the
    autoencoder's encoder."""
    with torch.device("meta"), torch.no_grad():
        model = make_model(stage, preset, size)
        inputs = make_inputs(stage, model, preset, 1, size)
        layers, attention = sample.macs(lambda: (model.encode if stage == "encoding" else model)(*inputs))
        if stage == "encoding" and preset in UNETS:
            image = torch.empty(autoencoder.PRESETS[preset]["frames"], 3, *pixels_of(preset, size))
            more = sample.macs(lambda: ImageAutoencoder().encode(image))
            layers, attention = layers + more[0], attention + more[1]
    return layers, layers + attention


def training_step(stage, model, call, inputs, version):
    """A function of nothing: one step as the stage's script does it, or (`plain`) as one writes it first."""
    device, ours = inputs[0].device, version != "plain"
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True if ours else None)
    averages = [weight.detach().clone() for weight in weights] if stage != "autoencoder" else []
    diffusion = Diffusion("linear").to(device)

    def loss_of():
        if stage == "autoencoder":
            return (call(*inputs).float() - inputs[0]).square().mean()
        x, t, *rest = inputs
        return diffusion.loss(lambda x, t: call(x, t, *rest), x, t, torch.randn_like(x))

    def step():
        with torch.autocast(device.type, torch.bfloat16, ours and device.type == "cuda" or version == "bfloat16"):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if averages and ours:
                torch._foreach_lerp_(averages, weights, 0.001)
            for average, weight in zip(averages, () if ours else weights):
                average.mul_(0.999).add_(weight, alpha=0.001)
        return None if ours else loss.item()

    return step


def encoding_step(model, image, inputs, pixels):
    """A function of nothing: one batch of the data set's encoding, as autoencoder.encode_dataset does it."""
    @torch.no_grad()
    def step():
        frames = autoencoder.to_frames(pixels, image) if image else inputs[0]
        with torch.autocast(frames.device.type, torch.bfloat16, frames.device.type == "cuda"):
            return [part.half().cpu() for part in model.encode(frames)]

    return step


def bench_training(args, stage, preset, batch, size=None):
    """Prints a row for each version of a stage's step, and returns the MFU of the quickest of ours."""
    device = args.device
    with torch.device("meta"):
        count = sum(p.numel() for p in make_model(stage, preset, size).parameters())
    if device.type == "cpu" and count * 20 > free_memory():  # weights, gradients, two moments, average
        print(f"{stage:<14} left out: {count / 1e6:.0f} M parameters need more than the free memory")
        return None
    torch.manual_seed(0)
    with torch.device(device):
        model, image, pixels = awake(make_model(stage, preset, size)), None, None
        inputs = make_inputs(stage, model, preset, batch, size)
        if stage == "encoding" and preset in UNETS:
            image = image_autoencoder(device, half=device.type == "cuda")
            pixels = torch.rand(batch, 3, model.frames, *pixels_of(preset, size)) * 2 - 1

    if stage == "encoding":
        versions = dict(ours=lambda: encoding_step(model, image, inputs, pixels))
    else:
        calls = dict(ours=model)
        if args.compile:
            calls["compiled"] = torch.compile(model)
        if device.type == "cpu":  # --dtype bfloat16: a GPU's default
            calls["bfloat16"] = model
        if args.against:
            calls["plain"] = model
        versions = {name: functools.partial(training_step, stage, model, call, inputs, name)
                    for name, call in calls.items()}
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


def free_memory():
    with open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def make_sampler(preset, device, dtype=None, size=None, compiled=False, **flags):
    """sample.Sampler with random weights in place of a run folder's."""
    args = sample.flags().parse_args(["--compile"] if compiled else [])
    vars(args).update(sample.DEFAULTS[preset] | flags)
    sampler = sample.Sampler.__new__(sample.Sampler)
    sampler.args, sampler.device, sampler.sampler = args, device, sample.SAMPLERS[args.sampler]
    sampler.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device(device):
        sampler.autoencoder, sampler.image = make_model("autoencoder", preset, size).requires_grad_(False).eval(), None
        if preset in UNETS:
            sampler.image = image_autoencoder(device, half=device.type == "cuda" and sampler.dtype != torch.float32)
        for stage in ("content", "motion"):
            model = awake(make_model(stage, preset, size))
            shape = make_inputs(stage, model, preset, 1, size)[0].shape[1:]
            text = preset in UNETS and TextEncoder(**TEXT[preset if stage == "content" else "webvid_sd21"])
            setattr(sampler, stage, sampler.prepare(model, text or None, Diffusion("linear"), shape))
    if compiled:
        sampler.compile_decoders()
    sampler.progress = lambda name: iter
    return sampler


@torch.inference_mode()
def draw(sampler, clips, folder, ours):
    """({part: seconds} of clips from prompt or label to files, peak bytes without and with the image decoder)"""
    wishes = [f"video number {n}" if sampler.content.text else n % sampler.content.model.classes for n in range(clips)]
    # Random weights draw noise, which no codec compresses as it does videos: these are written.
    shapes = data.MovingShapes(sampler.autoencoder.frames, [n * (8 if sampler.image else 1)
                                                            for n in sampler.autoencoder.size])
    written = [shapes[n]["video"] for n in range(min(clips, 12))]
    for stage in (sampler.content, sampler.motion):
        stage.cache.clear()
    reset_peak(sampler.device)
    clock = sample.Clock(True)
    content = sampler.draw_content(wishes, range(clips))
    clock("content")
    motion = sampler.draw_motion(content, wishes, range(clips))
    clock("motion")
    with torch.autocast(sampler.device.type, torch.bfloat16, ours and sampler.device.type == "cuda"):
        frames = sampler.autoencoder.decode(content, motion)
    clock("autoencoder")
    peaks = [peak_memory(sampler.device)]
    autoencoder.to_pixels(frames, sampler.image).cpu()
    clock("image decoder")
    peaks.append(peak_memory(sampler.device))
    with concurrent.futures.ThreadPoolExecutor(2 if ours else 1) as writers:
        list(writers.map(lambda n: data.write_video(f"{folder}/{n}.mp4", written[n % 12], 8), range(clips)))
    clock("files")
    return clock.seconds, peaks


def bench_sampling(args, preset, clips, versions, size=None, **flags):
    """Prints a row for each version: seconds of each part, MFU of the diffusion models, memory."""
    results = {version: [] for version in versions}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for version in versions:
                ours = version != "plain"
                with contextlib.nullcontext() if ours else plain():
                    keep_memory(ours)
                    dtype = torch.float32 if not ours else torch.bfloat16 if "bfloat16" in version else None
                    sampler = make_sampler(preset, args.device, dtype, size, "compiled" in version, **flags)
                    steps = sampler.args.steps, sampler.args.motion_steps
                    sampler.args.steps = sampler.args.motion_steps = 3
                    draw(sampler, clips, folder, ours)  # warms up, compiles
                    sampler.args.steps, sampler.args.motion_steps = steps
                    results[version].append(draw(sampler, clips, folder, ours))
                    del sampler
    meta = make_sampler(preset, torch.device("meta"), size=size, **flags)
    macs = sample.sampling_macs(meta)
    totals = {}
    for version, turns in results.items():
        parts = {part: statistics.median(times[part] for times, _ in turns) for part in turns[0][0]}
        totals[version] = statistics.median(sum(times.values()) for times, _ in turns)
        times = "".join(f"{parts[part]:>9.3f}" for part in parts)
        mfu = "".join(f"{2 * macs[part][1] * clips / parts[part] / args.machine_rate:>7.1%}"
                      for part in ("content", "motion"))
        memory = "".join(f"{peak / 1e9:>7.2f}" for peak in turns[0][1])
        ratio = ""
        if "plain" in results:
            ratio = f"{totals[version] / statistics.median(sum(t.values()) for t, _ in results['plain']):7.2f}"
        print(f"{version:<17} {clips:>5}{times}{totals[version]:>9.3f}{mfu}{memory}{ratio}", flush=True)
    return sum(part[0] for part in macs.values())


SAMPLING_COLUMNS = (f"{'sampling':<17} {'clips':>5}{'content':>9}{'motion':>9}{'decode':>9}{'images':>9}{'files':>9}"
                    f"{'seconds':>9}{'MFU c.':>7}{'MFU m.':>7}{'GB':>7}{'+image':>7}")


@torch.no_grad()
def compare_samplers(run, device, clips=12):
    """Root mean square distance, in the latents' deviations, of what each sampler draws in few steps from what DDIM
    draws in 1000, from the same noise and with the preset's guidance. A step costs both samplers the same: one call."""
    args = sample.flags().parse_args(["--run", run])
    sampler = sample.Sampler(args, device)
    args.guidance, args.motion_guidance = sample.DEFAULTS[sampler.state["args"]["preset"]].values()
    wishes = [i % len(sampler.state["classes"]) for i in range(clips)]

    def draw(name, steps):
        args.steps = args.motion_steps = steps
        sampler.sampler = sample.SAMPLERS[name]
        content = sampler.draw_content(wishes, range(clips))
        truth.setdefault("content", content)  # the motion of the same content frames
        return dict(content=content, motion=sampler.draw_motion(truth["content"], wishes, range(clips)))

    truth = {}
    truth = draw("ddim", 1000)
    print(f"{run}: distance of {clips} clips from 1000 steps of DDIM, in deviations\n"
          f"{'steps':>5} {'content: ddim':>14} {'dpm++':>7} {'motion: ddim':>13} {'dpm++':>7}")
    for steps in (5, 10, 20, 50, 100):
        drawn = {name: draw(name, steps) for name in sample.SAMPLERS}
        row = [((drawn[name][part] - truth[part]).square().mean().sqrt() / truth[part].std()).item()
               for part in truth for name in sample.SAMPLERS]
        print("{:>5} {:>14.4f} {:>7.4f} {:>13.4f} {:>7.4f}".format(steps, *row))


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def bench_loader(args, preset):
    """Clips a second in one process, frames decoded for each frame used, and decoding each file from its start."""
    p = autoencoder.PRESETS[preset]
    size, frames = pixels_of(preset, None), p["frames"]
    if preset == "shapes" and not args.data:
        dataset = data.MovingShapes(frames, size)
        dataset[0]
        seconds = statistics.median(seconds_of(lambda: dataset[i]) for i in range(50))
        print(f"loader: {1 / seconds:.0f} clips/s a core, drawn, not decoded")
        return
    counts = dict(decoded=0)
    decoded = data.decoded_frames

    def counting(*arguments):
        for frame in decoded(*arguments):
            counts["decoded"] += 1
            yield frame

    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            make_videos(folder, preset)
        dataset = data.VideoFolder(args.data or folder, frames, size)
        paths = [os.path.join(dataset.root, name) for name in dataset.files]
        rng, turns = np.random.default_rng(0), {"ours": [], "plain": []}
        clips = 4 if args.data else 2 * len(paths)
        with unittest.mock.patch.object(data, "decoded_frames", counting):
            for turn in range(args.rounds + 1):  # the first warms up
                picks = rng.integers(len(paths), size=clips)
                ours = seconds_of(lambda: [dataset.read(int(i), turn * clips + n) for n, i in enumerate(picks)])
                own = seconds_of(lambda: [plain_read(paths[i], frames, size, rng) for i in picks])
                if turn:
                    turns["ours"].append(ours / clips)
                    turns["plain"].append(own / clips)
        ours, own = (statistics.median(turns[name]) for name in turns)
        used = (args.rounds + 1) * clips * frames
        print(f"loader: {1 / ours:.1f} clips/s a core of {frames} frames at {size[0]}x{size[1]}, "
              f"{counts['decoded'] / used:.2f} frames decoded for each used; decoding from each file's start "
              f"{1 / own:.1f}, so {ours / own:.2f}x its time, {own / ours:.2f}x its clips")


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
# The plan


def plan(rate, mfu):
    """Prints what the paper's WebVid-10M run (10.7 M clips of 16x512x1024) takes: rate in operations a second of one
    GPU, mfu a dictionary over STAGES. Each stage's hours are its multiply-accumulates over what the GPUs do."""
    preset, size, clips, epochs = "webvid_sd21", (512, 1024), 10_700_000, 3
    ops = {stage: 2 * forward_macs(stage, preset, size)[1] * (1 if stage == "encoding" else 3) for stage in STAGES}
    p = autoencoder.PRESETS[preset]
    one = {stage: ops[stage] / (rate * mfu[stage]) for stage in STAGES}  # seconds a clip of one GPU
    with torch.device("meta"), torch.no_grad():
        image = torch.empty(p["frames"], 3, *size)
        latents = 2 * sum(sample.macs(lambda: ImageAutoencoder().encode(image))) / (rate * mfu["encoding"])
    stage_1 = p["steps"] * p["batch_size"]
    stored = 2 * (4 * 64 * 128 + 8 * 16 * (32 + 64))  # bytes a clip: content frame and motion latent in half
    # The paper gives a week on 8 A100 for stage 1, and seconds a step at batch 1 (16x512x512, A100) for the others.
    rows = [("1 autoencoder", stage_1 * (one["autoencoder"] + latents), None, 8 * 168),
            ("  encoding, once", clips * one["encoding"], clips * stored, None),
            ("2 content", epochs * clips * one["content"], None, epochs * clips * 0.151 / 3600),
            ("3 motion", epochs * clips * one["motion"], None, epochs * clips * 0.100 / 3600)]
    rows.append(("all", sum(row[1] for row in rows), clips * stored, None))
    twice = 2 * epochs * clips * one["encoding"]
    rows.append(("all, encodings not stored", rows[-1][1] - clips * one["encoding"] + twice, 0, None))
    reached = ", ".join(f"{stage} {mfu[stage]:.0%}" for stage in STAGES)
    print(f"\nplan: WebVid-10M at 16x512x1024, {clips / 1e6:.1f} M clips, stage 1 {stage_1 / 1e6:.0f} M clips, "
          f"stages 2 and 3 {epochs} epochs, at {rate / 1e12:.0f} TFLOPS and MFU {reached}")
    print(f"{'':<26}{'GPU hours':>10}{'on 8, h':>10}{'on 64, h':>10}{'bytes':>10}{'paper, A100 hours':>19}")
    for name, seconds, size_, paper in rows:
        hours = seconds / 3600
        print(f"{name:<26}{hours:>10,.0f}{hours / 8:>10,.0f}{hours / 64:>10,.0f}"
              f"{'' if size_ is None else f'{size_ / 1e12:.2f} TB':>10}{'' if paper is None else f'{paper:,.0f}':>19}")
    print("paper: stage 1 about a week on 8 A100; stages 2 and 3 from its seconds a step at batch 1, half this width")


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = data.Flags(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=autoencoder.PRESETS, help="default: shapes; on a GPU, the whole report")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "sampling", "loader"], help="default: all")
    parser.add_argument("--against", action="store_true", help="time a plain version in turns with ours, with ratios")
    parser.add_argument("--compile", action="store_true", help="time a compiled version as well")
    parser.add_argument("--batch-size", type=data.COUNT, help="clips a training step (default: 8 for shapes, else 1)")
    parser.add_argument("--clips", type=data.COUNT, nargs="+", help="clips drawn at once (default: 1 24; of sd 1 4)")
    parser.add_argument("--size", type=data.COUNT, nargs="+", help="pixels, in place of the preset's")
    parser.add_argument("--depth", type=data.COUNT, help="blocks in each trunk of the autoencoder, if all do not fit")
    parser.add_argument("--rounds", type=data.COUNT, help="turns of each version (default: 3; 1 in a GPU's report)")
    parser.add_argument("--data", help="folder of videos for the loader (default: made up)")
    parser.add_argument("--samplers", metavar="RUN", help="how near few steps of each sampler come to 1000 of DDIM")
    parser.add_argument("--plan", action="store_true", help="print the plan alone, from --rate and --mfu")
    parser.add_argument("--rate", type=float, help="TFLOPS of one GPU, for --plan")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of --rate that is reached, for --plan")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise data.InputError("--device cuda: PyTorch finds no GPU here")
    if args.plan:
        return plan((args.rate or 312) * 1e12, dict.fromkeys(STAGES, args.mfu))
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

    # Training at 16x512x512 on a GPU, as in the paper's cost table; sampling at the preset's size.
    size = args.size or ([512, 512] if report else None)
    print(f"{'step':<14} {'version':<9} {'batch':>5} {'seconds':>9} {'clips/s':>9} {'GB':>8} {'T paper':>8} "
          f"{'T full':>8} {'MFU':>6}{'   ratio' if args.against else ''}")
    mfu = {}
    for stage in (stage for stage in STAGES if stage in wanted):
        batches = [args.batch_size or (8 if args.preset == "shapes" else 1)] + [8] * (report and stage == "content")
        mfu[stage] = max(bench_training(args, stage, args.preset, batch, size) or 0 for batch in batches)
    if "sampling" in wanted:
        print("\n" + SAMPLING_COLUMNS + ("  ratio" if args.against else ""))
        versions = ["ours"] + ["compiled"] * args.compile
        if args.device.type == "cpu":  # a GPU has half precision anyway
            versions += ["bfloat16"] + ["compiled bfloat16"] * args.compile
        versions += ["plain"] * args.against
        fifty = dict(steps=50, motion_steps=50) if args.preset in UNETS else {}
        for clips in args.clips or ([1, 4] if fifty else [1, 24]):
            bench_sampling(args, args.preset, clips, versions, args.size, **fifty)
        if fifty:
            print("as the paper times it, without guidance:")
            macs = bench_sampling(args, args.preset, 1, versions, args.size, guidance=1, motion_guidance=1, **fifty)
            print(f"by its count {macs / 1e12:.1f} TFLOPs")
    if "loader" in wanted:
        print()
        bench_loader(args, args.preset)
    if args.device.type == "cuda" and args.preset in UNETS and all(mfu.get(stage) for stage in STAGES):
        plan(args.machine_rate, mfu)


if __name__ == "__main__":
    data.run(main)
