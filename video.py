"""Exact frames from a video file, fast.

    with VideoReader('clip.mp4') as video:
        frames = video.get_batch([0, 8, 16])  # uint8 (3, H, W, 3), RGB

Needs PyAV and NumPy, and nothing else of this project.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
LENIENT = {}
if int(av.__version__.split('.')[0]) < 19:  # text that is not UTF-8, or new side data, would be an error
    LENIENT = {'metadata_errors': 'ignore'}
    SideDataType._missing_ = classmethod(lambda cls, value: cls.VIDEO_HINT)  # any that is not looked at


class VideoReader:
    """Random access to the frames of a file's best video stream (cover art does not count), on one thread.

    `get_batch([i, ...])` gives the i-th frames in presentation order, upright, whatever the container, the
    codec or the key frames: the same pixels as decoding everything from the start. If the
    stream changes its size midway, all frames get the size of the first one.

    If packets and frames map one to one, frames are counted without decoding, and reading starts at the last
    key frame after which nothing refers to anything before. This works for H.264 and HEVC (skipping pictures
    that are neither wanted nor referred to), VP8, VP9, AV1, and MPEG-4 without B-frames. Everything else is
    decoded from the start, to count and again to read; so is a file that turns out to be damaged. (If
    libavcodec misses damage, such as a lost packet, the frames that it patches up may differ.)

    Raises FileNotFoundError, other OSErrors, or ValueError for a file that is not a readable video. Other
    errors that PyAV raises for a damaged file pass through, on opening or on reading.

        stream  PyAV's video stream: its average_rate, colours, size
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._container, self.stream = open_video(self.path)
        self._reformatter = VideoReformatter()
        try:
            self._index = _index(self._container, self.stream)
        except (LookupError, av.FFmpegError):
            self._index = None
        self._pts = [*self._index.number] if self._index else [frame.pts for _, frame in self.decode()]
        if not self._pts:
            raise ValueError('no frames')

    def __len__(self) -> int:
        return len(self._pts)

    @property
    def group(self) -> float:
        """The average number of frames from one place where decoding can begin to the next."""
        return len(self) / len(np.unique(self._index.start)) if self._index else len(self)

    def __enter__(self) -> 'VideoReader':
        return self

    def __exit__(self, *exc_info) -> None:
        self.stream = None  # before the container: in the other order memory piles up slowly
        self._container.close()

    def times(self, indices: Sequence[int]) -> np.ndarray:
        """When frames `indices` are shown -> float64 (N,), in seconds after the first frame of the video."""
        steps = np.diff(np.array(self._pts, dtype=float) * float(self.stream.time_base))
        usual = float(1 / (self.stream.guessed_rate or 30))
        # AVI has the times of packets, not of pictures; sorted, they are right. After a larger step back,
        # time starts over; and elementary streams have no times (NaN).
        steps[~(steps > -17 * usual)] = usual
        times = np.sort(np.append(0, steps.cumsum()))
        return (times - times[0])[np.asarray(indices)]

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `indices` (any order, repeats allowed) -> uint8 (N, H, W, 3) RGB, in this order.

        Raises IndexError for frames that are not there, ValueError for one that cannot be decoded.
        """
        indices = np.asarray(indices, dtype=np.int64).tolist()
        frames = dict(self.frames(indices))
        return np.stack([frames[index] for index in indices])

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, frame) once for each of the frames `wanted`, in presentation order.

        `frame` is uint8 (H, W, 3) RGB, upright, contiguous. Raises what `get_batch` raises. The file has
        one position: finish or abandon one pass before the next.
        """
        missing = set(np.asarray(wanted, dtype=np.int64).tolist())
        if not missing or min(missing) < 0 or max(missing) >= len(self):
            raise IndexError(f'frames {sorted(missing)} asked of a video with {len(self)}')
        if self._index:
            yield from self._converted(self._decode_near(sorted(missing)), missing)
            if missing:
                self._index = None  # it promised what decoding did not deliver
        if missing:
            yield from self._converted(self.decode(), missing)
        if missing:
            raise ValueError(f'frame {min(missing)} of {len(self)} cannot be decoded')

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for all frames from the start, in presentation order, as PyAV gives them."""
        container, stream = open_video(self.path)  # not every container can seek back to its start
        try:
            yield from enumerate(container.decode(stream))
        finally:
            del stream  # see __exit__
            container.close()

    def _converted(self, decoded, missing: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read (number, frame) from `decoded` until none is `missing`; yield those that were, as arrays."""
        size = None
        for number, frame in decoded:
            if not size:  # where sizes change, decoding begins at frame 0
                size, lying = (frame.width, frame.height), turn(frame)[0]
            if number in missing:
                missing.remove(number)
                wanted = size if turn(frame)[0] == lying else size[::-1]
                rgb = self._reformatter.reformat(frame, *wanted, 'rgb24', threads=1).to_ndarray()
                yield number, upright(rgb, frame)
            if not missing:
                break

    def _decode_near(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for the `wanted` frames and others, decoded from the last start before each.

        Ends early if something does not fit the index or is damaged: how damage is patched up depends on
        everything that was decoded before.
        """
        index = self._index
        # If sizes differ, frames get that of frame 0, which is therefore decoded first.
        places = index.place[wanted if index.skip else [0, *wanted]]
        start_of = index.start[places]
        for start in np.unique(start_of).tolist():
            first, last, held = index.number[index.pts[start]], -1, []
            try:
                for frame in self._decode_group(start, set(places[start_of == start].tolist())):
                    number = index.number.get(frame.pts, last)
                    if number <= last or frame.is_corrupt or number == first and not frame.key_frame:
                        return
                    last = number
                    held.append((number, frame))
                    if len(held) > 16:  # a damaged one that it refers to can no longer be shown after it
                        yield held.pop(0)
            except av.FFmpegError:  # decoding from the start tells what is wrong
                return
            yield from held

    def _decode_group(self, start: int, needed: set[int]) -> Iterator[av.VideoFrame]:
        """Yield frames, decoding from the packet at place `start` on until all `needed` places have come."""
        codec, index = self.stream.codec_context, self._index
        place, last = start, max(needed)
        self._container.seek(index.seek[start], stream=self.stream)
        codec.flush_buffers()
        for packet in self._container.demux(self.stream):
            if packet.pts != index.pts[place]:
                if place == start:  # a packet before it
                    continue
                return
            # The decoder can drop a picture that nothing refers to; it must see all others.
            codec.skip_frame = 'DEFAULT' if place in needed else index.skip or 'DEFAULT'
            yield from codec.decode(packet)
            if place == last:
                break
            place += 1
        yield from codec.decode(None)


def turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """The flips that make a frame upright: across the diagonal, then upside down, then left to right.

    They follow from its display matrix. Most come from phones; FFmpeg 8.1 also makes one from a photo's EXIF.
    It takes a pixel at (x, y) to (a x + c y, b x + d y); the nearest of the eight orientations is used.
    """
    matrix = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels (H, W, ...) of a frame, turned and mirrored as it says."""
    across, upside_down, left_to_right = turn(frame)
    pixels = pixels.swapaxes(0, 1) if across else pixels
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if left_to_right else 1])


