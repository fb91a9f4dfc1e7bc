"""Checks: what verifiers do with one completion, in a worker process that has neither torch nor this repository's
other packages.

A check is a module with a function ``judge(text, answer, info, **settings) -> float | None``: the text of a completion,
the gold answer, what ``Verifier.describe`` returned, and the verifier's settings. None = it cannot be judged. It may
return (score, fault) instead, where the completion earned the score by a fault that is worth counting. A check
imports the standard library and, relatively, other checks; other libraries inside functions. Its function
``prepare()``, if it has one, loads them before the first completion is timed.
"""
