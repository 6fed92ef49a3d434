"""Measures each stage's step and sampling on this machine, computes memory, and plans the paper's runs.

    python tools/bench.py                                     # the shapes preset on the CPU
    python tools/bench.py --preset ucf101 --only motion --compile
    python tools/bench.py --preset webvid_sd21 --only sampling --count                 # one clip's cost, nothing is run
    python tools/bench.py --memory                            # what training needs of a GPU's memory, without one
    python tools/bench.py --plan --rate 660 --mfu 0.45        # hours and bytes of the paper's runs

Weights and data are random: speed depends on neither. Versions take turns, so that other load slows all alike, and
figures are medians. T are 10**12 multiply-accumulates of one clip: as the paper counts them, of convolutions and linear
layers alone, and in full. Memory is that of the tensors on a GPU, of the process on a CPU. For GPUs: tools/gpu.py.
"""

import argparse
import contextlib
import itertools
import math
import os
import statistics
import sys
import time
import unittest.mock
import weakref

import torch
import torch.nn.functional as F
from macs import macs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from autoencoder import Autoencoder, ImageAutoencoder
from content_diffusion import Diffusion, DiT, TextEncoder, UNet, ddim
from motion_diffusion import MotionDiT

L, MINI = dict(width=1024, depth=24, heads=16), dict(width=128, depth=4, heads=4)  # DiT-XL is the models' default
PRESETS = {  # the scripts' presets (tables 5 to 7): pixels, and what the models are told beside them
    "shapes": dict(size=(32, 32), autoencoder=dict(channels=3, patch=4, width=64, depth=2, heads=4, smooth=True),
                   content=dict(patch=4, classes=12, **MINI), motion=dict(classes=12, **MINI)),
    "shapes_text": dict(size=(32, 32), autoencoder=dict(patch=1, width=64, depth=2, heads=4), text=(64, 2, 1),
                        image=dict(channels=32, multipliers=(1, 2, 2), blocks=1), content=dict(
                            width=48, context=64, multipliers=(1, 2, 2), blocks=1),
                        motion=dict(content_patch=2, text=64, **MINI)),
    "ucf101": dict(size=(64, 64), autoencoder=dict(channels=3), content=dict(classes=101),
                   motion=dict(content_patch=4, classes=101, **L)),
    "webvid_sd15": dict(size=(512, 512), autoencoder={}, image={}, text=(768, 12, 12), content={},
                        motion=dict(content_patch=4, text=1024)),
    "webvid_sd21": dict(size=(512, 1024), autoencoder={}, image={}, text=(1024, 23, 16),
                        content=dict(context=1024, head_width=64), motion=dict(text=1024)),
}
STAGES = ("autoencoder", "content", "motion")


# ---- The three stages with random weights, and their steps ----------------------------------------------------------

def image_autoencoder(preset):
    """The frozen one of a preset on latents, on the default device; None where frames are pixels."""
    if "image" not in PRESETS[preset]:
        return None
    model = ImageAutoencoder(**PRESETS[preset]["image"]).requires_grad_(False).eval()
    half = model.quant_conv.weight.is_cuda  # as in the scripts
    return model.to(dtype=torch.float16 if half else torch.float32, memory_format=torch.channels_last)


