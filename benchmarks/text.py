"""Real sentences that every Python has: the prose of its language reference, as `help()` shows it."""

from functools import cache
from pydoc_data import topics


@cache
def paragraphs() -> list[str]:
    """Paragraphs of at least fifty characters that read as sentences: no code, tables or headings."""
    blocks = (block for topic in topics.topics.values() for block in topic.split("\n\n"))
    flat = (" ".join(block.split()) for block in blocks if not block.startswith(" "))
    return [text for text in flat if len(text) >= 50 and text[0].isupper() and text[-1] in ".:!?"]


def texts(count: int, first: int = 0) -> list[str]:
    """`count` texts of four, three, two, one, four ... paragraphs: a batch of them has rows of different lengths."""
    prose = paragraphs()
    if 4 * (first + count) > len(prose):
        raise ValueError(f"the language reference has {len(prose)} paragraphs, too few for {count} texts from {first}")
    starts = range(4 * first, 4 * (first + count), 4)
    return [" ".join(prose[start : start + 4 - at % 4]) for at, start in enumerate(starts)]


def calibration_texts(count: int) -> list[str]:
    """Like `texts`, from a part of the reference that those of the measured sizes do not reach."""
    return texts(count, first=100)
