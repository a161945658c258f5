"""Which page of the cache is whose. A page holds the keys and values of `size` neighbouring tokens.

A full page is known by what it continues: its key is a hash of the key of the page before it and of
its own tokens. A request whose tokens begin alike reads the same page.

    key_i = hash(key_(i-1), tokens of page i)
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

NOBODY = 0  # the page that padding is written to, and that no request reads


class Pages:
    """The pages 1, 2, ... of a cache. Each is free, known by its tokens, or read by requests; a
    known one may be read as well.

    Args:
        count: how many pages there are beside that of nobody.
        size: how many tokens a page holds.
        reuse: whether full pages are known by their tokens.
    """

    def __init__(self, count: int, size: int, reuse: bool = True):
        self.count, self.size, self.reuse = count, size, reuse
        self._free = deque(range(1, count + 1))
        self._readers = [0] * (count + 1)
        self._key_of: dict[int, bytes] = {}
        # The page that was used least recently comes first.
        self._known: OrderedDict[bytes, int] = OrderedDict()

    @property
    def available(self) -> int:
        """How many pages `take` can give: those that no request reads."""
        return self._readers[1:].count(0)

    def needed(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.size)

    def alone(self, pages: Sequence[int]) -> int:
        """How many of these pages have one reader."""
        return sum(self._readers[page] == 1 for page in pages)

    def take(self, count: int) -> list[int]:
        """Pages with one reader. What is known and read by nobody is forgotten for them, the least
        recently used first."""
        while len(self._free) < count:
            self._forget(next(key for key, page in self._known.items() if not self._readers[page]))
        taken = [self._free.popleft() for _ in range(count)]
        for page in taken:
            self._readers[page] = 1
        return taken

    def prefix(self, tokens: Sequence[int]) -> list[int]:
        """The known pages that the tokens begin with, with one reader more. The last token is left
        out: its logits are wanted."""
        pages: list[int] = []
        for key in self._keys(tokens[:-1]):
            if key not in self._known:
                break
            self._known.move_to_end(key)
            pages.append(self._known[key])
        for page in pages:
            self._readers[page] += 1
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Know the full pages of a request by its tokens, of which keys and values are written."""
        for page, key in zip(pages, self._keys(tokens)):
            if key not in self._known and page not in self._key_of:
                self._known[key], self._key_of[page] = page, key

    def drop(self, pages: Sequence[int]) -> None:
        """One reader less. A page that nobody reads and that is not known is free."""
        for page in pages:
            self._readers[page] -= 1
            if not self._readers[page] and page not in self._key_of:
                self._free.append(page)

    def _forget(self, key: bytes) -> None:
        page = self._known.pop(key)
        del self._key_of[page]
        self._free.append(page)

    def _keys(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """The keys of the full pages, one after the other."""
        key = b""
        for first in range(0, len(tokens) - self.size + 1, self.size) if self.reuse else ():
            page = array("q", tokens[first : first + self.size])
            key = hashlib.blake2b(key + page.tobytes(), digest_size=16).digest()
            yield key
