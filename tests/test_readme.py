"""Proves that README.md, RECIPES.md and docs/ are true where a machine can tell: every script, file, function and flag
that they name exists, in the docstrings' commands too, and every command of their ```bash blocks runs, at tiny sizes,
and leaves what it promises.

The commands build on each other as they do for a reader who pastes them from the top, in one folder, two at a time. A
command that no row of the tables below knows fails: name there the flags that make it small, or why it is not run.
"""

import contextlib
import dataclasses
import functools
import glob
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
import test_fvd
import test_text_to_video
import torch
from conftest import ROOT, free_port
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from autoencoder import LPIPS, read_checkpoint
from data import MovingShapes, write_video

SCRIPTS = ["autoencoder", "content_diffusion", "motion_diffusion", "sample", "fvd"]

# ---------------------------------------------------------------------------------------------------------------------
# The tables

TRAINING = "--steps 2 --batch-size 2 --workers 0 --log-every 1 --save-every 2 --preview-every 2 "
TINY = {  # script: what is added to a command's own flags (of two the last one counts), so that it takes seconds
    "autoencoder.py": TRAINING + "{clip} --width 16 --depth 1 --heads 2 --clips 4",
    "content_diffusion.py": TRAINING + "{content}",
    "motion_diffusion.py": TRAINING + "--model mini",
    "sample.py": "-n 2 --batch-size 1 --steps 2 --motion-steps 2",
    "tools/cost.py": "--steps 2 --motion-steps 2",
    "tools/captions.py": "--num 2",
    "tools/variations.py": "-n 2 --frames 4",
    "fvd.py": "-n 2 --frames {length}",
}
OF_PRESET = {  # what stands for the braces above, by the preset of the command's run
    "shapes": dict(clip="--size 16 --frames 9", content="--model mini"),
    "shapes_text": dict(clip="--size 16 --frames 4", content=""),
    "ucf101": dict(clip="--size 16 --frames 9 --clips-per-video 1", content="--model mini --patch 4"),
    "webvid_sd15": dict(clip="--size 64 --frames 4", content=""),  # the model is as small as the file, see STANDS_IN
    "webvid_sd21": dict(clip="--size 64 128 --frames 4", content=""),
}
LEAVES = {  # script: files that it promises
    "autoencoder.py": ["{run}/autoencoder.pt", "{run}/autoencoder.csv", "{run}/encodings/shard-00000.safetensors",
                       "{run}/previews/autoencoder-000002.png"],
    "content_diffusion.py": ["{run}/content.pt", "{run}/content.csv", "{run}/previews/content-000002.png"],
    "motion_diffusion.py": ["{run}/motion.pt", "{run}/motion.csv", "{run}/previews/motion-000002.png"],
    "sample.py": ["{out}/captions.txt", "{out}/samples.gif", "{out}/samples.png"],
}
SAYS = {  # script: what it promises to print
    "autoencoder.py": r"encoded \d+ clips",
    "sample.py": r"2 clips in {out};",
    "tools/cost.py": r"TFLOPs as the paper counts",
    "tools/captions.py": r"2 prompts in",
    "tools/variations.py": r"as fvd.py does it .*FVD",
    "fvd.py": r"(FVD|CLIPSIM) -?\d.* \| ",
}
NOT_RUN = {  # how a command begins: why it is not run here
    "pip install": "CI does, with these same lines, before it comes here",
    "ruff check": "CI does, in this same line",
    "python -m pytest": "that is what is running",
    "python sample.py --out clips": "test_scripts.py draws from the models that come with the code",
    "mkdir": "what follows it makes the folder",
    "python tools/bench.py": "minutes; test_speed.py runs its parts",
    "python tools/judge.py": "two minutes, and it judges clips of full size only",
    "python tools/judge_prompts.py": "two minutes, and it judges clips of full size only",
    "python tools/ablations.py": "hours; test_tools.py runs it at tiny size",
    "python tools/tiny_sd.py": "an hour; test_tiny_sd.py looks at what it wrote",
    "python tools/claim.py": "hours; test_tiny_sd.py runs its parts",
}


