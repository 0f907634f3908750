"""Code that comes with a checkpoint never runs: not through copies of its files, not in the converter's process."""

import io
import json
import os
import pickle
import string
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from bitladder.errors import BadFile, BitladderError
from bitladder.files import fence as fence_module
from bitladder.files import staging
from bitladder.files.checkpoint import read_checkpoint
from bitladder.files.companions import companions_of_folder, companions_of_gguf, tokenizer_differences
from bitladder.files.converter import Converter, find_converter
from bitladder.files.gguf import read_header
from bitladder.files.gguf_header import read_file_header
from bitladder.files.sources import resolve
from engine_model import write_engine_model

EVIL = "open('PWNED', 'a').write(__name__ + '\\n')\nclass Evil:\n    pass\n"
"""Leaves a trace in the working folder, which is the one that the converter's process may write."""
CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 128,
    "seq_length": 128, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000.0,
}  # fmt: skip
WEIGHTS = save(
    {"transformer.wte.weight": np.zeros((96, 64), np.float32), "lm_head.weight": np.zeros((96, 64), np.float32)}
)


def evil_folder(folder):
    """A checkpoint of a family that the converter reads with trust_remote_code, and a Python file beside it."""
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(EVIL)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


WAYS = {
    "plain": ("tokenizer_config.json", '{"auto_map": $here}'),
    "escaped": ("tokenizer_config.json", '{"\\u0061uto_map": $here}'),
    "all escapes": ("tokenizer_config.json", '{"' + "".join(f"\\u{ord(c):04x}" for c in "auto_map") + '": $here}'),
    "by path": ("tokenizer_config.json", '{"\\u0061uto_map": $path}'),
    "in config": ("config.json", '$config, "\\u0061uto_map": $path}'),
    "nested config": ("config.json", '$config, "text_config": {"model_type": "x", "\\u0061uto_map": $here}}'),
    "in a list": ("config.json", '$config, "parts": [[{"\\u0061uto_map": $path}]]}'),
    "twice": ("tokenizer_config.json", '{"auto_map": {}, "\\u0061uto_map": $here}'),
    "in processor": ("processor_config.json", '{"processor_class": "X", "\\u0061uto_map": $here}'),
    "in preprocessor": ("preprocessor_config.json", '{"\\u0061uto_map": $here}'),
    "in generation": ("generation_config.json", '{"custom_generate": "$folder", "\\u0061uto_map": $here}'),
    "in tokenizer": ("tokenizer.json", '{"model": {"type": "BPE", "\\u0061uto_map": $here}}'),
    "class by file": ("tokenizer_config.json", '{"tokenizer_class": "evil.Evil"}'),
    "class by path": ("tokenizer_config.json", '{"tokenizer_class": "$folder/evil.Evil"}'),
    "repository": ("config.json", '$config, "_name_or_path": "$folder", "trust_remote_code": true}'),
    "kernels": ("config.json", '$config, "_attn_implementation": "$folder", "attn_implementation": "evil/kernel"}'),
    "files elsewhere": ("tokenizer_config.json", '{"tokenizer_file": "/etc/passwd", "vocab_file": "$folder/evil.py"}'),
    "dtype": ("config.json", '$config, "torch_dtype": "__import__(\'evil\')", "quantization_config": "evil"}'),
    "template": ("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
}
"""Ways to name code in a folder with ``evil.py``: the file, and its text ($here, $path: the class in two ways)."""


def plant(folder, way):
    """Name the code in this way."""
    name, text = WAYS[way]
    places = {
        key: json.dumps(
            {auto: [f"{place}evil.Evil", None] for auto in ("AutoTokenizer", "AutoConfig", "AutoProcessor")}
        )
        for key, place in (("here", ""), ("path", f"{folder}--"))
    }
    filled = string.Template(text).substitute(**places, folder=folder, config=json.dumps(CONFIG)[:-1])
    (folder / name).write_text(filled)


def names_of_keys(value):
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in names_of_keys(item)}
    return {key for item in value for key in names_of_keys(item)} if isinstance(value, list) else set()


