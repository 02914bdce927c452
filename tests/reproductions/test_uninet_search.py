"""UniNet's search: the space, the controller, scores that survive a kill, and both experiments."""

import numpy as np
import pytest
import torch

import harness
from harness.meta import on_meta
from harness.record import RecordStore
from reproductions.uninet import downsampling_experiment, search_experiment
from reproductions.uninet.controller import PPO, Controller, Learner
from reproductions.uninet.downsampling_experiment import ARMS, macs_of, networks_of
from reproductions.uninet.model import ARCHITECTURES, UniNet
from reproductions.uninet.proxy import Proxy, ProxyScores
from reproductions.uninet.search import Score, policy_search, random_search, reward
from reproductions.uninet.search_setup import SCALES, choose_setting
from reproductions.uninet.space import SearchSpace, in_words

SPACE = SearchSpace(channels=((16, 32), (32, 48)), strides=(1, 2))


def made_up(networks):
    """Scores without training: transformers last, LG-DSM and width pay."""
    scores = []
    for genes in networks:
        arch = SPACE.architecture(genes)
        value = 50.0 + 10 * (arch.block_ops[-1] == "attn") + 5 * (arch.ds_ops[0] == "lg")
        value += arch.channels[0] / 8 + arch.repeats[1]
        scores.append(Score(genes, value, 1_000_000, 1, value))
    return scores


# ---- the space -----------------------------------------------------------------------------------


def test_genes_are_architectures():
    assert len(SPACE) == np.prod(SPACE.choices) == (3 * 2 * 2 * 3) ** 2 * 3
    arch = SPACE.architecture((0, 1, 1, 1, 2, 1, 0, 0, 2))
    assert arch.block_ops == ("dw", "attn") and arch.ds_ops == ("lg",)
    assert (arch.repeats, arch.channels, arch.expansion) == ((2, 1), (32, 32), (2, 4))
    assert in_words(arch) == "dw 32x2 e2 -lg-> attn 32x1 e4"


def test_every_network_of_the_space_runs():
    rng = np.random.default_rng(0)
    space = SCALES["small"].space
    for _ in range(5):
        with on_meta():
            model = UniNet(space.architecture(space.sample(rng)), 10, 32)
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="a network has 9 choices, not 2"):
        SPACE.architecture((0, 0))
    with pytest.raises(ValueError, match="stage 0 has 3 options; there is no option 3"):
        SPACE.architecture((3, 0, 0, 0, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="one entry per stage"):
        SearchSpace(strides=(1, 2))
    with pytest.raises(ValueError, match="options that differ"):
        SearchSpace(repeats=(1, 1))
    with pytest.raises(ValueError, match="no operator 'pool'"):
        SearchSpace(operators=("dw", "pool"))


# ---- the controller ------------------------------------------------------------------------------


def test_controller_starts_uniform():
    torch.manual_seed(0)
    controller = Controller((2, 3, 4))
    made, log_probs, entropies = controller(1000)
    assert made.shape == (1000, 3) and made.amax(0).tolist() == [1, 2, 3]
    wanted = torch.tensor([2.0, 3.0, 4.0]).log()
    torch.testing.assert_close(entropies, wanted.expand(1000, 3))
    torch.testing.assert_close(log_probs, -wanted.expand(1000, 3))
    share = torch.nn.functional.one_hot(made[:, 2]).float().mean(0)
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.05, rtol=0)


def test_probabilities_follow_what_was_decided_before():
    torch.manual_seed(0)
    controller = Controller((2, 3))
    with torch.no_grad():
        controller.heads[1].weight.normal_()
    made = torch.tensor([[0, 1], [1, 1]])
    again, log_probs, _ = controller(chosen=made)
    assert torch.equal(again, made)
    assert log_probs[0, 0] == log_probs[1, 0] and log_probs[0, 1] != log_probs[1, 1]


