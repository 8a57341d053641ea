"""A static Linux program for 64-bit ARM: its functions called one by one in an emulated processor (Unicorn)."""

from __future__ import annotations

import struct
from pathlib import Path

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

PAGE = 4096
HEAP, HEAP_SIZE = 0x1_0000_0000, 1 << 30  # of the program: what brk and mmap give
ARENA, ARENA_SIZE = 0x2_0000_0000, 1 << 28  # of the caller: arguments
STACK, STACK_SIZE = 0x3_0000_0000, 1 << 23
RETURN = 0x4_0000_0000

# System calls of Linux on 64-bit ARM that a program of one thread makes as it starts and asks for memory.
IOCTL, SET_TID_ADDRESS, FUTEX, BRK, MUNMAP, MMAP, MADVISE = 29, 96, 98, 214, 215, 222, 233
GET_AFFINITY, SIGPROCMASK, GETTID, MPROTECT = 123, 135, 178, 226
_TRIVIAL = {IOCTL, SET_TID_ADDRESS, FUTEX, MUNMAP, MADVISE, SIGPROCMASK, GETTID, MPROTECT}


class Machine:
    """A program, started as far as ``main``: :meth:`call` runs a function, :meth:`put` and :meth:`get` move bytes."""

    def __init__(self, program: Path) -> None:
        self._uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self._error: str | None = None
        for address, size in ((HEAP, HEAP_SIZE), (ARENA, ARENA_SIZE), (STACK, STACK_SIZE), (RETURN, PAGE)):
            self._uc.mem_map(address, size)
        self._uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vector registers may be used
        self._heap, self._arena = HEAP, ARENA
        self._image = program.read_bytes()
        self.symbols = self._symbols()
        self._uc.hook_add(UC_HOOK_INTR, self._system_call)
        self._run(self._load(), self.symbols["main"])

    def _load(self) -> int:
        """Segments and the stack that a program starts with; returns the entry."""
        entry, headers = struct.unpack_from("<QQ", self._image, 24)
        size, count = struct.unpack_from("<HH", self._image, 54)
        first = 0
        for at in range(headers, headers + count * size, size):
            kind, _, offset, address, _, filed, memory, _ = struct.unpack_from("<IIQQQQQQ", self._image, at)
            if kind != 1:  # PT_LOAD
                continue
            start, end = address // PAGE * PAGE, -(-(address + memory) // PAGE) * PAGE
            mapped = [(a, b) for a, b, _ in self._uc.mem_regions()]
            for page in range(start, end, PAGE):
                if not any(a <= page <= b for a, b in mapped):
                    self._uc.mem_map(page, PAGE)
            self._uc.mem_write(address, self._image[offset : offset + filed])
            first = first or address - offset
        random = STACK + STACK_SIZE - 64
        # argc, argv and environment empty; auxiliary vector: AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_RANDOM, AT_NULL
        auxiliary = (3, first + headers, 4, size, 5, count, 6, PAGE, 25, random, 0, 0)
        words = (0, 0, 0, *auxiliary)
        self._stack = (random - 8 * len(words)) // 16 * 16
        self._uc.mem_write(self._stack, struct.pack(f"<{len(words)}Q", *words))
        self._uc.reg_write(arm.UC_ARM64_REG_SP, self._stack)
        return int(entry)

    def _symbols(self) -> dict[str, int]:
        (offset,) = struct.unpack_from("<Q", self._image, 40)
        size, count = struct.unpack_from("<HH", self._image, 58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", self._image, offset + i * size) for i in range(count)]
        table = next(s for s in sections if s[1] == 2)  # SHT_SYMTAB
        names = sections[table[6]][4]
        found = {}
        for at in range(table[4], table[4] + table[5], 24):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", self._image, at)
            begin = names + name
            found[self._image[begin : self._image.index(b"\0", begin)].decode()] = value
        return found

    def _system_call(self, uc: Uc, exception: int, _: object) -> None:
        number = uc.reg_read(arm.UC_ARM64_REG_X8)
        first, second = uc.reg_read(arm.UC_ARM64_REG_X0), uc.reg_read(arm.UC_ARM64_REG_X1)
        result = 0
        if exception != 2:  # not a system call: an instruction that this processor has not, or memory that is not there
            self._error = f"exception {exception} at {uc.reg_read(arm.UC_ARM64_REG_PC):#x}"
            uc.emu_stop()
        elif number == BRK:
            result = HEAP  # nothing: the C library asks by mmap then
        elif number == MMAP:
            result, self._heap = self._heap, self._heap + -(-second // PAGE) * PAGE
            if self._heap > HEAP + HEAP_SIZE:
                self._error = "the emulated heap is full"
                uc.emu_stop()
        elif number == GET_AFFINITY:  # one processor
            uc.mem_write(uc.reg_read(arm.UC_ARM64_REG_X2), struct.pack("<Q", 1))
            result = 8
        elif number not in _TRIVIAL:
            self._error = f"system call {number}, first argument {first}"
            uc.emu_stop()
        uc.reg_write(arm.UC_ARM64_REG_X0, result)

    def _run(self, start: int, until: int) -> None:
        self._uc.emu_start(start, until)
        if self._error:
            raise RuntimeError(f"the emulated program stopped: {self._error}")

    def call(self, function: str, *arguments: int) -> None:
        """Run a function of up to eight integers or addresses."""
        for i, argument in enumerate(arguments):
            self._uc.reg_write(arm.UC_ARM64_REG_X0 + i, argument)
        self._uc.reg_write(arm.UC_ARM64_REG_SP, self._stack)
        self._uc.reg_write(arm.UC_ARM64_REG_X30, RETURN)
        self._run(self.symbols[function], RETURN)

    def put(self, data: bytes) -> int:
        """Bytes to fresh memory of the arena; its address, a multiple of 64."""
        address = self._arena
        self._arena = address + -(-max(1, len(data)) // 64) * 64
        assert self._arena <= ARENA + ARENA_SIZE, "the emulated arena is full"
        self._uc.mem_write(address, data)
        return address

    def get(self, address: int, size: int) -> bytes:
        return bytes(self._uc.mem_read(address, size))

    def free_all(self) -> None:
        """Of the arena."""
        self._arena = ARENA
