"""Where a run comes from, down to the dataset and its files, and what was made of it: nodes and edges as data. Drawing
them is a page's business; what each run is belongs to runs and history."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from katherine import shelf
from katherine.errors import DataError, NotFound
from katherine.history import History, Seen
from katherine.runs import RunRecord
from katherine.settings import Home

# As many descendants as a drawing can show at a size that can be read; the rest are counted.
MOST = 24
# As many files of a dataset as a node can name.
_FILES = 4
MISSING = "missing"
CHANGED = "changed"
DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Node:
    """id: a run's or dataset's own, else made up. kind: "files", "dataset", a run's kind, "more" for descendants that
    are only counted, or "run" for one that is gone. name: what to call it. state: a run's state, "missing", "damaged"
    or, for a dataset that is no longer what the run was asked about, "changed"; "" where all is well. facts: what
    matters about it, a few words each."""

    id: str
    kind: str
    name: str
    state: str = ""
    facts: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        return self.kind not in ("files", "dataset", "more", "run")


@dataclass(frozen=True, slots=True)
class Lineage:
    """of: the id of the node that was asked about. edges: (from, to), as the data goes. nodes: each after the ones it
    comes from."""

    of: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]

    def children(self, node_id: str) -> tuple[Node, ...]:
        by_id = {node.id: node for node in self.nodes}
        return tuple(by_id[to] for at, to in self.edges if at == node_id)

    def parents(self, node_id: str) -> tuple[Node, ...]:
        by_id = {node.id: node for node in self.nodes}
        return tuple(by_id[at] for at, to in self.edges if to == node_id)

    def lines(self) -> list[str]:
        """As text, one node a line, each indented below the one it comes from."""
        depth: dict[str, int] = {}
        found = []
        for node in self.in_depth():
            above = [depth[parent.id] for parent in self.parents(node.id) if parent.id in depth]
            depth[node.id] = max(above) + 1 if above else 0
            mark = "→ " if node.id == self.of else "  "
            said = [node.state] * bool(node.state) + list(node.facts)
            name = node.name if node.kind in ("more", "files") else f"{node.kind} {node.name}"
            found.append(mark + "  " * depth[node.id] + name + (f": {', '.join(said)}" if said else ""))
        return found

    def in_depth(self) -> Iterator[Node]:
        """Each node after all it comes from, and what comes of it right after it."""
        todo = [node for node in reversed(self.nodes) if not self.parents(node.id)]
        told: set[str] = set()
        while todo:
            node = todo.pop()
            if node.id in told or any(parent.id not in told for parent in self.parents(node.id)):
                continue
            told.add(node.id)
            yield node
            todo += reversed(self.children(node.id))


def trace(home: Home, history: History, run_id: str, among: Sequence[Seen] | None = None) -> Lineage:
    """The run's ancestors to the dataset and its files, and all its descendants. What is gone is a node that says so.
    among: the history's runs, newest first, where they have just been read. Raises NotFound or DataError for the run
    itself alone."""
    everyone = history.runs() if among is None else among
    known = {seen.id: seen for seen in everyone}
    chosen = known.get(run_id) or history.get(run_id)
    line, gone = _ancestors(chosen, known)
    below, count = _descendants(chosen.id, everyone)
    nodes: dict[str, Node] = {}
    edges: list[tuple[str, str]] = []
    if gone is not None:
        nodes[gone] = Node(gone, "run", gone, MISSING)
    given: dict[str, str | None] = {}
    for seen in [*line, *below]:
        record = seen.run.record
        given[seen.id] = record.dataset
        # A dataset stands where the line first learned from it: most lines have one, at their root.
        if record.dataset is not None and record.dataset != given.get(str(record.parent)):
            found = _dataset(home, record)
            nodes |= {node.id: node for node in found}
            edges += [(at.id, to.id) for at, to in pairwise(found) if (at.id, to.id) not in edges]
            edges.append((record.dataset, seen.id))
        nodes[seen.id] = _run(history, seen)
        if record.parent in nodes:
            edges.append((record.parent, seen.id))
    if count > len(below):
        nodes["more"] = Node("more", "more", f"and {count - len(below)} more")
        edges.append((chosen.id, "more"))
    return Lineage(chosen.id, tuple(nodes.values()), tuple(edges))


def _ancestors(chosen: Seen, known: dict[str, Seen]) -> tuple[list[Seen], str | None]:
    """The line from the oldest run that is still there to the chosen one, and the id of that one's parent if it is
    gone."""
    line = [chosen]
    while (parent := line[0].run.record.parent) is not None:
        if parent not in known:
            return line, parent
        if known[parent] in line:  # only a run.json that was edited by hand
            break
        line.insert(0, known[parent])
    return line, None


def _descendants(run_id: str, everyone: Sequence[Seen]) -> tuple[list[Seen], int]:
    """Up to MOST runs that build on the run, each after its parent and the oldest first, and how many there are."""
    children: dict[str, list[Seen]] = {}
    for seen in reversed(everyone):
        children.setdefault(str(seen.run.record.parent), []).append(seen)
    found: list[Seen] = []
    todo = [run_id]
    told = {run_id}
    while todo:
        for seen in children.get(todo.pop(0), ()):
            if seen.id not in told:
                told.add(seen.id)
                found.append(seen)
                todo.append(seen.id)
    return found[:MOST], len(found)


def _run(history: History, seen: Seen) -> Node:
    facts = tuple(words for words in history.outcome(seen).words().split(", ") if words)
    return Node(seen.id, seen.kind, seen.id, DAMAGED if seen.damage else str(seen.status.state), facts)


def _dataset(home: Home, record: RunRecord) -> list[Node]:
    """The dataset's files as one node, then the dataset; the dataset alone where it cannot be read."""
    dataset_id = str(record.dataset)
    node = Node(dataset_id, "dataset", dataset_id)
    try:
        # Not the report: it may name a million problems.
        report = shelf.summary(home, dataset_id).report
        facts = (f"{report['sft']['unique']:,} examples", f"{report['dpo']['used']:,} pairs")
        names = [f"{entry['file']}, {entry['lines']:,} lines" for entry in report["by_file"]]
    except NotFound:
        return [replace(node, state=MISSING)]
    except (DataError, KeyError, ValueError, TypeError):
        return [replace(node, state=DAMAGED)]
    asked = record.inputs.get("dataset")
    state = CHANGED if asked is not None and asked != report["fingerprint"] else ""
    shown = names if len(names) <= _FILES + 1 else [*names[:_FILES], f"and {len(names) - _FILES} more"]
    files = Node(f"files of {dataset_id}", "files", f"{len(names)} {'file' if len(names) == 1 else 'files'}")
    return [replace(files, facts=tuple(shown)), replace(node, state=state, facts=facts)]
