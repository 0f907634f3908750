"""The router's choices as a table of cases."""

import pytest

from bitladder.errors import UsageError
from bitladder.serve.router import AutoRule, Features, Guess, Rule, TagEvidence, TierChoice, choose, parse_rule

LEVELS = frozenset({"q8_0", "q4_k_m"})
TAGS = {"extraction": TagEvidence(4, 0), "logic": TagEvidence(3, 2), "style": TagEvidence(5, 1)}
AUTO = AutoRule(tags=TAGS)
GUESSING = AutoRule(tags=TAGS, guess=lambda text: Guess("extraction", "invoice", 0.61) if "invoice" in text else None)
CALLING = AutoRule(tags=TAGS | {"tools": TagEvidence(9, 3)}, guess=lambda text: Guess("extraction", "invoice", 0.9))
JUDGED = AutoRule(tags=TAGS, escalate=True)
FIXED = AutoRule(tags=TAGS, fixed="speed", because="speed lost nothing on 25 inputs")
RULES = (
    Rule("speed", tag="bulk"),
    Rule("quality", key="legal"),
    Rule("quality", tag="bulk", path="/v1/completions"),
)

CASES = [
    # explicit choices
    (Features("quality"), AUTO, "quality", "model", "quality named in the request"),
    (Features("SPEED"), AUTO, "speed", "model", "speed named in the request"),
    (Features("Q4_K_M"), AUTO, "q4_k_m", "level", "level named in the request"),
    (Features("auto", tier_header="speed"), AUTO, "speed", "header", "speed named in a header of the request"),
    (Features("quality", tier_header=" Speed "), AUTO, "speed", "header", "speed named in a header of the request"),
    (Features("auto", tier_header="q8_0"), AUTO, "q8_0", "level", "level named in a header of the request"),
    # an explicit choice beats the rules, the rules beat the evidence, the first rule that matches decides
    (Features("quality", tags=("bulk",)), AUTO, "quality", "model", "quality named in the request"),
    (Features("auto", tags=("bulk",)), AUTO, "speed", "rule", "rule: tag bulk"),
    (Features("auto", tags=("bulk",), path="/v1/completions"), AUTO, "speed", "rule", "rule: tag bulk"),
    (Features("auto", key="legal", tags=("extraction",)), AUTO, "quality", "rule", "rule: key legal"),
    # evidence by tag; of several tags the most careful one
    (Features("auto", tags=("extraction",)), AUTO, "speed", "auto",
     "auto: tag extraction: the speed tier lost 0 of 4 inputs"),
    (Features("auto", tags=("logic",)), AUTO, "quality", "auto", "auto: tag logic: the speed tier lost 2 of 3 inputs"),
    (Features("auto", tags=("extraction", "style")), AUTO, "quality", "auto",
     "auto: tag style: the speed tier lost 1 of 5 inputs"),
    (Features("auto", tags=("poetry",)), AUTO, "quality", "auto", "auto: no evidence for tag poetry"),
    # without a tag: a request with tools by what the evidence says of tools, which a tag outranks
    (Features("auto", gives_tools=True), CALLING, "quality", "auto",
     "auto: gives tools, tag tools: the speed tier lost 3 of 9 inputs"),
    (Features("auto", tags=("extraction",), gives_tools=True), CALLING, "speed", "auto",
     "auto: tag extraction: the speed tier lost 0 of 4 inputs"),
    (Features("auto", gives_tools=True), AUTO, "quality", "auto", "auto: unlike every input of your workload"),
    # without a tag: what it resembles
    (Features("auto"), AUTO, "quality", "auto", "auto: unlike every input of your workload"),
    (Features("auto", asked=lambda: "an invoice"), GUESSING, "speed", "auto",
     "auto: like your input invoice (0.61), tag extraction: the speed tier lost 0 of 4 inputs"),
    (Features("auto", asked=lambda: "a poem"), GUESSING, "quality", "auto",
     "auto: unlike every input of your workload"),
    # no evidence, or evidence that routing gains nothing
    (Features("auto"), AutoRule(), "quality", "auto", "auto: nothing was measured of these two tiers"),
    (Features("auto", tags=("logic",)), FIXED, "speed", "auto", "auto: speed lost nothing on 25 inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "auto", "tier", "kind", "reason"), CASES)
def test_choice(features, auto, tier, kind, reason):
    found = choose(features, LEVELS, RULES, auto)
    assert found == TierChoice(tier, reason, kind, tag=found.tag)
    assert bool(found.tag) == (f"tag {found.tag}: " in reason)


def test_where_speed_lost_it_may_try_and_be_judged():
    judged = choose(Features("auto", tags=("logic",)), LEVELS, (), JUDGED)
    assert judged == TierChoice(
        "speed", "auto: tag logic: speed tier first, judged by its own probabilities", "auto", True, "logic"
    )
    safe = choose(Features("auto", tags=("extraction",)), LEVELS, (), JUDGED)
    assert safe is not None and not safe.escalate


@pytest.mark.parametrize("features", [Features("gpt-4"), Features("auto", tier_header="fast"), Features("q5_k_m")])
def test_what_is_not_served_is_no_choice(features):
    assert choose(features, LEVELS, (), AUTO) is None


def test_a_level_asked_for_by_name_is_never_replaced():
    level = choose(Features("q8_0"), LEVELS, (), AUTO)
    tier = choose(Features("quality"), LEVELS, (), AUTO)
    assert level is not None and not level.may_fall_back
    assert tier is not None and tier.may_fall_back


def test_the_text_is_not_looked_at_when_a_name_decides():
    def never() -> str:
        raise AssertionError

    assert choose(Features("speed", asked=never), LEVELS, (), GUESSING)


def test_rules_from_the_command_line():
    assert parse_rule("speed:tag=bulk") == Rule("speed", tag="bulk")
    assert parse_rule("quality:key=legal, path=/v1/completions") == Rule("quality", key="legal", path="/v1/completions")


@pytest.mark.parametrize("text", ["", "speed", "speed:", "fast:tag=a", "speed:tag", "speed:tag=", "speed:model=x"])
def test_what_is_no_rule_is_said_so(text):
    with pytest.raises(UsageError, match=f"'{text}' is not a rule"):
        parse_rule(text)
