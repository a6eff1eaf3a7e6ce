"""How many streams a pod should be given on average, and what a day of calls makes of that choice.

`python deploy/sizing.py` prints the tables of README.md; `--help` tells what can be chosen. It needs nothing
but Python: the autoscaler is written down as Kubernetes documents it.
"""

import argparse
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SETTINGS = Path(__file__).parent / "kubernetes" / "settings.env"
DAY_SECONDS = 86_400

REACTION_SECONDS = 180
"""From a new call to a pod that can take one, at worst: 10 s scrape, 15 s autoscaler, 5 s scheduling, 120 s
for a new node, 30 s to load the image and to start."""

DOUBLING_SECONDS = 300
"""The steepest growth that is carried without a refusal: twice the calls in five minutes."""


def capacity() -> int:
    """Streams that a pod admits: the one place is settings.env."""
    lines = dict(line.split("=", 1) for line in SETTINGS.read_text().splitlines() if line.startswith("P"))
    return int(lines["PERCEPNET_MAX_STREAMS"])


def target(
    streams_per_pod: int, reaction: float = REACTION_SECONDS, doubling: float = DOUBLING_SECONDS
) -> int:
    """Streams per pod to aim at: what grows to the capacity while new pods are on their way."""
    return math.floor(streams_per_pod * 2 ** (-reaction / doubling))


@dataclass(frozen=True)
class Scaling:
    """The autoscaler: what hpa.yaml and scaledobject.yaml say, and what a cluster adds."""

    target: int
    minimum: int = 3
    maximum: int = 100
    up_ratio: float = 1.0
    up_pods: int = 4
    up_period: int = 30
    down_ratio: float = 0.1
    down_pods: int = 1
    down_period: int = 60
    down_window: int = 600
    sync: int = 15
    tolerance: float = 0.1
    metric_age: int = 15
    """Seconds between what happens and what the autoscaler sees of it."""


@dataclass(frozen=True)
class Day:
    """The calls of a day: a night of few, two busy times, and meetings that begin together."""

    peak: int
    """Streams at once in the busiest minutes, about."""
    mean_seconds: float
    meetings: float = 0.0
    """Share of the calls that begin in the three minutes after a full or a half hour."""

    def rate(self, second: int) -> float:
        """Calls that begin in a second, on average."""
        hour = second / 3600
        busy = max(math.exp(-(((hour - top) / 2.2) ** 2)) for top in (10.5, 15.0))
        level = 0.05 + 0.95 * busy
        burst = self.meetings * (10 if second % 1800 < 180 else 0)
        return self.peak / self.mean_seconds * level * (1 - self.meetings + burst)


@dataclass
class Pod:
    """A replica."""

    ready_at: float
    streams: int = 0
    ends_at: float = math.inf
    """When the grace of a pod that was told to stop is over."""


@dataclass
class Outcome:
    """What the day was like."""

    calls: int = 0
    rejected: int = 0
    drained: int = 0
    """Calls that were live on a pod when it was told to stop."""
    cut: int = 0
    """Those that went on for longer than its grace."""
    pod_seconds: float = 0.0
    stream_seconds: float = 0.0
    pods: Counter[int] = field(default_factory=Counter)

    def utilization(self, streams_per_pod: int) -> float:
        """Share of the capacity paid for that carried a stream."""
        return self.stream_seconds / (self.pod_seconds * streams_per_pod)


Choice = Callable[[list[Pod], random.Random], Pod]
"""Which of the pods goes."""


def any_pod(pods: list[Pod], chance: random.Random) -> Pod:
    """What a ReplicaSet does with pods of one age on nodes alike."""
    return chance.choice(pods)


def emptiest(pods: list[Pod], chance: random.Random) -> Pod:
    """What pod deletion costs would make of it."""
    return min(pods, key=lambda pod: pod.streams)


def simulate(
    day: Day,
    scaling: Scaling,
    streams_per_pod: int,
    *,
    start: tuple[float, float] = (20.0, 150.0),
    grace: float = 570.0,
    choice: Choice = any_pod,
    seconds: int = DAY_SECONDS,
    seed: int = 0,
) -> Outcome:
    """Live through a day, second by second.

    start: a new pod is ready after a time between these. grace: how long its calls may go on when it is told
    to stop. Calls last a log-normal time; each takes any pod that has room, as clients do that see all pods.
    """
    chance = random.Random(seed)
    shape = 1.0  # the median call lasts 0.6 of the mean
    outcome = Outcome()
    pods = [Pod(0.0) for _ in range(scaling.minimum)]
    leaving: list[Pod] = []
    ends: list[tuple[float, int, Pod]] = []
    seen: deque[int] = deque([0] * (scaling.metric_age + 1), maxlen=scaling.metric_age + 1)
    wishes: deque[tuple[int, int]] = deque()
    replicas: deque[tuple[int, int]] = deque()
    for second in range(seconds):
        while ends and ends[0][0] <= second:
            heapq.heappop(ends)[2].streams -= 1
        for pod in leaving:
            if second >= pod.ends_at:
                outcome.cut += pod.streams
        leaving = [pod for pod in leaving if pod.streams and second < pod.ends_at]
        for _ in range(_poisson(day.rate(second), chance)):
            outcome.calls += 1
            open_pods = [pod for pod in pods if pod.ready_at <= second and pod.streams < streams_per_pod]
            if not open_pods:
                outcome.rejected += 1
                continue
            pod = chance.choice(open_pods)
            pod.streams += 1
            lasts = day.mean_seconds * chance.lognormvariate(-(shape**2) / 2, shape)
            heapq.heappush(ends, (second + lasts, outcome.calls, pod))
        active = sum(pod.streams for pod in pods)
        seen.append(active)
        if second % scaling.sync == 0:
            wanted = _wanted(scaling, seen[0], len(pods), second, wishes, replicas)
            for _ in range(wanted - len(pods)):
                pods.append(Pod(second + chance.uniform(*start)))
            for _ in range(len(pods) - wanted):
                waiting = [pod for pod in pods if pod.ready_at > second]
                gone = waiting[0] if waiting else choice(pods, chance)
                pods.remove(gone)
                gone.ends_at = second + grace
                outcome.drained += gone.streams
                leaving.append(gone)
        outcome.pods[len(pods)] += 1
        outcome.pod_seconds += len(pods) + len(leaving)
        outcome.stream_seconds += active + sum(pod.streams for pod in leaving)
    return outcome


