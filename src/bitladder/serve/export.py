"""A deployment in other tools' words: Ollama, LM Studio, llama-swap, docker compose, systemd. Text from
settings.

Nothing here writes a file except `place_for_lm_studio`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import yaml

from bitladder.errors import OutputError, UsageError
from bitladder.files.atomic import written_aside
from bitladder.files.hashing import file_sha256
from bitladder.files.outputs import check_output, same_place
from bitladder.serve.deploy import must_take_turns, specs_by_role
from bitladder.serve.settings import ServeSettings, TierSpec

_COPIED_AT_ONCE = 8 << 20
_LLAMA_SWAP_HEAD = "# llama-swap configuration: one OpenAI-compatible endpoint that starts llama-server on demand.\n"


def _file(spec: TierSpec) -> Path:
    if spec.path is None:
        raise UsageError(
            f"Level '{spec.level}' is an endpoint at {spec.url}.", do="Only levels that are files can be exported."
        )
    return spec.path.absolute()


def _slug(text: str) -> str:
    """Lower case, digits and ``. _ -`` only, as model names and service names may be."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-") or "model"


def ollama_modelfile(spec: TierSpec) -> str:
    """A Modelfile for one level. Ollama takes the chat template from the GGUF itself."""
    path = str(_file(spec))
    if "\n" in path:
        raise UsageError("A Modelfile cannot hold a path with a line break.")
    return f"# {spec.level}, sha256 {spec.sha256 or 'unknown'}\nFROM {path}\nPARAMETER num_ctx {spec.n_ctx}\n"


def ollama_command(name: str, spec: TierSpec, modelfile: Path) -> str:
    """The command that makes the level a model of Ollama, tagged with the level's name."""
    return f"ollama create {_slug(name)}:{_slug(spec.level)} -f {shlex.quote(str(modelfile))}"


def lm_studio_place(models: Path, name: str, spec: TierSpec, publisher: str = "bitladder") -> Path:
    """Where LM Studio looks for a level: ``models/publisher/name-GGUF/file.gguf``."""
    return models / publisher / f"{_slug(name)}-GGUF" / _file(spec).name


