"""One self-contained HTML page: ratio bars and a roofline as inline SVG, and every number."""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fmkernels.bench.report import duration, environment_lines
from fmkernels.bench.results import OURS, Cell, Measurement, Results

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child, td.text { text-align: left; }
tr.wrong td, tr.error td, .warning { color: #b00020; }
tr.unavailable td { color: #888; }
svg { max-width: 100%; height: auto; }
"""
_FAMILY_COLORS = {
    "conv": "#1f77b4",
    "linear": "#ff7f0e",
    "rnn": "#2ca02c",
    "attention": "#9467bd",
    "models": "#8c564b",
}
_MARKERS = {"fp32": "o", "bf16": "s"}


def write_html(results: Results, path: Path) -> None:
    """Write the page; it needs no other file and no network."""
    path.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    plots = [_ratio_bars(results, mode) for mode in dict.fromkeys(c.mode for c in results.cells)]
    plots.append(_roofline(results))
    environment = "".join(_environment_line(line) for line in environment_lines(results))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>fmkernels bench</title><style>{_STYLE}</style></head><body>"
        "<h1>fmkernels against PyTorch</h1>"
        f"<ul>{environment}</ul>"
        "<p>Candidates took turns in one process; times are medians over the rounds. A candidate "
        "whose numbers failed against float64 has no time. Ratios are eager's time in its faster "
        "layout over fmkernels' time in its faster layout.</p>"
        f"<h2>Geometric means</h2>{_means(results)}"
        + "".join(plots)
        + f"<h2>Every measurement</h2>{_measurements(results)}</body></html>\n"
    )


def _environment_line(line: str) -> str:
    mark = " class='warning'" if line.startswith("WARNING") else ""
    return f"<li{mark}>{html.escape(line)}</li>"


def _ratio_bars(results: Results, mode: str) -> str:
    cells = [cell for cell in results.cells if cell.mode == mode and cell.ratio is not None]
    if not cells:
        return ""
    figure = Figure(figsize=(10, 1 + 0.3 * len(cells)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{cell.workload} {cell.dtype}" for cell in cells]
    ratios = [cell.ratio or 0.0 for cell in cells]
    bars = axes.barh(labels, ratios, color=[_FAMILY_COLORS[cell.family] for cell in cells])
    axes.bar_label(bars, labels=[f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.08)  # room for the labels
    axes.set_xlabel("times as fast as PyTorch eager (right of the line: faster)")
    axes.tick_params(labelsize=8)
    return f"<h2>{mode.capitalize()}</h2>{_svg(figure)}"


def _roofline(results: Results) -> str:
    points = [(c, m) for c in results.cells if (m := c.fastest(OURS)) and c.flops and c.bytes]
    if not points:
        return ""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    intensities = [cell.flops / cell.bytes for cell, _ in points]
    span = [min(intensities) / 2, max(intensities) * 2]
    ceilings = results.ceilings
    for dtype in dict.fromkeys(cell.dtype for cell, _ in points):
        peak = ceilings.peak_gflops[dtype]
        ridge = peak / ceilings.read_gbs
        xs = sorted({span[0], span[1], *([ridge] if span[0] < ridge < span[1] else [])})
        axes.plot(xs, [min(peak, ceilings.read_gbs * x) for x in xs], label=f"ceiling {dtype}")
    for cell, measurement in points:
        axes.scatter(
            cell.flops / cell.bytes,
            measurement.gflops,
            color=_FAMILY_COLORS[cell.family],
            marker=_MARKERS.get(cell.dtype, "x"),
            facecolor="none" if cell.mode == "training" else None,
        )
    for family in dict.fromkeys(cell.family for cell, _ in points):
        axes.scatter([], [], color=_FAMILY_COLORS[family], label=family)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of inputs, parameters and outputs",
        ylabel="GFLOP/s",
    )
    axes.legend(fontsize=8)
    note = (
        "Circles are fp32, squares bf16; hollow marks are training. A workload that fits the "
        f"{ceilings.cache_bytes >> 20} MiB cache may rise above the slanted memory line."
    )
    return f"<h2>Roofline</h2>{_svg(figure)}<p>{note}</p>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fmkernels"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _means(results: Results) -> str:
    rows = [
        [
            f"{mean['family']} {mean['dtype']} {mean['mode']}",
            f"{mean['ratio']:.2f}x",
            f"{mean['least']:.2f}x",
            str(mean["workloads"]),
        ]
        for mean in results.geometric_means()
    ]
    return _table(["", "geometric mean", "least", "workloads"], [("", row) for row in rows])


def _measurements(results: Results) -> str:
    head = "workload,candidate,error,allowed,time,IQR,GFLOP/s,of peak,of roof,backend or reason"
    rows = [(m.status, _row(cell, m)) for cell in results.cells for m in cell.measurements]
    return _table(head.split(","), rows)


def _row(cell: Cell, m: Measurement) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        f"{cell.workload} {cell.dtype} {cell.mode}",
        m.label,
        text(m.error, ".1e"),
        text(m.allowed, ".1e"),
        "" if m.median_s is None else duration(m.median_s),
        "" if m.iqr_s is None else duration(m.iqr_s),
        text(m.gflops, ".3g"),
        text(m.of_peak, ".0%"),
        text(m.of_roof, ".0%"),
        m.backend if m.status == "ok" else f"{m.status}: {m.message}",
    ]


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    def line(values: list[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr class='{mark}'>{line(values, 'td')}</tr>" for mark, values in rows)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
