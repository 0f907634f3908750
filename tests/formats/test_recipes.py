"""Recipes against what llama.cpp really does: eight model shapes, twelve levels, every tensor."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from bitladder.errors import UnknownLevel
from bitladder.formats.blocks import QTYPES
from bitladder.formats.recipes import (
    FILE_TYPES,
    LEVEL_BY_FILE_TYPE,
    LEVELS,
    RECIPES,
    assign,
    fallback,
    is_quantizable,
    level_named,
)
from bitladder.formats.tensors import TensorInfo

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "llama-recipes.json").read_text())["models"]
PAIRS = [(model, level) for model, row in RECORDED.items() for level in row["levels"]]


@dataclass(frozen=True)
class Dims:
    architecture: str = "llama"
    n_layer: int = 32
    n_gqa: int = 1
    n_expert: int = 0


def shape_of(name: str, s: dict[str, int]) -> tuple[int, ...]:
    """The shape of a tensor in a family of plain transformers: L layers, D wide, F feed-forward, H heads, KV
    of them, V tokens.
    """
    kv = s["D"] // s["H"] * s["KV"]
    matrices = {
        "token_embd": (s["V"], s["D"]),
        "output": (s["V"], s["D"]),
        "attn_q": (s["D"], s["D"]),
        "attn_k": (kv, s["D"]),
        "attn_v": (kv, s["D"]),
        "attn_output": (s["D"], s["D"]),
        "ffn_gate": (s["F"], s["D"]),
        "ffn_up": (s["F"], s["D"]),
        "ffn_down": (s["D"], s["F"]),
    }
    part, suffix = name.split(".")[-2:]
    shape = matrices.get(part, (s["D"],))
    return shape if suffix == "weight" else shape[:1]


def unpacked(types: dict[str, str], layers: int) -> dict[str, str]:
    mix = {}
    for pattern, runs in types.items():
        flat = []
        for run in runs.split():
            qtype, _, count = run.partition("*")
            flat += [qtype.upper()] * int(count or 1)
        assert len(flat) == (layers if "*" in pattern else 1)
        mix |= {pattern.replace("*", str(layer)): qtype for layer, qtype in enumerate(flat)}
    return mix


@pytest.mark.parametrize(("model", "level"), PAIRS)
def test_every_tensor_and_the_total_size_match_llama_cpp(model, level):
    shape, recorded = RECORDED[model]["shape"], RECORDED[model]["levels"][level]
    wanted = unpacked(recorded["types"], shape["L"])
    tensors = []
    for name in wanted:
        size = shape_of(name, shape)
        tensors.append(TensorInfo(name, size, "F32" if len(size) == 1 else "F16"))
    dims = Dims(shape.get("arch", "llama"), shape["L"], shape["H"] // shape["KV"])
    assert assign(level, tensors, dims) == wanted
    mib = sum(QTYPES[wanted[tensor.name]].nbytes(tensor.shape) for tensor in tensors) / 2**20
    assert mib == pytest.approx(recorded["mib"], abs=0.0051)  # llama.cpp prints two decimals


def test_all_96_pairs_are_recorded():
    assert len(PAIRS) == 96


def layers(*parts: str, count: int = 32, shape: tuple[int, ...] = (512, 512)) -> list[TensorInfo]:
    return [TensorInfo(f"blk.{layer}.{part}.weight", shape, "F16") for layer in range(count) for part in parts]


def types(level: str, tensors: list[TensorInfo], dims: Dims, **more: bool) -> set[str]:
    return set(assign(level, tensors, dims, **more).values())


@pytest.mark.parametrize(
    ("level", "part", "dims", "wanted"),
    [
        # eight experts: small attention tensors are cheap beside the experts
        ("Q4_K_M", "attn_v", Dims(n_expert=8), {"Q8_0"}),
        ("Q4_K_M", "attn_k", Dims(n_expert=8), {"Q8_0"}),
        ("Q4_K_M", "attn_output", Dims(n_expert=8), {"Q5_K"}),
        ("Q3_K_L", "attn_output", Dims(n_expert=8), {"Q3_K"}),
        ("Q5_K_M", "attn_output", Dims(n_expert=8), {"Q5_K"}),
        ("Q4_K_M", "attn_k", Dims(n_expert=64), {"Q4_K"}),
        # Falcon
        ("Q4_K_S", "ffn_down", Dims("falcon"), {"Q4_K"}),
        ("Q3_K_L", "ffn_down", Dims("falcon"), {"Q4_K"}),
        ("Q3_K_L", "attn_output", Dims("falcon"), {"Q4_K"}),
        ("Q3_K_M", "attn_output", Dims("falcon"), {"Q3_K"}),
        ("Q4_K_M", "ffn_down", Dims("falcon"), {"Q6_K", "Q5_K", "Q4_K"}),
        ("Q3_K_M", "ffn_down", Dims("falcon"), {"Q5_K", "Q4_K", "Q3_K"}),
        # fused attention counts as attn_v
        ("Q3_K_L", "attn_qkv", Dims(), {"Q5_K"}),
        ("Q2_K", "attn_qkv", Dims(), {"Q3_K"}),
        ("Q2_K", "attn_kv_b", Dims(n_gqa=4), {"Q4_K"}),
        # grouped heads
        ("IQ4_XS", "attn_v", Dims(n_gqa=4), {"Q5_K"}),
        ("IQ4_XS", "attn_v", Dims(n_gqa=2), {"IQ4_XS"}),
        # 80 layers
        ("Q3_K_S", "attn_v", Dims(n_layer=80, n_gqa=8), {"Q5_K"}),
        ("Q3_K_S", "attn_v", Dims("gemma", n_layer=80, n_gqa=8), {"Q3_K"}),
        ("Q3_K_S", "attn_v", Dims(n_layer=80, n_gqa=1), {"Q3_K"}),
    ],
)
def test_special_cases(level, part, dims, wanted):
    assert types(level, layers(part, count=dims.n_layer), dims) == wanted


def test_falcon_and_blocks_that_do_not_divide_send_the_output_to_8_bits():
    output = [TensorInfo("output.weight", (1000, 512), "F16")]
    assert types("Q4_K_M", output, Dims()) == {"Q6_K"}
    assert types("Q4_K_M", output, Dims("falcon")) == {"Q8_0"}
    assert types("Q4_K_M", [TensorInfo("output.weight", (1000, 96), "F16")], Dims()) == {"Q8_0"}


def test_experts_are_counted_by_layer_not_by_tensor():
    """Two ffn_down tensors a layer: the first eighth of the layers is layers 0 to 3, not tensors 0 to 3."""
    tensors = layers("ffn_down_exps", "ffn_down_shexp")
    mix = assign("Q4_K_S", tensors, Dims(n_expert=64))
    promoted = {int(re.findall(r"\d+", name)[0]) for name, qtype in mix.items() if qtype == "Q5_K"}
    assert promoted == {0, 1, 2, 3}
    assert sum(qtype == "Q5_K" for qtype in mix.values()) == 8


def test_order_in_the_file_changes_nothing():
    tensors = layers("attn_v", "ffn_down")
    assert assign("Q4_K_M", tensors[::-1], Dims()) == assign("Q4_K_M", tensors, Dims())
    assert list(assign("Q4_K_M", tensors[::-1], Dims())) == [tensor.name for tensor in tensors[::-1]]


def test_an_importance_matrix_changes_early_ffn_down_of_old_types():
    assert types("Q4_0", layers("ffn_down"), Dims(), has_importance=True) == {"Q4_0", "Q4_1"}
    assert types("Q4_0", layers("ffn_down"), Dims()) == {"Q4_0"}
    assert types("IQ4_XS", layers("ffn_down"), Dims(), has_importance=True) == {"IQ4_XS"}
    assert types("IQ4_XS", layers("ffn_down"), Dims()) == {"IQ4_XS", "Q5_K"}


@pytest.mark.parametrize(
    ("name", "shape", "qtype", "quantizable"),
    [
        ("blk.0.attn_q.weight", (8, 8), "F16", True),
        ("blk.0.ffn_up_exps.weight", (4, 8, 8), "F16", True),
        ("blk.0.attn_q.bias", (8, 8), "F32", False),
        ("blk.0.attn_norm.weight", (8,), "F32", False),
        ("blk.0.some.weight", (1, 8), "F32", False),
        ("blk.0.attn_q_norm.weight", (8, 8), "F32", False),
        ("blk.0.ffn_gate_inp.weight", (8, 8), "F32", False),
        ("blk.0.ssm_conv1d.weight", (8, 8), "F32", False),
        ("position_embd.weight", (8, 8), "F32", False),
        ("token_types.weight", (8, 8), "F32", False),
        ("blk.0.lookup.weight", (8, 8), "I32", False),
        ("blk.0.attn_q.weight", (8, 256), "IQ4_XS", True),
    ],
)
def test_what_is_quantized_at_all(name, shape, qtype, quantizable):
    assert is_quantizable(TensorInfo(name, shape, qtype)) is quantizable


@pytest.mark.parametrize(
    ("qtype", "columns", "wanted"),
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"),
        ("Q3_K", 96, "Q4_0"),
        ("Q2_K", 96, "Q4_0"), ("IQ4_XS", 96, "IQ4_NL"), ("Q4_K", 100, "F16"), ("Q8_0", 100, "F16"),
        ("F16", 7, "F16"),
    ],
)  # fmt: skip
def test_fallbacks(qtype, columns, wanted):
    assert fallback(qtype, columns) == wanted


def test_tensors_left_alone_keep_their_type():
    tensors = [TensorInfo("output_norm.weight", (512,), "BF16"), *layers("attn_q", count=1)]
    assert assign("F16", tensors, Dims()) == {"output_norm.weight": "BF16", "blk.0.attn_q.weight": "F16"}


def test_ladder_and_numbers():
    assert LEVELS[0] == "F16" and LEVELS[-1] == "Q2_K"
    bits = [QTYPES[RECIPES[level].qtype].bpw for level in LEVELS]
    assert bits == sorted(bits, reverse=True)
    assert FILE_TYPES["Q4_K_M"] == 15 and FILE_TYPES["Q2_K"] == 10  # llama.h: LLAMA_FTYPE_MOSTLY_Q4_K_M, _Q2_K
    assert len(LEVEL_BY_FILE_TYPE) == len(RECIPES)


def test_file_types_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for level, number in FILE_TYPES.items():
        kind = gguf.LlamaFileType(number).name
        assert kind in (f"MOSTLY_{level}", f"ALL_{level}", {"Q2_K": "MOSTLY_Q2_K"}.get(level))


def test_an_unknown_level_suggests_the_nearest():
    assert level_named(" q4_k_m ") == "Q4_K_M"
    with pytest.raises(UnknownLevel) as error:
        level_named("Q4_KM")
    assert "There is no level 'Q4_KM'." in str(error.value)
    assert "Did you mean Q4_K_M?" in str(error.value)
