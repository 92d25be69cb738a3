"""Whatever is given to ``build``, ``from_yaml``, recipes and the command line ends in a setup or a sentence."""

import os
import random
from collections import Counter

import fuzzing
import pytest

SHARES = {"build": 0.27, "from_dict": 0.27, "from_yaml": 0.27, "recipe": 0.1, "command": 0.08, "tools": 0.01}


def fuzz(way, seed, count, folder):
    """Give *count* inputs drawn from *seed*; return how many were built and refused, and fail with the first others."""
    found, wrong = Counter(), []
    for number in range(count):
        rng = random.Random(f"{way} {seed} {number}")
        call, allowed = fuzzing.WAYS[way](rng, folder)
        result = fuzzing.outcome(call, allowed)
        found[result if result in ("built", "refused") else "wrong"] += 1
        if result not in ("built", "refused"):
            wrong.append(f"{way}, seed {seed}, input {number}: {result}")
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong[:20]])
    assert min(found["built"], found["refused"]) > count // 50, f"one-sided: {found}"
    return found


@pytest.mark.parametrize("way", [way for way in SHARES if way != "tools"])  # which make models, and take long
def test_a_sample_of_random_input_is_built_or_refused(tmp_path, way):
    fuzz(way, 0, int(1000 * SHARES[way]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", SHARES)
def test_fifty_thousand_random_inputs_are_built_or_refused(tmp_path, capsys, way):
    seed = os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(10**6)
    count = int(50_000 * SHARES[way])
    with capsys.disabled():
        print(f"\n{way}: {count} inputs of FUZZ_SEED={seed}")
    found = fuzz(way, seed, count, tmp_path)
    with capsys.disabled():
        print(f"{way}: {dict(found)}")
