"""The prior, the rule of recommendations, and the cases that people bring: in words, and as decisions."""

import io
import math
import re
from functools import cache

import pytest
from rich.console import Console

from bitladder.errors import UsageError
from bitladder.files.catalogue import model_named
from bitladder.files.devices import parse_machine
from bitladder.files.quality_prior import prior_date, published_costs
from bitladder.formats.recipes import LEVELS
from bitladder.plan.placement import RAM_MARGIN, Usage, usable_ram
from bitladder.plan.quality import effective_weights, level_cost, size_loss
from bitladder.plan.recommend import NEGLIGIBLE, USES, best_of, rate_all, usual_reserve, with_room
from bitladder.plan.search import MachineRates
from bitladder.records.plan import Place
from bitladder.report.recommend import COLUMNS, print_recommendation
from bitladder.stages.plan import PlanRequest
from bitladder.stages.recommend import RecommendRequest, recommend
from bitladder.stages.search import candidate_of
from bitladder.units import GiB


@cache
def asked(words, **options):
    """The recommendation for a machine in words."""
    run = PlanRequest(machine=words, n_ctx=options.pop("n_ctx", None))
    return recommend(RecommendRequest(run=run, **options)).found


def shown(words, width=80, **options):
    """What a terminal shows of it."""
    out = Console(file=io.StringIO(), width=width, highlight=False)
    made = recommend(RecommendRequest(run=PlanRequest(machine=words), **options))
    print_recommendation(made.found, assumed=made.assumed, console=out)
    return out.file.getvalue()


def expected_loss(name, level):
    """Size and level of a model of the catalogue on the prior's scale, at one age."""
    candidate = candidate_of(model_named(name))
    return (
        size_loss(effective_weights(candidate, candidate.released))
        + level_cost(level, candidate.params, published_costs()).value
    )


class TestPrior:
    def test_it_is_dated_and_every_row_has_its_source(self):
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", prior_date())
        assert len(published_costs()) >= 3
        assert all(len(row.source.split()) > 4 for row in published_costs())

    @pytest.mark.parametrize("params", [0.5, 8, 70])
    def test_costs_grow_down_the_ladder(self, params):
        costs = [level_cost(level, params, published_costs()).value for level in LEVELS]
        assert costs[0] == 0
        assert costs == sorted(costs)
        assert costs[-1] > 10 * costs[LEVELS.index("Q4_K_M")]

    @pytest.mark.parametrize("level", LEVELS[1:])
    def test_larger_models_lose_less_and_the_range_holds_the_mean(self, level):
        small, large = (level_cost(level, params, published_costs()) for params in (3, 30))
        assert large.value < small.value
        assert all(cost.low <= cost.value * (1 + 1e-9) <= cost.high * (1 + 2e-9) for cost in (small, large))

    def test_a_level_that_nobody_published_has_no_prior(self):
        assert level_cost("Q4_1", 8, published_costs()) is None

    def test_a_published_model_is_its_own_witness(self):
        for row in published_costs():
            for level, cost in row.costs.items():
                assert level_cost(level, row.params, [row]).value == pytest.approx(cost, abs=1e-9), (row.model, level)
        assert published_costs()[0].costs["Q4_K_M"] == pytest.approx(math.log(6.4086 / 6.2332))

    @pytest.mark.parametrize(
        ("better", "worse"),
        [
            (("Qwen2.5-14B-Instruct", "Q4_K_M"), ("gemma-2-27b-it", "Q2_K")),
            (("Qwen2.5-14B-Instruct", "Q4_K_M"), ("Qwen2.5-32B-Instruct", "Q2_K")),
            (("Qwen2.5-32B-Instruct", "Q4_K_M"), ("Qwen2.5-14B-Instruct", "F16")),
            (("Qwen2.5-32B-Instruct", "Q4_K_M"), ("Qwen2.5-72B-Instruct", "Q2_K")),
            (("Qwen2.5-7B-Instruct", "Q4_K_M"), ("Qwen2.5-3B-Instruct", "F16")),
            (("Qwen2.5-3B-Instruct", "Q8_0"), ("Qwen2.5-7B-Instruct", "Q2_K")),
        ],
    )
    def test_four_bits_of_a_larger_model_win_and_two_bits_lose(self, better, worse):
        assert expected_loss(*better) < expected_loss(*worse)

    def test_mixtures_count_between_what_they_hold_and_what_a_token_uses(self):
        mixture = candidate_of(model_named("Qwen3-30B-A3B"))
        assert 3e9 < effective_weights(mixture, mixture.released) < 30e9

    def test_age_counts(self):
        old, new = (candidate_of(model_named(name)) for name in ("Llama-2-13b-chat-hf", "Qwen3-14B"))
        assert effective_weights(old, "2026-04") < 0.5 * effective_weights(new, "2026-04")


