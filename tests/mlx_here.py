"""mlx-lm in an environment of its own, asked by scripts: what it makes of a folder is its own word, not ours."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_LOGITS = """
import json, sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
folder, tokens, out = sys.argv[1:]
model, config = load_model(Path(folder))
logits = model(mx.array(np.load(tokens)))
np.save(out, np.array(logits.astype(mx.float32)))
print(json.dumps(config["quantization"]))
"""
_DEQUANTIZED = """
import sys
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
file, prefix, group, bits, mode, out = sys.argv[1:]
arrays = mx.load(file)
weight, scales = arrays[prefix + ".weight"], arrays[prefix + ".scales"]
biases = arrays.get(prefix + ".biases")
if biases is not None:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
own = {} if biases is not None else {"dtype": mx.float32}
np.save(out, np.array(mx.dequantize(weight, scales, biases, int(group), int(bits), mode=mode, **own)))
"""


def interpreter() -> str | None:
    """The Python that mlx-lm is installed for: ours, or the one whose ``mlx_lm.server`` is on the path."""
    if importlib.util.find_spec("mlx_lm") is not None:
        return sys.executable
    program = shutil.which("mlx_lm.server")
    return None if program is None else Path(program).read_text().splitlines()[0].removeprefix("#!").strip()


needs_mlx = pytest.mark.skipif(interpreter() is None, reason="mlx-lm is not installed: pip install 'bitladder[mlx]'")


def _run(script: str, *arguments: object) -> str:
    command = [interpreter() or "", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def logits(folder: Path, tokens: np.ndarray, scratch: Path) -> np.ndarray:
    """What mlx-lm predicts, f32[windows, n, vocabulary]."""
    np.save(scratch / "tokens.npy", tokens)
    shown = _run(_LOGITS, folder, scratch / "tokens.npy", scratch / "logits.npy")
    assert json.loads(shown.splitlines()[-1]) == json.loads((folder / "config.json").read_text())["quantization"]
    return np.load(scratch / "logits.npy")


def dequantized(file: Path, prefix: str, group: int, bits: int, mode: str, scratch: Path) -> np.ndarray:
    """A matrix as MLX decodes it, f32."""
    _run(_DEQUANTIZED, file, prefix, group, bits, mode, scratch / "matrix.npy")
    return np.load(scratch / "matrix.npy")
