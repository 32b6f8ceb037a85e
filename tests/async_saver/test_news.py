"""What a worker tells of a save, as it arrives."""

from __future__ import annotations

import pytest

from dcp_engine.async_saver.messages import SaveAnswer
from dcp_engine.async_saver.news import News, NewsSender
from dcp_engine.async_saver.response import Progress
from dcp_engine.errors import CoordinationError
from dcp_engine.executors.process import WorkerRequest


@pytest.fixture
def told() -> list[Progress]:
    return []


@pytest.fixture
def news(told: list[Progress]) -> News:
    return News(told.append, 7)


@pytest.fixture
def sender(news: News) -> NewsSender:
    return NewsSender(WorkerRequest(kind="save", body=b"", progress=news))


def test_the_last_word_stays_the_last(news: News, sender: NewsSender) -> None:
    """A thread of the writer may still look when all is over."""
    with pytest.raises(CoordinationError, match="did not tell"):
        news.told_answer()
    sender.look("write")
    sender.announce("an id")
    sender.succeed(SaveAnswer(generation=3))
    sender.look("write")
    assert (news.ended, news.save_id, news.told_answer().generation) == (True, "an id", 3)


def test_a_failure_is_told_when_it_is_known_and_when_all_is_tidy(
    news: News, sender: NewsSender, told: list[Progress]
) -> None:
    error = ValueError("first")
    sender.fail(error)
    assert (repr(news.failure), news.ended) == (repr(error), False)
    sender.fail(error)
    assert len(told) == 1, "once"
    sender.fail(error, ended=True)
    assert (repr(news.failure), news.ended) == (repr(error), True)


def test_it_may_end_in_another_failure(news: News, sender: NewsSender) -> None:
    sender.fail(ValueError("first"))
    sender.fail(KeyError("in doubt"), ended=True)
    assert (repr(news.failure), news.ended) == (repr(KeyError("in doubt")), True)
