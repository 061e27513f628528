# SPDX-License-Identifier: Apache-2.0
"""The promises of every `RolloutSampler`, each a function of a `SamplerBench`: for ours and for yours.

In one call, or one test for each promise::

    def test_my_sampler(tmp_path):
        check_sampler(MySampler, tmp_path)

    @pytest.mark.parametrize("promise", SAMPLER_PROMISES.values(), ids=SAMPLER_PROMISES)
    def test_promise(promise, tmp_path):
        with SamplerBench(MySampler, tmp_path) as bench:
            promise(bench)
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rl.policies import completion_logprobs
from lit_rl.policies.scoring import evaluation_mode
from lit_rl.rollouts import Origin, Rollouts, StopReason
from lit_rl.samplers.base import RolloutRequest, RolloutSampler, Sampling
from lit_rl.testing.sampler_bench import GROUP, SamplerBench

Promise = Callable[[SamplerBench], None]
SAMPLER_PROMISES: dict[str, Promise] = {}


def check_sampler(
    factory: Callable[[], RolloutSampler],
    folder: Path | str,
    without: Collection[str] = (),
    tolerance: float = 1e-4,
) -> None:
    """Hold a sampler to everything that `RolloutSampler` promises, on a small policy.

    A sampler that cannot continue a prefix (``continues_prefix`` false) is not asked to.

    Args:
        factory: builds the sampler. It is called more than once, but only one sampler is open at a time.
        folder: where the policy is written.
        without: names of promises (keys of ``SAMPLER_PROMISES``) that this sampler does not make.
        tolerance: largest difference of a log-probability, in nats. Engines with other kernels need more.

    Raises:
        AssertionError: naming the first promise that does not hold.
    """
    unknown = set(without) - set(SAMPLER_PROMISES)
    if unknown:
        raise ValueError(f"There is no promise {sorted(unknown)[0]!r}; there are {', '.join(SAMPLER_PROMISES)}.")
    with SamplerBench(factory, folder, tolerance) as bench:
        for name, promise in SAMPLER_PROMISES.items():
            if name in without:
                continue
            try:
                promise(bench)
            except AssertionError as error:
                raise AssertionError(f"{type(bench.sampler).__name__} breaks the promise {name!r}: {error}") from error


def promise(function: Promise) -> Promise:
    """Register a function as a promise under its own name."""
    SAMPLER_PROMISES[function.__name__] = function
    return function


# What comes back -----------------------------------------------------------------------------------------------------


@promise
def rows_are_those_of_the_request(bench: SamplerBench) -> None:
    """In its order, for groups of any size, and the prompts with all their columns."""
    for group in (GROUP, [1], [3, 3, 3], [0, 1, 2, 3]):
        request = bench.request(group)
        out = bench.sample(request)
        assert len(out) == len(group), f"{len(group)} rows were requested and {len(out)} came back"
        assert torch.equal(out.row["sample"], request.sample)
        drawn = request.prompts.draw[request.group]
        assert torch.equal(out.prompts.draw[out.group], drawn), "rows are not in the order of the request"
        assert [out.prompts.columns["answer"][g] for g in out.group.tolist()] == [str(int(d)) for d in drawn]


@promise
def an_empty_request_gives_no_rows(bench: SamplerBench) -> None:
    """A rank may have nothing to draw in a round that others need."""
    empty = torch.zeros(0, dtype=torch.long)
    request = RolloutRequest(bench.prompts(count=0), empty, empty, Sampling(max_tokens=4), seed=0)
    out = bench.sample(request)
    assert len(out) == 0
    assert "sampler" in out.logprobs


@promise
def every_signal_is_there(bench: SamplerBench) -> None:
    """Types and shapes of the contract, nothing beyond the end of a completion, and ends that agree with each other."""
    out = bench.sample()
    n, width = len(out), out.width
    types = {"completion_ids": torch.long, "completion_mask": torch.bool, "logprobs.sampler": torch.float32}
    types |= {"loss_weights": torch.float32, "policy_version": torch.long}
    for name, dtype in types.items():
        assert name in out.token, f"the token signal {name!r} is missing"
        assert out.token[name].dtype == dtype, f"{name} is {out.token[name].dtype}, not {dtype}"
    for name, values in out.token.items():
        assert values.shape == (n, width), f"{name} has the shape {tuple(values.shape)}, not {(n, width)}"
    for name, values in out.row.items():
        assert values.shape == (n,), f"{name} has the shape {tuple(values.shape)}, not {(n,)}"
    inside = torch.arange(width) < out.lengths[:, None]
    assert torch.equal(out.completion_mask, inside)
    assert torch.equal(out.loss_weights, inside.float())
    assert int(out.lengths.max()) == width, "token signals are wider than the longest completion"
    for name, values in out.token.items():
        assert not bool((values != 0)[~inside].any()), f"{name} is not 0 beyond the completions"
    assert bool((out.logprobs["sampler"] <= 0).all())
    assert bool(torch.isfinite(out.logprobs["sampler"]).all())
    assert bool((out.token["policy_version"] == bench.version)[inside].all())
    assert bool((out.origin == Origin.POLICY).all())
    reason = out.row["stop_reason"]
    assert torch.equal(out.finished, (reason == StopReason.END) | (reason == StopReason.STOP))
    last = torch.tensor([ids[-1] for ids in out.completions()])
    assert torch.equal(reason == StopReason.END, last == bench.tokenizer.eos_token_id)
    assert torch.equal(reason == StopReason.STOP, torch.isin(last, torch.tensor(bench.ends)))
    assert bool((out.lengths[reason == StopReason.LENGTH] == bench.max_tokens).all())
    assert len(set(reason.tolist())) > 1, "the bench is too easy: all rows ended for the same reason"


@promise
def log_probabilities_are_those_of_the_policy(bench: SamplerBench) -> None:
    """Of the tempered distribution, as the trainer computes them."""
    for temperature in (1.0, 0.6, 1.5):
        out = bench.sample(temperature=temperature)
        with torch.no_grad(), evaluation_mode(bench.model):
            own, _ = completion_logprobs(
                bench.model,
                [out.prompts.ids[g] for g in out.group.tolist()],
                out.completion_ids,
                out.completion_mask,
                out.lengths,
                temperature=temperature,
            )
        gap = (own.cpu() - out.logprobs["sampler"]).abs().max()
        assert gap <= bench.tolerance, f"log-probabilities are off by {gap:.2g} at temperature {temperature}"


@promise
def log_probabilities_are_over_the_support(bench: SamplerBench) -> None:
    """With top-k, top-p and min-p no token outside is drawn, and those inside share all the probability."""
    for settings in ({"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8}):
        request = bench.request(**settings)
        out = bench.sample(request)
        for row, logits in enumerate(bench.logits(out)):
            for t, at in enumerate(logits):
                token, found = int(out.completion_ids[row, t]), float(out.logprobs["sampler"][row, t])
                inside = support(at, request.sampling)
                assert token in inside, f"token {token} lies outside the support of {settings}"
                gap = abs(found - math.log(inside[token]))
                assert gap <= 2 * bench.tolerance, f"a log-probability is off by {gap:.2g} with {settings}"


def support(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """Token -> probability after top-k, then top-p, then min-p, by sorting and counting."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1).tolist()
    kept = sorted(((p, token) for token, p in enumerate(probabilities)), reverse=True)
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total, reached, nucleus = sum(p for p, _ in kept), 0.0, []
    for p, token in kept:
        if reached < sampling.top_p * total:
            nucleus.append((p, token))
        reached += p
    kept = [(p, token) for p, token in nucleus if p >= sampling.min_p * nucleus[0][0]]
    total = sum(p for p, _ in kept)
    return {token: p / total for p, token in kept}


