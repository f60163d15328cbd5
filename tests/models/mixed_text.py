"""Mixed text, made by a seed, on which tokenizers differ if they differ at all."""

import random

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<jupyter_code>")
ALMOST = ("<|im_start|", "<|im_ end|>", "<|IM_END|>", "<|eot_id|>", "</s>", "<<|im_end|>>")
WORDS = """
    the of and house Board veneer THIN layer McCarthy iPhone naïve façade Straße Ærø Łódź Ñandú
    don't I'm you're we've he'll she'd O'Neil 's 'S 'll 'LL 'tis rock'n'roll it’s CAN'T
    привет мир Ελλάδα Ωραία 日本語 漢字 かな カタカナ 한국어 서울 ไทย हिन्दी বাংলা தமிழ் ქართული հայերեն
    שלום עולם مرحبا العالم ١٢٣ ۴۵۶ १२३ ① ⅷ ½ ² ㊿ 〇 三 ٪ فارسی\u200cها
""".split()  # noqa: SIM905
CODE = (
    "def f(x): return x**2 + y[0]//3",
    "if (a != b && c <= d || !e) { return a?.b ?? 0; }",
    "\tfor (int i = 0; i < 1024; ++i) {",
    "        x = {'k': [1, 2.5e-3, 0xFF, 1_000]}",
    "SELECT * FROM t WHERE id=42 -- comment",
    "#include <stdio.h> // C99",
    "git log --oneline -n 5 | grep -v '^#'",
    '<div class="a b">&nbsp;&#8217;</div>',
    "\\begin{equation} \\alpha_{1} \\end{equation}",
    "λx. x → ∀y ∈ ℝ: x² ≤ ∑ᵢ yᵢ",
    "@decorator\n    async def g(*args, **kwargs): ...",
    'r\'^\\d{3}-\\s*$\' """doc"""',
)
EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣ 🤷🏿‍♂️ ☃ 🧑‍💻 \ufe0f \u200d".split()  # noqa: SIM905
MARKS = "é e\u0301 a\u0308\u0323 o\u0302\u0301 Å A\u030a Z̸̢a̵l̶g̷o̴ ก็่ \u0301x \u202bא\u202c".split()  # noqa: SIM905
PUNCTUATION = """
    ... … — – !? ?!! «» “” ‚‘ () [[ }} ;; '' \"\"\" ~~ `` $$ %% @@ ^_^ ¿¡ 。、 ・ ٫ §¶ €£¥ ©®™ •‣
""".split()  # noqa: SIM905
URLS = """
    https://example.org/a/b?q=1&r=%20x#frag-2 http://127.0.0.1:8080 ftp://h.example/~u #tag @user
    me+you@example.co.uk C:\\Users\\x\\file.txt /usr/lib/python3.11 v1.2.3-rc4+5
""".split()  # noqa: SIM905
ASCII_SPACES = (" ", " ", " ", "", "  ", "   ", "    ", " " * 9, " " * 33, "\t", "\t\t", " \t ")
BREAKS = ("\n", "\n\n", " \n", "\n  ", "\r\n", "\n\t\n ", "\u2028", "\x0b", "\x0c")
SPACES = (*ASCII_SPACES, *BREAKS, "\xa0", "\u2003", "\u3000")
BLOCKS = (  # first and last code point of each
    (0xA1, 0x24F),
    (0x370, 0x52F),
    (0x590, 0x6FF),
    (0x900, 0xD7F),
    (0x2010, 0x2BFF),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F6FF),
)


def mixed_lines(count: int, *, seed: int = 0) -> list[str]:
    """Return lines of one to eight pieces each, joined by spaces of every kind."""
    rng = random.Random(seed)

    def number() -> str:
        digits = "".join(rng.choices("0123456789", k=rng.choice((1, 2, 3, 4, 7, 12, 40))))
        return rng.choice(
            (digits, f"-{digits}", f"{digits}.5", f"{digits}%", f"x{digits}y", f"{digits},000")
        )

    def noise() -> str:
        return "".join(chr(rng.randrange(33, 127)) for _ in range(rng.randrange(1, 12)))

    def scattered() -> str:
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 6)))

    listed = (WORDS, WORDS, CODE, EMOJI, MARKS, PUNCTUATION, URLS, SPECIAL, ALMOST)
    made = (number, number, noise, scattered)

    def piece() -> str:
        kind = rng.choice((*listed, *made))
        return kind() if callable(kind) else rng.choice(kind)

    def line() -> str:
        pieces = [rng.choice(SPACES) if rng.random() < 0.3 else ""]
        for _ in range(rng.randint(1, 8)):
            pieces += [piece(), rng.choice(SPACES)]
        return "".join(pieces)

    return [line() for _ in range(count)]
