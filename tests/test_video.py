"""Frames are exact: those that decoding everything from the start gives, whatever the file."""

import itertools
import os
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from conftest import decode_all, write_video

from runtime.headers import Bits, payload, units
from runtime.sources import VIDEO_ENDINGS
from video import VideoReader


def x264(parameters, num_frames=40, **more):
    return dict(num_frames=num_frames, options={'x264-params': parameters}, **more)


def x265(parameters):
    options = {'preset': 'veryfast', 'x265-params': f'log-level=none:{parameters}'}
    return dict(num_frames=50, codec='libx265', size=(64, 64), options=options)


def svt_av1(parameters):
    return dict(codec='libsvtav1', size=(64, 64), options={'svtav1-params': f'preset=9:{parameters}'})


def pauses(codec):
    return dict(num_frames=30, codec=codec, times=np.cumsum([20 + 900 * (i % 9 == 5) for i in range(30)]))


ALT_REF = {'g': '14', 'b': '300000', 'auto-alt-ref': '1', 'deadline': 'realtime', 'cpu-used': '6'}
FROM_THE_MIDDLE = {  # from the start they need not be decoded, the first time or later
    'h264': ('a.mp4', x264('keyint=16:bframes=3', 70)),
    'h264 in MKV': ('a.mkv', x264('keyint=16:bframes=3', 70)),
    'h264 4:2:2': ('a.mp4', x264('keyint=16:bframes=3', 70, pix_fmt='yuv422p10le')),
    'h264 with models of buffers': ('a.mp4', x264('keyint=9:nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900')),
    'hevc with open GOPs': ('a.mp4', x265('keyint=12:bframes=4')),
    'hevc with open GOPs shorter than their B-frames': ('a.mkv', x265('keyint=3:min-keyint=1:bframes=8')),
    'hevc with closed GOPs': ('a.mp4', x265('keyint=12:open-gop=0')),
    'hevc with leading pictures that can be decoded': ('a.mkv', x265('keyint=12:open-gop=0:radl=2')),
    'hevc with parameters in every key frame': ('a.mp4', x265('keyint=12:repeat-headers=1:slices=2')),
    'vp9': ('a.webm', dict(codec='libvpx-vp9', options=ALT_REF)),
    'vp9 in MP4': ('a.mp4', dict(codec='libvpx-vp9', options={'g': '9', 'error-resilient': '1'})),
    'vp8': ('a.webm', dict(codec='libvpx', options=ALT_REF)),
    'av1': ('a.mp4', svt_av1('keyint=12')),
    'av1 with film grain': ('a.mkv', svt_av1('keyint=12:film-grain=30')),
}
VIDEOS = {
    **FROM_THE_MIDDLE,
    'h264 with open GOPs': ('a.mp4', x264('open-gop=1:keyint=12:bframes=3', 70)),
    'h264 with a pyramid and references': ('a.mkv', x264('keyint=20:bframes=8:ref=5', 70)),
    'h264 with intra refresh': ('a.mp4', x264('intra-refresh=1:keyint=15', 60)),
    'h264 in slices': ('a.mp4', x264('keyint=10:bframes=2:slices=3')),
    'h264 interlaced': ('a.mp4', x264('interlaced=1:keyint=10')),
    'h264 at a variable rate': ('a.mp4', dict(times=np.cumsum([20 + 37 * (i % 3) for i in range(40)]))),
    'h264 with B-frames in AVI': ('a.avi', x264('keyint=10:bframes=3')),
    'h264 with B-frames in FLV': ('a.flv', x264('keyint=10:bframes=3')),
    'h264 in a transport stream': ('a.ts', x264('keyint=16:bframes=3', 70)),
    'hevc in temporal layers': ('a.mp4', x265('keyint=16:temporal-layers=3')),
    'mpeg4 in MP4': ('a.mp4', dict(codec='mpeg4', options={'g': '12'})),
    'mpeg4 with B-frames': ('a.avi', dict(codec='mpeg4', options={'g': '12', 'bf': '2'})),
    'mpeg4 with frames left out': ('a.avi', dict(codec='mpeg4', times=range(0, 2400, 60))),
    'vp8 at a variable rate': ('a.webm', pauses('libvpx')),
    'wmv at a variable rate': ('a.wmv', pauses('wmv2')),
}


