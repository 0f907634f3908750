"""DWQ as mlx-lm 0.32.2 does it (mlx_lm/quant/dwq.py), computed by torch: the peer of MLX levels where mlx has no fast
products, as on a CPU, where a window of 512 tokens takes it more than a minute.

    PEER/bin/python benchmarks/mlx_peer.py convert DIR PLAIN
    .venv/bin/python benchmarks/mlx_dwq.py DIR PLAIN OUT [--windows 16] [--rate 1e-5] [--seconds 300] [--threads 1]

Scales and biases of every group, of embedding and head too, are trained so that the quantized model's predictions have
the float model's at temperature 2: KL divergence, mean over tokens, Adam with bias correction, one window a step in the
calibration text's order, values in float32 and products in bfloat16. Codes stay. mlx-lm takes 512 steps of four
sequences at a rate of 1e-6 by default; here as many steps as the time allows, at a rate that makes up for fewer of
them. Prints the loss as it goes.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bitladder.kernels.packing import unpack

_TEMPERATURE = 2.0


class Groups(nn.Module):
    """A matrix of codes in groups, as a linear layer."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, group: int) -> None:
        super().__init__()
        inputs = scales.shape[1] * group
        bits = weight.shape[1] * 32 // inputs
        codes = unpack(np.ascontiguousarray(weight.numpy()).view(np.int32), bits, inputs)
        self.codes = torch.from_numpy(codes.astype(np.uint8)).view(len(codes), -1, group)
        self.scales, self.biases = (nn.Parameter(one.float()) for one in (scales, biases))

    def rows(self, at: Any = slice(None)) -> torch.Tensor:
        """Some rows of the matrix."""
        codes = self.codes[at].to(self.scales.dtype)
        return torch.addcmul(self.biases[at].unsqueeze(-1), codes, self.scales[at].unsqueeze(-1)).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As a linear layer."""
        return functional.linear(x, self.rows())


class Table(nn.Module):
    """The same matrix as an embedding."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As an embedding."""
        return self.groups.rows(ids)


def student_of(model: Any, tensors: dict[str, torch.Tensor], group: int) -> dict[str, Groups]:
    """Put the quantized matrices in the place of the model's; returns them by name."""
    made: dict[str, Groups] = {}
    for name in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        weight, scales, biases = (tensors[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        made[name] = Groups(weight, scales, biases, group)
        owner, _, leaf = name.rpartition(".")
        if name == "model.embed_tokens":
            model.model.embed_tokens = Table(made[name])
        else:
            setattr(model.get_submodule(owner), leaf, made[name])
    if "lm_head" not in made:
        model.lm_head = made["model.embed_tokens"]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("prepared", "plain", "out"):
        parser.add_argument(name, type=Path)
    for name, default in (("--windows", 16), ("--group", 64), ("--seconds", 300), ("--threads", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    tokens = torch.from_numpy(np.load(options.prepared / "tokens.npy")[: options.windows].astype(np.int64))
    teacher: Any = AutoModelForCausalLM.from_pretrained(options.prepared / "float", dtype=torch.bfloat16)
    teacher.eval()
    student: Any = AutoModelForCausalLM.from_pretrained(options.prepared / "float", dtype=torch.float32)
    tensors = load_file(options.plain / "model.safetensors")
    made = student_of(student, tensors, options.group)
    student.requires_grad_(False)
    trained = [one for groups in made.values() for one in (groups.scales, groups.biases)]
    for one in trained:
        one.requires_grad_(True)
    adam = torch.optim.Adam(trained, lr=options.rate)
    targets: dict[int, torch.Tensor] = {}
    losses: list[float] = []
    while time.monotonic() - started < options.seconds:
        at = len(losses) % len(tokens)
        window = tokens[at : at + 1]
        if at not in targets:
            with torch.no_grad():
                targets[at] = teacher(window).logits[0].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(window).logits[0]
        wanted = (targets[at].float() / _TEMPERATURE).log_softmax(-1)
        own = (logits.float() / _TEMPERATURE).log_softmax(-1)
        loss = functional.kl_div(own, wanted, log_target=True, reduction="sum") / len(own)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        losses.append(float(loss.detach()))
        if len(losses) % len(tokens) == 0:
            print(f"{len(losses)} steps, mean loss {np.mean(losses[-len(tokens) :]):.4f}", flush=True)
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(options.plain, options.out)
    for name, groups in made.items():
        for leaf, value in (("scales", groups.scales), ("biases", groups.biases)):
            tensors[f"{name}.{leaf}"] = value.detach().to(tensors[f"{name}.{leaf}"].dtype)
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "mlx"})
    print(f"dwq: {len(losses)} steps in {time.monotonic() - started:.0f} s, {time.process_time():.0f} CPU s")


if __name__ == "__main__":
    main()
