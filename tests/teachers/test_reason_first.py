# SPDX-License-Identifier: Apache-2.0
"""A teacher that writes an analysis before it scores: what it reads, who wrote it, and that a run resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lessons import ANSWER_FIRST, Metrics, SolvedData, assert_close, exact_module, gradients_of, token_losses

from lit_rl.methods import OPSD, ReasonFirst
from lit_rl.methods.reasoning import ANALYSES, ANALYSIS_TEMPLATE
from lit_rl.objectives import Divergence, forward_kl
from lit_rl.policies import EMA, FrozenCopy, Policy, PrivilegedPrompt
from lit_rl.samplers import HFSampler, PartialSampler, RolloutRequest, Sampling
from lit_rl.seeding import mix_seeds
from lit_rl.testing import check_resume, loss_and_gradients, make_module, make_policy, train

ANSWER = PrivilegedPrompt(ANSWER_FIRST)


def reasoning(**options) -> ReasonFirst:
    return ReasonFirst(**{"max_tokens": 7, "transition": "=>"} | options)


def ids_of(module, text: str) -> list[int]:
    return module.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_teacher_reads_its_analysis_and_the_loss_equals_a_naive_loop(tmp_path: Path):
    module = exact_module(
        tmp_path, OPSD, prompt=ANSWER, group_size=2, divergence=Divergence(0.0), reason_first=reasoning()
    )
    batch = module.last_rollouts
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.1)  # away from the teacher's weights
    prompts = batch.prompts
    shown = [
        torch.tensor([*ids_of(module, f"{answer};"), *ids.tolist(), *analysis, *ids_of(module, "=>")])
        for answer, ids, analysis in zip(prompts.columns["answer"], prompts.ids, prompts.columns[ANALYSES])
    ]
    assert any(len(analysis) > 0 for analysis in prompts.columns[ANALYSES])
    for mine, expected in zip(module.shown_to(module.teachers[0], prompts), shown):
        assert mine.tolist() == expected.tolist()
    expected = torch.cat(token_losses(module, batch, forward_kl, shown)).mean()
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    assert_close(found, gradients_of(module, expected))
    plain = torch.cat(token_losses(module, batch, forward_kl, [s[: len(s) - 2] for s in shown])).mean()
    assert abs(float(plain.detach()) - loss) > 1e-6  # the transition matters, so the comparison above can fail


def test_analyses_come_from_the_teachers_weights_and_the_draw(tmp_path: Path):
    """Also after the student has moved away; the end-of-sequence token is left out."""
    policy = make_policy(tmp_path / "policy")
    module = make_module(
        policy, OPSD, prompt=ANSWER, teacher=FrozenCopy(), reason_first=reasoning(max_tokens=20), max_rollouts=3,
        prompts_per_step=8, sampling=Sampling(max_tokens=6, stop=("1", "2")),
    )  # fmt: skip
    train(tmp_path / "run", module)
    prompts = module.last_rollouts.prompts
    initial, tokenizer = Policy(str(policy)).load_frozen()
    sampler = HFSampler()
    sampler.setup(initial, tokenizer)
    ids = [
        torch.tensor([*ids_of(module, f"{a};"), *own.tolist()])
        for a, own in zip(prompts.columns["answer"], prompts.ids)
    ]
    request = RolloutRequest.for_groups(
        replace(prompts, ids=ids), 1, Sampling(max_tokens=20), mix_seeds(module.seed, "analysis")
    )
    rollouts = sampler.sample(request)
    expected = rollouts.completions()
    ended = rollouts.finished.tolist()
    assert any(ended)
    assert not all(ended)
    assert prompts.columns[ANALYSES] == [x[:-1] if end else x for x, end in zip(expected, ended)]


def test_what_was_written_is_logged(tmp_path: Path):
    metrics = Metrics()
    module = make_module(
        make_policy(tmp_path / "policy"), OPSD, prompt=ANSWER, reason_first=reasoning(), max_rollouts=2
    )
    train(tmp_path / "run", module, [metrics])
    for step in metrics.steps:
        assert 0 < step["opsd/analysis_length"] <= 7
        assert 0 <= step["opsd/analysis_truncated_ratio"] <= 1
        assert step["time/analysis"] > 0
    assert any("writes an analysis of at most 7 tokens first" in line for line in module.describe())


def writing(policy: Path) -> OPSD:
    return make_module(policy, OPSD, prompt=ANSWER, teacher=EMA(decay=0.9), group_size=2, reason_first=reasoning())


def test_a_run_resumes_exactly(tmp_path: Path):
    check_resume(tmp_path, module=writing)


def test_without_a_solution_the_teacher_sees_the_students_prompt(tmp_path: Path):
    module = make_module(
        make_policy(tmp_path / "policy"), OPSD, prompt=PrivilegedPrompt("{completion};{prompt}", missing="plain"),
        reason_first=reasoning(), max_rollouts=1, prompts_per_step=8,
    )  # fmt: skip
    train(tmp_path / "run", module, data=SolvedData(sparse=True))
    prompts = module.last_rollouts.prompts
    solved = [solution is not None for solution in prompts.columns["completion"]]
    assert set(solved) == {True, False}
    shown = module.shown_to(module.teachers[0], prompts)
    for ids, own, analysis, known in zip(shown, prompts.ids, prompts.columns[ANALYSES], solved):
        assert (analysis is not None) == known
        assert (ids.tolist() == own.tolist()) == (not known)


def test_the_default_prompt_asks_for_an_analysis(tmp_path: Path):
    assert make_module(tmp_path, OPSD).teachers[0].prompt.template != ANALYSIS_TEMPLATE
    assert make_module(tmp_path, OPSD, reason_first=ReasonFirst()).teachers[0].prompt.template == ANALYSIS_TEMPLATE


def test_what_cannot_work_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ReasonFirst(max_tokens=0)
    with pytest.raises(ValueError, match="PartialSampler cannot write analyses"):
        ReasonFirst(sampler=PartialSampler())
    module = make_module(
        make_policy(tmp_path / "policy"), OPSD, prompt=ANSWER, reason_first=ReasonFirst(max_tokens=10**6)
    )
    with pytest.raises(ValueError, match=r"an analysis of up to 1000000.*more than the"):
        train(tmp_path / "run", module)
