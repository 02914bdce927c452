"""AutoFormer's search: the released one draw by draw, kills, budgets."""

from __future__ import annotations

import json
import random
import zlib

import pytest
from golden_tools import golden_cases

from harness.errors import ReplivitError
from reproductions.autoformer.counting import params_of
from reproductions.autoformer.evolution import (
    PAPER,
    RELEASED,
    Evolution,
    Settings,
    random_search,
)
from reproductions.autoformer.space import AUTOFORMER_T, Config


def stub(config: Config) -> float:
    """The fixtures' closed-form fitness."""
    heads = sum((i + 1) * one for i, one in enumerate(config.num_heads))
    ratios = sum((i + 1) * round(2 * one) for i, one in enumerate(config.mlp_ratios))
    number = 7919 * heads + 104729 * ratios + 31 * config.embed_dim + 1009 * config.depth
    return 60 + (number % 10007) / 1000


def stub_all(configs):
    return [stub(one) for one in configs]


def count_t(config: Config) -> int:
    return params_of(AUTOFORMER_T, config)


def checksum(candidates) -> int:
    words = ";".join(",".join(f"{gene:g}" for gene in one) for one in candidates)
    return zlib.crc32(words.encode())


# ---- the released search, draw by draw -----------------------------------------------------------


def released(extra: dict) -> Settings:
    return Settings(
        generations=extra["max_epochs"], population=extra["population_num"],
        parents=extra["select_num"], mutations=extra["mutation_num"],
        crossovers=extra["crossover_num"], layer_probability=extra["m_prob"],
        global_probability=extra["s_prob"], min_params=extra["min_param_limits"],
        max_params=extra["param_limits"], faithful_to_release=True,
    )  # fmt: skip


@pytest.mark.parametrize("case", golden_cases("autoformer/evolution"))
def test_released_search_is_repeated_draw_by_draw(case):
    expected, rng = case["expect"], random.Random(case["extra"]["seed"])
    settings = released(case["extra"])
    result = Evolution(AUTOFORMER_T, count_t, stub_all, settings, rng).run()
    assert [len(one.candidates) for one in result.generations] == expected["generation_sizes"]
    assert [checksum(one.candidates) for one in result.generations] == expected["generation_crc32"]
    assert checksum(result.last) == expected["final_candidates_crc32"]
    assert len(result.last) == expected["final_candidates_size"]
    assert len(result.scores) == expected["evaluated"] == settings.evaluations
    assert result.drawn == expected["seen_in_vis_dict"]
    assert rng.random() == pytest.approx(expected["next_random"], abs=1e-11)
    for ours, theirs in zip(result.best, expected["top"], strict=False):
        assert ours.genes == tuple(theirs["candidate"])
        assert result.scores[ours.genes].fitness == pytest.approx(theirs["val"])
        assert count_t(ours) / 1e6 == pytest.approx(theirs["params_m"])
    for generation, memory in zip(result.generations, expected.get("memory", []), strict=False):
        assert generation.candidates == [tuple(one) for one in memory]


SMALL = Settings(generations=4, population=12, parents=4, mutations=5, crossovers=4,
                 min_params=5.5, max_params=7.0)  # fmt: skip


def search(settings: Settings = SMALL, fitness=stub_all, **options) -> Evolution:
    return Evolution(AUTOFORMER_T, count_t, fitness, settings, **options)


def test_no_candidate_is_scored_twice_and_all_fit_the_window():
    asked = []

    def fitness(configs):
        asked.extend(configs)
        return stub_all(configs)

    result = search(fitness=fitness).run()
    assert len(asked) == len(set(asked)) == SMALL.evaluations == 60
    assert all(5.5 <= count_t(one) / 1e6 <= 7.0 for one in asked)
    assert all(AUTOFORMER_T.contains(one) for one in asked)
    best = max(asked, key=stub)
    assert stub(result.winner) == stub(best)
    trace = result.trace()
    assert [row["evaluation"] for row in trace] == list(range(1, 61))
    assert trace[-1]["best"] == stub(best) and trace[0]["phase"] == "random"
    assert trace[-1]["phase"] == "generation 4"


