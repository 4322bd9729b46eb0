"""Frames are exact: those that decoding everything from the start gives, whatever the file."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from conftest import ROOT, decode_all, write_video
from PIL import Image

from video import SPLITTERS, VideoReader, _units

REAL = Path(os.environ.get('OMNI_REAL', ROOT.parent / 'shared/real'))

VIDEOS = {
    'h264 with B-frames': ('a.mp4', dict(num_frames=70, options={'g': '16', 'bf': '3'})),
    'h264 with open GOPs': (
        'a.mp4',
        dict(num_frames=70, options={'x264-params': 'open-gop=1:keyint=12:bframes=3'}),
    ),
    'h264 with a pyramid and references': (
        'a.mkv',
        dict(num_frames=70, options={'g': '20', 'bf': '8', 'refs': '5'}),
    ),
    'h264 with intra refresh': (
        'a.mp4',
        dict(num_frames=60, options={'x264-params': 'intra-refresh=1:keyint=15'}),
    ),
    'h264 in slices': ('a.mp4', dict(num_frames=40, options={'g': '10', 'bf': '2', 'slices': '3'})),
    'h264 interlaced': ('a.mp4', dict(num_frames=40, options={'x264-params': 'interlaced=1:keyint=10'})),
    'h264 in a transport stream': ('a.ts', dict(num_frames=40, options={'g': '10'})),
    'h264 in AVI': ('a.avi', dict(num_frames=40, options={'g': '10'})),
    'h264 of one frame': ('a.mp4', dict(num_frames=1)),
    'h264 at a variable rate': (
        'a.mp4',
        dict(num_frames=30, times=np.cumsum([20 + 37 * (i % 3) for i in range(30)])),
    ),
    'h264 of odd size': ('a.mp4', dict(num_frames=20, size=(49, 67), pix_fmt='yuv444p')),
    'h264 without loss': ('a.mp4', dict(num_frames=40, options={'qp': '0', 'g': '10'})),
    'h264 in 10 bits': ('a.mp4', dict(num_frames=20, pix_fmt='yuv420p10le')),
    'h264 in grey': ('a.mp4', dict(num_frames=20, pix_fmt='gray')),
    'h264 with B-frames in AVI': ('a.avi', dict(num_frames=40, options={'bf': '3'})),
    'h264 in no container': ('a.h264', dict(num_frames=40, options={'bf': '2'})),
    'mpeg4 with B-frames': ('a.avi', dict(num_frames=40, codec='mpeg4', options={'g': '12', 'bf': '2'})),
    'mpeg2 in no container': ('a.m2v', dict(num_frames=40, codec='mpeg2video', options={'bf': '2'})),
    'mpeg2 in a program stream': (
        'a.mpg',
        dict(num_frames=40, codec='mpeg2video', size=(144, 176), options={'bf': '2'}),
    ),
    'wmv': ('a.wmv', dict(num_frames=40, codec='wmv2')),
    'wmv at a variable rate': (
        'a.wmv',
        dict(num_frames=30, codec='wmv2', times=np.cumsum([20 + 900 * (i % 9 == 5) for i in range(30)])),
    ),
    'vp8 at a variable rate': (
        'a.webm',
        dict(num_frames=30, codec='libvpx', times=np.cumsum([20 + 900 * (i % 9 == 5) for i in range(30)])),
    ),
    'mpeg4 with frames left out': ('a.avi', dict(num_frames=40, codec='mpeg4', times=range(0, 2400, 60))),
    'flash': ('a.flv', dict(num_frames=40, codec='flv1')),
    'not compressed': ('a.y4m', dict(num_frames=10, codec='wrapped_avframe')),
    'gif': ('a.gif', dict(num_frames=20, codec='gif', pix_fmt='rgb8', times=range(0, 1200, 60))),
}


def x265(parameters):
    return dict(
        num_frames=50,
        codec='libx265',
        size=(64, 64),
        options={'preset': 'veryfast', 'x265-params': f'log-level=none:{parameters}'},
    )


ALT_REF = {
    'g': '14',
    'auto-alt-ref': '1',
    'lag-in-frames': '25',
    'deadline': 'realtime',
    'cpu-used': '6',
    'b': '300000',
}
SVT = dict(num_frames=40, codec='libsvtav1', size=(64, 64))
FROM_THE_MIDDLE = {  # from the start they need not be decoded, the first time or later
    'h264': ('a.mp4', dict(num_frames=70, options={'g': '16', 'bf': '3'})),
    'h264 in MKV': ('a.mkv', dict(num_frames=70, options={'g': '16', 'bf': '3'})),
    'h264 in a transport stream': ('a.ts', dict(num_frames=70, options={'g': '16', 'bf': '3'})),
    'h264 4:2:2': ('a.mp4', dict(num_frames=70, options={'g': '16', 'bf': '3'}, pix_fmt='yuv422p10le')),
    'hevc with open GOPs': ('a.mp4', x265('keyint=12:bframes=4')),
    'hevc with open GOPs shorter than their B-frames': ('a.mkv', x265('keyint=3:min-keyint=1:bframes=8')),
    'hevc with closed GOPs in a transport stream': ('a.ts', x265('keyint=12:open-gop=0')),
    'hevc with leading pictures that can be decoded': ('a.mkv', x265('keyint=12:open-gop=0:radl=2')),
    'hevc with parameters in every key frame': ('a.mp4', x265('keyint=12:repeat-headers=1:slices=2')),
    'hevc in temporal layers': ('a.mp4', x265('keyint=16:temporal-layers=3')),
    'vp9': ('a.webm', dict(num_frames=40, codec='libvpx-vp9', options=ALT_REF)),
    'vp9 in MP4': (
        'a.mp4',
        dict(num_frames=40, codec='libvpx-vp9', options={'g': '9', 'error-resilient': '1'}),
    ),
    'vp8': ('a.webm', dict(num_frames=40, codec='libvpx', options=ALT_REF)),
    'av1': ('a.mp4', {**SVT, 'options': {'preset': '9', 'svtav1-params': 'keyint=12'}}),
    'av1 with film grain': (
        'a.mkv',
        {**SVT, 'options': {'preset': '9', 'svtav1-params': 'keyint=12:film-grain=30'}},
    ),
    'mpeg4 in AVI': (  # on one thread some pictures have five bytes
        'a.avi',
        dict(num_frames=40, codec='mpeg4', options={'g': '12', 'threads': '1'}),
    ),
    'mpeg4 in MP4': ('a.mp4', dict(num_frames=40, codec='mpeg4', options={'g': '12'})),
}
VIDEOS |= FROM_THE_MIDDLE


def check(path, expected):
    """One reader gives the `expected` frames, again and again, whatever was asked before."""
    rng = np.random.default_rng(0)
    count = len(expected)
    with VideoReader(path) as video:
        assert len(video) == count
        for indices in (
            [count - 1],
            [0],
            [count - 1, 0, count // 2, count // 2],
            *rng.integers(0, count, (6, 5)),
            *np.array_split(rng.permutation(count), -(-count // 3)),
            range(count),
        ):
            frames = video.get_batch(indices)
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, expected[indices])


def copy_packets(source, target, change=lambda number, packet: packet, **options):
    """A file with the packets of the video `source`, each as `change` gives it back, or without it."""
    with av.open(str(source)) as container, av.open(str(target), 'w', options=options) as copy:
        stream = copy.add_stream_from_template(container.streams.video[0], opaque=True)
        packets = (packet for packet in container.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            if changed := change(number, packet):
                changed.stream = stream
                copy.mux(changed)


def with_content(packet, content):
    """A packet that is like another one but for its bytes."""
    new = av.Packet(content)
    new.pts, new.dts, new.time_base, new.is_keyframe = (
        packet.pts, packet.dts, packet.time_base, packet.is_keyframe,
    )  # fmt: skip
    return new


@pytest.mark.parametrize('name', VIDEOS)
def test_frames_equal_decoding_from_the_start(name, tmp_path, monkeypatch):
    """Of those that are read from the middle, each group that is needed, and one before it at most, the first
    time and later."""
    file, options = VIDEOS[name]
    path = write_video(tmp_path / file, **options)
    expected = decode_all(path)
    decode_group, decoded = VideoReader._decode_group, []

    def counted(self, *args):
        for frame in decode_group(self, *args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(VideoReader, '_decode_group', counted)
    if name in FROM_THE_MIDDLE:
        monkeypatch.setattr(VideoReader, 'decode', lambda self: pytest.fail('decoded from the start'))
    check(path, expected)
    with VideoReader(path) as video:
        times = np.array(options.get('times', np.arange(len(video)) * 20)) / 600
        np.testing.assert_allclose(video.times(range(len(video))), times - times[0], atol=2e-3)
        for index in range(len(expected)) if name in FROM_THE_MIDDLE else ():
            decoded.clear()
            np.testing.assert_array_equal(video.get_batch([index]), expected[[index]])
            assert 0 < len(decoded) <= 34


@pytest.mark.parametrize(
    'name',
    [
        'odd/yes.mkv',
        'videos/Biking/v_Biking_g01_c04.avi',
        'videos/WallPushups/v_WallPushups_g01_c04.avi',  # B-frames are packed with others
    ],
)
def test_frames_of_real_files(name):
    if not (REAL / name).exists():
        pytest.skip(f'no {REAL / name}')
    expected = {}
    with av.open(str(REAL / name)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 31 in (0, 17):
                expected[number] = frame.to_ndarray(format='rgb24')
    with VideoReader(REAL / name) as video:
        assert len(video) == number + 1
        for indices in ([*expected][::-1], [*expected][1::2]):
            np.testing.assert_array_equal(video.get_batch(indices), [expected[index] for index in indices])


@pytest.mark.quick
def test_decode_gives_every_frame_to_whoever_encodes_them(tmp_path):
    path = write_video(tmp_path / 'a.mp4', num_frames=40, options={'g': '10', 'bf': '2'})
    expected = decode_all(path)
    with VideoReader(path) as video:
        assert (video.stream.average_rate, video.stream.width, video.stream.height) == (30, 64, 48)
        for place, (number, frame) in enumerate(video.decode()):
            assert number == place
            np.testing.assert_array_equal(frame.to_ndarray(format='rgb24'), expected[number])
            if number % 15 == 0:  # other frames can be had meanwhile
                np.testing.assert_array_equal(video.get_batch([35, 3]), expected[[35, 3]])
        assert number == 39


# ----------------------------------------------------------------------------------------------------------
# What containers say: turned pictures, cuts, covers
# ----------------------------------------------------------------------------------------------------------

TURNS = {  # what a track header's matrix (a, b, c, d) makes of a picture
    'by 90 degrees': ((0, 1, -1, 0), lambda x: np.rot90(x, -1, axes=(1, 2))),
    'by 180 degrees': ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, axes=(1, 2))),
    'by 270 degrees': ((0, -1, 1, 0), lambda x: np.rot90(x, 1, axes=(1, 2))),
    'left to right': ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    'upside down': ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    'across the diagonal': ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
    'across the other diagonal': ((0, -1, -1, 0), lambda x: x[:, ::-1, ::-1].swapaxes(1, 2)),
}


@pytest.mark.parametrize('turn', TURNS)
def test_turned_video_comes_upright(turn, tmp_path):
    """As a telephone writes it, the front camera too: the track header says how to show the picture."""
    (a, b, c, d), turned = TURNS[turn]
    path = tmp_path / 'a.mp4'
    write_video(path, num_frames=5)
    expected = turned(decode_all(path))
    content = bytearray(path.read_bytes())
    matrix = content.index(b'tkhd') + 44
    content[matrix : matrix + 20] = struct.pack('>5i', a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)
    check(path, expected)
    with VideoReader(path) as video:
        for _, frame in video.frames([0, 4]):
            assert frame.flags.c_contiguous and frame.flags.writeable


@pytest.mark.parametrize('orientations', [(6, 5, 8, 7), (1, 2, 3, 4), (8, 1, 6, 3)])
def test_photos_as_frames_come_upright(orientations, tmp_path):
    """Motion JPEG of a camera, whose EXIF is side data that older versions of PyAV do not know."""
    plain = write_video(tmp_path / 'plain.avi', num_frames=4, codec='mjpeg', pix_fmt='yuvj420p')

    def change(number, packet):
        exif, photo = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientations[number]
        Image.open(io.BytesIO(bytes(packet))).save(photo, 'JPEG', exif=exif)
        return with_content(packet, photo.getvalue())

    copy_packets(plain, tmp_path / 'a.avi', change)
    turns = {1: lambda x: x} | {o: turned for o, (_, turned) in zip((6, 3, 8, 2, 4, 5, 7), TURNS.values())}
    expected = []
    with av.open(str(tmp_path / 'a.avi')) as container:
        for orientation, frame in zip(orientations, container.decode(video=0)):
            alike = (orientation > 4) == (orientations[0] > 4)  # else it lies where the first one stands
            frame = frame.reformat(*((64, 48) if alike else (48, 64)), 'rgb24')
            expected.append(turns[orientation](frame.to_ndarray()[None])[0])
    if av.library_versions['libavcodec'] >= (62, 28):  # FFmpeg 8.1
        check(tmp_path / 'a.avi', np.stack(expected))
    with VideoReader(tmp_path / 'a.avi') as video:
        assert len(video.get_batch(range(4))) == 4


def test_frames_cut_off_by_an_edit_list(tmp_path):
    path = tmp_path / 'a.mp4'
    write_video(path, num_frames=40, options={'g': '30', 'bf': '2'})
    content = bytearray(path.read_bytes())
    entry = content.index(b'elst') + 12  # after type, version and flags, and the number of entries: one
    duration, start, rate = struct.unpack('>Iii', content[entry : entry + 12])
    with av.open(str(path)) as container:
        per_frame = round(container.streams.video[0].duration / 40)
    content[entry : entry + 12] = struct.pack('>Iii', duration, start + 13 * per_frame, rate)
    path.write_bytes(content)
    expected = decode_all(path)
    assert len(expected) == 27
    check(path, expected)


def add_cover(container):
    picture = container.add_stream('mjpeg', rate=1)
    picture.width, picture.height, picture.pix_fmt = 32, 32, 'yuvj420p'
    picture.disposition = Disposition.attached_pic.value
    frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format='rgb24')
    return [*picture.encode(frame), *picture.encode(None)]


def test_a_cover_is_no_video(tmp_path):
    path, plain = tmp_path / 'cover.mp4', write_video(tmp_path / 'a.mp4', num_frames=20)
    with av.open(str(path), 'w') as container, av.open(plain) as source:
        cover = add_cover(container)
        stream = container.add_stream_from_template(source.streams.video[0])
        container.mux(cover)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    content = path.read_bytes()
    moov, trak, udta = (content.index(name) - 4 for name in (b'moov', b'trak', b'udta'))
    size = struct.unpack('>I', content[udta : udta + 4])[0]  # the box with the cover, now before the video's
    path.write_bytes(
        content[:trak] + content[udta : udta + size] + content[trak:udta] + content[udta + size :]
    )
    with av.open(str(path)) as container:
        assert moov < trak < udta and container.streams.video[0].disposition & Disposition.attached_pic
    check(path, decode_all(plain))


@pytest.mark.parametrize('best', [0, 1])
@pytest.mark.parametrize('ending', ['mp4', 'mkv'])
def test_the_best_of_several_videos(ending, best, tmp_path):
    """As FFmpeg has it: the one that is marked."""
    path = tmp_path / f'both.{ending}'
    paths = [write_video(tmp_path / f'{n}.mp4', 20 + n) for n in range(2)]
    with av.open(str(path), 'w') as both, av.open(paths[0]) as first, av.open(paths[1]) as second:
        streams = [both.add_stream_from_template(source.streams.video[0]) for source in (first, second)]
        streams[0].disposition, streams[1].disposition = 1 - best, best  # 1: the default
        for source, stream in zip((first, second), streams):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    both.mux(packet)
    check(path, decode_all(paths[best]))
    path.write_bytes(
        path.read_bytes().replace(b'avc1', b'xyz1').replace(b'V_MPEG4/ISO/AVC', b'V_XXXX4/ISO/AVC')
    )
    with pytest.raises(ValueError, match='no decoder'):
        VideoReader(path)


def test_a_song_with_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / 'song.mp3'), 'w') as container:
        stream = container.add_stream('mp3', rate=44100)
        container.mux(add_cover(container))
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), 'fltp', 'mono')
            frame.sample_rate, frame.pts = 44100, 1152 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match='no video stream'):
        VideoReader(tmp_path / 'song.mp3')


# ----------------------------------------------------------------------------------------------------------
# H.264 that cannot be read from the middle
# ----------------------------------------------------------------------------------------------------------


def write_cuts(path, options):
    """Another scene every five frames, still on a chessboard's white fields, moving on the black ones."""
    black = np.indices((96, 128)).sum(0) // 16 % 2 == 1
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 128, 'yuv420p'
        for i in range(60):
            scene = np.random.default_rng(i // 5).integers(0, 256, (24, 52, 3), dtype=np.uint8)
            scene = scene.repeat(4, axis=0).repeat(4, axis=1)
            picture, moved = scene[:, :128].copy(), scene[:, 3 * (i % 5) :][:, :128]
            picture[black] = moved[black]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode(None))


