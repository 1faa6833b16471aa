import os
import subprocess
from pathlib import Path

import pytest

from moshi_fl import data, screening
from moshi_fl.data import read_sources, split
from moshi_fl.errors import DataError

CODE = "def add(a, b):\n    return a + b\n"


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def names(*paths: Path, **options: int) -> list[str]:
    return [source.name for source in read_sources(paths, **options).taken]


def test_nested_gitignore_rules_decide_as_git_does(tmp_path: Path) -> None:
    ignores = {
        ".gitignore": "*.log\n/private/\ndeep/**/gen\n# comment\n\nbroken[\n!\n",
        "sub/.gitignore": "!keep.log\nlocal.py\n",
    }
    files = [
        "a.py",
        "x.log",
        "private/b.py",
        "sub/keep.log",
        "sub/other.log",
        "sub/local.py",
        "sub/private/c.py",
        "deep/1/2/gen/d.py",
        "local.py",
    ]
    write(tmp_path, {**ignores, **{name: f"# {name}\n{CODE}" for name in files}})
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True
    )
    assert names(tmp_path) == sorted(listed.stdout.split())
    assert read_sources([tmp_path]).skipped == {data.IGNORED: 5}
    assert len(read_sources([tmp_path]).left_out[data.IGNORED]) == data.NAMED


def test_the_repository_above_a_named_folder_has_its_say(tmp_path: Path) -> None:
    root = write(tmp_path, {".gitignore": "*.gen.py\nout2/\n", "src/a.py": CODE})
    write(root, {"src/b.gen.py": "x = 1", "out2/c.py": CODE, ".git/info/exclude": "mine.py\n"})
    write(root, {"src/mine.py": "y = 2"})
    assert names(root / "src") == ["a.py"]
    assert names(root / "out2") == ["c.py"]  # named by the user, so wanted
    assert names(root / "src" / "b.gen.py") == ["b.gen.py"]


def test_secrets_stay_out_by_name_and_by_content(tmp_path: Path) -> None:
    key = "AKIA" + "ABCDEFGHIJKLMNOP"
    token = "ghp_" + "a1B2" * 9
    pem = "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE\n"
    by_name = [".env", ".env.local", "server.pem", "id_rsa", "ID_RSA.bak", "prod.key", ".netrc"]
    by_name += ["credentials.json", ".npmrc", "Credentials", ".ssh/config", "terraform.tfvars"]
    write(tmp_path, dict.fromkeys(by_name, "harmless = 1\n"))
    write(tmp_path, {"aws.py": f"k = '{key}'\n", "gh.py": f"# {token}\n", "pem.txt": pem})
    write(tmp_path, {"generic.py": 'API_KEY = "' + "0123456789abcdef" * 2 + '"\n', "ok.py": CODE})
    write(tmp_path, {"near.py": "keys = {'AKIA': 1}\npassword = 'hunter2'\ntoken = get_token()\n"})
    sources = read_sources([tmp_path])
    assert [s.name for s in sources.taken] == ["near.py", "ok.py"]
    assert sources.skipped == {screening.SECRET_CONTENT: 4, screening.SECRET_NAME: len(by_name)}


def test_a_secret_named_by_the_user_stays_out_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, {".env": "PASSWORD=1\n"})
    with pytest.raises(DataError, match="No usable text") as caught:
        read_sources([tmp_path / ".env"])
    assert "1 looks like a secret by its name" in caught.value.hint
    assert "--" not in caught.value.hint, "commands name it differently"


def test_what_is_not_source_text_stays_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.bin": b"a\0b", "latin.py": b"caf\xe9", "empty.py": " \n", "ok.py": CODE})
    write(tmp_path, {"big.py": "x = 1\n" * 200_000, "app.min.js": CODE, "poetry.lock": CODE})
    write(tmp_path, {"bundle.js": "x" * 6000, "node_modules/m/i.js": CODE, ".git/config": CODE})
    write(tmp_path, {"src/__pycache__/a.py": CODE, "p.egg-info/a.txt": CODE})
    os.mkfifo(tmp_path / "pipe.py")
    sources = read_sources([tmp_path])
    assert [s.name for s in sources.taken] == ["ok.py"]
    assert sources.skipped == {
        screening.BINARY: 2,
        screening.EMPTY: 1,
        data.OVERSIZED: 1,
        screening.LOCK: 3,
        screening.VENDORED: 3,
        data.SPECIAL: 1,
    }


