# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: what trains, what is context, where they end, and what a failing environment costs."""

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from contract import contract
from sampler_models import byte_tokenizer, prompts, tiny_model
from scripted_sampler import ScriptedSampler

from lit_rl.environments import CalculatorEnvironment, Environment, Episode, GymnasiumEnvironment, Turn
from lit_rl.policies import completion_logprobs
from lit_rl.rollouts import Rollouts, StopReason
from lit_rl.samplers import EnvironmentSampler, HFSampler, RolloutRequest, RolloutSampler, Sampling
from lit_rl.testing import make_module, make_policy, train


class Writer(RolloutSampler):
    """Writes what the test says: turn ``k`` of sample ``s`` is ``turns(s)[k]``, then the end-of-sequence token.

    A turn that ends in a stop string has no such token.
    """

    def __init__(self, turns: Callable[[int], list[str]]) -> None:
        self.turns = turns
        self.requests: list[RolloutRequest] = []
        self.turn: dict[int, int] = {}

    def submit(self, request: RolloutRequest) -> None:
        self.requests.append(request)

    def collect(self) -> Rollouts:
        request, out, reasons, starts = self.requests[-1], [], [], []
        for i, sample in enumerate(request.sample.tolist()):
            start = int(request.prefix.lengths[i]) if request.prefix is not None else 0
            before = request.prefix.completion_ids[i, :start].tolist() if start else []
            text = self.turns(sample)[self.turn.get(sample, 0)]
            self.turn[sample] = self.turn.get(sample, 0) + 1
            stopped = any(text.endswith(s) for s in request.sampling.stop)
            ids = self.tokenizer(text)["input_ids"] + ([] if stopped else [self.tokenizer.eos_token_id])
            room = int(request.budgets[i]) - start
            reasons.append(StopReason.LENGTH if len(ids) > room else StopReason.STOP if stopped else StopReason.END)
            out.append(torch.tensor(before + ids[:room]))
            starts.append(start)
        rollouts = Rollouts.build(
            request.prompts,
            request.group,
            out,
            sampler_logprobs=[torch.full((len(x),), -1.0) for x in out],
            stop_reason=torch.tensor([int(r) for r in reasons]),
            sample=request.sample,
            policy_version=self.policy_version,
        )
        for i, s in enumerate(starts):
            for name in ("completion_mask", "loss_weights", "policy_version", "logprobs.sampler"):
                rollouts.token[name][i, :s] = request.prefix.token[name][i, :s] if s else 0
        return rollouts


def play(environment: Environment, turns, tokenizer, rows=1, max_tokens=60, wanted=None, **options) -> Rollouts:
    """One prompt, ``rows`` completions; ``turns`` are those of every row, or a function of the row."""
    writer = Writer(turns if callable(turns) else lambda sample: turns)
    sampler = EnvironmentSampler(environment, writer, **options)
    sampler.setup(None, tokenizer)
    request = RolloutRequest.for_groups(prompts([5, 6]), rows, Sampling(max_tokens=max_tokens), seed=0, wanted=wanted)
    rollouts = sampler.sample(request)
    rollouts.sampler, rollouts.writer = sampler, writer  # for the test to look at
    return rollouts


def text_of(rollouts: Rollouts, tokenizer, mask: bool) -> list[str]:
    """What the policy (``mask``) or the environment wrote, row by row."""
    out = []
    for row, ids in enumerate(rollouts.completions()):
        where = rollouts.completion_mask[row, : len(ids)].tolist()
        out.append(tokenizer.decode([t for t, m in zip(ids, where) if m == mask], skip_special_tokens=True))
    return out


CALCULATOR = CalculatorEnvironment(opening="?", closing="=", result="{}.")


class Scripted(Environment):
    """Answers with the given turns; a turn may be an exception to raise or a function to call."""

    def __init__(self, *turns, opening="", gives_rewards=False) -> None:
        self.turns, self.first, self.gives_rewards = turns, opening, gives_rewards
        self.started: list[tuple[dict, int]] = []
        self.closed = 0

    def start(self, record, seed):
        self.started.append((record, seed))
        return _Scripted(self)