def decode_on_one_thread(path):
    """Where the note is wrong, as here, errors are patched, differently on each number of threads."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])


@pytest.mark.parametrize('build', [142, 33])
def test_what_early_x264_wrote(build, tmp_path):
    """Its mistakes are made again in decoding, if the note at the start of the file has been seen."""
    path = tmp_path / 'a.mp4'
    if build == 142:  # 4:4:4 in blocks of 8x8, until 2017
        options = {'g': '12', 'bf': '0', 'crf': '35', 'x264-params': '8x8dct=1'}
        write_video(path, num_frames=40, size=(128, 160), options=options, pix_fmt='yuv444p')
    else:  # directly predicted pictures between others of that kind, until 2005
        write_cuts(path, {'g': '15', 'x264-params': 'scenecut=0:direct=spatial:bframes=3:b-adapt=0:crf=20'})
    before, content = decode_on_one_thread(path), path.read_bytes()
    at = content.index(b'x264 - core ') + len(b'x264 - core ')
    path.write_bytes(content[:at] + f'{build:03}'.encode() + content[at + 3 :])
    expected = decode_on_one_thread(path)
    assert (before != expected)[20:].any()  # the note matters, in later groups too
    with VideoReader(path) as video:
        later = np.arange(20, len(expected))  # asked first: the decoder has not seen the note yet
        np.testing.assert_array_equal(video.get_batch(later), expected[later])
    check(path, expected)


@pytest.mark.parametrize('repeated', [True, False])
def test_parameters_that_change_midway(repeated, tmp_path):
    """Two streams as one: the second one's parameters, its size among them, come with its first picture."""
    first = write_video(tmp_path / 'first.mkv', num_frames=20, options={'g': '5'})
    second = write_video(tmp_path / 'second.mkv', num_frames=20, size=(80, 48), options={'g': '5', 'bf': '0'})
    with av.open(second) as container:
        extradata = bytes(container.streams.video[0].codec_context.extradata)
        pictures = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    size = int.from_bytes(extradata[6:8], 'big')
    sps, pps = extradata[8 : 8 + size], extradata[8 + size + 3 :]
    pps = pps[: int.from_bytes(extradata[8 + size + 1 : 8 + size + 3], 'big')]
    parameters = b''.join(len(unit).to_bytes(4, 'big') + unit for unit in (sps, pps))

    def change(number, packet):
        if number < 10:
            return packet
        new = number == 10 or repeated and number % 5 == 0
        return with_content(packet, parameters * new + pictures[number - 10])

    copy_packets(first, tmp_path / 'both.mkv', change)
    with av.open(str(tmp_path / 'both.mkv')) as container:
        expected = [
            frame.reformat(64, 48, 'rgb24').to_ndarray()  # all come in the size of the first
            for frame in container.decode(video=0)
        ]
    check(tmp_path / 'both.mkv', np.stack(expected))


