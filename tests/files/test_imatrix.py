"""Importance matrices: both kinds read from hand-made bytes, written and read back, and lies refused."""

import struct

import numpy as np
import pytest

from bitladder.describe.text import Document
from bitladder.describe.windows import Window
from bitladder.errors import BadFile, BadInput
from bitladder.files.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from bitladder.stages import calibration as calibrated
from bitladder.stages.job import Build, Job, Work, opened
from gguf_bytes import F16, F32, header, key, padded, string, strings, tensor, u32

NAME, STACK = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def dat(entries, tail=b"", count=None):
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)))
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + tail


def gguf(tensors, keys=()):
    """``tensors``: name -> f32 array in numpy order."""
    listed, data = [], b""
    for name, array in tensors.items():
        listed.append(tensor(name, array.shape[::-1], F32, len(data)))
        data += padded(array.astype("<f4").tobytes())
    return padded(header([string("general.type", "imatrix"), *keys], listed)) + data


def read(tmp_path, data):
    (tmp_path / "x.imatrix").write_bytes(data)
    return read_imatrix(tmp_path / "x.imatrix")


def test_an_old_file(tmp_path):
    """Values are mean squares times calls, as llama-quantize divides them."""
    tail = struct.pack("<ii", 7, 9) + b"wiki.test"
    matrix = read(tmp_path, dat([(NAME, 4, [4, 8, 12]), ("b", 0, [5, 5])], tail))
    np.testing.assert_array_equal(matrix.vectors()[NAME], np.float32([1, 2, 3]))
    np.testing.assert_array_equal(matrix.vectors()["b"], np.float32([1, 1]))  # never called: neutral
    assert (matrix.chunks, matrix.datasets) == (7, ("wiki.test",))
    assert matrix.counts[NAME].tolist() == [4]
    assert read(tmp_path, dat([(NAME, 4, [4, 8, 12])])).chunks == 0


def test_a_gguf_file(tmp_path):
    """Sums are divided by the counts of their own matrix; an expert that was never asked is neutral."""
    tensors = {
        f"{NAME}.in_sum2": np.array([[10, 20]]),
        f"{NAME}.counts": np.array([[10]]),
        f"{STACK}.in_sum2": np.array([[4, 8], [0, 0], [3, 9]]),
        f"{STACK}.counts": np.array([[4], [0], [3]]),
    }
    keys = [
        strings("imatrix.datasets", ["a.txt", "b.txt"]),
        u32("imatrix.chunk_count", 5),
        u32("imatrix.chunk_size", 512),
    ]
    matrix = read(tmp_path, gguf(tensors, keys))
    np.testing.assert_array_equal(matrix.vectors()[NAME], np.float32([1, 2]))
    np.testing.assert_array_equal(matrix.vectors()[STACK], np.float32([[1, 2], [1, 1], [1, 3]]))
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (5, 512, ("a.txt", "b.txt"))


@pytest.fixture
def matrix():
    rng = np.random.default_rng(0)
    means = {
        NAME: rng.uniform(0, 3, (1, 64)).astype(np.float32),
        STACK: rng.uniform(0, 3, (4, 32)).astype(np.float32),
    }
    counts = {NAME: np.float32([512]), STACK: np.float32([100, 200, 300, 400])}
    return ImportanceMatrix(means, counts, 20, 512, ("calibration.txt",))


def test_gguf_round_trip(tmp_path, matrix):
    write_imatrix(tmp_path / "m.gguf", matrix)
    again = read_imatrix(tmp_path / "m.gguf")
    for name, means in matrix.mean_squares.items():
        np.testing.assert_allclose(again.mean_squares[name], means, rtol=1e-6)
        np.testing.assert_array_equal(again.counts[name], matrix.counts[name])
    assert (again.chunks, again.chunk_size, again.datasets) == (20, 512, ("calibration.txt",))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_gguf_package_reads_what_was_written(tmp_path, matrix):
    from gguf import GGUFReader

    write_imatrix(tmp_path / "m.gguf", matrix)
    reader = GGUFReader(tmp_path / "m.gguf")
    stored = {one.name: one for one in reader.tensors}
    assert stored[f"{STACK}.in_sum2"].shape.tolist() == [32, 4]  # columns first, as llama.cpp
    assert stored[f"{STACK}.counts"].shape.tolist() == [1, 4]
    sums = matrix.mean_squares[STACK] * matrix.counts[STACK][:, None]
    np.testing.assert_array_equal(stored[f"{STACK}.in_sum2"].data, sums)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 20


