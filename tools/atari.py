"""Records clips of ten Atari games, played at random, into class folders: real footage for a laptop (docs/REAL.md).

    pip install ale-py && python tools/atari.py out/atari           # 600 clips; repeat the command to go on

A clip has 64 frames of 160x210 pixels at 15 frames a second, each of four ticks of the game, and begins 60 to 400
frames into a game. Clip i of a game is always the same. The games come with ale-py, under their makers' terms.
"""

import os
import sys

import av
import numpy as np
from ale_py import ALEInterface, LoggerMode, roms

GAMES = "bowling boxing breakout enduro freeway ms_pacman pong riverraid seaquest space_invaders".split()
ALEInterface.setLoggerMode(LoggerMode.Error)


def play(game, rng, frames=64):
    """Yields frames of a game, uint8 (210, 160, 3) each."""
    ale = ALEInterface()
    ale.setInt("random_seed", int(rng.integers(1, 2**31)))
    ale.loadROM(roms.get_rom_path(game))
    first = rng.integers(60, 400)
    for number in range(first + frames):
        if number % 4 == 0:  # an action lasts for a quarter of a second
            action = rng.choice(ale.getMinimalActionSet())
        screens = []
        for _ in range(4):
            ale.act(action)
            screens.append(ale.getScreenRGB() if number >= first else None)
        if number >= first:
            yield np.maximum(screens[2], screens[3])  # many things flicker: every second tick alone shows them
        if ale.game_over():
            ale.reset_game()


for game in GAMES:
    os.makedirs(f"{sys.argv[1]}/{game}", exist_ok=True)
    for i in range(60):
        path = f"{sys.argv[1]}/{game}/{i:03d}.mp4"
        if not os.path.exists(path):
            with av.open(f"{path}.tmp", "w", format="mp4") as file:
                stream = file.add_stream("h264", 15, {"crf": "12"}, width=160, height=210, pix_fmt="yuv420p")
                for frame in play(game, np.random.default_rng([GAMES.index(game), i])):
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
                file.mux(stream.encode())
            os.replace(f"{path}.tmp", path)
