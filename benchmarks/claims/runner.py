# SPDX-License-Identifier: Apache-2.0
"""Runs the arms of a claim over its seeds, two at a time on a thread each, and continues where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.claims.claim import Arm, Claim, Overrides, Teacher, WarmStart, fingerprint

RUNS = Path("runs/claims")


def lit_rl(log: Path, threads: int, *words: str) -> None:
    """Run a ``lit-rl`` command with its output in a file; ``RuntimeError`` with the end of it if the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
    with open(log, "a") as file:
        code = subprocess.run(
            [sys.executable, "-m", "lit_rl.cli", *words], stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise RuntimeError(f"lit-rl {' '.join(words)} failed with status {code}:\n{log.read_text()[-3000:]}")


def as_words(configs: Sequence[str], *overrides: Overrides) -> list[str]:
    """Command-line words for files and single values (a value that is a list or a mapping is written as JSON)."""
    words = [word for path in configs for word in ("--config", path)]
    merged = {key: value for mapping in overrides for key, value in mapping.items()}
    for key, value in merged.items():
        text = json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else str(value)
        words.append(f"--{key}={text}")
    return words


def warm_policy(start: WarmStart) -> Path:
    """Folder of the warm-started policy in hub format, trained at the first call."""
    folder = RUNS / "warm" / fingerprint(start.configs, start)
    policy, log = folder / "policy", folder / "log.txt"
    if policy.exists():
        return policy
    if not (folder / "untrained").exists():
        size = f"--vocabulary_size={start.vocabulary_size}"
        lit_rl(log, 1, "new-policy", str(folder / "untrained"), size, "--seed", str(start.seed))
    own = {"model.init_args.policy.path": folder / "untrained", "trainer.default_root_dir": folder / "run"}
    seeds = {"model.init_args.seed": start.seed, "data.init_args.seed": start.seed}
    quiet = {"trainer.enable_progress_bar": False, "ckpt_path": "last"}
    lit_rl(log, 1, "fit", *as_words(start.configs, start.overrides, own, seeds, quiet))
    lit_rl(log, 1, "export", str(folder / "run"), str(policy))
    return policy


def teacher_policy(teacher: Teacher) -> Path:
    """Folder of a teacher in hub format, trained at the first call."""
    folder = RUNS / "teachers" / fingerprint([*teacher.start.configs, *teacher.configs], teacher)
    policy = folder / "policy"
    if not policy.exists():
        own = {"model.init_args.policy.path": warm_policy(teacher.start), "trainer.default_root_dir": folder / "run"}
        seeds = {"model.init_args.seed": teacher.seed, "data.init_args.seed": teacher.seed}
        quiet = {"trainer.enable_progress_bar": False, "ckpt_path": "last"}
        lit_rl(folder / "log.txt", 1, "fit", *as_words(teacher.configs, teacher.overrides, own, seeds, quiet))
        lit_rl(folder / "log.txt", 1, "export", str(folder / "run"), str(policy))
    return policy


def run_folder(claim: Claim, arm: Arm, seed: int) -> Path:
    """Where a run is; another configuration is another folder."""
    configs = [*claim.configs, *arm.configs]
    settings = claim.warm_start, claim.overrides, arm.overrides, claim.teacher
    digits = fingerprint([*claim.warm_start.configs, *configs], *settings)
    return RUNS / claim.name / f"{arm.name}-{digits}" / f"seed{seed}"


def run_arm(claim: Claim, arm: Arm, seed: int, policy: Path) -> Path:
    """One run to its end, unless it is there already."""
    folder = run_folder(claim, arm, seed)
    done = folder / "done.json"
    if done.exists():
        return folder
    own = {
        "model.init_args.policy.path": policy,
        "trainer.default_root_dir": folder,
        "model.init_args.seed": seed,
        "data.init_args.seed": seed,
        "trainer.enable_progress_bar": False,
        "ckpt_path": "last",
    }
    start = time.perf_counter()
    words = as_words([*claim.configs, *arm.configs], claim.overrides, arm.overrides, own)
    teacher = "" if claim.teacher is None else str(teacher_policy(claim.teacher).absolute())
    words = [word.replace("{seed}", str(seed)).replace("{teacher}", teacher) for word in words]
    lit_rl(folder / "log.txt", 1, "fit", *words)
    done.write_text(json.dumps({"seconds": time.perf_counter() - start}))
    print(f"  {arm.name:<16} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def run_claim(claim: Claim, seeds: Sequence[int], workers: int = 2) -> dict[str, list[Path]]:
    """All runs of a claim: arm name -> folders in the order of the seeds."""
    policy = warm_policy(claim.warm_start)
    if claim.teacher is not None:
        teacher_policy(claim.teacher)
    jobs = [(arm, seed) for seed in seeds for arm in claim.arms]
    with ThreadPoolExecutor(workers) as pool:
        folders = list(pool.map(lambda job: run_arm(claim, *job, policy), jobs))
    found: dict[str, list[Path]] = {arm.name: [] for arm in claim.arms}
    for (arm, _), folder in zip(jobs, folders, strict=True):
        found[arm.name].append(folder)
    return found
