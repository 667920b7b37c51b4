"""plot.py: log parsing, the table, the reference runs, the picture and the command."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import plot
from conftest import ROOT, SHARED

CURVES = SHARED / "golden" / "reference_curves.json"
GPT2 = plot.CONFIG_124M | {"warmup_steps": 715, "max_lr": 6e-4, "log_dir": "log"}
SMALL = GPT2 | {"n_layer": 4, "n_embd": 128, "total_batch_size": 2048}
EDU, FINEWEB = "edufineweb_train_000001.npy", "fineweb_train_000001.bin"


def write(directory, text, flags=None, **config):
    """Write log.txt, and with flags a config.json, into a new directory. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.txt").write_text(text, encoding="utf-8")
    if flags is not None:
        config = {"flags": flags, "model": {"n_layer": flags["n_layer"]}} | config
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def read(*args, **config):
    return plot.read_log(write(*args, **config))


def log_of(steps, every=250, streams=("train", "norm", "val", "hella"), spike_at=None):
    """Return a log in train_gpt2.py's format with plausible values."""
    lines = ""
    for s in range(steps + 1):
        loss, norm = 3 + 8 / (1 + s / 50), 12.0 if s == spike_at else 0.3 + 0.01 * np.sin(s)
        values = dict(train=loss, norm=norm, val=loss, hella=0.25 + 1e-6 * s)
        due = [n for n in streams if n in ("train", "norm") or s % every == 0 or s == steps]
        lines += "".join(f"{s} {name} {values[name]:.6f}\n" for name in due)
    return lines


def test_read_log(tmp_path):
    text = "0 val 10.9549\n0 hella 0.2463\n0 train 10.955029\n0 norm 15.3660\n1 train 9.5\n"
    run = read(tmp_path / "log", text, GPT2, first_shard=EDU)
    assert run.name == str(tmp_path / "log") and run.last == 1
    assert run.settings == GPT2 | dict(arch="gpt2", tokenizer=None, dataset="FineWeb-Edu")
    assert run.train.tolist() == [[0, 1], [10.955029, 9.5]]
    assert [run.val.tolist(), run.hella.tolist(), run.norm.tolist()] == [
        [[0], [10.9549]], [[0], [0.2463]], [[0], [15.366]]]
    assert plot.read_log(str(tmp_path / "log" / "log.txt")).train.tolist() == run.train.tolist()


def test_lines_of_another_form_are_skipped(tmp_path):
    skipped = ["0 train", "x train 1.0", "0 train one", "0 test 1.0", "0 train 1.0 2.0", "-1 val 3.0", "",
               "0 train nan", "0 train -inf", "0 train 1e308", "0 train 1e+100", "0 train 1.2.3", "\0\0\0",
               "1" * 400 + " val 3.0", "0 val " + "1" * 400, "2.5 val 3.0", "\xff\xfe"]
    lines = ["0 val -1", *skipped, "2 val 3.", "1 val 9", "1 val 2.5e+10"]  # the last value of step 1 wins
    (tmp_path / "log.txt").write_bytes("\r\n".join(lines).encode("latin-1"))
    run = plot.read_log(tmp_path)
    assert run.val.tolist() == [[0, 1, 2], [-1, 2.5e10, 3]] and not run.train.size


@pytest.mark.parametrize("config, dataset", [
    (dict(first_shard="finewebedu_train_000001.bin"), "FineWeb-Edu"),
    (dict(first_shard="edu_fineweb_train_000001.bin"), "FineWeb-Edu"),
    (dict(first_shard=FINEWEB), "FineWeb"),
    (dict(first_shard="input.txt", data="1 file"), None),
    (dict(first_shard=None), None),
    (dict(data={"kind": "shards", "shards": [[EDU, 100000000]]}), "FineWeb-Edu"),
    (dict(data={"kind": "text", "shards": []}), None)])
def test_dataset_is_recognized_by_the_first_shard(tmp_path, config, dataset):
    run = read(tmp_path, "0 val 10.9\n", GPT2, **config)
    assert run.settings["dataset"] == dataset
    for other in ("[]", "{}", "{", '{"flags": null}', '{"flags": []}'):  # of another program
        (tmp_path / "config.json").write_text(other, encoding="utf-8")
        assert plot.read_log(tmp_path).settings == {}


def test_table(tmp_path):
    text = "0 val 10.9\n10 val 3.5\n20 val nan\n30 val 3.75\n0 hella 0.25\n10 hella 0.31\n"
    runs = [read(tmp_path / "a", text, GPT2), read(tmp_path / "b", "1234 train 4.0\n")]
    heading, *rows = plot.format_table(runs).splitlines()
    assert heading.split()[:3] == ["run", "steps", "tokens"]
    assert [row.split()[1:] for row in rows] == [
        ["30", "15.73M", "3.7500", "3.5000", "(10)", "0.3100", "(10)"], ["1,234", "-", "-", "-", "-"]]
    assert len({len(line) for line in (heading, *rows)}) == 1
    run = read(tmp_path / "log", "19073 val 3.0656\n", GPT2)
    assert "19,073  9,999.75M" in plot.format_table([run])


