"""Generate short Chinese reviews for the demo: labelled splits, and unlabelled text.

A review is of two to five clauses. Its label is what the writer concludes, and counting good and
bad words does not tell it: predicates are negated (不太干净), an expectation is reversed (本来以为
服务很差，结果……), and behind 但是 or 不过 stands what counts, whatever stood before. The
unlabelled reviews mostly close with a remark that agrees with the conclusion, as real ones do; the
labelled ones mostly stop before it.

Output  train.csv, validation.csv, test.csv (text, label: 1 good, 0 bad), corpus.txt (a text a line)
"""

import argparse
import random
from pathlib import Path

import pandas as pd

from pockettune.common import program

SEED = 20260101
ROWS = {"train": 3000, "validation": 300, "test": 600}
CORPUS_ROWS = 10_000

TURN_SHARE, HOPE_SHARE = 0.2, 0.1  # of the reviews; the others say the same throughout
NEGATION_SHARE = 0.15  # of the clauses

# subject -> aspect -> (good predicates, bad predicates)
ASPECTS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "酒店": {
        "房间": (["干净", "宽敞", "安静", "舒服"], ["脏", "潮湿", "吵", "狭小"]),
        "服务": (["周到", "热情", "专业"], ["冷淡", "拖拉", "敷衍"]),
        "早餐": (["丰富", "可口"], ["单调", "难吃"]),
        "位置": (["方便", "好找"], ["偏僻", "难找"]),
    },
    "手机": {
        "屏幕": (["清晰", "细腻"], ["模糊", "偏色"]),
        "电池": (["耐用", "持久"], ["虚标", "不经用"]),
        "做工": (["精致", "结实"], ["粗糙", "廉价"]),
        "系统": (["流畅", "稳定"], ["卡顿", "混乱"]),
    },
    "书": {
        "内容": (["充实", "有趣", "深刻"], ["空洞", "乏味", "啰嗦"]),
        "印刷": (["清楚", "精美"], ["模糊", "粗糙"]),
        "翻译": (["流畅", "准确"], ["生硬", "混乱"]),
        "情节": (["紧凑", "感人"], ["拖沓", "老套"]),
    },
    "饭馆": {
        "菜": (["新鲜", "可口", "地道"], ["油腻", "难吃", "太咸"]),
        "上菜": (["快", "及时"], ["慢", "拖拉"]),
        "环境": (["干净", "安静", "雅致"], ["脏", "吵", "拥挤"]),
        "价格": (["实惠", "公道"], ["离谱", "偏高"]),
    },
}
OPENINGS = ["上周去的", "第二次来了", "朋友推荐的", "在网上买的", "用了一个月", "等了很久才到", ""]
CLOSINGS = {
    True: ["下次还会来", "值得推荐", "非常满意", "推荐给大家", "很喜欢"],
    False: ["再也不来了", "不推荐", "非常失望", "大家慎重", "很后悔"],
}
DEGREES = ["很", "非常", "挺", "特别", "相当"]
NEGATIONS = ["不太", "一点也不", "并不", "谈不上"]
TURNS = ["但是", "不过", "可是", "然而"]


def make_review(random: random.Random, good: bool, closing: bool) -> str:
    """Return a review that concludes `good`, with its closing remark or without."""
    subject = random.choice(list(ASPECTS))
    aspects = random.sample(list(ASPECTS[subject]), 3)

    def clause(aspect: str, good: bool) -> str:
        praise, blame = ASPECTS[subject][aspect]
        if random.random() < NEGATION_SHARE:  # say it by denying the opposite
            return f"{aspect}{random.choice(NEGATIONS)}{random.choice(blame if good else praise)}"
        return f"{aspect}{random.choice(DEGREES)}{random.choice(praise if good else blame)}"

    first, second = aspects[:2]
    shape = random.random()
    if shape < TURN_SHARE:  # what counts comes after the turn
        body = f"{clause(first, not good)}，{random.choice(TURNS)}{clause(second, good)}"
    elif shape < TURN_SHARE + HOPE_SHARE:
        body = f"本来以为{clause(first, not good)}，结果{clause(second, good)}"
    else:
        body = "，".join(clause(aspect, good) for aspect in aspects[: random.choice((2, 3))])
    parts = [random.choice(OPENINGS), body, random.choice(CLOSINGS[good]) if closing else ""]
    return "，".join(part for part in parts if part) + random.choice("。！")


def make_demo_data(output: Path) -> None:
    """Write the labelled splits and the unlabelled text to the folder `output`."""
    source = random.Random(SEED)
    output.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        labels = [source.random() < 0.5 for _ in range(count)]
        texts = [make_review(source, good, closing=source.random() < 0.15) for good in labels]
        with program.staged(output / f"{split}.csv") as partial:
            table = pd.DataFrame({"text": texts, "label": [int(good) for good in labels]})
            table.to_csv(partial, index=False)
    with program.staged(output / "corpus.txt") as partial:
        lines = [
            make_review(source, source.random() < 0.5, closing=source.random() < 0.9)
            for _ in range(CORPUS_ROWS)
        ]
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    program.logger.info("%s labelled and %d unlabelled reviews in %s", ROWS, CORPUS_ROWS, output)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")

    def work(arguments: argparse.Namespace) -> None:
        make_demo_data(arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
