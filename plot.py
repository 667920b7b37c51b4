"""
Plot the training curves of one or more runs and print a table of their results.

    python plot.py log                          # log/log.txt -> log/curves.png
    python plot.py log log.1 -o compare.png     # two runs in one picture

Each line of a log is `{step} {stream} {value}`. Streams: train and val (loss in nats per token),
hella (HellaSwag accuracy, 0 to 1), norm (gradient norm before clipping, not in build-nanogpt).
The config.json next to log.txt determines which published results a run is compared with.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

# (n_layer, n_embd): size, GPT-2's loss on FineWeb-Edu, HellaSwag of GPT-2 and GPT-3, all from build-nanogpt.
OPENAI_MODELS = {
    (12, 768): ("124M", 3.2924, 0.2945, 0.337),
    (24, 1024): ("350M", None, 0.375224, 0.436),
    (36, 1280): ("774M", None, 0.431986, 0.510),
    (48, 1600): ("1558M", None, 0.488946, 0.547),
}

# Validation losses of published 124M runs: {(arch, dataset): {step: loss}}. From the second
# point on, linear interpolation is within 0.01 of every published value.
CONFIG_124M = dict(n_layer=12, n_embd=768, block_size=1024, T=1024, total_batch_size=524288)
REFERENCE_RUNS = {
    # github.com/garg-aayush/building-from-scratch, gpt-2/log/log.txt at commit 5fb8200: one run of
    # build-nanogpt's configuration. The last value was measured at step 19,072.
    ("gpt2", "FineWeb-Edu"): {
        0: 10.9366, 250: 6.1668, 500: 5.3127, 750: 4.6532, 1000: 4.1679, 1250: 3.9669, 1500: 3.8251,
        1750: 3.7324, 2000: 3.6663, 2250: 3.6132, 2500: 3.5772, 2750: 3.5360, 3000: 3.5136,
        3500: 3.4564, 4000: 3.4195, 4500: 3.3828, 5000: 3.3521, 6000: 3.3041, 7000: 3.2627,
        8000: 3.2339, 9000: 3.2074, 10000: 3.1849, 12000: 3.1436, 15000: 3.1012, 19073: 3.0656},
    # github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, result 36: mean of ten.
    ("modern", "FineWeb"): {
        0: 10.8258, 125: 4.5854, 250: 4.0978, 375: 3.9266, 500: 3.8282, 625: 3.7657, 750: 3.7229,
        875: 3.6841, 1000: 3.6531, 1250: 3.5935, 1500: 3.5398, 1750: 3.4977, 2000: 3.4556,
        2250: 3.4178, 2500: 3.3812, 2750: 3.3425, 3000: 3.3050, 3125: 3.2882, 3250: 3.2787},
}

# Flags that do not affect the curves.
IGNORED_FLAGS = {"B", "compile", "device", "log_dir", "preset", "resume", "save_every", "zero"}

# Skips infinity, NaN and exponents of three digits, which matplotlib cannot draw.
LINE = re.compile(r"(\d{1,15}) (train|val|hella|norm) (-?\d{1,30}(?:\.\d*)?(?:e[+-]?\d\d)?)", re.A)
# last: last step. train to norm: float64 arrays (2, n) of ascending unique steps, and values.
Run = namedtuple("Run", "name last settings train val hella norm")


def fail(message):
    """Print a mistake of the user in one line and exit with status 2."""
    print("plot.py: error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(2)


def read_log(path):
    """Read a log directory or a log file into a Run. Lines of another form are skipped."""
    file = Path(path, "log.txt") if os.path.isdir(path) else Path(path)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        fail(f"could not read {file} ({e.strerror}); pass the --log_dir of a run, or a log file")
    points = {"train": {}, "val": {}, "hella": {}, "norm": {}}
    for match in filter(None, map(LINE.fullmatch, lines)):
        step, stream, value = match.groups()
        points[stream][int(step)] = float(value)  # the last line of a step wins
    steps = [step for values in points.values() for step in values]
    if not steps:
        fail(f"{file} is not a training log: it has no line like `0 train 10.954321`")
    settings = read_settings(file.with_name("config.json"))
    name = f"{path} (byte tokens)" if settings.get("tokenizer") == "bytes" else str(path)
    arrays = {s: np.array(sorted(p.items()), float).reshape(-1, 2).T for s, p in points.items()}
    return Run(name, max(steps), settings, **arrays)


def read_settings(path):
    """Read flags, model config, arch, tokenizer and dataset from config.json ({}: none or invalid)."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = config["flags"] | config.get("model", {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    shard = config.get("first_shard") or ""
    with contextlib.suppress(LookupError, TypeError):  # earlier versions list all train shards
        shard = shard or config["data"]["shards"][0][0]
    fineweb = "FineWeb-Edu" if "edu" in shard else "FineWeb"
    return settings | dict(arch=config.get("arch", "gpt2"), tokenizer=config.get("tokenizer"),
                           dataset=fineweb if "fineweb" in shard else None)


