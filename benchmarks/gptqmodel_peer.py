"""The peer of checkpoint_levels: GPTQModel's GPTQ on the same weights and tokens. Runs in an environment of
its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 threadpoolctl protobuf pillow pypcre tokenicer
    logbar jinja2 ninja \\
        datasets dill torchao defuser device-smi requests accelerate transformers==5.23.0 gguf setuptools
    peer/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    GPTQMODEL_CPU_WORKERS=2 peer/bin/python benchmarks/gptqmodel_peer.py MODEL.gguf wikitext2-valid.txt OUT
    [bits] [group] [windows]

The GGUF's weights are first written as a float checkpoint (OUT/float), which every peer reads; then
OUT/gptqmodel is made from windows of 512 tokens. Prints seconds and peak memory of the quantization alone.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def export(gguf: Path, folder: Path) -> None:
    """The GGUF's weights as a float checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    gguf, text, out = (Path(argument) for argument in sys.argv[1:4])
    bits, group, windows = (int(argument) for argument in (*sys.argv[4:], *("4", "64", "64")[len(sys.argv) - 4 :]))
    if not (out / "float" / "config.json").is_file():
        export(gguf, out / "float")
    tokenizer = AutoTokenizer.from_pretrained(out / "float")
    ids = tokenizer(text.read_text(encoding="utf-8")[: windows * 512 * 8])["input_ids"]
    samples = [{"input_ids": ids[at * 512 : (at + 1) * 512], "attention_mask": [1] * 512} for at in range(windows)]

    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(out / "float"), QuantizeConfig(bits=bits, group_size=group))
    started = time.monotonic()
    model.quantize(samples, batch_size=1)
    seconds = time.monotonic() - started
    model.save(str(out / "gptqmodel"))
    print(f"{seconds:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
