"""The peers of checkpoint_levels: GPTQModel's, llm-compressor's and AutoRound's levels, on the same weights and tokens.

    .venv/bin/python benchmarks/checkpoint_levels.py --model MODEL.gguf --calibrate valid.txt --prepare DIR
    PEER/bin/python benchmarks/checkpoint_peer.py gptqmodel DIR OUT [--bits 4] [--group 64] [--windows 64]
    PEER/bin/python benchmarks/checkpoint_peer.py llmcompressor-{gptq,awq,w8a8,w8a8-smooth} DIR OUT [...]
    PEER/bin/python benchmarks/checkpoint_peer.py llmcompressor-[gptq-]SCHEME DIR OUT   (FP8_DYNAMIC, NVFP4A16, ...)
    PEER/bin/python benchmarks/checkpoint_peer.py autoround-SCHEME DIR OUT [--steps 200]    (NVFP4, MXFP4, W4A16, ...)

``--prepare`` leaves the model as a float checkpoint and the calibration tokens, whole windows of 512. Each peer
lives in an environment of its own:

    python -m venv gptqmodel && . gptqmodel/bin/activate
    pip install torch==2.13.0 threadpoolctl protobuf pillow pypcre tokenicer logbar jinja2 ninja datasets dill \\
        torchao defuser device-smi requests accelerate transformers==5.23.0 'setuptools>=84.2.1'
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0

    python -m venv llmcompressor && . llmcompressor/bin/activate
    pip install 'torch<=2.14' 'transformers<=5.17' llmcompressor==0.14.0.1

    python -m venv autoround && . autoround/bin/activate
    pip install 'torch<=2.14' 'transformers<=5.17' auto-round compressed-tensors==0.19.0

Settings are each tool's own defaults except bits, group size and windows: GPTQModel damps by 0.05 and orders
columns within groups, llm-compressor damps by 0.01 and leaves them in order; its AWQ has zero points and searches
over 20 exponents; its W8A8 is its preset of that name, its SmoothQuant has the strength 0.8 of its own recipes. A
SCHEME is a preset of llm-compressor's, or one of AutoRound's, tuned for so many steps a block (its default is 200) for
inputs that stay as they are; its folder lies within OUT.
Prints seconds, CPU seconds and peak memory of the quantization with saving.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader asks for two however many cores there are

import numpy as np
import torch

METHODS = ("gptqmodel", *(f"llmcompressor-{method}" for method in ("gptq", "awq", "w8a8", "w8a8-smooth")))
PRESETS = ("llmcompressor-", "autoround-")


def gptqmodel(source: Path, out: Path, tokens: Any, bits: int, group: int) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(bits=bits, group_size=group))
    samples = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in tokens]
    model.quantize(samples, batch_size=1)
    model.save(str(out))


def llmcompressor_recipe(method: str, bits: int, group: int) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if method.startswith("w8a8"):
        rounding = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [SmoothQuantModifier(smoothing_strength=0.8), rounding] if "smooth" in method else [rounding]
    if method.startswith("gptq-"):
        return [GPTQModifier(targets="Linear", scheme=method.removeprefix("gptq-"), ignore=["lm_head"])]
    if method not in ("awq", "gptq"):
        return [QuantizationModifier(targets="Linear", scheme=method, ignore=["lm_head"])]
    awq = method == "awq"
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=not awq, strategy="group", group_size=group)
    scheme = {"group": QuantizationScheme(targets=["Linear"], weights=weights)}
    made = (AWQModifier if awq else GPTQModifier)(config_groups=scheme, ignore=["lm_head"])
    return made if isinstance(made, list) else [made]  # AWQ comes as a search and a rounding


def llmcompressor(source: Path, out: Path, tokens: Any, recipe: list[Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    # a CPU build of torch has nothing to pin memory for
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=tokens.shape[1], num_calibration_samples=len(data))
    model.to(torch.float16).save_pretrained(out, save_compressed=True)


def autoround(source: Path, out: Path, tokens: Any, scheme: str, steps: int) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tuner = AutoRound(
        model, AutoTokenizer.from_pretrained(source), scheme=scheme, act_bits=16, iters=steps, nsamples=len(tokens),
        seqlen=tokens.shape[1], batch_size=4, dataset=[torch.from_numpy(row.astype(np.int64))[None] for row in tokens],
        enable_torch_compile=False, low_gpu_mem_usage=False, device_map="cpu",
    )  # fmt: skip
    tuner.quantize_and_save(str(out), format="llm_compressor" if "FP" in scheme else "auto_gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help=f"one of {', '.join(METHODS)}, or {'SCHEME or '.join(PRESETS)}SCHEME")
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("--bits", 4), ("--group", 64), ("--windows", 64), ("--threads", 1), ("--steps", 200)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    if not options.method.startswith((*METHODS, *PRESETS)):
        parser.error(f"{options.method!r} is none of these methods")
    torch.set_num_threads(options.threads)
    tokens = np.load(options.prepared / "tokens.npy")[: options.windows]
    source = options.prepared / "float"
    started, cpu = time.monotonic(), time.process_time()
    if options.method == "gptqmodel":
        gptqmodel(source, options.out, tokens, options.bits, options.group)
    elif options.method.startswith("autoround-"):
        autoround(source, options.out, tokens, options.method.removeprefix("autoround-"), options.steps)
    else:
        recipe = llmcompressor_recipe(options.method.removeprefix("llmcompressor-"), options.bits, options.group)
        llmcompressor(source, options.out, tokens, recipe)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{options.method}, {len(tokens)} windows: {seconds:.0f} s, {cpu:.0f} CPU s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