def running_median(series, width):
    """Return the medians of windows of `width` values, (2, k), one every quarter of a width."""
    windows = np.lib.stride_tricks.sliding_window_view(series, width, axis=1)
    return np.median(windows[:, :: max(1, width // 4)], axis=2)


def find_spikes(run):
    """Return the six highest gradient norm spikes after the warm-up, (2, k), in step order."""
    norm = run.norm[:, run.norm[0] >= run.settings.get("warmup_steps", 0.05 * run.last)]
    if norm.shape[1] < 20:
        return norm[:, :0]
    # A spike exceeds three times the running median. A running mean would include the spike, and
    # a constant threshold would not follow the norm, which decreases for thousands of steps.
    level = np.interp(norm[0], *running_median(norm, min(201, norm.shape[1])))
    spikes = norm[:, norm[1] > 3 * level]
    highest = []
    for step, value in spikes.T[np.argsort(-spikes[1])]:
        # Spikes come in bursts: keep only the highest of each.
        if len(highest) < 6 and all(abs(step - s) > run.last / 40 for s, _ in highest):
            highest.append((step, value))
    return np.array(sorted(highest)).reshape(-1, 2).T


def reference_key(run):
    """Return (arch, dataset) if the run has the 124M configuration and its dataset is known."""
    settings = run.settings
    is_124m = all(settings.get(name) == value for name, value in CONFIG_124M.items())
    return (settings["arch"], settings["dataset"]) if is_124m and settings["dataset"] else None


def describe(run):
    """Yield lines about a run: its comparison with the reference, its gradient norm spikes."""
    key = reference_key(run)
    if key and key not in REFERENCE_RUNS:
        yield "no reference: plot.py has no published {} run on {}".format(*key)
    elif key and run.val.size:
        steps, losses = zip(*REFERENCE_RUNS[key].items(), strict=True)
        step, loss = run.val[:, -1]
        # Before the second point the loss falls too steeply for linear interpolation.
        if step == 0 or steps[1] <= step <= steps[-1]:
            reference = np.interp(step, steps, losses)
            yield f"last val {loss:.4f}, reference {reference:.4f} (step {step:,.0f})"
    if (spikes := find_spikes(run)).size:
        steps = ", ".join(f"step {step:,.0f}: {value:.4g}" for step, value in spikes.T)
        yield f"gradient norm spikes at {steps}"


def format_best(series, argbest):
    """Format the best value of a stream as 'value (step)'. argbest: np.argmin or np.argmax."""
    if not series.size:
        return "-"
    step, value = series[:, argbest(series[1])]
    return f"{value:.4f} ({step:,.0f})"


def format_table(runs):
    """Format a table of the runs, followed by what `describe` yields and differing settings."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':{width}}     steps     tokens  last val  best val (step)   best hella (step)"]
    for run in runs:
        batch = run.settings.get("total_batch_size")
        tokens = f"{batch * run.last / 1e6:,.2f}M" if batch else "-"
        last_val = f"{run.val[1, -1]:.4f}" if run.val.size else "-"
        bests = f"{format_best(run.val, np.argmin):>17} {format_best(run.hella, np.argmax):>18}"
        lines.append(f"{run.name:{width}} {run.last:9,} {tokens:>10} {last_val:>9} {bests}")
    lines += [f"{run.name}: {line}" for run in runs for line in describe(run)]
    for name in sorted({name for run in runs for name in run.settings} - IGNORED_FLAGS):
        values = [run.settings.get(name, "-") for run in runs]
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(values) - {"-"}) > 1:
            lines.append(f"{name} differs: {', '.join(values)}")
    return "\n".join(lines)


def draw(runs, out):
    """Draw the runs into the file `out`, which is replaced atomically."""
    # Notebook shells set MPLBACKEND to a backend that exists only in the notebook's process.
    os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # unlike pyplot, it needs no display
    except ImportError:
        fail("drawing needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(13, 6.2), dpi=130, layout="constrained")
    panels = [draw_hella] if any(run.hella.size for run in runs) else []
    panels += [draw_norm] if any(run.norm.size for run in runs) else []
    grid = [[draw_loss, panel] for panel in panels] or [[draw_loss]]
    axes_of = figure.subplot_mosaic(grid, sharex=True, width_ratios=(1.45, 1)[: len(grid[0])])
    sizes = {(run.settings.get("n_layer", 12), run.settings.get("n_embd", 768)) for run in runs}
    models = [OPENAI_MODELS[size] for size in sorted(sizes & OPENAI_MODELS.keys())]
    for draw_panel, axes in axes_of.items():
        draw_panel(axes, runs, models)
        axes.grid(color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.set_xlabel("step" if draw_panel in grid[-1] else "")
    tmp = f"{out}.{os.getpid()}.tmp"  # a training run may draw the same picture at the same time
    try:
        figure.savefig(tmp, format=Path(out).suffix[1:] or "none")
        os.replace(tmp, out)
    except (OSError, ValueError) as e:  # matplotlib's ValueError lists the supported formats
        with contextlib.suppress(OSError):
            os.remove(tmp)
        fail(f"could not write {out}: {e}")


def plot_noisy(axes, series, color):
    """Plot every value of a stream; a long one faintly, with its running median on top."""
    if (n := series.shape[1]) >= 300:
        axes.plot(*series, color=color, linewidth=0.6, alpha=0.25)
        series = running_median(series, n // 100)
    axes.plot(*series, color=color, linewidth=1, marker="o" if n < 300 else "", markersize=2)


def draw_level(axes, y, name, style="--"):
    """Draw a horizontal line with its name and value in the right margin."""
    axes.axhline(y, color="grey", linewidth=0.9, linestyle=style, zorder=1.5)
    axes.text(1.01, y, f"{name}\n{round(y, 4):g}", color="grey", size=9, va="center",
              transform=axes.get_yaxis_transform())


def draw_loss(axes, runs, models):
    axes.set_title("Loss: validation (bold) and train (thin; faint: every step)", loc="left")
    for i, run in enumerate(runs):
        plot_noisy(axes, run.train, f"C{i}")
        axes.plot(*run.val, "o-", color=f"C{i}", linewidth=2.2, markersize=2, zorder=3,
                  label=run.name[-40:])
    last = max(run.last for run in runs)
    for key in sorted({reference_key(run) for run in runs} & REFERENCE_RUNS.keys()):
        points = {step: loss for step, loss in REFERENCE_RUNS[key].items() if step <= last}
        axes.plot(points.keys(), points.values(), "-" if key[0] == "gpt2" else "--", linewidth=1,
                  color="dimgrey", zorder=4, label=f"published {key[0]} run on {key[1]}")
    levels = {f"GPT-2 {size}": loss for size, loss, *_ in models if loss}
    for name, loss in levels.items():
        draw_level(axes, loss, name)
    losses = np.concatenate([r.train[1] for r in runs] + [r.val[1] for r in runs])
    if losses.size > 1000:  # the first steps and outliers would flatten the rest
        values = [np.percentile(losses, 97), losses.min(), *levels.values()]
        axes.set_ylim(min(values) - 0.05, max(values) + 0.05)
    axes.legend(loc="upper right", frameon=False)


def draw_hella(axes, runs, models):
    axes.set_title("HellaSwag accuracy", loc="left")
    for i, run in enumerate(runs):
        axes.plot(*run.hella, "o-", color=f"C{i}", linewidth=1.6, markersize=2)
    draw_level(axes, 0.25, "chance", ":")
    for size, _, gpt2, gpt3 in models:
        draw_level(axes, gpt2, f"GPT-2 {size}")
        if len(models) == 1:  # with several sizes the labels of GPT-2 and GPT-3 would overlap
            draw_level(axes, gpt3, f"GPT-3 {size}", "-.")


def draw_norm(axes, runs, models):
    axes.set_title("Gradient norm before clipping (triangles: spikes)", loc="left")
    axes.set_yscale("log")
    for i, run in enumerate(runs):
        plot_noisy(axes, run.norm, f"C{i}")
        steps, values = find_spikes(run)
        axes.plot(steps, 1.2 * values, "v", color=f"C{i}", markersize=5)
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5, 7))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[1])
    parser.error = fail
    parser.add_argument("logs", nargs="+", metavar="log", help="log directory or log file of a run")
    parser.add_argument("-o", "--out", metavar="FILE", help="image (default: curves.png next to the log)")
    args = parser.parse_args()
    runs = [read_log(path) for path in args.logs]
    print(format_table(runs))
    first = Path(args.logs[0])
    out = args.out or (first if first.is_dir() else first.parent) / "curves.png"
    draw(runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the default of stderr
    main()
