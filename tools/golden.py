"""The golden run: shows that a refactoring changed nothing.

    python tools/golden.py /tmp/before                              # on the code as it was
    python tools/golden.py /tmp/after --against /tmp/before         # on the code as it is: same inputs, compared

Trains every stage for 20 steps on the moving shapes, on class folders and on captioned videos with a small Stable
Diffusion file, draws a few clips of every kind, and computes one FVD; five minutes on one core. Prints the largest
difference of the weights, encodings, losses, samples and FVD: 0 means equal bit for bit.
"""

import argparse
import csv
import glob
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import autoencoder  # noqa: E402
import content_diffusion  # noqa: E402
import data  # noqa: E402

STEPS = "--steps 20 --batch-size 4 --log-every 5 --save-every 10 --preview-every 20"
SAMPLE = "sample.py --steps 4 --motion-steps 4 --batch-size 2 --guidance 2 --motion-guidance 1.5 --fps 8"
SMALL = "--width 16 --heads 2 --depth 1"
COMMANDS = [
    f"autoencoder.py {STEPS} --clips 64 --run-dir shapes",
    f"content_diffusion.py {STEPS} --run-dir shapes",
    f"motion_diffusion.py {STEPS} --run-dir shapes --accumulate 2",
    f"{SAMPLE} --run-dir shapes --num 4 --out out/class",
    f"{SAMPLE} --run-dir shapes --num 3 --sampler dpm++ --out out/dpm",
    f"{SAMPLE} --run-dir shapes --num 3 --eta 0.5 --label 3 --same-content --out out/same",
    f"{SAMPLE} --run-dir shapes --num 3 --reconstruct --out out/reconstruct",
    f"{SAMPLE} --run-dir shapes --num 3 --predict-motion --out out/predict",
    "fvd.py shapes out/class --i3d random --num 4",
    f"autoencoder.py --preset ucf101 --data inputs/folders {STEPS} {SMALL} --size 32 48 --frames 9 --patch 4 --clips 0 "
    "--clips-per-video 2 --workers 1 --run-dir folders",
    f"content_diffusion.py {STEPS} --model mini --patch 8 --workers 1 --run-dir folders --checkpointing",
    f"motion_diffusion.py {STEPS} --model mini --content-patch 8 --workers 0 --run-dir folders",
    f"{SAMPLE} --run-dir folders --num 2 --label class1 --out out/folders",
    f"autoencoder.py --preset webvid_sd15 --data inputs/webvid.csv --sd inputs/v1-5-pruned.ckpt {STEPS} {SMALL} "
    "--size 64 --frames 4 --workers 0 --run-dir text",
    f"content_diffusion.py {STEPS} --sd inputs/v1-5-pruned.ckpt --workers 0 --run-dir text",
    f"motion_diffusion.py {STEPS} --text inputs/v2-1.safetensors --model mini --workers 0 --run-dir text",
    f"{SAMPLE} --run-dir text --prompt 'a red circle' --negative-prompt fog --num 2 --out out/text",
    f"{SAMPLE} --run-dir text --prompt waves --image inputs/photo.png --num 2 --out out/image",
]