@pytest.mark.parametrize('codec', ['libx264', 'libx265'])
def test_a_size_that_changes_midway(codec, tmp_path):
    options = {'g': '8', 'x265-params': 'log-level=none'}
    write_video(tmp_path / 'a.ts', 20, codec, (64, 64), options)
    write_video(tmp_path / 'b.ts', 20, codec, (64, 96), options)
    path = tmp_path / 'both.ts'
    path.write_bytes(b''.join((tmp_path / name).read_bytes() for name in ('a.ts', 'b.ts')))
    with av.open(str(path)) as container:
        expected = [frame.reformat(64, 64, 'rgb24').to_ndarray() for frame in container.decode(video=0)]
    assert len(expected) == 40
    check(path, np.stack(expected))
    with VideoReader(path) as video:  # the second part's times begin anew, too
        np.testing.assert_allclose(video.times([0, 19, 20, 39]), np.array([0, 19, 20, 39]) / 30, atol=0.1)


# ----------------------------------------------------------------------------------------------------------
# What the other codecs' packets can be
# ----------------------------------------------------------------------------------------------------------


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize(
    ('stated', 'name'),
    [(0, 'vp8'), (0, 'vp9'), (1, 'av1'), (1, 'mpeg4 in AVI'), (0, 'hevc with parameters in every key frame')],
)
def test_key_frames_of_another_size(name, stated, tmp_path):
    """Two streams as one: whichever size the container states, all have the first frame's."""
    file, options = FROM_THE_MIDDLE[name]
    paths = [
        write_video(tmp_path / f'{number}{file}', **{**options, 'size': size})
        for number, size in enumerate([(64, 64), (80, 96)])
    ]
    first, second = map(packets_of, paths)
    shift = first[-1].pts + first[-1].duration - second[0].pts
    for packet in second:
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
    every = iter([*first, *second])
    with av.open(paths[stated]) as source, av.open(str(tmp_path / file), 'w') as both:
        stream = both.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in every:
            packet.stream = stream
            both.mux(packet)
    with av.open(str(tmp_path / file)) as container:
        frames = [*container.decode(video=0)]
        assert [(frame.width, frame.height) for frame in frames[::50]] == [(64, 64), (96, 80)]
        expected = [frame.reformat(64, 64, 'rgb24').to_ndarray() for frame in frames]
    with VideoReader(tmp_path / file) as video:
        np.testing.assert_array_equal(video.get_batch([60]), expected[60:61])  # asked first
    check(tmp_path / file, np.stack(expected))


