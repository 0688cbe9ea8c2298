"""``python -m threat_model.attacks``: run attacks and say how they went."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Final

import click
from rich.console import Console

from threat_model.attacks import ATTACKS
from threat_model.attacks.attack import RUN_SECONDS, Attack, Verdict, judge
from threat_model.attacks.stage import Stage

ALL_SECONDS: Final = 8 * 60.0
"""How long all of them may take; those that come later fail for want of time."""


def run(chosen: Iterable[Attack], say: Console) -> list[Verdict]:
    """Run attacks one after another."""
    verdicts, end = [], time.monotonic() + ALL_SECONDS
    with Stage() as stage:
        for attack in chosen:
            left = end - time.monotonic()
            verdict = judge(attack, stage, seconds=min(RUN_SECONDS, left))
            verdicts.append(verdict)
            mark = "[green]ok[/]" if verdict.right else "[red]NOT AS IT SHOULD BE[/]"
            say.print(
                f"{mark} {attack.name}: weakened {verdict.weakened}, ours {verdict.ours} "
                f"({verdict.reason}), {verdict.seconds:.1f} s",
                highlight=False,
            )
            for note in verdict.notes:
                say.print(f"   {note}", highlight=False, markup=False)
    return verdicts


@click.command()
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Run all of them.")
@click.option("--list", "listed", is_flag=True, help="Name them and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
def main(names: tuple[str, ...], every: bool, listed: bool, as_json: bool) -> None:
    """Attack the shipped SDK and the shipped coordinator, as processes, over the wire.

    Each attack is run on a weakened product, where it has to succeed, and on ours, which has to
    refuse it for the named reason. Exit status 1 if one did not go so.
    """
    if listed:
        click.echo("\n".join(ATTACKS))
        return
    if unknown := set(names) - ATTACKS.keys():
        raise click.UsageError(f"No such attacks: {', '.join(sorted(unknown))}. See --list.")
    if not names and not every:
        raise click.UsageError("Name attacks, or use --all.")
    chosen = [attack for name, attack in ATTACKS.items() if every or name in names]
    verdicts = run(chosen, Console(stderr=True, soft_wrap=True))
    if as_json:
        click.echo(json.dumps({"attacks": [verdict.to_json() for verdict in verdicts]}, indent=2))
    sys.exit(not all(verdict.right for verdict in verdicts))


if __name__ == "__main__":
    main()
