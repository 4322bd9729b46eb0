"""Small real files for the tests, made on the spot, and the commands run as a user would."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DOCS = '\n'.join(path.read_text() for path in [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))])
SCRIPTS = ('train.py', 'evaluate.py', 'flops.py', 'prepare.py')
sys.path.insert(0, str(ROOT))


def write_video(
    path, num_frames=40, codec='libx264', size=(48, 64), options=None, pix_fmt='yuv420p', times=None
):
    """A video of moving noise in which no two frames are alike; `times` are presentation times in 1/600 s."""
    rng = np.random.default_rng(num_frames)
    texture = rng.integers(0, 256, (size[0], size[1] + num_frames, 3), dtype=np.uint8)
    texture = texture // 4 + np.linspace(0, 190, texture.shape[1]).astype(np.uint8)[None, :, None]
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(texture[:, i : i + size[1]]), format='rgb24'
            )
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == 'libsvtav1' and hasattr(os, 'SCHED_OTHER'):  # SVT-AV1 takes real-time priority if it can
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return str(path)


def decode_all(path):
    """Every frame of a video, decoded from the start, RGB (N, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


def run(command, cwd, expect=0, **env):
    """Run a command of the project, `train.py --epochs 1` say, and give back its result with stdout and
    stderr."""
    line = command if isinstance(command, list) else command.split()
    line = [str(ROOT / part) if part in SCRIPTS else part for part in line]
    if line[0] == 'torchrun':
        line[:1] = ['-m', 'torch.distributed.run', '--standalone']
        env = {'CUDA_VISIBLE_DEVICES': '', **env}  # a machine may have fewer GPUs than processes here
    line = [sys.executable, *line]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}  # so that tests beside each other keep their pace
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=env, timeout=400)
    assert result.returncode == expect, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture
def fails(demo, monkeypatch, capsys):
    """A function that calls a program's main with bad input and gives back its one line."""

    def call(main, arguments, code=1):
        monkeypatch.chdir(demo)
        with pytest.raises(SystemExit) as exit:
            main(arguments.split())
        assert exit.value.code == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 or code == 2  # argparse prints the usage too
        return lines[-1]

    return call


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A folder with a small set below data/demo, as `train.py --demo` would make it."""
    import prepare

    folder = tmp_path_factory.mktemp('demo run')
    prepare.make_demo(folder / 'data/demo', train_videos=4, val_videos=2, train_images=10, val_images=3)
    return folder
