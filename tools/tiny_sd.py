"""Trains a tiny Stable Diffusion on captioned still pictures and writes it as the raw files of 1.5 are laid out.

    python tools/tiny_sd.py                                          # tools/tiny-sd.safetensors, 15 MB

The pictures are 32x32: the circles, squares and triangles of data.py in all their colours, and what no video has, a
star and the colour pink. First the image autoencoder learns them (latents of 4x8x8), then the U-Net and CLIP's text
encoder together, from noise and captions such as "a red circle", in the end also "a red circle moving left" for the
start of its way. The tokenizer and its table of 49,408 tokens are
CLIP's own; what is small are widths and depths, which the scripts read from the file as they do with the large ones.

It goes on where it was stopped, from --folder. The file's metadata says what made it and how long that took.
"""

import copy
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from autoencoder import ImageAutoencoder, psnr
from content_diffusion import Diffusion, TextEncoder, UNet, ddim, guided

SIZE = (32, 32)
SHAPES = (*data.SHAPES, "star")
COLOURS = data.COLOURS | {"pink": (0.92, 0.52, 0.66)}
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
IMAGE = dict(channels=32, multipliers=(1, 2, 2), blocks=1)  # 0.95 M parameters
UNET = dict(width=48, context=64, heads=8, multipliers=(1, 2, 2), blocks=1)  # 3.3 M
TEXT = dict(width=64, layers=2, heads=1)  # 3.3 M, nearly all of it the table


def stills(start, count, seed=0, motions=False):
    """(pictures (count, 3, 32, 32) in [-1, 1], captions), each picture's from its own random numbers. motions: half of
    the captions also say where the shape is moving, which the picture shows in part: it is the start of its way."""
    pictures, captions = [], []
    for i in range(start, start + count):
        rng = np.random.default_rng([seed, i])
        colour, shape = PAIRS[rng.integers(len(PAIRS))]
        move = list(data.MOVES)[rng.integers(len(data.MOVES))]
        pictures.append(data.draw_clip(rng, shape, COLOURS[colour], move, 1, SIZE)[:, 0])
        captions.append(data.caption_of(colour, shape, move if motions and rng.random() < 0.5 else None))
    return torch.stack(pictures), captions


