"""Who may evaluate: reputations from the verdicts on main, and the list of those appointed.

A reputation is a Beta distribution over "this evaluator's next verdict will be confirmed". It is a
pure fold over the rounds' verdicts, stored nowhere; it decides who may evaluate and never weighs a
vote. Only lies that the referee has proven count against anybody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moshi_fl.evidence import Evaluator, Evaluators, Seat, Verdicts

DECAY = 0.98
LOWER_BOUND, LEVEL = 0.6, 0.05
LIE_BETA, LIE_FACTOR = 10.0, 0.25

Status = Literal["vouched", "eligible", "probation", "suspended", "revoked"]


@dataclass(frozen=True)
class Reputation:
    """Beta(alpha, beta), and how many sessions had a proven lie."""

    alpha: float = 1.0
    beta: float = 1.0
    lies: int = 0

    @property
    def lower_bound(self) -> float:
        """What the share of confirmed verdicts exceeds with 95 % probability."""
        return beta_quantile(LEVEL, self.alpha, self.beta)

    def faded(self) -> Reputation:
        """A round later: what was learned beyond the prior loses 2 %."""
        return replace(self, alpha=1 + DECAY * (self.alpha - 1), beta=1 + DECAY * (self.beta - 1))

    def after(self, confirmed: int, lies: int) -> Reputation:
        """After a session."""
        if lies:
            return Reputation(self.alpha * LIE_FACTOR, self.beta + LIE_BETA, self.lies + 1)
        return replace(self, alpha=self.alpha + confirmed)


def reputations(rounds: Iterable[Verdicts | None]) -> dict[str, Reputation]:
    """Reputation of each key, from the verdicts of all rounds in order.

    In a round without verdicts, or evaluated by processes of one machine, only time passes.
    """
    found: dict[str, Reputation] = {}
    for verdicts in rounds:
        found = {key: entry.faded() for key, entry in found.items()}
        if verdicts is None or verdicts.mode == "local":
            continue
        for tally in verdicts.tallies:
            before = found.get(tally.key, Reputation())
            found[tally.key] = before.after(tally.confirmed, tally.lies)
    return found


def status(entry: Evaluator, reputation: Reputation) -> Status:
    """What an evaluator may do: vouched and eligible ones count, those on probation learn."""
    if entry.revoked or reputation.lies > 1:
        return "revoked"
    is_eligible = reputation.lower_bound >= LOWER_BOUND
    if reputation.lies and not is_eligible:
        return "suspended"
    if entry.vouched:
        return "vouched"
    return "eligible" if is_eligible else "probation"


def seats(listed: Evaluators, known: Mapping[str, Reputation]) -> tuple[Seat, ...]:
    """Seats of the next session: all who may take part, in the order of their keys."""
    found = []
    for entry in sorted(listed.evaluators, key=lambda entry: entry.key):
        now = status(entry, known.get(entry.key, Reputation()))
        if now in {"vouched", "eligible", "probation"}:
            counts = now != "probation"
            found.append(Seat(key=entry.key, owner=entry.owner, counts=counts))
    return tuple(found)


# The quantile of the Beta distribution (Numerical Recipes, 3rd edition, section 6.4).


def beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _continued_fraction(x, a, b) / a
    return 1.0 - front * _continued_fraction(1.0 - x, b, a) / b


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Lentz's method; converges in O(sqrt(max(a, b))) steps."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1.0), tiny)
    result = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away(1.0 + numerator * d, tiny)
            c = _away(1.0 + numerator / c, tiny)
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return result


def _away(x: float, tiny: float) -> float:
    return x if abs(x) > tiny else tiny


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = p, to 1e-12, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
    return (low + high) / 2
