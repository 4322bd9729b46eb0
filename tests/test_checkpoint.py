"""Weights on disk: whole or not there, read as data wherever they come from, and put into a network."""

import argparse
import contextlib
import errno
import hashlib
import http.server
import os
import pickle
import re
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import run, same, write_video
from torch import nn

import train
from model import OmniSlowOnly
from runtime import checkpoint

SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


def weights_of(video_classes, image_classes):
    """Those of a small network whose weights and statistics are all different."""
    torch.manual_seed(0)
    network = OmniSlowOnly(video_classes, image_classes, **SMALL)
    for name, buffer in network.named_buffers():
        if 'running_' in name:
            buffer.uniform_(1, 2)
    return network.state_dict()


@pytest.fixture(scope='module')
def trained():
    return weights_of(5, 6)


@pytest.fixture(scope='module')
def backbone(trained):
    return {key: value for key, value in trained.items() if 'image_' not in key and '_head' not in key}


def under(prefix, state):
    return {f'{prefix}{key}': value for key, value in state.items()}


def run_of(state, **changes):
    """What a run saves in its second epoch of four steps."""
    counters = {'step': 5, 'steps_per_epoch': 4, 'epoch': 1, 'best': [0.5, None]}
    rest = {'optimizer': {}, 'scaler': {}, 'settings': {}, 'lists': {'video': [['a', 'b'], None]}}
    return {'model': state, **counters, **rest, **changes}


def fault(function, *arguments):
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


# Writing --------------------------------------------------------------------------------------------------


def test_unfinished_files_are_replaced_and_epochs_kept_to_three(tmp_path):
    """Other files are the user's. What was just written stays, after going back too."""
    for left in ('checkpoint.tmp', 'my.pth.tmp', 'epoch_1_mine.pth'):
        (tmp_path / left).touch()
    for epoch in (8, 9, 10, 11):
        checkpoint.write({'model': {'weight': torch.ones(3)}}, tmp_path, f'epoch_{epoch}.pth', 'latest.pth')
    written = {'epoch_9.pth', 'epoch_10.pth', 'epoch_11.pth', 'latest.pth'}
    assert {path.name for path in tmp_path.iterdir()} == {'my.pth.tmp', 'epoch_1_mine.pth', *written}
    checkpoint.write({'model': {}}, tmp_path, 'epoch_8.pth', 'latest.pth')
    checkpoint.write({'model': {}}, tmp_path, 'latest.pth')  # saved every ten minutes, it removes nothing
    assert len([*tmp_path.glob('epoch_*.pth')]) == 5


def test_each_file_has_to_be_synced_and_their_folder_if_it_can_be(tmp_path, monkeypatch):
    def sync(descriptor):
        folders.append(os.path.isdir(f'/dev/fd/{descriptor}'))
        if folders[-1] or len(folders) > 3:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    folders = []
    monkeypatch.setattr(os, 'fsync', sync)
    checkpoint.write({'model': {}}, tmp_path, 'best.pth', 'latest.pth')
    assert folders == [False, False, True]
    with pytest.raises(OSError, match=r'epoch_1.pth cannot be written \(.*, \d+ MB are free there\)'):
        checkpoint.write({'model': {}}, tmp_path, 'epoch_1.pth')
    assert {path.name for path in tmp_path.glob('*.pth')} == {'best.pth', 'latest.pth'}


# Reading --------------------------------------------------------------------------------------------------


