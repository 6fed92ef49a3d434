"""Runs the paper's ablations on the moving shapes with several seeds, and says which differences are shown.

    OMP_NUM_THREADS=1 python tools/ablations.py out/ablations --seeds 3      # repeat the command to go on

For each row of TABLES and each seed it trains what the row needs, draws --num clips without loss, in 20 steps, and
scores them with judge.py. The folder gets scores.csv, a line for each seed and row, and table.md, mean and deviation.

For a row of your own add a line to one of the TABLES, such as `"8, wider": (dict(motion="--model S"),
"--predict-motion", "-"),`, and repeat the command: what is in scores.csv stays. A row is compared with its table's
first: where the difference of the means is not more than the two deviations together, it is `not shown`. Distance is
judge.py's; PSNR is against the real clip that one was made from; motion is the share named right; variety is the
deviation within a class, where real clips have 1.
"""

import argparse
import csv
import functools
import os
import shutil
import subprocess
import sys

import judge
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from autoencoder import psnr
from fvd import frechet_distance

TABLES = {  # table: {row: (flags of the stages that are not the base run's, flags of sample.py, the paper's figure)}
    "4a: which stage limits (FVD, UCF-101)": {
        "everything generated": ({}, "", "73.1"),
        "real content frame, generated motion": ({}, "--predict-motion", "19.5"),
        "reconstruction": ({}, "--reconstruct", "7.72"), "real clips": (None, "", "-")},
    "4b: the autoencoder (R-FVD, WebVid)": {
        "learned weights, D = 8, L = 16": ({}, "--reconstruct", "69.5"),
        "mean of the frames": (dict(autoencoder="--content mean --clips 240"), "--reconstruct", "76.1"),
        "first frame": (dict(autoencoder="--content frame --clips 240"), "--reconstruct", "-"),
        "D = 2": (dict(autoencoder="--motion-channels 2 --clips 240"), "--reconstruct", "-"),
        "D = 16": (dict(autoencoder="--motion-channels 16 --clips 240"), "--reconstruct", "56.8"),
        "L = 24": (dict(autoencoder="--frames 24 --clips 240"), "--reconstruct", "81.3")},
    "4c: content patch of the motion model (FVD, UCF-101)": {
        "8": ({}, "--predict-motion", "32.9"), "4": (dict(motion="--content-patch 4"), "--predict-motion", "19.5"),
        "16": (dict(motion="--content-patch 16"), "--predict-motion", "40.4")},
    "11: guidance on the content frame": {
        "2": ({}, "", "-"), "1 (none)": ({}, "--guidance 1", "-"),
        "4": ({}, "--guidance 4", "-"), "8": ({}, "--guidance 8", "-")},
    "ours: guidance on the motion": {
        "1 (none)": ({}, "", "-"), "1.5": ({}, "--motion-guidance 1.5", "-"), "5": ({}, "--motion-guidance 5", "-")},
    "ours: content weights for each patch, noise on the motion": {
        "the default": ({}, "", "-"),
        "weights for each pixel, no noise": (dict(autoencoder="--no-smooth --noise 0"), "", "-")},
    "ours: the same, reconstruction": {
        "the default": ({}, "--reconstruct", "-"),
        "weights for each pixel, no noise": (dict(autoencoder="--no-smooth --noise 0"), "--reconstruct", "-")},
    "figure 12: one content frame a class, many motions": {
        "told the class": ({}, "--same-content", "-"), "not told": ({}, "--same-content --motion-guidance 0", "-")}}
MEASURES = dict(distance=(-1, ".3f"), PSNR=(1, ".2f"), motion=(0, ".1%"), variety=(0, ".3f"))  # 1: more is better
TRAIN = dict(autoencoder="autoencoder.py --preset shapes", content="content_diffusion.py", motion="motion_diffusion.py")
SAMPLE = "sample.py --lossless --steps 20 --motion-steps 20"
draw_real = functools.lru_cache(1)(judge.draw_classes)


def name_of(training, sampling=""):
    """The name of a row in scores.csv, and of its run's folder."""
    flags = ["real"] if training is None else [word for stage in training.items() for word in stage] or ["base"]
    return "_".join([*flags, sampling]).replace(" ", "_").strip("_")


@functools.cache
def run(command):
    print(command, flush=True)
    subprocess.run([sys.executable, *f"{os.path.dirname(data.__file__)}/{command}".split()], check=True)


