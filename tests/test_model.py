"""The network is the published one, number for number; weights go in and out as data."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run, write_video
from reference import weights
from torch import nn

import model as models
from model import OmniSlowOnly
from runtime import checkpoint

REFERENCE = Path(__file__).parent / 'reference'
SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


def relative(ours, theirs):
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope='module')
def official():
    """An official checkpoint's state_dict: all 334 keys, weights of tag `a`."""
    shapes = json.loads((REFERENCE / 'state_dict_shapes.json').read_text())
    statistics = np.load(REFERENCE / 'bn_a.npz')
    arrays = {
        key: statistics[key] if key in statistics else weights.tensor(key, shape, 'a')
        for key, shape in shapes.items()
    }
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


@pytest.fixture(scope='module')
def step():
    return np.load(REFERENCE / 'step_a.npz')


def batch(name, shape):
    return torch.from_numpy(weights.batch(name, shape, 'a')).double()


@pytest.fixture
def network(official):
    """The full network in float64 with those weights."""
    network = OmniSlowOnly()
    network.load_state_dict(checkpoint.from_mmaction2(official))
    network.normalize = False
    return network.double()


def test_eval_logits_equal_the_reference(network, step):
    network.eval()
    with torch.no_grad():
        assert relative(network(batch('clip', (2, 3, 8, 64, 64))), step['eval_clip_logits']) < 1e-9
        assert relative(network(batch('image', (3, 3, 64, 64))), step['eval_image_logits']) < 1e-9
        assert relative(network(batch('clip96', (1, 3, 4, 96, 80))), step['eval_clip96_logits']) < 1e-9


def test_one_joint_training_step_equals_the_reference(network, step):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    names = {checkpoint.to_mmaction2_key(name): p for name, p in network.named_parameters()}
    clip, image = batch('clip', (2, 3, 8, 64, 64)), batch('image', (3, 3, 64, 64))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    video_logits, image_logits = network(clip, image)
    assert relative(video_logits.detach(), step['train_clip_logits']) < 1e-8
    assert relative(image_logits.detach(), step['train_image_logits']) < 1e-8
    loss = F.cross_entropy(video_logits, torch.from_numpy(step['labels_clip']))
    loss = loss + F.cross_entropy(image_logits, torch.from_numpy(step['labels_image']))
    assert relative([loss.item()], step['loss']) < 1e-8
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 40)
    assert relative([norm.item()], step['grad_norm']) < 1e-8
    parameters = [names[name] for name in step['param_names']]
    assert len(parameters) == len(names) == 169
    for ours, theirs in zip(parameters, step['grad_norms_clipped']):
        assert ours.grad.norm().item() == pytest.approx(theirs, rel=1e-8)
    optimizer.step()
    assert relative([p.norm().item() for p in parameters], step['param_norms_after']) < 1e-8
    assert relative([p.sum().item() for p in parameters], step['param_sums_after']) < 1e-8
    after = checkpoint.to_mmaction2(network.state_dict())
    assert relative([after[name].sum().item() for name in step['bn_names']], step['bn_sums_after']) < 1e-8
    network.eval()
    with torch.no_grad():
        assert relative(network(clip), step['eval_clip_logits_after']) < 1e-8


def test_official_state_dict_there_and_back(official):
    ours = checkpoint.from_mmaction2(official)
    assert ours.keys() == OmniSlowOnly().state_dict().keys()
    back = checkpoint.to_mmaction2(ours)
    assert back.keys() == official.keys() and len(back) == 334
    assert all(
        torch.equal(back[key], value) and back[key].shape == value.shape for key, value in official.items()
    )


def test_published_size():
    with torch.device('meta'):
        assert sum(p.numel() for p in OmniSlowOnly().parameters()) == 35_648_792


def test_uint8_is_normalized_inside():
    network = OmniSlowOnly(5, 6, **SMALL).eval()
    x = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    expected = network(x)
    assert torch.equal(network(x.float()), expected)
    network.normalize = False
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (models.PIXEL_MEAN, models.PIXEL_STD))
    torch.testing.assert_close(network((x - mean) / std), expected, atol=1e-4, rtol=1e-4)