@pytest.mark.parametrize("way", WAYS)
def test_copies_name_no_code(tmp_path, way):
    folder = evil_folder(tmp_path / "model")
    plant(folder, way)
    stage = tmp_path / "stage"
    staging.stage_checkpoint(read_checkpoint(folder), stage)
    listed = {path.name for path in stage.rglob("*")}
    assert listed <= {
        *staging.CONFIGURATIONS,
        *staging.VOCABULARIES,
        *staging.TEXTS,
        *staging.PIECES,
        staging.INDEX,
        "model.safetensors",
    }
    assert {path.name for path in stage.rglob("*") if path.is_symlink()} == {"model.safetensors"}
    for path in stage.glob("*.json"):
        keys = names_of_keys(json.loads(path.read_bytes()))
        assert not keys & staging.CODE_KEYS
        assert not [key for key in keys if key.endswith("_file")]
        assert str(folder) not in path.read_text() or way == "class by path"  # a class's name finds no file


def test_tokens_are_no_keys(tmp_path):
    """A vocabulary may hold a token of such a name; duplicates, lone surrogates and numbers keep one meaning."""
    folder = evil_folder(tmp_path / "model")
    vocabulary = (
        '{"model": {"vocab": {"auto_map": 7, "my_file": 8, "\\ud800": 9, "a": 1, "a": 2}, "scores": [1e-7, -3.5]}}'
    )
    (folder / "tokenizer.json").write_text(vocabulary)
    staging.stage_checkpoint(read_checkpoint(folder), tmp_path / "stage")
    found = json.loads((tmp_path / "stage" / "tokenizer.json").read_bytes())
    assert found == {"model": {"vocab": {"auto_map": 7, "my_file": 8, "\ud800": 9, "a": 2}, "scores": [1e-7, -3.5]}}


def pickled():
    return pickle.dumps({"weights": np.zeros(3)})


def zipped():
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
    return raw.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", zipped()),
        ("model.safetensors", pickled()),
        ("model.safetensors", WEIGHTS + zipped()),  # both a zip and safetensors
        ("model.safetensors", zipped() + WEIGHTS),
        ("model.safetensors", b""),
        ("config.json", b"\x80\x04."),
        ("config.json", json.dumps(CONFIG).encode("utf-16")),
        ("config.json", b"[" * 100_000 + b"]" * 100_000),
        ("config.json", b'{"a":' * 500 + b"1" + b"}" * 500),
        ("config.json", b'{"n": ' + b"9" * 5000 + b"}"),
        ("config.json", b"[]"),
        ("tokenizer_config.json", b"not json"),
        ("tokenizer_config.json", b'{"a":' * 500 + b"1" + b"}" * 500),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model":' * 101 + b"1" + b"}" * 101),
        ("special_tokens_map.json", b"[1]"),
        ("merges.txt", b"\xff\xfe\x00"),
        ("tokenizer.model", pickled()),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.model", b""),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content):
    folder = evil_folder(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(BadFile) as raised:
        staging.stage_checkpoint(read_checkpoint(folder), tmp_path / "stage")
    assert name in str(raised.value)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": "."}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"weight_map": {"a": ["model.safetensors"]}},
        {"weight_map": {"a": {"b": 1}}},
        {"weight_map": []},
        {"weight_map": {"a": "folder.safetensors"}},
        {"weight_map": {"a": "x\0.safetensors"}},
    ],
)
def test_an_index_names_safetensors_beside_it_alone(tmp_path, index):
    folder = evil_folder(tmp_path / "model")
    (folder / "folder.safetensors").mkdir()
    (folder / "pytorch_model.bin").write_bytes(zipped())
    (folder / staging.INDEX).write_text(json.dumps(index))
    with pytest.raises(BadFile):
        read_checkpoint(folder)


@pytest.mark.parametrize("dtype", [["BF16"], {"a": 1}, None, 7])
def test_a_dtype_that_is_none(tmp_path, dtype):
    folder = evil_folder(tmp_path / "model")
    head = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"ab")
    with pytest.raises(BadFile, match="unknown dtype"):
        read_checkpoint(folder)


