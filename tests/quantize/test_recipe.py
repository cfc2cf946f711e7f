"""A recipe is what its file says, and a file that says nonsense is told so in one sentence."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elute.errors import EluteError, FormatError, ShapeError
from elute.quantize.recipe import EMBEDDING, HEAD, Recipe, Rule, Scheme

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


def test_the_default_gives_linears_4_bits_and_the_ends_8() -> None:
    recipe = Recipe.default()
    assert [recipe.rule_for(name).bits for name in (Q_PROJ, DOWN, EMBEDDING, HEAD)] == [4, 4, 8, 8]
    assert recipe.rule_for(Q_PROJ) == Rule("*", 4, 32, Scheme.SYMMETRIC)
    assert [Recipe.default(bits=2).rule_for(name).bits for name in (Q_PROJ, HEAD)] == [2, 8]
    assert Recipe.default(group_size=None).rule_for(Q_PROJ).group_size is None


TOML = """
bits = 3
group_size = 32

[[rules]]
match = "*.down_proj.weight"
bits = 6
scheme = "symmetric"

[[rules]]
match = "model.layers.[01].*"
group_size = "row"

[[rules]]
match = "*.mlp.*"
scheme = "ternary"
"""


def test_rules_apply_in_order_and_inherit_the_top_level(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    recipe = Recipe.load(tmp_path / "r.toml")
    assert recipe.rule_for(DOWN) == Rule("*.down_proj.weight", 6, 32, Scheme.SYMMETRIC)
    assert recipe.rule_for(Q_PROJ) == Rule("model.layers.[01].*", 3, None, Scheme.SYMMETRIC)
    assert recipe.rule_for("model.layers.2.mlp.up_proj.weight").bits == 2  # ternary
    assert recipe.rule_for("model.layers.2.self_attn.k_proj.weight") == Rule("*", 3, 32)
    assert recipe.rule_for(HEAD) == Rule(HEAD, 8, 32)
    assert not recipe.requantize


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    rules = [
        {"match": "*.down_proj.weight", "bits": 6, "scheme": "symmetric"},
        {"match": "model.layers.[01].*", "group_size": "row"},
        {"match": "*.mlp.*", "scheme": "ternary"},
    ]
    body = {"bits": 3, "group_size": 32, "rules": rules}
    (tmp_path / "r.json").write_text(json.dumps(body))
    assert Recipe.load(tmp_path / "r.json") == Recipe.load(tmp_path / "r.toml")


@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([16, 32, 64, 128, 192, "row"]),
    scheme=st.sampled_from(["symmetric", "asymmetric", "keep"]),
    requantize=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_what_a_recipe_writes_it_reads(
    bits: int, group_size: int | str, scheme: str, requantize: bool
) -> None:
    rule = {"match": "*", "bits": bits, "group_size": group_size, "scheme": scheme}
    recipe = Recipe.from_json({"rules": [rule], "requantize": requantize}, where="r")
    again = Recipe.from_json(recipe.to_json(), where="r")
    assert again.rule_for(Q_PROJ) == recipe.rule_for(Q_PROJ)
    assert again.requantize == requantize


@pytest.mark.parametrize(
    ("wanted", "n_columns", "used"),
    [
        (64, 576, 64),
        (128, 576, 64),
        (64, 96, 32),
        (64, 48, 48),  # the whole row, which is within the wish
        (64, 1008, 16),
        (64, 100, 100),  # nothing smaller packs
        (512, 256, 256),
        (256, 960, 192),
        (None, 100, 100),
    ],
)
def test_groups_fall_back_to_the_largest_that_packs(
    wanted: int | None, n_columns: int, used: int
) -> None:
    assert Rule("*", group_size=wanted).for_columns(n_columns, where="w").group_size == used


def test_a_row_that_no_group_packs_is_refused() -> None:
    with pytest.raises(ShapeError, match="w: K=66 is not a multiple of 4; pad K to 68"):
        Rule("*").for_columns(66, where="w")


def test_a_name_that_no_rule_matches_is_refused() -> None:
    with pytest.raises(FormatError, match="no rule matches 'w'; add one that ends with"):
        Recipe((Rule("x.*"),)).rule_for("w")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[]", "found list, wanted an object"),
        ("{", "invalid JSON"),
        ('{"bits": 4, "bits": 5}', "the key 'bits' twice"),
        ('{"bit": 4}', "found 'bit', wanted only bits, group_size, requantize, rules, scheme"),
        ('{"bits": 0}', "bits is 0, wanted an integer from 1 to 8"),
        ('{"bits": 4.5}', "bits is 4.5, wanted an integer"),
        ('{"bits": true}', "bits is True"),
        ('{"group_size": 24}', "group_size is 24, wanted 16, 32, 64, a multiple of 64, or 'row'"),
        ('{"group_size": -64}', "group_size is -64"),
        ('{"group_size": "all"}', "group_size is 'all'"),
        ('{"scheme": "cubic"}', "scheme is 'cubic', wanted one of symmetric, asymmetric"),
        ('{"scheme": 3}', "scheme is 3"),
        ('{"requantize": 1}', "requantize is 1, wanted true or false"),
        ('{"rules": {}}', "rules is {}, wanted a list"),
        ('{"rules": [3]}', "rule 1: found int, wanted an object"),
        ('{"rules": [{"bits": 4}]}', "rule 1: has no match; add one"),
        ('{"rules": [{"match": "*"}, {"match": ""}]}', "rule 2: match is ''"),
        ('{"rules": [{"match": 1}]}', "rule 1: match is 1, wanted a pattern"),
        ('{"rules": [{"match": "*", "bits": 9}]}', "rule 1: bits is 9"),
        ('{"rules": [{"match": "*", "size": 9}]}', "rule 1: found 'size'"),
        (
            '{"rules": [{"match": "*", "scheme": "ternary", "bits": 3}]}',
            "rule 1: ternary with bits=3",
        ),
    ],
)
def test_a_wrong_file_is_told_so(tmp_path: Path, body: str, says: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(body)
    with pytest.raises(FormatError) as refused:
        Recipe.load(path)
    assert str(refused.value).startswith(str(path))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("bits: 4")
    (tmp_path / "bad.toml").write_text("bits = = 4")
    (tmp_path / "latin.toml").write_bytes(b"match = '\xe9'")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    for name, says in [
        ("none.json", r"cannot be read \(No such file"),
        ("r.yaml", r"ends in .json or .toml, found '.yaml'"),
        ("bad.toml", r"found invalid TOML"),
        ("deep.toml", r"found TOML nested too deeply"),
        ("latin.toml", r"byte 9 is not UTF-8"),
    ]:
        with pytest.raises(FormatError, match=says):
            Recipe.load(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["match", "bits", "group_size", "scheme", "rules", "requantize", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=200, deadline=None)
def test_no_value_crashes_the_parser(value: object) -> None:
    try:
        recipe = Recipe.from_json(value, where="r")
        recipe.rule_for("w").for_columns(64, where="w")
    except EluteError:
        pass