def test_the_released_search_forgets_its_last_generation():
    """Where the best child comes last, ours finds it and the released search does not."""
    late = []

    def fitness(configs):  # every later call is better
        late.append(len(configs))
        return [float(len(late))] * len(configs)

    ours = search(fitness=fitness).run()
    best = ours.scores[ours.winner.genes].fitness
    assert best == len(late) == 5
    late.clear()
    faithful = Settings(**{**vars(SMALL), "faithful_to_release": True})
    theirs = search(faithful, fitness).run()
    assert theirs.scores[theirs.winner.genes].fitness == 4 and len(late) == 5


def test_mutation_follows_its_probabilities():
    parent = Config(13, 216, (3.5,) * 13, (3,) * 13)
    for settings in (RELEASED, PAPER):
        one = search(Settings(**{**vars(settings), "min_params": 5, "max_params": 11}))
        children = [Config.from_genes(one._mutate([parent.genes])) for _ in range(3000)]
        depth = sum(child.depth != 13 for child in children) / 3000
        layer = sum(child.num_heads[0] != 3 for child in children) / 3000
        assert depth == pytest.approx(settings.global_probability * 2 / 3, abs=0.03)
        assert layer == pytest.approx(settings.layer_probability / 2, abs=0.03)
        assert all(AUTOFORMER_T.contains(child) for child in children)
    assert (PAPER.layer_probability, PAPER.global_probability) == (0.4, 0.2)


def test_crossover_takes_each_gene_from_a_parent():
    one = AUTOFORMER_T.smallest().genes
    two = Config(12, 240, (4,) * 12, (4,) * 12).genes
    deep = AUTOFORMER_T.largest().genes
    search_ = search()
    children = {search_._cross([one, two]) for _ in range(50)}
    assert len(children) > 15  # half of the draws take the same parent twice
    assert all(gene in pair for child in children for gene, *pair in zip(child, one, two))  # noqa: B905
    for _ in range(50):
        assert len(search_._cross([one, deep])) in (len(one), len(deep))


# ---- kills ---------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path):
    state = tmp_path / "scores.jsonl"
    asked = []

    def dying(configs):
        for one in configs:
            if len(asked) == 30:
                raise Killed
            asked.append(one)
            yield stub(one)

    with pytest.raises(Killed):
        search(fitness=dying, state=state).run()
    with open(state, "ab") as stream:
        stream.write(b'{"genes": [12, 3.5')  # the line under way

    def going_on(configs):
        asked.extend(configs)
        return stub_all(configs)

    result = search(fitness=going_on, state=state).run()
    assert len(asked) == len(set(asked)) == 60, "the 30 known scores are not computed again"
    assert [one.genes for one in result.best] == [one.genes for one in search().run().best]
    lines = state.read_text().splitlines()
    assert len(lines) == 61 and all(json.loads(line) for line in lines)


def test_a_file_of_another_search_is_refused(tmp_path):
    state = tmp_path / "scores.jsonl"
    search(state=state).run()
    with pytest.raises(ReplivitError, match="with seed = 0, asked for is 1"):
        search(state=state, seed=1)
    with pytest.raises(ReplivitError, match="with weights = None, asked for is abc"):
        search(state=state, identity={"weights": "abc"})
    state.write_text("not json\n")
    with pytest.raises(ReplivitError, match="no file of scores"):
        search(state=state)


# ---- bad budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"min_params": 8, "max_params": 7}, "window is empty: 8 to 7 M"),
    ({"population": 5}, "5 mutations and 4 crossovers are more than the population of 5"),
    ({"parents": 0}, "must be at least 1"),
    ({"layer_probability": 2}, "between 0 and 1, not 2"),
])  # fmt: skip
def test_impossible_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{**vars(SMALL), **change})


def test_a_window_outside_the_space_names_its_range(monkeypatch):
    monkeypatch.setattr("reproductions.autoformer.evolution.MISSES", 1000)
    far = Settings(**{**vars(SMALL), "min_params": 18, "max_params": 23})
    with pytest.raises(ValueError, match=r"18 to 23 M parameters; it can be 5.366 to 10.517 M"):
        search(far)
    between = Settings(**{**vars(SMALL), "min_params": 5.3660, "max_params": 5.36606})
    with pytest.raises(ValueError, match="1,000 draws found no new candidate"):
        search(between).run()


def test_random_search_scores_as_many():
    result = random_search(AUTOFORMER_T, count_t, stub_all, 20, SMALL, seed=3)
    assert len(result.scores) == 20 and len({one.genes for one in result.best}) == 20
    assert stub(result.winner) == max(one.fitness for one in result.scores.entries)
