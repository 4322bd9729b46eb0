"""Exact frames from a video file, fast.

    with VideoReader('clip.mp4') as video:
        frames = video.get_batch([0, 8, 16])  # uint8 (3, H, W, 3), RGB

Needs PyAV and NumPy, and nothing else of this project.
"""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class VideoReader:
    """Random access to the frames of a file's first video stream (cover art is none), on one thread.

    `get_batch([i, ...])` gives the i-th frames in presentation order, upright, whatever the container, the
    codec or the key frames: the same pixels as decoding everything from the start. All frames have the size
    of the first one, should the stream change its size midway.

    H.264 with an orderly index is read fast: seek to the last IDR picture (after which nothing refers to
    anything before) and decode from there, leaving out the pictures that are neither wanted nor referred to.
    Everything else, where packets and frames need not map one to one, is decoded from the start.

    Raises FileNotFoundError, other OSErrors, or ValueError for a file that is not a readable video. What else
    PyAV raises for a damaged one comes through, on opening or on reading.

        stream  PyAV's video stream: its average_rate, colours, size
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._container, self.stream = _open(self.path)
        self._reformatter = VideoReformatter()
        self._index = _index(self._container, self.stream)
        self._length = len(self._index.pts) if self._index else sum(1 for _ in self.decode())
        if not self._length:
            raise ValueError('no frames')

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> 'VideoReader':
        return self

    def __exit__(self, *exc_info) -> None:
        self.stream = None  # before the container: in the other order memory piles up slowly
        self._container.close()

    def get_batch(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `indices` (any order, repeats allowed) -> uint8 (N, H, W, 3) RGB, in the order asked.

        Raises IndexError for frames that are not there, ValueError for one that cannot be decoded.
        """
        indices = np.asarray(indices, dtype=np.int64).tolist()
        frames = dict(self.frames(indices))
        return np.stack([frames[index] for index in indices])

    def frames(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, frame) once for each of the frames `wanted`, in presentation order.

        `frame` is uint8 (H, W, 3) RGB, upright, contiguous. Raises what `get_batch` raises. The file has
        one position: end a pass (or leave it) before the next.
        """
        missing = set(np.asarray(wanted, dtype=np.int64).tolist())
        if not missing or min(missing) < 0 or max(missing) >= len(self):
            raise IndexError(f'frames {sorted(missing)} asked of a video with {len(self)}')
        if self._index:
            yield from self._converted(self._decode_near(sorted(missing)), missing)
            if missing:
                self._index = None  # it promised what decoding did not give
        if missing:
            yield from self._converted(self.decode(), missing)
        if missing:
            raise ValueError(f'frame {min(missing)} of {len(self)} cannot be decoded')

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for all frames from the start, in presentation order, as PyAV gives them."""
        container, stream = _open(self.path)  # not every container can seek back to its start
        try:
            yield from enumerate(container.decode(stream))
        finally:
            del stream  # see __exit__
            container.close()

    def _converted(self, decoded, missing: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Take `decoded` (number, frame) until none is `missing`; those that were come out as arrays."""
        size = None
        for number, frame in decoded:
            size = size or (frame.width, frame.height)  # where sizes change, decoding begins at frame 0
            if number in missing:
                missing.remove(number)
                rgb = self._reformatter.reformat(frame, *size, 'rgb24', threads=1).to_ndarray()
                yield number, upright(rgb, frame)
            if not missing:
                break

    def _decode_near(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for the `wanted` frames and others, decoded from the IDR picture before each.

        Ends early where something is damaged: how that is patched depends on all that was decoded before.
        """
        index = self._index
        places = index.place[wanted]
        start_of = index.starts[np.searchsorted(index.starts, places, side='right') - 1]
        for start in np.unique(start_of).tolist():
            needed = set(places[start_of == start].tolist())
            for frame in self._decode_group(start, needed):
                if frame.is_corrupt or frame.pts not in index.number:
                    return
                yield index.number[frame.pts], frame

    def _decode_group(self, start: int, needed: set[int]) -> Iterator[av.VideoFrame]:
        """Yield frames decoded from the packet at place `start` on, until all `needed` places have come."""
        codec, index = self.stream.codec_context, self._index
        try:
            self._container.seek(index.seek[start], stream=self.stream)
        except OSError:  # this file has no way back
            return
        codec.flush_buffers()
        place, last = start, max(needed)
        for packet in self._container.demux(self.stream):
            if packet.pts != index.pts[place]:
                continue  # one before the start
            # The decoder can drop a picture that none refers to; it must see every other one.
            codec.skip_frame = 'DEFAULT' if place in needed else 'NONREF'
            yield from codec.decode(packet)
            if place == last:
                break
            place += 1
        yield from codec.decode(None)


def upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels (H, W, ...) of a frame, turned and mirrored as its display matrix says (a telephone's, mostly).

    The matrix takes a pixel at (x, y) to (a x + c y, b x + d y); the nearest of the eight ways is taken.
    """
    matrix = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _open(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    try:
        container = av.open(path, metadata_errors='ignore')
    except av.FFmpegError as error:  # most are an OSError or a ValueError as well
        if isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(error.strerror) from None
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        raise ValueError('no video stream')
    if streams[0].codec_context is None:
        raise ValueError('no decoder for its video stream')
    streams[0].codec_context.thread_count = 1  # a loader's workers are the parallelism
    return container, streams[0]


# ----------------------------------------------------------------------------------------------------------
# Which files can be read from the middle
# ----------------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """Of a stream in which every packet is one frame; a place is a packet's in the file, from 0 on."""

    pts: list[int]  # presentation time of each place
    seek: list[int]  # the time by which the demuxer finds it
    starts: np.ndarray  # places of the IDR pictures
    place: np.ndarray  # of each frame number
    number: dict[int, int]  # frame number of each presentation time


def _index(container: av.container.InputContainer, stream: av.VideoStream) -> Index | None:
    """Read through the packets: the index, or None unless decoding from an IDR picture is sure to be exact.

    Packets are looked at and let go, for all of them would be the whole file in memory.
    """
    extradata = stream.codec_context.extradata or b''
    sps = extradata[8 : 8 + int.from_bytes(extradata[6:8], 'big')]
    # MP4 and Matroska keep one set of parameters here and prefix each unit with its length.
    if stream.codec_context.name != 'h264' or extradata[:1] != b'\1' or not _is_plain(sps):
        return None
    if extradata[5] & 31 != 1:
        return None
    pts, seek, starts = [], [], []
    for packet in container.demux(stream):
        if not packet.size or packet.is_corrupt:
            continue
        kind = _picture(packet, (extradata[4] & 3) + 1, extradata)
        if kind is None or packet.pts is None or packet.is_discard or packet.has_sidedata('new_extradata'):
            return None
        if kind == IDR:
            starts.append(len(pts))
        pts.append(packet.pts)
        seek.append(packet.pts if packet.dts is None else packet.dts)
    if starts[:1] != [0] or len(set(pts)) < len(pts):
        return None
    place = np.argsort(pts)
    number = {pts[place]: number for number, place in enumerate(place.tolist())}
    return Index(pts, seek, np.array(starts), place, number)


IDR = 5  # the unit type of a slice of an IDR picture; 1 is one of any other


def _picture(packet: av.Packet, prefix: int, extradata: bytes) -> int | None:
    """The type of a packet's first slice, or None if there is none or something before it outlives an IDR.

    A key frame that is not IDR can be followed by pictures that need earlier ones (open GOP).
    """
    data, at = memoryview(packet), 0
    while at + prefix < len(data):
        size = int.from_bytes(data[at : at + prefix], 'big')
        unit = data[at + prefix : at + prefix + size]
        kind = unit[0] & 31 if size else 0
        if kind in (1, IDR):
            return kind
        if kind in (7, 8) and bytes(unit) not in extradata:  # new parameters
            return None
        if kind == 6:  # a message: pictures are turned (47), or libavcodec is to imitate early x264's bugs
            x264 = re.search(rb'x264 - core (\d+)', unit)
            if unit[1:2] == b'\x2f' or x264 and int(x264[1]) <= 33:
                return None
        at += prefix + size
    return None


def _is_plain(sps: bytes) -> bool:
    """Whether a sequence parameter set is of a common profile and its pictures are never single fields.

    4:4:4 is not: libavcodec decodes it by a version of x264 that is named at the start of the file only.
    """
    if sps[1:2] not in (b'B', b'M', b'd', b'n', b'z'):  # Baseline, Main, High, High 10, High 4:2:2
        return False
    bits = iter(''.join(f'{byte:08b}' for byte in sps[4:].replace(b'\0\0\3', b'\0\0')))

    def number() -> int:  # Exp-Golomb: as many digits follow the first 1 as zeros precede it
        zeros = sum(1 for _ in takewhile('0'.__eq__, bits))
        return int('1' + ''.join(islice(bits, zeros)), 2) - 1

    number()  # its own
    if sps[1] >= 100:
        if number() == 3:  # 4:4:4 all the same
            return False
        number(), number()  # bits of luma and chroma
        if [*islice(bits, 2)] != ['0', '0']:  # lossless, or with matrices, which would have to be read here
            return False
    number()  # digits of a picture's number
    order = number()
    if order == 1:  # a rare one, with a table
        return False
    if order == 0:
        number()
    number(), next(bits, ''), number(), number()  # reference pictures, gaps allowed, width, height
    return next(bits, '') == '1'