class _Scripted(Episode):
    def __init__(self, environment: Scripted) -> None:
        self.environment, self.turns = environment, iter(environment.turns)

    def opening(self):
        return self.environment.first

    def step(self, text):
        turn = next(self.turns)
        if isinstance(turn, Exception):
            raise turn
        return turn(text) if callable(turn) else turn

    def close(self):
        self.environment.closed += 1


# --- turns -----------------------------------------------------------------------------------------------------------


def test_the_calculator_answers_between_two_turns(tokenizer):
    rollouts = play(CALCULATOR, ["so ?7+2=", "?9+9=", "18 it is"], tokenizer)
    assert text_of(rollouts, tokenizer, True) == ["so ?7+2=?9+9=18 it is"]
    assert text_of(rollouts, tokenizer, False) == ["9.18."]
    assert tokenizer.decode(rollouts.completions()[0][:-1]) == "so ?7+2=9.?9+9=18.18 it is"
    assert rollouts.completions()[0][-1] == tokenizer.eos_token_id
    assert rollouts.finished.tolist() == [True]
    assert rollouts.row["stop_reason"].tolist() == [StopReason.END]


def test_what_the_environment_says_is_context_and_does_not_train(tokenizer):
    rollouts = play(CALCULATOR, ["?7+2=", "ok"], tokenizer)
    model = [True] * 5 + [False] * 2 + [True] * 3
    assert rollouts.completion_mask[0].tolist() == model
    assert rollouts.loss_weights[0].tolist() == [float(m) for m in model]
    assert rollouts.logprobs["sampler"][0].tolist() == [-1.0 if m else 0.0 for m in model]
    assert rollouts.lengths.tolist() == [10]
    assert rollouts.generated.tolist() == [8]


def test_rows_that_are_done_wait_for_the_others(tokenizer):
    turns = {0: ["done"], 1: ["?1+1=", "?2+2=", "four"], 2: ["?3+3=", "six"]}
    rollouts = play(CALCULATOR, turns.get, tokenizer, rows=3)
    assert text_of(rollouts, tokenizer, True) == ["done", "?1+1=?2+2=four", "?3+3=six"]
    assert [r.sample.tolist() for r in rollouts.writer.requests] == [[0, 1, 2], [1, 2], [1]]
    assert rollouts.row["sample"].tolist() == [0, 1, 2]


def test_an_episode_that_is_done_is_not_asked_again(tokenizer):
    asked = []
    answer = lambda text: asked.append(text) or Turn("ok.", done=text == "done")  # noqa: E731
    turns = {0: ["done"], 1: ["more", "done"]}
    rollouts = play(Scripted(answer, answer, answer), turns.get, tokenizer, rows=2, workers=1)
    assert asked == ["done", "more", "done"]
    assert rollouts.finished.all()


def test_an_opening_follows_the_prompt(tokenizer):
    rollouts = play(Scripted(Turn(done=True), opening="hello."), ["hi"], tokenizer)
    assert rollouts.completion_mask[0].tolist() == [False] * 6 + [True] * 3
    assert tokenizer.decode(rollouts.completions()[0][:8]) == "hello.hi"


def test_an_episode_knows_its_record_and_has_a_seed_of_its_own(tokenizer):
    environments = [Scripted(Turn(done=True)) for _ in range(2)]
    for environment in environments:
        play(environment, ["x"], tokenizer, rows=3)
    assert environments[0].started == environments[1].started
    seeds = [seed for _, seed in environments[0].started]
    assert len(set(seeds)) == 3
    assert environments[0].started[0][0] == {"prompt": "", "source": "test", "uid": 0}
    assert environments[0].closed == 3


def test_the_environment_of_the_documentation_works(tokenizer):
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    names: dict = {}
    exec(code, names)

    class WithAnswer(names["Oracle"]):
        def start(self, record, seed):
            return super().start({"answer": "7"}, seed)

    rollouts = play(WithAnswer(), ["is it 5?", "is it 7?", "7"], tokenizer)
    assert text_of(rollouts, tokenizer, False) == [" no. yes."]
    assert rollouts.finished.all()


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_leaves_no_room_ends_the_completion(tokenizer):
    for max_tokens, reason in ((8, StopReason.END), (7, StopReason.LENGTH), (6, StopReason.LENGTH)):
        rollouts = play(CALCULATOR, ["?7+2=", ""], tokenizer, max_tokens=max_tokens)
        assert rollouts.row["stop_reason"].tolist() == [reason]
        assert int(rollouts.lengths) == (8 if reason == StopReason.END else 5)
        assert bool(rollouts.finished) == (reason == StopReason.END)


