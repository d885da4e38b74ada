"""Threads that generate on one LLM for a while: every answer must be the one that is given alone, and no hook may stay.

    python tests/soak/threads.py --seconds 60 --threads 4

Not part of the gate. Uses the embedded models.
"""

import argparse
import random
import sys
import time
from collections import Counter
from threading import Thread

import torch

from atv import ATVConfig, ATVError, ATVModel, load_llm
from atv.lm.load import EMBEDDED_GENERATOR

PROMPTS = ["The kettle leaks and the lid sticks.\nA:", "The harbour was quiet.\nA:", "Two and two are\nA:"]
QUERIES = ["The kettle leaks.", "The harbour was quiet.", "Two and two are"]


def main() -> int:
    """Compare, print what was counted, and return 1 if an answer was wrong or a hook is left."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--threads", type=int, default=4)
    options.add_argument("--positions", default="last")
    chosen = options.parse_args()
    torch.manual_seed(0)
    llm = load_llm(dtype="float32")
    config = ATVConfig(generator=EMBEDDED_GENERATOR, pooling="mean", positions=chosen.positions, scale=1.0)
    atv = ATVModel(llm, config).eval()
    work = [(prompt, query) for prompt in PROMPTS for query in QUERIES]

    def answer(prompt: str, query: str) -> str:
        return atv.generate([prompt], [query], max_new_tokens=4, do_sample=False)[0]

    expected = {job: answer(*job) for job in work}
    counted: Counter[str] = Counter()
    end = time.monotonic() + chosen.seconds

    def run(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            job = draw.choice(work)
            try:
                counted["right" if answer(*job) == expected[job] else "WRONG"] += 1
            except ATVError:
                counted["refused"] += 1
            except Exception as error:
                counted[f"{type(error).__name__}: {error}"[:80]] += 1

    threads = [Thread(target=run, args=(seed,)) for seed in range(chosen.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llm.modules())
    different = len(set(expected.values()))
    print(f"{dict(counted)}; {different} different answers to {len(work)} questions; {hooks} hooks left on the LLM")
    return int(hooks > 0 or set(counted) != {"right"})


if __name__ == "__main__":
    sys.exit(main())
