"""Pixels and samples follow the recipe, joint batches cover the sets."""

import contextlib
import json
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import write_video
from torch.utils.data import DataLoader

import data
import prepare
from runtime import sources

REFERENCE = Path(__file__).parent / 'reference'
FRAMES = json.loads((REFERENCE / 'frame_indices.json').read_text())


@pytest.mark.quick
def test_frame_sampling_equals_the_reference():
    for name, num_clips in (('val_1_clip', 1), ('test_10_clips', 10)):
        for length, clips in FRAMES[name].items():
            assert data.sample_frames(int(length), num_clips=num_clips).tolist() == clips


@pytest.mark.parametrize('length', [1, 7, 8, 50, 57, 63, 64, 65, 66, 70, 72, 100])
def test_training_clips_are_the_reference_s_and_equally_likely(length):
    expected = FRAMES['train_first_index_set'][str(length)]
    draws = data.sample_frames(length, num_clips=4000, rng=data.generator('test', length))
    clips, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(clips) == expected['distinct_clips']
    assert np.concatenate([clips[:3], clips[-3:]]).tolist() == expected['clips']
    mean = 4000 / len(clips)
    assert ((counts - mean) ** 2 / mean).sum() < 2 * len(clips) + 20  # chi-squared's 0.1 % point is lower


def test_resize_is_plain_bilinear():
    rng = np.random.default_rng(0)
    picture = torch.from_numpy(rng.integers(0, 256, (2, 3, 60, 90), dtype=np.uint8))
    assert data.short_side_to(32, 60, 90) == (32, 48) and data.short_side_to(256, 240, 320) == (256, 341)
    for height, width in ((32, 48), (100, 150), (60, 90)):
        exact = F.interpolate(picture.double(), (height, width), mode='bilinear', antialias=False)
        for method in (data.resize, data.resize_as_opencv):
            resized = method(picture, height, width)
            assert resized.shape == (2, 3, height, width) and resized.dtype == torch.uint8
            assert (resized - exact).abs().max() <= 1.01
    assert torch.equal(data.resize_as_opencv(picture, 60, 90), picture)


@pytest.mark.parametrize('frames', '240x320 256x340 360x480 480x854 720x1280 1080x1920 321x181'.split())
def test_resizing_for_tests_equals_opencv_bit_for_bit(frames):
    cv2, (height, width) = pytest.importorskip('cv2'), map(int, frames.split('x'))
    size = data.short_side_to(256, height, width)
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = data.resize_as_opencv(torch.from_numpy(frame).permute(2, 0, 1)[None], *size)[0].permute(1, 2, 0)
    assert np.array_equal(ours, cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR))


def test_views_and_their_crops_at_the_ends_and_the_middle(sets):
    wide = torch.arange(10).expand(3, 4, 10)
    for crops in (data.three_crops(wide), data.three_crops(wide.mT).mT):
        assert crops[:, 0, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [3, 4, 5, 6]]
    for views, settings in ((30, {}), (2, {'num_clips': 2, 'num_crops': 1})):
        pixels = data.VideoDataset(sets[0], 'test', size=56, **settings)[0].pixels
        assert pixels.shape == (views, 3, 8, 64, 64)


@pytest.mark.parametrize('height, width', [(200, 200), (240, 426), (854, 480)])
def test_random_crops_have_the_recipe_s_distribution(monkeypatch, height, width):
    """Crops of frames whose pixels are their own coordinates show where they were taken. The recipe takes
    them from the frame resized to a short side of 256: areas of 8 % to all of it, ratios of 3/4 to 4/3."""
    y, x = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j].round().astype(np.uint8)
    frame = np.stack([y, x, x], 2)

    class Video(list):
        def frames(self, wanted):
            return ((index, self[index]) for index in wanted)

    monkeypatch.setattr(data, 'VideoReader', lambda path: contextlib.nullcontext(Video([frame] * 100)))
    videos, mirrored = data.VideoDataset(None, size=56, clip_len=2), 0
    size = data.short_side_to(256, height, width)
    found, expected = [], []
    for i in range(800):
        crop = videos.load('', data.generator('test', i)).float()
        assert torch.equal(crop[:, 0], crop[:, 1])  # all frames of a clip alike
        h, w = ((crop[c].max() - crop[c].min()).item() / 255 * 56 / 55 for c in (0, 1))
        found.append((h * w, w * width / (h * height), h, crop[0].mean().item() / 255))
        mirrored += bool(crop[1, 0, 0, 0] > crop[1, 0, 0, -1])
        top, _, h, w = data.crop_box(*size, data.generator('other', i))
        expected.append((h * w / (size[0] * size[1]), w / h, h / size[0], (top + h / 2) / size[0]))
    for values, others in zip(np.array(found).T, np.array(expected).T):  # area, ratio, height, place
        places = np.sort(np.concatenate([values, others]))
        below = (np.searchsorted(np.sort(v), places, 'right') / 800 for v in (values, others))
        assert abs(np.subtract(*below)).max() < 0.1  # Kolmogorov and Smirnov: 0.0975 is the 0.1 % point
    areas, ratios = np.array(found)[:, :2].T
    assert 0.07 < areas.min() < 0.11 and 0.7 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.42
    assert 0.4 < mirrored / 800 < 0.6
    boxes = [data.crop_box(height, width, data.generator('test', i), min_area=0.4) for i in range(200)]
    assert 0.39 < min(h * w / (height * width) for *_, h, w in boxes) < 0.5


