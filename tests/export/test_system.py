from __future__ import annotations

import pytest

from edgerun.system import describe_environment, read_conditions, read_power


@pytest.fixture
def machine(tmp_path):
    """A file system on which a test puts what a kernel would show."""

    def put(**files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return put


def test_nothing_readable_is_none_everywhere(tmp_path):
    assert set(read_conditions(tmp_path).values()) == {None}
    assert set(read_power(tmp_path).values()) == {None}
    described = describe_environment(tmp_path)
    assert described["device"] is None
    assert described["memory_mb"] is None


def test_a_jetson(machine):
    hwmon = "sys/class/hwmon/hwmon3"
    root = machine(
        **{
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            f"{hwmon}/in1_label": "VDD_IN\n",
            f"{hwmon}/in1_input": "5000\n",
            f"{hwmon}/curr1_input": "1200\n",
            "sys/class/hwmon/hwmon1/oc1_event_cnt": "2\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48500\n",
            "sys/class/thermal/thermal_zone1/type": "off\n",
        }
    )
    conditions = read_conditions(root)
    assert describe_environment(root)["device"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert conditions["power_mw"] == {"VDD_IN": 6000.0}
    assert conditions["temperatures_c"] == {"thermal_zone0:cpu-thermal": 48.5}
    assert conditions["throttling"] == {"jetson_overcurrent_events": {"oc1_event_cnt": 2.0}}


def test_an_x86_machine(machine):
    cpu = "sys/devices/system/cpu"
    root = machine(
        **{f"{cpu}/cpu{i}/cpufreq/scaling_cur_freq": f"{1000 + i}000" for i in (0, 2, 10)},
        **{f"{cpu}/cpu{i}/thermal_throttle/core_throttle_count": "3" for i in (0, 2)},
        **{
            f"{cpu}/cpu0/cpufreq/scaling_governor": "performance\n",
            f"{cpu}/intel_pstate/no_turbo": "1",
        },
    )
    conditions = read_conditions(root)
    assert conditions["clocks_mhz"] == [1000.0, 1002.0, 1010.0]
    assert conditions["throttling"] == {"x86_events": 6}
    power = read_power(root)
    assert (power["governor"], power["turbo"]) == ("performance", False)
