"""From files to uint8 batches: one sample, its frames and crops, and the order in which samples are drawn.

Begin with `VideoDataset` and `ImageDataset`, which make one sample; `JointSampler` picks those of a step.
Lists are read in runtime/sources.py; `python prepare.py` checks, re-encodes and draws the files.

Everything here stays uint8 (RGB, 0..255); the model normalizes. Every random choice comes from a generator
seeded by its purpose, so a sample looks the same whichever worker makes it, before or after a restart.
"""

import math
import os
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from runtime.images import open_image, size_upright, to_tensor, upright
from video import VideoReader

Rng = np.random.Generator


def generator(purpose: str, *numbers: int) -> Rng:
    """A random generator seeded by its purpose and these non-negative integers alone."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *numbers])


# Datasets: one sample -------------------------------------------------------------------------------------


@dataclass
class FileList:
    """The files of a list, in arrays: touching a Python string's reference count in a forked worker copies
    its page of memory, and there can be a million."""

    paths: np.ndarray  # bytes (N,), below `root`
    labels: np.ndarray  # int64 (N,)
    root: str = ''

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))


class Sample(NamedTuple):
    pixels: Tensor | None  # uint8; None if unreadable (in training: if ten replacements are, too)
    label: int
    path: str
    bad: list[str]  # `path: reason` of the unreadable files met on the way


@dataclass(eq=False)
class FileDataset(Dataset):
    """What video and image datasets share: the files, the random numbers, replacing what is unreadable."""

    files: FileList | None
    mode: str = 'train'  # or 'val' or 'test'
    size: int = 224  # side of the crop
    seed: int = 0
    flip: bool = True
    min_area: float = 0.08  # of a training crop, as a share of the picture

    @property
    def short_side(self) -> int:
        """The length of the shorter side in evaluation: 256 for crops of 224."""
        return self.size * 8 // 7

    def __len__(self) -> int:
        return len(self.files)

    def rng_for(self, what: str, nth_pass: int, index: int) -> Rng:
        """The generator for a training sample's random choices."""
        return generator(f'{type(self).__name__} {what}', self.seed, nth_pass, index)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """The sample at (pass, index) of a training set, or at `index` of any other. In training, a file
        drawn from the same key replaces an unreadable one."""
        if self.mode != 'train':
            return self.read(key, None, [])
        nth_pass, index = key
        replacements = self.rng_for('replacements', nth_pass, index)
        bad = []
        while True:
            # A replacement is augmented like the one that it replaces: by the key, not by its own index.
            sample = self.read(index, self.rng_for('augmentation', *key), bad)
            if sample.pixels is not None or len(bad) > 10:
                return sample
            index = int(replacements.integers(len(self)))

    def read(self, index: int, rng: Rng | None, bad: list[str]) -> Sample:
        """The sample of one file. If it cannot be read, its pixels are None and `bad` gets a line."""
        path, label = self.files.path(index), int(self.files.labels[index])
        try:
            pixels = self.load(path, rng)
        except Exception as error:  # damaged files raise whatever the decoder trips over
            bad.append(f'{path}: {one_line(error)}')
            pixels = None
        return Sample(pixels, label, path, bad)


