"""Tries a few training prompts of a run that samples and, where something goes wrong, tries remedies."""

import importlib.util
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from callbacks.measures.prognosis import bound_share, expect_distinct, run_sign_test
from callbacks.measures.trial import Trial, Tried, mean, percent, quote
from modules.rewards.answers import ExactMatch, MathVerify, NumericMatch, name_reader
from modules.rewards.combined import WeightedSum, walk_rewards
from modules.rewards.dispatch import Dispatch
from modules.rollout.metrics import make_outcomes
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import make_rollouts
from modules.trainer.ranks import from_all_ranks
from modules.trainer.seeds import derive_seed
from modules.types import Completion, FunctionReward, PromptBatch, Reward, Rollout, score

WASTE = 0.1  # share of the samples that may teach nothing before it is reported
SURE = 0.01  # chance of a false alarm in a comparison of the same prompts under two settings
LEFT_OUT = 0.05  # share of the rows that may be left out before it is reported, as in DataReport
FEWEST = 4  # completions of a prompt that a pass rate needs
GOLDS = 64  # rows whose answers the verifiers try to read
COLD, COLD_SURE = 0.5, 0.05  # a temperature below COLD is always compared with 1, at a false-alarm chance of COLD_SURE
LONGER = 4  # times the token budget: the length at which completions are tried again, to see whether they end at all
# Tokens and texts that end an answer or open another turn.
END_MARK = re.compile(
    r"<\|[^<>|]*(?:eos|eot|end|im_start|return)[^<>|]*\|>|</s>|<(?:eos|(?:end|start)_of_turn)>", re.IGNORECASE
)


class TrainingPrompt(Protocol):
    """A tokenised training prompt."""

    @property
    def text(self) -> str:
        """As it is rendered."""

    @property
    def ids(self) -> list[int]:
        """Its tokens."""

    @property
    def example(self) -> Any:
        """The row: ``answer``, ``info``, ``origin``."""


@runtime_checkable
class GivesPrompts(Protocol):
    """The part of a DataModule that an examination reads."""

    train_prompts: Sequence[Any]
    prompts_per_phase: int
    updates_per_phase: int
    dropped: dict[str, int]
    bad: dict[str, int]
    max_prompt_length: int

    def batch_of(self, prompts: Sequence[Any]) -> PromptBatch:
        """Give some prompts as a batch."""

    def in_other_form(self, prompt: Any) -> Any:
        """Write a prompt with the chat template if it is plain, and without if it is not; None = cannot be done."""


@runtime_checkable
class SamplesItself(Protocol):
    """The part of a module that an examination calls."""

    reward: Any
    accuracy: Any
    num_generations: int
    sampling: Any
    policy: Any
    seed: int

    def sample(
        self, prompts: PromptBatch, num_generations: int, sampling: Any, phase: str
    ) -> tuple[PromptBatch, list[list[Completion]]]:
        """Sample completions of each prompt; return the prompts, as they were asked, and the completions of each."""


class Finding(NamedTuple):
    """One problem of a run."""

    cause: str  # one word for each cause
    words: str  # what is wrong, by how much, and what to do


