"""Writing levels: the right bytes in the right place, whole or not at all, whatever interrupts."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import bitladder
from bitladder.errors import BadInput, BadWeights, OutputError, UnknownLevel, UsageError
from bitladder.files import gguf_writer, level_files
from bitladder.files.gguf import GgufFile
from bitladder.files.gguf_writer import GgufWriter
from bitladder.formats.recipes import assign
from bitladder.kernels import REVISION, dequantize, quantize
from bitladder.levels import parse_levels
from bitladder.stages import write_levels as stage
from bitladder.stages.write_levels import method_name, quantize_levels
from bitladder.walk.weights import FileWeights, Quantizer
from gguf_bytes import LLAMA_KEYS, strings, tiny_weights, write_model

TOKENS = strings("tokenizer.ggml.tokens", [f"token {number} ü" for number in range(96)])
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces per tensor, so that their order and borders matter."""
    monkeypatch.setattr(stage, "PIECE_WEIGHTS", 1000)


@pytest.fixture
def tiny(tmp_path):
    return write_model(tmp_path / "tiny-F16.gguf", tiny_weights(), keys=[*LLAMA_KEYS, TOKENS])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- what is written


def test_every_tensor_is_what_the_kernel_makes_of_it(tmp_path, tiny, small_pieces):
    with GgufFile.open(tiny) as source:
        (made,) = quantize_levels(source, ["Q4_K_M"], tmp_path / "out", threads=2)
        wanted = assign("Q4_K_M", source.model.tensors, source.model.dims)
        with GgufFile.open(made.path) as file:
            assert {info.name: info.qtype for info in file.model.tensors} == wanted
            assert [info.name for info in file.model.tensors] == [info.name for info in source.model.tensors]
            for name, qtype in wanted.items():
                if qtype == source.info(name).qtype:
                    assert file.raw(name).tobytes() == source.raw(name).tobytes()
                else:
                    assert file.raw(name).tobytes() == quantize(source.read(name), qtype).tobytes()
    assert made.bytes == made.path.stat().st_size
    assert made.bpw == pytest.approx(8 * file.model.tensor_bytes / file.model.elements)
    assert files_in(tmp_path / "out") == ["tiny-Q4_K_M.gguf"]


