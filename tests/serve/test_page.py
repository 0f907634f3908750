"""The page in a real browser: headless Chromium, driven by Playwright, against the real paths."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from bitladder.describe.machine import Machine
from bitladder.describe.shapes import Shape, model_of
from bitladder.errors import BadInput, UsageError
from bitladder.levels import parse_levels
from bitladder.plan.ladder import make_plan
from bitladder.plan.whatif import what_if
from bitladder.records import to_json
from bitladder.records.fidelity import AtDepth
from bitladder.records.run import LevelCost
from bitladder.records.wording import Substitution, WordingChanges
from bitladder.report import render_html, write_run
from bitladder.report.chart import Axis, loss_chart
from bitladder.report.facts import facts
from bitladder.report.meanings import HEADS, LOSSES, VERDICTS
from bitladder.report.tables import evidence_tables
from bitladder.report.wording import answers_view
from bitladder.serve.page_app import PAGE, build_page
from bitladder.units import GiB, MiB
from ladder_examples import CROWDS, crowded_record, run_record
from page_gateway import EVIL, Fake, gateway_app, serving

SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PENS = "What do 12 pens cost?"
SHEETS = (PAGE / "style.css", PAGE.parents[1] / "data" / "report" / "report.css")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(SWITCHES))
        yield running
        running.close()


@pytest.fixture
def run_json(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(run_record())))
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.json"
    path.write_text(json.dumps(to_json(run_record())))
    fake = Fake()
    with serving(gateway_app(path, fake)) as url:
        yield fake, url


@pytest.fixture
def gateway(served):
    """The same server for all, as new for each."""
    fake, url = served
    fake.__init__()
    fake.url = url
    return fake


@pytest.fixture
def page(browser, gateway):
    """A fresh profile on the gateway's page; nothing may go wrong in the console or leave the machine."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(8000)
    opened = context.new_page()
    wrong = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and "40" not in said.text else None
    )
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith((gateway.url, "blob:", "data:")) else wrong.append(asked.url),
    )
    opened.goto(gateway.url)
    yield opened
    context.close()
    assert not wrong


def compare(page, prompt):
    page.fill("#prompt", prompt)
    page.click("button[type=submit]")
    page.wait_for_selector(".parted .card")


SHOWN = {"compare": "#compare form", "ladder": "table.levels", "live": ".recent"}


def open_tab(page, name):
    page.click(f"#tab-{name}")
    page.wait_for_selector(SHOWN[name])


def open_ladder(page):
    open_tab(page, "ladder")


def assert_told(page, words):
    """The words come to stand on the page, where a reader sees them."""
    from playwright.sync_api import expect

    expect(page.get_by_text(words).first).to_be_visible(timeout=8000)


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


# ---- compare


def test_two_levels_side_by_side(page, gateway):
    compare(page, PENS)
    assert texts(page, ".answer h3") == ["Q6_K", "Q4_K_M"]
    assert texts(page, ".answer ins") == ["12"]
    assert texts(page, ".answer del") == ["8"]
    assert re.search(r"tokens/s · first token \d+ ms · 6 tokens", texts(page, ".numbers")[0])
    assert {body["model"] for body in gateway.asked} == {"Q6_K", "Q4_K_M"}
    assert all(body["stream"] and body["logprobs"] and body["temperature"] == 0 for body in gateway.asked)


def test_where_they_part_and_whether_it_is_real(page):
    compare(page, PENS)
    card = page.locator(".parted .card")
    assert "They part at token 5. A real difference" in card.inner_text()
    assert texts(page, ".chances tbody td") == ["80.0%", "5.0%", "6.0%", "70.0%"]
    compare(page, "Say it formally.")
    page.wait_for_selector(".tie-break")
    assert "A tie-break" in card.inner_text()
    compare(page, "Same?")
    assert_told(page, "The same answer, word for word.")


def test_what_models_and_people_write_is_shown_as_text(page):
    compare(page, "evil")
    assert EVIL in texts(page, ".answer .text")[0]
    assert page.locator(".answer img, .answer script").count() == 0
    assert "owned" not in page.title()


