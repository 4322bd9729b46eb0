"""Prepare data: make a small set to try things with; check, speed up and view your own files.

python prepare.py demo DIR            the small set of videos and images that `train.py --demo` trains on
python prepare.py check SOURCE        read every file as training will, and name what cannot be read
python prepare.py encode SRC DST      a smaller, faster-decoding copy of a tree of videos or images
python prepare.py show OUT.png        a picture of training samples, as read from disk and as fed
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

import data
from runtime import sources
from runtime.command import Parser, draw_rows, in_parallel, number
from runtime.distributed import about_file, locked, open_outputs, say
from video import VideoReader, local, open_video, turn, upright

# check: what training and evaluation cannot read ----------------------------------------------------------


def check(source: str, root: str = '') -> tuple[int, list[str]]:
    """Read one file, or every file of a list or folder, to the end, as training and evaluation do.

    A list counts as one of videos if a fifth of it are videos, else of images; without a list, each file's
    content decides. Prints the classes without a readable file. Returns the number of files and `path:
    reason` for each bad one.
    """
    as_image, kind, names, files = None, 'files', None, None
    if os.path.isdir(source):
        paths = sources.files_below(source, sources.VIDEO_ENDINGS + sources.image_endings())
        if not paths:
            raise ValueError(f'{source}: no videos or images below it')
        names, labels = np.unique([os.path.dirname(path) for path in paths], return_inverse=True)
        names, files = names.tolist(), data.FileList(np.array([*map(os.fsencode, paths)]), labels)
    elif (
        source.lower().endswith(sources.VIDEO_ENDINGS + sources.image_endings())
        or sources.is_image(source)
        or not is_text(source)
    ):
        paths = [source]
    else:
        files = sources.read_list(source, root, videos=True)
        sources.check_there(files, source, '--root')
        paths = [files.path(index) for index in range(len(files))]
        as_image = np.mean([sources.is_image(path) for path in paths[:: len(paths) // 100 + 1]]) > 0.8
        kind = 'images' if as_image else 'videos'
    jobs = dict.fromkeys((path, as_image) for path in paths)
    bad = {path: reason for (path, _), reason in in_parallel(check_file, [*jobs], 'checking') if reason}
    return len(jobs), sorted(f'{path}: {reason}' for path, reason in bad.items())


def is_text(path: str) -> bool:
    """Whether a file can be a list, as far as its first line tells."""
    with contextlib.suppress(ValueError):
        return next(sources.read_lines(path), True) is not None
    return False


def check_file(path: str, as_image: bool | None = None) -> None:
    """Read a file as training and evaluation do, then all of it. `as_image` None lets its content decide. A
    damaged file can raise any Exception."""
    as_image = sources.is_image(path) if as_image is None else as_image
    kind = data.ImageDataset if as_image else data.VideoDataset
    kind(None).load(path, data.generator('check'))  # decodes a large JPEG at half its size or less
    kind(None, 'val').load(path, None)  # resizes whole frames
    if not as_image:
        with VideoReader(path) as video:
            check_end(video)
            for _ in video.frames(range(len(video))):
                pass


def check_end(video: VideoReader) -> None:
    """Raise ValueError if the header shows that a file has lost its end. It is trusted only if much is
    missing: counts may be off by a few frames, and the length, which is all that Matroska and WebM have,
    includes the sound and a long last frame."""
    packets, last = 0, 0.0
    container, stream = open_video(video.path, ignore_editlist='1')  # count what it hides in MP4
    with container:
        for packet in container.demux(stream):
            packets += bool(packet.size)  # the last one is empty
            last = max(last, float((packet.pts or 0) * stream.time_base))
        duration = (container.duration or 0) / av.time_base
        count, length = stream.frames, float(stream.frames / (stream.average_rate or 30))
    end = last * packets / max(packets - 1, 1)  # of the last frame
    if packets < 0.9 * count and end < 0.9 * length:  # in time too, because AVI counts dropped frames
        raise ValueError(f'only {packets} of {count} frames are there')
    if not count and last < duration / 2 - 1:
        raise ValueError(f'ends after {last:.1f} of {duration:.1f} seconds')


# encode: the same files, smaller and quick to decode -----------------------------------------------------


def encode(source: str, target: str, short_side: int = 256, gop: int = 4, crf: int = 21) -> tuple[int, list]:
    """Copy all videos and images below a folder, smaller and faster to decode.

    Names stay the same, so lists stay valid: x.avi then holds an MP4 and x.png a JPEG; FFmpeg and Pillow look
    at the content. Finished files are left alone, so a stopped copy can go on. Returns the number of files,
    and `path: reason` for each bad one. Raises ValueError for unsuitable folders, OSError for a full disk.
    """
    if not os.path.isdir(source):
        raise ValueError(f'{source}: not a folder; encode takes a folder of videos or images')
    if f'{os.path.realpath(target)}/'.startswith(f'{os.path.realpath(source)}/'):
        raise ValueError(f'{target}: the copy needs a folder of its own outside {source}')
    paths = sources.files_below(source, sources.VIDEO_ENDINGS + sources.image_endings())
    if not paths:
        raise ValueError(f'{source}: no videos or images below it')
    copies = [os.path.join(target, os.path.relpath(path, source)) for path in paths]
    for folder in {*map(os.path.dirname, copies), target}:
        os.makedirs(folder, exist_ok=True)
    if there := sum(map(os.path.exists, copies)):
        say(f'{there} of {len(paths)} files are in {target} and stay as they are, whatever their settings')
    lock = open(os.path.join(target, 'bad_samples.txt'), 'a')
    if not locked(lock):
        raise ValueError(f'{target} is in use by another encode')
    jobs = [(*pair, short_side, gop, crf) for pair in zip(paths, copies)]
    try:
        with contextlib.closing(in_parallel(encode_file, jobs, 'encoding')) as results:
            bad = sorted(f'{job[0]}: {reason}' for job, reason in results if reason)
        done = [pair for pair in zip(paths, copies) if os.path.exists(pair[1])]
        before, after = (sum(map(os.path.getsize, part)) / 1e6 for part in zip(*done)) if done else (0, 0)
        say(f'{target}: {len(done)} copies of {after:,.1f} MB, their originals have {before:,.1f} MB')
        return len(jobs), bad
    finally:
        for copy in copies:
            Path(f'{copy}.part').unlink(missing_ok=True)  # of what failed, or was stopped


def encode_file(source: str, target: str, short_side: int = 256, gop: int = 4, crf: int = 21) -> None:
    """Re-encode a video or image, its short side at most `short_side` (bicubic). A file already as small (a
    video: H.264 with as many key frames) is copied; so is an animation that a list of images may name.

    A `target` that exists is finished, because it is written beside and renamed; it is left alone. Raises
    OSError if it cannot be written; a damaged source can raise any Exception.
    """
    if os.path.exists(target) and os.path.getsize(target):  # a power cut can leave it empty
        return
    part, as_image = f'{target}.part', sources.is_image(source)
    if as_image:
        with data.open_image(source) as image:
            keep = min(image.size) <= short_side or image.format == 'WEBP' and image.n_frames > 1
    else:
        with VideoReader(source) as video:
            codec = video.stream.codec_context
            small = codec.name == 'h264' and min(codec.width, codec.height) <= short_side
            keep = small and video.group <= gop
    if keep or not as_image and source.lower().endswith(sources.image_endings()):
        check_file(source, as_image)
        shutil.copyfile(source, part)
    elif as_image:
        encode_image(source, part, short_side)
    else:
        encode_video(source, part, short_side, gop, crf)
    os.replace(part, target)


def encode_image(source: str, target: str, short_side: int) -> None:
    """Write a JPEG of quality 90, upright."""
    with data.open_image(source) as image:
        image = data.upright(image).convert('RGB')
    height, width = data.short_side_to(short_side, image.height, image.width)
    image.resize((width, height), Image.Resampling.BICUBIC).save(target, 'JPEG', quality=90)


def encode_video(source: str, target: str, short_side: int, gop: int, crf: int) -> None:
    """Write an MP4 of H.264: upright, a key frame every `gop` frames, 8 bits in 4:2:0, without sound; frame
    by frame the same video, at the same times, in the same colours.

    Of many settings tried, these decode fastest for their size at equal PSNR: no B-frames and, through
    `fastdecode`, neither CABAC nor deblocking.
    """
    with VideoReader(source) as video, av.open(local(target), 'w', format='mp4') as container:
        check_end(video)
        options = {'crf': str(crf), 'preset': 'veryfast', 'tune': 'fastdecode', 'threads': '1'}
        options['x264-params'] = f'keyint={gop}:scenecut=0:bframes=0'
        stream = container.add_stream('libx264', video.stream.average_rate or 30, options)
        codec, reformatter, number = stream.codec_context, VideoReformatter(), -1
        codec.time_base = Fraction(1, 1_200_000)  # at the usual rates a frame lasts a whole number of these
        order = np.arange(len(video))
        times = np.maximum.accumulate(np.round(video.times(order) * 1_200_000) - order) + order  # all differ
        for (number, frame), time in zip(video.decode(), times.astype(int).tolist()):
            frame = upright_yuv(frame)
            if not number:
                side = min(short_side, frame.width, frame.height)
                sides = data.short_side_to(side, frame.height, frame.width)
                codec.height, codec.width = (max(side // 2 * 2, 2) for side in sides)  # even, for 4:2:0
                # If these are unspecified, readers assume BT.601 and limited range.
                codec.colorspace, codec.color_range = frame.colorspace, frame.color_range
                codec.color_primaries, codec.color_trc = frame.color_primaries, frame.color_trc
                size = codec.width, codec.height
            frame = reformatter.reformat(
                frame, *size, 'yuv420p', interpolation='BICUBIC', dst_color_range=codec.color_range, threads=1
            )
            frame.pts, frame.time_base = time, codec.time_base
            frame.pict_type = PictureType.NONE  # else a former key frame would become one again
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if number + 1 < len(video):
            raise ValueError(f'only {number + 1} of {len(video)} frames can be decoded')


def upright_yuv(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame unchanged, unless it must be rotated or is not in YUV; then in 4:4:4, its colours tagged. It is
    rotated in YUV, because going to RGB and back can cost three levels of 255."""
    is_rgb = frame.format.is_rgb or frame.colorspace == 0  # the latter with a palette
    if not is_rgb and not any(turn(frame)):
        return frame
    matrix, levels = (Colorspace.ITU601, ColorRange.MPEG) if is_rgb else (None, frame.color_range)
    rgb = frame.reformat(format='rgb24') if is_rgb else frame
    yuv = rgb.reformat(format='yuv444p', dst_colorspace=matrix, dst_color_range=levels)
    planes = upright(yuv.to_ndarray().transpose(1, 2, 0), frame).transpose(2, 0, 1)  # (3, H, W)
    turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), 'yuv444p')
    turned.colorspace, turned.color_range = (yuv if is_rgb else frame).colorspace, yuv.color_range
    turned.color_primaries, turned.color_trc = frame.color_primaries, frame.color_trc
    return turned


