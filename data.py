"""From files to uint8 tensors: decoding, sampling, augmenting, and the order in which samples are drawn.

    python data.py list DIR           list files and label map of a folder of class folders
    python data.py check LIST         decode every file of a list; what cannot be read is written down
    python data.py encode SRC DST     a smaller copy of a tree of videos that decodes faster
    python data.py show OUT.png       a picture of training samples, before and after augmentation
    python data.py demo DIR           the small set of videos and images that `train.py --demo` trains on

Everything here stays uint8 (RGB, 0..255); the model normalizes. Every random choice comes from a generator
seeded by what it is for, so a sample looks the same whichever worker makes it, before and after a restart.
"""

import argparse
import math
import multiprocessing
import os
import re
import signal
import sys
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator that follows from its purpose and non-negative numbers alone."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *numbers])


# ----------------------------------------------------------------------------------------------------------
# Videos: exact frames from a file
# ----------------------------------------------------------------------------------------------------------


class VideoReader:
    """Random access to the frames of a video file's first video stream, on one thread.

    `get_batch([i, ...])` gives the i-th frames in presentation order, upright, whatever the container, the
    codec or the key frames: the same pixels as decoding everything from the start.

    H.264 with an orderly index is read fast: seek to the last IDR picture (after which nothing refers to
    anything before) and decode from there, leaving out the pictures that are neither wanted nor referred to.
    Everything else, where packets and frames need not map one to one, is decoded from the start.

    Raises FileNotFoundError, other OSErrors, or ValueError for a file that is not a readable video.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._reformatter = VideoReformatter()
        self._open()
        packets = [
            packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_corrupt
        ]
        self._pts = [packet.pts for packet in packets]
        self._dts = [packet.dts for packet in packets]
        self._order = None  # frame number -> place of its packet, where every packet is one frame
        if self._codec.name == 'h264' and packets and not any(packet.is_discard for packet in packets):
            self._idr = np.array([packet.is_keyframe and self._is_idr(packet) for packet in packets])
            timed = None not in self._pts + self._dts and len(set(self._pts)) == len(packets)
            if timed and self._idr[0]:
                self._order = np.argsort(self._pts)
        self._length = len(packets) if self._order is not None else sum(1 for _ in self._decode_from_start())
        if not self._length:
            raise ValueError('no frames')

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> 'VideoReader':
        return self

    def __exit__(self, *exc_info) -> None:
        self._stream = self._codec = None  # before the container: in the other order memory piles up slowly
        self._container.close()

    def _open(self) -> None:
        self._container = av.open(self.path, metadata_errors='ignore')
        if not self._container.streams.video:
            raise ValueError('no video stream')
        self._stream = self._container.streams.video[0]
        self._codec = self._stream.codec_context
        self._codec.thread_count = 1  # the loader's workers are the parallelism

    def get_batch(self, indices) -> np.ndarray:
        """Frames `indices` (any order, repeats allowed) -> uint8 (N, H, W, 3) RGB, in the order asked."""
        wanted, place = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        frames = dict(self.frames(wanted))
        return np.stack([frames[index] for index in wanted.tolist()])[place]

    def frames(self, wanted: np.ndarray):
        """Yield (index, frame) for each of the frames `wanted`, in any order; frame is uint8 (H, W, 3)."""
        missing = set(np.asarray(wanted).tolist())
        if not missing or min(missing) < 0 or max(missing) >= len(self):
            raise IndexError(f'frames {sorted(missing)} asked of a video with {len(self)}')
        while missing:
            in_order = self._order is None
            for index, frame in (
                self._decode_from_start() if in_order else self._decode(np.array(sorted(missing)))
            ):
                if index in missing:
                    missing.remove(index)
                    yield index, self._to_rgb(frame)
                    if not missing:
                        break
            if missing and in_order:
                raise ValueError(f'frame {min(missing)} of {len(self)} cannot be decoded')
            self._order = None  # if some are missing, the index promised what decoding did not give

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = (
            self._codec.width,
            self._codec.height,
        )  # one size for all, should the stream change midway
        rgb = self._reformatter.reformat(frame, width, height, 'rgb24', threads=1).to_ndarray()
        return np.rot90(rgb, round(frame.rotation / 90)) if frame.rotation else rgb

    def _decode_from_start(self):
        """Yield (number, frame) for all frames in presentation order."""
        self._container.close()
        self._open()  # not every container can seek back to its start
        yield from enumerate(self._container.decode(self._stream))

    def _decode(self, wanted: np.ndarray):
        """Yield (number, frame) for at least the `wanted` frames, each decoded from the IDR picture before
        it."""
        places = self._order[wanted]
        starts = np.flatnonzero(self._idr)
        start_of = starts[np.searchsorted(starts, places, side='right') - 1]
        number_of = {self._pts[place]: number for number, place in enumerate(self._order)}
        for start in np.unique(start_of):
            in_group = places[start_of == start]
            needed, last = set(in_group.tolist()), in_group.max()
            for place, packet in self._packets_from(start):
                # The decoder can drop a picture that none refers to; it must see every other one.
                self._codec.skip_frame = 'DEFAULT' if place in needed else 'NONREF'
                for frame in self._codec.decode(packet):
                    yield number_of[frame.pts], frame
                if place == last:
                    break
            for frame in self._codec.decode(None):
                yield number_of[frame.pts], frame

    def _packets_from(self, start: int):
        """Yield (place, packet) from the packet at place `start` on."""
        self._container.seek(self._dts[start], stream=self._stream, backward=True)
        self._codec.flush_buffers()
        place = None
        for packet in self._container.demux(self._stream):
            if place is None and packet.dts == self._dts[start]:
                place = start
            if place is not None and place < len(self._dts):
                yield place, packet
                place += 1

    def _is_idr(self, packet: av.Packet) -> bool:
        """Whether an H.264 packet with length-prefixed units (MP4, Matroska) holds an IDR picture.

        A key frame that is not IDR can be followed by pictures that need earlier ones (open GOP).
        """
        extradata, data, at = self._codec.extradata, bytes(packet), 0
        if not extradata or extradata[0] != 1:
            return False
        prefix = (extradata[4] & 3) + 1
        while at + prefix < len(data):
            if data[at + prefix] & 31 == 5:
                return True
            at += prefix + int.from_bytes(data[at : at + prefix], 'big')
        return False


# ----------------------------------------------------------------------------------------------------------
# Which frames and which pixels: the recipe's sampling and augmentation
# ----------------------------------------------------------------------------------------------------------


def sample_frames(
    num_frames: int,
    clip_len: int = 8,
    frame_interval: int = 8,
    num_clips: int = 1,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Frame numbers of `num_clips` clips of a video with `num_frames` frames -> int64 (num_clips, clip_len).

    With `rng` (training) every clip starts at random, such that clip_len * frame_interval frames lie ahead.
    Without (validation and test), one clip lies in the middle and several spread evenly from the start to the
    end. A video too short for a clip starts over at its end.
    """
    if rng is not None:
        starts = rng.integers(max(num_frames - clip_len * frame_interval, 0) + 1, size=num_clips)
    else:
        last = max(num_frames - (clip_len - 1) * frame_interval - 1, 0)
        # round() of numpy and the order of these operations decide where a start of x.5 goes
        starts = (
            np.round(np.arange(num_clips) * (last / (num_clips - 1)))
            if num_clips > 1
            else np.array([last // 2])
        )
    return (starts.astype(np.int64)[:, None] + np.arange(clip_len) * frame_interval) % num_frames


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (..., C, H, W) -> (..., C, height, width): bilinear, half-pixel centres, no antialiasing."""
    pixels = pixels.movedim(-3, -1).contiguous().movedim(-1, -3)  # torch resizes interleaved RGB fastest
    return TF.resize(pixels, [height, width], InterpolationMode.BILINEAR, antialias=False)


def resize_as_opencv(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (N, C, H, W) -> (N, C, height, width): the same, rounded bit for bit as OpenCV's INTER_LINEAR
    does.

    Weights have 11 bits and the sums are cut off, which makes about one value in ten darker by one level than
    the exact result. A published score depends on that, so evaluation does the same; training need not.
    """

    def taps(size: int, new_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at = ((torch.arange(new_size, dtype=torch.float64) + 0.5) / (new_size / size) - 0.5).float()
        first = at.floor()
        weights = [(part * 2048).round().int() for part in (1 - (at - first), at - first)]
        return *(place.long().clamp(0, size - 1) for place in (first, first + 1)), *weights

    (top, bottom, top_weight, bottom_weight), (left, right, left_weight, right_weight) = (
        taps(*sizes) for sizes in zip(pixels.shape[-2:], (height, width))
    )
    resized = torch.empty(*pixels.shape[:-2], height, width, dtype=torch.uint8)
    for frame, out in zip(pixels, resized):
        frame = frame.contiguous()
        rows = (frame[..., left].int() * left_weight + frame[..., right].int() * right_weight) >> 4
        upper, lower = rows[..., top, :] * top_weight[:, None], rows[..., bottom, :] * bottom_weight[:, None]
        out.copy_(((upper >> 16) + (lower >> 16) + 2) >> 2)
    return resized


def short_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """Size of a picture of height x width once its shorter side is `side`.

    Raises ValueError where the other side is over 100 times longer: the result would fill the memory.
    """
    if max(height, width) > 100 * min(height, width):
        raise ValueError(f'{width}x{height} is too long and thin')
    scale = side / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def center_crop(pixels: Tensor, size: int) -> Tensor:
    """uint8 (..., C, H, W) -> (..., C, size, size)."""
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def random_resized_crop(pixels: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """uint8 (..., C, H, W) -> (..., C, size, size): a random part of it, mirrored half of the time.

    The part has 0.08 to 1 of the area and a ratio of 3/4 to 4/3; where ten tries do not fit it is the centre
    square.
    """
    height, width = pixels.shape[-2:]
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = max(round(math.sqrt(area / ratio)), 1), max(round(math.sqrt(area * ratio)), 1)
        if h <= height and w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:
        h = w = min(height, width)
        top, left = (height - h) // 2, (width - w) // 2
    pixels = resize(pixels[..., top : top + h, left : left + w], size, size)
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


def three_crops(pixels: Tensor) -> Tensor:
    """uint8 (..., C, H, W) -> (3, ..., C, S, S), S the short side: the two ends and the middle of the long
    side."""
    height, width = pixels.shape[-2:]
    size = min(height, width)
    step = (max(height, width) - size) // 2
    starts = (0, 2 * step, step)
    crops = [pixels[..., s : s + size, :] if height > width else pixels[..., s : s + size] for s in starts]
    return torch.stack(crops)


# ----------------------------------------------------------------------------------------------------------
# Datasets
# ----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIX = re.compile(r'\.(jpg|jpeg|png|gif|webp|bmp)$', re.IGNORECASE)
VIDEO_SUFFIX = re.compile(r'\.(mp4|mkv|webm|avi|mov|m4v|mpg|mpeg|flv|wmv|ts|3gp)$', re.IGNORECASE)


class Samples(NamedTuple):
    """What a list file names. Arrays, as a million Python strings would be copied into every worker bit by
    bit."""

    paths: np.ndarray  # bytes (N,)
    labels: np.ndarray  # int64 (N,)

    def path(self, index: int) -> str:
        return os.fsdecode(self.paths[index])


def read_list(
    list_file: str,
    root: str = '',
    num_classes: int | None = None,
    videos: bool = False,
    names: list[str] | None = None,
) -> Samples:
    """Read `path label` lines; paths are below `root` and may contain spaces, blank lines are skipped.

    With `videos`, the form `video_id num_frames label` of the Kinetics lists (spaces or commas) is understood
    too, and a name without a video suffix gets `.mp4`. Raises ValueError with file and line for a line
    without a label or with one that is negative or not below `num_classes`.

    A folder of class folders does instead of a list, see `class_files`; `root` then plays no part.
    """
    if os.path.isdir(list_file):
        suffix = VIDEO_SUFFIX if videos else IMAGE_SUFFIX
        paths, labels = zip(*class_files(list_file, names or class_names(list_file), suffix))
        if num_classes is not None and max(labels) >= num_classes:
            raise ValueError(f'{list_file}: {max(labels) + 1} class folders; {num_classes} classes are known')
        return Samples(np.array([os.fsencode(path) for path in paths]), np.array(labels, dtype=np.int64))
    paths, labels = [], []
    with open(list_file, encoding='utf-8-sig', errors='surrogateescape') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            match = re.fullmatch(r'(.+?)[\s,]+(-?\d+)', line.strip())
            if not match:
                raise ValueError(f'{list_file}:{number}: no label in {line.strip()!r}; expected "path label"')
            path, label = match[1], int(match[2])
            if label < 0 or (num_classes is not None and label >= num_classes):
                known = f'; {num_classes} classes are known' if num_classes is not None else ''
                raise ValueError(f'{list_file}:{number}: label {label} is out of range{known}')
            if videos and not VIDEO_SUFFIX.search(path) and not IMAGE_SUFFIX.search(path):
                path = re.sub(r'[\s,]+\d+$', '', path) + '.mp4'
            paths.append(os.fsencode(os.path.join(root, path)))
            labels.append(label)
    if not paths:
        raise ValueError(f'{list_file}: no samples in it; expected lines of "path label"')
    return Samples(np.array(paths), np.array(labels, dtype=np.int64))


def class_names(folder: str) -> list[str]:
    """The names of a folder's class folders, in alphabetical order."""
    try:
        return find_classes(folder)[0]
    except FileNotFoundError:
        raise ValueError(f'{folder}: no class folders in it') from None


def class_files(folder: str, names: list[str], suffix: re.Pattern) -> list[tuple[str, int]]:
    """(path, label) of the files in a folder of class folders, at any depth; `names` numbers the classes.

    Raises OSError, or ValueError where a class folder's name is not among them, or there is no file.
    """
    if unknown := sorted(set(class_names(folder)) - set(names)):
        raise ValueError(f'{os.path.join(folder, unknown[0])}: no class of this name is known')
    numbers = {name: number for number, name in enumerate(names)}

    def is_wanted(path: str) -> bool:
        return suffix.search(path) is not None and not os.path.basename(path).startswith('.')

    files = make_dataset(folder, numbers, is_valid_file=is_wanted, allow_empty=True)
    if not files:
        raise ValueError(f'{folder}: no file in its class folders ends with {suffix.pattern}')
    return files


def read_label_map(path: str) -> list[str]:
    """Class names from a file with one name per line, or `name index` on every line."""
    with open(path, encoding='utf-8-sig') as file:
        names = [line.strip() for line in file if line.strip()]
    indexed = [re.fullmatch(r'(.+?)[\s,]+(\d+)', name) for name in names]
    if all(indexed) and sorted(int(match[2]) for match in indexed) == list(range(len(names))):
        return [match[1] for match in sorted(indexed, key=lambda match: int(match[2]))]
    return names


# what decoding a damaged file can raise
UNREADABLE = (OSError, ValueError, RuntimeError, MemoryError, av.FFmpegError)


def one_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Item(NamedTuple):
    """One sample of a dataset."""

    pixels: Tensor | None  # uint8; None where an evaluation's file is unreadable
    label: int
    path: str
    bad: list[str]  # `path: reason` of the unreadable files met on the way


class VideoDataset(Dataset):
    """Clips of the listed videos, uint8.

    mode 'train': `dataset[epoch, index]` has a random clip with a random crop, (3, T, size, size).
    mode 'val':   `dataset[index]` has one view, the middle clip's centre crop, (1, 3, T, size, size).
    mode 'test':  `dataset[index]` has num_clips x num_crops views, (V, 3, T, S, S): clips spread evenly over
    the
                  video, cropped at S, the short side that videos are resized to (256 for size 224).
    """

    def __init__(
        self,
        samples: Samples,
        mode: str = 'train',
        size: int = 224,
        clip_len: int = 8,
        frame_interval: int = 8,
        num_clips: int = 10,
        num_crops: int = 3,
        seed: int = 0,
    ):
        self.samples, self.mode, self.seed = samples, mode, seed
        self.size, self.short_side = size, size * 8 // 7
        self.clip_len, self.frame_interval = clip_len, frame_interval
        self.num_clips, self.num_crops = (num_clips, num_crops) if mode == 'test' else (1, 1)

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        return _read(self, key)

    def load(self, path: str, rng: np.random.Generator | None) -> Tensor:
        """Decode `path` as the mode asks, see above; raises what VideoReader raises."""
        with VideoReader(path) as video:
            clips = sample_frames(len(video), self.clip_len, self.frame_interval, self.num_clips, rng)
            wanted, place = np.unique(clips, return_inverse=True)
            frames = {}
            for index, frame in video.frames(wanted):
                if min(frame.shape[:2]) != self.short_side:  # at once: 80 frames of 4K would take 2 GB
                    method = resize if self.mode == 'train' else resize_as_opencv
                    pixels = torch.from_numpy(frame).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)
                    pixels = method(pixels, *short_side_to(self.short_side, *frame.shape[:2]))
                    frame = pixels[0].permute(1, 2, 0).numpy()
                frames[index] = frame
        frames = np.stack([frames[index] for index in wanted.tolist()])  # (N, H, W, 3)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (N, 3, H, W)
        if self.mode == 'train':
            frames = random_resized_crop(frames, self.size, rng)
            return frames[place.ravel()].transpose(0, 1)  # (3, T, size, size)
        if self.num_crops == 3:
            crops = three_crops(frames)
        else:
            crops = center_crop(frames, self.size if self.mode == 'val' else self.short_side).unsqueeze(0)
        views = crops[:, place.reshape(clips.shape)]  # (crops, N, 3, S, S) -> (crops, clips, T, 3, S, S)
        return views.flatten(0, 1).transpose(1, 2)


class ImageDataset(Dataset):
    """The listed images, uint8.

    mode 'train': `dataset[epoch, index]` has a random crop, (3, size, size).
    mode 'val':   `dataset[index]` has one view, the centre crop, (1, 3, size, size).
    """

    def __init__(self, samples: Samples, mode: str = 'train', size: int = 224, seed: int = 0):
        self.samples, self.mode, self.size, self.seed = samples, mode, size, seed

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        return _read(self, key)

    def load(self, path: str, rng: np.random.Generator | None) -> Tensor:
        """Decode `path` as the mode asks, see above; raises OSError or RuntimeError."""
        image = torchvision.io.decode_image(
            path, torchvision.io.ImageReadMode.RGB, apply_exif_orientation=True
        )
        image = image[0] if image.ndim == 4 else image  # an animated GIF's first picture
        image = TF.to_dtype(image, torch.uint8, scale=True)  # of 16-bit PNGs
        if self.mode == 'train':
            return random_resized_crop(image, self.size, rng)
        image = resize(image, *short_side_to(self.size * 8 // 7, *image.shape[-2:]))
        return center_crop(image, self.size).unsqueeze(0)


def _read(dataset: VideoDataset | ImageDataset, key: int | tuple[int, int]) -> Item:
    """The sample at `key`. In training another one takes the place of an unreadable file, drawn from the same
    key."""
    training = dataset.mode == 'train'
    epoch, index = key if training else (0, key)
    kind, bad = type(dataset).__name__, []
    replacements = generator(f'{kind} replacements', dataset.seed, epoch, index).integers(
        len(dataset), size=10
    )
    for place in [index, *replacements.tolist()]:
        path, label = dataset.samples.path(place), int(dataset.samples.labels[place])
        rng = generator(f'{kind} augmentation', dataset.seed, epoch, index) if training else None
        try:
            return Item(dataset.load(path, rng), label, path, bad)
        except UNREADABLE as error:
            bad.append(f'{path}: {one_line(error)}')
            if not training:
                return Item(None, label, path, bad)
    raise RuntimeError(f'{len(bad)} samples in a row are unreadable, the last one {bad[-1]}')


# ----------------------------------------------------------------------------------------------------------
# Joint batches
# ----------------------------------------------------------------------------------------------------------


class JointDataset(Dataset):
    """Both training sets behind one key: `dataset['video' or 'image', epoch, index]`."""

    def __init__(self, sources: dict[str, VideoDataset | ImageDataset]):
        self.sources = sources

    def __getitem__(self, key: tuple[str, int, int]) -> Item:
        source, epoch, index = key
        return self.sources[source][epoch, index]


class JointSampler(Sampler):
    """One video batch and one image batch per step, for one rank, from `epoch` to the last.

    An epoch has as many steps as the smaller of the two sets gives; within it no sample is drawn twice on any
    rank. Its order follows from (seed, epoch) alone. A step's two batches are yielded as one list of keys: a
    DataLoader hands out batches to its workers in turn, and with video and image batches alternating, an even
    number of workers would leave all the videos to one half of them.

    `done` holds how many (videos, images) of the first epoch all ranks together have drawn already.
    """

    def __init__(
        self,
        num_videos: int,
        num_images: int,
        videos_per_gpu: int = 16,
        images_per_gpu: int = 85,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epochs: int = 256,
    ):
        self.sizes = {'video': num_videos, 'image': num_images}
        self.per_gpu = {'video': videos_per_gpu, 'image': images_per_gpu}
        self.rank, self.world_size, self.seed, self.epochs = rank, world_size, seed, epochs
        self.epoch, self.done = 0, {'video': 0, 'image': 0}
        self.steps_per_epoch = self.steps_left({'video': 0, 'image': 0})
        for source, size in self.sizes.items():
            if size < self.per_gpu[source] * world_size:
                needed = f'{world_size} x {self.per_gpu[source]}'
                raise ValueError(f'{size} training {source}s are too few for one step of {needed}')

    def steps_left(self, done: dict[str, int]) -> int:
        """Full steps left in an epoch of which `done` samples have been drawn."""
        return min((self.sizes[s] - done[s]) // (n * self.world_size) for s, n in self.per_gpu.items() if n)

    def steps_done(self, done: dict[str, int]) -> int:
        """Full steps that `done` samples of an epoch make."""
        return min(done[s] // (n * self.world_size) for s, n in self.per_gpu.items() if n)

    def __len__(self) -> int:
        return self.steps_left(self.done) + max(self.epochs - self.epoch - 1, 0) * self.steps_per_epoch

    def __iter__(self):
        done = self.done
        for epoch in range(self.epoch, self.epochs):
            order = {
                s: generator(f'{s} order', self.seed, epoch).permutation(size)
                for s, size in self.sizes.items()
            }
            for step in range(self.steps_left(done)):
                batch = []
                for source, count in self.per_gpu.items():
                    start = done[source] + (step * self.world_size + self.rank) * count
                    batch += [(source, epoch, int(index)) for index in order[source][start : start + count]]
                yield batch
            done = {'video': 0, 'image': 0}


def leave_signals_to_main(worker_id: int) -> None:
    """For DataLoader's worker_init_fn: a stop signal to all processes is the main one's to answer."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def end_workers() -> None:
    """Kill what loader workers are left; for the end of a program, which would wait for them forever
    otherwise, as they do not listen to SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader would report their death as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def collate(items: list[Item]) -> dict:
    """A step's items -> {'inputs': [clips, images], 'labels': [int64 (B,), int64 (B,)], 'paths', 'bad'}.

    Clips are uint8 (B, 3, T, H, W), images (B, 3, H, W), in channels-last memory; a source with no item is
    left out. `paths` and `bad` are lists of strings.
    """
    clips = [item for item in items if item.pixels.ndim == 4]
    images = [item for item in items if item.pixels.ndim == 3]
    inputs = []
    if clips:
        inputs.append(_stack([item.pixels.permute(1, 2, 3, 0) for item in clips]).permute(0, 4, 1, 2, 3))
    if images:
        inputs.append(_stack([item.pixels.permute(1, 2, 0) for item in images]).permute(0, 3, 1, 2))
    return {
        'inputs': inputs,
        'labels': [torch.tensor([item.label for item in source]) for source in (clips, images) if source],
        'paths': [item.path for item in items],
        'bad': [line for item in items for line in item.bad],
    }


def _stack(pixels: list[Tensor]) -> Tensor:
    """torch.stack, in a loader's worker into memory that the main process shares: it spares a copy."""
    batch = torch.empty(len(pixels), *pixels[0].shape, dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is not None:
        batch.share_memory_()
    return torch.stack(pixels, out=batch)


# ----------------------------------------------------------------------------------------------------------
# Preparing data
# ----------------------------------------------------------------------------------------------------------


def in_parallel(function, jobs: list[tuple], title: str):
    """Yield function(*job) for each job, in order, computed on all cores; with a progress bar."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn')) as pool:
        results = pool.map(function, *zip(*jobs), chunksize=max(1, min(20, len(jobs) // 64)))
        yield from tqdm(results, total=len(jobs), desc=title, unit='file', disable=None)


def write_lists(folder: str, label_map: str | None = None) -> tuple[int, int]:
    """Write `list.txt` and `labels.txt` into a folder of class folders, in alphabetical order or that of a
    label map.

    Returns the numbers of files and classes. Raises what `class_files` does.
    """
    names = read_label_map(label_map) if label_map else class_names(folder)
    suffix = re.compile(f'{VIDEO_SUFFIX.pattern}|{IMAGE_SUFFIX.pattern}', re.IGNORECASE)
    files = class_files(folder, names, suffix)
    lines = [f'{os.path.relpath(path, folder)} {label}\n' for path, label in files]
    Path(folder, 'list.txt').write_text(''.join(lines), errors='surrogateescape')
    Path(folder, 'labels.txt').write_text(''.join(f'{name}\n' for name in names))
    return len(lines), len(names)


def check_file(path: str) -> str:
    """Decode all of a video or image; gives '' or `path: reason`."""
    try:
        if IMAGE_SUFFIX.search(path):
            ImageDataset(None, 'train').load(path, generator('check'))
        else:
            with VideoReader(path) as video:
                for _ in video.frames(np.arange(len(video))):
                    pass
    except UNREADABLE as error:
        return f'{path}: {one_line(error)}'
    return ''


def encode_video(source: Path, target: Path, short_side: int = 256, gop: int = 16) -> str:
    """Write `source` anew as H.264 in MP4: short side at most `short_side`, a key frame every `gop` frames,
    without sound; frame by frame the same video. A finished `target` is left alone.

    Gives '' or `path: reason`. A target that is there is whole: it is written beside and renamed.
    """
    if target.exists():
        return ''
    part = target.with_name(f'{target.name}.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with VideoReader(source) as video, av.open(str(part), 'w', format='mp4') as container:
            rate = video._stream.average_rate or 30
            options = {'crf': '20', 'preset': 'veryfast', 'x264-params': f'keyint={gop}:scenecut=0'}
            stream = container.add_stream('libx264', rate=rate, options=options)
            stream.pix_fmt, stream.codec_context.thread_count = 'yuv420p', 1
            for number, frame in video._decode_from_start():
                if frame.rotation:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(video._to_rgb(frame)), 'rgb24')
                if not number:
                    side = min(short_side, frame.width, frame.height)
                    sides = short_side_to(side, frame.height, frame.width)
                    stream.height, stream.width = (2 * (side // 2) for side in sides)  # as 4:2:0 needs
                frame = frame.reformat(stream.width, stream.height, 'yuv420p', interpolation='BICUBIC')
                frame.pts, frame.time_base = number, 1 / rate
                frame.pict_type = PictureType.NONE  # else it would be a key frame again where it was one
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if number + 1 < len(video):
                raise ValueError(f'only {number + 1} of {len(video)} frames can be decoded')
        os.replace(part, target)
    except UNREADABLE as error:
        part.unlink(missing_ok=True)
        return f'{source}: {one_line(error)}'
    return ''


def encode_tree(source: str, target: str, short_side: int = 256, gop: int = 16) -> tuple[int, list[str]]:
    """`encode_video` for all videos below a folder, on all cores; their number, a line for each bad one."""
    videos = sorted(path for path in Path(source).rglob('*') if VIDEO_SUFFIX.search(path.name))
    if not videos:
        raise ValueError(f'{source}: no videos below it')
    targets = [Path(target) / path.relative_to(source).with_suffix('.mp4') for path in videos]
    if len(set(targets)) < len(targets):
        twice = next(path for path in targets if targets.count(path) > 1)
        raise ValueError(f'{twice}: two videos of {source} differ in their suffix only')
    encode = partial(encode_video, short_side=short_side, gop=gop)
    return len(videos), [line for line in in_parallel(encode, list(zip(videos, targets)), 'encoding') if line]


def show(out: str, videos: Samples, images: Samples, count: int = 3, size: int = 112, seed: int = 0) -> None:
    """Draw the first `count` training clips and images of epoch 0 as a PNG: what is read from the file, and
    below it what the network is fed."""
    datasets = VideoDataset(videos, size=size, seed=seed), ImageDataset(images, size=size, seed=seed)
    rows, labels = [], []
    for place in range(count):
        rng = generator('VideoDataset augmentation', seed, 0, place)  # as for the sample itself
        with VideoReader(videos.path(place)) as video:
            frames = video.get_batch(sample_frames(len(video), rng=rng)[0])
        rows += [torch.from_numpy(frames).permute(0, 3, 1, 2), datasets[0][0, place].pixels.transpose(0, 1)]
        labels += [f'{Path(videos.path(place)).name}: label {videos.labels[place]}', 'as it is fed']
    read = ImageDataset(images, 'val', size)
    for title, pixels in (
        ('images', [read[place].pixels[0] for place in range(8)]),
        ('as they are fed', [datasets[1][0, place].pixels for place in range(8)]),
    ):
        rows.append(torch.stack(pixels))
        labels.append(f'{title}, labels {images.labels[:8].tolist()}' if title == 'images' else title)
    draw_rows(out, rows, labels, size)


def draw_rows(out: str, rows: list[Tensor], labels: list[str], size: int) -> None:
    """Write a PNG of rows of pictures, uint8 (N, 3, H, W), drawn `size` high, each row under its label."""
    grids = []
    for pixels in rows:
        width = round(pixels.shape[-1] * size / pixels.shape[-2])
        grids.append(torchvision.utils.make_grid(resize(pixels, size, width), padding=2, pad_value=255))
    width = max(grid.shape[2] for grid in grids)
    drawn = []
    for grid, label in zip(grids, labels):
        grid = F.pad(grid, (0, width - grid.shape[2], 14, 0), value=255)  # 14 for the label
        box = torch.tensor([[0, 0, width - 1, 13]])
        drawn.append(torchvision.utils.draw_bounding_boxes(grid, box, [label], 'white', label_colors='black'))
    torchvision.io.write_png(torch.cat(drawn, 1), out)


# ----------------------------------------------------------------------------------------------------------
# The demo's set
# ----------------------------------------------------------------------------------------------------------

DEMO_PATTERNS = ('stripes', 'checks', 'dots', 'zigzag')
DEMO_MOTIONS = ('rising', 'falling')
DEMO_SIZE = (64, 96)  # height, width of every picture
DEMO_FRAMES = 80


def make_demo(
    root: str,
    train_videos: int = 50,
    val_videos: int = 12,
    train_images: int = 150,
    val_images: int = 20,
    clutter: float = 0,
):
    """Make a small set of real files below `root`: MP4 videos, JPEG images, their lists and label maps.

    Images show one of four patterns. Videos show one of them rising or falling, eight classes: any of a
    video's frames is as likely in the other direction, so it takes several to tell, and mirroring changes
    neither. The numbers are per class. `clutter` is the strength, in levels of 255, of a coloured scene
    behind the pattern, which makes it harder to see. A complete set is left as it is; `image_labels.txt`,
    written last, says so.
    """
    root = Path(root)
    if (root / 'image_labels.txt').exists():
        print(f'reusing the set in {root}')
        return
    videos = [f'{pattern} {motion}' for pattern in DEMO_PATTERNS for motion in DEMO_MOTIONS]
    jobs = []
    for split, video_count, image_count in (
        ('train', train_videos, train_images),
        ('val', val_videos, val_images),
    ):
        for source, classes, count, suffix in (
            ('video', videos, video_count, 'mp4'),
            ('image', DEMO_PATTERNS, image_count, 'jpg'),
        ):
            (root / f'{source}s_{split}').mkdir(parents=True, exist_ok=True)
            lines = []
            for number in range(len(classes) * count):
                label = number % len(classes)
                name = f'{classes[label].replace(" ", "_")}_{number // len(classes):03d}.{suffix}'
                file = root / f'{source}s_{split}' / name
                jobs.append((file, classes[label], source, split, number, clutter))
                lines.append(f'{name} {label}\n')
            (root / f'{source}_{split}.txt').write_text(''.join(lines))
    for _ in in_parallel(_draw_demo_file, jobs, f'making {root}'):
        pass
    (root / 'video_labels.txt').write_text('\n'.join(videos) + '\n')
    (root / 'image_labels.txt').write_text('\n'.join(DEMO_PATTERNS) + '\n')


def _draw_demo_file(path: Path, name: str, source: str, split: str, number: int, clutter: float) -> None:
    rng = generator(f'demo {source} {split}', number)
    pattern, _, motion = name.partition(' ')
    height, width = DEMO_SIZE
    fine = 2  # drawn twice as fine, for smooth edges
    period = fine * rng.uniform(13, 20)
    speed = period / 32 * rng.uniform(0.7, 1.3) * {'rising': 1, 'falling': -1, '': 0}[motion]  # per frame
    y, x = (axis + period * rng.uniform() for axis in np.ogrid[: height * fine, : width * fine])
    texture = rng.normal(0, 12, (height, width, 1))
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.uniform(-30, 30, 3)
    back, front = rng.uniform(20, 90, 3), rng.uniform(140, 250, 3)
    for cells in (2, 4, 8, 16) if clutter else ():
        scene = torch.from_numpy(rng.normal(0, clutter, (1, 3, cells, cells * width // height)))
        texture = texture + F.interpolate(scene, (height, width), mode='bilinear')[0].movedim(0, 2).numpy()
    frames = []
    for t in range(DEMO_FRAMES if source == 'video' else 1):
        cover = _pattern(pattern, (y + speed * t) / period, x / period)
        cover = cover.reshape(height, fine, width, fine).mean((1, 3))[..., None]
        frames.append(np.clip(back + slope + (front - back) * cover + texture, 0, 255).astype(np.uint8))
    if source == 'image':
        torchvision.io.write_jpeg(torch.from_numpy(frames[0]).permute(2, 0, 1), str(path), quality=90)
        return
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(
            'libx264', rate=30, options={'crf': '20', 'g': '24', 'preset': 'veryfast'}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode(None))


def _pattern(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where a pattern is bright, in coordinates that are 1 from one repetition to the next."""
    if name == 'stripes':
        return (y % 1 < 0.5) | (0 * x > 0)
    if name == 'checks':
        return (y % 1 < 0.5) ^ (x % 1 < 0.5)
    if name == 'dots':
        return (y % 1 - 0.5) ** 2 + (x % 1 - 0.5) ** 2 < 0.35**2
    return (y + abs(x % 1 - 0.5)) % 1 < 0.5  # zigzag


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0],
        epilog=__doc__.split('\n\n', 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    command = commands.add_parser('list', help='write list.txt and labels.txt for a folder of class folders')
    command.add_argument('dir', metavar='DIR')
    command.add_argument('--labels', metavar='FILE', help='number the classes as this label map does')
    command = commands.add_parser('check', help='decode every file of a list')
    command.add_argument('list', metavar='LIST')
    command.add_argument('--root', default='', help='folder that its paths are below')
    command.add_argument('--out', default='bad_samples.txt', help='what is bad (default: %(default)s)')
    command = commands.add_parser('encode', help='re-encode a tree of videos; done files are skipped')
    command.add_argument('src', metavar='SRC')
    command.add_argument('dst', metavar='DST')
    command.add_argument(
        '--short-side', type=positive, default=256, help='larger ones shrink (default: %(default)s)'
    )
    command.add_argument(
        '--gop', type=positive, default=16, help='frames between key frames (default: %(default)s)'
    )
    command = commands.add_parser('show', help='draw training samples before and after augmentation')
    command.add_argument('out', metavar='OUT.png')
    for source in ('video', 'image'):
        default = f'data/demo/{source}_train.txt', f'data/demo/{source}s_train'
        command.add_argument(f'--{source}-list', default=default[0], help='(default: %(default)s)')
        command.add_argument(f'--{source}-root', default=default[1], help='(default: %(default)s)')
    command.add_argument('--size', type=positive, default=112, help='of the crops (default: %(default)s)')
    command = commands.add_parser('demo', help='make the small set that `train.py --demo` trains on')
    command.add_argument('dir', metavar='DIR')
    args = parser.parse_args(argv)
    try:
        if args.command == 'demo':
            make_demo(args.dir)
        elif args.command == 'show':
            videos = read_list(args.video_list, args.video_root, videos=True)
            show(args.out, videos, read_list(args.image_list, args.image_root), size=args.size)
            print(f'wrote {args.out}')
        elif args.command == 'list':
            files, classes = write_lists(args.dir, args.labels)
            print(
                f'wrote {args.dir}/list.txt with {files} files, {args.dir}/labels.txt with {classes} classes'
            )
        elif args.command == 'check':
            samples = read_list(args.list, args.root, videos=True)
            jobs = [(samples.path(i),) for i in range(len(samples.labels))]
            finish(
                args.list,
                len(jobs),
                [line for line in in_parallel(check_file, jobs, 'checking') if line],
                args.out,
            )
        else:
            finish(
                args.src,
                *encode_tree(args.src, args.dst, args.short_side, args.gop),
                f'{args.dst}/bad_samples.txt',
            )
    except (OSError, ValueError, BrokenExecutor) as error:
        sys.exit(f'data.py: {error}')


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def finish(what: str, count: int, bad: list[str], out: str) -> None:
    """Say how many files are bad, and end with 1 if any is."""
    print(f'{what}: {count} files, {len(bad)} of them unreadable' + (f', see {out}' if bad else ''))
    if bad:
        Path(out).write_text(''.join(f'{line}\n' for line in bad), errors='surrogateescape')
        sys.exit(1)


if __name__ == '__main__':
    main()