@dataclass(eq=False)
class VideoDataset(FileDataset):
    """Clips of the listed videos, uint8.

    mode 'train': `dataset[pass, index]` has a random crop of a random clip, (3, T, size, size). The recipe
    resizes frames to a short side of 256 before it crops. Here the original frame is cropped and resized
    once. Crops have the same distribution, as area, ratio and place scale with the frame.
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
        with VideoReader(path) as video:
            return self.training_clip(video, rng) if self.mode == 'train' else self.views(video)

    def training_clip(self, video: VideoReader, rng: Rng) -> Tensor:
        """A random clip, cropped and perhaps mirrored, all frames alike, (3, T, size, size)."""
        indices = sample_frames(len(video), self.clip_len, self.frame_interval, rng=rng)[0]
        crops = {}  # by frame number: a clip that starts over in a short video has frames twice
        for number, frame in video.frames(indices):
            if not crops:  # the size is known now; all frames are cropped alike
                top, left, height, width = crop_box(*frame.shape[:2], rng, self.min_area)
            crop = torch.from_numpy(frame[top : top + height, left : left + width]).permute(2, 0, 1)
            crops[number] = resize(crop, self.size, self.size).permute(1, 2, 0)
        clip = torch.stack([crops[number] for number in indices])  # (T, size, size, 3)
        clip = clip.movedim(-1, 0)
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return clip

    def views(self, video: VideoReader) -> Tensor:
        """Evenly spread clips under one or three crops each, (V, 3, T, S, S)."""
        num_clips = self.num_clips if self.mode == 'test' else 1
        clips = sample_frames(len(video), self.clip_len, self.frame_interval, num_clips)  # (clips, T)
        small = {}  # by frame number; resized at once, because 80 frames of 4K would take 2 GB
        for number, frame in video.frames(clips.ravel()):
            size = short_side_to(self.short_side, *frame.shape[:2])
            small[number] = resize_as_opencv(torch.from_numpy(frame).permute(2, 0, 1), *size)
        frames = torch.stack([small[number] for number in clips.ravel()])  # (clips * T, 3, H, W)
        if self.mode == 'val':
            crops = center_crop(frames, self.size)[None]
        elif self.num_crops == 3:
            crops = three_crops(frames)
        else:
            crops = center_crop(frames, self.short_side)[None]
        views = crops.unflatten(1, clips.shape).flatten(0, 1)  # (crops, clips * T, ...) -> (V, T, 3, S, S)
        return views.transpose(1, 2)


@dataclass(eq=False)
class ImageDataset(FileDataset):
    """The listed images, uint8.

    mode 'train': `dataset[pass, index]` has a random crop, (3, size, size).
    mode 'val':   `dataset[index]` has one view, the centre crop, (1, 3, size, size). A test uses it too.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.size, self.size

    def load(self, path: str, rng: Rng | None) -> Tensor:
        """Decode `path` as the mode asks, see above. A damaged file can raise any Exception."""
        with open_image(path) as image:  # the size is known; nothing is decoded yet
            if self.mode == 'train':
                return self.training_crop(image, rng)
            pixels = to_tensor(upright(image))
        pixels = resize(pixels, *short_side_to(self.short_side, *pixels.shape[-2:]))
        return center_crop(pixels, self.size)[None]

    def training_crop(self, image: Image.Image, rng: Rng) -> Tensor:
        """A random crop of an opened picture, perhaps mirrored, (3, size, size)."""
        height, width = size_upright(image)
        top, left, h, w = crop_box(height, width, rng, self.min_area)
        # libjpeg can decode a JPEG at a half, a quarter or an eighth; `draft` picks the smallest that is not
        # below the given size, and does nothing to other formats.
        scale = self.size / min(h, w)
        image.draft('RGB', [math.ceil(side * scale) for side in image.size])
        image = upright(image)
        y, x = image.height / height, image.width / width
        crop = image.crop((round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)))
        pixels = resize(to_tensor(crop), self.size, self.size)
        if self.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels


