"""Every command that docs/serve.md shows is run: gateways until they answer, other verbs to their end."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server import serving
from serving_process import ask, clean_environment, own_environment, program_in, run_cli, started
from tiny_engine import write_tiny

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
RUN, OUTPUT = {"console", "sh"}, {"text"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
WORKLOAD = """
inputs:
  - {id: one, prompt: Hello, max_tokens: 4, expect: {max_words: 1000}}
  - {id: two, prompt: Goodbye, max_tokens: 4, expect: {max_words: 1000}}
"""


def examples() -> list[str]:
    blocks = [body for language, body in FENCE.findall(PAGE.read_text()) if language in RUN]
    return [line.split("  #")[0].strip() for body in blocks for line in body.splitlines() if line.strip()]


def test_every_block_is_run_or_marked_as_output():
    languages = {language for language, _ in FENCE.findall(PAGE.read_text())}
    assert languages <= RUN | OUTPUT
    assert len(examples()) >= 15
    assert all(re.match(r"(\w+=\S+ )?bitladder (serve|export|key) ", line) for line in examples())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str], dict[str, str]]]:
    """A folder with the files that the page names, the environment of its user, and what stands for what is elsewhere:
    a tiny model with a run of its own for the demo, two endpoints for those at addresses.
    """
    folder = tmp_path_factory.mktemp("user")
    model = write_tiny(folder / "model-F16.gguf")
    write_tiny(folder / "q4.gguf", seed=1)
    write_tiny(folder / "nomic.gguf", seed=2)
    write_tiny(folder / "bge.gguf", seed=3, pooling=4)
    (folder / "w.yaml").write_text(WORKLOAD)
    (folder / "text.txt").write_text("A text of some words that is measured on. " * 40)
    (folder / "big.key").write_text("sk-of-the-first\n")
    home = folder / "home"
    program_in(folder / "bin")
    environment = clean_environment(home, BITLADDER_DATA=str(folder / "data"))
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = run_cli(
        "run", model, "--levels", "Q8_0,Q4_K_M", "--imatrix", "none", "--bar", "kl < 100", "--full",
        "--workload", "w.yaml", "--text", "text.txt", "--threads", 1,
        folder=folder, environment=own_environment(folder / "data"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with ExitStack() as stack:
        big = stack.enter_context(serving(lambda prompt: "big", model="big"))
        small = stack.enter_context(serving(lambda prompt: "small", model="small"))
        also_big = stack.enter_context(serving(lambda prompt: "big", model="big"))
        hosts = [cloud.url.removeprefix("http://").removesuffix("/v1") for cloud in (big, small, also_big)]
        elsewhere = {f"10.0.0.{last}:8000": host for last, host in zip((5, 6, 7), hosts, strict=True)}
        elsewhere["smollm2-135m"] = "model-F16.gguf"
        yield folder, environment, elsewhere


@pytest.mark.model
@pytest.mark.parametrize("number", range(len(examples())), ids=lambda number: examples()[number][:60])
def test_an_example_does_what_it_says(place, number, tmp_path):
    folder, environment, elsewhere = place
    line = examples()[number]
    for shown, here in elsewhere.items():
        line = line.replace(shown, here)
    if " bitladder serve " in f" {line}":
        # exec: what is asked to stop is the gateway, and not a shell
        line = f"{line.replace('bitladder serve', 'exec bitladder serve', 1)} --port 0 --threads 1"
        secret = (folder / "secret").read_text() if "--api-key-file" in line else ""
        with started(["bash", "-c", line], folder, environment, tmp_path / "log") as url:
            for model in ("auto", "speed"):
                reply = ask(url, model, key=secret)
                assert reply.status_code == 200, reply.text
        return
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    if "bitladder key alice" in line:
        (folder / "secret").write_text(done.stdout.strip())
    if "> " in line:
        assert (folder / line.rpartition("> ")[2]).stat().st_size
    assert str(sys.executable) not in done.stderr
