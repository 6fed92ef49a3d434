"""Stage 3, motion diffusion: learns to draw a clip's motion latent from noise, given its content frame and c.

Equation 8 and table 6 of the paper. In: motion latents (B, D, L, H'+W') and content frames (B, C, H, W) that stage 1
encoded, with labels or captions. Out: a diffusion model p(motion | content, c), a DiT that reads the content frame's
patches as further tokens.

    python motion_diffusion.py                                       # on the shapes that autoencoder.py encoded
    python motion_diffusion.py --run runs/ucf101                     # the preset is the run's own
    torchrun --nproc-per-node 8 -- motion_diffusion.py --run runs/webvid_sd21 --text v2-1_512-ema-pruned.safetensors
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -- motion_diffusion.py ...

It needs nothing of stage 2: train both side by side. Where we differ from the authors' release, whose script does not
parse: positions that fit the grid, which is not square; the condition is used; EMA 0.999 as the paper says.
"""

import copy
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from autoencoder import half, load_autoencoder, to_pixels
from content_diffusion import (
    DIT_SIZES,
    Diffusion,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    from_config,
    init_transformer,
    load_text_encoder,
    open_text_encoder,
    shared_flags,
    sincos_positions,
    to_tokens,
)
from data import (
    COUNT,
    EncodedClips,
    InputError,
    Log,
    StopSignal,
    autocast,
    average,
    check_config,
    check_finite,
    last_only,
    learning_rate,
    pair,
    parse_flags,
    run,
    save_checkpoint,
    split_batch,
    start,
    stream,
    write_sheet,
)

# ---------------------------------------------------------------------------------------------------------------------
# The motion model


