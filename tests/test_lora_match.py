"""Pattern keys against PEFT's own rule, run as a regular expression where that is safe."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restow.adapter_match import check_key, first, matches
from restow.errors import AdapterError

KEYS = st.lists(
    st.sampled_from(["a", "b", "experts", ".", r"\.", ".*", "a*", "_"]), min_size=1, max_size=6
).map("".join)
NAMES = st.lists(st.sampled_from(["a", "b", "ab", "experts", "a_b", "0"]), min_size=1, max_size=5).map(
    ".".join
)


def peft(key: str, name: str) -> bool:
    """peft.utils.get_pattern_key, PEFT 0.21.2."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


@given(KEYS, NAMES)
def test_a_key_means_what_peft_means(key: str, name: str) -> None:
    try:
        re.compile(key)
    except re.error:
        return
    assert matches(key, name) == peft(key, name)


@pytest.mark.parametrize(
    ("key", "name", "found"),
    [
        ("gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        ("up_proj", "model.layers.0.mlp.experts.gate_up_proj", False),
        (r"mlp\.experts\.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        (r".*\.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        ("*.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj", True),
        ("model.layers.1.*", "model.layers.1.mlp", True),
        ("model.layers.1.*", "model.layers.2.mlp", False),
        ("layers.1", "model.layers.11", False),
    ],
)
def test_keys(key: str, name: str, found: bool) -> None:
    assert matches(key, name) is found


def test_the_first_key_counts() -> None:
    assert first(["x", "q_proj", ".*proj"], "a.q_proj") == "q_proj"
    assert first(["x"], "a.q_proj") is None


@pytest.mark.parametrize(
    "key", ["(a+)+", "a|b", "[ab]", "a+", "a?", "^a", "a$", r"\d", "a{2}", "", "x" * 257, "\u00e9"]
)
def test_expressions_are_refused_by_name(key: str) -> None:
    with pytest.raises(AdapterError) as caught:
        check_key(key, "rank_pattern", "adapter_config.json")
    assert "rank_pattern" in str(caught.value)
    assert str(caught.value).isascii()


def test_time_is_linear() -> None:
    key, name = ".*" * 100 + "b", "a" * 4000
    check_key(key, "rank_pattern")
    started = time.perf_counter()
    assert not matches(key, name)
    assert time.perf_counter() - started < 5
