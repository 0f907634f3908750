"""Verbs that start from the hardware: recommend, plan, machine, catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from bitladder.cli.build import Context, Levels, split_levels
from bitladder.cli.completion import planned_names
from bitladder.cli.grouped import grouped
from bitladder.cli.terminal import JsonFlag, print_json, progress_display, put, say, verb
from bitladder.errors import UsageError
from bitladder.records import to_json
from bitladder.units import check_above_zero, human_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitladder.plan.abilities import Ability
    from bitladder.plan.inverse import HardwareNeed
    from bitladder.stages.plan import ModelPlan, PlanRequest
    from bitladder.stages.recommend import RecommendRequest

Hardware = Annotated[
    str | None,
    typer.Option("--as", metavar="MACHINE", help="Another machine in words: '16 GB laptop', 'RTX 4090 + 64 GiB'."),
]
Reserve = Annotated[
    str | None,
    typer.Option(
        "--reserve",
        metavar="SIZE",
        help="Memory for the system and other programs.",
        show_default="a quarter, 2 to 8 GiB",
    ),
]


def reserve_named(text: str | None) -> int | None:
    """Bytes; raises UsageError for what is no size."""
    return None if text is None else parse_bytes(text)


def min_speed_named(speed: float | None) -> float | None:
    """Tokens per second, 0 for any; raises UsageError for what is no number."""
    check_above_zero("--min-speed", speed or None)
    return speed


MinSpeed = Annotated[
    float | None,
    typer.Option(
        "--min-speed",
        min=0,
        help="Least expected tokens per second (0: any).",
        show_default="5, for code and extraction 10",
    ),
]
Slots = Annotated[int, typer.Option("--slots", min=1, help="Requests at once, each with its own context.")]
CacheType = Annotated[
    str,
    typer.Option(
        "--kv",
        help="Type of the KV cache: f16, q8_0, q5_1, q4_0, ...; keys and values apart as q8_0/q4_0. `plan MODEL` takes "
        "several.",
    ),
]


@dataclass(kw_only=True)
class PlanOptions:
    """What ``plan`` is asked."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A file, a folder, hf:, ollama:, lmstudio: or a catalogue name; none searches.",
            autocompletion=planned_names,
        ),
    ] = None
    ctx: Context = None
    levels: Levels = None
    slots: Slots = 1
    kv: CacheType = "f16"
    hardware: Hardware = None
    min_speed: Annotated[
        float | None,
        typer.Option(
            "--min-speed", min=0, help="Least expected tokens per second.", show_default="of a MODEL any, without one 5"
        ),
    ] = None
    pair: Annotated[str | None, typer.Option("--pair", metavar="QUALITY,SPEED", help="Place two levels together.")] = (
        None
    )
    launch: Annotated[
        str | None,
        typer.Option("--launch", help="Command for llama-server, ollama, lmstudio, vllm, sglang, tgi or mlx-lm."),
    ] = None
    job: Annotated[
        str | None,
        typer.Option(
            "--job",
            metavar="calibrate|gptq|recipe|run",
            help="What such a job takes on GPUs and nodes, of the kind that --as names (default H100).",
        ),
    ] = None
    needs: Annotated[bool, typer.Option("--needs", help="What hardware each level needs, and what it saves.")] = False


