"""Runs the paper's ablations on the moving shapes with several seeds, and says which differences are shown.

    OMP_NUM_THREADS=1 python tools/ablations.py out/ablations --seeds 3      # repeat the command to go on

Trains what each row of tables 4a, 4b, 4c and 11 and figure 12 needs, draws --num clips of each without loss, and scores
them with judge.py, whose real clips no run sees. After each row it writes, into the folder, scores.csv (a line for each
seed and row), table.md (mean and standard deviation over the seeds) and ablations.png (the same with error bars).
Everything is drawn by 20 steps of DPM-Solver++, nearer to 1000 of DDIM than the default 50 are.

A row is compared with its table's first. Where the difference of the means is not more than the two deviations
together, so that the error bars touch, the verdict is `not shown`. Measures, each of which has its own verdict:
  distance   judge.py's Frechet distance from 2,400 other real clips; lower is better
  PSNR       in dB, of each clip and the real one that it was made from; higher is better
and, without one:
  motion     share of clips whose motion is named right
  variety    deviation between clips of one class, over all pixels, divided by that of real clips
"""

import csv
import glob
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import judge

import data
from autoencoder import psnr
from fvd import frechet_distance

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = {  # run: flags of each stage that is trained; stage 1 is the base run's where it has none
    "base": dict(autoencoder="", content="", motion=""),
    "pixels": dict(autoencoder="--no-smooth --noise 0", content="", motion=""),
    "mean": dict(autoencoder="--content mean --clips 240"),
    "frame": dict(autoencoder="--content frame --clips 240"),
    "channels2": dict(autoencoder="--motion-channels 2 --clips 240"),
    "channels16": dict(autoencoder="--motion-channels 16 --clips 240"),
    "frames24": dict(autoencoder="--frames 24 --clips 240"),
    "patch4": dict(motion="--content-patch 4"),
    "patch16": dict(motion="--content-patch 16"),
}
SAMPLES = {  # samples: run (None: real test clips), flags of sample.py
    "real": (None, ""),
    "reconstruction": ("base", "--reconstruct"),
    "motion": ("base", "--predict-motion"),
    "all": ("base", ""),
    **{run: (run, "--reconstruct") for run in ("mean", "frame", "channels2", "channels16", "frames24")},
    "patch4": ("patch4", "--predict-motion"),
    "patch16": ("patch16", "--predict-motion"),
    "guidance1": ("base", "--guidance 1"),
    "guidance4": ("base", "--guidance 4"),
    "guidance8": ("base", "--guidance 8"),
    "motion1.5": ("base", "--motion-guidance 1.5"),
    "motion5": ("base", "--motion-guidance 5"),
    "pixels": ("pixels", "--reconstruct"),
    "pixels-all": ("pixels", ""),
    "same": ("base", "--same-content"),
    "same-free": ("base", "--same-content --motion-guidance 0"),
}
TABLES = {  # table: [(row, samples, the paper's figure)]; the first row is what the others are compared with
    "4a: which stage limits (FVD, UCF-101)": [
        ("everything generated", "all", "73.1"), ("real content frame, generated motion", "motion", "19.5"),
        ("reconstruction", "reconstruction", "7.72"), ("real clips", "real", "-")],
    "4b: the autoencoder (R-FVD, WebVid)": [
        ("learned weights, D = 8, L = 16", "reconstruction", "69.5"), ("mean of the frames", "mean", "76.1"),
        ("first frame", "frame", "-"), ("D = 2", "channels2", "-"), ("D = 16", "channels16", "56.8"),
        ("L = 24", "frames24", "81.3")],
    "4c: content patch of the motion model (FVD, UCF-101)": [
        ("8", "motion", "32.9"), ("4", "patch4", "19.5"), ("16", "patch16", "40.4")],
    "11: guidance on the content frame": [
        ("2", "all", "-"), ("1 (none)", "guidance1", "-"), ("4", "guidance4", "-"), ("8", "guidance8", "-")],
    "ours: guidance on the motion": [
        ("1 (none)", "all", "-"), ("1.5", "motion1.5", "-"), ("5", "motion5", "-")],
    "ours: content weights for each token, noise on the motion, everything generated": [
        ("the default", "all", "-"), ("weights for each pixel, no noise", "pixels-all", "-")],
    "ours: the same, reconstruction": [
        ("the default", "reconstruction", "-"), ("weights for each pixel, no noise", "pixels", "-")],
    "figure 12: one content frame, many motions": [
        ("one content frame a class, motion told the class", "same", "-"),
        ("the same, motion not told the class", "same-free", "-")],
}
MEASURES = {"distance": -1, "PSNR": 1, "motion": 0, "variety": 0}  # 1: higher is better, -1: lower, 0: no verdict
TINY = dict(autoencoder="--steps 2 --batch-size 2 --width 16 --depth 1 --heads 2 --clips 4",
            content="--steps 2 --batch-size 2", motion="--steps 2 --batch-size 2", sample="--steps 2 --motion-steps 2")