def check(path, expected=None):
    """One reader gives the `expected` frames (else those of decoding from the start), again and again,
    whatever was asked before."""
    expected = decode_all(path) if expected is None else np.asarray(expected)
    rng, count = np.random.default_rng(0), len(expected)
    some = [count - 1], [0], [count - 1, 0, count // 2, count // 2], *rng.integers(0, count, (6, 5))
    with VideoReader(path) as video:
        assert len(video) == count
        for indices in (*some, *np.array_split(rng.permutation(count), -(-count // 3)), range(count)):
            frames = video.get_batch(indices)
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, expected[indices])
    return expected


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def mux(path, like, packets, **options):
    """A file with `packets` in a stream like the video of another file."""
    with av.open(str(like)) as source, av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    return path


def with_content(packet, content, time=None):
    """A packet that is like another one but for its bytes, and its time if given."""
    new = av.Packet(content)
    new.pts, new.dts = (packet.pts, packet.dts) if time is None else (time, time)
    new.time_base, new.is_keyframe = packet.time_base, packet.is_keyframe
    return new


@pytest.mark.parametrize('name', VIDEOS)
def test_frames_equal_decoding_from_the_start(name, tmp_path, monkeypatch):
    """Of those that are read from the middle, each group that is needed, and one before it at most."""
    file, options = VIDEOS[name]
    path = write_video(tmp_path / file, **options)
    if name in FROM_THE_MIDDLE:
        monkeypatch.setattr(VideoReader, 'decode', lambda self: pytest.fail('decoded from the start'))
    expected = check(path)
    with VideoReader(path) as video:
        times = np.array(options.get('times', np.arange(len(video)) * 20)) / 600
        np.testing.assert_allclose(video.times(range(len(video))), times - times[0], atol=2e-3)
        for index in range(len(expected)) if name in FROM_THE_MIDDLE else ():
            decoded = dict(video._decode_near([index]))
            np.testing.assert_array_equal(decoded[index].to_ndarray(format='rgb24'), expected[index])
            assert len(decoded) <= 34


# What containers say: turned pictures, cuts, covers ---------------------------------------------------------

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
    path = Path(write_video(tmp_path / 'a.mp4', num_frames=5))
    expected = turned(decode_all(path))
    content = bytearray(path.read_bytes())
    struct.pack_into('>5i', content, content.index(b'tkhd') + 44, a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)
    check(path, expected)


def test_frames_cut_off_by_an_edit_list(tmp_path):
    path = Path(write_video(tmp_path / 'a.mp4', num_frames=40, options={'g': '30', 'bf': '2'}))
    content = bytearray(path.read_bytes())
    start = content.index(b'elst') + 16  # after type, version, flags, the number of entries, a duration
    struct.pack_into('>i', content, start, (2 + 13) * 512)  # B-frames delay two; each lasts 512 / 15360 s
    path.write_bytes(content)
    assert len(check(path)) == 27


def test_the_best_of_several_videos(tmp_path):
    """As FFmpeg has it: the one that is marked as the default."""
    path = tmp_path / 'both.mkv'
    paths = [write_video(tmp_path / f'{n}.mp4', 20 + n) for n in range(2)]
    with av.open(str(path), 'w') as both, av.open(paths[0]) as first, av.open(paths[1]) as second:
        streams = [both.add_stream_from_template(source.streams.video[0]) for source in (first, second)]
        streams[0].disposition, streams[1].disposition = 0, Disposition.default
        for source, stream in zip(paths, streams):
            for packet in packets_of(source):
                packet.stream = stream
                both.mux(packet)
    check(path, decode_all(paths[1]))


def test_a_song_with_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / 'song.m4a'), 'w', format='mp4') as container:
        sound, cover = container.add_stream('aac', rate=44100), container.add_stream('mjpeg', rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, 'yuvj420p'
        cover.disposition = Disposition.attached_pic.value
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8), format='rgb24')
        container.mux([*cover.encode(picture), *cover.encode(None)])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
        frame.sample_rate = 44100
        container.mux([*sound.encode(frame), *sound.encode(None)])
    with pytest.raises(ValueError, match='no video stream'):
        VideoReader(tmp_path / 'song.m4a')


# H.264 that cannot be read from the middle ------------------------------------------------------------------


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


