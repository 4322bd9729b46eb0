"""What the packets of a video say of their pictures: where decoding can begin, and the order of showing them.
Only for streams of which that is sure; anything else raises Unsure."""

import re
from collections.abc import Iterator

import av
from av.bitstream import BitStreamFilterContext


class Unsure(Exception):
    """Decoding from the middle might give other frames than decoding from the start."""


def require(sure: bool) -> None:
    if not sure:
        raise Unsure


def codec_of(stream: av.VideoStream) -> 'InOrder | H264 | Hevc':
    """What reads the packets of a stream, each of which must be one picture that is shown.

    `look(packet)` gives whether decoding can begin there, and what to sort pictures by. If it can, then only
    those shown before this picture may need earlier ones. `skip` is what the decoder may leave out: where it
    is sure, pictures that nothing refers to.
    """
    name = stream.codec_context.codec.canonical_name
    if name in ('vp8', 'vp9', 'av1'):
        return InOrder(name, stream)
    extradata = bytes(stream.codec_context.extradata or b'')
    require(name in ('h264', 'hevc') and extradata[:1] == b'\1')  # as MP4 and Matroska have it
    return H264(extradata) if name == 'h264' else Hevc(extradata)


class InOrder:
    """VP8, VP9 and AV1: pictures are shown in the order of the file."""

    skip = 'DEFAULT'

    def __init__(self, name: str, stream: av.VideoStream):
        self.name, self.count = name, 0
        splitters = {'vp8': 'null', 'vp9': 'vp9_superframe_split', 'av1': 'av1_frame_split'}
        self.splitter = BitStreamFilterContext(splitters[name], stream)

    def look(self, packet: av.Packet) -> tuple[bool, int]:
        data, self.count = bytes(packet), self.count + 1
        copy = av.Packet(data)
        copy.pts = 0  # any time
        # A packet may hold several pictures. The splitter gives its time only to those that are shown.
        require(sum(picture.pts is not None for picture in self.splitter.filter(copy)) == 1)
        require(self.name != 'vp8' or data[0] & 16 > 0)  # shown
        # A key frame of AV1 needs its sequence header, a unit of type 1.
        require(self.name != 'av1' or not packet.is_keyframe or data[0] >> 3 == 1)
        return packet.is_keyframe, self.count


class Units:
    """H.264 and HEVC: a packet is units, each after its length. Slices among them make up a picture."""

    skip = 'NONREF'
    order_bits = sequence = last = 0  # see `order`

    def look(self, packet: av.Packet) -> tuple[bool, tuple[int, int]]:
        picture = None
        for unit in units(packet, self.prefix):
            type, content = self.type_of(unit), unit[self.header :]
            if type in self.parameters:  # in the file's header as well, after a length of two bytes
                require(len(unit).to_bytes(4, 'big')[2:] + bytes(unit) in self.extradata)
            if type == self.message:
                require(harmless(content))
            if type in self.slices:
                require((content[0] >> 7) == (picture is None))  # its first bit: a picture begins
                if picture is None:
                    picture = unit
        require(picture is not None)
        return self.look_at_slice(picture)

    def order(self, low: int, is_idr: bool, is_kept: bool) -> tuple[int, int]:
        """The sequence, which an IDR picture begins, and the count in there by which pictures are shown.

        A slice has its `low` bits only. It is the nearest one to the count of the last picture that was kept
        to be referred to. With 0 bits, pictures are shown as they are decoded.
        """
        if is_idr:
            self.sequence, self.last = self.sequence + 1, 0
        require(self.sequence > 0)  # pictures that follow another beginning may be dropped
        size = 2**self.order_bits
        step = (low - self.last) % size  # to the next count that ends in these bits
        if step > size // 2:  # the last one that does is nearer
            step -= size
        count = self.last + (step if self.order_bits else 1)
        if is_kept or self.order_bits == 0:
            self.last = count
        return self.sequence, count


class H264(Units):
    header, slices, parameters, message = 1, (1, 5), (7, 8), 6

    def __init__(self, extradata: bytes):
        self.extradata, self.prefix = extradata, extradata[4] % 4 + 1
        require(extradata[5] & 31 == 1)  # one sequence; its length and type follow
        bits = Bits(payload(extradata[9:]))
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
        kind = bits.unsigned()
        require(kind in (0, 2))  # a count, or as decoded; 1, which is rare, has a table
        if kind == 0:
            self.order_bits = bits.unsigned() + 4
        bits.unsigned()  # references
        require(bits.take(1) == 0)  # frame_num may skip some
        bits.unsigned(2)  # width, height
        require(bits.take(1) == 1)  # no fields

    def type_of(self, unit: memoryview) -> int:
        return unit[0] & 31

    def look_at_slice(self, unit: memoryview) -> tuple[bool, tuple[int, int]]:
        """A key frame that is not an IDR picture can be followed by pictures that need earlier ones."""
        is_idr, is_kept = self.type_of(unit) == 5, unit[0] & 96 > 0
        bits = Bits(payload(unit[1:25]))
        bits.unsigned(3)
        frame_num = bits.take(self.frame_num_bits)
        require(frame_num == (0 if is_idr else self.next_frame_num))  # else one that others need is lost
        self.next_frame_num = (frame_num + is_kept) % 2**self.frame_num_bits
        if is_idr:
            bits.unsigned()
        return is_idr, self.order(bits.take(self.order_bits), is_idr, is_kept)


