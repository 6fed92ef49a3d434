"""Trains a tiny Stable Diffusion on captioned still pictures and writes it as the raw files of 1.5 are laid out.

    python tools/tiny_sd.py                      # runs/tiny_sd/tiny-sd.safetensors, 15 MB, of which tools/ has a copy

The pictures are 32x32: the circles, squares and triangles of data.py in all their colours, and what no video has, a
star and the colour pink. First the image autoencoder learns them (latents of 4x8x8), then the U-Net and CLIP's text
encoder together, from captions such as "a red circle", in the end also "a red circle moving left" for the start of its
way. The tokenizer's 49,408 tokens are CLIP's own. It takes an hour, and goes on where it was stopped, from --folder.
"""

import argparse
import copy
import os
import sys

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


def star(x, y, reach):
    """From pixels at (x, y) to the edge of a star with five points, one of them up. Its area is a fifth less than that
    of the other shapes: with the same it would leave the frame."""
    turn = np.pi / 5
    around = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)  # angle from the nearest point
    tip, dent = 1.1 * reach, 0.5 * reach * np.exp(1j * turn)
    along = (dent - tip) / np.abs(dent - tip)  # the edge from a point to the dent beside it
    return ((np.hypot(x, y) * np.exp(1j * around) - tip) / along).imag * -1


data.DISTANCE["star"] = star


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
    one. loss_of(step) -> a number. Returns modules like them, with their averaged weights."""
    path = f"{args.folder}/{name}-{steps}-{args.batch_size}-{args.seed}.pt"
    averaged, weights = copy.deepcopy(modules).requires_grad_(False), list(modules.parameters())
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    parts = dict(modules=modules, averaged=averaged, optimizer=optimizer, schedule=schedule)
    state = torch.load(path, weights_only=True) if os.path.exists(path) else dict(step=0)
    for part in parts.keys() & state.keys():
        parts[part].load_state_dict(state[part])
    for step in tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc=name):
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), weights, 1 - min(0.998, (1 + step) / (10 + step)))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            tqdm.write(f"{name} {step + 1}: loss {loss:.4f}")
            torch.save(dict(step=step + 1) | {part: parts[part].state_dict() for part in parts}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    return averaged.eval()


def train_image(args):
    """An ImageAutoencoder whose scaled latents have mean 0 and deviation 1 in each channel."""
    model = ImageAutoencoder(**IMAGE)
    model.quant_conv.bias.data[4:] = -6  # log variances: with much noise at first it would not learn

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

    model = train("image", args, model, args.image_steps, 1.5e-3, loss_of)
    images, _ = stills(0, 1024, args.seed + 1)
    with torch.no_grad():
        # The scale is fixed at 0.18215, so the last layer of the encoder and the first of the decoder do the rest.
        latents = model.encode(images, chunk=64) / model.scale
        mean, factor = latents.mean((0, 2, 3)), 1 / (model.scale * latents.std((0, 2, 3)))
        model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
        model.post_quant_conv.weight /= factor[None, :, None, None]
        model.quant_conv.bias[:4] = factor * (model.quant_conv.bias[:4] - mean)
        model.quant_conv.weight[:4] *= factor[:, None, None, None]
        model.quant_conv.bias[4:] += 2 * factor.log()
        again = model.decode(model.encode(images, chunk=64), chunk=64)
    print(f"image autoencoder: PSNR {psnr(again.clamp(-1, 1), images):.1f} dB on 1,024 other pictures")
    return model


def train_diffusion(args, image, name, modules, steps, rate, motions):
    """Trains the U-Net and the text encoder together: a ModuleList of the two, averaged.
    motions: with captions that also name motions. What the motion model reads, the mean over their 77 tokens, is pulled
    apart to a distance of 4, about that of two colours: CLIP's learnt that, but the U-Net alone does not ask for it."""
    pool, diffusion, (unet, text) = 16_384, Diffusion("scaled_linear", "eps"), modules
    images, captions = stills(0, pool, args.seed, motions)
    endings = ["", *(f" moving {move}" for move in data.MOVES)]
    others = ~torch.eye(len(endings), dtype=torch.bool)
    with torch.no_grad():
        latents = torch.cat([image.encode(part, chunk=64) for part in images.split(1024)])

    def loss_of(step):
        chosen = torch.randint(pool, (args.batch_size,)).tolist()
        x, context = latents[chosen], text.encode([captions[i] if torch.rand(1) > 0.1 else "" for i in chosen])
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
    size = [n // image.factor for n in SIZE]
    noise = torch.randn(len(captions), 4, *size, generator=torch.Generator().manual_seed(seed))
    denoise = guided(unet, context, nothing, guidance)
    return image.decode(ddim(denoise, noise, Diffusion("scaled_linear"), steps)).clamp(-1, 1)


def raw_file(image, unet, text):
    """{name: tensor in half precision}, named as in the raw file of Stable Diffusion 1.5."""
    names = "first_stage_model.", "model.diffusion_model.", "cond_stage_model.transformer.text_model."
    return {prefix + name: tensor.half().contiguous() for prefix, part in zip(names, (image, unet, text))
            for name, tensor in part.state_dict().items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--folder", default="runs/tiny_sd", help="for the file, a picture of what it draws, and checkpoints")
    add("--image-steps", type=int, default=2500, help="of the image autoencoder")
    add("--steps", type=int, default=2800, help="of the U-Net and the text encoder")
    add("--motion-steps", type=int, default=400, help="of the two with captions that also name a motion")
    add("--batch-size", type=int, default=32, help="pictures a step")
    add("--seed", type=int, default=0, help="of the weights, the pictures and the noise")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    torch.manual_seed(args.seed)
    image = train_image(args)
    modules = torch.nn.ModuleList([UNet(**UNET), TextEncoder(**TEXT)])
    modules = train_diffusion(args, image, "diffusion", modules, args.steps, 1e-3, False)
    unet, text = train_diffusion(args, image, "motions", modules, args.motion_steps, 5e-4, True)
    made_by, out = " ".join(["python tools/tiny_sd.py", *sys.argv[1:]]), f"{args.folder}/tiny-sd.safetensors"
    save_file(raw_file(image, unet, text), f"{out}.tmp", dict(made_by=made_by))
    os.replace(f"{out}.tmp", out)
    names = [data.caption_of(*pair) for pair in PAIRS]
    data.write_sheet(f"{args.folder}/pictures.png", draw(image, unet, text, names)[:, :, None], len(SHAPES), names)
    print(f"{out}: {os.path.getsize(out) / 1e6:.1f} MB, look at {args.folder}/pictures.png")


if __name__ == "__main__":
    main()
