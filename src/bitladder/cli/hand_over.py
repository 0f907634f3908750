"""Verbs around a deployment: write it in another tool's words, make a key for a client."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import ALL_CORES, DEFAULT_CTX, Context, Force, Threads
from bitladder.cli.deploy import tiers_of
from bitladder.cli.terminal import ModelArgument, progress_display, say, verb

if TYPE_CHECKING:
    from bitladder.serve.settings import ServeSettings


class Tool(StrEnum):
    """What a deployment can be written for."""

    OLLAMA = "ollama"
    LM_STUDIO = "lm-studio"
    LLAMA_SWAP = "llama-swap"
    COMPOSE = "compose"
    SYSTEMD = "systemd"


@verb
def export(
    model: ModelArgument,
    to: Annotated[Tool, typer.Option("--to", help="The tool.")],
    quality: Annotated[str | None, typer.Option("--quality", help="A level or a GGUF file.")] = None,
    speed: Annotated[str | None, typer.Option("--speed", help="A level or a GGUF file.")] = None,
    folder: Annotated[
        Path, typer.Option("--folder", help="ollama: where Modelfiles go; lm-studio: its models folder.")
    ] = Path(),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the gateway.")] = 8077,
    ctx: Context = DEFAULT_CTX,
    threads: Threads = ALL_CORES,
    force: Force = False,
) -> None:
    """Write a deployment for another tool: Modelfiles, LM Studio's folder, or a configuration on standard output."""
    from dataclasses import replace

    with progress_display() as progress:
        settings = replace(tiers_of(model, quality, speed, ctx, threads, None, progress), port=port)
    _write(to, settings, folder, force=force)


def _write(to: Tool, settings: ServeSettings, folder: Path, *, force: bool) -> None:
    import shutil

    from bitladder import __version__
    from bitladder.files.atomic import write_whole
    from bitladder.files.outputs import check_output, same_text
    from bitladder.serve import export as words

    specs = [settings.quality, *([settings.speed] if settings.speed else [])]
    match to:
        case Tool.OLLAMA:
            for spec in specs:
                modelfile = folder / f"Modelfile-{spec.level}"
                text = words.ollama_modelfile(spec)
                inputs = [spec.path] if spec.path else []
                check_output(modelfile, "this Modelfile", inputs=inputs, ours=same_text(text), force=force)
                write_whole(modelfile, text, do="Name another --folder.")
                say(words.ollama_command(settings.name, spec, modelfile))
        case Tool.LM_STUDIO:
            for spec in specs:
                say(str(words.place_for_lm_studio(folder, settings.name, spec, force=force)))
        case Tool.LLAMA_SWAP:
            print(words.llama_swap(settings), end="")
        case Tool.COMPOSE:
            print(words.docker_compose(settings, __version__), end="")
        case Tool.SYSTEMD:
            print(words.systemd_unit(settings, Path(shutil.which("bitladder") or "bitladder")), end="")


@verb
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; it appears in logs and rules.")],
    file: Annotated[Path, typer.Option("--file", help="The key file of `bitladder serve --api-key-file`.")],
) -> None:
    """Make a key for a client: it is shown once, and only its hash is added to the key file."""
    from bitladder.serve.limits import add_key

    print(add_key(file, name))


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (export, key):
        app.command()(function)
