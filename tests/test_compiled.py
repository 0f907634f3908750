"""Kernels from the disk: without numba, never stale or damaged, and compiled where there is nowhere to keep them."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitladder.kernels import compiled
from bitladder.kernels.compiled import Compiled
from bitladder.kernels.lanes import kernel


@kernel
def doubled(x, factor, out):
    for i in range(x.size):
        out[i] = x[i] * factor
    return x.size


@kernel
def allocating(x):
    return np.ones(x.size).size


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    return tmp_path / "code"


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling fails the test."""

    def refuse(self, args, machine):
        pytest.fail(f"{self.name} was compiled")

    monkeypatch.setattr(Compiled, "_compile", refuse)


def double() -> list[float]:
    out = np.zeros(3)
    assert Compiled(__name__, "doubled")(np.arange(3.0), 2, out) == 3
    return out.tolist()


def test_later_runs_take_what_the_first_one_kept(own_folder, monkeypatch, request):
    assert double() == [0, 2, 4]
    assert len(list(own_folder.iterdir())) == 1
    request.getfixturevalue("no_compiler")
    assert double() == [0, 2, 4]


def test_a_process_that_finds_its_kernels_never_imports_numba(own_folder):
    code = (
        "import sys, numpy as np; from bitladder.kernels import dequantize;"
        "x = dequantize(np.arange(34, dtype=np.uint8)[None], 'Q8_0'); print('numba' in sys.modules, x.sum())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "12"]
    assert [run.stdout.split()[0] for run in runs] == ["True", "False"]
    assert runs[0].stdout.split()[1] == runs[1].stdout.split()[1]


def test_a_damaged_file_is_compiled_again(own_folder):
    double()
    (file,) = own_folder.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100] + b"!" + whole[101:], b""):
        file.write_bytes(damaged)
        assert double() == [0, 2, 4]
        assert file.read_bytes() == whole


@pytest.mark.parametrize("change", ["source", "processor", "types"])
def test_what_changed_is_compiled_anew(own_folder, monkeypatch, tmp_path, change):
    double()
    if change == "source":
        for name in compiled.SOURCES:
            (tmp_path / f"{name}.py").write_bytes((compiled._HERE / f"{name}.py").read_bytes())
        (tmp_path / "pack.py").write_text("# other words\n")
        monkeypatch.setattr(compiled, "_HERE", tmp_path)
    if change == "processor":
        monkeypatch.setattr(compiled, "_cpu", lambda: ("generic", ""))
    if change == "types":
        assert Compiled(__name__, "doubled")(np.arange(3, dtype=np.float32), 2, np.zeros(3)) == 3
    else:
        assert double() == [0, 2, 4]
    assert len(list(own_folder.iterdir())) == 2


def test_the_sources_are_all_that_kernels_import():
    for name in compiled.SOURCES:
        tree = ast.parse((compiled._HERE / f"{name}.py").read_text())
        names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {module.rpartition(".")[2] for module in names if module.startswith("bitladder.")}
        assert ours <= set(compiled.SOURCES), f"{name}.py imports {ours}"


def test_without_a_place_to_keep_it_a_kernel_still_runs(own_folder):
    own_folder.write_text("a file where a folder should be")
    assert double() == [0, 2, 4]


def test_without_numbas_variable_the_folders_are_ours(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path))
    beside, users = compiled._folders()
    assert beside == Path(compiled.__file__).parent / "__pycache__"
    assert users == tmp_path / "kernels"


def test_strides_are_refused_and_so_is_what_numba_keeps_to_itself():
    with pytest.raises(TypeError, match="needs contiguous arrays"):
        Compiled(__name__, "doubled")(np.arange(6.0)[::2], 2, np.zeros(3))
    with pytest.raises(TypeError, match=r"the kernel allocating calls .*NRT_.*, which numba keeps"):
        Compiled(__name__, "allocating")(np.zeros(3))
