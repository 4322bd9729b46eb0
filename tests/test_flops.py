"""The published cost, by the published accounting."""

import re
import signal

import pytest
import torch
from conftest import ROOT, Forked

import flops
from model import OmniSlowOnly


def flops_py(capsys, flags=''):
    """What the command prints."""
    flops.main(flags.split())
    return capsys.readouterr().out


def test_published_figures(capsys):
    output = flops_py(capsys)
    assert '54.75G' in output and '54,517,563,392' in output and '232,259,584' in output
    assert '32.45M' in output and '35.65M' in output and '31,634,496' in output
    own = re.split('clip 8x224x224|image 224x224', output)[1:]
    for part, head, total in zip(own, ('1,958,400', '2,048,000'), ('41,741,967,872', '4,089,184,256')):
        assert re.search(f'head +{head} ', part) and re.search(f'total +{total} ', part)
    assert re.search('total .* 177,825,344\n', own[0])


def test_a_reader_that_has_gone_gets_no_traceback(tmp_path):
    code = f"""
import os, runpy, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / 'flops.py')!r}, run_name='__main__')
"""
    process = Forked(['-c', code], tmp_path)
    assert process.wait() == -signal.SIGPIPE and process.err.read_text() == ''


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_any_device_gives_the_same_figures_and_leaves_no_hooks(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    counted = []
    for place in ('meta', device):
        with torch.device(place):
            network = OmniSlowOnly(8, 8, layers=(1, 1, 1, 1), width=16)
            counted.append(flops.count(network, torch.empty(2, 3, 4, 32, 32, dtype=torch.uint8)))
            flops.count(network, torch.empty(2, 3, 32, 32, dtype=torch.uint8))
    assert counted[0] == counted[1] and counted[0]['stem'][1] == 2 * 2 * 4 * 16 * 16 * 16
