"""Putting a probe set to models, and scoring what they say: by the rules that each probe declares, never by a hidden
judge. What no rule can decide is for a person. What a set is belongs to probesets, what answers to speakers, and what
the scores add up to to scorecard."""

import contextlib
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from katherine import bases, columns, probesets, speakers
from katherine import export as exports
from katherine.errors import DataError, EngineError, KatherineError, NotFound
from katherine.examples import Message
from katherine.probesets import Probe, ProbeSet
from katherine.progress import Progress, Stopped
from katherine.recipe import ProbeRecipe
from katherine.runs import Run
from katherine.settings import Home, home
from katherine.speakers import Reply, Speaker
from katherine.template import ChatTemplate

# Text that only a model thinking aloud writes; every probe is held to its absence, declared or not.
_THINKING = re.compile(r"</?think(ing)?>", re.I)
# Of this process's own time. An honest rule takes under a millisecond on the longest answer.
RULE_SECONDS = 1.0
# A run's copy of the set that it asks, and what it was told.
FROZEN = "probes.toml"
ANSWERS = "answers.jsonl"


# ---------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True)
class Score:
    """passed: None where it is for a person: the probe has no rule of its own, or none was broken and one could not be
    decided. reasons: every rule that was broken, or could not be decided, in words. held: those that held."""

    passed: bool | None
    reasons: tuple[str, ...]
    held: tuple[str, ...] = ()


class _TooSlow(Exception):
    pass


def score(probe: Probe, reply: Reply) -> Score:
    """Every rule, with those that hold for all probes: it says something, ends by itself, and does not think aloud.

    A rule that finds no end is bounded by a timer of the process, so that this is to be called from a main thread: in
    the run's process, not in the panel's."""
    text = reply.text.strip()
    broken: list[str] = []
    held: list[str] = []
    unclear: list[str] = []
    if not text:
        broken.append("said nothing")
    if probe.must_end:
        if reply.ended:
            held.append("ended by itself")
        else:
            broken.append(f"did not end by itself within {reply.tokens} tokens")
    if found := _THINKING.search(text):
        broken.append(f"thought aloud: {found.group()!r}")
    for rule in probe.must:
        try:
            found = _search(rule, text)
        except _TooSlow:
            unclear.append(_slow(rule))
            continue
        if found:
            held.append(f"says {_quoted(found)}, as {rule} asks")
        else:
            broken.append(f"lacks {rule!r}")
    for rule in probe.must_not:
        try:
            found = _search(rule, text)
        except _TooSlow:
            unclear.append(_slow(rule))
            continue
        if found:
            broken.append(f"says {_quoted(found)}, against {rule!r}")
        else:
            held.append(f"nothing matches {rule}")
    words = len(text.split())
    if probe.max_words is not None:
        if words > probe.max_words:
            broken.append(f"has {words} words, more than {probe.max_words}")
        else:
            held.append(f"has {words} words, at most {probe.max_words}")
    if probe.min_words is not None:
        if words < probe.min_words:
            broken.append(f"has {words} words, fewer than {probe.min_words}")
        else:
            held.append(f"has {words} words, at least {probe.min_words}")
    decided: bool | None = not broken
    # A probe that nothing can make pass must not fail either, or it would pull every rate down.
    if not probe.has_rule or (unclear and not broken):
        decided = None
    return Score(decided, tuple(broken + unclear), tuple(held))


def _quoted(found: re.Match[str]) -> str:
    return repr(found.group())


def _slow(rule: str) -> str:
    return f"could not be held against {rule!r}: it did not come to an end within {RULE_SECONDS:g} s"


def _search(rule: str, text: str) -> re.Match[str] | None:
    """re.search, or _TooSlow: Python's matcher looks for signals while it backtracks."""

    def ring(*_: object) -> None:
        raise _TooSlow

    # The processor's time, not the clock's: a busy machine does not make a rule slow.
    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, RULE_SECONDS)
        try:
            return re.search(rule, text)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------- asking


