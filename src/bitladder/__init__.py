"""Bitladder finds, builds, proves and serves the right quantization of a large language model."""

import os

__version__ = "0.2.0"

# MKL adds up products in an order that depends on where its operands happen to lie in memory, unless this is set before
# torch is loaded: a job that was killed and goes on would choose other codes than one that was not. It costs nothing
# that can be measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
