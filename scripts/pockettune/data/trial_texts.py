"""Texts to try a tokenizer on: hard ones, and some that are of no task in particular."""

# Where tokenizers have been seen to part: what splits, what is normalized, what is special.
HARD_TEXTS = (
    "",
    "这家酒店的早餐很丰富，但是房间太小了。",
    "這家酒店的早餐很豐富，但是房間太小了。",
    "生僻字：𠮷𡈽龘靐，魑魅魍魉",
    "日本語のカタカナ、한국어, ไทย, العربية, עברית",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇨🇳 ❤️",
    "两个  三个   七个       空格 ",
    "   行首\n\n\n换行\r\n回车\t\t制表\n  ",
    "ＡＢＣ　１２３，全角！（）：；“”‘’《》……——",
    "价格1234567.89元，2024年12月31日，电话010-88886666，①②③ ½ ٣",
    "e\u0301 n\u0303 q\u0303 क्षि \u1112\u1161\u11ab \uf900",  # some of it is changed by NFC
    "I'll say it's OK, IT'S 100% PERFECT: don't-you_think? (yes/no) http://a.cn/?q=1&b=2",
    "前台Service很差wifi连不上VIP会员no.1",
    "\u200b零宽\u00a0不换行\ufeff",
    "!!!???。。。~~~***===>>>#$%^&@`|\\",
)

# To see how a vocabulary that was cut for one task reads another domain: weather, cooking, law,
# machines, medicine, history.
OTHER_TEXTS = {
    "zh": [
        "受冷空气影响，明天夜间到后天，北方大部分地区气温将下降六到八摄氏度，沿海有七级大风。",
        "将豆腐切成小块，用淡盐水焯两分钟捞出，锅中放油，小火炒香豆瓣酱，再加入肉末和高汤。",
        "出租人应当按照约定将租赁物交付承租人，并在租赁期限内保持租赁物符合约定的用途。",
        "更新驱动程序后请重新启动计算机；若仍然无法识别显卡，请检查电源接口并恢复出厂设置。",
        "患者入院时体温三十八度五，伴有咳嗽和咽痛，血常规提示白细胞计数升高，建议静脉补液。",
        "唐代中期以后，藩镇割据日益严重，中央财政依赖江淮漕运，两税法由此取代了租庸调制。",
    ],
    "en": [
        "Cold air from the north will lower temperatures by ten degrees, with gales along the coast.",
        "Simmer the lentils with cumin and garlic for twenty minutes, then stir in the chopped spinach.",
        "The tenant shall return the premises in the condition in which they were handed over.",
        "After updating the driver, restart the computer and check the power connector of the graphics card.",
        "The patient was admitted with fever and a sore throat; blood tests showed a raised leukocyte count.",
        "By the late seventeenth century the guilds had lost most of their privileges to the merchants.",
    ],
}
