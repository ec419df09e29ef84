"""A share of the training bytes: the right end of the scores, the right size, the same for any order."""

import numpy as np
import pytest

from nanophi.core.errors import UserError
from nanophi.core.recipe import Quality
from nanophi.data.quality_report import describe_rule
from nanophi.data.scoring import choose, divide


def documents(count=1000, seed=0):
    generator = np.random.default_rng(seed)
    ids = np.array([f"{value:016x}" for value in generator.permutation(10 * count)[:count]])
    return generator.random(count).astype(np.float32), generator.integers(100, 3000, count), ids


@pytest.mark.parametrize("share", [0.01, 0.42, 0.9, 1.0])
def test_a_share_is_of_the_bytes_and_from_the_right_end(share):
    scores, sizes, ids = documents()
    kept = {}
    for select in ("best", "random", "worst"):
        quality = Quality(share=share, select=select)
        kept[select] = choose(scores, sizes, ids, quality, seed=3)[0]
        assert abs(sizes[kept[select]].sum() - share * sizes.sum()) <= 1500
    if share < 1:
        assert scores[kept["best"]].min() >= scores[~kept["best"]].max()
        assert scores[kept["worst"]].max() <= scores[~kept["worst"]].min()
        assert scores[kept["worst"]].mean() < scores[kept["random"]].mean() < scores[kept["best"]].mean()
    assert abs(kept["random"].mean() - share) < 0.06  # large documents are as likely as small ones


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    scores, sizes, ids = documents()
    scores = np.round(scores, 1)  # ties everywhere
    mixed = np.random.default_rng(9).permutation(len(ids))
    for select in ("best", "random", "worst"):
        quality = Quality(share=0.3, select=select)
        chosen = [set(ids[choose(scores, sizes, ids, quality, seed)[0]]) for seed in (0, 1)]
        again = set(ids[mixed][choose(scores[mixed], sizes[mixed], ids[mixed], quality, 0)[0]])
        assert chosen[0] == again
        assert chosen[0] != chosen[1]


def test_what_cannot_be_chosen_is_refused():
    scores, sizes, ids = documents(50)
    with pytest.raises(UserError, match=r"share 1e-06 of .* bytes keeps no document"):
        choose(scores, sizes, ids, Quality(share=1e-6), seed=0)
    same = np.full(50, 0.25)
    for select in ("best", "worst"):
        with pytest.raises(UserError, match=r"every document has the score 0\.2500"):
            choose(same, sizes, ids, Quality(share=0.5, select=select), seed=0)
    assert choose(same, sizes, ids, Quality(share=0.5, select="random"), seed=0)[0].any()
    with pytest.raises(UserError, match=r"threshold 1\.0 keeps no document; the highest score is"):
        choose(scores, sizes, ids, Quality(threshold=1.0), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "greater than 0"),
        ({"share": -0.1}, "greater than 0"),
        ({"share": 1.1}, "less than or equal to 1"),
        ({"share": 0.4, "threshold": 0.5}, "exclude each other"),
        ({"select": "worst"}, "needs 'share'"),
        ({"high": ["a", "b"], "low": ["c", "b"]}, "'high' and 'low' both name 'b'"),
        ({"share": 0.4, "select": "first"}, "'best', 'random' or 'worst'"),
        ({"label": "x"}, "label is for a scorer 'model:"),
        ({"scale": [0, 5], "threshold": 3}, "scale is for a scorer"),
        ({"scorer": "column:q", "scale": [5, 0], "threshold": 3}, "from a smaller to a larger"),
        ({"scorer": "column:q", "scale": [0, 5]}, "state the threshold between 0 and 5"),
        ({"scorer": "column:q", "threshold": 3}, r"outside the scale of the scores, 0 to 1; if .* scale: \[0, 5\]"),
        ({"scorer": "column:q", "scale": [0, 5], "threshold": 6}, "threshold 6 is outside the scale"),
    ],
)
def test_impossible_sections_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Quality(**values)
    assert Quality(scorer="column:q", scale=(0, 5), share=0.4).threshold is None


def test_other_documents_are_divided_as_the_chosen_ones_were():
    scores, sizes, ids = documents()
    for select in ("best", "worst"):
        quality = Quality(share=0.42, select=select)
        kept, cutoff = choose(scores, sizes, ids, quality, seed=0)
        assert (divide(scores, quality, cutoff) == kept).all()
    random = Quality(share=0.42, select="random")
    assert divide(scores, random, choose(scores, sizes, ids, random, 0)[1]) is None
    assert divide(np.array([0.5, 0.51]), Quality(threshold=0.5), None).tolist() == [False, True]
    assert divide(scores, Quality(threshold=None), None) is None


def test_the_rule_in_words():
    rules = [Quality(), Quality(threshold=None), Quality(share=0.42), Quality(share=0.42, select="random")]
    rules.append(Quality(threshold=0.5, phase="decay"))
    assert [describe_rule(rule) for rule in rules] == [
        "score > 0.5",
        "all",
        "the best 42.0 % of the bytes",
        "a random 42.0 % of the bytes",
        "score > 0.5 while the learning rate decays",
    ]
