"""Drawings of what the pages on concepts explain, and of how to decide."""

from __future__ import annotations

import math

from drawing import BLUE, FAINT, GREEN, GREY, ORANGE, SAND, WHITE, Drawing, curves


def concepts() -> dict[str, str]:
    """SVG by file name."""
    made = {
        "decide": decide(),
        "concept-latent": latent(),
        "concept-slots": slots(),
        "concept-folding": folding(),
        "concept-expected-rotation": expected_rotation(),
        "concept-budget": budget(),
        "concept-windows": windows(),
        "concept-teacher-forcing": teacher_forcing(),
        "concept-distillation": distillation(),
    }
    return {f"{name}.svg": drawing.svg() for name, drawing in made.items()}


def decide() -> Drawing:
    """Which target and budget, by questions."""
    drawing = Drawing("Which target, which budget, and whether to train", 600, 560)
    questions = [
        ("Is the KV cache what limits you?", ["(long contexts or large", "batches, decoding)"]),
        ("Is half of the cache enough?", []),
        ("Can you train on a GPU?", ["(10 million tokens: 9 to", "14 minutes for 135M)"]),
        ("Does your engine take windows", ["and latents in one model?"]),
    ]
    answers = [
        ("no", ["Change nothing: short", "single sequences get", "slower, not faster"], GREY),
        ("yes", ["MLA, --kv-budget 0.5", "no training needed;", "training: a little better"], GREEN),
        ("no", ["gateswa+mla,", "--kv-budget 0.125;", "or gateswa alone"], BLUE),
        ("no", ["one target alone: MLA,", "a quarter, trained;", "or gateswa"], ORANGE),
    ]
    for index, (question, more) in enumerate(questions):
        y = 16 + 120 * index
        drawing.box(20, y, 270, 76, [question, *more], fill=WHITE, bold=False)
        word, lines, fill = answers[index]
        drawing.line([(290, y + 38), (390, y + 38)], arrow=True)
        drawing.text(296, y + 30, word, fill=FAINT, size=11)
        drawing.box(390, y, 196, 76, lines, fill=fill)
        drawing.line([(155, y + 76), (155, y + 120 if index < 3 else y + 124)], arrow=True)
        follow = ["yes", "no, smaller", "yes", "yes"][index]
        drawing.text(163, y + 102, follow, fill=FAINT, size=11)
    drawing.box(20, 500, 566, 46, ["gateswa+mla, --kv-budget 0.125, trained at the length that you serve"], fill=GREEN)
    return drawing


def latent() -> Drawing:
    """What a token leaves in the cache, before and after."""
    drawing = Drawing("What one token leaves in the cache of one layer", 640, 226)
    drawing.text(16, 24, "before: a key and a value for each key/value head", bold=True)
    for head in range(3):
        drawing.box(16 + 204 * head, 36, 96, 34, f"key {head + 1}", fill=BLUE)
        drawing.box(116 + 204 * head, 36, 96, 34, f"value {head + 1}", fill=SAND)
    drawing.text(16, 90, "3 heads x (64 + 64) = 384 values in SmolLM2", fill=FAINT)
    drawing.line([(16, 98), (16, 106), (624, 106), (624, 98)])
    drawing.line([(294, 106), (294, 136)], arrow=True)
    drawing.text(306, 126, "one linear map, fitted to the model", fill=FAINT)
    drawing.text(16, 160, "after, at a half:", bold=True)
    drawing.box(150, 138, 190, 36, "latent, 144 values", fill=GREEN)
    drawing.box(344, 138, 96, 36, "slots, 48", fill=ORANGE)
    drawing.text(150, 196, "one for all heads; both are read as they stand,", fill=FAINT)
    drawing.text(150, 212, "keys and values are never made again", fill=FAINT)
    drawing.text(448, 160, "192 values", fill=FAINT)
    return drawing


