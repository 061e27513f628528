# SPDX-License-Identifier: Apache-2.0
"""Policies that are not trained: what they share, when they follow, and that a run is resumed with the same one."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_rl.policies import (
    EMA,
    AdapterOff,
    Checkpoint,
    FrozenCopy,
    FrozenPolicy,
    Live,
    LoRA,
    Policy,
    Snapshot,
)
from lit_rl.policies.frozen import checksum, copy_of
from lit_rl.testing import check_resume, make_module, make_policy

IDS = torch.tensor([[5, 9, 20, 33]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policies") / "policy")


@pytest.fixture
def live(saved: Path) -> Any:
    return Policy(str(saved)).load()[0]


@pytest.fixture
def adapted(saved: Path) -> Any:
    model = Policy(str(saved), lora=LoRA(r=2)).load()[0]
    train(model)
    return model


def train(model: nn.Module, seed: int = 0) -> None:
    """Change what is trained, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


def logits(frozen: FrozenPolicy, live: nn.Module) -> Tensor:
    with frozen.model(live) as model:
        return model(input_ids=IDS).logits


def stored(frozen: FrozenPolicy) -> Any:
    """Its state after the way through a checkpoint file."""
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def plain_logits(model: Any) -> Tensor:
    return copy.deepcopy(model).eval()(input_ids=IDS).logits


MAKERS: dict[str, Callable[[Path], FrozenPolicy]] = {
    "live": lambda path: Live(),
    "copy": lambda path: FrozenCopy(),
    "snapshot": lambda path: Snapshot(every=2),
    "average": lambda path: EMA(decay=0.5),
    "checkpoint": lambda path: Checkpoint(str(path)),
}


# What all of them promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_scores_come_without_gradient_in_evaluation_mode_and_leave_the_policy_alone(
    kind: str, saved: Path, live: Any
) -> None:
    frozen = MAKERS[kind](saved)
    frozen.setup(live)
    frozen.to("cpu")
    live.model.layers[0].eval()  # one of its modules has its own mode
    before = [m.training for m in live.modules()], [p.requires_grad for p in live.parameters()]
    with frozen.model(live) as model:
        assert not any(m.training for m in model.modules())
        assert not model(input_ids=IDS).logits.requires_grad
    assert ([m.training for m in live.modules()], [p.requires_grad for p in live.parameters()]) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_invisible_to_a_module_that_holds_it(kind: str, saved: Path, live: Any) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = MAKERS[kind](saved)

    holder = Holder()
    holder.frozen.setup(live)
    assert not holder.state_dict()
    assert not list(holder.parameters())


@pytest.mark.parametrize("kind", MAKERS)
def test_setting_up_twice_keeps_the_first(kind: str, saved: Path, live: Any) -> None:
    """A second stage of a run sets everything up again, after the policy has been trained."""
    frozen = MAKERS[kind](saved)
    frozen.setup(live)
    first = frozen.identity()
    train(live)
    frozen.setup(live)
    assert frozen.identity() == first


# Live and AdapterOff -------------------------------------------------------------------------------------------------


def test_live_is_the_policy_itself(live: Any) -> None:
    frozen = Live()
    frozen.setup(live)
    train(live)
    with frozen.model(live) as model:
        assert model is live
    assert torch.equal(logits(frozen, live), plain_logits(live))


def test_adapter_off_is_the_initial_policy_for_nothing(saved: Path, adapted: Any) -> None:
    initial = plain_logits(Policy(str(saved)).load()[0])
    frozen = AdapterOff()
    frozen.setup(adapted)
    for seed in (1, 2):
        train(adapted, seed)
        torch.testing.assert_close(logits(frozen, adapted), initial)
        assert not torch.allclose(plain_logits(adapted), initial)  # switched on again
    assert stored(frozen) == {"identity": {"kind": "adapter off"}}


def test_adapter_off_needs_an_adapter(live: Any) -> None:
    with pytest.raises(ValueError, match=r"needs a policy with LoRA: set policy\.lora, or use FrozenCopy"):
        AdapterOff().setup(live)


# Copies --------------------------------------------------------------------------------------------------------------