@pytest.mark.parametrize('build', [142, 33])
def test_what_early_x264_wrote(build, tmp_path):
    """Its mistakes are made again in decoding, if the note at the start of the file has been seen."""
    path = tmp_path / 'a.mp4'
    if build == 142:  # 4:4:4 in blocks of 8x8, until 2017
        options = {'g': '12', 'bf': '0', 'crf': '35', 'x264-params': '8x8dct=1'}
        write_video(path, num_frames=40, size=(128, 160), options=options, pix_fmt='yuv444p')
    else:  # directly predicted pictures between others of that kind, until 2005
        write_cuts(path, {'g': '15', 'x264-params': 'scenecut=0:direct=spatial:bframes=3:b-adapt=0:crf=20'})
    before = decode_all(path)
    path.write_bytes(re.sub(rb'(?<=x264 - core )\d{3}', b'%03d' % build, path.read_bytes(), count=1))
    expected = decode_all(path)
    assert (before != expected)[20:].any()  # the note matters, in later groups too
    with VideoReader(path) as video:
        later = np.arange(20, len(expected))  # asked first: the decoder has not seen the note yet
        np.testing.assert_array_equal(video.get_batch(later), expected[later])
    check(path, expected)


@pytest.mark.parametrize('repeated', [True, False])
def test_parameters_that_change_midway(repeated, tmp_path):
    """Two streams as one: the second one's parameters come with its first picture."""
    first = write_video(tmp_path / 'first.mkv', num_frames=20, options={'g': '5'})
    second = write_video(tmp_path / 'second.ts', num_frames=10, options={'g': '5', 'bf': '0', 'coder': '0'})
    packets = packets_of(first)
    for number, packet in enumerate(packets_of(second)):  # parameters come before its key frames: 0 and 5
        parts = [part.rstrip(b'\0') for part in bytes(packet).split(b'\0\0\1')[1:]]
        parts = [part for part in parts if number == 0 or repeated or part[0] & 31 not in (7, 8)]
        content = b''.join(len(part).to_bytes(4, 'big') + part for part in parts)
        packets[10 + number] = with_content(packets[10 + number], content)
    check(mux(tmp_path / 'both.mkv', first, packets))


# What the other codecs' packets can be ----------------------------------------------------------------------


@pytest.mark.parametrize('stated', [0, 1])
@pytest.mark.parametrize('name', ['vp8', 'vp9', 'av1', 'hevc with parameters in every key frame'])
def test_frames_that_change_size_are_refused(name, stated, tmp_path):
    """Two streams as one, whichever size the container states."""
    file, options = VIDEOS[name]
    sizes = (64, 64), (80, 96)
    paths = [write_video(tmp_path / f'{h}{file}', **options | {'size': (h, w)}) for h, w in sizes]
    first, second = map(packets_of, paths)
    shift = first[-1].pts + first[-1].duration - second[0].pts
    for packet in second:
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
    path = mux(tmp_path / file, paths[stated], [*first, *second])
    with pytest.raises(ValueError, match='its frames change size from 64x64 to 96x80'):
        video = VideoReader(path)
        video.get_batch([0, len(video) - 1])


@pytest.mark.parametrize('codec', ['h264', 'hevc'])
def test_a_lost_packet(codec, tmp_path):
    """HEVC's decoder then leaves out others too, without a word."""
    options = x264('keyint=12:bframes=4', 50) if codec == 'h264' else x265('keyint=12:bframes=4')
    path = write_video(tmp_path / 'a.mkv', **options)
    for lost in range(1, 24, 4):
        packets = packets_of(path)
        del packets[lost]
        check(mux(tmp_path / 'b.mkv', path, packets))


