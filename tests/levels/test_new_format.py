"""A checkpoint format that is one class and its registration: planned, written, read back and verified by code that has
never heard of it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import tiny_models
from bitladder import levels
from bitladder.errors import OutputError, UnknownLevel, UsageError
from bitladder.files.gguf import GgufFile
from bitladder.kernels.grid import Grid, contiguous_groups
from bitladder.levels import CheckpointLevel, Container, Needs, checkpoints, parse_level
from bitladder.levels.checkpoints import CheckpointFormat
from bitladder.levels.methods import AWQ, GPTQ, ROUNDING
from bitladder.plan.cost import checkpoint_levels, level_size
from bitladder.progress import silent
from bitladder.stages.plan import PlanRequest, plan_model
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.weights import FileWeights
from tiny_checkpoints import decoded, difference, loaded, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""What a float of 4 bits (E2M1) can hold: no grid of integers."""


@dataclass(frozen=True)
class Scales:
    scales: np.ndarray
    columns: int

    def grid(self):
        groups = contiguous_groups(self.columns, 16)
        return Grid(self.scales, np.zeros_like(self.scales), groups, 0, len(STEPS) - 1, STEPS)

    def nearest(self, weights):
        return self.grid().nearest(weights)

    def rows(self, rows):
        return replace(self, scales=self.scales[rows])

    def decode(self, codes):
        return self.grid().values(codes)


def doubled(x):
    return 2 * x


@dataclass(frozen=True)
class Toy(CheckpointFormat):
    """Floats of 4 bits, a byte each, 16 to a scale in the model's float type; inputs are doubled at run time."""

    prefixes = ("TOY",)
    grammar = "TOY-E2M1[-gptq|-awq]"
    layout = "toy"
    engines = ("toy-engine",)
    suffixes = ("nibbles", "nibble_scale")
    model_dtype = frozenset({"nibble_scale"})
    rounds_inputs = property(lambda self: doubled)
    group_size = 16
    bpw = 8 + 16 / 16
    stand_in = "Q8_0"

    @classmethod
    def parse(cls, name):
        match = re.fullmatch("TOY-E2M1(-GPTQ|-AWQ)?", name.upper())
        if match is None:
            return None
        label = f"TOY-E2M1{(match[1] or '').lower()}"
        return CheckpointLevel(label, cls(), {None: ROUNDING, "-GPTQ": GPTQ, "-AWQ": AWQ}[match[1]])

    @classmethod
    def offers(cls, rows):
        return ("TOY-E2M1",) if all(row % 16 == 0 for row in rows) else ()

    def stored_bytes(self, outputs, inputs):
        return outputs * inputs + 2 * outputs * inputs // 16

    def check_shapes(self, level: str, shapes: Mapping[str, tuple[int, int]]):
        for name, (_, inputs) in shapes.items():
            if inputs % 16:
                raise UsageError(f"{level}: {name} does not divide by 16.", do="Ask for another level.")

    def search(self, weights, importance, *, scale_dtype="float16", quick=False):
        largest = np.abs(weights.reshape(len(weights), -1, 16)).max(axis=2)
        scales = torch.from_numpy(largest / 6).to(getattr(torch, scale_dtype)).float().numpy()
        return Scales(scales, weights.shape[1])

    def encode(self, codes, parameters):
        return {"nibbles": codes.astype(np.uint8), "nibble_scale": parameters.scales}

    def shape(self, arrays):
        return arrays["nibbles"].shape

    def decode(self, arrays):
        codes, scales = arrays["nibbles"], arrays["nibble_scale"].astype(np.float32)
        return STEPS[codes] * scales[:, contiguous_groups(codes.shape[1], 16)]

    def configuration(self, *, ignored):
        return {"quant_method": "toy", "skip": list(ignored)}

    def files(self, configuration):
        return {"toy.json": json.dumps(configuration).encode()}

    def notes(self):
        return ("Only a toy reads this.",)

    def slow_paths(self, engine):
        return [f"{engine} plays slowly"]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMATS", (*checkpoints.FORMATS, Toy))


def in_bfloat16(folder: Path) -> tuple[torch.nn.Module, Path, Path]:
    """A tiny model whose checkpoint is in bfloat16."""
    model, checkpoint, _ = tiny("llama", folder)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    return model.float(), checkpoint, tiny_models.write(tiny_models.CASES["llama"], model, folder / "source.gguf")


