"""How ``examples/bench/convert.py`` shares stored bits between matrices, and cleans its text."""

import itertools
import random

import convert_budget as budget
import convert_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**32 - 1))
def test_share_stays_within_the_total_and_near_the_best(seed):
    rng = random.Random(seed)
    counts = [rng.randint(1, 4) for _ in range(4)]
    options = {
        str(i): [budget.Option((j,), rng.randint(1, 40), rng.random()) for j in range(count)]
        for i, count in enumerate(counts)
    }
    total = rng.randint(4, 140)
    taken = budget.share(options, total)
    assert all(option in options[name] for name, option in taken.items())
    fewest = {name: min(option.bits for option in choices) for name, choices in options.items()}
    if sum(fewest.values()) > total:
        assert {name: option.bits for name, option in taken.items()} == fewest
        return
    assert sum(option.bits for option in taken.values()) <= total
    every = itertools.product(*options.values())
    best = min(sum(o.error for o in some) for some in every if sum(o.bits for o in some) <= total)
    # What does not fit is at most one step of one matrix.
    step = max(max(o.error for o in choices) - min(o.error for o in choices) for choices in options.values())
    assert sum(option.error for option in taken.values()) <= best + step + 1e-9


def test_equal_matrices_take_steps_in_order():
    low, high = budget.Option((2,), 20, 0.1), budget.Option((3,), 30, 0.03)
    taken = budget.share({name: [low, high] for name in "abc"}, 85)
    assert [taken[name] for name in "abc"] == [high, high, low]


@pytest.mark.parametrize(("dim", "bits", "error"), [(4, 2, 0.0990), (2, 4, 0.0083), (1, 8, 2.72 / 4**8)])
def test_expected_error_is_that_of_kmeans_within_7_percent(dim, bits, error):
    assert budget.vector_error(dim, bits) == pytest.approx(error, rel=0.07)


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("those of H. gammarus are white @-@ tipped .", "those of H. gammarus are white-tipped."),
        ("up to 60 cm ( 24 in ) and 0 @.@ 7 kg , at 2 @,@ 000 m", "up to 60 cm (24 in) and 0.7 kg, at 2,000 m"),
        ('turning " lobster red " on cooking', 'turning "lobster red" on cooking'),
        ("the crew 's boat did n't sink", "the crew's boat didn't sink"),
        (" plain words stay ", "plain words stay"),
    ],
)
def test_tokenised_text_is_put_as_people_write_it(tokenised, written):
    assert models.plain(tokenised) == written
