"""Audits every verifier on generated answers whose label follows from how they were made.

Run: python tests/benchmarks/audit_verifiers.py [NAME ...] [--seed 0] [--errors 3]      or: make audit-verifiers

Prints the table of modules/rewards/README.md and one line per verifier. Exits 1 if a verifier calls more than 0.5 % of
the wrong answers right, or more than 2 % of the right ones wrong.
"""

import argparse
import re
import sys
import warnings

import audit_answers as answers
import audit_programs as programs
import audit_writing as writing
from audit_cases import Audit, Case, Finding, find_interval, run_audit

from callbacks.measures.refusals import is_refusal
from modules import rewards
from modules.rewards.chat.judge import PAIRWISE, fill_template, read_verdict
from modules.rewards.format import THINK_ANSWER
from modules.types import cut_final_text

MOST_HIGH, MOST_LOW = 0.005, 0.02
SECONDS = 2.0  # for a program with its tests
SLOW = ("CodeTests",)  # each case starts processes
ANSWERS = re.compile(
    r"\[Answer A (\w{8})\]\n(.*)\n\[End of answer A \1\]\n\n\[Answer B \1\]\n(.*)\n\[End of answer B \1\]", re.DOTALL
)
LINES = r"(?:[a-z]+: \d+(?:\n(?!\Z))?)+"


def score_refusals(cases: list[Case]) -> list[float | None]:
    """Return whether each answer is a refusal, by its first words."""
    finals = [cut_final_text(case.text) for case in cases]
    return [
        None if not final.strip() and case.text else float(is_refusal(final))
        for final, case in zip(finals, cases, strict=True)
    ]


def score_judge_replies(cases: list[Case]) -> list[float | None]:
    """Return the verdict that is read from each reply."""
    return [read_verdict(case.text) for case in cases]


def score_judge_questions(cases: list[Case]) -> list[float | None]:
    """Return whether the marks of each question enclose both answers as they are."""
    scores: list[float | None] = []
    for case in cases:
        first, second = case.info["answers"]
        found = ANSWERS.search(fill_template(PAIRWISE, prompt="Question?", first=first, second=second))
        scores.append(float(found is not None and list(found.groups()[1:]) == [first, second]))
    return scores


AUDITS = [
    Audit("MathVerify", rewards.MathVerify, answers.math_verify_cases),
    Audit("NumericMatch", rewards.NumericMatch, answers.numeric_match_cases),
    Audit("ExactMatch", lambda: rewards.ExactMatch(THINK_ANSWER), answers.exact_match_cases),
    Audit("MultipleChoice", rewards.MultipleChoice, answers.multiple_choice_cases),
    Audit("TokenF1", rewards.TokenF1, answers.token_f1_cases, tolerance=1e-9),
    Audit("ThinkAnswerFormat", rewards.ThinkAnswerFormat, answers.think_answer_cases),
    Audit("RegexFormat", lambda: rewards.RegexFormat(LINES), answers.regex_format_cases),
    Audit("ReasoningGymScore", rewards.ReasoningGymScore, writing.reasoning_gym_cases),
    Audit("InstructionConstraints", rewards.InstructionConstraints, writing.constraint_cases),
    Audit("LanguageConsistency", rewards.LanguageConsistency, writing.language_cases, tolerance=1e-9),
    Audit(
        "ScriptConsistency",
        lambda: rewards.ScriptConsistency(list(writing.ALPHABETS)),
        writing.script_cases,
        tolerance=1e-9,
    ),
    Audit("Repetition", rewards.Repetition, writing.repetition_cases, tolerance=1e-9),
    Audit("KimiLength", lambda: rewards.KimiLength(rewards.ExactMatch()), writing.kimi_cases, tolerance=1e-9),
    Audit("OverlongPenalty", lambda: rewards.OverlongPenalty(100, 40), writing.overlong_cases, tolerance=1e-9),
    Audit(
        "CosineLength", lambda: rewards.CosineLength(rewards.ExactMatch(), 100), writing.cosine_cases, tolerance=1e-9
    ),
    Audit("CodeTests", lambda: rewards.CodeTests(seconds=SECONDS), programs.program_cases),
    Audit("refusal matcher", score_refusals, writing.refusal_cases),
    Audit("questions to a judge", score_judge_questions, writing.judge_question_cases),
    Audit("verdicts of a judge", score_judge_replies, writing.judge_reply_cases),
]


def write_share(count: int, total: int) -> str:
    """Return a share with its interval, in per cent."""
    low, high = find_interval(count, total)
    if total == 0:
        return "none made"
    return f"{100 * count / total:.1f} % of {total} ({100 * low:.1f} to {100 * high:.1f})"


def write_row(finding: Finding) -> str:
    """Return a verifier's row of the table."""
    failed = ", ".join(finding.kinds) or "none"
    high, low = write_share(finding.high, finding.may_be_high), write_share(finding.low, finding.may_be_low)
    return f"| `{finding.name}` | {finding.cases} | {high} | {low} | {failed} |"


def is_within(finding: Finding) -> bool:
    """Return whether a verifier meets the targets."""
    return (
        finding.high <= MOST_HIGH * finding.may_be_high
        and finding.low <= MOST_LOW * finding.may_be_low
        and finding.cases >= 300
    )


TITLE = [
    "| verifier | cases | wrong called right (95 % interval) | right called wrong or not scored | kinds with errors |",
    "|---|---|---|---|---|",
]


def main(arguments: list[str] | None = None) -> int:
    """Run the audits and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="verifiers; none = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--errors", type=int, default=0, help="errors to print of each verifier")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    findings = [run_audit(audit, options.seed) for audit in AUDITS if not options.names or audit.name in options.names]
    print("\n".join([*TITLE, *map(write_row, findings)]))
    for finding in findings:
        for case, score in finding.examples[: options.errors]:
            print(f"{finding.name}: {case.kind}: got {score}, label {case.label}: {case.text!r}, gold {case.answer!r}")
    for finding in findings:
        verdict = "ok" if is_within(finding) else "MISSED"
        print(
            f"audit: {finding.name} {verdict} wrong {finding.high}/{finding.may_be_high} right {finding.low}/{finding.may_be_low}"
        )
    return 0 if all(map(is_within, findings)) else 1


if __name__ == "__main__":
    sys.exit(main())
