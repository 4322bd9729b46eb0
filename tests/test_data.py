"""Pixels and samples follow the recipe, joint batches cover the sets."""

import contextlib
import itertools
import json
from pathlib import Path

import av
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import decode_all, write_video

import data
from runtime import sources

REFERENCE = Path(__file__).parent / 'reference'


def test_frame_sampling_equals_the_reference():
    expected = json.loads((REFERENCE / 'frame_indices.json').read_text())
    for length, clips in expected['val_1_clip'].items():
        assert data.sample_frames(int(length)).tolist() == clips
    for length, clips in expected['test_10_clips'].items():
        assert data.sample_frames(int(length), num_clips=10).tolist() == clips


@pytest.mark.parametrize('length', [1, 7, 8, 50, 57, 63, 64, 65, 66, 70, 72, 100])
def test_training_clips_are_the_reference_s_and_equally_likely(length):
    expected = json.loads((REFERENCE / 'frame_indices.json').read_text())['train_first_index_set'][
        str(length)
    ]
    rng = data.generator('test', length)
    draws = data.sample_frames(length, num_clips=4000, rng=rng)
    clips, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(clips) == expected['distinct_clips']
    clips = clips[np.argsort(clips[:, 0], kind='stable')].tolist()
    assert (
        clips[:3] + clips[-3:] == expected['clips']
        if len(clips) > 2
        else clips == expected['clips'][: len(clips)]
    )
    mean = 4000 / len(clips)
    assert ((counts - mean) ** 2 / mean).sum() < 2 * len(
        clips
    ) + 20  # chi-squared, far beyond its 0.1 % point


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


def test_three_crops_lie_at_the_ends_and_the_middle():
    wide = torch.arange(10).expand(3, 4, 10)
    assert data.three_crops(wide)[:, 0, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [3, 4, 5, 6]]
    tall = torch.arange(10)[:, None].expand(3, 10, 4)
    assert data.three_crops(tall)[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [3, 4, 5, 6]]


