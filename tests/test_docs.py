"""The documentation is true: commands parse, options and keys exist, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest

from moshi_fl import evidence, hubfile, records, snapshot
from moshi_fl.aggregate import STRATEGIES
from moshi_fl.codec.topk import TopK
from moshi_fl.config import SETTINGS, Settings
from moshi_fl.console import Console
from moshi_fl.models import get_preset
from moshi_fl.models.char import CharConfig
from moshi_fl.models.moc_config import MocConfig
from moshi_fl.models.speech.family_config import SpeechConfig
from moshi_fl.models.speech.lm_config import LMConfig
from moshi_fl.store import HUB_SETTINGS
from moshi_fl.weights import save_weights, weights_digest
from moshi_hub.cli import root as hub_root
from moshi_hub.create import Plan, pages_of
from moshi_hub.verify import REASONS
from moshi_sdk.cli import root as sdk_root

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name for name in ("sdk/README.md", "hub/README.md", "hub/PROTOCOL.md")),
        *(ROOT / "examples").glob("*/README.md"),
        ROOT / "hub" / "moshi_hub" / "template" / "README.md",
    ]
)
PROTOCOL = (ROOT / "hub" / "PROTOCOL.md").read_text(encoding="utf-8")
HUB_GUIDE = (ROOT / "hub" / "README.md").read_text(encoding="utf-8")
SDK_GUIDE = (ROOT / "sdk" / "README.md").read_text(encoding="utf-8")
COMMANDS = {"moshi-fl": sdk_root, "moshi-hub": hub_root}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Command lines.


def code_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of code blocks, which are whole, and what stands between backticks elsewhere."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip().removeprefix("$ "), True
        else:
            yield from ((code, False) for code in re.findall(r"`([^`]+)`", line))


def command_lines(path: Path) -> Iterator[tuple[list[str], bool]]:
    """Our commands among them, in words; what a synopsis has in brackets is left out."""
    for line, whole in code_lines(path.read_text(encoding="utf-8")):
        if not re.search(r"\bmoshi-(fl|hub) ", line):
            continue
        words = shlex.split(re.sub(r"\[[^\]]*\]", "", line), comments=True)
        while words:
            cut = next((i for i, word in enumerate(words) if word in {"|", "&&", ";"}), len(words))
            command, words = words[:cut], words[cut + 1 :]
            if command and command[0] in COMMANDS:
                yield command, whole


def parse(words: list[str]) -> None:
    """Let click read a command line, and do nothing about it."""
    context = click.Context(COMMANDS[words[0]], info_name=words[0], obj=Console())
    args = words[1:]
    while args and isinstance(context.command, click.Group) and not args[0].startswith("-"):
        name, command, args = context.command.resolve_command(context, args)
        assert command is not None
        rest = [] if isinstance(command, click.Group) and args else args
        context = command.make_context(name, list(rest), parent=context)
    assert not args or not isinstance(context.command, click.Group), f"what is {args}?"


LINES = [
    pytest.param(words, whole, id=f"{name_of(path)}: {shlex.join(words)}"[:110])
    for path in DOCS
    for words, whole in command_lines(path)
]


def test_there_are_command_lines_to_check() -> None:
    assert len(LINES) > 30


@pytest.mark.parametrize(("words", "whole"), LINES)
def test_a_command_line_in_the_docs_is_understood(
    words: list[str], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Paths in the docs are on no machine; everything else about them is checked.
    monkeypatch.setattr(click.Path, "convert", lambda *args: Path(args[1]))
    try:
        parse(words)
    except (click.MissingParameter, click.BadOptionUsage):
        assert not whole  # a mention in passing may leave out what a command needs


@pytest.mark.parametrize("speaks", [False, True])
def test_the_page_of_a_new_hub_speaks_of_its_own_family(
    speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda *args: Path(args[1]))
    plan = Plan(url="hub.git", family="speech" if speaks else "moc", preset="tiny", name="ours")
    page = tmp_path / "README.md"
    page.write_bytes(pages_of(plan, plan.url, speaks=speaks)["README.md"])
    commands = [words for words, whole in command_lines(page) if whole]
    for words in commands:
        parse(words)
    names = [words[1] for words in commands]
    own = "speak" if speaks else "generate"
    assert names == ["sync", "contribute", own, "audit", "merge"]
    assert ("code" in page.read_text().split()) != speaks
    assert ("dialogues" in page.read_text()) == speaks


def test_a_wrong_command_line_would_be_noticed() -> None:
    for wrong in ("moshi-fl sink", "moshi-fl sync --rounds 3", "moshi-fl config sett a b"):
        with pytest.raises(click.UsageError):
            parse(shlex.split(wrong))


# Options.


def options_of(command: click.Command) -> set[str]:
    """Long options of a command and of its subcommands."""
    found = {
        word
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for word in (*parameter.opts, *parameter.secondary_opts)
        if word.startswith("--")
    }
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found |= options_of(command.get_command(context, name) or command)
    return found


def mentioned_options(text: str) -> set[str]:
    ours = re.sub(r"^ *(git|pip|flower-|flwr).*$", "", text, flags=re.MULTILINE)
    ours = re.sub(r"`git [^`]*`", "", ours)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ours))


COMMON = {"--json", "--quiet", "--help", "--version"}


def test_options_in_the_contributors_guide_are_those_that_exist() -> None:
    assert mentioned_options(SDK_GUIDE) | COMMON == options_of(sdk_root) | COMMON


def test_options_in_the_maintainers_guide_are_those_that_exist() -> None:
    assert mentioned_options(HUB_GUIDE) | COMMON == options_of(hub_root) | COMMON


def test_each_command_has_its_place_in_a_guide() -> None:
    for name, root, guide in (("fl", sdk_root, SDK_GUIDE), ("hub", hub_root, HUB_GUIDE)):
        for command in root.list_commands(click.Context(root)):
            assert f"moshi-{name} {command}" in guide, command


# Tables.


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """Rows of tables whose first cell is code: that, to the other cells."""
    found = re.findall(r"^\| `([^`|]+)` \|(.*)\|$", text, re.MULTILINE)
    return {key: [cell.strip() for cell in cells.split(" | ")] for key, cells in found}


def default_of(cell: str) -> object:
    if cell in {"required", "unset"}:
        return msgspec.NODEFAULT if cell == "required" else None
    return tomllib.loads(f"value = {cell.strip('`')}")["value"]


def fields_of(kind: Any) -> dict[str, object]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize(
    "table",
    [f.name for f in msgspec.structs.fields(hubfile.HubConfig) if f.name != "model"],
)
def test_hub_toml_is_documented_with_its_defaults(table: str) -> None:
    kinds = {field.name: field.type for field in msgspec.structs.fields(hubfile.HubConfig)}
    documented = {
        key: default_of(cells[0]) for key, cells in rows(section(HUB_GUIDE, f"[{table}]")).items()
    }
    wanted = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in msgspec.structs.fields(kinds[table])
    }
    assert documented == wanted


def test_the_families_settings_are_documented_with_their_defaults() -> None:
    text, speech = section(HUB_GUIDE, "[model]").split("The keys of the family `speech`")
    char, moc = text.split("The keys of the family `moc`")
    for text, family, config in ((char, "char", CharConfig()), (moc, "moc", MocConfig())):
        documented = {key: default_of(cells[0]) for key, cells in rows(text).items()}
        documented.pop("family", None)
        assert documented == vars(config)
        assert set(get_preset(family, "base").model) <= set(documented)

    documented = {key: default_of(cells[0]) for key, cells in rows(speech).items()}
    kinds = [*fields(LMConfig), *fields(SpeechConfig)[2:]]
    required = {f.name: msgspec.NODEFAULT for f in kinds if f.default is MISSING}
    wanted = {f.name: f.default for f in kinds} | required | {"mimi": {}}
    assert {k: tuple(v) if k == "delays" else v for k, v in documented.items()} == wanted
    assert set(get_preset("speech", "small").model) <= set(documented)


def test_the_template_uses_only_documented_keys() -> None:
    template = (files("moshi_hub") / "template" / "hub.toml").read_text(encoding="utf-8")
    documented = set(rows(HUB_GUIDE))
    assert set(re.findall(r"^(\w+) *=", template, re.MULTILINE)) <= documented


def test_settings_are_documented() -> None:
    table = rows(section(SDK_GUIDE, "Settings"))
    assert set(table) == set(SETTINGS)
    for name, cells in table.items():
        assert cells[0] == f"`MOSHI_FL_{name.upper()}`"
    assert table["keep_rounds"][1] == f"`{Settings().keep_rounds}`"


def test_strategies_and_their_options_are_documented() -> None:
    documented = rows(section(HUB_GUIDE, "Strategies"))
    assert set(documented) == set(STRATEGIES)
    for name, (_, options) in STRATEGIES.items():
        assert set(re.findall(r"`(\w+)`", documented[name][0])) == options - {"running_norm"}
        assert f"**{name}**" in section(PROTOCOL, "Aggregation")


def test_settings_of_a_hubs_repository_are_those_of_the_code() -> None:
    shown = dict(re.findall(r"git -C code\.git config (\S+) (\S+)", HUB_GUIDE))
    assert shown.pop("http.receivepack") == "true"
    assert shown.pop("receive.maxInputSize").isdigit()
    assert shown == dict(HUB_SETTINGS)


def test_reason_codes_are_documented_as_the_code_explains_them() -> None:
    assert {
        code: cells[0] for code, cells in rows(section(PROTOCOL, "The gate")).items()
    } == REASONS


RECORDS = (
    "File Location Contribution Training Metrics Privacy Merged Strategy Weighting Update Growth "
    "Evaluation Round Manifest Intake"
)


@pytest.mark.parametrize("name", RECORDS.split())
def test_each_field_of_a_record_is_documented(name: str) -> None:
    assert list(rows(section(PROTOCOL, name))) == list(fields_of(getattr(records, name)))


def test_no_record_is_forgotten() -> None:
    kinds = {
        name
        for name, kind in vars(records).items()
        if isinstance(kind, type)
        and issubclass(kind, records.Record)
        and kind is not records.Record
    }
    assert kinds == set(RECORDS.split())


def evidence_kinds() -> set[str]:
    return {
        name
        for name, kind in vars(evidence).items()
        if isinstance(kind, type)
        and issubclass(kind, records.Record)
        and kind.__module__ == evidence.__name__
    }


@pytest.mark.parametrize("name", sorted(evidence_kinds()))
def test_each_field_of_an_evaluation_is_documented(name: str) -> None:
    assert list(rows(section(PROTOCOL, name))) == list(fields_of(getattr(evidence, name)))


def test_the_index_of_a_snapshot_is_documented() -> None:
    assert list(rows(section(PROTOCOL, "Snapshots"))) == list(fields_of(snapshot.Index))


# Programs in the docs.


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_python_in_the_docs_imports_what_exists(path: Path) -> None:
    for block in python_blocks(path.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def run_block(containing: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "docs"}
    block = next(block for block in python_blocks(PROTOCOL) if containing in block)
    exec(compile(block, "PROTOCOL.md", "exec"), namespace)
    return namespace


def test_the_digest_program_agrees_with_ours(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in (("z", (3, 4)), ("é", (2,)), ("a.b", ()), ("empty", (0, 5)))
    }
    save_weights(tmp_path / "model.safetensors", weights, {"some": "metadata"})
    digest = run_block("def weights_digest")["weights_digest"]
    assert digest(tmp_path / "model.safetensors") == weights_digest(weights)


def test_the_worked_digest_is_right() -> None:
    weights = {
        "bias": np.array([1, -2], np.float32),
        "layer.weight": np.array([[0.5, 0, 3]], np.float32),
    }
    assert f"SHA-256: {weights_digest(weights)}\n" in PROTOCOL


@pytest.mark.parametrize(("n", "keep"), [(4096, 64), (8, 3), (5, 5), (1, 1), (100, 7)])
def test_the_topk_decoder_agrees_with_ours(n: int, keep: int) -> None:
    codec = TopK(chunk=n, keep=keep)
    delta = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    delta[:: 2 + n % 3] = 0
    entry = codec.encode(delta)
    decoded = run_block("def decode_chunk")["decode_chunk"](entry.tobytes(), n, keep)
    assert np.array_equal(np.array(decoded, np.float32), codec.decode(entry, (n,)))


def test_the_worked_topk_chunk_is_right() -> None:
    delta = np.array([0, 0.5, -3, 0.25, 0, 0, 1, 0], np.float32)
    entry = TopK(chunk=8, keep=3).encode(delta)
    assert f"The bytes are `{entry.tobytes().hex()}`" in PROTOCOL
    decode = run_block("def decode_chunk")["decode_chunk"]
    assert decode(entry.tobytes(), 8, 3) == [0, 0.75, -3, 0, 0, 0, 0.75, 0]


# Links.


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_names_two_commands_that_do_everything() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^make (\w+)", readme, re.MULTILINE) == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("demo", "test"))
