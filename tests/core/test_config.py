from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshi_fl.config import (
    SETTINGS,
    config_path,
    ensure_home,
    home,
    load_settings,
    set_value,
    unset_value,
)
from moshi_fl.errors import ConfigError, Exit


def write(text: str) -> Path:
    ensure_home()
    config_path().write_text(text, encoding="utf-8")
    return config_path()


def test_each_source_wins_over_the_next(monkeypatch):
    policy = {"precision": "bf16"}
    assert load_settings().precision == "fp32"
    settings = load_settings().with_policy(**policy)
    assert (settings.precision, settings.origin("precision")) == ("bf16", "hub")
    write('# mine\nprecision = "fp32"\n')
    settings = load_settings().with_policy(**policy)
    assert (settings.precision, settings.origin("precision")) == ("fp32", "config.toml, line 2")
    monkeypatch.setenv("MOSHI_FL_PRECISION", "bf16")
    settings = load_settings()
    assert (settings.precision, settings.origin("precision")) == ("bf16", "MOSHI_FL_PRECISION")
    settings = load_settings(precision="fp32")
    assert (settings.precision, settings.origin("precision")) == ("fp32", "--precision")


def test_what_was_not_given_on_the_command_line_overrides_nothing():
    write('device = "cpu"\ndata = ["/code"]\n')
    settings = load_settings(device=None, data=())
    assert settings.device == "cpu"
    assert settings.data == ("/code",)
    assert settings.origin("threads") == "default"


def test_variables_are_text_and_are_read_as_values(monkeypatch):
    monkeypatch.setenv("MOSHI_FL_THREADS", "4")
    monkeypatch.setenv("MOSHI_FL_DATA", f"/a{os.pathsep}/b")
    settings = load_settings()
    assert settings.threads == 4
    assert settings.data == ("/a", "/b")


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        (
            "\nthread = 2\n",
            "config.toml, line 2: unknown setting 'thread'",
            "Did you mean threads?",
        ),
        ("zzz = 2\n", "config.toml, line 1: unknown setting 'zzz'", "Settings: hub, contributor"),
        ("threads = -1\n", "config.toml, line 1: threads must be a whole number from 0", ""),
        ("threads = true\n", "config.toml, line 1: threads must be a whole number", ""),
        ("threads = 2.0\n", "config.toml, line 1: threads must be a whole number", ""),
        ('device = "gpu"\n', "config.toml, line 1: device must be auto, cpu", ""),
        ("device = 1\n", "device must be auto", ""),
        ('precision = "fp16"\n', "precision must be fp32, bf16 or auto", ""),
        ("precision = [1]\n", "precision must be fp32, bf16 or auto", ""),
        ("data = [1]\n", "data must be paths", ""),
        ("data = {}\n", "data must be paths", ""),
        ('hub = "a\\nb"\n', "hub must be one printable line", ""),
        ('contributor = " "\n', "contributor must have 1 to 200 characters", ""),
        ("[threads]\nx = 1\n", "config.toml, line 1: threads must be a whole number", ""),
        ("hub = \n", "line 1", ""),
        ("x = " + "[" * 5000, "config.toml", ""),
    ],
)
def test_an_unusable_file_names_the_key_and_the_line(text, complaint, hint):
    write(text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert complaint in str(caught.value)
    assert hint in caught.value.hint


def test_a_file_that_is_not_text_or_too_long_is_refused():
    write("").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings()
    write("#" * (1 << 19))
    with pytest.raises(ConfigError, match="longer than"):
        load_settings()


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("MOSHI_FL_THREADS", "two")
    with pytest.raises(ConfigError, match="MOSHI_FL_THREADS: threads must be a whole number"):
        load_settings()


def test_setting_a_value_keeps_comments_and_order():
    write('# where\nhub = "old"  # the old one\n\n# how\nthreads = 1\n')
    set_value("hub", ["https://example.org/hub.git"])
    set_value("device", ["cpu"])
    assert config_path().read_text() == (
        '# where\nhub = "https://example.org/hub.git"\n\n# how\nthreads = 1\ndevice = "cpu"\n'
    )
    assert unset_value("threads")
    assert not unset_value("threads")
    assert "# how" in config_path().read_text()
    assert load_settings().threads == 0


def test_a_value_over_several_lines_is_replaced_whole():
    write('data = [\n  "/a", # one\n  "/b",\n]\nthreads = 2\n')
    set_value("data", ["/c", "relative"])
    assert tomllib.loads(config_path().read_text()) == {
        "data": ["/c", str(Path.cwd() / "relative")],
        "threads": 2,
    }


def test_a_key_inside_a_string_is_not_taken_for_the_setting():
    write('hub = """a\nthreads = 9"""\n')
    with pytest.raises(ConfigError, match="printable"):
        load_settings()
    write("# threads = 3\ndevice = 'cpu'\n")
    set_value("threads", ["2"])
    assert config_path().read_text() == "# threads = 3\ndevice = 'cpu'\nthreads = 2\n"


def test_an_edit_that_would_change_something_else_is_not_made():
    path = write('data = ["""\nthreads = 9\n"""]\n')
    with pytest.raises(ConfigError, match="unusual way"):
        set_value("threads", ["1"])
    assert "threads = 9" in path.read_text()


def test_a_misspelt_key_can_be_removed():
    write("thread = 1\nthreads = 2\n")
    assert unset_value("thread")
    assert config_path().read_text() == "threads = 2\n"
    with pytest.raises(ConfigError, match="unknown setting 'thread'"):
        unset_value("thread")


def test_a_bad_value_or_a_broken_file_changes_nothing():
    path = write("threads = 1\n")
    with pytest.raises(ConfigError, match="threads must be"):
        set_value("threads", ["many"])
    with pytest.raises(ConfigError, match="takes one value, not 2"):
        set_value("threads", ["1", "2"])
    assert path.read_text() == "threads = 1\n"
    write("threads = = 1\n")
    for change in (lambda: set_value("device", ["cpu"]), lambda: unset_value("threads")):
        with pytest.raises(ConfigError):
            change()
    assert path.read_text() == "threads = = 1\n"


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=200))
def test_any_name_survives_the_file(name):
    set_value("contributor", [name])
    assert load_settings().contributor == name


