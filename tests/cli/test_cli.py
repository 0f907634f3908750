"""The command line as other programs use it: JSON fields, exit codes, one clear message for bad input."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitladder import __version__, pipeline
from bitladder.cli.app import app
from bitladder.errors import UsageError
from bitladder.records import evaluation
from bitladder.stages import run_facts as facts
from cloud_server import serving
from engine_model import write_engine_model

PROSE = (
    "The lamp stood in the window all winter, and each evening somebody lit it. Nobody could say who had begun "
    "the custom, only that boats coming home late looked for it, and that children were sent to bed when it burned. "
)
WORKLOAD = """
name: small
inputs:
  - id: capital
    prompt: What is the capital of France? Answer with one sentence.
    tags: [facts]
    max_tokens: 12
    expect: {contains_all: Paris}
  - id: count
    prompt: Count from one to five.
    tags: [counting]
    max_tokens: 12
    expect: {regex: "."}
"""


QUICK = ("--effort", "fast", "--imatrix", "none")
"""What a test of something else than quality asks for."""


def bitladder(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Six documents: fewer give no interval that a bar could be held against."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Chapter {number}. " + PROSE * 2}) + "\n" for number in range(6)))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model for what does not hang on a real one: a run on that is below."""
    return write_engine_model(tmp_path / "tiny-F16.gguf")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(WORKLOAD)
    return path


def test_version():
    assert bitladder("--version").stdout.strip() == __version__


def test_help_is_quick():
    """No heavy package is imported for --help (a time would fail on a busy machine, an import does not)."""
    code = (
        "import sys; from bitladder.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "ours = {name for name in sys.modules if name.startswith('bitladder.')}\n"
        "print(','.join(sorted({name.split('.')[0] for name in sys.modules} | ours)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numba", "llvmlite", "scipy", "numpy", "gguf", "xllamacpp"}
    heavy |= {"aiohttp", "httpx", "sqlalchemy", "jinja2", "jsonschema", "yaml", "rich", "pydantic", "asyncio"}
    heavy |= {"bitladder.report", "bitladder.stages", "bitladder.files.gguf"}
    assert not heavy & set(done.stderr.strip().split(","))
    assert "quantize" in done.stdout


