# SPDX-License-Identifier: Apache-2.0
"""Folders in hub format: what is written comes back, and a reader never sees half of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rl.policies import LoRA, Policy, export, merge_adapter
from lit_rl.policies import exporting as exporting_module
from lit_rl.testing import make_policy

IDS = torch.tensor([[5, 9, 20, 33]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policies") / "policy")


@pytest.fixture
def policy(saved: Path) -> tuple[Any, Any]:
    return Policy(str(saved)).load()


@pytest.fixture
def adapted(saved: Path) -> tuple[Any, Any]:
    """A policy whose adapters change something."""
    model, tokenizer = Policy(str(saved), lora=LoRA(r=2)).load()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model, tokenizer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_exported_is_loaded_again(policy: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = policy
    tokenizer.chat_template = "{{ messages[0].content }}"
    model.generation_config.eos_token_id = [1, 7]
    folder = export(model, tokenizer, tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    again, its_tokenizer = Policy(str(folder)).load()
    for (name, mine), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    assert torch.equal(logits(model), logits(again))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert again.generation_config.eos_token_id == [1, 7]
    assert content(export(again, its_tokenizer, tmp_path / "c")) == content(folder)  # and nothing gets lost on the way


def test_half_precision_weights_stay_so(saved: Path, tmp_path: Path) -> None:
    folder = export(*Policy(str(saved), dtype="bfloat16").load(), tmp_path / "half")
    assert Policy(str(folder)).load()[0].dtype == torch.bfloat16


def test_an_earlier_export_is_replaced_as_a_whole(policy: tuple[Any, Any], tmp_path: Path) -> None:
    folder = export(*policy, tmp_path / "policy")
    (folder / "model-00002-of-00002.safetensors").write_text("of a larger model")
    export(*policy, folder)
    assert not (folder / "model-00002-of-00002.safetensors").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["policy"]


def test_an_empty_folder_is_filled(policy: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert (export(*policy, tmp_path / "new") / "config.json").exists()


def test_a_folder_that_holds_something_else_is_refused(policy: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is not a model in hub format: choose another folder"):
        export(*policy, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError):
        export(*policy, tmp_path / "file")


@pytest.mark.parametrize("broken", ["model", "tokenizer", "flush"])
def test_a_failed_export_leaves_the_earlier_one(
    broken: str, policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = policy
    folder = export(model, tokenizer, tmp_path / "policy")
    before = content(folder)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    if broken == "flush":
        monkeypatch.setattr(exporting_module, "_flush", fail)
    else:
        monkeypatch.setattr(type(model if broken == "model" else tokenizer), "save_pretrained", fail)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with pytest.raises(OSError, match="no space"):
        export(model, tokenizer, folder)
    assert content(folder) == before
    assert [f.name for f in tmp_path.iterdir()] == ["policy"]


def test_at_every_moment_the_folder_is_whole_or_away(
    policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before every change of the file system that matters: at its place is all or nothing."""
    model, tokenizer = policy
    folder = export(model, tokenizer, tmp_path / "policy")
    old = content(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    seen: list[Any] = []
    flush, replace = exporting_module._flush, os.replace

    def look() -> None:
        seen.append(content(folder) if folder.exists() else None)

    monkeypatch.setattr(exporting_module, "_flush", lambda path: (look(), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (look(), replace(a, b), look()))
    export(model, tokenizer, folder)
    new = content(folder)
    assert new != old
    assert all(state in (None, old, new) for state in seen)
    order = [0 if state == old else 1 if state is None else 2 for state in seen]
    assert order == sorted(order)
    assert order.count(1) == 2  # the old one steps aside, the new one takes its place: away for two renames only


def test_files_are_on_disk_before_the_folder_takes_its_place(
    policy: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, swap = exporting_module._flush, exporting_module._swap
    monkeypatch.setattr(exporting_module, "_flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(exporting_module, "_swap", lambda new, folder: (events.append("swap"), swap(new, folder)))
    folder = export(*policy, tmp_path / "policy")
    assert set(events[: events.index("swap")]) == set(content(folder))


# Adapters ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_written_alone(adapted: tuple[Any, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = adapted
    folder = export(model, tokenizer, tmp_path / "adapter")
    files = {f.name for f in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "config.json" not in files
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 40_000  # the base has 80 kB
    again = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))
    export(model, tokenizer, folder)  # may be replaced


def test_a_merged_policy_needs_neither_adapter_nor_base(adapted: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = adapted
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    folder = export(model, tokenizer, tmp_path / "merged", merge=True)
    assert not (folder / "adapter_config.json").exists()
    again, _ = Policy(str(folder)).load()
    torch.testing.assert_close(logits(again), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # training can go on
    assert hasattr(model, "peft_config")


def test_merging_a_model_without_adapters_is_the_model(policy: tuple[Any, Any], tmp_path: Path) -> None:
    assert merge_adapter(policy[0]) is policy[0]
    assert (export(*policy, tmp_path / "merged", merge=True) / "config.json").exists()


def test_merging_into_quantised_weights_must_be_forced(adapted: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = adapted
    model.get_base_model().quantization_method = SimpleNamespace(value="bitsandbytes")
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\), so merging would round the trained policy"):
        export(model, tokenizer, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    assert not hasattr(merge_adapter(model, force=True), "peft_config")
