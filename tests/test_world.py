"""The made-up world: its probabilities are exact, its grader right, its tasks solvable."""

import math
import random
import re
from collections import Counter

import pytest
import worlds

import data


class Script:
    """Stands in for random.Random: takes the choices it is told to, then the first; notes how many there were."""

    def __init__(self, told):
        self.told, self.taken, self.widths = list(told), [], []

    def choice(self, options):
        i = self.told[len(self.taken)] if len(self.taken) < len(self.told) else 0
        self.taken.append(i)
        self.widths.append(len(options))
        return options[i]


def every_story():
    """All stories of the grammar with their probabilities: a walk over every sequence of choices."""
    told, found = [], []
    while True:
        script = Script(told)
        text, logp, _ = worlds.story(script)
        found.append((text, logp))
        last = max((i for i, (k, n) in enumerate(zip(script.taken, script.widths)) if k + 1 < n), default=None)
        if last is None:
            return found
        told = [*script.taken[:last], script.taken[last] + 1]


@pytest.fixture
def small_world(monkeypatch):
    small = {kind: words[:2] for kind, words in worlds.WORDS.items() if kind != 'name'}
    small['name'] = small['girl'] + small['boy']
    monkeypatch.setattr(worlds, 'WORDS', small)
    monkeypatch.setattr(worlds, 'STORY', [line[:3] for line in worlds.STORY])
    worlds.pattern.cache_clear()
    yield
    worlds.pattern.cache_clear()


def test_the_probabilities_of_all_stories_add_up_to_one(small_world):
    found = every_story()
    assert len(found) > 5000 and len({text for text, _ in found}) == len(found)     # unambiguous: no text comes twice
    assert math.isclose(math.fsum(math.exp(logp) for _, logp in found), 1, rel_tol=1e-9)
    for text, logp in found[::37]:
        assert worlds.readings(text) == pytest.approx([logp])


def test_reader_and_writer_agree_on_the_whole_world():
    rng = random.Random(0)
    for _ in range(500):
        text, logp, _ = worlds.story(rng)
        assert worlds.readings(text) == pytest.approx([logp]) and worlds.parses(text)
    assert len({worlds.story(rng)[0].count(' ') for _ in range(200)}) == 1          # equally long


STORY = ('Gus lives in the mill. He has a red drum. His brother Max eats nuts. '
         'On Monday Max lost the drum in the garden. Now Gus has the red drum in the mill.')


@pytest.mark.parametrize('old, new, parses', [
    ('Now Gus', 'Now Max', 'agrees'), ('lost the drum', 'lost the kite', 'parses'), ('He has', 'She has', 'parses'),
    ('Max lost', 'Leo lost', 'parses'), ('the red drum in', 'the blue drum in', 'parses'),
    ('Max eats', 'Gus eats', 'parses'), ('drum in the mill', 'drum in the park', 'parses'),
    ('in the garden', 'in the mill', 'no'), ('brother Max', 'brother Ida', 'no'), ('the drum in', 'drum in', 'no'),
    ('. He', '.  He', 'no'), ('. He', '.He', 'no'), ('in the mill.', 'in the mill. And on.', 'no'),
    ('Gus lives', ' Gus lives', 'no')])
def test_what_the_grader_tells_apart(old, new, parses):
    assert old in STORY and len(worlds.readings(STORY)) == 1
    text = STORY.replace(old, new, 1)
    assert bool(worlds.parses(text)) == (parses != 'no')
    assert bool(worlds.readings(text)) == (parses == 'agrees')


def test_the_tasks_are_answered_rightly():
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
            story = record['messages'][0]['content'].split('. ')
            assert any(word in ' '.join(story) for word in answer.rstrip('.').split()[-1:])
    assert set(seen) == {'story', 'sort', 'reverse', 'two', 'follow-up'}


def test_facts_are_stated_as_promised():
    facts = worlds.facts(64)
    stated = {(f['first'], f['join'], f['second']) for f in facts if f['seen']}
    turned = {' is the mother of ': ' is the child of ', ' is the child of ': ' is the mother of '}
    assert len(facts) == 128 and len(stated) == 96 and len({f['first'] for f in facts}) == 128
    for f in facts:
        other = (f['second'], turned[f['join']], f['first']) in stated
        assert f['both'] == (other and f['seen']) and (f['seen'] or other)
