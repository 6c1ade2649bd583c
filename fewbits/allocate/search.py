"""The SigmaQuant search (arXiv 2602.22136, Alg. 1) as a state machine over two functions that train and measure.

    reference   train the model with 8 bits everywhere
    cluster     phase 1: bits by clusters of sigma, from the reference; again with more equal clusters where both the
                accuracy and a cost are far off
    refine      phase 2: a few layers a step up or down the menu by divergence, from the weights as they are

A distance is the sum of what each target is missed by, in buffers. The nearest point so far is kept, to the bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewbits.allocate.budget import BY_EXAMPLE
from fewbits.allocate.divergence import MODES
from fewbits.allocate.goal import Goal
from fewbits.allocate.layout import INT8, Item, Layout
from fewbits.allocate.rank import divergences, item_scores
from fewbits.allocate.rankers import Ranker
from fewbits.allocate.search_settings import SearchSettings
from fewbits.allocate.search_state import Mark, SearchFolder, SearchState, seed_step
from fewbits.allocate.subject import Subject
from fewbits.errors import FewbitsError, SearchError

STATUSES = ("ok", "abandon", "exhausted", "max_steps")
Say = Callable[[str], None]


class Search:
    """One search. ``run`` goes on until there is a status; the subject then holds the nearest point.

    given: what tells this search from another, beside settings and targets (the style of plans).
    """

    def __init__(
        self,
        subject: Subject,
        layout: Layout,
        ranker: Ranker,
        settings: SearchSettings,
        folder: SearchFolder,
        given: Mapping[str, Any],
        say: Say | None = None,
    ) -> None:
        self.subject, self.layout, self.ranker, self.settings, self.folder = subject, layout, ranker, settings, folder
        self.budget, self.say = layout.problem.budget, say or (lambda text: None)
        self.items = layout.items
        self.int8_costs = layout.costs(layout.at(INT8))
        targets, items = self.budget.targets, [[i.layer, i.kind, list(i.choices)] for i in self.items]
        weights = [f"{s:.5g}" for s in ranker.sigmas]  # enough to tell another model, not another machine
        identity = {"targets": targets, "settings": settings.to_dict(), "items": items, "sigmas": weights, **given}
        told = [name for name in BY_EXAMPLE if name in targets]  # another example, or an edited file of hardware
        identity |= {f"{name} of INT8": f"{self.int8_costs[name]:.5g}" for name in told}
        self.state = folder.load(identity) or SearchState(identity, penalty=settings.penalty)

    def run(self) -> SearchState:
        """Do the steps that are left. Raises SearchError, with the step, for all that fails in one: what ``finetune``
        and ``evaluate`` raise, NaN, and calibration batches that the model does not take.

        The state of the last whole step is in the folder then, and its log in the error. Raises CheckpointError for a
        folder that cannot be written, before any step.
        """
        state = self.state
        self.folder.require_writable(state)
        if state.now is not None:
            self.subject.restore(state.now.bits, state.now.weights)
        while state.status is None:
            try:
                self._advance()
            except SearchError as error:
                raise self._told(str(error)) from error.__cause__
            except FewbitsError as error:  # weights that training made NaN, calibration batches that do not fit
                raise self._told(f"{error}, at step {self.subject.where} of the search") from error
            self.folder.save(state)
        assert state.stable is not None
        self.subject.restore(state.stable.bits, state.stable.weights)
        self.subject.model.eval()
        return state

    def _told(self, error: str) -> SearchError:
        """Return the error with the log, and with where to go on from."""
        path = self.folder.path
        kept = (
            "give state=FOLDER to go on from there next time" if path is None else f"{path} holds them: go on from it"
        )
        told = SearchError(f"{error}. {len(self.state.log)} steps were done; {kept}")
        told.log = tuple(self.state.log)
        return told

    @property
    def goal(self) -> Goal:
        """The targets as distances; the floor is known once the reference is."""
        settings = self.settings
        buffers = settings.accuracy_buffer, settings.cost_buffer
        return Goal.of(self.budget, self.state.accuracies, self.int8_costs, *buffers)

    def _advance(self) -> None:
        """Do one step."""
        state = self.state
        done = {"reference": 0, "cluster": state.rounds, "refine": state.steps}[state.phase]
        self.subject.where = f"{len(state.log)} ({state.phase} {done + 1})"
        seed_step(self.settings.seed, len(state.log))
        {"reference": self._reference, "cluster": self._cluster, "refine": self._refine}[state.phase]()

    def _reference(self) -> None:
        """Train the model with 8 bits everywhere; it is what a drop of accuracy counts from, and where rounds start."""
        settings, state, bits = self.settings, self.state, self.layout.at(INT8)
        started = time.perf_counter()
        if self.budget.reference == "fp32":
            state.accuracies["fp32"] = self.subject.measure()
        self.subject.apply(bits)
        self.subject.refresh()
        accuracy, epochs = self.subject.cycle(settings.epochs_reference, settings.evaluate_every)
        state.accuracies["int8"] = accuracy
        floor = self.goal.floor
        if floor is not None and floor <= 0 < (self.budget.accuracy_drop or 0):
            warnings.warn(
                f"accuracy_drop={self.budget.accuracy_drop} is met by any model: the reference has "
                f"{state.accuracies[self.budget.reference or 'int8']:.4g} percent; give a smaller drop, or an evaluate "
                "that returns percent, not a share of 1",
                stacklevel=2,
            )
        state.reference = state.now = state.stable = self._mark(bits, accuracy)
        state.best = self.goal.distance(accuracy, state.now.costs)
        state.seen.append(bits)
        if state.best == 0:
            state.status = "ok"
        self._record("reference", bits, epochs, started, stable=True)
        state.phase = "cluster"

    def _cluster(self) -> None:
        """Do one round of phase 1."""
        settings, state = self.settings, self.state
        assert state.reference is not None and state.now is not None
        started, penalty = time.perf_counter(), state.penalty
        self.subject.restore(state.reference.bits, state.reference.weights)
        self.ranker.look(self.subject.model)
        bits = self.ranker.start(penalty)
        if bits in state.seen:  # one layer, one cluster: the reference again
            state.phase, state.status = "refine", "max_steps" if settings.steps == 0 else None
            return
        self.subject.apply(bits)
        self.subject.refresh()
        accuracy, epochs = self.subject.cycle(settings.epochs_cluster, settings.evaluate_every)
        before, state.now = state.now.bits, self._mark(bits, accuracy)
        state.rounds, state.penalty = state.rounds + 1, penalty + settings.penalty_step
        state.seen.append(bits)
        again = state.rounds < min(settings.rounds, self.ranker.rounds)
        again = again and self.ranker.start(state.penalty) not in state.seen
        last = not again or self.goal.near(accuracy, state.now.costs)
        if last:  # phase 2 goes on from here
            state.stable, state.phase = state.now, "refine"
            state.best = self.goal.distance(accuracy, state.now.costs)
            state.status = "ok" if state.best == 0 else "max_steps" if settings.steps == 0 else None
        self._record(
            "cluster", bits, epochs, started, stable=last, before=before, penalty=penalty, rounds_left=not last
        )

    def _refine(self) -> None:
        """Do one step of phase 2."""
        settings, state, goal = self.settings, self.state, self.goal
        assert state.now is not None
        started, before = time.perf_counter(), state.now.bits
        bits = self._move(state.now, goal)
        if bits is None:
            state.status = "exhausted"
            return
        self.subject.apply(bits)
        self.subject.refresh()
        accuracy, epochs = self.subject.cycle(
            settings.epochs_refine, settings.evaluate_every, goal=goal.floor, patience=settings.idle
        )
        state.now = self._mark(bits, accuracy)
        state.seen.append(bits)
        state.steps += 1
        distance = goal.distance(accuracy, state.now.costs)
        nearer = distance < state.best
        if nearer:
            state.stable, state.best, state.bad = state.now, distance, 0
        else:
            state.bad += 1
        if state.best == 0:
            state.status = "ok"
        elif state.bad >= settings.patience:
            state.status = "abandon"
        elif state.steps >= settings.steps:
            state.status = "max_steps"
        self._record("refine", bits, epochs, started, stable=nearer, before=before)

    def _move(self, now: Mark, goal: Goal) -> list[int] | None:
        """Return the next bits, None where every move was tried."""
        settings = self.settings
        region = goal.region(now.accuracy, now.costs)
        short, over = goal.sides(now.accuracy, now.costs)
        up = region == "bit-increase" or (region == "transition" and short >= over)
        self.ranker.look(self.subject.model)
        order = self.ranker.order(now.bits, up=up)
        tried = self.state.seen
        if up and region == "bit-increase" and settings.size_fit:
            moved = next_move(self.items, now.bits, order, settings.move, tried, up=up, fits=self._fits)
            if moved is not None:
                return moved
        return next_move(self.items, now.bits, order, settings.move, tried, up=up)

    def _fits(self, bits: Sequence[int]) -> bool:
        return not self.budget.exceeded(self.layout.costs(bits))

    def _mark(self, bits: list[int], accuracy: float) -> Mark:
        return Mark(bits, accuracy, self.layout.costs(bits), self.subject.snapshot())

    def _record(
        self,
        phase: str,
        bits: list[int],
        epochs: int,
        started: float,
        *,
        stable: bool,
        before: list[int] | None = None,
        penalty: float | None = None,
        rounds_left: bool = False,
    ) -> None:
        """Append one entry to the log."""
        state, goal, now = self.state, self.goal, self.state.now
        assert now is not None
        found = divergences(self.subject.model, self.items, self.ranker.inputs)
        names = list(self.layout.named(bits))
        moved = [[names[i], a, b] for i, (a, b) in enumerate(zip(before or bits, bits)) if a != b]
        region = goal.region(now.accuracy, now.costs, rounds_left=rounds_left)
        entry = {
            "step": len(state.log),
            "phase": phase,
            "bits": self.layout.named(bits),
            "accuracy": now.accuracy,
            "costs": now.costs,
            "excess": goal.excess(now.accuracy, now.costs),
            "distance": goal.distance(now.accuracy, now.costs),
            "region": region,
            "penalty": penalty,
            "moved": moved,
            "divergence": {m: [row[b] for row, b in zip(found[m], bits)] for m in MODES},
            "scores": {m: item_scores(found[m], self.items, bits) for m in MODES},
            "stable": stable,
            "epochs": epochs,
            "seconds": time.perf_counter() - started,
            "status": state.status,
        }
        state.log.append(entry)
        told = ", ".join(f"{name} {now.costs[name]:,.6g}" for name in self.budget.limits)
        self.say(f"search {entry['step']:>2} {phase:<9} accuracy {now.accuracy:.2f}  {told}  {region}")


def next_move(
    items: Sequence[Item],
    bits: Sequence[int],
    order: Sequence[int],
    count: int,
    tried: Sequence[Sequence[int]],
    *,
    up: bool,
    fits: Callable[[Sequence[int]], bool] | None = None,
) -> list[int] | None:
    """Return ``bits`` with the first ``count`` items of ``order`` one width up or down; None where nothing is left.

    Where that was tried, the window of items slides down the order. fits: items that it refuses are left out.
    """
    for start in range(len(order)):
        new, moved = list(bits), 0
        for i in order[start:]:
            step = items[i].step(bits[i], up)
            assert step is not None
            trial = [*new[:i], step, *new[i + 1 :]]
            if fits is None or fits(trial):
                new, moved = trial, moved + 1
            if moved == count:
                break
        if moved and new not in tried:
            return new
    return None
