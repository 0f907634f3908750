"""Families without a row are walked through transformers' own whole forward, and rows are the judge of how."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_families
import tiny_models
from bitladder.describe.text import Document
from bitladder.errors import BadFile, BadInput, BitladderError, UnknownArchitecture
from bitladder.files.convert import ORIGIN
from bitladder.files.gguf import GgufFile
from bitladder.formats.recipes import is_quantizable
from bitladder.formats.roles import layer_tensor
from bitladder.levels.checkpoints import parse_checkpoint
from bitladder.plan.abilities import Route
from bitladder.plan.recipe import Limits, choose
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.calibration import importance_file
from bitladder.stages.feedback import write_with_feedback
from bitladder.stages.fidelity import Candidate, file_candidate, folder_candidate, made_candidates, walk
from bitladder.stages.forecast import largest_layer, walking_need
from bitladder.stages.imatrix import importance_matrix
from bitladder.stages.job import Work, opened
from bitladder.stages.model_route import route_of
from bitladder.stages.sensitivity import weigh
from bitladder.walk import discovered
from bitladder.walk.checkpoint_walk import Settings
from bitladder.walk.feedback import FeedbackSettings
from bitladder.walk.layers import LayeredModel
from bitladder.walk.opened import layered
from bitladder.walk.skeleton import Skeleton
from bitladder.walk.weights import FileWeights, MadeWeights, Quantizer
from bitladder.walk.whole import WholeModel
from tiny_checkpoints import decoded, loaded, run, tiny, windows_of
from walked import assert_close, logits_of, some_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = Settings(half=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every family, converted in one go."""
    return tiny_families.write_all(tmp_path_factory.mktemp("families"), list(tiny_families.FAMILIES))


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_logits_are_those_of_transformers_whole_model(name, made):
    model, _, gguf = made[name]
    tokens = some_tokens()
    with GgufFile.open(gguf) as source, torch.no_grad():
        weights = FileWeights(source)
        found = logits_of(layered(source, weights), weights, tokens)
        wanted = model(input_ids=torch.from_numpy(tokens)).logits
    assert_close(found, wanted)


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_what_is_found_is_what_rows_say(name, tmp_path):
    """Of every family with a row: the same parameters, the same shared inputs in the same order, the same logits."""
    _, checkpoint, gguf = tiny(name, tmp_path)
    with GgufFile.open(gguf) as source:
        weights = FileWeights(source)
        row, own = LayeredModel(source.model, weights), WholeModel(source.model, weights, checkpoint)
        for layer in range(row.n_layer):
            ours, theirs = own.layer(layer, weights), row.layer(layer, weights)
            assert_same_parameters(ours, theirs)
            watched, expected = own.inputs(layer, ours), row.inputs(layer, theirs)
            held = set(row.layer_names(layer))
            assert set(own.layer_names(layer)) == held
            assert quantized(watched, held, layer) == quantized(expected, held, layer)
        tokens = some_tokens()
        assert_close(logits_of(own, weights, tokens), logits_of(row, weights, tokens))