def test_the_home_is_private(moshi_home):
    assert not moshi_home.exists()
    load_settings()
    set_value("threads", ["1"])
    assert moshi_home.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in moshi_home.iterdir())


def test_the_home_is_a_folder_in_the_users_own_unless_set(monkeypatch):
    monkeypatch.delenv("MOSHI_FL_HOME")
    assert home() == Path("~/.moshi-fl").expanduser()
    monkeypatch.setenv("MOSHI_FL_HOME", "relative")
    assert home() == Path.cwd() / "relative"


def test_a_home_that_cannot_be_made_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot create") as caught:
        ensure_home()
    assert "MOSHI_FL_HOME" in caught.value.hint


def test_the_pseudonym_tells_nothing_and_stays(tmp_path, monkeypatch):
    first = load_settings().contributor
    assert first.startswith("anonymous-")
    assert load_settings().contributor == first
    monkeypatch.setenv("MOSHI_FL_HOME", str(tmp_path / "another"))
    assert load_settings().contributor != first
    assert load_settings(contributor="ada").contributor == "ada"


def test_first_runs_at_the_same_moment_agree_on_the_pseudonym():
    code = "from moshi_fl.config import load_settings; print(load_settings().contributor)"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert len({run.communicate()[0] for run in runs}) == 1
    assert [path.name for path in home().iterdir()] == ["pseudonym"]


def test_every_setting_says_what_it_means():
    assert all(SETTINGS.values())
    assert set(SETTINGS) >= {"hub", "contributor", "data", "device", "precision", "threads"}


def test_a_hub_in_a_folder_is_kept_with_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "hub.git").mkdir()
    monkeypatch.chdir(tmp_path)
    assert set_value("hub", ["./hub.git"]) == str(tmp_path / "hub.git")
    assert set_value("hub", ["git@example.org:hub.git"]) == "git@example.org:hub.git"


def test_an_option_that_cannot_be_used_is_wrong_usage():
    with pytest.raises(ConfigError, match="--device: device must be auto") as option:
        load_settings(device="gpu")
    write('device = "gpu"\n')
    with pytest.raises(ConfigError) as line:
        load_settings()
    assert (option.value.exit_code, line.value.exit_code) == (Exit.USAGE, Exit.FAILED)


def test_the_key_is_kept_with_its_whole_path_and_its_flag_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set_value("signing_key", ["id_ed25519"]) == str(tmp_path / "id_ed25519")
    assert load_settings(signing_key="other").origin("signing_key") == "--key"