def test_special_files_are_not_read(tmp_path):
    folder = evil_folder(tmp_path / "model")
    os.mkfifo(folder / "tokenizer.json")  # would wait for ever
    with pytest.raises(BadFile, match="no regular file"):
        staging.stage_checkpoint(read_checkpoint(folder), tmp_path / "stage")


def test_twins_are_named_and_variants_left_alone(tmp_path):
    folder = evil_folder(tmp_path / "model")
    (folder / "model.fp32.safetensors").write_bytes(WEIGHTS)  # a variant that transformers loads only when asked
    (folder / "optimizer.safetensors").write_bytes(save({"exp_avg": np.zeros(3, np.float32)}))
    assert [shard.name for shard in read_checkpoint(folder).shards] == ["model.safetensors"]
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(BadFile, match=r"is in model\.fp32\.safetensors and in other\.safetensors"):
        read_checkpoint(folder)


# ---------------------------------------------------------------- the process


def fence(tmp_path, script, **bounds):
    """Run a program in place of the converter's behind the fence; returns (exit code, output, the work folder)."""
    converter = tmp_path / "converter"
    for part in ("conversion", "gguf-py/gguf"):
        (converter / part).mkdir(parents=True)
        (converter / part / "__init__.py").write_text("")
    (converter / "convert_hf_to_gguf.py").write_text(script)
    work = tmp_path / "work"
    work.mkdir()
    job = {
        "converter": Converter(converter, "").search_path,
        "packages": fence_module.package_folders(),
        "work": str(work),
        "task": "convert",
        "arguments": [str(tmp_path)],
        "without_mtp": False,
        **{"data_bytes": 4 << 30, "file_bytes": 1 << 30, "cpu_seconds": 300, **bounds},
    }
    with fence_module.fenced(job, fence_module.environment(work), work) as child:
        output = child.stdout.read()
        code = child.wait()
    return code, output, work


LOADING = """
import json, os, sys, warnings
from pathlib import Path
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

def main():
    for folder in json.loads(Path(sys.argv[1], "folders.json").read_text()):
        for auto in (AutoTokenizer, AutoConfig, AutoProcessor, GenerationConfig):
            try:
                auto.from_pretrained(folder, trust_remote_code=True)
            except BaseException as error:
                pass
        print(folder, "PWNED" if Path("PWNED").exists() else "clean")
"""


@pytest.mark.model
def test_the_process_runs_none_of_it_even_uncleaned(tmp_path, monkeypatch):
    """The second wall alone: transformers with trust_remote_code on the hostile folders as they are."""
    folders = []
    for number, way in enumerate(WAYS):
        folder = evil_folder(tmp_path / f"model{number}")
        plant(folder, way)
        folders.append(str(folder))
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    code, output, work = fence(tmp_path, LOADING)
    assert code == 0, output
    assert output.count("clean") == len(folders)
    assert not (work / "PWNED").exists()
    # The same without the fence does run it, else this test would prove nothing.
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "folders.json").write_text(json.dumps(folders[:2]))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    program = LOADING + "\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=bare, capture_output=True, text=True, check=False
    )
    assert (bare / "PWNED").exists(), done.stdout + done.stderr