def class_folders(path, _):
    """Videos in class folders, and UCF-101's split files beside them."""
    shapes, lists = MovingShapes(12, (24, 32)), os.path.join(os.path.dirname(path), "ucfTrainTestlist")
    os.makedirs(lists, exist_ok=True)
    for split, start in (("train", 0), ("test", 4)):
        with open(os.path.join(lists, f"{split}list01.txt"), "w") as file:
            for i in range(start, start + 4):
                name = ("ApplyEyeMakeup", "Archery")[i % 2]
                os.makedirs(os.path.join(path, name), exist_ok=True)
                write_video(os.path.join(path, name, f"v_{name}_g0{i}_c01.mp4"), shapes[i]["video"], 10)
                file.write(f"{name}/v_{name}_g0{i}_c01.avi {i % 2 + 1}\n")


def captioned_clips(path, _):
    """What sample.py leaves."""
    os.makedirs(path)
    for i in range(2):
        write_video(os.path.join(path, f"{i:05d}.mp4"), MovingShapes(9, 32)[i]["video"], 10)
    with open(os.path.join(path, "captions.txt"), "w") as file:
        file.write("a red circle\na blue square\n")


def webvid(path, request):
    files = request.getfixturevalue("files")
    shutil.copytree(files, os.path.dirname(path), dirs_exist_ok=True,
                    ignore=lambda folder, names: [name for name in names if folder == str(files)
                                                  and not name.startswith(("webvid.csv", "page0", "page1"))])


def msrvtt(path, _):
    with open(path, "w") as file:
        json.dump(dict(sentences=[dict(video_id=f"video{i // 2}", caption=f"a\n caption {i}") for i in range(6)]), file)


def sd15(path, request):
    save_file(read_checkpoint(request.getfixturevalue("files") / "v1-5-pruned.ckpt"), path)


def copy_of(fixture, name):
    return lambda path, request: shutil.copy(os.path.join(request.getfixturevalue(fixture), name), path)


def vgg16(path, _):
    torch.save({name: tensor for name, tensor in LPIPS().state_dict().items() if name.startswith("features.")}, path)


def lpips(path, _):
    torch.save({name.replace("lin.", "lin").replace(".weight", ".model.1.weight"): tensor.abs()
                for name, tensor in LPIPS().state_dict().items() if name.startswith("lin.")}, path)


STANDS_IN = {  # what a reader brings: what makes a small one of that name, given its path and pytest's request
    "path/to/videos": class_folders,
    "UCF-101": class_folders,
    "REAL": class_folders,
    "FAKE": class_folders,
    "SAMPLES": captioned_clips,
    "webvid.csv": webvid,
    "webvid_val.csv": copy_of("files", "webvid.csv"),
    "webvid_val": captioned_clips,
    "test_videodatainfo.json": msrvtt,
    "prompts.txt": copy_of("files", "prompts.txt"),
    "seen.txt": copy_of("files", "prompts.txt"),
    "photo.jpg": lambda path, _: Image.new("RGB", (100, 70), (200, 30, 30)).save(path),
    "drawing.png": lambda path, _: Image.new("RGB", (40, 40), (200, 30, 30)).save(path),
    "v1-5-pruned.safetensors": sd15,
    "v2-1_512-ema-pruned.safetensors": copy_of("files", "v2-1_512-ema-pruned.safetensors"),
    "vgg16-397923af.pth": vgg16,
    "vgg.pth": lpips,
    "i3d_torchscript.pt": lambda path, _: test_fvd.save_script(test_fvd.Tiny(), path),
    "ViT-B-32.pt": lambda path, request: shutil.copy(request.getfixturevalue("small_clip")[0], path),
}
files, small_clip = test_text_to_video.files, test_fvd.small_clip  # fixtures: raw files with random weights

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


