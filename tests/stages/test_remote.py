"""References and contenders behind addresses: a real server that behaves, and one that does not."""

import pytest

from bitladder.describe.criteria import Context
from bitladder.describe.workload import Criterion, Input, Workload
from bitladder.engines.endpoint import endpoint_at
from bitladder.errors import BadInput, EngineError, UsageError, WrongModel
from bitladder.files.prices import price_of
from bitladder.plan.spending import expected_spending
from bitladder.stages.ask import Asker
from bitladder.stages.criteria_help import criteria_help
from bitladder.stages.endpoints import agree_to_spend, endpoint_answers, remote_of
from bitladder.stages.job import Journal, Work
from bitladder.store.evidence import Evidence
from bitladder.store.recorded import Recorded
from cloud_server import serving

KEY = "sk-a-very-secret-key"


def upper(prompt):
    return prompt.upper()


def one(name, *criteria):
    return Input(name, ({"role": "user", "content": name},), criteria or (Criterion("contains_all", [name.upper()]),))


WORKLOAD = Workload("w", tuple(one(name) for name in ("apple", "berry", "cherry", "damson")))


@pytest.fixture
def recorded():
    with Evidence.open("sqlite:///:memory:") as store:
        yield Recorded(store)


def settings(cloud, **options):
    import dataclasses

    return dataclasses.replace(endpoint_at(f"{cloud.url}#m"), retries=0, **options)


def ask(cloud, recorded, journal=None, workload=WORKLOAD, timed=False):
    return endpoint_answers(settings(cloud), workload, recorded, journal or Journal(), timed=timed)


def test_answers_are_kept_and_not_asked_for_again(recorded):
    with serving(upper) as cloud:
        said, _, stored = ask(cloud, recorded)
        assert [answer.text for answer in said] == ["APPLE", "BERRY", "CHERRY", "DAMSON"]
        assert not stored
        before = len(cloud.asked)
        again, _, stored = ask(cloud, recorded)
        assert stored
        assert [answer.text for answer in again] == [answer.text for answer in said]
        assert len(cloud.asked) == before  # not even to see who answers: nothing is spent


def test_another_model_under_the_same_name_is_noticed_next_time(recorded):
    with serving(upper) as cloud:
        ask(cloud, recorded)
        cloud.say = lambda prompt: prompt.title()
        journal = Journal()
        longer = Workload("w", (*WORKLOAD.inputs, one("elder")))
        said, _, _ = ask(cloud, recorded, journal, longer)
        assert "answers differently than last time" in journal.warnings[0]
        assert [answer.text for answer in said] == ["Apple", "Berry", "Cherry", "Damson", "Elder"]


def test_a_model_exchanged_on_the_way_is_an_error_and_its_answers_are_forgotten(recorded):
    with serving(upper) as cloud:
        cloud.say = lambda prompt: prompt.title() if "damson" in cloud.asked else prompt.upper()
        with pytest.raises(WrongModel, match="no longer answers as it did"):
            ask(cloud, recorded)
        assert remote_of(settings(cloud), recorded).fingerprint
        count = len(cloud.asked)
        cloud.say = upper
        said, _, _ = ask(cloud, recorded)
        assert {answer.text for answer in said} == {"APPLE", "BERRY", "CHERRY", "DAMSON"}
        assert set(cloud.asked[count:]) >= {"apple", "berry", "cherry", "damson"}


def test_one_that_does_not_repeat_itself_is_told(recorded):
    numbers = iter(range(1000))
    with serving(lambda prompt: f"{prompt} {next(numbers)}") as cloud:
        journal = Journal()
        ask(cloud, recorded, journal)
        assert "does not repeat itself" in journal.warnings[0]
        assert ask(cloud, recorded)[2]


def test_inputs_that_fail_are_left_out_told_and_asked_again(recorded):
    with serving(lambda prompt: 400 if prompt == "berry" else prompt.upper()) as cloud:
        journal = Journal()
        said, _, _ = ask(cloud, recorded, journal)
        assert [answer.input_id for answer in said] == ["apple", "cherry", "damson"]
        assert "answered 3 of 4 inputs" in journal.warnings[0]
        cloud.say, count = upper, len(cloud.asked)
        said, _, _ = ask(cloud, recorded, journal)
        assert len(said) == 4
        assert not {"apple", "cherry", "damson"} & set(cloud.asked[count:])


