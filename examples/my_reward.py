"""A reward: a batch of completions in, one value each out, None where a completion cannot be scored."""

from lit_rl.rewards import RewardInput


def says_please(batch: RewardInput) -> list[float | None]:
    """1 for a polite completion, 0 for another, nothing for an empty one."""
    return [float("please" in text.lower()) if text else None for text in batch.completions]


def close_enough(completion: str, answer: str) -> float:
    """1 for the right number, less the further away it is, 0 for text."""
    try:
        return 1.0 / (1.0 + abs(float(completion.rpartition("#")[2]) - float(answer)))
    except ValueError:
        return 0.0
