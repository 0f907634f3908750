"""A deployment over several machines or containers: engines as replicas of their own, the gateway before them.

Kubernetes gets plain manifests, Ray Serve the configuration of its own LLM application. Where a level is a file, its
engine is llama.cpp's server in its published image, and the gateway finds the replicas by the name of their service,
which resolves to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bitladder.errors import UsageError
from bitladder.files.checkpoint_check import format_of_folder
from bitladder.serve.settings import ServeSettings, TierSpec
from bitladder.units import MiB

ENGINE_IMAGE = "ghcr.io/ggml-org/llama.cpp:server"
ENGINE_PORT = 8080
_DNS_LABEL = 40
"""Characters of a name at most, so that what is appended stays within the 63 of a DNS label."""
_ENDPOINT_SLOTS = 64


@dataclass(frozen=True)
class EngineService:
    """A level's engine as a service: several containers that run the same file."""

    name: str
    """What its service is called, a name that resolves to all of them."""
    spec: TierSpec

    @property
    def url(self) -> str:
        """Where the gateway asks it."""
        return f"http://{self.name}:{ENGINE_PORT}"

    def arguments(self, model: str, projector: str = "") -> list[str]:
        """Arguments of llama.cpp's server, whose image starts it. ``model``: the file's path in the container."""
        spec = self.spec
        parts = ["--model", model, "--alias", spec.level, "--ctx-size", str(spec.n_ctx * spec.slots)]
        parts += ["--parallel", str(spec.slots), "--host", "0.0.0.0", "--port", str(ENGINE_PORT)]
        return [*parts, *(["--mmproj", projector] if projector else [])]


