"""Weights on disk: whole or not there, read as data wherever they come from, and put into a network."""

import errno
import hashlib
import http.server
import os
import pickle
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, Forked, run, write_video
from torch import nn

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


@pytest.fixture(scope='module')
def resnet(backbone):
    """A small 2D ResNet with torchvision's names."""
    flat = {key: v[:, :, :1] if v.shape[2:] == (3, 1) else v for key, v in backbone.items()}
    return {**flat, 'fc.weight': torch.ones(9, 256), 'fc.bias': torch.ones(9)}


def under(prefix, state):
    return {f'{prefix}{key}': value for key, value in state.items()}


def same(loaded, expected):
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[k], v) for k, v in expected.items())


def fault(function, *arguments):
    """The one line of a ValueError."""
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


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
    message = r'epoch_1.pth cannot be written \(.*, \d+ MB .*; the older checkpoints are intact'
    with pytest.raises(OSError, match=message):
        checkpoint.write({'model': {}}, tmp_path, 'epoch_1.pth', 'latest.pth')


@pytest.mark.parametrize('code', [errno.EINVAL, errno.ENOTSUP])
def test_each_file_has_to_be_synced_and_their_folder_if_it_can_be(tmp_path, monkeypatch, code):
    def sync(descriptor):
        folders.append(os.path.isdir(f'/dev/fd/{descriptor}'))
        if folders[-1] or len(folders) > 3:
            raise OSError(code, os.strerror(code))

    folders = []
    monkeypatch.setattr(os, 'fsync', sync)
    checkpoint.write({'model': {}}, tmp_path, 'best.pth', 'latest.pth')
    assert folders == [False, False, True]
    with pytest.raises(OSError, match='epoch_1.pth cannot be written'):
        checkpoint.write({'model': {}}, tmp_path, 'epoch_1.pth')
    assert {path.name for path in tmp_path.iterdir()} == {'best.pth', 'latest.pth'}


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


@pytest.mark.parametrize('legacy', [False, True])
def test_no_code_in_a_file_is_run(legacy, tmp_path, trained):
    mark, path = tmp_path / 'was here', tmp_path / 'a.pth'
    shell, python = f'touch "{mark}"', f'open({str(mark)!r}, "w")'
    for function, code in ((os.system, shell), (os.popen, shell), (eval, python), (exec, python)):
        evil = Evil(function, code)
        content = {'state_dict': checkpoint.to_mmaction2(trained), 'meta': evil}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        try:  # it may be refused, or load with something inert in the place of the call
            loaded = checkpoint.load_weights(path)
            assert all('image_running' in k or torch.equal(loaded[k], v) for k, v in trained.items())
        except ValueError as error:
            assert f'{path}: not a checkpoint' in str(error)
        torch.save({'state_dict': evil}, path)
        assert fault(checkpoint.load, path).startswith(f'{path}: ')
        path.write_bytes(pickle.dumps(evil))
        assert fault(checkpoint.load, path).startswith(f'{path}: ')
    assert not mark.exists()


def test_a_file_written_on_a_gpu_loads_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    checkpoint.write({'settings': {}, 'model': {'weight': torch.ones(3)}}, tmp_path, 'latest.pth')
    assert checkpoint.load(tmp_path / 'latest.pth')['model']['weight'].device.type == 'cpu'


@pytest.mark.filterwarnings('error')
def test_files_that_are_no_checkpoints(tmp_path, trained):
    torch.save(trained, tmp_path / 'cut.pth')
    os.truncate(tmp_path / 'cut.pth', 20_000)  # which torch tells by an OSError
    (tmp_path / 'text.pth').write_text('\nversion https://git-lfs.github.com/spec/v1\noid sha256:abc\n' * 3)
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save(nn.Linear(2, 2), tmp_path / 'module.pth')
    with pytest.warns():
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / 'script.pth'))
    for name, line in {
        'cut': 'not a checkpoint of train.py or MMAction2, or a damaged one',
        'script': 'not a checkpoint of train.py or MMAction2, or a damaged one',
        'text': "not a checkpoint, but text that begins 'version https://git-lfs.github.com/spec/v1 oid sha",
        'empty': 'not a checkpoint: the file is empty',
        'list': 'no weights found in it; expected a checkpoint of train.py or of MMAction2',
        'module': 'no weights found in it; expected a checkpoint of train.py or of MMAction2',
    }.items():
        path = tmp_path / f'{name}.pth'
        assert fault(checkpoint.load, path).startswith(f'{path}: {line}')


