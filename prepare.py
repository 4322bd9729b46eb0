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
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

import data
from runtime import sources
from runtime.command import Parser, check_writable, draw_rows, in_parallel, number
from runtime.distributed import about_file, locked, open_outputs, say
from runtime.images import open_image, to_tensor, upright
from video import VideoReader, local

# check: what training and evaluation cannot read ----------------------------------------------------------


def check(source: str, root: str = '', out: str = 'bad_samples.txt') -> None:
    """Read one file, or every file of a list or folder, to the end, as training and evaluation do.

    A file's ending tells an image from a video; for a list, that of its first file does.
    """
    check_writable(out)
    if os.path.isdir(source):
        jobs = [(path, sources.is_image(path)) for path in sources.files_of(source)]
    elif sources.is_image(source) or source.lower().endswith(sources.VIDEO_ENDINGS):
        jobs = [(source, sources.is_image(source))]
    else:
        files = sources.read_list(source, root, videos=True)
        as_image = sources.is_image(files.path(0))
        if as_image:
            files = sources.read_list(source, root)
        sources.check_there(files, source, '--root')
        jobs = [(files.path(index), as_image) for index in range(len(files))]
    work_through(check_file, [*dict.fromkeys(jobs)], source, out)  # a list may name a file twice


def work_through(function: Callable, jobs: list[tuple], title: str, out: str) -> None:
    """Do the jobs, whose first argument is a path. If some fail, list them in the file `out` and exit with 1.
    Raises OSError on a full disk."""
    with contextlib.closing(in_parallel(function, jobs, title)) as results:
        bad = sorted(f'{job[0]}: {reason}' for job, reason in results if reason)
    bad = ['\\n'.join(line.splitlines()) for line in bad]  # one line each, even if a name has a line break
    if bad or os.path.exists(out):
        Path(out).write_text(''.join(f'{line}\n' for line in bad), 'utf-8', 'surrogateescape')
    see = f', see {out}' if bad else ''
    say(f'{title}: {len(jobs)} files, {len(bad)} of them unreadable{see}')
    if bad:
        say('\n'.join(bad[:10]))
        sys.exit(1)


def check_file(path: str, as_image: bool) -> None:
    """Read a file as training and evaluation do, then all of it. A damaged file can raise any Exception."""
    kind = data.ImageDataset if as_image else data.VideoDataset
    kind(None).load(path, data.generator('check'))  # decodes a large JPEG at half its size or less
    kind(None, 'val').load(path, None)  # resizes whole frames
    if not as_image:
        with VideoReader(path) as video:
            for _ in video.frames(range(len(video))):
                pass


# encode: the same files, smaller and quick to decode -----------------------------------------------------


def encode(source: str, target: str, short_side: int = 256, gop: int = 4, crf: int = 21) -> None:
    """Copy all videos and images below a folder, smaller and faster to decode.

    Names stay the same, so lists stay valid: x.avi then holds an MP4 and x.png a JPEG; FFmpeg and Pillow look
    at the content. Finished files are left alone, so a stopped copy can go on.
    """
    if Path(target).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f'{target}: the copy needs a folder of its own outside {source}')
    paths = sources.files_of(source)
    copies = [os.path.join(target, os.path.relpath(path, source)) for path in paths]
    there = sum(map(os.path.exists, copies))
    if there:
        say(f'{there} of {len(paths)} files are in {target} and stay as they are, whatever their settings')
    os.makedirs(target, exist_ok=True)
    out, lock = os.path.join(target, 'bad_samples.txt'), open(os.path.join(target, '.lock'), 'a')
    if not locked(lock):
        raise ValueError(f'{target} is in use by another encode')
    jobs = [(*pair, short_side, gop, crf) for pair in zip(paths, copies)]
    try:
        work_through(encode_file, jobs, source, out)
        Path(out).unlink(missing_ok=True)  # of an earlier, worse time
    finally:
        for copy in copies:
            Path(f'{copy}.part').unlink(missing_ok=True)  # of what failed, or was stopped
        os.remove(lock.name)


def encode_file(source: str, target: str, short_side: int = 256, gop: int = 4, crf: int = 21) -> None:
    """Re-encode a video or image, its short side at most `short_side`. A damaged source can raise any
    Exception.

    A `target` that exists is finished, because it is written beside and renamed; it is left alone.
    """
    if os.path.exists(target) and os.path.getsize(target):  # a power cut can leave it empty
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    part = f'{target}.part'
    if sources.is_image(source):
        encode_image(source, part, short_side)
    else:
        encode_video(source, part, short_side, gop, crf)
    os.replace(part, target)


def encode_image(source: str, target: str, short_side: int) -> None:
    """Write a JPEG of quality 90, upright; or a copy, if the picture is as small already."""
    with open_image(source) as image:
        image = upright(image).convert('RGB')
    height, width = data.short_side_to(short_side, image.height, image.width)
    if height >= image.height:
        shutil.copyfile(source, target)
        return
    image.resize((width, height), Image.Resampling.BICUBIC).save(target, 'JPEG', quality=90)


