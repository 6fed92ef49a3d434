"""Computes what the models cost: operations and memory, and hours of the paper's runs. Nothing is run or measured.

    python tools/bench.py --count --preset webvid_sd21        # one clip's multiply-accumulates
    python tools/bench.py --memory                            # what training needs of a GPU's memory
    python tools/bench.py --plan --rate 660 --mfu 0.45        # hours and bytes of the paper's runs

T are 10**12 multiply-accumulates of one clip: as the paper counts them, of convolutions and linear layers alone, and in
full. What a GPU makes of them, tools/gpu.py measures.
"""

import argparse
import contextlib
import itertools
import math
import os
import sys
import unittest.mock
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from autoencoder import Autoencoder, ImageAutoencoder
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


# ---- Counting -----------------------------------------------------------------------------------------------------

class CountAttention(TorchFunctionMode):
    """Counts the multiply-accumulates of attention instead of computing it: the result only has the right shape."""

    macs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        query, key = args[:2]
        self.macs += 2 * query.numel() * key.shape[-2]  # query times key, and that times value
        return torch.empty_like(query)


def macs(call):
    """Multiply-accumulates of call(): (of convolutions and linear layers, of attention). On the meta device nothing is
    computed. Products of two batches of matrices count as attention: it may be written by its formula."""
    counter, attention = FlopCounterMode(display=False), CountAttention()
    with torch.inference_mode(False), torch.no_grad(), counter, attention:
        call()
    batched = sum(count for operator, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(operator))
    return (counter.get_total_flops() - batched) // 2, attention.macs + batched // 2  # two operations each


# ---- The three stages with random weights ----------------------------------------------------------

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


# ---- Sampling -------------------------------------------------------------------------------------------------------

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


def print_count(preset, *flags):
    parts = sampling_macs(preset, *flags)
    paper, full = (sum(part[i] for part in parts.values()) / 1e12 for i in (0, 1))
    print(f"{preset}, a clip: {paper:.4g} T as the paper counts (its TFLOPs), {full:.4g} T in full: "
          + ", ".join(f"{name} {part[1] / 1e12:.4g}" for name, part in parts.items()))


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
        with Memory(model) as memory:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(*inputs)
            kept = memory.now
            output.float().square().mean().backward()
    return kept, memory.peak


def print_memory(presets):
    """For each preset and stage, without and with --checkpointing: what its batch on eight GPUs needs of each, in one
    pass; and how many clips a pass fit GPUs of 24, 48 and 80 GB, of which a tenth is left free. States: the weights,
    gradients, Adam's two moments, in stages 2 and 3 the average, and the frozen models in half precision."""
    print("preset      stage        states GiB  clips a GPU  saved GiB   peak GiB  clips a pass in 24 GB  48 GB  80 GB")
    for preset, stage in itertools.product(presets, STAGES):
        clips = 3 if stage == "autoencoder" else 32
        with torch.device("meta"):
            weights, frozen = make_model(stage, preset), image_autoencoder(preset)
            if frozen and stage != "autoencoder":
                frozen = TextEncoder(*PRESETS[preset if stage == "content" else "webvid_sd21"]["text"])
        states = (16 if stage == "autoencoder" else 20) * sum(p.numel() for p in weights.parameters())
        states += 2 * sum(p.numel() for p in frozen.parameters()) if frozen else 0
        for checkpointing in (False, True):
            (kept, some), (_, twice) = (activation_bytes(stage, preset, n, checkpointing)
                                        for n in (clips, 2 * clips))
            each, fixed = (twice - some) / clips, 2 * some - twice
            fits = [max(0, int((0.9 * card * 1e9 - states - fixed) // each)) for card in (24, 48, 80)]
            print(f"{preset:<12}{stage:<12}{states / 2**30:>7.1f}    {clips:>13}{kept / 2**30:>7.1f}    "
                  f"{some / 2**30:>7.1f}    {fits[0]:>23}{fits[1]:>7}{fits[2]:>7}{'  --checkpointing' * checkpointing}",
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
    add("--preset", choices=PRESETS, help="default: the paper's three")
    add("--count", action="store_true", help="print one clip's multiply-accumulates")
    add("--memory", action="store_true", help="print what training needs of a GPU's memory")
    add("--plan", action="store_true", help="print the hours of the paper's runs, from --rate and --mfu")
    add("--steps", type=int, default=50, help="sampling steps of the content frame")
    add("--motion-steps", type=int, default=100, help="sampling steps of the motion")
    add("--guidance", type=float, default=8.5, help="guidance scale of the content frame; 1: none")
    add("--rate", type=float, default=312, help="TFLOPS of one GPU (default: an A100's)")
    add("--mfu", type=float, default=0.4, help="share of --rate that is reached")
    args = parser.parse_args()
    presets = [args.preset] if args.preset else [name for name in PRESETS if "shapes" not in name]
    for preset in presets if args.count else ():
        print_count(preset, args.steps, args.motion_steps, args.guidance)
    if args.memory:
        print_memory(presets)
    for preset in presets if args.plan else ():
        plan(args.rate * 1e12, args.mfu, preset)


if __name__ == "__main__":
    main()
