"""Which inputs get a shadow."""

from __future__ import annotations

import pytest

from elute.errors import ShapeError
from elute.npu.choices import PLAIN, SHADOWED, Choice, choose

WIDE, NARROW = SHADOWED


def effects(plain: float, wide: float, narrow: float) -> dict[Choice, float]:
    return {PLAIN[0]: plain, PLAIN[1]: 2 * plain, WIDE: wide, NARROW: narrow}


# gains of shadows: 0.9, 2.9, 10, 50; what narrow bounds add to them: 0, 1, 1, 10
SITES = {
    "d": effects(50, 10, 0),
    "b": effects(3, 1.1, 0.1),
    "a": effects(1, 0.1, 0.2),
    "c": effects(10, 1, 0),
}


@pytest.mark.parametrize(
    ("pruned", "wanted"),
    [
        (0.0, {"d": NARROW, "b": NARROW, "a": WIDE, "c": NARROW}),
        (0.25, {"d": NARROW, "b": WIDE, "a": PLAIN[0], "c": WIDE}),
        (0.5, {"d": WIDE, "b": PLAIN[0], "a": PLAIN[0], "c": WIDE}),
        (1.0, dict.fromkeys(SITES, PLAIN[0])),
    ],
)
def test_shadows_go_where_they_help_most(pruned, wanted):
    chosen = choose(SITES, pruned)
    assert chosen == wanted
    assert list(chosen) == list(SITES)


def test_a_plain_bound_is_the_less_harmful_one():
    assert choose({"a": {**effects(3, 0, 0), PLAIN[1]: 2.0}}, 1.0) == {"a": PLAIN[1]}


def test_a_narrow_bound_that_harms_is_not_taken():
    assert choose({"a": effects(1, 2, 3)}, 0.0) == {"a": WIDE}


def test_no_sites_have_no_choices():
    assert choose({}, 0.35) == {}


@pytest.mark.parametrize("pruned", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_bounds_is_refused(pruned):
    with pytest.raises(ShapeError, match="wanted 0 to 1"):
        choose(SITES, pruned)
