"""A deployment in other tools' words: Ollama, LM Studio, llama-swap, docker compose, systemd. Text from
settings.

No text ever holds a key: it names the variable or the file that the key comes from. Nothing here writes a file except
`place_for_lm_studio`.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import yaml

from bitladder.describe.cache_types import CacheTypes
from bitladder.engines.llama_program import SPEC_TYPES
from bitladder.errors import OutputError, UsageError
from bitladder.files.atomic import written_aside
from bitladder.files.outputs import check_output, same_place
from bitladder.formats.gguf import parse_split_name
from bitladder.serve.cluster import ENGINE_IMAGE, EngineService, with_engine_services
from bitladder.serve.deploy import must_take_turns, specs_by_role
from bitladder.serve.host import ImageSource, Owner
from bitladder.serve.settings import LOOPBACK, ServeSettings, TierSpec

_COPIED_AT_ONCE = 8 << 20
_LLAMA_SWAP_HEAD = "# llama-swap configuration: one OpenAI-compatible endpoint that starts llama-server on demand.\n"
_HOST_OF_DOCKER = "host.docker.internal"
_CREDENTIALS = "\0"
"""Stands for systemd's folder of credentials until words are quoted; no argument can hold this character."""


def _file(spec: TierSpec) -> Path:
    if spec.path is None:
        raise UsageError(
            f"Level '{spec.level}' is an endpoint at {spec.url}.",
            means="This tool runs files itself.",
            do="Export it to compose or systemd, whose gateway asks endpoints too.",
        )
    return spec.path.absolute()


def _slug(text: str) -> str:
    """Lower case letters, digits and single ``. _ -`` between them, as names of models, images and services may be."""
    return re.sub(r"[._-]{2,}", "-", re.sub(r"[^a-z0-9._-]+", "-", text.lower()))[:60].strip("._-") or "model"


def _one_line(text: str, what: str) -> str:
    if "\n" in text or "\r" in text:
        raise UsageError(f"{what} cannot hold a line break, and '{text!r}' has one.", do="Rename the file or folder.")
    return text


def _parts(path: Path, stem: str = "") -> list[str]:
    """The file names of a model, in order: its own, or those of all parts of a split one; ``stem`` replaces its own."""
    split = parse_split_name(path.name)
    if split is None:
        return [f"{stem}.gguf" if stem else path.name]
    return [str(replace(split, prefix=stem or split.prefix, number=number)) for number in range(1, split.count + 1)]


def _stored_names(specs: Sequence[TierSpec]) -> list[list[str]]:
    """File names for each level in one folder: their own, or the levels' where two have the same."""
    files = [_file(spec) for spec in specs]
    if len({file.name.lower() for file in files}) == len(set(files)):
        return [_parts(file) if file.suffix == ".gguf" else _parts(file, file.name) for file in files]
    return [_parts(file, spec.level.replace("/", "-")) for file, spec in zip(files, specs, strict=True)]


def ollama_modelfile(spec: TierSpec) -> str:
    """A Modelfile for one level. Ollama takes the chat template from the GGUF itself.

    Raises:
        UsageError: an endpoint, a model in several parts, or a path that a Modelfile cannot hold.
    """
    file = _file(spec)
    path = _one_line(str(file), "A Modelfile")
    if len(_parts(file)) > 1:
        raise UsageError(
            f"'{file.name}' is one of {len(_parts(file))} parts.",
            means="Ollama makes a model of a single file.",
            do="Join them with llama-gguf-split --merge, or export to a tool that runs parts.",
        )
    if path != path.strip():  # the parser trims what is not quoted
        path = f'"{path}"'
    cache = "" if spec.cache.is_default else f"# {_ollama_cache(spec.cache)}\n"
    return f"# {spec.level}, sha256 {spec.sha256 or 'unknown'}\n{cache}FROM {path}\nPARAMETER num_ctx {spec.n_ctx}\n"


def _ollama_cache(cache: CacheTypes) -> str:
    """How Ollama gets a KV cache of other types: a setting of the server, for all its models.

    Raises:
        UsageError: it has no such cache.
    """
    if cache.k != cache.v or cache.k not in ("q8_0", "q4_0"):
        raise UsageError(
            f"Ollama has no KV cache of {cache}.", do="Choose f16, q8_0 or q4_0, or export to a tool that has it."
        )
    return f"Start Ollama with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={cache}"