@dataclasses.dataclass
class Command:
    """One command: [torchrun and its flags] script arguments. `script` is None for what runs no file of Python's."""

    words: list

    def __post_init__(self):
        self.text = shlex.join(self.words)
        at = next((i for i, word in enumerate(self.words) if word.endswith(".py")), None)
        known = at is not None and self.words[0] in ("python", "torchrun")
        self.launcher, self.script, self.arguments = (
            (self.words[:at], self.words[at], self.words[at + 1 :]) if known else (self.words, None, []))

    def value(self, flag, default=None):
        """What stands behind the flag."""
        return self.arguments[self.arguments.index(flag) + 1] if flag in self.arguments else default

    @property
    def run(self):
        return self.value("--run-dir", f"runs/{self.value('--preset', 'shapes')}")

    @property
    def makes(self):
        """The folder it fills."""
        if self.words[0] == "cp":
            return self.words[-1]
        if self.script == "tools/captions.py":
            return self.arguments[1]
        if self.script == "sample.py":
            return self.value("--out", f"{self.run}/samples")
        return self.run if "diffusion" in (self.script or "") or self.script == "autoencoder.py" else None

    def needs(self, other):
        """Does it read, or make anew, what the `other` command makes?"""
        reads = self.script in ("fvd.py", "tools/variations.py", "tools/captions.py")
        words = [*self.arguments, *([] if reads else [self.run, self.makes])]
        if self.words[0] == "cp":
            words = self.words[1:-1]
        return bool(other.makes) and any(f"{word}/".startswith(f"{other.makes}/") for word in words)


def commands(text):
    """The commands of a shell's text, without comments; a backslash continues a line, && and ; part commands."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>()")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word not in ("&&", ";"):
                words.append(word)
            elif words:
                found.append(Command(words))
                words = []
    return found


def code_blocks(text):
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))


def docstring_commands(script):
    lines = [line for line in read(f"{script}.py").split('"""')[1].splitlines() if line.startswith("    ")]
    return commands("\n".join(re.split(r"\s{3,}", line.strip())[0] for line in lines))  # what stands behind is a remark


TEXT = "\n".join(read(name).replace("](../", "](") for name in (
    "README.md", "RECIPES.md", *sorted(f"docs/{name}" for name in os.listdir(os.path.join(ROOT, "docs")))))
README = [Command(list(words)) for words in dict.fromkeys(tuple(c.words) for c in commands(code_blocks(TEXT)))]


def name_of(value):
    return value.text[:100] if isinstance(value, Command) else None


# ---------------------------------------------------------------------------------------------------------------------
# What is named exists


@functools.cache
def flags_of(script):
    """The flags that a script knows; of a tool, those that its text adds (cost.py takes sample.py's)."""
    name = script.removesuffix(".py").replace("tools/cost", "sample")
    if name in SCRIPTS:
        return set(importlib.import_module(name).flags()._option_string_actions)
    return set(re.findall(r'\((?:"-\w", )?"(--[\w-]+)"', read(script)))


def check_names(command):
    """The script and the flags of a command exist."""
    if command.script:
        assert os.path.exists(os.path.join(ROOT, command.script)), f"there is no {command.script}"
        for word in command.arguments:
            if word.startswith("--"):
                assert word.split("=")[0] in flags_of(command.script), f"{command.script} has no {word}"
    if command.words[0] == "torchrun":
        for word in command.launcher:
            if word.startswith("--") and word != "--":
                assert word.split("=")[0] in get_args_parser()._option_string_actions, f"torchrun has no {word}"
        for word in command.arguments:  # also behind the script's name torchrun takes a prefix for a flag of its own
            assert not any(flag.startswith(word) for flag in get_args_parser()._option_string_actions
                           if word.startswith("--")), f"torchrun would take {word} for a flag of its own"
    if command.words[:2] == ["pip", "install"]:
        for word in command.words:
            assert not word.endswith(".txt") or os.path.exists(os.path.join(ROOT, word)), f"there is no {word}"


@pytest.mark.parametrize("command", README + [c for name in SCRIPTS for c in docstring_commands(name)], ids=name_of)
def test_every_script_and_flag_of_a_documented_command_exists(command):
    check_names(command)


def test_there_are_commands_to_check():
    assert {command.script for command in README} >= {f"{name}.py" for name in SCRIPTS}
    assert all(docstring_commands(name) for name in SCRIPTS)


def find(name, modules):
    """Is `name`, as Class.method, in one of the modules?"""
    def has(thing, parts):
        return not parts or hasattr(thing, parts[0]) and has(getattr(thing, parts[0]), parts[1:])
    return any(has(importlib.import_module(module), name.split(".")) for module in modules)