def test_hevc_with_a_lost_packet(tmp_path):
    """The decoder then leaves out others too, without a word."""
    path = write_video(tmp_path / 'a.mkv', **x265('keyint=12:bframes=4'))
    lengths = set()
    for lost in range(13, 24):
        copy_packets(path, tmp_path / 'b.mkv', lambda n, packet, lost=lost: None if n == lost else packet)
        with VideoReader(tmp_path / 'b.mkv') as video:
            lengths.add(len(video))
            assert len(video) == len(decode_all(tmp_path / 'b.mkv'))
    assert min(lengths) < 49


@pytest.mark.parametrize('name', ['vp9 in MP4', 'av1', 'hevc with open GOPs', 'mpeg4 in MP4'])
def test_key_frames_that_are_none(name, tmp_path):
    """What the container says of key frames is not taken for granted."""
    file, options = FROM_THE_MIDDLE[name]
    path = write_video(tmp_path / file, **options)

    def change(number, packet):
        packet.is_keyframe |= number % 3 == 0
        return packet

    copy_packets(path, tmp_path / f'flagged{file}', change)
    check(tmp_path / f'flagged{file}', decode_all(path))


@pytest.mark.parametrize('name', ['vp8', 'vp9', 'av1'])
def test_pictures_that_are_not_shown_and_some_that_are_shown_again(name, tmp_path, monkeypatch):
    """VP8's are packets of their own, VP9's are in others' (the muxer sees to it), and so should AV1's be."""
    file, options = FROM_THE_MIDDLE[name]
    path, unshown = write_video(tmp_path / 'a.mkv', **options), 0
    with av.open(path) as source, av.open(str(tmp_path / file), 'w') as copy:
        stream = copy.add_stream_from_template(source.streams.video[0], opaque=True)
        splitter = BitStreamFilterContext(SPLITTERS[name], source.streams.video[0])
        for number, packet in enumerate(packets_of(path)):
            parts = [*map(bytes, splitter.filter(with_content(packet, bytes(packet))))]
            unshown += len(parts) - 1
            if name == 'vp8' and number % 7 == 5:
                parts = [bytes([parts[0][0] & ~16]) + parts[0][1:]]  # no longer shown
                unshown += 1
            if name == 'vp9' and number % 7 == 5:
                parts.append(b'\x88')  # the first of the eight that are kept
            for place, content in enumerate(parts):
                part = with_content(packet, content)
                part.pts = part.dts = 40 * number + place
                part.is_keyframe &= place == 0
                part.stream = stream
                copy.mux(part)
    expected = decode_all(tmp_path / file)
    assert unshown > 2
    if name != 'av1':
        assert len(packets_of(tmp_path / file)) == len(expected) + unshown * (name == 'vp8')
        monkeypatch.setattr(VideoReader, 'decode', lambda self: pytest.fail('decoded from the start'))
    check(tmp_path / file, expected)


