"""A run's report: one folder of static pages, which opens from disk and needs neither server, network nor scripts."""

import base64
import html
import logging
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from course_lib import CourseError, profiles, results
from course_lib.gates import caption


def build(out_dir):
    """Write ``<out_dir>/report/`` from results.json, notebooks and figures of a run; returns its index.html.

    An earlier report is replaced only once the new one is complete. Raises CourseError where no run is found.
    """
    out_dir = Path(out_dir)
    data = results.read(out_dir)
    specs = {spec["id"]: spec for spec in profiles.lessons()}
    report, place = out_dir / "report", None
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8") + _highlighting()
    try:
        place = Path(tempfile.mkdtemp(prefix=".report-", dir=out_dir))
        place.chmod(0o755)
        (place / "style.css").write_text(style, encoding="utf-8")
        runs = [_collect(out_dir, place, name, data, specs.get(name, {})) for name in data["lessons"]]
        pages = [run["name"] for run in runs if run["notebook"]]
        for run in runs:
            if run["notebook"]:
                _lesson_page(place, run, pages)
        (place / "index.html").write_text(_index(data, runs), encoding="utf-8")
        if report.exists():
            report.rename(place / "old")
        place.rename(report)
        shutil.rmtree(report / "old", ignore_errors=True)
    except OSError as error:
        raise CourseError(
            f"Cannot write {report}: {error.strerror or error}. Make room there, or copy the run."
        ) from error
    finally:
        if place:
            shutil.rmtree(place, ignore_errors=True)
    return report / "index.html"


# What a run left behind
def _collect(out_dir, place, name, data, spec):
    """All that the pages show of one lesson; its figures, and its log if it did not pass, are copied to ``place``."""
    entry, log = data["lessons"][name], None
    status, seconds, minutes = entry["status"], entry.get("seconds"), spec.get("minutes", {}).get(data.get("profile"))
    try:
        notebook = nbformat.read(out_dir / "notebooks" / f"{name}.ipynb", as_version=4)
    except (OSError, ValueError, AttributeError):  # never begun, or killed while it was written
        notebook = None
    if status != "passed" and (out_dir / "logs" / f"{name}.log").exists():
        (place / "logs").mkdir(exist_ok=True)
        log = f"logs/{name}.txt"  # a browser shows .txt, and offers .log for download
        shutil.copyfile(out_dir / "logs" / f"{name}.log", place / log)
    figures = _figures(out_dir / "figures" / name, place / "figures" / name, notebook)
    number = name.split("_")[0]
    title = f"{number} {spec['title']}" if "title" in spec else name.replace("_", " ")
    run = {"name": name, "title": title, "status": status, "spec": spec, "entry": entry, "notebook": notebook}
    times = {"seconds": seconds if is_number(seconds) else None, "expected": 60 * minutes if minutes else None}
    return run | times | {"log": log, "figures": figures}


def _figures(source, place, notebook):
    """(file name, caption) of the lesson's figures: the files it stored, else the images in its notebook."""
    stored = [(path.name, path.read_bytes(), path.stem.replace("_", " ")) for path in sorted(source.glob("*.png"))]
    found = list(stored)
    for i, cell in enumerate(notebook.cells if notebook else ()):
        text = (caption(notebook.cells, i) or "").replace("*", "")
        cell.metadata["alt"] = text or "figure"  # the lesson's page reads it
        for out in () if stored else cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:
                found.append((f"figure_{len(found) + 1}.png", base64.b64decode(data["image/png"]), text))
            elif "image/svg+xml" in data:
                found.append((f"figure_{len(found) + 1}.svg", data["image/svg+xml"].encode(), text))
    if found:
        place.mkdir(parents=True)
    for name, content, _ in found:
        (place / name).write_bytes(content)
    return [(name, text) for name, _, text in found]


# Pieces of HTML: arguments of page and table are HTML already, everything else is escaped here


def esc(x):
    return html.escape(str(x))


def page(title, body):
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<title>{esc(title)}</title><link rel="stylesheet" href="style.css">'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def table(heads, rows, numbers=()):
    """A table that scrolls in itself; ``numbers`` are the columns that are set flush right."""
    kind = [' class="number"' if i in numbers else "" for i in range(len(heads or rows[0]))]

    def line(tag, cells):
        return f"<tr>{''.join(f'<{tag}{kind[i]}>{text}</{tag}>' for i, text in enumerate(cells))}</tr>\n"

    head = f"<thead>{line('th', heads)}</thead>" if heads else ""
    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < float("inf")


def show(x):
    """A value as text: three digits are what a band can use; the rest stands in results.json."""
    if x is None or isinstance(x, bool):
        return {None: "none", True: "yes", False: "no"}[x]
    if not is_number(x):
        return esc(x)
    return f"{x:,.0f}" if isinstance(x, int) or abs(x) >= 1000 else f"{x:.3g}"


