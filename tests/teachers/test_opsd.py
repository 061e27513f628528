# SPDX-License-Identifier: Apache-2.0
"""On-policy self-distillation: roles, temperature, averaging, and the three kinds of teacher weights."""

import math
from pathlib import Path

import pytest
import torch
from lessons import ANSWER_FIRST, Metrics, SolvedData, assert_close, exact_module, gradients_of, token_losses

from lit_rl.methods import OPSD
from lit_rl.methods.opd import teacher_advantages
from lit_rl.methods.teaching import states_under
from lit_rl.objectives import Divergence, aggregation_weights
from lit_rl.policies import EMA, AdapterOff, FrozenCopy, Live, LoRA, Policy, PrivilegedPrompt, Teacher
from lit_rl.samplers import Sampling
from lit_rl.testing import check_resume, loss_and_gradients, make_module, make_policy, train
from lit_rl.testing.toys import adamw

ANSWER = PrivilegedPrompt(ANSWER_FIRST)


def test_defaults_are_the_papers(tmp_path: Path):
    module = make_module(tmp_path / "policy", OPSD, prompt=ANSWER)
    assert (module.divergence.beta, module.divergence.entry_clip) == (0.0, 0.05)
    assert isinstance(module.teachers[0].policy, FrozenCopy)
    adapters = OPSD(Policy(str(tmp_path), lora=LoRA(r=2)))
    assert isinstance(adapters.teachers[0].policy, AdapterOff)
    with pytest.raises(ValueError, match="makes the Teacher itself"):
        make_module(tmp_path / "policy", OPSD, teacher=Teacher(Live()))


def test_token_mean_is_not_the_mean_of_sequence_means():
    weights, count = aggregation_weights(torch.tensor([[1.0, 0, 0], [1, 1, 1]]), "token_mean")
    values = torch.tensor([[1.0, 9, 9], [0, 0, 0]])
    assert float((values * weights).sum() / count) == 0.25
    weights, count = aggregation_weights(torch.tensor([[1.0, 0, 0], [1, 1, 1]]), "sequence_mean")
    assert float((values * weights).sum() / count) == 0.5


def test_the_sampled_token_variant():
    found = teacher_advantages(torch.tensor([[0.25]]).log(), torch.tensor([[0.5]]).log(), torch.ones(1, 1))
    assert float(found) == pytest.approx(0.693147, abs=1e-6)


def test_a_batch_equals_a_naive_loop_at_the_sampling_temperature(tmp_path: Path):
    module = exact_module(
        tmp_path, OPSD, prompt=ANSWER, sampling=Sampling(max_tokens=6, temperature=1.1), group_size=1,
        divergence=Divergence(0.0, entry_clip=0.002),
    )  # fmt: skip
    batch = module.last_rollouts
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.1)  # away from the teacher's weights
    shown = [
        torch.cat([module.tokenizer(f"{a};", return_tensors="pt")["input_ids"][0], ids])
        for a, ids in zip(batch.prompts.columns["answer"], batch.prompts.ids)
    ]

    def clipped(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, log_p = (y / 1.1).softmax(-1), (z / 1.1).log_softmax(-1)
        return sum((v * (v.log() - p)).clamp(max=0.002) for v, p in zip(q, log_p))

    expected = torch.cat(token_losses(module, batch, clipped, shown)).mean()
    loss, found = loss_and_gradients(module, batch, 40)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-10)
    assert_close(found, gradients_of(module, expected))


@pytest.mark.parametrize(("steps", "expected"), [(4, 0.002997), (694, 0.5)])
def test_moving_average(steps, expected):
    """From 0 towards constant 1: the first call copies, the others average."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = EMA(decay=0.999)
    average.setup(model)
    average.refresh(model, 1)
    torch.nn.init.ones_(model.weight)
    for step in range(2, steps + 1):
        average.refresh(model, step)
    with average.model(model) as teacher:
        assert float(teacher.weight.detach()) == pytest.approx(expected, abs=1e-3 if steps > 99 else 1e-6)


@pytest.mark.parametrize(("steps", "expected"), [(10, 0.095618), (69, 0.500163)])
def test_moving_average_that_begins_at_the_initial_weights(steps, expected):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = EMA(decay=0.99, copy_first=False)
    average.setup(model)
    torch.nn.init.ones_(model.weight)
    for step in range(1, steps + 1):
        average.refresh(model, step)
    with average.model(model) as teacher:
        assert float(teacher.weight.detach()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("teacher", [FrozenCopy, Live, lambda: EMA(decay=0.5)])
def test_every_kind_of_teacher_runs_and_style_tokens_are_logged(tmp_path: Path, teacher):
    metrics = Metrics()
    module = make_module(
        make_policy(tmp_path / "policy"), OPSD, prompt=ANSWER, teacher=teacher(), style_tokens=["0123456789", "=+"],
        max_rollouts=2, rewards=[],
    )  # fmt: skip
    train(tmp_path / "run", module, [metrics])
    for step in metrics.steps:
        assert math.isfinite(step["loss/distill"])
        assert 0 <= step["distill/negative_ratio"] <= 1
        assert step["opsd/style_divergence"] != step["distill/divergence"]


def test_lora_adapters_are_switched_off_for_the_teacher(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    module = OPSD(
        Policy(str(policy), lora=LoRA(r=2)), ANSWER, sampling=Sampling(max_tokens=6), optimizer=adamw,
        prompts_per_step=4, group_size=2, max_rollouts=2,
    )  # fmt: skip
    train(tmp_path / "run", module)
    batch = module.last_rollouts
    (teacher,) = module.teachers
    wanted = batch.kept_mask()
    off = module.states_of(teacher, batch, wanted).hidden
    initial = policy_states(policy, module, teacher, batch, wanted)
    torch.testing.assert_close(off, initial)
    with Live().model(module.model) as trained:
        on = states_under(trained, module.shown_to(teacher, batch.prompts), batch, wanted).hidden
    assert not torch.allclose(on, initial)


def policy_states(path, module, teacher, batch, wanted) -> torch.Tensor:
    """The hidden states of the untrained policy under the teacher's prompt."""
    model = Policy(str(path)).load_frozen()[0]
    return states_under(model, module.shown_to(teacher, batch.prompts), batch, wanted).hidden


def privileged(policy: Path) -> OPSD:
    return make_module(policy, OPSD, prompt=ANSWER, teacher=EMA(decay=0.9), group_size=2)


def test_a_run_resumes_exactly(tmp_path: Path):
    check_resume(tmp_path, module=privileged)


def test_an_empty_solution_is_named_or_shown_plainly(tmp_path: Path):
    policy = make_policy(tmp_path / "policy")
    strict = make_module(policy, OPSD, prompt=PrivilegedPrompt("{completion};{prompt}"), max_rollouts=1)
    with pytest.raises(Exception, match="'completion', which is empty"):
        train(tmp_path / "strict", strict, data=SolvedData(sparse=True))
    plain = make_module(
        policy, OPSD, prompt=PrivilegedPrompt("{completion};{prompt}", missing="plain"), max_rollouts=1,
        prompts_per_step=8,
    )  # fmt: skip
    train(tmp_path / "plain", plain, data=SolvedData(sparse=True))
    batch = plain.last_rollouts
    shown = plain.shown_to(plain.teachers[0], batch.prompts)
    for ids, own, solution in zip(shown, batch.prompts.ids, batch.prompts.columns["completion"]):
        assert len(ids) == len(own) + (0 if solution is None else len(solution) + 1)
