# SPDX-License-Identifier: Apache-2.0
"""GRPO from scratch, in one file: plain torch and transformers, no lit_rl. Read it from top to bottom, then run it:

    python examples/grpo_from_scratch.py

The task is to write a string of digits backwards: the prompt is "4071=" and the right completion is "1704" and an end
token. A tiny language model first imitates a careless teacher, so that it is right now and then, as a pretrained model
would be. Then reinforcement learning makes it reliable. It is told nothing but "right" (1) or "wrong" (0).

GRPO (DeepSeekMath, arXiv 2402.03300) in four sentences:

1. Sample a *group* of completions for each prompt and score every one of them.
2. The *advantage* of a completion is its reward minus the mean of its group, divided by the group's standard deviation:
   the other completions are the baseline, so there is no value network.
3. Raise the log-probability of the tokens of a completion with a positive advantage, lower the others, and stop pushing
   a token once its probability has changed by more than 20 %: the clip of PPO (arXiv 1707.06347).
4. Throw the completions away and sample again from the new weights.

What is left out, and why:

1. The reference policy with its KL penalty. With a verifiable reward many recipes train without it.
2. Mini-batches, schedules, several devices, checkpoints, logging: the business of a library, not of the algorithm.
3. A fast sampler and a head that never builds all the logits. At this size neither is needed; at a real size both are.

`lit_rl.GRPO` does the same arithmetic: tests/examples/test_grpo_from_scratch.py compares loss and gradient.
"""

import random
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

# The alphabet: a token a character.
PAD, END = 0, 1
CHARACTERS = "0123456789="
OFFSET = 2  # ids below are PAD and END
DIGITS = (4, 6)  # shortest and longest string of digits
CARELESSNESS = 0.2  # how often the teacher writes a wrong digit

# The sizes: B prompts a step, G completions each, N = B * G rows, T tokens in the longest completion, V vocabulary.
PROMPTS, GROUP_SIZE = 16, 8
MAX_TOKENS = DIGITS[1] + 1
PRETRAINING_STEPS, RL_STEPS = 500, 120
PASSES = 2  # optimizer steps on each batch of completions; from the second on, the clip has something to do
PRETRAINING_RATE, RL_RATE = 2e-3, 3e-4
CLIP = 0.2


def encode(text: str) -> list[int]:
    """Characters to ids."""
    return [CHARACTERS.index(c) + OFFSET for c in text]


def decode(ids: list[int]) -> str:
    """Ids to characters, up to the end token (which becomes a full stop)."""
    ids = ids[: ids.index(END) + 1] if END in ids else ids
    return "".join("." if i == END else CHARACTERS[i - OFFSET] if i >= OFFSET else "_" for i in ids)


