"""plot.py: what it reads, the numbers it prints, and that every kind of log becomes a picture."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import plot
from common import UserError

GPT2 = {
    "max_lr": 6e-4,
    "min_lr": 6e-5,
    "warmup_steps": 715,
    "max_steps": 19073,
    "n_layer": 12,
    "n_embd": 768,
    "total_batch_size": 524288,
}
SMALL = {**GPT2, "n_layer": 4, "n_embd": 128, "total_batch_size": 2048}


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
    assert run.name == "log" and run.malformed == 0 and run.flags == GPT2
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
    assert by_file.name == "run" and by_file.flags == GPT2
    os.rename(folder / "log.txt", folder / "old.txt")
    assert plot.read_log(str(folder / "old.txt")).name == "old"


def test_later_line_wins_and_steps_ascend(tmp_path):
    text = "0 train 9\n1 train 8\n2 train 7\n1 train 6\n2 train 5\n"
    run = plot.read_log(write(tmp_path, text))
    assert run.train.tolist() == [[0, 1, 2], [9, 6, 5]]


MALFORMED = ["0 train", "x train 1.0", "0 train one", "0 test 1.0", "0 train 1.0 2.0", "-1 val 3.0"]


@pytest.mark.parametrize("line", [*MALFORMED, "\0\0\0", "1" * 400 + " val 3.0", "2.5 val 3.0"])
def test_malformed_lines_are_counted(tmp_path, line):
    run = plot.read_log(write(tmp_path, f"0 train 9.5\n{line}\n\n1 train 9.25\n"))
    assert run.malformed == 1
    assert run.train.tolist() == [[0, 1], [9.5, 9.25]]


def test_bytes_that_are_not_text_are_one_malformed_line(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"0 train 9.5\r\n\xff\xfe\r\n1 train 9.0\r\n")
    run = plot.read_log(tmp_path)
    assert run.malformed == 1 and run.train.shape == (2, 2)


def test_errors_name_the_thing(tmp_path):
    with pytest.raises(UserError, match="has no log.txt"):
        plot.read_log(tmp_path)
    with pytest.raises(UserError, match="nothing does not exist"):
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


def test_reference_follows_the_size(tmp_path):
    def of(flags):
        return plot.read_log(write(tmp_path, "0 train 1.0\n", flags)).reference

    assert of({}).loss == 3.2924
    assert of(GPT2).size == "124M"
    assert of({**GPT2, "n_layer": 48, "n_embd": 1600}).gpt2 == 0.488946
    assert of(SMALL) is None


# -----------------------------------------------------------------------------
# Numbers


def test_table(tmp_path):
    text = "0 val 10.9\n10 val 3.5\n20 val nan\n30 val 3.75\n0 hella 0.25\n10 hella 0.31\n"
    full = plot.read_log(write(tmp_path / "full", text, GPT2))
    bare = plot.read_log(write(tmp_path / "b", "1234 train 4.0\n"))
    heading, first, second = (line.split() for line in plot.table([full, bare]).splitlines())
    assert heading[:3] == ["run", "steps", "tokens"]
    assert first == ["full", "30", "15.73M", "3.7500", "3.5000", "(10)", "0.3100", "(10)"]
    assert second == ["b", "1,234", "-", "-", "-", "-"]
    assert len({len(line) for line in plot.table([full, bare]).splitlines()}) == 1


def test_table_of_a_full_run(tmp_path):
    run = plot.read_log(write(tmp_path / "log", "19073 val 3.0656\n", GPT2))
    assert "10.00B" in plot.table([run])


def test_learning_rate():
    steps = np.array([0, 249, 714, 715, 5000, 9894, 19072, 19073, 30000])
    golden = [8.3916083916e-07, 2.0979020979e-04, 6e-4, 6e-4, 5.3060375144e-04, 3.3e-4]
    golden += [6.0000003954e-05, 6e-5, 6e-5]
    assert np.allclose(plot.learning_rate(GPT2, steps), golden, rtol=1e-9)
    without = {k: v for k, v in GPT2.items() if k != "min_lr"}
    assert np.allclose(plot.learning_rate(without, steps), golden, rtol=1e-9)
    assert plot.learning_rate({}, steps) is None
    assert plot.learning_rate({**GPT2, "warmup_steps": 0, "max_steps": 0}, steps)[0] == 6e-4


def test_smooth_is_a_mean_of_finite_neighbours():
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, 6.0, 7.0])
    assert plot.smooth(values, 3).tolist() == [1.5, 1.5, 3.0, 4.0, 5.0, 6.5, 6.5]
    assert np.isnan(plot.smooth(np.full(5, np.nan), 3)).all()


def test_spikes():
    rng = np.random.default_rng(0)
    steps = np.arange(5000)
    norms = 0.3 + 10 * np.exp(-steps / 100) + 0.02 * rng.standard_normal(5000)
    assert plot.find_spikes(np.stack([steps, norms]), 500).size == 0
    norms[[100, 2000, 4999]] = 50, 3.5, 4.0  # the first within warm-up
    norms[[3000, 3001]] = np.nan, np.inf
    found = plot.find_spikes(np.stack([steps, norms]), 500)
    assert found.tolist() == [[2000, 4999], [3.5, 4.0]]
    assert plot.find_spikes(np.zeros((2, 0)), 0).shape == (2, 0)
    assert plot.find_spikes(np.stack([steps, np.ones(5000)]), 0).shape == (2, 0)


# -----------------------------------------------------------------------------
# The command


def run_main(capsys, *argv):
    """(exit status, stdout, stderr) of main."""
    status = 0
    try:
        plot.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_import_is_silent_and_light(tmp_path):
    code = "import sys, plot; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(plot.__file__))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "argv, fault",
    [
        (["nothing"], "nothing does not exist"),
        ([], "required: log"),
        (["log", "-o", ""], "must not be empty"),
        (["log", "--ou", "x.png"], "unrecognized arguments: --ou"),
        (["log", "-o", "x.jpg"], "x.jpg is not a picture's name"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, argv, fault):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log", "0 train 1.0\n")
    status, _, err = run_main(capsys, *argv)
    assert status == 2
    assert err.startswith("plot.py: error: ") and fault in err and err.count("\n") == 1


def test_matplotlib_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run_main(capsys, write(tmp_path / "log", "0 val 10.9\n"))
    assert status == 2 and "10.9000" in out
    assert "pip install matplotlib" in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "log") == ["log.txt"]


def test_help_fits_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run_main(capsys, "--help")
    assert status == 0 and "curves.png" in out
    assert max(map(len, out.splitlines())) <= 100


# -----------------------------------------------------------------------------
# The picture


def drawn(runs):
    """The axes of a picture by the first word of their titles, composed without a file."""
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    plot.compose(figure, runs)
    figure.draw_without_rendering()
    return {axes.get_title().split()[0]: axes for axes in figure.axes}


def margin(axes):
    return [text.get_text() for text in axes.texts]


def test_full_log_is_drawn_in_3_seconds(tmp_path, capsys):
    pytest.importorskip("matplotlib.figure")
    text = log_of(19073)
    assert text.count("\n") == 2 * 19073 + 2 * 78
    folder = write(tmp_path / "log", text, GPT2)
    plot.draw([plot.read_log(write(tmp_path / "tiny", "0 val 1.0\n"))], tmp_path / "tiny.png")
    start = time.process_time()
    status, out, err = run_main(capsys, folder)
    seconds = time.process_time() - start
    assert (status, err) == (0, "") and out.count("\n") == 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(folder)) == ["config.json", "curves.png", "log.txt"]
    assert seconds < 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    [
        "0 val 10.95\n",
        "5000 train 3.3\n",
        "7 hella 0.26\n",
        "7 norm 0.0\n",
        "0 train nan\n0 val inf\n0 norm nan\n0 hella nan\n",
        "0 train 1e308\n1 train -5\n0 norm 1e308\n1 hella -inf\n",
        "0 val 3.0\n1 val nan\n2 val 3.0\n0 norm 1\n1 norm inf\n2 norm 1\n",
        log_of(20, every=10),
        log_of(2000, streams=("norm",)),
    ],
)
@pytest.mark.parametrize("flags", [None, GPT2, SMALL])
def test_every_log_has_a_picture(tmp_path, text, flags):
    axes = drawn([plot.read_log(write(tmp_path, text, flags))])
    assert "Loss:" in axes and ("Learning" in axes) == (flags is not None)
    for a in axes.values():
        assert np.isfinite([*a.get_xlim(), *a.get_ylim()]).all()


def test_one_point_is_seen(tmp_path):
    axes = drawn([plot.read_log(write(tmp_path, "5 val 3.5\n"))])["Loss:"]
    (line,) = [line for line in axes.lines if line.get_xydata().tolist() == [[5, 3.5]]]
    assert line.get_marker() == "o"
    assert axes.get_xlim()[0] < 5 < axes.get_xlim()[1]


def test_distant_references_do_not_press_the_curves(tmp_path):
    early = drawn([plot.read_log(write(tmp_path, "0 train 10.9\n9 train 10.1\n", GPT2))])["Loss:"]
    assert early.get_ylim()[0] > 9 and "↓ GPT-2 124M  3.2924" in margin(early)
    late = drawn([plot.read_log(write(tmp_path, "0 train 4.0\n9 train 3.4\n", GPT2))])["Loss:"]
    assert late.get_ylim()[0] < 3.2924 and "GPT-2 124M  3.2924" in margin(late)


def test_track_and_references_are_for_their_size(tmp_path):
    text = log_of(1200)
    for flags, circles in [(GPT2, 4), (None, 4), (SMALL, 0)]:
        (tmp_path / "config.json").unlink(missing_ok=True)
        axes = drawn([plot.read_log(write(tmp_path, text, flags))])
        points = sum(len(c.get_offsets()) for c in axes["Loss:"].collections)
        assert points == circles
        names = " ".join(margin(axes["Loss:"]) + margin(axes["HellaSwag"]))
        assert ("GPT-2 124M" in names and "GPT-3 124M" in names) == (circles > 0)
    large = {**GPT2, "n_layer": 24, "n_embd": 1024}
    names = margin(drawn([plot.read_log(write(tmp_path, text, large))])["HellaSwag"])
    assert any("GPT-2 350M  0.3752" in name for name in names)


def test_spikes_are_named(tmp_path):
    run = plot.read_log(write(tmp_path, log_of(3000, spike_at=1500), GPT2))
    assert "1  step 1,500: 12" in margin(drawn([run])["Gradient"])


def test_several_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib.figure")
    names = ["a/log", "b/log", "we$ird_$name", "_hidden", "long" * 20, "6", "7", "8", "9"]
    folders = [write(tmp_path / name, log_of(30), GPT2) for name in names]
    with open(folders[1] / "log.txt", "a") as f:
        f.write("torn li\n31 tr\n")
    status, out, err = run_main(capsys, *folders, "-o", tmp_path / "all.png")
    assert status == 0 and (tmp_path / "all.png").stat().st_size > 10000
    rows = out.splitlines()[1:-1]
    assert [row.split()[0] for row in rows[:3]] == [str(folders[0]), str(folders[1]), names[2]]
    assert err == f"plot.py: warning: {folders[1]}: skipped malformed lines: 2\n"
    assert not (folders[0] / "curves.png").exists()


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    run = plot.read_log(write(tmp_path, "0 val 3.0\n"))
    plot.draw([run], tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def full_disk(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full_disk)
    with pytest.raises(UserError, match="curves.png cannot be written: No space left"):
        plot.draw([run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "log.txt"]


def test_callers_settings_stay(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.size": 31}):
        before = dict(matplotlib.rcParams)
        plot.draw([plot.read_log(write(tmp_path, log_of(30), GPT2))], tmp_path / "x.svg")
        assert dict(matplotlib.rcParams) == before