def assert_same_parameters(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (path, value), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert path == other
        np.testing.assert_array_equal(value.numpy(), expected.numpy(), err_msg=path)


def quantized(inputs, held, layer) -> dict[str, frozenset[str]]:
    """By tensor, those that share its input: of routers and shared experts rows tell less than there is to see."""
    found = {}
    for shared in inputs:
        names = {layer_tensor(layer, role) for role in shared.roles if "_inp" not in role and "shexp" not in role}
        found |= {name: frozenset(names & held) for name in names & held}
    return found


@pytest.mark.parametrize("name", ["llama with biases", "qwen3", "gemma3", "mixtral"])
def test_gptq_gives_the_bytes_that_rows_give(name, tmp_path, monkeypatch):
    """Rotary tables apart, which rows compute in f64 and transformers in f32: here both have those of the rows."""
    _, checkpoint, gguf = tiny(name, tmp_path, num_hidden_layers=2, intermediate_size=64)
    written = {}
    for way in ("rows", "found"):
        with GgufFile.open(gguf) as source:
            if way == "found":
                with_tables_of(LayeredModel(source.model, FileWeights(source)), monkeypatch)
                monkeypatch.setattr("bitladder.walk.opened.LayeredModel", no_rows)
            run(gguf, ["GPTQ-4bit-g32"], tmp_path / way, checkpoint, windows=windows_of(1, 16), settings=EXACT)
        written[way] = decoded(tmp_path / way / "tiny-GPTQ-4bit-g32", "GPTQ-4bit-g32")
    assert written["rows"].keys() == written["found"].keys()
    for name_of, value in written["rows"].items():
        np.testing.assert_array_equal(written["found"][name_of], value, err_msg=name_of)


def with_tables_of(row: LayeredModel, monkeypatch) -> None:
    """Layers are called with a row's rotary tables."""
    calls = Skeleton.calls

    def changed(self, windows, n, device):
        return [
            replace(call, options={**call.options, "position_embeddings": row._rope(n, local=local)})
            for call, local in zip(calls(self, windows, n, device), map(slides, range(self.n_layer)), strict=True)
        ]

    def slides(layer: int) -> bool:
        return row._slides(layer) and row.family.local_rope

    monkeypatch.setattr(Skeleton, "calls", changed)


def no_rows(*_: object, **__: object) -> LayeredModel:
    raise UnknownArchitecture("rows are left out")


@pytest.mark.parametrize("name", ["lfm2", "glm4 moe", "deepseek3", "qwen3.5", "gemma3n", "phi"])
def test_calibrated_levels_of_families_without_a_row(name, made, tmp_path):
    """The folder that GPTQ writes is a plain model of transformers, close to the source, and the walk measures it as
    transformers runs it."""
    _, checkpoint, gguf = made[name]
    level = "GPTQ-4bit-g32"
    with GgufFile.open(gguf) as source:
        written = run(gguf, [level, "INT8-W8A8"], tmp_path, checkpoint, settings=EXACT)
        folders = [Path(report.path) for report in written]
        candidates = [
            folder_candidate(source, folder, parse_checkpoint(one).format)
            for folder, one in zip(folders, (level, "INT8-W8A8"), strict=True)
        ]
        plain = made_candidates(source, ["Q4_0"])
        gptq, int8, rounded = walk(source, [*candidates, *plain], windows_of(2, 4))
        weights = candidates[0].weights
        with torch.no_grad():
            own = logits_of(layered(source, FileWeights(source)), weights, some_tokens())
    assert int8.kl_mean < gptq.kl_mean < rounded.kl_mean
    other = loaded(folders[0], decoded(folders[0], level), tmp_path / "plain")
    with torch.no_grad():
        assert_close(own, other(torch.from_numpy(some_tokens())).logits)


@pytest.mark.parametrize("name", ["qwen3moe", "qwen2moe", "ernie4_5moe", "mixtral"])
def test_importance_and_counts_are_those_of_rows(name, tmp_path, monkeypatch):
    """Per expert, too, however its inputs are found."""
    _, checkpoint, gguf = tiny(name, tmp_path)
    found = []
    for way in ("rows", "found", "products"):
        if way == "found":
            monkeypatch.setattr("bitladder.walk.opened.LayeredModel", no_rows)
        if way == "products":
            monkeypatch.setattr("bitladder.walk.discovered._usual_gate", lambda _: False)
            monkeypatch.setattr("bitladder.walk.opened._KEPT", {})
        (gguf.parent / ORIGIN).write_text(str(checkpoint.resolve()))
        with GgufFile.open(gguf) as source:
            found.append(importance_matrix(source, windows_of(1, 4), half=False))
    rows, *others = found
    for other in others:
        assert rows.counts.keys() == other.counts.keys()
        for tensor, counts in rows.counts.items():
            np.testing.assert_array_equal(other.counts[tensor], counts)
            np.testing.assert_allclose(other.mean_squares[tensor], rows.mean_squares[tensor], rtol=1e-4)


def test_importance_follows_columns_that_the_converter_moved(made):
    """What a moved column of the file meets is what the same column of the checkpoint meets."""
    model, _, gguf = made["qwen3.5"]
    tokens, seen = windows_of(1, 2), []
    module = model.model.layers[0].linear_attn.out_proj
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].reshape(-1, given[0].shape[-1])))
    with torch.no_grad():
        for window in tokens:
            model(torch.from_numpy(window.tokens[None]))
    hook.remove()
    squares = torch.cat(seen).square().mean(0).numpy()
    with GgufFile.open(gguf) as source:
        stored = FileWeights(source)("blk.0.ssm_out.weight")
        found = importance_matrix(source, tokens, half=False).mean_squares["blk.0.ssm_out.weight"][0]
    moved = [int(np.flatnonzero((column == stored.T).all(1))[0]) for column in module.weight.detach().numpy().T]
    assert moved != sorted(moved)
    np.testing.assert_allclose(found[moved], squares, rtol=1e-4)


