"""Proves that files from elsewhere do no harm. No file runs code, wherever it is given. What is damaged, cut off or not
what it should be ends in one line that names it, and nothing is written; unusable videos in a data set are named once
and replaced by others of it, and a pipe that is named like a video does not hang."""

import importlib
import itertools
import os
import pickle
import shutil
import struct
import warnings
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_data import numbers, picture, touch, write

import data
from autoencoder import read_checkpoint

TINY = "--width 16 --heads 2 --depth 1 --size 16 --frames 4 --steps 1 --batch-size 4 --workers {}"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    """A run folder of three stages."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    for name in ("autoencoder", "content_diffusion", "motion_diffusion"):
        flags = TINY.format(0) if name == "autoencoder" else "--steps 1"
        done = script(f"{name}.py", "--run-dir", folder, *flags.split(), *["--clips", 8] * (name == "autoencoder"))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def linked(run, tmp_path):
    """linked("content.pt") -> a run folder with links to that one's files, but for this."""
    count = itertools.count()
    return lambda *without: shutil.copytree(
        run, tmp_path / f"run-{next(count)}", copy_function=os.symlink, ignore=lambda *_: without)


@pytest.fixture
def end(monkeypatch):
    """Calls a script in this process: what it ended with, which is no success."""
    def call(command):
        monkeypatch.setattr("sys.argv", command.split())
        with pytest.raises(BaseException) as caught:
            importlib.import_module(command.split(".py")[0]).main()
        assert getattr(caught.value, "code", 1)
        return str(caught.value)

    return call


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


NPZ = "features frames stride seed videos split codec size kind detector name".split()
FORMS = {  # how the payload is put into a file, and how it would run
    "zip": (lambda bad, path: torch.save(dict(state_dict=dict(w=torch.ones(2)), step=bad), path),
            lambda path: torch.load(path, weights_only=False)),
    "old": (lambda bad, path: torch.save(dict(w=torch.ones(2), x=bad), path, _use_new_zipfile_serialization=False),
            lambda path: torch.load(path, weights_only=False)),
    "bare": (lambda bad, path: path.write_bytes(pickle.dumps(bad, 2)), lambda path: pickle.loads(path.read_bytes())),
    "npz": (lambda bad, path: np.savez(path, **dict.fromkeys(NPZ, np.array([bad]))),
            lambda path: np.load(path, allow_pickle=True)["features"])}
WEIGHTS = [  # commands that read raw weights
    "autoencoder.py --preset shapes_text --run-dir {new} --sd {file}",
    "autoencoder.py --run-dir {new} --lpips {file} {file}",
    "content_diffusion.py --run-dir {run} --dit {file}", "content_diffusion.py --run-dir {run} --model sd --sd {file}",
    "motion_diffusion.py --run-dir {run} --text {file}", "fvd.py shapes shapes --i3d {file}"]
OTHERS = ["fvd.py shapes --clipsim --clip {file}", "fvd.py {file} {file} --i3d random"]
CHECKPOINTS = [("autoencoder.pt", "autoencoder.py --resume"), ("content.pt", "content_diffusion.py --resume"),
               ("motion.pt", "motion_diffusion.py --resume"), *(
                   (f"{stage}.pt", "sample.py --num 1") for stage in ("autoencoder", "content", "motion"))]


@pytest.mark.parametrize("form", FORMS)
def test_no_file_runs_code_wherever_it_is_given(linked, end, tmp_path, form):
    marker, file, (put, run_it) = tmp_path / "ran", tmp_path / ("x.npz" if form == "npz" else "x.pt"), FORMS[form]
    put(Payload(marker), file)
    for command in WEIGHTS + OTHERS[: 2 if form == "npz" else 1]:
        end(command.format(file=file, run=linked("content.pt", "motion.pt"), new=tmp_path / "new"))
        assert not marker.exists(), command
    for name, command in CHECKPOINTS:
        folder = linked(name)
        shutil.copy(file, folder / name)
        end(f"{command} --run-dir {folder}")
        assert not marker.exists(), (name, command)
    run_it(file)
    assert marker.exists()  # the payload works: it was not merely dead