def test_a_copy_keeps_the_initial_weights(live: Any) -> None:
    initial = plain_logits(live)
    frozen = FrozenCopy()
    frozen.setup(live)
    train(live)
    frozen.refresh(live, 1)
    assert torch.equal(logits(frozen, live), initial)
    assert not torch.allclose(plain_logits(live), initial)


def test_a_copy_shares_what_is_not_trained(adapted: Any) -> None:
    twin = copy_of(adapted)
    mine, theirs = dict(adapted.named_parameters()), dict(twin.named_parameters())
    for name, p in mine.items():
        assert (theirs[name] is p) == (not p.requires_grad), name
        assert not theirs[name].requires_grad
    assert twin.copied_names == {n for n, p in mine.items() if p.requires_grad}
    assert all(p.requires_grad for n, p in mine.items() if "lora_" in n)  # of the policy itself


def test_tied_weights_stay_tied_in_a_copy(live: Any) -> None:
    twin = copy_of(live)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not live.lm_head.weight


def test_a_frozen_model_is_copied_in_full(live: Any) -> None:
    live.requires_grad_(False)
    twin = copy_of(live)
    assert all(a is not b for a, b in zip(live.parameters(), twin.parameters(), strict=True))


def test_a_copy_that_loading_restores_is_not_in_the_checkpoint(live: Any, adapted: Any) -> None:
    frozen = FrozenCopy()
    frozen.setup(live)
    assert set(stored(frozen)) == {"identity"}
    with_adapters = FrozenCopy()
    with_adapters.setup(adapted)
    weights = stored(with_adapters)["weights"]  # fresh adapters are drawn at random: they exist nowhere else
    assert weights
    assert all("lora_" in name for name in weights)


def test_a_copy_of_adapters_is_restored_into_another_draw_of_them(saved: Path, adapted: Any) -> None:
    frozen = FrozenCopy()
    frozen.setup(adapted)
    expected = logits(frozen, adapted)
    other = Policy(str(saved), lora=LoRA(r=2)).load()[0]
    train(other, seed=9)
    again = FrozenCopy()
    again.setup(other)
    again.load_state_dict(stored(frozen))
    assert torch.equal(logits(again, other), expected)
    assert again.identity() == frozen.identity()


def test_another_adapter_shape_is_refused(saved: Path, adapted: Any) -> None:
    frozen = FrozenCopy()
    frozen.setup(adapted)
    other = Policy(str(saved), lora=LoRA(r=2, target_modules=["q_proj"])).load()[0]
    again = FrozenCopy()
    again.setup(other)
    with pytest.raises(ValueError, match="trains other weights than this policy: same LoRA"):
        again.load_state_dict(stored(frozen))


def test_a_copy_must_be_set_up_first(live: Any) -> None:
    with pytest.raises(RuntimeError, match=r"FrozenCopy\.setup\(model\) must be called first"):
        logits(FrozenCopy(), live)


# Snapshots and averages ----------------------------------------------------------------------------------------------


def test_a_snapshot_follows_every_few_steps(live: Any) -> None:
    frozen = Snapshot(every=3)
    frozen.setup(live)
    expected, taken = plain_logits(live), []
    for step in range(1, 8):
        train(live, step)
        frozen.refresh(live, step)
        expected = plain_logits(live) if step % 3 == 0 else expected
        assert torch.equal(logits(frozen, live), expected)
        taken.append(frozen.identity()["taken_at"])
    assert taken == [0, 0, 3, 3, 3, 6, 6]


def test_a_snapshot_without_a_period_follows_when_it_is_told_to(live: Any) -> None:
    frozen = Snapshot()
    frozen.setup(live)
    initial = plain_logits(live)
    train(live)
    frozen.refresh(live, 1)
    assert torch.equal(logits(frozen, live), initial)
    frozen.take(live, 1)
    assert torch.equal(logits(frozen, live), plain_logits(live))


def test_a_share_of_the_new_weights_can_be_taken(live: Any) -> None:
    frozen = Snapshot()
    frozen.setup(live)
    old = {n: p.clone() for n, p in live.named_parameters()}
    train(live)
    frozen.take(live, 1, share=0.25)
    with frozen.model(live) as model:
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, 0.75 * old[name] + 0.25 * live.get_parameter(name))