def with_norms(norms, **settings):
    """Return a Run that has only these gradient norms."""
    empty, series = np.zeros((2, 0)), np.stack([np.arange(len(norms)), norms])
    return plot.Run("x", len(norms) - 1, {"warmup_steps": 500} | settings, empty, empty, empty, series)


def test_spikes():
    norms = 0.3 + 10 * np.exp(-np.arange(5000) / 100) + 0.05 * np.sin(np.arange(5000))
    assert plot.find_spikes(with_norms(norms)).size == 0
    norms[[100, 2000, 4999]] = 50, 3.5, 4.0  # the first is within the warm-up
    assert plot.find_spikes(with_norms(norms)).tolist() == [[2000, 4999], [3.5, 4.0]]
    assert plot.find_spikes(with_norms(norms, warmup_steps=50)).shape == (2, 3)
    assert plot.find_spikes(with_norms(np.ones(500))).shape == (2, 0)
    norms = np.full(10000, 0.3)
    norms[1000:10000:1000] = np.arange(9, 0, -1)  # 1000: 9, 2000: 8, ...
    norms[[1001, 1010, 2990]] = 8.5, 8.4, 7.5  # two in the first burst, the highest in the third
    assert plot.format_table([with_norms(norms)]).splitlines()[-1] == (
        "x: gradient norm spikes at step 1,000: 9, step 2,000: 8, step 2,990: 7.5, "
        "step 4,000: 6, step 5,000: 5, step 6,000: 4")


def test_bytes_tokenizer_is_named_and_differing_settings_are_listed(tmp_path):
    other = GPT2 | {"max_lr": 1.5e-3 / 10, "log_dir": "log.1", "device": "cpu", "resume": True}
    runs = [read(tmp_path / "a", "0 val 5\n", GPT2, tokenizer="gpt2"),
            read(tmp_path / "b", "0 val 3\n", other, tokenizer="bytes"),
            read(tmp_path / "c", "0 val 3\n")]
    _, first, second, _, *differs = plot.format_table(runs).splitlines()
    assert "byte t" not in first and second.startswith(f"{tmp_path / 'b'} (byte tokens)  ")
    assert differs == ["max_lr differs: 0.0006, 0.00015, -", "tokenizer differs: gpt2, bytes, -"]
    assert "differs" not in plot.format_table([runs[0], runs[0], runs[2]])


@pytest.mark.skipif(not CURVES.exists(), reason="the published curves are missing")
def test_interpolated_reference_is_within_a_hundredth_of_the_published_curve():
    published = json.loads(CURVES.read_text())
    for key, name in ((("gpt2", "FineWeb-Edu"), "faithful"), (("modern", "FineWeb"), "modern")):
        steps, losses = zip(*plot.REFERENCE_RUNS[key].items(), strict=True)
        for step, loss, *_ in published[name]["val"]:
            assert abs(np.interp(step, steps, losses) - loss) < 0.01, (name, step)
        assert len(steps) <= 25 and published[name]["val"][-1][1] == losses[-1]


LATE = "2000 val 3.67\n"


@pytest.mark.parametrize("text, config, line", [
    ("0 val 10.95\n" + LATE, {}, "last val 3.6700, reference 3.6663 (step 2,000)"),
    ("2125 val 3.6\n", {}, "last val 3.6000, reference 3.6398 (step 2,125)"),
    ("0 val 10.95\n", {}, "last val 10.9500, reference 10.9366 (step 0)"),
    ("19073 val 3.07\n", {}, "last val 3.0700, reference 3.0656 (step 19,073)"),
    ("100 val 7.5\n", {}, None),  # the curve is too steep there
    ("20000 val 3.05\n", {}, None),
    ("2000 train 3.67\n", {}, None),
    (LATE, dict(arch="modern", first_shard=FINEWEB), "last val 3.6700, reference 3.4556 (step 2,000)"),
    (LATE, dict(arch="modern"), "no reference: plot.py has no published modern run on FineWeb-Edu"),
    (LATE, dict(first_shard=FINEWEB), "no reference: plot.py has no published gpt2 run on FineWeb"),
    (LATE, dict(first_shard="input.txt"), None),
    (LATE, dict(flags=GPT2 | {"T": 512}), None),
    (LATE, dict(flags=GPT2 | {"total_batch_size": 491520}), None),
    (LATE, dict(flags=GPT2 | {"n_layer": 6}), None)])
