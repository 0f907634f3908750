"""Mixed checkpoints by budget: schemes chosen under what engines fuse, written as several groups of one configuration,
read back, measured, inspected, and refused with numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny_models
from bitladder.cli.app import app
from bitladder.describe.text import text_hash
from bitladder.describe.windows import Window
from bitladder.errors import NothingFits, UnknownLevel, UsageError
from bitladder.files.checkpoint_check import CheckpointReader, format_of_folder
from bitladder.files.companions import Companions
from bitladder.files.gguf import GgufFile
from bitladder.levels import CheckpointLevel, parse_level
from bitladder.levels.checkpoints import Mixed, recognised
from bitladder.levels.checkpoints.mixed import FLOAT, SCHEMES
from bitladder.levels.methods import GPTQ
from bitladder.plan.cost import level_size
from bitladder.plan.recipe import Limits
from bitladder.plan.schemes import choose_schemes, least_bits
from bitladder.records.level_file import LevelFile
from bitladder.records.recipe import FittedLevel, Recipe, SensitivityTable, TensorLoss
from bitladder.stages import mixed, schemes
from bitladder.stages import recipe as recipes
from bitladder.stages.calibrate import Calibration, Reading
from bitladder.stages.fidelity import folder_candidate, walk
from bitladder.stages.inspect import inspect_folder
from bitladder.stages.job import Job
from bitladder.stages.recipe import RecipeResult
from bitladder.stages.schemes import Linears, SchemeChoices, SchemeStorage, form_of, linears_of
from bitladder.stages.sensitivity import SeenInput, weigh
from bitladder.walk.checkpoint_weights import CheckpointWeights
from bitladder.walk.inputs import InputStatistics
from bitladder.walk.opened import layered
from bitladder.walk.tuning import TuneSettings
from bitladder.walk.weights import FileWeights

pytestmark = pytest.mark.usefixtures("one_thread")


def written(name, folder, **sizes):
    case = tiny_models.CASES[name]
    return tiny_models.write(case, tiny_models.make(case, **sizes), folder / "tiny.gguf")


def table_of(source, linears, seed=0):
    """Losses that halve with every bit, times a weight of each group's own."""
    choices = SchemeChoices(source.model.tensors, linears, SCHEMES)
    rng, losses = np.random.default_rng(seed), {}
    tensors = {tensor.name: tensor for tensor in source.model.tensors}
    for names in linears.groups:
        weight = rng.lognormal(0, 2)
        for name in names:
            own = tensors[name]
            each = [(one, choices.nbytes(own, one)) for one in choices.of(own)]
            lost = [(one, size, weight * own.elements * 4.0 ** (-8 * size / own.elements)) for one, size in each]
            losses[name] = tuple(TensorLoss(one, size, loss, loss / 2) for one, size, loss in lost)
    return SensitivityTable("", "", 1000, losses)


@pytest.fixture
def words(monkeypatch):
    """Tiny models have no tokenizer: their text is random ids, others for each text."""

    def windows(job, texts):
        rng = np.random.default_rng(int(text_hash(texts)[:8], 16))
        return [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 100)) for n in range(36)]

    monkeypatch.setattr(Job, "windows", windows)
    monkeypatch.setattr("bitladder.stages.quantize._prompts", lambda source, documents: {})
    monkeypatch.setattr("bitladder.stages.calibrate._companions", lambda *_: Companions({"model_type": "tiny"}, {}))
    monkeypatch.setattr("bitladder.walk.checkpoint_result.tokenizer_differences", lambda *_, **__: [])


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "phi3"])
def test_what_engines_multiply_as_one_has_one_scheme(name, tmp_path):
    path = written(name, tmp_path)
    with GgufFile.open(path) as source:
        model = layered(source, FileWeights(source))
        linears = linears_of(model)
        grouped = [name for names in linears.groups for name in names]
        assert len(grouped) == len(set(grouped))
        of = {name: at for at, names in enumerate(linears.groups) for name in names}
        for layer in range(source.model.dims.n_layer):
            for roles in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"),
                          ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")):  # fmt: skip
                assert len({of[own] for role in roles if (own := f"blk.{layer}.{role}.weight") in of}) <= 1
        assert not any("ffn_gate_inp" in name for name in grouped)  # routers stay float
        for seed, more in enumerate((0.1, 0.6, 1.4, 4.0)):
            table = table_of(source, linears, seed)
            bits = least_bits(table, linears.groups, source.model) + more
            recipe = choose_schemes(table, linears.groups, source.model, Limits(bpw=bits))
            assert bits - 0.3 < recipe.bpw <= bits
            for names in linears.groups:
                assert len({recipe.qtypes[name] for name in names}) == 1
        assert len(set(recipe.qtypes.values()) - {FLOAT, "F32"}) > 1


