"""What export writes is started, with nothing but what it names, and answers."""

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from cloud_server import serving
from serving_process import ask, clean_environment, free_port, own_environment, program_in, run_cli, started
from tiny_engine import write_tiny

pytestmark = pytest.mark.model

KEY = "sk-of-the-endpoint-1234567890"


def exported(folder: Path, *arguments: object) -> str:
    """What export prints, made in a folder where it has what it needs."""
    done = run_cli("export", *arguments, "--threads", 1, folder=folder, environment=own_environment(folder / "data"))
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    return done.stdout


def systemd_words(unit: str, credentials: Path) -> list[str]:
    """The command of a unit as systemd reads it, its credentials put where it would put them."""
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    for line in re.findall(r"^LoadCredential=(.*)$", unit, re.MULTILINE):
        name, path = line.split(":", 1)
        credentials.mkdir(exist_ok=True)
        shutil.copy(path.replace("%%", "%"), credentials / name)
    words = shlex.split(lines["ExecStart"])
    given = [word.replace("${CREDENTIALS_DIRECTORY}", str(credentials)) for word in words]
    assert Path(words[0]).is_absolute()
    return [word.replace("$$", "$").replace("%%", "%") for word in given]


def compose_words(text: str, program: Path) -> tuple[list[str], list[str]]:
    """The command of a compose file with container paths as they are here, and its env files."""
    document = yaml.safe_load(text)
    (service,) = document["services"].values()
    places = {one["target"]: one["source"] for one in service["volumes"]}
    secrets = {f"/run/secrets/{name}": document["secrets"][name]["file"] for name in service.get("secrets", ())}
    words = []
    for word in service["command"]:
        for inside, outside in (places | secrets).items():
            if word == inside or word.endswith(f"={inside}"):
                word = word.removesuffix(inside) + outside  # noqa: PLW2901
        words.append(word.replace("$$", "$").replace("host.docker.internal", "127.0.0.1"))
    assert words[0] == "bitladder"
    assert not any(word.startswith(("/models/", "/run/")) for word in words)
    return [str(program), *words[1:]], service.get("env_file", [])


def tiers_answer(
    words: Sequence[str],
    tmp_path: Path,
    levels: Sequence[str],
    key: str = "",
    environment: dict[str, str] | None = None,
) -> None:
    """Started from an empty folder, each level answers under its name."""
    (empty := tmp_path / "empty").mkdir()
    environment = environment or clean_environment(tmp_path / "home")
    with started(words, empty, environment, tmp_path / "log") as url:
        for level in levels:
            reply = ask(url, level, key=key)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-bitladder-level"] == level
    assert not list(empty.iterdir())


@pytest.mark.parametrize("tool", ["systemd", "compose"])
def test_two_files_of_one_name_with_odd_paths_and_client_keys(tool, tmp_path):
    odd = 'a $HOME %n: "b"'
    write_tiny(tmp_path / odd / "model.gguf")
    write_tiny(tmp_path / "c" / "model.gguf", seed=1)
    made = run_cli("key", "alice", "--file", "keys", folder=tmp_path, environment=own_environment(tmp_path / "data"))
    text = exported(
        tmp_path, "--quality", f"{odd}/model.gguf", "--speed", "c/model.gguf", "--to", tool,
        "--port", free_port(), "--api-key-file", "keys", "--name", "two 100% $x",
    )  # fmt: skip
    if tool == "systemd":
        words = systemd_words(text, tmp_path / "credentials")
    else:
        words, env_files = compose_words(text, program_in(tmp_path / "bin"))
        assert not env_files
    assert words[words.index("--name") + 1] == "two 100% $x"
    tiers_answer(words, tmp_path, [f"model@{odd}", "model@c"], made.stdout.strip())


@pytest.mark.parametrize("tool", ["systemd", "compose"])
def test_a_level_of_a_model_and_an_endpoint_with_a_key(tool, tmp_path):
    write_tiny(tmp_path / "tiny-F16.gguf")
    (tmp_path / "key").write_text(KEY + "\n")
    with serving(lambda prompt: "from afar", model="far") as cloud:
        text = exported(
            tmp_path, "tiny-F16.gguf", "--quality", f"{cloud.url}#far", "--speed", "Q8_0", "--to", tool,
            "--port", free_port(), "--key-file", "key",
        )  # fmt: skip
        if tool == "systemd":
            words = systemd_words(text, tmp_path / "credentials")
        else:
            words, _ = compose_words(text, program_in(tmp_path / "bin"))
        tiers_answer(words, tmp_path, ["far", "tiny-Q8_0"])
        assert cloud.keys == {f"Bearer {KEY}"}
    assert KEY not in (tmp_path / "log").read_text()


def test_two_endpoints_with_a_key_from_a_variable(tmp_path):
    with serving(lambda prompt: "one", model="m") as one, serving(lambda prompt: "two", model="m") as two:
        text = exported(
            tmp_path, "--quality", f"{one.url}#m", "--speed", f"{two.url}#m", "--to", "compose",
            "--port", free_port(), "--key-env", "FAR_KEY", "--name", "far",
        )  # fmt: skip
        words, env_files = compose_words(text, program_in(tmp_path / "bin"))
        assert env_files == ["far.env"]
        environment = clean_environment(tmp_path / "home", FAR_KEY=KEY)
        hosts = [cloud.url.removeprefix("http://").removesuffix("/v1") for cloud in (one, two)]
        tiers_answer(words, tmp_path, [f"m@{host}" for host in hosts], environment=environment)
        assert one.keys == two.keys == {f"Bearer {KEY}"}


def test_a_key_that_is_missing_is_told_before_anything_starts(tmp_path):
    arguments = ("serve", "--quality", "http://127.0.0.1:9/v1#m", "--key-env", "FAR_KEY")
    done = run_cli(*arguments, folder=tmp_path, environment=clean_environment(tmp_path / "home"))
    assert done.returncode == 2
    assert "The environment variable FAR_KEY is empty" in done.stderr


def test_llama_swap_starts_the_engine_with_what_it_writes(tmp_path):
    """The engine in the wheel is given the values of the command line that llama-swap would run."""
    from bitladder.engines.base import Launch
    from bitladder.engines.registry import prepare

    write_tiny(tmp_path / "a b" / "tiny.gguf")
    text = exported(tmp_path, "--quality", "a b/tiny.gguf", "--to", "llama-swap")
    (model,) = yaml.safe_load(text)["models"].values()
    words = shlex.split(model["cmd"])
    told = dict(zip(words[1::2], words[2::2], strict=True))
    slots = int(told["--parallel"])
    engine = prepare(
        Launch(
            path=told["--model"], n_ctx=int(told["--ctx-size"]) // slots, n_parallel=slots,
            threads=int(told["--threads"]), alias=told["--alias"],
        )
    )  # fmt: skip
    try:
        engine.start()
        assert ask(engine.base_url, told["--alias"]).json()["model"] == told["--alias"] == "tiny"
    finally:
        engine.stop()
