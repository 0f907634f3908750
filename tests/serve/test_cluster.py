"""Deployments over several machines: manifests, compose services and Ray Serve's configuration, read back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bitladder.cli.app import app
from bitladder.errors import UsageError
from bitladder.serve.cluster import ENGINE_PORT, dns_name, ray_serve, with_engine_services
from bitladder.serve.export import docker_compose
from bitladder.serve.host import ImageSource, Owner
from bitladder.serve.settings import ServeSettings, TierSpec
from tiny_engine import write_tiny

IMAGE = ImageSource(Path("/src/bitladder"), ("pyproject.toml",), ("src",), ".")
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "q8.gguf")
    write_tiny(tmp_path / "q4.gguf", seed=1)
    (tmp_path / "big.key").write_text("sk-of-big\n")
    return tmp_path


def export(*arguments: object):
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--threads", "1"])


def manifests(text: str) -> dict[tuple[str, str], dict]:
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


def test_manifests_hang_together(here):
    done = export(
        "--quality", "q8.gguf", "--speed", "q4.gguf", "--name", "My Model!", "--to", "k8s", "--replicas", 3,
        "--image", "registry.lan/bitladder:1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = manifests(done.stdout)
    assert set(found) == {
        ("Deployment", "my-model-quality"), ("Service", "my-model-quality"), ("Deployment", "my-model-speed"),
        ("Service", "my-model-speed"), ("Deployment", "my-model"), ("Service", "my-model"),
        ("NetworkPolicy", "my-model-engines"),
    }  # fmt: skip
    assert all(LABEL.fullmatch(name) for _, name in found)
    for role, file in (("quality", "q8.gguf"), ("speed", "q4.gguf")):
        deployment = found["Deployment", f"my-model-{role}"]["spec"]
        assert deployment["replicas"] == 3
        labels = deployment["template"]["metadata"]["labels"]
        assert deployment["selector"]["matchLabels"] == labels
        service = found["Service", f"my-model-{role}"]["spec"]
        assert service["clusterIP"] == "None" and service["selector"] == labels  # its name resolves to every replica
        (engine,) = deployment["template"]["spec"]["containers"]
        told = dict(zip(engine["args"][::2], engine["args"][1::2], strict=True))
        assert told["--model"] == f"/models/{file}" and told["--port"] == str(ENGINE_PORT)
        assert engine["volumeMounts"][0]["readOnly"]
        assert set(found["NetworkPolicy", "my-model-engines"]["spec"]["podSelector"]["matchLabels"].items()) <= set(
            labels.items()
        )
    gateway = found["Deployment", "my-model"]["spec"]["template"]
    (container,) = gateway["spec"]["containers"]
    command = container["command"]
    assert command[:2] == ["bitladder", "serve"] and "--open-to-all" in command
    assert command[command.index("--quality") + 1] == f"http://my-model-quality:{ENGINE_PORT}/v1#q8"
    assert command[command.index("--allow-host") + 1] == "my-model"
    assert container["readinessProbe"]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "localhost"}]
    allowed = found["NetworkPolicy", "my-model-engines"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert allowed == gateway["metadata"]["labels"]
    assert "q8.gguf, q4.gguf" in done.stdout


def test_keys_are_named_and_never_written(here):
    done = CliRunner().invoke(app, ["key", "alice", "--file", "keys"])
    assert done.exit_code == 0
    done = export(
        "--quality", "http://a:1#big", "--quality", "http://b:1#big", "--speed", "q4.gguf", "--key-file", "a:1=big.key",
        "--key-env", "b:1=KEY_B", "--api-key-file", "keys", "--name", "x", "--to", "k8s", "--image", "i",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "sk-of-big" not in done.stdout
    (container,) = manifests(done.stdout)["Deployment", "x"]["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    assert [command[at + 1] for at, word in enumerate(command) if word == "--quality"] == [
        "http://a:1/v1#big", "http://b:1/v1#big",
    ]  # fmt: skip
    assert "a:1=/keys/quality-key" in command and "b:1=KEY_B" in command and "/keys/client-keys" in command
    assert container["envFrom"] == [{"secretRef": {"name": "x-env"}}]
    assert "--from-file=client-keys=FILE" in done.stdout and "--open-to-all" not in command


def test_what_a_cluster_cannot_have(here):
    assert "needs an image" in export("q8.gguf", "--to", "k8s").stderr
    assert "means nothing to systemd" in export("q8.gguf", "--to", "systemd", "--replicas", 2).stderr
    (here / "b").mkdir()
    write_tiny(here / "b" / "q8.gguf", seed=2)
    twice = export("--quality", "q8.gguf", "--speed", "b/q8.gguf", "--to", "k8s", "--image", "i")
    assert twice.exit_code == 2 and "Two files are called 'q8.gguf'" in twice.stderr


def test_compose_with_replicas_asks_the_engines_by_the_name_of_their_service():
    settings = ServeSettings(
        TierSpec("Q8_0", path=Path("/m/a-00001-of-00002.gguf"), n_ctx=2048, slots=2),
        TierSpec("gpt", url="http://127.0.0.1:11434", model="gpt"),
        name="tiny",
    )
    text = docker_compose(settings, IMAGE, Owner("alice", 1000, 100), replicas=4)
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"tiny", "quality"}
    engine, gateway = services["quality"], services["tiny"]
    assert engine["deploy"] == {"replicas": 4} and "ports" not in engine
    assert [one["target"] for one in engine["volumes"]] == [f"/models/a-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert engine["command"][:2] == ["--model", "/models/a-00001-of-00002.gguf"]
    assert "volumes" not in gateway and gateway["depends_on"] == ["quality"]
    command = gateway["command"]
    assert command[command.index("--quality") + 1] == f"http://quality:{ENGINE_PORT}/v1#Q8_0"
    assert "http://host.docker.internal:11434/v1#gpt" in command
    assert set(yaml.safe_load(docker_compose(settings, IMAGE))["services"]) == {"tiny"}


@pytest.mark.parametrize("text", ["My Model 7B", "7b", "-a-", "ü", "x" * 200, "a_b.c", "模型"])
def test_names_are_dns_labels(text):
    assert LABEL.fullmatch(dns_name(text))
    assert len(f"{dns_name(text)}-quality") <= 63


def test_one_level_for_both_roles_is_one_engine():
    spec = TierSpec("Q8_0", path=Path("/m/a.gguf"))
    settings, services = with_engine_services(ServeSettings(spec, spec), "x")
    assert len(services) == 1 and settings.speed is None
    assert len(with_engine_services(ServeSettings(spec, replace(spec, level="b", path=Path("/m/b.gguf"))), "x")[1]) == 2


def checkpoint(folder: Path) -> Path:
    """What a folder of a GPTQ level says of itself."""
    folder.mkdir()
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": quantization})
    )
    return folder


def test_ray_serves_configuration_has_the_shape_that_its_pages_show(here):
    checkpoint(here / "tiny-GPTQ-4bit-g64")
    done = export(
        "--quality", "hf:org/big", "--speed", "tiny-GPTQ-4bit-g64", "--name", "Pair 1", "--to", "ray-serve",
        "--replicas", 2, "--ctx", 8192,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = yaml.safe_load(done.stdout)
    assert set(document) == {"proxy_location", "http_options", "applications"}
    (application,) = document["applications"]
    assert set(application) == {"name", "route_prefix", "import_path", "args"}
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    models = application["args"]["llm_configs"]
    assert [one["model_loading_config"] for one in models] == [
        {"model_id": "big", "model_source": "org/big"},
        {"model_id": "tiny-GPTQ-4bit-g64", "model_source": str(here / "tiny-GPTQ-4bit-g64")},
    ]
    for one in models:
        assert one["deployment_config"] == {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
        assert one["engine_kwargs"] == {"max_model_len": 8192}
    assert "bitladder serve --name pair-1 --quality http://HEAD:8000#big" in done.stdout


def test_what_ray_serve_does_not_run(here):
    for wrong, said in (("q8.gguf", "no folder"), ("http://a:1#m", "no folder"), ("missing", "no folder")):
        done = export("--quality", wrong, "--to", "ray-serve")
        assert done.exit_code == 2 and said in done.stderr, done.output
    assert "No folder is named" in export("--to", "ray-serve").stderr
    (here / "empty").mkdir()
    with pytest.raises(UsageError):
        ray_serve("x", [str(here / "empty")], replicas=1, n_ctx=None)
    with pytest.raises(UsageError, match="same name"):
        ray_serve("x", ["hf:a/m", "hf:b/m"], replicas=1, n_ctx=None)
