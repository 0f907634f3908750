"""What a model has beside its decoder is converted, copied, counted, or said to be left out."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.engines.base import Chat
from bitladder.engines.llama import LlamaSettings
from bitladder.engines.llama_program import LlamaProgram
from bitladder.files.beside import FURTHER, PICTURES, SOUNDS, parts_beside, projector_beside, towers
from bitladder.files.checkpoint import CheckpointTensor, read_checkpoint
from bitladder.files.gguf import read_header
from bitladder.files.probe import probe_machine
from bitladder.formats.recipes import is_quantizable
from bitladder.levels import parse_levels
from bitladder.pipeline import run
from bitladder.plan.ladder import make_plan
from bitladder.progress import silent
from bitladder.serve.deploy import _notes, own_engine
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.stages.job import Work
from bitladder.stages.measured_levels import tier_file
from bitladder.stages.run_facts import RunSettings
from gguf_bytes import LLAMA_KEYS, string, strings, tiny_weights, u32, write_model
from tiny_checkpoints import write_tokenizer

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4zwAE/xkgFAAb8gP91pby"
    "KwAAAABJRU5ErkJggg=="
)
"""Two by two pixels, red and blue."""
QUICK = ("--imatrix", "none", "--effort", "fast", "--threads", "1")


def bitladder(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, demo_gguf):
    """A tiny model that takes in pictures, its tensors named as on the hub."""
    import transformers

    folder = tmp_path_factory.mktemp("seeing") / "tiny-eyes"
    folder.mkdir()
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": write_tokenizer(folder, demo_gguf), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512, "sliding_window": 128,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in stored.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, seeing):
    """Conversions of these tests are found by no others; the converter is the user's."""
    from bitladder.files.converter import find_converter

    monkeypatch.setenv("BITLADDER_CONVERTER", str(find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(seeing.parent / "cache"))


@pytest.mark.model
def test_a_checkpoints_projector_is_written_once_beside_its_levels(seeing, tmp_path):
    out = tmp_path / "out"
    result = bitladder("quantize", seeing, "--to", "Q8_0,Q4_K_M", "--out", out, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["projector"] == str(out / "mmproj-tiny-eyes.gguf")
    assert sorted(path.name for path in out.iterdir()) == [
        "mmproj-tiny-eyes.gguf", "tiny-eyes-Q4_K_M.gguf", "tiny-eyes-Q8_0.gguf",
    ]  # fmt: skip
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "mmproj-tiny-eyes.gguf").tensors}
    stored = load_file(seeing / "model.safetensors")
    parts = parts_beside(read_checkpoint(seeing).tensors, {})
    assert parts.keys() == {PICTURES}
    assert len(tensors) == towers(parts).tensors
    for ours, theirs in (("blk.1.ffn_up", "encoder.layers.1.mlp.fc1"), ("patch_embd", "embeddings.patch_embedding")):
        found = tensors[f"v.{ours}.weight"]
        assert found.tensor_type.name in ("BF16", "F32")  # as wide as in the checkpoint, or wider
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        np.testing.assert_array_equal(values, stored[f"vision_tower.vision_model.{theirs}.weight"].float().numpy())
    before = (out / "mmproj-tiny-eyes.gguf").stat().st_mtime_ns
    again = bitladder("quantize", seeing, "--to", "Q8_0", "--out", out, *QUICK)
    assert again.exit_code == 0, again.output
    flat = " ".join(again.output.split())
    assert "The model also takes in pictures (" in flat
    assert "mmproj-tiny-eyes.gguf" in flat
    assert (out / "mmproj-tiny-eyes.gguf").stat().st_mtime_ns == before
    # the folder of levels is still one model's, and another level of it brings the projector along
    (out / "tiny-eyes-Q4_K_M.gguf").unlink()
    moved = bitladder("quantize", out, "--to", "Q4_K_M", "--out", tmp_path / "moved", *QUICK)
    assert moved.exit_code == 0, moved.output
    assert (tmp_path / "moved" / "mmproj-tiny-eyes.gguf").read_bytes() == (out / "mmproj-tiny-eyes.gguf").read_bytes()


@pytest.mark.model
def test_a_run_counts_writes_and_hands_it_on(seeing, tmp_path):
    """As `plan`, `quantize` and `serve` do, and says that it was not measured."""
    (tmp_path / "text.txt").write_text(
        "The lamp stood in the window all winter, and each evening somebody lit it. " * 9
    )
    (tmp_path / "workload.yaml").write_text(
        "name: short\nmax_tokens: 2\ninputs:\n"
        "  - {id: one, prompt: abc, expect: {max_words: 100}}\n  - {id: two, prompt: def, expect: {max_words: 100}}\n"
    )
    out = tmp_path / "out"
    settings = RunSettings(
        model=str(seeing), levels=tuple(parse_levels(["Q8_0", "Q4_K_M"])), workload=tmp_path / "workload.yaml",
        texts=(tmp_path / "text.txt",), imatrix="none", effort="fast", out=out, n_ctx=256,
    )  # fmt: skip
    record = run(settings, silent).record
    written = out / "mmproj-tiny-eyes.gguf"
    size = written.stat().st_size
    assert record.plan.beside_bytes == size > 0
    planned = {level.level: level for level in record.plan.levels}
    bare = make_plan(read_header(out / "tiny-eyes-Q8_0.gguf"), probe_machine(out), n_ctx=256)
    alone = next(level for level in bare.levels if level.level == "Q8_0")
    assert planned["Q8_0"].total_bytes - planned["Q8_0"].file_bytes == pytest.approx(
        size + alone.total_bytes - alone.file_bytes, abs=4096
    )
    assert [line for line in record.warnings if "its language part alone" in line]
    served = tier_file(str(seeing), record.decision.quality or "Q8_0", n_ctx=256, out=out, work=Work(threads=1))
    assert served.projector == written
    assert served.memory_bytes > size


