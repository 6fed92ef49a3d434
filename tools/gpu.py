"""What a GPU makes of every model and stage in eight minutes: right results, seconds, TFLOP/s, memory, in one table.

    python tools/gpu.py --tiny                           # first: all of it at tiny size, on the CPU if there is no GPU
    python tools/gpu.py                                  # the paper's sizes
    python tools/gpu.py --part unet sampling             # some of the parts

Weights and data are random: speed depends on neither. Each part is a process of its own, so that none takes the others
with it; they run one after another, the important ones first, and all stop after --seconds.
Operations are two a multiply-accumulate, attention included, and in training three times those of the forward pass.
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from statistics import median
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if not find_spec("av"):  # data.py imports it at its top, but no video is read here, and a GPU's machine may lack it
    sys.modules |= {f"av{name}": MagicMock() for name in ("", ".stream", ".video", ".video.reformatter")}
import bench

from autoencoder import LPIPS, Autoencoder, ImageAutoencoder
from content_diffusion import Diffusion, DiT, TextEncoder, UNet, ddim
from fvd import I3D
from motion_diffusion import MotionDiT

STAGES = {  # part: stage, preset, clips a step, and the tiny preset
    "unet": ("content", "webvid_sd21", 8, "shapes_text"), "latents": ("autoencoder", "webvid_sd21", 2, "shapes_text"),
    "dit": ("content", "ucf101", 16, "shapes"), "motion": ("motion", "webvid_sd21", 16, "shapes_text"),
    "autoencoder": ("autoencoder", "ucf101", 4, "shapes")}
PARTS = "models unet sampling latents dit motion autoencoder attention gloo".split()  # important ones first
BACKENDS = dict(math=SDPBackend.MATH, flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION,
                cudnn=SDPBackend.CUDNN_ATTENTION)
args = argparse.Namespace()  # the flags, and device


def say(what, **figures):
    """Prints a row."""
    figures = {name: round(value, 4 - math.ceil(math.log10(abs(value) + 1e-9))) if isinstance(value, float) else value
               for name, value in figures.items()}
    print(f"{args.part[0]:<11} {what:<28}", *(f" {name} {value}" for name, value in figures.items()), flush=True)


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
    """The most GB of tensors on the GPU since the last call; 0 without one."""
    most = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return most / 1e9


def typical(call, count):
    return median([timed(call)[0] for _ in range(3 + (3 if args.tiny else count))][3:])


def far(a, b):
    """How far a is from b, as a share of b."""
    a, b = (x.detach().cpu().double() for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def vary(model):
    """Moves all weights: the last layers of a new DiT are zero."""
    for weight in model.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    return model


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
            model, results = vary(make().eval().requires_grad_(True)), []
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
                x = bench.fold(image.encode, x) if image else x
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


def stage():
    """30 steps of a training stage, as its script takes them."""
    stage, preset, clips, tiny = STAGES[args.part[0]]
    preset, clips = (tiny, 1) if args.tiny else (preset, clips)
    operations = 3 * 2 * sum(bench.forward_macs(stage, preset)) + 2 * sum(bench.forward_macs("images", preset)) * (
        stage == "autoencoder")
    with torch.device(args.device):
        model, inputs, image = bench.make_stage(stage, preset, clips)
    before = [weight.detach().clone().cpu() for weight in model.parameters()]
    for version in ("eager", "compiled"):
        with tried(version):
            step = None  # first the last version's optimizer goes
            for weight, old in zip(model.parameters(), before):
                weight.data.copy_(old)
            if version == "compiled":
                compile_all(model, image, **args.compile)
            torch.manual_seed(0)
            step, losses = training_step(stage, model, image, inputs, True), []
            first = timed(lambda: losses.append(step()))[0]
            memory()
            seconds = typical(lambda: losses.append(step()), 30)
            rate, losses = operations * clips / seconds / 1e12, torch.stack(losses)
            say(f"{version}, {clips} clips", s=seconds, TFLOPS=rate, of_peak=rate / args.peak, GB=memory(),
                loss=losses[0].item(), last=losses[-1].item(), finite=losses.isfinite().all().item(), first_s=first)


def sampling_models(preset, dtype):
    """{part: model} on the default device, as sample.py has them."""
    models = {stage: bench.make_model(stage, preset).requires_grad_(False).eval() for stage in bench.STAGES}
    for stage in ("content", "motion"):
        models[stage].to(dtype)
    return models | dict(image=bench.image_autoencoder(preset))


@torch.no_grad()
def draw(models, preset, clips, steps, motion_steps, guidance):
    """{part: seconds} of drawing clips: the content frame with guidance, the motion without."""
    content, motion, autoencoder, image = (models[name] for name in ("content", "motion", "autoencoder", "image"))
    dtype, device = next(content.parameters()).dtype, autoencoder.motion_mean.device
    with torch.device(device):
        x, _, condition = bench.make_inputs("content", content, preset, clips)
        z, _, frame, features = bench.make_inputs("motion", motion, preset, clips)
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
    seconds["images"], _ = timed(lambda: (bench.fold(image.decode, video) if image else video).clamp(-1, 1).cpu())
    return seconds


def sampling():
    """A clip of 16x512x1024 by parts, 50 steps for the content and 100 for the motion."""
    preset, steps = ("shapes_text", 3) if args.tiny else ("webvid_sd21", 50)
    with torch.device(args.device):
        models = sampling_models(preset, torch.bfloat16)
    for version, clips in (("eager", 1), ("eager", 4), ("compiled", 1), ("compiled", 4)):
        with tried(f"{version}, {clips} clips"):
            if (version, clips) == ("compiled", 1):
                compile_all(models["content"], models["motion"], **args.compile or dict(mode="reduce-overhead"))
                compile_all(models["autoencoder"], models["image"], **args.compile)
            first = sum(draw(models, preset, clips, 3, 3, 8.5).values())
            memory()
            seconds = draw(models, preset, clips, steps, 2 * steps, 8.5)
            total = sum(seconds.values())
            say(f"{version}, {clips} clips", s=total, **seconds, s_50_50=total - seconds["motion"] / 2,
                GB=memory(), first_s=first)


def by(backend, *inputs):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*inputs)


def formula(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def attention():
    """One layer of the autoencoder at 512x1024, heads 48 wide: over time at each place, and over space."""
    sizes = dict(n=4, h=2) if args.tiny else dict(n=256, h=8)
    x = [randn(2, 16, 8 * sizes["n"], 48 * sizes["h"], device=args.device, dtype=torch.bfloat16, requires_grad=True)
         for _ in range(3)]
    mask = torch.block_diag(*[torch.ones(16, 16)] * 8).bool().to(args.device)
    for view, without in (("b (n p h) l d", ""), ("(b n p) h l d", ""), ("(b n) h (p l) d", "flash formula compiled"),
                          ("(b l) h (n p) d", "math formula compiled")):  # p l: 8 places in one sequence, with a mask
        ways = dict(default=F.scaled_dot_product_attention, formula=formula,
                    compiled=torch.compile(formula, **args.compile))
        ways |= {name: partial(by, backend) for name, backend in BACKENDS.items()}
        for name in [name for name in ways if name not in without.split()]:
            def layer():
                q, k, v = (rearrange(y, f"b l (n p) (h d) -> {view}", p=8, **sizes) for y in x)
                out = ways[name](q, k, v, *[mask] * ("(p l)" in view))
                return rearrange(out, f"{view} -> b l (n p) (h d)", b=2, l=16, p=8, **sizes)

            with tried(f"{view}, {name}"):
                layer().square().sum().backward()
                finite = all(y.grad.isfinite().all().item() for y in x)  # cuDNN's are not always (pytorch issue 196678)
                both, most = typical(lambda: layer().square().sum().backward(), 10), memory()
                with torch.no_grad():
                    say(f"{view}, {name}", forward_ms=1e3 * typical(layer, 10), both_ms=1e3 * both, GB=most,
                        finite=finite)
                for y in x:
                    y.grad = None


def rank(number, world, folder, device):
    """Writes the gradients of a small motion model, whose batch the ranks share."""
    torch.manual_seed(0)
    call = model = vary(MotionDiT(8, 16, 16, 3, 16, 2, 4, 144, 2, 2, 10)).to(device)
    rows = randn(8, 8, 16, 16), torch.arange(8) * 100, randn(8, 8, 16, 16), randn(8, 3, 16, 16), torch.arange(8)
    x, t, noise, *rest = (part.chunk(world)[number].to(device) for part in rows)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=world)
        call = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    Diffusion("linear").to(device).loss(lambda x, t: call(x, t, *rest), x, t, noise).backward()
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
    """Runs the parts as processes, and ends the last one when the time is over."""
    end = time.time() + args.seconds
    for number, part in enumerate(args.part):
        own = [sys.executable, *sys.argv, "--alone", "--part", part]
        with subprocess.Popen(own, start_new_session=True) as process:
            try:
                process.wait(end - time.time())
            except subprocess.TimeoutExpired:
                return print(f"{part} stopped after {args.seconds:.0f} s; not begun: {args.part[number + 1 :]}")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="everything tiny")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    add("--seconds", type=float, default=480, help="time for all")
    add("--peak", type=float, default=989, help="the GPU's TFLOP/s in bfloat16, by its datasheet")
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
        torch.backends.cudnn.benchmark = True
    with tried("the rest"):
        globals().get(args.part[0], stage)()


if __name__ == "__main__":
    main()
