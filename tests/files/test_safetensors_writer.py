"""Files written piece by piece, read by the safetensors library."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitladder.files.safetensors_writer import PiecewiseTensor, stored_tensors, write_safetensors

CODES = np.arange(15, dtype=np.int8).reshape(3, 5)
SCALES = np.arange(7, dtype=np.float32)
HALVES = np.linspace(0, 1, 6, dtype=np.float16).reshape(2, 3)


def in_pieces(name: str, dtype: str, array: np.ndarray, size: int) -> PiecewiseTensor:
    data = array.tobytes()
    return PiecewiseTensor(name, dtype, array.shape, lambda: (data[at : at + size] for at in range(0, len(data), size)))


def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_safetensors(path, [in_pieces("codes", "I8", CODES, 4), in_pieces("scales", "F32", SCALES, 3)], {"made": "so"})
    found = load_file(path)
    assert set(found) == {"codes", "scales"}
    assert found["codes"].dtype == np.int8 and np.array_equal(found["codes"], CODES)
    assert found["scales"].dtype == np.float32 and np.array_equal(found["scales"], SCALES)


def test_files_are_joined_with_every_tensor_aligned(tmp_path: Path) -> None:
    first, second, whole = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "whole"))
    save_file({"codes": CODES}, first)  # 15 bytes: what follows them directly would be misaligned
    save_file({"scales": SCALES, "halves": HALVES}, second)
    write_safetensors(whole, [*stored_tensors(first), *stored_tensors(second)])
    found = load_file(whole)
    assert {name: one.tolist() for name, one in found.items()} == {
        "codes": CODES.tolist(), "scales": SCALES.tolist(), "halves": HALVES.tolist(),
    }  # fmt: skip
    data = whole.read_bytes()
    assert data.index(SCALES.tobytes()) % 4 == 0
    assert data.index(HALVES.tobytes()) % 2 == 0


def test_a_tensor_shorter_than_its_shape_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    short = PiecewiseTensor("codes", "I8", (4, 5), lambda: [CODES.tobytes()])
    with pytest.raises(ValueError, match="codes: 15 bytes where its shape takes 20"):
        write_safetensors(path, [short])
    assert not path.exists()


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    one = in_pieces("codes", "I8", CODES, 15)
    with pytest.raises(ValueError, match="two tensors are called codes"):
        write_safetensors(tmp_path / "one.safetensors", [one, one])
