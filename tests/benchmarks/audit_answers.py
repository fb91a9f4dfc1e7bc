"""Generated answers for verifiers that compare with a gold answer; each label follows from how the answer was made."""

from collections.abc import Iterator
from fractions import Fraction
from random import Random

from audit_cases import Case

ARABIC, DEVANAGARI, THAI, FULL = (str.maketrans("0123456789", digits) for digits in (
    "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669",
    "\u0966\u0967\u0968\u0969\u096a\u096b\u096c\u096d\u096e\u096f",
    "\u0e50\u0e51\u0e52\u0e53\u0e54\u0e55\u0e56\u0e57\u0e58\u0e59",
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19",
))  # fmt: skip
OTHER_DIGITS = {
    "Arabic digits": ARABIC,
    "Devanagari digits": DEVANAGARI,
    "Thai digits": THAI,
    "full-width digits": FULL,
}


def draw_value(rng: Random) -> tuple[Fraction, str]:
    """Return a number and how a data set writes it."""
    kind = rng.randrange(5)
    if kind == 0:
        value = Fraction(rng.randint(2, 99))
    elif kind == 1:
        value = Fraction(rng.randint(1001, 999_999))
    elif kind == 2:
        value = Fraction(-rng.randint(2, 999))
    elif kind == 3:
        value = Fraction(rng.randrange(1, 2000, 2), rng.choice((2, 4, 5, 8, 10, 20)))
    else:
        value = Fraction(rng.randint(1, 9) * 2 - 1, rng.choice((3, 7, 9, 11)) + 0)
        value = value if value.denominator > 1 else value + Fraction(1, 7)
    return value, write_plain(value)


def write_plain(value: Fraction) -> str:
    """Return an integer or a decimal where there is a finite one, else a fraction."""
    scaled = value * 10**4
    if scaled.denominator > 1:
        return f"{value.numerator}/{value.denominator}"
    whole, rest = divmod(abs(int(scaled)), 10**4)
    return ("-" if value < 0 else "") + (f"{whole}.{rest:04d}".rstrip("0") if rest else str(whole))


def write_equal(value: Fraction, rng: Random) -> dict[str, str]:
    """Return ways to write a number, by kind."""
    plain, top, bottom = write_plain(value), value.numerator, value.denominator
    sign, size = ("-" if value < 0 else ""), abs(top)
    ways = {
        "plain": plain,
        "LaTeX fraction": f"{sign}\\frac{{{size * 3}}}{{{bottom * 3}}}",
        "fraction": f"{top * 2}/{bottom * 2}",
    }
    if "/" not in plain:
        ways |= {"zeros": plain + ("00" if "." in plain else ".0"), "unit": f"{plain} km", "power of ten": f"{plain}e0"}
        ways |= {kind: plain.translate(digits) for kind, digits in OTHER_DIGITS.items()}
    if bottom == 1 and size > 999:
        ways |= {"thousands comma": f"{top:,}", "thousands space": f"{top:,}".replace(",", "\u202f")}
        ways |= {"LaTeX comma": f"{top:,}".replace(",", "{,}"), "money": f"${top:,}"}
    if value < 0:
        ways |= {"real minus": plain.replace("-", "\u2212")}
    if value == Fraction(1, 2):
        ways |= {"sign": "\u00bd"}
    if bottom > 1 and size > bottom and value > 0:
        ways |= {"mixed": f"{size // bottom} {size % bottom}/{bottom}"}
    return ways


def write_other(value: Fraction, rng: Random) -> dict[str, str]:
    """Return numbers that are not this one, by kind."""
    plain = write_plain(value)
    others = {
        "one more": value + 1,
        "one less": value - 1,
        "sign": -value,
        "ten times": value * 10,
        "a half more": value + Fraction(1, 2),
        "turned over": 1 / value,
    }
    found = {kind: write_plain(other) for kind, other in others.items() if other != value}
    if value.denominator not in (1, 2, 4, 5, 8, 10, 20):
        found["rounded"] = f"{float(value):.2f}"
        found["only the numerator"] = str(value.numerator)
    elif value.denominator > 1:
        found["whole part"] = str(int(value))
    if plain[::-1] != plain and plain.isdigit() and plain[-1] != "0":
        found["digits turned"] = plain[::-1]
    if "." in plain:
        found["point lost"] = plain.replace(".", "")
    return found


