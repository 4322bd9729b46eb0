"""Weights on disk: whole or not there, read as data wherever they come from, and put into a network."""

import errno
import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, Forked, run, write_video
from torch import nn

from model import OmniSlowOnly
from runtime import checkpoint

SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


@pytest.fixture(scope='module')
def trained():
    """A small network whose weights and statistics are all different."""
    torch.manual_seed(0)
    network = OmniSlowOnly(5, 6, **SMALL)
    for name, buffer in network.named_buffers():
        if 'running_' in name:
            buffer.uniform_(1, 2)
    return network.state_dict()


@pytest.fixture(scope='module')
def backbone(trained):
    return {key: value for key, value in trained.items() if 'image_' not in key and '_head' not in key}


@pytest.fixture(scope='module')
def resnet(backbone):
    """A small 2D ResNet with torchvision's names."""
    flat = {key: v[:, :, :1] if v.shape[2:] == (3, 1) else v for key, v in backbone.items()}
    return {**flat, 'fc.weight': torch.ones(9, 256), 'fc.bias': torch.ones(9)}


def plain_slowonly(backbone):
    """MMAction2's SlowOnly with one linear layer as its head."""
    theirs = {'cls_head.fc_cls.weight': torch.ones(5, 256), 'cls_head.fc_cls.bias': torch.ones(5)}
    for key, value in checkpoint.to_mmaction2(backbone).items():
        *block, layer, name = key.split('.')
        if layer.isdigit():  # of downsample
            layer = ('conv', 'bn')[int(layer)]
        else:
            layer = f'conv{layer[-1]}.{layer[:-1]}'
        theirs['.'.join([*block, layer, name])] = value
    return theirs


def under(prefix, state):
    return {f'{prefix}{key}': value for key, value in state.items()}


def same(loaded, expected):
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


# Writing --------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_never_written_to(tmp_path):
    """It may be the same file as a checkpoint, and other files are the user's."""
    checkpoint.write({'model': {'weight': torch.ones(3)}}, tmp_path, 'epoch_1.pth')
    os.link(tmp_path / 'epoch_1.pth', tmp_path / 'latest.pth.tmp')
    for left in ('epoch_3.pth.tmp', 'my.pth.tmp'):
        (tmp_path / left).touch()
    checkpoint.write({'model': {'weight': torch.zeros(3)}}, tmp_path, 'best.pth', 'latest.pth')
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {'best.pth', 'epoch_1.pth', 'latest.pth', 'my.pth.tmp'}
    assert torch.equal(checkpoint.load(tmp_path / 'epoch_1.pth')['model']['weight'], torch.ones(3))


def test_what_cannot_be_removed_is_a_failed_save(tmp_path):
    (tmp_path / 'latest.pth.tmp').mkdir()
    message = r'epoch_1.pth cannot be written \(.*; the older checkpoints are intact'
    with pytest.raises(OSError, match=message):
        checkpoint.write({'model': {}}, tmp_path, 'epoch_1.pth', 'latest.pth')


@pytest.mark.parametrize(
    ('function', 'code'), [('fsync', errno.EINVAL), ('fsync', errno.ENOTSUP), ('open', errno.EACCES)]
)
def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch, function, code):
    original, refused = getattr(os, function), []

    def refuse(file, *arguments):
        if os.path.isdir(f'/dev/fd/{file}' if function == 'fsync' else file):
            refused.append(file)
            raise OSError(code, os.strerror(code))
        return original(file, *arguments)

    monkeypatch.setattr(os, function, refuse)
    checkpoint.write({'model': {'weight': torch.ones(3)}}, tmp_path, 'best.pth', 'latest.pth')
    assert {path.name for path in tmp_path.iterdir()} == {'best.pth', 'latest.pth'}
    assert refused and len(os.listdir('/dev/fd')) < 100
    if function == 'fsync':
        monkeypatch.setattr(os, 'fsync', lambda file: refuse(tmp_path.as_posix()))
        monkeypatch.setattr(os.path, 'isdir', lambda file: True)
        with pytest.raises(OSError, match='epoch_1.pth cannot be written'):
            checkpoint.write({'model': {}}, tmp_path, 'epoch_1.pth')


