"""Block quantization kernels: arrays in, bytes out, and back."""

from bitladder.kernels.api import QUANTIZABLE, dequantize, first_nonfinite, quantize
from bitladder.kernels.rows import Effort

__all__ = ["QUANTIZABLE", "Effort", "dequantize", "first_nonfinite", "quantize"]
