"""Words on publishing: push and its receipts."""

import argparse
import json

import msgspec

from jobs.commands.terminal import Commands, command, done, show
from katherine import publish, units
from katherine import runs as folders
from katherine.errors import KatherineError
from katherine.settings import home


def push(options: argparse.Namespace) -> None:
    at = home()
    if options.dry_run:
        show_plan(publish.plan(at, options.export), options.json)
        return
    if not options.to:
        raise KatherineError("Say where to: --to OWNER/BUCKET.")
    request = {"export": options.export, "to": options.to, "who": options.who, "role": "operator"}
    if options.repo:
        request["repo"] = options.repo
    wanted = done(at, "push", request, options.who)["receipt"]
    found = next(receipt for receipt in publish.receipts(at, options.export) if receipt.id == wanted)
    if options.json:
        print(json.dumps(msgspec.to_builtins(found), ensure_ascii=False))
    else:
        show_receipt(found)


def show_plan(plan: publish.Plan, as_json: bool) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(plan), ensure_ascii=False))
        return
    show([[file.path, units.size(file.bytes)] for file in plan.files], [f"in {plan.folder}/", "size"])
    print(f"{len(plan.files)} files, {units.size(plan.bytes)}")
    for reason in plan.reasons:
        print(f"not yet: {reason}")


def list_receipts(options: argparse.Namespace) -> None:
    at = home()
    exports = [options.export] if options.export else [r.id for r in folders.everyone(at) if r.record.kind == "export"]
    found = [receipt for export in exports for receipt in publish.receipts(at, export)]
    if options.json:
        print(json.dumps(msgspec.to_builtins(found), ensure_ascii=False))
    elif options.export:
        for receipt in found:
            show_receipt(receipt)
            print()
    else:
        show(
            [[one.id, one.export, one.bucket, len(one.files), units.size(one.bytes), one.who] for one in found],
            ["push", "export", "bucket", "files", "size", "who"],
        )


def show_receipt(receipt: publish.Receipt) -> None:
    print(f"push {receipt.id} by {receipt.who}, {units.moment(receipt.time)}, {units.duration(receipt.seconds)}")
    print(f"{receipt.url}, folder {receipt.folder}, by approval {receipt.approval}")
    if receipt.repository:
        print(f"{receipt.repository_url}" + (f", commit {receipt.commit}" if receipt.commit else ", all was there"))
    show(
        [[file.path.removeprefix(f"{receipt.folder}/"), units.size(file.bytes), file.sha256,
          "sent" if file.now else "was there"] for file in receipt.files],
        ["file", "size", "sha256", ""],
    )  # fmt: skip
    for path in receipt.others:
        print(f"also there, and not of this push: {path}")


def register(commands: Commands) -> None:
    p = command(commands, "push", push, "send an approved export to a private bucket of the Hugging Face hub")
    p.add_argument("export")
    p.add_argument("--to", metavar="OWNER/BUCKET", help="made, private, where it is not there; refused where public")
    p.add_argument("--repo", metavar="OWNER/NAME", help="to this private model repository as well")
    p.add_argument("--who", default="command line", help="your name, for receipt and log (default: %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="only show what would go, and ask nobody")
    p.add_argument("--json", action="store_true")

    p = command(commands, "receipts", list_receipts, "what was pushed where: of one export, or of all")
    p.add_argument("export", nargs="?")
    p.add_argument("--json", action="store_true")