def broken_weights(folder):
    """Pairs of a file and words of the line that it must give."""
    half, again, objects = "half a download", "download it again", "holds other objects beside weights"
    tensors = dict(w=torch.randn(300, 300))
    save_file(tensors, folder / "new.safetensors")
    torch.save(tensors, folder / "new.pt")
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    for name, part in itertools.product(("new.safetensors", "new.pt", "old.pt"), (0.001, 0.01, 0.5, 0.98)):
        content = (folder / name).read_bytes()
        (folder / f"{part}-{name}").write_bytes(content[: int(part * len(content))])
        yield folder / f"{part}-{name}", half
    for name, content, words in (
            ("pointer", POINTER, "git lfs pull"), ("page", b"\n<!DOCTYPE html>", "an HTML page"), ("empty", b"", half),
            ("page", b"<html>", again), ("answer", b"404: Not Found", half), ("json", b'{"error": "denied"}', half),
            ("picture", b"GIF89a" + bytes(99), half), ("length", struct.pack("<Q", 10**15) + b'{"a": 1}', half),
            ("list", [1, 2], "no tensors"), ("module", torch.nn.Linear(2, 2), objects),
            ("lightning", dict(state_dict=tensors, callbacks=Payload("x")), "take the .safetensors of the same model")):
        touch(folder, [name], content) if isinstance(content, bytes) else torch.save(content, folder / name)
        yield folder / name, words
    with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), folder / "program")
    yield folder / "program", objects
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("photo.txt", "hello")
    yield folder / "photos.zip", half
    yield folder, "Is a directory"
    yield folder / "nowhere", "No such file"


def test_weights_that_are_none_are_one_line_that_names_the_file(linked, refused, tmp_path):
    run = linked("content.pt", "motion.pt")
    for file, words in broken_weights(tmp_path):
        with pytest.raises(SystemExit) as caught:
            read_checkpoint(file)
        line = caught.value.code
        assert line.isprintable() and str(file) in line and words in line, (str(file), line)
    touch(tmp_path, ["new/previews/kept"])
    for command in WEIGHTS:
        refused(command.format(file=tmp_path / "pointer", run=run, new=tmp_path / "new"), "pointer", "git lfs pull")
        refused(command.format(file="/nowhere.pt", run=run, new=tmp_path / "new"), "/nowhere.pt", "o such file")


CSVS = {  # content: words of the line that refuses it
    "path,caption\na.mp4,a dog\nb.mp4,café\n".encode("cp1252"): "line 3, is not in UTF-8",
    "path,caption\na.mp4,a dog\n".encode("utf-16"): "is not in UTF-8",
    b'path,"caption\na.mp4,a dog\n': "is a quote not closed?", b'pa"th,caption\na.mp4,a dog\n': "needs the columns",
    b'path,caption\na.mp4,a\nb.mp4,"b\n' + b"c.mp4,c\n" * 30_000: "line 2: field larger",
    b'path,caption\na.mp4,a\nb.mp4,"two\nc.mp4,c\n': "is a quote not closed?", b"": "needs the columns",
    b"path,caption\n" + b"x" * 200_000: "field larger", b"file,\x1b[31mtext\na,b\n": "needs the columns path, caption",
    b"path,caption\n": "no rows", b"path,caption\na.mp4\n": "no rows that can be used; 1 rows left out"}
PICTURES = {  # content: words
    b"\xff\xd8\xff\xe0\0\x10JFIF\0": "cannot be read as a picture", b"<svg/>": "cannot be read as a picture",
    b"": "cannot be read as a picture", "bomb": "decompression bomb", "video": "cannot be", "half": "cannot be read",
    "folder": "Is a directory", "nowhere": "No such file"}


def test_lists_that_cannot_be_used_are_one_line(refused, tmp_path):
    touch(tmp_path, ["new/previews/kept", "a.mp4"])
    for content, words in CSVS.items():
        file = touch(tmp_path, ["x.csv"], content) + "/x.csv"
        refused(f"autoencoder.py --run-dir {tmp_path}/new --data {file}", file, words)
    touch(tmp_path, ["a.txt"], "a\ncafé".encode("cp1252"))
    refused(f"autoencoder.py --run-dir {tmp_path}/new --data {tmp_path}", "a.txt, line 2, is not in UTF-8")
    refused(f"autoencoder.py --run-dir {tmp_path}/new --data {tmp_path}/no", f"{tmp_path}/no: no such folder")
    refused(f"autoencoder.py --run-dir {tmp_path}/new --data {tmp_path} --split /no.txt", "/no.txt")


def test_pictures_that_are_none_are_one_line(run, refused, tmp_path):
    for content, words in PICTURES.items():
        file = tmp_path / "x.png"
        if content == "bomb":
            Image.new("1", (20_000, 20_000)).save(file)
        elif content == "half":
            Image.fromarray(picture(5)).save(file)
            file.write_bytes(file.read_bytes()[:-900])
        elif content == "video":
            shutil.copy(write(tmp_path / "x.mp4"), file)
        elif isinstance(content, bytes):
            file.write_bytes(content)
        file = dict(folder=tmp_path, nowhere=tmp_path / "no").get(content, file)
        refused(f"sample.py --run-dir {run} --image {file} --out {tmp_path}/out", f"--image {file}", words)


