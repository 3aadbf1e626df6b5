"""Signals: who acts on them, and when."""

import os
import signal
import time

import pytest

from cruijff_kit.util.signals import StopSignals


class Recipe:
    """What a recipe shows of itself here."""

    stop_requested = None


@pytest.fixture
def stop():
    signals = StopSignals(signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    signals.install()
    yield signals
    signals.uninstall()


def test_a_training_recipe_is_asked(stop):
    recipe = Recipe()
    with stop.stopping(recipe):
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)  # what a cluster repeats cuts nothing short
        assert recipe.stop_requested == "stopped by SIGUSR2" and stop.received is signal.SIGUSR2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # a person who insists


def test_elsewhere_it_ends_at_once(stop):
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    recipe = Recipe()
    with stop.stopping(recipe):  # had the exception been lost, training would not begin
        assert recipe.stop_requested == "stopped by SIGTERM"


def test_a_way_out_of_ones_own(stop):
    left = []
    stop.interrupt_now = lambda: left.append(stop.received)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert left == [signal.SIGUSR2]


def test_forked_workers_do_not_act(stop):
    """The signals of a cluster reach a run's forked children too, which have inherited the handlers."""
    recipe = Recipe()
    with stop.stopping(recipe):
        child = os.fork()
        if child == 0:
            time.sleep(1)
            os._exit(7 if recipe.stop_requested is None and stop.received is None else 8)
        time.sleep(0.2)
        os.kill(child, signal.SIGUSR2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_signals_are_given_back():
    usual = signal.getsignal(signal.SIGTERM)
    signals = StopSignals(signal.SIGTERM)
    signals.install()
    assert signal.getsignal(signal.SIGTERM) != usual
    signals.uninstall()
    assert signal.getsignal(signal.SIGTERM) == usual
