"""Frames are exact, pixels and samples follow the recipe, joint batches cover the sets."""

import json
import struct
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, decode_all, run, write_video

import data

REFERENCE = Path(__file__).parent / 'reference'

VIDEOS = {
    'h264 with B-frames': ('a.mp4', dict(num_frames=70, options={'g': '16', 'bf': '3'})),
    'h264 with open GOPs': (
        'a.mp4',
        dict(num_frames=70, options={'x264-params': 'open-gop=1:keyint=12:bframes=3'}),
    ),
    'h264 with a pyramid and references': (
        'a.mkv',
        dict(num_frames=70, options={'g': '20', 'bf': '8', 'refs': '5'}),
    ),
    'h264 with intra refresh': (
        'a.mp4',
        dict(num_frames=60, options={'x264-params': 'intra-refresh=1:keyint=15'}),
    ),
    'h264 in a transport stream': ('a.ts', dict(num_frames=40, options={'g': '10'})),
    'h264 in AVI': ('a.avi', dict(num_frames=40, options={'g': '10'})),
    'h264 of one frame': ('a.mp4', dict(num_frames=1)),
    'h264 at a variable rate': (
        'a.mp4',
        dict(num_frames=30, times=np.cumsum([20 + 37 * (i % 3) for i in range(30)])),
    ),
    'h264 of odd size': ('a.mp4', dict(num_frames=20, size=(49, 67), pix_fmt='yuv444p')),
    'h264 in 10 bits': ('a.mp4', dict(num_frames=20, pix_fmt='yuv420p10le')),
    'h264 in grey': ('a.mp4', dict(num_frames=20, pix_fmt='gray')),
    'hevc': (
        'a.mp4',
        dict(num_frames=40, codec='libx265', size=(64, 64), options={'x265-params': 'keyint=10:log-level=0'}),
    ),
    'vp9': (
        'a.webm',
        dict(
            num_frames=40, codec='libvpx-vp9', options={'g': '12', 'auto-alt-ref': '1', 'lag-in-frames': '12'}
        ),
    ),
    'mpeg4 in AVI': ('a.avi', dict(num_frames=40, codec='mpeg4', options={'g': '12', 'bf': '2'})),
}


@pytest.mark.parametrize('name', VIDEOS)
def test_frames_equal_decoding_from_the_start(name, tmp_path):
    file, options = VIDEOS[name]
    path = write_video(tmp_path / file, **options)
    expected = decode_all(path)
    rng = np.random.default_rng(0)
    with data.VideoReader(path) as video:
        assert len(video) == len(expected)
        count = len(expected)
        for indices in (
            [count - 1],
            [0],
            [count - 1, 0, count // 2, count // 2],
            *rng.integers(0, count, (6, 5)),
        ):
            frames = video.get_batch(indices)
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, expected[indices])


@pytest.mark.parametrize('quarters', [1, 2, 3])
def test_rotated_video_comes_upright(quarters, tmp_path):
    """As a telephone writes it: the track header says by how many quarters to turn the picture clockwise."""
    path = tmp_path / 'a.mp4'
    write_video(path, num_frames=5)
    expected = np.rot90(decode_all(path), -quarters, axes=(1, 2))
    content = bytearray(path.read_bytes())
    matrix = content.index(b'tkhd') + 44
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    content[matrix : matrix + 20] = struct.pack('>5i', cos << 16, sin << 16, 0, -sin << 16, cos << 16)
    path.write_bytes(content)
    with data.VideoReader(path) as video:
        np.testing.assert_array_equal(video.get_batch(range(5)), expected)


def test_frames_cut_off_by_an_edit_list(tmp_path):
    path = tmp_path / 'a.mp4'
    write_video(path, num_frames=40, options={'g': '30', 'bf': '2'})
    content = bytearray(path.read_bytes())
    entry = content.index(b'elst') + 12  # after type, version and flags, and the number of entries: one
    duration, start, rate = struct.unpack('>Iii', content[entry : entry + 12])
    with av.open(str(path)) as container:
        per_frame = round(container.streams.video[0].duration / 40)
    content[entry : entry + 12] = struct.pack('>Iii', duration, start + 13 * per_frame, rate)
    path.write_bytes(content)
    expected = decode_all(path)
    assert len(expected) == 27
    with data.VideoReader(path) as video:
        assert len(video) == 27
        np.testing.assert_array_equal(video.get_batch([20, 3]), expected[[20, 3]])


