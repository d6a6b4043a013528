"""Backends in processes of their own, with a limit of time and of memory each.

One that aborts, hangs, fills the memory, exits or prints takes nothing with it: it is said to have
crashed, and how, and its process is started anew for the next question. `worker` is what runs there.

The one who asks makes the questions and judges the answers here; a worker is told inputs and cotangents
alone, and what comes back is arrays (`wire`). So what is judged cannot reach the judge.
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Self

from heedful_crosscheck import combinations
from heedful_crosscheck.ask import Refused
from heedful_crosscheck.cases import COMBINATIONS, Case, Inputs, of_row
from heedful_crosscheck.fitting import in_layout
from heedful_crosscheck.origin import Origin, OriginError
from heedful_crosscheck.process import Limits, Process
from heedful_crosscheck.question import Question
from heedful_crosscheck.report.environment import environment
from heedful_crosscheck.respondent import About, Crashed, Raised, Respondent, Stopped
from heedful_crosscheck.yardstick import Tensors

GIVEN_UP = 5  # crashes in a row, after which a backend is asked no more


class Workers:
    """The processes of one run; the twin of `in_process.InProcess`.

    Attributes:
        limits: of each.
        names: of all backends there are.
        function: of the function that is judged its name, declines and layout; None: there is none.

    Raises:
        OriginError: what is judged cannot be had.
        Crashed: the first process ended as it was imported.
    """

    def __init__(self, origin: Origin, limits: Limits):
        self.origin, self.limits = origin, limits
        self._every: list[Process] = []
        self._shared: Process | None = None
        self._one_at_a_time = Lock()
        try:
            self._shared, words = self._started()
        except BaseException:  # an interrupt too leaves no process behind
            self.__exit__()
            raise
        self.names: list[str] = words["names"]
        self.function: Mapping[str, Any] | None = words["function"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._every:
            process.end()

    def respondents(self, names: Sequence[str], jobs: int) -> dict[str, list[Respondent]]:
        """A backend each; where there are fewer of them than jobs, several times."""
        times = max(1, jobs // max(1, len(names)))
        return {name: [Isolated(name, self) for _ in range(times)] for name in names}

    def fitted(self, cases: Sequence[Case], dtypes: Sequence[str] | None) -> list[Case]:
        """The cases as the function is asked them, as of `fitting.fitted`."""
        assert self.function is not None
        known = {case.name: case for case in cases}
        found = []
        try:
            told = self._told(("fitted", cases, dtypes))["cases"]
        except Raised as raised:
            raise OriginError(f"which cases it takes cannot be found out: {raised}") from raised
        for name, written in told:
            row = None if written is None else combinations.read(written)
            of_table = {} if row is None else of_row(row)
            case = known[name] if row is None else Case(name=name, group=COMBINATIONS, **of_table)
            found.append(in_layout(self.function["layout"], case))
        return found

    def memory(
        self, cases: Sequence[Case], backends: Sequence[str], dtypes: Sequence[str], jobs: int
    ) -> list[str]:
        """What each case takes, in words."""
        if not cases:
            return []
        try:
            return self._told(("memory", cases, backends, dtypes, jobs))["memory"]
        except (Crashed, Raised) as error:  # who does not say it will be asked all the same
            return [f"cannot be said: {error}"]

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and flags, as the workers have them; as this process has, if they crash."""
        try:
            return self._told(("environment",))["environment"]
        except (Crashed, Raised):
            return environment()

    def received(self, name: str, *request: Any) -> dict[str, Any]:
        """What is said of a backend by the process that those share who have none of their own.

        Most of those that there are run nothing on a machine, and need no process for that.

        Raises:
            Refused: the backend does.
            Crashed, Raised: it is better asked in its own.
        """
        return self._told(("start", name), *([request] if request else []))

    def process(self) -> Process:
        """A new one, that has imported what is judged."""
        return self._started()[0]

    def _told(self, *requests: tuple[Any, ...]) -> dict[str, Any]:
        """What the shared process says, to the last of these."""
        with self._one_at_a_time:
            if self._shared is None:
                self._shared = self.process()
            try:
                for request in requests:
                    asked = request[0] == "check_accepted"
                    limits = self.limits if asked else self.limits.of_start
                    said = _said(self._shared.ask(*request, limits=limits)[0])
            except Crashed:
                self._shared.end()
                self._shared = None
                raise
            return said

    def _started(self) -> "tuple[Process, dict[str, Any]]":
        process = Process()
        self._every.append(process)
        words, _ = process.ask("load", self.origin, limits=self.limits.of_start)
        return process, _said(words)