@pytest.mark.model
def test_what_the_converter_cannot_make_is_named(seeing, tmp_path):
    folder = shutil.copytree(seeing, tmp_path / "renamed")
    stored = load_file(folder / "model.safetensors")
    saved = {
        name.replace("vision_model.", "").replace("layer_norm1", "norm_one"): value for name, value in stored.items()
    }
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    result = bitladder("quantize", folder, "--to", "Q8_0", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert "What takes in pictures (" in flat
    assert "is left out, and levels read text alone" in flat
    assert "Can not map tensor" in flat
    assert [path.name for path in out.iterdir()] == ["renamed-Q8_0.gguf"]


@pytest.mark.model
def test_the_engine_loads_it_and_sees(seeing, tmp_path):
    """Not what it says (weights are random), but that pictures reach it and change it."""
    out = tmp_path / "out"
    result = bitladder("quantize", seeing, "--to", "F16", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    file = tier_file("", str(out / "tiny-eyes-F16.gguf"), n_ctx=256, work=Work(threads=1))
    assert file.projector == out / "mmproj-tiny-eyes.gguf"
    spec = TierSpec(file.level, file.path, n_ctx=256, memory_bytes=file.memory_bytes, projector=file.projector)
    with own_engine(spec, 1) as engine:
        assert engine.props()["modalities"]["vision"] is True
        counts = []
        for picture in (False, True):
            parts = [{"type": "text", "text": "What is it?"}]
            if picture:
                parts.append({"type": "image_url", "image_url": {"url": PICTURE}})
            counts.append(engine.chat(Chat([{"role": "user", "content": parts}], max_tokens=2)).prompt_tokens)
        assert counts[1] - counts[0] >= 4  # a picture is four tokens of this model, and marks around it
    notes = _notes(ServeSettings(quality=spec), [spec], None)
    assert notes == [
        "tiny-eyes-F16 takes in pictures or sounds, too (mmproj-tiny-eyes.gguf); none of that was measured."
    ]


def test_an_old_program_is_served_without(tmp_path):
    spec = TierSpec("Q8_0", tmp_path / "m.gguf", projector=tmp_path / "mmproj-m.gguf")
    launch = LlamaSettings(spec.path, projector=spec.projector)
    for flags, takes in ((frozenset({"--mmproj"}), True), (frozenset(), False)):
        program = LlamaProgram("llama-server", 6000, flags)
        assert (str(spec.projector) in program.command(launch, 1)) is takes
        (note,) = _notes(ServeSettings(quality=spec, program=program), [spec], None)
        assert ("is served without mmproj-m.gguf" in note) is not takes
    assert "--mmproj" not in LlamaProgram("llama-server", 6000, frozenset({"--mmproj"})).command(LlamaSettings("m"), 1)


def test_plan_counts_it(seeing):
    result = bitladder("plan", seeing, "--ctx", "64", "--json")
    made = json.loads(result.stdout)
    size = towers(parts_beside(read_checkpoint(seeing).tensors, {})).nbytes
    assert made["beside_bytes"] == size > 0
    assert "takes in pictures" in " ".join(made["notes"])
    plain = json.loads((seeing / "config.json").read_text())["text_config"]
    assert all(level["total_bytes"] > size + level["tensor_bytes"] for level in made["levels"])
    assert plain


def projector(path, width=64, keys=()):
    weights = {"v.blk.0.attn_q.weight": np.ones((32, 32), np.float16), "mm.0.weight": np.ones((width, 32), np.float16)}
    own = [string("general.type", "mmproj"), string("general.architecture", "clip"),
           u32("clip.vision.projection_dim", width), *keys]  # fmt: skip
    return write_model(path, weights, keys=own)


def test_a_projector_beside_a_file(tmp_path):
    keys = [*LLAMA_KEYS, strings("tokenizer.ggml.tokens", [f"token {number}" for number in range(96)])]
    model = write_model(tmp_path / "Eyes-F16.gguf", tiny_weights(), keys=keys)
    assert projector_beside(model) is None
    other = projector(tmp_path / "mmproj-F16.gguf", width=128)
    assert projector_beside(model) is None  # it gives vectors of another width
    mine = projector(other)
    assert projector_beside(model) == mine
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "imatrix-mmproj.gguf").write_bytes(model.read_bytes())
    assert projector_beside(model) == mine
    size = mine.stat().st_size
    planned = json.loads(bitladder("plan", model, "--ctx", "64", "--json").stdout)
    assert 0 < planned["beside_bytes"] <= size
    result = bitladder("quantize", model, "--to", "Q8_0", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "mmproj-F16.gguf").read_bytes() == mine.read_bytes()
    (tmp_path / "out" / "mmproj-F16.gguf").write_bytes(b"mine")  # another file of that name is nobody's to replace
    result = bitladder("quantize", model, "--to", "Q8_0", "--out", tmp_path / "out", *QUICK)
    assert "is another file than this model's projector" in " ".join(result.output.split())
    assert (tmp_path / "out" / "mmproj-F16.gguf").read_bytes() == b"mine"
    write_model(tmp_path / "Another-Q8_0.gguf", tiny_weights(), keys=keys)
    assert projector_beside(model) is None  # whose it is cannot be told
    named = projector(tmp_path / "mmproj-Eyes-BF16.gguf")
    assert projector_beside(model) == named


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.3.mlp.up_proj.weight", None),
        ("language_model.model.layers.0.mlp.vision_gate.weight", None),  # within the decoder
        ("model.language_model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", PICTURES),
        ("model.visual.blocks.7.attn.qkv.weight", PICTURES),
        ("visual.merger.mlp.0.weight", PICTURES),
        ("multi_modal_projector.linear_1.weight", PICTURES),
        ("model.connector.modality_projection.proj.weight", PICTURES),
        ("model.embed_vision.embedding_projection.weight", PICTURES),
        ("model.embed_audio.embedding.weight", SOUNDS),
        ("audio_tower.conv1.weight", SOUNDS),
        ("model.audio_tower.conformer.0.norm.weight", SOUNDS),
        ("mtp.fc.weight", FURTHER),
        ("mtp.layers.0.mlp.up_proj.weight", FURTHER),
        ("model.layers.4.eh_proj.weight", FURTHER),
        ("model.layers.3.nextn.eh_proj.weight", FURTHER),
    ],
)
def test_parts_are_told_by_the_words_in_their_names(name, what):
    tensors = [CheckpointTensor(name, "BF16", (2, 2), 8)]
    found = parts_beside(tensors, {"text_config": {"num_hidden_layers": 4}})
    assert found.keys() == ({what} if what else set())
    assert sum(part.nbytes for part in found.values()) == (8 if what else 0)


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def with_head(folder, demo_gguf, family, extra, head, **sizes):
    """A tiny checkpoint with a head for further tokens, which transformers' own class does not save."""
    import transformers

    folder.mkdir()
    vocab = write_tokenizer(folder, demo_gguf) if demo_gguf else write_pieces(folder)
    config = transformers.AutoConfig.for_model(family, vocab_size=vocab, **{**SIZES, **extra, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | head(stored), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_pieces(folder):
    """A tokenizer of sentencepiece; returns how many tokens it has."""
    import io

    import sentencepiece

    text = ["The lamp stood in the window all winter, and each evening somebody lit it."] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=64, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def drafting(stored):
    """The last layer once more, and what joins it to the decoder, by the names of the release."""
    layer = {
        name.replace("model.layers.3.", "mtp.layers.0."): value.clone()
        for name, value in stored.items()
        if name.startswith("model.layers.3.")
    }
    norms = {f"mtp.{name}.weight": torch.ones(64, dtype=torch.bfloat16) for name in (
        "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden",
    )}  # fmt: skip
    return {**layer, **norms, "mtp.fc.weight": torch.ones(64, 128, dtype=torch.bfloat16)}


@pytest.mark.model
def test_a_head_for_further_tokens_is_kept_at_eight_bits(tmp_path, demo_gguf):
    extra = {
        "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8,
        "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2,
    }  # fmt: skip
    folder = with_head(tmp_path / "drafts", demo_gguf, "qwen3_next", extra, drafting)
    result = bitladder("quantize", folder, "--to", "Q4_0,F16", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    assert "left out" not in result.output
    for level, wanted in (("Q4_0", "Q8_0"), ("F16", "F16")):
        tensors = read_header(tmp_path / "out" / f"drafts-{level}.gguf").tensors
        matrices = [one for one in tensors if one.name.startswith("blk.4.") and is_quantizable(one)]
        assert {"blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight"} <= {one.name for one in matrices}
        assert {one.qtype for one in matrices} == {wanted}


@pytest.mark.model
def test_a_head_for_which_there_is_no_place_is_named(tmp_path):
    extra = {
        "num_hidden_layers": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    }  # fmt: skip

    def head(_):
        return {"model.mtp_linear_proj.0.weight": torch.ones(64, 128, dtype=torch.bfloat16)}

    folder = with_head(tmp_path / "drafts", None, "ernie4_5_moe", extra, head)
    result = bitladder("quantize", folder, "--to", "Q8_0", "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert "further tokens (MTP, 1 tensors, 16.0 KiB) is left out" in flat