@promise
def greedy_takes_the_most_likely_token(bench: SamplerBench) -> None:
    """Temperature 0; the log-probabilities are those of temperature 1."""
    out = bench.sample(temperature=0.0)
    for row, logits in enumerate(bench.logits(out)):
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, out.completion_ids[row, : len(logits), None])[:, 0]
        assert bool((chosen >= logprobs.amax(-1) - bench.tolerance).all()), "a token is not the most likely one"
        assert bool(((chosen - out.logprobs["sampler"][row, : len(logits)]).abs() <= bench.tolerance).all())


@promise
def entropies_are_those_of_the_distribution(bench: SamplerBench) -> None:
    """Where a sampler can give them (an engine may not)."""
    for settings in ({}, {"temperature": 0.7}, {"top_k": 4}):
        request = bench.request(**settings)
        out = bench.sample(request)
        if "entropy" not in out.token:
            return
        for row, logits in enumerate(bench.logits(out)):
            for t, at in enumerate(logits):
                expected = -sum(p * math.log(p) for p in support(at, request.sampling).values() if p)
                gap = abs(float(out.token["entropy"][row, t]) - expected)
                assert gap <= 10 * bench.tolerance, f"an entropy is off by {gap:.2g} with {settings}"


# How tokens are drawn ------------------------------------------------------------------------------------------------


