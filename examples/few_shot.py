"""Ask a model with 0, 4 and 8 shots: python examples/few_shot.py runs/demo/checkpoint

A prompt is a list of texts and PIL images in reading order: first the shots, each an image and its answer, and then the
image that the model should answer for. Here only the shots define the form of an answer: digits with hyphens, "3-0-5;".
All prompts of one engine share the pages of the shots in the cache, so the shots are computed once.
"""

import io
import sys
import tarfile

from PIL import Image

import mm1
from mm1.engine.infer.engine import Engine
from mm1.engine.infer.sampling import Sampling
from mm1.engine.run_config import DIGITS_FOLDER

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pictures(first, count):
    """Return `count` test images of two or three digits, from number `first` on, each with its answer: "3-0-5;"."""
    with tarfile.open(DIGITS_FOLDER / "test-captions.tar.gz") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    chosen, number = [], first
    while len(chosen) < count:
        words = members[f"{number:06}.txt"].decode().split()
        if len(words) in (2, 3):
            image = Image.open(io.BytesIO(members[f"{number:06}.png"]))
            chosen.append((image, "-".join(str(WORDS.index(word)) for word in words) + ";"))
        number += 1
    return chosen


def main(checkpoint):
    engine = Engine(mm1.load(checkpoint), tokens=16_384, batch=16)
    shots, queries = pictures(600, 8), pictures(800, 8)
    for count in (0, 4, 8):
        prompt = ["write\n"]
        for image, answer in shots[:count]:
            prompt += [image, answer + "\n"]
        requests = [engine.submit([*prompt, image], Sampling(max_tokens=12, stop=("\n",))) for image, _ in queries]
        engine.run()
        print(f"{count} shots")
        for request, (_, answer) in zip(requests, queries):
            text = request.text.strip()
            print(f"  {text} ({'right' if text == answer else f'wrong, it is {answer}'})")


if __name__ == "__main__":
    main(sys.argv[1])
