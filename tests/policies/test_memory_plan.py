# SPDX-License-Identifier: Apache-2.0
"""The memory plan against models, optimizers and caches that are really built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny

from lit_rl.policies import (
    EMA,
    AdapterOff,
    Checkpoint,
    FrozenCopy,
    FrozenPolicy,
    Live,
    LoRA,
    Snapshot,
    Teacher,
    export,
    memory_plan,
)
from lit_rl.policies.head import tile_bytes
from lit_rl.tokenizers import build_character_tokenizer

SIZES: dict[str, Any] = {"rows": 4, "prompt_tokens": 5, "completion_tokens": 7, "micro_batch_tokens": 100}


def plan(model: Any, **changes: Any) -> Any:
    return memory_plan(model.config, **{**SIZES, "dtype": torch.float32, "device": "cpu"} | changes)


def size(tensors: Any) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_weights_are_counted_exactly(family: str) -> None:
    model = tiny(family)
    made = plan(model)
    assert made.parameters == made.trainable == sum(p.numel() for p in model.parameters())
    assert made.weights == made.gradients == size(model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lora", [LoRA(r=3), LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), LoRA(r=2, dora=True)]
)
def test_adapters_are_counted_exactly(lora: LoRA, dtype: torch.dtype) -> None:
    model = tiny("qwen2", dtype=dtype)
    made = plan(model, trainable=lora, dtype=dtype)
    wrapped = lora.apply(model.requires_grad_(False))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert made.trainable == sum(p.numel() for p in trained)
    assert made.parameters == sum(p.numel() for p in wrapped.parameters())
    assert made.gradients == size(trained)
    assert made.weights == size(wrapped.parameters())


@pytest.mark.parametrize("trainable", ["full", LoRA(r=3)])
def test_the_state_of_an_optimizer_is_counted_exactly(trainable: Any) -> None:
    model: Any = tiny("qwen2")
    made = plan(model, trainable=trainable)
    if trainable != "full":
        model = trainable.apply(model.requires_grad_(False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert made.optimizer == size(moments)
    assert plan(tiny("qwen2"), trainable=trainable, optimizer="sgd").optimizer == 0
    assert plan(tiny("qwen2"), trainable=trainable, optimizer="muon").optimizer == made.optimizer // 2
    assert plan(tiny("qwen2"), trainable=trainable, optimizer="adamw8bit").optimizer == made.optimizer // 4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2", "gemma2"])
def test_the_cache_is_counted_at_its_full_length(family: str) -> None:
    from transformers.cache_utils import DynamicCache

    model = tiny(family)
    cache = DynamicCache()  # without a configuration it keeps everything, as ours does
    ids = torch.full((SIZES["rows"], SIZES["prompt_tokens"] + SIZES["completion_tokens"]), 3)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert plan(model).kv_cache == sum(size([layer.keys, layer.values]) for layer in cache.layers)


def test_quantised_weights_are_counted_without_embeddings_norms_and_head() -> None:
    model = tiny("qwen2", dtype=torch.bfloat16, tie_word_embeddings=False)
    linear = [m.weight for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    count = sum(w.numel() for w in linear)
    rest = sum(p.numel() for p in model.parameters()) - count
    lora = LoRA(r=2)
    adapters = plan(model, trainable=lora).trainable
    for kind, item in (("nf4", 0.516), ("fp4", 0.516), ("int8", 1.0)):
        made = plan(model, trainable=lora, quantization=kind, dtype=torch.bfloat16)
        assert made.weights == pytest.approx(2 * rest + item * count + 4 * adapters, abs=1)


def test_the_head_needs_two_tiles_and_the_hidden_states() -> None:
    model = tiny("qwen2")
    tile = tile_bytes("cpu", 100, 50)
    assert tile == 4 * 100 * 50  # it fits in one
    assert plan(model).head == 2 * tile + 100 * 32 * (4 + 4)
    assert plan(model, head_chunk=10).head == 2 * 4 * 10 * 50 + 100 * 32 * 8


def test_tiles_do_not_grow_with_tokens_or_vocabulary() -> None:
    for device, limit in (("cpu", 8 << 20), ("cuda", 128 << 20)):
        assert tile_bytes(device, 10**6, 10**6) <= limit
        assert tile_bytes(device, 10**7, 10**7) <= limit
        assert tile_bytes(device, 0, 1000) == 0


class Saved:
    """Bytes that autograd keeps while it is entered, weights left out and shared memory once."""

    def __init__(self, model: Any) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return x

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("layers", [2, 6])
def test_activations_are_estimated_within_a_third(family: str, layers: int) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": layers}
    model: Any = tiny(family, attn="sdpa", **changes).train()
    saved = Saved(model)
    with saved.hooks:
        out = model.model(input_ids=torch.full((4, 50), 3), use_cache=False).last_hidden_state
    assert out.requires_grad
    estimate = plan(model, micro_batch_tokens=200).activations
    assert 0.67 < estimate / saved.size < 1.5, (estimate, saved.size)


def test_checkpointing_keeps_one_activation_a_layer() -> None:
    changes = {"hidden_size": 64, "intermediate_size": 176}
    few, many = (tiny("qwen2", num_hidden_layers=n, **changes) for n in (2, 12))
    assert plan(many).activations > 4 * plan(few).activations
    grown = plan(many, gradient_checkpointing=True).activations - plan(few, gradient_checkpointing=True).activations
    assert grown == 10 * 100 * 64 * 4


def test_the_peak_is_that_of_the_larger_phase() -> None:
    made = plan(tiny("qwen2"))
    assert made.rollout == made.weights + made.optimizer + made.kv_cache
    assert made.update == made.weights + made.gradients + made.optimizer + made.head + made.activations
    assert made.peak == max(made.rollout, made.update)
    assert plan(tiny("qwen2"), rows=10**6).peak == plan(tiny("qwen2"), rows=10**6).rollout


def own_bytes(model: Any, frozen: FrozenPolicy) -> int:
    """What a reference or teacher really keeps beside the policy."""
    live = {p.data_ptr() for p in model.parameters()}
    frozen.setup(model)
    frozen.refresh(model, 1)
    with frozen.model(model) as scoring:
        tensors = [*scoring.parameters(), *getattr(frozen, "average", {}).values()]
    return size(t for t in tensors if t.data_ptr() not in live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoRA(r=3)])
@pytest.mark.parametrize("kind", [Live, FrozenCopy, Snapshot, EMA, AdapterOff])
def test_references_and_teachers_are_counted_exactly(kind: Any, lora: LoRA | None, dtype: torch.dtype) -> None:
    if kind is AdapterOff and lora is None:
        pytest.skip("there is no adapter to switch off")
    model: Any = tiny("qwen2", dtype=dtype)
    made = plan(model, trainable=lora or "full", dtype=dtype)
    before = made.peak
    made.add("teacher", kind(), "cpu")
    model = model if lora is None else lora.apply(model.requires_grad_(False))
    assert made.frozen["teacher"] == own_bytes(model, kind())
    assert made.peak == before + made.frozen["teacher"]
    assert (made.frozen["teacher"] > 0) == (kind in (FrozenCopy, Snapshot, EMA))


def test_a_teacher_from_disk_is_counted_by_its_own_configuration(tmp_path: Any) -> None:
    tokenizer = build_character_tokenizer()
    model, teacher = tiny("qwen2"), tiny("llama", hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer))
    export(teacher, tokenizer, tmp_path / "teacher")
    made = plan(model)
    path = str(tmp_path / "teacher")
    made.add("wide", Checkpoint(path, dtype="float32"), "cpu")
    made.add("half", Checkpoint(path, dtype="bfloat16"), "cpu")
    made.add("away", Teacher(Checkpoint(path, dtype="bfloat16"), offload=True), "cuda")
    made.add("home", Teacher(Checkpoint(path, dtype="bfloat16"), offload=True), "cpu")
    whole = size(teacher.parameters())
    assert list(made.frozen.values()) == [whole, whole // 2, 0, whole // 2]
    assert "no weights of its own here" in str(made)
    small = Checkpoint(path, dtype="bfloat16")
    small.policy.quantization = "nf4"  # after construction, which asks for bitsandbytes
    made.add("small", small, "cuda")
    assert whole // 8 < made.frozen["small"] < whole // 2


def test_nothing_is_allocated() -> None:
    """A model of 70 billion parameters is planned in a moment."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    made = memory_plan(config, **SIZES)
    assert made.parameters == 70_553_706_496  # as published for Llama 3 70B
    assert made.weights == 2 * made.parameters


def test_the_table_is_readable() -> None:
    table = str(plan(tiny("qwen2")))
    assert "parameters" in table
    assert "peak, update" in table
    assert "MiB" in table
    assert max(len(line) for line in table.splitlines()) < 80