@verb
@grouped
def plan(options: PlanOptions, json_output: JsonFlag = False) -> None:
    """Which levels fit, where they would lie and how fast they would be. Reads headers only.

    Without MODEL: what `recommend` says, with every model of the catalogue that runs on the machine.
    """
    from bitladder.stages.plan import PlanRequest, plan_model
    from bitladder.stages.plan import needs as hardware_needs

    request = PlanRequest(options.ctx, options.slots, options.kv, options.hardware)
    min_speed = min_speed_named(options.min_speed)
    if options.job is not None:
        if options.model is None:
            raise UsageError("--job is about one model.", do="Name it: `bitladder plan MODEL --job gptq`.")
        _show_job(options.model, options.job, options.hardware, json_output)
    elif options.model is None:
        from bitladder.stages.recommend import RecommendRequest

        _recommend(RecommendRequest(run=request, least_decode=min_speed), json_output, every=True)
    elif options.needs:
        if options.hardware is not None:
            raise UsageError(
                "--needs asks which machine a model needs, and --as names one.",
                do="Give one of the two: --as MACHINE says which levels fit there.",
            )
        _show_needs(options.model, hardware_needs(options.model, request), request.wish.n_ctx, json_output)
    else:
        with progress_display(quiet=json_output) as progress:
            made = plan_model(
                options.model,
                request,
                levels=split_levels(options.levels),
                pair=split_levels(options.pair) or (),
                engine=options.launch,
                least_decode=min_speed or 0.0,
                progress=progress,
            )
        _show_plan(made, request, json_output)


def _show_plan(made: ModelPlan, request: PlanRequest, json_output: bool) -> None:
    from dataclasses import replace

    from bitladder.report import plan_table

    if json_output:
        rest = {name: value for name, value in to_json(made).items() if name != "plan"}
        print_json({**to_json(made.plan), **rest, "request": replace(request, n_ctx=made.plan.n_ctx)})
        return
    plan_table(made.plan)
    for note in made.notes:
        say(f"! {note}")
    if made.basis and not made.exact:
        put(f"Sizes from {made.basis}.")
    _show_abilities(made.abilities)
    if made.offers:
        from bitladder.files.remote import offer_line

        put("Ready in the repository: " + "; ".join(offer_line(offer) for offer in made.offers))
    if made.pair:
        put(f"Pair: {made.pair.reason}.")
    if made.advice:
        put(f"Format: {made.advice.format} for {', '.join(made.advice.engines)}: {made.advice.reason}.")
    for warning in made.slow:
        say(f"! {warning}.")
    if made.launch:
        put(made.launch.command)
        if made.launch.file_text:
            put(f"\n{made.launch.file_name}:\n{made.launch.file_text}")


def _show_job(model: str, job: str, hardware: str | None, json_output: bool) -> None:
    from bitladder.report.scale import print_job_costs
    from bitladder.stages.plan import job_costs

    with progress_display(quiet=json_output) as progress:
        costs = job_costs(model, job, hardware, progress)
    if json_output:
        print_json(costs)
    else:
        print_job_costs(model, job, costs)


def _show_abilities(found: Sequence[Ability]) -> None:
    """What the model can have, in a line, and what not, with each reason once."""
    can = [f"{one.what} ({one.way})" for one in found if not one.reason]
    cannot: dict[str, list[str]] = {}
    for one in found:
        if one.reason:
            cannot.setdefault(one.reason, []).append(one.what)
    if can:
        put(f"Can have: {', '.join(can)}.")
    for reason, what in cannot.items():
        put(f"Cannot have: {', '.join(what)}: {reason}.")


@dataclass(kw_only=True)
class RecommendOptions:
    """What ``recommend`` is asked."""

    use: Annotated[str, typer.Option("--for", metavar="USE", help="chat, code, extraction or long-context.")] = "chat"
    hardware: Hardware = None
    min_speed: MinSpeed = None
    reserve: Reserve = None
    ctx: Annotated[
        int | None, typer.Option("--ctx", min=64, help="Context in tokens.", show_default="by use, 4096 to 32768")
    ] = None
    slots: Slots = 1
    kv: CacheType = "f16"
    every: Annotated[bool, typer.Option("--all", help="Show every model of the catalogue that fits.")] = False


@verb
@grouped
def recommend(options: RecommendOptions, json_output: JsonFlag = False) -> None:
    """One model and level for this machine and your use, why, and what else would do.

    Ranks by published measurements of what levels cost; `run` measures it on your own inputs.
    """
    from bitladder.stages.plan import PlanRequest
    from bitladder.stages.recommend import RecommendRequest

    request = RecommendRequest(
        use=options.use,
        run=PlanRequest(options.ctx, options.slots, options.kv, options.hardware),
        reserve=reserve_named(options.reserve),
        least_decode=min_speed_named(options.min_speed),
    )
    _recommend(request, json_output, every=options.every)


