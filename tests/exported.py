"""A finished export in a home, in milliseconds: SFT, DPO and export runs whose files are short, but are what their
manifest says. They are no models: for tests of what is done with files that nobody loads."""

import hashlib
import json
from pathlib import Path
from typing import Any

from katherine import runs
from katherine.runs import Run, State
from katherine.settings import Home

CHECKS = ("loads", "template", "kl")
QUANTS = ("q4_k_m", "q5_k_m", "q6_k")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def exported(home: Home, quants: tuple[str, ...] = QUANTS, failing: tuple[str, ...] = ()) -> Run:
    """The export run; in `failing`, quants that did not pass a check."""
    sft = trained(home, "sft", None)
    dpo = trained(home, "dpo", sft.id)
    export = runs.create(home, "export", recipe={"quants": list(quants)}, who="test", parent=dpo.id)
    folder = export.out / "gguf"
    folder.mkdir()
    files = []
    for quant in quants:
        path = folder / f"invented-{quant}.gguf"
        path.write_bytes(f"GGUF of {quant}, invented. ".encode() * 40)
        files.append(entry(path, quant, quant not in failing))
    manifest = {
        "base": "invented/base",
        "files": files,
        "unquantised": files[0] | {"quant": "bf16", "file": "invented-bf16.gguf", "kept": False},
        "drift": {"kl": 0.001, "top1": 0.99, "passed": True},
        "seconds": {"merge": 1.0},
        "adapter_sha256": sha256(dpo.out / "adapter" / "adapter_model.safetensors"),
        "template_sha256": hashlib.sha256(b"template").hexdigest(),
    }
    runs.write_json(folder / "manifest.json", manifest)
    ended(export, {"files": files})
    return export


def trained(home: Home, kind: str, parent: str | None) -> Run:
    run = runs.create(home, kind, recipe={"base": "invented/base"}, who="test", parent=parent)
    adapter = run.out / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(f"weights of {run.id}".encode())
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "base.json").write_text(json.dumps({"name": "invented/base"}))
    ended(run, {"steps": 1, "first_loss": 2.0, "last_loss": 1.0})
    return run


def probed(home: Home, export: Run, counts: dict[str, tuple[int, int]]) -> Run:
    """A probe run on the export: model → (asked, passed)."""
    run = runs.create(home, "probe", recipe={"probes": "katherine"}, who="test", parent=export.id)
    models = {model: {"asked": asked, "passed": passed} for model, (asked, passed) in counts.items()}
    ended(run, {"models": models, "answers": {}})
    return run


def entry(path: Path, quant: str, accepted: bool = True) -> dict[str, Any]:
    checks = [{"name": name, "passed": True, "finding": "fine"} for name in CHECKS]
    if not accepted:
        checks[-1] |= {"passed": False, "finding": "too far"}
    return {
        "quant": quant,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "accepted": accepted,
        "checks": checks,
        "bits_per_weight": 4.5,
    }


def ended(run: Run, result: dict[str, Any]) -> None:
    runs.write_json(run.path / "result.json", result)
    run.set_status(state=State.succeeded, attempt=1, started=runs.now(), ended=runs.now())
