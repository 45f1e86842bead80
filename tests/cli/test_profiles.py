"""``edgekd profiles``: list, show, check."""

import json

from edgekd.config.profile import list_profiles
from tests.command_line import edgekd


def call(*words, **settings):
    return edgekd("profiles", *words, **settings)


def test_list_names_every_profile():
    result = call("list")
    assert all(name in result.output for name in list_profiles())


def test_show_gives_figures_with_their_source():
    result = call("show", "jetson-thor-t5000")
    assert "memory.total_mb" in result.output
    assert "recalled" in result.output
    as_json = json.loads(call("show", "l4", "--json").output)
    assert as_json["memory"]["total_mb"] == {
        "source": "third-party",
        "verified": True,
        "value": 24000.0,
    }


def test_check_lists_unverified_figures():
    result = call("check", "rtx-3060")
    assert "unverified: compute.bandwidth_gb_s = 360 (recalled)" in result.output


def test_check_goes_on_after_a_wrong_profile_and_fails(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n")
    result = call("check", path, "l4", code=2)
    assert f"{path}: wrong" in result.output
    assert "l4: ok" in result.output


def test_brackets_in_a_profile_are_text(tmp_path):
    path = tmp_path / "x.yaml"
    shown = call("show", "raspberry-pi-5", "--json").output
    path.write_text(
        shown.replace("Raspberry Pi 5", "[/red] Pi").replace('"note": "', '"note": "[/b]')
    )
    result = call("show", str(path))
    assert result.exception is None
    assert "[/red] Pi" in result.output
    assert "[/b]" in result.output
