"""Checkpoints of families without a row that are stored quantized are walked as the floats that they stand for."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import packed_checkpoints as packed
import tiny_families
from bitladder.errors import BitladderError
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.convert import ORIGIN
from bitladder.files.decoded import decoding_of, write_decoded
from bitladder.files.gguf import GgufFile
from bitladder.files.staging import stage_checkpoint
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.levels.checkpoints.converter_formats import ReadAs
from bitladder.stages.fidelity import folder_candidate, made_candidates, walk
from bitladder.walk.checkpoint_walk import Settings
from bitladder.walk.opened import layered
from bitladder.walk.weights import FileWeights
from converted_by_llama import convert_all
from tiny_checkpoints import run, windows_of
from walked import assert_close, logits_of, some_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
LEVEL = "GPTQ-4bit-g32"


def fp8(block: tuple[int, int]):
    return lambda _, weights: packed.fp8(weights, block)


SOURCES = {
    # by format: the family, quantization_config, what makes the arrays of a matrix
    "FP8 in blocks": (
        "deepseek3",
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]},
        fp8((32, 32)),
    ),
    "FP8 by tensor": (
        "mistral3 that sees",
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8((1 << 20, 1 << 20)),
    ),
    "GPTQ": (
        "granite",
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
        lambda _, weights: packed.gptq(weights),
    ),
    "AWQ": (
        "exaone4",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        lambda _, weights: packed.awq(weights),
    ),
    "packed integers of experts": (
        "glm4 moe",
        packed.groups({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, layout="pack-quantized"),
        lambda _, weights: packed.packed(weights, 4, 32),
    ),
    "MXFP4 in stacks": ("gpt-oss", {"quant_method": "mxfp4"}, None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By format: transformers' model of what the codes mean, the quantized checkpoint, the file made of it."""
    root = tmp_path_factory.mktemp("packed")
    sources = tiny_families.write_all(root / "plain", [family for family, *_ in SOURCES.values()])
    found, jobs = {}, {}
    for format_, (family, configuration, make) in SOURCES.items():
        model, plain, _ = sources[family]
        folder = root / format_.replace(" ", "-")
        if make is None:
            truth = pack_stacks(plain, folder, configuration)
        else:
            truth = packed.repack(plain, folder, configuration, make)
        gguf = root / f"{folder.name}-converted" / "model.gguf"
        gguf.parent.mkdir()
        (gguf.parent / ORIGIN).write_text(str(folder.resolve()))
        jobs[staged(folder, root / f"{folder.name}-stage")] = gguf
        found[format_] = with_values(model, truth), folder, gguf
    assert convert_all(jobs) == {}
    return found


def staged(folder: Path, stage: Path) -> Path:
    """What the converter is given."""
    checkpoint = read_checkpoint(folder)
    decoding = decoding_of(checkpoint)
    if decoding.by_converter is not ReadAs.FLOATS:
        return folder
    stage_checkpoint(write_decoded(checkpoint, decoding, stage / "twin"), stage / "staged", decoded=True)
    return stage / "staged"


def with_values(model: torch.nn.Module, truth: dict[str, np.ndarray]) -> torch.nn.Module:
    """The model with some values of its checkpoint replaced."""
    import tempfile

    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        assert truth and set(truth) <= set(tensors)
        save_file(tensors | {name: torch.from_numpy(value) for name, value in truth.items()}, path, {"format": "pt"})
        sees = hasattr(model.config, "vision_config")
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
        return kind.from_pretrained(folder, **options).eval()


def pack_stacks(plain: Path, folder: Path, configuration: dict) -> dict[str, np.ndarray]:
    """As gpt-oss is published."""
    packed.repack(plain, folder, configuration, lambda _, weights: ({"weight": torch.from_numpy(weights)}, weights))
    stored, truth = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = value
            continue
        experts = [packed.mxfp4(np.ascontiguousarray(expert.T)) for expert in value.numpy()]
        codes = torch.stack([arrays["weight_packed"] for arrays, _ in experts])
        stored[f"{name}_blocks"] = codes.reshape(*codes.shape[:2], -1, 16)
        stored[f"{name}_scales"] = torch.stack([arrays["weight_scale"] for arrays, _ in experts])
        truth[name] = np.ascontiguousarray(np.stack([means.T for _, means in experts]))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return truth


@pytest.mark.parametrize("format_", SOURCES)
def test_logits_are_those_of_what_the_codes_mean(format_, made):
    model, _, gguf = made[format_]
    with GgufFile.open(gguf) as source, torch.no_grad():
        weights = FileWeights(source)
        found = logits_of(layered(source, weights), weights, some_tokens())
        wanted = model(input_ids=torch.from_numpy(some_tokens())).logits
    assert_close(found, wanted)


@pytest.mark.parametrize("format_", ["FP8 in blocks", "MXFP4 in stacks", "GPTQ"])
def test_levels_are_made_of_what_the_codes_mean(format_, made, tmp_path):
    """Nothing of the source's own quantization is left in the folder, and it is close to the source."""
    _, checkpoint, gguf = made[format_]
    settings = Settings(half=False)
    with GgufFile.open(gguf) as source:
        (written,) = run(gguf, [LEVEL], tmp_path, checkpoint, windows=windows_of(1, 24), settings=settings)
        candidate = folder_candidate(source, Path(written.path), parse_checkpoint(LEVEL).format)
        found, rounded = walk(source, [candidate, *made_candidates(source, ["Q4_0"])], windows_of(2, 4))
    assert 0 < found.kl_mean < rounded.kl_mean
    names = set(load_file(Path(written.path) / "model.safetensors"))
    assert not [name for name in names if name.endswith(("_scale_inv", "_blocks", "_scales"))]
    config = json.loads((Path(written.path) / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize("end", ["_scales", "_blocks"])
def test_stacks_that_contradict_themselves_are_refused(end, made, tmp_path):
    _, checkpoint, _ = made["MXFP4 in stacks"]
    spoilt = tmp_path / "spoilt"
    packed.repack(checkpoint, spoilt, None, lambda _, weights: ({"weight": torch.from_numpy(weights)}, weights))
    tensors = load_file(spoilt / "model.safetensors")
    name = next(name for name in tensors if name.endswith(end))
    for value in (tensors[name][..., :1].contiguous(), tensors[name][:, :0].contiguous()):
        save_file({**copy.copy(tensors), name: value}, spoilt / "model.safetensors", {"format": "pt"})
        with pytest.raises(BitladderError):
            decoding_of(read_checkpoint(spoilt))
