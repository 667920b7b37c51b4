"""plot.py: what it reads, the numbers it prints, and that every kind of log becomes a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot
from conftest import ROOT
from plumbing.errors import UserError, run_main

GPT2 = {"warmup_steps": 715, "n_layer": 12, "n_embd": 768, "total_batch_size": 524288}
SMALL = GPT2 | {"n_layer": 4, "n_embd": 128, "total_batch_size": 2048}


def write(folder, text, flags=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text(text, encoding="utf-8")
    if flags is not None:
        (folder / "config.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")
    return folder


def log_of(steps, every=250, streams=("train", "norm", "val", "hella"), spike_at=None):
    """A log in train_gpt2.py's format with a plausible course."""
    lines = []
    for s in range(steps + 1):
        loss = 3 + 8 / (1 + s / 50)
        if s % every == 0 or s == steps:
            lines += [f"{s} val {loss:.4f}"] if "val" in streams else []
            lines += [f"{s} hella {0.25 + 1e-6 * s:.4f}"] if "hella" in streams else []
        if s < steps:
            lines += [f"{s} train {loss:.6f}"] if "train" in streams else []
            norm = 12.0 if s == spike_at else 0.3 + 0.01 * np.sin(s)
            lines += [f"{s} norm {norm:.4f}"] if "norm" in streams else []
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# Reading


def test_reads_our_log(tmp_path):
    text = "0 val 10.9549\n0 hella 0.2463\n0 train 10.955029\n0 norm 15.3660\n1 train 9.5\n"
    run = plot.read_log(write(tmp_path / "log", text, GPT2))
    assert run.name == str(tmp_path / "log") and run.span == (0, 1) and run.flags == GPT2
    assert run.train.tolist() == [[0, 1], [10.955029, 9.5]]
    assert run.val.tolist() == [[0], [10.9549]]
    assert run.hella.tolist() == [[0], [0.2463]]
    assert run.norm.tolist() == [[0], [15.366]]


def test_reads_the_other_formats(tmp_path):
    ours = plot.read_log(write(tmp_path / "a", "0 val 10.9366\n0 hella 0.2501\n0 train 10.9365\n"))
    text = "0 val_loss: 10.9366\n0 hella_norm: 0.2501\n0 train_loss: 10.9365\n"
    theirs = plot.read_log(write(tmp_path / "b", text))
    for stream in ("train", "val", "hella", "norm"):
        assert np.array_equal(getattr(ours, stream), getattr(theirs, stream))
    assert ours.norm.shape == (2, 0) and ours.flags == {}


def test_a_log_file_is_as_good_as_its_folder(tmp_path):
    folder = write(tmp_path / "run", "0 train 1.5\n", GPT2)
    by_file = plot.read_log(folder / "log.txt")
    assert by_file.train.tolist() == [[0], [1.5]] and by_file.flags == GPT2
    os.rename(folder / "log.txt", folder / "old.txt")
    assert plot.read_log(str(folder / "old.txt")).train.tolist() == [[0], [1.5]]


def test_later_line_wins_and_steps_ascend(tmp_path):
    text = "0 train 9\n1 train 8\n2 train 7\n1 train 6\n2 train 5\n"
    run = plot.read_log(write(tmp_path, text))
    assert run.train.tolist() == [[0, 1, 2], [9, 6, 5]]


NO_NUMBER = ["0 train nan", "0 train -inf", "0 train 1e308", "0 train 1e+100", "0 train 1.2.3"]
MALFORMED = ["0 train", "x train 1.0", "0 train one", "0 test 1.0", "0 train 1.0 2.0", "-1 val 3.0"]
ODD = ["\0\0\0", "1" * 400 + " val 3.0", "0 val " + "1" * 400, "2.5 val 3.0"]


@pytest.mark.parametrize("line", MALFORMED + NO_NUMBER + ODD)
def test_lines_without_step_stream_and_number_are_skipped(tmp_path, capsys, line):
    run = plot.read_log(write(tmp_path, f"0 train 9.5\n{line}\n\n1 train 9.25\n"))
    assert run.train.tolist() == [[0, 1], [9.5, 9.25]] and not run.val.size
    warning = f"warning: {tmp_path}: skipped lines that are not `step stream number`: 1\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("value", ["-1", "0", "3.", "1e-05", "2.5e+10", "12345678"])