def local(path: str) -> str:
    """A path made safe for FFmpeg, which takes what is before a colon for a protocol: `clip:1.mp4`."""
    return os.path.join('.', path)


def open_video(path: str, **options: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A file, opened with FFmpeg's `options`, and its video stream. Raises what VideoReader raises."""
    try:
        container = av.open(local(path), options=options, **LENIENT)
    except av.FFmpegError as error:  # most are an OSError or a ValueError as well
        if isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(error.strerror) from None
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        raise ValueError('no video stream')
    best = container.streams.best('video')
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise ValueError('no decoder for its video stream')
    stream.codec_context.thread_count = 1  # a loader's workers are the parallelism
    return container, stream


# Which files can be read from the middle -----------------------------------------------------------------


class Index(NamedTuple):
    """Of a stream in which every frame is one packet. A place is a packet's number in the file, from 0."""

    pts: list[int]  # presentation time of each place
    seek: list[int]  # the time by which the demuxer finds it
    start: np.ndarray  # of each place: where decoding begins for it
    place: np.ndarray  # of each frame number
    number: dict[int, int]  # frame number of each presentation time
    skip: str | None  # for H.264 and HEVC of constant size: what the decoder may skip


def _index(container: av.container.InputContainer, stream: av.VideoStream) -> Index | None:
    """Read through the packets. Gives the index, or None unless decoding from the middle is sure to be exact.

    Packets are released once seen: all together they are the whole file. Raises LookupError for codecs that
    are not known here; that, or what PyAV raises, if something is damaged.
    """
    kind_of, skip = _kinds(container, stream)
    pts, seek, start, shown = [], [], [], []
    before = latest = -1  # the last two starts
    ended = False
    for packet in container.demux(stream):
        if ended and packet.size:
            return None
        ended = ended or not packet.size or packet.is_corrupt  # the last one of a truncated file
        if ended:
            continue
        kind = kind_of(packet)
        if kind is None or packet.pts is None or packet.is_discard or packet.has_sidedata('new_extradata'):
            return None
        if kind == STARTS or kind == OPENS and pts:
            if pts and packet.pts <= max(pts[latest:]):
                return None
            before, latest = latest, len(pts)
        if kind != HIDDEN:
            shown.append(len(pts))
        pts.append(packet.pts)
        seek.append(packet.pts if packet.dts is None else packet.dts)
        start.append(before if pts[-1] < pts[latest] else latest)
    if min(start, default=-1) < 0 or len(set(pts)) < len(pts):
        return None
    place = sorted(shown, key=pts.__getitem__)
    if not skip and place != shown:
        return None
    if stream.codec_context.name == 'hevc' and 'mp4' not in container.format.name:
        steps = np.diff(np.array(pts)[place])
        if len(steps) and steps.max() > 1.5 * np.median(steps):
            return None  # a packet may be lost, and libavcodec leaves out what refers to it
    number = {pts[place]: number for number, place in enumerate(place)}
    return Index(pts, seek, np.array(start), np.array(place), number, skip)


# Kinds of packets. After one that STARTS, nothing needs an earlier one; after one that OPENS, only pictures
# shown before it may. One that is HIDDEN is not shown, but others can refer to it.
HIDDEN, FOLLOWS, OPENS, STARTS = range(4)
SPLITTERS = {'vp8': 'null', 'vp9': 'vp9_superframe_split', 'av1': 'av1_frame_split'}


def _kinds(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[Callable, str | None]:
    """A function that gives a packet's kind, and the index's `skip`.

    It gives None for a packet that is not exactly one picture, or that changes what a start does not reset.
    """
    codec = stream.codec_context
    name, extradata = codec.codec.canonical_name, bytes(codec.extradata or b'')
    if name == 'mpeg4':
        return partial(_mpeg4, extradata, _mpeg4_coded(extradata)), None
    if name not in ('h264', 'hevc'):
        return partial(_kind, name, BitStreamFilterContext(SPLITTERS[name], stream)), None
    prefix, parameters = 0, extradata  # units come after start codes
    if container.format.name != 'mpegts':  # in MP4 and Matroska, after their lengths instead
        if extradata[0] != 1:  # as in AVI, which has no presentation times
            raise LookupError(container.format.name)
        at, picture = (4, b'\x65\x80') if name == 'h264' else (21, b'\x28\1')
        prefix = (extradata[at] & 3) + 1
        empty = av.Packet(len(picture).to_bytes(prefix, 'big') + picture)
        parameters = BitStreamFilterContext(f'{name}_mp4toannexb', stream).filter(empty)[0]
    parameters = [*_units(parameters, 0)]
    layers = _h264_layers(parameters) if name == 'h264' else _hevc_layers(parameters)
    if not layers:
        raise LookupError(name)
    look = _h264 if name == 'h264' else _hevc
    return partial(look, prefix, parameters), 'NONREF' if layers == 1 else 'DEFAULT'


def _kind(name: str, splitter: BitStreamFilterContext, packet: av.Packet) -> int | None:
    if name == 'vp8' and not memoryview(packet)[0] & 16:
        return HIDDEN
    if name in ('vp9', 'av1'):  # split a packet; pictures that are not shown have no time
        copy = av.Packet(bytes(packet))
        copy.pts = 0
        if sum(picture.pts is not None for picture in splitter.filter(copy)) != 1:
            return None
    return STARTS if packet.is_keyframe else FOLLOWS


def _mpeg4(extradata: bytes, coded: re.Pattern, packet: av.Packet) -> int | None:
    head, _, picture = bytes(packet).partition(b'\0\0\1\xb6')
    head = head[:-7] if head[-7:-3] == b'\0\0\1\xb3' else head  # without the time
    if head not in extradata or b'\0\0\1\xb6' in picture or not coded.match(_bits(picture[:16])):
        return None  # new parameters, two pictures, or an uncoded one, which stands for none
    return STARTS if packet.is_keyframe else FOLLOWS


def _h264(prefix: int, parameters: list[bytes], packet: av.Packet) -> int | None:
    """A key frame that is not an IDR picture can be followed by pictures that need earlier ones."""
    for unit in _units(packet, prefix):
        type = unit[0] & 31
        if type in (7, 8) and bytes(unit) not in parameters or type in (1, 5) and unit[1] < 128:
            return None  # new parameters, or a slice that is not the first of a picture
        if type in (1, 5):  # a slice, of an IDR picture
            return STARTS if type == 5 else FOLLOWS
        if type == 6:  # a message: film grain, rotation, or an early x264, whose bugs libavcodec imitates
            x264 = re.search(rb'x264 - core (\d+)', unit)
            if unit[1] in (0x13, 0x2F) or x264 and int(x264[1]) <= 33:
                return None
    return None


def _hevc(prefix: int, parameters: list[bytes], packet: av.Packet) -> int | None:
    kind = None
    for unit in _units(packet, prefix):
        type = unit[0] >> 1
        if unit[0] & 1 or unit[1] > 7:  # of another layer
            continue
        if type in (32, 33, 34) and bytes(unit) not in parameters or type == 39 and unit[2] in (0x13, 0x2F):
            return None  # new parameters, or a message as in H.264
        if type in (36, 37):  # the end of a sequence
            return None
        if type < 32 and kind is None:  # a slice: an IDR picture's, a CRA picture's, another's
            kind = {19: STARTS, 20: STARTS, 21: OPENS}.get(type, FOLLOWS)
            if unit[2] < 128 or type >= 16 and (kind == FOLLOWS or unit[2] & 64):
                return None  # not the first of a picture, or one before which some may not be shown
    return kind


def _units(data: bytes | av.Packet, prefix: int) -> Iterator[bytes | memoryview]:
    """The units of H.264 or HEVC, each after its length in `prefix` bytes, or after a start code (0)."""
    if not prefix:
        yield from filter(None, (unit.rstrip(b'\0') for unit in bytes(data).split(b'\0\0\1')[1:]))
        return
    data, at = memoryview(data), 0
    while at + prefix < len(data):
        size = int.from_bytes(data[at : at + prefix], 'big')
        if size:
            yield data[at + prefix : at + prefix + size]
        at += prefix + size


NUMBER = '(?:' + '|'.join(f'{"0" * n}1{"." * n}' for n in range(32)) + ')'  # Exp-Golomb: zeros tell how long


def _h264_layers(parameters: list[bytes]) -> int:
    """1 if the stream has a common profile, one size, and no pictures that are single fields; else 0.

    4:4:4 is not common: how libavcodec decodes it depends on the x264 version, which only the start names.
    """
    sets = [unit for unit in parameters if unit[0] & 31 == 7]
    if len(sets) != 1 or sets[0][1:2] not in (b'B', b'M', b'd', b'n', b'z'):
        return 0  # the profiles: Baseline, Main, High, High 10, High 4:2:2
    # The last three: again not 4:4:4, bits of luma and chroma, not lossless, no matrices
    high = f'(?!00100){NUMBER}{NUMBER}{NUMBER}00' if sets[0][1] >= 100 else ''
    # Its own number, digits of a picture's, order (one is rare, with a table), references, gaps, size, frames
    known = f'{NUMBER}{high}{NUMBER}(1{NUMBER}|011){NUMBER}.{NUMBER}{NUMBER}1'
    return int(bool(re.match(known, _bits(sets[0][4:].replace(b'\0\0\3', b'\0\0')))))


def _hevc_layers(parameters: list[bytes]) -> int:
    """The number of temporal layers; 0 unless the stream has one size and all pictures are to be shown."""
    sets = [unit for unit in parameters if unit[0] >> 1 == 33]
    pictures = [unit[2:].replace(b'\0\0\3', b'\0\0') for unit in parameters if unit[0] >> 1 == 34]
    # Their own number, their sequence's, dependent slices, whether some may not be shown
    known = all(re.match(f'{NUMBER}{NUMBER}.0', _bits(unit)) for unit in pictures)
    return (sets[0][2] >> 1 & 7) + 1 if known and len(sets) == 1 else 0


def _mpeg4_coded(extradata: bytes) -> re.Pattern:
    """The bits that begin a picture that is coded and no B-frame: its type, seconds, fractions, a 1.

    The header gives the number of bits of the fractions, after: two fields, version, pixel shape, control (of
    a buffer, too), a rectangle's mark.
    """
    header = '.{9}(0|1.{7})(1111.{16}|(?!1111).{4})(0|1...(0|1.{79}))001(.{16})'
    found = re.match(header, _bits(extradata.partition(b'\0\0\1\x20')[2]))
    if not found:
        raise LookupError('mpeg4')
    return re.compile(f'(0.|11)1*01.{{{max((int(found[5], 2) - 1).bit_length(), 1)}}}11')


def _bits(data: bytes) -> str:
    return ''.join(f'{byte:08b}' for byte in data)
