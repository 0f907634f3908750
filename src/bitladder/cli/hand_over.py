"""Verbs around a deployment: write it in another tool's words, make a key for a client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import Force, working
from bitladder.cli.deploy import TierOptions, tiers_of
from bitladder.cli.grouped import grouped
from bitladder.cli.terminal import put, say, verb
from bitladder.errors import UsageError

if TYPE_CHECKING:
    from bitladder.serve.host import ImageSource
    from bitladder.serve.settings import ServeSettings


class Tool(StrEnum):
    """What a deployment can be written for."""

    OLLAMA = "ollama"
    LM_STUDIO = "lm-studio"
    LLAMA_SWAP = "llama-swap"
    COMPOSE = "compose"
    SYSTEMD = "systemd"
    K8S = "k8s"
    RAY_SERVE = "ray-serve"


@dataclass(kw_only=True)
class ExportOptions(TierOptions):
    """What ``export`` is asked."""

    to: Annotated[Tool, typer.Option("--to", help="The tool.")]
    folder: Annotated[
        Path, typer.Option("--folder", help="ollama: where Modelfiles go; lm-studio: its models folder.")
    ] = Path()
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the gateway.")] = 8077
    force: Force = False
    source: Annotated[
        Path | None,
        typer.Option("--from", help="compose: the wheel or checkout of Bitladder that its image is built from."),
    ] = None
    replicas: Annotated[
        int,
        typer.Option("--replicas", min=1, max=256, help="compose, k8s, ray-serve: engines for each file or folder."),
    ] = 1
    image: Annotated[
        str | None, typer.Option("--image", help="k8s: the gateway's image, one of Bitladder in your registry.")
    ] = None
    volume: Annotated[str, typer.Option("--volume", help="k8s: the volume claim that holds the models' files.")] = (
        "models"
    )


@verb
@grouped
def export(options: ExportOptions) -> None:
    """Write a deployment for another tool: Modelfiles, LM Studio's folder, or a configuration on standard output."""
    from dataclasses import replace

    from bitladder.serve.host import image_source
    from bitladder.serve.limits import read_keys

    if options.to is Tool.RAY_SERVE:
        put(_ray_serve(options), end="")
        return
    if options.to is Tool.K8S and not options.image:
        raise UsageError(
            "A cluster needs an image of Bitladder.",
            means="None is published: it is built from your checkout or wheel and pushed to your registry.",
            do="Build one (`bitladder export --to compose` has the Dockerfile), and name it with --image.",
        )
    if options.replicas > 1 and options.to not in (Tool.COMPOSE, Tool.K8S):
        raise UsageError(f"--replicas means nothing to {options.to}.", do="Use --to compose, k8s or ray-serve.")
    with working(options.threads) as work:
        found = image_source(options.source) if options.to is Tool.COMPOSE else None
        if options.api_key_file is not None:
            read_keys(options.api_key_file)
        settings = tiers_of(options, work)
    settings = replace(settings, port=options.port, api_key_file=options.api_key_file)
    _write(options, settings, found)


def _ray_serve(options: ExportOptions) -> str:
    from bitladder.serve.cluster import ray_serve

    sources = list(dict.fromkeys([*(options.quality or ()), *(options.speed or ())])) or [options.model or ""]
    if sources == [""]:
        raise UsageError("No folder is named.", do="Give --quality FOLDER, and --speed FOLDER where there are two.")
    name = options.name or options.model or Path(sources[0]).name
    return ray_serve(name, sources, replicas=options.replicas, n_ctx=options.ctx)


def _kubernetes(options: ExportOptions, settings: ServeSettings) -> str:
    from bitladder.serve import export as words
    from bitladder.serve.cluster import dns_name, kubernetes, with_engine_services

    files = words.model_files(settings)
    files += [spec.projector for spec in (settings.quality, settings.speed) if spec and spec.projector]
    behind, services = with_engine_services(settings, dns_name(settings.name))
    secrets = words.secret_files(behind)
    places = {path.absolute(): f"/keys/{name}" for path, name in secrets.items()}
    command = words.serve_command(behind, host="0.0.0.0", path=lambda path: places[path.absolute()])
    command += ["--allow-host", dns_name(settings.name)]
    if settings.api_key_file is None:
        command.append("--open-to-all")  # within the cluster, which its own policies guard
    return kubernetes(
        behind, command, services, image=options.image or "", replicas=options.replicas, claim=options.volume,
        files=files, secrets={name: name for name in secrets.values()}, variables=words.key_variables(behind),
    )  # fmt: skip


def _write(options: ExportOptions, settings: ServeSettings, image: ImageSource | None) -> None:
    from bitladder.files.atomic import write_whole
    from bitladder.files.outputs import check_output, same_text
    from bitladder.serve import export as words
    from bitladder.serve.host import own_files, program, reader_of

    to, folder, force = options.to, options.folder, options.force
    specs = [settings.quality, *([settings.speed] if settings.speed else [])]
    for spec in specs:
        if spec.note:  # that a file is not the measured one, or was never measured
            say(spec.note)
    match to:
        case Tool.OLLAMA:
            texts = [(folder / f"Modelfile-{spec.level}", words.ollama_modelfile(spec)) for spec in specs]
            for spec, (modelfile, text) in zip(specs, texts, strict=True):
                inputs = [spec.path] if spec.path else []
                check_output(modelfile, "this Modelfile", inputs=inputs, ours=same_text(text), force=force)
            for spec, (modelfile, text) in zip(specs, texts, strict=True):
                write_whole(modelfile, text, do="Name another --folder.")
                say(words.ollama_command(settings.name, spec, modelfile))
        case Tool.LM_STUDIO:
            for path in words.place_for_lm_studio(folder, settings.name, specs, force=force):
                say(str(path))
        case Tool.LLAMA_SWAP:
            put(words.llama_swap(settings), end="")
        case Tool.COMPOSE:
            assert image is not None  # found before anything was built
            owner = reader_of([*words.model_files(settings), *words.key_files(settings)])
            put(words.docker_compose(settings, image, owner, replicas=options.replicas), end="")
        case Tool.K8S:
            put(_kubernetes(options, settings), end="")
        case Tool.SYSTEMD:
            owner = reader_of([*own_files(), *words.model_files(settings)])
            put(words.systemd_unit(settings, program(), owner), end="")


@verb
def key(
    words: Annotated[
        list[str],
        typer.Argument(metavar="NAME | revoke NAME", help="Whose key it is; it appears in logs and rules."),
    ],
    file: Annotated[Path, typer.Option("--file", help="The key file of `bitladder serve --api-key-file`.")],
) -> None:
    """Make a key for a client: it is shown once, and only its hash is added to the key file. Or revoke it.

    A gateway that runs follows the file.
    """
    from bitladder.serve.limits import add_key, revoke_key

    match words:
        case [name] if name != "revoke":
            put(add_key(file, name))
        case ["revoke", name]:
            revoke_key(file, name)
            say(f"The key of {name} is good no more.")
        case _:
            raise UsageError(
                "One name is wanted.", do="`bitladder key NAME --file FILE`, or `bitladder key revoke NAME`."
            )


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (export, key):
        app.command()(function)