@pytest.mark.parametrize(
    "said",
    [
        500,
        b"data: {\n\n",
        b'data: {"choices": "none"}\n\n',
        b'data: {"choices": [{"delta": {"content": "cut"}}]}\n\n',
        b'data: {"choices": [{"delta": {"content": 3}, "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": "x"}}\n\n',
        b'data: {"choices": [{"delta": {"content": "' + b"x" * 9000 + b'"}}]}\n\n' * 10,
    ],
    ids=["status", "no JSON", "odd choices", "cut short", "a number", "odd usage", "no end"],
)
def test_an_endpoint_that_answers_nothing_useful_is_an_error_as_reference_and_left_out_beside(said, recorded):
    with serving(lambda _: said) as cloud, serving(upper) as good:
        with pytest.raises(EngineError):
            ask(cloud, recorded)
        journal = Journal()
        asker = Asker(WORKLOAD, Context(), recorded, 512, Work(journal=journal))
        (reference,) = asker.ask_all([settings(good), settings(cloud)])
        assert len(reference.answers) == 4
        assert any("is left out" in warning for warning in journal.warnings)


def test_an_endpoint_that_is_down_is_let_go_after_a_few_inputs(recorded):
    many = Workload("w", tuple(one(f"i{n}") for n in range(40)))
    with serving(lambda prompt: 500 if prompt.startswith("i") else prompt) as cloud:
        with pytest.raises(EngineError):
            endpoint_answers(settings(cloud, parallel=1), many, recorded, Journal(), timed=False)
        assert sum(prompt.startswith("i") for prompt in cloud.asked) < 10


def test_a_partial_reference_is_kept_and_marked(recorded, tmp_path):
    stored = tmp_path / "answers.jsonl"
    stored.write_text('{"id": "apple", "text": "APPLE"}\n')
    with serving(upper) as cloud:
        journal = Journal()
        asker = Asker(WORKLOAD, Context(), recorded, 512, Work(journal=journal))
        reference, level = asker.ask_all([stored, settings(cloud)])
    assert reference.answers[0].passed
    assert len(level.answers) == 4
    assert "has 1 of 4 answers" in journal.warnings[-1]


def test_inputs_that_nobody_passes_are_told(recorded):
    hard = Workload("w", (*WORKLOAD.inputs, one("elder", Criterion("contains_all", ["younger"]))))
    with serving(upper) as cloud, serving(upper) as other:
        journal = Journal()
        asker = Asker(hard, Context(), recorded, 512, Work(journal=journal))
        asker.ask_all([settings(cloud), settings(other)])
    assert "Neither the reference nor any level that was asked passes 1 of 5 inputs (elder)" in journal.warnings[-1]


