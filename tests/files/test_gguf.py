"""The GGUF reader on good files (against the gguf package) and on files that lie, one per fault."""

import hashlib
import os
import struct

import numpy as np
import pytest

from bitladder.errors import BadFile, BadInput, UnknownArchitecture
from bitladder.files import engine_package, gguf
from bitladder.files.describe_source import describe
from bitladder.files.engine_package import engine_knows
from bitladder.files.gguf import GgufFile, base_name, part_paths, read_header
from bitladder.files.gguf_header import read_file_header
from bitladder.walk.weights import FileWeights
from gguf_bytes import (
    ARRAY,
    F16,
    F32,
    LLAMA_KEYS,
    Q4_K,
    Q8_0,
    STRING,
    header,
    key,
    padded,
    string,
    strings,
    tensor,
    text,
    tiny_weights,
    u32,
    write_model,
)

# One tensor w of 3 rows and 2 columns, F32, and one key a = 7 (u32): the whole file.
SMALL = bytes.fromhex(
    "47475546 03000000 0100000000000000 0100000000000000"  # GGUF, version 3, one tensor, one key
    "0100000000000000 61 04000000 07000000"
    "0100000000000000 77 02000000 0200000000000000 0300000000000000 00000000 0000000000000000"
    "0000000000000000000000000000"  # 82 bytes so far, padded to 96
    "0000803f 00000040 00004040 00008040 0000a040 0000c040"  # 1 to 6
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path):
    return write_model(tmp_path / "tiny-F16.gguf", tiny_weights())


# ---------------------------------------------------------------- good files


def test_a_small_file_byte_by_byte(tmp_path):
    (tmp_path / "x.gguf").write_bytes(SMALL)
    read = read_file_header(tmp_path / "x.gguf")
    assert read.metadata == {"a": 7}
    assert read.raw == {"a": bytes.fromhex("04000000 07000000")}
    assert [(t.info.name, t.info.shape, t.info.qtype, t.offset) for t in read.tensors] == [("w", (3, 2), "F32", 96)]
    assert (read.version, read.alignment, read.data_start, read.file_bytes) == (3, 32, 96, 120)


def test_weights_come_back(tiny):
    weights = tiny_weights()
    with GgufFile.open(tiny) as file:
        assert [info.name for info in file.model.tensors] == list(weights)
        for name, array in weights.items():
            assert file.info(name).shape == array.shape
            assert file.raw(name).tobytes() == array.tobytes()
            np.testing.assert_array_equal(file.read(name), array.astype(np.float32))
        np.testing.assert_array_equal(
            file.read("blk.0.ffn_down.weight", slice(3, 5)),
            weights["blk.0.ffn_down.weight"][3:5].astype(np.float32),
        )


def test_rows_are_read_by_number(tiny):
    weights = tiny_weights()["token_embd.weight"]
    with GgufFile.open(tiny) as file:
        for rows in (slice(None), slice(5, 9), slice(9, 5), slice(-3, None), slice(0, 9, 4), np.array([7, 0, 7])):
            assert file.raw("token_embd.weight", rows).tobytes() == weights[rows].tobytes()
            np.testing.assert_array_equal(file.read("token_embd.weight", rows), weights[rows].astype(np.float32))
        held = file.raw("token_embd.weight")
    assert held.tobytes() == weights.tobytes()  # what was read outlives the file


def test_a_large_tensor_is_read_a_part_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(gguf, "_READ_AT_ONCE", 100)
    with GgufFile.open(tiny) as file:
        for name, array in tiny_weights().items():
            np.testing.assert_array_equal(file.read(name), array.astype(np.float32))


@pytest.mark.parametrize("left", [0, 600, 0.5, 0.999])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tiny, left):
    with GgufFile.open(tiny) as file:
        last = list(tiny_weights())[-1]
        os.truncate(tiny, int(left * tiny.stat().st_size) if left < 1 else left)
        for read in (file.raw, file.read, FileWeights(file), FileWeights(file).identity):
            with pytest.raises(BadFile, match="has become shorter while it was read: nothing is left at byte"):
                read(last)


