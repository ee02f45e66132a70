"""Words on this machine: demo, doctor, autostop."""

import argparse
import json

from jobs import autostop, demo
from jobs.commands.terminal import Commands, command, figure, say, show
from katherine import (
    doctor,
)
from katherine.settings import home


def run_demo(options: argparse.Namespace) -> None:
    result = demo.run(home(), say)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    show(
        [[stage, result[stage]["steps"], f"{result[stage]['first_loss']:.4f}", f"{result[stage]['last_loss']:.4f}",
          result["seconds"][stage]] for stage in ("sft", "dpo")],
        ["stage", "steps", "first loss", "last loss", "seconds"],
    )  # fmt: skip
    print(f"DPO margin: {result['dpo']['first_margin']:.3f} → {result['dpo']['last_margin']:.3f}\n")
    show(
        [[f["quant"], f"{f['bytes'] / 1e6:.0f} MB", figure(f["bits_per_weight"], ".2f"),
          "yes" if f["accepted"] else "NO",
          figure(f["perplexity"], ".3f"), figure(f["kl"], ".4f"), figure(f["top1"], ".1%")] for f in result["export"]],
        ["quant", "size", "bits/weight", "accepted", "perplexity", "KL", "top-1"],
    )  # fmt: skip
    print()
    decided = {model: counts["asked"] - counts["undecided"] for model, counts in result["probes"].items()}
    show([[m, f"{p['passed']} of {decided[m]}"] for m, p in result["probes"].items()], ["model", "probes passed"])
    for question, answers in result["answers"].items():
        print(f"\n{question}")
        for model, text in answers.items():
            print(f"  {model:>8}: {' '.join(text.split())}")
    print("\nseconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result["seconds"].items()))


def stop_pod_when_done(options: argparse.Namespace) -> None:
    at = home()
    if options.action_asked == "cancel":
        print(autostop.words(autostop.cancel(at, "the command line")))
        return
    if options.action_asked == "seen":
        autostop.acknowledge(at)
    elif options.action_asked != "status":
        autostop.configure(at, options.action_asked == "on", options.minutes)
    print(autostop.words(autostop.view(at)))


def examine(options: argparse.Namespace) -> None:
    checks = doctor.examine(home())
    show([[c.state, c.name, c.finding] for c in checks], ["", "what", "finding"])
    for check in checks:
        if check.remedy:
            print(f"{check.name}: {check.remedy}")
    if any(check.state == "problem" for check in checks):
        raise SystemExit(1)


def register(commands: Commands) -> None:
    p = command(commands, "demo", run_demo, "the whole pipeline on the sample persona and a small real base")
    p.add_argument("--json", action="store_true")
    command(commands, "doctor", examine, "what this machine can do, and what is wrong")

    p = command(commands, "autostop", stop_pod_when_done, "stop this RunPod pod when the queue has run empty")
    p.add_argument("action_asked", nargs="?", default="status", choices=("on", "off", "cancel", "seen", "status"),
                   help="seen: what was shouted need not be shown any more (default: %(default)s)")  # fmt: skip
    p.add_argument("--minutes", type=float, help="the countdown, in which anyone can cancel (on)")