class Isolated:
    """A backend in a process of its own, which is started when it is first asked."""

    def __init__(self, name: str, workers: Workers):
        self.name, self.workers = name, workers
        self.crashes = 0  # in a row
        self.stopped = False
        self.received = True  # whether the shared process can be asked about it
        self._process: Process | None = None

    def start(self, question: Question) -> None:
        if self.crashes >= GIVEN_UP:
            raise Refused((f"left out: it crashed in the {self.crashes} cases before",))
        limits = self.workers.limits
        if self._process is not None and self._process.memory() > limits.memory // 2:
            self._end()  # of programs that were compiled and are not asked again
        if self._process is None:
            self._receive("check_accepted", question.alone(question.inputs))
            try:
                self._process = self.workers.process()
            except Crashed:
                self.crashes += 1
                raise
            self._ask("start", self.name, limits=limits.of_start)

    def why_unasked(self) -> str | None:
        return self._receive().get("unasked")

    def _receive(self, *request: Any) -> dict[str, Any]:
        """What the shared process says; nothing where the backend brought it down, or will its own."""
        if self.received and not self.stopped:
            try:
                return self.workers.received(self.name, *request)
            except (Crashed, Raised):
                self.received = False
        return {}

    def answer(self, question: Question, inputs: Inputs, with_lse: bool) -> Tensors:
        most = _most(question)
        _, tensors = self._ask("answer", question.alone(inputs), with_lse, most, most=most)
        self.crashes = 0
        expected = {"out", "lse"} if with_lse else {"out"}
        gradients = {f"d{name}" for name in question.operands.differentiable}
        if tensors.keys() not in (expected, expected | gradients):
            raise Raised(f"answered with {', '.join(tensors) or 'nothing'}")
        return tensors

    def second(
        self, question: Question, inputs: Inputs, with_lse: bool, direction: Tensors
    ) -> Tensors:
        most = _most(question)
        asked = question.alone(inputs), with_lse, direction, most
        _, tensors = self._ask("second", *asked, most=most)
        if tensors.keys() != {f"d2{name}" for name in direction}:
            raise Raised(f"answered with {', '.join(tensors) or 'nothing'}")
        return tensors

    def about(self, question: Question) -> About:
        words, _ = self._ask("about", question.alone(question.inputs))
        return About(*words["about"])

    def stop(self) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.kill()

    def _ask(
        self, *request: Any, most: int = 0, limits: Limits | None = None
    ) -> tuple[dict[str, Any], Tensors]:
        if self.stopped or self._process is None:
            raise Stopped
        limits = self.workers.limits if limits is None else limits
        try:
            words, tensors = self._process.ask(*request, most=most, limits=limits)
        except Crashed:
            self._end()
            if self.stopped:
                raise Stopped from None
            self.crashes += 1
            raise
        return _said(words), tensors

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


def _most(question: Question) -> int:
    """Bytes of an answer, were it float64 throughout."""
    x = question.inputs
    numbers = question.out_cotangent.size + question.lse_cotangent.size
    numbers += sum(a.size for a in (x.q, x.k, x.v, *x.arrays.values()))
    return 8 * numbers


def _said(words: dict[str, Any]) -> dict[str, Any]:
    """The words of an answer that is a result.

    Raises:
        Refused, Raised, OriginError: it is none.
    """
    if "refused" in words:
        raise Refused(tuple(map(str, words["refused"])))
    if "raised" in words:
        raise Raised(str(words["raised"]), words.get("tensor"))
    if "not_to_be_had" in words:
        raise OriginError(str(words["not_to_be_had"]))
    return words