def one_line(error: Exception) -> str:
    """The first line of an error's message, without its number and path."""
    text = getattr(error, 'strerror', None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


# Which frames and which pixels: the recipe's sampling and augmentation ------------------------------------


def sample_frames(
    num_frames: int, clip_len: int = 8, frame_interval: int = 8, num_clips: int = 1, rng: Rng | None = None
) -> np.ndarray:
    """Frame numbers of `num_clips` clips of a video with `num_frames` frames -> int64 (num_clips, clip_len).

    With `rng` (training), each clip starts anywhere that leaves clip_len * frame_interval frames to the end.
    Without it (validation and test), a single clip lies in the middle and several are spread evenly from
    start to end. A video too short for a clip wraps around.
    """
    if rng is not None:
        starts = rng.integers(max(num_frames - clip_len * frame_interval, 0) + 1, size=num_clips)
    else:
        last = max(num_frames - (clip_len - 1) * frame_interval - 1, 0)
        # numpy's round() and the order of these operations decide where a start of x.5 goes
        spread = np.round(np.arange(num_clips) * (last / max(num_clips - 1, 1)))
        starts = spread if num_clips > 1 else np.array([last // 2])
    return (starts.astype(np.int64)[:, None] + np.arange(clip_len) * frame_interval) % num_frames


def crop_box(height: int, width: int, rng: Rng, min_area: float = 0.08) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop: `min_area` to 1 of the area, a ratio of 3/4 to 4/3. If ten
    tries do not fit, it is the centre square, as in MMAction2."""
    for _ in range(10):
        area = rng.uniform(min_area, 1) * height * width
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
    """uint8 (C, H, W) or (N, C, H, W) -> the same, height x width: bilinear, half-pixel centres, no
    antialiasing."""
    interleaved = pixels.movedim(-3, -1).contiguous()  # torch resizes RGB, RGB, ... fastest
    batch = interleaved.view(-1, *interleaved.shape[-3:]).movedim(-1, 1)  # (N, C, H, W)
    return F.interpolate(batch, (height, width), mode='bilinear').view(*pixels.shape[:-2], height, width)


def resize_as_opencv(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (..., H, W) -> (..., height, width): like `resize`, but bit for bit as OpenCV's INTER_LINEAR.

    OpenCV cuts off where torch rounds, so one value in eight is one level darker than the exact result.
    Published scores depend on that, so the evaluation of videos does the same; training need not.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels

    def taps(size: int, new_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each new pixel: its two neighbours, and their weights in 2048ths (11 bits)."""
        at = ((torch.arange(new_size, dtype=torch.float64) + 0.5) / (new_size / size) - 0.5).float()
        first = at.floor()
        weights = [(part * 2048).round().int() for part in (1 - (at - first), at - first)]
        neighbours = [place.long().clamp(0, size - 1) for place in (first, first + 1)]
        return *neighbours, *weights

    top, bottom, top_weight, bottom_weight = taps(pixels.shape[-2], height)
    left, right, left_weight, right_weight = taps(pixels.shape[-1], width)
    pixels = pixels.contiguous()
    # The weights have multiplied by 2048 twice, which is 22 bits. OpenCV drops 4, then 16, then rounds off 2.
    rows = (pixels[..., left].int() * left_weight + pixels[..., right].int() * right_weight) >> 4
    upper, lower = rows[..., top, :] * top_weight[:, None], rows[..., bottom, :] * bottom_weight[:, None]
    return (((upper >> 16) + (lower >> 16) + 2) >> 2).byte()


# Which samples make a batch -------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The samples of one source in a batch."""

    pixels: Tensor | None  # uint8 (B, 3, T, H, W) or (B, 3, H, W); None if any is missing
    labels: Tensor  # int64 (B,)
    paths: list[str]
    bad: list[str]


class JointDataset(Dataset):
    """All training sets behind one key: `dataset[source, pass, index]` is (source, Sample)."""

    def __init__(self, datasets: dict[str, FileDataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, int, int]) -> tuple[str, Sample]:
        source, nth_pass, index = key
        return source, self.datasets[source][nth_pass, index]


class JointSampler:
    """Which samples make a batch, as a function of the step alone: `batch(step, micro)` is a list of keys
    (source, pass, index) for `JointDataset`.

    Each source is a stream: pass after pass over its samples, in an order that follows from (source, seed,
    pass). A step has `num_batches` batches, processes times --accumulate, each with the next `per_gpu`
    samples of every source. So 8 processes draw what one process with `--accumulate 8` draws.

    An epoch is one pass over the first source; an incomplete last step is dropped. The other streams run on
    from epoch to epoch, and start over when they end. Every batch has all sources, because a DataLoader hands
    batches to its workers in turn: if video and image batches alternated, an even number of workers would
    leave all the videos to half of them.
    """

    def __init__(self, sizes: dict[str, int], per_gpu: dict[str, int], num_batches: int = 1, seed: int = 0):
        self.sizes, self.per_gpu, self.seed, self.first = sizes, per_gpu, seed, next(iter(sizes))
        self.per_step = {source: count * num_batches for source, count in per_gpu.items()}
        self.steps_per_epoch = sizes[self.first] // self.per_step[self.first]
        self.orders = {source: (-1, None) for source in sizes}  # (pass, its order), only the latest is kept
        if not self.steps_per_epoch:
            needed = ' x '.join(str(n) for n in (num_batches, per_gpu[self.first]) if n > 1)
            raise ValueError(
                f'{sizes[self.first]} training {self.first}s are too few for a step of {needed}; lower '
                f'--{self.first}s-per-gpu or --accumulate'
            )

    def batch(self, step: int, micro: int = 0) -> list[tuple[str, int, int]]:
        """The keys of batch `micro` of a step, both counted from 0; steps through all epochs."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        keys = []
        for source, count in self.per_gpu.items():
            if source == self.first:  # a new epoch is a new pass, whatever the last one left over
                start = epoch * self.sizes[source] + step_of_epoch * self.per_step[source]
            else:  # runs on, without regard to epochs
                start = step * self.per_step[source]
            start += micro * count
            for position in range(start, start + count):
                nth_pass, place = divmod(position, self.sizes[source])
                keys.append((source, nth_pass, int(self.order(source, nth_pass)[place])))
        return keys

    def order(self, source: str, nth_pass: int) -> np.ndarray:
        """The indices of a source's samples in the order of a pass, int64 (N,)."""
        if self.orders[source][0] != nth_pass:  # a permutation of a million takes 20 ms, so it is kept
            order = generator(f'{source} order', self.seed, nth_pass).permutation(self.sizes[source])
            self.orders[source] = nth_pass, order
        return self.orders[source][1]


def collate(samples: list[tuple[str, Sample]]) -> dict[str, Batch]:
    """A batch's samples -> {source: Batch}, clips and images in channels-last memory. In a worker, the pixels
    are stacked into shared memory, from which the main process reads them without a copy."""
    batch = {}
    for source in dict.fromkeys(source for source, _ in samples):
        own = [sample for name, sample in samples if name == source]
        pixels = None
        if all(sample.pixels is not None for sample in own):
            pixels = default_collate([sample.pixels.movedim(0, -1) for sample in own]).movedim(-1, 1)
        labels = torch.tensor([sample.label for sample in own])
        paths = [sample.path for sample in own]
        batch[source] = Batch(pixels, labels, paths, [line for sample in own for line in sample.bad])
    return batch
