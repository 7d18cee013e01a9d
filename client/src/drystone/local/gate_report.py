"""What the exactness gate found, for people and for scripts."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from drystone.local.gate_rules import RMS_RATIO_LIMIT, TOKENS_PER_TIE, Comparison


@dataclass(slots=True)
class Float32Report:
    """Every prompt compared in float32."""

    attention: str
    comparisons: list[Comparison] = field(default_factory=list)
    idle_invariant: bool = True

    def add(self, comparison: Comparison) -> None:
        """Adds a prompt."""
        self.comparisons.append(comparison)

    @property
    def equal(self) -> int:
        """Prompts whose tokens are the same."""
        return sum(each.equal for each in self.comparisons)

    @property
    def tokens(self) -> int:
        """Tokens compared."""
        return sum(each.tokens for each in self.comparisons)

    @property
    def ties(self) -> int:
        """Steps at which either token is right."""
        return sum(len(each.ties) for each in self.comparisons)

    @property
    def ties_allowed(self) -> int:
        """At most 1 in 1,000 tokens: none in a run of fewer."""
        return self.tokens // TOKENS_PER_TIE

    @property
    def passed(self) -> bool:
        """Equal, with few ties, and nothing left held."""
        return self.ties <= self.ties_allowed and self.idle_invariant and all(each.passed for each in self.comparisons)


@dataclass(slots=True)
class DtypeReport:
    """Distances to the float32 reference over all question-row logits, root mean square."""

    dtype: str
    served_rms: float
    reference_rms: float

    @property
    def ratio(self) -> float:
        """Served distance in units of the reference's own."""
        return self.served_rms / self.reference_rms

    @property
    def passed(self) -> bool:
        """Near enough."""
        return self.ratio <= RMS_RATIO_LIMIT


@dataclass(slots=True)
class GateReport:
    """Everything."""

    model: str
    prompts: int
    max_new_tokens: int
    float32: list[Float32Report] = field(default_factory=list)
    others: list[DtypeReport] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True when every part is."""
        return all(part.passed for part in self.float32) and all(part.passed for part in self.others)


def print_report(report: GateReport) -> None:
    """Prints tables, and every prompt that is not simply equal."""
    console = Console(soft_wrap=True)
    table = Table(title=f"{report.model}: served against the reference, {report.prompts} prompts")
    for heading in ("what", "result", "limit", ""):
        table.add_column(heading)
    for part in report.float32:
        said = f"{part.equal} of {len(part.comparisons)} token sequences equal ({part.tokens} tokens, {part.ties} ties)"
        limit = f"all, at most 1 tie in 1,000 tokens (here {part.ties_allowed})"
        table.add_row(f"float32 {part.attention}", said, limit, _verdict(passed=part.passed))
        worst = max(part.comparisons, key=lambda each: each.logit_difference / each.logit_limit)
        table.add_row(
            "  largest logit difference",
            f"{worst.logit_difference:.1e} at {worst.prompt_tokens} tokens",
            f"{worst.logit_limit:.0e}",
            _verdict(passed=worst.logit_difference <= worst.logit_limit),
        )
        table.add_row("  memory held when idle", "none" if part.idle_invariant else "some", "none", "")
    for other in report.others:
        distances = f"{other.served_rms:.4f} served, {other.reference_rms:.4f} the reference's own: {other.ratio:.2f}"
        table.add_row(
            f"{other.dtype} RMS distance", distances, f"ratio {RMS_RATIO_LIMIT}", _verdict(passed=other.passed)
        )
    console.print(table)
    for part in report.float32:
        for each in part.comparisons:
            if not (each.equal and each.passed):
                console.print(
                    f"prompt {each.index} ({each.prompt_tokens} tokens): equal={each.equal}, "
                    f"logit difference {each.logit_difference:.1e}, ties {each.ties}, beyond ties {each.beyond}, "
                    f"parted without a tie={each.unexplained}"
                )


def _verdict(*, passed: bool) -> str:
    return "[green]pass[/]" if passed else "[red]FAIL[/]"