def draw(folder, training, sampling, seed, num):
    """(clips, labels (N, 2), the real clips that they were made from, or None) of a row, once its run is trained."""
    if training is None:
        return *judge.draw_classes(range(num), seed, split="test"), None
    real, moves = "--reconstruct" in sampling or "--predict-motion" in sampling, "--reconstruct" not in sampling
    place, base, out = f"{folder}/{name_of(training)}", f"{folder}/base", f"{folder}/clips"
    for stage in ["autoencoder", *["content"] * (not real), *["motion"] * moves]:
        own = not training or training.keys() & {"autoencoder", stage}
        run(f"{TRAIN[stage]} --run-dir {place if own else base} --seed {seed} --resume {training.get(stage, '')}")
        if not own:  # the same as the base run's
            shutil.copytree(f"{base}/encodings", f"{place}/encodings", dirs_exist_ok=True)
            shutil.copy(f"{base}/{stage}.pt", place)
    frames = data.load_checkpoint(f"{place}/autoencoder.pt")["args"]["frames"]
    shutil.rmtree(out, ignore_errors=True)
    run(f"{SAMPLE} --run-dir {place} --seed {seed} -n {num} --out {out} {sampling}")
    videos, labels = judge.read_clips(f"{out}/fake" if real else out, frames)
    return videos, labels[:, 1:], judge.read_clips(f"{out}/real", frames)[0] if real else None


def score(model, videos, labels, originals):
    """{measure: value} of clips (N, 3, L, H, W)."""
    def variety(videos, labels):
        return np.mean([videos[(labels == label).all(1)].std(0).mean().item() for label in labels.unique(dim=0)])

    real, real_labels = draw_real(range(2400), judge.REFERENCE, videos.shape[2])
    found = dict(distance=frechet_distance(judge.features(model, real), judge.features(model, videos)),
                 motion=(judge.classify(model, videos[:, :, : judge.FRAMES]) == labels)[:, 1].float().mean().item(),
                 variety=variety(videos, labels) / variety(real, real_labels))
    return found if originals is None else found | dict(PSNR=psnr(videos, originals))


def cell(values, first, sign, digits):
    """'mean ± deviation, verdict' over the seeds. first: the values of the table's first row; sign: see MEASURES."""
    a, b = (np.std(x, ddof=1) if len(x) > 1 else np.inf for x in (values, first))
    text = f"{np.mean(values):{digits}}" + f" ± {a:{digits}}" * (len(values) > 1) if values else "-"
    if not sign or not values or not first or values == first:
        return text
    difference = sign * (np.mean(values) - np.mean(first))
    return f"{text}, {'not shown' if abs(difference) <= a + b else 'better' if difference > 0 else 'worse'}"


def tables(scores):
    """The text of all tables. scores: the rows of scores.csv."""
    def values(flags, name):
        chosen = [found.get(name, "") for found in scores if found["row"] == name_of(*flags[:2])]
        return [float(value) for value in chosen if value != ""]

    lines = []
    for table, rows in TABLES.items():
        lines += ["", f"**{table}**", "", "| | distance | PSNR, dB | motion | variety | the paper |", "|---" * 6 + "|"]
        first = next(iter(rows.values()))
        for row, flags in rows.items():
            cells = [cell(values(flags, name), values(first, name), *MEASURES[name]) for name in MEASURES]
            lines.append(f"| {' | '.join([row, *cells, flags[2]])} |")
    return "\n".join(lines[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the runs and results; named again, it goes on")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--num", type=int, default=960, help="clips of each row")
    args = parser.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    model, path = judge.train(), f"{args.folder}/scores.csv"
    scores = list(csv.DictReader(open(path, newline=""))) if os.path.exists(path) else []
    for seed in range(args.seeds):
        for flags in [row[:2] for rows in TABLES.values() for row in rows.values()]:
            key = dict(seed=str(seed), num=str(args.num), row=name_of(*flags))
            if not any(key.items() <= found.items() for found in scores):
                scores.append(key | score(model, *draw(f"{args.folder}/seed{seed}", *flags, seed, args.num)))
            with open(f"{path}.tmp", "w", newline="") as file:
                sheet = csv.DictWriter(file, [*key, *MEASURES])
                sheet.writeheader()
                sheet.writerows(scores)
            os.replace(f"{path}.tmp", path)
            with open(f"{args.folder}/table.md", "w") as file:
                file.write(tables([found for found in scores if found.get("num") == key["num"]]))


if __name__ == "__main__":
    main()
