"""A run, told to a person: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from bitladder.report.html import check_html, render_html, report_beside, write_html
from bitladder.report.inspection import folder_table, inspection_table
from bitladder.report.reading import RUN_JSON, check_run, read_run, write_run
from bitladder.report.terminal import fidelity_table, plan_table, print_run, search_table

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
