"""A deployment in other tools' words: what their own parsers read from it."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import UsageError
from bitladder.serve.export import (
    docker_compose,
    llama_swap,
    lm_studio_places,
    ollama_command,
    ollama_modelfile,
    place_for_lm_studio,
    serve_command,
    systemd_unit,
)
from bitladder.serve.host import ImageSource, Owner, image_source, program, reader_of
from bitladder.serve.settings import ServeSettings, TierSpec, with_distinct_names

QUALITY = TierSpec(
    "Q8_0", path=Path("/data/my models/tiny-Q8_0.gguf"), sha256="a" * 64, n_ctx=2048, slots=2, memory_bytes=800
)
SPEED = TierSpec("Q4_K_M", path=Path("/data/my models/tiny-Q4_K_M.gguf"), n_ctx=2048, memory_bytes=400)
IMAGE = ImageSource(Path("/src/bitladder"), ("pyproject.toml", "constraints.txt"), ("src",), ".")
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


def test_a_modelfile_is_read_as_ollama_reads_it():
    """A command is a word, its value the rest of the line, trimmed and freed of one pair of quotes."""

    def parse(text: str) -> list[tuple[str, str]]:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        pairs = [line.split(" ", 1) for line in lines]
        return [(name, re.sub(r'^"(.*)"$', r"\1", value.strip())) for name, value in pairs]

    for file in ("/a b/x.gguf", '/a"b/x.gguf', "/a/# no comment.gguf", "/a/ends in a space.gguf ", "/a/模型.gguf"):
        spec = TierSpec("Q8_0", path=Path(file), n_ctx=512)
        assert parse(ollama_modelfile(spec)) == [("FROM", file), ("PARAMETER", "num_ctx 512")]


def test_ollama_makes_no_model_of_parts():
    with pytest.raises(UsageError, match="one of 3 parts"):
        ollama_modelfile(TierSpec("Q8_0", path=Path("/data/big-00001-of-00003.gguf")))


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Tiny Model 100%", "tiny-model-100"), ("../../x", "x"), ("a..b__c", "a-b-c"), ("模型", "model"), ("-", "model")],
)
def test_names_become_what_models_and_images_may_be_called(name, slug):
    tag = ollama_command(name, replace(QUALITY, level=name), Path("m")).split()[2]
    assert tag == f"{slug}:{slug}"
    assert list(yaml.safe_load(docker_compose(replace(SETTINGS, name=name), IMAGE))["services"]) == [slug]


def test_lm_studio_finds_the_file(tmp_path, monkeypatch):
    from bitladder.files.local_stores import find_lmstudio

    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "tiny-Q8_0.gguf"
    source.write_bytes(b"GGUF")
    spec = TierSpec("Q8_0", path=source)
    models = tmp_path / ".lmstudio" / "models"
    (target,) = place_for_lm_studio(models, "Tiny Model", [spec])
    assert target == models / "bitladder" / "tiny-model-GGUF" / "tiny-Q8_0.gguf"
    assert target.samefile(source)
    assert find_lmstudio("lmstudio:bitladder/tiny-model-GGUF:Q8_0") == target
    assert place_for_lm_studio(models, "Tiny Model", [spec]) == [target]
    target.unlink()
    target.write_bytes(b"GGUX")  # as large, and another
    with pytest.raises(UsageError, match="exists, and is not Q8_0 of Tiny Model"):
        place_for_lm_studio(models, "Tiny Model", [spec])
    assert target.read_bytes() == b"GGUX"
    place_for_lm_studio(models, "Tiny Model", [spec], force=True)
    assert target.samefile(source)
    target.unlink()
    target.write_bytes(b"GGUF")  # a copy, as on another disk
    assert place_for_lm_studio(models, "Tiny Model", [spec]) == [target]
    assert lm_studio_places(Path("m"), "../../x", [spec]) == [Path("m/bitladder/x-GGUF/tiny-Q8_0.gguf")]


def test_lm_studio_gets_all_parts_and_both_files_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in (1, 2):
            (tmp_path / folder / f"m-0000{number}-of-00002.gguf").write_text(f"{folder}{number}")
    specs = with_distinct_names([TierSpec("m", path=tmp_path / folder / "m-00001-of-00002.gguf") for folder in "ab"])
    first, second = place_for_lm_studio(tmp_path / "models", "m", specs)
    assert [path.read_text() for path in sorted(first.parent.iterdir())] == ["a1", "a2", "b1", "b2"]
    assert (first.name, second.name) == ("m@a-00001-of-00002.gguf", "m@b-00001-of-00002.gguf")


def mlx_folder(path: Path, weights: bytes = b"weights") -> Path:
    path.mkdir()
    scheme = {"group_size": 64, "bits": 4, "mode": "affine"}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": scheme}))
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_lm_studio_gets_folders_of_mlx_whole(tmp_path):
    specs = [TierSpec("MLX-4bit-g64", path=mlx_folder(tmp_path / "a")), TierSpec("Q8_0", path=tmp_path / "m.gguf")]
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    models = tmp_path / "models"
    folder, file = place_for_lm_studio(models, "Tiny", specs)
    assert folder == models / "bitladder" / "tiny-mlx-4bit-g64"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").samefile(tmp_path / "a" / "model.safetensors")
    assert file == models / "bitladder" / "tiny-GGUF" / "m.gguf"
    assert place_for_lm_studio(models, "Tiny", specs) == [folder, file]
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of an older level")
    with pytest.raises(UsageError, match="which is not of this level"):
        place_for_lm_studio(models, "Tiny", specs)
    other = TierSpec("MLX-4bit-g64", path=mlx_folder(tmp_path / "b", b"others"))
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="exists, and is not MLX-4bit-g64 of Tiny"):
        place_for_lm_studio(models, "Tiny", [other])
    gptq = mlx_folder(tmp_path / "gptq")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (gptq / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(UsageError, match="is stored as gptq"):
        place_for_lm_studio(models, "Tiny", [TierSpec("GPTQ-4bit-g64", path=gptq)])


def test_levels_of_one_name_are_told_apart_by_where_they_lie():
    def names(*specs: TierSpec) -> list[str]:
        return [spec.level for spec in with_distinct_names(specs)]

    def file(path: str) -> TierSpec:
        return TierSpec(Path(path).stem, path=Path(path))

    def model(url: str, name: str = "m") -> TierSpec:
        return TierSpec(name, url=url, model=name)

    assert names(file("/a/m.gguf"), file("/b/m.gguf")) == ["m@a", "m@b"]
    assert names(file("/a/x/m.gguf"), file("/b/x/M.gguf")) == ["m@a-x", "M@b-x"]
    assert names(file("/a-b/m.gguf"), file("/a/b/m.gguf")) == ["m@a-b", "m@b"]
    assert names(model("http://one"), model("http://two:1")) == ["m@one", "m@two:1"]
    assert names(model("http://one/v1"), model("http://one/v2")) == ["m@one-v1", "m@one-v2"]
    assert names(model("http://one"), file("/one/m.gguf"))[0] != "m"
    assert names(file("/a/m.gguf"), file("/a/m.gguf")) == ["m", "m"]
    assert names(file("/a/quality.gguf"), file("/a/other.gguf")) == ["quality@a", "other"]
    assert len({*names(file("/m.gguf"), file("/x/m.gguf"), file("/y/m.gguf"))}) == 3
    ServeSettings(*with_distinct_names([file("/a/m.gguf"), file("/b/m.gguf")]))


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


HOSTILE = ("/d/${HOME}/x.gguf", "/d/a\nb.gguf")


@pytest.mark.parametrize("path", HOSTILE)
def test_llama_swap_is_given_no_path_that_it_would_read_otherwise(path):
    with pytest.raises(UsageError, match=r"macro|line break"):
        llama_swap(ServeSettings(TierSpec("x", path=Path(path))))


def test_llama_server_knows_the_arguments_that_llama_swap_starts_it_with():
    """The words are asked of the very llama.cpp server in the wheel, which holds the name of every flag."""
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
    known = set(re.findall(rb"(?<=\0)--[a-z][a-z0-9-]+(?=\0)", library.read_bytes()))
    words = shlex.split(yaml.safe_load(llama_swap(SETTINGS))["models"]["Q8_0"]["cmd"])
    flags = {word.encode() for word in words if word.startswith("--")}
    assert flags and flags <= known
    assert b"--ctx-size" in known and b"--no-such-flag" not in known


def test_serve_command_is_what_was_set():
    command = serve_command(SETTINGS)
    assert command[:2] == ["bitladder", "serve"]
    told = dict(zip(command[2::2], command[3::2], strict=True))
    assert told == {
        "--name": "Tiny Model 100%",
        "--quality": "/data/my models/tiny-Q8_0.gguf",
        "--speed": "/data/my models/tiny-Q4_K_M.gguf",
        "--host": "127.0.0.1",
        "--port": "8077",
        "--ctx": "2048",
        "--threads": "4",
    }


def test_models_of_different_lengths_keep_their_own():
    assert "--ctx" not in serve_command(ServeSettings(QUALITY, replace(SPEED, n_ctx=512)))


ENDPOINTS = ServeSettings(
    TierSpec("big", url="https://models.lan:8443/v1", model="org/big", key_file=Path("/keys/big"), api_key="sk-1"),
    TierSpec("gpt", url="https://api.openai.com", model="gpt", key_env="OPENAI_API_KEY", api_key="sk-2"),
    name="cloud",
)


def test_endpoints_keep_their_model_and_no_key_is_written_anywhere():
    command = serve_command(ENDPOINTS)
    assert command[4:8] == [
        "--quality", "https://models.lan:8443/v1#org/big", "--speed", "https://api.openai.com/v1#gpt",
    ]  # fmt: skip
    assert command[-4:] == [
        "--key-file", "models.lan:8443=/keys/big", "--key-env", "api.openai.com=OPENAI_API_KEY",
    ]  # fmt: skip
    assert "--ctx" not in command
    for text in (docker_compose(ENDPOINTS, IMAGE), systemd_unit(ENDPOINTS, ["/bin/x"]), repr(ENDPOINTS)):
        assert "sk-" not in text
    unit = unit_of(ENDPOINTS)
    assert "LoadCredential=quality-key:/keys/big" in unit and "EnvironmentFile=/etc/bitladder/cloud.env" in unit
    assert '"models.lan:8443=${CREDENTIALS_DIRECTORY}/quality-key"' in unit
    document = yaml.safe_load(docker_compose(ENDPOINTS, IMAGE))
    service = document["services"]["cloud"]
    assert document["secrets"] == {"quality-key": {"file": "/keys/big"}}
    assert (service["secrets"], service["env_file"]) == (["quality-key"], ["cloud.env"])
    assert "models.lan:8443=/run/secrets/quality-key" in service["command"]


def unit_of(settings: ServeSettings, owner: Owner | None = None) -> str:
    return systemd_unit(settings, [sys.executable, "-m", "bitladder"], owner)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "[::1]"])
def test_a_container_asks_the_hosts_loopback_by_the_name_of_the_host(host):
    tier = TierSpec("m", url=f"http://{host}:11434", model="m", key_env="K")
    service = yaml.safe_load(docker_compose(ServeSettings(tier, name="x"), IMAGE))["services"]["x"]
    assert "http://host.docker.internal:11434/v1#m" in service["command"]
    assert "host.docker.internal:11434=K" in service["command"]
    assert service["extra_hosts"] == ["host.docker.internal:host-gateway"]


def test_docker_compose(tmp_path):
    keyed = ServeSettings(QUALITY, SPEED, name="tiny", api_key_file=tmp_path / "keys")
    document = yaml.safe_load(docker_compose(keyed, IMAGE, Owner("alice", 1000, 100)))
    service = document["services"]["tiny"]
    assert service["ports"] == ["127.0.0.1:8077:8077"]
    assert [(one["source"], one["target"]) for one in service["volumes"]] == [
        ("/data/my models/tiny-Q8_0.gguf", "/models/tiny-Q8_0.gguf"),
        ("/data/my models/tiny-Q4_K_M.gguf", "/models/tiny-Q4_K_M.gguf"),
    ]
    assert all(one["read_only"] and one["type"] == "bind" for one in service["volumes"])
    assert document["secrets"] == {"client-keys": {"file": f"{tmp_path}/keys"}}
    assert service["command"][4:8] == ["--quality", "/models/tiny-Q8_0.gguf", "--speed", "/models/tiny-Q4_K_M.gguf"]
    assert service["command"][-2:] == ["--api-key-file", "/run/secrets/client-keys"]
    assert service["user"] == "1000:100"
    assert service["build"]["context"] == "/src/bitladder"
    open_service = yaml.safe_load(docker_compose(SETTINGS, IMAGE))["services"]["tiny-model-100"]
    assert open_service["command"][-1] == "--open-to-all"
    assert "user" not in open_service


@pytest.mark.parametrize("path", ["/co:lon/m.gguf", "/d$HOME/m.gguf", "/a\nb/m.gguf", '/"q"/m.gguf', "/{a}: b/m.gguf"])
def test_compose_mounts_any_path(path):
    service = yaml.safe_load(docker_compose(ServeSettings(TierSpec("m", path=Path(path)), name="x"), IMAGE))
    (volume,) = service["services"]["x"]["volumes"]
    assert volume["source"].replace("$$", "$") == path
    assert "$" not in volume["source"].replace("$$", "")


def test_two_files_of_one_name_and_parts_have_places_of_their_own():
    specs = with_distinct_names([TierSpec("m-Q8_0", path=Path(f"/{folder}/m-Q8_0.gguf")) for folder in "ab"])
    service = yaml.safe_load(docker_compose(ServeSettings(*specs, name="x"), IMAGE))["services"]["x"]
    assert [one["target"] for one in service["volumes"]] == ["/models/m-Q8_0@a.gguf", "/models/m-Q8_0@b.gguf"]
    split = ServeSettings(TierSpec("m", path=Path("/a/m-00001-of-00003.gguf")), name="x")
    service = yaml.safe_load(docker_compose(split, IMAGE))["services"]["x"]
    assert [one["target"] for one in service["volumes"]] == [f"/models/m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_an_image_is_built_from_a_checkout_or_a_wheel_never_from_an_index(tmp_path, monkeypatch):
    from bitladder.serve import host

    assert image_source().context == Path(__file__).parents[2].resolve()
    wheel = tmp_path / "bitladder-9.9-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    assert image_source(wheel) == ImageSource(tmp_path, (wheel.name,), (), f"./{wheel.name}")
    build = yaml.safe_load(docker_compose(replace(SETTINGS, name="x"), image_source(wheel)))["services"]["x"]["build"]
    assert build["context"] == str(tmp_path)
    run = next(line for line in build["dockerfile_inline"].splitlines() if line.startswith("RUN"))
    assert run == f"RUN pip install --no-cache-dir ./{wheel.name}"
    for wrong in (tmp_path, tmp_path / "nothing.whl", Path(__file__)):
        with pytest.raises(UsageError, match="neither a wheel nor a checkout"):
            image_source(wrong)
    monkeypatch.setattr(host.bitladder, "__file__", str(tmp_path / "site" / "a" / "bitladder" / "__init__.py"))
    monkeypatch.setattr(host, "_installed_from", lambda: wheel)
    assert image_source().install == f"./{wheel.name}"
    wheel.unlink()
    with pytest.raises(UsageError, match="nothing here") as caught:
        image_source()
    assert "--from" in caught.value.do


def test_the_steps_of_the_image_install_the_package(tmp_path):
    """What the Dockerfile copies is enough for what it runs: the package, with its data, from these files alone."""
    found = image_source()
    assert "constraints.txt" in found.files
    for name in found.files:
        shutil.copy(found.context / name, tmp_path / name)
    for name in found.folders:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(found.context / name, tmp_path / name, ignore=ignore)
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "-c", "constraints.txt", "--target", str(target), found.install],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("setuptools is not installed, and pip may not fetch it here")
    assert done.returncode == 0, done.stderr
    assert (target / "bitladder" / "__main__.py").is_file()
    assert (target / "bitladder" / "serve" / "page" / "index.html").is_file()


def test_systemd_unit():
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # systemd's names are case-sensitive
    parser.read_string(systemd_unit(SETTINGS, ["/opt/bitladder/bin/python", "-m", "bitladder"]))
    started = parser["Service"]["ExecStart"]
    assert started.startswith(
        '/opt/bitladder/bin/python -m bitladder serve --name "Tiny Model 100%%" --quality "/data/'
    )
    assert parser["Unit"]["Description"] == "Bitladder gateway for Tiny Model 100%%"
    assert parser["Service"]["TimeoutStopSec"] == "35"
    assert parser["Service"]["DynamicUser"] == "yes"


def test_the_unit_starts_the_bitladder_that_wrote_it():
    done = subprocess.run([*program(), "--version"], cwd="/", capture_output=True, text=True, check=True)
    assert "bitladder" in done.stdout.lower() or done.stdout.strip()
    assert Path(program()[0]).is_absolute()


def test_who_must_read_private_files_is_who_the_gateway_runs_as(tmp_path):
    private = tmp_path / "private"
    private.write_text("x")
    private.chmod(0o600)
    owner = reader_of([private])
    assert owner is not None and owner.name == private.owner()
    assert reader_of([Path("/bin/sh")]) is None
    assert reader_of([Path("/bin/sh"), private]) == owner
    assert f"\nUser={owner.name}\n" in unit_of(SETTINGS, owner)
    assert "DynamicUser" not in unit_of(SETTINGS, owner)


def test_what_lies_in_tmp_is_shown_to_a_unit_with_its_own():
    unit = unit_of(ServeSettings(TierSpec("m", path=Path('/tmp/a "b": c/m.gguf'))))
    assert 'BindReadOnlyPaths="/tmp/a \\"b\\": c/m.gguf"' in unit
    assert "BindReadOnlyPaths" not in unit_of(SETTINGS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        ENDPOINTS,
        replace(SETTINGS, name="back\\slash\\ \U0001f600 $HOME ;", api_key_file=Path("/etc/a b/keys")),
        ServeSettings(TierSpec("m", path=Path('/tmp/a "b": c\'/m%n.gguf'))),
    ],
    ids=["files", "endpoints", "odd name", "odd path"],
)
def test_systemd_finds_no_fault_in_a_unit(settings, tmp_path):
    unit = tmp_path / "bitladder.service"
    unit.write_text(unit_of(settings))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    # Other units of the machine may have faults of their own.
    said = [line for line in done.stderr.splitlines() if "bitladder" in line and "man" not in line.split()]
    assert not said


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_check_of_units_can_fail(tmp_path):
    unit = tmp_path / "bitladder.service"
    unit.write_text(
        unit_of(SETTINGS).replace("ExecStart=", "ExecStart=/no/such/program -- ").replace("Restart=", "Rst=")
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "bitladder" in done.stderr


def compose_config(folder: Path, text: str) -> dict:
    """What docker compose makes of a file; skips where it is not at hand."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose plugin here")
    (folder / "compose.yaml").write_text(text)
    done = subprocess.run(
        ["docker", "compose", "config", "--format", "json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_docker_compose_reads_what_was_meant(tmp_path):
    odd = ServeSettings(
        TierSpec("m", path=Path("/d$HOME/co:lon/m.gguf")),
        TierSpec("gpt", url="http://localhost:1", key_env="K"),
        name="x",
    )
    (tmp_path / "x.env").write_text("K=secret\n")
    service = compose_config(tmp_path, docker_compose(odd, IMAGE))["services"]["x"]
    assert service["volumes"][0]["source"] == "/d$HOME/co:lon/m.gguf"
    assert "/models/m.gguf" in service["command"]


def test_only_files_can_be_exported():
    with pytest.raises(UsageError, match="is an endpoint at http"):
        ollama_modelfile(TierSpec("Q8_0", url="http://x.invalid"))


def test_line_breaks_do_not_get_out_of_their_line():
    hostile = TierSpec("Q8_0", path=Path("/data/a\nSYSTEM evil.gguf"))
    with pytest.raises(UsageError, match="line break"):
        ollama_modelfile(hostile)
    with pytest.raises(UsageError, match="line break"):
        systemd_unit(ServeSettings(hostile), ["/bin/bitladder"])
    with pytest.raises(UsageError, match="line break"):
        systemd_unit(replace(SETTINGS, name="x\nExecStartPre=/bin/evil"), ["/bin/bitladder"])


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
