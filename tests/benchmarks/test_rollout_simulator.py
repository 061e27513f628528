# SPDX-License-Identifier: Apache-2.0
"""The simulator against cases that can be computed by hand, and against the samplers that it speaks of."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.rollout_simulator import (
    Cluster,
    Group,
    Setup,
    asynchronous,
    generate,
    long_tailed,
    partial,
    synchronous,
)
from benchmarks.simulate_rollouts import check, logged

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))

TOY = (2, 3, 9, 10, 4, 12, 5, 1)
TICK = Setup(slots=100, token_seconds=1.0, groups=2, train_seconds=0.0, sync_seconds=0.0)


def ends(setup: Setup, *tasks: tuple[int, int] | int) -> list[tuple[float, list[int]]]:
    """When tasks (tokens, or tokens and context) end that are submitted together."""
    cluster, out = Cluster(setup), []
    for i, task in enumerate(tasks):
        cluster.submit(i, *(task if isinstance(task, tuple) else (task,)))
    while done := cluster.run():
        out.append((pytest.approx(cluster.now), done))
    return out


# --- engines ---------------------------------------------------------------------------------------------------------


def test_completions_that_decode_together_end_by_their_length():
    assert ends(TICK, 2, 5, 2) == [(2, [0, 2]), (5, [1])]


def test_each_completion_in_the_batch_slows_the_others_down():
    """Two rows: 2 s a token until the first ends at 4 s; alone 1.5 s a token for the other two."""
    assert ends(replace(TICK, row_seconds=0.5), 2, 4) == [(4, [0]), (7, [1])]


def test_who_finds_no_slot_waits_for_the_first_that_is_free():
    assert ends(replace(TICK, slots=1), 2, 3) == [(2, [0]), (5, [1])]
    assert ends(replace(TICK, slots=1, engines=2), 5, 1, 1, 1) == [(1, [1]), (2, [2]), (3, [3]), (5, [0])]


def test_a_context_is_computed_first_and_does_not_slow_others_down():
    setup = replace(TICK, prefill_rate=10.0, row_seconds=1.0)
    assert ends(setup, (3, 20)) == [(2 + 3 * 2, [0])]
    # the first decodes alone (2 s a token) for 4 s, then both (3 s a token)
    assert ends(setup, 4, (1, 40)) == [(4 + 3, [1]), (7 + 2, [0])]


def test_what_was_made_when_everything_stops():
    cluster = Cluster(replace(TICK, slots=2, prefill_rate=10.0))
    for task, (tokens, context) in enumerate([(9, 0), (9, 25), (9, 0)]):
        cluster.submit(task, tokens, context)
    assert cluster.run(until=4.0) == []
    assert cluster.now == 4
    assert cluster.abort() == {0: 4, 1: 1, 2: 0}
    assert cluster.tokens == 5
    cluster.rest(6.0)
    assert (cluster.now, cluster.busy) == (10, 4)
    cluster.submit(7, 3)
    assert cluster.run() == [7]
    assert cluster.now == 13


def test_an_engine_is_busy_while_it_has_work():
    cluster = Cluster(replace(TICK, engines=3))
    for task, tokens in enumerate((4, 6)):
        cluster.submit(task, tokens)
    while cluster.run():
        pass
    assert cluster.busy == 4 + 6


# --- schedules -------------------------------------------------------------------------------------------------------


def test_the_published_toy_schedule():
    """APRIL: stop times 3, 6, 1; trained lengths {2, 3}, {9, 4}, {10, 1}; off-policy tokens 0/5, 3/13, 9/11."""
    cluster, pool, seen = Cluster(TICK), [], []
    for step in range(3):
        pool = pool + [Group(n, [TOY[n]], [[]]) for n in range(4 + 2 * (step - 1) if step else 0, 4 + 2 * step)]
        before = cluster.now
        done = generate(cluster, pool, 2, step)
        stale = sum(tokens for g in done for version, tokens in g.segments[0] if version < step)
        seen.append((cluster.now - before, [g.lengths[0] for g in done], stale))
        pool = [g for g in pool if g not in done]
        assert len(pool) == 2
    assert seen == [(3, [2, 3], 0), (6, [9, 4], 3), (1, [10, 1], 9)]


def test_synchronous_steps_wait_for_the_longest():
    outcome = synchronous(TICK, lambda n: [TOY[n]], steps=3, warm_up=0)
    assert outcome.seconds == pytest.approx((3 + 10 + 12) / 3)
    assert (outcome.off_policy, outcome.staleness_max) == (0, 0)
    assert outcome.engines_idle == pytest.approx(0)
    assert outcome.tokens == pytest.approx(sum(TOY[:6]) / 3)
    trained = synchronous(replace(TICK, train_seconds=4.0, sync_seconds=1.0), lambda n: [TOY[n]], steps=3, warm_up=0)
    assert trained.seconds == pytest.approx(25 / 3 + 5)
    assert trained.trainer_idle == pytest.approx(25 / 40)
    assert trained.engines_idle == pytest.approx(15 / 40)


def test_partial_steps_stop_at_the_number_wanted():
    outcome = partial(TICK, lambda n: [TOY[n]], steps=3, warm_up=0)
    assert outcome.seconds == pytest.approx((3 + 6 + 1) / 3)
    assert outcome.off_policy == pytest.approx((0 + 3 + 9) / (5 + 13 + 11))
    assert outcome.staleness_max == 2
    # 10 was drawn in step 0: 3 tokens of it are two versions old in step 2, 6 are one version old
    assert outcome.staleness == pytest.approx((3 * 1 + 3 * 2 + 6 * 1) / 29)


def constant(tokens: int):
    return lambda number: [tokens, tokens]


@pytest.mark.parametrize(
    ("generation", "training", "ahead", "seconds", "age"),
    [
        (10, 4, 0, 14, 0),  # nothing overlaps
        (10, 4, 1, 10, 1),  # the engines never wait
        (4, 10, 1, 10, 1),  # the trainer never waits
        (6, 6, 1, 6, 1),
        (10, 4, 2, 10, 1),  # two ahead are allowed, but the engines are the bottleneck
        (4, 10, 3, 10, 3),
    ],
)
def test_asynchronous_steps_take_as_long_as_the_slower_side(generation, training, ahead, seconds, age):
    setup = replace(TICK, train_seconds=float(training), staleness=ahead)
    outcome = asynchronous(setup, constant(generation), steps=10, warm_up=5)
    assert outcome.seconds == pytest.approx(seconds)
    assert outcome.staleness == pytest.approx(age)
    assert outcome.trainer_idle == pytest.approx(1 - training / seconds)
    assert outcome.engines_idle == pytest.approx(1 - generation / seconds)


def test_taking_new_weights_costs_the_engines_and_the_trainer_a_moment():
    setup = replace(TICK, train_seconds=4.0, sync_seconds=1.0)
    assert asynchronous(setup, constant(10), steps=10, warm_up=5).seconds == pytest.approx(11)
    assert asynchronous(setup, constant(2), steps=10, warm_up=5).seconds == pytest.approx(5)


@pytest.mark.parametrize("seed", range(3))
def test_partial_rollouts_stop_when_the_sampler_does(seed):
    from scripted_sampler import ScriptedSampler, Steps

    from lit_rl.samplers import PartialSampler

    rng = random.Random(seed)
    known = [[rng.randint(1, 30) for _ in range(2)] for _ in range(100)]
    oversampling = rng.choice([1.0, 1.5, 2.0])
    inner = ScriptedSampler(lambda draw, sample: known[draw][sample])
    run = Steps(PartialSampler(inner, oversampling=oversampling), group_size=2)
    stale = tokens = 0
    for step in range(8):
        rollouts = run.step(3)
        age = step - rollouts.token["policy_version"]
        stale += int(((age > 0) & rollouts.completion_mask).sum())
        tokens += int(rollouts.lengths.sum())
    setup = replace(TICK, groups=3, oversampling=oversampling)
    outcome = partial(setup, lambda n: known[n], steps=8, warm_up=0)
    assert outcome.seconds * 8 == pytest.approx(inner.ticks)
    assert outcome.tokens * 8 == tokens
    assert outcome.off_policy == pytest.approx(stale / tokens)


def test_decode_steps_of_real_runs_are_those_of_the_simulation():
    rows = check(rounds=3, groups=3, group_size=2, max_tokens=40).rows
    assert [row["schedule"] for row in rows] == ["synchronous", "partial"]
    for row in rows:
        assert row["decode steps"] == row["simulated steps"] > 0
        assert row["simulated seconds"] > 0
    assert rows[1]["decode steps"] < rows[0]["decode steps"]


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_the_long_tailed_law_has_its_mean_its_limit_and_its_seed():
    law = long_tailed(mean=500, between=0.6, within=0.5, limit=10**9, group_size=4, seed=1)
    lengths = [x for n in range(5000) for x in law(n)]
    assert sum(lengths) / len(lengths) == pytest.approx(500, rel=0.05)
    spread = [math.log(x) for x in lengths]
    mean = sum(spread) / len(spread)
    std = math.sqrt(sum((x - mean) ** 2 for x in spread) / len(spread))
    assert std == pytest.approx(math.hypot(0.6, 0.5), rel=0.05)
    assert law(7) == long_tailed(mean=500, limit=10**9, group_size=4, seed=1)(7)
    assert max(max(long_tailed(mean=500, limit=600)(n)) for n in range(200)) == 600


def test_lengths_of_a_logged_run_keep_their_groups(tmp_path):
    for file, rows in {"a": [(0, 5), (0, 7), (1, 90)], "b": [(0, 3), (0, 4)]}.items():
        lines = [json.dumps({"group": g, "lengths": n, "prompt": "x"}) for g, n in rows]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    lengths = logged(tmp_path, group_size=2)
    found = {tuple(lengths(n)) for n in range(200)}
    assert found == {(5, 7), (90, 90), (3, 4)}
    assert lengths(3) == logged(tmp_path, group_size=2)(3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no logged completions"):
        logged(tmp_path / "empty", group_size=2)


def test_a_thousand_engines_are_simulated_in_seconds():
    setup = Setup(engines=1000, groups=1000, slots=16)
    outcome = synchronous(setup, long_tailed(group_size=4), steps=2, warm_up=0)
    assert 0 < outcome.engines_idle < 1


def test_impossible_setups_are_refused():
    for name in ("engines", "slots", "groups", "token_seconds"):
        with pytest.raises(ValueError, match=name):
            replace(TICK, **{name: 0})
    with pytest.raises(ValueError, match="oversampling"):
        replace(TICK, oversampling=0.9)
