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


def test_plan_of_the_recipe(capsys):
    """240,435 videos and 1,281,167 images, 256 epochs, 8 GPUs: the reference's steps and batches."""
    output = flops_py(capsys, '--plan --clip-ms 36 3.6 --image-ms 3.6 1.8 --step-ms 72')
    assert '1,878 steps' in output and '16 clips and 85 images' in output
    assert '61.5M clips' in output and '327M images' in output
    # 61,538,304 clips and 326,922,240 images in core hours; 480,768 steps in hours
    assert '9.6 hours at 72 ms' in output and re.search('942 core hours +225 core hours', output)
    assert re.search('busy +98 cores +24 cores', output) and re.search('16 cores +59 hours +14 hours', output)


def test_plan_of_own_sets_and_a_smaller_network(capsys):
    """A stem of half the channels has half the activations, and the 18 GB of the recipe were measured."""
    output = flops_py(capsys, '--plan --videos 3200 --images 8500 --epochs 10 --gpus 2')
    assert '10 epochs of 100 steps on 2 GPUs' in output and 'each is seen 20.0 times' in output
    assert '18.0 GB of a GPU in fp32, 9.5 GB in bf16' in output
    assert '9.0 GB of a GPU in fp32, 4.7 GB in bf16' in flops_py(capsys, '--plan --width 32')
    assert 'The joint model: 0.93M parameters' in flops_py(capsys, '--width 8 --layers 1 1 1 1')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--gpus 0', "argument --gpus: '0' is not a whole number of at least 1"),
        ('--step-ms nan', "argument --step-ms: 'nan' is not a number above 0"),
        ('--clip-ms 1 inf', "argument --clip-ms: 'inf' is not a number above 0"),
        ('--image-mb 0 1', "argument --image-mb: '0' is not a number above 0"),
        ('--video-mb a 1', "argument --video-mb: 'a' is not a number above 0"),
    ],
)
def test_numbers_that_are_none_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        flops_py(capsys, flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_any_device_gives_the_same_figures_and_leaves_no_hooks(device):
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    counted = []
    for place in ('meta', device):
        with torch.device(place):
            network = OmniSlowOnly(8, 8, layers=(1, 1, 1, 1), width=16)
            counted.append(flops.count(network, torch.empty(2, 3, 4, 32, 32)))
            flops.count(network, torch.empty(2, 3, 32, 32))
    assert counted[0] == counted[1] and counted[0]['stem'][1] == 2 * 2 * 4 * 16 * 16 * 16