def test_the_key_is_sent_and_kept_nowhere(recorded, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(upper) as cloud:
        journal = Journal()
        named = settings(cloud, key_env="MY_KEY")
        endpoint_answers(named, WORKLOAD, recorded, journal, timed=False)
        assert cloud.keys == {f"Bearer {KEY}"}
        cloud.say = lambda _: 400
        longer = Workload("w", (*WORKLOAD.inputs, one("elder")))
        with pytest.raises(EngineError) as error:
            endpoint_answers(named, longer, recorded, journal, timed=False)
        rows = [row for kind in ("answer", "endpoint", "speed") for row in recorded._store.find(kind)]
        assert rows
        assert KEY not in f"{error.value} {journal} {rows} {named}"


def test_nothing_is_spent_without_consent(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("BITLADDER_DATA", str(tmp_path))
    (tmp_path / "prices.yaml").write_text("'m': {in: 1000, out: 2000}\n")
    shown = []

    def refuse(text):
        shown.append(text)
        return False

    with serving(upper) as cloud:
        paid = settings(cloud, key_env="MY_KEY")
        with pytest.raises(UsageError, match="the cost was not agreed to"):
            agree_to_spend([paid], WORKLOAD, recorded, refuse)
        assert cloud.asked == []
        assert "price table" in shown[0]
        free = settings(cloud, model="")
        agree_to_spend([free], WORKLOAD, recorded, refuse)  # no key, no price: nothing to ask
        endpoint_answers(paid, WORKLOAD, recorded, Journal(), timed=False)
        agree_to_spend([paid], WORKLOAD, recorded, refuse)  # all is stored
        assert len(shown) == 1
        with pytest.raises(WrongModel, match="does not serve 'other'"):
            agree_to_spend([settings(cloud, model="other")], WORKLOAD, recorded, refuse)
        rubric = {"rubric": "kind", "against": "none", "examples": []}
        judged = Workload("w", (one("apple", Criterion("judge", rubric)),))
        with pytest.raises(UsageError, match="up to 6 requests"):
            agree_to_spend([], judged, recorded, refuse, judge=paid, judged=3)


def test_what_it_costs_at_most():
    asked = [Input("i", ({"role": "user", "content": "x" * 400},), (), max_tokens=50)] * 6
    cost = expected_spending("m", asked, prices=(2.0, 10.0), extra_requests=9)
    assert (cost.requests, cost.prompt_tokens, cost.answer_tokens) == (15, 600, 300)
    assert cost.money == pytest.approx(0.0042)
    assert expected_spending("m", asked).money is None


def test_prices_are_the_users_table(tmp_path):
    table = tmp_path / "prices.yaml"
    assert price_of("m", table) is None
    table.write_text("gpt-x-mini: {in: 1, out: 2}\n'gpt-*': {in: 3, out: 4}\n")
    assert (price_of("org/GPT-x-mini", table).prompt, price_of("gpt-z", table).answer) == (1, 4)
    assert price_of("other", table) is None
    gpus = "gpus:\n  A100 80GB: {purchase: 10000, hourly: 2.0, date: 2026-01-31, source: a quote}\n"
    for text in (gpus + table.read_text(), table.read_text() + "\n" + gpus):  # plan's prices are in the same file
        table.write_text(text)
        assert price_of("org/GPT-x-mini", table).prompt == 1
        assert price_of("other", table) is None
    table.write_text(text.replace(gpus, ""))
    for fault in ("m: 3\n", "m: {in: 1}\n", "m: {in: -1, out: 2}\n", "m: {in: a, out: 2}\n", "- m\n", "m: {\n"):
        table.write_text(fault)
        with pytest.raises(BadInput):
            price_of("m", table)


def test_the_judges_replies_are_paid_for_once(recorded):
    examples = [{"answer": "bad", "passes": False}, {"answer": "good", "passes": False}]
    judged = Workload(
        "w", (one("apple", Criterion("judge", {"rubric": "r", "against": "none", "examples": examples})),)
    )
    with serving(lambda prompt: "FAIL" if "bad" in prompt else "PASS") as cloud:
        for _ in range(2):
            journal = Journal()
            with criteria_help(judged, "", judge=settings(cloud), recorded=recorded, journal=journal) as context:
                assert context.judge(judged.inputs[0], judged.inputs[0].criteria[0].value, "good", None).passed
        assert "wrong or undecided on 1 of 2 labelled examples" in journal.warnings[0]
        questions = [prompt for prompt in cloud.asked if prompt.startswith("Judge")]
        assert len(questions) == len(set(questions)) == 4


def test_a_judge_that_nothing_asks_is_refused(recorded):
    plain = Workload("plain", (one("apple", Criterion("contains", "apple")),))
    with (
        serving(lambda _: pytest.fail("asked")) as cloud,
        pytest.raises(UsageError, match="nothing in the workload 'plain' asks one"),
        criteria_help(plain, "", judge=settings(cloud), recorded=recorded),
    ):
        pass


def test_a_judge_that_answers_nonsense_is_told(recorded):
    rubric = {"rubric": "r", "against": "none", "examples": []}
    judged = Workload("w", (one("apple", Criterion("judge", rubric)),))
    with serving(lambda _: "I like turtles") as cloud:
        journal = Journal()
        with criteria_help(judged, "", judge=settings(cloud), recorded=recorded, journal=journal) as context:
            asker = Asker(judged, context, recorded, 512, Work(journal=journal))
            (level,) = asker.ask_all([settings(cloud)])
    assert not level.answers[0].passed
    assert "gave no verdict on 1 of 1 answers" in journal.warnings[-1]
