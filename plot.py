"""
The curves of one or more runs as a picture, and a table of their best values.

    python plot.py log                          # log/log.txt -> log/curves.png
    python plot.py log log.1 -o compare.png     # two runs, one picture

A log has one value a line, `{step} {stream} {value}`: train and val (loss in nats per token), hella
(HellaSwag accuracy, 0 to 1) and norm (of the gradient, before clipping). Those of build-nanogpt,
which have no norm, and of garg-aayush/gpt-2 (`{step} train_loss: {value}`) are read too. What
train_gpt2.py writes beside its log, config.json, tells which of OpenAI's models to compare with.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.errors import UserError, optional_import, run_main, warn
from plumbing.files import atomic_write
from plumbing.flags import Parser, not_empty

# OpenAI's models by (n_layer, n_embd): size, GPT-2's loss on the val shard of FineWeb-Edu where it
# is known, HellaSwag accuracy of GPT-2 and of the GPT-3 of that size.
REFERENCES = {
    (12, 768): ("124M", 3.2924, 0.2945, 0.337),
    (24, 1024): ("350M", None, 0.375224, 0.436),
    (36, 1280): ("774M", None, 0.431986, 0.510),
    (48, 1600): ("1558M", None, 0.488946, 0.547),
}

# -----------------------------------------------------------------------------
# What a log tells

# Two digits of exponent at most: what is larger, or no number at all, cannot be drawn.
LINE = re.compile(r"\s*(\d{1,15})\s+(train|val|hella|norm)(?:_loss|_norm)?:?"
                  r"\s+(-?\d{1,30}(?:\.\d*)?(?:e[+-]?\d\d)?)\s*", re.ASCII)


class Run(NamedTuple):
    """One log. A stream is float64 (2, n): steps, ascending and each once, and their values."""

    name: str
    span: tuple  # the first and the last step of any stream
    flags: dict  # those that are numbers; {} where no config tells
    train: np.ndarray
    val: np.ndarray
    hella: np.ndarray
    norm: np.ndarray


def read_log(path):
    """The Run in a folder with a log.txt, or in a log file. Raises UserError."""
    path = Path(path)
    file = path / "log.txt" if os.path.isdir(path) else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); name a folder that train_gpt2.py "
                        "logs to, or a log file") from e
    points, skipped = {"train": {}, "val": {}, "hella": {}, "norm": {}}, 0
    for line in lines:
        if match := LINE.fullmatch(line):
            step, stream, value = match.groups()
            points[stream][int(step)] = float(value)  # of a step that comes twice, the later one
        else:
            skipped += bool(line.strip())
    steps = [step for p in points.values() for step in p]
    if not steps:
        raise UserError(f"{file} has no line such as `0 train 10.954321`; is it a training log?")
    if skipped:
        warn(f"{path}: skipped lines that are not `step stream number`: {skipped:,}")
    flags = read_flags(file.with_name("config.json"))
    arrays = {s: np.array(sorted(p.items()), float).reshape(-1, 2).T for s, p in points.items()}
    return Run(str(path), (min(steps), max(steps)), flags, **arrays)


def read_flags(path):
    """The numbers among the flags in config.json; {} where it is absent or not train_gpt2.py's."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))["flags"]
        return {k: v for k, v in flags.items() if isinstance(v, (int, float))}
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); mend it or move it away") from e


