"""An inspected file or folder on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitladder.records.inspection import FolderInspection, Inspection
from bitladder.report.rows import percent
from bitladder.units import human_bytes
from bitladder.visible import console as visible_console

if TYPE_CHECKING:
    from rich.console import Console


def inspection_table(inspection: Inspection, *, tensors: bool = False, console: Console | None = None) -> None:
    """What a file holds, its types by share, and whether its name tells the truth; every tensor on request."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console or visible_console(highlight=False)
    out.print(Text(f"{inspection.name or inspection.file}  {inspection.architecture}", style="bold"))
    split = f" in {inspection.parts} parts" if inspection.parts > 1 else ""
    size = f"{human_bytes(inspection.file_bytes)}{split}, {inspection.weights / 1e6:,.1f} million weights"
    out.print(Text(f"{size}, {inspection.bpw:.2f} bits per weight", style="dim"))
    style = {True: "green", False: "red", None: ""}[inspection.truthful]
    out.print(Text(inspection.verdict, style=style))
    if inspection.quantized:
        out.print(Text(inspection.quantized, style="dim"))
    shares = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shares.add_column("type")
    shares.add_column("share of weights", justify="right")
    for qtype, share in inspection.type_share.items():
        shares.add_row(qtype, percent(share, 1))
    out.print(shares)
    if inspection.off_recipe:
        shown = ", ".join(inspection.off_recipe[:5])
        more = len(inspection.off_recipe) - 5
        out.print(Text(f"Not as the recipe has them: {shown}" + (f" and {more} more" if more > 0 else "")))
    if tensors:
        listing = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("tensor", "shape", "type", "bytes"):
            listing.add_column(title, justify="right" if title in ("shape", "bytes") else "left", no_wrap=True)
        for tensor in inspection.tensors:
            shape = " x ".join(map(str, tensor.shape))
            listing.add_row(tensor.name, shape, tensor.qtype, human_bytes(tensor.nbytes))
        out.print(listing)


def folder_table(inspection: FolderInspection, *, tensors: bool = False, console: Console | None = None) -> None:
    """What a checkpoint folder holds, and whether configuration and tensors agree; on request what stays float."""
    from rich.console import Console
    from rich.text import Text

    out = console or Console(highlight=False)
    group = "whole rows" if inspection.group_size == -1 else f"groups of {inspection.group_size}"
    if inspection.group_size is None:
        group = ", ".join(f"{count} x {scheme}" for scheme, count in inspection.schemes.items())
    bits = "" if inspection.bits is None else f" {inspection.bits} bits,"
    sym = {True: ", symmetric", False: ", with zero points", None: ""}[inspection.symmetric]
    out.print(Text(f"{inspection.folder}  {inspection.architecture}", style="bold"))
    size = f"{human_bytes(inspection.file_bytes)}, {inspection.weights / 1e6:,.1f} million weights"
    out.print(Text(f"{size}, {inspection.bpw:.2f} bits per weight", style="dim"))
    share = f"{inspection.linears} linear layers, {percent(inspection.quantized_share, 1)} of the weights"
    out.print(Text(f"{inspection.format}:{bits} {group}{sym}; {share}"))
    out.print(Text(inspection.verdict, style="green" if inspection.truthful else "red"))
    for fault in inspection.faults[1:5]:
        out.print(Text(fault, style="red"))
    shown = inspection.stays_float if tensors else inspection.stays_float[:3]
    more = len(inspection.stays_float) - len(shown)
    if shown:
        out.print(Text(f"Stays float: {', '.join(shown)}" + (f" and {more} more" if more else "")))
    for note in inspection.notes:
        out.print(Text(note, style="dim"))
