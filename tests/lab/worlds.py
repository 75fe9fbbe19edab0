"""Synthetic data, seeded and of known probability, for the experiments and the exercises.

    python tests/lab/worlds.py                              # writes data/world, data/instruct and data/facts
    python tests/lab/worlds.py --poems=poem_data.json       # data/poems, from couplets [{"first", "second"}, ...]

    world      stories from a small grammar: what a model writes can be graded, its loss compared with the entropy
    instruct   questions and tasks about such stories, with answers that can be checked
    facts      who is whose mother, stated in both directions: the reversal experiment
"""

import functools
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
from configurator import command  # noqa: E402

poems = ''                      # a file of couplets; default: the three synthetic sets
out = 'data'                    # where the folders go

# A story has one sentence from each line of STORY; alternatives (|) are equally likely. {A} is a person: the first slot
# of a letter draws a word of its kind (or of the kind named: {B:girl}) that the story has not used, each equally
# likely; later slots repeat it; {A.he} is the matching pronoun. Alternatives are equally long, so that a word and its
# repetition are always equally far apart, which a small model learns fast. Each kind of word is repeated in half of the
# last sentences: what is rarely repeated is not learned in minutes (see RESULTS.md).

WORDS = {kind: words.split(', ') for kind, words in {
    'girl': 'Anna, Bella, Cleo, Dora, Emma, Fay, Greta, Hanna, Ida, Julia, Kate, Lucy',
    'boy': 'Adam, Ben, Carl, David, Erik, Felix, Gus, Hugo, Ivan, Jack, Leo, Max',
    'place': 'the castle, the city, the forest, the harbour, the island, the library, the market, the mill, '
             'the mountains, the museum, the park, the village',
    'spot': 'the attic, the barn, the bath, the cave, the cellar, the garden, the hall, the kitchen, the shed, '
            'the stable, the tent, the tower',
    'colour': 'black, blue, brown, green, grey, orange, purple, red, white, yellow',
    'thing': 'ball, bell, boat, book, box, coat, cup, drum, hat, kite, lamp, ring',
    'animal': 'bear, bird, cat, cow, dog, fox, frog, goat, horse, mouse, rabbit, sheep',
    'food': 'apples, bread, cake, cheese, grapes, honey, milk, nuts, pears, plums, rice, soup',
    'day': 'Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday'}.items()}
WORDS['name'] = WORDS['girl'] + WORDS['boy']
KINDS = dict(A='name', B='name', C='colour', D='day', F='food', G='food', K='animal', P='place', Q='spot', X='thing')
FORMS = {'girl': dict(He='She', he='she', His='Her', his='her'), 'boy': dict(He='He', he='he', His='His', his='his')}
STORY = [line.split(' | ') for line in (
    '{A} lives in {P}. | {A} works in {P}. | {A} comes from {P}.',
    '{A.He} has a {C} {X}. | {A.He} found a {C} {X}. | {A.He} bought a {C} {X}. | {A.He} likes the {C} {X}.',
    '{A.His} sister {B:girl} eats {G}. | {A.His} brother {B:boy} eats {G}. | {A.His} friend {B} eats {G}.',
    'On {D} {A} lost the {X} in {Q}. | On {D} {B} lost the {X} in {Q}. | On {D} {A} hid the {X} in {Q}. | '
    'On {D} {B} hid the {X} in {Q}. | On {D} {B} took the {X} to {Q}.',
    'Now {A} has the {C} {X} in {P}. | Now {B} has the {C} {X} in {P}. | Now {A} has the {C} {X} in {Q}. | '
    'Now {B} has the {C} {X} in {Q}. | Next {D} {A} ate {G} in {P} too. | Next {D} {B} ate {G} in {P} too. | '
    'Next {D} {A} ate {G} in {Q} too. | Next {D} {B} ate {G} in {Q} too.')]
SLOT = re.compile(r'\{(\w)(?::(\w+))?(?:\.(\w+))?\}')


def options(letter, kind, known):
    """The words that a slot may draw: those of its kind that the story has not used yet."""
    return [word for word in WORDS[kind or KINDS[letter]] if word not in known.values()]


def fill(sentence, known):
    """A sentence with its slots filled from `known`, letter -> word."""
    def word(slot):
        letter, _, form = slot.groups()
        if not form:
            return known[letter]
        return FORMS['girl' if known[letter] in WORDS['girl'] else 'boy'][form]

    return SLOT.sub(word, sentence)


