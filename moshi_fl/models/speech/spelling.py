"""A small SentencePiece model of our own: what a hub's text stream has where nobody gives another.

Common English words and parts of words are one token each; bytes spell everything else. It is put
together here rather than trained, so that it is the same everywhere and needs no file. The layout
is that of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from functools import cache

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of pieces
IDENTITY = b"identity"  # no normalisation of letters
SPACE = "\u2581"

# The commonest first: a piece's score falls with its place.
WORDS = """
the to and a of i you it in is that for on was he with as his they be at one have this from had by
not but what all were we when your can said there use an each which she do how their if will up
other about out many then them these so some her would make like him into time has look two more
go see no way could my than first been call who its now find long down day did get come made may
yes please thank thanks hello hi good morning evening night today tomorrow yesterday i'm it's don't
let's that's what's we're you're i'll you'll can't okay well right just very really much here where
why three four five six seven eight nine ten hundred house home water food train bus car street
station left name work school friend family people man woman child book word letter number question
answer help want need know think say tell ask give take put keep try wait stop start open close read
write hear listen speak talk red blue green white black big small old new hot cold next last again
always never still before after because under over through little great place year week hour minute
weather rain sun wind sea hill river garden door window table room light
"""
PARTS = """
ing ed er est ly tion ment ness ful less able ies es en al ous ive th sh ch ck ee oo ea ai ou ow
st nd nt ll ss tt pp rr in on an at it is ar or ur ir le re te ne se ve ce ge ke me de ra ro ri la
lo li ma mo mi na no ni pa po pi sa so si ta to ti un dis con com pro pre ex be
"""
LETTERS = "etaoinshrdlcumwfgypbvkjxqz'0123456789.,?!-\":;ETAOINSHRDLCUMWFGYPBVKJXQZ"


@cache
def small_model() -> bytes:
    """The file: unknown, begin, end and padding as Kyutai's has them, bytes, pieces."""
    words = [SPACE + word for word in dict.fromkeys(WORDS.split())]
    words += list(dict.fromkeys(map(_capital, words[:60])))
    parts = list(dict.fromkeys(PARTS.split()))
    special = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<pad>", CONTROL)]
    pieces = [_piece(text, 0.0, kind) for text, kind in special]
    pieces += [_piece(f"<0x{byte:02X}>", -12.0, BYTE) for byte in range(256)]
    for scale, texts in ((-5.0, words), (-7.0, parts), (-9.0, [SPACE, *LETTERS])):
        pieces += [_piece(text, scale - n / 200, NORMAL) for n, text in enumerate(texts)]
    trainer = _number(3, 1) + _number(4, len(pieces)) + _number(35, 1)
    trainer += _number(40, 0) + _number(41, 1) + _number(42, 2) + _number(43, 3)
    normalizer = _bytes(1, IDENTITY) + _number(3, 1) + _number(4, 1) + _number(5, 1)
    body = b"".join(_bytes(1, piece) for piece in pieces)
    return body + _bytes(2, trainer) + _bytes(3, normalizer)


def _capital(word: str) -> str:
    return SPACE + word[1:].capitalize()


def _piece(text: str, score: float, kind: int) -> bytes:
    score_field = _varint(2 << 3 | 5) + struct.pack("<f", score)
    return _bytes(1, text.encode()) + score_field + _number(3, kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
