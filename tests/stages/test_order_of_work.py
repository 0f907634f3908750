"""What can be refused is refused before work begins, and only for what the work needs."""

import pytest

from bitladder.engines import registry
from bitladder.errors import BadWorkload, ModelRefused
from bitladder.files.chat_template import template_ends
from bitladder.levels import parse_levels
from bitladder.pipeline import run
from bitladder.progress import silent
from bitladder.stages.job import Work, opened
from bitladder.stages.run_facts import RunSettings
from bitladder.stages.smallest import SmallestRequest, find_smallest
from tiny_engine import write_tiny

SHORT = "  - id: short\n    prompt: Say hello\n    max_tokens: 4\n    expect: {max_words: 50}\n"
LONG = f"  - id: long\n    prompt: {'word ' * 100}\n    max_tokens: 4\n    expect: {{max_words: 50}}\n"


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    for place in ("bitladder.pipeline", "bitladder.stages.smallest"):
        monkeypatch.setattr(f"{place}.ladder_files", lambda *_, **__: pytest.fail("levels were built"))


@pytest.mark.parametrize("verb", ["run", "smallest"])
def test_an_input_that_no_context_holds_is_named_before_levels_are_built(tmp_path, verb):
    model = write_tiny(tmp_path / "tiny-F16.gguf")
    (tmp_path / "work.yaml").write_text("inputs:\n" + SHORT + LONG)
    given = {
        "model": str(model), "workload": tmp_path / "work.yaml", "levels": tuple(parse_levels(["Q8_0"])), "n_ctx": 128,
        "out": tmp_path / "out", "imatrix": "none",
    }  # fmt: skip
    with pytest.raises(BadWorkload) as error:
        if verb == "run":
            run(RunSettings(**given), silent)
        else:
            find_smallest(SmallestRequest(bar="passes >= reference - 4 points", **given), Work())
    assert error.value.found == "Input 'long' (line 6) has 499 tokens. A request has room for 128."
    assert "--ctx 507" in error.value.do
    assert not list(tmp_path.glob("out/*"))


TEMPLATES = {
    "Ollama's": "{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}",
    "a filter that nobody has": "{% for m in messages %}{{ m.content | wobble }}{% endfor %}",
}


def test_a_chat_template_that_does_not_end_never_reaches_the_engine(tmp_path, monkeypatch):
    def reached(*_):
        pytest.fail("the engine would take all memory")

    monkeypatch.setattr(registry, "start", reached)
    endless = "{% for number in range(1000000000) %}{{ number }}{% endfor %}"
    model = write_tiny(tmp_path / "tiny-F16.gguf", template=endless)
    with opened(str(model), Work()) as job, pytest.raises(ModelRefused, match=r"chat template .* does not end"):
        job.require_engine()


@pytest.mark.parametrize("template", ["{{ 'Hi' }}", "{{ if .System }}", "{{ messages[0].content | wobble }}", " "])
def test_other_chat_templates_are_the_engines_to_judge(template):
    assert template_ends(template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_read_only_for_chats(tmp_path, name):
    model = write_tiny(tmp_path / "tiny-F16.gguf", template=TEMPLATES[name])
    with opened(str(model), Work()) as job:
        assert job.tokens(["ab"]) == [[97, 98]]
        assert job.journal.warnings == []
        with pytest.raises(ModelRefused, match="chat template") as refused:
            job.require_engine()
    assert "written for another program" in refused.value.means and "`measure`" in refused.value.do
    with pytest.raises(ModelRefused, match="chat template"):
        run(
            RunSettings(
                model=str(model), levels=tuple(parse_levels(["Q8_0"])), out=tmp_path / "out", imatrix="none", n_ctx=128
            ),
            silent,
        )
    assert not list(tmp_path.glob("out/*"))
