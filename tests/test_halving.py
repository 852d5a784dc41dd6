"""Successive halving against trying everything."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from demur.features.halving import halve, surely_worse


def table_of(means: list[float], prompts: int, seed: int = 0) -> Tensor:
    noise = torch.randn(prompts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(means, dtype=torch.float64).unsqueeze(1) + noise  # the same prompts are hard for every arm


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30, unique=True), st.integers(1, 6))
def test_paired_noise_never_loses_the_best(means: list[int], keep: int) -> None:
    table = table_of([float(m) for m in means], 16)
    asked: list[tuple[int, int, int]] = []

    def measure(arms: list[int], first: int, last: int) -> Tensor:
        asked.append((len(arms), first, last))
        return table[list(arms), first:last]

    found = halve(range(len(means)), measure, [4, 8, 16], keep)
    order = sorted(range(len(means)), key=lambda arm: -means[arm])
    assert [one.arm for one in found][:keep] == order[:keep]
    assert sorted(one.arm for one in found) == list(range(len(means)))
    assert [span[1:] for span in asked] == [(0, 4), (4, 8), (8, 16)]
    sizes = [span[0] for span in asked]
    assert sizes[0] == len(means)
    assert all(b >= min(keep, a) and b <= max(keep, -(-a // 2)) for a, b in itertools.pairwise(sizes))
    for one in found:
        torch.testing.assert_close(one.values, table[one.arm, : len(one.values)])
    assert all(len(one.values) == 16 for one in found[: sizes[-1]])


def test_those_that_came_further_stand_first_and_equals_keep_their_order() -> None:
    table = torch.tensor([[1.0, 0.0], [0.5, 9.0], [0.5, 9.0], [0.9, 0.0]])
    found = halve([0, 1, 2, 3], lambda arms, first, last: table[list(arms), first:last], [1, 2], 1)
    assert [one.arm for one in found] == [0, 3, 1, 2]


def test_prompts_that_could_not_be_scored_count_for_nothing() -> None:
    table = torch.tensor([[float("nan"), 1.0], [0.6, 0.6], [float("nan"), float("nan")]])
    found = halve([0, 1, 2], lambda arms, first, last: table[list(arms), first:last], [2], 1)
    assert [one.arm for one in found] == [0, 1, 2]
    assert found[-1].mean == float("-inf")


def test_an_arm_leaves_for_sure_only_on_enough_prompts() -> None:
    worse, better = torch.zeros(20), torch.ones(20)
    assert surely_worse(worse, better)
    assert not surely_worse(better, worse)
    assert not surely_worse(worse[:3], better[:3])
    noisy = torch.tensor([3.0, -3.0] * 10) + 0.1
    assert not surely_worse(torch.zeros(20), noisy)
