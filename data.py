"""From files to uint8 batches: sampling, augmenting, and the order in which samples are drawn.

Begin with `VideoDataset` and `ImageDataset`, which make one sample; `JointSampler` picks those of a step.
Lists are read in runtime/sources.py; `python prepare.py` checks, re-encodes and draws the files.

Everything here stays uint8 (RGB, 0..255); the model normalizes. Every random choice comes from a generator
seeded by its purpose, so a sample looks the same whichever worker makes it, before or after a restart.
"""

import math
import os
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from video import VideoReader

warnings.filterwarnings('ignore', module='PIL')  # about odd metadata, and pictures of 90 to 180 megapixels
Rng = np.random.Generator


def open_image(path: str) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises what Pillow raises, or ValueError for a kind that is
    not for photos (Pillow has EPS drawn by another program)."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError('not a regular file')
    image = Image.open(open(path, 'rb'))  # by name, Pillow would map a turned TIFF with its sides swapped
    if image.format in ('EPS', 'WMF'):
        raise ValueError(f'{image.format} is a drawing, not a photo')
    return image


def generator(purpose: str, *numbers: int) -> Rng:
    """A random generator that follows from its purpose and non-negative numbers alone."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *numbers])


# Datasets: one sample -------------------------------------------------------------------------------------


@dataclass
class FileList:
    """The files of a list, in arrays: workers would copy a million Python strings bit by bit."""

    paths: np.ndarray  # bytes (N,), below `root`
    labels: np.ndarray  # int64 (N,)
    root: str = ''

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


class Sample(NamedTuple):
    pixels: Tensor | None  # uint8; None if unreadable; in training, if ten replacements are too
    label: int
    path: str
    bad: list[str]  # `path: reason` of the unreadable files met on the way
    lost: list[int] = []  # their places in the list


class Batch(NamedTuple):
    """The samples that a step draws of one source."""

    pixels: Tensor | None  # uint8 (B, 3, T, H, W) or (B, 3, H, W); None if any is missing
    labels: Tensor  # int64 (B,)
    paths: list[str]
    bad: list[str]
    lost: list[int] = []


@dataclass(eq=False)
class FileDataset(Dataset):
    """What video and image datasets share: the files, the random numbers, replacing what is unreadable."""

    files: FileList | None
    mode: str = 'train'  # or 'val' or 'test'
    size: int = 224  # side of the crop
    seed: int = 0
    flip: bool = True
    purpose: str = ''  # keeps this set's random numbers apart from another's; default: the class's name

    @property
    def short_side(self) -> int:
        """The length of the shorter side in evaluation: 256 for crops of 224."""
        return self.size * 8 // 7

    def __len__(self) -> int:
        return len(self.files)

    def generator(self, what: str, epoch: int, index: int) -> Rng:
        """The generator for a training sample's random choices."""
        return generator(f'{self.purpose or type(self).__name__} {what}', self.seed, epoch, index)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at (epoch, index) of a training set, or at `index` of any other. In training, a file
        drawn from the same key replaces an unreadable one."""
        training = self.mode == 'train'
        epoch, index = key if training else (0, key)
        place, bad, lost, replacements = index, [], [], None
        while True:
            path, label = self.files.path(place), int(self.files.labels[place])
            try:
                rng = self.generator('augmentation', epoch, index) if training else None
                return Sample(self.load(path, rng), label, path, bad, lost)
            except Exception as error:  # damaged files raise whatever the decoder trips over
                bad.append(f'{path}: {one_line(error)}')
                lost.append(place)
            if not training or len(bad) > 10:
                return Sample(None, label, path, bad, lost)
            replacements = replacements or self.generator('replacements', epoch, index)
            place = int(replacements.integers(len(self)))


@dataclass(eq=False)
class VideoDataset(FileDataset):
    """Clips of the listed videos, uint8.

    mode 'train': `dataset[epoch, index]` has a random crop of a random clip, (3, T, size, size). The recipe
    resizes frames to a short side of 256 before it crops. Here the original frame is cropped and resized
    once. The crop is the same: its place and size are drawn as shares of the sides, not in pixels.
    mode 'val':   `dataset[index]` has one view, the middle clip's centre crop, (1, 3, T, size, size).
    mode 'test':  `dataset[index]` has num_clips x num_crops views, (V, 3, T, S, S): clips spread evenly over
    the video, cropped at S, the short side that videos are resized to (256 for size 224).
    """

    clip_len: int = 8
    frame_interval: int = 8
    num_clips: int = 10
    num_crops: int = 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a training sample's pixels."""
        return 3, self.clip_len, self.size, self.size

    def load(self, path: str, rng: Rng | None) -> Tensor:
        """Decode `path` as the mode asks, see above. A damaged file can raise any Exception."""
        num_clips, num_crops = (self.num_clips, self.num_crops) if self.mode == 'test' else (1, 1)
        with VideoReader(path) as video:
            clips = sample_frames(len(video), self.clip_len, self.frame_interval, num_clips, rng)
            wanted, place = np.unique(clips, return_inverse=True)
            frames, box = {}, None
            for index, frame in video.frames(wanted):  # made small at once: 80 frames of 4K would take 2 GB
                height, width = frame.shape[:2]
                pixels = torch.from_numpy(frame).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W)
                if self.mode == 'train':
                    box = box or crop_box(height, width, rng)
                    top, left, h, w = box
                    pixels = resize(pixels[..., top : top + h, left : left + w], self.size, self.size)
                elif min(height, width) != self.short_side:
                    pixels = resize_as_opencv(pixels, *short_side_to(self.short_side, height, width))
                frames[index] = pixels[0].permute(1, 2, 0)
        frames = torch.stack([frames[index] for index in wanted.tolist()]).permute(0, 3, 1, 2)  # (N, 3, H, W)
        if self.mode == 'train':
            frames = frames.flip(-1) if self.flip and rng.random() < 0.5 else frames
            return frames[place.ravel()].transpose(0, 1)  # (3, T, size, size)
        size = self.size if self.mode == 'val' else self.short_side
        crops = three_crops(frames) if num_crops == 3 else center_crop(frames, size).unsqueeze(0)
        views = crops[:, place.reshape(clips.shape)]  # (crops, N, 3, S, S) -> (crops, clips, T, 3, S, S)
        return views.flatten(0, 1).transpose(1, 2)


