"""Signals: the first asks, the second Ctrl-C insists, and handlers are given back."""

import os
import signal
import threading

import pytest

from flaxres.train.preempt import stop_requests


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_stops_without_a_signal():
    with stop_requests() as request:
        assert request.now() is None and request.agreed(1) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_by_name_and_told(number):
    told = []
    with stop_requests(told.append) as request:
        send(number)
        assert request.now() == request.agreed(1) == number.name
    assert told == [number.name]


def test_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requests() as request:
        send(signal.SIGINT)
        assert request.now() == "SIGINT"
        send(signal.SIGINT)


def test_second_sigterm_changes_nothing():
    with stop_requests() as request:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert request.now() == "SIGTERM"


def test_ctrl_c_after_sigterm_is_the_first_ctrl_c():
    with stop_requests() as request:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert request.now() == "SIGINT"


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt), stop_requests():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_no_handler_is_set():
    found = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with stop_requests() as request:
            found.append(signal.getsignal(signal.SIGTERM) is before and request.now() is None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]
