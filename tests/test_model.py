"""The network is the published one, number for number."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import weights
from torch import nn

import evaluate
import model as models
from model import OmniSlowOnly
from runtime import checkpoint

REFERENCE = Path(__file__).parent / 'reference'
STEP = np.load(REFERENCE / 'step_a.npz')
SMALL = {'layers': (1, 1, 1, 1), 'width': 8}


def relative(ours, theirs):
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@functools.cache
def official_weights():
    """An official checkpoint's state_dict: all 334 keys, weights of tag `a`."""
    shapes = json.loads((REFERENCE / 'state_dict_shapes.json').read_text())
    arrays = {key: weights.tensor(key, shape, 'a') for key, shape in shapes.items()}
    arrays |= np.load(REFERENCE / 'bn_a.npz')
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def batch(name, shape):
    return torch.from_numpy(weights.batch(name, shape, 'a')).double()


@pytest.fixture
def network():
    """The full network in float64 with those weights."""
    network = OmniSlowOnly()
    network.load_state_dict(checkpoint.from_mmaction2(official_weights()))
    network.normalize = False
    return network.double()


def test_eval_logits_equal_the_reference(network):
    network.eval()
    clips, images = batch('clip', (2, 3, 8, 64, 64)), batch('image', (3, 3, 64, 64))
    with torch.no_grad():
        video_logits, image_logits = network(clips, images)
        assert relative(video_logits, STEP['eval_clip_logits']) < 1e-9
        assert relative(image_logits, STEP['eval_image_logits']) < 1e-9
        assert torch.equal(network(images), image_logits)
        assert relative(network(batch('clip96', (1, 3, 4, 96, 80))), STEP['eval_clip96_logits']) < 1e-9


@pytest.mark.quick
def test_one_joint_training_step_equals_the_reference(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    theirs = checkpoint.to_mmaction2(dict(network.named_parameters()))
    names = dict(zip(theirs, network.parameters()))
    clip, image = batch('clip', (2, 3, 8, 64, 64)), batch('image', (3, 3, 64, 64))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    logits = network({'video': clip, 'image': image})
    assert relative(logits['video'].detach(), STEP['train_clip_logits']) < 1e-8
    assert relative(logits['image'].detach(), STEP['train_image_logits']) < 1e-8
    loss = F.cross_entropy(logits['video'], torch.from_numpy(STEP['labels_clip']))
    loss = loss + F.cross_entropy(logits['image'], torch.from_numpy(STEP['labels_image']))
    assert relative([loss.item()], STEP['loss']) < 1e-8
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 40)
    assert relative([norm.item()], STEP['grad_norm']) < 1e-8
    parameters = [names[name] for name in STEP['param_names']]
    assert len(parameters) == len(names) == 169
    norms = [parameter.grad.norm().item() for parameter in parameters]
    assert norms == pytest.approx(STEP['grad_norms_clipped'], rel=1e-8)
    optimizer.step()
    assert relative([p.norm().item() for p in parameters], STEP['param_norms_after']) < 1e-8
    assert relative([p.sum().item() for p in parameters], STEP['param_sums_after']) < 1e-8
    after = checkpoint.to_mmaction2(network.state_dict())
    assert relative([after[name].sum().item() for name in STEP['bn_names']], STEP['bn_sums_after']) < 1e-8
    network.eval()
    with torch.no_grad():
        assert relative(network(clip), STEP['eval_clip_logits_after']) < 1e-8


def test_official_state_dict_there_and_back():
    official = official_weights()
    back = checkpoint.to_mmaction2(checkpoint.from_mmaction2(official))
    assert back.keys() == official.keys() and len(back) == 334
    assert all(torch.equal(back[key], value) for key, value in official.items())


def test_uint8_is_normalized_inside():
    network = OmniSlowOnly(5, 6, **SMALL).eval()
    x = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    expected = network(x)
    assert torch.equal(network(x.float()), expected)
    network.normalize = False
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (models.PIXEL_MEAN, models.PIXEL_STD))
    torch.testing.assert_close(network((x - mean) / std), expected, atol=1e-4, rtol=1e-4)


def inputs():
    """Clips and images."""
    return torch.rand(2, 3, 4, 32, 32) * 255, torch.rand(3, 3, 32, 32) * 255


