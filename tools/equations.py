"""Draws the method's equations from a trained shapes run into assets/: a clip taken apart, joined, and generated.

    python tools/equations.py runs/shapes

weights.png (equation 3), motion.png (equation 4), decoder.png (equations 5 and 6), noising.png (equation 7) and
guidance.png (classifier-free guidance).
"""

import os
import sys

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from draw import ASSETS, FONT, INK, SMALL, heat

import data
from autoencoder import load_autoencoder
from content_diffusion import ddim, guided, load_content
from data import MovingShapes, to_uint8
from motion_diffusion import load_motion

GAP, LABEL = 6, 190  # pixels


def grid(name, rows, cell=96, heads=()):
    """A picture of rows (label, pictures), each picture np.uint8 (H, W, 3); `heads` stand above the columns."""
    columns, top = max(len(pictures) for _, pictures in rows), 26 * bool(heads)
    canvas = Image.new("RGB", (LABEL + columns * (cell + GAP), top + len(rows) * (cell + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        draw.text((LABEL + column * (cell + GAP) + cell / 2, top / 2), head, fill=INK, font=SMALL, anchor="mm")
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (cell + GAP)
        draw.multiline_text((4, y + cell / 2), label, fill=INK, font=FONT, anchor="lm")
        for column, picture in enumerate(pictures):
            picture = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (LABEL + column * (cell + GAP), y))
    canvas.save(os.path.join(ASSETS, name), optimize=True)


def frames_of(video, every=3):
    """(1, 3, L, H, W) -> every third frame, np.uint8 (H, W, 3)."""
    return list(to_uint8(video[0])[::every])


def still(content):
    """(1, 3, H, W) -> np.uint8 (H, W, 3)"""
    return to_uint8(content[0, :, None])[0]


def weights(model, video):
    """Equation 3: the weight of every pixel of every frame (their sum over the frames is 1), and the weighted mean."""
    u = model.encoder(model.embed(model.patches(video.transpose(1, 2))))
    # Of a clip that is 1 in frame l and 0 elsewhere, equation 3 makes the weights of frame l.
    L = model.frames
    ones = torch.eye(L)[:, None, :, None, None].expand(-1, 3, -1, *model.size)
    share = model.content_frame(ones, u.expand(L, -1, -1, -1, -1)).mean(1)  # over the colours: (L, H, W)
    shown = list(to_uint8(share[None] / share.max() * 2 - 1)[::3])
    content, _ = model.encode(video)
    grid("weights.png", [("frames", frames_of(video)), ("their weights", shown), ("content frame", [still(content)])],
         heads=[f"frame {i + 1}" for i in range(0, len(share), 3)])


def motion(model, videos):
    """Equation 4: z_x (L, H') and z_y (L, W') of three channels, time running down, of clips that move differently."""
    rows = []
    for caption, video in videos:
        content, z = model.encode(video)
        z_x, z_y = z[0].split(model.grid, 2)  # (D, L, H'), (D, L, W')
        shown = [heat(z[i].numpy()) for z in (z_x, z_y) for i in range(3)]
        rows.append((caption.replace(" moving", "\nmoving"), [still(content), *shown]))
    grid("motion.png", rows, heads=["content frame", *(f"{z}, channel {i}" for z in ("z_x", "z_y") for i in (1, 2, 3))])


def decoder(model, one, other):
    """Equations 5 and 6: what the decoder makes of parts, and of the content of one clip with the motion of another."""
    content, z = model.encode(one)
    motion = model.encode(other)[1]
    height, width = model.grid
    no_rows, no_columns = (z * torch.cat([torch.full((height,), a), torch.full((width,), b)])
                           for a, b in ((0.0, 1.0), (1.0, 0.0)))
    grid("decoder.png", [
        ("clip A", frames_of(one)), ("decoded", frames_of(model.decode(content, z))),
        ("with z_x = 0", frames_of(model.decode(content, no_rows))),
        ("with z_y = 0", frames_of(model.decode(content, no_columns))),
        ("clip B", frames_of(other)), ("content of A,\nmotion of B", frames_of(model.decode(content, motion)))])


def noising(model, diffusion, content, label):
    """Equation 7: a content frame noised to four times, and the clean frame that the model sees in each."""
    noisy, guess, times = [], [], [50, 300, 600, 999]
    eps = torch.randn(content.shape, generator=torch.Generator().manual_seed(0))
    for time in times:
        t = torch.tensor([time])
        signal, noise = diffusion.scales(t, content)
        x = signal * content + noise * eps
        noisy.append(still(x / 2))
        guess.append(still(diffusion.estimates(model(x, t, label), x, t)[0]))
    grid("noising.png", [("noised, x_t", noisy), ("the model's x", guess), ("clean x", [still(content)])],
         heads=[f"t = {time}" for time in times])


def guidance(autoencoder, content, motion, label, names):
    """One seed at four guidance scales: the content frame, and the clip's first and last frame."""
    (model, _, diffusion, state), (mover, _, moving, _) = content, motion
    rows, scales = [[], [], []], (1, 2, 4, 8)
    for scale in scales:
        noise = torch.randn(1, *state["shape"], generator=torch.Generator().manual_seed(3))
        frame = ddim(guided(model, label, torch.tensor([len(names)]), scale), noise, diffusion, 50, bounds=(-1, 1))
        z = torch.randn(1, *autoencoder.motion_shape, generator=torch.Generator().manual_seed(3))
        z = ddim(lambda x, t: mover(x, t, frame, label), z, moving, 50)
        clip = to_uint8(autoencoder.decode(frame, autoencoder.denormalise(z).clamp(-1, 1))[0])
        for row, picture in zip(rows, (still(frame), clip[0], clip[-1])):
            row.append(picture)
    grid("guidance.png", list(zip(("content frame", "first frame", "last frame"), rows)),
         heads=[f"guidance {scale}" for scale in scales])


@torch.no_grad()
def main():
    parser = data.Flags(__doc__)
    parser.add_argument("run_dir", help="run folder of the shapes preset")
    args = parser.parse_args()
    autoencoder, _, state = load_autoencoder(args.run_dir, torch.device("cpu"))
    content, motion_model = load_content(args.run_dir), load_motion(args.run_dir)
    content[0].eval(), motion_model[0].eval()
    test = MovingShapes(autoencoder.frames, autoencoder.size, split="test")
    clips = {item["caption"]: item["video"][None] for item in (test[i] for i in range(24))}
    names = list(clips)
    right, down = (next(name for name in names if f"{shape} moving {move}" in name)
                   for shape, move in (("circle", "right"), ("square", "down")))
    weights(autoencoder, clips[right])
    motion(autoencoder, [(name, clips[name]) for name in (right, down)])
    decoder(autoencoder, clips[right], clips[down])
    label = torch.tensor([state["classes"].index(right.split(" ", 2)[2])])
    noising(content[0], content[2], autoencoder.encode(clips[right])[0], label)
    guidance(autoencoder, content, motion_model, label, state["classes"])


if __name__ == "__main__":
    data.launch(main)
