"""The figures that several lessons draw, and the one style that all of them share."""

from __future__ import annotations

from html import escape

# Okabe and Ito's colours, told apart with any common colour blindness. Blue is the run at hand, orange what it is
# compared with.
BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000",
)  # fmt: skip
GREY = "#8A8A8A"

# Stage, and the lessons in it: number and the name that fits its box.
STAGES = (
    ("Start", (("00", "Start here"),)),
    ("Decide", (("01", "Ladder"),)),
    ("Data", (("02", "Data"),)),
    ("Train", (("03", "SFT"), ("04", "LoRA, DoRA"), ("05", "QLoRA"))),
    ("Prefer", (("06", "DPO"), ("07", "KTO"))),
    ("Distil", (("08", "Students"),)),
    ("Reinforce", (("09", "GRPO"),)),
    ("Check", (("10", "Failures"), ("11", "Gate"), ("14", "Claims"))),
    ("Ship", (("12", "Serving"), ("13", "Capstone"))),
)


def course_map(current: str):
    """The course as one picture with the box of lesson `current` ("04" or "04_lora_and_dora") lit: an IPython SVG.

    It brings its own light ground, so that it reads the same on a dark page, and marks the lit box by weight and by
    word as well as by colour.
    """
    from IPython.display import SVG

    return SVG(_map(current.split("_")[0]))


def _map(current: str) -> str:
    numbers = [number for _, lessons in STAGES for number, _ in lessons]
    if current not in numbers:
        raise ValueError(f"no lesson {current!r} on the map: choose one of {', '.join(sorted(numbers))}")
    width, box, step, tall, gap, middle = 1000, 92, 109, 46, 8, 122  # pixels
    lit = next(name for _, lessons in STAGES for number, name in lessons if number == current)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 252" width="100%" role="img" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        f"<title>Map of the course; you are in lesson {current}, {escape(lit)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
        f'<rect x="1" y="1" width="{width - 2}" height="250" rx="10" fill="#fff" stroke="#bbb"/>',
    ]
    centres = {}
    for column, (stage, lessons) in enumerate(STAGES):
        left = 18 + column * step
        centre = centres[stage] = left + box / 2
        height = len(lessons) * (tall + gap) - gap
        top = middle - height / 2
        parts.append(f'<text x="{centre:g}" y="28" font-size="15" font-weight="bold" fill="#222">{stage}</text>')
        for row, (number, name) in enumerate(lessons):
            y, here = top + row * (tall + gap), number == current
            fill, ink, edge, weight = (BLUE, "#fff", "#003A5C", 3) if here else ("#f3f3f3", "#222", "#999", 1)
            parts += [
                f'<rect x="{left}" y="{y:g}" width="{box}" height="{tall}" rx="7" fill="{fill}" stroke="{edge}" '
                f'stroke-width="{weight}"/>',
                f'<text x="{centre:g}" y="{y + 19:g}" font-size="14" font-weight="bold" fill="{ink}">{number}</text>',
                f'<text x="{centre:g}" y="{y + 37:g}" font-size="14" fill="{ink}">{escape(name)}</text>',
            ]
            if here:  # beneath the whole column, so that it never lies on a box
                parts.append(
                    f'<text x="{centre:g}" y="{top + height + 16:g}" font-size="12" font-weight="bold" '
                    f'fill="{BLUE}">you are here</text>'
                )
        if column:
            parts.append(
                f'<path d="M{left - step + box + 1} {middle} H{left - 2}" stroke="#555" stroke-width="2" '
                'marker-end="url(#tip)"/>'
            )
    start, end = centres["Check"], centres["Data"]
    parts += [
        f'<path d="M{start:g} 218 V234 H{end:g} V168" fill="none" stroke="#555" stroke-width="1.5" '
        'stroke-dasharray="5 4" marker-end="url(#tip)"/>',
        f'<text x="{(start + end) / 2:g}" y="228" font-size="13" fill="#444">'
        "what a check finds goes back into the data, and into the decision</text>",
        "</svg>",
    ]
    return "\n".join(parts)


def diagram(title: str, width: int, height: int, boxes, arrows=()):
    """A drawing of boxes and arrows as an IPython SVG, on a light ground of its own.

    boxes: (x, y, width, height, words, kind), kind one of `trained` (filled), `frozen` (grey, dashed) and `plain`;
    arrows: (x1, y1, x2, y2), in pixels from the upper left corner.
    """
    from IPython.display import SVG

    looks = {
        "trained": (BLUE, "#fff", "none"),
        "frozen": ("#e9e9e9", "#1b1b1b", "5 4"),
        "plain": ("#fff", "#1b1b1b", "none"),
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" text-anchor="middle">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for x1, y1, x2, y2 in arrows:
        parts.append(
            f'<path d="M{x1} {y1} L{x2} {y2}" stroke="#555" stroke-width="1.6" fill="none" marker-end="url(#head)"/>'
        )
    for x, y, wide, tall, words, kind in boxes:
        fill, ink, dashes = looks[kind]
        parts += [
            f'<rect x="{x}" y="{y}" width="{wide}" height="{tall}" rx="6" fill="{fill}" stroke="#1b1b1b" '
            f'stroke-dasharray="{dashes}"/>',
            f'<text x="{x + wide / 2:g}" y="{y + tall / 2 + 5:g}" fill="{ink}">{escape(words)}</text>',
        ]
    return SVG("\n".join([*parts, "</svg>"]))


def figure_style() -> None:
    """Matplotlib's settings for every figure of the course: call it once, before the first figure."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK]),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "figure.dpi": 110,
            "figure.figsize": (7, 3),
            "figure.facecolor": "white",  # not transparent: black labels vanish on a dark page
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10,
        }
    )


def save(fig, lesson, name: str) -> None:
    """Write `fig` to the lesson's folder of figures as `<name>.png`; the report shows it under that name."""
    fig.savefig(lesson.folder("figures") / f"{name}.png")


def over_reference(ax, recipe: str, profile: str, curve: list[tuple[int, float]]) -> None:
    """The reader's training curve over the stored reference of the recipe: the band of its seeds and the controls.

    curve: (step, loss) pairs. The reference of profile `cpu` stands behind every profile that has none of its own.
    """
    from course_lib import reference

    rows = reference.read(recipe, "curves")
    own = [r for r in rows if r["profile"] == profile] or [r for r in rows if r["profile"] == "cpu"]
    by_step: dict[int, list[float]] = {}
    for row in own:
        if not row["control"]:
            by_step.setdefault(int(row["step"]), []).append(float(row["loss"]))
    if by_step:
        steps = sorted(by_step)
        low, high = ([f(by_step[s]) for s in steps] for f in (min, max))
        ax.fill_between(steps, low, high, color=ORANGE, alpha=0.35, label="reference, all seeds")
        for control, style in zip(reference.CONTROLS, (":", "-."), strict=True):
            if found := [(int(r["step"]), float(r["loss"])) for r in own if r["control"] == control]:
                label = f"control: {control.replace('_', ' ')}"
                ax.plot(*zip(*found, strict=True), color=BLACK, linestyle=style, linewidth=1, label=label)
        made = own[0]
        ax.set_title(
            f"reference: profile {made['profile']}, {made['date']}, {made['dtype']}, trl {made['trl']}", fontsize=8
        )
    ax.plot(*zip(*curve, strict=True), color=BLUE, label="this run")
    ax.set(xlabel="step", ylabel="training loss", yscale="log")
    ax.legend()
