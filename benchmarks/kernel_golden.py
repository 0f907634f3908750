"""Write tests/fixtures/ggml_errors.json: the error that ggml's own quantizers leave on the samples of the kernel tests.

    pip install libgguf==0.2.2 && python benchmarks/kernel_golden.py

libgguf holds ggml's reference C code. One number per format, kind of weights, and with or without an importance.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import libgguf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bitladder.kernels import dequantize  # noqa: E402
from bitladder.kernels.rows import AFFINE, SCALE  # noqa: E402
from kernel_samples import KINDS, sample, sample_importance, squared_error  # noqa: E402


def main() -> None:
    errors = {}
    for qtype in sorted({*AFFINE, *SCALE}):
        for kind in KINDS:
            for weighted in (False, True):
                weights, importance = sample(kind), sample_importance() if weighted else None
                number = libgguf.GGMLQuantizationType[qtype]
                stored = libgguf.quantize_rows(weights, number, imatrix=importance)
                restored = dequantize(stored.reshape(len(weights), -1), qtype)
                name = f"{qtype} {kind}{' weighted' if weighted else ''}"
                errors[name] = squared_error(weights, restored, importance)
    path = ROOT / "tests" / "fixtures" / "ggml_errors.json"
    note = "python benchmarks/kernel_golden.py, libgguf 0.2.2 (ggml's quantizers)"
    path.write_text(json.dumps({"made_by": note, "errors": errors}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