def ollama_command(name: str, spec: TierSpec, modelfile: Path) -> str:
    """The command that makes the level a model of Ollama, tagged with the level's name."""
    return f"ollama create {_slug(name)}:{_slug(spec.level)} -f {shlex.quote(str(modelfile))}"


def lm_studio_places(models: Path, name: str, specs: Sequence[TierSpec], publisher: str = "bitladder") -> list[Path]:
    """Where LM Studio looks for levels: for a file ``models/publisher/name-GGUF/file.gguf``, its first one where it has
    parts, for a folder ``models/publisher/name-level``.
    """
    own = models / publisher
    files = iter(_stored_names([spec for spec in specs if not _file(spec).is_dir()]))
    return [
        own / _slug(f"{name}-{spec.level}") if _file(spec).is_dir() else own / f"{_slug(name)}-GGUF" / next(files)[0]
        for spec in specs
    ]


def place_for_lm_studio(models: Path, name: str, specs: Sequence[TierSpec], *, force: bool | None = None) -> list[Path]:
    """Put levels' files where LM Studio finds them: as hard links, or as copies when that is another disk.

    Returns the first file of each, or the folder. A file that is there already is taken when it has the same bytes;
    another of that name is replaced with ``force``.

    Raises:
        UsageError: another file is there already, or a folder is not MLX's.
        OutputError: the folder cannot be written to.
    """
    targets = lm_studio_places(models, name, specs)
    files = iter(_stored_names([spec for spec in specs if not _file(spec).is_dir()]))
    for spec, target in zip(specs, targets, strict=True):
        source, what = _file(spec), f"{spec.level} of {name}"
        if source.is_dir():
            _place_folder(source, target, what, force=force)
            continue
        for part, stored in zip(_parts(source), next(files), strict=True):
            _place(source.with_name(part), target.with_name(stored), what, force=force)
    return targets


def _place_folder(source: Path, target: Path, what: str, *, force: bool | None) -> None:
    """The files of a folder that LM Studio runs."""
    from bitladder.files.checkpoint_check import format_of_folder

    if "lmstudio" not in (form := format_of_folder(source)).engines:
        raise UsageError(
            f"{source} is stored as {form.layout}.",
            means="LM Studio runs GGUF files and MLX's folders.",
            do="Make a level like Q4_K_M or MLX-4bit-g64 of the model, or serve this one with another engine.",
        )
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    others = sorted(path.name for path in target.iterdir() if path.name not in names) if target.is_dir() else []
    if others:
        raise UsageError(
            f"{target} holds {others[0]}, which is not of this level.",
            means="LM Studio would read the files of two levels as one.",
            do="Delete that folder, or choose another with --folder.",
        )
    for name in names:
        _place(source / name, target / name, what, force=force)


def _place(source: Path, target: Path, what: str, *, force: bool | None) -> None:
    """One file as a hard link or a copy."""
    try:
        if target.is_file() and (same_place(target, source) or filecmp.cmp(source, target, shallow=False)):
            return
        check_output(target, what, force=force)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # only with force is anything there
        try:
            os.link(source, target)
        except OSError:
            with source.open("rb") as read, written_aside(target) as copy:
                shutil.copyfileobj(read, copy, _COPIED_AT_ONCE)
    except OSError as error:
        raise OutputError(f"'{target}' cannot be written: {error.strerror or error}.") from None


def llama_swap(settings: ServeSettings) -> str:
    """Configuration for llama-swap: each level a model, and both tiers kept loaded when they fit together.

    Raises:
        UsageError: an endpoint, or a path that llama-swap would read otherwise.
    """
    roles = specs_by_role(settings)
    models = {}
    for names, spec in roles:
        command = ["llama-server", "--port", "${PORT}", "--model", str(_file(spec)), "--alias", spec.level]
        if spec.projector is not None:
            command += ["--mmproj", str(spec.projector.absolute())]
        command += ["--ctx-size", str(spec.n_ctx * spec.slots), "--parallel", str(spec.slots)]
        command += ["--threads", str(settings.threads)]
        if not spec.cache.is_default:
            command += ["--cache-type-k", spec.cache.k, "--cache-type-v", spec.cache.v]
        if spec.speculate is not None:
            command += ["--spec-type", SPEC_TYPES[spec.speculate.kind]]
            command += ["--model-draft", str(spec.speculate.draft.absolute())] if spec.speculate.draft else []
        joined = " ".join(part if part == "${PORT}" else shlex.quote(_no_macro(part)) for part in command)
        models[spec.level] = {"cmd": joined, "aliases": list(names[:-1]), "checkEndpoint": "/health"}
    levels = [spec.level for _, spec in roles]
    swap = must_take_turns([spec for _, spec in roles], settings.memory_budget_bytes)
    groups = {"tiers": {"swap": swap, "exclusive": False, "members": levels}}
    return _LLAMA_SWAP_HEAD + yaml.safe_dump({"models": models, "groups": groups}, sort_keys=False, width=1000)