# Reading --------------------------------------------------------------------------------------------------


class Evil:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def official_file(tmp_path, monkeypatch, trained):
    """A checkpoint as MMEngine writes it, with objects of classes that are not installed here."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._statistics_methods = np.arange(3.0), {'min': np.min}

    names = ('mmengine', 'mmengine.logging', 'mmengine.logging.history_buffer')
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], 'HistoryBuffer'
    content = {
        'meta': {'epoch': 256, 'seed': np.int64(3), 'cfg': 'model = dict()'},
        'message_hub': {'log_scalars': {'train/loss': HistoryBuffer()}, 'value': np.float64(1.5)},
        'state_dict': checkpoint.to_mmaction2(trained),
    }
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
        torch.save(content, tmp_path / 'official.pth')
    return tmp_path / 'official.pth'


@pytest.mark.quick
def test_official_file_loads_without_mmengine(official_file, trained):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(official_file, weights_only=True)
    loaded = checkpoint.load_weights(str(official_file))
    assert loaded.keys() == trained.keys() and checkpoint.images_share_statistics(loaded)
    assert all(torch.equal(loaded[k], v) for k, v in trained.items() if 'image_running' not in k)


def test_official_file_classifies_from_the_command_line(official_file, tmp_path):
    video = write_video(tmp_path / 'a.mp4', num_frames=20)
    line = ['evaluate.py', '--ckpt', 'official.pth', '--clips', '1', '--crops', '1', video]
    output = run(line, tmp_path).stdout
    assert 'no image statistics in this checkpoint' in output and output.count('%  class ') == 5


@pytest.mark.parametrize('legacy', [False, True])
def test_no_code_in_a_file_is_run(legacy, tmp_path, trained):
    mark = tmp_path / 'was here'
    evils = {
        'system': Evil(os.system, f'touch "{mark}"'),
        'eval': Evil(eval, f'open({str(mark)!r}, "w")'),
        'exec': Evil(exec, f'open({str(mark)!r}, "w")'),
        'popen': Evil(os.popen, f'touch "{mark}"'),
    }
    for name, evil in evils.items():
        path = tmp_path / f'{name}.pth'
        content = {'state_dict': checkpoint.to_mmaction2(trained), 'meta': evil}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        try:  # it may be refused, or load with something inert in the place of the call
            loaded = checkpoint.load_weights(str(path))
            for key, value in trained.items():
                assert 'image_running' in key or torch.equal(loaded[key], value)
        except ValueError as error:
            assert f'{name}.pth: not a checkpoint' in str(error)
        torch.save({'state_dict': evil}, path)
        with pytest.raises(ValueError, match=f'{name}.pth: '):
            checkpoint.load_weights(str(path))
        path.write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match=f'{name}.pth: '):
            checkpoint.load_weights(str(path))
    assert not mark.exists()


def test_a_file_written_on_a_gpu_loads_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    checkpoint.write({'settings': {}, 'model': {'weight': torch.ones(3)}}, tmp_path, 'latest.pth')
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match='CUDA'):
            torch.load(tmp_path / 'latest.pth', weights_only=True)
    assert checkpoint.load(tmp_path / 'latest.pth')['model']['weight'].device.type == 'cpu'


@pytest.mark.filterwarnings('error')
def test_files_that_are_no_checkpoints(tmp_path, trained):
    torch.save(trained, tmp_path / 'cut.pth')
    content = (tmp_path / 'cut.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(content[: len(content) // 2])
    (tmp_path / 'text.pth').write_text('\nversion https://git-lfs.github.com/spec/v1\noid sha256:abc\n' * 3)
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save(nn.Linear(2, 2), tmp_path / 'module.pth')
    with pytest.warns():
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / 'script.pth'))
    damaged = 'not a checkpoint of train.py or MMAction2, or a damaged one'
    lines = {
        'cut': damaged,
        'script': damaged,
        'text': "not a checkpoint, but text that begins 'version https://git-lfs.github.com/spec/v1 oid sha",
        'empty': 'not a checkpoint: the file is empty',
        'list': 'no weights found in it; expected a checkpoint of train.py or of MMAction2',
        'module': 'no weights found in it; expected a checkpoint of train.py or of MMAction2',
    }
    for name, line in lines.items():
        with pytest.raises(ValueError) as error:
            checkpoint.load(str(tmp_path / f'{name}.pth'))
        assert str(error.value).startswith(f'{tmp_path}/{name}.pth: {line}') and '\n' not in str(error.value)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(str(tmp_path / 'missing.pth'))


def test_a_folder_names_its_newest_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path}: a folder; no checkpoint is in it'):
        checkpoint.load(tmp_path)
    for age, name in enumerate(('latest.pth', 'best.pth', 'epoch_4.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    (tmp_path / 'other.pth').touch()
    with pytest.raises(ValueError, match=f'a folder; its newest checkpoint is {tmp_path}/latest.pth'):
        checkpoint.load(str(tmp_path))


@pytest.mark.quick
def test_damaged_checkpoints_are_named_and_skipped(tmp_path, trained, capsys):
    state = {'model': trained, 'optimizer': {}, 'settings': {}, 'step': 3, 'lists': {}}
    checkpoint.write(state, tmp_path, 'epoch_9.pth', 'epoch_10.pth', 'latest.pth')
    whole = (tmp_path / 'latest.pth').read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch.load does not notice
    (tmp_path / 'latest.pth').write_bytes(flipped)
    (tmp_path / 'epoch_10.pth').write_bytes(whole[: len(whole) // 2])
    assert checkpoint.newest(tmp_path)[1] == f'{tmp_path}/epoch_9.pth'
    shown = capsys.readouterr().out.splitlines()
    assert f'skipping {tmp_path}/latest.pth: a damaged checkpoint (wrong checksum' in shown[0]
    assert f'skipping {tmp_path}/epoch_10.pth: not a checkpoint of train.py or MMAction2, or a' in shown[1]
    (tmp_path / 'epoch_9.pth').unlink()
    with pytest.raises(ValueError, match='no checkpoint in it can be resumed'):
        checkpoint.newest(tmp_path)


def test_weights_are_no_run(tmp_path, trained):
    for state in ({'model': trained}, {'model': trained, 'optimizer': {}}):  # the second is torchvision's
        torch.save(state, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='a.pth: weights, but no run to resume; --init starts from'):
            checkpoint.load_run(tmp_path / 'a.pth')


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'model': state, 'model_ema': {}},
        lambda state: {'epoch': 1, 'model_state': state, 'optimizer_state': {}},
        lambda state: {'model': under('module.', state)},
        lambda state: {'state_dict': under('module._orig_mod.', state), 'epoch': 3},
        lambda state: {'model': under('_orig_mod.module.', state)},
        lambda state: {'state_dict': under('model._orig_mod.', state)},
        lambda state: {'state_dict': under('net.encoder.', state)},
        lambda state: under('1.', state),
        lambda state: {k.replace('layer3.', 'layer3._orig_mod.module.'): v for k, v in state.items()},
    ],
)
def test_names_before_ours_are_taken_off(tmp_path, trained, wrap):
    torch.save(wrap(trained), tmp_path / 'a.pth')
    saved = checkpoint.load(tmp_path / 'a.pth')
    assert same(saved['model'], trained)
    assert same(checkpoint.build(saved, 'a.pth').state_dict(), trained)


def test_names_before_those_of_mmaction2_are_taken_off(trained):
    theirs = checkpoint.to_mmaction2(trained)
    expected = checkpoint.from_mmaction2(theirs)
    for before in ('model.', 'module.', 'model._orig_mod.'):
        assert same(checkpoint.from_mmaction2(under(before, theirs)), expected)


def test_a_fork_s_own_names_are_left_alone(tmp_path):
    state = {'backbone.conv1.weight': torch.ones(3), 'backbone.bn1.running_mean': torch.ones(3)}
    checkpoint.write({'model': state, 'settings': {}}, tmp_path, 'latest.pth')
    assert same(checkpoint.load(tmp_path / 'latest.pth')['model'], state)


# Into a network -------------------------------------------------------------------------------------------


def fault(function, *arguments):
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def init(network, state, path, other=()):
    """`load_init`, with other class names for the sources `other`."""
    saved = {'model': state, **{f'{source}_labels': ['a'] for source in other}}
    return checkpoint.load_init(network, saved, path, {source: ['b'] for source in other})


def test_a_weight_that_does_not_fit_is_named(trained):
    network = OmniSlowOnly(5, 6, **SMALL)
    less = {key: value for key, value in trained.items() if key != 'bn1.bias'}
    more = {**trained, 'more': torch.zeros(1)}
    other = {**trained, 'video_head.4.weight': torch.zeros(7, 14)}
    backbone = {**trained, 'layer3.0.conv2.weight': torch.zeros(7, 14)}
    deeper = {**trained, 'layer1.0.se.weight': torch.zeros(1)}
    line = 'x.pth: weight video_head.4.weight is (7, 14), this network has (5, 10); it is of another network'
    assert fault(checkpoint.load_into, network, other, 'x.pth') == line
    assert fault(checkpoint.load_into, network, more, 'x.pth').startswith('x.pth: weight more has no place')
    assert init(network, other, 'x.pth') == ['video']
    assert init(network, more, 'x.pth', other=['image']) == ['image']
    for load in (checkpoint.load_into, init):
        assert fault(load, network, less, 'x.pth').startswith('x.pth: no weight bn1.bias')
        line = 'x.pth: weight layer3.0.conv2.weight is (7, 14)'
        assert fault(load, network, backbone, 'x.pth').startswith(line)
        line = 'x.pth: weight layer1.0.se.weight has no place'
        assert fault(load, network, deeper, 'x.pth').startswith(line)


def test_heads_may_differ_where_a_run_starts(trained):
    for sizes, other, fresh in (((5, 6), (), []), ((5, 6), ['image'], ['image']), ((4, 6), (), ['video'])):
        network = OmniSlowOnly(*sizes, **SMALL)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        assert init(network, trained, 'x.pth', other) == fresh
        for key, value in network.state_dict().items():
            expected = before if key.split('_head.')[0] in fresh else trained
            assert torch.equal(value, expected[key])


@pytest.mark.parametrize('video_classes', [0, 8])
def test_own_weights_start_another_network(video_classes, tmp_path):
    """Those of a network without a video head have no video statistics worth keeping."""
    trained = OmniSlowOnly(video_classes, 4, **SMALL)
    for name, buffer in trained.named_buffers():
        if 'running_' in name:
            buffer.uniform_(1, 2)
    given = trained.state_dict()
    torch.save({'model': given, 'settings': {}}, tmp_path / 'a.pth')
    for load in (init, checkpoint.load_2d):
        fresh = OmniSlowOnly(3, 0, **SMALL)
        load(fresh, *((given, 'a.pth') if load is init else (str(tmp_path / 'a.pth'),)))
        own = fresh.state_dict()
        for key in ('conv1.weight', 'layer3.0.conv1.weight', 'layer4.0.bn1.image_running_var'):
            assert torch.equal(own[key], given[key])
        source = 'running_mean' if video_classes else 'image_running_mean'
        assert torch.equal(own['layer3.0.bn2.running_mean'], given[f'layer3.0.bn2.{source}'])


def test_2d_weights_are_inflated():
    """A clip whose frames are all alike is, in its middle, what the 2D network makes of the frame."""
    resnet = torchvision.models.resnet50().eval()
    network = OmniSlowOnly(5, 6).eval()
    network.normalize = False
    x = torch.randn(1, 3, 64, 64)
    for prefix in ('', 'backbone.'):
        state = under(prefix, resnet.state_dict())
        network.load_state_dict(checkpoint.inflate_2d(state, network), strict=False)
        with torch.no_grad():
            expected = nn.Sequential(*list(resnet.children())[:-2])(x).mean((2, 3))
            torch.testing.assert_close(network.features(x), expected, atol=1e-4, rtol=1e-4)
    del state['backbone.layer3.0.conv1.weight']
    assert 'no weight layer3.0.conv1.weight' in fault(checkpoint.inflate_2d, state, network)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: {'epoch': 90, 'arch': 'resnet50', 'state_dict': under('module.', state)},
        lambda state: {'state_dict': under('module.encoder_q.', state) | under('module.encoder_k.', state)},
        lambda state: {'model': {k: v.half() if v.is_floating_point() else v for k, v in state.items()}},
        lambda state: {k: v for k, v in state.items() if 'num_batches' not in k and k[:2] != 'fc'},
    ],
)
def test_2d_weights_of_other_programs(tmp_path, resnet, wrap):
    torch.save(wrap(resnet), tmp_path / 'a.pth')
    network = OmniSlowOnly(5, 6, **SMALL)
    checkpoint.load_2d(network, str(tmp_path / 'a.pth'))
    expected = (resnet['layer4.0.conv1.weight'] / 3).expand(-1, -1, 3, -1)
    torch.testing.assert_close(network.state_dict()['layer4.0.conv1.weight'], expected, atol=1e-3, rtol=1e-3)


def test_the_backbone_of_a_plain_slowonly_is_taken(tmp_path, backbone):
    torch.save({'meta': {}, 'state_dict': plain_slowonly(backbone)}, tmp_path / 'slowonly.pth')
    saved = checkpoint.load(tmp_path / 'slowonly.pth')
    network = OmniSlowOnly(5, 6, **SMALL)
    assert init(network, saved['model'], 'slowonly.pth') == ['image', 'video']
    own = network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in backbone.items())
    assert checkpoint.images_share_statistics(own)
    result = run('evaluate.py --ckpt slowonly.pth a.mp4', tmp_path, expect=1)
    assert result.stderr == (
        'evaluate.py: slowonly.pth: weight cls_head.fc_cls.weight has no place in this network; '
        'its head is a single linear layer; train.py --init takes only the backbone\n'
    )


def test_what_would_fit_is_named(trained, resnet):
    network, wide = OmniSlowOnly(5, 6, **SMALL), OmniSlowOnly(5, 6, (1, 2, 1, 1), 16)
    needs = 'it needs --width 8 --layers 1 1 1 1'
    line = f'x.pth: weight conv1.weight is (8, 3, 7, 7), this network has (16, 3, 7, 7); {needs}'
    assert fault(init, wide, trained, 'x.pth') == line
    assert fault(checkpoint.inflate_2d, resnet, wide).endswith(needs)
    deeper = OmniSlowOnly(5, 6, (1, 2, 1, 1), 8).state_dict()
    line = 'weight layer2.1.conv1.weight has no place in this network; it needs --width 8 --layers 1 2 1 1'
    assert fault(init, network, deeper, 'x.pth') == f'x.pth: {line}'
    assert fault(checkpoint.inflate_2d, deeper, network).endswith(line)
    flat, two_d = checkpoint.from_mmaction2(resnet), 'it is a 2D ResNet, which train.py --init-2d takes'
    assert fault(init, network, flat, 'x.pth').endswith(two_d)
    assert fault(checkpoint.build, {'model': flat}, 'x.pth').endswith(two_d)
    assert fault(init, wide, flat, 'x.pth').endswith(f'{two_d}; {needs}')


def test_other_networks_are_refused_by_their_first_weight(trained):
    network = OmniSlowOnly(5, 6, **SMALL)
    videos = torchvision.models.video.r3d_18().state_dict()
    assert fault(init, network, videos, 'x').startswith('x: no weight conv1.weight')
    basic = checkpoint.from_mmaction2(torchvision.models.resnet18().state_dict())
    line = 'weight layer1.0.conv1.weight is (64, 64, 3, 3), this network has (64, 64, 1, 1)'
    wide = OmniSlowOnly(5, 6, (2, 2, 2, 2), 64)
    assert f'{line}; it is of another' in fault(checkpoint.inflate_2d, basic, wide)
    for first in ('layer1.weight', 'stem.0.weight'):
        line = f'x: weights of a network other than SlowOnly; the first is {first}'
        assert fault(checkpoint.build, {'model': {first: torch.ones(3)}}, 'x') == line


def test_the_size_is_read_off_the_weights(trained, resnet):
    for state in (trained, resnet):
        assert checkpoint.architecture(state) == {'layers': [1, 1, 1, 1], 'width': 8}
    for other in ({}, torchvision.models.resnet18().state_dict(), {'conv1.weight': torch.ones(3)}):
        assert checkpoint.architecture(other) == {}


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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def weights_file(path, state):
    torch.save({'model': state, 'settings': {}}, path)
    return path.read_bytes()


@pytest.mark.parametrize('name', ['best.pth', 'small-HASH.pth', 'on-20240131.pth', 'file?id=3', ''])
def test_an_address_is_fetched_once(server, tmp_path, trained, name):
    content = weights_file(tmp_path / 'a.pth', trained)
    name = name.replace('HASH', hashlib.sha256(content).hexdigest()[:8])
    server.files[f'/{name}'] = content
    url = f'{server.address}/{name}'
    assert same(checkpoint.load(url)['model'], trained) and len(server.asked) == 1
    server.shutdown()
    server.server_close()
    assert same(checkpoint.load(url)['model'], trained)
    (kept,) = (tmp_path / 'home/hub/checkpoints').iterdir()
    if '-' in name and name.startswith('small'):  # a hash in the name is compared with what is kept, too
        kept.write_bytes(content[:-100])
        with pytest.raises(ValueError, match='SHA-256 does not begin with .*; remove it to fetch it again'):
            checkpoint.load(url)


def test_addresses_that_end_alike_are_told_apart(server, tmp_path, trained):
    for folder, value in (('a', 1.0), ('b', 2.0)):
        state = {**trained, 'bn1.bias': torch.full((8,), value)}
        server.files[f'/{folder}/best.pth'] = weights_file(tmp_path / 'a.pth', state)
    for folder, value in (('a', 1.0), ('b', 2.0)):
        state = checkpoint.load_weights(f'{server.address}/{folder}/best.pth')
        assert state['bn1.bias'][0] == value


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('missing.pth', 'HTTP Error 404: Not Found'),
        ('wrong-0123abcd.pth', 'invalid hash value (expected "0123abcd", got "'),
        ('cut.pth', 'what came: not a checkpoint of train.py or MMAction2, or a damaged one'),
        ('page.pth', "what came: not a checkpoint, but text that begins '<!DOCTYPE html>'"),
        ('gone.pth', '<urlopen error [Errno 111] Connection refused>'),
        ('two words.pth', "URL can't contain control characters"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(server, tmp_path, trained, name, reason):
    content = weights_file(tmp_path / 'a.pth', trained)
    server.files.update({f'/{n}': content for n in ('wrong-0123abcd.pth', 'cut.pth')})
    server.files['/page.pth'] = b'<!DOCTYPE html>'
    if name == 'gone.pth':
        server.shutdown()
        server.server_close()
    with pytest.raises(OSError) as error:
        checkpoint.load(f'{server.address}/{name}')
    line = str(error.value)
    assert line.startswith(f'{server.address}/{name}: cannot be fetched ({reason}') and '\n' not in line
    assert '.tmp' not in line and not list((tmp_path / 'home/hub/checkpoints').iterdir())


def test_processes_fetch_one_after_the_other(server, tmp_path, trained):
    server.files['/best.pth'] = weights_file(tmp_path / 'a.pth', trained)
    (tmp_path / 'home/hub/checkpoints').mkdir(parents=True)
    name = hashlib.sha256(f'{server.address}/best.pth'.encode()).hexdigest()[:8] + '_best.pth'
    code = f'from runtime import checkpoint; checkpoint.load({f"{server.address}/best.pth"!r})'
    forks = [Forked(['-c', code], ROOT) for _ in range(3)]
    assert [fork.wait() for fork in forks] == [0, 0, 0]
    bars = ['100%' in fork.err.read_text() for fork in forks]  # the progress bar
    assert len(server.asked) == 1 and sum(bars) == 1
    assert [path.name for path in (tmp_path / 'home/hub/checkpoints').iterdir()] == [name]


def test_the_command_takes_an_address(server, tmp_path, trained):
    write_video(tmp_path / 'a.mp4', num_frames=20)
    server.files['/best.pth'] = weights_file(tmp_path / 'a.pth', trained)
    line = f'evaluate.py --clips 1 --crops 1 a.mp4 --ckpt {server.address}/best.pth'
    assert 'a.mp4 (video)' in run(line, tmp_path).stdout


def test_torchvision_s_weights_have_names(tmp_path, monkeypatch, resnet):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save(resnet, tmp_path / 'a.pth')
    name = f'resnet50-{hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()[:8]}.pth'
    (tmp_path / 'a.pth').rename(tmp_path / 'hub/checkpoints' / name)
    get_weight, own = (
        torchvision.models.get_weight,
        mock.Mock(url=f'https://download.pytorch.org/models/{name}'),
    )
    monkeypatch.setattr(
        'torchvision.models.get_weight', lambda name: own if name.endswith('V1') else get_weight(name)
    )
    network = OmniSlowOnly(5, 6, **SMALL)
    checkpoint.load_2d(network, 'ResNet50_Weights.IMAGENET1K_V1')
    assert torch.equal(network.state_dict()['layer1.0.conv2.weight'], resnet['layer1.0.conv2.weight'])
    for name in ('ResNet50_Weights.NO', 'No_Weights.DEFAULT'):
        line = f'{name}: no such file, and torchvision has no weights of this name'
        assert fault(checkpoint.load, name) == line
    code = 'import sys; from runtime import checkpoint; assert "torchvision" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_what_a_run_goes_on_from(tmp_path, trained, monkeypatch):
    """A line that is started again loses nothing; going back takes another folder."""
    monkeypatch.chdir(tmp_path)

    def state(step, resume=None, **settings):
        settings = {'resume': resume, **settings}
        return {'model': trained, 'optimizer': {}, 'step': step, 'lists': {}, 'settings': settings}

    a, b, new = (Path(name) for name in ('a', 'b', 'new'))
    a.mkdir(), b.mkdir(), new.mkdir()
    checkpoint.write(state(3), a, 'epoch_1.pth')
    checkpoint.write(state(5), a, 'latest.pth')
    for resume in ('auto', 'a/latest.pth', './a//latest.pth', str(tmp_path / 'a/latest.pth')):
        assert checkpoint.find(resume, a)[0]['step'] == 5
    assert checkpoint.find(None, new) == checkpoint.find('auto', new) == (None, '')
    assert checkpoint.find('a/epoch_1.pth', new)[0]['step'] == 3
    checkpoint.write(state(4, 'a/epoch_1.pth'), new, 'latest.pth')  # what that line has trained since
    assert checkpoint.find('a/epoch_1.pth', new)[0]['step'] == 4
    refused = 'a holds a run: the same command with --resume goes on with it, --work-dir takes another folder'
    for resume in (None, 'a/epoch_1.pth', 'new/latest.pth'):
        assert fault(checkpoint.find, resume, a) == refused
    assert fault(checkpoint.find, None, a, True) == refused
    checkpoint.write(state(9, demo=True), b, 'latest.pth')
    assert checkpoint.find(None, b, True) == (None, '')


def test_what_cannot_be_written_leaves_what_is_there(tmp_path, monkeypatch):
    checkpoint.write({'model': {'weight': torch.ones(3)}}, tmp_path, 'latest.pth')
    before = (tmp_path / 'latest.pth').read_bytes()

    def save(state, file):
        file.write(b'half of it')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError, match=r'latest.pth cannot be written \(No space left on device, '):
        checkpoint.write({'model': {}}, tmp_path, 'latest.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['latest.pth']
    assert (tmp_path / 'latest.pth').read_bytes() == before
