"""Block quantization kernels: arrays in, bytes out, and back."""

from bitladder.kernels.api import QUANTIZABLE, Effort, dequantize, first_nonfinite, quantize

__all__ = ["QUANTIZABLE", "Effort", "dequantize", "first_nonfinite", "quantize"]