class Evil:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.quick
def test_a_file_of_mmengine_is_used_without_it(tmp_path, monkeypatch, trained):
    """It holds objects of classes that are not installed here."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._statistics_methods = np.arange(3.0), {'min': np.min}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = 'mmengine', 'HistoryBuffer'
    content = {
        'meta': {'epoch': 256, 'seed': np.int64(3), 'cfg': 'model = dict()'},
        'message_hub': {'log_scalars': {'train/loss': HistoryBuffer()}, 'value': np.float64(1.5)},
        'state_dict': checkpoint.to_mmaction2(trained),
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'mmengine', types.SimpleNamespace(HistoryBuffer=HistoryBuffer))
        torch.save(content, tmp_path / 'official.pth')
    loaded = checkpoint.load_weights(tmp_path / 'official.pth')
    assert loaded.keys() == trained.keys() and checkpoint.images_share_statistics(loaded)
    assert all(torch.equal(loaded[k], v) for k, v in trained.items() if 'image_running' not in k)
    write_video(tmp_path / 'a.mp4', num_frames=20)
    output = run('evaluate.py --ckpt official.pth --clips 1 --crops 1 a.mp4', tmp_path).stdout
    assert 'no image statistics in this checkpoint' in output and output.count('%  class ') == 5


@pytest.mark.parametrize('zipped', [False, True])
def test_no_code_in_a_file_is_run(zipped, tmp_path, trained):
    mark, path = tmp_path / 'was here', tmp_path / 'a.pth'
    for evil in (Evil(os.system, f'touch "{mark}"'), Evil(eval, f'open({str(mark)!r}, "w")')):
        for content in ({'state_dict': trained, 'meta': evil}, {'state_dict': evil}):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with contextlib.suppress(ValueError):  # or something inert takes the place of the call
                checkpoint.load(path)
        path.write_bytes(pickle.dumps(evil))
        assert fault(checkpoint.load, path).startswith(f'{path}: ')
    assert not mark.exists()


def test_a_file_written_on_a_gpu_loads_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    checkpoint.write({'settings': {}, 'model': {'weight': torch.ones(3)}}, tmp_path, 'latest.pth')
    assert checkpoint.load(tmp_path / 'latest.pth')['model']['weight'].device.type == 'cpu'


def test_files_that_are_no_checkpoints(tmp_path, trained):
    damaged = 'not a checkpoint of train.py or MMAction2, or a damaged one'
    torch.save(trained, tmp_path / 'cut')
    os.truncate(tmp_path / 'cut', 20_000)  # which torch tells by an OSError
    (tmp_path / 'text').write_text('\nversion https://git-lfs.github.com/spec/v1\noid sha256:abc\n' * 3)
    (tmp_path / 'empty').touch()
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'fifo')
    torch.save([1, 2], tmp_path / 'list')
    torch.save(nn.Linear(2, 2), tmp_path / 'module')
    torch.save({'model': trained, 'settings': {}}, tmp_path / 'good')
    with zipfile.ZipFile(tmp_path / 'good') as good, zipfile.ZipFile(tmp_path / 'zip', 'w', 8) as packed:
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    for line, names in {
        damaged: ('cut', 'text', 'empty', 'zip'),
        'not a regular file': ('folder', 'fifo'),
        'no weights found in it; expected a checkpoint of train.py or of MMAction2': ('list', 'module'),
    }.items():
        for name in names:
            assert fault(checkpoint.load, tmp_path / name) == f'{tmp_path / name}: {line}'


@pytest.mark.quick
def test_damaged_checkpoints_are_named_and_skipped(tmp_path, trained, capsys):
    checkpoint.write(run_of(trained), tmp_path, 'epoch_9.pth', 'epoch_10.pth', 'latest.pth')
    flipped = bytearray((tmp_path / 'latest.pth').read_bytes())
    flipped[len(flipped) // 2] ^= 1  # torch.load does not notice
    (tmp_path / 'latest.pth').write_bytes(flipped)
    os.truncate(tmp_path / 'epoch_10.pth', len(flipped) // 2)
    assert checkpoint.find(True, tmp_path)[1] == f'{tmp_path}/epoch_9.pth'
    for line, name in zip(capsys.readouterr().out.splitlines(), ('latest', 'epoch_10')):
        assert line.startswith(f'skipping {tmp_path}/{name}.pth: not a checkpoint of train.py or')
    torch.save({'model': trained}, tmp_path / 'epoch_9.pth')
    assert 'no checkpoint in it can be resumed' in fault(checkpoint.find, True, tmp_path)
    assert 'epoch_9.pth: weights, but no run to resume' in capsys.readouterr().out


def test_what_a_run_goes_on_from(tmp_path, trained):
    """A run goes on in its own folder, and only where that is asked for."""
    assert checkpoint.find(False, tmp_path) == checkpoint.find(True, tmp_path) == (None, '')
    checkpoint.write(run_of(trained, step=6), tmp_path, 'epoch_1.pth')
    assert checkpoint.find(True, tmp_path)[0]['step'] == 6
    checkpoint.write(run_of(trained, step=7), tmp_path, 'latest.pth')
    saved, path = checkpoint.find(True, tmp_path)
    assert (saved['step'], path) == (7, f'{tmp_path}/latest.pth')
    for demo in (False, True):
        assert fault(checkpoint.find, False, tmp_path, demo).startswith(f'{tmp_path} holds a run: --resume')
    checkpoint.write(run_of(trained, settings={'demo': True}), tmp_path, 'latest.pth')
    assert checkpoint.find(False, tmp_path, True) == (None, '')


def test_what_no_run_would_save_is_no_run(tmp_path, trained, capsys):
    """But its weights are taken."""
    for key, value in (
        ('step', 'x'),
        ('step', torch.ones(2)),
        ('best', 3),
        ('lists', []),
        ('settings', None),
    ):
        torch.save(run_of(trained, **{key: value}), tmp_path / 'latest.pth')
        assert 'no checkpoint in it can be resumed' in fault(checkpoint.find, True, tmp_path)
        assert 'latest.pth: weights, but no run to resume' in capsys.readouterr().out
        assert same(checkpoint.load_weights(tmp_path / 'latest.pth'), trained)


def test_numbers_that_are_not_stored_do_not_fill_the_memory(tmp_path, trained):
    one, path, shared = torch.zeros(1), tmp_path / 'a.pth', torch.zeros(10**5)
    for change, line in (
        ({'bn1.running_mean': one.expand(10**10)}, 'bn1.running_mean is missing, this network has (8,)'),
        ({'bn1.weight': torch.ones(8).to_sparse()}, 'bn1.weight is missing, this network has (8,)'),
        ({'bn1.weight': torch.ones(8, device='meta')}, 'bn1.weight is missing, this network has (8,)'),
        ({5: torch.ones(8), 'bn1.weight': torch.ones(())}, 'bn1.weight is (), this network has (8,)'),
        ({'conv1.weight': torch.ones(())}, ''),
        ({'conv1.weight': torch.zeros(512, 3, 7, 7)}, 'not all weights of a network of width 512'),
        ({f'more{n}': shared for n in range(99)}, 'its weights are larger than the file'),
    ):
        torch.save({'model': trained | change, 'settings': {}}, path)
        assert fault(lambda: checkpoint.build(checkpoint.load(path), path)).startswith(f'{path}: {line}')


def test_momentum_is_copied_or_refused(trained):
    """A fused optimizer would write outside buffers that do not fit."""

    network = OmniSlowOnly(5, 6, **SMALL)
    saved, new = (train.make_optimizer(network, lr, 0.9, 0.0) for lr in (7.0, 0.1))
    saved = saved.state_dict()
    for entry in saved['state'].values():
        entry['momentum_buffer'].uniform_()
    checkpoint.load_momentum(new, saved, 'a.pth')
    assert new.param_groups[0]['lr'] == 0.1
    for number, entry in new.state_dict()['state'].items():
        assert torch.equal(entry['momentum_buffer'], saved['state'][number]['momentum_buffer'])
    saved['state'][0]['momentum_buffer'] = torch.zeros(2)
    expanded = {'momentum_buffer': torch.ones(1).expand(8, 3, 7, 7)}
    for other in (saved, {}, {'state': []}, {'state': {0: expanded}}):
        line = fault(checkpoint.load_momentum, new, other, 'a.pth')
        assert line == 'a.pth: momentum 0 does not fit this network'


def test_which_weights_of_a_file_are_taken(tmp_path, trained, capsys):
    path, other = tmp_path / 'a.pth', {'a': torch.ones(1)}
    for content, said in (
        ({'epoch': 1, 'model_state': trained, 'optimizer_state': {}}, ''),
        ({'state_dict': under('module._orig_mod.', trained), 'epoch': 3}, ''),
        ({'state_dict': under('model._orig_mod.', trained)}, ''),
        ({'ema': other, 'state_dict': trained}, "'state_dict'; it also has 'ema'"),
        ({'one': trained, 'two': other}, "'one'; it also has 'two'"),
        ({'ema': other, 'model': trained, 'settings': {}}, "'model'; it also has 'ema'"),
    ):
        torch.save(content, path)
        assert same(checkpoint.load_weights(path), trained)
        assert capsys.readouterr().out == (f'{path}: taking the weights in {said}\n' if said else '')


# Into a network -------------------------------------------------------------------------------------------


def init(network, saved, path, image_labels=None):
    """What --init does at the start of a run."""
    args = argparse.Namespace(init=path)
    sources = [
        argparse.Namespace(name='video', classes=len(network.video_head[-1].bias), labels=None),
        argparse.Namespace(name='image', classes=len(network.image_head[-1].bias), labels=image_labels),
    ]
    checkpoint.first_weights(network, args, saved, sources)


def test_a_weight_that_does_not_fit_is_named(trained):
    network = OmniSlowOnly(5, 6, **SMALL)
    less = {key: value for key, value in trained.items() if key != 'bn1.bias'}
    other = {**trained, 'layer3.0.conv2.weight': torch.zeros(7, 14)}
    deeper = {**trained, 'layer1.0.se.weight': torch.zeros(1)}
    for state, line in (
        (less, 'x.pth: bn1.bias is missing, this network has (8,)'),
        (other, 'x.pth: layer3.0.conv2.weight is (7, 14), this network has (32, 32, 3, 3)'),
        (deeper, 'x.pth: layer1.0.se.weight is (1,), this network has none'),
    ):
        assert fault(checkpoint.load_into, network, state, 'x.pth') == line
        assert fault(init, network, {'model': state}, 'x.pth') == line


def test_heads_may_differ_where_a_run_starts(trained, capsys):
    """In number, name or order; or if only one side has names, so that they cannot be compared."""
    for sizes, there, here, new in (
        ((5, 6), 'abcdef', 'abcdef', []),
        ((4, 6), None, None, ['video']),
        ((5, 6), 'abcdef', 'fedcba', ['image']),
        ((4, 6), 'abcdef', None, ['video', 'image']),
    ):
        network = OmniSlowOnly(*sizes, **SMALL)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        init(network, {'model': trained, 'image_labels': there}, 'x.pth', image_labels=here)
        for key, value in network.state_dict().items():
            assert torch.equal(value, (before if key.split('_head.')[0] in new else trained)[key])
        assert f'starting from x.pth; new heads: {", ".join(new) or "none"}\n' == capsys.readouterr().out


@pytest.mark.parametrize(('video_classes', 'image_classes'), [(8, 4), (0, 4), (8, 0)])
def test_what_never_learned_begins_with_the_statistics_of_the_other(video_classes, image_classes, capsys):
    given, network = weights_of(video_classes, image_classes), OmniSlowOnly(3, 5, **SMALL)
    init(network, {'model': given}, 'a.pth')
    own = network.state_dict()
    videos = 'running' if video_classes else 'image_running'
    images = 'image_running' if image_classes else 'running'
    for place in ('bn1', 'layer3.0.bn2'):
        assert torch.equal(own[f'{place}.running_mean'], given[f'{place}.{videos}_mean'])
        assert torch.equal(own[f'{place}.image_running_var'], given[f'{place}.{images}_var'])
    assert ('one set of running statistics' in capsys.readouterr().out) == (videos == images)


def test_2d_weights_are_inflated():
    """A clip whose frames are all alike is, in its middle, what the 2D network makes of the frame."""
    resnet = torchvision.models.resnet50().eval()
    network = OmniSlowOnly(5, 6).eval()
    network.normalize = False
    given = {key: value for key, value in resnet.state_dict().items() if 'num_batches' not in key}
    given = checkpoint.from_mmaction2(under('module.backbone.', given))
    init(network, {'model': given}, 'a.pth')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nn.Sequential(*list(resnet.children())[:-2])(x).mean((2, 3))
        torch.testing.assert_close(network.features(x), expected, atol=1e-4, rtol=1e-4)


def test_a_plain_slowonly_is_taken_with_its_head(backbone, tmp_path):
    """MMAction2's network with one linear layer as its head."""
    theirs = {'cls_head.fc_cls.weight': torch.ones(5, 256), 'cls_head.fc_cls.bias': torch.ones(5)}
    for key, value in checkpoint.to_mmaction2(backbone).items():
        key = re.sub(r'(conv|bn)(\d)\.', r'conv\2.\1.', key)
        key = key.replace('downsample.0', 'downsample.conv').replace('downsample.1', 'downsample.bn')
        theirs[key] = value
    network = OmniSlowOnly(5, 6, **SMALL)
    init(network, {'model': checkpoint.from_mmaction2(theirs)}, 'x.pth')
    own = network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in backbone.items())
    assert checkpoint.images_share_statistics(own)
    torch.save({'state_dict': theirs}, tmp_path / 'x.pth')
    built = checkpoint.build(checkpoint.load(tmp_path / 'x.pth'), 'x.pth')
    assert len(built.video_head) == 1 and built.image_head is None  # as it is, for evaluation
    head = checkpoint.to_mmaction2(own)
    assert all(torch.equal(head[key], value) for key, value in theirs.items() if 'fc_cls' in key)