# show: samples as they are read and as they are fed -------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """Draw training clips and images of epoch 0, one of each of three classes, as read and as fed."""
    rows, titles, clip = [], [], {'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    for source, kind, options in (('video', data.VideoDataset, clip), ('image', data.ImageDataset, {})):
        file, root = getattr(args, f'{source}_list'), getattr(args, f'{source}_root') or ''
        if not file and os.path.exists(f'data/demo/{source}_train.txt'):
            file, root = f'data/demo/{source}_train.txt', root or f'data/demo/{source}s_train'
        if not file:
            continue
        files = sources.open_list(file, root, source, None, None, source == 'video')
        dataset = kind(files, size=args.size, **options)
        for index in np.unique(files.labels, return_index=True)[1][:3].tolist():
            sample = dataset[0, index]
            if sample.pixels is None:
                raise ValueError(f'{file}: 11 samples in a row are unreadable')
            instead = f' in place of {sample.bad[0]}' if sample.bad else ''
            titles.append(f'{sample.path} (label {sample.label}) as read and as fed{instead}')
            if source == 'image':
                with data.open_image(sample.path) as image:
                    rows.append([data.to_tensor(data.upright(image)), sample.pixels])
                continue
            with VideoReader(sample.path) as video:  # the same clip, by the same random numbers
                rng = dataset.generator('augmentation', 0, index)
                frames = video.get_batch(data.sample_frames(len(video), **clip, rng=rng)[0])
            rows += [torch.from_numpy(frames).permute(0, 3, 1, 2), sample.pixels.transpose(0, 1)]
            titles.append('')
    if not rows:
        raise ValueError('nothing to show: name --video-list or --image-list, or make data/demo with `demo`')
    draw_rows(args.out, rows, titles, args.size)


# demo: a small set of real files --------------------------------------------------------------------------

DEMO_PATTERNS = {  # where each is bright; coordinates grow by 1 per repetition
    'stripes': lambda y, x: (y % 1 < 0.5) | (0 * x > 0),
    'checks': lambda y, x: (y % 1 < 0.5) ^ (x % 1 < 0.5),
    'dots': lambda y, x: (y % 1 - 0.5) ** 2 + (x % 1 - 0.5) ** 2 < 0.35**2,
    'zigzag': lambda y, x: (y + abs(x % 1 - 0.5)) % 1 < 0.5,
}


def make_demo(
    root: str, train_videos: int = 50, val_videos: int = 12, train_images: int = 150, val_images: int = 20
):
    """Make a small set of real files below a folder: MP4 videos, JPEG images, their lists and label maps.

    Images show one of four patterns. Videos show one of them rising or falling, which makes eight classes. A
    single frame is equally likely in both directions, so it takes several to tell; mirroring changes neither.
    Counts are per class. A set that has `image_labels.txt`, which is written last, is left as it is.
    """
    root = Path(root)
    if (root / 'image_labels.txt').exists():
        say(f'reusing the set in {root}')
        return
    say(f'making a small set in {root}')
    videos = [f'{pattern} {motion}' for pattern in DEMO_PATTERNS for motion in ('rising', 'falling')]
    jobs = []
    for source, classes, suffix, *counts in (
        ('video', videos, 'mp4', train_videos, val_videos),
        ('image', [*DEMO_PATTERNS], 'jpg', train_images, val_images),
    ):
        for split, count in zip(('train', 'val'), counts):
            folder = root / f'{source}s_{split}'
            folder.mkdir(parents=True, exist_ok=True)
            with open(root / f'{source}_{split}.txt', 'w') as file:
                for number in range(len(classes) * count):
                    label = number % len(classes)
                    name = f'{classes[label].replace(" ", "_")}_{number // len(classes):03d}.{suffix}'
                    jobs.append((folder / name, classes[label], source, split, number))
                    print(name, label, file=file)
    for job, reason in in_parallel(_draw_demo_file, jobs, 'drawing'):
        if reason:
            raise OSError(f'{job[0]} cannot be written ({reason})')
    (root / 'video_labels.txt').write_text('\n'.join(videos) + '\n')
    (root / 'image_labels.txt').write_text('\n'.join(DEMO_PATTERNS) + '\n')


def _draw_demo_file(path: Path, name: str, source: str, split: str, number: int) -> None:
    rng = data.generator(f'demo {source} {split}', number)
    pattern, _, motion = name.partition(' ')
    height, width, fine = 64, 96, 2  # drawn twice as fine, for smooth edges
    period = fine * rng.uniform(13, 20)
    speed = period / 32 * rng.uniform(0.7, 1.3) * {'rising': 1, 'falling': -1, '': 0}[motion]  # per frame
    y, x = (axis + period * rng.uniform() for axis in np.ogrid[: height * fine, : width * fine])
    texture = rng.normal(0, 12, (height, width, 1))
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.uniform(-30, 30, 3)
    back, front = rng.uniform(20, 90, 3), rng.uniform(140, 250, 3)
    frames = []
    for t in range(80 if motion else 1):
        cover = DEMO_PATTERNS[pattern]((y + speed * t) / period, x / period)
        cover = cover.reshape(height, fine, width, fine).mean((1, 3))[..., None]
        frames.append(np.clip(back + slope + (front - back) * cover + texture, 0, 255).astype(np.uint8))
    if not motion:
        return Image.fromarray(frames[0]).save(path, quality=90)
    options = {'crf': '20', 'g': '24', 'preset': 'veryfast', 'threads': '1'}
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', 30, options, width=width, height=height)
        for frame in [*(av.VideoFrame.from_ndarray(pixels, 'rgb24') for pixels in frames), None]:
            container.mux(stream.encode(frame))


# The command ----------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog='prepare.py')
    commands = parser.add_subparsers(dest='command', required=True, help='one of these; --help has its flags')

    def command(function: Callable, name: str, files: str) -> Callable:
        usage, text = f'prepare.py {name} {files} [--FLAG ...]', function.__doc__.split('\n\n')[0]
        return commands.add_parser(name, doc=text, usage=usage).add_argument

    count, default = number(int, 1, 2**20), ' (default: %(default)s)'
    add = command(make_demo, 'demo', 'DIR')
    add('dir', metavar='DIR', help='folder to make it in; an existing set is kept')

    add = command(check, 'check', 'SOURCE')
    add('source', metavar='SOURCE', help='a list, a folder of videos or images, or one file')
    add('--root', default='', help='folder that the paths of a list start from')
    add('--out', default='bad_samples.txt', help='file for the list of bad files, with reasons' + default)

    add = command(encode, 'encode', 'SRC DST')
    add('src', metavar='SRC', help='folder of videos or images, at any depth')
    add('dst', metavar='DST', help='folder for the copies; its bad_samples.txt lists bad files')
    add('--short-side', type=count, default=256, help='at most, in pixels' + default)
    add('--gop', type=count, default=4, help='frames from one key frame to the next' + default)
    add('--crf', type=number(int, 0, 52), default=21, help='of libx264, 0 to 51: higher is smaller' + default)

    add = command(show, 'show', 'OUT.png')
    add('out', metavar='OUT.png', help='picture to write')
    for source in ('video', 'image'):
        add(f'--{source}-list', metavar='LIST', help="or class folders; default: data/demo's, if it is there")
        add(f'--{source}-root', metavar='DIR', help=f'folder that the paths of the {source} list start from')
    add('--size', type=count, default=112, help='side of the crop' + default)
    add('--clip-len', type=count, default=8, help='frames of a clip' + default)
    add('--frame-interval', type=count, default=8, help='from one frame of a clip to the next' + default)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if a script ignores it
    open_outputs()
    try:
        if args.command == 'demo':
            make_demo(args.dir)
        elif args.command == 'check':
            open(args.out, 'a').close()  # fails now rather than in hours
            try:
                report(args.source, *check(args.source, args.root), args.out)
            finally:
                if not os.path.getsize(args.out):
                    os.remove(args.out)
        elif args.command == 'encode':
            bad = os.path.join(args.dst, 'bad_samples.txt')
            report(args.src, *encode(args.src, args.dst, args.short_side, args.gop, args.crf), bad)
        else:
            show(args)
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        say(f'prepare.py: {"stopped" if stopped else about_file(error) or error}', sys.stderr)
        sys.exit(130 if stopped else 1)


def report(source: str, count: int, bad: list[str], out: str) -> None:
    """Say how many files are bad, write down which, and exit with 1 if there are any."""
    say(f'{source}: {count} files, {len(bad)} of them unreadable' + (f', see {out}' if bad else ''))
    for line in bad[:10] + ['...'] * (len(bad) > 10):
        say(line)
    Path(out).write_text(''.join(f'{line}\n' for line in bad), 'utf-8', 'surrogateescape')
    if bad:
        sys.exit(1)


if __name__ == '__main__':
    main()