# Texts that end with an answer, by kind; {a} is the answer, {o} other numbers.
PLAIN = {
    "alone": "{a}",
    "sentence": "The answer is {a}.",
    "bold": "So the answer is **{a}**.",
    "worked": "First {o} + {p} and then some more. So the answer is {a}",
    "after thinking": "<think>Is it {o}? No.</think>\nThe answer is {a}.",
    "two thoughts": "<think>{o}</think><think>{p}</think>{a}",
    "hashes": "{o} + {p} is not it.\n#### {a}",
    "trailing words": "The answer is {a}, as was to be shown.",
    "Chinese": "\u9996\u5148\u770b{o}\u3002\u7b54\u6848\u662f{a}\u3002",
    "Thai": "\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d {a}",
    "answer tag": "<think>{o}</think><answer>{a}</answer>",
    "dollars": "So it is ${a}$.",
    "box": "Therefore $\\boxed{{{a}}}$.",
    "box in a box": "$\\boxed{{\\boxed{{{a}}}}}$",
    "display": "\\[ x = \\boxed{{{a}}} \\]",
}
# Texts without a final answer, whatever {a} is.
WITHOUT = {
    "only in the thinking": "<think>The answer is {a}.</think>I cannot tell.",
    "unclosed thinking": "<think>The answer is {a}.",
    "boxed in the thinking": "<think>\\boxed{{{a}}}</think>Nobody knows.",
    "empty": "",
    "refusal": "I am sorry, but I cannot answer that.",
}


def fill(text: str, answer: str, rng: Random) -> str:
    """Return a text with an answer in it and other numbers elsewhere."""
    return text.format(a=answer, o=rng.randint(1000, 9999) * 7, p=rng.randint(1000, 9999) * 11)


def number_cases(rng: Random, count: int = 120) -> Iterator[Case]:
    """Yield numbers: each drawn value in other ways, other values, and values at places that do not count."""
    for _ in range(count):
        value, gold = draw_value(rng)
        equal, other = write_equal(value, rng), write_other(value, rng)
        for way, said in rng.sample(sorted(equal.items()), min(5, len(equal))):
            place = rng.choice(sorted(PLAIN))
            if "$" in said and "$" in PLAIN[place]:  # an amount inside a formula
                place = "sentence"
            yield Case(f"right, {way}, {place}", fill(PLAIN[place], said, rng), 1.0, gold)
        for way, said in rng.sample(sorted(other.items()), min(5, len(other))):
            place = rng.choice(sorted(PLAIN))
            yield Case(f"wrong, {way}, {place}", fill(PLAIN[place], said, rng), 0.0, gold)
        place = rng.choice(sorted(WITHOUT))
        yield Case(f"wrong, {place}", fill(WITHOUT[place], gold, rng), 0.0, gold)
        first = write_plain(value + rng.randint(1, 9))
        yield Case("wrong, right one first, then another", f"It is {gold}. No, it is {first}.", 0.0, gold)
        yield Case("wrong, right one first, or another", f"It is {gold} or {first}", 0.0, gold)
        yield Case("right, another first, then the right one", f"It is {first}. No, it is {gold}.", 1.0, gold)


def unreadable_numbers(rng: Random) -> Iterator[Case]:
    """Yield gold answers that are no number, and answers that are formulas or words."""
    for word in ("Paris", "x+1", "(B)", "\\sqrt{2}", "2^{10}", "1, 2", "about", "5!"):
        yield Case("gold is no number", "The answer is 5.", None, word)
    for said in ("2^{3}", "\\sqrt{8}", "x = 8!", "x_8", "B8", "0x8", "8 or so pairs of 4", "8^{2}"):
        yield Case("wrong, part of a formula or a word", f"The answer is {said}", 0.0, "8")


def numeric_match_cases(rng: Random) -> Iterator[Case]:
    """Yield the cases of NumericMatch."""
    yield from number_cases(rng)
    yield from unreadable_numbers(rng)


