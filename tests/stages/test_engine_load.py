"""A model that the engine does not load: what needs no engine works from the checkpoint, else it is refused at once."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import tiny_checkpoints
import tiny_configs
from bitladder.cli.app import app
from bitladder.errors import BadInput, EngineGone, ModelRefused
from bitladder.files.companions import token_ids
from bitladder.files.converter import find_converter
from bitladder.files.texts import read_texts
from bitladder.levels import parse_levels
from bitladder.pipeline import run
from bitladder.plan.recipe import Limits
from bitladder.progress import silent
from bitladder.records.fidelity import Way
from bitladder.stages import engine_load
from bitladder.stages.calibration import importance_file, make_imatrix
from bitladder.stages.engine_load import engine_ids
from bitladder.stages.job import Build, Journal, Work, opened
from bitladder.stages.measure import Measuring, measure_model
from bitladder.stages.quantize import build_levels
from bitladder.stages.recipe import RecipeRequest, make_recipe
from bitladder.stages.run_facts import RunSettings
from engine_models import write_family

pytestmark = pytest.mark.model
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "boats",
    "drift",
    "home",
]
MIXED = {
    "head_dim": 16, "num_hidden_layers": 4, "hybrid_override_pattern": "M*E-",
    "layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 1, "ssm_state_size": 16, "expand": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32, "conv_kernel": 4,
}  # fmt: skip
TEXTS = ["Hello, world! 1234", "Grüße aus Köln\n\n  and 日本語", "<|im_start|>user\nhi<|im_end|>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, demo_gguf) -> Path:
    """A hybrid with a layer that this build of the engine does not place: a dense one beside a layer of experts."""
    folder = tmp_path_factory.mktemp("model") / "refused"
    folder.mkdir()
    vocab = tiny_checkpoints.write_tokenizer(folder, demo_gguf)
    torch.manual_seed(0)
    config = AutoConfig.for_model("nemotron_h", **{**tiny_configs._BASE, "vocab_size": vocab, **MIXED})
    tiny_configs.class_of(config)(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """Six documents of some hundred words, shuffled by rule."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        words = [WORDS[(number + k * k * (number + 3)) % len(WORDS)] for k in range(260)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def test_texts_are_read_by_the_checkpoints_own_tokenizer(checkpoint, demo_gguf):
    """The same ids as the engine gives with the same tokenizer, in a model that it does load."""
    journal = Journal()
    with opened(str(checkpoint), Work(journal=journal)) as job, opened(str(demo_gguf), Work(), warn=False) as other:
        assert job.tokens(TEXTS) == other.tokens(TEXTS) == engine_ids(other.source, TEXTS)
        assert job.tokens(TEXTS[:1]) == job.tokens(TEXTS)[:1]
    (line,) = [line for line in journal.warnings if "does not load" in line]
    assert "check_tensor_dims" in line
    assert "own tokenizer" in line


def test_measuring_importance_and_checkpoints_need_no_engine(checkpoint, text, tmp_path):
    journal = Journal()
    wanted = Measuring(levels=parse_levels(["Q8_0", "Q4_K_M"]), imatrix="none", texts=[text])
    found = measure_model(str(checkpoint), wanted, Work(journal=journal))
    assert [one.way for one in found] == [Way.WALK] * 2
    assert 0 < found[0].kl_mean < found[1].kl_mean
    again = Journal()
    assert measure_model(str(checkpoint), wanted, Work(journal=again)) == found
    assert again.reused == ["fidelity of Q8_0, Q4_K_M"]
    assert make_imatrix(str(checkpoint), [text], tmp_path / "imatrix.gguf", Work()).is_file()
    levels = parse_levels(["INT8-W8A8"])
    built = build_levels(str(checkpoint), levels, Build(out=tmp_path / "out", texts=[text]), Work())
    assert (Path(built.checkpoints[0].path) / "tokenizer.json").is_file()


def test_what_another_tokenizer_read_is_kept_apart(checkpoint, monkeypatch):
    """A build of the engine that loads the model may read its texts otherwise."""
    with opened(str(checkpoint), Work()) as job:
        own, kept = job.text_key(()), importance_file(job, ())
        (checkpoint / "tokenizer_config.json").write_text(
            json.dumps({**json.loads((checkpoint / "tokenizer_config.json").read_text()), "add_bos_token": True})
        )
        assert job.text_key(()) != own
        monkeypatch.setattr(engine_load, "_noted", lambda _: "")
        assert job.text_key(()) != own
        assert importance_file(job, ()) != kept


