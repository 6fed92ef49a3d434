"""Checks and times every model and stage on a GPU in eight minutes: errors, seconds, TFLOP/s, memory, in one table.

    python tools/gpu.py --tiny                           # first: all of it at tiny size, on the CPU if there is no GPU
    python tools/gpu.py                                  # the paper's sizes

Weights and data are random: speed depends on neither. Each part is a process of its own, the important ones first, and
all stop after --seconds. Two operations a multiply-accumulate, attention included; training is three forward passes.
"""

import argparse
import contextlib
import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from statistics import median
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import randn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if not find_spec("av"):  # data.py imports it at its top, but no video is read here, and a GPU's machine may lack it
    sys.modules |= {f"av{name}": MagicMock() for name in ("", ".stream", ".video", ".video.reformatter")}
import bench

from autoencoder import LPIPS, Autoencoder, ImageAutoencoder, from_pixels, reconstruction_loss
from content_diffusion import Diffusion, DiT, TextEncoder, UNet
from fvd import I3D
from motion_diffusion import MotionDiT
from sample import Sampler

STAGES = {  # part: stage, preset, clips a step, and the tiny preset
    "unet": ("content", "webvid_sd21", 8, "shapes_text"), "latents": ("autoencoder", "webvid_sd21", 2, "shapes_text"),
    "dit": ("content", "ucf101", 16, "shapes"), "motion": ("motion", "webvid_sd21", 16, "shapes_text"),
    "autoencoder": ("autoencoder", "ucf101", 4, "shapes")}
PARTS = "models unet sampling latents dit motion autoencoder attention gloo".split()  # important ones first
args = argparse.Namespace()  # the flags, and device


def say(what, **figures):
    """Prints a row."""
    row = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items())
    print(f"{args.part[0]:<11} {what:<28}", *row, sep="  ", flush=True)


@contextlib.contextmanager
def tried(what):
    """An error within is one row, and the part goes on."""
    try:
        yield
    except Exception as e:
        say(what, failed=f"{type(e).__name__}: {' '.join(str(e).split())[:150]}")


def timed(call):
    """(seconds until the device has finished call(), its result)"""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else bool
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def memory():
    """The most GB that were held on the GPU since the last call, with those of CUDA graphs; 0 without a GPU."""
    if args.device == "cpu":
        return 0.0
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most / 1e9


def typical(call, count):
    return median([timed(call)[0] for _ in range(3 + (3 if args.tiny else count))][3:])


