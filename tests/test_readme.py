"""Proves that README.md, RECIPES.md, CONTRIBUTING.md and docs/ are true: each script, file, function and flag that they
name exists, and every command of their ```bash blocks runs, at tiny size, in their order, and leaves what it promises.
A command that no table below knows fails: name there the flags that make it small, or why it is not run."""

import contextlib
import functools
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import test_fvd
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

from autoencoder import LPIPS
from data import MovingShapes, write_video

SCRIPTS = ["autoencoder", "content_diffusion", "motion_diffusion", "sample", "fvd"]
TRAINING = "--steps 2 --batch-size 2 --workers 0 --log-every 1 --save-every 2 --preview-every 2 "
TINY = {  # script: what is added to a command's own flags (of two the last one counts), so that it takes seconds
    "autoencoder.py": TRAINING + "--width 16 --depth 1 --heads 2 --clips 4 --frames 9 ",
    "content_diffusion.py": TRAINING, "motion_diffusion.py": TRAINING + "--model mini ",
    "sample.py": "-n 2 --batch-size 2 --steps 2 --motion-steps 2 ", "fvd.py": "-n 2 --frames 9 "}
OF_PRESET = {  # what the stages need besides
    "shapes": ("--size 16", "--model mini", ""), "shapes_text": ("--size 16", "", ""),
    "webvid_sd15": ("--size 16", "", ""), "ucf101": ("--size 16 --clips-per-video 1", "--model mini --patch 4", ""),
    "webvid_sd21": ("--size 16 32", "", "--content-patch 4")}
LEAVES = {
    "autoencoder.py": ["{run}/autoencoder.pt", "{run}/autoencoder.csv", "{run}/encodings/shard-00000.safetensors",
                       "{run}/previews/autoencoder-000002.png"],
    "content_diffusion.py": ["{run}/content.pt", "{run}/content.csv", "{run}/previews/content-000002.png"],
    "motion_diffusion.py": ["{run}/motion.pt", "{run}/motion.csv", "{run}/previews/motion-000002.png"]}
SAYS = {"sample.py": "2 clips in .*; look at", "fvd.py": r"(FVD|CLIPSIM) -?\d.* \|"}
NOT_RUN = {  # how a command begins: why it is not run here
    "pip install": "CI does, with these same lines, before it comes here", "git clone": "CI has one",
    "ruff check": "CI does", "python -m pytest": "that is what is running", "mkdir": "cp makes the folder here",
    "python tools/": "minutes or hours; test_tools.py runs what it can at tiny size", "export": "a setting",
    "python3 -m venv": "CI does", ". .venv": "CI does", "cd cmd": "here"}


def class_folders(path):
    """Videos in class folders, and UCF-101's split files beside them."""
    os.makedirs("ucfTrainTestlist", exist_ok=True)
    for part, numbers in (("train", range(4)), ("test", range(4, 8))):
        with open(f"ucfTrainTestlist/{part}list01.txt", "w") as file:
            for i in numbers:
                name = ("ApplyEyeMakeup", "Archery")[i % 2]
                os.makedirs(f"{path}/{name}", exist_ok=True)
                write_video(f"{path}/{name}/v{i}.mp4", MovingShapes(12, (24, 32))[i]["video"], 10)
                file.write(f"{name}/v{i}.avi {i % 2 + 1}\n")


def captioned_clips(path):
    os.makedirs(path)
    for i in range(2):
        write_video(f"{path}/{i:05d}.mp4", MovingShapes(9, 32)[i]["video"], 10)
    with open(f"{path}/captions.txt", "w") as file:
        file.write("a red circle\na blue square\n")


def captioned_list(path):
    rows = [f"path/to/videos/{('ApplyEyeMakeup', 'Archery')[i % 2]}/v{i}.mp4,a caption {i}\n" for i in range(8)]
    with open(path, "w") as file:
        file.writelines(["path,caption\n", *rows])


def lpips_files(_):
    state = LPIPS().state_dict()
    torch.save({name: w for name, w in state.items() if name.startswith("features.")}, "vgg16-397923af.pth")
    torch.save({f"lin{i}.model.1.weight": state[f"lin.{i}.weight"].abs() for i in range(5)}, "vgg.pth")


def text(content):
    return lambda path: open(path, "w").write(content)


def raw(path):
    shutil.copy(f"{ROOT}/tools/tiny-sd.safetensors", path)


STANDS_IN = {  # what a reader brings, and what makes a small one
    "path/to/videos": class_folders, "UCF-101": class_folders, "out/atari": class_folders,
    "webvid_val": captioned_clips, "webvid.csv": captioned_list, "webvid_val.csv": captioned_list,
    "vgg.pth": lpips_files,
    "prompts.txt": text("a red circle\na blue square\n"), "seen.txt": text("a red circle\na blue square\n"),
    "webvid_val.txt": text("a cat\na dog\n"), "msrvtt.txt": text("a cat\na dog\n"),
    "photo.jpg": lambda path: shutil.copy(f"{ROOT}/assets/drawing.png", path),
    "v1-5-pruned.safetensors": raw, "v2-1_512-ema-pruned.safetensors": raw,
    "i3d_torchscript.pt": lambda path: test_fvd.save_script(test_fvd.Tiny(), path)}


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def commands(code):
    """[words] of a shell's text, without comments; && and ; part commands."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>()")
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if word not in ("&&", ";"):
                words.append(word)
            elif words:
                found.append(words)
                words = []
    return found


PAGES = ["README.md", "RECIPES.md", "CONTRIBUTING.md", *sorted(f"docs/{name}" for name in os.listdir(f"{ROOT}/docs"))]
TEXT = "\n".join(read(name).replace("](../", "](") for name in PAGES)
COMMANDS = commands("\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.S | re.M)))
DOCSTRINGS = [words for name in SCRIPTS for line in read(f"{name}.py").split('"""')[1].splitlines()
              if line.startswith("    ") for words in commands(re.split(r"\s{3,}", line.strip())[0])]