def ask(
    speaker: Speaker, template: ChatTemplate, probes: Sequence[Probe], recipe: ProbeRecipe
) -> dict[str, tuple[list[Message], Reply]]:
    """Puts probes to one model: probe id → (the whole talk, the last reply). They are asked together, turn by turn, so
    that a model that can answer many at once does."""
    talks: dict[str, list[Message]] = {probe.id: [] for probe in probes}
    last: dict[str, Reply] = {}
    for turn in range(max(len(probe.questions) for probe in probes)):
        asked = [probe for probe in probes if turn < len(probe.questions)]
        for probe in asked:
            talks[probe.id].append(Message("user", probe.questions[turn]))
        replies = speaker.replies(
            [template.prompt(talks[probe.id]) for probe in asked],
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            seed=recipe.seed,
        )
        for probe, reply in zip(asked, replies, strict=True):
            talks[probe.id].append(Message("assistant", reply.text))
            last[probe.id] = reply
    return {probe.id: (talks[probe.id], last[probe.id]) for probe in probes}


@dataclass(frozen=True, slots=True)
class Asked:
    """One file that is asked. model: what its answers go by: the quant where it is the export's own, else the column's
    id. The rest as columns.Column has it."""

    model: str
    column: str
    base: str
    path: Path
    sha256: str
    bytes: int


def asked_of(at: Home, export: Run, column_ids: Sequence[str]) -> dict[str, Any]:
    """The fields of a ProbeRecipe by which these columns are asked, and no others: "own", "quants" and "columns". An id
    is as columns has it, or a quant of `export`. Raises NotFound or DataError for one that cannot be asked."""
    own = [column.quant for column in columns.of_export(at, export)]
    quants: list[str] = []
    others: list[str] = []
    for column_id in dict.fromkeys(column_ids):
        column = columns.get(at, column_id if ":" in column_id else f"{export.id}:{column_id}")
        (quants if column.export == export.id else others).append(
            column.quant if column.export == export.id else column.id
        )
    # All that it offers, so that the recipe is the one that a pipeline has.
    whole = set(quants) == set(own)
    return {"own": bool(quants), "quants": [] if whole else quants, "columns": others}


def text_of(at: Home, name: str) -> str:
    """The text of a set that is about to be asked. Raises NotFound, or DataError where it cannot be."""
    probesets.load(at, name)
    return probesets.text(at, name)


def frozen(out: Path) -> ProbeSet | None:
    """The set that a run asks or asked, as it was then; None for runs of before it was kept. Raises DataError."""
    text = _frozen(out)
    return None if text is None else probesets.read(text, str(out / FROZEN))


def fingerprint(out: Path) -> str:
    """The sha256 of that set's text; "" where there is none. Raises DataError."""
    text = _frozen(out)
    return "" if text is None else probesets.sha256(text)


def _frozen(out: Path) -> str | None:
    try:
        return (out / FROZEN).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{out / FROZEN} is damaged ({error}): run the probes again.") from error


