"""Computes what the models cost: multiply-accumulates, memory and hours. Nothing is run, but for --time.

    python tools/bench.py --count --preset webvid_sd21        # one clip's multiply-accumulates
    python tools/bench.py --training --tflops 450             # memory and hours of the paper's runs, on your GPU
    python tools/bench.py --headline --time 256 256           # beside ModelScope's text-to-video; seconds on this CPU

T are 10**12 multiply-accumulates of one clip: as the paper counts them (its TFLOPs), of convolutions and linear layers
alone, and in full. tools/gpu.py measures seconds on a GPU.
"""

import argparse
import contextlib
import gc
import itertools
import math
import os
import sys
import time
import unittest.mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from autoencoder import Autoencoder, ImageAutoencoder, from_pixels, to_pixels
from content_diffusion import DiT, TextEncoder, UNet
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


def macs(call):
    """Multiply-accumulates of call(): (of convolutions and linear layers, of attention). On the meta device nothing is
    computed. Attention is computed by its formula: products of two batches of matrices are its."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    counts = counter.get_flop_counts().get("Global", {})
    batched = sum(count for operator, count in counts.items() if "bmm" in str(operator))
    return (counter.get_total_flops() - batched) // 2, batched // 2  # two operations each


# ---- The three stages with random weights ----------------------------------------------------------

def image_autoencoder(preset):
    """The frozen one of a preset on latents, on the default device; None where frames are pixels."""
    if "image" not in PRESETS[preset]:
        return None
    model = ImageAutoencoder(**PRESETS[preset]["image"]).requires_grad_(False).eval()
    half = model.quant_conv.weight.is_cuda  # as in the scripts
    return model.to(dtype=torch.float16 if half else torch.float32, memory_format=torch.channels_last)


def vary(model):
    """Moves all weights: the last layers of a new DiT are zero."""
    for weight in model.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    return model


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
    return vary(model)


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


def forward_macs(what, preset, size=None):
    """Multiply-accumulates, (of layers, of attention), of one clip's forward pass through a stage's model, or through
    "images", Stable Diffusion's image encoder, or the autoencoder's "encoder"."""
    stage = what if what in STAGES else "autoencoder"
    with torch.device("meta"):
        model = make_model(stage, preset, size)
        inputs = make_inputs(stage, model, preset, 1, size)
        if stage != "autoencoder":
            return macs(lambda: model(*inputs))
        if what == "images":
            return macs(lambda: from_pixels(*inputs, image_autoencoder(preset)))
        latents = torch.empty(1, model.channels, model.frames, *model.size)
        return macs(lambda: model.encode(latents) if what == "encoder" else model(latents))


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
        video = frame.unsqueeze(2).expand(-1, -1, model.frames, -1, -1)
        parts["decoder"] = forward_macs("autoencoder", preset, size)[0], sum(macs(lambda: model.decode(frame, motion)))
        parts["images"] = 0, sum(macs(lambda: to_pixels(video, image)))
    return parts


# ---- Memory, computed on fake tensors, which have shapes but no values ----------------------------------------------

def flash(q, k, v, *_, is_causal=False, **__):
    """A GPU's kernel in place of F.scaled_dot_product_attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention(*(x.bfloat16() for x in (q, k, v)), 0.0, is_causal)[0]


@contextlib.contextmanager
def fake(model, attention=flash):
    """Fake tensors, in a model of the meta device too. They say that they are on the CPU: a backward pass asks for a
    real GPU, and a forward pass takes the same on both."""
    with FakeTensorMode(), unittest.mock.patch.object(F, "scaled_dot_product_attention", attention):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        table[name].requires_grad_(tensor.requires_grad)
        yield


def alive(tracker, when):
    """Bytes of all tensors, "current" or at the "peak"."""
    return sum(device["Total"] for device in tracker.get_tracker_snapshot(when).values())


def activation_bytes(stage, preset, batch, checkpointing):
    """(bytes that a forward pass of `batch` clips, under autocast to bfloat16, keeps for the backward pass; the most
    that both take at any time), beside the weights and their gradients."""
    with torch.device("meta"):
        model = make_model(stage, preset)
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    with fake(model):
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        inputs = make_inputs(stage, model, preset, batch)
        if stage == "autoencoder":
            inputs = [torch.empty(batch, model.channels, model.frames, *model.size)]
        tracker = MemTracker()
        tracker.track_external(model, *inputs)
        with tracker:
            before = alive(tracker, "current")
            with torch.autocast("cpu", torch.bfloat16):
                output = model(*inputs)
            kept = alive(tracker, "current")
            output.float().square().mean().backward()
    return kept - before, alive(tracker, "peak") - before


