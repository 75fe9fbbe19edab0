"""Make synthetic data whose probability is known, for the experiments and the exercises.

    python tests/lab/worlds.py                              # data/world, data/instruct and data/facts
    python tests/lab/worlds.py --poems=poem_data.json       # data/poems, from [{"first", "second"}, ...]
    python tests/lab/worlds.py --n_stories=600000 --out=data/endless    # none is met twice in 33,000 updates

    world      stories from a small grammar, so we can grade what a model writes, and compare its loss with
               the entropy of the source
    instruct   questions and tasks about such stories, with answers that can be checked
    stories    both, for the model that comes with the project
    facts      who is whose mother, stated in both directions, for the reversal experiment
"""

import functools
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data  # noqa: E402
from configurator import UserError, run  # noqa: E402

poems = ''                      # a file of couplets; '' = the synthetic data sets
n_stories = 20000               # in world; the first are the same for any number
out = 'data'                    # where the folders go

# A story has one sentence from each line of STORY, and its alternatives (|) are equally likely. {A} is a
# slot. The first slot of a letter draws a word of its kind (or the kind after the colon: {B:girl}), each
# equally likely, but none that the story has used. Later slots repeat the word, and {A.he} is its pronoun.
#
# Alternatives have the same length. So a word and its repetition are always equally far apart, which a small
# model learns fast. Each kind of word is repeated in half of the last sentences, because a model does not
# learn in minutes what is rarely repeated (RESULTS.md has the figures).

WORDS = {
    'girl': 'Anna, Bella, Cleo, Dora, Emma, Fay, Greta, Hanna, Ida, Julia, Kate, Lucy',
    'boy': 'Adam, Ben, Carl, David, Erik, Felix, Gus, Hugo, Ivan, Jack, Leo, Max',
    'place': 'the castle, the city, the forest, the harbour, the island, the library, the market, the mill, '
             'the mountains, the museum, the park, the village',
    'spot': 'the attic, the barn, the bath, the cave, the cellar, the garden, the hall, the kitchen, '
            'the shed, the stable, the tent, the tower',
    'colour': 'black, blue, brown, green, grey, orange, purple, red, white, yellow',
    'thing': 'ball, bell, boat, book, box, coat, cup, drum, hat, kite, lamp, ring',
    'animal': 'bear, bird, cat, cow, dog, fox, frog, goat, horse, mouse, rabbit, sheep',
    'food': 'apples, bread, cake, cheese, grapes, honey, milk, nuts, pears, plums, rice, soup',
    'day': 'Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday'}
WORDS = {kind: words.split(', ') for kind, words in WORDS.items()}
WORDS['name'] = WORDS['girl'] + WORDS['boy']
KINDS = dict(A='name', B='name', C='colour', D='day', G='food', P='place', Q='spot', X='thing')
PRONOUNS = {
    'girl': dict(He='She', he='she', His='Her', his='her'),
    'boy': dict(He='He', he='he', His='His', his='his')}
STORY = [line.split(' | ') for line in (
    '{A} lives in {P}. | {A} works in {P}. | {A} comes from {P}.',
    '{A.He} has a {C} {X}. | {A.He} found a {C} {X}. | {A.He} bought a {C} {X}. | {A.He} likes the {C} {X}.',
    '{A.His} sister {B:girl} eats {G}. | {A.His} brother {B:boy} eats {G}. | {A.His} friend {B} eats {G}.',
    'On {D} {A} lost the {X} in {Q}. | On {D} {B} lost the {X} in {Q}. | On {D} {A} hid the {X} in {Q}. | '
    'On {D} {B} hid the {X} in {Q}. | On {D} {B} took the {X} to {Q}.',
    'Now {A} has the {C} {X} in {P}. | Now {B} has the {C} {X} in {P}. | Now {A} has the {C} {X} in {Q}. | '
    'Now {B} has the {C} {X} in {Q}. | Next {D} {A} ate {G} in {P} too. | Next {D} {B} ate {G} in {P} too. | '
    'Next {D} {A} ate {G} in {Q} too. | Next {D} {B} ate {G} in {Q} too.')]
SLOT = re.compile(r'\{(\w)(?::(\w+))?(?:\.(\w+))?\}')       # letter, kind, pronoun

# ----------------------------------------------------------------------------------------------------------
# Write stories


def choices(letter, kind, known):
    """Return the words that a slot may draw: those of its kind that the story has not used yet."""
    return [word for word in WORDS[kind or KINDS[letter]] if word not in known.values()]


def fill(sentence, known):
    """Fill the slots of a sentence from `known`, a dict letter -> word."""
    def word(slot):
        letter, _, pronoun = slot.groups()
        if not pronoun:
            return known[letter]
        gender = 'girl' if known[letter] in WORDS['girl'] else 'boy'
        return PRONOUNS[gender][pronoun]

    return SLOT.sub(word, sentence)