def test_a_blind_vote_hides_the_levels_until_it_is_cast(page):
    page.check("#blind")
    compare(page, PENS)
    shown = page.locator(".results").inner_text()
    assert "Answer A" in shown
    assert "Q6_K" not in shown
    assert "tokens/s" not in shown
    page.click(".vote button:has-text('Answer B')")
    page.wait_for_selector(".results .note")
    assert sorted(texts(page, ".answer h3")) == ["Q4_K_M", "Q6_K"]
    preferred = texts(page, ".answer h3")[1]
    assert f"You preferred {preferred}." in page.locator(".results .note").inner_text()
    assert f"{preferred} 1" in page.locator(".results .note").inner_text()


def test_history_outlives_a_reload_and_can_be_forgotten(page):
    compare(page, PENS)
    page.reload()
    page.click(".past .link")
    assert texts(page, ".answer ins") == ["12"]
    assert page.input_value("#prompt") == PENS
    page.click("text=Forget all")
    assert_told(page, "None yet.")


def test_a_link_carries_a_comparison(page, gateway):
    compare(page, PENS)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("text=Copy a link")
    assert_told(page, "Copied.")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{gateway.url}#compare=")
    page.evaluate("localStorage.clear()")
    asked = len(gateway.asked)
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".parted .card")
    assert texts(page, ".answer ins") == ["12"]
    assert len(gateway.asked) == asked


@pytest.mark.parametrize("fragment", ["AAAA", "%%%", "eyJ2ZXJzaW9uIjoyfQ"])
def test_a_broken_link_is_told(page, gateway, fragment):
    page.goto(f"{gateway.url}#compare={fragment}")
    assert_told(page, "The link holds no comparison")


def test_a_file_carries_a_comparison(page, tmp_path):
    compare(page, PENS)
    with page.expect_download() as download:
        page.click("text=Save as a file")
    path = tmp_path / "comparison.json"
    download.value.save_as(path)
    page.reload()
    page.set_input_files("#open-file", path)
    page.wait_for_selector(".answer ins")
    path.write_text('{"version": 1}')
    page.set_input_files("#open-file", path)
    assert_told(page, "This file is no comparison")


def test_errors_and_broken_streams_are_told(page, gateway):
    compare(page, "unknown prompt")
    assert texts(page, ".answer .bad") == ["The context is too small for this."] * 2
    gateway.cut = True
    compare(page, PENS)
    assert_told(page, "broke off before its end")


def test_stopping(page, gateway):
    gateway.delay = 0.05
    page.fill("#prompt", "long")
    page.click("button[type=submit]")
    page.wait_for_selector(".answer .text:has-text('word word word')")
    page.click("text=Stop")
    assert_told(page, "Stopped.")
    assert page.locator("button[type=submit]").inner_text() == "Compare"


def test_fewer_than_two_levels_is_a_complaint(page):
    page.uncheck("[name=level][value=Q6_K]")
    page.fill("#prompt", PENS)
    page.click("button[type=submit]")
    assert_told(page, "Choose at least two levels.")


def test_a_key_is_asked_for_once(browser, gateway):
    gateway.key = "bl-secret"
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(gateway.url)
    opened.fill("#key-dialog input", "bl-secret")
    opened.click("#key-dialog .primary")
    compare(opened, PENS)
    assert "bl-secret" not in opened.evaluate("JSON.stringify(localStorage)")
    context.close()


# ---- ladder


def test_the_ladder_shows_the_run(page):
    open_ladder(page)
    assert texts(page, "table.levels tbody th") == ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    assert "Deploy Q6_K for quality" in page.inner_text(".summary")
    assert page.locator(".chart .dot").count() == 6
    assert page.locator(".chart .dot.quality, .chart .dot.speed").count() == 2
    assert "the cliff" in page.locator(".chart").text_content()
    page.check("input[value=speed]")
    assert page.locator(".chart .curve").count() == 0
    assert texts(page, "table.tags tbody th")[0].startswith("arithmetic")


STRAY = re.compile(r"^(false|true|null|undefined|NaN|0)$", re.MULTILINE)
"""What a condition leaves behind where it is taken for text."""