def _no_macro(part: str) -> str:
    """A word of a llama-swap command; what looks like one of its macros cannot be escaped."""
    if "${" in part:
        raise UsageError(f"llama-swap would take '${{' in '{part}' for a macro.", do="Rename the file or folder.")
    return _one_line(part, "A command of llama-swap")


def serve_command(
    settings: ServeSettings,
    *,
    host: str | None = None,
    path: Callable[[Path], str] = lambda path: str(path.absolute()),
    url: Callable[[str], str] = lambda url: url,
) -> list[str]:
    """The `bitladder serve` command of a deployment, which needs nothing but the files and keys that it names.

    ``path`` and ``url`` say how files and addresses are called where the command will run.
    """
    tiers = {"--quality": settings.quality}
    if settings.speed is not None and settings.speed != settings.quality:
        tiers["--speed"] = settings.speed
    command = ["bitladder", "serve", "--name", settings.name]
    keys = []
    for option, spec in tiers.items():
        if spec.path is not None:
            command += [option, spec.cache.named(path(spec.path))]
            continue
        for one, address in zip(spec.keyed, map(url, spec.addresses), strict=True):
            command += [option, address]
            at = urlsplit(address).netloc
            if one.key_file is not None:
                keys += ["--key-file", f"{at}={path(one.key_file)}"]
            elif one.key_env:
                keys += ["--key-env", f"{at}={one.key_env}"]
    command += ["--host", host or settings.host, "--port", str(settings.port)]
    contexts = {spec.n_ctx for spec in tiers.values() if spec.path is not None}
    if len(contexts) == 1:  # else each has its own model's length, as it has without --ctx
        command += ["--ctx", str(contexts.pop())]
    for name, option in (("quality", "--quality"), ("speed", "--speed")):
        guesses = tiers[option].speculate if option in tiers else None
        if guesses is not None:
            words = f"draft:{path(guesses.draft)}" if guesses.draft else guesses.kind
            command += ["--speculate", f"{name}={words}"]
    command += ["--threads", str(settings.threads), *keys]
    if settings.api_key_file is not None:
        command += ["--api-key-file", path(settings.api_key_file)]
    return command


def secret_files(settings: ServeSettings) -> dict[Path, str]:
    """Files that hold keys, with the names that they get where the gateway runs."""
    named: dict[Path, str] = {} if settings.api_key_file is None else {settings.api_key_file: "client-keys"}
    tiers = {"quality-key": settings.quality, **({"speed-key": settings.speed} if settings.speed else {})}
    for name, spec in tiers.items():
        for number, one in enumerate(spec.keyed):
            if one.key_file is not None:
                named.setdefault(one.key_file, name if number == 0 else f"{name}-{number + 1}")
    return named


def key_variables(settings: ServeSettings) -> list[str]:
    """Environment variables that keys come from."""
    specs = [settings.quality, *([settings.speed] if settings.speed else [])]
    return sorted({one.key_env for spec in specs for one in spec.keyed if one.key_env and not one.key_file})


def model_files(settings: ServeSettings) -> list[Path]:
    """Every file of the levels that are files."""
    specs = [spec for _, spec in specs_by_role(settings) if spec.path is not None]
    return [_file(spec).with_name(name) for spec in specs for name in _parts(_file(spec))]


def key_files(settings: ServeSettings) -> list[Path]:
    """Every file that a key is read from."""
    return [path.absolute() for path in secret_files(settings)]


