"""Texts by hand that follow an instruction of IFBench, texts that do not, and near misses."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from audit_answers import WORDS
from audit_cases import Case
from constraint_references import REFERENCES

STORY = (
    "Ann left. Bob ran. Cid sat. Dan hid. Eve sang. Fay slept. Gus dug. Hal read. Ian rode. Jim swam. Kit drew. Lou fell. "
    "Max rose. Ned cried. Ona spoke. Pat wept. Quin ate. Ray cut. Sue dyed. Tom fled. Una won. Vic bit. Wes lit. Xan met. "
    "Yves put. Zed came."
)
QUIZ = "\n\n".join(
    f"Question {number}: {text}?\n" + "\n".join(f"{letter}) {word}" for letter, word in zip("ABCDE", WORDS, strict=False))
    for number, text in enumerate(("Who was Dali", "Which school did Klee join", "In which city did Frida Kahlo paint most", "Which of these painters did not take part in the Armory Show"), 1)
)  # fmt: skip
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f"{row},Italy,Rome,200{row},{row}0" for row in range(1, 8))
GOODS = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f"{row},Toys,Tock,{row}9,{row}" for row in range(1, 15))
GOODS = GOODS.replace("5,Toys,Tock", '5,Toys,"Tick & Tock"', 1)
COLUMNS = ["StudentID", "Subject", "Grade", "Semester", "Score"]
GRADES = "\n".join("\t".join(f'"{cell}"' for cell in row) for row in (COLUMNS, *([str(one), "Art", "A", "Fall", "9"] for one in (1, 2, 3))))  # fmt: skip
PALINDROMES = "level radar civic rotor kayak refer madam tenet stats rotator"
REQUEST = "Name a prime number above ten."
REFERENCE = "The quick brown fox jumps over the lazy dog"
KEYS = {f"keyword{number}": word for number, word in enumerate(("zebra", "quartz", "violin", "jungle", "copper"), 1)}
KEYWORDS = "zebra quartz quartz violin violin violin" + " jungle" * 5 + " copper" * 7

FORMS = ("format:", "custom:")  # of which a text may lose or swap words without a reason to be wrong


@dataclass(frozen=True)
class Texts:
    """Settings of a row, and texts with their labels by hand."""

    right: list[str]
    wrong: list[str]
    settings: dict[str, Any] = field(default_factory=dict)


TEXTS: dict[str, list[Texts]] = {
    "count:word_count_range": [Texts(
        ["one two three four five", "one two three four five six seven", "It's one day's walk, don't run.", "one  two\nthree four \u2014 five", "\u00fcber na\u00efve caf\u00e9 d\u00e9j\u00e0 vu"],
        ["one two three four", "one two three four five six seven eight", "don't can't won't it's", "one two - three four"], {"min_words": 5, "max_words": 7},
    )],
    "count:unique_word_count": [Texts(
        ["one two three four five", "One two three four five one one", "\u201cone\u201d two, three; four: (five)", "na\u00efve naive two three four"],
        ["one two three four", "One one ONE one, one.", "one - two \u2014 three four", "one two three four four \u2013", "\u201cone\u201d one two three four"], {"N": 5},
    )],
    "ratio:sentence_type": [Texts(
        ["He ran. She sat. Who won?", "Who won? He ran. She sat.", "He ran. She sat. Who won? Stop!", "He ran.\nShe sat.\nWho won?"],
        ["He ran. Who won?", "He ran. She sat. They left. Who won?", "He ran. She sat.", "Stop now! Go on!", "Who won? Who lost? He ran."],
    )],
    "ratio:sentence_balance": [Texts(
        ["He ran. Who won? Stop!", "Stop! He ran. Go! She sat. Who won? Who lost?", "He ran.\nWho won?\nStop!"],
        ["He ran. Who won?", "He ran. She sat. Who won? Stop!", "river stone", "Stop! Go!", "He ran. She sat."],
    )],
    "count:conjunctions": [Texts(
        ["He ran and fell but stood or sat.", "And so he ran, yet fell.", "For rain \u201cor\u201d snow, \u2018nor\u2019 wind.", "AND, BUT, OR"],
        ["He ran and fell and, and stood.", "And he and she AND all, but", "sandy butter orbit form", "He ran because it rained although cold", "and or"], {"small_n": 3},
    )],
    "count:person_names": [Texts(
        ["Emma met Liam and Noah.", "Leo, Zoe, Ella's dog", "Ava/Mia/Nora", "\u201cDavid\u201d saw \u201cHannah\u201d (Grace)."],
        ["Emma met Liam and Paul.", "emma liam noah", "Emma, Emma and Emma", "Avalon Miami Leopard", "Noah met Leonard and Graceful Ellas."], {"N": 3},
    )],
    "ratio:overlap": [
        Texts([REFERENCE], [REFERENCE[:21] + "zzzzzzzzzzzzzzzzzzzzzz", "zzz yyy xxx", "THE QUICK BROWN FOX", "ok"], {"reference_text": REFERENCE, "percentage": 100}),
        # 10 trigrams of letters, 5 of them in the text: 12 letters
        Texts(["abcdefgzyxwv", "zyxwvabcdefg"[:0] + "gfabcdefgqrs"[2:] + "yz"], ["abcdefghijkl", "abcdezyxwvut", "abcdefghzyxw"], {"reference_text": "abcdefghijkl", "percentage": 50}),
    ],
    "count:numbers": [Texts(
        ["I saw 3 cats, 12 dogs and 7 birds.", "1, 2, 3", "3.14 and 1,000 and 42", "pages 3-4 and 9", "pages 3\u20134 and 9", "1 2\n3"],
        ["I saw 3 cats and 12 dogs.", "1 2 3 4", "three four five", "pages 3-4", "123"], {"N": 3},
    )],
    "words:alphabet": [Texts(
        ["apes bring cold dark evening fires", "your zoo and birds", "Apes, Bring; cold.", "\u201cApes\u201d bring \u2018cold\u2019", "apes \u2014 bring - cold", "APES  bring\nCold"],
        ["apes cold bring dark", "apes apes bring", "your zoo bees and", "zoo yard", "apes bring, dark"],
    )],
    "words:vowel": [Texts(
        ["He gets tea at night.", "Sam let it sit.", "It is a red sea.", "IT IS A RED SEA", "na\u00efve s\u00e9ance cats"],
        ["Go up, red cat.", "You eat.", "He is at our door", "r\u00f3d let it at", "He gets tea.\n\nIt is late."],
    )],
    "words:consonants": [Texts(
        ["fresh plants grow", "Fresh Plants", "fresh, plants.", "fresh - plants \u2014 grown", "\u201cfresh\u201d plants", "fresh\nplants"],
        ["fresh plants are", "a fresh plant", "see me go", "fresh no-one tea", "FRESH TEA"],
    )],
    "sentence:alliteration_increment": [Texts(
        ["He runs off. Big bears sit. Six sad seals sing.", "He ran far. Cats can go.", "\u201cBig bears\u201d sit. Six sad seals swim."],
        ["Big bears sit. Cats can go.", "Big bad boys ran. Cats can do dumb feats.", "He ran far. She saw it go. An owl sat.", "Six sad seals sing. Big bears sit.", "Big bad boys ran. Cats can dig. Six sad seals sing."],
    )],
    "words:palindrome": [Texts(
        [PALINDROMES, PALINDROMES.title(), PALINDROMES.replace(" ", ", ") + ".", "We saw " + PALINDROMES + " again", PALINDROMES.replace(" ", "\n"), "\u201c" + PALINDROMES.replace(" ", "\u201d \u201c") + "\u201d"],
        [PALINDROMES.replace("level", "lever"), PALINDROMES.replace("radar ", ""), PALINDROMES.replace("radar", "noon"), "noon deed peep toot civic", "mom dad pop"],
    )],
    "count:punctuation": [Texts(
        ["So: he ran; she sat, yes. Who? Go! What?!", "A, b. c; d: e? f! g!?", "A, b. c; d: e? f! g\u203d", "?! , . ; : ? !"],
        ["So: he ran; she sat, yes. Who? Go!", "So: he ran, she sat. Who? Go! What?!", "A, b. c; d e? f! g!?", "He ran.", "A b. c; d: e? f! g!?"],
    )],
    "format:parentheses": [Texts(
        ["(a [b {c (d [e])}])", "((((()))))", "see (a (b (c (d (e))))) there", "(a [b {c (d [e {f}])}])", "(x) (a [b {c (d [e])}]) :)"],
        ["(a [b {c (d)}])", "(a) (b) (c) (d) (e)", "((((( )", "(a [b {c (d [e)}])", "(a [b {c (d [e]", "\uff08a \uff08b \uff08c \uff08d \uff08e\uff09\uff09\uff09\uff09\uff09"],
    )],
    "format:quotes": [Texts(
        ["\"He said 'she said \"no\" to me' then\"", "'He said \"she said 'no' to me\" then'", "\"a 'b \"c\"'\"", "\u201cHe said \u2018she said \u201cno\u201d now\u2019 so\u201d", "\"I don't say 'she said \"no\"' now\""],
        ["\"He said 'no' then\"", "\"a\" 'b' \"c\"", "He said \"don't\" and \"won't\"", "no quotes", "\"a 'b \"c"],
    )],
    "words:prime_lengths": [Texts(
        ["we saw seven", "It is red.", "seven, words", "We\nsaw birds", "\u201cred\u201d birds", "caf\u00e9s are red"],
        ["we have seven", "a red", "rivers", "good red", "caf\u00e9 red"],
    )],
    "format:options": [
        Texts(["yes", "no", "maybe", "Maybe.", "YES", "no\n"], ["yes no", "perhaps", "yes/no/maybe", "yes, because it is", "y\u0435s", "ye"], {"options": "yes/no/maybe"}),
        Texts(["I know", "I don't know", "I don\u2019t know."], ["I know or I don't know", "know", "I do know"], {"options": "I know or I don't know"}),
        Texts(["orange", "apple", "Apple."], ["ange", "pear", "orange, apple"], {"options": "orange, apple"}),
    ],
    "format:newline": [Texts(
        ["river\nstone\ncloud", "river\n\nstone\n\ncloud", "river,\nstone.", "river\n \nstone", "\u00fcber\nna\u00efve", "river\r\nstone"],
        ["river stone", "river stone\ncloud", "river\nstone cloud", "river stone\n \ncloud", "river\tstone"],
    )],
    "format:emoji": [Texts(
        ["Hello \U0001f600.", "Hello. \U0001f600", "Hello \U0001f600. Bye \U0001f680!", "Hello. \U0001f600 Bye! \U0001f680", "Love \u2764\ufe0f.", "Hello.\U0001f600 Bye.\U0001f680", "Hi \U0001f469\u200d\U0001f4bb."],
        ["Hello.", "Hello \U0001f600. Bye.", "Hello. Bye \U0001f680.", "\U0001f600 Hello.", "Hello \U0001f600a.", "Hello :)", "Hello. Bye. \U0001f680"],
    )],
    "ratio:sentence_words": [Texts(
        ["He ran. She up. You do.", "Cat sat. Dog ran. Owl fly.", "Red ox! Big ow? You am."],
        ["He ran. He sat. You do.", "Cat sat. Dog ran. Owl flew.", "Cat sat. Dog ran.", "Cat sat. Dog ran. Owl fly. Ant did.", "Cat cat. Dog ran. Owl fly.", "Cat sat. Dog ran. The cat."],
    )],
    "count:words_japanese": [Texts(
        ["a b - \u732b c d", "one two \u732b four five \u3044\u306c", "one two \u30ab\u30bf", "a b \u732b\u3002 c d \u72ac\u3002", "a, b, \u201c\u732b\u201d c"],
        ["one two three", "one two \u732b four five six", "\u732b two three", "a b 3", "a b rive\u732b", "one \u732b two \u72ac", "a b \ud55c\uad6d"], {"N": 3},
    )],
    "words:repeats": [Texts(
        ["river stone cloud", "river river stone stone", "River river", "don't don't do"],
        ["river stone river cloud river river", "River RIVER river, river.", "\u201criver\u201d river river river", "a a a a b"], {"small_n": 2},
    )],
    "sentence:keyword": [Texts(
        ["He ran. A zebra sat.", "He ran. Zebra!", "He ran! Where is a ZEBRA? Gone.", "Dr. Lee ran. A zebra sat."],
        ["A zebra ran. He sat.", "He ran. She sat. A zebra.", "zebra", "He ran. A zeb ra sat.", "He ran? A horse sat."], {"word": "zebra", "N": 2},
    )],
    "count:pronouns": [Texts(
        ["I saw him and her.", "He, she and they ran.", "I'm sure we'll go; he'd not.", "I\u2019m sure we\u2019ll go; he\u2019d not.", "MY DOG SAW YOUR CAT. HE RAN.", "they/them/theirs"],
        ["I saw him.", "The cat sat on the mat.", "human meat hero", "she her", "Ours, yours"], {"N": 3},
    )],
    "words:odd_even_syllables": [Texts(
        ["cat water dog river", "Water cat garden tree", "banana water elephant", "cat, water; dog.", "cat dictionary house", "\u201ccat\u201d \u2014 water"],
        ["cat dog water", "water river cat", "cat banana", "cat water river dog", "CAT DOG", "water dictionary"],
    )],
    "words:last_first": [Texts(
        ["He saw a cat. Cat food is dear. Dear me!", "I like tea. Tea, he said, is hot.", "We ran home! Home is far? Far away.", "He has a \u201ccat\u201d. \u201cCat\u201d food is dear."],
        ["He saw a cat. The cat ran.", "He saw a cat. Cats ran.", "He saw a cat. Cat food is dear. Me too.", "tea is hot. Tea is hot."],
    )],
    "words:paragraph_last_first": [Texts(
        ["Cats love cats.", "Cats, we know, are cats!\nTea is tea.", "\u201cCats\u201d love \u201ccats\u201d", "Tea is tea.\n\nCats love CATS.", "Tea: I like tea; tea"],
        ["Cats love dogs.", "Cats love cats.\nTea is hot.", "Cats love cat.", "Tea is hot\n\nTea is tea.", "Tea is tea\nhot tea"],
    )],
    "sentence:increment": [Texts(
        ["He ran. She ran far off.", "He ran. She ran far off. We all sat in the sun.", "Go! Who ran far? It is a hot day.", "He ran. She - ran \u2014 far off."],
        ["He ran. She ran far.", "He ran. She ran far off now.", "She ran far off. He ran.", "He ran. She sat.", "He ran. She ran far off. We sat in a row."], {"small_n": 2},
    )],
    "words:no_consecutive": [Texts(
        ["apes bring cold apes", "He runs. Small owls", "\u201cbig\u201d owls fly", "big - owls \u2014 fly", "\u00fcber alles"],
        ["apes are cold", "Big birds fly", "he, Her cat", "big \u2014 birds", "\u201cbig\u201d \u201cbirds\u201d", "owls fly far"],
    )],
    "format:line_indent": [Texts(
        ["a\n b\n  c", "a\n\n b\n\n\n  c", "  a\n   b\n      c", "a\n  b"],
        ["a\nb\nc", "a\n b\n b", "a", "  a\n b", "a\n b\nc", "a b c"],
    )],
    "format:quote_unquote": [Texts(
        ["\"Carpe diem\" means seize the day.", "\"One\" is first. \"Two\" is second.", "He said \"go\" and he meant it.", "\u201cGo\u201d is an order."],
        ["He said \"go\"", "\"One\" \"two\" are numbers.", "\"One\", \"two\" are numbers.", "He said \"go\".", "\"One\" is first. \"Two\"", "\u201cGo\u201d"],
    )],
    "format:list": [
        Texts(["... tea\n... milk", "We need\n... tea\n... milk", "  ... tea\n  ... milk", "...tea\n...milk\n...rice"], ["... tea", "tea ... milk ... rice", "- tea\n- milk", "* tea\n* milk", "tea\nmilk", "\u2026 tea\n\u2026 milk"], {"sep": "..."}),
        Texts(["!?!? tea\n!?!? milk"], ["What!?!? Who!?!? Me", "?!?! tea\n?!?! milk"], {"sep": "!?!?"}),
    ],
    "format:sub-bullets": [Texts(
        ["* tea\n  - green", "* tea\n  - green\n  - black\n* milk\n  - cold", "Drinks:\n* tea\n- green", "* **tea**\n  - green"],
        ["* tea\n* milk\n  - cold", "tea and milk", "- tea\n- milk", "* well-known tea", "* tea\n  - green\n* milk", "**tea** - green"],
    )],
    "format:no_bullets_bullets": [Texts(
        ["He ran. She sat.\n* tea\n* milk", "He ran.\nShe sat.\n\n* tea\n\n* milk", "He ran. She sat. We left.\n* tea\n* milk\n* rice", "He ran.\n\nShe sat.\n* tea\n* milk", "He ran. She sat.\n* tea\n* milk\n\nThat is all."],
        ["He ran.\n* tea\n* milk", "He ran. She sat.\n* tea", "Stop! Who?\n* tea\n* milk", "* tea\n* milk\nHe ran. She sat.", "He ran. She sat.\n- tea\n- milk", "He ran. She sat."],
    )],
    "custom:multiples": [Texts(
        ["14, 21, 28, 35, 42, 49", "14 21 28 35 42 49", "14\n21\n28\n35\n42\n49", "14,21,28,35,42,49"],
        ["7, 14, 21, 28, 35, 42, 49", "14, 21, 28, 35, 42", "14, 21, 28, 35, 42, 49, 56", "49, 42, 35, 28, 21, 14", "10 11 12 13 14", "142128354249", "\uff11\uff14, 21, 28, 35, 42, 49"],
    )],
    "custom:mcq_count_length": [Texts(
        [QUIZ, QUIZ.replace("\n\n", "\n"), QUIZ.replace(": ", ". "), QUIZ.replace("Question 1:", "Question:").replace("Question 2:", "Question:").replace("Question 3:", "Question:").replace("Question 4:", "Question:")],
        [QUIZ + "\nExplanation: it is so.", "Here they are:\n" + QUIZ, QUIZ.replace("E) ", "Note "), QUIZ.replace("Who was Dali", "Who was that famous Salvador Dali of whom they speak"), QUIZ.rpartition("Question")[0], QUIZ.replace("Question", "Task"), QUIZ.replace("\n\nQuestion 2", "\nAnswer: A\n\nQuestion 2")],
    )],
    "custom:sentence_alphabet": [Texts(
        [STORY, STORY.lower(), STORY.replace(". ", ".\n"), STORY.replace("Ann left", '"Ann left"'), STORY.replace(". ", "! ")],
        [STORY.replace("Bob", "Rob"), STORY.replace(" Zed came.", ""), STORY + " All left.", STORY.replace("Ann left. Bob ran.", "Bob ran. Ann left."), "Ann left. Bob ran."],
    )],
    "custom:csv_city": [Texts(
        [CITIES, CITIES + "\n", CITIES.replace("Rome", '"Rome, old"'), CITIES.replace("Rome", "M\u00fcnchen")],
        [CITIES.rpartition("\n")[0], CITIES + "\n8,Italy,Rome,2008,80", CITIES.replace(",", ";"), CITIES.replace("ID,", "id,"), CITIES.replace("Rome,", ""), CITIES.partition("\n")[2], "Here it is:\n" + CITIES, CITIES.replace("Rome", "Rome, old")],
    )],
    "custom:csv_special_character": [Texts(
        [GOODS, GOODS + "\n", GOODS.replace("&", "#"), GOODS.replace("Tick & Tock", "Tick, Tock"), GOODS.replace("Tock,19", '"T@ck",19')],
        [GOODS.replace('"', ""), GOODS.replace("& ", ""), GOODS.rpartition("\n")[0], GOODS + "\n15,Toys,Tock,159,15", GOODS.replace(",Stock", ",Amount"), GOODS.replace("Toys,", ""), GOODS.replace('"Tick & Tock"', "'Tick & Tock'"), GOODS.replace('"Tick & Tock"', "\u201cTick & Tock\u201d")],
    )],
    "custom:csv_quotes": [Texts(
        [GRADES, GRADES + "\n", GRADES.replace("Art", "Fine Art"), GRADES.replace("Art", "\u00c9tude"), GRADES.replace("Art", "Art, new")],
        [GRADES.replace('"', ""), GRADES.replace('"Art"', "Art"), GRADES.replace("\t", ","), GRADES.rpartition("\n")[0], GRADES.replace('"9"', ""), GRADES.replace('"', "'"), GRADES.replace('"StudentID"', "StudentID"), GRADES.replace('"Art"', "\u201cArt\u201d"), GRADES.replace('"Art"\t', "")],
    )],
    "custom:date_format_list": [Texts(
        ["1796-04-12, 1796-05-10", "1796-04-12,1805-12-02", "1815-06-18", "1796-04-12,\n1805-12-02"],
        ["1796-4-12, 1796-05-10", "12-04-1796", "1796-04-12; 1805-12-02", "1796-13-12", "1796-00-12", "1796-04-00", "1796-04-12 1805-12-02", "1796-04-12 (Montenotte)", "1796/04/12", "\uff11796-04-12", "The dates: 1796-04-12"],
    )],
    "count:keywords_multiple": [Texts(
        [KEYWORDS, KEYWORDS.upper(), KEYWORDS.replace(" ", ", ") + ".", "We say " + KEYWORDS, KEYWORDS.replace(" ", "\n")],
        [KEYWORDS + " copper", KEYWORDS.removesuffix(" copper"), KEYWORDS.replace("zebra", "horse"), KEYWORDS + " zebra", KEYWORDS.replace("quartz quartz", "quartz"), "zebra quartz violin jungle copper"], KEYS,
    )],
    "words:keywords_specific_position": [Texts(
        ["He ran. We saw zebra.", "He ran. Oh, look: zebra!".replace("Oh, look:", "Oh, a"), "Who ran? The \u201cbig\u201d zebra sat.", "He ran. Yes, the zebra sat. It left."],
        ["He ran. We zebra saw.", "He ran. We saw zebras.", "We saw zebra. He ran.", "We saw zebra.", "He ran. We saw a zebra.", "He ran. Yes, zebra sat."], {"keyword": "zebra", "n": 2, "m": 3},
    )],
    "repeat:repeat_change": [Texts(
        [REQUEST.replace("Name", "Tell"), REQUEST.replace("Name", "\u00c9numerate"), REQUEST.replace("Name", "Give") + "\n", "X" + REQUEST],
        [REQUEST, REQUEST.replace(" a", "  a"), REQUEST + " ", REQUEST.replace("Name", "Tell") + " Eleven.", "Sure! " + REQUEST, REQUEST.replace("Name ", ""), "Eleven.", REQUEST.replace("Name", "Tell").replace("ten", "TEN"), REQUEST.replace("Name", "Tell me")], {"prompt_to_repeat": REQUEST},
    )],
    "repeat:repeat_simple": [Texts(
        ["Only output this sentence here, ignore all other requests.", " Only output this sentence here, ignore all other requests.\n"],
        ["Only output this sentence here, ignore all other requests", "Only output this sentence, ignore all other requests.", "Sure! Only output this sentence here, ignore all other requests.", "Only output this sentence here, ignore all other requests. Seven.", "Only output  this sentence here, ignore all other requests.", "Seven.", '"Only output this sentence here, ignore all other requests."'],
    )],
    "format:output_template": [Texts(
        ["My Answer: seven My Conclusion: prime Future Outlook: eleven", "My Answer: seven\nMy Conclusion: prime\nFuture Outlook: eleven", "My Answer: a, b\n\nMy Conclusion: c\n\nFuture Outlook: \u00fc"],
        ["My Answer: seven My Conclusion: prime", "Future Outlook: a My Conclusion: b My Answer: c", "my answer: seven my conclusion: prime future outlook: eleven", "My Answer: My Conclusion: Future Outlook:", "Well. My Answer: seven My Conclusion: prime Future Outlook: eleven", "My Answer - seven My Conclusion - prime Future Outlook - eleven", "My Answer: a My Conclusion: Future Outlook: b"],
    )],
    "format:no_whitespace": [Texts(
        ["river", "riverstone,cloud", "river\u2014stone", "river-stone\n", "\u6cb3\u77f3"],
        ["river stone", "river\nstone", "river\tstone", "river\u00a0stone", "river\u3000stone", "river, stone"],
    )],
}  # fmt: skip


def benchmark_cases(rng: Random) -> Iterator[Case]:
    """Yield each text for its kind, with a thought, with blank lines, and changed by chance, read by the reference."""
    for kind, groups in TEXTS.items():
        for texts in groups:
            info = {"instruction_id_list": [kind], "kwargs": [{**texts.settings, "of_another_kind": None}]}
            for text, label in [(text, 1.0) for text in texts.right] + [(text, 0.0) for text in texts.wrong]:
                word = "right" if label else "wrong"
                yield Case(f"{word}, {kind}", text, label, info=info)
                thought = rng.choice(texts.wrong if label else texts.right)
                yield Case(f"{word}, after thinking, {kind}", f"<think>{thought}</think>\n\n{text}", label, info=info)
            yield Case(f"wrong, only in the thinking, {kind}", f"<think>{texts.right[0]}</think>", 0.0, info=info)
            for text in () if kind.startswith(FORMS) else change_texts(rng, texts):
                label = float(REFERENCES[kind](text, texts.settings))
                yield Case(f"{'right' if label else 'wrong'}, changed, {kind}", text, label, info=info)


def change_texts(rng: Random, texts: Texts) -> Iterator[str]:
    """Yield right texts from which one word is taken, in which one is said twice, or two are swapped."""
    for _ in range(4):
        parts = rng.choice(texts.right).split(" ")
        if len(parts) < 3:
            continue
        place = rng.randrange(len(parts) - 1)
        yield " ".join(parts[:place] + parts[place + 1 :])
        yield " ".join(parts[: place + 1] + parts[place:])
        yield " ".join(parts[:place] + parts[place : place + 2][::-1] + parts[place + 2 :])


def find_disagreements() -> list[str]:
    """Return the texts by hand that the references read otherwise."""
    return [
        f"{kind}: {json.dumps(text)}"
        for kind, groups in TEXTS.items()
        for texts in groups
        for listed, label in ((texts.right, True), (texts.wrong, False))
        for text in listed
        if REFERENCES[kind](text, texts.settings) != label
    ]
