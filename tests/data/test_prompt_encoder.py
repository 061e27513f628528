# SPDX-License-Identifier: Apache-2.0
"""Prompts become token ids in one place: chat template once, special tokens once, budget kept."""

import doctest
import warnings
from typing import Any

import pytest
import torch

from lit_rl import prompts
from lit_rl.prompts import PromptEncoder
from lit_rl.tokenizers import build_character_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if quiet %}hush {% endif %}{% endif %}"
)
USER = [{"role": "user", "content": "1+1"}]


def make_tokenizer(frame: str = "", template: str | None = TEMPLATE, bos: bool = True) -> Any:
    """One token a character; ``frame`` says which special tokens the tokenizer adds: ``b``, ``e``, both or none."""
    tokenizer = build_character_tokenizer(99)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    if frame:
        from tokenizers.processors import TemplateProcessing

        single = " ".join(["<bos>"] * ("b" in frame) + ["$A"] + ["<eos>"] * ("e" in frame))
        special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def encode_one(encoder: PromptEncoder, prompt: Any, **columns: Any) -> tuple[str, list[int]]:
    encoded = encoder.encode([{"prompt": prompt, **columns}], [0])
    return encoded.text[0], encoded.ids[0].tolist()


# Chat template and special tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["", "b", "be"])
def test_messages_go_through_the_chat_template_exactly_once(frame: str) -> None:
    tokenizer = make_tokenizer(frame)
    text, ids = encode_one(PromptEncoder(tokenizer), USER)
    assert text == "<bos><user>1+1</user><assistant>"
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's own: the tokenizer's frame would be a second
    assert tokenizer.eos_token_id not in ids
    assert ids == tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]


def test_the_chat_template_is_rendered_once_for_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    rendered, render = [], type(tokenizer).apply_chat_template

    def counting(self: Any, conversation: Any, **kwargs: Any) -> Any:
        rendered.append(conversation)
        return render(self, conversation, **kwargs)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counting)
    PromptEncoder(tokenizer).encode([{"prompt": USER}, {"prompt": "plain"}, {"prompt": USER}], [0, 1, 2])
    assert rendered == [USER, USER]


def test_a_string_is_a_document_unless_the_template_is_asked_for() -> None:
    tokenizer = make_tokenizer("b")
    assert encode_one(PromptEncoder(tokenizer), "1+1")[0] == "1+1"
    text, ids = encode_one(PromptEncoder(tokenizer, template="chat"), "1+1")
    assert (text, ids) == encode_one(PromptEncoder(tokenizer), USER)


@pytest.mark.parametrize("frame", ["", "b", "e", "be"])
@pytest.mark.parametrize("text", ["1+1", "<bos>1+1"])
def test_a_document_begins_at_most_once_and_never_ends(frame: str, text: str) -> None:
    tokenizer = make_tokenizer(frame)
    _, ids = encode_one(PromptEncoder(tokenizer), text)
    begin = [tokenizer.bos_token_id] * ("b" in frame or text.startswith("<bos>"))
    assert ids == [*begin, *tokenizer("1+1", add_special_tokens=False)["input_ids"]]


def test_a_document_that_ends_with_the_end_token_itself_keeps_it() -> None:
    tokenizer = make_tokenizer()
    assert encode_one(PromptEncoder(tokenizer), "1+1<eos>")[1][-1] == tokenizer.eos_token_id


def test_plain_joins_messages_for_models_without_a_template() -> None:
    tokenizer = make_tokenizer(template=None)
    messages = [{"role": "system", "content": "add"}, *USER]
    assert encode_one(PromptEncoder(tokenizer, template="plain"), messages)[0] == "add\n\n1+1"


def test_a_system_prompt_is_put_first_unless_there_is_one() -> None:
    encoder = PromptEncoder(make_tokenizer(), system_prompt="add")
    assert encode_one(encoder, USER)[0] == "<bos><system>add</system><user>1+1</user><assistant>"
    own = [{"role": "system", "content": "own"}, *USER]
    assert encode_one(encoder, own)[0] == "<bos><system>own</system><user>1+1</user><assistant>"
    assert own[0]["content"] == "own"
    assert len(USER) == 1  # the record is left alone


