"""The JSON of aligners and recognisers, told apart by its shape."""

from collections.abc import Callable

import msgspec

from lipprep.io.errors import UserError
from lipprep.pipeline.captions.textgrid import choose_tiers, interval
from lipprep.pipeline.captions.timing import Timing, seconds, spread, timing

_SURE = ("score", "probability", "confidence")  # WhisperX, Whisper and faster-whisper, whisper-timestamped


class UnknownShape(UserError):
    """JSON that is well formed, and holds no timings that are known: many programs leave such files."""


def parse_json(text: str, tier: str | None = None) -> list[Timing]:
    """The words of Gentle (`words[].case`), WhisperX and Whisper (`segments[].words[]`, `word_segments[]`, `words[]`),
    and Montreal Forced Aligner (`tiers`, of which `tier` or that of words is taken).

    Words that an aligner did not find have no times. Where Whisper gives none for words, those of a segment are spread
    over it, and rough. Raises ValueError, naming the entry, for what is no such file; UnknownShape for other JSON.
    """
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"it is no JSON: {error}") from error
    if isinstance(found, list) and found and all(_is_word(entry) for entry in found):
        return _each(found, "entry", _word)
    if isinstance(found, dict):
        tiers, segments, words = found.get("tiers"), found.get("segments"), found.get("words")
        if tiers and isinstance(tiers, dict | list):
            return _tiers(tiers, tier)
        if segments and _all_mappings(segments):
            by_word = found.get("word_segments")
            if _all_mappings(by_word) and by_word and not any("words" in segment for segment in segments):
                return _each(by_word, "word_segments", _word)
            return _segments(segments)
        for name in ("word_segments", "words"):
            entries = found.get(name)
            if entries and _all_mappings(entries):
                gentle = any("case" in entry for entry in entries)
                return _each(entries, name, _gentle if gentle else _word)
        if any(isinstance(empty, list) and not empty for empty in (segments, words)):  # nothing was said
            return []
    raise UnknownShape("it is JSON, of no shape that is known (Gentle, WhisperX, Whisper, Montreal Forced Aligner)")


def _all_mappings(entries: object) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def _is_word(entry: object) -> bool:
    return isinstance(entry, dict) and ("word" in entry or "text" in entry) and "start" in entry and "end" in entry


def _each(entries: list[dict], name: str, read: Callable[[dict, str], Timing]) -> list[Timing]:
    return [read(entry, f"{name}[{n}]") for n, entry in enumerate(entries)]


def _gentle(entry: dict, where: str) -> Timing:
    if entry.get("case") != "success":
        return Timing(str(entry.get("word", "")), None, None)
    # <unk> is what Gentle heard where it does not know the word of the transcript, whose times then say little.
    word = entry.get("alignedWord", entry.get("word"))
    if word != "<unk>":
        word = entry.get("word", word)
    return timing(word, entry.get("start"), entry.get("end"), where=where)


def _word(entry: dict, where: str) -> Timing:
    word = entry.get("word", entry.get("text"))
    if entry.get("start") is None or entry.get("end") is None:  # WhisperX times no numerals
        return Timing(str(word or ""), None, None)
    sure = next((entry[name] for name in _SURE if entry.get(name) is not None), None)
    return timing(word, entry["start"], entry["end"], where=where, confidence=sure)


def _segments(segments: list[dict]) -> list[Timing]:
    found: list[Timing] = []
    for n, segment in enumerate(segments):
        where = f"segments[{n}]"
        words = segment.get("words")
        if words is not None:
            if not _all_mappings(words):
                raise UserError(f"{where}: its words are no list of words")
            found += _each(words, f"{where}.words", _word)
            continue
        whole = timing(segment.get("text", ""), segment.get("start"), segment.get("end"), where=where)
        found += spread(whole.word, whole.start, whole.end)
    return found


def _tiers(tiers: dict | list, tier: str | None) -> list[Timing]:
    named = list(tiers.items()) if isinstance(tiers, dict) else [(t.get("name"), t) for t in tiers if _entries(t)]
    read: dict[str, list[Timing]] = {}
    for name, found in named:
        if not isinstance(name, str) or (entries := _entries(found)) is None:
            raise UnknownShape("its tiers have no entries")
        if entries and isinstance(entries[0], list) and len(entries[0]) == 2:  # points in time, no words
            continue
        read[name] = []
        for n, entry in enumerate(entries):
            where = f"tier {name}, entry {n}"
            if not isinstance(entry, list) or len(entry) < 3 or not isinstance(entry[2], str):
                raise UserError(f"{where} is not [start, end, text]")
            read[name] += interval(seconds(entry[0], where), seconds(entry[1], where), entry[2], where)
    return choose_tiers(read, tier)


def _entries(tier: object) -> list | None:
    entries = tier.get("entries") if isinstance(tier, dict) else None
    return entries if isinstance(entries, list) else None
