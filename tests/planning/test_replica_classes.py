"""Digests by class against the comparison key by key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_engine.planning.replica_classes import (
    classify,
    same_in_all_classes,
    summarise_by_class,
)
from dcp_engine.planning.replicas import compare_details

Table = dict[str, int]

TABLES = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.integers(0, 1)),
    min_size=1,
    max_size=5,
)


def summaries(tables: list[Table], by: list[Table]) -> list[bytes]:
    classes = classify(by)
    assert classes is not None
    made = [summarise_by_class(table, own) for table, own in zip(tables, classes, strict=True)]
    return [summary for summary in made if summary is not None]


@given(TABLES)
def test_they_tell_what_the_comparison_tells(tables: list[Table]) -> None:
    assert same_in_all_classes(summaries(tables, tables)) == (not compare_details(tables).differing)


def test_pipeline_stages_need_few_bytes() -> None:
    stages = [{f"stage{rank // 4}.{n}": n for n in range(100)} | {"step": 7} for rank in range(16)]
    stages[0]["coordinator"] = 1
    told = summaries(stages, stages)
    assert same_in_all_classes(told)
    # Its stage, what all have, what it alone has.
    assert [len(summary) for summary in told] == [8 + 3 * 10] + [8 + 2 * 10] * 15
    stages[5]["stage1.50"] += 1
    assert not same_in_all_classes(summaries(stages, stages))


def test_other_keys_have_no_summary() -> None:
    classes = classify([{"a"}, {"a", "b"}])
    assert classes is not None
    assert summarise_by_class({"a": 1}, classes[1]) is None
    assert summarise_by_class({"a": 1, "c": 1}, classes[1]) is None
    assert summarise_by_class({"b": 1, "a": 1}, classes[1]) is not None


@pytest.mark.parametrize("other", [[{"a"}, {"a"}], [{"a"}, {"a", "c"}], [{"a", "b"}, {"a"}]])
def test_ranks_that_were_not_classified_together_do_not_agree(other: list[set[str]]) -> None:
    one, two = classify([{"a"}, {"a", "b"}]), classify(other)
    assert one is not None and two is not None
    assert not same_in_all_classes(
        [one[0].id, two[1].id]  # a summary without classes: ranks that compare nothing
    )


def test_ranks_that_compare_nothing_agree_with_everybody() -> None:
    tables: list[Table] = [{}, {"a": 1}, {"a": 1}]
    assert same_in_all_classes(summaries(tables, tables))
