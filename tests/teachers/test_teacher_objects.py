# SPDX-License-Identifier: Apache-2.0
"""Teachers: what they are shown, whom they teach, which vocabularies go together, what they refuse."""

from pathlib import Path

import pytest
import torch
from lessons import padded_policy

from lit_rl.policies import EMA, AdapterOff, Checkpoint, FrozenCopy, Live, LoRA, Policy, PrivilegedPrompt, Teacher
from lit_rl.policies.divergence import vocabulary_divergence
from lit_rl.policies.divergence_tiles import View
from lit_rl.policies.scoring import find_head
from lit_rl.policies.teacher import assign
from lit_rl.policies.vocabulary import check_same_vocabulary, common_vocabulary
from lit_rl.prompts import PromptEncoder
from lit_rl.testing import make_policy
from lit_rl.tokenizers import build_character_tokenizer

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if enable_thinking %}think{% endif %}"


@pytest.fixture
def tokenizer():
    found = build_character_tokenizer(99)
    found.chat_template = CHAT
    return found


# --- what a teacher is shown -----------------------------------------------------------------------------------------


def shown(tokenizer, template: PrivilegedPrompt, record: dict, **encoder) -> str:
    student = PromptEncoder(tokenizer, **encoder)
    prompts = student.encode([record], [0])
    return tokenizer.decode(template.encode(student, [record], prompts)[0])


def test_columns_are_filled_in_and_other_braces_left_alone(tokenizer):
    template = PrivilegedPrompt(r"{prompt} Solution: {solution} Answer in \boxed{}.")
    assert template.columns == ("solution",)
    found = shown(tokenizer, template, {"prompt": "1+1?", "solution": "it is {prompt} 2", "uid": 0})
    assert found == r"1+1? Solution: it is {prompt} 2 Answer in \boxed{}."


def test_the_last_user_message_of_a_conversation_is_replaced(tokenizer):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "1+1?"},
    ]
    record = {"prompt": messages, "answer": 2, "uid": 0}
    template = PrivilegedPrompt("{prompt} ({answer})", chat_template_kwargs={"enable_thinking": True})
    assert shown(tokenizer, template, record) == "[system]be kind[user]1+1? (2)think"
    assert messages[1]["content"] == "1+1?", "the record of the dataset must not change"


def test_the_students_budget_does_not_bind_the_teacher(tokenizer):
    record = {"prompt": "1+1?", "answer": "a long story", "uid": 0}
    assert shown(tokenizer, PrivilegedPrompt("{prompt}{answer}"), record, max_prompt_tokens=4).endswith("story")
    with pytest.raises(ValueError, match="max_prompt_tokens=9"):
        shown(tokenizer, PrivilegedPrompt("{prompt}{answer}", max_tokens=9), record, max_prompt_tokens=4)


def test_an_empty_column_is_an_error_or_leaves_the_prompt_as_it_is(tokenizer):
    record = {"prompt": "1+1?", "solution": None, "uid": 77}
    with pytest.raises(ValueError, match="uid 77"):
        shown(tokenizer, PrivilegedPrompt("{prompt}{solution}"), record)
    assert shown(tokenizer, PrivilegedPrompt("{prompt}{solution}", missing="plain"), record) == "1+1?"


def test_callbacks_can_change_what_is_shown(tokenizer):
    """Columns are read from the prompts, not from the record, so that an intervention may rewrite them."""
    record = {"prompt": "q", "demo": "old", "uid": 0}
    student = PromptEncoder(tokenizer)
    prompts = student.encode([record], [0])
    prompts.columns["demo"] = ["new"]
    ids = PrivilegedPrompt("{prompt} {demo}").encode(student, [record], prompts)
    assert tokenizer.decode(ids[0]) == "q new"


@pytest.mark.parametrize("template", ["{solution}", "{prompt}", "nothing at all"])
def test_a_template_must_show_the_prompt_and_a_column(template):
    with pytest.raises(ValueError, match=r"needs \{prompt\} and at least one column"):
        PrivilegedPrompt(template)


def test_other_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match="missing"):
        PrivilegedPrompt(missing="skip")
    with pytest.raises(ValueError, match="the data has only"):
        PrivilegedPrompt().check_columns({"answer"})


# --- whom a teacher teaches ------------------------------------------------------------------------------------------


