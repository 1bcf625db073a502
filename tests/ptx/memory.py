"""Memory behind real and made-up addresses, bounds-checked, and what may go wrong there."""

import bisect
import ctypes

import numpy as np

from .syntax import PtxError

u64 = np.uint64
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 56, 2 << 56, 3 << 56  # generic addresses of the other state spaces
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


class Fault(Exception):
    """Something went wrong in one thread; ``lane`` counts within the threads that took part."""

    def __init__(self, message, lane=0):
        super().__init__(message)
        self.message, self.lane = message, lane


def element(size, count):
    """A row of ``count`` numbers of ``size`` bytes."""
    return UNSIGNED[size], count


class Dense:
    """An array of bytes at an address."""

    def __init__(self, data, address, name, writable=True, owner=None):
        self.data, self.address, self.name, self.writable, self.owner = data, address, name, writable, owner
        self.size = len(data)
        self._views = {}

    def view(self, size, count):
        """(rows, address of the first, largest offset) of aligned rows."""
        found = self._views.get((size, count))
        if found is None:
            total = size * count
            start = -(-self.address // total) * total
            rows = max(0, (self.address + self.size - start) // total)
            skip = start - self.address
            flat = self.data[skip:skip + rows * total].view(UNSIGNED[size])
            flat = flat.reshape(rows, count) if count > 1 else flat
            found = self._views[(size, count)] = (flat, u64(start), (rows - 1) * total, total - 1, u64(total.bit_length() - 1))
        return found

    def locate(self, addresses, size, count):
        """Indices of rows, or None if an address is misaligned or outside."""
        rows, start, limit, mask, shift = self.view(size, count)
        offsets = addresses - start
        if offsets.ndim == 0:
            at = int(offsets)
            return at >> int(shift) if at <= limit and not at & mask else None
        if offsets.size and (int(np.maximum.reduce(offsets)) > limit or int(np.bitwise_or.reduce(offsets)) & mask):
            return None
        return (offsets >> shift).view(np.int64)

    def gather(self, addresses, size, count):
        at = self.locate(addresses, size, count)
        return None if at is None else self.view(size, count)[0][at]

    def scatter(self, addresses, values, size, count):
        at = self.locate(addresses, size, count)
        if at is None:
            return False
        self.view(size, count)[0][at] = values
        return True

    def read(self, address, n):
        at = address - self.address
        return self.data[at:at + n].tobytes()

    def write(self, address, data):
        at = address - self.address
        self.data[at:at + len(data)] = np.frombuffer(data, np.uint8)


class Sparse:
    """A range of any size whose pages exist from the first touch on."""

    PAGE = 1 << 16

    def __init__(self, address, size, name, fill):
        self.address, self.size, self.name, self.fill, self.writable = address, size, name, fill, True
        self.pages = {}
        self.owner = None

    def _page(self, number):
        page = self.pages.get(number)
        if page is None:
            data = np.full(self.PAGE, self.fill, np.uint8)
            page = self.pages[number] = Dense(data, number * self.PAGE, self.name)
        return page

    def _parts(self, addresses, total):
        """(page, which addresses) of all pages touched, or None."""
        addresses = np.atleast_1d(addresses)
        offsets = addresses - u64(self.address)
        if offsets.size and (int(offsets.max()) > self.size - total or int(np.bitwise_or.reduce(addresses)) & (total - 1)):
            return None
        numbers = addresses // u64(self.PAGE)
        return [(self._page(int(n)), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]

    def gather(self, addresses, size, count):
        parts = self._parts(addresses, size * count)
        if parts is None:
            return None
        flat = np.atleast_1d(addresses)
        out = np.empty((len(flat), count) if count > 1 else len(flat), UNSIGNED[size])
        for page, which in parts:
            out[which] = page.gather(flat[which], size, count)
        return out[0] if addresses.ndim == 0 else out

    def scatter(self, addresses, values, size, count):
        parts = self._parts(addresses, size * count)
        if parts is None:
            return False
        flat = np.atleast_1d(addresses)
        values = np.broadcast_to(values, (len(flat), count) if count > 1 else len(flat))
        for page, which in parts:
            page.scatter(flat[which], values[which], size, count)
        return True

    def _pieces(self, address, n):
        while n > 0:
            page = self._page(address // self.PAGE)
            take = min(n, page.address + self.PAGE - address)
            yield page, address, take
            address, n = address + take, n - take

    def read(self, address, n):
        return b"".join(page.read(at, take) for page, at, take in self._pieces(address, n))

    def write(self, address, data):
        done = 0
        for page, at, take in self._pieces(address, len(data)):
            page.write(at, data[done:done + take])
            done += take


def _bytes_of(source):
    """(uint8 view, address, owner) of a NumPy array, a tensor or a storage."""
    if isinstance(source, np.ndarray):
        if source.size == 0:
            return np.empty(0, np.uint8), source.__array_interface__["data"][0], source
        if not source.flags.c_contiguous:
            raise ValueError(f"an array of shape {source.shape} with strides {source.strides}: contiguous arrays are mapped")
        return source.reshape(-1).view(np.uint8), source.__array_interface__["data"][0], source
    storage = source.untyped_storage() if hasattr(source, "untyped_storage") else source
    address, size = storage.data_ptr(), storage.nbytes()
    if size == 0:
        return np.empty(0, np.uint8), address, storage
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8), address, storage


class Memory:
    """What global addresses lead to."""

    def __init__(self):
        self.ranges, self._starts, self.modules = [], [], {}

    def _add(self, new):
        if new.size == 0:
            return
        i = bisect.bisect_right(self._starts, new.address)
        for other in self.ranges[max(0, i - 1):i + 1]:
            if other.address < new.address + new.size and new.address < other.address + other.size:
                inside = other.address <= new.address and new.address + new.size <= other.address + other.size
                if inside and isinstance(other, Dense) and isinstance(new, Dense) and new.owner is not None:
                    if np.shares_memory(other.data, new.data):
                        return
                raise ValueError(f"{new.name} at {new.address:#x} overlaps {other.name} at {other.address:#x}")
        self.ranges.insert(i, new)
        self._starts.insert(i, new.address)

    def map(self, source, address=None, name="memory", writable=True):
        """A NumPy array, tensor or storage (all of a tensor's storage) under its own or a given address, which is returned."""
        data, own, owner = _bytes_of(source)
        writable = writable and data.flags.writeable
        self._add(Dense(data, own if address is None else address, name, writable, owner if address is None else None))
        return own if address is None else address

    def sparse(self, address, size, name="sparse", fill=0):
        """``size`` bytes of ``fill`` at a made-up address; pages are allocated as they are touched. Returns the range."""
        new = Sparse(address, size, name, fill)
        self._add(new)
        return new

    def _find(self, address):
        i = bisect.bisect_right(self._starts, address) - 1
        if i >= 0 and address < self.ranges[i].address + self.ranges[i].size:
            return self.ranges[i]
        return None

    def _whole(self, address, n):
        found = self._find(address)
        if found is None or address + n > found.address + found.size:
            raise PtxError(f"{n} bytes at {address:#x} are outside of {self.names()}")
        return found

    def read(self, address, n):
        return self._whole(address, n).read(address, n)

    def write(self, address, data):
        self._whole(address, len(data)).write(address, bytes(data))

    def names(self):
        found = ", ".join(f"{r.name} [{r.address:#x}, {r.address + r.size:#x})" for r in self.ranges)
        return found or "all memory: none is mapped"

    def _explain(self, address, total, writes):
        """Why an access is wrong, or None."""
        if address % total:
            return f"misaligned: {total} bytes at address {address:#x}"
        found = self._find(address)
        if found is None or address + total > found.address + found.size:
            distance = lambda r: min(abs(address - r.address), abs(address - r.address - r.size))  # noqa: E731
            near = found or min(self.ranges, key=distance, default=None)
            where = "no memory is mapped" if near is None else (
                f"the nearest is {near.name} [{near.address:#x}, {near.address + near.size:#x})")
            return f"out of bounds: {total} bytes at address {address:#x}; {where}"
        if writes and not found.writable:
            return f"{found.name} is read-only: {total} bytes at address {address:#x}"
        return None

    def _check(self, addresses, total, writes):
        """Raises Fault for a wrong address; otherwise [(range, which)]."""
        flat = np.atleast_1d(addresses)
        numbers = np.searchsorted(np.array(self._starts, u64), flat, side="right") - 1 if self._starts else np.full(len(flat), -1)
        parts = []
        for number in np.unique(numbers):
            which = np.flatnonzero(numbers == number)
            r = self.ranges[number] if number >= 0 else None
            at = flat[which]
            if r is None or int(at.max()) + total > r.address + r.size or int(np.bitwise_or.reduce(at)) & (total - 1) or (
                    writes and not r.writable):
                for lane in which:
                    message = self._explain(int(flat[lane]), total, writes)
                    if message:
                        raise Fault(message, int(lane))
            parts.append((r, which))
        return parts

    def load(self, site, addresses, size, count):
        """Rows at the addresses. site: a list of one that remembers the range."""
        r = site[0]
        if r is not None:
            out = r.gather(addresses, size, count)
            if out is not None:
                return out
        site[0] = r = self._find(int(addresses if addresses.ndim == 0 else addresses[0]))
        if r is not None:
            out = r.gather(addresses, size, count)
            if out is not None:
                return out
        parts = self._check(addresses, size * count, False)
        out = np.empty((len(addresses), count) if count > 1 else len(addresses), UNSIGNED[size])
        for r, which in parts:
            out[which] = r.gather(addresses[which], size, count)
        return out

    def store(self, site, addresses, values, size, count):
        r = site[0]
        if r is not None and r.scatter(addresses, values, size, count):
            return
        r = self._find(int(addresses if addresses.ndim == 0 else addresses[0]))
        if r is not None and r.writable and r.scatter(addresses, values, size, count):
            site[0] = r
            return
        parts = self._check(addresses, size * count, True)
        values = np.broadcast_to(values, (len(addresses), count) if count > 1 else len(addresses))
        for r, which in parts:
            r.scatter(addresses[which], values[which], size, count)

    def module(self, module):
        """{name: address} of a module's global and constant variables, made at the first launch."""
        found = self.modules.get(id(module))
        if found is None:
            addresses = {}
            for v in module.variables:
                if v.space in ("global", "const") and not v.external:
                    padded = np.zeros(v.size + v.align, np.uint8)
                    skip = -padded.__array_interface__["data"][0] % v.align
                    data = padded[skip:skip + v.size]
                    data[:len(v.initial)] = np.frombuffer(v.initial, np.uint8)
                    addresses[v.name] = self.map(data, name=v.name, writable=v.space == "global")
            found = self.modules[id(module)] = (addresses, module)
        return found[0]