def make_model(stage, preset, size=None):
    """A stage's model on the default device. size: (height, width) in pixels, in place of the preset's."""
    p = PRESETS[preset]
    factor = 2 ** (len(p["image"].get("multipliers", (1, 2, 4, 4))) - 1) if "image" in p else 1
    frame, own = tuple(side // factor for side in size or p["size"]), p["autoencoder"]
    channels = own.get("channels", 4)
    if stage == "autoencoder":
        return Autoencoder(size=frame, squash=factor == 1, **own)
    if stage == "motion":
        model = MotionDiT(columns=sum(frame) // own.get("patch", 2), channels=channels, size=frame, **p["motion"])
    elif "image" in p:
        model = UNet(**p["content"]).to(memory_format=torch.channels_last)
    else:
        model = DiT(channels, frame, **p["content"])
    model.frame = (channels, *frame)
    with torch.no_grad():
        for weight in model.parameters():  # the last layers of a new DiT are zero
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def make_inputs(stage, model, preset, batch, size=None):
    """Random inputs of a stage's model for `batch` clips, on the default device. Stage 1's are pixels."""
    if stage == "autoencoder":
        return [torch.randn(batch, 3, model.frames, *(size or PRESETS[preset]["size"]))]
    text = model.context if isinstance(model, UNet) else getattr(model, "text", None)
    condition = torch.arange(batch) % model.classes if not text else torch.randn(
        batch, *[77] * (stage == "content"), text)
    rest = [torch.arange(batch) * 37 % 1000, torch.randn(batch, *model.frame), condition]
    if stage == "content":
        return [rest[1], rest[0], rest[2]]
    return [torch.randn(batch, model.motion_channels, model.frames, model.columns), *rest]


def fold(call, video):
    """call, of an image autoencoder, on all frames of clips (B, C, L, H, W)."""
    return call(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(video), -1)).transpose(1, 2)


def make_stage(stage, preset, batch, size=None):
    """(model, inputs, image autoencoder or None) for training."""
    model = make_model(stage, preset, size)
    return model, make_inputs(stage, model, preset, batch, size), stage == "autoencoder" and image_autoencoder(preset)


def forward_macs(what, preset, size=None):
    """Multiply-accumulates, (of layers, of attention), of one clip's forward pass through a stage's model, or through
    "images", Stable Diffusion's image encoder, or the autoencoder's "encoder"."""
    with torch.device("meta"):
        if what in ("content", "motion"):
            model, inputs, _ = make_stage(what, preset, 1, size)
            return macs(lambda: model(*inputs))
        model, inputs, image = make_stage("autoencoder", preset, 1, size)
        if what == "images":
            return macs(lambda: fold(image.encode, *inputs)) if image else (0, 0)
        latents = torch.empty(1, model.channels, model.frames, *model.size)
        return macs(lambda: model.encode(latents) if what == "encoder" else model(latents))


def training_step(stage, model, image, inputs, half):
    """A function: one step as the stage's script takes it, which returns the loss."""
    device, weights = inputs[0].device.type, list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
    averages = [weight.detach().clone() for weight in weights] if stage != "autoencoder" else []
    diffusion, autocast = Diffusion("linear").to(device), torch.autocast(device, torch.bfloat16, half)

    def step():
        x, *others = inputs
        if stage == "autoencoder":
            with torch.no_grad():
                x = fold(image.encode, x) if image else x
            with autocast:
                output = model(x)
            loss = (output.float() - x).square().mean()
        else:
            t, *rest = others
            with autocast:
                loss = diffusion.loss(lambda x, t: model(x, t, *rest), x, t, torch.randn_like(x))
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(weights, 1.0).isfinite().item():
            optimizer.step()
            with torch.no_grad():
                if averages:
                    torch._foreach_lerp_(averages, weights, 0.001)
        optimizer.zero_grad()
        return loss.detach()

    return step


def compile_all(*modules, **options):
    for module in modules:
        if module:
            for part in [module.encoder, module.decoder] if hasattr(module, "encoder") else [module]:
                part.compile(dynamic=False, **options)


# ---- Sampling -------------------------------------------------------------------------------------------------------

def sampling_models(preset, dtype, size=None):
    """{part: model} on the default device, as sample.py has them."""
    models = {stage: make_model(stage, preset, size).requires_grad_(False).eval() for stage in STAGES}
    for stage in ("content", "motion"):
        models[stage].to(dtype)
    return models | dict(image=image_autoencoder(preset))


@torch.no_grad()
def draw(models, preset, clips, steps, motion_steps, guidance, size=None):
    """{part: seconds} of drawing clips: the content frame with guidance, the motion without."""
    content, motion, autoencoder, image = (models[name] for name in ("content", "motion", "autoencoder", "image"))
    dtype, device = next(content.parameters()).dtype, autoencoder.motion_mean.device
    with torch.device(device):
        x, _, condition = make_inputs("content", content, preset, clips, size)
        z, _, frame, features = make_inputs("motion", motion, preset, clips, size)
    both, diffusion = torch.cat([condition] * (1 if guidance == 1 else 2)), Diffusion("linear").to(device)
    both, features = (y.to(dtype) if y.is_floating_point() else y for y in (both, features))

    def guided(x, t):  # copied, since a CUDA graph writes each result over the one before
        branches = len(both) // clips
        out = content(x.to(dtype).repeat(branches, 1, 1, 1), t.repeat(branches), both).to(torch.float32, copy=True)
        return out if branches == 1 else out[clips:] + guidance * (out[:clips] - out[clips:])

    def moved(z, t):
        return motion(z.to(dtype), t, frame.to(dtype), features).to(torch.float32, copy=True)

    def decoded():
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            return autoencoder.decode(frame, z.clamp(-1, 1))

    seconds = {}
    seconds["content"], frame = timed(lambda: ddim(guided, x, diffusion, steps))
    seconds["motion"], z = timed(lambda: ddim(moved, z, diffusion, motion_steps))
    seconds["decoder"], video = timed(decoded)
    seconds["images"], _ = timed(lambda: (fold(image.decode, video) if image else video).clamp(-1, 1).cpu())
    return seconds


def sampling_macs(preset, steps, motion_steps, guidance, size=None):
    """{part: (as the paper counts, in full)}: multiply-accumulates of one clip. The paper counts one branch of
    guidance, the whole autoencoder once, and no image decoder; in full are attention, both branches and the image
    decoder, but not the autoencoder's encoder, which sampling does not use."""
    parts = {}
    for stage, many, branches in (("content", steps, 1 if guidance == 1 else 2), ("motion", motion_steps, 1)):
        layers, attention = forward_macs(stage, preset, size)
        parts[stage] = many * layers, many * branches * (layers + attention)
    with torch.device("meta"):
        model, image = make_model("autoencoder", preset, size), image_autoencoder(preset)
        frame, motion = torch.empty(1, *model.content_shape), torch.empty(1, *model.motion_shape)
        parts["decoder"] = forward_macs("autoencoder", preset, size)[0], sum(macs(lambda: model.decode(frame, motion)))
        parts["images"] = 0, sum(macs(lambda: image.decode(frame.expand(model.frames, -1, -1, -1)))) if image else 0
    return parts


# ---- Measuring ------------------------------------------------------------------------------------------------------

def timed(call):
    """(seconds until the device has finished call(), its result)"""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else bool
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def memory():
    """The most GB since the last call: of tensors on a GPU, of the process on a CPU (in Linux)."""
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return most / 1e9
    with contextlib.suppress(OSError), open("/proc/self/status") as lines, open("/proc/self/clear_refs", "w") as file:
        most = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        file.write("5")  # sets VmHWM back to what is in use now
        return most * 1024 / 1e9
    return float("nan")


def measure(args, device):
    """Prints a row for each version of each stage's step, and of sampling."""
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'}, torch "
          f"{torch.__version__}, load {os.getloadavg()[0]:.1f}, preset {args.preset}, {args.dtype}")
    versions, dtype = ["eager"] + ["compiled"] * args.compile, getattr(torch, args.dtype)
    for stage in [stage for stage in STAGES if stage in args.only]:
        batch = args.batch_size or (8 if args.preset.startswith("shapes") else 1)
        layers, attention = forward_macs(stage, args.preset, args.size)
        with torch.device(device):
            model, inputs, image = make_stage(stage, args.preset, batch, args.size)
        compile_all(model, image)  # the eager version runs as if it were not
        step = training_step(stage, model, image, inputs, dtype == torch.bfloat16)
        for version, (seconds, most) in take_turns(versions, args.rounds, lambda: timed(step)[0]).items():
            print(f"{stage:<12} {version:<9} {batch:>4} clips {seconds:>9.4f} s a step {batch / seconds:>9.2f} clips/s "
                  f"{most:>7.2f} GB, forward {layers / 1e12:.4g} T, with attention {(layers + attention) / 1e12:.4g} T")
    if "sampling" not in args.only:
        return
    flags = args.steps, args.motion_steps, args.guidance, args.size
    print_count(args.preset, *flags)
    with torch.device(device):
        models = sampling_models(args.preset, dtype, args.size)
    compile_all(models["content"], models["motion"], mode="reduce-overhead")
    compile_all(models["autoencoder"], models["image"])
    for clips in args.clips:
        rows = take_turns(versions, args.rounds, lambda: draw(models, args.preset, clips, *flags))
        for version, (seconds, most) in rows.items():
            print(f"sampling     {version:<9} {clips:>4} clips {sum(seconds.values()):>9.3f} s: "
                  + ", ".join(f"{part} {s:.3f}" for part, s in seconds.items()) + f", {most:.2f} GB", flush=True)


