"""Frames over a socket."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_engine.executors.process.channel import Channel, PeerGone
from dcp_engine.executors.process.turns import Turns

LIMIT = 20.0
Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, two = socket.socketpair()
    ends = Channel(one), Channel(two)
    yield ends
    for end in ends:
        end.close()


def soon(seconds: float = 0.02) -> float:
    return time.monotonic() + seconds


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.binary(max_size=50), st.integers(0, 300_000), st.integers(0, 3)), max_size=6
    )
)
def test_what_is_sent_is_received(frames: list[tuple[bytes, int, int]]) -> None:
    one, two = socket.socketpair()
    sender, receiver = Channel(one), Channel(two)
    descriptor = os.memfd_create("test")

    def send() -> None:
        for message, size, count in frames:
            sender.send(message, bytes([count]) * size, [descriptor] * count)
        sender.close()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        for message, size, count in frames:
            frame = receiver.receive(time.monotonic() + LIMIT)
            assert frame is not None
            assert (frame.message, frame.body) == (message, bytes([count]) * size)
            assert len(frame.descriptors) == count
            for received in frame.descriptors:
                assert not os.get_inheritable(received)
                assert os.path.samestat(os.fstat(received), os.fstat(descriptor))
                os.close(received)
        assert receiver.receive() is None
    finally:
        thread.join(LIMIT)
        receiver.close()
        os.close(descriptor)


def test_both_ends_may_send_much_at_once(pair: Pair) -> None:
    body = bytes(3 << 20)
    senders = [threading.Thread(target=end.send, args=(b"m", body), daemon=True) for end in pair]
    for sender in senders:
        sender.start()
    for end in pair:
        frame = end.receive(time.monotonic() + LIMIT)
        assert frame is not None
        assert len(frame.body) == len(body)
    for sender in senders:
        sender.join(LIMIT)


@pytest.mark.parametrize("cut", [0, 1, 11, 12, 15, 40])
def test_an_end_in_the_middle(cut: int) -> None:
    one, two = socket.socketpair()
    receiver = Channel(two)
    descriptors = len(os.listdir("/proc/self/fd"))
    frame = (10).to_bytes(4, "little") + (100).to_bytes(8, "little") + bytes(110)
    if cut:
        socket.send_fds(one, [frame[:cut]], [0, 0])
    one.close()
    assert receiver.receive(time.monotonic() + LIMIT) is None
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1  # what came along is closed again
    receiver.close()


def test_nobody_there(pair: Pair) -> None:
    one, two = pair
    with pytest.raises(TimeoutError):
        one.receive(soon())
    two.close()
    with pytest.raises(PeerGone):
        one.send(b"m", bytes(1 << 20))


def test_a_message_that_is_not_taken(pair: Pair) -> None:
    one, _ = pair
    with pytest.raises(TimeoutError):
        one.send(b"m", bytes(8 << 20), deadline=soon())
    assert one.torn
    with pytest.raises(PeerGone, match="in part"):
        one.send(b"next")


def test_a_message_that_was_not_begun_tears_nothing(pair: Pair) -> None:
    one, two = pair
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            # Single bytes: either all of a frame fits into the buffer or nothing of it.
            one.send(b"", b"", deadline=soon())
            sent += 1
    assert not one.torn
    for _ in range(sent):
        assert two.receive(time.monotonic() + LIMIT) is not None
    one.send(b"again")
    frame = two.receive(time.monotonic() + LIMIT)
    assert frame is not None
    assert frame.message == b"again"


def test_the_process_behind_a_socket_that_somebody_else_holds(pair: Pair) -> None:
    one, two = socket.socketpair()
    ended_read, ended_write = os.pipe()
    watched = Channel(one, ended_read)
    other = Channel(two)
    other.send(b"last words", bytes(100_000))
    os.write(ended_write, b"x")  # readable: as a pidfd is when its process has ended
    frame = watched.receive()
    assert frame is not None
    assert frame.message == b"last words"
    assert watched.receive() is None
    with pytest.raises(PeerGone, match="ended"):
        watched.send(b"", bytes(8 << 20))
    watched.close()
    other.close()
    os.close(ended_read)
    os.close(ended_write)


def test_turns_come_in_order() -> None:
    turns, order, waiting = Turns(), [], []
    assert turns.acquire()
    assert not turns.acquire(0)
    for number in range(10):

        def take(number: int = number) -> None:
            assert turns.acquire(LIMIT)
            order.append(number)
            turns.release()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        waiting.append(thread)
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    turns.release()
    for thread in waiting:
        thread.join(LIMIT)
    assert order == list(range(10))
    assert turns.acquire(0)


def test_whoever_leaves_the_queue_is_passed_over() -> None:
    turns = Turns()
    assert turns.acquire()
    assert not turns.acquire(0.001)
    turns.release()
    assert turns.acquire(0)
    turns.release()
