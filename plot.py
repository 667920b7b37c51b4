"""
The curves of one or more runs as a picture, and a table of their best values.

    python plot.py log                          # log/log.txt -> log/curves.png
    python plot.py log log.1 -o compare.png     # two runs, one picture

A log has one value a line, `{step} {stream} {value}`: train and val (loss in nats per token), hella
(HellaSwag accuracy, 0 to 1) and norm (of the gradient, before clipping). Those of build-nanogpt,
which have no norm, and of garg-aayush/gpt-2 (`{step} train_loss: {value}`) are read too. The file
config.json that train_gpt2.py writes beside its log adds the learning rate, the tokens, and which
of OpenAI's models a run is compared with.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Parser, UserError, not_empty

# -----------------------------------------------------------------------------
# What runs are compared with


class Reference(NamedTuple):
    """OpenAI's models of one size: loss on the val shard of FineWeb-Edu, HellaSwag accuracies."""

    size: str
    loss: float | None
    gpt2: float
    gpt3: float


REFERENCES = {  # by (n_layer, n_embd)
    (12, 768): Reference("124M", 3.2924, 0.2945, 0.337),
    (24, 1024): Reference("350M", None, 0.375224, 0.436),
    (36, 1280): Reference("774M", None, 0.431986, 0.510),
    (48, 1600): Reference("1558M", None, 0.488946, 0.547),
}

# Steps and train loss of another 124M run on the same data, garg-aayush/gpt-2's baseline (524,288
# tokens per step, learning rate 6e-4). A run that is on track passes close by.
TRACK_STEPS = 0, 100, 250, 1000, 5000, 15000, 19072
TRACK_LOSS = 10.9365, 7.2393, 6.154, 4.1883, 3.3126, 3.0855, 3.0841
TRACK_BATCH = 524288


# -----------------------------------------------------------------------------
# Reading a log

LINE = re.compile(r"\s*(\d{1,15})\s+(train|val|hella|norm)(?:_loss|_norm)?:?\s+(\S+)\s*", re.ASCII)


class Run(NamedTuple):
    """
    One log. Each stream is float64 (2, n): steps, ascending and each once, and values, which may be
    NaN or infinite. `malformed` counts the lines skipped; `flags` is {} where there is no config.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    hella: np.ndarray
    norm: np.ndarray
    malformed: int = 0
    flags: dict = {}

    @property
    def span(self):
        """The first and the last step of any stream."""
        steps = np.concatenate([self.train[0], self.val[0], self.hella[0], self.norm[0]])
        return steps.min(), steps.max()

    @property
    def reference(self):
        """The Reference of this run's size, or None; 124M where no config tells the size."""
        return REFERENCES.get((self.flags.get("n_layer", 12), self.flags.get("n_embd", 768)))


def read_log(path):
    """
    The Run in a folder with a log.txt, or in a log file. Where a step comes twice in a stream, as
    it does when a run was resumed, the later line counts. Raises UserError.
    """
    folder, file = os.path.isdir(path), Path(path)
    file = file / "log.txt" if folder else file
    if not os.path.exists(file):
        fault = "has no log.txt in it" if folder else "does not exist"
        raise UserError(f"{path} {fault}; name a folder that train_gpt2.py logs to, or a log file")
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror or e}") from e
    points, malformed = {"train": {}, "val": {}, "hella": {}, "norm": {}}, 0
    for line in lines:
        try:
            step, stream, value = LINE.fullmatch(line).groups()
            points[stream][float(step)] = float(value)
        except (AttributeError, ValueError):  # no match, no number
            malformed += bool(line.strip())
    if not any(points.values()):
        raise UserError(f"{file} has no line such as `0 train 10.954321`; is it a training log?")
    arrays = {s: np.array(sorted(p.items())).reshape(-1, 2).T for s, p in points.items()}
    name = file.resolve().parent.name if file.name == "log.txt" else file.stem
    flags = read_flags(file.with_name("config.json"))
    return Run(name, **arrays, malformed=malformed, flags=flags)