def take_turns(versions, rounds, call):
    """{version: (median of what call() returns, seconds or {part: seconds}; GB at most)}"""
    found, most = {version: [] for version in versions}, dict.fromkeys(versions, 0)
    for _ in range(rounds):
        for version in versions:
            with torch.compiler.set_stance("force_eager" if version == "eager" else "default"):
                call()  # warms up
                memory()
                found[version] += [call() for _ in range(3)]
                most[version] = max(most[version], memory())
    return {version: ({part: statistics.median(one[part] for one in results) for part in results[0]}
                      if isinstance(results[0], dict) else statistics.median(results), most[version])
            for version, results in found.items()}


def print_count(preset, *flags):
    parts = sampling_macs(preset, *flags)
    paper, full = (sum(part[i] for part in parts.values()) / 1e12 for i in (0, 1))
    print(f"a clip: {paper:.4g} T as the paper counts (its TFLOPs), {full:.4g} T in full: "
          + ", ".join(f"{name} {part[1] / 1e12:.4g}" for name, part in parts.items()))


@torch.no_grad()
# ---- Memory, computed on fake tensors, which have shapes but no values ----------------------------------------------

def flash(q, k, v, *_, is_causal=False, **__):
    """A GPU's kernel in place of F.scaled_dot_product_attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*(x.bfloat16() for x in (q, k, v)), 0.0, is_causal)[0]


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made within it, those of `model` not: `now` alive, and most alive at any time."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        own = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        self.alive = {tensor.untyped_storage()._cdata for tensor in own}

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


@contextlib.contextmanager
def fake(*modules):
    """Fake tensors, in these modules of the meta device too. They say that they are on the CPU: a backward pass asks
    for a real GPU, and a forward pass takes the same on both."""
    with FakeTensorMode(), unittest.mock.patch.object(F, "scaled_dot_product_attention", flash):
        for module in [part for module in modules for part in module.modules()]:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        table[name].requires_grad_(tensor.requires_grad)
        yield


def activation_bytes(stage, preset, batch, size=None, checkpointing=False):
    """(bytes that a forward pass of `batch` clips, under autocast to bfloat16, keeps for the backward pass; the most
    that both take at any time), beside the weights and their gradients."""
    with torch.device("meta"):
        model = make_model(stage, preset, size)
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    with fake(model):
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        inputs = make_inputs(stage, model, preset, batch, size)
        if stage == "autoencoder":
            inputs = [torch.empty(batch, model.channels, model.frames, *model.size)]
        with Memory(model) as memory:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(*inputs)
            kept = memory.now
            output.float().square().mean().backward()
    return kept, memory.peak


def print_memory(presets, stages, batch=None, size=None):
    """For each preset and stage, without and with --checkpointing: what its batch on eight GPUs needs of each, in one
    pass; and how many clips a pass fit GPUs of 24, 48 and 80 GB, of which a tenth is left free. States: the weights,
    gradients, Adam's two moments, in stages 2 and 3 the average, and the frozen models in half precision."""
    print("preset      stage        states GiB  clips a GPU  saved GiB   peak GiB   clips a pass in 24 GB  48 GB  80 GB")
    for preset, stage in itertools.product(presets, stages):
        clips = batch or (3 if stage == "autoencoder" else 32)
        with torch.device("meta"):
            weights, frozen = make_model(stage, preset, size), image_autoencoder(preset)
            if frozen and stage != "autoencoder":
                frozen = TextEncoder(*PRESETS[preset if stage == "content" else "webvid_sd21"]["text"])
        states = (16 if stage == "autoencoder" else 20) * sum(p.numel() for p in weights.parameters())
        states += 2 * sum(p.numel() for p in frozen.parameters()) if frozen else 0
        for checkpointing in (False, True):
            (kept, some), (_, twice) = (activation_bytes(stage, preset, n, size, checkpointing)
                                        for n in (clips, 2 * clips))
            each, fixed = (twice - some) / clips, 2 * some - twice
            fits = [max(0, int((0.9 * card * 1e9 - states - fixed) // each)) for card in (24, 48, 80)]
            print(f"{preset:<12}{stage:<12}{states / 2**30:>7.1f}    {clips:>13}{kept / 2**30:>7.1f}    "
                  f"{some / 2**30:>7.1f}    {fits[0]:>24}{fits[1]:>7}{fits[2]:>7}{'  --checkpointing' * checkpointing}",
                  flush=True)


# ---- The plan -------------------------------------------------------------------------------------------------------

def plan(rate, mfu, preset):
    """Prints what the paper's run on WebVid-10M (10.7 M clips) or UCF-101 takes: each stage's operations divided by
    `mfu` of a GPU's `rate`, operations a second. The number of stage 1's steps is ours."""
    ucf = preset == "ucf101"
    videos, steps, name = (9_537 * 32, 111_762, "UCF-101") if ucf else (10_700_000, 125_391, "WebVid-10M")
    images, encoder, one, content, motion = (2 * sum(forward_macs(what, preset)) / (rate * mfu)  # seconds a clip
                                             for what in ("images", "encoder", *STAGES))
    with torch.device("meta"):
        model = make_model("autoencoder", preset)
    stored = 2 * videos * sum(math.prod(shape) for shape in (model.content_shape, model.motion_shape))  # bytes
    rows = {"1 autoencoder": 500_000 * 24 * (3 * one + images), "  encoding, once": videos * (images + encoder),
            "2 content": steps * 256 * 3 * content, "3 motion": steps * 256 * 3 * motion}
    rows["all"] = sum(rows.values())
    print(f"\nplan: {name} at 16x{'x'.join(map(str, PRESETS[preset]['size']))}, {videos / 1e6:.1f} M clips stored in "
          f"{stored / 1e9:,.1f} GB, at {mfu:.0%} of {rate / 1e12:.0f} TFLOPS\n{'':<20}{'GPU hours':>10}{'on 8, h':>10}"
          f"{'on 64, h':>10}")
    for name, seconds in rows.items():
        print(f"{name:<20}" + "".join(f"{seconds / 3600 / gpus:>10,.0f}" for gpus in (1, 8, 64)))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: shapes; of --memory, the paper's three")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the arithmetic")
    add("--only", nargs="+", choices=[*STAGES, "sampling"], default=[*STAGES, "sampling"])
    add("--compile", action="store_true", help="time a compiled version as well")
    add("--batch-size", type=int, help="clips a training step (default: 8 for shapes, else 1)")
    add("--clips", type=int, nargs="+", default=[1, 4], help="clips drawn at once")
    add("--size", type=int, nargs=2, help="height and width in pixels, in place of the preset's")
    add("--steps", type=int, default=50, help="sampling steps of the content frame")
    add("--motion-steps", type=int, default=100, help="sampling steps of the motion")
    add("--guidance", type=float, default=8.5, help="guidance scale of the content frame; 1: none")
    add("--rounds", type=int, default=3, help="turns of each version")
    add("--count", action="store_true", help="print one clip's multiply-accumulates alone")
    add("--memory", action="store_true", help="print what training needs of a GPU's memory, computed without one")
    add("--plan", action="store_true", help="print the plan alone, from --rate and --mfu")
    add("--rate", type=float, default=312, help="TFLOPS of one GPU, for --plan (default: an A100's)")
    add("--mfu", type=float, default=0.4, help="share of --rate that is reached, for --plan")
    args = parser.parse_args()
    large = [args.preset] if args.preset else [name for name in PRESETS if "shapes" not in name]
    if args.plan:
        for preset in large:
            plan(args.rate * 1e12, args.mfu, preset)
    elif args.memory:
        print_memory(large, [stage for stage in STAGES if stage in args.only], args.batch_size, args.size)
    else:
        args.preset = args.preset or "shapes"
        flags = args.preset, args.steps, args.motion_steps, args.guidance, args.size
        print_count(*flags) if args.count else measure(args, args.device)


if __name__ == "__main__":
    main()