def test_asking_for_frames_that_are_not_there(tmp_path):
    with data.VideoReader(write_video(tmp_path / 'a.mp4', num_frames=5)) as video:
        for indices in ([5], [-1], []):
            with pytest.raises(IndexError, match='video with 5'):
                video.get_batch(indices)


def test_what_is_no_video(tmp_path):
    (tmp_path / 'text.mp4').write_text('not a video\n' * 100)
    (tmp_path / 'empty.mp4').touch()
    for name in ('text.mp4', 'empty.mp4', 'missing.mp4'):
        with pytest.raises((OSError, ValueError)):
            data.VideoReader(tmp_path / name)


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


def test_random_crop_covers_the_range_of_the_recipe():
    """Crops of a picture whose pixels are their own coordinates show where they were taken."""
    y, x = torch.meshgrid(torch.arange(200), torch.arange(200), indexing='ij')
    picture = torch.stack([y, x, x]).to(torch.uint8)
    areas, ratios, mirrored = [], [], 0
    for i in range(600):
        crop = data.random_resized_crop(picture, 56, data.generator('test', i)).float()
        height, width = ((crop[c].max() - crop[c].min()).item() * 56 / 55 for c in (0, 1))
        areas.append(height * width / 200**2)
        ratios.append(width / height)
        mirrored += bool(crop[1, 0, 0] > crop[1, 0, -1])
    assert 0.07 < min(areas) < 0.11 and 0.9 < max(areas) < 1.03
    assert 0.70 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.42
    assert 0.4 < mirrored / 600 < 0.6


@pytest.fixture
def sets(tmp_path):
    """A video and an image set of three files each, the second of each unreadable."""
    for i in range(3):
        write_video(tmp_path / f'{i}.mp4', num_frames=70 + i)
        picture = torch.full((3, 40, 60), 80 * i, dtype=torch.uint8)
        torchvision.io.write_jpeg(picture, str(tmp_path / f'{i}.jpg'))
    for name in ('1.mp4', '1.jpg'):
        (tmp_path / name).write_bytes(b'nothing to see here')
    (tmp_path / 'videos.txt').write_text('0.mp4 5\n1.mp4 6\n2.mp4 7\n')
    (tmp_path / 'images.txt').write_text('0.jpg 5\n1.jpg 6\n2.jpg 7\n')
    return tuple(data.read_list(str(tmp_path / f'{s}s.txt'), str(tmp_path)) for s in ('video', 'image'))


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


def test_a_thread_of_an_image_does_not_fill_the_memory(tmp_path):
    PIL.Image.fromarray(np.zeros((1, 60_000, 3), dtype=np.uint8)).save(tmp_path / 'thread.png')
    images = data.ImageDataset(data.Samples(np.array([str(tmp_path / 'thread.png').encode()]), np.array([0])))
    assert images[0, 0].pixels.shape == (3, 224, 224)
    images.mode = 'val'
    assert images[0].bad == [f'{tmp_path}/thread.png: 60000x1 is too long and thin']


def test_nothing_readable_ends_with_a_line(tmp_path):
    samples = data.Samples(np.array([b'/nowhere/a.mp4']), np.array([0]))
    with pytest.raises(RuntimeError, match='in a row are unreadable.*/nowhere/a.mp4'):
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