def test_a_budget_in_bytes_counts_every_tensor(tmp_path):
    with GgufFile.open(written("llama", tmp_path)) as source:
        linears = linears_of(layered(source, FileWeights(source)))
        table = table_of(source, linears)
        whole = 2 * sum(tensor.elements for tensor in source.model.tensors)
        asked = int(0.55 * whole) + source.model.header_bytes
        recipe = choose_schemes(table, linears.groups, source.model, Limits(bytes=asked))
        assert 0.9 * asked < recipe.bytes + source.model.header_bytes <= asked
        again = choose_schemes(table, linears.groups, source.model, Limits(kl=1.001 * recipe.expected_kl))
        assert again.bytes <= recipe.bytes
        least = least_bits(table, linears.groups, source.model)
        assert 2.25 < least < 2.5
        with pytest.raises(NothingFits, match=r"smallest schemes.*\n(.|\n)*Give at least"):
            choose_schemes(table, linears.groups, source.model, Limits(bytes=whole // 5))
        with pytest.raises(NothingFits, match=f"Give at least {least:.2f} bits"):
            choose_schemes(table, linears.groups, source.model, Limits(bpw=2.2))
        with pytest.raises(UsageError, match="source loses nothing"):
            choose_schemes(table, linears.groups, source.model, Limits(bpw=16.5))
        with pytest.raises(UsageError, match="limit"):
            choose_schemes(table, linears.groups, source.model, Limits())
        with pytest.raises(UsageError, match="above 0"):
            choose_schemes(table, linears.groups, source.model, Limits(kl=0.0))


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_mix_is_as_fast_as_was_asked(name, tmp_path):
    """By what whole checkpoints of each scheme reach; schemes whose speed nobody said are not chosen."""
    with GgufFile.open(written(name, tmp_path)) as source:
        model, linears = source.model, linears_of(layered(source, FileWeights(source)))
        table, dims = table_of(source, linears), source.model.dims
        speeds = {"W2A16-g32": 100.0, "NVFP4A16": 80.0, "W8A16-channel": 40.0, FLOAT: 20.0}
        infos = {tensor.name: tensor for tensor in model.tensors}

        def weights(tensor):  # that a token meets
            active = dims.n_expert_used / dims.n_expert if len(infos[tensor].shape) > 2 else 1
            return infos[tensor].elements * active

        def tps(recipe):
            met = {tensor: weights(tensor) for group in linears.groups for tensor in group}
            return sum(met.values()) / sum(own / speeds[recipe.qtypes[tensor]] for tensor, own in met.items())

        def made(asked, **wish):
            return choose_schemes(table, linears.groups, model, Limits(least_decode=asked, speeds=speeds, **wish))

        slow, middle, fast = (made(asked, bpw=10) for asked in (21, 50, 75))
        for asked, recipe in zip((21, 50, 75), (slow, middle, fast), strict=True):
            assert set(recipe.qtypes.values()) <= {*speeds, "F32"}
            assert asked <= tps(recipe)
            assert f"at least {asked} tokens/s" in recipe.limits
        assert slow.expected_kl < middle.expected_kl < fast.expected_kl
        assert tps(made(75, kl=1.001 * fast.expected_kl)) >= 75
        with pytest.raises(NothingFits, match=r"120 tokens/s are asked for.*give (100|[89]\d)"):
            made(120, bpw=10)
        speeds = {"W6A16-g128": 80.0}  # which rows of 64 cannot have
        with pytest.raises(UsageError, match="No scheme that"):
            made(10, bpw=10)


@pytest.mark.usefixtures("words")
def test_the_verb_from_a_budget_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    path = written("llama", tmp_path)
    out = ["--out", str(tmp_path / "out"), "--json"]
    made = CliRunner().invoke(app, ["recipe", str(path), "--to", "vllm", "--bpw", "4.6", *out])
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    recipe, folder = record["recipe"], tmp_path / "out" / f"tiny-{record['recipe']['label']}"
    assert record["fitted"]["file"]["path"] == str(folder)
    assert 4.3 < recipe["bpw"] <= 4.6
    assert 0.2 < record["held_out"]["kl_mean"] / recipe["expected_kl"] < 4
    tensors = load_file(folder / "model.safetensors")
    assert sum(one.numel() * one.element_size() for one in tensors.values()) == recipe["bytes"]  # planned to the byte

    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (said["format"], said["quant_method"]) == ("mixed-precision", "compressed-tensors")
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    assert len(targets) == len(set(targets))
    form = format_of_folder(folder)
    assert isinstance(form, Mixed)
    reader = CheckpointReader(folder, form)
    assert sorted(targets) == reader.linears()
    disk = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    for tensor, scheme in recipe["qtypes"].items():
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
        if found and found[2] in disk:
            own = reader.format_of(f"model.layers.{found[1]}.{disk[found[2]]}")
            assert (own.scheme if own else FLOAT) == scheme
    inspected = inspect_folder(folder)
    assert inspected.truthful, inspected.faults
    assert sum(inspected.schemes.values()) == len(targets)
    assert len(inspected.schemes) > 1
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert all(f"{count} x {scheme}" in shown.stdout for scheme, count in inspected.schemes.items())

    with GgufFile.open(path) as source:  # what is read back is near the source, as near as its bits let it be
        weights, exact = CheckpointWeights(FileWeights(source), folder, form), FileWeights(source)
        for name in ("blk.0.attn_q.weight", "blk.2.ffn_down.weight", "blk.1.attn_output.weight"):
            assert np.square(weights(name) - exact(name)).sum() < 0.2 * np.square(exact(name)).sum()

    again = CliRunner().invoke(app, ["recipe", str(path), "--to", "vllm", "--bpw", "4.6", *out])
    assert json.loads(again.stdout)["fitted"]["file"]["reused"]


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(("scheme", "bits"), [("W4A16-g32", 4.6), ("NVFP4A16", 4.56)])
def test_a_mix_says_what_came_of_tuning(scheme, bits, tmp_path, monkeypatch):
    """Also where the one scheme that fits the budget has nothing to tune."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TuneSettings, "for_windows", lambda _: TuneSettings(steps=2, rate=0.01, look=1))
    (text := tmp_path / "text.txt").write_text("other words")
    made = CliRunner().invoke(
        app,
        ["recipe", str(written("llama", tmp_path)), "--to", "vllm", "--bpw", str(bits), "--schemes",
         f"{scheme},W8A16-channel", "--tune", str(text), "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    tuned = record["fitted"]["tuning"]
    told = [line for line in record["warnings"] if "is not tuned" in line]
    if scheme == "NVFP4A16":
        assert tuned is None
        assert told == [
            f"{record['recipe']['label']} is not tuned: none of the schemes chosen for it has scales that are."
        ]
    else:
        assert tuned["held_out"] > 0
        assert not told


@pytest.mark.usefixtures("words")
def test_what_is_wrong_with_other_levels_is_said_before_a_mix_is_weighed(tmp_path, monkeypatch):
    monkeypatch.setattr(schemes, "weighed_tensors", lambda *_: pytest.fail("weighed"))
    call = ["quantize", str(written("llama", tmp_path)), "--to", "CT-bpw6.0,W4A16-g128", "--out", str(tmp_path / "out")]
    made = CliRunner().invoke(app, call)
    assert made.exit_code == 2
    assert "groups of 128" in " ".join(made.output.split())


@pytest.mark.usefixtures("words")
def test_a_level_by_its_bits_has_the_same_schemes_and_mixtures_have_patterns(tmp_path, monkeypatch):
    """As `quantize` and `run` take it."""
    monkeypatch.setenv("BITLADDER_CACHE", str(tmp_path / "cache"))
    path = written("qwen3moe", tmp_path)
    call = ["quantize", str(path), "--to", "CT-bpw4.6,Q8_0", "--out", str(tmp_path / "out"), "--json"]
    made = CliRunner().invoke(app, call)
    assert made.exit_code == 0, made.output
    folder = tmp_path / "out" / "tiny-CT-bpw4.60"
    inspected = inspect_folder(folder)
    assert inspected.truthful, inspected.faults
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    experts = [target for target in targets if "experts" in target]
    with GgufFile.open(path) as source:
        dims = source.model.dims
        assert len(experts) == 3 * dims.n_layer  # down, gate and up of each layer, whatever the number of experts
        assert inspected.linears == dims.n_layer * (4 + 3 * dims.n_expert)
        planned = level_size(source.model, parse_level("CT-bpw4.60"))
    assert all(target.startswith("re:^model") and r"\d+" in target for target in experts)
    held = sum(one.numel() * one.element_size() for one in load_file(folder / "model.safetensors").values())
    assert held <= planned.tensor_bytes < 1.05 * held
    measured = CliRunner().invoke(app, ["measure", str(path), "--file", str(folder), "--json"])
    assert measured.exit_code == 0, measured.output
    (found,) = json.loads(measured.stdout)["levels"]
    assert found["level"] == folder.name
    assert 0 < found["kl_mean"] < 2


def test_what_another_folder_stands_in_for_is_removed(tmp_path):
    """Of those made for --kl; never what an earlier call had made."""

    def result(name, *, reused=False):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        file = LevelFile(name, path, 1, 4.0, 1.0, reused)
        recipe = Recipe(name, "llama", {}, 1, 4.0, None)
        return RecipeResult(recipe, 0.0, FittedLevel(file, recipe, (), 1))

    first, second, there = result("a"), result("b"), result("c", reused=True)
    recipes._remove(first, second)
    recipes._remove(there, second)
    recipes._remove(second, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_names_and_refusals(tmp_path, monkeypatch):
    (text := tmp_path / "text.txt").write_text("words")
    tuned = ["--out", str(tmp_path / "out"), "--tune", str(text)]
    for where in (mixed, schemes):
        monkeypatch.setattr(where, "weighed_tensors", lambda *_: pytest.fail("weighed for a wish that cannot be met"))
    level = parse_level("ct-BPW4.6")
    assert isinstance(level, CheckpointLevel)
    assert (str(level), level.bpw, level.engines) == ("CT-bpw4.60", 4.6, ("vllm", "transformers"))
    for wrong in ("CT-bpw1.5", "CT-bpw17", "CT-4bit", "CT"):
        with pytest.raises(UnknownLevel):
            parse_level(wrong)
    path = str(written("llama", tmp_path))
    run = CliRunner().invoke
    for options, said in (
        (["--to", "tensorrt", "--bpw", "4.6"], "tensorrt"),
        (["--to", "vllm"], "limit"),
        (["--to", "vllm", "--bpw", "4.6", "--level", "Q4_K_M"], "together"),
        (["--to", "vllm", "--bpw", "4.6", "--tps", "9"], "how fast your server runs any scheme"),
        (["--to", "vllm", "--bpw", "4.6", "--tps", "9", "--schemes", "NVFP4A16=9,W4A16-g32"], "runs W4A16-g32"),
        (["--to", "vllm", "--bpw", "4.6", "--tps", "9", "--schemes", "NVFP4A16=x"], "'x' is no speed of NVFP4A16"),
        (["--to", "vllm", "--bpw", "4.6", "--tps", "9", "--schemes", "NVFP4A16=-1"], "is no speed"),
        (["--to", "vllm", "--bpw", "4.6", "--schemes", "NVFP4A16=9"], "read with --tps"),
        (["--to", "vllm", "--bpw", "4.6", "--vram", "1GiB", "--ngl", "1"], "--vram was given with --to vllm"),
        (["--to", "vllm", "--bpw", "4.6", "--schemes", "Q4_K"], "no scheme that recipes choose from"),
        (["--bpw", "4.6", "--schemes", "W4A16-g64"], "--schemes"),
        (
            ["--to", "vllm", "--bpw", "6", "--schemes", "NVFP4A16,FP8-DYNAMIC", *tuned],
            "does nothing for NVFP4A16, FP8-DYNAMIC",
        ),
        (["--to", "vllm", "--bpw", "1.2"], "smallest schemes"),
        (["--to", "vllm", "--bpw", "17"], "more than the"),
        (["--to", "vllm", "--budget", "10kB"], "No mix of schemes is that small"),
        (["--to", "vllm", "--kl", "0.05", "--tps", "9", "--schemes", "NVFP4A16=3"], "the fastest of these schemes"),
        (["--to", "vllm", "--bpw", "4.6", "--tps", "9", "--schemes", "NVFP4A16=3"], "the fastest of these schemes"),
    ):
        found = run(app, ["recipe", path, *options])
        assert found.exit_code != 0
        assert said in found.output, found.output


def test_schemes_that_shapes_cannot_hold_are_not_offered(tmp_path):
    with GgufFile.open(written("llama", tmp_path, intermediate_size=80)) as source:
        storage = SchemeStorage(source)
        infos = {tensor.name: tensor for tensor in source.model.tensors}
        assert set(storage.choices.of(infos["blk.0.ffn_down.weight"])) == {"NVFP4A16", "W8A16-channel", "FP8-DYNAMIC"}
        with pytest.raises(UsageError, match=r"can store blk\.0\.ffn_down\.weight, which is 64 x 80(.|\n)*NVFP4A16"):
            SchemeStorage(source, ["W4A16-g32"])


def test_predicted_losses_rank_schemes_as_what_is_written_does(tmp_path, monkeypatch):
    """Float schemes gain most by their own search for scales and by feedback: a quick rounding would put both of them
    behind whole numbers of as many bits."""
    monkeypatch.setattr("bitladder.stages.calibrate._companions", lambda *_: Companions({"model_type": "tiny"}, {}))
    monkeypatch.setattr("bitladder.walk.checkpoint_result.tokenizer_differences", lambda *_, **__: [])
    schemes = ("NVFP4A16", "W4A16-g32", "MXFP4A16", "W4A16-g64")
    rng = np.random.default_rng(3)
    windows = [Window(f"t{n}", rng.integers(0, tiny_models.N_VOCAB, 128)) for n in range(80)]
    fitting, held = windows[:64], windows[64:]
    path = written("llama", tmp_path, intermediate_size=128)
    with GgufFile.open(path) as source:
        storage = SchemeStorage(source, schemes)
        table = weigh(source, fitting, choices=storage.choices).table
        predicted = {name: sum(one.fed for own in table.losses.values() for one in own if one.qtype == name)
                     for name in schemes}  # fmt: skip
        levels = [parse_level(name) for name in schemes]
        made = Calibration(source, levels, Reading(fitting), out_dir=tmp_path / "out", name="tiny").run()
        folders = {report.level: Path(report.path) for report in made.checkpoints}
        candidates = [folder_candidate(source, folders[n], format_of_folder(folders[n]), level=n) for n in schemes]
        measured = {one.level: one.kl_mean for one in walk(source, candidates, held)}
    assert sorted(schemes, key=predicted.__getitem__) == sorted(schemes, key=measured.__getitem__)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "W3A16-g32", "W4A16-g64", "W8A16-channel"])
def test_what_feedback_leaves_on_other_text_is_predicted(scheme):
    """From rows that are written, and the text that they were fitted to."""
    rng, columns = np.random.default_rng(4), 256
    mixing = rng.standard_normal((columns, columns)) * rng.lognormal(0, 1, columns) / 8
    mixing[:, :40] = 0  # channels that are never active
    half, rest, more, other = (rng.standard_normal((tokens, columns)) @ mixing for tokens in (1000, 1000, 6000, 30000))
    weights = rng.standard_normal((96, columns)).astype(np.float32)
    seen = SeenInput("w", statistics_of(np.concatenate([half, rest]), rest), 0.5)
    choices = SchemeChoices([], Linears((), {}), SCHEMES)
    predicted = choices.fed(weights, scheme, np.zeros(0), seen).sum()
    prepared = GPTQ.prepare(statistics_of(np.concatenate([half, rest, more])).gram)
    wrong = GPTQ.apply(form_of(scheme), prepared, weights).decoded - weights
    measured = np.square(wrong @ other.T).sum() / len(other)
    assert 0.95 < predicted / measured < 1.05
    few = SeenInput("w", statistics_of(half[:20]))  # such an expert's codes are nearest ones
    assert few.prepared.factor is None
    assert np.isfinite(choices.fed(weights, scheme, np.zeros(0), few)).all()


def statistics_of(x, held_out=None):
    squares, nothing = np.square(x).sum(axis=0), np.zeros((0, 0), np.float32)
    gram, apart = ((one.T @ one).astype(np.float32) if one is not None else nothing for one in (x, held_out))
    return InputStatistics(gram, nothing[:0].reshape(-1), squares, len(x), apart, nothing)


def config_with(targets, scheme="W4A16-g64", **others):
    (group,) = form_of(scheme).configuration(ignored=())["config_groups"].values()
    other = {**next(iter(form_of("NVFP4A16").configuration(ignored=())["config_groups"].values())), "targets": ["x"]}
    groups = {"a": {**group, "targets": targets}, "b": other}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, **others}


@pytest.mark.parametrize(
    "targets", [["re:(a+)+$"], ["re:(a|aa)*b"], ["re:.*.*.*.*x"], ["re:["], [7], "Linear", ["re:" + "a" * 600], None]
)
def test_targets_that_could_take_for_ever_are_not_read(targets):
    assert recognised(config_with(targets)) is None


def test_targets_of_others_are_read():
    form = recognised(config_with(["re:.*mlp.(gate|up)_proj$", r"re:^model\.layers\.\d+\.self_attn\.o_proj$"]))
    for name, scheme in (
        ("model.layers.3.mlp.gate_proj", "W4A16-g64"), ("model.layers.31.self_attn.o_proj", "W4A16-g64"),
        ("x", "NVFP4A16"), ("model.layers.3.mlp.down_proj", None),
    ):  # fmt: skip
        found = form.of(name)
        assert (found.scheme if found else None) == scheme
    assert recognised(config_with(["Linear"])).of("anything").scheme == "W4A16-g64"
    assert recognised(config_with(["Linear"], config_groups={"a": {"weights": None}, "b": 3})) is None
