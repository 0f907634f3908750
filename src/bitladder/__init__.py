"""Bitladder finds, builds, proves and serves the right quantization of a large language model."""

__version__ = "0.2.0"
