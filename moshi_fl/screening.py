"""Which files of a source tree must not, or need not, be trained on: decided from name and bytes.

When in doubt about a secret, the file stays out: a skipped file costs a little data, a learnt key
cannot be unlearnt. This is a safety net, not a guarantee; ``--dry-run`` shows what would be taken.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

MAX_LINE = 5000  # characters; longer lines are written by machines

VENDORED = "vendored or generated folder"
LOCK = "lock or minified file"
SECRET_NAME = "looks like a secret by its name"  # noqa: S105 - a reason, not a password
SECRET_CONTENT = "with something like a key or token"  # noqa: S105
BINARY = "binary"
EMPTY = "empty"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_VERSION_CONTROL = _words(".git .hg .svn .bzr .jj CVS")
_VENDORED_FOLDERS = _words("""
    node_modules bower_components jspm_packages vendor vendored _vendor third_party third-party
    site-packages dist-packages dist build target out venv .venv virtualenv .virtualenv .tox .nox
    __pycache__ .mypy_cache .pytest_cache .ruff_cache .hypothesis .eggs *.egg-info *.dist-info
    .gradle .terraform .next .nuxt .svelte-kit .cache .idea .vscode coverage htmlcov Pods
    DerivedData .bundle
""")
_LOCK_FILES = _words("""
    *.min.js *.min.css *.min.mjs *.map *.lock *-lock.json *-lock.yaml *.lockb go.sum
    npm-shrinkwrap.json
""")
_SECRET_FOLDERS = _words(".ssh .gnupg .aws .azure .kube .docker .password-store")
_SECRET_FILES = _words("""
    .env .env.* .envrc *.env *.pem *.key *.p12 *.pfx *.p8 *.jks *.keystore *.kdbx *.kdb *.ppk
    *.gpg *.asc *.ovpn id_rsa* id_dsa* id_ecdsa* id_ed25519* *_rsa *_ed25519 credentials*
    *credentials.json .credentials* .netrc _netrc .npmrc .yarnrc* .pypirc .htpasswd .pgpass .my.cnf
    .git-credentials .dockercfg .s3cfg .boto *.tfstate *.tfstate.* *.tfvars *.tfvars.json secret.*
    secrets.json secrets.y*ml secrets.toml secrets.ini secrets.env client_secret* kubeconfig
    service-account*.json service_account*.json *.kubeconfig .vault-token .bash_history
    .zsh_history .python_history
""")
# Literal that such a secret contains, and what the whole looks like. Looking for the literal first
# is what makes reading a source tree fast.
_SECRETS = {
    literal.encode(): re.compile(pattern.encode())
    for literal, pattern in {
        "PRIVATE KEY": r"-----BEGIN [A-Z ]*PRIVATE KEY",
        "AKIA": r"\bAKIA[0-9A-Z]{16}\b",  # AWS
        "ASIA": r"\bASIA[0-9A-Z]{16}\b",
        "gh": r"\bgh[pousr]_[A-Za-z0-9]{36}",  # GitHub
        "github_pat_": r"\bgithub_pat_[A-Za-z0-9_]{22}",
        "glpat-": r"\bglpat-[A-Za-z0-9_-]{20}",  # GitLab
        "xox": r"\bxox[abeprs]-[A-Za-z0-9-]{10}",  # Slack
        "AIza": r"\bAIza[0-9A-Za-z_-]{35}",  # Google
        "k_live_": r"\b[rs]k_live_[0-9A-Za-z]{16}",  # Stripe
        "sk-": r"\bsk-[A-Za-z0-9_-]{32}",  # OpenAI, Anthropic
        "hf_": r"\bhf_[A-Za-z]{30}",  # Hugging Face
        "npm_": r"\bnpm_[A-Za-z0-9]{36}",
        "pypi-AgEIcHlwaS5vcmc": r"pypi-AgEIcHlwaS5vcmc",
        ".eyJ": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10}",  # web token
    }.items()
}
_LONG_VALUE = re.compile(rb"""[:=]\s*["'][A-Za-z0-9+/_=-]{32,}["']""")
_SECRET_VARIABLE = re.compile(rb"""(?i:passw(?:or)?d|secret|api_?key|token)["']?\s*\Z""")


def folder_reason(name: str) -> str | None:
    """Why a folder of this name is not entered; empty text for version control, None if it is."""
    if name in _VERSION_CONTROL:
        return ""
    if _matches(name, _SECRET_FOLDERS):
        return SECRET_NAME
    if _matches(name, _VENDORED_FOLDERS):
        return VENDORED
    return None


def name_reason(name: str) -> str | None:
    """Why a file of this name is not read, or None."""
    lower = name.lower()
    if _matches(lower, _SECRET_FILES):
        return SECRET_NAME
    if _matches(lower, _LOCK_FILES):
        return LOCK
    return None


def content_reason(data: bytes) -> str | None:
    """Why a file with this content is not taken, or None; then it is text in UTF-8."""
    if b"\0" in data:
        return BINARY
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return BINARY
    if not text.strip():
        return EMPTY
    if _holds_secret(data):
        return SECRET_CONTENT
    if max(map(len, text.split("\n"))) > MAX_LINE:
        return LOCK
    return None


def _holds_secret(data: bytes) -> bool:
    if any(literal in data and regex.search(data) for literal, regex in _SECRETS.items()):
        return True
    values = _LONG_VALUE.finditer(data)
    return any(_SECRET_VARIABLE.search(data[max(0, v.start() - 40) : v.start()]) for v in values)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