def run(
    export: Path, adapters: Mapping[str, Path], recipe: ProbeRecipe, out: Path, progress: Progress
) -> dict[str, Any]:
    """Puts a probe set to the GGUFs that `export` (an export run's out folder) offers, as far as recipe.own and quants
    say, and to recipe.columns; and, with recipe.stages, the probes marked compare to the base and to `adapters` (stage
    → adapter folder, in their order) before.

    Writes out/answers.jsonl, an answer a line as it is given, and out/probes.toml, the set, unless it is there. What
    was asked before a stop or a crash is not asked again. Returns {"models": {name: {"asked", "passed", "undecided"}},
    "answers": {question: {model: text}} of the probes marked compare, "columns": {name: which file}, "set"}.

    Raises NotFound or DataError where no file is offered. A file that cannot be asked does not keep the others from
    it: EngineError names it at the end, when they all have been.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / FROZEN).is_file():
        _keep(out, text_of(home(), recipe.probes))
    chosen = frozen(out)
    assert chosen is not None
    manifest = export / "gguf" / exports.MANIFEST
    files = _own(export.parent.name, manifest, recipe) if recipe.own else []
    if not (files or recipe.columns) and not (recipe.stages and adapters):
        raise DataError(f"{manifest} offers no file: each failed a check or was changed. See the acceptance table.")
    files, unfit = _with_others(files, recipe, progress)
    compared = [probe for probe in chosen.probe if probe.compare]
    stages = list(adapters) if recipe.stages and compared else []
    expected = {file.model: file.sha256 for file in files} | (
        {name: "" for name in ("base", *stages)} if stages else {}
    )
    with Record(out, chosen.probe, expected) as record:
        if stages and any(record.left(name, compared) for name in ("base", *stages)):
            _stop_if_asked(progress)
            progress.phase("load the base and its adapters")
            template = _template(msgspec.json.decode(manifest.read_bytes())["base"])
            with speakers.stages(adapters, template, progress) as models:
                for name, speaker in models.items():
                    _stop_if_asked(progress)
                    progress.phase(f"ask {name}")
                    if left := record.left(name, compared):
                        progress.step(0, len(compared))
                        record.add(name, left, ask(speaker, template, left, recipe))
        for number, file in enumerate(files, 1):
            try:
                _put(file, f"ask {_called(file)} ({number} of {len(files)})", chosen, recipe, record, progress)
            except KatherineError as error:
                progress.say(f"{file.model} cannot be asked: {error}")
                unfit.append(f"{file.model}: {error}")
        if unfit:
            others = "The others were asked. " if record.summary else ""
            raise EngineError("\n".join([*unfit, f"{others}Resume the run to ask what is left once that is mended."]))
        return {
            "models": record.summary,
            "answers": record.answers,
            "columns": {
                file.model: {"column": file.column, "file": file.path.name, "sha256": file.sha256, "bytes": file.bytes}
                for file in files
            },
            "set": {
                "name": chosen.name,
                "sha256": fingerprint(out),
                "probes": len(chosen.probe),
            },
        }


def _keep(out: Path, text: str) -> None:
    draft = out / f".{FROZEN}"
    draft.write_bytes(text.encode())
    draft.replace(out / FROZEN)


def _template(base: str) -> ChatTemplate:
    return ChatTemplate.load(bases.tokenizer(home(), base))


def _own(run_id: str, manifest: Path, recipe: ProbeRecipe) -> list[Asked]:
    """The export's own files that are to be asked. Raises NotFound for one that it does not offer."""
    offered = {str(entry["quant"]): entry for entry in exports.offered(manifest)}
    if missing := [quant for quant in recipe.quants if quant not in offered]:
        there = ", ".join(offered) or "no file"
        raise NotFound(f"{manifest} does not offer {missing[0]}: it offers {there}. See the acceptance table.")
    base = str(msgspec.json.decode(manifest.read_bytes())["base"])
    return [
        Asked(quant, f"{run_id}:{quant}", base, Path(entry["path"]), str(entry["sha256"]), int(entry["bytes"]))
        for quant, entry in offered.items()
        if not recipe.quants or quant in recipe.quants
    ]


def _with_others(own: list[Asked], recipe: ProbeRecipe, progress: Progress) -> tuple[list[Asked], list[str]]:
    """With the columns beside the export's own, and why some of them cannot be asked."""
    files, unfit = list(own), []
    for column_id in recipe.columns:
        if any(file.column == column_id for file in own):
            continue
        _stop_if_asked(progress)
        progress.phase(f"check {column_id}")
        try:
            column = columns.get(home(), column_id)
            columns.verify(column)
        except KatherineError as error:
            progress.say(f"{column_id} cannot be asked: {error}")
            unfit.append(f"{column_id}: {error}")
            continue
        files.append(Asked(column_id, column_id, column.base, column.path, column.sha256, column.bytes))
    return files, unfit


def _called(file: Asked) -> str:
    """In a phase, where there is room for a few words: "q4_k_m", "export-25b57f q4_k_m"."""
    if file.model != file.column:
        return file.model
    run, _, quant = file.column.partition(":")
    return f"{run.split('-', 2)[-1]} {quant}"