def test_the_model_is_described(tiny):
    model = read_header(tiny)
    dims = model.dims
    assert (model.name, model.file_name) == ("tiny", "tiny-F16.gguf")
    assert (dims.architecture, dims.n_layer, dims.n_embd, dims.n_ff) == ("llama", 2, 64, 128)
    assert (dims.n_head, dims.n_head_kv, dims.n_gqa) == (4, 2, 2)
    assert (dims.head_dim_k, dims.head_dim_v, dims.n_vocab, dims.n_ctx_train) == (16, 16, 96, 128)
    assert model.elements == sum(array.size for array in tiny_weights().values())


def test_the_gguf_package_agrees(demo_gguf):
    from gguf import GGUFReader

    theirs, ours = GGUFReader(demo_gguf), read_file_header(demo_gguf)
    assert [
        (t.name, tuple(map(int, t.shape[::-1])), t.tensor_type.name, int(t.data_offset)) for t in theirs.tensors
    ] == [(t.info.name, t.info.shape, t.info.qtype, t.offset) for t in ours.tensors]
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in fields.items()} == ours.metadata


def test_header_alone_is_read_when_the_data_is_a_hole(tmp_path):
    """A 100 GB model on a disk that could not hold it: only its header has blocks."""
    rows = 50 << 20
    head = padded(header(LLAMA_KEYS, [tensor("token_embd.weight", [1024, rows], F16, 0)]))
    path = tmp_path / "big.gguf"
    path.write_bytes(head)
    os.truncate(path, len(head) + rows * 2048)
    model = read_header(path)
    assert model.tensor_bytes == rows * 2048
    assert path.stat().st_blocks * 512 < 1 << 20


def test_version_2_and_other_alignments(tmp_path):
    keys = [*LLAMA_KEYS, u32("general.alignment", 64)]
    head = padded(header(keys, [tensor("a", [2], F32, 0), tensor("b", [2], F32, 64)], version=2), 64)
    (tmp_path / "x.gguf").write_bytes(head + bytes(64 + 8))
    read = read_file_header(tmp_path / "x.gguf")
    assert [t.offset - read.data_start for t in read.tensors] == [0, 64]


def test_empty_tensors_and_single_numbers(tmp_path):
    tensors = [tensor("empty", [32, 0], Q8_0, 0), tensor("one", [], F32, 0)]
    (tmp_path / "x.gguf").write_bytes(padded(header(LLAMA_KEYS, tensors)) + struct.pack("<f", 2.5))
    with GgufFile.open(tmp_path / "x.gguf") as file:
        assert file.read("empty").shape == (0, 32)
        assert file.read("one") == np.float32(2.5)


def test_every_kind_of_value(tmp_path):
    values = {0: ("B", 255), 1: ("b", -1), 2: ("H", 65535), 3: ("h", -2), 4: ("I", 1 << 31), 5: ("i", -3)}
    values |= {6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 63), 11: ("q", -4), 12: ("d", 0.1)}
    keys = [key(f"k{kind}", kind, struct.pack("<" + code, value)) for kind, (code, value) in values.items()]
    keys += [strings("s", ["a", "ü", ""]), key("array", ARRAY, struct.pack("<IQ3h", 3, 3, 1, -2, 3))]
    keys += [key("none", ARRAY, struct.pack("<IQ", STRING, 0)), key("bytes", STRING, text(b"a\xffb"))]
    (tmp_path / "x.gguf").write_bytes(padded(header(keys, [])))
    metadata = read_file_header(tmp_path / "x.gguf").metadata
    assert {f"k{kind}": value for kind, (_, value) in values.items()}.items() <= metadata.items()
    assert metadata["s"] == ["a", "ü", ""]
    assert metadata["array"] == [1, -2, 3]
    assert metadata["none"] == []
    assert metadata["bytes"] == "a\ufffdb"


