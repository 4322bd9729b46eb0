"""Data is made ready: what is bad is named, copies keep names and colours, pictures show what was drawn."""

import contextlib
import errno
import faulthandler
import gc
import io
import multiprocessing
import os
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, run, wait_for, write_video
from PIL import Image

import data
import prepare
from runtime import distributed, parallel, sources
from video import VideoReader

REAL = Path(os.environ.get('OMNI_REAL', ROOT.parent / 'shared/real'))
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real files in {REAL}; set OMNI_REAL')


@pytest.fixture(autouse=True)
def no_garbage():
    """Frames in it have threads, for which the end of a forked process would wait."""
    yield
    gc.collect()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends_with(code, command):
    """Run a command that ends with an exit code."""
    with pytest.raises(SystemExit) as exit:
        prepare.main(command if isinstance(command, list) else command.split())
    assert exit.value.code == code


def write_frames(path, count, size=(96, 64), **options):
    """A file of one or several pictures, no two alike."""
    first, *others = (Image.new('RGB', size, (20 * i, 99, 200)) for i in range(1, count + 1))
    first.save(path, save_all=count > 1, append_images=others, **options)


def turn(path):
    """Turn a video on its side, as a telephone does: in the header of its track."""
    content = bytearray(Path(path).read_bytes())
    matrix = content.index(b'tkhd') + 44
    content[matrix : matrix + 20] = struct.pack('>5i', 0, 1 << 16, 0, -1 << 16, 0)
    Path(path).write_bytes(content)


# ----------------------------------------------------------------------------------------------------------
# check
# ----------------------------------------------------------------------------------------------------------


def test_check_names_what_cannot_be_read_and_goes_on(folder):
    os.makedirs('in/a')
    write_video('in/a/wide.mkv', num_frames=40, size=(96, 300), codec='mpeg4')
    turn(write_video('in/turned.mp4', num_frames=20))
    Image.new('RGB', (600, 9)).save('in/a.jpg')
    Image.new('RGB', (9000, 9)).save('in/thread.png')  # evaluation does not take it
    Path('in/torn.mp4').write_bytes(b'nothing' * 100)
    Path('in/end.jpg').write_bytes(Path('in/a.jpg').read_bytes()[:-200])
    strange = os.fsdecode(b'in/no utf \xff.mp4')
    Path(strange).write_bytes(b'nothing')
    lines = [
        f'{os.path.abspath("in/turned.mp4")} 0',
        'a/wide.mkv 1',
        'torn 2',
        'a.jpg 0',
        'a.jpg 1',
        'end.jpg 0',
    ]
    lines += ['thread.png 0', f'{strange[3:]} 0']
    Path('list.txt').write_text('\n'.join(lines), 'utf-8', 'surrogateescape')
    process = Forked('prepare.py check list.txt --root in', folder)
    assert process.wait() == 1 and not process.err.read_bytes()
    lost, said, *lines = os.fsdecode(process.out.read_bytes()).splitlines()  # names need not be UTF-8
    assert lost == "videos of 'class 2' (1 files): none can be read"
    assert said == 'list.txt: 7 files, 4 of them unreadable, see bad_samples.txt'
    assert [line.split(': ')[0] for line in lines] == ['in/end.jpg', strange, 'in/thread.png', 'in/torn.mp4']
    assert os.fsencode('\n'.join(lines)) == Path('bad_samples.txt').read_bytes().strip()


@needs_real_files
def test_check_takes_class_folders_and_reads_as_training_does(folder, capsys):
    for kind, names in {
        'videos': ['video_90.mov', 'h265_bframes_10.mp4'],
        'images': ['broken_data_stream.png'],
    }.items():
        os.makedirs(f'in/{kind}')
        for name in names:
            os.symlink(REAL / 'odd' / name, f'in/{kind}/{name}')
    ends_with(1, 'check in')
    assert 'in: 3 files, 2 of them unreadable' in capsys.readouterr().out
    assert 'broken' in Path('bad_samples.txt').read_text()
    os.remove('in/images/broken_data_stream.png')
    os.remove('in/videos/h265_bframes_10.mp4')
    prepare.main(['check', 'in'])


@pytest.mark.parametrize(
    ('names', 'bad', 'kind'),
    [
        (['1.mp4', '2.webp', '3.webp', '4.webp'], ['2.webp', '3.webp', '4.webp'], 'video'),
        (['1.jpg', '2.ppm', '3.webp', '4.webp', '5.webp', '6.gif', '7', '8.tif'], [], 'image'),
        (['1.jpg', '2.jpg', '3.jpg', '4.jpg', '5.jpg', '6.mp4'], ['6.mp4'], 'image'),
        (['1.mp4', '2.mp4', '3.jpg', '4.jpg', '5.ppm', '6.gif'], [], 'video'),
        (['1.gif', '2.gif'], [], 'video'),
        (['1.webp', '2.webp'], [], 'image'),
    ],
)
def test_check_reads_a_list_as_training_does(folder, capsys, names, bad, kind):
    for name in names:
        several = name.endswith(('.webp', '.gif', '.tif'))
        if name.endswith('.mp4'):
            write_video(name)
        else:
            write_frames(name, 3 if several else 1, **({} if '.' in name else {'format': 'JPEG'}))
    Path('list.txt').write_text(''.join(f'{name} {name in bad:d}\n' for name in names))
    count, lines = prepare.check('list.txt')
    assert (count, [line.split(': ')[0] for line in lines]) == (len(names), bad)
    assert capsys.readouterr().out == (
        f"{kind}s of 'class 1' ({len(bad)} files): none can be read\n" if bad else ''
    )
    dataset = data.VideoDataset if kind == 'video' else data.ImageDataset
    files = sources.read_list('list.txt', videos=kind == 'video')
    assert sum((dataset(files, 'val')[i].bad for i in range(len(files))), []) == lines


