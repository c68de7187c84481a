"""Charts (matplotlib, Okabe and Ito's colors) and labeled image grids (Pillow), as PIL images."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<>"


def new_figure(rows=1, columns=1, size=(6.5, 4.2)):
    """A figure (no global state, no window) and its axes, a flat list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((size[0] * columns, size[1] * rows), dpi=170, layout="constrained")
    FigureCanvasAgg(figure)  # becomes figure.canvas
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def to_image(figure):
    """A figure -> PIL image."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def split_intervals(values):
    """Numbers, or rows (value, low, high) -> the values, and error bars (2, n) or None."""
    values = np.array(values)
    if values.ndim == 1:
        return values, None
    middle, low, high = values.T
    return middle, [middle - low, high - middle]


def finish_axis(axis, title, names, series, **settings):
    axis.set_title(title, fontsize=11)
    axis.set(xticks=range(len(names)), xticklabels=map(str, names), axisbelow=True, **settings)
    axis.grid(axis="y", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
        axis.legend(fontsize=9, **below)


def draw_bars(title, series, label="win rate"):
    """Bars of rates, as a PIL image: {arm: {name: evaluate.py's rate_ci() or compare()}}."""
    figure, (axis,) = new_figure()
    width = 0.8 / len(series)
    for i, (arm, rates) in enumerate(series.items()):
        rows = [(r.get("rate", r.get("win_rate")), *r["ci95"]) for r in rates.values()]
        middle, errors = split_intervals(rows)
        x = np.arange(len(rates)) + width * (i - (len(series) - 1) / 2)
        axis.bar(x, middle, 0.9 * width, color=COLORS[i % len(COLORS)], label=arm)
        axis.errorbar(x, middle, errors, fmt="none", ecolor="black", capsize=2, lw=1)
    axis.axhline(0.5, color="black", lw=1)
    finish_axis(axis, title, list(rates), series, ylabel=label, ylim=(0, 1.02))
    return to_image(figure)


def draw_lines(axis, title, names, series, label):
    """Lines. series: {name: values for split_intervals(), of all `names` or the last ones}."""
    for i, (name, values) in enumerate(series.items()):
        middle, errors = split_intervals(values)
        style = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.5)
        x = range(len(names))[-len(values) :]
        axis.errorbar(x, middle, errors, label=name, elinewidth=0.8, **style)
    finish_axis(axis, title, names, series, ylabel=label)


def draw_simplex(axis, title, corners, values):
    """Images, or numbers in color and digits, over three weights: {(i, j, k) of sum 10: value}."""
    for (_, j, k), value in values.items():
        x, y = j / 10 + k / 20, k / 10 * 0.75**0.5
        if isinstance(value, float):
            low, high = min(values.values()), max(values.values())
            axis.scatter(x, y, s=900, c=[value], vmin=low, vmax=high, cmap="cividis")
            color = "white" if value < (low + high) / 2 else "black"
            axis.text(x, y, f"{value:+.2f}", color=color, fontsize=8, ha="center", va="center")
        else:
            image = value.resize((128, 128), Image.NEAREST)
            axis.imshow(image, extent=(x - 0.075, x + 0.075, y - 0.075, y + 0.075))
    for name, x, y in zip(corners, (0, 1, 0.5), (-0.125, -0.125, 0.75**0.5 + 0.125), strict=True):
        axis.text(x, y, name, ha="center", va="center")
    axis.set(xlim=(-0.15, 1.15), ylim=(-0.2, 1.08), aspect="equal")
    axis.set_title(title, fontsize=11)
    axis.axis("off")


def image_grid(rows, row_labels, column_labels, size=96, pad=4):
    """A labeled contact sheet. rows: list of lists of PIL images."""
    font = ImageFont.load_default(size=13)
    left = int(max(map(font.getlength, "\n".join(row_labels).split("\n")))) + 2 * pad
    top = 20 * max(label.count("\n") + 1 for label in column_labels)
    cell = size + pad
    sheet = Image.new("RGB", (left + len(column_labels) * cell, top + len(rows) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels):
        center = (left + x * cell + size // 2, top // 2)
        pen.multiline_text(center, label, "black", font, anchor="mm", align="center")
    for y, (label, images) in enumerate(zip(row_labels, rows, strict=True)):
        right = (left - pad, top + y * cell + size // 2)
        pen.multiline_text(right, label, "black", font, anchor="rm", align="right")
        for x, image in enumerate(images):
            sheet.paste(image.resize((size, size)), (left + x * cell, top + y * cell))  # bicubic
    return sheet
