"""Proves that the README is true where a machine can tell: every script, file, function and flag that it names exists, in
the docstrings' commands too, and its short commands run."""

import glob
import importlib
import os
import re
import shlex

import pytest
from conftest import ROOT

SCRIPTS = ["autoencoder", "content_diffusion", "motion_diffusion", "sample", "fvd"]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def commands(text):
    """Every call of a script: (script, its arguments)."""
    found = []
    for line in text.splitlines():
        line = re.split(r"\s{3,}", line.strip())[0]  # what stands behind is a remark
        for part in re.split(r"&&|\|\|", line):
            words = shlex.split(part, comments=True) if re.search(r"\b(python|torchrun)\b.*\.py", part) else []
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts and words[0] in ("python", "torchrun"):
                found.append((words[scripts[0]], words[scripts[0] + 1 :], words[: scripts[0]]))
    return found


def code_blocks(text):
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))


ALL = commands(code_blocks(read("README.md"))) + [
    command for name in SCRIPTS for command in commands("\n".join(
        line for line in read(f"{name}.py").split('"""')[1].splitlines() if line.startswith("    ")))]


def test_there_are_commands_to_check():
    assert len(ALL) > 30 and {command[0] for command in ALL} >= {f"{name}.py" for name in SCRIPTS}


@pytest.mark.parametrize("script, arguments, before", ALL, ids=[" ".join([c[0], *c[1]])[:60] for c in ALL])
def test_every_flag_of_a_documented_command_exists(script, arguments, before):
    assert os.path.exists(os.path.join(ROOT, script)), script
    name = script.removesuffix(".py")
    if name in SCRIPTS:
        known = importlib.import_module(name).flags()._option_string_actions
        for word in arguments:
            if word.startswith("--"):
                assert word in known, f"{script} has no {word}"
    if before[0] == "torchrun":
        assert before[-1] == "--"  # or torchrun takes --run for a flag of its own


def test_every_file_and_name_that_the_readme_mentions_exists():
    text = read("README.md")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert os.path.exists(os.path.join(ROOT, path)), path
    table = re.findall(r"^\| \[`(\w+\.py)`\].*\| ([^|]*) \|$", text, re.M)
    assert len(table) == 6
    for file, names in table:
        module = importlib.import_module(file.removesuffix(".py"))
        for name in re.findall(r"`([\w.]+)`", names):
            thing = module
            for part in name.split("."):
                assert hasattr(thing, part), f"{file} has no {name}"
                thing = getattr(thing, part)
    known = {flag for name in SCRIPTS for flag in importlib.import_module(name).flags()._option_string_actions}
    known |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--device",
              "--against"}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", re.sub(r"```.*?```", "", text, flags=re.S)):
        assert flag in known, flag


def test_the_pictures_are_small_and_there():
    for path in glob.glob(os.path.join(ROOT, "assets", "*.gif")) + glob.glob(os.path.join(ROOT, "assets", "*.png")):
        assert os.path.getsize(path) < 1_000_000, path
    for name in ("samples.gif", "idea.png", "losses.png"):
        assert os.path.exists(os.path.join(ROOT, "assets", name)), name
        assert f"assets/{name}" in read("README.md")