@pytest.mark.parametrize("kind", ["checkpoint", "file"])
def test_a_run_says_at_once_that_the_engine_does_not_load_the_model(kind, checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("bitladder.pipeline.ladder_files", lambda *_, **__: pytest.fail("levels were built"))
    model = (
        checkpoint if kind == "checkpoint" else write_family(tmp_path / "a.gguf", "deepseek2", expert_gating_func=77)
    )
    settings = RunSettings(
        model=str(model), levels=tuple(parse_levels(["Q8_0"])), texts=(text,), out=tmp_path / "out", n_ctx=256,
        imatrix="none",
    )  # fmt: skip
    for _ in range(2):  # a refusal that is noted is tried again
        with pytest.raises(ModelRefused, match="does not load") as refused:
            run(settings, silent)
    assert ("walk the checkpoint's layers" if kind == "checkpoint" else "--imatrix none") in refused.value.do
    assert not list(tmp_path.glob("out/*"))


def test_want_of_memory_is_no_refusal(checkpoint, monkeypatch):
    """Nothing is noted, and nothing is read by another tokenizer than the one that will serve."""
    monkeypatch.setattr(engine_load, "_noted", lambda _: None)
    monkeypatch.setattr(engine_load, "_note", lambda *_: pytest.fail("noted"))

    def killed(*_):
        raise EngineGone("The engine was ended by SIGKILL.")

    monkeypatch.setattr(engine_load, "engine_ids", killed)
    with opened(str(checkpoint), Work()) as job, pytest.raises(EngineGone, match="SIGKILL"):
        job.tokens(TEXTS)


@pytest.fixture(scope="module", params=["llama", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def unread(request, tmp_path_factory, demo_gguf) -> Path:
    """A checkpoint whose tokenizer llama.cpp's converter does not know: another rule of splitting text; one without the
    tokens that its class asks for."""
    folder = tmp_path_factory.mktemp("model") / request.param
    folder.mkdir()
    vocab = tiny_checkpoints.write_tokenizer(folder, demo_gguf)
    path = folder / "tokenizer.json"
    own = json.loads(path.read_text())
    if request.param == "llama":
        own["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})
    own["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    path.write_text(json.dumps(own))
    return tiny_configs.write_checkpoint(request.param, folder, vocab)


def test_a_tokenizer_that_the_converter_does_not_read(unread, text, tmp_path, monkeypatch):
    """The weights are of use without: the walk and checkpoint levels work. Files that would run nowhere are refused."""
    monkeypatch.setenv("BITLADDER_CONVERTER", str(find_converter().folder))
    monkeypatch.setenv("BITLADDER_CACHE", str(unread.parent / "cache"))
    planned = CliRunner().invoke(app, ["plan", str(unread), "--ctx", "64", "--json"])
    assert planned.exit_code == 0, planned.output
    journal = Journal()
    with opened(str(unread), Work(journal=journal)) as job:
        assert not [key for key in job.source.model.metadata if key.startswith("tokenizer.")]
        windows = job.windows(read_texts([text]))
        assert {int(window.tokens[0]) for window in windows} == {1}, "every window begins with the token that texts do"
    assert sum("does not read its tokenizer" in line for line in journal.warnings) == 1
    wanted = Measuring(levels=parse_levels(["Q4_K_M"]), imatrix="none", texts=[text])
    assert 0 < measure_model(str(unread), wanted, Work())[0].kl_mean < 1
    levels = parse_levels(["INT8-W8A8"])
    built = build_levels(str(unread), levels, Build(out=tmp_path / "out", texts=[text]), Work())
    written = json.loads((Path(built.checkpoints[0].path) / "tokenizer.json").read_text())
    assert written == json.loads((unread / "tokenizer.json").read_text())
    for refused in (
        lambda: build_levels(str(unread), parse_levels(["Q8_0"]), Build(out=tmp_path / "gguf"), Work()),
        lambda: make_recipe(str(unread), RecipeRequest(Limits(bpw=6.0)), Work()),
        lambda: run(RunSettings(model=str(unread), levels=tuple(wanted.levels), out=tmp_path / "gguf"), silent),
    ):
        with pytest.raises(BadInput, match="does not read the tokenizer"):
            refused()
    assert not list(tmp_path.glob("gguf/*"))
    again = json.loads(CliRunner().invoke(app, ["plan", str(unread), "--ctx", "64", "--json"]).stdout)
    ways = {one["what"]: one["way"] for one in again["abilities"]}
    assert {what: ways[what] for what in ("K-quants", "recipes", "workload")} == dict.fromkeys(
        ("K-quants", "recipes", "workload"), "none"
    )
    assert ways["proof"] != "none"
    assert ways["calibration"] != "none"


def test_a_sentencepiece_model(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(f"{a} {b} {a}{b}." for a in WORDS for b in WORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=310,
        byte_fallback=True, model_type="bpe", minloglevel=2, pad_id=-1,
    )  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = ["the quick boats", "Größe 7"]
    assert token_ids(folder, texts) == [[1, *own.encode(text)] for text in texts]


def test_a_tokenizer_that_nobody_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="tokenizer"):
        token_ids(tmp_path, TEXTS)