class Examination:
    """Tries a few prompts, and looks for the cause of what it sees.

    A symptom leads to an experiment on the same prompts with the same seeds. So a run without symptoms costs one
    sampling, and among several possible causes the one whose change helps is named. Shares are bounded by Wilson's 95 %
    interval with n = number of prompts, since completions of a prompt are alike; comparisons are sign tests over the
    prompts at 1 %.

    Args:
        module: samples and scores.
        data: has the training prompts.
        num_prompts: how many to try, over all ranks.
        place: the number of this rank, and how many ranks there are.
    """

    def __init__(self, module: Any, data: Any, num_prompts: int, place: tuple[int, int]) -> None:
        self.module, self.data, self.rank, self.ranks = module, data, *place
        self.reward, self.sampling = module.reward, module.sampling
        self.num_generations = max(FEWEST, module.num_generations)
        self.size = module.num_generations if module.num_generations > 1 else FEWEST  # of a group
        drawn = random.Random(derive_seed(module.seed, "doctor", "rows"))
        rows = data.train_prompts
        self.rows = drawn.sample(range(len(rows)), min(len(rows), max(GOLDS, num_prompts)))
        self.prompts = [rows[row] for row in self.rows[:num_prompts]]
        self.checking = [part for part in walk_rewards(self.reward) if part.checks_answer]
        self.verifiers = [part for part in self.checking if getattr(part, "needs_answer", True)]
        self.judge = module.accuracy  # tells right from wrong
        start = time.perf_counter()
        self.trial = self.try_out(self.prompts, self.sampling, self.num_generations)
        self.seconds = max(from_all_ranks([time.perf_counter() - start]))  # of sampling and scoring
        scores = {one.rollout.reward for one in self.trial.all} - {None}
        if self.judge is self.reward and not self.reward.checks_answer and not scores <= {0.0, 1.0}:
            self.judge = None  # a shaped reward, which says better or worse
            self.trial = Trial([[one._replace(right=None) for one in group] for group in self.trial.groups])

    def try_out(self, prompts: Sequence[TrainingPrompt], sampling: Sampling, num_generations: int) -> Trial:
        """Sample and score completions (collective)."""
        places = range(self.rank, len(prompts), self.ranks)
        batch = self.data.batch_of([prompts[place] for place in places])
        batch["uid"] = [f"{place}/{uid}" for place, uid in zip(places, batch["uid"], strict=True)]
        sampled = self.module.sample(batch, num_generations, sampling, "doctor") if batch["uid"] else (batch, [])
        asked, completions = sampled
        rollouts = make_rollouts(asked, completions, self.reward)
        outcomes = make_outcomes(rollouts, self.judge, scored_by=self.reward)
        mine = [Tried(rollout, outcome.right) for rollout, outcome in zip(rollouts, outcomes, strict=True)]
        groups: list[list[Tried]] = [[] for _ in prompts]
        for one in from_all_ranks(mine):
            groups[int(one.rollout.uid.partition("/")[0])].append(one)
        return Trial(groups)

    def find(self) -> list[Finding]:
        """Return what is wrong, causes before what they cause (collective)."""
        answers, rows = self.check_answers(), [*self.check_repeats(), *self.check_left_out()]
        explained = answers or self.check_weights() or self.explain()
        upset = {"answers", "template", "stop", "budget"} & {finding.cause for finding in explained}
        return [*explained, *(() if upset else self.check_parts()), *rows]

    # What the rows alone say.

    def check_answers(self) -> list[Finding]:
        """Look for rows without an answer, and for answers that the reward cannot read.

        Reported if it concerns more than a tenth of the rows: training leaves their samples out.
        """
        rows = self.data.train_prompts
        bare = mean(prompt.example.answer is None for prompt in rows)
        if not self.verifiers:
            return []
        if bare > WASTE:
            found = self.find_column()
            columns = ", ".join(dict.fromkeys(name for prompt in rows[:GOLDS] for name in prompt.example.info or {}))
            where = (
                f"its answers seem to be in column '{found}'"
                if found
                else f"its other columns are: {columns or 'none'}"
            )
            name = found or "THE_COLUMN"
            return [
                Finding(
                    "answers",
                    f"{bare:.0%} of the training rows have no answer for {name_of(self.verifiers[0])} to compare "
                    f"with, and {where}: name the column with --data.columns '{{answer: {name}}}', or use a reward "
                    "that needs no answer.",
                )
            ]
        chosen = [rows[row] for row in self.rows[:GOLDS] if rows[row].example.answer is not None]
        golds = [self.write(prompt, prompt.example.answer) for prompt in chosen]
        for verifier in self.verifiers:
            asked = [gold for gold in golds if not isinstance(verifier, Dispatch) or verifier.scores(gold)]
            scores = score(verifier, asked)
            unread = [str(gold.answer) for gold, value in zip(asked, scores, strict=True) if value is None]
            if asked and bound_share(len(unread), len(asked))[0] > WASTE:
                return [
                    Finding(
                        "golds",
                        f"{name_of(verifier)} cannot read {len(unread)} of {len(asked)} answers of the training rows, "
                        f"such as {quote(unread[0])}, so their completions get no score: {name_reader(unread[0])}.",
                    )
                ]
        return []

    def find_column(self) -> str | None:
        """Return a column that holds the answers, if more completions match its values than match the rows' answers.

        Only columns of short texts or numbers are tried. If no completion matches any of these columns and the rows
        have no answer at all, it returns the first column that the verifier can read in nearly all rows.
        """
        judge = self.judge or (self.verifiers[0] if self.verifiers else None)
        if judge is None:
            return None
        names = dict.fromkeys(name for one in self.trial.all for name in one.rollout.info or {})
        before = [mean(bool(one.right) for one in group) for group in self.trial.groups]
        readable = None
        for name in names:
            values = [[(one.rollout.info or {}).get(name) for one in group] for group in self.trial.groups]
            if not all(
                isinstance(value, str | int | float) and len(str(value)) < 200 for group in values for value in group
            ):
                continue
            swapped = [
                [replace(one.rollout, answer=str(value)) for one, value in zip(group, column, strict=True)]
                for group, column in zip(self.trial.groups, values, strict=True)
            ]
            scores = score(judge, [rollout for group in swapped for rollout in group])
            found = iter(scores)
            after = [mean((next(found) or 0.0) > 0.5 for _ in group) for group in swapped]
            if run_sign_test(after, before) < SURE:
                return name
            if readable is None and mean(value is not None for value in scores) > 1 - WASTE:
                readable = name
        bare = all(one.rollout.answer is None for one in self.trial.all)
        return readable if bare and not isinstance(judge, ExactMatch) else None

    def check_repeats(self) -> list[Finding]:
        """Look for prompts that stand in the data several times.

        Reported if more than a tenth of a phase's prompts are expected to repeat another prompt of the phase, or if at
        most half of the rows have different prompts: an epoch then visits each prompt twice or more.
        """
        texts = [prompt.text for prompt in self.data.train_prompts]
        distinct, drawn = len(set(texts)), min(self.data.prompts_per_phase, len(texts))
        in_phase = expect_distinct(texts, drawn)
        if len(texts) < 2 or (in_phase >= (1 - WASTE) * drawn and 2 * distinct > len(texts)):
            return []
        return [
            Finding(
                "repeats",
                f"Only {distinct} of the {len(texts)} training prompts are different, so a phase of {drawn} holds "
                f"about {in_phase:.0f} different ones: remove the repeated rows, or read the column that tells them "
                "apart.",
            )
        ]

    def check_left_out(self) -> list[Finding]:
        """Tell of more than 5 % of the rows left out, as ``DataReport`` does."""
        long, bad = self.data.dropped["train"], self.data.bad["train"]
        total = long + bad + len(self.data.train_prompts)
        if (long + bad) / total <= LEFT_OUT:
            return []
        return [
            Finding(
                "left_out",
                f"{long + bad} of {total} training rows are left out, {long} for more than data.max_prompt_length "
                f"({self.data.max_prompt_length} tokens) and {bad} as unreadable: raise the limit, or mend the rows.",
            )
        ]

    def check_weights(self) -> list[Finding]:
        """Look for weights of a ``WeightedSum`` by which a right answer is worth no more than a wrong one.

        Parts that compare answers agree on most of them, so their weights add. All 0 = they are only measured.
        """
        if not isinstance(self.reward, WeightedSum):
            return []
        pairs = zip(self.reward.rewards, self.reward.find_weights(None), strict=True)
        weights = {part.name: weight for part, weight in pairs if part.checks_answer and weight}
        if not weights or sum(weights.values()) > 0:
            return []
        listed = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        return [
            Finding(
                "weights",
                f"The weights of the rewards that compare answers ({listed}) add up to {sum(weights.values()):g}, so a "
                "right answer is worth no more than a wrong one: mend model.reward.weights.",
            )
        ]

    # What the samples say.

    def explain(self) -> list[Finding]:
        """Return the first cause that explains why groups have no signal or completions do not end.

        At pass rate 1/2, a share of 1 - 2^(1 - G) of the groups of G completions has a signal. If the measured share is
        below half of that, experiments look for the cause, and their comparison decides. Causes that no experiment can
        test are named only if the share is below half of that with confidence 95 %. Completions count as not ending if,
        with the same confidence, more than a tenth of them use up their tokens.
        """
        trial, prompts = self.trial, len(self.trial.groups)
        idle, cut = sum(trial.idle(self.size)), sum(trial.cut())
        most = 1 - 0.5 * (1 - 2.0 ** (1 - self.size))
        doubtful, silent = idle / prompts > most, bound_share(idle, prompts)[0] > most
        endless = bound_share(cut, prompts)[0] > WASTE
        strange = doubtful or endless
        causes = [
            (doubtful, self.blame_column),
            (strange, self.blame_template),
            (self.sampling.temperature < COLD or (strange and self.sampling.temperature != 1), self.blame_temperature),
            (endless, self.blame_budget),
            (silent, self.blame_weights),
            (silent, self.blame_reward),
            (True, self.blame_verifier),
            (silent, self.blame_difficulty),
        ]
        for suspected, blame in causes:
            found = blame() if suspected else None
            if found is not None:
                return [found]
        return []

    def blame_column(self) -> Finding | None:
        """Ask whether another column holds what the completions say."""
        name = self.find_column() if self.verifiers else None
        if name is None:
            return None
        return Finding(
            "answers",
            f"{percent(self.trial.right())} of the completions match the rows' answers, and far more match their "
            f"column '{name}': read the answers from it with --data.columns '{{answer: {name}}}'.",
        )

    def blame_template(self) -> Finding | None:
        """Ask whether the same prompts do better with the chat template, or without it: more right answers, or at least
        more ends (disjoint intervals) and not fewer right answers.
        """
        pairs = [
            (group, self.data.in_other_form(prompt))
            for group, prompt in zip(self.trial.groups, self.prompts, strict=True)
        ]
        room = self.positions - self.sampling.max_completion_length
        pairs = [(group, other) for group, other in pairs if other is not None and len(other.ids) <= room]
        if not pairs:
            return None
        before = Trial([group for group, _ in pairs])
        after = self.try_out([other for _, other in pairs], self.sampling, self.num_generations)
        ended = bound_share(sum(after.cut()), len(pairs))[1] < bound_share(sum(before.cut()), len(pairs))[0]
        less_right = run_sign_test(before.right(), after.right()) < SURE
        if not (run_sign_test(after.right(), before.right()) < SURE or ended and not less_right):
            return None
        plain = self.prompts[0].text == self.prompts[0].example.prompt
        here, there = (
            ("as plain text", "through the chat template") if plain else ("through the chat template", "as plain text")
        )
        return Finding(
            "template",
            f"With the prompts {here}, as in this run, {self.rate(before)} and {percent(before.cut())} do not end; "
            f"{there}, {self.rate(after)} and {percent(after.cut())} do not end: set data.chat: {str(plain).lower()}.",
        )

    def blame_budget(self) -> Finding | None:
        """Ask whether a stop token is written and not obeyed, and whether longer completions end."""
        stops = self.module.policy.stop_token_ids
        tokenizer, cut = self.module.policy.tokenizer, [one.rollout.completion for one in self.trial.all]
        cut = [completion for completion in cut if completion.finish != "stop"]
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        marks = [find_mark(completion, special, stops) for completion in cut]
        (mark, count), *_ = Counter(mark for mark in marks if mark).most_common(1) or [("", 0)]
        obeyed = ", ".join(repr(tokenizer.convert_ids_to_tokens(number)) for number in sorted(stops)) or "no token"
        share = percent(self.trial.cut())
        if 2 * count > len(cut):
            return Finding(
                "stop",
                f"{share} of the completions do not end, and {count / len(cut):.0%} of those write {mark!r} and go on "
                f"behind it, since only {obeyed} ends a completion: add it to model.sampling.stop, or make it the "
                "eos_token of the tokenizer and the generation config.",
            )
        longest = max(len(prompt.ids) for prompt in self.prompts)
        budget = self.sampling.max_completion_length
        longer = min(LONGER * budget, self.positions - longest)
        if longer > budget:
            trial = self.try_out(self.prompts, replace(self.sampling, max_completion_length=longer), 2)
            if bound_share(sum(trial.cut()), len(trial.groups))[0] > 0.5:
                return Finding(
                    "stop",
                    f"{share} of the completions do not end in {budget} tokens, nor do {percent(trial.cut())} in "
                    f"{longer}: the policy seldom writes {obeyed}. Is it a base model, or trained to end otherwise? "
                    "Name what ends an answer in model.sampling.stop, or teach it to end by SFT first.",
                )
            lengths = sorted(len(one.rollout.completion.token_ids) for one in trial.all)
            needed = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
            most = f", and 95 % have at most {needed} tokens" if needed < longer else ""
            better = f"; with {longer}, {1 - mean(trial.cut()):.0%} end{most}"
        else:
            better, needed = "; the model has no positions for more", budget
        return Finding(
            "budget",
            f"{share} of the completions use up model.sampling.max_completion_length ({budget} tokens){better}: raise "
            "it" + (f" to {max(needed, budget + 1)} or more." if longer > budget else ", or shorten the prompts."),
        )

    def blame_temperature(self) -> Finding | None:
        """Ask whether at temperature 1 more groups have a signal, more answers are right, or more completions end.

        Below ``COLD`` weaker evidence suffices: pairs of completions have equal scores more often (sign test at 5 %),
        and the share of groups without a signal is higher by a fifth. From few prompts, pairs tell more than whole groups.
        """
        trial = self.try_out(self.prompts, replace(self.sampling, temperature=1.0), self.num_generations)
        before, after = self.trial.idle(self.size), trial.idle(self.size)
        better = min(
            run_sign_test(before, after),
            run_sign_test(trial.right(), self.trial.right()),
            run_sign_test(self.trial.cut(), trial.cut()),
        )
        alike = run_sign_test(self.trial.idle(2), trial.idle(2))
        cold = self.sampling.temperature < COLD and alike < COLD_SURE and mean(before) - mean(after) > 2 * WASTE
        if better >= SURE and not cold:
            return None
        return Finding(
            "temperature",
            f"At temperature {self.sampling.temperature:g} the entropy is {self.trial.entropy():.2g} nats a token, "
            f"{percent(before)} of the groups have equal scores and {percent(self.trial.cut())} of the completions do "
            f"not end; at 1.0 it is {trial.entropy():.2g} nats, {percent(after)} and {percent(trial.cut())}: set "
            "model.sampling.temperature to 1.0.",
        )

    def blame_verifier(self) -> Finding | None:
        """Ask whether the reward gives nothing to most answers that another verifier finds right.

        Not asked if a reward of form fires: then the verifier is strict on purpose. MathVerify, whose start takes a
        second, is asked only if hardly anything is right.
        """
        answered = [one for one in self.trial.all if one.rollout.answer is not None and one.right is not None]
        forms = [part.name for part in self.reward.list_parts() if hasattr(part, "pattern") and not part.checks_answer]
        taught = any(one.rollout.rewards[name] for one in answered for name in forms)
        if not answered or self.judge is None or taught:
            return None
        others: list[Reward] = [NumericMatch(), ExactMatch()]
        if mean(bool(one.right) for one in answered) < WASTE and importlib.util.find_spec("math_verify"):
            others.append(MathVerify())
        found: list[tuple[float, str, list[Tried]]] = []
        for other in others:
            values = score(other, [one.rollout for one in answered])
            theirs = [one for one, value in zip(answered, values, strict=True) if (value or 0.0) > 0.5]
            missed = [one for one in theirs if not one.right]
            prompts = len({one.rollout.uid for one in theirs})
            if prompts and bound_share(prompts * len(missed) / len(theirs), prompts)[0] > 0.5:
                found.append((len(missed) / len(theirs), name_of(other), missed))
        if not found:
            return None
        share, name, missed = max(found, key=lambda one: len(one[2]))
        first = missed[0].rollout
        return Finding(
            "verifier",
            f"{name_of(self.judge)}, {self.place_of_judge}, gives nothing to {share:.0%} of the answers that {name} "
            f"finds right, such as {quote(first.text)} for {quote(str(first.answer))}: ask for the form that it "
            f"reads, in the prompt or by SFT, or use {name} without a pattern.",
        )

    def blame_weights(self) -> Finding | None:
        """Ask whether parts of the reward tell completions apart, and their sum does not."""
        if not isinstance(self.reward, WeightedSum):
            return None
        pairs = zip(self.reward.rewards, self.reward.find_weights(0), strict=True)
        weights = {part.name: weight for part, weight in pairs if weight}
        idle = {name: self.trial.idle(self.size, name) for name in weights}
        alive = [name for name in weights if bound_share(sum(idle[name]), len(self.prompts))[1] < 0.5]
        if not alive:
            return None
        shares = ", ".join(f"{percent(idle[name])} of those by {name} (weight {weights[name]:g})" for name in alive)
        return Finding(
            "weights",
            f"{percent(self.trial.idle(self.size))} of the groups have equal rewards, and only {shares}: the weights "
            "let the parts cancel each other, so mend model.reward.weights.",
        )

    def blame_reward(self) -> Finding | None:
        """Ask whether the reward gives the same to all completions, and to right and wrong answers written by hand."""
        values = {one.rollout.reward for one in self.trial.all} - {None}
        if not values:
            return Finding(
                "reward",
                f"{name_of(self.reward)} scores none of the {len(self.trial.all)} completions, and such a run is "
                "refused in its first phase: look at what it returns None for.",
            )
        if len(values) > 1 or self.checking:
            return None
        # A reward of form is judged as one that never fires.
        if values == {0.0} and hasattr(self.reward, "pattern") and not self.reward.checks_answer:
            return None
        examples = self.prompts[:FEWEST]
        golds = [prompt.example.answer for prompt in examples]
        probes = [
            self.write(prompt, text)
            for prompt, gold, other in zip(examples, golds, [*golds[1:], "no idea"], strict=True)
            for text in (
                f"{gold}",
                f"The answer is {gold}.",
                f"\\boxed{{{gold}}}",
                f"<think></think><answer>{gold}</answer>",
                f"{other}",
                f"{gold}{gold}1",
            )
        ]
        parts = self.reward.score_parts(probes)
        if {self.reward.add_parts(part) for part in parts} - {None} - values:
            return None
        return Finding(
            "constant",
            f"{name_of(self.reward)} gives {values.pop():g} to all {len(self.trial.all)} completions, and also to "
            "right and wrong answers written by hand: it does not look at what is answered, or looks for a form that "
            "none has, so nothing can be learned from it. Look at how it reads the completion.",
        )

    def blame_difficulty(self) -> Finding | None:
        """Tell how the groups without signal divide into always right and never right."""
        if any(finding.cause == "format" for finding in self.check_parts()):
            return None
        if not self.judge_decides:
            scores = [one.rollout.reward for one in self.trial.all if one.rollout.reward is not None]
            return Finding(
                "signal",
                f"For {percent(self.trial.idle(self.size))} of the prompts all completions score the same (the mean "
                f"reward is {mean(scores):.3g}), so most teach nothing: take prompts or a reward by which completions "
                "differ.",
            )
        rates, total = self.trial.right(), len(self.trial.groups)
        never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
        count = len(self.trial.all)
        if bound_share(never, total)[0] > 0.5:
            right = sum(bool(one.right) for one in self.trial.all)
            return Finding(
                "hard",
                f"Too hard: {right} of {count} completions are right, and {never} of {total} prompts have none, so "
                "most groups teach nothing: take easier problems, more generations, or teach the task by SFT first.",
            )
        if bound_share(always, total)[0] > 0.5:
            return Finding(
                "easy",
                f"Too easy: {percent(rates)} of the completions are right, and all of them for {always} of {total} "
                "prompts, so most groups teach nothing: take harder problems.",
            )
        return Finding(
            "signal",
            f"{percent(self.trial.idle(self.size))} of the groups have equal scores: of {total} prompts {never} are "
            f"never answered right and {always} always. Keep the problems between, or sample more completions of each.",
        )

    def check_parts(self) -> list[Finding]:
        """Look for parts of the reward beside the comparison of answers that never give a point.

        If none of n completions earns a point, the part fires with probability p < z^2 / (n + z^2), Wilson's bound.
        Reported if even at that bound fewer than half of the groups of G would hold a point: 1 - (1 - p)^G < 1/2.
        """
        found, count = [], len(self.trial.all)
        weights = dict(zip(map(id, self.reward.list_parts()), getattr(self.reward, "weights", []), strict=False))
        for part in self.reward.list_parts():
            values = [one.rollout.rewards.get(part.name) for one in self.trial.all]
            chance = bound_share(0, count)[1]
            rare = 1 - (1 - chance) ** self.size < 0.5
            if part.checks_answer or not weights.get(id(part), 1.0) or set(values) != {0.0} or not rare:
                continue
            if part is self.judge or (part is self.reward and not hasattr(part, "pattern")):
                continue
            if min([value for value in score(part, self.write_long()) if value is not None], default=0.0) < 0:
                continue  # a penalty, whose best value is 0
            shown = quote(self.trial.all[0].rollout.text)
            pattern = getattr(getattr(part, "pattern", None), "pattern", None)
            wanted = f" for the pattern {quote(pattern)}" if pattern else ""
            found.append(
                Finding(
                    "format",
                    f"The reward {part.name} gave 0 to all {count} completions, such as {shown}{wanted}, so it teaches "
                    f"nothing: ask for that form in the prompt or teach it by SFT first, and see whether "
                    f"{self.sampling.max_completion_length} tokens have room for it.",
                )
            )
        return found

    @property
    def place_of_judge(self) -> str:
        """Where the reward that tells right from wrong is set."""
        inside = any(part is self.judge for part in walk_rewards(self.reward))
        return "as it is set" if inside else "as model.validation.accuracy"

    @property
    def judge_decides(self) -> bool:
        """Whether the reward scores right answers: it holds the judge, or agrees with it on more than nine of ten
        completions.
        """
        if any(part is self.judge for part in walk_rewards(self.reward)):
            return True
        both = [one for one in self.trial.all if one.right is not None and one.rollout.reward is not None]
        return bool(both) and mean(one.right == ((one.rollout.reward or 0.0) > 0.5) for one in both) > 1 - WASTE

    def write_long(self) -> list[Rollout]:
        """Write a completion that repeats itself beyond the token budget, so that penalties on length or repetition
        show.
        """
        text = "and so on " * self.sampling.max_completion_length
        return [self.write(prompt, text) for prompt in self.prompts[:1]]

    @property
    def positions(self) -> float:
        """Tokens that the model has positions for."""
        limit = self.module.policy.max_positions
        return 2**30 if limit is None else limit

    def write(self, prompt: TrainingPrompt, text: str) -> Rollout:
        """Make a completion of a prompt out of a text."""
        ids = self.module.policy.tokenizer(text, add_special_tokens=False).input_ids
        completion = Completion(list(ids), [0.0] * len(ids), text, "stop")
        example = prompt.example
        return Rollout(
            example.origin,
            prompt.text,
            prompt.ids,
            example.answer,
            completion,
            0,
            {},
            None,
            example.info,
            source=example.source,
        )

    def rate(self, trial: Trial) -> str:
        """Say how good the completions of a trial are."""
        if self.judge is None:
            return f"the mean reward is {mean(trial.right()):.3g}"
        return f"{percent(trial.right())} of the completions are right"


def name_of(reward: Reward) -> str:
    """Return the name of a reward as a configuration writes it, or that of its function."""
    return reward.name if isinstance(reward, FunctionReward) else type(reward).__name__


def find_mark(completion: Completion, special: dict[int, str], stops: frozenset[int]) -> str | None:
    """Return the first mark in a completion that looks as if it ended an answer, as a token or as text."""
    tokens = (special[number] for number in completion.token_ids if number in special and number not in stops)
    token = next((token for token in tokens if END_MARK.fullmatch(token)), None)
    found = END_MARK.search(completion.text)
    return token or (found[0] if found else None)
