# SPDX-License-Identifier: Apache-2.0
"""Streams are pure functions of (seed, index); evaluation sets are divided over ranks without repeats."""

import doctest
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rl import data
from lit_rl.data import (
    EvalChunks,
    EvalSet,
    GeneratedStream,
    ListStream,
    MixedStream,
    PromptDataModule,
    PromptStream,
    RelabelledStream,
    Ticker,
    block_counts,
)


def numbered(n: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {i}", "answer": i, **columns} for i in range(n)]


def dice(rng: random.Random) -> dict[str, Any]:
    return {"prompt": f"{rng.randrange(10**9)}?", "answer": "x"}


def streams(seed: int = 0) -> dict[str, PromptStream]:
    return {
        "list": ListStream(numbered(7), seed),
        "unshuffled": ListStream(numbered(7), seed, shuffle=False),
        "generated": GeneratedStream(dice, seed),
        "mixed": MixedStream({"a": ListStream(numbered(7), seed), "b": GeneratedStream(dice, seed)}, seed=seed),
        "relabelled": RelabelledStream(GeneratedStream(dice, seed), "other"),
    }


@pytest.mark.parametrize("kind", list(streams()))
@given(cursor=st.integers(0, 200), n=st.integers(0, 20), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_a_stream_is_a_pure_function_of_seed_and_index(kind: str, cursor: int, n: int, seed: int) -> None:
    walked = streams(seed)[kind]
    everything = [walked.draw(i) for i in range(cursor + n)]
    fresh = streams(seed)[kind]
    random.seed(cursor)  # global generators play no part
    assert fresh.at(cursor, n) == everything[cursor:]
    assert fresh.at(cursor, n) == everything[cursor:]  # nor does what was drawn before


@pytest.mark.parametrize("kind", ["list", "generated", "mixed", "relabelled"])
def test_another_seed_gives_other_prompts(kind: str) -> None:
    first, second = (streams(seed)[kind].at(0, 7) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("kind", list(streams()))
def test_every_record_is_complete_and_its_columns_are_known(kind: str) -> None:
    stream = streams()[kind]
    for record in stream.at(0, 20):
        assert {"prompt", "uid", "source"} <= set(record)
        assert isinstance(record["uid"], int)
        assert stream.columns() == set(record) - {"prompt", "uid", "source"} == {"answer"}


def test_each_epoch_of_a_list_holds_every_record_once_in_another_order() -> None:
    stream = ListStream(numbered(20), seed=3)
    epochs = [[r["answer"] for r in stream.at(20 * e, 20)] for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [r["answer"] for r in ListStream(numbered(20), shuffle=False).at(0, 41)] == [*range(20), *range(20), 0]


def test_a_prompt_has_the_same_identity_in_every_epoch_and_another_one_than_other_prompts() -> None:
    stream = ListStream(numbered(5), seed=1)
    uids = {(r["answer"], r["uid"]) for r in stream.at(0, 25)}
    assert len(uids) == 5
    assert len({uid for _, uid in uids}) == 5
    own = ListStream([{"prompt": "a", "uid": 7}, {"prompt": "b", "uid": "text"}, {"prompt": "c"}], shuffle=False)
    assert own.draw(0)["uid"] == 7
    assert all(isinstance(r["uid"], int) for r in own.at(0, 3))


def test_records_are_not_shared_with_whoever_draws_them() -> None:
    stream = ListStream(numbered(1))
    stream.draw(0)["answer"] = "edited"
    assert stream.draw(0)["answer"] == 0


def test_a_source_without_records_and_a_record_without_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'train\.jsonl' has no records"):
        ListStream([], source="train.jsonl")
    with pytest.raises(ValueError, match=r"Record 1 of the data source 'data' has no 'prompt', only \['question'\]"):
        ListStream([{"prompt": "a"}, {"question": "b"}])
    with pytest.raises(ValueError, match="must not be negative"):
        ListStream(numbered(3)).at(-1, 2)


@pytest.mark.parametrize("kind", list(streams()))
def test_the_fingerprint_changes_with_the_data_and_with_nothing_else(kind: str) -> None:
    drawn = streams()[kind]
    drawn.at(5, 9)
    assert drawn.fingerprint() == streams()[kind].fingerprint()
    if kind != "unshuffled":
        assert drawn.fingerprint() != streams(1)[kind].fingerprint()
    changed = ListStream([*numbered(6), {"prompt": "prompt 6", "answer": "changed"}])
    assert changed.fingerprint() != streams()["list"].fingerprint()


# Mixtures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "block"), [(None, 2), ({"a": 3, "b": 1}, 4), ({"a": 0.7, "b": 0.3}, 10), ({"a": 1, "b": 2.5}, 7)]
)
def test_a_mixture_holds_each_source_exactly_as_often_as_its_weight_says(weights: dict | None, block: int) -> None:
    sources = {"a": ListStream(numbered(9)), "b": GeneratedStream(dice)}
    stream = MixedStream(sources, weights, seed=5)
    assert stream.block == block
    share = 0.5 if weights is None else weights["a"] / sum(weights.values())
    for start in range(0, 20 * block, block):
        assert Counter(r["source"] for r in stream.at(start, block))["a"] == round(share * block)
    orders = {tuple(r["source"] for r in stream.at(start, block)) for start in range(0, 40 * block, block)}
    assert len(orders) > 1


def test_a_mixture_goes_through_each_source_without_gaps_or_repeats() -> None:
    sources = {"a": ListStream(numbered(8), seed=1), "b": ListStream(numbered(50), seed=2)}
    drawn = MixedStream(sources, {"a": 1, "b": 2}, seed=3).at(0, 24)
    for name, stream in sources.items():
        mine = [r["answer"] for r in drawn if r["source"] == name]
        assert mine == [r["answer"] for r in stream.at(0, len(mine))]
    assert sorted(r["answer"] for r in drawn if r["source"] == "a") == list(range(8))


def test_prompts_of_two_sources_with_the_same_number_stay_apart() -> None:
    record = {"prompt": "same", "uid": 1}
    stream = MixedStream({"a": ListStream([record]), "b": ListStream([record])})
    assert len({r["uid"] for r in stream.at(0, 8)}) == 2
    alone = RelabelledStream(ListStream([record]), "a")
    assert alone.draw(0)["uid"] in {r["uid"] for r in stream.at(0, 2) if r["source"] == "a"}


def test_a_mixture_promises_only_columns_that_every_source_has() -> None:
    sources = {"a": ListStream(numbered(2)), "b": ListStream(numbered(2, completion="text"))}
    assert MixedStream(sources).columns() == {"answer"}


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_counts_in_a_block_are_within_one_of_the_weights(weights: list[float]) -> None:
    counts = block_counts({str(i): w for i, w in enumerate(weights)})
    length = sum(counts.values())
    assert length <= 1000
    for i, weight in enumerate(weights):
        assert abs(counts[str(i)] - length * weight / sum(weights)) <= 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "exactly the sources"),
        ({"a": 1, "b": 1, "c": 1}, "exactly the sources"),
        ({"a": 1, "b": 0}, "remove the source"),
        ({"a": 1, "b": float("nan")}, "positive number"),
        ({"a": 1, "b": 1e-6}, "below a thousandth"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedStream({"a": ListStream(numbered(2)), "b": ListStream(numbered(2))}, weights)
    with pytest.raises(ValueError, match="at least one source"):
        MixedStream({})


# Evaluation sets ----------------------------------------------------------------------------------------------------


def test_an_evaluation_set_knows_its_size() -> None:
    assert len(EvalSet("a", ListStream(numbered(5)))) == 5
    assert len(EvalSet("a", ListStream(numbered(5)), limit=3)) == 3
    assert len(EvalSet("a", ListStream(numbered(5)), limit=30)) == 5
    assert len(EvalSet("a", GeneratedStream(dice), limit=30)) == 30


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"name": "a b"}, "log names"),
        ({"stream": GeneratedStream(dice)}, "set its `limit`"),
        ({"limit": 0}, "limit of the evaluation set 'a' must be at least 1"),
        ({"samples": 0}, "samples"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_senseless_evaluation_settings_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSet(**{"name": "a", "stream": ListStream(numbered(5)), **settings_})


@given(total=st.integers(1, 60), batch=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_one_rank_goes_through_an_evaluation_set_once_and_in_order(total: int, batch: int) -> None:
    chunks = EvalChunks(EvalSet("a", ListStream(numbered(total), shuffle=False)), batch)
    batches = list(chunks)
    assert len(batches) == len(chunks)
    assert [d for b in batches for d in b["draws"]] == list(range(total))
    assert [r["answer"] for b in batches for r in b["records"]] == list(range(total))
    assert all(len(b["draws"]) <= batch for b in batches)


@given(total=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(2, 5))
@settings(deadline=None, max_examples=60)
def test_ranks_share_an_evaluation_set_without_duplicates(total: int, batch: int, world: int) -> None:
    drawn, batches = [], []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lit_rl.distributed.rank", lambda rank=rank: rank)
            patch.setattr("lit_rl.distributed.world_size", lambda: world)
            mine = list(EvalChunks(EvalSet("a", ListStream(numbered(total), shuffle=False)), batch))
        drawn += [d for b in mine for d in b["draws"]]
        batches.append(len(mine))
        assert all(0 < len(b["draws"]) <= batch for b in mine)
    assert sorted(drawn) == list(range(total))
    if total >= world * max(batches):  # else some ranks have fewer prompts than there are batches
        assert len(set(batches)) == 1


# The datamodule -----------------------------------------------------------------------------------------------------


class Lists(PromptDataModule):
    def __init__(self, train: int = 0, *evaluation: str) -> None:
        super().__init__()
        self.sizes, self.evaluation = train, evaluation

    def build(self, stage: str) -> None:
        if self.sizes:
            self.train_stream = ListStream(numbered(self.sizes))
        self.eval_sets = [EvalSet(name, ListStream(numbered(3), shuffle=False)) for name in self.evaluation]


def test_a_datamodule_without_what_a_stage_needs_says_so() -> None:
    with pytest.raises(ValueError, match="nothing to train on: Lists"):
        Lists(0, "a").setup("fit")
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=f"nothing to {stage}"):
            Lists(3).setup(stage)
    with pytest.raises(ValueError, match="different names"):
        Lists(3, "a", "a").setup("fit")
    with pytest.raises(ValueError, match="eval_batch_size"):
        PromptDataModule(eval_batch_size=0)
    with pytest.raises(TypeError, match="must define build"):
        PromptDataModule().setup("fit")


def test_there_is_one_loader_for_each_evaluation_set() -> None:
    module = Lists(3, "a", "b")
    module.setup("fit")
    for loaders in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        assert [loader.eval_set.name for loader in loaders] == ["a", "b"]


def test_the_training_loader_only_ticks() -> None:
    ticker = Ticker()
    assert [tick for tick, _ in zip(ticker, range(4))] == [0, 1, 2, 3]
    assert not hasattr(ticker, "__len__")


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(data).failed == 0