@pytest.mark.parametrize('more', [b'', b'\x7f' * 15])
def test_mpeg4_pictures_that_stand_for_none(more, tmp_path):
    path = write_video(tmp_path / 'a.mp4', 40, 'mpeg4', options={'g': '12'})

    def change(number, packet):
        if number % 5 != 3:
            return packet
        bits = f'0101{number % 30:05b}1001111'  # predicted, no second begins, the time, not coded
        return with_content(packet, b'\0\0\1\xb6' + int(bits, 2).to_bytes(2, 'big') + more)

    copy_packets(path, tmp_path / 'b.mp4', change)
    expected = decode_all(tmp_path / 'b.mp4')
    assert len(expected) == 32
    check(tmp_path / 'b.mp4', expected)


@pytest.mark.parametrize(
    'reason', ['no output of earlier ones', 'the end of a sequence', 'begins in the middle']
)
def test_hevc_pictures_that_are_dropped(reason, tmp_path):
    """By an IDR picture that says so, or as they lead one that begins a sequence and need earlier ones."""
    closed = reason == 'no output of earlier ones'
    path = write_video(tmp_path / 'a.mp4', **x265(f'keyint=12:bframes=4:open-gop={1 - closed}'))

    def change(number, packet):
        content = bytearray(packet)
        if closed and number == 24:  # length, type, and a slice that says it is the first of a picture
            assert content[4:7] == b'\x28\1\xaf'
            content[6] |= 0x40
        if reason == 'the end of a sequence' and number == 22:
            content += b'\0\0\0\2\x48\1'
        return with_content(packet, content) if closed or number > 10 or reason[0] == 't' else None

    copy_packets(path, tmp_path / 'b.mp4', change)
    expected = decode_all(tmp_path / 'b.mp4')
    assert len(expected) < len(packets_of(tmp_path / 'b.mp4'))
    check(tmp_path / 'b.mp4', expected)