def test_a_format_is_a_class_and_its_registration(registered, tmp_path):
    model, checkpoint, gguf = in_bfloat16(tmp_path)
    names = ["TOY-E2M1", "TOY-E2M1-gptq", "TOY-E2M1-awq"]
    reports = run(gguf, names, tmp_path / "out", checkpoint)
    losses, apart = {}, {}
    for name, report in zip(names, reports, strict=True):
        folder, level = tmp_path / "out" / f"tiny-{name}", parse_level(name.lower())
        assert (level.name, level.container, level.engines) == (name, Container.FOLDER, ("toy-engine",))
        assert level.slow_paths("it", has_gpu=False, cpu_features=()) == ["it plays slowly"]
        assert (report.level, report.bpw, report.notes) == (name, 9.0, ("Only a toy reads this.",))
        losses[name] = np.array([loss.loss for loss in report.linears])
        with GgufFile.open(gguf) as source, safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            assert level_size(source.model, level).tensor_bytes == written
            assert level in checkpoint_levels(source.model) or level.needs is Needs.CALIBRATION
            weights = CheckpointWeights(FileWeights(source), folder, level.format)
            assert weights.qtype("blk.0.attn_q.weight") is doubled
            assert weights("blk.0.ffn_down.weight").shape == (64, 96)
        assert tensors["model.layers.0.mlp.down_proj.nibble_scale"].dtype == torch.bfloat16
        assert json.loads((folder / "toy.json").read_text()) == {"quant_method": "toy", "skip": ["lm_head"]}
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "toy"
        found = loaded(folder, decoded(folder, name), tmp_path / "plain" / name)
        apart[name] = difference(model, found)
    assert 0.01 < apart["TOY-E2M1-gptq"] < apart["TOY-E2M1"] < 0.7  # random weights feel four bits; of others it is 2
    assert losses["TOY-E2M1-gptq"].mean() < 0.9 * losses["TOY-E2M1-awq"].mean()  # feedback works on any grid
    assert np.isfinite(losses["TOY-E2M1"]).all()  # the Gram matrices of AWQ were there


def test_its_files_are_verified_like_all(registered, tmp_path):
    _, checkpoint, gguf = in_bfloat16(tmp_path)
    run(gguf, ["TOY-E2M1"], tmp_path, checkpoint)
    shard = tmp_path / "tiny-TOY-E2M1" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(OutputError, match="does not decode to what was computed"):
        run(gguf, ["TOY-E2M1"], tmp_path, checkpoint)


def test_its_names_and_refusals_are_its_own(registered, tmp_path):
    for name in ("TOY", "TOY-E9M9", "INT8-W4A4", "nonsense"):
        with pytest.raises(UnknownLevel, match=r"TOY-E2M1\[-gptq\|-awq\]"):
            parse_level(name)
    case = tiny_models.CASES["llama"]
    odd = tiny_models.write(case, tiny_models.make(case, intermediate_size=100), tmp_path / "odd.gguf")
    with GgufFile.open(odd) as source, pytest.raises(UsageError, match=r"TOY-E2M1: .*ffn_down.* does not divide by 16"):
        level_size(source.model, parse_level("TOY-E2M1"))


@pytest.mark.parametrize(
    ("name", "others"), [("TOY-E2M1", "toy-engine"), ("GPTQ-4bit-g32-asym", "tgi or transformers")]
)
def test_an_engine_that_does_not_serve_a_level_is_not_launched_with_it(registered, name, others, tmp_path):
    case = tiny_models.CASES["llama"]
    source = tiny_models.write(case, tiny_models.make(case), tmp_path / "source.gguf")
    request = PlanRequest(64, machine="8 GiB")
    assert "vllm serve" in planned(source, request, "GPTQ-4bit-g32").command
    with pytest.raises(UsageError, match=f"vllm does not serve {name}(.|\n)*run it in {others}"):
        planned(source, request, name)


def planned(source: Path, request: PlanRequest, name: str):
    return plan_model(str(source), request, levels=[parse_level(name)], engine="vllm", progress=silent).launch


def test_without_registration_the_name_is_unknown():
    with pytest.raises(UnknownLevel):
        parse_level("TOY-E2M1")


def test_nothing_else_knows_formats_by_name():
    """Neither layouts nor suffixes of any format, nor comparisons of methods, stand outside of its file; what reads
    anybody's checkpoints, whatever wrote them, knows the arrays of all."""
    source = Path(levels.__file__).parents[1]
    readers = {source / own for own in ("levels/stored.py", "levels/converter_formats.py", "describe/estimate.py")}
    suffixes = {suffix for form in checkpoints.FORMATS for suffix in getattr(form, "suffixes", ())} - {
        "weight",
        "scales",
    }
    words = suffixes | {"gptq_v2", "pack-quantized", "int-quantized"}
    branch = re.compile(
        "|".join(f"[\"']{re.escape(word)}[\"']" for word in words)
        + r"|\.(method|layout|format)(\.name|\.layout)? *(==|!=|in |not in )"
    )
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        if path.parent != source / "levels" / "checkpoints" and path not in readers
        for line in path.read_text().splitlines()
        if branch.search(line)
    ]
    assert not found