def test_the_hash_is_remembered_until_the_file_changes(tiny):
    first = hashlib.sha256(tiny.read_bytes()).hexdigest()
    with GgufFile.open(tiny) as file:
        assert file.sha256 == first
        assert file.sha256 == first
    write_model(tiny, tiny_weights(seed=1))
    with GgufFile.open(tiny) as file:
        assert file.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest() != first


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("reference-f16.gguf", "reference"),
        ("Qwen2.5-7B-Q4_K_M-00001-of-00002.gguf", "Qwen2.5-7B"),
        ("model.gguf", "model"),
        ("x-IQ4_XS.gguf", "x"),
        ("Q8_0.gguf", "Q8_0"),
        ("llama-7b", "llama-7b"),
    ],
)
def test_base_names(tmp_path, name, base):
    assert base_name(tmp_path / name) == base


# ---------------------------------------------------------------- split files


def split_pair(folder, *, numbers=(0, 1), count=2, promised=2, names=("a", "b")):
    paths = []
    for index, (number, name) in enumerate(zip(numbers, names, strict=True)):
        keys = [
            *(LLAMA_KEYS if index == 0 else ()),
            key("split.no", 2, struct.pack("<H", number)),
            key("split.count", 2, struct.pack("<H", count)),
            key("split.tensors.count", 5, struct.pack("<i", promised)),
        ]
        paths.append(folder / f"m-0000{index + 1}-of-00002.gguf")
        data = np.full(8, index, np.float32).tobytes()
        paths[-1].write_bytes(padded(header(keys, [tensor(name, [8], F32, 0)])) + data)
    return paths


@pytest.mark.parametrize("which", [0, 1])
def test_any_part_opens_the_whole_model(tmp_path, which):
    paths = split_pair(tmp_path)
    with GgufFile.open(paths[which]) as file:
        assert file.model.name == "m"
        assert file.path == paths[0]
        assert [float(file.read(name)[0]) for name in ("a", "b")] == [0.0, 1.0]
        parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        assert file.sha256 == hashlib.sha256("".join(parts).encode()).hexdigest()
    if which == 0:
        assert part_paths(paths[0]) == paths


def test_split_faults(tmp_path):
    first, second = split_pair(tmp_path)
    renamed = second.rename(tmp_path / "other.gguf")
    with pytest.raises(BadFile, match=r"m-00002-of-00002\.gguf is missing; the model has 2 parts"):
        GgufFile.open(first)
    with pytest.raises(BadFile, match="part of 2 files, its name does not"):
        GgufFile.open(renamed)
    for wrong, found in [
        ({"numbers": (0, 0)}, r"part 0 \(counting from 0\), its name says 1"),
        ({"names": ("a", "a")}, "'a' is in two parts"),
        ({"promised": 5}, "5 tensors are promised, the 2 parts hold 2"),
    ]:
        with pytest.raises(BadFile, match=found):
            GgufFile.open(split_pair(tmp_path, **wrong)[0])


# ---------------------------------------------------------------- files that lie

HUGE = (1 << 64) - 1
A = tensor("a", [8], F32, 0)
DATA = bytes(32)


def lie(keys=(), tensors=(A,), data=DATA, **more):
    return padded(header(keys, tensors, **more)) + data


