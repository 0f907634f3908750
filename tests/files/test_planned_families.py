"""Checkpoints of fifty architectures are planned from headers: as the converter would make them, or nearly so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_configs
from bitladder.describe.cache import cache_bytes, layer_caches
from bitladder.describe.contradiction import check_config
from bitladder.describe.estimate import beside_language, estimated
from bitladder.errors import BadFile, UnknownArchitecture
from bitladder.files import converter_child, header_conversion
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.converter import find_converter
from bitladder.files.describe_checkpoint import SizeBasis
from bitladder.files.describe_source import describe
from bitladder.files.gguf import read_header
from bitladder.files.sources import resolve
from bitladder.levels import parse_level
from bitladder.plan.abilities import Facts, Route, abilities, walk_gap
from bitladder.plan.cost import level_size
from tiny_checkpoints import write_tokenizer

MADE = json.loads((Path(__file__).parents[1] / "fixtures" / "family_headers.json").read_text())
"""What the converter makes of the same configurations (``fixtures/make_family_headers.py``)."""
ODD_CACHES: dict[str, str] = {}


@pytest.mark.parametrize("name", tiny_configs.CONFIGS)
def test_headers_alone_give_sizes_and_caches(name, tmp_path):
    """Shapes of transformers' class on the meta device, sizes by rules, against the converter on a saved checkpoint."""
    converter_child._write_shapes(tiny_configs.write_config(name, tmp_path))
    checkpoint = read_checkpoint(tmp_path)
    check_config(name, checkpoint.config, checkpoint.tensors)
    model = estimated(name, checkpoint.config, checkpoint.tensors)
    assert model.dims.n_vocab == tiny_configs.N_VOCAB
    for level in ("F16", "Q4_K_M", "Q2_K"):
        assert level_size(model, parse_level(level)).file_bytes > 0
    made = MADE[name]
    if "refused" in made:
        return
    tables = made["elements"] - model.elements  # factors of rotations are computed by the converter
    unread = made["elements"] // 100 if name in tiny_configs.HUB_COPIES else 0
    assert 0 <= tables <= 64 + unread
    assert model.tensor_bytes == pytest.approx(made["bytes"], rel=0.012)
    if name not in ODD_CACHES:
        cache = cache_bytes(layer_caches(model), 512)
        assert [cache.full, cache.window, cache.state] == made["cache"]


def test_enough_families_are_tried():
    assert len(tiny_configs.CONFIGS) >= 50
    assert sum("refused" not in row for row in MADE.values()) >= 45
    seeing = [name for name, (_, own) in tiny_configs.CONFIGS.items() if "vision_config" in own]
    assert len(seeing) >= 3


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("vision_tower.encoder.layers.0.attn.q.weight", True), ("model.visual.blocks.0.norm.weight", True),
        ("multi_modal_projector.linear.weight", True), ("model.embed_vision.embedding.weight", True),
        ("audio_tower.conv.weight", True), ("model.layers.0.mlp.down_proj.weight", False),
        ("model.language_model.layers.0.self_attn.q_proj.weight", False), ("lm_head.weight", False),
    ],
)  # fmt: skip
def test_what_sees_or_hears_is_told_apart(name, beside):
    assert beside_language(name) is beside


@pytest.mark.model
def test_a_plan_is_what_a_conversion_makes(tmp_path, demo_gguf, monkeypatch):
    """To the byte, tokenizer included, before a weight is converted; and afterwards the plan is the file's own."""
    monkeypatch.setenv("BITLADDER_CONVERTER", str(find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hybrid"
    folder.mkdir()
    tiny_configs.write_checkpoint("qwen3_next", folder, write_tokenizer(folder, demo_gguf))
    planned = describe(str(folder))
    assert planned.basis is SizeBasis.CONVERTER
    assert planned.exact
    assert planned.model.dims.architecture == "qwen3next"
    assert not (tmp_path / "cache" / "converted").exists()
    made = read_header(resolve(str(folder)).path)
    for level in ("F16", "Q4_K_M"):
        sizes = [level_size(model, parse_level(level)).file_bytes for model in (planned.model, made)]
        assert sizes[0] == sizes[1]
    assert planned.model.tensors == made.tensors
    afterwards = describe(str(folder))
    assert afterwards.basis is SizeBasis.FILE
    assert afterwards.model.tensors == made.tensors
    monkeypatch.setattr(header_conversion, "_made", None)  # what is in the cache is not made again
    config = json.loads((folder / "config.json").read_text())
    kept = header_conversion.header_of(
        "hybrid", config, read_checkpoint(folder).tensors, find_converter(), folder=folder
    )
    assert kept.model.tensors == made.tensors


@pytest.mark.model
def test_a_config_alone_is_as_good_as_headers(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CONVERTER", str(find_converter().folder))
    tiny_configs.write_config("qwen3_5_moe", tmp_path)
    found = describe(str(tmp_path))
    assert found.basis is SizeBasis.SHAPES
    assert (found.model.elements, found.model.tensor_bytes) == (
        MADE["qwen3_5_moe"]["elements"],
        MADE["qwen3_5_moe"]["bytes"],
    )
    assert "no weights" in found.notes[0]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}))
    with pytest.raises(UnknownArchitecture, match="NobodyForCausalLM"):
        describe(str(tmp_path))