def test_joint_calls_equal_two_calls():
    network = OmniSlowOnly(5, 6, **SMALL).eval()
    clips, images = torch.rand(2, 3, 4, 32, 32) * 255, torch.rand(3, 3, 32, 32) * 255
    video_logits, image_logits = network(clips, images)
    assert video_logits.shape == (2, 5) and image_logits.shape == (3, 6)
    assert torch.equal(video_logits, network(clips)) and torch.equal(image_logits, network(images))
    named = network({'image': images, 'video': clips})
    assert torch.equal(named['video'], video_logits) and torch.equal(named['image'], image_logits)


def test_temporal_convolution_is_a_conv3d():
    ours, theirs = (
        models.TemporalConv(6, 4).double(),
        nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0), bias=False).double(),
    )
    theirs.weight.data = ours.weight.data[..., None]
    x = torch.randn(2, 6, 5, 7, 3).double()
    expected = theirs(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        folded = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=memory_format)
        torch.testing.assert_close(ours(folded, 5).unflatten(0, (2, 5)).transpose(1, 2), expected)
    image = torch.randn(2, 6, 7, 3).double()
    repeated = theirs(image[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1]
    torch.testing.assert_close(ours(image, 1), repeated)  # the middle frame of a picture that stands still


def test_each_source_has_its_own_running_statistics():
    network = OmniSlowOnly(5, 6, **SMALL).train()
    start = {key: value.clone() for key, value in network.state_dict().items()}
    network(torch.rand(3, 3, 32, 32) * 255)
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, start[key])}
    assert 'bn1.image_running_mean' in moved and 'layer4.0.bn3.image_running_var' in moved
    assert all('.image_running_' in key or key.startswith('image_head') for key in moved)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    network(torch.rand(2, 3, 4, 32, 32) * 255)
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, start[key])}
    assert 'bn1.running_mean' in moved and not any('image' in key for key in moved)


def test_folded_batchnorm_changes_nothing():
    network = OmniSlowOnly(5, 6, **SMALL).double().train()
    clips, images = torch.rand(2, 3, 4, 32, 32).double() * 255, torch.rand(3, 3, 32, 32).double() * 255
    for _ in range(3):
        network(clips, images)
    network.eval()
    for x in (clips, images):
        folded = models.fold_batchnorm(network, is_image=x.ndim == 4)
        assert not any(isinstance(module, models.BatchNorm) for module in folded.modules())
        torch.testing.assert_close(folded(x), network(x))


def test_a_head_can_be_left_out():
    network = OmniSlowOnly(5, 0, **SMALL)
    assert not any('image_head' in key for key in network.state_dict())
    assert network.eval()(torch.rand(1, 3, 4, 32, 32)).shape == (1, 5)


def test_2d_weights_are_inflated():
    """A clip whose frames are all alike is, in its middle, what the 2D network makes of the frame."""
    resnet = torchvision.models.resnet50().eval()
    network = OmniSlowOnly(5, 6).eval()
    for prefix in ('', 'backbone.'):
        state = {prefix + key: value for key, value in resnet.state_dict().items()}
        inflated = checkpoint.inflate_2d(state, network)
        network.load_state_dict(inflated, strict=False)
        network.normalize = False
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = nn.Sequential(*list(resnet.children())[:-2])(x).mean((2, 3))
            torch.testing.assert_close(network.features(x), expected, atol=1e-4, rtol=1e-4)
    del state['backbone.layer3.0.conv1.weight']
    with pytest.raises(ValueError, match='no weight layer3.0.conv1.weight'):
        checkpoint.inflate_2d(state, network)


@pytest.mark.parametrize('video_classes', [0, 8])
def test_own_weights_start_another_network(video_classes):
    """Those of a network without a video head have no video statistics worth keeping."""
    trained, fresh = OmniSlowOnly(video_classes, 4, **SMALL), OmniSlowOnly(3, 0, **SMALL)
    for name, buffer in trained.named_buffers():
        if 'running_' in name:
            buffer.uniform_(1, 2)
    given = trained.state_dict()
    fresh.load_state_dict(checkpoint.inflate_2d(given, fresh), strict=False)
    own = fresh.state_dict()
    for key in ('conv1.weight', 'layer3.0.conv1.weight', 'layer4.0.bn1.image_running_var'):
        assert torch.equal(own[key], given[key])
    source = 'running_mean' if video_classes else 'image_running_mean'
    assert torch.equal(own['layer3.0.bn2.running_mean'], given[f'layer3.0.bn2.{source}'])