def parted(words):
    """(the launcher and its flags, script or None, its arguments)."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return (words, None, []) if at is None or words[0] not in ("python", "torchrun") else (
        words[:at], words[at], words[at + 1 :])


@functools.cache
def flags_of(script):
    return set(re.findall(r'"(--?[a-z][\w-]*)"', read(script))) | {"--help"} | {
        f"--no-{name}" for name in re.findall(r'"--([\w-]+)", action=argparse.Boolean', read(script))}


def check_names(words):
    launcher, script, arguments = parted(words)
    if script:
        assert os.path.exists(f"{ROOT}/{script}"), f"there is no {script}"
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= flags_of(script), words
    if words[0] == "torchrun":
        own = [flag for flag in get_args_parser()._option_string_actions if flag.startswith("--")]
        assert {word.split("=")[0] for word in launcher if word.startswith("--")} <= {*own}, words
        for word in arguments:  # also behind the script's name torchrun takes a prefix for a flag of its own
            assert not any(flag.startswith(word) for flag in own), f"torchrun would take {word} for a flag of its own"


@pytest.mark.parametrize("words", [*COMMANDS, *DOCSTRINGS], ids=lambda words: " ".join(words)[:90])
def test_every_script_and_flag_of_a_command_exists(words):
    check_names(words)


def test_every_path_function_and_tool_in_the_prose_exists():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", prose) + re.findall(r"`(tools/\w+\.py|tests/\w+\.py)`", prose):
        assert glob.glob(f"{ROOT}/{path}") or glob.glob(f"{ROOT}/docs/{path}"), path
    for name in re.findall(r"^\| [^|]*\| [^|]*\| ((?:`[\w.]+`[,; ]*)+)", read("README.md"), re.M):  # equation, function
        for function in re.findall(r"`[\w.]*?(\w+)`", name):
            assert any(re.search(rf"(def|class) {function}\b", read(f"{script}.py")) for script in SCRIPTS), function
    for tool in glob.glob(f"{ROOT}/tools/*.py"):
        assert os.path.basename(tool) in TEXT or os.path.basename(tool) in ("ship.py"), tool
    for path in glob.glob(f"{ROOT}/assets/*.*"):
        assert os.path.getsize(path) < 1_000_000 and os.path.basename(path) in TEXT, path


def test_the_python_example_of_the_readme_prints_the_shapes_that_it_says():
    code = re.search(r"^```python\n(.*?)^```", read("README.md"), re.S | re.M)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"Size\(\[([\d, ]+)\]\)", done.stdout)]
    assert shapes == [(1, 3, 32, 32), (1, 8, 16, 16), (1, 3, 16, 32, 32)], done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which a reader works: scripts, tools and what the reader brings."""
    folder, here = tmp_path_factory.mktemp("reader"), os.getcwd()
    os.chdir(folder)
    for name in ("tools", "assets", "pretrained", *glob.glob("*.py", root_dir=ROOT)):
        os.symlink(f"{ROOT}/{name}", name)
    for name, make in STANDS_IN.items():
        make(name)
    os.chdir(here)
    return folder


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda n: " ".join(COMMANDS[n])[:90])
def test_a_command_runs(place, script, request, number):
    words, (_, name, arguments) = COMMANDS[number], parted(COMMANDS[number])
    if name not in TINY and words[0] != "cp":
        pytest.skip(next(why for start, why in NOT_RUN.items() if f"{' '.join(words)} ".startswith(start)))
    if words in COMMANDS[:number] and "--resume" not in words:
        pytest.skip("runs above")
    if words[0] == "cp":
        os.makedirs(place / words[-1], exist_ok=True)
        subprocess.run(words, cwd=place, check=True)
        return
    given = dict(zip(arguments, arguments[1:]))
    run = place / given.get("--run-dir", f"runs/{given.get('--preset', 'shapes')}")
    if name == "autoencoder.py" and "--resume" not in words:
        shutil.rmtree(run, ignore_errors=True)  # of alternatives, such as one node and two, each starts afresh
    preset = given.get("--preset", "shapes")
    with contextlib.suppress(OSError):
        preset = torch.load(run / "autoencoder.pt", weights_only=True, mmap=True)["args"]["preset"]
    tiny = TINY[name].split() + "".join(more for more, stage in zip(OF_PRESET[preset], TINY) if stage == name).split()
    if "ViT-B-32.pt" in words:
        shutil.copy(request.getfixturevalue("small_clip")[0], place / "ViT-B-32.pt")
    done = script(name, *arguments, *tiny, folder=place)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    for path in LEAVES.get(name, []):
        assert os.path.getsize(path.format(run=run)), path
    assert re.search(SAYS.get(name, ""), printed), printed[-3000:]


small_clip = test_fvd.small_clip  # a fixture
