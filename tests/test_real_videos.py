"""Channel means of pixels, and scores, on real videos equal the reference's.

The seven files are MMAction2's demo and test videos. They are looked for in $OMNI_MEDIA, else in
../shared/media beside the project; without them these tests are skipped.
"""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_model import REFERENCE, official_weights

import data
import evaluate
from evaluate import fold_batchnorm
from runtime import checkpoint

MEDIA = Path(os.environ.get('OMNI_MEDIA', ROOT.parent / 'shared/media'))
EXPECTED = np.load(REFERENCE / 'eval_real_a.npz')
FILES = sorted({name.split('/')[0] for name in EXPECTED})
SHORT = 'short32_340x256.mp4', 'sixfps_340x256.mp4'  # their ten clips are alike: a tenth of the work

pytestmark = pytest.mark.skipif(not MEDIA.is_dir(), reason=f'no real videos in {MEDIA}; set OMNI_MEDIA')


@functools.cache
def network():
    """The full network with the weights of tag `a`."""
    network = checkpoint.build({'model': checkpoint.from_mmaction2(official_weights())}, 'tag a')
    return fold_batchnorm(network, is_image=False)


def load(file, mode):
    """A file's views, and how far the channel means of their frames are from the reference's."""
    views = data.VideoDataset(None, mode).load(str(MEDIA / file), None)
    expected = EXPECTED[f'{file}/{"test_views_mean" if mode == "test" else "val_clip_mean"}']
    return views, np.abs(views.float().mean((3, 4)).numpy() - expected).max()


def score(file, mode, views):
    """How far the scores are from the reference's, and whether the likeliest class is the same."""
    different, place = torch.unique(views, dim=0, return_inverse=True)
    scores = evaluate.score_views(network(), 'video', different, 'fp32')[place].mean(0).numpy()
    expected = EXPECTED[f'{file}/{mode}_score']
    return np.abs(scores - expected).max(), scores.argmax() == expected.argmax()


@pytest.mark.parametrize('file', FILES)
def test_views_and_scores(file):
    """`python tests/bench.py scores` compares the 30-view scores of all."""
    for mode in ('test', 'val'):
        views, difference = load(file, mode)
        assert difference < 1e-4  # the reference's means are rounded to float32
        if mode == 'val' or file in SHORT:
            difference, same = score(file, mode, views)
            assert same and difference < 0.001