@pytest.mark.parametrize('name', ['vp8', 'vp9', 'av1'])
def test_pictures_that_are_not_shown_and_some_that_are_shown_again(name, tmp_path, monkeypatch):
    """VP8's are packets of their own, VP9's are in others' (the muxer sees to it), and so should AV1's be."""
    file, options = FROM_THE_MIDDLE[name]
    path, packets, unshown = write_video(tmp_path / 'a.mkv', **options), [], 0
    with av.open(path) as source:
        splitters = {'vp8': 'null', 'vp9': 'vp9_superframe_split', 'av1': 'av1_frame_split'}
        splitter = BitStreamFilterContext(splitters[name], source.streams.video[0])
    for number, packet in enumerate(packets_of(path)):
        parts = [*map(bytes, splitter.filter(with_content(packet, bytes(packet))))]
        unshown += len(parts) - 1
        if name == 'vp8' and number % 7 == 5:
            parts = [bytes([parts[0][0] & ~16]) + parts[0][1:]]  # no longer shown
            unshown += 1
        if name == 'vp9' and number % 7 == 5:
            parts.append(b'\x88')  # the first of the eight that are kept
        for place, content in enumerate(parts):
            packets.append(with_content(packet, content, 40 * number + place))
            packets[-1].is_keyframe &= place == 0
    expected = decode_all(mux(tmp_path / file, path, packets))
    assert unshown > 2
    if name == 'vp9':
        assert len(packets_of(tmp_path / file)) == len(expected)
        monkeypatch.setattr(VideoReader, 'decode', lambda self: pytest.fail('decoded from the start'))
    check(tmp_path / file, expected)


@pytest.mark.parametrize('reason', ['no output of earlier ones', 'end of a sequence', 'begins in the middle'])
def test_hevc_pictures_that_are_dropped(reason, tmp_path):
    """By an IDR picture that says so, or as they lead one that begins a sequence and need earlier ones."""
    is_open = int(reason != 'no output of earlier ones')
    path = write_video(tmp_path / 'a.mp4', **x265(f'keyint=12:bframes=4:open-gop={is_open}'))
    packets = packets_of(path)
    if reason == 'no output of earlier ones':
        content = bytearray(packets[24])
        assert content[4:7] == b'\x28\1\xaf'  # after the length: type, a slice that is the first of a picture
        content[6] |= 0x40
        packets[24] = with_content(packets[24], content)
    elif reason == 'end of a sequence':
        packets[22] = with_content(packets[22], bytes(packets[22]) + b'\0\0\0\2\x48\1')
    else:
        del packets[:11]
    assert len(check(mux(tmp_path / 'b.mp4', path, packets))) < len(packets)


@pytest.mark.parametrize('codec', ['libx264', 'libx265'])
def test_half_pictures(codec, tmp_path):
    """Slices in packets of their own; what is in the other half of a picture then, none can say."""
    options = {'g': '10', 'bf': '0', 'slices': '2'}
    options['x265-params'] = 'keyint=10:bframes=0:slices=2:log-level=none'
    path = write_video(tmp_path / 'a.mkv', 20, codec, (128, 64), options)
    halves = [(packet, bytes(unit)) for packet in packets_of(path) for unit in units(packet, 4)]
    halves = [(packet, unit) for packet, unit in halves if unit[0] not in (0x06, 0x4E)]  # without messages
    packets = [
        with_content(packet, len(unit).to_bytes(4, 'big') + unit, 20 * number)
        for number, (packet, unit) in enumerate(halves)
    ]
    assert len(packets) == 40
    path = mux(tmp_path / 'b.mkv', path, packets)
    with VideoReader(path) as video:
        assert len(video) == len(decode_all(path))


def test_two_pictures_shown_in_one_packet(tmp_path):
    path = write_video(tmp_path / 'a.webm', 40, 'libvpx-vp9', options={'g': '10'})
    packets = packets_of(path)
    for number in range(5, 40, 7):
        content = bytes(packets[number])
        sizes = b'\xc9' + len(content).to_bytes(2, 'little') + b'\1\0\xc9'
        packets[number] = with_content(packets[number], content + b'\x88' + sizes)  # the first that is kept
    assert len(check(mux(tmp_path / 'b.webm', path, packets))) == 45


TIMES = {  # of which the order is not that of the pictures
    'decoding times': sorted,
    'decoding times in a part': lambda times: [*times[:20], *sorted(times[20:32]), *times[32:]],
    'swapped': lambda times: [*times[:20], times[21], times[20], *times[22:]],
    'the same again': lambda times: [*times[:25], *times[:25]],
    'wrapped': lambda times: [time - 700 * (time >= 700) for time in times],
}


