"""A run, told to a person: tables on the terminal, and one HTML file that needs nothing else.

Modules are imported when something of them is asked for: every verb shows text (``report.visible``), few write HTML.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitladder.report.html import check_html, render_html, report_beside, write_html
    from bitladder.report.inspection import folder_table, inspection_table
    from bitladder.report.reading import RUN_JSON, check_run, read_run, write_run
    from bitladder.report.terminal import fidelity_table, plan_table, print_run, search_table

_HOMES = {
    "html": ("check_html", "render_html", "report_beside", "write_html"),
    "inspection": ("folder_table", "inspection_table"),
    "reading": ("RUN_JSON", "check_run", "read_run", "write_run"),
    "terminal": ("fidelity_table", "plan_table", "print_run", "search_table"),
}

__all__ = [
    "RUN_JSON",
    "check_html",
    "check_run",
    "fidelity_table",
    "folder_table",
    "inspection_table",
    "plan_table",
    "print_run",
    "read_run",
    "render_html",
    "report_beside",
    "search_table",
    "write_html",
    "write_run",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bitladder.report.{module}"), name)
    raise AttributeError(f"module 'bitladder.report' has no attribute '{name}'")