def read_flags(path):
    """The numbers among the flags in config.json; {} where it is absent or not train_gpt2.py's."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))["flags"]
        return {k: v for k, v in flags.items() if isinstance(v, (int, float))}
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); mend it or move it away") from e


# -----------------------------------------------------------------------------
# Numbers


def best(series, pick):
    """(step, value) of the best finite value of a stream, or None. pick: np.argmin or np.argmax."""
    series = series[:, np.isfinite(series[1])]
    return tuple(series[:, pick(series[1])]) if series.size else None


def table(runs):
    """Text with a heading and one line per run; '-' for what a log does not tell."""
    rows = [("run", "steps", "tokens", "last val", "best val (step)", "best HellaSwag (step)")]
    for run in runs:
        tokens = run.span[1] * run.flags.get("total_batch_size", 0)
        scale, unit = (1e9, "B") if tokens >= 1e9 else (1e6, "M")
        bests = best(run.val, np.argmin), best(run.hella, np.argmax)
        row = [
            run.name,
            f"{run.span[1]:,.0f}",
            f"{tokens / scale:.2f}{unit}" if tokens else "-",
            f"{run.val[1, -1]:.4f}" if run.val.size else "-",
        ]
        rows.append(row + [f"{b[1]:.4f} ({b[0]:,.0f})" if b else "-" for b in bests])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [zip(row, "<>>>>>", widths, strict=True) for row in rows]
    return "\n".join("  ".join(f"{c:{side}{w}}" for c, side, w in row) for row in cells)


def smooth(values, width):
    """
    Centred mean over `width` values, (n,) -> (n,), of fewer at both ends. NaN and infinities do not
    count. Needs n >= width.
    """
    good, window = np.isfinite(values), np.ones(width)
    total = np.convolve(np.where(good, values, 0.0), window, "same")
    count = np.convolve(good, window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def find_spikes(series, warmup):
    """
    The points of a stream from step `warmup` on, (2, k), that are 8 median deviations above the
    median of their 201 neighbours (a mean would feel the spike itself) and three times as high.
    """
    series = series[:, np.isfinite(series[1]) & (series[0] >= warmup)]
    values = series[1]
    if len(values) < 20:
        return series[:, :0]
    width = min(201, len(values))
    stride = max(1, width // 4)  # the level changes slowly: every 50 steps, and lines between
    windows = np.lib.stride_tricks.sliding_window_view(values, width)[::stride]
    level = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - level[:, None]), axis=1)
    bar = np.maximum(level + 8 * deviation, 3 * level)
    centres = np.arange(len(bar)) * stride + width // 2
    return series[:, values > np.interp(np.arange(len(values)), centres, bar)]


def learning_rate(flags, steps):
    """train_gpt2.get_lr for many steps, (n,) -> (n,); None where the flags are not known."""
    if not {"max_lr", "warmup_steps", "max_steps"} <= flags.keys():
        return None
    peak, warmup = flags["max_lr"], flags["warmup_steps"]
    low = flags.get("min_lr", peak / 10)
    ratio = np.clip((steps - warmup) / max(1, flags["max_steps"] - warmup), 0, 1)
    decay = low + 0.5 * (1 + np.cos(np.pi * ratio)) * (peak - low)
    return np.where(steps < warmup, peak * (steps + 1) / max(1, warmup), decay)


# -----------------------------------------------------------------------------
# The picture

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe-Ito
GREY = "#666666"
SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "savefig.dpi": 130,
}


def draw(runs, out):
    """Write the picture of the runs to the file `out`, whole or not at all. Raises UserError."""
    out = Path(out)
    kind = out.suffix[1:].lower()
    if kind not in ("png", "pdf", "svg"):
        raise UserError(f"{out} is not a picture's name; let it end in .png, .pdf or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError(f"drawing needs matplotlib ({e}): pip install matplotlib") from e
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context():  # a caller's settings return; without pyplot there is no window
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        compose(figure, runs)
        try:
            figure.savefig(temporary, format=kind)
            os.replace(temporary, out)
        except OSError as e:
            raise UserError(f"{out} cannot be written: {e.strerror or e}") from e
        finally:
            temporary.unlink(missing_ok=True)


def compose(figure, runs):
    """The loss, large on the left; beside it a panel for each other thing that the logs tell."""
    known = {
        draw_hella: any(r.hella.size for r in runs),
        draw_norm: any(r.norm.size for r in runs),
        draw_rate: any(learning_rate(r.flags, 0) is not None for r in runs),
    }
    panels = [draw_loss, *(panel for panel, shown in known.items() if shown)]
    rows = max(1, len(panels) - 1)
    columns = (1.4, 1) if len(panels) > 1 else (1,)
    figure.set_size_inches(14 if len(panels) > 1 else 9, 7 + 0.2 * len(runs))
    grid = figure.add_gridspec(rows, len(columns), width_ratios=columns)
    first, last = min(r.span[0] for r in runs), max(r.span[1] for r in runs)
    pad = (last - first) / 80 or 1
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[:, 0] if i == 0 else grid[i - 1, 1])
        axes.set_xlim(first - pad, last + pad)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=8)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        panel(axes, runs)
        if i in (0, rows):
            axes.set_xlabel("step")
        else:
            axes.tick_params(labelbottom=False)
    add_legend(figure, runs)


def look(i):
    """What tells run i from the others in every panel, with and without colours."""
    return {
        "color": COLOURS[i % 7],
        "marker": "osD^vPX"[i % 7],
        "linestyle": ("-", "--", ":")[i // 7 % 3],
    }


def add_legend(figure, runs):
    """The table above the panels, with each run's line before its row."""
    from matplotlib.lines import Line2D

    short = [r._replace(name=r.name if len(r.name) <= 40 else "..." + r.name[-37:]) for r in runs]
    labels = [row.replace("$", r"\$") for row in table(short).splitlines()]
    handles = [Line2D([], [], linestyle="none")]  # of the heading
    handles += [Line2D([], [], linewidth=2, **look(i)) for i in range(len(runs))]
    font = {"family": "monospace", "size": 8}
    figure.legend(handles, labels, loc="outside upper left", frameon=False, prop=font)


