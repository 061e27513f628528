# SPDX-License-Identifier: Apache-2.0
"""From the words of a configuration to a model and a tokenizer, and sentences where that cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rl.policies import LoRA, Policy, build_small_model, export, loading, padded_vocab
from lit_rl.policies.loading import check_vocabulary, local_path, quantization_config
from lit_rl.testing import make_policy
from lit_rl.tokenizers import build_character_tokenizer, used_ids

IDS = torch.tensor([[5, 9, 20, 33]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy in hub format that no test changes."""
    return make_policy(tmp_path_factory.mktemp("policies") / "policy")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


# Folders and hub ids -------------------------------------------------------------------------------------------------


def test_a_policy_is_loaded_ready_to_train(saved: Path) -> None:
    model, tokenizer = Policy(str(saved)).load()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("7+2=")["input_ids"]) == "7+2="


def test_a_frozen_policy_is_loaded_ready_to_score(saved: Path) -> None:
    model, _ = Policy(str(saved), lora=LoRA()).load_frozen()
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_a_home_folder_is_found(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert len(Policy("~/policy").load()) == 2
    assert len(Policy(str(saved), tokenizer="~/policy").load()) == 2


@pytest.mark.parametrize("path", ["./policy", "/no/such/policy", "runs/a/policy", "~/policy", "../policy", "a b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"There is no folder {re.escape(path)}"):
        Policy(path).load()


@pytest.mark.parametrize("path", ["Qwen/Qwen3-0.6B", "gpt2", "meta-llama/Llama-3.2_1B"])
def test_hub_ids_are_left_to_the_hub(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path(path) == path


def test_a_hub_id_that_cannot_be_had_may_be_a_mistyped_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoConfig

    def offline(path: str, **kwargs: Any) -> Any:
        raise OSError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(OSError, match="There is no folder runs/polcy, and loading it from the Hugging Face hub failed"):
        Policy("runs/polcy").load()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Policy(str(tmp_path)).load()


def test_revision_and_trust_reach_the_hub(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    import transformers

    seen: dict[str, tuple[Any, Any]] = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        auto = getattr(transformers, name)

        def recorded(path: str, name: str = name, original: Any = auto.from_pretrained, **kwargs: Any) -> Any:
            seen.setdefault(name, (kwargs.get("revision"), kwargs.get("trust_remote_code")))
            return original(path, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", recorded)
    Policy(str(saved), revision="v2").load()
    assert seen == dict.fromkeys(seen, ("v2", False))
    assert len(seen) == 3
    seen.clear()
    Policy(str(saved), revision="v2", trust_remote_code=True, tokenizer=str(saved)).load()
    assert seen.pop("AutoTokenizer") == (None, True)  # the revision is not another repository's
    assert seen == dict.fromkeys(seen, ("v2", True))


def test_foreign_code_does_not_run_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "the code ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import Qwen2Config\n"
        f"Path({str(marker)!r}).touch()\nclass OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        Policy(str(folder)).load()
    assert not marker.exists()
    assert type(Policy(str(folder), trust_remote_code=True).config()).__name__ == "OwnConfig"
    assert marker.exists()


# The tokenizer -------------------------------------------------------------------------------------------------------


def separate_tokenizer(folder: Path, **changes: Any) -> str:
    """A folder with a tokenizer alone. Beside some models' configurations special tokens would get that family's."""
    build_character_tokenizer().save_pretrained(folder)
    edit(folder / "tokenizer_config.json", **changes)
    return str(folder)


def test_a_tokenizer_without_an_end_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no end-of-sequence token, so no completion could end by itself: set eos"):
        Policy(str(saved), tokenizer=separate_tokenizer(tmp_path, eos_token=None)).load()


def test_a_tokenizer_without_padding_pads_with_the_end(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", pad_token_id=None)
    model, tokenizer = Policy(str(folder), tokenizer=separate_tokenizer(tmp_path / "t", pad_token=None)).load()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 1


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    build_character_tokenizer(99).save_pretrained(folder)
    with pytest.raises(ValueError, match="has ids up to 98, but the model only has 64 embeddings"):
        Policy(str(folder)).load()


def test_more_embeddings_than_ids_are_fine() -> None:
    tokenizer = build_character_tokenizer()
    for rows, padded in ((64, None), (80, 64)):
        model = build_small_model(vocab_size=rows, hidden_size=16, num_layers=1)
        check_vocabulary(model, tokenizer)
        assert padded_vocab(model, tokenizer) == padded


def test_the_tokenizer_may_come_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    build_character_tokenizer(50).save_pretrained(other)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _, tokenizer = Policy(str(folder), tokenizer=str(other)).load()
    assert used_ids(tokenizer) == 50


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("as_file", [False, True])
def test_the_chat_template_can_be_replaced(saved: Path, tmp_path: Path, as_file: bool) -> None:
    template = TEMPLATE
    if as_file:
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        template = str(tmp_path / "chat.jinja")
    _, tokenizer = Policy(str(saved), chat_template=template).load()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert Policy(str(saved)).load()[1].chat_template is None


def test_a_missing_template_file_is_not_taken_for_a_template(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a Jinja template nor a file: chat\.jinja"):
        Policy(str(saved), chat_template="chat.jinja").load()


# The model -----------------------------------------------------------------------------------------------------------


def test_types(folder: Path, tmp_path: Path) -> None:
    assert Policy(str(folder), dtype="bfloat16").load()[0].dtype == torch.bfloat16
    model, tokenizer = Policy(str(folder), dtype="float16").load_frozen()
    half = export(model, tokenizer, tmp_path / "half")
    assert Policy(str(half)).load()[0].dtype == torch.float16  # as it was saved
    assert Policy(str(half), dtype="float32").load()[0].dtype == torch.float32


def test_attention_and_checkpointing(saved: Path) -> None:
    model, _ = Policy(str(saved), attn_implementation="eager", gradient_checkpointing=True).load()
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing
    assert not Policy(str(saved)).load()[0].is_gradient_checkpointing


@pytest.mark.parametrize(("name", "value"), [("dtype", "fp32"), ("quantization", "int4")])
def test_misspelt_settings_are_refused(name: str, value: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        Policy(str(saved), **{name: value})


# Adapters ------------------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained_and_fresh_ones_change_nothing(saved: Path) -> None:
    plain = logits(Policy(str(saved)).load()[0])
    model, _ = Policy(str(saved), lora=LoRA(r=3)).load()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    assert model.training
    adapted = {n.split(".")[-4] for n in trained}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # not the head
    assert torch.equal(logits(model), plain)


def test_gradients_reach_adapters_through_checkpointed_layers(saved: Path) -> None:
    model, _ = Policy(str(saved), lora=LoRA(r=2), gradient_checkpointing=True).load()
    model(input_ids=IDS).logits.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_updates_are_scaled_by_alpha(saved: Path, rslora: bool, scaling: float) -> None:
    model, _ = Policy(str(saved), lora=LoRA(r=4, alpha=8, rslora=rslora)).load()
    found = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert found == {scaling}


def test_chosen_layers_get_adapters_and_others_are_trained_in_full(saved: Path) -> None:
    lora = LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm"], dora=True)
    model, _ = Policy(str(saved), lora=lora).load()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("norm.modules_to_save" in n for n in trained)
    assert {"q_proj"} == {n.split(".self_attn.")[1].split(".")[0] for n in trained if "self_attn" in n}
    assert any("magnitude" in n for n in trained)


def test_adapters_over_half_precision_weights_are_float32(saved: Path) -> None:
    model, _ = Policy(str(saved), dtype="bfloat16", lora=LoRA(r=2)).load()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("settings", "sentence"), [({"r": 0}, "r must be"), ({"dropout": 1.0}, "dropout must be")])
def test_impossible_adapters_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoRA(**settings)


def trained_adapter(saved: Path, folder: Path) -> tuple[Path, torch.Tensor]:
    """An exported adapter that changes something, and the logits with it."""
    model, tokenizer = Policy(str(saved), lora=LoRA(r=2)).load()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    return export(model, tokenizer, folder), logits(model)


def test_a_folder_with_an_adapter_is_its_base_with_the_adapter_merged(saved: Path, tmp_path: Path) -> None:
    folder, expected = trained_adapter(saved, tmp_path / "adapter")
    model, tokenizer = Policy(str(folder)).load()
    torch.testing.assert_close(logits(model), expected)
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    assert tokenizer.eos_token == "<eos>"
    again, _ = Policy(str(folder), lora=LoRA(r=2)).load()  # fresh adapters on top of what was learned
    torch.testing.assert_close(logits(again), expected)


def test_an_adapter_whose_base_has_moved_says_so(folder: Path, tmp_path: Path) -> None:
    adapter, _ = trained_adapter(folder, tmp_path / "adapter")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"holds an adapter for .*policy, which is not there: put the base"):
        Policy(str(adapter)).load()
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "elsewhere"))
    assert len(Policy(str(adapter)).load()) == 2


# Quantised weights ---------------------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_their_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lora needs the package peft: pip install 'lit-rl\[peft\]'"):
        Policy(str(saved), lora=LoRA())
    with pytest.raises(ImportError, match=r"quantization=nf4 needs the package bitsandbytes"):
        Policy(str(saved), quantization="nf4")


def test_quantised_weights_cannot_be_trained_without_adapters(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="Weights in nf4 cannot be trained: set lora"):
        Policy(str(saved), quantization="nf4").load()


@pytest.mark.parametrize(
    ("kind", "dtype", "compute"), [("nf4", "auto", torch.bfloat16), ("fp4", "float16", torch.float16)]
)
def test_four_bits_as_in_qlora(kind: Any, dtype: Any, compute: torch.dtype) -> None:
    config = quantization_config(kind, dtype)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, kind, True)
    assert config.bnb_4bit_compute_dtype == compute
    assert quantization_config("int8", "auto").load_in_8bit


# Small models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gpt2", "gemma2", "gemma3_text", "mistral", "opt"])
def test_small_models_of_many_families(architecture: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    torch.manual_seed(0)
    model: Any = build_small_model(architecture, vocab_size=50, eos_token_id=1, pad_token_id=0, **sizes)
    config = model.config.get_text_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 1
    assert model(input_ids=IDS).logits.shape == (1, 4, 50)
    torch.manual_seed(0)
    again: Any = build_small_model(architecture, vocab_size=50, eos_token_id=1, pad_token_id=0, **sizes)
    assert torch.equal(logits(model), logits(again))


def test_small_models_refuse_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="hidden_size=30 must be a multiple of num_heads=4"):
        build_small_model(vocab_size=50, hidden_size=30)
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        build_small_model(vocab_size=50, num_kv_heads=3)