def test_the_budget_of_a_turn(tokenizer):
    rollouts = play(CALCULATOR, ["?7+2=", "longer than five"], tokenizer, turn_tokens=5)
    assert [r.budgets.tolist() for r in rollouts.writer.requests] == [[5], [12]]
    assert rollouts.row["stop_reason"].tolist() == [StopReason.LENGTH]
    assert text_of(rollouts, tokenizer, True) == ["?7+2=longe"]
    rollouts = play(CALCULATOR, ["?7+2=", "longer than five"], tokenizer, turn_tokens=5, max_tokens=9)
    assert [r.budgets.tolist() for r in rollouts.writer.requests] == [[5], [9]], "nor more than is left of the whole"


def test_the_number_of_turns_is_bounded(tokenizer):
    rollouts = play(CALCULATOR, ["?1+1="] * 9, tokenizer, max_turns=3)
    assert len(rollouts.writer.requests) == 3
    assert rollouts.row["stop_reason"].tolist() == [StopReason.LENGTH]
    assert tokenizer.decode(rollouts.completions()[0]) == "?1+1=2.?1+1=2.?1+1=", "nothing follows the last answer"


def test_a_turn_that_was_cut_is_not_given_to_the_environment(tokenizer):
    environment = Scripted(AssertionError("must not be asked"))
    rollouts = play(environment, ["too long for this"], tokenizer, max_tokens=4)
    assert rollouts.row["stop_reason"].tolist() == [StopReason.LENGTH]


# --- rewards and failures --------------------------------------------------------------------------------------------


def test_rewards_are_summed_over_the_turns(tokenizer):
    turns = (Turn("a", reward=0.5), Turn("b"), Turn(done=True, reward=2.0))
    rollouts = play(Scripted(*turns, gives_rewards=True), ["x", "y", "z"], tokenizer, reward_weight=2.0, verifier=True)
    assert rollouts.reward_terms["environment"].tolist() == [2.5]
    assert rollouts.rewards.tolist() == [5.0]
    assert rollouts.correct.tolist() == [2.5]
    assert rollouts.sampler.provides >= {"rewards", "correct"}


def test_an_episode_without_a_reward_is_not_scorable(tokenizer):
    rollouts = play(Scripted(Turn(done=True), gives_rewards=True), ["x"], tokenizer)
    assert rollouts.rewards.isnan().all()


def test_an_episode_that_a_budget_ends_may_have_a_reward_for_it(tokenizer):
    class Costly(_Scripted):
        def cut(self):
            return -1.0

    class Shop(Scripted):
        def start(self, record, seed):
            return Costly(self)

    environment = Shop(Turn("a", reward=3.0), Turn("b", reward=0.5), gives_rewards=True)
    assert play(environment, ["x", "y"], tokenizer, max_turns=2).rewards.tolist() == [2.5], "no turn is left"
    assert play(environment, ["x", "long"], tokenizer, max_tokens=6).rewards.tolist() == [2.0], "no token is left"
    assert play(environment, ["long"], tokenizer, turn_tokens=2).rewards.tolist() == [-1.0]


def test_what_was_earned_before_a_failure_does_not_count(tokenizer):
    environment = Scripted(Turn("a", reward=3.0), RuntimeError("broken"), gives_rewards=True)
    with pytest.warns(RuntimeWarning, match="broken"):
        rollouts = play(environment, ["x", "y"], tokenizer, verifier=True)
    assert rollouts.rewards.isnan().all()
    assert rollouts.correct.isnan().all()