@pytest.mark.quick
def test_check_takes_one_file(folder):
    write_video('clip.mp4')
    write_frames('a.gif', 3)
    for name in ('photo.ppm', 'photo.png'):
        write_frames(name, 1)
    for name in ('clip.mp4', 'photo.png'):
        shutil.copy(name, name.split('.')[0])
    Path('torn.mkv').write_bytes(b'nothing')
    for name in ('clip.mp4', 'clip', 'a.gif', 'photo.ppm', 'photo'):
        prepare.main(['check', name])
    ends_with(1, 'check torn.mkv')


def test_a_class_that_cannot_be_read_is_named(folder, capsys):
    for name in ('walk', 'jump'):
        os.makedirs(f'in/{name}')
        for i in range(4):
            if name == 'walk':
                write_video(f'in/{name}/{i}.mp4')
            else:
                Path(f'in/{name}/{i}.mp4').write_bytes(b'nothing')
    ends_with(1, 'check in')
    assert capsys.readouterr().out.startswith(
        "files of 'in/jump' (4 files): none can be read\nin: 8 files, 4 "
    )
    size = '--layers 1 1 1 1 --width 4 --size 28 --clip-len 2 --workers 0 --epochs 2 --log-interval 9'
    for ranks in (1, 2):
        command = f'train.py --video-only --video-list in --videos-per-gpu 2 --work-dir {ranks} {size}'
        lines = run(command, folder, ranks=ranks).stdout.splitlines()
        assert lines.count("videos of 'jump' (4 files): none can be read") == 2, lines


def kill_or_read(name):
    if name == 'memory':
        raise MemoryError
    if name == 'full':
        raise OSError(errno.ENOSPC, 'No space left on device', name)
    if name == 'exits':
        os._exit(0)
    if name in ('SIGSEGV', 'SIGKILL'):
        faulthandler.disable()  # pytest's, which writes at length
        os.kill(os.getpid(), getattr(signal, name))
    if name == 'later':  # when it has no job
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if name == 'stops':  # when it has no job, and so does not read its next one
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        raise ValueError(os.getpid())
    if name == 'sleeps':
        Path('started').touch()
        time.sleep(1000)
    if name == 'who':
        time.sleep(0.1)
        raise ValueError(os.getpid())
    if name == 'torch':
        torch.nn.functional.interpolate(torch.rand(8, 3, 256, 256), (128, 128)) @ torch.rand(128, 128)


KILLED = 'its process died: a decoder crash, or out of memory'


@pytest.mark.parametrize('cores', [1, 3])
def test_files_that_kill_their_process_are_named_and_cost_no_other(monkeypatch, cores):
    monkeypatch.setattr(parallel, 'cores', lambda: cores)
    bad = ['SIGSEGV', 'exits', 'SIGKILL', 'exits']
    jobs = [(name,) for name in [*bad, *map(str, range(2000)), 'memory', *bad, 'last', 'SIGSEGV']]
    expected = [KILLED if name in bad else 'MemoryError' if name == 'memory' else '' for (name,) in jobs]
    assert list(prepare.in_parallel(kill_or_read, jobs, 'reading')) == list(zip(jobs, expected))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('name', ['later', 'stops'])
def test_a_job_that_was_not_begun_goes_to_another_process(monkeypatch, name):
    monkeypatch.setattr(parallel, 'cores', lambda: 1)
    results = prepare.in_parallel(kill_or_read, [(name,), ('1',), ('2',)], 'reading')
    _, pid = next(results)
    time.sleep(0.5)
    if name == 'stops':
        threading.Timer(0.5, os.kill, (int(pid), signal.SIGKILL)).start()
    assert [reason for _, reason in results] == ['', '']


WHOLE = {  # what is damaged: the options of `write_video`; for a picture those of Pillow
    **{f'h264.{ending}': {'options': {'g': '10', 'bf': '2'}} for ending in ('mp4', 'mkv', 'ts')},
    'hevc.mp4': {'codec': 'libx265', 'options': {'x265-params': 'log-level=none:keyint=10'}},
    'vp8.webm': {'codec': 'libvpx', 'options': {'g': '10', 'deadline': 'realtime'}},
    'vp9.webm': {'codec': 'libvpx-vp9', 'options': {'g': '10', 'deadline': 'realtime'}},
    'mpeg4.avi': {'codec': 'mpeg4', 'options': {'bf': '2'}},
    'mpeg2.mpg': {'codec': 'mpeg2video'},
    'mjpeg.mov': {'codec': 'mjpeg', 'pix_fmt': 'yuvj420p'},
    'flv1.flv': {'codec': 'flv1'},
    'wmv2.wmv': {'codec': 'wmv2'},
    **{f'a.{ending}': {} for ending in ('jpg', 'png', 'webp', 'bmp')},
    'a.gif': {'save_all': True, 'append_images': [Image.new('RGB', (96, 64), 'red')]},
    'progressive.jpg': {'progressive': True},
    'lossless.webp': {'lossless': True},
}


