# SPDX-License-Identifier: Apache-2.0
"""A verifier that fails loses its own row, and nothing else."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import misbehaving
import pytest

from lit_rl.rewards import VerifierPool

HERE = Path(__file__).parent


def calls(*completions: str) -> list:
    return [((completion,), {}) for completion in completions]


def failures(outcomes: list) -> list:
    return [outcome.failure for outcome in outcomes]


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(misbehaving.verify, timeout=0.5, workers=1)
    yield pool
    pool.close()


def test_values_come_back_in_order_from_another_process() -> None:
    pool = VerifierPool(misbehaving.process_id, workers=1)
    ids = {outcome.value for outcome in pool.map(calls(*"abcd"))}
    assert len(ids) == 1
    assert os.getpid() not in ids
    pool.close()


def test_each_kind_of_failure_loses_only_its_row(pool: VerifierPool) -> None:
    outcomes = pool.map(
        calls("42", "raise", "43", "hang", "42", "segfault", "42", "exit", "raise timeout", "unpicklable", "42")
    )
    kinds = [None, "error", None, "timeout", None, "crash", None, "error", "error", "error", None]
    assert failures(outcomes) == kinds
    assert [outcomes[i].value for i in (0, 2, 4, 6, 10)] == [1, 0, 1, 1, 1]
    assert outcomes[1].detail == "ZeroDivisionError: no such thing"
    assert "0.5 s" in outcomes[3].detail


def test_the_pool_works_again_after_a_crash(pool: VerifierPool) -> None:
    assert failures(pool.map(calls("segfault"))) == ["crash"]
    assert pool.map(calls("42"))[0].value == 1


@pytest.mark.parametrize("kind", ["hang", "hang in C", "sleep"])
def test_a_hang_is_killed_in_time(pool: VerifierPool, kind: str) -> None:
    pool.map(calls("42"))  # the worker is up
    started = time.monotonic()
    assert failures(pool.map(calls(kind))) == ["timeout"]
    assert time.monotonic() - started < 2.5  # limit 0.5 s; a process that ignores SIGTERM would be given 3 s more


def test_many_crashes_in_a_row_lose_no_innocent_row(pool: VerifierPool) -> None:
    completions = ["segfault" if i % 3 == 0 else "42" for i in range(12)]
    outcomes = pool.map(calls(*completions))
    assert failures(outcomes) == ["crash" if c == "segfault" else None for c in completions]


def test_a_verifier_that_cannot_be_imported_by_the_worker_gives_up_with_advice() -> None:
    pool = VerifierPool(misbehaving.DiesOnImport(), timeout=0.5, workers=1)
    outcomes = pool.map(calls(*"abcdefgh"))
    assert set(failures(outcomes)) == {"crash"}
    assert "__main__" in outcomes[0].detail
    pool.close()


def test_an_unpicklable_function_runs_here_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="inside the training process.*cannot be pickled"):
        pool = VerifierPool(lambda completion: len(completion))
    assert not pool.isolated
    assert pool.map(calls("abc"))[0].value == 3


def test_an_unpicklable_argument_is_an_error_of_its_row(pool: VerifierPool) -> None:
    outcomes = pool.map([(("42",), {"answer": lambda: None}), (("42",), {})])
    assert failures(outcomes) == ["error", None]


def test_a_closed_or_copied_pool_starts_again(pool: VerifierPool) -> None:
    pool.close()
    assert pool.map(calls("42"))[0].value == 1
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.map(calls("42"))[0].value == 1
    copy.close()


@pytest.mark.parametrize(("arguments", "name"), [({"timeout": 0}, "timeout"), ({"workers": 0}, "workers")])
def test_bad_arguments_are_refused(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        VerifierPool(misbehaving.verify, **arguments)


def test_workers_leave_with_a_killed_parent_and_ignore_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import misbehaving, time\n"
        "from lit_rl.rewards.pool import VerifierPool\n"
        "if __name__ == '__main__':\n"
        "    pool = VerifierPool(misbehaving.process_id, workers=1)\n"
        "    print(pool.map([(('',), {})])[0].value, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGINT)
        time.sleep(0.3)
        assert _alive(worker)
        parent.kill()
    for _ in range(50):
        if not _alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the training process")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