FILES = tuple(".pt .pth .txt .csv .bin .safetensors .ckpt .gif .png .mp4 .mkv .jpg .md .json".split())
# In backquotes, and neither a function nor a class of ours:
WORDS = {"clip", "frame", "ucfTrainTestlist", "loss", "test_loss", "webvid_sd15", "shapes_text"}


def test_every_file_name_and_flag_in_the_readme_s_prose_exists():
    text = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert os.path.exists(os.path.join(ROOT, path)), path
    for file, names in re.findall(r"^\| \[`(\w+)\.py`\].*\| ([^|]*) \|$", text, re.M):  # the table of files
        for name in re.findall(r"`([\w.]+)`", names):
            assert find(name, [file]), f"{file}.py has no {name}"
    everywhere = set(get_args_parser()._option_string_actions).union(*(flags_of(f"{name}.py") for name in SCRIPTS))
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.search(r"\.py\b", span):
            for command in commands(span if span.startswith(("python", "torchrun")) else f"python {span}"):
                check_names(command)
        elif re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*(\(\))?", span) and not span.endswith(FILES):
            assert span in WORDS or find(span.removesuffix("()"), [*SCRIPTS, "data"]), (
                f"no file of ours has {span}; if it is no name of ours, add it to WORDS in tests/test_readme.py")
        else:
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", span):
                assert flag in everywhere, flag


def test_the_pictures_are_small_and_there():
    for path in glob.glob(os.path.join(ROOT, "assets", "*.gif")) + glob.glob(os.path.join(ROOT, "assets", "*.png")):
        assert os.path.getsize(path) < 1_000_000, path
        assert f"assets/{os.path.basename(path)}" in TEXT


# ---------------------------------------------------------------------------------------------------------------------
# What is promised happens

LIMIT = 300  # seconds for a command, on a busy machine; an idle one takes 2 to 10
HINT = ("The tables in tests/test_readme.py say how a README command is made small enough to be run: TINY has its "
        "script's flags, OF_PRESET a preset's, STANDS_IN the files that a reader brings, NOT_RUN what is not run and "
        "why.")


def why_not_run(command):
    """A reason of NOT_RUN, or None for what is run. Raises AssertionError for what no table knows."""
    reason = next((reason for start, reason in NOT_RUN.items() if f"{command.text} ".startswith(f"{start} ")), None)
    known = command.script in TINY or command.words[0] == "cp"
    assert reason or known and not set("|<>&()") & set("".join(command.words)), (
        f"No table knows how to run this README command:\n    {command.text}\n{HINT}")
    return reason


def lines_for(command, preset, alone):
    """The command lines, each a process, that stand for a command on this machine: its own flags, then the tiny ones;
    under torchrun two ranks, of two nodes one each, unless it shall run `alone`."""
    length = 9 if "random" in command.words else 4  # 9: the fewest that I3D takes
    tiny = TINY[command.script].format(**OF_PRESET[preset], length=length).split()
    call = [command.script, *command.arguments, *tiny]
    if alone or command.words[0] == "python":
        return [[sys.executable, *call]]
    flags = " ".join(command.launcher[1:])
    nodes = min(2, int((re.search(r"--nnodes[ =](\d+)", flags) or [0, 1])[1]))
    flags = re.sub(r"(--nnodes)[ =]\d+", rf"\1={nodes}", flags)
    flags = re.sub(r"(--nproc-per-node)[ =]\d+", rf"\1={2 // nodes}", flags)
    flags = re.sub(r"\bHOST:\d+", f"127.0.0.1:{free_port()}", flags)
    if "--rdzv-endpoint" not in flags:
        flags += f" --master-port={free_port()}"  # torchrun's own is the same for all
    return [[sys.executable, "-m", "torch.distributed.run", *flags.split(), *call]] * nodes