@pytest.mark.parametrize("name", ["lfm2", "gpt-oss", "deepseek2", "deepseek3", "gemma4 small", "gemma3n", "phi"])
def test_recipes_and_error_feedback(name, made, tmp_path):
    """Tensors are weighed, types chosen for a budget, codes fitted with feedback; that is better than plain rounding by
    the same recipe."""
    _, _, gguf = made[name]
    with GgufFile.open(gguf) as source:
        weighed = weigh(source, windows_of(1, 16), half=False)
        matrices = {info.name for info in source.model.tensors if is_quantizable(info)}
        unseen = matrices - set(weighed.table.losses)
        if tiny_families.FAMILIES[name].unread:
            unseen = {one for one in unseen if not re.match(r"blk\.[34]\.attn_[kv]\.weight", one)}
        assert all("attn_k_b" in one or "conv" in one or "per_layer" in one for one in unseen), unseen
        rows_of_16 = name == "gemma3n"  # which stay F16
        recipe = choose(weighed.table, source.model, Limits(bpw=13 if rows_of_16 else 6.5))
        assert len(set(recipe.qtypes.values())) > 2
        fitted = write_with_feedback(source, recipe, tmp_path, windows_of(1, 16), settings=FeedbackSettings(half=False))
        plain = Candidate("plain", MadeWeights(Quantizer(FileWeights(source)), recipe.qtypes))
        with GgufFile.open(fitted.file.path) as file:
            fed, rounded = walk(source, [file_candidate(source, file), plain], windows_of(2, 16))
        slack = 1.1 if source.model.dims.n_expert else 1.0  # few of the tokens reach an expert
    assert 0 < fed.kl_mean < slack * rounded.kl_mean