def draw_digits(rng: random.Random) -> str:
    """A problem."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(*DIGITS)))


def reward(digits: str, completion: list[int]) -> float:
    """The verifier: 1 if the digits were written backwards and nothing else, 0 otherwise."""
    return float(decode(completion) == digits[::-1] + ".")


def build_model() -> Qwen2ForCausalLM:
    """A Qwen2 of 0.1 million parameters."""
    config = Qwen2Config(
        vocab_size=len(CHARACTERS) + OFFSET,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return Qwen2ForCausalLM(config)


def pretrain(model: Qwen2ForCausalLM, rng: random.Random) -> None:
    """Imitate a careless teacher: next-token prediction on completions with wrong digits in them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE)
    for _ in range(PRETRAINING_STEPS):
        rows, answers = [], []
        for _ in range(64):
            digits = draw_digits(rng)
            written = [rng.choice("0123456789") if rng.random() < CARELESSNESS else c for c in digits[::-1]]
            rows.append(encode(digits + "="))
            answers.append([*encode("".join(written)), END])
        prompts, prompt_mask = pad(rows, side="left")
        completions, mask = pad(answers, side="right")
        logprobs = completion_logprobs(model, prompts, prompt_mask, completions)
        loss = -(logprobs * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pad(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ragged ids as a tensor and its mask, both [N, T]. Prompts are padded left, so that generation starts flush."""
    width = max(len(r) for r in rows)
    empty = [[PAD] * (width - len(r)) for r in rows]
    ids = [e + r if side == "left" else r + e for e, r in zip(empty, rows)]
    mask = [[0] * len(e) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(e) for e, r in zip(empty, rows)]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def sample(model: Qwen2ForCausalLM, prompts: Tensor, prompt_mask: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """`group_size` completions of each prompt, and the mask of the tokens that the model produced.

    Args:
        prompts: [B, P], padded left.
        prompt_mask: [B, P].

    Returns:
        Ids and mask, [B * group_size, T]; the rows of a prompt follow each other. The end token counts as produced.
    """
    ids = model.generate(
        prompts,
        attention_mask=prompt_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,  # any restriction of the support would make the ratio below a ratio of two different things
        num_return_sequences=group_size,
        max_new_tokens=MAX_TOKENS,
    )
    completions = ids[:, prompts.shape[1] :]  # [N, T]
    ended = (completions == END).cumsum(1) - (completions == END).int()  # 0 up to and including the first end token
    return completions, (ended == 0).int()


def completion_logprobs(model: Qwen2ForCausalLM, prompts: Tensor, prompt_mask: Tensor, completions: Tensor) -> Tensor:
    """Log-probability of every completion token given what stands before it.

    Args:
        prompts: [N, P], padded left.
        prompt_mask: [N, P].
        completions: [N, T], padded right (causal attention never looks at that padding).

    Returns:
        [N, T]; meaningless where the completion is padding.
    """
    ids = torch.cat([prompts, completions], 1)  # [N, P + T]
    attention = torch.cat([prompt_mask, torch.ones_like(completions)], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # a prompt's first token is at 0 whatever the padding
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits  # [N, P + T, V]
    predicting = logits[:, prompts.shape[1] - 1 : -1]  # the logits at a position predict the token after it
    return F.log_softmax(predicting, -1).gather(-1, completions[..., None])[..., 0]


def advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """How much better each completion did than its group, in standard deviations (sample deviation, n - 1).

    A group that is all right or all wrong has nothing to compare: its advantages are 0 and it teaches nothing.

    Args:
        rewards: [N], the rows of a group following each other.
        group_size: G.

    Returns:
        [N].
    """
    groups = rewards.view(-1, group_size)  # [B, G]
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + eps)).flatten()


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = CLIP) -> Tensor:
    """The clipped surrogate, averaged over all completion tokens of the batch (the average of DAPO, arXiv 2503.14476).

    On the first pass the ratio is 1 everywhere and the *value* of the loss says nothing: it can be 0 while its gradient
    is not. Watch the reward, not the loss.

    Args:
        logprobs: [N, T] under the weights being trained, with gradient.
        old_logprobs: [N, T] under the weights that sampled, without.
        advantages: [N], one for each completion; all of its tokens share it.
        mask: [N, T], 1 where the model produced the token.
        clip: how far the ratio may move before a token stops being pushed.
    """
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    advantage = advantages[:, None]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    token_losses = -torch.min(ratio * advantage, clipped * advantage)
    return (token_losses * mask).sum() / mask.sum()


def grpo_step(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, rng: random.Random) -> float:
    """Sample, score, compare, update. Returns the mean reward."""
    digits = [draw_digits(rng) for _ in range(PROMPTS)]
    prompts, prompt_mask = pad([encode(d + "=") for d in digits], side="left")
    completions, mask = sample(model, prompts, prompt_mask, GROUP_SIZE)
    rewards = torch.tensor([reward(digits[i // GROUP_SIZE], row) for i, row in enumerate(completions.tolist())])
    advantage = advantages(rewards, GROUP_SIZE)
    prompts, prompt_mask = (x.repeat_interleave(GROUP_SIZE, 0) for x in (prompts, prompt_mask))  # [N, P]
    with torch.no_grad():
        old = completion_logprobs(model, prompts, prompt_mask, completions)
    for _ in range(PASSES):
        logprobs = completion_logprobs(model, prompts, prompt_mask, completions)
        loss = grpo_loss(logprobs, old, advantage, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(rewards.mean())


def main() -> None:
    """Pretrain, then reinforce, and print the reward as it rises."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = build_model()
    start = time.perf_counter()
    pretrain(model, rng)
    print(f"{PRETRAINING_STEPS} steps of imitating the careless teacher: {time.perf_counter() - start:.0f} s")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RL_RATE, weight_decay=0.0)
    recent: list[float] = []
    for step in range(1, RL_STEPS + 1):
        recent.append(grpo_step(model, optimizer, rng))
        if step % 10 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step:3d}  reward {mean:.3f}  {'#' * round(40 * mean)}  {time.perf_counter() - start:.0f} s")
            recent = []


if __name__ == "__main__":
    main()
