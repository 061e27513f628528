# SPDX-License-Identifier: Apache-2.0
"""Any function as a reward: batch or row, sync or async, with or without a time limit."""

import asyncio
import math
import time
from typing import Any

import misbehaving
import pytest
import torch
from inputs import reward_input

from lit_rl.rewards import FunctionReward, RewardExample, RewardInput, RewardSelfTestError


def lengths(batch: RewardInput) -> torch.Tensor:
    return batch.lengths.float()


async def service(batch: RewardInput) -> list[float]:
    await asyncio.sleep(0)
    return [float(text) for text in batch.completions]


async def row_service(completion: str, answer: str = "") -> float | None:
    if completion == "raise":
        raise ConnectionError("refused")
    if completion == "raise timeout":
        raise TimeoutError("the service took too long")
    await asyncio.sleep(float(completion) if completion != "none" else 0)
    return None if completion == "none" else 1.0


class Judge:
    async def __call__(self, batch: RewardInput) -> list[float]:
        return [2.0] * len(batch)


def test_a_batch_function_takes_its_own_name() -> None:
    reward = FunctionReward(lengths, weight=0.5)
    assert reward.name == "lengths"
    assert reward(reward_input(["a", "bb"])).tolist() == [1, 2]


def test_a_lambda_needs_no_pickling_without_a_time_limit() -> None:
    reward = FunctionReward(lambda batch: [1.0] * len(batch))
    assert reward.name == "lambda"
    assert reward(reward_input(["a"])).tolist() == [1]


def test_a_lambda_with_a_time_limit_warns_that_it_has_none() -> None:
    reward = FunctionReward(lambda completion: len(completion), per_row=True, timeout=1)
    with pytest.warns(RuntimeWarning, match="can neither be timed out nor survive a crash"):
        assert reward(reward_input(["a", "bb"])).tolist() == [1, 2]


def test_coroutine_functions_and_objects_are_awaited() -> None:
    reward = FunctionReward(service)
    assert reward(reward_input(["1", "2"])).tolist() == [1, 2]
    assert reward(reward_input(["3"])).tolist() == [3]  # the loop lives on
    reward.close()
    assert reward(reward_input(["4"])).tolist() == [4]
    reward.close()
    judge = FunctionReward(Judge())
    assert judge.name == "Judge"
    assert judge(reward_input(["a"])).tolist() == [2]
    judge.close()


def test_an_async_reward_works_inside_a_running_loop() -> None:
    async def notebook_cell() -> list[float]:
        return FunctionReward(service)(reward_input(["1"])).tolist()

    assert asyncio.run(notebook_cell()) == [1]


def test_async_rows_run_at_the_same_time_and_fail_alone() -> None:
    reward = FunctionReward(row_service, per_row=True, timeout=1.0)
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match="could not score"):
        values = reward(reward_input(["0.3"] * 20 + ["raise", "raise timeout", "none", "30"]))
    assert time.monotonic() - started < 3  # one after the other would take 7 s and more
    assert values[:20].tolist() == [1] * 20
    assert values[20:].isnan().all()
    assert reward.failures == {"error": 2, "timeout": 1}
    reward.close()


def test_concurrency_is_bounded() -> None:
    running: list[int] = [0]
    most: list[int] = [0]

    async def count(completion: str) -> float:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.01)
        running[0] -= 1
        return 0.0

    reward = FunctionReward(count, per_row=True, concurrency=3)
    reward(reward_input(["a"] * 10))
    reward.close()
    assert most[0] == 3


@pytest.mark.filterwarnings("ignore:Reward")
def test_rows_of_a_sync_function_are_isolated_by_a_time_limit() -> None:
    reward = FunctionReward(misbehaving.verify, per_row=True, columns=["answer"], timeout=0.5, verifier=True)
    batch = reward_input(["42", "hang", "segfault", "raise", "41"], answer=[1, 2, 3, 4, 5])
    values = reward(batch)
    assert values[[0, 4]].tolist() == [1, 0]
    assert values[1:4].isnan().all()
    assert reward.failures == {"timeout": 1, "crash": 1, "error": 1}
    reward.close()


def test_a_batch_function_with_a_time_limit_loses_the_whole_batch() -> None:
    reward = FunctionReward(misbehaving.batch_pause, timeout=1.0)
    assert reward(reward_input(["0", "bb"])).tolist() == [1, 2]
    with pytest.warns(RuntimeWarning, match="timeout"):
        assert reward(reward_input(["30", "bb"])).isnan().all()
    assert reward.failures == {"timeout": 2}
    reward.close()


def test_a_batch_function_that_returns_too_few_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(2,\), received \(1,\)"):
        FunctionReward(lambda batch: [1.0])(reward_input(["a", "b"]))


@pytest.mark.filterwarnings("ignore:Reward")
def test_known_examples_are_checked() -> None:
    examples = [RewardExample("42", 1.0), RewardExample("41", 0.0)]
    FunctionReward(misbehaving.verify, per_row=True, examples=examples).self_test()

    def zero(completion: str) -> float:
        return 0.0

    def fails(completion: str) -> Any:
        raise ValueError

    for wrong in (zero, fails):
        with pytest.raises(RewardSelfTestError, match=wrong.__name__):
            FunctionReward(wrong, per_row=True, examples=examples).self_test()


@pytest.mark.parametrize("arguments", [{"timeout": 0.0}, {"timeout": math.nan}, {"concurrency": 0}])
def test_bad_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FunctionReward(lengths, **arguments)
