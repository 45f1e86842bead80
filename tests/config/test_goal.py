"""Goals in plain words become the keys that they mean, in both languages; nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.config.goal import parse_goal
from edgekd.config.pipeline import load_pipeline
from edgekd.config.profile import list_profiles
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError
from edgekd.files import pipelines_folder

P95, P99, P50 = "gate.latency.p95_ms", "gate.latency.p99_ms", "gate.latency.p50_ms"
SIZE, MEMORY, DROP = "gate.size.max_mb", "gate.memory.peak_mb", "gate.accuracy.max_drop"
FLOOR, FASTER, SMALLER = "gate.accuracy.min", "gate.latency.min_speedup", "gate.size.min_ratio"
PARAMETERS, SHARE = "gate.parameters.max", "gate.parameters.max_ratio"
BATCH, THREADS, INT8 = "benchmark.batch_size", "engines.0.threads", "quantize.int8"
HALF, SELECT, BEST = "quantize.precision", "quantize.select", "student.search.objectives"
GAIN, ERROR, DEVICE = "gate.accuracy.min_gain", "gate.accuracy.max", "profile"

ENGLISH: list[tuple[str, dict[str, Any]]] = [
    (
        "under 5 ms and 20 MB on an Orin Nano, lose at most one point",
        {P95: 5, SIZE: 20, DEVICE: "jetson-orin-nano-8gb", DROP: 0.01},
    ),
    ("at most 1 % drop", {DROP: 0.01}),
    ("faster than the teacher by 3×", {FASTER: 3}),
    ("p99 below 2 ms, p50 below 1 ms", {P99: 2, P50: 1}),
    ("median latency under 800 µs", {P50: 0.8}),
    ("the 99th percentile must stay below 12 milliseconds", {P99: 12}),
    ("no slower than 0.02 s", {P95: 20}),
    ("30 fps on a Raspberry Pi 4", {P95: 33.3333333, DEVICE: "raspberry-pi-4"}),
    ("at least 200 frames per second", {P95: 5}),
    ("at least 200 fps at batch 8", {P95: 5, BATCH: 8}),
    ("100 Hz or more", {P95: 10}),
    ("runs at 25 images per second", {P95: 40}),
    ("I want it as small as possible", {BEST: ["size", "accuracy"]}),
    ("as accurate as possible", {BEST: ["accuracy"]}),
    ("as fast as possible, as accurate as possible", {BEST: ["latency", "accuracy"]}),
    ("as accurate as possible and as small as possible", {BEST: ["accuracy", "size"]}),
    ("as small as possible but as fast as possible", {BEST: ["size", "latency", "accuracy"]}),
    ("as little memory as possible", {BEST: ["memory", "accuracy"]}),
    ("a file of at most 2 MB", {SIZE: 2}),
    ("300 kB on disk", {SIZE: 0.3}),
    ("model size below 1 MiB", {SIZE: 1.048576}),
    ("64 MB of memory", {MEMORY: 64}),
    ("RAM at most 0.5 GB", {MEMORY: 500}),
    ("peak memory within 128MB; file within 8MB", {MEMORY: 128, SIZE: 8}),
    ("64 MB of memory 2 MB on disk", {MEMORY: 64, SIZE: 2}),
    ("memory 64 MB size 2 MB p99 5 ms", {MEMORY: 64, SIZE: 2, P99: 5}),
    ("fewer than 100k parameters", {PARAMETERS: 100_000}),
    ("no more than two million parameters", {PARAMETERS: 2_000_000}),
    ("2.5M params", {PARAMETERS: 2_500_000}),
    ("50000 parameters", {PARAMETERS: 50_000}),
    ("a tenth of the teacher's parameters", {SHARE: 0.1}),
    ("10x fewer parameters than the teacher", {SHARE: 0.1}),
    ("lose half a point at most", {DROP: 0.005}),
    ("without losing accuracy", {DROP: 0}),
    ("not worse than the teacher", {DROP: 0}),
    ("accuracy within two points of the teacher", {DROP: 0.02}),
    ("give up no more than 0.5 percentage points", {DROP: 0.005}),
    ("the accuracy may drop by one point", {DROP: 0.01}),
    ("max drop 0.02", {DROP: 0.02}),
    ("accuracy above 90 %", {FLOOR: 0.9}),
    ("at least 95% accurate", {FLOOR: 0.95}),
    ("accuracy >= 0.9", {FLOOR: 0.9}),
    ("at least two points better than alone", {GAIN: 0.02}),
    ("mae below 0.3", {ERROR: 0.3}),
    ("twice as fast as the teacher", {FASTER: 2}),
    ("a speedup of 4x", {FASTER: 4}),
    ("20 % faster than the teacher", {FASTER: 1.2}),
    ("half the latency of the teacher", {FASTER: 2}),
    ("5x smaller", {SMALLER: 5}),
    ("half the size of the teacher", {SMALLER: 2}),
    ("compressed 12 times", {SMALLER: 12}),
    ("a quarter of the original model's size", {SMALLER: 4}),
    ("int8 only", {INT8: "static", SELECT: "int8"}),
    ("8-bit, single-threaded", {INT8: "static", THREADS: 1}),
    ("quantization-aware training on this machine", {INT8: "qat", DEVICE: "host"}),
    ("fp16 on the Jetson AGX Orin", {HALF: "fp16", DEVICE: "jetson-agx-orin-64gb"}),
    ("half precision", {HALF: "fp16"}),
    ("float only", {"quantize": None}),
    ("do not quantize", {"quantize": None}),
    ("bf16 on a Thor", {HALF: "bf16", DEVICE: "jetson-thor-t5000"}),
    ("with 2 threads on an N100", {THREADS: 2, DEVICE: "intel-n100"}),
    ("batch size 16 on the RTX 4090", {BATCH: 16, DEVICE: "rtx-4090"}),
    ("batches of four", {BATCH: 4}),
    (
        "Orin Nano Super: below three ms",
        {DEVICE: "jetson-orin-nano-super-8gb", P95: 3},
    ),
    ("NVIDIA Jetson Orin NX 16GB, under 10 ms", {DEVICE: "jetson-orin-nx-16gb", P95: 10}),
    ("about 5 ms on the L4", {P95: 5, DEVICE: "l4"}),
    ("deploy it here with only 20 MB of RAM", {DEVICE: "host", MEMORY: 20}),
    (
        "We deploy to the Orin NX. Latency must be at most 4 ms (p99), and memory at most 200 MB.",
        {DEVICE: "jetson-orin-nx-16gb", P99: 4, MEMORY: 200},
    ),
    ("p95 <= 3ms, model <= 500kB, acc drop <= 0.5%", {P95: 3, SIZE: 0.5, DROP: 0.005}),
    ("Under 5ms.  Twelve MB!", {P95: 5, SIZE: 12}),
]

CHINESE: list[tuple[str, dict[str, Any]]] = [
    ("准确率下降不超过 1 个点", {DROP: 0.01}),
    ("延迟低于 5 毫秒", {P95: 5}),
    ("20 MB 以内", {SIZE: 20}),
    ("内存不超过64MB", {MEMORY: 64}),
    ("单线程", {THREADS: 1}),
    ("部署在树莓派 5 上，延迟低于 20 毫秒", {DEVICE: "raspberry-pi-5", P95: 20}),
    ("树莓派4，每秒至少30帧", {DEVICE: "raspberry-pi-4", P95: 33.3333333}),
    ("5毫秒以内，20兆以内", {P95: 5, SIZE: 20}),
    ("推理时间不超过十毫秒", {P95: 10}),
    ("p99 延迟小于 2ms", {P99: 2}),
    ("中位数延迟不超过 800 微秒", {P50: 0.8}),
    ("99分位 12 毫秒以下", {P99: 12}),
    ("耗时不到三毫秒", {P95: 3}),
    ("延迟降到五毫秒", {P95: 5}),
    ("0.02 秒之内", {P95: 20}),
    ("至少 200 帧每秒", {P95: 5}),
    ("帧率 25 fps 以上", {P95: 40}),
    ("每秒 50 张", {P95: 20}),
    ("模型大小控制在 2 MB", {SIZE: 2}),
    ("文件小于300KB", {SIZE: 0.3}),
    ("体积不超过半兆", {SIZE: 0.5}),
    ("磁盘占用最多 1.5 MB", {SIZE: 1.5}),
    ("峰值内存 128 MB 以内", {MEMORY: 128}),
    ("内存占用小于0.5GB", {MEMORY: 500}),
    ("内存 64MB 文件 2MB", {MEMORY: 64, SIZE: 2}),
    ("内存最多一百兆，存储最多十兆", {MEMORY: 100, SIZE: 10}),
    ("参数不超过 100k", {PARAMETERS: 100_000}),
    ("参数量少于20万", {PARAMETERS: 200_000}),
    ("最多两百万个参数", {PARAMETERS: 2_000_000}),
    ("参数量是教师的十分之一", {SHARE: 0.1}),
    ("掉点不超过零点五个百分点", {DROP: 0.005}),
    ("精度损失不超过1%", {DROP: 0.01}),
    ("准确率最多降半个点", {DROP: 0.005}),
    ("最多损失一个点", {DROP: 0.01}),
    ("不掉点", {DROP: 0}),
    ("精度无损", {DROP: 0}),
    ("准确率不低于 90%", {FLOOR: 0.9}),
    ("准确率至少百分之九十五", {FLOOR: 0.95}),
    ("精度大于0.9", {FLOOR: 0.9}),
    ("比单独训练好两个点以上", {GAIN: 0.02}),
    ("误差小于 0.3", {ERROR: 0.3}),
    ("比教师快 3 倍", {FASTER: 3}),
    ("加速四倍", {FASTER: 4}),
    ("速度是教师的两倍", {FASTER: 2}),
    ("快20%", {FASTER: 1.2}),
    ("比老师小十倍", {SMALLER: 10}),
    ("压缩12倍", {SMALLER: 12}),
    ("模型大小是教师的四分之一", {SMALLER: 4}),
    ("体积是原模型的一半", {SMALLER: 2}),
    ("尽可能小", {BEST: ["size", "accuracy"]}),
    ("越快越好", {BEST: ["latency", "accuracy"]}),
    ("精度尽可能高", {BEST: ["accuracy"]}),
    ("内存尽可能少", {BEST: ["memory", "accuracy"]}),
    ("准确率尽可能高，同时体积尽可能小", {BEST: ["accuracy", "size"]}),
    ("只用 int8", {INT8: "static", SELECT: "int8"}),
    ("int8 量化", {INT8: "static"}),
    ("量化感知训练", {INT8: "qat"}),
    ("动态量化，本机运行", {INT8: "dynamic", DEVICE: "host"}),
    ("半精度", {HALF: "fp16"}),
    ("只用 fp16", {HALF: "fp16", SELECT: "half"}),
    ("不量化", {"quantize": None}),
    ("单精度，双线程", {"quantize": None, THREADS: 2}),
    ("批大小 8", {BATCH: 8}),
    ("每批四张", {BATCH: 4}),
    ("用 3 个线程", {THREADS: 3}),
    ("英伟达 Orin Nano，5 毫秒", {DEVICE: "jetson-orin-nano-8gb", P95: 5}),
    ("RTX 4090 上大约 1 毫秒", {DEVICE: "rtx-4090", P95: 1}),
    ("尽量小，但是准确率不能低于90%", {BEST: ["size", "accuracy"], FLOOR: 0.9}),
    ("希望在树莓派4上跑到25fps，内存别超过100M", {DEVICE: "raspberry-pi-4", P95: 40, MEMORY: 100}),
    ("请把模型部署到 Orin NX，延迟２ｍｓ左右", {DEVICE: "jetson-orin-nx-16gb", P95: 2}),
]


def keys(text: str) -> dict[str, Any]:
    return {wish.key: wish.value for wish in parse_goal(text).wishes}


@pytest.mark.parametrize(("text", "meant"), ENGLISH + CHINESE, ids=lambda v: str(v)[:40])
def test_a_phrase_means_these_keys(text: str, meant: dict[str, Any]) -> None:
    assert keys(text) == meant


@pytest.mark.parametrize(("text", "words"), [
    ("under 5 ms, cheap", "'cheap'"),
    ("under 5 ms or 8 ms", "'or'"),
    ("must not crash", "'not', 'crash'"),
    ("between 2 and 5 ms", "'between'"),
    ("on a Coral stick under 5 ms", "'Coral', 'stick'"),
    ("Jetson Nano", "'Nano'"),
    ("average latency under 5 ms", "'average'"),
    ("5 parsecs", "'parsecs'"),
    ("latncy under 5 ms", "did you mean 'latency'"),
    ("the teacher", "'the teacher'"),
    ("low latency", "'low'"),
    ("under 5 ms with threads", "'threads'"),
    ("延迟低于5毫秒，便宜", "'便宜'"),
    ("不要太大", "太大"),
    ("功耗低于 5 瓦", "'功耗', '瓦'"),
    ("延迟", "'延迟'"),
])  # fmt: skip
def test_words_not_understood_are_named(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_goal(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("", "no wish"),
    ("the model", "no wish"),
    ("0,5 ms", "decimals with a point (0.5)"),
    ("1,000 kB", "comma"),
    ("20M", "megabytes or millions of parameters"),
    ("5", "no unit"),
    ("0 ms", "it is 0"),
    ("-5 ms", "not understood"),
    ("2-5 ms", "not understood"),
    ("at least 5 ms", "upper limit"),
    ("准确率最多 90%", "lower limit"),
    ("at most 1 %", "open what this is a share of"),
    ("99 % of the teacher's accuracy", "open what this is a share of"),
    ("3x", "open what of the teacher"),
    ("under 5 ms, at most 8 ms", "contradict"),
    ("延迟低于5毫秒，至少100fps", "contradict"),
    ("int8 only, float only", "contradict"),
    ("fp16, bf16", "contradict"),
    ("Orin Nano and Raspberry Pi 5", "contradict"),
    ("on an Orin under 5 ms", "jetson-orin-nx-16gb"),
    ("树莓派", "raspberry-pi-4 or raspberry-pi-5"),
    ("Raspberry Pi 4 8GB", "this size of the board"),
    ("batch 2.5", "whole number"),
    ("accuracy at least 90", "no unit"),
    ("x" * 2000, "more than 1000"),
])  # fmt: skip
def test_what_is_open_or_wrong_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_goal(text)
    assert says in str(caught.value)


def test_same_limit_said_twice_is_no_contradiction() -> None:
    assert keys("under 5 ms, at least 200 fps") == {P95: 5}


def test_every_profile_is_known_by_its_name() -> None:
    for name in list_profiles():
        for text in (f"on {name}, 5 ms", f"{name.replace('-', ' ')}上5毫秒"):
            assert keys(text) == {DEVICE: name, P95: 5}


NUMBER = st.one_of(st.integers(1, 999).map(float), st.integers(1, 99999).map(lambda n: n / 100))
WHOLE = st.integers(1, 64)

KINDS: dict[str, tuple[st.SearchStrategy[Any], float, list[str], list[str]]] = {
    P95: (
        NUMBER,
        1,
        ["under {} ms", "{}ms or less", "latency of at most {} milliseconds"],
        ["延迟低于 {} 毫秒", "{}ms以内", "耗时不超过{}毫秒"],
    ),
    P99: (NUMBER, 1, ["p99 below {} ms", "a 99th percentile of {} ms"], ["p99 小于 {} 毫秒"]),
    SIZE: (
        NUMBER,
        1,
        ["a file below {} MB", "{} MB on disk"],
        ["文件不超过 {} MB", "体积{}兆以内"],
    ),
    MEMORY: (
        NUMBER,
        1,
        ["{} MB of memory", "RAM under {}MB"],
        ["内存不超过{}MB", "内存 {} 兆以下"],
    ),
    DROP: (
        st.integers(1, 99),
        100,
        ["lose at most {} points", "a drop of {} % at most"],
        ["准确率下降不超过 {} 个点", "最多掉{}个百分点"],
    ),
    FLOOR: (
        st.integers(1, 99),
        100,
        ["accuracy above {} %", "at least {}% accurate"],
        ["准确率不低于 {}%", "精度{}%以上"],
    ),
    FASTER: (
        NUMBER,
        1,
        ["{}x faster than the teacher", "a speedup of {}x"],
        ["比教师快{}倍", "加速 {} 倍"],
    ),
    SMALLER: (
        NUMBER,
        1,
        ["{} times smaller", "{}× smaller than the teacher"],
        ["比教师小 {} 倍", "压缩{}倍"],
    ),
    PARAMETERS: (
        st.integers(1, 10**8),
        1,
        ["fewer than {} parameters"],
        ["参数不超过 {}", "最多 {} 个参数"],
    ),
    BATCH: (WHOLE, 1, ["batch {}", "at batch size {}"], ["批大小 {}", "批量{}"]),
    THREADS: (WHOLE, 1, ["{} threads", "with {} threads"], ["{} 线程", "用{}个线程"]),
}
"""Key: its values, the unit in which they are said, and phrases in both languages."""


@given(st.data())
def test_said_in_any_words_the_keys_come_back(data: st.DataObject) -> None:
    chinese = data.draw(st.booleans())
    chosen = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True))
    phrases, meant = [], {}
    for key in chosen:
        values, factor, english, chinese_phrases = KINDS[key]
        value = data.draw(values)
        phrase = data.draw(st.sampled_from(chinese_phrases if chinese else english))
        phrases.append(phrase.format(f"{value:g}" if isinstance(value, float) else value))
        meant[key] = float(
            f"{float(f'{value:g}') / factor if isinstance(value, float) else value / factor:.9g}"
        )
    joint = data.draw(st.sampled_from(["，", "，并且", "；"] if chinese else [", ", " and ", "; "]))
    assert keys(joint.join(phrases)) == pytest.approx(meant)


@given(st.sampled_from(ENGLISH + CHINESE), st.sampled_from(["frobnicate", "zyx7", "瓩", "?", "€"]))
def test_nothing_is_ignored_wherever_it_stands(phrase: tuple[str, Any], alien: str) -> None:
    for text in (f"{alien} {phrase[0]}", f"{phrase[0]} {alien}"):
        with pytest.raises(InputError) as caught:
            parse_goal(text)
        assert alien in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_keys_or_an_error(text: str) -> None:
    try:
        found = parse_goal(text).wishes
    except InputError as error:
        found = error.where == "--goal"
    assert found


@pytest.mark.parametrize("text", [t for t, meant in ENGLISH + CHINESE if BEST not in meant][::4])
def test_the_overrides_of_a_goal_are_a_pipeline(text: str) -> None:
    path = pipelines_folder() / "fashion-mnist.yaml"
    overrides = parse_goal(text).overrides(read_yaml(path).content)
    if any(line.startswith("gate.accuracy.max=") for line in overrides):
        pytest.skip("a limit of an error, for another task")
    load_pipeline(path, overrides)


@pytest.mark.parametrize(("engines", "expected"), [
    (None, 'engines=[{"kind": "onnxruntime", "threads": 2}]'),
    (["onnxruntime"], 'engines=[{"kind": "onnxruntime", "threads": 2}]'),
    ([{"kind": "onnxruntime"}, "x"], "engines.0.threads=2"),
    (["onnxruntime", "x"], 'engines.0={"kind": "onnxruntime", "threads": 2}'),
])  # fmt: skip
def test_threads_are_set_however_engines_are_written(engines: Any, expected: str) -> None:
    content = {} if engines is None else {"engines": engines}
    assert parse_goal("2 threads").overrides(content) == [expected]


def test_a_rate_counts_the_samples_of_the_files_batch() -> None:
    goal = parse_goal("200 fps")
    assert goal.overrides({"benchmark": {"batch_size": 4}}) == ["gate.latency.p95_ms=20.0"]


def test_choosing_the_student_needs_a_search() -> None:
    goal = parse_goal("as small as possible")
    with pytest.raises(InputError, match="asks to choose the student"):
        goal.overrides({"student": {"model": "mlp"}})
    assert goal.overrides({"student": {"search": {}}}) == [f'{BEST}=["size", "accuracy"]']
