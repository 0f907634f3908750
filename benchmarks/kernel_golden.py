"""Write what the tests of the kernels compare with: ggml's errors, and the bytes of the present revision.

    pip install libgguf==0.2.2 && python benchmarks/kernel_golden.py        tests/fixtures/ggml_errors.json
    python benchmarks/kernel_golden.py --bytes                              tests/fixtures/kernel_bytes.json

libgguf holds ggml's reference C code: one number per format, kind of weights, and with or without an importance.
Bytes that changed are only written under a new revision (``REVISION`` in kernels/rows.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bitladder.kernels import REVISION, dequantize  # noqa: E402
from bitladder.kernels.rows import AFFINE, EFFORTS, SCALE  # noqa: E402
from kernel_samples import KINDS, bytes_digest, sample, sample_importance, squared_error  # noqa: E402


def write_bytes() -> None:
    path = ROOT / "tests" / "fixtures" / "kernel_bytes.json"
    formats = sorted({*AFFINE, *SCALE})
    digests = {f"{qtype} {effort}": bytes_digest(qtype, effort) for qtype in formats for effort in EFFORTS}
    before = json.loads(path.read_text()) if path.exists() else {"revision": "", "digests": {}}
    if before["revision"] == REVISION and before["digests"] != digests:
        sys.exit(f"the bytes changed: raise REVISION, now {REVISION}, in kernels/rows.py first")
    path.write_text(json.dumps({"revision": REVISION, "digests": digests}, indent=1) + "\n")
    print(path)


def main() -> None:
    if sys.argv[1:] == ["--bytes"]:
        write_bytes()
        return
    import libgguf

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