@pytest.mark.parametrize("name", ["qwen3.5 that sees", "mistral3 that sees"])
def test_a_level_holds_the_towers_of_its_source_as_they_are(name, made, tmp_path):
    """Nothing is dropped, and engines are told that these parts are not quantized."""
    _, checkpoint, gguf = made[name]
    (written,) = run(gguf, ["GPTQ-4bit-g32-ct"], tmp_path, checkpoint, windows=windows_of(1, 16), settings=EXACT)
    there, here = load_file(checkpoint / "model.safetensors"), load_file(Path(written.path) / "model.safetensors")
    quantized = {name.removesuffix("_packed") for name in here if name.endswith(".weight_packed")}
    assert quantized and quantized <= set(there)
    for name_of, value in there.items():
        if name_of not in quantized:
            torch.testing.assert_close(here[name_of], value, msg=name_of)
    config = json.loads((Path(written.path) / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    towers = [one for one in there if re.search("vis", one) and there[one].ndim > 1]
    assert towers
    for one in towers:
        assert any(re.fullmatch(pattern.removeprefix("re:"), one.removesuffix(".weight")) for pattern in ignored), one


STACKS = {
    # by family: where the stacks are in a layer, and what is there of one expert's gate and up f32[outputs, inputs]
    "gpt-oss": ("mlp.experts", lambda gate, up: torch.stack([gate, up], 1).flatten(0, 1).T),
    "llama4": ("feed_forward.experts", lambda gate, up: torch.cat([gate, up]).T),
    "granite hybrid": ("block_sparse_moe.experts", lambda gate, up: torch.cat([gate, up])),
}


def calibrated(gguf, checkpoint, level, folder):
    """A checkpoint level that loses less than Q4_0: its decoded weights by name, and the logits that the walk computes
    of them."""
    with GgufFile.open(gguf) as source:
        (written,) = run(gguf, [level], folder, checkpoint, windows=windows_of(1, 40), settings=EXACT)
        candidate = folder_candidate(source, Path(written.path), parse_checkpoint(level).format)
        found, rounded = walk(source, [candidate, *made_candidates(source, ["Q4_0"])], windows_of(2, 4))
        with torch.no_grad():
            own = logits_of(layered(source, FileWeights(source)), candidate.weights, some_tokens())
    assert found.kl_mean < rounded.kl_mean
    return decoded(Path(written.path), level), own


@pytest.mark.parametrize("level", ["GPTQ-4bit-g32", "AWQ-4bit-g32-ct", "INT8-W8A8"])
@pytest.mark.parametrize("name", STACKS)
def test_experts_in_stacks_become_linear_layers(name, level, made, tmp_path):
    """Each with a row for each output, under the names that engines look for; put together again by hand they are a
    model of transformers with the logits that the walk computes, close to the source."""
    model, checkpoint, gguf = made[name]
    weights, own = calibrated(gguf, checkpoint, level, tmp_path)
    restack(weights, *STACKS[name])
    other = copy.deepcopy(model)
    other.load_state_dict({name_of: torch.as_tensor(value) for name_of, value in weights.items()}, strict=False)
    with torch.no_grad():
        assert_close(own, other(torch.from_numpy(some_tokens())).logits)


def restack(weights: dict[str, torch.Tensor], owner: str, joined) -> None:
    """What transformers holds, of the experts' linear layers."""
    prefixes = {found[1] for name in weights if (found := re.match(rf"(.*\d+\.{re.escape(owner)}\.)\d+\.", name))}
    assert prefixes
    for prefix in prefixes:
        gate, up, down = (taken(weights, prefix, f"{word}_proj.weight") for word in ("gate", "up", "down"))
        assert set(map(len, (*gate, *up))) == {96} and set(map(len, down)) == {64}
        made = [joined(*pair) for pair in zip(gate, up, strict=True)]
        turned = len(made[0]) == 64
        weights[f"{prefix}gate_up_proj"] = torch.stack(made)
        weights[f"{prefix}down_proj"] = torch.stack([one.T if turned else one for one in down])
        if biases := taken(weights, prefix, "gate_proj.bias"):
            pairs = zip(biases, taken(weights, prefix, "up_proj.bias"), strict=True)
            weights[f"{prefix}gate_up_proj_bias"] = torch.stack([joined(a[:, None], b[:, None])[0] for a, b in pairs])
            weights[f"{prefix}down_proj_bias"] = torch.stack(taken(weights, prefix, "down_proj.bias"))


def taken(weights: dict[str, torch.Tensor], prefix: str, leaf: str) -> list[torch.Tensor]:
    """What all experts have of a name, in their order; it is there no more."""
    return [
        torch.as_tensor(weights.pop(name)) for expert in range(4) if (name := f"{prefix}{expert}.{leaf}") in weights
    ]


@pytest.mark.parametrize("level", ["GPTQ-4bit-g32", "AWQ-4bit-g32", "W4A16-g32"])
def test_matrices_with_a_column_for_each_output_are_packed_upright(level, made, tmp_path):
    """As engines read them, who multiply packed codes of GPT-2's Conv1D like those of any linear layer."""
    model, checkpoint, gguf = made["gpt2"]
    weights, own = calibrated(gguf, checkpoint, level, tmp_path)
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    turned = {
        name: torch.as_tensor(value).T if re.search(r"c_\w+\.weight", name) else torch.as_tensor(value)
        for name, value in weights.items()
    }
    other = copy.deepcopy(model)
    other.load_state_dict(turned, strict=False)
    with torch.no_grad():
        assert_close(own, other(torch.from_numpy(some_tokens())).logits)


def test_a_head_is_fitted_to_what_it_reads_whatever_else_a_layer_hands_on(made, tmp_path):
    """States hold the inputs of every layer, too, beside what the head reads."""
    _, checkpoint, gguf = made["gemma4 small"]
    weights, _ = calibrated(gguf, checkpoint, "MLX-4bit-g32", tmp_path)
    assert any("embed_tokens" in one for one in weights)


@pytest.mark.parametrize("level", ["INT8-W8A8", "FP8-DYNAMIC"])
def test_matrices_that_readers_would_turn_are_refused(level, made, tmp_path):
    _, checkpoint, gguf = made["gpt2"]
    with pytest.raises(UnknownArchitecture, match="lies transposed"):
        run(gguf, [level], tmp_path / "out", checkpoint)
    assert not (tmp_path / "out").exists()


def test_levels_that_differ_in_a_layers_own_inputs_part_at_the_start(made):
    """Two levels with one embedding and two tables of per-layer inputs have states of their own."""
    _, _, gguf = made["gemma4 small"]
    with GgufFile.open(gguf) as source:
        quantizer = Quantizer(FileWeights(source))
        own = Candidate("own", MadeWeights(quantizer, {"per_layer_token_embd.weight": "Q4_0"}))
        other = Candidate("other", MadeWeights(quantizer, {"per_layer_model_proj.weight": "Q4_0"}))
        same = Candidate("same", MadeWeights(quantizer, {}))
        table, projection, nothing = walk(source, [own, other, same], windows_of(2, 4))
    assert table.kl_mean > 0 and projection.kl_mean > 0 and table.kl_mean != projection.kl_mean
    assert nothing.kl_mean == 0


def test_layers_are_looked_at_once_as_long_as_nothing_changes(made, tmp_path, monkeypatch):
    """A job opens its model many times; a file that was touched is looked at again, and compared again."""
    gguf, checkpoint = copied(made, "glm4 moe", tmp_path)
    looked = []
    monkeypatch.setattr(
        "bitladder.walk.whole.discover", lambda *given: (looked.append(1), discovered.discover(*given))[1]
    )
    with GgufFile.open(gguf) as source:
        weights = FileWeights(source)
        first = logits_of(layered(source, weights), weights, some_tokens())
        count = len(looked)
        again = layered(source, weights)
        torch.testing.assert_close(logits_of(again, weights, some_tokens()), first, rtol=0, atol=0)
        assert count == len(looked) == len(again.first_of_each_kind()) > 1
        os.utime(checkpoint / "model.safetensors", ns=(1, 1))
        layered(source, weights)
        assert len(looked) == 2 * count
        change(checkpoint / "model.safetensors", "model.layers.3.mlp.experts.0.up_proj.weight")
        with pytest.raises((BadInput, UnknownArchitecture)):
            logits_of(layered(source, weights), weights, some_tokens())


def test_what_one_way_gathers_is_not_taken_for_anothers(made, tmp_path, monkeypatch):
    """A file beside its checkpoint, and alone; a family with rows, and a variant that they do not describe."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    _, _, gguf = made["granite"]
    alone = tmp_path / "alone" / "model.gguf"
    alone.parent.mkdir()
    shutil.copy(gguf, alone)
    _, _, known = tiny("llama", tmp_path)
    text = [Document("text", "words")]
    kept = {}
    for path in (gguf, alone, known):
        with opened(str(path), Work(threads=1)) as job:
            kept[route_of(job.source)] = importance_file(job, text)
    assert set(kept) == {Route.DERIVED, Route.ENGINE, Route.WALK}
    assert len(set(kept.values())) == 3


def test_what_looking_at_layers_takes_is_predicted(made, tmp_path):
    """A file beside its checkpoint needs three layers more than one with rows; a stack of experts is all of them."""
    _, checkpoint, gguf = made["gpt-oss"]
    _, _, known = tiny("llama", tmp_path)
    with GgufFile.open(gguf) as source, GgufFile.open(known) as other:
        layer = 4 * largest_layer(source.model)
        experts = sum(info.elements for info in source.model.tensors if info.name.startswith("blk.0.ffn"))
        assert layer > 4 * experts > 0.8 * layer
        need, plain = (walking_need(one, windows_of(1, 2), ()).ram_bytes for one in (source, other))
        base = plain - 2 * 4 * largest_layer(other.model)
        assert need == base + 5 * layer
        levels = [parse_checkpoint("GPTQ-4bit-g32")]
        job = Calibration(source, levels, Reading(windows_of(1)), out_dir=tmp_path, name="x", checkpoint=checkpoint)
        assert job.need.disk_bytes > 4 * experts / 8 * len(job._walk.model._kind_of)
    assert job._walk.shapes()["mlp.experts.gate_up_proj"] == (96, 64)
    assert job._walk.counts()["mlp.experts.gate_up_proj"] == 8


def test_without_its_checkpoint_a_file_is_refused_with_the_reason(made, tmp_path):
    _, _, gguf = made["granite"]
    alone = tmp_path / "alone.gguf"
    shutil.copy(gguf, alone)
    with GgufFile.open(alone) as source, pytest.raises(UnknownArchitecture) as refusal:
        layered(source, FileWeights(source))
    assert "config.json" in str(refusal.value)


def copied(made, name, tmp_path) -> tuple[Path, Path]:
    """A family's file beside a copy of its checkpoint, to be spoilt."""
    _, checkpoint, gguf = made[name]
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "file").mkdir()
    shutil.copy(gguf, tmp_path / "file" / "model.gguf")
    (tmp_path / "file" / ORIGIN).write_text(str((tmp_path / "checkpoint").resolve()))
    return tmp_path / "file" / "model.gguf", tmp_path / "checkpoint"


SPOILT = {
    "no layers": {"num_hidden_layers": 0},
    "more layers than there are": {"num_hidden_layers": 10**9},
    "layers that are text": {"num_hidden_layers": "4"},
    "another width": {"hidden_size": 128},
    "an absurd width": {"hidden_size": 2**40, "intermediate_size": 2**40},
    "an absurd head": {"num_key_value_heads": 10**6, "num_attention_heads": 10**6},
    "a model type of nobody": {"model_type": "nobody"},
    "a model type that is none": {"model_type": ["granite"]},
    "another family": {"model_type": "gpt2"},
    "a model that reads pictures": {"model_type": "clip"},
    "no model type": {"model_type": None},
    "rotary parameters that are none": {"rope_parameters": {"rope_type": "nothing", "rope_theta": 1}},
    "an activation of nobody": {"hidden_act": "boom"},
    "a negative norm": {"rms_norm_eps": "tiny"},
    "list for a number": {"num_attention_heads": [4]},
}


@pytest.mark.parametrize("name", SPOILT)
def test_configurations_that_contradict_the_tensors_are_refused(name, made, tmp_path):
    """With a message, before anything is computed, in little time and memory."""
    gguf, checkpoint = copied(made, "granite", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **SPOILT[name]}))
    with GgufFile.open(gguf) as source, pytest.raises(BitladderError) as refusal:
        layered(source, FileWeights(source))
    assert len(str(refusal.value)) < 1000