def curve(axes, series, i, **changes):
    """A stream of run i, or (steps, values), as a line; a short one shows its points too."""
    steps, values = series
    style = {**look(i), "markersize": 3.5 if len(values) > 1 else 7, **changes}
    style["marker"] = style["marker"] if len(values) <= 100 else ""
    axes.plot(steps, np.where(np.isfinite(values), values, np.nan), **style)


def noisy_curve(axes, series, i):
    """Every value of a stream of run i, faint, and their running mean. Returns its width."""
    n = series.shape[1]
    width = n // 100 | 1 if n >= 500 else 1  # odd: as many values on either side
    curve(axes, series, i, linewidth=0.6, alpha=0.3 if width > 1 else 1)
    if width > 1:
        curve(axes, (series[0], smooth(series[1], width)), i, linewidth=1.1, marker="")
    return width


def draw_loss(axes, runs):
    width = max(noisy_curve(axes, run.train, i) for i, run in enumerate(runs))
    for i, run in enumerate(runs):
        curve(axes, run.val, i, linewidth=2.2, zorder=3)
    mean = f", and mean of {width} steps" if width > 1 else ""
    title = f"Loss: train (thin{mean}), validation (bold)"
    first, last = min(r.span[0] for r in runs), max(r.span[1] for r in runs)
    track = zip(TRACK_STEPS, TRACK_LOSS, strict=True)
    track = [(step, loss) for step, loss in track if first <= step <= last]
    if track and any(is_like_track(run) for run in runs):
        ring = {"marker": "o", "s": 60, "facecolors": "none", "edgecolors": "black", "alpha": 0.6}
        axes.scatter(*zip(*track, strict=True), zorder=4, **ring)
        title += "\nCircles: train loss of another 124M run, garg-aayush/gpt-2"
    axes.set_title(title)
    # The first steps of a long run leave the frame: they would press the others flat.
    start = first + 0.03 * (last - first) if last - first >= 1000 else first
    values = [s[1, s[0] >= start] for r in runs for s in (r.train, r.val)]
    known = {r.reference for r in runs if r.reference and r.reference.loss}
    lines = [(k.loss, f"GPT-2 {k.size}", "--") for k in known]
    set_range(axes, np.concatenate(values), lines, log=True)


def is_like_track(run):
    """Whether the track tells anything about a run: a 124M model, as many tokens per step."""
    tokens = run.flags.get("total_batch_size", TRACK_BATCH)
    return run.reference == REFERENCES[12, 768] and tokens == TRACK_BATCH


def draw_hella(axes, runs):
    axes.set_title("HellaSwag accuracy")
    for i, run in enumerate(runs):
        curve(axes, run.hella, i, linewidth=1.6)
    lines = [(0.25, "chance", ":")]
    for r in {r.reference for r in runs if r.reference}:
        lines += [(r.gpt2, f"GPT-2 {r.size}", "--"), (r.gpt3, f"GPT-3 {r.size}", "-.")]
    set_range(axes, np.concatenate([r.hella[1] for r in runs]), lines, log=False)


