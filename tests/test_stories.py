"""data/stories.py: what it writes is English, remembers what it has said, and keeps its two splits apart."""

import collections
import random
import re
import subprocess
import sys

import pytest

import data.stories as script

THINGS = "pocket broken gift goods picture".split()
VOICES = pytest.mark.parametrize("voice", ["plain", "scary"])
THINGS = {thing.split(" from ")[0].split()[-1] for kind in THINGS for thing in script.WORDS[kind]}
SAME = [script.WORDS["girl"], script.WORDS["boy"], script.WORDS["woman"] + script.WORDS["man"], THINGS]
SAME += [
    ["lamp", "lantern"],
    ["cottage", "house", "farmhouse"],
    ["rain", "snow", "fog", "sunshine", "moonlight"],
    ["breakfast", "lunch", "supper"],
]


def write(path, *flags):
    subprocess.run([sys.executable, script.__file__, "--out", path, *flags], check=True)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stories():
    rng = random.Random(1)
    return {voice: [script.tell(rng, voice)[0] for _ in range(3000)] for voice in ("plain", "scary")}


def test_a_seed_gives_the_same_file(tmp_path):
    first = write(tmp_path / "new" / "a.txt", "--num", "50", "--voice", "scary", "--seed", "3")
    assert write(tmp_path / "b.txt", "--num", "50", "--voice", "scary", "--seed", "3") == first
    assert write(tmp_path / "c.txt", "--num", "50", "--voice", "scary", "--seed", "4") != first
    assert first.count("\n<|endoftext|>\n") == 49 and first.endswith("\n") and not list(tmp_path.glob("**/*.tmp"))
    openings = write(tmp_path / "o.txt", "--openings", "9", "--split", "val").splitlines()
    told = write(tmp_path / "v.txt", "--num", "9", "--split", "val").split("\n<|endoftext|>\n")
    assert len(openings) == 9 and all(story.startswith(opening) for story, opening in zip(told, openings))


@VOICES
def test_a_combination_belongs_to_one_split(voice):
    met = {"train": set(), "val": set()}
    for split in met:
        for seed in range(2000):
            _, facts, slots = script.begin(random.Random(seed), voice, split)
            met[split].add((*facts & set(script.SECTIONS), slots["who"], slots["home"], slots["fine"]))
    assert len(met["val"]) > 500 and not met["train"] & met["val"]


def test_what_a_sentence_needs_can_be_true():
    facts = {"late", *script.SECTIONS, *" ".join(script.WORDS["weather"]).split()}
    lists = [script.OPENINGS, script.ABOUT, script.MOMENTS, script.CALM_ENDINGS, script.FRIGHTENING_ENDINGS]
    for given, beats in script.SECTIONS.values():
        facts.update(given)
        lists += [choices for _, choices in beats]
    sentences = [each for choices in lists for each in choices]
    facts.update(change[1:] for _, _, changes in sentences for change in changes)
    assert len(sentences) >= 200 and len(script.FRIGHTENING_ENDINGS) >= 40
    assert {need.lstrip("-") for needs, _, _ in sentences for need in needs} <= facts


@VOICES
def test_sentences_are_whole_and_a_story_remembers(stories, voice):
    same = [re.compile("|".join(rf"\b{word}\b" for word in words)) for words in SAME]  # of each a story has one
    for story in stories[voice]:
        assert not re.search(r"[][{}()|/_]|  | [.,?]|,,|\.\.", story), story
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", story), story
        assert not re.search(r"[.?!] [a-z]|^[a-z]|\b(\w+) \1\b", story, re.M), story
        assert 60 <= len(story.split()) <= 180 and story.count('"') % 2 == 0, story
        for pattern in same:
            assert len(set(pattern.findall(story.replace("the great snow", "")))) <= 1, story


def test_endings_are_told_apart(stories):
    for voice, share in [("plain", 1 / 8), ("scary", 2 / 3)]:
        assert abs(sum(map(script.is_frightening, stories[voice])) / 3000 - share) < 0.03
        assert not any(script.is_frightening(story[: story.rindex(".", 0, -2) + 1]) for story in stories[voice][:500])


@VOICES
def test_two_stories_share_few_sentences(stories, voice):
    shared, told = collections.Counter(), collections.defaultdict(list)
    for i, story in enumerate(stories[voice]):
        for sentence in set(re.findall(r'[^.?!\n]+[.?!]"?', story)):
            shared.update((other, i) for other in told[sentence])
            told[sentence].append(i)
    assert max(shared.values()) <= 7