class MotionDiT(nn.Module):
    """model(motion, t, content, condition) -> (B, D, L, H'+W'), the noise (or v) in the motion latent.

    motion (B, D, L, H'+W') noisy and normalised per channel, t (B,) in 0..999, content (B, C, H, W), condition: labels
    (B,) in 0..classes, of which `classes` means nothing, or with `text` features (B, text), the mean over tokens of the
    text encoder's hidden states.

    motion_channels, frames, columns: D, L and H'+W'; L and the columns may be any number >= 1, the grid is padded to
    whole patches. channels, size: C and (H, W) of the content frame, cut into its own patches of `content_patch` pixels
    (table 4c), else InputError. Defaults: table 6's DiT-XL/2 for Stable Diffusion 2.1's latents of 512x512.
    `checkpointing = True` recomputes activations in the backward pass.
    """

    def __init__(self, motion_channels=8, frames=16, columns=64, channels=4, size=64, patch=2, content_patch=8,
                 width=1152, depth=28, heads=16, classes=1000, text=None):
        super().__init__()
        height, wide = pair(size)
        if height % content_patch or wide % content_patch:
            raise InputError(f"a content frame of {height}x{wide} cannot be cut into patches of {content_patch}: "
                             "choose another --content-patch")
        self.motion_channels, self.frames, self.columns, self.patch = motion_channels, frames, columns, patch
        self.classes, self.text = classes, text
        self.grid = (-(-frames // patch), -(-columns // patch))  # of motion tokens: time by rows, then columns
        self.motion_embedder = nn.Conv2d(motion_channels, width, patch, patch)
        self.content_embedder = nn.Conv2d(channels, width, content_patch, content_patch)
        content_grid = height // content_patch, wide // content_patch
        self.register_buffer("motion_positions", sincos_positions(*self.grid, width)[None], persistent=False)
        self.register_buffer("content_positions", sincos_positions(*content_grid, width)[None], persistent=False)
        self.t_embedder = TimestepEmbedder(width)
        self.c_embedder = nn.Linear(text, width) if text else LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * motion_channels)
        self.checkpointing = False
        init_transformer(self)

    def forward(self, motion, t, content, condition):
        rows, columns = self.grid
        padding = (0, columns * self.patch - self.columns, 0, rows * self.patch - self.frames)
        z = to_tokens(self.motion_embedder(F.pad(motion, padding))) + self.motion_positions  # (B, N, width)
        frame = to_tokens(self.content_embedder(content)) + self.content_positions  # (B, M, width)
        x = torch.cat([z, frame], 1)  # the content frame's tokens after the motion's: (B, N + M, width)
        c = self.t_embedder(t) + self.c_embedder(condition)  # (B, width), by which AdaLN steers every block
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if self.checkpointing and self.training else block(x, c)
        x = self.final_layer(x[:, : z.shape[1]], c)  # the motion's tokens alone: (B, N, patch * patch * D)
        x = rearrange(x, "b (l n) (p q d) -> b d (l p) (n q)", l=rows, p=self.patch, q=self.patch)
        return x[:, :, : self.frames, : self.columns]


# ---------------------------------------------------------------------------------------------------------------------
# Presets and flags

PAPER = dict(  # table 6
    patch=2, predict="eps", schedule="linear", lr=1e-4, batch_size=256, decay_steps=0, ema=0.999, drop=0.1,
    save_every=2000, preview_every=2000, log_every=50, workers=8,
)
PRESETS = {
    # Against the paper: what stage 2 changes, for the same reasons.
    "shapes": dict(
        model="mini", patch=2, content_patch=8, predict="x", schedule="linear", lr=2e-3, batch_size=16, steps=2000,
        decay_steps=2000, ema=0.995, drop=0.1, save_every=500, preview_every=1000, log_every=50, workers=0,
    ),
    # 3,000 epochs of 9,537 clips, and 3 epochs of 10.7 M.
    "ucf101": dict(PAPER, model="L", content_patch=4, steps=111_762),
    "webvid_sd15": dict(PAPER, model="XL", content_patch=4, steps=125_391),
    "webvid_sd21": dict(PAPER, model="XL", content_patch=8, steps=125_391),
}


def flags():
    parser, model = shared_flags(__doc__, PRESETS, "model (table 6)")
    model.add_argument("--model", choices=DIT_SIZES, help="DiT's size")
    model.add_argument("--patch", type=COUNT, help="DiT's patch on the motion latent")
    model.add_argument("--content-patch", type=COUNT, help="its patch on the content frame (table 4c)")
    model.add_argument("--text", help="condition on captions: raw file with a text encoder, full Stable Diffusion or "
                       "OpenCLIP ViT-H (table 6)")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_motion_model(state):
    """The motion model of a checkpoint dict, with its EMA weights: (MotionDiT, TextEncoder or None)."""
    model = from_config(MotionDiT, state["config"])
    model.load_state_dict(state["ema"])
    return model, state["text_encoder"] and open_text_encoder(**state["text_encoder"])


def text_features(text_encoder, captions):
    """Captions -> (B, width): the mean over all 77 tokens of the text encoder's hidden states, as in the release."""
    with torch.no_grad():
        return text_encoder.encode(captions).float().mean(1)


@torch.no_grad()
def preview(args, ema, diffusion, condition_of, dataset, step, device):
    """Draws motions for 8 stored content frames (4 of latents) by 25 DDIM steps, unguided, into the run folder."""
    from sample import ddim  # sample.py imports this file

    autoencoder, image, _ = load_autoencoder(args.run, device)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(min(4 if image else 8, len(dataset)))])
    content = batch["content"].to(device)
    condition = condition_of(batch, torch.zeros(len(content), dtype=torch.bool, device=device))
    noise = torch.randn(len(content), *dataset.motion_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(args, device):
        motion = ddim(lambda x, t: ema(x, t, content, condition), noise, diffusion, steps=25)
    videos = to_pixels(autoencoder.decode(content, autoencoder.denormalise(motion).clamp(-1, 1)), image)
    write_sheet(os.path.join(args.run, "previews", f"motion-{step:06d}.png"), list(videos.cpu()), columns=1)


def main():
    args, saved = parse_flags(flags(), PRESETS, "motion")
    rank, world, device = start(args.seed)
    share, parts = split_batch(args, world)
    path = os.path.join(args.run, "motion.pt")

    # Data: motion latents and content frames, with their labels or captions. The latents are normalised by the mean and
    # deviation that stage 1 measured.
    dataset = EncodedClips(args.run, args.data)
    shape = dataset.motion_shape  # (D, L, H'+W')
    motion_mean, motion_std = dataset.motion_mean.to(device), dataset.motion_std.to(device)

    # Model
    config = dict(model=args.model, motion_channels=shape[0], frames=shape[1], columns=shape[2],
                  channels=dataset.content_shape[0], size=list(dataset.content_shape[1:]), patch=args.patch,
                  content_patch=args.content_patch, classes=max(1, len(dataset.classes)), **DIT_SIZES[args.model])
    if saved:
        check_config(config, saved, path, dataset.index["fingerprint"])
        config = saved["config"]
        model, text_encoder = build_motion_model(saved)
    else:
        text_encoder = load_text_encoder(args.text) if args.text else None
        if args.preset.startswith("webvid") and not args.text:
            raise InputError(f"--preset {args.preset} needs --text: a raw file with the captions' text encoder")
        config["text"] = text_encoder and text_encoder.width
        model = from_config(MotionDiT, config)
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.checkpointing = args.checkpointing
    if text_encoder:
        text_encoder.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    weights, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(weights, lr=args.lr, fused=True)
    first, loss_sum, bad_row, skipped = 0, *torch.zeros(3, device=device)  # skipped steps: in a row, and in all
    if saved:  # the model above has the averages
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, (loss_sum, bad_row, skipped) = saved["step"], saved["counts"].to(device)
    diffusion = Diffusion(args.schedule, args.predict).to(device)
    predict = torch.compile(model) if args.compile else model
    if world > 1:
        predict = DistributedDataParallel(predict, gradient_as_bucket_view=True)

    def condition_of(batch, dropped):
        """Labels (B,) or text features (B, width), with 'nothing' where dropped (B,) is true."""
        if text_encoder is None:
            return torch.where(dropped, model.classes, batch["label"].to(device, non_blocking=True))
        features = text_features(text_encoder, [*batch["caption"], ""])
        return torch.where(dropped[:, None], features[-1], features[:-1])

    def save(step):
        save_checkpoint(path, dict(
            stage="motion", step=step, args=vars(args), config=config, classes=dataset.classes, shape=list(shape),
            fingerprint=dataset.index["fingerprint"], model=model.state_dict(), ema=ema.state_dict(),
            optimizer=optimizer.state_dict(), counts=torch.stack([loss_sum, bad_row, skipped]),
            text_encoder=text_encoder and dict(config=text_encoder.config, weights=half(text_encoder))))

    batches = stream(dataset, args.batch_size, args.seed, first, args.workers, rank, world)
    mine = slice(rank * share, (rank + 1) * share)  # this rank's rows of the whole batch
    os.makedirs(os.path.join(args.run, "previews"), exist_ok=True)
    log = rank == 0 and Log(os.path.join(args.run, "motion.csv"),
                            "step loss lr grad_norm skipped clips_per_second".split(), first, (args.log_every,))
    stop, generator, last = StopSignal(), torch.Generator(device), max(first, args.steps)
    if rank == 0:
        print(f"motion model: {sum(p.numel() for p in weights) / 1e6:.1f} M parameters, {len(dataset)} clips, "
              f"steps {first} to {last}, {path}")
    bar = tqdm(range(first, last), initial=first, total=last, desc="motion", disable=rank > 0)
    since, clock = first, time.perf_counter()
    for step in bar:
        # The draws of step s are a function of (seed, s), made for the whole batch, of which each rank takes its rows:
        # so a resumed run, or one on more ranks, sees the same noise. Seeds are about a million steps apart.
        batch = next(batches)
        content = batch["content"].to(device, non_blocking=True)
        motion = (batch["motion"].to(device, non_blocking=True) - motion_mean) / motion_std
        generator.manual_seed(args.seed * 1_000_003 + step)
        t = torch.randint(1000, (args.batch_size,), generator=generator, device=device)[mine]
        noise = torch.randn(args.batch_size, *shape, generator=generator, device=device)[mine]
        dropped = torch.rand(args.batch_size, generator=generator, device=device)[mine] < args.drop
        condition = condition_of(batch, dropped)

        optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step)
        for part in parts:
            with last_only(predict, part, parts):
                with autocast(args, device):
                    loss = diffusion.loss(lambda x, t: predict(x, t, content[part], condition[part]),
                                          motion[part], t[part], noise[part])
                (loss / len(parts)).backward()
            loss_sum += loss.detach().nan_to_num(0, 0, 0) / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
        bad = ~norm.isfinite()  # NaN or infinite somewhere: fused Adam skips the step where found_inf is 1,
        optimizer.found_inf = bad.float()  # so that the device need not be asked
        optimizer.step()
        optimizer.zero_grad()
        bad_row, skipped = (bad_row + 1) * bad, skipped + bad
        decay = min(args.ema, (1 + step) / (10 + step))  # short at first, so that the random start is soon forgotten
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)

        # The rest is logging, pictures, saving.
        done, stopping = step + 1, bool(stop)
        saving = done % args.save_every == 0 or done == last or stopping
        logging = done % args.log_every == 0 or done == last
        if saving or logging:
            loss_sum = average(loss_sum)
        if logging:
            row = dict(step=done, lr=lr, grad_norm=norm.item(), skipped=int(skipped),
                       loss=loss_sum.item() / (done % args.log_every or args.log_every),
                       clips_per_second=(done - since) * args.batch_size / (time.perf_counter() - clock))
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['clips_per_second']:.1f} clips/s")
            check_finite(bad_row, done, path)
            if rank == 0:
                log(**row)
        if done % args.log_every == 0:
            loss_sum = torch.zeros_like(loss_sum)
            since, clock = done, time.perf_counter()
        if rank == 0 and saving:
            save(done)
        if rank == 0 and (done % args.preview_every == 0 or done == last):
            preview(args, ema, diffusion, condition_of, dataset, done, device)
        if stopping:
            bar.close()
            if rank == 0:
                print(f"stopped after step {done}, saved: --resume goes on")
            return


if __name__ == "__main__":
    run(main)
