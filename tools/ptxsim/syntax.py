"""The syntax tree of PTX: operands, instructions, variables, functions, modules."""

from dataclasses import dataclass, field

TYPE_SIZES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "e4m3": 1,
    "e5m2": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
    "texref": 8,
    "samplerref": 8,
    "surfref": 8,
}


# ---------------------------------------------------------------- operands
@dataclass(frozen=True)
class Reg:
    """A virtual register, by its scoped name."""

    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate; ``kind`` is 'i', 'f' (f32 bits) or 'd' (f64 bits)."""

    value: int
    kind: str = "i"


@dataclass(frozen=True)
class Sym:
    """A variable, function or label name."""

    name: str


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Addr:
    """``[base + off]``; ``extra`` holds tensor coordinates, if any."""

    base: object
    off: int = 0
    extra: tuple = None


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """``p|q`` destination of setp, shfl, elect."""

    a: object
    b: object


@dataclass(frozen=True)
class Not:
    """``!p`` source predicate."""

    reg: object


SINK = Sym("_")


@dataclass
class Ins:
    """One decoded instruction."""

    op: str
    mods: tuple
    ops: list
    pred: object  # None or (Reg, negated)
    line: int
    loc: tuple  # (file index, line) or None
    text: str
    name: str = ""  # op with all modifiers

    def __post_init__(self):
        self.name = ".".join((self.op, *self.mods))
        self.modset = frozenset(self.mods)


@dataclass
class Var:
    """A declared variable in some state space."""

    name: str
    space: str
    type: str
    align: int
    size: int  # bytes; 0 for extern []
    count: int = 1
    init: list = None  # list of ints / (sym, off) / float bits, or None
    extern: bool = False


@dataclass
class Function:
    """A kernel (``entry``) or device function."""

    name: str
    entry: bool
    params: list = field(default_factory=list)
    rets: list = field(default_factory=list)
    regs: dict = field(default_factory=dict)  # scoped name -> type
    vars: dict = field(default_factory=dict)  # scoped name -> Var (local/shared/param)
    body: list = field(default_factory=list)  # Ins | ('label', name)
    attrs: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)  # .branchtargets lists
    declared_only: bool = False


@dataclass
class PtxModule:
    """A parsed translation unit."""

    text: str
    version: str = ""
    target: str = ""
    files: dict = field(default_factory=dict)
    globals: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)