def dns_name(text: str) -> str:
    """A name as a DNS label: lower case letters, digits and single hyphens, a letter first."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_DNS_LABEL].strip("-")
    return label if label[:1].isalpha() else f"m-{label}".strip("-")


def with_engine_services(settings: ServeSettings, prefix: str) -> tuple[ServeSettings, list[EngineService]]:
    """The same deployment with every file behind a service of its own, and these services."""
    services: list[EngineService] = []

    def behind(role: str, spec: TierSpec) -> TierSpec:
        if spec.path is None:
            return spec
        service = EngineService(f"{prefix}-{role}" if prefix else role, spec)
        services.append(service)
        return replace(
            spec, path=None, projector=None, url=service.url, model=spec.level, slots=_ENDPOINT_SLOTS, n_ctx=0,
            sha256="", standing=None, memory_bytes=0,
        )  # fmt: skip

    quality = behind("quality", settings.quality)
    alone = settings.speed is None or settings.speed == settings.quality
    speed = None if alone or settings.speed is None else behind("speed", settings.speed)
    return replace(settings, quality=quality, speed=speed), services


def kubernetes(
    settings: ServeSettings,
    command: Sequence[str],
    services: Sequence[EngineService],
    *,
    image: str,
    replicas: int,
    claim: str,
    files: Sequence[Path],
    secrets: Mapping[str, str],
    variables: Sequence[str],
) -> str:
    """Manifests: an engine's Deployment and headless Service for each file, the gateway's Deployment and Service, and a
    policy by which the gateway alone may ask the engines.

    Args:
        settings: the deployment, its files behind services already (`with_engine_services`).
        command: the gateway's, as it is started in its container.
        services: the engines.
        image: the gateway's image.
        replicas: of each engine.
        claim: the volume claim that holds the models.
        files: the models' files, all parts of each.
        secrets: keys of the Secret with files -> their names where the gateway finds them, under ``/keys``.
        variables: environment variables that keys of endpoints come from.

    Raises:
        UsageError: two files of one name, which a volume cannot hold.
    """
    names = [file.name for file in files]
    twice = next((one for one in names if names.count(one) > 1), None)
    if twice is not None:
        raise UsageError(f"Two files are called '{twice}', and one volume holds them all.", do="Rename one.")
    name = dns_name(settings.name)
    documents = [one for service in services for one in _engine(name, service, replicas, claim)]
    documents += [_gateway(name, settings, command, image, secrets, variables), _service(name, settings.port)]
    if services:
        documents.append(_policy(name))
    notes = [
        f"kubectl apply -f THIS.yaml; then http://{name}:{settings.port}/v1 within the namespace.",
        f"{image} is an image of Bitladder, as `bitladder export --to compose` builds one.",
    ]
    if services:
        notes.append(f"The volume claim '{claim}' must hold: {', '.join(names)}.")
    if secrets:
        words = " ".join(f"--from-file={key}=FILE" for key in secrets)
        notes.append(f"Keys: kubectl create secret generic {name}-keys {words}")
    if variables:
        words = " ".join(f"--from-literal={one}=..." for one in variables)
        notes.append(f"Keys of endpoints: kubectl create secret generic {name}-env {words}")
    head = "".join(f"# {note}\n" for note in notes)
    return head + yaml.safe_dump_all(documents, sort_keys=False, width=1000)


def _labels(name: str, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/component": part}


def _engine(name: str, service: EngineService, replicas: int, claim: str) -> list[dict[str, Any]]:
    spec = service.spec
    assert spec.path is not None
    labels = _labels(name, "engine") | {"bitladder/tier": service.name}
    projector = f"/models/{spec.projector.name}" if spec.projector else ""
    probe: dict[str, Any] = {"httpGet": {"path": "/health", "port": ENGINE_PORT}, "periodSeconds": 5}
    memory = f"{-(-spec.memory_bytes // MiB)}Mi" if spec.memory_bytes else ""
    container: dict[str, Any] = {
        "name": "engine",
        "image": ENGINE_IMAGE,
        "args": service.arguments(f"/models/{spec.path.name}", projector),
        "ports": [{"containerPort": ENGINE_PORT}],
        "readinessProbe": probe,
        "livenessProbe": {**probe, "initialDelaySeconds": 600, "failureThreshold": 6},
        **({"resources": {"requests": {"memory": memory}}} if memory else {}),
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "securityContext": _SECURE,
    }
    pod = {
        "metadata": {"labels": labels},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
        },
    }
    headless = {"clusterIP": "None", "selector": labels, "ports": [{"port": ENGINE_PORT}]}
    return [
        _deployment(service.name, labels, pod, replicas),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": service.name, "labels": labels}, "spec": headless},
    ]


_SECURE: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _deployment(name: str, labels: Mapping[str, str], pod: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {"replicas": replicas, "selector": {"matchLabels": dict(labels)}, "template": dict(pod)},
    }


def _gateway(
    name: str,
    settings: ServeSettings,
    command: Sequence[str],
    image: str,
    secrets: Mapping[str, str],
    variables: Sequence[str],
) -> dict[str, Any]:
    labels = _labels(name, "gateway")
    # A probe names the pod's address as its host, and the gateway answers to names that it knows alone.
    probe = {
        "httpGet": {"path": "/ready", "port": settings.port, "httpHeaders": [{"name": "Host", "value": "localhost"}]},
        "periodSeconds": 5,
    }
    mounts = [{"name": "scratch", "mountPath": "/tmp"}]
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {}}]
    if secrets:
        items = [{"key": key, "path": place} for key, place in secrets.items()]
        mounts.append({"name": "keys", "mountPath": "/keys"})
        volumes.append({"name": "keys", "secret": {"secretName": f"{name}-keys", "items": items}})
    container: dict[str, Any] = {
        "name": "gateway",
        "image": image,
        "command": list(command),
        "env": [{"name": "HOME", "value": "/tmp"}],
        **({"envFrom": [{"secretRef": {"name": f"{name}-env"}}]} if variables else {}),
        "ports": [{"containerPort": settings.port}],
        "readinessProbe": probe,
        "volumeMounts": mounts,
        "securityContext": {**_SECURE, "readOnlyRootFilesystem": True},
    }
    pod = {
        "metadata": {"labels": labels},
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "terminationGracePeriodSeconds": round(settings.drain_s) + 5,
        },
    }
    return _deployment(name, labels, pod, 1)


def _service(name: str, port: int) -> dict[str, Any]:
    labels = _labels(name, "gateway")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"port": port, "targetPort": port}]},
    }


def _policy(name: str) -> dict[str, Any]:
    """Engines ask for no key; the gateway alone may ask them."""
    allowed = {"from": [{"podSelector": {"matchLabels": _labels(name, "gateway")}}], "ports": [{"port": ENGINE_PORT}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{name}-engines"},
        "spec": {
            "podSelector": {"matchLabels": _labels(name, "engine")},
            "policyTypes": ["Ingress"],
            "ingress": [allowed],
        },
    }


def ray_serve(name: str, sources: Sequence[str], *, replicas: int, n_ctx: int | None) -> str:
    """Ray Serve's configuration of its own LLM application (`ray.serve.llm`), which runs checkpoint folders with vLLM.

    Args:
        name: of the application.
        sources: checkpoint folders, or ``hf:org/name``.
        replicas: of each model.
        n_ctx: tokens of context; None for each model's own.

    Raises:
        UsageError: a GGUF file, an address, or a folder that is no checkpoint.
    """
    configs: list[dict[str, Any]] = []
    for source in sources:
        model_id, place = _ray_source(source)
        engine = {} if n_ctx is None else {"engine_kwargs": {"max_model_len": n_ctx}}
        scale = {"min_replicas": replicas, "max_replicas": replicas}
        configs.append(
            {
                "model_loading_config": {"model_id": model_id, "model_source": place},
                "deployment_config": {"autoscaling_config": scale},
                **engine,
            }
        )
    twice = {config["model_loading_config"]["model_id"] for config in configs}
    if len(twice) < len(configs):
        raise UsageError("Two of the folders have the same name.", do="Rename one: clients ask for them by it.")
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": dns_name(name),
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {"llm_configs": configs},
            }
        ],
    }
    tiers = [f"--{role} http://HEAD:8000#{config['model_loading_config']['model_id']}"
             for role, config in zip(("quality", "speed"), configs, strict=False)]  # fmt: skip
    notes = [
        "serve deploy THIS.yaml   (pip install 'ray[serve,llm]' on every node; folders must lie there under this path)",
        f"The gateway before it: bitladder serve --name {dns_name(name)} {' '.join(tiers)}",
    ]
    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(document, sort_keys=False, width=1000)


def _ray_source(source: str) -> tuple[str, str]:
    """A model's name and where vLLM loads it from."""
    if source.startswith("hf:"):
        place = source.removeprefix("hf:")
        return place.rsplit("/", 1)[-1], place
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UsageError(
            f"'{source}' is no folder.",
            means="Ray Serve's LLM application runs checkpoints with vLLM; GGUF files and addresses are not its own.",
            do="Name a folder that `bitladder quantize` made (GPTQ-4bit-g128, FP8-DYNAMIC, ...), or hf:org/name; serve "
            "files with --to k8s or --to compose.",
        )
    if "vllm" not in (form := format_of_folder(path)).engines:
        raise UsageError(f"{path} is stored as {form.layout}, which vLLM does not run.", do="Make another level of it.")
    return path.name, str(path.absolute())
