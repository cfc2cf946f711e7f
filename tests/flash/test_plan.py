import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elute.errors import BudgetError, ShapeError
from elute.flash.plan import BLOCK, Plan, Use, least_window, solve
from elute.runtime.memory import parse_size

sizes = st.integers(1, 40).map(lambda n: n * BLOCK)


@st.composite
def forwards(draw: st.DrawFn) -> list[Use]:
    shapes = draw(st.lists(st.lists(sizes, min_size=1, max_size=4), min_size=1, max_size=12))
    return [
        Use(tuple(f"{i}.{j}" for j in range(len(shape))), tuple(shape))
        for i, shape in enumerate(shapes)
    ]


def overlaps(plan: Plan, a: tuple[str, int], b: tuple[str, int]) -> bool:
    return (
        plan.places[a[0]] < plan.places[b[0]] + b[1]
        and plan.places[b[0]] < plan.places[a[0]] + a[1]
    )


@given(forwards(), st.integers(0, 4000), st.integers(0, 100))
def test_a_plan_keeps_its_budget_and_every_use_fits_at_once(uses, blocks, fixed):
    needed = fixed * BLOCK + least_window(uses)
    budget = needed + blocks * BLOCK
    plan = solve(budget, {"process": fixed * BLOCK}, uses)
    assert plan.total <= budget
    known = {name: size for use in uses for name, size in zip(use.names, use.n_bytes, strict=True)}
    assert set(plan.pinned) | set(plan.places) == set(known)
    assert not set(plan.pinned) & set(plan.places)
    assert plan.missed == sum(known[name] for name in plan.places)
    assert plan.pinned_bytes == sum(known[name] for name in plan.pinned)
    order = [name for use in uses for name in use.names if name in plan.places]
    assert list(plan.places) == order
    for name, at in plan.places.items():
        assert at % BLOCK == 0
        assert at + known[name] <= plan.window
    for use in uses:
        streamed = [(name, known[name]) for name in use.names if name in plan.places]
        for i, a in enumerate(streamed):
            assert not any(overlaps(plan, a, b) for b in streamed[:i])


@given(forwards(), st.integers(1, 100))
def test_less_than_the_least_budget_is_refused_and_the_least_works(uses, fixed):
    least = fixed * BLOCK + least_window(uses)
    if least < fixed * BLOCK + sum(use.total for use in uses):
        with pytest.raises(BudgetError, match=r"memory: found .* MB, wanted at least "):
            solve(least - 1, {"process": fixed * BLOCK}, uses)
    assert solve(least, {"process": fixed * BLOCK}, uses).total <= least


def test_more_memory_reads_less():
    """By whole matrices: room for one more is enough to never read more."""
    uses = [Use((f"{i}.a", f"{i}.b"), (7 * BLOCK, 12 * BLOCK)) for i in range(9)]
    missed = [solve(n * BLOCK, {}, uses).missed for n in range(31, 200)]
    assert all(after <= before for before, after in zip(missed, missed[12:], strict=False))
    assert missed[-1] == 0


def test_what_stays_is_spread_over_the_forward():
    uses = [Use((str(i),), (10 * BLOCK,)) for i in range(20)]
    plan = solve((30 + 100) * BLOCK, {}, uses)
    kept = [int(name) for name in plan.pinned]
    assert len(kept) == 10
    assert max(b - a for a, b in itertools.pairwise(kept)) == 2


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.5G", 1_500_000_000),
        ("800M", 800_000_000),
        ("2GiB", 2 << 30),
        ("900mb", 900_000_000),
        ("64k", 64_000),
        ("12345", 12345),
        (12345, 12345),
    ],
)
def test_sizes_are_read(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "much", "-1G", "1T", "1.5 G B", "1e9", "G"])
def test_other_texts_are_refused(text):
    with pytest.raises(ShapeError, match=r"memory: found .*, wanted a size such as 1\.5G"):
        parse_size(text)
