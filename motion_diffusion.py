"""Stage 3, motion diffusion: learns to generate motion latents from noise, given a content frame and a class or text.

Equation 8 and table 6 of the paper. In: motion latents (B, D, L, H'+W') and content frames (B, C, H, W) that stage 1
encoded, with labels or captions. Out: a diffusion model p(motion | content, c): a DiT that reads the content frame's
patches as further tokens.

    python motion_diffusion.py                                       # on the shapes that autoencoder.py encoded
    python motion_diffusion.py --run-dir runs/ucf101                 # with that folder's preset
    torchrun --nproc-per-node 8 motion_diffusion.py --run-dir runs/webvid_sd21 --text v2-1_512-ema-pruned.safetensors
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 motion_diffusion.py ...

It needs nothing from stage 2: train both side by side. The authors' script for this stage has a syntax error. Where we
differ from it: positions fit the grid, which is not square; the class or text is used; EMA 0.999, as the paper says.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from autoencoder import LayerNorm, load_autoencoder, to_pixels
from content_diffusion import Diffusion, ddim, load_text_encoder, open_text_encoder
from data import InputError

# ---- The motion model. Its blocks are DiT's of stage 2, written out again: the whole model is in one place -----------

def sincos_positions(rows, columns, width):
    """(rows * columns, width): fixed 2-D sine-cosine positions; the first half of the width tells the column."""

    def of(position):
        angle = position[:, None] / 10000 ** (torch.arange(width // 4) / (width // 4))
        return torch.cat([angle.sin(), angle.cos()], 1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([of(column.flatten()), of(row.flatten())], 1)


def timestep_embedding(t):
    """t (B,) in 0..999 -> (B, 256): cosines, then sines, at frequencies from 1 down to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None].float() * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1)