def place_for_lm_studio(models: Path, name: str, spec: TierSpec, *, force: bool | None = None) -> Path:
    """Put a level's file where LM Studio finds it: as a hard link, or as a copy when that is another disk. It may be
    there already; another file of that name is replaced with ``force``.

    Raises:
        UsageError: another file is there already.
        OutputError: the folder cannot be written to.
    """
    source, target = _file(spec), lm_studio_place(models, name, spec)
    try:
        if target.is_file() and (same_place(target, source) or _same_bytes(target, source)):
            return target
        check_output(target, f"{spec.level} of {name}", force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # only with force is anything there
        try:
            os.link(source, target)
        except OSError:
            with source.open("rb") as read, written_aside(target) as copy:
                shutil.copyfileobj(read, copy, _COPIED_AT_ONCE)
    except OSError as error:
        raise OutputError(f"'{target}' cannot be written: {error.strerror or error}.") from None
    return target


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and file_sha256(one) == file_sha256(other)


def llama_swap(settings: ServeSettings) -> str:
    """Configuration for llama-swap: each level a model, and both tiers kept loaded when they fit together."""
    roles = specs_by_role(settings)
    models = {}
    for names, spec in roles:
        command = ["llama-server", "--port", "${PORT}", "--model", str(_file(spec)), "--alias", spec.level]
        command += ["--ctx-size", str(spec.n_ctx * spec.slots), "--parallel", str(spec.slots)]
        command += ["--threads", str(settings.threads)]
        joined = " ".join(part if part == "${PORT}" else shlex.quote(part) for part in command)
        models[spec.level] = {"cmd": joined, "aliases": list(names[:-1]), "checkEndpoint": "/health"}
    levels = [spec.level for _, spec in roles]
    swap = must_take_turns([spec for _, spec in roles], settings.memory_budget_bytes)
    groups = {"tiers": {"swap": swap, "exclusive": False, "members": levels}}
    return _LLAMA_SWAP_HEAD + yaml.safe_dump({"models": models, "groups": groups}, sort_keys=False, width=1000)


def serve_command(settings: ServeSettings, *, host: str | None = None, folder: str | None = None) -> list[str]:
    """The `bitladder serve` command of a deployment; ``folder`` replaces the folder of every file."""

    def place(spec: TierSpec) -> str:
        if spec.path is None:
            return str(spec.url)
        return f"{folder}/{spec.path.name}" if folder else str(_file(spec))

    command = ["bitladder", "serve", settings.name, "--quality", place(settings.quality)]
    if settings.speed is not None:
        command += ["--speed", place(settings.speed)]
    command += ["--host", host or settings.host, "--port", str(settings.port)]
    command += ["--ctx", str(settings.quality.n_ctx), "--threads", str(settings.threads)]
    if settings.api_key_file is not None:
        name = settings.api_key_file.name if folder else str(settings.api_key_file.absolute())
        command += ["--api-key-file", f"{folder}/{name}" if folder else name]
    return command


def docker_compose(settings: ServeSettings, version: str) -> str:
    """A compose file that builds an image with this version of Bitladder and serves the files, read-only.

    The port is published on the host's loopback only; keys are needed when the settings name a key file.
    """
    files = [_file(spec) for _, spec in specs_by_role(settings)]
    volumes = [f"{path}:/models/{path.name}:ro" for path in files]
    if settings.api_key_file is not None:
        volumes.append(f"{settings.api_key_file.absolute()}:/models/{settings.api_key_file.name}:ro")
    command = serve_command(settings, host="0.0.0.0", folder="/models")
    if settings.api_key_file is None:
        command.append("--open-to-all")  # the container's only door is the host's loopback
    # Compose would take a dollar sign as a variable.
    command = [part.replace("$", "$$") for part in command]
    dockerfile = f"FROM python:3.11-slim\nRUN pip install --no-cache-dir bitladder=={version}\nUSER nobody\n"
    probe = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{settings.port}/ready')"
    service = {
        "build": {"dockerfile_inline": dockerfile},
        "command": command,
        "environment": {"HOME": "/tmp"},
        "ports": [f"127.0.0.1:{settings.port}:{settings.port}"],
        "volumes": [volume.replace("$", "$$") for volume in volumes],
        "read_only": True,
        "tmpfs": ["/tmp"],
        "stop_grace_period": f"{round(settings.drain_s) + 5}s",
        "restart": "unless-stopped",
        "healthcheck": {"test": ["CMD", "python", "-c", probe], "interval": "10s", "start_period": "120s"},
    }
    return yaml.safe_dump({"services": {_slug(settings.name): service}}, sort_keys=False, width=1000)


def systemd_unit(settings: ServeSettings, program: Path) -> str:
    """A unit that serves a deployment as a user of its own. ``program`` is the `bitladder` command's path."""
    command = [str(program), *serve_command(settings)[1:]]
    quoted = " ".join(_systemd_quoted(part) for part in command)
    return f"""[Unit]
Description=Bitladder gateway for {settings.name.replace("%", "%%")}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={quoted}
DynamicUser=yes
StateDirectory=bitladder
Environment=HOME=/var/lib/bitladder
Restart=on-failure
RestartSec=2
TimeoutStopSec={round(settings.drain_s) + 5}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""


def _systemd_quoted(part: str) -> str:
    """One argument as systemd reads it: specifiers and variables doubled, quotes and backslashes escaped."""
    if "\n" in part:
        raise UsageError("A systemd unit cannot hold an argument with a line break.")
    safe = part.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return safe if re.fullmatch(r"[\w./:=@+,%$-]+", safe) else f'"{safe}"'