def test_learning_makes_rewarded_decisions_likely():
    learner = Learner((3, 3), PPO(entropy=0.0), seed=0)
    made = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 2]])
    before = learner.controller(chosen=made)[1].sum(1).exp()
    learner.learn(made, torch.tensor([10.0, 1.0, 1.0, 1.0]))
    after = learner.controller(chosen=made)[1].sum(1).exp()
    assert after[0] > before[0] and (after[1:3] < before[1:3]).all()


def test_a_batch_of_equal_networks_does_not_end_the_learning():
    """A controller that is nearly sure draws one network four times; its rewards do not differ."""
    learner = Learner((3, 3), PPO(), seed=0)
    made = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 2]])
    learner.learn(made, torch.tensor([50.0, 60.0, 55.0, 52.0]))
    learner.learn(made[1:2].expand(4, -1), torch.full((4,), 50.0))
    for _ in range(12):
        learner.learn(made, torch.tensor([70.0, 60.0, 55.0, 52.0]))
    with torch.no_grad():
        assert learner.controller(chosen=made)[1].sum(1).exp()[0] > 0.5


# ---- the search ----------------------------------------------------------------------------------


def test_reward_prices_multiply_adds():
    assert reward(80.0, 4e6, 4e6) == 80.0
    assert reward(80.0, 8e6, 4e6) == pytest.approx(80 * 2**-0.07)
    assert reward(80.0, 2e6, 4e6) > 80


def test_policy_gradient_beats_random_on_a_made_up_reward():
    ours = [policy_search(SPACE, made_up, 96, seed=seed) for seed in range(2)]
    theirs = [random_search(SPACE, made_up, 96, seed=seed) for seed in range(2)]
    late = np.mean([one.rewards[-24:].mean() for one in ours])
    first = np.mean([one.rewards[:24].mean() for one in ours])
    drawn = np.mean([one.rewards.mean() for one in theirs])
    assert late > first + 3 and late > drawn + 3
    assert all(len(one.scores) == 96 for one in (*ours, *theirs))
    assert ours[0].entropies[-1] < ours[0].entropies[0]
    assert (np.diff(ours[0].running_best) >= 0).all()
    assert ours[0].running_best[-1] == ours[0].best.reward == ours[0].rewards.max()


def test_the_same_seed_draws_the_same_whatever_else_draws():
    first = policy_search(SPACE, made_up, 8, batch=4, seed=3)

    def noisy(networks):
        torch.manual_seed(len(networks))
        torch.rand(7)
        return made_up(networks)

    again = policy_search(SPACE, noisy, 8, batch=4, seed=3)
    assert first.scores == again.scores
    assert first.scores != policy_search(SPACE, made_up, 8, batch=4, seed=4).scores


def test_a_search_needs_evaluations():
    with pytest.raises(ValueError, match="at least one evaluation"):
        random_search(SPACE, made_up, 0)


# ---- real scores ---------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Proxy:
    return Proxy(
        SCALES["tiny"].space, images=64, judged_on=100, epochs=1, recipe={"batch_size": 32}
    )


