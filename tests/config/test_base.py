from __future__ import annotations

import pytest

from edgekd.config import base
from edgekd.config.pipeline import load_pipeline
from edgekd.distill.losses import LOSSES
from edgekd.errors import InputError

PIPELINE = """
name: small
data: {source: digits}
teacher: {model: mlp, train: {}}
student: {model: mlp}
distill: {losses: [hard_labels, {similarity: {}, weight: 2}, {similarity: {}, weight: 3}]}
quantize: {half: fp16, keep: [head]}
"""


@pytest.fixture(autouse=True)
def no_notice_yet(monkeypatch):
    monkeypatch.setattr(base, "_noticed", set())


def load(folder, text=PIPELINE):
    (folder / "p.yaml").write_text(text)
    return load_pipeline(folder / "p.yaml")


def test_an_old_spelling_is_read_as_the_new_one_with_one_notice(tmp_path, capsys):
    old = load(tmp_path)
    notices = capsys.readouterr().err.splitlines()
    new = PIPELINE.replace("similarity", "sp").replace("half", "precision")
    assert old == load(tmp_path, new.replace("keep", "exclude_nodes"))
    assert capsys.readouterr().err == ""
    assert len(notices) == 3
    assert "'similarity' is now 'sp'" in notices[0]
    load(tmp_path)
    assert capsys.readouterr().err == ""


def test_both_spellings_at_once_are_refused(tmp_path):
    with pytest.raises(InputError, match="'half' is the old spelling of 'precision'") as caught:
        load(tmp_path, PIPELINE.replace("half: fp16", "half: fp16, precision: bf16"))
    assert str(caught.value.where).endswith("p.yaml:7")


def test_a_wrong_value_of_an_old_key_is_located(tmp_path):
    with pytest.raises(InputError, match="precision") as caught:
        load(tmp_path, PIPELINE.replace("fp16", "fp17"))
    assert str(caught.value.where).endswith("p.yaml:7")


@pytest.mark.parametrize(("old", "new"), base.LOSSES.items())
def test_a_renamed_loss_exists_and_its_old_name_is_free(old, new):
    assert new in LOSSES
    assert old not in LOSSES
