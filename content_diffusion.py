"""Stage 2, content frame diffusion: learns to generate content frames from noise, given a class or a text.

Equation 7 and table 7 of the paper. In: content frames (B, C, H, W) that stage 1 encoded, with labels or captions.
Out: a diffusion model p(content | c): a DiT from scratch, or Stable Diffusion's U-Net, fine-tuned with nothing added.
It needs nothing from stage 3: train both side by side.

    python content_diffusion.py                                      # on the shapes that autoencoder.py encoded
    python content_diffusion.py --run-dir runs/ucf101                # with that folder's preset
    torchrun --nproc-per-node 8 content_diffusion.py --run-dir runs/webvid_sd15 --sd v1-5-pruned.safetensors
"""

import argparse
import copy
import csv
import functools
import math
import os
import signal
import sys
import time
import warnings
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from autoencoder import find_part, load_autoencoder, load_weights, read_checkpoint, to_pixels

# ---- Diffusion: noising, loss and samplers --------------------------------------------------------------------------

class Diffusion(nn.Module):
    """A model learns to remove noise. Training mixes a clean x with Gaussian noise eps, x_t = sqrt(abar_t) x +
    sqrt(1 - abar_t) eps, and the model guesses eps (or x) from x_t and t. abar_t falls from almost 1 at t = 0, clean,
    to almost 0 at t = 999, noise. Sampling starts from noise at t = 999 and removes a little of it in each step.

    schedule  'linear' betas 1e-4 to 0.02 (DiT's), or 'scaled_linear', Stable Diffusion's 0.00085 to 0.012, linear in
              their roots
    predict   what the model returns: 'eps' as in the paper, 'v' = sqrt(abar) eps - sqrt(1 - abar) x, or the clean 'x',
              which a small model learns faster"""

    def __init__(self, schedule="linear", predict="eps"):
        super().__init__()
        start, end, power = (1e-4, 0.02, 1) if schedule == "linear" else (0.00085**0.5, 0.012**0.5, 2)
        beta = torch.linspace(start, end, 1000, dtype=torch.float64) ** power
        self.register_buffer("abar", (1 - beta).cumprod(0).float())  # (1000,)
        self.predict = predict

    def scales(self, t, x):
        """a = sqrt(abar_t), s = sqrt(1 - abar_t) for timesteps (B,), to multiply x (B, ...) with."""
        abar = self.abar[t].view(-1, *[1] * (x.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def loss(self, model, x, t, eps):
        """Equations 7 and 8, the mean squared error of model(x_t, t). x, eps (B, ...), t (B,) in 0..999 -> a number."""
        a, s = self.scales(t, x)
        output = model(a * x + s * eps, t).float()
        if self.predict == "x":
            # Divided by s, the error of x is that of v. By at least 0.5, or nearly clean inputs would dominate.
            return ((output - x) / s.clamp_min(0.5)).square().mean()
        target = eps if self.predict == "eps" else a * eps - s * x
        return (output - target).square().mean()

    @torch.no_grad()
    def test_loss(self, model, x, *others):
        """The loss of test clips x (N, ...), for early stopping: 64 pairs of a clip and a t, spread evenly over 0..999,
        always with the same noise, so that steps and runs compare. others: further inputs of the model."""
        if not len(x):  # no test video can be read
            return math.nan
        clips = torch.arange(max(64, len(x)), device=x.device) % len(x)
        eps = torch.randn(len(clips), *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x.device)
        rows = zip(torch.linspace(0, 999, len(clips), device=x.device).long().split(1), eps.split(1),
                   *(tensor[clips].split(1) for tensor in (x, *others)))
        return torch.tensor([self.loss(lambda x_t, t: model(x_t, t, *rest), x, t, eps)
                             for t, eps, x, *rest in rows]).mean().item()

    def estimates(self, output, x_t, t):
        """The model's output for x_t -> its estimates of the clean x and of the noise eps, both (B, ...)."""
        a, s = self.scales(t, x_t)
        if self.predict == "x":
            return output, (x_t - a * output) / s
        if self.predict == "v":
            return a * x_t - s * output, a * output + s * x_t
        return (x_t - s * output) / a, output


def ddim(denoise, x, diffusion, steps=50, eta=0.0, generators=None, bounds=None, progress=iter):
    """DDIM (Song et al. 2021, equation 12) from noise x (B, ...) to a clean sample of the same shape.

    denoise(x_t, t) returns what the model predicts for timesteps t (B,). eta: 0 adds no noise, so the same start gives
    the same sample; 1 adds as much in each step as the original sampler (DDPM), from `generators`, one for each.
    bounds: the (low, high) between which the clean x lies. progress wraps the list of steps, as tqdm does."""
    times = torch.linspace(999, 0, steps).round().long().tolist()
    abars = diffusion.abar[times]
    for now, abar, after in progress(list(zip(times, abars, [*abars[1:], torch.ones_like(abars[0])]))):
        t = torch.full((len(x),), now, device=x.device)
        x0, eps = diffusion.estimates(denoise(x, t), x, t)
        if bounds is not None:
            x0 = x0.clamp(*bounds)
            eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        sigma = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()  # 0 in the last step
        x = after.sqrt() * x0 + (1 - after - sigma**2).clamp_min(0).sqrt() * eps
        if eta:  # each sample's noise from its own CPU generator: the same in any batch, on any device
            noise = [torch.randn(x.shape[1:], generator=generator) for generator in generators]
            x = x + sigma * torch.stack(noise).to(x.device)
    return x


def guided(predict, condition, nothing, scale):
    """denoise(x_t, t) by classifier-free guidance: predict(x_t, t, condition) with the condition and without it, in one
    batch -> without + scale * (with - without). Larger scales follow the condition more closely, with less variety. The
    model can do both because training drops some conditions (--drop)."""
    if scale == 1:
        return lambda x, t: predict(x, t, condition)
    both = torch.cat([condition, nothing])

    def denoise(x, t):
        with_, without = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_ - without)

    return denoise


# ---- DiT: the content model trained from scratch --------------------------------------------------------------------

def sincos_positions(rows, columns, width):
    """(rows * columns, width): fixed 2-D sine-cosine positions. The first half of the width depends on the column."""

    def of(position):
        angle = position[:, None] / 10000 ** (torch.arange(width // 4) / (width // 4))
        return torch.cat([angle.sin(), angle.cos()], 1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([of(column.flatten()), of(row.flatten())], 1)


def timestep_embedding(t, width):
    """t (B,) -> (B, width): cosines, then sines, at frequencies from 1 down to almost 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1)


def attend(q, k, v, heads, causal=False):
    """Multi-head attention: q (B, N, width), k and v (B, M, width) -> (B, N, width)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, width / heads)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class DiTBlock(nn.Module):
    """A transformer block that the condition c shifts, scales and gates (AdaLN): x (B, N, width), c (B, width) -> x's
    shape. DiT sets the gates to 0 at first, so that a new block is the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        q, k, v = self.attn.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=2)
        x = x + gate1 * self.attn.proj(attend(q, k, v, self.heads))
        h = F.gelu(self.mlp.fc1(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp.fc2(h)


DIT_SIZES = {  # Peebles & Xie, table 1; "mini" is ours, for the shapes preset
    "XL": dict(width=1152, depth=28, heads=16),
    "L": dict(width=1024, depth=24, heads=16),
    "B": dict(width=768, depth=12, heads=12),
    "S": dict(width=384, depth=12, heads=6),
    "mini": dict(width=128, depth=4, heads=4),
}


class DiT(nn.Module):
    """dit(x, t, labels): x (B, C, H, W), t (B,) in 0..999, labels (B,) in 0..classes -> (B, C, H, W).

    The label `classes` stands for "no class": a dropped label. size: H and W, an int or (H, W), divisible by `patch`.
    Tensors have the raw DiT files' names, but no variance is predicted. Defaults: DiT-XL/2 on Stable Diffusion's
    latents of 256x256. `checkpointing = True` recomputes activations in the backward pass."""

    def __init__(self, channels=4, size=32, patch=2, width=1152, depth=28, heads=16, classes=1000):
        super().__init__()
        self.channels, self.patch, self.classes = channels, patch, classes
        height, wide = (size, size) if isinstance(size, int) else size
        if height % patch or wide % patch:
            raise SystemExit(f"a content frame of {height}x{wide} cannot be cut into patches of {patch}x{patch}")
        self.grid = (height // patch, wide // patch)
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(channels, width, patch, patch)))
        self.register_buffer("pos_embed", sincos_positions(*self.grid, width)[None], persistent=False)
        self.t_embedder = nn.ModuleDict(dict(
            mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))))
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, width)))
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        last = self.final_layer = nn.ModuleDict(dict(
            linear=nn.Linear(width, patch * patch * channels),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))))
        self.checkpointing = False
        # As in DiT, zero gates and a zero last layer: at first the output is zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in [*(block.adaLN_modulation[-1] for block in self.blocks), last.adaLN_modulation[-1], last.linear]:
            nn.init.zeros_(layer.weight)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, t, labels):
        # Contiguous, or every norm below would copy its input. (B, N, width)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2).contiguous() + self.pos_embed
        c = timestep_embedding(t, 256).to(self.final_layer.linear.weight.dtype)
        c = self.t_embedder.mlp(c) + self.y_embedder.embedding_table(labels)  # (B, width)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpointing and self.training else block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        x = self.final_layer.linear(self.norm(x) * (1 + scale) + shift)  # (B, N, patch * patch * C)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=self.patch, q=self.patch)


# ---- Presets and flags ----------------------------------------------------------------------------------------------

PAPER = dict(  # table 7
    patch=2, predict="eps", lr=1e-4, batch_size=256, decay=False, ema=0.999, drop=0.1, save_every=2000,
    preview_every=2000, log_every=50, workers=8)
# Unlike the paper: a small DiT that predicts the clean frame, which it learns faster; a higher learning rate, which
# decays; a shorter EMA (the weights' moving average, which is what sampling uses). In every preset label embeddings
# start at PyTorch's standard deviation of 1: DiT's 0.02, which --dit keeps to, takes long to grow.
SHAPES = dict(
    model="mini", patch=4, predict="x", schedule="linear", lr=3e-3, batch_size=16, steps=2200, decay=True, ema=0.995,
    drop=0.1, save_every=500, preview_every=1000, log_every=50, workers=0)
TINY_SD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "tiny-sd.safetensors")
PRESETS = {
    "shapes": SHAPES,
    "shapes_text": dict(SHAPES, model="sd", sd=TINY_SD, predict="eps", schedule="scaled_linear", lr=5e-4, steps=1500),
    # 3,000 epochs of 9,537 videos, and 3 epochs of 10.7 M.
    "ucf101": dict(PAPER, model="XL", schedule="linear", steps=111_762),
    "webvid_sd15": dict(PAPER, model="sd", schedule="scaled_linear", steps=125_391),
    "webvid_sd21": dict(PAPER, model="sd", schedule="scaled_linear", steps=125_391, accumulate=2),  # for 80 GB a GPU
}

# What --resume may change
CHANGEABLE = set("run_dir resume steps batch_size accumulate workers dtype compile checkpointing log_every save_every "
                 "preview_every".split())


def read_flags():
    """(flags, stage 1's checkpoint, checkpoint to go on from or None), as in stage 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="fills the flags below (default: stage 1's)")
    add("--run-dir", help="stage 1's run folder, on a disk that all ranks share (default: runs/PRESET)")
    add("--resume", action="store_true", help="go on from the run folder's checkpoint, if there is one")
    add("--model", choices=[*DIT_SIZES, "sd"], help="DiT's size, or sd: Stable Diffusion's U-Net")
    add("--patch", type=int, help="DiT's patch on the content frame")
    add("--sd", help="raw Stable Diffusion 1.5 or 2.1-base file to start from, for --model sd")
    add("--dit", help="raw ImageNet DiT file to start a DiT from, such as DiT-XL-2-256x256.pt")
    add("--predict", choices=["eps", "v", "x"], help="what the model predicts: the noise, v or the clean input")
    add("--schedule", choices=["linear", "scaled_linear"], help="betas: DiT's, or Stable Diffusion's")
    add("--drop", type=float, help="how often the label or prompt is dropped, for guidance")
    add("--ema", type=float, help="decay of the weights' moving average")
    add("--steps", type=int, help="steps in all")
    add("--batch-size", type=int, help="clips in a step, over all ranks")
    add("--accumulate", type=int, default=1, help="passes into which each rank's batch is divided")
    add("--lr", type=float, help="Adam's learning rate")
    add("--decay", action=argparse.BooleanOptionalAction, help="short rise, then cosine decay of the rate to --steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no limit")
    add("--seed", type=int, default=0, help="of the weights, the order of the clips and the noise")
    add("--workers", type=int, help="loader processes on each rank")
    add("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic (default: bfloat16 on a GPU, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU, but for shapes)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, a third more time")
    add("--log-every", type=int, help="steps between rows of content.csv")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--preview-every", type=int, help="steps between pictures in previews/")

    given = parser.parse_args()
    run_dir = given.run_dir or f"runs/{given.preset or 'shapes'}"
    path, stage1 = f"{run_dir}/content.pt", data.load_checkpoint(f"{run_dir}/autoencoder.pt")
    saved = data.load_checkpoint(path) if os.path.exists(path) else None
    if saved and not (given.resume and "optimizer" in saved):  # models that come with the code have none
        raise SystemExit(f"{path} exists: --resume goes on, if it has an optimizer; another --run-dir starts a new run")
    preset = given.preset or stage1["args"]["preset"]
    parser.set_defaults(**(saved["args"] if saved else PRESETS[preset] | dict(preset=preset)))
    args = parser.parse_args()
    args.run_dir, args.resume = run_dir, given.resume
    for name in (saved["args"].keys() - CHANGEABLE) if saved else ():
        if getattr(args, name) != saved["args"][name]:
            raise SystemExit(f"{path} was trained with --{name.replace('_', '-')} {saved['args'][name]}, not "
                             f"{getattr(args, name)}: drop that flag, or choose another --run-dir")
    if saved and saved["identity"] != stage1["identity"]:
        raise SystemExit(f"{path} fits other encodings: autoencoder.py --encode {run_dir} --run-dir NEW, train in NEW")
    if args.sd == TINY_SD and not str(stage1["args"]["sd"]).endswith("tools/tiny-sd.safetensors"):
        raise SystemExit(f"{run_dir} is of {stage1['args']['sd'] or 'pixels'}: give the same --sd, and stage 3 --text")
    if not 0 <= min(args.drop, args.ema) <= max(args.drop, args.ema) <= 1:
        parser.error("--drop and --ema: from 0 to 1")
    return args, stage1, saved


# ---- Training -------------------------------------------------------------------------------------------------------

def load_content(run_dir, state=None):
    """(DiT or UNet with its EMA weights, TextEncoder or None, Diffusion, checkpoint) of a run folder or checkpoint."""
    state = state or data.load_checkpoint(f"{run_dir}/content.pt")
    diffusion = Diffusion(state["args"]["schedule"], state["args"]["predict"])
    if state["config"] is None:
        return build_unet(state["ema"], "content.pt"), open_text_encoder(**state["text_encoder"]), diffusion, state
    model = DiT(**state["config"])
    model.load_state_dict(state["ema"])
    return model, None, diffusion, state


def new_model(args, shape, classes):
    """(config, DiT, None) or (None, UNet, TextEncoder) to train, by the flags and the encodings."""
    C, *size = shape
    if (args.model == "sd") != bool(args.sd) or (args.dit if args.sd else args.preset.startswith("webvid")):
        raise SystemExit("webvid and --model sd need --sd, a Stable Diffusion 1.5 or 2.1-base file; --dit is for DiTs")
    if args.sd:
        return None, *load_stable_diffusion(args.sd, args.predict)
    config = dict(channels=C, size=size, patch=args.patch, classes=max(1, len(classes)), **DIT_SIZES[args.model])
    dit = DiT(**config)
    if args.dit:
        load_dit(args.dit, dit)
    return config, dit, None


@torch.no_grad()
def preview(args, step, ema, diffusion, condition_of, dataset, device, autocast):
    """Writes a picture of 16 content frames (4 of latents), by 25 DDIM steps, no guidance. Returns the test loss."""
    image = load_autoencoder(args.run_dir, device)[1]
    number = 4 if image else 16
    batch = dict(label=torch.arange(number) % ema.classes if hasattr(ema, "classes") else None,
                 caption=[dataset[i % len(dataset)]["caption"] for i in range(number)])
    condition = condition_of(batch)
    noise = torch.randn(number, *dataset.content_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast:
        frames = ddim(lambda x, t: ema(x, t, condition), noise, diffusion, steps=25)
    pictures = list(to_pixels(frames[:, :, None], image).cpu())
    data.write_sheet(f"{args.run_dir}/previews/content-{step:06d}.png", pictures, columns=8)
    test = dataset.test_clips()
    with autocast:
        return diffusion.test_loss(ema, test["content"].to(device), condition_of(test))


def main():
    args, stage1, saved = read_flags()
    run_dir, path = args.run_dir, f"{args.run_dir}/content.pt"
    dataset, classes = data.EncodedClips(run_dir, stage1), stage1["classes"]  # content frames, labels, captions

    # Ranks and device, as in stage 1
    rank, local, world = int(os.getenv("RANK", 0)), int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where something stays in float32
        torch.backends.cudnn.benchmark = True  # convolutions see the same sizes again and again
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in stage 1
    if world > 1:
        dist.init_process_group()
        found = [None] * world
        dist.all_gather_object(found, (saved and saved["step"], stage1["identity"]))
        if len(set(found)) > 1:
            raise SystemExit(f"the ranks find different checkpoints in {run_dir}: it must be on a disk that they share")
    if args.batch_size % (world * args.accumulate):
        raise SystemExit(f"{world} ranks * --accumulate {args.accumulate} do not divide --batch-size {args.batch_size}")
    half = args.dtype == "bfloat16" or args.dtype is None and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, half)

    # Data
    shape, first = dataset.content_shape, saved["step"] if saved else 0  # (C, H, W)
    keys = data.batch_keys(range(len(dataset)), args.batch_size, args.seed, first, rank, world)
    clips = data.load(dataset, keys, args.workers)

    # Model
    torch.manual_seed(args.seed)
    if saved:
        model, text_encoder, _, _ = load_content(run_dir, saved)
        config = saved["config"]
    else:
        config, model, text_encoder = new_model(args, shape, classes)
    ema = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    model.checkpointing = args.checkpointing
    text_encoder = text_encoder and text_encoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    weights, averages = list(model.parameters()), list(ema.parameters())
    optimizer, rows = torch.optim.Adam(weights, lr=args.lr, fused=True), saved["rows"] if saved else []
    if saved:  # load_content loaded the averaged weights: now the trained ones
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    del saved
    diffusion = Diffusion(args.schedule, args.predict).to(device)
    compiled = device.type == "cuda" and "shapes" not in args.preset if args.compile is None else args.compile
    if compiled:
        torch._dynamo.config.suppress_errors = True  # as in stage 1
        torch._functorch.config.force_non_lazy_backward_lowering = True
        model.compile(dynamic=False)
    predict = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model

    def condition_of(batch, dropped=torch.zeros(1, dtype=torch.bool, device=device)):
        """Labels (B,) or text (B, 77, width), with 'nothing' where dropped (B,) is true."""
        if text_encoder is None:
            return torch.where(dropped, model.classes, batch["label"].to(device, non_blocking=True))
        with torch.no_grad():  # `dropped` stays on the device: reading it would make every step wait
            hidden = text_encoder.encode([*batch["caption"], ""]).float()
        return torch.where(dropped[:, None, None], hidden[-1], hidden[:-1])

    def save(step):
        if rank == 0:
            torch.save(dict(step=step, args=vars(args), config=config, shape=list(shape), rows=rows,
                            identity=stage1["identity"], model=model.state_dict(), optimizer=optimizer.state_dict(),
                            ema=ema.state_dict(), text_encoder=text_encoder and text_encoder.state()), f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    # Ctrl-C, SIGTERM or a closed terminal: save and end, as in stage 1
    stop = torch.zeros(1)

    def receive(*_):
        stop.fill_(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)

    os.makedirs(f"{run_dir}/previews", exist_ok=True)
    share = args.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)  # this rank's rows of the whole batch
    parts = torch.arange(share, device=device).chunk(args.accumulate)  # rows that pass through the model together
    generator, losses, since, skipped, in_a_row = torch.Generator(device), [], time.perf_counter(), 0, 0
    last = max(first, args.steps)
    if rank == 0:
        print(f"content model: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(dataset)} clips, steps "
              f"{first} to {last}, {path}; {device}, {'bfloat16' if half else 'float32'}{', compiled' * compiled}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="content", disable=rank > 0)
    for step in bar:
        # Random numbers for the whole batch, of which each rank takes its rows, as in stage 1
        generator.manual_seed(args.seed * 1_000_003 + step)
        t = torch.randint(1000, (args.batch_size,), generator=generator, device=device)[mine]
        eps = torch.randn(args.batch_size, *shape, generator=generator, device=device)[mine]
        dropped = torch.rand(args.batch_size, generator=generator, device=device)[mine] < args.drop
        batch = next(clips)
        content, condition = batch["content"].to(device, non_blocking=True), condition_of(batch, dropped)

        loss = 0
        for part in parts:
            predict.require_backward_grad_sync = part is parts[-1]  # DDP exchanges gradients once a step
            with autocast:
                error = diffusion.loss(lambda x, t: predict(x, t, condition[part]), content[part], t[part], eps[part])
            (error / len(parts)).backward()
            loss += error.detach() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip if args.clip > 0 else math.inf)
        lr = args.lr
        if args.decay:  # a short rise, then a cosine fall to a hundredth
            fall = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
            lr = lr * min(1, (step + 1) / (0.05 * args.steps)) * max(0.01, fall)
        optimizer.param_groups[0]["lr"] = lr
        if finite := norm.isfinite().item():  # else the step is skipped
            optimizer.step()
            decay = min(args.ema, (1 + step) / (10 + step))  # low at first: forgets the initial weights
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
        optimizer.zero_grad()

        # The rest is logging, pictures and saving.
        losses, in_a_row = losses + [loss] * finite, 0 if finite else in_a_row + 1
        skipped += not finite
        if in_a_row == 5:
            raise SystemExit("5 steps in a row had a NaN or infinite loss: lower --lr, or look at the data")
        done, stopping, scores = step + 1, stop.clone(), {}  # a signal can come at any time, and all ranks must agree
        if world > 1:
            dist.all_reduce(stopping)
        due, seconds = (done == last or done % args.preview_every == 0) and not stopping, time.perf_counter() - since
        if due and rank == 0:
            scores["test_loss"] = preview(args, done, ema, diffusion, condition_of, dataset, device, autocast)
        if due or done % args.log_every == 0:
            average = torch.stack(losses or [loss * math.nan]).mean() / world
            if world > 1:
                dist.all_reduce(average)
            speed = len(losses) * args.batch_size / seconds
            rows.append(dict(step=done, loss=average.item(), skipped=skipped, lr=lr, grad_norm=norm.item(),
                             clips_per_second=speed, **scores))
            bar.set_postfix_str(f"loss {average:.4f}, {speed:.1f} clips/s")
            if rank == 0:
                with open(f"{run_dir}/content.csv.tmp", "w", newline="") as file:
                    table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
                    table.writeheader()
                    table.writerows(rows)
                os.replace(f"{run_dir}/content.csv.tmp", f"{run_dir}/content.csv")
            losses, since = [], time.perf_counter()
        if done == last or stopping or done % args.save_every == 0:
            save(done)
        if stopping:
            bar.close()
            print(f"stopped after step {done}, saved: --resume goes on")
            sys.exit(130)
    if world > 1:
        dist.destroy_process_group()


# ---- Appendix: Stable Diffusion's U-Net -----------------------------------------------------------------------------

class ResBlock(nn.Module):
    """(B, inputs, H, W), time embedding (B, 4 width) -> (B, outputs, H, W)."""

    def __init__(self, inputs, outputs, time_width, groups):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inputs), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, outputs))
        self.out_layers = nn.Sequential(  # the identity: in the file's numbers a dropout of zero
            nn.GroupNorm(groups, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Each of N tokens attends to M others: (B, N, width), (B, M, context) -> (B, N, width)."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, context):
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class TransformerBlock(nn.Module):
    """Attention among the pixels, to the text, and a feed-forward: (B, N, width), (B, M, context) -> (B, N, width)."""

    def __init__(self, width, context, heads):
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context, heads)
        proj = nn.ModuleDict(dict(proj=nn.Linear(width, 2 * 4 * width)))
        self.ff = nn.ModuleDict(dict(net=nn.ModuleList([proj, nn.Identity(), nn.Linear(4 * width, width)])))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        h, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, dim=-1)  # (B, N, 4 width) each
        return x + self.ff.net[2](h * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map x (B, width, H, W), context (B, M, context) -> x's shape.
    linear: the projections around it are linear layers (2.1), not 1x1 convolutions (1.5), which compute the same."""

    def __init__(self, width, context, heads, linear, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in, self.proj_out = (nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
                                       for _ in range(2))
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])
        self.linear = linear

    def forward(self, x, context):
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, width)
        h = self.proj_in(h) if self.linear else h
        h = self.transformer_blocks[0](h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, width, H, W)
        return x + (h if self.linear else self.proj_out(h))


class UNet(nn.Module):
    """Stable Diffusion's U-Net: noisy latents -> the noise in them, under the raw file's names. The defaults are 1.5
    (859.5 M parameters); `context=1024, head_width=64` is 2.1 (865.9 M), which fixes the heads' width instead of their
    number. `checkpointing = True` recomputes activations in the backward pass."""

    def __init__(self, width=320, context=768, heads=8, head_width=None, multipliers=(1, 2, 4, 4), blocks=2):
        super().__init__()
        self.width, self.context, self.channels, self.checkpointing = width, context, 4, False
        time_width, last = 4 * width, len(multipliers) - 1  # the last level, of lowest resolution, has no attention
        groups = min(32, width // 4)  # of the norms: 32 at the published width, fewer in a tiny model

        def transformer(outputs):
            count = heads if head_width is None else outputs // head_width
            return SpatialTransformer(outputs, context, count, head_width is not None, groups)

        def layers(inputs, outputs, level):
            block = ResBlock(inputs, outputs, time_width, groups)
            return nn.ModuleList([block] + [transformer(outputs)] * (level < last))

        here, skips = width, [width]  # channels so far, and of the skip connections
        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, width, 3, padding=1)])])
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.input_blocks.append(layers(here, width * multiplier, level))
                here = width * multiplier
                skips.append(here)
            if level < last:
                down = nn.Sequential(OrderedDict(op=nn.Conv2d(here, here, 3, stride=2, padding=1)))
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(here)
        self.middle_block = nn.ModuleList(
            [ResBlock(here, here, time_width, groups), transformer(here), ResBlock(here, here, time_width, groups)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.output_blocks.append(layers(here + skips.pop(), width * multiplier, level))
                here = width * multiplier
            if level:
                self.output_blocks[-1].append(nn.ModuleDict(dict(conv=nn.Conv2d(here, here, 3, padding=1))))
        self.out = nn.Sequential(nn.GroupNorm(groups, here), nn.SiLU(), nn.Conv2d(here, 4, 3, padding=1))

    def apply_block(self, layers, x, time, context, size=None):
        """x (B, C, H, W) through the layers of a block. size: H and W after an upsampling."""
        for layer in layers:
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                c = time if isinstance(layer, ResBlock) else context
                again = self.checkpointing and self.training
                x = checkpoint(layer, x, c, use_reentrant=False) if again else layer(x, c)
            elif isinstance(layer, nn.ModuleDict):  # upsampling
                x = layer["conv"](F.interpolate(x, size=size, mode="nearest"))
            else:
                x = layer(x)
        return x

    def forward(self, x, t, context):
        """x (B, 4, H, W) scaled latents, t (B,) in 0..999, context (B, 77, context) -> noise (B, 4, H, W)."""
        time = self.time_embed(timestep_embedding(t, self.width).to(x.dtype))  # (B, 4 width)
        skips = []
        for layers in self.input_blocks:
            x = self.apply_block(layers, x, time, context)
            skips.append(x)
        x = self.apply_block(self.middle_block, x, time, context)
        for layers in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            # Upsampled to the next skip's size: twice this one, or one less where that is odd.
            x = self.apply_block(layers, x, time, context, size=skips[-1].shape[2:] if skips else None)
        return self.out(x)


# ---- Appendix: Stable Diffusion's text encoders ---------------------------------------------------------------------

START, END = 49406, 49407  # CLIP's tokens around every caption


@functools.cache
def tokenizer():
    with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources, which is deprecated
        from clip.simple_tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def tokenize(captions, pad):
    """A list of B captions -> tokens (B, 77): START, the words, END, then `pad`."""
    tokens = torch.full((len(captions), 77), pad)
    for row, caption in zip(tokens, captions):
        words = tokenizer().encode(caption[:5000])  # a word of a million letters would take hours
        if words[75:]:
            warnings.warn("a prompt is longer than 77 tokens: its last words are left out", stacklevel=2)  # once
        row[: len(words) + 2] = torch.tensor([START, *words[:75], END])
    return tokens


class TextLayer(nn.Module):
    """(B, N, width) -> (B, N, width): causal attention, then a feed-forward; pre-norm."""

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.heads, self.quick_gelu = heads, quick_gelu
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(width, width) for part in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))

    def forward(self, x):
        h, attention = self.layer_norm1(x), self.self_attn
        h = attend(attention.q_proj(h), attention.k_proj(h), attention.v_proj(h), self.heads, causal=True)
        x = x + attention.out_proj(h)
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h))


class TextEncoder(nn.Module):
    """CLIP's text transformer, with Hugging Face's names: tokens (B, 77) -> hidden states (B, 77, width). The defaults
    are 1.5's: CLIP ViT-L/14, quick-GELU, padded with END. 2.1's is OpenCLIP ViT-H/14 without its last layer: width
    1024, 23 layers, 16 heads, exact GELU, padded with 0."""

    def __init__(self, width=768, layers=12, heads=12, quick_gelu=True, pad=END):
        super().__init__()
        self.config = dict(width=width, layers=layers, heads=heads, quick_gelu=quick_gelu, pad=pad)
        self.width, self.pad = width, pad
        self.embeddings = nn.ModuleDict(dict(token_embedding=nn.Embedding(49408, width),
                                             position_embedding=nn.Embedding(77, width)))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(
            TextLayer(width, heads, quick_gelu) for _ in range(layers))))
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)

    def state(self):
        """What a checkpoint keeps: the config, and the weights in half precision, since they are not trained."""
        return dict(config=self.config, weights={name: tensor.half() for name, tensor in self.state_dict().items()})

    def encode(self, captions):
        """A list of B captions ('' is the empty prompt) -> hidden states (B, 77, width) on the encoder's device."""
        return self(tokenize(captions, self.pad).to(self.final_layer_norm.weight.device, non_blocking=True))


# ---- Appendix: loading raw weights ----------------------------------------------------------------------------------

def build_unet(tensors, path):
    """The UNet in a Stable Diffusion file's tensors, whose shapes tell its sizes. `path` starts an error."""
    first, keys = "input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    what = f"{path} is not a Stable Diffusion 1.5 or 2.1 file"
    own = find_part(tensors, "model.diffusion_model.", [first, keys], what)
    width = len(own[first])
    levels = 1 + sum(name.endswith(".0.op.weight") for name in own)
    blocks = len({name.split(".")[1] for name in own if name.startswith("input_blocks.")}) // levels - 1
    multipliers = [len(own.get(f"input_blocks.{1 + i * (blocks + 1)}.0.out_layers.3.weight", own[first])) // width
                   for i in range(levels)]
    linear = own.get("input_blocks.1.1.proj_in.weight", own[keys]).ndim == 2
    with torch.device("meta"):
        unet = UNet(width, own[keys].shape[1], 8, 64 if linear else None, multipliers, blocks)
    load_weights(unet, own, f"{path}: the U-Net (inpainting models and SDXL do not fit)")
    return unet.to(memory_format=torch.channels_last)  # the layout in which tensor cores convolve


def from_openclip(tensors):
    """OpenCLIP's names -> Hugging Face's, without the last layer, if it is there: Stable Diffusion 2 reads layer 23."""
    last = max((int(name.split(".")[2]) for name in tensors if name.startswith("transformer.resblocks.")), default=0)
    renames = {"transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
               "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
               "token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm",
               "positional_embedding": "embeddings.position_embedding.weight"}
    own = {}
    for name, tensor in tensors.items():
        if name.startswith(f"transformer.resblocks.{last}.") and last != 22:
            continue
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        if "attn.in_proj_" in name:  # q, k and v in one
            for part, third in zip("qkv", tensor.chunk(3)):
                own[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = third
        else:
            own[name] = tensor
    return own


def open_text_encoder(config, weights, what="the run folder's text encoder"):
    """A frozen TextEncoder, float32, on the CPU, from its state() in a checkpoint."""
    if weights is None:  # in the models that come with the code
        return load_text_encoder(TINY_SD)
    with torch.device("meta"):
        encoder = TextEncoder(**config)
    load_weights(encoder, weights, what)
    return encoder.eval().requires_grad_(False)


def load_text_encoder(path, tensors=None):
    """The frozen TextEncoder of a full Stable Diffusion file, CLIP ViT-L/14 (named as Hugging Face does) or OpenCLIP
    ViT-H/14. tensors: the file's, where it has been read."""
    tensors = tensors or read_checkpoint(path)
    openclip = any("resblocks." in name for name in tensors)
    table = "token_embedding.weight" if openclip else "embeddings.token_embedding.weight"
    prefix = next((name.removesuffix(table) for name in tensors if name.endswith(table)), "")
    own = find_part(tensors, prefix, [table], f"{path}: this file has no text encoder")
    width = own[table].shape[1]
    own = {name: tensor for name, tensor in (from_openclip(own) if openclip else own).items()
           if name.startswith(("embeddings.t", "embeddings.position_e", "encoder.", "final")) and ".23." not in name}
    layers = len({name.split(".")[2] for name in own if name.startswith("encoder.")})
    openclip = openclip or width == 1024  # Stable Diffusion 2's under Hugging Face's names
    config = dict(width=width, layers=layers, heads=width // 64, quick_gelu=not openclip, pad=0 if openclip else END)
    return open_text_encoder(config, own, f"{path}: the text encoder")


@torch.no_grad()
def load_stable_diffusion(path, predict="eps"):
    """A full Stable Diffusion 1.5 or 2.1-base file (.safetensors, .ckpt) -> UNet, TextEncoder (frozen), float32, CPU.
    The shapes tell the version. A model that seems to predict v, as 2.1's 768 model does, gives a warning."""
    tensors = read_checkpoint(path)
    unet, encoder = build_unet(tensors, path), load_text_encoder(path, tensors)
    # At t = 999 the input is almost pure noise: eps-models return it, v-models about -x0.
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    output = unet(x, torch.tensor([999]), encoder.encode([""]))
    agreement = F.cosine_similarity(output.flatten(), x.flatten(), dim=0).item()
    if (predict == "eps") != (agreement > 0.7):
        warnings.warn(f"{path}: at t = 999 the U-Net's output has cosine {agreement:.2f} with the noise: --predict eps "
                      "is for almost 1, --predict v for others, such as 2.1's 768 model", stacklevel=2)
    return unet, encoder


def load_dit(path, dit):
    """Loads DiT's raw ImageNet weights (DiT-XL-2-256x256.pt) into a DiT and says what could not be used."""
    table, last = "y_embedder.embedding_table.weight", "final_layer.linear."
    tensors = find_part(read_checkpoint(path), "", ["x_embedder.proj.weight", table, last + "weight"],
                        f"{path} is not a DiT checkpoint")
    own, (channels, patch) = dit.state_dict(), tensors["x_embedder.proj.weight"].shape[1:3]
    tensors.pop("pos_embed", None)  # computed here, for any grid
    unused, nothing = f"its {len(tensors[table]) - 1} classes", tensors[table][-1]
    tensors[table] = 0.02 * own[table]  # DiT's deviation, which the other weights expect
    for name in (last + "weight", last + "bias"):  # rows are (p, q, channel): those after the channels are variances
        tensors[name] = tensors[name].unflatten(0, (patch**2, -1))[:, :channels].flatten(0, 1)
    if (channels, patch) != (dit.channels, dit.patch):
        tensors |= {name: own[name] for name in own if name.startswith(("x_embedder.", last))}
        unused += f", its first and last layer ({channels} channels, patch {patch})"
    load_weights(dit, tensors, f"{path}: the DiT")
    dit.y_embedder.embedding_table.weight.data[-1] = nothing  # the last row stands for no class
    print(f"{path}: not used: {unused}")


if __name__ == "__main__":
    main()
