"""Whether a sound file is whole: libsndfile reads what there is of one that breaks off, and says nothing.

| file | what tells that its end is missing |
|---|---|
| wav, rf64, w64, aiff, au, caf | the size that its header gives its sound |
| flac, NIST | the number of samples that its header gives |
| ogg (Vorbis, Opus, FLAC) | its last page, which is marked |
| mp3 | the number of frames in its Xing or Info header; a last frame that is cut |

Of an mp3 without such a header libsndfile guesses the length by the bit rate at its beginning, and would read a part
alone where that changes. What cannot be known: such an mp3 that breaks off just between two frames; and what was
written to a pipe, where the length is left open, wherever it breaks off. libsndfile itself reads no flac, CAF or RF64
whose length is left open.
"""

import re
from dataclasses import dataclass
from typing import Literal

from lalm_lens.errors import AudioError

ENDLESS = 0x7FFFF000  # and more, of 32 bits: written to a pipe, where nobody knew the length
UNKNOWN = 2**63 - 1  # libsndfile's number of samples where the header does not tell
READ = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "NIST", "OGG", "MP3")  # libsndfile's names
LAST_PAGE = 4  # a flag of Ogg's (RFC 3533)


@dataclass(frozen=True)
class Chunks:
    """How a file is made of chunks: where the first is, how long an identifier and a size are, what is behind a chunk
    until the next, and which one is the sound. A size may be of the whole chunk."""

    first: int
    n_id: int
    n_size: int
    order: Literal["little", "big"]
    multiple: int
    sound: bytes
    of_whole: bool = False

    def end(self, data: bytes) -> int:
        """Where the sound ends, or 0 where that is not told."""
        at, n_head = self.first, self.n_id + self.n_size
        while at + n_head <= len(data):
            size = int.from_bytes(data[at + self.n_id : at + n_head], self.order)
            if data.startswith(self.sound, at):
                is_endless = size >= ENDLESS << 8 * (self.n_size - 4)
                return at + self.size_64(data) if is_endless else at + size + n_head * (not self.of_whole)
            at += size + n_head * (not self.of_whole)
            at += -at % self.multiple
        return 0

    def size_64(self, data: bytes) -> int:
        """RF64 has it in its first chunk."""
        return 8 + int.from_bytes(data[28:36], "little") if data.startswith(b"ds64", 12) else 0


CHUNKS = {
    b"RIFF": Chunks(12, 4, 4, "little", 2, b"data"),
    b"RIFX": Chunks(12, 4, 4, "big", 2, b"data"),
    b"RF64": Chunks(12, 4, 4, "little", 2, b"data"),
    b"FORM": Chunks(12, 4, 4, "big", 2, b"SSND"),
    b"riff": Chunks(40, 16, 8, "little", 8, b"data", of_whole=True),  # Sony's W64
    b"caff": Chunks(8, 4, 8, "big", 1, b"data"),
}
BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b".snd": "big", b"dns.": "little"}  # of au

# Of an mp3: of MPEG 2.5, none, 2 and 1.
SAMPLES = (576, 0, 576, 1152)  # of a frame
RATES_HZ = ((11025, 12000, 8000), (), (22050, 24000, 16000), (44100, 48000, 32000))
KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def check_whole(data: bytes, kind: str, n_read: int, n_frames: int, name: str) -> None:
    """Raise `AudioError` for a file whose end is missing, of which `n_read` samples were read where libsndfile
    expects `n_frames`, and for kinds of which that cannot be said."""
    if kind not in READ:
        raise AudioError(f"{name} is {kind}, where a missing end is not seen. Give a wav, flac, ogg or mp3.")
    data = without_id3(data)
    end = end_of_mp3(data)[0] if kind == "MP3" else end_of_au(data) if kind == "AU" else end_of_chunks(data)
    if end > len(data):
        raise AudioError(f"{name} ends after {len(data)} of {end} bytes. Copy it again.")
    if kind == "OGG" and not has_last_page(data):
        raise AudioError(f"{name} ends before its last page. Copy it again.")
    if kind == "MP3" and not says_length(data):
        check_guess(data, n_read, name)
    elif n_read < (declared := samples_of_nist(data) if kind == "NIST" else n_frames):
        raise AudioError(f"{name} ends after {n_read} of {declared} samples. Copy it again.")


def check_guess(data: bytes, n_read: int, name: str) -> None:
    """Raise `AudioError` for an mp3 of which all was not read; a frame less may be, which holds another header."""
    _, n_samples = end_of_mp3(data)
    if n_read < n_samples - SAMPLES[-1]:
        raise AudioError(
            f"{name} is an mp3 whose bit rate changes and that does not say its length: only {n_read} of {n_samples} "
            "samples can be read. Save it as a wav."
        )


def without_id3(data: bytes) -> bytes:
    """Behind what may be said of a song before it."""
    if not data.startswith(b"ID3") or len(data) < 10:
        return data
    n = sum((byte & 0x7F) << 7 * (3 - at) for at, byte in enumerate(data[6:10]))
    return data[10 + n + 10 * (data[5] >> 4 & 1) :]  # and a footer


def end_of_chunks(data: bytes) -> int:
    chunks = CHUNKS.get(data[:4])
    return 0 if chunks is None else chunks.end(data)


def end_of_au(data: bytes) -> int:
    first, size = (int.from_bytes(data[at : at + 4], BYTE_ORDERS[data[:4]]) for at in (4, 8))
    return 0 if size >= ENDLESS else first + size


def samples_of_nist(data: bytes) -> int:
    told = re.search(rb"^sample_count -i (\d+)", data[:1024], re.MULTILINE)
    return int(told[1]) if told else 0


def has_last_page(data: bytes) -> bool:
    at = flags = 0
    while data.startswith(b"OggS", at) and at + 27 <= len(data):
        flags, n = data[at + 5], data[at + 26]
        at += 27 + n + sum(data[at + 27 : at + 27 + n])
    return at <= len(data) and bool(flags & LAST_PAGE)


def says_length(data: bytes) -> bool:
    """Whether the first frame of an mp3 is a header with the number of frames."""
    first = data[: size_of_frame(data)]
    at = max(first.find(b"Xing"), first.find(b"Info"))
    return 0 <= at < len(first) - 8 and bool(first[at + 7] & 1)


def end_of_mp3(data: bytes) -> tuple[int, int]:
    """Where its last frame ends that follows the others, and of how many samples they are."""
    at = n_samples = 0
    while n := size_of_frame(data, at):
        n_samples += SAMPLES[data[at + 1] >> 3 & 3]
        at += n
    return at, n_samples


def size_of_frame(data: bytes, at: int = 0) -> int:
    """In bytes, of MPEG's layer III; 0 for what is none."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] >> 5 != 7 or head[1] >> 1 & 3 != 1:
        return 0
    version, bits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if not SAMPLES[version] or bits in (0, 15) or rate == 3:
        return 0
    bits_per_s = 1000 * (KBPS_1 if version == 3 else KBPS_2)[bits]
    return SAMPLES[version] // 8 * bits_per_s // RATES_HZ[version][rate] + (head[2] >> 1 & 1)