def running_median(series, width):
    """The medians of `width` neighbours, (2, k): a step and a value every quarter of a width."""
    stretches = np.lib.stride_tricks.sliding_window_view(series, width, axis=1)
    return np.median(stretches[:, :: max(1, width // 4)], axis=2)


def find_spikes(run):
    """The six highest spikes of the gradient norm behind the warm-up, (2, k), by step."""
    first, last = run.span
    norm = run.norm[:, run.norm[0] >= run.flags.get("warmup_steps", 0.05 * last)]
    if norm.shape[1] < 20:
        return norm[:, :0]
    # Three times the median of its neighbours is a spike: a mean would feel the spike itself, and
    # the level of the whole run would not do, as norms fall for thousands of steps.
    level = np.interp(norm[0], *running_median(norm, min(201, norm.shape[1])))
    spikes = norm[:, norm[1] > 3 * level]
    named = []
    for step, value in spikes.T[np.argsort(-spikes[1])]:
        # They come in bursts, of which the highest speaks for all.
        if len(named) < 6 and all(abs(step - other) > (last - first) / 40 for other, _ in named):
            named.append((step, value))
    return np.array(sorted(named)).reshape(-1, 2).T


def best(series, pick):
    """'value (step)' of the best value of a stream. pick: np.argmin or np.argmax."""
    if not series.size:
        return "-"
    step, value = series[:, pick(series[1])]
    return f"{value:.4f} ({step:,.0f})"


def table(runs):
    """Text: a heading, one line per run with '-' for what a log does not tell, and the spikes."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':{width}}     steps     tokens  last val  best val (step)   best hella (step)"]
    for run in runs:
        batch = run.flags.get("total_batch_size")
        tokens = f"{batch * run.span[1] / 1e6:,.2f}M" if batch else "-"
        last_val = f"{run.val[1, -1]:.4f}" if run.val.size else "-"
        bests = f"{best(run.val, np.argmin):>17} {best(run.hella, np.argmax):>18}"
        lines.append(f"{run.name:{width}} {run.span[1]:9,} {tokens:>10} {last_val:>9} {bests}")
    for run in runs:
        spikes = ", ".join(f"step {step:,.0f}: {value:.4g}" for step, value in find_spikes(run).T)
        if spikes:
            lines.append(f"{run.name}: spikes of the gradient norm at {spikes}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The picture

COLOURS = ["#4477AA", "#CC6655", "#228833", "#AA4499", "#CC9922", "#55AACC", "#555555"]
GREY = "#777777"
SETTINGS = {
    "axes.prop_cycle": f"cycler('color', {COLOURS})",  # C0, C1, ...
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#BBBBBB",
    "axes.grid": True,
    "grid.color": "#EEEEEE",
}


def draw(runs, out):
    """Write the picture of the runs to the file `out`, whole or not at all. Raises UserError."""
    matplotlib = optional_import("matplotlib", "drawing")
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    # Drawn in memory first: a run that redraws its curves may write the same file meanwhile.
    picture = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(13, 6.2), dpi=130, layout="constrained")
        compose(figure, runs)
        try:
            figure.savefig(picture, format=Path(out).suffix[1:] or "none")
            with atomic_write(out) as f:
                f.write(picture.getvalue())
        except (OSError, ValueError) as e:  # matplotlib's ValueError lists the formats that it has
            raise UserError(f"{out} cannot be written: {e}") from e


def compose(figure, runs):
    """The loss, large on the left; beside it a panel for each other thing that the logs tell."""
    beside = [draw_hella] if any(run.hella.size for run in runs) else []
    beside += [draw_norm] if any(run.norm.size for run in runs) else []
    rows = [[draw_loss, panel] for panel in beside] or [[draw_loss]]
    panels = figure.subplot_mosaic(rows, sharex=True, width_ratios=(1.45, 1)[: len(rows[0])])
    first, last = min(run.span[0] for run in runs), max(run.span[1] for run in runs)
    pad = (last - first) / 80 or 1
    sizes = {(run.flags.get("n_layer", 12), run.flags.get("n_embd", 768)) for run in runs}
    known = [REFERENCES[size] for size in sorted(sizes & REFERENCES.keys())]
    for draw_panel, axes in panels.items():
        axes.set_xlim(first - pad, last + pad)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(length=0, colors=GREY)
        axes.set_xlabel("step" if draw_panel in rows[-1] else "", color=GREY)
        draw_panel(axes, runs, known)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)


def noisy_curve(axes, series, color):
    """Every value of a stream, and where there are many, faint below their running median."""
    n = series.shape[1]
    if n < 300:
        axes.plot(*series, "o-", color=color, linewidth=1, markersize=2, alpha=0.6)
    else:
        axes.plot(*series, color=color, linewidth=0.6, alpha=0.25)
        axes.plot(*running_median(series, n // 100), color=color, linewidth=1)


def reference_line(axes, y, name, style="--"):
    """A quiet line across the panel; its name and its value stand in the margin."""
    axes.axhline(y, color=GREY, linewidth=0.9, linestyle=style, zorder=1.5)
    axes.text(1.01, y, f"{name}\n{round(y, 4):g}", color=GREY, size=9, va="center",
              transform=axes.get_yaxis_transform())


def draw_loss(axes, runs, known):
    axes.set_title("Loss: validation (bold) and train (thin; faint: every step)")
    for i, run in enumerate(runs):
        noisy_curve(axes, run.train, f"C{i}")
        # For matplotlib a $ begins mathematics, and a name that begins with _ is hidden.
        name = " " + run.name[-40:].replace("$", r"\$")
        axes.plot(*run.val, "o-", color=f"C{i}", linewidth=2.2, markersize=2, zorder=3, label=name)
    axes.legend(loc="upper right", frameon=False)  # where loss curves leave room
    values = np.concatenate([r.train[1] for r in runs] + [r.val[1] for r in runs])
    # The first steps of a long run, and a batch that is off, leave the frame: they would press the
    # others flat.
    frame = 0, 97 if len(values) > 1000 else 100
    low, high = np.percentile(values, frame) if values.size else (3, 11)
    for size, loss, *_ in known:
        if loss:
            reference_line(axes, loss, f"GPT-2 {size}")
            low, high = min(low, loss), max(high, loss)
    room = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - room, high + room)


def draw_hella(axes, runs, known):
    axes.set_title("HellaSwag accuracy")
    for i, run in enumerate(runs):
        axes.plot(*run.hella, "o-", color=f"C{i}", linewidth=1.6, markersize=2)
    reference_line(axes, 0.25, "chance", ":")
    for size, _, gpt2, gpt3 in known:
        reference_line(axes, gpt2, f"GPT-2 {size}")
        if len(known) == 1:  # among several, one's GPT-3 is another's GPT-2: names would overlap
            reference_line(axes, gpt3, f"GPT-3 {size}", "-.")


def draw_norm(axes, runs, known):
    axes.set_title("Gradient norm before clipping (triangles: spikes)")
    axes.set_yscale("log")  # norms begin at 15, end at 0.3, and a spike is anything
    for i, run in enumerate(runs):
        noisy_curve(axes, run.norm, f"C{i}")
        steps, values = find_spikes(run)
        axes.plot(steps, 1.2 * values, "v", color=f"C{i}", markersize=5)
    # The ticks of a log axis are powers of ten, of which there may be none in sight.
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


# -----------------------------------------------------------------------------
# The command


def plot(argv=None):
    """Print the table and draw the picture of the logs that the command line names."""
    parser = Parser("The curves of one or more runs as a picture, their best values as a table.",
                    usage="%(prog)s log [log ...] [-o FILE]")
    parser.add_argument("logs", nargs="+", type=not_empty, metavar="log",
                        help="a folder with a log.txt (--log_dir of train_gpt2.py), or a log file")
    parser.add_argument("-o", "--out", type=not_empty, metavar="FILE",
                        help=".png, .pdf or .svg (default: curves.png in the first log's folder)")
    args = parser.parse_args(argv)
    runs = [read_log(path) for path in args.logs]
    print(table(runs))
    first = Path(args.logs[0])
    out = args.out or (first if os.path.isdir(first) else first.parent) / "curves.png"
    draw(runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main("plot.py", plot)