def once(path, call):
    """Calls call() unless a file says that it was done before; the file holds the seconds it took."""
    if not os.path.exists(path):
        start = time.time()
        call()
        data.write_lines(path, [f"{time.time() - start:.0f}"])


def run_script(*words):
    print(" ".join(words), flush=True)
    subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], check=True)


def train(folder, run, seed, tiny):
    """The stages of a run in folder/run. An interrupted one goes on."""
    place, base = f"{folder}/{run}", f"{folder}/base"
    if "autoencoder" not in RUNS[run] and not os.path.exists(f"{place}/encodings"):
        os.makedirs(place, exist_ok=True)
        shutil.copy(f"{base}/autoencoder.pt", place)
        shutil.copytree(f"{base}/encodings", f"{place}/copy")
        os.rename(f"{place}/copy", f"{place}/encodings")
    for stage, flags in RUNS[run].items():
        words = [data.SCRIPTS[stage], "--run-dir", place, "--seed", str(seed), "--resume", *flags.split()]
        once(f"{place}/{stage}.done", lambda: run_script(*words, *(TINY[stage] if tiny else "").split()))


def draw(folder, name, seed, num, tiny):
    """The clips of a line of SAMPLES, in folder/samples/name."""
    run, flags = SAMPLES[name]
    out = f"{folder}/samples/{name}"

    def call():
        shutil.rmtree(out, ignore_errors=True)
        run_script("sample.py", "--run-dir", f"{folder}/{run}", "--seed", str(seed), "-n", str(num), "--out", out,
                   "--lossless", "--sampler", "dpm++", "--steps", "20", "--motion-steps", "20", *flags.split(),
                   *(TINY["sample"] if tiny else "").split())

    once(f"{folder}/{name}.done", call)


class Judge:
    """judge.py's classifier, trained once for the folder, and its real clips, by their number of frames."""

    def __init__(self, folder, tiny):
        self.model, self.real, path = judge.Classifier().eval(), {}, f"{folder}/judge.pt"
        if not os.path.exists(path):
            with data.atomic_write(path) as temporary:
                torch.save(judge.train(2 if tiny else 700).state_dict(), temporary)
        self.model.load_state_dict(torch.load(path, weights_only=True))
        self.count = 24 if tiny else 2400

    def reference(self, frames):
        if frames not in self.real:
            clips = data.MovingShapes(frames, judge.SIZE, judge.REFERENCE)
            videos, labels = judge.batch_of(clips, range(self.count))
            self.real[frames] = SimpleNamespace(features=judge.features(self.model, videos),
                                                variety=self.variety(videos, labels))
        return self.real[frames]

    def variety(self, videos, labels):
        return np.mean([videos[labels == label].std(0).mean().item() for label in labels.unique()])

    def score(self, videos, labels, originals=None):
        """{measure: value} of clips (N, 3, L, H, W) with labels (N,), made from `originals`."""
        real = self.reference(videos.shape[2])
        found = dict(distance=frechet_distance(real.features, judge.features(self.model, videos)),
                     variety=self.variety(videos, labels) / real.variety)
        if videos.shape[2] == judge.FRAMES:  # the classifier's last layer takes no other number
            found["motion"] = judge.accuracy(self.model, videos, labels)[1]
        if originals is not None:
            found["PSNR"] = psnr(videos, originals)
        return found


def read_clips(name, folder, seed, num):
    """(clips, labels, the real clips that they were made from, or None) of a line of SAMPLES; folder: of draw()."""
    if not SAMPLES[name][0]:
        return *judge.batch_of(data.MovingShapes(judge.FRAMES, judge.SIZE, seed, "test"), range(num)), None
    frames = 24 if name == "frames24" else judge.FRAMES
    if os.path.isdir(f"{folder}/real"):
        return *judge.read_folder(f"{folder}/fake", frames), judge.read_folder(f"{folder}/real", frames)[0]
    return *judge.read_folder(folder, frames), None


def read_scores(path):
    """{(seed, samples): {measure: value}}"""
    if not os.path.exists(path):
        return {}
    with open(path, newline="") as file:
        return {(int(row["seed"]), row["samples"]): {name: float(row[name]) for name in MEASURES if row[name]}
                for row in csv.DictReader(file)}


def write_scores(path, scores):
    with data.atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, ["seed", "samples", *MEASURES])
        table.writeheader()
        table.writerows(dict(seed=seed, samples=name) | {m: f"{value:.6g}" for m, value in values.items()}
                        for (seed, name), values in sorted(scores.items()))