def test_symbolic_links_are_not_followed_out_of_the_tree_or_round_in_circles(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"tree/a.py": CODE, "tree/sub/b.py": CODE + "#", "outside/secret.py": "s = 1"})
    (tmp_path / "tree/loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/out").symlink_to(tmp_path / "outside")
    (tmp_path / "tree/file.py").symlink_to(tmp_path / "outside/secret.py")
    (tmp_path / "tree/dangling.py").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path / "tree") == ["a.py", "sub/b.py"]
    assert read_sources([tmp_path / "tree"]).skipped == {data.LINK: 4}
    (tmp_path / "entry").symlink_to(tmp_path / "tree")  # a root may be a link: the user named it
    assert names(tmp_path / "entry") == ["a.py", "sub/b.py"]


def test_equal_content_counts_once_and_order_does_not_depend_on_the_arguments(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"x/b.py": CODE, "x/copy.py": CODE, "y/a.py": "x = 1\n", "y/z.py": "y = 2\n"})
    forward = read_sources([tmp_path / "x", tmp_path / "y", tmp_path / "x/b.py"])
    assert forward == read_sources([tmp_path / "y", tmp_path / "x"])
    assert [s.name for s in forward.taken] == ["a.py", "b.py", "z.py"]
    assert forward.skipped == {data.DUPLICATE: 1}


def test_windows_line_ends_and_byte_order_marks_do_not_make_another_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": CODE, "b.py": b"\xef\xbb\xbf" + CODE.replace("\n", "\r\n").encode()})
    assert read_sources([tmp_path]).skipped == {data.DUPLICATE: 1}


def test_nothing_usable_says_what_was_skipped_and_why(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_sources([tmp_path])
    assert "empty" in caught.value.hint
    write(tmp_path, {"a.bin": b"\0", "b.bin": b"\0\0", "c.pem": "x"})
    with pytest.raises(DataError) as caught:
        read_sources([tmp_path])
    assert "2 binary (a.bin, b.bin); 1 looks like a secret by its name (c.pem)" in caught.value.hint
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_sources([tmp_path / "nowhere"])


def test_an_unreadable_folder_is_counted_not_fatal(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": CODE, "closed/b.py": CODE})
    (tmp_path / "closed").chmod(0)
    try:
        skipped = read_sources([tmp_path]).skipped
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert skipped == ({data.DUPLICATE: 1} if os.geteuid() == 0 else {data.UNREADABLE: 1})


def test_a_byte_limit_keeps_a_sample_that_the_seed_decides(tmp_path: Path) -> None:
    write(tmp_path, {f"f{i:02}.py": f"n = {i:02}\n" * 10 for i in range(50)})
    kept = names(tmp_path, seed=1, max_bytes=700)
    assert len(kept) == 10
    assert kept == names(tmp_path, seed=1, max_bytes=700)
    assert kept != names(tmp_path, seed=2, max_bytes=700)
    assert read_sources([tmp_path], max_bytes=700).skipped == {data.OVER_BUDGET: 40}


def test_training_and_held_out_files_are_disjoint_and_a_new_file_moves_no_other(
    tmp_path: Path,
) -> None:
    write(tmp_path, {f"f{i}.py": f"value = {i}\n" for i in range(100)})
    before = split(read_sources([tmp_path]), seed=7)
    assert not set(before.training) & set(before.held_out)
    assert len(before.training) + len(before.held_out) == 100
    assert 2 <= len(before.held_out) <= 25
    write(tmp_path, {"new.py": "brand = 'new'\n"})
    after = split(read_sources([tmp_path]), seed=7)
    assert set(before.training) <= set(after.training)
    assert set(before.held_out) <= set(after.held_out)
    assert before.fingerprint != split(read_sources([tmp_path]), seed=8).fingerprint


@pytest.mark.parametrize("seed", range(5))
def test_two_files_give_one_to_each_side(tmp_path: Path, seed: int) -> None:
    write(tmp_path, {"a.py": "a = 1\n", "b.py": "b = 2\n"})
    parts = split(read_sources([tmp_path]), seed=seed)
    assert (len(parts.training), len(parts.held_out)) == (1, 1)


def test_a_single_file_is_cut_with_a_gap(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    write(tmp_path, {"only.py": text})
    parts = split(read_sources([tmp_path / "only.py"]), seed=0)
    (training,), (held_out,) = parts.training, parts.held_out
    assert text.startswith(training)
    assert text.endswith(held_out)
    assert 0 < len(text) - len(training) - len(held_out) < len(held_out)
    write(tmp_path, {"only.py": "x = 1\n"})
    with pytest.raises(DataError, match="Only 6 characters"):
        split(read_sources([tmp_path / "only.py"]), seed=0)