def gif(width, height):
    """A few bytes that claim to be a large animation."""
    image = b"!\xf9\x04\0\x0a\0\0\0" + struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6) + image * 20 + b";"


def bad_videos(folder):
    """Writes files that no clip can be had from: {name: words of the reason}."""
    whole = open(write(folder / "good.mp4"), "rb").read()
    early = open(write(folder / "good.mp4", container={"movflags": "faststart"}), "rb").read()  # its index comes first
    os.remove(folder / "good.mp4")
    write(folder / "one.webm", "libvpx", frames=1)
    write(folder / "short.avi", "mpeg4", frames=3)
    with av.open(f"{folder}/sound.mp4", "w") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux([*stream.encode(frame), *stream.encode()])
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///%s/ok0.mp4\n#EXT-X-ENDLIST\n" % bytes(folder)
    reasons = {"one.webm": "has 1 frame, 4", "short.avi": "has 3 frames, 4", "sound.mp4": "no video"}
    for name, content, reason in (
            ("empty.mp4", b"", "Invalid"), ("page.mov", b"<html>404</html>" * 50, "Invalid"), ("lfs.mp4", POINTER, ""),
            ("noise.avi", np.random.default_rng(0).bytes(5000), ""), ("half.mp4", whole[: len(whole) // 2], "Invalid"),
            ("early.mp4", early[: early.index(b"mdat") + 200], ""), ("x.ts", playlist, "Invalid"),
            ("zeros.mp4", whole[:99] + bytes(9999) + whole[-99:], ""), ("\x1b[31m.mp4", whole[:300], ""),
            ("huge.gif", gif(16_000, 16_000), ""), ("larger.gif", gif(65_535, 65_535), ""),
            ("files.mkv", b"ffconcat version 1.0\nfile %s/ok0.mp4\n" % bytes(folder), "")):
        touch(folder, [name], content)
        reasons[name] = reason
    os.mkfifo(folder / "pipe.mp4")
    os.symlink("/dev/zero", folder / "device.mp4")
    os.symlink(folder / "gone", folder / "link.mp4")
    return reasons | {"pipe.mp4": "no such file", "device.mp4": "no such file", "link.mp4": "no such file"}


def test_unusable_videos_are_named_once_and_replaced_by_training_videos_only(tmp_path, capfd):
    reasons = bad_videos(tmp_path)
    for v in range(12):
        write(tmp_path / f"ok{v}.mp4", frames=8, shape=lambda i: picture(v * 8 + i))
    train, _, tests, _ = data.open_dataset(str(tmp_path), 4, (24, 32), seed=3)
    good = {int(name[2:-4]) for name in train.paths if name[:2] == "ok"}
    assert len(train) + len(tests) == 12 + len(reasons) and 0 < len(good)
    keys = [[(index, number) for index in range(len(train))] for number in range(4)]
    clips = [clip for batch in data.load(train, keys, 2) for clip in batch["video"]]
    found = [numbers(clip) for clip in clips]
    assert all(clip == list(range(clip[0], clip[0] + 4)) for clip in found)
    assert {clip[0] // 8 for clip in found} == good and {clip[0] % 8 for clip in found} == {*range(5)}
    assert all(torch.equal(train[key]["video"], clip) for key, clip in zip(sum(keys, []), clips))  # also here
    named = [line for line in capfd.readouterr().err.splitlines() if line]
    for name in {*train.paths} & reasons.keys():
        [line] = [line for line in named if f"left out: {f'{tmp_path}/{name}'!r}: " in line]
        assert reasons[name] in line and line.isprintable(), line
    assert len(named) == len({*train.paths} & reasons.keys())
    train.replace = False
    assert [train[i] is None for i in range(len(train))] == [name[:2] != "ok" for name in train.paths]


def test_training_goes_on_without_them_and_ends_where_there_are_no_others(script, tmp_path):
    for v in range(6):
        touch(tmp_path, ["some/junk.mp4", "all/a.mp4", "all/b.avi"], b"junk")
        write(tmp_path / "some" / f"ok{v}.mp4")
    how = [*TINY.format(1).split(), "--preset", "ucf101", "--log-every", 1, "--run-dir", tmp_path / "run", "--data"]
    done = script("autoencoder.py", *how, tmp_path / "some")
    assert done.returncode == 0 and done.stderr.count("junk.mp4") == 1, done.stderr
    done = script("autoencoder.py", *how[:-2], tmp_path / "other", "--data", tmp_path / "all")
    assert done.returncode == 1 and "20 videos in a row cannot be used; the last is" in done.stderr, done.stderr