def test_an_average_follows_its_recursion(live: Any) -> None:
    """The first refresh copies; then average <- decay * average + (1 - decay) * weights."""
    frozen = EMA(decay=0.75)
    frozen.setup(live)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = None
    for step in range(1, 6):
        train(live, step)
        frozen.refresh(live, step)
        now = live.get_parameter(name).double()
        expected = now.clone() if expected is None else 0.75 * expected + 0.25 * now
        with frozen.model(live) as model:
            torch.testing.assert_close(model.get_parameter(name).double(), expected, rtol=1e-6, atol=1e-6)


def test_an_average_in_bfloat16_does_not_lose_small_changes(saved: Path) -> None:
    """A change of 1 - decay of a weight's size would be rounded away if the average were kept in bfloat16."""
    live = Policy(str(saved), dtype="bfloat16").load()[0]
    name = "model.layers.0.mlp.up_proj.weight"
    frozen = EMA(decay=0.999)
    frozen.setup(live)
    frozen.refresh(live, 1)
    start = live.get_parameter(name).detach().float().clone()
    with torch.no_grad():
        live.get_parameter(name).fill_(1.0)
    for step in range(2, 502):
        frozen.refresh(live, step)
    expected = 1 - (1 - start) * 0.999**500
    torch.testing.assert_close(frozen.average[name], expected, rtol=1e-4, atol=1e-4)
    with frozen.model(live) as model:
        assert torch.equal(model.get_parameter(name), frozen.average[name].bfloat16())


def test_an_average_of_adapters_costs_adapters(adapted: Any) -> None:
    frozen = EMA(decay=0.5)
    frozen.setup(adapted)
    frozen.refresh(adapted, 1)
    assert frozen.average.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert stored(frozen)["average"].keys() == frozen.average.keys()


@pytest.mark.parametrize(
    ("make", "sentence"), [(lambda: Snapshot(every=0), "every must be"), (lambda: EMA(decay=1.0), "decay must be")]
)
def test_impossible_settings_are_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


# Another model -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_another_model_and_its_tokenizer(tmp_path: Path, live: Any) -> None:
    other = make_policy(tmp_path / "teacher", seed=5)
    frozen = Checkpoint(str(other), dtype="float32")
    frozen.setup(live)
    assert torch.equal(logits(frozen, live), plain_logits(Policy(str(other)).load()[0]))
    assert not torch.allclose(logits(frozen, live), plain_logits(live))
    assert frozen.tokenizer.eos_token == "<eos>"
    assert not any(p.requires_grad for p in frozen.loaded.parameters())


def test_a_checkpoint_is_loaded_when_it_is_first_needed(saved: Path, live: Any) -> None:
    frozen = Checkpoint(str(saved))
    assert frozen.loaded is None
    assert torch.equal(logits(frozen, live), plain_logits(live))


def test_the_settings_of_a_checkpoint_are_those_of_a_policy(saved: Path) -> None:
    policy = Checkpoint(str(saved), "bfloat16", "none", "eager", True, "v1").policy
    assert policy == Policy(
        str(saved), dtype="bfloat16", attn_implementation="eager", trust_remote_code=True, revision="v1"
    )


# Identity and checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("state_first", [False, True])
def test_a_resumed_run_has_the_same_policy(kind: str, state_first: bool, saved: Path, live: Any) -> None:
    """Whichever comes first, its set-up with the freshly loaded policy or the checkpoint."""
    frozen = MAKERS[kind](saved)
    frozen.setup(live)
    for step in range(1, 4):
        train(live, step)
        frozen.refresh(live, step)
    state, expected = stored(frozen), logits(frozen, live)
    fresh = Policy(str(saved)).load()[0]
    again = MAKERS[kind](saved)
    for action in (again.load_state_dict, again.setup) if state_first else (again.setup, again.load_state_dict):
        action(state if action == again.load_state_dict else fresh)
    fresh.load_state_dict(live.state_dict())  # Lightning restores the policy's own weights
    assert torch.equal(logits(again, fresh), expected)
    assert again.identity() == frozen.identity()
    for step in range(4, 7):  # and goes on in the same way
        for model, holder in ((live, frozen), (fresh, again)):
            train(model, step)
            holder.refresh(model, step)
    assert torch.equal(logits(again, fresh), logits(frozen, live))


