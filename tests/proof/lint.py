"""What PTX may not hold if its results are to be IEEE's on every GPU: one list for both GPU backends.

    faults(text)        [(line number, instruction, reason)] of a PTX module; empty where all is well
    statements(text)    [(line number, opcode, operands)] of its instructions
"""

import re

_OPCODE = re.compile(r"(?:@!?%?[\w$]+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?:\s+(.*))?$", re.S)
_SMALL = r"\.(?:f16|f16x2|bf16|bf16x2)\b"
_ARITHMETIC = r"(?:add|sub|mul|fma|mad|div|rcp|sqrt)\b"

RULES = [  # pattern of what is refused, why
    (r".*\.(approx|ftz|full)\b", "not IEEE's result: {0}"),
    (r".*\.(tf32|u?e\dm\d\w*)\b", "a format of fewer bits: {0}"),
    (r".*\.(sat|satfinite|relu)\b", "changes values: {0}"),
    (rf"{_ARITHMETIC}(?!.*\.rn\b).*\.f32(?:x2)?\b", "rounding is not said to be to nearest: a compiler may contract it"),
    (r"(?!setp|set|selp|mov|ld|st|bra).*\.f64\b", "float64: a second rounding"),
    (rf"(?!cvt|mov|ld|st|selp|setp).*{_SMALL}", "arithmetic in 16 bits: a second rounding"),
    (r"(?:min|max)\b.*\.f(?:16|32|64)", "drops a NaN"),
    (r"(?:ex2|lg2|sin|cos|tanh|rsqrt)\b", "an approximation"),
    (r"cvt\b(?!\.rn\.).*\.(?:f32|f16|f16x2|bf16|bf16x2)\.(?:f32|f64|[us]32|[us]64)$", "rounds, and not by .rn"),
    (r"cvt\b(?!\.rni\.).*\.[us](?:8|16|32|64)\.(?:f32|f16|bf16)$", "rounds to an integer, and not by .rni"),
    (r"cvt\b.*\.r[zmpa]\w*\b", "rounds, and not to nearest even"),
    (r"(?:atom|red)\b.*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b", "the order of the additions is not fixed"),
]


def statements(text):
    """The instructions of a module. A statement ends at a semicolon; labels, braces and directives in front of it are dropped."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    found, line = [], 1
    for chunk in text.split(";"):
        start = line
        line += chunk.count("\n")
        at = 0
        while at < len(chunk):
            rest = chunk[at:]
            if skip := re.match(r"\s+|[{}]|[$\w]+:(?!:)", rest):  # blanks, scopes, labels
                at += skip.end()
            elif rest[0] == ".":  # a directive: to the end of the line, and the statement with it where it ends in a semicolon
                end = rest.find("\n")
                at = len(chunk) if end < 0 else at + end
            elif rest[0] == ")":  # the end of a parameter list
                at += 1
            else:
                if one := _OPCODE.match(rest.strip()):
                    found.append((start + chunk[:at].count("\n"), one[1], one[2] or ""))
                break
    return found


def faults(text):
    """Instructions of a module that some rule refuses, each with the first reason."""
    found = []
    for line, opcode, _ in statements(text):
        matches = ((re.match(pattern, opcode), reason) for pattern, reason in RULES)
        if reason := next((reason.format(*match.groups()) for match, reason in matches if match), None):
            found.append((line, opcode, reason))
    return found
