"""What the packets of a video say of their pictures: which can be decoded without earlier ones, and in which
order they are shown. Only for streams of which that is sure; anything else raises Unsure."""

import re
from collections.abc import Iterator

import av
from av.bitstream import BitStreamFilterContext

# Kinds of packets. After one that STARTS, nothing needs an earlier one; after one that OPENS, only pictures
# shown before it may. One that is HIDDEN is not shown, but others can refer to it.
HIDDEN, FOLLOWS, OPENS, STARTS = range(4)


class Unsure(Exception):
    """Decoding from the middle might give other frames than decoding from the start."""


def require(sure: bool) -> None:
    if not sure:
        raise Unsure


def codec_of(stream: av.VideoStream) -> 'InOrder | H264 | Hevc':
    """What reads the packets of a stream: `look(packet)` gives a packet's kind and, to sort pictures by, its
    sequence and its place in there. A decoder `can_skip` pictures that nothing refers to, and holds back as
    many as `can_wait` until those to be shown before have come."""
    name = stream.codec_context.codec.canonical_name
    extradata = bytes(stream.codec_context.extradata or b'')
    if name in ('vp8', 'vp9', 'av1'):
        return InOrder(name, stream)
    require(name in ('h264', 'hevc') and extradata[:1] == b'\1')  # as MP4 and Matroska have it
    return H264(Bits(extradata)) if name == 'h264' else Hevc(Bits(extradata))


class InOrder:
    """VP8, VP9 and AV1: pictures are shown in the order of the file."""

    can_skip, can_wait = False, 0

    def __init__(self, name: str, stream: av.VideoStream):
        self.name, self.count, self.header = name, 0, b''
        if name != 'vp8':
            splitter = {'vp9': 'vp9_superframe_split', 'av1': 'av1_frame_split'}[name]
            self.splitter = BitStreamFilterContext(splitter, stream)

    def look(self, packet: av.Packet) -> tuple[int, tuple[int, int]]:
        data, self.count = bytes(packet), self.count + 1
        if self.name == 'vp8' and not data[0] & 16:
            return HIDDEN, (0, self.count)
        if self.name != 'vp8':
            copy = av.Packet(data)
            copy.pts = 0  # of the pictures that it is split into, those that are not shown get no time
            require(sum(picture.pts is not None for picture in self.splitter.filter(copy)) == 1)
        if not packet.is_keyframe:
            return FOLLOWS, (0, self.count)
        # The part of a key frame that has its size. In AV1 a unit of type 1 begins it, and has its length.
        require(self.name != 'av1' or data[0] >> 3 == 1)
        header = {'vp8': data[6:10], 'vp9': data[:9], 'av1': data[: 2 + data[1]]}[self.name]
        require(self.header in (b'', header))  # one size
        self.header = header
        return STARTS, (0, self.count)