@pytest.mark.parametrize('height, width', [(200, 200), (240, 426), (854, 480)])
def test_random_crops_have_the_recipe_s_distribution(monkeypatch, height, width):
    """Crops of frames whose pixels are their own coordinates show where they were taken. The recipe takes
    them from the frame resized to a short side of 256: areas of 8 % to all of it, ratios of 3/4 to 4/3."""
    y, x = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j].round().astype(np.uint8)
    frame = np.stack([y, x, x], 2)

    class Reader(contextlib.nullcontext):
        def __enter__(self):
            return self

        def __len__(self):
            return 100

        def frames(self, wanted):
            return ((index, frame) for index in wanted)

    monkeypatch.setattr(data, 'VideoReader', Reader)
    videos, size, mirrored = data.VideoDataset(None, size=56, clip_len=2), (256, 256 * width // height), 0
    if height > width:
        size = 256 * height // width, 256
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
    for source, dataset in zip(sets, (data.VideoDataset, data.ImageDataset)):
        one, again, other = (
            dataset(source, size=56),
            dataset(source, size=56),
            dataset(source, size=56, seed=1),
        )
        shape = (3, 8, 56, 56) if dataset is data.VideoDataset else (3, 56, 56)
        assert one[3, 2].pixels.shape == shape and one[3, 2].pixels.dtype == torch.uint8
        assert torch.equal(one[3, 2].pixels, again[3, 2].pixels)
        if dataset is data.VideoDataset:
            assert not torch.equal(one[3, 2].pixels, one[4, 2].pixels)
            assert not torch.equal(one[3, 2].pixels, other[3, 2].pixels)


def test_an_unreadable_sample_is_replaced_in_training_and_named(sets):
    for source, dataset in zip(sets, (data.VideoDataset, data.ImageDataset)):
        item = dataset(source, size=56)[0, 1]
        assert item.label in (5, 7) and item.pixels is not None
        assert all(source.path(1) in line for line in item.bad) and item.bad
        assert item.path == dataset(source, size=56)[0, 1].path


def test_an_unreadable_sample_is_not_replaced_in_evaluation(sets):
    for source, dataset in zip(sets, (data.VideoDataset, data.ImageDataset)):
        item = dataset(source, 'val', size=56)[1]
        assert item.pixels is None and item.label == 6 and len(item.bad) == 1


def test_odd_files_are_read_right_or_counted_as_bad(tmp_path):
    """In the same process, one after the other, as in a loader's worker."""
    rng = np.random.default_rng(0)
    whole = Path(write_video(tmp_path / 'whole.mp4', num_frames=60, options={'g': '6'})).read_bytes()
    faststart = tmp_path / 'faststart.mp4'
    with (
        av.open(str(tmp_path / 'whole.mp4')) as source,
        av.open(str(faststart), 'w', options={'movflags': 'faststart'}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(tmp_path / 'audio.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), dtype=np.float32), format='fltp', layout='mono'
            )
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    bad = {
        'zeros.mp4': bytes(10_000),
        'random.mp4': rng.bytes(10_000),
        'text.mp4': b'no video' * 100,
        'header.mp4': whole[:20],
        'cut.mp4': whole[: len(whole) * 6 // 10],
        'zeros.jpg': bytes(1000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    videos, images = data.VideoDataset(None, size=56), data.ImageDataset(None, size=56)
    for name in [*bad, 'audio.mp4', 'missing.mp4', 'missing.jpg']:
        dataset = images if name.endswith('.jpg') else videos
        dataset.samples = data.Samples(np.array([str(tmp_path / name).encode()]), np.array([0]))
        dataset.mode = 'val'
        item = dataset[0]
        assert item.pixels is None and name in item.bad[0], name

    # the whole part of a cut video whose index comes first is right; what was cut off is not there
    (tmp_path / 'front.mp4').write_bytes(faststart.read_bytes()[: len(whole) * 6 // 10])
    with data.VideoReader(tmp_path / 'front.mp4') as video:
        assert 10 < len(video) < 60
        expected = decode_all(tmp_path / 'whole.mp4')[
            : len(video) - 4
        ]  # the last ones may lack their references
        np.testing.assert_array_equal(video.get_batch(range(len(expected))), expected)

    picture = PIL.Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    PIL.Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)).save(tmp_path / 'deep.png')
    picture.save(tmp_path / 'a.gif')
    picture.convert('L').save(tmp_path / 'grey.jpg')
    picture.convert('RGBA').save(tmp_path / 'alpha.png')
    picture.resize((1, 1)).save(tmp_path / 'dot.png')
    images.mode = 'train'
    for name in ('cmyk.jpg', 'deep.png', 'a.gif', 'grey.jpg', 'alpha.png', 'dot.png'):
        pixels = images.load(str(tmp_path / name), data.generator('test'))
        assert pixels.shape == (3, 56, 56) and pixels.dtype == torch.uint8, name


def test_unusual_videos_are_read_right(tmp_path):
    """Each gives the frames that decoding from the start gives; none is refused for what its header says."""
    for name, options in {
        '4k.mp4': {'num_frames': 9, 'size': (2160, 3840), 'options': {'preset': 'ultrafast'}},
        'no rate.avi': {'codec': 'mpeg4'},
    }.items():
        path = Path(write_video(tmp_path / name, **options))
        if name == 'no rate.avi':
            content = bytearray(path.read_bytes())
            rate = content.index(b'strh') + 32  # the stream header's frames per second
            content[rate : rate + 4] = bytes(4)
            path.write_bytes(content)
        videos = data.VideoDataset(None, size=56)
        for videos.mode, shape in (('train', (3, 8, 56, 56)), ('val', (1, 3, 8, 56, 56))):
            assert videos.load(str(path), data.generator('test')).shape == shape, name
        with data.VideoReader(path) as video:
            np.testing.assert_array_equal(video.get_batch(range(len(video))), decode_all(path), name)


@pytest.mark.parametrize('turn', [1, 6])
def test_a_crop_of_a_photo_decoded_smaller_stays_within_it(tmp_path, turn):
    """libjpeg rounds a half of the sides up; what lies outside would be black."""
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = turn
    PIL.Image.new('RGB', (1601, 1201), 'white').save(tmp_path / 'a.jpg', exif=exif)
    images = data.ImageDataset(None, size=112)
    for number in range(150):
        assert images.load(str(tmp_path / 'a.jpg'), data.generator('test', number)).min() > 250


def test_a_thread_of_an_image_does_not_fill_the_memory(tmp_path):
    PIL.Image.fromarray(np.zeros((1, 60_000, 3), dtype=np.uint8)).save(tmp_path / 'thread.png')
    images = data.ImageDataset(data.Samples(np.array([str(tmp_path / 'thread.png').encode()]), np.array([0])))
    assert images[0, 0].pixels.shape == (3, 224, 224)
    images.mode = 'val'
    assert images[0].bad == [f'{tmp_path}/thread.png: 60000x1 is too long and thin']


def test_nothing_readable_ends_with_a_line(tmp_path):
    samples = data.Samples(np.array([b'/nowhere/a.mp4']), np.array([0]))
    with pytest.raises(RuntimeError, match='11 samples in a row are unreadable.*/nowhere/a.mp4'):
        data.VideoDataset(samples)[0, 0]


def test_views(sets):
    videos, images = sets
    assert data.VideoDataset(videos, 'val', size=56)[0].pixels.shape == (1, 3, 8, 56, 56)
    assert data.VideoDataset(videos, 'test', size=56)[0].pixels.shape == (30, 3, 8, 64, 64)
    assert data.VideoDataset(videos, 'test', size=56, num_clips=2, num_crops=1)[0].pixels.shape == (
        2,
        3,
        8,
        64,
        64,
    )
    assert data.ImageDataset(images, 'val', size=56)[0].pixels.shape == (1, 3, 56, 56)


def joint_sampler(**options):
    return data.JointSampler({'video': 50, 'image': 90}, {'video': 4, 'image': 7}, **options)


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_an_epoch_sees_each_video_once_and_images_go_round(world_size):
    samplers = [
        joint_sampler(rank=rank, world_size=world_size, seed=1, epochs=2) for rank in range(world_size)
    ]
    steps = 50 // (4 * world_size)
    assert all(s.steps_per_epoch == steps and len(s) == 2 * steps for s in samplers)
    batches = [list(s) for s in samplers]
    videos, images = [], []
    for step in range(2 * steps):
        for rank in range(world_size):
            keys = batches[rank][step]
            videos += [key for key in keys if key[0] == 'video']
            images += [key for key in keys if key[0] == 'image']
            assert len(keys) == 4 + 7
    for epoch in range(2):
        drawn = videos[epoch * len(videos) // 2 : (epoch + 1) * len(videos) // 2]
        assert {key[1] for key in drawn} == {epoch} and len(set(drawn)) == len(
            drawn
        ) == steps * 4 * world_size
    assert len(set(images)) == len(images) == 2 * steps * 7 * world_size  # as (pass, index)
    for number in range(len(images) // 90):  # the next pass begins where one is complete, across epochs too
        assert {key[2] for key in images[90 * number :][:90]} == set(range(90))
        assert {key[1] for key in images[90 * number :][:90]} == {number}
    assert list(samplers[0]) == batches[0]
    assert batches[0][0] != batches[0][steps]  # another order in the next epoch


def test_batches_are_numbered_alike_on_processes_and_in_accumulation():
    one = list(joint_sampler(world_size=1, accumulate=6))
    for processes, accumulate in ((6, 1), (2, 3), (3, 2)):
        own = [
            list(joint_sampler(rank=rank, world_size=processes, accumulate=accumulate))
            for rank in range(processes)
        ]
        for step in range(len(one) // 6):
            drawn = [batch for rank in own for batch in rank[step * accumulate : (step + 1) * accumulate]]
            assert drawn == one[step * 6 : (step + 1) * 6]


def test_the_published_recipe_s_steps():
    """1,878 steps of 16 videos and 85 images on each of 8 GPUs; no image twice in a pass over them."""
    sampler = data.JointSampler(
        {'video': 240_435, 'image': 1_281_167}, {'video': 16, 'image': 85}, rank=3, world_size=8
    )
    assert sampler.steps_per_epoch == 1878 and len(sampler) == 256 * 1878
    images = [key for batch in itertools.islice(sampler, 1900) for key in batch if key[0] == 'image']
    assert len(images) == len(set(images)) == 1900 * 85 and {number for _, number, _ in images} == {0, 1}


def test_a_small_source_goes_round_within_a_step():
    batch = next(iter(data.JointSampler({'video': 8, 'image': 3}, {'video': 4, 'image': 7})))
    assert [key[1] for key in batch[4:]] == [0, 0, 0, 1, 1, 1, 2] and len(set(batch)) == 11


def test_joint_sampler_goes_on_where_it_was():
    sampler = joint_sampler(epochs=3)
    everything = list(sampler)
    steps = sampler.steps_per_epoch + 5
    sampler.epoch, sampler.done = 1, {'video': 5 * 4, 'image': steps * 7}
    assert list(sampler) == everything[steps:] and len(sampler) == len(list(sampler))


def test_joint_sampler_needs_one_full_step():
    message = '6 training videos are too few for a step of 2 x 4; lower --videos-per-gpu'
    with pytest.raises(ValueError, match=message):
        data.JointSampler({'video': 6}, {'video': 4}, world_size=2)


def test_workers_are_loaded_evenly_and_change_nothing(demo):
    videos = sources.read_list(
        str(demo / 'data/demo/video_train.txt'), str(demo / 'data/demo/videos_train'), videos=True
    )
    images = sources.read_list(str(demo / 'data/demo/image_train.txt'), str(demo / 'data/demo/images_train'))
    joint = data.JointDataset(
        {'video': data.VideoDataset(videos, size=56), 'image': data.ImageDataset(images, size=56)}
    )
    sampler = data.JointSampler(
        {'video': len(videos), 'image': len(images)}, {'video': 4, 'image': 5}, epochs=1
    )
    loaded = [
        list(
            torch.utils.data.DataLoader(joint, batch_sampler=sampler, collate_fn=data.collate, num_workers=n)
        )
        for n in (0, 2, 3)
    ]
    assert len(loaded[0]) == 8
    for batches in loaded[1:]:
        for batch, other in zip(loaded[0], batches, strict=True):
            assert [item.pixels.shape for item in batch.values()] == [(4, 3, 8, 56, 56), (5, 3, 56, 56)]
            assert list(batch) == list(other) == ['video', 'image']
            for item, twin in zip(batch.values(), other.values()):
                assert item.label.shape == (len(item.pixels),) and torch.equal(item.label, twin.label)
                assert torch.equal(item.pixels, twin.pixels) and item.path == twin.path
