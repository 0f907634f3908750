"""The gate: exit codes, and JUnit that a parser accepts."""

from xml.etree import ElementTree

import pytest

from bitladder.plan.decide import decide
from bitladder.plan.gate import gate_exit, junit
from ladder_examples import fidelities, plan, results


def gate(levels, bar, **lost):
    return decide(plan(levels=levels), fidelities(), results(**lost), bar=bar, reference="F16")


@pytest.mark.parametrize(
    ("levels", "bar", "code"),
    [
        (("F16", "Q8_0", "Q6_K"), "kl < 0.05", 0),
        (("Q8_0", "Q2_K"), "kl < 0.05", 4),  # one good level does not excuse a bad one
        (("Q8_0",), "passes >= reference - 4 points", 5),
        (
            ("Q8_0", "Q2_K"),
            "kl < 0.05 and passes >= reference - 4 points",
            4,
        ),  # a known failure outranks a doubt
        (("F16",), "kl < 0.05", 5),
    ],
)
def test_exit_codes(levels, bar, code):
    assert gate_exit(gate(levels, bar)) == code


def test_a_level_that_does_not_fit_fails():
    decision = decide(plan(budget=1), fidelities(), results(), bar="kl < 9", reference="F16")
    assert gate_exit(decision) == 4


def test_junit():
    decision = gate(("F16", "Q8_0", "Q4_K_M", "Q2_K"), "kl < 0.074")
    root = ElementTree.fromstring(junit(decision, model="a <b> & \x00\ud800\uffffc"))
    suite = root.find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
    }
    cases = {case.get("name").split()[0]: case for case in suite}
    assert cases["Q2_K"].find("failure").get("message") == "KL 1.2 (1.08 to 1.32), limit 0.074"
    assert "more documents" in cases["Q4_K_M"].find("error").text
    assert cases["Q8_0"].find("failure") is None
    assert cases["Q8_0"].get("classname") == "bitladder.a <b> & \\x00\\ud800\\uffffc"
    assert "kl < 0.074" in cases["Q8_0"].get("name")


def test_junit_has_what_changed_in_the_answers():
    decision = gate(("F16", "Q8_0", "Q2_K"), "kl < 0.074")
    notes = {"Q8_0": "'shall' became 'will' 4 times", "Q2_K": "catches 61.0% of what F16 catches \x00"}
    cases = {
        case.get("name").split()[0]: case for case in ElementTree.fromstring(junit(decision, model="a", notes=notes))[0]
    }
    assert cases["Q8_0"].find("system-out").text.endswith("; answers: 'shall' became 'will' 4 times")
    assert cases["Q2_K"].find("system-out").text == "answers: catches 61.0% of what F16 catches \\x00"
    assert cases["Q2_K"].find("failure") is not None
    assert "answers" not in cases["F16"].find("system-out").text
