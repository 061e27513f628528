# SPDX-License-Identifier: Apache-2.0
"""Reward models in Hugging Face format, on a tiny Qwen2 made here."""

import pickle
from pathlib import Path

import pytest
import torch
from inputs import reward_input

from lit_rl.rewards import RewardModelReward, RewardSetupError

TEXTS = ["a b c", "b", "", "c c a b a b c", "a a"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} ; {% endfor %}"


def save_model(path: Path, num_labels: int = 1, template: str | None = None, special: bool = True) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

    words = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "?", "user", "assistant", "system", ":", ";"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"} if special else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)
    fast.chat_template = template
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=num_labels,
        initializer_range=0.5,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reward_model"), template=TEMPLATE)


def by_hand(path: Path, texts: list[str], last: int | None = None) -> torch.Tensor:
    """One unpadded row at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    values = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = ids if last is None else ids[:, -last:]
        with torch.no_grad():
            values.append(model(input_ids=ids).logits[0, 0])
    return torch.stack(values)


def test_scores_are_those_of_single_rows_for_any_batch_size(path: Path) -> None:
    expected = by_hand(path, ["? " + text for text in TEXTS])
    assert expected.std() > 0.01  # the model tells them apart
    for batch_size in (1, 2, 5):
        reward = RewardModelReward(str(path), dtype="float32", device="cpu", batch_size=batch_size)
        values = reward(reward_input(TEXTS, prompts=["? "] * len(TEXTS)))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_messages_are_written_with_the_models_own_template(path: Path) -> None:
    reward = RewardModelReward(str(path), dtype="float32", device="cpu", messages_column="chat")
    system = [{"role": "system", "content": "c"}, {"role": "user", "content": "a"}]
    values = reward(reward_input(["b", "c"], chat=["a", system]))
    expected = by_hand(path, ["user : a ; assistant : b ; ", "system : c ; user : a ; assistant : c ; "])
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert len(system) == 2  # the dataset's own list is left alone


def test_long_inputs_lose_their_beginning(path: Path) -> None:
    reward = RewardModelReward(str(path), dtype="float32", device="cpu", max_length=3)
    values = reward(reward_input(TEXTS, prompts=["? "] * len(TEXTS)))
    expected = by_hand(path, ["? " + text for text in TEXTS], last=3)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_the_model_is_loaded_late_and_never_a_submodule(path: Path) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rewards = [RewardModelReward(str(path), device="cpu")]
            self.reward = self.rewards[0]

    module = Module()
    assert module.reward._model is None
    module.reward.self_test()
    assert module.reward._model is not None
    assert not list(module.parameters())
    assert not module.state_dict()
    assert not any(p.requires_grad for p in module.reward._model.parameters())
    assert pickle.loads(pickle.dumps(module.reward))._model is None
    module.reward.close()
    assert module.reward._model is None


def test_unusable_models_stop_the_run(tmp_path: Path) -> None:
    batch = reward_input(["a"], chat=["a"])
    two = save_model(tmp_path / "two", num_labels=2)
    with pytest.raises(RewardSetupError, match="2 outputs"):
        RewardModelReward(str(two), device="cpu")(batch)
    plain = save_model(tmp_path / "plain")
    with pytest.raises(RewardSetupError, match="no chat template"):
        RewardModelReward(str(plain), device="cpu", messages_column="chat")(batch)
    bare = save_model(tmp_path / "bare", special=False)
    with pytest.raises(RewardSetupError, match="no padding or end token"):
        RewardModelReward(str(bare), device="cpu")(batch)
    with pytest.raises(OSError, match="nowhere"):
        RewardModelReward(str(tmp_path / "nowhere"), device="cpu").self_test()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_length": 0}, {"dtype": "int8"}, {"dtype": "b"}])
def test_bad_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RewardModelReward("somewhere", **arguments)