def test_sizes_that_a_command_leaves_open_are_the_checkpoint_s(tmp_path, trained, backbone):
    path, size = str(tmp_path / 'a.pth'), {'size': 112, 'clip_len': 4, 'frame_interval': 2, 'width': 8}

    def fitted(saved, **asked):
        args = argparse.Namespace(**dict.fromkeys([*checkpoint.SIZES, 'init']) | asked)
        checkpoint.fit_size(args, saved, 'run.pth')
        return {key: getattr(args, key) for key in checkpoint.SIZES}

    torch.save({'model': trained, 'settings': size}, path)
    size['layers'] = [1, 1, 1, 1]
    assert fitted(None, init=path) == size
    assert fitted(None, init=path, size=56) == size | {'size': 56}
    own = {'model': trained, 'settings': size | {'size': 28}}  # of the run that goes on
    assert fitted(own, init=path)['size'] == 28
    torch.save(backbone, path)
    assert fitted(None, init=path) == checkpoint.SIZES | {'width': 8, 'layers': [1, 1, 1, 1]}
    line = fault(fitted, {'model': {'stem.0.weight': torch.ones(3)}})
    assert line == 'run.pth: not weights of a SlowOnly or another ResNet with bottlenecks'


# From an address ------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server; {path: content} can be set and its requests be counted. `cut` breaks off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header('Content-Length', str(len(content or b'')))
            self.end_headers()
            self.wfile.write((content or b'')[: 5000 if 'cut' in self.path else None])

        def log_message(self, *arguments):
            pass

    files, asked = {}, []
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.address, server.files, server.asked = f'http://127.0.0.1:{server.server_port}', files, asked
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def content(tmp_path, trained):
    """Of a file of weights."""
    torch.save({'model': trained, 'settings': {}}, tmp_path / 'a.pth')
    return (tmp_path / 'a.pth').read_bytes()


