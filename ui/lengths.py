"""How long a dataset's examples are: the histogram of token counts with max length and percentiles drawn in, and what
the pairs' lengths would teach. The figures are katherine.findings'."""

from typing import Any

from katherine.shelf import Summary

# Fewer pairs than these never lie three standard errors from an even split (see findings.LENGTH_BIAS_ERRORS).
FEW_PAIRS = 10
# One blue and one orange that the colour-blind tell apart, on light and on dark.
_BARS, _LIMIT, _PERCENTILE = "#2b87d1", "#d97706", "#8a8f98"


def figure(summary: Summary, kind: str) -> dict[str, Any] | None:
    """kind: "sft" or "pairs". None where nothing was counted."""
    histogram = (summary.report.get("histograms") or {}).get(kind)
    tokens = summary.report["tokens"]
    if histogram is None or tokens is None:
        return None
    spread = tokens["pairs"] if kind == "pairs" else tokens
    width, counts, limit = histogram["width"], histogram["counts"], tokens["max_length"]
    end = len(counts) * width
    # A limit far beyond all data would squeeze them into a corner: then it is named at the edge instead.
    far = limit > 8 * end
    edge = end * 1.05 if far else max(end, limit) * 1.05
    ranges = [f"{n * width:,} to {(n + 1) * width - 1:,}" if width > 1 else f"{n:,}" for n in range(len(counts))]
    lines = [(spread[name], name, _PERCENTILE, "dot") for name in ("p50", "p90", "p99")]
    if not far:
        lines.append((limit, f"max length {limit:,}", _LIMIT, "solid"))
    shapes = [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": c, "dash": d, "width": 2},
        }
        for x, _, c, d in lines
        if x <= edge
    ]
    # One above the other, or three percentiles a few tokens apart would stand in one place.
    notes = [
        {"x": x, "yref": "paper", "y": 1 - 0.09 * row, "text": text, "showarrow": False, "font": {"color": c},
         "xanchor": "right" if x > 0.75 * edge else "left", "xshift": -4 if x > 0.75 * edge else 4, "yanchor": "top"}
        for row, (x, text, c, _) in enumerate(lines)
        if x <= edge
    ]  # fmt: skip
    if far:
        notes.append(
            # Above the bars: inside, it would lie on those at the right.
            {"x": 1, "xref": "paper", "xanchor": "right", "yref": "paper", "y": 1, "yanchor": "bottom",
             "showarrow": False, "text": f"max length {limit:,} →", "font": {"color": _LIMIT}}
        )  # fmt: skip
    if histogram["beyond"]:
        notes.append(
            {"x": 1, "xref": "paper", "xanchor": "right", "yref": "paper", "y": 0.3, "showarrow": False,
             "text": f"{histogram['beyond']:,} longer →"}
        )  # fmt: skip
    return {
        "data": [
            {"type": "bar", "x": [(n + 0.5) * width for n in range(len(counts))], "y": counts, "width": width * 0.92,
             "customdata": ranges, "hovertemplate": "%{customdata} tokens: %{y:,}<extra></extra>",
             "marker": {"color": _BARS}}
        ],
        "layout": {
            "showlegend": False, "hovermode": "closest", "bargap": 0, "shapes": shapes,
            "margin": {"l": 52, "r": 12, "t": 26, "b": 36}, "annotations": notes,
            "xaxis": {"title": {"text": "tokens"}, "range": [0, edge], "rangemode": "nonnegative"},
            "yaxis": {"title": {"text": "examples"}, "rangemode": "tozero"},
            "uirevision": f"{summary.id}-{kind}",
        },
    }  # fmt: skip


def words(summary: Summary, kind: str) -> str:
    """The percentiles, and how many are too long, in a sentence."""
    tokens = summary.report["tokens"]
    if tokens is None:
        return "No tokens were counted for this dataset."
    spread = tokens["pairs"] if kind == "pairs" else tokens
    alone = kind == "sft" and not summary.report["sft"]["unique"]
    if spread is None or alone:
        return "There are none."
    over = spread["over_max_length"]
    left_out = "none is longer" if not over else f"{over:,} longer, which training leaves out"
    return (
        f"Half have up to {spread['p50']:,} tokens (p50), 90% up to {spread['p90']:,}, 99% up to {spread['p99']:,}, "
        f"the longest {spread['max']:,}. Max length {tokens['max_length']:,}: {left_out}. "
        f"Counted as {tokens['base']} does."
    )


def bias(summary: Summary) -> tuple[str, str]:
    """What the pairs say about length beside manner, and a tone: "warn" where DPO may learn it."""
    lengths = summary.report["dpo"]["lengths"]
    if lengths is None:
        return "There are no pairs in use.", "dim"
    figures = (
        f"The chosen reply is the longer one in {lengths['chosen_longer_share']:.0%} of "
        f"{summary.report['dpo']['used']:,} pairs: {lengths['chosen_mean']:,.0f} characters against "
        f"{lengths['rejected_mean']:,.0f} on average, "
        f"{lengths['ratio']:.2f} times as long."
    )
    if summary.report["dpo"]["used"] < FEW_PAIRS:
        return f"{figures} Too few to tell a bias from chance.", "dim"
    if lengths["biased"]:
        return f"{figures} That is more than chance: DPO may learn length instead of manner.", "warn"
    return f"{figures} No bias that DPO would learn.", "good"
