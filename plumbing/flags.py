"""
Flags stated once: a field of a dataclass holds a flag's type, default, help and range.

Its group is its rule on a resume: MATHEMATICS is kept, "command" is never remembered, the rest may
change.
"""

import argparse
import difflib
import math
import sys
from dataclasses import field, fields

from plumbing.errors import UserError

MATHEMATICS = ("model", "data order", "optimization")


def flag(group, default, text, ge=None, gt=None, le=None, choices=None, shown=None, empty=False,
         common=False):
    """A field of a dataclass of flags.

    group: the heading of --help that it stands under. ge, gt: the least value, inclusive or not;
    le: the largest. shown: the default in words. empty: whether an empty text is a value. common:
    whether most people need it; those come first.
    """
    shown = str(default) if shown is None else shown
    return field(default=default, metadata=dict(group=group, text=text, ge=ge, gt=gt, le=le,
                                                choices=choices, shown=shown, empty=empty,
                                                common=common))


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations that answers a mistake with one line and a likely name."""

    def __init__(self, description, usage="%(prog)s [--flag value ...]"):
        super().__init__(
            description=description,
            usage=usage,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=28, width=100
            ),
        )

    def parse_args(self, args=None):
        """Takes --total-batch-size for --total_batch_size."""
        args = sys.argv[1:] if args is None else args
        return super().parse_args([self.underscored(a) if a[:2] == "--" else a for a in args])

    @staticmethod
    def underscored(argument):
        name, equals, value = argument[2:].partition("=")
        no = "no-" * name.startswith("no-")
        return f"--{no}{name.removeprefix(no).replace('-', '_')}{equals}{value}"

    def error(self, message):
        hint = ""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].partition(" ")[0].partition("=")[0]
            known = difflib.get_close_matches(unknown, self._option_string_actions, 1, 0.7)
            hint = f"; did you mean {known[0]}?" if known else ""
        raise UserError(f"{message}{hint} (--help lists the flags)")


def not_empty(text):
    """The type of a flag that takes a text: an empty one is most often an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_flags(parser, cls, titles, defaults=None, leave_out=()):
    """Add the fields of `cls` as flags.

    titles: {group: its heading}, in the order of --help; "common" is that of the common ones.
    defaults: {name: value} where they are not those of `cls`. leave_out: names that are no flags.
    """
    headings = {group: parser.add_argument_group(title) for group, title in titles.items()}
    for f in fields(cls):
        if f.name in leave_out:
            continue
        meta, kind = f.metadata, f.type
        how = dict(action=argparse.BooleanOptionalAction)
        if kind is list:
            how = dict(type=not_empty, nargs="+", metavar="PATH")
        elif kind is not bool:
            how = dict(type=kind, choices=meta["choices"])
            if kind is str and not meta["empty"]:
                how["type"] = not_empty
            how["metavar"] = None if meta["choices"] else kind.__name__.upper()
        shown = (defaults or {}).get(f.name, meta["shown"])
        text = meta["text"] + (f" (default: {shown})" if shown != "" else "")
        if meta["common"]:
            text += f" [{meta['group']}]"
        heading = headings["common" if meta["common"] else meta["group"]]
        heading.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)


def check_ranges(config):
    """Raise UserError for the first flag that is not among its choices or outside its range."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(meta['choices'])}")
        if value is None or isinstance(value, (str, bool, list)):
            continue
        largest = sys.float_info.max if isinstance(value, float) else meta["le"] or 2**63 - 1
        if value > largest and value != math.inf:
            raise UserError(f"--{f.name} {value}: must be at most {largest}")
        if meta["gt"] is not None and not meta["gt"] < value <= largest:  # nan is neither
            raise UserError(f"--{f.name} {value}: must be a number above {meta['gt']}")
        if meta["ge"] is not None and not meta["ge"] <= value <= largest:
            raise UserError(f"--{f.name} {value}: must be a number of at least {meta['ge']}")


# -----------------------------------------------------------------------------
# Where the values come from


def names_of(cls, *groups):
    """The names of the flags in these groups."""
    return {f.name for f in fields(cls) if f.metadata["group"] in groups}


def settle(cls, presets, preset, given, saved=None, weights=None):
    """All flags as a dict: what was typed beats the checkpoint, which beats the preset.

    presets: {name: flags}, "gpt2" having the defaults; preset: the name of the one to begin with.
    given: what was typed. saved: the checkpoint that a resume goes on with; weights: one that gives
    no more than the shape of its model.
    """
    defaults = {f.name: f.default for f in fields(cls)} | presets["gpt2"]
    cfg = defaults | presets[preset]
    if saved:
        cfg |= {k: v for k, v in saved["flags"].items() if k in defaults}
        cfg |= {k: defaults[k] for k in names_of(cls, "command")}
        cfg |= presets.get(given.get("preset"), {})
        if cfg["prompt"] == "-":  # it was read once
            cfg["prompt"] = defaults["prompt"]
    if weights:
        shape = {k: v for k, v in weights["config"].items() if k in names_of(cls, "model")}
        for k in shape.keys() & given.keys():
            if given[k] != shape[k]:
                raise UserError(f"--{k} {given[k]} contradicts --init {given['init']}, where it is "
                                f"{shape[k]}: leave --{k} out")
        cfg |= shape
        if given.get("eval_only"):  # as in the checkpoint's own run
            flags, wanted = weights.get("flags", {}), ("data", "T", "val_tokens", "hellaswag")
            cfg |= {k: flags.get(k, defaults[k]) for k in wanted}
            if flags.get("dtype") == "float32":  # the others need a device that has them
                cfg["dtype"] = "float32"
    return cfg | given | {"preset": preset}