def read_damaged(path, seed):
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # a process that hangs is killed
    with contextlib.suppress(av.FFmpegError, OSError, ValueError), VideoReader(path) as video:
        some = np.random.default_rng(seed).integers(len(video), size=5)
        frames = video.get_batch(some)
        assert np.array_equal(video.get_batch(some[::-1]), frames[::-1])
    prepare.check_file(path)


def test_damaged_files_neither_hang_nor_crash(tmp_path):
    """Nor do they take memory without end, and asked for twice, a frame is the same."""
    rng, scene, jobs = np.random.default_rng(0), tmp_path / 'scene.mp4', []
    with VideoReader(write_video(scene, 1, size=(64, 96))) as video:
        scene = Image.fromarray(video.get_batch([0])[0])
    for name, options in WHOLE.items():
        path = tmp_path / name
        scene.save(path, **options) if name.endswith(data.IMAGE_ENDINGS) else write_video(path, 25, **options)
        for number in range(6):
            content, place = bytearray(path.read_bytes()), int(rng.integers(path.stat().st_size))
            part = slice(place, place + int(2 ** rng.uniform(0, 11)))
            if number % 5 == 0:
                content[part] = bytes(len(content[part]))
            elif number % 5 == 1:
                content[part] = rng.bytes(len(content[part]))
            elif number % 5 == 2:
                del content[part]
            elif number % 5 == 3:
                del content[place:]
            else:
                for place in rng.integers(len(content), size=part.stop - part.start):
                    content[place] ^= 1 << rng.integers(8)
            jobs.append((str(tmp_path / f'{number}_{name}'), number))
            Path(jobs[-1][0]).write_bytes(content)
    reasons = {job: reason for job, reason in prepare.in_parallel(read_damaged, jobs, 'reading')}
    assert '' in reasons.values() and 20 < sum(map(bool, reasons.values()))
    terms = KILLED, 'AssertionError', 'MemoryError', 'Cannot allocate memory'
    assert not {job: reason for job, reason in reasons.items() if reason.startswith(terms)}


def test_a_full_disk_ends_all():
    with pytest.raises(OSError, match='No space left on device.*; the files that are finished stay'):
        list(prepare.in_parallel(kill_or_read, [('1',), ('full',), ('2',)], 'reading'))
    assert not multiprocessing.active_children()


def in_another_process(code, cwd):
    """Start Python code in which run('a', 'b') does jobs of these names in parallel."""
    start = f"""
import sys, torch
sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}
import prepare, test_prepare
def run(*names):
    return list(prepare.in_parallel(test_prepare.kill_or_read, [(name,) for name in names], 'reading'))
"""
    return Forked(['-c', start + code], cwd)


def test_processes_end_with_the_one_that_started_them(folder):
    os.mkfifo('alive')
    process = in_another_process('alive = open("alive", "w")\nrun("sleeps", "sleeps")', folder)
    reader = os.open('alive', os.O_RDONLY)
    wait_for(Path('started').exists)
    os.kill(process.pids[0], signal.SIGKILL)
    assert select.select([reader], [], [], 60)[0]  # at its end: all have ended
    os.close(reader)


def test_there_are_as_many_processes_as_cores_are_granted():
    granted = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(granted)})
    try:
        results = list(prepare.in_parallel(kill_or_read, [('who',)] * 4, 'reading'))
    finally:
        os.sched_setaffinity(0, granted)
    assert len({pid for _, pid in results}) == 1 and distributed.default_workers() <= len(granted)