@pytest.mark.parametrize('codec', ['libx264', 'libx265'])
def test_half_pictures(codec, tmp_path):
    """Slices in packets of their own; what is in the other half of a picture then, none can say."""
    options = {'g': '10', 'bf': '0', 'slices': '2'}
    options['x265-params'] = 'keyint=10:bframes=0:slices=2:log-level=none'
    path = write_video(tmp_path / 'a.mkv', 20, codec, (128, 64), options)
    halves = [(packet, bytes(unit)) for packet in packets_of(path) for unit in _units(packet, 4)]
    halves = [(packet, unit) for packet, unit in halves if unit[0] not in (0x06, 0x4E)]  # without messages
    with av.open(path) as source, av.open(str(tmp_path / 'b.mkv'), 'w') as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for number, (packet, unit) in enumerate(halves):
            half = with_content(packet, len(unit).to_bytes(4, 'big') + unit)
            half.pts, half.dts, half.stream = 20 * number, 20 * number, stream
            copy.mux(half)
    assert len(packets_of(tmp_path / 'b.mkv')) == 40
    with VideoReader(tmp_path / 'b.mkv') as video:
        assert len(video) == len(decode_all(tmp_path / 'b.mkv'))


def test_two_pictures_shown_in_one_packet(tmp_path):
    path = write_video(tmp_path / 'a.webm', 40, 'libvpx-vp9', options={'g': '10'})

    def change(number, packet):
        if number % 7 != 5:
            return packet
        sizes = b'\xc9' + len(bytes(packet)).to_bytes(2, 'little') + b'\1\0\xc9'
        return with_content(packet, bytes(packet) + b'\x88' + sizes)  # the first that is kept, once more

    copy_packets(path, tmp_path / 'b.webm', change)
    expected = decode_all(tmp_path / 'b.webm')
    assert len(expected) == 45
    check(tmp_path / 'b.webm', expected)