@pytest.mark.parametrize("bar", [None, "kl < 0.0001", "passes >= reference - 4 points", "no loss"])
def test_nothing_that_a_condition_left_out_stands_on_the_page(page, bar):
    open_ladder(page)
    if bar:
        page.fill("#if-bar", bar)
        page.wait_for_function("(bar) => document.querySelector('.decision code').textContent === bar", arg=bar)
    assert not STRAY.search(page.inner_text("#ladder"))


def test_only_one_place_of_the_page_puts_children_in():
    for file in PAGE.glob("*.js"):
        assert file.name == "dom.js" or "replaceChildren" not in file.read_text(), file.name


def test_every_number_opens_its_evidence(page):
    open_ladder(page)
    numbers = page.locator("table.levels tbody.speed .number")
    assert numbers.count() == 7
    expected = ["Path", "KV cache", "Prefill", "30 documents", "Perplexity", "95% interval", "McNemar"]
    for n, words in enumerate(expected):
        numbers.nth(n).click()
        shown = page.inner_text("#evidence")
        assert words in shown
        assert "bitladder run reference-f16.gguf" in shown
        assert "ab" * 32 in shown
        page.keyboard.press("Escape")
        assert page.locator("#evidence[open]").count() == 0
    numbers.nth(6).click()
    assert texts(page, "#evidence ins") == ["12"], "the answer behind the lost input"


def test_heads_and_verdicts_say_what_they_mean(page):
    open_ladder(page)
    heads = page.locator("table.levels thead th")
    assert [heads.nth(n).get_attribute("title") for n in range(9)] == [
        HEADS[name] for name in ("level", "file", "memory", "tokens/s", "KL", "ppl ratio", "top-1", "passes", "verdict")
    ]
    verdicts = page.locator("table.levels .verdict strong")
    found = [(one.inner_text(), one.get_attribute("title")) for one in verdicts.all()]
    assert ("speed tier", VERDICTS["speed tier"]) in found
    assert all(VERDICTS[verdict] == title for verdict, title in found)


def test_words_and_facts_are_those_of_the_report(page):
    script = """async (values) => {
        const { HEADS, VERDICTS, LOSSES } = await import('/meanings.js');
        const { facts } = await import('/facts.js');
        return [HEADS, VERDICTS, LOSSES, ...values.map(facts)];
    }"""
    run = json.loads((Path(__file__).parents[1] / "fixtures" / "records" / "run.json").read_text())
    gpus = {
        "gpus": [{"name": "a", "vram_total": 24 * GiB, "vram_free": 20 * GiB}],
        "temperature": 0.7,
        "constructor": 1,
    }
    values = [run["machine"], run["settings"], gpus, {"engine": {"n_ctx": 512, "cpu": None}, "some_thing": None}]
    heads, verdicts, losses, *told = page.evaluate(script, values)
    assert (heads, verdicts, losses) == (HEADS, VERDICTS, LOSSES)
    assert told == [[list(pair) for pair in facts(one)] for one in values]


