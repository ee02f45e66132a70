"""Words on what reviewers said: verdicts, feedback."""

import argparse
from collections.abc import Sequence

from jobs.commands.terminal import Commands, command, done, say, show
from katherine import feedback, judgement, runs
from katherine.errors import DataError, NotFound
from katherine.feedback import Candidate
from katherine.settings import Home, home
from katherine.units import moment

# Characters of a text in a table: three of them and a few short columns fit a terminal of 200.
SHOWN = 50
# Of a candidate's id, as git shortens its own: enough to tell thousands apart.
SHORT = 10
WORST = 10


def verdicts(options: argparse.Namespace) -> None:
    at = home()
    _export(at, options.export)
    found = judgement.of_export(at, options.export, runs.everyone(at))
    if not found.reviewers:
        say("Nobody has said anything about this export yet. Reviewers do so at /review/ of the panel.")
        return
    rows = []
    for one in found.reviewers:
        word = one.recommendation
        sets = [f"{name} {count}" for name, count in one.sets.items()] + ([f"free {one.free}"] if one.free else [])
        said = "" if word is None else ("good to go" if word.good else "not yet") + f" {word.column.partition(':')[2]}"
        rows.append(
            [one.name, one.judged, ", ".join(sets), moment(one.last), said.strip(), _short(word.note if word else "")]
        )
    show(rows, ["who", "judged", "questions of", "last", "recommends", "note"])
    print()
    show(
        [[one.quant, f"{one.preferred} of {one.compared}", one.ties, one.none_good, one.up, one.down, one.words()]
         for one in found.standings],
        ["quant", "preferred", "ties", "none good", "up", "down", "which means"],
    )  # fmt: skip
    print(f"\n{found.position.words()}\n{found.agreement.words()}")
    worst = found.worst if options.all else found.worst[:WORST]
    if worst:
        print()
        show(
            [[one.judged.quant, len(one.down), len(one.up), len(one.none_good), "; ".join(one.broken),
              _short(one.verdict.question), _short(one.judged.text), _short(" / ".join(n.text for n in one.notes))]
             for one in worst],
            ["worst", "down", "up", "none good", "rules broken", "question", "answer", "notes"],
        )  # fmt: skip
        if len(found.worst) > len(worst):
            say(f"and {len(found.worst) - len(worst)} more: --all shows them")
    if found.notes and options.all:
        print()
        show([[note.reviewer, note.quant, _short(note.question), note.text] for note in found.notes],
             ["who", "quant", "question", "note"])  # fmt: skip


def next_round(options: argparse.Namespace) -> None:
    """The pairs that follow from verdicts; with --onto, a dataset with those that go in."""
    at = home()
    for export in options.exports:
        _export(at, export)
    onto = options.onto or feedback.own_dataset(at, options.exports[0])
    survey = feedback.survey(at, options.exports, onto)
    gone = _named(survey.pairs, options.leave_out or [])
    chosen = [one for one in survey.pairs if one.included and one.id not in gone]
    if not options.onto:
        show(
            [[one.id[:SHORT], "yes" if one in chosen else "no", one.how, _short(one.question), _short(one.chosen),
              _short(one.rejected), ", ".join(one.people), _state(one)] for one in survey.pairs],
            ["pair", "in", "how", "question", "chosen", "rejected", "who", ""],
        )  # fmt: skip
        for reason, count in survey.left_out.items():
            say(f"no pair, {count} times: {reason}")
        if chosen:
            say(f"To make the next dataset with {len(chosen)} of them: --onto {onto or 'DATASET'}")
        return
    file = feedback.write(at, chosen)
    made = done(at, "prepare", feedback.request(at, onto, file, options.name or ""))["dataset"]
    say(feedback.came_of(at, made, file.name))
    print(made)


def _named(found: Sequence[Candidate], beginnings: Sequence[str]) -> set[str]:
    """The candidates whose ids begin so. Raises NotFound or DataError where that is none, or several."""
    named = set()
    for beginning in beginnings:
        those = [one.id for one in found if one.id.startswith(beginning)]
        if not those:
            raise NotFound(f"There is no pair {beginning}. `feedback EXPORT` lists them.")
        if len(those) > 1:
            raise DataError(f"{len(those)} pairs begin with {beginning}: give more of its id.")
        named.add(those[0])
    return named


def _state(one: Candidate) -> str:
    said = [f"opposed by {one.opposed[:SHORT]}"] * bool(one.opposed) + ["reworded"] * bool(one.given)
    return ", ".join([*said, *(f"in {name}" for name in one.datasets)])


def _export(at: Home, run_id: str) -> None:
    if runs.load(at, run_id).record.kind != "export":
        raise NotFound(f"Run {run_id} is not an export.")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


def register(commands: Commands) -> None:
    p = command(
        commands, "verdicts", verdicts, "what reviewers said of an export: by quant, by person, worst answers first"
    )
    p.add_argument("export")
    p.add_argument("--all", action="store_true", help="every answer that somebody minded, and every note")

    p = command(
        commands, "feedback", next_round, "the preference pairs that follow from verdicts, and a dataset with them"
    )
    p.add_argument("exports", nargs="+", metavar="EXPORT")
    p.add_argument("--onto", metavar="DATASET", help="make a new dataset: this one and the pairs")
    p.add_argument(
        "--leave-out", nargs="+", metavar="PAIR", help="pairs that do not go in, by the beginning of their id"
    )
    p.add_argument("--name", help="a name for the new dataset")