FAILURES = {
    "raises": (RuntimeError("broken"), "error"),
    "returns no turn": (lambda text: "text", "error"),
    "returns no text": (Turn(observation=7), "error"),
    "returns an infinite reward": (Turn(reward=math.inf), "error"),
    "hangs": (lambda text: time.sleep(30), "timeout"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_environment_loses_its_row_and_no_other(tokenizer, name):
    bad, kind = FAILURES[name]

    class Sometimes(Environment):
        gives_rewards = True

        def start(self, record, seed):
            self.rows = getattr(self, "rows", -1) + 1
            return Scripted(bad if self.rows == 1 else Turn(done=True, reward=1.0)).start(record, seed)

    with pytest.warns(RuntimeWarning, match=rf"Sometimes failed \({kind}\)"):
        rollouts = play(Sometimes(), ["hello"], tokenizer, rows=3, timeout=0.3, workers=1, wanted=1)
    assert rollouts.row["stop_reason"].tolist() == [StopReason.END, StopReason.ERROR, StopReason.END]
    rewards = rollouts.rewards.tolist()
    assert rewards[0] == rewards[2] == 1.0
    assert math.isnan(rewards[1])
    assert rollouts.loss_weights.sum(1).tolist() == [6, 0, 6]
    numbers = rollouts.sampler.metrics(rollouts)
    assert numbers[f"environment_{kind}"] == 1
    assert rollouts.sampler.metrics(rollouts)[f"environment_{kind}"] == 0


def test_an_episode_that_hangs_is_left_to_its_thread(tokenizer):
    environment = Scripted(lambda text: time.sleep(30))
    with pytest.warns(RuntimeWarning, match="took longer than 0.2 s"):
        play(environment, ["x"], tokenizer, timeout=0.2)
    assert environment.closed == 0


def test_a_failure_at_the_start_and_without_rewards_of_its_own(tokenizer):
    class Broken(Environment):
        def start(self, record, seed):
            raise ConnectionError("no server")

    with pytest.warns(RuntimeWarning, match="no server"):
        rollouts = play(Broken(), ["x"], tokenizer, rows=2)
    assert rollouts.rewards.isnan().all()
    assert rollouts.row["stop_reason"].tolist() == [StopReason.ERROR] * 2
    assert not rollouts.lengths.any()


def test_a_failed_row_is_not_scorable_under_the_methods_own_rewards(tmp_path):
    """Also where those would find something to score, and it enters no baseline."""
    seen = []

    class Fails(Environment):
        def start(self, record, seed):
            return Scripted(RuntimeError("x") if seed % 2 else Turn(done=True)).start(record, seed)

    module = make_module(
        make_policy(tmp_path / "policy"),
        sampler=EnvironmentSampler(Fails()),
        sampling=Sampling(max_tokens=6, stop_token_ids=list(range(14))),
        max_rollouts=1,
    )
    score = module.score
    module.score = lambda rollouts: seen.append(score(rollouts)) or seen[-1]
    with pytest.warns(RuntimeWarning, match="failed"):
        train(tmp_path, module)
    failed = seen[0].row["stop_reason"] == StopReason.ERROR
    assert failed.any()
    assert not failed.all()
    for values in (seen[0].rewards, seen[0].correct):
        assert torch.equal(values.isnan(), failed)
    assert not module.last_rollouts.advantages[failed].any()


def test_a_hanging_call_does_not_hold_up_the_others():
    from lit_rl.environments.calls import call_all

    release = threading.Event()
    calls = [lambda: 1, release.wait, lambda: 1 / 0, lambda: 4]
    began = time.monotonic()
    outcomes = call_all(calls, timeout=0.3, workers=2)
    assert time.monotonic() - began < 5
    release.set()
    assert [o.failure for o in outcomes] == [None, "timeout", "error", None]
    assert [outcomes[0].value, outcomes[3].value] == [1, 4]
    assert call_all([], 1.0, 2) == []


# --- chat ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def test_messages_make_the_sequence_that_the_chat_template_would_make():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    environment = Scripted(Turn([{"role": "tool", "content": "9 </s>"}]), Turn(done=True))
    rollouts = play(environment, ["the call", "the answer"], tokenizer, max_tokens=200)
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "the call"},
            {"role": "tool", "content": "9 </s>"},
            {"role": "assistant", "content": "the answer"},
        ],
        tokenize=False,
    )
    prompt = "<bos>user\nQ<eos>\n<bos>assistant\n"
    assert prompt + tokenizer.decode(rollouts.completions()[0]) + "\n" == whole
    assert text_of(rollouts, tokenizer, True) == ["the callthe answer"]


