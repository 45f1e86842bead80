"""The words of a goal: what each means. Phrases are in lower case; a space may be any space."""

from __future__ import annotations

from typing import Any

_AT_MOST = (
    "at most|up to|under|below|less than|no more than|not more than|fewer than|lower than|max|"
    "maximum|maximum of|max of|within|inside|not above|no larger than|no bigger than|no slower than|"
    "not slower than|no worse than|no higher than|not exceed|never exceed|not exceeding|does not "
    "exceed|without exceeding|not over|only|just|limited to|limit|limit of|capped at|cap of|cap|"
    "budget|budget of|down to|<|<=|≤|=<|不超过|不大于|不高于|不多于|不能超过|不得超过|不可超过|不要超过|"
    "别超过|不慢于|小于|低于|少于|小于等于|低于等于|最多|至多|最大|最高|最长|上限|上限为|控制在|限制在|"
    "压到|压缩到|降到|降至|降低到|不到|快于|短于|只用|仅用|只有|限"
)
_AT_LEAST = (
    "at least|more than|above|over|no less than|not less than|not below|no lower than|no fewer than|"
    "minimum|minimum of|min|min of|not under|exceeding|>|>=|≥|至少|最少|最低|不低于|不小于|不少于|"
    "不能低于|不得低于|大于|高于|超过|多于|下限|大于等于|达到"
)
_FILLERS = (
    "the|model|student|network|it|its|should|must|shall|has|have|had|having|to|be|run|runs|running|"
    "fit|fits|take|takes|taking|need|needs|want|i|we|i want|i need|we need|my|our|your|please|make|"
    "give|me|in|on|of|for|at|that|this|is|are|can|may|will|would|like|uses|use|using|keep|keeping|"
    "keeps|stay|stays|staying|get|gets|by|as|target|deploy|deployed|something|which|than|per query|"
    "per image|per frame|per sample|per inference|per call|per picture|per prediction|for one image|"
    "for one query|each|every|a frame|inference|long|allow|allowed|i'd like|there|goal|set|with a|"
    "ship|shipped|'s|'|:|=|\"|“|”|‘|`|board|device|machine|does|do|when|compared with|compared to|"
    "against|relative to|versus|vs|from|version|requirement|requirements|total|"
    "的|在|上|里|中|我|我们|想|要|要求|希望|需要|请|模型|学生|网络|部署|部署到|部署在|运行|跑|跑在|能|可以|必须|"
    "应该|应|为|是|到|了|把|让|使|使用|用|占用|占|推理|单次|每次|每次推理|单次推理|一次推理|每张|每张图|每张图片|"
    "每帧|单张|单帧|一帧|一张图|一张|保持|设为|设置为|给我|一个|设备|板子|开发板|它|会|被|有|相比|对|与|相对|"
    "相对于|比|做到|目标|得|地|个|允许|版|上面|给|所|大约在|约束|时"
)
_INT8 = "quantize.int8"
THREADS = "engines.0.threads"
"""The key of a number of threads."""