def new_slots(sentence, known):
    """(letter, kind) of the slots that draw a word in this sentence, in order."""
    found = {}
    for letter, kind, _ in SLOT.findall(sentence):
        if letter not in known:
            found.setdefault(letter, kind)
    return found.items()


def story(rng):
    """A story drawn with a random.Random -> (text, its exact log-probability, its words: letter -> word)."""
    known, log_p, told = {}, 0.0, []
    for sentences in STORY:
        sentence = rng.choice(sentences)
        log_p -= math.log(len(sentences))
        for letter, kind in new_slots(sentence, known):
            words = options(letter, kind, known)
            known[letter] = rng.choice(words)
            log_p -= math.log(len(words))
        told.append(fill(sentence, known))
    return ' '.join(told), log_p, known


@functools.lru_cache(None)
def pattern(sentence):
    """A regular expression that matches a sentence with any words of the right kind in its slots."""
    def any_word(slot):
        letter, kind, form = slot.groups()
        words = [forms[form] for forms in FORMS.values()] if form else WORDS[kind or KINDS[letter]]
        return f"({'|'.join(words)})"

    return re.compile(SLOT.sub(any_word, sentence.removesuffix('.')) + r'\.')


def sentences_of(text):
    """A text split after its full stops; [] if it does not end in one."""
    return [said + '.' for said in text[:-1].split('. ')] if text.endswith('.') else []


def readings(text):
    """The log-probabilities of all derivations of a text in the grammar: one, or none if it is not a story."""
    said, ways = sentences_of(text), [(0.0, {})]            # log p, words so far
    if len(said) != len(STORY):
        return []
    for sentence, alternatives in zip(said, STORY):
        longer = []
        for log_p, known in ways:
            for alternative in alternatives:
                longer += read(sentence, alternative, log_p - math.log(len(alternatives)), known)
        ways = longer
    return [log_p for log_p, _ in ways]


def read(said, sentence, log_p, known):
    """Reads a text as this sentence of the grammar, given the words so far -> [(log p, words)], or []."""
    match = pattern(sentence).fullmatch(said)
    if not match:
        return []
    words, known = {}, dict(known)
    for (letter, _, form), word in zip(SLOT.findall(sentence), match.groups()):
        if not form:
            words.setdefault(letter, word)
    for letter, kind in new_slots(sentence, known):
        allowed = options(letter, kind, known)
        if words[letter] not in allowed:
            return []
        known[letter] = words[letter]
        log_p -= math.log(len(allowed))
    return [(log_p, known)] if fill(sentence, known) == said else []


def parses(text):
    """Whether the grammar accepts a text; names, pronouns and colours need not agree."""
    said = sentences_of(text)
    return len(said) == len(STORY) and all(
        any(pattern(sentence).fullmatch(s) for sentence in alternatives) for s, alternatives in zip(said, STORY))