class TestRoom:
    @pytest.mark.parametrize(("ram", "kept"), [(4, 2), (8, 2), (16, 4), (24, 6), (32, 8), (64, 8), (512, 8)])
    def test_a_quarter_is_kept_between_two_and_eight(self, ram, kept):
        assert usual_reserve(ram * GiB) == kept * GiB

    def test_what_is_kept_decides_not_what_is_free_now(self):
        machine = parse_machine("16 GiB").machine
        assert usable_ram(with_room(machine, 4 * GiB, 16 * GiB)) == 12 * GiB
        assert usable_ram(with_room(machine, 15 * GiB, 16 * GiB)) == GiB
        assert with_room(machine, 17 * GiB, 16 * GiB).ram_available == RAM_MARGIN

    def test_memory_that_a_gpu_shares_is_not_all_the_models(self):
        """36 GiB: the system takes 8, and lets the GPU have two thirds of all at most."""
        found = asked("MacBook Pro M3 Pro 36GB")
        assert found.usable_bytes == int(36 * GiB * 0.66)
        assert asked("36 GB laptop").usable_bytes == 28 * GiB

    def test_the_user_says_how_much(self):
        assert asked("16 GB laptop", reserve=10 * GiB).usable_bytes == 6 * GiB
        answer = asked("16 GB laptop", reserve=10 * GiB).answer
        assert answer.option.placement.total_bytes <= 6 * GiB


MACHINES = ["8 GB laptop", "16 GB laptop", "MacBook Pro M4 32GB", "two 3090s", "64 GB + 24 GB of VRAM"]


class TestAnswers:
    @pytest.mark.parametrize("words", MACHINES)
    @pytest.mark.parametrize("use", USES)
    def test_every_machine_and_use_has_one_answer_that_holds(self, words, use):
        found = asked(words, use=use)
        answer = found.answer
        assert answer.option.placement.kind != Place.NONE
        assert answer.option.placement.total_bytes <= found.usable_bytes
        assert answer.decode >= USES[use].least_decode
        assert not answer.option.level.startswith(("Q2", "Q3"))
        assert not answer.option.name.endswith("Base")
        assert [row.expected_loss for row in found.table] == sorted(row.expected_loss for row in found.table)
        assert found.table[0].option.name == answer.option.name
        assert len({row.option.name for row in found.table}) == len(found.table)

    @pytest.mark.parametrize("least", [1, 10, 25])
    def test_least_speed_filters_by_the_figure_that_is_shown(self, least):
        found = asked("16 GB laptop", least_decode=least)
        assert all(row.decode >= least for row in found.table)
        assert any(row.decode < 5 * least for row in found.table)

    def test_no_least_speed_means_none(self):
        slow, usual = asked("16 GB laptop", least_decode=0.0), asked("16 GB laptop")
        assert min(row.decode for row in slow.table) < 5 <= min(row.decode for row in usual.table)

    def test_use_decides_what_counts(self):
        code, chat = (
            {row.short_name for row in asked("64 GB + 24 GB of VRAM", use=use).table} for use in ("code", "chat")
        )
        assert "Qwen2.5-Coder-32B-Instruct" in code - chat
        long = asked("64 GB + 24 GB of VRAM", use="long-context")
        assert all(model_named(row.option.name).model.dims.n_ctx_train >= 32768 for row in long.table)
        assert long.n_ctx == 32768
        assert asked("64 GB + 24 GB of VRAM", use="chat", n_ctx=20000).n_ctx == 20000
        with pytest.raises(UsageError, match="no use 'poetry'"):
            asked("16 GB laptop", use="poetry")

    def test_the_level_is_the_smallest_that_is_as_good(self):
        found = parse_machine("64 GiB")
        rates, wish = MachineRates(found.cpu, found.gpu), Usage()
        rows = rate_all(
            [candidate_of(model_named("Qwen3-8B"))], found.machine, rates, wish, USES["chat"], published_costs()
        )
        answer, best = best_of(rows, 0.0), min(rows, key=lambda row: row.expected_loss)
        assert (best.option.level, answer.option.level) == ("F16", "Q6_K")
        assert answer.expected_loss <= best.expected_loss + NEGLIGIBLE

    def test_nothing_fits(self):
        found = asked("2.1 GiB", n_ctx=4096, least_decode=1e6)
        assert (found.answer, found.table, found.alternatives) == (None, (), ())
        assert "no model of the catalogue fits" in shown("2.1 GiB", least_decode=1e6)

    def test_those_who_can_wait_get_more(self):
        waiting = [one for one in asked("64 GB + 24 GB of VRAM").alternatives if "wait" in one.purpose]
        assert waiting[0].pick.decode < 5
        assert waiting[0].pick.effective > asked("64 GB + 24 GB of VRAM").answer.effective