def _wanted(
    scaling: Scaling,
    active: int,
    current: int,
    second: int,
    wishes: deque[tuple[int, int]],
    replicas: deque[tuple[int, int]],
) -> int:
    """Replicas that a HorizontalPodAutoscaler asks for: formula, tolerance, stabilization, policies."""
    replicas.append((second, current))
    while replicas[0][0] < second - max(scaling.up_period, scaling.down_period):
        replicas.popleft()
    wish = math.ceil(active / scaling.target)
    if abs(active / (current * scaling.target) - 1) <= scaling.tolerance:
        wish = current
    wishes.append((second, wish))
    while wishes[0][0] < second - scaling.down_window:
        wishes.popleft()
    wish = max(scaling.minimum, min(scaling.maximum, wish))
    if wish > current:
        before = min(count for at, count in replicas if at >= second - scaling.up_period)
        return min(wish, max(before + scaling.up_pods, math.ceil(before * (1 + scaling.up_ratio))))
    steady = max(scaling.minimum, min(current, max(earlier for _, earlier in wishes)))
    before = max(count for at, count in replicas if at >= second - scaling.down_period)
    return max(steady, min(before - scaling.down_pods, math.floor(before * (1 - scaling.down_ratio))), 1)


def _poisson(mean: float, chance: random.Random) -> int:
    """Knuth's method; the means are small."""
    limit, count, product = math.exp(-mean), 0, chance.random()
    while product > limit:
        count += 1
        product *= chance.random()
    return count


def _from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted is a whole number from {minimum} up")
        return int(text)

    return parse


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peak", type=_from(1), default=600, help="streams at once in the busy hours")
    # With a capacity of 1 nothing would be left to aim at.
    parser.add_argument("--capacity", type=_from(2), default=capacity(), help="streams that a pod admits")
    parser.add_argument("--grace", type=float, default=570.0, help="PERCEPNET_SHUTDOWN_GRACE_SECONDS")
    parser.add_argument(
        "--start", type=float, default=150.0, help="seconds until a new pod is ready, at worst"
    )
    chosen = parser.parse_args()
    aim = target(chosen.capacity)
    days = {
        "telephone, 3 min": Day(chosen.peak, 180.0),
        "meetings, 30 min": Day(chosen.peak, 1800.0, meetings=0.5),
    }
    targets = sorted({aim, *(round(chosen.capacity * share) for share in (0.5, 0.75, 0.85, 0.95))})
    print(f"{chosen.capacity} streams a pod; the target by the formula is {aim}.\n")
    print("| calls | target | rejected | pods, mean | pods, most | capacity used | cut at the grace |")
    print("|---|---|---|---|---|---|---|")
    for name, day in days.items():
        for aimed in targets:
            done = simulate(
                day, Scaling(aimed), chosen.capacity, start=(20.0, chosen.start), grace=chosen.grace
            )
            cells = (
                f"{done.rejected / done.calls:.3%}",
                f"{done.pod_seconds / DAY_SECONDS:.1f}",
                max(done.pods),
                f"{done.utilization(chosen.capacity):.0%}",
                f"{done.cut / done.calls:.3%}",
            )
            print(f"| {name} | {aimed} |", *(f"{cell} |" for cell in cells))
    print("\n| calls | pod that goes | calls on it | of all calls | cut at the grace |")
    print("|---|---|---|---|---|")
    for name, day in days.items():
        for words, choice in (("any", any_pod), ("the emptiest", emptiest)):
            done = simulate(
                day,
                Scaling(aim),
                chosen.capacity,
                start=(20.0, chosen.start),
                grace=chosen.grace,
                choice=choice,
            )
            share = done.drained / done.calls
            print(f"| {name} | {words} | {done.drained} | {share:.2%} | {done.cut / done.calls:.3%} |")


if __name__ == "__main__":
    main()