LIES = {
    "magic": (b"GGML" + SMALL[4:], r"starts with b'GGML', not with b'GGUF'"),
    "page": (b"<!DOCTYPE html><html>not found</html>", r"starts with b'<!DO'"),
    "empty": (b"", "has 0 bytes; a GGUF header alone has 24"),
    "short": (SMALL[:20], "has 20 bytes"),
    "version 1": (lie(version=1), "GGUF version 1; versions 2 and 3 are known"),
    "version 4": (lie(version=4), "GGUF version 4"),
    "big-endian": (SMALL[:4] + bytes.fromhex("00000003") + SMALL[8:], "big-endian"),
    "tensor count": (lie(n_tensors=HUGE), f"tensor count is {HUGE}"),
    "key count": (lie(n_keys=HUGE), f"the key count is {HUGE}, which needs at least"),
    "more tensors than listed": (lie(n_tensors=3, data=b""), "tensor"),
    "string length": (lie([text("a") + struct.pack("<IQ", STRING, HUGE)]), f"has {HUGE} bytes"),
    "string past the end": (lie([key("a", STRING, struct.pack("<Q", 4000))]), "has 4000 bytes, the file has"),
    "array length": (lie([key("a", ARRAY, struct.pack("<IQ", 4, HUGE))]), f"length of array 'a' is {HUGE}"),
    "array of strings": (
        lie([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 40))]),
        f"length of array 'a' is {1 << 40}",
    ),
    "array of arrays": (lie([key("a", ARRAY, struct.pack("<IQ", ARRAY, 0))]), "'a' is an array of arrays"),
    "array of nothing known": (lie([key("a", ARRAY, struct.pack("<IQ", 99, 0))]), "array of unknown type 99"),
    "value type": (lie([key("a", 13, b"")]), "unknown value type 13"),
    "key twice": (lie([u32("a", 1), u32("a", 2)]), "key 'a' appears twice"),
    "key empty": (lie([u32("", 1)]), "key 0 has 0 bytes"),
    "key long": (lie([u32("k" * 65536, 1)]), "key 0 has 65536 bytes; between 1 and 65535"),
    "key not text": (lie([text(b"\xff") + struct.pack("<II", 4, 1)]), "not UTF-8"),
    "name long": (lie(tensors=[tensor("t" * 64, [8], F32, 0)]), "has 64 bytes; between 1 and 63"),
    "name empty": (lie(tensors=[tensor("", [8], F32, 0)]), "has 0 bytes"),
    "name twice": (lie(tensors=[A, tensor("a", [8], F32, 32)], data=bytes(64)), "'a' appears twice"),
    "dimensions": (lie(tensors=[tensor("a", [1] * 5, F32, 0)]), "has 5 dimensions; 4 are allowed"),
    "type": (lie(tensors=[tensor("a", [8], 4, 0)]), "unknown type number 4"),
    "row of a part block": (
        lie(tensors=[tensor("a", [100], Q4_K, 0)]),
        "rows of 100 weights; Q4_K needs multiples of 256",
    ),
    # 2^32 x 2^32 elements are 0 in 64 bits, and 2^62 F32 have 0 bytes there
    "size that wraps": (lie(tensors=[tensor("a", [1 << 32, 1 << 32], F32, 0)]), f"claims {1 << 64} weights"),
    "bytes that wrap": (lie(tensors=[tensor("a", [1 << 62], F32, 0)]), "bytes are missing"),
    "offset that wraps": (lie(tensors=[tensor("a", [8], F32, HUGE - 31)]), "bytes are missing"),
    "offset crooked": (lie(tensors=[tensor("a", [8], F32, 4)]), "offset 4, no multiple of the alignment 32"),
    "offset past the end": (lie(tensors=[tensor("a", [8], F32, 1 << 20)]), "bytes are missing"),
    "overlap": (
        lie(tensors=[tensor("a", [16], F32, 0), tensor("b", [8], F32, 32)], data=bytes(64)),
        "inside tensor 'a'",
    ),
    "same place": (lie(tensors=[A, tensor("b", [8], F32, 0)]), "'b' starts at byte .* inside tensor 'a'"),
    "alignment": (lie([u32("general.alignment", 24)]), "general.alignment is 24; it must be a power of two"),
    "alignment zero": (lie([u32("general.alignment", 0)]), "general.alignment is 0"),
    "alignment text": (lie([string("general.alignment", "32")]), "general.alignment is '32'"),
    "alignment huge": (lie([u32("general.alignment", 1 << 31)]), "general.alignment is 2147483648"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(tmp_path, name):
    data, found = LIES[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BadFile, match=found) as error:
        read_file_header(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in error.value.found
    assert error.value.means


def test_missing_bytes_are_counted(tmp_path, tiny):
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-1000])
    with pytest.raises(
        BadFile,
        match=rf"has {len(whole) - 1000} bytes, its header describes {len(whole)}: 1000 bytes are missing",
    ):
        GgufFile.open(cut)


