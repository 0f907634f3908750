"""Block quantization kernels: arrays in, bytes out, and back."""

from bitladder.kernels.api import QUANTIZABLE, dequantize, first_nonfinite, largest_magnitude, quantize
from bitladder.kernels.rows import REVISION, Effort

__all__ = ["QUANTIZABLE", "REVISION", "Effort", "dequantize", "first_nonfinite", "largest_magnitude", "quantize"]