def print_training(presets, tflops):
    """For each preset and stage, without and with --checkpointing: what its batch on eight GPUs needs of each, in one
    pass; how many clips a pass fit GPUs of 24, 48 and 80 GB, of which a tenth is left free; and the hours of the
    paper's run on one GPU (500,000 steps of stage 1 are ours). States: the weights, gradients, Adam's two moments, in
    stages 2 and 3 the average, and the frozen models in half precision. Encoding a data set comes once."""
    print("preset      stage        states GiB  clips a GPU  saved GiB   peak GiB  clips a pass in 24 GB  48 GB  80 GB"
          "    hours")
    for preset, stage in itertools.product(presets, STAGES):
        clips = 3 if stage == "autoencoder" else 32
        with torch.device("meta"):
            weights, frozen = make_model(stage, preset), image_autoencoder(preset)
            shapes = [weights.content_shape, weights.motion_shape] if stage == "autoencoder" else []
            if frozen and stage != "autoencoder":
                frozen = TextEncoder(*PRESETS[preset if stage == "content" else "webvid_sd21"]["text"])
        states = (16 if stage == "autoencoder" else 20) * sum(p.numel() for p in weights.parameters())
        states += 2 * sum(p.numel() for p in frozen.parameters()) if frozen else 0
        once = sum(forward_macs("images", preset)) if shapes else 0
        seen = 500_000 * 24 if shapes else 256 * (111_762 if preset == "ucf101" else 125_391)
        hours = 2e-12 * seen * (3 * sum(forward_macs(stage, preset)) + once) / tflops / 3600
        for checkpointing in (False, True):
            (kept, some), (_, twice) = (activation_bytes(stage, preset, n, checkpointing)
                                        for n in (clips, 2 * clips))
            each, fixed = (twice - some) / clips, 2 * some - twice
            fits = [max(0, int((0.9 * card * 1e9 - states - fixed) // each)) for card in (24, 48, 80)]
            print(f"{preset:<12}{stage:<12}{states / 2**30:>7.1f}    {clips:>13}{kept / 2**30:>7.1f}    "
                  f"{some / 2**30:>7.1f}    {fits[0]:>23}{fits[1]:>7}{fits[2]:>7}{hours:>9,.0f}"
                  + "  --checkpointing" * checkpointing, flush=True)
        if shapes:
            videos = 9_537 * 32 if preset == "ucf101" else 10_700_000
            hours = 2e-12 * videos * (once + sum(forward_macs("encoder", preset))) / tflops / 3600
            print(f"{preset:<12}encoding {videos / 1e6:.1f} M clips into "
                  f"{2e-9 * videos * sum(map(math.prod, shapes)):,.0f} GB: {hours:,.0f} hours")


# ---- The paper's headline: CMD beside ModelScope's text-to-video ----------------------------------------------------
# diffusers' UNet3DConditionModel (pip install diffusers) has ModelScope's sizes; cost does not depend on weights.
# Memory: all weights at once, in bfloat16, and the most that a forward pass without guidance takes beside them.

MODELS = ("ModelScope", "content", "motion", "autoencoder")


def make(name, size, clips=1):
    """(one of MODELS, its inputs) on the default device. size: height and width of the frames, in pixels."""
    if name in ("content", "motion"):
        model = make_model(name, "webvid_sd21", size)
        return model, make_inputs(name, model, "webvid_sd21", clips, size)
    video = torch.randn(clips, 4, 16, size[0] // 8, size[1] // 8)  # Stable Diffusion's latents
    if name == "autoencoder":
        return make_model(name, "webvid_sd21", size), [video]
    from diffusers import UNet3DConditionModel
    model = UNet3DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
                                 attention_head_dim=64)
    return model, [video, torch.arange(clips), torch.randn(clips, 77, 1024)]


def say(size, what, kind, theirs, ours, unit, verdict):
    print(f"16x{size[0]}x{size[1]:<5} {what:<28} {kind:<16} {theirs:>9.2f} {ours:>8.2f} {unit}  {verdict}", flush=True)


def headline_macs(size):
    with torch.device("meta"):
        models = [make(name, size) for name in MODELS]
        theirs, content, motion, autoencoder = (  # without, with attention
            np.cumsum(macs(lambda: model(*inputs))) / 1e12 for model, inputs in models)
    for what, them, us in (("a step", theirs, content + motion),
                           ("50 steps, autoencoder", 50 * theirs, 50 * (content + motion) + autoencoder)):
        for kind, a, b in zip(("layers", "with attention"), them, us):
            say(size, what, kind, a, b, "T", f"{a / b:.1f}x")
    parts = {name: full / 1e12 for name, (_, full) in sampling_macs("webvid_sd21", 50, 50, 8.5, size).items()}
    a, b = 100 * theirs[1] + parts["images"], sum(parts.values())
    say(size, "50 steps, guidance, pictures", "with attention", a, b, "T", f"{a / b:.1f}x")


def formula(q, k, v, *_, **__):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@torch.no_grad()
def memory(name, size, clips, attention):
    """(GB of weights, most GB of other tensors) of a forward pass in bfloat16, on fake tensors."""
    with torch.device("meta"):
        model, inputs = make(name, size, clips)
    with fake(model.bfloat16().eval(), attention):
        inputs = [torch.empty(x.shape, dtype=torch.bfloat16 if x.is_floating_point() else x.dtype) for x in inputs]
        tracker = MemTracker()
        tracker.track_external(model, *inputs)
        with tracker:
            model(*inputs)
    weights = 2e-9 * sum(p.numel() for p in model.parameters())
    return weights, alive(tracker, "peak") / 1e9 - weights


def headline_memory(size):
    for attention, clips in itertools.product((flash, formula), (1, 4)):
        (weights, most), *ours = (memory(name, size, clips, attention) for name in MODELS)
        them, us = weights + most, sum(weights for weights, _ in ours) + max(most for _, most in ours)
        say(size, f"bfloat16, clips: {clips}", attention.__name__, them, us, "GB", f"{1 - us / them:.0%} less")


@torch.no_grad()
def headline_seconds(size, rounds=3):
    """Of the CPU (what other jobs take is left out), for a step in float32, in turns. One model at a time in memory."""
    seconds = {name: [] for name in MODELS}
    for name in MODELS * rounds:
        model, inputs = make(name, size)
        for call in range(2 if name == "ModelScope" else 4):
            start = time.process_time()
            model.eval()(*inputs)
            seconds[name] += [time.process_time() - start] * (call > 0)  # the first warms up
        del model
        gc.collect()
    medians = {name: float(np.median(some)) for name, some in seconds.items()}
    print(f"{torch.get_num_threads()} CPU threads, load {os.getloadavg()[0]:.1f}, medians of {rounds} turns: {medians}")
    theirs, ours = medians["ModelScope"], medians["content"] + medians["motion"] + medians["autoencoder"] / 50
    say(size, "a step, autoencoder / 50", "float32", theirs, ours, "CPU s", f"{theirs / ours:.1f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: the paper's three")
    add("--count", action="store_true", help="print one clip's multiply-accumulates")
    add("--training", action="store_true", help="print what training needs of a GPU's memory, and hours")
    add("--headline", action="store_true", help="print operations and memory of CMD and ModelScope's text-to-video")
    add("--time", type=int, nargs=2, help="measure seconds a step of both at this height and width")
    add("--steps", type=int, default=50, help="sampling steps of the content frame")
    add("--motion-steps", type=int, default=100, help="sampling steps of the motion")
    add("--guidance", type=float, default=8.5, help="guidance scale of the content frame; 1: none")
    add("--tflops", type=float, default=124.8, help="that a GPU reaches in training (default: 40%% of an A100's)")
    args = parser.parse_args()
    presets = [args.preset] if args.preset else [name for name in PRESETS if "shapes" not in name]
    for preset in presets if args.count else ():
        parts = sampling_macs(preset, args.steps, args.motion_steps, args.guidance)
        paper, full = np.sum(list(parts.values()), 0) / 1e12
        print(f"{preset}, a clip: {paper:.4g} T as the paper counts, {full:.4g} T in full: "
              + ", ".join(f"{name} {part[1] / 1e12:.4g}" for name, part in parts.items()))
    if args.training:
        print_training(presets, args.tflops)
    if args.headline or args.time:
        print(f"{'':<56} ModelScope     CMD")
    for table in (headline_macs, headline_memory) if args.headline else ():
        for size in ((256, 256), (512, 512), (512, 1024)):
            table(size)
    if args.time:
        headline_seconds(args.time)


if __name__ == "__main__":
    main()