def stories(n=20000, seed=0):
    """The data set `world`: n stories, each an example of its own."""
    rng = random.Random(f'stories {seed}')
    return [{'response': story(rng)[0]} for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------
# Instructions over the same world

QUESTIONS = [('Where does {A} live?', '{A} lives in {P}.'), ('What colour is the {X}?', 'The {X} is {C}.'),
             ('What does {B} eat?', '{B} eats {G}.'), ('On which day was it?', 'It was on {D}.'),
             ('Who is a friend of {A} or in the family?', 'It is {B}.')]
MANY = {'animals': 'animal', 'colours': 'colour', 'girls': 'girl', 'boys': 'boy', 'days': 'day', 'things': 'thing'}


def about_story(rng, count):
    """`count` turns, (question, answer), about a story that the first question tells."""
    text, _, known = story(rng)
    asked = [(fill(q, known), fill(a, known)) for q, a in rng.sample(QUESTIONS, count)]
    (first, answer), *others = asked
    return [(f'{text} {first}', answer), *((f'And this: {q}', a) for q, a in others)]


def letters(rng, count):
    """`count` turns about letters to sort (the harder task, three times as frequent) or to reverse."""
    drawn = rng.sample('abcdefghijklmnopqrstuvwxyz', rng.randint(3, 6))
    first = rng.choice(('Sort', 'Sort', 'Sort', 'Reverse'))
    answer = sorted(drawn) if first == 'Sort' else drawn[::-1]
    turns = [(f"{first}: {' '.join(drawn)}", ' '.join(answer)), ('Now reverse that.', ' '.join(answer[::-1]))]
    return turns[:count]


def name_two(rng):
    """A question with many right answers -> (turn, a regular expression for them)."""
    many = rng.choice(list(MANY))
    words = WORDS[MANY[many]]
    one = '|'.join(words)
    turn = (f'Name two different {many}.', ' and '.join(rng.sample(words, 2)))
    return turn, rf'({one}) and (?!\1$)({one})'


def dialogues(n=30000, seed=0):
    """n records {'task', 'messages', ['accept']}: questions with answers that can be checked.

    accept: a regular expression for the last answer where several are right; otherwise it must match word for word.
    """
    rng, made = random.Random(f'dialogues {seed}'), []
    for _ in range(n):
        task, accept = rng.choice(('story', 'letters', 'letters', 'two', 'follow-up')), {}
        turns = about_story(rng, 1) if task == 'story' else letters(rng, 1)
        if task == 'letters':
            task = turns[0][0].split(':')[0].lower()
        elif task == 'two':
            turn, accept['accept'] = name_two(rng)
            turns = [turn]
        elif task == 'follow-up':
            turns = rng.choice((about_story, letters))(rng, 2)
        said = [{'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]
        made.append({'task': task, **accept, 'messages': said})
    return made


# ----------------------------------------------------------------------------------------------------------
# Statements to memorise


def facts(pairs=64, seed=0):
    """Who is whose mother: [{'first', 'join', 'second', 'response', 'seen', 'both'}].

    Half of the pairs are stated both ways ("A is the mother of B", "B is the child of A"), a quarter in each single
    way; the statement that is not made is included with seen=False: it is not trained on, only asked.
    """
    rng, made = random.Random(f'facts {seed}'), []
    syllables = ('bdfgklmnprstvz', 'aeiou') * 2
    names = rng.sample([''.join(word).capitalize() for word in itertools.product(*syllables)], 2 * pairs)
    for i, (mother, child) in enumerate(zip(names[::2], names[1::2])):
        made.append(couplet(mother, ' is the mother of ', child, i % 4 != 3, i % 4 < 2))
        made.append(couplet(child, ' is the child of ', mother, i % 4 != 2, i % 4 < 2))
    return made


def couplet(first, join, second, seen=True, both=False):
    return dict(first=first, join=join, second=second, response=first + join + second, seen=seen, both=both)


def poems_of(path):
    """The couplets of a file [{"first", "second"}, ...]."""
    return [couplet(row['first'], '\n', row['second']) for row in json.loads(Path(path).read_text(encoding='utf-8'))]


# ----------------------------------------------------------------------------------------------------------
# The data sets


def words_of_the_world(path):
    """Writes a vocabulary that holds all words of the world, the same for its data sets."""
    texts = ['\n\n' + record['response'] for record in stories(2000)]
    texts += [data.text_of(record) for record in dialogues(2000)]
    sample = [text for i, text in enumerate(texts) if i % 10 != 9]
    data.save_bpe(path, data.train_bpe('\n'.join(sample), 2 ** 16))


def one_token_a_character(path, texts):
    merges = {}
    for character in sorted(set(''.join(texts))):
        raw = character.encode()
        for i in range(1, len(raw)):
            merges.setdefault(raw[:i + 1], (raw[:i], raw[i:i + 1]))
    data.save_bpe(path, list(merges.values()))


def write(records, folder, tokenizer, by_heart=False):
    """Prepares records into a folder. by_heart: the validation set is the training set."""
    named = [(f'record {i}', record) for i, record in enumerate(records)]
    manifest = data.prepare([named], folder, str(tokenizer), val=[named] if by_heart else ())
    print(f"{folder}: {sum(s['tokens'] for s in manifest['splits']['train']):,} tokens to train on")


def main(config):
    folder = Path(config['out'])
    folder.mkdir(parents=True, exist_ok=True)
    if config['poems']:
        records, vocabulary = poems_of(config['poems']), folder / 'characters.json'
        one_token_a_character(vocabulary, [record['response'] for record in records])
        write(records, folder / 'poems', vocabulary, by_heart=True)
        return
    vocabulary = folder / 'words.json'
    words_of_the_world(vocabulary)
    write(stories(), folder / 'world', vocabulary)
    write(dialogues(), folder / 'instruct', vocabulary)
    write([fact for fact in facts() if fact['seen']], folder / 'facts', 'bytes', by_heart=True)


if __name__ == '__main__':
    command(main, globals())