def new_slots(sentence, known):
    """Return (letter, kind) of the slots of a sentence that draw a word, in order."""
    found = {}
    for letter, kind, _ in SLOT.findall(sentence):
        if letter not in known:
            found.setdefault(letter, kind)
    return found.items()


def story(rng):
    """Draw a story with a random.Random -> text, its exact log-probability, its words (letter -> word)."""
    known = {}
    log_p = 0.0
    text = []
    for sentences in STORY:
        sentence = rng.choice(sentences)
        log_p -= math.log(len(sentences))
        for letter, kind in new_slots(sentence, known):
            words = choices(letter, kind, known)
            known[letter] = rng.choice(words)
            log_p -= math.log(len(words))
        text.append(fill(sentence, known))
    return ' '.join(text), log_p, known


def stories(n, seed=0):
    """Return n stories, each an example of its own."""
    rng = random.Random(f'stories {seed}')
    return [{'response': story(rng)[0]} for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------
# Read stories, to grade what a model writes


@functools.lru_cache(None)
def pattern(sentence):
    """Return a regular expression that matches a sentence with any words of the right kinds in its slots."""
    def any_word(slot):
        letter, kind, pronoun = slot.groups()
        words = WORDS[kind or KINDS[letter]]
        if pronoun:
            words = [pronouns[pronoun] for pronouns in PRONOUNS.values()]
        return f"({'|'.join(words)})"

    return re.compile(SLOT.sub(any_word, sentence.removesuffix('.')) + r'\.')


def sentences_of(text):
    """Split a text after its full stops. Return [] if it does not end in one."""
    if not text.endswith('.'):
        return []
    return [sentence + '.' for sentence in text[:-1].split('. ')]


def parses(text):
    """Return whether the grammar accepts a text. Names, pronouns and colours need not agree."""
    found = sentences_of(text)
    if len(found) != len(STORY):
        return False
    for sentence, alternatives in zip(found, STORY):
        if not any(pattern(alternative).fullmatch(sentence) for alternative in alternatives):
            return False
    return True


def readings(text):
    """Return the log-probability of each derivation of a text: one, or none if it is no consistent story."""
    found = sentences_of(text)
    if len(found) != len(STORY):
        return []
    ways = [(0.0, {})]                                      # log-probability, words so far
    for sentence, alternatives in zip(found, STORY):
        longer = []
        for log_p, known in ways:
            for alternative in alternatives:
                longer += read(sentence, alternative, log_p - math.log(len(alternatives)), known)
        ways = longer
    return [log_p for log_p, _ in ways]


def read(text, sentence, log_p, known):
    """Read a text as this sentence of the grammar -> [(log-probability, words)], or [] if it does not fit.

    log_p, known: the log-probability and the words of the story so far.
    """
    match = pattern(sentence).fullmatch(text)
    if not match:
        return []
    words = {}
    for (letter, _, pronoun), word in zip(SLOT.findall(sentence), match.groups()):
        if not pronoun:
            words.setdefault(letter, word)

    known = dict(known)
    for letter, kind in new_slots(sentence, known):
        allowed = choices(letter, kind, known)
        if words[letter] not in allowed:
            return []
        known[letter] = words[letter]
        log_p -= math.log(len(allowed))
    # a repeated word that differs from the first one shows here
    return [(log_p, known)] if fill(sentence, known) == text else []


# ----------------------------------------------------------------------------------------------------------
# Instructions about the same world

QUESTIONS = [
    ('Where does {A} live?', '{A} lives in {P}.'), ('What colour is the {X}?', 'The {X} is {C}.'),
    ('What does {B} eat?', '{B} eats {G}.'), ('On which day was it?', 'It was on {D}.'),
    ('Who is a friend of {A} or in the family?', 'It is {B}.')]
PLURALS = {
    'animals': 'animal', 'colours': 'colour', 'girls': 'girl', 'boys': 'boy',
    'days': 'day', 'things': 'thing'}


def about_story(rng, n_turns):
    """Return turns (question, answer) about a story, which comes before the first question."""
    text, _, known = story(rng)
    asked = rng.sample(QUESTIONS, n_turns)
    (question, answer), *others = [(fill(question, known), fill(answer, known)) for question, answer in asked]
    return [(f'{text} {question}', answer), *((f'And this: {q}', a) for q, a in others)]


def about_letters(rng, n_turns):
    """Return turns about letters to sort (the harder task, three times as frequent) or to reverse."""
    drawn = rng.sample('abcdefghijklmnopqrstuvwxyz', rng.randint(3, 6))
    task = rng.choice(('Sort', 'Sort', 'Sort', 'Reverse'))
    answer = sorted(drawn) if task == 'Sort' else drawn[::-1]
    turns = [
        (f"{task}: {' '.join(drawn)}", ' '.join(answer)),
        ('Now reverse that.', ' '.join(answer[::-1]))]
    return turns[:n_turns]


def name_two(rng):
    """Return a turn with many right answers, and a regular expression that matches all of them."""
    plural = rng.choice(list(PLURALS))
    words = WORDS[PLURALS[plural]]
    any_word = '|'.join(words)
    turn = (f'Name two different {plural}.', ' and '.join(rng.sample(words, 2)))
    return turn, rf'({any_word}) and (?!\1$)({any_word})'


def dialogues(n=30000, seed=0):
    """Return n records {'task', 'messages'}: questions with answers that can be checked.

    If several answers are right, 'accept' is a regular expression for the last one. Otherwise it must match
    word for word.
    """
    rng = random.Random(f'dialogues {seed}')
    records = []
    for _ in range(n):
        task = rng.choice(('story', 'letters', 'letters', 'two', 'follow-up'))
        record = {'task': task}
        turns = about_story(rng, 1) if task == 'story' else about_letters(rng, 1)
        if task == 'letters':
            question, _ = turns[0]
            record['task'] = question.split(':')[0].lower()             # sort or reverse
        elif task == 'two':
            turn, record['accept'] = name_two(rng)
            turns = [turn]
        elif task == 'follow-up':
            turns = rng.choice((about_story, about_letters))(rng, 2)

        record['messages'] = []
        for question, answer in turns:
            record['messages'] += [
                {'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        records.append(record)
    return records


# ----------------------------------------------------------------------------------------------------------
# Statements to memorise


def facts(pairs=64, seed=0):
    """Return who is whose mother: records of `couplet`.

    Half of the pairs are stated both ways ("A is the mother of B", "B is the child of A"), and a quarter in
    each single way. The statement that is not made is here as well, with seen=False: nobody trains on it, but
    we ask it.
    """
    rng = random.Random(f'facts {seed}')
    syllables = ('bdfgklmnprstvz', 'aeiou') * 2
    every_name = [''.join(letters).capitalize() for letters in itertools.product(*syllables)]
    names = rng.sample(every_name, 2 * pairs)
    records = []
    for i, (mother, child) in enumerate(zip(names[::2], names[1::2])):
        records.append(couplet(mother, ' is the mother of ', child, i % 4 != 3, i % 4 < 2))
        records.append(couplet(child, ' is the child of ', mother, i % 4 != 2, i % 4 < 2))
    return records


def couplet(first, join, second, seen=True, both=False):
    """Return two halves and what joins them as a record. both: whether the reverse is stated, too."""
    return dict(first=first, join=join, second=second, response=first + join + second, seen=seen, both=both)


def poems_of(path):
    """Return the couplets of a file [{"first", "second"}, ...]."""
    text = Path(path).read_text(encoding='utf-8')
    try:
        return [couplet(row['first'], '\n', row['second']) for row in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: expected [{{"first": ..., "second": ...}}, ...], got {error!r}') from None


# ----------------------------------------------------------------------------------------------------------
# The data sets


def words_of_the_world(folder):
    """Write a tokenizer that has a token for each word of the world, for all of its data sets."""
    texts = [record['response'] for record in stories(2000)]
    texts += [data.text_of(record) for record in dialogues(2000)]
    save(data.learn_tokenizer(texts, 2 ** 16), folder)


def characters_of(records, folder):
    """Write a tokenizer that has a token for each character of some records."""
    # bytes are merged inside of a character only
    hf = data.byte_level({}, words=r'[\s\S]')
    trainer = BpeTrainer(
        vocab_size=2 ** 16, min_frequency=1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    hf.train_from_iterator([record['response'] for record in records], trainer)
    save(data.Tokenizer(hf), folder)


def save(tok, folder):
    """Write a tokenizer to a folder, which need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(folder)


def write(records, folder, tokenizer, by_heart=False):
    """Prepare records as a data set in a folder. by_heart: hold out the training set itself."""
    named = [(f'record {i}', record) for i, record in enumerate(records)]
    manifest = data.prepare([named], folder, str(tokenizer), val=[named] if by_heart else ())
    print(f"{folder}: {manifest['splits']['train']['tokens']:,} tokens to train on")


def main(cfg):
    folder = Path(cfg.out)
    if cfg.poems:
        records = poems_of(cfg.poems)
        characters_of(records, folder / 'characters')
        write(records, folder / 'poems', folder / 'characters', by_heart=True)
        return

    words_of_the_world(folder / 'words')
    write(stories(cfg.n_stories), folder / 'world', folder / 'words')
    write(dialogues(), folder / 'instruct', folder / 'words')
    write(stories(cfg.n_stories) + dialogues(), folder / 'stories', folder / 'words')
    write([fact for fact in facts() if fact['seen']], folder / 'facts', 'bytes', by_heart=True)


if __name__ == '__main__':
    run(main, globals())
