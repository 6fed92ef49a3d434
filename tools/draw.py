"""Draws the README's pictures from a trained shapes run into assets/.

    python autoencoder.py --run-dir runs/pixels --no-smooth --noise 0 --clips 240
    python tools/draw.py runs/shapes runs/shapes/samples --pixels runs/pixels --text runs/shapes_text/samples

idea.png (a real clip, its content frame, motion latent and reconstruction), losses.png (on training clips, and dots on
test clips) and samples.gif, enlarged. --pixels: hidden.png, content frames of both runs. --text: text.png, the overview
that sample.py drew of prompts.
"""

import csv
import os
import shutil
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from autoencoder import load_autoencoder
from data import MovingShapes, to_uint8

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets")
INK, GREY, BLUE, RED = (40, 40, 48), (130, 130, 140), (46, 98, 190), (205, 60, 50)
FONT = ImageFont.load_default(17)
SMALL = ImageFont.load_default(14)


def paste(canvas, pixels, x, y, width, height):
    canvas.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))


def heat(values):
    """(rows, columns) in [-1, 1] -> RGB: blue below 0, white at 0, red above."""
    v = np.clip(values, -1, 1)[..., None]
    red, blue = np.array([205, 60, 50]), np.array([45, 95, 190])
    return (255 + np.where(v > 0, v * (red - 255), -v * (blue - 255))).astype(np.uint8)


def arrow(draw, points, text=None, at=None):
    draw.line(points, fill=GREY, width=3)
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = np.sign(x1 - x0), np.sign(y1 - y0)
    draw.polygon([(x1, y1), (x1 - 10 * dx - 6 * dy, y1 - 10 * dy - 6 * dx),
                  (x1 - 10 * dx + 6 * dy, y1 - 10 * dy + 6 * dx)], fill=GREY)
    if text:
        draw.text(at, text, fill=INK, font=SMALL, anchor="mm")


