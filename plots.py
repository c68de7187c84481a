"""Charts (matplotlib) and labeled image grids (Pillow), each returned as a PIL image."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colors, told apart by everybody, and a mark for each
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<>"


def new_figure(rows=1, columns=1, size=(6.5, 4.2)):
    """A figure (no global state, no window) and its axes, a flat list."""
    from matplotlib.figure import Figure

    figure = Figure((size[0] * columns, size[1] * rows), dpi=170, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def to_image(figure):
    """A figure -> PIL image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def split_intervals(values):
    """[(value, (low, high)) or value, ...] -> values, and error bars (2, n) or None."""
    if not isinstance(values[0], tuple):
        return values, None
    middle = [value for value, _ in values]
    below = [value - low for value, (low, _) in values]
    above = [high - value for value, (_, high) in values]
    return middle, [below, above]


def finish_axis(axis, title, names, label, legend):
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(label)
    axis.set_xticks(range(len(names)), [str(name) for name in names])
    axis.grid(axis="y", color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if legend > 1:
        axis.legend(fontsize=9, loc="best", framealpha=0.9)


def draw_bars(axis, title, names, series, label, line=0.5):
    """Bars with intervals. series: {name: [(value, (low, high)), ...]}, one for each of `names`; a
    line to compare with."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        middle, errors = split_intervals(values)
        x = [k + width * (i - (len(series) - 1) / 2) for k in range(len(names))]
        axis.bar(x, middle, 0.9 * width, color=COLORS[i % len(COLORS)], label=name)
        axis.errorbar(x, middle, errors, fmt="none", ecolor="black", capsize=2, lw=1)
    axis.axhline(line, color="black", lw=1)
    axis.set_ylim(0, 1)
    finish_axis(axis, title, names, label, len(series))


def draw_lines(axis, title, names, series, label):
    """Lines. series: {name: [value, ...] or [(value, (low, high)), ...]}, one for each of
    `names`."""
    for i, (name, values) in enumerate(series.items()):
        middle, errors = split_intervals(values)
        style = dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ms=5, lw=1.5)
        axis.errorbar(range(len(names)), middle, errors, label=name, elinewidth=0.8, **style)
    finish_axis(axis, title, names, label, len(series))


def draw_simplex(axis, title, corners, values):
    """The simplex of three weights. values: {(i, j, k) of sum 10: PIL image, or number shown by a
    color and in digits}."""
    places = ((0, 0), (1, 0), (0.5, 0.75**0.5))
    points = {
        point: [
            sum(w / 10 * place[d] for w, place in zip(point, places, strict=True)) for d in (0, 1)
        ]
        for point in values
    }
    numbers = [value for value in values.values() if isinstance(value, float)]
    if numbers:
        middle = (min(numbers) + max(numbers)) / 2
        x, y = zip(*points.values(), strict=True)
        axis.scatter(x, y, s=900, c=numbers, cmap="cividis")
    for point, value in values.items():
        x, y = points[point]
        if isinstance(value, float):
            color = "white" if value < middle else "black"
            axis.text(x, y, f"{value:+.2f}", color=color, fontsize=8, ha="center", va="center")
        else:
            image = value.resize((128, 128), Image.NEAREST)
            axis.imshow(image, extent=(x - 0.075, x + 0.075, y - 0.075, y + 0.075))
    for (x, y), name in zip(places, corners, strict=True):
        above = y > 0
        axis.text(
            x, y + (0.1 if above else -0.1), name, ha="center", va="bottom" if above else "top"
        )
    axis.set(xlim=(-0.15, 1.15), ylim=(-0.2, 1.08), aspect="equal")
    axis.set_title(title, fontsize=11)
    axis.axis("off")


def image_grid(rows, row_labels, column_labels, size=96):
    """A labeled contact sheet. rows: list of lists of PIL images."""
    font = ImageFont.load_default(size=13)
    pad = 4
    longest = max(font.getlength(line) for label in row_labels for line in label.split("\n"))
    left = int(longest) + 2 * pad
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
            image = image.resize((size, size), Image.BICUBIC)
            sheet.paste(image, (left + x * cell, top + y * cell))
    return sheet
