"""Kernels from the disk: without numba, never stale or damaged, and compiled where there is nowhere to keep them."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"):
        monkeypatch.delenv(name, raising=False)
    compiled._target.cache_clear()
    yield tmp_path / "code"
    compiled._target.cache_clear()


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


def fewer_features() -> llvm.FeatureMap:
    """The same processor behind a hypervisor that hides its newest vectors."""
    found = llvm.FeatureMap(llvm.get_host_cpu_features())
    found.update({feature: False for feature in found if feature.startswith(("avx512", "avx2"))})
    return found


@pytest.mark.parametrize("change", ["source", "system", "processor", "features", "variable", "types"])
def test_what_changed_is_compiled_anew(own_folder, monkeypatch, tmp_path, change):
    """In one folder, as in a home that machines share: what one kept is not for another to run."""
    double()
    if change == "source":
        for name in compiled.SOURCES:
            (tmp_path / f"{name}.py").write_bytes((compiled._HERE / f"{name}.py").read_bytes())
        (tmp_path / "pack.py").write_text("# other words\n")
        monkeypatch.setattr(compiled, "_HERE", tmp_path)
    native = llvm.get_process_triple()
    match change:
        case "system":
            monkeypatch.setattr(llvm, "get_process_triple", lambda: native.replace("linux", "freebsd"))
        case "processor":
            monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "generic")
        case "features":
            few = fewer_features()
            monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: few)
        case "variable":
            monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    compiled._target.cache_clear()
    if change == "types":
        assert Compiled(__name__, "doubled")(np.arange(3, dtype=np.float32), 2, np.zeros(3)) == 3
    else:
        assert double() == [0, 2, 4]
    assert len(list(own_folder.iterdir())) == 2


TARGETS = [
    {},
    {"NUMBA_CPU_NAME": "generic"},
    {"NUMBA_CPU_NAME": "Generic", "NUMBA_CPU_FEATURES": "+sse3"},
    {"NUMBA_CPU_NAME": "haswell"},
    {"NUMBA_CPU_NAME": ""},
    {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    {"NUMBA_CPU_FEATURES": "-avx512f"},
    {"NUMBA_ENABLE_AVX": "0"},
]


def test_numbas_variables_mean_what_they_mean_to_numba():
    code = """
import json, os, sys
from numba.core import config
from numba.core.registry import cpu_target
from bitladder.kernels import compiled
cpu_target.target_context
codegen = cpu_target.target_context.codegen()
for variables in json.loads(sys.argv[1]):
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    config.reload_config()
    compiled._target.cache_clear()
    theirs = [codegen._llvm_module.triple, codegen._get_host_cpu_name(), codegen._get_host_cpu_features()]
    print(json.dumps([list(compiled._target()), theirs]))
"""
    command = [sys.executable, "-c", code, json.dumps(TARGETS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(TARGETS)
    for variables, (ours, theirs) in zip(TARGETS, found, strict=True):
        assert ours == theirs, variables


def test_a_generic_processor_gets_no_wide_vectors(monkeypatch):
    """What a vector of ours becomes where NUMBA_CPU_NAME alone asks for the oldest processor."""
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    vector = llvm.parse_assembly(
        "define <16 x float> @f(<16 x float> %x) {\n %y = fadd <16 x float> %x, %x\n ret <16 x float> %y\n}"
    )
    code = compiled._machine().emit_assembly(vector)
    assert "xmm" in code or "v0.4s" in code, code
    assert "ymm" not in code and "zmm" not in code


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


def test_only_releases_of_numba_whose_calling_convention_is_known_are_asked_for():
    project = Path(__file__).parents[2]
    wanted = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    (numba,) = [found for found in map(Requirement, wanted) if found.name == "numba"]
    (pinned,) = re.findall(r"^numba==(\S+)$", (project / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned in numba.specifier
    release = Version(pinned).release
    assert f"{release[0]}.{release[1] + 1}" not in numba.specifier