def box(place: str, said: str, rng: Random) -> str:
    """Return a text with a formula as its final answer."""
    return {
        "box": f"Therefore $\\boxed{{{said}}}$.",
        "display": f"\\[\\boxed{{{said}}}\\]",
        "dollars": f"The answer is ${said}$.",
        "after thinking": f"<think>Try ${rng.randint(2, 9)}$.</think>\nThe answer is $\\boxed{{{said}}}$.",
        "bold": f"**Answer:** $\\boxed{{{said}}}$",
        "Chinese": f"\u6240\u4ee5\u7b54\u6848\u662f$\\boxed{{{said}}}$\u3002",
        "Thai": f"\u0e14\u0e31\u0e07\u0e19\u0e31\u0e49\u0e19\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d $\\boxed{{{said}}}$",
        "trailing words": f"So $\\boxed{{{said}}}$ is the answer, and we are done.",
    }[place]


# Two answers, of which none is the final one.
HEDGES = {
    "two boxes, or": "It is $\\boxed{{{a}}}$ or $\\boxed{{{b}}}$.",
    "two boxes, and": "It is $\\boxed{{{a}}}$ and $\\boxed{{{b}}}$.",
    "or in a box": "\\boxed{{{a} \\text{{ or }} {b}}}",
}
BARE_HEDGES = {
    "or": "The answer is {a} or {b}.",
    "or, bold": "**Answer:** {a} or {b}",
    "either": "The answer is either {a} or {b}.",
    "dollars": "The answer is ${a}$ or ${b}$.",
    "maybe": "The answer is {a}, or maybe {b}",
}
PLACES = ("box", "display", "dollars", "after thinking", "bold", "Chinese", "Thai", "trailing words")


