# SPDX-License-Identifier: Apache-2.0
"""A discrete-event simulation of rollouts: engines that decode many completions at once, and three ways to use them.

An engine with n completions makes one token of each in ``token_seconds + n * row_seconds``; a completion that starts
(or continues) first waits while its context is computed. Only completions that begin, end or are interrupted are
events, so a thousand engines are simulated in seconds.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

_SAME_TIME = 1e-9  # seconds between two events that count as one moment

Lengths = Callable[[int], list[int]]  # group number -> tokens of each of its completions


@dataclass(frozen=True)
class Setup:
    """Sizes and speeds.

    Args:
        engines: E, each a replica of the policy.
        slots: completions that one engine decodes at once.
        token_seconds: seconds of a decode step with an empty batch.
        row_seconds: what each completion in the batch adds to it.
        prefill_rate: tokens of context that are computed in a second.
        prompt_tokens: tokens of a prompt.
        groups: N, groups that a step trains.
        oversampling: M / N of partial rollouts.
        staleness: steps that asynchronous rollouts may be ahead.
        train_seconds: seconds of an update.
        sync_seconds: seconds in which weights go to the engines; they do not decode meanwhile.
    """

    engines: int = 1
    slots: int = 64
    token_seconds: float = 0.02
    row_seconds: float = 0.0
    prefill_rate: float = math.inf
    prompt_tokens: int = 0
    groups: int = 32
    oversampling: float = 2.0
    staleness: int = 1
    train_seconds: float = 30.0
    sync_seconds: float = 2.0

    def __post_init__(self) -> None:
        for name in ("engines", "slots", "groups", "token_seconds", "prefill_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.oversampling < 1 or self.staleness < 0:
            raise ValueError("oversampling must be at least 1 and staleness not negative.")


@dataclass
class _Engine:
    rows: int = 0  # completions that hold a slot
    decoding: int = 0  # of these, those whose context is there
    made: float = 0.0  # tokens that a completion would have, had it been decoding all the time
    since: float = 0.0  # when `made` was computed
    ends: list[tuple[float, int]] = field(default_factory=list)  # (value of `made` at the end, task)
    stamp: int = 0  # events with an older stamp no longer hold


class Cluster:
    """E engines with a common line of waiting completions (tasks), first come, first served."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = self.busy = 0.0  # busy: engine-seconds in which at least one slot was taken
        self.tokens = 0.0
        self._engines = [_Engine() for _ in range(setup.engines)]
        self._working, self._free = 0, [(0, e) for e in range(setup.engines)]
        self._waiting: deque[int] = deque()
        self._left: dict[int, float] = {}  # tokens that a task has to make
        self._context: dict[int, int] = {}
        self._place: dict[int, tuple[int, float | None]] = {}  # task -> (engine, `made` when its decoding began)
        self._events: list[tuple[float, int, int, int | None]] = []  # (time, engine, stamp, task that starts decoding)

    def submit(self, task: int, tokens: int, context: int = 0) -> None:
        """Put a completion in line: ``tokens`` to make after a context of that many tokens (prompt and prefix)."""
        self._left[task], self._context[task] = float(tokens), context
        self._waiting.append(task)

    def run(self, until: float = math.inf) -> list[int]:
        """Go on to the next moment at which completions end, and return them; [] if that is not before ``until``."""
        self._fill()
        while self._events:
            time, e, stamp, starts = self._events[0]
            engine = self._engines[e]
            if starts is None and stamp != engine.stamp:
                heapq.heappop(self._events)
                continue
            if time > until:
                break
            self._pass(time)
            if starts is None:
                return self._finished()
            heapq.heappop(self._events)
            if self._place.get(starts, (None,))[0] == e:
                self._begin(starts, e)
        if until < math.inf:
            self._pass(until)
        return []

    def abort(self) -> dict[int, int]:
        """Stop everything: whole tokens that each unfinished task has made since it was submitted."""
        made: dict[int, int] = {}
        for task in (*self._place, *self._waiting):
            e, began = self._place.get(task, (0, None))
            self._advance(e)
            tokens = 0.0 if began is None else self._engines[e].made - began
            made[task] = int(tokens + 1e-6)
            self.tokens += made[task]
        self._place.clear()
        self._waiting.clear()
        self._left.clear()
        self._events.clear()
        for engine in self._engines:
            engine.rows = engine.decoding = 0
            engine.ends.clear()
            engine.stamp += 1
        self._working, self._free = 0, [(0, e) for e in range(len(self._engines))]
        return made

    def rest(self, seconds: float) -> None:
        """Let time pass in which no engine decodes; none may be at work."""
        assert not self._working, "engines are at work"
        self._pass(self.now + seconds)

    def _pass(self, time: float) -> None:
        self.busy += self._working * (time - self.now)
        self.now = time

    def _fill(self) -> None:
        """Give free slots to those that wait, on the engine with the fewest completions."""
        while self._waiting and self._free:
            rows, e = self._free[0]
            engine = self._engines[e]
            if rows != engine.rows or rows >= self.setup.slots:  # outdated, or full
                heapq.heappop(self._free)
                continue
            task = self._waiting.popleft()
            self._working += engine.rows == 0
            engine.rows += 1
            heapq.heapreplace(self._free, (engine.rows, e))
            self._place[task] = (e, None)
            delay = self._context[task] / self.setup.prefill_rate
            if delay:
                heapq.heappush(self._events, (self.now + delay, e, 0, task))
            else:
                self._begin(task, e)

    def _begin(self, task: int, e: int) -> None:
        self._advance(e)
        engine = self._engines[e]
        engine.decoding += 1
        self._place[task] = (e, engine.made)
        heapq.heappush(engine.ends, (engine.made + self._left[task], task))
        self._announce(e)

    def _advance(self, e: int) -> None:
        engine = self._engines[e]
        if engine.decoding:
            engine.made += (self.now - engine.since) / self._step(engine)
        engine.since = self.now

    def _step(self, engine: _Engine) -> float:
        return self.setup.token_seconds + engine.decoding * self.setup.row_seconds

    def _seconds_left(self, engine: _Engine) -> float:
        """Until the next completion of an engine ends, if none begins; rounding of token counts aside."""
        left = engine.ends[0][0] - engine.made
        return left * self._step(engine) if left > 1e-6 else 0.0

    def _announce(self, e: int) -> None:
        """Predict the next end on an engine."""
        engine = self._engines[e]
        engine.stamp += 1
        if engine.ends:
            heapq.heappush(self._events, (self.now + self._seconds_left(engine), e, engine.stamp, None))

    def _finished(self) -> list[int]:
        """Take everything that ends now off its engine."""
        done: list[int] = []
        while self._events:
            time, e, stamp, starts = self._events[0]
            engine = self._engines[e]
            if starts is None and stamp != engine.stamp:
                heapq.heappop(self._events)
            elif starts is None and time <= self.now + _SAME_TIME:
                heapq.heappop(self._events)
                self._advance(e)
                while engine.ends and self._seconds_left(engine) <= 2 * _SAME_TIME:
                    _, task = heapq.heappop(engine.ends)
                    done.append(task)
                    self.tokens += self._left.pop(task)
                    del self._place[task]
                    engine.decoding -= 1
                    engine.rows -= 1
                self._working -= engine.rows == 0
                heapq.heappush(self._free, (engine.rows, e))
                self._announce(e)
            else:
                break
        return sorted(done)