@dataclass(eq=False)
class ImageDataset(FileDataset):
    """The listed images, uint8.

    mode 'train': `dataset[epoch, index]` has a random crop, (3, size, size).
    mode 'val':   `dataset[index]` has one view, the centre crop, (1, 3, size, size).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.size, self.size

    def load(self, path: str, rng: Rng | None) -> Tensor:
        """Decode `path` as the mode asks, see above. A damaged file can raise any Exception."""
        with open_image(path) as image:  # the size is known; nothing is decoded yet
            if self.mode == 'train':
                if image.format not in ('JPEG', 'MPO'):  # metadata may come last, or change the size
                    image = upright(image)
                width, height = image.size
                with suppress(Exception):  # broken metadata can raise anything; the picture may be sound
                    if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                        width, height = height, width
                box = crop_box(height, width, rng)
                # libjpeg decodes a JPEG far larger than needed at a half, a quarter or an eighth.
                scale = self.size / min(box[2:])
                image.draft('RGB', [math.ceil(side * scale) for side in image.size])
                image = upright(image)
                y, x = image.height / height, image.width / width
                top, left, h, w = box
                corners = round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)
                pixels = resize(to_tensor(image.crop(corners)), self.size, self.size)
                return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels
            pixels = to_tensor(upright(image))
        pixels = resize(pixels, *short_side_to(self.short_side, *pixels.shape[-2:]))
        return center_crop(pixels, self.size).unsqueeze(0)


def upright(image: Image.Image) -> Image.Image:
    """An opened picture, decoded, rotated as its metadata says, in 8 bits. A second call changes nothing.
    Raises ValueError if nothing says which grey is white; a damaged file can raise any Exception."""
    image.filename = ''  # with a name, Pillow 11 to 13 would map a bare TIFF with its sides swapped
    image.load()
    with suppress(Exception):  # as above
        ImageOps.exif_transpose(image, in_place=True)  # to spare a copy
    if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
        raise ValueError('32-bit, signed or floating-point grey, whose white is unknown; save it as 16-bit')
    if image.mode.startswith('I'):  # over 8 bits of grey; convert() would clip them at 255
        bits = image.tag_v2[ExifTags.Base.BitsPerSample][0] if image.format == 'TIFF' else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit picture of any kind -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1)


def one_line(error: Exception) -> str:
    """The first line of an error's message, without its number and path."""
    text = getattr(error, 'strerror', None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


# Which frames and which pixels: the recipe's sampling and augmentation ------------------------------------


def sample_frames(
    num_frames: int, clip_len: int = 8, frame_interval: int = 8, num_clips: int = 1, rng: Rng | None = None
) -> np.ndarray:
    """Frame numbers of `num_clips` clips of a video with `num_frames` frames -> int64 (num_clips, clip_len).

    With `rng` (training), each clip starts at random, with clip_len * frame_interval frames ahead of it.
    Without it (validation and test), a single clip lies in the middle and several are spread evenly from
    start to end. A video too short for a clip starts over at its end.
    """
    if rng is not None:
        starts = rng.integers(max(num_frames - clip_len * frame_interval, 0) + 1, size=num_clips)
    else:
        last = max(num_frames - (clip_len - 1) * frame_interval - 1, 0)
        # numpy's round() and the order of these operations decide where a start of x.5 goes
        spread = np.round(np.arange(num_clips) * (last / max(num_clips - 1, 1)))
        starts = spread if num_clips > 1 else np.array([last // 2])
    return (starts.astype(np.int64)[:, None] + np.arange(clip_len) * frame_interval) % num_frames


def crop_box(height: int, width: int, rng: Rng) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: 0.08 to 1 of the area, a ratio of 3/4 to 4/3. If ten
    tries do not fit, it is the centre square."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = max(round(math.sqrt(area / ratio)), 1), max(round(math.sqrt(area * ratio)), 1)
        if h <= height and w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def center_crop(pixels: Tensor, size: int) -> Tensor:
    """uint8 (..., C, H, W) -> (..., C, size, size)."""
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def three_crops(pixels: Tensor) -> Tensor:
    """uint8 (..., C, H, W) -> (3, ..., C, S, S), S the short side, at the ends and middle of the long one."""
    height, width = pixels.shape[-2:]
    axis, size = -2 if height > width else -1, min(height, width)
    step = (max(height, width) - size) // 2
    return torch.stack([pixels.narrow(axis, start, size) for start in (0, 2 * step, step)])


def short_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """The new height and width of a picture whose shorter side becomes `side`. Raises ValueError if the other
    side is over 100 times longer: the result would fill the memory."""
    if max(height, width) > 100 * min(height, width):
        raise ValueError(f'{width}x{height} is too long and thin')
    scale = side / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (..., C, H, W) -> (..., C, height, width): bilinear, half-pixel centres, no antialiasing."""
    pixels = pixels.movedim(-3, -1).contiguous().movedim(-1, -3)  # torch resizes interleaved RGB fastest
    batch = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    return F.interpolate(batch, (height, width), mode='bilinear').view(*pixels.shape[:-2], height, width)


def resize_as_opencv(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (N, C, H, W) -> (N, C, height, width): the same, rounded bit for bit like OpenCV's INTER_LINEAR.

    Weights have 11 bits and sums are cut off, so about one value in ten is one level darker than the exact
    result. Published scores depend on that, so evaluation does the same; training need not.
    """

    def taps(size: int, new_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at = ((torch.arange(new_size, dtype=torch.float64) + 0.5) / (new_size / size) - 0.5).float()
        first = at.floor()
        weights = [(part * 2048).round().int() for part in (1 - (at - first), at - first)]
        return *(place.long().clamp(0, size - 1) for place in (first, first + 1)), *weights

    top, bottom, top_weight, bottom_weight = taps(pixels.shape[-2], height)
    left, right, left_weight, right_weight = taps(pixels.shape[-1], width)
    resized = torch.empty(*pixels.shape[:-2], height, width, dtype=torch.uint8)
    for frame, out in zip(pixels, resized):
        frame = frame.contiguous()
        rows = (frame[..., left].int() * left_weight + frame[..., right].int() * right_weight) >> 4
        upper, lower = rows[..., top, :] * top_weight[:, None], rows[..., bottom, :] * bottom_weight[:, None]
        out.copy_(((upper >> 16) + (lower >> 16) + 2) >> 2)
    return resized


# Sources and their joint batches --------------------------------------------------------------------------


class JointDataset(Dataset):
    """All training sets behind one key: `dataset[source, epoch, index]` is (source, Sample)."""

    def __init__(self, datasets: dict[str, FileDataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, int, int]) -> tuple[str, Sample]:
        source, epoch, index = key
        return source, self.datasets[source][epoch, index]


class JointSampler:
    """Which samples make a batch, as a function of the step alone: `batch(step, number)` is a list of keys
    (source, pass, index) for `JointDataset`.

    Each source is a stream: pass after pass over its samples, in an order that follows from (source, seed,
    pass). A step has `batches` batches, processes times --accumulate, each with the next `per_gpu` samples of
    every source. So 8 processes draw what one process with `--accumulate 8` draws.

    An epoch is one pass over the first source; an incomplete last step is dropped. The other streams run on
    from epoch to epoch, and start over when they end. Every batch has all sources, because a DataLoader hands
    batches to its workers in turn: if video and image batches alternated, an even number of workers would
    leave all the videos to half of them.
    """

    def __init__(self, sizes: dict[str, int], per_gpu: dict[str, int], batches: int = 1, seed: int = 0):
        self.sizes, self.per_gpu, self.seed, self.first = sizes, per_gpu, seed, next(iter(sizes))
        self.per_step = {source: count * batches for source, count in per_gpu.items()}
        self.steps_per_epoch = sizes[self.first] // self.per_step[self.first]
        self.orders = {}  # {source: (pass, its order)}, the last one made
        if not self.steps_per_epoch:
            needed = ' x '.join(str(n) for n in (batches, per_gpu[self.first]) if n > 1)
            raise ValueError(
                f'{sizes[self.first]} training {self.first}s are too few for a step of {needed}; lower '
                f'--{self.first}s-per-gpu'
            )

    def batch(self, step: int, number: int = 0) -> list[tuple[str, int, int]]:
        """The keys of one batch of a step. Steps are counted from 0 through all epochs."""
        keys = []
        for source, count in self.per_gpu.items():
            start = step * self.per_step[source] + number * count
            if source == self.first:  # what an epoch leaves over is skipped
                left = self.sizes[source] - self.steps_per_epoch * self.per_step[source]
                start += step // self.steps_per_epoch * left
            for place in range(start, start + count):
                passes, place = divmod(place, self.sizes[source])
                if self.orders.get(source, (None,))[0] != passes:
                    order = generator(f'{source} order', self.seed, passes).permutation(self.sizes[source])
                    self.orders[source] = passes, order
                keys.append((source, passes, int(self.orders[source][1][place])))
        return keys


def collate(samples: list[tuple[str, Sample]]) -> dict[str, Batch]:
    """A step's samples -> {source: Batch}, clips and images in channels-last memory."""
    batch = {}
    for source in dict.fromkeys(source for source, _ in samples):
        pixels, labels, paths, *bad = zip(*(sample for name, sample in samples if name == source))
        whole = all(part is not None for part in pixels)
        stacked = default_collate([part.movedim(0, -1) for part in pixels]).movedim(-1, 1) if whole else None
        batch[source] = Batch(stacked, torch.tensor(labels), [*paths], *(sum(lists, []) for lists in bad))
    return batch