def summary(scores, name, measure):
    """(mean, standard deviation or nan, number of seeds) of a measure over the seeds."""
    values = [found[measure] for (_, other), found in sorted(scores.items()) if other == name and measure in found]
    return (float(np.mean(values)) if values else float("nan"),
            float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"), len(values))


def verdict(scores, name, first, measure):
    """'better', 'worse' or 'not shown': of two lines of samples."""
    (a, spread_a, seeds_a), (b, spread_b, seeds_b) = (summary(scores, which, measure) for which in (name, first))
    if name == first or not MEASURES[measure] or not seeds_a or not seeds_b:
        return ""
    if min(seeds_a, seeds_b) < 2:
        return "one seed: not shown"
    if abs(a - b) <= spread_a + spread_b:
        return "not shown"
    return "better" if (a - b) * MEASURES[measure] > 0 else "worse"


def write_table(path, scores):
    seeds, hours = len({seed for seed, _ in scores}), 0
    for done in glob.glob(f"{os.path.dirname(path)}/seed*/**/*.done", recursive=True):
        with open(done) as file:
            hours += int(file.read()) / 3600
    lines = [f"{seeds} seeds, {hours:.1f} hours; mean and standard deviation over the seeds. `not "
             "shown`: the difference from the table's first row is not more than the two deviations together.", ""]
    for table, rows in TABLES.items():
        lines += [f"**{table}**", "", "| | distance | | PSNR, dB | | motion right | variety | the paper |",
                  "|---|---|---|---|---|---|---|---|"]
        for row, name, paper in rows:
            cells = []
            for measure in MEASURES:
                mean, spread, count = summary(scores, name, measure)
                digits = {"distance": ".3f", "PSNR": ".2f", "motion": ".1%", "variety": ".3f"}[measure]
                cells.append("-" if not count else format(mean, digits) + f" ± {format(spread, digits)}" * (count > 1))
                cells += [verdict(scores, name, rows[0][1], measure)] * bool(MEASURES[measure])
            lines.append(f"| {row} | {' | '.join(cells)} | {paper} |")
        lines.append("")
    data.write_lines(path, lines)


def write_picture(path, scores):
    """A bar's end is the mean distance, the whisker one deviation to each side; grey where no difference is shown."""
    ink, grey, blue, font = (40, 40, 48), (175, 175, 182), (46, 98, 190), ImageFont.load_default(15)
    count = sum(len(rows) + 2 for rows in TABLES.values())
    canvas = Image.new("RGB", (1180, 24 * count + 10), "white")
    pen, y = ImageDraw.Draw(canvas), 6
    for table, rows in TABLES.items():
        pen.text((10, y), table, ink, font)
        y += 24
        means = [summary(scores, name, "distance")[:2] for _, name, _ in rows]
        scale = 560 / max([mean + (spread if spread == spread else 0) for mean, spread in means if mean == mean] or [1])
        for (row, name, _), (mean, spread) in zip(rows, means):
            pen.text((30, y), row, ink, font)
            if mean == mean:
                says = verdict(scores, name, rows[0][1], "distance")
                pen.rectangle([420, y + 3, 420 + mean * scale, y + 17], grey if "not shown" in says else blue)
                if spread == spread:
                    ends = [420 + (mean - spread) * scale, 420 + (mean + spread) * scale]
                    pen.line([ends[0], y + 10, ends[1], y + 10], ink, 2)
                    for end in ends:
                        pen.line([end, y + 5, end, y + 15], ink, 2)
                pen.text((1000, y), f"{mean:.3f}  {says}", ink, font)
            y += 24
        y += 24
    canvas.save(path, optimize=True)


def main():
    parser = data.Flags(__doc__)
    parser.add_argument("folder", help="of the runs, clips and results; named again, it goes on")
    parser.add_argument("--seeds", type="count", default=3, help="how many, from 0 on")
    parser.add_argument("--num", type="count", default=960, help="clips of each row")
    parser.add_argument("--tiny", action="store_true", help="try it out: two steps of everything, numbers mean nothing")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    expert, scores = Judge(args.folder, args.tiny), read_scores(f"{args.folder}/scores.csv")
    for seed in range(args.seeds):
        folder = f"{args.folder}/seed{seed}"
        for name, (run, _) in SAMPLES.items():
            if (seed, name) not in scores:
                if run:
                    train(folder, run, seed, args.tiny)
                    draw(folder, name, seed, args.num, args.tiny)
                scores[seed, name] = expert.score(*read_clips(name, f"{folder}/samples/{name}", seed, args.num))
                write_scores(f"{args.folder}/scores.csv", scores)
            write_table(f"{args.folder}/table.md", scores)
            write_picture(f"{args.folder}/ablations.png", scores)
    print(f"{args.folder}/table.md and ablations.png: {args.seeds} seeds")


if __name__ == "__main__":
    data.launch(main)