def test_reference_at_the_last_validation_of_the_same_configuration(tmp_path, text, config, line):
    run = read(tmp_path, text, **dict(flags=GPT2, first_shard=EDU) | config)
    lines = plot.format_table([run]).splitlines()[2:]
    assert lines == ([f"{run.name}: {line}"] if line else [])


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(runs) -> {first word of the title: axes} of the drawn picture."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, *args, **kw: drawn.append(self) or savefig(self, *args, **kw))

    def draw(runs):
        plot.draw(runs, tmp_path / "picture.png")
        return {axes.get_title(loc="left").split()[0]: axes for axes in drawn[-1].axes}

    return draw


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flags", [None, GPT2, SMALL])
@pytest.mark.parametrize("text", [
    "0 val 10.95\n", "5000 train 3.3\n", "7 hella 0.26\n", "7 norm 0.5\n",
    "0 train 1e99\n1 train -5\n0 norm 1e99\n1 norm 0\n1 hella -1e99\n",
    "0 val 3.0\n1 val nan\n2 val 3.0\n0 norm 1\n1 norm inf\n2 norm 1\n",
    log_of(20, every=10), log_of(2000, streams=("norm",))])
def test_every_log_has_a_picture(tmp_path, draw, text, flags):
    axes = draw([read(tmp_path, text, flags, first_shard=EDU)])
    panels = {"train": "Loss:", "val": "Loss:", "hella": "HellaSwag", "norm": "Gradient"}
    assert set(axes) == {"Loss:"} | {panels[line.split()[1]] for line in text.splitlines()}
    for a in axes.values():
        assert np.isfinite([*a.get_xlim(), *a.get_ylim()]).all()


def test_reference_curve_and_spikes_are_drawn(tmp_path, draw):
    text = log_of(3000, spike_at=1500)
    run = read(tmp_path / "b", text, GPT2, first_shard=EDU, tokenizer="bytes")
    axes = draw([run, run])
    labels = [t.get_text() for t in axes["Loss:"].get_legend().texts]
    assert labels == [run.name[-40:]] * 2 + ["published gpt2 run on FineWeb-Edu"]
    assert labels[0].endswith("b (byte tokens)")
    curve = [line for line in axes["Loss:"].lines if line.get_label() == labels[-1]][0]
    assert list(curve.get_xdata()) == [s for s in plot.REFERENCE_RUNS["gpt2", "FineWeb-Edu"] if s <= 3000]
    marks = [line for line in axes["Gradient"].lines if line.get_marker() == "v"]
    assert marks[0].get_xdata().tolist() == [1500] and marks[0].get_ydata()[0] > 12
    for config in (dict(first_shard=FINEWEB), dict(first_shard=EDU, arch="modern"), {}):
        axes = draw([read(tmp_path, text, GPT2, **config)])
        assert len(axes["Loss:"].get_legend().texts) == 1


def test_failed_drawing_is_one_line_and_keeps_the_old_picture(tmp_path, draw, monkeypatch, capsys):
    run, picture = read(tmp_path, "0 val 3.0\n"), tmp_path / "picture.png"
    draw([run])
    before = picture.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(SystemExit):
        draw([run])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        draw([run])
    assert capsys.readouterr().err.splitlines() == [
        f"plot.py: error: could not write {picture}: [Errno 28] disk full",
        "plot.py: error: drawing needs matplotlib: pip install matplotlib"]
    assert picture.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["log.txt", "picture.png"]


def run_command(tmp_path, *args, **env):
    shutil.copy(ROOT / "plot.py", tmp_path)
    return subprocess.run([sys.executable, "plot.py", *args], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | env)


def test_copied_alone_and_in_a_notebook_shell(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "log", log_of(19073, spike_at=12000), GPT2)
    write(tmp_path / "other", log_of(30), GPT2)
    done = run_command(tmp_path, "log", "other", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("log: gradient norm spikes at step 12,000: 12\nwrote log/curves.png\n")
    assert (tmp_path / "log" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path / "log")) == ["config.json", "curves.png", "log.txt"]
    assert sorted(os.listdir(tmp_path)) == ["log", "other", "plot.py"]


@pytest.mark.parametrize("args, message", [
    (["nothing"], "could not read nothing (No such file"),
    (["log", "empty"], "log.txt is not a training log"),
    (["log", "--ou", "x.png"], "unrecognized arguments: --ou"),
    (["log", "-o", "x.doc"], "could not write x.doc: Format 'doc' is not supported")])
def test_mistake_is_one_line(tmp_path, args, message):
    pytest.importorskip("matplotlib")
    write(tmp_path / "log", "0 train 1.0\n")
    write(tmp_path / "empty", "")
    done = run_command(tmp_path, *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("plot.py: error: ") and message in done.stderr
    assert os.listdir(tmp_path / "log") == ["log.txt"]