@promise
def tokens_follow_the_distribution(bench: SamplerBench) -> None:
    """A chi-square test of 500 first tokens, at a level that a right sampler fails once in a million seeds."""
    _assert_distributed(bench)


@promise
def gumbel_noise_follows_it_too(bench: SamplerBench) -> None:
    """A sampler that has no Gumbel noise says so."""
    try:
        bench.sample(noise="gumbel", max_tokens=1)
    except ValueError:
        return
    _assert_distributed(bench, noise="gumbel")
    request = bench.request(noise="gumbel")
    out = bench.sample(request)
    rows = torch.tensor([11, 4, 0])
    part = replace(request, group=request.group[rows], sample=request.sample[rows])
    bench.assert_same(out.select(rows), bench.sample(part))
    if bench.sampler.continues_prefix:
        half = bench.sample(bench.request(noise="gumbel", should_stop=lambda p: p.step >= 3))
        bench.assert_same(out, bench.sample(bench.request(noise="gumbel", prefix=half)))


def _assert_distributed(bench: SamplerBench, **changes: Any) -> None:
    rows = 500
    out = bench.sample(bench.request([1] * rows, max_tokens=1, **changes))
    expected = bench.logits(out.select(torch.tensor([0])))[0][0].double().softmax(-1) * rows
    counts = torch.bincount(out.completion_ids[:, 0], minlength=len(expected)).double()
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = ((counts - expected).square() / expected).sum()
    level = torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic.float() / 2)
    assert level > 1e-6, f"tokens do not follow the distribution (p-value {level:.1g})"


@promise
def the_seed_decides(bench: SamplerBench) -> None:
    """The same request gives the same completions; another seed, draw or sample index gives others."""
    out = bench.sample(seed=1)
    bench.assert_same(out, bench.sample(seed=1))
    assert out.completions() != bench.sample(seed=2).completions(), "another seed gives the same tokens"
    rows = bench.sample(bench.request([3] * 6)).completions()
    assert len({tuple(ids) for ids in rows}) > 1, "all samples of a prompt are the same"
    request = bench.request([3] * 6)
    request.prompts.draw = request.prompts.draw + 100
    assert rows != bench.sample(request).completions(), "the same prompt, drawn again, gets the same completions"


@promise
def company_does_not_matter(bench: SamplerBench) -> None:
    """A row comes out the same in any batch and order."""
    request = bench.request()
    out = bench.sample(request)
    for rows in (torch.tensor([7]), torch.tensor([11, 4, 0, 5]), torch.arange(len(GROUP)).flip(0)):
        part = replace(request, group=request.group[rows], sample=request.sample[rows])
        bench.assert_same(out.select(rows), bench.sample(part))


# Ends ----------------------------------------------------------------------------------------------------------------


@promise
def a_stop_token_ends_a_completion(bench: SamplerBench) -> None:
    """With `StopReason.STOP`, the token included; until then everything is as without."""
    free = bench.sample(stop_token_ids=[])
    tokens = torch.tensor([t for ids in free.completions() for t in ids if t != bench.tokenizer.eos_token_id])
    common = int(tokens.bincount().argmax())
    out = bench.sample(stop_token_ids=[common])
    stops = 0
    for row, ids in enumerate(free.completions()):
        at = ids.index(common) + 1 if common in ids else None
        stops += at is not None
        _assert_cut(free, out, row, at)
    assert stops, "the bench is too easy: no row has the stop token"


