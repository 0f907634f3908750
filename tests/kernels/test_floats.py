"""Plain floats: every float16 there is."""

import numpy as np

from bitladder.kernels import dequantize


def test_every_float16_decodes_to_the_very_bits_numpy_gives():
    """Zeros, numbers without exponent, infinities and every NaN included; at odd addresses too."""
    every = np.arange(65536, dtype=np.uint16)
    wanted = every.view(np.float16).astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(
        dequantize(every.view(np.uint8).reshape(64, -1), "F16").view(np.uint32).reshape(-1), wanted
    )
    shifted = np.concatenate([np.zeros(1, np.uint8), every.view(np.uint8)])[1:].reshape(64, -1)
    np.testing.assert_array_equal(dequantize(shifted, "F16").view(np.uint32).reshape(-1), wanted)