def slots() -> Drawing:
    """Components of the keys: some keep their rotation, the others go to the latent."""
    drawing = Drawing("Rotary slots", 640, 232)
    drawing.text(16, 24, "a key before rotation: pairs of numbers, each turned by position x frequency", bold=True)
    labels = ["fast", "", "", "", "", "", "", "slow"]
    for index in range(8):
        x = 28 + 76 * index
        kept = index in (1, 2, 4)
        drawing.box(x, 40, 62, 40, fill=ORANGE if kept else GREEN)
        drawing.line(
            [(x + 31 + 13 * math.cos(a), 60 + 13 * math.sin(a)) for a in (0.3 * k for k in range(15))],
            arrow=True,
            colour="#57606a",
        )
        drawing.text(x + 31, 96, labels[index], anchor="middle", fill=FAINT)
        drawing.line([(x + 31, 102), ((140 if kept else 420) + 8 * index, 150)], arrow=True)
    drawing.box(40, 152, 220, 40, ["rotary slots: still turned"], fill=ORANGE)
    drawing.box(330, 152, 270, 40, ["latent: turned on average only"], fill=GREEN)
    drawing.text(40, 214, "kept: what gains most from turning", fill=FAINT)
    drawing.text(330, 214, "slow or faint pairs: little is lost", fill=FAINT)
    return drawing