def test_commands_wrap_and_can_be_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_ladder(page)
    page.locator("table.levels .number").first.click()
    box = page.locator("#evidence pre")
    assert box.evaluate(
        "(one) => { one.textContent += ' --text ' + 'long'.repeat(80); return one.scrollWidth <= one.clientWidth; }"
    )
    page.click("#evidence button:has-text('Copy')")
    assert_told(page, "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "bitladder run reference-f16.gguf"


def test_a_kind_of_work_opens_its_evidence(page):
    open_ladder(page)
    page.click("table.tags button[aria-label^='arithmetic at Q4_K_M']")
    shown = page.inner_text("#evidence")
    assert "loss seen" in shown
    assert "1: pens" in shown
    assert texts(page, "#evidence ins") == ["12"]


def test_what_changed_in_the_answers_is_the_reports_own(browser, tmp_path):
    path = tmp_path / "run.json"
    changes = WordingChanges(3, 2, 60, (Substitution("shall", "will", 4),), ("pens",), (("pens", EVIL),), 99, ())
    record = run_record(wording={"Q4_K_M": changes})
    path.write_text(json.dumps(to_json(record)))
    with serving(build_page(path)) as url:
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        opened.goto(url)
        opened.wait_for_selector("table.changes")
        heads = opened.locator("table.changes thead th[title]")
        assert [one.inner_text() for one in heads.all()] == [one["title"] for one in answers_view(record)["columns"]]
        assert [one.get_attribute("title") for one in heads.all()] == [
            one["means"] for one in answers_view(record)["columns"]
        ]
        assert texts(opened, "table.changes tbody td")[:-1] == answers_view(record)["rows"][0]["cells"]
        assert EVIL in opened.inner_text("table.changes .why")
        assert "'shall' became 'will' 4 times" in opened.inner_text("table.changes .why")
        assert opened.locator("table.changes img").count() == 0
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        opened.close()


def test_tables_of_evidence_are_the_reports_own(browser, tmp_path):
    at = AtDepth(3000, 0.4, 0.3, 0.5, 0.1, 1.001, 1.0, 1.002, 0.61, 0.6, 0.7, depth=512)
    deep = dataclasses.replace(at, depth=4096, rise=82.0, rise_low=70.0, rise_high=97.0)
    plain = run_record()
    record = dataclasses.replace(
        plain, fidelities=tuple(dataclasses.replace(one, depths=(at, deep)) for one in plain.fidelities[:2])
    )
    path = write_run(record, tmp_path / "run.json")
    with serving(build_page(path)) as url:
        opened = browser.new_page(viewport={"width": 390, "height": 800})
        opened.goto(url)
        opened.wait_for_selector("table.evidence")
        (table,) = evidence_tables(record)
        assert texts(opened, "#depth-title") == [table.title]
        assert texts(opened, "table.evidence thead th") == list(table.heads)
        shown = opened.locator("table.evidence tbody td").all()
        assert [one.inner_text().split("\n")[0] for one in shown] == [c.text for row in table.rows for c in row[1:]]
        assert texts(opened, "table.evidence .known")[0].startswith("82.0")
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        opened.close()


def test_what_if_decides_again(page):
    open_ladder(page)
    page.fill("#if-bar", "kl < 0.02")
    assert_told(page, "Deploy Q6_K alone")
    page.focus("#if-limit")
    page.keyboard.press("Home")
    assert_told(page, "No level that fits holds the bar")
    assert page.input_value("#if-bar") == "kl < 0.0001"
    assert page.get_attribute("#if-limit", "aria-valuetext") == "0.0001 nats per token"
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#if-bar').value === 'kl < 2'")
    page.fill("#if-bar", "no known loss")
    page.wait_for_selector("#if-limit:disabled")
    page.fill("#if-bar", "kl < 0.02")
    assert_told(page, "Deploy Q6_K alone")
    page.fill("#if-bar", "kl >")
    assert_told(page, "cannot be read")
    assert "Deploy Q6_K alone" in page.inner_text(".summary"), "the last good answer stays"
    page.click("text=As measured")
    assert_told(page, "Deploy Q6_K for quality")
    page.focus("#if-memory")
    page.keyboard.press("Home")
    assert_told(page, "No level besides the reference fits")
    assert "does not fit" in texts(page, "table.levels .verdict strong")
    page.click("text=As measured")
    page.focus("#if-context")
    page.keyboard.press("End")
    assert_told(page, "131,072")
    assert_told(page, "does not fit")


def test_warnings_stand_after_the_decision(browser, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_json(run_record(warnings=("Something to know.",)))))
    with serving(build_page(path)) as url:
        opened = browser.new_page()
        opened.goto(url)
        opened.wait_for_selector("table.levels")
        text = opened.inner_text("#ladder")
        assert text.index("Deploy Q6_K for quality") < text.index("Something to know.") < text.index("What if")
        opened.close()


def test_without_a_gateway_there_is_the_ladder_alone(browser, run_json):
    with serving(build_page(run_json)) as url:
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(url)
        opened.wait_for_selector("table.levels")
        assert opened.locator("[role=tab]:visible").all_inner_texts() == ["Ladder"]
        context.close()


# ---- live