class Evil:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def mmengine_file(path, official, **extra):
    """A checkpoint as MMEngine writes it, with objects of classes that are not installed here."""
    import sys
    import types

    names = ('mmengine', 'mmengine.logging', 'mmengine.logging.history_buffer')
    for name in names:
        sys.modules[name] = types.ModuleType(name)

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._statistics_methods = np.arange(3.0), {'min': np.min}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], 'HistoryBuffer'
    sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
    content = {
        'meta': {'epoch': 256, 'seed': np.int64(3), 'cfg': 'model = dict()'},
        'message_hub': {'log_scalars': {'train/loss': HistoryBuffer()}, 'value': np.float64(1.5)},
        'state_dict': official,
        **extra,
    }
    torch.save(content, path)
    for name in names:
        del sys.modules[name]


def test_official_file_loads_without_mmengine(official, tmp_path):
    mmengine_file(tmp_path / 'official.pth', official)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'official.pth', weights_only=True)
    loaded = checkpoint.load_weights(str(tmp_path / 'official.pth'))
    expected = checkpoint.from_mmaction2(official)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_official_file_classifies_from_the_command_line(official, tmp_path):
    mmengine_file(tmp_path / 'official.pth', official)
    video = write_video(tmp_path / 'a.mp4', num_frames=20)
    output = run(
        ['evaluate.py', '--ckpt', 'official.pth', '--clips', '1', '--crops', '1', video], tmp_path
    ).stdout
    assert 'no image statistics in this checkpoint' in output
    assert len(re.findall(r'%  class \d+', output)) == 5


@pytest.mark.parametrize('legacy', [False, True])
def test_no_code_in_a_file_is_run(legacy, tmp_path):
    import os

    mark = tmp_path / 'was here'
    evils = {
        'system': Evil(os.system, f'touch "{mark}"'),
        'eval': Evil(eval, f'open({str(mark)!r}, "w")'),
        'exec': Evil(exec, f'open({str(mark)!r}, "w")'),
        'popen': Evil(os.popen, f'touch "{mark}"'),
    }
    state = OmniSlowOnly(5, 6, **SMALL).state_dict()
    for name, evil in evils.items():
        path = tmp_path / f'{name}.pth'
        torch.save(
            {'state_dict': checkpoint.to_mmaction2(state), 'meta': evil},
            path,
            _use_new_zipfile_serialization=not legacy,
        )
        try:  # it may be refused, or load with something inert in the place of the call
            loaded = checkpoint.load_weights(str(path))
            for key, value in state.items():
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


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save(OmniSlowOnly(5, 6, **SMALL).state_dict(), tmp_path / 'cut.pth')
    content = (tmp_path / 'cut.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(content[: len(content) // 2])
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / 'script.pth'))
    for name in ('text', 'empty', 'list', 'cut', 'script'):
        with pytest.raises(ValueError, match=f'{name}.pth: n') as error:
            checkpoint.load(str(tmp_path / f'{name}.pth'))
        assert '\n' not in str(error.value)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(str(tmp_path / 'missing.pth'))


def test_a_weight_that_does_not_fit_is_named():
    network = OmniSlowOnly(5, 6, **SMALL)
    state = network.state_dict()
    with pytest.raises(
        ValueError, match=r'x.pth: weight video_head.4.weight is \(7, 14\), this network has \(5, 10\)'
    ):
        checkpoint.load_into(network, {**state, 'video_head.4.weight': torch.zeros(7, 14)}, 'x.pth')
    with pytest.raises(ValueError, match='x.pth: no weight bn1.bias'):
        checkpoint.load_into(network, {k: v for k, v in state.items() if k != 'bn1.bias'}, 'x.pth')
    with pytest.raises(ValueError, match='x.pth: weight more has no place'):
        checkpoint.load_into(network, {**state, 'more': torch.zeros(1)}, 'x.pth')
