"""Deterministic weights for the parity checks: every tensor follows from its key and a tag.

A reference state dict of 334 tensors is 143 MB; these few lines rebuild it exactly
(NumPy's legacy RandomState stream is frozen), so only the calibrated BatchNorm
statistics have to be stored beside the expected outputs.
"""

import zlib

import numpy as np


def tensor(key, shape, tag):
    """The float32 array for reference state-dict entry `key` of `shape`."""
    rng = np.random.RandomState(zlib.crc32(f'{tag}/{key}'.encode()))
    noise = rng.standard_normal(shape)
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    if key.endswith('running_mean'):
        return np.zeros(shape, np.float32)
    if key.endswith('running_var'):
        return np.ones(shape, np.float32)
    if len(shape) == 1:  # BatchNorm weight, or any bias
        return (1 + 0.1 * noise if key.endswith('weight') else 0.1 * noise).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    gain = 3.0 if len(shape) == 2 else 1.0  # classifiers: spread the scores
    return (noise * gain * np.sqrt(2.0 / fan_in)).astype(np.float32)


def batch(name, shape, tag):
    """A float32 input batch, already normalized (zero mean, unit variance)."""
    rng = np.random.RandomState(zlib.crc32(f'{tag}/input/{name}'.encode()))
    return rng.standard_normal(shape).astype(np.float32)