class Hevc(Units):
    header, slices, parameters, message = 2, range(32), (32, 33, 34), 39

    def __init__(self, extradata: bytes):
        self.extradata, self.prefix = extradata, extradata[21] % 4 + 1
        record = Bits(extradata[22:])
        for _ in range(record.take(8)):
            type = record.take(8) & 63
            for _ in range(record.take(16)):
                size = record.take(16)
                content = record.take(8 * size).to_bytes(size, 'big')[2:]
                bits = Bits(payload(content))
                if type == 33:
                    self._read_sequence(bits)
                elif type == 34:
                    bits.unsigned(2)
                    require(bits.take(5) & 15 == 0)  # some are not shown, more bits in slices
                elif type == 39:
                    require(harmless(content))

    def _read_sequence(self, bits: 'Bits') -> None:
        require(self.order_bits == 0)  # the only one
        bits.take(4)
        require(bits.take(3) == 0)  # more temporal layers, in which it is not as clear what can be skipped
        bits.take(97)  # profile, level
        bits.unsigned()  # its number
        require(bits.unsigned() < 3)  # 4:4:4
        bits.unsigned(2)  # width, height
        if bits.take(1):  # cropping
            bits.unsigned(4)
        bits.unsigned(2)  # depths
        self.order_bits = bits.unsigned() + 4
        require(self.order_bits <= 16)  # more is damage, and 2 to its power would fill the memory

    def type_of(self, unit: memoryview) -> int:
        require(unit[0] & 1 == 0 and unit[1] < 8)  # one layer
        require(unit[0] >> 1 not in (36, 37))  # the end of a sequence
        return unit[0] >> 1

    def look_at_slice(self, unit: memoryview) -> tuple[bool, tuple[int, int]]:
        """Decoding can begin at an IDR picture (19, 20) or a CRA picture (21)."""
        type, bits = self.type_of(unit), Bits(payload(unit[2:26]))
        is_idr, is_key = type in (19, 20), type in (19, 20, 21)
        require(is_key or type < 10)
        bits.take(1)
        require(not is_key or bits.take(1) == 0)  # earlier ones may not be shown
        bits.unsigned(2)
        low = 0 if is_idr else bits.take(self.order_bits)
        return is_key, self.order(low, is_idr, is_key or type in (1, 3, 5))


class Bits:
    """Reads a header bit by bit; its end raises Unsure."""

    def __init__(self, data: bytes):
        require(len(data) < 10_000)  # each number taken copies what is left
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
            number = self.take(2 * zeros + 1) - 1
        return number


def units(packet: av.Packet, prefix: int) -> Iterator[memoryview]:
    """The units of H.264 or HEVC in a packet, each after its length in `prefix` bytes."""
    data, at = memoryview(packet), 0
    while at + prefix < len(data):
        size = int.from_bytes(data[at : at + prefix], 'big')
        yield data[at + prefix : at + prefix + size]
        at += prefix + size


def payload(unit: bytes | memoryview) -> bytes:
    """Without the bytes that keep it from looking like a start code."""
    return bytes(unit).replace(b'\0\0\3', b'\0\0')


# Messages (SEI) of buffers, times, captions or HDR10+, notes, recovery, parameters, brightness and colours
HARMLESS = (0, 1, 4, 5, 6, 129, 136, 137, 144, 147)


def harmless(unit: bytes | memoryview) -> bool:
    """Whether none of a unit's messages changes pixels, as a rotation does.

    Film grain of AV1's kind hides among captions. libavcodec repeats mistakes of x264 before 34 and 151 after
    its note; builds before 100 are rare.
    """
    bits = Bits(payload(unit))
    while bits.left > 16:  # the last byte ends the unit
        kind, size, byte = bits.take(8), 0, 255
        while byte == 255:  # more follow
            byte = bits.take(8)
            size += byte
        bits.take(8 * size)
        if kind not in HARMLESS:
            return False
    return re.search(rb'\xb5\x58\x90|x264 - core (?!1\d\d)', unit) is None
