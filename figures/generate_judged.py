"""What generate draws from: p-values of five ways to call it, and the weight that its mixture really has, by step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_SMALLEST = 1e-30  # p-values below are drawn here


def draw(record: Record, folder: Path) -> Figure:
    """Left: p-value of each call against the law that it claims. Right: weight of the target by position."""
    cases, claimed = record.results["cases"], record.config["weight"]
    fig, (pvalues, weights) = figure(columns=2, height=2.3, ncols=2, width_ratios=[1, 1.3])
    place = np.arange(len(cases))
    for i, case in enumerate(cases):
        color = COLORS["CE"] if case["passed"] else COLORS["control"]
        p = max(case["pvalue"], _SMALLEST)
        pvalues.plot([p, 1], [i, i], color=color, linewidth=2, solid_capstyle="butt")
        pvalues.plot(p, i, "o" if case["passed"] else "X", color=color, markersize=5)
    pvalues.axvline(record.config["level"], color=COLORS["floor"], linestyle="--", linewidth=0.9)
    pvalues.set(xscale="log", xlim=(_SMALLEST / 10, 30), xlabel="p-value against the law it claims")
    pvalues.set_xticks([1e-30, 1e-20, 1e-10, 1])
    pvalues.set_yticks(place, [case["name"] for case in cases])
    pvalues.set_ylim(len(cases) - 0.5, -0.5)
    pvalues.set_title("generate against its claim")
    for name, label, color, marker in (
        ("speculative", "speculative (claims 1)", COLORS["CE"], "o"),
        ("ensemble weight", f"ensemble weight (claims {claimed:g})", COLORS["control"], "X"),
    ):
        steps = next(case for case in cases if case["name"] == name)["weight_by_step"]
        values, low, high = (np.array([step[key] for step in steps]) for key in ("value", "low", "high"))
        x = np.arange(1, len(steps) + 1)
        weights.errorbar(x, values, yerr=[values - low, high - values], fmt=marker, color=color, label=label)
    weights.axhline(claimed, color=COLORS["control"], linestyle="--", linewidth=0.9)
    weights.set(xlabel="token", ylabel="weight of the target", ylim=(0.15, 1.05), title="Weight that explains the rows")
    weights.legend(loc="lower right")
    mixture = next(case for case in cases if case["name"] == "ensemble weight")
    weight = mixture["weight"]
    verdict = "is not rejected as" if mixture["passed"] else "is not"
    exponent = math.floor(math.log10(max(mixture["pvalue"], 1e-300)))
    caption = (
        f"assistant_ensemble_weight={claimed:g} {verdict} the mixture that it names: its tokens have weight "
        f"{weight['value']:.2f} ({weight['low']:.2f} to {weight['high']:.2f}) on the target (right, 95% intervals). "
        "The first token of a draft is right; a token after a fully accepted draft, and the last one, come from the "
        "target alone. Where every token is drafted the mixture holds. "
        f"Left: p-values of five calls on {record.results['label']} (dashed: level; the mixture has p below "
        f"1e{exponent + 1}). Plain sampling with top_k=0 and speculative sampling follow their laws, the silent "
        "default top_k=50 does not."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