@promise
def a_stop_string_ends_a_completion(bench: SamplerBench) -> None:
    """With the token that completes it, and `StopReason.STOP`."""
    free = bench.sample(stop_token_ids=[])
    texts = bench.tokenizer.batch_decode(  # a string of special tokens would end a completion for two reasons
        free.completions(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    pairs = [t[i : i + 2] for t in texts for i in range(len(t) - 1) if "<" not in t[i : i + 2]]
    wanted = max(sorted(set(pairs)), key=pairs.count)
    assert pairs, "the bench is too easy: no row has two characters"
    out = bench.sample(stop=["", wanted, "no row has this"], stop_token_ids=[])
    for row, ids in enumerate(free.completions()):
        ends = [i for i in range(1, len(ids) + 1) if wanted in bench.tokenizer.decode(ids[:i])]
        _assert_cut(free, out, row, ends[0] if ends else None)


def _assert_cut(free: Rollouts, out: Rollouts, row: int, at: int | None) -> None:
    """Row ``row`` of ``out`` is that of ``free`` up to ``at`` tokens, or as a whole if None."""
    ids, found = free.completions()[row], out.completions()[row]
    reason = int(free.row["stop_reason"][row]) if at is None else int(StopReason.STOP)
    assert found == ids[:at], f"row {row} is {found}, not the first {at} tokens of {ids}"
    assert int(out.row["stop_reason"][row]) == reason, f"row {row} has another stop reason than {reason}"


@promise
def budgets_bound_each_row(bench: SamplerBench) -> None:
    """Each row has its own; a row without any comes back empty."""
    free = bench.sample()
    budgets = torch.tensor([0, 1, 2, 3, bench.max_tokens, 5, 0, 9, 4, 2, 1, bench.max_tokens])
    out = bench.sample(bench.request(budgets=budgets))
    for row, budget in enumerate(budgets.tolist()):
        ids = free.completions()[row]
        assert out.completions()[row] == ids[:budget]
        reason = free.row["stop_reason"][row] if len(ids) <= budget else StopReason.LENGTH
        assert out.row["stop_reason"][row] == reason


# Interruption and continuation ---------------------------------------------------------------------------------------


@promise
def should_stop_interrupts(bench: SamplerBench) -> None:
    """It sees the progress after every step; unfinished rows come back as `StopReason.ABORTED`."""
    seen: list[tuple[int, Tensor, Tensor]] = []

    def stop(progress: Any) -> bool:
        seen.append((progress.step, progress.finished.clone(), progress.lengths.clone()))
        return progress.step >= 6

    whole = bench.sample()
    out = bench.sample(bench.request(should_stop=stop))
    aborted = out.row["stop_reason"] == StopReason.ABORTED
    assert bool(aborted.any()), "nothing was interrupted"
    assert not bool(aborted.all()), "the bench is too easy: no row had ended when it was interrupted"
    assert not bool((out.finished & aborted).any())
    for row, ids in enumerate(out.completions()):
        assert ids == whole.completions()[row][: len(ids)], f"row {row} is not the beginning of the whole one"
        assert bool(aborted[row]) == (len(ids) < len(whole.completions()[row]))
    steps = [step for step, _, _ in seen]
    assert steps == sorted(set(steps)), f"steps do not count upward: {steps}"
    finished, lengths = seen[-1][1:]
    assert finished.device.type == lengths.device.type == "cpu"
    assert torch.equal(finished, ~aborted)
    assert bool((lengths <= out.lengths).all())


@promise
def a_prefix_is_continued(bench: SamplerBench) -> None:
    """Cut anywhere and continued, a completion comes out as if it had never been cut."""
    if not bench.sampler.continues_prefix:
        return
    whole = bench.sample()
    prefix = whole.clone()
    at = torch.tensor([0, 1, 5, 0, 3, 99, 2, 1, 7, 0, 99, 4])
    prefix.truncate(torch.arange(len(at)), at)
    again = bench.sample(bench.request(prefix=prefix))
    bench.assert_same(whole, again)
    if "entropy" in whole.token:
        gap = (whole.token["entropy"] - again.token["entropy"]).abs().max()
        assert gap <= 10 * bench.tolerance, "entropies of the prefix are lost"


@promise
def an_interrupted_request_is_continued(bench: SamplerBench) -> None:
    """Interrupted twice, and with another budget in between, it still gives the same completions."""
    if not bench.sampler.continues_prefix:
        return
    whole = bench.sample()
    first = bench.sample(bench.request(should_stop=lambda p: p.step >= 3))
    short = torch.full((len(GROUP),), 7)
    second = bench.sample(bench.request(prefix=first, budgets=short))
    assert int(second.lengths.max()) == 7, "a budget counts the prefix"
    bench.assert_same(whole, bench.sample(bench.request(prefix=second)))


@promise
def a_finished_prefix_comes_back(bench: SamplerBench) -> None:
    """Where nothing is left to generate, the prefix is the answer."""
    if not bench.sampler.continues_prefix:
        return
    whole = bench.sample()
    bench.assert_same(whole, bench.sample(bench.request(prefix=whole)))


@promise
def a_prefix_keeps_its_version_and_mask(bench: SamplerBench) -> None:
    """Tokens of a prefix remember which policy wrote them and whether they train; new ones have the new version."""
    if not bench.sampler.continues_prefix:
        return
    before, bench.version = bench.version, bench.version + 3
    prefix = bench.sample(bench.request(should_stop=lambda p: p.step >= 3))
    prefix.completion_mask[0, 1] = False  # as tool output would be
    prefix.loss_weights[0, 0] = 0.25
    bench.sampler.sync(bench.model, bench.version)
    out = bench.sample(bench.request(prefix=prefix))
    old = torch.arange(out.width) < prefix.lengths[:, None]
    new = (torch.arange(out.width) < out.lengths[:, None]) & ~old
    assert bool((out.token["policy_version"][old] == before).all())
    assert bool((out.token["policy_version"][new] == bench.version).all())
    assert bool(new.any())
    assert not out.completion_mask[0, 1]
    assert out.loss_weights[0, 0] == 0.25


# Steps of a run ------------------------------------------------------------------------------------------------------


@promise
def sync_brings_the_new_weights(bench: SamplerBench) -> None:
    """After `sync` completions come from the policy as it is, and carry its version."""
    old = bench.sample()
    weights = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bench.model.parameters():
            p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p))
    try:
        bench.version += 1
        bench.sampler.sync(bench.model, bench.version)
        new = bench.sample()
        assert new.completions() != old.completions(), "the weights have changed and the completions have not"
        every_signal_is_there(bench)
        log_probabilities_are_those_of_the_policy(bench)
    finally:
        with torch.no_grad():
            for name, p in bench.model.named_parameters():
                p.copy_(weights[name])
        bench.version += 1
        bench.sampler.sync(bench.model, bench.version)
    bench.assert_same(old, bench.sample())


