"""The numbers of the data report, computed by hand."""

import pytest

from callbacks.measures.documents import (
    Document,
    count_repeats,
    find_concerns,
    find_leaks,
    fingerprint,
    first_word,
    report_split,
    report_texts,
    share_left_out,
    split_row,
    summarise_lengths,
)


def document(prompt: list[int], answer: list[int]) -> Document:
    return Document(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def test_prompt_and_answers_of_a_conversation() -> None:
    two_turns = Document([5, 6, 7, 8, 9, 10, 11], [False, False, True, True, False, True, True])
    assert two_turns.prompt == [5, 6]
    assert two_turns.answers == [[7, 8], [10, 11]]
    text = Document([5, 6, 7], [False, True, True])
    assert list(text.prompt) == []  # every text would share its first token as a prompt
    assert text.answers == [[6, 7]]
    assert document([5], [6]).prompt == ()
    assert Document([5, 6, 7], [False, True, False]).prompt == [5]
    nothing = Document([5, 6], [False, False])
    assert (nothing.prompt, nothing.answers) == ([5, 6], [])


def test_packed_rows_are_cut() -> None:
    first, second = split_row([1, 2, 3, 4, 5], [False, True, False, False, True], (2, 3))
    assert (first.ids, first.supervised) == ([1, 2], [False, True])
    assert (second.ids, second.supervised) == ([3, 4, 5], [False, False, True])
    (whole,) = split_row([1, 2, 3], [False, True, True], ())
    assert whole.ids == [1, 2, 3]
    with pytest.raises(ValueError, match=r"5 tokens cannot be cut into documents of \[2, 2\]"):
        split_row([1, 2, 3, 4, 5], [True] * 5, (2, 2))


def test_repeats_by_hand() -> None:
    a, b = [1, 2], [3, 4]
    group = [document(a, [7]), document(a, [7]), document(a, [7]), document(a, [8]), document(a, [9]), document(b, [7])]
    # Three equal ones: two are repeats. Prompt a has the answers 7, 8 and 9: two more than one. Not 4, which counts the
    # repeats again.
    assert count_repeats(group) == (2, 2) != (2, 4)
    assert count_repeats(group[::-1]) == (2, 2)
    assert count_repeats([document([1], [2, 3]), document([1], [4, 5])]) == (0, 0)  # texts
    assert count_repeats([]) == (0, 0)
    assert count_repeats([document([1, 2], [3, 4]), document([1, 2, 3], [4])]) == (
        1,
        0,
    )  # tokens, not what is learned of them


def test_ids_are_known_by_their_order_and_size() -> None:
    assert fingerprint([1, 2]) == fingerprint((1, 2)) != fingerprint([2, 1])
    assert len({fingerprint(ids) for ids in ([], [0], [0, 0], [256], [1, 0], [2**33], [2])}) == 7


def test_leakage_counts_training_documents() -> None:
    train = [document([1, 2], [3]), document([1, 2], [3]), document([1, 2], [4])]
    val = [document([1, 2], [3]), document([9, 2], [3])]
    assert find_leaks(train, val) == 2 != find_leaks(val, train) == 1


def test_lengths_by_hand() -> None:
    # Sorted 1 2 3 10: median halfway between 2 and 3; p95 at place 0.95 * 3 = 2.85: 3 + 0.85 * 7 = 8.95.
    assert summarise_lengths([3, 1, 10, 2]) == pytest.approx(
        {"min": 1, "median": 2.5, "mean": 4, "p95": 8.95, "max": 10}, abs=1e-9
    )
    assert summarise_lengths([7]) == {"min": 7, "median": 7, "mean": 7, "p95": 7, "max": 7}
    assert summarise_lengths([]) == {}


def test_texts_by_hand() -> None:
    texts = [
        "Sure! Here:\n- one\n- two",
        "sure thing",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but no.",
        "1. First",
        "3.5 percent - or so",
        "",
    ]
    found = report_texts(texts)
    assert found["list_share"] == 2 / 6
    assert found["refusal_share"] == 1 / 6
    assert found["opener_share"] == 2 / 6
    assert found["first_words"] == {"sure": 2 / 6, "i\N{RIGHT SINGLE QUOTATION MARK}m": 1 / 6, "1": 1 / 6, "3.5": 1 / 6}
    assert report_texts([])["list_share"] == 0.0
    assert first_word("  **Sure**, I can") == "sure"
    assert first_word(" - \n") == ""


def test_a_report_by_hand() -> None:
    end, words = 0, {1: "Sure", 2: " ", 3: "no"}

    def decode(ids: list[int]) -> str:
        return "".join(words.get(token, "") for token in ids)

    documents = [
        document([8, 9], [1, 3, end]),  # two tokens of text
        document([8, 9], [1, 3, end]),  # again
        document([8, 9], [3, end]),  # one token, same prompt
        document([8, 8, 8, 8], [end]),  # nothing
        document([8, 8, 8], [2, 2, end]),  # white space
    ]
    report = report_split(3, documents, {end}, decode, limit=5)
    assert (report["rows"], report["documents"], report["tokens"], report["answers"]) == (3, 5, 5 + 5 + 4 + 5 + 6, 5)
    assert report["supervised_share"] == 12 / 25
    assert (report["duplicates"], report["duplicate_share"], report["same_prompt"]) == (1, 1 / 5, 1)
    assert (report["empty_outputs"], report["one_token_outputs"]) == (2, 1)
    assert report["at_limit"] == 3
    assert report["prompt_length"] == pytest.approx(
        {"min": 2, "median": 2, "mean": 13 / 5, "p95": 3.8, "max": 4}, abs=1e-9
    )
    assert report["output_length"]["mean"] == 12 / 5
    assert report["opener_share"] == 2 / 5


def test_concerns_begin_at_their_limits() -> None:
    fine = {
        "documents": 95,
        "answers": 95,
        "duplicates": 0,
        "duplicate_share": 0.01,
        "empty_outputs": 0,
        "dropped": 3,
        "bad": 2,
        "leaked": 0,
    }
    assert share_left_out(fine) == 5 / 100
    assert find_concerns("train", fine) == []
    assert find_concerns("train", {key: value for key, value in fine.items() if key != "leaked"}) == []
    (one,) = find_concerns("train", fine | {"duplicates": 1, "duplicate_share": 0.0101})
    assert one == "train data: 1 of 95 documents repeat an earlier one, token by token"
    (one,) = find_concerns("val", fine | {"dropped": 4})
    assert one.startswith("val data: 5.9% of the rows are left out: 4 too long, 2 unreadable")  # 6 / 101
    assert len(find_concerns("train", fine | {"leaked": 1, "empty_outputs": 1, "bad": 3, "duplicate_share": 1.0})) == 4
