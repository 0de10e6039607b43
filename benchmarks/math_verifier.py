"""The verifier against the ones that people use.

Accuracy and false positives on the labelled set, adversarial input, speed, and identity on MATH
where it is found:

    python -m benchmarks.math_verifier

Accuracy alone, on the cases of other data sets than MATH, with the cases that are wrong:

    python -m benchmarks.math_verifier --cases tests/data/math_verifier_wider.jsonl

Random pairs of strings, on which it never raises and is symmetric:

    python -m benchmarks.math_verifier --fuzz 50000

Verdicts per second through the reward pool, by number of processes:

    python -m benchmarks.math_verifier --pool 2

The labelled set is tests/data/math_verifier_cases.jsonl: `answer` (put into a box) or `completion`,
`ground_truth`, `expected`, a kind, and options. Results are recorded in docs/math_verifier.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlsys.math_verifier import last_boxed, same_answer_text, verify_math

CASES = Path(__file__).resolve().parents[1] / "tests" / "data" / "math_verifier_cases.jsonl"
MATH = Path(__file__).resolve().parents[2] / "shared" / "data" / "math"
Verifier = Callable[[dict[str, Any]], bool]


def load_cases(path: Path = CASES) -> list[dict[str, Any]]:
    """Return labelled cases, each with its `completion` and `extraction`."""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        case.setdefault("completion", f"So the answer is $\\boxed{{{case.get('answer', '')}}}$.")
        case.setdefault("extraction", "boxed")
    return cases


def ours(case: dict[str, Any]) -> bool:
    """Verify with rlsys."""
    verdict = verify_math(
        case["completion"],
        case["ground_truth"],
        extraction=case["extraction"],
        decimal_comma=case.get("decimal_comma"),
        matrix_products=case.get("matrix_products"),
    )
    return verdict.score == 1.0


def math_verify_alone(case: dict[str, Any]) -> bool:
    """Verify with math-verify as its README uses it."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"\\boxed{{{case['ground_truth']}}}"), parse(case["completion"])))
    except Exception:
        return False


def math_paper(case: dict[str, Any]) -> bool:
    """Verify with the string normalisation of the MATH paper, written from its description.

    Source: Hendrycks et al., arXiv:2103.03874, appendix.
    """
    answer = last_boxed(case["completion"])
    return answer is not None and normalised(answer) == normalised(case["ground_truth"])