def test_further_arguments_reach_the_template() -> None:
    encoder = PromptEncoder(make_tokenizer(), chat_template_kwargs={"quiet": True})
    assert encode_one(encoder, USER)[0].endswith("<assistant>hush ")


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"template": "chat"}, "x", "needs a chat template"),
        ({}, USER, "is a list of messages, and the tokenizer has none"),
        ({"template": "plain", "system_prompt": "x"}, "x", "system_prompt is a chat message"),
        ({"system_prompt": "x"}, "x", "plain text, which cannot take the system_prompt"),
        ({"template": "html"}, "x", "template must be one of"),
        ({"overlong": "wrap"}, "x", "overlong must be one of"),
        ({"max_prompt_tokens": 0}, "x", "max_prompt_tokens must be at least 1"),
        ({}, "", "is empty"),
        ({"template": "plain"}, [{"role": "user", "content": ""}], "is empty"),
    ],
)
def test_what_cannot_be_encoded_is_refused_with_advice(options: dict[str, Any], prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_one(PromptEncoder(make_tokenizer(template=None), **options), prompt)


def test_a_conversation_that_the_assistant_has_ended_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uid 5 .* ends with an assistant message"):
        encode_one(PromptEncoder(make_tokenizer()), [*USER, {"role": "assistant", "content": "2"}], uid=5)


# The budget ---------------------------------------------------------------------------------------------------------


def test_a_prompt_of_exactly_the_budget_fits() -> None:
    encoder = PromptEncoder(make_tokenizer(), max_prompt_tokens=3)
    assert len(encode_one(encoder, "1+1")[1]) == 3
    with pytest.raises(ValueError, match=r"uid 9 \(source 'sums'\) has 4 tokens, more than max_prompt_tokens=3"):
        encode_one(encoder, "1+11", uid=9, source="sums")


def test_overlong_prompts_are_dropped_counted_and_warned_about_once() -> None:
    encoder = PromptEncoder(make_tokenizer(), max_prompt_tokens=3, overlong="drop")
    records = [{"prompt": p, "answer": p, "uid": i} for i, p in enumerate(["1+1", "too long", "2+2", "also long"])]
    with pytest.warns(UserWarning, match="uid 1 .* left out. Further ones are counted"):
        encoded = encoder.encode(records, [10, 11, 12, 13])
    assert encoded.columns == {"answer": ["1+1", "2+2"]}
    assert encoded.draw.tolist() == [10, 12]
    assert encoder.dropped == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(encoder.encode(records[1:2], [11])) == 0
    assert encoder.dropped == 3


def test_an_overlong_prompt_may_keep_its_last_tokens() -> None:
    tokenizer = make_tokenizer()
    text, ids = encode_one(PromptEncoder(tokenizer, max_prompt_tokens=4, overlong="truncate_left"), "what is 1+1")
    assert text == " 1+1" == tokenizer.decode(ids)


# What comes out -----------------------------------------------------------------------------------------------------


def test_every_other_column_is_passed_on_and_missing_ones_are_none() -> None:
    records = [
        {"prompt": "a", "answer": 1, "source": "x", "uid": 4, "completion": [1, 2]},
        {"prompt": "b", "answer": None, "meta": {"k": [1]}},
    ]
    encoded = PromptEncoder(make_tokenizer()).encode(records, [7, 9])
    assert encoded.columns == {"answer": [1, None], "completion": [[1, 2], None], "meta": [None, {"k": [1]}]}
    assert encoded.source == ["x", ""]
    assert encoded.uid[0] == 4
    assert encoded.draw.tolist() == [7, 9]
    assert all(ids.dtype == torch.long and ids.dim() == 1 for ids in encoded.ids)


def test_a_prompt_without_a_number_has_a_stable_identity() -> None:
    encoder = PromptEncoder(make_tokenizer())
    first, second = (encoder.encode([{"prompt": p} for p in ("a", USER)], [0, 1]).uid for _ in range(2))
    assert torch.equal(first, second)
    assert first[0] != first[1]


def test_records_and_draws_belong_together() -> None:
    with pytest.raises(ValueError, match="one draw for each record, got 1 and 2"):
        PromptEncoder(make_tokenizer()).encode([{"prompt": "a"}], [0, 1])
    assert len(PromptEncoder(make_tokenizer()).encode([], [])) == 0


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(prompts).failed == 0