def _put(file: Asked, phase: str, chosen: ProbeSet, recipe: ProbeRecipe, record: "Record", progress: Progress) -> None:
    """The whole set to one file, a probe after the other, so that a stop loses one question at most."""
    left = record.left(file.model, chosen.probe)
    if not left:
        return
    _stop_if_asked(progress)
    progress.phase(phase)
    template = _template(file.base)
    with speakers.gguf(file.path) as quant:
        done = len(chosen.probe) - len(left)
        for number, probe in enumerate(left, done):
            progress.step(number, len(chosen.probe))
            _stop_if_asked(progress)
            record.add(file.model, [probe], ask(quant, template, [probe], recipe), file)
        progress.step(len(chosen.probe), len(chosen.probe))


def _stop_if_asked(progress: Progress) -> None:
    if progress.stop_requested():
        raise Stopped


# ---------------------------------------------------------------------------------------------------- what was said


class Answer(msgspec.Struct, frozen=True):
    """One line of answers.jsonl: what a model said to a probe. talk: all turns, the last answer included. reply: the
    last answer, and how it ended. column, sha256: which file said it, "" for the base and the adapters, and for all in
    runs of before it was kept."""

    model: str
    probe: str
    category: str
    talk: tuple[Message, ...]
    score: Score
    reply: Reply | None = None
    column: str = ""
    sha256: str = ""


_answer = msgspec.json.Decoder(Answer).decode


def answers(out: Path) -> list[Answer]:
    """What a probe run's out folder recorded, in the order in which it was asked; [] before there is anything. Raises
    DataError for a damaged file."""
    path = out / ANSWERS
    try:
        lines = path.read_bytes().split(b"\n")
        # What follows the last line's end is being written, or was when the machine died.
        return [_answer(line) for line in lines[:-1] if line]
    except FileNotFoundError:
        return []
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): run the probes again.") from error


class Record:
    """The answers of a probe run: one line each in answers.jsonl, counts by model, and the answers to compare. Begins
    with those that the file holds already of these probes and of the files by these sha256 (model → sha256)."""

    def __init__(self, out: Path, probes: Iterable[Probe], expected: Mapping[str, str]):
        self._path = out / ANSWERS
        self._probes = {probe.id: probe for probe in probes}
        self._expected = dict(expected)
        self._said: dict[tuple[str, str], Answer] = {}

    def __enter__(self) -> "Record":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(DataError):
            for each in answers(self._path.parent):
                if each.probe in self._probes and self._expected.get(each.model) == each.sha256:
                    self._said[each.model, each.probe] = each
        draft = self._path.with_name(f".{ANSWERS}")
        draft.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in self._said.values()))
        draft.replace(self._path)
        self._lines = self._path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def left(self, model: str, probes: Sequence[Probe]) -> list[Probe]:
        """Those of the probes that the model was not asked yet."""
        return [probe for probe in probes if (model, probe.id) not in self._said]

    def add(
        self,
        model: str,
        probes: Sequence[Probe],
        given: Mapping[str, tuple[list[Message], Reply]],
        file: Asked | None = None,
    ) -> None:
        for probe in probes:
            talk, reply = given[probe.id]
            said = Answer(
                model,
                probe.id,
                probe.category,
                tuple(talk),
                score(probe, reply),
                reply,
                file.column if file else "",
                file.sha256 if file else "",
            )
            self._lines.write(msgspec.json.encode(said) + b"\n")
            self._said[model, probe.id] = said
        self._lines.flush()

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """model → "asked", of which "passed" and "undecided": for a person. The others failed."""
        found: dict[str, dict[str, int]] = {}
        for each in self._said.values():
            counts = found.setdefault(each.model, {"asked": 0, "passed": 0, "undecided": 0})
            counts["asked"] += 1
            counts["passed"] += each.score.passed is True
            counts["undecided"] += each.score.passed is None
        return found

    @property
    def answers(self) -> dict[str, dict[str, str]]:
        """Of the probes marked compare: the last question → model → what it said."""
        return {
            probe.questions[-1]: said
            for probe in self._probes.values()
            if probe.compare and (said := dict(self._of(probe)))
        }

    def _of(self, probe: Probe) -> Iterator[tuple[str, str]]:
        for (model, asked), each in self._said.items():
            if asked == probe.id:
                yield model, each.talk[-1].content