def test_each_prompt_goes_to_the_first_teacher_of_its_source(tokenizer):
    records = [{"prompt": "a", "source": s, "uid": i} for i, s in enumerate(("math", "code", "law"))]
    prompts = PromptEncoder(tokenizer).encode(records, range(3))
    math, code, everything = Teacher(Live(), sources=["math"]), Teacher(Live(), sources=["code"]), Teacher(Live())
    assert assign([math, code], prompts).tolist() == [0, 1, -1]
    assert assign([code, everything], prompts).tolist() == [1, 0, 1]
    assert assign([everything, code], prompts).tolist() == [0, 0, 0]


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_heads_padded_to_different_multiples_are_compared_over_what_they_share(tmp_path: Path):
    """Padding rows, whatever is in them, change nothing."""
    student, tokenizer = Policy(str(padded_policy(tmp_path / "student", 64))).load()
    teacher = Checkpoint(str(padded_policy(tmp_path / "teacher", 80)))
    wrapped = Teacher(teacher)
    wrapped.setup(student)
    wrapped.check_vocabulary(student, tokenizer)
    with wrapped.model(student) as model:
        assert common_vocabulary(student, model) == 64
        views = []
        for own in (student, model):
            hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
            views.append(View(hidden, find_head(own)))
        from lit_rl.objectives import Divergence

        before = vocabulary_divergence(*views, Divergence(1.0))
        model.get_output_embeddings().weight.data[64:] += 100.0
        torch.testing.assert_close(vocabulary_divergence(*views, Divergence(1.0)), before)


def test_another_tokenizer_is_refused_by_naming_a_token(tmp_path: Path):
    student, tokenizer = Policy(str(padded_policy(tmp_path / "student", 64))).load()
    teacher = Teacher(Checkpoint(str(padded_policy(tmp_path / "teacher", 99, vocabulary=99))))
    teacher.setup(student)
    with pytest.raises(ValueError, match=r"has the id .* there and None here"):
        teacher.check_vocabulary(student, tokenizer)


def test_a_head_shorter_than_the_vocabulary_is_refused(tmp_path: Path):
    student, tokenizer = Policy(str(padded_policy(tmp_path / "student", 64))).load()
    other = Policy(str(padded_policy(tmp_path / "other", 64))).load()[0]
    other.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="only 60 rows"):
        check_same_vocabulary(student, tokenizer, other, None)


@pytest.mark.parametrize("policy", [Live(), FrozenCopy(), EMA()])
def test_copies_of_the_policy_need_no_check(tmp_path: Path, policy):
    student, tokenizer = Policy(str(make_policy(tmp_path / "student"))).load()
    teacher = Teacher(policy)
    teacher.setup(student)
    teacher.check_vocabulary(student, tokenizer)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_a_teacher_is_its_policy_in_everything_that_is_saved(tmp_path: Path):
    student, _ = Policy(str(make_policy(tmp_path / "student"))).load()
    teacher = Teacher(EMA(decay=0.5))
    teacher.setup(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for step in (1, 2):
        teacher.refresh(student, step)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
    again = Teacher(EMA(decay=0.5))
    again.setup(student)
    again.load_state_dict(teacher.state_dict())
    assert again.identity() == teacher.identity()
    with teacher.model(student) as one, again.model(student) as other:
        for p, q in zip(one.parameters(), other.parameters()):
            assert torch.equal(p, q)
            assert not p.requires_grad


@pytest.mark.parametrize("policy", [Live(), EMA(), AdapterOff()])
def test_only_another_model_can_be_offloaded(policy):
    with pytest.raises(ValueError, match="offload"):
        Teacher(policy, offload=True)


def test_offloading_never_moves_weights_of_the_policy(tmp_path: Path):
    student, _ = Policy(str(make_policy(tmp_path / "student")), lora=LoRA(r=2)).load()
    with pytest.raises(ValueError, match="shares with the policy"):
        Teacher(FrozenCopy(), offload=True).setup(student)


def test_the_header_line_says_who_teaches_what():
    told = Teacher(Live(), PrivilegedPrompt("{prompt}{answer}{hint}"), sources=["math"])
    assert told.describe() == "Live, shown answer, hint, for math"
    assert Teacher(Checkpoint("some/model")).describe() == "Checkpoint(some/model)"
