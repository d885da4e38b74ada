"""Chinese reviews with three labels. `python -m examples.reviews_zh FILE` writes 330 rows as JSON lines.

A good review praises two sides of a thing, a bad one blames two, and a mixed one praises one side and blames another.
"""

import random

from examples import Row, write

THINGS = ("耳机", "水壶", "台灯", "背包", "键盘", "雨伞", "枕头", "风扇", "手表", "跑鞋", "锅", "充电器")
SIDES = {
    "质量": (("质量很好", "做工精细", "用料扎实"), ("质量太差", "做工粗糙", "没用几天就坏了")),
    "物流": (("物流很快", "第二天就到了", "包装完好"), ("等了半个月才到", "快递太慢", "包装破了")),
    "价格": (("价格便宜", "性价比高", "物超所值"), ("价格太贵", "不值这个价", "买完就降价了")),
    "服务": (("客服耐心", "售后很负责", "有问必答"), ("客服不理人", "退货很麻烦", "态度恶劣")),
    "外观": (("颜色漂亮", "样子好看", "很有设计感"), ("颜色和图片不一样", "样子很丑", "有划痕")),
}
ENDINGS = ("", "给家里人买的。", "用了一个星期。", "第一次在这家店买。", "以后再看看。")
LABELS = {"好评": (0, 0), "差评": (1, 1), "中评": (0, 1)}


def rows() -> list[Row]:
    """Return 110 reviews of each label in random order."""
    draw = random.Random(7)
    found: dict[str, str] = {}
    for label, (one, other) in LABELS.items():
        count = len(found) + 110
        while len(found) < count:
            sides = draw.sample(sorted(SIDES), 2)
            first, second = draw.choice(SIDES[sides[0]][one]), draw.choice(SIDES[sides[1]][other])
            join = "，但是" if label == "中评" else "，"
            if label == "中评" and draw.random() < 0.5:
                first, second = second, first
            found[f"{draw.choice(THINGS)}{first}{join}{second}。{draw.choice(ENDINGS)}"] = label
    return draw.sample([{"text": text, "label": label} for text, label in found.items()], len(found))


if __name__ == "__main__":
    write(rows())
