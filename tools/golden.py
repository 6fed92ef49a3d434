"""The golden run: shows that a change of the code changed no result.

    python tools/golden.py /tmp/before                              # on the code as it was
    python tools/golden.py /tmp/after --against /tmp/before         # on the code as it is: same inputs, compared

Trains every stage for 20 steps on the shapes, on class folders and on captioned videos with a small Stable Diffusion,
draws clips of every kind, and computes one FVD; five minutes on one core. Prints the largest differences: 0 is equal.
"""

import argparse
import glob
import os
import shutil
import subprocess
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data

ROOT = os.path.dirname(os.path.abspath(data.__file__))
COMMANDS = """
autoencoder.py TRAIN --clips 64 --run-dir shapes
content_diffusion.py TRAIN --run-dir shapes
motion_diffusion.py TRAIN --run-dir shapes --accumulate 2
sample.py DRAW --guidance 2 --run-dir shapes --num 4 --out out/class
sample.py DRAW --guidance 2 --run-dir shapes --num 3 --eta 0.5 --label 3 --same-content --out out/same
sample.py DRAW --run-dir shapes --num 3 --reconstruct --out out/reconstruct
sample.py DRAW --run-dir shapes --num 3 --predict-motion --out out/predict
fvd.py shapes out/class --i3d random --num 4
autoencoder.py --preset ucf101 --data inputs/folders TRAIN SMALL --size 32 48 --frames 9 --patch 4 --run-dir folders \
 --clips-per-video 2
content_diffusion.py TRAIN --model mini --patch 8 --workers 1 --run-dir folders --checkpointing
motion_diffusion.py TRAIN --model mini --content-patch 8 --workers 0 --run-dir folders
sample.py DRAW --guidance 2 --run-dir folders --num 2 --label class1 --out out/folders
autoencoder.py --preset webvid_sd15 --data inputs/webvid.csv --sd SD TRAIN SMALL --size 64 --frames 4 --run-dir text
content_diffusion.py TRAIN --sd SD --workers 0 --run-dir text
motion_diffusion.py TRAIN --text inputs/v2-1.safetensors --model mini --workers 0 --run-dir text
sample.py DRAW --guidance 2 --run-dir text --prompt "a red circle" --negative-prompt fog --num 2 --out out/text
""".replace("TRAIN", "--steps 20 --batch-size 4 --decay --log-every 5 --save-every 10 --preview-every 20").replace(
    "DRAW", "--steps 4 --motion-steps 4 --batch-size 2 --motion-guidance 1.5 --fps 8").replace(
    "SMALL", "--width 16 --heads 2 --depth 1 --workers 1").replace("SD", "inputs/v1-5-pruned.safetensors")


def make_inputs(folder):
    """Videos in class folders, a CSV of their captions, and a small Stable Diffusion file."""
    shapes = data.MovingShapes(24, (40, 64), seed=5)
    for i in range(8):
        os.makedirs(f"{folder}/folders/class{i % 2}", exist_ok=True)
        data.write_video(f"{folder}/folders/class{i % 2}/{i}.mp4", shapes[i]["video"], 10)
    with open(f"{folder}/webvid.csv", "w") as file:
        file.write("path,caption\n")
        file.writelines(f"folders/class{i % 2}/{i}.mp4,{shapes[i]['caption']}\n" for i in range(8))
    for name in ("v1-5-pruned", "v2-1"):
        shutil.copy(f"{ROOT}/tools/tiny-sd.safetensors", f"{folder}/{name}.safetensors")


def numbers(path):
    """What is compared of a file that the commands left, (N,)."""
    if not os.path.exists(path):
        tensors = [torch.zeros(0)]
    elif path.endswith(".pt"):
        state = torch.load(path, weights_only=True)
        tensors = [tensor for part in ("model", "ema") for tensor in state.get(part, {}).values()]
    elif path.endswith(".mp4"):
        with data.open_video(path) as (file, stream):
            tensors = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(stream)]
    else:  # FVD 12.34 | ...
        tensors = [torch.tensor(float(open(path).read().split()[1]))]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a new folder for the run")
    parser.add_argument("--against", help="the folder of an earlier run to compare with")
    args = parser.parse_args()
    before, inputs = args.against or args.folder, f"{args.folder}/inputs"
    shutil.copytree(f"{before}/inputs", inputs) if args.against else make_inputs(inputs)
    for command in COMMANDS.strip().splitlines():
        print(command, flush=True)
        subprocess.run(f"'{sys.executable}' '{ROOT}'/{command} > {command.split('.')[0]}.txt", shell=True, check=True,
                       cwd=args.folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for path in sorted(glob.glob("**/*.*", root_dir=before, recursive=True)):
        if path.endswith((".pt", ".mp4", "fvd.txt")) and not path.startswith("inputs"):
            old, new = (numbers(f"{folder}/{path}") for folder in (before, args.folder))
            same = f"largest difference {(old - new).abs().max():.3g}" if len(old) == len(new) else f"NOW {len(new)}"
            print(f"{path}: {len(old)} numbers, {same}")


if __name__ == "__main__":
    main()
