"""Stage 3, motion diffusion: learns to generate motion latents from noise, given a content frame and a class or text.

Equation 8 and table 6 of the paper. In: motion latents (B, D, L, H'+W') and content frames (B, C, H, W) that stage 1
encoded, with labels or captions. Out: a diffusion model p(motion | content, c): a DiT that reads the content frame's
patches as further tokens. It needs nothing from stage 2: train both side by side.

    python motion_diffusion.py                                       # on the shapes that autoencoder.py encoded
    python motion_diffusion.py --run-dir runs/ucf101                 # with that folder's preset
    torchrun --nproc-per-node 8 motion_diffusion.py --run-dir runs/webvid_sd21 --text v2-1_512-ema-pruned.safetensors
"""

import argparse
import copy
import csv
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from autoencoder import load_autoencoder, to_pixels
from content_diffusion import DIT_SIZES, Diffusion, ddim, load_text_encoder, open_text_encoder, sincos_positions

# ---- The motion model. Its blocks are DiT's of stage 2, written out again, to read the model in one place ------------

def timestep_embedding(t):
    """t (B,) in 0..999 -> (B, 256): cosines, then sines, at frequencies from 1 down to almost 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1)


class Block(nn.Module):
    """A transformer block that the condition c shifts, scales and gates (AdaLN): x (B, N, width), c (B, width) -> x's
    shape. MotionDiT sets the gates to 0 at first, so that a new block is the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)  # (B, 1, width) each
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        x = x + gate1 * self.proj(h)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class MotionDiT(nn.Module):
    """model(motion, t, content, condition) -> (B, D, L, H'+W'), the noise in the motion latent, or what --predict says.

    motion (B, D, L, H'+W') noisy and normalised per channel: a picture of L rows (time) and H'+W' columns, first one
    for each row of patches, then one for each column. t (B,) in 0..999, content (B, C, H, W), condition: labels (B,) in
    0..classes, of which the last stands for "no class", or with `text` features (B, text), the mean over tokens of the
    text encoder's hidden states.

    motion_channels, frames, columns: D, L and H'+W'; L and the columns may be any number >= 1, the grid is padded to
    whole patches. channels, size: C and (H, W) of the content frame, which is cut into patches of its own with
    sides of `content_patch` (table 4c). Defaults: table 6's DiT-XL/2 for Stable Diffusion 2.1's latents of 512x512.
    `checkpointing = True` recomputes activations in the backward pass."""

    def __init__(self, motion_channels=8, frames=16, columns=64, channels=4, size=64, patch=2, content_patch=8,
                 width=1152, depth=28, heads=16, classes=1000, text=None):
        super().__init__()
        height, wide = (size, size) if isinstance(size, int) else size
        if height % content_patch or wide % content_patch:
            raise SystemExit(f"--content-patch {content_patch} does not divide a content frame of {height}x{wide}")
        self.motion_channels, self.frames, self.columns, self.patch = motion_channels, frames, columns, patch
        self.classes, self.text, self.checkpointing = classes, text, False
        self.grid = (-(-frames // patch), -(-columns // patch))  # of motion tokens, rounded up: time, rows and columns
        self.motion_embedder = nn.Conv2d(motion_channels, width, patch, patch)
        self.content_embedder = nn.Conv2d(channels, width, content_patch, content_patch)
        content_grid = height // content_patch, wide // content_patch
        self.register_buffer("motion_positions", sincos_positions(*self.grid, width)[None], persistent=False)
        self.register_buffer("content_positions", sincos_positions(*content_grid, width)[None], persistent=False)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.c_embedder = nn.Linear(text, width) if text else nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(width, patch * patch * motion_channels)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        # As in DiT, zero gates and a zero last layer: at first the output is zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in [*(block.modulation[-1] for block in self.blocks), self.modulation[-1], self.out]:
            nn.init.zeros_(layer.weight)
        for layer in (self.t_embedder[0], self.t_embedder[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, motion, t, content, condition):
        rows, columns = self.grid
        padding = (0, columns * self.patch - self.columns, 0, rows * self.patch - self.frames)
        z = self.motion_embedder(F.pad(motion, padding)).flatten(2).transpose(1, 2)  # (B, N, width)
        frame = self.content_embedder(content).flatten(2).transpose(1, 2)  # (B, M, width)
        # The content frame's tokens come last. Positions of both begin at 0: their embedders differ. (B, N + M, width)
        x = torch.cat([z + self.motion_positions, frame + self.content_positions], 1)
        c = self.t_embedder(timestep_embedding(t).to(self.out.weight.dtype)) + self.c_embedder(condition)  # (B, width)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpointing and self.training else block(x, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=2)
        x = self.out(self.norm(x[:, : z.shape[1]]) * (1 + scale) + shift)  # the motion's tokens alone: (B, N, p p D)
        x = rearrange(x, "b (l n) (p q d) -> b d (l p) (n q)", l=rows, p=self.patch, q=self.patch)
        return x[:, :, : self.frames, : self.columns]


# ---- Presets and flags ----------------------------------------------------------------------------------------------

PAPER = dict(  # table 6
    patch=2, predict="eps", schedule="linear", lr=1e-4, batch_size=256, decay=False, ema=0.999, drop=0.1,
    save_every=2000, preview_every=2000, log_every=50, workers=8)
TINY_SD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "tiny-sd.safetensors")
SHAPES = dict(  # what differs from the paper is what differs in stage 2, for the same reasons
    model="mini", patch=2, content_patch=8, predict="x", schedule="linear", lr=2e-3, batch_size=16, steps=2000,
    decay=True, ema=0.995, drop=0.1, save_every=500, preview_every=1000, log_every=50, workers=0)
PRESETS = {
    "shapes": SHAPES,
    "shapes_text": dict(SHAPES, text=TINY_SD, content_patch=2),
    # 3,000 epochs of 9,537 videos, and 3 epochs of 10.7 M.
    "ucf101": dict(PAPER, model="L", content_patch=4, steps=111_762),
    "webvid_sd15": dict(PAPER, model="XL", content_patch=4, steps=125_391),
    "webvid_sd21": dict(PAPER, model="XL", content_patch=8, steps=125_391),
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
    add("--model", choices=DIT_SIZES, help="DiT's size")
    add("--patch", type=int, help="DiT's patch on the motion latent")
    add("--content-patch", type=int, help="its patch on the content frame (table 4c)")
    add("--text", help="condition on captions: raw file with a text encoder, full Stable Diffusion or OpenCLIP ViT-H")
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
    add("--log-every", type=int, help="steps between rows of motion.csv")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--preview-every", type=int, help="steps between pictures in previews/")

    given = parser.parse_args()
    run_dir = given.run_dir or f"runs/{given.preset or 'shapes'}"
    path, stage1 = f"{run_dir}/motion.pt", data.load_checkpoint(f"{run_dir}/autoencoder.pt")
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
    other = args.text == TINY_SD and not str(stage1["args"]["sd"]).endswith("tools/tiny-sd.safetensors")
    if other or not args.text and "webvid" in args.preset:
        raise SystemExit(f"--preset {args.preset} needs --text: a raw file with the captions' text encoder")
    if not 0 <= min(args.drop, args.ema) <= max(args.drop, args.ema) <= 1:
        parser.error("--drop and --ema: from 0 to 1")
    return args, stage1, saved


# ---- Training -------------------------------------------------------------------------------------------------------

def load_motion(run_dir, state=None):
    """(MotionDiT with its EMA weights, TextEncoder or None, Diffusion, checkpoint) of a run folder or a checkpoint."""
    state = state or data.load_checkpoint(f"{run_dir}/motion.pt")
    model = MotionDiT(**state["config"])
    model.load_state_dict(state["ema"])
    text_encoder = state["text_encoder"] and open_text_encoder(**state["text_encoder"])
    return model, text_encoder, Diffusion(state["args"]["schedule"], state["args"]["predict"]), state


def new_model(args, motion_shape, content_shape, classes):
    """(config, MotionDiT, TextEncoder or None) to train, by the flags and the encodings."""
    text_encoder = args.text and load_text_encoder(args.text)
    (D, L, columns), (C, *size) = motion_shape, content_shape
    config = dict(motion_channels=D, frames=L, columns=columns, channels=C, size=size, patch=args.patch,
                  content_patch=args.content_patch, classes=max(1, len(classes)),
                  text=text_encoder and text_encoder.width, **DIT_SIZES[args.model])
    return config, MotionDiT(**config), text_encoder


@torch.no_grad()
def preview(args, step, ema, diffusion, condition_of, dataset, mean, std, autocast):
    """Writes a picture of up to 8 clips: stored content, motion by 25 DDIM steps. Returns the test loss."""
    device = mean.device
    autoencoder, image, _ = load_autoencoder(args.run_dir, device)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(0, len(dataset), len(dataset) // 8 + 1)])
    content = batch["content"].to(device)
    condition = condition_of(batch)
    noise = torch.randn(len(content), *dataset.motion_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast:
        motion = ddim(lambda x, t: ema(x, t, content, condition), noise, diffusion, steps=25)
    videos = to_pixels(autoencoder.decode(content, (motion * std + mean).clamp(-1, 1)), image)
    data.write_sheet(f"{args.run_dir}/previews/motion-{step:06d}.png", list(videos.cpu()), 1, batch["caption"])
    test = dataset.test_clips()
    motion = (test["motion"].to(device) - mean) / std
    with autocast:
        return diffusion.test_loss(ema, motion, test["content"].to(device), condition_of(test))


def main():
    args, stage1, saved = read_flags()
    run_dir, path = args.run_dir, f"{args.run_dir}/motion.pt"
    dataset, classes = data.EncodedClips(run_dir, stage1), stage1["classes"]

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

    # Data: motion latents and content frames, with their labels or captions; the mean and deviation of the latents
    shape, first = dataset.motion_shape, saved["step"] if saved else 0  # (D, L, H'+W')
    mean, std = (stage1["model"][name].float().to(device) for name in ("motion_mean", "motion_std"))
    keys = data.batch_keys(range(len(dataset)), args.batch_size, args.seed, first, rank, world)
    clips = data.load(dataset, keys, args.workers)

    # Model
    torch.manual_seed(args.seed)
    if saved:
        model, text_encoder, _, _ = load_motion(run_dir, saved)
        config = saved["config"]
    else:
        config, model, text_encoder = new_model(args, shape, dataset.content_shape, classes)
    ema = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    model.checkpointing = args.checkpointing
    text_encoder = text_encoder and text_encoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    weights, averages = list(model.parameters()), list(ema.parameters())
    optimizer, rows = torch.optim.Adam(weights, lr=args.lr, fused=True), saved["rows"] if saved else []
    if saved:  # load_motion loaded the averaged weights: now the trained ones
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
        """Labels (B,) or text features (B, text), with 'nothing' where dropped (B,) is true."""
        if text_encoder is None:
            return torch.where(dropped, model.classes, batch["label"].to(device, non_blocking=True))
        with torch.no_grad():  # the mean over the tokens, as in the authors' release
            features = text_encoder.encode([*batch["caption"], ""]).float().mean(1)
        return torch.where(dropped[:, None], features[-1], features[:-1])

    def save(step):
        if rank == 0:
            torch.save(dict(step=step, args=vars(args), config=config, shape=list(shape), rows=rows,
                            identity=stage1["identity"], model=model.state_dict(), optimizer=optimizer.state_dict(),
                            motion_mean=mean.cpu(), motion_std=std.cpu(), ema=ema.state_dict(),
                            text_encoder=text_encoder and text_encoder.state()), f"{path}.tmp")
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
        print(f"motion model: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(dataset)} clips, steps "
              f"{first} to {last}, {path}; {device}, {'bfloat16' if half else 'float32'}{', compiled' * compiled}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="motion", disable=rank > 0)
    for step in bar:
        # Random numbers for the whole batch, of which each rank takes its rows, as in stage 1
        generator.manual_seed(args.seed * 1_000_003 + step)
        t = torch.randint(1000, (args.batch_size,), generator=generator, device=device)[mine]
        eps = torch.randn(args.batch_size, *shape, generator=generator, device=device)[mine]
        dropped = torch.rand(args.batch_size, generator=generator, device=device)[mine] < args.drop
        batch = next(clips)
        content, condition = batch["content"].to(device, non_blocking=True), condition_of(batch, dropped)
        motion = (batch["motion"].to(device, non_blocking=True) - mean) / std

        loss = 0
        for part in parts:
            predict.require_backward_grad_sync = part is parts[-1]  # DDP exchanges gradients once a step
            with autocast:
                error = diffusion.loss(lambda x, t: predict(x, t, content[part], condition[part]),
                                       motion[part], t[part], eps[part])
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
            scores["test_loss"] = preview(args, done, ema, diffusion, condition_of, dataset, mean, std, autocast)
        if due or done % args.log_every == 0:
            average = torch.stack(losses or [loss * math.nan]).mean() / world
            if world > 1:
                dist.all_reduce(average)
            speed = len(losses) * args.batch_size / seconds
            rows.append(dict(step=done, loss=average.item(), skipped=skipped, lr=lr, grad_norm=norm.item(),
                             clips_per_second=speed, **scores))
            bar.set_postfix_str(f"loss {average:.4f}, {speed:.1f} clips/s")
            if rank == 0:
                with open(f"{run_dir}/motion.csv.tmp", "w", newline="") as file:
                    table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
                    table.writeheader()
                    table.writerows(rows)
                os.replace(f"{run_dir}/motion.csv.tmp", f"{run_dir}/motion.csv")
            losses, since = [], time.perf_counter()
        if done == last or stopping or done % args.save_every == 0:
            save(done)
        if stopping:
            bar.close()
            print(f"stopped after step {done}, saved: --resume goes on")
            sys.exit(130)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
