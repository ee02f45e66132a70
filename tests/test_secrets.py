"""Where a secret may be found once the panel runs: in its memory, and in the one process that it is meant for."""

import os
from pathlib import Path

from katherine import settings
from katherine.settings import SECRETS, child_environment, hide_secrets, secret

CANARY = "hf_canaryCANARYcanary"


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_the_panel_runs_without_its_secrets_in_sight(tmp_path, serving):
    served = serving(tmp_path / "home", HF_TOKEN=CANARY, SOME_CLOUD_SECRET_KEY=CANARY, HARMLESS="kept")
    shown = environment_of(served.pid)
    assert CANARY.encode() not in shown and b"operator-under-test" not in shown
    assert b"HARMLESS=kept" in shown
    # Nor can what carried them over still be read.
    handles = [os.readlink(handle) for handle in Path(f"/proc/{served.pid}/fd").iterdir()]
    assert not any("secrets" in handle for handle in handles)
    # They are known all the same: with this password one comes in.
    assert served.client("operator").get("/operator/config").status_code == 200


def test_a_child_is_given_what_is_named_whether_hidden_or_not(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setitem(settings._hidden, "HF_TOKEN", "hidden")
    given = child_environment("HF_TOKEN", ADDED="1")
    assert (given["HF_TOKEN"], given["ADDED"], secret("HF_TOKEN")) == ("hidden", "1", "hidden")
    assert not set(SECRETS) - {"HF_TOKEN"} & set(given)


def test_without_secrets_nothing_is_started_anew(monkeypatch):
    for name in [name for name in os.environ if settings._is_secret(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "execve", lambda *_: (_ for _ in ()).throw(AssertionError("started anew")))
    hide_secrets()
