"""Exact frames from a video file, fast.

with VideoReader('clip.mp4') as video:
    frames = video.get_batch([0, 8, 16])  # uint8 (3, H, W, 3), RGB
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from runtime.headers import Hevc, Unsure, codec_of, require

# FFmpeg's names of what is opened. Playlists and the like, which lead to other files, are not among them.
FORMATS = 'mov,matroska,avi,flv,mpegts,mpeg,asf,gif,ogg,mxf,nut,ivf,yuv4mpegpipe,h264,hevc,m4v,mpegvideo'
MAX_PIXELS = 89_478_485  # of a frame, 2.7 times those of 8K: a small file can claim more than memory holds
# Before PyAV 19, text that is not UTF-8 would be an error.
LENIENT = {'metadata_errors': 'ignore'} if int(av.__version__.split('.')[0]) < 19 else {}
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class VideoReader:
    """Random access to the frames of a file's best video stream (cover art does not count), on one thread.

    `get_batch([i, ...])` gives the i-th frames in presentation order, upright: the same pixels as decoding
    everything from the start. H.264 and HEVC in MP4 and Matroska, VP8, VP9 and AV1 are read from the last key
    frame before each frame, if the file itself proves that this is exact; then frames are counted without
    decoding, too. Everything else, and a file that turns out to be damaged, is decoded from the start, to
    count and again to read. (If libavcodec misses damage, the frames that it patches up may differ.)

    Raises FileNotFoundError, or ValueError for a file that is not a readable video. Other errors of PyAV pass
    through if a file is damaged.

        stream  PyAV's video stream: its average_rate, colours, size
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._container, self.stream = open_video(self.path)
        check_whole(self.path)
        self._reformatter = VideoReformatter()
        self._size = self._turn = None  # of the first picture decoded
        try:
            self._index = make_index(self._container, self.stream)
        except (Unsure, LookupError, av.FFmpegError):  # LookupError: a header is cut off
            self._index = None
        self._pts = [*self._index.number] if self._index else [frame.pts for _, frame in self.decode()]
        if not self._pts:
            raise ValueError('no frames')

    def __len__(self) -> int:
        return len(self._pts)

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

        Raises IndexError for frames that are not there, ValueError for those of a damaged file.
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
            with contextlib.suppress(Unsure, av.FFmpegError):
                yield from self._converted(self._decode_near(sorted(missing)), missing)
            if missing:  # decoding did not give what the index promised
                count = sum(1 for _ in self.decode())
                if count != len(self):  # the numbers of other frames would be wrong as well
                    raise ValueError(f'only {count} of its {len(self)} frames can be decoded')
                self._index = None
        if missing:
            yield from self._converted(self.decode(), missing)
        if missing:
            raise ValueError(f'frame {min(missing)} of {len(self)} cannot be decoded')

    def decode(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for all frames from the start, in presentation order, as PyAV gives them."""
        container, stream = open_video(self.path)  # not every container can seek back to its start
        try:
            number = 0
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    if not packet.is_corrupt:  # as the last one of a file that is cut off
                        raise
                    continue
                for frame in frames:
                    self._compare(frame)
                    yield number, frame
                    number += 1
        finally:
            del stream  # see __exit__
            container.close()

    def _compare(self, frame: av.VideoFrame) -> None:
        """Raise ValueError if its size is not that of the first frame decoded, whose turn is the file's."""
        size = f'{frame.width}x{frame.height}'
        if self._size is None:
            self._size, self._turn = size, turn(frame)
        if size != self._size:
            raise ValueError(f'its frames change size from {self._size} to {size}')

    def _converted(self, decoded: Iterable, missing: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read (number, frame) from `decoded` until none is `missing`; yield those that were, as arrays."""
        for number, frame in decoded:
            if number in missing:
                missing.remove(number)
                rgb = self._reformatter.reformat(frame, format='rgb24', threads=1).to_ndarray()
                yield number, upright(rgb, self._turn)
            if not missing:
                break

    def _decode_near(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (number, frame) for the `wanted` frames and others, decoded from the last start before each.

        Raises Unsure or FFmpegError if something does not fit the index or is damaged: how damage is patched
        up depends on everything that was decoded before.
        """
        index = self._index
        places = index.place[wanted]
        start_of = index.start[places]
        for start in np.unique(start_of).tolist():
            first, last, held = index.number[index.pts[start]], -1, []
            for frame in self._decode_group(start, set(places[start_of == start].tolist())):
                number = index.number.get(frame.pts, -1)
                require(number > last and not frame.is_corrupt and (number != first or frame.key_frame))
                self._compare(frame)
                last = number
                held.append((number, frame))
                if len(held) > 16:  # a damaged one that it refers to can no longer be shown after it
                    yield held.pop(0)
            yield from held

    def _decode_group(self, start: int, needed: set[int]) -> Iterator[av.VideoFrame]:
        """Yield frames, decoding from the packet at place `start` on until all `needed` places have come."""
        codec, index, place = self.stream.codec_context, self._index, start
        codec.flush_buffers()
        self._container.seek(index.seek[start], stream=self.stream)
        for packet in self._container.demux(self.stream):
            if place == start and packet.pts != index.pts[start]:  # it is before
                continue
            require(packet.pts == index.pts[place])
            # The decoder can drop a picture that nothing refers to; it must see all others.
            codec.skip_frame = 'DEFAULT' if place in needed else index.skip
            yield from codec.decode(packet)
            if place == max(needed):
                break
            place += 1
        yield from codec.decode(None)


# Opening -------------------------------------------------------------------------------------------------


def local(path: str) -> str:
    """A path made safe for FFmpeg, which takes what is before a colon for a protocol: `clip:1.mp4`."""
    return os.path.join('.', path)


def open_video(path: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A file and its video stream. Raises what VideoReader raises."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe without a writer would block
        raise ValueError('not a regular file')
    options = {'format_whitelist': FORMATS, 'protocol_whitelist': 'file'}
    try:
        container = av.open(local(path), container_options=options, **LENIENT)
    except av.FFmpegError as error:
        raise ValueError(f'it cannot be opened as a video: {error.strerror}') from None
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    if not streams:
        raise ValueError('no video stream')
    best = container.streams.best('video')
    stream = best if best in streams else streams[0]
    codec = stream.codec_context
    if codec is None:
        raise ValueError('no decoder for its video stream')
    if codec.width * codec.height > MAX_PIXELS:
        raise ValueError(f'its frames of {codec.width}x{codec.height} have over 89 megapixels')
    codec.options = {'max_pixels': str(MAX_PIXELS)}  # where the size changes later
    codec.thread_count = 1  # a loader's workers are the parallelism
    return container, stream


def check_whole(path: str) -> None:
    """Raise ValueError if an MP4 or AVI file ends before one of its parts does: its end is lost."""
    size, start = os.path.getsize(path), 0
    with open(path, 'rb') as file:
        while start < size:
            file.seek(start)
            head = file.read(8)
            name, length = head[4:], int.from_bytes(head[:4], 'big')
            if head[:4] == b'RIFF':  # AVI
                name, length = b'RIFF', int.from_bytes(head[4:], 'little') + 8
            start += length
            if name in (b'RIFF', b'mdat', b'moov', b'moof') and start > size + 8:  # some count the 8 twice
                raise ValueError(f'cut off: {size:,} of at least {start:,} bytes are there')
            if length < 8:  # 0: it goes on to the end; 1: of over 4 GB
                return


def turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """The flips that make a frame upright: across the diagonal, then upside down, then left to right.

    Its display matrix takes a pixel at (x, y) to (a x + c y, b x + d y). The nearest of eight orientations is
    used. Reading side data keeps the frame alive until Python's garbage collector runs.
    """
    try:
        matrix = frame.side_data.get('DISPLAYMATRIX')
    except ValueError:  # before PyAV 19, side data of a new kind hides all; of the matrix, the angle is left
        angle = np.deg2rad(-frame.rotation)
        a, b, c, d = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    else:
        if matrix is None:
            return False, False, False
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def upright(pixels: np.ndarray, flips: tuple[bool, bool, bool]) -> np.ndarray:
    """Pixels (H, W, ...), turned and mirrored by what `turn` gives."""
    across, upside_down, left_to_right = flips
    if across:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if left_to_right else 1])


# The index: which files can be read from the middle -------------------------------------------------------


class Index(NamedTuple):
    """Of a stream in which every frame is one packet. A place is a packet's number in the file, from 0."""

    pts: list[int]  # presentation time of each place
    seek: list[int]  # the time by which the demuxer finds it
    start: np.ndarray  # of each place: where decoding begins for it
    place: np.ndarray  # of each frame number
    number: dict[int, int]  # frame number of each presentation time
    skip: str  # what the decoder may leave out


def make_index(container: av.container.InputContainer, stream: av.VideoStream) -> Index:
    """Read through the packets. Raises Unsure unless decoding from the middle is sure to be exact."""
    require(container.format.name.split(',')[0] in ('mov', 'matroska'))
    codec = codec_of(stream)
    pts, seek, start, order = [], [], [], []
    before = latest = -1  # places of the last two starts
    for packet in container.demux(stream):
        if not packet.size:  # the end
            continue
        require(packet.pts is not None and not packet.is_corrupt and not packet.is_discard)
        require(not packet.has_sidedata('new_extradata'))
        starts, when = codec.look(packet)
        if starts:
            require(not pts or packet.pts > max(pts[latest:]))
            before, latest = latest, len(pts)
        pts.append(packet.pts)
        seek.append(packet.pts if packet.dts is None else packet.dts)
        # Pictures shown before a start but decoded after it may need the group before.
        start.append(before if packet.pts < pts[latest] else latest)
        order.append(when)
    require(min(start, default=-1) >= 0 and len(set(pts)) == len(pts))
    place = np.argsort(pts)
    # A decoder goes by what pictures say of their order, which the times can contradict.
    shown = [order[each] for each in place]
    require(shown == sorted(set(order)))
    # So many pictures shown later come before each. libavcodec drops some if more wait than it expects.
    waiting = np.arange(len(pts)) - np.argsort(place)
    require(waiting.max() <= stream.codec_context.reorder_depth)
    if isinstance(codec, Hevc) and len(pts) > 1:
        # libavcodec leaves out what refers to a lost picture. None is lost if times and counts grow evenly.
        steps = np.diff(np.sort(pts))
        pairs = pairwise(shown)
        counts = {later - count for (sequence, count), (next_one, later) in pairs if sequence == next_one}
        require(steps.max() < 2 * steps.min() and len(counts) <= 1)
    number = {pts[each]: number for number, each in enumerate(place)}
    return Index(pts, seek, np.array(start), place, number, codec.skip)