def test_metadata_is_carried_over_unchanged_and_provenance_added(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        (made,) = quantize_levels(source, ["q5_k_s"], tmp_path / "out", effort="fast")
        sha256 = source.sha256
        carried = source.model.raw_metadata
    model = GgufFile.open(made.path).model
    assert {key: model.raw_metadata[key] for key in carried} == carried
    assert list(model.raw_metadata)[: len(carried)] == list(carried)
    assert model.metadata["general.file_type"] == 16
    assert model.metadata["general.quantization_version"] == 2
    assert {key: value for key, value in model.metadata.items() if key.startswith("bitladder.")} == {
        "bitladder.source": "tiny-F16.gguf",
        "bitladder.source_sha256": sha256,
        "bitladder.recipe": "Q5_K_S",
        "bitladder.method": f"search fast, kernels {REVISION}, importance 0000000000000000",
        "bitladder.version": bitladder.__version__,
    }
    assert set(model.raw_metadata) - set(carried) == {
        "general.file_type",
        "general.quantization_version",
        *(f"bitladder.{key}" for key in ("source", "source_sha256", "recipe", "method", "version")),
    }


def test_the_gguf_package_reads_what_was_written(tmp_path, tiny):
    from gguf import GGUFReader
    from gguf.quants import dequantize as decode

    with GgufFile.open(tiny) as source:
        (made,) = quantize_levels(source, ["Q8_0"], tmp_path / "out")
    with GgufFile.open(made.path) as ours:
        for tensor in GGUFReader(made.path).tensors:
            np.testing.assert_array_equal(ours.read(tensor.name), decode(tensor.data, tensor.tensor_type))


def test_bytes_do_not_depend_on_threads_or_company(tmp_path, tiny, small_pieces):
    levels = ["F16", "Q8_0", "Q4_K_M", "Q4_0"]
    with GgufFile.open(tiny) as source:
        together = quantize_levels(source, levels, tmp_path / "a", threads=4)
        alone = [quantize_levels(source, [level], tmp_path / "b", threads=1)[0] for level in levels]
    for one, other in zip(together, alone, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_a_qtype_is_made_once_however_many_levels_use_it(tmp_path, tiny, monkeypatch):
    made = []

    def counting(weights, qtype, **more):
        made.append((weights.shape, qtype, weights.tobytes()))
        return quantize(weights, qtype, **more)

    monkeypatch.setattr(stage, "quantize", counting)
    with GgufFile.open(tiny) as source:
        quantize_levels(source, ["Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S"], tmp_path / "out", threads=1)
    assert len(made) == len(set(made)) > 0


def test_a_quantized_source_is_decoded_first_and_equal_types_copied(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        (first,) = quantize_levels(source, ["Q4_1"], tmp_path / "one")
    with GgufFile.open(first.path) as source:
        (again,) = quantize_levels(source, ["Q4_1"], tmp_path / "two")
        (other,) = quantize_levels(source, ["Q4_0"], tmp_path / "two")
        name = "blk.0.ffn_up.weight"
        with GgufFile.open(again.path) as copy, GgufFile.open(other.path) as changed:
            assert copy.raw(name).tobytes() == source.raw(name).tobytes()
            wanted = quantize(dequantize(source.raw(name), "Q4_1"), "Q4_0")
            assert changed.raw(name).tobytes() == wanted.tobytes()


def test_stacked_experts_have_importance_of_their_own(tmp_path, small_pieces):
    rng = np.random.default_rng(3)
    name = "blk.0.ffn_up_exps.weight"
    experts = rng.standard_normal((3, 40, 64)).astype(np.float16)
    source = write_model(tmp_path / "moe-F16.gguf", {name: experts})
    importance = rng.uniform(0.01, 10, (3, 64)).astype(np.float32)
    with GgufFile.open(source) as opened:
        made = [
            quantize_levels(opened, ["Q4_0"], tmp_path / folder, importance={name: vectors}, threads=2)[0].path
            for folder, vectors in [
                ("stack", importance),
                ("flat", importance.reshape(-1)),
                ("shared", importance[0]),
            ]
        ]
    with GgufFile.open(made[0]) as stack, GgufFile.open(made[2]) as shared:
        each = [quantize(experts[i].astype(np.float32), "Q4_0", importance=importance[i]) for i in range(3)]
        assert stack.raw(name).tobytes() == np.concatenate(each).tobytes()
        same = [quantize(experts[i].astype(np.float32), "Q4_0", importance=importance[0]) for i in range(3)]
        assert shared.raw(name).tobytes() == np.concatenate(same).tobytes()
        assert "importance" in stack.metadata["bitladder.method"]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_importance_that_does_not_fit(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        with pytest.raises(BadInput, match=r"blk\.0\.attn_q\.weight has 5 values, the tensor has shape \(64, 64\)"):
            quantize_levels(
                source, ["Q4_0"], tmp_path / "o", importance={"blk.0.attn_q.weight": np.ones(5, np.float32)}
            )
        quantize_levels(source, ["Q4_0"], tmp_path / "o", importance={"token_embd.weight": np.ones(5, np.float32)})


def test_empty_and_one_row_tensors(tmp_path):
    weights = {
        "a.weight": np.zeros((0, 64), np.float16),
        "b.weight": np.ones((1, 64), np.float16),
        "c.weight": np.ones((2, 1, 64), np.float16),
    }
    source = write_model(tmp_path / "odd-F16.gguf", weights)
    with GgufFile.open(source) as opened:
        (made,) = quantize_levels(opened, ["Q8_0"], tmp_path / "out")
    with GgufFile.open(made.path) as file:
        assert [info.qtype for info in file.model.tensors] == ["Q8_0", "F16", "Q8_0"]
        np.testing.assert_allclose(file.read("c.weight"), 1.0, rtol=1e-3)


# ---------------------------------------------------------------- split files


def test_split_out_and_in_again(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        (whole,) = quantize_levels(source, ["Q8_0"], tmp_path / "whole")
        (split,) = quantize_levels(source, ["Q8_0"], tmp_path / "split", split_max_bytes=20_000)
    names = files_in(tmp_path / "split")
    assert names == [f"tiny-Q8_0-{number:05d}-of-{len(names):05d}.gguf" for number in range(1, len(names) + 1)]
    assert len(names) > 2 and split.path.name == names[0]
    assert split.bytes == sum(path.stat().st_size for path in (tmp_path / "split").iterdir())
    with GgufFile.open(split.path) as parts, GgufFile.open(whole.path) as one:
        for info in one.model.tensors:
            assert parts.raw(info.name).tobytes() == one.raw(info.name).tobytes()
        (joined,) = quantize_levels(parts, ["Q8_0"], tmp_path / "joined")
    model = GgufFile.open(joined.path).model
    assert not [key for key in model.metadata if key.startswith("split.")]
    assert joined.path.name == "tiny-Q8_0.gguf"


@pytest.fixture
def few_files():
    """This process may have only a few more files open than it has, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = len(list(Path("/proc/self/fd").iterdir())) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_parts_than_files_a_process_starts_with(tmp_path, few_files):
    source = write_model(
        tmp_path / "many-F16.gguf", {f"blk.{n}.w.weight": np.ones((1, 32), np.float16) for n in range(90)}
    )
    with GgufFile.open(source) as opened:
        quantize_levels(opened, ["Q8_0"], tmp_path / "out", split_max_bytes=1)
    assert len(files_in(tmp_path / "out")) == 90


def test_more_parts_than_the_system_allows_is_told(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 260))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)  # else this process keeps it
    with GgufFile.open(tiny) as source, pytest.raises(OutputError, match="this system lets a process have 260"):
        quantize_levels(source, ["Q8_0"], tmp_path / "out", split_max_bytes=1)
    assert files_in(tmp_path / "out") == []


# ---------------------------------------------------------------- refusals


def test_unknown_levels_and_the_source_itself(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        with pytest.raises(UnknownLevel):
            quantize_levels(source, ["Q9"], tmp_path)
        before = tiny.read_bytes()
        with pytest.raises(UsageError, match="over its own source"):
            quantize_levels(source, ["F16"], tmp_path)
        assert tiny.read_bytes() == before


@pytest.mark.parametrize(("value", "name"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("level", ["Q4_0", "F16"])
def test_weights_that_are_no_numbers_are_named(tmp_path, value, name, level, small_pieces):
    weights = tiny_weights()
    weights["blk.1.ffn_up.weight"][77, 5] = value
    source = write_model(tmp_path / "bad.gguf", weights)
    with (
        GgufFile.open(source) as opened,
        pytest.raises(BadWeights, match=rf"blk\.1\.ffn_up\.weight holds {name} in row 77, column 5"),
    ):
        quantize_levels(opened, [level], tmp_path / "out", threads=2)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("level", "value", "end"), [("F16", 1e5, "65504"), ("Q8_0", -1e7, "-8.31901e+06"), ("Q4_1", -1e5, "-65504")]
)
def test_weights_too_large_for_a_type(tmp_path, level, value, end):
    """Refused alike in a level that is written and in one that is only measured, and nothing is left."""
    weights = np.zeros((32, 32), np.float32)
    weights[3, 5] = value
    source = write_model(tmp_path / "wide.gguf", {"blk.0.ffn_up.weight": weights})
    with GgufFile.open(source) as opened:
        message = rf"blk\.0\.ffn_up\.weight holds a weight of {value:.6g}; {level} ends at {end}\.".replace("+", r"\+")
        with pytest.raises(BadWeights, match=message):
            quantize_levels(opened, [level], tmp_path / "out")
        with pytest.raises(BadWeights, match=message):
            Quantizer(FileWeights(opened)).read("blk.0.ffn_up.weight", level)
        assert files_in(tmp_path / "out") == []
        quantize_levels(opened, ["BF16"], tmp_path / "out")


def test_a_tensor_that_dies_is_told(tmp_path):
    """Once for each type, and not of zeros that were zeros, nor of a tensor of which something is left."""
    rows = np.full((40, 64), 1e-12, np.float32)
    some = rows.copy()
    some[39, 63] = 1.0
    weights = {"blk.0.ffn_up.weight": rows, "blk.0.ffn_gate.weight": some, "blk.0.ffn_down.weight": 0 * rows}
    said = []
    with GgufFile.open(write_model(tmp_path / "small-F32.gguf", weights)) as opened:
        quantize_levels(opened, ["BF16", "Q8_0", "Q4_0"], tmp_path / "out", warn=said.append)
    assert sorted(line.partition(":")[0] for line in said) == [
        "blk.0.ffn_up.weight becomes zeros in Q4_0", "blk.0.ffn_up.weight becomes zeros in Q8_0",
    ]  # fmt: skip


def test_no_space_is_refused_before_the_first_byte(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("D", (), {"free": 1000}))
    with (
        GgufFile.open(tiny) as source,
        pytest.raises(OutputError, match=r"\d+ bytes .* are needed, 1000 .* are free"),
    ):
        quantize_levels(source, ["Q8_0"], tmp_path / "out")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_midway_leaves_nothing(tmp_path, tiny, monkeypatch, number):
    real, calls = os.pwrite, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 10:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with GgufFile.open(tiny) as source, pytest.raises(OutputError) as error:
        quantize_levels(source, ["Q8_0", "Q4_0"], tmp_path / "out", threads=2)
    if number != errno.EIO:
        assert "bytes" in error.value.found and "are needed" in error.value.found
    assert files_in(tmp_path / "out") == []


def test_files_go_to_the_disk_while_they_grow(tmp_path, tiny, monkeypatch):
    """So that the end is quick; and a disk that refuses later is told as one that refuses at once."""
    monkeypatch.setattr(gguf_writer, "_FLUSH_FROM", 1)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    with GgufFile.open(tiny) as source:
        quantize_levels(source, ["Q8_0"], tmp_path / "out")
    assert flushed
    shutil.rmtree(tmp_path / "out")

    def failing(_file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", failing)
    with GgufFile.open(tiny) as source, pytest.raises(OutputError, match="the disk is full; "):
        quantize_levels(source, ["Q8_0"], tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written(tmp_path, tiny):
    (tmp_path / "file").write_text("no folder")
    with (
        GgufFile.open(tiny) as source,
        pytest.raises(OutputError, match=r"cannot be written: (Not a directory|File exists|.*file is no folder)"),
    ):
        quantize_levels(source, ["Q8_0"], tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(tmp_path, tiny):
    (tmp_path / "out").mkdir(mode=0o500)
    with GgufFile.open(tiny) as source, pytest.raises(OutputError, match="Permission denied"):
        quantize_levels(source, ["Q8_0"], tmp_path / "out")


def test_two_writers_of_one_file(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        from bitladder.files.level_files import draft_level

        part = draft_level(source.model, "Q8_0", tmp_path / "out").parts[0]
        writer = GgufWriter(part.path, part.plan, "x")
        with pytest.raises(OutputError, match="is being written by another process"):
            quantize_levels(source, ["Q8_0"], tmp_path / "out")
        writer.discard()


def test_a_header_that_the_disk_takes_in_pieces_is_whole(tmp_path, tiny, monkeypatch):
    """A disk that fills up takes a part of what it is given, and fails at the next call only."""
    with GgufFile.open(tiny) as source:
        (whole,) = quantize_levels(source, ["Q8_0"], tmp_path / "whole")
        write_at = gguf_writer.system.write_at
        monkeypatch.setattr(
            gguf_writer.system, "write_at", lambda file, data, at: write_at(file, memoryview(data)[:1000], at)
        )
        (torn,) = quantize_levels(source, ["Q8_0"], tmp_path / "torn")
    assert torn.path.read_bytes() == whole.path.read_bytes()


def test_a_writer_that_gives_up_holds_its_file_until_it_is_gone(tmp_path, tiny, monkeypatch):
    from bitladder.files.level_files import draft_level

    with GgufFile.open(tiny) as source:
        part = draft_level(source.model, "Q8_0", tmp_path / "out").parts[0]
        writer, unlink, seen = GgufWriter(part.path, part.plan, "x"), Path.unlink, []

        def meddling(path, **options):
            with pytest.raises(OutputError, match="is being written by another process"):
                GgufWriter(part.path, part.plan, "x")
            seen.append(path.name)
            monkeypatch.undo()
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", meddling)
        writer.discard()
    assert seen == [writer.partial.name]
    assert files_in(tmp_path / "out") == []


def test_a_source_that_changes_under_our_hands(tmp_path, tiny, monkeypatch):
    def meddling(weights, qtype, **more):
        os.utime(tiny, ns=(1, 1))
        return quantize(weights, qtype, **more)

    monkeypatch.setattr(stage, "quantize", meddling)
    with GgufFile.open(tiny) as source, pytest.raises(BadInput, match="changed while it was read"):
        quantize_levels(source, ["Q8_0"], tmp_path / "out")
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_a_source_that_shrinks_under_our_hands(tmp_path, tiny, monkeypatch, left):
    """An error, no file, and no signal that ends the process."""

    def meddling(weights, qtype, **more):
        os.truncate(tiny, int(left * size))
        return quantize(weights, qtype, **more)

    size = tiny.stat().st_size
    monkeypatch.setattr(stage, "quantize", meddling)
    with GgufFile.open(tiny) as source, pytest.raises(BadInput, match=r"while it was read"):
        quantize_levels(source, ["Q8_0", "Q4_0"], tmp_path / "out", threads=2)
    assert files_in(tmp_path / "out") == []


def test_the_hash_goes_ahead_of_the_reader(tmp_path, tiny):
    """Begun before anything else; whoever asks for it afterwards gets the same, and a change is told to all."""
    with GgufFile.open(tiny) as source:
        following = source.hash_ahead()
        assert following is source.hash_ahead()
        assert source.sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()
        os.utime(tiny, ns=(1, 1))
        with pytest.raises(BadInput, match="changed while it was read"):
            quantize_levels(source, ["Q8_0"], tmp_path / "out")


def test_the_command_loads_no_more_than_it_needs(tmp_path, tiny):
    """A small model takes no longer than these imports would."""
    with GgufFile.open(tiny) as source:
        quantize_levels(source, ["Q8_0"], tmp_path / "compiled")  # numba is needed once
    code = (
        "import sys; from bitladder.cli.app import app\n"
        f"try: app(['quantize', {str(tiny)!r}, '--to', 'Q8_0', '--out', {str(tmp_path / 'out')!r}, '--json'])\n"
        "except SystemExit: pass\n"
        "print(','.join(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "out" / "tiny-Q8_0.gguf").exists()
    unused = {
        "torch",
        "transformers",
        "numba",
        "scipy",
        "gguf",
        "yaml",
        "rich",
        "pydantic",
        "jinja2",
        "aiohttp",
        "httpx",
    }
    assert not unused & set(done.stderr.strip().split(","))


def test_another_device_writes_the_same_bytes(tmp_path, tiny, small_pieces):
    with GgufFile.open(tiny) as source:
        first, second = (
            quantize_levels(source, ["Q4_K_M"], tmp_path / folder, effort="fast", device=device)[0].path.read_bytes()
            for folder, device in (("compiled", "cpu"), ("torch", "cpu:0"))
        )
    assert first == second


def test_a_device_that_is_not_there_is_told_before_any_work(tmp_path, tiny):
    from bitladder.stages.job import Build, Work
    from bitladder.stages.quantize import build_levels

    with pytest.raises(UsageError, match="torch has no device 'cuda:99' here"):
        build_levels(str(tiny), parse_levels(["Q8_0"]), Build(out=tmp_path / "out"), Work(device="cuda:99"))
    assert not (tmp_path / "out").exists()


def test_levels_larger_than_their_names_say_so(tmp_path):
    """Rows that blocks do not divide get larger types; who asks for two bits and gets six is told why."""
    from bitladder.cli.app import app

    def said(levels, **sizes):
        name = f"m{len(list(tmp_path.iterdir()))}.gguf"
        path = write_model(tmp_path / name, tiny_weights(**sizes), keys=[*LLAMA_KEYS, TOKENS])
        command = ["quantize", str(path), "--to", levels, "--imatrix", "none", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    narrow = said("Q2_K,Q4_0", width=64, hidden=256)
    assert "Rows of 64 weights do not divide into blocks of 256: larger types take their place in Q2_K (13 of" in narrow
    assert "Q4_0 (" not in narrow
    assert "do not divide" not in said("Q4_0", width=64, hidden=256)
    assert "do not divide" not in said("Q2_K", width=256, hidden=512)


# ---------------------------------------------------------------- going on after an end

CHILD = """
    import sys, time
    from pathlib import Path
    from bitladder.files.gguf import GgufFile
    from bitladder.stages import write_levels as stage
    stage.PIECE_WEIGHTS = 1000
    real = stage.quantize
    def slow(*arguments, **more):
        time.sleep(0.02)
        return real(*arguments, **more)
    stage.quantize = slow
    stage.quantize_levels(GgufFile.open(Path(sys.argv[1])), ["Q8_0", "Q4_K_M"], Path(sys.argv[2]), threads=2)
"""


def killed_run(source: Path, out: Path) -> None:
    """A run that ends by SIGKILL after some tensors were finished."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), str(source), str(out)])
    journal = out / "tiny-Q8_0.gguf.partial.journal"
    deadline = time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_killed_run_leaves_no_final_name_and_is_gone_on_from(tmp_path, tiny, small_pieces, monkeypatch):
    out = tmp_path / "out"
    killed_run(tiny, out)
    assert not [name for name in files_in(out) if name.endswith(".gguf")]
    assert "tiny-Q8_0.gguf.partial" in files_in(out)
    made = []

    def counting(weights, qtype, **more):
        made.append(qtype)
        return quantize(weights, qtype, **more)

    monkeypatch.setattr(stage, "quantize", counting)
    with GgufFile.open(tiny) as source:
        resumed = quantize_levels(source, ["Q8_0", "Q4_K_M"], out, threads=2)
        of_resumed = len(made)
        fresh = quantize_levels(source, ["Q8_0", "Q4_K_M"], tmp_path / "fresh", threads=2)
    assert 0 < of_resumed < len(made) - of_resumed
    for one, other in zip(resumed, fresh, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    assert files_in(out) == ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]


def test_what_a_killed_run_left_is_checked(tmp_path, tiny, small_pieces):
    out = tmp_path / "out"
    killed_run(tiny, out)
    partial = out / "tiny-Q8_0.gguf.partial"
    data = bytearray(partial.read_bytes())
    start = len(data) // 8
    data[start : start + 64] = bytes(byte ^ 255 for byte in data[start : start + 64])
    partial.write_bytes(data)
    with GgufFile.open(tiny) as source:
        resumed = quantize_levels(source, ["Q8_0"], out, threads=2)
        fresh = quantize_levels(source, ["Q8_0"], tmp_path / "fresh", threads=2)
    assert resumed[0].path.read_bytes() == fresh[0].path.read_bytes()


def test_a_partial_file_of_another_source_is_of_no_use(tmp_path, tiny, small_pieces):
    out = tmp_path / "out"
    killed_run(tiny, out)
    write_model(tiny, tiny_weights(seed=5), keys=[*LLAMA_KEYS, TOKENS])
    with GgufFile.open(tiny) as source:
        made = quantize_levels(source, ["Q8_0"], out, threads=2)
        fresh = quantize_levels(source, ["Q8_0"], tmp_path / "fresh", threads=2)
    assert made[0].path.read_bytes() == fresh[0].path.read_bytes()


def test_rubbish_under_the_partial_name_does_not_shine_through(tmp_path):
    """Padding between tensors is never written, so what stood there must be gone."""
    weights = {f"blk.{layer}.attn_q.weight": np.ones((3, 32), np.float16) for layer in range(2)}  # 54 bytes, then 10
    with GgufFile.open(write_model(tmp_path / "tiny-F16.gguf", weights)) as source:
        (fresh,) = quantize_levels(source, ["Q4_0"], tmp_path / "fresh")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tiny-Q4_0.gguf.partial").write_bytes(b"\xff" * fresh.bytes)
        (made,) = quantize_levels(source, ["Q4_0"], tmp_path / "out")
    assert made.path.read_bytes() == fresh.path.read_bytes()


def test_a_complete_file_is_kept_and_another_replaced(tmp_path, tiny):
    with GgufFile.open(tiny) as source:
        (first,) = quantize_levels(source, ["Q8_0"], tmp_path / "out")
        changed = first.path.stat().st_mtime_ns
        (second,) = quantize_levels(source, ["Q8_0"], tmp_path / "out")
        assert (first.reused, second.reused) == (False, True)
        assert first.path.stat().st_mtime_ns == changed
        (third,) = quantize_levels(source, ["Q8_0"], tmp_path / "out", effort="best")
        assert not third.reused
        assert GgufFile.open(third.path).metadata["bitladder.method"].startswith("search best,")


def test_a_limit_on_file_size_is_told(tmp_path, tiny):
    """A real refusal by the system, in a process of its own because the limit stays."""
    code = """
        import resource, sys
        from pathlib import Path
        from bitladder.errors import OutputError
        from bitladder.files.gguf import GgufFile
        from bitladder.stages.write_levels import quantize_levels
        source = GgufFile.open(Path(sys.argv[1]))
        source.sha256
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            quantize_levels(source, ["Q8_0"], Path(sys.argv[2]))
        except OutputError as error:
            print(error.found)
    """
    out = tmp_path / "out"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a limit on disk use or file size is reached" in child.stdout and "are needed" in child.stdout
    assert files_in(out) == []


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A 96 MB source in a process that may take 80 MB beyond what the interpreter and the kernels take."""
    rows = np.tile(np.linspace(-1, 1, 1024, dtype=np.float16), (48 << 10, 1))
    source = write_model(tmp_path / "big-F16.gguf", {"blk.0.ffn_up.weight": rows})
    code = """
        import sys
        from pathlib import Path
        from bitladder.files.gguf import GgufFile
        from bitladder.stages.write_levels import quantize_levels
        import numpy as np
        from bitladder.kernels import quantize, dequantize
        quantize(np.ones((8, 1024), np.float32), "Q8_0")
        dequantize(np.ones((8, 2048), np.uint8), "F16")
        def peak():  # not ru_maxrss, which a process inherits from whoever started it
            text = Path("/proc/self/status").read_text()
            return int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1])
        before = peak()
        quantize_levels(GgufFile.open(Path(sys.argv[1])), ["Q8_0"], Path(sys.argv[2]), threads=2)
        print(peak() - before)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) < 80 << 10  # KiB


def test_a_header_is_as_long_with_an_importance_matrix_as_without():
    """Plans are made before anybody knows whether there will be one, and promise bytes."""
    vectors = {"blk.0.attn_q.weight": np.ones(256, np.float32)}
    assert method_name("good", vectors) != method_name("good", None)
    assert len(method_name("best", vectors)) == len(method_name("fast", None)) == len(level_files._PLANNED)


def test_a_file_of_another_revision_of_the_kernels_is_made_again(tmp_path, tiny, monkeypatch):
    with GgufFile.open(tiny) as source:
        assert not quantize_levels(source, ["Q4_0"], tmp_path / "out")[0].reused
        assert quantize_levels(source, ["Q4_0"], tmp_path / "out")[0].reused
        monkeypatch.setattr(stage, "REVISION", "9999")
        assert not quantize_levels(source, ["Q4_0"], tmp_path / "out")[0].reused