def train(name, args, modules, steps, rate, loss_of):
    """Trains modules for `steps` with Adam, whose rate rises and falls once, from the folder's checkpoint if there is
    one. loss_of(step) -> a number. Returns (their averaged weights, as modules like them; seconds)."""
    path, first, seconds = f"{args.folder}/{name}.pt", 0, 0.0
    weights = list(modules.parameters())
    averaged = copy.deepcopy(modules).requires_grad_(False)
    averages = list(averaged.parameters())
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    if os.path.exists(path):
        state = torch.load(path, weights_only=True)
        first, seconds = state["step"], state["seconds"]
        for part in ("modules", "averaged", "optimizer", "schedule"):
            locals()[part].load_state_dict(state[part])
    bar, mean, clock = tqdm(range(first, steps), initial=first, total=steps, desc=name), None, time.perf_counter()
    for step in bar:
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(0.998, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            tqdm.write(f"{name} {step + 1}: loss {mean:.4f}")
            data.save_checkpoint(path, dict(
                step=step + 1, seconds=seconds + time.perf_counter() - clock, modules=modules.state_dict(),
                averaged=averaged.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict()))
    return averaged.eval(), seconds + time.perf_counter() - clock


def train_image(args):
    """(ImageAutoencoder whose scaled latents have mean 0 and deviation 1 in each channel, seconds)"""
    model = ImageAutoencoder(**IMAGE)
    with torch.no_grad():
        model.quant_conv.bias[4:] = -6  # log variances: with much noise at first it would not learn

    def loss_of(step):
        images, _ = stills(step * args.batch_size, args.batch_size, args.seed)
        with torch.autocast("cpu", torch.bfloat16):
            moments = model.quant_conv(model.encoder(images))
        mean, log_variance = moments.float().chunk(2, 1)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decoder(model.post_quant_conv(latents))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        return F.l1_loss(output, images) + 1e-5 * kl

    model, seconds = train("image", args, model, args.image_steps, 1.5e-3, loss_of)
    images, _ = stills(0, 1024, args.seed + 1)
    with torch.no_grad():
        # The scale is fixed at 0.18215, so the last layer of the encoder and the first of the decoder do the rest.
        latents = model.encode(images, chunk=64) / model.scale
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        factor = 1 / (model.scale * deviation)
        model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
        model.post_quant_conv.weight /= factor[None, :, None, None]
        model.quant_conv.bias[:4] = factor * (model.quant_conv.bias[:4] - mean)
        model.quant_conv.weight[:4] *= factor[:, None, None, None]
        model.quant_conv.bias[4:] += 2 * factor.log()
        again = model.decode(model.encode(images, chunk=64), chunk=64)
    print(f"image autoencoder: PSNR {psnr(again.clamp(-1, 1), images):.1f} dB on 1,024 other pictures")
    return model, seconds


def train_diffusion(args, image, name, modules, steps, rate, motions):
    """Trains the U-Net and the text encoder together. (the two, averaged, as a ModuleList; seconds)

    motions: with captions that also name motions, and so that captions of different motions are told apart by the mean
    of the text encoder's output over its 77 places, which is what the motion model reads: pulled apart to a distance of
    4, about that of two colours. CLIP's text encoder learnt to tell captions apart; the U-Net alone does not ask it."""
    pool, diffusion, (unet, text) = 16_384, Diffusion("scaled_linear", "eps"), modules
    images, captions = stills(0, pool, args.seed, motions)
    endings = ["", *(f" moving {move}" for move in data.MOVES)]
    others = ~torch.eye(len(endings), dtype=torch.bool)
    with torch.no_grad():
        latents = torch.cat([image.encode(part, chunk=64) for part in images.split(1024)])

    def loss_of(step):
        chosen = torch.randint(pool, (args.batch_size,)).tolist()
        told = [captions[i] if torch.rand(1) > 0.1 else "" for i in chosen]
        x, context = latents[chosen], text.encode(told)
        t, eps = torch.randint(1000, (len(x),)), torch.randn_like(x)
        loss = diffusion.loss(lambda x, t: unet(x, t, context), x, t, eps)
        if motions:
            means = text.encode([captions[i].split(" moving")[0] + end for i in chosen[:5] for end in endings]).mean(1)
            means = means.unflatten(0, (5, len(endings)))
            loss = loss + 0.1 * F.relu(4 - torch.cdist(means, means)[:, others]).mean()
        return loss

    return train(name, args, modules.train().requires_grad_(True), steps, rate, loss_of)


@torch.no_grad()
def draw(image, unet, text, captions, steps=50, guidance=3.0, seed=0):
    """Pictures (N, 3, 32, 32) in [-1, 1] of captions, from the tiny model alone."""
    context, nothing = text.encode(captions), text.encode([""]).expand(len(captions), -1, -1)
    generator, size = torch.Generator().manual_seed(seed), [n // image.factor for n in SIZE]
    noise = torch.randn(len(captions), 4, *size, generator=generator)
    denoise = guided(unet, context, nothing, guidance)
    return image.decode(ddim(denoise, noise, Diffusion("scaled_linear"), steps)).clamp(-1, 1)


def raw_file(image, unet, text):
    """{name: tensor in half precision}, named as in the raw file of Stable Diffusion 1.5."""
    parts = {"first_stage_model.": image, "model.diffusion_model.": unet,
             "cond_stage_model.transformer.text_model.": text}
    return {prefix + name: tensor.half().contiguous()
            for prefix, part in parts.items() for name, tensor in part.state_dict().items()}


def main():
    parser = data.Flags(__doc__)
    add = parser.add_argument
    add("--out", default=data.TINY_SD, help="the file to write")
    add("--folder", default="runs/tiny_sd", help="for checkpoints, and a picture of what the model draws")
    add("--image-steps", type="count", default=2500, help="of the image autoencoder")
    add("--steps", type="count", default=2800, help="of the U-Net and the text encoder")
    add("--motion-steps", type="count", default=400, help="of the two with captions that also name a motion")
    add("--batch-size", type="count", default=32, help="pictures a step")
    add("--seed", type="whole", default=0, help="random seed")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    data.start(args)
    image, image_seconds = train_image(args)
    modules = torch.nn.ModuleList([UNet(**UNET), TextEncoder(**TEXT)])
    modules, more = train_diffusion(args, image, "diffusion", modules, args.steps, 1e-3, False)
    (unet, text), last = train_diffusion(args, image, "motions", modules, args.motion_steps, 5e-4, True)
    made = (f"python tools/{os.path.basename(__file__)} --image-steps {args.image_steps} --steps {args.steps} "
            f"--motion-steps {args.motion_steps} --batch-size {args.batch_size} --seed {args.seed}")
    with data.atomic_write(args.out) as temporary:
        save_file(raw_file(image, unet, text), temporary, dict(
            made_by=made, minutes=f"{(image_seconds + more + last) / 60:.0f} on {torch.get_num_threads()} core(s)"))
    captions = [data.caption_of(*pair) for pair in PAIRS]
    pictures = draw(image, unet, text, captions)
    data.write_sheet(f"{args.folder}/pictures.png", list(pictures[:, :, None]), len(SHAPES), captions)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB, look at {args.folder}/pictures.png")


if __name__ == "__main__":
    data.launch(main)