def folding() -> Drawing:
    """Two neighbouring frequencies share a slot."""
    drawing = Drawing("Folding", 620, 210)
    drawing.text(16, 24, "neighbouring frequencies of all heads", bold=True)
    names = ["1", "0.75", "0.56", "0.42", "0.32", "0.24"]
    for index, name in enumerate(names):
        x = 26 + 96 * index
        drawing.box(x, 36, 82, 34, name, fill=BLUE)
        drawing.line([(x + 41, 70), (115 + 192 * (index // 2) + (12 if index % 2 else -12), 116)], arrow=True)
    for pair in range(3):
        drawing.box(54 + 192 * pair, 118, 122, 36, ["mixed together"], fill=ORANGE)
    drawing.text(16, 180, "folded by two: the pair is mixed as if it turned at one frequency, so that", fill=FAINT)
    drawing.text(16, 196, "one slot serves both. A little wrong far away; used only where slots are few.", fill=FAINT)
    return drawing


def expected_rotation() -> Drawing:
    """What is left on average of a rotation, by frequency, for two ranges of distances."""
    frequencies = [10.0 ** (-0.5 * step) for step in range(9)]

    def expected(frequency: float, longest: float) -> float:
        count = 200
        distances = [0.1 * (longest / 0.1) ** (step / (count - 1)) for step in range(count)]
        real = sum(math.cos(distance * frequency) for distance in distances) / count
        imaginary = sum(math.sin(distance * frequency) for distance in distances) / count
        return math.hypot(real, imaginary)

    series = [
        ("to 512 tokens", [expected(frequency, 512) for frequency in frequencies], True),
        ("to 8,192 tokens", [expected(frequency, 8192) for frequency in frequencies], False),
    ]
    labels = ["1", "", "0.1", "", "0.01", "", "0.001", "", "0.0001"]
    title = "How much of a rotation its average keeps"
    return curves(title, labels, series, [0, 0.25, 0.5, 0.75, 1], x_title="frequency, radians per token")


def budget() -> Drawing:
    """What the budget is divided into."""
    drawing = Drawing("A budget of one half", 620, 262)
    drawing.text(16, 24, "1. over layers: evenly, or by what each loses when it alone is latent", bold=True)
    heights = [30, 52, 40, 24, 44, 64, 36, 22, 30, 38]
    for index, height in enumerate(heights):
        x = 30 + 58 * index
        drawing.box(x, 112 - height, 40, height, fill=GREEN)
        drawing.text(x + 20, 128, str(index), anchor="middle", fill=FAINT)
    drawing.line([(20, 74), (600, 74)], dashed=True)
    drawing.text(30, 68, "even", fill=FAINT)
    drawing.text(16, 164, "2. within a layer: one slot (two values) for every eight cached values", bold=True)
    drawing.box(30, 178, 420, 34, "latent", fill=GREEN)
    drawing.box(450, 178, 140, 34, "slots", fill=ORANGE)
    drawing.text(30, 236, "at least a slot for two frequencies; with few values, frequencies are folded", fill=FAINT)
    return drawing


def windows() -> Drawing:
    """Which tokens a query sees."""
    drawing = Drawing("Which tokens a query sees", 640, 292)
    side, count = 17.0, 12
    for place, (title, window, kept) in enumerate([("full layer", count, 0), ("window of 4, 2 kept tokens", 4, 2)]):
        left, top = 40 + 310 * place, 50.0
        drawing.text(left, 24, title, bold=True)
        drawing.text(left, 42, "keys", fill=FAINT, size=11)
        for query in range(count):
            for key in range(count):
                sink, near = key < kept, query - key < window
                fill = WHITE if key > query else ORANGE if sink and not near else GREEN if near else GREY
                drawing.box(left + side * key, top + side * query, side, side, fill=fill, radius=0)
        drawing.text(left - 8, top + side * count / 2, "q", anchor="end", fill=FAINT)
    legend = [(GREEN, "seen"), (ORANGE, "kept first tokens"), (GREY, "gone: a sink stands for it")]
    for index, (fill, name) in enumerate(legend):
        drawing.box(40 + 180 * index, 266, 14, 14, fill=fill, radius=0)
        drawing.text(60 + 180 * index, 278, name, fill=FAINT, size=11)
    return drawing


def teacher_forcing() -> Drawing:
    """Each new attention learns from the source's own hidden states."""
    drawing = Drawing("Teacher forcing", 640, 226)
    drawing.text(16, 24, "the source runs once over the text", bold=True)
    for layer in range(3):
        x = 40 + 200 * layer
        drawing.box(x, 38, 140, 44, ["source's", f"attention {layer + 1}"], fill=BLUE)
        drawing.line([(x + 140, 60), (x + 200 if layer < 2 else x + 176, 60)], arrow=True)
        drawing.line([(x - 20, 60), (x - 20, 150), (x, 150)], arrow=True)
        drawing.box(x, 128, 140, 44, ["new", f"attention {layer + 1}"], fill=GREEN)
        drawing.line([(x + 70, 128), (x + 70, 82)], dashed=True)
    drawing.line([(10, 60), (40, 60)])
    drawing.text(118, 110, "as near as can be", fill=FAINT, size=11)
    drawing.text(16, 200, "Each new attention gets the source's hidden states, not those of the new layers", fill=FAINT)
    drawing.text(16, 216, "before it: errors do not pile up, and layers can be fitted in any order.", fill=FAINT)
    return drawing


def distillation() -> Drawing:
    """The whole student learns the source's distributions."""
    drawing = Drawing("Distillation", 640, 196)
    drawing.box(16, 70, 120, 50, ["windows of", "text"], fill=SAND)
    for y, name, fill in ((28, "source (frozen)", BLUE), (118, "result (trained)", GREEN)):
        drawing.line([(136, 95), (170, 95), (170, y + 22), (200, y + 22)], arrow=True)
        drawing.box(200, y, 160, 44, name, fill=fill)
        drawing.line([(360, y + 22), (392, y + 22)], arrow=True)
        for index, height in enumerate([12, 30, 8, 20, 5, 14] if y < 100 else [14, 26, 10, 18, 8, 12]):
            drawing.box(400 + 14 * index, y + 40 - height, 12, height, fill=fill, radius=0)
    drawing.text(396, 186, "next-token probabilities", fill=FAINT, size=11)
    drawing.line([(500, 50), (540, 50), (540, 84)], arrow=True)
    drawing.line([(500, 140), (540, 140), (540, 112)], arrow=True)
    drawing.box(500, 86, 128, 26, "KL divergence", fill=ORANGE)
    return drawing
