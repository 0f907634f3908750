"""What a file holds against what it claims."""

import json

import numpy as np
import pytest

from bitladder.files.gguf import GgufFile
from bitladder.records import to_json
from bitladder.stages.inspect import inspect_file
from bitladder.stages.write_levels import quantize_levels
from gguf_bytes import LLAMA_KEYS, string, tiny_weights, u32, write_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))


def made(tmp_path, level, **shape):
    """A level of a tiny model, written by us."""
    source = write_model(tmp_path / "tiny-F16.gguf", tiny_weights(**shape), keys=LLAMA_KEYS)
    with GgufFile.open(source) as opened:
        return quantize_levels(opened, [level], tmp_path / "out")[0].path


def test_a_truthful_file(tmp_path):
    path = made(tmp_path, "Q4_K_M", width=256, hidden=512)
    seen = inspect_file(path)
    assert (seen.level_in_name, seen.level_in_header, seen.truthful) == ("Q4_K_M", "Q4_K_M", True)
    assert seen.verdict == "It is what it says: Q4_K_M."
    assert (seen.fallbacks, seen.off_recipe) == (0, ())
    with GgufFile.open(path) as file:
        by_type = dict.fromkeys(seen.type_share, 0)
        for info in file.model.tensors:
            by_type[info.qtype] += info.elements
        total = sum(by_type.values())
        assert seen.type_share == pytest.approx({qtype: count / total for qtype, count in by_type.items()})
        assert seen.bpw == pytest.approx(8 * sum(info.nbytes for info in file.model.tensors) / total)
    assert list(seen.type_share.values()) == sorted(seen.type_share.values(), reverse=True)
    matrices = total - sum(array.size for array in tiny_weights(width=256, hidden=512).values() if array.ndim == 1)
    assert seen.on_label_share == pytest.approx(by_type["Q4_K"] / matrices)
    assert seen.file_bytes == path.stat().st_size == seen.header_bytes + seen.tensor_bytes


def test_a_narrow_model_holds_nothing_of_what_its_name_says(tmp_path):
    seen = inspect_file(made(tmp_path, "Q2_K"))
    assert "Q2_K" not in seen.type_share
    assert (seen.on_label_share, seen.truthful) == (0.0, True)
    assert seen.fallbacks == 1 + 7 * 2
    assert seen.verdict == "It follows the recipe for Q2_K, yet only 0% of its quantized weights are Q2_K."


def test_a_renamed_file_is_found_out(tmp_path):
    path = made(tmp_path, "Q4_0")
    renamed = path.rename(path.with_name("tiny-Q8_0.gguf"))
    seen = inspect_file(renamed)
    assert seen.truthful is False
    assert seen.verdict == "The name says Q8_0, the header says Q4_0."
    assert len(seen.off_recipe) == 7 * 2  # the embedding, used as output too, is Q8_0 in both


def test_a_header_that_contradicts_name_and_content(tmp_path):
    keys = [*LLAMA_KEYS, u32("general.file_type", 7)]
    seen = inspect_file(write_model(tmp_path / "tiny-F16.gguf", tiny_weights(), keys=keys))
    assert (seen.off_recipe, seen.truthful) == ((), False)
    assert seen.verdict == "The name says F16, the header says Q8_0."


def test_a_mix_of_ones_own_is_told_from_the_recipe(tmp_path):
    path = write_model(tmp_path / "tiny-Q4_K_M.gguf", tiny_weights(), keys=LLAMA_KEYS)
    seen = inspect_file(path)
    assert seen.truthful is False
    assert seen.verdict.startswith(
        "Not llama.cpp's recipe for Q4_K_M: 15 tensors have another type (token_embd.weight, "
    )


def test_no_claim_no_verdict(tmp_path):
    seen = inspect_file(write_model(tmp_path / "tiny.gguf", tiny_weights()))
    assert (seen.truthful, seen.on_label_share, seen.fallbacks, seen.off_recipe) == (None, None, None, None)
    assert seen.verdict == "Neither name nor header claims a level."


def test_levels_are_read_from_names_as_people_write_them(tmp_path):
    for name, level in [
        ("m.q8_0.gguf", "Q8_0"),
        ("m-q4_k_m.gguf", "Q4_K_M"),
        ("m-Q4_K_S.gguf", "Q4_K_S"),
        ("mf16.gguf", None),
    ]:
        assert inspect_file(write_model(tmp_path / name, tiny_weights())).level_in_name == level


def test_an_importance_matrix_changes_a_recipe_and_both_are_truthful(tmp_path):
    """Q4_0 made with an importance matrix keeps an eighth of ffn_down in Q4_1."""
    keys = [*LLAMA_KEYS[:2], u32("llama.block_count", 8), *LLAMA_KEYS[3:]]
    source = write_model(tmp_path / "deep-F16.gguf", tiny_weights(layers=8), keys=keys)
    importance = {"blk.0.ffn_down.weight": np.ones(128, np.float32)}
    with GgufFile.open(source) as opened:
        for folder, given in [("with", importance), ("without", None)]:
            (level,) = quantize_levels(opened, ["Q4_0"], tmp_path / folder, importance=given)
            seen = inspect_file(level.path)
            assert ("Q4_1" in seen.type_share) == (given is not None)
            assert seen.truthful


def test_parts_are_counted_together(tmp_path):
    source = write_model(tmp_path / "tiny-F16.gguf", tiny_weights())
    with GgufFile.open(source) as opened:
        (level,) = quantize_levels(opened, ["Q8_0"], tmp_path / "out", split_max_bytes=20_000)
    seen = inspect_file(level.path)
    assert seen.parts == len(list((tmp_path / "out").iterdir())) > 1
    assert (seen.file_bytes, seen.level_in_name) == (level.bytes, "Q8_0")


def test_json_has_what_other_tools_rely_on(tmp_path):
    keys = [*LLAMA_KEYS, string("tokenizer.chat_template", "x" * 1000)]
    record = json.loads(
        json.dumps(to_json(inspect_file(write_model(tmp_path / "tiny-F16.gguf", tiny_weights(), keys=keys))))
    )
    assert record["architecture"] == "llama"
    assert record["bpw"] == pytest.approx(16, abs=0.2)
    assert record["type_share"]["F16"] > 0.9
    assert record["tensors"][0] == {"name": "token_embd.weight", "shape": [96, 64], "qtype": "F16"}
    assert record["metadata"]["tokenizer.chat_template"].endswith("... (1000 characters)")


def test_the_demo_model_tells_the_truth(demo_gguf):
    seen = inspect_file(demo_gguf)
    assert (seen.level_in_name, seen.truthful) == ("Q4_1", True)
    assert seen.promoted == 1  # the embedding doubles as output and is Q8_0
