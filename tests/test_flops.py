"""The published cost, by the published accounting."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import flops
from model import OmniSlowOnly


def test_published_figures(tmp_path):
    output = run('flops.py', tmp_path).stdout
    assert '54.75G' in output and '54,517,563,392' in output and '232,259,584' in output
    assert '32.45M' in output and '35.65M' in output and '31,634,496' in output


def test_a_reader_that_has_gone_gets_no_traceback():
    result = subprocess.run(f'{sys.executable} {ROOT}/flops.py | true', shell=True, capture_output=True)
    assert result.stderr == b''


def test_own_figures_at_224():
    with torch.device('meta'):
        network = OmniSlowOnly()
        clip, image = torch.empty(1, 3, 8, 224, 224), torch.empty(1, 3, 224, 224)
    counted = flops.count(network, clip)
    macs, norms = (sum(pair[i] for part, pair in counted.items() if part != 'head') for i in (0, 1))
    assert (macs, norms) == (41_740_009_472, 177_823_744)
    counted = flops.count(network, image)
    assert sum(pair[0] for part, pair in counted.items() if part != 'head') == 4_087_136_256
    assert counted['head'][0] == 2_048_000


def test_plan_of_the_recipe(tmp_path):
    """240,435 videos and 1,281,167 images, 256 epochs, 8 GPUs: the reference's steps and batches."""
    output = run('flops.py --plan --clip-ms 36 3.6 --image-ms 3.6 1.8 --step-ms 72', tmp_path).stdout
    assert '1,878 steps' in output and '16 clips and 85 images' in output
    assert '61.5M clips' in output and '327M images' in output
    # 61,538,304 clips and 326,922,240 images in core hours; 480,768 steps in hours
    assert '9.6 hours at 72 ms' in output and re.search('942 core hours +225 core hours', output)
    assert re.search('busy +98 cores +24 cores', output) and re.search('16 cores +59 hours +14 hours', output)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--gpus 0', "argument --gpus: '0' is not a whole number of at least 1"),
        ('--size -1', "argument --size: '-1' is not a whole number of at least 1"),
        ('--step-ms nan', "argument --step-ms: 'nan' is not a number above 0"),
        ('--clip-ms 1 inf', "argument --clip-ms: 'inf' is not a number above 0"),
        ('--image-mb 0 1', "argument --image-mb: '0' is not a number above 0"),
        ('--video-mb a 1', "argument --video-mb: 'a' is not a number above 0"),
    ],
)
def test_numbers_that_are_none_are_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, 'argv', ['flops.py', *flags.split()])
    with pytest.raises(SystemExit):
        flops.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_any_device_gives_the_same_figures_and_leaves_no_hooks(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    small = {'layers': (1, 1, 1, 1), 'width': 16, 'image_classes': 8, 'video_classes': 8}
    counted = []
    for place in ('meta', device):
        with torch.device(place):
            network = OmniSlowOnly(**small)
            counted.append(flops.count(network, torch.empty(2, 3, 4, 32, 32)))
            flops.count(network, torch.empty(2, 3, 32, 32))
    assert counted[0] == counted[1] and counted[0]['stem'][1] == 2 * 2 * 4 * 16 * 16 * 16
