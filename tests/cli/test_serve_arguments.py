"""Tiers, MODEL and contexts as serve and export take them; what can be refused is refused before anything is built."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bitladder.cli.app import app
from bitladder.cli.deploy import TierOptions, _with_guesses, tiers_of
from bitladder.errors import BitladderError
from bitladder.files.gguf import GgufFile
from bitladder.plan.ladder import usable_context
from bitladder.records.decision import Decision, TierGuesses
from bitladder.records.plan import DEFAULT_CTX
from bitladder.serve.deploy import own_engine
from bitladder.serve.export import llama_swap, ollama_modelfile, serve_command
from bitladder.serve.settings import ServeSettings
from bitladder.stages.job import Work
from bitladder.stages.known_files import model_sha256
from bitladder.stages.measured_levels import LatestRun
from ladder_examples import run_record
from tiny_engine import TRAINED_CTX, write_tiny, write_tiny_with_head


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny-F16.gguf")
    return tmp_path


def bitladder(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def tiers(model: str | None, quality: str | None = None, speed: str | None = None, **more) -> ServeSettings:
    """``quality`` and ``speed``: what each option is given, several separated by spaces."""
    slots = more.pop("slots", None)
    given = {"quality": quality and quality.split(), "speed": speed and speed.split()}
    return tiers_of(TierOptions(model=model, threads=1, **given, **more), Work(), slots=slots)


def test_files_and_endpoints_need_no_model(here):
    one = tiers(None, "tiny-F16.gguf")
    assert (one.name, one.quality.level, one.speed) == ("tiny-F16", "tiny-F16", None)
    two = tiers(None, "http://10.0.0.5:8000#big", "http://10.0.0.6:8000#small", name="pair")
    assert (two.name, two.quality.level, two.speed and two.speed.level) == ("pair", "big", "small")
    assert (two.quality.url, two.quality.model) == ("http://10.0.0.5:8000/v1", "big")
    assert tiers(None, None, "tiny-F16.gguf").quality.level == "tiny-F16"
    assert tiers("mine", "http://h#big", "tiny-F16.gguf").name == "mine"
    assert tiers("m-F16", "tiny-F16.gguf", name="other").name == "other"


def test_an_option_that_is_repeated_names_replicas(here, monkeypatch):
    monkeypatch.setenv("KEY_OF_B", "sk-b")
    two = tiers(None, "http://a:1#big http://b:1/v1#big", "http://c:1#small", name="pair", key_env=["b:1=KEY_OF_B"])
    assert (two.quality.level, two.quality.addresses) == ("big", ("http://a:1/v1#big", "http://b:1/v1#big"))
    assert [one.key_env for one in two.quality.keyed] == ["", "KEY_OF_B"]
    assert two.speed is not None and two.speed.replicas == ()
    assert tiers(None, "http://a:1 http://a:1").quality.replicas == ()
    for wrong, said in (
        ("http://a:1#big tiny-F16.gguf", "is no address"),
        ("tiny-F16.gguf http://a:1#big", "is no address"),
        ("http://a:1#big http://b:1#small", "different models"),
        ("http://a:1#big http://b:1", "different models"),
        ("http://a:1#big http://a:1/v1/#big", "twice"),
    ):
        with pytest.raises(BitladderError, match=said):
            tiers(None, wrong)
    (here / "s.yaml").write_text("quality: [http://a:1#big, tiny-F16.gguf]\n")
    done = bitladder("serve", "--config", "s.yaml")
    assert done.exit_code == 2 and "is no address" in done.stderr


def test_a_file_that_no_run_knows_and_an_address_are_served_by_themselves(here):
    alone = tiers("tiny-F16.gguf")
    assert (alone.name, alone.quality.level, alone.speed) == ("tiny-F16", "tiny-F16", None)
    assert alone.quality.path == Path("tiny-F16.gguf")
    cloud = tiers("http://10.0.0.5:8000#big")
    assert (cloud.name, cloud.quality.url, cloud.quality.model) == ("big", "http://10.0.0.5:8000/v1", "big")
    assert tiers("http://10.0.0.5:8000").name == "10.0.0.5:8000"
    with pytest.raises(BitladderError, match="no stored decision"):
        (here / "folder").mkdir()
        tiers("smollm2-135m")


@pytest.mark.parametrize(
    ("option", "what", "said"),
    [
        ("--embeddings", "Q8_0", "no file and no address"),
        ("--embeddings", "none.gguf", "no file 'none.gguf'"),
        ("--embeddings", "junk.gguf", "junk.gguf"),
        ("--rerank", "tiny-F16.gguf", "no reranker"),
        ("--rerank", "Q8_0", "no file and no address"),
    ],
)
def test_what_cannot_embed_or_rank_is_refused_before_anything_starts(here, option, what, said):
    (here / "junk.gguf").write_bytes(b"GGUF and then nothing")
    done = bitladder("serve", "tiny-F16.gguf", option, what)
    assert done.exit_code == 2, done.output
    assert said in done.stderr


def test_a_model_beside_files_still_counts_when_it_is_one(here):
    settings = tiers("tiny-F16.gguf", "http://h#big")
    assert (settings.name, settings.run_json) == ("tiny-F16", None)
    for wrong in ("missing.gguf", "./mine", "no/such"):
        with pytest.raises(BitladderError):
            tiers(wrong, "http://h#big")


def test_the_same_file_twice_is_one_level_and_files_of_one_name_are_two(here):
    same = tiers(None, "tiny-F16.gguf", "./tiny-F16.gguf")
    assert same.quality.level == "tiny-F16" and (same.speed is None or same.speed.level == "tiny-F16")
    write_tiny(here / "b" / "tiny-F16.gguf", seed=1)
    two = tiers(None, "tiny-F16.gguf", "b/tiny-F16.gguf")
    assert two.speed is not None
    assert (two.quality.level, two.speed.level) == (f"tiny-F16@{here.name}", "tiny-F16@b")
    assert two.name == "tiny-F16"


@pytest.mark.parametrize("verb", [("serve",), ("export", "--to", "llama-swap")], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny-F16.gguf", "--quality", "Q8_0", "--speed", "nonsense"), "no level 'nonsense'"),
        (("tiny-F16.gguf", "--quality", "Q8_0", "--speed", "none.gguf"), "no file 'none.gguf'"),
        (("tiny-F16.gguf", "--quality", "Q8_0", "--speed", "http://"), "no address"),
        (("tiny-F16.gguf", "--quality", "Q8_0", "--speed", "tiny-F16.gguf", "--ctx", "4096"), "trained for 2048"),
        (("--quality", "tiny-F16.gguf", "--speed", "Q8_0"), "No MODEL is named that 'Q8_0' is a level of"),
        ((), "No MODEL is named"),
        (("mine", "--quality", "Q8_0"), "no model 'mine'"),
        (("smollm2-135m", "--quality", "none.gguf"), "no file 'none.gguf'"),
        (("http://h#m", "--quality", "Q8_0"), "an address has none"),
        (("tiny-F16.gguf", "--quality", "Q8_0", "--speed", "junk.gguf"), "junk.gguf"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(here, verb, arguments, said):
    (here / "junk.gguf").write_bytes(b"GGUF and then nothing")
    before = {path.name for path in here.iterdir()}
    done = bitladder(*verb, *arguments)
    assert done.exit_code == 2, done.output
    assert said.lower() in done.stderr.lower()
    assert {path.name for path in here.iterdir()} - before <= {"data"}


def test_without_ctx_a_short_model_gets_its_own_length(here):
    assert tiers(None, "tiny-F16.gguf").quality.n_ctx == TRAINED_CTX < DEFAULT_CTX
    assert tiers(None, "tiny-F16.gguf", ctx=512).quality.n_ctx == 512
    write_tiny(here / "long.gguf", n_ctx=32768)
    both = tiers(None, "long.gguf", "tiny-F16.gguf")
    assert both.speed is not None
    assert (both.quality.n_ctx, both.speed.n_ctx) == (DEFAULT_CTX, TRAINED_CTX)
    with GgufFile.open(here / "tiny-F16.gguf") as file:
        assert usable_context(file.model, None) == TRAINED_CTX


def test_planning_without_ctx_uses_what_the_model_was_trained_for(here):
    done = bitladder("plan", "tiny-F16.gguf", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["n_ctx"], plan["request"]["n_ctx"]) == (TRAINED_CTX, TRAINED_CTX)
    explicit = bitladder("plan", "tiny-F16.gguf", "--ctx", 4096)
    assert explicit.exit_code == 2
    assert "trained for 2048" in explicit.stderr


@pytest.mark.model
def test_run_smallest_and_compare_without_ctx(here):
    (here / "w.yaml").write_text("inputs:\n  - {id: one, prompt: Hello, max_tokens: 4, expect: {max_words: 100}}\n")
    (here / "t.txt").write_text("Some words to measure on. " * 60)
    shared = ("--workload", "w.yaml", "--levels", "Q8_0", "--imatrix", "none", "--threads", 1)
    done = bitladder("run", "tiny-F16.gguf", *shared, "--text", "t.txt", "--bar", "kl < 100", "--json")
    assert done.exit_code == 0, done.output
    assert f"--ctx {TRAINED_CTX}" in json.loads(done.stdout)["commands"][0]
    found = bitladder("smallest", "tiny-F16.gguf", *shared)
    assert found.exit_code in (0, 4, 5), found.output
    same = bitladder("compare", "tiny-F16.gguf", "tiny-F16.gguf", "Hello", "--max-tokens", 4, "--threads", 1)
    assert same.exit_code == 0, same.output


def test_a_tiers_cache_is_a_part_of_its_name_its_memory_and_its_export(here):
    both = tiers(None, "tiny-F16.gguf", "tiny-F16.gguf+q8_0/q4_0", ctx=1024, slots=1)
    assert (both.quality.level, str(both.quality.cache)) == ("tiny-F16", "f16")
    assert both.speed is not None
    assert (both.speed.level, str(both.speed.cache)) == ("tiny-F16+q8_0/q4_0", "q8_0/q4_0")
    assert both.speed.memory_bytes < both.quality.memory_bytes
    assert both.speed.standing == "unmeasured"
    usual = tiers(None, "tiny-F16.gguf", "tiny-F16.gguf+f16", kv="q8_0")
    assert (str(usual.quality.cache), usual.speed and str(usual.speed.cache)) == ("q8_0", "f16")
    command = serve_command(both)
    assert command[command.index("--speed") + 1].endswith("/tiny-F16.gguf+q8_0/q4_0")
    assert "--cache-type-k q8_0 --cache-type-v q4_0" in llama_swap(both)
    engine = own_engine(both.speed, 1)
    assert (engine.settings.cache_type_k, engine.settings.cache_type_v) == ("q8_0", "q4_0")
    with pytest.raises(BitladderError, match="no type of a KV cache"):
        tiers(None, "tiny-F16.gguf", kv="q9")
    with pytest.raises(BitladderError, match="Ollama has no KV cache of q8_0/q4_0"):
        ollama_modelfile(both.speed)
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in ollama_modelfile(usual.quality)


def test_guesses_are_given_to_tiers_and_counted_and_a_strange_draft_is_refused(here):
    plain = tiers(None, "tiny-F16.gguf", slots=1)
    for words in (["ngram"], ["quality=ngram"]):
        assert str(tiers(None, "tiny-F16.gguf", speculate=words).quality.speculate) == "ngram"
    assert tiers(None, "tiny-F16.gguf", speculate=["speed=ngram"]).quality.speculate is None
    assert tiers(None, "tiny-F16.gguf", speculate=["auto"]).quality.speculate is None  # nothing was measured
    drafted = tiers(None, "tiny-F16.gguf", speculate=["draft:tiny-F16.gguf"], slots=1)
    assert drafted.quality.memory_bytes > plain.quality.memory_bytes + (here / "tiny-F16.gguf").stat().st_size
    assert "quality=draft:" in " ".join(serve_command(drafted))
    assert own_engine(drafted.quality, 1).settings.draft == "tiny-F16.gguf"
    write_tiny(here / "other.gguf", tokens_more=200)
    with pytest.raises(BitladderError, match="cannot draft"):
        tiers(None, "tiny-F16.gguf", speculate=["draft:other.gguf"])
    for wrong in ("mtpx", "draft:", "quality=x"):
        with pytest.raises(BitladderError, match="no way to speculate"):
            tiers(None, "tiny-F16.gguf", speculate=[wrong])
    with pytest.raises(BitladderError, match="holds no heads"):
        tiers(None, "tiny-F16.gguf", speculate=["mtp"])
    heads = write_tiny_with_head(here / "heads.gguf")
    guessing = tiers(None, str(heads), speculate=["mtp"], slots=1).quality
    assert guessing.memory_bytes > tiers(None, str(heads), slots=1).quality.memory_bytes
    assert own_engine(guessing, 1).settings.speculate == "mtp"
    assert "`--speculate mtp`" in bitladder("plan", heads).output.replace("\n", " ")
    assert "--speculate" not in bitladder("plan", "tiny-F16.gguf").output


def test_that_a_run_chose_nothing_is_said_where_the_model_itself_is_served(here, monkeypatch, capsys):
    latest = LatestRun(Decision("", None, None, (), ""), "today", here / "run.json", run_record())
    monkeypatch.setattr("bitladder.stages.measured_levels.latest_run", lambda *_: latest)
    assert tiers("tiny-F16.gguf").quality.level == "tiny-F16"
    assert "run.json). It chose no level. The model is served as it is.\n" in capsys.readouterr().err


def test_tiers_guess_as_the_run_decided_with_the_same_draft_and_file_alone(here):
    draft = write_tiny(here / "draft.gguf", seed=5)
    spec = tiers(None, "tiny-F16.gguf", slots=1).quality
    told = TierGuesses(spec.level, f"draft:{draft}", 1.4, 1.2, 1.6, model_sha256(draft))
    decision = Decision("", spec.level, spec.level, (), "", files={spec.level: spec.sha256}, speculate=(told,))
    latest = LatestRun(decision, "today", here / "run.json", None)
    assert _with_guesses(spec, "", Work(), latest).speculate.draft == draft
    assert _with_guesses(spec, "none", Work(), latest).speculate is None
    assert _with_guesses(spec, "ngram", Work(), latest).speculate.kind == "ngram"
    assert _with_guesses(replace(spec, sha256="0" * 64), "", Work(), latest).speculate is None
    write_tiny(draft, seed=6)  # another file under the same name
    assert _with_guesses(spec, "", Work(), latest).speculate is None


def test_a_chat_template_that_does_not_end_is_refused_before_an_engine_starts(tmp_path, monkeypatch):
    def reached(*_, **__):
        pytest.fail("the engine would take all memory")

    monkeypatch.setattr("bitladder.serve.app.serve", reached)
    monkeypatch.setattr("bitladder.engines.registry.start", reached)
    endless = "{% for number in range(1000000000) %}{{ number }}{% endfor %}"
    model = write_tiny(tmp_path / "tiny-F16.gguf", template=endless)
    for arguments in (["serve", model], ["compare", model, model, "Hello"]):
        done = bitladder(*arguments)
        assert done.exit_code == 8 and "does not end" in done.stderr