def test_lists_as_people_write_them(tmp_path):
    path = tmp_path / 'list.txt'
    path.write_bytes(
        '\ufeffa b/ü clip.mp4 3\r\n\r\n  plain.avi  0  \r\nabc_def 300 7\nxyz,250,1\n1.5 2 4'.encode()
    )
    samples = data.read_list(str(path), 'root', 8, videos=True)
    assert [samples.path(i) for i in range(5)] == [
        'root/a b/ü clip.mp4', 'root/plain.avi', 'root/abc_def.mp4', 'root/xyz.mp4', 'root/1.5.mp4',
    ]  # fmt: skip
    assert samples.labels.tolist() == [3, 0, 7, 1, 4]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('a.mp4 1\nb.mp4\n', r'list.txt:2: no label in .b.mp4.'),
        ('a.mp4 1\n\nb.mp4 8\n', r'list.txt:3: label 8 is out of range; 8 classes'),
        ('a.mp4 -1\n', r'list.txt:1: label -1 is out of range'),
        ('\n \n', r'list.txt: no samples'),
    ],
)
def test_lists_with_mistakes_name_file_and_line(tmp_path, text, message):
    (tmp_path / 'list.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_list(str(tmp_path / 'list.txt'), num_classes=8)


def test_label_maps(tmp_path):
    (tmp_path / 'a.txt').write_text('air drumming\napplauding\n')
    (tmp_path / 'b.txt').write_text('applauding 1\nair drumming 0\n')
    for name in 'ab':
        assert data.read_label_map(str(tmp_path / f'{name}.txt')) == ['air drumming', 'applauding']


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_joint_sampler_covers_the_sets_without_repeats(world_size):
    samplers = [
        data.JointSampler(50, 90, 4, 7, rank, world_size, seed=1, epochs=2) for rank in range(world_size)
    ]
    steps = min(50 // (4 * world_size), 90 // (7 * world_size))
    assert all(s.steps_per_epoch == steps and len(s) == 2 * steps for s in samplers)
    batches = [list(s) for s in samplers]
    for epoch in range(2):
        for source, per_gpu in (('video', 4), ('image', 7)):
            drawn = []
            for rank in range(world_size):
                for batch in batches[rank][epoch * steps : (epoch + 1) * steps]:
                    keys = [key for key in batch if key[0] == source]
                    assert len(keys) == per_gpu and all(key[1] == epoch for key in keys)
                    drawn += [key[2] for key in keys]
            assert len(set(drawn)) == len(drawn) == steps * per_gpu * world_size
    assert [batch for batch in samplers[0]] == batches[0]
    assert batches[0][0] != batches[0][steps]  # another order in the next epoch


def test_joint_sampler_draws_every_sample_over_the_epochs():
    drawn = {
        key[2] for batch in data.JointSampler(50, 90, 4, 7, epochs=12) for key in batch if key[0] == 'image'
    }
    assert drawn == set(range(90))


def test_joint_sampler_goes_on_where_it_was():
    sampler = data.JointSampler(50, 90, 4, 7, epochs=3)
    everything = list(sampler)
    sampler.epoch, sampler.done = 1, {'video': 5 * 4, 'image': 5 * 7}
    assert list(sampler) == everything[sampler.steps_per_epoch + 5 :] and len(sampler) == len(list(sampler))


def test_joint_sampler_needs_one_full_step():
    with pytest.raises(ValueError, match='6 training videos are too few for one step of 2 x 4'):
        data.JointSampler(6, 90, 4, 7, world_size=2)


def test_workers_are_loaded_evenly_and_change_nothing(demo):
    videos = data.read_list(
        str(demo / 'data/demo/video_train.txt'), str(demo / 'data/demo/videos_train'), videos=True
    )
    images = data.read_list(str(demo / 'data/demo/image_train.txt'), str(demo / 'data/demo/images_train'))
    joint = data.JointDataset(
        {'video': data.VideoDataset(videos, size=56), 'image': data.ImageDataset(images, size=56)}
    )
    sampler = data.JointSampler(len(videos.labels), len(images.labels), 4, 5, epochs=1)
    loaded = [
        list(
            torch.utils.data.DataLoader(joint, batch_sampler=sampler, collate_fn=data.collate, num_workers=n)
        )
        for n in (0, 2, 3)
    ]
    assert len(loaded[0]) == 8
    for batches in loaded[1:]:
        for batch, other in zip(loaded[0], batches, strict=True):
            assert [x.shape for x in batch['inputs']] == [(4, 3, 8, 56, 56), (5, 3, 56, 56)]
            assert [x.shape for x in batch['labels']] == [(4,), (5,)]
            for key in ('inputs', 'labels'):
                assert all(torch.equal(a, b) for a, b in zip(batch[key], other[key], strict=True))
            assert batch['paths'] == other['paths']


def test_demo_set_is_made_of_real_files_and_reused(demo):
    folder = demo / 'data/demo'
    assert len(list(folder.glob('*/*.mp4'))) == 8 * 6 and len(list(folder.glob('*/*.jpg'))) == 4 * 13
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    result = run(['data.py', 'demo', str(folder)], ROOT)
    assert 'reusing' in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_lists_from_class_folders(tmp_path, capsys):
    for name in ('b class/deep/2.mp4', 'b class/1.jpg', 'a/3.MP4', 'a/notes.txt', 'a/._3.mp4'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data.main(['list', str(tmp_path)])
    assert (tmp_path / 'list.txt').read_text() == 'a/3.MP4 0\nb class/1.jpg 1\nb class/deep/2.mp4 1\n'
    assert (tmp_path / 'labels.txt').read_text() == 'a\nb class\n'
    assert 'with 3 files' in capsys.readouterr().out
    samples = data.read_list(str(tmp_path / 'list.txt'), str(tmp_path), 2, videos=True)
    assert samples.path(2) == f'{tmp_path}/b class/deep/2.mp4' and samples.path(1).endswith('1.jpg')
    (tmp_path / 'map.txt').write_text('b class\nother\n')
    with pytest.raises(SystemExit, match='a: no class of this name is known'):
        data.main(['list', str(tmp_path), '--labels', str(tmp_path / 'map.txt')])
    with pytest.raises(SystemExit, match='no class folders'):
        data.main(['list', str(tmp_path / 'a')])


def test_check_and_encode_name_what_is_bad_and_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('in/a').mkdir(parents=True)
    write_video('in/a/wide.mkv', num_frames=40, size=(96, 300), codec='mpeg4')
    write_video('in/small.mp4', num_frames=20, size=(48, 64))
    Path('in/torn.mp4').write_bytes(b'nothing' * 100)
    torchvision.io.write_jpeg(torch.zeros(3, 9, 9, dtype=torch.uint8), 'in/a.jpg')
    Path('list.txt').write_text('small.mp4 0\na/wide.mkv 1\ntorn 2\na.jpg 0\n')
    with pytest.raises(SystemExit) as exit:
        data.main('check list.txt --root in'.split())
    assert exit.value.code == 1 and 'list.txt: 4 files, 1 of them unreadable' in capsys.readouterr().out
    assert Path('bad_samples.txt').read_text().startswith('in/torn.mp4: ')

    Path('out/a').mkdir(parents=True)
    Path('out/a/wide.mp4.part').write_bytes(b'half')  # of a run that was killed
    for _ in range(2):
        with pytest.raises(SystemExit) as exit:
            data.main('encode in out --short-side 64 --gop 8'.split())
        assert (
            exit.value.code == 1
            and 'in: 3 files, 1 of them unreadable, see out/bad' in capsys.readouterr().out
        )
        times = {path.name: path.stat().st_mtime_ns for path in Path('out').rglob('*.mp4')}
        assert set(times) == {'wide.mp4', 'small.mp4'} and not list(Path('out').rglob('*.part'))
        assert times == locals().get('first', times)
        first = times
    with data.VideoReader('out/a/wide.mp4') as video:
        assert (len(video), video.get_batch([0]).shape) == (40, (1, 64, 200, 3))
        assert np.flatnonzero(video._idr).tolist() == [0, 8, 16, 24, 32]
        before = data.VideoReader('in/a/wide.mkv').get_batch([33])
        before = data.resize(torch.from_numpy(before).permute(0, 3, 1, 2), 64, 200).permute(0, 2, 3, 1)
        assert np.abs(video.get_batch([33]).astype(int) - before.numpy().astype(int)).mean() < 6
    with data.VideoReader('out/small.mp4') as video:
        assert video.get_batch([19]).shape == (1, 48, 64, 3)


def test_show_draws_what_is_read_and_what_is_fed(demo, monkeypatch):
    monkeypatch.chdir(demo)
    data.main('show seen.png --size 56'.split())
    picture = torchvision.io.decode_image('seen.png')
    rows = 3 * 2 + 2  # of three clips and of the images, before and after
    assert picture.shape[1:] == (rows * (56 + 4 + 14), 8 * (84 + 2) + 2)
    samples = data.read_list('data/demo/image_train.txt', 'data/demo/images_train')
    fed = data.ImageDataset(samples, size=56)[0, 0].pixels
    assert torch.equal(picture[:, -58:-2, 2:58], fed)