@pytest.mark.parametrize(
    ('quota', 'expected'),
    [('max 100000', 64), ('250000 100000', 3), ('1000 100000', 1), ('9900000 100000', 64), ('', 64)],
)
def test_a_container_s_quota_counts(monkeypatch, quota, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    monkeypatch.setattr(distributed, 'open', lambda path: io.StringIO(f'{quota}\n'), raising=False)
    assert distributed.cores() == expected
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    assert distributed.cores() == expected


def test_torch_may_have_computed_before(folder):
    """Its threads are not there in a forked process."""
    code = """
torch.set_num_threads(4)
weight = torch.rand(800, 800, requires_grad=True)
torch.nn.functional.conv2d((weight @ weight)[None, None], torch.rand(8, 1, 3, 3)).sum().backward()
torch.nn.functional.interpolate(torch.rand(8, 3, 512, 512), (256, 256))
print({reason for _, reason in run(*['torch'] * 9)})
"""
    process = in_another_process(code, folder)
    assert process.wait() == 0 and process.out.read_text() == "{''}\n"


# ----------------------------------------------------------------------------------------------------------
# encode
# ----------------------------------------------------------------------------------------------------------


def test_encode_keeps_names_and_frames_and_goes_on(folder, capsys):
    os.makedirs('in/a b')
    wide = write_video('in/a b/wide.MKV', num_frames=40, size=(96, 300), codec='mpeg4')
    write_video('in/small.avi', num_frames=20, size=(48, 64), codec='mpeg4')
    turn(write_video('in/small.mp4', num_frames=20, size=(49, 67), pix_fmt='yuv444p'))
    Path('in/torn.mp4').write_bytes(b'nothing' * 100)
    Path('in/._small.mp4').write_bytes(b'nothing')
    os.makedirs('out/a b')
    Path('out/a b/wide.MKV.part').write_bytes(b'half')  # of a run that was killed
    for _ in range(2):
        ends_with(1, 'encode in out --short-side 64 --gop 8')
        output = capsys.readouterr().out
        assert 'in: 4 files, 1 of them unreadable, see out/bad' in output
        assert re.search(r'out: 3 copies of \d+\.\d MB, their originals have \d+\.\d MB\n', output)
        assert Path('out/bad_samples.txt').read_text().startswith('in/torn.mp4: ')
        times = {
            str(path): path.stat().st_mtime_ns for path in Path('out').rglob('*.*') if path.suffix != '.txt'
        }
        assert set(times) == {'out/a b/wide.MKV', 'out/small.avi', 'out/small.mp4'}
        assert times == locals().get('first', times)
        first = times
    with VideoReader('out/a b/wide.MKV') as copy, VideoReader(wide) as video:
        assert (len(copy), copy.get_batch([0]).shape) == (40, (1, 64, 200, 3))
        before = torch.from_numpy(video.get_batch([33])).permute(0, 3, 1, 2)
        before = data.resize(before, 64, 200).permute(0, 2, 3, 1).numpy()
        assert np.abs(copy.get_batch([33]).astype(int) - before).mean() < 6
    with av.open('out/a b/wide.MKV') as container:
        assert container.format.name.startswith('mov,mp4')
        keys = [frame.key_frame for frame in container.decode(video=0)]
    assert np.flatnonzero(keys).tolist() == [0, 8, 16, 24, 32]
    with VideoReader('out/small.mp4') as copy, VideoReader('in/small.mp4') as video:
        assert 'DISPLAYMATRIX' not in next(copy.decode())[1].side_data
        assert copy.get_batch([19]).shape == (1, 66, 48, 3) and video.get_batch([19]).shape == (1, 67, 49, 3)
        before = torch.from_numpy(video.get_batch([19])).permute(0, 3, 1, 2)
        before = data.resize(before, 66, 48).permute(0, 2, 3, 1).numpy()
        assert (
            np.abs(copy.get_batch([19]).astype(int) - before).mean() < 12
        )  # the noise loses half of its colour


def test_folders_with_a_colon(folder):
    os.makedirs('in:1')
    write_video('in.mp4', num_frames=20, size=(96, 128))
    os.rename('in.mp4', 'in:1/a.mp4')
    assert prepare.check('in:1') == (1, []) and prepare.encode('in:1', 'out:1', 64) == (1, [])
    with VideoReader('out:1/a.mp4') as copy:
        assert len(copy) == 20


def test_encode_makes_images_small_and_copies_what_is_small(folder, capsys):
    os.makedirs('in/cat')
    y, x = np.mgrid[0:400, 0:601]
    gradient = np.stack([y / 2, x / 3, (y + x) / 8], 2).astype(np.uint8)
    Image.fromarray(gradient).convert('RGBA').save('in/cat/wide.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.fromarray(gradient).save('in/cat/turned.JPG', quality=95, exif=exif)
    Image.fromarray(gradient[:100, :80]).save('in/small.gif')
    Path('in/torn.jpg').write_bytes(Path('in/cat/turned.JPG').read_bytes()[:5000])
    Image.fromarray(gradient[:100, :80]).save('in/torn.png')
    Path('in/torn.png').write_bytes(Path('in/torn.png').read_bytes()[:200])
    write_video('in/small.mp4', num_frames=20, options={'g': '4'})
    write_video('in/long.mp4', num_frames=20, options={'g': '20'})
    ends_with(1, 'encode in out')
    assert 'in: 7 files, 2 of them unreadable' in capsys.readouterr().out
    assert [line.split(':')[0] for line in Path('out/bad_samples.txt').read_text().splitlines()] == [
        'in/torn.jpg',
        'in/torn.png',
    ]
    for name in ('small.gif', 'small.mp4'):
        assert Path('in', name).read_bytes() == Path('out', name).read_bytes()
    assert Path('in/long.mp4').read_bytes() != Path('out/long.mp4').read_bytes()
    for name, size in (('wide.png', (385, 256)), ('turned.JPG', (256, 385))):
        with Image.open(f'out/cat/{name}') as image:
            assert (image.format, image.size) == ('JPEG', size)
        pixels = data.ImageDataset(None, 'val').load(f'out/cat/{name}', None).float()
        before = data.ImageDataset(None, 'val').load(f'in/cat/{name}', None)
        assert (pixels - before).abs().mean() < 2
    os.makedirs('empty')
    ends_with(1, 'encode empty out')
    assert 'empty: no videos or images below it' in capsys.readouterr().err


def test_a_copy_plays_and_opens_as_the_file_does(folder):
    os.makedirs('in')
    for name, count in {
        'a.gif': 9,
        'b.gif': 1,
        'c.webp': 9,
        'd.png': 9,
        'e.avif': 9,
        'f.mpo': 2,
        'g.tif': 3,
    }.items():
        write_frames(f'in/{name}', count)
    write_video('in/h.mjpeg', 9, 'mjpeg', (64, 96), pix_fmt='yuvj420p')
    write_video('in/i.y4m', 9, 'wrapped_avframe')
    assert prepare.encode('in', 'out', 32) == (9, [])
    for name in os.listdir('in'):
        lengths, opened = [], []
        for place in ('in', 'out'):
            try:
                with VideoReader(f'{place}/{name}') as video:
                    lengths.append(len(video))
            except ValueError:
                lengths.append(0)
            try:
                data.ImageDataset(None, 'val').load(f'{place}/{name}', None)
                opened.append(True)
            except OSError:
                opened.append(False)
        assert lengths[0] == lengths[1] and (opened[0] == opened[1] or name == 'h.mjpeg'), name
    assert Path('in/c.webp').read_bytes() == Path('out/c.webp').read_bytes()
    for name in ('b.gif', 'h.mjpeg', 'i.y4m'):
        with VideoReader(f'out/{name}') as video:
            assert video.stream.codec_context.height == 32


def test_a_video_that_has_lost_its_end_is_named(folder, capsys):
    """Its header, which here comes first, still counts all of the frames."""
    write_video('whole.mp4', num_frames=60, options={'g': '4'})
    os.makedirs('in/a')
    with av.open('whole.mp4') as whole, av.open('first.mp4', 'w', options={'movflags': 'faststart'}) as file:
        stream = file.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    content = Path('first.mp4').read_bytes()
    Path('in/a/torn.mp4').write_bytes(content[: len(content) // 2])
    for command in ('check in', 'encode in out'):
        ends_with(1, command)
        assert re.search('in/a/torn.mp4: only \\d\\d of 60 frames', capsys.readouterr().out), command
    assert not Path('out/a/torn.mp4').exists()
    os.makedirs('cut')
    with (
        av.open('whole.mp4') as whole,
        av.open('cut/cut.mp4', 'w') as file,
    ):  # as `ffmpeg -ss 1.5 -c copy` does
        stream = file.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (t - int(1.5 / packet.time_base) for t in (packet.pts, packet.dts))
                packet.stream = stream
                file.mux(packet)
    with VideoReader('cut/cut.mp4') as video:
        assert len(video) < 20 and video.stream.frames == 60
    write_video('cut/skips.avi', num_frames=40, codec='mpeg4', times=range(0, 2400, 60))  # two of three
    with VideoReader('cut/skips.avi') as video:
        assert len(video) == 40 and video.stream.frames > 100
    prepare.main('check cut'.split())


def test_a_webm_that_has_lost_most_of_it_is_named(folder, capsys):
    write_video('whole.webm', 300, 'libvpx', (96, 128), {'deadline': 'realtime', 'cpu-used': '8'})
    os.makedirs('in')
    content = Path('whole.webm').read_bytes()
    Path('in/torn.webm').write_bytes(content[: len(content) // 5])
    Path('in/whole.webm').write_bytes(content)
    ends_with(1, 'check in')
    assert re.search(
        r'in: 2 files, 1 of .*\nin/torn.webm: ends after \d.\d of 10.0 s', capsys.readouterr().out
    )


def test_links_are_followed_but_not_in_a_circle(folder, capsys):
    os.makedirs('in/a/b')
    write_video('in/a/b/1.mp4')
    os.symlink('..', 'in/a/up')
    os.symlink('a', 'in/z')
    os.symlink('in', 'out')
    assert sources.read_list('in', videos=True).paths.tolist() == [b'a/b/1.mp4', b'z/b/1.mp4']
    prepare.main('check in'.split())
    assert 'in: 2 files, 0' in capsys.readouterr().out
    os.unlink('out')
    prepare.main('encode in out'.split())
    assert sorted(str(p) for p in Path('out').rglob('*.mp4')) == ['out/a/b/1.mp4', 'out/z/b/1.mp4']
    Path('out/bad_samples.txt').write_text('of an earlier time')
    prepare.main('encode in out --crf 30'.split())
    assert Path('out/bad_samples.txt').read_text() == ''
    assert '2 of 2 files are in out and stay as they are' in capsys.readouterr().out


def test_one_encode_at_a_time(folder):
    os.makedirs('in')
    write_video('in/a.mp4')
    os.makedirs('out')
    code = 'import fcntl; f = open("out/bad_samples.txt", "a"); fcntl.lockf(f, 6); print(flush=True); input()'
    other = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match='out is in use by another encode'):
        prepare.encode('in', 'out')
    other.communicate(b'\n')
    assert prepare.encode('in', 'out') == (1, [])


COLOURS = np.array(
    [(180, 60, 60), (60, 180, 60), (60, 60, 180), (200, 200, 40), (128,) * 3, (30,) * 3, (225,) * 3]
)
FLAGGED = {  # codec, format, colour space, range, primaries, transfer
    'unmarked': ('libx264', 'yuv420p', None, None, None, None),
    'BT.601': ('libx264', 'yuv420p', 6, 1, 6, 6),
    'BT.601 of 625 lines': ('libx264', 'yuv420p', 5, 1, 5, 6),
    'BT.709': ('libx264', 'yuv420p', 1, 1, 1, 1),
    'BT.709 in full range': ('libx264', 'yuv420p', 1, 2, 1, 1),
    'full range': ('libx264', 'yuvj420p', None, None, None, None),
    '10 bits': ('libx264', 'yuv420p10le', 1, 1, 1, 1),
    '10 bits in full range': ('libx264', 'yuv420p10le', 1, 2, 1, 1),
    'SMPTE 240M in 4:2:2': ('libx264', 'yuv422p', 7, 1, 7, 7),
    'RGB': ('libx264rgb', 'rgb24', None, None, None, None),
    'grey': ('ffv1', 'gray', None, None, None, None),
    'motion JPEG': ('mjpeg', 'yuvj420p', None, None, None, None),
    'BT.709, turned': ('libx264', 'yuv420p', 1, 1, 1, 1),
    'full range, turned': ('libx264', 'yuvj420p', None, None, None, None),
}


@pytest.mark.parametrize('name', FLAGGED)
def test_encode_keeps_colours(name, tmp_path):
    codec, format, space, levels, primaries, transfer = FLAGGED[name]
    source, target = (str(tmp_path / f'{place}.{"mp4" if codec == "libx264" else "mkv"}') for place in 'ab')
    flat = np.repeat(COLOURS.astype(np.uint8), 32, 0)[None].repeat(128, 0)  # (128, 7 * 32, 3)
    with av.open(source, 'w') as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *flat.shape[:2], format
        context = stream.codec_context
        for attribute, value in (('colorspace', space), ('color_range', levels)):
            if value:
                setattr(context, attribute, value)
        context.color_primaries, context.color_trc = primaries or 2, transfer or 2
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(flat, 'rgb24')
            if format != 'rgb24':
                matrix = {6: 5}.get(space, space)
                frame = frame.reformat(format=format, dst_colorspace=matrix, dst_color_range=levels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if 'turned' in name:
        turn(source)
    prepare.encode_file(source, target)
    colours, marks = [], []
    for path in (source, target):
        with VideoReader(path) as video:
            frames = video.get_batch([0, 2]).astype(float)
            frame = next(video.decode())[1]
        marks.append((frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc))
        frames = frames.swapaxes(1, 2) if 'turned' in name else frames
        assert frames.shape[1:] == flat.shape
        colours.append(
            [frames[:, 20:-20, 32 * i + 8 : 32 * i + 24].mean((0, 1, 2)) for i in range(len(COLOURS))]
        )
    assert marks[0] == marks[1] or name == 'RGB' and marks[1][1] == 1
    if name != 'grey':
        assert np.abs(np.array(colours[0]) - COLOURS).max() < 5  # else the source is not what it should be
    difference = np.subtract(*colours)
    assert abs(difference.mean()) < 1, difference
    assert np.abs(difference).max() < 2.6, difference  # how swscale rounds 10 bits, 4:4:4 and 4:2:0 differs


UNEVEN = np.cumsum([120 if i % 7 == 3 else 24 for i in range(20)])  # in 1/600 s


@pytest.mark.parametrize(
    ('file', 'options'),
    [
        ('a.gif', dict(codec='gif', pix_fmt='rgb8', times=UNEVEN)),
        ('a.gif', dict(num_frames=1, codec='gif', pix_fmt='rgb8')),
        ('a.apng', dict(codec='apng', pix_fmt='rgba')),
        ('a.mov', dict(codec='qtrle', pix_fmt='rgb555be', size=(49, 64))),
        ('a.y4m', dict(codec='wrapped_avframe')),
        ('a.f4v', dict(pix_fmt='yuv444p', times=UNEVEN)),
        ('a.m2v', dict(codec='mpeg2video', options={'bf': '2'})),
        ('a.wmv', dict(codec='wmv2', size=(48, 64), times=UNEVEN)),
        ('a.avi', dict(num_frames=6, codec='mjpeg', pix_fmt='yuvj420p', times=range(0, 480, 80))),
    ],
)
def test_encode_has_every_frame_at_its_time(file, options, tmp_path):
    path = write_video(tmp_path / file, **{'num_frames': 20, 'size': (49, 67), **options})
    prepare.encode_video(path, str(tmp_path / 'copy.mp4'), 256, 4, 21)
    with VideoReader(path) as video, VideoReader(tmp_path / 'copy.mp4') as copy:
        order = range(len(video))
        assert len(copy) == len(video) == options.get('num_frames', 20)
        np.testing.assert_allclose(copy.times(order), video.times(order), atol=1e-3)
        before, after = (part.get_batch(order).mean((1, 2)) for part in (video, copy))
        assert np.abs(before - after).max() < 3


@needs_real_files
@pytest.mark.parametrize('name', ['video_90.mov', 'yes.mkv'])
def test_encode_real_files_of_telephones_and_full_range(name, tmp_path):
    with VideoReader(REAL / 'odd' / name) as video:
        before = video.get_batch([0, len(video) - 1])
        count, height, width = len(video), *before.shape[1:3]
    prepare.encode_file(str(REAL / 'odd' / name), str(tmp_path / name))
    with VideoReader(tmp_path / name) as video:
        after = video.get_batch([0, len(video) - 1])
        assert len(video) == count and (after.shape[1] > after.shape[2]) == (height > width)
    assert np.abs(before.mean((0, 1, 2)) - after.mean((0, 1, 2))).max() < 1
    assert abs(before.std() / after.std() - 1) < 0.02


def test_encode_leaves_nothing_half_written_on_a_full_disk(folder, fails, monkeypatch):
    os.makedirs('in')
    write_video('in/a.mp4', num_frames=200, size=(128, 128))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file that grows beyond fails to be written
    try:
        line = fails(prepare.main, f'encode {folder}/in {folder}/out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'File too large' in line and 'out/' in line
    assert os.listdir(folder / 'out') == ['bad_samples.txt']


def test_ctrl_c_is_one_line(folder):
    os.makedirs('in')
    write_video('in/a.mp4', num_frames=5)
    code = """
def encode_file(source, target, *settings):
    open(f'{target}.part', 'w')
    test_prepare.kill_or_read('sleeps')
prepare.encode_file = encode_file
prepare.main(['encode', 'in', 'out'])
"""
    process = in_another_process(code, folder)
    wait_for(Path('started').exists)
    process.kill(signal.SIGINT)  # as a terminal does, to its processes too
    assert process.wait() == 130 and process.out.read_text() == ''
    assert process.err.read_text() == 'prepare.py: stopped\n'
    assert os.listdir('out') == ['bad_samples.txt']


# ----------------------------------------------------------------------------------------------------------
# show
# ----------------------------------------------------------------------------------------------------------


def place(picture, pixels, left=2):
    """How far down a PNG shows uint8 (3, H, W), so far from its left edge."""
    shown, pixels = np.asarray(Image.open(picture)), pixels.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    at = (
        y for y in range(len(shown) - height) if (shown[y : y + height, left : left + width] == pixels).all()
    )
    return next(at, None)


def test_show_draws_what_is_read_and_what_is_fed(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    prepare.main('show seen.png --size 64'.split())  # so that frames are drawn as they are
    assert capsys.readouterr().out == 'wrote seen.png\n'
    videos = sources.read_list('data/demo/video_train.txt', 'data/demo/videos_train', videos=True)
    images = sources.read_list('data/demo/image_train.txt', 'data/demo/images_train')
    places = []
    dataset = data.VideoDataset(videos, size=64)
    with VideoReader(videos.path(0)) as video:
        read = video.get_batch(
            data.sample_frames(len(video), rng=dataset.generator('augmentation', 0, 0))[0, :1]
        )[0]
    places.append(place('seen.png', torch.from_numpy(read).permute(2, 0, 1)))
    places.append(place('seen.png', dataset[0, 0].pixels[:, 0]))
    read = data.to_tensor(Image.open(images.path(0)))
    places.append(place('seen.png', read))
    fed = data.ImageDataset(images, size=64)[0, 0].pixels
    assert place('seen.png', fed, left=2 + read.shape[2] + 2) == places[-1]
    assert None not in places and places == sorted(places)


def test_show_draws_what_there_is_and_says_what_is_missing(folder, fails, capsys):
    os.makedirs('in/a')
    os.makedirs('in/b')
    write_video('in/a/1.mp4', num_frames=20)
    Path('in/b/torn.mp4').write_bytes(b'nothing')
    Image.new('RGB', (90, 60), 'red').save('in/a/1.jpg')
    prepare.main('show a.png --video-list in --image-list in --size 56'.split())
    assert capsys.readouterr().out.endswith('wrote a.png\n')
    replaced = data.VideoDataset(sources.read_list('in', videos=True), size=56)[0, 1]
    assert replaced.path == 'in/a/1.mp4' and place('a.png', replaced.pixels[:, 0])
    os.remove('in/a/1.mp4')
    inside = f'{folder}/in'
    line = fails(prepare.main, f'show b.png --video-list {inside}')
    assert line == f'prepare.py: {inside}: 11 samples in a row are unreadable'
    assert 'nothing.txt: no such list' in fails(prepare.main, f'show c.png --video-list {folder}/nothing.txt')
    assert fails(prepare.main, f'show {folder}/no/c.png --image-list {inside}').startswith('prepare.py: ')
    assert not Path('no').exists()


def test_show_draws_the_clips_of_a_run_and_different_classes(folder, monkeypatch):
    for i in range(4):
        write_video(f'{i}.mp4', num_frames=30 + i)
    Path('list.txt').write_text('0.mp4 0\n1.mp4 0\n2.mp4 1\n3.mp4 4\n')
    drawn = []
    monkeypatch.setattr(prepare, 'draw_rows', lambda out, rows, titles, size: drawn.append((rows, titles)))
    prepare.main('show a.png --video-list list.txt --clip-len 3 --frame-interval 2 --size 56'.split())
    [(rows, titles)] = drawn
    assert [title.split()[0] for title in titles if title] == ['0.mp4', '2.mp4', '3.mp4']
    fed = data.VideoDataset(sources.read_list('list.txt'), size=56, clip_len=3, frame_interval=2)[0, 2].pixels
    assert torch.equal(rows[3], fed.transpose(0, 1)) and len(rows[2]) == 3


def test_show_without_anything_to_show(folder, capsys):
    ends_with(1, 'show a.png')
    assert capsys.readouterr().err.startswith('prepare.py: nothing to show: name --video-list')


def test_titles_are_whole_and_legible(tmp_path):
    rows, long = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], 'taken for ' * 40 + 'x' * 300
    lines = prepare.ascii_lines(long, 40)
    assert ''.join(lines).replace(' ', '') == long.replace(' ', '') and max(map(len, lines)) <= 40
    heights = []
    for title in ('short', long):
        prepare.draw_rows(tmp_path / 'a.png', rows, [title], 8)
        picture = np.asarray(Image.open(tmp_path / 'a.png'))
        heights.append(len(picture))
        assert picture.shape[1] >= 480 and (picture[:, -8:] == 255).all()
    assert heights[1] - heights[0] >= 16 * 7


def test_short_rows_stand_beside_each_other(tmp_path):
    reds = [torch.full((1, 3, 8, 8), 0, dtype=torch.uint8) for _ in range(6)]
    for number, red in enumerate(reds):
        red[:, 0] = 40 * number + 1
    prepare.draw_rows(tmp_path / 'a.png', reds, ['one line', *['x ' * 60] * 5], 8)
    picture = np.asarray(Image.open(tmp_path / 'a.png')).astype(int)
    places = [np.argwhere((picture == (40 * number + 1, 0, 0)).all(-1)) for number in range(6)]
    assert [len(place) for place in places] == [64] * 6
    corners = [tuple(place.min(0)) for place in places]
    assert [x // 240 for _, x in corners] == [0, 1, 2, 3, 0, 1] and picture.shape[1] == 960
    tops = [y for y, _ in corners]
    assert len(set(tops[:4])) == len(set(tops[4:])) == 1 and tops[4] - tops[0] >= 8 + 2 * 16
    prepare.draw_rows(
        tmp_path / 'a.png', [red[..., :1].expand(8, 3, 8, 100) for red in reds[:2]], ['', ''], 8
    )
    assert Image.open(tmp_path / 'a.png').width == 8 * (100 + 2) + 2  # long ones do not


def test_letters_are_letters_or_their_numbers_but_no_boxes():
    for title, drawn in {
        'Pokémon über niña Łódź': r'Pokemon uber nina \u0141odz',
        '\u1234中': r'\u1234\u4e2d',
        'lone \udcff and\nline': r'lone \udcff and line',
    }.items():
        assert prepare.ascii_lines(title, 99) == [drawn]


# ----------------------------------------------------------------------------------------------------------
# demo and messages
# ----------------------------------------------------------------------------------------------------------


def test_demo_set_is_made_of_real_files_and_reused(demo, capsys):
    folder = demo / 'data/demo'
    for source, count in (('video', 8 * 6), ('image', 4 * 13)):
        lists = {
            split: (folder / f'{source}_{split}.txt').read_text().splitlines() for split in ('train', 'val')
        }
        files = [folder / f'{source}s_{split}' / line.split()[0] for split in lists for line in lists[split]]
        assert len(files) == count and all(path.stat().st_size > 500 for path in files)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    prepare.main(['demo', str(folder)])
    prepare.make_demo(demo / 'other', 1, 1, 1, 1)
    said = f'reusing the set in {folder}\nmaking a small set in {demo / "other"}\n'
    assert capsys.readouterr().out == said
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('check nowhere.txt', 'prepare.py: nowhere.txt: No such file or directory'),
        ('check empty', 'empty: no videos or images below it'),
        ('check empty --out empty', 'empty: Is a directory'),
        ('check empty --out nowhere/bad.txt', 'nowhere/bad.txt: No such file or directory'),
        (
            'check data/demo/video_train.txt',
            'nor any other at the start of data/demo/video_train.txt; --root',
        ),
        ('encode nowhere out', 'nowhere: not a folder'),
        ('encode data/demo data/../data/demo', 'data/../data/demo: the copy needs a folder of its own'),
        ('encode data/demo data/demo/small', 'data/demo/small: the copy needs a folder of its own'),
        ('demo data/demo/video_train.txt', 'Not a directory'),
    ],
)
def test_mistakes_are_one_line(demo, fails, command, message):
    (demo / 'empty').mkdir(exist_ok=True)
    line = fails(prepare.main, command)
    assert line.startswith('prepare.py: ') and message in line


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('encode in out --crf 52', "argument --crf: '52' is not a whole number of at least 0, below 52"),
        ('encode in out --gop 3000000000', "argument --gop: '3000000000' is not"),
        ('encode in out --short-side 0', "argument --short-side: '0' is not"),
    ],
)
def test_a_flag_that_is_wrong_is_a_line(folder, capsys, command, message):
    ends_with(2, command)
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and len(lines) <= 2


def test_help(capsys):
    ends_with(0, '--help')
    assert 'encode SRC DST' in capsys.readouterr().out
    for command in ('demo', 'check', 'encode', 'show'):
        ends_with(0, f'{command} --help')
        text = capsys.readouterr().out
        assert text.startswith(f'usage: prepare.py {command} ') and 'in_parallel' not in text