def normalised(text: str) -> str:
    """Return the string that the MATH paper compares."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(removed, "")
    text = text.split("\\text{ ")[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text

    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right

    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def accuracy(cases: list[dict[str, Any]], verifiers: dict[str, Verifier], show: bool) -> None:
    """Print the table of docs/math_verifier.md, by verifier and by kind."""
    by_kind: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    print("| verifier | accuracy | false positives | false negatives | seconds | cases/s |")
    print("|---|---|---|---|---|---|")
    negatives = sum(not case["expected"] for case in cases)
    for name, verifier in verifiers.items():
        verifier(cases[0])  # imports
        start = time.perf_counter()
        verdicts = [verifier(case) for case in cases]
        seconds = time.perf_counter() - start
        wrong = [
            (case, verdict)
            for case, verdict in zip(cases, verdicts, strict=True)
            if verdict != case["expected"]
        ]
        false_positives = sum(verdict for _, verdict in wrong)
        false_negatives = len(wrong) - false_positives
        cells = [
            name,
            f"{1 - len(wrong) / len(cases):.2%}",
            f"{false_positives / negatives:.2%} ({false_positives} of {negatives})",
            f"{false_negatives / (len(cases) - negatives):.2%}",
            f"{seconds:.1f}",
            f"{len(cases) / seconds:,.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)

        for case, verdict in zip(cases, verdicts, strict=True):
            by_kind[case["kind"]][name].append(verdict == case["expected"])
        if show and verifier is ours:
            for case, verdict in wrong:
                answer = case.get("answer", case["completion"][-60:])
                print("   ", verdict, answer, "|", case["ground_truth"])

    print("\n| kind | cases | " + " | ".join(verifiers) + " |\n|---|---|" + "---|" * len(verifiers))
    for kind, results in sorted(by_kind.items()):
        count = len(next(iter(results.values())))
        cells = [f"{sum(correct) / len(correct):.0%}" for correct in results.values()]
        print(f"| {kind} | {count} | {' | '.join(cells)} |")


def typical_completions(count: int = 2000) -> list[tuple[str, str]]:
    """Return completions of 2,000 characters: integers and fractions, every other one right."""
    generator = random.Random(0)
    sentence = (
        "We move every term to one side, so that $x^2 - 5x + 6 = 0$"
        " and the factors can be read off. "
    )
    pairs = []
    for i in range(count):
        a, b = generator.randint(-999, 999), generator.randint(2, 99)
        truth = str(a) if i % 3 else f"\\frac{{{a}}}{{{b}}}"
        wrong = str(a + 1) if i % 3 else f"\\dfrac{{{a + 1}}}{{{b}}}"
        given = truth if i % 2 else wrong
        ending = f"Therefore the answer is $\\boxed{{{given}}}$."
        beginning = (sentence * 30)[: 2000 - len(ending)]
        pairs.append((beginning + ending, truth))
    return pairs


def throughput(repeats: int = 5) -> None:
    """Print verdicts per second on one core, the best of a few passes."""
    pairs = typical_completions()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for completion, truth in pairs:
            verify_math(completion, truth)
        best = min(best, time.perf_counter() - start)
    print(
        f"\ntypical completions of 2,000 characters, one core: {len(pairs) / best:,.0f} verdicts/s"
    )


def pool_throughput(most: int) -> None:
    """Print verdicts per second through the reward pool."""
    from rlsys.config import RewardConfig
    from rlsys.rewards import RewardInput
    from rlsys.rewards.pool import RewardPool

    inputs = [
        RewardInput(completion=case["completion"], ground_truth=case["ground_truth"])
        for case in load_cases() * 2
    ]
    for processes in range(1, most + 1):
        pool = RewardPool(RewardConfig(processes=processes), ())
        pool.warm_up()
        start = time.perf_counter()
        for future in [pool.submit(one) for one in inputs]:
            future.result()
        rate = len(inputs) / (time.perf_counter() - start)
        print(f"pool of {processes}: {rate:,.0f} verdicts/s over the labelled set")
        pool.shutdown()


def identity_on_math(pairs: int) -> None:
    """Print the ground truths that do not equal themselves, and the random pairs that are equal.

    Every ground truth should equal itself in a box. Random pairs of different strings should not be
    equal, unless they are so mathematically.
    """
    if not MATH.exists():
        print(f"\nMATH is not at {MATH}: identity is not measured")
        return
    import pyarrow.parquet

    answers = [
        a
        for part in ("train", "test")
        for a in pyarrow.parquet.read_table(MATH / f"{part}.parquet")["answer"].to_pylist()
    ]
    different = [a for a in answers if verify_math(f"\\boxed{{{a}}}", a).score != 1.0]
    empty = sum(not answer.strip() for answer in answers)
    print(
        f"\nMATH: {len(answers)} answers, {len(different)} not equal to themselves,"
        f" of which {empty} are empty (an empty box is not an answer)"
    )

    generator = random.Random(0)
    distinct = sorted(set(answers))
    drawn = [generator.sample(distinct, 2) for _ in range(pairs)]
    start = time.perf_counter()
    hits = [(a, b) for a, b in drawn if same_answer_text(a, b)[0]]
    seconds = time.perf_counter() - start
    print(f"{pairs} random pairs of different strings: {len(hits)} equal ({seconds:.1f} s)")
    for a, b in hits:
        print(f"    {a}   {b}")


def fuzz(examples: int) -> None:
    """Verify strings of all kinds: no exception, symmetric, reflexive."""
    from tests.unit.test_math_verifier import check_any_pair

    start = time.perf_counter()
    check_any_pair(examples)
    seconds = time.perf_counter() - start
    print(
        f"\n{examples:,} random pairs of strings: no exception, symmetric and reflexive"
        f" ({seconds:.0f} s)"
    )


def adversarial() -> None:
    """Print the slowest of the adversarial answers, against every kind of ground truth."""
    from tests.unit.test_math_verifier import ADVERSARIAL, GROUND_TRUTHS

    slowest = (0.0, "")
    count = 0
    for answer in ADVERSARIAL:
        for truth in GROUND_TRUTHS:
            for completion, wanted in (
                (f"\\boxed{{{answer}}}", truth),
                (f"\\boxed{{{truth}}}", answer),
            ):
                start = time.perf_counter()
                verify_math(completion, wanted)
                slowest = max(slowest, (time.perf_counter() - start, answer[:40]))
                count += 1

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\nadversarial: {count} verdicts, slowest {slowest[0]:.2f} s ({slowest[1]!r}),"
        f" peak memory of this process {memory:.0f} MiB"
    )


def main() -> None:
    """Run the requested measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="only fuzz, with N pairs")
    parser.add_argument(
        "--pool",
        type=int,
        default=0,
        metavar="N",
        help="only measure the reward pool with 1 to N processes",
    )
    parser.add_argument("--cases", type=Path, help="only measure the accuracy, on this file")
    parser.add_argument("--pairs", type=int, default=20_000, help="random pairs of MATH answers")
    parser.add_argument("--show", action="store_true", help="print the cases that rlsys gets wrong")
    parser.add_argument("--ours-only", action="store_true", help="leave the other verifiers out")
    arguments = parser.parse_args()

    logging.disable(logging.WARNING)  # math-verify's
    if arguments.fuzz:
        fuzz(arguments.fuzz)
    elif arguments.pool:
        pool_throughput(arguments.pool)
    elif arguments.cases:
        accuracy(load_cases(arguments.cases), {"rlsys": ours}, show=True)
    else:
        verifiers: dict[str, Verifier] = {"rlsys": ours}
        adversarial()
        throughput()
        if not arguments.ours_only:
            verifiers |= {"math-verify": math_verify_alone, "MATH paper": math_paper}
        accuracy(load_cases(), verifiers, arguments.show)
        identity_on_math(arguments.pairs)


if __name__ == "__main__":
    main()
