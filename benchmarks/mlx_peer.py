"""The peer of MLX levels: mlx-lm's own quantizers, on the same weights (and, where they read any, the same tokens).

    .venv/bin/python benchmarks/checkpoint_levels.py --model MODEL.gguf --calibrate valid.txt --prepare DIR
    PEER/bin/python benchmarks/mlx_peer.py convert DIR OUT [--bits 4] [--group 64] [--mode affine]
    PEER/bin/python benchmarks/mlx_peer.py dwq DIR OUT [--windows 8] [--steps 64]
    .venv/bin/python benchmarks/checkpoint_levels.py --model MODEL.gguf --calibrate valid.txt --text test.txt
        --out LEVELS --levels MLX-4bit-g64 --calibration-windows 8 --peer mlx=MLX-4bit-g64=OUT
        --against MLX-4bit-g64=mlx

PEER is an environment of its own: ``pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2``. ``convert`` is
`mlx_lm.convert -q`, which rounds each group between its least and largest weight. ``dwq`` goes on from there with
mlx-lm's own distillation of scales and biases, over the calibration windows instead of its data set. Both quantize
embedding and head, so the bytes are the same. Prints seconds, CPU seconds and peak memory.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np


def readable(prepared: Path) -> Path:
    """The float checkpoint as mlx-lm reads it: its models look for the base of positions in a key of its own, where
    transformers from 5 on has ``rope_parameters``, and would rotate, and distil, by their default base."""
    folder = prepared / "float-mlx"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in (prepared / "float").iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    own = {"rope_theta": config["rope_parameters"]["rope_theta"]} if "rope_parameters" in config else {}
    (folder / "config.json").write_text(json.dumps(config | own, indent=2))
    return folder


def convert(source: Path, out: Path, options: argparse.Namespace) -> None:
    from mlx_lm import convert as mlx_convert

    mlx_convert(
        str(source), str(out), quantize=True, q_bits=options.bits, q_group_size=options.group, q_mode=options.mode
    )


def dwq(source: Path, out: Path, tokens: Any, options: argparse.Namespace) -> None:
    """mlx_lm.quant.dwq on these tokens, each window as often as the steps need; the last one only judges."""
    import mlx.core as mx
    from mlx import optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import load, save

    plain = out.with_name(out.name + "-plain")
    shutil.rmtree(plain, ignore_errors=True)
    convert(source, plain, options)
    teacher, _ = load(str(source))
    model, tokenizer, config = load(str(plain), return_config=True)
    windows = [(window.tolist(), 0) for window in tokens]
    train = [windows[number % (len(windows) - 1)] for number in range(options.steps)]
    dwq_quantize(
        model, lambda batch, *_, **__: teacher(batch), optimizers.Adam(options.rate, bias_correction=True),
        train, windows[-1:], batch_size=1, max_seq_length=tokens.shape[1], seed=0, dtype=mx.float16,
    )  # fmt: skip
    save(out, str(source), model, tokenizer, config)
    shutil.rmtree(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("convert", "dwq"))
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("--bits", 4), ("--group", 64), ("--windows", 8), ("--steps", 64)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-6, help="of Adam; mlx_lm.dwq's own")
    parser.add_argument("--mode", default="affine")
    options = parser.parse_args()
    started, cpu = time.monotonic(), time.process_time()
    source = readable(options.prepared)
    if options.method == "dwq":
        dwq(source, options.out, np.load(options.prepared / "tokens.npy")[: options.windows], options)
    else:
        convert(source, options.out, options)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{options.method}: {seconds:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
