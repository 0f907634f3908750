"""A bar as a check for continuous integration: an exit code, and JUnit XML that every CI system reads."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree

from bitladder.records.decision import Decision, Status
from bitladder.visible import visible

EXIT_MET, EXIT_NOT_MET, EXIT_CANNOT_TELL = 0, 4, 5


def gate_exit(decision: Decision) -> int:
    """Exit code of the gate: every level asked for must hold the bar.

    0 when all do, 4 when one is known not to (or does not fit), 5 when the evidence cannot tell. A known
    failure outranks a doubt.
    """
    statuses = {verdict.status for verdict in decision.verdicts}
    if statuses & {Status.FAILS, Status.DOES_NOT_FIT}:
        return EXIT_NOT_MET
    if Status.UNKNOWN in statuses or not statuses - {Status.REFERENCE}:
        return EXIT_CANNOT_TELL
    return EXIT_MET


def search_exit(chosen: str | None, *, decided: bool) -> int:
    """Exit code of a search for the smallest level: 0 found, 4 none holds the bar, 5 inputs ran out first."""
    if not decided:
        return EXIT_CANNOT_TELL
    return EXIT_MET if chosen else EXIT_NOT_MET


def junit(decision: Decision, *, model: str, notes: Mapping[str, str] | None = None) -> str:
    """The verdicts as a JUnit document: one test case per level, a failure where the bar fails, an error
    where the evidence is not enough.

    Args:
        decision: the verdicts.
        model: its name.
        notes: level to what changed in its answers, for its output.
    """
    cases = []
    for verdict in decision.verdicts:
        case = ElementTree.Element(
            "testcase",
            classname=f"bitladder.{_clean(model)}",
            name=_clean(f"{verdict.level} holds {decision.bar}"),
            time="0",
        )
        if not verdict.status.holds:
            kind = "error" if verdict.status == Status.UNKNOWN else "failure"
            outcome = ElementTree.SubElement(case, kind, message=_clean(verdict.reason), type=verdict.status)
            outcome.text = _clean(f"{verdict.level}: {verdict.reason}")
        lines = [f"{verdict.status}: {verdict.reason}"] if verdict.status.holds else []
        if notes and verdict.level in notes:
            lines.append(f"answers: {notes[verdict.level]}")
        if lines:
            ElementTree.SubElement(case, "system-out").text = _clean("; ".join(lines))
        cases.append(case)
    failures = sum(case.find("failure") is not None for case in cases)
    errors = sum(case.find("error") is not None for case in cases)
    counts: dict[str, str] = {
        "tests": str(len(cases)),
        "failures": str(failures),
        "errors": str(errors),
        "skipped": "0",
        "time": "0",
    }
    suites = ElementTree.Element("testsuites", counts)
    named = {"name": f"bitladder gate: {_clean(decision.bar)}"}
    suite = ElementTree.SubElement(suites, "testsuite", named | counts)
    suite.extend(cases)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """With control characters, which XML 1.0 cannot hold, as their escapes."""
    return visible(text).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
