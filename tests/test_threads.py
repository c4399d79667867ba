"""Several batches at a time: in order, without gradients, and the threads given back."""

import threading
import time

import pytest
import torch

from iciia_exp.threads import side_by_side


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_what_is_made_comes_in_order(threads):
    seen, at_once, most = set(), [0], [0]
    lock = threading.Lock()
    own = torch.ones(3, requires_grad=True)

    def make(number):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            seen.add(threading.get_ident())
        time.sleep(0.002 * (number % 3))  # later ones are ready first
        with lock:
            at_once[0] -= 1
        return number, torch.get_num_threads(), (own * 2).requires_grad

    with torch.inference_mode():
        made = list(side_by_side(make, range(20)))
    workers = min(threads, 4)
    assert made == [(number, threads // workers, False) for number in range(20)]
    assert most[0] == len(seen) == workers
    assert torch.get_num_threads() == threads


def test_items_are_asked_for_as_they_are_needed(threads):
    asked = []
    made = side_by_side(lambda number: number, (asked.append(n) or n for n in range(1000)))
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    assert len(asked) <= 3 + threads
    made.close()
    assert torch.get_num_threads() == threads


def test_an_error_comes_through(threads):
    def make(number):
        if number == 7:
            raise ValueError("the seventh")
        return number

    made = []
    with pytest.raises(ValueError, match="the seventh"):
        made.extend(side_by_side(make, range(1000)))
    assert torch.get_num_threads() == threads