def test_a_key_frame_that_needs_the_header_before(tmp_path):
    """One of AV1 without the sequence header, which the others have."""
    file, options = FROM_THE_MIDDLE['av1']
    path = write_video(tmp_path / file, **options)

    def change(number, packet):
        content = bytes(packet)
        has_header = content[0] >> 3 == 1 and number > 0
        return with_content(packet, content[2 + content[1] :]) if has_header else packet

    copy_packets(path, tmp_path / f'b{file}', change)
    assert packets_of(path)[12].size > packets_of(tmp_path / f'b{file}')[12].size
    check(tmp_path / f'b{file}', decode_all(path))


@pytest.mark.parametrize('name', ['h264 in MKV', 'hevc with open GOPs', 'vp9', 'mpeg4 in MP4'])
@pytest.mark.parametrize('shift', [0, 16])
def test_times_that_do_not_fit(name, shift, tmp_path):
    """The same times again, or times between others'."""
    path = write_video(tmp_path / 'a.mkv', **{**FROM_THE_MIDDLE[name][1], 'num_frames': 26})
    packets = packets_of(path)
    with av.open(path) as source, av.open(str(tmp_path / 'b.mkv'), 'w') as copy:
        stream = copy.add_stream_from_template(source.streams.video[0], opaque=True)
        for number, packet in enumerate([*packets, *packets]):
            again = with_content(packet, bytes(packet))
            again.pts, again.dts, again.stream = (
                packet.pts + 200 + shift * (number >= len(packets)),
                number,
                stream,
            )
            copy.mux(again)
    expected = decode_all(tmp_path / 'b.mkv')
    assert len(expected) == 2 * len(packets)
    check(tmp_path / 'b.mkv', expected)


def test_a_capture_that_begins_between_key_frames(tmp_path):
    path = Path(write_video(tmp_path / 'a.ts', 30, options={'g': '10', 'bf': '2'}))
    path.write_bytes(path.read_bytes()[20 * 188 :])
    expected = decode_all(path)
    assert len(expected) == 20
    check(path, expected)


# ----------------------------------------------------------------------------------------------------------
# What is damaged, or no video
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_asking_for_frames_that_are_not_there(tmp_path):
    with VideoReader(write_video(tmp_path / 'a.mp4', num_frames=5)) as video:
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError, match='video with 5'):
                video.get_batch(indices)