TERMS: tuple[tuple[str, Any, str], ...] = (
    # Quantities: (what they measure, factor to ms, bytes, percent, …).
    ("unit", ("time", 1.0), "ms|msec|msecs|millisecond|milliseconds|millis|毫秒"),
    ("unit", ("time", 1e-3), "us|μs|µs|microsecond|microseconds|usec|微秒"),
    ("unit", ("time", 1e3), "s|sec|secs|second|seconds|秒|秒钟"),
    (
        "unit",
        ("rate", 1.0),
        "fps|hz|qps|frames per second|frames a second|frames/s|images per second|images/s|samples "
        "per second|samples/s|queries per second|inferences per second|predictions per second|"
        "帧每秒|帧/秒|帧|赫兹|张每秒|张/秒|次每秒|次/秒",
    ),
    ("unit", ("bytes", 1e3), "kb|kilobyte|kilobytes|千字节"),
    ("unit", ("bytes", 1e6), "mb|megabyte|megabytes|megs|兆|兆字节"),
    ("unit", ("bytes", 1e9), "gb|gigabyte|gigabytes|吉字节"),
    ("unit", ("bytes", 1024.0), "kib"),
    ("unit", ("bytes", 1024.0**2), "mib"),
    ("unit", ("bytes", 1024.0**3), "gib"),
    ("unit", ("mega", 1e6), "m|million|millions|百万"),
    ("unit", ("mega", 1e3), "k|thousand|千"),
    ("unit", ("mega", 1e4), "万"),
    ("unit", ("percent", 1.0), "%|percent|per cent"),
    (
        "unit",
        ("points", 1.0),
        "point|points|percentage point|percentage points|% point|% points|pp|pt|pts|个百分点|百分点|"
        "个点|点",
    ),
    ("unit", ("times", 1.0), "x|×|times|fold|倍"),
    ("unit", ("threads", 1.0), "thread|threads|core|cores|cpu core|cpu cores|个线程|线程|个核|核"),
    ("unit", ("pieces", 1.0), "image|images|frames|samples|张|张图|张图片|次|个样本|样本"),
    ("times", 2.0, "twice"),
    *(
        ("number", float(number), word)
        for number, word in enumerate(
            "one two three four five six seven eight nine ten eleven twelve".split(), start=1
        )
    ),
    *(
        ("number", float(number), word)
        for number, word in ((20, "twenty"), (30, "thirty"), (50, "fifty"), (100, "hundred"))
    ),
    ("number", 0.5, "half"),
    ("fraction", 0.5, "一半"),
    ("fraction", 1 / 3, "third"),
    ("fraction", 1 / 4, "quarter"),
    ("fraction", 1 / 5, "fifth"),
    ("fraction", 1 / 10, "tenth"),
    ("fraction", 1 / 20, "twentieth"),
    ("fraction", 1 / 100, "hundredth"),
    # Comparisons; those with "after" follow their quantity.
    ("at-most", None, _AT_MOST),
    ("at-most-after", None, "以内|以下|之内|内|之下|封顶|or less|or lower|or fewer|or below|or under|tops"),
    ("at-least", None, _AT_LEAST),
    ("at-least-after", None, "以上|之上|or more|or higher|or better|or above|+"),
    ("about", None, "about|around|roughly|approximately|~|≈|大约|大概|约|差不多"),
    ("about-after", None, "左右|or so"),
    # What a quantity is about.
    ("topic", "latency", "latency|latencies|delay|response time|inference time|run time|runtime|延迟|时延|"
                         "耗时|推理时间|推理耗时|响应时间|速度要求"),  # fmt: skip
    ("topic", "p50", "p50|median|50th percentile|中位数|中位|50分位|50 分位"),
    ("topic", "p90", "p90|90th percentile|90分位|90 分位"),
    ("topic", "p95", "p95|95th percentile|95分位|95 分位"),
    ("topic", "p99", "p99|99th percentile|99分位|99 分位"),
    ("topic", "memory", "memory|ram|peak memory|memory footprint|peak ram|rss|working memory|内存|运存|"
                        "内存峰值|峰值内存|内存占用"),  # fmt: skip
    ("topic", "size", "size|file|file size|model size|disk|on disk|disk space|storage|flash|download|"
                      "large|big|文件|体积|大小|模型大小|模型文件|模型体积|文件大小|存储|磁盘|硬盘|闪存"),  # fmt: skip
    ("topic", "parameters", "parameters|parameter|params|parameter count|number of parameters|fewer "
                            "parameters|参数|参数量|个参数|参数个数|参数数量"),  # fmt: skip
    ("topic", "accuracy", "accuracy|accurate|acc|top 1|top1|准确率|准确度|正确率|精度|精确度"),
    ("topic", "error", "mae|mse|error|mean error|误差|平均误差"),
    (
        "topic",
        "drop",
        "lose|loses|losing|lost|loss|loss of|drop|drops|dropping|accuracy drop|accuracy loss|fall|"
        "falls|decrease|decreases|degrade|degrades|degradation|sacrifice|give up|gives up|worse|"
        "worse than|cost|costs|costing|max drop|下降|降低|降|损失|掉|掉点|减少|下滑|牺牲|丢|丢失|跌|差",
    ),
    (
        "topic",
        "gain",
        "gain|better than alone|better than the student alone|better than without the teacher|"
        "比单独训练高|比单独训练好|提升|增益",
    ),
    (
        "topic",
        "faster",
        "faster|faster than|as fast|fast|speedup|speed up|speed|throughput|frame rate|quicker|quicker "
        "than|快|更快|加速|提速|加速比|速度|帧率|吞吐|吞吐量|每秒",
    ),
    ("topic", "smaller", "smaller|smaller than|compression|compressed|compress|lighter|lighter than|小|更小|"
                         "缩小|压缩|压缩率"),  # fmt: skip
    ("topic", "batch", "batch|batch size|batches|batches of|batch of|batch size of|per batch|in a batch|"
                       "at once|批大小|批量|批量大小|批次|批次大小|每批|批"),  # fmt: skip
    ("topic", "teacher", "teacher|teacher's|than the teacher|the teacher|the teacher's|original|original "
                         "model|老师|教师|教师模型|老师模型|教师网络|原模型|原始模型|原来"),  # fmt: skip
    # Complete wishes.
    ("set", {_INT8: "static"}, "int8|8 bit|static int8|int8 quantization|int8 quantized|quantized|quantize|"
                               "8位|八位|int8量化|int8 量化|8位量化|静态量化|量化|量化成int8|量化为int8|量化到int8"),  # fmt: skip
    ("set", {_INT8: "static", "quantize.select": "int8"},
     "int8 only|only int8|must be int8|int8 and nothing else|只用int8|只用 int8|仅int8|仅 int8|必须int8|"
     "必须 int8|必须是int8|必须是 int8|只要int8|只要 int8|仅限int8|仅限 int8"),  # fmt: skip
    ("set", {_INT8: "qat"}, "qat|int8 qat|qat int8|quantization aware|quantization aware training|"
                            "quantization aware distillation|量化感知训练|量化感知|量化感知蒸馏"),  # fmt: skip
    ("set", {_INT8: "dynamic"}, "dynamic int8|int8 dynamic|dynamic quantization|动态量化|动态 int8|动态int8"),
    ("set", {_INT8: "weights-only"}, "weights only|int8 weights only|weight only quantization|只量化权重|"
                                     "仅量化权重|仅权重量化"),  # fmt: skip
    ("set", {"quantize.precision": "fp16"}, "fp16|float16|half precision|16 bit floats|半精度"),
    ("set", {"quantize.precision": "fp16", "quantize.select": "half"},
     "fp16 only|only fp16|half precision only|must be fp16|只用fp16|只用 fp16|仅fp16|仅 fp16|只用半精度|"
     "必须fp16|必须 fp16"),  # fmt: skip
    ("set", {"quantize.precision": "bf16"}, "bf16|bfloat16"),
    ("set", {"quantize": None},
     "float only|only float|floats only|float32|fp32|float32 only|fp32 only|only float32|only fp32|in "
     "float|not quantized|unquantized|no quantization|without quantization|do not quantize|don't quantize|"
     "single precision|不量化|不要量化|不做量化|无量化|单精度|全精度|只用浮点|仅浮点|仅用浮点|只用fp32|只用 fp32|"
     "只用float32|只用 float32|浮点"),  # fmt: skip
    ("set", {THREADS: 1},
     "single thread|single threaded|single core|单线程|单核"),  # fmt: skip
    ("set", {THREADS: 2}, "dual core|双线程|双核"),
    ("set", {THREADS: 4}, "quad core|四线程|四核"),
    ("set", {"gate.accuracy.max_drop": 0},
     "lossless|without loss|no loss|without losing accuracy|no accuracy loss|no loss of accuracy|without "
     "any loss|lose nothing|not worse than the teacher|no worse than the teacher|as accurate as the "
     "teacher|as good as the teacher|无损|不掉点|不损失精度|不降低精度|精度不下降|准确率不下降|不差于教师|精度无损|"
     "准确率不降|精度不降"),  # fmt: skip
    (
        "objective",
        "size",
        "as small as possible|smallest|the smallest possible|the smallest model|as tiny as possible|"
        "尽可能小|尽量小|越小越好|最小|体积尽可能小|体积尽量小|体积最小|模型尽可能小",
    ),
    (
        "objective",
        "latency",
        "as fast as possible|fastest|as quick as possible|lowest latency|lowest possible latency|"
        "尽可能快|尽量快|越快越好|最快|延迟尽可能低|延迟尽量低|速度尽可能快|延迟最低|延迟越低越好",
    ),
    (
        "objective",
        "accuracy",
        "as accurate as possible|most accurate|highest accuracy|best accuracy|best possible accuracy|"
        "highest possible accuracy|尽可能准|尽可能准确|尽量准|尽量准确|越准越好|精度尽可能高|精度尽量高|准确率尽可能高|"
        "准确率尽量高|准确率越高越好|精度越高越好|最准|精度最高|准确率最高",
    ),
    (
        "objective",
        "memory",
        "as little memory as possible|least memory|lowest memory|smallest memory|内存尽可能小|内存尽可能少|"
        "内存尽量小|内存尽量少|内存越小越好|内存越少越好|内存最小",
    ),
    # Structure.
    ("separator", None, ",|;|.|!|。|、|(|)|and|and then|but|with|while|also|plus|和|并|并且|且|而且|同时|另外|"
                        "以及|但|但是|然后|&|–|—|-"),  # fmt: skip
    ("article", None, "a|an"),
    ("filler", None, _FILLERS),
)
"""Kind of a term, what it means, and its phrases."""

