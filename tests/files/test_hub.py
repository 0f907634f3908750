"""Models on the hub, against a server on this machine that speaks its API."""

import json
from dataclasses import replace

import pytest

from bitladder.describe.shapes import Shape
from bitladder.errors import BadInput, FetchError, UsageError
from bitladder.files import hub
from bitladder.files.describe_checkpoint import SizeBasis
from bitladder.files.describe_source import describe
from bitladder.files.sources import resolve
from bitladder.files.stub_gguf import N_VOCAB, write_stub
from hub_server import running_hub, safetensors

SHAPE = Shape("tiny", "llama", 2, 64, 128, 4, 2, N_VOCAB, 2048, tied=True)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with running_hub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield fake


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    path = tmp_path_factory.mktemp("hollow") / "tiny.gguf"
    write_stub(path, SHAPE, "F16")
    return path.read_bytes()


def test_names():
    assert hub.parse_name("hf:org/name") == hub.HubName("org/name", "main", "")
    assert hub.parse_name("hf:org/na.me@v1:Q4_K_M") == hub.HubName("org/na.me", "v1", "Q4_K_M")
    for wrong in ("hf:name", "hf:a/b/c", "hf:/b", "hf:a/b@"):
        with pytest.raises(UsageError):
            hub.parse_name(wrong)


def test_levels_are_read_from_file_names():
    names = {
        "m-Q4_K_M": "Q4_K_M",
        "Model.q8_0": "Q8_0",
        "x-IQ3_XXS": "IQ3_XXS",
        "y-bf16": "BF16",
        "Q4-tea": "Q4",
        "plain": "",
    }
    assert {name: hub.level_of(name) for name in names} == names


def test_shards_belong_together_and_other_files_do_not():
    names = [
        "m-Q2_K-00002-of-00002.gguf",
        "m-Q2_K-00001-of-00002.gguf",
        "m-F16.gguf",
        "mmproj-m.gguf",
        "m.imatrix.gguf",
    ]
    assert hub.group_shards(names) == {"m-F16": ["m-F16.gguf"], "m-Q2_K": sorted(names[:2])}


def test_a_gguf_is_fetched_whole_and_kept(server, hollow):
    server.repos["org/levels"] = {"tiny-F16.gguf": hollow, "tiny-Q8_0.gguf": hollow}
    source = resolve("hf:org/levels")
    assert source.path.read_bytes() == hollow
    assert source.licence == "apache-2.0"
    asked = len(server.asked)
    assert resolve("hf:org/levels").path == source.path
    assert len(server.asked) == asked


def test_several_levels_need_a_choice(server, hollow):
    server.repos["org/levels"] = {"tiny-Q4_K_M.gguf": hollow, "tiny-Q8_0.gguf": hollow}
    with pytest.raises(BadInput, match=r"Q4_K_M, Q8_0"):
        resolve("hf:org/levels")
    assert resolve("hf:org/levels:q8_0").path.name == "tiny-Q8_0.gguf"


def test_a_gguf_header_is_enough_to_plan(server, hollow, tmp_path):
    path = tmp_path / "large.gguf"
    write_stub(path, replace(SHAPE, n_embd=256, n_ff=4096, n_layer=4), "F16")
    large = path.read_bytes()
    server.repos["org/levels"] = {"tiny-Q4_K_M.gguf": hollow, "tiny-F16.gguf": large}
    found = describe("hf:org/levels")
    assert found.model.dims.n_layer == 4
    assert found.exact
    assert [(offer.level, offer.nbytes) for offer in found.offers] == [
        ("F16", len(large)),
        ("Q4_K_M", len(hollow)),
    ]
    assert all(wanted.startswith("bytes=") for _, wanted in server.asked)
    assert server.sent < len(large) / 4


def test_a_checkpoint_is_planned_from_config_and_headers(server):
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    raw = safetensors({"embedding": [N_VOCAB, 64], "rest": [2 * layer + 64]})
    server.repos["org/tiny"] = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": raw}
    found = describe("hf:org/tiny")
    assert found.model.elements == N_VOCAB * 64 + 2 * layer + 64
    assert not found.exact
    assert not found.notes
    assert server.sent < 5000 < len(raw)


