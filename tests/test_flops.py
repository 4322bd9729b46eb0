"""The published cost, by the published accounting."""

import re

import pytest
import torch

import flops
from model import OmniSlowOnly


def test_published_figures(capsys):
    flops.main([])
    output = capsys.readouterr().out
    assert '54.75G' in output and '54,517,563,392' in output and '232,259,584' in output
    assert '32.45M' in output and '35.65M' in output and '31,634,496' in output
    own = re.findall(r'with its head +([\d,]+) +([\d,]+)\n', output)
    assert own == [('41,741,967,872', '177,825,344'), ('4,089,184,256', '22,232,064')]


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_any_device_gives_the_same_figures_and_leaves_no_hooks(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    counted = []
    for place in ('meta', device):
        with torch.device(place):
            network = OmniSlowOnly(8, 8, layers=(1, 1, 1, 1), width=16).eval()
            counted.append(flops.count(network, torch.empty(2, 3, 4, 32, 32, dtype=torch.uint8)))
            flops.count(network, torch.empty(2, 3, 32, 32, dtype=torch.uint8))
    assert counted[0] == counted[1] and counted[0][1] > 2 * 2 * 4 * 16 * 16 * 16