def test_whatever_a_value_is_written_like(tmp_path, capsys, value):
    run = plot.read_log(write(tmp_path, f"0 norm {value}\n"))
    assert run.norm.tolist() == [[0], [float(value)]] and capsys.readouterr().err == ""


def test_bytes_that_are_not_text_are_one_line_skipped(tmp_path, capsys):
    (tmp_path / "log.txt").write_bytes(b"0 train 9.5\r\n\xff\xfe\r\n1 train 9.0\r\n")
    assert plot.read_log(tmp_path).train.shape == (2, 2)
    assert capsys.readouterr().err.endswith("number`: 1\n")


def test_errors_name_the_thing(tmp_path):
    with pytest.raises(UserError, match="log.txt cannot be read .No such file"):
        plot.read_log(tmp_path)
    with pytest.raises(UserError, match="nothing cannot be read .No such file"):
        plot.read_log(tmp_path / "nothing")
    with pytest.raises(UserError, match="is it a training log"):
        plot.read_log(write(tmp_path / "empty", ""))
    folder = write(tmp_path / "bad", "0 train 1.0\n")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="config.json cannot be read"):
        plot.read_log(folder)


@pytest.mark.parametrize("config", ["[]", "{}", '{"flags": null}', '{"flags": {"max_lr": null}}'])
def test_a_foreign_config_tells_nothing(tmp_path, config):
    folder = write(tmp_path, "0 train 1.0\n")
    (folder / "config.json").write_text(config, encoding="utf-8")
    assert plot.read_log(folder).flags == {}


# -----------------------------------------------------------------------------
# Numbers


def test_table(tmp_path):
    text = "0 val 10.9\n10 val 3.5\n20 val nan\n30 val 3.75\n0 hella 0.25\n10 hella 0.31\n"
    full = plot.read_log(write(tmp_path / "full", text, GPT2))
    bare = plot.read_log(write(tmp_path / "b", "1234 train 4.0\n"))
    heading, *rows = plot.table([full, bare]).splitlines()
    assert heading.split()[:3] == ["run", "steps", "tokens"]
    first, second = (row.split()[1:] for row in rows)
    assert first == ["30", "15.73M", "3.7500", "3.5000", "(10)", "0.3100", "(10)"]
    assert second == ["1,234", "-", "-", "-", "-"]
    assert len({len(line) for line in (heading, *rows)}) == 1


def test_table_of_a_full_run(tmp_path):
    run = plot.read_log(write(tmp_path / "log", "19073 val 3.0656\n", GPT2))
    assert "19,073  9,999.75M" in plot.table([run])


def test_running_median():
    steps = np.arange(100, 120.0)
    medians = plot.running_median(np.stack([steps, steps % 7]), 5)
    assert medians[0].tolist() == list(range(102, 118))
    assert medians[1].tolist() == [np.median([s % 7 for s in range(m - 2, m + 3)])
                                   for m in range(102, 118)]
    assert plot.running_median(np.stack([steps, steps]), 8)[0].tolist() == [
        103.5, 105.5, 107.5, 109.5, 111.5, 113.5, 115.5]


def with_norms(norms, **flags):
    """A Run of these norms and nothing else."""
    nothing, n = np.zeros((2, 0)), len(norms)
    series = np.stack([np.arange(n), norms])
    return plot.Run("x", (0, n - 1), {"warmup_steps": 500} | flags, nothing, nothing, nothing,
                    series)


def test_spikes():
    rng = np.random.default_rng(0)
    norms = 0.3 + 10 * np.exp(-np.arange(5000) / 100) + 0.02 * rng.standard_normal(5000)
    assert plot.find_spikes(with_norms(norms)).size == 0
    norms[[100, 2000, 4999]] = 50, 3.5, 4.0  # the first within warm-up
    assert plot.find_spikes(with_norms(norms)).tolist() == [[2000, 4999], [3.5, 4.0]]
    assert plot.find_spikes(with_norms(norms, warmup_steps=50)).shape == (2, 3)
    assert plot.find_spikes(with_norms(np.ones(5000))).shape == (2, 0)
    assert plot.find_spikes(with_norms(np.ones(500))).shape == (2, 0)