def test_an_address_is_fetched_once(server, content, trained):
    names = ['1/best.pth', '2/best.pth', f'small-{hashlib.sha256(content).hexdigest()[:8]}.pth', 'a?id=3', '']
    for name in names:
        server.files[f'/{name}'] = content
        for _ in range(2):
            assert same(checkpoint.load_weights(f'{server.address}/{name}'), trained)
    assert server.asked == [f'/{name}' for name in names]


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('missing.pth', 'HTTP Error 404: Not Found'),
        ('wrong-0123abcd.pth', 'invalid hash value (expected "0123abcd", got "'),
        ('cut.pth', 'not a checkpoint of train.py or MMAction2, or a damaged one); you can'),
        ('two words.pth', "URL can't contain control characters"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(server, tmp_path, content, name, reason):
    server.files['/cut.pth'] = server.files['/wrong-0123abcd.pth'] = content
    with pytest.raises(OSError) as error:
        checkpoint.load(f'{server.address}/{name}')
    line = str(error.value)
    assert line.startswith(f'{server.address}/{name}: cannot be fetched (') and reason in line
    assert '\n' not in line
    assert not list((tmp_path / 'home/hub/checkpoints').iterdir())


def test_torchvision_s_weights_have_names(server, content, trained, monkeypatch):
    server.files['/small.pth'] = content
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(published, 'url', f'{server.address}/small.pth')
    assert same(checkpoint.load_weights('ResNet50_Weights.IMAGENET1K_V1'), trained)
    for name in ('ResNet50_Weights.NO', 'No_Weights.DEFAULT'):
        with pytest.raises(FileNotFoundError, match=name):
            checkpoint.load(name)
