"""Random search: the released trace, windows, resuming, parallel scoring."""

import json
import random
from dataclasses import replace

import pytest
import torch
from golden_tools import filled_state_dict, load_golden

from harness.errors import ReplivitError
from reproductions.autoformer.space import Config, get_space
from reproductions.autoformer.supernet import Supernet
from reproductions.tf_tas.pit import PIT_SPACES
from reproductions.tf_tas.scoring import DssScorer, PitScorer, random_supernet
from reproductions.tf_tas.search import Draws, random_search

MICRO = get_space("micro")


class Counted:
    """A scorer that says who asked, and how often."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.net, self.asked, self.stop_after = random_supernet(MICRO, 10, 32), [], stop_after

    def params(self, config: Config) -> int:
        return self.net.params_of(config)

    def __call__(self, config: Config) -> float:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(config)
        return float(sum(config.num_heads))

    def identity(self) -> dict:
        return {"indicator": "heads"}


# ---- the released search -------------------------------------------------------------------------


def test_released_trace():
    golden = load_golden("tf_tas/autoformer_space_t")
    case = next(case for case in golden["cases"] if case["kind"] == "tas_search")
    given, wanted = case["extra"], case["expect"]
    supernet = Supernet(get_space("t"), 1000, 224)
    supernet.load_state_dict(filled_state_dict(golden["state_dict"]))
    rng = random.Random(given["seed"])
    result = random_search(
        get_space("t"), DssScorer(supernet), given["population_num"],
        (given["min_param_limits"], given["param_limits"]), rng, faithful_to_release=True,
    )  # fmt: skip
    for found, expected in zip(result.candidates, wanted["candidates"], strict=True):
        assert found.id == expected["id"]
        assert found.config == Config.of({k: v for k, v in expected.items() if k != "id"})
    assert [one.params for one in result.candidates] == wanted["params"]
    assert [one.score for one in result.candidates] == pytest.approx(wanted["dss"], rel=1e-4)
    assert result.candidates.index(result.best) == wanted["best_index"]
    assert rng.random() == pytest.approx(wanted["next_random"], abs=1e-11)
    assert result.crash is None and result.rejected == 0


def test_released_ids_count_within_batches_of_twenty():
    scorer = Counted()
    result = random_search(MICRO, scorer, 45, (0, 1), 0, faithful_to_release=True)
    assert [one.id for one in result.candidates] == [i % 20 for i in range(45)]
    rng = random.Random(0)
    assert [one.config for one in result.candidates] == [MICRO.sample(rng) for _ in range(45)]


def test_released_batches_are_drawn_as_a_whole():
    for faithful, used in ((True, 20), (False, 3)):
        rng, twin = random.Random(5), random.Random(5)
        Draws(MICRO, Counted().params, (0, 1), rng, faithful).take(3)
        for _ in range(used):
            MICRO.sample(twin)
        assert rng.random() == twin.random()


class Scripted:
    """A space that hands out given depths; deeper ones are larger."""

    name = "scripted"

    def __init__(self, depths: list[int]) -> None:
        self.configs = [Config(depth, 8 + place, (2,) * depth, (1,) * depth)
                        for place, depth in enumerate(depths)]  # fmt: skip
        self.coming = iter(self.configs)

    def sample(self, rng: random.Random) -> Config:
        return next(self.coming)


@pytest.mark.parametrize(
    ("depths", "crash"),
    [
        ([1, 1, 2, 1], None),  # nothing rejected
        ([1, 9, 2, 1], 1),  # 9 is too large, then 2 is shallower
        ([9, 1, 1, 1], 0),
    ],
)
def test_where_the_released_search_would_have_stopped(depths, crash):
    draws = Draws(Scripted(depths), lambda config: config.depth * 10**6, (0, 5), random.Random(0))
    draws.take(len([depth for depth in depths if depth <= 5]))
    assert draws.crash == crash


def test_equally_deep_rejections_do_no_harm():
    space = Scripted([3, 3, 3])
    params = {one: (9 if place == 0 else 1) * 10**6 for place, one in enumerate(space.configs)}
    draws = Draws(space, params.get, (0, 5), random.Random(0))
    assert len(draws.take(2)) == 2 and draws.rejected == 1 and draws.crash is None


# ---- windows and repeats -------------------------------------------------------------------------


def test_only_the_window_counts_and_subnets_are_distinct():
    scorer = Counted()
    result = random_search(MICRO, scorer, 40, (0.2, 0.22), 0)
    assert len({one.config for one in result.candidates}) == 40 == len(scorer.asked)
    assert all(0.2e6 <= one.params <= 0.22e6 for one in result.candidates)
    assert result.drawn == 40 + result.rejected + result.repeated and result.rejected > 0
    assert result.best.score == max(one.score for one in result.candidates)


def test_the_first_of_equals_wins():
    class Depth(Counted):
        def __call__(self, config: Config) -> float:
            return float(config.depth)

    result = random_search(MICRO, Depth(), 30, (0, 1), 0)
    top = [one for one in result.candidates if one.score == result.best.score]
    assert len(top) > 1 and result.best is top[0]


def test_twins_are_scored_once_and_counted_twice_when_faithful():
    tiny = Scripted([1, 1, 1, 1])
    tiny.configs[1] = tiny.configs[0]
    tiny.coming = iter(tiny.configs * 10)
    tiny.smallest = tiny.largest = lambda: tiny.configs[0]
    scorer = Counted()
    scorer.params = lambda config: 10**6
    result = random_search(tiny, scorer, 3, (0, 5), 0, faithful_to_release=True)
    assert result.candidates[0].config == result.candidates[1].config
    assert result.candidates[0].score == result.candidates[1].score
    assert len(scorer.asked) == 2 and result.repeated == 1
    assert result.candidates[1].seconds == 0


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((3.0, 23.0), r"no subnet of AutoFormer-micro has 3 to 23 M .* holds 0\.\d+ to 0\.\d+ M"),
        ((0.0, 0.01), "no subnet of AutoFormer-micro has 0 to 0.01 M"),
        ((0.2, 0.1), "starts below its end, not 0.2 to 0.1 M"),
        ((0.2000001, 0.2000002), "random subnets of AutoFormer-micro has .* widen the window"),
    ],
)
def test_an_empty_window_is_a_sentence(window, message, monkeypatch):
    monkeypatch.setattr("reproductions.tf_tas.search.PATIENCE", 300)
    with pytest.raises(ValueError, match=message):
        random_search(MICRO, Counted(), 5, window, 0)


def test_a_small_space_ends_the_search(monkeypatch):
    monkeypatch.setattr("reproductions.tf_tas.search.PATIENCE", 1000)
    small = replace(MICRO, embed_dims=(64,), depths=(5,), num_heads=(3, 4), mlp_ratios=(3.0,))
    result = random_search(small, Counted(), 100, (0, 1), 0)
    assert result.exhausted and len(result.candidates) == small.candidates == 32


def test_a_trace_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplivitError, match=r"cannot write .*trace\.jsonl: File exists"):
        random_search(MICRO, Counted(), 2, (0, 1), 0, state=tmp_path / "file" / "trace.jsonl")


def test_numbers_that_make_no_sense():
    for population, workers in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            random_search(MICRO, Counted(), population, (0, 1), 0, workers=workers)


# ---- resuming and processes ----------------------------------------------------------------------


def test_a_killed_search_goes_on(tmp_path):
    state = tmp_path / "trace.jsonl"
    whole = random_search(MICRO, Counted(), 12, (0, 1), 3)
    with pytest.raises(KeyboardInterrupt):
        random_search(MICRO, Counted(stop_after=5), 12, (0, 1), 3, state=state)
    with state.open("a") as file:
        file.write('{"config": "torn')
    second = Counted()
    resumed = random_search(MICRO, second, 12, (0, 1), 3, state=state)
    assert len(second.asked) == 7
    assert [(one.config, one.score) for one in resumed.candidates] == [
        (one.config, one.score) for one in whole.candidates
    ]
    third = Counted()
    longer = random_search(MICRO, third, 15, (0, 1), 3, state=state)
    assert len(third.asked) == 3 and longer.candidates[:12] == resumed.candidates
    assert "torn" in state.read_text()  # the trace is only ever appended to


def test_a_trace_of_another_search_is_refused(tmp_path):
    state = tmp_path / "trace.jsonl"
    random_search(MICRO, Counted(), 3, (0, 1), 3, state=state)
    with pytest.raises(ReplivitError, match=r"belongs to another search \(it differs in seed\)"):
        random_search(MICRO, Counted(), 3, (0, 1), 4, state=state)
    head = json.loads(state.read_text().splitlines()[0])
    assert head["space"] == "AutoFormer-micro" and head["indicator"] == "heads"


def test_other_weights_are_another_search():
    identities = [DssScorer(random_supernet(MICRO, 10, 32, seed)).identity() for seed in (0, 1)]
    assert identities[0]["weights"] != identities[1]["weights"]
    assert DssScorer(random_supernet(MICRO, 10, 32, 0)).identity() == identities[0]


@pytest.mark.slow
def test_processes_change_nothing():
    scorer = DssScorer(random_supernet(MICRO, 10, 32))
    alone = random_search(MICRO, scorer, 6, (0, 1), 0)
    shared = random_search(MICRO, scorer, 6, (0, 1), 0, workers=2)
    assert [one.config for one in shared.candidates] == [one.config for one in alone.candidates]
    assert [one.score for one in shared.candidates] == pytest.approx(
        [one.score for one in alone.candidates], rel=1e-6
    )


def test_the_pit_space_can_be_searched():
    space = PIT_SPACES["t"]
    scorer = PitScorer(space, num_classes=10, image_size=64, mode="with_qkv")
    result = random_search(space, scorer, 3, (1.0, 4.0), 0)
    assert all(1e6 <= one.params <= 4e6 for one in result.candidates)
    again = scorer(result.best.config)
    assert again == result.best.score  # the weights of a network depend on the seed alone
    torch.manual_seed(123)
    assert scorer(result.best.config) == again
    with pytest.raises(ValueError, match="no subnet of PiT-T has 50 to 60 M"):
        random_search(space, scorer, 3, (50, 60), 0)