def _step(bench: SamplerBench, cursor: int, groups: int = 2) -> tuple[Rollouts, int]:
    """One training step's worth of groups, with new prompts from ``cursor`` on. Returns them and the next cursor."""
    drawn = bench.sampler.prompts_to_draw(groups)
    prompts = bench.prompts(cursor, drawn)
    request = RolloutRequest.for_groups(prompts, 3, Sampling(max_tokens=bench.max_tokens), seed=2, wanted=groups)
    return bench.sample(request), cursor + drawn


@promise
def a_step_gets_its_groups(bench: SamplerBench) -> None:
    """As many as it wants, and no completion twice."""
    seen: list[tuple[int, int]] = []
    cursor = 0
    for _ in range(4):
        out, cursor = _step(bench, cursor)
        assert len(out.prompts) == 2, f"2 groups were wanted and {len(out.prompts)} came back"
        assert bool((out.group_sizes() > 0).all())
        assert not bool((out.row["stop_reason"] == StopReason.ABORTED).any())
        seen += zip(out.prompts.draw[out.group].tolist(), out.row["sample"].tolist())
    assert len(seen) == len(set(seen)), "a completion was returned twice"
    bench.sampler.on_rewind(bench.model)


@promise
def a_step_can_be_undone(bench: SamplerBench) -> None:
    """`return_to` takes an interrupted step back: drawn again, it comes out the same."""
    _, cursor = _step(bench, 0)
    boundary = bench.sampler.boundary()
    first, _ = _step(bench, cursor)
    bench.sampler.return_to(boundary)
    again, _ = _step(bench, cursor)
    assert torch.equal(first.prompts.draw, again.prompts.draw)
    bench.assert_same(first, again)
    bench.sampler.on_rewind(bench.model)


@promise
def its_state_resumes(bench: SamplerBench) -> None:
    """A fresh sampler with the stored state goes on as this one would have; the state is plain tensors and values."""
    _, cursor = _step(bench, 0)
    file = io.BytesIO()
    torch.save(bench.sampler.state_dict(), file)
    expected, _ = _step(bench, cursor)
    file.seek(0)
    bench.restart().load_state_dict(torch.load(file, weights_only=True))
    found, _ = _step(bench, cursor)
    assert torch.equal(expected.prompts.draw, found.prompts.draw)
    bench.assert_same(expected, found)
    bench.sampler.on_rewind(bench.model)


@promise
def the_trainer_is_left_alone(bench: SamplerBench) -> None:
    """Training modes, what requires gradients, weights, the global generator and the request are as before."""
    bench.model.train()
    next(iter(bench.model.children())).eval()
    request = bench.request()
    group, draw = request.group.clone(), request.prompts.draw.clone()

    def state() -> list[Any]:
        flags = [m.training for m in bench.model.modules()], [p.requires_grad for p in bench.model.parameters()]
        return [
            *flags,
            float(sum(p.detach().double().sum() for p in bench.model.parameters())),
            torch.is_grad_enabled(),
        ]

    before, generator = state(), torch.get_rng_state()
    out = bench.sample(request)
    assert state() == before, "sampling has changed the model"
    assert torch.equal(torch.get_rng_state(), generator), "sampling draws from the global generator"
    assert torch.equal(request.group, group)
    assert torch.equal(request.prompts.draw, draw)
    assert not any(x.requires_grad or x.is_inference() for x in (*out.row.values(), *out.token.values()))
    bench.model.train()
    assert isinstance(bench.sampler.describe(), str)