def test_code_of_a_checkpoint_never_runs(made, tmp_path):
    gguf, checkpoint = copied(made, "granite", tmp_path)
    ran = tmp_path / "ran"
    for module in ("modeling_own", "configuration_own"):
        (checkpoint / f"{module}.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((checkpoint / "config.json").read_text())
    own = {
        "auto_map": {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
        "_attn_implementation": "someone/kernel", "experts_implementation": "someone/kernel",
        "trust_remote_code": True,
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps({**config, **own}))
    with GgufFile.open(gguf) as source:
        weights = FileWeights(source)
        model = layered(source, weights)
        logits_of(model, weights, some_tokens())
    assert not ran.exists()


def test_another_models_checkpoint_is_noticed(made, tmp_path):
    """In the first layer, in a later one, and beside the layers."""
    for place in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        folder = tmp_path / place
        folder.mkdir()
        gguf, checkpoint = copied(made, "granite", folder)
        change(checkpoint / "model.safetensors", place)
        with GgufFile.open(gguf) as source, pytest.raises((BadInput, UnknownArchitecture)):
            weights = FileWeights(source)
            logits_of(layered(source, weights), weights, some_tokens())


def change(path: Path, name: str) -> None:
    """One value of one tensor."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_checkpoint_cut_short_is_refused(made, tmp_path):
    gguf, checkpoint = copied(made, "granite", tmp_path)
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with GgufFile.open(gguf) as source, pytest.raises(BadFile):
        layered(source, FileWeights(source))