def test_a_folder_names_its_newest_checkpoint(tmp_path):
    assert fault(checkpoint.load, tmp_path) == f'{tmp_path}: a folder; no checkpoint is in it'
    for age, name in enumerate(('latest.pth', 'best.pth', 'epoch_4.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    (tmp_path / 'other.pth').touch()
    line = f'{tmp_path}: a folder; its newest checkpoint is {tmp_path}/latest.pth'
    assert fault(checkpoint.load, tmp_path) == line


@pytest.mark.quick
def test_damaged_checkpoints_are_named_and_skipped(tmp_path, trained, capsys):
    state = {'model': trained, 'optimizer': {}, 'settings': {}, 'step': 3, 'lists': {}}
    checkpoint.write(state, tmp_path, 'epoch_9.pth', 'epoch_10.pth', 'latest.pth')
    flipped = bytearray((tmp_path / 'latest.pth').read_bytes())
    flipped[len(flipped) // 2] ^= 1  # torch.load does not notice
    (tmp_path / 'latest.pth').write_bytes(flipped)
    os.truncate(tmp_path / 'epoch_10.pth', len(flipped) // 2)
    assert checkpoint.newest(tmp_path)[1] == f'{tmp_path}/epoch_9.pth'
    shown = capsys.readouterr().out.splitlines()
    assert f'skipping {tmp_path}/latest.pth: a damaged checkpoint (wrong checksum' in shown[0]
    assert f'skipping {tmp_path}/epoch_10.pth: not a checkpoint of train.py or MMAction2, or a' in shown[1]
    (tmp_path / 'epoch_9.pth').unlink()
    assert 'no checkpoint in it can be resumed' in fault(checkpoint.newest, tmp_path)


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


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'model': state, 'model_ema': {}},
        lambda state: {'epoch': 1, 'model_state': state, 'optimizer_state': {}},
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
    assert same(checkpoint.load(tmp_path / 'a.pth')['model'], trained)


def test_names_before_those_of_mmaction2_are_taken_off(trained):
    theirs = checkpoint.to_mmaction2(trained)
    for before in ('model.', 'module.', 'model._orig_mod.'):
        assert same(checkpoint.from_mmaction2(under(before, theirs)), checkpoint.from_mmaction2(theirs))


# Into a network -------------------------------------------------------------------------------------------


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
    given = weights_of(video_classes, 4)
    torch.save({'model': given, 'settings': {}}, tmp_path / 'a.pth')
    networks = [OmniSlowOnly(3, 0, **SMALL) for _ in range(2)]
    init(networks[0], given, 'a.pth')
    checkpoint.load_2d(networks[1], tmp_path / 'a.pth')
    for own in (network.state_dict() for network in networks):
        for key in ('conv1.weight', 'layer3.0.conv1.weight', 'layer4.0.bn1.image_running_var'):
            assert torch.equal(own[key], given[key])
        source = 'running_mean' if video_classes else 'image_running_mean'
        assert torch.equal(own['layer3.0.bn2.running_mean'], given[f'layer3.0.bn2.{source}'])


def test_2d_weights_are_inflated():
    """A clip whose frames are all alike is, in its middle, what the 2D network makes of the frame."""
    resnet = torchvision.models.resnet50().eval()
    network = OmniSlowOnly(5, 6).eval()
    network.normalize = False
    network.load_state_dict(checkpoint.inflate_2d(resnet.state_dict(), network), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nn.Sequential(*list(resnet.children())[:-2])(x).mean((2, 3))
        torch.testing.assert_close(network.features(x), expected, atol=1e-4, rtol=1e-4)


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
    """MMAction2's network with one linear layer as its head."""
    theirs = {'cls_head.fc_cls.weight': torch.ones(5, 256), 'cls_head.fc_cls.bias': torch.ones(5)}
    for key, value in checkpoint.to_mmaction2(backbone).items():
        key = re.sub(r'(conv|bn)(\d)\.', r'conv\2.\1.', key)
        key = key.replace('downsample.0', 'downsample.conv').replace('downsample.1', 'downsample.bn')
        theirs[key] = value
    torch.save({'meta': {}, 'state_dict': theirs}, tmp_path / 'slowonly.pth')
    network = OmniSlowOnly(5, 6, **SMALL)
    assert init(network, checkpoint.load_weights(tmp_path / 'slowonly.pth'), 'x.pth') == ['image', 'video']
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
    if name.startswith('small-'):  # a hash in the name is compared with what is kept, too
        os.truncate(kept, 1000)
        line = f'{kept}: its SHA-256 does not begin with {name[6:14]}; remove it to fetch it again'
        assert fault(checkpoint.load, url) == line


def test_addresses_that_end_alike_are_told_apart(server, tmp_path, trained):
    for folder in '12':
        state = {**trained, 'bn1.bias': torch.full((8,), float(folder))}
        server.files[f'/{folder}/best.pth'] = weights_file(tmp_path / 'a.pth', state)
        assert same(checkpoint.load_weights(f'{server.address}/{folder}/best.pth'), state)


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
    server.files['/cut.pth'] = server.files['/wrong-0123abcd.pth'] = weights_file(tmp_path / 'a.pth', trained)
    server.files['/page.pth'] = b'<!DOCTYPE html>'
    if name == 'gone.pth':
        server.shutdown()
        server.server_close()
    with pytest.raises(OSError) as error:
        checkpoint.load(f'{server.address}/{name}')
    line = str(error.value)
    assert line.startswith(f'{server.address}/{name}: cannot be fetched ({reason}') and '\n' not in line
    assert '.tmp' not in line and not list((tmp_path / 'home/hub/checkpoints').iterdir())


def test_commands_take_an_address_and_fetch_one_after_the_other(server, tmp_path, trained):
    write_video(tmp_path / 'a.mp4', num_frames=20)
    server.files['/best.pth'] = weights_file(tmp_path / 'a.pth', trained)
    line = f'evaluate.py --clips 1 --crops 1 a.mp4 --ckpt {server.address}/best.pth'
    forks = [Forked(line, tmp_path) for _ in range(3)]
    assert [fork.wait() for fork in forks] == [0, 0, 0]
    assert all('a.mp4 (video)' in fork.out.read_text() for fork in forks)
    bars = ['100%' in fork.err.read_text() for fork in forks]  # the progress bar
    assert len(server.asked) == sum(bars) == len(list((tmp_path / 'home/hub/checkpoints').iterdir())) == 1


def test_torchvision_s_weights_have_names(tmp_path, monkeypatch, resnet):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save(resnet, tmp_path / 'a.pth')
    name = f'resnet50-{hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()[:8]}.pth'
    (tmp_path / 'a.pth').rename(tmp_path / 'hub/checkpoints' / name)
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(published, 'url', f'https://download.pytorch.org/models/{name}')
    network = OmniSlowOnly(5, 6, **SMALL)
    checkpoint.load_2d(network, 'ResNet50_Weights.IMAGENET1K_V1')
    assert torch.equal(network.state_dict()['layer1.0.conv2.weight'], resnet['layer1.0.conv2.weight'])
    for name in ('ResNet50_Weights.NO', 'No_Weights.DEFAULT'):
        assert f'{name}: no such file, and torchvision has no weights of' in fault(checkpoint.load, name)
    code = 'import sys; from runtime import checkpoint; assert "torchvision" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