def docker_compose(
    settings: ServeSettings, image: ImageSource, owner: Owner | None = None, *, replicas: int = 1
) -> str:
    """A compose file that builds an image from a wheel or a checkout and serves the files, read-only.

    With more than one of ``replicas`` each file is run by so many containers of llama.cpp's own image, and the gateway
    asks them; with one the gateway runs the files itself.

    The port is published on the host's loopback only; keys are needed when the settings name a key file. Endpoints on
    the host's own loopback are asked by the name that containers know the host by.

    Args:
        settings: what to serve.
        image: what the image is built from.
        owner: who the gateway runs as; None for nobody, who can read what everyone can.
        replicas: engines for each file.
    """
    specs = [spec for _, spec in specs_by_role(settings) if spec.path is not None]
    places: dict[Path, str] = {}
    volumes_of: dict[Path, list[dict[str, object]]] = {}
    for spec, names in zip(specs, _stored_names(specs), strict=True):
        places[_file(spec)] = f"/models/{names[0]}"
        parts = zip(_parts(_file(spec)), names, strict=True)
        volumes_of[_file(spec)] = [_bound(_file(spec).with_name(part), f"/models/{stored}") for part, stored in parts]
    engines: dict[str, object] = {}
    volumes = [volume for found in volumes_of.values() for volume in found]
    if replicas > 1:
        settings, services = with_engine_services(settings, "")
        engines = {
            one.name: _engine_service(one, places[_file(one.spec)], volumes_of[_file(one.spec)], owner, replicas)
            for one in services
        }
        volumes = []
    secrets = secret_files(settings)
    places |= {path.absolute(): f"/run/secrets/{name}" for path, name in secrets.items()}
    command = serve_command(settings, host="0.0.0.0", path=lambda path: places[path.absolute()], url=_from_container)
    if settings.api_key_file is None:
        command.append("--open-to-all")  # the container's only door is the host's loopback
    probe = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{settings.port}/ready')"
    asks_host = any(urlsplit(word).hostname == _HOST_OF_DOCKER for word in command)
    variables = key_variables(settings)
    env_file = f"{_slug(settings.name)}.env"
    service = {
        "build": {"context": str(image.context), "dockerfile_inline": _dockerfile(image)},
        "command": command,
        "environment": {"HOME": "/tmp"},
        **({"env_file": [env_file]} if variables else {}),
        **({"user": f"{owner.uid}:{owner.gid}"} if owner else {}),
        "ports": [f"127.0.0.1:{settings.port}:{settings.port}"],
        **({"extra_hosts": [f"{_HOST_OF_DOCKER}:host-gateway"]} if asks_host else {}),
        **({"volumes": volumes} if volumes or not engines else {}),
        **({"depends_on": list(engines)} if engines else {}),
        **({"secrets": list(secrets.values())} if secrets else {}),
        "read_only": True,
        "tmpfs": ["/tmp"],
        "stop_grace_period": f"{round(settings.drain_s) + 5}s",
        "restart": "unless-stopped",
        "healthcheck": {"test": ["CMD", "python", "-c", probe], "interval": "10s", "start_period": "120s"},
    }
    document: dict[str, object] = {"services": {_slug(settings.name): service, **engines}}
    if secrets:
        document["secrets"] = {name: {"file": str(path.absolute())} for path, name in secrets.items()}
    notes = ["docker compose up --build"]
    if variables:
        notes.append(
            f"{env_file}, beside this file, holds the keys: a line {variables[0]}=... for each. Keep it private."
        )
    if asks_host:
        notes.append(f"An engine on this host must listen where containers reach it: {_HOST_OF_DOCKER}.")
    head = "".join(f"# {note}\n" for note in notes)
    return head + yaml.safe_dump(_without_variables(document), sort_keys=False, width=1000)


def _engine_service(
    service: EngineService, model: str, volumes: list[dict[str, object]], owner: Owner | None, replicas: int
) -> dict[str, object]:
    """Containers that run one file. They publish no port: only what is in the same network reaches them."""
    projector = service.spec.projector
    inside = "/models/projector.gguf" if projector else ""
    if projector is not None:
        volumes = [*volumes, _bound(projector.absolute(), inside)]
    return {
        "image": ENGINE_IMAGE,
        "command": service.arguments(model, inside),
        **({"user": f"{owner.uid}:{owner.gid}"} if owner else {}),
        "volumes": volumes,
        "read_only": True,
        "tmpfs": ["/tmp"],
        "restart": "unless-stopped",
        "deploy": {"replicas": replicas},
    }