@pytest.mark.quick
def test_temporal_convolution_is_a_conv3d():
    ours = models.TemporalConv(6, 4).double()
    theirs = nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0), bias=False).double()
    theirs.weight.data = ours.weight.data[..., None]
    x = torch.randn(2, 6, 5, 7, 3).double()
    expected = theirs(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        folded = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=memory_format)
        torch.testing.assert_close(ours(folded, 5).unflatten(0, (2, 5)).transpose(1, 2), expected)
    image = torch.randn(2, 6, 7, 3).double()
    repeated = theirs(image[:, :, None].expand(-1, -1, 3, -1, -1))[:, :, 1]
    torch.testing.assert_close(ours(image, 1), repeated)  # the middle frame of a picture that stands still


def test_few_classes_have_one_linear_layer_and_many_the_published_head():
    for kwargs, shapes in (
        ({}, [(400, 800)]),
        ({'video_classes': 6}, []),
        ({'video_classes': 6, 'hidden': 12}, [(6, 12)]),  # a checkpoint from before the rule
        ({'video_classes': 0}, []),
    ):
        network = OmniSlowOnly(**{'layers': (1, 1, 1, 1), 'width': 4, **kwargs})
        state = network.state_dict()
        assert [tuple(v.shape) for k, v in state.items() if k == 'video_head.4.weight'] == shapes
        again = OmniSlowOnly(**OmniSlowOnly.size_of(state))
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_what_is_frozen_stays_as_it_is():
    network, (clips, _) = OmniSlowOnly(5, 6, hidden=10, **SMALL), inputs()
    network.freeze_trunk()
    assert not any(module.training for module in (network.bn1, *network.layer3.modules()))
    assert network.video_head.training and network.image_head[0].training
    learning = {key for key, value in network.named_parameters() if value.requires_grad}
    assert learning == {key for key, _ in network.named_parameters() if '_head.' in key}
    moving = models.running_statistics(network)
    assert {value.data_ptr() for value in moving} == {
        value.data_ptr() for key, value in network.named_buffers() if '_head.' in key and 'running_' in key
    }
    assert not network.features(clips).requires_grad  # nothing is kept for a backward pass
    assert not network.eval().video_head.training and not network.train().bn1.training


def test_folded_batchnorm_changes_nothing():
    network = OmniSlowOnly(5, 6, **SMALL).double().train()
    clips, images = (pixels.double() for pixels in inputs())
    for _ in range(3):
        network(clips, images)
    network.eval()
    for x in (clips, images):
        folded = evaluate.fold_batchnorm(network, is_image=x.ndim == 4)
        assert not any(isinstance(module, models.DualStatsBatchNorm) for module in folded.modules())
        torch.testing.assert_close(folded(x), network(x))


def test_folding_keeps_the_bias_of_another_backbone():
    block = nn.Sequential(nn.Conv2d(3, 4, 1, bias=True), models.DualStatsBatchNorm(4)).eval()
    block[1].running_mean.uniform_(), block[1].running_var.uniform_(1, 2)
    x = torch.randn(2, 3, 5, 5)
    folded = evaluate.fold_batchnorm(block, is_image=False)
    torch.testing.assert_close(folded[1](folded[0](x), False), block[1](block[0](x), False))


def test_momentum_averages_the_first_steps_evenly():
    network = OmniSlowOnly(5, 6, **SMALL)
    for step, backbone, head in ((0, 1, 1), (3, 1 / 4, 1 / 4), (20, 1 / 21, 0.1), (400, 0.01, 0.1)):
        models.set_momentum(network, step)
        assert (network.bn1.momentum, network.image_head[0].momentum) == (backbone, head)


@pytest.mark.quick
def test_pixels_scaled_to_0_to_1_are_refused():
    network, clips = OmniSlowOnly(5, 6, **SMALL).eval(), torch.rand(2, 3, 4, 32, 32)
    with pytest.raises(ValueError, match='at most 1; the network takes uint8, or floats from 0 to 255'):
        network(clips)
    expected = network(clips * 255)
    assert torch.equal(network(clips * 255), expected) and network(clips).isfinite().all()  # known by then
    network.normalize = False
    network(clips)
