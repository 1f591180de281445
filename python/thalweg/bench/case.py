"""What one sample measures."""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import BenchError
from .units import SIZE_MAX, show_size

#: What a listener does at most for a connector.
COUNT_MAX = 100_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    program: str
    backend: str
    #: Names of links with commas, or ``auto``; other backends than thalweg have no choice.
    transport: str
    spin_us: int
    #: ``None``: as each side's environment says.
    single_copy: bool | None
    frames: tuple[int, ...]
    iters: int
    warmup: int
    window: int

    @property
    def size_bytes(self) -> int:
        return sum(self.frames)

    @property
    def has_threads(self) -> bool:
        """Whether the backend works in threads of its own. They and the event loop would wait for
        each other on one core."""
        return self.backend == "ucxx"

    def describe(self) -> str:
        words = [self.program, self.backend]
        if self.backend == "thalweg":
            words += [self.transport, self.wake()]
        return " ".join([*words, show_size(self.size_bytes)])

    def wake(self) -> str:
        return f"spin {self.spin_us} µs" if self.spin_us else "park"

    def limit_s(self) -> float:
        """How long a sample may take, start of its processes included."""
        messages = self.iters + self.warmup
        return 30 + messages * (0.001 + 2 * self.size_bytes / 50e6)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Case:
        """What another program sent; raises :class:`BenchError` if it is no such thing."""
        try:
            case = cls(**{**value, "frames": tuple(value["frames"])})
            texts = (case.program, case.backend, case.transport)
            counts = (case.spin_us, case.iters, case.warmup, case.window, *case.frames)
            good = (
                case.program in ("pingpong", "bandwidth")
                and all(type(text) is str for text in texts)
                and all(type(count) is int and 0 <= count <= COUNT_MAX for count in counts[:4])
                and all(type(count) is int and 0 < count <= SIZE_MAX for count in case.frames)
                and case.iters > 0 and case.window > 0 and 0 < case.size_bytes <= SIZE_MAX
                and (case.single_copy is None or type(case.single_copy) is bool)
            )
        except (TypeError, KeyError) as error:
            raise BenchError(f"not a case of this version of the program: {error}") from None
        if not good:
            raise BenchError("not a case of this version of the program")
        return case