TRYING = """
import ctypes, importlib.util, json, os, pickle, runpy, socket, subprocess, sys, urllib.request
from pathlib import Path

outside = Path(__file__).parents[1]
evil = outside / "evil.py"

def module():
    spec = importlib.util.spec_from_file_location("evil", evil)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

def search_path():
    sys.path.insert(0, str(outside))
    import evil

def in_work():
    Path("inner.py").write_text(evil.read_text())
    runpy.run_path("inner.py")

def relative():
    exec(compile(evil.read_text(), "../evil.py", "exec"), {})

def dotted():
    exec(compile(evil.read_text(), sys.prefix + "/lib/../../evil.py", "exec"), {})

def unpickle():
    class Load:
        def __reduce__(self):
            return (print, ("unpickled",))
    pickle.loads(pickle.dumps(Load()))

def torch_load():
    import torch
    torch.save({"a": Load()}, "weights.bin")
    torch.load("weights.bin", weights_only=False)

class Load:
    pass

attempts = {
    "module": module,
    "search path": search_path,
    "in work": in_work,
    "relative": relative,
    "dotted": dotted,
    "run": lambda: runpy.run_path(str(evil)),
    "unpickle": unpickle,
    "torch.load": torch_load,
    "subprocess": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "socket": lambda: socket.socket().connect(("127.0.0.1", 9)),
    "unix socket": lambda: socket.socket(socket.AF_UNIX).connect("/tmp/x"),
    "name": lambda: socket.getaddrinfo("localhost", 80),
    "url": lambda: urllib.request.urlopen("file:///etc/passwd"),
    "write": lambda: (outside / "written").write_text("x"),
    "append": lambda: open(outside / "evil.py", "a"),
    "through a link": lambda: (os.symlink(outside, "link"), open("link/written", "w")),
    "remove": lambda: os.remove(evil),
    "rename": lambda: os.rename(evil, "here"),
    "rename out": lambda: (Path("own").write_text("x"), os.rename("own", outside / "own")),
    "library": lambda: (Path("lib.so").write_text("x"), ctypes.CDLL(os.path.abspath("lib.so"))),
}

def main():
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "went through"
        except BaseException as error:
            found[name] = type(error).__name__
    Path("found.json").write_text(json.dumps({"found": found, "env": dict(os.environ)}))
"""


def test_what_a_conversion_has_no_need_of_is_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://name:password@proxy:1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "evil.py"))
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "sitecustomize.py").write_text(EVIL)
    code, output, work = fence(tmp_path, TRYING)
    assert code == 0, output
    report = json.loads((work / "found.json").read_text())
    assert {name: kind for name, kind in report["found"].items() if kind != "Fenced"} == {}
    assert not (work / "PWNED").exists()
    assert not (tmp_path / "written").exists()
    assert (tmp_path / "evil.py").read_text() == EVIL
    expected = {"HOME", "TMPDIR", "HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "PATH", "LC_ALL", "HF_HUB_OFFLINE"}
    assert expected <= set(report["env"])
    assert not [name for name, value in report["env"].items() if "secret" in value or "proxy" in value.lower()]
    homes = [report["env"][name] for name in ("HOME", "HF_HOME", "HF_MODULES_CACHE")]
    assert all(home.startswith(str(work)) for home in homes)


@pytest.mark.parametrize(
    ("script", "bounds", "words"),
    [
        ("def main():\n    bytearray(3 << 30)\n", {"data_bytes": 2 << 30}, "MemoryError"),
        ("def main():\n    open('big', 'wb').write(bytes(1 << 20))\n", {"file_bytes": 1 << 16}, "File too large"),
        ("def main():\n    while True: pass\n", {"cpu_seconds": 6}, ""),
    ],
)
def test_the_process_has_bounds(tmp_path, script, bounds, words):
    code, output, _ = fence(tmp_path, script, **bounds)
    assert code != 0
    assert words in output


@pytest.mark.model
@pytest.mark.parametrize("way", ["escaped", "by path", "in config"])
def test_the_attack_end_to_end(tmp_path, monkeypatch, way):
    """What ran the planted code before: the converter reads this family's tokenizer with trust_remote_code."""
    monkeypatch.setenv("BITLADDER_CONVERTER", str(find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))  # a file that is there already tries nothing
    monkeypatch.chdir(tmp_path)
    folder = evil_folder(tmp_path / "model")
    trace = tmp_path / "PWNED"
    (folder / "evil.py").write_text(EVIL.replace("'PWNED'", repr(str(trace))))
    plant(folder, way)
    source = resolve(str(folder))
    assert source.unread_tokenizer, "the planted code is the only tokenizer that there is"
    assert not [key for key in read_header(source.path).metadata if key.startswith("tokenizer.")]
    assert not trace.exists()


def test_code_of_the_folder_beside_which_a_user_stands(tmp_path, monkeypatch):
    """A module of the converter's names in the current folder is not imported."""
    (tmp_path / "torch.py").write_text(EVIL)
    (tmp_path / "gguf.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    code, output, work = fence(tmp_path, "import torch, gguf\ndef main():\n    print(gguf.__file__)\n")
    assert code == 0, output
    assert str(tmp_path / "converter" / "gguf-py") in output
    assert not (work / "PWNED").exists() and not (tmp_path / "PWNED").exists()


def test_every_error_is_ours(tmp_path):
    """Bytes of a checkpoint's small files flipped at random: staged or refused, nothing else."""
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(200):
        folder = evil_folder(tmp_path / f"m{number}")
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
        path = folder / str(rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]))
        raw = bytearray(path.read_bytes())
        raw[int(rng.integers(0, min(len(raw), 200)))] ^= int(rng.integers(1, 256))
        path.write_bytes(raw)
        try:
            staging.stage_checkpoint(read_checkpoint(folder), tmp_path / f"s{number}")
        except BitladderError:
            refused += 1
    assert refused > 20


