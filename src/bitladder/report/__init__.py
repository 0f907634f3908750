"""A run, told to a person: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from bitladder.report.html import render_html, write_html
from bitladder.report.reading import read_run
from bitladder.report.terminal import fidelity_table, plan_table, print_run

__all__ = ["fidelity_table", "plan_table", "print_run", "read_run", "render_html", "write_html"]