def perform(command, place, script, log="log", alone=False):
    """Runs a command in the folder `place`, where the scripts lie, its output into files there that start with `log`;
    a single process by conftest's `script`. Raises AssertionError where it ends badly or does not leave what it
    promises."""
    if command.words[0] == "cp":
        os.makedirs(os.path.join(place, command.makes), exist_ok=True)
        subprocess.run(command.words, cwd=place, check=True)
        return
    run = os.path.join(place, command.run)
    if command.script == "autoencoder.py" and "--resume" not in command.arguments:
        shutil.rmtree(run, ignore_errors=True)  # of alternatives, such as one node and two, each starts afresh
    preset = command.value("--preset")
    if not preset and command.script != "fvd.py":
        with contextlib.suppress(OSError):
            preset = torch.load(os.path.join(run, "autoencoder.pt"), weights_only=True, mmap=True)["args"]["preset"]
    lines = lines_for(command, preset or "shapes", alone)
    before = set(glob.glob(f"{run}/samples*"))
    if "torch.distributed.run" not in lines[0]:
        done = script(*lines[0][1:], folder=place)
        codes, printed = [done.returncode], done.stdout + done.stderr
    else:
        codes, printed = perform_together(lines, place, log)
    ran = f"{command.text}\nran as\n{shlex.join(lines[0])}"
    assert codes == [0] * len(lines), f"{ran}\nand ended with {codes}:\n{printed[-3000:]}\n{HINT}"
    new = sorted(set(glob.glob(f"{run}/samples*")) - before)
    places = dict(run=command.run, out=command.value("--out", os.path.relpath(new[0], place) if new else ""))
    for path in LEAVES.get(command.script, []):
        path = os.path.join(place, path.format(**places))
        assert os.path.exists(path) and os.path.getsize(path), f"{ran}\nand left no {path}:\n{printed[-3000:]}"
    words = SAYS.get(command.script, "").format(**places)
    assert re.search(words, printed), f"{ran}\nand did not say {words}:\n{printed[-3000:]}"