def test_a_state_is_not_changed_by_what_follows(live: Any) -> None:
    for frozen in (Snapshot(every=1), EMA(decay=0.5)):
        frozen.setup(live)
        frozen.refresh(live, 1)
        state = frozen.state_dict()
        before = {n: w.clone() for n, w in state["weights"].items()}
        train(live, 3)
        frozen.refresh(live, 2)
        assert all(torch.equal(w, before[n]) for n, w in state["weights"].items())


def test_other_initial_weights_are_refused(tmp_path: Path, live: Any) -> None:
    frozen = FrozenCopy()
    frozen.setup(live)
    other = FrozenCopy()
    other.setup(Policy(str(make_policy(tmp_path / "other", seed=5))).load()[0])
    with pytest.raises(ValueError, match="is not the one that the checkpoint was written with"):
        other.load_state_dict(stored(frozen))


def test_another_kind_is_refused(live: Any) -> None:
    snapshot, copied = Snapshot(), FrozenCopy()
    snapshot.setup(live)
    copied.setup(live)
    with pytest.raises(ValueError, match="frozen policy is a 'snapshot', this one a 'frozen copy'"):
        copied.load_state_dict(stored(snapshot))
    with pytest.raises(ValueError, match="not the one"):
        Live().load_state_dict(stored(snapshot))


def test_a_checkpoint_may_move_but_not_change(saved: Path, tmp_path: Path, live: Any) -> None:
    frozen = Checkpoint(str(saved))
    frozen.setup(live)
    moved = Checkpoint(str(make_policy(tmp_path / "elsewhere")))  # the same seed, the same weights
    moved.setup(live)
    moved.load_state_dict(stored(frozen))
    changed = Checkpoint(str(make_policy(tmp_path / "other", seed=5)))
    changed.setup(live)
    with pytest.raises(ValueError, match="Restore the files it was loaded from"):
        changed.load_state_dict(stored(frozen))


# Checksums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_depends_on_every_bit_every_place_and_every_name(dtype: torch.dtype) -> None:
    values = torch.arange(12).to(dtype).reshape(3, 4)
    sums = {checksum([("a", values)]), checksum([("b", values)]), checksum([("a", values.reshape(4, 3))])}
    swapped = values.clone()
    swapped[0, 1], swapped[2, 2] = values[2, 2], values[0, 1]
    sums |= {checksum([("a", swapped)]), checksum([("a", values), ("b", values)])}
    for place in range(12):
        flipped = values.clone().flatten()
        bits = flipped.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        bits[place] ^= 1
        sums.add(checksum([("a", flipped.reshape(3, 4))]))
    assert len(sums) == 5 + 12


def test_a_checksum_is_summed_in_integers() -> None:
    """By Python's own: the same on every device, and in every order of the tensors."""
    tensors = {"y": torch.linspace(-1, 1, 1000), "x": torch.arange(-30, 30).short()}
    digest = hashlib.sha256()
    for name in ("x", "y"):
        values = tensors[name]
        data = values.numpy().tobytes()
        size = values.element_size()
        bits = [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]
        weighted = sum(i * x for i, x in enumerate(bits, 1))
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} {sum(bits)} {weighted};".encode())
    assert checksum(tensors.items()) == checksum(list(tensors.items())[::-1]) == digest.hexdigest()[:16]
    y = tensors["y"]
    assert checksum([("y", y[::2])]) == checksum([("y", y[::2].contiguous())])


# In a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["copy", "snapshot", "average", "checkpoint"])
def test_a_run_with_a_kl_term_resumes_exactly(kind: str, tmp_path: Path) -> None:
    check_resume(tmp_path, module=lambda policy: make_module(policy, reference=MAKERS[kind](policy), kl_coef=0.1))
