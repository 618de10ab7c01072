"""One step on a transformer: drawn frequencies on the exact law, and the bound that each prompt certifies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """Left: tokens by rank. Right: TV bounds, the bound of a perfect sampler, and the planted error."""
    rows, config = record.results["rows"], record.config
    top = rows[0]["top"]
    fig, (law, bounds) = figure(columns=2, height=2.5, ncols=2, width_ratios=[1.5, 1])
    rank = np.arange(1, len(top["probs"]) + 1)
    law.plot(rank, top["probs"], color="0.25", linewidth=0.9, label="exact mixture, fresh prefill")
    for name, size in (("CE", 5.5), ("ME", 2.8)):
        hollow = name == "CE"
        law.plot(rank, top[name], MARKERS[name], color=COLORS[name], markersize=size, label=f"{name}, drawn",
                 markerfacecolor="none" if hollow else COLORS[name], markeredgewidth=0.8 if hollow else 0)  # fmt: skip
    law.set(yscale="log", xlabel="token, by rank in the exact law", ylabel="probability", title="First prompt")
    law.legend()
    place = np.arange(len(rows))
    for name, shift in (("ME", -0.13), ("CE", 0.13)):
        upper = [row[name]["tv_upper"] for row in rows]
        bounds.plot(place + shift, upper, MARKERS[name], color=COLORS[name], label=f"{name}: upper bound")
    null = [row["ME"]["tv_null_value"] for row in rows]
    bounds.plot(place, null, "_", color=COLORS["floor"], markersize=14, label="bound of a perfect sampler")
    planted = [config["shift"] * row["component_tv"] for row in rows]
    bounds.plot(place, planted, MARKERS["control"], color=COLORS["control"], label=f"planted λ + {config['shift']}")
    bounds.set(xlabel="prompt", ylabel="total variation", title="What the draws certify", ylim=(0, None))
    bounds.set_xticks(place, [str(p + 1) for p in place])
    bounds.set_xlim(-0.5, len(rows) - 0.5)
    fig.legend(*bounds.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    certified = max(row["ME"]["tv_upper"] for row in rows)
    caught = sum(row["planted"]["pvalue"] <= config["level"] for row in rows)
    caption = (
        f"One step of ME is within TV {certified:.4f} of the CE law over all {record.results['vocabulary']:,} tokens, "
        f"at {config['confidence']:.0%} confidence ({record.results['label']}, {config['draws']:,} draws per prompt, "
        f"against the mixture computed without the samplers). A weight off by {config['shift']} (crosses, exact TV) is "
        f"rejected at {caught} of {len(rows)} prompts."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