def test_the_six_highest_spikes_are_named_one_of_each_burst():
    norms = np.full(10000, 0.3)
    norms[1000:10000:1000] = np.arange(9, 0, -1)  # 1000: 9, 2000: 8, ...
    norms[[1001, 1010, 2990]] = 8.5, 8.4, 7.5  # two more of the first burst, the best of the third
    named = [[1000, 2000, 2990, 4000, 5000, 6000], [9, 8, 7.5, 6, 5, 4]]
    assert plot.find_spikes(with_norms(norms)).tolist() == named
    *_, line = plot.table([with_norms(norms)]).splitlines()
    assert line == ("x: spikes of the gradient norm at step 1,000: 9, step 2,000: 8, "
                    "step 2,990: 7.5, step 4,000: 6, step 5,000: 5, step 6,000: 4")


# -----------------------------------------------------------------------------
# The command


def typed(capsys, *argv):
    """(exit status, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as end:
        run_main("plot.py", lambda: plot.plot([str(a) for a in argv]))
    return end.value.code, *capsys.readouterr()


def test_import_is_silent_and_light(tmp_path):
    code = "import sys, plot; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "argv, fault",
    [
        (["nothing"], "nothing cannot be read"),
        ([], "required: log"),
        (["log", "-o", ""], "must not be empty"),
        (["log", "--ou", "x.png"], "unrecognized arguments: --ou"),
        (["log", "-o", "x.doc"], "x.doc cannot be written: Format 'doc' is not supported"),
        (["log", "-o", "x"], "x cannot be written: Format"),
        (["log", "-o", "no/folder.png"], "no/folder.png cannot be written"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, argv, fault):
    if fault.startswith("x"):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log", "0 train 1.0\n")
    status, _, err = typed(capsys, *argv)
    assert status == 2
    assert err.startswith("plot.py: error: ") and fault in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["log"] and os.listdir(tmp_path / "log") == ["log.txt"]


def test_matplotlib_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = typed(capsys, write(tmp_path / "log", "0 val 10.9\n"))
    assert status == 2 and "10.9000" in out
    assert "pip install matplotlib" in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "log") == ["log.txt"]


def test_help_fits_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = typed(capsys, "--help")
    assert status == 0 and "curves.png" in out
    assert max(map(len, out.splitlines())) <= 100


# -----------------------------------------------------------------------------
# The picture


def drawn(runs):
    """The axes of a picture by the first word of their titles, composed without a file."""
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(plot.SETTINGS):
        figure = Figure(figsize=(13, 6.2), dpi=130, layout="constrained")  # as draw() has it
        plot.compose(figure, runs)
        figure.draw_without_rendering()
    return {axes.get_title(loc="left").split()[0]: axes for axes in figure.axes}


def margin(axes):
    return [text.get_text() for text in axes.texts]


def test_a_full_log_is_drawn_and_told(tmp_path, capsys):
    pytest.importorskip("matplotlib.figure")
    text = log_of(19073, spike_at=12000)
    assert text.count("\n") == 2 * 19073 + 2 * 78
    folder = write(tmp_path / "log", text, GPT2)
    status, out, err = typed(capsys, folder)
    assert (status, err) == (0, "") and out.splitlines()[2:] == [
        f"{folder}: spikes of the gradient norm at step 12,000: 12",
        f"wrote {folder / 'curves.png'}"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(folder)) == ["config.json", "curves.png", "log.txt"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    [
        "0 val 10.95\n",
        "5000 train 3.3\n",
        "7 hella 0.26\n",
        "7 norm 0.5\n",
        "0 train 1e99\n1 train -5\n0 norm 1e99\n1 norm 0\n1 hella -1e99\n",
        "0 val 3.0\n1 val nan\n2 val 3.0\n0 norm 1\n1 norm inf\n2 norm 1\n",
        log_of(20, every=10),
        log_of(2000, streams=("norm",)),
    ],
)
@pytest.mark.parametrize("flags", [None, GPT2, SMALL])
def test_every_log_has_a_picture(tmp_path, text, flags):
    axes = drawn([plot.read_log(write(tmp_path, text, flags))])
    streams = {line.split()[1] for line in text.splitlines()}
    panels = {"Loss:": True, "HellaSwag": "hella" in streams, "Gradient": "norm" in streams}
    assert set(axes) == {name for name, there in panels.items() if there}
    for a in axes.values():
        assert np.isfinite([*a.get_xlim(), *a.get_ylim()]).all()


def test_one_point_is_seen(tmp_path):
    axes = drawn([plot.read_log(write(tmp_path, "5 val 3.5\n"))])["Loss:"]
    (line,) = [line for line in axes.lines if line.get_xydata().tolist() == [[5, 3.5]]]
    assert line.get_marker() == "o"
    assert axes.get_xlim()[0] < 5 < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < 3.5 < axes.get_ylim()[1]


def test_the_first_steps_of_a_long_run_do_not_press_the_others(tmp_path):
    def top(text):
        return drawn([plot.read_log(write(tmp_path, text, GPT2))])["Loss:"].get_ylim()[1]

    assert top(log_of(200)) > 10.9
    assert top(log_of(19073)) < 4.0
    assert top(log_of(19073) + "9000 train 50\n") < 4.0  # nor does one batch that is off


def test_references_are_for_their_size(tmp_path):
    def names(flags):
        folder = write(tmp_path / str(flags and flags["n_layer"]), log_of(1200), flags)
        axes = drawn([plot.read_log(folder)])
        return margin(axes["Loss:"]), margin(axes["HellaSwag"])

    of_124m = ["chance\n0.25", "GPT-2 124M\n0.2945", "GPT-3 124M\n0.337"]
    assert names(GPT2) == names(None) == (["GPT-2 124M\n3.2924"], of_124m)
    assert names(SMALL) == ([], ["chance\n0.25"])
    large = GPT2 | {"n_layer": 24, "n_embd": 1024}
    assert names(large) == ([], ["chance\n0.25", "GPT-2 350M\n0.3752", "GPT-3 350M\n0.436"])


def test_reference_lines_are_in_sight_and_no_two_names_overlap(tmp_path):
    sizes = [dict(zip(("n_layer", "n_embd"), size, strict=True)) for size in plot.REFERENCES]
    runs = [plot.read_log(write(tmp_path / str(i), "0 train 10.9\n9 train 10.1\n9 hella 0.26\n", f))
            for i, f in enumerate(sizes)]
    for some in ([runs[0]], [runs[3]], runs):
        axes = drawn(some)
        for panel in (axes["Loss:"], axes["HellaSwag"]):
            boxes = sorted((t.get_window_extent() for t in panel.texts), key=lambda box: box.y0)
            assert all(a.y1 <= b.y0 for a, b in zip(boxes, boxes[1:], strict=False))
            low, high = panel.get_ylim()
            assert all(low < t.get_position()[1] < high for t in panel.texts)
    assert axes["Loss:"].texts


def test_spikes_are_marked(tmp_path):
    run = plot.read_log(write(tmp_path, log_of(3000, spike_at=1500), GPT2))
    marks = [line for line in drawn([run])["Gradient"].lines if line.get_marker() == "v"]
    assert [line.get_xdata().tolist() for line in marks] == [[1500]]
    assert marks[0].get_ydata()[0] > 12


@pytest.mark.filterwarnings("error")
def test_several_runs(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib.figure")
    monkeypatch.chdir(tmp_path)
    names = ["a/log", "b/log", "we$ird_$name", "_hidden", "long" * 20, "6", "7", "8", "9"]
    folders = [write(Path(name), log_of(30), GPT2) for name in names]
    with open(folders[1] / "log.txt", "a") as f:
        f.write("torn li\n31 tr\n")
    status, out, err = typed(capsys, *folders, "-o", tmp_path / "all.png")
    assert status == 0 and (tmp_path / "all.png").stat().st_size > 10000
    assert [row.split()[0] for row in out.splitlines()[1:-1]] == names
    assert err == "warning: b/log: skipped lines that are not `step stream number`: 2\n"
    assert not (folders[0] / "curves.png").exists()
    legend = drawn([plot.read_log(f) for f in folders])["Loss:"].get_legend()
    shown = [text.get_text().strip().replace("\\$", "$") for text in legend.texts]
    assert shown == [name[-40:] for name in names]


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib.figure")
    run = plot.read_log(write(tmp_path, "0 val 3.0\n"))
    plot.draw([run], tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="curves.png cannot be written: .*No space left"):
        plot.draw([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "log.txt"]


def test_callers_settings_stay(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"axes.titlepad": 31}):
        before = dict(matplotlib.rcParams)
        plot.draw([plot.read_log(write(tmp_path, log_of(30), GPT2))], tmp_path / "x.svg")
        assert dict(matplotlib.rcParams) == before
