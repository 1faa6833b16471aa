"""Who contributes: the key of a run, and what to say before it is used."""

from __future__ import annotations

from collections.abc import Sequence

from moshi_fl.errors import SigningError
from moshi_fl.signing import Signer, fingerprint
from moshi_sdk.runs import RunPlan


def before_sending(sent: Sequence[RunPlan], plan: RunPlan, signer: Signer) -> list[tuple[str, str]]:
    """What a contributor should know first: what cannot be undone, what nothing covers.

    Args:
        sent: Plans of what has left this machine for this hub.
        plan: What is to be sent.
        signer: Who will sign it.

    Returns:
        Names of stages (``public``, ``privacy``) and texts.
    """
    said = []
    if not sent:
        who = f"{signer.fingerprint} ({signer.key_path})"
        promise = "" if plan.is_private else "; without --dp no privacy is claimed"
        text = f"what you send is public and, in Git, permanent; it is signed by {who}{promise}"
        said.append(("public", text))
    if plan.is_private and not all(other.is_private for other in sent):
        text = "earlier ones were sent without --dp: what they told, no accounting covers"
        said.append(("privacy", text))
    return said


def check_key(plan: RunPlan, signer: Signer) -> None:
    """Insist that a run goes on with the key that it was begun with.

    Raises:
        SigningError: It is another one.
    """
    if signer.public_key != plan.key:
        raise SigningError(
            f"this contribution was begun with the key {fingerprint(plan.key)}, "
            f"and {signer.key_path} is {signer.fingerprint}.",
            hint="--key FILE   (the key it was begun with), or --discard it",
        )