def test_a_turn_that_a_stop_string_ended_is_closed_by_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    environment = Scripted(Turn([{"role": "tool", "content": "9"}]), Turn(done=True))
    environment.stop = ("=",)
    rollouts = play(environment, ["1+8=", "nine"], tokenizer, max_tokens=200)
    expected = "1+8=<eos>\n<bos>tool\n9<eos>\n<bos>assistant\nnine<eos>"
    assert tokenizer.decode(rollouts.completions()[0]) == expected


def test_messages_without_a_template_and_templates_that_rewrite_are_refused(tokenizer):
    environment = Scripted(Turn([{"role": "tool", "content": "9"}]))
    with pytest.raises(ValueError, match="no chat template"):
        play(environment, ["x"], tokenizer)
    rewriting = byte_tokenizer()
    rewriting.chat_template = "{{ messages | length }} messages: " + TEMPLATE
    with pytest.raises(ValueError, match="leaves earlier turns alone"):
        play(environment, ["x"], rewriting)


# --- with a model ----------------------------------------------------------------------------------------------------


def hf_rollouts(tokenizer, **options) -> tuple[Rollouts, torch.nn.Module]:
    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    sampler = EnvironmentSampler(Scripted(*[Turn("and 12.")] * 9, opening="yes."), HFSampler(), **options)
    sampler.setup(model, tokenizer)
    sampler.sync(model, 4)
    sampling = Sampling(max_tokens=40, stop_token_ids=list(range(3, 16)))
    return sampler.sample(RolloutRequest.for_groups(prompts([5, 6], [7, 8, 9]), 3, sampling, seed=0)), model


def test_log_probabilities_agree_with_a_forward_over_the_whole_sequence(tokenizer):
    rollouts, model = hf_rollouts(tokenizer)
    assert (rollouts.completion_mask.sum(1) < rollouts.lengths).all()
    with torch.no_grad():
        own, _ = completion_logprobs(
            model,
            [rollouts.prompts.ids[g] for g in rollouts.group.tolist()],
            rollouts.completion_ids,
            rollouts.completion_mask,
            rollouts.lengths,
        )
    torch.testing.assert_close(own, rollouts.logprobs["sampler"], atol=1e-4, rtol=0)
    assert (rollouts.token["policy_version"][rollouts.completion_mask] == 4).all()
    assert not rollouts.token["entropy"][~rollouts.completion_mask].any()


def test_turns_do_not_depend_on_the_other_rows(tokenizer):
    rollouts, model = hf_rollouts(tokenizer)
    sampler = EnvironmentSampler(Scripted(*[Turn("and 12.")] * 9, opening="yes."), HFSampler())
    sampler.setup(model, tokenizer)
    sampling = Sampling(max_tokens=40, stop_token_ids=list(range(3, 16)))
    request = RolloutRequest.for_groups(prompts([5, 6], [7, 8, 9]), 3, sampling, seed=0)
    rows = torch.tensor([4, 1])
    alone = sampler.sample(replace(request, group=request.group[rows], sample=request.sample[rows]))
    assert alone.completions() == [rollouts.completions()[i] for i in rows.tolist()]


def test_a_request_to_stop_is_seen_in_every_turn(tokenizer):
    seen = []

    def stop(progress):
        seen.append((progress.step, len(progress.finished), progress.lengths.tolist()))
        return progress.step >= 9

    model = tiny_model("Qwen2", vocab_size=len(tokenizer))
    sampler = EnvironmentSampler(Scripted(*[Turn("ok.")] * 20), HFSampler(), max_turns=20)
    sampler.setup(model, tokenizer)
    sampling = Sampling(max_tokens=200, stop_token_ids=list(range(3, 20)))
    request = RolloutRequest.for_groups(prompts([5, 6]), 4, sampling, seed=0, should_stop=stop)
    rollouts = sampler.sample(request)
    assert [step for step, *_ in seen] == list(range(1, 10))
    assert {n for _, n, _ in seen} == {4}
    assert (rollouts.row["stop_reason"] == StopReason.ABORTED).any()
    assert all(a <= b for (*_, x), (*_, y) in pairwise(seen) for a, b in zip(x, y))


class Silent(Environment):
    def start(self, record, seed):
        return Scripted(Turn(done=True)).start(record, seed)


test_environment_sampler_keeps_the_contract = contract(lambda: EnvironmentSampler(Silent()))


# --- gymnasium -------------------------------------------------------------------------------------------------------