@dataclass
class Group:
    """The completions of one prompt: tokens each has to make, and segments (version, tokens) each has made."""

    number: int
    lengths: list[int]
    segments: list[list[tuple[int, int]]]

    @classmethod
    def new(cls, number: int, lengths: Lengths) -> Group:
        tokens = lengths(number)
        return cls(number, tokens, [[] for _ in tokens])

    def made(self, i: int) -> int:
        """Tokens of a completion so far."""
        return sum(tokens for _, tokens in self.segments[i])


@dataclass
class Outcome:
    """What a schedule is expected to do, per step, in the steady state."""

    seconds: float
    engines_idle: float
    trainer_idle: float
    off_policy: float
    staleness: float
    staleness_max: int
    tokens: float

    def row(self) -> dict[str, float]:
        """As a row of a table."""
        return {
            "step [s]": self.seconds,
            "engines idle [%]": 100 * self.engines_idle,
            "trainer idle [%]": 100 * self.trainer_idle,
            "off-policy tokens [%]": 100 * self.off_policy,
            "staleness": self.staleness,
            "oldest": self.staleness_max,
        }


class Recorder:
    """Collects steps after a warm-up.

    Args:
        setup: the setup.
        warm_up: steps that do not count.
    """

    def __init__(self, setup: Setup, warm_up: int) -> None:
        self.setup, self.warm_up = setup, warm_up
        self.steps = self.tokens = self.stale = self.age = self.oldest = 0
        self.began = self.busy = 0.0

    def start(self, step: int, now: float, busy: float) -> None:
        """A step begins; the clocks of the first that counts are where measuring starts."""
        if step == self.warm_up:
            self.began, self.busy = now, busy

    def train(self, step: int, segments: Iterable[tuple[int, int]]) -> None:
        """A step trains (version, tokens) segments; its own version is its number."""
        if step < self.warm_up:
            return
        self.steps += 1
        for version, tokens in segments:
            age = step - version
            self.tokens += tokens
            self.stale += tokens * (age > 0)
            self.age += tokens * age
            self.oldest = max(self.oldest, age if tokens else 0)

    def outcome(self, now: float, busy: float) -> Outcome:
        """The averages."""
        seconds = (now - self.began) / self.steps
        trained = self.setup.train_seconds + self.setup.sync_seconds
        tokens = max(self.tokens, 1)
        return Outcome(
            seconds=seconds,
            engines_idle=1 - (busy - self.busy) / (now - self.began) / self.setup.engines,
            trainer_idle=1 - trained / seconds,
            off_policy=self.stale / tokens,
            staleness=self.age / tokens,
            staleness_max=self.oldest,
            tokens=self.tokens / self.steps,
        )


