"""Typesets the formulas of docstrings: plain text in the literature's notation becomes MathML, which browsers draw.

``y = W x + b + scaling * B A x`` needs no program in the page, and reads the same in ``help()`` and on paper. What is
not mathematics (words, code between backticks) stays text, so that a line of both may be broken anywhere.
"""

import html
import re
from dataclasses import dataclass

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "mu": "μ", "omega": "ω", "rho": "ρ", "sigma": "σ",
    "theta": "θ",
}  # fmt: skip
# names that are no words of a sentence; others are functions only where they are called
UPRIGHT = {"FFN", "LN", "loss", "lr", "scaling", "sqrt"}
# what stands before an underscore in a formula; other long names with one are names in code
STEMS = {"block", "lora", "loss", "max", "mean", "noise", "start", "sum"}
RELATIONS = {"=": "=", "<-": "←", "->": "→", "~": "∼", "<=": "≤", ">=": "≥", "<": "<", ">": ">"}
OPERATORS = {"+": "+", "-": "−", "*": "⋅", "/": "/", "kron": "⊗", ".": "⋅", "...": "…"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
TOKEN = re.compile(
    r"(?P<code>``.*?``|`[^`]*`|\"[^\"]*\")"
    r"|(?P<space>\s+)"
    r"|(?P<words>[A-Za-z]{2,}'s|[A-Za-z]+(?:-[a-z]+)+|(?<=[\s(])\*[a-z]+)"
    r"|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<name>[A-Za-z]+[0-9]*'?(?:_[A-Za-z0-9]+)*)"
    r"|(?P<operator>\|\||<-|->|<=|>=|\.\.\.|.)",
    re.S,
)


@dataclass
class Reader:
    """Reads tokens from left to right."""

    tokens: list[tuple[str, str]]
    at: int = 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        self.at += 1
        return self.tokens[self.at - 1]


def typeset(text: str) -> str:
    """HTML of a formula: runs of MathML among words; a new line behind each semicolon outside of brackets."""
    reader = Reader([(str(m.lastgroup), m[0]) for m in TOKEN.finditer(text)])
    parts: list[str] = []
    run: list[str] = []

    def flush() -> None:
        if run:
            parts.append(f"<math><mrow>{''.join(run)}</mrow></math>")
            run.clear()

    while reader.peek()[0] != "end":
        kind, value = reader.peek()
        if kind == "space":
            reader.take()
            if run and len(value) == 1:
                run.append("" if _is_text(reader) else _room(reader))
            else:
                flush()
                parts.append(" ")
            continue
        if _is_text(reader):
            flush()
            reader.take()
            parts.append(f"{' ' if parts else ''}{_words(kind, value)}")
            if reader.peek()[0] == "space":
                parts.append(" ")
            continue
        if value in ",;:" or (value == "." and reader.peek(1)[0] in ("space", "end")):
            flush()
            reader.take()
            # a word joiner: no line begins with punctuation
            parts.append("&#8288;" + value + ("<br/>" if value == ";" else " "))
            continue
        if value in RELATIONS or (value in "+-" and run):
            flush()  # a line may break in front of it
        run.append(_term(reader))
    flush()
    return re.sub(r" +([,;:.]?)", lambda m: m[1] or " ", "".join(parts)).strip()


def _room(reader: Reader) -> str:
    """For the space that was read last: a little between two factors, none beside operators, which bring their own."""
    own = {*RELATIONS, *OPERATORS, *",;"}
    if reader.peek()[1] in own | {*CLOSING.values(), ""} or reader.peek(-2)[1] in own:
        return ""
    return '<mspace width="0.17em"/>'


def _is_text(reader: Reader) -> bool:
    """Whether the next token belongs to a sentence."""
    kind, value = reader.peek()
    if kind in ("code", "words"):
        return True
    if kind != "name" or value in UPRIGHT or value in GREEK or value in OPERATORS or "_" in value:
        return False
    following = reader.peek(1)
    if len(value) == 1:
        after = reader.peek(2)[1]
        return value in "aA" and following[0] == "space" and after.islower() and len(after) > 2 and after not in UPRIGHT
    is_name = re.fullmatch(r"[a-z][a-z]?\d+'?|[A-Z]'|d[A-Z]", value) or following[1] in ("(", "^", "_")
    return not is_name


def _words(kind: str, value: str) -> str:
    if kind == "code" and value.startswith("`"):
        return f"<code>{html.escape(value.strip('`'))}</code>"
    return html.escape(value)


def _term(reader: Reader) -> str:
    """One atom with what stands below and above it."""
    base = _atom(reader)
    below = above = ""
    while True:
        follows = reader.peek()[1]
        if follows == "_" and not below:
            reader.take()
            below = _script(reader)
        elif follows == "^" and not above:
            reader.take()
            above = _script(reader)
        else:
            break
    if below and above:
        return f"<msubsup>{base}{below}{above}</msubsup>"
    if below:
        return f"<msub>{base}{below}</msub>"
    return f"<msup>{base}{above}</msup>" if above else base


def _script(reader: Reader) -> str:
    """What is set small: an atom, a negative one, or all between brackets, which are not shown if they only group."""
    kind, value = reader.peek()
    if value == "-":
        reader.take()
        return f"<mrow><mo>−</mo>{_atom(reader)}</mrow>"
    if value in ("{", "("):
        reader.take()
        return f"<mrow>{''.join(_until(reader, CLOSING[value]))}</mrow>"
    return _atom(reader)


def _until(reader: Reader, closing: str) -> list[str]:
    inside = []
    while reader.peek()[0] != "end" and reader.peek()[1] != closing:
        kind, value = reader.peek()
        if kind == "space":
            reader.take()
            inside.append(_room(reader))
        elif _is_text(reader):
            reader.take()
            inside.append(f"<mtext>{html.escape(value.strip('`'))}</mtext>")
        else:
            inside.append(_term(reader))
    if reader.peek()[0] != "end":
        reader.take()
    return inside


def _atom(reader: Reader) -> str:
    kind, value = reader.take()
    if kind == "number":
        return f"<mn>{value}</mn>"
    if kind == "name":
        return _name(reader, value)
    if value in CLOSING:
        inside = "".join(_until(reader, CLOSING[value]))
        left, right = html.escape(value), html.escape(CLOSING[value])
        return f'<mrow><mo stretchy="false">{left}</mo>{inside}<mo stretchy="false">{right}</mo></mrow>'
    if value in RELATIONS:
        return f'<mo form="infix">{html.escape(RELATIONS[value])}</mo>'
    if value in OPERATORS:
        form = ' form="infix"' if value in "+*/" else ""
        return f"<mo{form}>{OPERATORS[value]}</mo>"
    if value == "||":
        return '<mo form="prefix" stretchy="false">‖</mo>'
    if value in ",;":
        return f'<mo separator="true">{value}</mo>'
    return f'<mo stretchy="false">{html.escape(value)}</mo>'


def _name(reader: Reader, value: str) -> str:
    """A name; behind its underscore stands what is set below."""
    base, _, below = value.partition("_")
    if below and len(base) > 2 and base not in STEMS and base not in GREEK:
        return f'<mtext class="code">{value}</mtext>'
    if base == "sqrt":
        while reader.peek()[0] == "space":
            reader.take()
        _, opening = reader.peek()
        if opening == "(":
            reader.take()
            return f"<msqrt>{''.join(_until(reader, ')'))}</msqrt>"
        return f"<msqrt>{_term(reader)}</msqrt>"
    if base == "kron":
        return '<mo form="infix">⊗</mo>'
    if base == "sum" and (below or reader.peek()[1] == "_"):
        shown = "<mo>∑</mo>"
    elif base in GREEK:
        shown = f"<mi>{GREEK[base]}</mi>"
    elif digits := re.fullmatch(r"([A-Za-z]+)(\d+)", base):
        inner = _letters(digits[1])
        shown = f"<msub>{inner}<mn>{digits[2]}</mn></msub>"
    else:
        shown = _letters(base)
    if not below:
        return shown
    if above := _raised(reader):
        return f"<msubsup>{shown}{_below(below)}{above}</msubsup>"
    return f"<msub>{shown}{_below(below)}</msub>"


def _raised(reader: Reader) -> str:
    if reader.peek()[1] != "^":
        return ""
    reader.take()
    return _script(reader)


def _letters(name: str) -> str:
    """A single letter is a variable, in italics; a longer name is upright."""
    plain = name.rstrip("'")
    prime = "′" * (len(name) - len(plain))
    return f"<mi>{name[:1]}{prime}</mi>" if len(plain) == 1 else f'<mi mathvariant="normal">{plain}{prime}</mi>'


def _below(text: str) -> str:
    """``in`` and ``out`` are words, ``ij`` are two variables."""
    parts = [part for part in text.split("_") if part]
    shown = []
    for part in parts:
        if part.isdigit():
            shown.append(f"<mn>{part}</mn>")
        elif part in GREEK:
            shown.append(f"<mi>{GREEK[part]}</mi>")
        elif re.fullmatch(r"[a-z]{2}", part) and part not in ("in", "kv"):
            shown.append("".join(f"<mi>{letter}</mi>" for letter in part))
        else:
            shown.append(_letters(part))
    return f"<mrow>{'<mo>,</mo>'.join(shown)}</mrow>"
