"""Checkpoint levels of tiny models: written, and read back as a plain transformers model."""

import copy
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny_models
from bitladder.describe.windows import Window
from bitladder.files.checkpoint_check import decoded_linears
from bitladder.files.gguf import GgufFile
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.progress import Progress, silent
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.walk.checkpoint_walk import Settings


def windows_of(seed: int, count: int = 40, n: int = 64) -> list[Window]:
    """Random tokens, four windows to a document."""
    rng = np.random.default_rng(seed)
    return [Window(f"text {at // 4}", rng.integers(0, tiny_models.N_VOCAB, n)) for at in range(count)]


def tiny(name: str, folder: Path, **sizes: int) -> tuple[torch.nn.Module, Path, Path]:
    """A tiny model, its checkpoint folder and its GGUF."""
    case = tiny_models.CASES[name]
    model = tiny_models.make(case, **sizes)
    checkpoint = folder / "source"
    model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    return model, checkpoint, tiny_models.write(case, model, folder / "source.gguf")


def run(
    gguf: Path,
    levels: list[str],
    out: Path,
    checkpoint: Path | None,
    *,
    windows: Sequence[Window] | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
    **reading,
) -> list:
    """The levels of a tiny model, as checkpoint folders in ``out``."""
    text = Reading(windows_of(1) if windows is None else windows, **reading)
    wanted = [parse_checkpoint(level) for level in levels]
    with GgufFile.open(gguf) as source:
        job = Calibration(source, wanted, text, out_dir=out, name="tiny", checkpoint=checkpoint, settings=settings)
        return job.run(progress).checkpoints


def loaded(folder: Path, weights: dict[str, np.ndarray], scratch: Path) -> torch.nn.Module:
    """A plain transformers model of decoded weights."""
    scratch.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (scratch / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(
        scratch,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    return model.eval()


def decoded(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Weights of a checkpoint level as its reader decodes them, by tensor name; what is not quantized as it is."""
    level = parse_checkpoint(name)
    weights = {f"{linear}.weight": value for linear, value in decoded_linears(folder, level)}
    quantized = {linear.removesuffix(".weight") for linear in weights}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(".bias") or key.rpartition(".")[0] not in quantized:
                weights[key] = file.get_tensor(key).float().numpy()
    return weights


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Error of the logits as a share of their energy, on text that calibration did not see, with ``model``'s choice of
    experts."""
    tokens = torch.from_numpy(np.stack([window.tokens for window in windows_of(2, count=4)]))
    with torch.no_grad(), experts_chosen_by(model, other):
        reference, found = model(tokens).logits, other(tokens).logits
    reference = reference - reference.mean(-1, keepdim=True)
    return float((found - found.mean(-1, keepdim=True) - reference).square().sum() / reference.square().sum())


@contextmanager
def experts_chosen_by(model: torch.nn.Module, other: torch.nn.Module) -> Iterator[None]:
    """Inside it ``other``, called after ``model``, sends each token to the experts that ``model`` chose, weighed by its
    own routers.

    The choice jumps: where two experts are nearly level the least rounding, of weights or of the processor's sums,
    swaps them, and what follows is another computation. Over random weights that is half of all error, and which tokens
    it falls on differs between processors. With the same experts outputs follow weights continuously.
    """
    chosen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: tuple, output: tuple) -> None:
        chosen.append(output[2])

    def choose(router: torch.nn.Module, _inputs: tuple, output: tuple) -> tuple:
        logits, experts = output[0], chosen.pop(0)
        weights = logits.softmax(-1).gather(1, experts)
        if getattr(router, "norm_topk_prob", True):  # Mixtral always does
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    hooks = [router.register_forward_hook(keep) for router in _routers(model)]
    hooks += [router.register_forward_hook(choose) for router in _routers(other)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not chosen


def _routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def cost_of_eight_bits(model: torch.nn.Module, draws: int = 4) -> float:
    """``difference`` that errors of eight bits make: in each matrix of the layers, independent ones, evenly spread over
    a step of its row's grid, which has its largest weight at 127. Mean of some draws, which differ by 5 to 20%."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(draws):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in other.model.layers.named_parameters():
                if weight.ndim > 1 and "gate.weight" not in name:  # routers, and gates of shared experts, stay float
                    step = weight.abs().amax(-1, keepdim=True) / 127
                    weight.add_(step * (torch.rand(weight.shape, generator=generator) - 0.5))
        differences.append(difference(model, other))
    return float(np.mean(differences))


@functools.cache
def _vocabulary(path: Path) -> dict[str, list]:
    """Reading a hundred thousand strings takes seconds."""
    fields = gguf.GGUFReader(path).fields
    return {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")}


def write_tokenizer(folder, demo_gguf):
    """SmolLM2's tokenizer as its checkpoint has it, from the tokens and merges in the demo's GGUF."""
    get = _vocabulary(demo_gguf)
    special = [token for token, kind in zip(get["tokens"], get["token_type"], strict=True) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": get["tokens"].index(token), "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(get["tokens"])},
            "merges": [merge.split(" ", 1) for merge in get["merges"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": special[1], "eos_token": special[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(get["tokens"])