def encode_video(source: str, target: str, short_side: int, gop: int, crf: int) -> None:
    """Write an MP4 of H.264: upright, a key frame every `gop` frames, 8 bits of BT.709 in 4:2:0 (4:2:2 if
    interlaced), without sound; frame by frame the same video, at the same times, in the same colours.

    Of many settings tried, these decode fastest for their size at equal PSNR: no B-frames and, through
    `fastdecode`, neither CABAC nor deblocking. With `mbtree`, libx264 reads memory that it never wrote (in
    AVX-512 code), and the same video would not give the same copy.
    """
    options = {'crf': str(crf), 'preset': 'veryfast', 'tune': 'fastdecode', 'threads': '1'}
    options['x264-params'] = f'keyint={gop}:scenecut=0:bframes=0:mbtree=0'
    with VideoReader(source) as video:
        times, order = video.times(range(len(video))), np.arange(len(video))
        # MP4 counts from frame to frame in 32 bits: 6 hours of the usual clock, or longer ones of a slower.
        clock = int(min(90_000, 2**31 / np.diff(times).max(initial=1)))
        ticks = np.maximum.accumulate(np.round(times * clock) - order) + order  # no two are equal
        height, width = video.get_batch([0]).shape[1:3]
        sides = data.short_side_to(min(short_side, height, width), height, width)
        # In interlaced video every other line is of another moment, and needs colours of its own.
        interlaced = next(video.decode())[1].interlaced_frame
        with av.open(local(target), 'w', 'mp4', options={'video_track_timescale': str(clock)}) as container:
            stream = container.add_stream('libx264', video.stream.average_rate or 30, options)
            codec, reformatter = stream.codec_context, VideoReformatter()
            codec.height, codec.width = (max(side // 2 * 2, 2) for side in sides)  # colours need even ones
            codec.pix_fmt, codec.time_base = 'yuv422p' if interlaced else 'yuv420p', Fraction(1, clock)
            # BT.709 in all three numberings. Readers that are not told assume BT.601.
            codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
            codec.color_range = ColorRange.MPEG
            form = {'width': codec.width, 'height': codec.height, 'format': codec.pix_fmt}
            form |= {'dst_colorspace': codec.colorspace, 'dst_color_range': codec.color_range}
            for number, pixels in video.frames(order):
                # FFmpeg's way from YUV to RGB rounds down, by one level on average, when the copy is read.
                frame = av.VideoFrame.from_ndarray(pixels + (pixels < 255), 'rgb24')
                frame = reformatter.reformat(frame, **form, interpolation='BICUBIC', threads=1)
                frame.pts, frame.time_base = int(ticks[number]), codec.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


# show: samples as they are read and as they are fed -------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    """Draw training clips and images of epoch 0, one of each of three classes, as read and as fed."""
    check_writable(args.out)
    if not args.video_list and not args.image_list:
        vars(args).update(DEMO_FILES)
    rows, titles, clip = [], [], {'clip_len': args.clip_len, 'frame_interval': args.frame_interval}
    for source, kind, options in (('video', data.VideoDataset, clip), ('image', data.ImageDataset, {})):
        list_file, root = getattr(args, f'{source}_list'), getattr(args, f'{source}_root')
        if not list_file:
            continue
        files = sources.open_list(list_file, root, source, None, source == 'video')
        dataset = kind(files, size=args.size, min_area=args.min_area, **options)
        for index in np.unique(files.labels, return_index=True)[1][:3].tolist():
            sample = dataset[0, index]
            if sample.pixels is None:
                raise ValueError(f'{list_file}: 11 samples in a row are unreadable')
            if source == 'video':
                with VideoReader(sample.path) as video:  # the same clip, by the same random numbers
                    rng = dataset.rng_for('augmentation', 0, index)
                    frames = video.get_batch(data.sample_frames(len(video), **clip, rng=rng)[0])
                rows += [torch.from_numpy(frames).permute(0, 3, 1, 2), sample.pixels.transpose(0, 1)]
            else:
                with open_image(sample.path) as image:
                    rows += [to_tensor(upright(image))[None], sample.pixels[None]]
            instead = f', in place of {sample.bad[0]}' if sample.bad else ''
            titles += [f'{sample.path} (label {sample.label}), as read{instead}', 'as fed']
    draw_rows(args.out, rows, titles, args.size)


# demo: a small set of real files --------------------------------------------------------------------------

DEMO_FILES = {  # flags of train.py
    'video_list': 'data/demo/video_train.txt',
    'video_root': 'data/demo/videos_train',
    'video_labels': 'data/demo/video_labels.txt',
    'image_list': 'data/demo/image_train.txt',
    'image_root': 'data/demo/images_train',
    'image_labels': 'data/demo/image_labels.txt',
    'val_list': 'data/demo/video_val.txt',
    'val_root': 'data/demo/videos_val',
    'image_val_list': 'data/demo/image_val.txt',
    'image_val_root': 'data/demo/images_val',
}
DEMO_PATTERNS = {  # where each is bright; coordinates grow by 1 per repetition
    'stripes': lambda y, x: (y + 0 * x) % 1 < 0.5,
    'checks': lambda y, x: (y % 1 < 0.5) ^ (x % 1 < 0.5),
    'dots': lambda y, x: (y % 1 - 0.5) ** 2 + (x % 1 - 0.5) ** 2 < 0.35**2,
    'zigzag': lambda y, x: (y + abs(x % 1 - 0.5)) % 1 < 0.5,
}


def make_demo(
    root: str, train_videos: int = 50, val_videos: int = 12, train_images: int = 150, val_images: int = 20
) -> None:
    """Make a small set of real files below a folder: MP4 videos, JPEG images, their lists and label maps.

    Images show one of four patterns. Videos show one of them rising or falling, which makes eight classes; it
    takes several frames to tell. Counts are per class. A complete set is left as it is.
    """
    root = Path(root)
    if (root / 'image_labels.txt').exists():  # it is written last
        say(f'reusing the set in {root}')
        return
    say(f'making a small set in {root}')
    videos = [f'{pattern} {motion}' for pattern in DEMO_PATTERNS for motion in ('rising', 'falling')]
    jobs = []
    for source, classes, ending, counts in (
        ('video', videos, 'mp4', {'train': train_videos, 'val': val_videos}),
        ('image', [*DEMO_PATTERNS], 'jpg', {'train': train_images, 'val': val_images}),
    ):
        for split, count in counts.items():
            folder, lines = root / f'{source}s_{split}', []
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(len(classes) * count):
                label = i % len(classes)
                name = f'{classes[label].replace(" ", "_")}_{i // len(classes):03d}.{ending}'
                jobs.append((folder / name, classes[label], f'demo {source} {split}', i))
                lines.append(f'{name} {label}\n')
            (root / f'{source}_{split}.txt').write_text(''.join(lines))
    for job, reason in in_parallel(_draw_demo_file, jobs, 'drawing'):
        if reason:
            raise OSError(f'{job[0]} cannot be written ({reason})')
    (root / 'video_labels.txt').write_text('\n'.join(videos) + '\n')
    (root / 'image_labels.txt').write_text('\n'.join(DEMO_PATTERNS) + '\n')


def _draw_demo_file(path: Path, name: str, purpose: str, i: int) -> None:
    rng = data.generator(purpose, i)
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
    options = {'crf': '20', 'g': '24', 'preset': 'veryfast', 'threads': '1', 'x264-params': 'mbtree=0'}
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', 30, options, width=width, height=height)
        for frame in [*(av.VideoFrame.from_ndarray(pixels, 'rgb24') for pixels in frames), None]:
            container.mux(stream.encode(frame))


# The command ----------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog='prepare.py')
    commands = parser.add_subparsers(dest='command', required=True, help='one of these; --help has its flags')

    def command(name: str, function: Callable) -> Callable:
        return commands.add_parser(name, doc=function.__doc__.split('\n\n')[0]).add_argument

    count, default = number(int, 1), ' (default: %(default)s)'
    add = command('demo', make_demo)
    add('dir', metavar='DIR', help='folder to make it in; an existing set is kept')

    add = command('check', check)
    add('source', metavar='SOURCE', help='a list, a folder of videos or images, or one file')
    add('--root', default='', help='folder that the paths of a list start from')
    add('--out', default='bad_samples.txt', help='file for the list of bad files, with reasons' + default)

    add = command('encode', encode)
    add('src', metavar='SRC', help='folder of videos or images, at any depth')
    add('dst', metavar='DST', help='folder for the copies; its bad_samples.txt lists bad files')
    add('--short-side', type=count, default=256, help='at most, in pixels' + default)
    add('--gop', type=count, default=4, help='frames from one key frame to the next' + default)
    add('--crf', type=number(int, 0, 52), default=21, help='of libx264, 0 to 51: higher is smaller' + default)

    add = command('show', show)
    add('out', metavar='OUT.png', help='picture to write')
    for source in ('video', 'image'):
        add(f'--{source}-list', metavar='LIST', help="or class folders; default: data/demo's")
        add(f'--{source}-root', default='', metavar='DIR', help='folder that its paths start from')
    add('--size', type=count, default=112, help='side of the crop' + default)
    add('--min-area', type=number(float, 0, 0.5, above=True), default=0.08, help='smallest crop' + default)
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
            check(args.source, args.root, args.out)
        elif args.command == 'encode':
            encode(args.src, args.dst, args.short_side, args.gop, args.crf)
        else:
            show(args)
    except KeyboardInterrupt:
        say('prepare.py: stopped', sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError) as error:
        say(f'prepare.py: {about_file(error)}', sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