def _bound(source: Path, target: str) -> dict[str, object]:
    """A file of the host in the container. The long form: a colon in a path ends the short one."""
    return {
        "type": "bind",
        "source": str(source),
        "target": target,
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def _from_container(address: str) -> str:
    """An address as it is reached from a container: the host's loopback is not the container's."""
    parts = urlsplit(address)
    if parts.hostname not in LOOPBACK and not str(parts.hostname).startswith("127."):
        return address
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit(parts._replace(netloc=_HOST_OF_DOCKER + port))


def _without_variables(value: object) -> object:
    """The same document, whose dollar signs compose does not take for variables."""
    if isinstance(value, dict):
        return {key: _without_variables(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_variables(one) for one in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _dockerfile(image: ImageSource) -> str:
    """Copies what is needed, and nothing else of the folder, and installs it."""
    limits = "-c constraints.txt " if "constraints.txt" in image.files else ""
    lines = [
        "FROM python:3.11-slim",
        "ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL",
        "WORKDIR /build",
        f"COPY {json.dumps([*image.files, './'])}",
        *(f"COPY {json.dumps([folder, './' + folder])}" for folder in image.folders),
        f"RUN pip install --no-cache-dir {limits}{shlex.quote(image.install)}",
        "WORKDIR /",
        "USER nobody",
    ]
    return "".join(line + "\n" for line in lines)


def systemd_unit(settings: ServeSettings, program: Sequence[str], owner: Owner | None = None) -> str:
    """A unit that serves a deployment.

    Args:
        settings: what to serve.
        program: the words that start Bitladder: the path of a program, then arguments.
        owner: who the gateway runs as; None for a user of its own, who can read what everyone can.

    Raises:
        UsageError: an argument with a line break.
    """
    secrets = {path.absolute(): name for path, name in secret_files(settings).items()}

    def place(path: Path) -> str:
        name = secrets.get(path.absolute())
        return f"{_CREDENTIALS}/{name}" if name else str(path.absolute())

    command = [*program, *serve_command(settings, path=place)[1:]]
    quoted = " ".join([_systemd_quoted(command[0], is_program=True), *map(_systemd_quoted, command[1:])])
    quoted = quoted.replace(_CREDENTIALS, "${CREDENTIALS_DIRECTORY}")
    user = "DynamicUser=yes" if owner is None else f"User={owner.name}"
    keys = [f"LoadCredential={name}:{_systemd_path(path)}" for path, name in secrets.items()]
    if variables := key_variables(settings):
        file = f"/etc/bitladder/{_slug(settings.name)}.env"
        keys += [f"# A line {name}=... there, which only root needs to read:" for name in variables]
        keys.append(f"EnvironmentFile={file}")
    # Its own /tmp hides the real one, and with it what lies there.
    hidden = [path for path in model_files(settings) if path.is_relative_to("/tmp") or path.is_relative_to("/var/tmp")]
    seen = [f'BindReadOnlyPaths="{_systemd_escaped(str(path))}"' for path in hidden]
    name = settings.name.replace("\\", "\\\\").replace("%", "%%")
    return f"""[Unit]
Description=Bitladder gateway for {name}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={quoted}
{user}
{"".join(line + chr(10) for line in (*keys, *seen))}StateDirectory=bitladder
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


def _systemd_path(path: Path) -> str:
    """A path as the value of a setting, which is not quoted."""
    text = _one_line(str(path), "A systemd unit")
    if text != text.strip() or text.endswith("\\"):
        raise UsageError(f"A systemd unit cannot name the file '{text}'.", do="Rename it.")
    return text.replace("%", "%%")


def _systemd_quoted(part: str, *, is_program: bool = False) -> str:
    """One argument as systemd reads it: specifiers and variables doubled, quotes and backslashes escaped.

    Variables are not expanded in the program's own path.
    """
    safe = _systemd_escaped(part)
    if not is_program:
        safe = safe.replace("$", "$$")
    return safe if re.fullmatch(r"[\w./:=@+,%$-]+", safe) else f'"{safe}"'


def _systemd_escaped(text: str) -> str:
    """What stands between double quotes."""
    _one_line(text, "A systemd unit")
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
