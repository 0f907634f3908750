"""The peer of autoround_peer: AutoRound's GGUF export of the same model, fitted to the same tokens.

    .venv/bin/python benchmarks/checkpoint_levels.py --model MODEL.gguf --calibrate valid.txt --prepare DIR
    PEER/bin/python benchmarks/autoround_export.py DIR OUT [--type q4_k_m] [--iters 0] [--windows 24] [--layers N]

``--prepare`` leaves the model as a float checkpoint and the calibration tokens, whole windows of 512. The peer lives
in an environment of its own:

    python -m venv autoround && . autoround/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sentencepiece==0.2.3 auto-round==0.16.1

Settings are its own defaults except the rounds of tuning (200 there), the batch and the tokens; 0 rounds is its
rounding to nearest with scales searched under an importance matrix. With ``--layers N`` only N layers, spread evenly,
are tuned, as rounds take minutes a layer; what the file holds of the others is rounded and not to be compared
(``autoround_peer --layers N`` does not). Prints seconds of the export.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_k_m", help="as AutoRound calls it: q4_k_m, q3_k_m, q2_k_s, q2_k_mixed")
    for name, default in (("--iters", 0), ("--windows", 24), ("--batch", 8), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--layers", type=int, default=0, help="tune only so many; 0: all")
    options = parser.parse_args()
    import gguf  # noqa: F401 - AutoRound looks for these two only after all layers are quantized
    import sentencepiece  # noqa: F401
    from auto_round import AutoRound

    torch.set_num_threads(options.threads)
    tokens = torch.from_numpy(np.load(options.prepared / "tokens.npy")[: options.windows])
    parts = torch.split(tokens, options.batch)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]
    some: dict[str, object] = {}
    if options.layers:
        count = json.loads((options.prepared / "float/config.json").read_text())["num_hidden_layers"]
        chosen = set(np.linspace(0, count - 1, options.layers).astype(int).tolist())
        # a list of lists: a flat one ends in an error
        some["to_quant_block_names"] = [[f"model.layers.{layer}"] for layer in sorted(chosen)]
        some["ignore_layers"] = ",".join(f"model.layers.{layer}" for layer in range(count) if layer not in chosen)
    started = time.monotonic()
    made = AutoRound(
        str(options.prepared / "float"), scheme=f"gguf:{options.type}", iters=options.iters, dataset=batches,
        nsamples=len(tokens), seqlen=tokens.shape[1], batch_size=options.batch, device_map="cpu",
        **some,
    )  # fmt: skip
    made.quantize_and_save(output_dir=str(options.out), format=f"gguf:{options.type}")
    print(f"\n{options.type}, {options.iters} rounds, {len(tokens)} windows: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