def perform_together(lines, place, log):
    """(exit codes, what they print) of processes that run side by side."""
    logs = [open(os.path.join(place, f"{log}-{i}.txt"), "w+") for i in range(len(lines))]
    started = [subprocess.Popen(line, cwd=place, stdout=file, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
               for line, file in zip(lines, logs)]
    try:
        codes = [process.wait(timeout=LIMIT) for process in started]
    except subprocess.TimeoutExpired:
        codes = f"more than {LIMIT} s"
    for process in started:
        process.terminate()  # so torchrun ends its ranks
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    for file in logs:
        file.seek(0)
    printed = "\n".join(file.read() for file in logs)
    for file in logs:
        file.close()
    return codes, printed


class Performance:
    """Runs commands, two at a time, each after those before it that it needs. outcome(i) waits for command i: None
    where it ran, else an AssertionError."""

    def __init__(self, commands, numbers, place, script):
        self.commands, self.place, self.script = commands, place, script
        self.outcomes, self.changed = {}, threading.Condition()
        self.needs = [[j for j in range(i) if (command.script or command.makes) and command.needs(commands[j])]
                      for i, command in enumerate(commands)]
        self.todo = set()
        for i in sorted(numbers, reverse=True):
            self.add(i)
        self.threads = [threading.Thread(target=self.work) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def add(self, number):
        self.todo.add(number)
        for other in self.needs[number]:
            self.add(other)

    def seen_on_two_ranks(self, number):
        """Did the same torchrun start the same script before? It costs three processes: once is enough."""
        command = self.commands[number]
        return any((other.launcher, other.script) == (command.launcher, command.script)
                   for other in self.commands[:number])

    def urgency(self, number):
        return sum(number in self.needs[other] for other in self.todo), -number

    def work(self):
        while True:
            with self.changed:
                while not (ready := [i for i in self.todo if all(j in self.outcomes for j in self.needs[i])]):
                    if not self.todo:
                        return
                    self.changed.wait()
                number = max(ready, key=self.urgency)
                self.todo.remove(number)
            error, failed = None, [j for j in self.needs[number] if self.outcomes[j]]
            try:
                if failed:
                    raise AssertionError(f"not run: it needs what failed before: {self.commands[failed[0]].text}")
                perform(self.commands[number], self.place, self.script, f"log-{number}",
                        self.seen_on_two_ranks(number))
            except Exception as e:  # a thread's own would be lost
                error = e
            with self.changed:
                self.outcomes[number] = error
                self.changed.notify_all()

    def outcome(self, number):
        with self.changed:
            self.changed.wait_for(lambda: number in self.outcomes)
            return self.outcomes[number]

    def close(self):
        with self.changed:
            self.todo.clear()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()


def copy_scripts(place):
    """Copies, so that nothing a command writes lands in the repository."""
    for path in glob.glob("*.py", root_dir=ROOT):
        shutil.copy(os.path.join(ROOT, path), place)
    for folder in ("tools", "assets", "pretrained"):
        shutil.copytree(os.path.join(ROOT, folder), os.path.join(place, folder), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def performance(request, tmp_path_factory, script):
    place = str(tmp_path_factory.mktemp("reader"))
    copy_scripts(place)
    numbers = [item.callspec.params["number"] for item in request.session.items  # those that -k has left
               if getattr(item, "originalname", None) == "test_a_readme_command_runs"]
    wanted = [number for number in numbers if not why_not_run(README[number])]
    for name, make in STANDS_IN.items():
        path = os.path.join(place, name)
        if any(name in command.words for command in README) and not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            make(path, request)
    play = Performance(README, wanted, place, script)
    yield play
    play.close()


@pytest.mark.parametrize("number", range(len(README)), ids=[name_of(command) for command in README])
def test_a_readme_command_runs(performance, number):
    if reason := why_not_run(README[number]):
        pytest.skip(reason)
    if error := performance.outcome(number):
        raise error


# ---------------------------------------------------------------------------------------------------------------------
# And a README that is wrong is told so


def test_commands_are_read_as_a_shell_reads_them():
    text = """Some words, and `python not_in_a_block.py`.

```bash
# a remark; python no.py
pip install -r r.txt && python a.py --prompt "a cat, # 1 && only; here" \\
    --num 8        # animates it
torchrun --nproc-per-node 8 b.py; python c.py 'x y'
```

```python
python d.py
```
"""
    found = commands(code_blocks(text))
    assert [command.words for command in found] == [
        ["pip", "install", "-r", "r.txt"], ["python", "a.py", "--prompt", "a cat, # 1 && only; here", "--num", "8"],
        ["torchrun", "--nproc-per-node", "8", "b.py"], ["python", "c.py", "x y"]]
    assert [command.script for command in found] == [None, "a.py", "b.py", "c.py"]


@pytest.mark.parametrize("line, words", [
    ("python sample.py --run-dir runs/mine --labl 3", "sample.py has no --labl"),
    ("python autoencoder.py && python content_difusion.py", "there is no content_difusion.py"),
    ("torchrun --nproc-per-nod 8 sample.py", "torchrun has no --nproc-per-nod"),
    ("torchrun --nproc-per-node 8 sample.py --num 8", "torchrun would take --num for a flag of its own"),
    ("pip install -r requirement.txt", "there is no requirement.txt"),
    ("python tools/bench.py --agianst", "bench.py has no --agianst"),
])
def test_a_name_that_does_not_exist_is_red(line, words):
    with pytest.raises(AssertionError, match=re.escape(words)):
        for command in commands(line):
            check_names(command)


@pytest.mark.parametrize("line", [
    "make", "cd runs", "python data.py", "python sample.py | tee log", "python sample.py > log", "python sample.py &",
    "python -c 'import sample'", "for n in 1 2; do python sample.py --seed $n; done", "pip download torch"])
def test_a_command_that_no_table_knows_is_red(line):
    with pytest.raises(AssertionError, match="No table knows how to run this README command"):
        for command in commands(line):
            why_not_run(command)


def test_a_command_that_fails_or_leaves_nothing_is_red_and_so_is_what_needs_it(tmp_path, script):
    copy_scripts(tmp_path)
    play = Performance(commands("""
        python sample.py --run-dir runs/nowhere
        python fvd.py runs/nowhere/samples shapes --i3d random
        python sample.py --help"""), [1, 2], str(tmp_path), script)
    try:
        for number, words in enumerate(["sample.py: no runs/nowhere/autoencoder.pt",
                                        "not run: it needs what failed before: python sample.py --run-dir runs/nowhere",
                                        "left no"]):
            assert words in str(play.outcome(number))
    finally:
        play.close()