def test_what_is_no_video(tmp_path):
    (tmp_path / 'text.mp4').write_text('not a video\n' * 100)
    (tmp_path / 'empty.mp4').touch()
    (tmp_path / 'start.mkv').write_bytes(Path(write_video(tmp_path / 'a.mkv')).read_bytes()[:20])
    for name in ('text.mp4', 'empty.mp4', 'start.mkv'):
        with pytest.raises((OSError, ValueError)):
            VideoReader(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        VideoReader(tmp_path / 'missing.mp4')


def test_a_video_without_a_decoder(tmp_path):
    path = tmp_path / 'a.mp4'
    write_video(path, num_frames=5)
    path.write_bytes(path.read_bytes().replace(b'avc1', b'xyz1'))
    with pytest.raises(ValueError, match='no decoder'):
        VideoReader(path)


def test_a_video_without_frame_rate(tmp_path):
    path = tmp_path / 'a.avi'
    write_video(path, codec='mpeg4')
    content = bytearray(path.read_bytes())
    rate = content.index(b'strh') + 32  # the stream header's frames per second
    content[rate : rate + 4] = bytes(4)
    path.write_bytes(content)
    check(path, decode_all(path))


@pytest.mark.parametrize('name', ['clip:1.mp4', 'subfile,a:b.mp4', '50%d?#.mp4'])
def test_a_file_is_a_file_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / 'a.mp4')
    os.rename('a.mp4', name)
    check(name, decode_all(tmp_path / name))


@pytest.mark.parametrize('ending', ['mp4', 'mkv'])
def test_a_title_that_is_not_utf8(ending, tmp_path):
    path = tmp_path / f'a.{ending}'
    with av.open(write_video(tmp_path / 'plain.mkv')) as source, av.open(str(path), 'w') as copy:
        copy.metadata['title'] = 'in Latin-1'
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    content = path.read_bytes()
    assert b'in Latin-1' in content
    path.write_bytes(content.replace(b'in Latin-1', b'\xe4\xf6\xfc Latin\xff'))
    check(path, decode_all(tmp_path / 'plain.mkv'))


def test_the_whole_part_of_a_cut_video_is_right(tmp_path):
    whole, path = write_video(tmp_path / 'whole.mp4', num_frames=60, options={'g': '6'}), tmp_path / 'a.mp4'
    copy_packets(whole, path, movflags='faststart')  # the index first
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with VideoReader(path) as video:
        assert 10 < len(video) < 60
        expected = decode_all(whole)[: len(video) - 4]  # the last ones may lack their references
        np.testing.assert_array_equal(video.get_batch(range(len(expected))), expected)


def test_a_promise_that_decoding_does_not_keep(tmp_path):
    """A later picture in the place of an earlier one, so that the decoder drops what comes too late."""
    whole, path = write_video(tmp_path / 'whole.mkv', 30, options={'g': '10', 'bf': '0'}), tmp_path / 'a.mkv'
    with av.open(whole) as container:
        later = [bytes(packet) for packet in container.demux(video=0)][28]
    copy_packets(whole, path, lambda number, packet: with_content(packet, later) if number == 24 else packet)
    with VideoReader(path) as video:
        for _ in range(2):
            with pytest.raises(ValueError, match=r'frame 2\d of 30 cannot be decoded'):
                video.get_batch(range(30))
            np.testing.assert_array_equal(video.get_batch([3]), decode_all(path)[[3]])


@pytest.mark.parametrize('damaged', [16, 22, 36, 51])
def test_damage_that_is_shown_later(damaged, tmp_path):
    """A B-frame refers to a later one, which is patched by what was decoded before, be it needed or not."""
    write_cuts(tmp_path / 'whole.mp4', {'x264-params': 'keyint=12:bframes=3'})

    def change(number, packet):
        return with_content(packet, bytes(packet)[:-30] + bytes(30)) if number == damaged else packet

    copy_packets(tmp_path / 'whole.mp4', tmp_path / 'a.mp4', change)
    expected = decode_on_one_thread(tmp_path / 'a.mp4')
    for index in range(damaged - 6, min(damaged + 18, len(expected))):
        with VideoReader(tmp_path / 'a.mp4') as video:
            np.testing.assert_array_equal(video.get_batch([index]), expected[[index]])


MEMORY = """
import re, sys
from video import SPLITTERS, VideoReader, _units
def most():
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
VideoReader(sys.argv[1])
before = most()
VideoReader(sys.argv[2])
print(most() - before)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc')
def test_opening_a_long_video_does_not_fill_the_memory(tmp_path):
    small, large = tmp_path / 'small.mp4', tmp_path / 'large.mp4'
    options = {'preset': 'ultrafast', 'qp': '1', 'g': '1'}
    write_video(small, num_frames=2, size=(720, 1280), options=options)
    with av.open(str(small)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][0]
    with av.open(str(small)) as container, av.open(str(large), 'w') as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        first = next(container.demux(video=0))
        for number in range(60_000_000 // len(packet)):
            again = with_content(first, packet)
            again.pts = again.dts = number * first.duration
            again.stream = stream
            copy.mux(again)
    result = subprocess.run(
        [sys.executable, '-c', MEMORY, small, large], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert large.stat().st_size > 50e6 and float(result.stdout) < 15  # MB