def duration(seconds):
    return "" if not is_number(seconds) else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def status_text(status):
    kind, mark = {"passed": ("good", "&#10003; "), "failed": ("bad", "&#10007; ")}.get(status, ("soft", ""))
    return f'<span class="{kind}">{mark}{esc(status)}</span>'


def verdict(in_band):
    words = {True: '<span class="good">&#10003; in band</span>', False: '<span class="bad">&#10007; out of band</span>'}
    return words.get(in_band, '<span class="soft">no band</span>')


def band_text(band):
    words = any(isinstance(x, str) for x in band or ())
    return (" or " if words else " to ").join(map(show, band or ()))


def interval_text(metric):
    ends = [metric.get("low"), metric.get("high")]
    return " to ".join(map(show, ends)) if all(map(is_number, ends)) else ""


def drawing(metric):
    """The value as a dot, its interval as a whisker, its band as a bar; out of band the dot is a hollow diamond."""
    value, band, inside = metric.get("value"), metric.get("band") or [], metric.get("in_band")
    known = [x for x in (value, metric.get("low"), metric.get("high"), *band) if is_number(x)]
    if not is_number(value) or len(known) < 2:
        return ""
    first, last = min(known), max(known)
    pad = 0.08 * (last - first) or abs(last) or 1
    first, last = (0, 1) if first >= 0 and last <= 1 else (first - pad, last + pad)

    def x(number, default):
        return round(8 + 184 * ((number if is_number(number) else default) - first) / (last - first), 1)

    parts = ['<line class="axis" x1="8" x2="192" y1="12" y2="12"/>']
    if band:
        left, right = x(band[0], first), x(band[-1], last)
        parts.append(f'<rect class="band" x="{left}" width="{max(right - left, 1):.1f}" y="5" height="14"/>')
    kind = {True: "in", False: "out"}.get(inside, "none")
    if interval_text(metric):
        left, right = x(metric["low"], first), x(metric["high"], last)
        parts.append(f'<path class="{kind}" d="M{left} 8v8M{left} 12H{right}M{right} 8v8"/>')
    dot = x(value, first)
    mark = f'd="M{dot - 5:.1f} 12l5-5 5 5-5 5z"' if kind == "out" else ""
    parts.append(f'<path class="out" {mark}/>' if mark else f'<circle class="{kind}" cx="{dot}" cy="12" r="4"/>')
    for place, anchor, number in ((8, "start", first), (192, "end", last)):
        parts.append(f'<text x="{place}" y="31" font-size="10" text-anchor="{anchor}">{show(number)}</text>')
    told = [f"value {show(value)}", interval_text(metric) and f"interval {interval_text(metric)}"]
    told += [band and f"band {band_text(band)}", {True: "in band", False: "out of band"}.get(inside)]
    label = esc(", ".join(text for text in told if text))
    return f'<svg role="img" aria-label="{label}" width="200" height="34" viewBox="0 0 200 34">{"".join(parts)}</svg>'


# The pages


def _index(data, runs):
    course, profile = profiles.index().get("course", {}), data.get("profile")
    banded = [m for run in runs for m in run["entry"]["metrics"].values() if m.get("in_band") is not None]
    seconds = sum(run["seconds"] or 0 for run in runs)
    passed, inside = sum(run["status"] == "passed" for run in runs), sum(bool(m["in_band"]) for m in banded)
    title = f"{course.get('title', 'Course')}: report"
    body = [f"<h1>{esc(title)}</h1>"]
    body.append(
        f"<p>Profile <b>{esc(profile)}</b>: {passed} of {len(runs)} lessons passed, "
        f"{inside} of {len(banded)} banded metrics in band, {duration(seconds)} in all.</p>"
    )
    body += [_failure(run) for run in runs if run["status"] == "failed" or run["entry"].get("error")]
    heads = ["lesson", "status", "took", "expected", "peak memory", "metrics in band"]
    body += ["<h2>Lessons</h2>", table(heads, [_lesson_row(run) for run in runs], numbers=(2, 3, 4, 5))]
    body += ["<h2>Timings</h2>", _timings(runs)]
    body += [_section(run) for run in runs]
    for name in ("hardware", "versions"):
        rows = [(esc(key), esc(value)) for key, value in (data.get(name) or {}).items()]
        body += [f"<h2>{name.capitalize()}</h2>", table([], rows)] if rows else []
    return page(title, "\n".join(body))


def _link(run):
    return f'<a href="{quote(run["name"])}.html">{esc(run["title"])}</a>' if run["notebook"] else esc(run["title"])


