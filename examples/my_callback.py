"""A callback of one's own, and the two tests that make it a good neighbour."""

# --8<-- [start:callback]

from lit_rl import RolloutCallback, Rollouts


class ShortestCorrect(RolloutCallback):
    """Among the correct completions of a group, train on the shortest share only.

    Args:
        keep: share of the correct completions of a group that train; 1 leaves the run alone.
    """

    requires = frozenset({"correct"})

    def __init__(self, keep: float = 0.5) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}: it is a share of the correct completions.")
        self.keep = keep

    def on_batch_ready(self, trainer, module, rollouts: Rollouts) -> None:
        right = rollouts.correct == 1
        for group in range(len(rollouts.prompts)):
            rows = (right & (rollouts.group == group)).nonzero()[:, 0]
            by_length = rows[rollouts.lengths[rows].argsort(stable=True)]
            rollouts.loss_weights[by_length[round(self.keep * len(rows)) :]] = 0.0
        module.ledger.mean("shortest_correct/trained", (rollouts.loss_weights != 0).any(1).float())


# --8<-- [end:callback]
# --8<-- [start:tests]
def test_keeping_all_changes_nothing(tmp_path):
    from lit_rl.testing import check_neutral

    check_neutral(tmp_path, lambda: [ShortestCorrect(keep=1.0)])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    from lit_rl.testing import check_resume

    check_resume(tmp_path, lambda: [ShortestCorrect()])


# --8<-- [end:tests]
