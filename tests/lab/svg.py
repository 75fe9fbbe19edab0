"""Pieces of a picture: text in lines, lines through points, axes. svg.css has the colours, light and dark."""

import math
import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 600, 28, 572
END = 'text-anchor="end"'


def page(title, about, caption, height, body, style=''):
    """Return a picture: `body` between a title and a caption, and `about` for those who cannot see it."""
    lines = [text(LEFT, height + 25 * k, words) for k, words in enumerate(textwrap.wrap(caption, 56))]
    height += 25 * len(lines)
    style = Path(__file__).with_suffix('.css').read_text(encoding='utf-8') + style
    # a background of its own, because a page may be dark where the system is light
    svg = '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img"><title>{escape(title)}</title><desc>{escape(about)}</desc>',
        f'<style>{style}</style><rect class="card" width="100%" height="100%" rx="12"/>',
        f'<rect class="edge line" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="12"/>',
        text(LEFT, 44, title, 'ink', 23, 'font-weight="600"'), *body, *lines, '</svg>', ''])
    # a model may write anything, and XML allows no control characters
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]', '·', svg)


def text(x, y, words, kind='dim', size=18, more=''):
    """Return words at a place."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" {more}>{escape(words)}</text>'


def place(ids, tok, top, size):
    """Break the text of ids into lines -> [(word, attributes of a rectangle around it), ...], the last y."""
    words = []
    for i in ids:
        piece = ' EOS' if i == tok.eos_id else tok.decode([i])
        # a piece without a blank before it, such as a full stop, stays with the word
        if piece.startswith(' ') or not words:
            words.append([])
        words[-1].append(piece.strip())

    # a letter of a font of code is as wide as 0.6 of its size, and textLength makes it so in every font
    letter = 0.6 * size
    placed = []
    x, y = LEFT, top
    for word in words:
        if x > LEFT and x + letter * len(''.join(word)) > RIGHT:
            x, y = LEFT, y + 1.7 * size
        for shown in word:
            kind = 'dim code' if shown == 'EOS' else 'ink code'
            width = letter * len(shown)
            placed.append((
                text(x, y, shown, kind, size, f'textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'),
                f'x="{x + 1:g}" y="{y - size:g}" width="{max(0, width - 2):g}" '
                f'height="{1.35 * size:g}" rx="4"'))
            x += width
        x += letter
    return placed, y


def line(kind, places, more='', radius=0):
    """Return a line through places (x, y), with a dot at each if they have a radius."""
    path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in places if radius]
    return f'<g class="{kind}"><polyline class="line" points="{path}" {more}/>{"".join(dots)}</g>'


def chart(xs, ys, labels):
    """Return axes for (least, largest) values of x and y, and a function from values x, y to their place."""
    x_ticks, to_x = axis(*xs, LEFT + 40, RIGHT - 10)
    y_ticks, to_y = axis(*ys, 380, 105)
    parts = [text(LEFT, 78, labels[1]), text(RIGHT - 10, 436, labels[0], more=END)]
    parts += [text(to_x(x), 409, f'{x:g}', more='text-anchor="middle"') for x in x_ticks]
    parts += [text(LEFT + 30, to_y(y) + 6, f'{y:g}', more=END) for y in y_ticks]
    parts += [line('edge', [(LEFT + 40, to_y(y)), (RIGHT - 10, to_y(y))]) for y in y_ticks]
    return parts, lambda x, y: (to_x(x), to_y(y))


def axis(low, high, start, end):
    """Return round numbers that enclose low and high, and a function from a value to its place."""
    least = (high - low) / 5
    power = 10 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 4, 5, 10) if m * power >= least * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    ticks = [round(k * step, 9) for k in range(first, last + 1)]
    return ticks, lambda value: start + (end - start) * (value / step - first) / (last - first)
