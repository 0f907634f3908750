"""The command line. Each verb is thin: it reads arguments, calls one function, and shows the record it returns."""

from __future__ import annotations

from bitladder.cli.app import main

__all__ = ["main"]