def test_a_class_that_nobody_knows_is_estimated_from_its_headers(server):
    """No converter is here, and none is fetched: headers alone."""
    layer = {"mixer.strange": [128, 64], "mlp.down_proj": [64, 96], "norm": [64]}
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": [N_VOCAB, 64], "visual.merger.weight": [64, 64]}
    config = {**CONFIG, "architectures": ["NobodyForCausalLM"], "model_type": "nobody", "head_dim": 16}
    server.repos["org/odd"] = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(shapes)}
    found = describe("hf:org/odd")
    assert {t.name: t.shape for t in found.model.tensors if t.name.startswith("blk.1.")} == {
        "blk.1.mixer_strange.weight": (128, 64), "blk.1.ffn_down.weight": (64, 96), "blk.1.norm.weight": (64,),
    }  # fmt: skip
    assert found.model.elements == N_VOCAB * 64 + 2 * (128 * 64 + 64 * 96 + 64)
    assert any("Sizes are an estimate: llama.cpp's converter is not here yet" in note for note in found.notes)
    assert found.model.dims.head_dim_k == 16
    assert found.basis is SizeBasis.ESTIMATE
    assert server.sent < 5000


def test_a_config_alone_is_planned_and_pickles_are_refused(server):
    server.repos["org/plan"] = {"config.json": json.dumps(CONFIG).encode()}
    found = describe("hf:org/plan")
    assert found.model.dims.n_layer == 2
    assert "no weights" in found.notes[0]
    server.repos["org/plan"]["pytorch_model.bin"] = b"x"
    with pytest.raises(BadInput, match="pickles"):
        describe("hf:org/plan")


def test_what_is_beside_the_decoder_is_counted(server, hollow):
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    decoder = {"embedding": [N_VOCAB, 64], "rest": [2 * layer + 64]}
    plain = safetensors(decoder)
    raw = safetensors(decoder | {"visual.merger.weight": [1000, 1000], "mtp.fc.weight": [64, 128]})
    server.repos["org/tiny"] = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": raw}
    found = describe("hf:org/tiny")
    note = found.notes[0]
    assert "what takes in pictures (1 tensors, " in note
    assert "the head that predicts further tokens (MTP, 1 tensors, " in note
    assert found.beside_bytes * 1.01 > len(raw) - len(plain) > found.beside_bytes
    files = {"mmproj-F32.gguf": b"x" * 400, "mmproj-BF16.gguf": b"x" * 200, "mmproj-F16.gguf": b"x" * 201}
    server.repos["org/eyes"] = {"tiny-F16.gguf": hollow, **files}
    planned = describe("hf:org/eyes")
    assert planned.beside_bytes == 200
    assert "(mmproj-BF16.gguf, 200 B)" in planned.notes[0]
    source = resolve("hf:org/eyes")
    assert source.path.name == "tiny-F16.gguf"
    assert "hf download org/eyes mmproj-BF16.gguf" in source.warnings[0]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("hf:org/missing", "misspelled, or it is private"),
        ("hf:org/gated", "accept the conditions"),
        ("hf:org/tiny@v9", "no revision 'v9'"),
        ("hf:org/pickled", "pickles"),
        ("hf:org/empty", "0 safetensors files and no config"),
        ("hf:../..", "is not the name of a model on the hub"),
        ("hf:org/a--b", "is not the name of a model on the hub"),
    ],
)
def test_what_cannot_be_had_is_said_with_what_to_do(server, name, match):
    server.repos |= {"org/gated": {}, "org/tiny": {}, "org/pickled": {"pytorch_model.bin": b"", "config.json": b"{}"}}
    server.repos["org/empty"] = {"README.md": b""}
    server.gated.add("org/gated")
    for act in (resolve, describe):
        with pytest.raises((BadInput, UsageError)) as error:
            act(name)
        assert match in str(error.value)


def test_network_loss_in_mid_header(server, hollow):
    server.repos["org/levels"] = {"tiny-F16.gguf": hollow}
    server.break_after = 1000
    with pytest.raises(FetchError, match=r"broke off in its header|header bytes arrived"):
        describe("hf:org/levels")


def test_no_hub_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="did not deliver org/name"):
        resolve("hf:org/name")