@pytest.mark.parametrize('times', TIMES)
@pytest.mark.parametrize('name', ['h264 in MKV', 'hevc with open GOPs', 'vp9'])
def test_times_that_lie(name, times, tmp_path):
    path = write_video(tmp_path / 'a.mkv', **{**FROM_THE_MIDDLE[name][1], 'num_frames': 50})
    packets = packets_of(path)
    new = TIMES[times]([packet.pts for packet in packets])
    for number, (packet, time) in enumerate(zip(packets, new)):
        packet.pts, packet.dts = time + 5000, number
    check(mux(tmp_path / 'b.mkv', path, packets))


def test_a_message_of_many_parts_costs_no_more_than_decoding(tmp_path):
    """Read bit by bit, these 300 kB would take 14 seconds."""
    path = write_video(tmp_path / 'a.mkv', num_frames=10)
    packets, unit = packets_of(path), b'\6' + b'\4\0' * 150_000 + b'\x80'
    packets[0] = with_content(packets[0], len(unit).to_bytes(4, 'big') + unit + bytes(packets[0]))
    check(mux(tmp_path / 'b.mkv', path, packets))


def test_a_stream_that_does_not_say_how_many_pictures_wait(tmp_path):
    """libavcodec learns it as it decodes, and drops pictures meanwhile: here more wait in the second half."""
    common, packets = 'keyint=30:ref=4:weightp=0:weightb=0:level=30:b-adapt=0:8x8dct=0', []
    for number, waits in enumerate(('bframes=15:b-pyramid=0', 'bframes=7:b-pyramid=2')):
        path = write_video(tmp_path / 'a.mkv', **x264(f'{common}:{waits}'))
        for packet in packets_of(path):
            packet.pts, packet.dts = packet.pts + 5000 + 2000 * number, len(packets)
            packets.append(packet)
    with av.open(path) as container:
        record = bytes(container.streams.video[0].codec_context.extradata)
    old = record[9 : 8 + record[7]]  # after the unit's type
    bits = Bits(payload(old))
    bits.take(24)  # profile, constraints, level
    bits.unsigned(5)
    bits.take(1)
    bits.unsigned(2)
    assert bits.take(4) == 0b1101  # frames, not cropped, and more: which is cut off
    kept = int.from_bytes(payload(old), 'big') >> bits.left + 1
    new = ((kept << 2 | 1) << bits.left - 1).to_bytes(len(payload(old)), 'big').rstrip(b'\0')
    path = mux(tmp_path / 'b.mkv', path, packets)
    path.write_bytes(path.read_bytes().replace(old, new.ljust(len(old), b'\0')))
    assert len(check(path)) < len(packets)


@pytest.mark.parametrize('codec', ['libx264', 'libx265'])
def test_a_rotation_in_the_second_of_two_messages(codec, tmp_path):
    """It stands at the start, and the later groups are turned as well."""
    path = write_video(tmp_path / 'a.mkv', 30, codec, (64, 64), {'g': '8', 'x265-params': 'keyint=8'})
    packets = packets_of(path)
    rotation = 0b000_0100000000000000_1_0000.to_bytes(3, 'big')  # no flips, 90 degrees, until further notice
    head = b'\6' if codec == 'libx264' else b'\x4e\1'
    unit = head + b'\5\x10' + bytes(range(1, 17)) + b'\x2f\3' + rotation + b'\x80'
    packets[0] = with_content(packets[0], len(unit).to_bytes(4, 'big') + unit + bytes(packets[0]))
    path = mux(tmp_path / 'b.mkv', path, packets)
    check(path, np.rot90(decode_all(path), 1, axes=(1, 2)))


# What is damaged, or no video -------------------------------------------------------------------------------


@pytest.mark.quick
def test_asking_for_frames_that_are_not_there(tmp_path):
    with VideoReader(write_video(tmp_path / 'a.mp4', num_frames=5)) as video:
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError, match='video with 5'):
                video.get_batch(indices)