class Block(nn.Module):
    """A transformer block that the condition c shifts, scales and gates (AdaLN): x (B, N, width), c (B, width) -> x's
    shape. The gates start at 0, so that it is the identity at first."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=2)  # (B, 1, width) each
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        x = x + gate1 * self.proj(h)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


SIZES = {  # DiT's (Peebles & Xie, table 1); "mini" is ours, for the shapes preset
    "XL": dict(width=1152, depth=28, heads=16),
    "L": dict(width=1024, depth=24, heads=16),
    "B": dict(width=768, depth=12, heads=12),
    "S": dict(width=384, depth=12, heads=6),
    "mini": dict(width=128, depth=4, heads=4),
}


class MotionDiT(nn.Module):
    """model(motion, t, content, condition) -> (B, D, L, H'+W'), the noise in the motion latent, or what --predict says.

    motion (B, D, L, H'+W') noisy and normalised per channel: a picture of L rows (time) and H'+W' columns, first one
    for each row of patches, then one for each column. t (B,) in 0..999, content (B, C, H, W), condition: labels (B,) in
    0..classes, of which the last stands for "no class", or with `text` features (B, text), the mean over tokens of the
    text encoder's hidden states.

    motion_channels, frames, columns: D, L and H'+W'; L and the columns may be any number >= 1, the grid is padded to
    whole patches. channels, size: C and (H, W) of the content frame, which is cut into its own patches of
    `content_patch` values (table 4c). Defaults: table 6's DiT-XL/2 for Stable Diffusion 2.1's latents of 512x512.
    `checkpointing = True` recomputes activations in the backward pass.
    """

    def __init__(self, motion_channels=8, frames=16, columns=64, channels=4, size=64, patch=2, content_patch=8,
                 width=1152, depth=28, heads=16, classes=1000, text=None):
        super().__init__()
        height, wide = (size, size) if isinstance(size, int) else size
        if height % content_patch or wide % content_patch:
            raise InputError(f"a content frame of {height}x{wide} cannot be cut into patches of {content_patch}: "
                             "choose another --content-patch")
        self.motion_channels, self.frames, self.columns, self.patch = motion_channels, frames, columns, patch
        self.classes, self.text, self.checkpointing = classes, text, False
        self.grid = (-(-frames // patch), -(-columns // patch))  # of motion tokens: time, then rows and columns
        self.motion_embedder = nn.Conv2d(motion_channels, width, patch, patch)
        self.content_embedder = nn.Conv2d(channels, width, content_patch, content_patch)
        content_grid = height // content_patch, wide // content_patch
        self.register_buffer("motion_positions", sincos_positions(*self.grid, width)[None], persistent=False)
        self.register_buffer("content_positions", sincos_positions(*content_grid, width)[None], persistent=False)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.c_embedder = nn.Linear(text, width) if text else nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(width, patch * patch * motion_channels)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        # DiT's initialisation. Zero gates and a zero last layer: at first the output is zero.
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
        # The content frame's tokens after the motion's, which their embedder alone tells apart: (B, N + M, width)
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
    patch=2, predict="eps", schedule="linear", lr=1e-4, batch_size=256, decay_steps=0, ema=0.999, drop=0.1,
    save_every=2000, preview_every=2000, log_every=50, workers=8,
)
PRESETS = {
    # What differs from the paper is what differs in stage 2, for the same reasons.
    "shapes": dict(
        model="mini", patch=2, content_patch=8, predict="x", schedule="linear", lr=2e-3, batch_size=16, steps=2000,
        decay_steps=2000, ema=0.995, drop=0.1, save_every=500, preview_every=1000, log_every=50, workers=0,
    ),
    "shapes_text": dict(
        text=data.TINY_SD, model="mini", patch=2, content_patch=2, predict="x", schedule="linear",
        lr=2e-3, batch_size=16, steps=2000, decay_steps=2000, ema=0.995, drop=0.1, save_every=500, preview_every=1000,
        log_every=50, workers=0,
    ),
    # 3,000 epochs of 9,537 videos, and 3 epochs of 10.7 M.
    "ucf101": dict(PAPER, model="L", content_patch=4, steps=111_762),
    "webvid_sd15": dict(PAPER, model="XL", content_patch=4, steps=125_391),
    "webvid_sd21": dict(PAPER, model="XL", content_patch=8, steps=125_391),
}


def flags():
    parser = data.Flags(__doc__)
    add = parser.add_run(PRESETS)
    add("--data", help="the data set that was encoded; only checked against the encodings")
    add = parser.add_argument_group("model (table 6)").add_argument
    add("--model", choices=SIZES, help="DiT's size")
    add("--patch", type="count", help="DiT's patch on the motion latent")
    add("--content-patch", type="count", help="its patch on the content frame (table 4c)")
    add("--text", help="condition on captions: raw file with a text encoder, full Stable Diffusion or OpenCLIP ViT-H")
    add = parser.add_argument_group("diffusion").add_argument
    add("--predict", choices=["eps", "v", "x"], help="what the model predicts: the noise, v or the clean latent")
    add("--schedule", choices=["linear", "scaled_linear"], help="betas: DiT's, or Stable Diffusion's")
    add("--drop", type="share", help="how often the label or prompt is dropped, for guidance")
    add("--ema", type="share", help="decay of the weights' moving average")
    parser.add_training()
    return parser


# ---- Training -------------------------------------------------------------------------------------------------------

def load_motion(run_dir, state=None):
    """(MotionDiT with its EMA weights, TextEncoder or None, Diffusion, checkpoint) of a run folder, on the CPU.
    state: the checkpoint, where it has been read."""
    state = state or data.load_checkpoint(f"{run_dir}/motion.pt", "motion")
    model = MotionDiT(**{name: value for name, value in state["config"].items() if name != "model"})
    model.load_state_dict(state["ema"])
    text_encoder = state["text_encoder"] and open_text_encoder(**state["text_encoder"])
    return model, text_encoder, Diffusion(state["args"]["schedule"], state["args"]["predict"]), state


def new_model(args, dataset):
    """(config, MotionDiT, TextEncoder or None) to train, by the flags and the encodings."""
    if args.preset.startswith("webvid") and not args.text:
        raise InputError(f"--preset {args.preset} needs --text: a raw file with the captions' text encoder")
    text_encoder = load_text_encoder(args.text) if args.text else None
    D, L, columns = dataset.motion_shape
    C, *size = dataset.content_shape
    config = dict(motion_channels=D, frames=L, columns=columns, channels=C, size=size, patch=args.patch,
                  content_patch=args.content_patch, classes=max(1, len(dataset.classes)),
                  text=text_encoder and text_encoder.width, **SIZES[args.model])
    return dict(config, model=args.model), MotionDiT(**config), text_encoder


@torch.no_grad()
def preview(args, step, ema, diffusion, condition_of, dataset, device, autocast):
    """Writes a picture of 8 clips (4 where frames are latents): stored content frames, motion by 25 DDIM steps. Returns
    the loss on test clips, by which one sees when to stop."""
    autoencoder, image, _ = load_autoencoder(args.run_dir, device)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(min(4 if image else 8, len(dataset)))])
    content = batch["content"].to(device)
    condition = condition_of(batch, torch.zeros(len(content), dtype=torch.bool, device=device))
    noise = torch.randn(len(content), *dataset.motion_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast:
        motion = ddim(lambda x, t: ema(x, t, content, condition), noise, diffusion, steps=25)
    videos = to_pixels(autoencoder.decode(content, autoencoder.denormalise(motion).clamp(-1, 1)), image)
    data.write_sheet(f"{args.run_dir}/previews/motion-{step:06d}.png", list(videos.cpu()), 1, batch["caption"])
    test = dataset.test_clips()
    condition = condition_of(test, torch.zeros(len(test["label"]), dtype=torch.bool, device=device))
    motion = autoencoder.normalise(test["motion"].to(device))
    with autocast:
        return dict(test_loss=diffusion.test_loss(ema, motion, test["content"].to(device), condition))


def main():
    args, saved = flags().parse(PRESETS, "motion")
    rank, world, device, dtype = data.start(args, args.run_dir, saved)
    autocast = torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16)
    path = f"{args.run_dir}/motion.pt"

    # Data: motion latents and content frames, with their labels or captions; the mean and deviation of the latents
    dataset = data.EncodedClips(args.run_dir, args.data, saved)
    shape, first = dataset.motion_shape, saved["step"] if saved else 0  # (D, L, H'+W')
    motion_mean, motion_std = dataset.motion_mean.to(device), dataset.motion_std.to(device)

    # Model
    if saved:
        model, text_encoder, _, _ = load_motion(args.run_dir, saved)
        config = saved["config"]
    else:
        config, model, text_encoder = new_model(args, dataset)
    ema = copy.deepcopy(model.to(device)).eval().requires_grad_(False)
    model.checkpointing = args.checkpointing
    if text_encoder:
        text_encoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    weights, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=True)
    if saved:  # load_motion loaded the averaged weights: now the trained ones
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    diffusion = Diffusion(args.schedule, args.predict).to(device)
    compiled = data.compile_modules(args, args.preset, device, model)
    predict = DDP(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else model

    def condition_of(batch, dropped):
        """Labels (B,) or text features (B, width), with 'nothing' where dropped (B,) is true."""
        if text_encoder is None:
            return torch.where(dropped, model.classes, batch["label"].to(device, non_blocking=True))
        with torch.no_grad():  # the mean over the tokens, as in the authors' release
            features = text_encoder.encode([*batch["caption"], ""]).float().mean(1)
        return torch.where(dropped[:, None], features[-1], features[:-1])

    def save(step):
        data.save_checkpoint(path, dict(
            stage="motion", step=step, args=vars(args), config=config, classes=dataset.classes, shape=list(shape),
            fingerprint=dataset.fingerprint, model=model.state_dict(), ema=ema.state_dict(),
            text_encoder=text_encoder and text_encoder.state(), optimizer=optimizer.state_dict(),
            progress=progress.state()))

    clips = data.batches(dataset, range(len(dataset)), args.batch_size, args.seed, first, args.workers)
    share = args.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)  # this rank's rows of the whole batch
    parts = torch.arange(share, device=device).chunk(args.accumulate)  # rows that pass through the model together
    progress = data.Progress(args, "motion", first, device, saved and saved["progress"])
    generator, last = torch.Generator(device), max(first, args.steps)
    if rank == 0:
        print(f"motion model: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(dataset)} clips, "
              f"steps {first} to {last}, {path}; {device}, {dtype}, {compiled}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="motion", disable=rank > 0)
    for step in bar:
        # The random numbers of step s depend on (seed, s) alone and are made for the whole batch, of which each rank
        # takes its rows: they are the same after a resume or with another number of ranks.
        generator.manual_seed(args.seed * 1_000_003 + step)
        t = torch.randint(1000, (args.batch_size,), generator=generator, device=device)[mine]
        eps = torch.randn(args.batch_size, *shape, generator=generator, device=device)[mine]
        dropped = torch.rand(args.batch_size, generator=generator, device=device)[mine] < args.drop
        batch = next(clips)
        content, condition = batch["content"].to(device, non_blocking=True), condition_of(batch, dropped)
        motion = (batch["motion"].to(device, non_blocking=True) - motion_mean) / motion_std

        loss = 0
        for part in parts:
            predict.require_backward_grad_sync = part is parts[-1]  # ranks exchange gradients once a step
            with autocast:
                error = diffusion.loss(lambda x, t: predict(x, t, content[part], condition[part]),
                                       motion[part], t[part], eps[part])
            (error / len(parts)).backward()
            loss += error.detach() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
        lr = args.lr
        if args.decay_steps:  # a short rise, then a cosine fall to a hundredth
            fall = 0.5 + 0.5 * math.cos(math.pi * min(1, step / args.decay_steps))
            lr = lr * min(1, (step + 1) / (0.05 * args.decay_steps)) * max(0.01, fall)
        optimizer.param_groups[0]["lr"] = lr
        if finite := norm.isfinite().item():  # else the step is skipped
            optimizer.step()
            decay = min(args.ema, (1 + step) / (10 + step))  # low at first: forgets the initial weights
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
        optimizer.zero_grad()

        # The rest is logging, pictures and saving.
        progress.add(loss, finite)
        done, stopping = step + 1, progress.stopping()
        due = (done % args.preview_every == 0 or done == last) and not stopping
        scores = {} if rank or not due else preview(args, done, ema, diffusion, condition_of, dataset, device, autocast)
        if due or done % args.log_every == 0:
            progress.write(bar, done, lr=lr, grad_norm=norm.item(), **scores)
        if done % args.save_every == 0 or done == last or stopping:
            save(done)
        if stopping:
            bar.close()
            raise KeyboardInterrupt(f"stopped after step {done}, saved: --resume goes on")


if __name__ == "__main__":
    data.launch(main)
