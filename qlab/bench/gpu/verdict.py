"""The outcomes against the goals: met, missed, or not measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from qlab.bench.contenders import LIBRARY, OURS
from qlab.bench.gpu.outcome import failure
from qlab.bench.gpu.plan import Step

MET, MISSED, UNMEASURED = "met", "missed", "not measured"
LEAST_RATIO = 0.95
Outcomes = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by step and call
Times = dict[tuple[str, int, int, int], Mapping[str, Any]]  # by contender, n, k and m


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Microseconds that a product may take, in one harness, at each of some numbers of tokens."""

    n: int
    k: int
    tokens: tuple[int, ...]
    harness: str
    most_us: float

    @property
    def text(self) -> str:
        how = {"graph_us": "CUDA graph", "events_us": "events, cold L2"}[self.harness]
        upto = f"M <= {self.tokens[-1]}" if len(self.tokens) > 1 else f"M = {self.tokens[0]}"
        return f"{self.n}x{self.k}, g128, {upto}: at most {self.most_us:g} us by {how}"


FEW = (1, 2, 4, 8, 16)
GOALS = (
    Goal(n=8192, k=8192, tokens=FEW, harness="graph_us", most_us=14.0),
    Goal(n=8192, k=8192, tokens=FEW, harness="events_us", most_us=19.0),
    Goal(n=8192, k=8192, tokens=(64,), harness="events_us", most_us=28.0),
)


def goals(steps: Sequence[Step], outcomes: Outcomes) -> list[dict[str, Any]]:
    """One row for each goal: what it says, whether it is met, and the figure."""
    times = _times(outcomes)
    planned = [
        (call.arguments["rival"], call.arguments["n"], call.arguments["k"], m)
        for step in steps
        for call in step.calls
        if call.job == "product"
        for m in call.arguments["tokens"]
    ]
    return [
        _bits(steps, outcomes),
        *(_against(goal, times) for goal in GOALS),
        _ratio(times, {product[1:] for product in planned}),
    ]


def _times(outcomes: Outcomes) -> Times:
    """The times of every product that was measured."""
    rows = {}
    for calls in outcomes.values():
        for outcome in calls.values():
            result = outcome.get("result")
            if isinstance(result, dict) and "rival" in result:
                for row in result["rows"]:
                    rows[result["rival"], result["n"], result["k"], row["m"]] = row
    return rows


def _row(goal: str, verdict: str, figure: str) -> dict[str, Any]:
    return {"goal": goal, "verdict": verdict, "figure": figure}


def _bits(steps: Sequence[Step], outcomes: Outcomes) -> dict[str, Any]:
    """Every case of every family of kernels."""
    planned = [
        outcomes.get(step.name, {}).get(call.key)
        for step in steps
        for call in step.calls
        if call.job == "check"
    ]
    checked = [outcome for outcome in planned if outcome]
    wrong = sum(1 for outcome in checked if failure(dict(outcome)))
    figure = f"{len(checked) - wrong} right and {wrong} wrong of {len(planned)} cases"
    verdict = MISSED if wrong else MET if checked and len(checked) == len(planned) else UNMEASURED
    return _row("every kernel and assembly path computes what its reference does", verdict, figure)


def _against(goal: Goal, times: Times) -> dict[str, Any]:
    rows = {m: times.get((OURS, goal.n, goal.k, m)) for m in goal.tokens}
    measured = {m: row[goal.harness] for m, row in rows.items() if row and row[goal.harness]}
    if not measured:
        return _row(goal.text, UNMEASURED, "")
    worst = max(measured, key=measured.__getitem__)
    figure = f"{measured[worst]:.1f} us at M = {worst}"
    if measured[worst] > goal.most_us:
        return _row(goal.text, MISSED, figure)
    missing = [str(m) for m in goal.tokens if m not in measured]
    if missing:
        return _row(goal.text, UNMEASURED, f"{figure}; not measured at {', '.join(missing)}")
    return _row(goal.text, MET, figure)


def _ratio(times: Times, planned: set[tuple[int, int, int]]) -> dict[str, Any]:
    """cuBLAS's time over qlab's, by events, at every product."""
    text = f"never below {LEAST_RATIO} of cuBLAS"
    both = list(_compared(times))
    if not both:
        return _row(text, UNMEASURED, "")
    ratio, n, k, m = min(both)
    figure = f"{ratio:.2f} of it for {n}x{k} at M = {m}, the least of {len(both)} products"
    if ratio < LEAST_RATIO:
        return _row(text, MISSED, figure)
    missing = len(planned) - len(both)
    if missing:
        return _row(text, UNMEASURED, f"{figure}; {missing} more are not measured")
    return _row(text, MET, figure)


def _compared(times: Times) -> Iterator[tuple[float, int, int, int]]:
    for (name, n, k, m), row in times.items():
        theirs = times.get((LIBRARY, n, k, m))
        if name == OURS and theirs and row["events_us"] and theirs["events_us"]:
            yield theirs["events_us"] / row["events_us"], n, k, m


# ---------------------------------------------------------------- tables
def goals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The goals, each with its verdict and figure."""
    drawn = Table("goal", "verdict", "figure")
    for row in rows:
        drawn.add_row(row["goal"], row["verdict"], row["figure"])
    return drawn


def products_table(outcomes: Outcomes) -> Table | None:
    """Microseconds of every measured product by events and in a CUDA graph, one column for each
    contender; None where there is none."""
    times = _times(outcomes)
    if not times:
        return None
    rivals = list(dict.fromkeys(name for name, *_ in times))
    drawn = Table("size", "tokens", *rivals, title="microseconds by events | in a CUDA graph")
    for n, k, m in sorted({product[1:] for product in times}):
        cells = [_cell(times.get((name, n, k, m))) for name in rivals]
        drawn.add_row(f"{n}x{k}", str(m), *cells)
    return drawn


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    graph = row["graph_us"]
    return f"{row['events_us']:.1f} | {'-' if graph is None else f'{graph:.1f}'}"


def absent(outcomes: Outcomes) -> dict[str, str]:
    """Contenders that could not take part, and why."""
    results = [outcome.get("result") for calls in outcomes.values() for outcome in calls.values()]
    return {
        result["rival"]: result["absent"]
        for result in results
        if isinstance(result, dict) and "absent" in result
    }