VENDORS = ("nvidia", "jetson", "nvidia jetson", "geforce", "nvidia geforce", "英伟达")
"""What may precede a device's name."""

ALIASES = {
    "host": "this machine|this computer|my machine|my computer|my laptop|this laptop|this pc|localhost|"
    "locally|local machine|here|本机|本地|这台机器|这台电脑|我的电脑|当前机器",
    "intel-n100": "n100|intel n100 box|英特尔 n100",
    "jetson-agx-orin-64gb": "agx orin|agx orin 64gb|orin agx",
    "jetson-orin-nano-8gb": "orin nano|orin nano 8gb",
    "jetson-orin-nano-super-8gb": "orin nano super|orin nano super 8gb|orin nano 8gb super",
    "jetson-orin-nx-16gb": "orin nx|orin nx 16gb",
    "jetson-thor-t5000": "thor|agx thor|thor t5000|t5000",
    "l4": "l4 gpu|l4显卡",
    "raspberry-pi-4": "raspberry pi 4|raspberry pi 4b|raspberry pi 4 model b|rpi 4|rpi 4b|pi 4|pi 4b|raspi 4|"
    "树莓派 4|树莓派 4b|树莓派四",
    "raspberry-pi-5": "raspberry pi 5|rpi 5|pi 5|raspi 5|树莓派 5|树莓派五",
    "rtx-3060": "geforce 3060|3060 显卡",
    "rtx-4060": "geforce 4060|4060 显卡",
    "rtx-4090": "geforce 4090|4090 显卡",
}
"""Profile → its other names; one without is known by its own name."""

AMBIGUOUS = {
    **dict.fromkeys(
        ("orin", "jetson orin", "nvidia orin", "jetson", "nvidia jetson"),
        (
            "jetson-orin-nano-8gb",
            "jetson-orin-nano-super-8gb",
            "jetson-orin-nx-16gb",
            "jetson-agx-orin-64gb",
        ),
    ),
    **dict.fromkeys(
        ("raspberry pi", "rpi", "pi", "raspi", "树莓派"), ("raspberry-pi-4", "raspberry-pi-5")
    ),
    **dict.fromkeys(("rtx", "geforce"), ("rtx-3060", "rtx-4060", "rtx-4090")),
}
"""Names that several profiles have."""