def test_scores_are_remembered_across_restarts(proxy, tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    genes = [(0, 0, 0, 0, 2, 1, 0, 0, 0), (2, 0, 0, 0, 1, 0, 0, 1, 1)]
    scores = ProxyScores(proxy, store)
    first = scores([*genes, genes[0]])
    assert first[0] == first[2] != first[1]
    assert all(0 <= one.accuracy <= 100 and one.macs > 0 for one in first)
    assert scores.seconds(genes) > 0
    with store.file.open("a") as stream:
        stream.write('{"torn')
    monkeypatch.setattr(Proxy, "run", lambda *_: pytest.fail("it was trained again"))
    assert ProxyScores(proxy, store)(genes) == first[:2]


def test_candidates_never_see_the_images_that_judge_them(proxy):
    from reproductions.uninet.proxy import _images

    held, hidden = _images("fashion_mini", None, proxy.images)
    assert hidden == len(held) == 10_000 - 64 and "held out of train" in held.split
    with pytest.raises(harness.ReplivitError, match="10,000 training images: of 20,000 that train"):
        _images("fashion_mini", None, 20_000)


def test_search_runs_and_tells_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    result = harness.run("uninet/search", scale="tiny", evaluations=2)
    assert [row["search"] for row in result.rows] == ["policy gradient", "random"]
    assert all(row["networks drawn"] == 2 and row["top-1, test (%)"] > 0 for row in result.rows)
    assert len(result.findings) == 5 and set(result.figures) == {"rewards", "networks"}
    assert "our reconstruction" in result.notes
    assert len(result.detail["traces"]["random"][0]) == 2


def test_search_options_are_checked():
    assert choose_setting("tiny", {"seeds": 4, "space": {"repeats": [1, 2]}}).seeds == (4,)
    for options, message in (
        ({"no_such": 1}, "no option 'no_such'"),
        ({"evaluations": 0}, "evaluations must be a whole number from 1 on, not 0"),
        ({"final_epochs": -1}, "final_epochs must be a whole number from 0 on, not -1"),
        ({"seeds": ()}, "seeds must be whole numbers that differ"),
        ({"space": {"repeats": []}}, "needs options that differ"),
        ({"space": {"no_such": 1}}, "option space"),
    ):
        with pytest.raises(harness.ReplivitError, match=message):
            choose_setting("tiny", options)
    with pytest.raises(harness.ReplivitError, match="no scale 'huge'; there are tiny"):
        search_experiment.search("huge")


# ---- down-sampling -------------------------------------------------------------------------------


def test_arms_cost_the_same_and_differ_where_they_should():
    setting = downsampling_experiment.SCALES["small"]
    chosen = ("strided convolution", "LG-DSM", "LG-DSM, attention first")
    networks = networks_of(setting, chosen)
    target = macs_of(networks["LG-DSM"], 32)
    assert set(chosen) < set(ARMS) and networks["LG-DSM"] == setting.network
    for name, arch in networks.items():
        assert macs_of(arch, 32) == pytest.approx(target, rel=0.02), name
        assert arch.ds_ops[0] == "l" and arch.repeats == setting.network.repeats
    assert {one.ds_ops[1:] for one in networks.values()} == {
        (name, name) for name in ("strided", "lg")
    }
    assert networks["LG-DSM, attention first"].block_ops == ("attn", "attn", "dw", "dw")


def test_downsampling_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    arms = ["LG-DSM", "strided convolution"]
    result = harness.run("uninet/downsampling", scale="tiny", arms=arms)
    assert [row["arm"] for row in result.rows] == arms
    assert len(result.findings) == 1 and "strided convolution" in result.findings[0].evidence
    assert "no number here means anything" in result.notes


def test_downsampling_options_are_checked():
    for scale, options, message in (
        ("huge", {}, "no scale 'huge'"),
        ("tiny", {"arms": ["no such"]}, "no arm 'no such'; there are: strided"),
        ("tiny", {"epochs": 0}, "epochs must be a whole number from 1 on, not 0"),
        ("tiny", {"test_images": 0}, "test_images must be a whole number from 1 on, not 0"),
        ("tiny", {"no_such": 0}, "no option 'no_such'"),
        ("tiny", {"network": {"repeats": [1]}}, "option network: repeats must have one entry"),
    ):
        with pytest.raises(harness.ReplivitError, match=message):
            downsampling_experiment.downsampling(scale, **options)


def test_operator_map_shows_every_block():
    from matplotlib.figure import Figure

    from reproductions.uninet.drawing import COLOURS, operator_map

    axes = Figure().subplots()
    operator_map(axes, {"B1": ARCHITECTURES["b1"], "micro": ARCHITECTURES["micro"]})
    assert len(axes.patches) == 23 + 7
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["convolution", "transformer"] and len(COLOURS) == 4