@pytest.fixture
def sets(tmp_path):
    """A video and an image set of three files each, the second of each unreadable."""
    for i in range(3):
        write_video(tmp_path / f'{i}.mp4', num_frames=70 + i)
        PIL.Image.new('RGB', (60, 40), (80 * i,) * 3).save(tmp_path / f'{i}.jpg')
    for name in ('1.mp4', '1.jpg'):
        (tmp_path / name).write_bytes(b'nothing to see here')
    (tmp_path / 'videos.txt').write_text('0.mp4 5\n1.mp4 6\n2.mp4 7\n')
    (tmp_path / 'images.txt').write_text('0.jpg 5\n1.jpg 6\n2.jpg 7\n')
    return tuple(sources.read_list(str(tmp_path / f'{s}s.txt'), str(tmp_path)) for s in ('video', 'image'))


def test_training_samples_follow_from_seed_epoch_and_index(sets):
    for files, dataset in zip(sets, (data.VideoDataset, data.ImageDataset)):
        one, again, other = (dataset(files, size=56, seed=seed) for seed in (0, 0, 1))
        pixels = one[3, 2].pixels
        assert pixels.dtype == torch.uint8 and torch.equal(pixels, again[3, 2].pixels)
        if dataset is data.VideoDataset:  # each of the images has one colour
            assert not torch.equal(pixels, one[4, 2].pixels)
            assert not torch.equal(pixels, other[3, 2].pixels)


def test_an_unreadable_sample_is_named_and_in_training_replaced_by_a_seeded_draw(sets):
    for files, dataset in zip(sets, (data.VideoDataset, data.ImageDataset)):
        drawn, again = ([dataset(files, size=56)[epoch, 1] for epoch in range(9)] for _ in range(2))
        assert [item.path for item in drawn] == [item.path for item in again]
        assert {(item.label, item.path) for item in drawn} == {(5, files.path(0)), (7, files.path(2))}
        for item in drawn:
            assert item.pixels is not None and item.bad and all(files.path(1) in line for line in item.bad)
        item = dataset(files, 'val', size=56)[1]
        assert item.pixels is None and item.label == 6 and len(item.bad) == 1