def test_old_round_trip_flattens_stacks(tmp_path, matrix):
    write_imatrix(tmp_path / "m.dat", matrix, "dat")
    again = read_imatrix(tmp_path / "m.dat")
    np.testing.assert_allclose(again.vectors()[NAME], matrix.vectors()[NAME], rtol=1e-6)
    np.testing.assert_allclose(again.vectors()[STACK], matrix.vectors()[STACK].reshape(-1), rtol=1e-6)
    assert (again.chunks, again.datasets) == (20, ("calibration.txt",))


LIES = {
    "empty": (b"", "needs 4 bytes at offset 0"),
    "no entries": (dat([]), "says 0 entries"),
    "negative entries": (dat([], count=-1), "says -1 entries"),
    "too many entries": (dat([(NAME, 1, [1])], count=1 << 30), "says 1073741824 entries"),
    "one entry too many": (dat([(NAME, 1, [1.0] * 20)], count=2), "needs"),
    "name length": (struct.pack("<ii", 1, 1 << 30) + bytes(32), "name 0 needs 1073741824 bytes"),
    "name negative": (struct.pack("<ii", 1, -5) + bytes(32), "name 0 needs -5 bytes"),
    "values negative": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -2) + bytes(32),
        "needs -8 bytes",
    ),
    "values past the end": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 29) + bytes(32),
        "has 32 left",
    ),
    "twice": (dat([(NAME, 1, [1]), (NAME, 1, [1])]), "appears twice"),
    "NaN": (dat([(NAME, 1, [1, np.nan])]), f"importance of {NAME} holds NaN"),
    "negative": (dat([(NAME, 1, [1, -1])]), "negative number"),
    "infinite": (gguf({"a.in_sum2": np.array([[np.inf]]), "a.counts": np.array([[1]])}), "infinity"),
    "no counts": (gguf({"a.in_sum2": np.ones((1, 4))}), "a has no counts"),
    "other counts": (
        gguf({"a.in_sum2": np.ones((2, 4)), "a.counts": np.ones((3, 1))}),
        "3 counts for 2 matrices",
    ),
    "a model": (gguf({"a.weight": np.ones((2, 4))}), "no sums of squares among its 1 tensors"),
    "halves": (padded(header([], [tensor("a.in_sum2", [4], F16, 0)])) + bytes(32), "is F16, not F32"),
    "cut": (gguf({"a.in_sum2": np.ones((1, 64)), "a.counts": np.ones((1, 1))})[:-40], "bytes are missing"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(tmp_path, name):
    data, found = LIES[name]
    with pytest.raises(BadFile, match=found):
        read(tmp_path, data)


def test_odd_metadata_is_no_obstacle(tmp_path):
    keys = [u32("imatrix.datasets", 3), key("imatrix.chunk_count", 6, struct.pack("<f", 2.5))]
    matrix = read(tmp_path, gguf({"a.in_sum2": np.ones((1, 4)), "a.counts": np.ones((1, 1))}, keys))
    assert (matrix.chunks, matrix.datasets) == (0, ())


def test_no_such_file(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read_imatrix(tmp_path / "none.dat")


def test_texts_found_apart_are_not_tokenized_again(demo_gguf, tmp_path, matrix, monkeypatch):
    """A run that reuses everything starts no engine, not even to compare two texts that it has compared before."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    tokenized = []

    def windows(_job, texts):
        tokenized.append(texts[0].name)
        start = 0 if texts[0].name == "mine" else 1000
        return [Window(texts[0].name, np.arange(start, start + 100))]

    monkeypatch.setattr(Job, "windows", windows)
    build = Build(out=tmp_path / "out", measured_on=[Document("mine", "text")])
    with opened(str(demo_gguf), Work()) as job:
        kept = calibrated.importance_file(job, calibrated.calibration_texts(job))
        kept.parent.mkdir()
        write_imatrix(kept, matrix)
        for _ in range(2):
            calibrated.importance_of(job, build)
    assert len(tokenized) == 2  # each text once
