"""A fit takes the threads that pay, and gives them back."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.training import threads
from flowvi.training.threads import best_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def target(rows: int) -> flowvi.Target:
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return flowvi.from_pyro(model, torch.zeros(rows))


@pytest.mark.parametrize("speed_up, used", [(0.5, 1), (1.2, 1), (2.0, 2)])
def test_what_is_measured_to_pay_is_used(speed_up, used, two_threads, monkeypatch):
    def seconds(target, particles):
        return 1.0 if torch.get_num_threads() == 1 else 1.0 / speed_up

    monkeypatch.setattr(threads, "_seconds", seconds)

    with best_threads(target(10_000), 64):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == 2


def test_small_problems_are_not_measured(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "_seconds", None)

    with best_threads(target(10), 64):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_large_problems_are_really_measured(two_threads):
    state = torch.get_rng_state()

    with best_threads(target(10_000), 64):
        assert torch.get_num_threads() in (1, 2)

    assert torch.equal(torch.get_rng_state(), state)
    assert threads._seconds(target(10_000), 64) > 0.0


def test_threads_come_back_after_an_error(two_threads):
    with pytest.raises(ZeroDivisionError), best_threads(target(10), 64):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2