@pytest.mark.parametrize('turn', [1, 6])
def test_a_crop_of_a_photo_decoded_smaller_stays_within_it(tmp_path, turn):
    """libjpeg rounds a half of the sides up; what lies outside would be black."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = turn
    PIL.Image.new('RGB', (1601, 1201), 'white').save(tmp_path / 'a.jpg', exif=exif)
    images = data.ImageDataset(None, size=112)
    for number in range(150):
        assert images.load(str(tmp_path / 'a.jpg'), data.generator('test', number)).min() > 250


PICTURES = {  # what is written: by which name, of which mode, how
    'photo.jpg': ('RGB', {'quality': 95}),
    'photo.png': ('RGB', {}),
    'photo.webp': ('RGB', {'lossless': True}),
    'photo.tif': ('RGB', {}),
    'lzw.tif': ('RGB', {'compression': 'tiff_lzw'}),
    'grey.tif': ('L', {}),
    'deep.png': ('I;16', {}),
    'deep.tif': ('I;16', {}),
}


@pytest.mark.parametrize('name', PICTURES)
def test_pictures_are_upright_in_training_validation_and_copies(tmp_path, monkeypatch, name):
    sizes = []  # that crops are drawn for
    monkeypatch.setattr(data, 'crop_box', lambda *args: sizes.append(args[:2]) or (0, 0, *args[:2]))
    mode, options = PICTURES[name]
    seen = np.array([[(240, 30, 30), (30, 240, 30)], [(30, 30, 240), (200, 200, 200)]], np.uint8)
    seen = seen.repeat(32, 0).repeat(48, 1)
    picture = PIL.Image.fromarray(seen)
    if mode != 'RGB':
        grey = np.asarray(picture.convert('L'))
        seen = np.stack([grey] * 3, 2)
        picture = PIL.Image.fromarray(grey if mode == 'L' else grey * np.uint16(257))
    pixels, turn = torch.from_numpy(seen).permute(2, 0, 1), PIL.Image.Transpose
    path, copy = str(tmp_path / name), str(tmp_path / 'copy')
    lying = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90)
    for orientation, way in enumerate((None, *lying, turn.TRANSVERSE, turn.ROTATE_270), 1):
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation] = orientation
        (picture if way is None else picture.transpose(way)).save(path, exif=exif, **options)
        prepare.encode_image(path, copy, 56)
        for file in (path, copy):
            fed = data.ImageDataset(None, size=56, flip=False).load(file, data.generator('test')).float()
            assert (fed - data.resize(pixels, 56, 56)).abs().mean() < 5, (file, orientation)
            fed = data.ImageDataset(None, 'val', size=56).load(file, None)[0].float()
            expected = data.center_crop(data.resize(pixels, 64, 96), 56)
            assert (fed - expected).abs().mean() < 5, (file, orientation)
    assert set(sizes) == {(64, 96), (56, 84)}


BROKEN = {
    'nothing': b'',
    'no header': b'nothing at all',
    'no directory': b'II*\0\xff\xff\xff\0',
    'two numbers': struct.pack('<4sIHHHIHHI', b'II*\0', 8, 1, 0x0112, 3, 2, 6, 6, 0),
    'a rational without a value': struct.pack('<4sIHHHIII', b'II*\0', 8, 1, 0x0112, 5, 1, 9999, 0),
}


@pytest.mark.parametrize('exif', BROKEN.values(), ids=BROKEN)
def test_a_sound_picture_with_broken_metadata_is_read(tmp_path, exif):
    for ending in ('jpg', 'png', 'webp'):
        path = str(tmp_path / f'a.{ending}')
        PIL.Image.new('RGB', (96, 64), 'white').save(path, exif=b'Exif\0\0' + exif)
        prepare.check_file(path, True)
        assert data.ImageDataset(None, 'val', size=56).load(path, None).min() > 250


def test_an_ending_tells_images_from_videos_and_all_kinds_are_read(tmp_path):
    names = 'a.jpg b.JPEG c.png d.webp e.tif f.ppm g.jfif h.tga i.jp2 j.png k.png'.split()
    assert all(map(sources.is_image, names))
    assert not any(map(sources.is_image, ('a.gif', 'a.mp4', 'a.MKV', 'a', 'a.eps', 'a.txt', 'a.h5')))
    for name, mode in zip(names, ('CMYK', 'L', 'P', 'RGB', 'RGB', 'RGB', 'RGB', 'RGB', 'RGB', 'RGBA', '1')):
        PIL.Image.new('RGB', (60, 40), 'white').convert(mode).save(tmp_path / name)
        pixels = data.ImageDataset(None, size=56).load(str(tmp_path / name), data.generator('test'))
        assert pixels.shape == (3, 56, 56) and pixels.dtype == torch.uint8 and pixels.min() > 250


def test_only_regular_files_are_opened(tmp_path):
    """Opening a FIFO would wait for somebody who writes into it."""
    for name, dataset in (('a.jpg', data.ImageDataset(None)), ('a.mp4', data.VideoDataset(None))):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match='not a regular file'):
            dataset.load(str(tmp_path / name), data.generator('test'))


def test_deep_greys_are_scaled_or_refused(tmp_path):
    """A number of 16 bits has a known white; one of 32 bits, or with a point, has not."""
    whole = np.array([0, 0.2, 0.6, 1])
    row = whole.repeat(8)[None]
    (tmp_path / 'a.pgm').write_bytes(b'P5 32 1 1023\n' + (row * 1023).astype('>u2').tobytes())
    for name in ('a.png', 'a.tif'):
        PIL.Image.fromarray((row * 65535).astype(np.uint16)).save(tmp_path / name)
    PIL.Image.fromarray((row * 65535).astype('>u2')).save(tmp_path / 'big.tif')
    for name in ('a.pgm', 'a.png', 'a.tif', 'big.tif'):
        with PIL.Image.open(tmp_path / name) as image:
            read = data.to_tensor(data.upright(image))[0, 0, ::8].int().numpy()
        assert np.abs(read - whole * 255).max() <= 1, (name, read)
    for kind in (np.int32, np.float32):
        path = str(tmp_path / f'{kind.__name__}.tif')
        PIL.Image.fromarray((row * 255).astype(kind)).save(path)
        with pytest.raises(ValueError, match='grey, whose white is unknown'):
            data.ImageDataset(None, 'val', size=56).load(path, None)
        with pytest.raises(ValueError, match='grey, whose white is unknown'):
            prepare.encode_file(path, str(tmp_path / 'copy.jpg'))


def test_a_thread_of_an_image_does_not_fill_the_memory(tmp_path):
    path = str(tmp_path / 'thread.png')
    PIL.Image.new('RGB', (60_000, 1)).save(path)
    assert data.ImageDataset(None).load(path, data.generator('test')).shape == (3, 224, 224)
    with pytest.raises(ValueError, match='60000x1 is too long and thin'):
        data.ImageDataset(None, 'val').load(path, None)


def test_nothing_readable_ends_with_a_line(tmp_path):
    files = data.FileList(np.array([b'/nowhere/a.mp4']), np.array([0]))
    sample = data.VideoDataset(files)[0, 0]
    assert sample.pixels is None and sample.bad == ['/nowhere/a.mp4: No such file or directory'] * 11
    assert data.collate([('video', sample)])['video'].pixels is None


def joint_sampler(batches=1, seed=0):
    return data.JointSampler({'video': 50, 'image': 90}, {'video': 4, 'image': 7}, batches, seed)


def steps_of(sampler, steps, numbers=(0,)):
    return [sampler.batch(step, number) for step in range(steps) for number in numbers]


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_an_epoch_sees_each_video_once_and_images_go_round(world_size):
    sampler, steps = joint_sampler(world_size, seed=1), 50 // (4 * world_size)
    assert sampler.steps_per_epoch == steps
    batches = steps_of(sampler, 2 * steps, range(world_size))
    assert {len(batch) for batch in batches} == {4 + 7}
    keys = [key for batch in batches for key in batch]
    videos, images = ([key for key in keys if key[0] == source] for source in ('video', 'image'))
    for epoch in range(2):
        drawn = videos[epoch * len(videos) // 2 : (epoch + 1) * len(videos) // 2]
        assert {key[1] for key in drawn} == {epoch}
        assert len(set(drawn)) == len(drawn) == steps * 4 * world_size
    assert len(set(images)) == len(images) == 2 * steps * 7 * world_size  # as (pass, index)
    for number in range(len(images) // 90):  # the next pass begins where one is complete, across epochs too
        drawn = {key[1:] for key in images[90 * number :][:90]}
        assert drawn == {(number, index) for index in range(90)}
    assert batches[0] != batches[steps * world_size]  # another order in the next epoch


def test_a_batch_follows_from_its_step_and_number_alone():
    """From the start, from the middle or backwards; on six processes or accumulated by one."""
    sampler, keys = joint_sampler(6), [(step, number) for step in range(9) for number in range(6)]
    drawn = {key: sampler.batch(*key) for key in keys}
    assert drawn == {key: joint_sampler(6).batch(*key) for key in reversed(keys)}
    assert drawn[0, 0] != joint_sampler(6, seed=1).batch(0)


def test_the_published_recipe_s_steps():
    """Of 16 videos and 85 images on each of 8 GPUs; no image twice in a pass over them."""
    sampler = data.JointSampler({'video': 240_435, 'image': 1_281_167}, {'video': 16, 'image': 85}, 8)
    assert sampler.steps_per_epoch == 1878
    images = [key for batch in steps_of(sampler, 1900, [3]) for key in batch if key[0] == 'image']
    assert len(images) == len(set(images)) == 1900 * 85 and {number for _, number, _ in images} == {0, 1}


def test_a_small_source_goes_round_within_a_step():
    batch = data.JointSampler({'video': 8, 'image': 3}, {'video': 4, 'image': 7}).batch(0)
    assert [key[1] for key in batch[4:]] == [0, 0, 0, 1, 1, 1, 2] and len(set(batch)) == 11


@pytest.mark.quick
def test_workers_are_loaded_evenly_and_change_nothing(demo):
    root = f'{demo}/data/demo'
    videos = sources.read_list(f'{root}/video_train.txt', f'{root}/videos_train', videos=True)
    images = sources.read_list(f'{root}/image_train.txt', f'{root}/images_train')
    datasets = {'video': data.VideoDataset(videos, size=56), 'image': data.ImageDataset(images, size=56)}
    sampler = data.JointSampler({'video': len(videos), 'image': len(images)}, {'video': 4, 'image': 5})
    keys = steps_of(sampler, sampler.steps_per_epoch)
    load = partial(DataLoader, data.JointDataset(datasets), batch_sampler=keys, collate_fn=data.collate)
    loaded, *others = ([*load(num_workers=workers)] for workers in (0, 2, 3))
    assert len(loaded) == 8
    for batches in others:
        for batch, other in zip(loaded, batches, strict=True):
            assert [item.pixels.shape for item in batch.values()] == [(4, 3, 8, 56, 56), (5, 3, 56, 56)]
            assert list(batch) == list(other) == ['video', 'image']
            for item, twin in zip(batch.values(), other.values()):
                assert item.labels.shape == (len(item.pixels),) and torch.equal(item.labels, twin.labels)
                assert torch.equal(item.pixels, twin.pixels) and item.paths == twin.paths