def make_inputs(folder):
    """Videos in class folders, WebVid's CSV, a picture, and Stable Diffusion files of both versions, small."""
    os.makedirs(folder)
    shapes = data.MovingShapes(24, (40, 64), seed=5)
    for i in range(8):
        os.makedirs(f"{folder}/folders/class{i % 2}", exist_ok=True)
        data.write_video(f"{folder}/folders/class{i % 2}/{i}.mp4", shapes[i]["video"], 10)
    shapes = data.MovingShapes(10, (72, 100), seed=3)
    with open(f"{folder}/webvid.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        for i in range(8):
            rows.writerow([1000 + i, "https://nowhere", "PT1S", f"page{i % 2}", shapes[i]["caption"]])
            os.makedirs(f"{folder}/page{i % 2}", exist_ok=True)
            data.write_video(f"{folder}/page{i % 2}/{1000 + i}.mp4", shapes[i]["video"], 10)
    data.write_sheet(f"{folder}/photo.png", [shapes[9]["video"]], columns=1, frames=1)
    torch.manual_seed(0)
    image = autoencoder.ImageAutoencoder(channels=32).state_dict()
    parts = {
        "first_stage_model.": image,
        "model.diffusion_model.": content_diffusion.UNet(width=32, context=64).state_dict(),
        "cond_stage_model.transformer.text_model.": content_diffusion.TextEncoder(64, 1, 1).state_dict(),
    }
    half = {prefix + name: tensor.half() for prefix, state in parts.items() for name, tensor in state.items()}
    torch.save(dict(state_dict=half, callbacks=types.SimpleNamespace(best=1)), f"{folder}/v1-5-pruned.ckpt")
    width, text = 128, {"positional_embedding": (77, 128), "token_embedding.weight": (49408, 128)}
    text |= {"ln_final.weight": (width,), "ln_final.bias": (width,)}
    for i in range(2):
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        }.items():
            text[f"transformer.resblocks.{i}.{name}"] = shape
    save_file({f"cond_stage_model.model.{name}": 0.05 * torch.randn(shape) for name, shape in text.items()},
              f"{folder}/v2-1.safetensors")


def read_shard(path):
    if path.endswith(".safetensors"):
        shard = load_file(path)
        return torch.cat([shard["content"].flatten(), shard["motion"].flatten()]).double().numpy()
    return np.concatenate([np.load(f"{path}/{name}.npy").flatten() for name in ("content", "motion")]).astype(float)


def results(folder):
    """{what: array} of everything that the commands left."""
    found = {}
    for path in glob.glob("*/*.pt", root_dir=folder):
        state = torch.load(f"{folder}/{path}", weights_only=True)
        for part in {"model", "ema"} & state.keys():
            tensors = [tensor.flatten().double() for tensor in state[part].values()]
            found[f"{path} {part}"] = torch.cat(tensors).numpy()
    for path in glob.glob("*/encodings/shard-*", root_dir=folder):
        found[path.removesuffix(".safetensors")] = read_shard(f"{folder}/{path}")
    for path in glob.glob("*/*.csv", root_dir=folder):
        if not path.startswith("inputs"):
            with open(f"{folder}/{path}") as file:
                found[f"{path} loss"] = np.array([float(row["loss"]) for row in csv.DictReader(file)])
    for path in glob.glob("out/**/*.mp4", root_dir=folder, recursive=True):
        count = 4 if path.startswith(("out/text", "out/image")) else 9 if "folders" in path else 16
        found[path] = data.read_clip(f"{folder}/{path}", count).astype(np.float64)
    with open(f"{folder}/fvd.txt") as file:
        found["FVD"] = np.array([float(re.search(r"FVD ([\d.]+)", file.read())[1])])
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a new folder for the run")
    parser.add_argument("--against", help="the folder of an earlier run to compare with")
    args = parser.parse_args()
    os.makedirs(args.folder)
    inputs = os.path.join(args.folder, "inputs")
    shutil.copytree(os.path.join(args.against, "inputs"), inputs) if args.against else make_inputs(inputs)
    for command in COMMANDS:
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
        print(command, flush=True)
        done = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], cwd=args.folder, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr)
        if words[0] == "fvd.py":
            with open(f"{args.folder}/fvd.txt", "w") as file:
                file.write(done.stdout)
    now = results(args.folder)
    before = results(args.against) if args.against else now
    for name in sorted(now.keys() | before.keys()):
        if name not in now or name not in before or now[name].shape != before[name].shape:
            print(f"{name}: NOT IN BOTH, or of another shape")
        else:
            print(f"{name}: {now[name].size} numbers, largest difference {np.abs(now[name] - before[name]).max():.3g}")


if __name__ == "__main__":
    main()