def _submit(cluster: Cluster, groups: Iterable[Group]) -> dict[int, tuple[Group, int]]:
    """Put what groups have still to make in line. Returns task -> (group, completion)."""
    tasks: dict[int, tuple[Group, int]] = {}
    for group in groups:
        for i, length in enumerate(group.lengths):
            made = group.made(i)
            if made < length:
                tasks[len(tasks)] = group, i
                cluster.submit(len(tasks) - 1, length - made, cluster.setup.prompt_tokens + made)
    return tasks


def generate(cluster: Cluster, groups: list[Group], wanted: int, version: int) -> list[Group]:
    """Decode until ``wanted`` groups are complete and stop. Returns the complete ones; segments are added to all."""
    tasks = _submit(cluster, groups)
    open_members = {id(g): 0 for g in groups}
    for group, _ in tasks.values():
        open_members[id(group)] += 1
    complete = sum(n == 0 for n in open_members.values())
    while complete < wanted:
        for task in cluster.run():
            group, i = tasks.pop(task)
            group.segments[i].append((version, group.lengths[i] - group.made(i)))
            open_members[id(group)] -= 1
            complete += open_members[id(group)] == 0
    for task, made in cluster.abort().items():
        group, i = tasks[task]
        if made:
            group.segments[i].append((version, made))
    return [g for g in groups if open_members[id(g)] == 0]


def partial(setup: Setup, lengths: Lengths, steps: int = 20, warm_up: int = 3) -> Outcome:
    """Partial rollouts: M groups run, generation stops at N, the rest goes on first in the next step."""
    cluster, recorder = Cluster(setup), Recorder(setup, warm_up)
    buffer: list[Group] = []
    drawn, size = 0, math.ceil(setup.oversampling * setup.groups - 1e-9)
    for step in range(warm_up + steps):
        recorder.start(step, cluster.now, cluster.busy)
        pool = buffer[:size]
        fresh = size - len(pool)
        pool += [Group.new(drawn + i, lengths) for i in range(fresh)]
        drawn += fresh
        done = generate(cluster, pool, setup.groups, step)[: setup.groups]
        chosen = {id(g) for g in done}
        buffer = [g for g in pool if id(g) not in chosen] + buffer[size:]
        recorder.train(step, _segments(done))
        cluster.rest(setup.train_seconds + setup.sync_seconds)
    return recorder.outcome(cluster.now, cluster.busy)


def synchronous(setup: Setup, lengths: Lengths, steps: int = 20, warm_up: int = 3) -> Outcome:
    """Every step waits for the longest completion of its batch."""
    return partial(replace(setup, oversampling=1.0), lengths, steps, warm_up)


def asynchronous(setup: Setup, lengths: Lengths, steps: int = 20, warm_up: int = 3) -> Outcome:
    """Batches are sampled one after the other, up to ``staleness`` ahead of the trainer (as `AsyncSampler` does).

    Batch j may begin when step j - staleness begins; the engines take new weights between two batches.
    """
    cluster, recorder = Cluster(setup), Recorder(setup, warm_up)
    begins: list[float] = []  # when each step begins to wait for its batch
    synced: list[float] = []  # when the weights after each step are there
    loaded, now = 0, 0.0
    for step in range(warm_up + steps):
        recorder.start(step, now, cluster.busy)
        begins.append(now)
        start = max(cluster.now, begins[max(0, step - setup.staleness)])
        version = sum(time <= start for time in synced)
        cluster.rest(start - cluster.now + (setup.sync_seconds if version > loaded else 0.0))
        loaded = version
        groups = [Group.new(step * setup.groups + i, lengths) for i in range(setup.groups)]
        recorder.train(step, _segments(generate(cluster, groups, setup.groups, version)))
        now = max(now, cluster.now) + setup.train_seconds + setup.sync_seconds
        synced.append(now)
    return recorder.outcome(now, cluster.busy)


SCHEDULES = {"synchronous": synchronous, "partial": partial, "asynchronous": asynchronous}


def _segments(groups: Iterable[Group]) -> Iterator[tuple[int, int]]:
    for group in groups:
        for segments in group.segments:
            yield from segments


def long_tailed(
    mean: float = 2000.0,
    between: float = 0.6,
    within: float = 0.5,
    limit: int = 16384,
    group_size: int = 8,
    seed: int = 0,
) -> Lengths:
    """Log-normal lengths cut at a budget: prompts differ by ``between``, completions of a prompt by ``within``.

    Args:
        mean: mean length before the cut.
        between: standard deviation of a prompt's mean log-length.
        within: standard deviation of log-lengths around it.
        limit: budget of a completion.
        group_size: G, completions of a prompt.
        seed: decides everything.
    """
    center = math.log(mean) - (between**2 + within**2) / 2

    def lengths(group: int) -> list[int]:
        rng = random.Random(f"{seed}/{group}")
        level = rng.gauss(center, between)
        return [max(1, min(limit, round(math.exp(rng.gauss(level, within))))) for _ in range(group_size)]

    return lengths
