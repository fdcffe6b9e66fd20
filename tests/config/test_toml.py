"""Values, keys and overrides: what is accepted becomes the declared type, all else is one clear line."""

from typing import Literal

import pytest

from jaxpipe.config import toml
from jaxpipe.errors import ConfigError

Mode = Literal["full", "none"]

SCHEMA = {
    "train": {"steps": int, "rate": float, "out": str, "overwrite": bool, "limit": int | None},
    "data": {"files": tuple[str, ...], "source": Literal["text", "tokens"]},
    "pipe": {"stages": tuple[int, ...] | str, "remat": Mode | tuple[Mode, ...]},
}


def test_every_type_survives_a_round_trip(tmp_path):
    tables = {
        "train": {"steps": 3, "rate": 0.5, "out": "runs/ä", "overwrite": True},
        "data": {"files": ("a", "b"), "source": "text"},
        "pipe": {"stages": (3, 1), "remat": ("none", "full")},
    }
    path = tmp_path / "config.toml"
    path.write_text(toml.write(tables), encoding="utf-8")
    assert toml.check(toml.read(path), SCHEMA) == tables


def test_none_is_left_out_of_the_file():
    assert toml.write({"train": {"limit": None, "steps": 1}}) == "[train]\nsteps = 1\n"


@pytest.mark.parametrize(
    ("pair", "section", "value"),
    [
        ("train.steps=1_000", "train", 1000),
        ("train.rate=2", "train", 2.0),
        ("train.rate=1e-3", "train", 1e-3),
        ("train.out=runs/a b", "train", "runs/a b"),
        ("train.out=123", "train", "123"),
        ("train.out= a ", "train", " a "),
        ("train.rate= 2 ", "train", 2.0),
        ("train.out='quoted'", "train", "quoted"),
        ("train.overwrite=true", "train", True),
        ("train.limit=4", "train", 4),
        ('data.files=["a,b", "c"]', "data", ("a,b", "c")),
        ("data.files=a.txt,b.txt", "data", ("a.txt", "b.txt")),
        ("data.files=", "data", ()),
        ("data.source=tokens", "data", "tokens"),
        ("pipe.stages=[3, 1]", "pipe", (3, 1)),
        ("pipe.stages=3,1", "pipe", (3, 1)),
        ("pipe.stages=Et,t|L", "pipe", "Et,t|L"),
        ('pipe.stages="Et*3|(tt|)*2tL"', "pipe", "Et*3|(tt|)*2tL"),
        ("pipe.stages=", "pipe", ""),
        ("pipe.remat=none", "pipe", "none"),
        ("pipe.remat=none,full", "pipe", ("none", "full")),
        ('pipe.remat=["none", "full"]', "pipe", ("none", "full")),
    ],
)
def test_override_takes_the_type_of_its_key(pair, section, value):
    tables = toml.override({}, [pair], SCHEMA)
    (got,) = tables[section].values()
    assert got == value
    assert type(got) is type(value)


def test_later_override_wins_and_the_input_stays():
    before = {"train": {"steps": 1}}
    assert toml.override(before, ["train.steps=2", "train.steps=3"], SCHEMA)["train"]["steps"] == 3
    assert before == {"train": {"steps": 1}}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train.steps", "'train.steps' must have the form section.key=value"),
        ("train.stepz=1", "unknown key train.stepz; did you mean train.steps?"),
        ("steps=1", "unknown key steps; did you mean train.steps?"),
        ("data.steps=1", "unknown key data.steps; did you mean train.steps?"),
        ("train.qqq=1", r"unknown key train.qqq; \[train\] has steps, rate"),
        ("qqq.qqq=1", "unknown key qqq.qqq; sections are train, data"),
        ("train.steps=1.5", "train.steps=1.5 must be a whole number; got a number"),
        ("train.steps=1e3", "train.steps=1000.0 must be a whole number; try 1000"),
        ("train.steps=many", "train.steps='many' must be a whole number; got a string"),
        ("train.steps=true", "train.steps=True must be a whole number; got true or false"),
        ("train.overwrite=1", "train.overwrite=1 must be true or false; got a whole number"),
        ("train.rate=nan", "train.rate=nan must be finite"),
        ("train.limit=x", "train.limit='x' must be a whole number"),
        ("data.source=txt", "data.source='txt' must be one of 'text', 'tokens'; try 'text'"),
        ("pipe.stages=3", r"pipe.stages=3 must be a string or a list; try \[3\]"),
        ("pipe.stages=[3, 1.5]", "pipe.stages=1.5 must be a whole number; got a number"),
        ("pipe.remat=3", "pipe.remat=3 must be one of 'full', 'none'; try"),
        ("pipe.remat=none,ful", "pipe.remat='none,ful' must be one of 'full', 'none'; try 'none'"),
        ('pipe.remat=["ful"]', "pipe.remat='ful' must be one of 'full', 'none'; try 'full'"),
    ],
)
def test_wrong_override_names_key_value_and_what_would_do(pair, message):
    with pytest.raises(ConfigError, match=message):
        toml.override({}, [pair], SCHEMA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 1", "unknown key train.step; did you mean train.steps?"),
        ("[trian]\nsteps = 1", r"unknown section \[trian\]; did you mean \[train\]\?"),
        ("[qqq]", r"unknown section \[qqq\]; sections are train, data"),
        ("[train]\nsteps = '1'", "train.steps='1' must be a whole number; got a string"),
        ("[data]\nfiles = 'a.txt'", r"data.files='a.txt' must be a list; try \['a.txt'\]"),
        ("[data]\nfiles = [1]", "data.files=1 must be a string; got a whole number"),
        ("[train]\nsteps = 1979-05-27", "must be a whole number; got date"),
        ("steps = 1", r"steps must stand in a section; try \[train\] above it"),
        ("[train", "is not TOML"),
    ],
)
def test_wrong_file_names_key_value_and_what_would_do(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        toml.check(toml.read(path), SCHEMA)


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.toml").touch()
    with pytest.raises(ConfigError, match=r"quikstart\.toml does not exist; did you mean .*quickstart\.toml\?"):
        toml.read(tmp_path / "quikstart.toml")
    with pytest.raises(ConfigError, match=r"does not exist$"):
        toml.read(tmp_path / "nowhere" / "x.toml")


def test_folder_or_binary_is_no_config(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            toml.read(path)