def test_plan_imports_no_torch(demo_gguf):
    code = (
        "import sys; from bitladder.cli.app import app\n"
        f"try: app(['plan', {str(demo_gguf)!r}, '--json'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numba') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


def test_plan(demo_gguf):
    done = bitladder("plan", demo_gguf, "--json")
    levels = json.loads(done.stdout)["levels"]
    assert done.exit_code == 0
    assert {"level", "tensor_bytes", "file_bytes", "bpw", "fits", "reason"} <= set(levels[0])
    assert [one["file_bytes"] for one in levels] == sorted((one["file_bytes"] for one in levels), reverse=True)
    assert "Q4_K_M" in bitladder("plan", demo_gguf).stdout


def test_plan_reads_the_header_only(demo_gguf, tmp_path):
    """A copy whose tensor data is a hole."""
    from bitladder.files.gguf import read_header

    hole = tmp_path / "hole.gguf"
    with hole.open("wb") as file:
        file.write(demo_gguf.read_bytes()[: read_header(demo_gguf).header_bytes])
        file.truncate(demo_gguf.stat().st_size)
    assert json.loads(bitladder("plan", hole, "--json").stdout)["levels"]


def test_planned_bytes_are_written_bytes(demo_gguf, tmp_path):
    planned = {one["level"]: one for one in json.loads(bitladder("plan", demo_gguf, "--json").stdout)["levels"]}
    done = bitladder("quantize", demo_gguf, "--to", "q8_0,Q2_K", "--out", tmp_path, *QUICK, "--json")
    files = json.loads(done.stdout)["files"]
    assert [file["level"] for file in files] == ["Q8_0", "Q2_K"]
    for file in files:
        assert {"level", "path", "bytes", "bpw", "seconds"} <= set(file)
        assert file["bytes"] == planned[file["level"]]["file_bytes"] == Path(file["path"]).stat().st_size
    inspected = json.loads(bitladder("inspect", files[1]["path"], "--json").stdout)
    assert {"architecture", "bpw", "type_share", "tensors"} <= set(inspected)
    assert inspected["bpw"] == pytest.approx(files[1]["bpw"])
    assert sum(inspected["type_share"].values()) == pytest.approx(1)
    assert inspected["tensors"][0].keys() >= {"name", "shape", "qtype"}
    assert Path(files[1]["path"]).name.endswith("-Q2_K.gguf")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", "nowhere.gguf"], 2, "no model 'nowhere.gguf'"),
        (["plan", "MODEL", "--levels", "Q4_KM"], 2, "Did you mean Q4_K_M?"),
        (["plan", "MODEL", "--levels", ""], 2, "'' names no level"),
        (["plan", "MODEL", "--ctx", "999999999"], 2, "999999999"),
        (["quantize", "MODEL", "--to", "Q9"], 2, "Q9"),
        (["quantize", "MODEL", "--to", ","], 2, "names no level"),
        (["quantize", "MODEL", "--to", "Q8_0", "--effort", "heroic"], 2, "'heroic'"),
        (["quantize", "MODEL", "--to", "Q8_0", "--imatrix", "nowhere.dat"], 2, "nowhere.dat"),
        (["quantize", "MODEL", "--to", "AWQ-Q3_KM"], 2, "Did you mean AWQ-Q3_K_M?"),
        (["quantize", "MODEL", "--to", "AWQ-Q2_K", "--imatrix", "none"], 2, "ask for Q2_K"),
        (["measure", "MODEL", "--levels", "Q8_0", "--text", "nowhere.txt"], 2, "nowhere.txt"),
        (["measure", "MODEL", "--file", "nowhere.gguf"], 2, "nowhere.gguf"),
        (["run", "MODEL", "--bar", "goodness > 3"], 2, "goodness"),
        (["run", "MODEL", "--workload", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["report", "nowhere.json"], 2, "nowhere.json"),
        (["inspect", "nowhere.gguf"], 2, "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_message(arguments, code, says, demo_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = bitladder(*[str(demo_gguf) if word == "MODEL" else word for word in arguments])
    assert done.exit_code == code
    assert says in re.sub(r"\s+", " ", done.stderr)
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["plan", "x.gguf", "--ctx", "abc"], "Invalid value for '--ctx'"),
        (["plan", "--no-such-option"], "No such option"),
        (["no-such-verb"], "No such command"),
    ],
)
def test_what_no_verb_understands_is_json_too(arguments, found):
    done = bitladder(*arguments, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["found"].startswith(found)
    assert bitladder(*arguments).stdout == ""


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--reference", "{}/answers.jsonl"], "answers.jsonl' cannot be read"),
        (["--text", "{}/short.txt"], "its longest document has 6 bytes"),
    ],
)
def test_what_a_run_cannot_use_is_told_before_the_model_is_fetched(tmp_path, options, found):
    (tmp_path / "short.txt").write_text("short\n")
    done = bitladder("run", "hf:nobody/nothing", *(option.format(tmp_path) for option in options))
    assert done.exit_code == 2
    assert found in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--effort", "best"],
        ["--levels", "Q6_K,Q4_K_M", "--effort", "fast", "--bar", "kl < 0.05", "--imatrix", "none", "--trust-python"],
        ["--reference", "Q8_0", "--workload", "mine.yaml", "--text", "a b.txt", "--text", "c.txt"],
        ["--also", "http://127.0.0.1:1/v1#m", "--key-env", "127.0.0.1:1=KEY", "--judge", "http://127.0.0.1:2/v1#j"],
    ],
)
def test_the_command_that_a_run_writes_down_asks_for_the_same_run(options, monkeypatch):
    wanted = []

    def note(settings, *_, **__):
        wanted.append(settings)
        raise UsageError("Enough.")

    monkeypatch.setattr(pipeline, "run", note)
    bitladder("run", "some.gguf", "--ctx", "512", "--out", "here", *options)
    words = shlex.split(facts.commands(wanted[0], 512, wanted[0].out)[0])
    assert words[0] == "bitladder"
    bitladder(*words[1:])
    assert wanted[0] == wanted[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--key-env", "KEY"], "--key-env is for endpoints"),
        (["--key-file", "key.txt", "--reference", "Q8_0"], "--key-file is for endpoints"),
        (["--rpm", "6"], "--rpm is for endpoints"),
        (["--judge-model", "m", "--also", "http://127.0.0.1:1/v1#m"], "--judge-model is for a judge"),
        (["--judge-key-env", "KEY"], "--judge-key-env is for a judge"),
        (["--rpm", "nan", "--also", "http://127.0.0.1:1/v1#m"], "--rpm is nan"),
    ],
)
def test_options_that_nothing_would_follow_are_refused(options, says):
    for verb in ("run", "gate"):
        shown = bitladder(verb, "absent.gguf", "--levels", "Q8_0", *options)
        assert shown.exit_code == 2 and says in shown.stderr


