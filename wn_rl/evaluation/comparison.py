"""Which scores may be compared, and their comparison: groups of seeds, aggregates over games, improvement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import TYPE_CHECKING

from wn_rl.atari.games import find_game
from wn_rl.config import TrainConfig
from wn_rl.errors import UsageError, closest
from wn_rl.evaluation import statistics
from wn_rl.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from wn_rl.evaluation.scoring import Score

PER_RUN = (
    "seed",
    "run_dir",
    "chosen",
    "game",
    "device",
    "num_threads",
    "emulator_threads",
    "checkpoint_seconds",
    "checkpoint_period",
    "action_log",
    "log_period",
)
"""Configuration keys in which the runs of a group may differ: they do not change what is learned."""
STATISTICS = {
    "mean": statistics.mean,
    "median": statistics.median,
    "iqm": statistics.interquartile_mean,
}


@dataclass(frozen=True)
class Summary:
    """Aggregates of one group of runs.

    Attributes:
        group: its label.
        game: the game, or None for the aggregate over all of ``games``, which is human-normalized.
        games: that were aggregated.
        runs: number of runs (seeds).
        estimates: by name of :data:`STATISTICS`; points for one game.
    """

    group: str
    game: str | None
    games: tuple[str, ...]
    runs: int
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Improvement:
    """The probability that a run of group ``better`` beats one of ``than``; every game has the same weight."""

    better: str
    than: str
    games: tuple[str, ...]
    estimate: Estimate


@dataclass
class Comparison:
    """The result of a comparison.

    Attributes:
        summaries: per group and game, and per group over games.
        improvements: for each pair of groups.
        problems: reasons why something is not compared, one line each.
        notes: remarks for the reader, one line each.
    """

    summaries: list[Summary] = field(default_factory=list)
    improvements: list[Improvement] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_key(by: str) -> None:
    """Check that runs can be grouped by a configuration key.

    Raises:
        UsageError: there is no such key.
    """
    known = [entry.name for entry in fields(TrainConfig)]
    if by not in known:
        raise UsageError(f"--by {by}: no such configuration key.{closest(by, known)}")


def group_of(score: Score, by: str) -> str:
    """Return the label of a score's group: the value of its training's configuration key ``by``."""
    trained = score.trained
    if trained.config is None:
        return f"{trained.param} (sb3)"
    return str(getattr(trained.config, by))


def compare(scores: Sequence[Score], by: str = "param") -> Comparison:
    """Aggregate scores over seeds and games and compare groups of them.

    Nothing is aggregated if protocols differ or a run occurs twice; groups with different games are not
    compared with each other.

    Args:
        scores: of the runs.
        by: configuration key whose values are the groups.
    """
    found = Comparison()
    groups: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        groups.setdefault(group_of(score, by), {}).setdefault(score.trained.game, []).append(score)
    if len(scores) < 2 or _refused(scores, groups, found):
        return found
    for group, games in sorted(groups.items()):
        for game, runs in sorted(games.items()):
            raw = {game: [score.result.mean for score in runs]}
            found.summaries.append(_summary(group, game, raw))
        _note_differences(group, games, found)
        _note_run_counts(group, games, found)
    if len({score.trained.game for score in scores}) > 1:
        found.summaries += _over_games(groups, found)
    # The baseline comes last: a pair gives the probability that it is beaten.
    for better, than in combinations(sorted(groups, key=lambda group: (group == "standard", group)), 2):
        ours, theirs = groups[better], groups[than]
        _note_other_keys(by, (better, ours), (than, theirs), found)
        if ours.keys() != theirs.keys():
            only = [f"{game} (only {better})" for game in sorted(ours.keys() - theirs.keys())]
            only += [f"{game} (only {than})" for game in sorted(theirs.keys() - ours.keys())]
            found.problems.append(f"{better} and {than} are not compared: their games differ: {', '.join(only)}")
            continue
        x, y = ({game: [s.result.mean for s in runs] for game, runs in side.items()} for side in (ours, theirs))
        if single := [
            game for game in sorted(ours) if min(len(x[game]), len(y[game])) == 1 < len(x[game]) + len(y[game]) - 1
        ]:
            found.notes.append(
                f"{better} and {than} have a single run against several on {', '.join(single)}: "
                "the interval of their comparison treats its score as exact"
            )
        estimate = statistics.improvement_with_interval(x, y)
        found.improvements.append(Improvement(better, than, tuple(sorted(ours)), estimate))
    return found


def _refused(scores: Sequence[Score], groups: dict[str, dict[str, list[Score]]], found: Comparison) -> bool:
    first = scores[0]
    for score in scores[1:]:
        ours, theirs = first.protocol.settings(), score.protocol.settings()
        if differing := [key for key in ours if ours[key] != theirs[key]]:
            key = differing[0]
            found.problems.append(
                f"not compared: {first.trained.path} and {score.trained.path} were played under different protocols "
                f"({', '.join(name.replace('_', ' ') for name in differing)}: {ours[key]} and {theirs[key]}): "
                "choose one with --protocol"
            )
            return True
    for games in groups.values():
        for runs in games.values():
            seen: dict[tuple[object, ...], Score] = {}
            for score in runs:
                config = score.trained.config
                key_of_run = (score.trained.path,) if config is None else tuple(map(str, vars(config).values()))
                if (other := seen.setdefault(key_of_run, score)) is not score:
                    found.problems.append(
                        f"not compared: {other.trained.path} and {score.trained.path} are of the "
                        "same run, which counts once"
                    )
                    return True
    return False


def _summary(group: str, game: str | None, values: dict[str, list[float]]) -> Summary:
    estimates = {name: statistics.with_interval(statistic, values) for name, statistic in STATISTICS.items()}
    return Summary(group, game, tuple(values), sum(map(len, values.values())), estimates)


def _over_games(groups: dict[str, dict[str, list[Score]]], found: Comparison) -> list[Summary]:
    summaries = []
    unknown = set()
    for group, games in sorted(groups.items()):
        values: dict[str, list[float]] = {}
        for game, runs in sorted(games.items()):
            normalized = [find_game(game).human_normalized(score.result.mean) for score in runs]
            if any(value is None for value in normalized):
                unknown.add(game)
            else:
                values[game] = [value for value in normalized if value is not None]
        if len(values) > 1:
            summaries.append(_summary(group, None, values))
    if unknown:
        found.notes.append(f"no human score is known for {', '.join(sorted(unknown))}: excluded from the aggregates")
    return summaries


def _note_differences(group: str, games: dict[str, list[Score]], found: Comparison) -> None:
    configs = [score.trained.config for runs in games.values() for score in runs]
    differing = differing_keys([config for config in configs if config is not None])
    frames = {score.trained.frames for runs in games.values() for score in runs}
    if "frames" not in differing and apart(frames):
        differing.append("frames trained")
    if differing:
        found.notes.append(f"the runs of {group} differ in more than seed and game: {', '.join(differing)}")


def _note_other_keys(
    by: str, ours: tuple[str, dict[str, list[Score]]], theirs: tuple[str, dict[str, list[Score]]], found: Comparison
) -> None:
    """Note the keys, except ``by`` and those that depend on it, whose values differ between the two groups."""
    sides = [
        [vars(score.trained.config) for runs in games.values() for score in runs if score.trained.config is not None]
        for _, games in (ours, theirs)
    ]
    if not all(sides):
        return
    follows = ("param_options", "param_layers") if by == "param" else ()
    keys = [key for key in sides[0][0] if key not in (*PER_RUN, *follows, by)]
    if differing := [key for key in keys if {str(one[key]) for one in sides[0]} != {str(one[key]) for one in sides[1]}]:
        found.notes.append(f"{ours[0]} and {theirs[0]} differ in more than {by}: {', '.join(differing)}")


def differing_keys(configs: Sequence[TrainConfig]) -> list[str]:
    """Return the keys, beside those of :data:`PER_RUN`, in which configurations differ."""
    known = [vars(config) for config in configs]
    return [
        key for key in (known[0] if known else {}) if key not in PER_RUN and len({str(one[key]) for one in known}) > 1
    ]


def apart(frames: set[int | None] | set[int]) -> bool:
    """Return whether frame counts differ by more than 1%; less is normal, since a run ends on a whole vector step."""
    counts = [count for count in frames if count is not None]
    return any(count < 0.99 * max(counts) for count in counts)


def _note_run_counts(group: str, games: dict[str, list[Score]], found: Comparison) -> None:
    """Note if games have different numbers of runs: the interval over games then depends on some of them only."""
    counts = {game: len(runs) for game, runs in sorted(games.items())}
    if len(set(counts.values())) < 2:
        return
    single = [game for game, count in counts.items() if count == 1]
    text = ", ".join(f"{game} {count}" for game, count in counts.items())
    text = f"the games of {group} have different numbers of runs ({text}): the IQM weighs them by it"
    if single:
        text += f", and the interval over games treats {', '.join(single)} as exact"
    found.notes.append(text)