class H264:
    can_skip = True

    def __init__(self, record: 'Bits'):
        record.take(38)
        self.prefix = record.take(2) + 1  # bytes of a unit's length
        record.take(3)
        sequences = [record.unit() for _ in range(record.take(5))]
        self.parameters = sequences + [record.unit() for _ in range(record.take(8))]
        require(len(sequences) == 1)
        self._read_sequence(Bits(payload(sequences[0][1:])))

    def _read_sequence(self, bits: 'Bits') -> None:
        profile = bits.take(8)
        # Baseline, Main, High, High 10, High 4:2:2. How 4:4:4 is decoded depends on the x264 version.
        require(profile in (66, 77, 100, 110, 122))
        bits.take(16)  # constraints, level
        bits.unsigned()  # its number
        if profile >= 100:
            require(bits.unsigned() < 3)  # 4:4:4 again
            bits.unsigned(2)  # depths
            require(bits.take(2) == 0)  # lossless, own matrices (they are long)
        self.frame_num_bits, self.next_frame_num = bits.unsigned() + 4, 0
        order = bits.unsigned()
        require(order in (0, 2))  # by a count, or as decoded; one that is rare has a table
        self.order = Order(bits.unsigned() + 4 if order == 0 else 0)
        bits.unsigned()  # references
        require(bits.take(1) == 0)  # frame_num may skip some
        bits.unsigned(2)  # width, height
        require(bits.take(1) == 1)  # no fields
        bits.take(1)
        if bits.take(1):  # cropping
            bits.unsigned(4)
        self.can_wait = self._read_usability(bits) if bits.take(1) else 0

    def _read_usability(self, bits: 'Bits') -> int:
        """How many pictures can wait; 0 if it is not said, as libavcodec then learns it too late."""
        if bits.take(1) and bits.take(8) == 255:  # shape of pixels
            bits.take(32)
        if bits.take(1):  # overscan
            bits.take(1)
        if bits.take(1) and bits.take(5) & 1:  # format and range, colours
            bits.take(24)
        if bits.take(1):  # place of chroma
            bits.unsigned(2)
        if bits.take(1):  # timing
            bits.take(65)
        if bits.take(2) or not bits.take(2) & 1:  # models of buffers (they are long), or no restrictions
            return 0
        bits.take(1)
        return bits.unsigned(5)

    def look(self, packet: av.Packet) -> tuple[int, tuple[int, int]]:
        """A key frame that is not an IDR picture can be followed by pictures that need earlier ones."""
        picture = None
        for unit in units(packet, self.prefix):
            type = unit[0] & 31
            require(type not in (7, 8) or bytes(unit) in self.parameters)  # new ones
            require(type != 6 or harmless(unit[1:]))
            if type in (1, 5):  # a slice; its first bit says whether a picture begins
                require((unit[1] >> 7) == (picture is None))
                if picture is None:
                    picture = unit
        require(picture is not None)
        is_idr, is_kept = picture[0] & 31 == 5, picture[0] & 96 > 0
        bits = Bits(payload(picture[1:25]))
        bits.unsigned(3)
        frame_num = bits.take(self.frame_num_bits)
        require(frame_num == (0 if is_idr else self.next_frame_num))  # else one that others need is lost
        self.next_frame_num = (frame_num + is_kept) % 2**self.frame_num_bits
        if is_idr:
            bits.unsigned()
        return STARTS if is_idr else FOLLOWS, self.order.of(bits.take(self.order.bits), is_idr, is_kept)


class Hevc:
    can_skip = True

    def __init__(self, record: 'Bits'):
        record.take(174)
        self.prefix, self.parameters = record.take(2) + 1, []
        for _ in range(record.take(8)):
            record.take(8)  # their type
            self.parameters += [record.unit() for _ in range(record.take(16))]
        sequences, pictures, messages = (
            [unit[2:] for unit in self.parameters if unit[0] >> 1 == type] for type in (33, 34, 39)
        )
        require(len(sequences) == 1 and all(map(harmless, messages)))
        self._read_sequence(Bits(payload(sequences[0])))
        for unit in pictures:
            bits = Bits(payload(unit))
            bits.unsigned(2)
            require(bits.take(5) & 15 == 0)  # some are not shown, more bits in slices

    def _read_sequence(self, bits: 'Bits') -> None:
        bits.take(4)
        require(bits.take(3) == 0)  # more temporal layers, in which it is not as clear what can be skipped
        bits.take(97)  # profile, level
        bits.unsigned()  # its number
        require(bits.unsigned() < 3)  # 4:4:4
        bits.unsigned(2)  # width, height
        if bits.take(1):  # cropping
            bits.unsigned(4)
        bits.unsigned(2)  # depths
        self.order = Order(bits.unsigned() + 4)
        bits.take(1)
        bits.unsigned()  # pictures in memory
        self.can_wait = bits.unsigned()

    def look(self, packet: av.Packet) -> tuple[int, tuple[int, int]]:
        picture = None
        for unit in units(packet, self.prefix):
            type = unit[0] >> 1
            if unit[0] & 1 or unit[1] > 7:  # of another layer
                continue
            require(type not in (32, 33, 34) or bytes(unit) in self.parameters)
            require(type != 39 or harmless(unit[2:]))
            require(type not in (36, 37))  # the end of a sequence
            if type < 32:
                require((unit[2] >> 7) == (picture is None))
                if picture is None:
                    picture = unit
        require(picture is not None)
        type, bits = picture[0] >> 1, Bits(payload(picture[2:26]))
        require(type < 10 or type in (19, 20, 21))  # an IDR picture: 19, 20; a CRA picture: 21
        bits.take(1)
        require(type < 10 or bits.take(1) == 0)  # earlier ones may not be shown
        bits.unsigned(2)
        is_idr, is_kept = type in (19, 20), type in (1, 3, 5) or type > 9
        low = 0 if is_idr else bits.take(self.order.bits)
        kind = {19: STARTS, 20: STARTS, 21: OPENS}.get(type, FOLLOWS)
        return kind, self.order.of(low, is_idr, is_kept)