def test_bounds_let_no_nan_through(tmp_path):
    shown = bitladder("sweep", str(tmp_path / "absent.yaml"), "--lease", "nan")
    assert shown.exit_code == 2 and "--lease is nan" in shown.stderr


def test_an_effort_that_is_none_is_told_before_any_work(tmp_path):
    for verb in (["run"], ["gate", "--levels", "Q8_0"], ["measure"], ["quantize", "--to", "Q8_0"]):
        shown = bitladder(verb[0], str(tmp_path / "absent.gguf"), *verb[1:], "--effort", "hard")
        assert shown.exit_code == 2
        assert "--effort must be fast, good or best" in shown.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{}"],
        ["measure", "{}", "--levels", "Q8_0"],
        ["imatrix", "{}", "--out", "i.gguf"],
        ["quantize", "{}", "--to", "Q8_0"],
        ["recipe", "{}", "--bpw", "5"],
        ["smallest", "{}"],
        ["gate", "{}", "--bar", "kl < 0.1", "--levels", "Q8_0"],
    ],
)
@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
def test_a_device_that_is_not_there_is_told_before_any_work(arguments, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = bitladder(*(argument.format("hf:nobody/nothing") for argument in arguments), "--device", device)
    assert done.exit_code == 2
    assert f"torch has no device '{device}' here; there is cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == []


def test_errors_are_json_too(tmp_path):
    done = bitladder("plan", tmp_path / "nowhere.gguf", "--json")
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "BadInput"
    assert error["do"]


def test_a_text_too_short_to_measure(demo_gguf, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Hardly anything.")
    done = bitladder("measure", demo_gguf, "--levels", "Q8_0", "--text", short)
    assert done.exit_code == 2
    assert "too short" in done.stderr


@pytest.mark.model
def test_measure_levels_and_files_side_by_side(tiny, text, tmp_path):
    bitladder("quantize", tiny, "--to", "Q4_K_S", "--out", tmp_path, *QUICK)
    other = next(tmp_path.glob("*Q4_K_S.gguf"))
    done = bitladder("measure", tiny, "--levels", "Q8_0,Q4_K_S", "--file", other, "--text", text, *QUICK, "--json")
    high, made, file = json.loads(done.stdout)["levels"]
    wanted = {"level", "kl_mean", "kl_low", "kl_high", "kl_p99", "ppl", "ppl_ratio", "top1", "tokens"}
    assert wanted <= set(high)
    assert [high["level"], made["level"], file["level"]] == ["Q8_0", "Q4_K_S", other.stem]
    assert 0 < high["kl_mean"] < made["kl_mean"]
    assert file["kl_mean"] == pytest.approx(made["kl_mean"], rel=1e-5)


@pytest.mark.model
def test_a_run_decides_reports_and_is_reused(demo_gguf, text, workload, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_OTHERS_SHARE", 1.0)  # whatever else this machine does, speeds are reused
    arguments = [
        "run", demo_gguf, "--levels", "Q8_0,Q2_K", "--text", text, "--workload", workload,
        "--bar", "kl < 0.05", "--imatrix", "none", "--out", tmp_path / "out",
    ]  # fmt: skip
    done = bitladder(*arguments, "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == 0
    assert record["decision"]["quality"] == record["decision"]["speed"] == "Q8_0"
    assert {one["level"]: one["status"] for one in record["decision"]["verdicts"]}["Q2_K"] == "fails the bar"
    assert record["source"]["quantized"] is True
    assert any("quantized" in warning for warning in record["warnings"])
    assert record["reused"] == []
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Q2_K" in html
    assert not re.search(r"https?://(?!www\.w3\.org/)", html)  # nothing is fetched

    again = bitladder(*arguments)
    assert "Reused: fidelity of Q8_0, Q2_K." in again.stderr
    assert "Reused: answers and speed of" in again.stderr
    shown = bitladder("report", tmp_path / "out" / "run.json", "--out", tmp_path / "copy.html")
    assert shown.exit_code == 0
    assert (tmp_path / "copy.html").exists()


@pytest.mark.model
def test_a_bar_that_no_level_meets_is_exit_4_and_still_reports(tiny, text, workload, tmp_path):
    done = bitladder(
        "run", tiny, "--levels", "Q2_K", "--text", text, "--workload", workload,
        "--bar", "kl < 0.000001", "--imatrix", "none", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 4
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.model
def test_a_level_as_reference_and_a_model_elsewhere_in_one_table(tiny, text, workload, tmp_path):
    with serving(lambda prompt: "Paris." if "France" in prompt else prompt) as cloud:
        done = bitladder(
            "run", tiny, "--levels", "Q4_K_S", "--reference", "Q8_0", "--also", f"{cloud.url}#m",
            "--text", text, "--workload", workload, "--bar", "passes >= reference - 90 points",
            "--imatrix", "none", "--threads", "1", "--out", tmp_path / "out", "--json",
        )  # fmt: skip
    record = json.loads(done.stdout)
    statuses = {one["level"]: one["status"] for one in record["decision"]["verdicts"]}
    name = f"m@{cloud.url.removeprefix('http://').removesuffix('/v1')}"
    assert set(statuses) == {"Q8_0", "Q4_K_S", name}
    assert (statuses["Q8_0"], record["reference"]) == ("reference", "Q8_0")
    assert [one["level"] for one in record["answers"]] == ["Q8_0", "Q4_K_S", name]
    assert [one["level"] for one in record["fidelities"]] == ["Q4_K_S"]
    assert f"--also {cloud.url}#m" in record["commands"][0].replace("'", "")
    assert name in (tmp_path / "out" / "report.html").read_text()

    against_source = bitladder("measure", tiny, "--levels", "Q4_K_S", "--text", text, "--imatrix", "none", "--json")
    higher = bitladder(
        "measure", tiny, "--levels", "Q4_K_S", "--reference", "Q8_0", "--text", text, "--imatrix", "none", "--json"
    )
    (one,), (other,) = (json.loads(found.stdout)["levels"] for found in (against_source, higher))
    assert one["ppl"] == other["ppl"]
    assert one["ppl_reference"] != other["ppl_reference"]
    assert other["kl_mean"] == pytest.approx(record["fidelities"][0]["kl_mean"])  # made anew, and from the file


def test_references_and_endpoints_that_cannot_be(demo_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    for arguments, said in (
        (("run", "--reference", "Q4_K_N"), "Q4_K_M"),
        (("run", "--also", "ftp://x#m"), "no address"),
        (("run", "--also", "https://u:p@x/v1#m"), "neither a user"),
        (("run", "--reference", "https://x.invalid/v1#m", "--key-env", "NOT_SET"), "--yes"),
        (("run", "--reference", "https://x.invalid/v1#m", "--key-env", "NOT_SET", "--yes"), "NOT_SET is empty"),
        (("measure", "--reference", "https://x.invalid/v1#m"), "Only the source or one of its levels"),
        (("gate",), "--levels"),
    ):
        done = bitladder(arguments[0], demo_gguf, *arguments[1:])
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
        assert "sk-secret" not in done.stderr


def test_nothing_fits_is_exit_3(demo_gguf, tmp_path, monkeypatch):
    from bitladder.describe.machine import Machine

    tiny = Machine("toy", 1, (), 2**26, 2**26, 2**40)
    monkeypatch.setattr("bitladder.stages.run_given.probe_machine", lambda _folder=None: tiny)
    done = bitladder("run", demo_gguf, "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert "--ctx" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.model
def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(demo_gguf, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitladder", "quantize", demo_gguf, "--to", "Q6_K", "--out", out, "--threads", "1"]
    command += ["--imatrix", "none"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    if process.returncode != 0:  # it may have been quick enough to finish
        assert process.returncode == 130
        assert "Stopped" in said
        assert not list(out.glob("*.gguf"))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert len(list(out.glob("*-Q6_K.gguf"))) == 1
    assert not list(out.glob("*.partial*"))


@pytest.mark.parametrize("verb", [["plan"], ["plan", "smollm2-135m"], ["recommend"]])
@pytest.mark.parametrize("speed", ["nan", "inf"])
def test_a_least_speed_is_a_number(verb, speed):
    result = CliRunner().invoke(app, [*verb, "--min-speed", speed])
    assert result.exit_code == 2
    assert f"--min-speed is {speed}" in result.stderr