def formulas(rng: Random, kind: int) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return a gold formula of one of seven kinds, equal ones and unequal ones by how they differ."""
    a, b, c = rng.randint(2, 9), rng.randint(10, 19), rng.choice((3, 5, 7, 11))
    if kind == 0:  # roots: a sqrt(c)
        gold = f"{a}\\sqrt{{{c}}}"
        return gold, {"root": f"\\sqrt{{{a * a * c}}}", "same": gold}, {
            "root": f"{a}\\sqrt{{{c + 1}}}", "only the factor": str(a), "only the root": f"\\sqrt{{{c}}}"}  # fmt: skip
    if kind == 1:  # polynomials
        gold = f"(x+{a})(x-{b})"
        return gold, {"expanded": f"x^2-{b - a}x-{a * b}", "reordered": f"(x-{b})(x+{a})"}, {
            "sign": f"(x-{a})(x-{b})", "factor": f"(x+{a})", "other": f"x^2+{b - a}x-{a * b}"}  # fmt: skip
    if kind == 2:  # tuples
        gold = f"({a}, {b})"
        return gold, {"spaces": f"({a},{b})", "left right": f"\\left({a}, {b}\\right)"}, {
            "swapped": f"({b}, {a})", "part": str(a), "other": f"({a}, {b + 1})", "three": f"({a}, {b}, {c})"}  # fmt: skip
    if kind == 3:  # sets
        gold = f"\\{{{a}, {b}, {b + 5}\\}}"
        return gold, {"reordered": f"\\{{{b + 5}, {a}, {b}\\}}", "same": gold}, {
            "part": f"\\{{{a}, {b}\\}}", "one element": str(a), "more": f"\\{{{a}, {b}, {b + 5}, {b + 6}\\}}"}  # fmt: skip
    if kind == 4:  # intervals
        gold = f"[{a}, {b})"
        return gold, {"spaces": f"[{a},{b})", "left right": f"\\left[{a}, {b}\\right)"}, {
            "closed": f"[{a}, {b}]", "open": f"({a}, {b})", "end": f"[{a}, {b + 1})"}  # fmt: skip
    if kind == 5:  # fractions with pi
        gold = f"\\frac{{{a}\\pi}}{{{b}}}"
        return gold, {"other fraction": f"\\frac{{{2 * a}\\pi}}{{{2 * b}}}", "factor": f"\\frac{{{a}}}{{{b}}}\\pi"}, {
            "without pi": f"\\frac{{{a}}}{{{b}}}", "other": f"\\frac{{{a + 1}\\pi}}{{{b}}}", "pi alone": "\\pi"}  # fmt: skip
    gold = f"{a}x+{b}"
    return gold, {"reordered": f"{b}+{a}x", "same": gold}, {
        "other": f"{a}x-{b}", "without x": f"{a}+{b}", "part": f"{a}x"}  # fmt: skip


def math_verify_cases(rng: Random) -> Iterator[Case]:
    """Yield numbers and formulas."""
    yield from number_cases(rng, 30)
    for number in range(63):
        gold, equal, other = formulas(rng, number % 7)
        for way, said in equal.items():
            place = rng.choice(PLACES)
            yield Case(f"right, {way}, {place}", box(place, said, rng), 1.0, gold)
        for way, said in other.items():
            place = rng.choice(PLACES)
            yield Case(f"wrong, {way}, {place}", box(place, said, rng), 0.0, gold)
        place = rng.choice(sorted(WITHOUT))
        yield Case(f"wrong, {place}", fill(WITHOUT[place], gold, rng), 0.0, gold)
        wrong = rng.choice(sorted(other.values()))
        two = f"It is $\\boxed{{{gold}}}$. No, it is $\\boxed{{{wrong}}}$."
        yield Case("wrong, right one first, then another", two, 0.0, gold)
        if gold.startswith("\\{"):
            beside = f"It is $\\boxed{{{gold}}}$ or $\\boxed{{{other['part']}}}$."
            yield Case("wrong, a part of a set beside the set", beside, 0.0, gold)
        kind, hedge = rng.choice(sorted(HEDGES.items()))
        first, second = rng.sample((gold, wrong), 2)
        yield Case(f"wrong, two formulas, {kind}", hedge.format(a=first, b=second), 0.0, gold)
    for _ in range(8):
        value, gold = draw_value(rng)
        pair = [gold, write_plain(value + rng.randint(1, 9))]
        for kind, hedge in {**HEDGES, **BARE_HEDGES}.items():
            rng.shuffle(pair)
            yield Case(f"wrong, two numbers, {kind}", hedge.format(a=pair[0], b=pair[1]), 0.0, gold)


WORDS = [
    "river",
    "stone",
    "cloud",
    "paper",
    "seven",
    "light",
    "north",
    "garden",
    "winter",
    "silver",
    "copper",
    "window",
    "bridge",
    "island",
    "market",
]
CJK = "\u5317\u4eac\u4e0a\u6d77\u5929\u6d25\u91cd\u5e86\u6b66\u6c49\u897f\u5b89"
THAI_LETTERS = "\u0e01\u0e02\u0e04\u0e07\u0e08\u0e09\u0e0a\u0e14\u0e15\u0e16\u0e17\u0e19"


def exact_match_cases(rng: Random) -> Iterator[Case]:
    """Yield answers in the strict template of think and answer tags."""
    for _ in range(70):
        gold = rng.choice(
            (" ".join(rng.sample(WORDS, 2)), str(rng.randint(1, 999)), "".join(rng.sample(CJK, 3)), "\\frac{1}{2}")
        )
        other = gold + rng.choice(("s", "0", ".", "\u3002"))
        yield Case("right", f"<think>Let me see.</think><answer>{gold}</answer>", 1.0, gold)
        yield Case("right, spaces", f"<think>{other}</think>\n<answer> {gold}\n</answer>\n", 1.0, gold)
        yield Case("right, spaces in the gold answer", f"<think></think><answer>{gold}</answer>", 1.0, f" {gold} ")
        yield Case("wrong, another answer", f"<think>{gold}</think><answer>{other}</answer>", 0.0, gold)
        yield Case("wrong, two answers", f"<think>a</think><answer>{gold}</answer><answer>{gold}</answer>", 0.0, gold)
        yield Case("wrong, only in the thinking", f"<think><answer>{gold}</answer></think>", 0.0, gold)
        yield Case("wrong, no template", gold, 0.0, gold)
        yield Case("wrong, trailing text", f"<think>a</think><answer>{gold}</answer> done", 0.0, gold)
        yield Case("wrong, other case", f"<think>a</think><answer>{gold.swapcase()}x</answer>", 0.0, gold)
    yield Case("no gold answer", "<think>a</think><answer>b</answer>", None, None)


def think_answer_cases(rng: Random) -> Iterator[Case]:
    """Yield well-formed completions, and each with one fault."""
    for _ in range(50):
        thought, answer = " ".join(rng.sample(WORDS, 4)), " ".join(rng.sample(WORDS, 2))
        thought += rng.choice(("", " 1 < 2", " <b>x</b>", "\n\n\u5317\u4eac", " $\\boxed{3}$"))
        good = f"<think>{thought}</think>\n<answer>{answer}</answer>"
        yield Case("right", good, 1.0)
        yield Case("right, spaces", f"\n  {good}\n\n", 1.0)
        yield Case("right, opened by the prompt", good.removeprefix("<think>"), 1.0, prompt="Question?\n<think>")
        yield Case("right, empty parts", "<think></think><answer></answer>", 1.0)
        faults = {
            "trailing text": good + "\nDone.",
            "text in front": f"Sure! {good}",
            "text between": good.replace("</think>\n", "</think> so "),
            "two answers": good + f"<answer>{answer}</answer>",
            "two thoughts": f"<think>{thought}</think>{good}",
            "answer in the thinking": good.replace(thought, f"{thought}<answer>{answer}</answer>"),
            "answer not closed": good.removesuffix("</answer>"),
            "thinking not closed": good.replace("</think>", ""),
            "thinking not opened": good.removeprefix("<think>"),
            "wrong order": f"<answer>{answer}</answer><think>{thought}</think>",
            "other case": good.replace("think>", "Think>"),
            "no tags": answer,
            "empty": "",
        }
        yield from (Case(f"wrong, {kind}", text, 0.0) for kind, text in faults.items())


def regex_format_cases(rng: Random) -> Iterator[Case]:
    """Yield completions for the pattern of lines ``name: number``, labelled by how they are put together."""
    for _ in range(60):
        lines = [f"{rng.choice(WORDS)}: {rng.randint(0, 99)}" for _ in range(rng.randint(1, 4))]
        text = "\n".join(lines)
        yield Case("right", text, 1.0)
        yield Case("right, first line", lines[0], 1.0)
        yield Case("right, twice", f"{text}\n{text}", 1.0)
        yield Case("right, long number", f"{text}{rng.randint(1, 10**30)}", 1.0)
        yield Case("wrong, trailing line end", text + "\n", 0.0)
        yield Case("wrong, trailing text", text + "\nthat is all", 0.0)
        yield Case("wrong, text in front", "so\n" + text, 0.0)
        yield Case("wrong, a word for a number", text + "x", 0.0)
        yield Case("wrong, empty", "", 0.0)


def multiple_choice_cases(rng: Random) -> Iterator[Case]:
    """Yield stated letters in all the ways that the reward's docstring promises, and what states none or several."""
    ways = {
        "alone": "{x}", "brackets": "({x})", "small letter": "({y})", "full stop": "{x}.", "bold": "**{x}**",
        "with its text": "{x}) {t}", "brackets with its text": "({x}) {t}", "sentence": "The answer is {x}.",
        "colon": "Answer: {x}", "bold colon": "**Answer:** {x}", "all bold": "**Answer: ({x})**", "box": "$\\boxed{{{x}}}$",
        "text in a box": "\\boxed{{\\text{{{x}}}}}", "bold in a box": "\\boxed{{\\textbf{{({x})}}}}",
        "correct option": "The correct option is ({x}).", "because": "The answer is {x} because the others are wrong.",
        "lines": "A is not it and {o} is not it either.\n\nAnswer: {x}", "last line": "Let me think about {o}.\n\n**{x}**",
        "after thinking": "<think>Answer: {o}</think>The answer is ({x}).", "answer tag": "<answer>{x}</answer>",
        "tag with its text": "<think>hm</think><answer>({x}) {t}</answer>", "Chinese": "\u6240\u4ee5\u7b54\u6848\u662f{x}\u3002",
        "Chinese colon": "\u7b54\u6848\uff1a{x}", "Thai": "\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d \u0e02\u0e49\u0e2d {x}",
        "Japanese": "\u7b54\u3048\u306f{x}\u3067\u3059\u3002", "Korean": "\uc815\ub2f5\uc740 {x}\uc785\ub2c8\ub2e4.",
        "full-width letter": "\u7b54\u6848\u662f{f}", "changed": "The answer is {o}.\nNo, I was wrong. The answer is {x}.",
        "explained": "Answer: {x}\nExplanation: {o} has the wrong sign.", "option": "The answer is option {x}.",
        "box with its text": "\\boxed{{\\text{{({x}) {t}}}}}", "next line": "The answer is:\n{x}",
    }  # fmt: skip
    without = {
        "both": "The answer is {x} or {o}.", "both with commas": "Answer: {x}, {o}", "two boxes": "\\boxed{{{x}}} or \\boxed{{{o}}}",
        "two tags": "<answer>{x}</answer><answer>{o}</answer>", "both in a tag": "<answer>{x} or {o}</answer>",
        "and": "Answer: {x} and {o}", "only in the thinking": "<think>The answer is {x}.</think>I do not know.",
        "unclosed thinking": "<think>The answer is {x}.", "negated": "The answer is not {x}.", "negated short": "The answer isn't {x}.",
        "in a word": "The answer is {x}erlin.", "two letters": "{x}{o}", "number behind": "{x}2", "its text": "The answer is {t}.",
        "all options": "A) {t}\nB) {t}\nC) {t}\nD) {t}\nE) {t}", "no statement": "{x} looks good to me, and so does {o}.", "empty": "",
        "refusal": "I cannot choose.", "slash": "Answer: {x}/{o}", "Chinese both": "\u7b54\u6848\u662f{x}\u6216{o}\u3002",
        "Thai both": "\u0e04\u0e33\u0e15\u0e2d\u0e1a: {x} \u0e2b\u0e23\u0e37\u0e2d {o}", "changed": "The answer is {x}.\nNo, I was wrong. The answer is {o}.",
        "letter of another script": "The answer is \u0412.", "boxed product": "\\boxed{{{x}{o}}}",
    }  # fmt: skip
    golds = ("{x}", "({x})", "{x}.", "{x}) {t}", "#### {x}", "{y}", "\\boxed{{{x}}}")
    for round_ in range(8):
        for label, texts in ((1.0, ways), (0.0, without)):
            for kind, text in texts.items():
                letter, other = rng.sample("ABCDE", 2)
                words = {
                    "x": letter,
                    "y": letter.lower(),
                    "o": other,
                    "t": rng.choice(WORDS),
                    "f": chr(ord(letter) + 0xFEE0),
                }
                gold = golds[round_ % len(golds)].format(**words)
                yield Case(f"{'right' if label else 'wrong'}, {kind}", text.format(**words), label, gold)
                if label and kind not in ("explained", "changed", "lines"):  # the same statement of another letter
                    yield Case(
                        f"wrong, {kind}",
                        text.format(
                            **words | {"x": other, "y": other.lower(), "o": letter, "f": chr(ord(other) + 0xFEE0)}
                        ),
                        0.0,
                        gold,
                    )
    options = ["river", "stone", "cloud", "paper"]
    for place, option in enumerate(options):
        yield Case("right, gold is the option's text", f"Answer: {'ABCD'[place]}", 1.0, option, {"options": options})
        yield Case(
            "wrong, gold is the option's text", f"Answer: {'ABCD'[place - 1]}", 0.0, option, {"options": options}
        )
    for gold in ("12", "Paris", "A or B", "", "42 B"):
        yield Case("gold is no letter", "Answer: B", None, gold)
    yield Case("no gold answer", "Answer: B", None, None)