# ---------------------------------------------------------------- outside conversion: tokenizers beside levels

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    "pre_tokenizer": {"type": "Whitespace"},
}


def marked(folder, trace):
    """A checkpoint whose code, by any way in, leaves a trace."""
    evil_folder(folder)
    for name in ("evil.py", "tokenizer_evil.py"):
        (folder / name).write_text(EVIL.replace("'PWNED'", repr(str(trace))))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.mark.model
def test_tokenizers_of_hostile_folders_run_nothing(tmp_path, monkeypatch):
    """Nobody is asked and nothing runs, whoever answers yes; a tokenizer that needs no code is read all the same."""
    trace = tmp_path / "TRACE"
    folder = marked(tmp_path / "model", trace)
    code = {"AutoConfig": "tokenizer_evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "evilx", "auto_map": code}))
    reads = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": code, "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(reads))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert tokenizer_differences(folder, {"a b": [0, 1]}, checkpoint=folder) == []
    assert tokenizer_differences(folder, {"a b": [0, 1]}) == []
    assert not trace.exists()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_names_code_lies_beside_a_level(tmp_path, way):
    folder = marked(tmp_path / "model", tmp_path / "TRACE")
    plant(folder, way)
    if way == "in tokenizer":
        (folder / "tokenizer_config.json").write_text("{}")
    found = companions_of_folder(folder)
    assert not [name for name in found.files if name.endswith(".py")]
    assert set(found.files) <= {*staging.CONFIGURATIONS, *staging.VOCABULARIES, *staging.TEXTS, *staging.PIECES}
    for value in (found.config, *(json.loads(raw) for name, raw in found.files.items() if name.endswith(".json"))):
        assert not names_of_keys(value) & staging.CODE_KEYS


@pytest.mark.model
@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        [1],
    ],
)
def test_files_beside_a_gguf_are_not_read(tmp_path, monkeypatch, beside):
    """What comes of the file alone comes of it among hostile neighbours, too."""
    trace = tmp_path / "TRACE"
    folder = marked(tmp_path / "model", trace)
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    write_engine_model(folder / "m-F16.gguf")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    found = companions_of_gguf(folder / "m-F16.gguf", pre="", tied=True)
    alone = companions_of_gguf(write_engine_model(tmp_path / "alone" / "m-F16.gguf"), pre="", tied=True)
    assert found.files == alone.files
    assert found.config == alone.config
    assert not trace.exists()


LIMIT = 120
"""Seconds within which a command must end; it takes a few."""


@pytest.mark.parametrize("name", ["config.json", staging.INDEX, "model.safetensors", "m.gguf"])
def test_named_pipes_do_not_hang(tmp_path, name):
    folder = evil_folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    model = folder / name if name.endswith(".gguf") else folder
    done = subprocess.run(
        [sys.executable, "-m", "bitladder", "plan", str(model)],
        capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == BadFile.exit_code
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no /proc here")  # noqa: PTH110
@pytest.mark.parametrize("name", ["config.json", staging.INDEX, "model.safetensors", "tokenizer.json", "m.gguf"])
@pytest.mark.parametrize("target", ["/proc/self/mem", "/dev/zero", "/dev/tty"])
def test_links_to_what_is_no_file_of_a_model(tmp_path, name, target):
    folder = evil_folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(BadFile):
        if name == "m.gguf":
            read_file_header(folder / name)
        staging.stage_checkpoint(read_checkpoint(folder), tmp_path / "stage")