def _lesson_row(run):
    entry, verdicts = run["entry"], [m.get("in_band") for m in run["entry"]["metrics"].values()]
    peak, banded = entry.get("peak_rss_mb"), [v for v in verdicts if v is not None]
    memory = f"{peak / 1024:.1f} GB" if is_number(peak) else ""
    count = f"{sum(banded)} of {len(banded)}" if banded else ""
    times = duration(run["seconds"]), duration(run["expected"])
    return _link(run), status_text(run["status"]), *times, memory, count


def _failure(run):
    error = run["entry"].get("error") or {}
    error = error if isinstance(error, dict) else {"message": error}
    where = f", cell {esc(error['cell'])}" if error.get("cell") is not None else ""
    message = ": ".join(esc(error[key]) for key in ("type", "message") if error.get(key)) or "no message was left"
    log = f'<p><a href="{quote(run["log"])}">Log of this lesson</a></p>' if run["log"] else ""
    head = f"<p><b>{_link(run)}</b>: {status_text(run['status'])}{where}</p>"
    return f'<div class="failure">{head}<pre>{message}</pre>{log}</div>'


def _timings(runs):
    longest, rows = max([1, *(run[key] or 0 for run in runs for key in ("seconds", "expected"))]), []
    for run in runs:
        seconds, due = run["seconds"] or 0, run["expected"]
        bar = f'<i class="took" style="width:{100 * seconds / longest:.1f}%"></i>'
        bar += f'<i class="due" style="left:{99 * due / longest:.1f}%"></i>' if due else ""
        text = duration(run["seconds"]) or "no time"
        rows.append(f'<span>{esc(run["title"])}</span><span class="track">{bar}</span><span>{text}</span>')
    note = '<p class="soft">Bar: what it took. Upright line: what is expected on an idle reference machine.</p>'
    return f'<div class="times">{"".join(rows)}</div>{note}'


def _section(run):
    meaning, rows = run["spec"].get("metrics", {}), []
    for name, m in run["entry"]["metrics"].items():
        label = f"{esc(name).replace('_', '_<wbr>')}<small>{esc(meaning.get(name, ''))}</small>"
        n = show(m["n"]) if m.get("n") is not None else ""
        seen = show(m.get("value")), verdict(m.get("in_band")), drawing(m)
        rows.append((label, *seen, interval_text(m), n, band_text(m.get("band"))))
    heads = ["metric", "value", "verdict", "on its band", "95 % interval", "n", "band"]
    figures = ""
    for name, text in run["figures"]:
        source = quote(f"figures/{run['name']}/{name}")
        target = f"{quote(run['name'])}.html" if run["notebook"] else source
        image = f'<a href="{target}"><img src="{source}" alt="{esc(text) or "figure"}" loading="lazy"></a>'
        figures += f"<figure>{image}<figcaption>{esc(text)}</figcaption></figure>"
    scores = table(heads, rows, numbers=(1, 4, 5, 6)) if rows else "<p>No metric was recorded.</p>"
    head = f"<h2>{_link(run)}</h2>\n<p>{esc(run['spec'].get('claim', ''))}</p>"
    return f'{head}\n{scores}\n<div class="figures">{figures}</div>'


def _highlighting():
    """Colours of code for light and for dark pages."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {dark} }}"
    return f"{light}\n{dark}\n.highlight {{ background: none !important; }}\n"


def _lesson_page(place, run, pages):
    """The executed notebook as a page. Formulas stay readable TeX: a renderer would need scripts or the network."""
    quiet = logging.getLogger(__name__)  # nbconvert warns of each picture that it gives a text of its own
    quiet.setLevel(logging.ERROR)
    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_anchor_links=True, log=quiet)
    kinds = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]
    exporter.config.NbConvertBase.display_data_priority = kinds
    where = {"metadata": {"path": str(profiles.ROOT / "notebooks"), "name": run["name"]}}
    body, _ = exporter.from_notebook_node(run["notebook"], where)
    soup = BeautifulSoup(body, "html.parser")
    for element in soup.select("script, link, iframe, object, embed, meta"):
        element.decompose()
    for image in soup.select("img"):
        if not image.get("src", "").startswith("data:"):
            image.replace_with(image.get("alt") or "[image]")
    for link in soup.select('a[href$=".ipynb"]'):
        if link["href"].removesuffix(".ipynb") in pages:
            link["href"] = link["href"].removesuffix(".ipynb") + ".html"
        elif "://" not in link["href"]:
            link.unwrap()
    i = pages.index(run["name"])
    near = [(pages[j], text) for j, text in ((i - 1, "previous"), (i + 1, "next")) if 0 <= j < len(pages)]
    links = " | ".join(f'<a href="{quote(p)}.html">{text}</a>' for p, text in [("index", "report"), *near])
    (place / f"{run['name']}.html").write_text(page(run["title"], f"<nav>{links}</nav>{soup}"), encoding="utf-8")