def test_cut_anywhere_is_an_error_of_ours(tmp_path):
    """No prefix of a file makes the reader fail in any other way."""
    whole = padded(header([*LLAMA_KEYS, strings("tokens", ["a", "bb"])], [A])) + DATA
    cut = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            read_file_header(cut)


def test_flipped_bytes_are_read_or_refused(tmp_path):
    """Any single damaged byte gives a header or an error of ours, nothing else, and no absurd allocation."""
    whole = bytearray(padded(header([*LLAMA_KEYS, strings("tokens", ["a", "bb"])], [A])) + DATA)
    path = tmp_path / "x.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(0, len(whole) - len(DATA)):
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_header(path)
        except (BadFile, UnknownArchitecture):
            refused += 1
    assert refused > 20  # magic, version and counts at the least


def test_no_such_file(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(BadInput, match="is a folder"):
        read_header(tmp_path)


# ---------------------------------------------------------------- dimensions


def described(tmp_path, keys):
    (tmp_path / "x.gguf").write_bytes(padded(header(keys, [A])) + DATA)
    return read_header(tmp_path / "x.gguf").dims


def test_an_architecture_nobody_knows(tmp_path):
    with pytest.raises(UnknownArchitecture, match=r"'mamba99' is not known to the engine here \(xllamacpp 20") as error:
        described(tmp_path, [string("general.architecture", "mamba99")])
    assert "pip install -U xllamacpp" in error.value.do


@pytest.mark.parametrize("name", ["deepseek4", "hy_v4", "minimax-m3", "glm5-next", "kimi-k3", "granite_swa", "rwkv7"])
def test_what_the_engine_knows_is_the_rule(tmp_path, name):
    """Architectures that the gguf package does not list (rwkv7: that it does)."""
    keys = [string("general.architecture", name), u32(f"{name}.block_count", 1), u32(f"{name}.embedding_length", 4)]
    assert described(tmp_path, keys).architecture == name


@pytest.mark.parametrize("name", ["", "llama ", "Llama", "../llama", "llama\0", "x" * 200, "mamba99"])
def test_names_that_the_engine_cannot_know(name):
    assert engine_knows(name) is False


def test_without_an_engine_any_name_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_package, "engine_libraries", tuple)
    engine_knows.cache_clear()
    try:
        keys = [
            string("general.architecture", "mamba99"),
            u32("mamba99.block_count", 1),
            u32("mamba99.embedding_length", 4),
        ]
        assert described(tmp_path, keys).architecture == "mamba99"
        (note,) = describe(str(tmp_path / "x.gguf")).notes
        assert "could say whether it runs 'mamba99'" in note
    finally:
        engine_knows.cache_clear()


def test_dimensions_that_are_missing_or_absurd(tmp_path):
    with pytest.raises(BadFile, match=r"general\.architecture is None"):
        described(tmp_path, [])
    with pytest.raises(BadFile, match=r"'llama.block_count' is missing"):
        described(tmp_path, LLAMA_KEYS[:2])
    with pytest.raises(BadFile, match=r"'llama.block_count' is 0, not a number from 1 up"):
        described(tmp_path, [LLAMA_KEYS[0], u32("llama.block_count", 0), *LLAMA_KEYS[3:]])
    with pytest.raises(BadFile, match=r"'llama.block_count' is 'two'"):
        described(tmp_path, [LLAMA_KEYS[0], string("llama.block_count", "two"), *LLAMA_KEYS[3:]])


def test_numbers_per_layer_give_the_largest(tmp_path):
    per_layer = key("llama.attention.head_count_kv", ARRAY, struct.pack("<IQ2i", 5, 2, 1, 4))
    assert described(tmp_path, [*LLAMA_KEYS[:6], per_layer, LLAMA_KEYS[7]]).n_head_kv == 4
    assert described(tmp_path, [*LLAMA_KEYS[:6], LLAMA_KEYS[7]]).n_head_kv == 4  # as many as heads when not said