def draw_norm(axes, runs):
    axes.set_title("Gradient norm before clipping")
    spikes = []
    for i, run in enumerate(runs):
        noisy_curve(axes, run.norm, i)
        warmup = run.flags.get("warmup_steps", 0.05 * run.span[1])
        spikes += [(v, step, look(i)["color"]) for step, v in find_spikes(run.norm, warmup).T]
    set_range(axes, np.concatenate([r.norm[1] for r in runs]), [], log=True)
    # The six highest get a number, at most one of each burst, and their names go to the margin:
    # at the curve names would overlap.
    burst = np.ptp(axes.get_xlim()) / 40
    named = []
    for spike in sorted(spikes, reverse=True):
        if len(named) < 6 and all(abs(spike[1] - other[1]) > burst for other in named):
            named.append(spike)
    names = [(0, "spikes", GREY)] if named else []
    for k, (value, step, color) in enumerate(sorted(named, key=lambda spike: spike[1]), start=1):
        offset = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{k}", (step, value), color=color, size=8, weight="bold", **offset)
        names.append((0, f"{k}  step {step:,.0f}: {value:.4g}", color))
    name_in_margin(axes, names[::-1])


def draw_rate(axes, runs):
    axes.set_title("Learning rate")
    for i, run in enumerate(runs):
        steps = np.unique(np.linspace(*run.span, 1000).round())
        rates = learning_rate(run.flags, steps)
        if rates is not None:
            curve(axes, (steps, rates), i, marker="" if len(steps) > 1 else "o")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)


def set_range(axes, values, lines, log):
    """
    Fit the y-axis to the finite values. Of the reference lines, (y, name, linestyle) each, those
    near enough to leave the values a third of the panel are drawn, the others named at its edge.
    """
    warp, unwarp = (np.log, np.exp) if log else (np.asarray, np.asarray)
    values = values[(np.abs(values) < 1e100) & ((values > 0) | (not log))]
    if values.size == 0:
        values = np.array([y for y, _, _ in lines] or [1.0])
    low, high = warp(values.min()), warp(values.max())
    reach = max(2 * (high - low), 0.1)
    near = [y for y, _, _ in lines if low - reach <= warp(y) <= high + reach]
    low, high = min([low, *warp(near)]), max([high, *warp(near)])
    pad = (high - low) / 20 if high - low > 1e-3 else 0.05
    low, high = low - pad, high + 2 * pad  # room for the number of a spike
    axes.set_ylim(unwarp(low), unwarp(high))
    if log:
        axes.set_yscale("log")
        set_log_ticks(axes, np.exp(high - low))
    names = []
    for y, name, linestyle in lines:
        place = (warp(y) - low) / (high - low)
        arrow = "" if 0 < place < 1 else "↑ " if place > 0 else "↓ "
        names.append((place, f"{arrow}{name}  {round(y, 4):g}", GREY))
        if not arrow:
            axes.axhline(y, color=GREY, linewidth=1, linestyle=linestyle, zorder=1.5)
    name_in_margin(axes, names)


def set_log_ticks(axes, ratio):
    """Ticks with plain numbers; a log axis has none of its own inside a decade."""
    from matplotlib import ticker

    few = ticker.MaxNLocator(8, steps=[1, 2, 5, 10])
    many = ticker.LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(few if ratio < 6 else many)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def name_in_margin(axes, names):
    """Write (height, text, colour) right of the panel, each a line above the one below it."""
    line = 0.15 * axes.figure.dpi / axes.bbox.height  # 0.15 inch, where the panel is 1 high
    free = 0
    for height, text, color in sorted(names, key=lambda name: name[0]):
        free = max(free, min(height, 1))
        axes.text(1.01, free, text, color=color, size=8, va="center", transform=axes.transAxes)
        free += line


# -----------------------------------------------------------------------------
# The command


def main(argv=None):
    parser = Parser("The curves of one or more runs as a picture, their best values as a table.",
                    usage="%(prog)s log [log ...] [-o FILE]")  # fmt: skip
    logs_help = "a folder with a log.txt (--log_dir of train_gpt2.py), or a log file"
    parser.add_argument("logs", nargs="+", type=not_empty, metavar="log", help=logs_help)
    out_help = ".png, .pdf or .svg file to write (default: curves.png in the first log's folder)"
    parser.add_argument("-o", "--out", type=not_empty, metavar="FILE", help=out_help)
    try:
        args = parser.parse_args(argv)
        runs = [read_log(path) for path in args.logs]
        names = [run.name for run in runs]
        for i, (run, path) in enumerate(zip(runs, args.logs, strict=True)):
            if names.count(run.name) > 1:
                runs[i] = run._replace(name=path)
            if run.malformed:
                skipped = f"plot.py: warning: {path}: skipped malformed lines: {run.malformed:,}"
                print(skipped, file=sys.stderr)
        print(table(runs))
        first = Path(args.logs[0])
        out = args.out or (first if first.is_dir() else first.parent) / "curves.png"
        draw(runs, out)
        print(f"wrote {out}")
    except UserError as e:
        print(f"plot.py: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
