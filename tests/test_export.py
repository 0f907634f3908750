"""A deployment in other tools' words: what their own parsers read from it."""

import configparser
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import UsageError
from bitladder.serve.export import (
    docker_compose,
    llama_swap,
    lm_studio_place,
    ollama_command,
    ollama_modelfile,
    place_for_lm_studio,
    serve_command,
    systemd_unit,
)
from bitladder.serve.settings import ServeSettings, TierSpec

QUALITY = TierSpec(
    "Q8_0", path=Path("/data/my models/tiny-Q8_0.gguf"), sha256="a" * 64, n_ctx=2048, slots=2, memory_bytes=800
)
SPEED = TierSpec("Q4_K_M", path=Path("/data/my models/tiny-Q4_K_M.gguf"), n_ctx=2048, memory_bytes=400)
SETTINGS = ServeSettings(QUALITY, SPEED, name="Tiny Model 100%", port=8077, threads=4)


def test_ollama():
    text = ollama_modelfile(QUALITY)
    assert text.splitlines() == [
        f"# Q8_0, sha256 {'a' * 64}",
        "FROM /data/my models/tiny-Q8_0.gguf",
        "PARAMETER num_ctx 2048",
    ]
    command = ollama_command("Tiny Model", QUALITY, Path("/tmp/a b/Modelfile"))
    assert shlex.split(command) == ["ollama", "create", "tiny-model:q8_0", "-f", "/tmp/a b/Modelfile"]


def test_lm_studio_finds_the_file(tmp_path):
    source = tmp_path / "tiny-Q8_0.gguf"
    source.write_bytes(b"GGUF")
    spec = TierSpec("Q8_0", path=source)
    target = place_for_lm_studio(tmp_path / "models", "Tiny Model", spec)
    assert target == tmp_path / "models" / "bitladder" / "tiny-model-GGUF" / "tiny-Q8_0.gguf"
    assert target.samefile(source)
    assert place_for_lm_studio(tmp_path / "models", "Tiny Model", spec) == target
    target.unlink()
    target.write_bytes(b"other")
    with pytest.raises(UsageError, match="exists, and is not Q8_0 of Tiny Model"):
        place_for_lm_studio(tmp_path / "models", "Tiny Model", spec)
    target.write_bytes(b"GGUf")  # another model's file of this very name and size
    with pytest.raises(UsageError, match="exists, and is not Q8_0 of Tiny Model"):
        place_for_lm_studio(tmp_path / "models", "Tiny Model", spec)
    assert target.read_bytes() == b"GGUf"
    place_for_lm_studio(tmp_path / "models", "Tiny Model", spec, force=True)
    assert target.samefile(source)
    target.unlink()
    target.write_bytes(b"GGUF")  # a copy, as on another disk
    assert place_for_lm_studio(tmp_path / "models", "Tiny Model", spec) == target
    assert lm_studio_place(Path("m"), "../../x", spec).parts[2] == "..-..-x-GGUF"


def test_llama_swap_keeps_both_tiers_when_they_fit_and_swaps_when_not():
    together = yaml.safe_load(llama_swap(SETTINGS))
    assert together["groups"]["tiers"] == {"swap": False, "exclusive": False, "members": ["Q8_0", "Q4_K_M"]}
    model = together["models"]["Q8_0"]
    assert model["aliases"] == ["quality"]
    assert shlex.split(model["cmd"])[:5] == [
        "llama-server",
        "--port",
        "${PORT}",
        "--model",
        "/data/my models/tiny-Q8_0.gguf",
    ]
    assert "--ctx-size 4096 --parallel 2" in model["cmd"]
    tight = ServeSettings(QUALITY, SPEED, memory_budget_bytes=1000)
    assert yaml.safe_load(llama_swap(tight))["groups"]["tiers"]["swap"] is True


def test_serve_command_is_what_was_set():
    command = serve_command(SETTINGS)
    assert command[:3] == ["bitladder", "serve", "Tiny Model 100%"]
    told = dict(zip(command[3::2], command[4::2], strict=True))
    assert told == {
        "--quality": "/data/my models/tiny-Q8_0.gguf",
        "--speed": "/data/my models/tiny-Q4_K_M.gguf",
        "--host": "127.0.0.1",
        "--port": "8077",
        "--ctx": "2048",
        "--threads": "4",
    }


def test_docker_compose(tmp_path):
    keyed = ServeSettings(QUALITY, SPEED, name="tiny", api_key_file=tmp_path / "keys")
    service = yaml.safe_load(docker_compose(keyed, "0.1.0"))["services"]["tiny"]
    assert service["ports"] == ["127.0.0.1:8077:8077"]
    assert "/data/my models/tiny-Q8_0.gguf:/models/tiny-Q8_0.gguf:ro" in service["volumes"]
    assert f"{tmp_path}/keys:/models/keys:ro" in service["volumes"]
    assert service["command"][3:7] == ["--quality", "/models/tiny-Q8_0.gguf", "--speed", "/models/tiny-Q4_K_M.gguf"]
    assert service["command"][-2:] == ["--api-key-file", "/models/keys"]
    assert "bitladder==0.1.0" in service["build"]["dockerfile_inline"]
    open_service = yaml.safe_load(docker_compose(SETTINGS, "0.1.0"))["services"]["tiny-model-100"]
    assert open_service["command"][-1] == "--open-to-all"


def test_systemd_unit():
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # systemd's names are case-sensitive
    parser.read_string(systemd_unit(SETTINGS, Path("/opt/bitladder/bin/bitladder")))
    started = parser["Service"]["ExecStart"]
    assert started.startswith('/opt/bitladder/bin/bitladder serve "Tiny Model 100%%" --quality "/data/my models/')
    assert parser["Unit"]["Description"] == "Bitladder gateway for Tiny Model 100%%"
    assert parser["Service"]["TimeoutStopSec"] == "35"


def test_only_files_can_be_exported():
    with pytest.raises(UsageError, match="is an endpoint at http"):
        ollama_modelfile(TierSpec("Q8_0", url="http://x.invalid"))


def test_line_breaks_do_not_get_out_of_their_line():
    hostile = TierSpec("Q8_0", path=Path("/data/a\nSYSTEM evil.gguf"))
    with pytest.raises(UsageError, match="line break"):
        ollama_modelfile(hostile)
    with pytest.raises(UsageError, match="line break"):
        systemd_unit(ServeSettings(hostile), Path("/bin/bitladder"))


def test_from_the_command_line(demo_gguf, tmp_path):
    tiers = ["--quality", str(demo_gguf)]
    swap = CliRunner().invoke(app, ["export", str(demo_gguf), "--to", "llama-swap", *tiers])
    assert swap.exit_code == 0, swap.output
    assert str(demo_gguf) in swap.stdout
    ollama = CliRunner().invoke(app, ["export", str(demo_gguf), "--to", "ollama", "--folder", str(tmp_path), *tiers])
    assert ollama.exit_code == 0, ollama.output
    (modelfile,) = tmp_path.glob("Modelfile-*")
    assert f"FROM {demo_gguf}" in modelfile.read_text()


def test_a_key_from_the_command_line(tmp_path):
    made = CliRunner().invoke(app, ["key", "alice", "--file", str(tmp_path / "keys")])
    assert made.exit_code == 0
    assert made.stdout.startswith("bl-") and made.stdout.strip() not in (tmp_path / "keys").read_text()