@torch.no_grad()
def idea(run_dir, clip=5):
    model, _, state = load_autoencoder(run_dir, torch.device("cpu"))
    item = MovingShapes(model.frames, model.size, split="test")[clip]
    content, motion = model.encode(item["video"][None])
    again = model.decode(content, motion)[0]
    canvas = Image.new("RGB", (1180, 520), "white")
    draw = ImageDraw.Draw(canvas)
    pick = np.linspace(0, model.frames - 1, 6).round().astype(int)

    draw.text((20, 14), f'"{item["caption"]}", 6 of 16 frames', fill=INK, font=FONT)
    for column, frames in ((20, to_uint8(item["video"])), (760, to_uint8(again))):
        for i, frame in enumerate(pick):
            paste(canvas, frames[frame], column + (i % 3) * 134, 46 + (i // 3) * 134, 128, 128)
    draw.text((760, 14), "the clip again", fill=INK, font=FONT)

    draw.text((500, 14), "one content frame", fill=INK, font=FONT)
    paste(canvas, to_uint8(content[0][:, None])[0], 500, 46, 160, 160)
    rows, columns = motion[0].split(model.grid, 2)  # (D, L, H'), (D, L, W')
    draw.text((500, 222), "and a small motion latent", fill=INK, font=FONT)
    for x, name, part in ((500, "z_x", rows), (612, "z_y", columns)):
        for i in range(4):
            paste(canvas, heat(part[i].numpy()), x + i * 26, 252, 24, 48)
        draw.text((x + 51, 312), name, fill=INK, font=SMALL, anchor="mm")
    draw.text((500, 324), "time runs down; 4 of 8 channels", fill=GREY, font=SMALL)
    arrow(draw, [(430, 190), (490, 190)], "encode", (458, 172))
    arrow(draw, [(690, 190), (750, 190)], "decode", (718, 172))

    y = 380
    draw.line([(20, y - 16), (1160, y - 16)], fill=(215, 215, 222), width=2)
    draw.text((20, y + 16), "To generate:", fill=INK, font=FONT, anchor="lm")
    for given, stage, drawn, model_of in (
            ("noise", "stage 2", "content frame", "an image diffusion model"),
            ("noise and the content frame", "stage 3", "motion latent", "a light transformer"),
            ("the content frame and the motion latent", "stage 1's decoder", "clip", "")):
        draw.text((500, y + 16), given, fill=INK, font=FONT, anchor="rm")
        arrow(draw, [(514, y + 16), (668, y + 16)], stage, (588, y + 2))
        draw.text((682, y + 16), drawn, fill=INK, font=FONT, anchor="lm")
        draw.text((820, y + 16), model_of, fill=GREY, font=SMALL, anchor="lm")
        y += 46
    canvas.save(os.path.join(ASSETS, "idea.png"), optimize=True)


def losses(run_dir):
    """The three loss curves, on logarithmic axes, from the stages' CSV files; of stages 2 and 3 also on test clips."""
    canvas = Image.new("RGB", (1180, 280), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (stage, title) in enumerate((("autoencoder", "autoencoder: MSE"), ("content", "content: equation 7"),
                                        ("motion", "motion: equation 8"))):
        with open(os.path.join(run_dir, f"{stage}.csv")) as file:
            rows = list(csv.DictReader(file))
        points, test = (np.array([(float(row["step"]), float(row[name])) for row in rows if row.get(name)])
                        for name in ("loss", "test_loss"))
        left, top, width, height = 60 + k * 390, 44, 310, 190
        low, high = (np.log10(edge) for edge in (min([points[:, 1].min(), *(loss for _, loss in test)]) * 0.9,
                                                 points[:, 1].max() * 1.1))

        def place(points):
            x = left + points[:, 0] / points[-1, 0] * width
            return list(zip(x, top + (high - np.log10(points[:, 1])) / (high - low) * height))

        draw.text((left, 14), title, fill=INK, font=FONT)
        draw.rectangle([left, top, left + width, top + height], outline=(215, 215, 222))
        for value in (points[:, 1].max(), points[:, 1].min()):
            y = top + (high - np.log10(value)) / (high - low) * height
            draw.text((left - 6, y), f"{value:.2g}", fill=GREY, font=SMALL, anchor="rm")
        draw.text((left + width, top + height + 14), f"{points[-1, 0]:.0f} steps", fill=GREY, font=SMALL, anchor="rm")
        draw.line(place(points), fill=BLUE, width=3)
        for x, y in place(test) if len(test) else ():
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=RED)
            draw.text((left + width - 8, top + 8), "dots: on test clips", fill=RED, font=SMALL, anchor="rt")
    canvas.save(os.path.join(ASSETS, "losses.png"), optimize=True)


@torch.no_grad()
def hidden(run_dir, pixels, clips=(5, 14, 27, 36, 45, 54)):
    """The content frames of the same test clips by both autoencoders."""
    canvas = Image.new("RGB", (190 + 154 * len(clips), 24 + 154 * 2), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (folder, name) in enumerate(((run_dir, "a weight for each\npatch, noise on the\nmotion (default)"),
                                          (pixels, "a weight for each\npixel, no noise"))):
        model = load_autoencoder(folder, torch.device("cpu"))[0]
        dataset = MovingShapes(model.frames, model.size, split="test")
        frames = model.encode(torch.stack([dataset[i]["video"] for i in clips]))[0]
        draw.text((10, 60 + 154 * row), name, fill=INK, font=SMALL)
        for column, frame in enumerate(frames):
            paste(canvas, to_uint8(frame[:, None])[0], 180 + 154 * column, 12 + 154 * row, 144, 144)
    canvas.save(os.path.join(ASSETS, "hidden.png"), optimize=True)


def samples(folder, factor=3):
    """samples.gif with each pixel as a square of `factor` pixels, because a browser would blur it."""
    with Image.open(os.path.join(folder, "samples.gif")) as gif:
        frames = [frame.convert("RGB").resize((gif.width * factor, gif.height * factor), Image.Resampling.NEAREST)
                  for frame in ImageSequence.Iterator(gif)]
        palette = frames[0].quantize(256, dither=Image.Dither.NONE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        frames[0].save(os.path.join(ASSETS, "samples.gif"), save_all=True, append_images=frames[1:], loop=0,
                       duration=gif.info["duration"])


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("run_dir", help="run folder of the shapes preset")
    parser.add_argument("samples", help="folder that sample.py wrote from it")
    parser.add_argument("--pixels", help="another run's folder, of --no-smooth --noise 0, for hidden.png")
    parser.add_argument("--text", help="folder that sample.py wrote from a run of the preset shapes_text")
    args = parser.parse_args()
    if args.text:
        shutil.copy(os.path.join(args.text, "samples.png"), os.path.join(ASSETS, "text.png"))
    idea(args.run_dir)
    losses(args.run_dir)
    samples(args.samples)
    if args.pixels:
        hidden(args.run_dir, args.pixels)


if __name__ == "__main__":
    data.launch(main)
