"""Words on approval: approve, withdraw, approval, audit, allow-reviewers."""

import argparse
import json

import msgspec

from jobs.commands.terminal import Commands, command, done, say, show
from katherine import approval, audit, units
from katherine.approval import OPERATOR
from katherine.errors import ApprovalError
from katherine.settings import home


def approve(options: argparse.Namespace) -> None:
    at = home()
    request = {"export": options.export, "who": options.who, "role": OPERATOR, "note": options.note}
    if options.files:
        request["files"] = options.files
    done(at, "approve", audit.without_secrets(request), options.who)
    tell(approval.standing(at, options.export))


def withdraw(options: argparse.Namespace) -> None:
    at = home()
    approval.withdraw(at, options.export, who=options.who, role=OPERATOR, note=options.note)
    tell(approval.standing(at, options.export))


def show_approval(options: argparse.Namespace) -> None:
    at = home()
    if options.check:
        done(at, "verify", {"export": options.export})
    found = approval.standing(at, options.export)
    if options.json:
        given = msgspec.to_builtins(found.approval) if found.approval else None
        said = {"valid": found.valid, "unsure": found.unsure, "reasons": found.reasons, "later": found.later}
        print(json.dumps(said | {"approval": given}, indent=2, ensure_ascii=False))
        return
    tell(found)
    if given := found.approval:
        print()
        show([[file.quant, file.file, units.size(file.bytes), file.sha256] for file in given.files],
             ["quant", "file", "size", "sha256"])  # fmt: skip
        print()
        for probe in given.probes:
            show([[count.column, f"{count.passed} of {count.asked}"] for count in probe.counts],
                 [f"probes {probe.set}, run {probe.run}", "passed"])  # fmt: skip
            print()
        by = ", ".join(f"{name} {count}" for name, count in given.verdicts.by.items())
        print(f"verdicts: {given.verdicts.count}" + (f" ({by})" if by else ""))
        for word in given.recommendations:
            print(f"{word.reviewer}: {'it may go out' if word.good else 'not good enough'}. {word.note}".rstrip())
    if not found.valid:
        raise SystemExit(1)


def tell(found: approval.Standing) -> None:
    if given := found.approval:
        how = "valid" if found.valid else "in doubt" if found.unsure else "void"
        print(f"approval {given.id} by {given.who} ({given.role}), {units.moment(given.time)}: {how}")
        print(f"covers {', '.join(file.quant for file in given.files)}, {units.size(given.bytes)}")
        if given.note:
            print(f"note: {given.note}")
    for line in (*found.reasons, *found.later):
        print(line)


def show_audit(options: argparse.Namespace) -> None:
    at = home()
    entries, broken = audit.read(at), audit.broken(at)
    if options.json:
        print(json.dumps({"broken": broken, "lines": msgspec.to_builtins(entries)}, indent=2, ensure_ascii=True))
    elif not options.check:
        rows = [[e.number, e.time[:19], e.event, e.who, e.role, audit.words(e)] for e in entries]
        show(rows, ["line", "when, UTC", "what", "who", "role", "about"])
    if broken:
        raise ApprovalError(broken)
    number, sha256 = audit.head(at)
    say(f"The chain holds over {number} lines" + (f"; the last one's sha256 is {sha256}." if number else "."))


def allow_reviewers(options: argparse.Namespace) -> None:
    at = home()
    if options.allowed:
        approval.let_reviewers_approve(at, options.allowed == "yes", who=options.who)
    print(f"reviewers may approve: {'yes' if approval.reviewers_may_approve(at) else 'no'}")


def register(commands: Commands) -> None:
    p = command(commands, "approve", approve, "say that the accepted files of an export may leave, after reading them")
    p.add_argument("export")
    p.add_argument("--who", required=True, help="your name, for the approval and the log")
    p.add_argument("--note", default="")
    p.add_argument("--files", nargs="+", metavar="QUANT", help="only these (default: all that passed every check)")

    p = command(commands, "withdraw", withdraw, "take an export's approval back")
    p.add_argument("export")
    p.add_argument("--who", required=True, help="your name, for the log")
    p.add_argument("--note", default="")

    p = command(commands, "approval", show_approval, "how an export's approval stands, and what it was given on")
    p.add_argument("export")
    p.add_argument("--check", action="store_true", help="read every file whole, instead of its size and time alone")
    p.add_argument("--json", action="store_true")

    p = command(commands, "audit", show_audit, "who approved, withdrew, allowed and pushed what")
    p.add_argument("--check", action="store_true", help="only say whether the log's chain holds")
    p.add_argument("--json", action="store_true")

    p = command(commands, "allow-reviewers", allow_reviewers, "whether reviewers may approve; without a word, say so")
    p.add_argument("allowed", nargs="?", choices=("yes", "no"))
    p.add_argument("--who", default="command line", help="your name, for the log (default: %(default)s)")