def far(a, b):
    """How far a is from b, as a share of b."""
    a, b = (x.detach().cpu().double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def models():
    """Each model with the real structure and heads as wide as the real ones, but small, against the CPU in float32."""
    if args.device == "cuda":
        a, b = randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
        say(torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version(),
            product_TFLOPS=2 * 8192**3 / typical(lambda: a @ b, 30) / 1e12)
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions; for products it is off
    n, t, labels = 16 if args.tiny else 32, torch.tensor([3, 900]), torch.tensor([1, 5])
    for name, make, *shapes in (
            ("autoencoder", lambda: Autoencoder(3, 16, n, 2, 96, 8, 2, 2, squash=True), (2, 3, 16, n, n)),
            ("image encode", lambda: ImageAutoencoder(32), (2, 3, 4 * n, 8 * n)),
            ("image decode", lambda: ImageAutoencoder(32), (2, 4, n // 2, n)),
            ("U-Net 1.5", lambda: UNet(80, 64, 2), (2, 4, n, 2 * n), t, (2, 77, 64)),
            ("U-Net 2.1", lambda: UNet(64, 64, head_width=64), (2, 4, n, 2 * n), t, (2, 77, 64)),
            ("DiT", lambda: DiT(3, n, 2, 144, 4, 2, 10), (2, 3, n, n), t, labels),
            ("motion DiT", lambda: MotionDiT(8, 16, n, 3, n, 2, 4, 144, 4, 2, 10), (2, 8, 16, n), t, (2, 3, n, n),
             labels),
            ("motion DiT, text", lambda: MotionDiT(8, 16, n, 4, n, 2, 8, 144, 4, 2, text=64), (2, 8, 16, n), t,
             (2, 4, n, n), (2, 64)),
            ("text encoder", lambda: TextEncoder(128, 3, 2, False, 0), torch.arange(154).view(2, 77)),
            ("LPIPS", LPIPS, (2, 3, 64, 64), (2, 3, 64, 64)), ("I3D", I3D, (1, 3, 9, 224, 224))):
        with tried(name):
            torch.manual_seed(0)
            model, results = bench.vary(make().eval().requires_grad_(True)), []
            inputs = [randn(shape) if isinstance(shape, tuple) else shape for shape in shapes]
            for device, half in (("cpu", False), (args.device, False), (args.device, True)):
                own = copy.deepcopy(model).to(device)
                call = getattr(own, name.split()[1]) if name.startswith("image") else own
                with torch.autocast(device, torch.bfloat16, half):
                    out = call(*(x.to(device) for x in inputs)).float().flatten()
                (out * torch.linspace(-1, 1, len(out), device=device)).mean().backward()
                results += [out, torch.cat([w.grad.flatten() for w in own.parameters() if w.grad is not None])]
            errors = list(map(far, results[2:], results[:2] * 2))
            good = all(x < most for x, most in zip(errors, (1e-4, 1e-3, 0.1, 0.3)))
            say(name, verdict="ok" if good else "WRONG", float32="{:.1e} gradients {:.1e}".format(*errors[:2]),
                bfloat16="{:.1e} gradients {:.1e}".format(*errors[2:]))


def stage():
    """30 steps of a training stage, as its script takes them."""
    stage, preset, clips, tiny = STAGES[args.part[0]]
    preset, clips = (tiny, 1) if args.tiny else (preset, clips)
    operations = 3 * 2 * sum(bench.forward_macs(stage, preset)) + 2 * sum(bench.forward_macs("images", preset)) * (
        stage == "autoencoder")
    diffusion = Diffusion("linear").to(args.device)

    def step():
        x, *others = inputs
        with torch.no_grad():
            x = from_pixels(x, image)
        with torch.autocast(args.device, torch.bfloat16):
            if stage == "autoencoder":
                loss = reconstruction_loss(model(x), x, "mse")
            else:
                t, *rest = others
                loss = diffusion.loss(lambda x, t: model(x, t, *rest), x, t, torch.randn_like(x))
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(weights, 1.0).isfinite().item():
            optimizer.step()
            with torch.no_grad():
                if averages:
                    torch._foreach_lerp_(averages, weights, 0.001)
        optimizer.zero_grad()
        losses.append(loss.detach())

    for version in ("eager", "compiled"):
        with tried(version):
            model = image = inputs = weights = averages = optimizer = None  # first the last version's go
            torch.manual_seed(0)
            with torch.device(args.device):
                model = bench.make_model(stage, preset)
                inputs = bench.make_inputs(stage, model, preset, clips)
                image = bench.image_autoencoder(preset) if stage == "autoencoder" else None
            for module in filter(None, [model, image] if version == "compiled" else []):
                for part in [module.encoder, module.decoder] if hasattr(module, "encoder") else [module]:
                    part.compile(dynamic=False, **args.compile)
            weights, losses = list(model.parameters()), []
            averages = copy.deepcopy(weights) if stage != "autoencoder" else []
            optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
            first = timed(step)[0]
            memory()
            seconds = typical(step, 30)
            losses = torch.stack(losses)
            say(f"{version}, {clips} clips", s=seconds, TFLOPS=operations * clips / seconds / 1e12, GB=memory(),
                loss=losses[0].item(), last=losses[-1].item(), finite=losses.isfinite().all().item(), first_s=first)


@torch.no_grad()
def sampling():
    """A clip of 16x512x1024 by parts, as sample.py draws it, 50 steps for the content and 100 for the motion."""
    preset, steps = ("shapes_text", 3) if args.tiny else ("webvid_sd21", 50)
    sampler = Sampler.__new__(Sampler)  # it would read a run folder
    sampler.device, sampler.dtype, sampler.mean, sampler.std = torch.device(args.device), torch.bfloat16, 0, 1
    sampler.args = argparse.Namespace(seed=0, guidance=8.5, motion_guidance=1, eta=0, image=None, negative_prompt="")
    with sampler.device:
        sampler.autoencoder, sampler.image = bench.make_model("autoencoder", preset), bench.image_autoencoder(preset)
        for name in ("content", "motion"):
            model = bench.make_model(name, preset).requires_grad_(False).eval().to(sampler.dtype)
            shape = getattr(sampler.autoencoder, f"{name}_shape")
            width = bench.make_inputs(name, model, preset, 1)[-1].shape[-1]
            text = MagicMock(encode=lambda prompts, width=width: torch.ones(len(prompts), 77, width).to(sampler.device))
            setattr(sampler, name, argparse.Namespace(model=model, text=text, shape=shape,
                                                      diffusion=Diffusion("linear").to(sampler.device)))

    def draw(clips, steps):
        sampler.args.steps, sampler.args.motion_steps = steps, 2 * steps
        content, frames = timed(lambda: sampler.draw_content([""] * clips, range(clips)))
        motion, latents = timed(lambda: sampler.draw_motion(frames, [""] * clips, range(clips)))
        return dict(content=content, motion=motion, decode=timed(lambda: sampler.decode(frames, latents).cpu())[0])

    for version, clips in (("eager", 1), ("eager", 4), ("compiled", 1), ("compiled", 4)):
        with tried(f"{version}, {clips} clips"):
            if (version, clips) == ("compiled", 1):
                for stage in (sampler.content, sampler.motion):
                    stage.model.compile(dynamic=False, **args.compile or dict(mode="reduce-overhead"))
                sampler.autoencoder.decoder.compile(dynamic=False, **args.compile)
            first = sum(draw(clips, 3).values())
            memory()
            seconds = draw(clips, steps)
            total = sum(seconds.values())
            say(f"{version}, {clips} clips", s=total, **seconds, s_50_50=total - seconds["motion"] / 2,
                GB=memory(), first_s=first)


def attention():
    """One layer of the autoencoder at 512x1024, heads 48 wide: over time at each place (twice: heads apart, and places
    alone in the batch), and over space."""
    sizes = dict(n=4, p=8, h=2) if args.tiny else dict(n=256, p=8, h=8)
    x = [randn(2, 16, 8 * sizes["n"], 48 * sizes["h"], device=args.device, dtype=torch.bfloat16, requires_grad=True)
         for _ in range(3)]
    for view, without in (("b (n p h) l d", ""), ("(b n p) h l d", ""), ("(b l) h (n p) d", "MATH formula compiled")):
        torch._dynamo.reset()  # else other shapes would be compiled for all sizes
        ways = dict(formula=bench.formula, compiled=torch.compile(bench.formula, dynamic=False, **args.compile))
        ways |= dict.fromkeys(("default", "MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"),
                              F.scaled_dot_product_attention)
        for name in sorted(ways.keys() - without.split()):
            def layer():
                q, k, v = (rearrange(y, f"b l (n p) (h d) -> {view}", **sizes) for y in x)
                return rearrange(ways[name](q, k, v), f"{view} -> b l (n p) (h d)", b=2, l=16, **sizes)

            kernel = sdpa_kernel(getattr(SDPBackend, name)) if name.isupper() else contextlib.nullcontext()
            memory()
            with tried(f"{view}, {name}"), kernel:
                # cuDNN's gradients are not always finite (pytorch issue 196678)
                finite = all(y.isfinite().all().item() for y in torch.autograd.grad(layer().square().sum(), x))
                both, most = typical(lambda: torch.autograd.grad(layer().square().sum(), x), 10), memory()
                with torch.no_grad():
                    forward = typical(layer, 10)
                say(f"{view}, {name}", forward_ms=1e3 * forward, both_ms=1e3 * both, GB=most, finite=finite)


def rank(number, world, folder, device):
    """Writes the gradients of a small motion model, whose batch the ranks share."""
    os.environ["GLOO_SOCKET_IFNAME"], torch.backends.cudnn.allow_tf32 = "lo", False
    torch.distributed.init_process_group("gloo", f"file://{folder}/store{world}", rank=number, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(bench.vary(MotionDiT(8, 16, 16, 3, 16, 2, 4, 144, 2, 2, 10)).to(device))
    rows = randn(8, 8, 16, 16), torch.arange(8) * 100, randn(8, 8, 16, 16), randn(8, 3, 16, 16), torch.arange(8)
    x, t, noise, *rest = (part.chunk(world)[number].to(device) for part in rows)
    Diffusion("linear").to(device).loss(lambda x, t: model(x, t, *rest), x, t, noise).backward()
    gradients = torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()])
    torch.save(gradients, f"{folder}/{world}{number}.pt")


def gloo():
    """Two ranks on one GPU against one process."""
    with tempfile.TemporaryDirectory() as folder:
        rank(0, 1, folder, args.device)
        torch.multiprocessing.spawn(rank, (2, folder, args.device), 2)
        one, first, second = (torch.load(f"{folder}/{name}.pt") for name in ("10", "20", "21"))
    error = max(far(first, one), far(second, one))
    say("two ranks", verdict="ok" if error < 1e-4 else "WRONG", gradients=error)


def run_parts():
    """Runs each part as a process, and ends it with all that it started when the time is over, or at Ctrl-C."""
    end = time.time() + args.seconds
    for part in args.part:
        own = [sys.executable, *sys.argv, "--alone", "--part", part]
        with subprocess.Popen(own, start_new_session=True) as process:
            try:
                process.wait(max(0, end - time.time()))
            except subprocess.TimeoutExpired:
                print(f"{part}: the time is over", flush=True)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="everything tiny")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    add("--seconds", type=float, default=480, help="time for all")
    add("--alone", action="store_true", help=argparse.SUPPRESS)  # told to the process of a part
    parser.parse_args(namespace=args)
    if not args.alone:
        return run_parts()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.compile = {} if args.device == "cuda" else dict(backend="aot_eager")  # a CPU would compile for many minutes
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("no GPU here: add --tiny")
    if args.part[0] not in ("models", "gloo"):  # as the scripts do
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = args.part[0] in STAGES
        torch.backends.cuda.enable_cudnn_sdp(args.part[0] not in STAGES)
    globals().get(args.part[0], stage)()


if __name__ == "__main__":
    main()
