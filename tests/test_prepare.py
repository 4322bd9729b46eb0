"""Data is made ready: what is bad is named, copies keep names and colours, pictures show what was drawn."""

import contextlib
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
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, wait_for, write_video
from PIL import Image
from test_video import mux, packets_of

import data
import prepare
from runtime import command, distributed, sources
from video import VideoReader


@pytest.fixture(autouse=True)
def no_garbage():
    """Frames in it have threads, for which the end of a forked process would wait."""
    yield
    gc.collect()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with an empty one `in`."""
    monkeypatch.chdir(tmp_path)
    os.mkdir('in')
    return tmp_path


def ends_with(code, command):
    """Run a command that ends with an exit code."""
    with pytest.raises(SystemExit) as exit:
        prepare.main(command.split())
    assert exit.value.code == code


def write_frames(path, count, size=(96, 64), **options):
    """A file of one or several pictures, no two alike."""
    first, *others = (Image.new('RGB', size, (20 * i, 99, 200)) for i in range(1, count + 1))
    first.save(path, save_all=count > 1, append_images=others, **options)


def turn(path):
    """Turn a video on its side, as a telephone does: in the header of its track."""
    content = bytearray(Path(path).read_bytes())
    struct.pack_into('>5i', content, content.index(b'tkhd') + 44, 0, 1 << 16, 0, -1 << 16, 0)
    Path(path).write_bytes(content)


# check ----------------------------------------------------------------------------------------------------


def test_check_names_what_cannot_be_read_and_goes_on(folder):
    """Names need not be UTF-8, and take one line each."""
    os.mkdir('in/a')
    write_video('in/a/wide.mkv', num_frames=40, size=(96, 300), codec='mpeg4')
    turn(write_video('in/turned.mp4', num_frames=20))
    Image.new('RGB', (600, 9)).save('in/a.jpg')
    Image.new('RGB', (9000, 9)).save('in/thread.png')  # evaluation does not take it
    Path('in/torn.mp4').write_bytes(b'nothing' * 100)
    Path('in/end.jpg').write_bytes(Path('in/a.jpg').read_bytes()[:-200])
    strange = os.fsdecode(b'in/no utf \xff.mp4')
    Path(strange).write_bytes(b'nothing')
    Path('in/a\nb.mp4').write_bytes(b'nothing')
    process = Forked('prepare.py check in', folder)
    assert process.wait() == 1 and not process.err.read_bytes()
    said, *lines = os.fsdecode(process.out.read_bytes()).splitlines()
    assert said == 'in: 8 files, 5 of them unreadable, see bad_samples.txt'
    bad = [r'in/a\nb.mp4', 'in/end.jpg', strange, 'in/thread.png', 'in/torn.mp4']
    assert [line.split(': ')[0] for line in lines] == bad
    assert os.fsencode('\n'.join(lines)) == Path('bad_samples.txt').read_bytes().strip()


@pytest.mark.parametrize(
    ('dataset', 'names'),
    [
        (data.VideoDataset, ['1.mp4', '2.mp4', 'a.png', 'gone.mp4']),
        (data.ImageDataset, ['a.png', 'b.ppm', 'c.webp', '1.mp4']),
    ],
)
def test_check_reads_a_list_as_training_does(folder, capsys, dataset, names):
    """As one of videos or of images, whichever its first file is; a file that is there twice counts once."""
    for name in set(names) - {'gone.mp4'}:
        write_frames(name, 1) if sources.is_image(name) else write_video(name)
    Path('list.txt').write_text(''.join(f'{name} 0\n' for name in [*names, names[0]]))
    samples = dataset(sources.read_list('list.txt', videos=dataset is data.VideoDataset), 'val')
    bad = sorted(samples.files.path(i) for i in range(4) if samples[i].pixels is None)
    ends_with(1, 'check list.txt')
    assert f'4 files, {len(bad)} of them unreadable' in capsys.readouterr().out and names[-1] in bad
    assert [line.split(': ')[0] for line in Path('bad_samples.txt').read_text().splitlines()] == bad


def test_check_removes_no_file_that_it_did_not_make(folder):
    write_frames('a.gif', 3)
    os.symlink('/dev/null', 'device')
    Path('mine').write_text('of an earlier time')
    for out in ('device', 'mine', 'new'):
        prepare.main(['check', 'a.gif', '--out', out])
    assert os.path.islink('device') and Path('mine').read_text() == '' and not Path('new').exists()


def kill_or_read(name):
    if name == 'memory':
        raise MemoryError
    if name == 'exits':
        os._exit(0)
    if name in ('SIGSEGV', 'SIGKILL'):
        faulthandler.disable()  # pytest's, which writes at length
        os.kill(os.getpid(), getattr(signal, name))
    if name == 'sleeps':
        Path('started').touch()
        time.sleep(1000)


KILLED = 'its process died: a decoder crash, or out of memory'


@pytest.mark.parametrize('cores', [1, 3])
def test_files_that_kill_their_process_are_named_and_cost_no_other(monkeypatch, cores):
    monkeypatch.setattr(command, 'cores', lambda: cores)
    bad = ['SIGSEGV', 'exits', 'SIGKILL', 'exits']
    jobs = [(name,) for name in [*bad, *map(str, range(2000)), 'memory', *bad, 'last', 'SIGSEGV']]
    expected = [KILLED if name in bad else 'MemoryError' if name == 'memory' else '' for (name,) in jobs]
    assert list(prepare.in_parallel(kill_or_read, jobs, 'reading')) == list(zip(jobs, expected))
    assert not multiprocessing.active_children()


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
    'a.gif': {'codec': 'gif', 'pix_fmt': 'rgb8'},
    'progressive.jpg': {'progressive': True},
}


def read_damaged(path):
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # a process that hangs is killed
    with contextlib.suppress(av.FFmpegError, OSError, ValueError), VideoReader(path) as video:
        some = np.random.default_rng(0).integers(len(video), size=5)
        assert np.array_equal(video.get_batch(some), video.get_batch(some[::-1])[::-1])
    prepare.check_file(path, sources.is_image(path))


def test_damaged_files_neither_hang_nor_crash(tmp_path):
    """Nor do they take memory without end, and asked for twice, a frame is the same."""
    rng, jobs = np.random.default_rng(0), []
    for name, options in WHOLE.items():
        path = tmp_path / name
        if sources.is_image(name):
            Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(path, **options)
        else:
            write_video(path, 25, **options)
        content = path.read_bytes()
        for number in range(6):
            start, length = int(rng.integers(len(content))), int(2 ** rng.uniform(0, 11))
            flipped = np.frombuffer(content, np.uint8).copy()
            flipped[rng.integers(len(content), size=length)] ^= 1 << rng.integers(8, dtype=np.uint8)
            middles = bytes(length), rng.bytes(length), b''
            damaged = [content[:start] + middle + content[start + length :] for middle in middles]
            jobs.append((str(tmp_path / f'{number}_{name}'),))
            Path(*jobs[-1]).write_bytes([*damaged, content[:start], flipped][number % 5])
    reasons = dict(prepare.in_parallel(read_damaged, jobs, 'reading'))
    assert '' in reasons.values() and 20 < sum(map(bool, reasons.values()))
    terms = KILLED, 'AssertionError', 'MemoryError', 'Cannot allocate memory'
    assert not {job: reason for job, reason in reasons.items() if reason.startswith(terms)}


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


@pytest.mark.parametrize(('quota', 'expected'), [('max 100000', 64), ('250000 100000', 3)])
def test_a_container_s_quota_counts(monkeypatch, quota, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    monkeypatch.setattr(distributed, 'open', lambda path: io.StringIO(quota), raising=False)
    assert distributed.cores() == expected


# encode ---------------------------------------------------------------------------------------------------


def test_encode_keeps_names_and_frames_and_goes_on_in_folders_with_a_colon(folder, capsys):
    os.makedirs('in:1/a b')
    write_video(folder / 'in:1/a b/wide.MKV', num_frames=40, size=(96, 300), codec='mpeg4')
    turn(write_video(folder / 'in:1/small.mp4', num_frames=20, size=(49, 67), pix_fmt='yuv444p'))
    Path('in:1/torn.mp4').write_bytes(b'nothing' * 100)
    os.makedirs('out:1/a b')
    Path('out:1/a b/wide.MKV.part').write_bytes(b'half')  # of a run that was killed
    copies, times = ['out:1/a b/wide.MKV', 'out:1/small.mp4'], []
    for _ in range(2):
        ends_with(1, 'encode in:1 out:1 --short-side 64 --gop 8')
        assert 'in:1: 3 files, 1 of them unreadable, see out:1/bad' in capsys.readouterr().out
        assert Path('out:1/bad_samples.txt').read_text().startswith('in:1/torn.mp4: ')
        assert {*map(str, Path('out:1').rglob('*.*'))} == {*copies, 'out:1/bad_samples.txt'}
        times.append([os.stat(copy).st_mtime_ns for copy in copies])
    assert times[0] == times[1]
    for name, height, width, most in (('a b/wide.MKV', 64, 200, 6), ('small.mp4', 66, 48, 12)):
        with VideoReader(f'out:1/{name}') as copy, VideoReader(f'in:1/{name}') as video:
            assert len(copy) == len(video)
            before, after = (torch.from_numpy(v.get_batch([19])[0]).permute(2, 0, 1) for v in (video, copy))
            assert after.shape == (3, height, width)
            difference = after.float() - data.resize(before, height, width)
            assert difference.abs().mean() < most, name  # the noise of the second loses half of its colour
            keys = np.flatnonzero([frame.key_frame for _, frame in copy.decode()])
        assert keys.tolist() == [*range(0, len(copy), 8)]
        content = Path(f'out:1/{name}').read_bytes()
        assert content[4:8] == b'ftyp' and b' mbtree=0 ' in content  # an MP4, the same on all machines


def test_encode_makes_images_small_and_copies_what_is_small(folder):
    y, x = np.mgrid[0:400, 0:601]
    picture = Image.fromarray(np.stack([y / 2, x / 3, (y + x) / 8], 2).astype(np.uint8))
    picture.convert('RGBA').save('in/wide.png')
    picture.crop((0, 0, 80, 100)).save('in/small.png')
    write_frames('in/moves.gif', 3, (400, 400))
    for name, image, size in (('torn.jpg', picture, 5000), ('torn.png', Image.open('in/small.png'), 200)):
        image.save(f'in/{name}')
        os.truncate(f'in/{name}', size)
    ends_with(1, 'encode in out')
    bad = [line.split(':')[0] for line in Path('out/bad_samples.txt').read_text().splitlines()]
    assert bad == ['in/torn.jpg', 'in/torn.png']
    assert Path('in/small.png').read_bytes() == Path('out/small.png').read_bytes()
    with Image.open('out/wide.png') as image, VideoReader('out/moves.gif') as video:
        assert (image.format, image.size, len(video)) == ('JPEG', (385, 256), 3)
    load = data.ImageDataset(None, 'val').load
    assert (load('out/wide.png', None).float() - load('in/wide.png', None)).abs().mean() < 2


def test_a_video_that_has_lost_its_end_is_named(folder, capsys):
    """Its header, which here comes first, still promises all of it."""
    whole = write_video('whole.mp4', num_frames=60, options={'g': '4'})
    mux('in/torn.mp4', whole, packets_of(whole), movflags='faststart')
    write_video('in/torn.avi', num_frames=60, codec='mjpeg', pix_fmt='yuvj420p')
    for name in ('torn.mp4', 'torn.avi'):
        shutil.copy(f'in/{name}', f'in/whole_{name}')
        os.truncate(f'in/{name}', os.path.getsize(f'in/{name}') // 2)
    for line in ('check in', 'encode in out'):
        ends_with(1, line)
        said = capsys.readouterr().out
        assert 'in: 4 files, 2 of them unreadable' in said
        assert re.search(r'^in/torn.mp4: cut off: [\d,]+ of at least [\d,]+ bytes', said, re.MULTILINE)
    with pytest.raises(ValueError, match='cut off'):
        VideoReader('in/torn.avi')  # so for training it is a bad sample as well
    assert sorted(os.listdir('out')) == ['bad_samples.txt', 'whole_torn.avi', 'whole_torn.mp4']


COLOURS = [(180, 60, 60), (60, 180, 60), (60, 60, 180), (200, 200, 40), (128,) * 3, (30,) * 3, (225,) * 3]
TAGGED = {  # codec, format, colour space, range; 2 and a range of 0 say nothing
    'unspecified': ('libx264', 'yuv420p', 2, 0),
    'BT.601': ('libx264', 'yuv420p', 5, 1),
    'BT.709': ('libx264', 'yuv420p', 1, 1),
    'BT.709 in full range': ('libx264', 'yuv420p', 1, 2),
    'BT.2020 in 10 bits': ('libx264', 'yuv420p10le', 9, 1),
    'RGB': ('libx264rgb', 'rgb24', 2, 0),
    'grey': ('ffv1', 'gray', 2, 0),
    'palette': ('gif', 'rgb8', 2, 0),
    'motion JPEG': ('mjpeg', 'yuvj420p', 2, 0),
    'turned': ('libx264', 'yuv420p', 1, 1),
}


@pytest.mark.parametrize('name', TAGGED)
def test_encode_keeps_colours(name, tmp_path):
    """The means of seven stripes and of the whole, with some noise, as flat colours round all one way."""
    codec, format, space, levels = TAGGED[name]
    ending = {'libx264': 'mp4', 'gif': 'gif'}.get(codec, 'mkv')
    source, target = str(tmp_path / f'a.{ending}'), str(tmp_path / 'b.mp4')
    stripes = np.repeat(np.array(COLOURS), 32, 0)[None].repeat(128, 0)  # (128, 7 * 32, 3)
    stripes = (stripes + np.random.default_rng(0).integers(-20, 21, (128, 224, 1))).astype(np.uint8)
    with av.open(source, 'w') as container:
        stream = container.add_stream(codec, 30, width=224, height=128)
        stream.pix_fmt, context = format, stream.codec_context
        context.colorspace, context.color_range = space, levels
        frame = av.VideoFrame.from_ndarray(stripes, 'rgb24')
        if format.startswith('yuv'):
            matrix = None if space == 2 else space
            frame = frame.reformat(format=format, dst_colorspace=matrix, dst_color_range=levels or None)
        container.mux([*stream.encode(frame), *stream.encode(None)])
    if name == 'turned':
        turn(source)
    prepare.encode_video(source, target, 256, 4, 21)
    with VideoReader(source) as video, VideoReader(target) as copy:
        difference = copy.get_batch([0])[0].astype(float) - video.get_batch([0])[0]
        frame = next(copy.decode())[1]
    assert [frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc] == [1] * 4  # BT.709
    difference = difference.swapaxes(0, 1) if name == 'turned' else difference
    assert np.abs(difference.mean((0, 1))).max() < 1
    assert np.abs(difference.reshape(128, 7, 32, 3)[:, :, 8:24].mean((0, 2))).max() < 2


def test_encode_keeps_the_colours_of_every_line_of_interlaced_video(tmp_path):
    """A 4:2:0 copy that is not interlaced would mix the colours of neighbouring lines."""
    flat = np.zeros((64, 96, 3), np.uint8)
    flat[::2], flat[1::2] = (200, 50, 50), (50, 50, 200)
    source, target = str(tmp_path / 'a.mkv'), str(tmp_path / 'b.mp4')
    with av.open(source, 'w') as container:
        stream = container.add_stream('mpeg2video', 25, {'flags': '+ildct+ilme', 'q': '2'})
        stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuv422p'
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(flat, 'rgb24').reformat(format='yuv422p')))
        container.mux(stream.encode(None))
    prepare.encode_video(source, target, 256, 4, 21)
    for path in (source, target):
        with VideoReader(path) as video:
            assert next(video.decode())[1].interlaced_frame == (path == source)
            assert np.abs(video.get_batch([0, 2]) - flat.astype(float)).mean() < 8, path


UNEVEN = np.cumsum([120 if i % 7 == 3 else 24 for i in range(20)]).tolist()  # in 1/600 s
HOURS, DAYS = ([*range(0, 200, 20), *range(600 * gap, 600 * gap + 200, 20)] for gap in (3700, 360_000))


@pytest.mark.parametrize(
    ('file', 'options'),
    [
        ('a.gif', dict(codec='gif', pix_fmt='rgb8', times=UNEVEN)),
        ('a.gif', dict(num_frames=1, codec='gif', pix_fmt='rgb8')),
        ('a.m2v', dict(codec='mpeg2video', options={'bf': '2'})),
        ('a.wmv', dict(codec='wmv2', size=(48, 64), times=UNEVEN)),
        ('a.avi', dict(num_frames=6, codec='mjpeg', pix_fmt='yuvj420p', times=range(0, 480, 80))),
        ('a.mkv', dict(size=(48, 64), times=HOURS)),
        ('a.mkv', dict(size=(48, 64), times=DAYS)),
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
        times = np.array(options.get('times', []))
        np.testing.assert_allclose(copy.times(order)[: len(times)], (times - times[:1]) / 600, atol=1e-3)


def test_encode_leaves_nothing_half_written_on_a_full_disk(folder, fails):
    write_video('in/a.mp4', num_frames=200, size=(128, 128))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file that grows beyond fails to be written
    try:
        line = fails(prepare.main, f'encode {folder}/in {folder}/out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'File too large' in line and 'out/' in line
    assert os.listdir(folder / 'out') == []


def encode_asleep(source, target, *settings):
    open(f'{target}.part', 'w')
    kill_or_read('sleeps')


def test_an_encode_has_its_folder_alone_and_ctrl_c_ends_it_in_one_line(folder):
    write_video('in/a.mp4', num_frames=5)
    code = "prepare.encode_file = test_prepare.encode_asleep\nprepare.main(['encode', 'in', 'out'])"
    process = in_another_process(code, folder)
    wait_for(Path('started').exists)
    with pytest.raises(ValueError, match='out is in use by another encode'):
        prepare.encode('in', 'out')
    process.kill(signal.SIGINT)  # as a terminal does, to its processes too
    assert process.wait() == 130 and process.out.read_text() == ''
    assert process.err.read_text() == 'prepare.py: stopped\n'
    assert os.listdir('out') == []
    prepare.encode('in', 'out')
    assert os.listdir('out') == ['a.mp4']


# show -----------------------------------------------------------------------------------------------------


def place(picture, pixels):
    """How far down a PNG shows uint8 (3, H, W) at its left edge."""
    pixels = pixels.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    shown = np.asarray(Image.open(picture))[:, 4 : 4 + width]
    return next((y for y in range(len(shown) - height) if (shown[y : y + height] == pixels).all()), None)


def test_show_draws_what_is_read_and_what_is_fed(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    prepare.main('show seen.png --size 64'.split())  # so that frames are drawn as they are
    assert capsys.readouterr().out == 'wrote seen.png\n'
    videos = sources.read_list('data/demo/video_train.txt', 'data/demo/videos_train', videos=True)
    images = sources.read_list('data/demo/image_train.txt', 'data/demo/images_train')
    dataset = data.VideoDataset(videos, size=64)
    with VideoReader(videos.path(0)) as video:
        first = data.sample_frames(len(video), rng=dataset.rng_for('augmentation', 0, 0))[0, :1]
        read = torch.from_numpy(video.get_batch(first)[0]).permute(2, 0, 1)
    photo, fed = data.to_tensor(Image.open(images.path(0))), data.ImageDataset(images, size=64)[0, 0].pixels
    places = [place('seen.png', pixels) for pixels in (read, dataset[0, 0].pixels[:, 0], photo, fed)]
    assert None not in places and places == sorted(places)


def test_show_draws_what_there_is_and_says_what_is_missing(folder, fails, capsys):
    ends_with(1, 'show a.png')
    assert capsys.readouterr().err.startswith('prepare.py: data/demo/video_train.txt: no such list')
    os.mkdir('in/a')
    os.mkdir('in/b')
    write_video('in/a/1.mp4', num_frames=20)
    Path('in/b/torn.mp4').write_bytes(b'nothing')
    prepare.main('show a.png --video-list in --size 56'.split())
    replaced = data.VideoDataset(sources.read_list('in', videos=True), size=56)[0, 1]
    assert replaced.path == 'in/a/1.mp4' and place('a.png', replaced.pixels[:, 0])
    os.remove('in/a/1.mp4')
    line = fails(prepare.main, f'show {folder}/b.png --video-list {folder}/in')
    assert line == f'prepare.py: {folder}/in: 11 samples in a row are unreadable'


def test_titles_are_whole_and_any_text_can_be_one(tmp_path):
    rows, heights = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], []
    for title in ('short', 'taken for ' * 40, 'x' * 300 + ' \u4e2d \udcff'):
        command.draw_rows(tmp_path / 'a.png', rows, [title], 8)
        heights.append(Image.open(tmp_path / 'a.png').height)
    assert heights[1] - heights[0] == 16 * 4 and heights[2] - heights[0] == 16 * 3


# demo and messages ----------------------------------------------------------------------------------------


def test_demo_set_is_made_of_real_files_and_reused(demo, capsys):
    folder = demo / 'data/demo'
    for name, count in (('video', 8 * 4), ('image', 4 * 10)):
        lines = (folder / f'{name}_train.txt').read_text().splitlines()
        files = [folder / f'{name}s_train' / line.split()[0] for line in lines]
        assert len(files) == count and all(path.stat().st_size > 500 for path in files)
        assert name == 'image' or all(b' mbtree=0 ' in path.read_bytes() for path in files)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    prepare.main(['demo', str(folder)])
    assert capsys.readouterr().out == f'reusing the set in {folder}\n'
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('check nowhere.txt', 'prepare.py: nowhere.txt: No such file or directory'),
        ('check data/demo --out nowhere/bad.txt', 'nowhere/bad.txt: cannot be written'),
        ('check data/demo/video_train.txt', 'others from all over data/demo/video_train.txt; --root'),
        ('encode nowhere out', 'nowhere: no videos or images below it'),
        ('encode data/demo data/../data/demo', 'data/../data/demo: the copy needs a folder of its own'),
        ('encode in out --crf 52', "argument --crf: '52' is not a whole number of at least 0, below 52"),
        ('demo data/demo/video_train.txt', 'Not a directory'),
        ('encode in out --gopp 2', 'unrecognized arguments: --gopp 2 (--help lists all flags)'),
        ('show nowhere/a.png', 'nowhere/a.png: cannot be written'),
    ],
)
def test_mistakes_are_one_line(demo, fails, command, message):
    line = fails(prepare.main, command, code=2 if 'argument' in message else 1)
    assert line.startswith('prepare.py') and message in line


def test_help(capsys):
    for name in ('demo', 'check', 'encode', 'show'):
        ends_with(0, f'{name} --help')
        assert capsys.readouterr().out.startswith(f'usage: prepare.py {name} ')