def verdicts(words):
    return {one.size: one.verdict for one in asked(words).sizes}


class TestTheArticlesCases:
    def test_sixteen_gigabytes(self):
        found = verdicts("16 GB laptop")
        assert found["7B"].startswith("comfortably; 4.7")
        assert found["13B"].startswith("fits; 10.7")
        assert found["32B"].startswith("does not fit")
        assert found["70B"].startswith("does not fit: it would need")

    def test_a_workstation_with_a_gpu(self):
        found = asked("a workstation with 64 GB of RAM and a GPU with 24 GB VRAM")
        seventy = next(one for one in found.sizes if one.size == "70B")
        assert seventy.placement == Place.SPLIT
        assert re.match(r"partly offloaded: \d+ of 80 layers on the GPU, the rest in RAM; 41", seventy.verdict)

    @pytest.mark.parametrize(
        ("words", "size", "verdict"),
        [
            ("8 GB laptop", "7B", "fits"),
            ("8 GB laptop", "13B", "does not fit"),
            ("MacBook Pro M4 32GB", "13B", "comfortably"),
            ("MacBook Pro M4 32GB", "32B", "fits"),
            ("two 3090s", "70B", "wholly on the GPU"),
            ("two 3090s", "123B", "partly offloaded"),
        ],
    )
    def test_other_machines(self, words, size, verdict):
        assert verdicts(words)[size].startswith(verdict)


class TestTheTerminal:
    @pytest.mark.parametrize("words", MACHINES[1:3])
    def test_at_eighty_columns_level_size_fit_and_speed_are_whole(self, words):
        text = shown(words)
        assert max(map(len, text.splitlines())) <= 80
        lines = text[text.index("The best level") :].splitlines()[1:]
        for row in asked(words).table[:12]:
            line = next(
                line for line in lines if line.strip().startswith(row.short_name[:10]) and row.option.level in line
            )
            assert f"{row.weight_bytes / 1e9:.1f}" in line
            assert ("RAM" in line) != (row.option.placement.kind in (Place.GPU, Place.SPLIT)) or "GPU + RAM" in line
            assert re.search(rf"\s{re.escape(COLUMNS[4].read(row))}(\s|$)", line)

    def test_a_wide_terminal_shows_all(self):
        text = shown("16 GB laptop", width=160)
        assert all(column.title in text for column in COLUMNS)
        assert "Left out" not in text
        assert "Left out for width" in shown("16 GB laptop")

    def test_the_answer_comes_first_then_reasons_then_the_table(self):
        text = shown("16 GB laptop", width=400)
        assert re.match(r"On 16 GB laptop, for chat: \S+ at Q\S+, \d+\.\d GB, about \S+ tokens/s", text)
        assert text.index("Why") < text.index("Instead") < text.index("By size") < text.index("The best level of each")
        assert "4.00 GiB of 16.0 GiB (--reserve changes it)" in text
        assert "Assumed of this machine: memory is DDR5-4800 dual" in text
        assert re.search(r"for speed: .*\n.*for long context \(32,768 tokens\): ", text)
        assert re.search(r"larger and fits, too, at Q[23]\S*: that is expected to cost \d", text)