def token_f1_cases(rng: Random) -> Iterator[Case]:
    """Yield answers with a known number of words in common with the gold one."""
    for _ in range(120):
        letters = rng.random() < 0.3
        pool = list(rng.choice((CJK, THAI_LETTERS))) if letters else WORDS
        shared = rng.sample(pool, rng.randint(0, 4))
        rest = [word for word in pool if word not in shared]
        rng.shuffle(rest)
        mine, theirs = rest[: rng.randint(0, 3)], rest[3 : 3 + rng.randint(0 if shared else 1, 3)]
        if not shared and not mine:
            mine = rest[:1]
        total = 2 * len(shared) + len(mine) + len(theirs)
        label = 2 * len(shared) / total
        said, gold = shared + mine, shared + theirs
        rng.shuffle(said)
        glue = "" if letters else " "
        text, answer = glue.join(said), glue.join(gold)
        yield Case("plain", text, label, answer)
        yield Case("after thinking", f"<think>{answer}</think>{text}", label, answer)
        yield Case("answer tag", f"So:\n<answer>{text}</answer>", label, answer)
        if letters:
            yield Case("punctuation of another script", "\u3001".join(said) + "\u3002", label, answer)
        else:
            yield Case("case, articles and punctuation", "The " + ", a ".join(said).upper() + "!", label, answer)
        yield Case("only in the thinking", f"<think>{answer}</think>", 0.0, answer)
        yield Case("two tags", f"<answer>{answer}</answer><answer>{answer}</answer>", 0.0, answer)
    yield Case("no gold answer", "x", None, None)