def test_what_is_no_video(tmp_path):
    path, whole = tmp_path / 'a.mp4', Path(write_video(tmp_path / 'whole.mp4')).read_bytes()
    random = np.random.default_rng(0).bytes(10_000)
    for content in (b'', random, whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            VideoReader(path)
    path.write_bytes(whole.replace(b'avc1', b'xyz1'))
    with pytest.raises(ValueError, match='no decoder'):
        VideoReader(path)
    with pytest.raises(FileNotFoundError):
        VideoReader(tmp_path / 'missing.mp4')
    os.mkfifo(tmp_path / 'pipe.mp4')
    for name in (tmp_path / 'pipe.mp4', tmp_path, '/dev/zero'):
        with pytest.raises(ValueError, match='not a regular file'):
            VideoReader(name)


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('a.m3u8', '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nwhole.ts\n#EXT-X-ENDLIST\n'),
        ('b.mp4', "ffconcat version 1.0\nfile 'whole.ts'\n"),
        ('c.sdp', 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n'),
    ],
)
def test_what_leads_to_other_files_is_refused(name, content, tmp_path):
    write_video(tmp_path / 'whole.ts')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError):
        VideoReader(tmp_path / name)
    with pytest.raises(FileNotFoundError):  # a pattern of names
        VideoReader(tmp_path / 'who%ce.ts')


def test_every_kind_that_is_listed_is_opened(tmp_path):
    mpeg2, vp8 = {'codec': 'mpeg2video'}, {'codec': 'libvpx'}
    kinds = dict.fromkeys('mp4 mkv mov m4v avi ts flv 3gp nut h264'.split(), {})
    kinds |= {'mpg': mpeg2, 'mpeg': mpeg2, 'mxf': mpeg2, 'm2v': mpeg2, 'webm': vp8, 'ivf': vp8, 'ogv': vp8}
    kinds |= {'wmv': {'codec': 'wmv2'}, 'gif': {'codec': 'gif', 'pix_fmt': 'rgb8'}, 'hevc': x265('keyint=8')}
    kinds['y4m'] = {'codec': 'wrapped_avframe'}
    assert {ending.lstrip('.') for ending in VIDEO_ENDINGS} <= {*kinds}
    for ending, options in kinds.items():
        path = write_video(tmp_path / f'a.{ending}', **{'num_frames': 12, 'size': (144, 176), **options})
        with VideoReader(path) as video:
            assert len(video) == len(decode_all(path))


def test_a_frame_that_is_too_large(tmp_path):
    """Few bytes, and 676 MB to decode."""
    size, path = (13_000).to_bytes(2, 'little') * 2, tmp_path / 'a.gif'
    pixel = b'\x21\xf9\4\0\2\0\0\0\x2c' + bytes(4) + b'\1\0\1\0\0\2\2\x44\1\0'
    path.write_bytes(b'GIF89a' + size + b'\x80\0\0' + b'\0\0\0\xff\xff\xff' + 9 * pixel + b';')
    with pytest.raises(ValueError, match='13000x13000'):
        VideoReader(path)


def test_a_file_is_a_file_whatever_its_name_and_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = Path(write_video(tmp_path / 'a.mp4')).read_bytes()
    assert b'Lavf' in content
    for name in ('clip:1.mp4', 'subfile,a:b.mp4', '50%d?#.mp4'):
        Path(name).write_bytes(content.replace(b'Lavf', b'\xe4\xf6\xfc\xff'))  # not UTF-8
        check(name, decode_all(tmp_path / 'a.mp4'))


def test_a_promise_that_decoding_does_not_keep(tmp_path, monkeypatch):
    path, decode = write_video(tmp_path / 'a.mp4', 30, options={'g': '10', 'bf': '0'}), VideoReader.decode
    monkeypatch.setattr(VideoReader, 'decode', lambda self: itertools.islice(decode(self), 29))
    monkeypatch.setattr(VideoReader, '_decode_near', lambda self, wanted: iter(()))
    with VideoReader(path) as video:
        for _ in range(2):
            with pytest.raises(ValueError, match='only 29 of its 30 frames can be decoded'):
                video.get_batch([3])


@pytest.mark.parametrize('damaged', [16, 22, 36, 51])
def test_damage_that_is_shown_later(damaged, tmp_path):
    """A B-frame refers to a later one, which is patched by what was decoded before, be it needed or not."""
    whole, path = tmp_path / 'whole.mp4', tmp_path / 'a.mp4'
    write_cuts(whole, {'x264-params': 'keyint=12:bframes=3'})
    packets = packets_of(whole)
    packets[damaged] = with_content(packets[damaged], bytes(packets[damaged])[:-30] + bytes(30))
    expected = decode_all(mux(path, whole, packets))
    for index in range(damaged - 6, min(damaged + 18, len(expected))):
        with VideoReader(path) as video:
            np.testing.assert_array_equal(video.get_batch([index]), expected[[index]])