def test_a_contradiction_is_one_message(tmp_path):
    tiny_configs.write_checkpoint("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, match in (
        ({"num_hidden_layers": 4}, "4 layers"),
        ({"intermediate_size": 128}, "down_proj|gate_proj"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ):
        path.write_text(json.dumps({**config, **change}))
        for read in (describe, resolve):  # a plan, and whatever would be made of it
            with pytest.raises(BadFile, match=match):
                read(str(tmp_path))


@pytest.mark.parametrize("name", ["smollm3", "exaone4", "qwen3_next", "nemotron_h", "deepseek_v3", "gemma3n", "lfm2"])
def test_a_lost_tensor_is_missed(name, tmp_path):
    """Layers of another kind, experts, and layers that use the keys of others are none that lost something."""
    from safetensors.torch import load_file, save_file

    folder = tiny_configs.write_checkpoint(name, tmp_path / name)
    checkpoint = read_checkpoint(folder)
    check_config(name, checkpoint.config, checkpoint.tensors)
    if name == "gemma3n":
        return
    stored = load_file(folder / "model.safetensors")
    shared = [own for own in stored if own.endswith("layers.1.post_attention_layernorm.weight")]
    shared += [own for own in stored if own.endswith(("layers.1.norm.weight", "layers.1.ffn_norm.weight"))]
    del stored[shared[0]]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    checkpoint = read_checkpoint(folder)
    if name in ("smollm3", "exaone4"):  # in the others the layer has tensors of a kind of its own, or is one of two
        with pytest.raises(BadFile, match=r"layer 1 lacks .*norm\.weight, which every other layer has"):
            check_config(name, checkpoint.config, checkpoint.tensors)
    else:
        check_config(name, checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "qwen3_next"])
def test_heads_for_several_tokens_have_no_part_in_the_cache(name, tmp_path):
    """llama.cpp gives the layers of a NextN head a context of their own, which nobody asks for here."""
    converter_child._write_shapes(tiny_configs.write_config(name, tmp_path))
    checkpoint = read_checkpoint(tmp_path)
    model = estimated(name, checkpoint.config, checkpoint.tensors)
    more = replace(
        model,
        dims=replace(model.dims, n_layer=model.dims.n_layer + 1),
        metadata={
            **{key: [*value, 1] if isinstance(value, list) else value for key, value in model.metadata.items()},
            f"{model.dims.architecture}.nextn_predict_layers": 1,
        },
    )
    assert layer_caches(more) == layer_caches(model)


class TestAbilities:
    KNOWN = Facts(is_gguf=True, converts=None, engine_knows=True, walk_gap="", transformers_class=True)

    @staticmethod
    def ways(facts):
        return {found.what: found.way for found in abilities(facts)}

    def test_a_known_family_can_have_everything_by_the_walk(self):
        ways = self.ways(self.KNOWN)
        assert Route.NONE not in ways.values()
        assert {ways[what] for what in ("proof", "importance", "calibration", "recipes")} == {Route.WALK}

    def test_an_unknown_one_by_what_is_built(self):
        facts = Facts(True, None, True, "the layers of 'x' are not known here", None)
        lone = {one.what: one for one in abilities(facts)}
        assert {lone[what].way for what in ("proof", "importance", "workload")} == {Route.ENGINE}
        assert {lone[what].way for what in ("calibration", "recipes")} == {Route.NONE}
        assert lone["K-quants"].way is Route.QUANTIZER
        assert "GGUF file" not in lone, "it is one"
        unmeasured = {one.what: one for one in abilities(replace(facts, engine_gap="an encoder"))}
        assert unmeasured["proof"].way is Route.NONE
        assert "an encoder" in unmeasured["proof"].reason
        assert unmeasured["workload"].way is Route.ENGINE
        assert "give the checkpoint's folder" in lone["recipes"].reason
        ways = self.ways(replace(facts, is_gguf=False, transformers_class=True))
        assert {ways[what] for what in ("proof", "importance", "calibration", "recipes")} == {Route.DERIVED}

    def test_what_nobody_runs(self):
        facts = Facts(False, None, False, "unknown layers", False)
        found = {one.what: one for one in abilities(facts)}
        assert found["workload"].way is Route.NONE
        assert found["proof"].reason == (
            "unknown layers; transformers does not know the class; llama.cpp does not know the architecture"
        )

    def test_what_does_not_convert_can_have_nothing(self):
        found = abilities(Facts(False, False, None, "", True))
        assert all(one.way is Route.NONE and "converter" in one.reason for one in found)

    def test_variants_of_a_known_family(self, demo_gguf):
        model = read_header(demo_gguf)
        assert walk_gap(model) == ""
        strange = replace(model.tensors[-1], name="blk.0.attn_sinks.weight")
        assert "attn_sinks" in walk_gap(replace(model, tensors=(*model.tensors, strange)))
