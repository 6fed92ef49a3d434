"""The paper's claim on the shapes: does a pretrained image model make video cheap, and draw what no video contained?

    python tools/claim.py runs/shapes_text               # two hours on one busy core; goes on where it was stopped

Needs a finished run of the preset shapes_text, whose autoencoder, encodings and motion model it uses. Trains the
content model again from the tiny Stable Diffusion and from random weights of the same sizes, with three seeds each, and
at four numbers of steps draws clips of all prompts whose pair of colour and shape occurs in the training videos and of
those whose pair does not. The judge's classifier says in which share of them colour, shape and motion are as named.
Writes claim.csv in --folder, a row for each, and assets/claim.png: means over the seeds, with bars from the lowest to
the highest.
"""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from draw import ASSETS, FONT, GREY, INK, SMALL
from judge import read_clips
from judge_prompts import prompts_of, score_prompts, train_reader

import content_diffusion
import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALL = content_diffusion.PRESETS["shapes_text"]["steps"]
STEPS = (100, 300, 1000, ALL)
KINDS = {"seen": 1, "held-out": 5}  # clips of each prompt: 80 in all of either kind
STARTS = {"pretrained": [], "random": ["--from-scratch"]}
COLUMNS = ["start", "seed", "steps", "prompts", "clips", "colour", "shape", "motion", "all"]


def call(script, *arguments):
    subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, arguments)], check=True)


def link(run_dir, run):
    """A run folder with another's autoencoder, encodings and motion model."""
    os.makedirs(run, exist_ok=True)
    for name in ("autoencoder.pt", "encodings", "motion.pt"):
        if not os.path.lexists(f"{run}/{name}"):
            os.symlink(os.path.abspath(f"{run_dir}/{name}"), f"{run}/{name}")


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def measure(args, path):
    """Adds the missing rows to the CSV."""
    model, rows = None, read_rows(path)
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    for seed in range(args.seeds):
        for start, flags in STARTS.items():
            run = f"{args.folder}/{start}-{seed}"
            link(args.run_dir, run)
            for steps in args.at:
                missing = [kind for kind in KINDS if (start, str(seed), str(steps), kind) not in done]
                if not missing:
                    continue
                call("content_diffusion.py", "--run-dir", run, "--resume", "--seed", seed, "--steps", steps, *flags)
                model = model or train_reader()
                for kind in missing:
                    prompts, out = prompts_of(kind) * KINDS[kind], f"{run}/{kind}-{steps}"
                    shutil.rmtree(out, ignore_errors=True)
                    data.write_lines(f"{run}/prompts.txt", prompts)
                    call("sample.py", "--run-dir", run, "--prompts", f"{run}/prompts.txt", "--seed", seed, "--out", out,
                         *"--lossless --sampler dpm++ --steps 20 --motion-steps 20".split())
                    scores = {name: round(float(x), 4) for name, x in score_prompts(model, *read_clips(out)).items()}
                    row = dict(start=start, seed=seed, steps=steps, prompts=kind, clips=len(prompts)) | scores
                    rows.append({name: row[name] for name in COLUMNS})
                    with data.atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
                        table = csv.DictWriter(file, COLUMNS)
                        table.writeheader()
                        table.writerows(rows)
                    print(row, flush=True)


def draw(path):
    """claim.png of the CSV's rows: how many clips show all that was named, by steps, on a logarithmic axis."""
    rows, canvas = read_rows(path), Image.new("RGB", (880, 420), "white")
    pen = ImageDraw.Draw(canvas)
    steps = sorted({int(row["steps"]) for row in rows})
    left, top, width, height = 70, 50, 560, 310
    x_of = {n: left + 30 + (width - 60) * np.log(n / steps[0]) / max(1e-9, np.log(steps[-1] / steps[0])) for n in steps}

    def y_of(share):
        return top + (1 - share) * height

    pen.text((left, 14), "clips whose colour, shape and motion are as named", fill=INK, font=FONT)
    for share in (0, 0.25, 0.5, 0.75, 1):
        pen.line([(left, y_of(share)), (left + width, y_of(share))], fill=(225, 225, 230))
        pen.text((left - 8, y_of(share)), f"{share:.0%}", fill=GREY, font=SMALL, anchor="rm")
    for n in steps:
        pen.text((x_of[n], top + height + 16), str(n), fill=GREY, font=SMALL, anchor="mm")
    pen.text((left + width / 2, top + height + 40), "training steps of the content model", fill=GREY, font=SMALL,
             anchor="mm")
    colours, line = {"pretrained": (46, 98, 190), "random": (205, 60, 50)}, 0
    for start, colour in colours.items():
        for kind in KINDS:
            points = {n: [float(row["all"]) for row in rows if (row["start"], row["prompts"], int(row["steps"])) ==
                          (start, kind, n)] for n in steps}
            places = [(x_of[n], y_of(np.mean(shares))) for n, shares in points.items() if shares]
            tint = colour if kind == "seen" else tuple(int(0.45 * c + 0.55 * 255) for c in colour)
            pen.line(places, fill=tint, width=4)
            for n, shares in points.items():
                if shares:
                    x = x_of[n] + 3 * (line - 1.5)
                    pen.line([(x, y_of(min(shares))), (x, y_of(max(shares)))], fill=tint, width=3)
                    for end in (min(shares), max(shares)):
                        pen.line([(x - 4, y_of(end)), (x + 4, y_of(end))], fill=tint, width=3)
            y = top + 20 + 44 * line
            pen.line([(left + width + 20, y), (left + width + 50, y)], fill=tint, width=4)
            pairs = "in training videos" if kind == "seen" else "in no video"
            pen.multiline_text((left + width + 58, y), f"{start}, pairs\n{pairs}", fill=INK, font=SMALL, anchor="lm")
            line += 1
    canvas.save(os.path.join(ASSETS, "claim.png"), optimize=True)


def main():
    parser = data.Flags(__doc__)
    add = parser.add_argument
    add("run_dir", help="finished run folder of the preset shapes_text")
    add("--folder", default="runs/claim", help="for the content models, their clips and claim.csv")
    add("--seeds", type="count", default=3, help="content models of each kind")
    add("--at", type="count", nargs="+", default=STEPS, help="training steps after which clips are judged")
    args = parser.parse_args()
    path = f"{args.folder}/claim.csv"
    measure(args, path)
    draw(path)


if __name__ == "__main__":
    data.launch(main)
