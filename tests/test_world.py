"""The made-up world has exact probabilities, a grader that is right, and tasks that can be solved."""

import math
import random
import re
from collections import Counter

import pytest
import worlds

import data


class Choices:
    """Stand in for random.Random: choose as planned, then always the first; note what was possible."""

    def __init__(self, planned):
        self.planned = planned
        self.made = []
        self.possible = []

    def choice(self, options):
        k = len(self.made)
        i = self.planned[k] if k < len(self.planned) else 0
        self.made.append(i)
        self.possible.append(len(options))
        return options[i]


def every_story():
    """Return all stories of the grammar with their log-probabilities, by all sequences of choices."""
    planned = []
    found = []
    while True:
        choices = Choices(planned)
        text, logp, _ = worlds.story(choices)
        found.append((text, logp))
        # go on with the last choice that has an alternative left
        open_choices = [k for k, i in enumerate(choices.made) if i + 1 < choices.possible[k]]
        if not open_choices:
            return found
        last = open_choices[-1]
        planned = [*choices.made[:last], choices.made[last] + 1]


@pytest.fixture
def small_world(monkeypatch):
    """A world with two words of each kind and three alternatives for each sentence."""
    small = {kind: words[:2] for kind, words in worlds.WORDS.items() if kind != 'name'}
    small['name'] = small['girl'] + small['boy']
    monkeypatch.setattr(worlds, 'WORDS', small)
    monkeypatch.setattr(worlds, 'STORY', [line[:3] for line in worlds.STORY])
    worlds.pattern.cache_clear()
    yield
    worlds.pattern.cache_clear()


@pytest.mark.slow
def test_the_probabilities_of_all_stories_add_up_to_one(small_world):
    found = every_story()
    assert len(found) > 5000
    assert len({text for text, _ in found}) == len(found)                   # so the grammar is unambiguous
    assert math.isclose(math.fsum(math.exp(logp) for _, logp in found), 1, rel_tol=1e-9)
    for text, logp in found[::37]:
        assert worlds.readings(text) == pytest.approx([logp])


def test_reader_and_writer_agree_on_the_whole_world():
    rng = random.Random(0)
    for _ in range(500):
        text, logp, _ = worlds.story(rng)
        assert worlds.readings(text) == pytest.approx([logp]) and worlds.parses(text)
    assert len({worlds.story(rng)[0].count(' ') for _ in range(200)}) == 1  # equally long


STORY = ('Gus lives in the mill. He has a red drum. His brother Max eats nuts. '
         'On Monday Max lost the drum in the garden. Now Gus has the red drum in the mill.')


# what is changed in the story, and whether the result still agrees, only parses, or neither
@pytest.mark.parametrize('old, new, expected', [
    ('Now Gus', 'Now Max', 'agrees'), ('lost the drum', 'lost the kite', 'parses'),
    ('He has', 'She has', 'parses'), ('Max lost', 'Leo lost', 'parses'), ('Max eats', 'Gus eats', 'parses'),
    ('the red drum in', 'the blue drum in', 'parses'), ('drum in the mill', 'drum in the park', 'parses'),
    ('in the garden', 'in the mill', 'no'), ('brother Max', 'brother Ida', 'no'),
    ('the drum in', 'drum in', 'no'), ('. He', '.  He', 'no'), ('. He', '.He', 'no'),
    ('in the mill.', 'in the mill. And on.', 'no'), ('Gus lives', ' Gus lives', 'no')])
def test_what_the_grader_tells_apart(old, new, expected):
    assert old in STORY and len(worlds.readings(STORY)) == 1
    text = STORY.replace(old, new, 1)
    assert worlds.parses(text) == (expected != 'no')
    assert bool(worlds.readings(text)) == (expected == 'agrees')


def test_the_tasks_have_right_answers():
    seen = Counter()
    for record in worlds.dialogues(3000):
        assert data.as_record(record) == record
        *_, question, answer = (m['content'] for m in record['messages'])
        seen[record['task']] += 1
        if record['task'] in ('sort', 'reverse'):
            letters = question.split(': ')[1].split()
            assert answer.split() == (sorted(letters) if record['task'] == 'sort' else letters[::-1])
        elif question == 'Now reverse that.':
            assert answer.split() == record['messages'][1]['content'].split()[::-1]
        elif record['task'] == 'two':
            assert re.fullmatch(record['accept'], answer)
            one = answer.split(' and ')[0]
            assert not re.fullmatch(record['accept'], f'{one} and {one}')
        else:
            assert answer.rstrip('.').split()[-1] in record['messages'][0]['content']
    assert set(seen) == {'story', 'sort', 'reverse', 'two', 'follow-up'}


def test_facts_are_stated_as_promised():
    facts = worlds.facts(64)
    stated = {(f['first'], f['join'], f['second']) for f in facts if f['seen']}
    reverse = {' is the mother of ': ' is the child of ', ' is the child of ': ' is the mother of '}
    assert len(facts) == 128 and len(stated) == 96 and len({f['first'] for f in facts}) == 128
    for f in facts:
        other = (f['second'], reverse[f['join']], f['first']) in stated
        assert f['both'] == (other and f['seen']) and (f['seen'] or other)