def test_live_tells_what_each_tier_does(page):
    page.click("#tab-live")
    page.wait_for_selector(".recent")
    assert texts(page, ".tier .level") == ["Q6_K", "Q4_K_M"]
    assert "44.5" in page.inner_text(".tier.speed")
    assert "75%" in page.inner_text(".shares")
    assert "chosen here (auto)" in page.inner_text(".shares")
    assert "In 92% of cases both tiers gave the very same answer (80% to 97%)" in page.inner_text("#live")
    assert "broke off" in page.inner_text(".recent .odd")
    assert "`" not in page.inner_text("#live")
    titles = page.locator(".tier.speed dl div").evaluate_all("(all) => all.map((one) => one.title)")
    assert len(titles) == 8 and all(titles)
    assert "tag 'recall' lost nothing" in page.inner_text(".recent")
    guesses = page.inner_text(".tier.speed")
    assert "Guesses tokens ahead (draft): off." in guesses
    assert "Costs: 0.59 times as fast (0.54 to 0.64) on these requests." in guesses
    assert f"{EVIL}: 0.70 times as fast with guesses (9 and 8 answers), 31% of its guesses are right." in guesses
    assert "90% of its guesses are right, answered with guesses, by the tier's second engine." in guesses
    assert "Guesses" not in page.inner_text(".tier.quality")
    assert page.locator("[role=alert]:visible").count() == 0


def test_an_alarm_is_seen(page, gateway):
    gateway.alarm = True
    page.click("#tab-live")
    page.wait_for_selector("#live [role=alert]")
    assert "drifted from the workload" in page.inner_text("#live [role=alert]")


# ---- for everyone


def test_everything_by_keyboard(page):
    page.focus("#tab-compare")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-ladder"
    page.wait_for_selector("table.levels")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == "tab-live"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-compare"
    page.keyboard.press("Tab")
    page.focus("#prompt")
    page.keyboard.type(PENS)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".parted .card")
    open_ladder(page)
    number = page.locator("table.levels .number").first
    number.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#evidence[open]")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "number"


UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, [role=region], svg[role=img], dialog[open]')]
    .filter((one) => one.checkVisibility())
    .filter((one) => !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby')
        || [...(one.labels ?? [])].some((label) => label.textContent.trim()) || one.textContent.trim()))
    .map((one) => one.outerHTML.slice(0, 120))"""


def test_everything_has_a_name(page):
    compare(page, PENS)
    for tab in ("compare", "ladder", "live"):
        open_tab(page, tab)
        assert page.evaluate(UNNAMED) == []
        levels = page.evaluate("[...document.querySelectorAll('main h1, main h2, main h3')].map((h) => +h.tagName[1])")
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert page.evaluate(f"document.getElementById('{tab}').getAttribute('aria-labelledby')") == f"tab-{tab}"


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 390), ("light", 1200)])
def test_nothing_runs_off_the_page(browser, gateway, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(gateway.url)
    compare(opened, PENS)
    for tab in ("compare", "ladder", "live"):
        open_tab(opened, tab)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
    context.close()


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.name)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(sheet, scheme):
    """WCAG AA: 4.5 to 1 for text, in both schemes."""
    block = re.findall(r":root \{([^}]*)\}", Path(sheet).read_text())[scheme]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    tones = ("quality", "speed", "both", "bad")
    pairs = [(text, behind) for text in ("ink", "soft", *tones, "doubt", "good") for behind in ("paper", "card")]
    pairs += [(text, f"{tone}-bg") for tone in tones for text in (tone, "ink", "soft")]
    pairs += [("ins-ink", "ins"), ("del-ink", "del"), ("ink", "faint"), ("soft", "faint")]
    weak = [(text, behind) for text, behind in pairs if contrast(colour[text], colour[behind]) < 4.5]
    assert not weak


def test_words_are_matched_like_in_the_report(page):
    pairs = [
        ["", ""],
        ["a b c", "a x c"],
        ["a " * 2500, "b " * 2500],
        ["one two", "one two three"],
        ["x", ""],
        ["a b ", "x y "],
        ["x y", "x A B y"],
        ["p  q r", "p q  s"],
    ]
    script = """async (pairs) => {
        const { wordDiff } = await import('/diff.js');
        return pairs.map(([one, other]) => wordDiff(one, other));
    }"""
    for (one, other), segments in zip(pairs, page.evaluate(script, pairs), strict=True):
        assert "".join(s["text"] for s in segments if s["kind"] != "removed") == other
        assert "".join(s["text"] for s in segments if s["kind"] != "added") == one
    told = page.evaluate(script, [["called Rayleigh Blood, so", "called atmospheric light, so"]])[0]
    assert [s["text"] for s in told] == ["called ", "Rayleigh Blood", "atmospheric light", ", so"]
    told = page.evaluate(script, [["The fee shall be $100.", "The fee will be $120 now."]])[0]
    assert [s["kind"] for s in told] == ["same", "removed", "added", "same", "removed", "added", "same"]


@pytest.mark.parametrize("ladder", [True, False], ids=["size", "speed"])
@pytest.mark.parametrize("crowd", CROWDS)
def test_names_in_charts_stand_where_the_report_has_them(page, crowd, ladder):
    script = """async ([points, options]) => {
        const { lossChart } = await import('/chart.js');
        const svg = lossChart(points, options);
        const words = (one, names) => names.map((name) => one.getAttribute(name).trim());
        const places = (one, names) => names.map((name) => Number(one.getAttribute(name)));
        return [
            ...[...svg.querySelectorAll('text:not(.title)')].map((one) =>
                [[...words(one, ['class', 'text-anchor']), one.textContent], places(one, ['x', 'y'])]),
            ...[...svg.querySelectorAll('.leader')].map((one) =>
                [words(one, ['class']), places(one, ['x1', 'y1', 'x2', 'y2'])]),
        ];
    }"""
    for width in (340, 560, 1090):
        options = {"title": "size, MiB", "width": width, "limit": 0.1, "ladder": ladder}
        here = page.evaluate(script, [[dataclasses.asdict(point) for point in CROWDS[crowd]], options])
        svg = loss_chart(CROWDS[crowd], Axis("size", "MiB", ladder=ladder), limit=0.1, width=width)
        texts = re.findall(r'<text class="(.*?)" x="(.*?)" y="(.*?)" text-anchor="(.*?)">(.*?)</text>', svg)
        there = [[[kind, anchor, text], [float(x), float(y)]] for kind, x, y, anchor, text in texts if kind != "title"]
        leaders = re.findall(r'<line class="leader" x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)"/>', svg)
        there += [[["leader"], [*map(float, leader)]] for leader in leaders]
        assert len(here) == len(there) > len(CROWDS[crowd])
        for (words, places), (same_words, same_places) in zip(sorted(here), sorted(there), strict=True):
            assert words == same_words
            assert places == pytest.approx(same_places, abs=0.11), words


COVERED = """() => [...document.querySelectorAll('svg.chart')].filter((svg) => svg.checkVisibility()).map((svg) => {
    const boxes = (kinds) => [...svg.querySelectorAll(kinds)].map((one) => {
        const { x, y, width, height } = one.getBBox();
        return [x, y, x + width, y + height, one.textContent];
    });
    const common = (a, b, from) => Math.min(a[from + 2], b[from + 2]) - Math.max(a[from], b[from]);
    const hit = (a, b) => common(a, b, 0) > 0.5 && common(a, b, 1) > 1;
    const texts = boxes('.label, .limit-label, .cliff-label');
    const marks = boxes('.dot, .whisker');
    const { width } = svg.viewBox.baseVal;
    return {
        names: texts.length,
        over: texts.flatMap((a, n) =>
            [...marks, ...texts.slice(n + 1)].filter((b) => hit(a, b)).map((b) => [a[4], b[4]])),
        out: texts.filter((a) => a[0] < 0 || a[2] > width).map((a) => a[4]),
    };
})"""


@pytest.mark.parametrize("width", [1366, 390])
def test_the_reports_charts_are_clear_and_nothing_runs_off_the_page(browser, width):
    opened = browser.new_page(viewport={"width": width, "height": 900})
    record = crowded_record()
    costs = tuple(LevelCost(row.level, 7.25, "this machine at 1 an hour") for row in record.plan.levels)
    changes = WordingChanges(20, 12, 900, (), ("price",), (("lease", "indemnity"),), 69, ("a",), ("b",))
    wording = {row.level: changes for row in record.plan.levels}
    opened.set_content(render_html(dataclasses.replace(record, costs=costs, wording=wording)))
    charts = opened.evaluate(COVERED)
    assert [chart["names"] >= 10 for chart in charts] == [True, True]
    assert [(chart["over"], chart["out"]) for chart in charts] == [([], []), ([], [])]
    opened.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth).length"
    assert opened.evaluate(wide) == 0, "with every column, tables need no scrolling of their own"
    opened.close()


# ---- what stands behind it


def test_what_if_moves_memory_and_context():
    run = run_record()
    plan, decision = what_if(run, n_ctx=4096)
    before, after = run.plan.levels[2], plan.levels[2]
    assert after.kv_bytes == 2 * before.kv_bytes
    assert after.total_bytes - before.total_bytes == before.kv_bytes
    assert decision.quality == run.decision.quality
    plan, decision = what_if(run, budget_bytes=200 * MiB)
    assert [level.level for level in plan.levels if level.fits] == ["Q4_K_M", "Q3_K_M", "Q2_K"]
    assert (decision.quality, decision.speed, decision.pair) == ("Q4_K_M", "Q4_K_M", "one level")
    assert what_if(run) == (run.plan, run.decision)


@pytest.mark.parametrize("n_ctx", [512, 600, 1024, 4096, 5000, 8192])
def test_another_context_takes_what_the_plan_says_windows_included(n_ctx):
    model = model_of(Shape("g", "gemma3", 6, 1024, 4096, 16, 4, 4096, 8192, tied=True, sliding_window=512))
    here = Machine("a CPU", 4, (), 8 * GiB, 7 * GiB, 1 << 40)
    levels = parse_levels(("Q6_K", "Q4_K_M"))
    given = make_plan(model, here, n_ctx=2048, levels=levels)
    moved, _ = what_if(dataclasses.replace(run_record(), plan=given, fidelities=(), results=()), n_ctx=n_ctx)
    for found, planned in zip(moved.levels, make_plan(model, here, n_ctx=n_ctx, levels=levels).levels, strict=True):
        assert found.kv_bytes == pytest.approx(planned.kv_bytes, rel=0.01)  # between listed ones: a straight line
        if n_ctx in {one.n_ctx for one in given.contexts}:
            assert (found.kv_bytes, found.compute_bytes) == (planned.kv_bytes, planned.compute_bytes)
            assert found.total_bytes == planned.total_bytes
    assert moved.levels[0].kv_bytes < given.levels[0].kv_bytes * n_ctx / 2048 or n_ctx < 2048


def test_a_context_beyond_the_trained_one_is_refused():
    given = make_plan(
        model_of(Shape("s", "llama", 2, 64, 128, 2, 2, 256, 512)), Machine("x", 1, (), GiB, GiB, 1 << 40), n_ctx=256
    )
    with pytest.raises(UsageError, match="trained for"):
        what_if(dataclasses.replace(run_record(), plan=given), n_ctx=given.contexts[-1].n_ctx + 1)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 200), ("bar=kl+%3C+0.02&ctx=4096&memory=1000000000", 200), ("bar=nonsense", 400),
        ("memory=-1", 400), ("memory=0", 400), ("memory=" + "9" * 400, 400), ("ctx=1e3", 400),
        ("ctx=%D9%A3", 400), ("bar=" + "x" * 501, 400),
    ],
)  # fmt: skip
def test_what_if_over_http(run_json, query, status):
    client = TestClient(build_page(run_json), base_url="http://127.0.0.1")
    reply = client.get(f"/bitladder/api/what-if?{query}")
    assert reply.status_code == status
    assert ("decision" in reply.json()) == (status == 200)


def test_the_page_answers_only_to_this_machine(run_json):
    client = TestClient(build_page(run_json), base_url="http://evil.example")
    assert client.get("/bitladder/api/run").status_code == 400


def test_the_page_is_not_served_over_something_that_is_no_run(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(BadInput, match="is not a run"):
        build_page(path)


def test_the_files_keep_foreign_content_out(run_json):
    client = TestClient(build_page(run_json), base_url="http://127.0.0.1")
    for path in ("/", "/main.js", "/style.css"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
    for file in PAGE.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org)", file.read_text()), file.name
        assert "innerHTML" not in file.read_text(), file.name
    assert client.get("/../app.py").status_code == 404
