"""Weights on which a quantiser goes through every branch."""

import numpy as np


def odd_blocks():
    """Rows of 256 that go through every branch: nothing at all, one value, all above or below zero, values too small
    for half a precision, an outlier, two largest of opposite signs, halves between two numbers."""
    numbers = np.random.default_rng(7)
    normal = numbers.standard_normal((64, 256)).astype(np.float32)
    signs = np.where(np.arange(256) % 2, 1, -1)
    rows = [
        np.zeros(256),
        np.full(256, 0.25),
        np.full(256, -0.25),
        np.abs(normal[0]),
        -np.abs(normal[1]),
        normal[2] * 1e-8,
        normal[3] * 1e-16,
        normal[4] * 3e-6,
        normal[5] * 1e4,
        np.where(np.arange(256) == 70, 50, normal[6] * 0.01),
        signs * 0.5,
        np.arange(256) / 16 - 8,
        np.round(normal[7] * 4) / 8,
        np.where(np.arange(256) < 128, 0, normal[8]),
        np.where(np.arange(256) % 32 == 0, normal[9], 0),
        np.where(np.arange(256) // 32 == 3, 0.125, normal[10]),
        np.full(256, 1e-20),
    ]
    scaled = normal[11:] * np.float32(10) ** numbers.uniform(-6, 3, (53, 1)).astype(np.float32)
    return np.concatenate([np.array(rows, dtype=np.float32), scaled])