class Order:
    """When pictures are shown. Each has the low bits of a count; with 0 bits, they are shown as decoded."""

    def __init__(self, bits: int):
        self.bits, self.size = bits, 2**bits
        self.sequence = self.last = 0

    def of(self, low: int, is_idr: bool, is_kept: bool) -> tuple[int, int]:
        """The sequence, which an IDR picture begins, and the count that is nearest to the last kept one's."""
        if is_idr:
            self.sequence, self.last = self.sequence + 1, 0
        half = self.size // 2
        count = self.last + (low - self.last + half - 1) % self.size - half + 1  # with 0 bits the next one
        if is_kept or not self.bits:
            self.last = count
        return self.sequence, count


class Bits:
    """Reads a header bit by bit; its end raises Unsure."""

    def __init__(self, data: bytes):
        self.number, self.left = int.from_bytes(data, 'big'), 8 * len(data)

    def take(self, count: int) -> int:
        """A whole number of `count` bits."""
        self.left -= count
        require(self.left >= 0)
        taken = self.number >> self.left
        self.number -= taken << self.left
        return taken

    def unsigned(self, count: int = 1) -> int:
        """The last of `count` Exp-Golomb codes: n zeros, then the number plus 1 in n + 1 bits."""
        for _ in range(count):
            zeros = self.left - self.number.bit_length()
            self.take(zeros)
            number = self.take(zeros + 1) - 1
        return number

    def long(self) -> int:
        """The sum of bytes up to one that is not 255."""
        byte = self.take(8)
        return byte if byte < 255 else 255 + self.long()

    def unit(self) -> bytes:
        """Bytes that follow their length in two bytes."""
        size = self.take(16)
        return self.take(8 * size).to_bytes(size, 'big')


def units(packet: av.Packet, prefix: int) -> Iterator[memoryview]:
    """The units of H.264 or HEVC in a packet, each after its length in `prefix` bytes."""
    data, at = memoryview(packet), 0
    while at + prefix < len(data):
        size = int.from_bytes(data[at : at + prefix], 'big')
        if size:
            yield data[at + prefix : at + prefix + size]
        at += prefix + size


def payload(unit: bytes | memoryview) -> bytes:
    """Without the bytes that keep it from looking like a start code."""
    return bytes(unit).replace(b'\0\0\3', b'\0\0')


# Messages (SEI) of buffers, times, captions or HDR10+, notes, recovery, parameters, brightness and colours
HARMLESS = (0, 1, 4, 5, 6, 129, 136, 137, 144, 147)


def harmless(unit: bytes | memoryview) -> bool:
    """Whether none of a unit's messages changes pixels, as film grain or a rotation does."""
    bits = Bits(payload(unit))
    while bits.left > 16:  # the last byte ends the unit
        kind, size = bits.long(), bits.long()
        bits.take(8 * size)
        if kind not in HARMLESS:
            return False
    x264 = re.search(rb'x264 - core (\d+)', unit)
    if x264 and int(x264[1]) <= 33:  # libavcodec repeats its mistakes, if it has seen this note
        return False
    return b'\xb5\x58\x90' not in unit  # no film grain of AV1's kind
