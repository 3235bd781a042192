"""Signals set a flag and nothing else; the handlers that were there come back."""

import os
import signal

import pytest

from pretrain.run.preemption import SIGNALS, Preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_named(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.agreed(1)
        os.kill(os.getpid(), number)
        assert preemption.agreed(1)
        assert preemption.reason == f"stopped by {number.name}"
    assert signal.getsignal(number) == before


def test_the_first_signal_counts_and_a_second_interrupt_ends_at_once():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
