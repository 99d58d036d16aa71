"""Independent pieces of work on several threads."""

import threading

import pytest
import torch

from lowbit.parallel import TakenTwice, Turns, each


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 11])
def test_every_piece_is_computed_once_and_counted(four_threads, count):
    seen, done = [], []
    each(count, seen.append, lambda: done.append(threading.current_thread()))
    assert sorted(seen) == list(range(count))
    assert done == [threading.main_thread()] * count


def test_pieces_have_threads_of_their_own_and_the_caller_keeps_its_number(four_threads):
    found = []
    each(4, lambda i: found.append((threading.get_ident(), torch.get_num_threads())))
    each(2, lambda i: found.append((threading.get_ident(), torch.get_num_threads())))
    assert [threads for _, threads in found] == [1] * 4 + [2] * 2
    assert threading.get_ident() not in {thread for thread, _ in found}
    assert torch.get_num_threads() == 4


def test_a_thread_that_begins_later_has_as_many_as_before(four_threads):
    each(4, lambda i: None)
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


@pytest.mark.parametrize("enabled", [True, False])
def test_pieces_see_whether_the_caller_computes_gradients(four_threads, enabled):
    found = []
    with torch.set_grad_enabled(enabled):
        each(4, lambda i: found.append(torch.is_grad_enabled()))
    assert found == [enabled] * 4


def test_a_failure_is_raised_and_what_has_not_begun_is_left_out(four_threads):
    begun = []

    def work(i):
        begun.append(i)
        if i == 1:
            raise ValueError("piece 1")

    with pytest.raises(ValueError, match="piece 1"):
        each(1000, work)
    assert len(begun) < 1000


def test_an_interrupt_while_threads_begin_ends_them(four_threads, monkeypatch):
    class Interrupted(threading.Semaphore):
        def acquire(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Semaphore", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        each(4, lambda i: None)
    monkeypatch.undo()
    assert torch.get_num_threads() == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowbit")]
    later = []
    each(4, lambda i: later.append(i))
    assert sorted(later) == [0, 1, 2, 3]


def test_pieces_change_what_they_share_in_their_order(four_threads):
    turns, order = Turns("ab"), {"a": [], "b": []}

    def work(i):
        for name in "ab" if i % 3 else "b":  # every third piece leaves one out
            with turns.at(name, i):
                order[name].append(i)
        turns.leave(i)

    each(20, work)
    assert order == {"a": [i for i in range(20) if i % 3], "b": list(range(20))}


def test_a_second_turn_is_refused():
    turns = Turns("a")
    with turns.at("a", 0):
        pass
    with pytest.raises(TakenTwice), turns.at("a", 0):
        pass


def test_nobody_waits_for_a_piece_that_failed(four_threads):
    turns = Turns("a")

    def work(i):
        try:
            if i == 0:
                raise ValueError("piece 0")
            with turns.at("a", i):
                pass
        except ValueError as error:
            turns.fail(error)
            raise

    with pytest.raises(ValueError, match="piece 0"):
        each(4, work)