class Guess:
    """Guess a number: the interface of a Gymnasium environment."""

    def __init__(self, top: int, offset: int = 0) -> None:
        self.top, self.offset, self.closed = top, offset, False

    def reset(self, seed=None):
        self.number = seed % self.top + self.offset
        self.tries = 0
        return f"below {self.top}.", {}

    def step(self, action):
        self.tries += 1
        right = int(action) == self.number
        hint = "right" if right else "more" if int(action) < self.number else "less"
        return hint, 1.0 if right else -0.25, right, self.tries == 3, {}


def test_a_gymnasium_environment_is_played(tokenizer):
    environment = GymnasiumEnvironment(Guess, {"top": 1}, columns=["offset"], template="{} ", to_action=int)
    rows = prompts([5, 6])
    rows.columns["offset"] = [7]
    writer = Writer(lambda sample: ["3", "9", "7"] if sample == 0 else ["1", "2", "3"])
    sampler = EnvironmentSampler(environment, writer, verifier=True)
    sampler.setup(None, tokenizer)
    rollouts = sampler.sample(RolloutRequest.for_groups(rows, 2, Sampling(max_tokens=60), seed=0))
    assert text_of(rollouts, tokenizer, False) == ["below 1. more less ", "below 1. more more "]
    assert rollouts.rewards.tolist() == [0.5, -0.75]
    assert rollouts.finished.all()


def test_gymnasium_observations_may_be_messages():
    assert GymnasiumEnvironment(Guess, role="user").show("more") == [{"role": "user", "content": "more"}]
    with pytest.raises(ValueError, match="template"):
        GymnasiumEnvironment(Guess, template="obs")


# --- training --------------------------------------------------------------------------------------------------------


def test_a_policy_learns_with_a_calculator(tmp_path):
    rewards, masked = [], []
    module = make_module(
        make_policy(tmp_path / "policy"),
        sampler=EnvironmentSampler(CalculatorEnvironment(opening="", closing="=", result="{}"), max_turns=2),
        sampling=Sampling(max_tokens=16),
        prompts_per_step=16,
        max_rollouts=14,
    )
    finish = module.finish_step

    def watch(rollouts):
        rewards.append(float(rollouts.rewards.mean()))
        masked.append(int(rollouts.lengths.sum() - rollouts.generated.sum()))
        finish(rollouts)

    module.finish_step = watch
    train(tmp_path, module)
    assert sum(masked) > 0, "the calculator was never used"
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.45


class FirstDigit(Environment):
    """Reward 1 if the first turn starts with a digit."""

    gives_rewards = True

    def start(self, record, seed):
        return _FirstDigit()


class _FirstDigit(Episode):
    def step(self, text):
        return Turn(done=True, reward=float(text[:1].isdigit()))

    def cut(self):
        return 0.0


def test_the_environments_rewards_are_enough_to_learn_from(tmp_path):
    module = make_module(
        make_policy(tmp_path / "policy"),
        rewards=(),
        sampler=EnvironmentSampler(FirstDigit(), verifier=True),
        sampling=Sampling(max_tokens=8, stop_token_ids=list(range(14))),
        max_rollouts=2,
    )
    train(tmp_path, module)
    rollouts = module.last_rollouts
    assert set(rollouts.rewards.tolist()) == {0.0, 1.0}
    assert torch.equal(rollouts.rewards, rollouts.correct)
    assert rollouts.advantages.any()


def test_impossible_settings_are_refused(tokenizer):
    for options in ({"max_turns": 0}, {"turn_tokens": 0}, {"timeout": 0.0}, {"workers": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            EnvironmentSampler(CALCULATOR, **options)
    with pytest.raises(ValueError, match="gives none"):
        EnvironmentSampler(CALCULATOR, verifier=True)
    with pytest.raises(ValueError, match="turn by turn"):
        EnvironmentSampler(CALCULATOR, EnvironmentSampler(CALCULATOR))
    sampler = EnvironmentSampler(CALCULATOR, ScriptedSampler(lambda d, s: 1))
    sampler.setup(None, tokenizer)
    request = RolloutRequest.for_groups(prompts([5]), 1, Sampling(), seed=0)
    request.prefix = Rollouts.build(request.prompts, request.group, [torch.tensor([4])])
    with pytest.raises(ValueError, match="no episodes"):
        sampler.sample(request)