def _recommend(request: RecommendRequest, json_output: bool, *, every: bool) -> None:
    from bitladder.stages.recommend import recommend

    made = recommend(request)
    if json_output:
        print_json(made)
        return
    from bitladder.report.recommend import print_recommendation

    beyond = [f"Just out of reach: {one.name} at {one.level} {one.gives}." for one in made.beyond]
    print_recommendation(made.found, assumed=made.assumed, notes=made.notes, beyond=beyond, every=every)


def _show_needs(model: str, rows: list[HardwareNeed], n_ctx: int, json_output: bool) -> None:
    if json_output:
        print_json({"levels": rows})
        return
    from bitladder.report.needs import needs_table

    needs_table(model, rows, n_ctx)


@verb
def machine(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what decides speed (about 20 s) and keep it.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """What is here: memory, cores, GPUs, disk, and what was measured."""
    from bitladder.stages.plan import describe_machine, unusable_gpus

    with progress_display(quiet=json_output) as progress:
        here, measured = describe_machine(measure=measure, progress=progress)
    if json_output:
        print_json({"machine": here, "measured": measured})
        return
    put(f"{here.cpu}: {here.cores} cores, {' '.join(here.features) or 'no vector features known'}")
    put(f"RAM  {human_bytes(here.ram_total)}, {human_bytes(here.ram_available)} available now")
    for gpu in here.gpus:
        own = f"{human_bytes(gpu.vram_total)}, {human_bytes(gpu.vram_free)} free"
        put(f"GPU  {gpu.name}, {'in the same memory as the processor' if here.unified else own}")
    for line in unusable_gpus():
        say(f"! {line}")
    put(f"Disk {human_bytes(here.disk_free)} free")
    if measured is None:
        put("Nothing measured yet: `bitladder machine --measure`.")
        return
    put(f"Measured {measured.when[:10]} with {measured.engine}:")
    put(f"  RAM read       {measured.ram_read / 1e9:.1f} GB/s")
    for qtype, rate in measured.rates.stream.items():
        put(f"  decode {qtype:<7} {rate / 1e9:.1f} GB/s of weights")
    put(f"  repeats        within x{measured.rates.noise:.2f} of the fastest")
    put(f"  matrix product {measured.f32_matmul / 1e9:.0f} GFLOP/s (f32)")
    put(f"  disk read      {measured.disk_read / 1e9:.2f} GB/s")


@verb
def catalog(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="Part of a name, or nothing for all.")] = "",
    json_output: JsonFlag = False,
) -> None:
    """Open models that `plan` knows by name, with the source of their figures."""
    from bitladder.stages.plan import catalogue

    rows = catalogue(text)
    if not rows:
        raise UsageError(f"No model of the catalogue matches '{text}'.", do="`bitladder catalog` lists all.")
    if json_output:
        print_json({"models": rows})
        return
    for row in rows:
        put(f"{row.hub:<52} {row.params:>8.4g} B  {row.licence}")
    for source in dict.fromkeys(row.source for row in rows):
        count = sum(row.source == source for row in rows)
        put(f"{count} {'row' if count == 1 else 'rows'} from {source or 'a source that is not named'}")


@verb
def formats(hardware: Hardware = None, json_output: JsonFlag = False) -> None:
    """Which engine runs which scheme on which device, by public documents, each with its date."""
    from bitladder.report.formats import formats_table
    from bitladder.stages.formats import formats as found
    from bitladder.visible import console

    result = found(hardware)
    if json_output:
        print_json(result)
    else:
        formats_table(result.table, [device.name for device in result.devices], result.runs, console(highlight=False))


def add_to(app: typer.Typer) -> None:
    """Register this module's verbs."""
    for function in (recommend, plan, machine, catalog, formats):
        app.command()(function)
