# SPDX-License-Identifier: Apache-2.0
"""NPO and AutoNPO: a later self helps an earlier one."""

from __future__ import annotations

from benchmarks.claims.claim import COLD_START, Arm, Claim, Metric, after, at_end, reached, scalars, within
from benchmarks.claims.report import DOCS, Results, compare

GOAL, BUDGET = 0.65, 200_000
TOKENS = {"cost": "rollout/tokens", "also": "npo/guide_tokens"}


def distances_section(results: Results) -> str:
    """Q̂, V̂ and Ŝ over Δ, from every probe that made a run go back."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    went_back = []
    for seed, run in zip(results.seeds, results.runs["autonpo"], strict=True):
        logged = scalars(run)
        for clock, best in logged.get("npo/delta_star", []):
            for axis, name in zip(axes, ("q_hat", "v_hat", "s_hat"), strict=True):
                prefix = f"npo/{name}_"
                found = {int(k.removeprefix(prefix)): dict(v) for k, v in logged.items() if k.startswith(prefix)}
                curve = sorted((distance, values[clock]) for distance, values in found.items() if clock in values)
                (line,) = axis.plot(*zip(*curve, strict=True), marker="o", label=f"seed {seed}, step {clock + 1}")
                axis.plot(best, dict(curve)[best], marker="*", markersize=15, color=line.get_color())
            went_back.append(f"seed {seed} after step {clock + 1}, by {best:.0f}")
    for axis, title in zip(axes, ("Q̂: pass rate on the pool", "V̂", "Ŝ = Q̂ / V̂"), strict=True):
        axis.set(title=title, xlabel="Δ, rollout steps")
        axis.grid(alpha=0.3)
    if not went_back:
        plt.close(figure)
        return "AutoNPO never went back: no probe confirmed its trigger."
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "npo_distances.png", dpi=110)
    plt.close(figure)
    return (
        f"AutoNPO went back in {len({w.split(',')[0].split(' after')[0] for w in went_back})} of {len(results.seeds)} "
        f"runs: {'; '.join(went_back)}. What its probes found there, Δ* starred:\n\n"
        f"![Q̂, V̂ and Ŝ over Δ]({DOCS.name}/npo_distances.png)\n\n"
        "In theory Q̂ rises and saturates, V̂ grows exponentially, and Ŝ has one maximum in between. The probes are small "
        "here (32 completions), so V̂ is noisy."
    )


CLAIM = Claim(
    name="npo",
    title="NPO and AutoNPO",
    sentence="Going back and letting a slightly later policy put one verified completion into each hard group reaches a "
    "given accuracy in fewer steps from a cold start, or ends higher.",
    source="arXiv 2604.20733",
    setup="A cold start: a third of the quickstart's warm start, so that half of the groups are all wrong at first. "
    "`npo` trains 30 steps ahead, goes back to the start and replays them with its guide; `autonpo` decides by itself. "
    "Steps of the final trajectory are `rollout_step`; trained steps count the abandoned segment too, generated tokens "
    "also the samples of guide and probes.",
    warm_start=COLD_START,
    overrides={"model.init_args.max_rollouts": 200, "trainer.val_check_interval": 10},
    arms=[
        Arm("grpo"),
        Arm(
            "npo",
            overrides={
                "trainer.callbacks+": [
                    {"class_path": "lit_rl.callbacks.NPOSchedule", "init_args": {"start": 0, "end": 30}}
                ]
            },
        ),
        Arm(
            "autonpo",
            overrides={
                "trainer.callbacks+": [
                    {
                        "class_path": "lit_rl.callbacks.AutoNPO",
                        "init_args": {"distances": [10, 20, 30, 40], "window": 20, "reward_gain": 0.02},
                    }
                ]
            },
        ),
    ],
    metrics=[
        Metric("pass@1 after 30 steps of the final trajectory", after("val/pass@1", 30, "rollout_step"), "higher"),
        Metric("pass@1 after 60 steps of the final trajectory", after("val/pass@1", 60, "rollout_step"), "higher"),
        Metric("pass@1 after 60 trained steps", after("val/pass@1", 60), "higher"),
        Metric(f"pass@1 for {BUDGET:,} generated tokens", within("val/pass@1", BUDGET, **TOKENS), "higher"),
        Metric(f"steps of the final trajectory to {GOAL}", reached("val/pass@1", GOAL, clock="rollout_step"), "lower"),
        Metric(f"trained steps to {GOAL}", reached("val/pass@1", GOAL), "lower"),
        Metric(f"generated tokens to {GOAL}", reached("val/pass@1", GOAL, **TOKENS), "lower"),
        Metric("pass@1 at the end", at_end("val/pass@1", over=3), "higher"),
    ],
    curves=["val/pass@1", "rollout_step", "policy/entropy"],
    extra=distances_section,
    tried=[
        "a still colder start (190 steps of warm start, 3 % right): plain GRPO loses the little that it has within 30 "
        "steps, so there is no better self ahead to be a guide",
        "0.8 as the goal: no arm gets there in 200 steps",
    ],
)


def verdict(results: Results) -> str:
    """What the numbers say."""
    early, _, trained, tokens, *_, final = (m.label for m in results.claim.metrics)
    return (
        f"npo against grpo, right after its replay: {compare(results, 'grpo', 'npo', early)} at equal steps of the final "
        f"trajectory; {compare(results, 'grpo', 'npo', trained)} at equal trained steps; "
        f"{compare(results, 'grpo', 'npo', tokens)} at equal generated tokens. At the end: npo "
        f"{compare(results, 'grpo', 'npo', final)}; autonpo {compare(results, 'grpo', 'autonpo', final)}."
    )
